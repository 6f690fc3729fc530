"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix and a small product that learns beside it.

The product of ``up`` (out, r) and ``down`` (r, in), scaled by alpha / r, is added to what a projection
computes. ``up`` begins as zero, so that a model with new adapters computes what it did, bit for bit.
Adapters are float32, as whatever is optimised; they are cast to the model's number format as it computes.

Adapted are the projections of attention (queries, keys and values are one matrix here, and have one
adapter together) and of the feed-forwards that every token passes: dense ones and shared experts. Routed
experts, routers, norms, the embedding and the output layer stay as they are.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.base import LanguageModel
from unmask.models.feedforward import FeedForward
from unmask.models.transformer import Attention

__all__ = ["AdaptedLinear", "adapted_layers", "attach", "held"]


class AdaptedLinear(nn.Linear):
    """A projection without bias whose weight is frozen, with an adapter that learns."""

    def __init__(self, frozen: nn.Linear, *, rank: int, scale: float, generator: torch.Generator) -> None:
        """Take the weight of ``frozen`` over; ``scale`` is what the product is multiplied by."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.register_parameter("bias", None)
        self.weight = frozen.weight
        self.scale = scale
        self.held: tuple[Tensor, Tensor] | None = None
        """Down and up of another time, to compute with in place of the own; None: with the own."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        device = self.weight.device
        self.down = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        if device.type != "meta":
            bound = 1 / math.sqrt(self.in_features)
            first = torch.empty(self.down.shape).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                self.down.copy_(first)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        down, up = self.held or (self.down, self.up)
        product = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return F.linear(x, self.weight) + self.scale * product

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with the adapter in it, in the adapter's number format: (out, in)."""
        return self.weight.to(self.up.dtype) + self.scale * (self.up @ self.down)


def attach(
    model: LanguageModel, *, rank: int, alpha: float, targets: Collection[str], seed: int
) -> LanguageModel:
    """Freeze ``model``, in place, and put an adapter beside each matrix of ``targets``.

    Args:
        model: The model; its parameters keep their names, and adapters add ``down`` and ``up`` to them.
        rank: Of each adapter.
        alpha: What is added is scaled by this over ``rank``.
        targets: ``attention``, ``feedForward``, or both.
        seed: What the first values follow from.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    kinds: dict[str, type[nn.Module]] = {"attention": Attention, "feedForward": FeedForward}
    chosen = tuple(kinds[target] for target in targets)
    for owner in [module for module in model.modules() if isinstance(module, chosen)]:
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                adapted = AdaptedLinear(child, rank=rank, scale=alpha / rank, generator=generator)
                setattr(owner, name, adapted)
    return model


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted projections by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


@contextmanager
def held(model: nn.Module, adapters: Mapping[str, Tensor]) -> Iterator[None]:
    """In the block, ``model`` computes with ``adapters``, by parameters' names, in place of its own."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        layer.held = (adapters[f"{name}.down"], adapters[f"{name}.up"])
    try:
        yield
    finally:
        for layer in layers.values():
            layer.held = None
