"""What the commands for a cluster say of a training job: pure functions from the job to text."""

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING

from unmask.cli.cluster import age, named, section

if TYPE_CHECKING:
    from unmask_operator.client import TrainJob

__all__ = ["HEADINGS", "after_cancelling", "after_submitting", "description", "row", "standing"]

HEADINGS = ("NAME", "STATE", "STEP", "LOSS", "LEFT", "RESTARTS", "NODES", "AGE")
"""Columns of a list."""


def row(job: "TrainJob", now: datetime.datetime) -> list[str]:
    """Return a line of the list, entry by entry."""
    from unmask.cli.following import duration

    status = job.status
    progress, nodes = status.progress, status.nodes
    left = progress.estimated_remaining_seconds if progress else None
    return [
        job.name,
        str(job.state),
        f"{progress.step}/{progress.total_steps}" if progress else "",
        (progress.loss or "") if progress else "",
        duration(left) if left else "",
        str(status.restarts),
        f"{nodes.ready}/{nodes.desired}" if nodes else "",
        age(job.created, now),
    ]


def description(job: "TrainJob", now: datetime.datetime) -> Iterator[str]:
    """Yield what there is to say of a job, but for its conditions, pods and events."""
    yield from _facts(job, now)
    yield from _failure(job)
    yield from _history(job)


def standing(job: "TrainJob") -> str:
    """Say in a line how far a job is."""
    progress = job.status.progress
    steps = f", step {progress.step}/{progress.total_steps}" if progress else ""
    loss = f", loss {progress.loss}" if progress and progress.loss else ""
    return f"{job.name}: {job.state}{steps}{loss}"


def after_submitting(job: "TrainJob", *, dry_run: bool) -> str:
    """Say what became of a submission."""
    name = named(job)
    if dry_run:
        return f"{name}: the cluster takes it; nothing was kept"
    if job.state == "Submitted":
        return f"{name} is submitted; follow it: unmask logs --follow {job.name} --namespace {job.namespace}"
    return f"{name} is {job.state}; unmask describe {job.name} --namespace {job.namespace} says more"


def after_cancelling(before: "TrainJob", *, delete: bool, dry_run: bool) -> str:
    """Say what became of a job that was as ``before``."""
    would = " (nothing was changed: --dry-run)" if dry_run else ""
    if delete:
        return f"{named(before)} is deleted; its run folder stays{would}"
    if before.state.ended:
        return f"{named(before)} has ended already: it is {before.state}"
    return f"{named(before)} is cancelled; its pods save and end{would}"


def _facts(job: "TrainJob", now: datetime.datetime) -> Iterator[str]:
    from unmask.cli.following import duration

    status, spec = job.status, job.raw["spec"]
    yield f"{named(job)}: {job.state}, submitted {age(job.created, now) or 'just now'} ago"
    stages = ", ".join(f"{stage['name']} ({stage['objective']})" for stage in spec["stages"])
    yield f"stages: {stages}"
    yield f"run folder: {spec['checkpoint']['uri']}"
    if progress := status.progress:
        parts = [f"step {progress.step} of {progress.total_steps}"]
        parts += [f"stage {progress.stage}"] if progress.stage else []
        parts += [f"loss {progress.loss}"] if progress.loss else []
        parts += [f"{progress.tokens_per_second} tokens/s"] if progress.tokens_per_second else []
        left = progress.estimated_remaining_seconds
        parts += [f"{duration(left)} left"] if left else []
        yield f"progress: {', '.join(parts)}"
    if checkpoint := status.checkpoint:
        yield f"checkpoint: step {checkpoint.latest_step}, {checkpoint.latest_uri}"
    if nodes := status.nodes:
        yield f"nodes: {nodes.ready} of {nodes.desired} ready"
    yield f"attempt: {status.attempt}, restarts: {status.restarts} ({status.restarts_counted} counted)"


def _failure(job: "TrainJob") -> Iterator[str]:
    if (failure := job.status.failure) is None:
        return
    where = "".join(
        f", {what} {value}"
        for what, value in (("pod", failure.pod), ("machine", failure.node), ("exit code", failure.exit_code))
        if value is not None
    )
    yield f"last failure: {failure.reason} in attempt {failure.attempt}{where}: {failure.message}"


def _history(job: "TrainJob") -> Iterator[str]:
    rows = [
        [
            str(one.attempt),
            one.reason,
            f"{one.from_step or 0}-{one.to_step}" if one.to_step is not None else "",
            one.end_time or "",
        ]
        for one in job.status.history
    ]
    yield from section("attempts that ended", ("ATTEMPT", "REASON", "STEPS", "ENDED"), rows)
