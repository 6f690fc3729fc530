"""Calls a decision function whenever something it looks at changed, and carries the answer out."""

import dataclasses
import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence

from unmask_operator.control.api import Api, ApiError, Fenced, Unreachable
from unmask_operator.control.clock import Clock
from unmask_operator.control.events import EventRecorder
from unmask_operator.control.executor import Executor, Expectations, Later, Outcome
from unmask_operator.control.metrics import Metrics
from unmask_operator.control.questions import Questions
from unmask_operator.control.reflector import Reflector, owners
from unmask_operator.control.workqueue import TokenBucket, WorkQueue
from unmask_operator.decision import JsonObject, Observed, Reconciler

__all__ = ["Controller", "Key"]

_log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a custom resource."""

_BEHIND = 1.0  # seconds after which a copy that is behind is looked at again, if it says nothing itself
_REMEMBERED = 300.0  # seconds for which a child that is not tried any more counts as refused


class Controller:
    """One reconciler at work: its queue, what it has written and what it still waits to see."""

    def __init__(
        self,
        reconciler: Reconciler,
        caches: Mapping[str, Reflector],
        api: Api,
        clock: Clock,
        *,
        identity: str,
        metrics: Metrics,
        served: Callable[[], frozenset[str]] = frozenset,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Make one.

        Args:
            reconciler: what decides.
            caches: the copies, by kind; those of the reconciler's kinds are read.
            api: writes, behind the fence.
            clock: the time that decisions are told, and by which delays end.
            identity: who reports events.
            metrics: where to count.
            served: the APIs that the cluster serves.
            jitter: 0 to 1.
        """
        self.reconciler = reconciler
        self.queue: WorkQueue[Key] = WorkQueue(clock, retries=TokenBucket(clock, 10.0, 100), jitter=jitter)
        self._caches = caches
        self._clock = clock
        self._metrics = metrics
        self._served = served
        self._referred_kind = reconciler.refers_to or reconciler.kind
        self._questions = Questions(clock)
        self._expectations = Expectations(caches)
        self._executor = Executor(api, EventRecorder(api, clock, identity), self._expectations, metrics.wrote)
        self._all_kinds = tuple(dict.fromkeys((*reconciler.owns, *reconciler.optional, *reconciler.reads)))
        # (namespace, name) -> who looks at the resource of that name, and the other way round
        self._watchers: dict[Key, set[Key]] = {}
        self._referred: dict[Key, frozenset[str]] = {}
        self._references = threading.Lock()
        self._refused: dict[str, tuple[float, Outcome]] = {}

    def notice(self, item: JsonObject) -> None:
        """Ask for the custom resource that a changed object is, or belongs to, or is looked at by."""
        metadata = item["metadata"]
        key = metadata["namespace"], metadata["name"]
        if item.get("kind") == self._referred_kind:
            with self._references:
                watchers = sorted(self._watchers.get(key, ()))
            for one in watchers:
                self.queue.add(one)
        if item.get("kind") == self.reconciler.kind:
            self.queue.add(key)
            return
        for owner in owners(item):
            if owner["kind"] == self.reconciler.kind:
                self.queue.add((metadata["namespace"], owner["name"]))
            elif owner["kind"] in self._caches:
                parent = self._caches[owner["kind"]].by_uid(owner["uid"])
                if parent is not None and parent["metadata"]["uid"] != metadata.get("uid"):
                    self.notice(parent)

    @property
    def _kinds(self) -> Sequence[str]:
        """Kinds of children; one that is optional, once it is followed."""
        return [kind for kind in self._all_kinds if kind in self._caches]

    def run(self, stop: threading.Event) -> None:
        """Work on keys until told to stop; what is begun is finished."""
        while not stop.is_set():
            self.work(timeout=1.0)

    def work(self, timeout: float) -> bool:
        """Work on one key, if there is one before the timeout; return whether there was."""
        key = self.queue.take(timeout)
        if key is None:
            return False
        begun = self._clock.steady()
        try:
            result = self._reconcile(key)
        except Fenced as error:
            result = "fenced"  # the new leader looks at everything
            _log.warning("%s %s/%s: %s", self.reconciler.kind, *key, error)
        except Later as error:
            result = "later"
            _log.info("%s %s/%s: %s", self.reconciler.kind, *key, error)
            self.queue.retry(key)
        except (ApiError, Unreachable) as error:
            result = "failed"
            after = error.retry_after if isinstance(error, ApiError) else None
            delay = self.queue.retry(key, after or 0.0)
            _log.warning("%s %s/%s: %s; again in %.1f s", self.reconciler.kind, *key, error, delay)
        except Exception:
            # One resource that cannot be decided about must not stop the others.
            result = "broken"
            delay = self.queue.retry(key)
            _log.exception("%s %s/%s: again in %.1f s", self.reconciler.kind, *key, delay)
        finally:
            self.queue.done(key)
        self._metrics.reconciled(self.reconciler.kind, result, self._clock.steady() - begun)
        return True

    def _reconcile(self, key: Key) -> str:
        resource = self._caches[self.reconciler.kind].get(*key)
        if resource is None or "deletionTimestamp" in resource["metadata"]:
            self.queue.forget(key)  # what it owns goes with it
            self._refer(key, ())
            return "gone"
        uid = resource["metadata"]["uid"]
        if not self._expectations.met(uid):
            self.queue.add_after(key, _BEHIND)
            return "behind"
        # Before they are looked at: what changes from now on is told.
        self._refer(key, self.reconciler.refers(resource))
        observed = self._observe(resource)
        decision = self.reconciler.decide(observed)
        outcome = self._executor.carry_out(observed, decision)
        self._questions.ask(decision.ask)
        tried = {(child["kind"], child["metadata"]["name"]) for child in decision.apply}
        if self._remember(uid, outcome, tried):
            self.queue.retry(key)
            return "refused"
        self.queue.forget(key)
        if decision.requeue_after is not None:
            self.queue.add_after(key, max(0.0, decision.requeue_after))
        if observed.conflicts or observed.rejections:
            self.queue.add(key)  # the status still tells of what is over
        return "done"

    def _observe(self, resource: JsonObject) -> Observed:
        kinds = self._kinds
        children: dict[str, list[JsonObject]] = {kind: [] for kind in kinds}
        namespace = resource["metadata"]["namespace"]
        uids = [resource["metadata"]["uid"]]
        seen: set[str] = set()
        while uids:
            found = [
                (kind, one) for uid in uids for kind in kinds for one in self._caches[kind].owned_by(uid)
            ]
            uids = []
            for kind, one in found:
                if (uid := one["metadata"]["uid"]) not in seen and one["metadata"]["namespace"] == namespace:
                    seen.add(uid)
                    uids.append(uid)
                    children[kind].append(one)
        for of_kind in children.values():
            of_kind.sort(key=lambda one: str(one["metadata"]["name"]))
        known = self._caches[self._referred_kind]
        others = {name: known.get(namespace, name) for name in self.reconciler.refers(resource)}
        answers = {uid: answer for uid, answer in self._questions.answers().items() if uid in seen}
        observed = Observed(
            resource,
            children,
            self._clock.now(),
            served=self._served(),
            answers=answers,
            referred={name: one for name, one in others.items() if one is not None},
        )
        since, outcome = self._refused.get(resource["metadata"]["uid"], (0.0, Outcome()))
        if self._clock.steady() - since > _REMEMBERED:
            return observed
        return dataclasses.replace(
            observed, conflicts=frozenset(outcome.conflicts), rejections=dict(outcome.rejections)
        )

    def _refer(self, key: Key, names: Sequence[str]) -> None:
        """Remember whom a resource looks at, so that it is asked about when they change."""
        new = frozenset(names)
        with self._references:
            old = self._referred.pop(key, frozenset())
            if new:
                self._referred[key] = new
            for name in old - new:
                watchers = self._watchers[key[0], name]
                watchers.discard(key)
                if not watchers:
                    del self._watchers[key[0], name]
            for name in new - old:
                self._watchers.setdefault((key[0], name), set()).add(key)

    def _remember(self, uid: str, outcome: Outcome, tried: set[tuple[str, str]]) -> bool:
        """Keep what was refused for the next pass; return whether anything was refused in this one."""
        since, old = self._refused.pop(uid, (0.0, Outcome()))
        refused = bool(outcome.conflicts or outcome.rejections)
        now = self._clock.steady()
        if now - since <= _REMEMBERED:
            outcome.conflicts |= old.conflicts - tried
            for place in set(old.rejections) - tried:
                outcome.rejections.setdefault(place, old.rejections[place])
        if outcome.conflicts or outcome.rejections:
            self._refused[uid] = (now if refused else since), outcome
        return refused
