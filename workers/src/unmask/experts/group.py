"""Frames between the processes of one torch.distributed job: the engine is rank 0, shards are ranks 1 to N.

This is for jobs whose processes start and end together. Each signal is two tensors, its kind and length and
then its bytes. Between the engine and a shard they go to and fro strictly by turns, which is all that NCCL
allows one pair to do; frames for one shard wait for each other. A rank that is lost does not come back: the
job has to start anew.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

import grpc
import torch
import torch.distributed as dist

from unmask.experts.addresses import GroupAddress
from unmask.experts.frames import Frame, Message
from unmask.experts.links import Inbox, Session, SessionLink, accepted
from unmask.experts.sessions import Refused, Sessions
from unmask.experts.signals import Kind
from unmask.v1 import experts_pb2 as pb

__all__ = ["EngineGroup", "GroupLink", "GroupPort"]

logger = logging.getLogger(__name__)

_ASK_S = 1.0
"""After so long without a frame the engine asks what the shard holds, so that waiting never seems endless."""
_SILENCE_S = 60.0
"""Until a rank that does not answer, or the engine if it says nothing, is lost."""


class _Pair:
    """What goes to one other rank and comes from it. One thread at a time.

    Args:
        rank: The other one's.
        device: Of tensors; a GPU's for NCCL.
        max_bytes: Of what may come.
    """

    def __init__(self, rank: int, *, device: torch.device, max_bytes: int) -> None:
        self._rank, self._device, self._max_bytes = rank, device, max_bytes
        self._lost = ""

    def send(self, kind: Kind, body: Message = b"") -> None:
        """Send a signal.

        Raises:
            ConnectionError: The other rank is lost.
        """
        self._checked(dist.send, torch.tensor([kind, len(body)], device=self._device))
        if len(body):
            self._checked(dist.send, torch.frombuffer(body, dtype=torch.uint8).to(self._device))

    def receive(self) -> tuple[int, Message]:
        """Wait for a signal; gives its kind, which may be any number, and its bytes.

        Raises:
            ConnectionError: The other rank is lost.
            ValueError: It sends too much.
        """
        head = torch.empty(2, dtype=torch.int64, device=self._device)
        self._checked(dist.recv, head)
        kind, length = head.tolist()
        if not 0 <= length <= self._max_bytes:
            raise ValueError(f"rank {self._rank} sends {length} bytes, at most {self._max_bytes} are taken")
        body = torch.empty(length, dtype=torch.uint8, device=self._device)
        if length:
            self._checked(dist.recv, body)
        return kind, body.cpu().numpy().data

    def _checked(self, transfer: Callable[[torch.Tensor, int], object], tensor: torch.Tensor) -> None:
        if self._lost:
            raise ConnectionError(self._lost)
        try:
            transfer(tensor, self._rank)
        except RuntimeError as error:  # as torch.distributed has it
            self._lost = f"rank {self._rank} is lost, and does not come back: {error}"
            raise ConnectionError(self._lost) from error


def _join(store: str, *, rank: int, world: int, device: torch.device, patience_s: float) -> None:
    """Wait for all ranks, and become one of a group.

    Raises:
        ConnectionError: They do not come.
    """
    place = urlsplit(store)
    assert place.hostname is not None and place.port is not None
    try:
        meeting = dist.TCPStore(  # type: ignore[attr-defined] # which torch documents there
            place.hostname, place.port, world, rank == 0, timeout=timedelta(seconds=patience_s)
        )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meeting,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_SILENCE_S),
        )
    except (RuntimeError, ValueError) as error:  # the latter where this process is in a group already
        raise ConnectionError(f"the group of {world} did not come together: {error}") from error


# The engine


class EngineGroup:
    """The engine's membership, and the ways to all shards.

    Args:
        address: Where to meet, and how many shards there are.
        offer: What a session begins with.
        inbox: Where news go.
        max_bytes: The largest message.
        device: Of the tensors that are sent.
        patience_s: How long to wait for the shards to come.
    """

    def __init__(
        self,
        address: GroupAddress,
        offer: pb.SessionOffer,
        inbox: Inbox,
        *,
        max_bytes: int,
        device: str = "cpu",
        patience_s: float = 600.0,
    ) -> None:
        self._address = address
        self._device = torch.device(device)
        self._patience_s = patience_s
        self._joined = threading.Event()
        self._why = ""
        self._thread = threading.Thread(target=self._run, name="unmask-group", daemon=True)
        self._thread.start()
        self.links = [
            GroupLink(
                f"{address.store}#{rank}",
                _Pair(rank, device=self._device, max_bytes=max_bytes),
                offer,
                inbox,
                self.wait_joined,
            )
            for rank in range(1, address.shards + 1)
        ]

    def wait_joined(self) -> None:
        """Wait until all ranks are there.

        Raises:
            ConnectionError: They are not.
        """
        self._joined.wait()
        if self._why:
            raise ConnectionError(self._why)

    def close(self) -> None:
        """Leave the group, once all links are closed."""
        if self._joined.is_set() and not self._why:
            dist.destroy_process_group()

    def _run(self) -> None:
        try:
            _join(
                self._address.store,
                rank=0,
                world=self._address.shards + 1,
                device=self._device,
                patience_s=self._patience_s,
            )
        except ConnectionError as error:
            self._why = str(error)
        self._joined.set()


class GroupLink(SessionLink):
    """Sessions with one rank. See :class:`unmask.experts.links.Link`."""

    def __init__(
        self,
        name: str,
        pair: _Pair,
        offer: pb.SessionOffer,
        inbox: Inbox,
        wait_joined: Callable[[], None],
    ) -> None:
        """``wait_joined`` returns when the rank can be spoken to, or raises ConnectionError."""
        self._pair = pair
        self._offer = pb.ShardFrame(offer=offer).SerializeToString()
        self._wait_joined = wait_joined
        super().__init__(name, inbox)

    def close(self) -> None:
        """End it, and with it the shard's part in the job."""
        super().close()
        if not self._thread.is_alive():  # or it still waits for an answer
            try:
                self._wait_joined()
                self._pair.send(Kind.END)
            except ConnectionError as error:
                logger.info("%s could not be told the end: %s", self.name, error)

    @contextmanager
    def _opened(self) -> Iterator[Session]:
        self._wait_joined()
        self._pair.send(Kind.OFFER, self._offer)
        session = _GroupSession(self._pair)
        session.take(_description(*self._pair.receive()))
        yield session


class _GroupSession(Session):
    def __init__(self, pair: _Pair) -> None:
        super().__init__()
        self._pair = pair
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()

    def messages(self) -> Iterator[Message]:
        while True:
            try:
                frame = self._outgoing.get(timeout=_ASK_S)
            except Empty:
                self._pair.send(Kind.ASK)
                self.take(_description(*self._pair.receive()))
                continue
            if frame is None:
                return
            self._pair.send(Kind.FRAME, frame)
            yield _answer(*self._pair.receive())

    def send(self, frame: Frame | bytes) -> None:
        self._outgoing.put(bytes(frame))

    def leave(self) -> None:
        self._outgoing.put(None)

    def break_off(self) -> None:
        self._outgoing.put(None)

    def refresh(self) -> None:
        return  # `messages` asks


def _answer(kind: int, body: Message) -> Message:
    if kind == Kind.REFUSED:
        raise ValueError(bytes(body).decode(errors="replace"))
    if kind != Kind.FRAME:
        raise ValueError(f"got a signal of kind {kind}, expected an answer")
    return body


def _description(kind: int, body: Message) -> pb.DescribeResponse:
    if kind == Kind.REFUSED:
        raise ValueError(bytes(body).decode(errors="replace"))
    if kind != Kind.ACCEPTED:
        raise ValueError(f"got a signal of kind {kind}, expected what the shard holds")
    return accepted(body)


# A shard


class GroupPort:
    """A shard's membership: answers the engine until it ends the job, or is lost.

    Args:
        store: ``tcp://HOST:PORT``: where the engine waits.
        rank: Of this shard, from 1 on.
        world: Engine and shards.
        sessions: What is behind it.
        max_bytes: The largest frame.
        ended: Called when that is over; ``lost`` then says why, if it was not the engine that ended it.
        device: Of the tensors that are sent.
        patience_s: How long to wait for the others to come.
    """

    def __init__(
        self,
        store: str,
        *,
        rank: int,
        world: int,
        sessions: Sessions,
        max_bytes: int,
        ended: Callable[[], object],
        device: str = "cpu",
        patience_s: float = 600.0,
    ) -> None:
        self.lost = ""
        self._store, self._rank, self._world = store, rank, world
        self._sessions = sessions
        self._max_bytes = max_bytes
        self._ended = ended
        self._device = torch.device(device)
        self._patience_s = patience_s

    def start(self) -> None:
        """Wait for the others and answer, in a thread, which cannot be stopped: the job ends as one."""
        threading.Thread(target=self._run, name="unmask-group", daemon=True).start()

    def _run(self) -> None:
        try:
            _join(
                self._store,
                rank=self._rank,
                world=self._world,
                device=self._device,
                patience_s=self._patience_s,
            )
            self._answer(_Pair(0, device=self._device, max_bytes=self._max_bytes))
            dist.destroy_process_group()
        except (ConnectionError, ValueError) as error:
            self.lost = str(error)
        except Exception:
            logger.exception("rank %d failed", self._rank)
            self.lost = f"rank {self._rank} failed; the log says why"
        finally:
            self._ended()

    def _answer(self, engine: _Pair) -> None:
        kind, body = engine.receive()
        while kind != Kind.END:
            try:
                with self._sessions.counted() as seen:
                    if kind != Kind.OFFER:
                        raise Refused(
                            grpc.StatusCode.INVALID_ARGUMENT,
                            f"got a signal of kind {kind}, expected an offer",
                        )
                    engine.send(Kind.ACCEPTED, self._sessions.accepted(body))
                    kind, body = engine.receive()
                    while kind in (Kind.FRAME, Kind.ASK):
                        if kind == Kind.FRAME:
                            engine.send(Kind.FRAME, self._sessions.answer(body, seen))
                        else:
                            engine.send(Kind.ACCEPTED, self._sessions.told())
                        kind, body = engine.receive()
            except Refused as refused:
                engine.send(Kind.REFUSED, refused.told.encode())
                kind, body = engine.receive()
