"""A picture of a run: loss over the steps of its stages, and how good the answers were along the way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # no display

from matplotlib import pyplot
from matplotlib.axes import Axes

SMOOTHED_OVER = 20
"""Steps."""


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the records of a ``metrics.jsonl`` as a PNG at ``path``."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True, layout="constrained")
    _draw_loss(above, records)
    _draw_answers(below, records)
    _mark_stages((above, below), records)
    below.set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """One line per stage: losses of different objectives do not compare."""
    for stage in _stages(records):
        steps = [one for one in records if one["kind"] == "step" and one["stage"] == stage]
        losses = [one["loss"] for one in steps]
        smooth = [
            sum(near) / len(near)
            for near in (losses[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(losses) + 1))
        ]
        axes.plot([one["step"] for one in steps], smooth)
    axes.set_ylabel("training loss, nats per token")
    axes.set_ylim(0, 3)


def _draw_answers(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    measured = [one for one in records if one["kind"] == "eval" and "exact_match" in one]
    axes.plot(
        [one["step"] for one in measured], [one["exact_match"] for one in measured], "o-", color="tab:blue"
    )
    axes.set_ylabel("exact match", color="tab:blue")
    axes.set_ylim(0, 1)
    with_tpf = [one for one in measured if "tpf_denoise" in one]
    beside = axes.twinx()
    beside.plot(
        [one["step"] for one in with_tpf], [one["tpf_denoise"] for one in with_tpf], "s-", color="tab:orange"
    )
    beside.set_ylabel("tokens per denoising forward", color="tab:orange")
    beside.set_ylim(bottom=0)


def _mark_stages(panels: Sequence[Axes], records: Sequence[Mapping[str, Any]]) -> None:
    for number, stage in enumerate(_stages(records)):
        steps = [one for one in records if one["kind"] == "step" and one["stage"] == stage]
        for axes in panels:
            axes.axvline(steps[0]["step"], color="lightgrey", linewidth=0.8, zorder=0)
        sizes = list(dict.fromkeys(one["block_size"] for one in steps))
        blocks = "" if steps[0]["block_size"] == 1 and len(sizes) == 1 else f"\nblocks {_range(sizes)}"
        middle = (steps[0]["step"] + steps[-1]["step"]) / 2
        height = 0.98 - 0.13 * (number % 2)  # neighbours of short stages do not overlap
        panels[0].text(
            middle, height, stage + blocks, transform=panels[0].get_xaxis_transform(), ha="center", va="top"
        )


def _range(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"


def _stages(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(one["stage"] for one in records if one["kind"] == "step"))
