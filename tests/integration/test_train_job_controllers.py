"""Training jobs on the real API server, with the real controllers and scheduler, machines that are only
objects, and the operator's own program under its generated permissions."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from support.operated import TRAIN_JOB, Operated, operating, until
from unmask_operator import rbac
from unmask_operator.reconcilers import RECONCILERS

Json = dict[str, Any]

pytestmark = [pytest.mark.slow, pytest.mark.real_api, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operating(tmp_path_factory.mktemp("plane")) as one:
        one.nodes.add("big")
        yield one


# --- a life ---------------------------------------------------------------------------------------------


def test_a_job_of_two_pods_runs_completes_and_goes_when_its_time_is_over(operated: Operated) -> None:
    place = operated.place()
    place.submit(parallelism__nodes=2, runPolicy__ttlSecondsAfterFinished=3)
    assert place.until_running(2).keys() == {"tiny-a0-0", "tiny-a0-1"}
    words = {"reason": "Completed", "exitCode": 0, "message": "tiny is complete", "step": 32}
    for pod in ("tiny-a0-0", "tiny-a0-1"):
        place.end(pod, 0, json.dumps(words))
    assert place.until_condition("Complete", "True", "Completed") == "tiny is complete"
    until(lambda: not place.objects("DiffusionTrainJob"), "the job's time to live is over")
    until(lambda: not place.objects("Pod") and not place.objects("ConfigMap"), "nothing is left")


def test_a_pod_that_dies_takes_its_attempt_with_it_and_the_next_one_follows(operated: Operated) -> None:
    place = operated.place()
    place.submit(parallelism__nodes=2, runPolicy={"restartBackoffSeconds": 1, "maxRestarts": 1})
    place.until_running(2)
    words = {"reason": "Failed", "exitCode": 1, "message": "KeyError: 'text'"}
    place.end("tiny-a0-1", 1, json.dumps(words))
    assert place.until_running(2, attempt=1).keys() == {"tiny-a1-0", "tiny-a1-1"}
    assert place.status()["failure"]["message"] == "KeyError: 'text'"
    place.end("tiny-a1-0", 65, json.dumps(words | {"reason": "DataError", "exitCode": 65}))
    assert "KeyError: 'text'" in place.until_condition("Failed", "True", "DataError")
    until(lambda: not place.pods(), "what still ran is gone")


def test_a_job_that_is_suspended_has_no_pods_and_goes_on_as_another_attempt(operated: Operated) -> None:
    place = operated.place()
    place.submit()
    place.until_running()
    place.patch({"suspend": True})
    place.until_condition("Suspended", "True", "Suspended")
    kinds = ("Job", "Service", "ConfigMap", "Pod")
    until(lambda: not any(_ours(place.objects(kind)) for kind in kinds), "nothing while it stands still")
    writes = len([one for one in operated.audited() if one["verb"] in ("create", "patch", "delete")])
    time.sleep(3.0)  # what it must not do takes time
    later = [one for one in operated.audited() if one["verb"] in ("create", "patch", "delete")][writes:]
    assert [one["requestURI"] for one in later if place.name in one["requestURI"]] == []
    place.patch({"suspend": False})
    place.until_running(attempt=1)
    assert place.status()["restartsCounted"] == 0
    place.delete("DiffusionTrainJob", "tiny")
    gone = ("DiffusionTrainJob", *kinds)
    until(lambda: not any(_ours(place.objects(kind)) for kind in gone), "nothing is left of a deleted job")


def test_an_elastic_job_is_scaled_like_a_deployment_and_keeps_its_pods(operated: Operated) -> None:
    place = operated.place()
    place.submit(parallelism__nodes=2, elastic={"minNodes": 1, "maxNodes": 4})
    before = place.until_running(2)
    place.scale(4)
    after = place.until_running(4)
    assert {name: after[name]["metadata"]["uid"] for name in before} == {
        name: pod["metadata"]["uid"] for name, pod in before.items()
    }
    (job,) = place.objects("Job")
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (4, 4)
    place.scale(2)
    assert place.until_running(2).keys() == before.keys(), "the last ones go first"


def test_a_job_begins_with_the_model_of_another_once_that_is_complete(operated: Operated) -> None:
    place = operated.place()
    place.submit("second", model={"init": {"job": {"name": "first"}}})
    assert "there is no DiffusionTrainJob first" in place.until_condition(
        "Stalled", "True", "ModelJobMissing", "second"
    )
    place.submit("first")
    assert "waiting for the model of job first" in place.until_condition(
        "ModelReady", "False", "WaitingForJob", "second"
    )
    place.until_running(name="first")
    place.end("first-a0-0", 0)
    place.until_condition("Complete", "True", "Completed", "first")
    place.until_running(name="second")
    given = next(one for one in place.objects("ConfigMap") if one["metadata"]["name"] == "second-a0")
    assert json.loads(given["data"]["job.json"])["spec"]["model"]["init"] == {"uri": "/data/run/model"}
    assert place.status("second")["modelUri"] == "/data/run/model"


# --- what only the operator can see -----------------------------------------------------------------------


def test_a_quota_that_is_used_up_is_said_at_once_and_the_job_goes_on_when_it_is_raised(
    operated: Operated,
) -> None:
    place = operated.place()
    quota = place.make("ResourceQuota", "pods", spec={"hard": {"pods": "0"}})
    until(lambda: "hard" in _again(place, "ResourceQuota", quota).get("status", {}), "the quota counts")
    place.submit()
    message = _told_within_five_seconds(place, "Scheduled", "QuotaExceeded", "FailedCreate")
    assert "exceeded quota: pods" in message
    raised = {"spec": {"hard": {"pods": "10"}}}
    place.api._json(
        "PATCH", _path(place, "resourcequotas", "pods"), {}, raised, "application/merge-patch+json"
    )
    place.until_running()
    assert place.status()["attempt"] == 0


def test_an_account_that_is_missing_is_named(operated: Operated) -> None:
    place = operated.place()
    place.submit(serviceAccountName="nobody")
    message = _told_within_five_seconds(place, "Scheduled", "PodsRefused", "FailedCreate")
    assert 'serviceaccount "nobody" not found' in message


def test_pods_that_the_cluster_does_not_admit_are_reported_with_its_words(operated: Operated) -> None:
    place = operated.place()
    place.submit(podTemplate={"spec": {"hostNetwork": True}})
    message = _told_within_five_seconds(place, "Scheduled", "PodsRefused", "FailedCreate")
    assert 'violates PodSecurity "restricted' in message


def test_pods_that_fit_nowhere_say_what_is_missing(operated: Operated) -> None:
    place = operated.place()
    place.submit(resources={"limits": {"nvidia.com/gpu": 8}})
    message = _told_within_five_seconds(place, "Scheduled", "Unschedulable", "Insufficient nvidia.com/gpu")
    assert "Insufficient nvidia.com/gpu" in message


def test_a_claim_that_is_missing_is_named(operated: Operated) -> None:
    place = operated.place()
    place.submit(checkpoint__uri="pvc://runs/tiny")
    message = _told_within_five_seconds(place, "Scheduled", "Unschedulable", "persistentvolumeclaim")
    assert 'persistentvolumeclaim "runs" not found' in message


def test_an_image_that_cannot_be_pulled_is_named(operated: Operated) -> None:
    place = operated.place()
    why = {"reason": "ErrImagePull", "message": "registry.example/none:1: not found"}
    operated.nodes.waiting = lambda pod: why if pod["metadata"]["namespace"] == place.name else None
    place.submit(image="registry.example/none:1")
    message = _told_within_five_seconds(place, "Running", "ImageUnavailable", "ErrImagePull")
    assert "registry.example/none:1: not found" in message


def test_a_secret_that_is_missing_is_named_as_environment_and_as_volume(operated: Operated) -> None:
    place = operated.place()
    why = {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}
    operated.nodes.waiting = lambda pod: why if pod["metadata"]["namespace"] == place.name else None
    place.submit(credentials=["s3"])
    reason = "CreateContainerConfigError"
    assert 'secret "s3" not found' in _told_within_five_seconds(place, "Running", reason, reason)
    other = operated.place()
    operated.nodes.waiting = lambda pod: (
        {"reason": "ContainerCreating"} if pod["metadata"]["namespace"] == other.name else None
    )
    other.submit(volumes=[{"name": "key", "secret": {"secretName": "key"}}])
    (pod,) = until(lambda: list(other.pods().values()), "the pod is made")
    _mount_failed(other, pod, 'MountVolume.SetUp failed for volume "key" : secret "key" not found')
    message = _told_within_five_seconds(other, "Running", "VolumeUnavailable", "FailedMount")
    assert 'secret "key" not found' in message


def test_a_child_that_the_api_server_refuses_is_named_and_tried_ever_more_slowly(operated: Operated) -> None:
    place = operated.place()
    quota = place.make("ResourceQuota", "jobs", spec={"hard": {"count/jobs.batch": "0"}})
    until(lambda: "hard" in _again(place, "ResourceQuota", quota).get("status", {}), "the quota counts")
    place.submit()
    assert "exceeded quota: jobs" in place.until_condition("Stalled", "True", "Refused")
    begun = len(_requests(operated, place.name))
    time.sleep(5.0)  # 50 ms, doubling: eight tries at most from the first on
    assert len(_requests(operated, place.name)) - begun <= 8
    place.api._json("DELETE", _path(place, "resourcequotas", "jobs"))
    place.until_running()


# --- upgrades -----------------------------------------------------------------------------------------------

ANOTHER_VERSION = """
from unmask_operator.launch import pods
real = pods._environment
pods._environment = lambda attempt: real(attempt) | {"SET_BY": "another version"}
"""


def test_an_operator_that_ends_or_is_another_version_disturbs_no_pod(operated: Operated) -> None:
    place = operated.place()
    operated.stop()
    operated.start(program=ANOTHER_VERSION)
    for number in range(3):
        place.submit(f"job-{number}", parallelism__nodes=2)
    for number in range(3):
        place.until_running(2, name=f"job-{number}")
    before = _identities(place)
    assert "another version" in json.dumps(place.objects("Job"))
    for _ in range(2):  # this version, and back to the other
        operated.stop()
        operated.start()
        operated.start(program=ANOTHER_VERSION)  # a standby
        place.patch({"runPolicy": {"maxRestarts": 9}}, "job-0")
        until(lambda: place.status("job-0")["observedGeneration"] == _generation(place, "job-0"), "seen")
        place.patch({"runPolicy": {"maxRestarts": 3}}, "job-0")
    assert _identities(place) == before
    assert {place.status(f"job-{number}")["attempt"] for number in range(3)} == {0}
    operated.stop()
    operated.start()
    place.end("job-1-a0-0", 75)
    place.end("job-1-a0-1", 75)
    place.until_running(2, attempt=1, name="job-1")
    now = json.dumps([one for one in place.objects("Job") if one["metadata"]["name"] == "job-1-a1"])
    assert "another version" not in now, "a new attempt is made by this version"


def test_an_operator_that_is_killed_again_and_again_leaves_one_attempt_that_runs(operated: Operated) -> None:
    place = operated.place()
    operated.stop()
    for number in range(4):
        place.submit(f"job-{number}", runPolicy={"restartBackoffSeconds": 1})
    for seconds in (0.0, 1.5, 2.5):
        operated.start()
        until(lambda: "leading" in operated.log(), "an operator leads")
        time.sleep(seconds)  # the moment is what is tried
        operated.stop()
    operated.start()
    for number in range(4):
        place.until_running(name=f"job-{number}")
    place.end("job-2-a0-0", 1)
    operated.stop()
    operated.start()
    place.until_running(attempt=1, name="job-2")
    names = sorted(one["metadata"]["name"] for one in place.objects("Job"))
    assert names == ["job-0-a0", "job-1-a0", "job-2-a1", "job-3-a0"]
    assert place.status("job-2")["restartsCounted"] == 1


def test_a_job_is_deleted_though_the_operator_is_gone(operated: Operated) -> None:
    place = operated.place()
    place.submit()
    place.until_running()
    kinds = ("DiffusionTrainJob", "Service", "ConfigMap", "Job")
    held = [one for kind in kinds for one in place.objects(kind) if one["metadata"].get("finalizers")]
    assert held == [], "nothing of ours waits for us, so namespaces do not either"
    operated.stop()
    try:
        place.delete("DiffusionTrainJob", "tiny")
        until(lambda: not any(_ours(place.objects(kind)) for kind in (*kinds, "Pod")), "nothing is left")
    finally:
        operated.start()


# --- permissions --------------------------------------------------------------------------------------------


def test_the_operator_has_asked_for_nothing_it_may_not_and_may_nothing_it_has_not_asked_for(
    operated: Operated,
) -> None:
    """Stands last: it looks at what the API server has logged of all tests above."""

    def all_of(rules: list[Json]) -> set[tuple[str, str, str]]:
        return {
            (verb, group, resource)
            for rule in rules
            for verb in rule["verbs"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
        }

    granted = all_of(rbac.rules(RECONCILERS) + rbac.lease_rules())
    for_jobs = all_of(rbac.rules([one for one in RECONCILERS if one.kind == TRAIN_JOB.kind]))
    asked, refused = set(), set()
    for one in operated.audited():
        if (where := one.get("objectRef")) is None:
            continue  # discovery
        resource = "/".join(filter(None, (where["resource"], where.get("subresource"))))
        asked.add((one["verb"], where.get("apiGroup", ""), resource))
        forbidden = one["annotations"].get("authorization.k8s.io/decision") == "forbid"
        if forbidden:
            refused.add((one["verb"], resource))
    assert refused == set()
    assert asked <= granted
    group = TRAIN_JOB.group
    unmet = {
        ("update", group, "diffusiontrainjobs/finalizers"),  # looked at by admission, never asked for
        ("patch", "events.k8s.io", "events"),  # an event that is told again after five minutes
        *((verb, "", kind) for verb in ("get", "patch") for kind in ("configmaps", "services")),
    }
    unmet |= {entry for entry in granted if entry[2] == "podgroups"}  # this cluster serves none
    assert for_jobs - asked <= unmet, sorted(for_jobs - asked - unmet)


# --- helpers ------------------------------------------------------------------------------------------------


def _ours(objects: list[Json]) -> list[Json]:
    return [one for one in objects if one["metadata"]["name"].startswith("tiny")]


def _path(place: Any, plural: str, name: str) -> str:
    return f"/api/v1/namespaces/{place.name}/{plural}/{name}"


def _again(place: Any, kind: str, body: Json) -> Json:
    found: Json = place.api._json("GET", _path(place, f"{kind.lower()}s", body["metadata"]["name"]))
    return found


def _told_within_five_seconds(place: Any, kind: str, reason: str, reported: str) -> str:
    """Wait for the cluster's report, the reason of an event or words of a pod's status, and then for the
    condition; return the message of the latter."""

    def told() -> bool:
        events = place.api._json("GET", f"/api/v1/namespaces/{place.name}/events")["items"]
        pods = place.objects("Pod")
        return any(one["reason"] == reported for one in events) or any(
            reported in json.dumps(pod["status"]) for pod in pods
        )

    until(told, f"the cluster says {reported}")
    begun = time.monotonic()
    message: str = place.until_condition(kind, "False", reason)
    assert time.monotonic() - begun < 5.0
    return message


def _mount_failed(place: Any, pod: Json, note: str) -> None:
    body = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "mount"},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": place.name,
            "name": pod["metadata"]["name"],
            "uid": pod["metadata"]["uid"],
        },
        "reason": "FailedMount",
        "message": note,
        "type": "Warning",
    }
    place.api._json("POST", f"/api/v1/namespaces/{place.name}/events", {}, body)


def _requests(operated: Operated, namespace: str) -> list[Json]:
    return [one for one in operated.audited() if f"/namespaces/{namespace}/" in one["requestURI"]]


def _identities(place: Any) -> dict[str, tuple[str, Any]]:
    found = [*place.objects("Pod"), *place.objects("Job"), *place.objects("Service")]
    return {
        one["metadata"]["name"]: (one["metadata"]["uid"], one["metadata"].get("generation")) for one in found
    }


def _generation(place: Any, name: str) -> int:
    return int(place.api.get(TRAIN_JOB, place.name, name)["metadata"]["generation"])
