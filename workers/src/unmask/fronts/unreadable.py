"""Bytes that are not the message of their method: refused by name, as any other wrong request.

gRPC itself ends such a call with UNKNOWN, which tells a client that the server is at fault, and writes a
traceback to the log for each, so that anyone could fill it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

__all__ = ["UnreadableRefused"]

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class _Unreadable:
    """Stands for a message that could not be read."""


_UNREADABLE = _Unreadable()


class UnreadableRefused(grpc.aio.ServerInterceptor):
    """Refuses unreadable messages of all services, which must be written with coroutines.

    Args:
        told: Called with the method's full name for each call that is refused so.
    """

    def __init__(self, told: Callable[[str], object] = lambda method: None) -> None:
        self._told = told

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The method's handler, guarded; None if there is no such method, which gRPC refuses itself."""
        handler = await continuation(handler_call_details)
        return handler and self._guarded(handler, handler_call_details.method)

    def _guarded(self, handler: _Handler, method: str) -> _Handler:
        assert handler.request_deserializer
        parts: dict[str, Any] = {
            "request_deserializer": _forgiving(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        # Declared for servers of threads; coroutines are what a server of asyncio has.
        to_one: Any = handler.unary_unary or handler.unary_stream
        to_many: Any = handler.stream_stream

        async def readable(message: Any, context: _Context) -> Any:
            if message is _UNREADABLE:
                self._told(method)
                text = f"the message cannot be read; {method} takes the one that its .proto file says"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
            return message

        async def one(message: Any, context: _Context) -> Any:
            return await to_one(await readable(message, context), context)

        async def many(messages: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
            async def each() -> AsyncIterator[Any]:
                async for message in messages:
                    yield await readable(message, context)

            async for answer in to_many(each(), context):
                yield answer

        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(one, **parts)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(one, **parts)
        assert handler.stream_stream, f"{method}: a stream of requests with one answer is not foreseen"
        return grpc.stream_stream_rpc_method_handler(many, **parts)


def _forgiving(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize(content: bytes) -> Any:
        try:
            return read(content)
        except DecodeError:
            return _UNREADABLE

    return deserialize
