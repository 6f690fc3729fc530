"""``unmask train --job PATH``: one worker process of a training job, alone or under torchrun."""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.errors import UnmaskError, UsageError

if TYPE_CHECKING:
    from unmask_api.train_job import DiffusionTrainJob

__all__ = ["command"]


@click.command("train", short_help="Train: one worker process of a job.")
@click.option(
    "--job",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    help="The job's canonical JSON, with defaults and paths filled in.",
)
@click.pass_context
def command(context: click.Context, path: Path) -> None:
    """Train as one worker process of a job: alone, or one of many under torchrun.

    `unmask run` writes the job file from a manifest and starts the processes. The same command goes on from
    the newest checkpoint in the run folder. It ends with 0 when the job is complete, and with 75 when it was
    asked to stop by SIGTERM or Ctrl-C and has saved.
    """
    from unmask.training.distributed import rank_from_environment

    rank = rank_from_environment()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        context.exit(_train(_read_job(path), quiet=rank > 0))
    except UnmaskError as error:
        if rank == 0:
            raise
        context.exit(error.exit_code)  # the first process says what it is


def _read_job(path: Path) -> "DiffusionTrainJob":
    from pydantic import ValidationError

    from unmask_api.train_job import DiffusionTrainJob

    try:
        return DiffusionTrainJob.from_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--job: {path} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(
            f"{path}: {field}: {first['msg']}; `unmask run --dry-run` shows a job file as it should be"
        ) from None


def _train(job: "DiffusionTrainJob", *, quiet: bool) -> int:
    from unmask.cli.following import Follower
    from unmask.training.attempt import attempt
    from unmask_api.places import working_folder

    if quiet:
        return attempt(job).exit_code
    metrics = working_folder(job.spec.checkpoint.uri, os.environ) / "metrics.jsonl"
    with Follower(metrics, total_steps=job.spec.total_steps) as follower:
        termination = attempt(job, observe=lambda line: follower.update())
    click.echo(termination.message, file=sys.stdout)
    return termination.exit_code
