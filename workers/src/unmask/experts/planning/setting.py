"""What is served, how, and how much memory that takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, TypeAlias

from unmask.errors import UsageError
from unmask.experts.placement import Bounds, even_bounds, held_by
from unmask.experts.planning.choices import Choice
from unmask.experts.planning.constants import Constants, Machine
from unmask.models.shape import LayerShape, ModelShape

__all__ = ["MOST_SHARDS", "ROUTER_ITEM", "NumberFormat", "Setting", "Work", "item_bytes"]

MOST_SHARDS = 64

ROUTER_ITEM = 4
"""Bytes of a router's weight: they stay in float32."""

NumberFormat: TypeAlias = Literal["float32", "bfloat16"]
_ITEM: Mapping[NumberFormat, int] = MappingProxyType({"float32": 4, "bfloat16": 2})


def item_bytes(name: NumberFormat) -> int:
    """Bytes of a number."""
    return _ITEM[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a forward has to do."""

    batch: int = 8
    """Requests in it, each with one block."""
    block_length: int = 32
    context: int = 1024
    """Positions of each request that are in the cache already."""
    tpf: float = 2.5
    """Tokens that a request keeps of a forward, on average; prefill left out."""
    masked: float | None = None
    """Share of the positions that are still masked, on average; None: what filling evenly makes it."""

    @property
    def tokens(self) -> int:
        """T: positions that go through every layer."""
        return self.batch * self.block_length

    @property
    def masked_share(self) -> float:
        """Share of the positions that the output layer is computed at: those that are masked.

        A block of B takes n = B / tpf forwards, before which B, B - tpf, ..., tpf of its positions are
        masked; their mean is (n + 1) / 2n of B.
        """
        if self.masked is not None:
            return self.masked
        return min(1.0, (1 + self.tpf / self.block_length) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model, how it is served, and what there is to do.

    Raises:
        UsageError: The model has no experts, or not the same in all layers that have some; the batch has
            fewer requests than micro-batches; or there are no constants of the transport.
    """

    shape: ModelShape
    work: Work
    constants: Constants
    transport: str = "grpc"
    weights_as: NumberFormat = "bfloat16"
    """What weights, keys and values are kept as."""
    rows_as: NumberFormat = "bfloat16"
    """What rows are sent as."""
    micro_batches: int = 1

    def __post_init__(self) -> None:
        """See the class."""
        kinds = {
            (layer.num_experts, layer.chosen, layer.groups, layer.chosen_groups, layer.experts)
            for layer in self.mixtures
        }
        if len(kinds) != 1:
            found = "layers whose experts differ" if kinds else "no layer with experts"
            raise UsageError(f"the model has {found}; only models with experts can be sharded")
        if not 1 <= self.micro_batches <= min(2, self.work.batch):
            raise UsageError(
                f"micro-batches: got {self.micro_batches} of a batch of {self.work.batch}, must be 1 or 2, "
                "with a request each at least"
            )
        if self.transport not in self.constants.transports:
            known = ", ".join(self.constants.transports)
            raise UsageError(f"transport: got {self.transport!r}, there are constants of {known}")

    @property
    def mixtures(self) -> list[LayerShape]:
        """The layers with experts."""
        return [layer for layer in self.shape.layers if layer.experts]

    @property
    def choice(self) -> Choice:
        """What a router chooses for a token."""
        layer = self.mixtures[0]
        return Choice(
            num_experts=layer.num_experts,
            chosen=layer.chosen,
            groups=layer.groups,
            chosen_groups=layer.chosen_groups,
        )

    @property
    def item(self) -> int:
        """Bytes of a weight."""
        return _ITEM[self.weights_as]

    @property
    def expert_weights(self) -> int:
        """Of one expert of one layer."""
        layer = self.mixtures[0]
        return layer.experts // layer.num_experts

    @property
    def expert_parameters(self) -> int:
        """Of all routed experts."""
        return sum(layer.experts for layer in self.mixtures)

    @property
    def parameters(self) -> int:
        """Of the model, biases of routers included."""
        return self.shape.parameters + self._biases

    @property
    def _biases(self) -> int:
        return sum(layer.num_experts for layer in self.shape.layers if layer.biased)

    @property
    def whole(self) -> Machine:
        """What computes the model without shards."""
        return self.constants.unsharded or self.constants.engine

    def bounds(self, shards: int) -> Bounds:
        """Which experts each part has.

        Raises:
            UsageError: There are more shards than experts, or than are planned for.
        """
        if not 1 <= shards <= MOST_SHARDS:
            raise UsageError(f"shards: got {shards}, must be 1 to {MOST_SHARDS}")
        return even_bounds(self.choice.num_experts, shards, groups=self.choice.groups)

    def cache_bytes(self, requests: float) -> float:
        """Keys and values of one layer that so many requests' blocks see, their own included."""
        seen = requests * (self.work.context + self.work.block_length)
        return seen * 2 * self.shape.kv_heads * self.shape.head_dim * self.item

    def shard_bytes(self, shards: int, *, replication: int = 1) -> int:
        """Memory of the shard that has most.

        Raises:
            UsageError: Numbers that do not go together.
        """
        sizes = [stop - first for first, stop in pairwise(self.bounds(shards))]
        most = max(
            sum(sizes[part] for part in held_by(shard, shards=shards, replication=replication))
            for shard in range(shards)
        )
        held = most * self.expert_weights * self.item * len(self.mixtures)
        return held + int(self.constants.shard.constant_bytes)

    def engine_bytes(self) -> int:
        """Memory of an engine beside shards: everything but routed experts, and the batch's cache."""
        return self._bytes(self.constants.engine, routed=0)

    def unsharded_bytes(self) -> int:
        """Memory of what serves the model as a whole."""
        return self._bytes(self.whole, routed=self.expert_parameters)

    def _bytes(self, machine: Machine, *, routed: int) -> int:
        shape = self.shape
        narrow = shape.parameters - self.expert_parameters - shape.routers + routed
        weights = narrow * self.item + (shape.routers + self._biases) * ROUTER_ITEM
        cache = int(self.cache_bytes(self.work.batch)) * len(shape.layers)
        return weights + cache + int(machine.constant_bytes)
