"""``unmask control``: drain a server, end its calls, replace its weights."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from unmask.cli.tls import client_tls
from unmask.errors import UsageError

if TYPE_CHECKING:
    from unmask.client import ClientTls, Control

__all__ = ["command"]


@click.group("control", short_help="Drain a server, end its calls, replace its weights.")
def command() -> None:
    """Run a server that was started with `unmask serve --control-port`.

    On a cluster the port is reached by `kubectl port-forward POD 50052`.
    """


def _connected(act: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all of them have, and the client that they make."""

    @click.option(
        "--server",
        default="127.0.0.1:50052",
        show_default=True,
        envvar="UNMASK_CONTROL",
        show_envvar=True,
        help="HOST:PORT of its control port.",
    )
    @client_tls
    @click.option(
        "--timeout", "timeout_s", type=float, default=3600, show_default=True, help="Seconds to wait."
    )
    @wraps(act)
    def connected(server: str, tls: "ClientTls | None", timeout_s: float, **given: Any) -> None:
        from unmask.client import Control

        with Control(server, timeout_s=timeout_s, tls=tls) as control:
            act(control, **given)

    return connected


@command.command("abort", short_help="End calls.")
@click.argument("request_ids", nargs=-1, metavar="[REQUEST_ID]...")
@click.option("--all", "everything", is_flag=True, help="End all calls.")
@_connected
def abort(control: "Control", request_ids: tuple[str, ...], everything: bool) -> None:
    """End calls by their request ids, or all of them; prints the ids of those that were there.

    They end with ABORTED, and their rows are free within one forward pass.
    """
    if everything == bool(request_ids):
        raise UsageError("give request ids or --all, one of the two")
    for name in control.abort_all() if everything else control.abort(request_ids):
        click.echo(name)


@command.command("drain", short_help="Take no new calls, and wait until none is left.")
@_connected
def drain(control: "Control") -> None:
    """Take no new calls, and wait until none is left.

    The server stays, and says that it is NOT_SERVING, until `unmask control resume`, even if this command is
    stopped.
    """
    for load in control.drain():
        click.echo(f"{load.running} running, {load.waiting} waiting")


@command.command("resume", short_help="Take calls again.")
@_connected
def resume(control: "Control") -> None:
    """Take calls again."""
    control.resume()
    click.echo("taking calls")


@command.command("update-weights", short_help="Replace the weights.")
@click.argument("folder", metavar="DIR")
@_connected
def update_weights(control: "Control", folder: str) -> None:
    """Replace the weights by those in DIR, a model folder as the server sees it; prints their revision.

    DIR must be inside the server's --weights-root and have the configuration of the model that is served. It
    is checked whole first. Running calls come to their end with the old weights, those that wait begin with
    the new ones.
    """
    click.echo(control.update_weights(folder))
