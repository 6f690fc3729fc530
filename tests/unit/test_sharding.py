"""Sharing out parameters: which part is whose, what is refused, and layers that are computed again."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from support.models import TINY, packed_row, random_tokens, tiny_model
from unmask.diffusion import layout
from unmask.errors import UsageError
from unmask.models.loading import build, initial_values
from unmask.models.registry import parse_config
from unmask.training.boxes import Box, copy_overlap, overlap
from unmask.training.sharding.plan import ShardingPlan, check_parallelism, expert_dimension, sharding_plan
from unmask.training.sharding.recomputation import recompute_layers
from unmask.training.sharding.weights import part_of
from unmask.training.steps import objective_sum
from unmask_api.train_job import Parallelism

pytestmark = pytest.mark.training


@given(size=st.integers(0, 9), number=st.integers(1, 5), other=st.integers(1, 4))
def test_parts_are_the_chunks_that_torch_makes(size, number, other):
    whole = torch.arange(size * 12).view(size, 12)
    rows = list(whole.chunk(number)) + [whole[size:]] * number
    for at, column in itertools.product(range(number), range(other)):
        offsets, shape, first = part_of((size, 12), (number, other), (at, column), [Shard(0), Shard(1)])
        own = whole[offsets[0] : offsets[0] + shape[0], offsets[1] : offsets[1] + shape[1]]
        columns = rows[at].chunk(other, dim=1)
        assert torch.equal(own, columns[column])
        assert first


def test_of_replicated_parts_the_first_is_kept():
    kept = [part_of((4, 4), (2, 2), (at, 1), [Replicate(), Shard(0)]) for at in range(2)]
    assert kept == [((2, 0), (2, 4), True), ((2, 0), (2, 4), False)]


boxes = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))


@given(boxes, boxes)
def test_boxes_overlap_where_their_indices_are_the_same(one, other):
    (first, second), (first_size, second_size) = (one[:2], other[:2]), (one[2:], other[2:])
    met = overlap(first, first_size, second, second_size)
    inside = [
        (row, column)
        for row, column in itertools.product(range(11), range(11))
        if all(
            at <= index < at + size for at, size, index in zip(first, first_size, (row, column), strict=True)
        )
        and all(
            at <= index < at + size
            for at, size, index in zip(second, second_size, (row, column), strict=True)
        )
    ]
    numbers = torch.arange(121).view(11, 11)
    if met is None:
        assert inside == []
        return
    here, there = (
        numbers[at[0] : at[0] + size[0], at[1] : at[1] + size[1]][part].flatten().tolist()
        for at, size, part in ((first, first_size, met[0]), (second, second_size, met[1]))
    )
    assert here == there == [row * 11 + column for row, column in inside]


def test_a_tensor_is_put_together_from_parts_that_are_cut_another_way():
    whole = torch.randn(6, 10)
    for rows, columns in [(1, 1), (2, 5), (3, 2)]:
        target = torch.zeros(6, 10)
        for row, column in itertools.product(range(0, 6, 6 // rows), range(0, 10, 10 // columns)):
            part = whole[row : row + 6 // rows, column : column + 10 // columns]
            for first in (0, 4):
                copy_overlap(part, (row, column), Box(target[:, first : first + 6], (6, 10), (0, first)))
        assert torch.equal(target, whole)


def test_values_that_come_one_at_a_time_are_those_of_the_whole_model():
    config = parse_config(TINY)
    whole = dict(build(config, seed=3).named_parameters())
    for slot, value in initial_values(config, seed=3):
        assert torch.equal(whole.pop(slot.parameter), value)
    assert not whole


def test_processes_are_divided_into_replicas_parts_and_experts():
    hybrid = Parallelism(shard="Hybrid", replicas=2, expert_parallel=2)
    assert sharding_plan(hybrid, processes=8) == ShardingPlan(replicas=2, parts=2, experts=2)
    assert sharding_plan(hybrid, processes=1) is None
    assert sharding_plan(Parallelism(), processes=8) is None
    with pytest.raises(UsageError, match="must divide the number of processes, which is 6"):
        sharding_plan(hybrid, processes=6)


@pytest.mark.parametrize(
    ("experts", "config", "says"),
    [
        (3, TINY, "got 3, which does not divide the 8 experts; use one of 1, 2, 4, 8"),
        (
            2,
            {
                **{key: TINY[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
                "architectures": ["LlamaForCausalLM"],
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "eos_token_id": 62,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10_000.0,
            },
            "the model has no experts",
        ),
    ],
)
def test_experts_that_cannot_be_shared_out_are_refused(experts, config, says):
    parallelism = Parallelism(shard="Full", expert_parallel=experts)
    with pytest.raises(UsageError, match=says):
        check_parallelism(parallelism, parse_config(config), processes=2 * experts)


def test_experts_are_cut_along_a_dimension_that_divides():
    assert expert_dimension((8, 32, 12), 4) == 1
    assert expert_dimension((8, 9, 12), 4) == 2
    with pytest.raises(UsageError, match="cannot be cut into 5 equal parts"):
        expert_dimension((8, 9, 12), 5)


def _loss(model):
    rows = packed_row(random_tokens(32), length=32)
    return objective_sum(model, layout.causal(rows))


def _gradients(model, *, between=lambda model: None):
    loss = _loss(model)
    between(model)
    loss.backward()
    counts = [router.tokens_per_expert.clone() for router in model.routers()]
    return loss.detach(), [parameter.grad for parameter in model.parameters()], counts


def _shuffle_biases(model):
    for router in model.routers():
        router.expert_bias.copy_(-10 * router.expert_bias)


def test_layers_computed_again_give_the_same_bits_and_count_tokens_once():
    plain, again = (tiny_model(dtype=torch.float32).train() for _ in range(2))
    recompute_layers(again)
    expected, found = _gradients(plain), _gradients(again)
    assert torch.equal(expected[0], found[0])
    for theirs, ours in zip(expected[1] + expected[2], found[1] + found[2], strict=True):
        assert torch.equal(theirs, ours)
    assert sum(counts.sum() for counts in found[2]) == 2 * 32 * len(found[2])


def test_a_layer_computed_again_keeps_its_experts_even_if_the_router_would_choose_others():
    plain, again = (tiny_model(dtype=torch.float32).train() for _ in range(2))
    recompute_layers(again)
    expected, found = _gradients(plain), _gradients(again, between=_shuffle_biases)
    for theirs, ours in zip(expected[1] + expected[2], found[1] + found[2], strict=True):
        assert torch.equal(theirs, ours)
    _shuffle_biases(plain)
    assert not torch.equal(_loss(plain), expected[0]), "other biases choose other experts"
