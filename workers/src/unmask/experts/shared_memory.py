"""Memory that an engine and a shard on one machine share, a place for each frame and one for its answer.

The engine makes the memory and gives the shard its descriptor. Nobody can shrink or grow it (it is sealed),
so what one side has mapped stays there, whatever the other one does. What lies in it may change while it is
read, if the other side means harm: numbers that decide what is read or written are read once, and experts'
numbers are copied before they are looked at.
"""

import fcntl
import mmap
import os
import socket
import struct

__all__ = ["MOST_SLOTS", "Memory", "check_peer"]

MOST_SLOTS = 64
"""Frames that a session can have on their way at a time."""
_MOST_SLOT_BYTES = 1 << 30
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PEER = struct.Struct("3i")


class Memory:
    """Places for requests, then as many for replies; all of one size, each at the beginning of a page."""

    def __init__(self, descriptor: int, slots: int, slot_bytes: int) -> None:
        """Map what a descriptor stands for, which stays open.

        Raises:
            ValueError: It is not memory of this size that is sealed, or the size is none that is taken.
        """
        if not 1 <= slots <= MOST_SLOTS:
            raise ValueError(f"slots: got {slots}, must be 1 to {MOST_SLOTS}")
        if slot_bytes % mmap.PAGESIZE or not 0 < slot_bytes <= _MOST_SLOT_BYTES:
            raise ValueError(
                f"bytes of a slot: got {slot_bytes}, must be a multiple of {mmap.PAGESIZE}, "
                f"{_MOST_SLOT_BYTES} at most"
            )
        total = 2 * slots * slot_bytes
        _check(descriptor, total)
        self.slots, self.slot_bytes = slots, slot_bytes
        self._view = memoryview(mmap.mmap(descriptor, total))

    @staticmethod
    def created(slots: int, slot_bytes: int) -> int:
        """The descriptor of new memory. Pages that are never written take none."""
        descriptor = os.memfd_create("unmask-experts", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, 2 * slots * slot_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    @staticmethod
    def rounded(slot_bytes: int) -> int:
        """The size of a place that has at least so many bytes."""
        return -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    def request(self, slot: int) -> memoryview:
        """Where a frame lies."""
        return self._place(slot)

    def reply(self, slot: int) -> memoryview:
        """Where its answer lies."""
        return self._place(self.slots + slot)

    def _place(self, number: int) -> memoryview:
        return self._view[number * self.slot_bytes : (number + 1) * self.slot_bytes]


def _check(descriptor: int, total: int) -> None:
    """See to it that reading and writing mapped memory cannot end the process.

    Raises:
        ValueError: It could.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError("the descriptor is not one of memory (memfd_create)") from error
    if seals & _SEALS != _SEALS:
        raise ValueError("the memory must be sealed against another size and other seals")
    if os.fstat(descriptor).st_size != total:
        raise ValueError(f"the memory has {os.fstat(descriptor).st_size} bytes, the offer makes it {total}")
    if os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE:
        raise ValueError(
            "the memory must be of ordinary pages: whoever touches a huge one that cannot be had, ends"
        )


def check_peer(connection: socket.socket) -> None:
    """See to it that the other side is a process of the same user.

    Raises:
        ValueError: It is not.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, user, _ = _PEER.unpack(raw)
    if user != os.geteuid():
        raise ValueError(f"the other side is of user {user}, this process of {os.geteuid()}; run both as one")
