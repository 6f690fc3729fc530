"""Times a server's forwards, and what its users wait for: ``make bench-serve``.

The model (``model_s.json``) has random weights: a forward takes as long as a trained one's, and no confidence
reaches the threshold, so each block takes exactly as many forwards as it is told to. Comparisons of two or
three ways in one run, since absolute times are the machine's:

* ``steps``: one denoise step of so many requests with so much context, ragged, against one slot for each;
* ``users``: 16 users who ask for texts of mixed lengths. Requests are taken up as rows come free
  (continuous), or in groups that begin together and are answered when all of the group are done: groups of
  whom each member leaves the forwards when it is done (static), or is computed as if it were as long as the
  longest, as a padded batch is (padded). All three run the same forwards;
* ``prompts``: the time between blocks of requests that decode, while prompts of 1,024 tokens are read without
  a pause, and without them. No rate at which such prompts could come is higher.

Users do not wait for answers (open loop). How often they ask is told in shares of what the machine can do:
the rate at which the continuous way answers when all requests are there from the beginning is measured first,
and the requests come as a Poisson process of ``--share`` of it. So they come more slowly to a slower machine,
and what is compared is the same on all.

Time is the processor's, of the one thread that computes: what else runs on the machine takes none of it, and
nobody sleeps until the next request comes. Prints what it measures; the last line is one JSON object with
the ratios, of which smaller is better, and the share.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch

from unmask.client.load import arrivals
from unmask.diffusion.batch import Batch, Committed, Finished, Prefilled
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import BlockBatch
from unmask.models.loading import LanguageModel, build
from unmask.models.onednn import reorder
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
USERS, ROWS = 16, 8
GAPS = 40
"""Times between blocks that are measured, at least."""
Way: TypeAlias = Literal["continuous", "static", "padded"]
WAYS: tuple[Way, ...] = get_args(Way)
PARTS = ("steps", "users", "prompts")
_ROUNDING_S = 1e-9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Times a server's forwards, and what its users wait for.")
    parser.add_argument("--config", type=Path, default=HERE / "model_s.json", help="config.json of a LLaDA2")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--share", type=float, default=0.8, help="of the rate of answers, at which users ask")
    parser.add_argument("--each", type=int, default=3, help="requests of each user")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the clock is this thread's
    model = reorder(build(parse_config(json.loads(given.config.read_text()))).eval())
    print(f"{platform.machine()}, torch {torch.__version__}, 1 thread", flush=True)
    ratios: dict[str, object] = {}
    if "steps" in given.only:
        ratios["step_of_slots"] = _steps(model)
    if "users" in given.only:
        ratios["users_ask_at"] = given.share
        ratios["p95_latency_over"] = _continuous_against_static(model, share=given.share, each=given.each)
    if "prompts" in given.only:
        ratios["inter_block_p95_with_long_prompts"] = _beside_a_long_prompt(model)
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


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, in tokens."""

    prompt: int
    new: int

    def padded_to(self, other: "Ask") -> "Ask":
        """As long as the longer of both, in both."""
        return Ask(max(self.prompt, other.prompt), max(self.new, other.new))


def _asks(count: int) -> list[Ask]:
    """Requests of mixed lengths; of one number, always the same."""
    dice = random.Random(5)
    return [Ask(dice.choice([32, 64, 128, 256, 512]), dice.choice([32, 64, 128, 256])) for _ in range(count)]


def _continuous_against_static(model: LanguageModel, *, share: float, each: int) -> dict[str, float]:
    """95th percentile of the latency, as rows come free, over that in groups."""

    def admit(batch: Batch, ask: Ask, user: int) -> int:
        return batch.admit(_prompt(model, ask.prompt, user), _params(model, ask.new, steps=8))

    def served(way: Way, times: Sequence[float]) -> list[float]:
        batch = _ragged(model, ROWS, CAPACITY)
        return latencies(batch, asks, times, way=way, admit=admit, now=time.thread_time)

    asks = _asks(USERS * each)
    rate = len(asks) / max(served("continuous", [0.0] * len(asks)))
    print(f"{len(asks)} requests at once: {rate:.2f} answers per second", flush=True)
    times = arrivals(len(asks), rate=share * rate, seed=5)
    worst = {}
    for way in WAYS:
        waited = served(way, times)
        worst[way] = _percentile(waited, 95)
        print(
            f"{USERS} users, {each} requests each, {share:.0%} of that rate, {way}: "
            f"p50 {statistics.median(waited):.1f} s, p95 {worst[way]:.1f} s",
            flush=True,
        )
    return {way: round(worst["continuous"] / worst[way], 3) for way in WAYS if way != "continuous"}


def latencies(
    batch: Batch,
    asks: Sequence[Ask],
    times: Sequence[float],
    *,
    way: Way,
    admit: Callable[[Batch, Ask, int], int],
    now: Callable[[], float],
) -> list[float]:
    """Seconds from each request's arrival to its answer.

    Args:
        batch: Idle; does the work.
        asks: What is asked for.
        times: When each comes, ascending, in seconds from the beginning.
        way: Who begins when, and who is answered when.
        admit: Takes a request up, given its number, and returns its ticket.
        now: Seconds spent so far; those until the next arrival are skipped when there is nothing to do.
    """
    waiting = deque(range(len(asks)))
    user_of: dict[int, int] = {}
    ended: dict[int, float] = {}
    skipped = -now()

    def passed() -> float:
        return now() + skipped

    while len(ended) < len(asks):
        if way == "continuous" or not batch.active:
            coming = []
            while waiting and len(coming) < batch.free_rows and times[waiting[0]] <= passed() + _ROUNDING_S:
                coming.append(waiting.popleft())
            longest = reduce(Ask.padded_to, (asks[user] for user in coming), Ask(0, 0))
            for user in coming:
                user_of[admit(batch, longest if way == "padded" else asks[user], user)] = user
        if not batch.active:
            skipped += max(0.0, times[waiting[0]] - passed())
            continue
        done = [event.ticket for event in batch.step() if isinstance(event, Finished)]
        if way == "continuous":
            ended |= {user_of[ticket]: passed() for ticket in done}
        elif not batch.active:
            ended |= {user: passed() for user in user_of.values() if user not in ended}
    return [ended[user] - came for user, came in enumerate(times)]


# Prompts


def _beside_a_long_prompt(model: LanguageModel) -> dict[str, float]:
    """95th percentile of the time between blocks while prompts of 1,024 tokens are read, over the usual."""
    ratios = {}
    for decoders in (2, 8):
        gaps = {way: _gaps(model, decoders, reads=way == "with") for way in ("without", "with")}
        worst = {way: _percentile(taken, 95) for way, taken in gaps.items()}
        ratios[f"{decoders} rows"] = round(worst["with"] / worst["without"], 3)
        print(
            f"{decoders} rows that decode: p95 between {len(gaps['with'])} blocks {worst['without']:.2f} s, "
            f"while prompts are read {worst['with']:.2f} s",
            flush=True,
        )
    return ratios


def _gaps(model: LanguageModel, decoders: int, *, reads: bool) -> list[float]:
    """Seconds between blocks of requests that decode; if ``reads``, prompts are read all the time."""
    batch = _ragged(model, decoders + 1, CAPACITY)
    blocks = GAPS // decoders + 2  # between them one less, and one is over before the first prompt comes
    for seed in range(decoders):
        batch.admit(_prompt(model, 128, seed), _params(model, blocks * BLOCK, steps=8))
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
