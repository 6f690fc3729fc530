"""``unmask submit -f FILE``: a training job on a cluster, from the manifest that ``unmask run`` takes."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.cli.cluster import as_json, cluster_options, connected, output_option
from unmask.cli.validate import read_job

if TYPE_CHECKING:
    from unmask_operator.client import TrainJob

__all__ = ["command"]


@click.command("submit", short_help="Run a training job on a cluster.")
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path), help="The manifest.")
@cluster_options
@click.option("--wait", is_flag=True, help="Wait until the job has ended; exit code 1 where it failed.")
@click.option("--dry-run", is_flag=True, help="Have the cluster check the job and keep nothing.")
@output_option
@click.pass_context
def command(
    context: click.Context,
    path: Path,
    namespace: str | None,
    cluster: str | None,
    kubeconfig: Path | None,
    wait: bool,
    dry_run: bool,
    output: str,
) -> None:
    """Run a training job on a cluster.

    The manifest is checked here as the cluster would, then given to the cluster, whose operator runs it. The
    same manifest again finds the job that is there; one that was cancelled goes on from its last checkpoint.
    A job of that name with another spec is left alone, and the command fails.
    """
    manifest = read_job(path)
    jobs = connected(namespace, cluster, kubeconfig)
    job = jobs.submit(manifest, dry_run=dry_run)
    if wait and not dry_run:
        jobs = connected(job.namespace, cluster, kubeconfig)
        job = jobs.wait(job.name, observe=_Teller())
    click.echo(as_json(job.to_json_dict()) if output == "json" else _told(job, dry_run=dry_run))
    context.exit(1 if wait and job.state == "Failed" else 0)


def _told(job: "TrainJob", *, dry_run: bool) -> str:
    name = f"{job.namespace}/{job.name}"
    if dry_run:
        return f"{name}: the cluster takes it; nothing was kept"
    if job.state == "Submitted":
        return f"{name} is submitted; follow it: unmask logs --follow {job.name} --namespace {job.namespace}"
    return f"{name} is {job.state}; unmask describe {job.name} --namespace {job.namespace} says more"


class _Teller:
    """Says on stderr where the job stands, when that changes."""

    def __init__(self) -> None:
        self._told = ""

    def __call__(self, job: "TrainJob") -> None:
        progress = job.status.progress
        steps = f", step {progress.step}/{progress.total_steps}" if progress else ""
        loss = f", loss {progress.loss}" if progress and progress.loss else ""
        line = f"{job.name}: {job.state}{steps}{loss}"
        if line != self._told:
            self._told = line
            click.echo(line, err=True)
