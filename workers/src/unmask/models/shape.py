"""A model in the few numbers that its arithmetic and its memory follow from.

They are read off the list of its weights, which every family has, so a new family needs nothing here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from unmask.models.checkpoint_files import slots_of
from unmask.models.config import ModelConfig
from unmask.models.slots import Slot
from unmask_api.train_job import LoRA

__all__ = ["LayerShape", "ModelShape", "Stored", "adapters_of", "shape_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One parameter as the module has it: a layer's experts are one, and so are queries, keys and values."""

    rows: int
    """Its first dimension."""
    count: int
    """Weights in it."""
    expert: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One layer; counts of weights."""

    attention: int
    """Of the projections of attention."""
    norms: int
    dense: int
    """Of the feed-forward that every token passes: a dense layer's, or the shared experts'."""
    dense_width: int
    """Inner width of that; 0 where there is none."""
    router: int
    experts: int
    """Of all routed experts; 0 in a dense layer."""
    expert_width: int
    num_experts: int
    chosen: int
    """Experts per token."""
    groups: int
    """Of experts, of which a token has some to choose from; 1: it chooses from all."""
    chosen_groups: int
    biased: bool
    """Whether the router has a bias, which is no weight."""
    query_key_norm: bool
    stacks: tuple[tuple[int, int, int], ...]
    """Shapes of the stacked experts: gate and up, and down; none in a dense layer."""

    @property
    def parameters(self) -> int:
        """Everything that is learnt."""
        return self.attention + self.norms + self.dense + self.router + self.experts

    @property
    def shared_by_all(self) -> int:
        """What is not in a routed expert."""
        return self.parameters - self.experts

    @property
    def multiplied(self) -> int:
        """Weights that one token is multiplied with; experts divide evenly by construction."""
        used = self.experts * self.chosen // self.num_experts if self.experts else 0
        return self.attention + self.dense + self.router + used


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model; counts of weights, widths in numbers."""

    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerShape, ...]
    embedding: int
    head: int
    """Of the output layer; 0 where the embedding is that."""
    norm: int
    stored: tuple[Stored, ...]
    """Its parameters as the module has them."""

    @property
    def parameters(self) -> int:
        """Everything that is learnt."""
        return self.embedding + self.head + self.norm + sum(layer.parameters for layer in self.layers)

    @property
    def ends(self) -> int:
        """Weights before and behind the layers."""
        return self.embedding + self.head + self.norm

    @property
    def routers(self) -> int:
        """Weights of all routers, which stay in float32."""
        return sum(layer.router for layer in self.layers)


@lru_cache(maxsize=64)  # a large model is tens of thousands of tensors on disk
def adapters_of(shape: ModelShape, lora: LoRA) -> tuple[int, int]:
    """Weights of all adapters that ``lora`` puts beside a model of ``shape``, and their number of tensors."""
    D, q, k = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    count = tensors = 0
    for layer in shape.layers:
        if "attention" in lora.targets:
            count += lora.rank * ((D + q + 2 * k) + (q + D))
            tensors += 4
        if "feedForward" in lora.targets and layer.dense_width:
            count += lora.rank * 3 * (D + layer.dense_width)
            tensors += 6
    return count, tensors


def shape_of(config: ModelConfig) -> ModelShape:
    """Sum ``config`` up.

    Raises:
        ModelError: It describes more tensors than any model has.
    """
    slots = slots_of(config)
    sizes: dict[str, int] = {}
    rows: dict[str, int] = {}
    for slot in slots:
        if not _is_bias(slot.parameter):
            sizes[slot.parameter] = sizes.get(slot.parameter, 0) + math.prod(slot.shape)
            rows[slot.parameter] = max(rows.get(slot.parameter, 0), _end(slot))
    inner = (slot for slot in slots if slot.parameter.startswith("layers."))
    layers = groupby(inner, key=lambda slot: slot.parameter.split(".")[1])
    # What all families with experts call them; dense families have neither key.
    extra = config.to_json_dict()
    grouped = "n_group" in type(config).model_fields  # a key that the family does not read means nothing
    groups = (extra["n_group"], extra["topk_group"]) if grouped else (1, 1)
    return ModelShape(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layers=tuple(
            _layer(
                list(group),
                num_experts=extra.get("num_experts", 0),
                chosen=extra.get("num_experts_per_tok", 0),
                groups=groups,
            )
            for _, group in layers
        ),
        embedding=sizes["embedding.weight"],
        head=sizes.get("head.weight", 0),
        norm=sizes["norm.weight"],
        stored=tuple(
            Stored(rows=rows[name], count=count, expert=".experts." in name) for name, count in sizes.items()
        ),
    )


def _layer(slots: list[Slot], *, num_experts: int, chosen: int, groups: tuple[int, int]) -> LayerShape:
    parts = [(slot.parameter.split(".", 2)[2], slot) for slot in slots]
    experts = [slot for name, slot in parts if ".experts." in name]
    dense = [
        slot
        for name, slot in parts
        if name.startswith("feed_forward.") and len(slot.shape) == 2 and name.split(".")[1] not in _ROUTED
    ]
    return LayerShape(
        attention=_count(slot for name, slot in parts if name.startswith("attention.") and _is_matrix(slot)),
        norms=_count(slot for name, slot in parts if len(slot.shape) == 1 and not _is_bias(name)),
        dense=_count(dense),
        dense_width=next((slot.shape[0] for slot in dense if "gate_proj" in slot.parameter), 0),
        router=_count(slot for name, slot in parts if name.endswith("router.weight")),
        experts=_count(experts),
        expert_width=experts[0].shape[0] if experts else 0,
        num_experts=num_experts if experts else 0,
        chosen=chosen if experts else 0,
        groups=groups[0] if experts else 1,
        chosen_groups=groups[1] if experts else 1,
        biased=any(_is_bias(name) for name, _ in parts),
        stacks=_stacks(experts[0], num_experts) if experts else (),
        query_key_norm=any("query_norm" in name for name, _ in parts),
    )


def _stacks(gate: Slot, number: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """From the gate of one expert, (I, D)."""
    width, hidden = gate.shape
    return (number, 2 * width, hidden), (number, hidden, width)


def _end(slot: Slot) -> int:
    """Behind the last row of its parameter that a tensor fills."""
    if not slot.index:
        return slot.shape[0]
    first = slot.index[0]
    return first + 1 if isinstance(first, int) else int(first.stop)


_ROUTED = ("experts", "router")


def _is_bias(name: str) -> bool:
    return name.endswith("expert_bias")


def _is_matrix(slot: Slot) -> bool:
    return len(slot.shape) == 2


def _count(slots: Iterable[Slot]) -> int:
    return sum(math.prod(slot.shape) for slot in slots)
