"""Rows: every document whole, in order, in one place, whoever makes the row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.training.corpus import Corpus
from unmask.training.packing import lay_out, make_rows
from unmask.training.stream import DocumentStream, Purpose, philox_key

EOS, PAD = 1, 2
LENGTH = 24
RECORDED = [5, 3, 7, 2, 4, 1, 0, 6]
"""The first pass over eight documents in stage 0 with seed 0."""


def corpus_of(lengths, prompts=None, repeats=None):
    lengths = np.array(lengths, np.int64)
    return Corpus(
        ids=np.arange(10, 10 + lengths.sum(), dtype=np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompt_lengths=np.array(prompts if prompts is not None else lengths // 2, np.int64),
        repeats=np.array(repeats if repeats is not None else np.ones(len(lengths)), np.int64),
    )


def rows_of(layout, corpus, *, rank=0, world=1, responses_only=False):
    return make_rows(
        layout,
        corpus,
        rank=rank,
        world=world,
        responses_only=responses_only,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


corpora = st.lists(st.integers(1, LENGTH), min_size=1, max_size=30).map(corpus_of)
steps = {
    "corpus": corpora,
    "cursor": st.integers(0, 100),
    "rows": st.integers(1, 6),
    "multiple": st.sampled_from([1, 2, 3, 4, 8, LENGTH]),
}


def step(corpus, cursor, rows, multiple):
    return DocumentStream(corpus, seed=3, stage=0).step(cursor, rows=rows, length=LENGTH, multiple=multiple)


@given(**steps)
def test_rows_hold_the_next_documents_of_the_stream_whole_and_in_order(corpus, cursor, rows, multiple):
    layout = step(corpus, cursor, rows, multiple)
    packed = rows_of(layout, corpus)
    found = []
    for ids, document, position in zip(packed.ids, packed.document, packed.position, strict=True):
        for number in range(document.max() + 1):
            here = document == number
            assert position[here].tolist() == list(range(here.sum()))
            assert here.sum() % multiple == 0
            found.append(ids[here].tolist())
    expected = DocumentStream(corpus, seed=3, stage=0).documents(cursor, len(found))
    for tokens, number in zip(found, expected, strict=True):
        start, length = corpus.starts[number], corpus.lengths[number]
        assert tokens[:length] == corpus.ids[start : start + length].tolist()
        assert tokens[length:] == [EOS] * (len(tokens) - length)
        assert len(tokens) - length < multiple
    assert packed.shape == (rows, LENGTH)
    assert layout.tokens == (packed.document >= 0).sum()


@given(**steps)
def test_a_document_starts_a_new_row_only_if_it_does_not_fit(corpus, cursor, rows, multiple):
    layout = step(corpus, cursor, rows, multiple)
    used = np.bincount(layout.row, layout.width, minlength=rows)
    firsts = np.flatnonzero(np.diff(layout.row, prepend=-1))
    assert (used[:-1] + layout.width[firsts[1:]] > LENGTH).all()
    following = step(corpus, cursor + len(layout.document), 1, multiple)
    assert used[-1] + following.width[0] > LENGTH


@given(**steps, world=st.integers(1, 5))
def test_the_rows_of_all_ranks_together_are_those_of_one(corpus, cursor, rows, multiple, world):
    layout = step(corpus, cursor, rows, multiple)
    alone = rows_of(layout, corpus, responses_only=True)
    for rank in range(world):
        part = rows_of(layout, corpus, rank=rank, world=world, responses_only=True)
        for name in ("ids", "document", "position", "supervised", "ordinal"):
            assert np.array_equal(getattr(part, name), getattr(alone, name)[rank::world]), name


@given(**steps)
def test_ordinals_number_the_documents_of_the_stream(corpus, cursor, rows, multiple):
    layout = step(corpus, cursor, rows, multiple)
    packed = rows_of(layout, corpus)
    starts = (packed.position == 0) & (packed.document >= 0)
    assert packed.ordinal[starts].tolist() == list(range(cursor, cursor + len(layout.document)))


def test_padding_behind_an_answer_is_learnt_and_the_prompt_and_the_rows_end_are_not():
    corpus = corpus_of([3, 5], prompts=[2, 1])
    layout = lay_out(np.array([0, 1]), corpus.lengths, first_ordinal=0, rows=1, length=16, multiple=4)
    packed = rows_of(layout, corpus, responses_only=True)
    assert packed.ids[0].tolist() == [10, 11, 12, EOS, 13, 14, 15, 16, 17, EOS, EOS, EOS, PAD, PAD, PAD, PAD]
    assert packed.supervised[0].astype(int).tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert packed.document[0].tolist() == [0] * 4 + [1] * 8 + [-1] * 4
    everything = rows_of(layout, corpus, responses_only=False)
    assert everything.supervised[0].tolist() == [True] * 12 + [False] * 4


@given(corpus=corpora, cursor=st.integers(0, 90), count=st.integers(1, 90))
def test_the_stream_passes_over_all_documents_before_one_comes_again(corpus, cursor, count):
    stream, size = DocumentStream(corpus, seed=1, stage=2), len(corpus)
    whole = stream.documents(0, cursor + count)
    assert np.array_equal(stream.documents(cursor, count), whole[cursor:])
    for first in range(0, len(whole) - size + 1, size):
        assert sorted(whole[first : first + size]) == list(range(size))


def test_a_repeated_document_comes_that_often_in_a_pass():
    stream = DocumentStream(corpus_of([2, 3, 4], repeats=[1, 3, 2]), seed=1, stage=0)
    assert sorted(stream.documents(6, 6).tolist()) == [0, 1, 1, 1, 2, 2]


def test_the_order_is_a_recorded_function_of_seed_stage_and_pass():
    # Changing these numbers would change every resumed run.
    def order(seed, stage, cursor=0):
        return DocumentStream(corpus_of([1] * 8), seed=seed, stage=stage).documents(cursor, 8).tolist()

    assert order(0, 0) == RECORDED
    others = [order(1, 0), order(0, 1), order(0, 0, cursor=8)]
    assert all(sorted(other) == sorted(RECORDED) and other != RECORDED for other in others)


@pytest.mark.parametrize("seed", [0, 1, 2**53 - 1])
def test_every_purpose_and_stage_has_a_key_of_its_own(seed):
    keys = {philox_key(seed, purpose, stage) for purpose in Purpose for stage in range(64)}
    assert len(keys) == len(Purpose) * 64
    assert not keys & {philox_key(seed ^ 1, purpose, stage) for purpose in Purpose for stage in range(64)}
    assert max(keys) < 2**128
