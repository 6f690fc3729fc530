"""Cross-entropy at the predicted positions only, with the output layer run in chunks.

The output layer is the widest of a model: for 2 x 4,096 tokens and a vocabulary of
157,184 its float32 logits are 5 GB. Only masked positions need them, and only a chunk at
a time; backward recomputes each chunk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unmask.diffusion.layout import ModelInputs

__all__ = ["confident_nll", "loss_terms", "summed_loss", "token_nll"]

_CHUNK_LOGITS = 1 << 25
"""Logits held at a time: 2^25, or 128 MiB of float32."""

_CHUNK_LOGITS_ON_CPU = 1 << 23
"""The same on a CPU, whose matrix products need fewer rows: what is held here comes on top of all that a
model keeps for backward."""


def token_nll(
    hidden_MD: Tensor, logits: Callable[[Tensor], Tensor], targets_M: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Negative log-likelihood in nats of each target: float32 (M,).

    Args:
        hidden_MD: Final hidden states at the predicted positions.
        logits: The model's output layer, (n, D) to float32 (n, vocabulary).
        targets_M: int64.
        chunk: Positions per call of ``logits``; by default those of 128 MiB of logits, on a CPU of 32 MiB.
    """

    def nll(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(hidden), targets, reduction="none")

    return _in_chunks(nll, hidden_MD, targets_M, chunk or _chunk(hidden_MD, logits))


def confident_nll(
    hidden_MD: Tensor,
    logits: Callable[[Tensor], Tensor],
    targets_M: Tensor,
    *,
    confidence_weight: float,
    chunk: int | None = None,
) -> Tensor:
    """Negative log-likelihood, plus ``confidence_weight`` x entropy where the best token is the target: (M,).

    Confidence-aware parallel training (CAP; LLaDA2.0, arXiv 2512.15745, section 5.2): what
    the model already gets right it should be sure of, so that more positions pass the
    decoder's threshold at once. Which positions are right is taken as given, so wrong ones
    have no gradient from the entropy. We differ in one thing: the paper takes the mean of
    the entropy over the right positions, we divide it like the rest of the loss (so that
    micro-batches and ranks do not matter); at an accuracy of a, our weight is the paper's / a.
    """

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits(hidden), dim=-1)
        nll = -log_p.gather(-1, targets.unsqueeze(-1))[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        right = log_p.detach().argmax(-1) == targets
        return nll + confidence_weight * entropy * right

    return _in_chunks(loss, hidden_MD, targets_M, chunk or _chunk(hidden_MD, logits))


def summed_loss(
    hidden_BSD: Tensor,
    logits: Callable[[Tensor], Tensor],
    inputs: ModelInputs,
    *,
    confidence_weight: float = 0.0,
) -> Tensor:
    """Sum of weight x negative log-likelihood over the predictions: a float32 scalar.

    Divide by the sum of ``inputs.normaliser`` over the micro-batches and ranks of a step
    for the loss, which then depends on neither. With a ``confidence_weight``, each term is
    that of :func:`confident_nll`.
    """
    terms = loss_terms(hidden_BSD, logits, inputs, confidence_weight=confidence_weight)
    return (terms * inputs.weights).sum()


def loss_terms(
    hidden_BSD: Tensor,
    logits: Callable[[Tensor], Tensor],
    inputs: ModelInputs,
    *,
    confidence_weight: float = 0.0,
) -> Tensor:
    """What :func:`summed_loss` weighs and adds up: float32 (M,)."""
    hidden_MD = hidden_BSD.flatten(0, 1).index_select(0, inputs.predict)
    if confidence_weight:
        return confident_nll(hidden_MD, logits, inputs.targets, confidence_weight=confidence_weight)
    return token_nll(hidden_MD, logits, inputs.targets)


def _chunk(hidden_MD: Tensor, logits: Callable[[Tensor], Tensor]) -> int:
    """Positions whose logits together are within the limit."""
    limit = _CHUNK_LOGITS_ON_CPU if hidden_MD.device.type == "cpu" else _CHUNK_LOGITS
    return max(1, limit // logits(hidden_MD[:0]).shape[-1])


def _in_chunks(
    loss: Callable[[Tensor, Tensor], Tensor], hidden_MD: Tensor, targets_M: Tensor, chunk: int
) -> Tensor:
    """``loss`` of all positions, ``chunk`` at a time; backward computes each chunk again."""
    if len(hidden_MD) <= chunk:
        return loss(hidden_MD, targets_M)
    pieces = zip(hidden_MD.split(chunk), targets_M.split(chunk), strict=True)
    return torch.cat([checkpoint(loss, hidden, targets, use_reentrant=False) for hidden, targets in pieces])
