"""A copy of the objects of one kind, kept up to date by listing them once and watching from there."""

import logging
import random
import threading
from collections.abc import Callable, Sequence

from unmask_operator.control.api import Api, ApiError, Unreachable
from unmask_operator.control.clock import Clock
from unmask_operator.decision import JsonObject
from unmask_operator.resources import Resource

__all__ = ["Reflector", "owners"]

_log = logging.getLogger(__name__)

_FIRST_DELAY = 0.5
_LONGEST_DELAY = 30.0
_IDLE = 90.0  # a bookmark comes once a minute
_UNDEFINED = "not defined here: apply deploy/crds, or install the chart with crds.install; going on without"

Place = tuple[str, str]


def owners(item: JsonObject) -> Sequence[JsonObject]:
    """Return whom an object belongs to, with kind, name and UID: its owners, or whom an event regards."""
    found: Sequence[JsonObject] = item["metadata"].get("ownerReferences") or ()
    regarding = item.get("regarding") or {}
    return [regarding] if {"kind", "name", "uid"} <= regarding.keys() else found


class Reflector:
    """The objects of a kind, as far as the API server has told; never an error, at worst old."""

    def __init__(
        self,
        api: Api,
        resource: Resource,
        clock: Clock,
        on_change: Callable[[JsonObject], None],
        *,
        namespace: str | None = None,
        selector: str = "",
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Make an empty one; :meth:`run` fills it.

        Args:
            api: where to ask.
            resource: the kind.
            clock: by which delays end and ages are told.
            on_change: called with each object that came, changed or went; must be quick and not raise.
            namespace: where to look; ``None``: everywhere.
            selector: labels that the objects have to carry.
            jitter: 0 to 1.
        """
        self.resource = resource
        self._api = api
        self._clock = clock
        self._on_change = on_change
        self._namespace = namespace
        self._selector = selector
        self._jitter = jitter
        self._lock = threading.Lock()
        self._objects: dict[Place, JsonObject] = {}
        self._owned: dict[str, set[Place]] = {}
        self._uids: dict[str, Place] = {}
        self._version: str | None = None
        self._seen = 0
        self._failures = 0
        self._heard = clock.steady()
        self._stirred = clock.steady()
        self.synced = threading.Event()
        """Set once the first list is complete."""
        self.answered = threading.Event()
        """Set once it is known what there is, be it that one of our own kinds is not defined."""
        self.lists = 0
        """How many times all objects were listed."""
        self.failures = 0
        """How many lists and watches ended with an error."""

    def get(self, namespace: str, name: str) -> JsonObject | None:
        """Return an object, to be read and not changed."""
        with self._lock:
            return self._objects.get((namespace, name))

    def by_uid(self, uid: str) -> JsonObject | None:
        """Return the object with this UID."""
        with self._lock:
            place = self._uids.get(uid)
            return None if place is None else self._objects[place]

    def owned_by(self, uid: str) -> Sequence[JsonObject]:
        """Return the objects with an owner reference to this UID, ordered by name."""
        with self._lock:
            return [self._objects[place] for place in sorted(self._owned.get(uid, ()))]

    def all(self) -> Sequence[JsonObject]:
        """Return all objects, ordered by namespace and name."""
        with self._lock:
            return [self._objects[place] for place in sorted(self._objects)]

    def has_seen(self, version: int) -> bool:
        """Return whether what was written at this resource version is in the copy."""
        with self._lock:
            return self._seen >= version

    def age(self) -> float:
        """Return seconds since the API server last told something, be it that nothing changed."""
        return self._clock.steady() - self._heard

    def stirred(self) -> float:
        """Return seconds since the loop last tried anything; it grows only where the thread hangs."""
        return self._clock.steady() - max(self._heard, self._stirred)

    def run(self, stop: threading.Event) -> None:
        """List and watch until told to stop, slower after each failure in a row."""
        while not stop.is_set():
            delay = self.step()
            if delay and self._clock.wait(delay, stop):
                return

    def step(self) -> float:
        """List if need be, watch until the stream ends, and return the seconds until the next step."""
        self._stirred = self._clock.steady()
        try:
            if self._version is None:
                self._list()
            self._watch()
            self._heard = self._clock.steady()  # who ends a watch in good order has told all there was
            # A server that ends every watch at once is asked about once a second and no more often.
            quick = self._clock.steady() - self._stirred < 1.0
            self._failures = 0
            return self._jitter() if quick else 0.0
        except ApiError as error:
            if error.status == 404 and self.resource.custom and not self.synced.is_set():
                _log.warning("%s: %s", self.resource.plural, _UNDEFINED)
                self.answered.set()
            if error.status == 410 and self._version is not None:
                _log.info("%s: the watch is too old, listing anew", self.resource.plural)
                self._version = None
            return self._failed(error, error.retry_after or 0.0)
        except Unreachable as error:
            return self._failed(error, 0.0)
        except Exception as error:  # what the server sent made no sense; the next list may
            _log.exception("%s: cannot follow", self.resource.plural)
            self._version = None
            return self._failed(error, 0.0)

    def _failed(self, error: Exception, at_least: float) -> float:
        self._failures += 1
        self.failures += 1
        longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(self._failures - 1, 10))
        delay: float = max(at_least, longest * (0.5 + self._jitter() / 2))
        _log.warning("%s: %s; again in %.1f s", self.resource.plural, error, delay)
        return delay

    def _list(self) -> None:
        items, version = self._api.list(self.resource, self._namespace, self._selector, self.resource.fields)
        fresh = {_place(item): self._trimmed(item) for item in items}
        with self._lock:
            old = self._objects
            changed = [item for place, item in fresh.items() if _version(old.get(place)) != _version(item)]
            # Compared by UID: deleted and made again under the same name, the old one is gone all the same.
            gone = [item for place, item in old.items() if _uid(fresh.get(place)) != _uid(item)]
            self._objects, self._owned, self._uids = {}, {}, {}
            for item in fresh.values():
                self._put(item)
            self._seen = int(version)
        self._version = version
        self._heard = self._clock.steady()
        self.lists += 1
        for item in gone + changed:
            self._on_change(item)
        self.synced.set()
        self.answered.set()

    def _watch(self) -> None:
        assert self._version is not None
        longest, idle = 240, _IDLE
        if self.resource.fields:  # of events there are no bookmarks
            longest, idle = 60, 135.0
        seconds = longest + int(longest * self._jitter())  # so that watches do not all end together
        events = self._api.watch(
            self.resource,
            self._namespace,
            self._selector,
            self._version,
            seconds,
            idle,
            fields=self.resource.fields,
        )
        for event in events:
            item = event["object"]
            version = item["metadata"]["resourceVersion"]
            with self._lock:
                if event["type"] == "DELETED":
                    self._drop(_place(item))
                elif event["type"] != "BOOKMARK":
                    # A replayed event must not take the copy back in time.
                    if int(version) >= int(_version(self._objects.get(_place(item))) or 0):
                        self._put(self._trimmed(item))
                self._seen = max(self._seen, int(version))
            self._version = str(max(int(version), int(self._version)))
            self._heard = self._clock.steady()
            self._failures = 0
            if event["type"] != "BOOKMARK":
                self._on_change(item)

    def _trimmed(self, item: JsonObject) -> JsonObject:
        """Return an object without what is large and never decided upon; items of a list carry no kind."""
        metadata = {k: v for k, v in item["metadata"].items() if k != "managedFields"}
        kind = {"apiVersion": self.resource.api_version, "kind": self.resource.kind}
        return {**item, **kind, "metadata": metadata}

    def _put(self, item: JsonObject) -> None:
        place = _place(item)
        self._drop(place)
        self._objects[place] = item
        self._uids[_uid(item)] = place
        for owner in owners(item):
            self._owned.setdefault(owner["uid"], set()).add(place)

    def _drop(self, place: Place) -> None:
        item = self._objects.pop(place, None)
        if item is None:
            return
        self._uids.pop(_uid(item), None)
        for owner in owners(item):
            places = self._owned.get(owner["uid"], set())
            places.discard(place)
            if not places:
                self._owned.pop(owner["uid"], None)


def _place(item: JsonObject) -> Place:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _uid(item: JsonObject | None) -> str:
    return "" if item is None else str(item["metadata"]["uid"])


def _version(item: JsonObject | None) -> str:
    return "" if item is None else str(item["metadata"]["resourceVersion"])
