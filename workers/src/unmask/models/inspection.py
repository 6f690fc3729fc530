"""What a checkpoint is and what it needs to run, told without loading it. No torch is needed here."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmask.models.checkpoint_files import (
    Checkpoint,
    ignored_tensors,
    matching_slots,
    slots_of,
)
from unmask.models.config import ModelConfig
from unmask.models.folder import exists_inside
from unmask.models.registry import CONVERSIONS, read_config
from unmask.models.tokenizer import TOKENIZER_FILE, Tokenizer

__all__ = ["Experts", "Inspection", "StoredWeights", "inspect_checkpoint", "parameter_counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Of one layer."""

    total: int
    per_token: int
    shared: int
    layers: int
    """How many layers have experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """The weights on disk."""

    files: Mapping[str, int]
    """File name -> bytes."""
    dtypes: Mapping[str, int]
    """How many tensors are stored in which way."""
    layout: str
    """"split" or "merged" experts, or "gguf"."""
    ignored: int
    """Tensors that the model does not take."""
    checksums: str
    """"ok", or "absent"; if they differ, inspecting fails."""
    tokenizer: str
    """"present" or "absent"."""
    chat_template: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is known of a checkpoint."""

    path: str
    architecture: str
    model_type: str
    decoding: str
    """"diffusion" or "autoregressive"."""
    converts_to: str | None
    """The diffusion architecture that ``unmask convert --to`` makes of it."""
    layers: int
    hidden_size: int
    attention_heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    context: int
    experts: Experts | None
    parameters: int
    active_parameters: int
    """That a token's forward uses: all but the experts that it is not sent to (and the router's bias,
    which is no weight)."""
    weight_bytes: Mapping[str, int]
    """Memory of the weights, by dtype."""
    cache_bytes_per_token: int
    """Of keys and values, in bfloat16."""
    mask_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    weights: StoredWeights | None
    """None for a configuration alone."""

    def to_json_dict(self) -> dict[str, Any]:
        """All of it, for machines."""
        return asdict(self)


def inspect_checkpoint(path: Path) -> Inspection:
    """Look into a model folder, a GGUF file or a ``config.json``.

    Raises:
        ModelError: If it is none of these, damaged, or of a model that is not known.
    """
    if path.suffix == ".json":
        return _inspection(path, read_config(path.parent, path.name), None)
    if path.suffix == ".gguf":
        return _inspect_gguf(path)
    with Checkpoint(path) as checkpoint:
        matching_slots(checkpoint)
        has_tokenizer = exists_inside(path, TOKENIZER_FILE)
        weights = StoredWeights(
            files={name: (path / name).stat().st_size for name in checkpoint.files},
            dtypes=dict(Counter(tensor.dtype for tensor in checkpoint.tensors.values())),
            layout="merged" if checkpoint.merged else "split",
            ignored=len(ignored_tensors(checkpoint)),
            checksums="ok" if checkpoint.checked else "absent",
            tokenizer="present" if has_tokenizer else "absent",
            chat_template=has_tokenizer and Tokenizer.load(path).has_chat_template,
        )
        return _inspection(path, checkpoint.config, weights)


def _inspect_gguf(path: Path) -> Inspection:
    from unmask.models.gguf_file import GgufFile

    with GgufFile(path) as file:
        matching_slots(file)
        weights = StoredWeights(
            files={path.name: path.stat().st_size},
            dtypes=dict(file.types),
            layout="gguf",
            ignored=len(ignored_tensors(file)),
            checksums="absent",
            tokenizer="present" if file.companions() else "absent",
            chat_template=file.has_chat_template,
        )
        return _inspection(path, file.config, weights)


def _inspection(path: Path, config: ModelConfig, weights: StoredWeights | None) -> Inspection:
    total, active = parameter_counts(config)
    heads = config.num_key_value_heads * config.head_dim
    return Inspection(
        path=str(path),
        architecture=config.architecture,
        model_type=config.model_type,
        decoding="autoregressive" if config.architecture in CONVERSIONS else "diffusion",
        converts_to=CONVERSIONS.get(config.architecture),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        experts=_experts(config),
        parameters=total,
        active_parameters=active,
        weight_bytes={"bfloat16": 2 * total, "float32": 4 * total},
        cache_bytes_per_token=2 * config.num_hidden_layers * heads * 2,
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        weights=weights,
    )


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters (router biases included), all and those that one token uses."""
    total = active = routed = 0
    for slot in slots_of(config):
        size = math.prod(slot.shape)
        total += size
        if ".experts." in slot.parameter:
            routed += size
        elif not slot.parameter.endswith("expert_bias"):
            active += size
    experts = _experts(config)
    return total, active + (routed * experts.per_token // experts.total if experts else 0)


def _experts(config: ModelConfig) -> Experts | None:
    total = getattr(config, "num_experts", None)
    if total is None:
        return None
    routers = [slot for slot in slots_of(config) if slot.parameter.endswith(".router.weight")]
    return Experts(
        total=total,
        per_token=getattr(config, "num_experts_per_tok", total),
        shared=getattr(config, "num_shared_experts", 0),
        layers=len(routers),
    )
