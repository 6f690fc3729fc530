"""The operator's threads: copies, the lease, workers; started in this order and stopped in the other."""

import logging
import random
import threading
from collections.abc import Callable, Sequence

from unmask_operator.control.api import Api, ApiError, Transport, Unreachable
from unmask_operator.control.clock import Clock
from unmask_operator.control.controller import Controller
from unmask_operator.control.lease import Elector
from unmask_operator.control.metrics import Metrics, Reading, stalled, states
from unmask_operator.control.reflector import Reflector
from unmask_operator.control.workqueue import TokenBucket
from unmask_operator.decision import JsonObject, Reconciler
from unmask_operator.resources import MANAGED_BY, MANAGER, RESOURCES, WARNINGS, Resource

__all__ = ["Manager"]

_log = logging.getLogger(__name__)

_DISCOVERY = 600.0  # seconds between two looks at which APIs are served
_OPTIONAL = 10.0  # seconds to wait for the first list of a kind that need not be there
_HUNG = 300.0  # seconds; a watch says something every 90 or ends


class Manager:
    """Everything that one operator process runs."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        reconcilers: Sequence[Reconciler],
        *,
        identity: str,
        namespace: str | None,
        lease_namespace: str,
        lease_name: str = MANAGER,
        lease_seconds: float = 15.0,
        lease_owner: str | None = None,
        workers: int = 4,
        rate: float = 20.0,
        burst: int = 50,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Make one; :meth:`run` starts it.

        Args:
            transport: carries the requests.
            clock: time and delays.
            reconcilers: what decides, each about a kind of its own.
            identity: unlike that of any other process.
            namespace: where to work; ``None``: everywhere.
            lease_namespace: where the Lease is.
            lease_name: its name.
            lease_seconds: how long others leave it alone.
            lease_owner: the Deployment with which it is deleted.
            workers: custom resources of a kind that are worked on at once.
            rate: requests a second, watches and the lease aside.
            burst: requests at once.
            jitter: 0 to 1.
        """
        self.stop = threading.Event()
        self._led = threading.Event()
        self._clock = clock
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self.metrics = Metrics()
        self.elector = Elector(
            Api(transport, clock, timeout=lease_seconds / 3),
            clock,
            namespace=lease_namespace,
            name=lease_name,
            identity=identity,
            duration=lease_seconds,
            owner=lease_owner,
            jitter=jitter,
        )
        self._api = Api(
            transport, clock, bucket=TokenBucket(clock, rate, burst), fence=self.elector.fence, stop=self.stop
        )
        # Lists are not held up by writes: an old copy would only lead to more of them.
        self._reading = Api(transport, clock, timeout=30.0)
        self._namespace = namespace
        self._jitter = jitter
        self._served: frozenset[str] = frozenset()
        kinds = dict.fromkeys(
            kind
            for one in reconcilers
            for kind in (one.kind, *filter(None, [one.refers_to]), *one.owns, *one.reads)
        )
        self.caches = {kind: self._cache(kind) for kind in kinds}
        self._optional = {kind for one in reconcilers for kind in one.optional}
        self._awaited: dict[str, Reflector] = {}
        self.controllers = [
            Controller(
                reconciler,
                self.caches,
                self._api,
                clock,
                identity=identity,
                metrics=self.metrics,
                served=lambda: self._served,
                jitter=jitter,
            )
            for reconciler in reconcilers
        ]
        self.metrics.read(self._readings)

    def _cache(self, kind: str) -> Reflector:
        resource: Resource = WARNINGS[kind] if kind in WARNINGS else RESOURCES[kind]
        return Reflector(
            self._reading,
            resource,
            self._clock,
            self._notice,
            namespace=self._namespace,
            # Our own kinds are everybody's, and events carry no label.
            selector="" if resource.custom or resource.fields else f"{MANAGED_BY}={MANAGER}",
            jitter=self._jitter,
        )

    def discover(self) -> None:
        """Ask which APIs the cluster serves; what was known stays where there is no answer."""
        try:
            self._served = self._api.served()
        except (ApiError, Unreachable) as error:
            _log.warning("cannot tell which APIs are served: %s", error)

    def _follow_optional(self) -> None:
        """Follow the kinds that need not be there and are, each from the first time it is served."""
        for kind in sorted(self._optional - self.caches.keys()):
            if RESOURCES[kind].api_version not in self._served:
                continue
            if kind not in self._awaited:
                cache = self._awaited[kind] = self._cache(kind)
                self._start(f"watch-{cache.resource.plural}", cache.run, self.stop)
            until = self._clock.steady() + _OPTIONAL
            while not self._awaited[kind].synced.is_set() and self._clock.steady() < until:
                if self._clock.wait(0.05, self.stop):
                    return
            if self._awaited[kind].synced.is_set():
                self.caches[kind] = self._awaited.pop(kind)
            else:  # served, and cannot be listed: decided without
                _log.warning("%s cannot be listed; going on without", kind)

    def run(self) -> bool:
        """Work until :attr:`stop` is set or the lease is lost; return whether it was the former."""
        lost = threading.Event()
        for cache in self.caches.values():
            self._start(f"watch-{cache.resource.plural}", cache.run, self.stop)
        # A standby keeps its copies warm, so that it can take over at once.
        answered = all(self._wait(cache.answered) for cache in self.caches.values())
        if answered:
            self.discover()
            self._follow_optional()
            self._start("lease", self.elector.run, self.stop, self._led, lost.set)
        if answered and self._wait(self._led):
            _log.info("leading")
            idle = list(self.controllers)
            looked = self._clock.steady()
            while not lost.is_set() and not self.stop.is_set():
                idle = self._start_controllers(idle)
                if self._clock.wait(0.2, self.stop):
                    break
                if self._clock.steady() - looked > _DISCOVERY:
                    self.discover()
                    self._follow_optional()
                    looked = self._clock.steady()
        self.stop.set()
        for controller in self.controllers:
            controller.queue.close()
        for thread in self._threads:
            if not thread.name.startswith("watch-"):  # those wait for bytes and hold nothing
                thread.join(timeout=20.0)
        self.elector.release()
        return not lost.is_set()

    def _start_controllers(self, idle: Sequence[Controller]) -> list[Controller]:
        """Start those whose kind is served; return the others, which wait for its definition."""
        waiting = []
        for controller in idle:
            kind = controller.reconciler.kind
            if not self.caches[kind].synced.is_set():
                waiting.append(controller)
                continue
            for number in range(self._workers):
                self._start(f"{kind}-{number}", controller.run, self.stop)
        return waiting

    def alive(self) -> str:
        """Return what hangs, or nothing."""
        hung = [kind for kind, cache in list(self.caches.items()) if cache.stirred() > _HUNG]
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        if self.stop.is_set():
            return ""
        return ", ".join([f"watch of {kind} hangs" for kind in hung] + [f"{name} ended" for name in dead])

    def ready(self) -> str:
        """Return what is missing before decisions can be made, or nothing."""
        missing = [kind for kind, cache in list(self.caches.items()) if not cache.answered.is_set()]
        own = [controller.reconciler.kind for controller in self.controllers]
        if not any(self.caches[kind].synced.is_set() for kind in own):
            missing = list(dict.fromkeys(missing + own))  # one of its kinds is enough, none is not
        old = [
            kind for kind, cache in list(self.caches.items()) if cache.synced.is_set() and cache.age() > _HUNG
        ]
        if self.stop.is_set():
            return "stopping"
        return ", ".join(
            [f"{kind} not listed yet" for kind in missing] + [f"{kind} out of date" for kind in old]
        )

    def _notice(self, item: JsonObject) -> None:
        for controller in self.controllers:
            controller.notice(item)

    def _start(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(name=name, target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)  # one that has not begun would count as one that has ended

    def _wait(self, event: threading.Event) -> bool:
        """Wait for an event or for the end; return whether it came."""
        while not event.is_set():
            if self._clock.wait(0.05, self.stop):
                return False
        return True

    def _readings(self) -> Sequence[Reading]:
        readings: list[Reading] = [("unmask_operator_is_leader", {}, float(self.elector.leading()))]
        for kind, cache in list(self.caches.items()):
            label = {"kind": kind}
            readings += [
                ("unmask_operator_watch_age_seconds", label, cache.age()),
                ("unmask_operator_watch_failures_total", label, cache.failures),
                ("unmask_operator_lists_total", label, cache.lists),
            ]
        for controller in self.controllers:
            kind = controller.reconciler.kind
            label, queue = {"kind": kind}, controller.queue
            resources = self.caches[kind].all()
            readings += [
                ("unmask_operator_workqueue_depth", label, len(queue)),
                ("unmask_operator_workqueue_adds_total", label, queue.adds),
                ("unmask_operator_workqueue_retries_total", label, queue.retried),
                *states(kind, resources),
                *stalled(kind, resources),
            ]
        return readings
