"""What a step leaves out, against the plain loss that leaves out nothing: equal, gradients included.

The plain loss runs each document and each view by itself on ``[x_t ; x_0]``, whole, takes logits and their
cross-entropy everywhere, and keeps the masked ones.
"""

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
DOCUMENTS = [random_tokens(16), random_tokens(8, seed=1)]
LENGTH = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def plain_loss(model, rows, noise, block_length):
    """The slow, obvious reference."""
    total, first = torch.zeros((), dtype=torch.float64), 0
    for tokens in DOCUMENTS:
        span = slice(first, first + len(tokens))
        first += len(tokens)
        place = torch.arange(len(tokens))
        for masked, ratio in zip(noise.masked[:, 0, span], noise.ratio[:, 0, span], strict=True):
            noised = np.where(masked, MASK, tokens).tolist()
            two = torch.cat((place, place))[None]
            view = torch.tensor([[1] * len(tokens) + [0] * len(tokens)])
            metadata = AttentionMetadata(two, torch.zeros_like(two), two // block_length, view)
            logits = model.logits(model.hidden(torch.tensor([noised + tokens]), metadata))[0]
            nll = F.cross_entropy(logits[: len(tokens)], torch.tensor(tokens), reduction="none")
            total = total + (nll * torch.from_numpy(masked / ratio)).sum()
    return total


def compare(model, rows, noise, *, block_length):
    """The inputs of a training step, whose loss and gradient must be the plain ones."""
    inputs = layout.two_copy(rows, noise, block_length=block_length, mask_token_id=MASK)
    lean = summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs)
    plain = plain_loss(model, rows, noise, block_length)
    assert lean.item() == pytest.approx(plain.item(), rel=1e-13)
    for ours, theirs in zip(gradients(model, lean), gradients(model, plain), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-11)
    return inputs


def exact(model, inputs, other):
    """Two ways to run the same predictions with the same weights: equal to the last digits."""
    losses = [summed_loss(model.hidden(one.ids, one.metadata), model.logits, one) for one in (inputs, other)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-13)
    for ours, theirs in zip(*(gradients(model, loss) for loss in losses), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def tokens_of(inputs):
    return int((inputs.metadata.document >= 0).sum())


def packed(**config):
    rows = packed_row(*DOCUMENTS, length=LENGTH, prompt=config.pop("prompt", ()))
    block_length = config.pop("block_length", 4)
    return rows, corrupt(rows, NoiseConfig(**config), seed=2, block_length=block_length)


def test_with_one_block_there_is_no_clean_half(model):
    rows, noise = packed(block_length=16)
    inputs = compare(model, rows, noise, block_length=16)
    assert tokens_of(inputs) == LENGTH
    exact(
        model,
        inputs,
        layout.two_copy(rows, noise, block_length=16, mask_token_id=MASK, leave_out_unread=False),
    )
    exact(model, inputs, layout.full_sequence(rows, noise, mask_token_id=MASK))


@pytest.mark.parametrize("views", [2, 4])
def test_complementary_views_share_one_clean_copy(model, views):
    rows, noise = packed(views=views, complementary=True)
    inputs = compare(model, rows, noise, block_length=4)
    assert tokens_of(inputs) == views * LENGTH + LENGTH - 2 * 4
    assert np.array_equal(noise.masked[::2], rows.supervised & ~noise.masked[1::2])


def test_the_last_clean_block_of_each_document_is_left_out(model):
    rows, noise = packed()
    inputs = compare(model, rows, noise, block_length=4)
    assert tokens_of(inputs) == 2 * LENGTH - 2 * 4
    exact(
        model,
        inputs,
        layout.two_copy(rows, noise, block_length=4, mask_token_id=MASK, leave_out_unread=False),
    )


@pytest.mark.parametrize(("prompt", "noisy"), [((0, 0), 24), ((3, 0), 24), ((4, 0), 20), ((9, 5), 12)])
def test_blocks_of_nothing_but_prompt_have_no_noisy_copy(model, prompt, noisy):
    rows, noise = packed(prompt=prompt)
    inputs = compare(model, rows, noise, block_length=4)
    assert int((inputs.metadata.view == 1).sum()) == noisy
    exact(
        model,
        inputs,
        layout.two_copy(rows, noise, block_length=4, mask_token_id=MASK, leave_out_unread=False),
    )


def test_the_output_layer_runs_at_masked_places_alone(model, monkeypatch):
    rows, noise = packed()
    inputs = compare(model, rows, noise, block_length=4)
    seen = []
    whole = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(len(hidden)) or whole(hidden))
    summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs)
    assert sum(seen) == noise.masked.sum() < LENGTH
