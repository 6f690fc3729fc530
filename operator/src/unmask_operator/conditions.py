"""The conditions of a status: a list by type, in which a time changes only when the fact does."""

from collections.abc import Iterable
from typing import Literal

from unmask_operator.decision import JsonObject
from unmask_operator.times import seconds

__all__ = ["Conditions"]

Truth = Literal["True", "False", "Unknown"]


class Conditions:
    """The conditions of one resource; those of the last status, until they are set anew."""

    def __init__(self, before: Iterable[JsonObject], *, generation: int, now: str) -> None:
        self._before = {str(one["type"]): dict(one) for one in before}
        self._by_type = dict(self._before)
        self._generation = generation
        self._now = now

    def is_true(self, kind: str) -> bool:
        """Whether the condition ``kind`` holds."""
        return self._by_type.get(kind, {}).get("status") == "True"

    def reason(self, kind: str) -> str | None:
        """Return the reason of the condition ``kind``, if there is one."""
        return self._by_type.get(kind, {}).get("reason")

    def message(self, kind: str) -> str:
        """Return the sentence of the condition ``kind``, empty if there is none."""
        return str(self._by_type.get(kind, {}).get("message", ""))

    def since(self, kind: str) -> float | None:
        """Return since when the condition ``kind`` holds, in seconds since 1970; ``None`` if it does not."""
        one = self._by_type.get(kind, {})
        return seconds(one.get("lastTransitionTime")) if one.get("status") == "True" else None

    def set(self, kind: str, status: Truth, reason: str, message: str = "") -> None:
        """Say whether ``kind`` holds, why in a word, and why in a sentence."""
        before = self._before.get(kind, {})
        since = before.get("lastTransitionTime", self._now)
        self._by_type[kind] = {
            "type": kind,
            "status": status,
            "observedGeneration": self._generation,
            "lastTransitionTime": since if before.get("status") == status else self._now,
            "reason": reason,
            "message": message[:32768],
        }

    def drop(self, kind: str) -> None:
        """Say nothing of ``kind``."""
        self._by_type.pop(kind, None)

    def to_json(self) -> list[JsonObject]:
        """Return all, ordered by type."""
        return [self._by_type[kind] for kind in sorted(self._by_type)]
