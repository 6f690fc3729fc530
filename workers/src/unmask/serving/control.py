"""``unmask.v1.Control``: what whoever runs a server may do to it, on a port of its own."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc.aio import ServicerContext

from unmask.errors import UnmaskError
from unmask.fronts.refusals import Refused, Violation, invalid, quoted
from unmask.serving.calls import Calls
from unmask.serving.engine import Engine, EngineStopped, ModelFailed
from unmask.serving.weights import ServedWeights
from unmask.v1 import control_pb2 as pb
from unmask.v1.control_pb2_grpc import ControlServicer

__all__ = ["ControlService", "Gate"]

logger = logging.getLogger(__name__)

Context = ServicerContext[Any, Any]

_LOOK_S = 0.05
"""How often a drain looks how far it is."""
_MOST_NAMES = 10_000


class Gate:
    """Whether a server takes calls, and who is told.

    Args:
        engine: Refuses what is new while the gate is closed.
        tell: Says it to whoever watches the server's health.
    """

    def __init__(self, engine: Engine, tell: Callable[[bool], Awaitable[None]]) -> None:
        self._engine = engine
        self._tell = tell
        self._last = False
        self.open = True

    async def close(self) -> None:
        """Take nothing new."""
        self.open = False
        self._engine.drain()
        await self._tell(False)

    async def reopen(self) -> None:
        """Take what is new again.

        Raises:
            Refused: The gate has been closed for the last time.
        """
        if self._last:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, "the server is shutting down")
        self.open = True
        self._engine.resume()
        await self._tell(True)

    def close_for_good(self) -> None:
        """Take nothing new, and never again."""
        self.open, self._last = False, True
        self._engine.drain()


class ControlService(ControlServicer):
    """``unmask.v1.Control``.

    Args:
        calls: Those that may be ended.
        engine: Runs them.
        gate: Whether new ones are taken.
        weights: What may be replaced; None where the server does not know its weights.
    """

    def __init__(self, calls: Calls, engine: Engine, gate: Gate, weights: ServedWeights | None) -> None:
        self._calls, self._engine, self._gate, self._weights = calls, engine, gate, weights
        self._one_update = asyncio.Lock()
        self._updates: set[asyncio.Task[str]] = set()

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        """End calls."""
        async with _answered(context):
            if request.all == bool(request.request_ids):
                raise invalid([Violation("request_ids", "give names, or set `all`: one of the two")])
            if len(request.request_ids) > _MOST_NAMES:
                raise invalid([Violation("request_ids", f"at most {_MOST_NAMES} names, or set `all`")])
            names = self._calls.live if request.all else request.request_ids
            ended = [name for name in dict.fromkeys(names) if self._calls.abort(name)]
        logger.info("%d calls were ended by Control.Abort", len(ended))
        return pb.AbortResponse(request_ids=ended)

    async def Drain(  # type: ignore[override]  # noqa: N802
        self, request: pb.DrainRequest, context: Context
    ) -> None:
        """Take nothing new, and tell how many are left until there are none."""
        async with _answered(context):
            logger.info("draining: Control.Drain was called")
            await self._gate.close()
            told: tuple[int, int] | None = None
            while told != (0, 0):
                if self._gate.open:
                    raise Refused(grpc.StatusCode.FAILED_PRECONDITION, "the server was resumed meanwhile")
                if (load := self._engine.load) != told:
                    told = load
                    await context.write(pb.DrainResponse(running=load[0], waiting=load[1]))
                else:
                    await asyncio.sleep(_LOOK_S)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:  # noqa: N802
        """Take new calls again."""
        async with _answered(context):
            await self._gate.reopen()
            logger.info("taking calls again: Control.Resume was called")
        return pb.ResumeResponse()

    async def UpdateWeights(  # noqa: N802
        self, request: pb.UpdateWeightsRequest, context: Context
    ) -> pb.UpdateWeightsResponse:
        """Replace the weights; goes on if the caller leaves."""
        async with _answered(context):
            if not request.folder:
                raise invalid([Violation("folder", "is empty; name a model folder")])
            if self._weights is None:
                message = "this server's weights cannot be replaced; start another one"
                raise Refused(grpc.StatusCode.FAILED_PRECONDITION, message)
            update = asyncio.create_task(self._update(request.folder, self._weights))
            self._updates.add(update)
            update.add_done_callback(self._updated)
            return pb.UpdateWeightsResponse(revision=await asyncio.shield(update))

    async def _update(self, folder: str, weights: ServedWeights) -> str:
        async with self._one_update:
            logger.info("checking the weights in %s", quoted(folder))
            with await asyncio.to_thread(weights.check, folder) as new:
                logger.info("checked; they take the others' place when no request runs")
                done = self._engine.alone(lambda batch: weights.replace(new, batch))
                await asyncio.wrap_future(done)
            logger.info("computing with the weights in %s, revision %s", quoted(folder), new.revision)
            return new.revision

    def _updated(self, update: "asyncio.Task[str]") -> None:
        self._updates.discard(update)
        if not update.cancelled() and (error := update.exception()) is not None:
            logger.warning("the weights stay as they are: %s", error)


@asynccontextmanager
async def _answered(context: Context) -> AsyncIterator[None]:
    """A call, whose errors become its status."""
    try:
        yield
    except Refused as refused:
        await context.abort_with_status(refused.status())
    except UnmaskError as error:
        await context.abort_with_status(Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)).status())
    except ModelFailed:
        await context.abort_with_status(_failure().status())
    except EngineStopped as error:
        await context.abort_with_status(Refused(grpc.StatusCode.UNAVAILABLE, str(error)).status())
    except Exception as error:  # gRPC would tell the caller its text, and call it UNKNOWN
        logger.error("a call of Control failed", exc_info=error)
        await context.abort_with_status(_failure().status())


def _failure() -> Refused:
    return Refused(grpc.StatusCode.INTERNAL, "the server has failed; its log says why")
