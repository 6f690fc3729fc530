"""``unmask``: the subcommands by name, and how errors end a process.

A subcommand's module is imported when the command is called, so that ``unmask --help`` answers at once
and commands that need no torch never load it. Whatever a person can mend ends in one line on stderr
and an exit code of :class:`unmask_api.exit_codes.ExitCode`; a defect of ours keeps its traceback.
"""

import importlib
import signal
import sys
from collections.abc import Sequence

import click

from unmask.errors import UnmaskError
from unmask_api.exit_codes import ExitCode

__all__ = ["cli", "main"]

COMMANDS = {
    "validate": "Check manifests as a cluster would.",
    "explain": "Describe the fields of a manifest.",
    "plan": "Say what a training job takes, and whether it fits.",
    "data": "Encode the data of a job, and say what they hold.",
    "run": "Run a training job on this machine.",
    "submit": "Run a training job or a service on a cluster.",
    "ps": "List the training jobs and services of a cluster.",
    "logs": "Show what a job or a service on a cluster prints.",
    "describe": "Say how a job or service on a cluster is, and what to do about it.",
    "cancel": "Stop a job or a service on a cluster.",
    "train": "Train: one worker process of a job.",
    "plot": "Draw the curves of a training run.",
    "serve": "Answer generation requests over gRPC.",
    "gateway": "Spread calls over several servers.",
    "shard": "Compute experts for servers.",
    "experts": "Say what expert shards hold, and move experts between them.",
    "generate": "Ask a server to write.",
    "control": "Drain a server, end its calls, replace its weights.",
    "bench": "Measure a server under load.",
    "convert": "Convert a checkpoint on disk.",
    "fetch": "Copy a model or a run from an object store.",
    "merge": "Average checkpoints of one model.",
    "inspect": "Say what a checkpoint is and what it needs.",
    "eval": "Measure a model: perplexity, tasks, quality against speed.",
    "check": "Compare a model's results here with recorded ones.",
}
"""Subcommand, which is also its module in this package -> what it does, for the list of commands."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"unmask.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="unmask")
def cli() -> None:
    """Train and serve masked-diffusion language models."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(_exit_code(args))


def _exit_code(args: Sequence[str] | None) -> int:
    try:
        result = cli.main(args, prog_name="unmask", standalone_mode=False)
        sys.stdout.flush()
    except UnmaskError as error:
        return _fail(str(error), error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "unmask"
        return _fail(f"{error.format_message()} (see '{command} --help')", ExitCode.USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), ExitCode.USAGE)
    except (KeyboardInterrupt, click.Abort):
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None  # or the interpreter flushes it, and complains, at exit
        return 128 + signal.SIGPIPE
    return result if isinstance(result, int) else ExitCode.OK


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    main()
