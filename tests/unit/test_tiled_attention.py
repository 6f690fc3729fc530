"""Attention in tiles against the plain reference: outputs, gradients, and what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.attention import packed
from support.models import packed_row
from unmask.attention import AttentionMetadata, attend_plainly, may_attend, plan
from unmask.attention.backend import MaskedPlan
from unmask.attention.tiled import SMALLEST, TiledPlan, plan_tiled
from unmask.diffusion.layout import two_copy
from unmask.diffusion.noise import NoiseConfig, corrupt


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


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("prompt", [(), (21, 3)])
def test_rows_as_they_are_trained_on(views, prompt):
    rows = packed_row(list(range(2, 49)), list(range(2, 19)), length=80, prompt=prompt)
    noise = NoiseConfig(low=0.2, high=0.8, views=views, complementary=views == 2)
    inputs = two_copy(rows, corrupt(rows, noise, seed=3, block_length=8), block_length=8, mask_token_id=63)
    compare(inputs.metadata, tile=16)


def test_nothing_is_kept_per_tile():
    tokens = packed([64], 8)
    inputs = heads(tokens)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        plan_tiled(tokens, tokens, tile=8).attend(*inputs)
    numbers = sum(t.untyped_storage().nbytes() for t in kept.values()) // 8
    # Queries, the result, keys, values, and one number per query of each head.
    assert numbers == sum(t.numel() for t in inputs) + inputs[0].numel() + 4 * 128


def test_sums_of_bfloat16_are_wide():
    tokens = packed([96], 16)
    narrow = [t.detach().bfloat16().requires_grad_() for t in heads(tokens)]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    got = plan_tiled(tokens, tokens, tile=16).attend(*narrow)
    expected = attend_plainly(tokens, tokens, *exact)
    assert (got - expected).abs().max() <= 2**-8 * expected.abs().max()
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    pairs = zip(
        torch.autograd.grad(got, narrow, probe.bfloat16()),
        torch.autograd.grad(expected, exact, probe.double()),
        strict=True,
    )
    for gradient, true in pairs:
        assert gradient.dtype == torch.bfloat16
        assert (gradient - true).norm() <= 0.02 * true.norm()


def test_a_forward_without_gradients_gives_the_same():
    tokens = packed([40, 24], 8)
    inputs = heads(tokens)
    tiled = plan_tiled(tokens, tokens, tile=16)
    with torch.no_grad():
        alone = tiled.attend(*inputs)
    torch.testing.assert_close(alone, tiled.attend(*inputs), rtol=0, atol=1e-14)


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
