"""``unmask plot RUN``: the curves of a training run as a picture."""

from pathlib import Path

import click

from unmask.cli.local_path import LocalPath

__all__ = ["command"]


@click.command("plot", short_help="Draw the curves of a training run.")
@click.argument("run", type=LocalPath(), metavar="RUN")
@click.option(
    "--output",
    type=LocalPath(),
    metavar="FILE.png",
    help="The picture to write; RUN/curves.png if left out.",
)
def command(run: Path, output: Path | None) -> None:
    """Draw the log of the run folder RUN, which may still be running, as a PNG.

    Loss by stage with the held-out loss, loss by the ratio of masks, gradient norm, speed, and what the time
    of a step goes to; steps that were skipped are marked. See docs/how-to/watch-and-recover-a-run.md.
    """
    from unmask.training.curves import draw
    from unmask.training.run_folder import RunFolder

    path = output or run / "curves.png"
    draw(RunFolder(run), path)
    click.echo(f"wrote {path}")
