"""What a process thinks of another one that it asks: who fails is passed over for a while.

The while doubles with each failure and shrinks with each good answer. Times are in seconds, on any monotonic
clock.
"""

from dataclasses import dataclass, field

__all__ = ["Standing"]

_BAN_S = (0.25, 8.0)
"""For the first time, and at most."""


@dataclass(slots=True)
class Standing:
    """Of one process."""

    strikes: int = 0
    banned_until: float = field(default=float("-inf"))

    def strike(self, now: float) -> None:
        """It failed, or was far too late."""
        first, most = _BAN_S
        self.banned_until = now + min(first * 2.0**self.strikes, most)
        self.strikes += 1

    def answered(self) -> None:
        """It gave a good answer in time."""
        self.strikes = max(0, self.strikes - 1)

    def is_banned(self, now: float) -> bool:
        """Whether it is passed over."""
        return now < self.banned_until
