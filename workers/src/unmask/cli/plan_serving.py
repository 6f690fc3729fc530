"""``unmask plan serve``: where the time of a forward goes if experts are in shards."""

import json
from pathlib import Path
from typing import Literal

import click

from unmask.cli.named_model import config_named
from unmask.errors import UsageError

__all__ = ["command"]

_ABOVE_ZERO = click.FloatRange(0, min_open=True)
_FORMATS = click.Choice(["bfloat16", "float32"])


@click.command("serve", short_help="Say where the time of a forward goes if experts are in shards.")
@click.option(
    "--config",
    "model",
    required=True,
    metavar="CONFIG",
    help="A config.json, or the name of a published model with experts, as in `unmask plan --config`.",
)
@click.option(
    "--shards",
    metavar="N,N,...",
    help="Numbers of shards, up to 64, a line each.  [default: powers of two, as far as there are experts]",
)
@click.option(
    "--replication",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Shards that hold each expert.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Requests in a forward, a block each.",
)
@click.option(
    "--block-length", type=click.IntRange(1), default=32, show_default=True, help="Positions of a block."
)
@click.option(
    "--context",
    type=click.IntRange(0),
    default=1024,
    show_default=True,
    help="Positions of each request that are in the cache.",
)
@click.option(
    "--tpf",
    type=_ABOVE_ZERO,
    default=2.5,
    show_default=True,
    help="Assumed tokens that a request keeps of a forward.",
)
@click.option(
    "--weights",
    "weights_as",
    type=_FORMATS,
    default="bfloat16",
    show_default=True,
    help="What weights are kept as.",
)
@click.option(
    "--rows", "rows_as", type=_FORMATS, default="bfloat16", show_default=True, help="What rows are sent as."
)
@click.option(
    "--micro-batches",
    type=click.IntRange(1, 2),
    default=1,
    show_default=True,
    help="2: one half of the batch is at the experts while the engine computes the other (which `unmask "
    "serve` does not do).",
)
@click.option(
    "--transport",
    default="grpc",
    show_default=True,
    help="grpc, shm, ideal (software that costs nothing), or another one that --constants has.",
)
@click.option(
    "--network",
    "gigabits",
    type=click.FloatRange(0),
    help="Gbit/s of the engine's port, each way; 0: all on one machine.  [default: 100, assumed]",
)
@click.option(
    "--round-trip",
    "round_trip_us",
    type=click.FloatRange(0),
    help="Microseconds between two machines and back.  [default: 40, assumed]",
)
@click.option("--gpu", help="Of engine and shards, as in `unmask plan --gpu`.  [default: h100-80g]")
@click.option(
    "--constants",
    "path",
    type=click.Path(path_type=Path),
    help="A JSON file of measured constants, which go before assumed ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(
    model: str,
    shards: str | None,
    replication: int,
    batch: int,
    block_length: int,
    context: int,
    tpf: float,
    weights_as: Literal["bfloat16", "float32"],
    rows_as: Literal["bfloat16", "float32"],
    micro_batches: int,
    transport: str,
    gigabits: float | None,
    round_trip_us: float | None,
    gpu: str | None,
    path: Path | None,
    as_json: bool,
) -> None:
    """Say where the time of a forward goes if experts are in shards.

    For each number of shards: the parts of a forward, tokens per second, bytes on the way, and memory; beside
    them the same model without shards. Nothing is started or measured, and no weights are read: all of it
    follows from the model's shape and from constants, which are printed with where they come from.
    """
    from unmask.experts.planning import report
    from unmask.experts.planning.constants import assumed, read_constants, with_network
    from unmask.experts.planning.forward import sharded, unsharded
    from unmask.experts.planning.setting import Setting, Work
    from unmask.models.shape import shape_of
    from unmask.training.sizing.devices import MEMORY_BYTES_PER_SECOND, device_named

    device = device_named(gpu)
    known = assumed(
        device=device.name,
        memory_bytes_per_second=MEMORY_BYTES_PER_SECOND[device.name],
        flops_per_second=device.peak("fp32" if weights_as == "float32" else "bf16"),
    )
    if path is not None:
        known = read_constants(path, known)
    known = with_network(known, transport=transport, gigabits=gigabits, round_trip_us=round_trip_us)
    setting = Setting(
        shape=shape_of(config_named(model)),
        work=Work(batch=batch, block_length=block_length, context=context, tpf=tpf),
        constants=known.constants,
        transport=transport,
        weights_as=weights_as,
        rows_as=rows_as,
        micro_batches=micro_batches,
    )
    numbers = _default(setting.choice.num_experts, replication) if shards is None else _numbers(shards)
    forwards = [
        unsharded(setting),
        *(sharded(setting, number, replication=replication) for number in numbers),
    ]
    if as_json:
        click.echo(json.dumps(report.to_json_dict(setting, known, forwards), indent=2))
    else:
        for line in report.lines(setting, known, forwards):
            click.echo(line)


def _numbers(text: str) -> list[int]:
    """From "1,2,4".

    Raises:
        UsageError: It is no list of whole numbers.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 4 for word in words):
        raise UsageError(
            f"--shards: got {text!r}, expected whole numbers with commas between them, as in 1,2,4"
        )
    return [int(word) for word in words]


def _default(num_experts: int, replication: int) -> list[int]:
    """Powers of two that there are experts and replicas for."""
    from unmask.experts.planning.setting import MOST_SHARDS

    found = [2**power for power in range(MOST_SHARDS.bit_length())]
    return [number for number in found if replication <= number <= min(num_experts, MOST_SHARDS)]
