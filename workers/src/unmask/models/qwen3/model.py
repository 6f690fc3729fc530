"""Qwen3: grouped-query attention with per-head norms on queries and keys, dense feed-forwards."""

from typing import ClassVar

from unmask.models.feedforward import FeedForward
from unmask.models.qwen3.config import Qwen3Config
from unmask.models.transformer import Rotary, Transformer, pre_norm_layer

__all__ = ["Qwen3ForCausalLM", "SDARForCausalLM"]


class Qwen3ForCausalLM(Transformer):
    """Predicts the next token."""

    causal: ClassVar[bool] = True
    config: Qwen3Config

    def __init__(self, config: Qwen3Config) -> None:
        """As the config says."""
        layers = (
            pre_norm_layer(
                config,
                query_key_norm="head",
                feed_forward=FeedForward(config.hidden_size, config.intermediate_size),
            )
            for _ in range(config.num_hidden_layers)
        )
        rotary = Rotary(config.head_dim, config.rope_theta)
        super().__init__(config, layers=layers, rotary=rotary, tied_output=config.tie_word_embeddings)


class SDARForCausalLM(Qwen3ForCausalLM):
    """The same body as a block-diffusion model; predicts the token at its own position."""

    causal: ClassVar[bool] = False
