"""Streamed text is the whole text, and never splits a character."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support.folders import word_tokenizer
from unmask.serving.text import TextStream


class Decoder:
    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


def byte_level() -> Decoder:
    """Every byte is a token, as at the bottom of GPT's and Ling's vocabularies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return Decoder(tokenizer)


BYTES = byte_level()
WORDS = Decoder(word_tokenizer(64, eos=62, mask=63))


def pieces(decoder: Decoder, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    stream = TextStream(decoder)
    bounds = [0, *sorted(cuts), len(ids)]
    sent = [stream.push(ids[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    return [*sent, stream.finish()]


@settings(deadline=None)
@given(st.text(), st.data())
def test_any_cut_of_the_bytes_of_a_text_gives_the_text_in_whole_characters(
    text: str, data: st.DataObject
) -> None:
    ids = BYTES.encode(text)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    sent = pieces(BYTES, ids, cuts)
    assert "".join(sent) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in sent)


@settings(deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40), st.data())
def test_undecodable_bytes_lose_nothing(ids: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    assert "".join(pieces(BYTES, ids, cuts)) == BYTES.decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 63), max_size=40), st.data())
def test_words_keep_their_spaces_across_cuts(ids: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    assert "".join(pieces(WORDS, ids, cuts)) == WORDS.decode(ids)


def test_an_incomplete_character_waits_for_its_last_byte() -> None:
    first, second, third = BYTES.encode("\N{EURO SIGN}")
    stream = TextStream(BYTES)
    assert stream.push([*BYTES.encode("5 "), first]) == "5 "
    assert stream.push([second]) == ""
    assert stream.push([third, *BYTES.encode("!")]) == "\N{EURO SIGN}!"
    assert stream.finish() == ""


def test_a_character_that_never_ends_shows_at_the_end() -> None:
    stream = TextStream(BYTES)
    assert stream.push(BYTES.encode("\N{EURO SIGN}")[:2]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("length", [10, 1000])
def test_the_cost_of_a_piece_does_not_grow_with_the_text(length: int) -> None:
    decoded = []

    class Spy:
        def decode(self, ids: Sequence[int]) -> str:
            decoded.append(len(ids))
            return WORDS.decode(ids)

    stream = TextStream(Spy())
    for _ in range(length):
        stream.push([5, 6, 7, 8])
    assert max(decoded) == 8
