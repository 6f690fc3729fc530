"""What machines, transports and networks take for bytes and products, and where each number comes from.

A file of constants holds those that were measured, and says of what they are::

    {
      "measured": "make bench-shards on ..., 2026-01-31",
      "engine": {"memory_bytes_per_second": 1.4e10, "flops_per_second": 1.4e11, ...},
      "shard": {...},
      "transports": {"grpc": {"frame_seconds": 2.1e-4, "frame_seconds_per_byte": 6e-10, "engine_share": 0.5}},
      "network": null,
      "imbalance": 1.08
    }

The keys are the fields of :class:`Constants`. What is left out is assumed, and printed as such.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from unmask.errors import UsageError

__all__ = [
    "ASSUMED",
    "Constants",
    "Known",
    "Machine",
    "Network",
    "Transport",
    "assumed",
    "read_constants",
    "with_network",
]

ASSUMED = "assumed"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Machine(_Model):
    """What computes: an engine, or one shard, with all threads or devices that it has."""

    memory_bytes_per_second: PositiveFloat
    """At which weights and keys and values are read that are in no cache."""
    flops_per_second: PositiveFloat
    """Of products of rows with one matrix; a product of (m, k) and (k, n) is 2 m k n operations."""
    expert_flops_per_second: PositiveFloat
    """Of the products of a layer's routed experts, each with its own rows."""
    layer_seconds: NonNegativeFloat = 0.0
    """Of a layer, what is neither of these: norms, rotations, the router's choice, launches."""
    expert_layer_seconds: NonNegativeFloat = 0.0
    """The same of a layer's routed experts: sorting rows by expert, adding up, launches."""
    host_copy_seconds_per_byte: NonNegativeFloat = 0.0
    """Between the device and what sends and receives; 0 on a CPU."""
    constant_bytes: NonNegativeFloat = 0.0
    """Memory beside weights and cache: the interpreter, torch, buffers."""


class Transport(_Model):
    """Frames between two processes of one machine, both ends' work included: a + b x bytes."""

    frame_seconds: NonNegativeFloat
    """a: from sending a frame to having its answer, if both are empty and nothing else is going on."""
    frame_seconds_per_byte: NonNegativeFloat
    """b: what each byte of frame and answer adds: encoding, checking, copying, the way through the kernel."""
    one_machine: bool = False
    """Whether it is only for processes of one machine."""
    engine_share: float = Field(default=0.5, ge=0, le=1)
    """What part of both the engine does, one frame after the other; the rest, shards do at the same time."""


class Network(_Model):
    """What is between machines, beside a transport's own time."""

    bytes_per_second: PositiveFloat
    """Of the engine's port, each way; a layer's rows have gone out before sums come in."""
    round_trip_seconds: NonNegativeFloat


class Constants(_Model):
    """Everything that times and memory are computed from."""

    measured: str = ""
    """What measured them, on which machine, when."""
    engine: Machine
    shard: Machine
    unsharded: Machine | None = None
    """What computes the whole model without shards; None: a machine like the engine."""
    transports: Mapping[str, Transport]
    network: Network | None = None
    """None: engine and shards are on one machine."""
    imbalance: float | None = Field(default=None, ge=1)
    """Rows of the fullest part over the mean of all; None: what chance makes of even choices."""
    shards_at_once: PositiveInt | None = None
    """How many shards have processors of their own; others wait for them. None: all."""
    overlap: bool = True
    """Whether the engine computes while shards do; not where they have the same processors."""


_UNUSED = ("shard.flops_per_second", "shard.layer_seconds")
"""Shards have routed experts alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Constants, and where they come from."""

    constants: Constants
    sources: Mapping[str, str]
    """Name with dots -> "assumed ..." or "measured ..."; what is not in it is the field's default."""

    def each(self, *, transport: str) -> Iterator[tuple[str, Any, str]]:
        """Name, value and source of every constant that is used; of transports, one is."""
        used = {transport: True}
        dumped = self.constants.model_dump(exclude={"measured": True, "transports": True})
        chosen = self.constants.model_dump(include={"transports": used})
        for name, value in _leaves(dumped | chosen):
            if name not in _UNUSED and not name.endswith(".one_machine"):
                yield name, value, self.sources.get(name, ASSUMED)


_MEMORY_REACHED, _FLOPS_REACHED, _EXPERT_FLOPS_REACHED = 0.8, 0.5, 0.35
_USABLE = 0.88
"""Of a network's bits, what frames can have."""


def assumed(*, device: str, memory_bytes_per_second: float, flops_per_second: float) -> Known:
    """What to go by where nothing was measured: engine and shards on GPUs of one kind, and 100 Gbit/s.

    Args:
        device: The GPU's name.
        memory_bytes_per_second: Of its data sheet.
        flops_per_second: Of its data sheet, dense, in the precision of the weights.
    """
    machine = Machine(
        memory_bytes_per_second=memory_bytes_per_second * _MEMORY_REACHED,
        flops_per_second=flops_per_second * _FLOPS_REACHED,
        expert_flops_per_second=flops_per_second * _EXPERT_FLOPS_REACHED,
        layer_seconds=20e-6,
        expert_layer_seconds=20e-6,
        host_copy_seconds_per_byte=4e-11,
        constant_bytes=2.0**30,
    )
    sheet = f"of {device}'s data sheet"
    told = {
        "memory_bytes_per_second": f"{ASSUMED}: {_MEMORY_REACHED:.0%} {sheet}",
        "flops_per_second": f"{ASSUMED}: {_FLOPS_REACHED:.0%} {sheet}",
        "expert_flops_per_second": f"{ASSUMED}: {_EXPERT_FLOPS_REACHED:.0%} {sheet}",
        "layer_seconds": f"{ASSUMED}: some launches from a graph",
        "expert_layer_seconds": f"{ASSUMED}: some launches from a graph",
        "host_copy_seconds_per_byte": f"{ASSUMED}: 25 GB/s between GPU and host",
        "constant_bytes": f"{ASSUMED}: 1 GiB",
    }
    constants = Constants(
        engine=machine,
        shard=machine,
        transports={
            # Orders of magnitude of the processes of one small virtual machine; `make bench-shards` measures.
            "grpc": Transport(frame_seconds=200e-6, frame_seconds_per_byte=0.6e-9),
            "shm": Transport(frame_seconds=20e-6, frame_seconds_per_byte=0.15e-9, one_machine=True),
            "ideal": Transport(frame_seconds=0, frame_seconds_per_byte=0),
        },
        network=_network(100, 40e-6),
    )
    sources = {f"{role}.{name}": text for role in ("engine", "shard") for name, text in told.items()}
    for name, text in (
        ("grpc", "a raw stream over loopback, in Python, on two cores"),
        ("shm", "memory that both ends see, and a doorbell"),
        ("ideal", "what software that costs nothing would leave"),
    ):
        for field in Transport.model_fields:
            sources[f"transports.{name}.{field}"] = f"{ASSUMED}: {text}"
    sources["network.bytes_per_second"] = f"{ASSUMED}: 100 Gbit/s, {_USABLE:.0%} of it usable"
    sources["network.round_trip_seconds"] = ASSUMED
    sources["imbalance"] = f"{ASSUMED}: chance alone, all choices equally likely"
    sources["unsharded"] = f"{ASSUMED}: a machine like the engine, however large"
    sources["shards_at_once"] = f"{ASSUMED}: all"
    sources["overlap"] = f"{ASSUMED}: engine and shards have processors of their own"
    return Known(constants=constants, sources=sources)


def read_constants(path: Path, otherwise: Known) -> Known:
    """The constants in a file, and ``otherwise`` what it leaves out.

    Raises:
        UsageError: It cannot be read, is no JSON object, or holds what is no constant.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--constants: {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--constants: {path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"--constants: {path}: got a JSON {type(data).__name__}, expected an object")
    if not isinstance(data.get("measured"), str) or not data["measured"]:
        raise UsageError(
            f"--constants: {path}: measured: missing; say what measured the constants, on which machine, when"
        )
    merged = _merged(otherwise.constants.model_dump(), data)
    told = {name: f"measured: {data['measured']}" for name, _ in _leaves(data) if name != "measured"}
    if isinstance(data.get("unsharded"), dict) and isinstance(merged["engine"], dict):
        merged["unsharded"] = _merged(merged["engine"], data["unsharded"])
        told = {f"unsharded.{name}": "as the engine's" for name in Machine.model_fields} | told
    try:
        constants = Constants.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        raise UsageError(f"--constants: {path}: {where}: {first['msg'].lower()}{got}") from None
    return Known(constants=constants, sources={**otherwise.sources, **told})


def with_network(
    known: Known, *, transport: str, gigabits: float | None = None, round_trip_us: float | None = None
) -> Known:
    """The same with another network between machines.

    Args:
        known: What to change.
        transport: What frames go by; some go nowhere else, and then there is no network.
        gigabits: Per second and direction; 0: there is none, all is on one machine. None: as it was.
        round_trip_us: Microseconds. None: as it was.

    Raises:
        UsageError: A network that the transport cannot use, or a round trip where there is no network.
    """
    network, sources = known.constants.network, dict(known.sources)
    chosen = known.constants.transports.get(transport)
    if chosen is not None and chosen.one_machine:
        if gigabits:
            raise UsageError(f"--network: got {gigabits:g}, but {transport} is for one machine; leave it out")
        network = None
        sources["network"] = f"none, since {transport} is for one machine"
    elif gigabits is not None:
        before = network.round_trip_seconds if network else 40e-6
        network = _network(gigabits, before) if gigabits else None
        sources["network.bytes_per_second"] = (
            f"given: {gigabits:g} Gbit/s, {_USABLE:.0%} of it assumed usable"
        )
        sources["network"] = "given: engine and shards on one machine"
    if round_trip_us is not None:
        if network is None:
            raise UsageError("--round-trip: there is no network; give --network too, in Gbit/s")
        network = network.model_copy(update={"round_trip_seconds": round_trip_us / 1e6})
        sources["network.round_trip_seconds"] = "given"
    return Known(constants=known.constants.model_copy(update={"network": network}), sources=sources)


def _network(gigabits: float, round_trip_seconds: float) -> Network:
    return Network(bytes_per_second=gigabits / 8 * 1e9 * _USABLE, round_trip_seconds=round_trip_seconds)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with what ``over`` has, objects key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _leaves(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
