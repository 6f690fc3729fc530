"""Whom to ask next, and how long to wait: decisions alone.

A frame goes to one shard that holds the part. Where the answer is late beyond what late answers usually are,
the same frame goes to another one as well (a hedge), and the first answer counts: both are the same to the
bit. Where it is later still, or where a shard's connection breaks or its answer is damaged, the shard is
passed over for a while (:mod:`unmask.standing`).

Times are in seconds, on any monotonic clock.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["Pace", "Timing", "next_holder"]

_HEDGE_S = (0.02, 0.5)
"""Shortest and longest wait until a frame is sent to a second shard."""
_GIVE_UP_S = (0.1, 1.0)
"""Shortest and longest wait until the first one is held to be out."""
_ENOUGH = 32
_REMEMBERED = 256
_AGAIN_AFTER = 32
"""Answers after which percentiles are taken anew."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long to wait for an answer."""

    hedge_s: float
    """Until the frame is sent to another shard as well."""
    give_up_s: float
    """Until the shard is passed over."""


_FIRST = Timing(hedge_s=0.5, give_up_s=1.0)
"""Before anything was measured."""


class Pace:
    """How long answers take, and what that makes the waits: 2 x the 95th percentile, 4 x the 99th."""

    def __init__(self, first: Timing = _FIRST) -> None:
        """``first`` holds until enough was measured."""
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._since = 0
        self.timing = first

    def observe(self, seconds: float) -> None:
        """Take up one answer."""
        self._seconds.append(seconds)
        self._since += 1
        if len(self._seconds) >= _ENOUGH and self._since >= _AGAIN_AFTER:
            self._since = 0
            ordered = sorted(self._seconds)
            p95, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.95, 0.99))
            hedge = _within(2 * p95, _HEDGE_S)
            self.timing = Timing(hedge, max(hedge, _within(4 * p99, _GIVE_UP_S)))


def next_holder(
    holders: Iterable[str],
    *,
    tried: Iterable[str],
    ready: Callable[[str], bool],
    banned: Callable[[str], bool],
) -> str | None:
    """The shard to send a frame to: the first that is ready, untried and not banned.

    Where only banned ones are left, the first of these is taken: better one that was late than none.

    Args:
        holders: Those that hold the part, the one to ask first in front.
        tried: Those that the frame was sent to already.
        ready: Whether a shard is connected.
        banned: Whether it is passed over.

    Returns:
        None if there is none.
    """
    before = set(tried)
    left = [name for name in holders if name not in before and ready(name)]
    return next((name for name in left if not banned(name)), left[0] if left else None)


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
