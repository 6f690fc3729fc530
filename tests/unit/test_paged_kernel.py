"""The kernel for attention over pages: interpreted beside the plain rule, and compiled for GPUs."""

import pytest
import torch

from support.kernels import GPUS, SHARED_MEMORY, compiled, interpreted
from unmask.attention import AttentionMetadata, attend_plainly, paged_kernel
from unmask.attention.paged import Span

PAGES = 60


def spans_of(lengths, seed=0):
    """One sequence for each number of blocks, its pages anywhere; the last block asks, or two."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Span(tuple(torch.randperm(PAGES, generator=generator)[:length].tolist()), 1 + (length > 2))
        for length in lengths
    ]


def tables(spans, wide=None):
    seen = [list(span.pages[: last + 1]) for span in spans for last in range(span.first, len(span.pages))]
    wide = wide or max(map(len, seen))
    table = torch.tensor([pages + [PAGES * 99] * (wide - len(pages)) for pages in seen])
    return table, torch.tensor([len(pages) for pages in seen])


def random_tokens(spans, *, block, heads, groups, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions = block * sum(span.asking for span in spans)
    query = torch.randn(1, positions, heads, size, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(groups, PAGES, block, size, generator=generator).to(dtype) for _ in range(2))
    return query, key, value


def plainly(spans, query, key, value):
    """Each sequence alone, in float64."""
    first, found = 0, []
    block = key.shape[2]
    for span in spans:
        own = query[:, :, first : first + span.asking * block].double()
        first += span.asking * block
        keys, values = (t.double()[:, list(span.pages)].flatten(1, 2).unsqueeze(0) for t in (key, value))
        asked = AttentionMetadata.single_row(own.shape[2], block_length=block, start=span.first * block)
        all_keys = AttentionMetadata.single_row(keys.shape[2], block_length=block)
        found.append(attend_plainly(asked, all_keys, own, keys, values))
    return torch.cat(found, 2)


def attend(spans, query, key, value, wide=None):
    return interpreted(paged_kernel.attend_to_pages, query, key, value, *tables(spans, wide))


@pytest.mark.parametrize(
    ("block", "heads", "groups", "size"),
    [(32, 8, 2, 16), (4, 4, 4, 24), (8, 6, 2, 8), (12, 2, 1, 32), (1, 4, 2, 16), (64, 4, 1, 16)],
)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_it_is_the_plain_rule(block, heads, groups, size, dtype, within):
    spans = spans_of([1, 17, 3, 40])
    given = random_tokens(spans, block=block, heads=heads, groups=groups, size=size, dtype=dtype)
    got = attend(spans, *given)
    expected = plainly(spans, *given)
    assert got.dtype == dtype and got.shape == expected.shape
    assert (got.double() - expected).norm() <= within * expected.norm()
    assert torch.isfinite(got).all()


def test_chunks_are_added_up_as_if_there_were_none():
    """40 blocks of 32 are two chunks and a half."""
    spans = spans_of([40, 16, 17])
    given = random_tokens(spans, block=32, heads=4, groups=2, size=16, dtype=torch.float32)
    given[1].mul_(30)  # sums of exponentials that differ by many powers from chunk to chunk
    assert paged_kernel.CHUNK < 40 * 32
    torch.testing.assert_close(attend(spans, *given).double(), plainly(spans, *given), atol=1e-4, rtol=1e-4)


def test_neighbours_and_a_wider_table_do_not_change_a_bit():
    spans = spans_of([20, 1, 33])
    query, key, value = random_tokens(spans, block=32, heads=4, groups=2, size=16, dtype=torch.float32)
    together = attend(spans, query, key, value, wide=50)
    first = 0
    for span in spans:
        own = slice(first, first + span.asking * 32)
        assert torch.equal(attend([span], query[:, :, own], key, value), together[:, :, own])
        first = own.stop


KERNELS = {
    "chunk": (
        paged_kernel._attend_to_a_chunk,
        {"query": "*{t}", "key": "*{t}", "value": "*{t}", "table": "*i64", "seen": "*i64", "part": "*fp32",
         "logsum": "*fp32", "scale": "fp32", "table_stride": "i32", "positions": "i32", "heads": "i32",
         "query_head_stride": "i32", "query_stride": "i32", "group_stride": "i32", "page_stride": "i32",
         "key_stride": "i32"},
    ),
    "sum": (
        paged_kernel._add_up_chunks,
        {"part": "*fp32", "logsum": "*fp32", "seen": "*i64", "out": "*{t}", "positions": "i32",
         "heads": "i32"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("capability", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "block", "number"),
    [(16, 4, 128, 32, "bf16"), (32, 4, 128, 32, "bf16"), (4, 2, 64, 8, "fp32")],
    ids=["mini", "flash", "small"],
)
def test_it_compiles_and_fits_a_gpu(kernel, heads, groups, size, block, number, capability):
    function, arguments = KERNELS[kernel]
    shared_by = heads // groups
    tiles = paged_kernel.tile_plan(shared_by=shared_by, block_length=block, size=size)
    constants = {"BLOCK": block, "SIZE": size, "CHUNK_KEYS": paged_kernel.CHUNK, "WIDE_SIZE": tiles.size}
    if kernel == "chunk":
        constants |= {"SHARED_BY": shared_by, "QUERIES": tiles.queries, "QUERY_TILES": tiles.query_tiles}
        constants |= {"KEYS": paged_kernel._KEY_TILE}
    else:
        constants |= {"WIDE_BLOCK": tiles.block}
    typed = {name: kind.format(t=number) for name, kind in arguments.items()}
    made = compiled(function, typed, constants, capability=capability, **paged_kernel._LAUNCH)
    assert len(made.asm["cubin"]) > 1000
    assert made.metadata.shared <= SHARED_MEMORY[capability]
    if number == "bf16" and kernel == "chunk":
        assert "mma" in made.asm["ptx"], "no tensor cores"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "block"), [(16, 4, 128, 32), (32, 4, 128, 32), (6, 2, 24, 12)]
)
def test_on_a_gpu_it_is_the_plain_rule(heads, groups, size, block, dtype, within):
    spans = spans_of([1, 17, 3, 40])
    given = random_tokens(spans, block=block, heads=heads, groups=groups, size=size, dtype=dtype)
    got = paged_kernel.attend_to_pages(*(tensor.cuda() for tensor in (*given, *tables(spans))))
    expected = plainly(spans, *given)
    assert (got.cpu().double() - expected).norm() <= within * expected.norm()
