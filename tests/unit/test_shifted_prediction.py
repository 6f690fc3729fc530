"""Shifted prediction: each token from the place before it, against plain forwards one token at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support.models import TINY, packed_row, random_tokens, tiny_model
from unmask.attention import AttentionMetadata
from unmask.diffusion import layout
from unmask.diffusion.losses import summed_loss
from unmask.diffusion.noise import NoiseConfig, corrupt

pytestmark = pytest.mark.training

MASK = TINY["mask_token_id"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def rows_of(*documents, length, prompt=()):
    """Rows whose documents' first tokens are given."""
    rows = packed_row(*documents, length=length, prompt=prompt)
    return replace(rows, supervised=rows.supervised & (rows.position > 0))


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def loss_of(model, inputs):
    return summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs)


def single(model, ids, block_length):
    """Logits of ``ids`` in a forward of their own, each place seeing its block and the earlier ones."""
    metadata = AttentionMetadata.single_row(len(ids), block_length=block_length)
    return model.logits(model.hidden(torch.tensor([ids]), metadata))[0]


def slow_loss(model, tokens, noise, *, block_length, column=0):
    """One forward for every masked token, up to what stands at the place before it."""
    total = torch.zeros((), dtype=torch.float64)
    for view in range(len(noise.masked)):
        span = slice(column, column + len(tokens))
        masked, ratio = noise.masked[view, 0, span], noise.ratio[view, 0, span]
        noised = np.where(masked, MASK, tokens).tolist()
        for place in np.flatnonzero(masked):
            start = place // block_length * block_length
            if start == place:  # the block before is known, and the place stands at its end
                logits = single(model, tokens[:place], block_length)[-1]
            else:
                seen = tokens[:start] + noised[start : start + block_length]
                logits = single(model, seen, block_length)[place - 1]
            nll = F.cross_entropy(logits[None], torch.tensor([tokens[place]]))
            total = total + nll / float(ratio[place])
    return total


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("block_length", [1, 2, 4, 16])
def test_the_loss_and_gradient_are_those_of_a_forward_for_each_token(model, block_length, views):
    first, second = random_tokens(16), random_tokens(8, seed=1)
    rows = rows_of(first, second, length=32, prompt=[3, 0])
    noise = corrupt(rows, NoiseConfig(views=views), seed=0, block_length=block_length)
    inputs = layout.two_copy(rows, noise, block_length=block_length, mask_token_id=MASK, shifted=True)
    fast = loss_of(model, inputs)
    slow = slow_loss(model, first, noise, block_length=block_length)
    slow = slow + slow_loss(model, second, noise, block_length=block_length, column=16)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-6)  # weights are float32
    for one, other in zip(gradients(model, fast), gradients(model, slow), strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max() + 1))


def test_in_blocks_of_one_with_everything_masked_it_is_the_autoregressive_loss(model):
    rows = rows_of(random_tokens(12), length=12)
    noise = corrupt(rows, NoiseConfig(low=0.99, weight="flat"), seed=0, block_length=1)
    noise = replace(noise, masked=rows.supervised[None])
    shifted = layout.two_copy(rows, noise, block_length=1, mask_token_id=MASK, flat=True, shifted=True)
    causal = layout.causal(rows)
    assert shifted.normaliser == causal.normaliser
    ours, theirs = loss_of(model, shifted), loss_of(model, causal)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-13)
    for one, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_one_block_of_the_whole_text_is_the_shifted_full_sequence_objective(model):
    rows = rows_of(random_tokens(16), length=16)
    noise = corrupt(rows, NoiseConfig(views=2), seed=0, block_length=16)
    blocks = layout.two_copy(rows, noise, block_length=16, mask_token_id=MASK, shifted=True)
    full = layout.full_sequence(rows, noise, mask_token_id=MASK, shifted=True)
    assert torch.equal(blocks.ids, full.ids)
    assert torch.equal(blocks.predict, full.predict)
    assert loss_of(model, blocks).item() == pytest.approx(loss_of(model, full).item(), rel=1e-13)


def test_what_is_predicted_is_never_seen(model):
    """Another token at a masked place changes no prediction of it, only what it is compared with."""
    tokens = random_tokens(16)
    rows = rows_of(tokens, length=16)
    noise = corrupt(rows, NoiseConfig(low=0.4, high=0.6), seed=0, block_length=4)
    place = int(np.flatnonzero(noise.masked[0, 0])[-1])

    def logits(ids):
        inputs = layout.two_copy(
            rows_of(ids, length=16), noise, block_length=4, mask_token_id=MASK, shifted=True
        )
        hidden = model.hidden(inputs.ids, inputs.metadata).flatten(0, 1)[inputs.predict]
        return model.logits(hidden)[inputs.targets == ids[place]]

    marked = tokens.copy()
    other = tokens.copy()
    marked[place], other[place] = 60, 61
    assert logits(marked).shape[0] == 1
    assert torch.allclose(logits(marked), logits(other), atol=1e-12)
