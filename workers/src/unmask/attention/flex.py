"""Block-sparse attention on a GPU: torch's flex attention, with tiles worked out from the metadata.

Flex attention skips tiles of 128 x 128 scores in which nothing is allowed, and applies
the rule only in tiles where some are. Finding the tiles by evaluating the rule at every
pair of tokens costs a dense mask, which is what block diffusion has no use for: at 4,096
tokens and blocks of 32, three quarters of ``[x_t ; x_0]`` x ``[x_t ; x_0]`` is empty.

Which tiles those are is found by :mod:`~unmask.attention.tiles`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unmask.attention.metadata import AttentionMetadata
from unmask.attention.tiles import tiles_of

__all__ = ["TILE", "FlexPlan", "compiled_flex_attention", "plan_flex"]

TILE = 128
"""Queries and keys of one tile; what flex attention's kernels are tuned for."""


@dataclass(frozen=True, slots=True)
class FlexPlan:
    """How the queries of one forward attend to its keys, by flex attention."""

    block_mask: BlockMask
    compute: Callable[..., Tensor]

    def attend(self, query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor) -> Tensor:
        """See :meth:`unmask.attention.backend.AttentionPlan.attend`."""
        grouped = query_BHQD.shape[1] != key_BGKD.shape[1]
        return self.compute(query_BHQD, key_BGKD, value_BGKD, block_mask=self.block_mask, enable_gqa=grouped)


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Flex attention as a fused kernel; each new shape is compiled once."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention))


def plan_flex(
    query: AttentionMetadata,
    key: AttentionMetadata,
    *,
    tile: int = TILE,
    compute: Callable[..., Tensor] = flex_attention,
) -> FlexPlan:
    """Plan one forward for flex attention.

    Args:
        query: Who the queries are.
        key: Who the keys are.
        tile: Queries and keys of one tile.
        compute: ``flex_attention``, or that compiled. Uncompiled it makes all scores, for tests.
    """
    tiles = tiles_of(query, key, tile=tile)
    partial = tiles.some & ~tiles.all

    def rule(row: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_document = query.document[row, q] == key.document[row, k]
        query_view, key_view = query.view[row, q], key.view[row, k]
        query_block, key_block = query.block[row, q], key.block[row, k]
        clean = (key_view == 0) & (key_block < query_block + (query_view == 0).to(query_block.dtype))
        noisy = (key_view != 0) & (query_view == key_view) & (query_block == key_block)
        return same_document & (clean | noisy)

    block_mask = BlockMask.from_kv_blocks(
        *_indices(partial),
        *_indices(tiles.all),
        BLOCK_SIZE=(tile, tile),
        mask_mod=rule,
        seq_lengths=(query.shape[1], key.shape[1]),
    )
    return FlexPlan(block_mask, compute)


def _indices(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Flex attention's form: how many key tiles each row of tiles has, and which, those first; one head."""
    chosen = tiles.unsqueeze(1)
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)
