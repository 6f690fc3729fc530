"""Weights of which only adapters learn: the base is frozen in the number format it was loaded in.

The base has neither gradients nor optimiser state, and is in no checkpoint: a run that goes on loads it
again from where it came from. Adapters are float32, their gradients one flat buffer like those of all
weights (:mod:`unmask.training.weights`); processes that share the work exchange nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from unmask.errors import ModelError, UsageError
from unmask.models import loading
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.folder import new_folder, read_inside, verify_checksums
from unmask.models.lora import AdaptedLinear, adapted_layers, attach, held
from unmask.models.slots import Slot
from unmask.training.boxes import Box
from unmask.training.sharding.recomputation import recompute_layers
from unmask.training.weights import Weights
from unmask_api.train_job import LoRA

__all__ = ["AdaptedWeights"]

_FILE = "adapters.safetensors"


class AdaptedWeights(Weights):
    """Adapters, their gradient, and the frozen model beside which they learn."""

    def __init__(
        self, model: LanguageModel, spec: LoRA, *, seed: int, leads: bool = True, recompute: bool = False
    ) -> None:
        """Freeze ``model`` and put new adapters beside it.

        Args:
            model: The base, in the number format of forward passes.
            spec: Where adapters are, and how large.
            seed: What their first values follow from.
            leads: Whether this process is the one that stores what all hold.
            recompute: Whether backward passes compute layers again.
        """
        self.leads = leads
        attach(model, rank=spec.rank, alpha=float(spec.alpha), targets=spec.targets, seed=seed)
        self.model = self.computing = model.train()
        if recompute:
            recompute_layers(model)
        self.named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._lay_out_gradient()

    def collect(self) -> None:
        """Nothing to do: backward passes add to the flat gradient themselves."""

    def boxes(self) -> Iterator[tuple[str, Box]]:
        """The adapters; see :meth:`Weights.boxes`."""
        for name, tensor in self.named.items():
            yield name, Box.whole(tensor.detach(), kept=self.leads)

    def fill(self, values: Iterable[tuple[Slot, Tensor]]) -> None:
        """Not for these weights, whose base stays; the manifest's rules see to it."""
        raise UsageError("spec.lora: the base of adapters is never replaced")

    def recast(self, config: ModelConfig) -> "Weights":
        """Not for these weights, whose base stays; the manifest's rules see to it."""
        raise UsageError("spec.lora: the base of adapters is never converted")

    def export(self, path: Path, *, companions: Mapping[str, bytes]) -> None:
        """Write the model with its adapters merged in, in float32; see :meth:`Weights.export`."""
        if not self.leads:
            return
        state = self.model.state_dict()
        layers = {f"{name}.weight": layer for name, layer in adapted_layers(self.model).items()}
        loading.save_parts(
            self.model.config,
            path,
            lambda slot: _whole(slot, state, layers),
            dtypes=lambda slot: torch.promote_types(state[slot.parameter].dtype, torch.float32),
            companions=companions,
        )

    def keep_reference(self, path: Path) -> None:
        """Write the adapters as they are: with the base, the model as it is."""
        if self.leads:
            now = {name: tensor.detach().cpu().contiguous() for name, tensor in self.named.items()}
            with new_folder(path) as folder:
                folder.write(_FILE, bytes_of(now))

    def read_reference(self, path: Path) -> dict[str, Tensor]:
        """What :meth:`keep_reference` wrote.

        Raises:
            ModelError: It is missing, damaged, or of other adapters.
        """
        if verify_checksums(path) is None:
            raise ModelError(f"{path}: no such reference; restore it, or begin the run anew")
        found = tensors_of(read_inside(path, _FILE))
        shapes = {name: tensor.shape for name, tensor in self.named.items()}
        if {name: tensor.shape for name, tensor in found.items()} != shapes:
            raise ModelError(f"{path / _FILE}: holds other adapters than the job's")
        return {name: tensor.to(self.model.device) for name, tensor in found.items()}

    @contextmanager
    def as_of(self, adapters: Mapping[str, Tensor]) -> Iterator[LanguageModel]:
        """In the block, the model with ``adapters`` in place of its own, counting no tokens of experts."""
        training = self.model.training
        self.model.eval()
        try:
            with held(self.model, adapters):
                yield self.model
        finally:
            self.model.train(training)

    @torch.no_grad()
    def changed(self) -> None:
        """See :meth:`Weights.changed`."""
        self.gradient.zero_()


def _whole(slot: Slot, state: Mapping[str, Tensor], layers: Mapping[str, AdaptedLinear]) -> Tensor:
    """The published tensor of ``slot``, its adapter merged in, in float32."""
    layer = layers.get(slot.parameter)
    value = slot.view({slot.parameter: state[slot.parameter] if layer is None else layer.merged()})
    return value.to(torch.promote_types(value.dtype, torch.float32))
