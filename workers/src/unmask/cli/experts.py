"""``unmask experts``: what expert shards hold, and moving to another placement while servers work."""

from itertools import pairwise
from typing import TYPE_CHECKING

import click

from unmask.cli.tls import client_tls

if TYPE_CHECKING:
    from unmask.transport_security import ClientTls

__all__ = ["command"]


@click.group("experts", short_help="Say what expert shards hold, and move experts between them.")
def command() -> None:
    """Look at running expert shards (`unmask shard`), and cut their experts anew while servers use them."""


@command.command("describe", short_help="Say what shards hold.")
@click.argument("shards", nargs=-1, required=True, metavar="HOST:PORT...")
@client_tls
def describe_command(shards: tuple[str, ...], tls: "ClientTls | None") -> None:
    """Print what each shard holds: its placements by epoch, their parts and experts, and its memory."""
    from unmask.experts.moving import describe

    for address, description in zip(shards, describe(shards, tls=tls), strict=True):
        draining = ", shutting down" if description.draining else ""
        click.echo(f"{address}  {description.name}  {description.weight_bytes / 2**20:.1f} MiB{draining}")
        for placement in description.placements:
            cuts = list(pairwise(placement.bounds))
            parts = ", ".join(f"{part} ({cuts[part][0]}-{cuts[part][1] - 1})" for part in placement.parts)
            click.echo(f"  epoch {placement.epoch}: of {len(cuts)} parts, holds {parts}")


@command.command("move", short_help="Cut experts anew while servers use them.")
@click.argument("shards", nargs=-1, required=True, metavar="HOST:PORT...")
@click.option(
    "--replication",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many shards hold each part.",
)
@click.option(
    "--groups",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="The router's groups of experts (n_group of config.json), at whose borders even parts are cut.",
)
@click.option(
    "--balanced",
    is_flag=True,
    help="Cut so that parts are used equally often, by what the shards have counted since they began.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@client_tls
def move_command(
    shards: tuple[str, ...],
    replication: int,
    groups: int,
    balanced: bool,
    dry_run: bool,
    tls: "ClientTls | None",
) -> None:
    """Give each of the shards its part of a new placement, in the order in which they are named.

    All of it is loaded beside what is there; then servers have five seconds to go over to it, which they do
    between two forwards; then the old placements are let go. If a shard cannot load its parts, all is left as
    it was. Servers must know all of these shards.
    """
    from unmask.experts.moving import describe, move, plan_move

    planned = plan_move(describe(shards, tls=tls), replication=replication, groups=groups, balanced=balanced)
    for address, parts in zip(shards, planned.parts, strict=True):
        ranges = ", ".join(f"{planned.bounds[part]}-{planned.bounds[part + 1] - 1}" for part in sorted(parts))
        click.echo(f"{address}: experts {ranges}")
    if dry_run:
        return
    move(shards, planned, tls=tls)
    click.echo(f"epoch {planned.epoch} is in force; let go: {', '.join(map(str, planned.old)) or 'nothing'}")
