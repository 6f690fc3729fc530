"""What is planned, as tables for people and as JSON for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from unmask.experts.planning.constants import Known
from unmask.experts.planning.forward import PARTS, Forward
from unmask.experts.planning.setting import Setting

__all__ = ["lines", "to_json_dict"]

_MIB, _GIB = 2**20, 2**30


def to_json_dict(setting: Setting, known: Known, forwards: Sequence[Forward]) -> dict[str, Any]:
    """All of it. ``forwards`` begins with the one without shards."""
    whole = forwards[0].seconds
    return {
        "model": {
            "parameters": setting.parameters,
            "expert_parameters": setting.expert_parameters,
            "layers_with_experts": len(setting.mixtures),
            **asdict(setting.choice),
        },
        "work": asdict(setting.work) | {"tokens": setting.work.tokens},
        "weights_as": setting.weights_as,
        "rows_as": setting.rows_as,
        "transport": setting.transport,
        "micro_batches": setting.micro_batches,
        "constants": [
            {"name": name, "value": value, "source": source}
            for name, value, source in known.each(transport=setting.transport)
        ],
        "forwards": [
            {key: value for key, value in asdict(forward).items() if key != "work"}
            | {
                "seconds": forward.seconds,
                "times_unsharded": forward.seconds / whole,
                "request_tokens_per_second": forward.request_tokens_per_second,
                "batch_tokens_per_second": forward.batch_tokens_per_second,
            }
            for forward in forwards
        ],
    }


def lines(setting: Setting, known: Known, forwards: Sequence[Forward]) -> Iterator[str]:
    """Tables; ``forwards`` begins with the one without shards."""
    work, choice = setting.work, setting.choice
    yield (
        f"model    {setting.parameters:,} parameters, {setting.expert_parameters:,} of them in "
        f"{len(setting.mixtures)} x {choice.num_experts} routed experts; kept as {setting.weights_as}"
    )
    yield (
        f"work     {work.batch} requests x {work.block_length} positions, {work.context:,} of each in the "
        f"cache, {work.tpf:g} tokens of each per forward"
    )
    groups = f", from {choice.chosen_groups} of {choice.groups} groups" if choice.groups > 1 else ""
    halves = "" if setting.micro_batches == 1 else f", {setting.micro_batches} micro-batches"
    yield (
        f"experts  {choice.chosen} a token{groups}; {forwards[0].experts_hit:.1f} of "
        f"{choice.num_experts} hit in a layer; rows are {setting.rows_as} over {setting.transport}{halves}"
    )
    yield ""
    yield "Milliseconds of a forward, and their share of it"
    yield from _table(
        ["shards", "forward", *PARTS, "hidden"],
        [
            [
                _shards(forward),
                f"{forward.seconds * 1e3:.2f}",
                *(_share(part.seconds, forward) for part in forward.parts),
                _share(-forward.hidden_seconds, forward),
            ]
            for forward in forwards
        ],
    )
    yield ""
    yield "What comes of it"
    whole = forwards[0].seconds
    yield from _table(
        [
            "shards",
            "x unsharded",
            "tokens/s each",
            "of all",
            "copies",
            "sent MiB",
            "back MiB",
            "a frame KiB",
            "shard GiB",
            "engine GiB",
            "most of it",
        ],
        [
            [
                _shards(forward),
                f"{forward.seconds / whole:.2f}",
                f"{forward.request_tokens_per_second:,.1f}",
                f"{forward.batch_tokens_per_second:,.0f}",
                _or_dash(forward.copies_per_token, ".2f"),
                _or_dash(forward.sent_bytes / _MIB, ".1f"),
                _or_dash(forward.received_bytes / _MIB, ".1f"),
                _or_dash(forward.frame_bytes / 1024, ".1f"),
                _or_dash(forward.shard_bytes / _GIB, ".2f"),
                f"{forward.engine_bytes / _GIB:.2f}",
                forward.bound,
            ]
            for forward in forwards
        ],
    )
    yield ""
    yield "Constants"
    for name, value, source in known.each(transport=setting.transport):
        yield f"{name:<40} {_constant(value):>9}  {source}"


def _shards(forward: Forward) -> str:
    return str(forward.shards) if forward.shards else "none"


def _share(seconds: float, forward: Forward) -> str:
    if not seconds:
        return "-"
    share = f"{seconds / forward.seconds:.0%}".replace("-0%", "0%")
    return f"{seconds * 1e3:.2f} {share:>4}"


def _constant(value: float | bool | None) -> str:
    if value is None:
        return "-"
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.4g}"


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if value else "-"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as what is in them, to the right."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        yield "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
