"""The lines that a job's pods print, over broken connections, pods that come and attempts that follow.

A stream that breaks is asked for again from its last line on: every line carries the time at which it was
written, and what was told already is left out.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from unmask_operator.client.connection import Connection
from unmask_operator.client.errors import NotFound
from unmask_operator.client.view import JobState, TrainJob
from unmask_operator.decision import JsonObject
from unmask_operator.launch.pods import ATTEMPT_LABEL, CONTAINER, selector
from unmask_operator.resources import RESOURCES
from unmask_operator.transport import ApiError, Unreachable

__all__ = ["INDEX", "Line", "attempt_of", "index_of", "node_lines", "pods_of"]

INDEX = "batch.kubernetes.io/job-completion-index"
"""Annotation of a pod: which node of its attempt it is."""
_SILENCE_S = 60.0
"""Seconds without a line after which a stream is asked for again: the connection may be dead."""
_PAUSE_S = 2.0


class Reader(Protocol):
    """Reads a job anew."""

    def __call__(self) -> TrainJob:
        """Return it as it is now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a pod's log."""

    text: str
    """The line, without its line break."""
    node: int
    """The node that printed it, from 0."""
    attempt: int
    """The attempt that it is of."""
    time: datetime.datetime | None
    """When it was written, where the cluster says so."""


def pods_of(connection: Connection, job: TrainJob) -> list[JsonObject]:
    """Return the job's pods, ordered by attempt and node."""
    pods = connection.list(
        RESOURCES["Pod"],
        job.namespace,
        what=f"list the pods of job {job.name}",
        labelSelector=selector(job.name),
    )
    return sorted(pods, key=lambda pod: (attempt_of(pod), index_of(pod), pod["metadata"]["name"]))


def attempt_of(pod: JsonObject) -> int:
    """Return the attempt that a pod is of."""
    return _whole(pod["metadata"].get("labels", {}).get(ATTEMPT_LABEL))


def index_of(pod: JsonObject) -> int:
    """Return which node of its attempt a pod is."""
    return _whole(pod["metadata"].get("annotations", {}).get(INDEX))


def node_lines(
    connection: Connection,
    read: Reader,
    *,
    node: int,
    follow: bool,
    since: datetime.datetime | None = None,
    tail: int | None = None,
    attempt: int | None = None,
) -> Iterator[Line]:
    """Yield the lines of one node.

    Args:
        connection: to the cluster.
        read: reads the job anew.
        node: which one.
        follow: wait for pods and lines, through restarts, until the job has ended.
        since: leave out what was written before.
        tail: only so many of the last lines of each pod.
        attempt: of this attempt alone; by default those whose pods are there.

    Raises:
        NotFound: There is no pod, and without ``follow`` none is waited for.
        ClusterError: The cluster refuses.
    """
    done: set[str] = set()
    while True:
        job = read()
        pods = [
            pod
            for pod in pods_of(connection, job)
            if index_of(pod) == node
            and attempt in (None, attempt_of(pod))
            and pod["metadata"]["uid"] not in done
        ]
        readable = [pod for pod in pods if _has_started(pod)]
        for pod in readable:
            yield from _pod_lines(connection, pod, follow=follow, since=since, tail=tail)
            done.add(pod["metadata"]["uid"])
        if not follow:
            if not done:
                raise NotFound(_nothing(job, pods, node))
            return
        past = attempt is not None and job.status.attempt > attempt
        if not readable and (job.state.ended or job.state is JobState.DELETING or past):
            return
        if not readable:
            connection.sleep(_PAUSE_S)


def _pod_lines(
    connection: Connection,
    pod: JsonObject,
    *,
    follow: bool,
    since: datetime.datetime | None,
    tail: int | None,
) -> Iterator[Line]:
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    path = RESOURCES["Pod"].path(namespace, name, "log")
    place = _Place(since)
    failures = 0
    while True:
        query = {"container": CONTAINER, "timestamps": "true"} | ({"follow": "true"} if follow else {})
        if place.since is not None:
            query["sinceTime"] = place.since.strftime("%Y-%m-%dT%H:%M:%SZ")
        elif tail is not None:
            query["tailLines"] = str(tail)
        try:
            with connection.lines(path, query, timeout=_SILENCE_S) as lines:
                for raw in place.new(lines):
                    failures = 0
                    yield Line(text=raw.text, node=index_of(pod), attempt=attempt_of(pod), time=raw.time)
            if not follow or _has_ended(connection, pod):
                return
        except Unreachable as error:
            failures += 1
            if failures > 5:
                raise connection.explained(
                    error, what=f"read the log of pod {name}", namespace=namespace
                ) from None
        except ApiError as error:
            if error.status == 404:  # deleted, with its log
                return
            raise connection.explained(
                error, what=f"read the log of pod {name}", namespace=namespace
            ) from None
        connection.sleep(_PAUSE_S)


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


def _has_started(pod: JsonObject) -> bool:
    """Whether a pod's worker runs or ran."""
    for state in pod.get("status", {}).get("containerStatuses", ()):
        if state.get("name") == CONTAINER:
            now = state.get("state") or {}
            return bool("running" in now or "terminated" in now)
    return False


def _has_ended(connection: Connection, pod: JsonObject) -> bool:
    """Whether a pod whose stream has ended is over; kubelets end streams when log files are rotated, too."""
    metadata = pod["metadata"]
    what = f"look at pod {metadata['name']}"
    try:
        now = connection.get(RESOURCES["Pod"], metadata["namespace"], metadata["name"], what=what)
    except NotFound:
        return True
    if now["metadata"]["uid"] != metadata["uid"]:
        return True
    states = now.get("status", {}).get("containerStatuses", ())
    return any(one.get("name") == CONTAINER and "terminated" in (one.get("state") or {}) for one in states)


def _nothing(job: TrainJob, pods: list[JsonObject], node: int) -> str:
    if pods:
        return (
            f"job {job.name}: pod {pods[-1]['metadata']['name']} has not started yet; unmask describe"
            f" {job.name} --namespace {job.namespace} says what it waits for, and --follow waits with it"
        )
    if job.state.ended:
        why = "its pods are gone, and their logs with them (runPolicy.podCleanup: None keeps them)"
    else:
        why = f"there is no pod of node {node} yet; --follow waits for it"
    named = f"{job.name} --namespace {job.namespace}"
    return f"job {job.name} is {job.state}: {why}; unmask describe {named} says more"


def _whole(text: object) -> int:
    return int(text) if isinstance(text, str) and text.isdigit() else 0
