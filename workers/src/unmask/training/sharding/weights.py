"""Weights of which every process holds a part: FSDP2 around each layer, experts spread beside it.

A layer's parameters are gathered when it computes and freed after; gradients are added
up into the parts as soon as a layer's backward pass is done. Our loss is divided once, by
the predicted tokens of the whole step, so gradients are added and never averaged: every
divisor of FSDP2 is set to 1. What is stored and optimised is float32; with precision
``bf16`` layers are gathered in bfloat16, except routers, and gradients are added up in
float32.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from unmask.attention import AttentionMetadata
from unmask.models import loading
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.moe import MixtureOfExperts
from unmask.models.slots import Slot
from unmask.models.transformer import Layer
from unmask.training.boxes import Box, copy_overlap, region
from unmask.training.distributed import World
from unmask.training.sharding.experts import SpreadExperts
from unmask.training.sharding.plan import ShardingPlan, expert_dimension
from unmask.training.sharding.recomputation import recompute_layers
from unmask.training.weights import Weights

__all__ = ["ShardedWeights", "part_of"]


class ShardedWeights(Weights):
    """Parameters of which this process holds a part, and their gradient."""

    shared_out = True

    def __init__(
        self,
        config: ModelConfig,
        world: World,
        plan: ShardingPlan,
        *,
        precision: str,
        recompute: bool = False,
    ) -> None:
        """A model of ``config`` whose values are still to be filled in; all processes do this together."""
        self.leads, self._world, self._plan = world.leads, world, plan
        self._precision, self._recompute = precision, recompute
        model = loading.build(config, device="meta")
        _shard(model, world, plan, bf16=precision == "bf16")
        model.to_empty(device=world.device)
        for buffer in model.buffers():
            buffer.zero_()
        if precision == "bf16":
            model.computing_dtype = torch.bfloat16
        if recompute:
            recompute_layers(model)
        assert isinstance(model, FSDPModule)
        model.unshard()  # settles where the parts lie, which padding of uneven ones may move
        model.reshard()
        self.model = self.computing = model.train()
        self._boxes = {name: self._box(value) for name, value in model.state_dict().items()}
        self.named = {name: self._boxes[name].tensor for name, _ in model.named_parameters()}
        self._place_gradient()

    def collect(self) -> None:
        """Nothing to do: backward passes add to the parts' gradients themselves."""

    def sum_gradient(self, world: World) -> None:
        """Nothing to do: backward passes add up over processes themselves."""

    def norm(self) -> float:
        """The norm of the whole gradient; every process gets the same."""
        square = torch.linalg.vector_norm(self.gradient).double().square().reshape(1)
        self._world.sum(square)  # each part is in as many processes as there are replicas
        return float((square / self._plan.replicas).sqrt())

    @torch.no_grad()
    def changed(self) -> None:
        """See :meth:`Weights.changed`."""
        self.gradient.zero_()
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # a measurement leaves the outermost parameters gathered

    def boxes(self) -> Iterator[tuple[str, Box]]:
        """See :meth:`Weights.boxes`."""
        yield from self._boxes.items()

    @torch.no_grad()
    def fill(self, values: Iterable[tuple[Slot, Tensor]]) -> None:
        """See :meth:`Weights.fill`; this process takes its part of each."""
        for slot, value in values:
            offsets, shape = region(slot, self._boxes[slot.parameter].shape)
            copy_overlap(value.to(self._world.device).view(shape), offsets, self._boxes[slot.parameter])
        self.changed()

    def recast(self, config: ModelConfig) -> "ShardedWeights":
        """See :meth:`Weights.recast`; needs memory for both for a moment."""
        other = ShardedWeights(
            config, self._world, self._plan, precision=self._precision, recompute=self._recompute
        )
        with torch.no_grad():
            for name, box in other.boxes():
                box.tensor.copy_(self._boxes[name].tensor)
        other.changed()
        return other

    def frozen(self) -> LanguageModel:
        """The model, without gradients from now on; these weights are not to be used any more."""
        for parameter, part in zip(self.model.parameters(), self.named.values(), strict=True):
            parameter.grad = part.grad = None
        self.gradient = torch.zeros(0)
        return self.model.requires_grad_(False).eval()

    def export(self, path: Path, *, companions: Mapping[str, bytes]) -> None:
        """See :meth:`Weights.export`; all processes do this together, and hold one tensor at a time."""
        gathered = self._gathered(loading.slots_of(self.model.config))
        try:
            if self.leads:
                loading.save_parts(
                    self.model.config,
                    path,
                    lambda slot: next(gathered),
                    dtypes=lambda slot: self._boxes[slot.parameter].tensor.dtype,
                    companions=companions,
                )
        finally:  # the others wait for every sum, even if the leader cannot write
            for _ in gathered:
                pass

    @contextmanager
    def unequal(self, *followers: LanguageModel) -> Iterator[None]:
        """See :meth:`Weights.unequal`: who is done keeps gathering layers until all are.

        Before each forward the processes tell each other whether any still computes.
        """
        run = self.model.hidden

        def announced(*arguments: Any, **options: Any) -> Tensor:
            self._anyone(True)
            return run(*arguments, **options)

        self.model.hidden = announced  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.model.hidden = run  # type: ignore[method-assign]
        nothing = torch.zeros((1, 1), dtype=torch.int64, device=self._world.device)
        with torch.no_grad():
            while self._anyone(False):
                for forward in (run, *(follower.hidden for follower in followers)):
                    forward(nothing, AttentionMetadata.causal(nothing, nothing))

    def _anyone(self, computes: bool) -> bool:
        number = torch.tensor([int(computes)], device=self._world.device)
        self._world.sum(number)
        return bool(number)

    def _gathered(self, slots: Iterable[Slot]) -> Iterator[Tensor]:
        """Each published tensor, put together from the parts of all processes, on the CPU."""
        for slot in slots:
            box = self._boxes[slot.parameter]
            offsets, shape = region(slot, box.shape)
            whole = torch.zeros(shape, dtype=box.tensor.dtype, device=self._world.device)
            if box.kept:
                copy_overlap(box.tensor, box.offsets, Box(whole, box.shape, offsets))
            # As whole numbers: nothing but zeros is added to any place, and -0.0 + 0.0 would lose its sign.
            self._world.sum(whole.view(torch.int32))
            yield whole.view(slot.shape).cpu()

    def _box(self, value: Tensor) -> Box:
        if not isinstance(value, DTensor):
            return Box.whole(value, kept=self.leads)
        coordinate = value.device_mesh.get_coordinate()
        assert coordinate is not None, "every process is in the mesh"
        offsets, _, kept = part_of(
            tuple(value.shape), tuple(value.device_mesh.shape), tuple(coordinate), value.placements
        )
        with torch.no_grad():
            part = value.to_local().detach()
        return Box(part, tuple(value.shape), offsets, kept)

    def _place_gradient(self) -> None:
        """One buffer for the gradients of all parts, into which FSDP2 adds."""
        parts = list(self.named.values())
        self.gradient = torch.zeros(sum(part.numel() for part in parts), device=self._world.device)
        views = self.gradient.split([part.numel() for part in parts])
        for parameter, part, view in zip(self.model.parameters(), parts, views, strict=True):
            assert isinstance(parameter, DTensor)
            part.grad = view.view_as(part)
            parameter.grad = DTensor.from_local(
                part.grad,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )


def part_of(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Iterable[Any]
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Offsets and shape of the part at ``coordinate``, and whether it is the first of its copies.

    Each ``Shard(d)`` cuts dimension d into pieces of the same size, rounded up; the last ones may be
    smaller or empty.
    """
    offsets, sizes, first = [0] * len(shape), list(shape), True
    for number, at, placement in zip(mesh, coordinate, placements, strict=True):
        if isinstance(placement, Replicate):
            first = first and at == 0
            continue
        assert type(placement) is Shard, "no dimension is cut twice"
        size = sizes[placement.dim]
        each = -(-size // number)
        start = min(at * each, size)
        offsets[placement.dim] += start
        sizes[placement.dim] = min(each, size - start)
    return tuple(offsets), tuple(sizes), first


def _shard(model: LanguageModel, world: World, plan: ShardingPlan, *, bf16: bool) -> None:
    """Wrap layers, and the rest as one; call on the meta device."""
    device = world.device.type
    own_type = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = own_type
    if bf16:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    within = plan.parts * plan.experts
    whole = init_device_mesh(device, (plan.replicas, within), mesh_dim_names=("replica", "part"))
    dense = whole if plan.replicas > 1 else whole["part"]
    spread = None
    if plan.experts > 1:
        spread = init_device_mesh(
            device,
            (plan.replicas, plan.parts, plan.experts),
            mesh_dim_names=("replica", "part", "expert"),
        )
    for layer in [module for module in model.modules() if isinstance(module, Layer)]:
        experts = layer.feed_forward
        if isinstance(experts, MixtureOfExperts):
            if spread is not None:
                experts.experts = _spread(experts, spread, plan, policy)
            if bf16:
                _wrap(experts.router, dense, own_type)
        _wrap(layer, dense, policy)
    _wrap(model, dense, policy)
    register_fsdp_forward_method(model, "hidden")


def _spread(
    layer: MixtureOfExperts, mesh: DeviceMesh, plan: ShardingPlan, policy: MixedPrecisionPolicy
) -> SpreadExperts:
    experts = SpreadExperts(layer.experts, mesh["expert"])

    def cut(parameter: nn.Parameter) -> Shard:
        return Shard(expert_dimension(tuple(parameter.shape), plan.parts))

    outer = mesh["replica", "part"] if plan.replicas > 1 else mesh["part"]
    _wrap(experts, outer, policy, shard_placement_fn=cut)
    return experts


def _wrap(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, **options: Any) -> None:
    wrapped = fully_shard(module, mesh=mesh, mp_policy=policy, **options)
    wrapped.set_gradient_divide_factor(1.0)
    wrapped.set_force_sum_reduction_for_comms(True)
