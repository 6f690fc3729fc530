"""How both clients connect: options of a channel, addresses, and the time a call has left."""

import time
from collections.abc import Sequence

from unmask.errors import UsageError

__all__ = ["CHANNEL_OPTIONS", "DEFAULT_TIMEOUT_S", "Deadline", "addresses"]

DEFAULT_TIMEOUT_S = 300.0

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),  # notice a server that vanished without a word
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 << 20),
)


def addresses(address: str | Sequence[str]) -> tuple[str, ...]:
    """One or several ``HOST:PORT``.

    Raises:
        UsageError: There is none.
    """
    found = (address,) if isinstance(address, str) else tuple(address)
    if not found or not all(found):
        raise UsageError("address: expected HOST:PORT, or several of them")
    return found


class Deadline:
    """A point in time that all attempts of one call share."""

    def __init__(self, timeout_s: float) -> None:
        self._end = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())
