"""Which published tensor lives where in the module: Qwen3's names."""

from collections.abc import Iterator

from unmask.models.qwen3.config import Qwen3Config
from unmask.models.slots import Slot, decoder_slots, feed_forward_slots

__all__ = ["is_ignored", "slots"]


def slots(config: Qwen3Config) -> Iterator[Slot]:
    """Every tensor of the published checkpoint, in the order of the forward."""

    def feed_forward(name: str, parameter: str) -> Iterator[Slot]:
        hidden, width = config.hidden_size, config.intermediate_size
        return feed_forward_slots(name, parameter, hidden=hidden, width=width)

    return decoder_slots(
        config,
        feed_forward,
        norm_widths=(config.head_dim, config.head_dim),
        tied_output=config.tie_word_embeddings,
    )


def is_ignored(name: str, config: Qwen3Config) -> bool:
    """Whether a tensor is left out on purpose: an output layer that is tied to the embedding."""
    return config.tie_word_embeddings and name == "lm_head.weight"
