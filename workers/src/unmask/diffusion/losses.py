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

__all__ = ["summed_loss", "token_nll"]

_CHUNK_LOGITS = 1 << 25
"""Logits held at a time: 2^25, or 128 MiB of float32."""


def token_nll(
    hidden_MD: Tensor, logits: Callable[[Tensor], Tensor], targets_M: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Negative log-likelihood in nats of each target: float32 (M,).

    Args:
        hidden_MD: Final hidden states at the predicted positions.
        logits: The model's output layer, (n, D) to float32 (n, vocabulary).
        targets_M: int64.
        chunk: Positions per call of ``logits``; by default as many as 128 MiB of logits hold.
    """
    if len(hidden_MD) == 0:
        return hidden_MD.sum(-1).float()
    if chunk is None:
        vocabulary = logits(hidden_MD[:0]).shape[-1]
        chunk = max(1, _CHUNK_LOGITS // vocabulary)

    def nll(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(hidden), targets, reduction="none")

    if len(hidden_MD) <= chunk:
        return nll(hidden_MD, targets_M)
    pieces = zip(hidden_MD.split(chunk), targets_M.split(chunk), strict=True)
    return torch.cat([checkpoint(nll, hidden, targets, use_reentrant=False) for hidden, targets in pieces])


def summed_loss(hidden_BSD: Tensor, logits: Callable[[Tensor], Tensor], inputs: ModelInputs) -> Tensor:
    """Sum of weight x negative log-likelihood over the predictions: a float32 scalar.

    Divide by the sum of ``inputs.normaliser`` over the micro-batches and ranks of a step
    for the loss, which then depends on neither.
    """
    hidden_MD = hidden_BSD.flatten(0, 1).index_select(0, inputs.predict)
    return (token_nll(hidden_MD, logits, inputs.targets) * inputs.weights).sum()
