"""Losses that keep experts equally busy and router logits small, as seen by one router.

The load-balance loss of a layer is E sum_i f_i P_i, with f_i the share of routed copies that
expert i gets and P_i the mean of its normalised score over tokens (Switch Transformer, arXiv
2101.03961, equations 4 to 6; LLaDA-MoE, arXiv 2509.24389). It is 1 where all are equally
busy. No gradient goes through f. The z-loss is the mean over tokens of the squared logarithm of
the sum of exponentials of the logits (ST-MoE, arXiv 2202.08906, equation 5).

Given f, both are sums over tokens. So their gradient can be added where the logits are made, in
any forward of any process, once f is known of all of them: :class:`BalancePull` does this in the
backward pass. Shape letters: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = ["BalancePull", "Pulled", "RouterSums", "normalised_scores", "pulled", "sums_of"]

Score = Literal["sigmoid", "softmax"]


@dataclass(slots=True)
class RouterSums:
    """What one process's forwards add to the two losses of a layer."""

    scores: Tensor
    """float64 (E,): the normalised scores of each expert, added up over tokens."""
    squares: Tensor
    """float64 (): the squared logarithms of the sums of exponentials, added up over tokens."""


@dataclass(slots=True)
class BalancePull:
    """What the losses weigh in the next backward pass; set when all processes' tokens are counted."""

    load: Tensor
    """float32 (E,): what a token's normalised score of each expert is multiplied with."""
    square: float
    """What its squared logarithm is multiplied with."""


class Pulled(Protocol):
    """A router, as far as its logits are pulled."""

    score: Score
    counted: Tensor | None
    pull: BalancePull | None


def normalised_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """Scores of each token that add up to 1: (T, E)."""
    if score == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    scores_TE = torch.sigmoid(logits_TE)
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def sums_of(logits_TE: Tensor, score: Score, counted_T: Tensor | None) -> RouterSums:
    """What these tokens add; padding is not counted."""
    if counted_T is not None:
        logits_TE = logits_TE[counted_T]
    return RouterSums(
        scores=normalised_scores(logits_TE, score).double().sum(0),
        squares=torch.logsumexp(logits_TE, dim=-1).double().square().sum(),
    )


def pulled(logits_TE: Tensor, router: Pulled) -> Tensor:
    """The same logits, whose gradient will have that of the two losses added."""
    result: Tensor = _AddGradient.apply(logits_TE, router)
    return result


class _AddGradient(torch.autograd.Function):
    """Leaves its input as it is; what it adds to the gradient is looked up in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, router: Pulled) -> Tensor:
        ctx.save_for_backward(logits_TE)
        ctx.router, ctx.counted = router, router.counted
        return logits_TE.view_as(logits_TE)

    @staticmethod
    def backward(ctx: Any, gradient_TE: Tensor) -> tuple[Tensor, None]:
        pull = ctx.router.pull
        if pull is None:
            return gradient_TE, None
        (saved_TE,) = ctx.saved_tensors
        with torch.enable_grad():
            logits_TE = saved_TE.detach().requires_grad_()
            counted = slice(None) if ctx.counted is None else ctx.counted
            scores_TE = normalised_scores(logits_TE[counted], ctx.router.score)
            squares_T = torch.logsumexp(logits_TE[counted], dim=-1).square()
            loss = (scores_TE * pull.load).sum() + pull.square * squares_T.sum()
            (own_TE,) = torch.autograd.grad(loss, logits_TE)
        return gradient_TE + own_TE, None
