"""Convert a checkpoint on disk: to a diffusion model, out of GGUF, to another layout or dtype.

Tensors pass from file to file one piece at a time, so the memory needed does not grow with
the model. What comes out is a folder as :func:`unmask.models.loading.save` writes it,
complete or absent, with the tokenizer and the generation defaults of its source.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2.exceptions import SecurityError

from unmask.errors import ModelError, UsageError
from unmask.models.checkpoint_files import (
    Checkpoint,
    TensorSource,
    ignored_tensors,
    matching_slots,
    slots_of,
    write_weights,
)
from unmask.models.config import ModelConfig
from unmask.models.conversion import converted_config, default_mask_token_id
from unmask.models.folder import exists_inside, new_folder, parse_json_object, read_inside
from unmask.models.gguf_file import GgufFile
from unmask.models.mask_token import MaskChoice, with_mask_token
from unmask.models.registry import CONFIG
from unmask.models.slots import Slot
from unmask.models.tensor_file import Piece, StoredTensor
from unmask.models.tensor_pieces import DTYPES, as_bytes, dtype_name, finite
from unmask.models.tokenizer import KNOWN_FILES, TOKENIZER_FILE, Tokenizer

__all__ = ["Converted", "companions_of", "convert", "open_source"]

_GENERATION = "generation_config.json"
_MERGED_ARCHITECTURE, _MERGED_MODEL_TYPE = "LLaDA2MoeModelLM", "llada2_moe_veomni"
"""Whose experts may be stacked on disk, and what the folder then calls itself: dFactory's conventions."""
_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.\d+\.(?P<part>\w+)\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What has been written."""

    config: ModelConfig
    nbytes: int
    """Of the weights."""
    ignored: int
    """Tensors of the source that the model does not take, such as multi-token-prediction layers."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor to be written: the source's tensors ``parts``, one behind the other."""

    tensor: StoredTensor
    parts: tuple[str, ...]


def convert(
    source: Path,
    target: Path,
    *,
    architecture: str | None = None,
    mask: MaskChoice | None = None,
    dtype: torch.dtype | None = None,
    layout: Literal["split", "merged"] = "split",
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] = lambda written, total: None,
) -> Converted:
    """Write the checkpoint ``source`` anew as the folder ``target``.

    Args:
        source: A folder of safetensors, or a GGUF file.
        target: The folder; it must not exist.
        architecture: The diffusion architecture to convert an autoregressive model to; else it stays.
        mask: Which token becomes the mask; only with ``architecture``.
        dtype: Of the weights; routers keep theirs. Left out, the source's (float32 from GGUF).
        layout: Experts each for themselves, as published, or stacked, as dFactory trains them.
        max_shard_bytes: A larger model becomes several files and an index.
        progress: Is told of the bytes written so far and of those that it will be.

    Raises:
        ModelError: If the source cannot be read, is damaged, or has no such conversion.
        UsageError: If an argument does not fit the source, or the target exists.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; choose another folder, or remove it")
    with open_source(source) as weights:
        slots = matching_slots(weights)
        files, config = companions_of(weights), weights.config
        if architecture is not None:
            config, files = _as_diffusion(config, architecture, files, mask or MaskChoice())
            assert [slot.name for slot in slots_of(config)] == [slot.name for slot in slots]
        elif mask is not None:
            raise UsageError("a mask token is for a conversion; say to which architecture (--to)")
        plan = _plan(weights, slots, config, dtype, layout)
        total = sum(planned.tensor.nbytes for planned in plan)
        with new_folder(target) as folder:
            folder.write_json(CONFIG, _config_json(config, plan, layout))
            for name, content in files.items():
                folder.write(name, content)
            _try_tokenizer(folder.path, files, config, source)
            write_weights(
                folder,
                [planned.tensor for planned in plan],
                _pieces_of(weights, plan, lambda written: progress(written, total)),
                max_shard_bytes=max_shard_bytes,
            )
        return Converted(config=config, nbytes=total, ignored=len(ignored_tensors(weights)))


def open_source(path: Path) -> Checkpoint | GgufFile:
    """Open a folder of safetensors or a GGUF file; a context manager."""
    if path.is_dir():
        return Checkpoint(path)
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: got neither a model folder nor a .gguf file")
    return GgufFile(path)


def companions_of(source: Checkpoint | GgufFile) -> dict[str, bytes]:
    """The files that stand beside weights and configuration, by name."""
    if isinstance(source, GgufFile):
        return source.companions()
    names = (*KNOWN_FILES, _GENERATION)
    return {name: read_inside(source.path, name) for name in names if exists_inside(source.path, name)}


def _as_diffusion(
    config: ModelConfig, architecture: str, files: Mapping[str, bytes], mask: MaskChoice
) -> tuple[ModelConfig, dict[str, bytes]]:
    """Configuration and companions of the converted model."""
    default_id = default_mask_token_id(config, architecture)
    new_files, mask_id = with_mask_token(
        files, architecture, mask, default_id=default_id, rows=config.vocab_size
    )
    config = converted_config(config, architecture, mask_token_id=mask_id)
    if _GENERATION in new_files:
        roles = ("eos_token_id", "pad_token_id", "mask_token_id")
        defaults = parse_json_object(new_files[_GENERATION], source=_GENERATION)
        defaults |= {role: getattr(config, role) for role in roles}
        new_files[_GENERATION] = (json.dumps(defaults, indent=2) + "\n").encode()
    return config, new_files


def _plan(
    source: TensorSource,
    slots: Sequence[Slot],
    config: ModelConfig,
    dtype: torch.dtype | None,
    layout: Literal["split", "merged"],
) -> list[_Planned]:
    """What will be written, in the order of the forward."""
    plan = []
    for slot in slots:
        kept = dtype is None or ".router." in slot.parameter
        name = source.tensors[slot.name].dtype if kept or dtype is None else dtype_name(dtype)
        plan.append(_Planned(StoredTensor(slot.name, name, slot.shape), (slot.name,)))
    if layout == "split":
        return plan
    if config.architecture != _MERGED_ARCHITECTURE:
        raise UsageError(
            f"{config.architecture} has no merged layout; only {_MERGED_ARCHITECTURE} has one, for dFactory"
        )
    return _stacked(plan)


def _stacked(plan: Sequence[_Planned]) -> list[_Planned]:
    """The same with the experts of a layer and projection in one tensor, first expert first."""
    groups: dict[str, list[_Planned]] = {}
    for planned in plan:
        match = _EXPERT.fullmatch(planned.tensor.name)
        name = f"{match['experts']}.{match['part']}" if match else planned.tensor.name
        groups.setdefault(name, []).append(planned)
    stacked = []
    for name, group in groups.items():
        first = group[0].tensor
        if name == first.name:
            stacked += group
            continue
        if any(planned.tensor.dtype != first.dtype for planned in group):
            raise ModelError(f"{name}: the experts have different dtypes; convert them to one (--dtype)")
        tensor = replace(first, name=name, shape=(len(group), *first.shape))
        stacked.append(_Planned(tensor, tuple(planned.parts[0] for planned in group)))
    return stacked


def _config_json(config: ModelConfig, plan: Sequence[_Planned], layout: str) -> dict[str, Any]:
    dtype = str(DTYPES[plan[-1].tensor.dtype]).removeprefix("torch.")
    data = {**config.to_json_dict(), "torch_dtype": dtype}
    data.pop("dtype", None)  # what newer versions of transformers write instead
    return data | ({"model_type": _MERGED_MODEL_TYPE} if layout == "merged" else {})


def _pieces_of(
    source: TensorSource, plan: Sequence[_Planned], progress: Callable[[int], None]
) -> Callable[[StoredTensor], Iterator[Piece]]:
    parts = {planned.tensor.name: planned.parts for planned in plan}
    written = 0

    def pieces_of(tensor: StoredTensor) -> Iterator[Piece]:
        nonlocal written
        for part in parts[tensor.name]:
            for content in source.pieces(part):
                piece = _cast(content, source, part, tensor.dtype)
                yield piece
                written += memoryview(piece).nbytes
                progress(written)

    return pieces_of


def _cast(content: bytearray, source: TensorSource, name: str, dtype: str) -> Piece:
    """``content`` of the source's tensor ``name`` in ``dtype``, once all of it is known to be finite."""
    at = f"{source.file_of(name)}: {name}"
    own = source.tensors[name].dtype
    elements = finite(content, own, at=at)
    if own == dtype:
        return content
    cast = elements.to(DTYPES[dtype])
    if not torch.isfinite(cast.abs().amax()):
        raise ModelError(f"{at}: has elements too large for {DTYPES[dtype]}; choose a wider --dtype")
    return as_bytes(cast)


def _try_tokenizer(folder: Path, files: Mapping[str, bytes], config: ModelConfig, source: Path) -> None:
    """Read the tokenizer in ``folder`` as a server will, and let its template write a conversation."""
    if TOKENIZER_FILE not in files:
        return
    try:
        tokenizer = Tokenizer.load(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), str(source))) from error
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {config.vocab_size} rows"
        )
    if not tokenizer.has_chat_template:
        return
    try:
        tokenizer.render_chat([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except UsageError as error:
        if isinstance(error.__cause__, SecurityError):
            raise ModelError(
                f"{source}: the chat template tries to run other code: {error.__cause__}"
            ) from error
