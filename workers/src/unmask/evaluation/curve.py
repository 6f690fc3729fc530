"""Quality against tokens per forward: the same prompts, answered more and more boldly.

A lower confidence threshold, or fewer steps per block, fills more positions at a time and errs more.
The curve says how much of one buys how much of the other (LLaDA2.0, arXiv 2512.15745, section 7.2).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmask.errors import UsageError
from unmask.evaluation.subject import Subject
from unmask.training.encoding import Question
from unmask.training.evaluation import answer_measures, answer_sums

__all__ = ["Point", "curve", "draw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way of decoding, and what came of it."""

    threshold: float
    steps: int | None
    """Most forwards of a block; None: as many as it has positions."""
    samples: int
    exact_match: float
    token_error_rate: float
    tpf: float
    tpf_decode: float
    tpf_denoise: float
    tokens_per_second: float

    def to_json_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def curve(
    subject: Subject,
    questions: Sequence[Question],
    *,
    thresholds: Sequence[float],
    steps: Sequence[int] = (),
    max_new_tokens: int,
    block_length: int | None = None,
) -> list[Point]:
    """Answer ``questions`` once with each threshold, and once with each number of steps and no threshold.

    Raises:
        UsageError: The model is autoregressive, or a setting makes no sense.
    """
    if subject.model.causal:
        raise UsageError(f"{subject.name} is autoregressive: it has one token per forward, and no curve")
    if not questions:
        raise UsageError("the data ask nothing: a curve needs records of format completion or messages")
    settings: list[tuple[float, int | None]] = [(threshold, None) for threshold in thresholds]
    settings += [(2.0, count) for count in steps]  # a threshold that no probability surpasses
    points = []
    for threshold, count in settings:
        params = subject.params(
            max_new_tokens=max_new_tokens, threshold=threshold, steps=count, block_length=block_length
        )
        started = time.perf_counter()
        answers = subject.answer([asked.prompt for asked in questions], params)
        seconds = time.perf_counter() - started
        measured = answer_measures(answer_sums(questions, answers), causal=False)
        kept = sum(answer.kept_tokens for answer in answers)
        points.append(
            Point(
                threshold=threshold,
                steps=count,
                samples=len(questions),
                exact_match=measured["exact_match"],
                token_error_rate=measured["token_error_rate"],
                tpf=measured["tpf"],
                tpf_decode=measured["tpf_decode"],
                tpf_denoise=measured["tpf_denoise"],
                tokens_per_second=kept / seconds if seconds > 0 else 0.0,
            )
        )
    return points


def draw(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Draw the curve as a PNG at ``path``.

    Raises:
        UsageError: matplotlib is not there.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--picture needs matplotlib: install unmask[eval], or leave it out") from None
    matplotlib.use("agg")  # no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for label, chosen in (
        ("threshold", [point for point in points if point.steps is None]),
        ("steps per block", [point for point in points if point.steps is not None]),
    ):
        if chosen:
            ordered = sorted(chosen, key=lambda point: point.tpf_decode)
            axes.plot(
                [point.tpf_decode for point in ordered],
                [point.exact_match for point in ordered],
                "o-",
                label=label,
            )
            for point in ordered:
                told = f"{point.threshold:g}" if point.steps is None else str(point.steps)
                axes.annotate(
                    told,
                    (point.tpf_decode, point.exact_match),
                    textcoords="offset points",
                    xytext=(4, 4),
                )
    axes.set_xlabel("tokens per decoding forward")
    axes.set_ylabel("exact match")
    axes.set_ylim(0, 1.02)
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
