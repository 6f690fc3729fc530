"""OpenAI-style HTTP beside gRPC: the same calls, limits and ends, in JSON and server-sent events.

``POST /v1/completions`` and ``/v1/chat/completions``, with ``stream`` one event per committed block, and
``GET /v1/models``. A client that goes away frees its row within one forward, as over gRPC. What a client may
take up is bounded: connections, the time to send a request, its size, and the time of a call.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from unmask.fronts.generating import ClientGone, Generating, gather
from unmask.fronts.openai_wire import (
    Answer,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    error_of,
    http_status,
    read_body,
)
from unmask.fronts.refusals import Refused, quoted
from unmask.v1 import generation_pb2 as pb

__all__ = ["HttpFront", "HttpLimits"]

_Take: TypeAlias = Callable[[int, pb.GenerateStreamResponse], Awaitable[None]]
_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What clients may take up."""

    connections: int = 1024
    """More are closed at once."""
    request_s: float = 30.0
    """For the first request of a connection to begin, and for each body to arrive."""
    idle_s: float = 75.0
    """Between the requests of a connection."""
    body_bytes: int = 4 << 20


class HttpFront:
    """The HTTP interface of what answers. Use from one event loop."""

    def __init__(self, answers: Generating, limits: HttpLimits) -> None:
        self._answers, self._limits = answers, limits
        self._started = int(time.time())
        app = web.Application(client_max_size=limits.body_bytes, middlewares=[self._framed])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._one_model)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._chat)
        # To be cancelled when the client goes is what frees its row.
        self._runner = web.AppRunner(app, handler_cancellation=True)
        self._unheard: dict[RequestHandler, asyncio.TimerHandle] = {}
        self._arriving = 0
        self._site: asyncio.Server | None = None
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Answer at ``port``; 0 takes any, and ``port`` then says which.

        Raises:
            OSError: It is taken.
        """
        await self._runner.setup()
        self._site = await asyncio.get_running_loop().create_server(self._connection, host, port, backlog=128)
        self.port = self._site.sockets[0].getsockname()[1]

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, give running calls ``grace_s`` seconds, and end."""
        if self._site is not None:
            self._site.close()
        for timer in self._unheard.values():
            timer.cancel()
        server = self._runner.server
        if server is not None:
            await server.shutdown(grace_s)
        await self._runner.cleanup()

    def _connection(self) -> asyncio.Protocol:
        """The protocol of a new connection, if there may be one more."""
        server = self._runner.server
        assert server is not None
        if len(server.connections) + self._arriving >= self._limits.connections:
            return _Closing()
        loop = asyncio.get_running_loop()
        handler = _Connection(server, loop=loop, access_log=None, keepalive_timeout=self._limits.idle_s)  # type: ignore[arg-type]
        # The server counts a connection a turn of the loop later, and several may be accepted in one.
        self._arriving += 1
        loop.call_later(0.01, self._arrived)
        self._unheard[handler] = loop.call_later(self._limits.request_s, self._close_unheard, handler)
        return handler

    def _arrived(self) -> None:
        self._arriving -= 1

    def _close_unheard(self, handler: "RequestHandler") -> None:
        del self._unheard[handler]
        handler.force_close()

    @web.middleware
    async def _framed(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Give whatever goes wrong its body, in the form that clients expect."""
        if (timer := self._unheard.pop(request.protocol, None)) is not None:
            timer.cancel()
        try:
            return await handler(request)
        except Refused as refused:
            return _refusal(refused)
        except web.HTTPRequestEntityTooLarge:
            limit = f"the request is larger than {self._limits.body_bytes} bytes"
            return _error(413, limit, "request_too_large")
        except web.HTTPException as error:
            text = f"{request.method} {quoted(request.path)}: {error.reason}"
            return _error(error.status, text, str(error.reason).lower().replace(" ", "_"), error.headers)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described()]})

    async def _one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != (served := self._answers.model_name):
            message = f"model: got {quoted(name)}, served here is {served!r}"
            raise Refused(grpc.StatusCode.NOT_FOUND, message)
        return web.json_response(self._described())

    def _described(self) -> dict[str, Any]:
        name = self._answers.model_name
        return {"id": name, "object": "model", "created": self._started, "owned_by": "unmask"}

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, CompletionRequest, CompletionAnswer)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, ChatRequest, ChatAnswer)

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._limits.request_s):
                return await request.read()
        except (web.RequestPayloadError, HttpProcessingError):  # whose text quotes what came
            message = "the body cannot be read: it is not what its Transfer- or Content-Encoding says"
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, message) from None
        except TimeoutError:
            message = f"the request took longer than {self._limits.request_s:g} s to arrive"
            raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None

    async def _answer(
        self,
        request: web.Request,
        kind: type[CompletionRequest | ChatRequest],
        words: type[Answer],
    ) -> web.StreamResponse:
        body = read_body(kind, await self._body(request))
        answer = words(self._answers.model_name, created=int(time.time()), logprobs=body.wants_logprobs)
        if body.stream:
            return await self._stream(request, body, answer)
        wanted = body.choices()
        responses = [pb.GenerateResponse() for _ in wanted]

        async def take(index: int, event: pb.GenerateStreamResponse) -> None:
            gather(event, responses[index])

        await self._carry_out(wanted, take)
        headers = {"x-request-id": responses[0].request_id}
        [text] = await _written(lambda: [answer.whole(responses)], aside=body.trace)
        return web.json_response(text=text, headers=headers)

    async def _stream(
        self, request: web.Request, body: CompletionRequest | ChatRequest, answer: Answer
    ) -> web.StreamResponse:
        """Server-sent events; a call that is refused before its first event is an ordinary error."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        usages: dict[int, pb.Usage] = {}

        async def take(index: int, event: pb.GenerateStreamResponse) -> None:
            if not response.prepared:
                response.headers["x-request-id"] = event.started.request_id
                await response.prepare(request)
            traced = event.HasField("finished") and body.trace
            for piece in await _written(lambda: answer.pieces(event, index=index), aside=traced):
                await response.write(_event(piece))
            if event.HasField("finished"):
                usages[index] = event.finished.usage

        async def take_if_heard(index: int, event: pb.GenerateStreamResponse) -> None:
            try:
                await take(index, event)
            except ConnectionError as error:
                raise ClientGone from error

        try:
            try:
                await self._carry_out(body.choices(), take_if_heard)
            except Refused as refused:
                if not response.prepared:
                    raise
                await response.write(_event(json.dumps(error_of(refused))))
            else:
                if body.stream_options.include_usage:
                    last = answer.last([usages[index] for index in sorted(usages)])
                    await response.write(_event(json.dumps(last)))
                await response.write(_event("[DONE]"))
            await response.write_eof()
        except (ClientGone, ConnectionError):
            pass  # as a rule the handler is cancelled first; it may be about to write just then
        return response

    async def _carry_out(self, wanted: Sequence[pb.GenerateRequest], take: _Take) -> None:
        """Have all requests answered at once, one event after the other to ``take``; one that fails ends all.

        Raises:
            Refused: The first that failed.
        """
        in_turn = asyncio.Lock()

        async def carry_out(index: int, request: pb.GenerateRequest) -> None:
            async with self._answers.accounted(lambda: None) as ended:
                async with aclosing(self._answers.events(request, deadline=ended.deadline)) as events:
                    async for event in events:
                        async with in_turn:
                            await take(index, event)
                        ended.by(event)

        try:
            async with asyncio.TaskGroup() as tasks:
                for index, request in enumerate(wanted):
                    tasks.create_task(carry_out(index, request))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None


class _Connection(RequestHandler):
    """One whose answer to what is not HTTP repeats nothing of it, and is no matter for the log."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a failed request, whose connection then ends."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        response = _error(400, "what came is not an HTTP request that can be read", "bad_request")
        response.force_close()
        return response


class _Closing(asyncio.Protocol):
    """Of a connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def _written(make: Callable[[], Sequence[Any]], *, aside: bool) -> list[str]:
    """What is made, as JSON.

    Args:
        make: Makes it.
        aside: Whether in a thread: a trace may be megabytes, and the loop has other clients to serve.
    """

    def written() -> list[str]:
        return [json.dumps(one) for one in make()]

    return await asyncio.to_thread(written) if aside else written()


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _refusal(refused: Refused) -> web.Response:
    headers = {}
    if refused.retry_after_s is not None:
        headers = {
            "Retry-After": str(max(1, round(refused.retry_after_s))),
            "retry-after-ms": str(round(refused.retry_after_s * 1000)),
        }
    return web.json_response(error_of(refused), status=http_status(refused.code), headers=headers)


def _error(status: int, message: str, code: str, headers: Any = None) -> web.Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    allowed = {"Allow": headers["Allow"]} if headers and "Allow" in headers else {}
    return web.json_response(body, status=status, headers=allowed)
