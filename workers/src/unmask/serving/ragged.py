"""Requests that share every forward, whatever each of them is doing: reading, denoising or storing blocks.

One :meth:`RaggedBatch.step` is one forward over whole blocks, laid out one behind the other without padding.
Each request brings to it

* **prefill**: as many of the whole blocks it was given as it gets room for;
* **denoise**: its open block; or
* **fused**: the block that it has just committed, whose keys and values have yet to be stored, and the open
  block behind it, which sees them in the same forward. It is a denoise forward that stores a block, so that
  a block costs one forward less than with a forward for that alone (**persist**, where ``fuse`` is off).

Who takes part is decided in :mod:`unmask.serving.scheduling`, where keys and values lie in
:mod:`unmask.serving.paging`, and what a forward does to a request in :mod:`unmask.diffusion.block_row`: what
remains is to put them together. A request takes all pages that it may need when it is admitted, and waits
outside where there are not enough. Given blocks that an earlier request has stored are shared with it.

The tokens of a request depend on nothing but itself; ``docs/adr/0008`` says how far that holds to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from unmask.attention.paged import Span
from unmask.diffusion.batch import Event, NoRoom, Persisted, Prefilled, Reused, check_attends, check_idle
from unmask.diffusion.block_row import BlockRow, at_places, check_block_request, chosen_one_by_one
from unmask.diffusion.decoding import Candidates, DecodingParams, best_tokens_at
from unmask.errors import UsageError
from unmask.models.base import LanguageModel
from unmask.models.row_tiles import tiled_rows
from unmask.serving.forwards import Forwards, PlainForwards, RecordedForwards
from unmask.serving.paging import BlockPool, Holding, digest_of, digests_of, root_digest
from unmask.serving.scheduling import SMALLEST_ROOM, Wish, share_forward

__all__ = ["RaggedBatch"]

_Phase: TypeAlias = Literal["prefill", "denoise", "persist", "fused"]

_POSITIONS = 512
"""Default room of a forward, at least: from a few hundred on, a CPU computes as fast as it ever will."""


@dataclass(slots=True)
class _Seat:
    """A request, and the pages it has."""

    row: BlockRow
    holding: Holding
    root: bytes
    names: list[bytes]
    """Of the blocks whose tokens are final, by the cache's hash."""
    given: int
    """Blocks that it came with."""
    told: int = 0
    """Sealed blocks that events have told of."""
    last_part: int = 0
    """Number of the last forward that it took part in."""

    @property
    def reads(self) -> bool:
        """Whether blocks that it came with are not in the cache yet."""
        return self.holding.sealed < self.given

    @property
    def unsealed(self) -> int:
        """Final blocks that are not in the cache yet: given ones, or the one just committed."""
        return len(self.names) - self.holding.sealed

    @property
    def next_name(self) -> bytes:
        """Of the first of them."""
        return self.names[self.holding.sealed]

    def name_block(self) -> None:
        """Name the block that has just been committed."""
        row, before = self.row, self.names[-1] if self.names else self.root
        self.names.append(digest_of(before, row.tokens[row.start - row.length : row.start]))


@dataclass(frozen=True, slots=True)
class _Part:
    """What one request brings to one forward."""

    seat: _Seat
    phase: _Phase
    ids: list[int]
    """Of its blocks, one behind the other."""

    @property
    def blocks(self) -> int:
        return len(self.ids) // self.seat.row.length

    @property
    def denoises(self) -> bool:
        """Whether its last block is the open one."""
        return self.phase in ("denoise", "fused")

    @property
    def stores(self) -> int:
        """Blocks from its first on whose keys and values stand afterwards."""
        return self.blocks - self.denoises

    @property
    def span(self) -> Span:
        """Where its blocks and those before them lie."""
        holding = self.seat.holding
        return Span(tuple(holding.pages[: holding.sealed + self.blocks]), self.blocks)


class RaggedBatch:
    """Requests decoded together; each gets what it would get alone. One thread owns a batch."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        rows: int,
        capacity: int,
        block_length: int,
        cache_bytes: int | None = None,
        max_positions: int | None = None,
        fuse: bool = True,
        revision: str = "",
        recorded: bool = False,
    ) -> None:
        """Room for ``rows`` requests of at most ``capacity`` tokens each, prompt included.

        Args:
            model: Attends to blocks.
            rows: Most requests at a time.
            capacity: Most tokens of one request; rounded up to whole blocks.
            block_length: Of all requests.
            cache_bytes: Memory for keys and values; by default what ``rows`` requests of ``capacity`` take.
            max_positions: Most positions in one forward; by default 512, or two blocks of each row if that
                is more.
            fuse: Whether storing a block shares a forward with the next block's first step.
            revision: Names the weights, among whose keys and values blocks are shared.
            recorded: Whether forwards are recorded now and replayed (:mod:`unmask.serving.forwards`); on a
                GPU that has kernels for all of them.

        Raises:
            ModelError: The model attends to the whole canvas.
            UsageError: One request of ``capacity`` tokens does not fit the cache, or a forward is too small.
        """
        check_attends(model, "blocks")
        self.rows, self.block_length, self._fuse, self._revision = rows, block_length, fuse, revision
        blocks_of_one = -(-capacity // block_length)
        self.capacity = blocks_of_one * block_length
        pages = _pages(model, cache_bytes, block_length, one=blocks_of_one, rows=rows)
        self._room = _room(max_positions, block_length, rows)
        self._model = model
        self._pool = BlockPool(pages)
        cache = model.new_paged_cache(pages=pages, block_length=block_length)
        self._forwards: Forwards = PlainForwards(model, cache)
        if recorded:
            with torch.inference_mode():
                self._forwards = RecordedForwards(
                    model, cache, most_blocks=self._room, most_pages=blocks_of_one
                )
        self._seats: dict[int, _Seat] = {}
        self._tickets = count()
        self._steps = 0
        self._forgotten = 0

    @property
    def active(self) -> int:
        """Requests admitted and not finished."""
        return len(self._seats)

    @property
    def free_rows(self) -> int:
        """Requests that can be admitted now, if the cache has room for them."""
        return self.rows - self.active

    @property
    def cache_usage(self) -> float:
        """Share of the pages that active requests hold."""
        return self._pool.held / self._pool.pages

    def admit(
        self,
        prompt: Sequence[int],
        params: DecodingParams,
        committed: Sequence[int] = (),
        *,
        cache_salt: str = "",
    ) -> int:
        """Take a request up; no forward is run. Returns its ticket.

        Args:
            prompt: Token ids; none of them counts as masked, whatever its value.
            params: ``block_length`` must be the batch's; a ``vicinity`` has no meaning here.
            committed: Generated tokens of an earlier attempt, to go on from.
            cache_salt: Blocks are shared with requests of the same salt only.

        Raises:
            UsageError: If the request is empty, does not fit, or has nothing left to generate.
            NoRoom: If no row is free, or not enough pages are.
        """
        check_block_request(prompt, params, committed, block_length=self.block_length, capacity=self.capacity)
        if self.free_rows == 0:
            raise NoRoom(f"all {self.rows} rows are taken")
        row = BlockRow(next(self._tickets), params, [*prompt, *committed], prompt_length=len(prompt))
        revision = f"{self._revision}#{self._forgotten}"
        root = root_digest(revision=revision, block_length=self.block_length, salt=cache_salt)
        names = digests_of(root, row.tokens, block_length=self.block_length)
        blocks = -(-row.end // self.block_length)
        holding = self._pool.open(names, blocks)
        if holding is None:
            raise NoRoom(f"the cache has not {blocks} pages of {self.block_length} tokens to spare")
        row.open_block()
        self._seats[row.ticket] = _Seat(row, holding, root, names, given=len(names))
        return row.ticket

    def release(self, ticket: int) -> None:
        """Drop a request between two steps; row and pages are free at once. Unknown tickets are ignored."""
        seat = self._seats.pop(ticket, None)
        if seat is not None:
            self._pool.close(seat.holding)

    def forget_stored(self) -> None:
        """Never share again what is stored: the weights are about to be others.

        Raises:
            RuntimeError: If a request is active.
        """
        check_idle(self)
        self._forgotten += 1

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run exactly one forward and return what it brought about.

        Raises:
            RuntimeError: If no request is active.
        """
        if not self._seats:
            raise RuntimeError("step() without an active request")
        events = self._share_given_blocks()
        shares = share_forward(self._wishes(), room=self._room)
        parts = [self._part(self._seats[ticket], blocks) for ticket, blocks in sorted(shares.items())]
        self._steps += 1
        candidates = self._forward(parts)
        for part in parts:
            part.seat.last_part = self._steps
            events += self._store(part)
            if part.denoises:
                events += self._denoise(part.seat, candidates[part.seat.row.ticket])
        return events

    # What is to be done.

    def _share_given_blocks(self) -> list[Event]:
        """Take over what others have stored of the blocks that requests came with."""
        events: list[Event] = []
        for seat in self._seats.values():
            while seat.reads and self._pool.adopt(seat.holding, seat.next_name):
                pass
            reused = (seat.holding.sealed - seat.told) * self.block_length
            if reused:
                events.append(Reused(seat.row.ticket, reused))
            seat.told = seat.holding.sealed
        return events

    def _wishes(self) -> list[Wish]:
        """What each request would do; one that would read what another one reads already waits for that."""
        wishes = []
        being_read: set[bytes] = set()
        for ticket, seat in self._seats.items():
            blocks = seat.unsealed
            if seat.reads:
                if seat.next_name in being_read:
                    continue
                being_read.update(seat.names[seat.holding.sealed :])
            else:
                blocks = 1 + (seat.unsealed if self._fuse else 0)
            wishes.append(Wish(ticket, blocks, seat.reads, seat.last_part))
        return wishes

    def _part(self, seat: _Seat, blocks: int) -> _Part:
        row, first = seat.row, seat.holding.sealed * self.block_length
        if seat.reads:
            return _Part(seat, "prefill", row.tokens[first : first + blocks * self.block_length])
        committed = row.tokens[first : row.start]
        if not committed:
            return _Part(seat, "denoise", row.block)
        if self._fuse:
            return _Part(seat, "fused", committed + row.block)
        return _Part(seat, "persist", committed)

    # The forward.

    def _forward(self, parts: Sequence[_Part]) -> dict[int, Candidates]:
        """Compute all positions of the parts; what :meth:`_candidates` finds in their hidden states."""
        ids = [token for part in parts for token in part.ids]
        spans = [part.span for part in parts]
        if not any(part.denoises for part in parts):
            self._forwards.store(ids, spans)
            return {}
        return self._candidates(parts, self._forwards.hidden(ids, spans))

    def _logits(self, hidden_PD: Tensor) -> Tensor:
        """Scores of P positions, computed in whole tiles."""
        return self._model.logits(tiled_rows(hidden_PD))[: len(hidden_PD)]

    def _candidates(self, parts: Sequence[_Part], hidden_SD: Tensor) -> dict[int, Candidates]:
        """Token and confidence of every position that matters, on the host: (B,) for each ticket."""
        ends = accumulate(len(part.ids) for part in parts)
        opened = [(part.seat.row, end) for part, end in zip(parts, ends, strict=True) if part.denoises]
        wanted = torch.tensor([row.looked_at for row, _ in opened])
        start = torch.tensor([end - self.block_length for _, end in opened])
        place = (start[:, None] + torch.arange(self.block_length))[wanted]
        rows, hidden_PD = [row for row, _ in opened], hidden_SD[place.to(hidden_SD.device)]
        if all(row.params.is_plain for row in rows):
            best = best_tokens_at(
                hidden_PD,
                self._logits,
                vocab_size=self._model.config.vocab_size,
                mask_token_id=rows[0].params.mask_token_id,
            )
        else:
            best = chosen_one_by_one(rows, hidden_PD, self._logits)
        return {row.ticket: found for row, found in zip(rows, at_places(best, wanted), strict=True)}

    # What came of it.

    def _store(self, part: _Part) -> list[Event]:
        """Count the forward, and seal what stands after it."""
        seat, usage = part.seat, part.seat.row.usage
        usage.positions += len(part.ids)
        for _ in range(part.stores):
            self._pool.seal(seat.holding, seat.next_name)
        seat.told = seat.holding.sealed
        if part.phase == "prefill":
            usage.prefill += 1
            return [Prefilled(seat.row.ticket, len(part.ids))]
        usage.persist += part.phase == "persist"
        return [Persisted(seat.row.ticket)] if part.stores else []

    def _denoise(self, seat: _Seat, candidates: Candidates) -> list[Event]:
        """Fill and edit the open block; where that makes it final, commit it and open the next."""
        row = seat.row
        step = row.denoise(candidates)
        if not row.is_full:
            return [step]
        committed, reason = row.close_block()
        if reason is not None:
            self.release(row.ticket)
            return [step, committed, row.finished(reason)]
        seat.name_block()
        if not step.positions:  # the forward saw the block's final tokens
            self._pool.seal(seat.holding, seat.next_name)
            seat.told = seat.holding.sealed
        row.open_block()
        return [step, committed]


def _pages(model: LanguageModel, cache_bytes: int | None, block_length: int, *, one: int, rows: int) -> int:
    """Pages of the cache."""
    if cache_bytes is None:
        return rows * one
    page = model.page_bytes(block_length=block_length)
    if cache_bytes < one * page:
        raise UsageError(
            f"cache: {cache_bytes} bytes do not hold one request of {one * block_length} tokens, which takes "
            f"{one * page}; allow more, or shorter requests"
        )
    return cache_bytes // page


def _room(max_positions: int | None, block_length: int, rows: int) -> int:
    """Blocks in one forward."""
    if max_positions is None:
        return max(_POSITIONS // block_length, 2 * rows, SMALLEST_ROOM)
    if max_positions < SMALLEST_ROOM * block_length:
        raise UsageError(
            f"max positions: got {max_positions}, one forward must have room for {SMALLEST_ROOM} blocks of "
            f"{block_length}, {SMALLEST_ROOM * block_length}"
        )
    return max_positions // block_length
