"""What the operator relies on in an API server: of the one in memory, of the same over HTTP, and of a real
one."""

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from support import real_api_server
from support.api_server import ApiServer, DirectTransport, listening
from unmask_operator.control.api import Api, ApiError, KubernetesTransport
from unmask_operator.control.clock import SystemClock
from unmask_operator.control.events import EventRecorder
from unmask_operator.control.executor import Executor, Expectations, prepared
from unmask_operator.decision import Decision, Event, Observed
from unmask_operator.resources import EVENT, LEASE, RESOURCES, Resource

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
JOB, CONFIG_MAP, TRAIN_JOB = RESOURCES["Job"], RESOURCES["ConfigMap"], RESOURCES["DiffusionTrainJob"]
STATEFUL_SET = Resource("StatefulSet", "apps", "v1", "statefulsets")
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
_numbers = itertools.count()


@dataclass
class Server:
    api: Api
    namespace: str
    expire: Callable[[], None]
    """Makes the first resource version too old for a watch."""

    def apply(
        self, resource: Resource, body: Json, manager: str, *, force: bool = False, sub: str = ""
    ) -> Json:
        query = {"fieldManager": manager, "force": str(force).lower()}
        path = resource.path(self.namespace, body["metadata"]["name"], sub or None)
        return self.api._json("PATCH", path, query, body, _APPLY)

    def events(
        self, resource: Resource, version: str, number: int, selector: str = ""
    ) -> list[tuple[str, str]]:
        """Return the first events after a version as (type, name)."""
        stream = self.api.watch(resource, self.namespace, selector, version, 5, 10.0)
        told = (one for one in stream if one["type"] != "BOOKMARK")
        return [(one["type"], one["object"]["metadata"]["name"]) for one in itertools.islice(told, number)]


@pytest.fixture(scope="module", params=["memory", "http"] + ["real"] * real_api_server.AVAILABLE)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if request.param == "real":
        with real_api_server.running(tmp_path_factory.mktemp("real"), "operator") as real:
            api = Api(KubernetesTransport(real.client()), SystemClock())
            definition = yaml.safe_load((ROOT / "deploy/crds/diffusiontrainjobs.unmask.dev.yaml").read_text())
            api.create(real_api_server.DEFINITION, None, definition)
            real_api_server.until_served(api, TRAIN_JOB)
            yield api, real.restart
        return
    server = ApiServer(collects=False)
    if request.param == "memory":
        yield Api(DirectTransport(server), SystemClock()), server.compact
        return
    with listening(server) as address:
        settings = client.Configuration(host=address)
        yield Api(KubernetesTransport(client.ApiClient(settings)), SystemClock()), server.compact


@pytest.fixture
def server(place: Any) -> Server:
    api, expire = place
    namespace = f"test-{next(_numbers)}"
    if expire.__qualname__.startswith("running"):  # a real one wants its namespaces made
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        api.create(real_api_server.NAMESPACE, None, body)
    return Server(api, namespace, expire)


def config_map(name: str = "one", **data: str) -> Json:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def job(name: str = "one") -> Json:
    container = {"name": "worker", "image": "example.com/worker:1"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    spec = {"backoffLimit": 0, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def train_job(name: str = "one") -> Json:
    body: Json = yaml.safe_load((ROOT / "examples/quickstart/quickstart.yaml").read_text())
    body["metadata"] = {"name": name}
    return body


def refusal(call: Callable[[], Any]) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value.status, caught.value.reason


def test_an_object_is_made_once(server: Server) -> None:
    api, space = server.api, server.namespace
    made = api.create(CONFIG_MAP, space, config_map(a="1"))
    assert made["metadata"]["uid"] and made["metadata"]["creationTimestamp"]
    assert api.get(CONFIG_MAP, space, "one") == made
    assert refusal(lambda: api.create(CONFIG_MAP, space, config_map(a="2"))) == (409, "AlreadyExists")
    assert refusal(lambda: api.get(CONFIG_MAP, space, "two")) == (404, "NotFound")
    assert refusal(lambda: api.create(CONFIG_MAP, space, config_map("Not_A_Name"))) == (422, "Invalid")
    numbered = config_map("three")
    numbered["metadata"]["resourceVersion"] = "5"
    assert refusal(lambda: api.create(CONFIG_MAP, space, numbered))[0] in (400, 500)


def test_the_generation_counts_changes_of_the_spec(server: Server) -> None:
    api, space = server.api, server.namespace
    made = api.create(TRAIN_JOB, space, train_job())
    labelled = api.merge(TRAIN_JOB, space, "one", {"metadata": {"labels": {"a": "b"}}})
    status = {"apiVersion": TRAIN_JOB.api_version, "kind": TRAIN_JOB.kind, "metadata": {"name": "one"}}
    told = server.apply(TRAIN_JOB, status | {"status": {"state": "Running"}}, "operator", sub="status")
    edited = api.merge(TRAIN_JOB, space, "one", {"spec": {"runPolicy": {"maxRestarts": 7}}})
    steps = [made, labelled, told, edited]
    assert [one["metadata"]["generation"] for one in steps] == [1, 1, 1, 2]
    versions = [int(one["metadata"]["resourceVersion"]) for one in steps]
    assert versions == sorted(set(versions))


def test_spec_and_status_are_written_apart(server: Server) -> None:
    api, space = server.api, server.namespace
    made = api.create(TRAIN_JOB, space, train_job() | {"status": {"state": "Invented"}})
    assert "state" not in made.get("status", {})
    patched = api.merge(TRAIN_JOB, space, "one", {"status": {"state": "Invented"}})
    assert "state" not in patched.get("status", {})
    body = {
        "apiVersion": TRAIN_JOB.api_version,
        "kind": TRAIN_JOB.kind,
        "metadata": {"name": "one"},
        "status": {"state": "Running"},
        "spec": {"runPolicy": {"maxRestarts": 9}},
    }
    told = server.apply(TRAIN_JOB, body, "operator", sub="status")
    assert told["status"]["state"] == "Running"
    assert told["spec"] == made["spec"]


def test_our_kinds_have_defaults_and_nothing_unknown(server: Server) -> None:
    body = train_job()
    body["spec"]["surprise"] = True
    made = server.api.create(TRAIN_JOB, server.namespace, body)
    assert "surprise" not in made["spec"]
    assert made["spec"]["runPolicy"]["maxRestarts"] >= 0


def test_applying_the_same_changes_nothing(server: Server) -> None:
    first = server.apply(CONFIG_MAP, config_map(a="1", b="2"), "operator")
    again = server.apply(CONFIG_MAP, config_map(a="1", b="2"), "operator")
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


def test_fields_belong_to_who_applied_them(server: Server) -> None:
    server.apply(CONFIG_MAP, config_map(a="1", b="2"), "operator")
    server.apply(CONFIG_MAP, config_map(b="2", c="3"), "somebody")
    assert refusal(lambda: server.apply(CONFIG_MAP, config_map(c="4"), "operator")) == (409, "Conflict")
    # b is shared and stays, a is dropped with its only owner.
    left = server.apply(CONFIG_MAP, config_map(), "operator")
    assert left["data"] == {"b": "2", "c": "3"}
    taken = server.apply(CONFIG_MAP, config_map(c="4"), "operator", force=True)
    assert taken["data"] == {"b": "2", "c": "4"}
    assert server.apply(CONFIG_MAP, config_map(), "somebody")["data"] == {"c": "4"}


def test_lists_with_keys_are_shared_by_item(server: Server) -> None:
    def conditions(*kinds: str) -> Json:
        moment = "2026-11-25T00:00:00Z"
        items = [
            {"type": kind, "status": "True", "reason": "Said", "message": "", "lastTransitionTime": moment}
            for kind in kinds
        ]
        head = {"apiVersion": TRAIN_JOB.api_version, "kind": TRAIN_JOB.kind, "metadata": {"name": "one"}}
        return head | {"status": {"conditions": items}}

    server.api.create(TRAIN_JOB, server.namespace, train_job())
    server.apply(TRAIN_JOB, conditions("Running", "Admitted"), "operator", sub="status")
    server.apply(TRAIN_JOB, conditions("Scheduled"), "somebody", sub="status")
    left = server.apply(TRAIN_JOB, conditions("Running"), "operator", sub="status")
    assert {one["type"] for one in left["status"]["conditions"]} == {"Running", "Scheduled"}


def test_what_was_created_is_not_dropped_by_applying(server: Server) -> None:
    """Why the executor takes its fields over before it applies for the first time."""
    query = {"fieldManager": "operator"}
    body = config_map(a="1", b="2")
    server.api._json("POST", CONFIG_MAP.path(server.namespace), query, body)
    assert server.apply(CONFIG_MAP, config_map(a="1"), "operator")["data"] == {"a": "1", "b": "2"}


def test_the_executor_drops_what_it_created_and_leaves_out(server: Server) -> None:
    api, space = server.api, server.namespace
    owner = api.create(TRAIN_JOB, space, train_job("owner"))
    executor = Executor(api, EventRecorder(api, SystemClock(), "test"), Expectations({}))

    def carry_out(child: Json, children: list[Json]) -> Json:
        observed = Observed(owner, {"ConfigMap": children}, 0.0)
        assert executor.carry_out(observed, Decision(apply=[child])).conflicts == set()
        return api.get(CONFIG_MAP, space, "one")

    first = carry_out(config_map(a="1", b="2"), [])
    theirs = {"data": {"theirs": "3"}}
    api._json("PATCH", CONFIG_MAP.path(space, "one"), {"fieldManager": "somebody"}, theirs, _MERGE)
    second = carry_out(config_map(a="1"), [api.get(CONFIG_MAP, space, "one")])
    third = carry_out(config_map(a="1"), [second])
    assert first["data"] == {"a": "1", "b": "2"}
    assert second["data"] == {"a": "1", "theirs": "3"}
    assert third["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


def test_a_job_is_taken_over_without_a_change_of_its_pods(server: Server) -> None:
    api, space = server.api, server.namespace
    owner = api.create(TRAIN_JOB, space, train_job("owner"))
    executor = Executor(api, EventRecorder(api, SystemClock(), "test"), Expectations({}))
    executor.carry_out(Observed(owner, {"Job": []}, 0.0), Decision(apply=[job()]))
    made = api.get(JOB, space, "one")
    # Kueue's doing: not ours to undo.
    api._json("PATCH", JOB.path(space, "one"), {"fieldManager": "kueue"}, {"spec": {"suspend": True}}, _MERGE)
    changed = job()
    changed["metadata"]["labels"] = {"new": "label"}
    there = api.get(JOB, space, "one")
    executor.carry_out(Observed(owner, {"Job": [there]}, 0.0), Decision(apply=[changed]))
    after = api.get(JOB, space, "one")
    assert after["metadata"]["labels"]["new"] == "label"
    assert after["spec"]["suspend"] is True
    assert after["spec"]["template"] == made["spec"]["template"]
    assert prepared(owner, changed)["metadata"]["ownerReferences"] == after["metadata"]["ownerReferences"]


def test_preconditions_stop_what_comes_late(server: Server) -> None:
    api, space = server.api, server.namespace
    made = api.create(CONFIG_MAP, space, config_map(a="1"))
    old, uid = made["metadata"]["resourceVersion"], made["metadata"]["uid"]
    api.merge(CONFIG_MAP, space, "one", {"data": {"a": "2"}})

    def with_metadata(**metadata: str) -> Json:
        body = config_map(a="3")
        body["metadata"] |= metadata
        return body

    conflict = (409, "Conflict")
    another = _placed(with_metadata(uid="another"), space)
    assert refusal(lambda: api.apply(CONFIG_MAP, another)) == (422, "Invalid")
    another["metadata"]["resourceVersion"] = old
    assert refusal(lambda: api.apply(CONFIG_MAP, another)) == conflict
    late = _placed(with_metadata(uid=uid, resourceVersion=old), space)
    assert refusal(lambda: api.apply(CONFIG_MAP, late)) == conflict
    assert (
        refusal(lambda: api.merge(CONFIG_MAP, space, "one", {"metadata": {"resourceVersion": old}}))
        == conflict
    )
    assert refusal(lambda: api.delete(CONFIG_MAP, space, "one", "another", None, "Background")) == conflict
    assert refusal(lambda: api.delete(CONFIG_MAP, space, "one", uid, old, "Background")) == conflict
    assert api.get(CONFIG_MAP, space, "one")["data"] == {"a": "2"}
    now = api.get(CONFIG_MAP, space, "one")["metadata"]["resourceVersion"]
    api.delete(CONFIG_MAP, space, "one", uid, now, "Background")
    assert refusal(lambda: api.get(CONFIG_MAP, space, "one"))[0] == 404
    gone = _placed(with_metadata(uid=uid), space)
    assert refusal(lambda: api.apply(CONFIG_MAP, gone)) == conflict
    assert refusal(lambda: api.delete(CONFIG_MAP, space, "one", uid, None, "Background"))[0] == 404


def _placed(body: Json, namespace: str) -> Json:
    return {**body, "metadata": {**body["metadata"], "namespace": namespace}}


def test_a_lease_is_replaced_by_one_of_two(server: Server) -> None:
    api, space = server.api, server.namespace
    where = {"name": "lease", "namespace": space}
    spec = {"holderIdentity": "one", "leaseDurationSeconds": 15, "renewTime": "2026-11-25T00:00:00.000000Z"}
    body = {"apiVersion": LEASE.api_version, "kind": "Lease", "metadata": where, "spec": spec}
    made = api.create(LEASE, space, body)
    mine, theirs = copy.deepcopy(made), copy.deepcopy(made)
    mine["spec"]["holderIdentity"] = "two"
    assert api.replace(LEASE, mine)["spec"]["holderIdentity"] == "two"
    assert refusal(lambda: api.replace(LEASE, theirs)) == (409, "Conflict")


def test_a_list_is_read_in_pages_of_one_version(server: Server) -> None:
    api, space = server.api, server.namespace
    for number in range(5):
        body = config_map(f"map-{number}")
        body["metadata"]["labels"] = {"parity": "odd" if number % 2 else "even"}
        api.create(CONFIG_MAP, space, body)
    names, versions, token = [], set(), ""
    while True:
        query = {"limit": "2", "labelSelector": "parity"} | ({"continue": token} if token else {})
        query["labelSelector"] = "parity=even"
        page = api._json("GET", CONFIG_MAP.path(space), query)
        if not token:
            api.create(
                CONFIG_MAP,
                space,
                config_map("map-6") | {"metadata": {"name": "map-6", "labels": {"parity": "even"}}},
            )
        names += [one["metadata"]["name"] for one in page["items"]]
        versions.add(page["metadata"]["resourceVersion"])
        token = page["metadata"].get("continue", "")
        if not token:
            break
    assert names == ["map-0", "map-2", "map-4"]
    assert len(versions) == 1
    assert [one["metadata"]["name"] for one in api.list(CONFIG_MAP, space, "parity=odd")[0]] == [
        "map-1",
        "map-3",
    ]


def test_a_watch_tells_what_came_after_a_list(server: Server) -> None:
    api, space = server.api, server.namespace
    _, version = api.list(CONFIG_MAP, space)
    made = api.create(CONFIG_MAP, space, config_map("first"))
    api.merge(CONFIG_MAP, space, "first", {"data": {"a": "1"}, "metadata": {"labels": {"x": "y"}}})
    api.merge(CONFIG_MAP, space, "first", {"metadata": {"labels": {"x": "z"}}})
    api.create(CONFIG_MAP, space, config_map("second"))
    api.delete(CONFIG_MAP, space, "first", made["metadata"]["uid"], None, "Background")
    told = server.events(CONFIG_MAP, version, 5)
    assert told == [
        ("ADDED", "first"),
        ("MODIFIED", "first"),
        ("MODIFIED", "first"),
        ("ADDED", "second"),
        ("DELETED", "first"),
    ]
    # With a selector, coming into it and leaving it are coming and going.
    assert server.events(CONFIG_MAP, version, 2, "x=y") == [("ADDED", "first"), ("DELETED", "first")]
    assert server.events(CONFIG_MAP, made["metadata"]["resourceVersion"], 1) == [("MODIFIED", "first")]


def test_a_watch_from_too_long_ago_is_told_so(server: Server) -> None:
    made = server.api.create(CONFIG_MAP, server.namespace, config_map("one"))
    server.api.create(CONFIG_MAP, server.namespace, config_map("two"))
    server.expire()
    with pytest.raises(ApiError) as caught:
        server.events(CONFIG_MAP, made["metadata"]["resourceVersion"], 1)
    assert caught.value.status == 410


def test_the_pods_of_a_job_cannot_be_changed(server: Server) -> None:
    server.api.create(JOB, server.namespace, job())
    patch = {"spec": {"template": {"spec": {"restartPolicy": "OnFailure"}}}}
    assert refusal(lambda: server.api.merge(JOB, server.namespace, "one", patch)) == (422, "Invalid")


def test_foreground_deletion_leaves_a_mark_first(server: Server) -> None:
    api, space = server.api, server.namespace
    made = api.create(JOB, space, job())
    api.delete(JOB, space, "one", made["metadata"]["uid"], None, "Foreground")
    there = api.get(JOB, space, "one")
    assert there["metadata"]["deletionTimestamp"]
    assert there["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert there["metadata"]["uid"] == made["metadata"]["uid"]
    assert refusal(lambda: api.create(JOB, space, job())) == (409, "AlreadyExists")


def test_the_scale_subresource_changes_the_replicas(server: Server) -> None:
    api, space = server.api, server.namespace
    labels = {"app": "one"}
    template = {
        "metadata": {"labels": labels},
        "spec": job()["spec"]["template"]["spec"] | {"restartPolicy": "Always"},
    }
    spec = {"serviceName": "one", "selector": {"matchLabels": labels}, "template": template, "replicas": 1}
    body = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "one"}, "spec": spec}
    api.create(STATEFUL_SET, space, body)
    path = STATEFUL_SET.path(space, "one", "scale")
    scaled = api._json("PATCH", path, {"fieldManager": "autoscaler"}, {"spec": {"replicas": 3}}, _MERGE)
    assert (scaled["kind"], scaled["spec"]["replicas"]) == ("Scale", 3)
    there = api.get(STATEFUL_SET, space, "one")
    assert (there["spec"]["replicas"], there["metadata"]["generation"]) == (3, 2)


def test_events_of_the_operator_are_accepted_and_made_once(server: Server) -> None:
    api, space = server.api, server.namespace
    owner = api.create(TRAIN_JOB, space, train_job("owner"))
    for identity in ("one", "two"):  # the second knows nothing of the first
        recorder = EventRecorder(api, SystemClock(), identity)
        recorder.record(owner, Event("Restarting", "Attempt 0 failed.", "Warning", "Restart"))
        recorder.record(owner, Event("Restarting", "Attempt 0 failed.", "Warning", "Restart"))
    items, _ = api.list(EVENT, space)
    assert [(one["reason"], one["note"], one["reportingInstance"]) for one in items] == [
        ("Restarting", "Attempt 0 failed.", "one")
    ]
    key = next(iter(recorder._written))
    recorder._written[key] = -1e9, 1
    recorder.record(owner, Event("Restarting", "Attempt 0 failed.", "Warning", "Restart"))
    assert api.list(EVENT, space)[0][0]["series"]["count"] == 2


def test_the_served_apis_are_told(server: Server) -> None:
    assert {"batch/v1", "coordination.k8s.io/v1", TRAIN_JOB.api_version} <= server.api.served()


def test_requests_say_what_they_are_in_json(server: Server) -> None:
    made = server.api.create(CONFIG_MAP, server.namespace, config_map(text="ä\n\"'"))
    assert json.loads(json.dumps(made))["data"]["text"] == "ä\n\"'"
