"""Build, load and save models: published names on disk, the family's own arrangement in memory.

Loading makes the module without memory (meta device), allocates it once in the wanted
dtype and fills it tensor by tensor, so its peak is the model plus a piece of one tensor. Only
safetensors are read: nothing is unpickled and no code of a checkpoint runs.

Everything that is wrong with a checkpoint is one :class:`~unmask.errors.ModelError`
that names the file and the tensor. Where a folder has ``checksums.json`` (ours do),
every file is compared with its SHA-256 before it is used.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from unmask.models.base import LanguageModel
from unmask.models.checkpoint_files import (
    Checkpoint,
    TensorSource,
    matching_slots,
    slots_of,
    write_weights,
)
from unmask.models.config import ModelConfig
from unmask.models.folder import new_folder
from unmask.models.registry import CONFIG, family_of
from unmask.models.slots import Slot
from unmask.models.tensor_file import Piece, StoredTensor
from unmask.models.tensor_pieces import DTYPES, as_bytes, dtype_name, finite

__all__ = ["build", "load", "save", "slots_of"]


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
            unexpected, of another shape, not of floating point, or not finite.
    """
    with Checkpoint(path) as checkpoint:
        slots = matching_slots(checkpoint)
        own = DTYPES[checkpoint.tensors[slots[-1].name].dtype]
        model = _empty(checkpoint.config, device=device, dtype=dtype or own)
        _fill(model, slots, checkpoint)
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
    state = model.state_dict()
    stored = {
        slot.name: (StoredTensor(slot.name, dtype_name(part.dtype), slot.shape), part)
        for slot in slots_of(model.config)
        for part in [slot.view(state)]
    }

    def pieces_of(tensor: StoredTensor) -> Iterator[Piece]:
        yield as_bytes(stored[tensor.name][1])

    with new_folder(path) as folder:
        tensors = [tensor for tensor, _ in stored.values()]
        write_weights(folder, tensors, pieces_of, max_shard_bytes=max_shard_bytes)
        dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
        folder.write_json(CONFIG, {**model.config.to_json_dict(), "torch_dtype": dtype})
        for name, content in (companions or {}).items():
            folder.write(name, content)


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


def _fill(model: LanguageModel, slots: list[Slot], source: TensorSource) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for slot in slots:
            _copy(source, slot.name, slot.view(state).view(-1))


def _copy(source: TensorSource, name: str, target: Tensor) -> None:
    """Copy the tensor ``name`` to ``target``, which is flat."""
    at = f"{source.file_of(name)}: {name}"
    start = 0
    for content in source.pieces(name):
        piece = finite(content, source.tensors[name].dtype, at=at)
        target[start : start + len(piece)].copy_(piece)
        start += len(piece)
