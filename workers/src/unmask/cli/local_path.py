"""Arguments that are paths of this machine: who names an object store is told to fetch first."""

from pathlib import Path
from typing import Any

import click

from unmask.errors import UsageError
from unmask_api.places import in_store

__all__ = ["LocalPath"]


class LocalPath(click.Path):
    """A path of this machine."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See :class:`click.Path`; raises ``UsageError`` for what is in an object store."""
        if isinstance(value, str) and in_store(value):
            raise UsageError(
                f"{value}: this command reads and writes files of this machine; copy it first "
                f"(unmask fetch {value} DIR), and name the copy"
            )
        return super().convert(value, param, ctx)
