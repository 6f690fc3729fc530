"""``unmask data -f FILE``: encode the data of a job beforehand, and say what they hold."""

import json
import os
from pathlib import Path
from typing import Any

import click

from unmask.cli.run import volume_option
from unmask.cli.validate import read_job
from unmask.errors import UsageError

__all__ = ["command"]


@click.command("data", short_help="Encode the data of a job, and say what they hold.")
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path), help="The manifest.")
@volume_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per source.")
def command(path: Path, folders: dict[str, Path], as_json: bool) -> None:
    """Encode the data of a job, and say what they hold.

    Each source is read once and kept where the job will look for it, so that the job starts at once, and bad
    records come to light on a machine without GPUs. Documents, tokens and prompts are counted; `unmask plan
    --document-tokens N --prompt-tokens N` takes their means.
    """
    from unmask_operator.launch.volumes import resolve

    job = read_job(path)
    try:
        job = resolve(job, folders)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    from unmask.training.corpus import Library, cache_folder
    from unmask.training.model_copies import ModelCopies
    from unmask.training.plan import sources_of
    from unmask.training.preparation import starting_point

    config, tokenizer = starting_point(ModelCopies(job.spec, os.environ).described())
    library = Library(tokenizer, eos_token_id=config.eos_token_id, cache=cache_folder(job.spec))
    for stage in job.spec.stages:
        train, validation = sources_of(job.spec.data_of(stage))
        for use, sources in (("train", train), ("validation", validation)):
            for source in sources:
                found = library.tokens(source, turns=stage.supervise == "AllTurns")
                counts: dict[str, Any] = {
                    "stage": stage.name,
                    "use": use,
                    "source": str(source.path),
                    "documents": len(found.lengths),
                    "tokens": len(found.ids),
                    "mean_tokens": round(float(found.lengths.mean()), 1),
                    "mean_prompt_tokens": round(float(found.prompt_lengths.mean()), 1),
                    "longest": int(found.lengths.max()),
                }
                click.echo(json.dumps(counts) if as_json else _line(counts))


def _line(counts: dict[str, Any]) -> str:
    return (
        f"{counts['stage']}, {counts['use']}: {counts['source']}: {counts['documents']:,} documents of "
        f"{counts['tokens']:,} tokens, {counts['mean_tokens']} each on average "
        f"({counts['mean_prompt_tokens']} of them prompt), {counts['longest']:,} at most"
    )
