"""Checkpoints: written aside, committed by one rename, verified before they are used.

A checkpoint is a folder ``step-00000100`` with safetensors files and ``manifest.json``. All
of it is written and synced in a temporary folder beside, whose rename commits it. So a
folder of that name is complete unless the disk damaged it later, and digests tell that.
Older checkpoints are removed only after a newer one is committed.

One process writes; any number may read. What is read is JSON and safetensors: nothing is
unpickled. :mod:`unmask.training.mirrored_checkpoints` does the same in an object store.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import ModelError, UnmaskError
from unmask.training.boxes import Box, overlap
from unmask.training.distributed import World
from unmask.training.manifest import (
    FORMAT,
    CheckpointFile,
    CheckpointManifest,
    Dtype,
    Part,
    StoredTensor,
    TrainingState,
)

__all__ = ["MANIFEST", "Checkpoint", "CheckpointFiles", "CheckpointStore", "checkpoint_name"]

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Name of the file that says what is in a checkpoint."""
_NAME = re.compile(r"step-(\d{8,})")
_SCRATCH = ".writing-"
_MAX_FILE_BYTES = 1 << 30
_DTYPES: dict[torch.dtype, Dtype] = {
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
    fetch: Callable[[str], None] | None = None
    """Brings a file of that name to :attr:`path`, which need not hold those yet that nobody has read."""
    uri: str | None = None
    """Where people find it; left out, at :attr:`path`."""

    @property
    def place(self) -> str:
        """Where people find it."""
        return self.uri or str(self.path)

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

    def read_into(self, targets: Mapping[str, Tensor | Box]) -> None:
        """Fill ``targets``, one tensor at a time, whoever wrote which part; reads no more than it needs.

        They must be the checkpoint's tensors by name, dtype and shape, or boxes of them.

        Raises:
            ModelError: They are not.
        """
        stored = self.manifest.tensors
        if difference := sorted(targets.keys() ^ stored.keys()):
            which = "lacks" if difference[0] in targets else "has an unexpected"
            raise ModelError(f"{self.place}: {which} tensor {difference[0]} ({len(difference)} differ)")
        with CheckpointFiles(self.path, self.fetch) as files, torch.no_grad():
            for name, target in targets.items():
                entry = stored[name]
                box = target if isinstance(target, Box) else Box.whole(target)
                dtype = _DTYPES[box.tensor.dtype]
                if (entry.dtype, entry.shape) != (dtype, list(box.shape)):
                    raise ModelError(
                        f"{self.place}: tensor {name} is {entry.dtype} {entry.shape}, the job's is "
                        f"{dtype} {list(box.shape)}"
                    )
                files.fill(name, entry, box)


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
            manifest = CheckpointManifest.from_bytes((path / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{MANIFEST} is missing") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{MANIFEST}: {error}") from None
        if manifest.step != step:
            raise ValueError(f"{MANIFEST} is that of step {manifest.step}")
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

    def agreed(self, world: World) -> Checkpoint | None:
        """The newest that verifies, the same for all processes, each of which must call this.

        Raises:
            ModelError: There are checkpoints, and all are damaged.
        """
        with world.together():  # only the leader reads them
            found = self.newest() if world.leads else None
        step = world.from_leader(found.manifest.step if found else -1)
        return None if step < 0 else found or self.open(step)

    def present(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``, with all of its files; they are not verified."""
        return self.folder / checkpoint_name(step)

    def place(self, step: int) -> str:
        """Where people find the checkpoint of ``step``."""
        return str(self.folder / checkpoint_name(step))

    def save(
        self,
        *,
        step: int,
        state: TrainingState,
        job: Mapping[str, Any],
        config: Mapping[str, Any],
        tensors: Iterable[tuple[str, Tensor | Box]],
        spared: Collection[int] = (),
    ) -> Checkpoint:
        """Write and commit a checkpoint, then remove those that are too many, but for steps ``spared``.

        Raises:
            UnmaskError: The file system refuses; earlier checkpoints stand.
        """
        with self._refusals(step):
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.folder))
            try:
                stored, files = _write_tensors(scratch, tensors, prefix=self._new_prefix())
                self._hand_over(step, scratch, files)
                manifest = CheckpointManifest(
                    format=FORMAT,
                    step=step,
                    state=state,
                    job=dict(job),
                    config=dict(config),
                    tensors=stored,
                    files=files,
                )
                checkpoint = self._commit(scratch, manifest)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            self._prune(step, spared)
        return checkpoint

    def save_shares(
        self,
        world: World,
        *,
        step: int,
        state: TrainingState,
        job: Mapping[str, Any],
        config: Mapping[str, Any],
        boxes: Iterable[tuple[str, Box]],
        spared: Collection[int] = (),
    ) -> Checkpoint | None:
        """Like :meth:`save`, but every process writes what it keeps; the leader commits and has the result.

        Raises:
            UnmaskError: The file system refuses one of them; earlier checkpoints stand.
        """
        scratch, checkpoint, prefix = self.folder, None, self._new_prefix()
        try:
            with world.together(), self._refusals(step):
                if world.leads:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.folder))
                    scratch.chmod(0o755)
            scratch = self.folder / world.all_bytes(scratch.name.encode())[0].decode()
            kept = [(name, box) for name, box in boxes if box.kept and box.tensor.numel()]
            with world.together(), self._refusals(step):
                self._have_scratch(scratch)
                stored, files = _write_tensors(scratch, kept, prefix=f"{prefix}rank-{world.rank:05d}-")
                self._hand_over(step, scratch, files)
            share = {
                "tensors": {name: tensor.model_dump(mode="json") for name, tensor in stored.items()},
                "files": {name: file.model_dump(mode="json") for name, file in files.items()},
            }
            shares = [json.loads(one) for one in world.all_bytes(json.dumps(share).encode())]
            with world.together(), self._refusals(step):
                if world.leads:
                    manifest = CheckpointManifest(
                        format=FORMAT,
                        step=step,
                        state=state,
                        job=dict(job),
                        config=dict(config),
                        tensors=_merged(shares),
                        files={
                            name: CheckpointFile.model_validate(file)
                            for one in shares
                            for name, file in one["files"].items()
                        },
                    )
                    checkpoint = self._commit(scratch, manifest)
            self._follow(world, scratch, checkpoint)
        finally:
            if world.leads and scratch != self.folder:
                shutil.rmtree(scratch, ignore_errors=True)
        with world.together(), self._refusals(step):
            if world.leads:
                self._prune(step, spared)
        return checkpoint

    def remove_leftovers(self) -> None:
        """Remove what writes that were cut off have left behind."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{_SCRATCH}*"):
                shutil.rmtree(path, ignore_errors=True)

    def remove_older(self, newest: int, spared: Collection[int] = ()) -> None:
        """Remove what a save of step ``newest`` would have removed, had it not been cut off before it did.

        Raises:
            UnmaskError: The file system refuses; no checkpoint that is kept is touched.
        """
        with self._refusals(newest):
            self._prune(newest, spared)

    def _new_prefix(self) -> str:
        """What the names of the next checkpoint's files begin with."""
        return ""

    def _have_scratch(self, scratch: Path) -> None:
        """Make sure that this process has the leader's temporary folder: all see the same."""

    def _hand_over(self, step: int, scratch: Path, files: Iterable[str]) -> None:
        """Bring what this process has written to where the commit expects it: it is there."""

    def _follow(self, world: World, scratch: Path, checkpoint: Checkpoint | None) -> None:
        """Do what a commit, which the leader has just done, asks of the other processes: nothing."""

    def _commit(self, scratch: Path, manifest: CheckpointManifest) -> Checkpoint:
        """Make the files in ``scratch`` a checkpoint."""
        path = self.folder / checkpoint_name(manifest.step)
        (scratch / MANIFEST).write_bytes(manifest.to_bytes())
        _sync(scratch / MANIFEST)
        _sync(scratch)
        scratch.chmod(0o755)
        if path.exists():  # damaged, or the run would not be at this step again
            shutil.rmtree(path)
        scratch.rename(path)
        _sync(self.folder)
        return Checkpoint(path, manifest)

    def _prune(self, newest: int, spared: Collection[int]) -> None:
        """Keep the newest of this run's history; later steps than ``newest`` can only be damaged ones."""
        committed = [step for step in self.steps() if step <= newest]
        for step in set(committed[: -self._keep_last]) - set(spared):
            shutil.rmtree(self.folder / checkpoint_name(step))

    _remedy = "make room or mend the volume"

    @contextmanager
    def _refusals(self, step: int) -> Iterator[None]:
        """Say of a refusal of what holds the files what it means."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UnmaskError(
                f"{self.place(step)}: cannot be written ({error}); {self._remedy}; earlier checkpoints stand"
            ) from error


def _merged(shares: Iterable[Mapping[str, Any]]) -> dict[str, StoredTensor]:
    """What all processes wrote: for each tensor, the parts of all."""
    merged: dict[str, Any] = {}
    for share in shares:
        for name, tensor in share["tensors"].items():
            merged.setdefault(name, {**tensor, "parts": []})["parts"].extend(tensor["parts"])
    return {name: StoredTensor.model_validate(tensor) for name, tensor in merged.items()}


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor | Box]], *, prefix: str = ""
) -> tuple[dict[str, StoredTensor], dict[str, CheckpointFile]]:
    stored: dict[str, StoredTensor] = {}
    files: dict[str, CheckpointFile] = {}
    for number, group in enumerate(_grouped(tensors)):
        name = f"{prefix}shard-{number:05d}.safetensors"
        host = {key: box.tensor.detach().cpu().contiguous() for key, box in group.items()}
        save_file(host, folder / name)
        _sync(folder / name)
        files[name] = CheckpointFile(size=(folder / name).stat().st_size, sha256=_sha256(folder / name))
        for key, tensor in host.items():
            box = group[key]
            part = Part(file=name, offsets=list(box.offsets), shape=list(tensor.shape))
            shape = list(box.shape)
            # Not validated: the other parts may be with other processes.
            stored[key] = StoredTensor.model_construct(dtype=_DTYPES[tensor.dtype], shape=shape, parts=[part])
    return stored, files


def _grouped(tensors: Iterable[tuple[str, Tensor | Box]]) -> Iterator[dict[str, Box]]:
    """Consecutive tensors of at most ``_MAX_FILE_BYTES`` together; a larger one stands alone."""
    group: dict[str, Box] = {}
    size = 0
    for name, given in tensors:
        box = given if isinstance(given, Box) else Box.whole(given)
        if group and size + box.tensor.nbytes > _MAX_FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = box
        size += box.tensor.nbytes
    if group:
        yield group


class CheckpointFiles:
    """The safetensors files of one checkpoint, opened when first needed."""

    def __init__(self, folder: Path, fetch: Callable[[str], None] | None = None) -> None:
        """Read from ``folder``, to which ``fetch`` brings a file; a context manager."""
        self._folder, self._fetch = folder, fetch
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)

    def fill(self, name: str, entry: StoredTensor, box: Box) -> None:
        """Copy into ``box`` what it is of the tensor ``name``, from the parts in which that is stored."""
        for part in entry.parts:
            met = overlap(part.offsets, part.shape, box.offsets, box.tensor.shape)
            if met is not None:
                box.tensor[met[1]].copy_(self._tensor(part.file, name, met[0]))

    def _tensor(self, file: str, name: str, part: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._open:
                if self._fetch is not None:
                    self._fetch(file)
                self._open[file] = safe_open(self._folder / file, framework="pt", device="cpu").__enter__()
            tensor: Tensor = (
                self._open[file].get_slice(name)[part] if part else self._open[file].get_tensor(name)
            )
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
