"""The balance losses of a step, against the formula on all of its tokens at once."""

from dataclasses import replace

import pytest
import torch

from support.models import TINY, packed_row, random_tokens, tiny_canvas_model, tiny_model
from support.training import training_job
from unmask.diffusion import layout
from unmask.diffusion.losses import summed_loss
from unmask.diffusion.noise import NoiseConfig, corrupt
from unmask.models.balance_losses import BalancePull, RouterSums
from unmask.models.moe import Router
from unmask.training.balance import Balancing
from unmask.training.distributed import World
from unmask.training.sharding.recomputation import recompute_layers
from unmask.training.steps import gradient_step, micro_batches
from unmask.training.weights import Weights

pytestmark = pytest.mark.training

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
LOAD, Z = 0.3, 0.2


def rows_of():
    """Four rows that end in more or less padding."""
    rows = [packed_row(random_tokens(8 + 4 * n, seed=n), length=24, first_ordinal=n) for n in range(4)]
    arrays = {
        name: torch.cat([torch.from_numpy(getattr(row, name)) for row in rows]).numpy()
        for name in ("ids", "document", "position", "supervised", "ordinal")
    }
    return replace(rows[0], **arrays)


def inputs_of(rows):
    noise = corrupt(rows, NoiseConfig(), seed=1, block_length=4)
    return layout.two_copy(rows, noise, block_length=4, mask_token_id=TINY["mask_token_id"])


class Flat(Weights):
    """Weights in float64, their gradients added up where autograd puts them."""

    def __init__(self, model):
        self.model = self.computing = model.train()
        self.named = dict(model.named_parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def sum_gradient(self, world):
        pass


def formula(model, inputs):
    """Objective, load-balance loss and z-loss, with the logits of every router taken down on the way."""
    logits = []
    hooks = [
        router.register_forward_hook(
            lambda router, args, out: logits.append((router, args[0] @ router.weight.T))
        )
        for router in model.routers()
    ]
    hidden = model.hidden(inputs.ids, inputs.metadata)
    for hook in hooks:
        hook.remove()
    real = inputs.metadata.document.flatten() >= 0
    load = z = 0.0
    for router, every in logits:
        seen = every[real]
        scores = torch.sigmoid(seen) if router.score == "sigmoid" else seen.softmax(-1)
        chosen = router._choose(scores).flatten()
        share = torch.bincount(chosen, minlength=len(router.weight)).double() / len(chosen)
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        load = load + len(share) * (share * mean).sum() / len(logits)
        z = z + torch.logsumexp(seen, -1).square().mean() / len(logits)
    return summed_loss(hidden, model.logits, inputs) / inputs.normaliser, load, z


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("make", [tiny_model, tiny_canvas_model])
def test_values_and_gradients_are_the_formulas_however_the_step_is_split(make, size, recompute):
    model, rows = make(), rows_of()
    objective, load, z = formula(make().train(), inputs_of(rows))
    other = make().train()
    sum(
        part * weight for part, weight in zip(formula(other, inputs_of(rows)), (1, LOAD, Z), strict=True)
    ).backward()

    if recompute:
        recompute_layers(model)
    weights = Flat(model)
    batches = (inputs_of(batch) for batch in micro_batches(rows, size))
    totals = gradient_step(weights, batches, ALONE, stop=False, balancing=Balancing(load=LOAD, z=Z))
    assert totals.loss == pytest.approx(objective.item(), rel=1e-6)
    assert (totals.balance.load, totals.balance.z) == pytest.approx((load.item(), z.item()), rel=1e-12)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        expected = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
        assert torch.allclose(ours.grad / totals.normaliser, expected, atol=1e-12)


def test_the_losses_weigh_in_the_gradient_and_nothing_stays_behind():
    grads = []
    for balancing in (None, Balancing(load=LOAD, z=Z), None):
        model = tiny_model()
        gradient_step(Flat(model), iter([inputs_of(rows_of())]), ALONE, stop=False, balancing=balancing)
        grads.append(model.routers()[0].weight.grad.clone())
        assert all(router.pull is None and router.sums is None for router in model.routers())
        assert not any(router.tokens_per_expert.any() for router in model.routers())
    assert torch.equal(grads[0], grads[2])
    assert (grads[0] - grads[1]).abs().max() > 1e-3


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_added_gradient_is_that_of_the_sum_over_counted_tokens(score):
    router = Router(5, 4, choose=2, score=score, normalise=False).double().train()
    torch.nn.init.normal_(router.weight)
    router.counted = torch.tensor([True, False, True])
    router.pull = BalancePull(torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64), 0.7)
    router.sums = RouterSums(torch.zeros(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    hidden = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (router(hidden).weights.sum() * 0).backward()
    again = hidden.detach().requires_grad_()
    logits = again[router.counted] @ router.weight.detach().T
    scores = torch.sigmoid(logits) if score == "sigmoid" else logits.softmax(-1)
    scores = scores / scores.sum(-1, keepdim=True)
    ((scores * router.pull.load).sum() + 0.7 * torch.logsumexp(logits, -1).square().sum()).backward()
    assert torch.allclose(hidden.grad, again.grad, atol=1e-12)


def test_a_router_that_is_evenly_busy_has_a_load_balance_loss_of_one():
    balancing = Balancing(load=1.0, z=0.0)
    router = Router(4, 4, choose=1, score="softmax", normalise=False).train()
    torch.nn.init.zeros_(router.weight)
    with balancing.counted([router]):
        router(torch.randn(8, 4))
        assert balancing.settle(ALONE, normaliser=1.0).load == pytest.approx(1.0)
    router.tokens_per_expert.zero_()
    with torch.no_grad():
        router.weight[2] = 100.0
    with balancing.counted([router]):
        router(torch.ones(8, 4))
        assert balancing.settle(ALONE, normaliser=1.0).load == pytest.approx(4.0)


def test_a_job_without_the_losses_counts_nothing_beforehand(tmp_path):
    assert Balancing.of(training_job(tmp_path).spec.balance) is None
    job = training_job(tmp_path, {"spec.balance": {"routerZWeight": "0.001"}})
    assert Balancing.of(job.spec.balance) is not None
