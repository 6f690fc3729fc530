"""Block-sparse attention on a GPU: torch's flex attention, with tiles worked out from the metadata.

Flex attention skips tiles of 128 x 128 scores in which nothing is allowed, and applies
the rule only in tiles where some are. Finding the tiles by evaluating the rule at every
pair of tokens costs a dense mask, which is what block diffusion has no use for: at 4,096
tokens and blocks of 32, three quarters of ``[x_t ; x_0]`` x ``[x_t ; x_0]`` is empty.

Tokens come in runs that stand alike under the rule (same view, document and block), so
the rule is evaluated between runs, one row of tiles at a time: S x runs / B instead of S x S,
exactly, whatever the order of the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unmask.attention.metadata import AttentionMetadata, may_attend

__all__ = ["TILE", "FlexPlan", "Tiles", "compiled_flex_attention", "plan_flex", "tiles_of"]

TILE = 128
"""Queries and keys of one tile; what flex attention's kernels are tuned for."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which tiles hold allowed pairs; bool (B, query tiles, key tiles)."""

    some: Tensor
    """At least one pair is allowed."""
    all: Tensor
    """Every pair is; a tile that the rows do not fill is never among them."""


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


def tiles_of(query: AttentionMetadata, key: AttentionMetadata, *, tile: int = TILE) -> Tiles:
    """Classify the tiles of ``tile`` queries by ``tile`` keys."""
    key_runs, run_of_key = _runs(key)
    key_tiles = -(-key.shape[1] // tile)
    rows, runs = key_runs.shape
    # How many tokens of each run stand in each tile: the weights that turn runs into tokens.
    tile_of_key = torch.arange(key.shape[1], device=run_of_key.device) // tile
    counts = torch.zeros(rows, runs, key_tiles, device=run_of_key.device)
    flat = run_of_key * key_tiles + tile_of_key
    counts.flatten(1).scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    some, every = [], []
    for start in range(0, query.shape[1], tile):
        queries = _slice(query, start, start + tile)
        allowed = may_attend(queries, key_runs).to(counts.dtype)  # (B, tile, runs)
        pairs = (allowed @ counts).sum(1)  # (B, key tiles)
        some.append(pairs > 0)
        every.append(pairs == tile * tile)
    return Tiles(torch.stack(some, 1), torch.stack(every, 1))


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


def _runs(tokens: AttentionMetadata) -> tuple[AttentionMetadata, Tensor]:
    """Maximal stretches of tokens that are alike: their metadata (B, runs), and each token's run (B, S)."""
    columns = torch.stack((tokens.document, tokens.block, tokens.view), -1)
    changes = (columns[:, 1:] != columns[:, :-1]).any(-1)
    run = torch.nn.functional.pad(changes.cumsum(1), (1, 0))
    count = int(run.max()) + 1
    # The runs that a shorter row lacks repeat its last token; no token belongs to them.
    first = torch.searchsorted(run, torch.arange(count, device=run.device).expand(len(run), -1).contiguous())
    first = first.clamp(max=run.shape[1] - 1)
    picked = (t.gather(1, first) for t in (tokens.position, tokens.document, tokens.block, tokens.view))
    return AttentionMetadata(*picked), run


def _slice(tokens: AttentionMetadata, start: int, stop: int) -> AttentionMetadata:
    columns = (tokens.position, tokens.document, tokens.block, tokens.view)
    return AttentionMetadata(*(column[:, start:stop] for column in columns))
