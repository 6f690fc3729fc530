"""Groups as they are: put together from StatefulSets, pods and the addresses that clients are given."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from unmask_operator import pods_seen
from unmask_operator.decision import JsonObject
from unmask_operator.serving.planning import Seen, State
from unmask_operator.times import seconds

__all__ = ["Found", "find_groups"]

_SLICE_OF = "kubernetes.io/service-name"
# By the name, which nobody can change.
_SET = re.compile(r"(?P<group>.+-(?P<ordinal>[0-9]{1,2})-(?P<revision>[a-z0-9]{6}))-(?P<role>[es])")
_ROLES = {"e": "engine", "s": "shard"}


@dataclass(slots=True)
class Found:
    """A group that exists, if only in part."""

    name: str
    ordinal: int
    revision: str
    sets: dict[str, JsonObject] = field(default_factory=dict)
    """StatefulSets by role, those under deletion included."""
    pods: dict[str, list[JsonObject]] = field(default_factory=lambda: {"engine": [], "shard": []})
    """Pods by role."""
    state: State = "Starting"
    """How it is; see :class:`unmask_operator.serving.planning.Seen`."""
    available_in: float | None = None
    """Seconds until it counts as available, if it goes on being ready."""
    reason: str = ""
    """One word on what keeps it from starting; empty, it just takes its time."""
    message: str = ""
    """The same in a sentence."""

    @property
    def seen(self) -> Seen:
        """What is planned with."""
        return Seen(self.ordinal, self.revision, self.state)

    @property
    def ready_shards(self) -> int:
        """How many shards are ready."""
        return sum(pods_seen.is_ready(pod) for pod in self.pods["shard"])

    @property
    def restarts(self) -> int:
        """How often containers were started anew."""
        return sum(
            int(one.get("restartCount", 0))
            for pods in self.pods.values()
            for pod in pods
            for one in pod.get("status", {}).get("containerStatuses", ())
        )

    @property
    def since(self) -> float:
        """When the first of its StatefulSets was made."""
        made = [seconds(one["metadata"].get("creationTimestamp")) for one in self.sets.values()]
        return min(filter(None, made), default=float("inf"))


def find_groups(
    children: Mapping[str, Sequence[JsonObject]], front: str, *, min_ready_seconds: int, now: float
) -> list[Found]:
    """Return the groups that exist, in order.

    Args:
        children: what belongs to the service, by kind.
        front: name of the Service that clients connect to.
        min_ready_seconds: for how long a group has to be ready before it is available.
        now: seconds since 1970.
    """
    found: dict[str, Found] = {}
    for one in children.get("StatefulSet", ()):
        named = _SET.fullmatch(one["metadata"]["name"])
        if named is None:
            continue
        name = named["group"]
        group = found.setdefault(name, Found(name, int(named["ordinal"]), named["revision"]))
        group.sets[_ROLES[named["role"]]] = one
    by_uid = {
        one["metadata"]["uid"]: (group, role) for group in found.values() for role, one in group.sets.items()
    }
    for pod in children.get("Pod", ()):
        for owner in pod["metadata"].get("ownerReferences", ()):
            if owner.get("uid") in by_uid:
                group, role = by_uid[owner["uid"]]
                group.pods[role].append(pod)
    addresses = _addresses(children.get("EndpointSlice", ()), front)
    for group in found.values():
        _judge(group, addresses, children, min_ready_seconds, now)
    return sorted(found.values(), key=lambda group: (group.ordinal, group.revision))


def _judge(
    group: Found,
    addresses: frozenset[str],
    children: Mapping[str, Sequence[JsonObject]],
    min_ready_seconds: int,
    now: float,
) -> None:
    engine = group.sets.get("engine")
    if engine is None or "deletionTimestamp" in engine["metadata"]:
        group.state = "Ending"
        return
    ready = [pod for pod in group.pods["engine"] if _routable(pod, addresses)]
    if not ready:
        for role, one in group.sets.items():
            if len(group.pods[role]) < one["spec"].get("replicas", 1):
                word, text = pods_seen.refused_pods(one, children.get("StatefulSetWarning", ()))
                if text:
                    group.reason, group.message = word, text
                    return
        pods = [pod for role in ("engine", "shard") for pod in group.pods[role]]
        if text := pods_seen.unplaced(pods, ()):
            group.reason, group.message = "Unschedulable", text
        else:
            group.reason, group.message = pods_seen.cannot_start(pods, children.get("PodWarning", ()))
        return
    left = (_ready_since(ready[0]) or now) + min_ready_seconds - now
    group.state = "Ready" if left > 0 else "Available"
    group.available_in = left if left > 0 else None


def _routable(pod: JsonObject, addresses: frozenset[str]) -> bool:
    """Whether clients can reach an engine: it is ready, and its address is among those they are given."""
    ip = pod.get("status", {}).get("podIP")
    return "deletionTimestamp" not in pod["metadata"] and pods_seen.is_ready(pod) and ip in addresses


def _addresses(slices: Iterable[JsonObject], front: str) -> frozenset[str]:
    """Return the addresses to which the cluster sends those who ask at ``front``."""
    return frozenset(
        address
        for one in slices
        if one["metadata"].get("labels", {}).get(_SLICE_OF) == front
        for endpoint in one.get("endpoints") or ()
        if (endpoint.get("conditions") or {}).get("ready") is not False
        for address in endpoint.get("addresses", ())
    )


def _ready_since(pod: JsonObject) -> float | None:
    for one in pod.get("status", {}).get("conditions", ()):
        if one.get("type") == "Ready" and one.get("status") == "True":
            return seconds(one.get("lastTransitionTime"))
    return None
