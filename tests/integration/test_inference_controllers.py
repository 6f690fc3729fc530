"""Services on the real API server, with the real controllers and scheduler, machines that are only objects,
and the operator's own program under its generated permissions."""

import hashlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from support.manifests import changed, inference_service
from support.operated import SERVICE, Operated, Place, operating, until
from unmask_operator import rbac
from unmask_operator.reconcilers import RECONCILERS
from unmask_operator.resources import RESOURCES

Json = dict[str, Any]

pytestmark = [pytest.mark.slow, pytest.mark.real_api, pytest.mark.timeout(900)]

_MERGE = "application/merge-patch+json"


def _address(pod: Json) -> str:
    digest = hashlib.sha256(pod["metadata"]["uid"].encode()).digest()
    return f"10.{digest[0]}.{digest[1]}.{1 + digest[2] % 250}"


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operating(tmp_path_factory.mktemp("plane"), lease_seconds=60.0) as one:
        one.nodes.add("big")
        one.nodes.address = _address
        yield one


def _submit(place: Place, values: Json | None = None) -> None:
    place.api.create(
        SERVICE, place.name, changed(inference_service(), {"spec.model.uri": "/opt/mini"} | (values or {}))
    )


def _status(place: Place) -> Json:
    return dict(place.api.get(SERVICE, place.name, "chat").get("status") or {})


def _settled(place: Place) -> bool:
    """Whether the last change of the spec has come to its end."""
    service = place.api.get(SERVICE, place.name, "chat")
    status = service.get("status") or {}
    ready = {one["type"]: one for one in status.get("conditions", ())}.get("Ready", {})
    return bool(
        status.get("observedGeneration") == service["metadata"]["generation"]
        and ready.get("observedGeneration") == service["metadata"]["generation"]
        and ready.get("status") == "True"
    )


def _until_ready(place: Place) -> Json:
    try:
        until(lambda: _settled(place), f"{place.name} is ready")
    except AssertionError as error:
        raise AssertionError(f"{error}: {_status(place)}; {place.operated.log()[-1500:]}") from None
    return _status(place)


def _images(place: Place) -> set[str]:
    return {pod["spec"]["containers"][0]["image"] for pod in place.objects("Pod")}


def test_a_service_is_made_rolled_scaled_stopped_and_deleted(operated: Operated) -> None:
    place = operated.place()
    _submit(place)
    status = _until_ready(place)
    assert (status["replicas"], status["availableReplicas"], status["updatedReplicas"]) == (2, 2, 2)
    assert len(place.objects("Pod")) == 2 * (1 + 2)
    first = status["currentRevision"]
    place.api.merge(SERVICE, place.name, "chat", {"spec": {"image": "registry.example/unmask:2"}})
    status = _until_ready(place)
    assert status["currentRevision"] != first
    assert _images(place) == {"registry.example/unmask:2"}
    names = {one["metadata"]["name"] for one in place.objects("StatefulSet")}
    assert names == {f"{group['name']}-{role}" for group in status["groups"] for role in ("e", "s")}
    path = SERVICE.path(place.name, "chat", "scale")
    place.api._json("PATCH", path, {"fieldManager": "kubectl"}, {"spec": {"replicas": 1}}, _MERGE)
    assert _until_ready(place)["replicas"] == 1
    until(lambda: len(place.objects("Pod")) == 3, "the pods of one group are left")
    place.api.merge(SERVICE, place.name, "chat", {"spec": {"stopped": True}})
    until(lambda: not place.objects("Pod"), "nothing runs")
    place.delete("DiffusionInferenceService", "chat")
    kinds = ("Service", "StatefulSet", "ControllerRevision", "PodDisruptionBudget")
    until(lambda: not any(place.objects(kind) for kind in kinds), "nothing is left")


def test_an_operator_that_begins_anew_finds_nothing_to_change(operated: Operated) -> None:
    """Whatever the API server has filled in: its defaults are no differences."""
    place = operated.place()
    scaling = {"maxReplicas": 4, "metrics": [{"name": "unmask_requests_waiting", "target": "500m"}]}
    resources = {"limits": {"cpu": "1", "memory": "1Gi"}}
    group = {"shards": 1, "engineResources": resources, "shardResources": resources}
    _submit(place, {"spec.autoscaling": scaling, "spec.group": group, "spec.server.httpPort": 8000})
    _until_ready(place)
    operated.stop(signal.SIGTERM)  # in good order, so that its lease is free

    def writes() -> list[str]:
        inside = [one for one in operated.audited() if f"/namespaces/{place.name}/" in one["requestURI"]]
        changes = [one for one in inside if one["verb"] in ("create", "patch", "delete", "update")]
        return [one["requestURI"].partition("?")[0] for one in changes]

    before = len(writes())
    operated.start()
    other = operated.place()
    _submit(other, {"spec.replicas": 1})
    _until_ready(other)  # so it has looked at all of them
    later = [path for path in writes()[before:] if not path.endswith("/status") and "/events" not in path]
    assert later == []


def test_a_budget_keeps_the_cluster_from_taking_more_than_it_may(operated: Operated) -> None:
    place = operated.place()
    _submit(place, {"spec.rollout": {"maxSurge": 1, "maxUnavailable": 0}})
    _until_ready(place)
    budget = RESOURCES["PodDisruptionBudget"]
    until(
        lambda: (place.api.get(budget, place.name, "chat").get("status") or {}).get("currentHealthy") == 6,
        "the budget counts the pods",
    )
    status = place.api.get(budget, place.name, "chat")["status"]
    assert (status["desiredHealthy"], status["disruptionsAllowed"]) == (6, 0)


def test_the_operator_may_do_what_it_asks_for(operated: Operated) -> None:
    """Stands last: it looks at what the API server has logged of all tests above."""
    granted = {
        (verb, group, resource)
        for rule in rbac.rules(RECONCILERS) + rbac.lease_rules()
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    asked, refused = set(), set()
    for one in operated.audited():
        if (where := one.get("objectRef")) is None:
            continue  # discovery
        resource = "/".join(filter(None, (where["resource"], where.get("subresource"))))
        asked.add((one["verb"], where.get("apiGroup", ""), resource))
        if one["annotations"].get("authorization.k8s.io/decision") == "forbid":
            refused.add((one["verb"], resource))
    assert refused == set()
    assert asked <= granted
