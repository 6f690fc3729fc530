"""What Kubernetes' own objects say: whether a Job has ended, whether a pod runs, and what holds one up."""

from collections.abc import Mapping
from typing import Any

from unmask_operator.decision import JsonObject
from unmask_operator.launch.pods import ATTEMPT_LABEL
from unmask_operator.times import seconds

__all__ = [
    "attempt_of",
    "finished",
    "gang_is_kept",
    "index",
    "started",
]


def attempt_of(child: Mapping[str, Any]) -> str | None:
    """Return the number of the attempt that an object belongs to."""
    label: str | None = child["metadata"].get("labels", {}).get(ATTEMPT_LABEL)
    return label


def finished(job: JsonObject) -> str | None:
    """Return ``Complete`` or ``Failed`` once all pods have ended; before, Kubernetes says other words."""
    for one in job.get("status", {}).get("conditions", ()):
        if one.get("type") in ("Complete", "Failed") and one.get("status") == "True":
            return str(one["type"])
    return None


def started(job: JsonObject) -> float | None:
    """Return when a Job's pods could first be made; that begins anew when a queue admits it again."""
    return seconds(job.get("status", {}).get("startTime")) or seconds(
        job["metadata"].get("creationTimestamp")
    )


def index(pod: JsonObject) -> int:
    """Return which of a Job's pods this is, from 0."""
    text = pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", "0")
    return int(text) if str(text).isdigit() else 0


def gang_is_kept(job: JsonObject) -> bool:
    """Whether a Job's pods still say which PodGroup they are of.

    An API server whose gate ``GenericWorkload`` is off drops that without a word.
    """
    return "schedulingGroup" in job["spec"]["template"]["spec"]
