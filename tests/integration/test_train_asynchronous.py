"""Checkpoints that are written beside the training are those that are waited for, bit for bit."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from support.faults import no_room, nothing, slow_writes, start_patched
from support.ranks import join
from support.training import metrics, training_job
from unmask_api.train_job import DiffusionTrainJob

STEPS = 12
SHARDED = {"shard": "Full", "microBatchRows": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def job_in(folder, name, *, parallelism=None, **checkpoint):
    manifest = training_job(folder).to_json_dict()
    del manifest["spec"]["evaluation"]
    manifest["spec"]["stages"] = [manifest["spec"]["stages"][0] | {"steps": STEPS}]
    manifest["spec"]["parallelism"] = parallelism or {"microBatchRows": 2}
    manifest["spec"]["checkpoint"] = {"uri": str(folder / name), "everySteps": 2, "keepLast": 99} | checkpoint
    return DiffusionTrainJob.from_json(json.dumps(manifest))


def contents(run):
    """All checkpoints: their files byte by byte, and their manifests without the time."""
    found = {}
    for folder in sorted((run / "checkpoints").iterdir()):
        for path in sorted(folder.iterdir()):
            found[f"{folder.name}/{path.name}"] = path.read_bytes()
        manifest = json.loads(found.pop(f"{folder.name}/manifest.json"))
        del manifest["sha256"], manifest["state"]["stage_seconds"]
        found[folder.name] = manifest
    return found


@pytest.fixture(scope="module", params=[None, SHARDED], ids=["replicated", "shared out"])
def arrangement(request, folder):
    """A name, the arrangement, and the run whose checkpoints were waited for."""
    name = "shared" if request.param else "replicated"
    run = f"waited {name}"
    assert join(start_patched(job_in(folder, run, parallelism=request.param), nothing, ranks=2)) == [0, 0]
    assert len(list((folder / run / "checkpoints").iterdir())) == STEPS // 2
    return name, request.param, folder / run


def test_they_are_the_same_bit_for_bit_although_training_went_on(folder, arrangement):
    name, parallelism, waited = arrangement
    run = folder / f"beside {name}"
    job = job_in(folder, run.name, parallelism=parallelism, asynchronous=True)
    # No file is written before two more steps are done: the weights have changed by then.
    assert join(start_patched(job, slow_writes, str(run / "metrics.jsonl"), 2, 5.0, ranks=2)) == [0, 0]
    assert contents(run) == contents(waited)
    assert metrics(run) == metrics(waited)
    files = [path / "model" / "model.safetensors" for path in (run, waited)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_that_cannot_be_written_ends_the_run_soon_and_nothing_is_lost(folder, arrangement):
    name, parallelism, waited = arrangement
    victim = 1 if parallelism else 0  # where all have all, the first rank alone writes
    run = folder / f"full {name}"
    job = job_in(folder, run.name, parallelism=parallelism, asynchronous=True)
    assert join(start_patched(job, no_room, victim, 2, ranks=2)) == [1, 1]
    report = json.loads((run / "termination.json").read_text())
    assert report["reason"] == "Failed"
    assert "step-00000006: cannot be written" in report["message"]
    assert "make room or mend the volume; earlier checkpoints stand" in report["message"]
    assert report["checkpoint"].endswith("step-00000004")
    assert 7 <= report["step"] <= 8
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert join(start_patched(job, nothing, ranks=2)) == [0, 0]
    assert contents(run) == contents(waited)


def test_a_request_to_stop_waits_for_the_one_at_hand_and_for_its_own(folder, arrangement):
    name, parallelism, waited = arrangement
    run = folder / f"stopped {name}"
    job = job_in(folder, run.name, parallelism=parallelism, asynchronous=True, everySteps=5)
    processes = start_patched(job, slow_writes, str(run / "metrics.jsonl"), 99, 1.0, ranks=2)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or '"step": 5,' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert join(processes) == [75, 75]
    report = json.loads((run / "termination.json").read_text())
    assert report["message"] == f"stopped on request after step {report['step']}, and saved"
    steps = [int(path.name.rpartition("-")[2]) for path in sorted((run / "checkpoints").iterdir())]
    assert steps == sorted({5, report["step"]})
    assert join(start_patched(job, nothing, ranks=2)) == [0, 0]
    models = [Path(path, "model", "model.safetensors").read_bytes() for path in (run, waited)]
    assert models[0] == models[1]
