"""What the commands for a cluster share: where it is, and how people read ages and amounts."""

import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from unmask_operator.client import Cluster, InferenceService, TrainJob

__all__ = ["age", "as_json", "cluster_options", "connected", "named", "output_option", "section", "table"]

Command = TypeVar("Command", bound=Callable[..., Any])

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="For people, or for programs.",
)


def cluster_options(command: Command) -> Command:
    """Add the options that say where the cluster is: ``namespace``, ``context`` and ``kubeconfig``."""
    for option in (
        click.option(
            "--kubeconfig",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="File that says where the cluster is.  [default: $KUBECONFIG, else ~/.kube/config]",
        ),
        click.option("--context", "cluster", help="Context of that file.  [default: its current one]"),
        click.option("-n", "--namespace", help="Namespace to work in.  [default: the context's]"),
    ):
        command = option(command)
    return command


def connected(namespace: str | None, cluster: str | None, kubeconfig: Path | None) -> "Cluster":
    """Return what there is in the namespace that the options name."""
    try:
        from unmask_operator.client import connected as connected_to
    except ModuleNotFoundError as error:
        from unmask.errors import UsageError

        raise UsageError(
            f"this command needs {error.name}: install unmask with its extra operator (unmask[operator])"
        ) from None
    return connected_to(namespace=namespace, context=cluster, kubeconfig=kubeconfig)


def named(one: "TrainJob | InferenceService") -> str:
    """Write the namespace and the name of a job or service."""
    return f"{one.namespace}/{one.name}"


def as_json(value: Any) -> str:
    """Write a value for programs."""
    return json.dumps(value, indent=2)


def age(since: datetime.datetime | None, now: datetime.datetime) -> str:
    """Write how long ago something was, in its largest unit, such as ``3h``."""
    if since is None:
        return ""
    seconds = max(0, int((now - since).total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns, each as wide as its widest entry."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(f"{entry:<{width}}" for entry, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def section(name: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table below its name; nothing where it has no rows."""
    if rows:
        yield f"{name}:"
        yield from (f"  {line}" for line in table(headings, rows).splitlines())
