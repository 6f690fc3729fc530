"""Requests to an API server, in raw JSON over the official client's connections.

The client brings what is laborious: where the server is, certificates, tokens that are read anew when they
expire, the connection pool. Its typed models are left alone: reading a list through them takes ten times as
long.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlencode

from unmask_operator.decision import JsonObject
from unmask_operator.resources import MANAGER

__all__ = [
    "APPLY",
    "JSON",
    "MERGE",
    "ApiError",
    "KubernetesTransport",
    "Method",
    "Reply",
    "Request",
    "Transport",
    "Unreachable",
    "delete_options",
    "exchange",
    "json_request",
    "pages",
    "refuse",
]

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
JSON = "application/json"
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"  # JSON is YAML
_PAGE = 500
"""Objects in a page of a list."""


class ApiError(Exception):
    """The API server said no."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        """HTTP status, or the code of an error inside a watch."""
        self.reason = reason
        """Kubernetes' word for it, such as ``AlreadyExists``; may be empty."""
        self.message = message
        """The server's sentence."""
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""


class Unreachable(Exception):
    """No answer: the request may or may not have been carried out."""


@dataclass(frozen=True)
class Request:
    """One HTTP request."""

    method: Method
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    content_type: str = JSON
    timeout: float = 10.0
    """Seconds without a byte after which it counts as unanswered."""
    accept: str = JSON
    """Media type of the answer."""


@dataclass(frozen=True)
class Reply:
    """The answer to one: ``headers`` in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport(Protocol):
    """Carries requests; raises :class:`Unreachable` where there is no whole answer."""

    def send(self, request: Request) -> Reply:
        """Return the answer."""

    def stream(self, request: Request) -> AbstractContextManager[tuple[Reply, Iterator[bytes]]]:
        """Return the head of an answer (its body only where it is an error) and its lines as they come."""


class KubernetesTransport:
    """The official client's connections."""

    def __init__(self, client: Any, agent: str = MANAGER) -> None:
        """Take a ``kubernetes.client.ApiClient``, configured, and what the server's log should say of us."""
        self._client = client
        self._agent = agent
        self._pool = client.rest_client.pool_manager

    def send(self, request: Request) -> Reply:
        """Return the answer, whatever its status."""
        response = self._open(request, preload=True)
        return Reply(response.status, {k.lower(): v for k, v in response.headers.items()}, response.data)

    @contextmanager
    def stream(self, request: Request) -> Iterator[tuple[Reply, Iterator[bytes]]]:
        """Yield the head of an answer and its lines; the connection is closed at the end."""
        response = self._open(request, preload=False)
        try:
            body = response.data if response.status >= 400 else b""
            headers = {k.lower(): v for k, v in response.headers.items()}
            yield Reply(response.status, headers, body), _lines(response)
        finally:
            response.close()

    def _open(self, request: Request, *, preload: bool) -> Any:
        import urllib3

        configuration = self._client.configuration
        headers = {"Accept": request.accept, "User-Agent": self._agent}
        if request.body is not None:
            headers["Content-Type"] = request.content_type
        # Asked for each time: tokens on disk are replaced about every hour.
        if (token := configuration.auth_settings().get("BearerToken")) and token["value"]:
            headers["Authorization"] = token["value"]
        query = f"?{urlencode(request.query)}" if request.query else ""
        try:
            return self._pool.request(
                request.method,
                configuration.host + request.path + query,
                body=request.body,
                headers=headers,
                timeout=urllib3.Timeout(connect=min(5.0, request.timeout), read=request.timeout),
                preload_content=preload,
                retries=False,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(f"{request.method} {request.path}: {error}") from error


def json_request(
    method: Method,
    path: str,
    query: Mapping[str, str] | None = None,
    body: JsonObject | None = None,
    content_type: str = JSON,
    *,
    timeout: float = 10.0,
) -> Request:
    """Return a request whose body, if it has one, is JSON."""
    data = None if body is None else json.dumps(body).encode()
    return Request(method, path, dict(query or {}), data, content_type, timeout)


def exchange(transport: Transport, request: Request) -> JsonObject:
    """Send a request once, and return the object that answers it.

    Raises:
        ApiError: the server refuses.
        Unreachable: there is no answer, or none that is JSON.
    """
    reply = transport.send(request)
    refuse(reply)
    try:
        answer: JsonObject = json.loads(reply.body)
    except ValueError as error:
        raise Unreachable(f"{request.method} {request.path}: the answer is no JSON") from error
    return answer


def pages(ask: Callable[[Mapping[str, str]], JsonObject], query: Mapping[str, str]) -> Iterator[JsonObject]:
    """Yield the pages of a list, which ``ask`` returns for a query."""
    query = {"limit": str(_PAGE), **query}
    while True:
        page = ask(query)
        yield page
        if not (following := page["metadata"].get("continue")):
            return
        query = {**query, "continue": following}


def delete_options(uid: str, propagation: str, *, version: str | None = None) -> JsonObject:
    """Return the body of a request that deletes an object if it still has this UID and version."""
    return {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "preconditions": {"uid": uid} | ({"resourceVersion": version} if version else {}),
        "propagationPolicy": propagation,
    }


def refuse(reply: Reply) -> None:
    """Raise :class:`ApiError` where an answer is an error."""
    if reply.status < 400:
        return
    try:
        status = json.loads(reply.body)
    except ValueError:
        status = {}
    if not isinstance(status, dict):
        status = {}
    after = reply.headers.get("retry-after", "")
    message = status.get("message") or reply.body[:200].decode(errors="replace")
    # A date is allowed by HTTP and never sent by an API server.
    raise ApiError(reply.status, status.get("reason", ""), message, float(after) if after.isdigit() else None)


def _lines(response: Any) -> Iterator[bytes]:
    """Yield what comes line by line, without line breaks; the last one may be incomplete."""
    import urllib3

    rest = b""
    try:
        # Watches come in chunks, one event or a few in each.
        for piece in response.stream(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise Unreachable(f"a stream was cut: {error}") from error
    if rest:
        yield rest
