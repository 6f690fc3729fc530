"""``unmask cancel NAME``: stop a job or a service on a cluster, and keep or delete it."""

from pathlib import Path

import click

from unmask.cli import job_report, service_report
from unmask.cli.cluster import as_json, cluster_options, connected, output_option

__all__ = ["command"]


@click.command("cancel", short_help="Stop a job or a service on a cluster.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@cluster_options
@click.option("--delete", is_flag=True, help="Delete it as well, with its status, pods and logs.")
@click.option("--dry-run", is_flag=True, help="Have the cluster check it and change nothing.")
@output_option
def command(
    names: tuple[str, ...],
    namespace: str | None,
    cluster: str | None,
    kubeconfig: Path | None,
    delete: bool,
    dry_run: bool,
    output: str,
) -> None:
    """Stop jobs and services on a cluster.

    The pods of a job save a checkpoint and end; the engines of a service finish what they have begun, and
    end. What was cancelled stays, with its status, until it is deleted; `unmask submit` with the same
    manifest lets a job go on from its last checkpoint, and starts a service. Checkpoints and models stay in
    any case. A job that has ended stays as it is.

    Where a job and a service have the name, job/NAME and service/NAME tell them apart.
    """
    from unmask_operator.client import TrainJob

    there = connected(namespace, cluster, kubeconfig)
    told = []
    for name in names:
        before = there.find(name)
        collection = there.of(before)
        after = (collection.delete if delete else collection.cancel)(before.name, dry_run=dry_run)
        told.append(after.to_json_dict())
        if output == "json":
            continue
        if isinstance(before, TrainJob):
            click.echo(job_report.after_cancelling(before, delete=delete, dry_run=dry_run))
        else:
            click.echo(service_report.after_cancelling(before, delete=delete, dry_run=dry_run))
    if output == "json":
        click.echo(as_json(told))
