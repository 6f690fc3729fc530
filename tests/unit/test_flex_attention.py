"""Flex attention's tiles against torch's own, and its result against the plain reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from support.attention import packed
from support.models import packed_row, random_tokens, tiny_model
from unmask.attention import AttentionMetadata, attend_plainly, may_attend, plan
from unmask.attention.flex import FlexPlan, compiled_flex_attention, plan_flex
from unmask.attention.tiles import tiles_of
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import generate
from unmask.diffusion.layout import two_copy
from unmask.diffusion.losses import summed_loss
from unmask.diffusion.noise import NoiseConfig, corrupt

# Uncompiled is what is tested here: the same rule and tiles, without minutes of compiling.
pytestmark = [
    pytest.mark.training,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def by_counting(tokens, tile):
    """Tiles from the dense mask."""
    allowed = may_attend(tokens, tokens)
    size = -(-allowed.shape[1] // tile) * tile
    dense = torch.zeros(len(allowed), size, size, dtype=torch.int64)
    dense[:, : allowed.shape[1], : allowed.shape[2]] = allowed
    pairs = dense.unflatten(1, (-1, tile)).unflatten(3, (-1, tile)).sum((2, 4))
    return pairs > 0, pairs == tile * tile


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    block_length=st.integers(1, 40),
    views=st.integers(1, 3),
    clean=st.booleans(),
    padding=st.integers(0, 20),
    tile=st.sampled_from([4, 8, 16]),
)
def test_tiles_are_those_of_the_dense_mask(lengths, block_length, views, clean, padding, tile):
    tokens = packed(lengths, block_length, views=views, clean=clean, padding=padding)
    tiles = tiles_of(tokens, tokens, tile=tile)
    some, every = by_counting(tokens, tile)
    assert torch.equal(tiles.some, some)
    assert torch.equal(tiles.all, every)


def test_tiles_hold_for_tokens_in_any_order():
    torch.manual_seed(0)
    tokens = packed([20, 11], 4, views=2)
    order = torch.randperm(tokens.shape[1])
    columns = (tokens.position, tokens.document, tokens.block, tokens.view)
    shuffled = AttentionMetadata(*(column[:, order] for column in columns))
    tiles = tiles_of(shuffled, shuffled, tile=8)
    some, every = by_counting(shuffled, 8)
    assert torch.equal(tiles.some, some) and torch.equal(tiles.all, every)


def test_the_block_mask_is_the_one_torch_would_build():
    tokens = packed([300, 100], 32, rows=2, padding=30)
    ours = plan_flex(tokens, tokens).block_mask
    length = tokens.shape[1]
    theirs = create_block_mask(ours.mask_mod, 2, None, length, length, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


@pytest.mark.parametrize(("block_length", "views"), [(1, 1), (4, 2), (32, 1), (100, 1)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_result_is_the_plain_references(block_length, views, kv_heads):
    torch.manual_seed(0)
    tokens = packed([40, 25], block_length, views=views, rows=2, padding=5)
    length = tokens.shape[1]
    query = torch.randn(2, 4, length, 16)
    key, value = torch.randn(2, 2, kv_heads, length, 16)
    got = plan_flex(tokens, tokens, tile=16).attend(query, key, value)
    assert torch.allclose(got, attend_plainly(tokens, tokens, query, key, value), atol=1e-5)


def test_queries_that_are_fewer_than_the_keys():
    torch.manual_seed(0)
    keys = AttentionMetadata.single_row(48, block_length=8)
    queries = AttentionMetadata.single_row(8, block_length=8, start=40)
    query, key, value = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 48, 16), torch.randn(1, 2, 48, 16)
    got = plan_flex(queries, keys, tile=16).attend(query, key, value)
    assert torch.allclose(got, attend_plainly(queries, keys, query, key, value), atol=1e-5)


# On a GPU, compiled


def on_gpu(tokens, dtype, heads=4, kv_heads=2, size=64):
    """Metadata and random inputs on the GPU, wanting gradients."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows, length = tokens.shape
    shapes = [(rows, count, length, size) for count in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]
    return tokens.to("cuda"), [tensor.requires_grad_() for tensor in inputs]


def with_gradients(attend, inputs):
    """The output, and the gradients of all three inputs under one random probe."""
    out = attend(*inputs)
    probe = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return out, *torch.autograd.grad(out, inputs, probe.to(out.dtype))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("lengths", "block_length", "views", "padding"),
    [([200, 120], 32, 1, 10), ([300, 77], 4, 2, 0), ([513], 1, 1, 3), ([96, 160], 160, 1, 0)],
)
def test_the_compiled_kernel_gives_the_plain_references_result_and_gradients(
    lengths, block_length, views, padding, dtype, within
):
    tokens = packed(lengths, block_length, views=views, rows=2, padding=padding)
    tokens, inputs = on_gpu(tokens, dtype)
    chosen = plan(tokens, tokens)
    assert isinstance(chosen, FlexPlan) and chosen.compute is compiled_flex_attention()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = with_gradients(lambda *given: attend_plainly(tokens, tokens, *given), exact)
    for got, true in zip(with_gradients(chosen.attend, inputs), expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - true).norm() <= within * true.norm()


@pytest.mark.gpu
@pytest.mark.slow
def test_no_length_makes_the_kernel_compute_all_scores():
    """A kernel that could not be compiled once more would, in silence, and take memory for all of them."""
    for number in range(12):
        tokens = packed([2000 + 131 * number, 900], 32, padding=number)
        tokens, inputs = on_gpu(tokens, torch.bfloat16)
        scores = 4 * tokens.shape[1] ** 2 * 2
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        plan(tokens, tokens).attend(*inputs).sum().backward()
        assert torch.cuda.max_memory_allocated() - before < scores / 3, number


LARGER = {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 1024}
"""Heads as wide as the kernel wants them."""


@pytest.mark.gpu
@pytest.mark.slow
def test_loss_and_gradients_of_a_model_are_those_of_the_processor():
    rows = packed_row(random_tokens(190), random_tokens(66, seed=1), length=260)
    inputs = two_copy(
        rows, corrupt(rows, NoiseConfig(), seed=3, block_length=8), block_length=8, mask_token_id=63
    )
    model = tiny_model(dtype=torch.float32, **LARGER)
    found = {}
    for device in ("cpu", "cuda"):
        model, inputs = model.to(device), inputs.to(device)
        loss = summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs)
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        found[device] = [tensor.detach().cpu() for tensor in (loss, *gradients)]
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert (ours - theirs).norm() <= 2e-4 * theirs.norm() + 1e-6


@pytest.mark.gpu
@pytest.mark.slow
def test_tokens_generated_behind_long_prompts_are_those_of_the_processor():
    model = tiny_model(dtype=torch.float32, **LARGER)
    prompts = [random_tokens(count, seed=count) for count in (130, 301, 512)]
    wish = DecodingParams(
        max_new_tokens=24, block_length=8, steps=8, threshold=0.3, eos_token_id=62, mask_token_id=63
    )
    expected = generate(model, prompts, wish)
    assert [one.token_ids for one in generate(model.to("cuda"), prompts, wish)] == [
        one.token_ids for one in expected
    ]
