"""Turn an autoregressive model into a diffusion model of the same body, in memory.

LLaDA2.0 keeps every tensor of Ling 2.0 and adds none: only what is predicted changes,
from the next token to the token at its own position, and training teaches that. The
row of the mask token is left as it is (LLaDA2.0, arXiv 2512.15745, section 7.1).
"""

from unmask.errors import ModelError
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.loading import build
from unmask.models.registry import parse_config

__all__ = ["CONVERSIONS", "converted_config", "to_diffusion"]

CONVERSIONS = {"BailingMoeV2ForCausalLM": "LLaDA2MoeModelLM"}
"""Autoregressive architecture -> the diffusion architecture with its body."""

_MODEL_TYPES = {"LLaDA2MoeModelLM": "llada2_moe"}


def converted_config(config: ModelConfig, architecture: str) -> ModelConfig:
    """The configuration after conversion to ``architecture``.

    Raises:
        ModelError: If the two architectures do not share a body.
    """
    source = config.architecture
    if CONVERSIONS.get(source) != architecture:
        known = ", ".join(f"{a} to {b}" for a, b in CONVERSIONS.items())
        raise ModelError(f"cannot convert {source} to {architecture}; known conversions: {known}")
    data = config.to_json_dict()
    data |= {"architectures": [architecture], "model_type": _MODEL_TYPES[architecture]}
    data.pop("num_nextn_predict_layers", None)
    return parse_config(data, source="converted config")


def to_diffusion(model: LanguageModel, architecture: str) -> LanguageModel:
    """The same weights under ``architecture``; the result shares the source's tensors.

    Raises:
        ModelError: As :func:`converted_config`.
    """
    converted = build(converted_config(model.config, architecture), device="meta")
    converted.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        converted.get_submodule(module).register_buffer(leaf, buffer, persistent=name in model.state_dict())
    return converted.train(model.training)
