"""Products of whole tiles of rows: each row is the same, to the bit, whoever else is there."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from support import counts
from support.models import tiny_model
from unmask.models.moe import Experts, experts_one_by_one, grouped_linear
from unmask.models.row_tiles import TILE_ROWS, missing_rows, tiled_groups, tiled_rows


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_groups_are_filled_up_to_whole_tiles(counts):
    place, ends = tiled_groups(torch.tensor(counts))
    starts, expected = 0, []
    for count, end in zip(counts, ends.tolist(), strict=True):
        expected += range(starts, starts + count)
        assert end - starts == count + missing_rows(count)
        starts = end
    assert place.tolist() == expected


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_rows_are_filled_up_with_zeros(rows):
    x = torch.randn(rows, 3)
    tiled = tiled_rows(x)
    assert len(tiled) % TILE_ROWS == 0 and len(tiled) < rows + TILE_ROWS
    assert torch.equal(tiled[:rows], x) and not tiled[rows:].any()


@pytest.mark.parametrize("threads", [1, 2] if counts.FULL else [1])  # two are slow on a busy machine
@pytest.mark.parametrize(("inner", "outer"), [(512, 768), (256, 512), (512, 32), (32, 64), (1024, 512)])
def test_a_row_of_a_product_of_whole_tiles_is_the_same_to_the_bit(inner, outer, threads):
    """If this fails on a machine, tokens may differ there in company where two are as good as equal."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, inner, generator=generator) for rows in (256, outer))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = F.linear(x, weight)
        for rows in (4, 8, 12, 20, 32, 36, 64, 100, 128, 252):
            chosen = torch.randperm(len(x), generator=generator)[:rows]
            assert torch.equal(F.linear(x[chosen], weight), whole[chosen])
            ends = torch.tensor([rows])
            assert torch.equal(grouped_linear(x[chosen], weight.unsqueeze(0), ends), whole[chosen])
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_a_token_s_experts_do_not_depend_on_its_neighbours():
    model = tiny_model(dtype=torch.float32)
    layer = model.layers[1].feed_forward
    hidden = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    whole = layer(hidden)
    for first in range(0, 96, 8):
        assert torch.equal(layer(hidden[first : first + 8]), whole[first : first + 8])


@torch.inference_mode()
def test_experts_in_tiles_are_those_one_by_one():
    model = tiny_model(dtype=torch.float64)
    layer = model.layers[1].feed_forward
    hidden = torch.randn(11, 32, dtype=torch.float64)
    routing = layer.router(hidden)
    assert isinstance(layer.experts, Experts)
    torch.testing.assert_close(
        layer.experts(hidden, routing), experts_one_by_one(layer.experts, hidden, routing), rtol=0, atol=1e-12
    )
