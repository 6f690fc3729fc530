"""``unmask ps``: the training jobs of a cluster."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.cli.cluster import age, as_json, cluster_options, connected, output_option, table

if TYPE_CHECKING:
    from unmask_operator.client import TrainJob

__all__ = ["command"]

_HEADINGS = ("NAME", "STATE", "STEP", "LOSS", "LEFT", "RESTARTS", "NODES", "AGE")


@click.command("ps", short_help="List the training jobs of a cluster.")
@cluster_options
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@output_option
def command(
    namespace: str | None, cluster: str | None, kubeconfig: Path | None, all_namespaces: bool, output: str
) -> None:
    """List the training jobs of a cluster, whoever submitted them, the newest last."""
    jobs = connected(namespace, cluster, kubeconfig)
    found = jobs.list(all_namespaces=all_namespaces)
    if output == "json":
        click.echo(as_json([job.to_json_dict() for job in found]))
        return
    if not found:
        place = "any namespace" if all_namespaces else f"namespace {jobs.namespace}"
        click.echo(f"no training jobs in {place}", err=True)
        return
    now = datetime.datetime.now(datetime.UTC)
    places = ("NAMESPACE",) if all_namespaces else ()
    rows = [[job.namespace, *_row(job, now)] if all_namespaces else _row(job, now) for job in found]
    click.echo(table((*places, *_HEADINGS), rows))


def _row(job: "TrainJob", now: datetime.datetime) -> list[str]:
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
