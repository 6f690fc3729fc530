"""The way to one shard and back: a session over gRPC that is opened again whenever it breaks.

What comes back, and that a session broke or began, goes to one inbox for all links, so that whoever waits for
several shards waits in one place.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from unmask.errors import UsageError
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
    "check_addresses",
    "described",
    "shard_channel",
]

logger = logging.getLogger(__name__)

_SESSION = f"/{pb.DESCRIPTOR.services_by_name['ExpertShard'].full_name}/Session"
_RETRY_S = (0.05, 2.0)
"""Shortest and longest time until a session is opened again; doubles with each failure."""
_DESCRIBE_S = 1.0
"""For a shard to say what it holds."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message of a shard."""

    link: str
    message: bytes


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

    def send(self, frame: bytes) -> None:
        """Send a frame on its way, and return at once; if the session is gone, :class:`Lost` is told."""

    def leave(self) -> None:
        """End the session in good order and open another one after a while."""

    def break_off(self) -> None:
        """End the session at once, since what comes from it is no use, and open another one after a while."""

    def refresh(self) -> None:
        """Ask what the shard holds by now; may take a second."""

    def close(self) -> None:
        """End it for good."""


def described(description: pb.DescribeResponse) -> dict[int, HeldParts]:
    """What a shard says that it holds, by epoch."""
    return {
        placement.epoch: HeldParts(tuple(placement.bounds), frozenset(placement.parts))
        for placement in description.placements
    }


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


class GrpcLink:
    """Sessions with the shard at an address, one after the other. See :class:`Link`.

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
        self._inbox = inbox
        self._max_bytes = max_bytes
        self._tls = tls
        self._closed = threading.Event()
        self._call: _Answers | None = None
        self._session: _Session | None = None
        self._told = ""
        self._thread = threading.Thread(target=self._run, name=f"unmask-link-{address}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """See :class:`Link`."""
        return self._address

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

    def send(self, frame: bytes) -> None:
        """See :class:`Link`."""
        session = self._session
        if session is None:
            self._inbox.put(Lost(self.name, "no session"))
        else:
            session.outgoing.put(frame)

    def leave(self) -> None:
        """See :class:`Link`."""
        session, self._session = self._session, None
        if session is not None:
            session.outgoing.put(None)

    def break_off(self) -> None:
        """See :class:`Link`."""
        session, self._session = self._session, None
        if session is not None:
            session.call.cancel()

    def refresh(self) -> None:
        """See :class:`Link`."""
        session = self._session
        if session is None:
            return
        try:
            session.take(session.stub.Describe(pb.DescribeRequest(), timeout=_DESCRIBE_S))
        except (grpc.RpcError, ValueError):  # the latter where the channel was closed meanwhile
            return  # whether the shard is there, its session tells

    def close(self) -> None:
        """See :class:`Link`."""
        self._closed.set()
        self._session = None
        if self._call is not None:
            self._call.cancel()
        self._thread.join(timeout=5)

    # The link's own thread.

    def _run(self) -> None:
        delay = _RETRY_S[0]
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                with self._opened() as session:
                    try:
                        for message in session.call:
                            self._inbox.put(Arrived(self.name, message))
                    finally:
                        self._session = None
                        self._inbox.put(Lost(self.name, "the session ended"))
                why = "the shard ended the session"
            except grpc.RpcError as error:
                why = _reason(error)
            except (ValueError, DecodeError, UsageError) as error:  # a first answer that is none; a file
                why = str(error)
            self._tell(why)
            delay = _RETRY_S[0] if time.monotonic() - began > _RETRY_S[1] else min(2 * delay, _RETRY_S[1])
            self._closed.wait(delay)

    @contextmanager
    def _opened(self) -> "Iterator[_Session]":
        """A session that the shard has accepted."""
        with shard_channel(self._address, max_bytes=self._max_bytes, tls=self._tls) as channel:
            outgoing: SimpleQueue[bytes | None] = SimpleQueue()
            outgoing.put(self._offer)
            session_of: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_SESSION)
            call: _Answers = session_of(iter(outgoing.get, None))
            self._call = call
            session = _Session(call, outgoing, ExpertShardStub(channel))
            try:
                first = pb.ShardFrame.FromString(next(call, b""))
                if first.WhichOneof("content") != "accepted":
                    raise ValueError("the shard's first message does not accept the session")
                session.take(first.accepted)
                self._session = session
                self._tell("")
                self._inbox.put(Began(self.name))
                yield session
            finally:
                outgoing.put(None)
                call.cancel()

    def _tell(self, why: str) -> None:
        """Log what is new, not each attempt."""
        if why != self._told and not self._closed.is_set():
            logger.warning("shard %s: %s", self.name, why or "connected")
        self._told = why


class _Answers(Protocol):
    """A stream's messages, as grpc gives them."""

    def __iter__(self) -> Iterator[bytes]: ...

    def __next__(self) -> bytes: ...

    def cancel(self) -> object: ...


class _Session:
    def __init__(
        self,
        call: _Answers,
        outgoing: "SimpleQueue[bytes | None]",
        stub: ExpertShardStub,
    ) -> None:
        self.call, self.outgoing, self.stub = call, outgoing, stub
        self.held: Mapping[int, HeldParts] = {}
        self.max_tokens = 0

    def take(self, description: pb.DescribeResponse) -> None:
        """Note what the shard says of itself."""
        self.held = {} if description.draining else described(description)
        self.max_tokens = description.max_tokens


def _reason(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def check_addresses(addresses: Sequence[str]) -> tuple[str, ...]:
    """Addresses of shards.

    Raises:
        UsageError: None, one twice, or one without a port.
    """
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise UsageError(f"--experts: got {address!r}, expected HOST:PORT")
    if not addresses or len(set(addresses)) != len(addresses):
        raise UsageError(f"--experts: got {list(addresses)}, expected each shard once, and one at least")
    return tuple(addresses)
