"""One call, over as many replicas as it takes.

A replica's events are passed on as they come, one at a time, so that a client that reads slowly slows its
replica's sending down, and nothing gathers here. Where the replica is lost, the next one is asked for the
rest after the blocks that are committed: the client sees each token once, and one usage. A call that is
cancelled, or whose time is over, ends at its replica, too.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import grpc

from unmask.client.continuation import Continuation, OtherWeights
from unmask.client.errors import Overloaded, RequestError, ServerFailed, Unavailable, error_of
from unmask.fronts.generating import Accounts, Ending
from unmask.fronts.refusals import Refused, Violation, quoted
from unmask.gateway.pool import Pool, Replica
from unmask.gateway.routing import Choice, prefix_of
from unmask.telemetry import Recorder, metrics
from unmask.v1 import generation_pb2 as pb

__all__ = ["Attempts", "Relay", "RelayOptions"]

logger = logging.getLogger(__name__)

_PAUSE_S = 0.25
"""Before a replica that a call has been to already is asked again, unless something changes."""
_RETRY_AFTER_S = 1.0
"""To ask clients to wait where no replica could answer."""

Verdict: TypeAlias = Literal["elsewhere", "give up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayOptions:
    """What a call may take up."""

    max_calls: int = 1024
    """At a time; more are refused."""
    max_request_s: float = 600.0
    """The most time one call gets."""
    wait_s: float = 10.0
    """How long a call waits for a replica where there is none that takes it."""
    attempts: int = 3
    """Replicas that a call is given to in turn without one more block being committed."""
    prefix_blocks: int = 4
    """Whole blocks at the beginning of a prompt that decide where it goes; 0 for none."""


@dataclass(slots=True)
class Attempts:
    """What has become of one call so far, and what is to be done about it: decisions alone."""

    most: int
    """Without progress."""
    tried: set[str] = field(default_factory=set)
    """Replicas that it has been to since the last progress, or since all were tried."""
    _made: int = 0
    _fruitless: int = 0
    _defects: int = 0

    def progressed(self) -> None:
        """A block was committed."""
        self._fruitless = self._defects = 0
        self.tried.clear()

    def failed(self, replica: str, failure: RequestError) -> Verdict:
        """An attempt came to nothing.

        Where a replica is full, all may be asked: that costs nobody anything. Where one is lost, the call
        may be what it was lost by, and must not get round to all of them; where a defect ended it, one more
        may show whether it was the machine's. What is wrong, or late, is so everywhere, but for a name that
        is still in use at a replica where the call was before.
        """
        self.tried.add(replica)
        self._made += 1
        if isinstance(failure, Overloaded):
            return "elsewhere"
        self._fruitless += 1
        if isinstance(failure, ServerFailed):
            self._defects += 1
            again = self._defects == 1
        else:
            left_over = failure.code == grpc.StatusCode.ALREADY_EXISTS.name and self._made > 1
            again = isinstance(failure, Unavailable) or left_over
        return "elsewhere" if again and self._fruitless < self.most else "give up"


class Relay:
    """All calls of one gateway. Use from one event loop.

    Args:
        pool: Where they go.
        recorder: Takes the metrics of calls.
        options: What they may take up.
    """

    def __init__(self, pool: Pool, recorder: Recorder, options: RelayOptions) -> None:
        self._pool, self._recorder, self._options = pool, recorder, options
        self._accounts = Accounts(max_request_s=options.max_request_s, refusal=_foreseen, ended=self._count)
        self._live: set[str] = set()
        self._running = 0

    @property
    def model_name(self) -> str:
        """What requests call the model.

        Raises:
            Refused: No replica has said it yet.
        """
        return self.model().name

    def model(self) -> pb.GetModelInfoResponse:
        """What replicas say of the model.

        Raises:
            Refused: None has said it yet.
        """
        info = self._pool.info
        if info is None:
            raise _nobody("no replica has answered yet")
        return info

    def accounted(self, remaining: Callable[[], float | None]) -> AbstractAsyncContextManager[Ending]:
        """Bound a call's time, give its errors their status, and count how it ended.

        Args:
            remaining: Seconds until the client's deadline; None if it has none.

        Raises:
            Refused: Whatever ended the call other than its being cancelled.
        """
        return self._accounts.accounted(remaining)

    async def events(
        self, request: pb.GenerateRequest, *, deadline: float | None = None, canvas: bool = False
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """What becomes of a request, as a stream says it; to close it is to cancel.

        Args:
            request: What is asked for; it gets a name if it has none.
            deadline: On the monotonic clock.
            canvas: Whether to tell of provisional fills.

        Raises:
            Refused: A replica refused it, or none carried it to its end.
        """
        end = time.monotonic() + self._options.max_request_s if deadline is None else deadline
        with self._named(request):
            generation = Continuation(request, canvas=canvas)
            came_with = generation.committed
            attempts, prefix = Attempts(self._options.attempts), self._prefix(request)
            failure: RequestError | None = None
            failed_at: float | None = None
            while True:
                replica, choice = await self._find(generation, attempts, prefix, failure, end)
                why = "first" if failure is None else "again"
                if generation.committed > came_with:
                    why = "resume"
                self._recorder.count(metrics.GATEWAY_ROUTED, by=choice.by)
                self._recorder.count(metrics.GATEWAY_ATTEMPTS, why=why)
                with self._pool.given(replica):
                    call = replica.generation.GenerateStream(
                        generation.request(), timeout=max(0.0, end - time.monotonic())
                    )
                    try:
                        async for message in call:
                            if failed_at is not None:
                                stalled_s = time.monotonic() - failed_at
                                self._recorder.observe(metrics.GATEWAY_STALL_SECONDS, stalled_s)
                                failed_at = None
                            event = generation.hear(message)
                            if message.HasField("block_committed"):
                                attempts.progressed()
                            if event is not None:
                                yield event
                        generation.check_finished(replica.address)
                        replica.standing.answered()
                        return
                    except grpc.aio.AioRpcError as error:
                        failure = error_of(error, replica.address)
                        refused = _passed_on(error, failure)
                    except OtherWeights as error:
                        failure = error
                        refused = _nobody("no replica has the weights that the answer began with")
                    except RequestError as error:
                        failure = error
                        refused = Refused(grpc.StatusCode.INTERNAL, "a replica's answer was not whole")
                    except asyncio.CancelledError:
                        if _cancelled_here():
                            raise
                        failure = Unavailable("the connection was closed", code="CANCELLED")
                        refused = _nobody("the replica is gone")
                    finally:
                        call.cancel()  # the client may have left; nothing happens to a call that is over
                if generation.finished:  # and nothing but the end of the stream was lost
                    return
                if isinstance(failure, Unavailable | ServerFailed) and not isinstance(failure, OtherWeights):
                    self._pool.failed(replica, str(failure))
                if attempts.failed(replica.address, failure) == "give up":
                    raise refused
                failed_at = time.monotonic()

    async def _find(
        self,
        generation: Continuation,
        attempts: Attempts,
        prefix: bytes | None,
        failure: RequestError | None,
        end: float,
    ) -> tuple[Replica, Choice]:
        """The replica to ask next, which is waited for.

        Raises:
            Refused: There is none in time, or all are full.
        """
        revision = generation.revision
        patience_ends = min(end, time.monotonic() + self._options.wait_s)
        while True:
            found = self._pool.choose(prefix=prefix, tried=attempts.tried, revision=revision)
            if found is not None:
                return found
            if isinstance(failure, Overloaded):
                raise Refused(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"all replicas are full; the last one says: {_plain(failure)}",
                    retry_after_s=failure.retry_after_s,
                )
            left_s = patience_ends - time.monotonic()
            if left_s <= 0:
                which = "" if revision is None else " with the weights that the answer began with"
                raise _nobody(f"no replica{which} took calls for {self._options.wait_s:g} s")
            await self._pool.wait_changed(min(left_s, _PAUSE_S))
            attempts.tried.clear()

    def _prefix(self, request: pb.GenerateRequest) -> bytes | None:
        info = self._pool.info
        if info is None or not info.block_length or not self._options.prefix_blocks:
            return None
        return prefix_of(request, block_length=info.block_length, blocks=self._options.prefix_blocks)

    @contextmanager
    def _named(self, request: pb.GenerateRequest) -> Iterator[None]:
        """Hold a call's name, which it keeps at each replica, and its place among those that run.

        Raises:
            Refused: A call of this name runs already, or too many do.
        """
        if not request.HasField("request_id"):
            request.request_id = uuid.uuid4().hex
        name = request.request_id
        if name in self._live:
            message = f"request_id: a request named {quoted(name)} is running; use another name"
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, message)
        if self._running >= self._options.max_calls:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the gateway has {self._running} calls, which is all that it may have; ask again",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._live.add(name)
        self._run(1)
        try:
            yield
        finally:
            self._live.discard(name)
            self._run(-1)

    def _run(self, more: int) -> None:
        self._running += more
        self._recorder.gauge(metrics.GATEWAY_REQUESTS_RUNNING, self._running)

    def _count(self, ending: Ending) -> None:
        self._recorder.count(
            metrics.GATEWAY_REQUESTS, code=ending.code.name, finish_reason=ending.finish_reason
        )


def _cancelled_here() -> bool:
    """Whether this task is being cancelled, not its connection to a replica."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _foreseen(error: Exception) -> None:
    """Nothing but refusals and time-outs is."""


def _nobody(why: str) -> Refused:
    return Refused(grpc.StatusCode.UNAVAILABLE, f"{why}; ask again", retry_after_s=_RETRY_AFTER_S)


def _passed_on(error: grpc.aio.AioRpcError, failure: RequestError) -> Refused:
    """A replica's refusal in its own words, but for where it is, which is no matter of clients."""
    if isinstance(failure, Unavailable):
        return _nobody("no replica carried the call to its end")
    return Refused(
        error.code(),
        error.details() or error.code().name,
        violations=[Violation(each.field, each.description) for each in failure.violations],
        retry_after_s=failure.retry_after_s,
    )


def _plain(failure: RequestError) -> str:
    """What a replica said, without its address in front."""
    return str(failure).partition(": ")[2] or str(failure)
