"""What to do about a message of the cluster, whatever it is about: a table, and how it is read."""

import datetime
import re
from collections.abc import Sequence

from unmask_operator.client.custom_object import CustomObject
from unmask_operator.decision import JsonObject

__all__ = ["hint", "unseen"]

_HINTS: tuple[tuple[str, str], ...] = (
    (
        r"ImagePull|ErrImage|InvalidImageName",
        "see that spec.image exists and that the machines may fetch it (kubectl describe pod {pod}); a"
        " private registry needs a pull secret on the service account",
    ),
    (
        r"CreateContainerConfigError|CreateContainerError",
        "make the Secret or ConfigMap that spec.env names (kubectl describe pod {pod})",
    ),
    (
        r"secret \"[^\"]*\" not found",
        "make the Secret that the message names in this namespace, or have the manifest name another one"
        " (kubectl get secrets)",
    ),
    (
        r"CrashLoopBackOff|RunContainerError|StartError",
        "see why the container does not go on: kubectl logs --previous {pod}, and kubectl describe pod {pod}",
    ),
    (
        r"persistentvolumeclaim .*not found",
        "make the claim that the manifest names as pvc://NAME/... in this namespace (kubectl get pvc)",
    ),
    (
        r"unbound .*PersistentVolumeClaims|volume node affinity",
        "see why the claim has no volume: kubectl describe pvc",
    ),
    (
        r"Insufficient|node\(s\)|nodes are available|taint",
        "no machine has room for the pod: lower {resources}, free machines, or change spec.nodeSelector"
        " and spec.tolerations (kubectl describe pod {pod} lists what each machine lacks)",
    ),
    (
        r"MountVolume|FailedMount|AttachVolume",
        "see why the volume cannot be mounted: kubectl describe pod {pod}",
    ),
    (
        r"service ?account",
        "make the service account that spec.serviceAccountName names, or drop it",
    ),
    (
        r"exceeded quota",
        "the namespace's quota is used up: lower {resources} or end others (kubectl describe quota)",
    ),
    (
        r"violates PodSecurity",
        "the namespace's Pod Security level forbids what spec.podTemplate or spec.volumes ask for: drop it,"
        " or use another namespace",
    ),
)
"""What a message says -> what to do; the first that matches counts."""

_UNSEEN_S = 60.0
"""Seconds after which something that no operator looked at is a sign that there is none."""


def hint(message: str, pods: Sequence[JsonObject], *, resources: str) -> str:
    """Return what to do about a message; empty where nothing is known.

    Args:
        message: of a condition or a group.
        pods: that it may be about.
        resources: the fields that say what a pod takes.
    """
    for pattern, advice in _HINTS:
        if re.search(pattern, message):
            named = [pod["metadata"]["name"] for pod in pods if pod["metadata"]["name"] in message]
            names = named or [pod["metadata"]["name"] for pod in pods] or ["NAME"]
            return advice.format(pod=names[0], resources=resources)
    return ""


def unseen(one: CustomObject, since: datetime.datetime | None, now: float) -> str:
    """Return what to do about something that no operator has looked at.

    Args:
        one: the object.
        since: when it was made, or last changed.
        now: seconds since 1970-01-01 UTC.
    """
    age = now - since.timestamp() if since else 0.0
    if age < _UNSEEN_S:
        return "wait: the operator has not looked at it yet"
    return (
        f"no operator has looked at it for {age:.0f} s: see that one runs and works in namespace"
        f" {one.namespace} (kubectl get deployments,leases --all-namespaces | grep unmask)"
    )
