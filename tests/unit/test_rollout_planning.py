"""Rollouts of groups: no interleaving breaks a budget, every one reaches the end, and examples to read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from support import counts
from unmask_operator.serving.planning import Plan, Seen, State, Wish, plan

A, B, C = "aaaaaa", "bbbbbb", "cccccc"


def groups(*words: str) -> list[Seen]:
    """``0a+`` is group 0 of revision A and available; ``!`` ready, ``?`` starting, ``-`` ending."""
    states: dict[str, State] = {"+": "Available", "!": "Ready", "?": "Starting", "-": "Ending"}
    return [Seen(int(word[:-2]), word[-2] * 6, states[word[-1]]) for word in words]


def told(found: Plan) -> tuple[str, str]:
    made = " ".join(f"{ordinal}{revision[0]}" for ordinal, revision in found.create)
    return made, " ".join(f"{ordinal}{revision[0]}" for ordinal, revision in found.remove)


def wish(replicas: int, **values: object) -> Wish:
    return replace(Wish(replicas=replicas, target=B, current=A), **values)  # type: ignore[arg-type]


# --- examples -------------------------------------------------------------------------------------------

EXAMPLES: list[tuple[str, list[str], Wish, str, str]] = [
    ("the first groups are made at once", [], wish(3), "0b 1b 2b", ""),
    ("without surge the last one goes first", ["0a+", "1a+", "2a+"], wish(3), "", "2a"),
    ("and its successor waits until it is gone", ["0a+", "1a+", "2a-"], wish(3), "", ""),
    ("then it is made", ["0a+", "1a+"], wish(3), "0b", ""),
    ("the next one waits until it is available", ["0a+", "1a+", "0b!"], wish(3), "", ""),
    ("and goes then", ["0a+", "1a+", "0b+"], wish(3), "", "1a"),
    ("with surge a new one is made first", ["0a+", "1a+"], wish(2, surge=1, unavailable=0), "0b", ""),
    (
        "and an old one removed once that is available",
        ["0a+", "1a+", "0b+"],
        wish(2, surge=1, unavailable=0),
        "",
        "1a",
    ),
    (
        "one that is ending still holds its machines",
        ["0a+", "1a-", "0b+"],
        wish(2, surge=1, unavailable=0),
        "",
        "",
    ),
    ("an old one that does not answer goes first", ["0a?", "1a+", "2a+"], wish(3), "", "0a"),
    ("not all old ones because none answers just now", ["0a?", "1a?", "2a?"], wish(3), "", "2a"),
    ("a revision that does not start stops there", ["0a+", "1a+", "0b?"], wish(3), "", ""),
    ("and goes when there is a third", ["0a+", "1a+", "0b?"], wish(3, target=C), "", "0b"),
    ("or when it is taken back", ["0a+", "1a+", "0b?"], wish(3, target=A), "", "0b"),
    ("two at a time", ["0a+", "1a+", "2a+", "3a+"], wish(4, unavailable=2), "", "3a 2a"),
    ("a partition stays", ["0a+", "1a+", "1b+"], wish(3, partition=2), "", ""),
    ("a lost one of the partition is made as it was", ["1a+", "2b+"], wish(3, partition=2), "0a", ""),
    ("paused, nothing is replaced", ["0a+", "1a+", "0b+"], wish(3, paused=True), "", ""),
    ("paused, more are made as they were", ["0a+", "1a+"], wish(4, paused=True), "2a 3a", ""),
    ("paused, fewer are still fewer", ["0a+", "1a+", "0b+"], wish(2, paused=True), "", "1a"),
    ("scaled up", ["0b+"], wish(3), "1b 2b", ""),
    ("scaled down, the last ones go", ["0b+", "1b+", "2b+"], wish(1), "", "2b 1b"),
    ("scaled down, those that answer stay", ["0b?", "1b?", "2b+"], wish(1), "", "1b 0b"),
    ("stopped, all go", ["0a+", "0b+", "1b?"], wish(0), "", "1b 0a 0b"),
    ("as it should be", ["0b+", "1b+"], wish(2), "", ""),
]


@pytest.mark.parametrize(("what", "there", "wanted", "made", "removed"), EXAMPLES, ids=lambda one: one)
def test_a_plan(what: str, there: list[str], wanted: Wish, made: str, removed: str) -> None:
    assert told(plan(groups(*there), wanted)) == (made, removed)


def test_it_is_rolled_out_when_every_group_is_new_and_available_and_nothing_else_is_there() -> None:
    assert plan(groups("0b+", "1b+"), wish(2)).rolled_out
    assert not plan(groups("0b+", "1b!"), wish(2)).settled
    assert not plan(groups("0b+", "1b+", "0a-"), wish(2)).settled
    partitioned = plan(groups("0a+", "1b+"), wish(2, partition=1))
    assert partitioned.settled and not partitioned.rolled_out
    assert plan([], wish(0)).rolled_out


# --- every interleaving ---------------------------------------------------------------------------------


Planner = Callable[[Sequence[Seen], Wish], Plan]


@dataclass
class World:
    """Groups that live their own lives, and an operator that may stop after any of its writes."""

    wish: Wish
    there: dict[tuple[int, str], State] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    """Revisions whose groups never become ready."""
    planner: Planner = plan

    def seen(self) -> list[Seen]:
        return [Seen(*key, state) for key, state in sorted(self.there.items())]

    def available(self) -> int:
        return sum(state == "Available" for state in self.there.values())

    def act(self, writes: int | None = None) -> Plan:
        """One pass, removals first, cut off after so many writes; checked after each."""
        found = self.planner(self.seen(), self.wish)
        floor = self.wish.replicas - self.wish.unavailable
        most = self.wish.replicas + self.wish.surge
        acts = [("remove", key) for key in found.remove] + [("create", key) for key in found.create]
        for what, key in acts[:writes]:
            if what == "remove":
                was = self.there[key]
                assert was != "Ending", "removed twice"
                self.there[key] = "Ending"
                assert was != "Available" or self.available() >= floor, "too few are available"
            else:
                assert key not in self.there, "one name for two"
                self.there[key] = "Starting"
                assert len(self.there) <= most, "too many exist"
                assert key[1] in (self.wish.target, self.wish.current), "a revision that nobody asked for"
                assert key[0] < 100, "ordinals have two digits"
        return found

    def progress(self, choice: int) -> None:
        """One group goes on: it starts, becomes available, or is gone."""
        if not self.there:
            return
        key = sorted(self.there)[choice % len(self.there)]
        match self.there[key]:
            case "Ending":
                del self.there[key]
            case "Starting" if key[1] not in self.broken:
                self.there[key] = "Ready"
            case "Ready":
                self.there[key] = "Available"

    def misfortune(self, choice: int, kind: int) -> None:
        """A group stops answering, or somebody deletes it."""
        if not self.there:
            return
        key = sorted(self.there)[choice % len(self.there)]
        if kind == 0 and self.there[key] != "Ending":
            self.there[key] = "Starting"
        elif kind == 1:
            self.there[key] = "Ending"
        elif kind == 2:
            del self.there[key]

    def quiet(self) -> None:
        """No more misfortune: passes and progress until nothing changes any more."""
        self.broken.clear()
        for _ in range(3000):
            before = dict(self.there)
            found = self.act()
            if self.there == before and found.settled:
                return
            for choice in range(len(self.there)):
                self.progress(choice)
            if found.rolled_out:  # what the controller remembers
                self.wish = replace(self.wish, current=self.wish.target)
        raise AssertionError(f"does not end: {self.seen()} for {self.wish}")


REVISIONS = st.sampled_from([A, B, C])
WISHES = st.builds(
    lambda replicas, current, target, budget, partition, paused: Wish(
        replicas=replicas,
        target=target,
        current=current,
        surge=budget[0],
        unavailable=budget[1],
        partition=partition,
        paused=paused,
    ),
    st.integers(0, 6),
    REVISIONS,
    REVISIONS,
    st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    st.integers(0, 3),
    st.booleans(),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("act"), st.one_of(st.none(), st.integers(0, 5)), st.just(0)),
        st.tuples(st.just("progress"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("misfortune"), st.integers(0, 20), st.integers(0, 2)),
        st.tuples(st.just("scale"), st.integers(0, 6), st.just(0)),
        st.tuples(st.just("roll"), REVISIONS, st.just(0)),
        st.tuples(st.just("break"), REVISIONS, st.just(0)),
        st.tuples(st.just("wish"), WISHES, st.just(0)),
    ),
    max_size=60,
)


Step = tuple[str, object, int]


def live(first: Wish, steps: list[Step], planner: Planner = plan) -> None:
    """Let a world go through steps, then be quiet, and see that it is as it should be."""
    world = World(first, planner=planner)
    for what, value, kind in steps:
        match what, value:
            case "act", (None | int()) as writes:
                world.act(writes)
            case "progress", int(choice):
                world.progress(choice)
            case "misfortune", int(choice):
                world.misfortune(choice, kind)
            case "scale", int(replicas):
                world.wish = replace(world.wish, replicas=replicas)
            case "roll", str(revision):
                world.wish = replace(world.wish, target=revision)
            case "break", str(revision):
                world.broken.add(revision)
            case "wish", Wish() as other:
                world.wish = replace(other, current=world.wish.current)
    world.quiet()
    seen, end = world.seen(), world.wish
    assert len(seen) == end.replicas
    assert all(one.available for one in seen)
    if not end.paused:
        old = sum(one.revision != end.target for one in seen)
        assert old <= min(end.partition, end.replicas)
        assert end.current == end.target or old == min(end.partition, end.replicas)
    assert planner(seen, end).create == planner(seen, end).remove == ()


@settings(max_examples=counts.of(sample=400, full=20_000), deadline=None, derandomize=True)
@given(WISHES, STEPS)
def test_budgets_hold_in_every_interleaving_and_the_end_is_reached(first: Wish, steps: list[Step]) -> None:
    live(first, steps)


def _all_at_once(groups: Sequence[Seen], wish: Wish) -> Plan:
    found = plan(groups, wish)
    kept = [one.key for one in groups if one.revision == wish.target]
    return replace(found, remove=tuple(one.key for one in groups if one.live and one.key not in kept))


def _none_that_answers(groups: Sequence[Seen], wish: Wish) -> Plan:
    found = plan(groups, wish)
    answer = {one.key for one in groups if one.available}
    return replace(found, remove=tuple(key for key in found.remove if key not in answer))


PLANTED: dict[str, Planner] = {
    "forgets those that are ending": lambda groups, wish: plan([one for one in groups if one.live], wish),
    "removes all old ones at once": _all_at_once,
    "allows one more": lambda groups, wish: plan(groups, replace(wish, surge=wish.surge + 1)),
    "keeps one fewer": lambda groups, wish: plan(groups, replace(wish, unavailable=wish.unavailable + 1)),
    "takes ready for available": lambda groups, wish: plan(
        [replace(one, state="Available") if one.state == "Ready" else one for one in groups], wish
    ),
    "removes none that answers": _none_that_answers,
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    @settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(WISHES, STEPS)
    def tried(first: Wish, steps: list[Step]) -> None:
        live(first, steps, PLANTED[mistake])

    with pytest.raises(AssertionError):
        tried()


@settings(max_examples=counts.of(sample=200, full=5000), deadline=None, derandomize=True)
@given(st.integers(1, 6), st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any))
def test_a_revision_that_never_starts_costs_no_more_than_the_budget(
    replicas: int, budget: tuple[int, int]
) -> None:
    surge, unavailable = budget
    world = World(
        Wish(replicas=replicas, target=B, current=A, surge=surge, unavailable=unavailable), broken={B}
    )
    world.there = {(ordinal, A): "Available" for ordinal in range(replicas)}
    for _ in range(200):
        world.act()
        for choice in range(len(world.there)):
            world.progress(choice)
    assert world.available() == max(0, replicas - unavailable)
    world.wish = replace(world.wish, target=A)  # taken back
    world.quiet()
    assert {one.revision for one in world.seen()} == {A}


def test_groups_that_find_room_stay_when_there_is_not_enough_for_all() -> None:
    """Room for two groups, scaled from five to three while the last two have it: no waiting for the first."""
    world = World(wish(3))
    world.there = dict.fromkeys([(0, B), (1, B), (2, B)], "Starting") | dict.fromkeys(  # type: ignore[arg-type]
        [(3, B), (4, B)], "Available"
    )
    world.act()
    assert told(plan(world.seen(), world.wish)) == ("", "")
    assert sorted(one.ordinal for one in world.seen() if one.live) == [0, 3, 4]
