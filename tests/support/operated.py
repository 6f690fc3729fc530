"""The operator's own program against a real control plane, under the permissions generated for it."""

import contextlib
import itertools
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from support import real_api_server
from support.manifests import changed, train_job
from support.operator_process import operator_process
from support.real_api_server import DEFINITION, NAMESPACE, RealServer
from support.simulated_nodes import Nodes
from unmask_operator import rbac
from unmask_operator.control.api import Api, KubernetesTransport
from unmask_operator.control.clock import SystemClock
from unmask_operator.reconcilers import RECONCILERS
from unmask_operator.resources import MANAGER, RESOURCES, Resource

__all__ = ["ACCOUNT", "IMAGE", "SERVICE", "TRAIN_JOB", "Operated", "Place", "install", "operating", "started"]

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
ACCOUNT = f"system:serviceaccount:{rbac.SYSTEM_NAMESPACE}:{MANAGER}"
IMAGE = "registry.example/unmask@sha256:" + "0" * 64
TRAIN_JOB = RESOURCES["DiffusionTrainJob"]
SERVICE = RESOURCES["DiffusionInferenceService"]
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
_MERGE = "application/merge-patch+json"
_BATCH = "batch.kubernetes.io/"
_numbers = itertools.count()


def until(true: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    """Wait until ``true`` returns something, and return that."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return found


def install(api: Api) -> None:
    """Make what `kubectl apply` of deploy/ makes: definitions, account, permissions."""
    for path in sorted((ROOT / "deploy/crds").glob("*.yaml")):
        api.create(DEFINITION, None, yaml.safe_load(path.read_text()))
    namespace(api, rbac.SYSTEM_NAMESPACE)
    for body in rbac.manifests(RECONCILERS, None):
        group, _, version = body["apiVersion"].rpartition("/")
        plural = f"{body['kind'].lower()}s"
        resource = Resource(body["kind"], group, version, plural)
        api.create(resource, body["metadata"].get("namespace"), body)
    for resource in (TRAIN_JOB, SERVICE):
        real_api_server.until_served(api, resource)


def namespace(api: Api, name: str, **labels: str) -> str:
    """Make a namespace, and wait for its default account where there are controllers."""
    metadata = {"name": name, "labels": labels}
    api.create(NAMESPACE, None, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    return name


@contextlib.contextmanager
def started(
    server: RealServer, folder: Path, *flags: str, program: str = ""
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the operator; ``program`` is Python to run before it, another version of it so to say."""
    lines = f"import sys\n{program}\nfrom unmask_operator.entry import main\nsys.exit(main(sys.argv[1:]))"
    given = [f"--kubeconfig={server.kubeconfig(folder)}", f"--image={IMAGE}"]
    given += [f"--lease-namespace={rbac.SYSTEM_NAMESPACE}", "--host=127.0.0.1", "--port=0", *flags]
    with operator_process(lines, *given, log=folder / "operator.log") as process:
        yield process


@dataclass
class Operated:
    """A control plane with an operator, and a namespace of its own for each :meth:`place`."""

    server: RealServer
    folder: Path
    api: Api
    nodes: Nodes
    lease_seconds: float = 3.0
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self, *flags: str, program: str = "") -> None:
        """Start an operator; one that is killed takes its lease with it for as long as that holds."""
        flags = (f"--lease-seconds={self.lease_seconds:g}", "--qps=200", "--burst=400", *flags)
        process = self._stack.enter_context(started(self.server, self.folder, *flags, program=program))
        self.processes.append(process)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the operators that run."""
        for process in self.processes:
            process.send_signal(number)
            process.wait(timeout=60)
        self.processes.clear()

    def place(self) -> "Place":
        """Return a new namespace, in which only restricted pods are admitted."""
        name = namespace(self.api, f"team-{next(_numbers)}", **RESTRICTED)
        account = Resource("ServiceAccount", "", "v1", "serviceaccounts")
        until(lambda: self.api.list(account, name)[0], "the namespace's account")
        return Place(self, name)

    def log(self) -> str:
        """Return what the operators have logged."""
        return (self.folder / "operator.log").read_text()

    def audited(self) -> list[Json]:
        """Return the requests of the operator's account, as the API server has logged them."""
        lines = self.server.audit.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]


@dataclass
class Place:
    """A namespace."""

    operated: Operated
    name: str

    @property
    def api(self) -> Api:
        return self.operated.api

    def submit(self, name: str = "tiny", **values: Any) -> Json:
        """Make a job without volumes; ``values`` are fields of its spec by path, ``__`` for a dot."""
        plain = {
            "metadata.name": name,
            "spec.model.tokenizer.uri": "/data/tokenizer",
            "spec.data.train[0].uri": "/data/train.jsonl",
            "spec.data.validation[0].uri": "/data/held-out.jsonl",
            "spec.checkpoint.uri": "/data/run",
            "spec.resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
        }
        spec = {f"spec.{key.replace('__', '.')}": value for key, value in values.items()}
        return self.api.create(TRAIN_JOB, self.name, changed(train_job(), plain | spec))

    def make(self, kind: str, name: str, api_version: str = "v1", **rest: Any) -> Json:
        """Make some other object."""
        group, _, version = api_version.rpartition("/")
        resource = Resource(kind, group, version, f"{kind.lower()}s")
        body = {"apiVersion": api_version, "kind": kind, "metadata": {"name": name}} | rest
        return self.api.create(resource, self.name, body)

    def patch(self, spec: Json, name: str = "tiny") -> Json:
        """Change the spec of a job."""
        return self.api.merge(TRAIN_JOB, self.name, name, {"spec": spec})

    def scale(self, nodes: int, name: str = "tiny") -> None:
        """Do what `kubectl scale` does."""
        path = TRAIN_JOB.path(self.name, name, "scale")
        self.api._json("PATCH", path, {"fieldManager": "kubectl"}, {"spec": {"replicas": nodes}}, _MERGE)

    def delete(self, kind: str, name: str, propagation: str = "Background") -> None:
        there = self.api.get(RESOURCES[kind], self.name, name)
        self.api.delete(RESOURCES[kind], self.name, name, there["metadata"]["uid"], None, propagation)

    def objects(self, kind: str) -> list[Json]:
        return self.api.list(RESOURCES[kind], self.name)[0]

    def pods(self) -> dict[str, Json]:
        """Return the pods that are not being deleted, by Job and index."""
        found = {}
        for pod in self.objects("Pod"):
            where = pod["metadata"]
            if "deletionTimestamp" not in where and pod["status"].get("phase") != "Failed":
                job, index = (
                    where["labels"][f"{_BATCH}job-name"],
                    where["annotations"][f"{_BATCH}job-completion-index"],
                )
                found[f"{job}-{index}"] = pod
        return found

    def status(self, name: str = "tiny") -> Json:
        return dict(self.api.get(TRAIN_JOB, self.name, name).get("status") or {})

    def condition(self, kind: str, name: str = "tiny") -> tuple[str, str, str]:
        """Return status, reason and message of a condition; empty where it is not there."""
        for one in self.status(name).get("conditions", ()):
            if one["type"] == kind:
                return one["status"], one["reason"], one["message"]
        return "", "", ""

    def until_condition(self, kind: str, status: str, reason: str, name: str = "tiny") -> str:
        """Wait for a condition, and return its message."""
        found = until(
            lambda: (now := self.condition(kind, name))[:2] == (status, reason) and now,
            f"{kind} {status} {reason} of {self.name}/{name}: {self.operated.log()[-2000:]}",
        )
        return str(found[2])

    def until_running(self, nodes: int = 1, attempt: int = 0, name: str = "tiny") -> dict[str, Json]:
        """Wait until an attempt runs on so many nodes, and return its pods."""

        def running() -> bool:
            status = self.status(name)
            ready = (status.get("nodes") or {}).get("ready")
            return (status.get("attempt", 0), status.get("state"), ready) == (attempt, "Running", nodes)

        until(running, f"attempt {attempt} of {self.name}/{name} runs")
        return self.pods()

    def end(self, pod: str, exit_code: int, message: str = "") -> None:
        """Let a pod, named by Job and index, end."""
        name = self.pods()[pod]["metadata"]["name"]
        self.operated.nodes.end(self.name, name, exit_code, message)


@contextlib.contextmanager
def operating(folder: Path, *, pod_groups: bool = False, lease_seconds: float = 3.0) -> Iterator[Operated]:
    """Run a control plane with controllers, kubelets and an operator, which leads for ``lease_seconds``."""
    with real_api_server.running(folder, ACCOUNT, controllers=True, pod_groups=pod_groups) as server:
        api = Api(KubernetesTransport(server.client()), SystemClock(), timeout=60.0)
        install(api)
        with Nodes(api).running() as nodes:
            operated = Operated(server, folder, api, nodes, lease_seconds)
            with operated._stack:
                operated.start()
                yield operated
