"""TorchX's scheduler ``kubernetes_unmask``: its applications are the training jobs of a cluster.

``torchx run`` makes a DiffusionTrainJob of the manifest that ``unmask.train`` names; ``status``, ``log``,
``cancel``, ``delete``, ``describe`` and ``list`` work on every job, whoever made it. The operator runs it.

Written against what torchx 0.7.0 and its nightly releases share.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream
from torchx.specs import (
    AppDef,
    AppDryRunInfo,
    AppState,
    ReplicaStatus,
    Role,
    RoleStatus,
    runopts,
)

from unmask_api.train_job import DiffusionTrainJob
from unmask_operator import yaml_dialect
from unmask_operator.client.errors import ClusterError, NotFound
from unmask_operator.client.job_advice import obstacle
from unmask_operator.client.job_logs import attempt_of, index_of
from unmask_operator.client.job_view import JobState, TrainJob
from unmask_operator.client.jobs import TrainJobs
from unmask_operator.client.manifests import as_written
from unmask_operator.decision import JsonObject
from unmask_operator.launch import application
from unmask_operator.launch.admission import read_manifest
from unmask_operator.launch.pods import CONTAINER

__all__ = ["NAME", "Submission", "UnmaskScheduler", "create_scheduler"]

NAME = "kubernetes_unmask"
"""The scheduler, as ``torchx run --scheduler`` knows it."""

_STATES = {
    JobState.SUBMITTED: AppState.SUBMITTED,
    JobState.WAITING: AppState.PENDING,
    JobState.QUEUED: AppState.PENDING,
    JobState.STARTING: AppState.PENDING,
    JobState.RESTARTING: AppState.PENDING,
    JobState.STALLED: AppState.PENDING,
    JobState.SUSPENDED: AppState.PENDING,
    JobState.RUNNING: AppState.RUNNING,
    JobState.SUCCEEDED: AppState.SUCCEEDED,
    JobState.FAILED: AppState.FAILED,
    JobState.CANCELLED: AppState.CANCELLED,
    JobState.DELETING: AppState.CANCELLED,
    JobState.UNKNOWN: AppState.UNKNOWN,
}
_PHASES = {
    "Pending": AppState.PENDING,
    "Running": AppState.RUNNING,
    "Succeeded": AppState.SUCCEEDED,
    "Failed": AppState.FAILED,
}


@dataclass(frozen=True, slots=True)
class Submission:
    """What ``torchx run`` asks of the cluster."""

    job: DiffusionTrainJob
    """The job to make."""
    namespace: str | None
    """Where; by default the manifest's own namespace, else that of the kubeconfig's context."""

    def __str__(self) -> str:
        """Return the manifest."""
        return yaml_dialect.dump(as_written(self.job))


class UnmaskScheduler(Scheduler):  # type: ignore[misc]  # torchx has no type information
    """The training jobs of the cluster that the kubeconfig names."""

    def __init__(self, session_name: str) -> None:
        super().__init__(NAME, session_name)
        self._connected: dict[str | None, TrainJobs] = {}

    def schedule(self, dryrun_info: "AppDryRunInfo[Submission]") -> str:
        """Make the job, or find the one that is there; return its application id, ``NAMESPACE:NAME``."""
        submission = dryrun_info.request
        job = self._jobs(submission.namespace).submit(submission.job)
        return f"{job.namespace}:{job.name}"

    def _submit_dryrun(self, app: AppDef, cfg: Mapping[str, Any]) -> "AppDryRunInfo[Submission]":
        manifest = read_manifest(Path(application.job_file_of(app)))
        job = application.to_job(app, manifest)
        return AppDryRunInfo(Submission(job, cfg.get("namespace")), str)

    def _validate(self, app: AppDef, scheduler: str, *args: object) -> None:
        """Let the manifest say what a job takes: TorchX would ask the role."""

    def _run_opts(self) -> runopts:
        options = runopts()
        options.add(
            "namespace",
            type_=str,
            default=None,
            help="Kubernetes namespace of the job (default: the manifest's, else the context's)",
        )
        return options

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return state, roles and pods of a job; ``None`` where there is none."""
        jobs, name = self._find(app_id)
        try:
            job = jobs.get(name)
        except NotFound:
            return None
        try:
            roles: list[Role] = application.of_job(job.job, f"{name}.yaml").roles
        except ClusterError:  # of a newer version: its state can be told all the same
            roles = []
        return DescribeAppResponse(
            app_id=app_id,
            state=_STATES[job.state],
            num_restarts=job.status.restarts,
            msg=obstacle(job),
            roles=roles,
            roles_statuses=[RoleStatus(CONTAINER, _replicas(job, jobs.pods(job)))],
        )

    def list(self, cfg: Mapping[str, Any] | None = None) -> list[ListAppResponse]:
        """Return all jobs of the namespace."""
        jobs = self._jobs((cfg or {}).get("namespace"))
        return [
            ListAppResponse(app_id=f"{job.namespace}:{job.name}", state=_STATES[job.state])
            for job in jobs.list()
        ]

    def _cancel_existing(self, app_id: str) -> None:
        jobs, name = self._find(app_id)
        jobs.cancel(name)

    def _delete_existing(self, app_id: str) -> None:
        jobs, name = self._find(app_id)
        jobs.delete(name)

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime.datetime | None = None,
        until: datetime.datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Yield the lines of node ``k``; Kubernetes keeps both streams in one.

        Raises:
            ValueError: ``streams`` asks for one of them, or there is no such role.
        """
        if streams not in (None, Stream.COMBINED):
            raise ValueError(f"streams: got {streams}; Kubernetes keeps combined logs alone: drop it")
        if role_name != CONTAINER:
            raise ValueError(f"role: got {role_name}; a training job has {CONTAINER} alone")
        jobs, name = self._find(app_id)
        for line in jobs.logs(name, node=k, follow=should_tail, since=_aware(since)):
            if until is not None and line.time is not None and line.time > _aware(until):
                return
            if regex is None or re.search(regex, line.text):
                yield f"{line.text}\n"

    def _find(self, app_id: str) -> tuple[TrainJobs, str]:
        namespace, _, name = app_id.rpartition(":")
        return self._jobs(namespace or None), name

    def _jobs(self, namespace: str | None) -> TrainJobs:
        if namespace not in self._connected:
            self._connected[namespace] = TrainJobs.connect(namespace=namespace)
        return self._connected[namespace]


def create_scheduler(session_name: str, **kwargs: object) -> UnmaskScheduler:
    """Return the scheduler; where the cluster is, the kubeconfig says."""
    return UnmaskScheduler(session_name)


def _replicas(job: TrainJob, pods: Sequence[JsonObject]) -> "list[ReplicaStatus]":
    """Return the state of each pod of the present attempt."""
    newest = max((attempt_of(pod) for pod in pods), default=0)
    return [
        ReplicaStatus(
            id=index_of(pod),
            state=_PHASES.get(pod.get("status", {}).get("phase"), AppState.UNKNOWN),
            role=CONTAINER,
            hostname=pod.get("spec", {}).get("nodeName") or "",
            structured_error_msg=_error(job, pod),
        )
        for pod in pods
        if attempt_of(pod) == newest
    ]


def _error(job: TrainJob, pod: JsonObject) -> str:
    """Return why a pod failed, in the form of torchelastic's error files; ``<NONE>`` of all others."""
    failure = job.status.failure
    if failure is None or failure.pod != pod["metadata"]["name"]:
        return "<NONE>"
    at = datetime.datetime.fromisoformat(failure.time).timestamp() if failure.time else 0
    message = {
        "message": f"{failure.reason}: {failure.message}",
        "errorCode": failure.exit_code,
        "extraInfo": {"timestamp": int(at)},
    }
    return json.dumps({"message": message})


def _aware(time: datetime.datetime | None) -> Any:
    """Return a time that knows its zone: one without is of this machine."""
    return None if time is None else time.astimezone()
