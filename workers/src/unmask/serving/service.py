"""The gRPC services: a call becomes a request of the engine, and its outbox becomes the answer.

However a call ends (done, refused, cancelled, past its deadline, client gone), its request leaves the engine:
at once from the queue, within one forward from the batch.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc
from grpc.aio import ServicerContext

from unmask.diffusion.batch import Finished
from unmask.errors import UsageError
from unmask.serving.decoders import diffusion_params
from unmask.serving.engine import Engine, EngineStopped, ModelFailed, QueueFull, Request
from unmask.serving.model import DEFAULT_MAX_TOKENS, ServedModel
from unmask.serving.narration import Narration
from unmask.serving.outbox import Item, Outbox
from unmask.serving.refusals import Refused
from unmask.serving.requests import Order, check_canvas, read_order
from unmask.telemetry import Recorder, metrics
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import GenerationServicer, ModelsServicer

__all__ = ["GenerationService", "ModelsService"]

Context = ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

_CLOSE_TO_DEADLINE_S = 0.05
"""A cancellation with less time left is the deadline's: the client's clock runs a little ahead of ours."""


class GenerationService(GenerationServicer):
    """``unmask.v1.Generation``.

    Args:
        engine: Runs the requests.
        model: What they are checked against.
        recorder: Takes the metrics of calls.
        max_request_s: The most time a call gets, and what it gets if it brings no deadline.
    """

    def __init__(
        self, engine: Engine, model: ServedModel, recorder: Recorder, *, max_request_s: float
    ) -> None:
        self._engine = engine
        self._model = model
        self._recorder = recorder
        self._max_request_s = max_request_s
        self._live: set[str] = set()

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        """One whole generation."""
        response = pb.GenerateResponse()
        async with self._accounted(context) as ended, aclosing(self._events(request, canvas=False)) as events:
            async for event in events:
                _gather(event, response)
                ended.by(event)
        return response

    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> None:
        """Events as they happen; a coroutine that writes, so that a cancelled call ends here and now."""
        async with self._accounted(context) as ended:
            canvas = check_canvas(request.options)
            async with aclosing(self._events(request.request, canvas=canvas)) as events:
                async for event in events:
                    await context.write(event)
                    ended.by(event)

    async def _events(
        self, request: pb.GenerateRequest, *, canvas: bool
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        # Tokenising a long prompt takes a while, and the loop has other clients to serve.
        order = await asyncio.to_thread(read_order, request, self._model)
        narration = Narration(order, self._model)
        with self._named(order.request_id):
            async with aclosing(self._items(order, canvas=canvas)) as items:
                async for item in items:
                    yield narration.tell(item)

    async def _items(self, order: Order, *, canvas: bool) -> AsyncGenerator[Item, None]:
        """What the engine makes of an order; to close it is to cancel."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        request = Request(
            prompt=order.prompt,
            committed=order.committed,
            params=order.params,
            canvas=canvas,
            outbox=Outbox(lambda: loop.call_soon_threadsafe(ready.set)),
        )
        self._engine.submit(request)
        try:
            while True:
                await ready.wait()
                ready.clear()
                for item in request.outbox.take():
                    yield item
                    if isinstance(item, Finished):
                        return
        finally:
            self._engine.cancel(request)

    @contextmanager
    def _named(self, request_id: str) -> Iterator[None]:
        """Hold a request's name while it runs."""
        if request_id in self._live:
            message = f"request_id: a request named {request_id!r} is running; use another name"
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, message)
        self._live.add(request_id)
        try:
            yield
        finally:
            self._live.discard(request_id)

    @asynccontextmanager
    async def _accounted(self, context: Context) -> AsyncIterator["_Ending"]:
        """Bound a call's time, give its errors their status, and count how it ended."""
        ending = _Ending()
        try:
            async with asyncio.timeout(self._time_left(context)):
                yield ending
        except asyncio.CancelledError:
            late = self._time_left(context) < _CLOSE_TO_DEADLINE_S
            ending.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            refused = _refusal(error)
            ending.code = refused.code
            await context.abort_with_status(refused.status())
        finally:
            self._count(ending)

    def _time_left(self, context: Context) -> float:
        remaining: float | None = context.time_remaining()
        return self._max_request_s if remaining is None else min(remaining, self._max_request_s)

    def _count(self, ending: "_Ending") -> None:
        self._recorder.count(metrics.REQUESTS, code=ending.code.name, finish_reason=ending.finish_reason)
        if ending.code is grpc.StatusCode.CANCELLED:
            self._recorder.count(metrics.CANCELLED, by="client")
        if ending.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._recorder.count(metrics.CANCELLED, by="deadline")


class ModelsService(ModelsServicer):
    """``unmask.v1.Models``."""

    def __init__(self, model: ServedModel) -> None:
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
        return self._info


class _Ending:
    """How a call ended, for its count."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.OK
        self.finish_reason = ""

    def by(self, event: pb.GenerateStreamResponse) -> None:
        """Note the reason, if ``event`` is the last."""
        if event.HasField("finished"):
            name = pb.FinishReason.Name(event.finished.reason)
            self.finish_reason = name.removeprefix("FINISH_REASON_").lower()


def _gather(event: pb.GenerateStreamResponse, response: pb.GenerateResponse) -> None:
    """Add one event of a stream to the answer of a unary call."""
    match event.WhichOneof("event"):
        case "started":
            response.request_id = event.started.request_id
        case "block_committed":
            response.token_ids.extend(event.block_committed.token_ids)
            response.text += event.block_committed.text_delta
        case "finished":
            response.text += event.finished.text_delta
            response.finish_reason = event.finished.reason
            response.usage.CopyFrom(event.finished.usage)


def _refusal(error: Exception) -> Refused:
    """The status that an error ends a call with; what is not foreseen is told to the log alone."""
    match error:
        case Refused():
            return error
        case QueueFull():
            return Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry_after_s=error.retry_after_s)
        case ModelFailed():
            return _failure()
        case EngineStopped():
            return Refused(grpc.StatusCode.UNAVAILABLE, str(error))
        case TimeoutError():
            return Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's time is over")
        case UsageError():
            return Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    logger.error("a call failed", exc_info=error)
    return _failure()


def _failure() -> Refused:
    return Refused(grpc.StatusCode.INTERNAL, "the server has failed; its log says why")
