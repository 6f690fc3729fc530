"""``unmask merge SOURCE... TARGET``: the mean of several checkpoints of one model."""

from contextlib import ExitStack
from pathlib import Path

import click

from unmask.cli.local_path import LocalPath
from unmask.errors import UsageError

__all__ = ["command"]

_DTYPES = ("float32", "bfloat16", "float16")


@click.command("merge", short_help="Average checkpoints of one model.")
@click.argument("sources", type=LocalPath(), metavar="[SOURCE]...", nargs=-1)
@click.argument("target", type=LocalPath(), metavar="TARGET")
@click.option("--run", "run", type=LocalPath(), metavar="FOLDER", help="Choose from this run.")
@click.option("--best", type=click.IntRange(min=1), metavar="K", help="The K of least validation loss.")
@click.option("--stage", metavar="NAME", help="Of this stage of the run; the last measured one if left out.")
@click.option(
    "--companions",
    type=LocalPath(),
    metavar="FOLDER",
    help="The model folder whose tokenizer and generation defaults are copied.",
)
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the weights; the sources' if left out.")
@click.option(
    "--max-shard-bytes",
    type=click.IntRange(min=1),
    default=5_000_000_000,
    show_default=True,
    help="Of each weight file.",
)
def command(
    sources: tuple[Path, ...],
    target: Path,
    run: Path | None,
    best: int | None,
    stage: str | None,
    companions: Path | None,
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
    """Average checkpoints of one model into a new model folder, in little memory.

    Each SOURCE is a model folder (config.json and safetensors) or a checkpoint of a run
    (<run>/checkpoints/step-...); TARGET is the folder to write, which must not exist. Or, with --run
    and --best, the checkpoints of a run with the least validation loss are taken. The mean is plain: every
    parameter alike, in float32. See docs/how-to/merge-checkpoints.md.
    """
    import torch

    from unmask.models.checkpoint_files import Checkpoint, TensorSource
    from unmask.models.converting import companions_of
    from unmask.models.merging import merge, refuse_other_tokenizers
    from unmask.models.tokenizer import TOKENIZER_FILE
    from unmask.training.merging import checkpoint_paths, open_checkpoint, run_candidates
    from unmask.training.run_folder import RunFolder

    if (run is None) != (best is None) or (stage is not None and run is None):
        raise UsageError("--run and --best go together, and --stage with them")
    if bool(sources) == (run is not None):
        raise UsageError("give either checkpoints to merge, or --run and --best to choose them")
    if target.exists():
        raise UsageError(f"{target}: exists already; choose another folder, or remove it")
    if run is not None and best is not None:
        chosen = run_candidates(RunFolder(run), best=best, stage=stage)
        for candidate in chosen:
            click.echo(f"step {candidate.step}: validation loss {candidate.loss:.6f}")
        sources = tuple(checkpoint_paths(RunFolder(run), chosen))
    with ExitStack() as stack:
        opened: list[TensorSource] = []
        beside: list[tuple[Path, dict[str, bytes]]] = []
        for path in sources:
            if (path / "manifest.json").is_file():
                opened.append(stack.enter_context(open_checkpoint(path)))
            else:
                folder = stack.enter_context(Checkpoint(path))
                opened.append(folder)
                beside.append((path, companions_of(folder)))
        refuse_other_tokenizers(beside)
        files = next(
            (found for _, found in beside if TOKENIZER_FILE in found), beside[0][1] if beside else {}
        )
        like = companions or (run / "model" if run is not None and (run / "model").is_dir() else None)
        if like is not None:
            with Checkpoint(like) as folder:
                files = companions_of(folder)
        done = merge(
            opened,
            target,
            companions=files,
            dtype=None if dtype is None else getattr(torch, dtype),
            max_shard_bytes=max_shard_bytes,
        )
    click.echo(
        f"{target}: the mean of {len(sources)} x {done.config.architecture}, "
        f"{done.nbytes / 1e9:.2f} GB of weights"
    )
    if not files:
        click.echo("without a tokenizer: name a model folder that has it with --companions")
