"""Where the cluster is and who asks, and requests that are tried again while that can help."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from unmask_operator.client.errors import NoCluster, conflicting, explained
from unmask_operator.decision import JsonObject
from unmask_operator.resources import Resource
from unmask_operator.transport import (
    APPLY,
    JSON,
    MERGE,
    ApiError,
    KubernetesTransport,
    Method,
    Request,
    Transport,
    Unreachable,
    delete_options,
    exchange,
    json_request,
    pages,
    refuse,
)

__all__ = ["AGENT", "Connection", "connect"]

AGENT = "unmask"
"""The field manager of what people do, and what the API server's log calls them."""
_TRIES = 3
_PAUSE_S = 0.5
_BUSY = {429, 500, 502, 503, 504}
_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connect(kubeconfig: Path | str | None = None, context: str | None = None) -> "Connection":
    """Return a connection to the cluster of a kubeconfig, or to the one that this pod runs in.

    Args:
        kubeconfig: file that says where the cluster is; by default ``$KUBECONFIG``, else
            ``~/.kube/config``, else the pod's own account.
        context: context of that file; by default its current one.

    Raises:
        NoCluster: There is no such file or context, or it cannot be used.
    """
    try:
        from kubernetes import client, config
    except ModuleNotFoundError:
        raise NoCluster(
            "this needs the Kubernetes client: install unmask with its extra operator (unmask[operator])"
        ) from None
    settings = client.Configuration()
    namespace = "default"
    try:
        if kubeconfig is None and context is None and _in_pod():
            config.load_incluster_config(client_configuration=settings)
            namespace = _ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip() or namespace
        else:
            # The client looks at the environment once, when it is imported.
            path = str(kubeconfig or os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
            contexts, active = config.list_kube_config_contexts(config_file=path)
            config.load_kube_config(config_file=path, context=context, client_configuration=settings)
            chosen = next((one for one in contexts if one["name"] == context), active)
            namespace = chosen["context"].get("namespace") or namespace
    except Exception as error:  # of many kinds, all of them about the configuration
        text = " ".join(str(error).split())
        raise NoCluster(
            f"cannot tell where the cluster is: {text}; name a file with --kubeconfig or $KUBECONFIG, and a"
            " context of it with --context"
        ) from None
    return Connection(KubernetesTransport(client.ApiClient(settings), AGENT), settings.host, namespace)


def _in_pod() -> bool:
    """Whether this runs in a pod, and no kubeconfig is at hand that would say more."""
    files = os.environ.get("KUBECONFIG", str(Path.home() / ".kube" / "config")).split(os.pathsep)
    return "KUBERNETES_SERVICE_HOST" in os.environ and not any(Path(one).is_file() for one in files if one)


class Connection:
    """Requests to one API server, on behalf of a person."""

    def __init__(
        self,
        transport: Transport,
        server: str,
        namespace: str = "default",
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Make one.

        Args:
            transport: carries the requests.
            server: address, for messages.
            namespace: where to look where nothing else is said.
            sleep: waits so many seconds.
        """
        self._transport = transport
        self.server = server
        """Address of the API server."""
        self.namespace = namespace
        """Namespace of the kubeconfig's context, or of the pod."""
        self.sleep = sleep
        """Waits so many seconds."""

    def get(self, resource: Resource, namespace: str, name: str, *, what: str) -> JsonObject:
        """Return an object; raises ``ClusterError``, as all of these do."""
        return self._ask(resource, "GET", resource.path(namespace, name), what=what, namespace=namespace)

    def list(
        self, resource: Resource, namespace: str | None, *, what: str, **selectors: str
    ) -> list[JsonObject]:
        """Return all objects that the selectors (``labelSelector``, ``fieldSelector``) choose."""
        place = namespace or "(all namespaces)"
        items: list[JsonObject] = []
        for page in pages(
            lambda query: self._ask(
                resource, "GET", resource.path(namespace), query, what=what, namespace=place
            ),
            selectors,
        ):
            items += page.get("items") or ()
        return items

    def create(
        self, resource: Resource, namespace: str, body: JsonObject, *, what: str, dry_run: bool
    ) -> JsonObject | None:
        """Make an object and return it; ``None`` where the name is taken."""
        query = {"fieldManager": AGENT, "fieldValidation": "Strict"} | _dry(dry_run)
        with self._explaining(resource, what, namespace):
            try:
                return self._send("POST", resource.path(namespace), query, body)
            except ApiError as error:
                if error.status == 409 and error.reason == "AlreadyExists":
                    return None
                raise

    def merge(
        self, resource: Resource, namespace: str, name: str, patch: JsonObject, *, what: str, dry_run: bool
    ) -> JsonObject:
        """Change some fields (RFC 7386) and return the object."""
        query = {"fieldManager": AGENT} | _dry(dry_run)
        path = resource.path(namespace, name)
        return self._ask(resource, "PATCH", path, query, patch, MERGE, what=what, namespace=namespace)

    def apply(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        body: JsonObject,
        *,
        what: str,
        force: bool,
        dry_run: bool,
    ) -> JsonObject:
        """Have the object be as ``body`` says (server-side apply), and return it.

        Raises ``Conflicting`` where others have set fields of ``body`` to something else.

        Args:
            resource: its kind.
            namespace: where it is.
            name: of the object.
            body: all fields that people set, and no others.
            what: the purpose, for messages.
            force: take over fields that others have set to something else.
            dry_run: keep nothing.
        """
        query = {"fieldManager": AGENT, "fieldValidation": "Strict"} | _dry(dry_run)
        query |= {"force": "true"} if force else {}
        path = resource.path(namespace, name)
        with self._explaining(resource, what, namespace):
            try:
                return self._send("PATCH", path, query, body, APPLY)
            except ApiError as error:
                if error.status == 409:
                    raise conflicting(error, what=what) from None
                raise

    def delete(
        self, resource: Resource, namespace: str, name: str, uid: str, *, what: str, dry_run: bool
    ) -> None:
        """Delete the object with this UID; one that is gone already is as good."""
        body = delete_options(uid, "Background") | ({"dryRun": ["All"]} if dry_run else {})
        with self._explaining(resource, what, namespace):
            try:
                self._send("DELETE", resource.path(namespace, name), _dry(dry_run), body)
            except ApiError as error:
                if error.status not in (404, 409):  # 409: another object has the name by now
                    raise

    @contextmanager
    def lines(self, path: str, query: Mapping[str, str], *, timeout: float) -> Iterator[Iterator[bytes]]:
        """Yield the lines of an answer as they come.

        Raises:
            ApiError: the server refuses.
            Unreachable: the stream broke, or nothing came for ``timeout`` seconds.
        """
        request = Request("GET", path, query, timeout=timeout, accept="text/plain, */*")
        with self._transport.stream(request) as (head, lines):
            refuse(head)
            yield lines

    def explained(
        self, error: ApiError | Unreachable, resource: Resource, *, what: str, namespace: str
    ) -> Exception:
        """Return ``error`` in words, with what to do."""
        return explained(error, what=what, namespace=namespace, server=self.server, kind=resource.kind)

    def _ask(
        self,
        resource: Resource,
        method: Method,
        path: str,
        query: Mapping[str, str] | None = None,
        body: JsonObject | None = None,
        content_type: str = JSON,
        *,
        what: str,
        namespace: str,
    ) -> JsonObject:
        with self._explaining(resource, what, namespace):
            return self._send(method, path, query, body, content_type)

    @contextmanager
    def _explaining(self, resource: Resource, what: str, namespace: str) -> Iterator[None]:
        try:
            yield
        except (ApiError, Unreachable) as error:
            raise self.explained(error, resource, what=what, namespace=namespace) from None

    def _send(
        self,
        method: Method,
        path: str,
        query: Mapping[str, str] | None = None,
        body: JsonObject | None = None,
        content_type: str = JSON,
    ) -> JsonObject:
        """Send until there is an answer; every request of this class may be carried out twice."""
        request = json_request(method, path, query, body, content_type)
        for left in reversed(range(_TRIES)):
            pause = _PAUSE_S * (_TRIES - left)
            try:
                return exchange(self._transport, request)
            except Unreachable:
                if not left:
                    raise
            except ApiError as error:
                if error.status not in _BUSY or not left:
                    raise
                pause = error.retry_after or pause
            self.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}
