"""Events of ``kubectl describe``: written once, counted when they repeat, never in the way of work."""

import datetime
import hashlib
import logging
import threading

from unmask_operator.control.api import Api, ApiError, Unreachable
from unmask_operator.control.clock import Clock
from unmask_operator.decision import Event, JsonObject
from unmask_operator.resources import EVENT, MANAGER

__all__ = ["EventRecorder"]

_log = logging.getLogger(__name__)

_QUIET = 300.0  # seconds in which the same event is not written again
_PATIENCE = 3  # passes that an event may fail before the work goes on without it
_REMEMBERED = 4096


class EventRecorder:
    """Writes events under names made from what they say, so that a repeated write is no second event."""

    def __init__(self, api: Api, clock: Clock, identity: str) -> None:
        """Make one that has written nothing; ``identity`` is reported as the instance."""
        self._api = api
        self._clock = clock
        self._identity = identity
        self._written: dict[tuple[str, str], tuple[float, int]] = {}
        self._failed: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def record(self, regarding: JsonObject, event: Event) -> None:
        """Write an event about an object, or count it up if it was written more than five minutes ago.

        Raises:
            ApiError: the server is in trouble; not where it refuses the event, and not the third time.
            Unreachable: the same.
        """
        metadata = regarding["metadata"]
        digest = hashlib.sha256("\0".join((metadata["uid"], event.type, event.reason, event.note)).encode())
        key = metadata["namespace"], f"{metadata['name'][:200]}.{digest.hexdigest()[:16]}"
        now = self._clock.steady()
        with self._lock:
            then, count = self._written.get(key, (float("-inf"), 0))
        if now - then < _QUIET:
            return
        try:
            count = self._count_up(key, count) if count else self._make(key, regarding, event)
        except (ApiError, Unreachable) as error:
            refused = (
                isinstance(error, ApiError) and 400 <= error.status < 500 and error.status not in (409, 429)
            )
            with self._lock:
                failures = self._failed[key] = self._failed.get(key, 0) + 1
            if not refused and failures < _PATIENCE:
                raise
            _log.warning("event %s/%s is left out: %s", *key, error)
        with self._lock:
            if len(self._written) >= _REMEMBERED:
                self._written.clear()
            self._failed.pop(key, None)
            self._written[key] = now, max(1, count)

    def _make(self, key: tuple[str, str], regarding: JsonObject, event: Event) -> int:
        namespace, name = key
        metadata = regarding["metadata"]
        body = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": self._stamp(),
            "reportingController": f"unmask.dev/{MANAGER}",
            "reportingInstance": self._identity[:128],
            "action": event.action[:128],
            "reason": event.reason[:128],
            "note": event.note[:1024],
            "type": event.type,
            "regarding": {
                "apiVersion": regarding["apiVersion"],
                "kind": regarding["kind"],
                "namespace": namespace,
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
        }
        try:
            self._api.create(EVENT, namespace, body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        return 1

    def _count_up(self, key: tuple[str, str], count: int) -> int:
        series = {"count": count + 1, "lastObservedTime": self._stamp()}
        try:
            self._api.merge(EVENT, *key, {"series": series})
        except ApiError as error:
            if error.status == 404:  # events live for an hour
                return 0
            raise
        return count + 1

    def _stamp(self) -> str:
        moment = datetime.datetime.fromtimestamp(self._clock.now(), datetime.UTC)
        return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
