"""The way to one shard and back: sessions that are opened again whenever they break, and those over gRPC.

What comes back, and that a session broke or began, goes to one inbox for all links, so that whoever waits for
several shards waits in one place.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from unmask.errors import UsageError
from unmask.experts.frames import Frame, Message
from unmask.experts.placement import HeldParts
from unmask.transport_security import ClientTls, channel_credentials, channel_options
from unmask.v1 import experts_pb2 as pb
from unmask.v1.experts_pb2_grpc import ExpertShardStub

__all__ = [
    "Arrived",
    "Began",
    "GrpcLink",
    "Inbox",
    "Link",
    "Lost",
    "News",
    "Session",
    "SessionLink",
    "accepted",
    "shard_channel",
]

logger = logging.getLogger(__name__)

_SESSION = f"/{pb.DESCRIPTOR.services_by_name['ExpertShard'].full_name}/Session"
_RETRY_S = (0.05, 2.0)
"""Shortest and longest time until a session is opened again; doubles with each failure."""
_ENDS = (grpc.RpcError, OSError, ValueError, DecodeError, UsageError)
"""How sessions end, or do not begin: the last two for a first answer that is none, and for files."""
_DESCRIBE_S = 1.0
"""For a shard to say what it holds."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message of a shard."""

    link: str
    message: Message


@dataclass(frozen=True, slots=True)
class Lost:
    """A session has ended; what was sent and not answered will not be."""

    link: str
    why: str


@dataclass(frozen=True, slots=True)
class Began:
    """A session has begun."""

    link: str


News: TypeAlias = Arrived | Lost | Began
Inbox: TypeAlias = "SimpleQueue[News]"


class Link(Protocol):
    """The way to one shard. One thread sends; any may look at the properties."""

    @property
    def name(self) -> str:
        """Which shard."""

    @property
    def is_ready(self) -> bool:
        """Whether there is a session."""

    @property
    def held(self) -> Mapping[int, HeldParts]:
        """What the shard holds, by epoch; nothing without a session."""

    @property
    def max_tokens(self) -> int:
        """Most rows in one frame."""

    def send(self, frame: Frame | bytes) -> None:
        """Send a frame on its way, and return at once; if the session is gone, :class:`Lost` is told."""

    def leave(self) -> None:
        """End the session in good order and open another one after a while."""

    def break_off(self) -> None:
        """End the session at once, since what comes from it is no use, and open another one after a while."""

    def refresh(self) -> None:
        """Ask what the shard holds by now; may take a second."""

    def close(self) -> None:
        """End it for good."""


class Session(ABC):
    """A session that a shard has accepted. One thread receives; any may call the rest."""

    def __init__(self) -> None:
        self.held: Mapping[int, HeldParts] = {}
        self.max_tokens = 0

    def take(self, description: pb.DescribeResponse) -> None:
        """Note what the shard says of itself."""
        self.max_tokens = description.max_tokens
        self.held = {
            placement.epoch: HeldParts(tuple(placement.bounds), frozenset(placement.parts))
            for placement in description.placements
            if not description.draining
        }

    @abstractmethod
    def messages(self) -> Iterator[Message]:
        """What comes back, until the session ends in good order.

        Raises:
            grpc.RpcError, OSError, ValueError: It ends otherwise.
        """

    @abstractmethod
    def send(self, frame: Frame | bytes) -> None:
        """See :meth:`Link.send`; if the session is over, nothing happens."""

    @abstractmethod
    def leave(self) -> None:
        """See :meth:`Link.leave`."""

    @abstractmethod
    def break_off(self) -> None:
        """See :meth:`Link.break_off`."""

    @abstractmethod
    def refresh(self) -> None:
        """See :meth:`Link.refresh`."""


class SessionLink(ABC):
    """Sessions with one shard, one after the other. See :class:`Link`.

    Args:
        name: Which shard.
        inbox: Where news go.
    """

    def __init__(self, name: str, inbox: Inbox) -> None:
        """Begin to connect; a subclass calls this when all else is set."""
        self._name = name
        self._inbox = inbox
        self._closed = threading.Event()
        self._session: Session | None = None
        self._told = ""
        self._thread = threading.Thread(target=self._run, name=f"unmask-link-{name}", daemon=True)
        self._thread.start()

    @abstractmethod
    def _opened(self) -> AbstractContextManager[Session]:
        """A session that the shard has accepted.

        Raises:
            grpc.RpcError, OSError, ValueError: There is none.
        """

    @property
    def name(self) -> str:
        """See :class:`Link`."""
        return self._name

    @property
    def is_ready(self) -> bool:
        """See :class:`Link`."""
        return self._session is not None

    @property
    def held(self) -> Mapping[int, HeldParts]:
        """See :class:`Link`."""
        session = self._session
        return {} if session is None else session.held

    @property
    def max_tokens(self) -> int:
        """See :class:`Link`."""
        session = self._session
        return 0 if session is None else session.max_tokens

    def send(self, frame: Frame | bytes) -> None:
        """See :class:`Link`."""
        session = self._session
        if session is None:
            self._inbox.put(Lost(self.name, "no session"))
        else:
            session.send(frame)

    def leave(self) -> None:
        """See :class:`Link`."""
        session, self._session = self._session, None
        if session is not None:
            session.leave()

    def break_off(self) -> None:
        """See :class:`Link`."""
        session, self._session = self._session, None
        if session is not None:
            session.break_off()

    def refresh(self) -> None:
        """See :class:`Link`."""
        session = self._session
        if session is not None:
            session.refresh()

    def close(self) -> None:
        """See :class:`Link`."""
        self._closed.set()
        self.break_off()
        self._thread.join(timeout=5)

    # The link's own thread.

    def _run(self) -> None:
        delay = _RETRY_S[0]
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                with self._opened() as session:
                    why = self._received(session)
            except _ENDS as error:
                why = _reason(error)
            self._tell(why)
            delay = _RETRY_S[0] if time.monotonic() - began > _RETRY_S[1] else min(2 * delay, _RETRY_S[1])
            self._closed.wait(delay)

    def _received(self, session: Session) -> str:
        """Pass on what comes until the session ends; says why it does."""
        self._session = session
        self._tell("")
        self._inbox.put(Began(self.name))
        if self._closed.is_set():  # by a thread that saw no session yet
            session.break_off()
        why = "the shard ended the session"
        try:
            for message in session.messages():
                self._inbox.put(Arrived(self.name, message))
                del message  # a view of memory that others wait for, maybe
        except _ENDS as error:
            why = _reason(error)
        finally:
            self._session = None
        self._inbox.put(Lost(self.name, why))  # before connections are closed, which may take a while
        return why

    def _tell(self, why: str) -> None:
        """Log what is new, not each attempt."""
        if why != self._told and not self._closed.is_set():
            logger.warning("shard %s: %s", self.name, why or "connected")
        self._told = why


def accepted(message: Message) -> pb.DescribeResponse:
    """What a shard says of itself as it accepts a session.

    Raises:
        ValueError: It does not.
        DecodeError: The bytes are no message.
    """
    first = pb.ShardFrame.FromString(bytes(message))
    if first.WhichOneof("content") != "accepted":
        raise ValueError("the shard's first message does not accept the session")
    return first.accepted


# Over gRPC


def shard_channel(address: str, *, max_bytes: int, tls: ClientTls | None = None) -> grpc.Channel:
    """A connection that notices a frozen or unreachable shard within about a second and a half.

    Raises:
        UsageError: The files in ``tls`` cannot be used.
    """
    options: tuple[tuple[str, Any], ...] = (
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_timeout_ms", 500),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.ping_timeout_ms", 500),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.use_local_subchannel_pool", 1),  # one that is stuck must not hold up its successor
    )
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, channel_credentials(tls), options=(*options, *channel_options(tls)))


class GrpcLink(SessionLink):
    """Sessions over gRPC with the shard at an address. See :class:`Link`.

    Args:
        address: ``HOST:PORT``.
        offer: What a session begins with.
        inbox: Where news go.
        max_bytes: The largest message.
        tls: Files to connect with, read for each connection; plaintext if None.
    """

    def __init__(
        self,
        address: str,
        offer: pb.SessionOffer,
        inbox: Inbox,
        *,
        max_bytes: int,
        tls: ClientTls | None = None,
    ) -> None:
        self._address = address
        self._offer = pb.ShardFrame(offer=offer).SerializeToString()
        self._max_bytes = max_bytes
        self._tls = tls
        self._call: _Answers | None = None
        super().__init__(address, inbox)

    def close(self) -> None:
        """See :class:`Link`."""
        self._closed.set()
        if self._call is not None:  # which may be no session yet
            self._call.cancel()
        super().close()

    @contextmanager
    def _opened(self) -> Iterator[Session]:
        with shard_channel(self._address, max_bytes=self._max_bytes, tls=self._tls) as channel:
            outgoing: SimpleQueue[bytes | None] = SimpleQueue()
            outgoing.put(self._offer)
            session_of: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_SESSION)
            call: _Answers = session_of(iter(outgoing.get, None))
            self._call = call
            try:
                session = _GrpcSession(call, outgoing, ExpertShardStub(channel))
                session.take(accepted(next(call, b"")))
                yield session
            finally:
                outgoing.put(None)
                call.cancel()


class _Answers(Protocol):
    """A stream's messages, as grpc gives them."""

    def __iter__(self) -> Iterator[bytes]: ...

    def __next__(self) -> bytes: ...

    def cancel(self) -> object: ...


class _GrpcSession(Session):
    def __init__(
        self,
        call: _Answers,
        outgoing: "SimpleQueue[bytes | None]",
        stub: ExpertShardStub,
    ) -> None:
        super().__init__()
        self._call, self._outgoing, self._stub = call, outgoing, stub

    def messages(self) -> Iterator[Message]:
        yield from self._call

    def send(self, frame: Frame | bytes) -> None:
        self._outgoing.put(bytes(frame))

    def leave(self) -> None:
        self._outgoing.put(None)

    def break_off(self) -> None:
        self._call.cancel()

    def refresh(self) -> None:
        try:
            self.take(self._stub.Describe(pb.DescribeRequest(), timeout=_DESCRIBE_S))
        except (grpc.RpcError, ValueError):  # the latter where the channel was closed meanwhile
            return  # whether the shard is there, its session tells


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
