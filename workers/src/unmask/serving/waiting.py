"""Requests that wait for a row, in the order in which they will be taken up.

The highest priority goes first, and of one priority whoever came first. What admission asks at every call
(how many wait, how many tokens they have, how many stand before a new one) is kept up to date as requests
come and go, and no request is looked for by going through the others: one more costs the same behind ten
thousand as behind ten.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["WaitingLine"]


class _Waits(Protocol):
    """What is equal to itself alone, and keeps its priority and its tokens while it waits."""

    @property
    def priority(self) -> int: ...

    @property
    def tokens(self) -> int: ...


_Request = TypeVar("_Request", bound=_Waits)


class WaitingLine(Generic[_Request]):
    """A queue by priority, with its totals. Its owner guards it: it has no lock.

    Iterating gives the order in which requests will be taken up; ``len`` says how many they are.
    """

    def __init__(self) -> None:
        self._tokens_of: dict[_Request, int] = {}
        """As they were counted when the request came."""
        self._lines: dict[int, OrderedDict[_Request, None]] = {}
        """By priority; none is empty. They are as many as there are different priorities, 201 on the wire."""
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._tokens_of)

    def __iter__(self) -> Iterator[_Request]:
        for priority in sorted(self._lines, reverse=True):
            yield from self._lines[priority]

    @property
    def tokens(self) -> int:
        """Of all that wait together."""
        return self._tokens

    @property
    def first(self) -> _Request:
        """The one to be taken up next; there must be one."""
        return next(iter(self._lines[max(self._lines)]))

    def ahead_of(self, priority: int) -> int:
        """How many would be taken up before one of this priority that comes now."""
        return sum(len(line) for level, line in self._lines.items() if level >= priority)

    def join(self, request: _Request) -> None:
        """Stand behind all of its priority; it must not wait already."""
        assert request not in self._tokens_of
        tokens = request.tokens
        self._tokens_of[request] = tokens
        self._tokens += tokens
        self._lines.setdefault(request.priority, OrderedDict())[request] = None

    def leave(self, request: _Request) -> bool:
        """Go from wherever it stands; returns whether it was there."""
        tokens = self._tokens_of.pop(request, None)
        if tokens is None:
            return False
        self._tokens -= tokens
        line = self._lines[request.priority]
        del line[request]
        if not line:
            del self._lines[request.priority]
        return True

    def clear(self) -> None:
        """Let all go."""
        self._tokens_of.clear()
        self._lines.clear()
        self._tokens = 0
