"""What a namespace of a cluster has: jobs and services, found by name whichever they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import UsageError
from unmask_operator.client.connection import Connection, connect
from unmask_operator.client.errors import ClusterError, NotAllowed, NotDefined, NotFound
from unmask_operator.client.job_view import TrainJob
from unmask_operator.client.jobs import TrainJobs
from unmask_operator.client.service_view import InferenceService
from unmask_operator.client.services import InferenceServices

__all__ = ["Cluster", "Listed", "connected"]


@dataclass(frozen=True, slots=True)
class Listed:
    """What there is."""

    jobs: Sequence[TrainJob]
    """The newest last."""
    services: Sequence[InferenceService]
    """The newest last."""
    notes: Sequence[str]
    """What could not be asked for, and why."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Jobs and services of a namespace."""

    jobs: TrainJobs
    services: InferenceServices

    @classmethod
    def over(cls, connection: Connection, namespace: str | None = None) -> "Cluster":
        """Return those of a namespace; by default the connection's."""
        return cls(TrainJobs(connection, namespace), InferenceServices(connection, namespace))

    def find(self, name: str) -> TrainJob | InferenceService:
        """Return the job or the service of this name; ``job/NAME`` and ``service/NAME`` say which.

        Who may see one kind alone finds that.

        Raises:
            UsageError: There are both.
            NotFound: There is neither.
        """
        kind, slash, bare = name.rpartition("/")
        if kind == "job":
            return self.jobs.get(bare)
        if kind == "service":
            return self.services.get(bare)
        if slash:
            raise UsageError(f"got {name}; write NAME, job/NAME or service/NAME")
        found: list[TrainJob | InferenceService] = []
        refused: list[ClusterError] = []
        for collection in (self.jobs, self.services):
            try:
                found.append(collection.get(name))
            except (NotAllowed, NotFound) as error:
                refused.append(error)
        if len(found) > 1:
            raise UsageError(
                f"namespace {self.jobs.namespace} has a job and a service {name}: say job/{name} or"
                f" service/{name}"
            )
        if found:
            return found[0]
        if barred := [error for error in refused if isinstance(error, NotAllowed)]:
            raise barred[0]
        if all(isinstance(error, NotDefined) for error in refused):
            raise refused[0]
        raise NotFound(
            f"cannot get job or service {name}: namespace {self.jobs.namespace} has none of that name; unmask"
            " ps --all-namespaces lists all"
        )

    def of(self, one: TrainJob | InferenceService) -> TrainJobs | InferenceServices:
        """Return the collection that one is of."""
        return self.jobs if isinstance(one, TrainJob) else self.services

    def list(self, *, all_namespaces: bool = False) -> Listed:
        """Return all jobs and services; of those that may not be asked for, why.

        Raises:
            ClusterError: Neither kind can be asked for.
        """
        refused: list[NotAllowed | NotDefined] = []
        jobs: Sequence[TrainJob] = ()
        services: Sequence[InferenceService] = ()
        try:
            jobs = self.jobs.list(all_namespaces=all_namespaces)
        except (NotAllowed, NotDefined) as error:
            refused.append(error)
        try:
            services = self.services.list(all_namespaces=all_namespaces)
        except (NotAllowed, NotDefined) as error:
            refused.append(error)
        if len(refused) > 1:
            raise refused[0]
        return Listed(jobs, services, [str(error) for error in refused])


def connected(
    *, namespace: str | None = None, context: str | None = None, kubeconfig: Path | str | None = None
) -> Cluster:
    """Connect to a cluster, as :meth:`TrainJobs.connect` does."""
    return Cluster.over(connect(kubeconfig, context), namespace)
