"""From a job to pods: what Kubernetes is asked for, and what the first process of a pod makes of it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from support.manifests import changed, train_job
from unmask_api.exit_codes import ExitCode
from unmask_operator.launch import pods, supervisor
from unmask_operator.launch.admission import admit
from unmask_operator.launch.report import LIMIT, Report, Termination


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
