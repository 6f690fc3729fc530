"""A training job as people see it: its state in a word, and the rest of its status typed."""

import enum
from dataclasses import dataclass
from typing import ClassVar

from unmask_api.metadata import Condition
from unmask_api.train_job import DiffusionTrainJob
from unmask_api.train_status import TrainStatus
from unmask_operator.client.custom_object import CustomObject

__all__ = ["JobState", "TrainJob"]


class JobState(enum.StrEnum):
    """Where a job stands, in a word."""

    SUBMITTED = "Submitted"
    """No operator has looked at it yet."""
    WAITING = "Waiting"
    """Another job is to make the model that it begins with."""
    QUEUED = "Queued"
    """A queue has not admitted it."""
    STARTING = "Starting"
    """Its pods are being made, placed and started."""
    RUNNING = "Running"
    """It trains."""
    RESTARTING = "Restarting"
    """An attempt ended, and the next one follows."""
    STALLED = "Stalled"
    """Something that only a person can change is in the way."""
    SUSPENDED = "Suspended"
    """It stands still until ``spec.suspend`` is false again."""
    CANCELLED = "Cancelled"
    """Somebody cancelled it; submitting it again lets it go on."""
    DELETING = "Deleting"
    """It is being deleted."""
    SUCCEEDED = "Succeeded"
    """All stages are trained."""
    FAILED = "Failed"
    """It ended, and no further attempt follows."""
    UNKNOWN = "Unknown"
    """A word that this version does not know."""

    @property
    def ended(self) -> bool:
        """Whether nothing more happens unless somebody does something."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class TrainJob(CustomObject):
    """A training job on a cluster, as it was when it was read."""

    noun: ClassVar[str] = "job"
    halt: ClassVar[str] = "suspend"

    @property
    def job(self) -> DiffusionTrainJob:
        """The manifest, with all defaults.

        Raises:
            ClusterError: It has fields that this version does not know.
        """
        return self._manifest(DiffusionTrainJob)

    @property
    def status(self) -> TrainStatus:
        """What the operator says; what a newer one says beyond that is left out."""
        return self._status(TrainStatus)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What its status says, fact by fact."""
        return self.status.conditions

    @property
    def state(self) -> JobState:
        """Where it stands."""
        if self.deleting:
            return JobState.DELETING
        word = (self.raw.get("status") or {}).get("state")
        stands = word in (None, "Suspended")
        if stands and self.raw["spec"].get("suspend"):
            return JobState.CANCELLED if self.cancelled else JobState.SUSPENDED
        if word is None:
            return JobState.SUBMITTED
        return JobState(word) if word in set(JobState) else JobState.UNKNOWN

    @property
    def settled(self) -> bool:
        """Whether it has ended."""
        return self.state.ended
