"""The parts of a DiffusionTrainJob that only a cluster looks at: restarts, scheduling, and the pods.

None of them changes what is trained. ``unmask run`` accepts them all and heeds ``maxRestarts``, so that one
manifest serves both places.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, StringConstraints, WithJsonSchema

from unmask_api.base import IDENTIFIER, WORD, ApiModel, Name, Rule

__all__ = [
    "Elastic",
    "EnvVar",
    "ExitCodes",
    "FailureRule",
    "Gang",
    "Observability",
    "PodResources",
    "Rendezvous",
    "RunPolicy",
    "Scheduling",
    "Toleration",
    "Topology",
]

Seconds = Annotated[int, Field(ge=1, le=31_536_000)]
Port = Annotated[int, Field(ge=1024, le=65535)]
Label = Annotated[str, StringConstraints(max_length=317)]
Word = Annotated[str, StringConstraints(pattern=WORD, max_length=64)]


def _whole_or_text(value: object) -> object:
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        return value
    raise ValueError("a whole number or text")


Quantity = Annotated[
    Any,
    PlainValidator(_whole_or_text),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "maxLength": 32}),
]
"""``8``, ``"500m"`` or ``"64Gi"``: an amount as Kubernetes writes it."""
CoreObject = Annotated[
    dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
]
"""An object of Kubernetes' own API, passed on as it is; the API server checks it when the pods are made."""


class ExitCodes(ApiModel):
    """Exit codes of the process that failed first."""

    operator: Literal["In", "NotIn"] = "In"
    """Whether the code must be one of ``values``, or none of them."""
    values: Annotated[tuple[Annotated[int, Field(ge=1, le=255)], ...], Field(min_length=1, max_length=64)]
    """The codes."""


class FailureRule(ApiModel):
    """What to do about one kind of failure."""

    rules: ClassVar = (
        Rule(
            rule="has(self.onExitCodes) || size(self.onReasons) > 0",
            message="a failure rule needs onExitCodes or onReasons: it would match everything",
        ),
    )

    name: Name
    """Name of the rule, for messages."""
    action: Literal["Fail", "Restart", "RestartIgnoreLimit"]
    """End the job, restart and count it towards ``maxRestarts``, or restart without counting."""
    on_exit_codes: ExitCodes | None = None
    """Matches by exit code; left out, any."""
    on_reasons: Annotated[tuple[Word, ...], Field(max_length=32)] = ()
    """Matches by the reason in ``status.failure.reason``, such as ``OutOfMemory``; empty, any."""


class RunPolicy(ApiModel):
    """When a job starts again, when it gives up, and what stays behind."""

    rules: ClassVar = (
        Rule(
            rule="self.failureRules.all(rule, self.failureRules.exists_one(other, other.name == rule.name))",
            message="names of failure rules must be unique: rename one",
            field_path=".failureRules",
        ),
        Rule(
            rule="self.stallTimeoutSeconds == 0 || !has(self.hangTimeoutSeconds)"
            " || self.hangTimeoutSeconds < self.stallTimeoutSeconds",
            message="stallTimeoutSeconds must exceed hangTimeoutSeconds: the processes should notice first"
            " and say where they hang",
            field_path=".stallTimeoutSeconds",
        ),
    )

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """Restarts before the job fails; what a restart cannot mend fails it at once."""
    hang_timeout_seconds: Annotated[int, Field(ge=1, le=604_800)] | None = None
    """Longest time without progress before a process ends itself with exit code 70, so that it is restarted.

    Progress is a step, a measurement, an export or a checkpoint that is done: allow for the slowest of them.
    Left out, only the limits of the collectives hold.
    """
    restart_backoff_seconds: Annotated[int, Field(ge=1, le=600)] = 10
    """Pause before the first restart on a cluster; it doubles with each one that follows, up to 600."""
    reset_after_seconds: Seconds = 3600
    """An attempt that ran for so long starts the pauses over."""
    active_deadline_seconds: Seconds | None = None
    """Longest time from the start, or from the last time it was resumed, before the job fails."""
    startup_deadline_seconds: Annotated[int, Field(ge=0, le=31_536_000)] = 1800
    """Longest time until all pods of an attempt run, before it fails and is restarted; 0 waits for ever.

    Time in a queue does not count.
    """
    stall_timeout_seconds: Annotated[int, Field(ge=0, le=31_536_000)] = 1800
    """Longest time that the reported step may stay the same before an attempt is restarted; 0: for ever."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """How long the finished job is kept; left out, for ever. Checkpoints and models stay in any case."""
    pod_cleanup: Literal["Running", "All", "None"] = "Running"
    """Pods to delete when the job has ended: those still running, all, or none. Logs go with their pods."""
    success_policy: Literal["All", "Coordinator"] = "All"
    """Whose success is the job's: that of all pods, or of the first one."""
    failure_rules: Annotated[tuple[FailureRule, ...], Field(max_length=20)] = ()
    """What to do about failures; the first rule that matches counts, then the usual ones."""


class Elastic(ApiModel):
    """How far the number of nodes may change while the job runs."""

    rules: ClassVar = (
        Rule(
            rule="self.minNodes <= self.maxNodes",
            message="minNodes must not exceed maxNodes: swap them",
            field_path=".minNodes",
        ),
    )

    min_nodes: Annotated[int, Field(ge=1, le=4096)]
    """Fewest nodes to train on."""
    max_nodes: Annotated[int, Field(ge=1, le=4096)]
    """Most nodes to train on."""
    max_process_restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """Times that the processes of an attempt may be restarted in their pods."""
    last_call_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    """How long to wait for further nodes once there are ``minNodes``."""


class Rendezvous(ApiModel):
    """How the pods of an attempt find each other."""

    port: Port = 29400
    """Port of the first pod at which the others meet."""
    join_timeout_seconds: Seconds = 600
    """Longest time to wait for the other pods."""
    process_group_timeout_seconds: Seconds = 600
    """With GPUs, the longest time that NCCL's watchdog waits for a sign of life before its process ends."""


class Gang(ApiModel):
    """Whether all pods of an attempt are started together or not at all."""

    mode: Literal["Auto", "None", "Native", "Volcano", "Kueue"] = "Auto"
    """Who sees to it; ``Auto`` takes the first that the cluster has of Kueue, Native and Volcano."""
    timeout_seconds: Seconds = 600
    """After so long without a place for all pods the job says what is missing."""


class Topology(ApiModel):
    """Where the pods should lie with respect to each other."""

    key: Label
    """Label of nodes; pods should share its value, such as ``topology.kubernetes.io/zone``."""
    mode: Literal["Required", "Preferred"] = "Preferred"
    """Whether to wait for such a place."""


class Scheduling(ApiModel):
    """Who decides where and when the pods run."""

    rules: ClassVar = (
        Rule(
            rule="self.gang.mode != 'Kueue' || has(self.queueName)",
            message="gang mode Kueue needs queueName: name the LocalQueue, or change gang.mode",
            field_path=".queueName",
        ),
        Rule(
            rule="self.gang.mode != 'Volcano' || self.schedulerName == 'volcano'",
            message="gang mode Volcano needs schedulerName volcano",
            field_path=".schedulerName",
        ),
    )

    queue_name: Name | None = None
    """LocalQueue of Kueue that admits the job; left out, none."""
    priority_class_name: Annotated[str, StringConstraints(max_length=253)] | None = None
    """Priority class of the pods, and of the workload in the queue."""
    scheduler_name: Annotated[str, StringConstraints(min_length=1, max_length=253)] = "default-scheduler"
    """Scheduler of the pods."""
    gang: Gang = Gang()
    """Whether all pods are started together or not at all."""
    topology: Topology | None = None
    """Where the pods should lie with respect to each other."""


class PodResources(ApiModel):
    """What one pod takes of its machine."""

    requests: Annotated[dict[str, Quantity], Field(max_length=32)] = {}
    """Least amounts by resource, such as ``cpu: "8"``; those left out are the limits."""
    limits: Annotated[dict[str, Quantity], Field(max_length=32)] = {}
    """Greatest amounts by resource, such as ``nvidia.com/gpu: 8``."""


class Toleration(ApiModel):
    """A taint of nodes that does not keep the pods away."""

    key: Label | None = None
    """Key of the taint; left out, all with operator ``Exists``."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether the value matters."""
    value: Label | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; left out, every one."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """How long a ``NoExecute`` taint is tolerated; left out, for ever."""


class EnvVar(ApiModel):
    """A variable of the worker's environment."""

    rules: ClassVar = (
        Rule(
            rule="!(has(self.value) && has(self.valueFrom))",
            message="give value or valueFrom, not both",
            field_path=".value",
        ),
        Rule(
            rule="!self.name.startsWith('PET_') && !self.name.startsWith('TORCHELASTIC_')"
            " && !(self.name in ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK',"
            " 'MASTER_ADDR', 'MASTER_PORT', 'JOB_COMPLETION_INDEX'])",
            message="this variable is the launcher's: it says who a process is and how pods meet; drop it",
            field_path=".name",
        ),
    )

    name: Annotated[str, StringConstraints(pattern=IDENTIFIER, max_length=128)]
    """Name of the variable."""
    value: Annotated[str, StringConstraints(max_length=4096)] | None = None
    """Its value."""
    value_from: CoreObject | None = None
    """Where the value is: ``secretKeyRef``, ``configMapKeyRef`` or ``fieldRef``."""


class Observability(ApiModel):
    """How the operator follows the training."""

    port: Port = 9091
    """Port of the first pod at which the launcher answers ``/progress``."""
    progress_interval_seconds: Annotated[int, Field(ge=5, le=3600)] = 15
    """Time between two looks at the progress."""
