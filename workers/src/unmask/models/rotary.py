"""Rotary position embedding (Su et al., arXiv 2104.09864) in "neox" halves, on part of a head."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["Rotation"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of one forward's positions, shared by all layers; float32 (B, 1, S, R / 2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position: Tensor, *, rotary_dim: int, theta: float) -> Self:
        """Angles of ``position`` (B, S) for the first ``rotary_dim`` (R) dimensions of each head."""
        exponent = torch.arange(0, rotary_dim, 2, device=position.device, dtype=torch.float32) / rotary_dim
        angle = position[:, None, :, None].float() * theta**-exponent
        return cls(angle.cos(), angle.sin())

    def turn(self, x_BHSD: Tensor) -> Tensor:
        """Rotate the first R dimensions of each head and pass the others through; keeps the dtype."""
        rotary_dim = 2 * self.cos.shape[-1]
        turned, passed = x_BHSD[..., :rotary_dim], x_BHSD[..., rotary_dim:]
        left, right = turned.to(torch.promote_types(turned.dtype, torch.float32)).chunk(2, dim=-1)
        pair = left * self.cos - right * self.sin, right * self.cos + left * self.sin
        return torch.cat((*(half.to(x_BHSD.dtype) for half in pair), passed), dim=-1)
