"""What waits in an outbox: nothing that matters is lost, and what does not matter does not pile up."""

from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.diffusion.generation import Committed, Filled, Finished, ForwardCounts
from unmask.serving.outbox import Outbox


def filled(block: int, step: int, *positions: int) -> Filled:
    tokens = tuple(100 + position for position in positions)
    return Filled(0, block, step, positions, tokens, (0.5,) * len(positions), masks_left=8 - step)


def committed(block: int) -> Committed:
    return Committed(0, block, (block,), 1, (0.5,))


def outbox() -> Outbox:
    return Outbox(lambda: None)


def test_unread_updates_of_a_block_become_one() -> None:
    box = outbox()
    assert not box.put(filled(0, 0, 3))
    assert box.put(filled(0, 1, 1, 2))
    assert box.take() == [filled(0, 1, 3, 1, 2)]
    assert not box.put(filled(0, 2, 4))
    assert box.take() == [filled(0, 2, 4)]


def test_of_a_position_that_was_edited_the_later_token_is_told() -> None:
    box = outbox()
    box.put(Filled(0, 0, 0, (3, 1), (103, 101), (0.5, 0.6), masks_left=2))
    box.put(Filled(0, 0, 1, (1, 2), (201, 102), (0.9, 0.7), masks_left=1, edited=1))
    box.put(Filled(0, 0, 2, (1,), (301,), (0.8,), masks_left=1, edited=1))
    (update,) = box.take()
    assert update == Filled(0, 0, 2, (3, 1, 2), (103, 301, 102), (0.5, 0.8, 0.7), masks_left=1, edited=2)


def test_updates_of_different_blocks_stay_apart_and_before_their_commit() -> None:
    box = outbox()
    items = [
        filled(0, 0, 1),
        committed(0),
        filled(1, 0, 9),
        committed(1),
        Finished(0, "eos", ForwardCounts(), 2),
    ]
    for item in items:
        box.put(item)
    assert box.take() == items
    assert box.take() == []


def test_each_put_is_told() -> None:
    told = []
    box = Outbox(lambda: told.append(None))
    box.put(committed(0))
    box.put(filled(1, 0, 1))
    box.put(filled(1, 1, 2))
    assert len(told) == 3


@settings(deadline=None)
@given(st.lists(st.sampled_from(["fill", "commit", "take"]), max_size=60))
def test_a_reader_at_any_pace_sees_every_commit_and_position_once_in_order(actions: list[str]) -> None:
    box, read, block, position = outbox(), [], 0, 0
    for action in actions:
        if action == "fill":
            box.put(filled(block, 0, position))
            position += 1
        elif action == "commit":
            box.put(committed(block))
            block += 1
        else:
            read += box.take()
    unread = box.take()
    assert sum(isinstance(item, Filled) for item in unread) <= block + 1
    read += unread
    assert [item.block_index for item in read if isinstance(item, Committed)] == list(range(block))
    seen = [place for item in read if isinstance(item, Filled) for place in item.positions]
    assert seen == list(range(position))
