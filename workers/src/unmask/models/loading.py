"""Build, load and save models: published names on disk, the family's own arrangement in memory.

Loading makes the module without memory (meta device), allocates it once in the wanted
dtype and fills it tensor by tensor, so its peak is the model plus one tensor. Only
safetensors are read: nothing is unpickled and no code of a checkpoint runs.

Everything that is wrong with a checkpoint is one :class:`~unmask.errors.ModelError`
that names the file and the tensor. Where a folder has ``checksums.json`` (ours do),
every file is compared with its SHA-256 before it is used.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.errors import ModelError
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.registry import family_of, read_config
from unmask.models.slots import Slot

__all__ = ["build", "load", "save", "slots_of"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CHECKSUMS = "checksums.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that weights may have, by their names in safetensors."""


def build(
    config: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LanguageModel:
    """A model with random weights: matrices normal with ``initializer_range``, norms one, biases zero.

    On ``device="meta"`` the model has shapes and no storage. Equal seeds give equal weights.
    """
    model = _empty(config, device=device, dtype=dtype)
    if torch.device(device).type != "meta":
        _initialise(model, std=config.initializer_range, seed=seed)
    return model


def load(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """Load the checkpoint in the folder ``path``, in ``dtype`` (that of its tensors by default).

    Raises:
        ModelError: If a file is missing, truncated or altered, or a tensor is missing,
            unexpected, of another shape, or not of floating point.
    """
    config = read_config(path)
    _verify_checksums(path)
    files = _weight_files(path)
    with _Weights(path, files) as weights:
        slots = _matching_slots(config, weights)
        model = _empty(config, device=device, dtype=dtype or _FLOATS[weights.dtype(slots[-1].name)])
        _fill(model, slots, weights)
    return model.eval()


def save(
    model: LanguageModel,
    path: Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    companions: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``config.json``, published weights and ``checksums.json`` to the folder ``path``.

    The folder appears, or is replaced, in one step when all is written.

    Args:
        model: What to write; its tensors keep their dtype.
        path: The folder; its parent must exist or be creatable.
        max_shard_bytes: A larger model becomes several files and an index.
        companions: Other files to put beside them (tokenizer, generation defaults), by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write_weights(model, scratch, max_shard_bytes)
        dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
        config = {**model.config.to_json_dict(), "torch_dtype": dtype}
        _write_json(scratch / "config.json", config)
        for name, content in (companions or {}).items():
            (scratch / name).write_bytes(content)
        digests = {file.name: _sha256(file) for file in sorted(scratch.iterdir())}
        _write_json(scratch / _CHECKSUMS, digests)
        scratch.chmod(0o755)
        _replace_folder(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def slots_of(config: ModelConfig) -> list[Slot]:
    """Every tensor of ``config``'s published checkpoint."""
    return list(_weights_module(config).slots(config))


def _weights_module(config: ModelConfig) -> ModuleType:
    family = family_of(config.architectures, source="model config")
    return import_module(f"unmask.models.{family.package}.weights")


def _empty(config: ModelConfig, *, device: str | torch.device, dtype: torch.dtype) -> LanguageModel:
    """The model with allocated, unset parameters; the parts that insist on float32 keep it."""
    family = family_of(config.architectures, source="model config")
    model_class: type[LanguageModel] = getattr(
        import_module(f"unmask.models.{family.package}.model"), config.architecture
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    if torch.device(device).type == "meta":
        return model
    return model.to_empty(device=device)


def _initialise(model: LanguageModel, *, std: float, seed: int) -> None:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.RMSNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in norms:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))
        for buffer in model.buffers():
            buffer.zero_()


# Reading


def _weight_files(path: Path) -> Mapping[str, str] | None:
    """Tensor name -> file name from the index, or None for a single file."""
    index = path / _INDEX
    if not index.exists():
        if not (path / _SINGLE).exists():
            raise ModelError(f"{path}: holds neither {_SINGLE} nor {_INDEX}; the weights are missing")
        return None
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: not an index of weights ({type(error).__name__}: {error})") from None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: weight_map must be an object of tensor name to file name")
    for name in set(weight_map.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: got file {name!r}, allowed are .safetensors files beside the index")
    return weight_map


class _Weights:
    """The open safetensors files of a checkpoint, read a tensor at a time."""

    def __init__(self, path: Path, files: Mapping[str, str] | None) -> None:
        self._open: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        for name in sorted(set(files.values())) if files else [_SINGLE]:
            handle = self._open_file(path / name)
            self._open[name] = handle
            for tensor in handle.keys():
                if tensor in self._file_of:
                    raise ModelError(f"{path / name}: tensor {tensor} is also in {self._file_of[tensor]}")
                self._file_of[tensor] = name
        self.path = path
        for tensor, name in (files or {}).items():
            if self._file_of.get(tensor) != name:
                raise ModelError(
                    f"{path / name}: tensor {tensor} is missing, though {_INDEX} says it is here"
                )

    @staticmethod
    def _open_file(file: Path) -> safe_open:
        try:
            handle: safe_open = safe_open(file, framework="pt", device="cpu").__enter__()
            return handle
        except FileNotFoundError:
            raise ModelError(f"{file}: no such file, though {_INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: truncated, or not a safetensors file ({error})") from None

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def dtype(self, name: str) -> str:
        return str(self._open[self._file_of[name]].get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._file_of[name]].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def file(self, name: str) -> Path:
        return self.path / self._file_of[name]


def _matching_slots(config: ModelConfig, weights: _Weights) -> list[Slot]:
    """The slots of ``config``, once ``weights`` is known to have just those, in shape and kind."""
    module = _weights_module(config)
    slots: list[Slot] = list(module.slots(config))
    missing = [slot.name for slot in slots if slot.name not in weights.names]
    if missing:
        raise ModelError(f"{weights.path}: {len(missing)} tensors are missing, first {missing[0]}")
    extra = sorted(weights.names - {slot.name for slot in slots})
    extra = [name for name in extra if not module.is_ignored(name, config)]
    if extra:
        raise ModelError(
            f"{weights.file(extra[0])}: {len(extra)} tensors that config.json has no place for, "
            f"first {extra[0]}"
        )
    for slot in slots:
        at = f"{weights.file(slot.name)}: {slot.name}"
        shape, dtype = weights.shape(slot.name), weights.dtype(slot.name)
        if shape != slot.shape:
            raise ModelError(f"{at}: got shape {list(shape)}, config.json asks for {list(slot.shape)}")
        if dtype not in _FLOATS:
            raise ModelError(f"{at}: got dtype {dtype}, allowed are {', '.join(_FLOATS)}")
    return slots


def _fill(model: LanguageModel, slots: list[Slot], weights: _Weights) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for slot in slots:
            slot.view(state).copy_(weights.tensor(slot.name))


def _verify_checksums(path: Path) -> None:
    checksums = path / _CHECKSUMS
    if not checksums.exists():
        return
    try:
        digests = json.loads(checksums.read_text(encoding="utf-8"))
        pairs = [(str(name), str(digest)) for name, digest in digests.items()]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{checksums}: cannot be read ({error})") from None
    for name, digest in pairs:
        file = path / Path(name).name
        if not file.exists():
            raise ModelError(f"{file}: no such file, though {_CHECKSUMS} names it")
        if _sha256(file) != digest:
            raise ModelError(
                f"{file}: corrupted: its SHA-256 is not the one in {_CHECKSUMS}; copy the folder again"
            )


# Writing


def _write_weights(model: LanguageModel, folder: Path, max_shard_bytes: int) -> None:
    state = model.state_dict()
    shards = list(_shards(slots_of(model.config), state, max_shard_bytes))
    if len(shards) == 1:
        _write_shard(folder / _SINGLE, shards[0], state)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, state)
        weight_map |= {slot.name: name for slot in shard}
    total = sum(slot.view(state).nbytes for shard in shards for slot in shard)
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(slots: Iterable[Slot], state: dict[str, Tensor], max_bytes: int) -> Iterator[list[Slot]]:
    """Consecutive slots of at most ``max_bytes`` together; a larger tensor stands alone."""
    shard: list[Slot] = []
    size = 0
    for slot in slots:
        nbytes = slot.view(state).nbytes
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(slot)
        size += nbytes
    yield shard


def _write_shard(file: Path, shard: list[Slot], state: dict[str, Tensor]) -> None:
    """Clone each part: parts of a stacked tensor share storage, which the format forbids."""
    save_file(
        {slot.name: slot.view(state).detach().cpu().clone() for slot in shard},
        file,
        metadata={"format": "pt"},
    )
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace_folder(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; what stood there is moved aside first and removed after."""
    if not path.exists():
        new.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    path.rename(aside / path.name)
    new.rename(path)
    shutil.rmtree(aside)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
