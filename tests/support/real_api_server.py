"""A real etcd and kube-apiserver on loopback, where their programs are there (``UNMASK_CLUSTER`` names the
folder); with the real controllers and scheduler where asked for. Nodes and kubelets are the tests'."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client

from real_cluster import programs
from unmask_operator.control.api import Api, ApiError, KubernetesTransport, Request, Unreachable
from unmask_operator.resources import Resource

Json = dict[str, Any]

PROGRAMS = programs.folder()
AVAILABLE = not programs.missing(one for one in programs.API if one.name in ("etcd", "kube-apiserver"))
NAMESPACE = Resource("Namespace", "", "v1", "namespaces")
DEFINITION = Resource("CustomResourceDefinition", "apiextensions.k8s.io", "v1", "customresourcedefinitions")
_POD_GROUPS = "scheduling.k8s.io/v1beta1"
_CONTROLLERS = (
    "--controllers=job-controller,garbage-collector-controller,namespace-controller,resourcequota-controller,"
    "serviceaccount-controller,podgroup-protection-controller,pod-garbage-collector-controller"
)
_ADMIN, _OPERATOR = "admin-token", "operator-token"


@dataclass(frozen=True)
class RealServer:
    """Where it is, and who may talk to it."""

    address: str
    certificate: Path
    restart: Callable[[], None]
    """Ends the kube-apiserver and starts it again: it knows no resource version from before."""
    audit: Path
    """A line for each request of the operator's account, as JSON, written when it is answered."""

    def client(self, *, admin: bool = True) -> client.ApiClient:
        """Return a client of an administrator, or of the operator's account."""
        settings = client.Configuration()
        settings.host = self.address
        settings.ssl_ca_cert = str(self.certificate)
        settings.api_key = {"BearerToken": f"Bearer {_ADMIN if admin else _OPERATOR}"}
        settings.connection_pool_maxsize = 64
        return client.ApiClient(settings)

    def kubeconfig(self, folder: Path, *, admin: bool = False) -> Path:
        """Write the file that the operator, or an administrator, finds the cluster by."""
        cluster = {"server": self.address, "certificate-authority": str(self.certificate)}
        text = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": _ADMIN if admin else _OPERATOR}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path = folder / ("admin.kubeconfig" if admin else "kubeconfig")
        path.write_text(yaml.safe_dump(text))
        return path


@contextlib.contextmanager
def running(
    folder: Path, account: str, *, controllers: bool = False, pod_groups: bool = False
) -> Iterator[RealServer]:
    """Run both, or all.

    Args:
        folder: for what they write.
        account: the user (of the operator) whose permissions are those of RBAC.
        controllers: whether the controllers of Jobs, owners, quotas, accounts and namespaces run, and the
            scheduler.
        pod_groups: whether it has native PodGroups, which are off in a cluster as it comes.
    """
    ports = _free_ports(3)
    tokens = folder / "tokens.csv"
    tokens.write_text(f'{_ADMIN},admin,1,"system:masters"\n{_OPERATOR},{account},2\n')
    key = folder / "accounts.key"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    policy = folder / "audit.yaml"
    rules = [{"level": "Metadata", "users": [account], "omitStages": ["RequestReceived"]}, {"level": "None"}]
    policy.write_text(yaml.safe_dump({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}))
    gates = ["--feature-gates=GenericWorkload=true"] if pod_groups else []
    etcd = f"http://127.0.0.1:{ports[0]}"
    peers = f"http://127.0.0.1:{ports[1]}"
    commands = [
        [
            PROGRAMS / "etcd",
            f"--data-dir={folder / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
        ],
        [
            PROGRAMS / "kube-apiserver",
            f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={ports[2]}",
            f"--cert-dir={folder / 'certificates'}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            # What OpenShift does everywhere: who blocks an owner's deletion needs a permission.
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
            *([] if controllers else ["--disable-admission-plugins=ServiceAccount"]),
            f"--audit-policy-file={policy}",
            f"--audit-log-path={folder / 'audit.log'}",
            *([f"--runtime-config={_POD_GROUPS}=true"] if pod_groups else []),
            *gates,
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/16",
        ],
    ]
    with contextlib.ExitStack() as stack:

        def start(command: list[Any]) -> "subprocess.Popen[bytes]":
            log = stack.enter_context((folder / f"{Path(command[0]).name}.log").open("ab"))
            process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(_end, process)
            return process

        def restart() -> None:
            _end(serving.pop())
            serving.append(start(commands[1]))
            _wait(server, folder)

        start(commands[0])
        serving = [start(commands[1])]
        certificate = folder / "certificates" / "apiserver.crt"
        server = RealServer(f"https://127.0.0.1:{ports[2]}", certificate, restart, folder / "audit.log")
        _wait(server, folder)
        if controllers:
            # They give the server ten seconds to be healthy, and end.
            _wait(server, folder, "/readyz")
            config = server.kubeconfig(folder, admin=True)
            for name, flags in (
                ("kube-controller-manager", [f"--service-account-private-key-file={key}", _CONTROLLERS]),
                ("kube-scheduler", []),
            ):
                command = [PROGRAMS / name, f"--kubeconfig={config}", "--leader-elect=false", *flags, *gates]
                start([*command, "--secure-port=0", "--kube-api-qps=200", "--kube-api-burst=400"])
        yield server


def until_served(api: Api, resource: Resource) -> None:
    """Wait until a definition that was just made is served."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(ApiError):
            api.list(resource, None)
            return
        time.sleep(0.1)
    raise TimeoutError(f"{resource.plural} are not served")


def _wait(server: RealServer, folder: Path, path: str = "/api/v1/namespaces/default") -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if server.certificate.is_file():
            with contextlib.suppress(Unreachable):
                transport = KubernetesTransport(server.client())
                if transport.send(Request("GET", path)).status == 200:
                    return
        time.sleep(0.2)
    raise TimeoutError((folder / "kube-apiserver.log").read_text()[-2000:])


def _end(process: "subprocess.Popen[bytes]") -> None:
    # On SIGTERM it would wait for its watches.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
