"""What an engine and a shard tell each other beside frames, where no gRPC does that.

A session begins with an offer, which is accepted or refused, as over gRPC. Then frames go to and fro; and the
engine asks now and then what the shard holds, which tells both that the other one is alive.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

__all__ = ["MOST_BYTES", "Kind", "Signal", "packed", "unpacked"]

MOST_BYTES = 1 << 16
"""Of a packet, at most: descriptions have two numbers for each part and one for each expert."""
_HEAD = struct.Struct("<BxHI")


class Kind(IntEnum):
    """What a signal says."""

    OFFER = 1
    """The engine's first; a ShardFrame."""
    ACCEPTED = 2
    """A ShardFrame that says what the shard holds: the answer to an offer, and to ASK."""
    REFUSED = 3
    """The session does not begin, or ends; says why."""
    FRAME = 4
    """A frame, or its answer."""
    ASK = 5
    """The engine would like to know what the shard holds."""
    END = 6
    """The engine ends the session in good order."""


class Signal(NamedTuple):
    """A packet."""

    kind: int
    slot: int = 0
    """Of a frame: where in shared memory it lies. Of an offer: how many such places there are."""
    length: int = 0
    """Of a frame: its bytes. Of an offer: the bytes that a place has."""
    body: bytes = b""


def packed(signal: Signal) -> bytes:
    """A signal as a packet: 8 bytes, and what follows them."""
    return _HEAD.pack(signal.kind, signal.slot, signal.length) + signal.body


def unpacked(packet: bytes) -> Signal:
    """Read a packet.

    Raises:
        ValueError: It is none; what it says may still be nonsense.
    """
    if len(packet) < _HEAD.size:
        raise ValueError(f"got a packet of {len(packet)} bytes, it has at least {_HEAD.size}")
    kind, slot, length = _HEAD.unpack_from(packet)
    return Signal(kind, slot, length, packet[_HEAD.size :])
