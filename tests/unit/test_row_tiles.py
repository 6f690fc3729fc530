"""Products of whole tiles of rows: each row is the same, to the bit, whoever else is there."""

import pytest
import torch
import torch.nn.functional as F

from support import counts
from support.models import tiny_model
from unmask.models.moe import Experts, Routing, experts_one_by_one, grouped_linear
from unmask.models.onednn import ReorderedExperts, ReorderedLinear
from unmask.models.output_layer import in_slices
from unmask.models.row_tiles import TILE_ROWS, missing_rows, tiled, tiled_rows


@pytest.mark.parametrize(("rows", "whole"), [(0, 0), (1, 4), (4, 4), (9, 12)])
def test_so_many_rows_fill_whole_tiles(rows, whole):
    assert tiled(rows) == whole == rows + missing_rows(rows)


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
        reordered = ReorderedLinear(inner, outer)
        reordered.put("weight", (), weight)
        by_onednn = reordered(x)
        torch.testing.assert_close(by_onednn, whole, rtol=0, atol=1e-3)
        for rows in (4, 8, 12, 20, 32, 36, 64, 100, 128, 252):
            chosen = torch.randperm(len(x), generator=generator)[:rows]
            assert torch.equal(F.linear(x[chosen], weight), whole[chosen])
            ends = torch.tensor([rows])
            assert torch.equal(grouped_linear(x[chosen], weight.unsqueeze(0), ends), whole[chosen])
            assert torch.equal(reordered(x[chosen]), by_onednn[chosen])
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


def experts_and_routing(tokens, *, experts, hidden, width, choose, dtype=torch.float32):
    """Experts of random weights, and a choice of which expert 0 has every token and the last one none."""
    generator = torch.Generator().manual_seed(tokens)
    layer = Experts(experts, hidden, width).to(dtype).requires_grad_(False)
    for weight in layer.parameters():
        weight.normal_(std=0.1, generator=generator)
    others = [1 + torch.randperm(experts - 2, generator=generator)[: choose - 1] for _ in range(tokens)]
    chosen = torch.stack([torch.cat((torch.tensor([0]), other)) for other in others])
    return layer, Routing(chosen, torch.rand(tokens, choose, generator=generator))


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 3, 32, 200])
def test_experts_of_uneven_loads_are_those_one_by_one(tokens):
    layer, routing = experts_and_routing(
        tokens, experts=9, hidden=48, width=20, choose=3, dtype=torch.float64
    )
    hidden = torch.randn(tokens, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        layer(hidden, routing), experts_one_by_one(layer, hidden, routing), rtol=0, atol=1e-12
    )


@torch.inference_mode()
def test_no_tokens_have_no_experts():
    layer, routing = experts_and_routing(1, experts=4, hidden=16, width=8, choose=2)
    none = Routing(routing.experts[:0], routing.weights[:0])
    assert layer(torch.zeros(0, 16), none).shape == (0, 16)


def in_their_layout(layer):
    """The same experts, laid out for oneDNN."""
    reordered = ReorderedExperts(*layer.down_proj.shape)
    for name, weight in layer.named_parameters():
        for expert, own in enumerate(weight):
            reordered.put(name, (expert,), own)
    return reordered


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 3, 32, 200])
def test_reordered_experts_are_those_one_by_one(tokens):
    layer, routing = experts_and_routing(tokens, experts=9, hidden=48, width=20, choose=3)
    hidden = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(1))
    expected = experts_one_by_one(layer.double(), hidden.double(), routing)
    got = in_their_layout(layer.float())(hidden, routing)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_no_tokens_have_no_reordered_experts():
    layer, routing = experts_and_routing(1, experts=4, hidden=16, width=8, choose=2)
    none = Routing(routing.experts[:0], routing.weights[:0])
    assert in_their_layout(layer)(torch.zeros(0, 16), none).shape == (0, 16)


@torch.inference_mode()
@pytest.mark.parametrize("arranged", [lambda layer: layer, in_their_layout], ids=["as they are", "reordered"])
@pytest.mark.parametrize(("hidden_size", "width"), [(256, 128), (96, 24), (512, 256)])
def test_a_token_s_experts_are_the_same_to_the_bit_among_few_and_many(hidden_size, width, arranged):
    layer, routing = experts_and_routing(300, experts=9, hidden=hidden_size, width=width, choose=3)
    layer = arranged(layer)
    hidden = torch.randn(300, hidden_size, generator=torch.Generator().manual_seed(1))
    whole = layer(hidden, routing)
    for first, last in ((0, 1), (7, 12), (64, 96), (100, 299)):
        part = slice(first, last)
        few = Routing(routing.experts[part], routing.weights[part])
        assert torch.equal(layer(hidden[part], few), whole[part])


@torch.inference_mode()
@pytest.mark.parametrize("arranged", [lambda layer: layer, in_their_layout], ids=["as they are", "reordered"])
def test_what_is_not_finite_stays_with_its_token(arranged):
    """Rows that fill up a tile are what the expert before left there."""
    layer, routing = experts_and_routing(33, experts=9, hidden=32, width=16, choose=3)
    layer = arranged(layer)
    hidden = torch.randn(33, 32, generator=torch.Generator().manual_seed(1))
    whole = layer(hidden, routing)
    hidden[5] = float("nan")
    broken = layer(hidden, routing)
    assert broken[5].isnan().all()
    others = torch.arange(33) != 5
    assert torch.equal(broken[others], whole[others])


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", [7, 512, 1300])
def test_the_output_layer_in_slices_is_the_product(vocabulary):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, 64, generator=generator) for shape in ((2, 12), (vocabulary,)))
    scores = in_slices(hidden, weight)
    assert scores.shape == (2, 12, vocabulary) and scores.is_contiguous()
    torch.testing.assert_close(scores, F.linear(hidden.double(), weight.double()).float(), rtol=0, atol=1e-4)
    for rows in (4, 8, 12):
        assert torch.equal(in_slices(hidden[1, :rows], weight), scores[1, :rows])


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_the_same_with_and_without_slices(tied):
    model = tiny_model(dtype=torch.float32)
    if tied:
        model.head = None
    weight = model.embedding.weight if tied else model.head.weight
    hidden = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.logits(hidden), F.linear(hidden, weight), rtol=0, atol=1e-5)
