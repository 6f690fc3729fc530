"""Mixture of experts: a router that chooses, experts that compute, and a plain reference of both.

Two kinds of routers: LLaDA2.0's (that of Ling 2.0 and DeepSeek-V3) with sigmoid scores, a
bias that steers the choice but not the weights, and a choice limited to the best groups;
and the older softmax router of OLMoE, Qwen3 and LLaDA-MoE. A router always computes in
float32 or wider; in bfloat16 other experts would be chosen.

All experts of a layer are one tensor, so that a layer is two grouped matrix products over
the tokens sorted by expert. Shape letters: T tokens, D hidden size, E experts, K experts
chosen per token, I expert width, N = T x K routed copies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.attention import kernels
from unmask.models.balance_losses import BalancePull, RouterSums, pulled, sums_of
from unmask.models.feedforward import FeedForward
from unmask.models.row_tiles import tiled

__all__ = [
    "ChosenExperts",
    "Experts",
    "MixtureOfExperts",
    "Router",
    "Routing",
    "experts_one_by_one",
    "grouped_linear",
    "mixtures_of",
    "softmax_experts",
    "sorted_by_expert",
]


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token goes to, and how much each counts."""

    experts: Tensor
    """int64 (T, K)."""
    weights: Tensor
    """float32 or wider, (T, K)."""


@dataclass(slots=True)
class ChosenExperts:
    """What a router chose in one forward, for the backward pass that computes the forward again."""

    experts: Tensor | None = None
    """int64 (T, K); None before the first of the two."""


class Router(nn.Module):
    """Scores experts, chooses K for each token, and weighs them.

    Scores are the sigmoid of W h, or its softmax over all experts. For the choice alone a
    bias is added to them where ``biased``. Then, with groups: each group is worth the sum of
    its two best; the best groups stay, and the best K experts among them are chosen. Experts
    outside are excluded with minus infinity, not with 0: a biased score may be negative.
    Weights are the plain scores of the chosen, summing to 1 if ``normalise``, times ``scale``.
    """

    expert_bias: Tensor | None
    tokens_per_expert: Tensor
    counted: Tensor | None = None
    """bool (T,): tokens of the next forward that ``tokens_per_expert`` counts; None for all."""
    pull: BalancePull | None = None
    """What balance losses add to the gradient of the logits in the next backward pass; None: nothing."""
    sums: RouterSums | None = None
    """Where forwards in training add up what the values of those losses are made of; None: nowhere."""
    remembered: ChosenExperts | None = None
    """Where the next forward keeps its choice, or what it takes for its choice if something is kept there."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        choose: int,
        score: Literal["sigmoid", "softmax"],
        normalise: bool,
        biased: bool = False,
        groups: int = 1,
        keep_groups: int = 1,
        scale: float = 1.0,
    ) -> None:
        """Parameter ``weight`` (E, D), buffer ``expert_bias`` (E,) or None; float32 or wider for good."""
        super().__init__()
        self.choose, self.score, self.normalise = choose, score, normalise
        self.groups, self.keep_groups, self.scale = groups, keep_groups, scale
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype))
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=dtype) if biased else None)
        self.register_buffer(
            "tokens_per_expert", torch.zeros(num_experts, dtype=torch.int64), persistent=False
        )

    def forward(self, hidden_TD: Tensor) -> Routing:
        """Route T tokens; in training mode ``tokens_per_expert`` also counts them."""
        logits_TE = F.linear(hidden_TD.to(self.weight.dtype), self.weight)
        if self.training and self.sums is not None:
            logits_TE = pulled(logits_TE, self)
        scores_TE = torch.sigmoid(logits_TE) if self.score == "sigmoid" else torch.softmax(logits_TE, dim=-1)
        with torch.no_grad():
            experts_TK = self._chosen(scores_TE, logits_TE)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts_TK, weights_TK * self.scale)

    def _chosen(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """The K experts of each token, int64 (T, K): chosen and counted now, or in the first forward."""
        if self.remembered is not None and self.remembered.experts is not None:
            return self.remembered.experts
        experts_TK = self._choose(scores_TE)
        if self.remembered is not None:
            self.remembered.experts = experts_TK
        if self.training:
            counted = experts_TK if self.counted is None else experts_TK[self.counted]
            self.tokens_per_expert += torch.bincount(counted.flatten(), minlength=len(self.weight))
            if self.sums is not None:
                own = sums_of(logits_TE, self.score, self.counted)
                self.sums.scores += own.scores
                self.sums.squares += own.squares
        return experts_TK

    def _choose(self, scores_TE: Tensor) -> Tensor:
        """The K best experts of the best groups: int64 (T, K)."""
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias
        if self.keep_groups < self.groups:
            scores_TE = self._only_best_groups(scores_TE)
        chosen: Tensor = scores_TE.topk(self.choose, dim=-1).indices
        return chosen

    def _only_best_groups(self, scores_TE: Tensor) -> Tensor:
        """The scores, minus infinity outside the best groups."""
        grouped = scores_TE.unflatten(1, (self.groups, -1))
        worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = worth.topk(self.keep_groups, dim=-1).indices
        excluded = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
        kept: Tensor = grouped.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(1)
        return kept


class Experts(nn.Module):
    """E gated feed-forwards whose parameters are stacked on dimension 0."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        """``gate_up_proj`` is (E, 2I, D), gate rows first; ``down_proj`` is (E, D, I)."""
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    @property
    def count(self) -> int:
        """E."""
        return len(self.down_proj)

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.gate_up_proj.nbytes + self.down_proj.nbytes

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.down_proj.device

    @property
    def dtype(self) -> torch.dtype:
        """Their number format."""
        return self.down_proj.dtype

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts, (T, D).

        In inference mode on a CPU an expert's rows are filled up to whole tiles
        (:mod:`unmask.models.row_tiles`), so that who else is in the batch does not change a bit of a token.
        On a GPU kernels of our own do it there (:mod:`unmask.models.moe_kernel`), to the same end.
        """
        if torch.is_inference_mode_enabled() and kernels.run_on(hidden_TD.device):
            from unmask.models.moe_kernel import experts_at_once  # no Triton where there is no GPU

            if hidden_TD.dtype != torch.float64:  # which tensor cores do not have
                return experts_at_once(
                    hidden_TD.contiguous(),
                    routing.experts,
                    routing.weights,
                    self.gate_up_proj,
                    self.down_proj,
                )
        return self.of_copies(hidden_TD, *sorted_by_expert(routing, len(self.gate_up_proj)))

    def of_copies(self, hidden_TD: Tensor, token_N: Tensor, weights_N: Tensor, counts_E: Tensor) -> Tensor:
        """The same of copies of tokens that are sorted already, as :func:`sorted_by_expert` has them."""
        weights_N = weights_N.to(hidden_TD.dtype)
        if torch.is_inference_mode_enabled() and hidden_TD.device.type == "cpu":
            return self._in_tiles(hidden_TD, weights_N, token_N, counts_E)
        ends_E = counts_E.cumsum(0)
        out: Tensor = _Routed.apply(hidden_TD, weights_N, self.gate_up_proj, self.down_proj, token_N, ends_E)
        return out

    def _in_tiles(self, hidden_TD: Tensor, weights_N: Tensor, token_N: Tensor, counts_E: Tensor) -> Tensor:
        """Expert by expert in the same memory, which stays in the processor's cache from one to the next."""
        counts = counts_E.tolist()
        rows = tiled(max(counts))
        copies_RD = hidden_TD.new_zeros(rows, hidden_TD.shape[1])
        gate_up_RO = hidden_TD.new_empty(rows, self.gate_up_proj.shape[1])
        inner_RI = hidden_TD.new_empty(rows, self.down_proj.shape[2])
        out_RD = torch.empty_like(copies_RD)
        total_TD = torch.zeros_like(hidden_TD)
        parts = zip(counts, token_N.split(counts), weights_N.split(counts), strict=True)
        for expert, (count, token_C, weights_C) in enumerate(parts):
            if not count:
                continue
            rows = tiled(count)
            torch.index_select(hidden_TD, 0, token_C, out=copies_RD[:count])  # behind them lie any numbers
            gate_up = torch.mm(copies_RD[:rows], self.gate_up_proj[expert].T, out=gate_up_RO[:rows])
            gate, up = gate_up.chunk(2, dim=-1)
            inner = torch.mul(F.silu(gate, inplace=True), up, out=inner_RI[:rows])
            out_CD = torch.mm(inner, self.down_proj[expert].T, out=out_RD[:rows])[:count]
            total_TD.index_add_(0, token_C, out_CD.mul_(weights_C.unsqueeze(1)))
        return total_TD


def sorted_by_expert(routing: Routing, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of tokens one behind the other, those of expert 0 first, each expert's in the order of tokens.

    Returns:
        The token of each copy, int64 (N,), its weight, (N,), and how many each expert has, int64 (E,).
    """
    chosen_N = routing.experts.flatten()
    order_N = torch.argsort(chosen_N, stable=True)
    counts_E = torch.bincount(chosen_N, minlength=num_experts)
    token_N = order_N.div(routing.experts.shape[1], rounding_mode="floor")
    return token_N, routing.weights.flatten()[order_N], counts_E


class _Routed(torch.autograd.Function):
    """What experts make of the tokens sent to them, added up by token; keeps gates and ups alone.

    Copies of the tokens, products of gates and ups, and the experts' results are what a
    layer's memory is spent on: K copies of D numbers each. They are gathered or computed
    again, none of which is a matrix product. A weight's gradient needs the expert's result
    only in its product with the upstream gradient, which is that of the inner product
    with the upstream gradient taken through ``down_proj``, a step on the way in any case.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weights_N: Tensor,
        gate_up_EOD: Tensor,
        down_EDI: Tensor,
        token_N: Tensor,
        ends_E: Tensor,
    ) -> Tensor:
        """The weighted sum of each token's experts, (T, D); ``token_N`` are the tokens sorted by expert."""
        gate_up_NO = grouped_linear(hidden_TD.index_select(0, token_N), gate_up_EOD, ends_E)
        gate_NI, up_NI = gate_up_NO.chunk(2, dim=-1)
        out_ND = grouped_linear(F.silu(gate_NI).mul_(up_NI), down_EDI, ends_E).mul_(weights_N.unsqueeze(1))
        ctx.save_for_backward(hidden_TD, weights_N, gate_up_EOD, down_EDI, token_N, ends_E, gate_up_NO)
        return torch.zeros_like(hidden_TD).index_add_(0, token_N, out_ND)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weights and both projections; of a frozen projection, none."""
        hidden_TD, weights_N, gate_up_EOD, down_EDI, token_N, ends_E, gate_up_NO = ctx.saved_tensors
        gate_NI, up_NI = gate_up_NO.chunk(2, dim=-1)
        up_ND = upstream[0].index_select(0, token_N)
        slope_NI = torch.sigmoid(gate_NI)
        silu_NI = gate_NI * slope_NI
        inner_NI = silu_NI * up_NI
        grad_NI = grouped_linear(up_ND, down_EDI.transpose(1, 2), ends_E)
        weights_grad_N = (grad_NI * inner_NI).sum(-1)
        down_grad = gate_up_grad = None
        if ctx.needs_input_grad[3]:
            down_grad = _grouped_outer(up_ND, inner_NI.mul_(weights_N.unsqueeze(1)), ends_E)
        del up_ND, inner_NI
        grad_NI.mul_(weights_N.unsqueeze(1))
        # silu'(x) = s + x s (1 - s), with s the sigmoid of x.
        slope_NI.add_(silu_NI * (1 - slope_NI)).mul_(up_NI).mul_(grad_NI)
        gate_up_grad_NO = torch.cat((slope_NI, silu_NI.mul_(grad_NI)), dim=-1)
        del slope_NI, silu_NI, grad_NI
        if ctx.needs_input_grad[2]:
            gate_up_grad = _grouped_outer(gate_up_grad_NO, hidden_TD.index_select(0, token_N), ends_E)
        routed_grad_ND = grouped_linear(gate_up_grad_NO, gate_up_EOD.transpose(1, 2), ends_E)
        hidden_grad = torch.zeros_like(hidden_TD).index_add_(0, token_N, routed_grad_ND)
        return hidden_grad, weights_grad_N, gate_up_grad, down_grad, None, None


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of ``x`` up to ``ends[0]`` by weight 0, those up to ``ends[1]`` by weight 1, ...: (N, O)."""
    if x_NI.dtype == torch.float64:  # grouped_mm has no float64, which exactness tests run in
        parts = x_NI.tensor_split(ends_E[:-1].cpu())
        return torch.cat([x @ weight.T for x, weight in zip(parts, weight_EOI.unbind(), strict=True)])
    product: Tensor = F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends_E.to(torch.int32))
    return product


def _grouped_outer(left_NO: Tensor, right_NI: Tensor, ends_E: Tensor) -> Tensor:
    """The gradient of :func:`grouped_linear`'s weights: left^T right of each expert's rows, (E, O, I)."""
    if left_NO.dtype == torch.float64:
        cuts = ends_E[:-1].cpu()
        pairs = zip(left_NO.tensor_split(cuts), right_NI.tensor_split(cuts), strict=True)
        return torch.stack([left.T @ right for left, right in pairs])
    product: Tensor = F.grouped_mm(left_NO.T, right_NI, offs=ends_E.to(torch.int32))
    return product


def experts_one_by_one(experts: Experts, hidden_TD: Tensor, routing: Routing) -> Tensor:
    """The reference of :meth:`Experts.forward`: a loop over experts, each on the tokens that chose it."""
    total_TD = torch.zeros_like(hidden_TD)
    for expert, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        token, choice = torch.where(routing.experts == expert)
        gate, up = (hidden_TD[token] @ gate_up.T).chunk(2, dim=-1)
        weight = routing.weights[token, choice].unsqueeze(1).to(hidden_TD.dtype)
        total_TD = total_TD.index_add(0, token, (F.silu(gate) * up) @ down.T * weight)
    return total_TD


class MixtureOfExperts(nn.Module):
    """Routed experts plus shared experts that every token passes through, unweighted."""

    def __init__(self, router: Router, experts: Experts, shared_experts: FeedForward | None) -> None:
        """Put the parts together."""
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden_TD = x.flatten(0, -2)
        out_TD = self.experts(hidden_TD, self.router(hidden_TD))
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(hidden_TD)
        out: Tensor = out_TD.view_as(x)
        return out

    def begin(self, x: Tensor, micro_batch: int = 0) -> Callable[[], Tensor]:
        """The same in two: begins it, and returns what waits for its end. Here all is done at once.

        ``micro_batch`` is the number of the part of the forward that ``x`` is of.
        """
        out: Tensor = self(x)
        return lambda: out


def mixtures_of(model: nn.Module) -> dict[int, MixtureOfExperts]:
    """The mixtures of a transformer's layers, by the number of their layer."""
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    found = ((number, layer.get_submodule("feed_forward")) for number, layer in enumerate(layers))
    return {number: module for number, module in found if isinstance(module, MixtureOfExperts)}


def softmax_experts(
    hidden_size: int, num_experts: int, width: int, *, choose: int, normalise: bool
) -> MixtureOfExperts:
    """Experts behind a softmax router, without shared ones."""
    router = Router(hidden_size, num_experts, choose=choose, score="softmax", normalise=normalise)
    return MixtureOfExperts(router, Experts(num_experts, hidden_size, width), shared_experts=None)
