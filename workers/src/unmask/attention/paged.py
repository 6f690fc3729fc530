"""Attention of several sequences in one forward, over keys and values that lie in pages of one block each.

The queries of a forward are whole blocks, of one sequence or of many, laid out one behind the other in a
single row. Attention is block-causal: every position of a block sees the same keys, those of its sequence
from the first block to its own. So no mask is needed: each block of queries is one call of scaled-dot-product
attention over exactly the keys that it sees, and nothing is padded to the longest sequence. The query heads
that share a key head are folded into the queries, which saves expanding keys and values.

What is computed for a block of queries depends on its own sequence alone, down to the shapes of the calls.
So neighbours in the forward cannot change a bit of it.

A GPU wants few large calls rather than many small ones. There one kernel attends for all blocks of queries
and reads the pages where they lie (:class:`TabledPlan`). Where it cannot run, pages of all sequences are
gathered and attended to under one mask (:class:`GatheredPlan`), which is also the plain way that the others
are tested against. Shape letters: G key/value heads, H query heads, R = H / G, N blocks of queries, B
positions of a block, P pages, W the most pages that a block sees, K keys, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GatheredPlan", "PagedPlan", "Span", "TabledPlan", "plan_gathered", "plan_paged", "seen_pages"]


@dataclass(frozen=True, slots=True)
class Span:
    """What a sequence brings to a forward: its last blocks ask, and see themselves and what precedes them."""

    pages: tuple[int, ...]
    """Pages of the sequence's blocks, from the first to the last that asks."""
    asking: int
    """How many blocks ask."""

    @property
    def first(self) -> int:
        """Block from which on they ask."""
        return len(self.pages) - self.asking

    @property
    def written(self) -> tuple[int, ...]:
        """Pages that the forward writes: those of the blocks that ask."""
        return self.pages[self.first :]


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A span as attention reads it."""

    pages: slice | Tensor
    """A slice where the pages lie side by side, in order; else int64 (P,)."""
    first: int
    """Block from which on it asks."""
    asking: int

    def of(self, pages_GPBD: Tensor) -> Tensor:
        """Keys or values, (1, G, K, D): in place where that is possible."""
        if isinstance(self.pages, slice):
            chosen = pages_GPBD[:, self.pages]
        else:
            chosen = pages_GPBD.index_select(1, self.pages)
        return chosen.flatten(1, 2).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """One call for each block of queries, over the keys that it sees."""

    block_length: int
    sequences: tuple[_Sequence, ...]

    def attend(self, query_1HSD: Tensor, key_GPBD: Tensor, value_GPBD: Tensor) -> Tensor:
        """(1, H, S, D), S = N x B: see :meth:`unmask.attention.backend.AttentionPlan.attend`."""
        asked = _by_block(query_1HSD, len(key_GPBD), self.block_length)
        answers = torch.empty_like(asked)
        block = 0
        for sequence in self.sequences:
            key, value = sequence.of(key_GPBD), sequence.of(value_GPBD)
            for last in range(sequence.first, sequence.first + sequence.asking):
                seen = (last + 1) * self.block_length
                answers[block] = F.scaled_dot_product_attention(
                    asked[block : block + 1], key[:, :, :seen], value[:, :, :seen]
                )[0]
                block += 1
        return _in_a_row(answers, self.block_length)


@dataclass(frozen=True, slots=True)
class GatheredPlan:
    """One call for all, over keys and values gathered for each block of queries and padded to the longest."""

    block_length: int
    table: Tensor
    """int64 (N, P): the pages that each block of queries sees, padded with page 0."""
    mask: Tensor | None
    """bool (N, 1, 1, P x B), True where a key is seen; None where all are."""

    def attend(self, query_1HSD: Tensor, key_GPBD: Tensor, value_GPBD: Tensor) -> Tensor:
        """(1, H, S, D), S = N x B: see :meth:`unmask.attention.backend.AttentionPlan.attend`."""
        asked = _by_block(query_1HSD, len(key_GPBD), self.block_length)
        key, value = (pages[:, self.table].transpose(0, 1).flatten(2, 3) for pages in (key_GPBD, value_GPBD))
        answers = F.scaled_dot_product_attention(asked, key, value, attn_mask=self.mask)
        return _in_a_row(answers, self.block_length)


@dataclass(frozen=True, slots=True)
class TabledPlan:
    """One kernel for all, on a GPU (:mod:`unmask.attention.paged_kernel`)."""

    table: Tensor
    """Integers (N, W): the pages that each block of queries sees; behind them, any."""
    seen: Tensor
    """Integers (N,): how many these are."""

    def attend(self, query_1HSD: Tensor, key_GPBD: Tensor, value_GPBD: Tensor) -> Tensor:
        """(1, H, S, D), S = N x B: see :meth:`unmask.attention.backend.AttentionPlan.attend`."""
        from unmask.attention.paged_kernel import attend_to_pages  # no Triton where there is no GPU

        return attend_to_pages(query_1HSD, key_GPBD, value_GPBD, self.table, self.seen)


def _by_block(query_1HSD: Tensor, groups: int, block_length: int) -> Tensor:
    """Queries by their block, the heads that share a key head one behind the other: (N, G, R x B, D)."""
    query_GRNBD: Tensor = query_1HSD[0].unflatten(1, (-1, block_length)).unflatten(0, (groups, -1))
    return query_GRNBD.permute(2, 0, 1, 3, 4).flatten(2, 3)


def _in_a_row(answers: Tensor, block_length: int) -> Tensor:
    """The inverse, (1, H, S, D)."""
    answers_NGRBD: Tensor = answers.unflatten(2, (-1, block_length))
    return answers_NGRBD.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1).unsqueeze(0)


def plan_paged(spans: Sequence[Span], *, block_length: int, device: torch.device | str = "cpu") -> PagedPlan:
    """Plan a forward whose queries are the asking blocks of ``spans``, in their order."""
    sequences = (_Sequence(_side_by_side(span.pages, device), span.first, span.asking) for span in spans)
    return PagedPlan(block_length, tuple(sequences))


def _side_by_side(pages: tuple[int, ...], device: torch.device | str) -> slice | Tensor:
    start, stop = pages[0], pages[0] + len(pages)
    if pages == tuple(range(start, stop)):
        return slice(start, stop)
    return torch.tensor(pages, device=device)


def plan_gathered(
    spans: Sequence[Span], *, block_length: int, device: torch.device | str = "cpu"
) -> GatheredPlan:
    """The same in the plain way."""
    seen = [list(pages) for pages in seen_pages(spans)]
    longest = max(map(len, seen))
    table = torch.tensor([pages + [0] * (longest - len(pages)) for pages in seen], device=device)
    counts = torch.tensor([len(pages) for pages in seen], device=device) * block_length
    allowed = torch.arange(longest * block_length, device=device) < counts[:, None]
    mask = None if min(map(len, seen)) == longest else allowed[:, None, None]
    return GatheredPlan(block_length, table, mask)


def seen_pages(spans: Sequence[Span]) -> list[tuple[int, ...]]:
    """The pages that each block of queries sees, in the order of the blocks."""
    return [span.pages[: last + 1] for span in spans for last in range(span.first, len(span.pages))]
