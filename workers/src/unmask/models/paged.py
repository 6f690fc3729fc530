"""Keys and values in pages of one block each, for sequences that share a forward and, maybe, pages.

The tensors alone. Which sequence has which page, and which of them may be written, is decided by whoever
lays out a forward; here a forward writes the pages of the blocks that it computes and reads those before
them. Shape letters: G key/value heads, P pages, B positions of a block, S those of a forward, D head size; N
blocks of a forward, W the most pages that one of them sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from unmask.attention import AttentionMetadata, AttentionPlan, kernels
from unmask.attention.paged import Span, TabledPlan, plan_gathered, plan_paged, seen_pages
from unmask.models.config import ModelConfig
from unmask.models.row_tiles import TILE_ROWS

__all__ = ["BlockTensors", "PagedCache", "PagedPart", "page_bytes"]


def page_bytes(config: ModelConfig, *, block_length: int, dtype: torch.dtype) -> int:
    """Memory of one page: keys and values of all layers for one block."""
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * block_length
    return elements * dtype.itemsize


@dataclass(frozen=True, slots=True)
class BlockTensors:
    """All that a forward on a GPU is told of its blocks: views of one tensor, which is copied at once.

    A forward that was recorded reads them where they were then, so others can be copied over them.
    """

    numbers: Tensor
    """int64, flat; all of the others, one behind the other."""
    blocks: int
    block_length: int

    @property
    def ids(self) -> Tensor:
        """(1, S): token ids."""
        return self._part(0, self._positions).unsqueeze(0)

    @property
    def position(self) -> Tensor:
        """(1, S): positions of the tokens in their sequences."""
        return self._part(self._positions, self._positions).unsqueeze(0)

    @property
    def written(self) -> Tensor:
        """(N,): the page of each block."""
        return self._part(2 * self._positions, self.blocks)

    @property
    def seen(self) -> Tensor:
        """(N,): how many pages each block sees."""
        return self._part(2 * self._positions + self.blocks, self.blocks)

    @property
    def table(self) -> Tensor:
        """(N, W): which they are; behind them, page 0."""
        return self.numbers[2 * (self._positions + self.blocks) :].view(self.blocks, -1)

    @property
    def _positions(self) -> int:
        return self.blocks * self.block_length

    def _part(self, start: int, length: int) -> Tensor:
        return self.numbers[start : start + length]

    @classmethod
    def empty(
        cls, blocks: int, *, block_length: int, wide: int, device: torch.device | str = "cpu"
    ) -> "BlockTensors":
        """Zeros for ``blocks`` blocks that see ``wide`` pages at most."""
        length = blocks * (2 * block_length + 2 + wide)
        return cls(torch.zeros(length, dtype=torch.int64, device=device), blocks, block_length)

    @classmethod
    def of(
        cls, ids: Sequence[int], spans: Sequence[Span], *, block_length: int, wide: int | None = None
    ) -> "BlockTensors":
        """On the CPU: the asking blocks of ``spans``, whose tokens are ``ids``."""
        seen = seen_pages(spans)
        made = cls.empty(len(seen), block_length=block_length, wide=wide or max(map(len, seen)))
        made.ids[0] = torch.tensor(ids)
        block = torch.tensor([len(pages) - 1 for pages in seen])
        made.position[0] = (block[:, None] * block_length + torch.arange(block_length)).flatten()
        made.written[:] = torch.tensor([pages[-1] for pages in seen])
        made.seen[:] = block + 1
        for row, pages in zip(made.table, seen, strict=True):
            row[: len(pages)] = torch.tensor(pages)
        return made


@dataclass(slots=True)
class PagedCache:
    """Keys and values of ``pages`` blocks, and one page more for blocks that belong to nobody.

    A forward's blocks are chosen by :meth:`lay_out`. Keys and values that a forward has written are there
    for the next one, which may write them again: what is final, this class does not know.
    """

    config: ModelConfig
    pages: int
    block_length: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    _keys: Tensor = field(init=False)
    _values: Tensor = field(init=False)
    _spans: tuple[Span, ...] = field(init=False, default=())
    _blocks: "_Blocks | None" = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Allocate; memory is touched as pages are first written."""
        c = self.config
        shape = (c.num_hidden_layers, c.num_key_value_heads, self.pages + 1, self.block_length, c.head_dim)
        self._keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._values = torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def nobodys(self) -> int:
        """The page for blocks that belong to no sequence."""
        return self.pages

    def lay_out(self, spans: Sequence[Span]) -> AttentionMetadata:
        """Let the next forward compute the asking blocks of ``spans``; who its tokens are, (1, S)."""
        self._spans = tuple(spans)
        self._blocks = self._laid_out(spans)
        blocks = [block for span in spans for block in range(span.first, len(span.pages))]
        block = torch.tensor(blocks, device=self.device)
        place = torch.arange(self.block_length, device=self.device)
        position = (block[:, None] * self.block_length + place).flatten().unsqueeze(0)
        return AttentionMetadata.block_causal(
            position, torch.zeros_like(position), block_length=self.block_length
        )

    def read_from(self, told: BlockTensors) -> AttentionMetadata:
        """The same of blocks that ``told``, on the cache's device, says while the forward runs."""
        self._spans = ()
        self._blocks = _Blocks(TabledPlan(told.table, told.seen), told.written)
        return AttentionMetadata.block_causal(
            told.position, torch.zeros_like(told.position), block_length=self.block_length
        )

    def plan(self, queries: AttentionMetadata) -> AttentionPlan:
        """How the forward attends; its queries are those that were laid out."""
        if self._blocks is None:
            raise RuntimeError("lay_out() the blocks before a forward")
        return self._blocks.plan

    def extend(self, layer: int, key_1GSD: Tensor, value_1GSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the forward's keys and values into their pages; return all pages, each (G, P, B, D)."""
        assert self._blocks is not None, "lay_out() comes first"
        return self.write(layer, self._blocks.written, key_1GSD, value_1GSD)

    def write(
        self, layer: int, written: Tensor, key_1GSD: Tensor, value_1GSD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of the blocks whose pages are ``written``, int64 (N,)."""
        for pages, new in ((self._keys, key_1GSD), (self._values, value_1GSD)):
            pages[layer].index_copy_(1, written, new[0].unflatten(1, (-1, self.block_length)))
        return self._keys[layer], self._values[layer]

    def divided(self, count: int) -> "list[PagedPart]":
        """The forward that was laid out, in up to ``count`` parts of about as many whole blocks.

        A part sees what those before it have written, so its layers must come after theirs. Parts have whole
        tiles of rows as the forward has (:mod:`unmask.models.row_tiles`): not a bit differs.
        """
        blocks = sum(span.asking for span in self._spans)
        step = TILE_ROWS // math.gcd(TILE_ROWS, self.block_length)
        ends = sorted({min(blocks, step * round(blocks * part / count / step)) for part in range(1, count)})
        parts = []
        for start, stop in pairwise([0, *(end for end in ends if end), blocks]):
            if stop > start:
                spans = _between(self._spans, start, stop)
                where = slice(start * self.block_length, stop * self.block_length)
                parts.append(PagedPart(self, self._laid_out(spans), where))
        return parts

    def _laid_out(self, spans: Sequence[Span]) -> "_Blocks":
        device = torch.device(self.device)
        if kernels.run_on(device):
            nothing = [0] * (self.block_length * sum(span.asking for span in spans))
            told = BlockTensors.of(nothing, spans, block_length=self.block_length)
            return _Blocks(TabledPlan(told.table.to(device), told.seen.to(device)), told.written.to(device))
        chosen = plan_paged if device.type == "cpu" else plan_gathered
        written = [page for span in spans for page in span.written]
        return _Blocks(
            chosen(spans, block_length=self.block_length, device=device), torch.tensor(written, device=device)
        )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks that a forward computes."""

    plan: AttentionPlan
    written: Tensor
    """int64 (N,): their pages."""


@dataclass(frozen=True, slots=True)
class PagedPart:
    """The pages, for some of the blocks that were laid out. See :meth:`PagedCache.divided`."""

    pages: PagedCache
    blocks: _Blocks
    where: slice
    """Positions of the forward that these blocks are."""

    def plan(self, queries: AttentionMetadata) -> AttentionPlan:
        """See :meth:`PagedCache.plan`."""
        return self.blocks.plan

    def extend(self, layer: int, key_1GSD: Tensor, value_1GSD: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`PagedCache.extend`."""
        return self.pages.write(layer, self.blocks.written, key_1GSD, value_1GSD)


def _between(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The asking blocks ``start`` to ``stop``, with all that they see."""
    found, passed = [], 0
    for span in spans:
        low, high = max(start - passed, 0), min(stop - passed, span.asking)
        if high > low:
            found.append(Span(span.pages[: span.first + high], high - low))
        passed += span.asking
    return found
