"""Carries a decision out: as few writes as bring it about, each safe to lose and to repeat."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unmask_operator.control.api import Api, ApiError
from unmask_operator.control.events import EventRecorder
from unmask_operator.control.reflector import Reflector
from unmask_operator.decision import Decision, Deletion, JsonObject, Observed
from unmask_operator.resources import MANAGED_BY, MANAGER, RESOURCES, Resource

__all__ = ["Executor", "Expectations", "Later", "Outcome", "contains", "prepared"]

_log = logging.getLogger(__name__)

APPLIED = "unmask.dev/applied"
"""Annotation with a digest of what was applied: it tells that a field was taken out, which the rest
cannot."""

_REFUSALS = {400, 403, 413, 422}


class Later(Exception):
    """The rest has to wait: what is there is newer than what was decided upon, or not gone yet."""


@dataclass
class Outcome:
    """What could not be brought about, for the next decision."""

    conflicts: set[tuple[str, str]] = field(default_factory=set)
    """(kind, name) that somebody else has."""
    rejections: dict[tuple[str, str], str] = field(default_factory=dict)
    """(kind, name) -> why the API server will not have it."""


class Expectations:
    """What was written for each custom resource and must be seen before deciding about it again."""

    def __init__(self, caches: Mapping[str, Reflector]) -> None:
        """Take the copies by kind."""
        self._caches = caches
        self._lock = threading.Lock()
        self._versions: dict[str, dict[str, int]] = {}
        self._deleted: dict[str, set[tuple[str, str]]] = {}

    def wrote(self, owner: str, kind: str, answer: JsonObject) -> None:
        """Expect the version that the API server answered with."""
        version = (answer.get("metadata") or {}).get("resourceVersion")
        if version:
            with self._lock:
                versions = self._versions.setdefault(owner, {})
                versions[kind] = max(versions.get(kind, 0), int(version))

    def deleted(self, owner: str, kind: str, uid: str) -> None:
        """Expect an object to go, or to be marked as being deleted."""
        with self._lock:
            self._deleted.setdefault(owner, set()).add((kind, uid))

    def met(self, owner: str) -> bool:
        """Return whether the copies show everything that was written for ``owner``, and forget it if so."""
        with self._lock:
            versions = dict(self._versions.get(owner, {}))
            deleted = set(self._deleted.get(owner, ()))
        if not all(self._caches[kind].has_seen(version) for kind, version in versions.items()):
            return False
        for kind, uid in deleted:
            there = self._caches[kind].by_uid(uid)
            if there is not None and "deletionTimestamp" not in there["metadata"]:
                return False
        self.forget(owner)
        return True

    def forget(self, owner: str) -> None:
        """Expect nothing any more."""
        with self._lock:
            self._versions.pop(owner, None)
            self._deleted.pop(owner, None)


class Executor:
    """Writes what a decision asks for, where it is not so already."""

    def __init__(
        self,
        api: Api,
        events: EventRecorder,
        expectations: Expectations,
        counted: Callable[[str, str], None] = lambda verb, kind: None,
    ) -> None:
        """Take what it writes with; ``counted(verb, kind)`` is told of each write that succeeded."""
        self._api = api
        self._events = events
        self._expectations = expectations
        self._counted = counted
        # UID -> (resource version, digest): applied and answered so, however the server spells it.
        self._settled: dict[str, tuple[str, str]] = {}

    def carry_out(self, observed: Observed, decision: Decision) -> Outcome:
        """Write events, status, deletions and children, in this order.

        Raises:
            ApiError: a write failed; what follows it was not tried.
            Unreachable: a write was not answered; it may have been carried out.
            Fenced: this process may not write any more.
            Later: try again when the copies are newer.
        """
        outcome = Outcome()
        for event in decision.events:
            self._events.record(observed.resource, event)
        if decision.status is not None:
            self._status(observed, decision.status)
        for deletion in decision.delete:
            self._delete(observed, deletion)
        for child in decision.apply:
            self._apply(observed, child, outcome)
        for child in decision.restore:
            if _as_made(observed, prepared(observed.resource, child)):
                self._apply(observed, child, outcome)
        return outcome

    def _status(self, observed: Observed, status: JsonObject) -> None:
        there = observed.resource
        if _bare(there.get("status") or {}) == _bare(status):
            return
        body = {
            "apiVersion": there["apiVersion"],
            "kind": there["kind"],
            "metadata": _identity(there) | {"namespace": there["metadata"]["namespace"]},
            "status": status,
        }
        with _conflicts_wait():
            answer = self._api.apply(RESOURCES[there["kind"]], body, "status")
        self._wrote("status", observed, there["kind"], answer)

    def _delete(self, observed: Observed, deletion: Deletion) -> None:
        there = _find(observed, deletion.kind, deletion.name)
        if there is None or there["metadata"]["uid"] != deletion.uid:
            return  # gone, or its name has passed on to another
        if "deletionTimestamp" in there["metadata"]:
            return
        # A resource's own version changes with each status we write, also in this very pass.
        version = None if there is observed.resource else there["metadata"]["resourceVersion"]
        namespace = observed.resource["metadata"]["namespace"]
        resource = RESOURCES[deletion.kind]
        try:
            with _conflicts_wait():
                self._api.delete(
                    resource, namespace, deletion.name, deletion.uid, version, deletion.propagation
                )
        except ApiError as error:
            if error.status != 404:
                raise
        self._counted("delete", deletion.kind)
        self._expectations.deleted(observed.resource["metadata"]["uid"], deletion.kind, deletion.uid)

    def _apply(self, observed: Observed, child: JsonObject, outcome: Outcome) -> None:
        desired = prepared(observed.resource, child)
        kind, name = desired["kind"], desired["metadata"]["name"]
        there = _find(observed, kind, name)
        try:
            if there is None:
                self._create(observed, desired, outcome)
            elif "deletionTimestamp" not in there["metadata"]:
                self._update(observed, desired, there)
        except ApiError as error:
            if error.status not in _REFUSALS:
                raise
            outcome.rejections[kind, name] = error.message

    def _create(self, observed: Observed, desired: JsonObject, outcome: Outcome) -> None:
        # Not by applying, which would overwrite what another leader has made meanwhile.
        resource, name = RESOURCES[desired["kind"]], desired["metadata"]["name"]
        namespace = desired["metadata"]["namespace"]
        try:
            answer = self._api.create(resource, namespace, desired)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            try:
                there = self._api.get(resource, namespace, name)
            except ApiError as gone:
                if gone.status != 404:
                    raise
                raise Later(f"{desired['kind']} {name} was there and is gone") from gone
            if _owner(there, observed.resource) == "ours":
                self._expectations.wrote(observed.resource["metadata"]["uid"], desired["kind"], there)
                return
            if "deletionTimestamp" in there["metadata"] or _owner(there, observed.resource) == "former":
                raise Later(f"{desired['kind']} {name} of a former owner is not gone yet") from error
            outcome.conflicts.add((desired["kind"], name))
            return
        self._wrote("create", observed, desired["kind"], answer)

    def _update(self, observed: Observed, desired: JsonObject, there: JsonObject) -> None:
        uid, version = there["metadata"]["uid"], there["metadata"]["resourceVersion"]
        digest = desired["metadata"]["annotations"][APPLIED]
        if contains(there, desired) or self._settled.get(uid) == (version, digest):
            return
        resource = RESOURCES[desired["kind"]]
        with _conflicts_wait():
            version = self._take_over(resource, there)
            metadata = desired["metadata"] | {"uid": uid, "resourceVersion": version}
            answer = self._api.apply(resource, {**desired, "metadata": metadata})
        if len(self._settled) > 4096:
            self._settled.clear()
        self._settled[uid] = answer["metadata"]["resourceVersion"], digest
        self._wrote("apply", observed, desired["kind"], answer)

    def _take_over(self, resource: Resource, there: JsonObject) -> str:
        """Make fields that we set by creating the object count as applied, and return the version then.

        The API server keeps the two apart, and what was set by creating would stay when it is left out later.
        """
        namespace, name = there["metadata"]["namespace"], there["metadata"]["name"]
        version: str = there["metadata"]["resourceVersion"]
        live = self._api.get(resource, namespace, name)
        if live["metadata"]["resourceVersion"] != version:
            raise Later(f"{resource.kind} {name} has changed")
        entries = live["metadata"].get("managedFields") or []

        def ours(entry: JsonObject, operation: str) -> bool:
            return (
                entry.get("manager") == MANAGER
                and entry.get("operation") == operation
                and not entry.get("subresource")
            )

        created = [entry for entry in entries if ours(entry, "Update")]
        if not created or any(ours(entry, "Apply") for entry in entries):
            return version
        moved = [{**entry, "operation": "Apply"} if entry in created[:1] else entry for entry in entries]
        patch = {"metadata": {"uid": there["metadata"]["uid"], "resourceVersion": version}}
        patch["metadata"]["managedFields"] = moved
        answer = self._api.merge(resource, namespace, name, patch)
        return str(answer["metadata"]["resourceVersion"])

    def _wrote(self, verb: str, observed: Observed, kind: str, answer: JsonObject) -> None:
        self._counted(verb, kind)
        self._expectations.wrote(observed.resource["metadata"]["uid"], kind, answer)


def prepared(resource: JsonObject, child: JsonObject) -> JsonObject:
    """Return ``child`` with what every child has: namespace, owner, label, and a digest of itself."""
    metadata = dict(child["metadata"])
    metadata["namespace"] = resource["metadata"]["namespace"]
    metadata["labels"] = {**metadata.get("labels", {}), MANAGED_BY: MANAGER}
    metadata["ownerReferences"] = [
        {
            "apiVersion": resource["apiVersion"],
            "kind": resource["kind"],
            "name": resource["metadata"]["name"],
            "uid": resource["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    body = {**child, "metadata": metadata}
    template = (child.get("spec") or {}).get("template")
    if isinstance(template, dict):  # the pods are watched by the label, too
        inner = template.get("metadata") or {}
        inner = {**inner, "labels": {**inner.get("labels", {}), MANAGED_BY: MANAGER}}
        body["spec"] = {**child["spec"], "template": {**template, "metadata": inner}}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]
    metadata["annotations"] = {**metadata.get("annotations", {}), APPLIED: digest}
    return body


def contains(there: Any, desired: Any) -> bool:
    """Return whether ``there`` has everything that ``desired`` says; the server adds defaults to objects."""
    if isinstance(desired, dict):
        return isinstance(there, dict) and all(
            # A null says that a field is not set, which is how the server keeps it.
            (key not in there) if value is None else key in there and contains(there[key], value)
            for key, value in desired.items()
        )
    if isinstance(desired, list):
        return (
            isinstance(there, list)
            and len(there) == len(desired)
            and all(contains(one, other) for one, other in zip(there, desired, strict=True))
        )
    return bool(there == desired)


class _conflicts_wait:  # noqa: N801 - used as a statement
    """Turns a failed precondition into :class:`Later`: never the same body again, but a new decision."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ApiError) and error.status == 409:
            raise Later(str(error)) from error


def _bare(value: Any) -> Any:
    """Return a value without what is empty: the schema's defaults of a status are."""
    if isinstance(value, dict):
        inner = {key: _bare(below) for key, below in value.items()}
        return {key: below for key, below in inner.items() if below not in (None, 0, "", [], {})}
    return [_bare(one) for one in value] if isinstance(value, list) else value


def _identity(there: JsonObject) -> JsonObject:
    return {key: there["metadata"][key] for key in ("name", "uid", "resourceVersion")}


def _find(observed: Observed, kind: str, name: str) -> JsonObject | None:
    if kind == observed.resource["kind"]:
        return observed.resource if observed.resource["metadata"]["name"] == name else None
    return next((one for one in observed.children.get(kind, ()) if one["metadata"]["name"] == name), None)


def _as_made(observed: Observed, desired: JsonObject) -> bool:
    """Whether a child is there that was made as ``desired``, whatever has become of it."""
    there = _find(observed, desired["kind"], desired["metadata"]["name"])
    annotations = (there or {}).get("metadata", {}).get("annotations") or {}
    return bool(annotations.get(APPLIED) == desired["metadata"]["annotations"][APPLIED])


def _owner(there: JsonObject, resource: JsonObject) -> str:
    """Return whether an object belongs to this resource, to a former one of its name, or to another."""
    for owner in there["metadata"].get("ownerReferences") or ():
        if owner["uid"] == resource["metadata"]["uid"]:
            return "ours"
        if (owner["kind"], owner["name"]) == (resource["kind"], resource["metadata"]["name"]):
            return "former"
    return "another"
