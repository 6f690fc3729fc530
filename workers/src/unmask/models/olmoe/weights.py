"""Which published tensor lives where in the module: OLMoE's names, one tensor per expert."""

from collections.abc import Iterator

from unmask.models.olmoe.config import OlmoeConfig
from unmask.models.slots import Slot, decoder_slots, softmax_expert_slots

__all__ = ["is_ignored", "slots"]


def slots(config: OlmoeConfig) -> Iterator[Slot]:
    """Every tensor of the published checkpoint, in the order of the forward."""

    def feed_forward(name: str, parameter: str) -> Iterator[Slot]:
        hidden, width = config.hidden_size, config.intermediate_size
        return softmax_expert_slots(name, parameter, experts=config.num_experts, hidden=hidden, width=width)

    return decoder_slots(
        config,
        feed_forward,
        norm_widths=(
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        ),
        tied_output=config.tie_word_embeddings,
    )


def is_ignored(name: str, config: OlmoeConfig) -> bool:
    """Whether a tensor is left out on purpose: an output layer that is tied to the embedding."""
    return config.tie_word_embeddings and name == "lm_head.weight"
