"""A cluster for the commands of people: the API server in memory, and a stand-in for operator and kubelet.

The stand-in does what a test tells it: it sets the status that the operator would, and makes pods.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from support.api_server import ApiServer, listening
from unmask_operator.client import InferenceServices, TrainJobs
from unmask_operator.client.connection import AGENT, Connection
from unmask_operator.client.job_logs import INDEX
from unmask_operator.launch.groups import GROUP_LABEL, ORDINAL_LABEL, ROLE_LABEL, SERVICE_LABEL
from unmask_operator.launch.pods import ATTEMPT_LABEL, CONTAINER, JOB_LABEL
from unmask_operator.resources import RESOURCES, Resource
from unmask_operator.transport import Request

__all__ = ["Stage", "kubeconfig", "staged"]

Json = dict[str, Any]
EVENT_TIME = "2026-11-27T10:00:00.000000Z"


@dataclass(frozen=True)
class Stage:
    """A server in memory at an address, and what happens in its cluster."""

    server: ApiServer
    address: str
    namespace: str = "ml"

    def jobs(self) -> TrainJobs:
        """Jobs of the namespace, without pauses between tries."""
        return TrainJobs(self._connection(), self.namespace)

    def services(self) -> InferenceServices:
        """Services of the namespace, without pauses between tries."""
        return InferenceServices(self._connection(), self.namespace)

    def _connection(self) -> Connection:
        from kubernetes import client

        from unmask_operator.transport import KubernetesTransport

        transport = KubernetesTransport(client.ApiClient(client.Configuration(host=self.address)), AGENT)
        return Connection(transport, self.address, sleep=lambda _: None)

    def create(self, resource: Resource, body: Json) -> Json:
        """Be somebody who makes an object."""
        with self.server.lock:
            return self.server._create(
                self.server.store(resource.kind), self.namespace, body, "somebody", "somebody"
            )

    def set_status(self, name: str, *, kind: str = "DiffusionTrainJob", **status: Any) -> None:
        """Be the operator."""
        self.server.set_status(kind, self.namespace, name, status)

    def serve(self, name: str, state: str = "Ready", **status: Any) -> None:
        """Be the operator of a service: it has looked at the service as it is now."""
        kind = "DiffusionInferenceService"
        (there,) = [one for one in self.server.objects(kind) if one["metadata"]["name"] == name]
        generation = there["metadata"]["generation"]
        self.set_status(name, kind=kind, state=state, observedGeneration=generation, **status)

    def pod(
        self, job: str, node: int = 0, *, attempt: int = 0, state: Json | None = None, phase: str = "Running"
    ) -> str:
        """Be the Job controller and the kubelet; return the pod's UID."""
        name = f"{job}-a{attempt}-{node}-xyz{attempt}{node}"
        metadata = {
            "name": name,
            "labels": {JOB_LABEL: job, ATTEMPT_LABEL: str(attempt)},
            "annotations": {INDEX: str(node)},
        }
        spec = {"nodeName": f"machine-{node}", "containers": [{"name": CONTAINER, "image": "u"}]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        made = self.create(RESOURCES["Pod"], body)
        self.pod_state(name, state or {"running": {"startedAt": "2026-11-27T10:00:00Z"}}, phase=phase)
        return str(made["metadata"]["uid"])

    def server_pod(
        self, service: str, ordinal: int, role: str, index: int = 0, *, state: Json | None = None
    ) -> str:
        """Be the StatefulSet controller and the kubelet; return the UID of an engine's or a shard's pod."""
        group = f"{service}-{ordinal}-x7k2pd"
        name = f"{group}-{role[0]}-{index}"
        labels = {SERVICE_LABEL: service, GROUP_LABEL: group, ORDINAL_LABEL: str(ordinal), ROLE_LABEL: role}
        metadata = {"name": name, "labels": labels | {"apps.kubernetes.io/pod-index": str(index)}}
        spec = {"nodeName": f"machine-{index}", "containers": [{"name": role, "image": "u"}]}
        made = self.create(
            RESOURCES["Pod"], {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        )
        running = {"running": {"startedAt": "2026-11-27T10:00:00Z"}}
        self.pod_state(name, state or running, phase="Running", container=role)
        return str(made["metadata"]["uid"])

    def pod_state(
        self, name: str, state: Json, *, phase: str, container: str = CONTAINER, last: Json | None = None
    ) -> None:
        """The kubelet says how a container is, and how it was before it was started again."""
        told = {"name": container, "state": state} | ({"lastState": last} if last else {})
        status = {"phase": phase, "containerStatuses": [told]}
        self.server.set_status("Pod", self.namespace, name, status)

    def end(self, uid: str, exit_code: int = 0) -> None:
        """A pod's container ends, and its log."""
        pod = next(one for one in self.server.objects("Pod") if one["metadata"]["uid"] == uid)
        terminated = {"terminated": {"exitCode": exit_code}}
        phase = "Failed" if exit_code else "Succeeded"
        container = pod["spec"]["containers"][0]["name"]
        self.pod_state(pod["metadata"]["name"], terminated, phase=phase, container=container)
        self.server.logs.end(uid)

    def asked(self) -> set[tuple[str, str, str]]:
        """(verb, group, resource) of all requests so far."""
        return set(self.server.seen)


@contextlib.contextmanager
def staged(namespace: str = "ml") -> Iterator[Stage]:
    """Yield a cluster that is gone afterwards."""
    server = ApiServer()
    with listening(server) as address:
        yield Stage(server, address, namespace)


def kubeconfig(folder: Path, address: str, *, namespace: str = "ml", **cluster: str) -> Path:
    """Write the file that people find a cluster by."""
    user = {"token": cluster.pop("token")} if "token" in cluster else {}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": address} | cluster}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return path


def refusing(verb: str, status: int, reason: str, message: str) -> Any:
    """Return what makes a server refuse one method."""

    def refusal(request: Request) -> tuple[int, str, str] | None:
        return (status, reason, message) if request.method == verb else None

    return refusal
