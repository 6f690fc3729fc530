"""Where a command listens, and how long it answers: what those that serve have in common."""

from collections.abc import Callable
from typing import TypeVar

import click

__all__ = ["http_port", "listening", "most_seconds"]

_Command = TypeVar("_Command", bound=Callable[..., object])


def listening(*, port: int, metrics_port: int) -> Callable[[_Command], _Command]:
    """Add ``--host``, ``--port`` and ``--metrics-port`` with these defaults."""

    def add(command: _Command) -> _Command:
        for option in (
            click.option(
                "--metrics-port",
                type=click.IntRange(0, 65535),
                default=metrics_port,
                show_default=True,
                help="Prometheus metrics; 0 for any free port.",
            ),
            click.option(
                "--port",
                type=click.IntRange(0, 65535),
                default=port,
                show_default=True,
                help="gRPC; 0 for any free port.",
            ),
            click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
        ):
            command = option(command)
        return command

    return add


http_port = click.option(
    "--http-port",
    type=click.IntRange(0, 65535),
    help="OpenAI-style HTTP; 0 for any free port.  [default: none]",
)


def most_seconds(*, one: str, running: str, others: str) -> Callable[[_Command], _Command]:
    """Add how long things last.

    Args:
        one: what a client asks for.
        running: the same, of those at work.
        others: whom clients are spread over when they connect anew.
    """

    def add(command: _Command) -> _Command:
        for option in (
            click.option(
                "--max-connection-age-seconds",
                type=click.FloatRange(1),
                help=f"After how long a client is asked to connect anew, which spreads clients over {others} "
                "that came later.  [default: never]",
            ),
            click.option(
                "--drain-seconds",
                type=click.FloatRange(0),
                default=30,
                show_default=True,
                help=f"How long {running} may go on after SIGTERM.",
            ),
            click.option(
                "--max-request-seconds",
                type=click.FloatRange(0, min_open=True),
                default=600,
                show_default=True,
                help=f"Most time one {one} gets.",
            ),
        ):
            command = option(command)
        return command

    return add
