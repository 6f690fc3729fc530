"""Times a server's forwards, and what its users wait for: ``make bench-serve``.

The model (``model_s.json``) has random weights: a forward takes as long as a trained one's, and no confidence
reaches the threshold, so each block takes exactly as many forwards as it is told to. Three comparisons, each
of two ways in one run, since absolute times are the machine's:

* one denoise step of so many requests with so much context, ragged, against one slot for each request;
* 16 users of mixed lengths who come one after the other: taken up as rows come free, against groups that
  are begun together and answered when all of the group are done;
* the time between blocks of requests that decode, while a prompt of 1,024 tokens is read, and without it.

Time is the processor's, of the one thread that computes: what else runs on the machine takes none of it, and
nobody sleeps until the next user comes. Prints what it measures; the last line is one JSON object of ratios.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from unmask.diffusion.batch import Batch, Committed, Finished, Prefilled
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import BlockBatch
from unmask.models.loading import LanguageModel, build
from unmask.models.registry import parse_config
from unmask.serving.ragged import RaggedBatch

HERE = Path(__file__).parent
BLOCK = 32
CAPACITY = 1280
SHAPES = {
    "1 row, 128": [128],
    "1 row, 512": [512],
    "1 row, 1024": [1024],
    "8 rows, 128": [128] * 8,
    "8 rows, 1024": [1024] * 8,
    "8 rows, mixed": [128, 256, 512, 1024] * 2,
    "16 rows, 512": [512] * 16,
    "16 rows, mixed": [128, 256, 512, 1024] * 4,
}
"""Tokens of context of each row of a step."""
REPEATS = 12


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Times a server's forwards, and what its users wait for.")
    parser.add_argument("--config", type=Path, default=HERE / "model_s.json", help="config.json of a LLaDA2")
    config = parse_config(json.loads(parser.parse_args().config.read_text()))
    torch.set_num_threads(1)  # the clock is this thread's
    model = build(config).eval()
    print(f"{platform.machine()}, torch {torch.__version__}, 1 thread", flush=True)
    ratios = {
        "step_of_slots": _steps(model),
        "p95_latency_of_static": _continuous_against_static(model),
        "inter_block_p95_with_long_prompt": _beside_a_long_prompt(model),
    }
    print(json.dumps(ratios))


def _params(model: LanguageModel, new: int, *, steps: int) -> DecodingParams:
    unused = model.config.vocab_size - 1
    return DecodingParams(
        max_new_tokens=new,
        block_length=BLOCK,
        steps=steps,
        threshold=1.1,
        eos_token_id=-1,
        mask_token_id=unused,
    )


def _prompt(model: LanguageModel, length: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(1, model.config.vocab_size // 2) for _ in range(length)]


# One step


def _steps(model: LanguageModel) -> dict[str, float]:
    """Time of a ragged step over that with a slot for each request: below 1 is faster."""
    ratios = {}
    for name, contexts in SHAPES.items():
        slots, ragged = (_decoding(model, make, contexts) for make in (_slots, _ragged))
        times: dict[str, list[float]] = {"slots": [], "ragged": []}
        for _ in range(REPEATS):
            for way, batch in (("slots", slots), ("ragged", ragged)):
                started = time.thread_time()
                batch.step()
                times[way].append(time.thread_time() - started)
        best = {way: min(taken) for way, taken in times.items()}
        ratios[name] = round(best["ragged"] / best["slots"], 3)
        print(
            f"step, {name}: slots {best['slots'] * 1e3:.0f} ms, ragged {best['ragged'] * 1e3:.0f} ms",
            flush=True,
        )
    return ratios


def _slots(model: LanguageModel, rows: int, capacity: int) -> Batch:
    return BlockBatch(model, rows=rows, capacity=capacity, block_length=BLOCK)


def _ragged(model: LanguageModel, rows: int, capacity: int) -> Batch:
    return RaggedBatch(model, rows=rows, capacity=capacity, block_length=BLOCK)


def _decoding(
    model: LanguageModel, make: Callable[[LanguageModel, int, int], Batch], contexts: Sequence[int]
) -> Batch:
    """A batch whose requests have all been read and decode a block of 32 forwards."""
    batch = make(model, len(contexts), max(contexts) + BLOCK)
    params = _params(model, BLOCK, steps=BLOCK)
    left = sum(contexts)
    for seed, length in enumerate(contexts):
        batch.admit(_prompt(model, length, seed), params)
    while left:
        left -= sum(event.tokens for event in batch.step() if isinstance(event, Prefilled))
    batch.step()
    return batch


# Users


def _continuous_against_static(model: LanguageModel) -> float:
    """95th percentile of the users' latency, as rows come free over groups."""
    dice = random.Random(5)
    arrivals = sorted(dice.uniform(0, 8) for _ in range(16))
    lengths = [(dice.choice([32, 64, 128, 256, 512]), dice.choice([32, 64, 128, 256])) for _ in range(16)]
    worst = {}
    for way in ("static", "continuous"):
        latencies = _latencies(model, arrivals, lengths, grouped=way == "static")
        worst[way] = _percentile(latencies, 95)
        print(
            f"16 users, {way}: p50 {statistics.median(latencies):.1f} s, p95 {worst[way]:.1f} s", flush=True
        )
    return round(worst["continuous"] / worst["static"], 3)


def _latencies(
    model: LanguageModel, arrivals: Sequence[float], lengths: Sequence[tuple[int, int]], *, grouped: bool
) -> list[float]:
    """Seconds from each user's arrival to the answer."""
    rows = 8
    batch = (_slots if grouped else _ragged)(model, rows, CAPACITY)
    waiting = list(range(len(arrivals)))
    group: dict[int, int] = {}
    ended: dict[int, float] = {}
    skipped = -time.thread_time()

    def now() -> float:
        return time.thread_time() + skipped

    while len(ended) < len(arrivals):
        if not grouped or not batch.active:
            while waiting and batch.free_rows and arrivals[waiting[0]] <= now():
                user = waiting.pop(0)
                prompt, new = lengths[user]
                ticket = batch.admit(_prompt(model, prompt, user), _params(model, new, steps=8))
                group[ticket] = user
        if not batch.active:
            skipped += max(0.0, arrivals[waiting[0]] - now())
            continue
        done = [event.ticket for event in batch.step() if isinstance(event, Finished)]
        if not grouped:
            ended |= {group[ticket]: now() for ticket in done}
        elif not batch.active:
            ended |= {user: now() for user in group.values() if user not in ended}
    return [ended[user] - arrived for user, arrived in enumerate(arrivals)]


def _beside_a_long_prompt(model: LanguageModel) -> dict[str, float]:
    """95th percentile of the time between blocks while prompts of 1,024 tokens are read, over the usual."""
    ratios = {}
    for decoders in (2, 8):
        gaps = {way: _gaps(model, decoders, reads=way == "with") for way in ("without", "with")}
        worst = {way: _percentile(taken, 95) for way, taken in gaps.items()}
        ratios[f"{decoders} rows"] = round(worst["with"] / worst["without"], 3)
        print(
            f"{decoders} rows that decode: p95 between blocks {worst['without']:.2f} s, "
            f"while prompts are read {worst['with']:.2f} s",
            flush=True,
        )
    return ratios


def _gaps(model: LanguageModel, decoders: int, *, reads: bool) -> list[float]:
    """Seconds between blocks of requests that decode; if ``reads``, prompts are read all the time."""
    batch = _ragged(model, decoders + 1, CAPACITY)
    for seed in range(decoders):
        batch.admit(_prompt(model, 128, seed), _params(model, 192, steps=8))
    reader, number = None, 100
    last: dict[int, float] = {}
    gaps: list[float] = []
    decoding = set(range(decoders))
    while decoding:
        if reads and reader is None and len(last) == decoders:
            reader = batch.admit(_prompt(model, 1024, number), _params(model, BLOCK, steps=1))
            number += 1
        for event in batch.step():
            if isinstance(event, Committed) and event.ticket in decoding:
                now = time.thread_time()
                if event.ticket in last:
                    gaps.append(now - last[event.ticket])
                last[event.ticket] = now
            elif isinstance(event, Finished):
                decoding.discard(event.ticket)
                reader = None if event.ticket == reader else reader
    return gaps


def _percentile(values: Sequence[float], percent: int) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, len(ranked) * percent // 100)]


if __name__ == "__main__":
    main()
