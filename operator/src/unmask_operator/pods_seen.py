"""What pods and events about them say, whoever owns them: whether they run, and what holds them up."""

import re
from collections.abc import Sequence

from unmask_operator.decision import JsonObject
from unmask_operator.times import seconds

__all__ = [
    "cannot_start",
    "host",
    "is_ready",
    "is_running",
    "last_seen",
    "refused_pods",
    "running_since",
    "unplaced",
]

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_ORDINARY = {None, "", "ContainerCreating", "PodInitializing"}


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


def host(ip: str) -> str:
    """Return an address as it stands in URLs."""
    return f"[{ip}]" if ":" in ip else ip


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


def cannot_start(pods: Sequence[JsonObject], warnings: Sequence[JsonObject]) -> tuple[str, str]:
    """Return a word and a sentence on what keeps a pod's container from starting, or nothing.

    Args:
        pods: of one owner.
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
                return "VolumeUnavailable", f"{name}: {max(told, key=last_seen).get('note')}"
    return "", ""


def refused_pods(owner: JsonObject, warnings: Sequence[JsonObject]) -> tuple[str, str]:
    """Return a word and a sentence on why the pods of ``owner`` could not be made; nothing if nobody said so.

    Kubernetes puts that into events and nowhere else. A pod is named anew at each try, so names are left out.
    """
    uid = owner["metadata"]["uid"]
    told = [one for one in warnings if one.get("regarding", {}).get("uid") == uid]
    if not told:
        return "", ""
    note = str(max(told, key=last_seen).get("note") or "its pods cannot be made")
    note = note.removeprefix("Error creating: ").rpartition(" failed error: ")[
        2
    ]  # of a Job, of a StatefulSet
    note = re.sub(r'pods "[^"]*"', "a pod", note, count=1)
    return "QuotaExceeded" if "exceeded quota" in note else "PodsRefused", note


def last_seen(event: JsonObject) -> float:
    """Return when an event last happened, in seconds since 1970; 0 if that is not said."""
    series = event.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        event.get("deprecatedLastTimestamp"),
        event.get("eventTime"),
        event["metadata"].get("creationTimestamp"),
    )
    return max(filter(None, map(seconds, times)), default=0.0)
