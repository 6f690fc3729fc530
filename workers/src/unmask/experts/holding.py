"""The experts that a shard has, and what they make of token rows.

A shard reads the tensors of its experts from the model's folder and no others, so its memory is its experts'
and a constant. Parts of two placements may be held at a time, while engines move from one to the other;
experts that both have are in memory once.

Shape letters: T tokens of a frame, K choices per token, D hidden size.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unmask.errors import ModelError, UsageError
from unmask.experts.placement import Bounds, HeldParts, check_bounds
from unmask.models.checkpoint_files import Checkpoint, matching_slots
from unmask.models.config import ModelConfig
from unmask.models.loading import build, copy_tensor, digest_of
from unmask.models.moe import Experts, mixtures_of
from unmask.models.onednn import ReorderedExperts, can_reorder
from unmask.models.slots import Slot
from unmask.models.tensor_pieces import DTYPES
from unmask.v1 import experts_pb2 as pb

__all__ = ["ExpertShape", "Held", "Holding", "NotHeld", "shape_of_experts", "weighted_sums"]


class NotHeld(Exception):
    """A placement or a part that is not here; says what is."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What a model's experts have in common."""

    hidden_size: int
    expert_width: int
    num_experts: int
    layers: tuple[int, ...]
    """Those that have experts, by their numbers in the model."""
    groups: int = 1
    """Of the router, if it limits the choice to groups of experts."""

    def message(self) -> pb.ExpertShape:
        """As shards and engines tell each other."""
        return pb.ExpertShape(
            hidden_size=self.hidden_size,
            expert_width=self.expert_width,
            num_experts=self.num_experts,
            layers=self.layers,
        )


def shape_of_experts(config: ModelConfig) -> ExpertShape:
    """The shape of the experts of a model with this configuration.

    Raises:
        ModelError: It has none, or not the same in all layers.
    """
    mixtures = mixtures_of(build(config, device="meta"))
    shapes = {
        (mixture.router.groups, *mixture.experts.get_parameter("down_proj").shape)
        for mixture in mixtures.values()
    }
    if len(shapes) != 1:
        found = "no layer with experts" if not shapes else "layers whose experts differ in number or width"
        raise ModelError(f"{config.architecture}: has {found}; only models with experts can be sharded")
    ((groups, experts, hidden, width),) = shapes
    return ExpertShape(hidden, width, experts, tuple(mixtures), groups)


class Held:
    """The experts of one part, of all layers."""

    def __init__(self, first: int, layers: Mapping[int, Experts | ReorderedExperts]) -> None:
        """``first`` is the number of the part's first expert."""
        self.first, self.layers = first, dict(layers)

    @property
    def num_experts(self) -> int:
        """Of one layer."""
        return next(experts.count for experts in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return sum(experts.nbytes for experts in self.layers.values())


@torch.inference_mode()
def weighted_sums(
    experts: Experts | ReorderedExperts, slots_TK: Tensor, weights_TK: Tensor, rows_TD: Tensor
) -> Tensor:
    """What some experts make of rows, weighted and added up: (T, D), in the experts' number format.

    A row's sum does not depend on the other rows (:mod:`unmask.models.row_tiles`).

    Args:
        experts: E of them.
        slots_TK: Any integers: which of them each choice is; what is not 0 to E - 1 is an expert of others.
        weights_TK: How much each choice counts.
        rows_TD: Hidden states; like the others on any device.
    """
    device = experts.device
    slots_TK, weights_TK, rows_TD = (given.to(device) for given in (slots_TK, weights_TK, rows_TD))
    num_experts, choices = experts.count, slots_TK.shape[1]
    chosen_N = slots_TK.flatten().to(torch.int64)
    absent_N = (chosen_N < 0) | (chosen_N >= num_experts)
    chosen_N = chosen_N.masked_fill(absent_N, num_experts)  # behind all others
    order_N = torch.argsort(chosen_N, stable=True)
    counts_E = torch.bincount(chosen_N, minlength=num_experts + 1)[:num_experts]
    rows_TD = rows_TD.to(experts.dtype)
    here = int(counts_E.sum())
    if here == 0:
        return torch.zeros_like(rows_TD)
    order_N = order_N[:here]
    token_N = order_N.div(choices, rounding_mode="floor")
    return experts.of_copies(rows_TD, token_N, weights_TK.flatten()[order_N], counts_E)


class Holding:
    """Parts of placements, by epoch. Any thread may ask; one at a time loads.

    Attributes:
        path: The model's folder.
        shape: Of its experts.
        revision: SHA-256 over its weight files.
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        """Open the model in ``path`` and load nothing.

        Raises:
            ModelError: The folder, or one of its files, is not as it should be.
        """
        self.path = path
        self._device = torch.device(device)
        with Checkpoint(path) as checkpoint:
            self.shape = shape_of_experts(checkpoint.config)
            self.revision = digest_of(checkpoint)
            matching_slots(checkpoint)
        self._loading = threading.Lock()
        self._activations = torch.zeros(self.shape.num_experts, dtype=torch.int64)
        self._placements: dict[int, tuple[Bounds, dict[int, Held]]] = {}
        """Replaced as a whole, so that whoever reads it needs no lock."""

    @property
    def placements(self) -> dict[int, HeldParts]:
        """What is held, by epoch."""
        return {
            epoch: HeldParts(bounds, frozenset(parts)) for epoch, (bounds, parts) in self._placements.items()
        }

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        parts = {id(held): held for _, parts in self._placements.values() for held in parts.values()}
        return sum(held.nbytes for held in parts.values())

    @property
    def activations(self) -> list[int]:
        """For each expert, over all layers: in how many frames it was used."""
        return self._activations.tolist()

    def note(self, held: "Held", slots_TK: Tensor) -> None:
        """Count the experts of a part that a frame uses; to be called by one thread at a time."""
        rows_E = torch.bincount(slots_TK.flatten().to(torch.int64) + 1, minlength=held.num_experts + 1)[1:]
        self._activations[held.first : held.first + held.num_experts] += rows_E > 0

    def find(self, epoch: int, part: int) -> Held:
        """A part that is held.

        Raises:
            NotHeld: It is not.
        """
        placement = self._placements.get(epoch)
        if placement is None:
            raise NotHeld(f"epoch: got {epoch}, held are {sorted(self._placements)}")
        held = placement[1].get(part)
        if held is None:
            raise NotHeld(f"part: got {part}, of epoch {epoch} held are {sorted(placement[1])}")
        return held

    def load(self, epoch: int, bounds: Iterable[int], parts: Iterable[int]) -> None:
        """Hold parts of a placement as well; returns when they are there.

        Raises:
            UsageError: They are no parts of the placement, or the epoch has other bounds already.
            ModelError: The folder has changed, or its weights cannot be read.
        """
        cut = check_bounds(tuple(bounds), self.shape.num_experts)
        wanted = sorted(set(parts))
        if epoch < 1 or not wanted or not set(wanted) <= set(range(len(cut) - 1)):
            raise UsageError(
                f"placement: got epoch {epoch} with parts {wanted[:20]}, epochs begin at 1 and parts are "
                f"0 to {len(cut) - 2}"
            )
        with self._loading:
            known, held = self._placements.get(epoch, (cut, {}))
            if known != cut:
                raise UsageError(
                    f"epoch: {epoch} has the bounds {list(known)} here; give other bounds another epoch"
                )
            new = {part: self._read(cut[part], cut[part + 1]) for part in wanted if part not in held}
            self._placements = {**self._placements, epoch: (cut, {**held, **new})}

    def unload(self, epochs: Iterable[int]) -> None:
        """Let placements go; unknown ones are passed over."""
        gone = set(epochs)
        with self._loading:
            self._placements = {
                epoch: placement for epoch, placement in self._placements.items() if epoch not in gone
            }

    def _read(self, first: int, stop: int) -> Held:
        """The experts ``first`` up to ``stop`` of all layers, from another placement or from the files."""
        for bounds, parts in self._placements.values():
            for part, held in parts.items():
                if (bounds[part], bounds[part + 1]) == (first, stop):
                    return held
        with Checkpoint(self.path) as checkpoint:
            if digest_of(checkpoint) != self.revision:
                raise ModelError(f"{self.path}: the weights are others than when the shard began; restart it")
            slots = [slot for slot in matching_slots(checkpoint) if slot.expert in range(first, stop)]
            dtype = DTYPES[checkpoint.tensors[slots[0].name].dtype]
            if can_reorder(self._device, dtype):
                return Held(first, self._reordered(checkpoint, slots, first, stop))
            layers = self._empty(stop - first, dtype)
            state = {
                f"layers.{layer}.feed_forward.experts.{name}": parameter.detach()
                for layer, experts in layers.items()
                for name, parameter in experts.named_parameters()
            }
            for slot in slots:
                own = Slot(slot.name, slot.parameter, slot.shape, _moved(slot, first))
                copy_tensor(checkpoint, slot.name, own.view(state).view(-1))
        return Held(first, layers)

    def _reordered(
        self, checkpoint: Checkpoint, slots: Iterable[Slot], first: int, stop: int
    ) -> dict[int, ReorderedExperts]:
        """The experts of each layer, laid out for oneDNN as their tensors are read."""
        layers = {
            layer: ReorderedExperts(stop - first, self.shape.hidden_size, self.shape.expert_width)
            for layer in self.shape.layers
        }
        named = {f"layers.{layer}.feed_forward.experts": experts for layer, experts in layers.items()}
        values: dict[tuple[int, ...], Tensor] = {}
        for slot in slots:
            # The same memory for all of a shape: what is let go between weights that stay, is lost there.
            if slot.shape not in values:
                values[slot.shape] = torch.empty(slot.shape)
            value = values[slot.shape]
            copy_tensor(checkpoint, slot.name, value.view(-1))
            module, _, parameter = slot.parameter.rpartition(".")
            named[module].put(parameter, _moved(slot, first), value)
        assert all(experts.is_complete for experts in layers.values())
        return layers

    def _empty(self, experts: int, dtype: torch.dtype) -> dict[int, Experts]:
        """Experts of each layer, whose weights are not set."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self._device:
                return {
                    layer: Experts(experts, self.shape.hidden_size, self.shape.expert_width).requires_grad_(
                        False
                    )
                    for layer in self.shape.layers
                }
        finally:
            torch.set_default_dtype(before)


def _moved(slot: Slot, first: int) -> tuple[int | slice, ...]:
    """The place of an expert's tensor where ``first`` is the first of the stack."""
    expert, *rest = slot.index
    assert isinstance(expert, int)
    return (expert - first, *rest)
