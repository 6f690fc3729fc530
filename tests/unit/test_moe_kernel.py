"""The kernels of experts: interpreted beside a loop over experts, and compiled for GPUs."""

import pytest
import torch

from support.kernels import GPUS, SHARED_MEMORY, compiled, interpreted
from unmask.models import moe_kernel
from unmask.models.moe import Experts, Routing, experts_one_by_one
from unmask.models.moe_kernel import ROWS, experts_at_once, linear_of_levels, row_tiles


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(tokens, *, experts, hidden, inner, choose, dtype=torch.float32, seed=0, only=None):
    """Tokens, what they chose, and experts; all of them among the first ``only`` where that is given."""
    made = Experts(experts, hidden, inner).requires_grad_(False).to(dtype)
    made.gate_up_proj.copy_(drawn(experts, 2 * inner, hidden, seed=seed + 1) / hidden**0.5)
    made.down_proj.copy_(drawn(experts, hidden, inner, seed=seed + 2) / inner**0.5)
    scores = drawn(tokens, experts, seed=seed + 3)
    scores[:, only or experts :] = float("-inf")
    weights, chosen = scores.softmax(-1).topk(choose)
    return made, drawn(tokens, hidden, dtype=dtype, seed=seed + 4), Routing(chosen, weights)


def at_once(made, hidden, routing, *scales):
    return interpreted(
        experts_at_once, hidden, routing.experts, routing.weights, made.gate_up_proj, made.down_proj, *scales
    )


def by_one(made, hidden, routing):
    """In float64."""
    weights = Routing(routing.experts, routing.weights.double())
    return experts_one_by_one(made.double(), hidden.double(), weights)


SHAPES = {
    "few rows each": {"tokens": 32, "experts": 24, "hidden": 64, "inner": 32, "choose": 3},
    "odd widths": {"tokens": 7, "experts": 5, "hidden": 72, "inner": 40, "choose": 2},
    "one token": {"tokens": 1, "experts": 8, "hidden": 32, "inner": 80, "choose": 4},
    "many rows each": {"tokens": 100, "experts": 4, "hidden": 32, "inner": 16, "choose": 2},
    "one expert has all": {"tokens": 33, "experts": 16, "hidden": 32, "inner": 16, "choose": 1, "only": 1},
    "most have none": {"tokens": 40, "experts": 64, "hidden": 32, "inner": 16, "choose": 2, "only": 3},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.float16, 3e-3)])
def test_it_is_a_loop_over_experts(shape, dtype, within):
    given = layer(**shape, dtype=dtype)
    got = at_once(*given)
    expected = by_one(*given)
    assert got.dtype == dtype
    assert (got.double() - expected).norm() <= within * expected.norm()


def test_who_else_is_there_does_not_change_a_bit():
    made, hidden, routing = layer(60, experts=4, hidden=48, inner=32, choose=2)
    all_of_them = at_once(made, hidden, routing)
    for tokens in (slice(0, 1), slice(5, 38), slice(59, 60)):
        own = Routing(routing.experts[tokens], routing.weights[tokens])
        assert torch.equal(at_once(made, hidden[tokens], own), all_of_them[tokens])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_copy_is_in_one_tile_of_its_expert(shape):
    _, _, routing = layer(**shape)
    tiles = row_tiles(routing.experts, shape["experts"])
    chosen = routing.experts.flatten()
    taken = []
    for expert, start, stop in zip(tiles.expert, tiles.start, tiles.stop, strict=True):
        copies = tiles.copy[start : min(int(start) + ROWS, int(stop))].tolist()
        assert all(chosen[copy] == expert for copy in copies)
        taken += copies
    assert sorted(taken) == list(range(len(chosen)))


@pytest.mark.parametrize("shape", [SHAPES["few rows each"], SHAPES["odd widths"]])
def test_weights_of_eight_bits_are_those_that_they_stand_for(shape):
    made, hidden, routing = layer(**shape)
    levels, scales = {}, []
    for name, weight in list(made.named_parameters()):
        scale = weight.abs().amax(-1) / 127
        levels[name] = (weight / scale.unsqueeze(-1)).round().to(torch.int8)
        weight.copy_(levels[name] * scale.unsqueeze(-1))
        scales.append(scale)
    got = interpreted(experts_at_once, hidden, routing.experts, routing.weights, *levels.values(), *scales)
    torch.testing.assert_close(got.double(), by_one(made, hidden, routing), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 40, 70), (16, 64, 64), (37, 130, 200)])
def test_a_weight_of_eight_bits_is_the_one_that_it_stands_for(rows, inner, outer):
    levels = torch.randint(-127, 128, (outer, inner), generator=torch.Generator().manual_seed(0))
    scale = drawn(outer).abs()
    x = drawn(2, rows, inner, seed=1)[1]
    got = interpreted(linear_of_levels, x, levels.to(torch.int8), scale)
    expected = x.double() @ (levels * scale.double().unsqueeze(1)).T
    assert (got.double() - expected).norm() <= 1e-6 * expected.norm()


_WHERE = {"copy": "*i64", "expert_of": "*i64", "start_of": "*i64", "stop_of": "*i64"}
KERNELS = {
    "gated": (
        moe_kernel._gated,
        {"hidden": "*bf16", "weight": "*{w}", "scale": "*fp32", "inner": "*bf16", **_WHERE,
         "hidden_size": "i32", "inner_size": "i32"},
        {"CHOICES": 8},
    ),
    "weighted": (
        moe_kernel._weighted,
        {"inner": "*bf16", "weight": "*{w}", "scale": "*fp32", "weights": "*fp32", "out": "*fp32", **_WHERE,
         "inner_size": "i32", "hidden_size": "i32"},
        {},
    ),
    "product": (
        moe_kernel._scaled_product,
        {"rows_of": "*bf16", "weight": "*{w}", "scale": "*fp32", "out": "*bf16", "rows": "i32",
         "inner_size": "i32", "outer_size": "i32", "row_stride": "i32"},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("capability", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize(
    ("kernel", "weights"),
    [("gated", "bf16"), ("gated", "i8"), ("weighted", "bf16"), ("weighted", "i8"), ("product", "i8")],
)
def test_it_compiles_and_fits_a_gpu(kernel, weights, capability):
    function, arguments, constants = KERNELS[kernel]
    constants = constants | {
        "TILE_ROWS": ROWS, "COLUMNS": moe_kernel._COLUMNS, "DEPTH": moe_kernel._DEPTH
    }  # fmt: skip
    if kernel != "product":
        constants["SCALED"] = weights == "i8"
    typed = {name: kind.format(w=weights) for name, kind in arguments.items()}
    made = compiled(function, typed, constants, capability=capability, **moe_kernel._LAUNCH)
    assert made.metadata.shared <= SHARED_MEMORY[capability]
    assert "mma" in made.asm["ptx"], "no tensor cores"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_it_is_a_loop_over_experts(shape, dtype, within):
    made, hidden, routing = layer(**shape, dtype=dtype)
    given = (hidden, routing.experts, routing.weights, made.gate_up_proj, made.down_proj)
    got = experts_at_once(*(tensor.cuda() for tensor in given))
    expected = by_one(made, hidden, routing)
    assert (got.cpu().double() - expected).norm() <= within * expected.norm()
