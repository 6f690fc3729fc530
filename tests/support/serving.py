"""Batches that are easy to reason about, and servers in the test's own process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from unmask.diffusion.batch import Batch, Committed, Event, Filled, Finished, ForwardCounts, ForwardLost
from unmask.diffusion.decoding import DecodingParams
from unmask.serving.model import ServedModel
from unmask.serving.server import Server, ServerOptions
from unmask.serving.weights import ServedWeights
from unmask.telemetry import Recorder


@dataclass(slots=True)
class _Row:
    params: DecodingParams
    next_token: int
    first_block: int
    """The one that the first generated token is in, counted from the prompt's start."""
    tokens: list[int] = field(default_factory=list)
    """Of the current block."""
    total: int = 0
    usage: ForwardCounts = field(default_factory=ForwardCounts)


class CountingBatch:
    """Continues a prompt by counting up from its last token, one position of every row at each forward.

    Attributes:
        forwards: Tickets that took part in each forward, oldest first.
        fails_at: Number of the forward that raises, if any.
        lost_at: Number of the forward that is lost with a machine, if any; the next one is not.
    """

    def __init__(
        self,
        *,
        rows: int = 2,
        block_length: int = 4,
        fails_at: int | None = None,
        lost_at: int | None = None,
    ) -> None:
        self.rows, self.block_length, self.fails_at, self.lost_at = rows, block_length, fails_at, lost_at
        self.forwards: list[set[int]] = []
        self._rows: dict[int, _Row] = {}
        self._tickets = 0

    @property
    def active(self) -> int:
        return len(self._rows)

    @property
    def free_rows(self) -> int:
        return self.rows - self.active

    @property
    def cache_usage(self) -> float:
        return self.active / self.rows

    def admit(
        self,
        prompt: Sequence[int],
        params: DecodingParams,
        committed: Sequence[int] = (),
        *,
        cache_salt: str = "",
    ) -> int:
        assert self.free_rows
        self._tickets += 1
        last = [*prompt, *committed][-1]
        first_block = len(prompt) // self.block_length
        self._rows[self._tickets] = _Row(params, last + 1, first_block, total=len(committed))
        return self._tickets

    def release(self, ticket: int) -> None:
        del self._rows[ticket]

    def forget_stored(self) -> None:
        assert not self._rows

    def step(self) -> list[Event]:
        if len(self.forwards) == self.fails_at:
            raise ArithmeticError("the model came apart")
        if len(self.forwards) == self.lost_at:
            self.lost_at = None
            raise ForwardLost("a shard at 10.0.0.7 is gone")
        self.forwards.append(set(self._rows))
        return [event for ticket in list(self._rows) for event in self._advance(ticket)]

    def _advance(self, ticket: int) -> Iterator[Event]:
        row = self._rows[ticket]
        token, position = row.next_token, row.total
        row.tokens.append(token)
        row.next_token, row.total = token + 1, row.total + 1
        row.usage.denoise += 1
        row.usage.positions += self.block_length
        block = row.first_block + position // self.block_length
        left = self.block_length - len(row.tokens)
        yield Filled(ticket, block, len(row.tokens) - 1, (position,), (token,), (0.5,), left)
        done = row.total == row.params.max_new_tokens
        if done or not left:
            count = len(row.tokens)
            yield Committed(ticket, block, tuple(row.tokens), count, (0.5,) * count, usage=replace(row.usage))
            row.tokens = []
        if done:
            del self._rows[ticket]
            yield Finished(ticket, "length", row.usage, row.total)


class GatedBatch:
    """Another batch, whose forwards wait to be let through.

    Attributes:
        begun, done: Forwards that were asked for, and that have run.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._gate = threading.Semaphore(0)
        self._open = False
        self.begun = 0
        self.done = 0

    def let(self, forwards: int) -> None:
        """Let so many forwards through."""
        self._gate.release(forwards)

    def open(self) -> None:
        """Let all forwards through."""
        self._open = True
        self._gate.release()

    @property
    def rows(self) -> int:
        return self._batch.rows

    @property
    def active(self) -> int:
        return self._batch.active

    @property
    def free_rows(self) -> int:
        return self._batch.free_rows

    @property
    def cache_usage(self) -> float:
        return self._batch.cache_usage

    def admit(
        self,
        prompt: Sequence[int],
        params: DecodingParams,
        committed: Sequence[int] = (),
        *,
        cache_salt: str = "",
    ) -> int:
        return self._batch.admit(prompt, params, committed, cache_salt=cache_salt)

    def release(self, ticket: int) -> None:
        self._batch.release(ticket)

    def forget_stored(self) -> None:
        self._batch.forget_stored()

    def step(self) -> list[Event]:
        self.begun += 1
        if not self._open:
            self._gate.acquire()
        events = self._batch.step()
        self.done += 1
        return events


class RunningServer:
    """A server on an event loop of its own thread."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self._loop = loop

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.server.metrics_port}/metrics"

    @property
    def health_url(self) -> str:
        return f"http://127.0.0.1:{self.server.metrics_port}/healthz"

    def tasks(self) -> int:
        """Tasks that its loop has, but the one that counts them."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result(30)

    def wait_failed(self) -> None:
        """Return once the server knows that its model has failed."""
        asyncio.run_coroutine_threadsafe(self.server.failed(), self._loop).result(30)

    def stop(self, drain_s: float) -> None:
        """Stop it as SIGTERM would, and wait until it has."""
        asyncio.run_coroutine_threadsafe(self.server.stop(drain_s), self._loop).result(30)


@contextmanager
def running_server(
    batch: Batch,
    model: ServedModel,
    *,
    weights: ServedWeights | None = None,
    recorder: Recorder | None = None,
    complete: Callable[[], bool] = lambda: True,
    **options: object,
) -> Iterator[RunningServer]:
    """Serve on free ports of the loopback until the block is left."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-server")
    thread.start()

    async def start() -> Server:
        wanted = ServerOptions(port=0, metrics_port=0, **options)  # type: ignore[arg-type]
        server = Server(batch, model, wanted, weights, recorder, complete)
        await server.start()
        return server

    try:
        running = RunningServer(asyncio.run_coroutine_threadsafe(start(), loop).result(30), loop)
        try:
            yield running
        finally:
            if isinstance(batch, GatedBatch):
                batch.open()  # a test that failed leaves its forward waiting, and with it the model's thread
            running.stop(0)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def wait_until(true: Callable[[], bool], *, timeout_s: float = 30.0, every_s: float = 0.002) -> None:
    """Return as soon as ``true()``, asked so often; a test fails that waits in vain."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every_s)
