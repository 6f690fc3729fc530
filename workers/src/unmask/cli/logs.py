"""``unmask logs [-f] NAME``: what a job's pods print."""

import datetime
import queue
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.cli.cluster import cluster_options, connected

if TYPE_CHECKING:
    from unmask_operator.client import Line

__all__ = ["command"]


def _since(context: click.Context, option: click.Parameter, value: str | None) -> datetime.datetime | None:
    if value is None:
        return None
    if not (found := re.fullmatch(r"([1-9][0-9]*)([smhd])", value)):
        raise click.BadParameter(f"got {value!r}; write an age such as 90s, 10m, 2h or 1d")
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)


@click.command("logs", short_help="Show what a job on a cluster prints.")
@click.argument("name")
@cluster_options
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended, through restarts.")
@click.option(
    "--node",
    "nodes",
    type=click.IntRange(0),
    multiple=True,
    help="Node whose log to show; may be repeated.  [default: 0, which tells of the whole job]",
)
@click.option("--all-nodes", is_flag=True, help="Show all nodes, each line behind the number of its node.")
@click.option(
    "--attempt", type=click.IntRange(0), help="Of this attempt alone.  [default: those that are there]"
)
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
    tail: int | None,
    since: datetime.datetime | None,
    timestamps: bool,
) -> None:
    """Show what a job on a cluster prints.

    With --follow it waits for pods that are not there yet, bridges broken connections, goes on with the next
    attempt where one fails, and ends when the job has. Logs go with their pods: those of an attempt that was
    replaced are gone.
    """
    jobs = connected(namespace, cluster, kubeconfig)
    if all_nodes:
        count = int(jobs.get(name).raw["spec"].get("parallelism", {}).get("nodes", 1))
        nodes = tuple(range(count))
    nodes = tuple(dict.fromkeys(nodes)) or (0,)
    sources = [
        jobs.logs(name, node=node, follow=follow, since=since, tail=tail, attempt=attempt) for node in nodes
    ]
    lines = (
        _together(sources) if follow and len(sources) > 1 else (one for source in sources for one in source)
    )
    for line in lines:
        stamp = f"{line.time.isoformat()} " if timestamps and line.time else ""
        click.echo((f"[{line.node}] " if len(nodes) > 1 else "") + stamp + line.text)


def _together(sources: "list[Iterator[Line]]") -> "Iterator[Line]":
    """Yield the lines of all sources as they come; an error in one of them ends it all."""
    found: queue.SimpleQueue[Line | BaseException | None] = queue.SimpleQueue()

    def read(source: "Iterator[Line]") -> None:
        try:
            for line in source:
                found.put(line)
            found.put(None)
        except BaseException as error:
            found.put(error)

    for source in sources:
        threading.Thread(target=read, args=(source,), daemon=True).start()
    left = len(sources)
    while left:
        match found.get():
            case None:
                left -= 1
            case BaseException() as error:
                raise error
            case line:
                yield line
