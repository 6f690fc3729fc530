"""Which steps are taken: a step whose loss or gradient is not finite, or far above the last ones, is not.

All here is a pure function of numbers that every process has alike, so all processes decide alike. What is
remembered of earlier steps is saved with a checkpoint: a run that goes on decides as one that was never
interrupted.

A gradient that is far off does more harm in one step than a thousand good ones mend, for AdamW's moments
remember it. PaLM (arXiv 2204.02311, section 5.1) went back to a checkpoint about 100 steps before a spike and
left out 200 to 500 batches, and saw no spike there again; we skip single steps first, and go back only where
that does not end it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from statistics import median

from unmask_api.train_job import Stability

__all__ = ["Past", "Verdict", "judge", "limit", "remember"]

_NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median distance from the median."""
_LEAST_SHARE = 0.01
"""Of the median: the least deviation, for a loss that hardly varies is not therefore unstable."""


class Verdict(Enum):
    """What becomes of a step."""

    TAKEN = "Taken"
    NOT_FINITE = "NotFinite"
    SPIKE = "Spike"


@dataclass(frozen=True, slots=True)
class Past:
    """What the next step is judged by."""

    losses: tuple[float, ...] = ()
    """Of the last steps of the stage that were taken, oldest first."""
    norms: tuple[float, ...] = ()
    """Gradient norms of the same steps."""
    skipped: int = 0
    """Steps skipped in a row up to here."""
    rollbacks: int = 0
    """Times that the run has gone back to a checkpoint."""

    def next_stage(self) -> "Past":
        """What the next stage knows: its losses are others."""
        return Past(rollbacks=self.rollbacks)

    def gone_back(self, rollbacks: int) -> "Past":
        """The past of a checkpoint to which the run has gone back."""
        return replace(self, skipped=0, rollbacks=rollbacks)


def judge(loss: float, norm: float, past: Past, policy: Stability) -> Verdict:
    """Whether to take a step.

    Args:
        loss: Of the step, over all processes.
        norm: Of its gradient, before clipping.
        past: The steps before it.
        policy: What the job says.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return Verdict.NOT_FINITE
    if len(past.losses) < policy.window:
        return Verdict.TAKEN
    deviations = float(policy.spike_deviations)
    pairs = ((loss, past.losses), (norm, past.norms))
    if any(value > limit(values[-policy.window :], deviations) for value, values in pairs):
        return Verdict.SPIKE
    return Verdict.TAKEN


def limit(values: Sequence[float], deviations: float) -> float:
    """The largest value that is no spike after ``values``."""
    middle = median(values)
    spread = _NORMAL * median(abs(value - middle) for value in values)
    return middle + deviations * max(spread, _LEAST_SHARE * abs(middle))


def remember(past: Past, verdict: Verdict, loss: float, norm: float, policy: Stability) -> Past:
    """The past after a step."""
    if verdict is not Verdict.TAKEN:
        return replace(past, skipped=past.skipped + 1)
    return replace(
        past,
        losses=(*past.losses, loss)[-policy.window :],
        norms=(*past.norms, norm)[-policy.window :],
        skipped=0,
    )
