"""Gateways in the test's own process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support.serving import RunningServer, wait_until
from unmask.gateway.addresses import Target, look_up
from unmask.gateway.pool import LookUp, PoolOptions
from unmask.gateway.relay import RelayOptions
from unmask.gateway.server import Gateway, GatewayOptions
from unmask.telemetry import Recorder, metrics

__all__ = ["RunningGateway", "running_gateway"]


class RunningGateway:
    """A gateway on an event loop of its own thread."""

    def __init__(self, gateway: Gateway, loop: asyncio.AbstractEventLoop) -> None:
        self.gateway = gateway
        self._loop = loop

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    @property
    def health_url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.metrics_port}/healthz"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.http_port}/v1"

    @property
    def recorder(self) -> Recorder:
        return self.gateway.recorder

    def has(self, state: str) -> int:
        """How many replicas are in this state."""
        return int(self.recorder.value(metrics.GATEWAY_REPLICAS, state=state))

    def attempts(self, why: str) -> int:
        return int(self.recorder.value(metrics.GATEWAY_ATTEMPTS, why=why))

    def tasks(self) -> int:
        """Tasks that its loop has, but the one that counts them."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result(30)

    def stop(self, drain_s: float) -> None:
        """Stop it as SIGTERM would, and wait until it has."""
        asyncio.run_coroutine_threadsafe(self.gateway.stop(drain_s), self._loop).result(60)


@contextmanager
def running_gateway(
    *replicas: RunningServer | str,
    ready: int | None = None,
    relay: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
    looking: LookUp = look_up,
    **options: Any,
) -> Iterator[RunningGateway]:
    """A gateway before these until the block is left, once ``ready`` of them (or all) take calls."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-gateway")
    thread.start()
    targets = [
        Target.reading(replica if isinstance(replica, str) else replica.address) for replica in replicas
    ]

    async def start() -> Gateway:
        wanted = GatewayOptions(
            port=0,
            metrics_port=0,
            relay=RelayOptions(**(relay or {})),
            pool=PoolOptions(**(pool or {})),
            **options,
        )
        gateway = Gateway(targets, wanted, looking=looking)
        await gateway.start()
        return gateway

    try:
        running = RunningGateway(asyncio.run_coroutine_threadsafe(start(), loop).result(30), loop)
        try:
            wait_until(lambda: running.has("ready") == (len(replicas) if ready is None else ready))
            yield running
        finally:
            running.stop(0)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
