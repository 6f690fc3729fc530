"""Checkpoints: written aside, committed by one rename, verified before they are used.

A checkpoint is a folder ``step-00000100`` with safetensors files and ``manifest.json``. All
of it is written and synced in a temporary folder beside, whose rename commits it. So a
folder of that name is complete unless the disk damaged it later, and digests tell that.
Older checkpoints are removed only after a newer one is committed.

One process writes; any number may read. What is read is JSON and safetensors: nothing is
unpickled.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import ModelError, UnmaskError
from unmask.training.manifest import (
    FORMAT,
    CheckpointFile,
    CheckpointManifest,
    Part,
    StoredTensor,
    TrainingState,
)

__all__ = ["Checkpoint", "CheckpointStore", "checkpoint_name"]

_log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_SCRATCH = ".writing-"
_MAX_FILE_BYTES = 1 << 30
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint taken when ``step`` steps were done."""
    return f"step-{step:08d}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    manifest: CheckpointManifest

    def verify(self) -> None:
        """Compare every file with its size and digest.

        Raises:
            ValueError: Naming the file that differs.
        """
        for name, expected in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            if file.stat().st_size != expected.size:
                raise ValueError(f"{name} has {file.stat().st_size} bytes, not {expected.size}")
            if _sha256(file) != expected.sha256:
                raise ValueError(f"{name} does not have the digest that the manifest names")

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill ``targets``, one tensor at a time.

        They must be the checkpoint's tensors by name, dtype and shape.

        Raises:
            ModelError: They are not.
        """
        stored = self.manifest.tensors
        if difference := sorted(targets.keys() ^ stored.keys()):
            which = "lacks" if difference[0] in targets else "has an unexpected"
            raise ModelError(f"{self.path}: {which} tensor {difference[0]} ({len(difference)} differ)")
        with _Files(self.path) as files, torch.no_grad():
            for name, target in targets.items():
                entry = stored[name]
                if (entry.dtype, entry.shape) != (_DTYPES[target.dtype], list(target.shape)):
                    raise ModelError(
                        f"{self.path}: tensor {name} is {entry.dtype} {entry.shape}, the job's is "
                        f"{_DTYPES[target.dtype]} {list(target.shape)}"
                    )
                for part in entry.parts:
                    box = target
                    for axis, (offset, size) in enumerate(zip(part.offsets, part.shape, strict=True)):
                        box = box.narrow(axis, offset, size)
                    box.copy_(files.tensor(part.file, name))


class CheckpointStore:
    """The checkpoints of one run, in one folder."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        """Keep the ``keep_last`` newest in ``folder``, which need not exist yet."""
        self.folder = folder
        self._keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, damaged or not, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in names if match)

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``; its files are not verified.

        Raises:
            ValueError: The manifest is missing or damaged.
        """
        path = self.folder / checkpoint_name(step)
        try:
            manifest = CheckpointManifest.from_bytes((path / _MANIFEST).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{_MANIFEST} is missing") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{_MANIFEST}: {error}") from None
        if manifest.step != step:
            raise ValueError(f"{_MANIFEST} is that of step {manifest.step}")
        return Checkpoint(path, manifest)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged ones are skipped with a warning.

        Raises:
            ModelError: There are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                checkpoint = self.open(step)
                checkpoint.verify()
            except (ValueError, OSError) as error:
                _log.warning("%s is damaged and skipped: %s", self.folder / checkpoint_name(step), error)
                continue
            return checkpoint
        if steps:
            raise ModelError(
                f"{self.folder}: all {len(steps)} checkpoints are damaged; restore one, or remove the folder "
                "to begin anew"
            )
        return None

    def save(
        self,
        *,
        step: int,
        state: TrainingState,
        job: Mapping[str, Any],
        config: Mapping[str, Any],
        tensors: Iterable[tuple[str, Tensor]],
    ) -> Checkpoint:
        """Write and commit a checkpoint, then remove those that are too many.

        Raises:
            UnmaskError: The file system refuses; earlier checkpoints stand.
        """
        path = self.folder / checkpoint_name(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.folder))
            try:
                stored, files = _write_tensors(scratch, tensors)
                manifest = CheckpointManifest(
                    format=FORMAT,
                    step=step,
                    state=state,
                    job=dict(job),
                    config=dict(config),
                    tensors=stored,
                    files=files,
                )
                (scratch / _MANIFEST).write_bytes(manifest.to_bytes())
                _sync(scratch / _MANIFEST)
                _sync(scratch)
                self._commit(scratch, path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            self._prune(step)
        except (OSError, SafetensorError) as error:
            raise UnmaskError(
                f"{path}: cannot be written ({error}); make room or mend the volume; "
                "earlier checkpoints stand"
            ) from error
        return Checkpoint(path, manifest)

    def remove_leftovers(self) -> None:
        """Remove what writes that were cut off have left behind."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{_SCRATCH}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _commit(self, scratch: Path, path: Path) -> None:
        scratch.chmod(0o755)
        if path.exists():  # damaged, or the run would not be at this step again
            shutil.rmtree(path)
        scratch.rename(path)
        _sync(self.folder)

    def _prune(self, newest: int) -> None:
        """Keep the newest of this run's history; later steps than ``newest`` can only be damaged ones."""
        committed = [step for step in self.steps() if step <= newest]
        for step in committed[: -self._keep_last]:
            shutil.rmtree(self.folder / checkpoint_name(step))


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[dict[str, StoredTensor], dict[str, CheckpointFile]]:
    stored: dict[str, StoredTensor] = {}
    files: dict[str, CheckpointFile] = {}
    for number, group in enumerate(_grouped(tensors)):
        name = f"shard-{number:05d}.safetensors"
        host = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
        save_file(host, folder / name)
        _sync(folder / name)
        files[name] = CheckpointFile(size=(folder / name).stat().st_size, sha256=_sha256(folder / name))
        for key, tensor in host.items():
            shape = list(tensor.shape)
            part = Part(file=name, offsets=[0] * len(shape), shape=shape)
            stored[key] = StoredTensor(dtype=_DTYPES[tensor.dtype], shape=shape, parts=[part])  # type: ignore[arg-type]
    return stored, files


def _grouped(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors of at most ``_MAX_FILE_BYTES`` together; a larger one stands alone."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > _MAX_FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    if group:
        yield group


class _Files:
    """The safetensors files of one checkpoint, opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)

    def tensor(self, file: str, name: str) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self._folder / file, framework="pt", device="cpu").__enter__()
            tensor: Tensor = self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self._folder / file}: {name} cannot be read ({error})") from None
        return tensor


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
