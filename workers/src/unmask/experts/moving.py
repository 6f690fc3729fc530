"""From one placement to another while servers work: load everywhere, let them notice, let the old one go.

Each step can be repeated, and whatever stops on the way leaves a placement that is complete: the old one
until all of the new one is loaded, both from then on.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import grpc

from unmask.errors import UsageError
from unmask.experts.addresses import check_addresses
from unmask.experts.links import shard_channel
from unmask.experts.placement import Bounds, balanced_bounds, even_bounds, held_by
from unmask.transport_security import ClientTls
from unmask.v1 import experts_pb2 as pb
from unmask.v1.experts_pb2_grpc import ExpertShardStub

__all__ = ["Move", "describe", "move", "plan_move"]

_MOST_BYTES = 16 << 20
_ASK_S = 10.0
_LOAD_S = 1800.0
"""For weights to be read, from a network perhaps."""
_NOTICE_S = 5.0
"""Engines look once a second, and go over with their next forward."""


@dataclass(frozen=True, slots=True)
class Move:
    """What is to be loaded and let go."""

    epoch: int
    bounds: Bounds
    parts: tuple[frozenset[int], ...]
    """Of each shard."""
    old: tuple[int, ...]
    """Epochs that go."""


def plan_move(
    descriptions: Sequence[pb.DescribeResponse], *, replication: int, groups: int = 1, balanced: bool = False
) -> Move:
    """The next placement of shards that describe themselves so.

    Args:
        descriptions: Of all shards, in the order in which they get parts.
        replication: Shards that hold each part.
        groups: Of the router, at whose borders even parts are cut.
        balanced: Cut so that parts are used equally often, by what shards have counted; else evenly.

    Raises:
        UsageError: The shards are not of one model, or too few.
    """
    revisions = {description.revision for description in descriptions}
    shapes = {description.shape.SerializeToString() for description in descriptions}
    if len(revisions) != 1 or len(shapes) != 1:
        raise UsageError(f"the shards have {len(revisions)} different weights; move those of one model")
    epochs = {placement.epoch for description in descriptions for placement in description.placements}
    shards, experts = len(descriptions), descriptions[0].shape.num_experts
    if balanced:
        # Replicas have each counted what they did: together they are what the experts had to do.
        uses = [sum(counts) for counts in zip(*(one.activations for one in descriptions), strict=True)]
        bounds = balanced_bounds(uses, shards)
    else:
        bounds = even_bounds(experts, shards, groups=groups)
    parts = tuple(held_by(shard, shards=shards, replication=replication) for shard in range(shards))
    return Move(max(epochs, default=0) + 1, bounds, parts, tuple(sorted(epochs)))


def describe(addresses: Sequence[str], *, tls: ClientTls | None = None) -> list[pb.DescribeResponse]:
    """What shards hold, asked with TLS or in plaintext.

    Raises:
        UsageError: One cannot be asked.
    """
    with ExitStack() as stack:
        return [_described(stub, address) for address, stub in _stubs(addresses, stack, tls)]


def move(
    addresses: Sequence[str], planned: Move, *, notice_s: float = _NOTICE_S, tls: ClientTls | None = None
) -> None:
    """Have shards load a placement, and let the old ones go once engines have had time to notice.

    Args:
        addresses: In the order of the plan's parts.
        planned: What to do.
        notice_s: That time.
        tls: Files to connect with; plaintext if None.

    Raises:
        UsageError: A shard did not load its parts; those that did have let them go again.
    """
    with ExitStack() as stack:
        stubs = _stubs(addresses, stack, tls)
        with ThreadPoolExecutor(len(stubs)) as pool:
            asked = [
                pool.submit(_load, stub, address, planned, parts)
                for (address, stub), parts in zip(stubs, planned.parts, strict=True)
            ]
            troubles = [error for one in asked if (error := one.exception()) is not None]
        if troubles:
            for _, stub in stubs:
                _unload(stub, [planned.epoch])
            raise troubles[0]
        time.sleep(notice_s)
        for _, stub in stubs:
            _unload(stub, planned.old)


def _stubs(
    addresses: Sequence[str], stack: ExitStack, tls: ClientTls | None
) -> list[tuple[str, ExpertShardStub]]:
    channels = (
        (address, stack.enter_context(shard_channel(address, max_bytes=_MOST_BYTES, tls=tls)))
        for address in check_addresses(addresses)
    )
    return [(address, ExpertShardStub(channel)) for address, channel in channels]


def _described(stub: ExpertShardStub, address: str) -> pb.DescribeResponse:
    try:
        return stub.Describe(pb.DescribeRequest(), timeout=_ASK_S)
    except grpc.RpcError as error:
        raise _trouble(address, error) from error


def _load(stub: ExpertShardStub, address: str, planned: Move, parts: frozenset[int]) -> None:
    placement = pb.HeldPlacement(epoch=planned.epoch, bounds=planned.bounds, parts=sorted(parts))
    try:
        stub.Load(pb.LoadRequest(placement=placement), timeout=_LOAD_S)
    except grpc.RpcError as error:
        raise _trouble(address, error) from error


def _unload(stub: ExpertShardStub, epochs: Sequence[int]) -> None:
    try:
        stub.Unload(pb.UnloadRequest(epochs=epochs), timeout=_ASK_S)
    except grpc.RpcError:
        return  # it is gone, and what it held with it; or the next move lets these go


def _trouble(address: str, error: grpc.RpcError) -> UsageError:
    return UsageError(f"shard {address}: {error.code().name}: {error.details()}")
