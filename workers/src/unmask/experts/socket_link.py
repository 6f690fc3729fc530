"""Sessions with a shard on the same machine: frames in shared memory, doorbells over a Unix socket.

A frame is written to a place of the memory, and eight bytes on the socket say which place; the answer comes
likewise. It is read where it lies: the place is used again once nobody holds a view of it any more. If views
are held for long, answers are copied, so there are always places for what is to be sent.

A second connection asks the shard several times a second what it holds, so that one that is frozen is
noticed, and one that only computes for long is not taken for frozen.
"""

import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from unmask.experts.frames import Frame, Message, Status, encode_refusal, header_of
from unmask.experts.links import Arrived, Inbox, Session, SessionLink, accepted
from unmask.experts.shared_memory import Memory, check_peer
from unmask.experts.signals import MOST_BYTES, Kind, Signal, packed, unpacked
from unmask.v1 import experts_pb2 as pb

__all__ = ["SLOTS", "SocketLink"]

SLOTS = 32
"""Frames on their way to one shard, and answers of it that are held; others wait, or are copied."""
_HANDSHAKE_S = 1.0
_ASK_S = 0.25
_SILENCE_S = 1.0
"""Without an answer to what was asked, after which the shard counts as frozen."""
_BELL_BYTES = 1 << 10


class SocketLink(SessionLink):
    """Sessions with the shard that listens at a path. See :class:`Link`.

    Args:
        path: Of its socket.
        offer: What a session begins with.
        inbox: Where news go.
        max_tokens: Most rows in one frame, even if the shard takes more.
        max_bytes: The largest message of so many rows.
    """

    def __init__(
        self, path: Path, offer: pb.SessionOffer, inbox: Inbox, *, max_tokens: int, max_bytes: int
    ) -> None:
        self._path = path
        self._offer = pb.ShardFrame(offer=offer).SerializeToString()
        self._max_tokens = max_tokens
        self._slot_bytes = Memory.rounded(max_bytes)
        super().__init__(f"unix:{path}", inbox)

    @contextmanager
    def _opened(self) -> Iterator[Session]:
        with _connected(self._path) as bells, _connected(self._path) as asking:
            descriptor = Memory.created(SLOTS, self._slot_bytes)
            try:
                memory = Memory(descriptor, SLOTS, self._slot_bytes)
                signal = Signal(Kind.OFFER, SLOTS, self._slot_bytes, self._offer)
                socket.send_fds(bells, [packed(signal)], [descriptor])
            finally:
                os.close(descriptor)
            session = _SocketSession(self.name, self._inbox, memory, bells, asking, self._max_tokens)
            session.take(_description(bells.recv(MOST_BYTES)))
            for connection in (bells, asking):
                connection.settimeout(None)
            try:
                yield session
            finally:
                session.end()


class _SocketSession(Session):
    def __init__(
        self,
        link: str,
        inbox: Inbox,
        memory: Memory,
        bells: socket.socket,
        asking: socket.socket,
        max_tokens: int,
    ) -> None:
        super().__init__()
        self._link, self._inbox = link, inbox
        self._memory, self._bells, self._asking = memory, bells, asking
        self._most_tokens = max_tokens
        self._lock = threading.Lock()
        self._over = False
        self._waiting: deque[Frame | bytes] = deque()
        self._rung: set[int] = set()
        """Places of frames that were not answered yet."""
        self._free = list(range(memory.slots))
        """The last one is used first: a place that was used just now is in the processor's cache."""

    def take(self, description: pb.DescribeResponse) -> None:
        super().take(description)
        self.max_tokens = min(self.max_tokens, self._most_tokens)
        if description.draining and not self._rung:
            self.leave()

    def send(self, frame: Frame | bytes) -> None:
        if len(frame) > self._memory.slot_bytes:  # made for another shard, which takes larger ones
            told = f"a frame of {len(frame)} bytes, at most {self._memory.slot_bytes} go to {self._link}"
            self._inbox.put(
                Arrived(self._link, encode_refusal(header_of(bytes(frame)), Status.MALFORMED, told))
            )
            return
        with self._lock:
            self._waiting.append(frame)
            self._ring()

    def leave(self) -> None:
        self._shut(socket.SHUT_WR)

    def break_off(self) -> None:
        self._shut(socket.SHUT_RDWR)

    def refresh(self) -> None:
        with self._lock:
            if self._over:
                return
            try:
                self._asking.send(packed(Signal(Kind.ASK)), socket.MSG_DONTWAIT)
            except OSError:
                return  # whether the shard is there, `messages` finds out

    def end(self) -> None:
        """Use the connections no more; they are about to be closed."""
        with self._lock:
            self._over = True

    def _shut(self, how: int) -> None:
        with self._lock:
            if not self._over:
                _shut_down(self._bells, how)

    def messages(self) -> Iterator[Message]:
        poll = select.poll()
        for connection in (self._bells, self._asking):
            poll.register(connection, select.POLLIN)
        asked: float | None = None
        ask_at = time.monotonic() + _ASK_S
        while True:
            now = time.monotonic()
            ready = {descriptor for descriptor, _ in poll.poll(1000 * _ASK_S)}
            if self._asking.fileno() in ready:
                self.take(_description(self._asking.recv(MOST_BYTES)))
                asked, ask_at = None, now + _ASK_S
            elif asked is not None and now - asked > _SILENCE_S:
                raise TimeoutError(f"no sign of life for {now - asked:.1f} s")
            elif asked is None and now > ask_at:
                self.refresh()
                asked = now
            if self._bells.fileno() in ready:
                packet = self._bells.recv(_BELL_BYTES)
                if not packet:
                    return
                yield self._answered(packet)

    def _ring(self) -> None:
        """Send what waits, as far as there are places; with the lock."""
        while self._waiting and self._free and not self._over:
            frame, slot = self._waiting.popleft(), self._free.pop()
            self._rung.add(slot)
            place = self._memory.request(slot)
            if isinstance(frame, Frame):
                frame.write(place)
            else:
                place[: len(frame)] = frame
            try:
                self._bells.send(packed(Signal(Kind.FRAME, slot, len(frame))), socket.MSG_DONTWAIT)
            except OSError:
                _shut_down(self._bells, socket.SHUT_RDWR)
                return

    def _answered(self, packet: bytes) -> Message:
        """The answer that a doorbell is about.

        Raises:
            ValueError: It is about none.
        """
        signal = _understood(packet)
        with self._lock:
            if signal.kind != Kind.FRAME or signal.slot not in self._rung:
                raise ValueError(
                    f"a doorbell of kind {signal.kind} for place {signal.slot}, which has no frame"
                )
            if signal.length > self._memory.slot_bytes:
                raise ValueError(f"an answer of {signal.length} bytes, a place has {self._memory.slot_bytes}")
            self._rung.remove(signal.slot)
            answer = self._taken(signal.slot, signal.length)
            self._ring()
        return answer

    def _taken(self, slot: int, length: int) -> Message:
        view = self._memory.reply(slot)[:length].toreadonly()
        if 2 * len(self._free) < self._memory.slots:
            answer = bytes(view)
            self._free.append(slot)
            return answer
        array = np.frombuffer(view, dtype=np.uint8)
        # Tensors made of the answer hold the array, which can be watched, as a view cannot.
        weakref.finalize(array, self._free.append, slot).atexit = False
        return array.data


@contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    """A connection with a process of the same user."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_HANDSHAKE_S)
        connection.connect(str(path))
        check_peer(connection)
        yield connection


def _understood(packet: bytes) -> Signal:
    """What a shard says.

    Raises:
        ValueError: It refuses, or is gone, or makes no sense.
    """
    if not packet:
        raise ValueError("the shard closed the connection")
    signal = unpacked(packet)
    if signal.kind == Kind.REFUSED:
        raise ValueError(signal.body.decode(errors="replace"))
    return signal


def _description(packet: bytes) -> pb.DescribeResponse:
    """What a shard says that it holds.

    Raises:
        ValueError: It says something else.
        DecodeError: The bytes are no message.
    """
    signal = _understood(packet)
    if signal.kind != Kind.ACCEPTED:
        raise ValueError(f"got a signal of kind {signal.kind}, expected what the shard holds")
    return accepted(signal.body)


def _shut_down(connection: socket.socket, how: int) -> None:
    try:
        connection.shutdown(how)
    except OSError:
        return  # it is closed already
