"""The engine's decisions, forward by forward; no thread, no network."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.models import TINY, random_tokens, tiny_model
from support.serving import CountingBatch, wait_until
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import BlockBatch, Committed, Filled, Finished
from unmask.errors import UsageError
from unmask.serving.engine import PHASES, Engine, EngineStopped, Interrupted, ModelFailed, QueueFull, Request
from unmask.serving.outbox import Admitted, Failed, Item, Outbox
from unmask.serving.ragged import RaggedBatch
from unmask.telemetry import Recorder, metrics

EOS = 1000


def request(
    prompt: tuple[int, ...] = (10,),
    *,
    max_new_tokens: int = 6,
    committed: tuple[int, ...] = (),
    canvas: bool = False,
    priority: int = 0,
    deadline: float | None = None,
) -> Request:
    params = DecodingParams(
        max_new_tokens=max_new_tokens, block_length=4, eos_token_id=EOS, mask_token_id=1001
    )
    return Request(
        prompt=prompt,
        committed=committed,
        params=params,
        canvas=canvas,
        priority=priority,
        deadline=deadline,
        outbox=Outbox(lambda: None),
    )


def tokens(items: list[Item]) -> list[int]:
    return [token for item in items if isinstance(item, Committed) for token in item.token_ids]


class Bench:
    """An engine that is turned by hand."""

    def __init__(self, batch: CountingBatch, **limits: int) -> None:
        self.batch = batch
        self.recorder = Recorder()
        self.engine = Engine(batch, self.recorder, **limits)  # type: ignore[arg-type]

    def submit(self, *requests: Request) -> None:
        for one in requests:
            self.engine.submit(one)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.turn()


@pytest.fixture
def bench() -> Bench:
    return Bench(CountingBatch(rows=2))


def test_a_request_is_answered_block_by_block(bench: Bench) -> None:
    one = request()
    bench.submit(one)
    bench.turn(6)
    items = one.outbox.take()
    assert [type(item) for item in items] == [Admitted, Committed, Committed, Finished]
    assert tokens(items) == [11, 12, 13, 14, 15, 16]
    assert len(bench.batch.forwards) == 6


def test_no_forward_is_run_for_nobody(bench: Bench) -> None:
    one = request()
    bench.submit(one)
    bench.engine.cancel(one)
    bench.turn(3)
    assert bench.batch.forwards == []


def test_canvas_updates_go_to_those_who_want_them(bench: Bench) -> None:
    with_canvas, without = request(canvas=True), request()
    bench.submit(with_canvas, without)
    bench.turn()
    assert [type(item) for item in with_canvas.outbox.take()] == [Admitted, Filled]
    assert [type(item) for item in without.outbox.take()] == [Admitted]


def test_those_who_wait_are_taken_up_in_order_as_rows_come_free(bench: Bench) -> None:
    short, long = request(max_new_tokens=2), request(max_new_tokens=5)
    third, fourth = request((50,), max_new_tokens=2), request((70,), max_new_tokens=2)
    bench.submit(short, long, third, fourth)
    bench.turn(2)
    assert third.ticket is None
    bench.turn()
    assert third.ticket is not None and third.ticket in bench.batch.forwards[2]
    assert fourth.ticket is None
    bench.turn(3)
    assert tokens(fourth.outbox.take()) == [71, 72]
    assert len(bench.batch.forwards) == 6


def test_a_cancelled_request_takes_part_in_no_further_forward(bench: Bench) -> None:
    gone, stays = request(max_new_tokens=50), request(max_new_tokens=3)
    bench.submit(gone, stays)
    bench.turn()
    bench.engine.cancel(gone)
    bench.turn(2)
    assert [gone.ticket in forward for forward in bench.batch.forwards] == [True, False, False]
    assert tokens(stays.outbox.take()) == [11, 12, 13]
    assert bench.batch.active == 0


def test_a_cancelled_request_s_row_serves_the_next_forward() -> None:
    bench = Bench(CountingBatch(rows=1))
    gone, waits = request(max_new_tokens=50), request(max_new_tokens=1)
    bench.submit(gone, waits)
    bench.turn()
    bench.engine.cancel(gone)
    bench.turn()
    assert bench.batch.forwards == [{gone.ticket}, {waits.ticket}]


def test_cancelling_what_has_ended_or_never_came_changes_nothing(bench: Bench) -> None:
    ended, stranger, stays = request(max_new_tokens=1), request(), request(max_new_tokens=3)
    bench.submit(ended, stays)
    bench.turn()
    bench.engine.cancel(ended)
    bench.engine.cancel(stranger)
    bench.turn(2)
    assert tokens(stays.outbox.take()) == [11, 12, 13]


def test_a_full_queue_turns_away_and_says_when_to_come_back() -> None:
    bench = Bench(CountingBatch(rows=2), max_queue_requests=1)
    bench.submit(request(), request(), request())
    with pytest.raises(QueueFull, match="at most 1 requests") as refused:
        bench.submit(request())
    assert 0 < refused.value.retry_after_s <= 30
    bench.turn()
    with pytest.raises(QueueFull):
        bench.submit(request(), request())
    assert bench.recorder.value(metrics.ADMISSION_REJECTIONS, reason="requests") == 2
    assert bench.recorder.value(metrics.REQUESTS_RUNNING) == 2
    assert bench.recorder.value(metrics.REQUESTS_WAITING) == 1


def test_the_queue_is_bounded_in_tokens_but_one_large_request_may_wait() -> None:
    bench = Bench(CountingBatch(rows=2), max_queue_tokens=20)
    bench.submit(request(max_new_tokens=100))
    with pytest.raises(QueueFull, match="at most 20 tokens"):
        bench.submit(request(max_new_tokens=1))
    bench.turn()
    bench.submit(request(max_new_tokens=1))


class Noting(CountingBatch):
    """Notes the first token of each prompt that is taken up."""

    def __init__(self) -> None:
        super().__init__(rows=1)
        self.taken: list[int] = []

    def admit(self, prompt: Sequence[int], params: DecodingParams, *rest: object, **options: object) -> int:
        self.taken.append(prompt[0])
        return super().admit(prompt, params, *rest, **options)  # type: ignore[arg-type]


@given(priorities=st.lists(st.integers(-2, 2), max_size=12), moments=st.data())
def test_the_highest_priority_is_taken_up_first_and_equal_ones_as_they_came(
    priorities: list[int], moments: st.DataObject
) -> None:
    """Against the least of a list, looked for each time that the row is free."""
    batch = Noting()
    bench = Bench(batch)
    waiting: list[tuple[int, int]] = []
    expected: list[int] = []

    def turn() -> None:
        waiting.remove(first := min(waiting))
        expected.append(first[1])
        bench.turn()

    for number, priority in enumerate(priorities):
        bench.submit(request((number,), max_new_tokens=1, priority=priority))
        waiting.append((-priority, number))
        if moments.draw(st.booleans()):
            turn()
    while waiting:
        turn()
    assert batch.taken == expected


def test_what_would_wait_past_its_deadline_is_turned_away_once_there_is_a_measure() -> None:
    bench = Bench(CountingBatch(rows=1))
    soon = time.monotonic() + 0.5
    bench.submit(request(deadline=soon), request(deadline=soon))  # nothing is known yet
    bench.turn(12)
    bench.engine._service_seconds = 10.0
    bench.submit(request(max_new_tokens=50), request(deadline=time.monotonic() + 25))
    bench.turn()
    with pytest.raises(QueueFull, match=r"about 20\.0 s long, and the call has 1[0-9]\.") as refused:
        bench.submit(request(deadline=time.monotonic() + 19))
    assert refused.value.retry_after_s == 10
    bench.submit(request(deadline=time.monotonic() + 19, priority=1))  # before the one that waits
    bench.submit(request())
    assert bench.recorder.value(metrics.ADMISSION_REJECTIONS, reason="deadline") == 1


def test_what_needs_the_batch_for_itself_waits_for_those_who_run_and_others_wait_for_it() -> None:
    bench = Bench(CountingBatch(rows=2))
    runs, waits = request(max_new_tokens=2), request((50,), max_new_tokens=2)
    bench.submit(runs)
    bench.turn()
    seen: list[int] = []
    done = bench.engine.alone(lambda batch: seen.append(batch.active))
    bench.submit(waits)
    bench.turn()  # the second forward of the one that runs: there is a row, and the other is not taken up
    assert not done.done() and waits.ticket is None and bench.engine.load == (0, 1)
    bench.turn()
    assert done.result(0) is None and seen == [0]
    bench.turn(2)
    assert tokens(waits.outbox.take()) == [51, 52]


def test_what_people_can_mend_is_told_to_whoever_wanted_the_batch_and_changes_nothing(bench: Bench) -> None:
    def refuses(_: object) -> None:
        raise UsageError("not like this")

    done = bench.engine.alone(refuses)
    one = request(max_new_tokens=1)
    bench.submit(one)
    bench.turn(2)
    with pytest.raises(UsageError, match="not like this"):
        done.result(0)
    assert tokens(one.outbox.take()) == [11]


def test_a_defect_while_the_batch_is_changed_ends_the_engine() -> None:
    engine = Engine(CountingBatch(), Recorder())
    failed = threading.Event()
    engine._on_failure = failed.set

    def breaks(_: object) -> None:
        raise ArithmeticError("half of it")

    first, second = engine.alone(breaks), engine.alone(lambda _: None)
    engine.start()
    assert failed.wait(30)
    with pytest.raises(ArithmeticError):
        first.result(30)
    with pytest.raises(ModelFailed):
        second.result(30)
    with pytest.raises(EngineStopped):
        engine.alone(lambda _: None)
    engine.resume()
    with pytest.raises(EngineStopped, match="failed"):
        engine.submit(request())


def test_an_engine_that_drained_takes_requests_again(bench: Bench) -> None:
    bench.engine.drain()
    with pytest.raises(EngineStopped):
        bench.submit(request())
    bench.engine.resume()
    one = request(max_new_tokens=1)
    bench.submit(one)
    bench.turn()
    assert tokens(one.outbox.take()) == [11]


def test_a_draining_engine_finishes_what_it_has_and_takes_nothing_more(bench: Bench) -> None:
    one, waits = request(max_new_tokens=2), request(max_new_tokens=3)
    bench.submit(one, request(max_new_tokens=2), waits)
    bench.engine.drain()
    with pytest.raises(EngineStopped, match="shutting down"):
        bench.submit(request())
    bench.turn(5)
    assert tokens(one.outbox.take()) == [11, 12]
    assert tokens(waits.outbox.take()) == [11, 12, 13]


@pytest.mark.parametrize(
    ("committed", "reason"), [((11, EOS), "eos"), ((11, 12, 13, 14, 15, 16), "length")], ids=["eos", "length"]
)
def test_what_is_complete_already_costs_no_forward(
    bench: Bench, committed: tuple[int, ...], reason: str
) -> None:
    one = request(committed=committed)
    bench.submit(one)
    bench.turn()
    admitted, finished = one.outbox.take()
    assert isinstance(admitted, Admitted) and isinstance(finished, Finished)
    assert (finished.reason, finished.kept_tokens) == (reason, 0)
    assert bench.batch.forwards == []


def test_kept_tokens_are_those_of_this_attempt(bench: Bench) -> None:
    one = request(committed=(11, 12, 13, 14))
    bench.submit(one)
    bench.turn(2)
    finished = one.outbox.take()[-1]
    assert isinstance(finished, Finished)
    assert finished.kept_tokens == 2


def test_a_request_that_the_batch_refuses_fails_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    admit = bench.batch.admit

    def choosy(prompt: tuple[int, ...], *rest: object, **more: object) -> int:
        if prompt == (13,):
            raise UsageError("thirteen")
        return admit(prompt, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.batch, "admit", choosy)
    unlucky, other = request((13,)), request(max_new_tokens=1)
    bench.submit(unlucky, other)
    bench.turn()
    (failed,) = unlucky.outbox.take()
    assert isinstance(failed, Failed) and str(failed.error) == "thirteen"
    assert tokens(other.outbox.take()) == [11]


@pytest.fixture
def failure() -> Iterator[tuple[Engine, threading.Event]]:
    told = threading.Event()
    engine = Engine(CountingBatch(rows=1, fails_at=2), Recorder(), on_failure=told.set)
    yield engine, told
    engine.stop()


def test_a_failed_forward_fails_every_request_and_ends_the_engine(
    failure: tuple[Engine, threading.Event],
) -> None:
    engine, told = failure
    running, waiting = request(), request()
    engine.submit(running)
    engine.submit(waiting)
    engine.start()
    assert told.wait(10)
    for one in (running, waiting):
        last = one.outbox.take()[-1]
        assert isinstance(last, Failed) and isinstance(last.error, ModelFailed)
    with pytest.raises(EngineStopped, match="failed"):
        engine.submit(request())


def test_a_lost_forward_ends_the_running_requests_and_takes_up_those_that_wait() -> None:
    bench = Bench(CountingBatch(rows=2, lost_at=3))
    one, other, waiting = request(), request((20,)), request((30,))
    bench.submit(one, other, waiting)
    bench.turn(4)
    for lost in (one, other):
        last = lost.outbox.take()[-1]
        assert isinstance(last, Failed) and isinstance(last.error, Interrupted)
        assert "10.0.0.7" not in str(last.error), "where shards are is nobody's business"
    assert bench.engine.load == (0, 1)
    bench.turn(6)
    assert tokens(waiting.outbox.take()) == [31, 32, 33, 34, 35, 36]
    assert bench.recorder.value(metrics.FORWARDS, kind="mixed") == 0


def test_a_stopped_engine_lets_nobody_wait_in_vain() -> None:
    engine = Engine(CountingBatch(rows=1), Recorder())
    running, waiting = request(max_new_tokens=900_000), request()
    engine.submit(running)
    engine.submit(waiting)
    engine.start()
    wait_until(lambda: running.ticket is not None)
    engine.stop()
    for one in (running, waiting):
        last = one.outbox.take()[-1]
        assert isinstance(last, Failed) and isinstance(last.error, EngineStopped)


@pytest.mark.parametrize("prompt_length", [3, 16, 21])
def test_forwards_are_counted_by_what_they_did(prompt_length: int) -> None:
    """One request alone: its own counts are the engine's."""
    recorder = Recorder()
    engine = Engine(BlockBatch(tiny_model(), rows=1, capacity=64, block_length=8), recorder)
    params = DecodingParams(
        max_new_tokens=24, block_length=8, eos_token_id=TINY["eos_token_id"], mask_token_id=63
    )
    one = Request(prompt=random_tokens(prompt_length), params=params, outbox=Outbox(lambda: None))
    engine.submit(one)
    items: list[Item] = []
    while not items or not isinstance(items[-1], Finished):
        engine.turn()
        items += one.outbox.take()
    usage = items[-1].usage
    counted = {
        kind: recorder.value(metrics.FORWARDS, kind=kind)
        for kind in ("prefill", "denoise", "persist", "mixed")
    }
    assert counted == {
        "prefill": usage.prefill,
        "denoise": usage.denoise,
        "persist": usage.persist,
        "mixed": 0,
    }
    assert usage.prefill == (prompt_length >= 8) and usage.persist > 0


def test_rows_in_different_states_make_a_forward_mixed() -> None:
    recorder = Recorder()
    engine = Engine(BlockBatch(tiny_model(), rows=2, capacity=64, block_length=8), recorder)
    for seed, threshold in ((0, 0.01), (1, 1.0)):
        params = DecodingParams(
            max_new_tokens=24, block_length=8, threshold=threshold, eos_token_id=62, mask_token_id=63
        )
        engine.submit(Request(prompt=random_tokens(3, seed=seed), params=params, outbox=Outbox(lambda: None)))
    for _ in range(3):
        engine.turn()
    assert recorder.value(metrics.FORWARDS, kind="mixed") > 0


def test_the_three_figures_are_observed_once_per_request(bench: Bench) -> None:
    bench.submit(request(), request())
    bench.turn(6)
    for metric in (
        metrics.TOKENS_PER_FORWARD,
        metrics.TOKENS_PER_FORWARD_DECODE,
        metrics.TOKENS_PER_FORWARD_DENOISE,
        metrics.E2E,
        metrics.TIME_TO_FIRST_BLOCK,
        metrics.INTER_BLOCK,
    ):
        assert bench.recorder.value(metric) == 2, metric.name
    assert bench.recorder.value(metrics.COMMITTED_TOKENS) == 12
    assert bench.recorder.value(metrics.BLOCKS_COMMITTED) == 4
    assert bench.recorder.value(metrics.POSITIONS_EVALUATED) == 48


def test_rows_are_counted_by_what_they_do_in_the_last_forward() -> None:
    recorder = Recorder()
    batch = RaggedBatch(tiny_model(), rows=4, capacity=64, block_length=8, max_positions=256)
    engine = Engine(batch, recorder)

    def rows() -> dict[str, float]:
        return {phase: recorder.value(metrics.BATCH_ROWS, phase=phase) for phase in PHASES}

    def submit(length: int, **changes: object) -> Request:
        ids = {"eos_token_id": 61, "mask_token_id": 63, "max_new_tokens": 16, "block_length": 8}
        params = DecodingParams(**{**ids, **changes})  # type: ignore[arg-type]
        prompt = random_tokens(length, seed=length)
        one = Request(prompt=prompt, params=params, outbox=Outbox(lambda: None))
        engine.submit(one)
        return one

    submit(3, threshold=2.0)
    submit(2, steps=1, threshold=2.0, max_new_tokens=30)
    engine.turn()
    assert rows() == {"prefill": 0, "denoise": 2, "persist": 0, "fused": 0}
    last = submit(17)
    engine.turn()
    assert rows() == {"prefill": 1, "denoise": 1, "persist": 0, "fused": 1}
    assert recorder.value(metrics.FORWARDS, kind="mixed") == 1
    assert recorder.value(metrics.CACHE_USAGE) == pytest.approx((3 + 4 + 5) / 32)
    engine.cancel(last)
    engine.turn()
    assert recorder.value(metrics.CACHE_USAGE) == pytest.approx((3 + 4) / 32)


def test_a_fused_forward_is_a_denoise_forward() -> None:
    """One request alone: its own counts are the engine's."""
    recorder = Recorder()
    engine = Engine(RaggedBatch(tiny_model(), rows=1, capacity=64, block_length=8), recorder)
    params = DecodingParams(max_new_tokens=24, block_length=8, eos_token_id=61, mask_token_id=63)
    one = Request(prompt=random_tokens(21), params=params, outbox=Outbox(lambda: None))
    engine.submit(one)
    items: list[Item] = []
    while not items or not isinstance(items[-1], Finished):
        engine.turn()
        items += one.outbox.take()
    usage = items[-1].usage
    counted = {kind: recorder.value(metrics.FORWARDS, kind=kind) for kind in ("prefill", "denoise")}
    assert counted == {"prefill": usage.prefill, "denoise": usage.denoise} and usage.persist == 0
    assert (
        recorder.value(metrics.FORWARDS, kind="persist")
        == recorder.value(metrics.FORWARDS, kind="mixed")
        == 0
    )


def test_a_request_that_does_not_fit_now_waits_and_is_not_overtaken() -> None:
    model = tiny_model()
    page = model.page_bytes(block_length=8)
    engine = Engine(RaggedBatch(model, rows=4, capacity=64, block_length=8, cache_bytes=8 * page), Recorder())
    asked = []
    for seed, new in enumerate((30, 40, 4)):
        params = DecodingParams(max_new_tokens=new, block_length=8, eos_token_id=61, mask_token_id=63)
        asked.append(Request(prompt=random_tokens(2, seed=seed), params=params, outbox=Outbox(lambda: None)))
        engine.submit(asked[-1])
    engine.turn()
    assert [one.ticket is not None for one in asked] == [True, False, False]
    engine.cancel(asked[0])
    engine.turn()
    assert [one.ticket is not None for one in asked] == [True, True, True]
