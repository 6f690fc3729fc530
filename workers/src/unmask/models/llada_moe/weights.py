"""Which published tensor lives where in the module: LLaDA-MoE's names, one tensor per expert."""

from collections.abc import Iterator

from unmask.models.llada_moe.config import LLaDAMoEConfig
from unmask.models.slots import Slot, decoder_slots, softmax_expert_slots

__all__ = ["is_ignored", "slots"]


def slots(config: LLaDAMoEConfig) -> Iterator[Slot]:
    """Every tensor of the published checkpoint, in the order of the forward."""

    def feed_forward(name: str, parameter: str) -> Iterator[Slot]:
        hidden, width = config.hidden_size, config.expert_intermediate_size
        return softmax_expert_slots(name, parameter, experts=config.num_experts, hidden=hidden, width=width)

    return decoder_slots(
        config,
        feed_forward,
        norm_widths=(config.head_dim, config.head_dim),
        tied_output=False,
    )


def is_ignored(name: str, config: LLaDAMoEConfig) -> bool:
    """Whether a published tensor is left out on purpose: none is."""
    return False
