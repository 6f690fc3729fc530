"""A run: the processes that share it, and how it is measured, saved and told of."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from unmask_api.base import ApiModel, Count, DecimalString, Rule, StoreUri

__all__ = ["Checkpoint", "Evaluation", "GenerationEvaluation", "Parallelism", "Telemetry"]


class Parallelism(ApiModel):
    """Processes that train together, and who of them holds what; a run may go on with another arrangement."""

    rules: ClassVar = (
        Rule(
            rule="has(self.replicas) == (self.shard == 'Hybrid')",
            message="shard Hybrid needs replicas, and nothing else has them: set replicas, or change shard",
            field_path=".replicas",
        ),
        Rule(
            rule="!has(self.replicas) || self.nodes * self.processesPerNode % self.replicas == 0",
            message="replicas must divide nodes * processesPerNode: change one of them",
            field_path=".replicas",
        ),
        Rule(
            rule="self.expertParallel == 1 || self.shard != 'None'",
            message="experts are spread over processes only where parameters are: set shard to Full or"
            " Hybrid, or expertParallel to 1",
            field_path=".expertParallel",
        ),
        Rule(
            rule="self.nodes * self.processesPerNode"
            " % ((has(self.replicas) ? self.replicas : 1) * self.expertParallel) == 0",
            message="expertParallel must divide the processes of a replica"
            " (nodes * processesPerNode / replicas): change one of them",
            field_path=".expertParallel",
        ),
    )

    nodes: Annotated[int, Field(ge=1, le=4096)] = 1
    """Machines (pods); on a laptop, launcher processes."""
    processes_per_node: Annotated[int, Field(ge=1, le=64)] = 1
    """Worker processes on each, one per GPU."""
    micro_batch_rows: Annotated[int, Field(ge=1, le=65536)] = 1
    """At most this many rows in one forward pass of a process; a step takes as many passes as it needs."""
    shard: Literal["None", "Full", "Hybrid"] = "None"
    """Who holds weights, gradients and optimiser state.

    ``None``: every process all of them. ``Full``: each process a part, and layers are gathered when they
    compute. ``Hybrid``: each of ``replicas`` groups all of them, shared out inside the group.
    """
    replicas: Annotated[int, Field(ge=2, le=4096)] | None = None
    """Groups of processes that each hold the whole model; required by ``Hybrid`` alone."""
    expert_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """Neighbouring processes that share out the experts of a layer: tokens travel, experts stay.

    Must divide the processes of a replica and the number of experts.
    """
    activation_checkpointing: Literal["None", "Full"] = "None"
    """``Full``: keep only the inputs of each layer, and compute the rest again in the backward pass."""

    @property
    def processes(self) -> int:
        """Worker processes in all."""
        return self.nodes * self.processes_per_node


class GenerationEvaluation(ApiModel):
    """Measure by generating answers to validation prompts."""

    rules: ClassVar = (
        Rule(
            rule="double(self.threshold) > 0.0 && double(self.threshold) <= 1.0",
            message="the confidence threshold must be above 0 and at most 1",
            field_path=".threshold",
        ),
    )

    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Prompts to answer, the first ones of the validation data."""
    threshold: DecimalString = "0.9"
    """Confidence above which a token is kept."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 64
    """Longest answer, in tokens."""


class Evaluation(ApiModel):
    """Measurements on validation data while training."""

    every_steps: Count
    """Steps between measurements; there is also one at the end of every stage."""
    batches: Annotated[int, Field(ge=1, le=65536)] = 4
    """Batches of ``rowsPerStep`` rows that the validation loss is taken over."""
    generation: GenerationEvaluation | None = None
    """Also generate answers; for completion and messages data."""


class Checkpoint(ApiModel):
    """Where a run lives and how often it is saved."""

    uri: StoreUri
    """The run folder: checkpoints, metrics, exports and the final model.

    In an object store, whose keys come from ``credentials``, the run works on a copy in a scratch folder of
    each machine: a checkpoint counts once its manifest is in the store. See docs/checkpoints.md.
    """
    every_steps: Count = 100
    """Steps between checkpoints; there is also one after the last step."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 3
    """Checkpoints to keep."""
    resume: Literal["Auto", "Never"] = "Auto"
    """Go on from the newest committed checkpoint, or refuse to start in a run folder that holds one."""
    asynchronous: bool = False
    """Train on while a checkpoint is written: it is copied to host memory first, which needs as much again.

    At most one is being written. If that fails, the run ends after the step at hand. Those at the end of a
    stage and on request to stop are waited for.
    """


class Telemetry(ApiModel):
    """What the run tells of itself besides its log."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the first process at which ``/metrics`` answers Prometheus; left out, there is none."""
    peak_flops: DecimalString | None = None
    """Floating-point operations a second that one device can do at ``precision``, such as "989e12".

    Left out, the share of it that is used (MFU) is not reported.
    """
