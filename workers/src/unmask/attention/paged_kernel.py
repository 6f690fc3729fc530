"""Attention over pages on a GPU: one kernel for all sequences of a forward, which reads keys where they lie.

Every position of a block sees the same keys, and query heads share a key head. So the queries that see the
same keys are many, R x B of them, and a product of their tile with a tile of keys is worth a tensor core's
while even where a forward has one block. Softmax runs along, a tile of keys at a time, in float32 (Dao et
al., arXiv 2205.14135); nothing is gathered, padded or masked but the end of the last tile.

Long contexts of few sequences leave most of a GPU idle, so keys are cut into chunks, whose results a second
kernel adds up. A chunk has ``CHUNK`` keys whatever else is in the forward: how a block's sums are made
depends on its own sequence alone, and neighbours do not change a bit of it.

The grid depends on shapes and on nothing that a tensor holds, so a launch can be recorded in a CUDA graph;
programs with nothing to do end at once. Shape letters as in :mod:`unmask.attention.paged`.

Tests run these kernels in Triton's interpreter beside :func:`unmask.attention.attend_plainly`, and compile
them for the GPUs that are meant.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CHUNK", "TilePlan", "attend_to_pages", "tile_plan"]

CHUNK = 512
"""Keys that one program goes over. Not tuned."""
_LARGEST_QUERY_TILE = 64
_KEY_TILE = 64
_SMALLEST = 16
"""What a tensor core multiplies, at least, in each direction."""
_LOG2_OF_E = 1.4426950408889634
_LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class TilePlan:
    """The sizes that kernels are compiled for."""

    queries: int
    """Queries of a tile; those of all heads that share a key head, and of one block."""
    query_tiles: int
    """For each block and key head."""
    size: int
    """Of a head, filled up to a power of 2."""
    block: int
    """Positions of a block, filled up likewise."""


def tile_plan(*, shared_by: int, block_length: int, size: int) -> TilePlan:
    """Sizes for heads of ``size`` numbers of which ``shared_by`` share a key head."""
    rows = shared_by * block_length
    queries = min(max(triton.next_power_of_2(rows), _SMALLEST), _LARGEST_QUERY_TILE)
    return TilePlan(
        queries=queries,
        query_tiles=triton.cdiv(rows, queries),
        size=max(triton.next_power_of_2(size), _SMALLEST),
        block=triton.next_power_of_2(block_length),
    )


def attend_to_pages(
    query_1HSD: Tensor, key_GPBD: Tensor, value_GPBD: Tensor, table_NW: Tensor, seen_N: Tensor
) -> Tensor:
    """Softmax attention scaled by 1/sqrt(D) of N blocks of queries to the pages that each of them sees.

    Args:
        query_1HSD: S = N x B; any strides, but D's must be 1.
        key_GPBD: All pages, one layer's; D's stride must be 1, and those of values the same.
        value_GPBD: Likewise.
        table_NW: Integers, contiguous; the pages that each block sees, the rest is not read.
        seen_N: Integers; how many they are, one at least.

    Returns:
        (1, H, S, D) in the queries' dtype, laid out as (S, H, D).
    """
    _, heads, positions, size = query_1HSD.shape
    groups, _, block_length, _ = key_GPBD.shape
    assert query_1HSD.stride(3) == key_GPBD.stride(3) == 1 and key_GPBD.stride() == value_GPBD.stride()
    blocks, wide = table_NW.shape
    chunks = triton.cdiv(wide * block_length, CHUNK)
    shared_by = heads // groups
    tiles = tile_plan(shared_by=shared_by, block_length=block_length, size=size)
    part_CHSD = query_1HSD.new_empty(chunks, heads, positions, size, dtype=torch.float32)
    logsum_CHS = query_1HSD.new_empty(chunks, heads, positions, dtype=torch.float32)
    _attend_to_a_chunk[(blocks, groups * tiles.query_tiles, chunks)](
        query_1HSD,
        key_GPBD,
        value_GPBD,
        table_NW,
        seen_N,
        part_CHSD,
        logsum_CHS,
        size**-0.5 * _LOG2_OF_E,
        wide,
        positions,
        heads,
        *query_1HSD.stride()[1:3],
        *key_GPBD.stride()[:3],
        SHARED_BY=shared_by,
        BLOCK=block_length,
        SIZE=size,
        QUERIES=tiles.queries,
        QUERY_TILES=tiles.query_tiles,
        KEYS=_KEY_TILE,
        CHUNK_KEYS=CHUNK,
        WIDE_SIZE=tiles.size,
        **_LAUNCH,
    )
    out_SHD = query_1HSD.new_empty(positions, heads, size)
    _add_up_chunks[(blocks, heads)](
        part_CHSD,
        logsum_CHS,
        seen_N,
        out_SHD,
        positions,
        heads,
        BLOCK=block_length,
        SIZE=size,
        CHUNK_KEYS=CHUNK,
        WIDE_BLOCK=tiles.block,
        WIDE_SIZE=tiles.size,
        **_LAUNCH,
    )
    return out_SHD.transpose(0, 1).unsqueeze(0)


@triton.jit
def _attend_to_a_chunk(
    query,
    key,
    value,
    table,
    seen,
    part,
    logsum,
    scale,
    table_stride,
    positions,
    heads,
    query_head_stride,
    query_stride,
    group_stride,
    page_stride,
    key_stride,
    SHARED_BY: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK_KEYS: tl.constexpr,
    WIDE_SIZE: tl.constexpr,
):
    """One tile of a block's queries, and one chunk of its keys."""
    block, chunk = tl.program_id(0), tl.program_id(2)
    group, tile = tl.program_id(1) // QUERY_TILES, tl.program_id(1) % QUERY_TILES
    count = tl.load(seen + block) * BLOCK
    first = chunk * CHUNK_KEYS
    if first >= count:
        return
    row = tile * QUERIES + tl.arange(0, QUERIES)
    is_row = row < SHARED_BY * BLOCK
    head, position = group * SHARED_BY + row // BLOCK, block * BLOCK + row % BLOCK
    dim = tl.arange(0, WIDE_SIZE)
    is_dim = dim < SIZE
    here = is_row[:, None] & is_dim[None, :]
    at = head.to(tl.int64) * query_head_stride + position.to(tl.int64) * query_stride
    asked = tl.load(query + at[:, None] + dim[None, :], mask=here, other=0.0)

    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighed = tl.zeros((QUERIES, WIDE_SIZE), tl.float32)
    for start in range(first, tl.minimum(first + CHUNK_KEYS, count), KEYS):
        number = start + tl.arange(0, KEYS)
        is_key = number < count
        page = tl.load(table + block * table_stride + number // BLOCK, mask=is_key, other=0)
        lies = (
            group.to(tl.int64) * group_stride + page.to(tl.int64) * page_stride + number % BLOCK * key_stride
        )
        there = is_key[:, None] & is_dim[None, :]
        keys = tl.load(key + lies[:, None] + dim[None, :], mask=there, other=0.0)
        scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrunk = tl.exp2(top - new_top)
        total = total * shrunk + tl.sum(weights, 1)
        values = tl.load(value + lies[:, None] + dim[None, :], mask=there, other=0.0)
        weighed = weighed * shrunk[:, None]
        weighed += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = new_top
    place = (chunk * heads + head).to(tl.int64) * positions + position
    tl.store(part + place[:, None] * SIZE + dim[None, :], weighed / total[:, None], mask=here)
    tl.store(logsum + place, top + tl.log2(total), mask=is_row)


@triton.jit
def _add_up_chunks(
    part,
    logsum,
    seen,
    out,
    positions,
    heads,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK_KEYS: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
    WIDE_SIZE: tl.constexpr,
):
    """One head of one block: the mean of its chunks, each weighed by the sum of its exponentials."""
    block, head = tl.program_id(0), tl.program_id(1)
    chunks = tl.cdiv(tl.load(seen + block) * BLOCK, CHUNK_KEYS)
    place, dim = tl.arange(0, WIDE_BLOCK), tl.arange(0, WIDE_SIZE)
    is_place = place < BLOCK
    here = is_place[:, None] & (dim < SIZE)[None, :]
    position = block * BLOCK + place
    top = tl.full((WIDE_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((WIDE_BLOCK,), tl.float32)
    mean = tl.zeros((WIDE_BLOCK, WIDE_SIZE), tl.float32)
    for chunk in range(0, chunks):
        at = (chunk * heads + head).to(tl.int64) * positions + position
        own = tl.load(logsum + at, mask=is_place, other=0.0)
        new_top = tl.maximum(top, own)
        shrunk, weight = tl.exp2(top - new_top), tl.exp2(own - new_top)
        found = tl.load(part + at[:, None] * SIZE + dim[None, :], mask=here, other=0.0)
        total = total * shrunk + weight
        mean = mean * shrunk[:, None] + found * weight[:, None]
        top = new_top
    at = position.to(tl.int64) * heads + head
    whole = (mean / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * SIZE + dim[None, :], whole, mask=here)
