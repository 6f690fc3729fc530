"""Which of several operators acts: the one that holds the Lease, as far as its own clock allows.

A Lease alone does not keep two from acting: a process can stand still between looking at it and writing. So
there are two fences. No write is *sent* once two thirds of the lease are over since its renewal was begun, by
a clock that only runs on; and every write carries a precondition (this UID at this version, or: not there
yet), so that one which was sent in time and arrives late fails or changes nothing.
"""

import datetime
import logging
import random
import threading
from collections.abc import Callable
from typing import Any

from unmask_operator.control.api import Api, ApiError, Fenced, Unreachable
from unmask_operator.control.clock import Clock
from unmask_operator.decision import JsonObject
from unmask_operator.resources import DEPLOYMENT, LEASE

__all__ = ["Elector"]

_log = logging.getLogger(__name__)


class Elector:
    """Tries to hold the Lease, renews it, and says whether it may still be relied upon."""

    def __init__(
        self,
        api: Api,
        clock: Clock,
        *,
        namespace: str,
        name: str,
        identity: str,
        duration: float = 15.0,
        retry: float | None = None,
        owner: str | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Make one that holds nothing yet.

        Args:
            api: without a fence; its timeout is best below ``duration / 3``.
            clock: its steady time decides, so that clocks set differently do no harm.
            namespace: where the Lease is.
            name: its name.
            identity: unlike that of any other process, this one's earlier lives included.
            duration: seconds for which others leave the Lease alone after a renewal they saw.
            retry: seconds between two renewals, or two attempts to get it; by default an eighth of the
                duration, so that several fit into the two thirds for which a renewal holds, and 2 at most.
            owner: the Deployment that the Lease goes with, in the same namespace. The operator's own pods
                would be no owners: one that ends must not take the Lease of the next.
            jitter: 0 to 1.
        """
        self.identity = identity
        self._api = api
        self._clock = clock
        self._namespace = namespace
        self._name = name
        self._duration = duration
        self._retry = min(2.0, duration / 8) if retry is None else retry
        self._owner = owner
        self._jitter = jitter
        self._until = float("-inf")
        self._seen: tuple[str, float] | None = None  # resource version, and when we first saw it
        self._held: JsonObject | None = None
        self._reference: JsonObject | None = None  # to the Deployment, as last seen

    def leading(self) -> bool:
        """Return whether a write may be sent now."""
        return self._clock.steady() < self._until

    def fence(self) -> None:
        """Raise where no write may be sent now."""
        if not self.leading():
            raise Fenced(f"{self.identity} does not hold the lease {self._namespace}/{self._name}")

    def step(self) -> float:
        """Try once to get or renew the Lease; return the seconds until the next try."""
        begun = self._clock.steady()
        try:
            if self._hold():
                # Counted from before the request: whoever sees the renewal sees it later than that.
                self._until = begun + self._duration * 2 / 3
        except (ApiError, Unreachable) as error:
            # A conflict says that somebody else wrote: what we hold is to be read anew.
            self._held = None
            _log.warning("lease %s/%s: %s", self._namespace, self._name, error)
        return self._retry * (1 + self._jitter() / 5)

    def release(self) -> None:
        """Let go, so that another need not wait for the Lease to run out; without effect if not held."""
        if not self.leading() or self._held is None:
            return
        self._until = float("-inf")
        self._held["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": self._stamp()}
        try:
            self._api.replace(LEASE, self._held)
        except (ApiError, Unreachable) as error:
            _log.warning("lease %s/%s not released: %s", self._namespace, self._name, error)

    def run(self, stop: threading.Event, led: threading.Event, lost: Callable[[], None]) -> None:
        """Try until told to stop; set ``led`` once the Lease is held, call ``lost`` if it is lost again."""
        while not stop.is_set():
            delay = self.step()
            if self.leading():
                led.set()
            if led.is_set():
                # Not a moment longer than the fence holds.
                delay = min(delay, max(0.0, self._until - self._clock.steady()) + 0.001)
            stopped = self._clock.wait(delay, stop)
            if led.is_set() and not stopped and not self.leading():
                lost()
                return

    def _hold(self) -> bool:
        """Make, take or renew the Lease; return whether it is ours now."""
        if self._held is None:
            try:
                lease = self._api.get(LEASE, self._namespace, self._name)
            except ApiError as error:
                if error.status != 404:
                    raise
                self._held = self._api.create(LEASE, self._namespace, self._owned(self._fresh()))
                return True
            if not self._free(lease):
                return False
            self._owned(lease)
            spec = lease.setdefault("spec", {})
            if spec.get("holderIdentity") != self.identity:
                spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
                spec["acquireTime"] = self._stamp()
        else:
            lease = self._held
        lease["spec"] |= self._terms()
        self._held = self._api.replace(LEASE, lease)
        return True

    def _owned(self, lease: JsonObject) -> JsonObject:
        """Return the Lease, to be deleted with its Deployment; as it was, where none was ever seen."""
        if self._owner is None:
            return lease
        kind = {"apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.kind, "name": self._owner}
        try:
            found = self._api.get(DEPLOYMENT, self._namespace, self._owner)
            self._reference = kind | {"uid": found["metadata"]["uid"]}
        except ApiError as error:
            if error.status not in (403, 404):
                raise
            if self._reference is None:
                _log.warning(
                    "lease %s/%s will stay when the deployment %s is gone: %s",
                    self._namespace, self._name, self._owner, error,
                )  # fmt: skip
                return lease
            # It is gone while its pod still runs. A Lease that is made anew goes after it.
        others = [
            one for one in lease["metadata"].get("ownerReferences") or () if not kind.items() <= one.items()
        ]
        lease["metadata"]["ownerReferences"] = [*others, self._reference]
        return lease

    def _free(self, lease: JsonObject) -> bool:
        """Return whether the Lease is ours, nobody's, or has stood still for longer than it lasts."""
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity", "") in ("", None, self.identity):
            return True
        version = lease["metadata"]["resourceVersion"]
        now = self._clock.steady()
        if self._seen is None or self._seen[0] != version:
            # Its times are by another's clock; what counts is for how long we have seen it unchanged.
            self._seen = version, now
        return now - self._seen[1] > float(spec.get("leaseDurationSeconds") or self._duration)

    def _fresh(self) -> JsonObject:
        spec = {"acquireTime": self._stamp(), "leaseTransitions": 0} | self._terms()
        where = {"name": self._name, "namespace": self._namespace}
        return {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": where, "spec": spec}

    def _terms(self) -> dict[str, Any]:
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": max(1, round(self._duration)),
            "renewTime": self._stamp(),
        }

    def _stamp(self) -> str:
        moment = datetime.datetime.fromtimestamp(self._clock.now(), datetime.UTC)
        return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
