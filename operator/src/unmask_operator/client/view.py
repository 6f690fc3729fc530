"""A training job as people see it: its state in a word, and the rest of its status typed."""

import datetime
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from unmask_api.base import ApiModel
from unmask_api.metadata import Condition
from unmask_api.train_job import DiffusionTrainJob
from unmask_api.train_status import TrainStatus
from unmask_operator.client.errors import ClusterError
from unmask_operator.decision import JsonObject

__all__ = ["CANCELLED", "JobState", "TrainJob"]

CANCELLED = "unmask.dev/cancelled"
"""Annotation of a job that somebody cancelled; it tells this from a pause."""


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
class TrainJob:
    """A training job on a cluster, as it was when it was read."""

    raw: JsonObject
    """The whole object, as the API server keeps it."""

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return str(self.raw["metadata"].get("namespace", "default"))

    @property
    def uid(self) -> str:
        """Its identity: a later job of the same name has another."""
        return str(self.raw["metadata"].get("uid", ""))

    @property
    def created(self) -> datetime.datetime | None:
        """When it was submitted; ``None`` of one that was not."""
        stamp = self.raw["metadata"].get("creationTimestamp")
        return datetime.datetime.fromisoformat(stamp) if stamp else None

    @property
    def job(self) -> DiffusionTrainJob:
        """The manifest, with all defaults.

        Raises:
            ClusterError: It has fields that this version does not know.
        """
        kept = {key: self.raw[key] for key in ("apiVersion", "kind", "spec")}
        try:
            return DiffusionTrainJob.model_validate(
                kept | {"metadata": {"name": self.name}}, by_alias=True, strict=False
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ClusterError(
                f"job {self.name} has what this version of unmask does not know: {where}: {first['msg']};"
                " install the version that the cluster has"
            ) from None

    @property
    def status(self) -> TrainStatus:
        """What the operator says; what a newer one says beyond that is left out."""
        try:
            return TrainStatus.model_validate(
                _known(TrainStatus, self.raw.get("status") or {}), by_alias=True, strict=False
            )
        except ValidationError:
            return TrainStatus()

    @property
    def state(self) -> JobState:
        """Where it stands."""
        metadata, status = self.raw["metadata"], self.raw.get("status") or {}
        if metadata.get("deletionTimestamp"):
            return JobState.DELETING
        word = status.get("state")
        stands = word in (None, "Suspended")
        if stands and self.raw["spec"].get("suspend"):
            return JobState.CANCELLED if self.cancelled else JobState.SUSPENDED
        if word is None:
            return JobState.SUBMITTED
        return JobState(word) if word in set(JobState) else JobState.UNKNOWN

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancelled it, even if its pods have not ended yet."""
        annotations = self.raw["metadata"].get("annotations") or {}
        return bool(self.raw["spec"].get("suspend")) and annotations.get(CANCELLED) == "true"

    def condition(self, kind: str) -> Condition | None:
        """Return a condition of the status, if it is set."""
        return next((one for one in self.status.conditions if one.type == kind), None)

    def to_json_dict(self) -> dict[str, Any]:
        """Return the object for programs: without what only the API server needs."""
        metadata = {key: value for key, value in self.raw["metadata"].items() if key != "managedFields"}
        return {**self.raw, "metadata": metadata}


def _known(model: type[ApiModel], value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``value`` that ``model`` has, in it and below."""
    names = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    return {key: _known_below(names[key], below) for key, below in value.items() if key in names}


def _known_below(annotation: Any, value: Any) -> Any:
    models = [one for one in (annotation, *getattr(annotation, "__args__", ())) if _is_model(one)]
    if models and isinstance(value, Mapping):
        return _known(models[0], value)
    if models and isinstance(value, list):
        return [_known(models[0], one) if isinstance(one, Mapping) else one for one in value]
    return value


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, ApiModel)
