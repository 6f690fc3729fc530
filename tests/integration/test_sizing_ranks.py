"""Planned memory against what ranks hold whose weights are shared out."""

import json

import pytest

from support.manifests import changed, train_job
from support.models import TINY
from support.ranks import join, start
from unmask.models.registry import parse_config
from unmask.models.shape import shape_of
from unmask.training.sizing.estimate import plan_of
from unmask.training.sizing.memory import states_of
from unmask_api.train_job import DiffusionTrainJob

CONFIG = {key: value for key, value in TINY.items() if key != "initializer_range"}


def hold(text, folder):
    """One rank: make the weights, their gradient and moments, and write down how many bytes they are."""
    from unmask.training.arrangement import blank_weights
    from unmask.training.distributed import joined_world
    from unmask.training.learner import Learner

    spec = DiffusionTrainJob.from_json(text).spec
    with joined_world() as world:
        learner = Learner(blank_weights(spec, parse_config(CONFIG), world), spec)
        weights = sum(part.nbytes for part in learner.weights.named.values())
        gradient = learner.weights.gradient.nbytes
        moments = sum(tensor.nbytes for name, tensor in learner.tensors() if name.startswith("optimizer."))
        (folder / f"{world.rank}.json").write_text(json.dumps([weights, gradient, moments]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "parallelism",
    [
        {"shard": "Full"},
        {"shard": "Full", "expertParallel": 2},
        {"shard": "Full", "expertParallel": 4},
        {"shard": "Hybrid", "replicas": 2},
    ],
    ids=str,
)
def test_ranks_hold_the_bytes_that_are_planned(tmp_path, parallelism, precision):
    values = {"spec.parallelism": parallelism | {"processesPerNode": 4}, "spec.precision": precision}
    text = json.dumps(changed(train_job(), values | {"spec.model.init.config": CONFIG}))
    assert join(start(hold, text, tmp_path, ranks=4)) == [0] * 4
    held = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    shape = shape_of(parse_config(CONFIG))
    plan = plan_of(DiffusionTrainJob.from_json(text).spec.parallelism, [shape])
    planned = list(states_of(shape, precision, plan))
    assert held[0] == planned, "the first rank holds the largest pieces"
    assert all(one <= most for rank in held for one, most in zip(rank, planned, strict=True))
    copies = plan.replicas
    assert sum(rank[0] for rank in held) == 4 * copies * shape.parameters
