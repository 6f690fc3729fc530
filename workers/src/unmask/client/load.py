"""Load for a server: requests that come when they come, and what their callers had to wait.

Arrivals are open-loop: a Poisson process says when each request is sent, whatever the server has answered by
then, and every time is counted from that moment. A generator that waits for answers would ask a slow server
for less, and find it fast.

Absolute times are those of a machine. What compares across runs are ratios, so some requests are sent alone
first, one after the other, and the times under load are told as multiples of those.
"""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask.client.asynchronous import AsyncClient
from unmask.client.errors import RequestError
from unmask.client.events import BlockCommitted, Finished
from unmask.client.options import GenerateOptions

__all__ = ["Ask", "Limits", "Sample", "arrivals", "measure", "ratios", "report"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be sent."""

    prompt: str | None = None
    options: GenerateOptions = field(default_factory=GenerateOptions)


@dataclass(frozen=True, slots=True)
class Limits:
    """What makes an answer a good one, in seconds."""

    first_block: float
    between_blocks: float
    """Of every pair of neighbouring blocks."""


@dataclass(slots=True)
class Sample:
    """What became of one request; times in seconds from when it was to be sent."""

    sent: float = 0.0
    """How much later than meant it was sent: the generator's own delay."""
    blocks: list[float] = field(default_factory=list)
    """When each block came."""
    ended: float = 0.0
    tokens: int = 0
    tpf: float = 0.0
    """Per forward that decodes."""
    error: str | None = None
    """Name of the gRPC status, where there was no answer."""

    @property
    def gaps(self) -> list[float]:
        """Between blocks."""
        return [after - before for before, after in zip(self.blocks, self.blocks[1:], strict=False)]

    def keeps(self, limits: Limits) -> bool:
        """Whether it was answered, and in time."""
        return (
            self.error is None
            and bool(self.blocks)
            and self.blocks[0] <= limits.first_block
            and all(gap <= limits.between_blocks for gap in self.gaps)
        )


def arrivals(count: int, *, rate: float, seed: int) -> list[float]:
    """When each of ``count`` requests is sent, in seconds: a Poisson process of ``rate`` per second."""
    dice, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        at += dice.expovariate(rate)
        times.append(at)
    return times


async def measure(
    client: AsyncClient, asks: Sequence[Ask], *, rate: float | None, seed: int = 0
) -> list[Sample]:
    """Send ``asks`` and see what becomes of them.

    Args:
        client: Of the server.
        asks: Sent in their order.
        rate: Requests per second in the mean; None sends each when the one before has been answered.
        seed: Of the arrivals.
    """
    if rate is None:
        return [await _one(client, ask, time.monotonic()) for ask in asks]
    start = time.monotonic()
    times = arrivals(len(asks), rate=rate, seed=seed)
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(_later(client, ask, start + at)) for ask, at in zip(asks, times, strict=True)
        ]
    return [task.result() for task in running]


async def _later(client: AsyncClient, ask: Ask, at: float) -> Sample:
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    return await _one(client, ask, at)


async def _one(client: AsyncClient, ask: Ask, at: float) -> Sample:
    sample = Sample(sent=time.monotonic() - at)
    try:
        async for event in client.stream(ask.prompt, **ask.options):
            if isinstance(event, BlockCommitted):
                sample.blocks.append(time.monotonic() - at)
            elif isinstance(event, Finished):
                sample.tokens, sample.tpf = event.usage.completion_tokens, event.usage.tpf_decode
    except RequestError as error:
        sample.error = error.code
    sample.ended = time.monotonic() - at
    return sample


def report(samples: Sequence[Sample], *, seconds: float, limits: Limits | None = None) -> dict[str, Any]:
    """Sums and percentiles of what became of requests.

    Args:
        samples: Of all requests.
        seconds: From the first arrival to the last answer.
        limits: What an answer has to keep to count for the goodput.
    """
    answered = [sample for sample in samples if sample.error is None]
    told: dict[str, Any] = {
        "requests": len(samples),
        "answered": len(answered),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None)),
        "seconds": seconds,
        "requests_per_second": len(answered) / seconds if seconds else 0.0,
        "tokens_per_second": sum(sample.tokens for sample in answered) / seconds if seconds else 0.0,
        "tpf_decode": statistics.fmean(sample.tpf for sample in answered) if answered else 0.0,
        "first_block_seconds": _percentiles([sample.blocks[0] for sample in answered if sample.blocks]),
        "between_blocks_seconds": _percentiles([gap for sample in answered for gap in sample.gaps]),
        "answer_seconds": _percentiles([sample.ended for sample in answered]),
        "sent_late_seconds": _percentiles([sample.sent for sample in samples]),
    }
    if limits is not None:
        good = sum(sample.keeps(limits) for sample in samples)
        told["good"] = {
            "share": good / len(samples) if samples else 0.0,
            "requests_per_second": good / seconds if seconds else 0.0,
        }
    return told


def ratios(loaded: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, float]:
    """How many times as long as alone callers waited: medians and 95th percentiles over the median alone."""
    found = {}
    for name in ("first_block_seconds", "between_blocks_seconds", "answer_seconds"):
        usual = alone[name].get("p50")
        for rank in ("p50", "p95"):
            if usual and rank in loaded[name]:
                found[f"{name.removesuffix('_seconds')}_{rank}"] = loaded[name][rank] / usual
    return found


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ranked = sorted(values)
    return {
        f"p{percent}": ranked[min(len(ranked) - 1, len(ranked) * percent // 100)] for percent in (50, 95, 99)
    }
