"""``/healthz``, ``/readyz`` and ``/metrics`` over HTTP, for the kubelet and Prometheus."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["HealthServer"]

_AT_ONCE = 16
_SECONDS = 5.0


class HealthServer(ThreadingHTTPServer):
    """Answers a few short requests at a time; one too many, or a slow one, is closed."""

    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        *,
        alive: Callable[[], str],
        ready: Callable[[], str],
        metrics: Callable[[], bytes],
    ) -> None:
        """Listen, on any free port where it is 0.

        Args:
            host: address to listen at.
            port: port to listen at.
            alive: returns what is wrong for good, or nothing: the kubelet restarts the operator.
            ready: returns what is missing, or nothing.
            metrics: returns the exposition.
        """
        self.alive = alive
        self.ready = ready
        self.metrics = metrics
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__((host, port), _Handler)

    def start(self) -> None:
        """Answer in a thread until :meth:`shutdown`."""
        threading.Thread(name="health", target=self.serve_forever, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if fewer than 16 are being answered."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    server: HealthServer
    timeout = _SECONDS
    server_version = "unmask-operator"
    sys_version = ""

    def do_GET(self) -> None:
        checks = {"/healthz": self.server.alive, "/readyz": self.server.ready}
        if self.path == "/metrics":
            self._answer(HTTPStatus.OK, self.server.metrics(), "text/plain; version=0.0.4; charset=utf-8")
        elif self.path in checks:
            wrong = checks[self.path]()
            status = HTTPStatus.SERVICE_UNAVAILABLE if wrong else HTTPStatus.OK
            self._answer(status, f"{wrong or 'ok'}\n".encode(), "text/plain; charset=utf-8")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there are /healthz, /readyz and /metrics\n", "text/plain")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Keep probes out of the log."""

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
