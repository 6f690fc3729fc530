"""Very many streams, all open at once: each comes to its end with all that is its own, in bounded memory.

All go over the wire, to a server in a process of its own: many over each of a few connections, as they would
come through a proxy. The model counts, so that what takes time is what a server does beside its model.
"""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from parent_death import bound
from support import counts
from support.folders import served_folder
from support.serving import wait_until
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import GenerationStub

pytestmark = pytest.mark.serving

STREAMS = counts.of(sample=2000, full=10_000, variable="UNMASK_STREAMS")
ROWS = STREAMS // 4
"""As many run at a time; the others wait, with their streams open."""
CHANNELS = 8
TOKENS = 10
BYTES_PER_STREAM = 150_000
BYTES_BESIDE = 60_000_000
"""What a server takes once it is used at all, whatever the number of streams."""


@dataclass(frozen=True)
class Counting:
    """The server's process."""

    process: subprocess.Popen[str]
    port: int
    metrics: int

    def resident(self, key: str) -> int:
        """Bytes in memory: ``VmRSS`` now, or ``VmHWM``, the most there were."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(key)) * 1024

    def gauge(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def there(self) -> float:
        """Requests that run or wait."""
        return self.gauge("unmask_requests_running") + self.gauge("unmask_requests_waiting")

    def let_go(self) -> None:
        """Let the forwards through."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)


@contextmanager
def counting(folder: Path) -> Iterator[Counting]:
    command = [sys.executable, "-m", "support.counting_server", str(folder), str(ROWS), str(STREAMS)]
    with subprocess.Popen(
        bound(command),
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            yield Counting(process, **json.loads(process.stdout.readline()))
        finally:
            process.kill()


async def whole(channel: grpc.aio.Channel, first: int) -> None:
    """One stream, from its beginning to its end."""
    asked = pb.GenerateStreamRequest(request=pb.GenerateRequest(token_ids=pb.TokenIds(ids=[first])))
    asked.request.sampling.max_tokens = TOKENS
    tokens, last = [], pb.GenerateStreamResponse()
    async for event in GenerationStub(channel).GenerateStream(asked):
        assert event.block_committed.offset == len(tokens) or not event.HasField("block_committed")
        tokens += event.block_committed.token_ids
        last = event
    assert tokens == list(range(first + 1, first + 1 + TOKENS))
    assert last.finished.reason == pb.FINISH_REASON_LENGTH


@pytest.mark.timeout(1800)
def test_all_streams_that_are_open_at_once_come_to_their_end(
    tmp_path: Path, record_measurement: Callable[[str, float | str], None]
) -> None:
    async def crowd(server: Counting) -> int:
        """Open all streams, let the forwards through, hear all; the server's memory while all are open."""
        alone = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=alone) for _ in range(CHANNELS)
        ]
        async with asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(whole(channels[number % CHANNELS], 5 + number % 400))
            # Not so often that the server has more to tell than to do.
            await asyncio.to_thread(
                wait_until, lambda: server.there() == STREAMS, timeout_s=900, every_s=0.25
            )
            opened = server.resident("VmRSS")
            server.let_go()
        for channel in channels:
            await channel.close()
        return opened

    with counting(served_folder(tmp_path / "tiny", block_length=4)) as server:
        idle = server.resident("VmRSS")
        opened = asyncio.run(crowd(server))
        wait_until(lambda: server.there() == 0, every_s=0.25)
        most = server.resident("VmHWM")
    record_measurement("streams", STREAMS)
    record_measurement("kB per open stream", f"{(opened - idle) / STREAMS / 1000:.1f}")
    record_measurement("MB at most, beyond an idle server's", f"{(most - idle) / 1e6:.1f}")
    assert most - idle < STREAMS * BYTES_PER_STREAM + BYTES_BESIDE
