"""Ling 2.0's published tensors are LLaDA2.0's; its multi-token-prediction layers are dropped."""

from collections.abc import Iterator

from unmask.models.bailing_moe_v2.config import BailingMoeV2Config
from unmask.models.llada2_moe import weights
from unmask.models.slots import Slot

__all__ = ["is_ignored", "slots"]


def slots(config: BailingMoeV2Config) -> Iterator[Slot]:
    """Every tensor that the model takes from the published checkpoint."""
    return weights.slots(config)


def is_ignored(name: str, config: BailingMoeV2Config) -> bool:
    """Whether a tensor belongs to the multi-token-prediction layers, numbered after the last layer."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or not parts[2:] or not parts[2].isdecimal():
        return False
    return int(parts[2]) >= config.num_hidden_layers
