"""A shard's life: its ports, placements, health, metrics, and an orderly end; and sessions over gRPC.

Frames are answered by threads, one for each session: a synchronous stream is as fast as an asynchronous one
and its latency steadier, and what a frame waits for is arithmetic that holds no lock of Python's.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from unmask.errors import UnmaskError, UsageError
from unmask.experts.answering import MOST_CHOICES, Answering
from unmask.experts.holding import Holding
from unmask.experts.sessions import Refused, Sessions
from unmask.experts.socket_port import SocketPort
from unmask.ports import taking
from unmask.telemetry import Recorder, metrics
from unmask.telemetry.listener import Listener
from unmask.transport_security import PeersAllowed, ServerCertificates, ServerTls
from unmask.v1 import experts_pb2 as pb

__all__ = ["SERVICE", "Shard", "ShardOptions", "most_frame_bytes"]

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["ExpertShard"].full_name
_OTHER_CALLS = 16
"""At a time, beside sessions: health, descriptions, loads."""
_ALLOWANCE = 1 << 16
"""Bytes of a message beside its numbers."""
_MOST_PROBE_BYTES = 16 << 20
_READ_S = 10.0
"""How often the files of certificates are read, besides for each connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOptions:
    """Where a shard listens and how much it takes."""

    host: str = "127.0.0.1"
    port: int = 50061
    """0 for any free one."""
    metrics_port: int = 9091
    """0 for any free one."""
    name: str = "shard"
    max_tokens: int = 4096
    """Most rows in one frame."""
    max_sessions: int = 32
    """Engines at a time, one session each."""
    drain_s: float = 5.0
    """How long sessions have to notice that the shard is about to end."""
    tls: ServerTls | None = None
    """Certificates, and who may call; plaintext from anybody if ``None``."""
    socket: Path | None = None
    """Where engines on the same machine connect, to share memory."""


def most_frame_bytes(hidden_size: int, max_tokens: int) -> int:
    """The largest message of a session of float32 rows."""
    return max_tokens * (hidden_size * 4 + MOST_CHOICES * 6) + _ALLOWANCE


class Shard:
    """The experts of one process, behind a port.

    Attributes:
        holding: The experts.
        sessions: What engines get, whichever way they come.
        largest: The most bytes of a message.
        port: Of gRPC, once it has started.
        metrics_port: Likewise.
    """

    def __init__(
        self, holding: Holding, options: ShardOptions, *, answering: type[Answering] = Answering
    ) -> None:
        """``answering`` is what takes frames, for measurements of everything but that.

        Raises:
            UsageError: The certificates cannot be used.
        """
        self.recorder = Recorder((*metrics.SHARD, *metrics.TLS))
        self._certificates: ServerCertificates | None = None
        interceptors: list[grpc.ServerInterceptor] = []
        if options.tls is not None:
            self._certificates = ServerCertificates(
                options.tls,
                in_force=lambda expires_s: self.recorder.gauge(
                    metrics.TLS_CERTIFICATE_EXPIRY, expires_s, port="shard"
                ),
                failed=lambda message: self.recorder.count(metrics.TLS_RELOAD_FAILURES, port="shard"),
            )
            if allowed := options.tls.allowed_names():
                interceptors.append(PeersAllowed(allowed))
        self._stopped = threading.Event()
        self.holding = holding
        self._options = options
        self._answering = answering(holding, self.recorder, max_tokens=options.max_tokens)
        self._health = health.HealthServicer()
        self.largest = largest = max(
            most_frame_bytes(holding.shape.hidden_size, options.max_tokens), _MOST_PROBE_BYTES
        )
        calls = options.max_sessions + _OTHER_CALLS
        self._grpc = grpc.server(
            ThreadPoolExecutor(calls, thread_name_prefix="unmask-session"),
            interceptors=interceptors,
            maximum_concurrent_rpcs=calls,
            options=[
                ("grpc.max_receive_message_length", largest),
                ("grpc.max_send_message_length", largest),
                ("grpc.max_concurrent_streams", calls),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Engines ping once a second to see a frozen shard; that is no attack here.
                ("grpc.http2.min_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        self.sessions = Sessions(
            holding,
            self._answering,
            name=options.name,
            max_sessions=options.max_sessions,
            max_tokens=options.max_tokens,
        )
        service = _Service(holding, self.sessions, self.recorder)
        self._grpc.add_generic_rpc_handlers((_handlers(service),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        self._socket = (
            None
            if options.socket is None
            else SocketPort(options.socket, self.sessions, max_bytes=largest, max_connections=2 * calls)
        )
        self._metrics: Listener | None = None
        self.port = 0
        self.metrics_port = 0

    def start(self) -> None:
        """Bind the ports and answer; ``port`` and ``metrics_port`` then say where.

        Raises:
            UsageError: A port or the socket cannot be bound.
        """
        options = self._options
        if self._socket:
            self._socket.bind()
        with taking("--port", options.host, options.port) as address:
            if self._certificates is None:
                self.port = self._grpc.add_insecure_port(address)
            else:
                self.port = self._grpc.add_secure_port(address, self._certificates.server_credentials())
        with taking("--metrics-port", options.host, options.metrics_port):
            self._metrics = Listener(options.host, options.metrics_port, self.recorder.registry, self._well)
        self.metrics_port = self._metrics.port
        self.recorder.gauge(metrics.SHARD_WEIGHT_BYTES, self.holding.nbytes)
        if self._socket:
            self._socket.start()
        self._grpc.start()
        self._metrics.start()
        if self._certificates is not None:
            threading.Thread(target=self._follow, args=(self._certificates,), daemon=True).start()
        for service in ("", SERVICE):
            self._health.set(service, HealthCheckResponse.SERVING)

    def drain(self) -> None:
        """Refuse what is new, so that engines go to another shard."""
        self._health.enter_graceful_shutdown()
        self._answering.draining = True

    def stop(self, grace_s: float | None = None) -> None:
        """Refuse frames, end the sessions once engines have left them, and stop."""
        self.drain()
        self._stopped.set()
        grace_s = self._options.drain_s if grace_s is None else grace_s
        ended = self._grpc.stop(grace_s)
        if self._socket:
            self._socket.stop(grace_s)
        ended.wait()
        if self._metrics:
            self._metrics.close()

    def _follow(self, certificates: ServerCertificates) -> None:
        while not self._stopped.wait(_READ_S):
            certificates.look()

    def _well(self) -> tuple[bool, dict[str, Any]]:
        draining = self._answering.draining
        return not draining, {"status": "draining" if draining else "serving"}


class _Service:
    def __init__(self, holding: Holding, sessions: Sessions, recorder: Recorder) -> None:
        self._holding = holding
        self._sessions = sessions
        self._recorder = recorder

    def describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        return self._sessions.description()

    def load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> pb.LoadResponse:
        placement = request.placement
        try:
            self._holding.load(placement.epoch, placement.bounds, placement.parts)
        except UsageError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except (UnmaskError, OSError) as error:
            logger.error("a placement could not be loaded: %s", error)
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "the weights cannot be read; the shard's log says why"
            )
        return pb.LoadResponse(description=self._changed())

    def unload(self, request: pb.UnloadRequest, context: grpc.ServicerContext) -> pb.UnloadResponse:
        self._holding.unload(request.epochs)
        return pb.UnloadResponse(description=self._changed())

    def _changed(self) -> pb.DescribeResponse:
        self._recorder.gauge(metrics.SHARD_WEIGHT_BYTES, self._holding.nbytes)
        return self._sessions.description()

    def probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        if request.answer_bytes > _MOST_PROBE_BYTES:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"answer_bytes: got {request.answer_bytes}, at most {_MOST_PROBE_BYTES}",
            )
        return pb.ProbeResponse(payload=bytes(request.answer_bytes))

    def session(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The frames of one engine, unparsed: as many answers as there are frames, in their order."""
        try:
            with self._sessions.counted() as seen:
                yield self._sessions.accepted(next(messages, b""))
                for message in messages:
                    yield bytes(self._sessions.answer(message, seen))  # which it is, so this copies nothing
        except Refused as refused:
            context.abort(refused.code, str(refused))


def _handlers(service: _Service) -> grpc.GenericRpcHandler:
    """The methods of the service.

    Written out, since the generated code would parse every message of a session, which copies its rows; and
    would call bytes that cannot be parsed a defect of the shard's.
    """
    unary: dict[str, tuple[Callable[[Any, grpc.ServicerContext], Message], type[Message]]] = {
        "Describe": (service.describe, pb.DescribeRequest),
        "Load": (service.load, pb.LoadRequest),
        "Unload": (service.unload, pb.UnloadRequest),
        "Probe": (service.probe, pb.ProbeRequest),
    }
    handlers = {name: _unary(method, request) for name, (method, request) in unary.items()}
    handlers["Session"] = grpc.stream_stream_rpc_method_handler(service.session)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _unary(
    method: Callable[[Any, grpc.ServicerContext], Message], kind: type[Message]
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    def call(message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            request = kind.FromString(message)
        except DecodeError:
            _refuse(context, f"the message is no {kind.DESCRIPTOR.name}")
        return method(request, context).SerializeToString()

    return grpc.unary_unary_rpc_method_handler(call)


def _refuse(context: grpc.ServicerContext, message: str) -> NoReturn:
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
    raise AssertionError("abort raises")
