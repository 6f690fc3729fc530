"""Builds a real Kubernetes from pinned Go modules, for the tests that want one.

``python -m real_cluster.programs api`` builds what a test of the API server needs (etcd, kube-apiserver, the
controllers, the scheduler, kubectl); with ``node`` also what makes a node, and Helm. What is there, of
the pinned versions, is kept. The programs go to ``~/.cache/unmask/cluster``; ``UNMASK_CLUSTER`` names another
folder. The pins are ``pins/*/go.mod``, their hashes ``pins/*/go.sum``.

Where this machine cannot build or run them, that is said, and the exit code is 0: tests say the same when
they are skipped. With ``CI`` in the environment it is a failure. Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "API",
    "NODE",
    "SETS",
    "Missing",
    "add_system_packages",
    "attempt",
    "build",
    "folder",
    "missing",
    "obstacle",
]

HERE = Path(__file__).resolve().parent
VERSION = "1.37.2"


class Missing(Exception):
    """This machine cannot do it; the text says what it lacks and what to do."""


@dataclass(frozen=True)
class Program:
    """One program, and what it is built from."""

    name: str
    pins: str
    """Folder below ``pins``."""
    package: str
    cgo: bool = False
    tags: str = ""

    def recipe(self) -> str:
        """The digest of all that decides what is built."""
        pins = [(HERE / "pins" / self.pins / name).read_bytes() for name in ("go.mod", "go.sum")]
        text = repr((self.package, self.cgo, self.tags, _FLAGS))
        return hashlib.sha256(b"\0".join([text.encode(), *pins])).hexdigest()


def _kubernetes(*names: str) -> list[Program]:
    return [Program(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}") for name in names]


def _containerd(*names: str) -> list[Program]:
    return [Program(name, "containerd", f"github.com/containerd/containerd/v2/cmd/{name}") for name in names]


_VERSION = "k8s.io/component-base/version"
_FLAGS = (
    "-s -w"
    f" -X {_VERSION}.gitVersion=v{VERSION} -X {_VERSION}.gitMajor={VERSION.split('.')[0]}"
    f" -X {_VERSION}.gitMinor={VERSION.split('.')[1]}"
)
API = [
    Program("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
    *_kubernetes("kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler"),
]
"""What answers and decides, without a machine to run anything on."""
NODE = [
    *API,
    *_kubernetes("kubelet", "kube-proxy"),
    *_containerd("containerd", "containerd-shim-runc-v2", "ctr"),
    # With seccomp, which restricted pods ask for, and which is C.
    Program("runc", "runc", "github.com/opencontainers/runc", cgo=True, tags="seccomp"),
    Program("coredns", "coredns", "github.com/coredns/coredns"),
    Program("helm", "helm", "helm.sh/helm/v4/cmd/helm"),
]
"""A whole cluster of one node."""
SETS = {"api": API, "node": NODE}

# What a node needs of the system: Debian's package, and a path that shows that it is there.
SYSTEM = {
    "gcc": "/usr/bin/gcc",
    "libc6-dev": "/usr/include/stdlib.h",
    "pkg-config": "/usr/bin/pkg-config",
    "libseccomp-dev": "/usr/include/seccomp.h",
    "iproute2": "/usr/sbin/ip",
    "nftables": "/usr/sbin/nft",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "openssl": "/usr/bin/openssl",
}


def folder(variables: Mapping[str, str] = os.environ) -> Path:
    """Return where the programs are kept."""
    cache = Path(variables.get("UNMASK_CACHE") or Path.home() / ".cache" / "unmask")
    return Path(variables.get("UNMASK_CLUSTER") or cache / "cluster").expanduser().absolute()


def missing(programs: Iterable[Program]) -> list[Program]:
    """Return those that are not there, or not of the pinned version."""
    return [one for one in programs if not _is_there(one)]


def obstacle(*, node: bool) -> str | None:
    """Return why this machine cannot run it, or ``None``; ``node``: with pods."""
    if not sys.platform.startswith("linux"):
        return "not Linux"
    if not node:
        return None
    if os.geteuid():
        return "not root"
    # Root in a container may still lack what this needs.
    try:
        namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
        tried = subprocess.run(namespaces, capture_output=True, text=True)
    except FileNotFoundError:
        return "no unshare (Debian: util-linux)"
    if tried.returncode:
        return f"no namespaces of its own: {tried.stderr.strip()}"
    return None


def build(programs: Iterable[Program]) -> None:
    """Build what is missing, one program after the other: each takes all the cores there are.

    Raises:
        Missing: There is no Go, or a build failed.
    """
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    with _lock(target / "lock"):
        wanted = missing(programs)
        if not wanted:
            return
        if shutil.which("go") is None:
            raise Missing("no Go to build Kubernetes with: install it (go.dev), 1.26 or newer")
        for number, one in enumerate(wanted, 1):
            print(f"cluster: building {one.name} ({number} of {len(wanted)}) ...", end="", flush=True)
            started = time.monotonic()
            _build(one, target)
            print(f" {time.monotonic() - started:.0f} s", flush=True)


def add_system_packages(packages: Mapping[str, str]) -> None:
    """Install ``packages``, each with a path that shows that it is there, where this may.

    Raises:
        Missing: It may not, or that failed.
    """
    lacking = [name for name, path in packages.items() if not Path(path).exists()]
    if not lacking:
        return
    names = " ".join(lacking)
    if os.geteuid() or not shutil.which("apt-get"):
        raise Missing(f"this system lacks {names}: install them (these are Debian's names)")
    print(f"cluster: installing {names}", flush=True)
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *lacking]):
        done = subprocess.run(["apt-get", "-qq", *command], capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"apt-get {' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def _build(one: Program, target: Path) -> None:
    made = target / f".{one.name}.{os.getpid()}"
    command = [
        "go",
        "build",
        "-trimpath",
        "-tags",
        one.tags,
        "-ldflags",
        _FLAGS,
        "-o",
        str(made),
        one.package,
    ]
    settings = os.environ | {"CGO_ENABLED": str(int(one.cgo))}
    done = subprocess.run(
        command,
        cwd=HERE / "pins" / one.pins,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        made.unlink(missing_ok=True)
        print(" failed", flush=True)
        raise Missing("\n".join(["go build failed:", *done.stdout.strip().splitlines()[-15:]]))
    made.rename(target / one.name)
    _note(one).write_text(one.recipe(), encoding="utf-8")


def _is_there(one: Program) -> bool:
    note = _note(one)
    there = (folder() / one.name).is_file() and note.is_file()
    return there and note.read_text(encoding="utf-8") == one.recipe()


def _note(one: Program) -> Path:
    """The file that says from which recipe a program was built."""
    return folder() / f"{one.name}.recipe"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until no other build works in the same folder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def attempt(work: Callable[[], None], what: str, *, node: bool) -> int:
    """Do ``work`` where this machine can; return the exit code, which is that of a failure only in CI."""
    try:
        if why := obstacle(node=node):
            raise Missing(why)
        work()
    except Missing as error:
        strict = bool(os.environ.get("CI"))
        print(f"cluster: {error}", file=sys.stderr)
        ending = "cannot run, and in CI they must" if strict else "are left out"
        print(f"cluster: {what} {ending}", file=sys.stderr)
        return int(strict)
    return 0


def main() -> int:
    """Build one of the sets that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        print(f"usage: python -m real_cluster.programs {'|'.join(SETS)}", file=sys.stderr)
        return 64
    node = sys.argv[1] == "node"

    def work() -> None:
        if node:
            add_system_packages(SYSTEM)
        build(SETS[sys.argv[1]])

    return attempt(work, f"tests on a real {'node' if node else 'API server'}", node=node)


if __name__ == "__main__":
    sys.exit(main())
