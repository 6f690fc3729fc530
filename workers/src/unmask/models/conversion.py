"""Turn an autoregressive model into a diffusion model of the same body, in memory; and change its context.

Every tensor is kept and none is added: only what is predicted changes, from the next
token to the token at its own position, and training teaches that. The row of the mask
token is left as it is (LLaDA2.0, arXiv 2512.15745, section 7.1).
"""

from unmask.errors import ModelError
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.loading import build
from unmask.models.registry import CONVERSIONS, family_of, parse_config

__all__ = [
    "CONVERSIONS",
    "converted_config",
    "default_mask_token_id",
    "extended_config",
    "recast",
    "to_diffusion",
]

_DROPPED = {"num_nextn_predict_layers", "torch_dtype", "dtype", "auto_map"}
"""Keys that say nothing about the converted model."""
_AUTO_MAP = {
    "LLaDA2MoeModelLM": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    }
}
"""Where published configurations say that transformers finds the model's code (not ours to give)."""


def converted_config(
    config: ModelConfig, architecture: str, *, mask_token_id: int | None = None
) -> ModelConfig:
    """The configuration after conversion to ``architecture``.

    Args:
        config: Of the autoregressive model.
        architecture: A value of :data:`~unmask.models.registry.CONVERSIONS`.
        mask_token_id: The token that becomes the mask; left out, the config's or the target's own.

    Raises:
        ModelError: If the two architectures do not share a body, or there is no mask token.
    """
    target = _target(config, architecture)
    data = {key: value for key, value in config.to_json_dict().items() if key not in _DROPPED}
    data |= {"architectures": [architecture], "model_type": target.model_fields["model_type"].default}
    if architecture in _AUTO_MAP:
        data["auto_map"] = _AUTO_MAP[architecture]
    if mask_token_id is not None:
        data["mask_token_id"] = mask_token_id
    return parse_config(data, source="converted config")


def extended_config(
    config: ModelConfig, *, rope_theta: float | None = None, context: int | None = None
) -> ModelConfig:
    """The same model with another base of its rotary embedding, or another longest context.

    Neither changes a weight. A larger base turns by smaller angles, so that positions further apart look
    like those that the model knows (LLaDA-MoE goes from 10,000 to 50,000 as its context doubles).

    Args:
        config: The model's.
        rope_theta: The base; None leaves it.
        context: Tokens, ``max_position_embeddings``; None leaves it.
    """
    data = config.to_json_dict()
    if rope_theta is not None:
        data["rope_theta"] = rope_theta
    if context is not None:
        data["max_position_embeddings"] = context
    return parse_config(data, source="config with another context")


def default_mask_token_id(config: ModelConfig, architecture: str) -> int | None:
    """The mask of ``config``, or else of ``architecture``; None where people choose one.

    Raises:
        ModelError: As :func:`converted_config`.
    """
    target = _target(config, architecture)
    if config.mask_token_id is not None:
        return config.mask_token_id
    field = target.model_fields["mask_token_id"]
    return None if field.is_required() else field.default


def _target(config: ModelConfig, architecture: str) -> type[ModelConfig]:
    source = config.architecture
    if CONVERSIONS.get(source) != architecture:
        known = ", ".join(f"{a} to {b}" for a, b in CONVERSIONS.items())
        raise ModelError(f"cannot convert {source} to {architecture}; known conversions: {known}")
    return family_of([architecture], source="conversion").config_class()


def to_diffusion(
    model: LanguageModel, architecture: str, *, mask_token_id: int | None = None
) -> LanguageModel:
    """The same weights under ``architecture``; the result shares the source's tensors.

    Raises:
        ModelError: As :func:`converted_config`.
    """
    return recast(model, converted_config(model.config, architecture, mask_token_id=mask_token_id))


def recast(model: LanguageModel, config: ModelConfig) -> LanguageModel:
    """The same weights under ``config``, which gives them the same shapes; the tensors are shared."""
    converted = build(config, device="meta")
    state = model.state_dict()
    converted.load_state_dict(state, strict=True, assign=True)
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        converted.get_submodule(module).register_buffer(leaf, buffer, persistent=name in state)
    return converted.train(model.training)
