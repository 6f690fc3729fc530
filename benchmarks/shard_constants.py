"""Measures what ``unmask plan serve`` takes: how fast this machine reads, multiplies and sends frames.

Each number is the median of some repeats of one thing done alone. Nothing is taken from a forward with
shards, which is what is predicted.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from unmask.experts.holding import weighted_sums
from unmask.experts.planning.constants import Machine, Transport
from unmask.experts.planning.forward import answer_bytes, frame_bytes
from unmask.models.onednn import ReorderedExperts, ReorderedLinear
from unmask.models.shape import ModelShape

__all__ = ["FRAMES", "fitted", "machine", "transport"]

FRAMES = (8, 256)
"""Rows of the frames that are sent."""

_LARGE = 8192
"""Rows and columns of a matrix that no cache holds: 256 MiB of float32."""


@torch.inference_mode()
def machine(shape: ModelShape, *, threads: int, tokens: int, part: float = 1.0, repeats: int = 7) -> Machine:
    """What so many threads of this process's torch take, float32; weights are as in servers and shards.

    Args:
        shape: Of the model; its widths and experts are what products are measured with.
        threads: For torch.
        tokens: Rows of the products.
        part: Share of a layer's experts that the machine has.
        repeats: Of each measurement.
    """
    layer = next(layer for layer in shape.layers if layer.experts)
    held = max(1, round(layer.num_experts * part))
    with _threads(threads):
        large = torch.rand(_LARGE, _LARGE)
        vector = torch.rand(_LARGE)
        reading = _median(lambda: large @ vector, repeats)
        rows = torch.randn(tokens, shape.hidden)
        wide = ReorderedLinear(shape.hidden, 4 * shape.hidden)
        wide.put("weight", (), torch.randn(4 * shape.hidden, shape.hidden))
        multiplying = _median(lambda: wide(rows), repeats)
        experts = ReorderedExperts(held, shape.hidden, layer.expert_width)
        for expert in range(held):
            experts.put("gate_up_proj", (expert,), torch.randn(2 * layer.expert_width, shape.hidden))
            experts.put("down_proj", (expert,), torch.randn(shape.hidden, layer.expert_width))
        chosen = torch.stack([torch.randperm(layer.num_experts)[: layer.chosen] for _ in range(tokens)])
        slots = torch.where(chosen < held, chosen, -1)
        weights = torch.rand(tokens, layer.chosen)
        serving = _median(lambda: weighted_sums(experts, slots, weights, rows), repeats)
    here = int((slots >= 0).sum())
    return Machine(
        memory_bytes_per_second=large.nbytes / reading,
        flops_per_second=2 * tokens * 4 * shape.hidden**2 / multiplying,
        # Sorting rows by expert and adding them up is in this rate.
        expert_flops_per_second=2 * here * 3 * shape.hidden * layer.expert_width / serving,
        expert_layer_seconds=0.0,
        host_copy_seconds_per_byte=0.0,  # torch computes where frames are made
    )


def transport(ask: Callable[[int], object], *, choices: int, hidden: int, repeats: int = 50) -> Transport:
    """What frames of float32 rows take.

    Args:
        ask: Sends so many rows to a shard that does nothing but send them back, and waits for that.
        choices: Of each row.
        hidden: Numbers of a row.
        repeats: Of each size of :data:`FRAMES`.
    """
    seconds = {rows: _median(lambda rows=rows: ask(rows), repeats) for rows in FRAMES}
    return fitted(seconds, choices=choices, hidden=hidden)


def fitted(seconds: Mapping[int, float], *, choices: int, hidden: int) -> Transport:
    """The line through what two numbers of rows take there and back; neither of its constants is negative."""

    def moved(rows: int) -> float:
        frame = frame_bytes(rows, choices=choices, hidden=hidden, rows_as="float32")
        return frame + answer_bytes(rows, hidden=hidden, rows_as="float32")

    few, many = sorted(seconds)
    per_byte = max(0.0, (seconds[many] - seconds[few]) / (moved(many) - moved(few)))
    return Transport(
        frame_seconds=max(0.0, seconds[few] - per_byte * moved(few)), frame_seconds_per_byte=per_byte
    )


def _median(run: Callable[[], object], repeats: int) -> float:
    """Seconds, after two that do not count."""
    taken = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
