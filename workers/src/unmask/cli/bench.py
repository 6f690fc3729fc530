"""``unmask bench serve``: load for a server, and what its callers have to wait."""

import asyncio
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from unmask.cli.local_path import LocalPath
from unmask.cli.tls import client_tls
from unmask.errors import DataError, UsageError

if TYPE_CHECKING:
    from unmask.client import ClientTls, GenerateOptions
    from unmask.client.load import Ask, Limits

__all__ = ["command"]

_PROMPTS = ("text", "messages", "token_ids")
_OPTIONS = ("max_tokens", "temperature", "seed", "stop", "threshold", "steps_per_block", "decoder")


@click.group("bench", short_help="Measure a server under load.")
def command() -> None:
    """Measure a server under load."""


@command.command("serve", short_help="Send requests that come when they come, and tell what they waited.")
@click.option(
    "--prompts",
    type=LocalPath(),
    required=True,
    metavar="FILE",
    help="What to ask: a text to continue in each line; or, in a .jsonl, an object with text, messages or "
    "token_ids, and optionally " + ", ".join(_OPTIONS) + ".",
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
@click.option("--rate", type=click.FloatRange(0, min_open=True), required=True, help="Requests per second.")
@click.option("--requests", type=click.IntRange(1), default=100, show_default=True, help="How many.")
@click.option(
    "--alone",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="So many are sent first, one after the other, for the ratios.",
)
@click.option("--max-tokens", type=click.IntRange(1), help="Of prompts that do not say.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of arrivals, and of which prompts.")
@click.option("--timeout", "timeout_s", type=float, default=600, show_default=True, help="Of each request.")
@click.option(
    "--first-block-within",
    type=click.FloatRange(0, min_open=True),
    help="Seconds; with --blocks-within, what makes an answer a good one.",
)
@click.option(
    "--blocks-within",
    type=click.FloatRange(0, min_open=True),
    help="Seconds between two blocks of a good answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object alone.")
def serve(
    prompts: Path,
    server: str,
    tls: "ClientTls | None",
    rate: float,
    requests: int,
    alone: int,
    max_tokens: int | None,
    seed: int,
    timeout_s: float,
    first_block_within: float | None,
    blocks_within: float | None,
    as_json: bool,
) -> None:
    """Send requests to a server as a Poisson process would, and tell what their callers waited.

    A request is sent when it is due, whatever has been answered by then, and times are counted from that
    moment. Prompts are drawn from FILE. Told are the time to the first block, the time between blocks and to
    the whole answer, tokens per forward (decoding), tokens per second, and, of the waits, the multiples of
    what requests wait that are sent alone: those compare across machines. The last line is one JSON object.
    """
    from unmask.client.load import Limits

    if (first_block_within is None) != (blocks_within is None):
        raise UsageError("--first-block-within and --blocks-within: give both or none")
    limits = Limits(first_block_within, blocks_within) if first_block_within and blocks_within else None
    known = _read(prompts, max_tokens, timeout_s)
    dice = random.Random(seed)
    asks = [dice.choice(known) for _ in range(requests)]
    first = [dice.choice(known) for _ in range(alone)]
    told = asyncio.run(_measured(server, tls, asks, first, rate, seed, limits))
    if not as_json:
        for line in _lines(told):
            click.echo(line)
    click.echo(json.dumps(told))


async def _measured(
    server: str,
    tls: "ClientTls | None",
    asks: list["Ask"],
    first: list["Ask"],
    rate: float,
    seed: int,
    limits: "Limits | None",
) -> dict[str, Any]:
    from unmask.client import AsyncClient
    from unmask.client.load import measure, ratios, report

    async with AsyncClient(server, tls=tls) as client:
        info = await client.model_info()  # that nobody answers is an error, not a hundred samples
        started = time.monotonic()
        alone = report(await measure(client, first, rate=None), seconds=time.monotonic() - started)
        started = time.monotonic()
        samples = await measure(client, asks, rate=rate, seed=seed)
        loaded = report(samples, seconds=time.monotonic() - started, limits=limits)
    return {
        "model": info.name,
        "rate": rate,
        "seed": seed,
        "alone": alone,
        "loaded": loaded,
        "ratios": ratios(loaded, alone),
    }


def _read(path: Path, max_tokens: int | None, timeout_s: float) -> list["Ask"]:
    """What may be asked."""
    from unmask.client import GenerateOptions
    from unmask.client.load import Ask
    from unmask.client.options import request_of

    usual = GenerateOptions(timeout_s=timeout_s)
    if max_tokens is not None:
        usual["max_tokens"] = max_tokens
    asks = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            asks.append(Ask(line, usual))
            continue
        at = f"--prompts {path}, line {number}"
        try:
            given = json.loads(line)
        except ValueError as error:
            raise DataError(f"{at}: not valid JSON: {error}") from None
        if not isinstance(given, dict):
            raise DataError(f"{at}: got {type(given).__name__}, expected an object")
        unknown = sorted(given.keys() - {*_PROMPTS, *_OPTIONS})
        if unknown:
            allowed = ", ".join((*_PROMPTS, *_OPTIONS))
            raise DataError(f"{at}: {unknown[0]}: is not known; allowed are {allowed}")
        ask = Ask(given.pop("text", None), usual | cast("GenerateOptions", given))
        try:
            request_of(ask.prompt, **ask.options)
        except UsageError as error:
            raise DataError(f"{at}: {error}") from None
        asks.append(ask)
    if not asks:
        raise DataError(f"--prompts {path}: holds no prompt")
    return asks


def _lines(told: dict[str, Any]) -> list[str]:
    """The same for people."""
    loaded, alone = told["loaded"], told["alone"]
    errors = ", ".join(f"{count} {code}" for code, count in loaded["errors"].items())
    lines = [
        f"{loaded['answered']} of {loaded['requests']} requests answered in {loaded['seconds']:.1f} s"
        + (f" ({errors})" if errors else ""),
        f"{loaded['tokens_per_second']:.1f} tokens/s, TPF {loaded['tpf_decode']:.2f} (decode)",
    ]
    for name, what in (
        ("first_block_seconds", "first block"),
        ("between_blocks_seconds", "between blocks"),
        ("answer_seconds", "whole answer"),
        ("sent_late_seconds", "sent late"),
    ):
        times = "  ".join(f"{rank} {value:.3f} s" for rank, value in loaded[name].items())
        usual = alone[name].get("p50")
        lines.append(f"{what:15} {times}" + (f"  (alone {usual:.3f} s)" if usual else ""))
    if "good" in loaded:
        good = loaded["good"]
        lines.append(f"good answers    {good['share']:.1%}, {good['requests_per_second']:.2f} per second")
    return lines
