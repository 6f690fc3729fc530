"""The lines that a service's engines and shards print, while groups are made, scaled and replaced."""

import datetime
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from unmask_operator.client.connection import Connection
from unmask_operator.client.errors import NotFound
from unmask_operator.client.logs import PAUSE_S, PodLine, has_started, number, pod_lines, together
from unmask_operator.client.service_view import InferenceService
from unmask_operator.decision import JsonObject
from unmask_operator.launch.groups import GROUP_LABEL, ORDINAL_LABEL, ROLE_LABEL, SERVICE_LABEL
from unmask_operator.resources import RESOURCES

__all__ = ["ROLES", "Choice", "group_lines", "pods_of"]

ROLES = ("engine", "shard")
"""What pods of a service are; their containers are called the same."""
_INDEX = "apps.kubernetes.io/pod-index"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Whose lines to show."""

    roles: Collection[str] = ROLES[:1]
    """Of engines, shards or both."""
    groups: Collection[int] = ()
    """Ordinals of groups; empty, all."""
    pods: Collection[str] = ()
    """Names of pods, whatever they are; empty, all."""

    def takes(self, pod: JsonObject) -> bool:
        """Whether a pod is among them."""
        labels = pod["metadata"].get("labels") or {}
        if (role := role_of(pod)) not in ROLES:
            return False
        if self.pods:
            return pod["metadata"]["name"] in self.pods
        chosen = not self.groups or labels.get(ORDINAL_LABEL) in {str(one) for one in self.groups}
        return chosen and role in self.roles

    def __str__(self) -> str:
        """Return what people would call it."""
        if self.pods:
            return f"pod {', '.join(self.pods)}"
        groups = f" of group {', '.join(map(str, self.groups))}" if self.groups else ""
        return f"{' or '.join(self.roles)}{groups}"


def pods_of(connection: Connection, service: InferenceService) -> list[JsonObject]:
    """Return the service's pods, ordered by group, engines before shards."""
    pods = connection.list(
        RESOURCES["Pod"],
        service.namespace,
        what=f"list the pods of service {service.name}",
        labelSelector=f"{SERVICE_LABEL}={service.name}",
    )
    return sorted(pods, key=_order)


def role_of(pod: JsonObject) -> str:
    """Return what a pod is, which is also the name of its container; empty, neither engine nor shard."""
    return str((pod["metadata"].get("labels") or {}).get(ROLE_LABEL, ""))


def _order(pod: JsonObject) -> tuple[int, str, str, int, str]:
    labels = pod["metadata"].get("labels") or {}
    return (
        number(labels.get(ORDINAL_LABEL)),
        str(labels.get(GROUP_LABEL)),
        role_of(pod),
        number(labels.get(_INDEX)),
        pod["metadata"]["name"],
    )


def group_lines(
    connection: Connection,
    read: Callable[[], InferenceService],
    choice: Choice,
    *,
    follow: bool,
    since: datetime.datetime | None = None,
    tail: int | None = None,
    poll: float = PAUSE_S,
) -> Iterator[PodLine]:
    """Yield the lines of the chosen pods: one after the other, or with ``follow`` as they come.

    Args:
        connection: to the cluster.
        read: reads the service anew.
        choice: whose lines.
        follow: wait for pods and lines, through restarts and rollouts, until the service is deleted.
        since: leave out what was written before.
        tail: only so many of the last lines of each pod.
        poll: seconds between two looks at what pods there are.

    Raises:
        NotFound: There is no pod, and without ``follow`` none is waited for.
        ClusterError: The cluster refuses.
    """
    started: set[str] = set()

    def more() -> list[Iterator[PodLine]] | None:
        service = read()
        chosen = [pod for pod in pods_of(connection, service) if choice.takes(pod)]
        new = [
            pod for pod in chosen if pod["metadata"]["uid"] not in started and has_started(pod, role_of(pod))
        ]
        if not new and (service.deleting or not follow):
            if not follow and not started:
                raise NotFound(_nothing(service, chosen, choice))
            return None
        started.update(pod["metadata"]["uid"] for pod in new)
        return [
            pod_lines(connection, pod, role_of(pod), follow=follow, restarts=True, since=since, tail=tail)
            for pod in new
        ]

    if follow:
        yield from together(more, poll=poll)
    else:
        for source in more() or ():
            yield from source


def _nothing(service: InferenceService, pods: list[JsonObject], choice: Choice) -> str:
    named = f"{service.name} --namespace {service.namespace}"
    if pods:
        what = f"pod {pods[-1]['metadata']['name']} has not started yet"
    else:
        what = f"there is no pod of {choice}" if not choice.pods else f"there is no {choice}"
    return (
        f"service {service.name} is {service.state}: {what}; unmask describe service/{named} says more, and"
        " --follow waits for it"
    )
