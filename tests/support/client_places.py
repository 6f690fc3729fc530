"""Clusters with somebody in them who asks: in memory, and a real API server where there is one."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from support import real_api_server
from support.cluster_client import Stage, refusing, staged
from unmask_operator import rbac
from unmask_operator.client import InferenceServices, NotFound, TrainJobs
from unmask_operator.client.connection import AGENT, Connection
from unmask_operator.control.api import Api
from unmask_operator.control.clock import SystemClock
from unmask_operator.resources import RESOURCES, Resource
from unmask_operator.transport import KubernetesTransport

__all__ = ["Place", "a_place"]

ROOT = Path(__file__).parents[2]
ROLE = Resource("ClusterRole", "rbac.authorization.k8s.io", "v1", "clusterroles")
BINDING = Resource("RoleBinding", "rbac.authorization.k8s.io", "v1", "rolebindings")
_numbers = itertools.count()


@dataclass
class Place:
    """A cluster with the definitions installed, and somebody in it who may do anything."""

    jobs: Callable[[str], TrainJobs]
    """Jobs of a namespace, for a person with the role ``unmask-user`` there."""
    strangers: Callable[[str], TrainJobs]
    """The same for one who may do nothing."""
    namespace: Callable[[], str]
    """Makes a namespace."""
    nowhere: Callable[[], TrainJobs]
    """Jobs of a namespace that is not there, for an administrator."""
    undefined: str
    """What a list of jobs came to before the definitions were there."""
    admin: Api

    def services(self, namespace: str) -> InferenceServices:
        """Return the services of a namespace, for a person with the role ``unmask-user`` there."""
        return InferenceServices(self.jobs(namespace)._connection, namespace)


@contextlib.contextmanager
def a_place(kind: str, folders: pytest.TempPathFactory) -> Iterator[Place]:
    """Yield a cluster ``memory`` or ``real``, with the definitions installed."""
    if kind == "memory":
        with staged() as stage:
            yield _in_memory(stage)
        return
    with real_api_server.running(folders.mktemp("real"), "person") as real:
        admin = Api(KubernetesTransport(real.client()), SystemClock())
        undefined = _refusal(_jobs(real.client(), real.address, "default"))
        for resource in (one for one in RESOURCES.values() if one.custom):
            definition = yaml.safe_load(
                (ROOT / f"deploy/crds/{resource.plural}.{resource.group}.yaml").read_text()
            )
            admin.create(real_api_server.DEFINITION, None, definition)
            real_api_server.until_served(admin, resource)
        admin.create(ROLE, None, rbac.user_role())
        yield _real(real, admin, undefined)


def _in_memory(stage: Stage) -> Place:
    def jobs(namespace: str) -> TrainJobs:
        stage.server.rules, stage.server.refusal = None, lambda request: None
        return _jobs(client.ApiClient(client.Configuration(host=stage.address)), stage.address, namespace)

    def strangers(namespace: str) -> TrainJobs:
        made = jobs(namespace)
        stage.server.rules = []
        return made

    def nowhere() -> TrainJobs:
        made = jobs("nowhere")
        stage.server.refusal = refusing("POST", 404, "NotFound", 'namespaces "nowhere" not found')
        return made

    people = jobs("ml")
    stage.server.refusal = refusing("GET", 404, "", "404 page not found")
    return Place(
        jobs=jobs,
        strangers=strangers,
        namespace=lambda: f"test-{next(_numbers)}",
        nowhere=nowhere,
        undefined=_refusal(people),
        admin=Api(
            KubernetesTransport(client.ApiClient(client.Configuration(host=stage.address))), SystemClock()
        ),
    )


def _refusal(jobs: TrainJobs) -> str:
    with pytest.raises(NotFound) as caught:
        jobs.list()
    return str(caught.value)


def _real(real: real_api_server.RealServer, admin: Api, undefined: str) -> Place:
    allowed: set[str] = set()

    def namespace() -> str:
        name = f"test-{next(_numbers)}"
        admin.create(
            real_api_server.NAMESPACE,
            None,
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
        )
        return name

    def jobs(name: str) -> TrainJobs:
        if name not in allowed:
            allowed.add(name)
            group = "rbac.authorization.k8s.io"
            admin.create(
                BINDING,
                name,
                {
                    "apiVersion": f"{group}/v1",
                    "kind": "RoleBinding",
                    "metadata": {"name": "people"},
                    "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": rbac.USER},
                    "subjects": [{"apiGroup": group, "kind": "User", "name": "person"}],
                },
            )
        return _jobs(real.client(admin=False), real.address, name)

    return Place(
        jobs=jobs,
        strangers=lambda name: _jobs(real.client(admin=False), real.address, name),
        namespace=namespace,
        nowhere=lambda: _jobs(real.client(), real.address, "nowhere"),
        undefined=undefined,
        admin=admin,
    )


def _jobs(api_client: client.ApiClient, address: str, namespace: str) -> TrainJobs:
    return TrainJobs(Connection(KubernetesTransport(api_client, AGENT), address), namespace)
