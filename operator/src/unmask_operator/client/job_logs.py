"""The lines that a job's nodes print, through pods that come and attempts that follow."""

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unmask_operator.client.connection import Connection
from unmask_operator.client.errors import NotFound
from unmask_operator.client.job_view import JobState, TrainJob
from unmask_operator.client.logs import PAUSE_S, PodLine, has_started, number, pod_lines
from unmask_operator.decision import JsonObject
from unmask_operator.launch.pods import ATTEMPT_LABEL, CONTAINER, selector
from unmask_operator.resources import RESOURCES

__all__ = ["INDEX", "Line", "attempt_of", "index_of", "node_lines", "pods_of"]

INDEX = "batch.kubernetes.io/job-completion-index"
"""Annotation of a pod: which node of its attempt it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line(PodLine):
    """A line of a job's log."""

    node: int
    """The node that printed it, from 0."""
    attempt: int
    """The attempt that it is of."""


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
    return number(pod["metadata"].get("labels", {}).get(ATTEMPT_LABEL))


def index_of(pod: JsonObject) -> int:
    """Return which node of its attempt a pod is."""
    return number(pod["metadata"].get("annotations", {}).get(INDEX))


def node_lines(
    connection: Connection,
    read: Callable[[], TrainJob],
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
        readable = [pod for pod in pods if has_started(pod, CONTAINER)]
        for pod in readable:
            for line in pod_lines(
                connection, pod, CONTAINER, follow=follow, restarts=False, since=since, tail=tail
            ):
                yield Line(
                    text=line.text,
                    pod=line.pod,
                    time=line.time,
                    node=index_of(pod),
                    attempt=attempt_of(pod),
                )
            done.add(pod["metadata"]["uid"])
        if not follow:
            if not done:
                raise NotFound(_nothing(job, pods, node))
            return
        past = attempt is not None and job.status.attempt > attempt
        if not readable and (job.state.ended or job.state is JobState.DELETING or past):
            return
        if not readable:
            connection.sleep(PAUSE_S)


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
