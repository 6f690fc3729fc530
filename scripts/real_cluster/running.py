"""Runs a throw-away Kubernetes in the foreground, until its standard input ends or a signal comes.

``python -m real_cluster.running api`` runs etcd, the API server, the controllers and the scheduler on
loopback; with ``node`` a whole cluster of one node, in namespaces of its own: pods, Services, DNS work, and
of all that only the API server can be reached from outside. On standard output comes one line of JSON when it
serves: the path of an administrator's ``kubeconfig``. Any number of them may run at once. All that belongs to
one, its containers included, ends with this process; its folder is removed. Of a node the line also names the
file of its ``network`` namespace, for whoever has something to say to pods, and two files for Helm that say
which images of this checkout the charts take: ``operator_values`` and ``engine_values``.

``node --images FILE...`` loads image archives; ``--flag`` adds one to the API server's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from parent_death import bound
from real_cluster.control_plane import ControlPlane, Plane, certificate_of, kubeconfig
from real_cluster.images import reference
from real_cluster.programs import folder as programs

__all__ = ["main"]

START_SECONDS = 600
"""For all programs to serve, on a machine that is busy with something else."""
_CGROUP = "unmask-test-"


def main() -> int:
    """Run what the command line names; see the module."""
    parser = argparse.ArgumentParser(prog="real_cluster.running", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("api", "node"))
    parser.add_argument("--images", nargs="*", default=[], help="image archives to load")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of the API server")
    options = parser.parse_args()
    with _stop() as stopped, _folder() as folder:
        start = _node if options.kind == "node" else _api
        with start(folder, options, stopped) as told:
            if told is None:
                return 130
            print(json.dumps(told), flush=True)
            select.select([sys.stdin, stopped], [], [])
    return 0


@contextlib.contextmanager
def _stop() -> Iterator[int]:
    """Yield a file that can be read once a signal has come."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    yield reader


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    # Beside the images: what is unpacked of them is shared by links.
    above = programs() / "running"
    above.mkdir(parents=True, exist_ok=True)
    for old in above.iterdir():  # of those who were killed
        if not Path("/proc", old.name.partition("-")[0]).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=above))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- the control plane alone --------------------------------------------------------------------------


@contextlib.contextmanager
def _api(folder: Path, options: argparse.Namespace, stopped: int) -> Iterator[dict[str, str] | None]:
    plane = Plane.on_loopback(folder, flags=options.flag)
    with ControlPlane(plane) as serving:
        end = time.monotonic() + START_SECONDS
        while not serving.serves():
            if time.monotonic() > end:
                raise TimeoutError(serving.last_words())
            if select.select([sys.stdin, stopped], [], [], 0.2)[0]:
                yield None
                return
        serving.start_controllers()
        yield {"kubeconfig": str(plane.pki / "admin.kubeconfig")}


# --- a node -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _node(folder: Path, options: argparse.Namespace, stopped: int) -> Iterator[dict[str, str] | None]:
    with (
        _cgroup() as cgroup,
        socket.create_server(("127.0.0.1", 0), backlog=64) as listener,
    ):
        ready, told = os.pipe()
        settings = {
            "folder": str(folder),
            "flags": options.flag,
            "cgroup": cgroup,
            "images": [str(Path(one).absolute()) for one in options.images],
            "listener": listener.fileno(),
            "ready": told,
        }
        namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (folder / "node.log").open("wb") as log:
            first = subprocess.Popen(
                bound([*namespaces, sys.executable, "-m", "real_cluster.inside", json.dumps(settings)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno(), told],
                env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            )
        os.close(told)
        try:
            came, _, _ = select.select([ready, sys.stdin, stopped], [], [], START_SECONDS)
            said = os.read(ready, 65536).decode() if ready in came else ""
            if came and ready not in came:
                yield None
                return
            if said != "ready":
                log_text = (folder / "node.log").read_text(errors="replace")[-2000:]
                print(f"the node did not start: {said or 'no answer'}\n{log_text}", file=sys.stderr)
                raise SystemExit(1)
            pki = folder / "pki"
            config = pki / "outside.kubeconfig"
            server = f"https://127.0.0.1:{listener.getsockname()[1]}"
            config.write_text(kubeconfig(pki, server, certificate_of(pki, "admin")))
            yield {
                "kubeconfig": str(config),
                "network": f"/proc/{first.pid}/ns/net",
                "operator_values": _values(folder / "operator.yaml", image="operator", workerImage="worker"),
                "engine_values": _values(folder / "engine.yaml", image="worker"),
            }
        finally:
            # The first process of the namespaces is gone when all the others are.
            children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                for pid in children.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                first.wait(timeout=60)
            first.kill()
            first.wait()
            os.close(ready)


def _values(path: Path, **images: str) -> str:
    """Write the values of a chart that name its ``images``, and return where they are."""
    values = {}
    for value, name in images.items():
        repository, _, tag = reference(name).rpartition(":")
        values[value] = {"repository": repository, "tag": tag}
    path.write_text(json.dumps(values))  # which is YAML, too
    return str(path)


@contextlib.contextmanager
def _cgroup() -> Iterator[str]:
    """Make a control group in each hierarchy for the pods; remove it, and what was left by who was killed."""
    roots = _hierarchies()
    for root in roots:
        for old in root.glob(f"{_CGROUP}*"):
            if not Path("/proc", old.name.removeprefix(_CGROUP)).exists():
                _remove(old)
    name = f"{_CGROUP}{os.getpid()}"
    for root in roots:
        (root / name).mkdir()
        for setting in ("cpuset.cpus", "cpuset.mems"):  # empty in a new one, of the older kind
            if (root / setting).exists():
                (root / name / setting).write_text((root / setting).read_text())
        shares = root / name / "cpu.shares"
        if shares.exists():  # or all pods together weigh as much as one process outside
            shares.write_text(str(1024 * (os.cpu_count() or 1)))
    try:
        yield f"/{name}"
    finally:
        end = time.monotonic() + 30
        while not all([_remove(root / name) for root in roots]) and time.monotonic() < end:
            time.sleep(0.1)


def _hierarchies() -> list[Path]:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(mount[1]) for mount in mounts if mount[2] in ("cgroup", "cgroup2")]


def _remove(group: Path) -> bool:
    """Remove a control group and those in it; return whether it is gone."""
    if group.is_dir():
        for below in sorted(group.rglob("*"), reverse=True):
            if below.is_dir():
                with contextlib.suppress(OSError):
                    below.rmdir()
        with contextlib.suppress(OSError):
            group.rmdir()
    return not group.exists()


if __name__ == "__main__":
    sys.exit(main())
