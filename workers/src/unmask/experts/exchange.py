"""One layer's rows to the shards and back: sent, waited for, sent again where that is needed, and added up.

One thread, the model's, sends and receives. A layer's rows become one frame for each part (more only where a
frame would be larger than a shard takes), in the order of the parts; their sums are added in that order,
whoever answered first. So the result depends on where parts are cut and on nothing else: not on timing, not
on which replica answered, not on what failed.

A frame is kept until its answer is there, so that it can go to another shard as it is. What decides where and
when is in :mod:`unmask.experts.failover`.

Shape letters: T tokens, K choices per token, D hidden size.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from queue import Empty
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.diffusion.batch import ForwardLost
from unmask.experts.answering import all_finite
from unmask.experts.failover import Pace, next_holder
from unmask.experts.frames import (
    ABSENT,
    Frame,
    FrameError,
    Header,
    Message,
    Reply,
    Status,
    decode_reply,
    encode_request,
)
from unmask.experts.links import Arrived, Began, Inbox, Link, Lost, News
from unmask.experts.placement import Bounds, HeldParts, best_epoch, holders_of
from unmask.experts.proving import Known, Proofs, difference
from unmask.models.moe import Routing
from unmask.standing import Standing
from unmask.telemetry import Recorder, metrics

__all__ = ["Exchange", "Flight"]

logger = logging.getLogger(__name__)

_Numbers: TypeAlias = NDArray[np.int64]

_LONGEST_WAIT_S = 0.05
"""Until it is looked again whether a shard has come back."""


@dataclass(slots=True)
class _Piece:
    """A frame, and whom it was sent to."""

    header: Header
    frame: Frame
    index: Tensor | None
    """int64 (T_p,): the rows that it has; None for all of them."""
    began: float
    asked: dict[str, float] = field(default_factory=dict)
    """Shards that have it and have not answered, and when it was sent."""
    tried: set[str] = field(default_factory=set)
    """Shards that it was ever sent to, unless they were lost and have come back."""
    late: set[str] = field(default_factory=set)
    """Those of ``asked`` that have had their strike."""
    troubles: list[str] = field(default_factory=list)
    rows: Tensor | None = None
    """(T_p, D): the sums, once they are there."""


@dataclass(frozen=True, slots=True)
class Flight:
    """The frames of one layer that are on their way."""

    pieces: tuple[_Piece, ...]
    tokens: int
    like: Tensor
    """Of whose dtype and device the sums are."""


class Exchange:
    """Sends rows of layers to shards and adds up what comes back. One thread sends and receives.

    Args:
        links: The ways to the shards; the order says whom to ask first.
        inbox: Where the links' news arrive.
        rows_as: What rows are sent as; sums come back as the same.
        recorder: Takes the metrics.
        patience_s: How long a forward waits for a part that no shard can be asked for.
        pace: How long to wait for an answer.
    """

    def __init__(
        self,
        links: Iterable[Link],
        inbox: Inbox,
        *,
        rows_as: torch.dtype = torch.float32,
        recorder: Recorder | None = None,
        patience_s: float = 5.0,
        pace: Pace | None = None,
    ) -> None:
        self._links: Mapping[str, Link] = {link.name: link for link in links}
        self._order = tuple(self._links)
        self._inbox = inbox
        self._rows_as = rows_as
        self.recorder = recorder or Recorder()
        self._patience_s = patience_s
        self._sequence = count(1)
        self._open: dict[int, _Piece] = {}
        self._pace = pace or Pace()
        self._standing = {name: Standing() for name in self._links}
        self._epoch: int | None = None
        self._bounds: Bounds = ()
        self._last_layer = -1
        self._flying = 0
        """Flights that are not received yet."""
        self._told_states: list[str] = []
        self._proofs = Proofs()
        self._unproven: dict[str, Known] = {}
        """Shards that have come back, and what they were asked."""
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._refresh, name="unmask-placements", daemon=True)
        self._watch.start()

    # Any thread.

    @property
    def links(self) -> tuple[Link, ...]:
        """The ways to the shards."""
        return tuple(self._links.values())

    @property
    def placement(self) -> tuple[int, Bounds] | None:
        """Epoch and bounds that could be gone by now; None while parts of each are held by nobody."""
        return best_epoch((link.held for link in self._links.values()), current=self._epoch)

    def wait_complete(self, timeout_s: float) -> bool:
        """Wait until every part is held by a shard; False if that takes longer."""
        end = time.monotonic() + timeout_s
        while self.placement is None:
            if time.monotonic() > end or self._closed.wait(_LONGEST_WAIT_S):
                return False
        return True

    @property
    def missing(self) -> str:
        """Which shards there are no sessions with, for messages."""
        lost = [link.name for link in self._links.values() if not link.is_ready]
        if lost:
            return f"no session with {', '.join(lost)}"
        return "all shards are connected, but of no placement all parts are held"

    def close(self) -> None:
        """End all sessions."""
        self._closed.set()
        for link in self._links.values():
            link.close()
        self._watch.join(timeout=5)

    def _refresh(self) -> None:
        """Ask once a second what shards hold, for a placement may be loaded while sessions go on."""
        while not self._closed.wait(1.0):
            for link in self._links.values():
                link.refresh()

    # The model thread.

    def send(self, layer: int, hidden_TD: Tensor, routing: Routing, micro_batch: int = 0) -> Flight:
        """Send the rows of a layer on their way.

        A forward goes by one placement: that of its first layer, when nothing else is on its way.

        Args:
            layer: Number in the model.
            hidden_TD: Rows, on any device; must stay as they are until the sums are received.
            routing: Their experts, and the weights of these.
            micro_batch: Number of the part of the forward that the rows are of.

        Raises:
            ForwardLost: Parts are held by nobody.
        """
        again = layer == self._last_layer and not self._flying
        if layer < self._last_layer or again or self._epoch is None:  # a forward begins
            self._choose_placement()
        self._last_layer = layer
        rows_TD = _on_host(hidden_TD, self._rows_as)
        experts_TK = _on_host(routing.experts, torch.int64).numpy()
        weights_TK = _on_host(routing.weights, torch.float32)
        pieces = []
        for piece in self._pieces((layer, micro_batch), rows_TD, experts_TK, weights_TK):
            self._open[piece.header.sequence] = piece
            self._ask(piece, "first")  # before the next one is made
            pieces.append(piece)
        self._flying += 1
        self._record_rows(experts_TK, pieces)
        return Flight(tuple(pieces), len(hidden_TD), hidden_TD)

    def receive(self, flight: Flight) -> Tensor:
        """The weighted sums of all experts of a layer's rows, (T, D); waits for them.

        They may lie in the memory of a message: read them, and write to what you make of them.

        Raises:
            ForwardLost: A part's sums cannot be had.
        """
        while any(piece.rows is None for piece in flight.pieces):
            self._look_after(time.monotonic())
            try:
                self._take(self._inbox.get(timeout=self._wait_s(time.monotonic())))
            except Empty:
                continue
        self._flying -= 1
        return _added(flight)

    # What is sent.

    def _choose_placement(self) -> None:
        """Go by the latest placement that is complete.

        Raises:
            ForwardLost: There is none.
        """
        self._flying = 0
        self._drain_inbox()
        if not self.wait_complete(self._patience_s):
            raise self._lost(f"experts cannot be had: {self.missing}")
        found = self.placement
        if found is None:
            raise self._lost(f"experts cannot be had: {self.missing}")
        if found[0] != self._epoch:
            logger.info("experts of placement %s", found[0])
            self.recorder.gauge(metrics.EXPERT_EPOCH, found[0])
        self._epoch, self._bounds = found
        now = time.monotonic()
        states = [self._state(name, now) for name in self._order]
        if states != self._told_states:
            self._told_states = states
            for state in ("ready", "banned", "lost"):
                self.recorder.gauge(metrics.EXPERT_SHARDS, states.count(state), state=state)

    def _state(self, name: str, now: float) -> str:
        if not self._links[name].is_ready:
            return "lost"
        return "banned" if self._is_passed_over(name, now) else "ready"

    def _is_passed_over(self, name: str, now: float) -> bool:
        return name in self._unproven or self._standing[name].is_banned(now)

    def _pieces(
        self, place: tuple[int, int], rows_TD: Tensor, experts_TK: _Numbers, weights_TK: Tensor
    ) -> Iterable[_Piece]:
        """The frames of a layer and micro-batch, those of the first part first."""
        most = min((link.max_tokens for link in self._links.values() if link.is_ready), default=len(rows_TD))
        most = max(1, most)
        for part, (first, stop) in enumerate(pairwise(self._bounds)):
            slots_TK = np.subtract(experts_TK, first, dtype=np.int16, casting="unsafe")
            absent_TK = slots_TK.view(np.uint16) >= stop - first  # numbers below 0 are the largest ones
            some_absent = np.count_nonzero(absent_TK) > 0
            if some_absent:
                slots_TK[absent_TK] = ABSENT
            if len(rows_TD) <= most and not (some_absent and absent_TK.all(axis=1).any()):
                yield self._piece(place, part, (torch.from_numpy(slots_TK), weights_TK, rows_TD), None)
                continue
            index_P = np.flatnonzero(~absent_TK.all(axis=1))
            for some in torch.from_numpy(index_P).split(most):
                if len(some):
                    slots, weights, rows = (
                        tensor.index_select(0, some)
                        for tensor in (torch.from_numpy(slots_TK), weights_TK, rows_TD)
                    )
                    yield self._piece(place, part, (slots, weights, rows), some)

    def _piece(
        self, place: tuple[int, int], part: int, tensors: tuple[Tensor, Tensor, Tensor], index: Tensor | None
    ) -> _Piece:
        """A frame of a part's slots, weights and rows, and which of the layer's rows these are."""
        assert self._epoch is not None
        rows_TD = tensors[2]
        layer, micro_batch = place
        header = Header(
            epoch=self._epoch,
            part=part,
            layer=layer,
            micro_batch=micro_batch,
            sequence=next(self._sequence),
            tokens=len(rows_TD),
            hidden_size=rows_TD.shape[1],
            dtype=rows_TD.dtype,
        )
        frame = encode_request(header, *tensors)
        return _Piece(header, frame, index, time.monotonic())

    def _ask(self, piece: _Piece, why: str) -> bool:
        """Send a frame to the next shard that holds its part; False if there is none."""
        now = time.monotonic()
        name = next_holder(
            self._holders(piece),
            tried=piece.tried,
            ready=lambda name: self._links[name].is_ready,
            banned=lambda name: self._is_passed_over(name, now),
        )
        if name is None:
            return False
        piece.asked[name] = now
        piece.tried.add(name)
        self._links[name].send(piece.frame)
        self.recorder.count(metrics.EXPERT_FRAMES, why=why)
        self.recorder.count(metrics.EXPERT_BYTES, len(piece.frame), direction="sent")
        return True

    def _holders(self, piece: _Piece) -> Sequence[str]:
        held: dict[str, HeldParts] = {}
        for name, link in self._links.items():
            parts = link.held.get(piece.header.epoch)
            if parts is not None and parts.bounds == self._bounds:
                held[name] = parts
        return holders_of(piece.header.part, held, self._order)

    # What comes back.

    def _drain_inbox(self) -> None:
        """Take what came between two forwards: late answers, sessions that ended or began."""
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _take(self, news: News) -> None:
        match news:
            case Arrived(link, message):
                self._take_answer(link, message)
            case Lost(link, why):
                self._take_loss(link, why)
            case Began(link):
                for piece in self._open.values():
                    piece.tried.discard(link)
                self._try(link)

    def _try(self, name: str) -> None:
        """Ask a shard that comes back what is known already."""
        self._unproven.pop(name, None)
        known = self._proofs.for_holder(self._links[name].held)
        if known is not None:
            self._unproven[name] = known
            self._links[name].send(known.frame)
            self.recorder.count(metrics.EXPERT_FRAMES, why="proof")

    def _take_proof(self, name: str, known: Known, reply: Reply) -> None:
        """Use the shard again if it says what is known.

        Raises:
            FrameError: It says something else.
        """
        if reply.rows is None:
            if reply.header.status is Status.STALE:  # what is known is of a placement that is gone
                del self._unproven[name]
                return
            raise FrameError(f"refused a frame that was answered before: {reply.message}", reply.header)
        _check(reply, known.header)
        if told := difference(known, reply.rows):
            raise FrameError(f"other sums than before; {told}", reply.header)
        if not torch.equal(reply.rows, known.rows):
            logger.warning("shard %s rounds otherwise: a token may depend on which shard answers", name)
        del self._unproven[name]

    def _take_answer(self, name: str, message: Message) -> None:
        self.recorder.count(metrics.EXPERT_BYTES, len(message), direction="received")
        try:
            reply = decode_reply(message)
            known = self._unproven.get(name)
            if known is not None and known.header.sequence == reply.header.sequence:
                self._take_proof(name, known, reply)
                return
            piece = self._open.get(reply.header.sequence)
            if piece is None or name not in piece.asked:
                return  # another one was faster
            if reply.rows is not None:
                _check(reply, piece.header)
        except FrameError as error:
            self._distrust(name, f"a damaged answer: {error}")
            return
        if reply.rows is None:
            self._take_refusal(name, piece, reply)
            return
        self._accept(name, piece, reply)

    def _accept(self, name: str, piece: _Piece, reply: Reply) -> None:
        now = time.monotonic()
        seconds = now - piece.asked[name]
        piece.rows = reply.rows
        del self._open[piece.header.sequence]
        assert reply.rows is not None
        self._proofs.keep(piece.header, piece.frame, reply.rows)
        self._pace.observe(seconds)
        if name not in piece.late:
            self._standing[name].answered()
        for other, since in piece.asked.items():
            slower = other != name and since <= piece.asked[name]
            if slower and other not in piece.late:  # a hedge that came later was the faster one
                self._standing[other].strike(now)
        queue, compute = reply.header.queue_us / 1e6, reply.header.compute_us / 1e6
        phases = {"queue": queue, "compute": compute, "wire": max(0.0, seconds - queue - compute)}
        for phase, value in phases.items():
            self.recorder.observe(metrics.EXPERT_FRAME_SECONDS, value, phase=phase)

    def _take_refusal(self, name: str, piece: _Piece, reply: Reply) -> None:
        status = reply.header.status
        logger.warning("shard %s: %s: %s", name, status.name, reply.message)
        del piece.asked[name]
        piece.troubles.append(f"{name}: {reply.message}")
        match status:
            case Status.DRAINING:
                self._links[name].leave()
            case Status.STALE:
                self._links[name].refresh()
            case _:
                self._standing[name].strike(time.monotonic())
        if not piece.asked:
            self._ask(piece, "failover")

    def _take_loss(self, name: str, why: str) -> None:
        self._unproven.pop(name, None)
        waiting = [piece for piece in self._open.values() if name in piece.asked]
        if waiting:
            self._standing[name].strike(time.monotonic())
        for piece in waiting:
            del piece.asked[name]
            piece.troubles.append(f"{name}: {why}")
            if not piece.asked:
                self._ask(piece, "failover")

    def _distrust(self, name: str, why: str) -> None:
        """Let go of a session whose bytes make no sense; its frames go elsewhere."""
        logger.warning("shard %s: %s", name, why)
        self._links[name].break_off()
        self._take_loss(name, why)

    # Time passes.

    def _wait_s(self, now: float) -> float:
        """Until something has to be looked after, at most."""
        timing = self._pace.timing
        ends = [now + _LONGEST_WAIT_S]
        for piece in self._open.values():
            for name, since in piece.asked.items():
                ends.append(since + timing.hedge_s)
                if name not in piece.late:
                    ends.append(since + timing.give_up_s)
        return max(0.001, min(end for end in ends if end > now) - now)

    def _look_after(self, now: float) -> None:
        """Send again what is late, pass over who is out, and end what cannot be had.

        Raises:
            ForwardLost: A part's sums cannot be had.
        """
        timing = self._pace.timing
        for piece in list(self._open.values()):
            for name, since in piece.asked.items():
                if now - since > timing.give_up_s and name not in piece.late:
                    piece.late.add(name)
                    self._standing[name].strike(now)
            if not piece.asked:
                self._ask(piece, "failover")
            elif now - max(piece.asked.values()) > timing.hedge_s:
                self._ask(piece, "hedge")
            if now - piece.began > self._patience_s:
                told = "; ".join(dict.fromkeys(piece.troubles)) or "no answer"
                raise self._lost(f"part {piece.header.part} of the experts cannot be had: {told}")

    def _lost(self, why: str) -> ForwardLost:
        self._open.clear()
        self._last_layer, self._flying = -1, 0
        return ForwardLost(why)

    def _record_rows(self, experts_TK: _Numbers, pieces: Sequence[_Piece]) -> None:
        tokens = len(experts_TK)
        copies = [piece.header.tokens for piece in pieces]
        self.recorder.count(metrics.EXPERT_ROWS, tokens, kind="tokens")
        self.recorder.count(metrics.EXPERT_ROWS, sum(copies), kind="copies")
        activated = int(np.count_nonzero(np.bincount(experts_TK.ravel())))
        self.recorder.observe(metrics.EXPERTS_ACTIVATED, activated)
        parts = len(self._bounds) - 1
        self.recorder.gauge(metrics.EXPERT_IMBALANCE, max(copies) * parts / sum(copies))


def _on_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as it is sent. Looks first: a call of torch that does nothing takes 20 us, out of cache."""
    return tensor if tensor.dtype is dtype and tensor.is_cpu else tensor.to("cpu", dtype)


def _check(reply: Reply, asked: Header) -> None:
    """See to it that an answer is that of the frame.

    Raises:
        FrameError: It is not.
    """
    got, rows = reply.header, reply.rows
    assert rows is not None
    if (got.epoch, got.part, got.layer) != (asked.epoch, asked.part, asked.layer):
        raise FrameError("the answer is that of another part, layer or placement", got)
    if (got.tokens, got.hidden_size, got.dtype) != (asked.tokens, asked.hidden_size, asked.dtype):
        raise FrameError(
            f"got {got.tokens} x {got.hidden_size} numbers, expected {asked.tokens} x {asked.hidden_size}",
            got,
        )
    if not all_finite(rows):
        raise FrameError("got numbers that are infinite or not numbers", got)


def _added(flight: Flight) -> Tensor:
    """The pieces' sums, added in their order: (T, D); those of a single frame as they came."""
    dtype, total_TD = flight.like.dtype, None
    for piece in flight.pieces:
        assert piece.rows is not None
        if total_TD is None and piece.index is None:
            total_TD = piece.rows.to(dtype)
            mine = total_TD is not piece.rows  # or it is the message's memory, which is not to be written
            continue
        if total_TD is None:
            total_TD, mine = torch.zeros(flight.tokens, flight.like.shape[1], dtype=dtype), True
        elif not mine:
            total_TD, mine = total_TD.clone(), True
        if piece.index is None:
            total_TD += piece.rows
        else:
            total_TD.index_add_(0, piece.index, piece.rows.to(dtype))
    assert total_TD is not None
    return total_TD.to(flight.like.device)
