"""Whom to ask next and how long to wait, as decisions."""

import pytest

from unmask.experts.failover import Pace, Timing, next_holder
from unmask.standing import Standing


def test_waits_follow_what_answers_take() -> None:
    pace = Pace()
    first = pace.timing
    for _ in range(31):
        pace.observe(0.03)
    assert pace.timing == first, "too few to say anything"
    pace.observe(0.03)
    assert pace.timing == Timing(pytest.approx(0.06), pytest.approx(0.12))
    for _ in range(256):
        pace.observe(0.001)
    assert pace.timing == Timing(0.02, 0.1), "never shorter than a busy machine's hiccup"
    for _ in range(256):
        pace.observe(60)
    assert pace.timing == Timing(0.5, 1.0), "never longer than a user would notice"


def test_one_slow_answer_does_not_move_the_waits() -> None:
    pace = Pace()
    for number in range(256):
        pace.observe(5.0 if number % 64 == 0 else 0.02)
    assert pace.timing.hedge_s == pytest.approx(0.04)


def test_a_shard_is_passed_over_for_longer_each_time_and_forgiven_by_good_answers() -> None:
    standing = Standing()
    assert not standing.is_banned(0)
    bans = []
    for _ in range(7):
        standing.strike(100)
        bans.append(standing.banned_until - 100)
    assert bans == [0.25, 0.5, 1, 2, 4, 8, 8]
    assert standing.is_banned(107.9) and not standing.is_banned(108)
    for _ in range(6):
        standing.answered()
    standing.strike(200)
    assert standing.banned_until == 200.5


def test_the_first_that_is_ready_and_untried_is_asked_and_a_banned_one_where_there_is_no_other() -> None:
    def choose(tried: str = "", lost: str = "", banned: str = "") -> str | None:
        return next_holder(
            "abc", tried=tried, ready=lambda name: name not in lost, banned=lambda name: name in banned
        )

    assert choose() == "a"
    assert choose(tried="a") == "b"
    assert choose(lost="ab") == "c"
    assert choose(banned="a") == "b"
    assert choose(tried="b", banned="a") == "c"
    assert choose(tried="bc", banned="a") == "a"
    assert choose(banned="abc") == "a"
    assert choose(tried="ab", lost="c") is None
    assert choose(tried="abc") is None
