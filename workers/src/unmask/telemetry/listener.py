"""A small HTTP listener for a process that works: ``/metrics``, and ``/healthz`` and ``/livez`` for probes.

It must never be in the way of the work: few connections at a time, short requests, short timeouts, GET
and HEAD alone. Anything beyond that is refused at once.
"""

import json
import socketserver
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6, socket
from types import TracebackType
from typing import Any, ClassVar, Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

__all__ = ["Health", "Listener"]

Health = Callable[[], tuple[bool, Mapping[str, Any]]]
"""Whether the process is well, and what there is to say of it."""

_CONNECTIONS = 8
_TIMEOUT_S = 5.0
"""For a request to arrive, and for its answer to be taken."""


class Listener:
    """A context in which the listener answers, from threads of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        health: Health,
        alive: Health | None = None,
    ) -> None:
        """Bind the port; 0 takes any. A host with a colon is an IPv6 address.

        ``/healthz`` says ``health``, and ``/livez`` says ``alive``: whether the process, well or not, can go
        on by itself. They are the same where ``alive`` is not given.

        Raises:
            OSError: It is taken.
        """
        self._server = _Server((host, port), registry, health, alive or health)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Answer until :meth:`close`."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering, and give the port back."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(
        self, address: tuple[str, int], registry: CollectorRegistry, health: Health, alive: Health
    ) -> None:
        self.registry, self.health, self.alive = registry, health, alive
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, without asking DNS for this host's name: in a pod that may ask no one, that takes minutes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout: ClassVar[float] = _TIMEOUT_S
    server_version = "unmask"
    sys_version = ""

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self.server.registry))
            case "/healthz":
                self._say(*self.server.health())
            case "/livez":
                self._say(*self.server.alive())
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /healthz or /livez\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _say(self, well: bool, content: Mapping[str, Any]) -> None:
        status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, "application/json", json.dumps(content).encode() + b"\n")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *values: object) -> None:
        """Requests are not logged."""
