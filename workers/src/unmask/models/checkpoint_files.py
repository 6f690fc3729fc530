"""The weights of a model folder: tensors by their published names, over one file or several.

Experts may lie on disk in one tensor each, as published, or stacked in one tensor per layer and
projection (the merged layout, in which dFactory trains); whoever reads sees them one by one.

What is wrong with a folder is one :class:`~unmask.errors.ModelError` that names file and tensor.
No torch is needed here: a tensor is bytes.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Protocol, Self

from unmask.errors import ModelError
from unmask.models.config import ModelConfig
from unmask.models.folder import (
    CHECKSUMS,
    NewFolder,
    exists_inside,
    open_inside,
    read_json_inside,
    verify_checksums,
)
from unmask.models.registry import CONFIG, family_of, read_config
from unmask.models.slots import Slot
from unmask.models.tensor_file import Piece, StoredTensor, read_header, read_pieces, write_tensor_file

__all__ = [
    "FLOATS",
    "Checkpoint",
    "TensorSource",
    "ignored_tensors",
    "matching_slots",
    "slots_of",
    "write_weights",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "BF16", "F16")
"""The dtypes that weights may have, by their names in safetensors."""
_MOST_TENSORS = 250_000
"""More than any model has; a configuration that asks for more is a mistake or an attack."""
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MERGED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<part>gate_proj|up_proj|down_proj)(\.weight)?")


class TensorSource(Protocol):
    """Where the tensors of a model come from, under their published names."""

    path: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    """Name, dtype and shape of each."""

    def file_of(self, name: str) -> Path:
        """The file in which a tensor is, for messages."""

    def pieces(self, name: str) -> Iterator[bytearray]:
        """The tensor's elements in order, some at a time."""


class Checkpoint:
    """A model folder, open for reading; a context manager.

    Attributes:
        path: The folder.
        config: Its ``config.json``.
        tensors: What it holds, experts one by one.
        files: Its weight files, by name.
        merged: Whether experts are stacked on disk.
        checked: Whether there were checksums (which agreed).
    """

    def __init__(self, path: Path) -> None:
        """Read all that is not weights.

        Raises:
            ModelError: If a file is missing, altered, no safetensors file, or leads out of the folder.
        """
        digests = verify_checksums(path)
        self.path = path
        self.checked = digests is not None
        self.config = read_config(path)
        self.merged = False
        self.tensors: dict[str, StoredTensor] = {}
        self.files: dict[str, FileIO] = {}
        self._file_of: dict[str, str] = {}
        weight_map = _weight_map(path)
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        if digests is not None:
            used = [CONFIG, *names, *([INDEX] if weight_map is not None else [])]
            _all_listed(path, used, digests)
        try:
            for name in names:
                self._open(name)
            self._compare_with_index(weight_map or {})
            self._split_experts()
        except ModelError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()

    def file_of(self, name: str) -> Path:
        """See :class:`TensorSource`."""
        return self.path / self._file_of[name]

    def pieces(self, name: str) -> Iterator[bytearray]:
        """See :class:`TensorSource`."""
        tensor = self.tensors[name]
        file = self.files[self._file_of[name]]
        return read_pieces(file, tensor.start, tensor.nbytes, source=f"{self.file_of(name)}: {name}")

    def _open(self, name: str) -> None:
        if name != SINGLE and not exists_inside(self.path, name):
            raise ModelError(f"{self.path / name}: no such file, though {INDEX} names it")
        file = open_inside(self.path, name)
        self.files[name] = file
        for tensor in read_header(file, source=str(self.path / name)).values():
            self._add(tensor, name)

    def _add(self, tensor: StoredTensor, file: str) -> None:
        if tensor.name in self.tensors:
            raise ModelError(
                f"{self.path / file}: tensor {tensor.name} is also in {self._file_of[tensor.name]}"
            )
        self.tensors[tensor.name] = tensor
        self._file_of[tensor.name] = file

    def _compare_with_index(self, weight_map: Mapping[str, str]) -> None:
        for tensor, name in weight_map.items():
            if self._file_of.get(tensor) != name:
                raise ModelError(
                    f"{self.path / name}: tensor {tensor} is missing, though {INDEX} says it is here"
                )

    def _split_experts(self) -> None:
        """Replace each stacked tensor by its experts, which lie one behind the other in it."""
        for stacked in list(self.tensors.values()):
            match = _MERGED.fullmatch(stacked.name)
            if match is None:
                continue
            self.merged = True
            del self.tensors[stacked.name]
            file = self._file_of.pop(stacked.name)
            for tensor in _experts(stacked, match["experts"], match["part"]):
                self._add(tensor, file)


def slots_of(config: ModelConfig) -> list[Slot]:
    """Every tensor of ``config``'s published checkpoint.

    Raises:
        ModelError: If they are more than any model has.
    """
    family = family_of(config.architectures, source="model config")
    slots = list(islice(family.weights().slots(config), _MOST_TENSORS + 1))
    if len(slots) > _MOST_TENSORS:
        raise ModelError(f"config.json describes more than {_MOST_TENSORS} tensors: no model has as many")
    return slots


def ignored_tensors(source: TensorSource) -> list[str]:
    """The source's tensors that its family leaves out on purpose."""
    weights = family_of(source.config.architectures, source="model config").weights()
    return [name for name in source.tensors if weights.is_ignored(name, source.config)]


def matching_slots(source: TensorSource) -> list[Slot]:
    """The slots of the source's configuration, once its tensors are known to be just those.

    Raises:
        ModelError: Naming the tensor that is missing, not expected, of another shape, or not floating point.
    """
    slots = slots_of(source.config)
    missing = [slot.name for slot in slots if slot.name not in source.tensors]
    if missing:
        raise ModelError(f"{source.path}: {len(missing)} tensors are missing, first {missing[0]}")
    extra = sorted(source.tensors.keys() - {slot.name for slot in slots} - set(ignored_tensors(source)))
    if extra:
        raise ModelError(
            f"{source.file_of(extra[0])}: {len(extra)} tensors that config.json has no place for, "
            f"first {extra[0]}"
        )
    for slot in slots:
        tensor = source.tensors[slot.name]
        at = f"{source.file_of(slot.name)}: {slot.name}"
        if tensor.shape != slot.shape:
            raise ModelError(f"{at}: got shape {list(tensor.shape)}, config.json asks for {list(slot.shape)}")
        if tensor.dtype not in FLOATS:
            raise ModelError(f"{at}: got dtype {tensor.dtype}, allowed are {', '.join(FLOATS)}")
    return slots


def write_weights(
    folder: NewFolder,
    tensors: Sequence[StoredTensor],
    pieces_of: Callable[[StoredTensor], Iterable[Piece]],
    *,
    max_shard_bytes: int,
) -> None:
    """Add ``tensors`` to ``folder``: one file, or several and an index if they are larger than a shard."""
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        folder.digests[SINGLE] = write_tensor_file(folder.path / SINGLE, tensors, pieces_of)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        folder.digests[name] = write_tensor_file(folder.path / name, shard, pieces_of)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    folder.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Iterable[StoredTensor], max_bytes: int) -> Iterator[list[StoredTensor]]:
    """Consecutive tensors of at most ``max_bytes`` together; a larger tensor stands alone."""
    shard: list[StoredTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _weight_map(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name from the index, or None for a single file."""
    single, index = exists_inside(path, SINGLE), exists_inside(path, INDEX)
    if single and index:
        raise ModelError(f"{path}: holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    if single:
        return None
    if not index:
        raise ModelError(_no_weights(path))
    weight_map = read_json_inside(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{path / INDEX}: weight_map must be an object of tensor name to file name")
    if not weight_map:
        raise ModelError(f"{path / INDEX}: weight_map is empty")
    for name in set(weight_map.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{path / INDEX}: got file {name!r}, allowed are .safetensors files beside the index"
            )
    return weight_map


def _no_weights(path: Path) -> str:
    pickled = sorted(entry.name for entry in path.iterdir() if entry.suffix in _PICKLED)
    if pickled:
        return (
            f"{path / pickled[0]}: pickled weights are never read, for they may run any code; "
            "convert them to safetensors first, where that does no harm"
        )
    return f"{path}: holds neither {SINGLE} nor {INDEX}; the weights are missing"


def _all_listed(path: Path, used: Iterable[str], listed: Collection[str]) -> None:
    for name in used:
        if name not in listed:
            raise ModelError(f"{path / name}: {CHECKSUMS} does not list it; the folder has been altered")


def _experts(stacked: StoredTensor, prefix: str, part: str) -> Iterator[StoredTensor]:
    """The experts' tensors in ``stacked``, whose first dimension counts them."""
    count, *shape = stacked.shape
    if not shape or count > _MOST_TENSORS:
        raise ModelError(
            f"{stacked.name}: got shape {list(stacked.shape)}, expected experts x rows x columns"
        )
    for number in range(count):
        tensor = StoredTensor(f"{prefix}.{number}.{part}.weight", stacked.dtype, tuple(shape))
        yield replace(tensor, start=stacked.start + number * tensor.nbytes)
