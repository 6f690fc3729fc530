"""What a server does on a GPU, done on a CPU: its kernels in Triton's interpreter, its recordings run anew.

These functions are for :func:`support.kernels.interpreted`, in whose process nothing is as on a CPU any more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from support.models import tiny_model
from unmask.attention import AttentionMetadata, kernels
from unmask.attention.paged import Span
from unmask.diffusion.batch import Filled
from unmask.diffusion.decoding import DecodingParams
from unmask.models.base import LanguageModel
from unmask.models.int8 import quantise
from unmask.models.loading import load
from unmask.serving import forwards
from unmask.serving.ragged import RaggedBatch

__all__ = ["filled", "hidden_states", "logits_of_loaded"]


def _as_on_a_gpu() -> None:
    """Take CPUs for GPUs; for the rest of the process."""
    kernels.run_on = lambda device: True
    forwards.cuda_graphs = lambda device: lambda compute: compute


def _model(changes: dict[str, Any], quantised: bool) -> LanguageModel:
    model = tiny_model(dtype=torch.float32, **changes)
    return quantise(model) if quantised else model


def filled(
    prompts: Sequence[Sequence[int]],
    params: DecodingParams,
    *,
    rows: int = 3,
    recorded: bool = True,
    quantised: bool = False,
    changes: dict[str, Any] | None = None,
) -> list[list[tuple[Any, ...]]]:
    """Of each request: what its steps filled, and how surely. One begins at every third forward."""
    _as_on_a_gpu()
    batch = RaggedBatch(
        _model(changes or {}, quantised),
        rows=rows,
        capacity=64,
        block_length=params.block_length,
        max_positions=8 * params.block_length,
        recorded=recorded,
    )
    found: dict[int, list[tuple[Any, ...]]] = {}
    waiting, step = list(prompts), 0
    while waiting or batch.active:
        if waiting and batch.free_rows and (step % 3 == 0 or not batch.active):
            found[batch.admit(waiting.pop(0), params)] = []
        step += 1
        for event in batch.step():
            if isinstance(event, Filled):
                found[event.ticket].append((event.positions, event.token_ids, event.confidences))
    return list(found.values())


def hidden_states(ids: list[int], spans: list[Span], *, block_length: int, pages: int, recorded: bool) -> Any:
    """Those of one forward, (S, D), and the keys and values that it left; then what ``store`` leaves."""
    _as_on_a_gpu()
    model = tiny_model(dtype=torch.float32)
    left = []
    for kind in ("hidden", "store"):
        cache = model.new_paged_cache(pages=pages, block_length=block_length)
        made: forwards.Forwards = forwards.PlainForwards(model, cache)
        with torch.inference_mode():
            if recorded:
                made = forwards.RecordedForwards(model, cache, most_blocks=9, most_pages=pages)
            hidden = getattr(made, kind)(ids, spans)
        if kind == "hidden":
            left.append(hidden[: len(ids)].clone())
        left += [cache._keys[:, :, :pages].clone(), cache._values[:, :, :pages].clone()]
    return left


def logits_of_loaded(folder: Path, ids: list[int]) -> Any:
    """Logits (S, V) of a text, by the model in ``folder`` with weights of eight bits."""
    _as_on_a_gpu()
    model = load(folder, quantization="int8")
    metadata = AttentionMetadata.single_row(len(ids), block_length=4)
    with torch.inference_mode():
        return model.logits(model.hidden(torch.tensor([ids]), metadata))[0]
