"""The gRPC services: a call's events, written as they come or gathered into one answer."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from grpc.aio import ServicerContext

from unmask.serving.calls import Calls, Ending, gather
from unmask.serving.decoders import diffusion_params
from unmask.serving.model import DEFAULT_MAX_TOKENS, ServedModel
from unmask.serving.refusals import Refused
from unmask.serving.requests import check_canvas
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import GenerationServicer, ModelsServicer

__all__ = ["GenerationService", "ModelsService"]

Context = ServicerContext[Any, Any]


class GenerationService(GenerationServicer):
    """``unmask.v1.Generation``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        """One whole generation."""
        response = pb.GenerateResponse()
        async with self._answered(context) as ended:
            async with aclosing(self._calls.events(request, deadline=ended.deadline)) as events:
                async for event in events:
                    gather(event, response)
                    ended.by(event)
        return response

    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> None:
        """Events as they happen; a coroutine that writes, so that a cancelled call ends here and now."""
        async with self._answered(context) as ended:
            canvas = check_canvas(request.options)
            told = self._calls.events(request.request, deadline=ended.deadline, canvas=canvas)
            async with aclosing(told) as events:
                async for event in events:
                    await context.write(event)
                    ended.by(event)

    @asynccontextmanager
    async def _answered(self, context: Context) -> AsyncIterator[Ending]:
        """A call, whose refusal becomes the stream's status."""
        try:
            async with self._calls.accounted(context.time_remaining) as ending:
                yield ending
        except Refused as refused:
            await context.abort_with_status(refused.status())


class ModelsService(ModelsServicer):
    """``unmask.v1.Models``."""

    def __init__(self, model: ServedModel, revision: Callable[[], str | None]) -> None:
        self._revision = revision
        defaults, decoder = model.defaults, model.default_decoder
        params = model.params(decoder, pb.DiffusionParams(), max_new_tokens=model.context_length)
        self._info = pb.GetModelInfoResponse(
            name=model.name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
            block_length=defaults.block_length,
            has_chat_template=model.tokenizer.has_chat_template,
            eos_token_id=defaults.eos_token_id,
            mask_token_id=defaults.mask_token_id,
            max_running_requests=model.rows,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            decoders=[decoder.wire for decoder in model.decoders],
            default_diffusion=diffusion_params(decoder, params),
        )

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        """What is served."""
        info = pb.GetModelInfoResponse()
        info.CopyFrom(self._info)
        if (revision := self._revision()) is not None:
            info.revision = revision
        return info
