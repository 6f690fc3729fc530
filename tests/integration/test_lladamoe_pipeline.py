"""LLaDA-MoE's way from random weights to answers, on a tiny model: five stages, each on the one before.

Two stages of pre-training on other mixes of data, annealing from the best checkpoint, annealing with another
rotary base and twice the context, and fine-tuning; with balance losses and documents of random length.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.models import TINY_CANVAS
from support.ranks import train_to_the_end
from support.sharding import stop_after
from support.training import CHATS, metrics, training_job, write_chats, write_lines
from unmask.models.loading import load
from unmask.models.registry import read_config

pytestmark = pytest.mark.training

RATE = {"peak": "1e-2", "final": "1e-3", "warmupSteps": 2, "decaySteps": 4}
SHARED = {"objective": "mdlm", "length": 32, "rowsPerStep": 4, "learningRate": RATE, "export": True}
STEPS = 8
NAMES = ["pretrain-1", "pretrain-2", "anneal-1", "anneal-2", "answers"]
CONFIG = TINY_CANVAS | {"rope_theta": 10_000.0, "max_position_embeddings": 32, "initializer_range": 0.02}


def mixed(folder, **weights):
    sources = [
        {"uri": str(folder / f"{name}.jsonl"), "format": "text", "weight": weight}
        for name, weight in weights.items()
    ]
    return {"train": sources, "validation": sources[:1]}


def pipeline(folder, name, *, parallelism=None):
    """Pre-training stages cut three documents of ten: enough to come about in so few steps."""
    text = {"steps": STEPS, "randomLength": "0.3"} | SHARED
    chats = {"uri": str(folder / CHATS), "format": "messages"}
    stages = [
        {"name": "pretrain-1", "data": mixed(folder, web=3, code=1)},
        {"name": "pretrain-2", "data": mixed(folder, web=1, code=3), "merge": {"best": 1}},
        {"name": "anneal-1", "data": mixed(folder, code=1)},
        {"name": "anneal-2", "data": mixed(folder, code=1)}
        | {"ropeTheta": "50000", "contextLength": 64, "length": 64, "rowsPerStep": 2},
    ]
    answers = {"name": "answers", "steps": STEPS, "supervise": "LastTurn", "length": 64}
    answers |= {"data": {"train": [chats], "validation": [chats]}}
    return training_job(
        folder,
        {
            "spec.model.init.config": CONFIG,
            "spec.stages": [*(text | stage for stage in stages), SHARED | answers],
            "spec.balance": {"loadBalanceWeight": "0.01", "routerZWeight": "0.001"},
            "spec.evaluation": {"everySteps": 4, "batches": 1},
            "spec.parallelism": {"microBatchRows": 1} | (parallelism or {}),
            "spec.checkpoint": {"uri": str(folder / name), "everySteps": 4, "keepLast": 2},
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and the run of one process in ``whole``."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_chats(folder)
    for kind, first in (("web", 8), ("code", 30)):
        lines = [
            {"text": " ".join(f"w{first + (number * step) % 20}" for step in range(6 + number % 20))}
            for number in range(60)
        ]
        write_lines(folder / f"{kind}.jsonl", lines)
    train_to_the_end(pipeline(folder, "whole"))
    return folder


def steps_of(lines, stage):
    return [line for line in lines if line["kind"] == "step" and line["stage"] == stage]


def test_every_stage_runs_and_goes_on_from_the_one_before(folder):
    lines = metrics(folder / "whole")
    assert [line["stage"] for line in lines if line["kind"] == "stage"] == NAMES
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 5 * STEPS + 1))
    first = steps_of(lines, "pretrain-1")
    assert first[0]["loss"] == pytest.approx(4.16, abs=1.5), "of 64 tokens none is known at first"
    losses = [line["loss"] for line in lines if line["kind"] == "eval" and line["stage"] == "anneal-1"]
    assert losses[-1] < 0.8 * first[0]["loss"]


def test_experts_are_balanced_in_every_stage(folder):
    """E sum f P is at least 1 up to chance, and 8 where one expert does everything."""
    for line in metrics(folder / "whole"):
        if line["kind"] == "step":
            assert 0.9 < line["load_balance"] < 2
            assert line["router_z"] > 0


def test_the_exported_configs_say_the_context_of_their_stage(folder):
    exports = folder / "whole" / "exports"
    configs = [read_config(exports / name) for name in NAMES]
    assert [config.rope_theta for config in configs] == [1e4, 1e4, 1e4, 5e4, 5e4]
    assert [config.max_position_embeddings for config in configs] == [32, 32, 32, 64, 64]
    final = json.loads((folder / "whole" / "model" / "config.json").read_text())
    assert (final["rope_theta"], final["max_position_embeddings"]) == (5e4, 64)
    assert load(folder / "whole" / "model").rotary.theta == 5e4


def test_a_run_stopped_while_it_anneals_goes_on_bit_for_bit(folder):
    job = pipeline(folder, "stopped")
    for step in (3 * STEPS, 3 * STEPS + 2):  # as the context changes, and just after
        stop_after(job, step, ranks=1)
    train_to_the_end(job)
    assert metrics(folder / "stopped") == metrics(folder / "whole")
    ours, theirs = (load_file(folder / run / "model" / "model.safetensors") for run in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_two_processes_that_share_out_weights_and_experts_follow_the_same_curve(folder, record_measurement):
    parallelism = {"processesPerNode": 2, "shard": "Full", "expertParallel": 2}
    train_to_the_end(pipeline(folder, "shared", parallelism=parallelism), ranks=2)
    pairs = list(zip(metrics(folder / "shared"), metrics(folder / "whole"), strict=True))
    worst = 0.0
    for ours, theirs in pairs:
        if ours["kind"] == "step":
            assert ours["tokens"] == theirs["tokens"]
            worst = max(worst, abs(ours["loss"] - theirs["loss"]))
    record_measurement("largest difference of a loss from one process's in five stages", worst)
    assert worst < 2e-3
