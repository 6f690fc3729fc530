"""The log of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import UsageError
from unmask.training.exporting import ratio_ranges
from unmask.training.observation import BUCKETS
from unmask.training.run_folder import RunFolder

__all__ = ["Curve", "curves_of", "draw"]

Curve = tuple[list[int], list[float]]
"""Steps, and a value for each."""

_PHASES = ("data", "forward_backward", "reduce", "optimizer", "checkpoint")


def curves_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """What is drawn, by panel and by name; a value that is null or missing is left out."""
    panels: dict[str, dict[str, Curve]] = {
        name: {}
        for name in ("loss", "loss by ratio of masks", "gradient norm", "tokens/s", "seconds of a step")
    }

    def add(panel: str, name: str, line: Mapping[str, Any], value: float | None) -> None:
        if value is not None:
            steps, values = panels[panel].setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)

    for line in lines:
        if line["kind"] == "eval":
            add("loss", f"{line['stage']}, held out", line, line.get("loss"))
        if line["kind"] != "step":
            continue
        notes = line.get("telemetry", {})
        add("loss", line["stage"], line, None if "skipped" in line else line["loss"])
        for name, loss in zip(ratio_ranges(), notes.get("loss_by_ratio", [None] * BUCKETS), strict=True):
            add("loss by ratio of masks", name, line, loss)
        add("gradient norm", "skipped" if "skipped" in line else "taken", line, line["grad_norm"])
        add("tokens/s", "clean", line, notes.get("tokens_per_second"))
        add("tokens/s", "supervised", line, notes.get("supervised_tokens_per_second"))
        for phase in _PHASES:
            add("seconds of a step", phase, line, notes.get("seconds", {}).get(phase))
    return panels


def draw(folder: RunFolder, path: Path) -> None:
    """Write the curves of the run in ``folder`` to the PNG ``path``.

    Raises:
        UsageError: There is no log, no step in it, or no matplotlib; or ``path`` cannot be written.
    """
    panels = curves_of(list(folder.log_lines()))
    if not panels["loss"]:
        raise UsageError(f"{folder.metrics}: has no step yet; wait for the first one")
    try:
        import matplotlib
    except ImportError:
        raise UsageError("unmask plot needs matplotlib: install unmask[eval]") from None
    matplotlib.use("agg")  # no display
    from matplotlib import pyplot

    shown = {name: curves for name, curves in panels.items() if curves}
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(9, 2.6 * len(shown)), sharex=True, squeeze=False)
    for axis, (panel, curves) in zip(axes[:, 0], shown.items(), strict=True):
        for name, (steps, values) in curves.items():
            single = "held out" in name or name == "skipped"
            axis.plot(steps, values, "o" if single else "-", markersize=4, linewidth=1, label=name)
        axis.set_ylabel(panel)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper right")
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); name another --output") from error
    finally:
        pyplot.close(figure)
