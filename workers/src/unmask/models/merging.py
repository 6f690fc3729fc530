"""The mean of several checkpoints of one model, tensor by tensor and piece by piece.

A plain arithmetic mean, as LLaDA2.0 takes it over its best checkpoints (WSM; arXiv
2512.15745, section 4): every parameter alike, experts and the bias of routers included.
Elements are added in float64, in the order of the sources, and rounded once, to float32; so the
mean of k copies of a checkpoint is that checkpoint, bit for bit. No more is held than a piece of
one tensor of each source.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.errors import ModelError, UsageError
from unmask.models.checkpoint_files import TensorSource, matching_slots, write_weights
from unmask.models.config import ModelConfig
from unmask.models.folder import new_folder
from unmask.models.registry import CONFIG
from unmask.models.tensor_file import Piece, StoredTensor
from unmask.models.tensor_pieces import DTYPES, as_bytes, dtype_name, finite
from unmask.models.tokenizer import TOKENIZER_FILE

__all__ = ["Merged", "merge", "refuse_other_tokenizers"]

_MANNERS = frozenset(
    {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "model_type", "auto_map"}
)
"""Keys of ``config.json`` that say how a model was written and not what it computes."""


_ELEMENTS = 1 << 21
"""Elements that are added at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What has been written."""

    config: ModelConfig
    nbytes: int
    """Of the weights."""


def merge(
    sources: Sequence[TensorSource],
    target: Path,
    *,
    companions: Mapping[str, bytes],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Merged:
    """Write the mean of ``sources`` as the folder ``target``, which appears complete or not at all.

    Args:
        sources: At least one checkpoint; all of one model.
        target: The folder; what stands there is replaced.
        companions: Files to put beside the weights, by name.
        dtype: Of the weights; routers keep theirs. Left out, each tensor's own where the sources agree
            on it, else float32.
        max_shard_bytes: A larger model becomes several files and an index.

    Raises:
        UsageError: The sources are different models.
        ModelError: A source is damaged.
    """
    if not sources:
        raise UsageError("nothing to merge: give at least one checkpoint")
    first = sources[0]
    slots = matching_slots(first)
    for other in sources[1:]:
        _refuse_difference(first, other)
        matching_slots(other)
    tensors = []
    for slot in slots:
        found = {source.tensors[slot.name].dtype for source in sources}
        own = found.pop() if len(found) == 1 else "F32"
        name = own if dtype is None or ".router." in slot.parameter else dtype_name(dtype)
        tensors.append(StoredTensor(slot.name, name, slot.shape))

    def pieces_of(tensor: StoredTensor) -> Iterator[Piece]:
        for mean in _means(sources, tensor.name):
            yield as_bytes(_narrowed(mean, tensor))

    with new_folder(target) as folder:
        write_weights(folder, tensors, pieces_of, max_shard_bytes=max_shard_bytes)
        written = str(DTYPES[tensors[-1].dtype]).removeprefix("torch.")
        config = {key: value for key, value in first.config.to_json_dict().items() if key != "dtype"}
        folder.write_json(CONFIG, {**config, "torch_dtype": written})
        for name, content in companions.items():
            folder.write(name, content)
    return Merged(config=first.config, nbytes=sum(tensor.nbytes for tensor in tensors))


def refuse_other_tokenizers(files: Sequence[tuple[Path, Mapping[str, bytes]]]) -> None:
    """Refuse models whose tokenizers differ: their embeddings' rows mean different things.

    Args:
        files: Of each model its folder and the files beside its weights, by name.

    Raises:
        UsageError: Two of them differ.
    """
    known = [(path, beside[TOKENIZER_FILE]) for path, beside in files if TOKENIZER_FILE in beside]
    for path, tokenizer in known[1:]:
        if tokenizer != known[0][1]:
            raise UsageError(
                f"{path}: {TOKENIZER_FILE} is not that of {known[0][0]}, so equal ids are different tokens; "
                "merge checkpoints of one model"
            )


def _refuse_difference(first: TensorSource, other: TensorSource) -> None:
    """Refuse a source that is another model than the first, naming the field of ``config.json``."""
    theirs, ours = _meaning(first.config), _meaning(other.config)
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            raise UsageError(
                f"{other.path}: {key} is {ours.get(key)!r}, that of {first.path} is {theirs.get(key)!r}; "
                "only checkpoints of one model can be merged"
            )


def _meaning(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_json_dict().items() if key not in _MANNERS}


def _means(sources: Sequence[TensorSource], name: str) -> Iterator[Tensor]:
    """The mean of the tensor ``name``, flat and in float32, some elements at a time."""
    readers = [_elements(source, name) for source in sources]
    rests = [torch.empty(0)] * len(readers)
    left = sources[0].tensors[name]
    todo = left.nbytes // torch.empty((), dtype=DTYPES[left.dtype]).element_size()
    while todo:
        rests = [rest if len(rest) else next(reader) for rest, reader in zip(rests, readers, strict=True)]
        count = min(_ELEMENTS, *(len(rest) for rest in rests))
        total = rests[0][:count].double()
        for rest in rests[1:]:
            total += rest[:count]
        yield total.div_(len(rests)).float()
        rests = [rest[count:] for rest in rests]
        todo -= count


def _elements(source: TensorSource, name: str) -> Iterator[Tensor]:
    """The elements of a tensor, flat, piece by piece."""
    at = f"{source.file_of(name)}: {name}"
    for content in source.pieces(name):
        yield finite(content, source.tensors[name].dtype, at=at)


def _narrowed(mean: Tensor, tensor: StoredTensor) -> Tensor:
    narrow = mean.to(DTYPES[tensor.dtype])
    if not torch.isfinite(narrow.abs().amax()):
        raise ModelError(
            f"{tensor.name}: the mean has elements too large for {DTYPES[tensor.dtype]}; "
            "choose a wider --dtype"
        )
    return narrow
