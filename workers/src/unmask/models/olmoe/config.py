"""Configuration of OLMoE, and of a masked-diffusion model of its shape."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from unmask.models.decoder_config import SoftmaxExpertsConfig

__all__ = ["OlmoeConfig", "OlmoeForMaskedDiffusionConfig"]


class OlmoeConfig(SoftmaxExpertsConfig):
    """``config.json`` of ``OlmoeForCausalLM``."""

    architecture: ClassVar[str] = "OlmoeForCausalLM"

    model_type: str = "olmoe"
    intermediate_size: PositiveInt
    """Width of each expert."""
    norm_topk_prob: bool = False
    """Whether the weights of the chosen experts are made to sum to 1."""
    clip_qkv: None = None


class OlmoeForMaskedDiffusionConfig(OlmoeConfig):
    """``config.json`` of an OLMoE turned into a diffusion model; the name is our own."""

    architecture: ClassVar[str] = "OlmoeForMaskedDiffusion"

    model_type: str = "olmoe_masked_diffusion"
    mask_token_id: int = Field(ge=0)
