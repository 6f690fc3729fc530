"""Times a block-diffusion training step against the public recipe's: ``make bench-train``.

Both sides train the model of ``model_s.json`` (random weights, the same) on one row of the same tokens
with the same masks: the recipe as in ``public_recipe.py`` (dense mask, logits of 2 L tokens, experts in a
loop), ours as ``unmask train`` does it (layout, gradient_step, Learner). A step is forward, backward,
clipping and AdamW. Each measurement is a process of its own, one side after the other and the next time
the other way round, so that whatever else the machine does falls on both. Memory is the highest resident
set during steps less what weights, gradients and the optimiser's state occupy before them. Of the first
step, loss and gradients are compared. The last line of the output is one JSON object.
"""

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from public_recipe import RecipeInputs, loss_of

from unmask.diffusion import layout, noise
from unmask.diffusion.noise import Corruption, NoiseConfig
from unmask.diffusion.rows import PackedRows
from unmask.models.loading import build
from unmask.models.registry import parse_config
from unmask.training.distributed import World
from unmask.training.learner import Learner
from unmask.training.steps import Totals, gradient_step
from unmask_api.train_job import DiffusionTrainJob

HERE = Path(__file__).parent
SIDES = ("recipe", "unmask")
RATE = 1e-4
LOSS_TOLERANCE = 1e-5
"""Relative difference of the losses."""
GRADIENT_TOLERANCE = 1e-4
"""Norm of the difference of all gradients over the norm of the recipe's. Float32 gives 1e-6; a hundred times
that, because rounding may send a token to another expert where two of them score alike."""


class Side(Protocol):
    """One way to take a training step on one row."""

    def take(self, rows: PackedRows, corruption: Corruption, block: int) -> None:
        """The row to learn from, its masks, and the tokens of a block."""

    def learn(self) -> float:
        """Forward and backward; the loss per token."""

    def gradients(self) -> Iterator[np.ndarray]:
        """What :meth:`learn` left, one parameter at a time."""

    def update(self, rate: float) -> None:
        """Clip, and change the weights."""


def main() -> None:
    """Measure both sides, or be one measurement of one."""
    options = _options()
    if options.profile:
        _profile(options)
    elif options.side:
        print(json.dumps(_measure(options)))
    else:
        _compare(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a training step against the public recipe's.")
    parser.add_argument("--config", type=Path, default=HERE / "model_s.json")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the row")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block")
    parser.add_argument("--steps", type=int, default=1, help="of each measurement; the fastest counts")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument(
        "--complementary", action="store_true", help="train a mask and its complement in each step"
    )
    parser.add_argument(
        "--grouped",
        action="store_true",
        help="give the recipe grouped products in place of a loop over experts",
    )
    parser.add_argument("--profile", action="store_true", help="say where a step of --side spends its time")
    parser.add_argument("--side", choices=SIDES, help="measure this side alone, in this process")
    parser.add_argument("--gradient", type=Path, help="where --side writes the first step's gradient")
    return parser.parse_args()


def _compare(options: argparse.Namespace) -> None:
    command = f"python benchmarks/training.py {' '.join(sys.argv[1:])}".strip()
    machine = f"{_processor()}, {os.cpu_count()} cores, 1 thread"
    print(f"{machine}; torch {torch.__version__}; {datetime.date.today()}\n{command}\n")
    print(
        "| run | side | s / step | CPU s / step | memory of a step, MiB | loss |\n|---|---|---|---|---|---|"
    )
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        gradients = {side: Path(folder, side) for side in SIDES}
        for repeat in range(options.repeats):
            for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
                own = _in_a_process(side, None if repeat else gradients[side])
                found[side].append(own)
                cells = (repeat + 1, side, own["seconds"], own["cpuSeconds"], own["stepMiB"], own["loss"])
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
        difference = _difference(*(np.memmap(gradients[side], np.float32, "r") for side in SIDES))
    loss = abs(found["unmask"][0]["loss"] / found["recipe"][0]["loss"] - 1)
    if not (loss <= LOSS_TOLERANCE and difference <= GRADIENT_TOLERANCE):
        sys.exit(
            f"the sides do not compute the same: the loss differs by {loss:.1e}"
            f" (allowed {LOSS_TOLERANCE:.0e}),"
            f" the gradient by {difference:.1e} (allowed {GRADIENT_TOLERANCE:.0e})"
        )

    def quotient(field: str) -> float:
        pairs = zip(found["recipe"], found["unmask"], strict=True)
        return statistics.median(recipe[field] / own[field] for recipe, own in pairs)

    fields = ("seconds", "cpuSeconds", "stepMiB", "restMiB")
    medians = {
        side: {field: statistics.median(own[field] for own in found[side]) for field in fields}
        for side in SIDES
    }
    last_line = {
        "benchmark": "block-diffusion training step",
        "stepsPerSecondRatio": round(quotient("seconds"), 3),
        "cpuTimeRatio": round(quotient("cpuSeconds"), 3),
        "peakMemoryRatio": round(1 / quotient("stepMiB"), 3),
        "lossDifference": loss,
        "lossTolerance": LOSS_TOLERANCE,
        "gradientDifference": difference,
        "gradientTolerance": GRADIENT_TOLERANCE,
        **medians,
        "model": options.config.stem,
        "length": options.length,
        "block": options.block,
        "complementary": options.complementary,
        "recipeExperts": "grouped" if options.grouped else "loop",
        "repeats": options.repeats,
        "command": command,
        "machine": machine,
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
    }
    print(f"\n{json.dumps(last_line)}")


def _in_a_process(side: str, gradient: Path | None) -> dict[str, Any]:
    extra = [] if gradient is None else ["--gradient", str(gradient)]
    run = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--side", side, *extra],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return measured


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Some steps of one side, in this process."""
    torch.set_num_threads(1)
    side = _side(options)
    # A step on two blocks brings in code, gradients and the optimiser's state: none of it a long step's own.
    side.take(*_row(options, length=2 * options.block), options.block)
    side.learn()
    side.update(0.0)
    side.take(*_row(options, length=options.length), options.block)
    _give_back()
    rest = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds, cpu_seconds, losses = [], [], []
    for number in range(options.steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        losses.append(side.learn())
        learnt, cpu_learnt = time.perf_counter(), time.process_time()
        if number == 0 and options.gradient is not None:
            with options.gradient.open("wb") as file:
                for part in side.gradients():
                    file.write(part.tobytes())
        saved, cpu_saved = time.perf_counter(), time.process_time()
        side.update(RATE)
        seconds.append(learnt - started + time.perf_counter() - saved)
        cpu_seconds.append(cpu_learnt - cpu_started + time.process_time() - cpu_saved)
    return {
        "loss": losses[0],
        "seconds": round(min(seconds), 3),
        "cpuSeconds": round(min(cpu_seconds), 3),
        "stepMiB": round(_resident("VmHWM") - rest, 1),
        "restMiB": round(rest, 1),
    }


def _learner(options: argparse.Namespace) -> Learner:
    """Weights, gradient and optimiser of the model; the recipe uses the weights and gradient alone."""
    config = json.loads(options.config.read_text())
    stage = {
        "name": "blocks",
        "objective": "bdlm",
        "steps": 1,
        "length": 512,
        "rowsPerStep": 1,
        "blockSizes": [32],
        "learningRate": {"peak": str(RATE)},
    }
    job = {
        "apiVersion": "unmask.dev/v1alpha1",
        "kind": "DiffusionTrainJob",
        "metadata": {"name": "benchmark"},
        "spec": {
            "model": {"init": {"config": config}, "tokenizer": {"uri": "pvc://data/tokenizer"}},
            "data": {"train": [{"uri": "pvc://data/train.jsonl", "format": "text"}]},
            "stages": [stage],
            "checkpoint": {"uri": "pvc://run/benchmark"},
        },
    }
    return Learner(build(parse_config(config)), DiffusionTrainJob.from_json(json.dumps(job)).spec)


def _side(options: argparse.Namespace) -> Side:
    learner = _learner(options)
    return _Recipe(learner, grouped=options.grouped) if options.side == "recipe" else _Unmask(learner)


class _Unmask:
    """The step of ``unmask train``."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._world = World(rank=0, size=1, device=torch.device("cpu"))
        self._totals: Totals | None = None

    def take(self, rows: PackedRows, corruption: Corruption, block: int) -> None:
        self._rows, self._corruption, self._block = rows, corruption, block

    def learn(self) -> float:
        self._learner.weights.gradient.zero_()
        mask = self._learner.model.mask_token_id
        inputs = layout.two_copy(self._rows, self._corruption, block_length=self._block, mask_token_id=mask)
        self._totals = gradient_step(self._learner.weights, iter([inputs]), self._world, stop=False)
        return self._totals.loss

    def gradients(self) -> Iterator[np.ndarray]:
        assert self._totals is not None, "there was a step"
        for part in self._learner.weights.gradient.split(1 << 20):
            yield (part / self._totals.normaliser).numpy()

    def update(self, rate: float) -> None:
        assert self._totals is not None, "there was a step"
        self._learner.gradient_norm(self._totals)
        self._learner.step(self._totals, rate, freeze_router_bias=rate == 0)


class _Recipe:
    """Ordinary torch around :func:`public_recipe.loss_of`; a mask and its complement are two passes."""

    def __init__(self, learner: Learner, *, grouped: bool) -> None:
        self._model, self._grouped = learner.model, grouped
        self._optimizer = torch.optim.AdamW(self._model.parameters(), fused=True)

    def take(self, rows: PackedRows, corruption: Corruption, block: int) -> None:
        drawn = zip(corruption.masked, corruption.ratio, strict=True)
        ids = torch.from_numpy(rows.ids[0])
        self._views = [
            RecipeInputs(ids, torch.from_numpy(masked[0]), torch.from_numpy(1 / ratio[0]), block)
            for masked, ratio in drawn
        ]

    def learn(self) -> float:
        self._optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for inputs in self._views:
            loss = loss_of(self._model, inputs, grouped=self._grouped) / len(self._views)
            loss.backward()
            total += float(loss.detach())
        return total

    def gradients(self) -> Iterator[np.ndarray]:
        for parameter in self._model.parameters():
            assert parameter.grad is not None, "there was a step"
            yield parameter.grad.numpy()

    def update(self, rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()


def _row(options: argparse.Namespace, *, length: int) -> tuple[PackedRows, Corruption]:
    """One document of random tokens, and its masks: a ratio per block, uniform in 0 to 1."""
    shape = (1, length)
    vocabulary = json.loads(options.config.read_text())["vocab_size"]
    zeros = np.zeros(shape, np.int64)
    rows = PackedRows(
        ids=np.random.default_rng(0).integers(2, vocabulary // 2, shape),
        document=zeros,
        position=np.arange(length)[None],
        supervised=np.ones(shape, np.bool_),
        ordinal=zeros,
    )
    config = NoiseConfig(views=2 if options.complementary else 1, complementary=options.complementary)
    return rows, noise.corrupt(rows, config, seed=1, block_length=options.block)


def _difference(recipe: np.ndarray, own: np.ndarray) -> float:
    """The norm of the difference of two flat gradients over the norm of the first."""
    squares = np.zeros(2)
    for start in range(0, len(recipe), 1 << 22):
        one, other = (part[start : start + (1 << 22)].astype(np.float64) for part in (recipe, own))
        squares += ((one - other) ** 2).sum(), (one**2).sum()
    return float((squares[0] / squares[1]) ** 0.5)


def _profile(options: argparse.Namespace) -> None:
    """Where the first step spends its time, by operation."""
    torch.set_num_threads(1)
    side = _side(options)
    side.take(*_row(options, length=options.length), options.block)
    with torch.profiler.profile(profile_memory=True) as profile:
        side.learn()
        side.update(RATE)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=48))


def _give_back() -> None:
    """Return freed memory to the system, so that the resident set is what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> float:
    """A line of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{field}:\s*(\d+) kB", lines, re.MULTILINE)[0]) / 1024


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return next(iter(re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)), platform.machine())


if __name__ == "__main__":
    main()
