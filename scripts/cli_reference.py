"""The command line as a page of Markdown, from the commands themselves."""

import inspect
from collections.abc import Iterator

import click

_NOTICE = "<!-- Made by `make generate` from the commands in workers/src/unmask/cli; change those. -->"


def markdown(command: click.Command, name: str) -> str:
    """Return the page for ``command`` and all below it, each under its full name."""
    sections = [_section(context) for context in _walk(click.Context(command, info_name=name))]
    return "\n".join([f"# The command line\n\n{_NOTICE}\n", *sections])


def _walk(context: click.Context) -> Iterator[click.Context]:
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None and not command.hidden:
                yield from _walk(click.Context(command, info_name=name, parent=context))


def _section(context: click.Context) -> str:
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    about = inspect.cleandoc(command.help or "").replace("\b\n", "").partition("\f")[0].strip()
    # An argument without a help text is told of in the command's own.
    rows = [record for item in command.params if (record := item.get_help_record(context)) and record[1]]
    lines = [f"## {context.command_path}", f"```text\n{usage}\n```", about]
    if rows:
        table = [f"| `{_cell(flags)}` | {_cell(text)} |" for flags, text in rows]
        lines.append("\n".join(["| option | meaning |", "|---|---|", *table]))
    return "\n\n".join(line for line in lines if line) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
