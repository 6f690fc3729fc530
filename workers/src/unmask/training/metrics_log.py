"""``metrics.jsonl``: one JSON object per line, no step missing and none twice.

Lines are flushed as they are written, and synced before a checkpoint is committed. A run
that resumes from step N first cuts the log back to step N: what was logged later is
computed, and logged, again. Floats are written so that they read back bit for bit.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from unmask.errors import UnmaskError

__all__ = ["MetricsLog"]


class MetricsLog:
    """The log of one run, open for appending."""

    def __init__(self, path: Path, *, step: int) -> None:
        """Cut the log at ``path`` back to lines of at most step ``step``, and go on from there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        _cut_back(path, step)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, which has at least ``kind`` and ``step``.

        Raises:
            UnmaskError: There is no room for it.
        """
        with self._refusals():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def cut_back(self, step: int) -> None:
        """Forget lines of later steps than ``step``."""
        self._file.close()
        _cut_back(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Make all lines survive a loss of power."""
        with self._refusals():
            os.fsync(self._file.fileno())

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnmaskError(
                f"{self._path}: cannot be written ({error.strerror}); make room or mend the volume; the run "
                "goes on from its newest checkpoint"
            ) from error


def _cut_back(path: Path, step: int) -> None:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return
    kept = [line for line in lines if _step_of(line) <= step]
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _step_of(line: str) -> float:
    """The step of a line; infinite if the line is not whole, as the last one of a killed process may be."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
