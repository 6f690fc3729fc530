"""Who starts the pods of an attempt all together: what the manifest asks for, of what the cluster has."""

from collections.abc import Collection

from unmask_api.train_job import TrainSpec
from unmask_operator.launch.pods import GangBy

__all__ = ["DROPPED", "who_starts", "without"]

_NATIVE = "scheduling.k8s.io/v1beta1"
_VOLCANO = "scheduling.volcano.sh/v1beta1"
_KUEUE = "kueue.x-k8s.io/"

DROPPED = (
    "the API server serves PodGroups and dropped schedulingGroup from the pods, so they start one by one:"
    " turn on its feature gate GenericWorkload, and the scheduler's"
)
"""What is said where the pods of a job, read back, do not say any more which PodGroup they are of."""


def who_starts(spec: TrainSpec, served: Collection[str], *, pod_groups: bool) -> GangBy | None:
    """Return who starts the pods; ``None`` where the manifest asks for what is not there.

    Args:
        spec: of the job.
        served: group and version of each API of the cluster.
        pod_groups: whether the operator follows the cluster's native PodGroups.
    """
    scheduling = spec.scheduling
    native = _NATIVE in served and pod_groups
    volcano = _VOLCANO in served and scheduling.scheduler_name == "volcano"
    kueue = any(one.startswith(_KUEUE) for one in served)
    match scheduling.gang.mode:
        case "Kueue":
            return "Kueue" if kueue else None
        case "Native":
            return "Native" if native else None
        case "Volcano":
            return "Volcano" if volcano else None
        case "None":
            return "None"
    if scheduling.queue_name:
        return "Kueue" if kueue else None
    if spec.parallelism.nodes == 1:
        return "None"
    return "Native" if native else "Volcano" if volcano else "None"


def without(nodes: int) -> str:
    """Return what is said where nobody sees to it that ``nodes`` pods start all together."""
    return (
        f"nothing starts the {nodes} pods all together: some may hold machines while others wait; install"
        " Kueue and set scheduling.queueName, or turn on the cluster's PodGroups"
    )
