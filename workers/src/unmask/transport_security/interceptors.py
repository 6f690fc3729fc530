"""Calls of peers that are not allowed by name end before anything is done for them, their message unread."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeAlias

import grpc

from unmask.transport_security.names import AllowedNames, PeerNames, names_of

__all__ = ["AsyncPeersAllowed", "PeersAllowed"]

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Told: TypeAlias = Callable[[str], object]


class PeersAllowed(grpc.ServerInterceptor):
    """For servers of threads.

    Args:
        allowed: Who may call any method.
        told: Called with the method's full name for each call that is refused.
    """

    def __init__(self, allowed: AllowedNames, told: _Told = lambda method: None) -> None:
        self._allowed, self._told = allowed, told

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "_Handler | None"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The method's handler, guarded; None if there is no such method, which gRPC refuses itself."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method, behaviour, read = handler_call_details.method, _behaviour(handler), _late_reader(handler)

        def guarded(message: Any, context: Any) -> Any:
            if refusal := _refusal(self._allowed, context.auth_context()):
                self._told(method)
                context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
            return behaviour(read(message), context)

        return _with_behaviour(handler, guarded)


class AsyncPeersAllowed(grpc.aio.ServerInterceptor):
    """For servers of asyncio, whose methods are coroutines or asynchronous generators.

    Args:
        allowed: Who may call any method.
        told: Called with the method's full name for each call that is refused.
    """

    def __init__(self, allowed: AllowedNames, told: _Told = lambda method: None) -> None:
        self._allowed, self._told = allowed, told

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The method's handler, guarded; None if there is no such method, which gRPC refuses itself."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method, behaviour, read = handler_call_details.method, _behaviour(handler), _late_reader(handler)

        async def check(context: Any) -> None:
            if refusal := _refusal(self._allowed, context.auth_context()):
                self._told(method)
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)

        async def answered(message: Any, context: Any) -> Any:
            await check(context)
            return await behaviour(read(message), context)

        async def generated(message: Any, context: Any) -> AsyncIterator[Any]:
            await check(context)
            async for answer in behaviour(read(message), context):
                yield answer

        return _with_behaviour(handler, generated if inspect.isasyncgenfunction(behaviour) else answered)


def _refusal(allowed: AllowedNames, auth: Mapping[str, Iterable[bytes]]) -> str | None:
    """What to tell a peer that may not call."""
    peer = PeerNames()
    for pem in auth.get("x509_pem_cert", ()):  # one at most: the peer's own
        peer = names_of(pem)
    if allowed.admit(peer):
        return None
    return (
        f"this server lets in clients by name, and none of this one's is among them: its certificate has "
        f"{peer}; have one added to {allowed.option} there, or show another certificate"
    )


def _behaviour(handler: _Handler) -> Any:
    """What a handler does, of whichever kind it is."""
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _late_reader(handler: _Handler) -> Callable[[Any], Any]:
    """What makes a message of bytes; those of a stream are read when they are asked for anyway."""
    read = handler.request_deserializer
    return (lambda message: message) if handler.request_streaming or read is None else read


def _with_behaviour(handler: _Handler, behaviour: Any) -> _Handler:
    """The same handler, doing something else, to which a single message comes as bytes."""
    made = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    read = handler.request_deserializer if handler.request_streaming else None
    return made(behaviour, request_deserializer=read, response_serializer=handler.response_serializer)
