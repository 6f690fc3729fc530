"""``unmask ps``: the training jobs and the services of a cluster."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from unmask.cli import job_report, service_report
from unmask.cli.cluster import as_json, cluster_options, connected, output_option, table

if TYPE_CHECKING:
    from unmask_operator.client import InferenceService, TrainJob

__all__ = ["command"]

View = TypeVar("View", "TrainJob", "InferenceService")


@click.command("ps", short_help="List the training jobs and services of a cluster.")
@cluster_options
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@output_option
def command(
    namespace: str | None, cluster: str | None, kubeconfig: Path | None, all_namespaces: bool, output: str
) -> None:
    """List the training jobs and the services of a cluster, whoever submitted them, the newest last."""
    there = connected(namespace, cluster, kubeconfig)
    found = there.list(all_namespaces=all_namespaces)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if output == "json":
        click.echo(as_json([one.to_json_dict() for one in (*found.jobs, *found.services)]))
        return
    now = datetime.datetime.now(datetime.UTC)
    tables = [
        *_listed(found.jobs, job_report.HEADINGS, job_report.row, now, wide=all_namespaces),
        *_listed(found.services, service_report.HEADINGS, service_report.row, now, wide=all_namespaces),
    ]
    if tables:
        click.echo("\n\n".join(tables))
    elif not found.notes:
        place = "any namespace" if all_namespaces else f"namespace {there.jobs.namespace}"
        click.echo(f"no training jobs and no services in {place}", err=True)


def _listed(
    found: Sequence[View],
    headings: Sequence[str],
    row: Callable[[View, datetime.datetime], list[str]],
    now: datetime.datetime,
    *,
    wide: bool,
) -> list[str]:
    """Return a table of what was found, with namespaces where it is ``wide``; none of nothing."""
    if not found:
        return []
    rows = []
    for one in found:
        place = [one.namespace] if wide else []
        rows.append(place + row(one, now))
    return [table((*(("NAMESPACE",) if wide else ()), *headings), rows)]
