"""Checkpoints of a run as sources of a mean, and which of them a run's own measurements prefer.

A checkpoint of a run can be chosen only if the loss on validation data was measured at the very step
at which it was taken. Losses of different stages are not compared: they are of different objectives.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmask.errors import ModelError, UsageError
from unmask.models.checkpoint_files import slots_of
from unmask.models.config import ModelConfig
from unmask.models.registry import parse_config
from unmask.models.slots import Slot
from unmask.models.tensor_file import PIECE_BYTES, StoredTensor
from unmask.models.tensor_pieces import DTYPES, as_bytes
from unmask.training.boxes import Box, region
from unmask.training.checkpoints import Checkpoint, CheckpointFiles, CheckpointStore, checkpoint_name
from unmask.training.run_folder import RunFolder

__all__ = [
    "Candidate",
    "RunCheckpoint",
    "best_of",
    "checkpoint_paths",
    "losses_of",
    "open_checkpoint",
    "run_candidates",
]


class RunCheckpoint:
    """The model in a run's checkpoint, as a source of tensors; a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open ``checkpoint``, whose files are taken to be verified."""
        self.path: Path = checkpoint.path
        self.config: ModelConfig = parse_config(checkpoint.manifest.config, source=f"{self.path}: config")
        self._stored = checkpoint.manifest.tensors
        self._files = CheckpointFiles(self.path)
        self._slots: dict[str, Slot] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for slot in slots_of(self.config):
            entry = self._stored.get(f"model.{slot.parameter}")
            if entry is not None:
                self._slots[slot.name] = slot
                self.tensors[slot.name] = StoredTensor(slot.name, entry.dtype, slot.shape)

        if not self.tensors:
            raise UsageError(
                f"{self.path}: holds adapters alone (spec.lora), which have no mean; merge exported models"
            )

    def __enter__(self) -> "RunCheckpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def file_of(self, name: str) -> Path:
        """The file that holds the first part of the tensor."""
        return self.path / self._stored[f"model.{self._slots[name].parameter}"].parts[0].file

    def pieces(self, name: str) -> Iterator[bytearray]:
        """The tensor's elements in order, some of its rows at a time."""
        slot = self._slots[name]
        entry = self._stored[f"model.{slot.parameter}"]
        offsets, shape = region(slot, tuple(entry.shape))
        axis = next((place for place, size in enumerate(shape) if size > 1), 0)
        step = max(1, PIECE_BYTES * shape[axis] // self.tensors[name].nbytes)
        for first in range(0, shape[axis], step):
            part, at = list(shape), list(offsets)
            part[axis], at[axis] = min(step, shape[axis] - first), offsets[axis] + first
            box = Box(torch.empty(part, dtype=DTYPES[entry.dtype]), tuple(entry.shape), tuple(at))
            self._files.fill(f"model.{slot.parameter}", entry, box)
            yield bytearray(as_bytes(box.tensor))


def open_checkpoint(path: Path) -> RunCheckpoint:
    """Open and verify the checkpoint in the folder ``path`` (``<run>/checkpoints/step-...``).

    Raises:
        ModelError: It is damaged.
    """
    number = path.name.removeprefix("step-")
    try:
        if not number.isdecimal():
            raise ValueError("not the folder of a step")
        checkpoint = CheckpointStore(path.parent, keep_last=1).open(int(number))
        checkpoint.verify()
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: damaged: {error}") from None
    return RunCheckpoint(checkpoint)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A committed checkpoint and what its model measured."""

    step: int
    loss: float


def losses_of(lines: Iterable[Mapping[str, Any]], stage: str) -> dict[int, float]:
    """The finite validation losses of ``stage`` by step, from the entries of a run's log."""
    found = {
        int(line["step"]): float(line["loss"])
        for line in lines
        if line["kind"] == "eval"
        and line["stage"] == stage
        and line["loss"] is not None  # not finite, in JSON
    }
    return {step: loss for step, loss in found.items() if math.isfinite(loss)}


def best_of(losses: Mapping[int, float], count: int) -> list[int]:
    """The ``count`` steps of least loss, the later of two alike; in the order of steps."""
    return sorted(sorted(losses, key=lambda step: (losses[step], -step))[:count])


def run_candidates(run: RunFolder, *, best: int, stage: str | None = None) -> list[Candidate]:
    """The ``best`` checkpoints of a run by validation loss, in the order of steps.

    Args:
        run: The run folder.
        best: How many.
        stage: Of this stage; left out, of the last one that was measured.

    Raises:
        UsageError: There are fewer that were measured.
    """
    lines = list(run.log_lines())
    measured = list(dict.fromkeys(str(line["stage"]) for line in lines if line["kind"] == "eval"))
    if not measured or (stage is not None and stage not in measured):
        raise UsageError(
            f"{run.path}: no measurement of {f'stage {stage}' if stage else 'any stage'}; measured are: "
            f"{', '.join(measured) or 'none'} (runs whose manifest has evaluation are measured)"
        )
    name = stage or measured[-1]
    committed = CheckpointStore(run.checkpoints, keep_last=1).steps()
    losses = {step: loss for step, loss in losses_of(lines, name).items() if step in committed}
    if len(losses) < best:
        raise UsageError(
            f"{run.path}: {len(losses)} checkpoints of stage {name} are there and measured, but {best} are "
            "to be merged; ask for fewer, or train with a higher checkpoint.keepLast and "
            "checkpoint.everySteps a multiple of evaluation.everySteps"
        )
    return [Candidate(step, losses[step]) for step in best_of(losses, best)]


def checkpoint_paths(run: RunFolder, candidates: Iterable[Candidate]) -> list[Path]:
    """Where ``candidates`` lie."""
    return [run.checkpoints / checkpoint_name(candidate.step) for candidate in candidates]
