"""Keys and values in pages of one block each, for sequences that share a forward and, maybe, pages.

The tensors alone. Which sequence has which page, and which of them may be written, is decided by whoever
lays out a forward; here a forward writes the pages of the blocks that it computes and reads those before
them. Shape letters: G key/value heads, P pages, B positions of a block, S those of a forward, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmask.attention import AttentionMetadata, AttentionPlan
from unmask.attention.paged import Span, plan_gathered, plan_paged
from unmask.models.config import ModelConfig

__all__ = ["PagedCache", "page_bytes"]


def page_bytes(config: ModelConfig, *, block_length: int, dtype: torch.dtype) -> int:
    """Memory of one page: keys and values of all layers for one block."""
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * block_length
    return elements * dtype.itemsize


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
    _plan: AttentionPlan | None = field(init=False, default=None)
    _written: Tensor | None = field(init=False, default=None)

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
        on_gpu = torch.device(self.device).type != "cpu"
        chosen = plan_gathered if on_gpu else plan_paged
        self._plan = chosen(spans, block_length=self.block_length, device=self.device)
        written = [page for span in spans for page in span.written]
        self._written = torch.tensor(written, device=self.device)
        blocks = [block for span in spans for block in range(span.first, len(span.pages))]
        block = torch.tensor(blocks, device=self.device)
        place = torch.arange(self.block_length, device=self.device)
        position = (block[:, None] * self.block_length + place).flatten().unsqueeze(0)
        return AttentionMetadata.block_causal(
            position, torch.zeros_like(position), block_length=self.block_length
        )

    def plan(self, queries: AttentionMetadata) -> AttentionPlan:
        """How the forward attends; its queries are those that were laid out."""
        if self._plan is None:
            raise RuntimeError("lay_out() the blocks before a forward")
        return self._plan

    def extend(self, layer: int, key_1GSD: Tensor, value_1GSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the forward's keys and values into their pages; return all pages, each (G, P, B, D)."""
        assert self._written is not None, "lay_out() comes first"
        for pages, new in ((self._keys, key_1GSD), (self._values, value_1GSD)):
            pages[layer].index_copy_(1, self._written, new[0].unflatten(1, (-1, self.block_length)))
        return self._keys[layer], self._values[layer]
