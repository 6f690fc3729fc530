"""``unmask generate TEXT``: ask a server to write, and show how it does."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any, cast

import click

from unmask.cli.tls import client_tls
from unmask.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from unmask.client import Canvas, ClientTls, Event, Finished, GenerateOptions, Message, Trace, Usage

__all__ = ["command"]


@click.command("generate", short_help="Ask a server to write.")
@click.argument("text", required=False)
@click.option(
    "--messages",
    "conversation",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="A conversation to answer, TEXT its last turn if there is one: a JSON list of turns, or an object "
    'with "messages" and "tools"; - is stdin.',
)
@click.option(
    "--server",
    default="127.0.0.1:50051",
    show_default=True,
    envvar="UNMASK_SERVER",
    show_envvar=True,
    help="HOST:PORT of `unmask serve`.",
)
@client_tls
@click.option(
    "--chat/--raw",
    default=None,
    help="TEXT is a user's turn, or text to continue.  [default: a turn if the model has a chat template]",
)
@click.option("--max-tokens", type=int, help="Most tokens to generate.")
@click.option(
    "--decoder",
    help="How masked positions are filled: threshold, fixed-steps, joint-edit, hierarchical, credit, "
    "entropy-bounded or low-confidence.  [default: the model's]",
)
@click.option("--threshold", type=float, help="Probability above which a token is accepted, in (0, 1].")
@click.option("--steps-per-block", type=int, help="Most denoising forwards until a block has no masks.")
@click.option(
    "--edit-threshold", type=float, help="Probability above which a written token is replaced, in [0, 1]."
)
@click.option("--max-post-edit-steps", type=int, help="Most forwards that only edit, per block.")
@click.option(
    "--low-threshold",
    type=float,
    help="For hierarchical: probability above which the surest token of a masked run is accepted.",
)
@click.option("--credit-weight", type=float, help="For credit: how much former forwards count.")
@click.option("--credit-decay", type=float, help="For credit: what is left of it after a forward, in [0, 1].")
@click.option("--credit-exponent", type=float, help="For credit: power of a probability that counts.")
@click.option(
    "--entropy-bound",
    type=float,
    help="For entropy-bounded: nats that all but the last of the accepted positions may add up to.",
)
@click.option("--block-length", type=int, help="Positions in one block, for low-confidence.")
@click.option(
    "--vicinity",
    type=(int, int),
    metavar="BEFORE BEHIND",
    help="For low-confidence: recompute only so many positions around a block.  [default: all]",
)
@click.option(
    "--temperature", type=float, help="Draw tokens, the less probable ones the more the higher.  [default: 0]"
)
@click.option("--seed", type=int, help="What draws depend on.  [default: another one each time]")
@click.option("--top-p", type=float, help="Draw from the most probable tokens that have this probability.")
@click.option("--top-k", type=int, help="Draw from so many most probable tokens.")
@click.option("--repetition-penalty", type=float, help="Above 1, what has been said becomes less probable.")
@click.option("--stop", multiple=True, help="Text before which the answer ends; may be given several times.")
@click.option("--timeout", "timeout_s", type=float, default=300, show_default=True, help="Seconds to wait.")
@click.option(
    "--trace",
    type=click.File("w", encoding="utf-8", lazy=False),
    metavar="FILE",
    help="Write what each forward did to FILE, as one JSON object.",
)
@click.option("--canvas", is_flag=True, help="Show positions as they are filled (on a terminal).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, token ids and usage.")
def command(
    text: str | None,
    conversation: IO[str] | None,
    server: str,
    tls: "ClientTls | None",
    chat: bool | None,
    timeout_s: float,
    trace: IO[str] | None,
    canvas: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Send TEXT or a conversation to a server and print what the model writes.

    Tokens per forward pass (TPF) and tokens per second follow on stderr. TPF is given over all forwards, over
    decoding (denoise and persist) ones, and over denoising ones. What is not given is up to the server, and
    so is which decoders there are.
    """
    from unmask.client import Client

    if text is None and conversation is None:
        raise UsageError("nothing to answer; give TEXT, or a conversation with --messages")
    if conversation is not None and chat is False:
        raise UsageError("--raw: a conversation is written out by the model's template; leave --raw out")
    prompt: str | None = None
    given = {name: value for name, value in asked.items() if value not in (None, ())}
    options = cast("GenerateOptions", given | {"timeout_s": timeout_s})
    if trace is not None:
        options["trace"] = True
    with Client(server, timeout_s=timeout_s, tls=tls) as client:
        if conversation is not None:
            options |= _conversation(conversation)
        elif chat is False or (chat is None and not client.model_info().has_chat_template):
            prompt = text
        if prompt is None:
            turn: Message = {"role": "user", "content": text}
            options["messages"] = [*options.get("messages", ()), *([turn] if text is not None else [])]
        started = time.monotonic()
        if as_json:
            generation = client.generate(prompt, **options)
            seconds = time.monotonic() - started
            told = asdict(generation) | _speed(generation.usage, seconds)
            del told["trace"]
            click.echo(json.dumps(told, ensure_ascii=False))
            _write_trace(trace, generation.trace, generation.finish_reason, generation.usage)
            return
        live = canvas and sys.stdout.isatty()
        events = client.stream(prompt, canvas=live, **options)
        finished = _draw(events) if live else _print(events)
        click.echo(_summary(finished.usage, time.monotonic() - started), err=True)
        _write_trace(trace, finished.trace, finished.reason, finished.usage)


def _conversation(file: IO[str]) -> "GenerateOptions":
    """Turns and tools in a file."""
    try:
        read = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--messages {file.name}: not valid JSON: {error}") from None
    read = {"messages": read} if isinstance(read, list) else read
    if not isinstance(read, dict) or not read.get("messages"):
        raise UsageError(f'--messages {file.name}: expected a list of turns, or an object with "messages"')
    for key in ("messages", "tools"):
        entries = read.setdefault(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UsageError(f'--messages {file.name}: "{key}" must be a list of objects')
    return {"messages": read["messages"], "tools": read["tools"]}


def _print(events: Iterator["Event"]) -> "Finished":
    """Write the text as it becomes final."""
    from unmask.client import BlockCommitted, Finished

    for event in events:
        if isinstance(event, BlockCommitted | Finished):
            click.echo(event.text, nl=False)
        if isinstance(event, Finished):
            click.echo()
            return event
    raise AssertionError("the client ends a stream with Finished or an error")


def _draw(events: Iterator["Event"]) -> "Finished":
    """Write the text as it is filled in."""
    from rich.live import Live

    from unmask.client import Canvas, Finished

    canvas = Canvas()
    with Live(refresh_per_second=25) as live:
        for event in events:
            canvas.take(event)
            live.update(_picture(canvas))
            if isinstance(event, Finished):
                return event
    raise AssertionError("the client ends a stream with Finished or an error")


def _picture(canvas: "Canvas") -> "Text":
    """Final text plain, provisional tokens the greener the surer, a shade for what is masked."""
    from rich.text import Text

    picture = Text(canvas.text)
    for cell in canvas.cells:
        if cell.text is None:
            picture.append(" \N{LIGHT SHADE}", style="dim")
        else:
            picture.append(f" {cell.text.strip()}", style="green" if cell.confidence > 0.5 else "yellow")
    return picture


def _write_trace(file: IO[str] | None, trace: "Trace | None", reason: str, usage: "Usage") -> None:
    """Write a request's story, and how it ended, if it is wanted."""
    if file is None:
        return
    if trace is None:
        raise UsageError(f"--trace {file.name}: the server sent no trace; it is older than this client")
    told = asdict(trace) | {"finish_reason": reason, "usage": asdict(usage)}
    json.dump(told, file, ensure_ascii=False, indent=1)
    file.write("\n")


def _speed(usage: "Usage", seconds: float) -> dict[str, float]:
    rate = usage.completion_tokens / seconds if seconds > 0 else 0.0
    return {"seconds": seconds, "tokens_per_second": rate}


def _summary(usage: "Usage", seconds: float) -> str:
    rate = _speed(usage, seconds)["tokens_per_second"]
    return (
        f"{usage.completion_tokens} tokens in {seconds:.2f} s, {rate:.1f} tokens/s; TPF {usage.tpf:.2f} "
        f"(decode {usage.tpf_decode:.2f}, denoise {usage.tpf_denoise:.2f})"
    )
