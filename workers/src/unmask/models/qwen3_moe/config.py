"""Configuration of Qwen3 with experts, and of SDAR-MoE, its block-diffusion sibling."""

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from unmask.models.decoder_config import SoftmaxExpertsConfig

__all__ = ["Qwen3MoeConfig", "SDARMoeConfig"]


class Qwen3MoeConfig(SoftmaxExpertsConfig):
    """``config.json`` of ``Qwen3MoeForCausalLM``: experts in every layer."""

    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"

    model_type: str = "qwen3_moe"
    moe_intermediate_size: PositiveInt
    norm_topk_prob: bool = False
    """Whether the weights of the chosen experts are made to sum to 1; published models say true."""
    use_sliding_window: Literal[False] = False
    decoder_sparse_step: Literal[1] = 1
    mlp_only_layers: tuple[()] = ()

    @model_validator(mode="before")
    @classmethod
    def _other_name_for_experts(cls, data: Any) -> Any:
        """Newer versions of transformers write ``num_local_experts``."""
        if isinstance(data, dict) and "num_local_experts" in data:
            data = dict(data)
            experts = data.pop("num_local_experts")
            data.setdefault("num_experts", experts)
        return data


class SDARMoeConfig(Qwen3MoeConfig):
    """``config.json`` of ``SDARMoeForCausalLM``; published ones leave the mask token to the code."""

    architecture: ClassVar[str] = "SDARMoeForCausalLM"

    model_type: str = "sdar_moe"
    mask_token_id: int = Field(default=151_669, ge=0)
