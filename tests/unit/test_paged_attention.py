"""Attention over pages, against the plain rule on each sequence by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.attention import AttentionMetadata, attend_plainly
from unmask.attention.paged import Span, plan_gathered, plan_paged

GROUPS, HEADS, SIZE, PAGES = 2, 6, 8, 12


@st.composite
def spans(draw):
    """Sequences of pages in any order, some of them shared, with 1 block or more that asks."""
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        pages = draw(st.permutations(range(PAGES)))[: draw(st.integers(1, 5))]
        if draw(st.booleans()):
            pages = range(draw(st.integers(0, PAGES - len(pages))), PAGES)[: len(pages)]
        drawn.append(Span(tuple(pages), draw(st.integers(1, len(pages)))))
    return drawn


def plainly(span, query_1HSD, key_GPBD, value_GPBD):
    """One sequence alone: its pages in a row, and the rule of blocks."""
    length = key_GPBD.shape[2]
    key, value = (pages[:, list(span.pages)].flatten(1, 2).unsqueeze(0) for pages in (key_GPBD, value_GPBD))
    keys = AttentionMetadata.single_row(key.shape[2], block_length=length)
    asked = AttentionMetadata.single_row(query_1HSD.shape[2], block_length=length, start=span.first * length)
    return attend_plainly(asked, keys, query_1HSD, key, value)


@settings(max_examples=100, deadline=None)
@given(spans=spans(), block_length=st.sampled_from([1, 3, 4]))
def test_each_sequence_attends_as_if_it_were_alone(spans, block_length):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(span.asking for span in spans) * block_length

    def random(*shape):
        return torch.randn(*shape, SIZE, generator=generator, dtype=torch.float64)

    query = random(1, HEADS, tokens)
    key, value = (random(GROUPS, PAGES, block_length) for _ in range(2))
    first, parts = 0, []
    for span in spans:
        own = slice(first, first + span.asking * block_length)
        parts.append(plainly(span, query[:, :, own], key, value))
        first = own.stop
    expected = torch.cat(parts, 2)
    for planned in (plan_paged, plan_gathered):
        got = planned(spans, block_length=block_length).attend(query, key, value)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_neighbours_do_not_change_a_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    own = Span((3, 4, 5, 6, 7), 2)
    others = [Span((8, 1, 9), 3), Span((10, 11), 1)]
    query = torch.randn(1, HEADS, 6 * 4, SIZE, generator=generator).to(dtype)
    key, value = (torch.randn(GROUPS, PAGES, 4, SIZE, generator=generator).to(dtype) for _ in range(2))
    alone = plan_paged([own], block_length=4).attend(query[:, :, :8], key, value)
    together = plan_paged([own, *others], block_length=4).attend(query, key, value)
    assert torch.equal(together[:, :, :8], alone)


def test_pages_side_by_side_are_read_in_place():
    key = torch.randn(GROUPS, PAGES, 4, SIZE)
    (in_place,) = plan_paged([Span((2, 3, 4), 1)], block_length=4).sequences
    (copied,) = plan_paged([Span((2, 4, 3), 1)], block_length=4).sequences
    assert in_place.of(key).untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    assert copied.of(key).untyped_storage().data_ptr() != key.untyped_storage().data_ptr()
