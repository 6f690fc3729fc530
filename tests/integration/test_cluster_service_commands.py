"""``unmask submit | ps | logs | describe | cancel`` of services: what a person sees, and exit codes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster_client import EVENT_TIME, Stage, kubeconfig, refusing, staged
from support.manifests import changed, inference_service, train_job
from unmask.cli.main import main
from unmask_operator.resources import EVENT

Json = dict[str, Any]
Run = Callable[..., tuple[int, str, str]]
KIND = "DiffusionInferenceService"
STALLED = [
    {
        "type": "Stalled",
        "status": "True",
        "reason": "Refused",
        "message": "StatefulSet chat-0-x7k2pd-e is refused by the API server: exceeded quota: team",
        "lastTransitionTime": "2026-11-27T10:00:00Z",
    }
]
GROUP = {"name": "chat-0-x7k2pd", "revision": "x7k2pd", "state": "Available", "readyShards": 2, "restarts": 1}
READY = {
    "readyReplicas": 2,
    "availableReplicas": 2,
    "updatedReplicas": 2,
    "currentRevision": "x7k2pd",
    "updateRevision": "x7k2pd",
    "endpoint": "chat.ml.svc:50051",
    "model": {"uri": "pvc://models/mini"},
    "groups": [GROUP],
}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with staged() as made:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, made.address)))
        (tmp_path / "service.yaml").write_text(json.dumps(inference_service()))
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


def test_a_service_goes_from_the_manifest_to_its_end(stage: Stage, run: Run) -> None:
    code, out, _ = run("submit", "-f", "service.yaml", "--dry-run")
    assert (code, out) == (0, "ml/chat: the cluster takes it; nothing was kept\n")
    assert stage.server.objects(KIND) == []
    assert run("submit", "-f", "service.yaml")[:2] == (
        0,
        "ml/chat is submitted; unmask describe service/chat --namespace ml says how it is\n",
    )
    stage.serve("chat", **READY)
    heading, row = run("ps")[1].splitlines()
    assert heading.split()[:7] == ["NAME", "STATE", "GROUPS", "MODEL", "REVISION", "ENDPOINT", "AGE"]
    assert row.split()[:6] == ["chat", "Ready", "2/2", "pvc://models/mini", "x7k2pd", "chat.ml.svc:50051"]
    code, out, err = run("submit", "-f", "service.yaml", "--wait")
    assert (code, err) == (0, "chat: Ready, 2/2 groups ready\n")
    assert out == "ml/chat is Ready; unmask describe service/chat --namespace ml says more\n"
    ending = "its engines finish what they have begun, and end"
    assert run("cancel", "chat")[1] == f"ml/chat is stopped; {ending}\n"
    assert run("cancel", "chat")[1] == "ml/chat is stopped already\n"
    assert stage.server.objects(KIND)[0]["spec"]["stopped"] is True
    run("submit", "-f", "service.yaml")
    assert stage.server.objects(KIND)[0]["spec"]["stopped"] is False
    rehearsed = run("cancel", "--delete", "service/chat", "--dry-run")[1]
    assert rehearsed == f"ml/chat is deleted; {ending} (nothing was changed: --dry-run)\n"
    assert run("cancel", "--delete", "chat")[1] == f"ml/chat is deleted; {ending}\n"
    assert run("ps")[2] == "no training jobs and no services in namespace ml\n"


def test_services_are_listed_beside_jobs(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    run("submit", "-f", "service.yaml")
    stage.serve("chat", "Stalled", conditions=STALLED)
    jobs, services = run("ps", "--all-namespaces")[1].split("\n\n")
    assert [line.split()[:3] for line in jobs.splitlines()][1] == ["ml", "tiny", "Submitted"]
    row = services.splitlines()[1]
    assert row.split()[:4] == ["ml", "chat", "Stalled", "0/2"]
    assert "StatefulSet chat-0-x7k2pd-e is refused by the API server" in row
    kinds = [one["kind"] for one in json.loads(run("ps", "-o", "json")[1])]
    assert kinds == ["DiffusionTrainJob", KIND]


def test_a_list_is_told_as_far_as_it_may_be_seen(stage: Stage, run: Run) -> None:
    run("submit", "-f", "job.yaml")
    stage.server.rules = [
        {"verbs": ["list"], "apiGroups": ["unmask.dev"], "resources": ["diffusiontrainjobs"]}
    ]
    code, out, err = run("ps")
    assert code == 0 and "tiny" in out
    assert err.startswith("note: cannot list services in namespace ml") and err.count("\n") == 1


def test_a_service_is_described_with_its_groups_conditions_and_the_next_step(stage: Stage, run: Run) -> None:
    run("submit", "-f", "service.yaml")
    stage.serve("chat", "Stalled", **READY | {"readyReplicas": 1, "conditions": STALLED})
    stage.server_pod("chat", 0, "engine")
    uid = stage.server.objects(KIND)[0]["metadata"]["uid"]
    regarding = {"kind": KIND, "name": "chat", "uid": uid}
    stage.create(
        EVENT,
        {
            "metadata": {"name": "one"},
            "regarding": regarding,
            "type": "Warning",
            "reason": "Refused",
            "note": "exceeded quota: team",
            "eventTime": EVENT_TIME,
        },
    )
    out = run("describe", "chat")[1]
    assert out.startswith("ml/chat: Stalled, submitted")
    assert "groups: 1 of 2 ready, 2 available, 2 of the present revision\n" in out
    assert "model: pvc://models/mini\nrevision: x7k2pd\nendpoint: chat.ml.svc:50051\n" in out
    assert "  chat-0-x7k2pd  x7k2pd    Available  2/2     1\n" in out
    assert "what to do:\n  CONDITION  STEP\n  Stalled    the namespace's quota is used up" in out
    assert "  chat-0-x7k2pd-e-0  Running  machine-0\n" in out
    assert "Warning  Refused  exceeded quota: team\n" in out
    assert "in the way: StatefulSet chat-0-x7k2pd-e is refused" in out
    assert out.splitlines()[-1].startswith("next step: the namespace's quota is used up")
    told = json.loads(run("describe", "service/chat", "-o", "json")[1])
    assert told["service"]["metadata"]["uid"] == uid
    assert [pod["metadata"]["name"] for pod in told["pods"]] == ["chat-0-x7k2pd-e-0"]
    assert list(told["whatToDo"]) == ["Stalled"] and told["nextStep"] == told["whatToDo"]["Stalled"]


def test_what_may_not_be_seen_is_noted_and_the_rest_described(stage: Stage, run: Run) -> None:
    run("submit", "-f", "service.yaml")
    stage.server.rules = [
        {"verbs": ["get"], "apiGroups": ["unmask.dev"], "resources": ["diffusioninferenceservices"]}
    ]
    code, out, _ = run("describe", "chat")
    assert code == 0
    assert [line.split(" in ")[0] for line in out.splitlines() if line.startswith("note")] == [
        "note: cannot list the pods of service chat",
        "note: cannot list events of service chat",
    ]


def test_logs_of_engines_and_shards_are_told_apart(stage: Stage, run: Run) -> None:
    run("submit", "-f", "service.yaml")
    for role in ("engine", "shard"):
        uid = stage.server_pod("chat", 0, role)
        stage.server.logs.write(uid, f"{role} speaks", stamp="2026-11-27T10:00:00Z")
        stage.end(uid)
    assert run("logs", "chat")[1] == "[chat-0-x7k2pd-e-0] engine speaks\n"
    both = run("logs", "chat", "--role", "engine", "--role", "shard", "--timestamps", "--group", "0")[1]
    assert both.splitlines() == [
        "[chat-0-x7k2pd-e-0] 2026-11-27T10:00:00+00:00 engine speaks",
        "[chat-0-x7k2pd-s-0] 2026-11-27T10:00:00+00:00 shard speaks",
    ]
    assert run("logs", "chat", "--pod", "chat-0-x7k2pd-s-0")[1] == "[chat-0-x7k2pd-s-0] shard speaks\n"


def test_options_of_the_other_kind_are_refused(stage: Stage, run: Run) -> None:
    run("submit", "-f", "service.yaml")
    run("submit", "-f", "job.yaml")
    code, _, err = run("logs", "chat", "--all-nodes", "--attempt", "0")
    assert (code, err) == (64, "error: --all-nodes and --attempt: for jobs alone, and chat is a service\n")
    code, _, err = run("logs", "tiny", "--role", "shard")
    assert (code, err) == (64, "error: --role: for services alone, and tiny is a job\n")
    code, _, err = run("submit", "-f", "job.yaml", "--force-conflicts")
    assert code == 64 and "--force-conflicts is for services" in err


def test_a_name_of_both_is_asked_back(stage: Stage, run: Run) -> None:
    run("submit", "-f", "service.yaml")
    Path("job.yaml").write_text(json.dumps(changed(train_job(), {"metadata.name": "chat"})))
    run("submit", "-f", "job.yaml")
    code, _, err = run("cancel", "--delete", "chat")
    assert code == 64 and "has a job and a service chat: say job/chat or service/chat" in err
    assert run("cancel", "--delete", "service/chat")[0] == 0
    assert stage.server.objects(KIND) == [] and len(stage.server.objects("DiffusionTrainJob")) == 1


def test_a_rollout_that_is_stuck_ends_the_wait_with_an_error(stage: Stage, run: Run) -> None:
    run("submit", "-f", "service.yaml")
    told = {
        "type": "Progressing",
        "status": "False",
        "reason": "ProgressDeadlineExceeded",
        "message": "no progress for 1800 s",
        "lastTransitionTime": "2026-11-27T10:00:00Z",
    }
    stage.serve("chat", "Stuck", conditions=[told])
    code, _, err = run("submit", "-f", "service.yaml", "--wait")
    assert (code, err) == (1, "chat: Stuck, 0/2 groups ready: no progress for 1800 s\n")


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((401, "Unauthorized", "Unauthorized"), "does not know you"),
        ((409, "Conflict", 'conflict with "kubectl": spec.replicas'), "others have set fields"),
        ((422, "Invalid", "model.name cannot be changed"), "refuses it: model.name cannot be changed"),
        ((404, "NotFound", "the server could not find the requested resource"), f"does not know {KIND}s"),
    ],
)
def test_a_refusal_is_one_line(stage: Stage, run: Run, refusal: tuple[int, str, str], says: str) -> None:
    stage.server.refusal = refusing("PATCH", *refusal)
    code, out, err = run("submit", "-f", "service.yaml")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: cannot submit service chat") and says in err
