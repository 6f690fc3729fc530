"""What people are told of a service: its state, what is wrong, and what to do, from its status alone."""

import datetime
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from support.manifests import changed, inference_service
from unmask.cli import service_report
from unmask_operator import serving
from unmask_operator.client import InferenceService, ServiceState
from unmask_operator.client.service_advice import next_step, obstacle, remedy

Json = dict[str, Any]
NOW = datetime.datetime(2026, 11, 27, 10, 5, tzinfo=datetime.UTC)
PODS = [{"metadata": {"name": "chat-0-x7k2pd-e-0"}}, {"metadata": {"name": "chat-0-x7k2pd-s-0"}}]
FULL = "chat-0-x7k2pd-s-0: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def service(
    state: str | None, *conditions: tuple[str, str, str, str], values: Json | None = None, **status: Any
) -> InferenceService:
    """A service with a state and conditions (type, status, reason, message)."""
    told = [
        {
            "type": kind,
            "status": truth,
            "reason": reason,
            "message": message,
            "lastTransitionTime": "2026-11-27T10:00:00Z",
        }
        for kind, truth, reason, message in conditions
    ]
    said = {"state": state, "conditions": told, "observedGeneration": 1} | status
    raw = changed(inference_service(), values or {}) | {"status": said if state else {}}
    raw["metadata"] |= {"namespace": "ml", "creationTimestamp": "2026-11-27T10:00:00Z", "generation": 1}
    return InferenceService(raw)


def group(message: str = "", ordinal: int = 0, **values: Any) -> Json:
    said = {"name": f"chat-{ordinal}-x7k2pd", "revision": "x7k2pd", "state": "Starting", "readyShards": 0}
    return said | ({"message": message} if message else {}) | values


STUCK = ("Progressing", "False", "ProgressDeadlineExceeded", f"no progress for 1800 s; {FULL}")
PRETRAIN = {"spec.model": {"job": {"name": "pretrain"}}}


@pytest.mark.parametrize(
    ("found", "wrong", "says"),
    [
        (service(None), "", "no operator has looked at it for 300 s"),
        (
            service("Progressing", groups=[group()]),
            "",
            "wait: its groups are being made or replaced; unmask logs service/chat --namespace ml shows",
        ),
        (
            service("Progressing", groups=[group(), group(FULL, 1)]),
            FULL,
            "no machine has room for the pod: lower spec.group.engineResources or shardResources, free"
            " machines, or change spec.nodeSelector and spec.tolerations (kubectl describe pod"
            " chat-0-x7k2pd-s-0",
        ),
        (
            service("Progressing", groups=[group('chat-0-x7k2pd-e-0: secret "chat-tls" not found')]),
            'chat-0-x7k2pd-e-0: secret "chat-tls" not found',
            "make the Secret that the message names",
        ),
        (
            service("Progressing", groups=[group("chat-0-x7k2pd-e-0: CrashLoopBackOff: back-off")]),
            "chat-0-x7k2pd-e-0: CrashLoopBackOff: back-off",
            "see why the container does not go on: kubectl logs --previous chat-0-x7k2pd-e-0",
        ),
        (
            service("Degraded", ("Ready", "False", "GroupsNotAvailable", "1 of 2 groups are available")),
            "1 of 2 groups are available",
            "wait: its groups are being made or replaced",
        ),
        (
            service("Degraded", ("Ready", "False", "GroupsNotAvailable", f"1 of 2 groups; {FULL}")),
            f"1 of 2 groups; {FULL}",
            "no machine has room for the pod",
        ),
        (service("Stuck", STUCK), STUCK[3], "no machine has room for the pod"),
        (
            service("Stuck", (*STUCK[:3], "no progress for 1800 s")),
            "no progress for 1800 s",
            "read what its pods print: unmask logs service/chat --namespace ml; then submit the manifest"
            " as it should be, or the one of before",
        ),
        (
            service("Waiting", ("ModelReady", "False", "WaitingForJob", "job trains"), values=PRETRAIN),
            "job trains",
            "wait for job pretrain: unmask describe job/pretrain --namespace ml says how it is",
        ),
        (
            service("Waiting", ("ModelReady", "False", "JobMissing", "no job"), values=PRETRAIN),
            "no job",
            "submit job pretrain, or name another one",
        ),
        (
            service("Stalled", ("Stalled", "True", "ModelJobFailed", "it failed"), values=PRETRAIN),
            "it failed",
            "see why job pretrain has no model: unmask describe job/pretrain --namespace ml",
        ),
        (
            service("Stalled", ("Stalled", "True", "Refused", "exceeded quota: team")),
            "exceeded quota: team",
            "the namespace's quota is used up: lower spec.group.engineResources or shardResources",
        ),
        (
            service("Stalled", ("Stalled", "True", "NameConflict", "Service chat belongs to somebody else")),
            "Service chat belongs to somebody else",
            "delete the object that the message names, or give the service another name",
        ),
        (
            service("Stalled", ("Stalled", "True", "InvalidSpec", "spec.image is missing")),
            "spec.image is missing",
            "change what the message names, and submit the manifest",
        ),
        (
            # What was served before goes on, and still something is wrong.
            service(
                "Ready",
                ("Ready", "True", "Routable", "chat.ml.svc:50051"),
                ("Stalled", "True", "ModelJobMissing", "no job pretrain"),
                values=PRETRAIN,
            ),
            "no job pretrain",
            "submit job pretrain",
        ),
        (
            service("Ready", ("ScalingReady", "False", "FailedGetPodsMetric", "no metrics returned")),
            "no metrics returned",
            "see that an adapter for custom metrics runs",
        ),
        (
            service("Ready", ("ScalingReady", "False", "Starting", "not said anything yet")),
            "",
            "ask it: kubectl port-forward service/chat 50051:50051 --namespace ml, and unmask generate hello"
            " --server 127.0.0.1:50051",
        ),
        (
            service(
                "Ready",
                values={"spec.server": {"tls": {"secretName": "s"}}},
                endpoint="chat.ml.svc:50051",
            ),
            "",
            "ask it, with a certificate that it knows, at chat.ml.svc:50051",
        ),
        (
            service("Paused", ("Ready", "False", "Paused", "groups are not of the revision asked for")),
            "groups are not of the revision asked for",
            "replace the groups: kubectl patch dis chat --namespace ml --type merge --patch"
            ' \'{"spec":{"rollout":{"paused":false}}}\'',
        ),
        (
            service(
                "Stopped",
                ("Ready", "False", "Stopped", "set spec.stopped to false"),
                values={"spec.stopped": True},
            ),
            "",
            "start it: kubectl patch dis chat --namespace ml --type merge --patch"
            ' \'{"spec":{"stopped":false}}\'',
        ),
        (
            service(
                "Stopped",
                ("Ready", "False", "Stopped", "set spec.stopped to false"),
                values={"spec.stopped": True, "metadata.annotations": {"unmask.dev/cancelled": "true"}},
            ),
            "",
            "submit the manifest again, and it starts",
        ),
        (
            service(
                "Stopped",
                ("Ready", "False", "ScaledToZero", "set spec.replicas"),
                values={"spec.replicas": 0},
            ),
            "",
            "kubectl scale diffusioninferenceservices/chat --namespace ml --replicas=1",
        ),
        (service("Stopping"), "", "wait: its engines finish what they have begun"),
        (service("Dreaming"), "", "read it: kubectl get dis chat --namespace ml --output yaml"),
    ],
)
def test_every_state_has_what_is_wrong_and_a_next_step(
    found: InferenceService, wrong: str, says: str
) -> None:
    assert obstacle(found) == wrong
    assert next_step(found, PODS, now=NOW.timestamp()).startswith(says)


def test_a_status_of_the_spec_before_is_not_taken_for_that_of_the_present_one() -> None:
    found = service("Ready", values={"metadata.generation": 2})
    found.raw["metadata"] |= {
        "generation": 2,
        "managedFields": [
            {"manager": "unmask", "time": "2026-11-27T10:04:50Z"},
            {"manager": "unmask-operator", "subresource": "status", "time": "2026-11-27T10:05:00Z"},
        ],
    }
    assert (found.state, found.settled) == (ServiceState.SUBMITTED, False)
    assert next_step(found, now=NOW.timestamp()) == "wait: the operator has not looked at it yet"
    assert next_step(found, now=NOW.timestamp() + 90).startswith("no operator has looked at it for 100 s")


def test_every_word_that_the_operator_says_is_known() -> None:
    text = (Path(serving.__file__).parent / "telling.py").read_text()
    (body,) = re.findall(r"^def _tell_ready\(.*?(?=^def )", text, re.DOTALL | re.MULTILINE)
    assigned = re.findall(r'\bstate(?:, \w+)* = \(?\s*"(\w+)"(?: if .*? else "(\w+)")?', body)
    said = {word for pair in assigned for word in pair if word}
    said |= set(re.findall(r'"(Degraded)" if .* else "(Progressing)"', body)[0])
    assert {"Stalled", "Ready", "Stuck", "Stopping"} < said
    assert said <= {str(state) for state in ServiceState}


def test_every_reason_that_has_a_remedy_is_one_that_the_operator_gives() -> None:
    cases = re.findall(r"^ +case (.*):$", inspect.getsource(remedy), re.MULTILINE)
    kinds = {kind for case in cases for kind in re.findall(r'^"(\w+)", "(?:True|False)"', case)}
    reasons = {reason for case in cases for reason in re.findall(r'"(\w+)"', case.partition(" if ")[0])}
    assert {"Stalled", "Ready"} < kinds and {"Paused", "NotComing", "NameConflict"} < reasons
    told = "".join(path.read_text() for path in Path(serving.__file__).parent.glob("*.py"))
    said = set(re.findall(r'"(\w+)"', told))
    assert kinds | reasons <= said


@pytest.mark.parametrize("state", ServiceState)
def test_no_state_is_without_advice(state: ServiceState) -> None:
    found = service(state)
    assert next_step(found, now=NOW.timestamp())
    assert obstacle(found) == ""


def test_conditions_that_are_as_they_should_be_need_nothing() -> None:
    found = service(
        "Ready",
        ("Ready", "True", "Routable", ""),
        ("Available", "True", "EnoughGroups", "2 of 2 groups are available"),
        ("Progressing", "False", "Settled", "there is nothing to do"),
        ("ModelReady", "True", "Given", "pvc://models/mini"),
        ("Stalled", "False", "Following", ""),
    )
    assert [remedy(found, one, PODS) for one in found.conditions] == [""] * 5
    assert service_report.remedies(found, PODS) == {}
    assert set(service_report.remedies(service("Stuck", STUCK), PODS)) == {"Progressing"}


def test_a_line_of_the_list_has_groups_model_revision_endpoint_and_what_is_wrong() -> None:
    found = service(
        "Stuck",
        (*STUCK[:3], f"{'long ' * 40}\nsecond line"),
        readyReplicas=1,
        currentRevision="old234",
        updateRevision="new567",
        endpoint="chat.ml.svc:50051",
        model={"uri": "pvc://runs/pretrain/model", "job": "pretrain"},
    )
    entries = dict(zip(service_report.HEADINGS, service_report.row(found, NOW), strict=True))
    wrong = entries.pop("IN THE WAY")
    assert entries == {
        "NAME": "chat",
        "STATE": "Stuck",
        "GROUPS": "1/2",
        "MODEL": "pvc://runs/pretrain/model",
        "REVISION": "old234 -> new567",
        "ENDPOINT": "chat.ml.svc:50051",
        "AGE": "5m",
    }
    assert wrong.startswith("long long") and wrong.endswith("...") and len(wrong) == 80


def test_a_model_that_is_not_known_yet_is_called_by_its_job() -> None:
    assert service("Waiting", values=PRETRAIN).model == "job/pretrain"
    assert service("Waiting").model == "pvc://models/mini"
