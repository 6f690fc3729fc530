"""A fault at every write of an operator, and the same end each time.

A life of a custom resource (made, its Job fails, its spec is edited, its Job completes, it is deleted and
made again under the same name, deleted) is run once without faults. Then it is run again and again, each time
with one fault at one write. After each chapter the objects have to be the same, and at the end so have the
writes that changed something, counted for each object. Then the operator is asked again about everything, and
must write nothing.

Nothing here waits: time is a number, watches tell what there is to tell and end, and everything happens in
one thread. `python -m support.fault_rig` (as `make test-faults` calls it) prints a line for each that differs
and ends with `faults: N/N identical, planted: P/P caught`.
"""

import contextlib
import copy
import json
import logging
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from support import attempts_reconciler, counts, inference_life, manifests
from support.api_server import FAULTS, ApiServer, Crash, DirectTransport
from unmask_operator import serving, training
from unmask_operator.control import controller, executor, reflector, workqueue
from unmask_operator.control.api import Api, ApiError, Reply, Request, Unreachable
from unmask_operator.control.manager import Manager
from unmask_operator.decision import Decision, Observed, Reconciler
from unmask_operator.rbac import SYSTEM_NAMESPACE
from unmask_operator.resources import MANAGER, RESOURCES

Json = dict[str, Any]

NAMESPACE = "team"
_ROUNDS = 400
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.time = 1_000.0

    def now(self) -> float:
        return 1_800_000_000.0 + self.time

    def steady(self) -> float:
        return self.time

    def wait(self, seconds: float, stop: threading.Event) -> bool:
        self.time += max(0.0, seconds)
        return stop.is_set()


class Operator:
    """One operator process, worked by hand."""

    def __init__(self, server: ApiServer, clock: Clock, reconciler: Reconciler, name: str) -> None:
        self.clock = clock
        self.name = name
        self.transport = Transport(server, name)
        self.manager = Manager(
            self.transport,
            clock,
            [reconciler],
            identity=name,
            namespace=None,
            lease_namespace=SYSTEM_NAMESPACE,
            lease_owner=MANAGER,
            rate=10_000.0,
            burst=10_000,
            jitter=lambda: 0.5,
        )
        self._due = dict.fromkeys(self.manager.caches, 0.0)
        self._lease_due = 0.0

    @property
    def queue(self) -> workqueue.WorkQueue[controller.Key]:
        return self.manager.controllers[0].queue

    def turn(self) -> None:
        """Do everything that is due."""
        if self.clock.time >= self._lease_due:
            self._lease_due = self.clock.time + self.manager.elector.step()
        for kind, cache in self.manager.caches.items():
            if self.clock.time >= self._due[kind]:
                delay = cache.step()
                # A watch that ends at once is the rig's doing; only failures are waited for.
                self._due[kind] = self.clock.time + (delay if cache._failures else 0.0)
        if self.manager.elector.leading() and all(
            one.synced.is_set() for one in self.manager.caches.values()
        ):
            for _ in range(50):
                if not self.manager.controllers[0].work(timeout=0.0):
                    break

    def poke(self) -> None:
        """Ask about everything, as a restart would."""
        for item in self.manager.caches[self.manager.controllers[0].reconciler.kind].all():
            self.queue.add((item["metadata"]["namespace"], item["metadata"]["name"]))

    def quiet(self, server: ApiServer) -> bool:
        return (
            not len(self.queue)
            and not self.queue._failures
            and all(one.synced.is_set() for one in self.manager.caches.values())
            and all(one.has_seen(server.version) for one in self.manager.caches.values())
            and not any(one._failures for one in self.manager.caches.values())
        )


class Transport(DirectTransport):
    """Requests without sockets, with a hook right before each write is delivered."""

    def __init__(self, server: ApiServer, user: str) -> None:
        super().__init__(server, user)
        self.before: Callable[[Request], None] = lambda request: None
        self.refused: Counter[int] = Counter()

    def send(self, request: Request) -> Reply:
        if request.method != "GET" and "/leases" not in request.path:
            self.before(request)
        reply = super().send(request)
        if request.method != "GET" and reply.status >= 400 and b"planned" not in reply.body:
            self.refused[reply.status] += 1
        return reply


@dataclass
class Life:
    """What there was to see of one run."""

    chapters: list[Json] = field(default_factory=list)
    writes: Counter[tuple[str, ...]] = field(default_factory=Counter)
    requests: int = 0
    """Writes that were asked for, those of the lease aside."""
    late: int = 0
    """Writes asked for after everything was as it should be."""
    refused: int = 0
    """Writes that the server refused though no fault said so."""
    stuck: str = ""
    """The chapter that did not come to an end."""

    def differs(self, other: "Life", *, refusals: bool) -> str:
        """Return in what it differs from another, or nothing."""
        if self.stuck:
            return f"chapter {self.stuck} does not end"
        for place, (mine, theirs) in enumerate(zip(self.chapters, other.chapters, strict=True)):
            for key in sorted({*mine, *theirs}):
                if mine.get(key) != theirs.get(key):
                    return f"chapter {place}: {key} differs"
        if self.writes != other.writes:
            return f"writes differ: {dict(self.writes - other.writes)}, {dict(other.writes - self.writes)}"
        if self.late:
            return f"{self.late} writes when all was done"
        if refusals and self.refused > other.refused:
            return f"{self.refused - other.refused} writes refused"
        return ""


class World:
    """A server, a clock, operators, and the life of a resource."""

    def __init__(self, reconciler: Reconciler, plan: Callable[[int, Request], str | None]) -> None:
        self.server = ApiServer()
        self.clock = Clock()
        self.server.now = self.clock.now
        deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": MANAGER}}
        self.server.put("Deployment", SYSTEM_NAMESPACE, deployment)
        self.reconciler = reconciler
        services = reconciler.kind == inference_life.KIND
        self.chapters = inference_life.CHAPTERS if services else CHAPTERS
        self.controllers = inference_life.Controllers(self.server) if services else None
        self.life = Life()
        self._plan = plan
        self._asked = 0
        self._starts = 0
        self._frozen = 0
        self.server.fault = self._fault
        self.people = Api(DirectTransport(self.server, "people"), self.clock)
        self.operator = self.start()

    def start(self) -> Operator:
        self._starts += 1
        return Operator(self.server, self.clock, self.reconciler, f"operator-{self._starts}")

    def _fault(self, ordinal: int, request: Request) -> str | None:
        if "/leases" in request.path or self._by_people:
            return None
        self._asked += 1
        return self._plan(self._asked, request)

    _by_people = False

    @contextlib.contextmanager
    def by_people(self) -> Iterator[Api]:
        self._by_people = True
        try:
            yield self.people
        finally:
            self._by_people = False

    def settle(self, chapter: str) -> None:
        """Let the operator work until it has nothing to do."""
        calm = 0
        for _ in range(_ROUNDS):
            before = self._asked
            try:
                self.operator.turn()
            except Crash:
                self.operator = self.start()
                continue
            if self.server.frozen is not None:
                # The copies stand still while the operator is asked again and again.
                self._frozen += 1
                self.operator.poke()
                if self._frozen >= 4:
                    self.server.frozen, self._frozen = None, 0
            idle = self._asked == before and self.operator.quiet(self.server) and self.server.frozen is None
            calm = calm + 1 if idle else 0
            if calm >= 3:
                # Others act only where the operator waits for them, so that all lives go the same way.
                if self.controllers is None or not self.controllers.act():
                    return
                calm = 0
            self.clock.time += 1.0
        self.life.stuck = self.life.stuck or chapter

    def chapter(self, name: str) -> None:
        self.settle(name)
        self.life.chapters.append(snapshot(self.server))

    def live(self) -> Life:
        for name, change in self.chapters.items():
            with self.by_people() as people:
                change(self, people)
            self.chapter(name)
            if self.life.stuck:
                break
        self.life.requests = self._asked
        for _ in range(3):
            self.operator.poke()
            with contextlib.suppress(Crash):
                self.operator.turn()
        self.life.late = self._asked - self.life.requests
        self.life.refused = sum(self.operator.transport.refused.values())
        self.life.writes = Counter(
            # Names of events are made from UIDs.
            (one.verb, one.resource, one.namespace, "" if one.resource == "events" else one.name)
            for one in self.server.writes
            if one.user not in ("people", "") and one.resource != "leases"
        )
        return self.life

    def job_status(self, condition: str) -> None:
        """Be the Job controller: end the Job that there is."""
        for job in self.server.objects("Job"):
            if "deletionTimestamp" not in job["metadata"]:
                where = job["metadata"]
                conditions = [{"type": condition, "status": "True"}]
                self.server.set_status("Job", where["namespace"], where["name"], {"conditions": conditions})


TRAINING = training.reconciler(training.Settings(image="registry.example/unmask:1"))
"""The operator's own; a smaller one of the same shape is what bugs are planted in."""
SERVING = serving.reconciler(serving.Settings(image="registry.example/unmask:1"))
"""The operator's other one, with a life of its own."""
TRAIN_JOB: Json = manifests.train_job(runPolicy={"maxRestarts": 3, "restartBackoffSeconds": 1}) | {
    "metadata": {"name": "mini", "namespace": NAMESPACE}
}


def _make(world: World, people: Api) -> None:
    people.create(RESOURCES["DiffusionTrainJob"], NAMESPACE, copy.deepcopy(TRAIN_JOB))


def _fail(world: World, people: Api) -> None:
    world.job_status("Failed")


def _edit(world: World, people: Api) -> None:
    patch = {"spec": {"runPolicy": {"maxRestarts": 5}}}
    people.merge(RESOURCES["DiffusionTrainJob"], NAMESPACE, "mini", patch)


def _hand(world: World, people: Api) -> None:
    """Somebody edits one child and deletes another."""
    service = world.server.objects("Service")[0]["metadata"]["name"]
    people.merge(
        RESOURCES["Service"], NAMESPACE, service, {"spec": {"selector": {"unmask.dev/job": "another"}}}
    )
    _remove(people, "ConfigMap", world.server.objects("ConfigMap")[0]["metadata"]["name"])


def _complete(world: World, people: Api) -> None:
    world.job_status("Complete")


def _again(world: World, people: Api) -> None:
    """Deleted and made again at once; what the former one owned is still there."""
    world.server.collects = False
    _remove(people, "DiffusionTrainJob", "mini")
    _make(world, people)
    with contextlib.suppress(Crash):
        for _ in range(3):
            world.clock.time += 1.0
            world._by_people = False
            world.operator.turn()
    world.server.collects = True
    world.server.collect()


def _end(world: World, people: Api) -> None:
    _remove(people, "DiffusionTrainJob", "mini")


def _remove(people: Api, kind: str, name: str) -> None:
    there = people.get(RESOURCES[kind], NAMESPACE, name)
    people.delete(RESOURCES[kind], NAMESPACE, name, there["metadata"]["uid"], None, "Background")


CHAPTERS: dict[str, Callable[[World, Api], None]] = {
    "made": _make,
    "failed": _fail,
    "edited": _edit,
    "by hand": _hand,
    "failed again": _fail,
    "complete": _complete,
    "made again": _again,
    "failed anew": _fail,
    "deleted": _end,
}


def snapshot(server: ApiServer) -> Json:
    """Return all objects but leases, without what differs between runs that went the same way."""
    names: dict[str, str] = {}
    found: Json = {}
    for kind in (*RESOURCES, "Event"):
        for item in server.objects(kind):
            names[item["metadata"]["uid"]] = f"uid of {kind} {item['metadata']['name']}"
            found[f"{kind} {item['metadata']['name']}"] = item
    events: Counter[str] = Counter()
    result: Json = {}
    for key, item in found.items():
        if item["kind"] == "Event":
            # Names of events are made from UIDs; what they say counts.
            regarding = names.get(item["regarding"]["uid"], "somebody gone")
            events[f"{regarding}: {item['type']} {item['reason']}: {item['note']}"] += 1
            continue
        for gone in ("resourceVersion", "creationTimestamp", "managedFields"):
            item["metadata"].pop(gone, None)
        text = json.dumps(item, sort_keys=True)
        for uid, name in names.items():
            # An attempt's meeting is named by the first part of the UID.
            text = text.replace(uid, name).replace(uid[:8], name)
        # The digest of what was applied covers the owner's UID.
        text = re.sub(r'("unmask.dev/applied": )"[0-9a-f]+"', r'\1"digest"', text)
        result[key] = _STAMP.sub("time", text)
    return result | {"events": dict(sorted(events.items()))}


def run(reconciler: Reconciler, plan: Callable[[int, Request], str | None]) -> Life:
    """Run a life with the faults that ``plan`` names for the n-th write."""
    return World(reconciler, plan).live()


def calm(reconciler: Reconciler) -> Life:
    """Run a life without faults."""
    return run(reconciler, lambda ordinal, request: None)


def single(place: int, fault: str) -> Callable[[int, Request], str | None]:
    """Return the plan of one fault at one write."""
    return lambda ordinal, request: fault if ordinal == place else None


def double(first: tuple[int, str], second: tuple[int, str]) -> Callable[[int, Request], str | None]:
    """Return the plan of two faults; the second counts the writes of the repair, too."""
    faults = dict((first, second))
    return lambda ordinal, request: faults.get(ordinal)


def plans(writes: int, number: int) -> list[tuple[str, Callable[[int, Request], str | None], bool]]:
    """Return ``number`` plans: every fault at every write as far as they go, then pairs drawn with a fixed
    seed."""
    singles = [(place, fault) for place in range(1, writes + 1) for fault in FAULTS]
    order = random.Random(20_261_125)
    if number < len(singles):
        # Every fault and every write is among them: they take turns along the diagonals.
        singles = sorted(singles, key=lambda one: ((one[0] + FAULTS.index(one[1])) % len(FAULTS), one[0]))[
            :number
        ]
    found = [
        (f"{fault} at write {place}", single(place, fault), fault == "stale cache")
        for place, fault in singles
    ]
    while len(found) < number:
        first, second = sorted(order.randrange(1, writes + 1) for _ in range(2))
        if first == second:
            continue
        one, other = order.choice(FAULTS), order.choice(FAULTS)
        name = f"{one} at write {first} and {other} at {second}"
        found.append((name, double((first, one), (second, other)), False))
    return found


def differing(
    reconciler: Reconciler, number: int, *, first_only: bool = False, reference: Life | None = None
) -> tuple[int, list[str]]:
    """Run ``number`` plans; return how many were run and what differed from a calm life."""
    reference = reference or calm(reconciler)
    if reference.stuck or reference.late:
        return 1, [f"without a fault: {reference.stuck or 'writes when all was done'}"]
    wrong = []
    chosen = plans(reference.requests, number)
    for name, plan, refusals in chosen:
        difference = run(reconciler, plan).differs(reference, refusals=refusals)
        if difference:
            wrong.append(f"{name}: {difference}")
            if first_only:
                break
    return len(chosen), wrong


# Two leaders


def pauses(
    reconciler: Reconciler, number: int, *, first_only: bool = False, reference: Life | None = None
) -> tuple[int, list[str]]:
    """Stop the leader at a write until another has taken over and finished, then let it go on.

    Half of the pauses are before the look at the lease, half between that and the sending; in between the
    spec is edited, so that what the former leader was about to write is out of date. Returns how many there
    were and what went wrong: another end, or a write of the former leader that changed something after the
    new one's first.
    """
    reference = reference or calm(reconciler)
    wrong: list[str] = []
    done = 0
    for turn in range(number):
        if wrong and first_only:
            break
        place, looked = 1 + (turn // 2) % reference.requests, bool(turn % 2)
        problem = _pause(reconciler, reference, place, looked)
        done += 1
        if problem:
            wrong.append(
                f"leader paused at write {place}, {'after' if looked else 'before'} its look: {problem}"
            )
    return done, wrong


def _pause(reconciler: Reconciler, reference: Life, place: int, looked: bool) -> str:
    world = World(reconciler, lambda ordinal, request: None)
    old = world.operator
    asked = 0
    marks: list[int] = []

    def stand_still() -> None:
        nonlocal asked
        asked += 1
        if asked != place or world.operator is not old:
            return
        world.clock.time += 20.0
        world.operator = world.start()
        world.settle("taken over")
        marks.append(len(world.server.writes))

    if looked:
        old.transport.before = lambda request: stand_still()
    else:
        fence = old.manager.elector.fence

        def slow_fence() -> None:
            stand_still()
            fence()

        old.manager._api._fence = slow_fence
    settle = world.settle

    def both(chapter: str) -> None:
        current = world.operator
        settle(chapter)
        if marks and current is old:
            # The former leader, where its thread went on.
            world.operator, new = old, world.operator
            for _ in range(3):
                with contextlib.suppress(Crash):
                    old.turn()
            world.operator = new
            settle(chapter)

    world.settle = both  # type: ignore[method-assign]
    life = world.live()
    if marks:
        late = [
            one
            for one in world.server.writes[marks[0] :]
            if one.user == old.name and one.resource != "leases"
        ]
        if late:
            return f"the former leader wrote {late[0].verb} {late[0].resource} {late[0].name}"
    return life.differs(reference, refusals=False)


# Planted bugs


def _plant_status_before_work() -> contextlib.AbstractContextManager[Any]:
    real = attempts_reconciler.decide

    def decide(observed: Observed) -> Decision:
        decision = real(observed)
        old = observed.resource.get("status") or {}
        if old.get("state") == "Running" and not old.get("restarts"):
            # "It runs, so its configuration must be there."
            kept = [one for one in decision.apply if one["kind"] != "ConfigMap"]
            return Decision(kept, decision.delete, decision.status, decision.requeue_after, decision.events)
        return decision

    return _decides(decide)


def _plant_budget_in_memory() -> contextlib.AbstractContextManager[Any]:
    spent: Counter[str] = Counter()
    real = attempts_reconciler.decide

    def decide(observed: Observed) -> Decision:
        decision = real(observed)
        if decision.status is not None and decision.status.get("state") == "Restarting":
            uid = observed.resource["metadata"]["uid"]
            if not (observed.resource.get("status") or {}).get("state") == "Restarting":
                spent[uid] += 1
            decision.status["restarts"] = spent[uid]
        return decision

    return _decides(decide)


def _plant_identity_by_name() -> contextlib.AbstractContextManager[Any]:
    def owned_by(self: reflector.Reflector, uid: str) -> list[Json]:
        return [
            one
            for one in self.all()
            if any(owner["name"] == "mini" for owner in one["metadata"].get("ownerReferences") or ())
        ]

    return mock.patch.object(reflector.Reflector, "owned_by", owned_by)


def _plant_no_preconditions() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(executor, "_identity", lambda there: {"name": there["metadata"]["name"]})


def _plant_ignores_410() -> contextlib.AbstractContextManager[Any]:
    real = reflector.Reflector.step

    def step(self: reflector.Reflector) -> float:
        version = self._version
        delay = real(self)
        if self._version is None and version is not None:
            self._version = version
        return delay

    return mock.patch.object(reflector.Reflector, "step", step)


def _plant_conflict_is_success() -> contextlib.AbstractContextManager[Any]:
    real = Api._json

    def _json(self: Api, method: Any, *arguments: Any) -> Json:
        try:
            return real(self, method, *arguments)
        except ApiError as error:
            if error.reason != "Conflict":
                raise
            return {"metadata": {"resourceVersion": "0"}}

    return mock.patch.object(Api, "_json", _json)


def _plant_generated_names() -> contextlib.AbstractContextManager[Any]:
    real = Api.create

    def create(self: Api, resource: Any, namespace: str | None, body: Json) -> Json:
        if resource.kind == "ConfigMap":
            name = body["metadata"]["name"]
            body = {**body, "metadata": {**body["metadata"], "generateName": f"{name}-"}}
            del body["metadata"]["name"]
        return real(self, resource, namespace, body)

    find = executor._find

    def by_prefix(observed: Observed, kind: str, name: str) -> Json | None:
        if kind == "ConfigMap":
            found = observed.children[kind]
            return next((one for one in found if one["metadata"]["name"].startswith(name)), None)
        return find(observed, kind, name)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(Api, "create", create))
    stack.enter_context(mock.patch.object(executor, "_find", by_prefix))
    stack.enter_context(mock.patch.object(executor.Executor, "_update", lambda *arguments: None))
    return stack


def _plant_never_tries_again() -> contextlib.AbstractContextManager[Any]:
    def retry(self: Any, key: Any, at_least: float = 0.0) -> float:
        return 0.0

    return mock.patch.object(workqueue.WorkQueue, "retry", retry)


def _plant_no_barrier() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(executor.Expectations, "met", lambda self, owner: True)


def _plant_skips_ahead() -> contextlib.AbstractContextManager[Any]:
    real = reflector.Reflector._watch

    def _watch(self: reflector.Reflector) -> None:
        try:
            real(self)
        except Unreachable:
            transport: Any = self._api._transport
            self._version = str(transport.server.version)
            self._seen = int(self._version)
            raise

    return mock.patch.object(reflector.Reflector, "_watch", _watch)


@contextlib.contextmanager
def _decides(decide: Callable[[Observed], Decision]) -> Iterator[None]:
    reconciler = attempts_reconciler.RECONCILER
    planted = Reconciler(reconciler.kind, reconciler.owns, decide, reconciler.reads)
    with mock.patch.object(attempts_reconciler, "RECONCILER", planted):
        yield


PLANTED: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "takes the status for the work": _plant_status_before_work,
    "keeps the count of restarts in memory": _plant_budget_in_memory,
    "takes whoever has the name for its own": _plant_identity_by_name,
    "writes without preconditions": _plant_no_preconditions,
    "goes on watching what is forgotten": _plant_ignores_410,
    "takes a conflict for success": _plant_conflict_is_success,
    "lets the server choose names": _plant_generated_names,
    "never tries again": _plant_never_tries_again,
    "acts on copies older than its writes": _plant_no_barrier,
    "skips what a broken watch did not tell": _plant_skips_ahead,
}
_SHOWS_IN_PAUSES = {"writes without preconditions"}


def caught(name: str) -> str:
    """Return how a planted bug shows against a calm life without it, or nothing."""
    reference = calm(attempts_reconciler.RECONCILER)
    assert not reference.stuck
    with PLANTED[name]():
        reconciler = attempts_reconciler.RECONCILER
        if name in _SHOWS_IN_PAUSES:
            number = 2 * reference.requests
            wrong = pauses(reconciler, number, first_only=True, reference=reference)[1]
        else:
            number = len(FAULTS) * reference.requests
            wrong = differing(reconciler, number, first_only=True, reference=reference)[1]
    return wrong[0] if wrong else ""


def main(arguments: Sequence[str]) -> int:
    """Run all of it; return the exit code."""
    logging.disable(logging.CRITICAL)
    number = int(arguments[0]) if arguments else counts.of(sample=150, full=1000)
    run_, wrong, paused, broken = 0, list[str](), 0, list[str]()
    for reconciler in (TRAINING, SERVING):
        tried, differs = differing(reconciler, number)
        stopped, late = pauses(reconciler, counts.of(sample=20, full=100))
        run_, paused = run_ + tried, paused + stopped
        wrong += [f"{reconciler.kind}: {line}" for line in differs]
        broken += [f"{reconciler.kind}: {line}" for line in late]
    missed = [name for name in PLANTED if not caught(name)]
    for line in wrong + broken + [f"planted and not caught: {name}" for name in missed]:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"pauses: {paused - len(broken)}/{paused} without a late write\n")
    found = len(PLANTED) - len(missed)
    sys.stdout.write(
        f"faults: {run_ - len(wrong)}/{run_} identical, planted: {found}/{len(PLANTED)} caught\n"
    )
    return 1 if wrong or broken or missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
