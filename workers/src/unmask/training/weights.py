"""The model as training holds it: float32 weights, one flat gradient, and the copy that computes.

The float32 weights are what the optimiser changes and what is saved. With precision
``bf16`` forward and backward passes run on a bfloat16 copy (its routers stay float32, as
in a model that is loaded so), and gradients are added up in float32.

All gradients lie in one buffer: one all-reduce, one norm, one division per step. It has
no buckets that change after the first step, as those of DistributedDataParallel do; so the
order of every sum, and with it every bit of the result, is the same before and after a
restart whatever the number of ranks.
"""

import torch
from torch import Tensor

from unmask.models.base import LanguageModel
from unmask.models.loading import build

__all__ = ["Weights"]


class Weights:
    """Parameters, their gradient, and the model to compute with."""

    def __init__(self, model: LanguageModel, *, precision: str) -> None:
        """Take ``model``, in float32, over."""
        self.model = model.train()
        """The float32 weights."""
        self.computing = model if precision == "fp32" else _copy_in(torch.bfloat16, model)
        """The model that forward passes run on."""
        parameters = list(model.parameters())
        self.gradient = torch.zeros(sum(p.numel() for p in parameters), device=model.device)
        """float32 (number of parameters,); add up with :meth:`collect` after each backward pass."""
        parts = self.gradient.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def collect(self) -> None:
        """Add the gradient of the last backward pass to :attr:`gradient`."""
        if self.computing is self.model:
            return  # autograd adds to the views in place
        for parameter, source in zip(self.model.parameters(), self.computing.parameters(), strict=True):
            assert parameter.grad is not None, "a view of the flat gradient"
            if source.grad is not None:
                parameter.grad.add_(source.grad)
                source.grad = None

    @torch.no_grad()
    def changed(self) -> None:
        """Bring the copy that computes up to date with the weights, and begin a new gradient."""
        self.gradient.zero_()
        if self.computing is not self.model:
            for own, source in zip(_tensors(self.computing), _tensors(self.model), strict=True):
                own.copy_(source)


def _copy_in(dtype: torch.dtype, model: LanguageModel) -> LanguageModel:
    copy = build(model.config, device="meta", dtype=dtype).to_empty(device=model.device)
    with torch.no_grad():
        for own, source in zip(_tensors(copy), _tensors(model), strict=True):
            own.copy_(source)
    return copy.train()


def _tensors(model: LanguageModel) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
