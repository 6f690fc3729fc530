"""TorchX's own runner on ``kubernetes_unmask``, with whichever version of TorchX is installed."""

import datetime
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torchx.runner import get_runner
from torchx.schedulers import get_scheduler_factories
from torchx.schedulers.api import Stream
from torchx.specs import AppState
from torchx.specs.finder import get_components

from support.cluster_client import Stage, kubeconfig, staged
from support.manifests import changed, train_job
from unmask.cli import shard
from unmask.errors import UsageError
from unmask_operator.client import NameTaken
from unmask_operator.client.scheduler import NAME

Json = dict[str, Any]
HANDLE = f"{NAME}://torchx/ml:tiny"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with staged() as made:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, made.address)))
        (tmp_path / "job.yaml").write_text(json.dumps(train_job()))
        monkeypatch.chdir(tmp_path)
        yield made


@pytest.fixture
def runner(stage: Stage) -> Iterator[Any]:
    logging.getLogger("torchx").setLevel(logging.ERROR)
    with get_runner() as made:
        yield made


def submit(runner: Any, *args: str, **cfg: str) -> str:
    return str(runner.run_component("unmask.train", ["--job", "job.yaml", *args], NAME, cfg=cfg))


def test_torchx_finds_ours_beside_its_own() -> None:
    assert {NAME, "local_docker", "local_cwd", "slurm", "kubernetes"} <= get_scheduler_factories().keys()
    assert {
        "unmask.train",
        "unmask.serve",
        "unmask.shard",
        "dist.ddp",
        "utils.echo",
    } <= get_components().keys()
    for name in ("local_cwd", "slurm"):
        assert type(get_scheduler_factories()[name]("torchx")).__module__.startswith("torchx.schedulers")


def test_each_replica_of_the_component_of_shards_is_another_shard(runner: Any, tmp_path: Path) -> None:
    options = ["--model", str(tmp_path), "--shards", "3", "--replication", "2", "--threads", "1"]
    info = runner.dryrun_component("unmask.shard", options, "local_cwd", cfg={"log_dir": str(tmp_path)})
    (replicas,) = info.request.role_params.values()
    found = []
    for replica in replicas:
        program, *arguments = replica.args
        assert program.endswith("python") and arguments[:2] == ["-m", "unmask.cli.main"]
        with shard.command.make_context(arguments[2], arguments[3:]) as context:
            found.append(context.params)
    assert [one["number"] for one in found] == ["0/3", "1/3", "2/3"]
    assert {one["replication"] for one in found} == {2} and {one["device"] for one in found} == {"cpu"}


def test_a_job_is_run_seen_stopped_and_deleted(stage: Stage, runner: Any) -> None:
    assert submit(runner) == HANDLE
    (made,) = stage.server.objects("DiffusionTrainJob")
    assert made["spec"]["stages"][3]["objective"] == "sft"
    assert runner.status(HANDLE).state is AppState.SUBMITTED
    assert submit(runner) == HANDLE  # the same again
    stage.set_status("tiny", state="Running", restarts=1, progress={"step": 1, "totalSteps": 32})
    uid = stage.pod("tiny")
    status = runner.status(HANDLE)
    assert (status.state, status.num_restarts) == (AppState.RUNNING, 1)
    assert [(one.id, one.state, one.hostname) for one in status.roles[0].replicas] == [
        (0, AppState.RUNNING, "machine-0")
    ]
    for second in range(3):
        stage.server.logs.write(uid, f"step {second}", stamp=f"2026-11-27T10:00:0{second}Z")
    assert list(runner.log_lines(HANDLE, "trainer", 0)) == ["step 0\n", "step 1\n", "step 2\n"]
    until = datetime.datetime(2026, 11, 27, 10, 0, 1, tzinfo=datetime.UTC)
    assert list(runner.log_lines(HANDLE, "trainer", 0, regex="[12]", until=until)) == ["step 1\n"]
    runner.cancel(HANDLE)
    assert stage.server.objects("DiffusionTrainJob")[0]["spec"]["suspend"] is True
    stage.set_status("tiny", state="Suspended")
    assert runner.status(HANDLE).state is AppState.CANCELLED
    runner._scheduler(NAME)._delete_existing("ml:tiny")
    assert runner.status(HANDLE) is None


def test_following_a_log_ends_with_the_job(stage: Stage, runner: Any) -> None:
    submit(runner)
    uid = stage.pod("tiny")
    stage.server.logs.write(uid, "done", stamp="2026-11-27T10:00:00Z")
    stage.end(uid)
    stage.set_status("tiny", state="Succeeded")
    assert list(runner.log_lines(HANDLE, "trainer", 0, should_tail=True)) == ["done\n"]
    with pytest.raises(ValueError, match="combined logs alone"):
        list(runner.log_lines(HANDLE, "trainer", 0, streams=Stream.STDERR))
    with pytest.raises(ValueError, match="has trainer alone"):
        list(runner.log_lines(HANDLE, "server", 0))


def test_jobs_that_kubectl_made_are_listed_described_and_stopped(stage: Stage, runner: Any) -> None:
    stage.create(stage.server.store("DiffusionTrainJob").resource, train_job())
    stage.set_status("tiny", state="Running")
    listed = runner.list(NAME)
    assert [(one.app_handle, one.state) for one in listed] == [(HANDLE, AppState.RUNNING)]
    app = runner.describe(HANDLE)
    assert (app.roles[0].name, app.roles[0].num_replicas) == ("trainer", 1)
    runner.cancel(HANDLE)
    assert stage.server.objects("DiffusionTrainJob")[0]["spec"]["suspend"] is True


def test_a_job_is_described_as_the_application_that_was_run(stage: Stage, runner: Any) -> None:
    info = runner.dryrun_component(
        "unmask.train", ["--job", "job.yaml", "--nodes", "2", "--gpu", "8", "--image", "u:1"], NAME
    )
    ran = getattr(info, "app", None) or info._app
    runner.schedule(info)
    with get_runner() as another:  # one that does not remember
        described = another.describe(HANDLE)
    was, told = (asdict(app)["roles"][0] for app in (ran, described))
    for role in (was, told):
        role.pop("env")
        role["args"][-1] = "JOB"
    assert told == was
    spec = stage.server.objects("DiffusionTrainJob")[0]["spec"]
    assert (spec["parallelism"]["nodes"], spec["image"]) == (2, "u:1")
    assert spec["resources"]["limits"] == {"nvidia.com/gpu": "8"}


def test_a_rehearsal_prints_a_manifest_that_kubectl_takes(stage: Stage, runner: Any) -> None:
    info = runner.dryrun_component("unmask.train", ["--job", "job.yaml"], NAME, cfg={"namespace": "other"})
    from unmask_operator.launch.admission import admit

    assert admit(str(info)) == admit(json.dumps(train_job()))
    assert info.request.namespace == "other"
    assert stage.server.objects("DiffusionTrainJob") == []


def test_the_namespace_can_be_chosen(stage: Stage, runner: Any) -> None:
    assert submit(runner, namespace="other") == f"{NAME}://torchx/other:tiny"
    assert [one["metadata"]["namespace"] for one in stage.server.objects("DiffusionTrainJob")] == ["other"]


def test_why_a_node_failed_is_told_with_its_replica(stage: Stage, runner: Any) -> None:
    submit(runner)
    stage.end(stage.pod("tiny"), 65)
    failure = {
        "reason": "DataError",
        "message": "a.jsonl:3: not JSON",
        "exitCode": 65,
        "pod": "tiny-a0-0-xyz00",
        "attempt": 0,
        "time": "2026-11-27T10:00:00Z",
    }
    condition = {"type": "Failed", "status": "True", "reason": "DataError", "message": "a.jsonl:3: not JSON"}
    condition["lastTransitionTime"] = "2026-11-27T10:00:00Z"
    stage.set_status("tiny", state="Failed", failure=failure, conditions=[condition])
    status = runner.status(HANDLE)
    assert (status.state, status.msg) == (AppState.FAILED, "a.jsonl:3: not JSON")
    assert "DataError: a.jsonl:3: not JSON" in status.format()
    assert "exitcode: 65" in status.format()


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("Queued", AppState.PENDING),
        ("Starting", AppState.PENDING),
        ("Restarting", AppState.PENDING),
        ("Stalled", AppState.PENDING),
        ("Succeeded", AppState.SUCCEEDED),
        ("Dreaming", AppState.UNKNOWN),
    ],
)
def test_states_in_the_words_of_torchx(stage: Stage, runner: Any, state: str, told: AppState) -> None:
    submit(runner)
    stage.set_status("tiny", state=state)
    assert runner.status(HANDLE).state is told


def test_a_pause_is_no_end(stage: Stage, runner: Any) -> None:
    Path("job.yaml").write_text(json.dumps(changed(train_job(), {"spec.suspend": True})))
    submit(runner)
    stage.set_status("tiny", state="Suspended")
    assert runner.status(HANDLE).state is AppState.PENDING


def test_what_cannot_be_run_is_refused(stage: Stage, runner: Any) -> None:
    with pytest.raises(UsageError, match="rowsPerStep"):
        submit(runner, "--nodes", "3")
    with pytest.raises(UsageError, match="none.yaml: cannot be read"):
        runner.run_component("unmask.train", ["--job", "none.yaml"], NAME)
    with pytest.raises(UsageError, match="is no training job"):
        runner.run_component("unmask.serve", ["--model", "/models/one"], NAME)
    submit(runner)
    with pytest.raises(NameTaken):
        submit(runner, "--image", "another:1")


@pytest.mark.slow
def test_the_commands_of_torchx_work(stage: Stage) -> None:
    torchx = [sys.executable, "-m", "torchx.cli.main"]

    def run(*args: str) -> str:
        done = subprocess.run([*torchx, *args], check=True, capture_output=True, text=True)
        return done.stdout

    assert run("run", "-s", NAME, "unmask.train", "--job", "job.yaml").strip() == HANDLE
    uid = stage.pod("tiny")
    stage.server.logs.write(uid, "step 1", stamp="2026-11-27T10:00:00Z")
    stage.set_status("tiny", state="Running")
    assert "RUNNING" in run("status", HANDLE)
    assert "step 1" in run("log", f"{HANDLE}/trainer/0")
    assert HANDLE in run("list", "-s", NAME)
    run("cancel", HANDLE)
    assert stage.server.objects("DiffusionTrainJob")[0]["spec"]["suspend"] is True
