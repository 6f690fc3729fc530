"""The control plane: its certificates, the command lines of its programs, and the programs as they run."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from parent_death import bound
from real_cluster.programs import folder as programs

__all__ = [
    "DOMAIN",
    "PODS",
    "SERVICES",
    "ControlPlane",
    "Plane",
    "certificate_of",
    "kubeconfig",
    "make_certificates",
]

SERVICES = "10.96.0.0/16"
PODS = "10.244.0.0/16"
DOMAIN = "cluster.local"
_FIRST_SERVICE = "10.96.0.1"
_IDENTITIES = {
    "apiserver": "/CN=kube-apiserver",
    "admin": "/O=system:masters/CN=admin",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "node": "/O=system:nodes/CN=system:node:node0",
}


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Where a control plane is."""

    folder: Path
    """Holds all that it writes."""
    address: str
    """IP address that it advertises."""
    port: int
    etcd: int
    peers: int
    controllers: int
    """Port of the controller manager."""
    scheduler: int
    """Port of the scheduler."""
    flags: Sequence[str] = ()
    """More flags of the API server."""
    controller_flags: Sequence[str] = ()
    """More flags of the controller manager."""
    scheduler_flags: Sequence[str] = ()
    """More flags of the scheduler."""

    @classmethod
    def on_loopback(
        cls,
        folder: Path,
        *,
        flags: Sequence[str] = (),
        controller_flags: Sequence[str] = (),
        scheduler_flags: Sequence[str] = (),
    ) -> Self:
        """Return one with ports that are free now."""
        with contextlib.ExitStack() as stack:
            taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(5)]
            port, etcd, peers, controllers, scheduler = (one.getsockname()[1] for one in taken)
        return cls(
            folder=folder,
            address="127.0.0.1",
            port=port,
            etcd=etcd,
            peers=peers,
            controllers=controllers,
            scheduler=scheduler,
            flags=flags,
            controller_flags=controller_flags,
            scheduler_flags=scheduler_flags,
        )

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return f"https://{self.address}:{self.port}"

    @property
    def pki(self) -> Path:
        """Folder of the certificates."""
        return self.folder / "pki"

    def etcd_command(self) -> list[str]:
        """Return the command line of etcd, which forgets all when the machine stops."""
        clients, peers = f"http://127.0.0.1:{self.etcd}", f"http://127.0.0.1:{self.peers}"
        return [
            str(programs() / "etcd"),
            f"--data-dir={self.folder / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={clients}",
            f"--advertise-client-urls={clients}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
        ]

    def api_server_command(self) -> list[str]:
        """Return the command line of the API server."""
        pki = self.pki
        return [
            str(programs() / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{self.etcd}",
            f"--bind-address={'127.0.0.1' if self.address == '127.0.0.1' else '0.0.0.0'}",
            # Loopback cannot be advertised, and nobody looks at what is.
            f"--advertise-address={'192.0.2.1' if self.address == '127.0.0.1' else self.address}",
            f"--secure-port={self.port}",
            f"--tls-cert-file={pki / 'apiserver.crt'}",
            f"--tls-private-key-file={pki / 'apiserver.key'}",
            f"--client-ca-file={pki / 'ca.crt'}",
            f"--service-account-key-file={pki / 'accounts.key'}",
            f"--service-account-signing-key-file={pki / 'accounts.key'}",
            f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--kubelet-client-certificate={pki / 'admin.crt'}",
            f"--kubelet-client-key={pki / 'admin.key'}",
            "--kubelet-preferred-address-types=InternalIP",
            "--authorization-mode=Node,RBAC",
            # What OpenShift does everywhere: who blocks an owner's deletion needs a permission.
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
            "--allow-privileged=true",
            *self.flags,
        ]

    def controllers_command(self) -> list[str]:
        """Return the command line of the controllers."""
        config = self.pki / "controller-manager.kubeconfig"
        return [
            str(programs() / "kube-controller-manager"),
            f"--kubeconfig={config}",
            f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
            f"--service-account-private-key-file={self.pki / 'accounts.key'}",
            f"--root-ca-file={self.pki / 'ca.crt'}",
            "--use-service-account-credentials",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.controllers}",
            "--leader-elect=false",
            "--allocate-node-cidrs",
            f"--cluster-cidr={PODS}",
            *self.controller_flags,
        ]

    def scheduler_command(self) -> list[str]:
        """Return the command line of the scheduler."""
        return [
            str(programs() / "kube-scheduler"),
            f"--kubeconfig={self.pki / 'scheduler.kubeconfig'}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.scheduler}",
            "--leader-elect=false",
            *self.scheduler_flags,
        ]


class ControlPlane:
    """The programs of a control plane on this machine, in a ``with`` that starts etcd and the API server.

    They end with the thread that started them, however that ends.
    """

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        """Where it is."""
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        make_certificates(self.plane)
        self._start(self.plane.etcd_command())
        self._start(self.plane.api_server_command())
        return self

    def __exit__(self, *error: object) -> None:
        for name in reversed(list(self._running)):
            self._end(name)

    def start_controllers(self) -> None:
        """Start the controllers and the scheduler; they end where the API server is not healthy soon."""
        self._start(self.plane.controllers_command())
        self._start(self.plane.scheduler_command())

    def restart_api_server(self) -> None:
        """End the API server and start it again, which takes it some seconds."""
        self._end("kube-apiserver")
        self._start(self.plane.api_server_command())

    def serves(self, path: str = "/readyz") -> bool:
        """Whether the API server answers an administrator's question for ``path`` with success.

        Raises:
            RuntimeError: A program has ended, so that this will never be so.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} has ended: {self.last_words(name)}")
        pki = self.plane.pki
        trusted = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        trusted.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        asking = http.client.HTTPSConnection(
            self.plane.address, self.plane.port, timeout=10.0, context=trusted
        )
        try:
            asking.request("GET", path)
            return asking.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            asking.close()

    def last_words(self, name: str = "kube-apiserver") -> str:
        """Return the end of what a program has logged."""
        return self._log(name).read_text(errors="replace")[-2000:]

    def _start(self, command: Sequence[str]) -> None:
        name = Path(command[0]).name
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                bound(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _end(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()  # on SIGTERM the API server would wait for its watches
        process.wait()

    def _log(self, name: str) -> Path:
        return self.plane.folder / f"{name}.log"


def make_certificates(plane: Plane) -> None:
    """Make an authority, a certificate for each who needs one, and a kubeconfig with it."""
    pki = plane.pki
    pki.mkdir(parents=True)
    # Keys on curves are made in no time.
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", pki / "accounts.key")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-keyout", pki / "ca.key", "-out", pki / "ca.crt", "-subj", "/CN=ca", "-days", "30")
    _openssl("req", "-x509", *key, *authority, "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    names = ["IP:127.0.0.1", f"IP:{_FIRST_SERVICE}", f"IP:{plane.address}", "DNS:localhost"]
    names += ["DNS:kubernetes.default.svc", f"DNS:kubernetes.default.svc.{DOMAIN}"]
    extensions = ["subjectKeyIdentifier=hash", "authorityKeyIdentifier=keyid"]  # or strict readers refuse it
    extensions.append(f"subjectAltName={','.join(dict.fromkeys(names))}")
    (pki / "extensions").write_text("\n".join(extensions) + "\n")
    for name, subject in _IDENTITIES.items():
        request = pki / f"{name}.csr"
        _openssl("req", *key, "-keyout", pki / f"{name}.key", "-out", request, "-subj", subject)
        signing = ["-CA", pki / "ca.crt", "-CAkey", pki / "ca.key", "-CAcreateserial"]
        made = ["-out", pki / f"{name}.crt", "-days", "30", "-extfile", pki / "extensions"]
        _openssl("x509", "-req", "-in", request, *signing, *made)
        (pki / f"{name}.kubeconfig").write_text(kubeconfig(pki, plane.url, certificate_of(pki, name)))


def certificate_of(pki: Path, name: str) -> Mapping[str, str]:
    """Return who somebody with a certificate is to a kubeconfig."""
    return {"client-certificate": str(pki / f"{name}.crt"), "client-key": str(pki / f"{name}.key")}


def kubeconfig(pki: Path, server: str, user: Mapping[str, str]) -> str:
    """Return the kubeconfig by which ``user`` reaches ``server``."""
    cluster = {"server": server, "certificate-authority": str(pki / "ca.crt")}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    return json.dumps(config)


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
