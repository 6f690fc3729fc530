"""The router's choice and the experts' sum."""

import pytest
import torch

from support.models import tiny_model
from unmask.models.moe import Experts, Router, Routing, experts_one_by_one

pytestmark = pytest.mark.training

SCORES = [0.2, -0.4, 1.1, 0.0, 0.6, 0.5, -1.0, 2.0]
BIAS = [0.0, 0.0, -0.3, 0.1, 0.2, 0.0, 0.0, -0.6]


def router(scores, bias, **options):
    """A router whose score of expert e is ``scores[e]`` for the token (1,)."""
    made = Router(1, len(scores), score="sigmoid", normalise=True, biased=True, **options)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(scores).unsqueeze(1))
    made.expert_bias.copy_(torch.tensor(bias))
    return made


def test_the_router_agrees_with_a_worked_example():
    routing = router(SCORES, BIAS, choose=2, groups=4, keep_groups=2, scale=2.5)(torch.ones(1, 1))
    assert routing.experts.tolist() == [[4, 5]]  # expert 7 has the best score, and its group is not chosen
    assert routing.weights[0].tolist() == pytest.approx([1.272866, 1.227134], abs=1e-6)


def test_groups_outside_the_choice_are_excluded_even_if_all_preferences_are_negative():
    bias = [-5.0] * 4 + [-4.0] * 4
    routing = router([0.0] * 8, bias, choose=4, groups=2, keep_groups=1, scale=1.0)(torch.ones(1, 1))
    assert sorted(routing.experts[0].tolist()) == [4, 5, 6, 7]


def test_the_bias_steers_the_choice_and_not_the_weights():
    plain = router([1.0, 1.0, 0.0, 0.0], [0.0] * 4, choose=2, groups=1, keep_groups=1, scale=1.0)
    steered = router([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0], choose=2, groups=1, keep_groups=1, scale=1.0)
    assert sorted(plain(torch.ones(1, 1)).experts[0].tolist()) == [0, 1]
    chosen = steered(torch.ones(1, 1))
    assert sorted(chosen.experts[0].tolist()) == [2, 3]
    assert chosen.weights[0].tolist() == pytest.approx([0.5, 0.5])


def test_routing_is_float32_whatever_the_model():
    model = tiny_model(dtype=torch.bfloat16)
    for made in model.routers():
        assert made.weight.dtype == made.expert_bias.dtype == torch.float32
        assert made(torch.randn(3, 32, dtype=torch.bfloat16)).weights.dtype == torch.float32


def test_tokens_are_counted_in_training_alone():
    made = tiny_model().routers()[0]
    made.eval()(torch.randn(5, 32, dtype=torch.float64))
    assert made.tokens_per_expert.sum() == 0
    made.train()(torch.randn(5, 32, dtype=torch.float64))
    assert made.tokens_per_expert.sum() == 5 * 2


def kept(compute):
    """Elements of the distinct tensors that autograd keeps of ``compute``, and the result."""
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        result = compute()
    return sum(t.untyped_storage().nbytes() for t in storages.values()), result


def test_experts_keep_gates_and_ups_and_no_copies_of_tokens():
    experts = stacked(6, 64, 8)
    hidden = torch.randn(50, 64, requires_grad=True)
    routing = Routing(torch.randint(0, 6, (50, 2)), torch.rand(50, 2))
    size, _ = kept(lambda: experts(hidden, routing))
    weights = sum(p.numel() for p in experts.parameters())
    gates_and_ups = 100 * 2 * 8
    indices = 100 * 8 + 6 * 8
    assert size <= 4 * (hidden.numel() + weights + gates_and_ups + 100) + indices
    assert size < 4 * (weights + 100 * 64 + gates_and_ups)  # no room for a copy of each routed token


def test_experts_are_exact_in_float64():
    experts = stacked(6, 16, 8, torch.float64)
    routing = Routing(torch.randint(0, 5, (9, 2)), torch.rand(9, 2, dtype=torch.float64).requires_grad_())
    hidden = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    inputs = [hidden, routing.weights, *experts.parameters()]
    fast, slow = experts(hidden, routing), experts_one_by_one(experts, hidden, routing)
    upstream = torch.randn_like(fast)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-13)
    pairs = zip(*(torch.autograd.grad(out, inputs, upstream) for out in (fast, slow)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def stacked(num_experts, hidden, width, dtype=torch.float32):
    torch.manual_seed(0)
    experts = Experts(num_experts, hidden, width).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_grouped_experts_equal_the_loop_forward_and_backward(tokens):
    experts = stacked(6, 16, 8)
    hidden = torch.randn(tokens, 16, requires_grad=True)
    # Experts 4 and 5 get no token.
    routing = Routing(
        torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]), torch.rand(tokens, 2).requires_grad_()
    )
    inputs = [hidden, routing.weights, *experts.parameters()]
    fast, slow = experts(hidden, routing), experts_one_by_one(experts, hidden, routing)
    assert torch.allclose(fast, slow, atol=1e-5)
    upstream = torch.randn_like(fast)
    gradients = zip(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(slow, inputs, upstream), strict=True
    )
    for got, expected in gradients:
        assert torch.allclose(got, expected, atol=1e-5)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    experts = stacked(3, 8, 4)
    routing = Routing(torch.tensor([[0], [2]]), torch.ones(2, 1))
    experts(torch.randn(2, 8), routing).square().sum().backward()
    assert experts.down_proj.grad[1].abs().max() == 0
    assert experts.down_proj.grad[0].abs().max() > 0
