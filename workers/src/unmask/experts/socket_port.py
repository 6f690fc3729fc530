"""Where engines on the same machine find a shard: a Unix socket, with frames in memory that both share."""

import errno
import logging
import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import grpc

from unmask.errors import UsageError
from unmask.experts.sessions import Refused, Sessions
from unmask.experts.shared_memory import Memory, check_peer
from unmask.experts.signals import MOST_BYTES, Kind, Signal, packed, unpacked

__all__ = ["SocketPort"]

logger = logging.getLogger(__name__)

_HANDSHAKE_S = 2.0
_SILENCE_S = 30.0
"""After which an engine that does not ask any more is let go; it asks several times a second."""
_MOST_DESCRIPTORS = 4
"""That are looked at; one is expected. What a packet has beyond them, the kernel closes."""
_MOST_WORDS = 512


class SocketPort:
    """A Unix socket and the threads behind it, one for each connection.

    Args:
        path: Where it listens.
        sessions: What is behind it.
        max_bytes: The largest frame.
        max_connections: At a time; an engine has two.
    """

    def __init__(self, path: Path, sessions: Sessions, *, max_bytes: int, max_connections: int) -> None:
        self._path = path
        self._sessions = sessions
        self._max_bytes = max_bytes
        self._room = threading.BoundedSemaphore(max_connections)
        self._listener: socket.socket | None = None
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._in_session = 0
        self._left = threading.Condition(self._lock)
        self._stopping = False

    def bind(self) -> None:
        """Take the path.

        Raises:
            UsageError: It cannot be had.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _remove_stale(self._path)
            os.fchmod(listener.fileno(), 0o600)  # the file gets what the socket has
            listener.bind(str(self._path))
            listener.listen()
        except OSError as error:
            listener.close()
            raise UsageError(f"--socket: cannot listen on {self._path}: {error.strerror or error}") from error
        self._listener = listener

    def start(self) -> None:
        """Answer."""
        assert self._listener is not None, "bind first"
        threading.Thread(
            target=self._accept, args=(self._listener,), name="unmask-socket", daemon=True
        ).start()

    def stop(self, grace_s: float) -> None:
        """Take no more connections, wait so long for sessions to end, and end what is left."""
        with self._lock:
            self._stopping = True
            if self._listener is not None:
                _close(self._listener)
                self._path.unlink(missing_ok=True)
            self._left.wait_for(lambda: not self._in_session, timeout=grace_s)
            threads = dict(self._threads)
        for connection in threads.values():
            _shut(connection)
        for thread in threads:
            thread.join(timeout=5)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                logger.warning("a connection could not be taken: %s", error)
                time.sleep(0.1)  # there are no descriptors left, for one
                continue
            try:
                check_peer(connection)
                if not self._room.acquire(blocking=False):
                    raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "there are too many connections")
            except Refused as refused:
                _refuse(connection, refused)
                connection.close()
            except (OSError, ValueError) as error:
                logger.warning("a connection is refused: %s", error)
                connection.close()
            else:
                self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="unmask-connection", daemon=True
        )
        with self._lock:
            if self._stopping:
                connection.close()
                return
            thread.start()  # with the lock, since `stop` joins all that it finds: one not started has no end
            self._threads[thread] = connection

    # A connection's own thread.

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, ExitStack() as descriptors:
                connection.settimeout(_HANDSHAKE_S)
                packet, given, *_ = socket.recv_fds(connection, MOST_BYTES, _MOST_DESCRIPTORS)
                for descriptor in given:
                    descriptors.callback(os.close, descriptor)
                try:
                    self._understand(connection, packet, given, descriptors)
                except Refused as refused:
                    _refuse(connection, refused)
                except ValueError as error:
                    _refuse(connection, Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)))
        except OSError as error:
            logger.info("a connection ended: %s", error)
        finally:
            with self._lock:
                del self._threads[threading.current_thread()]
            self._room.release()

    def _understand(
        self, connection: socket.socket, packet: bytes, descriptors: list[int], closing: ExitStack
    ) -> None:
        """Do what a connection's first packet is about.

        Raises:
            Refused: Nothing that there is, or no more.
            ValueError: It makes no sense.
            OSError: The connection ended.
        """
        if not packet:
            return
        first = unpacked(packet)
        match first.kind:
            case Kind.OFFER:
                if len(descriptors) != 1:
                    raise ValueError(
                        f"got {len(descriptors)} descriptors with the offer, expected one of memory"
                    )
                memory = Memory(descriptors[0], first.slot, first.length)
                closing.close()  # what is mapped stays
                self._hold_session(connection, first.body, memory)
            case Kind.ASK:
                self._tell(connection)
            case _:
                raise ValueError(f"got a signal of kind {first.kind}, expected an offer")

    def _hold_session(self, connection: socket.socket, offer: bytes, memory: Memory) -> None:
        """Answer the frames of one engine, in their order."""
        with self._lock:
            self._in_session += 1
        try:
            with self._sessions.counted() as seen:
                connection.sendall(packed(Signal(Kind.ACCEPTED, body=self._sessions.accepted(offer))))
                connection.settimeout(None)
                while packet := connection.recv(_MOST_WORDS):
                    bell = unpacked(packet)
                    most = min(memory.slot_bytes, self._max_bytes)
                    if bell.kind != Kind.FRAME or bell.slot >= memory.slots or bell.length > most:
                        raise ValueError(
                            f"got a doorbell of kind {bell.kind} for {bell.length} bytes at place "
                            f"{bell.slot}; places are 0 to {memory.slots - 1}, of up to {most} bytes"
                        )
                    frame = memory.request(bell.slot)[: bell.length].toreadonly()
                    place = memory.reply(bell.slot)
                    answer = self._sessions.answer(frame, seen, into=place)
                    if isinstance(answer, bytes):
                        place[: len(answer)] = answer
                    bell = Signal(Kind.FRAME, bell.slot, len(answer))
                    connection.send(packed(bell), socket.MSG_DONTWAIT)  # who does not listen, is let go
        finally:
            with self._lock:
                self._in_session -= 1
                self._left.notify_all()

    def _tell(self, connection: socket.socket) -> None:
        """Say what the shard holds, as often as it is asked."""
        connection.settimeout(_SILENCE_S)
        asked = True
        while asked:
            signal = Signal(Kind.ACCEPTED, body=self._sessions.told())
            connection.send(packed(signal), socket.MSG_DONTWAIT)
            packet = connection.recv(_MOST_WORDS)
            asked = bool(packet)
            if packet and unpacked(packet).kind != Kind.ASK:
                raise ValueError("got another signal on a connection that asks")


def _remove_stale(path: Path) -> None:
    """Remove the socket that a shard left which was killed.

    Raises:
        OSError: Somebody listens at the path, or something else is there.
    """
    if not path.is_socket():
        return  # what else may be there, binding finds out
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.settimeout(_HANDSHAKE_S)
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _refuse(connection: socket.socket, refused: Refused) -> None:
    words = refused.told.encode()[:_MOST_WORDS]
    try:
        connection.send(packed(Signal(Kind.REFUSED, body=words)), socket.MSG_DONTWAIT)
    except OSError:
        return  # it is gone already


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already


def _close(listener: socket.socket) -> None:
    """Close it so that whoever waits for a connection is told."""
    _shut(listener)
    listener.close()
