"""The picture of the run: training loss, and the measurements on held-out data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # no display

from matplotlib import pyplot

SMOOTHED_OVER = 20
"""Steps."""


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the records of a ``metrics.jsonl`` as a PNG at ``path``: one colour per stage."""
    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    stages = list(dict.fromkeys(one["stage"] for one in records if one["kind"] == "step"))
    for number, stage in enumerate(stages):
        steps = [one for one in records if one["kind"] == "step" and one["stage"] == stage]
        measured = [one for one in records if one["kind"] == "eval" and one["stage"] == stage]
        colour = f"C{number}"
        axes.plot([one["step"] for one in steps], _smooth([one["loss"] for one in steps]), color=colour)
        axes.plot(
            [one["step"] for one in measured],
            [one["loss"] for one in measured],
            "o",
            color=colour,
            label=f"{stage}, blocks of {_sizes(steps)}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per masked token\n(line: training, points: held out)")
    axes.set_ylim(2, 8)
    axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _smooth(losses: Sequence[float]) -> list[float]:
    windows = (losses[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in windows]


def _sizes(steps: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(size) for size in dict.fromkeys(one["block_size"] for one in steps))
