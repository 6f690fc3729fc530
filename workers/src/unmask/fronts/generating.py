"""What answers calls, as its fronts see it, and what all calls have in common: a bounded time, and an end.

The gRPC service and the HTTP front differ in how they read a request and write an answer, in nothing else.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import grpc

from unmask.fronts.refusals import Refused
from unmask.v1 import generation_pb2 as pb

__all__ = ["Accounts", "ClientGone", "Ending", "Generating", "failure", "gather"]

logger = logging.getLogger(__name__)

_CLOSE_TO_DEADLINE_S = 0.05
"""A cancellation with less time left is the deadline's: the client's clock runs a little ahead of ours."""


class ClientGone(Exception):
    """Its connection ended while it was being told something."""


class Ending:
    """How a call ended, for its count, and by when it has to."""

    def __init__(self, *, deadline: float) -> None:
        self.deadline = deadline
        """On the monotonic clock."""
        self.code = grpc.StatusCode.OK
        self.finish_reason = ""

    def by(self, event: pb.GenerateStreamResponse) -> None:
        """Note the reason, if ``event`` is the last."""
        if event.HasField("finished"):
            name = pb.FinishReason.Name(event.finished.reason)
            self.finish_reason = name.removeprefix("FINISH_REASON_").lower()


class Generating(Protocol):
    """Makes answers."""

    @property
    def model_name(self) -> str:
        """What requests call the model.

        Raises:
            Refused: It is not known now.
        """

    def accounted(
        self, remaining: Callable[[], float | None]
    ) -> AbstractAsyncContextManager[Ending]:  # as Accounts.accounted
        """Bound a call's time, give its errors their status, and count how it ended."""

    def events(
        self, request: pb.GenerateRequest, *, deadline: float | None = None, canvas: bool = False
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """What becomes of a request, as a stream says it; to close it is to cancel.

        Args:
            request: What is asked for.
            deadline: On the monotonic clock: a request that would wait for longer is refused.
            canvas: Whether to tell of provisional fills.

        Raises:
            Refused: The request is wrong, or came to no end.
        """


class Accounts:
    """Bounds the time of calls, gives their errors a status, and tells how they ended.

    Args:
        max_request_s: The most time a call gets, and what it gets if it brings no deadline.
        refusal: The status of an error; None for one that is not foreseen, which the log gets.
        ended: Is told of each call's end.
    """

    def __init__(
        self,
        *,
        max_request_s: float,
        refusal: Callable[[Exception], Refused | None],
        ended: Callable[[Ending], object],
    ) -> None:
        self._max_request_s, self._refusal, self._ended = max_request_s, refusal, ended

    @asynccontextmanager
    async def accounted(self, remaining: Callable[[], float | None]) -> AsyncIterator[Ending]:
        """One call.

        Args:
            remaining: Seconds until the client's deadline; None if it has none.

        Raises:
            Refused: Whatever ended the call other than its being cancelled, or its client's leaving.
        """
        left_s = self._time_left(remaining)
        ending = Ending(deadline=time.monotonic() + left_s)
        try:
            async with asyncio.timeout(left_s):
                yield ending
        except asyncio.CancelledError:
            late = self._time_left(remaining) < _CLOSE_TO_DEADLINE_S
            ending.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except ClientGone:
            ending.code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            refused = self._refused(error)
            ending.code = refused.code
            raise refused from error
        finally:
            self._ended(ending)

    def _time_left(self, remaining: Callable[[], float | None]) -> float:
        left = remaining()
        return self._max_request_s if left is None else min(left, self._max_request_s)

    def _refused(self, error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, TimeoutError):
            return Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's time is over")
        refused = self._refusal(error)
        if refused is None:
            logger.error("a call failed", exc_info=error)
            return failure()
        return refused


def failure() -> Refused:
    """The status of what is not foreseen, of which the log alone is told more."""
    return Refused(grpc.StatusCode.INTERNAL, "the server has failed; its log says why")


def gather(event: pb.GenerateStreamResponse, response: pb.GenerateResponse) -> None:
    """Add one event of a stream to the answer of a call that wants it whole."""
    match event.WhichOneof("event"):
        case "started":
            response.request_id = event.started.request_id
        case "block_committed":
            response.token_ids.extend(event.block_committed.token_ids)
            response.text += event.block_committed.text_delta
            response.logprobs.extend(event.block_committed.logprobs)
            response.token_texts.extend(event.block_committed.token_texts)
        case "finished":
            response.text += event.finished.text_delta
            response.finish_reason = event.finished.reason
            response.usage.CopyFrom(event.finished.usage)
            if event.finished.HasField("trace"):
                response.trace.CopyFrom(event.finished.trace)
            match event.finished.WhichOneof("stopped_by"):
                case "stop":
                    response.stop = event.finished.stop
                case "stop_token_id":
                    response.stop_token_id = event.finished.stop_token_id
