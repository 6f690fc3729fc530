"""What people ask of a kind of custom resource in a namespace, whichever kind it is.

Everything here may be done twice, so a request whose answer was lost is simply sent again.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

from unmask.errors import UsageError
from unmask_api.metadata import ObjectMeta
from unmask_operator.client.connection import Connection, connect
from unmask_operator.client.custom_object import CANCELLED, CustomObject
from unmask_operator.client.errors import NotFound, WaitedTooLong
from unmask_operator.decision import JsonObject
from unmask_operator.resources import EVENT, Resource

__all__ = ["CustomObjects"]

View = TypeVar("View", bound=CustomObject)


class CustomObjects(ABC, Generic[View]):
    """The objects of one kind in a namespace.

    Every method raises :class:`~unmask_operator.client.errors.ClusterError`, or one of its kinds, where the
    cluster cannot be asked or says no.
    """

    resource: ClassVar[Resource]
    """The kind."""
    view: type[View]
    """Shows an object."""
    several: ClassVar[str]
    """What people call several of the kind."""

    def __init__(self, connection: Connection, namespace: str | None = None) -> None:
        """Take a connection, and the namespace to work in; by default the connection's."""
        self._connection = connection
        self._chosen = namespace
        self.namespace = namespace or connection.namespace
        """Where the objects are."""

    @classmethod
    def connect(
        cls,
        *,
        namespace: str | None = None,
        context: str | None = None,
        kubeconfig: Path | str | None = None,
    ) -> Self:
        """Connect to a cluster.

        Args:
            namespace: where to work; by default that of the context.
            context: context of the kubeconfig; by default its current one.
            kubeconfig: file that says where the cluster is; by default ``$KUBECONFIG``, else
                ``~/.kube/config``, else the account of the pod that this runs in.

        Raises:
            NoCluster: There is no such file or context.
        """
        return cls(connect(kubeconfig, context), namespace)

    def get(self, name: str) -> View:
        """Return the one of this name; raises ``NotFound``."""
        return self._get(self.namespace, name)

    def list(self, *, all_namespaces: bool = False) -> Sequence[View]:
        """Return all, the newest last."""
        place = None if all_namespaces else self.namespace
        listed = self._connection.list(self.resource, place, what=f"list {self.several}")
        found = [self.view(one) for one in listed]
        return sorted(found, key=lambda one: (one.raw["metadata"]["creationTimestamp"], one.name))

    def wait(
        self,
        name: str,
        *,
        timeout: float | None = None,
        poll: float = 2.0,
        observe: Callable[[View], None] = lambda one: None,
    ) -> View:
        """Wait until a job has ended, or a service has settled, and return it.

        Args:
            name: which one.
            timeout: seconds; by default for ever.
            poll: seconds between two looks.
            observe: called with what each look finds.

        Raises:
            WaitedTooLong: It does not get there in time.
            NotFound: It is not there, or was deleted meanwhile.
        """
        end = None if timeout is None else time.monotonic() + timeout
        one = self.get(name)
        uid = one.uid
        named = f"{one.noun} {name}"
        while True:
            observe(one)
            if one.settled:
                return one
            if end is not None and time.monotonic() >= end:
                what = "ended" if one.noun == "job" else "settled"
                raise WaitedTooLong(f"{named} has not {what} after {timeout:g} s: it is {one.state}")
            self._connection.sleep(poll)
            one = self.get(name)
            if one.uid != uid:
                raise NotFound(f"{named} was deleted while it was waited for; the one there now is another")

    def delete(self, name: str, *, dry_run: bool = False) -> View:
        """Delete one and what was made for it, and return what it was; files in volumes and stores stay."""
        one = self.get(name)
        what = f"delete {one.noun} {name}"
        self._connection.delete(self.resource, one.namespace, name, one.uid, what=what, dry_run=dry_run)
        return one

    @abstractmethod
    def pods(self, one: View) -> Sequence[JsonObject]:
        """Return its pods in order, as the API server keeps them."""

    def events(self, one: View) -> Sequence[JsonObject]:
        """Return what was noted about it (``events.k8s.io/v1``), the oldest first."""
        found = self._connection.list(
            EVENT,
            one.namespace,
            what=f"list events of {one.noun} {one.name}",
            fieldSelector=f"regarding.name={one.name},regarding.kind={self.resource.kind}",
        )
        about = [event for event in found if (event.get("regarding") or {}).get("uid") == one.uid]
        return sorted(about, key=_last_seen)

    def _cancel(self, one: View, *, dry_run: bool) -> View:
        """Let it stand still until it is submitted again."""
        patch = {
            "metadata": {"annotations": {CANCELLED: "true"}, "uid": one.uid},
            "spec": {one.halt: True},
        }
        return self._patch(one, patch, what=f"cancel {one.noun} {one.name}", dry_run=dry_run)

    def _let_go_on(self, one: View, *, dry_run: bool) -> View:
        patch = {"metadata": {"annotations": {CANCELLED: None}, "uid": one.uid}, "spec": {one.halt: False}}
        return self._patch(one, patch, what=f"let {one.noun} {one.name} go on", dry_run=dry_run)

    def _patch(self, one: View, patch: JsonObject, *, what: str, dry_run: bool) -> View:
        changed = self._connection.merge(
            self.resource, one.namespace, one.name, patch, what=what, dry_run=dry_run
        )
        return self.view(changed)

    def _get(self, namespace: str, name: str) -> View:
        what = f"get {self.view.noun} {name}"
        return self.view(self._connection.get(self.resource, namespace, name, what=what))

    def _last_known(self, first: View) -> View:
        """Return it as it is now; one that is gone, as what is being deleted."""
        try:
            now = self._get(first.namespace, first.name)
        except NotFound:
            now = None
        if now is not None and now.uid == first.uid:
            return now
        stamp = first.raw["metadata"]["creationTimestamp"]
        return self.view({**first.raw, "metadata": {**first.raw["metadata"], "deletionTimestamp": stamp}})

    def _namespace_of(self, metadata: ObjectMeta) -> str:
        own = metadata.namespace
        if own and self._chosen and own != self._chosen:
            raise UsageError(
                f"metadata.namespace is {own}, and the namespace asked for is {self._chosen}: drop one"
            )
        return own or self.namespace


def _last_seen(event: JsonObject) -> str:
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("eventTime") or "")
