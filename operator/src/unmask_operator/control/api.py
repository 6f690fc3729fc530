"""What the operator asks of the API server, over :mod:`unmask_operator.transport`."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping

from unmask_operator.control.clock import Clock
from unmask_operator.control.workqueue import TokenBucket
from unmask_operator.decision import JsonObject
from unmask_operator.resources import MANAGER, Resource
from unmask_operator.transport import (
    APPLY,
    JSON,
    MERGE,
    ApiError,
    KubernetesTransport,
    Method,
    Reply,
    Request,
    Transport,
    Unreachable,
    delete_options,
    exchange,
    json_request,
    pages,
    refuse,
)

__all__ = ["Api", "ApiError", "Fenced", "KubernetesTransport", "Reply", "Request", "Transport", "Unreachable"]

_WRITES = {"POST", "PUT", "PATCH", "DELETE"}


class Fenced(Exception):
    """A write was not sent, because this process may no longer be the leader."""


class Api:
    """What the operator asks of the API server; every write passes the fence first."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        *,
        bucket: TokenBucket | None = None,
        fence: Callable[[], None] | None = None,
        timeout: float = 10.0,
        stop: threading.Event | None = None,
    ) -> None:
        """Make one.

        Args:
            transport: carries the requests.
            clock: by which ``bucket`` is waited for.
            bucket: how many requests a second, watches aside; without one, any number.
            fence: called right before a write is sent; raises :class:`Fenced` where it must not be.
            timeout: seconds to wait for an answer.
            stop: ends waiting for the bucket.
        """
        self._transport = transport
        self._clock = clock
        self._bucket = bucket
        self._fence = fence
        self._timeout = timeout
        self._stop = stop or threading.Event()

    def get(self, resource: Resource, namespace: str | None, name: str) -> JsonObject:
        """Return an object as it is now."""
        return self._json("GET", resource.path(namespace, name))

    def list(
        self, resource: Resource, namespace: str | None, selector: str = "", fields: str = ""
    ) -> tuple[list[JsonObject], str]:
        """Return all objects, read in pages, and the resource version they had together.

        Args:
            resource: the kind.
            namespace: where they are; ``None``: everywhere.
            selector: labels that they have.
            fields: fields that they have, where the kind can be selected by them.

        Raises:
            ApiError: among others 410, where the pages took so long that the rest is gone.
        """
        items: list[JsonObject] = []
        version = ""
        for page in pages(
            lambda query: self._json("GET", resource.path(namespace), query), _selection(selector, fields)
        ):
            items += page.get("items") or ()
            version = page["metadata"]["resourceVersion"]
        return items, version

    def watch(
        self,
        resource: Resource,
        namespace: str | None,
        selector: str,
        version: str,
        seconds: int,
        idle: float,
        fields: str = "",
    ) -> Iterator[JsonObject]:
        """Yield watch events after ``version``, for ``seconds`` at most.

        Raises:
            ApiError: the server refuses, before or within the stream (410: the version is too old).
            Unreachable: the stream broke, or nothing came for ``idle`` seconds; bookmarks come once a minute.
        """
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        } | _selection(selector, fields)
        request = Request("GET", resource.path(namespace), query, timeout=idle)
        with self._transport.stream(request) as (head, lines):
            refuse(head)
            for line in lines:
                if not line.strip():
                    continue
                try:
                    event = json.loads(line)
                except ValueError as error:
                    raise Unreachable(f"a watch sent what is no JSON: {line[:80]!r}") from error
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise ApiError(
                        status.get("code", 500), status.get("reason", ""), status.get("message", "")
                    )
                yield event

    def create(self, resource: Resource, namespace: str | None, body: JsonObject) -> JsonObject:
        """Make an object that must not be there yet, and return it."""
        return self._json("POST", resource.path(namespace), {"fieldManager": MANAGER}, body)

    def replace(self, resource: Resource, body: JsonObject) -> JsonObject:
        """Write a whole object, at the resource version in it, and return it."""
        where = body["metadata"]
        path = resource.path(where["namespace"], where["name"])
        return self._json("PUT", path, {"fieldManager": MANAGER}, body)

    def apply(self, resource: Resource, body: JsonObject, subresource: str | None = None) -> JsonObject:
        """Set the fields in ``body`` and drop those we set before and left out now; return the object.

        The UID and the resource version in the body are preconditions, so a late request changes nothing.
        """
        where = body["metadata"]
        path = resource.path(where["namespace"], where["name"], subresource)
        return self._json("PATCH", path, {"fieldManager": MANAGER, "force": "true"}, body, APPLY)

    def merge(self, resource: Resource, namespace: str | None, name: str, patch: JsonObject) -> JsonObject:
        """Change some fields (RFC 7386) and return the object."""
        return self._json("PATCH", resource.path(namespace, name), {"fieldManager": MANAGER}, patch, MERGE)

    def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        uid: str,
        version: str | None,
        propagation: str,
    ) -> JsonObject:
        """Delete an object if it still has this UID and version; return it or the server's word."""
        body = delete_options(uid, propagation, version=version)
        return self._json("DELETE", resource.path(namespace, name), {}, body)

    def served(self) -> frozenset[str]:
        """Return the group/version of every API that the cluster serves."""
        groups = self._json("GET", "/apis").get("groups") or ()
        return frozenset(version["groupVersion"] for group in groups for version in group["versions"])

    def _json(
        self,
        method: Method,
        path: str,
        query: Mapping[str, str] | None = None,
        body: JsonObject | None = None,
        content_type: str = JSON,
    ) -> JsonObject:
        if self._bucket is not None:
            self._clock.wait(self._bucket.reserve(), self._stop)
        request = json_request(method, path, query, body, content_type, timeout=self._timeout)
        if method in _WRITES and self._fence is not None:
            self._fence()  # nothing may come between this and the sending
        return exchange(self._transport, request)


def _selection(selector: str, fields: str) -> dict[str, str]:
    """Return the part of a query that says which objects of a kind are meant."""
    query = {"labelSelector": selector, "fieldSelector": fields}
    return {key: value for key, value in query.items() if value}
