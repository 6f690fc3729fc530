"""LLaDA2.0: grouped-query attention with per-head norms, group-limited experts, no causal mask.

The body is that of Ling 2.0 (:mod:`unmask.models.bailing_moe_v2`).
"""

from typing import ClassVar

from unmask.models.feedforward import FeedForward
from unmask.models.llada2_moe.config import LLaDA2MoeConfig
from unmask.models.moe import Experts, MixtureOfExperts, Router
from unmask.models.transformer import Layer, Rotary, Transformer, pre_norm_layer

__all__ = ["LLaDA2MoeModelLM"]


class LLaDA2MoeModelLM(Transformer):
    """LLaDA2.0-mini and -flash; predicts the token at its own position."""

    causal: ClassVar[bool] = False
    config: LLaDA2MoeConfig

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        """As the config says."""
        layers = (_layer(config, index) for index in range(config.num_hidden_layers))
        super().__init__(config, layers=layers, rotary=Rotary(config.rotary_dim, config.rope_theta))


def _layer(config: LLaDA2MoeConfig, index: int) -> Layer:
    """Layer number ``index``: the first ones are dense, the others have experts."""
    if config.is_dense(index):
        feed_forward: FeedForward | MixtureOfExperts = FeedForward(
            config.hidden_size, config.intermediate_size
        )
    else:
        feed_forward = _mixture_of_experts(config)
    return pre_norm_layer(config, query_key_norm="head", feed_forward=feed_forward)


def _mixture_of_experts(config: LLaDA2MoeConfig) -> MixtureOfExperts:
    router = Router(
        config.hidden_size,
        config.num_experts,
        choose=config.num_experts_per_tok,
        score="sigmoid",
        normalise=True,
        biased=True,
        groups=config.n_group,
        keep_groups=config.topk_group,
        scale=config.routed_scaling_factor,
    )
    experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
    width = config.moe_intermediate_size * config.num_shared_experts
    return MixtureOfExperts(router, experts, FeedForward(config.hidden_size, width) if width else None)
