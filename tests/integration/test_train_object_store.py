"""Runs in an object store equal those in a folder, whatever happens to the ranks and to the store.

The store is an S3 server in this process, reached over HTTP; each rank has a scratch folder of its own, as on
a machine of its own.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import counts
from support.charts import page_commands
from support.object_stores import BUCKET, impatient, log_of, start_machines, store_server, wait_for
from support.ranks import join, train_to_the_end
from support.training import metrics, training_job
from unmask.training.manifest import CheckpointManifest
from unmask.training.mirror import GRACE_S
from unmask.training.object_store import ObjectStore
from unmask_api.model import JobModel
from unmask_api.places import working_folder
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.job_models import look_up
from unmask_operator.launch.supervisor import progress

PAGE = Path(__file__).parents[2] / "docs/how-to/use-object-stores.md"
SHARED = {"shard": "Full", "microBatchRows": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server():
    with store_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(autouse=True)
def healthy(server):
    yield
    server.spoil = lambda method, path: False


def job_in(folder, uri, *, steps=6, parallelism=None, model=None, **checkpoint):
    """Two stages, the second of which exports."""
    manifest = training_job(folder).to_json_dict()
    spec = manifest["spec"]
    del spec["evaluation"]
    spec["stages"] = [stage | {"steps": steps} for stage in spec["stages"][:2]]
    spec["parallelism"] = parallelism or {"microBatchRows": 2}
    spec["checkpoint"] = {"uri": str(uri), "everySteps": 2, "keepLast": 2} | checkpoint
    spec["model"] = spec["model"] | (model or {})
    return DiffusionTrainJob.from_json(json.dumps(manifest))


def uri(name):
    return f"s3://{BUCKET}/{name}"


@pytest.fixture(scope="module")
def quiet(folder):
    """An undisturbed run in a folder, by the number of ranks."""
    made = {}

    def run(ranks, **options):
        key = (ranks, tuple(options.items()))
        if key not in made:
            made[key] = folder / f"quiet-{len(made)}"
            parallelism = SHARED if ranks > 1 else None
            train_to_the_end(job_in(folder, made[key], parallelism=parallelism, **options), ranks=ranks)
        return made[key]

    return run


def log_lines(content):
    return [
        {key: value for key, value in json.loads(line).items() if key not in {"seconds", "telemetry"}}
        for line in content.decode().splitlines()
    ]


def assert_same(server, name, run):
    """The run ``name`` in the store is that in the folder ``run``: models, log, checkpoints."""
    found = server.contents(name)
    models = [path.relative_to(run).as_posix() for path in run.rglob("model.safetensors")]
    assert len(models) == 2
    for model in models:
        assert found[model] == (run / model).read_bytes()
    assert log_lines(found["metrics.jsonl"]) == metrics(run)
    committed = {name.split("/")[1] for name in found if name.endswith("/manifest.json")}
    assert committed == {path.name for path in (run / "checkpoints").iterdir()}
    for step in committed:
        manifest = CheckpointManifest.from_bytes(found[f"checkpoints/{step}/manifest.json"])
        for file, entry in manifest.files.items():
            assert len(found[f"checkpoints/{step}/{file}"]) == entry.size
    return found


def report_of(found):
    return json.loads(found["termination.json"])


@pytest.mark.parametrize(
    ("ranks", "one_machine", "asynchronous"),
    [(1, True, True), (2, False, False), (2, True, True)],
    ids=["one rank", "two machines", "two ranks of a machine"],
)
def test_a_run_in_a_store_equals_one_in_a_folder(
    folder, server, quiet, tmp_path, ranks, one_machine, asynchronous
):
    name = f"whole-{ranks}-{one_machine}"
    parallelism = SHARED if ranks > 1 else None
    job = job_in(folder, uri(name), parallelism=parallelism, asynchronous=asynchronous)
    assert join(start_machines(job, server, tmp_path, ranks=ranks, one_machine=one_machine)) == [0] * ranks
    found = assert_same(server, name, quiet(ranks))
    assert report_of(found)["reason"] == "Completed"
    assert report_of(found)["checkpoint"] == uri(f"{name}/checkpoints/step-00000012")
    assert report_of(found)["message"].endswith(uri(f"{name}/model"))
    for rank in range(ranks):
        copy = working_folder(uri(name), {"UNMASK_SCRATCH": str(tmp_path / machine_of(rank, one_machine))})
        report = progress(copy, attempt=0, uri=uri(name))
        assert (report.step, report.checkpoint.step) == (12, 12)
        assert report.checkpoint.uri == uri(f"{name}/checkpoints/step-00000012")
        assert json.loads((copy / "termination.json").read_text())["reason"] == "Completed"


def machine_of(rank, one_machine):
    return "machine" if one_machine else f"machine-{rank}"


def test_a_run_that_is_complete_is_found_so_on_a_machine_that_has_nothing(folder, server, quiet, tmp_path):
    job = job_in(folder, uri("complete"))
    assert join(start_machines(job, server, tmp_path)) == [0]
    assert join(start_machines(job, server, tmp_path / "elsewhere")) == [0]
    found = assert_same(server, "complete", quiet(1))
    assert report_of(found)["reason"] == "AlreadyComplete"
    server.store("complete").remove(["model/config.json"])
    assert join(start_machines(job, server, tmp_path / "elsewhere")) == [0]
    assert_same(server, "complete", quiet(1))


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_are_killed_at_any_moment_lose_nothing(
    folder, server, quiet, tmp_path, ranks, record_measurement
):
    run, chance = quiet(ranks, steps=15), random.Random(ranks)
    kills, runs, saves = 0, 0, 0
    while kills < counts.of(sample=1, full=40):
        name = f"killed-{ranks}-{runs}"
        job = job_in(
            folder,
            uri(name),
            steps=15,
            parallelism=SHARED if ranks > 1 else None,
            asynchronous=bool(runs % 2),
        )
        codes = [1]
        while any(codes):
            before = len(server.requests)
            processes = start_machines(job, server, tmp_path / name, ranks=ranks)
            if kills < counts.of(sample=1, full=40):
                # So many requests later, which are most dense in saves.
                until = before + chance.randrange(60)
                wait_for(lambda until=until: len(server.requests) >= until, *processes)
                time.sleep(chance.random() * 0.02)
                chance.choice(processes).kill()
            codes = join_all(processes)
            if -signal.SIGKILL in codes:
                kills += 1
                saves += any("/checkpoints/" in path for method, path in server.requests[-1:])
            assert set(codes) <= {0, 1, -signal.SIGKILL}, log_of(tmp_path / name)
        assert_same(server, name, run)
        runs += 1
    record_measurement(f"kills of one of {ranks} ranks that save to an object store", kills)
    record_measurement("of these, kills while a checkpoint was being put", saves)


def join_all(processes):
    """The exit codes; a rank that waits for one that was killed before they met is killed, as by torchrun."""
    deadline = time.monotonic() + 20
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes) and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return join(processes)


def test_a_request_to_stop_ends_with_75_once_the_commit_stands(folder, server, quiet, tmp_path):
    job = job_in(folder, uri("stopped"), asynchronous=True, everySteps=100)
    (process,) = start_machines(job, server, tmp_path, pause_after=3)
    log = next(iter_when(lambda: list(tmp_path.glob("machine-0/*/metrics.jsonl"))))
    wait_for(lambda: '"step": 3,' in log.read_text(), process)
    slow = []
    server.spoil = lambda method, path: bool(method == "PUT" and len(slow) < 2 and not slow.append(path))
    os.kill(process.pid, signal.SIGTERM)
    (tmp_path / "go").touch()
    assert join([process]) == [75]
    found = server.contents("stopped")
    assert len(slow) == 2
    assert report_of(found)["reason"] == "Stopped"
    step = report_of(found)["step"]
    assert f"checkpoints/step-{step:08d}/manifest.json" in found
    assert join(start_machines(job, server, tmp_path / "elsewhere")) == [0]
    found = server.contents("stopped")
    assert found["model/model.safetensors"] == (quiet(1) / "model" / "model.safetensors").read_bytes()


def iter_when(found):
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield from found()


def test_a_damaged_checkpoint_is_passed_over_and_replaced(folder, server, quiet, tmp_path):
    name = "damaged"
    job = job_in(folder, uri(name), parallelism=SHARED)
    processes = start_machines(job, server, tmp_path, ranks=2, pause_after=9)
    store = server.store(name)
    # There, and not only asked for: whoever puts it is killed next.
    wait_for(lambda: "checkpoints/step-00000008/manifest.json" in store.sizes("checkpoints"), *processes)
    for process in processes:
        process.kill()
    join(processes)
    victim = max(file for file in store.sizes("checkpoints/step-00000008") if "rank-00001" in file)
    content = store.read(victim)
    store.write(victim, content[:-1] + bytes([content[-1] ^ 1]))
    elsewhere = tmp_path / "elsewhere"  # where there is no copy that is still right
    assert join(start_machines(job, server, elsewhere, ranks=2)) == [0, 0]
    assert "step-00000008 is damaged and skipped" in log_of(elsewhere)
    assert f"going on from {uri(name)}/checkpoints/step-00000006" in log_of(elsewhere)
    assert_same(server, name, quiet(2))


@pytest.mark.parametrize("place", ["a folder", "a store"])
def test_an_attempt_removes_what_one_that_was_cut_off_had_still_to_remove(folder, server, tmp_path, place):
    """A run that was killed between its last commit and what follows it: here, one that kept more."""
    at = folder / "many" if place == "a folder" else uri("many")
    assert join(start_machines(job_in(folder, at, keepLast=9), server, tmp_path)) == [0]
    assert join(start_machines(job_in(folder, at, keepLast=2), server, tmp_path)) == [0]
    names = [path.parts for path in at.rglob("*")] if place == "a folder" else server.contents("many")
    steps = {step for step in range(13) if any(f"step-{step:08d}" in str(name) for name in names)}
    assert steps == {10, 12}


def test_a_store_that_is_overloaded_now_and_then_is_asked_again(folder, server, quiet, tmp_path):
    chance = random.Random(1)
    server.spoil = lambda method, path: chance.random() < 0.1
    before = server.refused
    assert join(start_machines(job_in(folder, uri("busy")), server, tmp_path)) == [0]
    server.spoil = lambda method, path: False
    assert server.refused - before > 5
    assert "trying again in" in log_of(tmp_path)
    assert_same(server, "busy", quiet(1))


def test_a_store_that_is_gone_ends_the_run_and_what_is_committed_stands(folder, server, quiet, tmp_path):
    job = job_in(folder, uri("gone"), asynchronous=True)
    server.spoil = lambda method, path: method == "PUT" and "/step-00000004/" in path
    (process,) = start_machines(job, server, tmp_path, patch=impatient)
    assert join([process]) == [1]
    server.spoil = lambda method, path: False
    found = server.contents("gone")
    assert [name for name in found if name.endswith("manifest.json")] == [
        "checkpoints/step-00000002/manifest.json"
    ]
    report = report_of(found)
    assert (report["reason"], report["exit_code"]) == ("Failed", 1)
    assert f"{uri('gone')}/checkpoints/step-00000004: cannot be written (cannot write" in report["message"]
    assert "tried 2 times" in report["message"]
    assert "see to the object store and its credentials; earlier checkpoints stand" in report["message"]
    assert report["checkpoint"] == uri("gone/checkpoints/step-00000002")
    assert join(start_machines(job, server, tmp_path)) == [0]
    assert_same(server, "gone", quiet(1))


def test_a_store_that_was_never_there_is_named(folder, server, tmp_path):
    job = job_in(folder, "s3://nothing/run")
    assert join(start_machines(job, server, tmp_path, patch=impatient)) == [64]
    assert "error: spec.checkpoint.uri: cannot create s3://nothing/run/attempts/00001.json" in log_of(
        tmp_path
    )
    assert "correct the uri, or the credentials" in log_of(tmp_path)


def test_a_second_attempt_takes_over_and_the_first_spoils_nothing(folder, server, quiet, tmp_path):
    job = job_in(folder, uri("twice"))
    (first,) = start_machines(job, server, tmp_path / "first", pause_after=5)
    wait_for(
        lambda: any("twice/checkpoints/step-00000004/manifest" in path for _, path in server.requests), first
    )
    assert join(start_machines(job, server, tmp_path / "second")) == [0]
    found = assert_same(server, "twice", quiet(1))
    (tmp_path / "first" / "go").touch()
    assert join([first]) == [64]
    assert f"another attempt has taken {uri('twice')} over, so this one ends" in log_of(tmp_path / "first")
    after = server.contents("twice")
    left = {name for name in after if "a00001-" in name} - set(found)
    assert {name: content for name, content in after.items() if name not in left} == found
    assert all("/step-00000006/a00001-" in name for name in left)


def test_a_model_and_its_tokenizer_come_from_another_jobs_export(folder, server, quiet, tmp_path):
    """What ``model.init.job`` resolves to for a job whose run is in a store."""
    job = job_in(folder, uri("source"))
    assert join(start_machines(job, server, tmp_path)) == [0]
    done = job.to_json_dict() | {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    found = look_up(JobModel(name="tiny", export="blocks"), done)
    assert found.text == uri("source/exports/blocks")
    results = []
    for name, source in (("from-store", found.text), ("from-folder", str(quiet(1) / "exports" / "blocks"))):
        following = job_in(folder, folder / name)
        manifest = following.to_json_dict()
        manifest["spec"]["model"] = {"init": {"uri": source}, "tokenizer": {"uri": source}}
        manifest["spec"]["stages"] = [manifest["spec"]["stages"][1] | {"convertTo": None}]
        del manifest["spec"]["stages"][0]["convertTo"]
        following = DiffusionTrainJob.from_json(json.dumps(manifest))
        assert join(start_machines(following, server, tmp_path / name)) == [0]
        results.append((folder / name / "model" / "model.safetensors").read_bytes())
    assert results[0] == results[1]


@pytest.mark.slow
def test_the_command_line_runs_plots_and_fetches(folder, server, quiet, tmp_path):
    def unmask(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "unmask.cli.main", *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "UNMASK_SCRATCH": str(tmp_path / "scratch")},
            capture_output=True,
            text=True,
            timeout=600,
        )

    run = "runs/first"  # as on the page
    manifest = tmp_path / "job.yaml"
    manifest.write_text(json.dumps(job_in(folder, uri(run)).to_json_dict()))
    done = unmask("run", "-f", manifest)
    assert done.returncode == 0, done.stderr
    assert f"is complete: the model is in {uri(run + '/model')}" in done.stdout
    stored = assert_same(server, run, quiet(1))
    refused = unmask("plot", uri(run))
    assert refused.returncode == 64
    assert f"copy it first (unmask fetch {uri(run)} DIR)" in refused.stderr
    lines = [line for line in page_commands(PAGE) if line.startswith("unmask")]
    assert len(lines) == 3
    for line in lines:
        _, command, source, target = line.replace("step-00000500", "step-00000012").split()
        fetched = unmask(command, source, tmp_path / target)
        assert fetched.returncode == 0, fetched.stderr
        below = source.removeprefix(uri(run)).strip("/")
        for name in ("model/model.safetensors", "checkpoints/step-00000012/manifest.json"):
            if name.startswith(below):
                there = tmp_path / target / name.removeprefix(below).strip("/")
                assert there.read_bytes() == stored[name], line


def test_a_store_is_asked_as_often_and_for_as_long_as_the_page_says(server):
    waits = []
    server.spoil = lambda method, path: True
    with pytest.raises(OSError, match="tried 5 times"):
        ObjectStore(f"s3://{BUCKET}/waits", wait=waits.append).read("nothing")
    assert (len(waits), sum(waits)) == (4, 7.5)
    assert GRACE_S == 15 * 60
    told = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "is tried five times within eight seconds" in told and "a quarter of an hour after" in told
