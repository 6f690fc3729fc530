"""Configuration of LLaDA2.0-mini and -flash, under the published keys.

The published ``config.json`` leaves out ids that the model needs; the defaults here are
those of its tokenizer. Query/key normalisation is always on: every published checkpoint
carries its weights, whatever ``use_qk_norm`` says.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from unmask.models.config import ModelConfig

__all__ = ["LLaDA2MoeConfig"]


class LLaDA2MoeConfig(ModelConfig):
    """``config.json`` of ``LLaDA2MoeModelLM``."""

    architecture: ClassVar[str] = "LLaDA2MoeModelLM"

    model_type: str = "llada2_moe"
    intermediate_size: PositiveInt
    """Width of the dense feed-forward of the first layers."""
    moe_intermediate_size: PositiveInt
    """Width of each expert, and of each shared expert."""
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    num_shared_experts: NonNegativeInt = 1
    first_k_dense_replace: NonNegativeInt = 1
    """Number of first layers with a dense feed-forward instead of experts."""
    n_group: PositiveInt
    topk_group: PositiveInt
    routed_scaling_factor: float = 2.5
    rope_theta: float = Field(default=600_000.0, gt=0)
    partial_rotary_factor: float = Field(default=0.5, gt=0, le=1)
    mask_token_id: int = Field(default=156_895, ge=0)
    eos_token_id: int = Field(default=156_892, ge=0)
    pad_token_id: int = Field(default=156_892, ge=0)

    score_function: Literal["sigmoid"] = "sigmoid"
    norm_topk_prob: Literal[True] = True
    hidden_act: Literal["silu"] = "silu"
    use_bias: Literal[False] = False
    use_qkv_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    use_sliding_window: Literal[False] = False
    rope_scaling: None = None

    @field_validator("model_type")
    @classmethod
    def _one_name(cls, model_type: str) -> str:
        """With stacked experts, a folder has another name; the model is the same."""
        return "llada2_moe" if model_type == "llada2_moe_veomni" else model_type

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def is_dense(self, layer: int) -> bool:
        """Whether layer number ``layer`` has a dense feed-forward."""
        return layer < self.first_k_dense_replace

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if self.num_experts % self.n_group:
            raise ValueError(f"num_experts {self.num_experts} is not a multiple of n_group {self.n_group}")
        group_size = self.num_experts // self.n_group
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
        if self.num_experts_per_tok > self.topk_group * group_size:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {self.topk_group * group_size} "
                f"experts of topk_group {self.topk_group} groups"
            )
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            raise ValueError(
                f"head_dim x partial_rotary_factor is {self.rotary_dim}, expected a positive even number"
            )
        return self
