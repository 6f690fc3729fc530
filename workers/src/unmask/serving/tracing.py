"""What each forward did for a request, if it asks for that: its whole story, within limits.

The model thread notes the events of a forward in the request's log (:class:`TraceLog`) and hands them on
with each block that is committed; the network side makes the wire's ``Trace`` of them (:class:`Story`). A
trace ends where its request does, also at a stop: forwards that run meanwhile are not in it.

Both sides have a limit, so that a request which asks for much takes a bounded amount of memory and its last
message can be sent: what is left out is the end of the story, and it is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

from unmask.diffusion.batch import Committed, Event, Filled, ForwardCounts, Persisted, Prefilled, Reused
from unmask.v1 import generation_pb2 as pb

__all__ = ["MAX_TRACE_BYTES", "Story", "TraceLog", "Traced"]

MAX_TRACE_BYTES = 1 << 20
"""Of one trace on the wire."""
_MOST_NOTED = 1 << 16
"""Forwards and positions in one log: more than :data:`MAX_TRACE_BYTES` can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """One forward, and what it brought about for one request."""

    end_seconds: float
    """From the request's arrival to the forward's end."""
    seconds: float
    rows: int
    """Requests that took part."""
    events: tuple[Event, ...]


class TraceLog:
    """What has been noted since it was last taken; the model thread's own."""

    def __init__(self, *, room: int = _MOST_NOTED) -> None:
        """Room for so many forwards and positions in all."""
        self._room = room
        self._noted: list[Traced] = []

    def note(self, forward: Traced) -> None:
        """Keep ``forward`` if there is room for it; otherwise neither it nor any later one."""
        self._room -= 1 + sum(len(event.positions) for event in forward.events if isinstance(event, Filled))
        if self._room >= 0:
            self._noted.append(forward)
        else:
            self._room = 0

    def take(self) -> tuple[Traced, ...]:
        """What has been noted, oldest first."""
        noted, self._noted = tuple(self._noted), []
        return noted


class Story:
    """A trace as the wire has it, forward by forward."""

    def __init__(self, text_of: Callable[[int], str], *, max_bytes: int = MAX_TRACE_BYTES) -> None:
        """Begin one.

        Args:
            text_of: The text of one token.
            max_bytes: Of all forwards together.
        """
        self._text_of = text_of
        self._left = max_bytes
        self._trace = pb.Trace(reused_tokens=0)
        self._block = -1
        self._filled: set[int] = set()

    def begin(self, started: pb.Started) -> None:
        """Say how it began."""
        self._trace.started.CopyFrom(started)

    def add(self, forward: Traced) -> None:
        """Tell of one more forward, if there is room for it."""
        told = pb.TracedForward(end_seconds=forward.end_seconds, seconds=forward.seconds, rows=forward.rows)
        ran = False
        for event in forward.events:
            ran = self._tell(told, event) or ran
        size = told.ByteSize() + 4  # its tag and its length
        if not ran or not self._left:
            return
        if size > self._left:
            self._left = 0  # a story with a gap would be a wrong one
            return
        self._left -= size
        self._trace.forwards.append(told)

    def end(self, usage: ForwardCounts) -> pb.Trace:
        """The trace of a request that took so much."""
        all_forwards = usage.prefill + usage.denoise + usage.persist
        self._trace.forwards_left_out = all_forwards - len(self._trace.forwards)
        return self._trace

    def _tell(self, told: pb.TracedForward, event: Event) -> bool:
        """Add an event to its forward; whether the forward did something for it."""
        match event:
            case Reused():
                self._trace.reused_tokens += event.tokens
                return False
            case Prefilled():
                told.prefilled_tokens = event.tokens
            case Persisted():
                told.persisted = True
            case Filled():
                self._tell_fills(told, event)
            case Committed():
                told.committed_tokens = len(event.token_ids)
        return True

    def _tell_fills(self, told: pb.TracedForward, event: Filled) -> None:
        if event.block_index != self._block:
            self._block, self._filled = event.block_index, set()
        told.block_index, told.step, told.masks_left = event.block_index, event.step + 1, event.masks_left
        told.positions.extend(event.positions)
        told.token_ids.extend(event.token_ids)
        told.confidences.extend(event.confidences)
        told.texts.extend(map(self._text_of, event.token_ids))
        told.edited.extend(position for position in event.positions if position in self._filled)
        self._filled.update(event.positions)
