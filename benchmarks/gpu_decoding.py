"""Times steps of decoding on a GPU against reading their weights: ``make bench-gpu``.

A model of LLaDA2.0-mini's shape gets random weights, made on the device. Requests with prompts of one length
decode, each step filling 4 positions of a block of 32. What a step must read is counted (all weights but the
embedding, of the experts those that its tokens chose, and the keys and values that they see), and divided by
the speed at which the same device reads a large tensor. Steps are timed as users wait for them, from the
host's first instruction to the tokens on the host: recorded, launched one by one, and with weights of eight
bits. Prints what it measures; the last line is one JSON object.

    python benchmarks/gpu_decoding.py [--rows 1 16] [--prompt 512] [--config FILE] [--device cuda]

``--device cpu`` with a small ``--config`` tries this program, and times nothing that a GPU does.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.attention import kernels
from unmask.diffusion.batch import Filled, Persisted, Prefilled
from unmask.diffusion.decoding import DecodingParams
from unmask.models.base import LanguageModel
from unmask.models.int8 import quantise
from unmask.models.loading import build
from unmask.models.moe import mixtures_of
from unmask.models.registry import parse_config
from unmask.serving.ragged import RaggedBatch

BLOCK, STEPS = 32, 8
BLOCKS = 4
"""Of each answer."""
MINI = Path(__file__).parents[1] / "tests" / "support" / "published" / "llada2_mini.json"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What steps of some rows took."""

    seconds: float
    """Of one step in the middle."""
    floor: float
    """To read what it needs, in seconds."""
    experts: float
    """That a layer's tokens chose, on average."""

    def as_json(self) -> dict[str, float]:
        """Rounded, and the ratio."""
        return {
            "step_ms": round(self.seconds * 1e3, 3),
            "floor_ms": round(self.floor * 1e3, 3),
            "over_the_floor": round(self.seconds / self.floor, 2),
            "experts_per_layer": round(self.experts, 1),
        }


def main() -> None:
    """Measure and print."""
    options = _options()
    device = torch.device(options.device)
    model = _random_model(options.config, device)
    speed = _bytes_per_second(device)
    print(
        f"{_name(device)}, torch {torch.__version__}, {datetime.date.today()}: reads {speed / 1e9:.0f} GB/s"
    )
    found: dict[str, Any] = {"device": _name(device), "read_gb_per_s": round(speed / 1e9)}
    with torch.inference_mode():
        for recorded in (True, False) if kernels.run_on(device) else (False,):
            side = "recorded" if recorded else "launched one by one"
            found[side] = _told(side, model, options.rows, options.prompt, speed, recorded=recorded)
        if kernels.run_on(device):
            quantise(model)
            found["int8"] = _told("int8", model, options.rows, options.prompt, speed, recorded=True)
    print(json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=MINI)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=512)
    return parser.parse_args()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _random_model(path: Path, device: torch.device) -> LanguageModel:
    """Random numbers are made where they are needed: sixteen billion would take a CPU minutes."""
    config = parse_config(json.loads(path.read_text()))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(config, device="meta", dtype=dtype).eval().to_empty(device=device)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.RMSNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in norms:
                parameter.fill_(1)
            else:
                parameter.normal_(std=config.initializer_range)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def _bytes_per_second(device: torch.device) -> float:
    numbers = torch.ones(1 << (31 if device.type == "cuda" else 26), dtype=torch.float32, device=device)
    return numbers.nbytes / min(_seconds(numbers.sum, device) for _ in range(10))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _told(
    side: str, model: LanguageModel, shapes: list[int], prompt: int, speed: float, *, recorded: bool
) -> dict[str, Any]:
    found = {}
    for rows in shapes:
        experts = _experts_hit(model, rows, prompt)
        needed = _bytes_of_a_step(model, rows, prompt, experts)
        seconds = _step_seconds(model, rows, prompt, recorded=recorded)
        found[str(rows)] = Steps(seconds=seconds, floor=needed / speed, experts=experts).as_json()
        print(f"{side}, {rows} rows at {prompt}: {found[str(rows)]}", flush=True)
    return found


def _batch(model: LanguageModel, rows: int, prompt: int, *, recorded: bool) -> RaggedBatch:
    """Requests that have read their prompts and begin to decode."""
    capacity = prompt + BLOCKS * BLOCK
    batch = RaggedBatch(model, rows=rows, capacity=capacity, block_length=BLOCK, recorded=recorded)
    params = DecodingParams(
        max_new_tokens=BLOCKS * BLOCK,
        block_length=BLOCK,
        steps=STEPS,
        threshold=1.1,
        eos_token_id=-1,
        mask_token_id=model.config.vocab_size - 1,
    )
    for row in range(rows):
        generator = torch.Generator().manual_seed(row)
        ids = torch.randint(2, model.config.vocab_size // 2, (prompt,), generator=generator).tolist()
        batch.admit(ids, params)
    reading = True
    while reading:  # the first to be done go on until all are
        reading = any(isinstance(event, Prefilled) for event in batch.step())
    return batch


def _step_seconds(model: LanguageModel, rows: int, prompt: int, *, recorded: bool) -> float:
    """The median of steps in which every row denoises and none stores a block."""
    taken = []
    for _ in range(3):
        batch = _batch(model, rows, prompt, recorded=recorded)
        while batch.active == rows:
            events: list[Any] = []
            seconds = _seconds(lambda batch=batch, events=events: events.extend(batch.step()), model.device)
            filled = sum(isinstance(event, Filled) for event in events)
            if filled == rows and not any(isinstance(event, Persisted) for event in events):
                taken.append(seconds)
    return statistics.median(taken)


def _experts_hit(model: LanguageModel, rows: int, prompt: int) -> float:
    """How many experts a layer's tokens choose in a step, on average."""
    batch = _batch(model, rows, prompt, recorded=False)
    with _routed(model) as hit:
        for _ in range(STEPS):
            batch.step()
    return statistics.mean(hit) if hit else 0.0


@contextmanager
def _routed(model: LanguageModel) -> Iterator[list[int]]:
    hit: list[int] = []

    def count(_: nn.Module, given: tuple[Tensor], routing: Any) -> None:
        hit.append(len(routing.experts.unique()))

    hooks = [router.register_forward_hook(count) for router in model.routers()]
    yield hit
    for hook in hooks:
        hook.remove()


def _bytes_of_a_step(model: LanguageModel, rows: int, prompt: int, experts: float) -> float:
    """Of weights, keys and values."""
    every = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    stacked = [mixture.experts for mixture in mixtures_of(model).values()]
    of_experts = sum(t.nbytes for one in stacked for t in (*one.parameters(), *one.buffers()))
    embedding = model.get_parameter("embedding.weight").nbytes
    total = every - embedding - of_experts
    if stacked:
        total += of_experts * experts / mixtures_of(model)[min(mixtures_of(model))].router.weight.shape[0]
    return total + rows * (prompt + BLOCK) / BLOCK * model.page_bytes(block_length=BLOCK)


if __name__ == "__main__":
    main()
