"""Attention on a CPU, a tile of queries at a time, each with the keys that it may see and no others.

A dense mask makes scaled-dot-product attention compute every score and throw most away: of
``[x_t ; x_0]`` x ``[x_t ; x_0]`` at 2,048 tokens and blocks of 32, three quarters. Here each tile of
queries attends to the tiles of keys in which some pair is allowed, under a mask of that size, or none
where all of it is. The result is that of the dense mask up to rounding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.attention.metadata import AttentionMetadata, may_attend
from unmask.attention.tiles import part_of, tiles_of

__all__ = ["SMALLEST", "TILE", "TiledPlan", "plan_tiled"]

TILE = 256
"""Queries and keys of one tile. 128 to 512 were within a fifth of each other on the processors tried."""

SMALLEST = 4 * TILE
"""Queries from which on tiles pay: below, the dense mask was faster."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tile of queries, and what it sees."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None
    """(B, 1, queries, keys) bool, True where allowed; None where everything is."""


@dataclass(frozen=True, slots=True)
class TiledPlan:
    """How the queries of one forward attend to its keys, tile by tile."""

    pieces: tuple[Piece, ...]

    def attend(self, query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor) -> Tensor:
        """See :meth:`unmask.attention.backend.AttentionPlan.attend`."""
        grouped = query_BHQD.shape[1] != key_BGKD.shape[1]
        return torch.cat(
            [
                F.scaled_dot_product_attention(
                    query_BHQD[:, :, piece.queries],
                    _chosen(key_BGKD, piece.keys),
                    _chosen(value_BGKD, piece.keys),
                    attn_mask=piece.mask,
                    enable_gqa=grouped,
                )
                for piece in self.pieces
            ],
            dim=2,
        )


def plan_tiled(query: AttentionMetadata, key: AttentionMetadata, *, tile: int = TILE) -> TiledPlan:
    """Plan one forward in tiles of ``tile`` tokens; a tile of keys that any row of the batch sees is kept."""
    seen = tiles_of(query, key, tile=tile).some.any(0)
    pieces = []
    for number, row in enumerate(seen):
        queries = slice(number * tile, min((number + 1) * tile, query.shape[1]))
        keys = _stretches(row, tile, key.shape[1])
        asked = part_of(query, queries.start, queries.stop)
        allowed = torch.cat([may_attend(asked, part_of(key, one.start, one.stop)) for one in keys], dim=-1)
        pieces.append(Piece(queries, keys, None if bool(allowed.all()) else allowed.unsqueeze(1)))
    return TiledPlan(tuple(pieces))


def _stretches(chosen: Tensor, tile: int, length: int) -> tuple[slice, ...]:
    """The tokens of the chosen tiles, neighbouring tiles as one stretch."""
    stretches: list[slice] = []
    for number in chosen.nonzero()[:, 0].tolist():
        start, stop = number * tile, min((number + 1) * tile, length)
        if stretches and stretches[-1].stop == start:
            start = stretches.pop().start
        stretches.append(slice(start, stop))
    return tuple(stretches)


def _chosen(tokens_BGKD: Tensor, stretches: tuple[slice, ...]) -> Tensor:
    parts = [tokens_BGKD[:, :, stretch] for stretch in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
