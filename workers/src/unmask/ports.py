"""Addresses that processes listen on, and what is said where one cannot be had."""

from collections.abc import Iterator
from contextlib import contextmanager

from unmask.errors import UsageError

__all__ = ["address_of", "taking"]


def address_of(host: str, port: int) -> str:
    """``HOST:PORT``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def taking(option: str, host: str, port: int) -> Iterator[str]:
    """Take a port inside the block, by the name of the option or field that sets it; gives its address.

    Raises:
        UsageError: It cannot be had.
    """
    address = address_of(host, port)
    try:
        yield address
    except (OSError, RuntimeError) as error:  # the latter is gRPC's, and does not say why
        why = getattr(error, "strerror", None) or "it may be in use"
        raise UsageError(
            f"{option}: cannot listen on {address}: {why}; free it, or name another one"
        ) from error
