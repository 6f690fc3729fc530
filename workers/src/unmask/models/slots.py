"""A slot: one tensor of a published checkpoint and the part of a module's state that it fills.

A family's ``weights`` module lists its slots once; loading and saving both walk that
list, one tensor at a time, so neither direction can drift from the other and neither
needs a second copy of the model in memory. Parts that several families name alike are
listed by the functions here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unmask.models.config import ModelConfig

if TYPE_CHECKING:  # a list of what is on disk needs no torch
    from torch import Tensor

__all__ = [
    "Slot",
    "attention_slots",
    "decoder_slots",
    "expert_slots",
    "feed_forward_slots",
    "softmax_expert_slots",
]


@dataclass(frozen=True, slots=True)
class Slot:
    """One published tensor."""

    name: str
    """On disk."""
    parameter: str
    """Parameter or buffer of the module, as ``state_dict`` names it."""
    shape: tuple[int, ...]
    """Of the tensor on disk."""
    index: tuple[int | slice, ...] = ()
    """The part of ``parameter`` that the tensor fills; empty for all of it."""

    @property
    def expert(self) -> int | None:
        """The number of the routed expert that it is part of; None if of none."""
        if not self.parameter.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            return None
        number = self.index[0]
        assert isinstance(number, int), f"{self.name}: experts are stacked on dimension 0"
        return number

    def view(self, state: "dict[str, Tensor]") -> "Tensor":
        """The part of ``state`` that the tensor fills, sharing its storage."""
        parameter = state[self.parameter]
        return parameter[self.index] if self.index else parameter


def attention_slots(
    name: str, parameter: str, *, hidden: int, heads: int, kv_heads: int, head_dim: int
) -> Iterator[Slot]:
    """``q_proj``, ``k_proj``, ``v_proj`` (rows of one fused projection in memory) and ``o_proj``."""
    first = 0
    for letter, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        rows = slice(first, first + count * head_dim)
        shape = (count * head_dim, hidden)
        yield Slot(f"{name}.{letter}_proj.weight", f"{parameter}.query_key_value.weight", shape, (rows,))
        first = rows.stop
    yield Slot(f"{name}.o_proj.weight", f"{parameter}.output.weight", (hidden, heads * head_dim))


def feed_forward_slots(name: str, parameter: str, *, hidden: int, width: int) -> Iterator[Slot]:
    """``gate_proj``, ``up_proj`` and ``down_proj`` of a dense feed-forward."""
    yield Slot(f"{name}.gate_proj.weight", f"{parameter}.gate_proj.weight", (width, hidden))
    yield Slot(f"{name}.up_proj.weight", f"{parameter}.up_proj.weight", (width, hidden))
    yield Slot(f"{name}.down_proj.weight", f"{parameter}.down_proj.weight", (hidden, width))


def expert_slots(name: str, parameter: str, *, experts: int, hidden: int, width: int) -> Iterator[Slot]:
    """The same for each of the experts that are stacked in ``parameter``, one published tensor each."""
    gate_up, down = f"{parameter}.gate_up_proj", f"{parameter}.down_proj"
    for expert in range(experts):
        at = f"{name}.{expert}"
        yield Slot(f"{at}.gate_proj.weight", gate_up, (width, hidden), (expert, slice(0, width)))
        yield Slot(f"{at}.up_proj.weight", gate_up, (width, hidden), (expert, slice(width, 2 * width)))
        yield Slot(f"{at}.down_proj.weight", down, (hidden, width), (expert,))


def decoder_slots(
    config: ModelConfig,
    feed_forward: Callable[[str, str], Iterator[Slot]],
    *,
    norm_widths: tuple[int, int] | None,
    tied_output: bool,
) -> Iterator[Slot]:
    """A whole checkpoint in the naming of Llama and its kin.

    Args:
        config: The widths.
        feed_forward: The slots of one layer's feed-forward, from its published and own names.
        norm_widths: Of the norms on queries and on keys, if there are any.
        tied_output: Whether the embedding is the output layer, which then is not on disk.
    """
    hidden = config.hidden_size
    yield Slot("model.embed_tokens.weight", "embedding.weight", (config.vocab_size, hidden))
    for index in range(config.num_hidden_layers):
        name, layer = f"model.layers.{index}", f"layers.{index}"
        yield Slot(f"{name}.input_layernorm.weight", f"{layer}.attention_norm.weight", (hidden,))
        yield from attention_slots(
            f"{name}.self_attn",
            f"{layer}.attention",
            hidden=hidden,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        for letter, part, width in zip("qk", ("query", "key"), norm_widths or (), strict=False):
            norm = f"{layer}.attention.{part}_norm.weight"
            yield Slot(f"{name}.self_attn.{letter}_norm.weight", norm, (width,))
        yield Slot(f"{name}.post_attention_layernorm.weight", f"{layer}.feed_forward_norm.weight", (hidden,))
        yield from feed_forward(f"{name}.mlp", f"{layer}.feed_forward")
    yield Slot("model.norm.weight", "norm.weight", (hidden,))
    if not tied_output:
        yield Slot("lm_head.weight", "head.weight", (config.vocab_size, hidden))


def softmax_expert_slots(
    name: str, parameter: str, *, experts: int, hidden: int, width: int
) -> Iterator[Slot]:
    """A router ``gate`` and its ``experts``, without shared ones."""
    yield Slot(f"{name}.gate.weight", f"{parameter}.router.weight", (experts, hidden))
    yield from expert_slots(
        f"{name}.experts", f"{parameter}.experts", experts=experts, hidden=hidden, width=width
    )
