"""Configuration of Llama, and of a masked-diffusion model of its shape."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from unmask.models.decoder_config import DecoderConfig

__all__ = ["A2DLlamaConfig", "LlamaConfig"]


class LlamaConfig(DecoderConfig):
    """``config.json`` of ``LlamaForCausalLM``."""

    architecture: ClassVar[str] = "LlamaForCausalLM"

    model_type: str = "llama"
    intermediate_size: PositiveInt
    mlp_bias: Literal[False] = False


class A2DLlamaConfig(LlamaConfig):
    """``config.json`` of a Llama turned into a diffusion model, under the name that dllm reads."""

    architecture: ClassVar[str] = "A2DLlamaLMHeadModel"

    model_type: str = "a2d-llama"
    mask_token_id: int = Field(ge=0)
