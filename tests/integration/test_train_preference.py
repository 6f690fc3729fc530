"""Preference stages of real runs: ranks, shards, restarts, and what is gained on held-out pairs."""

import math
import shutil

import numpy as np
import pytest

from support import counts
from support.ranks import join, start_ranks, train_to_the_end
from support.training import metrics, preferences, training_job, write_data, write_lines

pytestmark = pytest.mark.training

SHARED = {"length": 32, "rowsPerStep": 4, "learningRate": {"peak": "1e-2", "warmupSteps": 2}}
ANSWERS = {
    "name": "answers",
    "objective": "sft",
    "blockSizes": [4],
    "steps": 4,
    "convertTo": "LLaDA2MoeModelLM",
}
ANSWER = ("chosen", "rejected")
LEAST_MARGIN, LEAST_SHARE = 15.0, 0.85
PREFER = {"name": "prefer", "objective": "dpo", "blockSizes": [4], "steps": 6}


def pairs_in(folder):
    """The pairs' data for a stage, written to ``folder`` if they are not there."""
    if not (folder / "pairs.jsonl").exists():
        write_data(folder)
        write_lines(folder / "pairs.jsonl", preferences(range(200)))
        write_lines(folder / "held-out-pairs.jsonl", preferences(range(1000, 1064)))
    return {
        part: [{"uri": str(folder / name), "format": "preference"}]
        for part, name in (("train", "pairs.jsonl"), ("validation", "held-out-pairs.jsonl"))
    }


def job_in(folder, name, *, answers=ANSWERS, prefer=PREFER, ranks=1, shard="None", **values):
    stages = [answers | SHARED, SHARED | {"data": pairs_in(folder)} | prefer]
    changes = {
        "spec.checkpoint.uri": str(folder / name),
        "spec.stages": stages,
        "spec.evaluation": {"everySteps": 3, "batches": 2},
        "spec.parallelism": {"processesPerNode": ranks, "microBatchRows": 1, "shard": shard},
    }
    return training_job(folder, changes | values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a complete run of one process."""
    folder = tmp_path_factory.mktemp("preference")
    train_to_the_end(job_in(folder, "run"))
    return folder


def preferred(run):
    return [line for line in metrics(run) if line["stage"] == "prefer"]


def test_the_stage_begins_at_ln_2_and_leaves_it(run):
    steps = [line for line in preferred(run / "run") if line["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (steps[0]["margin"], steps[0]["preferred"]) == (0.0, 0.0)
    assert all(line["loss"] != steps[0]["loss"] and line["margin"] != 0 for line in steps[2:])
    evals = [line for line in preferred(run / "run") if line["kind"] == "eval"]
    assert [line["step"] for line in evals] == [6, 9, 10]
    assert all({"loss", "margin", "preferred"} <= line.keys() for line in evals)


@pytest.mark.parametrize("shard", ["None", "Full"])
def test_two_processes_compute_what_one_does(run, shard):
    train_to_the_end(job_in(run, f"two-{shard}", ranks=2, shard=shard), ranks=2)
    for ours, theirs in zip(metrics(run / f"two-{shard}"), metrics(run / "run"), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (
                pytest.approx(value, rel=2e-3, abs=2e-4) if isinstance(value, float) else value
            )


@pytest.mark.parametrize(("ranks", "shard"), [(1, "None"), (2, "Full")])
def test_a_killed_stage_goes_on_against_the_same_reference(run, ranks, shard):
    whole = "run" if ranks == 1 else "two-Full"
    if not (run / whole).exists():
        train_to_the_end(job_in(run, whole, ranks=ranks, shard=shard), ranks=ranks)
    job = job_in(run, "killed", ranks=ranks, shard=shard)
    processes = start_ranks(job, ranks=ranks, pause_after=8)
    while processes[0].is_alive() and not any(line["step"] == 8 for line in log_of(run / "killed")):
        processes[0].join(0.05)
    for process in processes:
        process.kill()
    join(processes)
    (run / "killed.go").touch()
    train_to_the_end(job, ranks=ranks)
    assert metrics(run / "killed") == metrics(run / whole)
    ours, theirs = (run / name / "model" / "model.safetensors" for name in ("killed", whole))
    assert ours.read_bytes() == theirs.read_bytes()
    shutil.rmtree(run / "killed")
    (run / "killed.go").unlink()


def log_of(run):
    return metrics(run) if (run / "metrics.jsonl").exists() else []


def styled(numbers):
    """Prompts with an answer of words below w34, which is preferred, and one of words above."""
    pairs = []
    for number in numbers:
        chance = np.random.default_rng(number)
        words = [
            " ".join(f"w{word}" for word in chance.integers(low, high, chance.integers(2, 6)))
            for low, high in ((8, 60), (8, 34), (34, 60))
        ]
        pairs.append(dict(zip(("prompt", "chosen", "rejected"), words, strict=True)))
    return pairs


@pytest.mark.slow
def test_preferences_are_learnt_and_hold_for_held_out_pairs(tmp_path, record_measurement):
    """Both styles of answer are taught alike, then one is to be preferred: it gains on prompts never seen."""
    margins, shares = [], []
    for seed in range(counts.of(sample=2, full=10)):
        folder = tmp_path / f"seed-{seed}"
        data = pairs_in(folder)
        pairs = styled(range(300))
        write_lines(folder / "pairs.jsonl", pairs)
        write_lines(folder / "held-out-pairs.jsonl", styled(range(1000, 1064)))
        both = [{"prompt": one["prompt"], "completion": one[side]} for one in pairs for side in ANSWER]
        write_lines(folder / "train.jsonl", both)
        job = job_in(
            folder,
            "run",
            answers=ANSWERS | {"steps": 40},
            prefer=PREFER | {"steps": 40, "length": 64, "rowsPerStep": 4, "data": data},
            **{"spec.data.seed": seed, "spec.evaluation": {"everySteps": 20, "batches": 4}},
            **{"spec.checkpoint.everySteps": 1000},
        )
        train_to_the_end(job)
        last = [line for line in preferred(folder / "run") if line["kind"] == "eval"][-1]
        margins.append(last["margin"])
        shares.append(last["preferred"])
    record_measurement("held-out margin after a preference stage, nats, mean", sum(margins) / len(margins))
    record_measurement("held-out margin after a preference stage, nats, least", min(margins))
    record_measurement("held-out pairs whose chosen answer has gained more, share", sum(shares) / len(shares))
    record_measurement("seeds of the preference stage", len(margins))
    assert min(margins) > LEAST_MARGIN
    assert min(shares) > LEAST_SHARE
