"""Expert shards in processes of their own, which start quickly and can be killed or frozen."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from support.shards import holding_of
from unmask.experts.group import GroupPort
from unmask.experts.shard import Shard, ShardOptions

__all__ = ["ShardProcess", "shard_processes"]

_CONTEXT = multiprocessing.get_context("forkserver")
# Torch is imported once for all of them. Only installed modules are found there; others are left out unsaid.
_CONTEXT.set_forkserver_preload(["unmask.experts.connecting", "unmask.models.loading"])
_READY_S = 60
_CLONE_NEWNET = 0x40000000


class ShardProcess:
    """One shard of a model, on a port that it keeps when it is started again.

    With ``own_network`` it is at the end of a cable that can be pulled. With ``sockets``, a folder, it is
    asked over a socket in it; with ``group``, it is one of a group that meets there.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        *,
        shards: int,
        replication: int,
        own_network: bool = False,
        sockets: Path | None = None,
        group: str | None = None,
    ) -> None:
        self._folder, self._number = folder, number
        self._shards, self._replication = shards, replication
        self._process: BaseProcess | None = None
        self._cable = f"umx{os.getpid() % 100_000}-{number}" if own_network else ""
        self._subnet = f"10.{200 + number}.{os.getpid() % 250}"
        self.host = f"{self._subnet}.2" if own_network else "127.0.0.1"
        self.port = 0
        self._socket = None if sockets is None else sockets / f"{number}.sock"
        self._group = group

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}" if self._socket is None else f"unix:{self._socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None and self._process.pid is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and return when it answers."""
        mine, its = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_serve,
            args=(
                self._folder,
                self._number,
                self._shards,
                self._replication,
                self.host,
                self.port,
                self._socket,
                self._group,
                its,
            ),
            daemon=True,
        )
        self._process.start()
        its.close()
        with mine:
            if self._cable:
                assert mine.poll(_READY_S) and mine.recv() == "alone", "the shard has no network of its own"
                self._lay_cable()
                mine.send("connected")
            assert mine.poll(_READY_S), "the shard does not start"
            self.port = mine.recv()

    def _lay_cable(self) -> None:
        peer = ["peer", "name", "eth0", "netns", str(self.pid)]
        inside = ["nsenter", "-t", str(self.pid), "-n", "ip"]
        for command in (
            ["ip", "link", "add", self._cable, "type", "veth", *peer],
            ["ip", "addr", "add", f"{self._subnet}.1/24", "dev", self._cable],
            ["ip", "link", "set", self._cable, "up"],
            [*inside, "addr", "add", f"{self.host}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
        ):
            subprocess.run(command, check=True, capture_output=True)

    def pull_cable(self) -> None:
        """Let nothing through to it or from it, and tell neither side."""
        subprocess.run(["ip", "link", "set", self._cable, "down"], check=True)

    def plug_in(self) -> None:
        subprocess.run(["ip", "link", "set", self._cable, "up"], check=True)

    def kill(self) -> None:
        """End it as a machine that loses power would."""
        self._signal(signal.SIGKILL)
        self.join()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Ask it to end, and wait until it has."""
        self._signal(signal.SIGTERM)
        self.join()

    def _signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def join(self) -> None:
        """Wait until it has ended."""
        assert self._process is not None
        self._process.join(_READY_S)
        assert self._process.exitcode is not None, "the shard does not end"

    def close(self) -> None:
        if self._process is not None and self._process.exitcode is None:
            self.thaw()
            self.kill()


def _serve(
    folder: Path,
    number: int,
    shards: int,
    replication: int,
    host: str,
    port: int,
    socket: Path | None,
    group: str | None,
    ready: Connection,
) -> None:
    if host != "127.0.0.1":
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        ready.send("alone")
        assert ready.recv() == "connected"
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    holding = holding_of(folder, number, shards=shards, replication=replication)
    options = ShardOptions(
        host=host, port=port, metrics_port=0, name=f"shard-{number}", drain_s=10, socket=socket
    )
    shard = Shard(holding, options)
    shard.start()
    if group is not None:
        GroupPort(
            group,
            rank=number + 1,
            world=shards + 1,
            sessions=shard.sessions,
            max_bytes=shard.largest,
            ended=asked.set,
        ).start()
    ready.send(shard.port)
    ready.close()
    asked.wait()
    shard.stop()


@contextmanager
def shard_processes(
    folder: Path,
    shards: int,
    *,
    replication: int = 1,
    own_networks: bool = False,
    sockets: Path | None = None,
    group: str | None = None,
) -> Iterator[list[ShardProcess]]:
    """All shards of the model in ``folder``, running."""
    running = [
        ShardProcess(
            folder,
            number,
            shards=shards,
            replication=replication,
            own_network=own_networks,
            sockets=sockets,
            group=group,
        )
        for number in range(shards)
    ]
    try:
        for process in running:
            process.start()
        yield running
    finally:
        for process in running:
            process.close()
