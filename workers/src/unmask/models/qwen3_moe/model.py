"""Qwen3-MoE: Qwen3's attention, softmax-routed experts in every layer."""

from typing import ClassVar

from unmask.models.moe import softmax_experts
from unmask.models.qwen3_moe.config import Qwen3MoeConfig
from unmask.models.transformer import Rotary, Transformer, pre_norm_layer

__all__ = ["Qwen3MoeForCausalLM", "SDARMoeForCausalLM"]


class Qwen3MoeForCausalLM(Transformer):
    """Predicts the next token."""

    causal: ClassVar[bool] = True
    config: Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig) -> None:
        """As the config says."""
        layers = (
            pre_norm_layer(
                config,
                query_key_norm="head",
                feed_forward=softmax_experts(
                    config.hidden_size,
                    config.num_experts,
                    config.moe_intermediate_size,
                    choose=config.num_experts_per_tok,
                    normalise=config.norm_topk_prob,
                ),
            )
            for _ in range(config.num_hidden_layers)
        )
        rotary = Rotary(config.head_dim, config.rope_theta)
        super().__init__(config, layers=layers, rotary=rotary, tied_output=config.tie_word_embeddings)


class SDARMoeForCausalLM(Qwen3MoeForCausalLM):
    """The same body as a block-diffusion model; predicts the token at its own position."""

    causal: ClassVar[bool] = False
