"""Which published tensor lives where in the module: LLaDA2.0's names, one tensor per expert."""

from collections.abc import Iterator

from unmask.models.llada2_moe.config import LLaDA2MoeConfig
from unmask.models.slots import Slot, expert_slots, feed_forward_slots

__all__ = ["is_ignored", "slots"]


def slots(config: LLaDA2MoeConfig) -> Iterator[Slot]:
    """Every tensor of the published checkpoint, in the order of the forward."""
    hidden = config.hidden_size
    yield Slot("model.word_embeddings.weight", "embedding.weight", (config.vocab_size, hidden))
    for index in range(config.num_hidden_layers):
        name, layer = f"model.layers.{index}", f"layers.{index}"
        yield Slot(f"{name}.input_layernorm.weight", f"{layer}.attention_norm.weight", (hidden,))
        yield from _attention(f"{name}.attention", f"{layer}.attention", config)
        yield Slot(f"{name}.post_attention_layernorm.weight", f"{layer}.feed_forward_norm.weight", (hidden,))
        if config.is_dense(index):
            width = config.intermediate_size
            yield from feed_forward_slots(f"{name}.mlp", f"{layer}.feed_forward", hidden=hidden, width=width)
        else:
            yield from _mixture_of_experts(f"{name}.mlp", f"{layer}.feed_forward", config)
    yield Slot("model.norm.weight", "norm.weight", (hidden,))
    yield Slot("lm_head.weight", "head.weight", (config.vocab_size, hidden))


def is_ignored(name: str, config: LLaDA2MoeConfig) -> bool:
    """Whether a published tensor is left out on purpose: none is."""
    return False


def _attention(name: str, parameter: str, config: LLaDA2MoeConfig) -> Iterator[Slot]:
    hidden, size = config.hidden_size, config.head_dim
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * size
    yield Slot(f"{name}.query_key_value.weight", f"{parameter}.query_key_value.weight", (rows, hidden))
    yield Slot(f"{name}.query_layernorm.weight", f"{parameter}.query_norm.weight", (size,))
    yield Slot(f"{name}.key_layernorm.weight", f"{parameter}.key_norm.weight", (size,))
    yield Slot(
        f"{name}.dense.weight", f"{parameter}.output.weight", (hidden, config.num_attention_heads * size)
    )


def _mixture_of_experts(name: str, parameter: str, config: LLaDA2MoeConfig) -> Iterator[Slot]:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    yield Slot(f"{name}.gate.weight", f"{parameter}.router.weight", (experts, hidden))
    yield Slot(f"{name}.gate.expert_bias", f"{parameter}.router.expert_bias", (experts,))
    yield from expert_slots(
        f"{name}.experts", f"{parameter}.experts", experts=experts, hidden=hidden, width=width
    )
    if config.num_shared_experts:
        shared = width * config.num_shared_experts
        yield from feed_forward_slots(
            f"{name}.shared_experts", f"{parameter}.shared_experts", hidden=hidden, width=shared
        )
