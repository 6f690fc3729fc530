"""``unmask describe NAME``: how a job or service on a cluster is, and what to do about it."""

import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unmask.cli import job_report, service_report
from unmask.cli.cluster import age, as_json, cluster_options, connected, output_option, section

if TYPE_CHECKING:
    from unmask_operator.client import InferenceService, TrainJob
    from unmask_operator.client.custom_objects import CustomObjects

__all__ = ["command"]

Json = dict[str, Any]
_EVENTS = 10
View = TypeVar("View", "TrainJob", "InferenceService")


@click.command("describe", short_help="Say how a job or service on a cluster is, and what to do about it.")
@click.argument("name")
@cluster_options
@output_option
def command(
    name: str, namespace: str | None, cluster: str | None, kubeconfig: Path | None, output: str
) -> None:
    """Say how a job or service on a cluster is, and what to do about it.

    Where both have the name, job/NAME and service/NAME tell them apart. The last line is the next step. The
    JSON form has the job or service itself, its pods, its events and the next step.
    """
    from unmask_operator.client import TrainJob, job_advice, service_advice

    there = connected(namespace, cluster, kubeconfig)
    one = there.find(name)
    now = datetime.datetime.now(datetime.UTC)
    if isinstance(one, TrainJob):
        pods, events, notes = _around(there.jobs, one)
        step, wrong = job_advice.next_step(one, pods, now=time.time()), job_advice.obstacle(one)
        facts, remedies = job_report.description(one, now), {}
    else:
        pods, events, notes = _around(there.services, one)
        step, wrong = service_advice.next_step(one, pods, now=time.time()), service_advice.obstacle(one)
        facts, remedies = service_report.description(one, now), service_report.remedies(one, pods)
    if output == "json":
        found = {one.noun: one.to_json_dict(), "pods": pods, "events": events, "nextStep": step}
        found |= {"whatToDo": remedies} if remedies else {}
        click.echo(as_json(found | ({"notes": notes} if notes else {})))
        return
    lines = [*facts, *_conditions(one, now)]
    lines += section("what to do", ("CONDITION", "STEP"), [[kind, text] for kind, text in remedies.items()])
    lines += [*_pods(pods), *_events(events, now)]
    lines += [f"note: {note}" for note in notes]
    lines += [f"in the way: {wrong}"] if wrong else []
    click.echo("\n".join([*lines, f"next step: {step}"]))


def _around(collection: "CustomObjects[View]", one: View) -> tuple[Sequence[Json], Sequence[Json], list[str]]:
    """Return pods, events, and what could not be asked: who may see one may still not see those."""
    from unmask_operator.client import NotAllowed

    found: dict[str, Sequence[Json]] = {"pods": (), "events": ()}
    notes = []
    for what, ask in (("pods", collection.pods), ("events", collection.events)):
        try:
            found[what] = ask(one)
        except NotAllowed as error:
            notes.append(str(error))
    return found["pods"], found["events"], notes


def _conditions(one: "TrainJob | InferenceService", now: datetime.datetime) -> Iterator[str]:
    rows = []
    for said in one.conditions:
        since = datetime.datetime.fromisoformat(said.last_transition_time)
        rows.append([said.type, said.status, said.reason, age(since, now), said.message])
    yield from section("conditions", ("TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"), rows)


def _pods(pods: Sequence[Json]) -> Iterator[str]:
    rows = [
        [
            pod["metadata"]["name"],
            str(pod.get("status", {}).get("phase", "")),
            str(pod.get("spec", {}).get("nodeName", "")),
        ]
        for pod in pods
    ]
    yield from section("pods", ("NAME", "PHASE", "MACHINE"), rows)


def _events(events: Sequence[Json], now: datetime.datetime) -> Iterator[str]:
    rows = []
    for one in events[-_EVENTS:]:
        stamp = (one.get("series") or {}).get("lastObservedTime") or one.get("eventTime")
        when = datetime.datetime.fromisoformat(stamp) if stamp else None
        rows.append([age(when, now), str(one.get("type")), str(one.get("reason")), str(one.get("note", ""))])
    yield from section("events", ("AGE", "TYPE", "REASON", "NOTE"), rows)
