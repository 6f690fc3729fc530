"""A text ends at its stops, wherever tokens and blocks meet, and nothing of a stop is ever sent."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.serving.stopping import StoppableText


class Letters:
    """A token for each letter of a small alphabet, and one that takes two to write."""

    def decode(self, ids: Sequence[int]) -> str:
        data = b"".join(
            bytes([97 + token]) if token < 8 else bytes([0xC3, 0xA9])[token - 8 : token - 7] for token in ids
        )
        return data.decode("utf-8", errors="replace")


def told(ids: Sequence[int], cuts: Sequence[int], strings: Sequence[str], tokens: Sequence[int]):
    """All pieces, how many tokens belong to the text, and the stop."""
    text = StoppableText(Letters(), strings=strings, token_ids=tokens)
    pieces, count = [], 0
    bounds = [0, *sorted(cuts), len(ids)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        piece = text.push(ids[start:end])
        pieces.append(piece.text)
        count += piece.tokens
        if piece.stop is not None:
            return pieces, count, piece.stop
    return [*pieces, text.finish()], count, None


def plainly(ids: Sequence[int], strings: Sequence[str], tokens: Sequence[int]):
    """The same from the whole: the first token with which the text holds a stop."""
    for count in range(1, len(ids) + 1):
        if ids[count - 1] in tokens:
            return Letters().decode(ids[: count - 1]), count, ids[count - 1]
        text = Letters().decode(ids[:count]).rstrip("\ufffd")
        found = [(text.find(string), -len(string), string) for string in strings if string in text]
        if found:
            place, _, string = min(found)
            return text[:place], count, string
    return Letters().decode(ids), len(ids), None


IDS = st.lists(st.integers(0, 3) | st.sampled_from([8, 9]), max_size=24)


@given(
    ids=IDS,
    cuts=st.lists(st.integers(0, 24), max_size=6),
    strings=st.lists(st.text("abcdé", min_size=1, max_size=5), max_size=3),
    tokens=st.lists(st.integers(2, 3), max_size=1),
)
def test_any_cut_gives_the_text_up_to_its_first_stop(ids, cuts, strings, tokens):
    ids = [token for place, token in enumerate(ids) if token != 9 or (place and ids[place - 1] == 8)]
    cuts = [min(cut, len(ids)) for cut in cuts]
    pieces, count, stop = told(ids, cuts, strings, tokens)
    text, expected, found = plainly(ids, strings, tokens)
    assert ("".join(pieces), count, stop) == (text, expected, found)
    for end in range(1, len(pieces)):
        assert text.startswith("".join(pieces[:end]))


def test_what_may_become_a_stop_is_held_back_until_it_cannot():
    text = StoppableText(Letters(), strings=["abc"])
    assert [text.push([token]).text for token in (0, 1, 0, 1, 3)] == ["", "", "ab", "", "abd"]
    text.push([0, 1])
    assert text.finish() == "ab"


def test_of_stops_that_begin_at_one_place_the_longest_is_named():
    class Words(Letters):
        def decode(self, ids: Sequence[int]) -> str:
            return "".join(["xab", "c"][token] for token in ids)

    piece = StoppableText(Words(), strings=["a", "ab", "b"]).push([0, 1])
    assert (piece.text, piece.tokens, piece.stop) == ("x", 1, "ab")


@pytest.mark.parametrize("cut", range(4))
def test_a_continued_text_stops_where_the_whole_would(cut):
    ids = [0, 1, 2, 3]
    first = StoppableText(Letters(), strings=["bc"])
    sent = first.push(ids[:cut])
    second = StoppableText(Letters(), strings=["bc"])
    second.push(ids[:cut])
    rest = second.push(ids[cut:])
    assert sent.text + (rest.text if sent.stop is None else "") == "a"
