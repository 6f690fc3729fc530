"""AdamW, clipping, balancing and the conversion of what learns."""

import pytest
import torch

from support.models import tiny_model
from support.training import training_job
from unmask.models.conversion import converted_config, extended_config
from unmask.models.moe import Router
from unmask.training.learner import Learner
from unmask.training.optimizer import Optimizer, balance_experts
from unmask.training.steps import Totals
from unmask.training.weights import Weights
from unmask_api.train_job import Optimizer as OptimizerSpec

SPEC = OptimizerSpec(betas=("0.9", "0.99"), weight_decay="0.5", clip_norm="1e9", epsilon="1e-6")
CAUSAL = {"architectures": ["BailingMoeV2ForCausalLM"]}


def fill_gradient(weights, seed):
    weights.gradient.copy_(torch.empty_like(weights.gradient).normal_(generator=torch.manual_seed(seed)))


def test_steps_are_those_of_adamw_and_only_matrices_decay():
    weights = Weights(tiny_model(dtype=torch.float32), precision="fp32")
    optimizer = Optimizer(weights, SPEC)
    expected = {name: p.detach().clone() for name, p in weights.model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 4):
        fill_gradient(weights, step)
        optimizer.gradient_norm(1.0)
        for name, parameter in weights.model.named_parameters():
            gradient, value = parameter.grad, expected[name]
            value *= 1 - 0.01 * (0.5 if value.ndim >= 2 else 0.0)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            mean, variance = first[name] / (1 - 0.9**step), second[name] / (1 - 0.99**step)
            value -= 0.01 * mean / (variance.sqrt() + 1e-6)
        optimizer.step(0.01)
    for name, parameter in weights.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("clip", "clipped"), [("0.5", True), ("1e6", False)])
def test_the_gradient_is_divided_by_the_normaliser_and_clipped_by_its_global_norm(clip, clipped):
    weights = Weights(tiny_model(dtype=torch.float32), precision="fp32")
    optimizer = Optimizer(weights, SPEC.model_copy(update={"clip_norm": clip}))
    fill_gradient(weights, 0)
    divided = weights.gradient / 8
    norm = optimizer.gradient_norm(8.0)
    assert norm == pytest.approx(float(divided.norm()))
    expected = divided * (0.5 / norm) if clipped else divided
    torch.testing.assert_close(weights.gradient, expected)
    together = torch.cat([p.grad.flatten() for p in weights.model.parameters()])
    assert torch.equal(together, weights.gradient)


def test_a_bias_moves_towards_experts_with_fewer_tokens_and_keeps_its_mean():
    router = Router(4, 4, choose=1, score="sigmoid", normalise=True, biased=True)
    balance_experts([router], [torch.tensor([10, 2, 4, 4])], 0.001)  # mean 5
    direction = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(router.expert_bias, 0.001 * (direction - 0.5))
    assert float(router.expert_bias.sum()) == pytest.approx(0, abs=1e-9)


def test_rate_zero_freezes_the_bias_and_a_router_without_one_is_left_alone():
    frozen = Router(4, 2, choose=1, score="sigmoid", normalise=True, biased=True)
    plain = Router(4, 2, choose=1, score="softmax", normalise=True)
    counts = [torch.tensor([3, 1])] * 2
    balance_experts([frozen, plain], counts, 0.0)
    assert frozen.expert_bias.tolist() == [0, 0]
    balance_experts([plain], counts[:1], 0.1)
    assert plain.expert_bias is None


def learner(tmp_path, **values):
    return Learner(tiny_model(dtype=torch.float32, **CAUSAL), training_job(tmp_path, values).spec)


def take_step(learner, seed):
    fill_gradient(learner.weights, seed)
    routers = learner.model.routers()
    counts = tuple(torch.arange(len(router.weight)) for router in routers)
    totals = Totals(loss=0.0, normaliser=1.0, stop=False, expert_tokens=counts)
    learner.gradient_norm(totals)
    learner.step(totals, 0.01)


def test_a_conversion_keeps_weights_moments_and_biases(tmp_path):
    one, other = learner(tmp_path), learner(tmp_path)
    take_step(one, 1)
    take_step(other, 1)
    converted = one.recast(converted_config(one.model.config, "LLaDA2MoeModelLM"))
    assert not converted.model.causal
    take_step(converted, 2)
    take_step(other, 2)
    ours, theirs = dict(converted.tensors()), dict(other.tensors())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_frozen_bias_stays_as_it_is_and_everything_else_is_learnt(tmp_path):
    one = learner(tmp_path)
    before = [router.expert_bias.clone() for router in one.model.routers()]
    weights = [parameter.clone() for parameter in one.model.parameters()]
    fill_gradient(one.weights, 1)
    counts = tuple(torch.arange(len(bias)) for bias in before)
    totals = Totals(loss=0.0, normaliser=1.0, stop=False, expert_tokens=counts)
    one.step(totals, 0.01, freeze_router_bias=True)
    assert all(torch.equal(r.expert_bias, b) for r, b in zip(one.model.routers(), before, strict=True))
    assert not any(torch.equal(p, w) for p, w in zip(one.model.parameters(), weights, strict=True))
    one.step(totals, 0.01)
    assert not any(torch.equal(r.expert_bias, b) for r, b in zip(one.model.routers(), before, strict=True))


def test_another_context_keeps_weights_and_moments(tmp_path):
    one = learner(tmp_path)
    take_step(one, 1)
    kept = {name: tensor.clone() for name, tensor in one.tensors()}
    other = one.recast(extended_config(one.model.config, rope_theta=5e4, context=512))
    assert other.config() | {"rope_theta": 1.0, "max_position_embeddings": 1} == one.config() | {
        "rope_theta": 1.0,
        "max_position_embeddings": 1,
    }
    assert (other.config()["rope_theta"], other.config()["max_position_embeddings"]) == (5e4, 512)
    assert other.model.rotary.theta == 5e4
    assert all(torch.equal(tensor, kept[name]) for name, tensor in other.tensors())


def test_after_a_step_the_gradient_starts_from_zero(tmp_path):
    one = learner(tmp_path)
    take_step(one, 1)
    assert not one.weights.gradient.any()


def test_in_bf16_the_copy_follows_the_float32_weights_and_routers_stay_float32(tmp_path):
    one = learner(tmp_path, **{"spec.precision": "bf16"})
    copy = one.weights.computing
    assert copy is not one.model
    for _ in range(2):
        for own, source in zip(copy.parameters(), one.model.parameters(), strict=True):
            assert torch.equal(own, source.to(own.dtype))
        take_step(one, 1)
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}
    assert copy.embedding.weight.dtype == torch.bfloat16
    assert all(router.weight.dtype == torch.float32 for router in copy.routers())
    for own, source in zip(copy.routers(), one.model.routers(), strict=True):
        assert torch.equal(own.expert_bias, source.expert_bias)
        assert source.expert_bias.any()
