"""What Kubernetes' own objects say: whether a Job has ended, whether a pod runs, and what holds one up."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from unmask_operator.decision import JsonObject
from unmask_operator.launch.pods import ATTEMPT_LABEL
from unmask_operator.training.times import seconds

__all__ = [
    "attempt_of",
    "cannot_start",
    "finished",
    "gang_is_kept",
    "host",
    "index",
    "is_ready",
    "is_running",
    "refused_pods",
    "running_since",
    "started",
    "unplaced",
]

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_ORDINARY = {None, "", "ContainerCreating", "PodInitializing"}


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


def is_running(pod: JsonObject) -> bool:
    """Whether a pod has not ended."""
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def is_ready(pod: JsonObject) -> bool:
    """Whether a pod does what it is there for, or has done it."""
    status = pod.get("status", {})
    if status.get("phase") == "Succeeded":  # others may have more to write
        return True
    return status.get("phase") == "Running" and any(
        one.get("type") == "Ready" and one.get("status") == "True" for one in status.get("conditions", ())
    )


def running_since(pod: JsonObject) -> float | None:
    """Return when the first of a pod's containers that runs was started."""
    for state in pod.get("status", {}).get("containerStatuses", ()):
        running = (state.get("state") or {}).get("running") or {}
        if "startedAt" in running:
            return seconds(running["startedAt"])
    return None


def index(pod: JsonObject) -> int:
    """Return which of a Job's pods this is, from 0."""
    text = pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", "0")
    return int(text) if str(text).isdigit() else 0


def host(ip: str) -> str:
    """Return an address as it stands in URLs."""
    return f"[{ip}]" if ":" in ip else ip


def gang_is_kept(job: JsonObject) -> bool:
    """Whether a Job's pods still say which PodGroup they are of.

    An API server whose gate ``GenericWorkload`` is off drops that without a word.
    """
    return "schedulingGroup" in job["spec"]["template"]["spec"]


def unplaced(pods: Sequence[JsonObject], groups: Sequence[JsonObject]) -> str:
    """Return the scheduler's words about pods that have no machine, or nothing."""
    for pod in pods:
        for one in pod.get("status", {}).get("conditions", ()):
            if one.get("type") == "PodScheduled" and one.get("status") == "False":
                return f"{pod['metadata']['name']}: {one.get('message') or one.get('reason')}"
    for group in groups:
        for one in group.get("status", {}).get("conditions", ()):
            if one.get("type") == "PodGroupInitiallyScheduled" and one.get("status") == "False":
                return f"{group['metadata']['name']}: {one.get('message') or one.get('reason')}"
    return ""


def refused_pods(job: JsonObject, warnings: Sequence[JsonObject]) -> tuple[str, str]:
    """Return a word and a sentence on why the pods of ``job`` could not be made; nothing if nobody said so.

    Kubernetes puts that into events and nowhere else. A pod is named anew at each try, so names are left out.
    """
    uid = job["metadata"]["uid"]
    told = [one for one in warnings if one.get("regarding", {}).get("uid") == uid]
    if not told:
        return "", ""
    note = str(max(told, key=_last_seen).get("note") or "its pods cannot be made")
    note = re.sub(r'pods "[^"]*"', "a pod", note.removeprefix("Error creating: "), count=1)
    return "QuotaExceeded" if "exceeded quota" in note else "PodsRefused", note


def cannot_start(pods: Sequence[JsonObject], warnings: Sequence[JsonObject]) -> tuple[str, str]:
    """Return a word and a sentence on what keeps a pod's container from starting, or nothing.

    Args:
        pods: of one Job.
        warnings: events about volumes of pods, which are believed of pods that do not run yet.
    """
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for state in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
            waiting = (state.get("state") or {}).get("waiting") or {}
            word = waiting.get("reason")
            if word not in _ORDINARY:
                text = f"{name}: {word}: {waiting.get('message', '')}".strip(": ")
                return "ImageUnavailable" if word in _IMAGE else str(word), text
        if status.get("phase", "Pending") == "Pending":
            uid = pod["metadata"]["uid"]
            told = [one for one in warnings if one.get("regarding", {}).get("uid") == uid]
            if told:
                return "VolumeUnavailable", f"{name}: {max(told, key=_last_seen).get('note')}"
    return "", ""


def _last_seen(event: JsonObject) -> float:
    series = event.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        event.get("deprecatedLastTimestamp"),
        event.get("eventTime"),
        event["metadata"].get("creationTimestamp"),
    )
    return max(filter(None, map(seconds, times)), default=0.0)
