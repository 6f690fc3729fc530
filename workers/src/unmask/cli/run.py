"""``unmask run -f FILE``: a training job on this machine, from the manifest that a cluster takes."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unmask.cli.validate import read_job
from unmask.errors import UsageError

if TYPE_CHECKING:
    from unmask_api.train_job import DiffusionTrainJob

__all__ = ["command", "volume_option"]


def _folders(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    folders = {}
    for value in values:
        name, _, folder = value.partition("=")
        if not (name and folder):
            raise click.BadParameter(f"got {value!r}; write NAME=DIR, such as data=./data")
        folders[name] = Path(folder)
    return folders


volume_option = click.option(
    "--volume",
    "folders",
    multiple=True,
    metavar="NAME=DIR",
    callback=_folders,
    help="The folder that stands for pvc://NAME; once for each volume.",
)


@click.command("run", short_help="Run a training job on this machine.")
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path), help="The manifest.")
@volume_option
@click.option("--dry-run", is_flag=True, help="Print the application and the trainer's job file only.")
@click.pass_context
def command(context: click.Context, path: Path, folders: dict[str, Path], dry_run: bool) -> None:
    """Run a training job on this machine.

    The manifest is checked as a cluster would, its volumes are mapped to folders, and its processes run
    here. The same command continues a run that was stopped.
    """
    from unmask_operator.launch.volumes import resolve

    job = read_job(path)
    try:
        job = resolve(job, folders)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if dry_run:
        click.echo(_plan(job), nl=False)
    else:
        context.exit(_run(job))


def _run(job: "DiffusionTrainJob") -> int:
    from unmask.cli.following import Follower
    from unmask_api.places import working_folder
    from unmask_operator.launch import local

    uri = job.spec.checkpoint.uri
    folder = working_folder(uri, os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    with Follower(folder / "metrics.jsonl", total_steps=job.spec.total_steps) as follower:
        outcome = local.run(job, observe=follower.update)
    click.echo(follower.summary(), nl=False)
    if outcome.restarts:
        click.echo(f"restarts: {outcome.restarts}", err=True)
    if outcome.stopped:
        click.echo(f"stopped: {outcome.message}; the same command goes on from there", err=True)
    elif outcome.exit_code:
        click.echo(f"error: {outcome.message} (logs: {outcome.logs})", err=True)
    else:
        click.echo(f"{job.metadata.name} is complete: the model is in {uri.rstrip('/')}/model")
    return outcome.exit_code


def _plan(job: "DiffusionTrainJob") -> str:
    import json

    from unmask_operator import yaml_dialect
    from unmask_operator.launch.job_file import canonical
    from unmask_operator.launch.local import application

    app = _without_empty(asdict(application(job, Path("job.json"))))
    return yaml_dialect.dump({"application": app, "job.json": json.loads(canonical(job))})


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        parts = {key: _without_empty(child) for key, child in value.items()}
        return {key: child for key, child in parts.items() if child not in (None, "", [], {})}
    return [_without_empty(child) for child in value] if isinstance(value, list) else value
