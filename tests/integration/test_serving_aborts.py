"""Calls that end at random moments, in every way a call can: nothing of them is left in the server."""

import asyncio
import gc
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import astuple, dataclass
from itertools import cycle
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest

from support import counts
from support.folders import served_folder
from support.serving import RunningServer, running_server, wait_until
from unmask.client import Client
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.engine import Request
from unmask.serving.model import ServedModel
from unmask.serving.ragged import RaggedBatch
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import GenerationStub

pytestmark = pytest.mark.serving

ABORTS = counts.of(sample=60, full=1000, variable="UNMASK_ABORTS")
AT_ONCE = 6
"""More than the rows: some calls are aborted while they wait."""
CONTEXT = 128


@dataclass(frozen=True)
class Aborter:
    """A client that asks for much and leaves early; each way says whether it left before the end."""

    server: RunningServer
    channel: grpc.aio.Channel
    dice: random.Random

    def request(self, **changes: object) -> pb.GenerateRequest:
        ids = [self.dice.randint(5, 500) for _ in range(self.dice.randint(1, 40))]
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))
        request.sampling.max_tokens = 80
        request.diffusion.threshold = self.dice.choice([0.05, 0.9])
        request.sampling.MergeFrom(pb.SamplingParams(**changes))  # type: ignore[arg-type]
        return request

    def stream(self, channel: grpc.aio.Channel, **options: float) -> grpc.aio.UnaryStreamCall:
        asked = pb.GenerateStreamRequest(request=self.request())
        asked.options.canvas = pb.CANVAS_MODE_DIFF
        return GenerationStub(channel).GenerateStream(asked, **options)  # type: ignore[arg-type, return-value]

    async def moment(self) -> None:
        await asyncio.sleep(self.dice.uniform(0, 0.05))

    async def heard(self, call: grpc.aio.UnaryStreamCall) -> bool:
        """Listen to a random number of events; whether the call goes on."""
        for _ in range(self.dice.randint(0, 12)):
            if await call.read() is grpc.aio.EOF:
                return False
        return True

    async def cancels_a_stream(self) -> bool:
        call = self.stream(self.channel)
        going_on = await self.heard(call)
        return call.cancel() and going_on

    async def cancels_a_whole(self) -> bool:
        call = GenerationStub(self.channel).Generate(self.request())
        await self.moment()
        return bool(call.cancel())

    async def runs_out_of_time(self) -> bool:
        call = self.stream(self.channel, timeout=self.dice.uniform(0.001, 0.3))
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            # The server may find that the queue is too long for so little time.
            assert error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED), (
                error
            )
            return error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        return False

    async def closes_its_channel(self) -> bool:
        async with grpc.aio.insecure_channel(
            self.server.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            return await self.heard(self.stream(channel))

    @asynccontextmanager
    async def _asked_over_http(self, *, stream: bool):  # type: ignore[no-untyped-def]
        body = {"model": "tiny", "prompt": [self.dice.randint(5, 500)], "max_tokens": 80, "stream": stream}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.server.http_port)
        try:
            writer.write(head.encode() + content)
            yield reader
        finally:
            writer.transport.abort()

    async def hangs_up_on_a_stream(self) -> bool:
        async with self._asked_over_http(stream=True) as reader:
            for _ in range(self.dice.randint(0, 12)):
                line = await reader.readline()
                if b"[DONE]" in line or not line:
                    return False
        return True

    async def hangs_up_on_a_whole(self) -> bool:
        async with self._asked_over_http(stream=False) as reader:
            try:
                async with asyncio.timeout(self.dice.uniform(0, 0.05)):
                    await reader.readline()
            except TimeoutError:
                return True
        return False

    async def hears_its_stop(self) -> bool:
        answer = await GenerationStub(self.channel).Generate(
            self.request(stop=[str(self.dice.randrange(10)), "w"])
        )
        return answer.finish_reason == pb.FINISH_REASON_STOP


Way: TypeAlias = Callable[[Aborter], Awaitable[bool]]
WAYS: list[Way] = [
    Aborter.cancels_a_stream,
    Aborter.cancels_a_whole,
    Aborter.runs_out_of_time,
    Aborter.closes_its_channel,
    Aborter.hangs_up_on_a_stream,
    Aborter.hangs_up_on_a_whole,
    Aborter.hears_its_stop,
]


async def abort(server: RunningServer, dice: random.Random, count: int) -> Counter[str]:
    """Abort until ``count`` calls have been, and one in each way at least; how often in which way."""
    aborted: Counter[str] = Counter()
    ways = cycle(WAYS)

    async def some(aborter: Aborter) -> None:
        while aborted.total() < count or len(+aborted) < len(WAYS):
            way = next(ways)
            aborted[way.__name__] += await way(aborter)

    async with grpc.aio.insecure_channel(server.address) as channel, asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(some(Aborter(server, channel, dice)))
    return aborted


@dataclass(frozen=True)
class Left:
    """What calls might leave behind them in the server's process, which is the test's."""

    threads: int
    """But those of the pool that reads requests, whose number is limited."""
    tasks: int
    files: int
    requests: int

    @classmethod
    def now(cls, server: RunningServer) -> "Left":
        requests = requests_there()  # first, for this lets go of what nobody holds
        names = [thread.name for thread in threading.enumerate()]
        return cls(
            threads=sum(not name.startswith("asyncio_") for name in names),
            tasks=server.tasks(),
            files=len(os.listdir("/proc/self/fd")),
            requests=requests,
        )

    def within(self, other: "Left") -> bool:
        """Whether nothing has been added to ``other``."""
        return all(mine <= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


def requests_there() -> int:
    """Requests that something in this process holds."""
    gc.collect()
    return sum(type(one) is Request for one in gc.get_objects())


def settled(server: RunningServer, others: int) -> Left:
    """What is there as soon as it is twice the same, and no request is but ``others`` of other tests."""
    engine = server.server.engine
    seen: list[Left] = []

    def same() -> bool:
        time.sleep(0.1)
        if engine._waiting or engine._running or engine._cancelled:
            return False  # and do not look at all objects while forwards make some
        seen.append(Left.now(server))
        return seen[-2:-1] == seen[-1:] and seen[-1].requests <= others

    try:
        wait_until(same, timeout_s=600)
    except AssertionError as error:
        raise AssertionError(f"does not settle: {seen[-3:]}, {others} requests of others") from error
    return seen[-1]


def wait_until_gone(
    server: RunningServer, batch: RaggedBatch, before: Left, others: int, meanwhile: Callable[[], None]
) -> None:
    """Return as soon as nothing is there that was not before; calls ``meanwhile`` again and again."""
    last: list[Left] = []

    def gone() -> bool:
        meanwhile()
        last[:] = [settled(server, others)]
        return batch.active == 0 and last[0].within(before)

    try:
        wait_until(gone, timeout_s=300)
    except AssertionError as error:
        names = sorted(thread.name for thread in threading.enumerate())
        raise AssertionError(
            f"{last}, {batch.active} rows; before {before}; threads {names}; files {open_files()}"
        ) from error


def open_files() -> list[str]:
    """Where this process's descriptors lead."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


@pytest.mark.timeout(1800)
def test_aborts_at_random_moments_leave_nothing_behind(
    tmp_path: Path, record_measurement: Callable[[str, float | str], None], caplog: pytest.LogCaptureFixture
) -> None:
    others = requests_there()  # a test that ran in this process may have left some
    folder = served_folder(tmp_path / "tiny", block_length=8)
    model = ServedModel.describe(folder, read_config(folder), name=None, rows=3, context_length=CONTEXT)
    batch = RaggedBatch(load(folder), rows=3, capacity=CONTEXT, block_length=8)
    # One loop for all clients, which stays open: gRPC has one queue of events for all loops of a process, and
    # what is in it behind an event of a loop that was closed is told to nobody before the next event.
    with asyncio.Runner() as clients, running_server(batch, model, http_port=0) as server:
        with Client(server.address) as client:
            expected = client.generate("w5 w6 w7", max_tokens=40)
        clients.run(abort(server, random.Random(1), 7))  # what is made once and kept is there from here on
        before = settled(server, others)
        aborted = clients.run(abort(server, random.Random(2), ABORTS))
        # Their loop has to go on: it holds connections until it hears that calls have ended.
        wait_until_gone(server, batch, before, others, lambda: clients.run(asyncio.sleep(0.1)))
        assert batch.cache_usage == 0 and not any(batch._pool._holders)
        engine = server.server.engine
        assert not (engine._waiting or engine._running or engine._cancelled)
        with Client(server.address) as client:
            assert client.generate("w5 w6 w7", max_tokens=40).token_ids == expected.token_ids
    record_measurement("aborts", str(dict(aborted)))
    assert not [line for line in caplog.records if line.levelno >= logging.ERROR], "no failure of the server"
    assert aborted.total() >= ABORTS
    assert aborted.keys() == {way.__name__ for way in WAYS} and min(aborted.values()) > 0
