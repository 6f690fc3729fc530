"""What the experts of a part make of rows: their share of the whole, from their own tensors alone."""

from pathlib import Path

import pytest
import torch

from support.shards import golden_folder, holding_of, network_without_experts
from unmask.errors import ModelError, UsageError
from unmask.experts.holding import Holding, NotHeld, shape_of_experts, weighted_sums
from unmask.experts.placement import even_bounds
from unmask.models.checkpoint_files import Checkpoint
from unmask.models.loading import load
from unmask.models.moe import Experts, Routing, experts_one_by_one, mixtures_of
from unmask.models.registry import read_config

GOLDENS = ["llada2_a", "lladamoe_a"]


@pytest.fixture(scope="module", params=GOLDENS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("model") / request.param, request.param)


def routed(folder: Path, tokens: int = 13) -> tuple[torch.Tensor, dict[int, Routing]]:
    """Random rows, and where the routers of the model send them."""
    model = load(folder)
    rows = torch.randn(tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return rows, {layer: mixture.router(rows) for layer, mixture in mixtures_of(model).items()}


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_the_parts_add_up_to_the_loop_over_all_experts(folder: Path, shards: int) -> None:
    whole = mixtures_of(load(folder))
    rows, routings = routed(folder)
    holdings = [holding_of(folder, number, shards=shards) for number in range(shards)]
    for layer, routing in routings.items():
        total = torch.zeros_like(rows)
        for part, holding in enumerate(holdings):
            held = holding.find(1, part)
            total += weighted_sums(held.layers[layer], routing.experts - held.first, routing.weights, rows)
        expected = experts_one_by_one(whole[layer].experts, rows, routing)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)


def test_a_row_gets_the_same_bits_alone_and_among_others(folder: Path) -> None:
    rows, routings = routed(folder)
    held = holding_of(folder, 0, shards=2).find(1, 0)
    for layer, routing in routings.items():
        together = weighted_sums(held.layers[layer], routing.experts, routing.weights, rows)
        for row in range(len(rows)):
            one = slice(row, row + 1)
            alone = weighted_sums(held.layers[layer], routing.experts[one], routing.weights[one], rows[one])
            assert torch.equal(alone, together[one])


def test_rows_for_other_parts_only_are_zero(folder: Path) -> None:
    held = holding_of(folder, 0, shards=2).find(1, 0)
    rows = torch.randn(3, read_config(folder).hidden_size)
    elsewhere = torch.full((3, 2), -1)
    sums = weighted_sums(held.layers[max(held.layers)], elsewhere, torch.ones(3, 2), rows)
    assert torch.equal(sums, torch.zeros_like(rows))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_shard_has_its_share_of_the_weights_and_no_more(folder: Path, shards: int) -> None:
    with Checkpoint(folder) as checkpoint:
        all_of_them = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if ".experts." in name)
    for number in range(shards):
        assert holding_of(folder, number, shards=shards).nbytes == all_of_them // shards
    both = holding_of(folder, 0, shards=2, replication=2)
    assert both.nbytes == all_of_them


def test_each_expert_of_a_part_is_the_whole_model_s(folder: Path) -> None:
    whole = mixtures_of(load(folder))
    rows, _ = routed(folder)
    one = torch.ones(len(rows), 1)
    for number in range(2):
        held = holding_of(folder, number, shards=2).find(1, number)
        for layer, experts in held.layers.items():
            for expert in range(held.num_experts):
                chosen = torch.full((len(rows), 1), expert)
                got = weighted_sums(experts, chosen, one, rows)
                own = Routing(chosen + held.first, one)
                expected = experts_one_by_one(whole[layer].experts, rows, own)
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_weights_that_are_not_laid_out_anew_are_the_whole_model_s(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.experts.holding.can_reorder", lambda device, dtype: False)
    whole = mixtures_of(load(folder))
    for number in range(2):
        held = holding_of(folder, number, shards=2).find(1, number)
        for layer, experts in held.layers.items():
            assert isinstance(experts, Experts)
            own = slice(held.first, held.first + held.num_experts)
            assert torch.equal(experts.gate_up_proj, whole[layer].experts.gate_up_proj[own])
            assert torch.equal(experts.down_proj, whole[layer].experts.down_proj[own])


def test_the_engines_model_has_everything_but_the_experts(folder: Path) -> None:
    whole, rest = load(folder), network_without_experts(folder)
    expected = {name: value for name, value in whole.state_dict().items() if ".experts." not in name}
    assert rest.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in rest.state_dict().items())


def test_two_placements_share_what_both_have_and_either_can_go(folder: Path) -> None:
    holding = holding_of(folder, 0, shards=2)
    before = holding.nbytes
    experts = holding.shape.num_experts
    holding.load(2, even_bounds(experts, 2), [0])
    assert holding.nbytes == before and holding.find(2, 0) is holding.find(1, 0)
    holding.load(3, even_bounds(experts, 4), [3])
    assert holding.nbytes == before + before // 2
    holding.load(3, even_bounds(experts, 4), [3])
    assert holding.nbytes == before + before // 2, "what is there is not read again"
    holding.unload([1, 2, 9])
    assert holding.placements.keys() == {3} and holding.nbytes == before // 2
    with pytest.raises(NotHeld, match=r"epoch: got 1, held are \[3\]"):
        holding.find(1, 0)
    with pytest.raises(NotHeld, match=r"part: got 0, of epoch 3 held are \[3\]"):
        holding.find(3, 0)


def test_placements_that_cannot_be_are_refused(folder: Path) -> None:
    holding = holding_of(folder, 0, shards=2)
    experts = holding.shape.num_experts
    for epoch, bounds, parts in ((0, (0, experts), [0]), (2, (0, experts), []), (2, (0, experts), [1])):
        with pytest.raises(UsageError, match="placement: got epoch"):
            holding.load(epoch, bounds, parts)
    with pytest.raises(UsageError, match="bounds: got"):
        holding.load(2, (0, experts + 1), [0])
    with pytest.raises(UsageError, match="give other bounds another epoch"):
        holding.load(1, (0, experts), [0])
    assert holding.placements.keys() == {1}


def test_weights_that_have_changed_are_not_mixed_with_the_old_ones(tmp_path: Path) -> None:
    folder = golden_folder(tmp_path / "model", "llada2_a")
    holding = holding_of(folder, 0, shards=2)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="others than when the shard began"):
        holding.load(1, even_bounds(16, 2), [1])
    assert holding.placements[1].parts == {0}


def test_a_model_without_experts_cannot_be_sharded(tmp_path: Path) -> None:
    config = read_config(golden_folder(tmp_path / "model", "llada2_a"))
    dense = config.model_copy(update={"first_k_dense_replace": config.num_hidden_layers})
    with pytest.raises(ModelError, match="no layer with experts"):
        shape_of_experts(dense)
    shape = shape_of_experts(config)
    assert (shape.num_experts, shape.layers, shape.groups) == (16, (1, 2), 4)
    assert Holding(tmp_path / "model").nbytes == 0
