"""Bad steps are skipped and, if there are many, undone: by all ranks alike, and by restarted runs too."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support import counts
from support.faults import start_faulty
from support.ranks import join
from support.training import metrics, training_job
from unmask_api.train_job import DiffusionTrainJob

STEPS = 24


@pytest.fixture(scope="module", params=[1, 2] if counts.FULL else [2], ids=lambda ranks: f"{ranks} ranks")
def folder(request, tmp_path_factory):
    return tmp_path_factory.mktemp("data"), request.param


def job_in(folder, name, *, every=4, steps=STEPS, **stability):
    manifest = training_job(folder).to_json_dict()
    first = manifest["spec"]["stages"][0] | {"steps": steps}
    del manifest["spec"]["evaluation"]
    manifest["spec"] |= {
        "stages": [first],
        "checkpoint": {"uri": str(folder / name), "everySteps": every, "keepLast": 2},
    }
    if stability:
        manifest["spec"]["stability"] = stability
    return DiffusionTrainJob.from_json(json.dumps(manifest))


def run(folder, name, bad, kind, *, every=4, **stability):
    """A run to the end; its log, and its weights."""
    home, ranks = folder
    codes = join(start_faulty(job_in(home, name, every=every, **stability), bad, ranks=ranks, kind=kind))
    assert codes == [0] * ranks, (home / f"{name}.rank-0.log").read_text()[-2000:]
    return metrics(home / name), weights(home / name)


def weights(path):
    return (path / "model" / "model.safetensors").read_bytes()


def steps_of(lines):
    return [line for line in lines if line["kind"] == "step"]


def cursor_of(folder, step):
    """Documents consumed after ``step`` steps of a good run."""
    home, ranks = folder
    name = f"until {step}"
    if not (home / name).exists():
        job = job_in(home, name, every=step, steps=step)
        assert join(start_faulty(job, {}, ranks=ranks)) == [0] * ranks
    manifest = home / name / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    return json.loads(manifest.read_text())["state"]["cursor"]


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_a_bad_step_is_skipped_and_the_run_goes_on_as_if_it_had_changed_nothing(folder, kind):
    bad = {0: (cursor_of(folder, 12), cursor_of(folder, 13))}
    lines, ours = run(folder, f"skipped {kind}", bad, kind, window=8)
    theirs_lines, theirs = run(folder, f"left out {kind}", bad, "left out")
    assert ours == theirs
    marks = {line["step"]: line["skipped"] for line in steps_of(lines) if "skipped" in line}
    assert marks == {13: "NotFinite" if kind == "nan" else "Spike"}
    assert [line["loss"] for line in steps_of(lines)] == [line["loss"] for line in steps_of(theirs_lines)]
    assert [line["step"] for line in steps_of(lines)] == [*range(1, STEPS + 1)]


def test_a_policy_that_finds_nothing_changes_no_bit(folder):
    assert run(folder, "with", {}, "nan", window=8) == run(folder, "without", {}, "nan")


def test_after_too_many_the_run_goes_back_and_leaves_the_documents_out(folder):
    home, _ = folder
    # Step 10 to 13 are bad; the newest checkpoint is that of step 8, and none is taken at step 12.
    bad = {0: (cursor_of(folder, 9), cursor_of(folder, 13))}
    lines, ours = run(folder, "back", bad, "nan", maxSkips=4)
    back = [line for line in lines if line["kind"] == "rollback"]
    assert [(line["step"], line["failed_step"], line["rollbacks"]) for line in back] == [(8, 13, 1)]
    assert back[0]["cursor"] == bad[0][1]
    assert [line["step"] for line in steps_of(lines)] == [*range(1, STEPS + 1)]
    assert not any("skipped" in line for line in lines)
    left_out = {0: (cursor_of(folder, 8), bad[0][1])}
    theirs_lines, theirs = run(folder, "as if", left_out, "jumped")
    assert ours == theirs
    assert [line["loss"] for line in steps_of(lines)] == [line["loss"] for line in steps_of(theirs_lines)]
    tensors = load_file(home / "back" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_run_that_has_no_checkpoint_yet_goes_back_to_its_beginning(folder):
    bad = {0: (0, cursor_of(folder, 2))}
    lines, ours = run(folder, "anew", bad, "nan", maxSkips=2)
    assert [line["step"] for line in lines if line["kind"] == "rollback"] == [0]
    assert ours == run(folder, "anew as if", bad, "jumped")[1]


def test_a_run_that_cannot_get_past_bad_steps_fails_as_diverged(folder):
    home, ranks = folder
    job = job_in(home, "hopeless", maxSkips=2, maxRollbacks=2)
    bad = {0: (cursor_of(folder, 5), 10_000)}
    assert join(start_faulty(job, bad, ranks=ranks)) == [71] * ranks
    report = json.loads((home / "hopeless" / "termination.json").read_text())
    assert report["reason"] == "Diverged"
    assert "2 steps in a row were skipped after 2 rollbacks (stability.maxRollbacks)" in report["message"]
    assert report["checkpoint"].endswith("step-00000004")
    back = [line for line in metrics(home / "hopeless") if line["kind"] == "rollback"]
    assert [(line["step"], line["rollbacks"]) for line in back] == [(4, 1), (4, 2)]


@pytest.mark.slow
def test_killed_while_it_skips_and_goes_back_it_computes_the_same(folder, record_measurement):
    home, ranks = folder
    bad = {0: (cursor_of(folder, 9), cursor_of(folder, 14))}
    options = {"maxSkips": 3, "window": 8}
    lines, ours = run(folder, "quiet", bad, "nan", **options)
    assert sum(line["kind"] == "rollback" for line in lines) == 1
    assert sum("skipped" in line for line in lines) == 2
    chance, kills = random.Random(ranks), 0
    for attempt in range(counts.of(sample=1, full=15)):
        job = job_in(home, f"killed {attempt}", **options)
        for _ in range(counts.of(sample=4, full=1000)):
            if not killed(start_faulty(job, bad, ranks=ranks), Path(job.spec.checkpoint.uri), chance):
                break
            kills += 1
        else:
            assert set(join(start_faulty(job, bad, ranks=ranks))) == {0}
        assert metrics(home / f"killed {attempt}") == lines
        assert weights(home / f"killed {attempt}") == ours
    record_measurement(f"kills of a run that goes back, {ranks} ranks", kills)


def killed(processes, path, chance):
    """Kill a rank a little after the attempt's first line; False if the attempt ended before."""
    log = path / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while processes[0].is_alive() and (not log.exists() or log.stat().st_mtime_ns == before):
        time.sleep(0.001)
    time.sleep(chance.random() * 0.25)
    chance.choice(processes).kill()
    return -signal.SIGKILL in join(processes)
