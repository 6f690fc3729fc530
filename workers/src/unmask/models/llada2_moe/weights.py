"""Which published tensor lives where in the module: LLaDA2.0's names, one tensor per expert."""

from collections.abc import Iterator

from unmask.models.llada2_moe.config import LLaDA2MoeConfig
from unmask.models.slots import Slot

__all__ = ["is_ignored", "slots"]


def slots(config: LLaDA2MoeConfig) -> Iterator[Slot]:
    """Every tensor of the published checkpoint, in the order of the forward."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    yield Slot.whole("model.word_embeddings.weight", (config.vocab_size, hidden))
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}"
        yield Slot.whole(f"{at}.input_layernorm.weight", (hidden,))
        yield Slot.whole(
            f"{at}.attention.query_key_value.weight", ((heads + 2 * kv_heads) * config.head_dim, hidden)
        )
        yield Slot.whole(f"{at}.attention.query_layernorm.weight", (config.head_dim,))
        yield Slot.whole(f"{at}.attention.key_layernorm.weight", (config.head_dim,))
        yield Slot.whole(f"{at}.attention.dense.weight", (hidden, heads * config.head_dim))
        yield Slot.whole(f"{at}.post_attention_layernorm.weight", (hidden,))
        if config.is_dense(index):
            yield from _feed_forward(f"{at}.mlp", hidden, config.intermediate_size)
        else:
            yield from _mixture_of_experts(f"{at}.mlp", config)
    yield Slot.whole("model.norm.weight", (hidden,))
    yield Slot.whole("lm_head.weight", (config.vocab_size, hidden))


def _feed_forward(at: str, hidden: int, width: int) -> Iterator[Slot]:
    yield Slot.whole(f"{at}.gate_proj.weight", (width, hidden))
    yield Slot.whole(f"{at}.up_proj.weight", (width, hidden))
    yield Slot.whole(f"{at}.down_proj.weight", (hidden, width))


def _mixture_of_experts(at: str, config: LLaDA2MoeConfig) -> Iterator[Slot]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    yield Slot.whole(f"{at}.gate.weight", (config.num_experts, hidden))
    yield Slot.whole(f"{at}.gate.expert_bias", (config.num_experts,))
    gate_up, down = f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj"
    for expert in range(config.num_experts):
        name = f"{at}.experts.{expert}"
        yield Slot(f"{name}.gate_proj.weight", gate_up, (expert, slice(0, width)), (width, hidden))
        yield Slot(f"{name}.up_proj.weight", gate_up, (expert, slice(width, 2 * width)), (width, hidden))
        yield Slot(f"{name}.down_proj.weight", down, (expert,), (hidden, width))
    if config.num_shared_experts:
        yield from _feed_forward(f"{at}.shared_experts", hidden, width * config.num_shared_experts)


def is_ignored(name: str, config: LLaDA2MoeConfig) -> bool:
    """Whether a published tensor is left out on purpose: none is."""
    return False
