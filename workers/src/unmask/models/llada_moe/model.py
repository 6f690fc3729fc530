"""LLaDA-MoE: per-head norms on queries and keys, softmax-routed experts, weights not renormalised."""

from typing import ClassVar

from unmask.attention import Attends
from unmask.models.llada_moe.config import LLaDAMoEConfig
from unmask.models.moe import softmax_experts
from unmask.models.transformer import Rotary, Transformer, pre_norm_layer

__all__ = ["LLaDAMoEModelLM"]


class LLaDAMoEModelLM(Transformer):
    """LLaDA-MoE-7B-A1B; predicts the token at its own position, each token seeing the whole sequence."""

    causal: ClassVar[bool] = False
    attends: ClassVar[Attends] = "canvas"
    config: LLaDAMoEConfig

    def __init__(self, config: LLaDAMoEConfig) -> None:
        """As the config says."""
        layers = (
            pre_norm_layer(
                config,
                query_key_norm="head",
                feed_forward=softmax_experts(
                    config.hidden_size,
                    config.num_experts,
                    config.expert_intermediate_size,
                    choose=config.num_experts_per_tok,
                    normalise=False,
                ),
            )
            for _ in range(config.num_hidden_layers)
        )
        super().__init__(config, layers=layers, rotary=Rotary(config.head_dim, config.rope_theta))
