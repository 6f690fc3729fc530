"""Which groups to make and which to remove next, from those that there are: counts alone, no memory.

A group is made and removed as a whole and never changed, so a rollout is nothing but a wish for other groups.
The plan is made anew in each pass. So it does not matter how far the one before was carried out, or by whom.

With R groups wanted, the plan keeps two promises whatever happens between passes:

- It makes no group beyond R + ``surge``, counting those that are still ending: they hold their machines.
- It removes no available group if fewer than R - ``unavailable`` others are available.

Groups that are not available count against the second one, too, as long as they may become so: of the old
ones that do not answer just now, no more are removed than of those that do. A new revision that never starts
costs ``unavailable`` groups and no more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["GroupKey", "Plan", "Seen", "State", "Wish", "plan", "wanted_revisions"]

State = Literal["Starting", "Ready", "Available", "Ending"]
GroupKey = tuple[int, str]
"""Ordinal and revision: what a group is called by."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A group that exists, if only in part."""

    ordinal: int
    revision: str
    state: State

    @property
    def key(self) -> GroupKey:
        """What it is called by."""
        return self.ordinal, self.revision

    @property
    def live(self) -> bool:
        """Whether it is not on its way out."""
        return self.state != "Ending"

    @property
    def available(self) -> bool:
        """Whether it can be reached, and could for long enough."""
        return self.state == "Available"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What there should be in the end, and how to get there."""

    replicas: int
    """Groups."""
    target: str
    """Revision that the manifest asks for."""
    current: str
    """Revision that was last rolled out whole; the target's at first."""
    surge: int = 0
    """Groups that may exist beyond ``replicas``."""
    unavailable: int = 1
    """Groups below ``replicas`` that need not be available."""
    partition: int = 0
    """Groups that stay at ``current``."""
    paused: bool = False
    """Whether nothing is replaced."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do next."""

    create: tuple[GroupKey, ...] = ()
    """Groups to make, at once."""
    remove: tuple[GroupKey, ...] = ()
    """Groups to drain and remove."""
    settled: bool = False
    """Whether there is nothing to make, to remove or to wait for: all is as it should be."""
    rolled_out: bool = False
    """Whether it is settled with the target's revision alone."""


def wanted_revisions(seen: Iterable[Seen], wish: Wish) -> dict[str, int]:
    """Return revision -> groups of it that there should be."""
    if not wish.paused:
        old = min(wish.partition, wish.replicas) if wish.current != wish.target else 0
        wanted = {wish.current: old, wish.target: wish.replicas - old}
        return {revision: number for revision, number in wanted.items() if number}
    kept = _best((one for one in seen if one.live), wish)[: wish.replicas]
    wanted = {}
    for one in kept:
        wanted[one.revision] = wanted.get(one.revision, 0) + 1
    if missing := wish.replicas - len(kept):
        wanted[wish.current] = wanted.get(wish.current, 0) + missing
    return wanted


def plan(groups: Sequence[Seen], wish: Wish) -> Plan:
    """Return what to do next; ``groups`` has at most one of each ordinal and revision."""
    wanted = wanted_revisions(groups, wish)
    live = [one for one in groups if one.live]
    kept: list[Seen] = []
    for revision, number in wanted.items():
        kept += _best((one for one in live if one.revision == revision), wish)[:number]
    superfluous = [one for one in live if one not in kept]
    settled = (
        len(groups) == len(kept) == wish.replicas and not superfluous and all(one.available for one in kept)
    )
    return Plan(
        create=_create(groups, kept, wanted, wish),
        remove=_remove(kept, superfluous, wish),
        settled=settled,
        rolled_out=settled and all(one.revision == wish.target for one in kept),
    )


def _create(
    groups: Sequence[Seen], kept: Sequence[Seen], wanted: dict[str, int], wish: Wish
) -> tuple[GroupKey, ...]:
    room = wish.replicas + wish.surge - len(groups)
    made: list[GroupKey] = []
    for revision, number in wanted.items():
        taken = {one.ordinal for one in groups if one.revision == revision}
        # The groups that stay as they are have the first ordinals.
        first = 0 if revision == wish.current or wish.paused else wanted.get(wish.current, 0)
        free = (ordinal for ordinal in range(first, first + number + len(taken)) if ordinal not in taken)
        missing = number - sum(one.revision == revision for one in kept)
        made += [(next(free), revision) for _ in range(missing)]
    return tuple(made[: max(0, room)])


def _remove(kept: Sequence[Seen], superfluous: Sequence[Seen], wish: Wish) -> tuple[GroupKey, ...]:
    floor = max(0, wish.replicas - wish.unavailable)
    available = sum(one.available for one in (*kept, *superfluous))
    hopeful = sum(one.available for one in kept) + len(superfluous)
    removed: list[GroupKey] = []
    for one in reversed(_best(superfluous, wish)):  # the worst first
        if hopeful <= floor or (one.available and available <= floor):
            break
        removed.append(one.key)
        hopeful -= 1
        available -= one.available
    return tuple(removed)


def _best(groups: Iterable[Seen], wish: Wish) -> list[Seen]:
    """Return groups, those first that it would be worst to lose."""
    rank = {"Available": 0, "Ready": 1, "Starting": 2, "Ending": 3}
    order = {wish.current: 1, wish.target: 0}
    return sorted(
        groups,
        key=lambda one: (rank[one.state], order.get(one.revision, 2), one.ordinal, one.revision),
    )
