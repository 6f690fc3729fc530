"""A step of every objective on 1, 2 and 4 processes: the same loss, gradient and experts.

The slow references of the unit tests are held against one process; here one process, a row at a time, is the
reference of processes that share the rows, and of such that share out weights and experts.
"""

import pytest
import torch

from support.models import TINY, TINY_CANVAS
from support.sharding import first_gradients
from support.training import CHATS, training_job, write_chats

pytestmark = pytest.mark.training

PAIR = {
    "low": "0.2",
    "high": "0.9",
    "scope": "Block",
    "weight": "Elbo",
    "views": 2,
    "complementary": True,
}
DISTURBED = {"embeddingNoise": {"std": "0.3", "steps": 5}}
BALANCE = {"loadBalanceWeight": "0.5", "routerZWeight": "0.1"}
STAGES = {
    "ar": {"objective": "ar"},
    "mdlm": {"objective": "mdlm", "randomLength": "0.5"} | DISTURBED,
    "mdlm shifted": {"objective": "mdlm", "prediction": "Shifted", "noise": PAIR},
    "bdlm 1": {"objective": "bdlm", "blockSizes": [1]},
    "bdlm 4": {"objective": "bdlm", "blockSizes": [4], "randomLength": "0.5"},
    "bdlm 32": {"objective": "bdlm", "blockSizes": [32]},
    "bdlm 8 in pairs": {"objective": "bdlm", "blockSizes": [8], "noise": PAIR} | DISTURBED,
    "bdlm 8 shifted": {"objective": "bdlm", "blockSizes": [8], "noise": PAIR, "prediction": "Shifted"},
    "sft": {"objective": "sft", "blockSizes": [8], "confidenceWeight": "0.5"},
    "turns": {"objective": "sft", "blockSizes": [8], "supervise": "AllTurns"},
    "turns of mdlm": {"objective": "mdlm", "supervise": "AllTurns"},
}
"""By name: what a stage does; all with balance losses."""

WORLDS = {
    "alone": (1, {}, 1),
    "two": (2, {}, 2),
    "four, weights and experts shared out": (4, {"shard": "Full", "expertParallel": 2}, 1),
}
"""By name: processes, fields of ``parallelism``, and rows of a micro-batch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_chats(folder)
    return folder


def job(folder, objective, name, parallelism, *, micro_batch):
    stage = {"name": "only", "steps": 5, "length": 64, "rowsPerStep": 4, "learningRate": {"peak": "1e-3"}}
    architecture = "BailingMoeV2ForCausalLM" if objective == "ar" else "LLaDA2MoeModelLM"
    config = TINY_CANVAS if objective == "turns of mdlm" else TINY | {"architectures": [architecture]}
    source = {"uri": str(folder / CHATS), "format": "messages"}
    return training_job(
        folder,
        {
            "spec.model.init.config": config,
            "spec.stages": [stage | STAGES[objective]],
            "spec.data.train": [source],
            "spec.data.validation": [source],
            "spec.evaluation": None,
            "spec.balance": BALANCE,
            "spec.parallelism": {"microBatchRows": micro_batch} | parallelism,
            "spec.checkpoint": {"uri": str(folder / f"{objective} {name}")},
        },
    )


@pytest.fixture(scope="module")
def gradients(folder):
    """By arrangement and objective: the gradient of the first step, and what else the ranks found."""
    found = {}
    for name, (ranks, parallelism, micro_batch) in WORLDS.items():
        jobs = [job(folder, one, name, parallelism, micro_batch=micro_batch) for one in STAGES]
        found[name] = dict(zip(STAGES, first_gradients(jobs, ranks=ranks), strict=True))
    return found


@pytest.mark.parametrize("objective", STAGES)
def test_a_step_is_the_same_on_one_process_on_two_and_on_four(gradients, objective, record_measurement):
    expected, reference = gradients["alone"][objective]
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    worst = 0.0
    for name in [name for name in WORLDS if name != "alone"]:
        found, figures = gradients[name][objective]
        assert figures["tokens"] == reference["tokens"], name
        assert figures["normaliser"] == reference["normaliser"], name
        assert figures["loss"] == pytest.approx(reference["loss"], rel=2e-6), name
        assert figures["balance"] == pytest.approx(reference["balance"], rel=1e-5), name
        for key, theirs in expected.items():
            scale = max(1.0, float(theirs.abs().max()))
            worst = max(worst, float((found[key] - theirs).abs().max()) / scale)
            assert torch.allclose(found[key], theirs, rtol=0, atol=5e-6 * scale), (name, key)
    record_measurement(f"largest difference of a gradient from one process's, {objective}", worst)
