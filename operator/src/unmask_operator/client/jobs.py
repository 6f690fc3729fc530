"""Training jobs on a cluster: submit, get, list, wait, logs, cancel, delete.

Everything here may be done twice: submitting the same manifest again finds the job, cancelling a cancelled
job changes nothing, and so on. So a request whose answer was lost is simply sent again.
"""

import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from unmask.errors import UsageError
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.client import logs
from unmask_operator.client.connection import Connection, connect
from unmask_operator.client.errors import NameTaken, NotFound, WaitedTooLong
from unmask_operator.client.logs import Line
from unmask_operator.client.view import CANCELLED, TrainJob
from unmask_operator.decision import JsonObject
from unmask_operator.launch.admission import admit, read_manifest
from unmask_operator.resources import EVENT, RESOURCES

__all__ = ["Manifest", "TrainJobs", "as_written"]

Manifest = Path | str | Mapping[str, Any] | DiffusionTrainJob
"""A manifest: its path, or what it holds."""

_KIND = RESOURCES["DiffusionTrainJob"]


class TrainJobs:
    """The training jobs of a namespace.

    >>> from unmask_operator.client import TrainJobs
    >>> jobs = TrainJobs.connect(namespace="ml")  # doctest: +SKIP
    >>> jobs.wait(jobs.submit("job.yaml").name).state  # doctest: +SKIP
    <JobState.SUCCEEDED: 'Succeeded'>

    Every method raises :class:`~unmask_operator.client.errors.ClusterError`, or one of its kinds, where the
    cluster cannot be asked or says no.
    """

    def __init__(self, connection: Connection, namespace: str | None = None) -> None:
        """Take a connection, and the namespace to work in; by default the connection's."""
        self._connection = connection
        self._chosen = namespace
        self.namespace = namespace or connection.namespace
        """Where the jobs are."""

    @classmethod
    def connect(
        cls,
        *,
        namespace: str | None = None,
        context: str | None = None,
        kubeconfig: Path | str | None = None,
    ) -> Self:
        """Connect to a cluster.

        Args:
            namespace: where the jobs are; by default that of the context.
            context: context of the kubeconfig; by default its current one.
            kubeconfig: file that says where the cluster is; by default ``$KUBECONFIG``, else
                ``~/.kube/config``, else the account of the pod that this runs in.

        Raises:
            NoCluster: There is no such file or context.
        """
        return cls(connect(kubeconfig, context), namespace)

    def submit(self, manifest: Manifest, *, dry_run: bool = False) -> TrainJob:
        """Make the job of a manifest, and return it.

        The same manifest again gives the job that is there. If that was cancelled, it goes on from its last
        checkpoint. A namespace in the manifest must be the one chosen, if one was.

        Args:
            manifest: path of a file, text, or object.
            dry_run: have the cluster check it and keep nothing.

        Raises:
            UsageError: The manifest is wrong.
            NameTaken: A job of this name has another spec.
            Refused: The cluster finds the manifest wrong.
        """
        job = _read(manifest)
        namespace = self._namespace_of(job)
        body = as_written(job)
        body["metadata"]["namespace"] = namespace
        what = f"submit job {job.metadata.name}"
        made = self._connection.create(_KIND, namespace, body, what=what, dry_run=dry_run)
        if made is not None:
            return TrainJob(made)
        there = self._get(namespace, job.metadata.name)
        if differing := _differing(job, there.job):
            raise NameTaken(
                f"namespace {namespace} has a job {there.name} with another spec ({', '.join(differing)}):"
                " change metadata.name; or delete that job first (unmask cancel --delete"
                f" {there.name} --namespace {namespace}; checkpoints stay);"
                " or change in place what may change (kubectl apply)"
            )
        if there.cancelled and not job.spec.suspend:
            return self._let_go_on(there, dry_run=dry_run)
        return there

    def get(self, name: str) -> TrainJob:
        """Return a job; raises ``NotFound``."""
        return self._get(self.namespace, name)

    def list(self, *, all_namespaces: bool = False) -> Sequence[TrainJob]:
        """Return all jobs, the newest last."""
        place = None if all_namespaces else self.namespace
        found = [TrainJob(one) for one in self._connection.list(_KIND, place, what="list training jobs")]
        return sorted(found, key=lambda job: (job.raw["metadata"]["creationTimestamp"], job.name))

    def wait(
        self,
        name: str,
        *,
        timeout: float | None = None,
        poll: float = 2.0,
        observe: Callable[[TrainJob], None] = lambda job: None,
    ) -> TrainJob:
        """Wait until a job has ended, and return it.

        Args:
            name: which one.
            timeout: seconds; by default for ever.
            poll: seconds between two looks.
            observe: called with what each look finds.

        Raises:
            WaitedTooLong: It has not ended in time.
            NotFound: It is not there, or was deleted meanwhile.
        """
        end = None if timeout is None else time.monotonic() + timeout
        job = self.get(name)
        uid = job.uid
        while True:
            observe(job)
            if job.state.ended:
                return job
            if end is not None and time.monotonic() >= end:
                raise WaitedTooLong(f"job {name} has not ended after {timeout:g} s: it is {job.state}")
            self._connection.sleep(poll)
            job = self.get(name)
            if job.uid != uid:
                raise NotFound(
                    f"job {name} was deleted while it was waited for; the one there now is another"
                )

    def logs(
        self,
        name: str,
        *,
        node: int = 0,
        follow: bool = False,
        since: datetime.datetime | None = None,
        tail: int | None = None,
        attempt: int | None = None,
    ) -> Iterator[Line]:
        """Yield what a node of the job prints.

        Args:
            name: which job.
            node: which node, from 0; the first one tells of the whole job.
            follow: wait for more, through restarts, until the job has ended.
            since: leave out what was written before.
            tail: only so many of the last lines of each pod.
            attempt: of this attempt alone; by default those whose pods are there.

        Raises:
            NotFound: There is no such job, or no pod to read from.
        """
        first = self.get(name)

        def read() -> TrainJob:
            try:
                job = self.get(name)
            except NotFound:
                job = None
            if job is None or job.uid != first.uid:
                deleted = {
                    **first.raw["metadata"],
                    "deletionTimestamp": first.raw["metadata"]["creationTimestamp"],
                }
                return TrainJob({**first.raw, "metadata": deleted})
            return job

        return logs.node_lines(
            self._connection, read, node=node, follow=follow, since=since, tail=tail, attempt=attempt
        )

    def cancel(self, name: str, *, dry_run: bool = False) -> TrainJob:
        """Stop a job: its pods save and end, and the job stays, with its status and its checkpoints.

        Submitting its manifest again lets it go on. A job that has ended stays as it is.
        """
        job = self.get(name)
        if job.state.ended or job.cancelled:
            return job
        patch = {"metadata": {"annotations": {CANCELLED: "true"}, "uid": job.uid}, "spec": {"suspend": True}}
        return self._patch(job, patch, what=f"cancel job {name}", dry_run=dry_run)

    def delete(self, name: str, *, dry_run: bool = False) -> TrainJob:
        """Delete a job and what was made for it, and return what it was; checkpoints and models stay."""
        job = self.get(name)
        what = f"delete job {name}"
        self._connection.delete(_KIND, job.namespace, name, job.uid, what=what, dry_run=dry_run)
        return job

    def pods(self, job: TrainJob) -> Sequence[JsonObject]:
        """Return the job's pods, ordered by attempt and node, as the API server keeps them."""
        return logs.pods_of(self._connection, job)

    def events(self, job: TrainJob) -> Sequence[JsonObject]:
        """Return what was noted about the job (``events.k8s.io/v1``), the oldest first."""
        found = self._connection.list(
            EVENT,
            job.namespace,
            what=f"list events of job {job.name}",
            fieldSelector=f"regarding.name={job.name},regarding.kind={_KIND.kind}",
        )
        about = [one for one in found if (one.get("regarding") or {}).get("uid") == job.uid]
        return sorted(about, key=_last_seen)

    def _let_go_on(self, there: TrainJob, *, dry_run: bool) -> TrainJob:
        patch = {"metadata": {"annotations": {CANCELLED: None}, "uid": there.uid}, "spec": {"suspend": False}}
        return self._patch(there, patch, what=f"let job {there.name} go on", dry_run=dry_run)

    def _patch(self, job: TrainJob, patch: JsonObject, *, what: str, dry_run: bool) -> TrainJob:
        changed = self._connection.merge(_KIND, job.namespace, job.name, patch, what=what, dry_run=dry_run)
        return TrainJob(changed)

    def _get(self, namespace: str, name: str) -> TrainJob:
        return TrainJob(self._connection.get(_KIND, namespace, name, what=f"get job {name}"))

    def _namespace_of(self, job: DiffusionTrainJob) -> str:
        own = job.metadata.namespace
        if own and self._chosen and own != self._chosen:
            raise UsageError(
                f"metadata.namespace is {own}, and the namespace asked for is {self._chosen}: drop one"
            )
        return own or self.namespace


def _read(manifest: Manifest) -> DiffusionTrainJob:
    match manifest:
        case DiffusionTrainJob():
            return manifest
        case Path():
            return read_manifest(manifest)
        case str() if "\n" not in manifest and not manifest.lstrip().startswith("{"):
            return read_manifest(Path(manifest))
        case str():
            return admit(manifest)
    return admit(json.dumps(manifest))


def as_written(job: DiffusionTrainJob) -> JsonObject:
    """Return the manifest without defaults, as ``kubectl apply`` would send it."""
    body: JsonObject = job.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    body.pop("status", None)
    kept = ("name", "namespace", "labels", "annotations")
    body["metadata"] = {key: value for key, value in body["metadata"].items() if key in kept}
    return body


def _differing(mine: DiffusionTrainJob, theirs: DiffusionTrainJob) -> list[str]:
    """Return the fields of the spec that differ, whether it stands still left aside."""
    one, other = (job.spec.to_json_dict() for job in (mine, theirs))
    keys = [*one, *(key for key in other if key not in one)]
    return [f"spec.{key}" for key in keys if key != "suspend" and one.get(key) != other.get(key)]


def _last_seen(event: JsonObject) -> str:
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("eventTime") or "")
