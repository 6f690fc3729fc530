"""``unmask.v1.Generation``: a call's events, written as they come or gathered into one answer."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from grpc.aio import InternalError, ServicerContext

from unmask.fronts.generating import Ending, Generating, gather
from unmask.fronts.refusals import Refused, Violation, invalid
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import GenerationServicer

__all__ = ["GenerationService", "check_canvas"]

Context = ServicerContext[Any, Any]


class GenerationService(GenerationServicer):
    """The service.

    Args:
        answers: Where answers come from.
    """

    def __init__(self, answers: Generating) -> None:
        self._answers = answers

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        """One whole generation."""
        response = pb.GenerateResponse()

        async def answer(ended: Ending) -> None:
            async with aclosing(self._answers.events(request, deadline=ended.deadline)) as events:
                async for event in events:
                    gather(event, response)
                    ended.by(event)

        await self._answered(context, answer)
        return response

    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> None:
        """Events as they happen; a coroutine that writes, so that a cancelled call ends here and now."""

        async def answer(ended: Ending) -> None:
            canvas = check_canvas(request.options)
            told = self._answers.events(request.request, deadline=ended.deadline, canvas=canvas)
            async with aclosing(told) as events:
                async for event in events:
                    await _written(event, context)
                    ended.by(event)

        await self._answered(context, answer)

    async def _answered(self, context: Context, answer: Callable[[Ending], Awaitable[None]]) -> None:
        """Account for a call; its refusal becomes the stream's status."""
        try:
            async with self._answers.accounted(context.time_remaining) as ending:
                return await answer(ending)
        except Refused as refused:
            status = refused.status()
        # Not while the refusal is handled, and out of all context managers: gRPC keeps what it ends a call
        # with until another call comes, and with it every frame and exception that this leads to.
        await context.abort_with_status(status)


async def _written(event: pb.GenerateStreamResponse, context: Context) -> None:
    """Write an event.

    Raises:
        asyncio.CancelledError: The client is gone.
    """
    try:
        await context.write(event)
    except InternalError as error:
        # What gRPC says where the call ends in the middle of a write. The task is cancelled in a moment, as
        # it would have been before the write, and nobody is left to be told of a failure.
        raise asyncio.CancelledError from error


def check_canvas(options: pb.StreamOptions) -> bool:
    """Whether a stream wants canvas updates.

    Raises:
        Refused: The mode is not one we know.
    """
    if options.canvas not in pb.CanvasMode.values():
        allowed = ", ".join(name for name in pb.CanvasMode.keys() if not name.endswith("_UNSPECIFIED"))
        raise invalid([Violation("options.canvas", f"got {options.canvas}, allowed are {allowed}")])
    return options.canvas == pb.CANVAS_MODE_DIFF
