"""The experts of a few blocks on a GPU: two kernels over whatever experts the tokens chose.

A step of one block reads nearly every expert for one or two rows each, and is as long as that reading takes;
what has to be avoided is everything else. So copies of tokens are not gathered, nor gates and ups written
out: a program takes up to ``ROWS`` of the copies that chose one expert where they lie, goes over its columns
of both projections, and leaves the gated product. The second kernel writes each weighted result to a place
of its own, and those of a token are added up in the order of its choices. No number is added to by two
programs at a time: a row's result depends on nothing but the row, to the bit.

How many tiles of rows there are is known to the GPU alone. As many programs are launched as there could be,
a number that depends on shapes; those beyond end at once, and nobody waits for the host. So a launch can be
recorded in a CUDA graph. Shape letters as in :mod:`unmask.models.moe`; L tiles of rows.

Weights may be whole numbers of eight bits with a scale of each output channel: they are multiplied as numbers
of the tokens' format, in which they are exact, and sums by the scale (weight-only int8).

Tests run these kernels in Triton's interpreter beside :func:`unmask.models.moe.experts_one_by_one`, and
compile them for the GPUs that are meant.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["ROWS", "RowTiles", "experts_at_once", "linear_of_levels", "row_tiles"]

ROWS = 16
"""Rows of a tile: the fewest that a tensor core multiplies, and the more an expert of a step rarely has."""
_COLUMNS = 64
_DEPTH = 64
_LAUNCH = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Which rows each program takes, of copies sorted by expert."""

    copy: Tensor
    """int64 (N,): the copies, those of expert 0 first; copy c is the token c // K's choice c % K."""
    expert: Tensor
    """int64 (L,): the expert of each tile; any where the tile has no rows."""
    start: Tensor
    """int64 (L,): its first row."""
    stop: Tensor
    """int64 (L,): the row behind its last, of this expert; at most the start where it has none."""


def row_tiles(experts_TK: Tensor, num_experts: int) -> RowTiles:
    """Share out the copies; what is computed has the shapes that follow from T, K and E alone."""
    chosen_N = experts_TK.flatten()
    most = len(chosen_N) // ROWS + min(num_experts, len(chosen_N))
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=chosen_N.device)
    counts_E.scatter_add_(0, chosen_N, torch.ones_like(chosen_N))
    tiles_E = counts_E.add(ROWS - 1).div(ROWS, rounding_mode="floor")
    behind_E, rows_E = tiles_E.cumsum(0), counts_E.cumsum(0)
    tile_L = torch.arange(most, device=chosen_N.device)
    expert_L = torch.searchsorted(behind_E, tile_L, right=True).clamp_max_(num_experts - 1)
    first_E = rows_E - counts_E
    number_L = tile_L - (behind_E - tiles_E)[expert_L]
    return RowTiles(
        torch.argsort(chosen_N, stable=True), expert_L, first_E[expert_L] + number_L * ROWS, rows_E[expert_L]
    )


def experts_at_once(
    hidden_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_EOD: Tensor,
    down_EDI: Tensor,
    gate_up_scale_EO: Tensor | None = None,
    down_scale_ED: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, (T, D) in the tokens' dtype; sums are float32.

    Args:
        hidden_TD: Contiguous.
        experts_TK: int64.
        weights_TK: float32.
        gate_up_EOD: Contiguous, gate rows first: O = 2 x I. The tokens' dtype, or int8.
        down_EDI: Likewise.
        gate_up_scale_EO: float32, where weights are int8: what each row of them is multiplied by.
        down_scale_ED: Likewise.
    """
    tokens, hidden = hidden_TD.shape
    num_experts, _, inner = down_EDI.shape
    assert hidden_TD.is_contiguous() and gate_up_EOD.is_contiguous() and down_EDI.is_contiguous()
    tiles = row_tiles(experts_TK, num_experts)
    copies, most = experts_TK.numel(), len(tiles.expert)
    where = (tiles.copy, tiles.expert, tiles.start, tiles.stop)
    inner_NI = hidden_TD.new_empty(copies, inner)
    _gated[(most, triton.cdiv(inner, _COLUMNS))](
        hidden_TD,
        gate_up_EOD,
        gate_up_scale_EO,
        inner_NI,
        *where,
        hidden,
        inner,
        CHOICES=experts_TK.shape[1],
        SCALED=gate_up_scale_EO is not None,
        TILE_ROWS=ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        **_LAUNCH,
    )
    out_ND = hidden_TD.new_empty(copies, hidden, dtype=torch.float32)
    _weighted[(most, triton.cdiv(hidden, _COLUMNS))](
        inner_NI,
        down_EDI,
        down_scale_ED,
        weights_TK,
        out_ND,
        *where,
        inner,
        hidden,
        SCALED=down_scale_ED is not None,
        TILE_ROWS=ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        **_LAUNCH,
    )
    return out_ND.view(tokens, -1, hidden).sum(1).to(hidden_TD.dtype)


def linear_of_levels(x_NI: Tensor, levels_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Rows times an int8 weight whose row o is multiplied by ``scale[o]``: (N, O) in the rows' dtype."""
    rows, inner = x_NI.shape
    outer = len(levels_OI)
    out_NO = x_NI.new_empty(rows, outer)
    _scaled_product[(triton.cdiv(rows, ROWS), triton.cdiv(outer, _COLUMNS))](
        x_NI,
        levels_OI,
        scale_O,
        out_NO,
        rows,
        inner,
        outer,
        x_NI.stride(0),
        TILE_ROWS=ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        **_LAUNCH,
    )
    return out_NO


@triton.jit
def _gated(
    hidden,
    weight,
    scale,
    inner,
    copy,
    expert_of,
    start_of,
    stop_of,
    hidden_size,
    inner_size,
    CHOICES: tl.constexpr,
    SCALED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """silu(gate) * up of one tile of copies, some columns of it."""
    tile = tl.program_id(0)
    start, stop = tl.load(start_of + tile), tl.load(stop_of + tile)
    if start >= stop:
        return
    expert = tl.load(expert_of + tile)
    row = start + tl.arange(0, TILE_ROWS)
    is_row = row < stop
    token = tl.load(copy + row, mask=is_row, other=0) // CHOICES
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < inner_size
    depth = tl.arange(0, DEPTH)
    gates = weight + (expert * 2 * inner_size + column[:, None]) * hidden_size + depth[None, :]
    tokens = hidden + token[:, None] * hidden_size + depth[None, :]
    gate = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
    up = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
    for done in range(0, hidden_size, DEPTH):
        is_depth = done + depth < hidden_size
        x = tl.load(tokens + done, mask=is_row[:, None] & is_depth[None, :], other=0.0)
        there = is_column[:, None] & is_depth[None, :]
        of_gate = tl.load(gates + done, mask=there, other=0.0).to(x.dtype)
        gate += tl.dot(x, tl.trans(of_gate), input_precision="ieee")
        of_up = tl.load(gates + inner_size * hidden_size + done, mask=there, other=0.0).to(x.dtype)
        up += tl.dot(x, tl.trans(of_up), input_precision="ieee")
    if SCALED:
        scales = scale + expert * 2 * inner_size + column
        gate *= tl.load(scales, mask=is_column, other=0.0)[None, :]
        up *= tl.load(scales + inner_size, mask=is_column, other=0.0)[None, :]
    product = (gate / (1.0 + tl.exp(-gate)) * up).to(inner.dtype.element_ty)
    here = is_row[:, None] & is_column[None, :]
    tl.store(inner + row[:, None] * inner_size + column[None, :], product, mask=here)


@triton.jit
def _weighted(
    inner,
    weight,
    scale,
    weights,
    out,
    copy,
    expert_of,
    start_of,
    stop_of,
    inner_size,
    hidden_size,
    SCALED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """What a tile's expert makes of gated products, times the copies' weights, at the copies' places."""
    tile = tl.program_id(0)
    start, stop = tl.load(start_of + tile), tl.load(stop_of + tile)
    if start >= stop:
        return
    expert = tl.load(expert_of + tile)
    row = start + tl.arange(0, TILE_ROWS)
    is_row = row < stop
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < hidden_size
    depth = tl.arange(0, DEPTH)
    rows = inner + row[:, None] * inner_size + depth[None, :]
    columns = weight + (expert * hidden_size + column[:, None]) * inner_size + depth[None, :]
    total = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
    for done in range(0, inner_size, DEPTH):
        is_depth = done + depth < inner_size
        x = tl.load(rows + done, mask=is_row[:, None] & is_depth[None, :], other=0.0)
        there = is_column[:, None] & is_depth[None, :]
        of_column = tl.load(columns + done, mask=there, other=0.0).to(x.dtype)
        total += tl.dot(x, tl.trans(of_column), input_precision="ieee")
    if SCALED:
        total *= tl.load(scale + expert * hidden_size + column, mask=is_column, other=0.0)[None, :]
    place = tl.load(copy + row, mask=is_row, other=0)
    total *= tl.load(weights + place, mask=is_row, other=0.0)[:, None]
    here = is_row[:, None] & is_column[None, :]
    tl.store(out + place[:, None] * hidden_size + column[None, :], total, mask=here)


@triton.jit
def _scaled_product(
    rows_of,
    weight,
    scale,
    out,
    rows,
    inner_size,
    outer_size,
    row_stride,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of rows by some rows of an int8 weight."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_row = row < rows
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < outer_size
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
    for done in range(0, inner_size, DEPTH):
        is_depth = done + depth < inner_size
        at = rows_of + row[:, None] * row_stride + done + depth[None, :]
        x = tl.load(at, mask=is_row[:, None] & is_depth[None, :], other=0.0)
        lies = weight + column[:, None] * inner_size + done + depth[None, :]
        of_column = tl.load(lies, mask=is_column[:, None] & is_depth[None, :], other=0.0).to(x.dtype)
        total += tl.dot(x, tl.trans(of_column), input_precision="ieee")
    total *= tl.load(scale + column, mask=is_column, other=0.0)[None, :]
    here = is_row[:, None] & is_column[None, :]
    tl.store(out + row[:, None] * outer_size + column[None, :], total.to(out.dtype.element_ty), mask=here)
