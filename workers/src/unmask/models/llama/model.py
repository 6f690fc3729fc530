"""Llama: grouped-query attention and dense feed-forwards, run causally or as a diffusion model."""

from typing import ClassVar

from unmask.models.feedforward import FeedForward
from unmask.models.llama.config import LlamaConfig
from unmask.models.transformer import Rotary, Transformer, pre_norm_layer

__all__ = ["A2DLlamaLMHeadModel", "LlamaForCausalLM"]


class LlamaForCausalLM(Transformer):
    """Predicts the next token."""

    causal: ClassVar[bool] = True
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        """As the config says."""
        layers = (
            pre_norm_layer(
                config,
                query_key_norm="none",
                feed_forward=FeedForward(config.hidden_size, config.intermediate_size),
            )
            for _ in range(config.num_hidden_layers)
        )
        rotary = Rotary(config.head_dim, config.rope_theta)
        super().__init__(config, layers=layers, rotary=rotary, tied_output=config.tie_word_embeddings)


class A2DLlamaLMHeadModel(LlamaForCausalLM):
    """The same body as a diffusion model; predicts the token at its own position."""

    causal: ClassVar[bool] = False
