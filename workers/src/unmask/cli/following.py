"""Follows a run by its ``metrics.jsonl``: a progress bar, or plain lines where there is no terminal.

A resumed run may cut the file back to its checkpoint; the follower then reads it again from the start.
"""

import json
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

__all__ = ["Follower", "Tail", "duration"]

Record = dict[str, Any]
_PLAIN_EVERY_S = 5.0
_NOT_MEASURED = {"kind", "step", "stage", "seconds", "samples"}
_HEADINGS = {
    "loss": "held-out loss",
    "exact_match": "exact match",
    "token_error_rate": "token errors",
    "tpf": "TPF",
    "tpf_decode": "TPF decode",
    "tpf_denoise": "TPF denoise",
}
"""Measurements by their names in the log -> in the table."""


class Tail:
    """Reads the complete lines that were added to a JSON-lines file since it was last asked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Record]:
        """Return the new records; all of them again when the file has become shorter."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                complete = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        if complete:
            self._offset += len(complete) + 1
        return [json.loads(line) for line in complete.splitlines()]


class Follower:
    """A context in which ``update`` shows how far the run is; ``summary`` tells what each stage came to."""

    def __init__(self, path: Path, *, total_steps: int) -> None:
        self._tail = Tail(path)
        self._stages: dict[str, Record] = {}
        self._speeds: deque[float] = deque(maxlen=50)
        self._told = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID = self._progress.add_task("starting", total=total_steps, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self) -> None:
        """Take in what the trainer has written since the last call, and show it."""
        last = None
        for record in self._tail.read():
            match record["kind"]:
                case "step":
                    last = record
                    self._note(record, steps=record["stage_step"])
                    if "skipped" not in record:
                        self._note(record, loss=record["loss"])
                    self._speeds.append(record["seconds"])
                case "eval":
                    measured = {key: value for key, value in record.items() if key not in _NOT_MEASURED}
                    self._note(record, **{_HEADINGS.get(key, key): value for key, value in measured.items()})
                case "stage":
                    self._note(record, time=duration(record["seconds"]))
        if last:
            self._show(last)

    def _note(self, record: Record, **figures: Any) -> None:
        self._stages.setdefault(record["stage"], {}).update(figures)

    def _show(self, record: Record) -> None:
        left = (record["total_steps"] - record["step"]) * sum(self._speeds) / len(self._speeds)
        speed = record["tokens"] / max(record["seconds"], 1e-9)
        loss = "step skipped" if "skipped" in record else f"loss {record['loss']:.4f}"
        figures = f"{loss}  {speed:,.0f} tokens/s  {duration(left)} left"
        self._progress.update(
            self._task, description=record["stage"], completed=record["step"], figures=figures
        )
        if self._progress.disable and time.monotonic() - self._told >= _PLAIN_EVERY_S:
            self._told = time.monotonic()
            steps = f"step {record['step']}/{record['total_steps']}"
            click.echo(f"{record['stage']}  {steps}  {figures}", err=True)

    def summary(self) -> str:
        """Return a table of the stages: steps, time, and the last measurements."""
        names = list(dict.fromkeys(name for stage in self._stages.values() for name in stage))
        if not names:
            return ""
        names.sort(key="time".__eq__)  # behind the measurements, whatever stage had them first
        table = Table("stage", *names)
        for stage, values in self._stages.items():
            table.add_row(stage, *(_figure(values.get(name, "")) for name in names))
        console = Console(width=None if sys.stdout.isatty() else 110)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def duration(seconds: float) -> str:
    """Write a time as people say it, such as ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
