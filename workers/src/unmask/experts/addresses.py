"""Where shards are, as ``--experts`` says it."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from unmask.errors import UsageError

__all__ = [
    "Address",
    "GroupAddress",
    "GrpcAddress",
    "SocketAddress",
    "check_addresses",
    "check_store",
    "parse_addresses",
]

_PORT = re.compile(r"(.+):(\d{1,5})")
_GROUP = re.compile(r"group:(.+)\?shards=(\d{1,6})")
_STORE = re.compile(r"tcp://.+:(\d{1,5})")
_SOCKET = "unix:"


@dataclass(frozen=True, slots=True)
class GrpcAddress:
    """A port that answers gRPC."""

    target: str
    """``HOST:PORT``."""


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """A shard on the same machine, to share memory with."""

    path: Path


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """All shards of a torch.distributed job, of which the engine is rank 0."""

    store: str
    """``tcp://HOST:PORT``: where the engine waits for the others to come."""
    shards: int


Address: TypeAlias = GrpcAddress | SocketAddress | GroupAddress


def parse_addresses(addresses: Sequence[str]) -> tuple[Address, ...]:
    """Addresses of shards, of any kind.

    Raises:
        UsageError: None, one twice, two groups, or one that is none.
    """
    found = tuple(_parsed(address) for address in addresses)
    if not found or len(set(found)) != len(found):
        raise UsageError(f"--experts: got {list(addresses)}, expected each shard once, and one at least")
    if sum(isinstance(address, GroupAddress) for address in found) > 1:
        raise UsageError(f"--experts: got {list(addresses)}, a process can be in one group at most")
    return found


def check_addresses(addresses: Sequence[str]) -> tuple[str, ...]:
    """Addresses of shards that answer gRPC.

    Raises:
        UsageError: None, one twice, or one without a port.
    """
    found = parse_addresses(addresses)
    others = [
        text for text, address in zip(addresses, found, strict=True) if not isinstance(address, GrpcAddress)
    ]
    if others:
        raise UsageError(f"got {others[0]!r}, expected HOST:PORT, for gRPC alone can do this")
    return tuple(addresses)


def check_store(store: str, option: str) -> str:
    """The place where the ranks of a group meet.

    Args:
        store: ``tcp://HOST:PORT``.
        option: Where it was given.

    Raises:
        UsageError: It is none.
    """
    match = _STORE.fullmatch(store)
    if match is None or not 0 < int(match[1]) < 1 << 16:
        raise UsageError(f"{option}: got {store!r}, expected tcp://HOST:PORT")
    return store


def _parsed(text: str) -> Address:
    if text.startswith(_SOCKET):
        path = text.removeprefix(_SOCKET)
        if not path:
            raise UsageError(f"--experts: got {text!r}, expected unix:PATH")
        if not hasattr(os, "memfd_create"):
            raise UsageError(f"--experts: got {text!r}, which needs Linux; give HOST:PORT")
        return SocketAddress(Path(path))
    if group := _GROUP.fullmatch(text):
        if int(group[2]) == 0:
            raise UsageError(f"--experts: got {text!r}, expected one shard at least")
        return GroupAddress(check_store(group[1], "--experts"), int(group[2]))
    if _PORT.fullmatch(text) and not text.startswith("group:"):
        return GrpcAddress(text)
    raise UsageError(
        f"--experts: got {text!r}, expected HOST:PORT, unix:PATH or group:tcp://HOST:PORT?shards=N"
    )
