"""Root-mean-square norm that keeps its input alone for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, whose backward pass computes the norm again instead of keeping its parts.

    On a CPU torch's keeps three tensors of the input's size per call, and a model has two norms of the
    hidden size and two of the heads' per layer. Output and gradients are torch's, bit for bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            result: Tensor = _Normalised.apply(x, self.weight, self.normalized_shape, self.eps)
            return result
        return super().forward(x)


class _Normalised(torch.autograd.Function):
    """The norm, which keeps ``x`` and ``weight``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: tuple[int, ...], eps: float | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.eps = shape, eps
        return F.rms_norm(x, shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (
            kept.detach().requires_grad_(needed)
            for kept, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        with torch.enable_grad():
            again = F.rms_norm(x, ctx.shape, weight, ctx.eps)
        wanted = [one for one in (x, weight) if one.requires_grad]
        found = iter(torch.autograd.grad(again, wanted, gradients[0]))
        return (*(next(found) if one.requires_grad else None for one in (x, weight)), None, None)
