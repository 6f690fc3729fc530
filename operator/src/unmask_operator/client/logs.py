"""The lines that pods print, over broken connections and from several at once.

A stream that breaks is asked for again from its last line on: every line carries the time at which it was
written, and what was told already is left out.
"""

import datetime
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from unmask_operator.client.connection import Connection
from unmask_operator.client.errors import NotFound
from unmask_operator.decision import JsonObject
from unmask_operator.resources import RESOURCES
from unmask_operator.transport import ApiError, Unreachable

__all__ = ["PAUSE_S", "PodLine", "has_started", "number", "pod_lines", "together"]

PAUSE_S = 2.0
"""Seconds between two looks at what pods there are."""
_SILENCE_S = 60.0
"""Seconds without a line after which a stream is asked for again: the connection may be dead."""

_POD = RESOURCES["Pod"]

Told = TypeVar("Told")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodLine:
    """A line of a pod's log."""

    text: str
    """The line, without its line break."""
    pod: str
    """The pod that printed it."""
    time: datetime.datetime | None
    """When it was written, where the cluster says so."""


def pod_lines(
    connection: Connection,
    pod: JsonObject,
    container: str,
    *,
    follow: bool,
    restarts: bool,
    since: datetime.datetime | None,
    tail: int | None,
) -> Iterator[PodLine]:
    """Yield the lines of a pod's container, which has started.

    Args:
        connection: to the cluster.
        pod: as it was read.
        container: whose lines.
        follow: wait for more until the container has ended for good.
        restarts: whether a container that ended is started again in its pod.
        since: leave out what was written before.
        tail: only so many of the last lines.

    Raises:
        ClusterError: The cluster refuses, or cannot be reached any longer.
    """
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    path, what = _POD.path(namespace, name, "log"), f"read the log of pod {name}"
    place = _Place(since)
    failures = 0
    while True:
        query = {"container": container, "timestamps": "true"} | ({"follow": "true"} if follow else {})
        if place.since is not None:
            query["sinceTime"] = place.since.strftime("%Y-%m-%dT%H:%M:%SZ")
        elif tail is not None:
            query["tailLines"] = str(tail)
        try:
            with connection.lines(path, query, timeout=_SILENCE_S) as lines:
                for raw in place.new(lines):
                    failures = 0
                    yield PodLine(text=raw.text, pod=name, time=raw.time)
            if not follow or _has_ended(connection, pod, container, restarts=restarts):
                return
        except Unreachable as error:
            failures += 1
            if failures > 5:
                raise connection.explained(error, _POD, what=what, namespace=namespace) from None
        except ApiError as error:
            if error.status == 404:  # deleted, with its log
                return
            raise connection.explained(error, _POD, what=what, namespace=namespace) from None
        connection.sleep(PAUSE_S)


def together(more: Callable[[], Sequence[Iterator[Told]] | None], *, poll: float = PAUSE_S) -> Iterator[Told]:
    """Yield what all sources tell, as it comes, until they end and no more of them follow.

    Args:
        more: returns sources that have not been read yet, and is asked again all the time; ``None``: no
            further ones follow.
        poll: seconds between two of these questions.

    Raises:
        Exception: An error in one of the sources, or in ``more``, ends it all.
    """
    found: queue.SimpleQueue[tuple[Told] | BaseException | None] = queue.SimpleQueue()

    def read(source: Iterator[Told]) -> None:
        try:
            for one in source:
                found.put((one,))
            found.put(None)
        except BaseException as error:
            found.put(error)

    left, follow, due = 0, True, time.monotonic()
    while follow or left:
        if follow and time.monotonic() >= due:
            sources = more()
            follow = sources is not None
            for source in sources or ():
                threading.Thread(target=read, args=(source,), daemon=True).start()
                left += 1
            due = time.monotonic() + poll
            continue
        try:
            told = found.get(timeout=max(0.0, due - time.monotonic()) if follow else None)
        except queue.Empty:
            continue
        match told:
            case None:
                left -= 1
            case BaseException() as error:
                raise error
            case (one,):
                yield one


@dataclass(frozen=True, slots=True)
class _Stamped:
    text: str
    time: datetime.datetime | None


class _Place:
    """How far a log has been told; times of lines have nanoseconds, and never go back."""

    def __init__(self, since: datetime.datetime | None) -> None:
        self.since = since.astimezone(datetime.UTC) if since else None
        self._last = ""
        self._repeats = 0

    def new(self, lines: Iterator[bytes]) -> Iterator[_Stamped]:
        """Yield what was not told before."""
        skip = self._repeats if self._last else 0
        for raw in lines:
            stamp, _, text = raw.decode(errors="replace").partition(" ")
            key = _sortable(stamp)
            if key is None:  # no time: what the kubelet itself says
                yield _Stamped(raw.decode(errors="replace"), None)
                continue
            if key < self._last:
                continue
            if key > self._last:
                self._last, self._repeats, skip = key, 0, 0
            elif skip:
                skip -= 1
                continue
            self._repeats += 1
            self.since = datetime.datetime.fromisoformat(key[:19] + "+00:00")
            yield _Stamped(text, datetime.datetime.fromisoformat(f"{key[:26]}+00:00"))


def _sortable(stamp: str) -> str | None:
    """Return a UTC time with exactly nine digits behind the point, so that text order is time's."""
    if len(stamp) < 20 or not stamp.endswith("Z") or stamp[10] != "T":
        return None
    whole, _, fraction = stamp[:-1].partition(".")
    try:
        datetime.datetime.fromisoformat(whole)
    except ValueError:
        return None
    return f"{whole}.{fraction:0<9}"


def has_started(pod: JsonObject, container: str) -> bool:
    """Whether a pod's container runs or ran, if only before it was started again."""
    state = _container(pod, container)
    now, before = state.get("state") or {}, state.get("lastState") or {}
    return "running" in now or "terminated" in now or "terminated" in before


def _has_ended(connection: Connection, pod: JsonObject, container: str, *, restarts: bool) -> bool:
    """Whether a pod whose stream has ended is over; kubelets end streams when log files are rotated, too."""
    metadata = pod["metadata"]
    what = f"look at pod {metadata['name']}"
    try:
        now = connection.get(_POD, metadata["namespace"], metadata["name"], what=what)
    except NotFound:
        return True
    if now["metadata"]["uid"] != metadata["uid"]:
        return True
    if restarts and "deletionTimestamp" not in now["metadata"]:
        return now.get("status", {}).get("phase") in ("Succeeded", "Failed")
    return "terminated" in (_container(now, container).get("state") or {})


def _container(pod: JsonObject, name: str) -> JsonObject:
    """Return what the kubelet says of a container; empty, nothing yet."""
    told = pod.get("status", {}).get("containerStatuses", ())
    return next((one for one in told if one.get("name") == name), {})


def number(text: object) -> int:
    """Return what a label or annotation counts; 0 where it does not."""
    return int(text) if isinstance(text, str) and text.isdigit() else 0
