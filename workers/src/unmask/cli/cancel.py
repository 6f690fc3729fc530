"""``unmask cancel NAME``: stop a job on a cluster, and keep or delete it."""

from pathlib import Path

import click

from unmask.cli.cluster import as_json, cluster_options, connected, output_option

__all__ = ["command"]


@click.command("cancel", short_help="Stop a job on a cluster.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@cluster_options
@click.option("--delete", is_flag=True, help="Delete the job as well, with its status, pods and logs.")
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
    """Stop jobs on a cluster: their pods save a checkpoint and end.

    A cancelled job stays, with its status, until it is deleted; `unmask submit` with the same manifest lets
    it go on from its last checkpoint. Checkpoints and models stay in any case. A job that has ended stays as
    it is.
    """
    jobs = connected(namespace, cluster, kubeconfig)
    told = []
    for name in names:
        before = jobs.get(name)
        job = (jobs.delete if delete else jobs.cancel)(name, dry_run=dry_run)
        told.append(job.to_json_dict())
        if output == "text":
            would = " (nothing was changed: --dry-run)" if dry_run else ""
            if delete:
                click.echo(f"{job.namespace}/{name} is deleted; its run folder stays{would}")
            elif before.state.ended:
                click.echo(f"{job.namespace}/{name} has ended already: it is {before.state}")
            else:
                click.echo(f"{job.namespace}/{name} is cancelled; its pods save and end{would}")
    if output == "json":
        click.echo(as_json(told))
