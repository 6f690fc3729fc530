"""``unmask logs [-f] NAME``: what the pods of a job or a service print."""

import datetime
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unmask.cli.cluster import cluster_options, connected
from unmask.errors import UsageError

if TYPE_CHECKING:
    from unmask_operator.client import Cluster, PodLine, TrainJob

__all__ = ["command"]

Told = tuple[str, "PodLine"]
"""What stands before a line, and the line."""


def _since(context: click.Context, option: click.Parameter, value: str | None) -> datetime.datetime | None:
    if value is None:
        return None
    if not (found := re.fullmatch(r"([1-9][0-9]*)([smhd])", value)):
        raise click.BadParameter(f"got {value!r}; write an age such as 90s, 10m, 2h or 1d")
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)


@click.command("logs", short_help="Show what a job or a service on a cluster prints.")
@click.argument("name")
@cluster_options
@click.option(
    "-f", "--follow", is_flag=True, help="Go on until the job has ended, or the service is deleted."
)
@click.option(
    "--node",
    "nodes",
    type=click.IntRange(0),
    multiple=True,
    help="Node of a job; may be repeated.  [default: 0, which tells of the whole job]",
)
@click.option(
    "--all-nodes", is_flag=True, help="All nodes of a job, each line behind the number of its node."
)
@click.option(
    "--attempt", type=click.IntRange(0), help="This attempt of a job alone.  [default: those that are there]"
)
@click.option(
    "--role",
    "roles",
    type=click.Choice(["engine", "shard"]),
    multiple=True,
    help="Pods of a service; may be repeated.  [default: engine]",
)
@click.option(
    "--group",
    "groups",
    type=click.IntRange(0),
    multiple=True,
    help="Ordinal of a group of a service; may be repeated.  [default: all]",
)
@click.option("--pod", "pods", multiple=True, help="Pod of a service by its name; may be repeated.")
@click.option("--tail", type=click.IntRange(0), help="Only so many of the last lines of each pod.")
@click.option("--since", callback=_since, metavar="AGE", help="Only what is newer than this, such as 10m.")
@click.option("--timestamps", is_flag=True, help="Show when each line was written.")
def command(
    name: str,
    namespace: str | None,
    cluster: str | None,
    kubeconfig: Path | None,
    follow: bool,
    nodes: tuple[int, ...],
    all_nodes: bool,
    attempt: int | None,
    roles: tuple[str, ...],
    groups: tuple[int, ...],
    pods: tuple[str, ...],
    tail: int | None,
    since: datetime.datetime | None,
    timestamps: bool,
) -> None:
    """Show what a job or a service on a cluster prints.

    With --follow it waits for pods that are not there yet and bridges broken connections. Of a job it goes
    on with the next attempt where one fails, and ends when the job has; of a service it goes on through
    rollouts, each line behind the name of its pod. Logs go with their pods: those of an attempt or a group
    that was replaced are gone.

    Where a job and a service have the name, job/NAME and service/NAME tell them apart.
    """
    from unmask_operator.client import Choice, TrainJob

    there = connected(namespace, cluster, kubeconfig)
    one = there.find(name)
    of_jobs = {"--node": nodes, "--all-nodes": all_nodes, "--attempt": attempt is not None}
    of_services = {"--role": roles, "--group": groups, "--pod": pods}
    foreign = of_services if isinstance(one, TrainJob) else of_jobs
    if given := [option for option, value in foreign.items() if value]:
        other = "services" if isinstance(one, TrainJob) else "jobs"
        raise UsageError(f"{' and '.join(given)}: for {other} alone, and {one.name} is a {one.noun}")
    asked: dict[str, Any] = {"follow": follow, "since": since, "tail": tail}
    if isinstance(one, TrainJob):
        if all_nodes:
            nodes = tuple(range(int(one.raw["spec"].get("parallelism", {}).get("nodes", 1))))
        lines = _of_nodes(there, one, tuple(dict.fromkeys(nodes)) or (0,), asked | {"attempt": attempt})
    else:
        choice = Choice(roles=roles or Choice().roles, groups=groups, pods=pods)
        lines = ((f"[{line.pod}] ", line) for line in there.services.logs(one.name, choice, **asked))
    for mark, line in lines:
        stamp = f"{line.time.isoformat()} " if timestamps and line.time else ""
        click.echo(mark + stamp + line.text)


def _of_nodes(
    there: "Cluster", job: "TrainJob", nodes: Sequence[int], asked: dict[str, Any]
) -> "Iterator[Told]":
    """Yield the lines of nodes: one after the other, or as they come where they are followed."""
    from unmask_operator.client.logs import together

    sources = [there.jobs.logs(job.name, node=node, **asked) for node in nodes]
    if asked["follow"] and len(sources) > 1:
        waiting = [sources]
        lines = together(lambda: waiting.pop() if waiting else None)
    else:
        lines = (line for source in sources for line in source)
    for line in lines:
        yield (f"[{line.node}] " if len(nodes) > 1 else ""), line
