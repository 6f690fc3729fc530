"""``unmask submit | ps | logs | describe | cancel``: what a person sees, and exit codes."""

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster_client import EVENT_TIME, Stage, kubeconfig, refusing, staged
from support.manifests import changed, train_job
from unmask.cli.cluster import age, table
from unmask.cli.main import main
from unmask_operator import training
from unmask_operator.client import JobState, TrainJob
from unmask_operator.client.job_advice import next_step, obstacle
from unmask_operator.resources import EVENT

Json = dict[str, Any]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with staged() as made:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, made.address)))
        (tmp_path / "job.yaml").write_text(json.dumps(train_job()))
        monkeypatch.chdir(tmp_path)
        yield made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_a_job_goes_from_the_manifest_to_its_end(stage: Stage, run: Run) -> None:
    code, out, _ = run("submit", "-f", "job.yaml", "--dry-run")
    assert (code, out) == (0, "ml/tiny: the cluster takes it; nothing was kept\n")
    assert stage.server.objects("DiffusionTrainJob") == []
    code, out, _ = run("submit", "-f", "job.yaml")
    assert (code, out) == (0, "ml/tiny is submitted; follow it: unmask logs --follow tiny --namespace ml\n")
    uid = stage.pod("tiny")
    stage.server.logs.write(uid, "step 1", stamp="2026-11-27T10:00:00Z")
    stage.end(uid)
    progress = {"step": 32, "totalSteps": 32, "loss": "0.25", "estimatedRemainingSeconds": 0}
    stage.set_status(
        "tiny", state="Succeeded", progress=progress, nodes={"desired": 1, "ready": 0, "failed": 0}
    )
    assert run("logs", "--follow", "tiny")[:2] == (0, "step 1\n")
    heading, row = run("ps")[1].splitlines()
    assert heading.split() == ["NAME", "STATE", "STEP", "LOSS", "LEFT", "RESTARTS", "NODES", "AGE"]
    assert row.split()[:6] == ["tiny", "Succeeded", "32/32", "0.25", "0", "0/1"]
    assert run("describe", "tiny")[1].endswith("next step: the model is in pvc://run/tiny/model\n")
    assert run("submit", "-f", "job.yaml")[1] == (
        "ml/tiny is Succeeded; unmask describe tiny --namespace ml says more\n"
    )
    assert run("cancel", "tiny")[1] == "ml/tiny has ended already: it is Succeeded\n"
    assert run("cancel", "--delete", "tiny")[1] == "ml/tiny is deleted; its run folder stays\n"
    code, out, err = run("ps")
    assert (code, out, err) == (0, "", "no training jobs and no services in namespace ml\n")


def test_a_job_is_cancelled_and_goes_on(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    assert run("cancel", "tiny", "--dry-run")[1] == (
        "ml/tiny is cancelled; its pods save and end (nothing was changed: --dry-run)\n"
    )
    assert run("cancel", "tiny")[1] == "ml/tiny is cancelled; its pods save and end\n"
    stage.set_status("tiny", state="Suspended", checkpoint={"latestStep": 20, "latestUri": "/volumes/run/x"})
    assert run("describe", "tiny")[1].splitlines()[-1] == (
        "next step: submit the manifest again, and it goes on from the checkpoint of step 20"
    )
    assert "Cancelled" in run("ps")[1]
    run("submit", "-f", "job.yaml")
    assert stage.server.objects("DiffusionTrainJob")[0]["spec"]["suspend"] is False


def test_programs_get_json(stage: Stage, run: Run) -> None:
    made = json.loads(run("submit", "-f", "job.yaml", "-o", "json")[1])
    assert made["kind"] == "DiffusionTrainJob" and "managedFields" not in made["metadata"]
    assert [one["metadata"]["uid"] for one in json.loads(run("ps", "-o", "json")[1])] == [
        made["metadata"]["uid"]
    ]
    described = json.loads(run("describe", "tiny", "--output=json")[1])
    assert described["nextStep"] == "wait: the operator has not looked at it yet"
    assert described["job"] == made and described["pods"] == [] and described["events"] == []
    (cancelled,) = json.loads(run("cancel", "tiny", "-o", "json")[1])
    assert cancelled["spec"]["suspend"] is True


def test_waiting_ends_with_the_jobs_end(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    stage.set_status("tiny", state="Failed", progress={"step": 3, "totalSteps": 32})
    code, out, err = run("submit", "-f", "job.yaml", "--wait")
    assert (code, err) == (1, "tiny: Failed, step 3/32\n")
    assert out.startswith("ml/tiny is Failed; unmask describe tiny")


def test_jobs_of_all_namespaces_are_told_apart(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    run("submit", "-f", "job.yaml", "--namespace", "other")
    assert [line.split()[:2] for line in run("ps", "-A")[1].splitlines()] == [
        ["NAMESPACE", "NAME"],
        ["ml", "tiny"],
        ["other", "tiny"],
    ]


def test_nodes_are_shown_one_after_the_other_or_together(stage: Stage, run: Run) -> None:
    document = changed(train_job(), {"spec.parallelism": {"nodes": 2}})
    Path("job.yaml").write_text(json.dumps(document))
    run("submit", "-f", "job.yaml")
    for node in (0, 1):
        uid = stage.pod("tiny", node)
        for second in (1, 2):
            text = f"node {node} line {second}"
            stage.server.logs.write(uid, text, stamp=f"2026-11-27T10:00:0{second}Z")
        stage.end(uid)
    stage.set_status("tiny", state="Succeeded")
    assert run("logs", "tiny", "--node", "1")[1] == "node 1 line 1\nnode 1 line 2\n"
    stamped = run("logs", "tiny", "--timestamps", "--tail", "1")[1]
    assert stamped == "2026-11-27T10:00:02+00:00 node 0 line 2\n"
    for extra in ([], ["--follow"]):
        lines = run("logs", "tiny", "--all-nodes", *extra)[1].splitlines()
        assert sorted(lines) == [
            "[0] node 0 line 1",
            "[0] node 0 line 2",
            "[1] node 1 line 1",
            "[1] node 1 line 2",
        ]


def test_an_error_of_one_node_ends_the_command(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    uid = stage.pod("tiny")
    stage.end(uid)
    stage.set_status("tiny", state="Succeeded")
    stage.server.rules = [
        {"verbs": ["get"], "apiGroups": ["unmask.dev"], "resources": ["diffusiontrainjobs"]},
        {"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]},
    ]
    code, _, err = run("logs", "tiny", "--follow", "--node", "0", "--node", "1")
    assert (
        code == 1 and err.startswith("error: cannot read the log of pod tiny-a0-0") and err.count("\n") == 1
    )


FAILED: Json = {
    "state": "Failed",
    "attempt": 1,
    "restarts": 1,
    "restartsCounted": 1,
    "conditions": [
        {
            "type": "Failed",
            "status": "True",
            "reason": "OutOfMemory",
            "message": "tiny-a1-1 used more memory than its limit",
            "lastTransitionTime": "2026-11-27T10:00:00Z",
        }
    ],
    "failure": {
        "reason": "OutOfMemory",
        "message": "tiny-a1-1 used more memory than its limit",
        "exitCode": 137,
        "pod": "tiny-a1-1-abcde",
        "node": "machine-1",
        "attempt": 1,
        "time": "2026-11-27T10:00:00Z",
    },
    "checkpoint": {"latestStep": 20, "latestUri": "/volumes/run/tiny/checkpoints/step-00000020"},
    "history": [
        {
            "attempt": 0,
            "reason": "OutOfMemory",
            "fromStep": 0,
            "toStep": 20,
            "endTime": "2026-11-27T09:00:00Z",
        }
    ],
}


def test_a_failed_job_is_described_with_its_cause_and_the_next_step(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    stage.set_status("tiny", **FAILED)
    uid = stage.server.objects("DiffusionTrainJob")[0]["metadata"]["uid"]
    stage.create(
        EVENT,
        {
            "metadata": {"name": "one"},
            "regarding": {"kind": "DiffusionTrainJob", "name": "tiny", "uid": uid},
            "type": "Warning",
            "reason": "Failed",
            "note": "OutOfMemory: used more memory",
            "eventTime": EVENT_TIME,
        },
    )
    stage.end(stage.pod("tiny", 1, attempt=1), 137)
    out = run("describe", "tiny")[1]
    assert "ml/tiny: Failed, submitted" in out
    assert "checkpoint: step 20, /volumes/run/tiny/checkpoints/step-00000020\n" in out
    assert "attempt: 1, restarts: 1 (1 counted)\n" in out
    assert (
        "last failure: OutOfMemory in attempt 1, pod tiny-a1-1-abcde, machine machine-1, exit code 137:"
        " tiny-a1-1 used more memory than its limit\n" in out
    )
    assert "  0        OutOfMemory  0-20   2026-11-27T09:00:00Z\n" in out
    assert "OutOfMemory: used more memory\n" in out
    assert "tiny-a1-1-xyz11  Failed  machine-1\n" in out
    assert "in the way: tiny-a1-1 used more memory than its limit\n" in out
    assert out.splitlines()[-1] == (
        "next step: raise resources.limits.memory, or lower parallelism.microBatchRows (unmask plan says what"
        " a job takes); read its log (unmask logs tiny --namespace ml --node 1) for more; then delete the job"
        " and submit it again (unmask cancel --delete tiny --namespace ml): it goes on from the checkpoint of"
        " step 20"
    )


def test_what_may_not_be_seen_is_noted_and_the_rest_described(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    stage.server.rules = [
        {"verbs": ["get"], "apiGroups": ["unmask.dev"], "resources": ["diffusiontrainjobs"]}
    ]
    code, out, _ = run("describe", "tiny")
    assert code == 0
    assert [line.split(":")[:2] for line in out.splitlines() if line.startswith("note")] == [
        ["note", " cannot list the pods of job tiny in namespace ml"],
        ["note", " cannot list events of job tiny in namespace ml"],
    ]


def job(state: str | None, *conditions: tuple[str, str, str], **status: Any) -> TrainJob:
    """A job with a state and conditions (type, reason, message)."""
    told = [
        {
            "type": kind,
            "status": "True" if kind in ("Failed", "Stalled", "Restarting") else "False",
            "reason": reason,
            "message": message,
            "lastTransitionTime": "2026-11-27T10:00:00Z",
        }
        for kind, reason, message in conditions
    ]
    raw = train_job() | {"status": {"state": state, "conditions": told} | status if state else {}}
    raw["metadata"] |= {"namespace": "ml", "creationTimestamp": "2026-11-27T10:00:00Z"}
    return TrainJob(raw)


def changed_job(state: str, values: Json) -> TrainJob:
    found = job(state)
    return TrainJob(changed(found.raw, values))


NOW = datetime.datetime(2026, 11, 27, 10, 5, tzinfo=datetime.UTC).timestamp()


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (job(None), "no operator has looked at it for 300 s"),
        (
            changed_job("Waiting", {"spec.model.init": {"job": {"name": "first"}}}),
            "wait for job first: unmask describe first --namespace ml says how it is",
        ),
        (job("Queued", ("Admitted", "WaitingForQuota", "waiting for queue a")), "wait for the queue"),
        (
            job("Starting", ("Running", "Starting", "tiny-a0-0: ImagePullBackOff: Back-off")),
            "see that spec.image exists and that the machines may fetch it (kubectl describe pod tiny-a0-0)",
        ),
        (
            job(
                "Starting",
                ("Running", "Starting", "tiny-a0-0: CreateContainerConfigError: secret s not found"),
            ),
            "make the Secret or ConfigMap that spec.env names",
        ),
        (
            job(
                "Starting",
                ("Running", "Starting", "the pods are starting"),
                ("Scheduled", "Unschedulable", 'tiny-a0-0: persistentvolumeclaim "data" not found'),
            ),
            "make the claim that the manifest names",
        ),
        (
            job(
                "Starting",
                ("Scheduled", "Unschedulable", "tiny-a0-0: 0/3 nodes are available: 3 Insufficient cpu."),
            ),
            "no machine has room for the pod",
        ),
        (job("Starting", ("Running", "Starting", "the pods are being made")), "wait: the pods are starting"),
        (
            job("Stalled", ("Stalled", "Refused", "Job tiny-a0 is refused: exceeded quota: team")),
            "the namespace's quota is used up",
        ),
        (
            job("Stalled", ("Stalled", "NameConflict", "Job tiny-a0 belongs to somebody else")),
            "change what the condition Stalled names",
        ),
        (
            job("Restarting", ("Restarting", "Hung", "no progress")),
            "wait: the next attempt follows by itself",
        ),
        (job("Running"), "follow it: unmask logs --follow tiny --namespace ml"),
        (job("Failed", failure={"reason": "DataError", "message": "", "attempt": 0}), "correct the data"),
        (
            job("Failed", failure={"reason": "Odd", "message": "", "exitCode": 64, "attempt": 0}),
            "correct the manifest",
        ),
        (
            job("Failed", failure={"reason": "Odd", "message": "", "exitCode": 9, "attempt": 0}),
            "read its log",
        ),
        (job("Succeeded"), "the model is in pvc://run/tiny/model"),
        (job("Dreaming"), "read it: kubectl get dtj tiny --namespace ml --output yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_state_has_a_next_step(found: TrainJob, says: str) -> None:
    pods = [{"metadata": {"name": "tiny-a0-0"}}]
    assert next_step(found, pods, now=NOW).startswith(says)


def test_every_word_that_the_operator_says_is_known() -> None:
    modules = Path(training.__file__).parent.glob("*.py")
    text = "".join(path.read_text() for path in modules)
    said = set(re.findall(r'set_state\("(\w+)"', text)) | {"Failed"}
    assert {"Waiting", "Queued", "Running", "Succeeded"} < said <= {str(state) for state in JobState}


@pytest.mark.parametrize("state", JobState)
def test_no_state_is_without_advice(state: JobState) -> None:
    found = job(state)
    assert next_step(found, now=NOW)
    assert obstacle(found) == ""


@pytest.mark.parametrize(
    ("refusal", "code", "says"),
    [
        ((401, "Unauthorized", "Unauthorized"), 1, "does not know you"),
        ((403, "Forbidden", "may not"), 1, "ask for the role edit or unmask-user"),
        ((404, "NotFound", 'diffusiontrainjobs "tiny" not found'), 1, "has none of that name"),
    ],
)
def test_every_command_ends_a_refusal_in_one_line(
    stage: Stage, run: Run, refusal: tuple[int, str, str], code: int, says: str
) -> None:
    stage.server.refusal = refusing("GET", *refusal)
    for command in (["describe", "tiny"], ["logs", "tiny"], ["cancel", "tiny"]):
        ended, out, err = run(*command)
        assert (ended, out, err.count("\n")) == (code, "", 1)
        assert re.match("error: cannot get job (or service )?tiny", err)
        assert says in err


def test_another_spec_under_the_name_is_one_line(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    Path("job.yaml").write_text(json.dumps(changed(train_job(), {"spec.precision": "bf16"})))
    code, _, err = run("submit", "-f", "job.yaml")
    assert code == 1 and "has a job tiny with another spec (spec.precision)" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["ps", "--kubeconfig", "none"], 64, "'none' does not exist"),
        (["ps", "--context", "none"], 1, "cannot tell where the cluster is"),
        (["submit"], 64, "Missing option '-f' / '--file'"),
        (["submit", "-f", "none.yaml"], 64, "none.yaml: cannot be read"),
        (["logs", "tiny", "--since", "1y"], 64, "write an age such as 90s, 10m, 2h or 1d"),
        (["cancel"], 64, "Missing argument 'NAME...'"),
    ],
)
def test_wrong_usage_is_one_line(stage: Stage, run: Run, args: list[str], code: int, says: str) -> None:
    ended, _, err = run(*args)
    assert (ended, err.count("\n")) == (code, 1)
    assert says in err


def test_no_cluster_is_one_line(
    stage: Stage, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, _, err = run("ps")
    assert code == 1 and "cannot tell where the cluster is" in err and "--kubeconfig" in err
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, "http://127.0.0.1:9")))
    code, _, err = run("ps")
    assert code == 1 and "no answer from the cluster at http://127.0.0.1:9" in err and err.count("\n") == 1


def test_the_commands_need_no_torch(stage: Stage) -> None:
    program = (
        "import sys, unmask.cli.main as m\n"
        "assert m._exit_code(['submit', '-f', 'job.yaml', '--dry-run']) == 0\n"
        "assert m._exit_code(['ps']) == 0\n"
        "import unmask_operator.client.scheduler\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_ages_and_tables_are_short() -> None:
    now = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
    ages = [
        age(now - datetime.timedelta(seconds=seconds), now) for seconds in (5, 119, 120, 7199, 7200, 172_800)
    ]
    assert ages == ["5s", "119s", "2m", "119m", "2h", "2d"]
    assert table(["A", "B"], [["long", "1"], ["s", "22"]]) == "A     B\nlong  1\ns     22"
