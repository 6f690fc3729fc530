"""Times decoding, beside the plain way, the published way and the machine's limits: ``make bench-decode``.

The models (``model_m.json``, ``model_s.json``) have random weights. A forward takes as long as a trained
one's, and no confidence reaches the threshold, so on all sides each step fills 4 positions and a block of 32
takes 8 steps. Sides take turns, in one process with one thread, and ratios are of the fastest runs. The clock
is the thread's own: what else runs on the machine takes none of its time, though it slows memory down.

* ``p1``: one request, model M: ours in float32 and int8, the plain cached way, and the published way;
* ``p2``: 16 such requests at once, against the others one by one;
* ``p3``: one request, model S;
* ``p4``: reading a prompt of 1,024 tokens, model M;
* ``p5``: one step, against reading its weights once at the measured speed of memory, and in float32 against
  its products at the best speed of products of so few rows, which can be the nearer limit;
* ``p7``: what of a forward of 16 rows is not the model;
* ``parts``: which parts of the model a forward spends its time in.

The published way runs the whole text at every step. A step of each length is timed, and counted as often as
``generate`` would take it; nobody waits for all of them. Prints what it measures; the last line is one JSON
object.

Other programs take turns with ours in ``p1`` to ``p4`` where UNMASK_PEERS is the path of a Python file that
knows them. It defines ``peers(model)``, which is given our model and returns functions by name, each of which
is given the prompt's token ids, how many to generate, the block length and the tokens that each step fills,
does that with the model's weights, and returns the generated ids; of ``p2`` they do one request after the
other, which is timed once. And it defines ``readers(model)`` for ``p4``: functions that are given a prompt's
token ids and run one forward of them all.
"""

import argparse
import datetime
import json
import os
import platform
import re
import runpy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_decoding import PlainModel, plain_steps, published_step
from torch import Tensor, nn

from unmask.diffusion.batch import Filled, Finished, Persisted, Prefilled
from unmask.diffusion.decoding import DecodingParams
from unmask.models.base import LanguageModel
from unmask.models.feedforward import FeedForward
from unmask.models.int8 import Int8Experts, Int8Linear, quantise
from unmask.models.loading import build
from unmask.models.moe import Experts, MixtureOfExperts, Router
from unmask.models.onednn import ReorderedExperts, ReorderedLinear, reorder
from unmask.models.registry import parse_config
from unmask.models.row_tiles import tiled
from unmask.models.transformer import Attention
from unmask.serving import ragged
from unmask.serving.engine import Engine, Request
from unmask.serving.outbox import Outbox
from unmask.serving.ragged import RaggedBatch
from unmask.telemetry import Recorder

HERE = Path(__file__).parent
BLOCK, STEPS = 32, 8
EACH_STEP = BLOCK // STEPS
Peer = Callable[[list[int], int, int, int], Sequence[int]]
PARTS = ("p1", "p2", "p3", "p4", "p5", "p7", "parts")


class Subject:
    """One configuration, and the models that are made from its weights when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.config = parse_config(json.loads(path.read_text()))

    @cached_property
    def weights(self) -> LanguageModel:
        """As others take them."""
        return build(self.config).eval()

    @cached_property
    def float32(self) -> LanguageModel:
        """With the same weights, as a server has them."""
        return reorder(build(self.config).eval())

    @cached_property
    def int8(self) -> LanguageModel:
        """With the same weights in int8."""
        return quantise(build(self.config).eval())

    @cached_property
    def plain(self) -> PlainModel:
        """Plain decoding with the same weights."""
        return PlainModel(self.weights, grouped=True)

    @cached_property
    def published(self) -> PlainModel:
        """The published way with them."""
        return PlainModel(self.weights, grouped=False)

    @cached_property
    def peers(self) -> dict[str, Peer]:
        """Other programs with the same weights, by name."""
        return dict(self._known_peers["peers"](self.weights)) if self._known_peers else {}

    @cached_property
    def readers(self) -> dict[str, Callable[[list[int]], object]]:
        """How these read a prompt."""
        return dict(self._known_peers["readers"](self.weights)) if self._known_peers else {}

    @cached_property
    def _known_peers(self) -> dict[str, Any]:
        path = os.environ.get("UNMASK_PEERS")
        return runpy.run_path(path) if path else {}

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, self.config.vocab_size // 2, (length,), generator=generator).tolist()

    def params(self, new: int) -> DecodingParams:
        """Eight steps for each block, whatever the model is sure of."""
        return DecodingParams(
            max_new_tokens=new,
            block_length=BLOCK,
            steps=STEPS,
            threshold=1.1,
            eos_token_id=-1,
            mask_token_id=self.config.vocab_size - 1,
        )


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(1)  # the clock is this thread's
    medium, small = Subject(options.medium), Subject(options.small)
    print(_machine(), flush=True)
    if "UNMASK_PEERS" not in os.environ:
        print("UNMASK_PEERS is not set: no other programs are compared with", flush=True)
    with torch.inference_mode():
        found = _measured(options, medium, small)
    print(json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times decoding beside the plain way and the machine's limits."
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side")
    parser.add_argument("--prompt", type=int, default=512, help="tokens, whole blocks")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate, whole blocks")
    parser.add_argument("--rows", type=int, default=16, help="requests at once")
    parser.add_argument("--long-prompt", type=int, default=1024, help="tokens to read in p4")
    parser.add_argument("--medium", type=Path, default=HERE / "model_m.json", help="config.json of model M")
    parser.add_argument("--small", type=Path, default=HERE / "model_s.json", help="config.json of model S")
    return parser.parse_args()


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = (re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE) or [platform.machine()])[0]
    flags = set((re.findall(r"^flags\s*: (.*)$", text, re.MULTILINE) or [""])[0].split())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags]
    return (
        f"{name}, {os.cpu_count()} cores, {' '.join(wide)}; 1 thread; torch {torch.__version__}; "
        f"{datetime.date.today()}"
    )


def _measured(options: argparse.Namespace, medium: Subject, small: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {}
    size, long = (options.prompt, options.new, options.repeats), options.long_prompt
    one_by_one: dict[str, float] = {}
    for part in options.only:
        match part:
            case "p1":
                one_by_one = _one_request(medium, *size)
                found[part] = _against_all(one_by_one)
            case "p2":
                one_by_one = one_by_one or _fastest(_others(medium, options.prompt, options.new), 1)
                found[part] = _many_requests(medium, options.rows, options.prompt, options.new, one_by_one)
            case "p3":
                seconds = _one_request(small, *size)
                found[part] = _against_all(seconds)
            case "p4":
                seconds = _reading(medium, long, options.repeats)
                found[part] = _against_all(seconds)
            case "p5":
                found[part] = _step_against_memory(medium, options.prompt)
            case "p7":
                found[part] = _host(medium, options.rows)
            case "parts":
                found[part] = _breakdown(medium, (1, options.rows), options.prompt)
    return found


def _seconds(run: Callable[[], object]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started


def _ratios(seconds: dict[str, float], *, to: str, over: Sequence[str]) -> dict[str, float]:
    """How many times as fast as ``to`` each of ``over`` is."""
    return {f"{side} against {to}": round(seconds[to] / seconds[side], 3) for side in over}


def _against_all(seconds: dict[str, float]) -> dict[str, float]:
    """How many times as fast ours are as each of the others."""
    ours = ("float32", "int8")
    others = [side for side in seconds if side not in ours]
    return {key: ratio for other in others for key, ratio in _ratios(seconds, to=other, over=ours).items()}


def _fastest(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The fewest seconds of each side, which take turns."""
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            taken[side].append(run())
    return {side: min(seconds) for side, seconds in taken.items()}


def _tell(what: str, seconds: dict[str, float], tokens: int) -> None:
    for side, took in seconds.items():
        print(f"{what}: {side} {took:.2f} s, {tokens / took:.1f} tokens/s", flush=True)


# Whole requests


def _one_request(subject: Subject, prompt: int, new: int, repeats: int) -> dict[str, float]:
    sides = _others(subject, prompt, new) | {
        "float32": lambda: _ours_seconds(subject, subject.float32, 1, prompt, new),
        "int8": lambda: _ours_seconds(subject, subject.int8, 1, prompt, new),
    }
    for model in (subject.float32, subject.int8):
        _ours_seconds(subject, model, 1, BLOCK, BLOCK)  # the first one pays for warming up
    seconds = _fastest(sides, repeats)
    _tell(f"{subject.name}, prompt {prompt}, {new} new, 1 request", seconds, new)
    return seconds


def _others(subject: Subject, prompt: int, new: int) -> dict[str, Callable[[], float]]:
    """What ours is compared with."""
    sides: dict[str, Callable[[], float]] = {
        "published": partial(_published_seconds, subject, prompt, new),
        "plain": partial(_plain_seconds, subject, prompt, new),
    }
    return sides | {
        name: partial(_peer_seconds, subject, peer, prompt, new) for name, peer in subject.peers.items()
    }


def _published_seconds(subject: Subject, prompt: int, new: int) -> float:
    """Of one request: a step of each length, as often as it would be taken."""
    seconds = 0.0
    for end in range(prompt + BLOCK, prompt + new + 1, BLOCK):
        text = torch.tensor(subject.prompt(end))
        text[-BLOCK:] = subject.published.mask_token_id
        seconds += STEPS * _seconds(
            lambda text=text: published_step(subject.published, text, block=BLOCK, count=EACH_STEP)
        )
    return seconds


def _plain_seconds(subject: Subject, prompt: int, new: int) -> float:
    ids = torch.tensor(subject.prompt(prompt))
    return _seconds(lambda: list(plain_steps(subject.plain, ids, new=new, block=BLOCK, count=EACH_STEP)))


def _peer_seconds(subject: Subject, peer: Peer, prompt: int, new: int) -> float:
    ids = subject.prompt(prompt)
    generated: list[int] = []
    seconds = _seconds(lambda: generated.extend(peer(ids, new, BLOCK, EACH_STEP)))
    assert len(generated) == new, f"a peer generated {len(generated)} tokens, not {new}"
    return seconds


def _ours_seconds(subject: Subject, model: LanguageModel, rows: int, prompt: int, new: int) -> float:
    batch = RaggedBatch(model, rows=rows, capacity=prompt + new, block_length=BLOCK)
    prompts = [subject.prompt(prompt, seed) for seed in range(rows)]

    def run() -> None:
        for one in prompts:
            batch.admit(one, subject.params(new))
        ended = 0
        while ended < rows:
            ended += sum(isinstance(event, Finished) for event in batch.step())

    return _seconds(run)


def _many_requests(
    subject: Subject, rows: int, prompt: int, new: int, one_by_one: dict[str, float]
) -> dict[str, float]:
    seconds = {side: rows * took for side, took in one_by_one.items()}
    for side, model in (("float32", subject.float32), ("int8", subject.int8)):
        seconds[side] = _ours_seconds(subject, model, rows, prompt, new)
    _tell(f"{subject.name}, prompt {prompt}, {new} new, {rows} requests", seconds, rows * new)
    return _against_all(seconds)


# Reading


def _reading(subject: Subject, length: int, repeats: int) -> dict[str, float]:
    ids = torch.tensor(subject.prompt(length))

    def ours(model: LanguageModel) -> float:
        room = max(length, 4 * BLOCK)  # all in one forward
        batch = RaggedBatch(model, rows=1, capacity=length + BLOCK, block_length=BLOCK, max_positions=room)
        batch.admit(subject.prompt(length), subject.params(BLOCK))
        return _seconds(batch.step)

    def published() -> None:
        subject.published.logits(subject.published.hidden(ids, 0, None, block=BLOCK))

    def plain() -> None:
        subject.plain.hidden(ids, 0, subject.plain.new_cache(length), block=BLOCK)

    sides = {
        "published": lambda: _seconds(published),
        "plain": lambda: _seconds(plain),
        "float32": lambda: ours(subject.float32),
        "int8": lambda: ours(subject.int8),
    }
    for name, read in subject.readers.items():
        sides[name] = lambda read=read: _seconds(lambda: read(subject.prompt(length)))  # type: ignore[misc]
    seconds = _fastest(sides, repeats + 1)
    _tell(f"{subject.name}, reading {length}", seconds, length)
    return seconds


# One step


def _step_against_memory(subject: Subject, prompt: int) -> dict[str, float]:
    """Seconds of a denoise step over those of reading its weights; 1 is the limit where memory is it."""
    found: dict[str, float] = {}
    speed = _bytes_per_second()
    print(f"memory: {speed / 1e9:.1f} GB/s, read by one thread", flush=True)
    for side, model, width in (("float32", subject.float32, 4), ("int8", subject.int8, 1)):
        with _experts_hit(model) as hit:
            seconds = _step_seconds(subject, model, prompt)
        experts = statistics.mean(hit)
        weights = _weights_of_a_step(subject, experts) * width
        found[side] = round(seconds / (weights / speed), 3)
        print(
            f"{subject.name}, one step at {prompt}: {side} {seconds * 1e3:.0f} ms; {experts:.1f} experts "
            f"of a layer hit, {weights / 1e9:.2f} GB, {weights / speed * 1e3:.0f} ms to read them",
            flush=True,
        )
        arithmetic = _products_seconds(subject, experts, side) + _attention_seconds(subject, prompt)
        found[f"{side} against arithmetic"] = round(seconds / arithmetic, 3)
    return found


def _products_seconds(subject: Subject, experts: float, side: str) -> float:
    """Seconds of a denoise step's products by weights, each as fast as any way of so many rows is.

    Each of the ``experts`` of a layer that are hit has as many rows as the others, in whole tiles; the output
    layer has the positions that are masked in the mean. Weights are in the cache, which a step has to read.
    """
    config, model = subject.config, build(subject.config, device="meta")
    rows = tiled(round(BLOCK * config.num_experts_per_tok / experts))
    stacked = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
    output = config.vocab_size * config.hidden_size
    dense = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel() - stacked - output
    masked = statistics.mean(BLOCK - EACH_STEP * step for step in range(1, STEPS))
    routed = 2 * BLOCK * stacked * config.num_experts_per_tok / config.num_experts
    others = 2 * (BLOCK * dense + masked * output)
    few, all_of_them = (
        _products_per_second(rows, config.hidden_size, side),
        _products_per_second(BLOCK, config.hidden_size, side),
    )
    seconds = routed / few + others / all_of_them
    print(
        f"{side} products: {few / 1e9:.0f} G/s with {rows} rows, {all_of_them / 1e9:.0f} with {BLOCK}; "
        f"a step's experts {routed / 1e9:.1f} G, the rest {others / 1e9:.1f}: {seconds * 1e3:.0f} ms",
        flush=True,
    )
    return seconds


def _attention_seconds(subject: Subject, prompt: int) -> float:
    """Seconds of a denoise step's attention to a prompt and itself, keys and values in the cache."""
    config = subject.config
    heads, size = config.num_key_value_heads, config.head_dim
    query = torch.randn(1, heads, config.num_attention_heads // heads * BLOCK, size)
    key, value = torch.randn(2, 1, heads, prompt + BLOCK, size)
    once = min(_seconds(lambda: F.scaled_dot_product_attention(query, key, value)) for _ in range(100))
    seconds = once * config.num_hidden_layers
    print(f"attention to {prompt + BLOCK} positions: {seconds * 1e3:.0f} ms", flush=True)
    return seconds


def _products_per_second(rows: int, inner: int, side: str) -> float:
    """Operations, two for each product, of the fastest way to multiply by a weight in the cache."""
    x, weight = torch.randn(rows, inner), torch.randn(512, inner)
    arranged = Int8Linear(inner, 512) if side == "int8" else ReorderedLinear(inner, 512)
    arranged.put("weight", (), weight)
    ways: list[Callable[[], Tensor]] = [lambda: arranged(x)]
    if side == "float32":
        turned = weight.T.contiguous()
        ways += [lambda: F.linear(x, weight), lambda: x @ turned, lambda: weight @ x.T]
    return 2 * rows * weight.numel() / min(_seconds(way) for way in ways for _ in range(100))


def _step_seconds(subject: Subject, model: LanguageModel, prompt: int) -> float:
    """The mean of a block's denoise steps, each the fastest of three blocks; none that stores a block."""
    new = 3 * BLOCK
    batch = RaggedBatch(model, rows=1, capacity=prompt + new, block_length=BLOCK)
    batch.admit(subject.prompt(prompt), subject.params(new))
    taken: dict[int, list[float]] = {}
    while batch.active:
        started = time.thread_time()
        events = batch.step()
        seconds = time.thread_time() - started
        if any(isinstance(event, Persisted | Prefilled) for event in events):
            continue
        for event in events:
            if isinstance(event, Filled) and event.step:
                taken.setdefault(event.step, []).append(seconds)
    return statistics.mean(min(seconds) for seconds in taken.values())


def _weights_of_a_step(subject: Subject, experts: float) -> float:
    """How many weights a step reads that hits ``experts`` experts of each layer."""
    config, model = subject.config, build(subject.config, device="meta")
    every = sum(parameter.numel() for parameter in model.parameters()) - model.embedding.weight.numel()
    stacked = sum(
        p.numel() for module in model.modules() if isinstance(module, Experts) for p in module.parameters()
    )
    return every - stacked * (1 - experts / config.num_experts)


def _bytes_per_second() -> float:
    numbers = torch.ones(128 << 20)
    return numbers.nbytes / min(
        _seconds(way) for way in (numbers.sum, lambda: numbers.dot(numbers)) for _ in range(5)
    )


@contextmanager
def _experts_hit(model: LanguageModel) -> Iterator[list[int]]:
    """How many experts of a layer each forward of a block goes to."""
    hit: list[int] = []

    def count(module: nn.Module, given: tuple[Tensor], routing: Any) -> None:
        if len(given[0]) == BLOCK:
            hit.append(len(routing.experts.unique()))

    hooks = [router.register_forward_hook(count) for router in model.routers()]
    yield hit
    for hook in hooks:
        hook.remove()


# What is not the model


class Stopwatch:
    """Seconds spent in calls, by name; time in a timed call inside another one counts for the inner alone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[float] = []

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, on the clock."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            self._open.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                took = time.thread_time() - started
                self.seconds[name] += took - self._open.pop()
                if self._open:
                    self._open[-1] += took

        return run


@contextmanager
def _watched(model: LanguageModel) -> Iterator[Stopwatch]:
    """Time the parts of ``model``, and the choice of tokens from scores."""
    watch = Stopwatch()
    kinds = {
        Attention: "attention",
        Router: "router",
        Experts: "experts",
        Int8Experts: "experts",
        ReorderedExperts: "experts",
        FeedForward: "dense feed-forward",
        MixtureOfExperts: "experts",
    }
    changed = [module for module in model.modules() if type(module) in kinds]
    for module in changed:
        module.forward = watch.timed(kinds[type(module)], module.forward)
    model.hidden = watch.timed("norms, embedding, sums", model.hidden)  # type: ignore[method-assign]
    model.logits = watch.timed("output layer", model.logits)  # type: ignore[method-assign]
    chosen, ragged.best_tokens_at = ragged.best_tokens_at, watch.timed("choice", ragged.best_tokens_at)
    try:
        yield watch
    finally:
        ragged.best_tokens_at = chosen
        for module in (*changed, model):
            for name in ("forward", "hidden", "logits"):
                module.__dict__.pop(name, None)


def _turned(
    subject: Subject, model: LanguageModel, rows: int, prompt: int, forwards: int
) -> dict[str, float]:
    """Milliseconds per forward of ``rows`` requests that decode, by what they are spent on."""
    room = max(rows * prompt, rows * 2 * BLOCK, 4 * BLOCK)  # all read in one forward, and begin together
    batch = RaggedBatch(model, rows=rows, capacity=prompt + 4 * BLOCK, block_length=BLOCK, max_positions=room)
    engine = Engine(batch, Recorder())
    prompts = (subject.prompt(prompt, seed) for seed in range(rows))
    requests = [
        Request(prompt=one, params=subject.params(4 * BLOCK), outbox=Outbox(lambda: None), canvas=True)
        for one in prompts
    ]
    for request in requests:
        engine.submit(request)
    reading = list(requests)
    while reading:
        engine.turn()
        reading = [one for one in reading if not any(isinstance(item, Filled) for item in one.outbox.take())]
    with _watched(model) as watch:
        turn = watch.timed("host", engine.turn)
        for _ in range(forwards):
            turn()
            for request in requests:
                request.outbox.take()
    return {name: seconds / forwards * 1e3 for name, seconds in watch.seconds.items()}


def _host(subject: Subject, rows: int) -> dict[str, float]:
    """Share of a forward that is neither the model nor the choice of tokens from its scores."""
    found = {}
    for side, model in (("float32", subject.float32), ("int8", subject.int8)):
        spent = _turned(subject, model, rows, 4 * BLOCK, forwards=2 * STEPS)
        total = sum(spent.values())
        found[side] = round(spent["host"] / total, 4)
        found[f"{side}, choice included"] = round((spent["host"] + spent["choice"]) / total, 4)
        print(
            f"{subject.name}, {rows} rows: {side} forward {total:.0f} ms, of it host {spent['host']:.1f}, "
            f"choice of tokens {spent['choice']:.1f}",
            flush=True,
        )
    return found


def _breakdown(subject: Subject, shapes: Sequence[int], prompt: int) -> dict[str, dict[str, float]]:
    """Milliseconds per forward of each part, for so many rows."""
    found = {}
    for rows in shapes:
        for side, model in (("float32", subject.float32), ("int8", subject.int8)):
            spent = _turned(subject, model, rows, prompt, forwards=STEPS)
            found[f"{side}, {rows}"] = {name: round(took, 2) for name, took in sorted(spent.items())}
            print(f"{subject.name}, {rows} rows at {prompt}, {side}, ms per forward:", flush=True)
            for name, took in sorted(spent.items(), key=lambda item: -item[1]):
                print(f"  {name}: {took:.1f}", flush=True)
    return found


if __name__ == "__main__":
    main()
