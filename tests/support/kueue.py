"""Kueue's part, played: queues that admit Jobs whole, by quota and priority, and take places away again.

What it does to a Job is what Kueue does: a Job that names a queue is suspended as it is made (by an admission
policy, where Kueue has a webhook); when there is quota for all of its pods, it goes on with the node selector
and the tolerations of a flavor; one that has to make room is suspended again, and when none of its pods is
left, its template is what it was and its quota is free. What a Job that is over or gone held is free, too.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from support import real_api_server
from support.real_api_server import DEFINITION
from support.rounds import repeated
from unmask_operator.control.api import Api
from unmask_operator.resources import RESOURCES, Resource
from unmask_operator.training import reading

__all__ = ["Flavor", "Kueue"]

Json = dict[str, Any]
JOB = RESOURCES["Job"]
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
LOCAL_QUEUE = Resource("LocalQueue", "kueue.x-k8s.io", "v1beta2", "localqueues")
PRIORITY = Resource("WorkloadPriorityClass", "kueue.x-k8s.io", "v1beta2", "workloadpriorityclasses")
_POLICIES = "admissionregistration.k8s.io"
_POLICY = Resource("MutatingAdmissionPolicy", _POLICIES, "v1", "mutatingadmissionpolicies")
_BINDING = Resource("MutatingAdmissionPolicyBinding", _POLICIES, "v1", "mutatingadmissionpolicybindings")
_NAME = "kueue-suspends"
_MANAGER = {"fieldManager": "kueue"}
_MERGE = "application/merge-patch+json"


@dataclass
class Flavor:
    """Machines of one kind, and how many CPUs of them a queue may have."""

    cpus: int
    labels: dict[str, str] = field(default_factory=dict)
    """Of the machines."""
    tolerations: list[Json] = field(default_factory=list)
    """Of their taints."""


@dataclass
class _Place:
    """What an admitted Job has."""

    flavor: str
    before: Json
    """What its template said of machines."""
    leaving: bool = False


class Kueue:
    """The controller; queues are made by :meth:`queue`."""

    def __init__(self, api: Api) -> None:
        """``api`` is an administrator's."""
        self._api = api
        self._queues: dict[tuple[str, str], dict[str, Flavor]] = {}
        self._places: dict[str, _Place] = {}

    def install(self) -> None:
        """Make its definitions, and the policy that suspends."""
        for resource, scope in ((LOCAL_QUEUE, "Namespaced"), (PRIORITY, "Cluster")):
            self._api.create(DEFINITION, None, _definition(resource, scope))
            real_api_server.until_served(self._api, resource)
        self._api.create(_POLICY, None, _policy())
        binding = {"metadata": {"name": _NAME}, "spec": {"policyName": _NAME}}
        kind = {"apiVersion": f"{_POLICIES}/v1", "kind": _BINDING.kind}
        self._api.create(_BINDING, None, kind | binding)

    def suspends(self) -> bool:
        """Whether the API server applies the policy already."""
        pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}
        body = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "asked", "labels": {QUEUE_LABEL: "any"}},
            "spec": {"template": {"spec": pod}},
        }
        made = self._api._json("POST", JOB.path("default"), {"dryRun": "All"}, body)
        return bool(made["spec"]["suspend"])

    def queue(self, namespace: str, name: str, **flavors: Flavor) -> dict[str, Flavor]:
        """Make a queue; its flavors, tried in this order, may be changed while it runs."""
        body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": name}}
        self._api.create(LOCAL_QUEUE, namespace, body)
        self._queues[namespace, name] = flavors
        return flavors

    def priority(self, name: str, value: int) -> None:
        """Make a priority class of workloads."""
        kind = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass"}
        self._api.create(PRIORITY, None, kind | {"metadata": {"name": name}, "value": value})

    @contextlib.contextmanager
    def running(self) -> Iterator["Kueue"]:
        """Admit and evict meanwhile."""
        with repeated(self._round):
            yield self

    def _round(self) -> None:
        jobs = [one for one in self._api.list(JOB, None, QUEUE_LABEL)[0] if not reading.finished(one)]
        there = {_uid(job): job for job in jobs}
        self._places = {uid: place for uid, place in self._places.items() if uid in there}
        for uid, place in list(self._places.items()):
            if place.leaving and not there[uid].get("status", {}).get("active"):
                self._leave(there[uid], place)
        for key, flavors in list(self._queues.items()):
            queued = [job for job in jobs if (job["metadata"]["namespace"], _queue(job)) == key]
            waiting = [job for job in queued if _uid(job) not in self._places and _is_waiting(job)]
            waiting.sort(key=lambda job: (-self._value(job), job["metadata"]["creationTimestamp"]))
            for job in waiting:
                held = [one for one in queued if _uid(one) in self._places]
                if not self._admit(job, flavors, held):
                    self._make_room(job, flavors, held)

    def _admit(self, job: Json, flavors: dict[str, Flavor], held: list[Json]) -> bool:
        for name, flavor in flavors.items():
            if _size(job) <= flavor.cpus - sum(map(_size, self._of(name, held))):
                template = job["spec"]["template"]["spec"]
                before = {"nodeSelector": template.get("nodeSelector", {})}
                before["tolerations"] = template.get("tolerations", [])
                machines = {
                    "nodeSelector": before["nodeSelector"] | flavor.labels,
                    "tolerations": before["tolerations"] + flavor.tolerations,
                }
                admitted = {"suspend": False, "template": {"spec": machines}}
                # As it was looked at: its size may have changed since.
                self._patch(job, admitted, resourceVersion=job["metadata"]["resourceVersion"])
                self._places[_uid(job)] = _Place(name, before)
                return True
        return False

    def _make_room(self, job: Json, flavors: dict[str, Flavor], held: list[Json]) -> None:
        """Evict what is less urgent, the least and newest first, where that makes room for ``job``."""
        for name, flavor in flavors.items():
            free = flavor.cpus - sum(map(_size, self._of(name, held)))
            lesser = [one for one in self._of(name, held) if self._value(one) < self._value(job)]
            lesser.sort(key=lambda one: one["metadata"]["creationTimestamp"], reverse=True)
            lesser.sort(key=self._value)
            victims = []
            while lesser and free < _size(job):
                victims.append(lesser.pop(0))
                free += _size(victims[-1])
            if free < _size(job):
                continue
            for victim in victims:
                if not self._places[_uid(victim)].leaving:
                    self._patch(victim, {"suspend": True})
                    self._places[_uid(victim)].leaving = True
            return

    def _leave(self, job: Json, place: _Place) -> None:
        """Give back the template, which may change only of a Job that has no start."""
        path = JOB.path(job["metadata"]["namespace"], job["metadata"]["name"], "status")
        self._api._json("PATCH", path, _MANAGER, {"status": {"startTime": None}}, _MERGE)
        now = job["spec"]["template"]["spec"].get("nodeSelector", {})
        added = dict.fromkeys(now.keys() - place.before["nodeSelector"].keys())
        machines = {"nodeSelector": place.before["nodeSelector"] | added}
        machines["tolerations"] = place.before["tolerations"]
        self._patch(job, {"template": {"spec": machines}})
        del self._places[_uid(job)]

    def _of(self, flavor: str, held: list[Json]) -> list[Json]:
        return [job for job in held if self._places[_uid(job)].flavor == flavor]

    def _value(self, job: Json) -> int:
        """Return a Job's priority; there has to be a class of workloads where its label names one."""
        name = job["metadata"]["labels"].get(PRIORITY_LABEL)
        return int(self._api.get(PRIORITY, None, name)["value"]) if name else 0

    def _patch(self, job: Json, spec: Json, **metadata: str) -> None:
        path = JOB.path(job["metadata"]["namespace"], job["metadata"]["name"])
        self._api._json("PATCH", path, _MANAGER, {"metadata": metadata, "spec": spec}, _MERGE)


def _uid(job: Json) -> str:
    return str(job["metadata"]["uid"])


def _queue(job: Json) -> str:
    return str(job["metadata"]["labels"][QUEUE_LABEL])


def _is_waiting(job: Json) -> bool:
    return bool(job["spec"].get("suspend")) and "deletionTimestamp" not in job["metadata"]


def _size(job: Json) -> int:
    """Return the CPUs of all of a Job's pods."""
    containers = job["spec"]["template"]["spec"]["containers"]
    return int(job["spec"]["parallelism"]) * sum(
        int(one["resources"]["requests"]["cpu"]) for one in containers
    )


def _definition(resource: Resource, scope: str) -> Json:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": resource.version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{resource.group}"},
        "spec": {
            "group": resource.group,
            "scope": scope,
            "names": {"kind": resource.kind, "plural": resource.plural},
            "versions": [version],
        },
    }


def _policy() -> Json:
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    named = f"has(object.metadata.labels) && '{QUEUE_LABEL}' in object.metadata.labels"
    suspend = '[JSONPatch{op: "add", path: "/spec/suspend", value: true}]'
    return {
        "apiVersion": f"{_POLICIES}/v1",
        "kind": _POLICY.kind,
        "metadata": {"name": _NAME},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {"resourceRules": [rule]},
            "matchConditions": [{"name": "queued", "expression": named}],
            "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": suspend}}],
        },
    }
