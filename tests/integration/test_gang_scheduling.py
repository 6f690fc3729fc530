"""Pods placed all together or not at all, by the real scheduler, on machines that are only objects."""

from collections.abc import Iterator

import pytest

from support.operated import Operated, Place, operating, until

pytestmark = [pytest.mark.slow, pytest.mark.real_api, pytest.mark.timeout(900)]

TWO = {"parallelism__nodes": 2, "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operating(tmp_path_factory.mktemp("plane"), pod_groups=True) as one:
        one.nodes.add("small", cpu="1")
        yield one


def _placed(place: Place) -> dict[str, str]:
    return {name: pod["spec"].get("nodeName", "") for name, pod in place.pods().items()}


def test_no_pod_has_a_machine_before_all_have_one(operated: Operated) -> None:
    place = operated.place()
    place.submit(**TWO)
    message = place.until_condition("Scheduled", "False", "Unschedulable")
    assert place.condition("GangScheduled")[:2] == ("True", "Native")
    (group,) = place.objects("PodGroup")
    assert group["spec"]["schedulingPolicy"] == {"gang": {"minCount": 2}}
    until(lambda: len(place.pods()) == 2, "both pods are made")
    assert set(_placed(place).values()) == {""}, message
    operated.nodes.add("another", cpu="1")
    place.until_running(2)
    assert set(_placed(place).values()) == {"small", "another"}
    # A new attempt has a group of its own, and the old one's goes.
    place.end("tiny-a0-0", 75)
    place.until_running(2, attempt=1)
    until(
        lambda: [one["metadata"]["name"] for one in place.objects("PodGroup")] == ["tiny-a1"],
        "the group of the first attempt is gone",
    )
    place.delete("DiffusionTrainJob", "tiny")
    until(lambda: not place.objects("PodGroup") and not place.pods(), "nothing is left")
    operated.nodes.remove("another")


def test_without_a_gang_one_pod_holds_the_machine_while_the_other_waits(operated: Operated) -> None:
    """What the test above would find if the groups did nothing."""
    place = operated.place()
    place.submit(scheduling={"gang": {"mode": "None"}}, **TWO)
    until(lambda: sorted(_placed(place).values()) == ["", "small"], "one pod is placed")
    assert place.condition("GangScheduled")[:2] == ("False", "NotInstalled")
    assert place.objects("PodGroup") == []
    place.delete("DiffusionTrainJob", "tiny")
    until(lambda: not place.pods(), "nothing is left")


def test_nothing_that_groups_need_is_forbidden(operated: Operated) -> None:
    decisions = [one["annotations"].get("authorization.k8s.io/decision") for one in operated.audited()]
    assert decisions
    assert "forbid" not in decisions
    asked = {
        one["verb"] for one in operated.audited() if one.get("objectRef", {}).get("resource") == "podgroups"
    }
    assert {"create", "delete", "list", "watch"} <= asked
