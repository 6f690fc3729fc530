"""The gated feed-forward of dense layers and shared experts: down(silu(gate x) * up x)."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202) without biases: (..., D) to (..., D) through width I."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """Parameters of shapes (I, D), (I, D) and (D, I)."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down
