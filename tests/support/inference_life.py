"""The life of a service for the fault rig, and the controllers that it needs, played.

The controllers act only when the operator has nothing to do, one step at a time: what is being deleted goes,
missing pods are made, pods get ready, and the addresses of those that are ready are written down. So a life
goes the same way whatever happens to the operator's writes.
"""

import contextlib
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from support import field_sets, manifests
from support.api_server import ApiServer, Crash
from unmask_operator.control.api import Api
from unmask_operator.launch.groups import ROLE_LABEL
from unmask_operator.resources import RESOURCES
from unmask_operator.times import stamp

if TYPE_CHECKING:
    from support.fault_rig import World

Json = dict[str, Any]

KIND = "DiffusionInferenceService"
NAMESPACE = "team"
NAME = "chat"
SERVICE = RESOURCES[KIND]
IMAGE = "registry.example/unmask:2"


class Controllers:
    """StatefulSets, kubelets, addresses and the garbage collector."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        server.collects = False
        self.sick: set[str] = set()
        """Parts of names of pods that do not get ready, or are no longer."""
        self.placeless: set[str] = set()
        """Parts of names of pods that no machine has room for."""

    def act(self) -> bool:
        """Take the first step that changes something; return whether there was one."""
        before = self.server.version
        for step in (self.server.collect, self._make_pods, self._run_pods, self._write_addresses):
            step()
            if self.server.version != before:
                return True
        return False

    def _make_pods(self) -> None:
        pods = {pod["metadata"]["name"] for pod in self._all("Pod")}
        for one in self._all("StatefulSet"):
            if "deletionTimestamp" in one["metadata"]:
                continue
            for index in range(one["spec"]["replicas"]):
                name = f"{one['metadata']['name']}-{index}"
                if name not in pods:
                    self._make_pod(one, name, index)

    def _make_pod(self, owner: Json, name: str, index: int) -> None:
        template = field_sets.copied(owner["spec"]["template"])
        labels = template["metadata"]["labels"] | {"apps.kubernetes.io/pod-index": str(index)}
        reference = {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
        }
        metadata = {"name": name, "labels": labels, "ownerReferences": [reference]}
        body = {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}}
        self.server.put("Pod", NAMESPACE, body)

    def _run_pods(self) -> None:
        """An engine is ready once its shards are."""
        pods = self._all("Pod")
        broken = {self._group(pod) for pod in pods if self._role(pod) == "shard" and not self._well(pod)}
        for pod in pods:
            name = pod["metadata"]["name"]
            well = self._well(pod) and (self._role(pod) == "shard" or self._group(pod) not in broken)
            status = self._status(name, well)
            if not _same_but_times(status, pod.get("status") or {}):
                self.server.set_status("Pod", NAMESPACE, name, status)

    def _well(self, pod: Json) -> bool:
        name = pod["metadata"]["name"]
        return not any(part in name for part in self.sick | self.placeless)

    def _status(self, name: str, well: bool) -> Json:
        if any(part in name for part in self.placeless):
            unplaced = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
            }
            return {"phase": "Pending", "conditions": [unplaced]}
        since = stamp(self.server.now())
        ready = {"type": "Ready", "status": "True" if well else "False", "lastTransitionTime": since}
        return {"phase": "Running", "podIP": address(name), "conditions": [ready]}

    def _write_addresses(self) -> None:
        pods = self._all("Pod")
        for one in self._all("Service"):
            metadata = one["metadata"]
            selected = one["spec"]["selector"].items()
            endpoints = [
                {
                    "addresses": [pod["status"]["podIP"]],
                    "conditions": {"ready": pod["status"]["conditions"][0]["status"] == "True"},
                }
                for pod in pods
                if selected <= pod["metadata"]["labels"].items() and "podIP" in pod.get("status", {})
            ]
            reference = {
                "apiVersion": "v1",
                "kind": "Service",
                "name": metadata["name"],
                "uid": metadata["uid"],
                "controller": True,
            }
            labels = metadata["labels"] | {"kubernetes.io/service-name": metadata["name"]}
            made = {"name": f"{metadata['name']}-slice", "labels": labels, "ownerReferences": [reference]}
            body = {"metadata": made, "addressType": "IPv4", "endpoints": endpoints}
            there = {item["metadata"]["name"]: item for item in self._all("EndpointSlice")}
            if there.get(made["name"], {}).get("endpoints") != endpoints:
                self.server.put("EndpointSlice", NAMESPACE, body)

    def _all(self, kind: str) -> list[Json]:
        """Return all objects of a kind, to be read and not changed."""
        objects = self.server.store(kind).objects
        return [objects[place] for place in sorted(objects)]

    @staticmethod
    def _role(pod: Json) -> str:
        return str(pod["metadata"]["labels"][ROLE_LABEL])

    @staticmethod
    def _group(pod: Json) -> str:
        return str(pod["metadata"]["labels"]["unmask.dev/group"])


def address(pod: str) -> str:
    """Return the address of a pod, made from its name."""
    digest = hashlib.sha256(pod.encode()).digest()
    return f"10.{digest[0]}.{digest[1]}.{digest[2]}"


def _same_but_times(one: Json, other: Json) -> bool:
    def bare(status: Json) -> Json:
        conditions = [
            {key: value for key, value in entry.items() if key != "lastTransitionTime"}
            for entry in status.get("conditions", ())
        ]
        return status | {"conditions": conditions}

    return bare(one) == bare(other)


def make_job(server: ApiServer, uid: str, *, loss: str = "1.5", name: str = "mini") -> None:
    """Make a job that is complete, in the place of another one; its UID is the same in every run."""
    server.take("DiffusionTrainJob", NAMESPACE, name)
    complete = {"type": "Complete", "status": "True", "reason": "Complete", "message": ""}
    status = {
        "state": "Complete",
        "conditions": [complete | {"lastTransitionTime": stamp(server.now())}],
        "progress": {"step": 32, "totalSteps": 32, "loss": loss},
    }
    job = manifests.train_job() | {"metadata": {"name": name}, "status": status}
    server.put("DiffusionTrainJob", NAMESPACE, job, uid=uid)


# --- chapters -------------------------------------------------------------------------------------------


def patch(people: Api, spec: Json) -> None:
    """Change the spec of the service."""
    people.merge(SERVICE, NAMESPACE, NAME, {"spec": spec})


def make(world: "World", people: Api) -> None:
    """Make the service: two groups of an engine and two shards."""
    people.create(SERVICE, NAMESPACE, manifests.inference_service())


def _roll(world: "World", people: Api) -> None:
    patch(people, {"image": IMAGE})


def _grow(world: "World", people: Api) -> None:
    patch(people, {"replicas": 3, "autoscaling": {"maxReplicas": 4}})


def _surge(world: "World", people: Api) -> None:
    rollout = {"maxSurge": 1, "maxUnavailable": 0, "revisionHistoryLimit": 1}
    patch(people, {"server": {"rows": 16}, "rollout": rollout})


def _hand(world: "World", people: Api) -> None:
    """Somebody deletes the shards of a group, and changes an engine and the public address."""
    sets = sorted(one["metadata"]["name"] for one in world.server.objects("StatefulSet"))
    remove(people, "StatefulSet", next(name for name in sets if name.endswith("-s")))
    engine = next(name for name in sets if name.endswith("-e"))
    people.merge(RESOURCES["StatefulSet"], NAMESPACE, engine, {"spec": {"replicas": 2}})
    people.merge(RESOURCES["Service"], NAMESPACE, NAME, {"spec": {"selector": {ROLE_LABEL: "shard"}}})


def _stop(world: "World", people: Api) -> None:
    patch(people, {"stopped": True})


def _job(world: "World", people: Api) -> None:
    """Started again with a job's model, which is there a little later."""
    model = {"uri": None, "job": {"name": "mini", "update": "WhenComplete"}}
    patch(people, {"stopped": False, "replicas": 1, "model": model})


def _trained(world: "World", people: Api) -> None:
    make_job(world.server, "uid-of-the-first")


def _retrained(world: "World", people: Api) -> None:
    make_job(world.server, "uid-of-the-second")


def _again(world: "World", people: Api) -> None:
    """Deleted and made again at once; what the former one owned is still there for a while."""
    remove(people, KIND, NAME)
    make(world, people)
    with contextlib.suppress(Crash):
        for _ in range(3):
            world.clock.time += 1.0
            world._by_people = False
            world.operator.turn()
    world.server.collect()


def _end(world: "World", people: Api) -> None:
    remove(people, KIND, NAME)


def remove(people: Api, kind: str, name: str) -> None:
    """Delete an object."""
    there = people.get(RESOURCES[kind], NAMESPACE, name)
    people.delete(RESOURCES[kind], NAMESPACE, name, there["metadata"]["uid"], None, "Background")


CHAPTERS: dict[str, Callable[["World", Api], None]] = {
    "made": make,
    "rolled": _roll,
    "grown": _grow,
    "rolled with surge": _surge,
    "by hand": _hand,
    "stopped": _stop,
    "started with a job's model": _job,
    "trained": _trained,
    "trained again": _retrained,
    "made again": _again,
    "deleted": _end,
}
