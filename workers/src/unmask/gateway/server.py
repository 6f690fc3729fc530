"""A gateway's life: ports, health, and an orderly end.

It answers at once, and says NOT_SERVING while no replica takes calls. On SIGTERM or SIGINT it takes nothing
new, lets what is running come to its end for a while, and stops.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc.aio import ServicerContext
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection

from unmask.fronts.generation import GenerationService
from unmask.fronts.grpc_port import GrpcLimits, GrpcPort, follow_certificates
from unmask.fronts.http_front import HttpFront, HttpLimits
from unmask.fronts.process import asked_to_end, turns
from unmask.fronts.refusals import Refused
from unmask.gateway.addresses import Target, look_up
from unmask.gateway.pool import LookUp, Pool, PoolOptions
from unmask.gateway.relay import Relay, RelayOptions
from unmask.ports import taking
from unmask.telemetry import Recorder, metrics
from unmask.telemetry.listener import Listener
from unmask.transport_security import ServerTls
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import (
    ModelsServicer,
    add_GenerationServicer_to_server,
    add_ModelsServicer_to_server,
)

__all__ = ["Gateway", "GatewayOptions", "run"]

logger = logging.getLogger(__name__)

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
_CALLS_BESIDE = 128
"""Beside those of Generation: health, model info, and those about to be refused."""
_ROOM_FOR_COMMITTED = 256 << 10
"""Bytes by which requests are smaller than a server's may be: for the tokens that are sent along when a call
goes on elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """Where a gateway listens, and how much it takes."""

    host: str = "127.0.0.1"
    port: int = 50050
    """0 for any free one."""
    metrics_port: int = 9092
    """0 for any free one."""
    http_port: int | None = None
    """Of the OpenAI-style interface; 0 for any free one, ``None`` for none."""
    tls: ServerTls | None = None
    """Of the gRPC port: certificates, and who may call; plaintext from anybody if ``None``."""
    drain_s: float = 30.0
    """How long running calls may go on when the gateway is asked to end."""
    max_connection_age_s: float | None = None
    """After which a client is asked to connect anew; never if ``None``."""
    max_message_bytes: int = (4 << 20) - _ROOM_FOR_COMMITTED
    relay: RelayOptions = RelayOptions()
    pool: PoolOptions = PoolOptions()


class Gateway:
    """A front for several servers. Use from one event loop.

    Args:
        targets: Where the servers are.
        options: Where to listen, and limits.
        looking: Resolves a name.

    Raises:
        UsageError: The files of certificates cannot be used.
    """

    def __init__(
        self, targets: Sequence[Target], options: GatewayOptions, *, looking: LookUp = look_up
    ) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self.recorder = Recorder((*metrics.GATEWAY, *metrics.TLS))
        self._ready = asyncio.Event()
        self.pool = Pool(targets, self.recorder, options.pool, changed=self._ready.set, looking=looking)
        self.relay = Relay(self.pool, self.recorder, options.relay)
        self._health = health.aio.HealthServicer()
        limits = GrpcLimits(
            calls=options.relay.max_calls + _CALLS_BESIDE,
            message_bytes=options.max_message_bytes,
            connection_age_s=options.max_connection_age_s,
            grace_s=options.relay.max_request_s,
        )
        self._grpc = GrpcPort(
            "grpc", limits, tls=options.tls, recorder=self.recorder, refused=self._count_refused
        )
        server = self._grpc.server
        add_GenerationServicer_to_server(GenerationService(self.relay), server)
        add_ModelsServicer_to_server(_Models(self.pool, self.relay), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._http = HttpFront(self.relay, HttpLimits(body_bytes=options.max_message_bytes))
        self._metrics: Listener | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        self.port = 0
        self.metrics_port = 0
        self.http_port: int | None = None

    async def start(self) -> None:
        """Bind the ports and answer; ``port`` and the others then say where.

        Raises:
            UsageError: A port cannot be bound.
        """
        host = self._options.host
        self.port = self._grpc.bind(host, self._options.port, option="--port")
        with taking("--metrics-port", host, self._options.metrics_port):
            self._metrics = Listener(
                host, self._options.metrics_port, self.recorder.registry, self._well, self._alive
            )
        self.metrics_port = self._metrics.port
        if self._options.http_port is not None:
            with taking("--http-port", host, self._options.http_port):
                await self._http.start(host, self._options.http_port)
            self.http_port = self._http.port
            if self._options.tls is not None:
                logger.warning(
                    "--http-port: HTTP is neither encrypted nor asks who calls, whatever --tls says"
                )
        await self._tell()
        await self._grpc.server.start()
        self._metrics.start()
        self._tasks = [
            asyncio.create_task(follow_certificates([self._grpc])),
            asyncio.create_task(self._tell_changes()),
        ]
        await self.pool.start()

    async def stop(self, drain_s: float | None = None) -> None:
        """Take nothing new, give running calls ``drain_s`` seconds (or the options'), and end."""
        self._draining = True
        await self._health.enter_graceful_shutdown()
        grace_s = self._options.drain_s if drain_s is None else drain_s
        await asyncio.gather(self._grpc.server.stop(grace_s), self._http.stop(grace_s))
        for task in self._tasks:
            task.cancel()
        await self.pool.stop()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)

    def _well(self) -> tuple[bool, dict[str, Any]]:
        """Whether calls come to something, for those who ask over HTTP; ``grpc.health.v1`` says it too."""
        well, content = self._alive()
        if well and not (self.pool.ready and not self._draining):
            return False, {"status": "draining" if self._draining else "no replica"}
        return well, {"status": "serving"} if well else content

    def _alive(self) -> tuple[bool, dict[str, Any]]:
        """Whether the process can go on by itself; otherwise to be started again is what mends it."""
        alive = turns(self._loop)
        return alive, {"status": "alive" if alive else "stuck"}

    async def _tell_changes(self) -> None:
        while True:
            await self._ready.wait()
            self._ready.clear()
            await self._tell()

    async def _tell(self) -> None:
        """Say to those who watch whether calls come to something; the process is well in any case."""
        for service in ("", *SERVICES):
            well = self.pool.ready or not service
            status = HealthCheckResponse.SERVING if well else HealthCheckResponse.NOT_SERVING
            await self._health.set(service, status)

    def _count_refused(self, method: str, code: grpc.StatusCode) -> None:
        """A call that never reached its service counts as any that is refused, where calls are counted."""
        if method.startswith(f"/{SERVICES[0]}/"):
            self.recorder.count(metrics.GATEWAY_REQUESTS, code=code.name, finish_reason="")


class _Models(ModelsServicer):
    """``unmask.v1.Models`` of all replicas together."""

    def __init__(self, pool: Pool, relay: Relay) -> None:
        self._pool, self._relay = pool, relay

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetModelInfoResponse:
        """What a replica says, with the rows of all that take calls."""
        info = pb.GetModelInfoResponse()
        try:
            info.CopyFrom(self._relay.model())
        except Refused as refused:
            await context.abort_with_status(refused.status())
        serving = [replica.info for replica in self._pool.replicas if replica.serving and replica.info]
        if serving:
            info.max_running_requests = sum(each.max_running_requests for each in serving)
        return info

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetLoadResponse:
        """What the replicas said when they were asked last."""
        loads = [replica.load for replica in self._pool.replicas if replica.serving]
        return pb.GetLoadResponse(
            running=sum(load.running for load in loads), waiting=sum(load.waiting for load in loads)
        )


async def run(targets: Sequence[Target], options: GatewayOptions, ready: Callable[[Gateway], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``ready`` is called when the gateway answers.

    Raises:
        UsageError: A port cannot be bound, or the files of certificates cannot be used.
    """
    asked = asked_to_end()
    gateway = Gateway(targets, options)
    await gateway.start()
    ready(gateway)
    await asked.wait()
    logger.info("stopping; running calls have %s s", options.drain_s)
    await gateway.stop()
