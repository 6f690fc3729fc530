"""``unmask describe NAME``: how a job on a cluster is, and what to do about it."""

import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unmask.cli.cluster import age, as_json, cluster_options, connected, output_option, table

if TYPE_CHECKING:
    from unmask_operator.client import TrainJob, TrainJobs

__all__ = ["command"]

Json = dict[str, Any]
_EVENTS = 10


@click.command("describe", short_help="Say how a job on a cluster is, and what to do about it.")
@click.argument("name")
@cluster_options
@output_option
def command(
    name: str, namespace: str | None, cluster: str | None, kubeconfig: Path | None, output: str
) -> None:
    """Say how a job on a cluster is, and what to do about it.

    The last line is the next step. The JSON form has the job itself, its pods, its events and the next step.
    """
    from unmask_operator.client.advice import next_step, obstacle

    jobs = connected(namespace, cluster, kubeconfig)
    job = jobs.get(name)
    pods, events, notes = _around(jobs, job)
    step = next_step(job, pods, now=time.time())
    if output == "json":
        found = {"job": job.to_json_dict(), "pods": pods, "events": events, "nextStep": step}
        click.echo(as_json(found | ({"notes": notes} if notes else {})))
        return
    now = datetime.datetime.now(datetime.UTC)
    lines = [*_facts(job, now), *_conditions(job, now), *_failure(job), *_history(job)]
    lines += [*_pods(pods), *_events(events, now)]
    lines += [f"note: {note}" for note in notes]
    lines += [f"in the way: {what}"] if (what := obstacle(job)) else []
    click.echo("\n".join([*lines, f"next step: {step}"]))


def _around(jobs: "TrainJobs", job: "TrainJob") -> tuple[Sequence[Json], Sequence[Json], list[str]]:
    """Return pods, events, and what could not be asked: who may see the job may still not see those."""
    from unmask_operator.client import NotAllowed

    found: dict[str, Sequence[Json]] = {"pods": (), "events": ()}
    notes = []
    for what, ask in (("pods", jobs.pods), ("events", jobs.events)):
        try:
            found[what] = ask(job)
        except NotAllowed as error:
            notes.append(str(error))
    return found["pods"], found["events"], notes


def _facts(job: "TrainJob", now: datetime.datetime) -> Iterator[str]:
    from unmask.cli.following import duration

    status, spec = job.status, job.raw["spec"]
    yield f"{job.namespace}/{job.name}: {job.state}, submitted {age(job.created, now) or 'just now'} ago"
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


def _conditions(job: "TrainJob", now: datetime.datetime) -> Iterator[str]:
    rows = []
    for one in job.status.conditions:
        since = datetime.datetime.fromisoformat(one.last_transition_time)
        rows.append([one.type, one.status, one.reason, age(since, now), one.message])
    yield from _section("conditions", ("TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"), rows)


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
    yield from _section("attempts that ended", ("ATTEMPT", "REASON", "STEPS", "ENDED"), rows)


def _pods(pods: Sequence[Json]) -> Iterator[str]:
    rows = [
        [
            pod["metadata"]["name"],
            str(pod.get("status", {}).get("phase", "")),
            str(pod.get("spec", {}).get("nodeName", "")),
        ]
        for pod in pods
    ]
    yield from _section("pods", ("NAME", "PHASE", "MACHINE"), rows)


def _events(events: Sequence[Json], now: datetime.datetime) -> Iterator[str]:
    rows = []
    for one in events[-_EVENTS:]:
        stamp = (one.get("series") or {}).get("lastObservedTime") or one.get("eventTime")
        when = datetime.datetime.fromisoformat(stamp) if stamp else None
        rows.append([age(when, now), str(one.get("type")), str(one.get("reason")), str(one.get("note", ""))])
    yield from _section("events", ("AGE", "TYPE", "REASON", "NOTE"), rows)


def _section(name: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        yield f"{name}:"
        yield from (f"  {line}" for line in table(headings, rows).splitlines())
