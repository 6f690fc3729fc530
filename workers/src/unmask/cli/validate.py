"""``unmask validate FILE...``: would a cluster take these manifests?"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.errors import ModelError, UnmaskError, UsageError

if TYPE_CHECKING:
    from unmask_api.train_job import DiffusionTrainJob

__all__ = ["command", "read_job"]


@click.command("validate", short_help="Check manifests as a cluster would.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.pass_context
def command(context: click.Context, files: tuple[Path, ...]) -> None:
    """Check manifests with the schema and the rules that a cluster applies.

    Each valid manifest is summed up in a line, each other one refused in a line that names the field.
    """
    code = 0
    for path in files:
        try:
            click.echo(f"{path}: {summary(read_job(path))}")
        except UnmaskError as error:
            click.echo(f"error: {error}", err=True)
            code = code or error.exit_code
    context.exit(code)


def read_job(path: Path) -> "DiffusionTrainJob":
    """Read and admit the manifest at ``path``; an inline model config is checked too."""
    from unmask_operator.launch.admission import read_manifest

    job = read_manifest(path)
    if job.spec.model.init.config is not None:
        from unmask.models.registry import parse_config

        try:
            parse_config(job.spec.model.init.config)
        except ModelError as error:
            raise UsageError(f"{path}: spec.model.init.config: {error}") from None
    return job


def summary(job: "DiffusionTrainJob") -> str:
    """Say in a line what ``job`` will do."""
    stages, steps = len(job.spec.stages), job.spec.total_steps
    return (
        f"{job.kind} {job.metadata.name} is valid: {stages} stage{'s' * (stages > 1)},"
        f" {steps} step{'s' * (steps > 1)}"
    )
