"""Who may see whom, and backends that compute it."""

import pytest
import torch

from unmask.attention import AttentionMetadata, attend_plainly, may_attend, plan
from unmask.attention.backend import MaskedPlan


def metadata(*, position=None, document, block, view):
    columns = {
        "position": position or [0] * len(document),
        "document": document,
        "block": block,
        "view": view,
    }
    return AttentionMetadata(**{name: torch.tensor([values]) for name, values in columns.items()})


def drawn(allowed):
    return ["".join("1" if cell else "." for cell in row) for row in allowed[0]]


def two_copies(length, block_length, document):
    position = list(range(length))
    block = [p // block_length for p in position]
    return metadata(document=document * 2, block=block * 2, view=[1] * length + [0] * length)


# The paper's equation 3 worked out by hand (rows are queries): noisy half first, clean half second.
EQUATION_3 = {
    (4, 2, "0000"): """
        11......
        11......
        ..1111..
        ..1111..
        ....11..
        ....11..
        ....1111
        ....1111""",
    (3, 1, "000"): """
        1.....
        .1.1..
        ..111.
        ...1..
        ...11.
        ...111""",
    (6, 2, "000111"): """
        11..........
        11..........
        ..1...11....
        ...1........
        ....11...1..
        ....11...1..
        ......11....
        ......11....
        ......111...
        .........1..
        .........111
        .........111""",
}


@pytest.mark.parametrize(("length", "block_length", "documents"), EQUATION_3)
def test_two_copies_see_what_equation_3_says(length, block_length, documents):
    tokens = two_copies(length, block_length, [int(d) for d in documents])
    expected = EQUATION_3[length, block_length, documents].split()
    assert drawn(may_attend(tokens, tokens)) == expected


def test_views_do_not_see_each_other():
    tokens = metadata(document=[0] * 6, block=[0, 1] * 3, view=[1, 1, 2, 2, 0, 0])
    assert drawn(may_attend(tokens, tokens)) == ["1.....", ".1..1.", "..1...", "...11.", "....1.", "....11"]


def test_one_token_blocks_are_the_causal_mask():
    position = torch.arange(5).unsqueeze(0)
    tokens = AttentionMetadata.causal(position, torch.zeros_like(position))
    assert torch.equal(may_attend(tokens, tokens)[0], torch.ones(5, 5, dtype=torch.bool).tril())


def test_padding_is_seen_by_padding_alone():
    tokens = metadata(document=[0, 0, -1, -1], block=[0, 1, 0, 1], view=[0] * 4)
    assert drawn(may_attend(tokens, tokens)) == ["1...", "11..", "..1.", "..11"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rule", ["causal", "bidirectional", "two copies"])
def test_the_fast_path_equals_the_plain_reference(rule, kv_heads):
    torch.manual_seed(0)
    if rule == "two copies":
        tokens = two_copies(8, 4, [0] * 5 + [1] * 3)
    else:
        position = torch.arange(16).unsqueeze(0)
        tokens = getattr(AttentionMetadata, rule)(position, torch.zeros_like(position))
    query = torch.randn(1, 4, 16, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, 16, 8, dtype=torch.float64)
    fast = plan(tokens, tokens).attend(query, key, value)
    assert torch.allclose(fast, attend_plainly(tokens, tokens, query, key, value), atol=1e-12)


def test_a_forward_that_sees_everything_needs_no_mask():
    position = torch.arange(6).unsqueeze(0)
    tokens = AttentionMetadata.bidirectional(position, torch.zeros_like(position))
    assert plan(tokens, tokens) == MaskedPlan(mask=None)
