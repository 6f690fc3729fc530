"""Configuration of Qwen3, and of SDAR, its block-diffusion sibling (arXiv 2510.06303)."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from unmask.models.decoder_config import DecoderConfig

__all__ = ["Qwen3Config", "SDARConfig"]


class Qwen3Config(DecoderConfig):
    """``config.json`` of ``Qwen3ForCausalLM``."""

    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    model_type: str = "qwen3"
    intermediate_size: PositiveInt
    use_sliding_window: Literal[False] = False


class SDARConfig(Qwen3Config):
    """``config.json`` of ``SDARForCausalLM``; published ones leave the mask token to the code."""

    architecture: ClassVar[str] = "SDARForCausalLM"

    model_type: str = "sdar"
    mask_token_id: int = Field(default=151_669, ge=0)
