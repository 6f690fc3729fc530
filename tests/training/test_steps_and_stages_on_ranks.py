"""Invariants of whole steps and stages on 1, 2 and 4 processes that need a run or a gradient to be seen."""

import json
import math

import pytest
import torch

from support.models import TINY
from support.ranks import train_to_the_end
from support.sharding import block_job, first_gradient
from support.training import metrics, preferences, training_job, write_data, write_lines
from unmask.models.loading import build, load, save
from unmask.models.registry import parse_config
from unmask_api.train_job import DiffusionTrainJob

pytestmark = pytest.mark.training

WORLDS = {
    "one": (1, {}),
    "two": (2, {"shard": "Full"}),
    "four": (4, {"shard": "Full", "expertParallel": 2}),
}
MANY = {"num_experts": 64, "n_group": 1, "topk_group": 1}
"""So many experts that some have no token in a step."""
EVERYTHING = {"low": "0.98", "high": "1", "scope": "Block", "weight": "Flat"}
"""Nearly all tokens are masked."""
SHARED = {"length": 32, "rowsPerStep": 4, "blockSizes": [4]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.mark.parametrize("name", WORLDS)
def test_grouped_experts_have_the_gradient_of_a_loop_over_them(folder, name, record_measurement):
    ranks, parallelism = WORLDS[name]
    values = {"model.init.config": TINY | MANY}
    (ours, figures), (loop, plain) = (
        first_gradient(
            block_job(folder, f"{name} looped {looped}", parallelism, **values), ranks=ranks, looped=looped
        )
        for looped in (False, True)
    )
    assert figures["tokens"] == plain["tokens"]
    assert any(count == 0 for count in figures["tokens"][0]), "an expert without tokens"
    worst = max(float((ours[key] - theirs).abs().max()) for key, theirs in loop.items())
    record_measurement(f"largest difference of a gradient from a loop over experts, {name}", worst)
    assert worst < 1e-6
    assert max(float(theirs.abs().max()) for theirs in loop.values()) > 1e-2


@pytest.fixture(scope="module")
def initial(folder):
    """Folders of one random model, by what its mask embedding is multiplied with."""
    model = build(parse_config(TINY), seed=3)
    paths = {}
    for scale in (1.0, 1e-5):
        with torch.no_grad():
            model.embedding.weight[TINY["mask_token_id"]] *= scale
        paths[scale] = folder / f"mask row times {scale}"
        save(model, paths[scale])
    return paths


@pytest.mark.parametrize("name", WORLDS)
def test_noise_on_embeddings_keeps_gradients_of_a_mask_row_near_zero(
    folder, initial, name, record_measurement
):
    ranks, parallelism = WORLDS[name]

    def norm(scale, **stage):
        run = f"{name} {scale} {len(stage)}"
        job = block_job(folder, run, parallelism, **{"model.init": {"uri": str(initial[scale])}})
        manifest = job.to_json_dict()
        manifest["spec"]["stages"][0] |= {"noise": EVERYTHING} | stage
        _, figures = first_gradient(DiffusionTrainJob.from_json(json.dumps(manifest)), ranks=ranks)
        return figures["norm"]

    usual, without = norm(1.0), norm(1e-5)
    disturbed = norm(1e-5, embeddingNoise={"std": str(TINY["initializer_range"]), "steps": 5})
    record_measurement(f"gradient norm, {name}", f"{usual:.4g}")
    record_measurement(f"gradient norm, mask row x 1e-5, {name}", f"{without:.4g}")
    record_measurement(f"gradient norm, mask row x 1e-5, disturbed, {name}", f"{disturbed:.4g}")
    assert without > 20 * usual
    assert disturbed < 3 * usual


@pytest.mark.parametrize("name", WORLDS)
def test_the_mean_of_equal_checkpoints_is_each_and_preferences_begin_at_ln_2(folder, name):
    """A stage that learns nothing ends with the mean of its checkpoints; one of preferences follows."""
    ranks, parallelism = WORLDS[name]
    write_lines(folder / "pairs.jsonl", preferences(range(100)))
    pairs = {"train": [{"uri": str(folder / "pairs.jsonl"), "format": "preference"}]}
    still = {"name": "still", "objective": "bdlm", "steps": 3, "merge": {"best": 3}}
    still |= {"learningRate": {"peak": "1e-30"}, "routerBias": "Frozen"}
    prefer = {"name": "prefer", "objective": "dpo", "steps": 2, "learningRate": {"peak": "1e-2"}}
    prefer |= {"data": pairs}
    run = folder / f"stages {name}"
    job = training_job(
        folder,
        {
            "spec.model.init.config": TINY,
            "spec.stages": [still | SHARED, prefer | SHARED],
            "spec.evaluation": {"everySteps": 1, "batches": 1},
            "spec.parallelism": {"microBatchRows": 1} | parallelism,
            "spec.checkpoint": {"uri": str(run), "everySteps": 1, "keepLast": 4},
        },
    )
    train_to_the_end(job, ranks=ranks)
    lines = metrics(run)
    assert [line["steps"] for line in lines if line["kind"] == "merge"] == [[1, 2, 3]]
    merged, first = (
        load(run / "exports" / "still").state_dict(),
        build(parse_config(TINY), seed=7).state_dict(),
    )
    assert all(torch.equal(merged[key], tensor) for key, tensor in first.items())
    steps = [line for line in lines if line["kind"] == "step" and line["stage"] == "prefer"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (steps[0]["margin"], steps[0]["preferred"]) == (0.0, 0.0)
    assert steps[1]["margin"] != 0.0
