"""Real clusters for tests (``scripts/real_cluster``): of an API server and its controllers, or of a node."""

import concurrent.futures
import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from real_cluster import images, programs
from real_cluster.inside import ADDRESS

__all__ = ["Cluster", "obstacle", "running"]

Kind = Literal["api", "node"]
_SCRIPTS = Path(programs.__file__).parents[1]
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Cluster:
    """Where it is."""

    kubeconfig: Path
    """The administrator's."""
    network: Path | None = None
    """The network namespace of the node, if there is one."""
    operator_values: Path | None = None
    """Values of the operator's chart that name this checkout's images, where there is a node."""
    engine_values: Path | None = None
    """The same for the engine's."""

    def listen(self) -> socket.socket:
        """Return a socket of this process to which pods can connect, at the node's address."""
        # A thread enters the namespace alone, and what it makes there stays there.
        with concurrent.futures.ThreadPoolExecutor(1) as apart:
            return apart.submit(self._listen).result()

    def _listen(self) -> socket.socket:
        assert self.network is not None, "there is no node"
        with self.network.open("rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.network}")
        return socket.create_server((ADDRESS, 0), backlog=64)

    def inside(self, *command: str) -> list[str]:
        """Return a command line that runs ``command`` in the node's network, where Services are."""
        assert self.network is not None, "there is no node"
        return ["nsenter", f"--net={self.network}", "--", *command]

    def kubectl(self, *arguments: str, given: object = None) -> str:
        """Return what kubectl prints; ``given`` is an object, or a list of them, for ``-f -``."""
        text = None
        if given is not None:
            items = given if isinstance(given, list) else [given]
            # JSON: YAML's versions disagree about what is a number.
            text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        done = subprocess.run(
            self.command(*arguments), input=text, stdin=None if text else subprocess.DEVNULL,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of kubectl with ``arguments``."""
        return [str(programs.folder() / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]

    def get(self, *arguments: str) -> Any:
        """Return what ``kubectl get`` finds, as JSON; ``None`` where it finds nothing of that name."""
        text = self.kubectl("get", *arguments, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text else None

    def items(self, *arguments: str) -> list[Any]:
        """Return the objects that ``kubectl get`` finds."""
        found = self.get(*arguments)
        return found["items"] if found else []

    def until(self, true: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
        """Wait until ``true`` returns something, and return that."""
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.25)
        return found


def obstacle(kind: Kind, *, with_images: bool = False) -> str | None:
    """Return why this machine cannot have such a cluster (with this checkout's images), or ``None``.

    The images then stay until this process ends, whatever other checkouts build.
    """
    if why := programs.obstacle(node=kind == "node"):
        return why
    lacking = ", ".join(one.name for one in programs.missing(programs.SETS[kind]))
    if lacking:
        return f"{lacking} not built; `make cluster-programs` does it"
    if with_images and not images.keep():
        return "the images are not built; `make images` does it"
    return None


@contextlib.contextmanager
def running(kind: Kind, *, images: Sequence[Path] = (), flags: Sequence[str] = ()) -> Iterator[Cluster]:
    """Run one; it ends with this process, too. Tests that do are marked ``real_api`` or ``real_node``."""
    command = [sys.executable, "-m", "real_cluster.running", kind, *(f"--flag={flag}" for flag in flags)]
    command += ["--images", *map(str, images)]
    environment = os.environ | {"PYTHONPATH": str(_SCRIPTS)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, f"the cluster did not start, exit code {process.wait()}"
            yield Cluster(**{name: Path(path) for name, path in json.loads(line).items()})
        finally:
            process.stdin.close()
            process.wait(timeout=120)
