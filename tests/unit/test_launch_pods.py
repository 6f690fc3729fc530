"""From a job to pods: what Kubernetes is asked for, and what the first process of a pod makes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.manifests import changed, train_job
from unmask.errors import UsageError
from unmask_api.exit_codes import ExitCode
from unmask_operator.launch import pods, supervisor
from unmask_operator.launch.admission import admit
from unmask_operator.launch.report import LIMIT, Report, StackReport, Termination
from unmask_operator.launch.volumes import resolve


def attempt(values: dict[str, Any] | None = None, number: int = 1) -> pods.Attempt:
    job = admit(json.dumps(changed(train_job(), values or {})))
    return pods.Attempt(
        job=job, number=number, uid="12345678-9", namespace="ml", image="registry.example/u:1"
    )


def pod(values: dict[str, Any] | None = None) -> dict[str, Any]:
    spec: dict[str, Any] = pods.indexed_job(attempt(values))["spec"]["template"]["spec"]
    return spec


def test_the_same_attempt_gives_the_same_objects_and_another_one_other_names() -> None:
    for make in (pods.config_map, pods.service, pods.indexed_job, pods.pod_group):
        assert json.dumps(make(attempt())) == json.dumps(make(attempt()))
        assert make(attempt())["metadata"]["name"] == "tiny-a1"
        assert make(attempt(number=2))["metadata"]["name"] == "tiny-a2"


def test_a_pod_is_allowed_in_a_restricted_namespace() -> None:
    spec = pod({"spec.parallelism.nodes": 2})
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert not any("hostPath" in volume for volume in spec["volumes"])


def test_every_claim_of_the_manifest_is_mounted_where_the_job_file_says() -> None:
    spec = pod()
    mounts = {one["name"]: one["mountPath"] for one in spec["containers"][0]["volumeMounts"]}
    claimed = {
        volume["persistentVolumeClaim"]["claimName"]: mounts[volume["name"]]
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claimed == {"data": "/volumes/data", "run": "/volumes/run"}
    job = json.loads(pods.config_map(attempt())["data"]["job.json"])
    assert job["spec"]["checkpoint"]["uri"] == "/volumes/run/tiny"
    assert mounts["job"] + "/job.json" in spec["containers"][0]["command"]


def test_a_later_attempt_goes_on_even_where_the_first_may_not() -> None:
    never = {"spec.checkpoint.resume": "Never"}
    resume = [
        json.loads(pods.config_map(attempt(never, number))["data"]["job.json"])["spec"]["checkpoint"][
            "resume"
        ]
        for number in (0, 1)
    ]
    assert resume == ["Never", "Auto"]


def test_gpus_bring_what_nccl_needs_and_amounts_are_text() -> None:
    limits = {"nvidia.com/gpu": 8, "cpu": "16", "memory": "64Gi"}
    spec = pod({"spec.resources": {"limits": limits}, "spec.parallelism.processesPerNode": 2})
    (container,) = spec["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["resources"]["requests"]["memory"] == "64Gi"
    assert env["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "600"
    assert env["OMP_NUM_THREADS"] == "8"
    assert {"name": "dshm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_an_overlay_adds_to_the_pod_but_cannot_change_who_a_process_is() -> None:
    overlay = {
        "metadata": {"labels": {"team": "a", "unmask.dev/attempt": "9"}},
        "spec": {
            "hostname": "x",
            "restartPolicy": "Always",
            "containers": [
                {
                    "name": "trainer",
                    "env": [{"name": "PET_RDZV_ID", "value": "z"}, {"name": "A", "value": "b"}],
                },
                {"name": "side", "image": "registry.example/side:1"},
            ],
        },
    }
    template = pods.indexed_job(attempt({"spec.podTemplate": overlay}))["spec"]["template"]
    trainer, side = template["spec"]["containers"]
    env = [one for one in trainer["env"] if one["name"] in ("PET_RDZV_ID", "A")]
    assert [one["value"] for one in env] == ["12345678-1", "b"]
    assert side["name"] == "side"
    assert trainer["image"] == "registry.example/u:1"
    assert template["metadata"]["labels"] == {
        "team": "a",
        "unmask.dev/job": "tiny",
        "unmask.dev/attempt": "1",
    }
    assert template["spec"]["restartPolicy"] == "Never"


def test_credentials_are_environment_and_what_the_manifest_says_comes_before() -> None:
    values = {"spec.credentials": ["s3-key"], "spec.env": [{"name": "AWS_REGION", "value": "x"}]}
    (container,) = pod(values)["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "s3-key"}}]
    assert {"name": "AWS_REGION", "value": "x"} in container["env"]
    assert "envFrom" not in pod()["containers"][0]


STORE = "s3://bucket/runs/tiny"


@pytest.mark.parametrize(
    "values",
    [
        {"spec.checkpoint.uri": STORE},
        {"spec.model": {"init": {"uri": "gs://bucket/model"}}},
        {"spec.model.tokenizer": {"uri": "az://container/tokenizer"}},
    ],
)
def test_what_is_in_an_object_store_has_scratch_room_in_the_pod(values: dict[str, Any]) -> None:
    spec = pod(values)
    (container,) = spec["containers"]
    assert {"name": "scratch", "emptyDir": {}} in spec["volumes"]
    assert {"name": "scratch", "mountPath": "/scratch"} in container["volumeMounts"]
    assert {"name": "UNMASK_SCRATCH", "value": "/scratch"} in container["env"]
    assert "scratch" not in json.dumps(pod())


def test_scratch_room_can_be_another_volume() -> None:
    claim = {"volumeClaimTemplate": {"spec": {"resources": {"requests": {"storage": "1Ti"}}}}}
    overlay = {"spec": {"volumes": [{"name": "scratch", "emptyDir": None, "ephemeral": claim}]}}
    spec = pod({"spec.checkpoint.uri": STORE, "spec.podTemplate": overlay})
    assert [one for one in spec["volumes"] if one["name"] == "scratch"] == [
        {"name": "scratch", "ephemeral": claim}
    ]


def test_a_run_in_an_object_store_keeps_its_uri_and_claims_no_volume_for_it() -> None:
    made = attempt({"spec.checkpoint.uri": STORE})
    job = json.loads(pods.config_map(made)["data"]["job.json"])
    assert job["spec"]["checkpoint"]["uri"] == STORE
    claims = [one.get("persistentVolumeClaim") for one in pod({"spec.checkpoint.uri": STORE})["volumes"]]
    assert [claim["claimName"] for claim in claims if claim] == ["data"]


def test_progress_of_a_run_in_an_object_store_says_where_its_checkpoint_is(tmp_path: Path) -> None:
    line = {"kind": "step", "step": 4, "total_steps": 8, "stage": "a", "loss": 1.0, "lr": 1.0, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").touch()
    report = supervisor.progress(tmp_path, attempt=0, uri=f"{STORE}/")
    assert report is not None
    assert report.checkpoint is not None
    assert report.checkpoint.uri == f"{STORE}/checkpoints/step-00000003"


def test_another_jobs_model_is_for_clusters_only(tmp_path: Path) -> None:
    job = admit(json.dumps(changed(train_job(), {"spec.model": {"init": {"job": {"name": "first"}}}})))
    with pytest.raises(UsageError, match=r"init\.job: job first is known to a cluster only; set init\.uri"):
        resolve(job, {"data": tmp_path, "run": tmp_path})


_HANGS = """
import faulthandler, os, signal, sys, threading, time
folder = os.environ["UNMASK_STACKS"]
file = open(f"{folder}/rank-3.txt", "w")
faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
def all_reduce():
    open(f"{folder}/ready", "w").close()
    time.sleep(600)
def step():
    all_reduce()
step()
"""


def test_workers_that_hang_say_where_and_that_is_kept_in_the_run_folder(tmp_path: Path) -> None:
    folder, written = tmp_path / "run", tmp_path / "stacks"
    folder.mkdir()
    written.mkdir()
    own = os.environ | {"UNMASK_STACKS": str(written), "UNMASK_ATTEMPT": "2"}
    # The launcher, whose child is the worker.
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_HANGS!r}])"
    with subprocess.Popen([sys.executable, "-c", launcher], env=own, start_new_session=True) as process:
        try:
            end = time.monotonic() + 60
            while not (written / "ready").exists():
                assert time.monotonic() < end
                time.sleep(0.05)
            texts = supervisor._write_stacks([process.pid], folder, own)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    report = supervisor.stacks(texts, attempt=2)
    assert report.attempt == 2
    (line,) = report.stacks
    assert line.startswith("rank 3 is in all_reduce (<string>:")
    assert "< step (<string>:" in line
    assert StackReport.read(report.to_bytes()) == report
    assert "all_reduce" in (folder / "stacks/attempt-2-rank-3.txt").read_text()


def test_a_worker_that_cannot_write_its_stacks_yet_is_not_sent_the_signal(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            own = {"UNMASK_STACKS": str(tmp_path), "UNMASK_ATTEMPT": "0"}
            assert supervisor._write_stacks([os.getpid()], tmp_path, own) == {}
            assert process.poll() is None
        finally:
            process.kill()


def test_stacks_of_many_workers_fit_into_an_answer() -> None:
    texts = {f"rank {number}": f'  File "{"x" * 300}.py", line 1 in f\n' * 9 for number in range(64)}
    text = supervisor.stacks(texts, attempt=0).to_bytes()
    assert len(text) <= LIMIT
    report = StackReport.read(text)
    assert report is not None and report.stacks
    assert StackReport.read(b"{}") is None
    assert StackReport.read(b"x" * 5000) is None


def test_only_the_first_pod_is_host_of_the_meeting() -> None:
    given = {"PET_RDZV_CONF": "join_timeout=600", "POD_IP": "10.0.0.7"}
    first = supervisor.environment(given | {"JOB_COMPLETION_INDEX": "0"})
    other = supervisor.environment(given | {"JOB_COMPLETION_INDEX": "3"})
    assert first["PET_RDZV_CONF"] == "join_timeout=600,is_host=1"
    assert other["PET_RDZV_CONF"] == "join_timeout=600,is_host=0"
    assert other["PET_LOCAL_ADDR"] == "10.0.0.7"


def test_progress_comes_from_the_log_of_the_run_even_while_a_line_is_written(tmp_path: Path) -> None:
    assert supervisor.progress(tmp_path, attempt=0) is None
    line = {"kind": "step", "stage": "blocks", "total_steps": 9, "loss": 1.5, "lr": 1e-3, "tokens": 100}
    lines = [json.dumps(line | {"step": step, "seconds": 0.5}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "st']))
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    report = supervisor.progress(tmp_path, attempt=4)
    assert report is not None
    assert (report.attempt, report.step, report.total_steps, report.stage) == (4, 2, 9, "blocks")
    assert (report.loss, report.tokens_per_second, report.seconds_per_step) == ("1.5", "200", "0.5")
    assert report.checkpoint is not None
    assert report.checkpoint.step == 2
    assert Report.read(json.dumps(report.to_json_dict())) == report


SAVED = {"reason": "Stopped", "exit_code": 75, "message": "saved", "step": 3, "checkpoint": None}


@pytest.mark.parametrize(
    ("code", "report", "out_of_memory", "exit_code", "reason"),
    [
        (0, None, False, 0, "Completed"),
        (0, SAVED | {"exit_code": 0, "reason": "Completed"}, False, 0, "Completed"),
        (1, SAVED, False, ExitCode.SAVED, "Stopped"),
        (1, SAVED | {"exit_code": 65, "reason": "DataError"}, False, ExitCode.DATA, "DataError"),
        (1, None, False, 1, "Failed"),
        (1, None, True, 128 + signal.SIGKILL, "OutOfMemory"),
        (1, {"reason": 3}, False, 1, "Failed"),
        (1, SAVED | {"exit_code": 0}, False, 1, "Failed"),
        (143, None, False, 143, "Failed"),
    ],
)
def test_the_pods_exit_code_is_the_trainers_and_not_torchruns(
    code: int, report: dict[str, Any] | None, out_of_memory: bool, exit_code: int, reason: str
) -> None:
    said = supervisor.ending(code, report, out_of_memory=out_of_memory)
    assert (said.exit_code, said.reason) == (exit_code, reason)


@pytest.mark.parametrize("message", ["x" * 100_000, "é" * 50_000, '"\\' * 9000, ""])
def test_a_termination_message_of_any_length_fits_and_can_be_read(message: str) -> None:
    text = Termination(reason="Failed", exit_code=1, message=message).to_bytes()
    assert len(text) <= LIMIT
    read = Termination.read(text.decode())
    assert read is not None
    assert message.startswith(read.message)
