"""The documents of a stage: files put together, long documents, repetitions, digests."""

import logging

import pytest

from support.training import EOS, write_data, write_lines
from unmask.errors import DataError
from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Library, Source


@pytest.fixture
def library(tmp_path):
    write_data(tmp_path)
    return Library(Tokenizer.load(tmp_path / "tokenizer"), eos_token_id=EOS)


def text_file(path, *lengths):
    """Documents of so many tokens, the end of text included."""
    write_lines(path, [{"text": " ".join(["w9"] * (length - 1))} for length in lengths])
    return path


def documents(corpus):
    return [
        corpus.ids[start : start + length].tolist()
        for start, length in zip(corpus.starts, corpus.lengths, strict=True)
    ]


def test_files_follow_each_other(library, tmp_path):
    sources = [Source(text_file(tmp_path / f"{n}.jsonl", n, n + 1), "text") for n in (2, 5)]
    corpus = library.corpus(sources, length=8, overlong="Error")
    assert documents(corpus) == [[9] * (length - 1) + [EOS] for length in (2, 3, 5, 6)]
    assert corpus.prompt_lengths.tolist() == [0] * 4


def test_a_weight_repeats_the_documents_of_a_file_in_each_pass(library, tmp_path):
    sources = [
        Source(text_file(tmp_path / "a.jsonl", 2, 3), "text", 2),
        Source(text_file(tmp_path / "b.jsonl", 4), "text"),
    ]
    assert library.corpus(sources, length=8, overlong="Error").once_through.tolist() == [0, 0, 1, 1, 2]


def test_a_document_that_fills_the_row_fits(library, tmp_path):
    path = text_file(tmp_path / "a.jsonl", 8)
    assert len(library.corpus([Source(path, "text")], length=8, overlong="Error")) == 1


def test_a_longer_document_is_an_error_that_names_it_and_the_ways_out(library, tmp_path):
    path = text_file(tmp_path / "a.jsonl", 2, 9)
    with pytest.raises(DataError, match=rf"{path}:2: 9 tokens, but rows hold 8; .*length.*data.overlong"):
        library.corpus([Source(path, "text")], length=8, overlong="Error")


def test_longer_documents_are_left_out_and_counted_on_demand(library, tmp_path, caplog):
    path = text_file(tmp_path / "a.jsonl", 9, 2, 10)
    with caplog.at_level(logging.WARNING):
        corpus = library.corpus([Source(path, "text", 3)], length=8, overlong="Skip")
    assert documents(corpus) == [[9, EOS]]
    assert (corpus.skipped, corpus.once_through.tolist()) == (2, [0, 0, 0])
    assert "2 of 3 documents" in caplog.text


def test_long_texts_are_split_into_rows_and_a_rest(library, tmp_path):
    path = tmp_path / "a.jsonl"
    text = [f"w{number}" for number in range(8, 24)]
    write_lines(path, [{"text": "w9 w9"}, {"text": " ".join(text)}, {"text": " ".join(text[:15])}])
    corpus = library.corpus([Source(path, "text", 2)], length=8, overlong="Split")
    tokens = [*range(8, 24), EOS]
    assert documents(corpus) == [
        [9, 9, EOS],
        tokens[:8],
        tokens[8:16],
        [EOS],
        tokens[:8],
        [*tokens[8:15], EOS],
    ]
    assert corpus.once_through.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert (corpus.skipped, corpus.prompt_lengths.tolist()) == (0, [0] * 6)


def test_splitting_does_not_change_the_digest(library, tmp_path):
    source = Source(text_file(tmp_path / "a.jsonl", 20), "text")
    before = library.digest(source)
    library.corpus([source], length=8, overlong="Split")
    assert library.digest(source) == before


def test_an_answer_is_not_split_from_its_prompt(library, tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"prompt": "w9 " * 9, "completion": "w9"}])
    with pytest.raises(DataError, match=rf"{path}:1: 11 tokens.* set data.overlong to Skip$"):
        library.corpus([Source(path, "completion")], length=8, overlong="Split")


def test_nothing_left_is_an_error(library, tmp_path):
    path = text_file(tmp_path / "a.jsonl", 9)
    with pytest.raises(DataError, match="all 1 documents are longer than 8 tokens"):
        library.corpus([Source(path, "text")], length=8, overlong="Skip")


def test_questions_are_the_first_of_the_files_that_ask_any(library, tmp_path):
    text = Source(text_file(tmp_path / "a.jsonl", 3), "text")
    held_out = Source(tmp_path / "held-out.jsonl", "completion")
    questions = library.questions([text, held_out, held_out], count=12)
    assert len(questions) == 12
    assert questions[10:] == questions[:2]
    assert all(one.answers == (one.prompt[::-1],) for one in questions)


def test_a_prompt_without_tokens_cannot_be_asked(library, tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"prompt": " ", "completion": "w9"}])
    with pytest.raises(DataError, match=rf"{path}:1: the prompt has no tokens"):
        library.questions([Source(path, "completion")], count=1)


def test_the_digest_is_that_of_the_documents_not_of_the_file(library, tmp_path):
    one, other = (Source(text_file(tmp_path / f"{name}.jsonl", 4, 5), "text") for name in "ab")
    third = Source(text_file(tmp_path / "c.jsonl", 5, 4), "text")
    assert library.digest(one) == library.digest(other) != library.digest(third)


def test_long_text_is_cut_into_pieces_of_a_row_on_demand(library, tmp_path):
    path = text_file(tmp_path / "a.jsonl", 9, 4, 8)
    corpus = library.corpus([Source(path, "text", 2)], length=4, overlong="Split")
    assert documents(corpus) == [[9] * 4, [9] * 4, [EOS], [9, 9, 9, EOS], [9] * 4, [9, 9, 9, EOS]]
    assert corpus.repeats.tolist() == [2] * 6


def test_a_long_answer_is_never_cut(library, tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"prompt": "w9 w9", "completion": "w9 w9"}])
    with pytest.raises(DataError, match=rf"{path}:1: 5 tokens, but rows hold 4; .*data.overlong to Skip$"):
        library.corpus([Source(path, "completion")], length=4, overlong="Split")
