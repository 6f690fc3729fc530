"""Eight-bit weights and activations: whole numbers that come out exactly, whoever else is there."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support import counts
from support.folders import GOLDEN
from support.models import TINY, random_tokens, tiny_canvas_model, tiny_model
from unmask.attention import AttentionMetadata, kernels
from unmask.diffusion.batch import Committed, Filled
from unmask.diffusion.decoding import DecodingParams
from unmask.errors import UsageError
from unmask.models import int8 as eight_bits
from unmask.models.int8 import (
    _ROWS_AT_ONCE,
    TOKEN_LEVELS,
    Int8Experts,
    Int8Linear,
    _in_parts,
    check_int8,
    holds_largest_sums,
    quantise,
    scaled_tokens,
    weight_levels,
)
from unmask.models.loading import build, load, save
from unmask.models.moe import Experts, Routing
from unmask.models.products import products_of
from unmask.models.registry import parse_config
from unmask.models.replacement import Replacement
from unmask.models.weight_only_int8 import quantised_channels
from unmask.serving.ragged import RaggedBatch

BLOCK = 4
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}


@pytest.fixture(params=sorted({63, weight_levels()}), scope="module", autouse=True)
def levels(request):
    """Everything once as without VNNI, and once as on this processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eight_bits, "weight_levels", lambda: request.param)
        yield request.param


def numbers(*shape, seed=0, spread=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def linear(weight):
    product = Int8Linear(weight.shape[1], weight.shape[0])
    product.put("weight", (), weight)
    return product


def in_whole_numbers(weight, x):
    """The slow way: the same whole numbers, added up in 64 bits, and scaled at the end."""
    levels, channel_scale = quantised_channels(weight, levels=eight_bits.weight_levels())
    scaled, token_scale = scaled_tokens(x)
    sums = scaled.round().to(torch.int64) @ levels.to(torch.int64).T
    return sums.float() * channel_scale * token_scale


def experts_in_whole_numbers(experts, hidden, routing):
    """The slow way of a layer of experts, one after the other."""
    total = torch.zeros_like(hidden)
    for number, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        token, choice = torch.where(routing.experts == number)
        gate, up = in_whole_numbers(gate_up, hidden[token]).chunk(2, dim=-1)
        inner, scale = F.silu(gate) * up, routing.weights[token, choice].unsqueeze(1)
        levels, channel_scale = quantised_channels(down, levels=eight_bits.weight_levels())
        scaled, token_scale = scaled_tokens(inner)
        sums = scaled.round().to(torch.int64) @ levels.to(torch.int64).T
        total = total.index_add(0, token, sums.float() * channel_scale * (token_scale * scale))
    return total


def random_experts(experts, hidden, width, tokens, choose):
    layer = Experts(experts, hidden, width)
    with torch.no_grad():
        layer.gate_up_proj.copy_(numbers(*layer.gate_up_proj.shape, seed=1, spread=0.2))
        layer.down_proj.copy_(numbers(*layer.down_proj.shape, seed=2, spread=0.2))
    layer.requires_grad_(False)
    chosen = torch.stack([torch.randperm(experts)[:choose] for _ in range(tokens)])
    int8 = Int8Experts(experts, hidden, width)
    for expert in range(experts):
        int8.put("gate_up_proj", (expert, slice(width, 2 * width)), layer.gate_up_proj[expert, width:])
        int8.put("gate_up_proj", (expert, slice(0, width)), layer.gate_up_proj[expert, :width])
        int8.put("down_proj", (expert,), layer.down_proj[expert])
    return layer, int8, Routing(chosen, torch.rand(tokens, choose))


# Rounding


def test_a_weight_is_within_half_a_step_and_the_largest_of_a_channel_is_the_end_of_the_scale():
    weight = numbers(7, 33, spread=3.0)
    levels, scale = quantised_channels(weight, levels=eight_bits.weight_levels())
    assert levels.dtype == torch.int8 and scale.dtype == torch.float32
    assert levels.abs().amax(1).tolist() == [eight_bits.weight_levels()] * 7
    assert ((levels.float() * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_a_token_has_a_scale_of_its_own():
    x = torch.stack([numbers(33, seed=seed, spread=10.0**seed) for seed in range(-3, 4)])
    scaled, scale = scaled_tokens(x)
    assert scaled.round().abs().amax(1).tolist() == [TOKEN_LEVELS] * 7
    assert ((scaled.round() * scale - x).abs() <= scale * 0.5001).all()


def test_nothing_times_something_is_nothing():
    weight = numbers(5, 8)
    weight[2] = 0
    x = numbers(3, 8, seed=1)
    x[1] = 0
    product = linear(weight)(x)
    assert not product[1].any() and not product[:, 2].any() and product[0, 0] != 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_pass_for_a_number(bad):
    x = numbers(3, 8)
    x[1, 4] = bad
    product = linear(numbers(5, 8))(x)
    assert not product[1].isfinite().any()
    assert product[[0, 2]].isfinite().all()


# Products


@pytest.mark.parametrize(("bits", "most"), [(32, 127), (16, 63)])
def test_a_processor_is_asked_how_large_sums_may_be(bits, most):
    def product(weight_level, rows):
        """Two at a time, in so many bits, as activations of 0 to 255; what does not fit is cut off."""
        end = 2 ** (bits - 1)
        unsigned = rows.to(torch.int64) + 128
        pairs = (unsigned * weight_level).unflatten(1, (-1, 2)).sum(2).clamp(-end, end - 1)
        return (pairs.sum(1, keepdim=True) - 128 * weight_level * rows.shape[1]).expand(-1, 32).float()

    assert [holds_largest_sums(levels, product) for levels in (63, 127)] == [True, most == 127]


@pytest.mark.parametrize("inner", [1, 5, 32, 255, 1024])
@pytest.mark.parametrize(("x", "weight"), [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_largest_sums_are_exact(inner, x, weight):
    """Without VNNI FBGEMM adds up two products in sixteen bits, which would not hold larger ones."""
    product = linear(torch.full((9, inner), float(weight)))(torch.full((3, inner), float(x)))
    exact = torch.tensor(inner * x * weight * TOKEN_LEVELS * eight_bits.weight_levels()).float()
    scales = in_whole_numbers(torch.ones(1, 1), torch.ones(1, 1)) / (
        TOKEN_LEVELS * eight_bits.weight_levels()
    )
    torch.testing.assert_close(product, (exact * scales).expand(3, 9), rtol=1e-6, atol=0)
    assert torch.equal(
        product, in_whole_numbers(torch.full((9, inner), float(weight)), torch.full((3, inner), float(x)))
    )


@settings(max_examples=counts.of(sample=40, full=1000), deadline=None)
@given(
    rows=st.integers(0, 70),
    inner=st.integers(1, 200),
    outer=st.integers(1, 130),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_a_product_is_that_of_whole_numbers_in_64_bits(rows, inner, outer, seed, spread):
    weight, x = numbers(outer, inner, seed=seed), numbers(rows, inner, seed=seed + 1, spread=spread)
    assert torch.equal(linear(weight)(x), in_whole_numbers(weight, x))


def test_halves_are_rounded_to_even_as_the_reference_does():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    weight = torch.eye(6) * eight_bits.weight_levels()
    assert linear(weight)(x)[0].div(eight_bits.weight_levels()).tolist() == [127, 0, 2, 2, 0, -2]


def test_leading_dimensions_stay():
    weight, x = numbers(7, 12), numbers(2, 3, 12)
    assert torch.equal(linear(weight)(x), in_whole_numbers(weight, x.flatten(0, 1)).view(2, 3, 7))


def test_a_weight_may_come_in_parts_of_rows():
    weight, x = numbers(12, 16), numbers(4, 16)
    parts = Int8Linear(16, 12)
    for rows in (slice(8, 12), slice(0, 5), slice(5, 8)):
        assert not parts.is_complete
        parts.put("weight", (rows,), weight[rows])
    assert parts.is_complete
    assert torch.equal(parts(x), linear(weight)(x))


@pytest.mark.parametrize("threads", [1, 2] if counts.FULL else [1])  # two are slow on a busy machine
@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (512, 768), (1024, 512)])
def test_a_row_does_not_depend_on_the_others_or_on_their_number(inner, outer, threads):
    x, product = numbers(100, inner), linear(numbers(outer, inner, seed=1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = product(x)
        for rows in (1, 2, 3, 4, 5, 7, 31, 32, 33, 64, 99):
            chosen = torch.randperm(100, generator=torch.Generator().manual_seed(rows))[:rows]
            assert torch.equal(product(x[chosen]), whole[chosen])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("experts", "choose"), [(4, 1), (8, 3)])
def test_experts_are_those_of_whole_numbers_one_by_one(experts, choose, tokens):
    layer, int8, routing = random_experts(experts, 24, 12, tokens, choose)
    hidden = numbers(tokens, 24, seed=5)
    assert torch.equal(int8(hidden, routing), experts_in_whole_numbers(layer, hidden, routing))


@settings(max_examples=counts.of(sample=30, full=500), deadline=None)
@given(st.lists(st.integers(0, 700), max_size=20))
@example([_ROWS_AT_ONCE + 1, 0])
def test_experts_are_computed_in_parts_of_few_rows(rows):
    parts = list(_in_parts(rows))
    covered = [expert for part in parts for expert in range(part.start, part.stop)]
    assert covered == (list(range(len(rows))) if any(rows) else [])
    for part in parts:
        held = [count for count in rows[part] if count]
        assert held and (len(held) == 1 or sum(held) <= _ROWS_AT_ONCE)


def test_experts_in_many_parts_are_those_of_whole_numbers():
    layer, int8, routing = random_experts(8, 24, 12, 500, 3)
    hidden = numbers(500, 24, seed=5)
    assert torch.equal(int8(hidden, routing), experts_in_whole_numbers(layer, hidden, routing))


def test_a_token_s_experts_do_not_depend_on_its_neighbours():
    _, int8, routing = random_experts(8, 24, 12, 50, 3)
    hidden = numbers(50, 24, seed=5)
    whole = int8(hidden, routing)
    for first in range(0, 50, 7):
        part = slice(first, first + 7)
        assert torch.equal(
            int8(hidden[part], Routing(routing.experts[part], routing.weights[part])), whole[part]
        )


# Against float32


def relative(got, exact):
    return float((got - exact).norm() / exact.norm())


def test_rounding_costs_two_percent_of_a_product(record_measurement, levels):
    """Of normal numbers: a step of a weight is 1/18 of their spread, or half that; an activation's 1/37."""
    weight, x = numbers(512, 1024), numbers(64, 1024, seed=1)
    product = relative(linear(weight)(x), x @ weight.T)
    layer, int8, routing = random_experts(8, 256, 128, 64, 3)
    hidden = numbers(64, 256, seed=5)
    experts = relative(int8(hidden, routing), layer(hidden, routing))
    record_measurement(f"int8 product against float32, {levels} levels, relative error", product)
    record_measurement(f"int8 experts against float32, {levels} levels, relative error", experts)
    assert 0.001 < product < (0.025 if levels == 63 else 0.015)
    assert 0.001 < experts < (0.045 if levels == 63 else 0.03)


@torch.inference_mode()
def test_the_most_probable_token_is_mostly_the_same(record_measurement, levels):
    """Of random weights, whose logits are as near to each other as logits can be."""
    changes = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 1024, "initializer_range": 0.05}
    ids = torch.randint(0, 1000, (1, 512), generator=torch.Generator().manual_seed(3))
    metadata = AttentionMetadata.block_causal(
        torch.arange(512)[None], torch.zeros(1, 512, dtype=torch.int64), block_length=32
    )
    logits = []
    for model in (
        tiny_model(dtype=torch.float32, **changes),
        quantise(tiny_model(dtype=torch.float32, **changes)),
    ):
        logits.append(model.logits(model.hidden(ids, metadata))[0])
    agreement = float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean())
    record_measurement(
        f"int8 against float32, {levels} levels, share of equal most probable tokens", agreement
    )
    assert logits[1].dtype == torch.float32
    assert (0.75 if levels == 63 else 0.86) < agreement <= 1


# Models


def metadata_of(ids):
    return AttentionMetadata.block_causal(
        torch.arange(ids.shape[1])[None], torch.zeros_like(ids), block_length=BLOCK
    )


@torch.inference_mode()
def scores(model):
    ids = torch.tensor([random_tokens(24)])
    return model.logits(model.hidden(ids, metadata_of(ids)))


@pytest.mark.parametrize("golden", ["llada2_a", "llada2_b", "lladamoe_a"])
def test_a_model_that_is_quantised_while_it_is_read_is_the_one_quantised_afterwards(golden):
    loaded = load(GOLDEN / golden, quantization="int8")
    afterwards = quantise(load(GOLDEN / golden, dtype=torch.float32))
    assert torch.equal(scores(loaded), scores(afterwards))
    assert not torch.equal(scores(loaded), scores(load(GOLDEN / golden, dtype=torch.float32)))
    assert not loaded.training


@pytest.mark.parametrize("tied", [False, True])
def test_separate_projections_and_a_tied_output_layer_are_quantised_as_well(tmp_path, tied):
    model = build(parse_config(LLAMA | {"tie_word_embeddings": tied})).eval()
    save(model, tmp_path / "llama")
    loaded = load(tmp_path / "llama", quantization="int8")
    assert torch.equal(scores(loaded), scores(quantise(model)))
    layer = {"attention.query_key_value", "attention.output"}
    layer |= {f"feed_forward.{part}_proj" for part in ("gate", "up", "down")}
    products = {f"layers.{index}.{part}.weight" for index in range(2) for part in layer}
    assert set(products_of(loaded)) == products | {"head.weight"}


@pytest.mark.parametrize("config", [TINY, LLAMA | {"tie_word_embeddings": True}], ids=["experts", "tied"])
def test_weights_that_take_the_place_of_others_leave_nothing_of_them(tmp_path, config):
    for seed in (1, 2):
        save(build(parse_config(config), seed=seed), tmp_path / str(seed))
    model, expected = (load(tmp_path / name, quantization="int8") for name in ("1", "2"))
    assert not torch.equal(scores(model), scores(expected))
    with Replacement(tmp_path / "2", model.config) as new:
        new.fill(model)
    assert torch.equal(scores(model), scores(expected))


def test_what_is_no_product_s_weight_stays_float32():
    model = load(GOLDEN / "llada2_a", quantization="int8")
    left = {name.split(".")[-2] for name, parameter in model.named_parameters()}
    assert left == {
        "embedding",
        "attention_norm",
        "feed_forward_norm",
        "query_norm",
        "key_norm",
        "norm",
        "router",
    }
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_of_the_whole_canvas_can_be_quantised():
    model = tiny_canvas_model(dtype=torch.float32)
    exact = scores(model)
    assert relative(scores(quantise(model)), exact) < 0.3


def test_devices_that_cannot_are_told_so(monkeypatch):
    with pytest.raises(UsageError, match="got device meta, only CPUs and CUDA devices"):
        check_int8("meta")
    check_int8("cpu")
    monkeypatch.setattr(kernels, "_is_installed", lambda: True)
    check_int8("cuda:1")
    monkeypatch.setattr(kernels, "_is_installed", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match="on a GPU it takes Triton"):
            check_int8(device)
    with pytest.raises(UsageError, match="on a GPU it takes Triton"):
        load(GOLDEN / "llada2_a", device="cuda", quantization="int8")
    monkeypatch.setattr(
        type(torch.backends.quantized), "supported_engines", property(lambda _: ["qnnpack"]), raising=False
    )
    with pytest.raises(UsageError, match="without FBGEMM"):
        check_int8("cpu")


# In company


@settings(max_examples=counts.of(sample=6, full=100), deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 6), room=st.integers(4, 12))
def test_requests_get_to_the_bit_what_they_get_alone(seed, rows, room):
    model = quantise(tiny_model(dtype=torch.float32))
    dice = random.Random(seed)
    asked = [
        (random_tokens(dice.randint(1, 20), seed=dice.randint(0, 99)), dice.randint(1, 16))
        for _ in range(rows)
    ]

    def batch_of(rows, **changes):
        return RaggedBatch(model, rows=rows, capacity=64, block_length=BLOCK, **changes)

    def params(new):
        return DecodingParams(
            max_new_tokens=new,
            block_length=BLOCK,
            threshold=0.3,
            eos_token_id=TINY["eos_token_id"],
            mask_token_id=TINY["mask_token_id"],
        )

    def told(batch, waiting):
        """Of each request: what its steps filled, with what confidence, and what it committed."""
        found, waiting = {}, list(waiting)
        while waiting or batch.active:
            while waiting and (not batch.active or dice.random() < 0.5):
                prompt, new = waiting.pop(0)
                found[batch.admit(prompt, params(new))] = []
            for event in batch.step():
                if isinstance(event, Filled):
                    found[event.ticket].append((event.positions, event.token_ids, event.confidences))
                elif isinstance(event, Committed):
                    found[event.ticket].append(event.token_ids)
        return list(found.values())

    alone = [told(batch_of(1), [one])[0] for one in asked]
    assert told(batch_of(rows, max_positions=room * BLOCK), asked) == alone
