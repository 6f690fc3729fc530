"""A service as people see it: its state in a word, its groups, and the rest of its status typed."""

import datetime
import enum
from dataclasses import dataclass
from typing import ClassVar

from unmask_api.inference_service import DiffusionInferenceService
from unmask_api.inference_status import InferenceStatus
from unmask_api.metadata import Condition
from unmask_operator.client.custom_object import CustomObject

__all__ = ["InferenceService", "ServiceState"]


class ServiceState(enum.StrEnum):
    """Where a service stands, in a word."""

    SUBMITTED = "Submitted"
    """No operator has looked at it, or at its last change, yet."""
    WAITING = "Waiting"
    """A job is to make the model that it serves."""
    PROGRESSING = "Progressing"
    """Its groups are being made or replaced."""
    READY = "Ready"
    """As many groups as asked for answer, made as asked for."""
    DEGRADED = "Degraded"
    """It was ready, and a group was lost."""
    PAUSED = "Paused"
    """Groups of an older revision stay until ``spec.rollout.paused`` is false again."""
    STUCK = "Stuck"
    """It made no progress for ``spec.rollout.progressDeadlineSeconds``."""
    STALLED = "Stalled"
    """Something that only a person can change is in the way."""
    STOPPING = "Stopping"
    """Its groups are ending, and none follow."""
    STOPPED = "Stopped"
    """There are no groups, and there are to be none."""
    DELETING = "Deleting"
    """It is being deleted."""
    UNKNOWN = "Unknown"
    """A word that this version does not know."""


@dataclass(frozen=True, slots=True)
class InferenceService(CustomObject):
    """A service on a cluster, as it was when it was read."""

    noun: ClassVar[str] = "service"
    halt: ClassVar[str] = "stopped"

    @property
    def service(self) -> DiffusionInferenceService:
        """The manifest, with all defaults.

        Raises:
            ClusterError: It has fields that this version does not know.
        """
        return self._manifest(DiffusionInferenceService)

    @property
    def status(self) -> InferenceStatus:
        """What the operator says; what a newer one says beyond that is left out."""
        return self._status(InferenceStatus)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What its status says, fact by fact."""
        return self.status.conditions

    @property
    def seen(self) -> bool:
        """Whether the status is about the spec as it is."""
        observed = (self.raw.get("status") or {}).get("observedGeneration")
        return bool(observed == self.raw["metadata"].get("generation"))

    @property
    def state(self) -> ServiceState:
        """Where it stands."""
        if self.deleting:
            return ServiceState.DELETING
        word = (self.raw.get("status") or {}).get("state")
        if word is None or not self.seen:
            return ServiceState.SUBMITTED
        return ServiceState(word) if word in set(ServiceState) else ServiceState.UNKNOWN

    @property
    def settled(self) -> bool:
        """Whether it is as it was asked to be, or no longer gets nearer to that."""
        return self.state in (
            ServiceState.READY,
            ServiceState.PAUSED,
            ServiceState.STUCK,
            ServiceState.STOPPED,
        )

    @property
    def wanted(self) -> int:
        """Groups that there should be."""
        spec = self.raw["spec"]
        return 0 if spec.get("stopped") else int(spec.get("replicas", 1))

    @property
    def shards(self) -> int:
        """Expert shards that a group should have."""
        return int(self.raw["spec"].get("group", {}).get("shards", 0))

    @property
    def job_of_model(self) -> str | None:
        """The job whose model it serves, if it is a job's."""
        source = self.raw["spec"]["model"].get("job") or {}
        return source.get("name")

    @property
    def model(self) -> str:
        """Where the model lies; of a job whose model is not known yet, ``job/NAME``."""
        if found := self.status.model:
            return found.uri
        return str(self.raw["spec"]["model"].get("uri") or f"job/{self.job_of_model}")

    @property
    def revision(self) -> str:
        """The revision of its groups: while groups are replaced, both, as in ``old -> new``."""
        status = self.status
        names = dict.fromkeys(name for name in (status.current_revision, status.update_revision) if name)
        return " -> ".join(names)

    @property
    def changed(self) -> datetime.datetime | None:
        """When somebody last changed it, as far as the API server noted it; else when it was made."""
        stamps = [
            datetime.datetime.fromisoformat(entry["time"])
            for entry in self.raw["metadata"].get("managedFields") or ()
            if "time" in entry and entry.get("subresource") != "status"
        ]
        return max(stamps, default=self.created)
