"""Training in which some documents make bad gradients, and what it must come to, said without that."""

import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.ranks import redirect, start
from unmask.errors import UnmaskError
from unmask_api.train_job import DiffusionTrainJob

Span = tuple[int, int]


def start_faulty(
    job: DiffusionTrainJob, bad: Mapping[int, Span], *, ranks: int = 1, kind: str = "nan"
) -> list[BaseProcess]:
    """Start ranks; a step of stage ``s`` that begins with a document in ``bad[s]`` has a bad gradient.

    Its kind is ``nan``, ``spike`` (a thousand times as long), or what should come of it: ``left out`` (the
    step is computed, and changes nothing), ``jumped`` (the documents are not in the stream).
    """
    text = job.model_dump_json(by_alias=True, exclude_none=True)
    return start(_faulty, text, dict(bad), kind, ranks=ranks)


def _faulty(text: str, bad: Mapping[int, Span], kind: str) -> None:
    from unmask.training.attempt import attempt
    from unmask.training.learner import Learner
    from unmask.training.stream import DocumentStream

    job = DiffusionTrainJob.from_json(text)
    redirect(2, Path(f"{job.spec.checkpoint.uri}.rank-{os.environ['RANK']}.log"))
    is_bad = False
    lay_out: Callable[..., Any] = DocumentStream.step
    norm: Callable[..., float] = Learner.gradient_norm
    step: Callable[..., None] = Learner.step

    def watched(self: DocumentStream, cursor: int, **values: Any) -> Any:
        nonlocal is_bad
        first, end = bad.get((self._key >> 96) & 0xFF, (0, 0))
        is_bad = first <= cursor < end
        return lay_out(self, cursor + (end - first if kind == "jumped" and cursor >= first else 0), **values)

    def spoilt(self: Learner, totals: Any) -> float:
        if is_bad and kind in {"nan", "spike"}:
            self.weights.gradient.mul_(float("nan") if kind == "nan" else 1000.0)
        return norm(self, totals)

    def left_out(self: Learner, *values: Any, **options: Any) -> None:
        if is_bad and kind == "left out":
            self.weights.changed()
        else:
            step(self, *values, **options)

    DocumentStream.step = watched  # type: ignore[method-assign]
    Learner.gradient_norm = spoilt  # type: ignore[method-assign]
    Learner.step = left_out  # type: ignore[method-assign]
    try:
        sys.exit(attempt(job).exit_code)
    except UnmaskError as error:
        sys.exit(error.exit_code)
