"""The parts of a Kubernetes object that every custom resource shares: metadata and conditions."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from unmask_api.base import ApiModel, Name

__all__ = ["Condition", "ObjectMeta"]

Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"}, max_length=40)]


class ObjectMeta(ApiModel):
    """Standard object metadata; all but the name, namespace, labels and annotations is set by the server."""

    name: Name
    """Name of the object; names of pods and folders are made from it."""
    namespace: str | None = None
    """Namespace of the object; without meaning on a laptop."""
    labels: dict[str, str] = {}
    """Labels to find the object by."""
    annotations: dict[str, str] = {}
    """Notes of other tools."""
    uid: str | None = None
    """Set by the server."""
    generation: int | None = None
    """Counts the changes of the spec; set by the server."""
    resource_version: str | None = None
    """Set by the server."""
    creation_timestamp: str | None = None
    """Set by the server."""
    deletion_timestamp: str | None = None
    """Set by the server."""
    deletion_grace_period_seconds: int | None = None
    """Set by the server."""
    owner_references: list[dict[str, Any]] = []
    """What this object is deleted with."""
    finalizers: list[str] = []
    """What has to happen before the object is gone."""
    managed_fields: list[dict[str, Any]] = []
    """Who set which field; set by the server."""


class Condition(ApiModel):
    """One observed fact about the object, as ``metav1.Condition``."""

    type: Annotated[str, StringConstraints(max_length=316)]
    """Which fact, such as ``Succeeded``."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """The generation of the spec that the fact was observed for."""
    last_transition_time: Timestamp
    """When the status last changed."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """Why, as one CamelCase word for programs."""
    message: Annotated[str, StringConstraints(max_length=32768)]
    """Why, for people."""
