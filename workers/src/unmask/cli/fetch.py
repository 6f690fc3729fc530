"""``unmask fetch URI TARGET``: a model or a checkpoint from an object store, verified."""

from pathlib import Path

import click

from unmask.cli.local_path import LocalPath

__all__ = ["command"]


@click.command("fetch", short_help="Copy a model or a run from an object store.")
@click.argument("uri", metavar="URI")
@click.argument("target", type=LocalPath(), metavar="TARGET")
def command(uri: str, target: Path) -> None:
    """Copy what is at URI, such as s3://bucket/run/model, into a new folder TARGET.

    URI is a model, a checkpoint or a whole run; its files are compared with the digests that it has of them.
    Keys come from the environment, as the store's own tools take them. See docs/how-to/use-object-stores.md.
    """
    from unmask.training.fetching import fetch

    done = fetch(uri, target)
    click.echo(f"{target}: {done.files} files, {done.nbytes / 1e6:.1f} MB, {done.verified} of them verified")
