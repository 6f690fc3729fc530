"""``DiffusionTrainJob.status``: what the operator observed. Conditions instead of phases, numbers as strings.

The status is rebuilt from what exists, so nothing here is ever read back as the truth about the job
except ``attempt`` and the restart counts, which nothing else remembers.
"""

from typing import Annotated

from pydantic import Field, StringConstraints

from unmask_api.base import ApiModel, DecimalString
from unmask_api.metadata import Condition, Timestamp

__all__ = ["CheckpointStatus", "Failure", "HistoryEntry", "NodeCounts", "Progress", "TrainStatus"]

Whole = Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(max_length=4096)]


class Progress(ApiModel):
    """How far training is, as the trainer last reported it."""

    step: Whole
    """Optimiser steps done, over all stages."""
    total_steps: Whole
    """Optimiser steps of all stages."""
    stage: Text | None = None
    """Name of the stage that runs."""
    percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    """Steps done in percent, rounded down."""
    loss: DecimalString | None = None
    """Training loss of the last step."""
    learning_rate: DecimalString | None = None
    """Learning rate of the last step."""
    tokens_per_second: DecimalString | None = None
    """Tokens trained on per second, over all processes."""
    estimated_remaining_seconds: Whole | None = None
    """Time to the last step at the present speed."""
    last_progress_time: Timestamp | None = None
    """When ``step`` last grew."""
    last_report_time: Timestamp | None = None
    """When the trainer last answered."""


class CheckpointStatus(ApiModel):
    """The newest committed checkpoint."""

    latest_step: Whole
    """The step that it was taken after."""
    latest_uri: Text
    """Where it lies."""
    last_saved_time: Timestamp | None = None
    """When it was committed."""


class Failure(ApiModel):
    """Why an attempt ended, from the first process that failed."""

    reason: Text
    """One CamelCase word for programs."""
    message: Text
    """One line for people: what is wrong and what to change."""
    exit_code: int | None = None
    """Exit code of the process."""
    pod: Text | None = None
    """The pod it ran in."""
    node: Text | None = None
    """The machine the pod ran on."""
    attempt: Whole | None = None
    """Which attempt failed."""
    time: Timestamp | None = None
    """When."""


class NodeCounts(ApiModel):
    """Pods of the present attempt, one per node."""

    desired: Whole
    """How many there should be."""
    ready: Whole = 0
    """How many are ready."""
    failed: Whole = 0
    """How many failed."""


class HistoryEntry(ApiModel):
    """An attempt that has ended."""

    attempt: Whole
    """Which one, from 0."""
    start_time: Timestamp | None = None
    """When its pods were made."""
    end_time: Timestamp | None = None
    """When its end was noticed."""
    reason: Text
    """How it ended, as one CamelCase word."""
    from_step: Whole | None = None
    """Steps done when it first reported."""
    to_step: Whole | None = None
    """Steps done when it last reported."""


class TrainStatus(ApiModel):
    """Observed state of a training job."""

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
    """Facts by type; ``Succeeded`` is the summary, Unknown while the job is active."""
    start_time: Timestamp | None = None
    """When the job started, or was last resumed."""
    completion_time: Timestamp | None = None
    """When the job ended, either way."""
    attempt: Whole = 0
    """The present attempt, from 0."""
    restarts: Whole = 0
    """Restarts so far, of every kind."""
    restarts_counted: Whole = 0
    """Restarts that count towards ``runPolicy.maxRestarts``."""
    backoff: Whole = 0
    """Restarts in a row since an attempt last ran for ``runPolicy.resetAfterSeconds``."""
    next_attempt_time: Timestamp | None = None
    """When the present attempt may start; absent, at once."""
    model_uri: Text | None = None
    """The first weights, where the manifest names a job; looked up once, so that restarts find the same."""
    selector: Text | None = None
    """Labels of the job's pods, for autoscalers."""
    nodes: NodeCounts | None = None
    """Pods of the present attempt."""
    progress: Progress | None = None
    """How far training is."""
    checkpoint: CheckpointStatus | None = None
    """The newest committed checkpoint."""
    failure: Failure | None = None
    """Why the last failed attempt ended."""
    history: Annotated[tuple[HistoryEntry, ...], Field(max_length=10)] = ()
    """The last attempts that ended, the newest last."""
