"""The block cache's bookkeeping: no page is lost or given twice, and what is shared is never written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from support import counts
from unmask.serving.paging import BlockPool, Holding, digest_of, digests_of, root_digest
from unmask.serving.paging.runs import FreeRuns

ROOT = root_digest(revision="m", block_length=4)
PAGES = 7


def names(blocks):
    """The names of blocks, each of which is said by one letter."""
    made = []
    for letter in blocks:
        made.append(digest_of(made[-1] if made else ROOT, [ord(letter)]))
    return made


# Free pages


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=40))
def test_free_runs_are_a_set_of_pages(pages, moves):
    runs, free = FreeRuns(pages), set(range(pages))
    for takes, number in moves:
        if takes and number <= len(free):
            taken = runs.take(number)
            assert len(taken) == number == len(set(taken)) and set(taken) <= free
            free -= set(taken)
        elif not takes and number < pages and number not in free:
            runs.give(number)
            free.add(number)
        assert len(runs) == len(free)
        assert [page for page in range(pages) if page in runs] == sorted(free)


def test_pages_lie_side_by_side_where_some_run_is_long_enough():
    runs = FreeRuns(10)
    runs.take(10)
    for page in (0, 1, 4, 5, 6, 9):
        runs.give(page)
    assert runs.take(2) == [0, 1], "the smallest run that has them"
    assert runs.take(4) == [4, 5, 6, 9], "else the longest first"


def test_a_page_is_not_given_back_twice():
    runs = FreeRuns(3)
    with pytest.raises(AssertionError, match="free already"):
        runs.give(1)


# Names


def test_a_block_is_named_by_its_tokens_and_all_before_it():
    tokens = list(range(12))
    first, second, third = digests_of(ROOT, tokens, block_length=4)
    assert digests_of(ROOT, [*tokens, 5], block_length=4) == [first, second, third], "whole blocks only"
    assert digests_of(ROOT, [*tokens[:8], 5, 5, 5, 5], block_length=4)[:2] == [first, second]
    changed = digests_of(ROOT, [99, *tokens[1:]], block_length=4)
    assert not set(changed) & {first, second, third}, "what comes before is part of the name"
    assert digest_of(second, tokens[8:]) == third


@pytest.mark.parametrize(
    "other", [{"revision": "n"}, {"block_length": 8}, {"salt": "s"}, {"revision": "", "salt": "m"}]
)
def test_what_else_decides_keys_and_values_is_in_the_name(other):
    assert root_digest(**{"revision": "m", "block_length": 4, **other}) != ROOT


# The pool


def test_the_second_request_shares_what_the_first_has_sealed():
    pool = BlockPool(PAGES)
    first = pool.open(names("abc"), 4)
    for name in names("ab"):
        pool.seal(first, name)
    second = pool.open(names("abd"), 3)
    assert second.pages[:2] == first.pages[:2] and second.sealed == 2
    assert second.pages[2] not in first.pages
    pool.close(first)
    third = pool.open(names("ab"), 2)
    assert third.pages == second.pages[:2]


def test_content_outlives_its_request_until_its_page_is_needed():
    pool = BlockPool(4)
    first = pool.open(names("abc"), 3)
    for name in names("abc"):
        pool.seal(first, name)
    pages = list(first.pages)
    pool.close(first)
    assert (pool.held, pool.idle) == (0, 3)
    other = pool.open(names("x"), 2)
    assert pool.idle == 2, "one page was free, one had to be given up"
    pool.close(other)
    again = pool.open(names("abc"), 3)
    assert again.pages[:2] == pages[:2] and again.sealed == 2, "the end of a prefix is given up first"


def test_the_prefix_longest_idle_is_given_up_first():
    pool = BlockPool(4)
    for letter in "abc":
        holding = pool.open(names(letter), 1)
        pool.seal(holding, *names(letter))
        pool.close(holding)
    pool.close(pool.open(names("a"), 1))  # looked at again: now b is the oldest
    taken = pool.open([], 2)
    assert [pool.open(names(letter), 1) is not None for letter in "ac"] == [True, True]
    pool.close(taken)
    assert pool.open(names("b"), 1).sealed == 0


def test_what_one_has_stored_meanwhile_another_takes_over():
    pool = BlockPool(PAGES)
    first, second = pool.open(names("ab"), 2), pool.open(names("ab"), 3)
    assert not pool.adopt(second, names("a")[0])
    pool.seal(first, names("a")[0])
    assert pool.adopt(second, names("a")[0])
    assert second.pages[0] == first.pages[0] and second.sealed == 1
    assert pool.held == 4


def test_without_enough_pages_nothing_is_held():
    pool = BlockPool(4)
    holding = pool.open(names("ab"), 3)
    assert pool.open([], 2) is None
    assert pool.held == 3
    pool.close(holding)
    assert pool.open([], 4) is not None


def test_shared_pages_are_not_counted_on_twice():
    """The idle pages that a request shares cannot also be given up for it."""
    pool = BlockPool(3)
    first = pool.open(names("ab"), 2)
    for name in names("ab"):
        pool.seal(first, name)
    pool.close(first)
    assert pool.open(names("ab"), 4 - 1) is not None
    assert pool.open([], 1) is None


class Pages(RuleBasedStateMachine):
    """Any sequence of requests, against a record of what stands in each page."""

    holdings = Bundle("holdings")

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(PAGES)
        self.written = {}
        """What was last written to each page: the letters of its block and those before it."""
        self.letters = {}
        """Of each open holding: the letters of its sealed blocks."""

    def hold(self, holding, letters):
        self.letters[holding] = letters
        for place, page in enumerate(holding.pages[: holding.sealed]):
            assert self.written[page] == letters[: place + 1], "what is shared is what was asked for"

    @rule(target=holdings, letters=st.text("ab", max_size=4), more=st.integers(0, 3))
    def open(self, letters, more):
        blocks = len(letters) + more
        held = {page for holding in self.letters for page in holding.pages}
        holding = self.pool.open(names(letters), blocks)
        if holding is None:
            assert blocks > PAGES - len(held), "only a pool without room refuses"
            return multiple()
        assert len(holding.pages) == blocks == len(set(holding.pages))
        assert not held & set(holding.pages[holding.sealed :]), "a page is not given twice"
        self.hold(holding, letters[: holding.sealed])
        return holding

    def write(self, holding, place, content):
        """A forward writes a block: nobody else may have it, and nothing final may be in it."""
        page = holding.pages[place]
        assert place >= holding.sealed
        assert [other for other in self.letters if page in other.pages] == [holding]
        self.written[page] = content

    @rule(holding=holdings)
    def denoise(self, holding):
        if holding.sealed < len(holding.pages):
            self.write(holding, holding.sealed, "provisional")

    @rule(holding=holdings, letter=st.sampled_from("ab"))
    def seal(self, holding, letter):
        if holding.sealed < len(holding.pages):
            letters = self.letters[holding] + letter
            self.write(holding, holding.sealed, letters)
            self.pool.seal(holding, names(letters)[-1])
            self.letters[holding] = letters

    @rule(holding=holdings, letter=st.sampled_from("ab"))
    def adopt(self, holding, letter):
        if holding.sealed < len(holding.pages):
            letters = self.letters[holding] + letter
            if self.pool.adopt(holding, names(letters)[-1]):
                self.hold(holding, letters)

    @rule(target=holdings, holding=holdings)
    def fork(self, holding):
        twin = self.pool.fork(holding)
        if twin is None:
            return multiple()
        assert twin.sealed == holding.sealed and len(twin.pages) == len(holding.pages)
        self.hold(twin, self.letters[holding])
        return twin

    @rule(holding=consumes(holdings))
    def close(self, holding):
        self.pool.close(holding)
        del self.letters[holding]

    @invariant()
    def no_page_is_lost(self):
        held = {page for holding in self.letters for page in holding.pages}
        assert self.pool.held == len(held)
        assert 0 <= self.pool.idle <= PAGES - len(held)

    @invariant()
    def what_is_sealed_stands(self):
        for holding, letters in self.letters.items():
            assert holding.sealed == len(letters)
            for place, page in enumerate(holding.pages[: holding.sealed]):
                assert self.written[page] == letters[: place + 1]

    def teardown(self):
        for holding in self.letters:
            self.pool.close(holding)
        assert self.pool.held == 0
        assert len(self.pool.open([], PAGES).pages) == PAGES


TestPages = Pages.TestCase
TestPages.settings = settings(
    max_examples=counts.of(sample=150, full=3000), stateful_step_count=40, deadline=None
)


def test_a_holding_is_closed_once():
    pool = BlockPool(2)
    holding = pool.open([], 1)
    pool.close(holding)
    for again in (pool.close, lambda h: pool.seal(h, b"x"), lambda h: pool.adopt(h, b"x"), pool.fork):
        with pytest.raises(AssertionError):
            again(holding)
    assert isinstance(holding, Holding) and pool.held == 0
