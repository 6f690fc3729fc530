"""Attention in tiles against the plain reference: outputs, gradients, and what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.attention import packed
from unmask.attention import AttentionMetadata, attend_plainly, may_attend, plan
from unmask.attention.backend import MaskedPlan
from unmask.attention.tiled import SMALLEST, TiledPlan, plan_tiled


def heads(tokens, seed=0):
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = tokens.shape
    return [
        torch.randn(rows, count, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for count in (4, 2, 2)
    ]


def together(*tokens):
    """Rows of different packing in one batch."""
    columns = zip(*((t.position, t.document, t.block, t.view) for t in tokens), strict=True)
    return AttentionMetadata(*(torch.cat(column) for column in columns))


def compare(tokens, tile):
    """Hold tiles beside the reference, gradients of all three inputs included."""
    inputs = heads(tokens)
    probe = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tiled = plan_tiled(tokens, tokens, tile=tile).attend(*inputs)
    gradients = torch.autograd.grad(tiled, inputs, probe)
    plain = attend_plainly(tokens, tokens, *inputs)
    torch.testing.assert_close(tiled, plain, rtol=0, atol=1e-13)
    for got, expected in zip(gradients, torch.autograd.grad(plain, inputs, probe), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    block_length=st.integers(1, 20),
    views=st.integers(0, 2),
    padding=st.integers(0, 9),
    tile=st.sampled_from([8, 16]),
)
def test_tiles_give_what_the_reference_gives(lengths, block_length, views, padding, tile):
    compare(packed(lengths, block_length, views=views, padding=padding), tile)


def test_rows_of_a_batch_may_be_packed_differently():
    compare(together(packed([24, 8], 4), packed([5, 27], 8)), tile=8)


def test_tokens_may_stand_in_any_order():
    tokens = packed([20, 12], 4)
    order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(3))
    columns = (tokens.position, tokens.document, tokens.block, tokens.view)
    compare(AttentionMetadata(*(column[:, order] for column in columns)), tile=8)


def test_what_no_query_of_a_tile_sees_is_not_computed():
    tokens = packed([2048], 32)
    pieces = plan_tiled(tokens, tokens).pieces
    computed = sum(
        (piece.queries.stop - piece.queries.start) * sum(keys.stop - keys.start for keys in piece.keys)
        for piece in pieces
    )
    allowed = int(may_attend(tokens, tokens).sum())
    assert allowed <= computed < 1.35 * allowed
    assert computed < 0.33 * 4096**2


def test_a_tile_that_sees_all_of_its_keys_has_no_mask():
    tokens = packed([32], 32, clean=False)
    assert [piece.mask for piece in plan_tiled(tokens, tokens, tile=8).pieces] == [None] * 4


@pytest.mark.parametrize(("queries", "kind"), [(SMALLEST, TiledPlan), (SMALLEST - 2, MaskedPlan)])
def test_many_queries_on_a_cpu_are_tiled(queries, kind):
    tokens = packed([queries // 2], 32)
    assert isinstance(plan(tokens, tokens), kind)
