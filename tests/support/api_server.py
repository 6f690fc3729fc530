"""A Kubernetes API server in memory, with the semantics that an operator can trip over, and faults on demand.

What it keeps: resource versions, optimistic concurrency, generations that count changes of the spec only,
status and scale subresources, server-side apply with fields per manager, merge patches, preconditions,
immutable fields, paging, watches with bookmarks and expiry, owner garbage collection in background and
foreground, finalizers, defaults and pruning of our own kinds by their schema, access rules.
``tests/integration/test_api_server.py`` makes the same assertions of it and of a real one.

What it leaves out: validation beyond names and immutability, strategic merge and JSON patches, other users
than one, the controllers (a test sets a Job's status itself).
"""

import base64
import contextlib
import functools
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml

from support import field_sets, pod_logs
from unmask_api import crd
from unmask_operator.control.api import Reply, Request, Unreachable
from unmask_operator.resources import DEPLOYMENT, EVENT, LEASE, RESOURCES, Resource

Json = dict[str, Any]

KINDS = (
    *RESOURCES.values(),
    DEPLOYMENT,
    EVENT,
    LEASE,
)
FAULTS = (
    "error before",  # 500, nothing done
    "error after",  # done, and 500
    "timeout",  # done, and no answer
    "conflict",  # 409, nothing done
    "429",  # 429 with Retry-After, nothing done
    "duplicate delivery",  # carried out twice, the second answer is given
    "stale cache",  # done, and watches fall silent for a while
    "watch cut",  # done, and the next watch breaks in the middle
    "410",  # done, and everything older is forgotten
    "crash",  # done, and whoever asked dies before the answer
)
_DEFAULTS: dict[str, Json] = {
    "Job": {"suspend": False, "parallelism": 1, "completionMode": "NonIndexed", "backoffLimit": 6},
    "Service": {"type": "ClusterIP", "sessionAffinity": "None"},
    "StatefulSet": {"replicas": 1},
}
_IMMUTABLE = {
    "Job": ("template", "completionMode", "selector"),
    "StatefulSet": ("serviceName", "podManagementPolicy", "selector"),
}
_NO_GENERATION = {"ConfigMap", "ControllerRevision", "Pod", "Service", "Event", "Lease"}
_STATUS = {"HorizontalPodAutoscaler", "Job", "Pod", "PodDisruptionBudget", "StatefulSet", "Service"}
_SCALE = {"StatefulSet", "DiffusionInferenceService"}
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_FOREGROUND = "foregroundDeletion"
_OWN_FIELDS = (
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "generation",
    "deletionTimestamp",
    "managedFields",
)


class Crash(BaseException):
    """The process that asked is dead; nothing but the test catches this."""


class _Refused(Exception):
    def __init__(self, status: int, reason: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.retry_after = status, reason, retry_after

    def body(self) -> Json:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.status,
        }


class _NoAnswer(Exception):
    pass


@dataclass(frozen=True)
class Write:
    """A write that changed something."""

    verb: str
    resource: str
    namespace: str
    name: str
    user: str


@dataclass
class _Store:
    resource: Resource
    schema: Json | None
    objects: dict[tuple[str, str], Json] = field(default_factory=dict)
    log: list[tuple[int, str, Json, Json | None]] = field(default_factory=list)

    @property
    def generations(self) -> bool:
        return self.resource.kind not in _NO_GENERATION

    @property
    def has_status(self) -> bool:
        return self.resource.custom or self.resource.kind in _STATUS


@functools.cache
def _schemas() -> dict[str, Json]:
    """Return the schema of each of our kinds by its plural; making them takes longer than a whole run."""
    return {
        own.plural: crd.definition(own)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for own in crd.RESOURCES
    }


class ApiServer:
    """The objects and what can be asked about them."""

    def __init__(self, *, collects: bool = True) -> None:
        """Make an empty one; ``collects``: what loses its owners is deleted at once, not by
        :meth:`collect`."""
        self.collects = collects
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.version = 100
        self.oldest = 0
        self.writes: list[Write] = []
        """Writes that changed something, in order."""
        self.seen: set[tuple[str, str, str]] = set()
        """(verb, group, resource or resource/subresource) of every request."""
        self.requests = 0
        """Requests that ask for a change, faulted ones included."""
        self.fault: Callable[[int, Request], str | None] = lambda ordinal, request: None
        """Asked for the fault of each request that asks for a change, numbered from 1."""
        self.refusal: Callable[[Request], tuple[int, str, str] | None] = lambda request: None
        """Asked before each request is carried out, for (status, reason, message) of a refusal."""
        self.rules: list[Json] | None = None
        """Rules as in a ClusterRole; ``None`` allows everything."""
        self.now: Callable[[], float] = time.time
        """Seconds since 1970, for the times of objects."""
        self.watch_gap: Callable[[str], str | None] = lambda plural: None
        """Asked before each watch: "cut" breaks it in the middle, "silent" tells nothing, "repeat" tells
        twice."""
        self.frozen: int | None = None
        """Resource version beyond which watches and nothing else tell nothing."""
        self.logs = pod_logs.PodLogs(self.changed)
        """What containers have printed; a test writes it."""
        self._pages: dict[str, tuple[int, list[Json]]] = {}
        schemas = _schemas()
        self.stores = {
            (one.group, one.version, one.plural): _Store(one, schemas.get(one.plural) if one.custom else None)
            for one in KINDS
        }

    def store(self, kind: str) -> _Store:
        return next(one for one in self.stores.values() if one.resource.kind == kind)

    def objects(self, kind: str) -> list[Json]:
        """Return copies of all objects of a kind, ordered."""
        with self.lock:
            store = self.store(kind)
            return [field_sets.copied(store.objects[place]) for place in sorted(store.objects)]

    def set_status(self, kind: str, namespace: str, name: str, status: Json) -> None:
        """Be the controller that keeps the status of a kind which is not ours."""
        with self.lock:
            store = self.store(kind)
            there = store.objects[namespace, name]
            new = field_sets.copied(there)
            new["status"] = status
            self._save(store, new, there, "", "Update", "status")

    def put(self, kind: str, namespace: str, body: Json, *, uid: str = "") -> None:
        """Be the controller that makes or changes an object of its own; ``uid`` is that of a new one."""
        with self.lock:
            store = self.store(kind)
            place = namespace, body["metadata"]["name"]
            there = store.objects.get(place)
            if there is None:
                self._create(store, namespace, body, "controller", "")
                if uid:
                    for one in (store.objects[place], store.log[-1][2]):
                        one["metadata"]["uid"] = uid
                if "status" in body:
                    self.set_status(kind, *place, body["status"])
                return
            new = field_sets.copied(there) | field_sets.copied(_without(body, "metadata"))
            self._save(store, new, there, "controller", "Update", "")

    def take(self, kind: str, namespace: str, name: str) -> None:
        """Be somebody who deletes an object, if it is there, and nothing with it."""
        with self.lock:
            store = self.store(kind)
            if (namespace, name) in store.objects:
                self._gone(store, (namespace, name))

    def compact(self) -> None:
        """Forget what happened so far: a watch from before now is told 410."""
        with self.lock:
            self.oldest = self.version
            for store in self.stores.values():
                store.log.clear()
            self.changed.notify_all()

    # Requests

    def answer(self, request: Request, user: str = "") -> Reply:
        """Answer a request that is no watch, with the fault that is planned for it.

        Raises:
            Crash: as planned.
            Unreachable: as planned.
        """
        fault = None
        with self.lock:
            if request.method != "GET":
                self.requests += 1
                fault = self.fault(self.requests, request)
            before = self.version
        if fault in ("error before", "conflict", "429"):
            return {
                "error before": _reply(_Refused(500, "InternalError", "planned: nothing was done")),
                "conflict": _reply(_Refused(409, "Conflict", "planned: the object has been modified")),
                "429": _reply(_Refused(429, "TooManyRequests", "planned: too many requests", retry_after=1)),
            }[fault]
        reply = self._answer(request, user)
        if fault == "duplicate delivery":
            reply = self._answer(request, user)
        elif fault == "error after":
            return _reply(_Refused(500, "InternalError", "planned: it was done"))
        elif fault == "timeout":
            raise Unreachable("planned: no answer")
        elif fault == "crash":
            raise Crash
        elif fault == "stale cache":
            self.frozen = before
        elif fault == "410":
            self.compact()
        elif fault == "watch cut":
            waiting = {one.resource.plural for one in self.stores.values()}
            usual = self.watch_gap

            def cut_once(plural: str) -> str | None:
                if plural in waiting:
                    waiting.discard(plural)
                    return "cut"
                return usual(plural)

            self.watch_gap = cut_once
        return reply

    def _answer(self, request: Request, user: str) -> Reply:
        try:
            refused = self.refusal(request)
            if refused:
                raise _Refused(*refused)
            with self.lock:
                return _reply(self._route(request, user))
        except _Refused as error:
            return _reply(error)

    def watch(self, request: Request, *, wait: bool) -> tuple[Reply, Iterator[bytes]]:
        """Answer a watch; without ``wait`` it ends where it would have to."""
        try:
            store, namespace, _, _ = self._parsed(request.path)
            self._allow("watch", store.resource, "", namespace, "")
        except _Refused as error:
            return _reply(error), iter(())
        return Reply(200, {}, b""), self._events(store, namespace, dict(request.query), wait)

    def log(self, request: Request, *, wait: bool) -> tuple[Reply, Iterator[bytes]]:
        """Answer for the kubelet: the log of a pod's container."""
        try:
            store, namespace, name, _ = self._parsed(request.path)
            with self.lock:
                self._allow("get", store.resource, "log", namespace, name)
                pod = field_sets.copied(self._there(store, namespace, name))
            if (why := pod_logs.waiting(pod, request.query.get("container", ""))) is not None:
                raise _Refused(400, "BadRequest", why)
        except _Refused as error:
            return _reply(error), iter(())
        return Reply(200, {}, b""), self.logs.read(pod["metadata"]["uid"], dict(request.query), wait=wait)

    def _events(self, store: _Store, namespace: str, query: Json, wait: bool) -> Iterator[bytes]:
        position = int(query.get("resourceVersion") or self.version)
        selector = query.get("labelSelector", "")
        end = time.monotonic() + float(query.get("timeoutSeconds", 300))
        gap = self.watch_gap(store.resource.plural)
        while True:
            with self.lock:
                if position < self.oldest:
                    body = _Refused(410, "Expired", f"too old resource version: {position}").body()
                    yield _line("ERROR", body)
                    return
                limit = self.version if self.frozen is None else min(self.version, self.frozen)
                events = [
                    line
                    for version, kind, new, old in store.log
                    if position < version <= limit and gap != "silent"
                    for line in _seen(kind, new, old, namespace, selector)
                ]
                behind = position >= limit
                position = max(position, limit)
            if gap == "cut" and events:
                yield from events[: len(events) // 2]
                raise Unreachable("planned: the watch was cut")
            for line in events:
                yield line
                if gap == "repeat":
                    yield line
            if not wait or time.monotonic() >= end:
                break
            if not behind and query.get("allowWatchBookmarks") == "true":
                yield self._bookmark(store, position)
            with self.lock:
                self.changed.wait(0.05)
        if query.get("allowWatchBookmarks") == "true" and gap != "silent":
            yield self._bookmark(store, position)

    @staticmethod
    def _bookmark(store: _Store, position: int) -> bytes:
        kind = {"apiVersion": store.resource.api_version, "kind": store.resource.kind}
        return _line("BOOKMARK", kind | {"metadata": {"resourceVersion": str(position)}})

    def _parsed(self, path: str) -> tuple[_Store, str, str, str]:
        """Return store, namespace, name and subresource of a path; empty where not given."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        root = parts[:3] if parts[0] == "apis" else ["", "", *parts[1:2]]
        rest = parts[3:] if parts[0] == "apis" else parts[2:]
        group, version = (root[1], root[2]) if parts[0] == "apis" else ("", root[2])
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        store = self.stores.get((group, version, rest[0] if rest else ""))
        if store is None:
            raise _Refused(404, "NotFound", "the server could not find the requested resource")
        return store, namespace, *(rest[1:3] + ["", ""])[:2]  # type: ignore[return-value]

    def _route(self, request: Request, user: str) -> Json:
        if request.path in ("/apis", "/apis/"):
            versions: dict[str, set[str]] = {}
            for group, version, _ in self.stores:
                versions.setdefault(group, set()).add(version)
            return {
                "kind": "APIGroupList",
                "groups": [
                    {"name": group, "versions": [{"groupVersion": f"{group}/{v}"} for v in sorted(found)]}
                    for group, found in sorted(versions.items())
                    if group
                ],
            }
        store, namespace, name, subresource = self._parsed(request.path)
        query = dict(request.query)
        if subresource and not (
            (subresource == "status" and store.has_status)
            or (subresource == "scale" and store.resource.kind in _SCALE)
        ):
            raise _Refused(404, "NotFound", "the server could not find the requested resource")
        verb = {"GET": "get" if name else "list", "POST": "create", "PUT": "update", "PATCH": "patch"}.get(
            request.method, "delete"
        )
        self._allow(verb, store.resource, subresource, namespace, name)
        body = _body(request)
        if verb == "list":
            return self._list(store, namespace, query)
        if verb == "get":
            there = self._there(store, namespace, name)
            return _scale(there) if subresource == "scale" else field_sets.copied(there)
        manager = query.get("fieldManager", "")
        if "dryRun" in query:
            return self._rehearsed(request, user)
        if verb == "create":
            return self._create(store, namespace, body, manager or "unknown", user)
        if verb == "delete":
            return self._delete(store, namespace, name, body, user)
        if verb == "update":
            return self._update(store, namespace, name, subresource, body, manager or "unknown", user, verb)
        if request.content_type == "application/merge-patch+json":
            there = self._there(store, namespace, name)
            base = _scale(there) if subresource == "scale" else there
            new = _merge_patch(field_sets.copied(base), body)
            if "resourceVersion" not in (body.get("metadata") or {}):
                new["metadata"].pop("resourceVersion", None)
            return self._update(store, namespace, name, subresource, new, manager or "unknown", user, verb)
        if request.content_type == "application/apply-patch+yaml":
            return self._apply(store, namespace, name, subresource, body, query, user)
        raise _Refused(415, "UnsupportedMediaType", f"{request.content_type} is not spoken here")

    def _rehearsed(self, request: Request, user: str) -> Json:
        """Answer as if it were done, and leave everything as it was."""
        before = (self.version, list(self.writes), self.seen.copy())
        kept = {key: (dict(store.objects), list(store.log)) for key, store in self.stores.items()}
        query = {key: value for key, value in request.query.items() if key != "dryRun"}
        try:
            return self._route(replace(request, query=query), user)
        finally:
            self.version, self.writes, self.seen = before
            for key, (objects, log) in kept.items():
                self.stores[key].objects, self.stores[key].log = objects, log

    def _allow(self, verb: str, resource: Resource, subresource: str, namespace: str, name: str) -> None:
        what = resource.plural + (f"/{subresource}" if subresource else "")
        self.seen.add((verb, resource.group, what))
        if self.rules is None:
            return
        for rule in self.rules:
            names = rule.get("resourceNames")
            if (
                verb in rule["verbs"]
                and resource.group in rule["apiGroups"]
                and what in rule["resources"]
                and (not names or name in names)
            ):
                return
        raise _Refused(403, "Forbidden", f"may not {verb} {what} in {namespace or 'all namespaces'}")

    # Reading

    def _there(self, store: _Store, namespace: str, name: str) -> Json:
        there = store.objects.get((namespace, name))
        if there is None:
            raise _Refused(404, "NotFound", f'{store.resource.plural} "{name}" not found')
        return there

    def _list(self, store: _Store, namespace: str, query: Json) -> Json:
        limit = int(query.get("limit") or 0)
        token = query.get("continue", "")
        if token:
            where = json.loads(base64.b64decode(token))
            if where["page"] not in self._pages or self._pages[where["page"]][0] < self.oldest:
                raise _Refused(410, "Expired", "the provided continue parameter is too old")
            page = where["page"]
            version, items = self._pages[page]
            start = where["start"]
        else:
            page, version, start = uuid.uuid4().hex, self.version, 0
            items = [
                field_sets.copied(store.objects[place])
                for place in sorted(store.objects)
                if (not namespace or place[0] == namespace)
                and _matches(store.objects[place], query.get("labelSelector", ""))
            ]
        metadata: Json = {"resourceVersion": str(version)}
        shown = items[start : start + limit] if limit else items
        if limit and start + limit < len(items):
            self._pages[page] = version, items
            following = json.dumps({"page": page, "start": start + limit})
            metadata["continue"] = base64.b64encode(following.encode()).decode()
            metadata["remainingItemCount"] = len(items) - start - limit
        # As the API server does: items of a list of built-in kinds carry neither apiVersion nor kind.
        stripped = (
            shown if store.resource.custom else [_without(item, "apiVersion", "kind") for item in shown]
        )
        return {
            "apiVersion": store.resource.api_version,
            "kind": f"{store.resource.kind}List",
            "metadata": metadata,
            "items": stripped,
        }

    # Writing

    def _create(
        self, store: _Store, namespace: str, body: Json, manager: str, user: str, apply: bool = False
    ) -> Json:
        new = field_sets.copied(body)
        metadata = new.setdefault("metadata", {})
        if metadata.get("resourceVersion") not in (None, "", "0") and not apply:
            raise _Refused(400, "BadRequest", "resourceVersion should not be set on objects to be created")
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        name = metadata.get("name", "")
        if not _NAME.fullmatch(name) or len(name) > 253:
            raise _Refused(422, "Invalid", f'metadata.name: Invalid value: "{name}"')
        if (namespace, name) in store.objects:
            raise _Refused(409, "AlreadyExists", f'{store.resource.plural} "{name}" already exists')
        self._owners(metadata)
        for key in _OWN_FIELDS:
            metadata.pop(key, None)
        if store.has_status:
            new.pop("status", None)
        metadata |= {
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now())),
        }
        if store.generations:
            metadata["generation"] = 1
        new |= {"apiVersion": store.resource.api_version, "kind": store.resource.kind}
        return self._save(store, new, None, manager, "Apply" if apply else "Update", "", user, "create", body)

    def _update(
        self,
        store: _Store,
        namespace: str,
        name: str,
        subresource: str,
        body: Json,
        manager: str,
        user: str,
        verb: str,
    ) -> Json:
        there = self._there(store, namespace, name)
        wanted = body.get("metadata") or {}
        self._preconditions(store, there, wanted)
        if subresource == "scale":
            new = field_sets.copied(there)
            new["spec"]["replicas"] = body["spec"].get("replicas", 0)
            return _scale(self._save(store, new, there, manager, "Update", "scale", user, verb))
        new = field_sets.copied(body)
        entries = wanted.get("managedFields")
        self._keep(store, new, there, subresource)
        if entries is not None and entries != there["metadata"].get("managedFields"):
            new["metadata"]["managedFields"] = field_sets.copied(entries)
        else:
            new["metadata"]["managedFields"] = field_sets.copied(there["metadata"].get("managedFields", []))
        return self._save(store, new, there, manager, "Update", subresource, user, verb)

    def _apply(
        self, store: _Store, namespace: str, name: str, subresource: str, body: Json, query: Json, user: str
    ) -> Json:
        manager = query.get("fieldManager", "")
        if not manager:
            raise _Refused(422, "Invalid", "fieldManager: Required value: is required for apply patch")
        wanted = body.get("metadata") or {}
        if wanted.get("name", name) != name or wanted.get("namespace", namespace) != namespace:
            raise _Refused(400, "BadRequest", "the name of the object does not match the name on the URL")
        if "managedFields" in wanted:
            raise _Refused(400, "BadRequest", "metadata.managedFields must be nil")
        there = store.objects.get((namespace, name))
        if there is None:
            if subresource:
                raise _Refused(404, "NotFound", f'{store.resource.plural} "{name}" not found')
            if wanted.get("uid"):
                raise _Refused(
                    409, "Conflict", f"uid mismatch: {wanted['uid']}, and no existing object was found"
                )
            if wanted.get("resourceVersion"):
                raise _Refused(409, "Conflict", "the object has been modified: it is not there")
            self._allow("create", store.resource, "", namespace, "")
            fresh = _without(body, "status") if store.has_status else body
            fresh = {**fresh, "metadata": {**wanted, "name": name}}
            return self._create(store, namespace, fresh, manager, user, apply=True)
        self._preconditions(store, there, wanted)
        config = _only(body, subresource, store.has_status)
        fields = field_sets.of(config)
        entries = field_sets.copied(there["metadata"].get("managedFields", []))
        mine = next((one for one in entries if _is(one, manager, "Apply", subresource)), None)
        others = [one for one in entries if one is not mine]
        for entry in others:
            owned = field_sets.decoded(entry["fieldsV1"])
            clash = {
                path for path in owned & fields if field_sets.get(there, path) != field_sets.get(config, path)
            }
            if clash and entry["manager"] != manager:
                if query.get("force") != "true":
                    told = ", ".join(".".join(path) for path in sorted(clash))
                    raise _Refused(409, "Conflict", f'conflict with "{entry["manager"]}": {told}')
            entry["fieldsV1"] = field_sets.encoded(owned - clash)
        held = frozenset().union(*(field_sets.decoded(one["fieldsV1"]) for one in others))
        gone = (field_sets.decoded(mine["fieldsV1"]) if mine else frozenset()) - fields - held
        new = field_sets.merged(field_sets.removed(there, gone), config)
        entry = {
            "manager": manager,
            "operation": "Apply",
            "apiVersion": store.resource.api_version,
            "fieldsType": "FieldsV1",
            "fieldsV1": field_sets.encoded(fields),
        } | ({"subresource": subresource} if subresource else {})
        self._keep(store, new, there, subresource)
        new["metadata"]["managedFields"] = [one for one in others if one["fieldsV1"]] + [entry]
        return self._save(store, new, there, manager, "Apply", subresource, user, "patch")

    def _preconditions(self, store: _Store, there: Json, wanted: Json, *, delete: bool = False) -> None:
        metadata = there["metadata"]
        version = wanted.get("resourceVersion")
        if version not in (None, "", "0") and version != metadata["resourceVersion"]:
            raise _Refused(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {store.resource.plural} "{metadata["name"]}": '
                "the object has been modified; please apply your changes to the latest version and try again",
            )
        if wanted.get("uid") and wanted["uid"] != metadata["uid"]:
            told = f"UID {wanted['uid']} is not that of the object, {metadata['uid']}"
            raise _Refused(409, "Conflict", told) if delete else _Refused(422, "Invalid", told)

    def _keep(self, store: _Store, new: Json, there: Json, subresource: str) -> None:
        """Put back what a request cannot change: the identity, and the half it is not about."""
        metadata = new.setdefault("metadata", {})
        if subresource == "status":
            status = new.get("status")
            entries = metadata.get("managedFields")
            kept = field_sets.copied(there)
            new.clear()
            new |= kept
            metadata = new["metadata"]
            if entries is not None:
                metadata["managedFields"] = entries
            new.pop("status", None)
            if status is not None:
                new["status"] = field_sets.copied(status)
        elif store.has_status:
            new.pop("status", None)
            if "status" in there:
                new["status"] = field_sets.copied(there["status"])
        for key in ("name", "namespace", *_OWN_FIELDS[:-1]):
            metadata.pop(key, None)
            if key in there["metadata"]:
                metadata[key] = there["metadata"][key]
        new |= {"apiVersion": there["apiVersion"], "kind": there["kind"]}
        self._owners(metadata)

    def _owners(self, metadata: Json) -> None:
        """Ask for the permission that clusters with OwnerReferencesPermissionEnforcement ask for."""
        for owner in metadata.get("ownerReferences") or ():
            if owner.get("blockOwnerDeletion"):
                self._allow("update", self.store(owner["kind"]).resource, "finalizers", "", owner["name"])

    def _save(
        self,
        store: _Store,
        new: Json,
        there: Json | None,
        manager: str,
        operation: str,
        subresource: str,
        user: str = "",
        verb: str = "",
        applied: Json | None = None,
    ) -> Json:
        kind = store.resource.kind
        if store.schema is not None:
            new = _shaped(new, store.schema)
        elif kind in _DEFAULTS and "spec" in new:
            new["spec"] = {**field_sets.copied(_DEFAULTS[kind]), **new["spec"]}
        metadata = new["metadata"]
        if there is not None:
            for key in _IMMUTABLE.get(kind, ()):
                if (new.get("spec") or {}).get(key) != (there.get("spec") or {}).get(key):
                    raise _Refused(422, "Invalid", f"{kind} is invalid: spec.{key}: field is immutable")
            if kind == "ControllerRevision" and new.get("data") != there.get("data"):
                raise _Refused(422, "Invalid", "ControllerRevision is invalid: data: field is immutable")
            if kind == "ConfigMap" and there.get("immutable") and new.get("data") != there.get("data"):
                raise _Refused(
                    422, "Invalid", "ConfigMap is invalid: data: field is immutable when `immutable` is set"
                )
        if manager:
            if operation == "Update" or there is None:
                entries = metadata.get("managedFields", [])
                metadata["managedFields"] = _owned(
                    entries, there, new, manager, operation, subresource, store, applied
                )
        elif there is not None:
            metadata["managedFields"] = field_sets.copied(there["metadata"].get("managedFields", []))
        if there is not None and _same(new, there):
            return field_sets.copied(there)
        if there is not None and store.generations and new.get("spec") != there.get("spec"):
            metadata["generation"] = there["metadata"].get("generation", 1) + 1
        place = metadata["namespace"], metadata["name"]
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        if user != "" or verb:
            what = store.resource.plural + (f"/{subresource}" if subresource else "")
            self.writes.append(Write(verb, what, *place, user))
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            store.objects[place] = new
            self._gone(store, place)
            return field_sets.copied(new)
        store.objects[place] = new
        store.log.append((self.version, "MODIFIED" if there else "ADDED", field_sets.copied(new), there))
        if there is None and self.collects:
            self.collect()
        self.changed.notify_all()
        return field_sets.copied(store.objects.get(place, new))

    def _delete(self, store: _Store, namespace: str, name: str, options: Json, user: str) -> Json:
        there = self._there(store, namespace, name)
        self._preconditions(store, there, options.get("preconditions") or {}, delete=True)
        policy = options.get("propagationPolicy", "Background")
        what = store.resource.plural
        if "deletionTimestamp" in there["metadata"]:
            return field_sets.copied(there)
        self.writes.append(Write("delete", what, namespace, name, user))
        if policy == "Orphan":
            for other in self.stores.values():
                for place, item in list(other.objects.items()):
                    owners = item["metadata"].get("ownerReferences") or []
                    kept = [one for one in owners if one["uid"] != there["metadata"]["uid"]]
                    if len(kept) != len(owners):
                        orphan = field_sets.copied(item)
                        orphan["metadata"]["ownerReferences"] = kept
                        self._store(other, place, orphan, item)
        finalizers = list(there["metadata"].get("finalizers") or [])
        if policy == "Foreground":
            finalizers.append(_FOREGROUND)
        if finalizers:
            new = field_sets.copied(there)
            new["metadata"]["deletionTimestamp"] = time.strftime(
                "%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now())
            )
            new["metadata"]["finalizers"] = finalizers
            if store.generations:
                new["metadata"]["generation"] = there["metadata"].get("generation", 1) + 1
            self._store(store, (namespace, name), new, there)
            answer = field_sets.copied(new)
        else:
            self._gone(store, (namespace, name))
            details = {"name": name, "kind": what, "uid": there["metadata"]["uid"]}
            answer = {
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Success",
                "details": details,
            }
        if self.collects:
            self.collect()
        return answer

    def collect(self) -> None:
        """Be the garbage collector: delete what has lost all its owners, and finish foreground deletions."""
        with self.lock:
            while True:
                uids = {
                    item["metadata"]["uid"]
                    for store in self.stores.values()
                    for item in store.objects.values()
                }
                dying = {
                    item["metadata"]["uid"]
                    for store in self.stores.values()
                    for item in store.objects.values()
                    if _FOREGROUND in (item["metadata"].get("finalizers") or ())
                }
                done = True
                held = set()
                for store in self.stores.values():
                    for place, item in list(store.objects.items()):
                        owners = {one["uid"] for one in item["metadata"].get("ownerReferences") or ()}
                        if not owners:
                            continue
                        if not owners & uids or owners & dying and not owners & (uids - dying):
                            if item["metadata"].get("finalizers"):
                                held |= owners
                                if "deletionTimestamp" not in item["metadata"]:
                                    self._mark(store, place, item)
                                    done = False
                            else:
                                self._gone(store, place)
                                done = False
                for store in self.stores.values():
                    for place, item in list(store.objects.items()):
                        if item["metadata"]["uid"] in dying - held and done:
                            new = field_sets.copied(item)
                            new["metadata"]["finalizers"].remove(_FOREGROUND)
                            if new["metadata"]["finalizers"]:
                                self._store(store, place, new, item)
                            else:
                                store.objects[place] = new
                                self._gone(store, place)
                            done = False
                if done:
                    return

    def _mark(self, store: _Store, place: tuple[str, str], item: Json) -> None:
        new = field_sets.copied(item)
        new["metadata"]["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now()))
        self._store(store, place, new, item)

    def _store(self, store: _Store, place: tuple[str, str], new: Json, there: Json) -> None:
        self.version += 1
        new["metadata"]["resourceVersion"] = str(self.version)
        store.objects[place] = new
        store.log.append((self.version, "MODIFIED", field_sets.copied(new), there))
        self.changed.notify_all()

    def _gone(self, store: _Store, place: tuple[str, str]) -> None:
        there = store.objects.pop(place)
        self.version += 1
        last = field_sets.copied(there)
        last["metadata"]["resourceVersion"] = str(self.version)
        store.log.append((self.version, "DELETED", last, there))
        if self.collects:
            self.collect()
        self.changed.notify_all()


class DirectTransport:
    """Requests without sockets: each watch tells what there is to tell and ends."""

    def __init__(self, server: ApiServer, user: str = "") -> None:
        self.server = server
        self.user = user

    def send(self, request: Request) -> Reply:
        return self.server.answer(request, self.user)

    @contextlib.contextmanager
    def stream(self, request: Request) -> Iterator[tuple[Reply, Iterator[bytes]]]:
        if request.path.endswith("/log"):
            yield self.server.log(request, wait=False)
        else:
            yield self.server.watch(request, wait=False)


@contextlib.contextmanager
def listening(server: ApiServer) -> Iterator[str]:
    """Serve over HTTP; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            address = urlsplit(self.path)
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size) if size else None
            content_type = self.headers.get("Content-Type") or "application/json"
            query = dict(parse_qsl(address.query, keep_blank_values=True))
            request = Request(self.command, address.path, query, body, content_type)  # type: ignore[arg-type]
            if query.get("watch") in ("true", "1"):
                self._stream(*server.watch(request, wait=True))
                return
            if address.path.endswith("/log"):
                self._stream(*server.log(request, wait=True))
                return
            try:
                reply = server.answer(request, self.headers.get("X-User", ""))
            except (Unreachable, Crash):
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def _stream(self, reply: Reply, lines: Iterator[bytes]) -> None:
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            if reply.status >= 400:
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for line in lines:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            except (Unreachable, OSError):
                self.close_connection = True

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # whoever asked went away

    front = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{front.server_address[1]}"
    finally:
        front.shutdown()
        thread.join()
        front.server_close()


def _owned(
    entries: list[Json],
    there: Json | None,
    new: Json,
    manager: str,
    operation: str,
    subresource: str,
    store: _Store,
    applied: Json | None,
) -> list[Json]:
    """Return who owns what after a write that is no apply to an object that is there."""
    if there is not None:
        fields = field_sets.differing(there, new)
    else:  # what is created is owned with its defaults, what is applied without
        fields = field_sets.of(applied if operation == "Apply" and applied is not None else new)
    kept = []
    mine: field_sets.Fields = fields
    everything = field_sets.of(new)
    for entry in entries:
        owned = field_sets.decoded(entry["fieldsV1"]) & everything
        if _is(entry, manager, operation, subresource):
            mine |= owned
            continue
        owned -= fields
        if owned:
            kept.append({**entry, "fieldsV1": field_sets.encoded(owned)})
    if mine:
        entry = {
            "manager": manager,
            "operation": operation,
            "apiVersion": store.resource.api_version,
            "fieldsType": "FieldsV1",
            "fieldsV1": field_sets.encoded(mine),
        }
        kept.append(entry | ({"subresource": subresource} if subresource else {}))
    return kept


def _is(entry: Json, manager: str, operation: str, subresource: str) -> bool:
    return (entry["manager"], entry["operation"], entry.get("subresource", "")) == (
        manager,
        operation,
        subresource,
    )


def _same(one: Json, other: Json) -> bool:
    def bare(item: Json) -> Json:
        metadata = {k: v for k, v in item["metadata"].items() if k not in ("resourceVersion", "generation")}
        entries = metadata.pop("managedFields", [])
        return {**item, "metadata": metadata} | {
            "managers": sorted(json.dumps(entry, sort_keys=True) for entry in entries)
        }

    return bare(one) == bare(other)


def _only(body: Json, subresource: str, has_status: bool) -> Json:
    """Return the half of an applied object that the request is about."""
    if subresource == "status":
        return {key: body[key] for key in ("apiVersion", "kind", "status") if key in body}
    config = _without(body, "status") if has_status else dict(body)
    metadata = {k: v for k, v in (body.get("metadata") or {}).items() if k not in ("uid", "resourceVersion")}
    return {**config, "metadata": metadata}


def _scale(item: Json) -> Json:
    metadata = {key: item["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")}
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": metadata,
        "spec": {"replicas": item["spec"].get("replicas", 0)},
        "status": {"replicas": (item.get("status") or {}).get("replicas", 0)},
    }


def _shaped(value: Any, schema: Json, root: bool = True) -> Any:
    """Return ``value`` without what the schema does not know and with its defaults."""
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        loose = schema.get("x-kubernetes-preserve-unknown-fields")
        result = {
            key: _shaped(below, known[key], False)
            if key in known and not (root and key == "metadata")
            else below
            for key, below in value.items()
            if key in known or loose or (root and key in ("apiVersion", "kind", "metadata"))
        }
        for key, below in known.items():
            if key not in result and "default" in below:
                result[key] = field_sets.copied(below["default"])
                result[key] = _shaped(result[key], below, False)
        return result
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        return {key: _shaped(below, schema["additionalProperties"], False) for key, below in value.items()}
    if isinstance(value, list) and "items" in schema:
        return [_shaped(one, schema["items"], False) for one in value]
    return value


def _seen(kind: str, new: Json, old: Json | None, namespace: str, selector: str) -> list[bytes]:
    """Return what a watch with this selector is told of a change: leaving the selection is a deletion."""
    if namespace and new["metadata"]["namespace"] != namespace:
        return []
    was = old is not None and _matches(old, selector)
    now = _matches(new, selector) and kind != "DELETED"
    if now:
        return [_line("MODIFIED" if was else "ADDED", new)]
    return [_line("DELETED", new)] if was else []


def _matches(item: Json, selector: str) -> bool:
    labels = item["metadata"].get("labels") or {}
    return all(
        labels.get(part.partition("=")[0]) == part.partition("=")[2].lstrip("=")
        for part in selector.split(",")
        if part
    )


def _merge_patch(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = target if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge_patch(result.get(key), value)
    return result


def _body(request: Request) -> Json:
    if not request.body:
        return {}
    try:
        body = json.loads(request.body)
    except ValueError:
        body = yaml.safe_load(request.body)
    if not isinstance(body, dict):
        raise _Refused(400, "BadRequest", "the body is not an object")
    return body


def _line(kind: str, item: Json) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode() + b"\n"


def _reply(answer: Json | _Refused) -> Reply:
    if isinstance(answer, _Refused):
        headers = {} if answer.retry_after is None else {"retry-after": str(answer.retry_after)}
        return Reply(answer.status, headers, json.dumps(answer.body()).encode())
    return Reply(200, {}, json.dumps(answer).encode())


def _without(item: Json, *keys: str) -> Json:
    return {key: value for key, value in item.items() if key not in keys}
