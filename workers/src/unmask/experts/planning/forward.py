"""One forward of a model whose experts are in shards, part by part.

T = batch x block positions go through every layer. What reads m bytes of weights or of keys and values, and
makes f operations with them, takes max(m / bandwidth, f / rate). Norms, softmax and the embedding's rows are
in ``layer_seconds``, or left out; left out are also a block's positions as it is stored beside the next one's
first step, ``tpf`` for each request on average.

=========  ==================================================================================================
part       what is counted
=========  ==================================================================================================
attention  projections; keys and values of all rows, and 4 x heads x head size operations for each
           position and each that it sees
dense      feed-forwards that every token passes: dense layers, shared experts
other      routers, which are float32, and ``layer_seconds``
experts    on the shard with the fullest part: those that are hit there, and K rows for each of its tokens
copies     between a device and its host, at both ends
frames     what a transport takes on one machine, a + b x bytes for one frame and its answer; of several, the
           engine does its share one after the other, and shards do theirs at the same time
network    all frames through the engine's port, out and then in, and a round trip
output     the output layer, at the positions that are still masked
=========  ==================================================================================================

The engine computes shared experts while it waits, so the shorter of the two is hidden. With two micro-batches
one half of the batch is at the experts while the other is at the engine: then a layer takes as long as
whatever is busiest, and no less than one half needs from end to end; but weights are read twice. (How a
forward begins and ends, with one half alone, is not counted.)

Shape letters: T tokens, K choices per token, D hidden size.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Literal, TypeAlias

from unmask.experts.placement import Bounds
from unmask.experts.planning.choices import chance_imbalance, experts_hit, part_hit
from unmask.experts.planning.constants import Machine
from unmask.experts.planning.setting import ROUTER_ITEM, NumberFormat, Setting, Work, item_bytes
from unmask.models.shape import LayerShape

__all__ = [
    "PARTS",
    "Forward",
    "Part",
    "answer_bytes",
    "calibrated",
    "frame_bytes",
    "predicted_ratio",
    "sharded",
    "unsharded",
]

PARTS = ("attention", "dense", "other", "experts", "copies", "frames", "network", "output")
"""What a forward's time is made of."""

_HEADER = 64
"""Bytes of a frame and of an answer, beside their numbers (:mod:`unmask.experts.frames`)."""
_CHOICE = 6
"""Bytes of a choice: which expert, and its weight."""

_Place: TypeAlias = Literal["engine", "shards", "network"]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a forward's time."""

    name: str
    """Of :data:`PARTS`."""
    seconds: float
    limit: str
    """What most of it is spent on: memory, arithmetic, latency, bytes or fixed; empty if it takes no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One forward: its time, and what it takes elsewhere."""

    shards: int
    """0: the model as a whole, on one machine."""
    replication: int
    parts: tuple[Part, ...]
    hidden_seconds: float
    """What goes on at the same time as something else; the parts' sum is so much more than ``seconds``."""
    bound: str
    """What to make faster first."""
    experts_hit: float
    """Different experts that the tokens of one layer choose."""
    copies_per_token: float
    """To how many shards a token goes; 0 without shards."""
    imbalance: float
    """Rows of the fullest part over the mean."""
    sent_bytes: float
    """From the engine to all shards, in one forward."""
    received_bytes: float
    frame_bytes: float
    """Of one frame from engine to shard, a layer's rows for one part, on average; 0 without shards."""
    answer_bytes: float
    engine_bytes: int
    """Memory: of everything but routed experts, or without shards of all; the batch's cache; the constant."""
    shard_bytes: int
    """Memory of the shard that has most; 0 without shards."""
    work: Work

    @property
    def seconds(self) -> float:
        """Of the forward."""
        return sum(part.seconds for part in self.parts) - self.hidden_seconds

    @property
    def request_tokens_per_second(self) -> float:
        """Of each of the batch's requests, while it decodes."""
        return self.work.tpf / self.seconds

    @property
    def batch_tokens_per_second(self) -> float:
        """Of all of them."""
        return self.work.batch * self.request_tokens_per_second


def unsharded(setting: Setting) -> Forward:
    """A forward of the whole model on one machine, whether or not there is one that holds it."""
    machine, tokens = setting.whole, setting.work.tokens
    ledger = _Ledger()
    for layer, count in Counter(setting.shape.layers).items():
        own = _at_engine(setting, machine, layer, tokens, requests=setting.work.batch)
        if layer.experts:
            _add_experts(own, "engine", setting, machine, tokens, share=1.0)
        ledger.add_all(own, times=count)
    ledger.add_all(_output(setting, machine, tokens), times=1)
    parts = tuple(ledger.parts())
    return Forward(
        shards=0,
        replication=0,
        parts=parts,
        hidden_seconds=0.0,
        bound=_largest(parts),
        experts_hit=experts_hit(setting.choice, tokens),
        copies_per_token=0.0,
        imbalance=1.0,
        sent_bytes=0.0,
        received_bytes=0.0,
        frame_bytes=0.0,
        answer_bytes=0.0,
        engine_bytes=setting.unsharded_bytes(),
        shard_bytes=0,
        work=setting.work,
    )


def sharded(setting: Setting, shards: int, *, replication: int = 1) -> Forward:
    """A forward with the experts in so many shards. Replicas take memory, and no time while none is needed.

    Raises:
        UsageError: Numbers that do not go together.
    """
    halves = setting.micro_batches
    tokens, requests = setting.work.tokens / halves, setting.work.batch / halves
    engine = setting.constants.engine
    exchange = _exchange_of(setting, setting.bounds(shards), tokens)
    ledger, seconds = _Ledger(), 0.0
    causes: dict[str, float] = {}
    for layer, count in Counter(setting.shape.layers).items():
        own = _at_engine(setting, engine, layer, tokens, requests=requests)
        if layer.experts:
            _add_exchange(own, setting, exchange, tokens)
        took, by = _duration(own, halves, overlap=setting.constants.overlap and layer.experts > 0)
        seconds += count * took
        causes[by] = causes.get(by, 0.0) + count * took
        ledger.add_all(own, times=count * halves)
    output = _output(setting, engine, tokens)
    seconds += halves * output.total()
    ledger.add_all(output, times=halves)
    hidden = ledger.total() - seconds
    layers = halves * len(setting.mixtures)
    return Forward(
        shards=shards,
        replication=replication,
        parts=tuple(ledger.parts()),
        hidden_seconds=hidden,
        bound=_bound(ledger, hidden, max(causes, key=lambda by: causes[by])),
        experts_hit=experts_hit(setting.choice, setting.work.tokens),
        copies_per_token=exchange.copies,
        imbalance=exchange.imbalance,
        sent_bytes=layers * exchange.sent,
        received_bytes=layers * exchange.received,
        frame_bytes=exchange.sent / exchange.frames,
        answer_bytes=exchange.received / exchange.frames,
        engine_bytes=setting.engine_bytes(),
        shard_bytes=setting.shard_bytes(shards, replication=replication),
        work=setting.work,
    )


def predicted_ratio(setting: Setting, shards: int) -> float:
    """The time of a forward with shards over that of one without, to be held against a measurement.

    Where both are on the same processors, ``constants`` are those of one machine: ``network`` None,
    ``overlap`` False, ``shards_at_once`` the number of shards that have a processor each, and ``unsharded``
    what the whole model runs with, if these are other threads than the engine's.

    Raises:
        UsageError: Numbers that do not go together.
    """
    return sharded(setting, shards).seconds / unsharded(setting).seconds


def calibrated(setting: Setting, seconds: float) -> Setting:
    """The same with ``layer_seconds`` such that a forward without shards takes what was measured.

    What no other constant explains of it, norms and rotations and Python, is taken to be the same in all
    layers, and the same for an engine with shards. A measurement below what the others say changes nothing.
    """
    layers = len(setting.shape.layers)
    more = max(0.0, seconds - unsharded(setting).seconds) / layers
    known = setting.constants
    changed = {
        role: machine.model_copy(update={"layer_seconds": machine.layer_seconds + more})
        for role in ("engine", "unsharded")
        if (machine := getattr(known, role)) is not None
    }
    return replace(setting, constants=known.model_copy(update=changed))


def frame_bytes(tokens: float, *, choices: int, hidden: int, rows_as: NumberFormat) -> float:
    """A frame to a shard, less the zeros that fill up its sections."""
    return _HEADER + tokens * (choices * _CHOICE + hidden * item_bytes(rows_as))


def answer_bytes(tokens: float, *, hidden: int, rows_as: NumberFormat) -> float:
    """A shard's answer, less the zeros that fill it up."""
    return _HEADER + tokens * hidden * item_bytes(rows_as)


class _Ledger:
    """Seconds, by where they pass, for which part, and what on."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[_Place, str, str], float] = {}

    def add(self, place: _Place, part: str, limit: str, seconds: float) -> None:
        key = (place, part, limit)
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def add_all(self, other: "_Ledger", *, times: int) -> None:
        for (place, part, limit), seconds in other._seconds.items():
            self.add(place, part, limit, seconds * times)

    def total(
        self, place: _Place | None = None, *, part: str | None = None, limit: str | None = None
    ) -> float:
        wanted = (place, part, limit)
        return sum(
            seconds
            for key, seconds in self._seconds.items()
            if all(want in (None, have) for want, have in zip(wanted, key, strict=True))
        )

    def parts(self, place: _Place | None = None) -> Iterator[Part]:
        """All parts, with what of them passes in a place, or anywhere."""
        for name in PARTS:
            limits: dict[str, float] = {}
            for (its_place, part, limit), seconds in self._seconds.items():
                if part == name and place in (None, its_place) and seconds:
                    limits[limit] = limits.get(limit, 0.0) + seconds
            most = max(limits, key=lambda limit: limits[limit], default="")
            yield Part(name, sum(limits.values()), most)


def _at_engine(
    setting: Setting, machine: Machine, layer: LayerShape, tokens: float, *, requests: float
) -> _Ledger:
    """What a layer takes beside its routed experts."""
    shape, item, ledger = setting.shape, setting.item, _Ledger()
    seen = setting.work.context + setting.work.block_length
    pairs = 4 * shape.heads * shape.head_dim * tokens * seen
    rate = machine.flops_per_second
    for part, size, operations in (
        ("attention", layer.attention * item, 2 * layer.attention * tokens),
        ("attention", setting.cache_bytes(requests), pairs),
        ("dense", layer.dense * item, 2 * layer.dense * tokens),
        ("other", layer.router * ROUTER_ITEM, 2 * layer.router * tokens),
    ):
        ledger.add("engine", part, *_slower(machine, rate, size, operations))
    ledger.add("engine", "other", "fixed", machine.layer_seconds)
    return ledger


def _output(setting: Setting, machine: Machine, tokens: float) -> _Ledger:
    weights = setting.shape.head or setting.shape.embedding
    operations = 2 * weights * tokens * setting.work.masked_share
    ledger = _Ledger()
    ledger.add(
        "engine", "output", *_slower(machine, machine.flops_per_second, weights * setting.item, operations)
    )
    return ledger


def _add_experts(
    ledger: _Ledger,
    place: _Place,
    setting: Setting,
    machine: Machine,
    tokens: float,
    *,
    share: float,
    waves: int = 1,
) -> None:
    """A layer's experts, or that ``share`` of them, with the rows that ``tokens`` tokens have for them."""
    weights = setting.expert_weights
    hit = share * experts_hit(setting.choice, tokens)
    copies = share * tokens * setting.choice.chosen
    limit, seconds = _slower(
        machine, machine.expert_flops_per_second, hit * weights * setting.item, 2 * copies * weights
    )
    ledger.add(place, "experts", limit, waves * seconds)
    ledger.add(place, "experts", "fixed", waves * machine.expert_layer_seconds)


def _slower(machine: Machine, rate: float, size: float, operations: float) -> tuple[str, float]:
    """What bounds a product, and its seconds."""
    reading, multiplying = size / machine.memory_bytes_per_second, operations / rate
    return ("memory", reading) if reading >= multiplying else ("arithmetic", multiplying)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """One layer's rows to the shards and back."""

    shards: int
    copies: float
    frames: float
    imbalance: float
    widest: float
    """Experts of the largest part over all."""
    fullest: float
    """Rows of the fullest part."""
    sent: float
    """Bytes."""
    received: float


def _exchange_of(setting: Setting, bounds: Bounds, tokens: float) -> _Exchange:
    choice, hidden = setting.choice, setting.shape.hidden
    sizes = [stop - first for first, stop in pairwise(bounds)]
    hits = [part_hit(choice, first, stop) for first, stop in pairwise(bounds)]
    shards, copies = len(sizes), sum(hits)
    # A part without rows gets no frame; of few tokens, many parts have none.
    frames = max(1.0, sum(1 - (1 - hit) ** tokens for hit in hits))
    measured = setting.constants.imbalance
    imbalance = chance_imbalance(max(hits), shards, tokens) if measured is None else measured
    imbalance = min(imbalance, 1 / max(hits))  # no part has more rows than there are tokens
    rows = tokens * copies
    answered = frames * _HEADER + rows * hidden * item_bytes(setting.rows_as)
    return _Exchange(
        shards=shards,
        copies=copies,
        frames=frames,
        imbalance=imbalance,
        widest=max(sizes) / choice.num_experts,
        fullest=tokens * max(hits) * imbalance,
        sent=answered + rows * choice.chosen * _CHOICE,
        received=answered,
    )


def _add_exchange(ledger: _Ledger, setting: Setting, exchange: _Exchange, tokens: float) -> None:
    """What a layer's routed experts take: at the engine, on the way, and at the shards."""
    constants, hidden = setting.constants, setting.shape.hidden
    transport, network = constants.transports[setting.transport], constants.network
    waves = ceil(exchange.shards / (constants.shards_at_once or exchange.shards))
    row = item_bytes(setting.rows_as)
    moved = frame_bytes(
        exchange.fullest, choices=setting.choice.chosen, hidden=hidden, rows_as=setting.rows_as
    ) + answer_bytes(exchange.fullest, hidden=hidden, rows_as=setting.rows_as)
    every = exchange.sent + exchange.received
    own, theirs = transport.engine_share, 1 - transport.engine_share
    latency, per_byte = transport.frame_seconds, transport.frame_seconds_per_byte
    ledger.add("engine", "frames", "latency", own * latency * exchange.frames)
    ledger.add("engine", "frames", "bytes", own * per_byte * every)
    ledger.add("shards", "frames", "latency", waves * theirs * latency)
    ledger.add("shards", "frames", "bytes", waves * theirs * per_byte * moved)
    # Rows leave a device as they are sent; sums come to the engine's as wide as it computes.
    both = tokens * hidden * (row + setting.item)
    ledger.add("engine", "copies", "bytes", both * constants.engine.host_copy_seconds_per_byte)
    ledger.add("shards", "copies", "bytes", waves * moved * constants.shard.host_copy_seconds_per_byte)
    if network is not None:
        ledger.add("network", "network", "bytes", every / network.bytes_per_second)
        ledger.add("network", "network", "latency", network.round_trip_seconds)
    # The widest part with as many rows as the fullest has.
    _add_experts(
        ledger,
        "shards",
        setting,
        constants.shard,
        tokens * exchange.imbalance,
        share=exchange.widest,
        waves=waves,
    )


_TURN = "turn"


def _duration(ledger: _Ledger, halves: int, *, overlap: bool) -> tuple[float, str]:
    """How long a layer takes for the whole batch, and what makes it so long: a place, or a half's own way.

    Args:
        ledger: What one half takes, or all if there is one.
        halves: How many micro-batches there are.
        overlap: Whether there are shards that compute while the engine does.
    """
    if not overlap:
        return halves * ledger.total(), _TURN
    waiting = ledger.total("shards") + ledger.total("network")
    turn = ledger.total() - min(ledger.total(part="dense"), waiting)
    if halves == 1:
        return turn, _TURN
    durations = {
        _TURN: turn,
        "engine": halves * ledger.total("engine"),
        "shards": halves * ledger.total("shards"),
        "network": halves * ledger.total("network", limit="bytes"),
    }
    longest = max(durations, key=lambda by: durations[by])
    return durations[longest], longest


def _bound(ledger: _Ledger, hidden: float, by: str) -> str:
    """In words, what most of the time is spent on."""
    if by != _TURN:
        place: _Place = "engine" if by == "engine" else "shards" if by == "shards" else "network"
        return f"{place}: {_largest(ledger.parts(place))}"
    # What is hidden of one turn is behind the rest of it.
    seen = (
        Part(part.name, max(0.0, part.seconds - (hidden if part.name == "dense" else 0.0)), part.limit)
        for part in ledger.parts()
    )
    return _largest(seen)


def _largest(parts: Iterable[Part]) -> str:
    part = max(parts, key=lambda part: part.seconds)
    return f"{part.name} ({part.limit})"
