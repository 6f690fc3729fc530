"""Jobs in a queue, on the real API server with the real Job controller and scheduler; Kueue is played."""

from collections.abc import Iterator

import pytest

from support.kueue import Flavor, Kueue
from support.operated import Operated, Place, operating, until
from unmask_operator.resources import Resource

pytestmark = [pytest.mark.slow, pytest.mark.real_api, pytest.mark.timeout(900)]

TWO = {"parallelism__nodes": 2, "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}
QUEUED = {"scheduling": {"queueName": "team"}}
SAVED = 75


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operating(tmp_path_factory.mktemp("plane")) as one:
        for name in ("reserved", "spot"):
            one.nodes.add(name, labels={"pool": name}, taint=name)
        one.nodes.ending = lambda pod: SAVED
        yield one


@pytest.fixture(scope="module")
def kueue(operated: Operated) -> Iterator[Kueue]:
    kueue = Kueue(operated.api)
    kueue.install()
    until(kueue.suspends, "Jobs in a queue are suspended as they are made")
    kueue.priority("urgent", 1000)
    priorities = Resource("PriorityClass", "scheduling.k8s.io", "v1", "priorityclasses")
    kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}}
    operated.api.create(priorities, None, kind | {"value": 1000})
    operated.stop()
    operated.start()  # what a cluster serves is looked at now and then only
    with kueue.running():
        yield kueue


def flavor(name: str, cpus: int) -> Flavor:
    """Return machines of the node ``name``."""
    return Flavor(cpus, {"pool": name}, [{"key": name, "operator": "Exists", "effect": "NoSchedule"}])


def machines(place: Place, job: str) -> dict[str, str]:
    """Return where the pods of a job are: Job and index -> machine."""
    return {
        name: pod["spec"].get("nodeName", "")
        for name, pod in place.pods().items()
        if name.rpartition("-a")[0] == job
    }


def test_a_job_waits_without_pods_for_all_of_its_quota_and_then_goes_where_the_queue_says(
    operated: Operated, kueue: Kueue
) -> None:
    place = operated.place()
    flavors = kueue.queue(place.name, "team", reserved=flavor("reserved", 1))
    given = {"key": "mine", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    place.submit(**TWO, **QUEUED, tolerations=[given])
    assert "queue team" in place.until_condition("Admitted", "False", "WaitingForQuota")
    status = place.status()
    assert (status["state"], status["nodes"]) == ("Queued", {"desired": 2, "ready": 0, "failed": 0})
    assert place.condition("GangScheduled")[:2] == ("True", "Kueue")
    (job,) = place.objects("Job")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    until(lambda: place.objects("Job")[0]["status"].get("conditions"), "the Job controller has seen it")
    assert place.objects("Pod") == [], "one of two would fit"

    flavors["reserved"].cpus = 2
    pods = place.until_running(2)
    assert place.condition("Admitted")[:2] == ("True", "Admitted")
    assert "startTime" in place.status()
    for pod in pods.values():
        assert pod["spec"]["nodeName"] == "reserved"
        assert pod["spec"]["nodeSelector"] == {"pool": "reserved"}
        keys = {one["key"] for one in pod["spec"]["tolerations"]}
        assert {"mine", "reserved"} <= keys
    (after,) = place.objects("Job")
    assert after["metadata"]["uid"] == job["metadata"]["uid"]


def test_a_job_that_makes_room_saves_is_not_a_failure_and_goes_on_elsewhere(
    operated: Operated, kueue: Kueue
) -> None:
    place = operated.place()
    flavors = kueue.queue(place.name, "team", reserved=flavor("reserved", 2), spot=flavor("spot", 0))
    place.submit(**TWO, **QUEUED, runPolicy__maxRestarts=0)
    before = place.until_running(2)
    (job,) = [one for one in place.objects("Job") if one["metadata"]["name"] == "tiny-a0"]
    place.submit("first", **TWO, scheduling={"queueName": "team", "priorityClassName": "urgent"})
    place.until_condition("Admitted", "False", "Evicted")
    place.until_running(2, name="first")
    assert set(machines(place, "first").values()) == {"reserved"}

    told = {pod["metadata"]["name"] for pod in before.values()}
    until(lambda: told <= operated.nodes.told_to_end.keys(), "they are told to end")
    given = {operated.nodes.told_to_end[name] for name in told}
    assert given == {120}, "as long as terminationGracePeriodSeconds says, to save"
    until(lambda: machines(place, "tiny") == {}, "its pods are gone")
    status = place.status()
    assert (status["state"], status["attempt"], status["restarts"]) == ("Queued", 0, 0)
    assert "failure" not in status and "startTime" not in status and status["history"] == []
    (now,) = [one for one in place.objects("Job") if one["metadata"]["name"] == "tiny-a0"]
    assert now["metadata"]["uid"] == job["metadata"]["uid"]
    assert now["spec"]["template"]["spec"].get("nodeSelector") in (None, {})

    flavors["spot"].cpus = 2
    after = place.until_running(2)
    assert set(machines(place, "tiny").values()) == {"spot"}
    assert {pod["metadata"]["uid"] for pod in after.values()}.isdisjoint(
        pod["metadata"]["uid"] for pod in before.values()
    )
    assert set(machines(place, "first").values()) == {"reserved"}
    for name in ("tiny", "first"):
        for index in range(2):
            place.end(f"{name}-a0-{index}", 0)
        place.until_condition("Complete", "True", "Completed", name)
    status = place.status()
    assert (status["attempt"], status["restarts"]) == (0, 0)
    assert [one["reason"] for one in status["history"]] == ["Completed"]


def test_a_failure_is_one_in_a_queue_too_and_the_next_attempt_waits_its_turn(
    operated: Operated, kueue: Kueue
) -> None:
    place = operated.place()
    kueue.queue(place.name, "team", reserved=flavor("reserved", 2))
    place.submit(**TWO, **QUEUED, runPolicy={"restartBackoffSeconds": 1})
    place.until_running(2)
    place.submit("other", **TWO, **QUEUED)
    place.until_condition("Admitted", "False", "WaitingForQuota", "other")
    place.end("tiny-a0-0", 1)
    # The other one was there first.
    place.until_running(2, name="other")
    place.until_condition("Admitted", "False", "WaitingForQuota")
    until(
        lambda: [one["metadata"]["name"] for one in place.objects("Job")] == ["other-a0", "tiny-a1"], "both"
    )
    assert (place.status()["attempt"], place.status()["restartsCounted"]) == (1, 1)
    for index in range(2):
        place.end(f"other-a0-{index}", 0)
    place.until_running(2, attempt=1)


def test_a_job_that_a_person_suspends_gives_its_quota_back_and_asks_for_it_again(
    operated: Operated, kueue: Kueue
) -> None:
    place = operated.place()
    kueue.queue(place.name, "team", reserved=flavor("reserved", 2))
    place.submit(**TWO, **QUEUED)
    place.until_running(2)
    place.submit("other", **TWO, **QUEUED)
    place.until_condition("Admitted", "False", "WaitingForQuota", "other")
    place.patch({"suspend": True})
    place.until_running(2, name="other")
    assert place.condition("Suspended")[:2] == ("True", "Suspended")
    assert place.condition("Admitted") == ("", "", "")
    place.patch({"suspend": False})
    place.until_condition("Admitted", "False", "WaitingForQuota")
    assert place.status()["restartsCounted"] == 0
    place.delete("DiffusionTrainJob", "other")
    place.until_running(2, attempt=1)


def test_an_elastic_job_is_resized_while_it_waits_and_asks_anew_when_it_runs(
    operated: Operated, kueue: Kueue
) -> None:
    place = operated.place()
    flavors = kueue.queue(place.name, "team", reserved=flavor("reserved", 1))
    place.submit(**TWO, **QUEUED, elastic={"minNodes": 1, "maxNodes": 4})
    place.until_condition("Admitted", "False", "WaitingForQuota")
    place.scale(4)
    until(lambda: place.objects("Job")[0]["spec"]["completions"] == 4, "the Job that waits is larger")
    assert place.objects("Job")[0]["spec"]["suspend"] is True
    flavors["reserved"].cpus = 4
    place.until_running(4)
    place.scale(2)
    place.until_running(2, attempt=1)
    assert place.status()["restartsCounted"] == 0
    assert len(machines(place, "tiny")) == 2


def test_nothing_that_queues_need_is_forbidden(operated: Operated, kueue: Kueue) -> None:
    decisions = [one["annotations"].get("authorization.k8s.io/decision") for one in operated.audited()]
    assert decisions
    assert "forbid" not in decisions
