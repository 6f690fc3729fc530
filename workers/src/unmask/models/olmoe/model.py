"""OLMoE: norms over all heads of the queries and of the keys, softmax-routed experts in every layer."""

from typing import ClassVar

from unmask.models.moe import softmax_experts
from unmask.models.olmoe.config import OlmoeConfig
from unmask.models.transformer import Rotary, Transformer, pre_norm_layer

__all__ = ["OlmoeForCausalLM", "OlmoeForMaskedDiffusion"]


class OlmoeForCausalLM(Transformer):
    """Predicts the next token."""

    causal: ClassVar[bool] = True
    config: OlmoeConfig

    def __init__(self, config: OlmoeConfig) -> None:
        """As the config says."""
        layers = (
            pre_norm_layer(
                config,
                query_key_norm="all heads",
                feed_forward=softmax_experts(
                    config.hidden_size,
                    config.num_experts,
                    config.intermediate_size,
                    choose=config.num_experts_per_tok,
                    normalise=config.norm_topk_prob,
                ),
            )
            for _ in range(config.num_hidden_layers)
        )
        rotary = Rotary(config.head_dim, config.rope_theta)
        super().__init__(config, layers=layers, rotary=rotary, tied_output=config.tie_word_embeddings)


class OlmoeForMaskedDiffusion(OlmoeForCausalLM):
    """The same body as a diffusion model; predicts the token at its own position."""

    causal: ClassVar[bool] = False
