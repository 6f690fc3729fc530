"""Rows: every document whole, in order, in one place, whoever makes the row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.diffusion.rows import uniform
from unmask.training.corpus import Corpus
from unmask.training.packing import lay_out, make_rows
from unmask.training.stream import DocumentStream, Purpose, philox_key

pytestmark = pytest.mark.training

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


@settings(deadline=None)  # a busy machine is no failure
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


@settings(deadline=None)  # a busy machine is no failure
@given(**steps)
def test_a_document_starts_a_new_row_only_if_it_does_not_fit(corpus, cursor, rows, multiple):
    layout = step(corpus, cursor, rows, multiple)
    used = np.bincount(layout.row, layout.width, minlength=rows)
    firsts = np.flatnonzero(np.diff(layout.row, prepend=-1))
    assert (used[:-1] + layout.width[firsts[1:]] > LENGTH).all()
    following = step(corpus, cursor + len(layout.document), 1, multiple)
    assert used[-1] + following.width[0] > LENGTH


@settings(deadline=None)  # a busy machine is no failure
@given(**steps, world=st.integers(1, 5))
def test_the_rows_of_all_ranks_together_are_those_of_one(corpus, cursor, rows, multiple, world):
    layout = step(corpus, cursor, rows, multiple)
    alone = rows_of(layout, corpus, responses_only=True)
    for rank in range(world):
        part = rows_of(layout, corpus, rank=rank, world=world, responses_only=True)
        for name in ("ids", "document", "position", "supervised", "ordinal"):
            assert np.array_equal(getattr(part, name), getattr(alone, name)[rank::world]), name


@settings(deadline=None)  # a busy machine is no failure
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


@settings(deadline=None)  # a busy machine is no failure
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


def cut(corpus, cursor, count, *, multiple, share=0.3, seed=3):
    stream = DocumentStream(corpus, seed=seed, stage=0)
    document = stream.documents(cursor, count)
    used = stream.cut(document, cursor, length=LENGTH, multiple=multiple, share=share)
    return corpus.lengths[document], used


@settings(deadline=None)  # a busy machine is no failure
@given(corpus=corpora, cursor=st.integers(0, 100), count=st.integers(1, 40), multiple=steps["multiple"])
def test_documents_cut_to_a_random_length_are_whole_blocks_and_the_others_whole(
    corpus, cursor, count, multiple
):
    lengths, used = cut(corpus, cursor, count, multiple=multiple)
    shorter = used < lengths
    assert (used > 0).all()
    assert (used[shorter] % multiple == 0).all()
    assert (used[~shorter] == lengths[~shorter]).all()


@settings(deadline=None)  # a busy machine is no failure
@given(corpus=corpora, cursor=st.integers(0, 100), ahead=st.integers(0, 30))
def test_how_a_document_is_cut_follows_from_its_number_alone(corpus, cursor, ahead):
    """So it does not depend on where a step, or an attempt, began."""
    lengths, used = cut(corpus, cursor, ahead + 10, multiple=1)
    assert (used[ahead:] == cut(corpus, cursor + ahead, 10, multiple=1)[1]).all()
    assert (lengths == cut(corpus, cursor, ahead + 10, multiple=1, share=0.0)[1]).all()


def test_the_share_that_is_cut_and_the_lengths_that_are_left_are_uniform():
    corpus = corpus_of([LENGTH] * 20)
    _, used = cut(corpus, 0, 40_000, multiple=1, share=0.25)
    assert np.mean(used < LENGTH) == pytest.approx(0.25 * (1 - 1 / LENGTH), abs=0.01)
    counts = np.bincount(used[used < LENGTH], minlength=LENGTH)[1:]
    assert counts.min() > 0.8 * counts.mean()
    assert counts.max() < 1.2 * counts.mean()


@settings(deadline=None)  # a busy machine is no failure
@given(corpus=corpora, cursor=st.integers(0, 50), rows=st.integers(1, 4), multiple=steps["multiple"])
def test_rows_are_full_though_documents_are_cut(corpus, cursor, rows, multiple):
    """Next-fit over many more documents than are needed gives the same rows."""
    stream = DocumentStream(corpus, seed=3, stage=0)
    layout = stream.step(cursor, rows=rows, length=LENGTH, multiple=multiple, random_length=0.5)
    document = stream.documents(cursor, rows * LENGTH + 1)
    used = stream.cut(document, cursor, length=LENGTH, multiple=multiple, share=0.5)
    whole = lay_out(document, used, first_ordinal=cursor, rows=rows, length=LENGTH, multiple=multiple)
    for name in ("document", "row", "start", "width", "tokens_used"):
        assert np.array_equal(getattr(layout, name), getattr(whole, name))


def test_a_document_that_is_cut_ends_in_the_middle_and_not_with_the_end_of_text():
    corpus = corpus_of([20])
    layout = DocumentStream(corpus, seed=0, stage=0).step(
        0, rows=40, length=LENGTH, multiple=4, random_length=1.0
    )
    rows = rows_of(layout, corpus)
    assert {int(width) for width in layout.width} > {4, 8, 12, 16}
    real = rows.document >= 0
    assert np.array_equal(rows.ids[real], 10 + rows.position[real])


@settings(deadline=None)  # a busy machine is no failure
@given(first=st.integers(0, 50), count=st.integers(0, 20))
def test_random_numbers_can_be_had_from_any_number_on(first, count):
    whole = uniform(5, 1, 2, 3, first + count)
    assert np.array_equal(uniform(5, 1, 2, 3, count, first=first), whole[first:])
