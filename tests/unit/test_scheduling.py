"""Who takes part in a forward."""

from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.serving.scheduling import SMALLEST_ROOM, Wish, share_forward


def decoding(ticket, blocks=1, last_part=0):
    return Wish(ticket, blocks, reads=False, last_part=last_part)


def reading(ticket, blocks):
    return Wish(ticket, blocks, reads=True)


wishes = st.lists(
    st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=9
).map(
    lambda drawn: [
        reading(ticket, blocks) if reads else decoding(ticket, 1 + blocks % 2, last_part)
        for ticket, (reads, blocks, last_part) in enumerate(drawn)
    ]
)
rooms = st.integers(SMALLEST_ROOM, 20)


@given(wishes, rooms)
def test_no_forward_is_overfull_and_none_is_empty(wishes, room):
    shares = share_forward(wishes, room=room)
    assert 0 < sum(shares.values()) <= room
    asked = {wish.ticket: wish for wish in wishes}
    for ticket, blocks in shares.items():
        assert 0 < blocks <= asked[ticket].blocks
        assert blocks == asked[ticket].blocks or asked[ticket].reads, "decoding is not cut in parts"


@given(wishes, rooms)
def test_both_go_on_in_every_forward(wishes, room):
    shares = share_forward(wishes, room=room)
    readers = [wish.ticket for wish in wishes if wish.reads]
    decoders = [wish for wish in wishes if not wish.reads]
    if readers:
        assert min(readers) in shares, "the first that came is read on"
    if decoders:
        assert min(decoders, key=lambda wish: (wish.last_part, wish.ticket)).ticket in shares


@given(wishes, rooms)
def test_reading_beside_decoders_is_bounded_by_them(wishes, room):
    shares = share_forward(wishes, room=room)
    read = sum(shares.get(wish.ticket, 0) for wish in wishes if wish.reads)
    decoded = sum(shares.get(wish.ticket, 0) for wish in wishes if not wish.reads)
    if decoded:
        assert read <= max(decoded, room // 8)


@settings(deadline=None)
@given(wishes, rooms)
def test_nobody_waits_for_ever(wishes, room):
    """Decoders never end here, and yet each takes part again and again; what is read comes to its end."""
    last_part = {wish.ticket: wish.last_part for wish in wishes}
    left = {wish.ticket: wish.blocks for wish in wishes if wish.reads}
    blocks = {wish.ticket: wish.blocks for wish in wishes if not wish.reads}
    taken = dict.fromkeys(blocks, 0)
    forwards = len(blocks) * 4 + sum(left.values())
    for number in range(10, 10 + forwards):
        now = [reading(ticket, more) for ticket, more in left.items() if more]
        now += [decoding(ticket, needed, last_part[ticket]) for ticket, needed in blocks.items()]
        if not now:
            break
        for ticket, share in share_forward(now, room=room).items():
            if ticket in left:
                left[ticket] -= share
            else:
                taken[ticket], last_part[ticket] = taken[ticket] + 1, number
    assert not any(left.values())
    assert min(taken.values(), default=1) >= 1


def test_with_nobody_decoding_reading_gets_the_whole_forward():
    assert share_forward([reading(0, 10), reading(1, 30)], room=16) == {0: 10, 1: 6}


def test_a_long_prompt_at_most_doubles_a_full_forward_of_decoders():
    wishes = [decoding(ticket) for ticket in range(8)] + [reading(9, 100)]
    assert share_forward(wishes, room=32) == {**dict.fromkeys(range(8), 1), 9: 8}


def test_beside_few_decoders_an_eighth_of_the_room_is_read():
    assert share_forward([decoding(0), reading(1, 100)], room=16) == {0: 1, 1: 2}


def test_a_quarter_of_the_room_is_kept_for_reading_where_decoders_would_fill_it():
    wishes = [decoding(ticket) for ticket in range(16)] + [reading(16, 100)]
    shares = share_forward(wishes, room=16)
    assert shares.pop(16) == 4
    assert sum(shares.values()) == 12


def test_those_who_waited_longest_come_first_where_not_all_fit():
    wishes = [decoding(ticket, 2, last_part=5 - ticket) for ticket in range(5)]
    assert share_forward(wishes, room=4) == {4: 2, 3: 2}
