"""Which family a ``config.json`` belongs to. No torch is needed here.

Families are told apart by ``architectures`` alone: published ``model_type`` values collide
(LLaDA-MoE and dense LLaDA both say "llada"). A family's configuration and model are
imported only when a checkpoint asks for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from unmask.errors import ModelError
from unmask.models.config import ModelConfig
from unmask.models.folder import exists_inside, read_json_inside

__all__ = ["CONFIG", "CONVERSIONS", "FAMILIES", "Family", "family_of", "parse_config", "read_config"]

CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a family lives: ``unmask.models.<package>`` with modules config, model, weights."""

    package: str
    config: str
    """Class in ``config``; its ``architecture`` is the class in ``model``."""

    def config_class(self) -> type[ModelConfig]:
        """The family's :class:`ModelConfig`."""
        found: type[ModelConfig] = getattr(import_module(f"unmask.models.{self.package}.config"), self.config)
        return found

    def weights(self) -> ModuleType:
        """The family's module ``weights``: ``slots(config)`` and ``is_ignored(name, config)``."""
        return import_module(f"unmask.models.{self.package}.weights")


FAMILIES: Mapping[str, Family] = {
    "LLaDA2MoeModelLM": Family(package="llada2_moe", config="LLaDA2MoeConfig"),
    "BailingMoeV2ForCausalLM": Family(package="bailing_moe_v2", config="BailingMoeV2Config"),
    "LLaDAMoEModelLM": Family(package="llada_moe", config="LLaDAMoEConfig"),
    "LlamaForCausalLM": Family(package="llama", config="LlamaConfig"),
    "A2DLlamaLMHeadModel": Family(package="llama", config="A2DLlamaConfig"),
    "Qwen3ForCausalLM": Family(package="qwen3", config="Qwen3Config"),
    "SDARForCausalLM": Family(package="qwen3", config="SDARConfig"),
    "Qwen3MoeForCausalLM": Family(package="qwen3_moe", config="Qwen3MoeConfig"),
    "SDARMoeForCausalLM": Family(package="qwen3_moe", config="SDARMoeConfig"),
    "OlmoeForCausalLM": Family(package="olmoe", config="OlmoeConfig"),
    "OlmoeForMaskedDiffusion": Family(package="olmoe", config="OlmoeForMaskedDiffusionConfig"),
}
"""``architectures`` entry, which is also the name of the model's class -> family."""

CONVERSIONS: Mapping[str, str] = {
    "BailingMoeV2ForCausalLM": "LLaDA2MoeModelLM",
    "LlamaForCausalLM": "A2DLlamaLMHeadModel",
    "Qwen3ForCausalLM": "SDARForCausalLM",
    "Qwen3MoeForCausalLM": "SDARMoeForCausalLM",
    "OlmoeForCausalLM": "OlmoeForMaskedDiffusion",
}
"""Autoregressive architecture -> the diffusion architecture with its body and its published names."""


def family_of(architectures: object, *, source: str) -> Family:
    """The family that ``architectures`` (of a ``config.json``) names.

    Raises:
        ModelError: If it names none that we know.
    """
    names = architectures if isinstance(architectures, list | tuple) else []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    known = ", ".join(sorted(FAMILIES))
    raise ModelError(f"{source}: architectures: got {architectures!r}, known are {known}")


def parse_config(data: Mapping[str, Any], *, source: str = "model config") -> ModelConfig:
    """A validated configuration from the content of a ``config.json``; ``source`` names it in errors."""
    return family_of(data.get("architectures"), source=source).config_class().parse(data, source=source)


def read_config(folder: Path, name: str = CONFIG) -> ModelConfig:
    """The configuration of the checkpoint in ``folder``.

    Raises:
        ModelError: If ``config.json`` is missing, not JSON, or not a model we know.
    """
    if not exists_inside(folder, name):
        raise ModelError(
            f"{folder / name}: no such file; a model folder holds config.json and safetensors weights"
        )
    return parse_config(read_json_inside(folder, name), source=str(folder / name))
