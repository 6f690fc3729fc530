"""Configuration of LLaDA-MoE-7B-A1B, under the published keys.

Its ``model_type`` is also that of dense LLaDA; only ``architectures`` tells them apart.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from unmask.models.decoder_config import SoftmaxExpertsConfig

__all__ = ["LLaDAMoEConfig"]


class LLaDAMoEConfig(SoftmaxExpertsConfig):
    """``config.json`` of ``LLaDAMoEModelLM``: experts in every layer, attention over the whole sequence."""

    architecture: ClassVar[str] = "LLaDAMoEModelLM"

    model_type: str = "llada"
    expert_intermediate_size: PositiveInt
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=50_000.0, gt=0)
    mask_token_id: int = Field(default=156_895, ge=0)
    eos_token_id: int = Field(default=156_892, ge=0)
    pad_token_id: int = Field(default=156_892, ge=0)
    moe_layer_freq: tuple[int, ...] = ()
    """1 for each layer that has experts; all of them must."""

    qk_layernorm: Literal[True] = True
    norm_topk_prob: Literal[False] = False
    moe_router_score_function: Literal["softmax"] = "softmax"
    moe_router_enable_expert_bias: Literal[False] = False
    routed_scaling_factor: Literal[1] = 1
    partial_rotary_factor: Literal[1] = 1
    tie_word_embeddings: Literal[False] = False
    shared_expert_intermediate_size: None = None
    router_num_group: None = None
    router_topk_group: None = None
    clip_qkv: None = None

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.moe_layer_freq and self.moe_layer_freq != (1,) * self.num_hidden_layers:
            raise ValueError(
                f"moe_layer_freq is {list(self.moe_layer_freq)}, expected a 1 for each of the "
                f"{self.num_hidden_layers} layers"
            )
        return self
