"""A server's life: ports, health, and an orderly end.

It answers from the moment it is ready. On SIGTERM or SIGINT it says NOT_SERVING, takes nothing new, lets what
is running come to its end for a while, and stops. If the model fails, the process ends with an error, so that
whoever started it can start it again.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection

from unmask.diffusion.batch import Batch
from unmask.fronts.generation import GenerationService
from unmask.fronts.grpc_port import GrpcLimits, GrpcPort, follow_certificates
from unmask.fronts.http_front import HttpFront, HttpLimits
from unmask.fronts.process import asked_to_end, turns
from unmask.ports import taking
from unmask.serving.calls import Calls
from unmask.serving.control import ControlService, Gate
from unmask.serving.engine import Engine
from unmask.serving.model import ServedModel
from unmask.serving.service import ModelsService
from unmask.serving.weights import ServedWeights
from unmask.telemetry import Recorder, metrics
from unmask.telemetry.listener import Listener
from unmask.transport_security import ServerTls
from unmask.v1 import generation_pb2
from unmask.v1.control_pb2_grpc import add_ControlServicer_to_server
from unmask.v1.generation_pb2_grpc import add_GenerationServicer_to_server, add_ModelsServicer_to_server

__all__ = ["Server", "ServerOptions", "serve"]

logger = logging.getLogger(__name__)

SERVICES = tuple(service.full_name for service in generation_pb2.DESCRIPTOR.services_by_name.values())
_CALLS_BEYOND_QUEUE = 128
"""Calls beside those that run or wait: health, model info, and those about to be refused."""
_LOOK_S = 0.5
"""How often it is looked whether all of the model can be had."""
_CONTROL_CALLS = 64
"""At a time, of those who run the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where a server listens and how much it takes."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0 for any free one."""
    metrics_port: int = 9090
    """0 for any free one."""
    http_port: int | None = None
    """Of the OpenAI-style interface; 0 for any free one, ``None`` for none."""
    control_port: int | None = None
    """Of ``unmask.v1.Control``; 0 for any free one, ``None`` for none."""
    control_host: str = "127.0.0.1"
    """Whoever reaches it, and is let in, may end calls and replace the weights."""
    tls: ServerTls | None = None
    """Of the gRPC port: certificates, and who may call; plaintext from anybody if ``None``."""
    control_tls: ServerTls | None = None
    """Of the control port."""
    max_queue_requests: int = 256
    max_queue_tokens: int = 1_000_000
    max_request_s: float = 600.0
    """The most time one call gets."""
    drain_s: float = 30.0
    """How long running calls may go on when the server is asked to end."""
    max_connection_age_s: float | None = None
    """After which a client is asked to connect anew, and may so find servers that came later; for ever if
    ``None``. Calls that run then have ``max_request_s`` to end."""
    max_message_bytes: int = 4 << 20


class Server:
    """One model behind one port, with its metrics behind another. Use from one event loop.

    Args:
        batch: Decodes.
        model: What requests are checked against.
        options: Where to listen, and limits.
        weights: Those that ``batch`` decodes with, if they may be replaced.
        recorder: Takes the metrics, where others write to it as well.
        complete: Whether all of the model can be had, where parts of it are elsewhere.
    """

    def __init__(
        self,
        batch: Batch,
        model: ServedModel,
        options: ServerOptions,
        weights: ServedWeights | None = None,
        recorder: Recorder | None = None,
        complete: Callable[[], bool] = lambda: True,
    ) -> None:
        self._options = options
        self._complete = complete
        self._looking: asyncio.Task[None] | None = None
        self._failed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.recorder = recorder or Recorder()
        self.engine = Engine(
            batch,
            self.recorder,
            max_queue_requests=options.max_queue_requests,
            max_queue_tokens=options.max_queue_tokens,
            on_failure=lambda: self._loop.call_soon_threadsafe(self._failed.set),
        )
        self._health = health.aio.HealthServicer()
        self._gate = Gate(self.engine, self._tell)
        self._grpc = GrpcPort(
            "grpc",
            _limits(options, model.rows + options.max_queue_requests + _CALLS_BEYOND_QUEUE),
            tls=options.tls,
            recorder=self.recorder,
            refused=self._count_refused,
        )
        revision = (lambda: weights.revision) if weights else (lambda: None)
        calls = Calls(
            self.engine, model, self.recorder, max_request_s=options.max_request_s, revision=revision
        )
        server = self._grpc.server
        add_GenerationServicer_to_server(GenerationService(calls), server)
        add_ModelsServicer_to_server(ModelsService(model, self.engine, revision), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._control: GrpcPort | None = None
        if options.control_port is not None:
            self._control = GrpcPort(
                "control",
                _limits(options, _CONTROL_CALLS),
                tls=options.control_tls,
                recorder=self.recorder,
            )
            control = ControlService(calls, self.engine, self._gate, weights)
            add_ControlServicer_to_server(control, self._control.server)
        self._following: asyncio.Task[None] | None = None
        self._metrics: Listener | None = None
        self._http = HttpFront(calls, HttpLimits(body_bytes=options.max_message_bytes))
        self.port = 0
        self.metrics_port = 0
        self.http_port: int | None = None
        self.control_port: int | None = None

    async def start(self) -> None:
        """Bind the ports and answer; ``port`` and the others then say where.

        Raises:
            UsageError: A port cannot be bound.
        """
        host = self._options.host
        self.port = self._grpc.bind(host, self._options.port, option="--port")
        if self._control is not None:
            self.control_port = self._control.bind(
                self._options.control_host, self._options.control_port or 0, option="--control-port"
            )
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
        self.engine.start()
        await self._grpc.server.start()
        if self._control is not None:
            await self._control.server.start()
        self._metrics.start()
        ports = [port for port in (self._grpc, self._control) if port is not None]
        self._following = asyncio.create_task(follow_certificates(ports))
        await self._tell(True)
        self._looking = asyncio.create_task(self._look_for_parts())

    async def stop(self, drain_s: float | None = None) -> None:
        """Take nothing new, give running calls ``drain_s`` seconds (or the options'), and end."""
        await self._health.enter_graceful_shutdown()
        if self._looking is not None:
            self._looking.cancel()
        self._gate.close_for_good()
        grace_s = self._options.drain_s if drain_s is None else drain_s
        await asyncio.gather(self._grpc.server.stop(grace_s), self._http.stop(grace_s))
        await asyncio.to_thread(self.engine.stop)
        if self._control is not None:
            await self._control.server.stop(1)
        if self._following is not None:
            self._following.cancel()
        if self._metrics:
            await asyncio.to_thread(self._metrics.close)

    def _well(self) -> tuple[bool, dict[str, Any]]:
        """Whether new calls are taken, for those who ask over HTTP; ``grpc.health.v1`` says it too."""
        well, content = self._alive()
        if well and not (self._gate.open and self._complete()):
            return False, {"status": "incomplete" if self._gate.open else "draining"}
        return well, {"status": "serving"} if well else content

    def _alive(self) -> tuple[bool, dict[str, Any]]:
        """Whether the process can go on by itself; otherwise to be started again is what mends it."""
        if self._failed.is_set():
            status = "failed"
        else:
            status = "alive" if turns(self._loop) else "stuck"
        return status == "alive", {"status": status}

    async def _look_for_parts(self) -> None:
        """Tell those who watch when a part of the model cannot be had, and when it can again."""
        complete = True
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._complete() != complete:
                complete = not complete
                await self._tell(self._gate.open)

    def _count_refused(self, method: str, code: grpc.StatusCode) -> None:
        """A call that never reached its service counts as any that is refused, where calls are counted."""
        if method.startswith(f"/{SERVICES[0]}/"):
            self.recorder.count(metrics.REQUESTS, code=code.name, finish_reason="")

    async def _tell(self, serving: bool) -> None:
        """Say to those who watch whether new calls are taken.

        A process without a part of the model is alive: it is not mended by being started again.
        """
        complete = self._complete()
        for service in ("", *SERVICES):
            well = serving and (complete or not service)
            status = HealthCheckResponse.SERVING if well else HealthCheckResponse.NOT_SERVING
            await self._health.set(service, status)

    async def failed(self) -> None:
        """Return once the model has failed."""
        await self._failed.wait()


async def serve(
    batch: Batch,
    model: ServedModel,
    options: ServerOptions,
    ready: Callable[[Server], None],
    weights: ServedWeights | None = None,
    recorder: Recorder | None = None,
    complete: Callable[[], bool] = lambda: True,
) -> None:
    """Serve until SIGTERM or SIGINT; ``ready`` is called when the server answers.

    Raises:
        UsageError: A port cannot be bound.
        RuntimeError: The model failed; the log has the traceback.
    """
    server = Server(batch, model, options, weights, recorder, complete)
    asked = asked_to_end()
    await server.start()
    ready(server)
    waits = {asyncio.create_task(asked.wait()), asyncio.create_task(server.failed())}
    _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    logger.info("stopping; running calls have %s s", options.drain_s)
    await server.stop()
    if not asked.is_set():
        raise RuntimeError("the model failed; the log says why")


def _limits(options: ServerOptions, calls: int) -> GrpcLimits:
    return GrpcLimits(
        calls=calls,
        message_bytes=options.max_message_bytes,
        connection_age_s=options.max_connection_age_s,
        grace_s=options.max_request_s,
    )
