"""What a trainer's reports come to in the status."""

from unmask_operator.decision import JsonObject
from unmask_operator.launch.report import CheckpointReport, Report
from unmask_operator.times import stamp

__all__ = ["checkpoint", "percentage", "progress"]


def progress(report: Report, before: JsonObject, *, at: float) -> JsonObject:
    """Return ``status.progress`` after ``report``, which came ``at`` (seconds since 1970)."""
    moved = report.step != before.get("step") or "lastProgressTime" not in before
    left = None
    if report.seconds_per_step is not None:
        left = round(float(report.seconds_per_step) * max(0, report.total_steps - report.step))
    found = {
        "step": report.step,
        "totalSteps": report.total_steps,
        "stage": report.stage,
        "percentage": percentage(report.step, report.total_steps),
        "loss": report.loss,
        "learningRate": report.learning_rate,
        "tokensPerSecond": report.tokens_per_second,
        "estimatedRemainingSeconds": left,
        "lastProgressTime": stamp(at) if moved else before["lastProgressTime"],
        "lastReportTime": stamp(at),
    }
    return {key: value for key, value in found.items() if value is not None}


def checkpoint(found: CheckpointReport | None, before: JsonObject, *, at: float) -> JsonObject | None:
    """Return ``status.checkpoint`` after a report of ``found``; ``None`` where it tells of none."""
    if found is None:
        return None
    known = before
    if known.get("latestStep") != found.step:
        known = {"lastSavedTime": stamp(at)}
    return known | {"latestStep": found.step, "latestUri": found.uri}


def percentage(step: int, total: int) -> int:
    """Return how much is done, in percent, rounded down."""
    return min(100, step * 100 // total) if total else 0
