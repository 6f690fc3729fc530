"""Training that is killed, stopped or damaged goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support import counts
from support.ranks import join, start_ranks, train_to_the_end
from support.training import metrics, training_job

pytestmark = pytest.mark.training

STEPS = 22


def job_in(folder, name, **values):
    """The job on the data in ``folder`` with the run folder ``folder/name``."""
    changes = {f"spec.{field.replace('__', '.')}": value for field, value in values.items()}
    return training_job(folder, {"spec.checkpoint.uri": str(folder / name), **changes})


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def undisturbed(request, tmp_path_factory):
    """A folder with the complete run ``undisturbed``, and the number of its ranks."""
    folder = tmp_path_factory.mktemp("data")
    train_to_the_end(job_in(folder, "undisturbed"), ranks=request.param)
    return folder, request.param


def assert_same_run(folder, name):
    """Same log, same final model, same exports, bit for bit."""
    assert metrics(folder / name) == metrics(folder / "undisturbed")
    for model in ("model", "exports/blocks"):
        ours, theirs = (folder / run / model / "model.safetensors" for run in (name, "undisturbed"))
        assert ours.read_bytes() == theirs.read_bytes(), model


def kill(processes):
    for process in processes:
        process.kill()
    join(processes)


def killed_at_a_random_moment(processes, run, chance, *, victims):
    """Kill ``victims`` of the ranks within the first steps of the attempt; False if it ended before that."""
    log = run / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while processes[0].is_alive() and (not log.exists() or log.stat().st_mtime_ns == before):
        time.sleep(0.001)
    time.sleep(chance.random() * 0.6)
    kill(chance.sample(processes, victims))
    codes = join(processes)
    assert -signal.SIGKILL in codes or codes == [0] * len(codes), f"not by our doing: {codes}"
    return -signal.SIGKILL in codes


@pytest.mark.slow
def test_a_run_killed_at_random_moments_computes_what_an_undisturbed_run_does(
    undisturbed, record_measurement
):
    folder, ranks = undisturbed
    kills, runs = killed_until(counts.of(sample=3, full=150), folder, ranks=ranks)
    _record(record_measurement, ranks, kills, runs)


@pytest.mark.slow
def test_four_ranks_killed_at_random_moments_compute_what_an_undisturbed_run_does(
    tmp_path, record_measurement
):
    train_to_the_end(job_in(tmp_path, "undisturbed"), ranks=4)
    kills, runs = killed_until(counts.of(sample=1, full=30), tmp_path, ranks=4)
    _record(record_measurement, 4, kills, runs)


def killed_until(enough, folder, *, ranks):
    """Kill runs with ``ranks`` ranks at random moments, ``enough`` times in all; each must end in the end.

    Returns the number of kills, and of runs.
    """
    chance = random.Random(ranks)
    kills, runs = 0, 0
    while kills < enough:
        run = folder / "killed"
        shutil.rmtree(run, ignore_errors=True)
        runs += 1
        job = job_in(folder, "killed")
        while kills < enough:
            processes = start_ranks(job, ranks=ranks)
            if not killed_at_a_random_moment(processes, run, chance, victims=chance.randint(1, ranks)):
                break
            kills += 1
        else:
            train_to_the_end(job, ranks=ranks)
        assert_same_run(folder, "killed")
    return kills, runs


def _record(record_measurement, ranks, kills, runs):
    record_measurement(f"kills of a run with {ranks} ranks", kills)
    record_measurement(f"complete runs with {ranks} ranks that equal the undisturbed one", runs)


def test_a_run_stopped_by_sigterm_saves_and_goes_on_from_there(undisturbed):
    folder, ranks = undisturbed
    job = job_in(folder, "stopped", checkpoint__everySteps=1000)
    stop_after(job, 8, ranks=ranks)
    report = json.loads((folder / "stopped" / "termination.json").read_text())
    assert (report["reason"], report["exit_code"]) == ("Stopped", 75)
    assert report["step"] in (9, 10)  # a rank that waits for the others in step 9 hears of it in the next
    assert report["checkpoint"].endswith(f"step-{report['step']:08d}")
    train_to_the_end(job, ranks=ranks)
    assert_same_run(folder, "stopped")


def stop_after(job, step, *, ranks):
    """Send SIGTERM to the last rank after ``step``, and wait until all have saved and ended."""
    run = Path(job.spec.checkpoint.uri)
    processes = start_ranks(job, ranks=ranks, pause_after=step)
    deadline = time.monotonic() + 60
    while not any(line["step"] == step for line in lines_so_far(run)):
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)
    os.kill(processes[-1].pid, signal.SIGTERM)
    time.sleep(0.1)
    Path(f"{run}.go").touch()
    assert join(processes) == [75] * ranks


def lines_so_far(run):
    log = run / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors"])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(undisturbed, name):
    folder, ranks = undisturbed
    job = job_in(folder, "damaged")
    run = folder / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "undisturbed", run)
    shutil.rmtree(run / "model")
    file = run / "checkpoints" / f"step-{STEPS:08d}" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train_to_the_end(job, ranks=ranks)
    assert_same_run(folder, "damaged")
    assert "is damaged and skipped" in (folder / "damaged.rank-0.log").read_text()


def test_when_all_checkpoints_are_damaged_every_rank_ends_and_nothing_is_lost(undisturbed):
    folder, ranks = undisturbed
    run = folder / "ruined"
    shutil.copytree(folder / "undisturbed", run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    assert join(start_ranks(job_in(folder, "ruined"), ranks=ranks)) == [66] * ranks
    report = json.loads((run / "termination.json").read_text())
    assert "all 2 checkpoints are damaged" in report["message"]
    assert len(list(run.glob("checkpoints/*"))) == 2
    assert metrics(run) == metrics(folder / "undisturbed")


def test_a_run_in_bf16_goes_on_bit_for_bit(undisturbed):
    folder, ranks = undisturbed
    stop_after(job_in(folder, "rough", precision="bf16"), 9, ranks=ranks)
    train_to_the_end(job_in(folder, "rough", precision="bf16"), ranks=ranks)
    train_to_the_end(job_in(folder, "rough-whole", precision="bf16"), ranks=ranks)
    assert metrics(folder / "rough") == metrics(folder / "rough-whole")
    smooth, rough = metrics(folder / "undisturbed"), metrics(folder / "rough")
    assert rough[0]["loss"] == pytest.approx(smooth[0]["loss"], rel=0.01)
    assert rough[0]["loss"] != smooth[0]["loss"]


def test_a_complete_run_started_again_does_nothing(undisturbed):
    folder, ranks = undisturbed
    before = {path: path.stat().st_mtime_ns for path in (folder / "undisturbed").rglob("*.safetensors")}
    train_to_the_end(job_in(folder, "undisturbed"), ranks=ranks)
    after = {path: path.stat().st_mtime_ns for path in (folder / "undisturbed").rglob("*.safetensors")}
    assert before == after
    report = json.loads((folder / "undisturbed" / "termination.json").read_text())
    assert (report["reason"], report["exit_code"], report["step"]) == ("AlreadyComplete", 0, STEPS)


def test_a_complete_run_whose_model_was_removed_writes_it_again(undisturbed):
    folder, ranks = undisturbed
    shutil.copytree(folder / "undisturbed", folder / "bare")
    shutil.rmtree(folder / "bare" / "model")
    train_to_the_end(job_in(folder, "bare"), ranks=ranks)
    assert_same_run(folder, "bare")


def test_the_log_has_every_step_once_and_a_measurement_at_each_stages_end(undisturbed):
    folder, _ = undisturbed
    lines = metrics(folder / "undisturbed")
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "stage"] == [6, 12, 16, 22]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [5, 6, 10, 12, 15, 16, 20, 22]


def test_another_number_of_ranks_continues_with_the_same_documents(undisturbed):
    folder, ranks = undisturbed
    run = folder / "resized"
    job = job_in(folder, "resized", checkpoint__everySteps=1000)
    stop_after(job, 9, ranks=ranks)
    train_to_the_end(job, ranks=3 - ranks)
    whole = job_in(folder, "unresized")
    train_to_the_end(whole, ranks=ranks)
    for ours, theirs in zip(metrics(run), metrics(folder / "unresized"), strict=True):
        same = {"loss", "grad_norm", "exact_match", "token_error_rate", "tpf", "tpf_decode", "tpf_denoise"}
        assert {key: ours[key] for key in ours.keys() - same} == {
            key: theirs[key] for key in theirs.keys() - same
        }
        if ours["kind"] != "stage":
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


def test_a_run_that_diverges_says_so_and_leaves_the_last_checkpoint(undisturbed):
    folder, ranks = undisturbed
    values = {
        "spec.checkpoint": {"uri": str(folder / "diverged"), "everySteps": 1},
        "spec.stages[0].learningRate": {"peak": "1e30"},
    }
    assert join(start_ranks(training_job(folder, values), ranks=ranks)) == [71] * ranks
    report = json.loads((folder / "diverged" / "termination.json").read_text())
    assert (report["reason"], report["exit_code"]) == ("Diverged", 71)
    assert report["message"].startswith("stage pretrain, step 2: loss ")
    assert "lower learningRate.peak" in report["message"]
    assert report["checkpoint"].endswith("step-00000001")
    assert [line["step"] for line in metrics(folder / "diverged")] == [1]


def test_weights_are_saved_in_float32_with_every_expert(undisturbed):
    folder, _ = undisturbed
    tensors = load_file(folder / "undisturbed" / "model" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    assert sum(".mlp.experts." in name for name in tensors) == 8 * 3
    bias = next(tensor for name, tensor in tensors.items() if name.endswith("expert_bias"))
    assert bias.any()
