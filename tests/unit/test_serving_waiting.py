"""The line of those who wait: its order and its totals are those of a plain list, whoever comes and goes."""

from bisect import insort
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from support.serving import CountingBatch
from unmask.diffusion.batch import NoRoom
from unmask.diffusion.decoding import DecodingParams
from unmask.errors import UsageError
from unmask.serving.engine import Engine, EngineStopped, QueueFull, Request
from unmask.serving.outbox import Outbox
from unmask.serving.waiting import WaitingLine
from unmask.telemetry import Recorder, metrics


@dataclass(eq=False)
class Waits:
    priority: int
    tokens: int


def comes(least, most):
    return st.tuples(st.just("comes"), st.integers(least, most), st.integers(1, 50))


goes, first, clears = (
    st.tuples(st.just("goes"), st.integers(0, 99)),
    st.just(("first",)),
    st.just(("clears",)),
)


@settings(max_examples=counts.of(sample=100, full=5000), deadline=None)
@given(st.lists(st.one_of(comes(-2, 2), comes(-100, 100), goes, first, first, clears), max_size=60))
def test_order_and_totals_are_those_of_a_list(operations):
    line, listed, all_ever = WaitingLine(), [], []
    for what, *how in operations:
        match what:
            case "comes":
                all_ever.append(one := Waits(*how))
                line.join(one)
                insort(listed, one, key=lambda other: -other.priority)
            case "goes" if all_ever:  # also one that has gone before
                one = all_ever[how[0] % len(all_ever)]
                assert line.leave(one) == (one in listed)
                if one in listed:
                    listed.remove(one)
            case "first" if listed:
                assert line.first is listed[0]
                assert line.leave(listed.pop(0))
            case "clears":
                line.clear()
                listed.clear()
        assert list(line) == listed and len(line) == len(listed) and bool(line) == bool(listed)
        assert line.tokens == sum(one.tokens for one in listed)
        for priority in (-101, -100, -2, -1, 0, 1, 2, 100, 101):
            assert line.ahead_of(priority) == sum(one.priority >= priority for one in listed)


def test_what_has_left_can_be_waited_for_no_more_and_nothing_is_kept_of_it():
    line, one = WaitingLine(), Waits(3, 7)
    line.join(one)
    assert line.leave(one) and not line.leave(one)
    assert not (line._lines or line._tokens_of or line.tokens)
    line.join(one)
    assert line.first is one and line.tokens == 7


# In the engine


def request(prompt, new, priority=0):
    params = DecodingParams(max_new_tokens=new, block_length=4, eos_token_id=1000, mask_token_id=1001)
    return Request(prompt=[prompt], params=params, priority=priority, outbox=Outbox(lambda: None))


class Choosy(CountingBatch):
    """Refuses thirteen, and has no room for twenty beside another."""

    def admit(self, prompt, params, committed=(), *, cache_salt=""):
        if prompt == [13]:
            raise UsageError("thirteen")
        if prompt == [20] and self.active:
            raise NoRoom("twenty is large")
        return super().admit(prompt, params, committed, cache_salt=cache_salt)


MOST_REQUESTS, MOST_TOKENS = 4, 40
submits = st.tuples(
    st.just("submit"), st.sampled_from([10, 10, 13, 20]), st.integers(1, 20), st.integers(-1, 1)
)
calls = [submits, submits, st.tuples(st.just("cancel"), st.integers(0, 99)), st.just(("turn",))]
rare = st.sampled_from([("drain",), ("resume",), ("resume",)])


@settings(max_examples=counts.of(sample=60, full=3000), deadline=None)
@given(rows=st.integers(1, 3), operations=st.lists(st.one_of(*calls, rare), max_size=60), stops=st.booleans())
def test_an_engine_admits_as_if_it_counted_anew(rows, operations, stops):
    recorder = Recorder()
    engine = Engine(
        Choosy(rows=rows), recorder, max_queue_requests=MOST_REQUESTS, max_queue_tokens=MOST_TOKENS
    )
    all_ever, draining = [], False

    def check():
        waiting = list(engine._waiting)
        assert engine._waiting.tokens == sum(len(one.prompt) + one.params.max_new_tokens for one in waiting)
        assert engine.load == (len(engine._running), len(waiting))
        assert recorder.value(metrics.REQUESTS_WAITING) == len(waiting)

    for what, *how in operations:
        match what:
            case "submit":
                all_ever.append(one := request(*how))
                waiting = list(engine._waiting)
                many = len(waiting) >= MOST_REQUESTS + rows - len(engine._running)
                long = sum(other.tokens for other in waiting) + one.tokens > MOST_TOKENS
                if draining:
                    with pytest.raises(EngineStopped):
                        engine.submit(one)
                elif many or (waiting and long):
                    with pytest.raises(QueueFull, match="requests" if many else "tokens"):
                        engine.submit(one)
                else:
                    engine.submit(one)
                    assert one in list(engine._waiting)
            case "cancel" if all_ever:
                one = all_ever[how[0] % len(all_ever)]
                there = one in list(engine._waiting) or one.ticket in engine._running
                assert engine.cancel(one) == there
                assert one not in list(engine._waiting)
            case "turn":
                engine.turn()
            case "drain":
                engine.drain()
                draining = True
            case "resume":
                engine.resume()
                draining = False
        check()
    if stops:
        engine.stop()
        assert engine.load == (0, 0)
        check()


def test_nobody_in_a_long_line_is_counted_again_for_a_newcomer_or_for_one_that_goes(monkeypatch):
    asked, tokens = [], Request.tokens
    monkeypatch.setattr(Request, "tokens", property(lambda one: asked.append(one) or tokens.fget(one)))
    engine = Engine(CountingBatch(rows=1), Recorder(), max_queue_requests=5000)
    requests = [request(10, 2, priority=number % 3) for number in range(2000)]
    for one in requests:
        engine.submit(one)
    assert len(asked) <= 2 * len(requests), "once to see whether there is room, once to stand in line"
    for one in requests[::2]:
        engine.cancel(one)
    engine.turn()
    assert len(asked) <= 2 * len(requests)
    assert engine.load == (1, len(requests) // 2 - 1)
