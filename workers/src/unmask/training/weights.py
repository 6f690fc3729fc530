"""The model as training holds it: float32 weights, one flat gradient, and the copy that computes.

The float32 weights are what the optimiser changes and what is saved. With precision
``bf16`` forward and backward passes run on a bfloat16 copy (its routers stay float32, as
in a model that is loaded so), and gradients are added up in float32.

All gradients lie in one buffer: one all-reduce, one norm, one division per step. It has
no buckets that change after the first step, as those of DistributedDataParallel do; so the
order of every sum, and with it every bit of the result, is the same before and after a
restart whatever the number of ranks.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from unmask.models import loading
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.conversion import recast
from unmask.models.loading import build
from unmask.models.slots import Slot
from unmask.training.boxes import Box
from unmask.training.distributed import World
from unmask.training.sharding.recomputation import recompute_layers

__all__ = ["Weights"]


class Weights:
    """Parameters, their gradient, and the model to compute with; every process holds all of it."""

    shared_out: bool = False
    """Whether a process holds a part only."""
    named: Mapping[str, Tensor]
    """What this process holds of each parameter; its ``grad`` is a view of :attr:`gradient`."""
    leads: bool

    def __init__(
        self, model: LanguageModel, *, precision: str, leads: bool = True, recompute: bool = False
    ) -> None:
        """Take ``model``, in float32, over.

        Args:
            model: The model.
            precision: ``fp32`` or ``bf16``, of forward and backward passes.
            leads: Whether this process is the one that stores what all hold.
            recompute: Whether backward passes compute layers again.
        """
        self.leads, self._precision, self._recompute = leads, precision, recompute
        self.model = model.train()
        """The float32 weights."""
        self.named = dict(model.named_parameters())
        self.computing = model if precision == "fp32" else _copy_in(torch.bfloat16, model)
        """The model that forward passes run on."""
        if recompute:
            recompute_layers(self.computing)
        self._lay_out_gradient()

    def _lay_out_gradient(self) -> None:
        """One buffer for the gradients of all parameters."""
        parameters = list(self.named.values())
        self.gradient = torch.zeros(sum(p.numel() for p in parameters), device=self.model.device)
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

    def sum_gradient(self, world: World) -> None:
        """Add up :attr:`gradient` over all processes, after the last backward pass of a step."""
        world.sum(self.gradient)

    def norm(self) -> float:
        """The norm of the whole gradient."""
        return float(torch.linalg.vector_norm(self.gradient))

    def boxes(self) -> Iterator[tuple[str, Box]]:
        """What this process holds of each parameter and buffer that is saved, by name."""
        for name, tensor in self.model.state_dict().items():
            yield name, Box.whole(tensor, kept=self.leads)

    @torch.no_grad()
    def fill(self, values: Iterable[tuple[Slot, Tensor]]) -> None:
        """Take over ``values``, which come one at a time, as the weights."""
        state = self.model.state_dict()
        for slot, value in values:
            slot.view(state).copy_(value)
        self.changed()

    def recast(self, config: ModelConfig) -> "Weights":
        """The same weights under another configuration, which gives them the same shapes."""
        model = recast(self.model, config)
        return Weights(model, precision=self._precision, leads=self.leads, recompute=self._recompute)

    def export(self, path: Path, *, companions: Mapping[str, bytes]) -> None:
        """Write the float32 model to the folder ``path`` as it is published; all processes call this."""
        if self.leads:
            loading.save(self.model, path, companions=companions)

    def keep_reference(self, path: Path) -> None:
        """Write to the folder ``path`` what a reference of a preference stage is made of; all call this."""
        self.export(path, companions={})

    def unequal(self, *followers: LanguageModel) -> AbstractContextManager[None]:
        """A block in which processes may run different numbers of forward passes, without gradients.

        All processes enter it, and nothing else in it may need the others. Each of ``followers``, models that
        are shared out alike, runs once after every forward pass of this one.
        """
        return nullcontext()

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
