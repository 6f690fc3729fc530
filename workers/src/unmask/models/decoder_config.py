"""Configuration keys that the families in the style of Llama share. No torch is needed here."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from unmask.models.config import ModelConfig

__all__ = ["DecoderConfig", "SoftmaxExpertsConfig"]


class DecoderConfig(ModelConfig):
    """Keys of Llama, Qwen3, OLMoE and their kin, as ``transformers`` writes them."""

    head_dim: PositiveInt = Field(default=0, validate_default=False)
    """Left out, ``hidden_size`` / ``num_attention_heads``."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    tie_word_embeddings: bool = False
    eos_token_id: int = Field(ge=0)
    pad_token_id: int = Field(default=0, ge=0)
    """Left out, ``eos_token_id``."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    rope_scaling: None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Work out what a config may leave out, or say in another way."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        rope = data.pop("rope_parameters", None)  # as newer versions of transformers write it
        if isinstance(rope, dict):
            data.setdefault("rope_theta", rope.get("rope_theta"))
            if rope.get("rope_type", "default") != "default":
                data["rope_scaling"] = rope
        if isinstance(data.get("rope_scaling"), dict) and data["rope_scaling"].get("rope_type") == "default":
            del data["rope_scaling"]
        heads, hidden = data.get("num_attention_heads"), data.get("hidden_size")
        if data.get("num_key_value_heads") is None:
            data["num_key_value_heads"] = heads
        if data.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
            data["head_dim"] = hidden // heads
        if isinstance(data.get("eos_token_id"), list):  # several ids end a turn; the first ends a text
            data["eos_token_id"] = next(iter(data["eos_token_id"]), None)
        if data.get("pad_token_id") is None:
            data["pad_token_id"] = data.get("eos_token_id")
        return data


class SoftmaxExpertsConfig(DecoderConfig):
    """Keys of a softmax router over experts in every layer."""

    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}"
            )
        return self
