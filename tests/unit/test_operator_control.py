"""The parts of the operator's core: queue, copies, lease, writes, events, health and permissions."""

import copy
import dataclasses
import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from support import attempts_reconciler, fault_rig, manifests
from support.api_server import ApiServer, DirectTransport
from support.fault_rig import Clock
from unmask_operator import rbac
from unmask_operator.control.api import Api, ApiError, Fenced, Request, Unreachable
from unmask_operator.control.clock import SystemClock
from unmask_operator.control.executor import contains
from unmask_operator.control.health import HealthServer
from unmask_operator.control.lease import Elector
from unmask_operator.control.manager import Manager
from unmask_operator.control.metrics import FAMILIES, Metrics, stalled
from unmask_operator.control.questions import Questions
from unmask_operator.control.reflector import Reflector
from unmask_operator.control.workqueue import TokenBucket, WorkQueue
from unmask_operator.decision import Question
from unmask_operator.reconcilers import RECONCILERS, reconcilers
from unmask_operator.resources import LEASE, RESOURCES

Json = dict[str, Any]
CONFIG_MAP = RESOURCES["ConfigMap"]


# The queue


def queue(clock: Clock) -> WorkQueue[str]:
    return WorkQueue(clock, jitter=lambda: 0.0)


def test_a_key_is_worked_on_once_however_often_it_is_added() -> None:
    line = queue(Clock())
    for _ in range(3):
        line.add("a")
    assert line.take(0.0) == "a"
    assert line.take(0.0) is None


def test_a_key_added_while_it_is_worked_on_comes_again_afterwards() -> None:
    line = queue(Clock())
    line.add("a")
    assert line.take(0.0) == "a"
    line.add("a")
    assert line.take(0.0) is None
    line.done("a")
    assert line.take(0.0) == "a"


def test_failures_double_the_delay_up_to_five_minutes_and_success_ends_it() -> None:
    clock = Clock()
    line = queue(clock)
    delays = [line.retry("a") for _ in range(15)]
    assert delays[:4] == [0.05, 0.1, 0.2, 0.4]
    assert delays[-1] == 300.0
    line.forget("a")
    assert line.retry("a") == 0.05
    assert line.retry("a", at_least=7.0) == 7.0


def test_of_several_delays_the_shortest_holds() -> None:
    clock = Clock()
    line = queue(clock)
    line.add_after("a", 5.0)
    line.add_after("a", 2.0)
    line.add_after("a", 9.0)
    clock.time += 1.9
    assert line.take(0.0) is None
    clock.time += 0.2
    assert line.take(0.0) == "a"
    line.done("a")
    clock.time += 20.0
    assert line.take(0.0) is None


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "done"]), st.sampled_from("abc")), max_size=60))
def test_the_queue_is_a_set_beside_a_set(steps: list[tuple[str, str]]) -> None:
    """Against two sets: what is to be done, and what is being done."""
    line = queue(Clock())
    dirty: set[str] = set()
    processing: set[str] = set()
    for step, key in steps:
        if step == "add":
            line.add(key)
            dirty.add(key)
        elif step == "take":
            taken = line.take(0.0)
            assert (taken is None) == (not dirty - processing)
            if taken is not None:
                assert taken in dirty - processing
                dirty.discard(taken)
                processing.add(taken)
        elif key in processing:
            line.done(key)
            processing.discard(key)
        assert len(line) == len(dirty - processing)


def test_a_bucket_lets_its_burst_through_and_then_its_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(clock, 10.0, 3)
    assert [bucket.reserve() for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bucket.reserve() == pytest.approx(0.1)
    assert bucket.reserve() == pytest.approx(0.2)
    clock.time += 1.0
    assert bucket.reserve() == 0.0


# Copies


def test_one_of_our_kinds_is_worked_on_without_the_definition_of_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = ApiServer()
    undefined = {"diffusiontrainjobs", "diffusioninferenceservices"}

    def refusal(request: Request) -> tuple[int, str, str] | None:
        missing = any(plural in request.path for plural in undefined)
        return (404, "NotFound", "the server could not find the requested resource") if missing else None

    server.refusal = refusal
    manager = Manager(
        DirectTransport(server),
        SystemClock(),
        reconcilers("registry.example/unmask:1"),
        identity="one",
        namespace=None,
        lease_namespace="system",
    )
    people = Api(DirectTransport(server, "people"), SystemClock())

    def until(true: Callable[[], object]) -> None:
        end = time.monotonic() + 120.0
        while not true():
            assert time.monotonic() < end, caplog.text[-3000:]
            time.sleep(0.01)

    def acted_upon(kind: str) -> bool:
        return bool(server.objects(kind)[0].get("status"))

    running = threading.Thread(target=manager.run, daemon=True)
    running.start()
    try:
        until(lambda: all(cache.answered.is_set() for cache in manager.caches.values()))
        assert manager.ready() == "DiffusionTrainJob not listed yet, DiffusionInferenceService not listed yet"
        undefined.remove("diffusioninferenceservices")
        people.create(RESOURCES["DiffusionInferenceService"], "team", manifests.inference_service())
        until(lambda: acted_upon("DiffusionInferenceService"))
        assert (manager.ready(), manager.alive()) == ("", "")
        # Asked for at longer and longer intervals, and found once it is there.
        assert "diffusiontrainjobs: not defined here: apply deploy/crds" in caplog.text
        undefined.clear()
        people.create(RESOURCES["DiffusionTrainJob"], "team", manifests.train_job())
        until(lambda: acted_upon("DiffusionTrainJob"))
    finally:
        manager.stop.set()
        running.join(timeout=60)
    assert not running.is_alive()


class Following:
    def __init__(self) -> None:
        self.server = ApiServer()
        self.clock = Clock()
        self.told: list[str] = []
        self.people = Api(DirectTransport(self.server, "people"), self.clock)
        self.reflector = Reflector(
            self.people,
            CONFIG_MAP,
            self.clock,
            lambda item: self.told.append(item["metadata"]["name"]),
            jitter=lambda: 0.5,
        )

    def make(self, name: str) -> Json:
        return self.people.create(CONFIG_MAP, "team", config_map(name))

    def remove(self, made: Json) -> None:
        metadata = made["metadata"]
        self.people.delete(CONFIG_MAP, "team", metadata["name"], metadata["uid"], None, "Background")

    def same(self) -> bool:
        theirs = {one["metadata"]["name"]: one["metadata"]["uid"] for one in self.server.objects("ConfigMap")}
        return theirs == {one["metadata"]["name"]: one["metadata"]["uid"] for one in self.reflector.all()}


def config_map(name: str) -> Json:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {}}


def test_a_copy_is_listed_once_and_then_watched() -> None:
    world = Following()
    world.make("before")
    world.reflector.step()
    assert world.reflector.synced.is_set()
    made = world.make("after")
    world.reflector.step()
    world.remove(made)
    world.reflector.step()
    assert world.same()
    assert world.told == ["before", "after", "after"]
    assert world.reflector.lists == 1


def test_a_watch_that_expired_is_replaced_by_a_list_that_misses_no_deletion() -> None:
    world = Following()
    gone, replaced = world.make("gone"), world.make("replaced")
    world.reflector.step()
    world.told.clear()
    world.remove(gone)
    world.remove(replaced)
    world.make("replaced")
    world.server.compact()
    assert world.reflector.step() > 0
    world.reflector.step()
    assert world.same()
    assert world.reflector.lists == 2
    assert world.told == ["gone", "replaced", "replaced"]  # the former one went, and another came
    assert world.reflector.by_uid(replaced["metadata"]["uid"]) is None


@pytest.mark.parametrize("gap", ["cut", "repeat"])
def test_broken_and_repeating_watches_lose_and_invent_nothing(gap: str) -> None:
    world = Following()
    world.reflector.step()
    made = [world.make(f"map-{number}") for number in range(4)]
    world.remove(made[0])
    gaps = itertools.chain([gap], itertools.repeat(None))
    world.server.watch_gap = lambda plural: next(gaps)
    world.reflector.step()
    world.reflector.step()
    assert world.same()


def test_a_server_in_trouble_is_asked_less_and_less_often() -> None:
    world = Following()
    world.server.refusal = lambda request: (503, "ServiceUnavailable", "no")
    delays = [world.reflector.step() for _ in range(10)]
    assert delays == sorted(delays)
    assert delays[0] == pytest.approx(0.375)
    assert delays[-1] == pytest.approx(22.5)
    assert not world.reflector.synced.is_set()
    world.clock.time += 500.0
    assert world.reflector.age() == 500.0
    world.server.refusal = lambda request: None
    world.reflector.step()
    assert world.reflector.age() == 0.0


def test_long_lists_are_read_in_pages() -> None:
    world = Following()
    for number in range(1101):
        world.make(f"map-{number}")
    world.reflector.step()
    assert len(world.reflector.all()) == 1101


# The lease


@pytest.fixture
def pair() -> Iterator[tuple[ApiServer, Clock, Elector, Elector]]:
    server, clock = ApiServer(), Clock()

    def elector(name: str) -> Elector:
        api = Api(DirectTransport(server, name), clock)
        return Elector(
            api, clock, namespace="system", name="lease", identity=name, duration=15.0, jitter=lambda: 0.0
        )

    yield server, clock, elector("one"), elector("two")


def test_one_of_two_leads_and_the_other_takes_over_when_it_is_silent(pair: Any) -> None:
    server, clock, one, two = pair
    one.step()
    two.step()
    assert (one.leading(), two.leading()) == (True, False)
    while not two.leading():
        assert not (one.leading() and two.leading())
        clock.time += 1.0
        two.step()
    assert not one.leading()
    with pytest.raises(Fenced):
        one.fence()
    lease = server.objects("Lease")[0]
    assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == ("two", 1)
    one.step()
    assert not one.leading()


def owners(server: ApiServer) -> list[tuple[str, str, str]]:
    references = server.objects("Lease")[0]["metadata"].get("ownerReferences", [])
    return [(one["kind"], one["name"], one["uid"]) for one in references]


def test_the_lease_goes_with_the_operator_s_deployment_whoever_holds_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, clock = ApiServer(collects=False), Clock()
    server.rules = rbac.lease_rules("ours")
    deployment: Json = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "ours"}}

    def leader(name: str) -> Elector:
        clock.time += 2.0
        api = Api(DirectTransport(server, name), clock)
        found = Elector(api, clock, namespace="system", name="ours", identity=name, owner="ours")
        found.step()
        assert found.leading()
        return found

    # None is there, as where an operator runs by hand: it leads all the same, and says what that means.
    leader("by hand").release()
    assert owners(server) == []
    assert "will stay when the deployment ours is gone" in caplog.text

    server.put("Deployment", "system", deployment, uid="first")
    one = leader("one")
    assert owners(server) == [("Deployment", "ours", "first")]
    clock.time += 2.0
    one.step()
    one.release()

    # Another one of that name, before anybody has collected the Lease.
    server.take("Deployment", "system", "ours")
    server.put("Deployment", "system", deployment, uid="second")
    two = leader("two")
    assert owners(server) == [("Deployment", "ours", "second")]
    server.collect()
    assert server.objects("Lease")

    # It is deleted while its pod still runs: what the pod makes anew goes as well.
    server.take("Deployment", "system", "ours")
    server.collect()
    assert server.objects("Lease") == []
    for _ in range(3):
        clock.time += 2.0
        two.step()
    server.collect()
    assert server.objects("Lease") == []


@pytest.mark.parametrize("duration", [1.0, 3.0, 15.0, 60.0])
def test_a_lease_of_any_length_is_renewed_several_times_before_it_runs_out(duration: float) -> None:
    clock = Clock()
    api = Api(DirectTransport(ApiServer(), "one"), clock)
    one = Elector(api, clock, namespace="s", name="l", identity="one", duration=duration, jitter=lambda: 1.0)
    one.step()
    for _ in range(100):
        clock.time += (delay := one.step())
        assert one.leading()
        assert delay <= duration * 2 / 3 / 4, "three renewals may fail"


def test_a_kind_that_need_not_be_there_is_followed_from_when_it_is_served() -> None:
    server, clock = ApiServer(), Clock()
    manager = Manager(
        DirectTransport(server), clock, RECONCILERS, identity="one", namespace=None, lease_namespace="system"
    )
    served = {"batch/v1"}
    manager._served = frozenset(served)
    manager._follow_optional()
    assert "PodGroup" not in manager.caches
    manager._served = frozenset(served | {"scheduling.k8s.io/v1beta1"})
    server.refusal = lambda request: (403, "Forbidden", "no") if "podgroups" in request.path else None
    waits = clock.wait

    def waited(seconds: float, stop: threading.Event) -> bool:  # the watches are in threads of their own
        time.sleep(0.001)
        return waits(seconds, stop)

    clock.wait = waited  # type: ignore[method-assign]
    manager._follow_optional()
    assert "PodGroup" not in manager.caches, "one that may not be listed holds nothing up"
    assert "PodGroup" not in manager.controllers[0]._kinds
    server.refusal = lambda request: None
    while "PodGroup" not in manager.caches:
        manager._follow_optional()
    assert "PodGroup" in manager.controllers[0]._kinds
    manager.stop.set()


def test_whoever_looks_at_a_resource_is_asked_when_it_changes() -> None:
    """Of three resources the first looks at the second, until it does not."""
    one = fault_rig.World(
        dataclasses.replace(
            attempts_reconciler.RECONCILER,
            refers=lambda resource: resource["metadata"].get("labels", {}).get("to", "").split(),
        ),
        lambda ordinal, request: None,
    )
    with one.by_people() as people:
        for name, labels in (("a", {"to": "b"}), ("b", {}), ("c", {})):
            body = copy.deepcopy(fault_rig.TRAIN_JOB)
            body["metadata"] |= {"name": name, "labels": labels}
            people.create(RESOURCES["DiffusionTrainJob"], fault_rig.NAMESPACE, body)
    one.settle("made")
    controller = one.operator.manager.controllers[0]
    seen: list[Any] = []
    decide = controller.reconciler.decide

    def noted(observed: Any) -> Any:
        seen.append((observed.resource["metadata"]["name"], sorted(observed.referred)))
        return decide(observed)

    controller.reconciler = dataclasses.replace(controller.reconciler, decide=noted)

    def touch(name: str, labels: dict[str, str | None]) -> set[Any]:
        seen.clear()
        with one.by_people() as people:
            patch = {"metadata": {"labels": labels}}
            people.merge(RESOURCES["DiffusionTrainJob"], fault_rig.NAMESPACE, name, patch)
        one.settle("touched")
        return {(name, *names) for name, names in seen}

    assert touch("b", {"x": "1"}) == {("b",), ("a", "b")}
    assert touch("c", {"x": "1"}) == {("c",)}
    assert touch("a", {"to": None}) == {("a",)}
    assert touch("b", {"x": "2"}) == {("b",)}
    assert controller._watchers == {}


def test_a_service_changed_by_hand_is_restored_unless_another_version_made_it() -> None:
    one = fault_rig.World(fault_rig.TRAINING, lambda ordinal, request: None)

    def edit(patch: Json) -> Json:
        with one.by_people() as people:
            people.merge(RESOURCES["Service"], fault_rig.NAMESPACE, "mini-a0", patch)
        one.settle("edited")
        (service,) = one.server.objects("Service")
        return dict(service["spec"]["selector"])

    with one.by_people() as people:
        people.create(RESOURCES["DiffusionTrainJob"], fault_rig.NAMESPACE, copy.deepcopy(fault_rig.TRAIN_JOB))
    one.settle("made")
    selector = one.server.objects("Service")[0]["spec"]["selector"]
    another = {"spec": {"selector": {"unmask.dev/job": "another"}}}
    assert edit(another) == selector
    made_by_another = {"metadata": {"annotations": {"unmask.dev/applied": "made otherwise"}}}
    assert edit(another | made_by_another)["unmask.dev/job"] == "another"


def test_a_lease_that_is_let_go_is_taken_at_once(pair: Any) -> None:
    _, clock, one, two = pair
    one.step()
    one.release()
    assert not one.leading()
    clock.time += 1.0
    two.step()
    assert two.leading()


def test_renewals_that_fail_end_the_lead_before_others_may_begin(pair: Any) -> None:
    server, clock, one, two = pair
    one.step()
    two.step()
    began = clock.time
    server.refusal = lambda request: (500, "InternalError", "no") if request.method == "PUT" else None
    while one.leading():
        one.step()
        clock.time += 1.0
    assert clock.time - began == 10.0  # of the lease's 15 seconds


def test_clocks_that_are_set_differently_do_no_harm(pair: Any) -> None:
    server, clock, one, two = pair
    two._clock = ahead = Clock()
    ahead.now = lambda: 9e9  # type: ignore[method-assign]
    ahead.time = clock.time + 12_345.0
    one.step()
    for _ in range(30):
        clock.time += 1.0
        ahead.time += 1.0
        one.step()
        two.step()
        assert (one.leading(), two.leading()) == (True, False)


def test_a_write_is_not_sent_without_the_lease(pair: Any) -> None:
    server, clock, one, _ = pair
    api = Api(DirectTransport(server, "one"), clock, fence=one.fence)
    with pytest.raises(Fenced):
        api.create(CONFIG_MAP, "team", config_map("a"))
    assert api.list(CONFIG_MAP, "team")[0] == []
    one.step()
    api.create(CONFIG_MAP, "team", config_map("a"))


# Writes


@pytest.mark.parametrize(
    ("there", "desired", "expected"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 2}}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": [1, 2]}, {"a": [1]}, False),
        ({"a": [{"x": 1, "y": 2}]}, {"a": [{"x": 1}]}, True),
        ({"a": 1}, {"a": 1, "b": None}, True),
        ({"a": 1, "b": 2}, {"a": 1, "b": None}, False),
        ({}, {"a": {}}, False),
    ],
)
def test_what_is_so_already_is_recognised(there: Json, desired: Json, expected: bool) -> None:
    assert contains(there, desired) is expected


def world() -> fault_rig.World:
    return fault_rig.World(attempts_reconciler.RECONCILER, lambda ordinal, request: None)


def begin(one: fault_rig.World) -> None:
    with one.by_people() as people:
        fault_rig.CHAPTERS["made"](one, people)
    one.settle("made")
    assert not one.life.stuck


def test_a_namesake_of_somebody_else_is_left_alone_until_it_goes() -> None:
    one = world()
    with one.by_people() as people:
        theirs = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "mini"},
            "spec": {"theirs": True},
        }
        made = people.create(RESOURCES["Service"], fault_rig.NAMESPACE, theirs)
        fault_rig.CHAPTERS["made"](one, people)
    for _ in range(20):
        one.operator.turn()
        one.clock.time += 1.0
    assert one.server.objects("DiffusionTrainJob")[0]["status"]["state"] == "NameConflict"
    assert one.server.objects("Service") == [made]
    assert one.server.objects("Event")[0]["reason"] == "NameConflict"
    with one.by_people() as people:
        people.delete(
            RESOURCES["Service"], fault_rig.NAMESPACE, "mini", made["metadata"]["uid"], None, "Background"
        )
    for _ in range(600):
        one.operator.turn()
        one.clock.time += 1.0
    assert one.server.objects("DiffusionTrainJob")[0]["status"]["state"] == "Running"
    assert "theirs" not in one.server.objects("Service")[0]["spec"]


def test_a_refusal_is_told_and_tried_again() -> None:
    one = world()

    def quota(request: Request) -> tuple[int, str, str] | None:
        over = request.method == "POST" and request.path.endswith("/jobs")
        return (403, "Forbidden", "exceeded quota: gpus") if over else None

    one.server.refusal = quota
    with one.by_people() as people:
        fault_rig.CHAPTERS["made"](one, people)
    for _ in range(20):
        one.operator.turn()
        one.clock.time += 1.0
    assert one.server.objects("DiffusionTrainJob")[0]["status"]["state"] == "Blocked"
    assert "exceeded quota" in one.server.objects("Event")[0]["note"]
    one.server.refusal = lambda request: None
    for _ in range(600):
        one.operator.turn()
        one.clock.time += 1.0
    assert one.server.objects("DiffusionTrainJob")[0]["status"]["state"] == "Running"
    assert len(one.server.objects("Job")) == 1


def test_one_resource_that_cannot_be_decided_about_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    one = world()
    good = {**fault_rig.TRAIN_JOB, "metadata": {"name": "good", "namespace": fault_rig.NAMESPACE}}
    bad = {**good, "metadata": {"name": "bad", "namespace": fault_rig.NAMESPACE}}
    with one.by_people() as people:
        for body in (bad, good):
            people.create(RESOURCES["DiffusionTrainJob"], fault_rig.NAMESPACE, body)
    # What no schema lets through: the decision about it raises.
    store = one.server.store("DiffusionTrainJob")
    store.objects[fault_rig.NAMESPACE, "bad"]["spec"] = {}
    for _ in range(10):
        one.operator.turn()
        one.clock.time += 1.0
    assert [job["metadata"]["name"] for job in one.server.objects("Job")] == ["good-a0"]
    assert "unmask_operator_reconcile_total" in one.operator.manager.metrics.exposition().decode()
    assert 'result="broken"' in one.operator.manager.metrics.exposition().decode()


def test_too_many_requests_are_answered_by_waiting() -> None:
    one = world()
    times: list[float] = []

    def busy(ordinal: int, request: Request) -> str | None:
        if "/leases" not in request.path:
            times.append(one.clock.time)
            return "429" if len(times) < 4 else None
        return None

    begin_at = one.server
    begin_at.fault = busy
    with one.by_people() as people:
        store = begin_at.fault
        begin_at.fault = lambda ordinal, request: None
        fault_rig.CHAPTERS["made"](one, people)
        begin_at.fault = store
    for _ in range(40):
        one.operator.turn()
        one.clock.time += 0.25
    assert min(later - sooner for sooner, later in itertools.pairwise(times[:4])) >= 1.0
    assert len(one.server.objects("Job")) == 1


# Health


def test_the_metrics_are_those_of_their_table() -> None:
    one = world()
    with one.by_people() as people:
        fault_rig.CHAPTERS["made"](one, people)
    one.settle("made")
    conditions = [{"type": "Stalled", "status": "True", "reason": "Refused"}]
    one.server.set_status("DiffusionTrainJob", fault_rig.NAMESPACE, "mini", {"conditions": conditions})
    one.settle("stalled")
    found = {}
    for family in text_string_to_metric_families(one.operator.manager.metrics.exposition().decode()):
        if family.name.endswith("_created"):  # when a counter was begun
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels, family.documentation)
    assert found == {name: (known.kind, set(known.labels), known.help) for name, known in FAMILIES.items()}


def test_resources_that_somebody_must_see_to_are_counted_by_reason() -> None:
    def resource(**conditions: str) -> Json:
        told = [
            {"type": kind, "status": said.split()[0], "reason": said.split()[1]}
            for kind, said in conditions.items()
        ]
        return {"status": {"conditions": told}}

    late = "False ProgressDeadlineExceeded"
    found = stalled(
        "Kind",
        [
            {},
            {"status": {}},
            resource(Stalled="False Following", Progressing="True Changing"),
            resource(Stalled="False Following", Progressing="False Settled"),
            resource(Stalled="True Refused"),
            resource(Stalled="True Refused", Progressing=late),
            resource(Stalled="False Following", Progressing=late),
            resource(Stalled="True InvalidSpec", Suspended="False Resumed"),
            resource(Stalled="True InvalidSpec", Suspended="True Suspended"),
        ],
    )
    name = "unmask_operator_stalled_resources"
    assert found == [
        (name, {"kind": "Kind", "reason": "InvalidSpec"}, 1.0),
        (name, {"kind": "Kind", "reason": "ProgressDeadlineExceeded"}, 1.0),
        (name, {"kind": "Kind", "reason": "Refused"}, 2.0),
    ]


def test_health_is_served_within_limits() -> None:
    wrong = {"alive": "", "ready": "Job not listed yet"}
    metrics = Metrics()
    metrics.wrote("create", "Job")
    server = HealthServer(
        "127.0.0.1",
        0,
        alive=lambda: wrong["alive"],
        ready=lambda: wrong["ready"],
        metrics=metrics.exposition,
    )
    server.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(address + path, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    try:
        assert get("/healthz") == (200, "ok\n")
        assert get("/readyz") == (503, "Job not listed yet\n")
        assert 'unmask_operator_writes_total{kind="Job",verb="create"} 1.0' in get("/metrics")[1]
        assert get("/else")[0] == 404
    finally:
        server.shutdown()
        server.server_close()


# Questions


def test_pods_are_asked_for_short_answers() -> None:
    class Pod(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", "/progress")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * (10 if self.path == "/progress" else 100_000))

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pod)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    questions = Questions(Clock())
    try:
        for uid, address in {
            "short": f"http://127.0.0.1:{port}/progress",
            "long": f"http://127.0.0.1:{port}/long",
            "elsewhere": f"http://127.0.0.1:{port}/elsewhere",
            "name": f"http://localhost:{port}/progress",
            "file": "file:///etc/hostname",
            "nobody": "http://127.0.0.1:1/progress",
        }.items():
            questions.ask([Question(uid, address)])
    finally:
        server.shutdown()
        server.server_close()
    answers = questions.answers()
    assert {uid: len(one.text) for uid, one in answers.items()} == {"short": 10, "long": 4096}
    assert answers["short"].at == Clock().now()


# Permissions


def test_no_permission_is_missing_and_none_is_unused() -> None:
    """A whole life under the rules that are generated; then the rules against what was asked for."""
    one = world()
    reconcilers = [attempts_reconciler.RECONCILER]
    one.server.rules = rbac.rules(reconcilers) + rbac.lease_rules()
    one.server.seen.clear()
    used: set[tuple[str, str, str]] = set()
    # What people do is not the operator's.
    real = one.server._allow

    def allow(verb: str, resource: Any, subresource: str, namespace: str, name: str) -> None:
        if one._by_people:
            return
        used.add((verb, resource.group, resource.plural + (f"/{subresource}" if subresource else "")))
        real(verb, resource, subresource, namespace, name)

    one.server._allow = allow  # type: ignore[method-assign]
    life = one.live()
    assert not life.stuck
    granted = {
        (verb, group, resource)
        for rule in one.server.rules
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert used <= granted
    own = RESOURCES["DiffusionTrainJob"]
    # This life meets no end of a time to live, no namesake and no event an hour old.
    unmet = {("delete", own.group, own.plural), ("patch", "events.k8s.io", "events")}
    unmet |= {("get", "batch", "jobs"), ("patch", "batch", "jobs")}
    assert granted - used <= unmet


def test_the_permissions_hold_no_secrets_and_no_wildcards() -> None:
    text = json.dumps(rbac.manifests(RECONCILERS, None))
    for word in ("secrets", "exec", '"*"', "escalate", "impersonate", "nodes"):
        assert word not in text


@pytest.mark.parametrize(("name", "role"), [("operator", "ClusterRole"), ("operator-namespaced", "Role")])
def test_the_permissions_are_in_the_tree(name: str, role: str) -> None:
    path = Path(__file__).parents[2] / f"deploy/rbac/{name}.yaml"
    kinds = [one["kind"] for one in yaml.safe_load_all(path.read_text())]
    assert kinds == ["ServiceAccount", role, f"{role}Binding", "Role", "RoleBinding"]


# Errors


def test_an_answer_that_is_no_json_counts_as_none() -> None:
    class Broken(DirectTransport):
        def send(self, request: Request) -> Any:
            reply = super().send(request)
            return type(reply)(reply.status, reply.headers, reply.body[:-5])

    api = Api(Broken(ApiServer()), Clock())
    with pytest.raises(Unreachable):
        api.list(CONFIG_MAP, "team")
    with pytest.raises(ApiError) as caught:
        api.get(LEASE, "team", "none")
    assert caught.value.status == 404
