"""How both clients connect: options of a channel, addresses, and the time a call has left."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc

from unmask.errors import UsageError
from unmask.transport_security import ClientTls, channel_credentials, channel_options

__all__ = ["DEFAULT_TIMEOUT_S", "Connecting", "Deadline", "addresses"]

DEFAULT_TIMEOUT_S = 300.0

_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),  # notice a server that vanished without a word
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 << 20),
)


class Connecting(NamedTuple):
    """How to connect: TLS, or plaintext where there are no credentials."""

    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def reading(cls, tls: ClientTls | None) -> "Connecting":
        """With the files as they are now.

        Raises:
            UsageError: They cannot be used.
        """
        if tls is None:
            return cls(None, _CHANNEL_OPTIONS)
        return cls(channel_credentials(tls), (*_CHANNEL_OPTIONS, *channel_options(tls)))

    def channel(self, address: str) -> grpc.Channel:
        """One for threads."""
        if self.credentials is None:
            return grpc.insecure_channel(address, options=self.options)
        return grpc.secure_channel(address, self.credentials, options=self.options)

    def async_channel(self, address: str) -> grpc.aio.Channel:
        """One for the running event loop."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options=self.options)
        return grpc.aio.secure_channel(address, self.credentials, options=self.options)


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
