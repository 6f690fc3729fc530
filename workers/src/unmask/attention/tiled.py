"""Attention on a CPU, a tile of queries at a time, each with the keys that it may see and no others.

A dense mask makes scaled-dot-product attention compute every score and throw most away: of
``[x_t ; x_0]`` x ``[x_t ; x_0]`` at 2,048 tokens and blocks of 32, three quarters. Here each tile of
queries attends to the tiles of keys in which some pair is allowed, under a mask of that size, or none
where all of it is. The result is that of the dense mask up to rounding.

For a backward pass, queries, keys, values, the result and one number per query are kept, and the
scores of a tile are computed again (Dao et al., arXiv 2205.14135, algorithm 4). Scaled-dot-product
attention, tile by tile, would keep for each tile the keys and values that it saw: with Q / tile tiles,
many times all there are.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.attention.metadata import AttentionMetadata, may_attend
from unmask.attention.tiles import part_of, tiles_of

__all__ = ["SMALLEST", "TILE", "TiledPlan", "plan_tiled"]

TILE = 128
"""Queries and keys of one tile; 64 took as long, and 256 a quarter longer, on the processor tried."""

SMALLEST = 8 * TILE
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
        if torch.is_grad_enabled():
            out: Tensor = _Attend.apply(query_BHQD, key_BGKD, value_BGKD, self.pieces)
            return out
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


class _Attend(torch.autograd.Function):
    """Attention in tiles that keeps nothing per tile. R query heads share a key head; P is a piece's queries.

    Sums run in float32 or wider, whatever the format of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, pieces: tuple[Piece, ...]
    ) -> Tensor:
        """As in :meth:`TiledPlan.attend`."""
        query_BGRQD = query_BHQD.unflatten(1, (key_BGKD.shape[1], -1))
        rows, heads, queries, size = query_BHQD.shape
        # In this order the heads of a token lie side by side, as the output layer wants them.
        out_BHQD = query_BHQD.new_empty(rows, queries, heads, size).transpose(1, 2)
        out_BGRQD = out_BHQD.unflatten(1, query_BGRQD.shape[1:3])
        logsum_BGRQ = query_BGRQD.new_empty(query_BGRQD.shape[:-1], dtype=_wide(query_BHQD))
        for piece in pieces:
            scores = _scores(query_BGRQD, _seen(key_BGKD, piece), piece)
            top = scores.amax(-1, keepdim=True)
            total = scores.sub_(top).exp_().sum(-1, keepdim=True)
            weighed = scores.flatten(2, 3) @ _seen(value_BGKD, piece)
            out_BGRQD[:, :, :, piece.queries] = weighed.unflatten(2, scores.shape[2:4]) / total
            logsum_BGRQ[:, :, :, piece.queries] = (top + total.log())[..., 0]
        ctx.save_for_backward(query_BHQD, key_BGKD, value_BGKD, out_BHQD, logsum_BGRQ)
        ctx.pieces = pieces
        return out_BHQD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values, summed in the order of the pieces."""
        query_BHQD, key_BGKD, value_BGKD, out_BHQD, logsum_BGRQ = ctx.saved_tensors
        (up_BHQD,) = upstream
        shape, wide = (key_BGKD.shape[1], -1), _wide(query_BHQD)
        query_BGRQD, up_BGRQD = query_BHQD.unflatten(1, shape), up_BHQD.unflatten(1, shape)
        # What a query's weights have in common in the gradient of its scores.
        common_BGRQ = (up_BHQD.to(wide) * out_BHQD).sum(-1).unflatten(1, shape)
        query_grad_BGRQD = torch.empty_like(query_BGRQD)
        key_grad, value_grad = (torch.zeros_like(t, dtype=wide) for t in (key_BGKD, value_BGKD))
        scale = query_BHQD.shape[-1] ** -0.5
        for piece in ctx.pieces:
            key, value = _seen(key_BGKD, piece), _seen(value_BGKD, piece)
            query = query_BGRQD[:, :, :, piece.queries].to(wide)
            up = up_BGRQD[:, :, :, piece.queries].to(wide).flatten(2, 3)
            weights = _scores(query_BGRQD, key, piece)
            weights.sub_(logsum_BGRQ[:, :, :, piece.queries, None]).exp_()
            of_weights = (up @ value.transpose(-1, -2)).view_as(weights)
            of_scores = of_weights.sub_(common_BGRQ[:, :, :, piece.queries, None]).mul_(weights).mul_(scale)
            _add(value_grad, piece, weights.flatten(2, 3).transpose(-1, -2) @ up)
            _add(key_grad, piece, of_scores.flatten(2, 3).transpose(-1, -2) @ query.flatten(2, 3))
            query_grad_BGRQD[:, :, :, piece.queries] = (of_scores.flatten(2, 3) @ key).view_as(query)
        return (
            query_grad_BGRQD.flatten(1, 2),
            key_grad.to(key_BGKD.dtype),
            value_grad.to(value_BGKD.dtype),
            None,
        )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _seen(tokens_BGKD: Tensor, piece: Piece) -> Tensor:
    """The keys or values of ``piece``, float32 or wider."""
    return _chosen(tokens_BGKD, piece.keys).to(_wide(tokens_BGKD))


def _scores(query_BGRQD: Tensor, key_BGKD: Tensor, piece: Piece) -> Tensor:
    """Scaled and masked scores of ``piece`` on the keys that it sees, (B, G, R, P, keys)."""
    query = query_BGRQD[:, :, :, piece.queries].to(key_BGKD.dtype) * query_BGRQD.shape[-1] ** -0.5
    scores: Tensor = (query.flatten(2, 3) @ key_BGKD.transpose(-1, -2)).unflatten(2, query.shape[2:4])
    if piece.mask is not None:
        scores.masked_fill_(~piece.mask.unsqueeze(1), float("-inf"))
    return scores


def _add(total_BGKD: Tensor, piece: Piece, part: Tensor) -> None:
    """Add what a piece gives to the keys that it sees."""
    first = 0
    for stretch in piece.keys:
        last = first + stretch.stop - stretch.start
        total_BGKD[:, :, stretch] += part[:, :, first:last]
        first = last


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
