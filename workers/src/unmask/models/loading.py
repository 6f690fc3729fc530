"""Build, load and save models: published names on disk, the family's own arrangement in memory.

Loading makes the module without memory (meta device), allocates it once in the wanted
dtype and fills it tensor by tensor, so its peak is the model plus a piece of one tensor. Only
safetensors are read: nothing is unpickled and no code of a checkpoint runs.

Everything that is wrong with a checkpoint is one :class:`~unmask.errors.ModelError`
that names the file and the tensor. Where a folder has ``checksums.json`` (ours do),
every file is compared with its SHA-256 before it is used.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from unmask.attention import kernels
from unmask.models.base import LanguageModel
from unmask.models.checkpoint_files import (
    Checkpoint,
    TensorSource,
    matching_slots,
    slots_of,
    write_weights,
)
from unmask.models.config import ModelConfig
from unmask.models.folder import CHECKSUMS, new_folder, read_json_inside
from unmask.models.int8 import check_int8, int8_on
from unmask.models.moe import mixtures_of
from unmask.models.onednn import REORDERED, can_reorder
from unmask.models.products import expect, products_of
from unmask.models.registry import CONFIG, family_of
from unmask.models.slots import Slot
from unmask.models.tensor_file import Piece, StoredTensor
from unmask.models.tensor_pieces import DTYPES, as_bytes, dtype_name, finite

__all__ = [
    "Quantization",
    "build",
    "check_finite",
    "copy_tensor",
    "digest_of",
    "fill",
    "initial_values",
    "load",
    "load_open",
    "read_values",
    "save",
    "save_parts",
    "slots_of",
    "weights_digest",
]

Quantization: TypeAlias = Literal["none", "int8"]
"""What weights are kept in; see :mod:`unmask.models.int8`."""


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
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), _random(model, seed=seed), strict=True):
                parameter.copy_(value)
            for buffer in model.buffers():
                buffer.zero_()
    return model


def initial_values(config: ModelConfig, *, seed: int) -> Iterator[tuple[Slot, Tensor]]:
    """The random weights of :func:`build`, one parameter at a time, where no process holds them all."""
    model = build(config, device="meta")
    for (name, _), value in zip(model.named_parameters(), _random(model, seed=seed), strict=True):
        yield Slot(name, name, tuple(value.shape)), value


def read_values(path: str | Path) -> Iterator[tuple[Slot, Tensor]]:
    """The tensors of the checkpoint in the folder ``path``, one at a time, in float32.

    Raises:
        ModelError: As :func:`load`.
    """
    with Checkpoint(Path(path)) as checkpoint:
        for slot in matching_slots(checkpoint):
            value = torch.empty(slot.shape, dtype=torch.float32)
            copy_tensor(checkpoint, slot.name, value.view(-1))
            yield slot, value


def load(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantization: Quantization = "none",
    reordered: bool = False,
) -> LanguageModel:
    """Load the checkpoint in the folder ``path``, in ``dtype`` (that of its tensors by default).

    With ``quantization="int8"`` weights are quantised one tensor after the other as they are read
    (:mod:`unmask.models.int8`), and on a CPU what is not a product's weight is float32. Where ``reordered``,
    weights of float32 on a CPU are laid out for oneDNN (:mod:`unmask.models.onednn`): faster, for whoever
    needs neither gradients nor a state dict.

    Raises:
        UsageError: If ``device`` cannot compute with weights so quantised.
        ModelError: If a file is missing, truncated or altered, or a tensor is missing,
            unexpected, of another shape, not of floating point, or not finite.
    """
    if quantization == "int8":  # before anything is read
        check_int8(device)
    with Checkpoint(path) as checkpoint:
        return load_open(
            checkpoint, device=device, dtype=dtype, quantization=quantization, reordered=reordered
        )


def load_open(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantization: Quantization = "none",
    reordered: bool = False,
    experts: Literal["here", "elsewhere"] = "here",
) -> LanguageModel:
    """:func:`load` of a checkpoint that is open.

    With ``experts="elsewhere"`` the routed experts are neither read nor given memory: what is in their place
    cannot be called, and whoever computes them (:mod:`unmask.experts`) has to be put there.
    """
    slots = matching_slots(checkpoint)
    own = DTYPES[checkpoint.tensors[slots[-1].name].dtype]
    if quantization == "int8":
        weights_alone = kernels.run_on(torch.device(device))
        model = _on_meta(checkpoint.config, dtype or own if weights_alone else torch.float32)
        expect(model, int8_on(device))
    else:
        model = _on_meta(checkpoint.config, dtype or own)
        if reordered and can_reorder(device, dtype or own):
            expect(model, REORDERED)
    if experts == "elsewhere":
        slots = [slot for slot in slots if slot.expert is None]
        for mixture in mixtures_of(model).values():
            mixture.add_module("experts", nn.Identity())
    fill(model.to_empty(device=device), slots, checkpoint)
    return model.eval()


def weights_digest(path: Path) -> str:
    """SHA-256 over the weight files of the folder ``path`` with their names: what tells two models apart.

    Raises:
        ModelError: As :class:`~unmask.models.checkpoint_files.Checkpoint`.
    """
    with Checkpoint(path) as checkpoint:
        return digest_of(checkpoint)


def digest_of(checkpoint: Checkpoint) -> str:
    """:func:`weights_digest` of a checkpoint that is open."""
    listed = read_json_inside(checkpoint.path, CHECKSUMS) if checkpoint.checked else {}
    digests = {}
    for name, file in checkpoint.files.items():
        file.seek(0)
        digests[name] = listed.get(name) or hashlib.file_digest(file, "sha256").hexdigest()
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    save_parts(
        model.config,
        path,
        lambda slot: slot.view(state),
        dtypes=lambda slot: state[slot.parameter].dtype,
        dtype=next(iter(model.parameters())).dtype,
        max_shard_bytes=max_shard_bytes,
        companions=companions,
    )


def save_parts(
    config: ModelConfig,
    path: Path,
    part_of: Callable[[Slot], Tensor],
    *,
    dtypes: Callable[[Slot], torch.dtype],
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
    companions: Mapping[str, bytes] | None = None,
) -> None:
    """Write the same folder from tensors that are asked for one at a time, each once, in the slots' order.

    Args:
        config: Of the model.
        path: As for :func:`save`.
        part_of: The values of a slot.
        dtypes: Their number format, asked for before any of them.
        dtype: What ``config.json`` names as that of the model.
        max_shard_bytes: As for :func:`save`.
        companions: As for :func:`save`.
    """
    slots = {slot.name: slot for slot in slots_of(config)}

    def pieces_of(tensor: StoredTensor) -> Iterator[Piece]:
        yield as_bytes(part_of(slots[tensor.name]))

    with new_folder(path) as folder:
        tensors = [StoredTensor(slot.name, dtype_name(dtypes(slot)), slot.shape) for slot in slots.values()]
        write_weights(folder, tensors, pieces_of, max_shard_bytes=max_shard_bytes)
        name = str(dtype).removeprefix("torch.")
        folder.write_json(CONFIG, {**config.to_json_dict(), "torch_dtype": name})
        for name, content in (companions or {}).items():
            folder.write(name, content)


def _empty(config: ModelConfig, *, device: str | torch.device, dtype: torch.dtype) -> LanguageModel:
    """The model with allocated, unset parameters; the parts that insist on float32 keep it."""
    model = _on_meta(config, dtype)
    return model if torch.device(device).type == "meta" else model.to_empty(device=device)


def _on_meta(config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    """The model without memory."""
    family = family_of(config.architectures, source="model config")
    model_class: type[LanguageModel] = getattr(
        import_module(f"unmask.models.{family.package}.model"), config.architecture
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(default)


def _random(model: LanguageModel, *, seed: int) -> Iterator[Tensor]:
    """The first value of each parameter of ``model``, which may be on the meta device."""
    std = model.config.initializer_range
    generator = torch.Generator(device="cpu").manual_seed(seed)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.RMSNorm)}
    for parameter in model.parameters():
        if id(parameter) in norms:
            yield torch.ones(parameter.shape)
        else:
            yield torch.empty(parameter.shape).normal_(std=std, generator=generator)


def fill(model: LanguageModel, slots: list[Slot], source: TensorSource) -> None:
    """Copy the tensors ``slots`` of a source into ``model``, a piece at a time.

    Raises:
        ModelError: A number is not finite, or a file is shorter than it was.
    """
    state, products = model.state_dict(), products_of(model)
    for product in products.values():
        product.clear()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        of_experts: dict[tuple[int, ...], Tensor] = {}
        for slot in slots:
            if slot.parameter in state:
                copy_tensor(source, slot.name, slot.view(state).view(-1))
            else:
                # The same memory for all experts: what is let go between weights that stay, is lost there.
                value = of_experts.get(slot.shape) if slot.expert is not None else None
                if value is None:
                    value = torch.empty(slot.shape)
                if slot.expert is not None:
                    of_experts[slot.shape] = value
                copy_tensor(source, slot.name, value.view(-1))
                products[slot.parameter].put(slot.parameter.rpartition(".")[2], slot.index, value)
        head = products.get("head.weight")
        if head is not None and not head.is_complete:  # the embedding is the output layer, too
            head.put("weight", (), state["embedding.weight"])
    assert all(product.is_complete for product in products.values())


def check_finite(source: TensorSource, name: str) -> None:
    """Read the tensor ``name`` without keeping it.

    Raises:
        ModelError: A number of it is not finite, or its file is shorter than it should be.
    """
    for _ in _pieces(source, name):
        pass


def _pieces(source: TensorSource, name: str) -> Iterator[Tensor]:
    """The numbers of the tensor ``name``, in order, all finite."""
    at = f"{source.file_of(name)}: {name}"
    for content in source.pieces(name):
        yield finite(content, source.tensors[name].dtype, at=at)


@torch.no_grad()
def copy_tensor(source: TensorSource, name: str, target: Tensor) -> None:
    """Copy the tensor ``name`` to ``target``, which is flat, a piece at a time.

    Raises:
        ModelError: A number is not finite, or the file is shorter than it was.
    """
    start = 0
    for piece in _pieces(source, name):
        target[start : start + len(piece)].copy_(piece)
        start += len(piece)
