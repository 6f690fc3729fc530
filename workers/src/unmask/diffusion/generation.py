"""Block-by-block generation: the plain way, and in batches with a key/value cache.

The sequence is cut into blocks of B positions from the prompt's start. The first block
to be generated holds the prompt's tail, if any; those positions are given, never masked.
A block is denoised (see :mod:`~unmask.diffusion.decoding`) until none of its positions is
masked, then the next one starts. Generation ends with the block that holds an end of
text, or that reaches ``max_new_tokens`` (LLaDA2.0, arXiv 2512.15745, section 5.4); that
block ends as soon as nothing before its end of text is masked.

With a cache a request goes through three kinds of forwards:

* prefill: the whole blocks of the prompt, at once, block-causally;
* denoise: one block with masks; its keys and values are thrown away;
* persist: the block once more, now full, so that its keys and values stand. The last
  block needs none, and where tokens are edited, the forward that edits nothing is it.

Masked positions are kept as a boolean, never recognised by the mask token's id: a
prompt that contains that id is text like any other.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.attention import Attends, AttentionMetadata
from unmask.diffusion.batch import (
    Committed,
    Event,
    Filled,
    Finished,
    ForwardCounts,
    Generation,
    NoRoom,
    Persisted,
    Prefilled,
    check_attends,
    check_idle,
    run_to_end,
)
from unmask.diffusion.block_row import BlockRow, at_places, check_block_request, chosen_one_by_one
from unmask.diffusion.decoding import Candidates, DecodingParams, best_tokens

__all__ = [
    "BlockBatch",
    "BlockCache",
    "Committed",
    "Event",
    "Filled",
    "Finished",
    "ForwardCounts",
    "Generation",
    "Model",
    "Persisted",
    "Prefilled",
    "generate",
    "generate_uncached",
]


class BlockCache(Protocol):
    """What a batch asks of its cache; :class:`unmask.models.cache.RowCache` is one."""

    def select(self, first: int, count: int) -> Any:
        """Let the next forward work on ``count`` rows from ``first``; returns the cache for ``hidden``."""

    def commit(self, row: int, tokens: int) -> None:
        """Keep what the last forward wrote."""

    def clear(self, row: int) -> None:
        """Forget a row."""

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""


class Model(Protocol):
    """The part of :class:`unmask.models.base.LanguageModel` that generation needs."""

    def hidden(self, ids: Tensor, metadata: AttentionMetadata, *, cache: Any = None) -> Tensor:
        """Final hidden states, (B, S) ids to (B, S, D)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores in float32, (..., D) to (..., V)."""

    def new_cache(self, *, rows: int, capacity: int, block_length: int) -> BlockCache:
        """An empty cache beside the model's parameters."""

    @property
    def attends(self) -> Attends:
        """What its tokens see; "blocks" is what this module decodes."""

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""


@dataclass(slots=True)
class _Row(BlockRow):
    """One request, and how much of it the cache holds."""

    cached: int = 0
    """Tokens whose keys and values stand."""


class BlockBatch:
    """Requests decoded together; each gets what it would get alone.

    One :meth:`step` is one forward of the model: either the prefill of one waiting
    request, or one block of every running request, each in its own state (denoise or
    persist). Prefills and decoding take turns, so that neither starves the other.
    Not thread-safe: one thread owns a batch.
    """

    def __init__(self, model: Model, *, rows: int, capacity: int, block_length: int) -> None:
        """Room for ``rows`` requests of at most ``capacity`` tokens each, prompt included.

        Raises:
            ModelError: The model attends to the whole canvas.
        """
        check_attends(model, "blocks")
        self.rows, self.block_length = rows, block_length
        self.capacity = -(-capacity // block_length) * block_length
        self._model = model
        self._cache = model.new_cache(rows=rows, capacity=self.capacity, block_length=block_length)
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._tickets = count()
        self._prefilled_last = False

    @property
    def active(self) -> int:
        """Requests admitted and not finished."""
        return len(self._waiting) + len(self._running)

    @property
    def free_rows(self) -> int:
        """Requests that can be admitted now."""
        return self.rows - self.active

    @property
    def cache_usage(self) -> float:
        """Share of the rows that are in use."""
        return self.active / self.rows

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
            cache_salt: Without effect: nothing is shared.

        Raises:
            UsageError: If the request is empty, does not fit, or has nothing left to generate.
            NoRoom: If no row is free.
        """
        check_block_request(prompt, params, committed, block_length=self.block_length, capacity=self.capacity)
        if self.free_rows == 0:
            raise NoRoom(f"all {self.rows} rows are taken")
        row = _Row(next(self._tickets), params, [*prompt, *committed], prompt_length=len(prompt))
        self._waiting.append(row)
        return row.ticket

    def release(self, ticket: int) -> None:
        """Drop a request between two steps; its row is free at once. Unknown tickets are ignored."""
        for row in self._waiting:
            if row.ticket == ticket:
                self._waiting.remove(row)
                return
        for place, row in enumerate(self._running):
            if row.ticket == ticket:
                self._free(place)
                return

    def forget_stored(self) -> None:
        """Nothing is kept of requests that have ended.

        Raises:
            RuntimeError: If a request is active.
        """
        check_idle(self)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run exactly one forward and return what it brought about.

        Raises:
            RuntimeError: If no request is active.
        """
        while self._waiting and self._waiting[0].start == 0:
            self._run(self._waiting.popleft())
        if self._waiting and not (self._prefilled_last and self._running):
            self._prefilled_last = True
            return self._prefill(self._waiting.popleft())
        if not self._running:
            raise RuntimeError("step() without an active request")
        self._prefilled_last = False
        return self._decode()

    def _run(self, row: _Row) -> None:
        """Give a request whose prefix is cached a row of the cache and its first block."""
        if row.cached == 0:
            self._cache.clear(len(self._running))
        row.open_block()
        self._running.append(row)

    def _prefill(self, row: _Row) -> list[Event]:
        """One forward over the whole blocks of one request's prefix."""
        place, length = len(self._running), row.start
        self._cache.clear(place)
        ids = torch.tensor([row.tokens[:length]], device=self._model.device)
        metadata = AttentionMetadata.single_row(length, block_length=row.length, device=self._model.device)
        self._model.hidden(ids, metadata, cache=self._cache.select(place, 1))
        self._cache.commit(place, length)
        row.cached = length
        row.usage.prefill += 1
        row.usage.positions += length
        self._run(row)
        return [Prefilled(row.ticket, length)]

    def _decode(self) -> list[Event]:
        """One forward over the current block of every running request."""
        rows, length, device = self._running, self.block_length, self._model.device
        ids = torch.tensor([row.block for row in rows], device=device)
        start = torch.tensor([[row.cached] for row in rows], device=device)
        position = start + torch.arange(length, device=device)
        metadata = AttentionMetadata.block_causal(position, torch.zeros_like(position), block_length=length)
        hidden = self._model.hidden(ids, metadata, cache=self._cache.select(0, len(rows)))
        candidates = self._candidates(hidden)
        events: list[Event] = []
        ended = []
        for place, row in enumerate(rows):
            row.usage.positions += length
            if row.closed:
                row.usage.persist += 1
                self._keep_block(place, row)
                events.append(Persisted(row.ticket))
                continue
            step = row.denoise(candidates[place])
            events.append(step)
            if not row.is_full:
                continue
            committed, reason = row.close_block()
            events.append(committed)
            if reason is not None:
                events.append(row.finished(reason))
                ended.append(place)
            elif not step.positions:
                self._keep_block(place, row)
        for place in reversed(ended):
            self._free(place)
        return events

    def _candidates(self, hidden: Tensor) -> list[Candidates]:
        """Token and confidence of every position that matters, on the host: (B,) for each row."""
        wanted = torch.tensor(
            [row.looked_at if not row.closed else [False] * row.length for row in self._running]
        )
        best = Candidates(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        if bool(wanted.any()):
            rows = [row for row in self._running if not row.closed]
            chosen = hidden[wanted.to(hidden.device)]
            if all(row.params.is_plain for row in rows):
                mask_ids = {row.params.mask_token_id for row in rows}
                assert len(mask_ids) == 1, "one model has one mask token"
                best = best_tokens(self._model.logits(chosen), mask_token_id=mask_ids.pop())
            else:
                best = chosen_one_by_one(rows, chosen, self._model.logits)
        return at_places(best, wanted)

    def _keep_block(self, place: int, row: _Row) -> None:
        """The forward just run saw a block's final tokens: keep its keys and values, open the next block."""
        self._cache.commit(place, row.length)
        row.cached += row.length
        row.open_block()

    def _free(self, place: int) -> None:
        """Give row ``place`` back; the last running row takes its place."""
        last = len(self._running) - 1
        if place != last:
            self._cache.move(last, place)
            self._running[place] = self._running[last]
        self._running.pop()


def generate(
    model: Model, prompts: Sequence[Sequence[int]], params: DecodingParams, *, rows: int = 16
) -> list[Generation]:
    """Decode all ``prompts``, at most ``rows`` at a time; results in their order."""
    capacity = max(len(prompt) for prompt in prompts) + params.max_new_tokens
    batch = BlockBatch(
        model, rows=min(rows, len(prompts)), capacity=capacity, block_length=params.block_length
    )
    return run_to_end(batch, prompts, params)


@torch.inference_mode()
def generate_uncached(model: Model, prompt: Sequence[int], params: DecodingParams) -> Generation:
    """The reference: every forward runs over the whole sequence so far, without a cache."""
    check_attends(model, "blocks")
    row = _Row(0, params, list(prompt), prompt_length=len(prompt))
    row.open_block()
    generated: list[int] = []
    while True:
        ids = torch.tensor([row.tokens[: row.start] + row.block], device=model.device)
        metadata = AttentionMetadata.single_row(ids.shape[1], block_length=row.length, device=model.device)
        block = model.hidden(ids, metadata)[0, row.start :]
        wanted = torch.tensor(row.looked_at)
        best = row.choose(model.logits(block[wanted.to(block.device)]))
        row.usage.positions += ids.shape[1]
        row.denoise(at_places(best, wanted.unsqueeze(0))[0])
        if not row.is_full:
            continue
        committed, reason = row.close_block()
        generated += committed.token_ids
        if reason is not None:
            return Generation(generated, reason, row.usage, row.finished(reason).kept_tokens)
        row.open_block()
