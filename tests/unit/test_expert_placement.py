"""Which shard holds which experts: cuts, copies, and the placement that an engine goes by."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import UsageError
from unmask.experts.placement import (
    HeldParts,
    balanced_bounds,
    best_epoch,
    check_bounds,
    even_bounds,
    held_by,
    holders_of,
    part_of,
)


@given(st.integers(1, 64), st.integers(1, 8), st.data())
def test_parts_cover_all_experts_evenly_and_keep_groups_together(size: int, groups: int, data) -> None:
    experts = size * groups
    parts = data.draw(st.integers(1, experts))
    bounds = even_bounds(experts, parts, groups=groups)
    assert check_bounds(bounds, experts) == bounds and len(bounds) == parts + 1
    unit = size if parts <= groups else 1
    assert all(bound % unit == 0 for bound in bounds)
    sizes = [stop - first for first, stop in pairwise(bounds)]
    assert max(sizes) - min(sizes) <= unit
    for expert in range(experts):
        assert bounds[part_of(expert, bounds)] <= expert < bounds[part_of(expert, bounds) + 1]


def test_mini_is_cut_at_its_router_groups() -> None:
    assert even_bounds(256, 4, groups=8) == (0, 64, 128, 192, 256)
    assert even_bounds(256, 3, groups=8) == (0, 64, 160, 256)
    assert even_bounds(64, 3) == (0, 21, 42, 64)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_the_busiest_part_is_as_light_as_any_cut_makes_it(loads: list[int], data) -> None:
    parts = data.draw(st.integers(1, len(loads)))
    bounds = balanced_bounds(loads, parts)
    assert check_bounds(bounds, len(loads)) == bounds and len(bounds) == parts + 1

    def busiest(cut: tuple[int, ...]) -> int:
        return max(sum(loads[first:stop]) for first, stop in pairwise(cut))

    every = [(0, *inner, len(loads)) for inner in combinations(range(1, len(loads)), parts - 1)]
    assert busiest(bounds) == min(map(busiest, every))


@given(st.integers(1, 16), st.data())
def test_each_part_is_held_as_often_as_asked_and_first_by_the_shard_of_its_number(shards: int, data) -> None:
    replication = data.draw(st.integers(1, shards))
    held = {
        f"s{number}": HeldParts((0, 1), held_by(number, shards=shards, replication=replication))
        for number in range(shards)
    }
    for part in range(shards):
        holders = holders_of(part, held, list(held))
        assert len(holders) == replication and holders[0] == f"s{part}"
    assert {len(parts.parts) for parts in held.values()} == {replication}


def test_copies_lie_half_the_way_round() -> None:
    assert [sorted(held_by(number, shards=4, replication=2)) for number in range(4)] == [
        [0, 2],
        [1, 3],
        [0, 2],
        [1, 3],
    ]


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: even_bounds(8, 9), "shards: got 9"),
        (lambda: even_bounds(8, 0), "shards: got 0"),
        (lambda: balanced_bounds([1.0], 2), "shards: got 2"),
        (lambda: held_by(2, shards=2, replication=1), "shard: got number 2 of 2"),
        (lambda: held_by(0, shards=2, replication=3), "replication: got 3"),
        (lambda: check_bounds((0, 4, 4, 8), 8), "bounds: got"),
        (lambda: check_bounds((0, 4), 8), "bounds: got"),
        (lambda: check_bounds((), 8), "bounds: got"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(act, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        act()


def test_the_latest_complete_placement_is_taken_and_kept_while_it_is_complete() -> None:
    halves, thirds = (0, 4, 8), (0, 2, 4, 8)

    def holds(**placements: tuple[tuple[int, ...], set[int]]) -> dict[int, HeldParts]:
        return {int(name[1:]): HeldParts(cut, frozenset(parts)) for name, (cut, parts) in placements.items()}

    old = [holds(e1=(halves, {0})), holds(e1=(halves, {1}))]
    assert best_epoch(old) == (1, halves)
    half_moved = [holds(e1=(halves, {0}), e2=(thirds, {0, 1})), holds(e1=(halves, {1}))]
    assert best_epoch(half_moved, current=1) == (1, halves)
    moved = [holds(e1=(halves, {0}), e2=(thirds, {0, 1})), holds(e1=(halves, {1}), e2=(thirds, {2}))]
    assert best_epoch(moved, current=1) == (2, thirds)
    one_lost = [holds(e1=(halves, {0, 1}), e2=(thirds, {0, 1}))]
    assert best_epoch(one_lost, current=2) == (1, halves), "better the earlier one than none"
    assert best_epoch([holds(e1=(halves, {0}))]) is None
    assert best_epoch([holds(e1=(halves, {0})), holds(e1=(thirds, {1, 2}))]) is None, "two cuts do not mix"
