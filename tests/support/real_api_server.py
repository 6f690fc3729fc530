"""A real etcd and kube-apiserver on loopback (``scripts/real_cluster``), where their programs are there.

With the real controllers and scheduler where asked for. Nodes and kubelets are the tests'.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client

from real_cluster import programs
from real_cluster.control_plane import ControlPlane, Plane, kubeconfig
from unmask_operator.control.api import Api, ApiError
from unmask_operator.resources import Resource

Json = dict[str, Any]

AVAILABLE = not programs.missing(one for one in programs.API if one.name in ("etcd", "kube-apiserver"))
NAMESPACE = Resource("Namespace", "", "v1", "namespaces")
DEFINITION = Resource("CustomResourceDefinition", "apiextensions.k8s.io", "v1", "customresourcedefinitions")
_POD_GROUPS = "scheduling.k8s.io/v1beta1"
_CONTROLLERS = (
    "--controllers=job-controller,statefulset-controller,endpointslice-controller,disruption-controller,"
    "garbage-collector-controller,namespace-controller,resourcequota-controller,"
    "serviceaccount-controller,podgroup-protection-controller,pod-garbage-collector-controller"
)
_FAST = ("--kube-api-qps=200", "--kube-api-burst=400")
_ADMIN, _OPERATOR = "admin-token", "operator-token"


@dataclass(frozen=True)
class RealServer:
    """Where it is, and who may talk to it."""

    plane: Plane
    restart: Callable[[], None]
    """Ends the kube-apiserver and starts it again: it knows no resource version from before."""
    audit: Path
    """A line for each request of the operator's account, as JSON, written when it is answered."""

    @property
    def address(self) -> str:
        return self.plane.url

    def client(self, *, admin: bool = True) -> client.ApiClient:
        """Return a client of an administrator, or of the operator's account."""
        settings = client.Configuration()
        settings.host = self.address
        settings.ssl_ca_cert = str(self.plane.pki / "ca.crt")
        settings.api_key = {"BearerToken": f"Bearer {_ADMIN if admin else _OPERATOR}"}
        settings.connection_pool_maxsize = 64
        return client.ApiClient(settings)

    def kubeconfig(self, folder: Path, *, admin: bool = False) -> Path:
        """Write the file that the operator, or an administrator, finds the cluster by."""
        path = folder / ("admin.kubeconfig" if admin else "kubeconfig")
        user = {"token": _ADMIN if admin else _OPERATOR}
        path.write_text(kubeconfig(self.plane.pki, self.address, user))
        return path


@contextlib.contextmanager
def running(
    folder: Path, account: str, *, controllers: bool = False, pod_groups: bool = False
) -> Iterator[RealServer]:
    """Run both, or all.

    Args:
        folder: for what they write.
        account: the user (of the operator) whose permissions are those of RBAC.
        controllers: whether the controllers of Jobs, StatefulSets, Services, budgets, owners, quotas,
            accounts and namespaces run, and the scheduler.
        pod_groups: whether it has native PodGroups, which are off in a cluster as it comes.
    """
    tokens = folder / "tokens.csv"
    tokens.write_text(f'{_ADMIN},admin,1,"system:masters"\n{_OPERATOR},{account},2\n')
    policy, audit = folder / "audit.yaml", folder / "audit.log"
    rules = [{"level": "Metadata", "users": [account], "omitStages": ["RequestReceived"]}, {"level": "None"}]
    policy.write_text(yaml.safe_dump({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}))
    gates = ["--feature-gates=GenericWorkload=true"] if pod_groups else []
    plane = Plane.on_loopback(
        folder,
        flags=[
            f"--token-auth-file={tokens}",
            # Without their controller no namespace has an account.
            *([] if controllers else ["--disable-admission-plugins=ServiceAccount"]),
            f"--audit-policy-file={policy}",
            f"--audit-log-path={audit}",
            *([f"--runtime-config={_POD_GROUPS}=true"] if pod_groups else []),
            *gates,
        ],
        controller_flags=[_CONTROLLERS, *_FAST, *gates],
        scheduler_flags=[*_FAST, *gates],
    )
    with ControlPlane(plane) as serving:

        def restart() -> None:
            serving.restart_api_server()
            _wait(serving)

        _wait(serving)
        if controllers:
            # They give the server ten seconds to be healthy, and end.
            _wait(serving, "/readyz")
            serving.start_controllers()
        yield RealServer(plane, restart, audit)


def until_served(api: Api, resource: Resource) -> None:
    """Wait until a definition that was just made is served."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(ApiError):
            api.list(resource, None)
            return
        time.sleep(0.1)
    raise TimeoutError(f"{resource.plural} are not served")


def _wait(serving: ControlPlane, path: str = "/api/v1/namespaces/default") -> None:
    end = time.monotonic() + 120
    while not serving.serves(path):
        if time.monotonic() > end:
            raise TimeoutError(serving.last_words())
        time.sleep(0.2)
