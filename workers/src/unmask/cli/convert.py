"""``unmask convert SOURCE TARGET``: a checkpoint on disk becomes another one."""

import sys
from pathlib import Path

import click

from unmask.cli.local_path import LocalPath
from unmask.errors import UsageError

__all__ = ["command"]

_DTYPES = ("float32", "bfloat16", "float16")


@click.command("convert", short_help="Convert a checkpoint on disk.")
@click.argument("source", type=LocalPath(), metavar="SOURCE")
@click.argument("target", type=LocalPath(), metavar="TARGET")
@click.option(
    "--to", "architecture", metavar="ARCHITECTURE", help="Become this diffusion model, of the same shape."
)
@click.option("--mask-token", metavar="TOKEN", help="The mask: a special token, or a new name for its id.")
@click.option("--mask-token-id", type=click.IntRange(min=0), metavar="N", help="The mask's id.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the weights; the source's if left out.")
@click.option(
    "--layout",
    type=click.Choice(["split", "merged"]),
    default="split",
    show_default=True,
    help="Experts in one tensor each, or stacked as dFactory trains them.",
)
@click.option(
    "--max-shard-bytes",
    type=click.IntRange(min=1),
    default=5_000_000_000,
    show_default=True,
    help="Of each weight file.",
)
def command(
    source: Path,
    target: Path,
    architecture: str | None,
    mask_token: str | None,
    mask_token_id: int | None,
    dtype: str | None,
    layout: str,
    max_shard_bytes: int,
) -> None:
    """Convert a checkpoint on disk, with its tokenizer, in little memory.

    SOURCE is a folder with safetensors weights, or a GGUF file; TARGET is the folder to write, which must
    not exist. With --to, an autoregressive model becomes a diffusion model of the same shape, ready to be
    trained. See docs/how-to/convert-a-checkpoint.md.
    """
    import torch

    from unmask.models.converting import convert
    from unmask.models.mask_token import MaskChoice

    if architecture is None and (mask_token is not None or mask_token_id is not None):
        raise UsageError("--mask-token and --mask-token-id go with --to")
    done = convert(
        source,
        target,
        architecture=architecture,
        mask=None if architecture is None else MaskChoice(token=mask_token, token_id=mask_token_id),
        dtype=None if dtype is None else getattr(torch, dtype),
        layout="merged" if layout == "merged" else "split",
        max_shard_bytes=max_shard_bytes,
        progress=_show_progress if sys.stderr.isatty() else _show_nothing,
    )
    mask = "" if done.config.mask_token_id is None else f", mask {done.config.mask_token_id}"
    click.echo(f"{target}: {done.config.architecture}, {done.nbytes / 1e9:.2f} GB of weights{mask}")
    if done.ignored:
        click.echo(f"left out {done.ignored} tensors that {done.config.architecture} does not have")


def _show_progress(written: int, total: int) -> None:
    click.echo(f"\r{written / total:4.0%} of {total / 1e9:.2f} GB", err=True, nl=written == total)


def _show_nothing(written: int, total: int) -> None:
    """Where nobody watches."""
