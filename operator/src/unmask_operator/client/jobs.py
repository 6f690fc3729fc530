"""Training jobs on a cluster: submit, get, list, wait, logs, cancel, delete.

Everything here may be done twice: submitting the same manifest again finds the job, cancelling a cancelled
job changes nothing, and so on. So a request whose answer was lost is simply sent again.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.client import job_logs
from unmask_operator.client.custom_objects import CustomObjects
from unmask_operator.client.errors import NameTaken
from unmask_operator.client.job_logs import Line
from unmask_operator.client.job_view import TrainJob
from unmask_operator.client.manifests import admitted, as_written
from unmask_operator.decision import JsonObject
from unmask_operator.launch.admission import admit, read_manifest
from unmask_operator.resources import RESOURCES

__all__ = ["Manifest", "TrainJobs"]

Manifest = Path | str | Mapping[str, Any] | DiffusionTrainJob
"""A manifest: its path, or what it holds."""


class TrainJobs(CustomObjects[TrainJob]):
    """The training jobs of a namespace.

    >>> from unmask_operator.client import TrainJobs
    >>> jobs = TrainJobs.connect(namespace="ml")  # doctest: +SKIP
    >>> jobs.wait(jobs.submit("job.yaml").name).state  # doctest: +SKIP
    <JobState.SUCCEEDED: 'Succeeded'>

    Every method raises :class:`~unmask_operator.client.errors.ClusterError`, or one of its kinds, where the
    cluster cannot be asked or says no.
    """

    resource = RESOURCES["DiffusionTrainJob"]
    view = TrainJob
    several = "training jobs"

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
        job = admitted(manifest, DiffusionTrainJob, read=read_manifest, admit=admit)
        namespace = self._namespace_of(job.metadata)
        body = as_written(job)
        body["metadata"]["namespace"] = namespace
        what = f"submit job {job.metadata.name}"
        made = self._connection.create(self.resource, namespace, body, what=what, dry_run=dry_run)
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

        return job_logs.node_lines(
            self._connection,
            lambda: self._last_known(first),
            node=node,
            follow=follow,
            since=since,
            tail=tail,
            attempt=attempt,
        )

    def cancel(self, name: str, *, dry_run: bool = False) -> TrainJob:
        """Stop a job: its pods save and end, and the job stays, with its status and its checkpoints.

        Submitting its manifest again lets it go on. A job that has ended stays as it is.
        """
        job = self.get(name)
        if job.state.ended or job.cancelled:
            return job
        return self._cancel(job, dry_run=dry_run)

    def pods(self, one: TrainJob) -> Sequence[JsonObject]:
        """Return the job's pods, ordered by attempt and node, as the API server keeps them."""
        return job_logs.pods_of(self._connection, one)


def _differing(mine: DiffusionTrainJob, theirs: DiffusionTrainJob) -> list[str]:
    """Return the fields of the spec that differ, whether it stands still left aside."""
    one, other = (job.spec.to_json_dict() for job in (mine, theirs))
    keys = [*one, *(key for key in other if key not in one)]
    return [f"spec.{key}" for key in keys if key != "suspend" and one.get(key) != other.get(key)]
