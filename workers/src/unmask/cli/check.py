"""``unmask check DIR``: does this machine compute what the reference computed?"""

from pathlib import Path

import click

from unmask.cli.local_path import LocalPath
from unmask.errors import ModelError

__all__ = ["command"]


@click.command("check", short_help="Compare a model's results here with recorded ones.")
@click.argument("folder", type=LocalPath(), metavar="DIR")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
def command(folder: Path, device: str) -> None:
    """Compare a model's results here with recorded ones.

    DIR holds config.json, weights and golden.safetensors (docs/how-to/check-a-machine.md). Every vector in it
    is run and its largest difference printed; exit code 1 if any is too large.
    """
    from unmask.serving.selfcheck import TOLERANCE, run_checks

    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    results = []
    for result in run_checks(folder, device=device):
        click.echo(f"{'ok  ' if result.passed else 'MISS'}  {result.name}: {result.detail}")
        results.append(result)
    missed = sum(not result.passed for result in results)
    click.echo(
        f"{len(results) - missed} of {len(results)} agree with the reference (logits within {TOLERANCE:g})"
    )
    if missed:
        raise SystemExit(1)
