"""The control plane: its certificates, and the command lines of its programs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from real_cluster.programs import folder as programs

__all__ = ["DOMAIN", "PODS", "SERVICES", "Plane", "kubeconfig", "make_certificates"]

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
        ]

    def scheduler_command(self, flags: Sequence[str] = ()) -> list[str]:
        """Return the command line of the scheduler."""
        return [
            str(programs() / "kube-scheduler"),
            f"--kubeconfig={self.pki / 'scheduler.kubeconfig'}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.scheduler}",
            "--leader-elect=false",
            *flags,
        ]


def make_certificates(plane: Plane) -> None:
    """Make an authority, a certificate for each who needs one, and a kubeconfig with it."""
    pki = plane.pki
    pki.mkdir(parents=True)
    _openssl("genrsa", "-out", pki / "accounts.key", "2048")
    key = ("-newkey", "rsa:2048", "-nodes")
    _openssl(
        "req",
        "-x509",
        *key,
        "-keyout",
        pki / "ca.key",
        "-out",
        pki / "ca.crt",
        "-subj",
        "/CN=ca",
        "-days",
        "30",
    )
    names = ["IP:127.0.0.1", f"IP:{_FIRST_SERVICE}", f"IP:{plane.address}", "DNS:localhost"]
    names += ["DNS:kubernetes.default.svc", f"DNS:kubernetes.default.svc.{DOMAIN}"]
    (pki / "names").write_text(f"subjectAltName={','.join(dict.fromkeys(names))}\n")
    for name, subject in _IDENTITIES.items():
        request = pki / f"{name}.csr"
        _openssl("req", *key, "-keyout", pki / f"{name}.key", "-out", request, "-subj", subject)
        signing = ["-CA", pki / "ca.crt", "-CAkey", pki / "ca.key", "-CAcreateserial"]
        made = ["-out", pki / f"{name}.crt", "-days", "30", "-extfile", pki / "names"]
        _openssl("x509", "-req", "-in", request, *signing, *made)
        server = f"https://{plane.address}:{plane.port}"
        (pki / f"{name}.kubeconfig").write_text(json.dumps(kubeconfig(pki, name, server)))


def kubeconfig(pki: Path, name: str, server: str) -> Mapping[str, object]:
    """Return the kubeconfig by which ``name`` reaches ``server``."""
    cluster = {"server": server, "certificate-authority": str(pki / "ca.crt")}
    user = {"client-certificate": str(pki / f"{name}.crt"), "client-key": str(pki / f"{name}.key")}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
        "current-context": "test",
    }


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
