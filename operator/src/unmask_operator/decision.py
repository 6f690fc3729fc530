"""What a reconciler is: a pure function from what is observed to what should be, and the words for both.

Nothing here talks to anything. ``unmask_operator.control`` gathers an :class:`Observed`, calls the function,
and carries the :class:`Decision` out. Objects are plain JSON, as the API server sends them.

A decision may be carried out in part and then forgotten: the process dies, a write fails, another replica
takes over. So a decision function must draw no conclusion about children from the status ("the attempt is 2,
so the Job is there"); it looks at the children. The status records what was *decided* and cannot be seen
elsewhere (the number of the attempt, why the last one failed), and it is written before the children that
follow from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "Answer",
    "Decision",
    "Deletion",
    "Event",
    "JsonObject",
    "Observed",
    "Question",
    "Reconciler",
]

JsonObject = dict[str, Any]
"""A Kubernetes object, or a part of one, as JSON: keys in camel case."""


@dataclass(frozen=True)
class Question:
    """What to ask a pod over HTTP, between this pass and the next."""

    uid: str
    """``metadata.uid`` of the pod: its successor of the same name is another one."""
    url: str
    """``http://ADDRESS:PORT/PATH``; no redirect is followed."""


@dataclass(frozen=True)
class Answer:
    """What a pod last answered. Whoever can reach its port may have written it: check it."""

    text: bytes
    """The body, 4,096 bytes at most."""
    at: float
    """When it came, in seconds since 1970-01-01 UTC."""


@dataclass(frozen=True)
class Observed:
    """One custom resource and everything that belongs to it, never older than our own writes."""

    resource: JsonObject
    """The custom resource, with the defaults of its schema filled in by the API server."""
    children: Mapping[str, Sequence[JsonObject]]
    """Kind -> objects of that kind, ordered by name; every kind of the reconciler is there, if only empty.

    A child is what carries an owner reference to the resource's UID, or to the UID of such a child (a Job's
    pods), and an event about one; namesakes that belong to somebody else are not among them. Children under
    deletion are: they carry ``metadata.deletionTimestamp``. An optional kind that the cluster does not serve
    is missing.
    """
    now: float
    """Seconds since 1970-01-01 UTC; the only clock that a decision may use."""
    conflicts: frozenset[tuple[str, str]] = frozenset()
    """(kind, name) of children that cannot be made: somebody else's object has the name.

    Set in the pass after one that met them, and until the child is made: go on listing it in ``apply``, since
    it is tried again in each pass, with growing delays; say in the status and by an event what stands in the
    way.
    """
    rejections: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(kind, name) -> the API server's message, of children it refused as invalid or forbidden (quota,
    admission).

    Set, kept and tried again as ``conflicts`` are.
    """
    answers: Mapping[str, Answer] = field(default_factory=dict)
    """Pod's ``metadata.uid`` -> its last answer to what earlier decisions asked."""
    referred: Mapping[str, JsonObject] = field(default_factory=dict)
    """Name -> resource of the same namespace that the reconciler's ``refers`` named, if there."""
    served: frozenset[str] = frozenset()
    """Group and version of the APIs that the cluster serves, such as ``scheduling.k8s.io/v1beta1``."""


@dataclass(frozen=True)
class Deletion:
    """A child to delete; the API server refuses where the name meanwhile belongs to another object."""

    kind: str
    """One of the reconciler's ``owns``, or the kind of the resource itself (its time to live is over)."""
    name: str
    """Its name, in the resource's namespace."""
    uid: str
    """Its ``metadata.uid`` as observed: what is deleted is this object and no namesake."""
    propagation: Literal["Foreground", "Background", "Orphan"] = "Background"
    """Foreground: it stays, marked as being deleted, until what it owns is gone."""


@dataclass(frozen=True)
class Event:
    """A line for ``kubectl events``; the same one is not written twice in five minutes."""

    reason: str
    """Why, in CamelCase, such as ``Restarting``; at most 128 characters."""
    note: str
    """A sentence for people; at most 1,024 characters. Put no counters or times in: each new text is a new
    event."""
    type: Literal["Normal", "Warning"] = "Normal"
    """Warning: somebody should look."""
    action: str = "Reconcile"
    """What the operator did, in CamelCase; at most 128 characters."""


@dataclass(frozen=True)
class Decision:
    """What should be; carried out in order: events, status, deletions, applications."""

    apply: Sequence[JsonObject] = ()
    """Children as they should be: full objects with ``apiVersion``, ``kind`` and ``metadata.name``.

    Namespace, owner reference and the label ``app.kubernetes.io/managed-by`` are added. Fields that others
    set (``spec.suspend`` under Kueue) are left out here, and stay as they are. What already is so is not
    written. A child that is left out is *not* deleted.
    """
    restore: Sequence[JsonObject] = ()
    """Children that somebody may have changed by hand, as they were made: written again where that is so.

    One that was made otherwise, by another version of the operator, is left as it is.
    """
    delete: Sequence[Deletion] = ()
    """Children that should go; one that is already being deleted is not deleted again."""
    status: JsonObject | None = None
    """The whole status; ``None`` leaves it alone. Written only where it differs from the observed one."""
    requeue_after: float | None = None
    """Seconds until the function is to be called again though nothing changed; ``None``: only upon a
    change."""
    ask: Sequence[Question] = ()
    """What to ask before the next pass; a question without an answer in two seconds is dropped."""
    events: Sequence[Event] = ()
    """Written before the status, so that a crash between the two repeats an event rather than losing it."""


@dataclass(frozen=True)
class Reconciler:
    """A custom resource and the function that decides about it."""

    kind: str
    """Kind of the custom resource; one of ``unmask_operator.resources``."""
    owns: Sequence[str]
    """Kinds it applies and deletes."""
    decide: Callable[[Observed], Decision]
    """Pure: the same observation gives the same decision, and nothing is changed by the call."""
    reads: Sequence[str] = ()
    """Kinds it only looks at, such as the pods of its Jobs, and ``unmask_operator.resources.WARNINGS``."""
    optional: Sequence[str] = ()
    """Kinds it applies and deletes where the cluster serves them."""
    refers: Callable[[JsonObject], Sequence[str]] = lambda resource: ()
    """Names of resources of the same namespace that a decision looks at, too."""
    expires: bool = False
    """Whether it deletes resources of its own kind, when their time to live is over."""
    refers_to: str = ""
    """Kind of these; left out, that of the resource itself."""
