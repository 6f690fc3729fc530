"""Turn an autoregressive model into a diffusion model of the same body, in memory.

Every tensor is kept and none is added: only what is predicted changes, from the next
token to the token at its own position, and training teaches that. The row of the mask
token is left as it is (LLaDA2.0, arXiv 2512.15745, section 7.1).
"""

from unmask.errors import ModelError
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.loading import build
from unmask.models.registry import CONVERSIONS, family_of, parse_config

__all__ = ["CONVERSIONS", "converted_config", "to_diffusion"]

_DROPPED = {"num_nextn_predict_layers", "torch_dtype"}
"""Keys that say nothing about the converted model."""


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
    source = config.architecture
    if CONVERSIONS.get(source) != architecture:
        known = ", ".join(f"{a} to {b}" for a, b in CONVERSIONS.items())
        raise ModelError(f"cannot convert {source} to {architecture}; known conversions: {known}")
    target = family_of([architecture], source="conversion").config_class()
    data = {key: value for key, value in config.to_json_dict().items() if key not in _DROPPED}
    data |= {"architectures": [architecture], "model_type": target.model_fields["model_type"].default}
    if mask_token_id is not None:
        data["mask_token_id"] = mask_token_id
    return parse_config(data, source="converted config")


def to_diffusion(
    model: LanguageModel, architecture: str, *, mask_token_id: int | None = None
) -> LanguageModel:
    """The same weights under ``architecture``; the result shares the source's tensors.

    Raises:
        ModelError: As :func:`converted_config`.
    """
    config = converted_config(model.config, architecture, mask_token_id=mask_token_id)
    converted = build(config, device="meta")
    state = model.state_dict()
    converted.load_state_dict(state, strict=True, assign=True)
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        converted.get_submodule(module).register_buffer(leaf, buffer, persistent=name in state)
    return converted.train(model.training)
