"""What every call goes through, however it came in: a request of the engine, its events, and its end.

However a call ends (done, refused, cancelled, past its deadline, client gone), its request leaves the engine:
at once from the queue, within one forward from the batch.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager

import grpc

from unmask.diffusion.batch import Finished
from unmask.errors import UsageError
from unmask.fronts.generating import Accounts, Ending, failure
from unmask.fronts.refusals import Refused, quoted
from unmask.serving.engine import Engine, EngineStopped, Interrupted, ModelFailed, QueueFull, Request
from unmask.serving.model import ServedModel
from unmask.serving.narration import Narration
from unmask.serving.outbox import Failed, Item, Outbox
from unmask.serving.requests import Order, read_order
from unmask.serving.tracing import TraceLog
from unmask.telemetry import Recorder, metrics
from unmask.v1 import generation_pb2 as pb

__all__ = ["Calls"]


class Aborted(Exception):
    """Whoever runs the server has ended the call."""


class Calls:
    """The calls of one server.

    Args:
        engine: Runs the requests.
        model: What they are checked against.
        recorder: Takes the metrics of calls.
        max_request_s: The most time a call gets, and what it gets if it brings no deadline.
        revision: Of the weights that answers are of.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        recorder: Recorder,
        *,
        max_request_s: float,
        revision: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._revision = revision
        self._engine = engine
        self._model = model
        self._recorder = recorder
        self._accounts = Accounts(max_request_s=max_request_s, refusal=_refusal, ended=self._count)
        self._live: dict[str, Request] = {}

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self._model.name

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
            request: What is asked for.
            deadline: On the monotonic clock: a request that would wait for longer is refused.
            canvas: Whether to tell of provisional fills.

        Raises:
            Refused: The request is wrong.
        """
        # Tokenising a long prompt takes a while, and the loop has other clients to serve.
        order = await asyncio.to_thread(read_order, request, self._model)
        narration = Narration(order, self._model, revision=self._revision)
        ready = asyncio.Event()
        submitted = _request(order, ready, deadline=deadline, canvas=canvas)
        with self._named(order.request_id, submitted):
            async with aclosing(self._items(submitted, ready)) as items:
                async for item in items:
                    if (event := narration.tell(item)) is not None:
                        yield event
                    if narration.stopped:
                        self._engine.conclude(submitted, narration.usage, kept=narration.kept)
                        yield narration.stop()
                        return

    async def _items(self, request: Request, ready: asyncio.Event) -> AsyncGenerator[Item, None]:
        """What the engine makes of a request; to close it is to cancel."""
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

    @property
    def live(self) -> list[str]:
        """Names of the calls that wait or run."""
        return list(self._live)

    def abort(self, request_id: str) -> bool:
        """End a call, which is then told so, and say whether it was there."""
        request = self._live.get(request_id)
        if request is None:
            return False
        self._engine.cancel(request)
        request.outbox.put(Failed(error=Aborted("the call was ended by whoever runs the server")))
        return True

    @contextmanager
    def _named(self, request_id: str, request: Request) -> Iterator[None]:
        """Hold a request's name while it runs."""
        if request_id in self._live:
            message = f"request_id: a request named {quoted(request_id)} is running; use another name"
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, message)
        self._live[request_id] = request
        try:
            yield
        finally:
            del self._live[request_id]

    def _count(self, ending: Ending) -> None:
        self._recorder.count(metrics.REQUESTS, code=ending.code.name, finish_reason=ending.finish_reason)
        if ending.code is grpc.StatusCode.CANCELLED:
            self._recorder.count(metrics.CANCELLED, by="client")
        if ending.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._recorder.count(metrics.CANCELLED, by="deadline")
        if ending.code is grpc.StatusCode.ABORTED:
            self._recorder.count(metrics.CANCELLED, by="operator")


def _request(order: Order, ready: asyncio.Event, *, deadline: float | None, canvas: bool) -> Request:
    loop = asyncio.get_running_loop()
    return Request(
        prompt=order.prompt,
        committed=order.committed,
        params=order.params,
        cache_salt=order.cache_salt,
        priority=order.priority,
        deadline=deadline,
        canvas=canvas,
        trace=TraceLog() if order.trace else None,
        outbox=Outbox(lambda: loop.call_soon_threadsafe(ready.set)),
    )


def _refusal(error: Exception) -> Refused | None:
    """The status that an error ends a call with; None for one that is not foreseen."""
    match error:
        case QueueFull():
            return Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry_after_s=error.retry_after_s)
        case Aborted():
            return Refused(grpc.StatusCode.ABORTED, str(error))
        case ModelFailed():
            return failure()
        case EngineStopped() | Interrupted():
            return Refused(grpc.StatusCode.UNAVAILABLE, str(error))
        case UsageError():
            return Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    return None
