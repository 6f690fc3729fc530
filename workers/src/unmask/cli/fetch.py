"""``unmask fetch URI TARGET``: a model or a checkpoint from an object store, verified."""

from pathlib import Path

import click

from unmask.cli.local_path import LocalPath

__all__ = ["command"]


@click.command("fetch", short_help="Copy a model or a run from an object store.")
@click.argument("uri", metavar="URI")
@click.argument("target", type=LocalPath(), metavar="TARGET")
@click.option("--if-missing", is_flag=True, help="Do nothing where TARGET is there: then it is whole.")
def command(uri: str, target: Path, if_missing: bool) -> None:
    """Copy what is at URI, such as s3://bucket/run/model, into a new folder TARGET.

    URI is a model, a checkpoint or a whole run; its files are compared with the digests that it has of them.
    Keys come from the environment, as the store's own tools take them. See docs/how-to/use-object-stores.md.
    """
    from unmask.training.fetching import fetch

    done = fetch(uri, target, if_missing=if_missing)
    if done is None:
        click.echo(f"{target}: is there")
        return
    click.echo(f"{target}: {done.files} files, {done.nbytes / 1e6:.1f} MB, {done.verified} of them verified")
