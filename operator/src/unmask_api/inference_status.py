"""``DiffusionInferenceService.status``: what the operator observed.

Like that of a training job it is rebuilt from what exists. Read back are only the model that was found, since
its job may be gone; which revision was rolled out last; and when there last was progress.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from unmask_api.base import ApiModel, DecimalString
from unmask_api.metadata import Condition, Timestamp

__all__ = ["GroupStatus", "InferenceStatus", "ModelStatus"]

Whole = Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(max_length=4096)]


class ModelStatus(ApiModel):
    """The model that groups are made with."""

    uri: Text
    """Where it lies."""
    job: Text | None = None
    """Job and stage that it comes from."""
    revision: Text | None = None
    """What tells it apart from other files at the same place: of a job, its UID."""
    loss: DecimalString | None = None
    """Last training loss of that job."""


class GroupStatus(ApiModel):
    """A group that exists."""

    name: Text
    """Begins the names of its pods."""
    revision: Text
    """Revision that it was made with."""
    state: Literal["Starting", "Ready", "Available", "Ending"]
    """Ready: routable. Available: for at least ``rollout.minReadySeconds``. Ending: drained and removed."""
    ready_shards: Whole = 0
    """Shards that are ready."""
    restarts: Whole = 0
    """Restarts of its containers."""
    message: Text | None = None
    """What keeps it from being ready."""


class InferenceStatus(ApiModel):
    """Observed state of a service."""

    observed_generation: Whole | None = None
    """The generation of the spec that this status answers to."""
    state: Text | None = None
    """A word for people, made from the conditions; programs read those."""
    conditions: Annotated[
        tuple[Condition, ...],
        Field(
            max_length=32,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = ()
    """Facts by type; ``Ready`` is the summary: as many groups as asked for, as asked for, can be reached."""
    replicas: Whole = 0
    """Groups that exist, those that are ending aside."""
    ready_replicas: Whole = 0
    """Groups that can be reached."""
    available_replicas: Whole = 0
    """Groups that could be reached for ``rollout.minReadySeconds``."""
    updated_replicas: Whole = 0
    """Groups of ``updateRevision``."""
    updated_available_replicas: Whole = 0
    """Groups of ``updateRevision`` that are available."""
    selector: Text | None = None
    """Labels of the engines' pods, for autoscalers."""
    endpoint: Text | None = None
    """Where clients inside the cluster connect."""
    model: ModelStatus | None = None
    """The model that groups are made with."""
    current_revision: Text | None = None
    """The revision that was last rolled out whole."""
    update_revision: Text | None = None
    """The revision that the spec asks for."""
    last_progress_time: Timestamp | None = None
    """When the rollout last came nearer to its end."""
    groups: Annotated[tuple[GroupStatus, ...], Field(max_length=192)] = ()
    """Groups that exist, by name."""
