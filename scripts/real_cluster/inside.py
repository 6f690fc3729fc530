"""The first process of a node's namespaces: makes the network, starts the programs, buries the dead.

Everything that it or a container starts is in a process, network and mount namespace of its own, so that all
of it ends with this process, however that ends. :mod:`real_cluster.running` starts it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from real_cluster.control_plane import DOMAIN, PODS, Plane, make_certificates
from real_cluster.images import import_images, link_unpacked, write_pause_image
from real_cluster.programs import folder as programs

__all__ = ["main"]

ADDRESS = "10.10.0.1"
"""The node's, in its own network alone; nothing is routed out of that."""
PAUSE = "cluster.local/pause:1"
# Written to whatever folder they are told, by programs that know of no other cluster on the machine.
_PRIVATE = ["/run", "/var/lib/cni", "/var/lib/kubelet", "/var/log/containers"]


def main() -> None:
    """Start the cluster that the command line names as JSON, and go on until killed."""
    starter = os.fork()
    if starter == 0:
        _start(json.loads(sys.argv[1]))
    while True:  # the first process inherits all orphans
        pid, status = os.wait()
        if pid == starter:
            sys.exit(os.waitstatus_to_exitcode(status))


def _start(settings: dict[str, Any]) -> None:
    """Start everything, say on the file ``ready`` when it serves, or what went wrong; then keep watch."""
    plane = Plane(
        folder=Path(settings["folder"]),
        address=ADDRESS,
        port=6443,
        etcd=2379,
        peers=2380,
        controllers=10257,
        scheduler=10259,
        flags=settings["flags"],
    )
    node = _Node(plane, settings["cgroup"], settings["images"])
    threading.Thread(target=_pass_on, args=[settings["listener"], plane.port], daemon=True).start()
    try:
        for path in _PRIVATE:
            Path(path).mkdir(parents=True, exist_ok=True)
            _run("mount", "-t", "tmpfs", "tmpfs", path)
        _make_network()
        make_certificates(plane)
        node.start()
        said = "ready"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    os.write(settings["ready"], said.encode())
    os.close(settings["ready"])
    node.watch()


def _make_network() -> None:
    _run("ip", "link", "set", "lo", "up")
    # Not every kernel has dummy devices.
    _run("ip", "link", "add", "node0", "type", "bridge")
    _run("ip", "address", "add", f"{ADDRESS}/24", "dev", "node0")
    _run("ip", "link", "set", "node0", "up")
    # kube-apiserver and kubelet want a default route, even one to nowhere.
    _run("ip", "route", "add", "default", "via", ADDRESS, "dev", "node0")


def _pass_on(listener: int, port: int) -> None:
    """Pass on what arrives at a socket that was made outside to the API server."""
    with socket.socket(fileno=listener) as outside:
        while True:
            client, _ = outside.accept()
            threading.Thread(target=_join, args=[client, port], daemon=True).start()


def _join(client: socket.socket, port: int) -> None:
    with client:
        try:
            server = socket.create_connection((ADDRESS, port))
        except OSError:
            return
        with server:
            back = threading.Thread(target=_copy, args=[server, client], daemon=True)
            back.start()
            _copy(client, server)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for one in (source, target):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class _Node:
    """The programs of a cluster of one node."""

    def __init__(self, plane: Plane, cgroup: str, images: list[str]) -> None:
        self.plane = plane
        self.folder = plane.folder
        self.cgroup = cgroup
        self.images = images
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def watch(self) -> None:
        """Say so where one of the programs ends, which none does of its own."""
        while True:
            for name, process in list(self.running.items()):
                if process.poll() is not None:
                    print(f"{name} ended; see {self._log(name)}", file=sys.stderr, flush=True)
                    del self.running[name]
            time.sleep(1.0)

    def start(self) -> None:
        """Start the programs, one after the other where one needs the other."""
        plane, folder = self.plane, self.folder
        self._run("etcd", plane.etcd_command())
        link_unpacked(folder / "containerd")
        self._run("containerd", self._containerd_command())
        self._run("kube-apiserver", plane.api_server_command())
        socket_path = folder / "containerd.sock"
        self._wait(60, str(programs() / "ctr"), "-a", str(socket_path), "version")
        pause = write_pause_image(PAUSE, folder / "pause.tar")
        import_images(socket_path, [pause, *map(Path, self.images)])
        kubectl = [str(programs() / "kubectl"), f"--kubeconfig={plane.pki / 'admin.kubeconfig'}"]
        self._wait(120, *kubectl, "get", "--raw", "/readyz")
        self._run("kube-controller-manager", plane.controllers_command())
        self._run("kube-scheduler", plane.scheduler_command())
        self._run("kubelet", self._kubelet_command())
        self._run("kube-proxy", self._proxy_command())
        self._run("coredns", self._dns_command())
        self._wait(120, *kubectl, "wait", "--for=condition=Ready", "node/node0", "--timeout=1s")
        # The kubelet does not find the size of every disk; without one it offers none, and pods ask for some.
        storage = {"ephemeral-storage": "100Gi"}
        status = json.dumps({"status": {"capacity": storage, "allocatable": storage}})
        self._wait(
            60, *kubectl, "patch", "node", "node0", "--subresource=status", "--type=merge", "-p", status
        )
        self._wait(60, *kubectl, "-n", "default", "get", "serviceaccount", "default")

    def _run(self, name: str, command: list[str]) -> None:
        # containerd looks for its shim and runc on the path.
        environment = os.environ | {"PATH": f"{programs()}:{os.environ['PATH']}"}
        self._log(name).parent.mkdir(exist_ok=True)
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.running[name] = process

    def _wait(self, seconds: float, *command: str) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode == 0:
                return
            time.sleep(0.2)
        raise TimeoutError(f"{' '.join(command)}: {done.stderr.strip()}; see {self.folder / 'log'}")

    def _log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.log"

    def _containerd_command(self) -> list[str]:
        network = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": True,
                    "ipMasq": True,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": "10.244.0.0/24"}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }
        (self.folder / "cni").mkdir()
        (self.folder / "cni" / "pods.conflist").write_text(json.dumps(network))
        config = self.folder / "containerd.toml"
        config.write_text(
            _CONTAINERD.format(folder=self.folder, runc=programs() / "runc", pause=PAUSE), encoding="utf-8"
        )
        return [str(programs() / "containerd"), "--config", str(config)]

    def _kubelet_command(self) -> list[str]:
        config: dict[str, Any] = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.cgroup,  # or two of them end each other's pods
            "containerRuntimeEndpoint": f"unix://{self.folder / 'containerd.sock'}",
            "failSwapOn": False,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self.plane.pki / "ca.crt")},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "clusterDNS": [ADDRESS],
            "clusterDomain": DOMAIN,
            "address": ADDRESS,
            "readOnlyPort": 0,
            "podLogsDir": str(self.folder / "pods"),
            "enforceNodeAllocatable": [],
            "evictionHard": {
                "memory.available": "200Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
            },
            "imageGCHighThresholdPercent": 100,
            "localStorageCapacityIsolation": False,
            "resolvConf": "",
        }
        path = self.folder / "kubelet.json"
        path.write_text(json.dumps(config))
        return [
            str(programs() / "kubelet"),
            f"--config={path}",
            f"--kubeconfig={self.plane.pki / 'node.kubeconfig'}",
            "--hostname-override=node0",
            f"--root-dir={self.folder / 'kubelet'}",
            f"--node-ip={ADDRESS}",
        ]

    def _proxy_command(self) -> list[str]:
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(self.plane.pki / "admin.kubeconfig")},
            "clusterCIDR": PODS,
            "hostnameOverride": "node0",
            "conntrack": {"maxPerCore": 0, "min": 0},
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        }
        path = self.folder / "proxy.json"
        path.write_text(json.dumps(config))
        return [str(programs() / "kube-proxy"), f"--config={path}"]

    def _dns_command(self) -> list[str]:
        path = self.folder / "Corefile"
        config = self.plane.pki / "admin.kubeconfig"
        path.write_text(
            f".:53 {{\n  bind {ADDRESS}\n  errors\n"
            f"  kubernetes {DOMAIN} {{\n    kubeconfig {config}\n  }}\n}}\n"
        )
        return [str(programs() / "coredns"), "-conf", str(path)]


# restrict_oom_score_adj: without CAP_SYS_RESOURCE runc fails on a score below its own.
_CONTAINERD = """\
version = 3
root = "{folder}/containerd"
state = "{folder}/containerd-state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{pause}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        BinaryName = "{runc}"
        SystemdCgroup = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{folder}/cni"
"""


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
