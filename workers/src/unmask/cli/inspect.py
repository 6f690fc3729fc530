"""``unmask inspect PATH``: what a checkpoint is, and what it needs to run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.cli.local_path import LocalPath

if TYPE_CHECKING:
    from unmask.models.inspection import Inspection, StoredWeights

__all__ = ["command"]


@click.command("inspect", short_help="Say what a checkpoint is and what it needs.")
@click.argument("path", type=LocalPath(), metavar="PATH")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(path: Path, as_json: bool) -> None:
    """Say what a checkpoint is and what it needs to run.

    PATH is a model folder, a GGUF file or a config.json. Weights are not loaded; where the folder has
    checksums, they are compared.
    """
    from unmask.models.inspection import inspect_checkpoint

    found = inspect_checkpoint(path)
    if as_json:
        click.echo(json.dumps(found.to_json_dict(), indent=2))
        return
    for label, text in _lines(found):
        click.echo(f"{label:<12} {text}")


def _lines(found: "Inspection") -> Iterator[tuple[str, str]]:
    """What to print: a label, and what it is about."""
    yield "model", f"{found.architecture} ({found.model_type}), {found.decoding}"
    yield (
        "shape",
        f"{found.layers} layers, hidden size {found.hidden_size}, {found.attention_heads} heads of "
        f"{found.head_size} ({found.key_value_heads} for keys and values), vocabulary {found.vocabulary}, "
        f"context {found.context}",
    )
    if found.experts:
        experts = found.experts
        yield (
            "experts",
            f"{experts.total} in each of {experts.layers} layers, {experts.per_token} per token, "
            f"{experts.shared} shared",
        )
    yield "parameters", f"{found.parameters:,}, {found.active_parameters:,} active per token"
    memory = ", ".join(f"{_size(size)} in {dtype}" for dtype, size in found.weight_bytes.items())
    yield "memory", f"weights {memory}; {found.cache_bytes_per_token:,} B of keys and values per token"
    mask = "no mask" if found.mask_token_id is None else f"mask {found.mask_token_id}"
    yield "token ids", f"{mask}, end of text {found.eos_token_id}, padding {found.pad_token_id}"
    if found.converts_to:
        yield "converts to", f"{found.converts_to} (unmask convert --to)"
    if found.weights:
        yield from _stored(found.weights)


def _stored(weights: "StoredWeights") -> Iterator[tuple[str, str]]:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in weights.dtypes.items())
    count, size = len(weights.files), sum(weights.files.values())
    left_out = f", of which the model takes all but {weights.ignored}" if weights.ignored else ""
    yield "tensors", f"{dtypes} ({weights.layout}){left_out}"
    yield "on disk", f"{_size(size)} in {count} file{'s' * (count > 1)}, checksums {weights.checksums}"
    template = "with" if weights.chat_template else "without"
    yield (
        "tokenizer",
        weights.tokenizer + (f", {template} chat template" if weights.tokenizer == "present" else ""),
    )


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
