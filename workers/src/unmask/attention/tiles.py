"""Which tiles of queries by keys hold allowed pairs, worked out from the metadata.

Tokens come in runs that stand alike under the rule (same view, document and block), so
the rule is evaluated between runs, one row of tiles at a time: S x runs / B instead of S x S,
exactly, whatever the order of the tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.attention.metadata import AttentionMetadata, may_attend

__all__ = ["Tiles", "part_of", "tiles_of"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which tiles hold allowed pairs; bool (B, query tiles, key tiles)."""

    some: Tensor
    """At least one pair is allowed."""
    all: Tensor
    """Every pair is; a tile that the rows do not fill is never among them."""


def tiles_of(query: AttentionMetadata, key: AttentionMetadata, *, tile: int) -> Tiles:
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
        queries = part_of(query, start, start + tile)
        allowed = may_attend(queries, key_runs).to(counts.dtype)  # (B, tile, runs)
        pairs = (allowed @ counts).sum(1)  # (B, key tiles)
        some.append(pairs > 0)
        every.append(pairs == tile * tile)
    return Tiles(torch.stack(some, 1), torch.stack(every, 1))


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


def part_of(tokens: AttentionMetadata, start: int, stop: int) -> AttentionMetadata:
    """Tokens ``start`` to ``stop`` of each row."""
    columns = (tokens.position, tokens.document, tokens.block, tokens.view)
    return AttentionMetadata(*(column[:, start:stop] for column in columns))
