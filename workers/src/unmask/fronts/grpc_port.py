"""One gRPC port: its limits, its certificates, and who may call."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from unmask.fronts.unreadable import UnreadableRefused
from unmask.ports import taking
from unmask.telemetry import Recorder, metrics
from unmask.transport_security import AsyncPeersAllowed, ServerCertificates, ServerTls

__all__ = ["GrpcLimits", "GrpcPort", "follow_certificates"]

_READ_S = 10.0
"""How often the files of certificates are read. Each new connection has them read as well: this is for the
metrics and the log of a server that nobody connects to."""
_PENDING_CALLS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcLimits:
    """What clients may take up."""

    calls: int
    """At a time."""
    message_bytes: int
    connection_age_s: float | None
    """After which a client is asked to connect anew; never if None."""
    grace_s: float
    """That its calls have then."""


class GrpcPort:
    """A gRPC server on one port.

    Args:
        name: Of the port, in metrics.
        limits: What clients may take up.
        tls: Certificates, and who may call; plaintext from anybody if None.
        recorder: Is told of certificates.
        refused: Called with method and status of each call that is refused before it reaches its service.

    Raises:
        UsageError: The certificates cannot be used.
    """

    def __init__(
        self,
        name: str,
        limits: GrpcLimits,
        *,
        tls: ServerTls | None,
        recorder: Recorder,
        refused: Callable[[str, grpc.StatusCode], object] = lambda method, code: None,
    ) -> None:
        interceptors: list[grpc.aio.ServerInterceptor] = [
            UnreadableRefused(lambda method: refused(method, grpc.StatusCode.INVALID_ARGUMENT))
        ]
        self._certificates: ServerCertificates | None = None
        if tls is not None:
            self._certificates = ServerCertificates(
                tls,
                in_force=lambda expires_s: recorder.gauge(
                    metrics.TLS_CERTIFICATE_EXPIRY, expires_s, port=name
                ),
                failed=lambda message: recorder.count(metrics.TLS_RELOAD_FAILURES, port=name),
            )
            if allowed := tls.allowed_names():
                denied = grpc.StatusCode.PERMISSION_DENIED
                interceptors.insert(0, AsyncPeersAllowed(allowed, lambda method: refused(method, denied)))
        self.server = grpc.aio.server(
            interceptors=interceptors,
            maximum_concurrent_rpcs=limits.calls,
            options=_options(limits),
        )

    @property
    def secured(self) -> bool:
        """Whether it speaks TLS."""
        return self._certificates is not None

    def bind(self, host: str, port: int, *, option: str) -> int:
        """Take ``port``, or any if it is 0; returns the one that the server will listen on.

        Raises:
            UsageError: It is taken; ``option`` names it.
        """
        with taking(option, host, port) as address:
            if self._certificates is None:
                return self.server.add_insecure_port(address)
            return self.server.add_secure_port(address, self._certificates.server_credentials())

    def look(self) -> None:
        """See whether there are other certificates; blocks for as long as the files take."""
        if self._certificates is not None:
            self._certificates.look()


async def follow_certificates(ports: Sequence[GrpcPort]) -> None:
    """Look for other certificates of these ports, for ever."""
    secured = [port for port in ports if port.secured]
    while secured:
        await asyncio.sleep(_READ_S)
        for port in secured:
            await asyncio.to_thread(port.look)


def _options(limits: GrpcLimits) -> list[tuple[str, int]]:
    # gRPC ends some calls as CANCELLED where more than so many wait to be looked at, by default a thousand: a
    # crowd that comes at once. What is too much, is to be refused as that.
    pending = max(_PENDING_CALLS, 2 * limits.calls)
    options = [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", limits.message_bytes),
        ("grpc.so_reuseport", 0),  # two servers on one port would share its calls in silence
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # how often clients may ping
        ("grpc.server.max_pending_requests", pending),
        ("grpc.server.max_pending_requests_hard_limit", pending),
    ]
    if limits.connection_age_s is not None:
        options += [
            ("grpc.max_connection_age_ms", math.ceil(limits.connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", math.ceil(limits.grace_s * 1000)),
        ]
    return options
