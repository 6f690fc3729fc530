"""Which shard holds which experts: decisions alone.

The experts of a layer are cut into as many parts as there are shards, each a contiguous range, the same in
every layer, on the borders of the router's groups where there are enough of these: a token goes to some of
the groups only, so it goes to fewer shards then. With replication R each part is held by R shards: shard i
holds part i, and copies of the parts that lie one R-th of the way round before it, two R-ths, and so on.
Neighbours, which may share a machine, so hold copies of one part only where there are too few shards.

A sum over parts is added in the order of the parts, whoever computed them. So where parts are cut changes
the last bits of a token's row; who holds them does not.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

from unmask.errors import UsageError

__all__ = [
    "Bounds",
    "HeldParts",
    "balanced_bounds",
    "best_epoch",
    "check_bounds",
    "even_bounds",
    "held_by",
    "holders_of",
    "part_of",
]

Bounds = tuple[int, ...]
"""Part i has the experts from ``bounds[i]`` up to ``bounds[i + 1]``."""


@dataclass(frozen=True, slots=True)
class HeldParts:
    """Parts of one placement that a shard holds."""

    bounds: Bounds
    parts: frozenset[int]


def even_bounds(num_experts: int, parts: int, *, groups: int = 1) -> Bounds:
    """Parts of as equal a size as can be, whole groups of experts where there are at least as many as parts.

    Raises:
        UsageError: There are more parts than experts.
    """
    if not 1 <= parts <= num_experts:
        raise UsageError(f"shards: got {parts}, must be 1 to {num_experts}, the experts of a layer")
    unit = num_experts // groups if parts <= groups else 1
    units = num_experts // unit
    return tuple(unit * (number * units // parts) for number in range(parts + 1))


def balanced_bounds(loads: Sequence[float], parts: int) -> Bounds:
    """Parts whose loads are as equal as contiguous ranges allow; each has one expert at least.

    The largest load of a part is the smallest that is possible; among such cuts, it is the one that fills
    earlier parts first.

    Args:
        loads: Of each expert, not negative: how often it was used, say.
        parts: How many.

    Raises:
        UsageError: There are more parts than experts.
    """
    experts = len(loads)
    if not 1 <= parts <= experts:
        raise UsageError(f"shards: got {parts}, must be 1 to {experts}, the experts of a layer")
    # The answer is the load of one of the ranges: try them from the smallest that could be on.
    before = [0.0, *accumulate(loads)]
    candidates = sorted({end - start for start, end in combinations(before, 2)})
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if _filled(before, parts, candidates[middle]) is None:
            low = middle + 1
        else:
            high = middle
    found = _filled(before, parts, candidates[low])
    assert found is not None, "one part per range of any load is always possible"
    return found


def _filled(before: Sequence[float], parts: int, most: float) -> Bounds | None:
    """Parts of at most ``most`` each, earlier ones first; None if there are not enough."""
    experts = len(before) - 1
    bounds = [0]
    for left in range(parts, 0, -1):
        first = bounds[-1]
        stop = bisect_right(before, before[first] + most) - 1
        stop = min(stop, experts - (left - 1))  # each later part wants an expert, too
        if stop <= first:
            return None
        bounds.append(stop)
    return tuple(bounds) if bounds[-1] == experts else None


def check_bounds(bounds: Sequence[int], num_experts: int) -> Bounds:
    """Bounds that came from outside.

    Raises:
        UsageError: They do not cut ``num_experts`` experts into parts.
    """
    fits = len(bounds) >= 2 and bounds[0] == 0 and bounds[-1] == num_experts
    if not fits or any(first >= stop for first, stop in pairwise(bounds)):
        raise UsageError(
            f"bounds: got {list(bounds)[:20]}, must rise from 0 to {num_experts}, the experts of a layer"
        )
    return tuple(bounds)


def held_by(shard: int, *, shards: int, replication: int) -> frozenset[int]:
    """The parts that shard number ``shard`` holds, its own and those of which it is a replica.

    Raises:
        UsageError: Numbers that do not go together.
    """
    if not 0 <= shard < shards:
        raise UsageError(f"shard: got number {shard} of {shards}, numbers run from 0 to {shards - 1}")
    if not 1 <= replication <= shards:
        raise UsageError(
            f"replication: got {replication}, must be 1 to {shards}, the shards; start a shard of the same "
            "number twice for more"
        )
    return frozenset((shard - copy * max(1, shards // replication)) % shards for copy in range(replication))


def part_of(expert: int, bounds: Bounds) -> int:
    """The part that has ``expert``."""
    return bisect_right(bounds, expert) - 1


def holders_of(part: int, held: Mapping[str, HeldParts], order: Sequence[str]) -> list[str]:
    """Shards that hold a part, the one to ask first in front.

    Each part begins its round at another place of ``order``, so that parts that all shards hold are spread
    over them.

    Args:
        part: Its number.
        held: What each shard holds, by name.
        order: All shards, in the order in which they were named.
    """
    start = part % len(order) if order else 0
    turned = [*order[start:], *order[:start]]
    return [name for name in turned if name in held and part in held[name].parts]


def best_epoch(
    descriptions: Iterable[Mapping[int, HeldParts]], *, current: int | None = None
) -> tuple[int, Bounds] | None:
    """The placement to go by: the latest of which each part is held by one of the shards.

    An earlier one than ``current`` is taken only where parts of ``current`` are held by nobody.

    Args:
        descriptions: What each shard that can be reached holds, by epoch.
        current: The epoch in use.

    Returns:
        Its epoch and bounds; None if no placement is complete.
    """
    parts: dict[int, dict[Bounds, set[int]]] = {}
    for description in descriptions:
        for epoch, held in description.items():
            parts.setdefault(epoch, {}).setdefault(held.bounds, set()).update(held.parts)
    complete = {
        epoch: bounds
        for epoch, cuts in parts.items()
        for bounds, found in cuts.items()
        if found >= set(range(len(bounds) - 1))
    }
    if not complete:
        return None
    epoch = max(complete)
    if current is not None and current in complete:
        epoch = max(epoch, current)
    return epoch, complete[epoch]
