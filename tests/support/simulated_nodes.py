"""Machines that are only objects: the real scheduler places pods there, and a thread plays the kubelets."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from support.rounds import repeated
from unmask_operator.control.api import Api, ApiError
from unmask_operator.resources import RESOURCES, Resource

__all__ = ["Nodes"]

Json = dict[str, Any]
NODE = Resource("Node", "", "v1", "nodes")
POD = RESOURCES["Pod"]
_MERGE = "application/merge-patch+json"


class Nodes:
    """Pods that have a machine run at once, and end at once when they are told to.

    What a test says of a pod by :meth:`pod_status` stays.
    """

    def __init__(self, api: Api) -> None:
        """``api`` is an administrator's."""
        self._api = api
        self._told: set[str] = set()
        self.waiting: Callable[[Json], Json | None] = lambda pod: None
        """Asked of each pod that has got a machine: why its container cannot start, if it cannot."""
        self.address: Callable[[Json], str] = lambda pod: "127.0.0.1"
        """Address of each pod. Nobody listens at this one, so that questions are refused and not waited for;
        Services have no endpoints there."""
        self.ending: Callable[[Json], int | None] = lambda pod: None
        """Asked of each pod that is told to end: its exit code; ``None``: it is gone without a word."""
        self.told_to_end: dict[str, int] = {}
        """Name of each pod that ended with an exit code, when told to -> seconds that it was given."""

    def add(
        self, name: str, *, labels: dict[str, str] | None = None, taint: str = "", **capacity: str
    ) -> None:
        """Make a machine.

        Args:
            name: its name, and the value of its label ``zone``.
            labels: further ones.
            taint: key of a taint that keeps pods away.
            capacity: what it has by resource, such as ``cpu="4"``, besides room for 100 pods.
        """
        amounts = {"cpu": "64", "memory": "64Gi", "pods": "100"} | capacity
        metadata = {"name": name, "labels": {"zone": name} | (labels or {})}
        self._api.create(NODE, None, {"apiVersion": "v1", "kind": "Node", "metadata": metadata})
        # Who makes a node finds it tainted until a controller has seen it ready.
        taints = [{"key": taint, "effect": "NoSchedule"}] if taint else None
        self._api.merge(NODE, None, name, {"spec": {"taints": taints}})
        status = {
            "capacity": amounts,
            "allocatable": amounts,
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        self._patch(NODE.path(None, name, "status"), {"status": status})

    def remove(self, name: str) -> None:
        """Take a machine out of service."""
        with contextlib.suppress(ApiError):
            self._api._json("DELETE", NODE.path(None, name))

    def pod_status(self, namespace: str, name: str, status: Json) -> None:
        """Be the kubelet of a pod."""
        pod = self._api.get(POD, namespace, name)
        self._told.add(pod["metadata"]["uid"])
        self._patch(POD.path(namespace, name, "status"), {"status": status})

    def end(self, namespace: str, name: str, exit_code: int, message: str = "") -> None:
        """Let the container of a pod end."""
        terminated = {
            "exitCode": exit_code,
            "reason": "Error" if exit_code else "Completed",
            "message": message,
            "startedAt": "2026-11-27T00:00:00Z",
            "finishedAt": "2026-11-27T00:00:01Z",
        }
        status = {
            "phase": "Failed" if exit_code else "Succeeded",
            "conditions": [{"type": "Ready", "status": "False", "reason": "PodCompleted"}],
            "containerStatuses": [self._container({"terminated": terminated}, ready=False)],
        }
        self.pod_status(namespace, name, status)

    @contextlib.contextmanager
    def running(self) -> Iterator["Nodes"]:
        """Play the kubelets meanwhile."""
        with repeated(self._round):
            yield self

    def _round(self) -> None:
        for pod in self._api.list(POD, None)[0]:
            with contextlib.suppress(ApiError):
                self._look_after(pod)

    def _look_after(self, pod: Json) -> None:
        metadata = pod["metadata"]
        where = POD.path(metadata["namespace"], metadata["name"])
        if "deletionTimestamp" in metadata:
            code = self.ending(pod)
            if code is not None and metadata["name"] not in self.told_to_end:
                self.told_to_end[metadata["name"]] = int(metadata["deletionGracePeriodSeconds"])
                self.end(metadata["namespace"], metadata["name"], code)
                return
            options = {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
            self._api._json("DELETE", where, {}, {"kind": "DeleteOptions", "apiVersion": "v1"} | options)
        elif pod["spec"].get("nodeName") and metadata["uid"] not in self._told:
            self._told.add(metadata["uid"])
            why = self.waiting(pod)
            state = {"waiting": why} if why else {"running": {"startedAt": metadata["creationTimestamp"]}}
            address = self.address(pod)
            status: Json = {"phase": "Pending" if why else "Running", "podIP": address}
            status["podIPs"] = [{"ip": address}]
            status["conditions"] = [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "False" if why else "True"},
            ]
            status["containerStatuses"] = [self._container(state, ready=not why)]
            self._patch(f"{where}/status", {"status": status})

    def _container(self, state: Json, *, ready: bool) -> Json:
        return {
            "name": "trainer",
            "image": "",
            "imageID": "",
            "ready": ready,
            "restartCount": 0,
            "state": state,
        }

    def _patch(self, path: str, body: Json) -> None:
        self._api._json("PATCH", path, {"fieldManager": "kubelet"}, body, _MERGE)
