"""What a request's story holds, and that it stays within its limits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from unmask.diffusion.batch import Committed, Filled, ForwardCounts, Persisted, Prefilled, Reused
from unmask.serving.tracing import Story, Traced, TraceLog
from unmask.v1 import generation_pb2 as pb


def traced(*events):
    return Traced(end_seconds=2.0, seconds=0.5, rows=3, events=events)


def filled(*positions, block=0, step=0):
    tokens = tuple(position + 100 for position in positions)
    return Filled(0, block, step, positions, tokens, (0.25,) * len(positions), masks_left=1)


def story(forwards, usage, **limits):
    made = Story(lambda token: f"<{token}>", **limits)
    made.begin(pb.Started(queue_seconds=1.5))
    for forward in forwards:
        made.add(forward)
    return made.end(usage)


def test_a_forward_may_read_store_and_fill():
    trace = story(
        [
            traced(Reused(0, 8)),  # without a forward of its own
            traced(Prefilled(0, 4)),
            traced(filled(1, 0), Committed(0, 3, (100, 101), 1, (0.5, 0.5))),
            traced(Persisted(0), filled(2, block=4)),
            traced(filled(3, 2, block=4, step=1)),
        ],
        ForwardCounts(prefill=1, denoise=3),
    )
    assert trace.started.queue_seconds == 1.5
    assert (trace.reused_tokens, trace.forwards_left_out) == (8, 0)
    reads, fills, fused, edits = trace.forwards
    assert reads == pb.TracedForward(end_seconds=2.0, seconds=0.5, rows=3, prefilled_tokens=4)
    assert (list(fills.positions), list(fills.token_ids), list(fills.texts)) == (
        [1, 0],
        [101, 100],
        ["<101>", "<100>"],
    )
    assert (fills.block_index, fills.step, fills.masks_left, fills.committed_tokens) == (0, 1, 1, 2)
    assert (fused.persisted, fused.block_index, list(fused.edited)) == (True, 4, [])
    assert not fused.HasField("committed_tokens")
    assert (edits.step, list(edits.edited)) == (2, [2])


@settings(max_examples=counts.of(sample=50, full=500), deadline=None)
@given(sizes=st.lists(st.integers(0, 20), max_size=40), limit=st.integers(0, 3000))
def test_a_long_story_is_its_beginning_and_says_how_much_is_missing(sizes, limit):
    forwards = [traced(filled(*range(size), step=step)) for step, size in enumerate(sizes)]
    usage = ForwardCounts(denoise=len(sizes))
    whole, cut = story(forwards, usage), story(forwards, usage, max_bytes=limit)
    kept = len(cut.forwards)
    assert whole.forwards_left_out == 0 and cut.forwards_left_out == len(sizes) - kept
    assert list(cut.forwards) == list(whole.forwards[:kept])
    alone = pb.Trace(forwards=cut.forwards)
    assert alone.ByteSize() <= limit
    if kept < len(sizes):
        more = pb.Trace(forwards=whole.forwards[: kept + 1])
        assert more.ByteSize() + 4 * (kept + 1) > limit, "no more would have gone in"


@settings(max_examples=counts.of(sample=50, full=500), deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=30), room=st.integers(0, 100), taken=st.integers(1, 5))
def test_a_log_takes_no_more_than_it_has_room_for(sizes, room, taken):
    log, got = TraceLog(room=room), []
    forwards = [traced(filled(*range(size), step=step)) for step, size in enumerate(sizes)]
    for number, forward in enumerate(forwards):
        log.note(forward)
        if number % taken == 0:
            got += log.take()
    got += log.take()
    assert got == forwards[: len(got)]
    assert sum(1 + size for size in sizes[: len(got)]) <= room
    if len(got) < len(sizes):
        assert sum(1 + size for size in sizes[: len(got) + 1]) > room
    assert log.take() == ()
