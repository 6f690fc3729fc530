"""``unmask submit -f FILE``: a training job or a service on a cluster, from its manifest."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.cli import job_report, service_report
from unmask.cli.cluster import as_json, cluster_options, connected, output_option
from unmask.cli.validate import read_manifest
from unmask.errors import UsageError

if TYPE_CHECKING:
    from unmask_operator.client import InferenceService, TrainJob

__all__ = ["command"]


@click.command("submit", short_help="Run a training job or a service on a cluster.")
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path), help="The manifest.")
@cluster_options
@click.option(
    "--wait",
    is_flag=True,
    help="Wait until the job has ended or the service has settled; exit code 1 where that went wrong.",
)
@click.option("--dry-run", is_flag=True, help="Have the cluster check it and keep nothing.")
@click.option(
    "--force-conflicts",
    is_flag=True,
    help="Take over fields of a service that others have set to something else.",
)
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
    force_conflicts: bool,
    output: str,
) -> None:
    """Run a training job or a service on a cluster.

    The manifest is checked here as the cluster would, then given to the cluster, whose operator runs it.

    The same manifest of a job again finds the job that is there; one that was cancelled goes on from its last
    checkpoint. A job of that name with another spec is left alone, and the command fails.

    A service becomes what its manifest says; one that was cancelled starts again. What others have set and
    the manifest does not name stays; where it says something else, the command fails.
    """
    from unmask_api.train_job import DiffusionTrainJob

    manifest = read_manifest(path)
    there = connected(namespace, cluster, kubeconfig)
    one: TrainJob | InferenceService
    if isinstance(manifest, DiffusionTrainJob):
        if force_conflicts:
            raise UsageError("--force-conflicts is for services: a job is never changed by submitting it")
        one = there.jobs.submit(manifest, dry_run=dry_run)
    else:
        one = there.services.submit(manifest, force=force_conflicts, dry_run=dry_run)
    if wait and not dry_run:
        there = connected(one.namespace, cluster, kubeconfig)
        one = there.of(one).wait(one.name, observe=_Teller())
    click.echo(as_json(one.to_json_dict()) if output == "json" else _told(one, dry_run=dry_run))
    context.exit(1 if wait and one.state in ("Failed", "Stuck") else 0)


def _told(one: "TrainJob | InferenceService", *, dry_run: bool) -> str:
    from unmask_operator.client import TrainJob

    if isinstance(one, TrainJob):
        return job_report.after_submitting(one, dry_run=dry_run)
    return service_report.after_submitting(one, dry_run=dry_run)


class _Teller:
    """Says on stderr where it stands, when that changes."""

    def __init__(self) -> None:
        self._told = ""

    def __call__(self, one: "TrainJob | InferenceService") -> None:
        from unmask_operator.client import TrainJob

        line = job_report.standing(one) if isinstance(one, TrainJob) else service_report.standing(one)
        if line != self._told:
            self._told = line
            click.echo(line, err=True)
