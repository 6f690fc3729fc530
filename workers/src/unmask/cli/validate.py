"""``unmask validate FILE...``: would a cluster take these manifests?"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.errors import ModelError, UnmaskError, UsageError

if TYPE_CHECKING:
    from unmask_api.inference_service import DiffusionInferenceService
    from unmask_api.train_job import DiffusionTrainJob

__all__ = ["command", "read_job", "read_manifest"]


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
            click.echo(f"{path}: {_checked(path)}")
        except UnmaskError as error:
            click.echo(f"error: {error}", err=True)
            code = code or error.exit_code
    context.exit(code)


def read_job(path: Path) -> "DiffusionTrainJob":
    """Read and admit the job at ``path``; an inline model config is checked too."""
    from unmask_operator.launch.admission import read_manifest

    return _with_model(path, read_manifest(path))


def read_manifest(path: Path) -> "DiffusionTrainJob | DiffusionInferenceService":
    """Read and admit the manifest at ``path``, of whichever kind; an inline model config is checked too."""
    from unmask_api.train_job import DiffusionTrainJob
    from unmask_operator.launch.admission import read_any

    manifest = read_any(path)
    return _with_model(path, manifest) if isinstance(manifest, DiffusionTrainJob) else manifest


def _checked(path: Path) -> str:
    """Sum up the manifest at ``path``, of whichever kind, once it is admitted."""
    from unmask_api.train_job import DiffusionTrainJob

    manifest = read_manifest(path)
    return summary(manifest) if isinstance(manifest, DiffusionTrainJob) else _summary_of_service(manifest)


def _with_model(path: Path, job: "DiffusionTrainJob") -> "DiffusionTrainJob":
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


def _summary_of_service(service: "DiffusionInferenceService") -> str:
    """Say in a line what ``service`` will be made of."""
    groups, shards = service.spec.replicas, service.spec.group.shards
    return (
        f"{service.kind} {service.metadata.name} is valid: {groups} group{'s' * (groups != 1)}"
        f" of an engine{f' and {shards} shard' if shards else ''}{'s' * (shards > 1)}"
    )
