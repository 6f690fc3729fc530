"""What must hold exactly of the block-diffusion forward, its loss and its gradients, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.models import TINY, packed_row, random_tokens, tiny_model
from unmask.attention import AttentionMetadata
from unmask.diffusion import layout
from unmask.diffusion.losses import summed_loss, token_nll
from unmask.diffusion.noise import Corruption, NoiseConfig, corrupt
from unmask.models.loading import build
from unmask.models.registry import parse_config

pytestmark = pytest.mark.training

MASK = TINY["mask_token_id"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def corrupted(rows, *, views=1, block_length=4, seed=0, **config):
    return corrupt(rows, NoiseConfig(views=views, **config), seed=seed, block_length=block_length)


def logits_of(model, inputs):
    return model.logits(model.hidden(inputs.ids, inputs.metadata))[0]


def find(inputs, *, document, view):
    """Where a document's copy stands in the model's row, in the order of its positions."""
    meta = inputs.metadata
    return ((meta.document[0] == document) & (meta.view[0] == view)).nonzero()[:, 0]


def single_row(model, ids, *, block_length):
    inputs = torch.tensor([ids])
    return model.logits(
        model.hidden(inputs, AttentionMetadata.single_row(len(ids), block_length=block_length))
    )[0]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def largest_difference(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("block_length", [1, 2, 4, 8, 16])
def test_the_noisy_half_equals_each_block_on_its_clean_prefix(model, block_length):
    tokens = random_tokens(16)
    rows = packed_row(tokens, length=16)
    noise = corrupted(rows, block_length=block_length)
    inputs = layout.two_copy(rows, noise, block_length=block_length, mask_token_id=MASK)
    noisy = logits_of(model, inputs)[:16]
    noised = np.where(noise.masked[0, 0], MASK, tokens).tolist()
    for start in range(0, 16, block_length):
        prefix = tokens[:start] + noised[start : start + block_length]
        alone = single_row(model, prefix, block_length=block_length)[start:]
        assert torch.allclose(noisy[start : start + block_length], alone, atol=1e-10)


def test_the_noisy_half_equals_a_cached_forward_on_the_clean_prefix(model):
    tokens = random_tokens(16)
    rows = packed_row(tokens, length=16)
    noise = corrupted(rows)
    noisy = logits_of(model, layout.two_copy(rows, noise, block_length=4, mask_token_id=MASK))[:16]
    noised = np.where(noise.masked[0, 0], MASK, tokens)
    cache = model.new_cache(rows=1, capacity=16, block_length=4)
    for start in range(0, 16, 4):
        block = slice(start, start + 4)
        metadata = AttentionMetadata.single_row(4, block_length=4, start=start)
        with torch.no_grad():
            got = model.hidden(torch.from_numpy(noised[None, block]), metadata, cache=cache.select(0, 1))
            assert torch.allclose(model.logits(got)[0], noisy[block], atol=1e-10)
            model.hidden(torch.tensor([tokens[block]]), metadata, cache=cache.select(0, 1))
        cache.commit(0, 4)


def test_the_clean_half_at_block_one_is_the_causal_network(model):
    tokens = random_tokens(12)
    rows = packed_row(tokens, length=12)
    inputs = layout.two_copy(
        rows, corrupted(rows, block_length=1), block_length=1, mask_token_id=MASK, leave_out_unread=False
    )
    clean = logits_of(model, inputs)[12:]
    assert torch.allclose(clean, single_row(model, tokens, block_length=1), atol=1e-10)
    shifted = token_nll(
        model.hidden(inputs.ids, inputs.metadata)[0, 12:-1], model.logits, torch.tensor(tokens[1:])
    )
    causal = layout.causal(rows)
    loss = summed_loss(model.hidden(causal.ids, causal.metadata), model.logits, causal)
    assert shifted.sum().item() == pytest.approx(loss.item(), rel=1e-12)


def test_one_block_of_the_whole_sequence_is_the_full_sequence_objective(model):
    rows = packed_row(random_tokens(16), length=16)
    noise = corrupted(rows, block_length=16)
    blocks = layout.two_copy(rows, noise, block_length=16, mask_token_id=MASK)
    full = layout.full_sequence(rows, noise, mask_token_id=MASK)
    assert blocks.ids.shape == full.ids.shape, "the clean half is read by nobody"
    assert torch.allclose(logits_of(model, blocks), logits_of(model, full), atol=1e-10)
    assert torch.equal(blocks.weights, full.weights)


@pytest.mark.parametrize("changed_block", [0, 1, 2, 3])
def test_a_clean_block_never_reaches_noisy_blocks_that_are_not_later(model, changed_block):
    tokens = random_tokens(16)
    noise = corrupted(packed_row(tokens, length=16))
    noise.masked[:] = True  # so that the change reaches the noisy half through the clean one alone
    other = list(tokens)
    other[changed_block * 4] = (other[changed_block * 4] + 1) % 60

    def noisy(ids):
        rows = packed_row(ids, length=16)
        return logits_of(model, layout.two_copy(rows, noise, block_length=4, mask_token_id=MASK))[:16]

    difference = (noisy(tokens) - noisy(other)).abs().amax(-1)
    # Other experts get other tokens, and sums of another length round otherwise in the last bit.
    assert difference[: (changed_block + 1) * 4].max() < 1e-13
    if changed_block < 3:
        assert difference[(changed_block + 1) * 4 :].min() > 1e-6


def test_views_that_share_a_clean_copy_equal_separate_passes(model):
    rows = packed_row(random_tokens(12), random_tokens(4, seed=1), length=16)
    noise = corrupted(rows, views=3)

    def loss(chosen):
        part = Corruption(noise.masked[chosen], noise.ratio[chosen])
        inputs = layout.two_copy(rows, part, block_length=4, mask_token_id=MASK)
        return summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs)

    together, apart = loss(slice(0, 3)), sum(loss(slice(view, view + 1)) for view in range(3))
    assert together.item() == pytest.approx(apart.item(), rel=1e-12)
    assert largest_difference(gradients(model, together), gradients(model, apart)) < 1e-10


@pytest.mark.parametrize("prompt", [0, 3, 5, 8])
def test_leaving_out_what_nobody_reads_changes_nothing(model, prompt):
    rows = packed_row(random_tokens(13), random_tokens(10, seed=1), length=24, prompt=(prompt, 2))
    noise = corrupted(rows, views=2)

    def run(leave_out):
        inputs = layout.two_copy(rows, noise, block_length=4, mask_token_id=MASK, leave_out_unread=leave_out)
        hidden = model.hidden(inputs.ids, inputs.metadata)
        loss = summed_loss(hidden, model.logits, inputs)
        return inputs, hidden.flatten(0, 1)[inputs.predict], gradients(model, loss)

    lean, lean_hidden, lean_gradients = run(True)
    whole, whole_hidden, whole_gradients = run(False)
    assert lean.ids.shape[1] < whole.ids.shape[1]
    assert torch.equal(lean.targets, whole.targets)
    assert torch.equal(lean.weights, whole.weights)
    assert torch.allclose(lean_hidden, whole_hidden, atol=1e-12)
    assert largest_difference(lean_gradients, whole_gradients) < 1e-10


@pytest.mark.parametrize("objective", ["causal", "full sequence", "two copies"])
def test_packed_documents_are_what_each_is_alone(model, objective):
    documents = [random_tokens(n, seed=n) for n in (8, 4, 12)]

    def inputs_of(rows):
        if objective == "causal":
            return layout.causal(rows)
        noise = corrupted(rows)
        if objective == "full sequence":
            return layout.full_sequence(rows, noise, mask_token_id=MASK)
        return layout.two_copy(rows, noise, block_length=4, mask_token_id=MASK)

    packed = inputs_of(packed_row(*documents, length=28))
    packed_logits = logits_of(model, packed)
    for number, document in enumerate(documents):
        alone = inputs_of(packed_row(document, length=len(document), first_ordinal=number))
        alone_logits = logits_of(model, alone)
        for view in (0, 1):
            ours = packed_logits[find(packed, document=number, view=view)]
            assert torch.allclose(ours, alone_logits[find(alone, document=0, view=view)], atol=1e-10)


def test_the_bound_at_block_one_is_the_likelihood_in_expectation(model):
    """Drawing masks with probability t and weighing by 1/t gives each token its full loss on average."""
    tokens = random_tokens(16)
    draws = 1500
    sums, certain = np.zeros(draws), 0.0
    rows = packed_row(tokens, length=16)
    masked_all = Corruption(np.ones((1, 1, 16), np.bool_), np.ones((1, 1, 16), np.float32))
    inputs = layout.two_copy(rows, masked_all, block_length=1, mask_token_id=MASK)
    with torch.no_grad():
        nll = token_nll(model.hidden(inputs.ids, inputs.metadata)[0, :16], model.logits, inputs.targets)
        certain = float(nll.sum())
        for draw in range(draws):
            drawn_rows = packed_row(tokens, length=16, first_ordinal=draw)
            noise = corrupted(drawn_rows, block_length=1)
            # At block size 1 a token's prediction does not depend on which others are masked.
            sums[draw] = float((nll.numpy() * noise.masked[0, 0] / noise.ratio[0, 0]).sum())
    deviation = sums.std() / np.sqrt(draws)
    assert abs(sums.mean() - certain) < 3 * deviation
    assert deviation < certain / 20


@settings(max_examples=15, deadline=None)
@given(split=st.integers(1, 3), flat=st.booleans())
def test_the_loss_does_not_depend_on_how_rows_are_split_into_micro_batches(split, flat):
    model = tiny_model(seed=3)
    rows = [packed_row(random_tokens(4 + 4 * n, seed=n), length=16, first_ordinal=n) for n in range(4)]
    weight = "flat" if flat else "elbo"

    def run(groups):
        total, normaliser = torch.zeros(()), 0.0
        for group in groups:
            batch = layout.PackedRows(
                **{
                    name: np.concatenate([getattr(row, name) for row in group])
                    for name in layout.PackedRows.__slots__
                    if getattr(group[0], name) is not None
                }
            )
            noise = corrupted(batch, weight=weight)
            inputs = layout.two_copy(batch, noise, block_length=4, mask_token_id=MASK, flat=flat)
            total = total + summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs)
            normaliser += inputs.normaliser
        return total / normaliser

    whole, parts = run([rows]), run([rows[:split], rows[split:]])
    assert whole.item() == pytest.approx(parts.item(), abs=1e-6)
    assert largest_difference(gradients(model, whole), gradients(model, parts)) < 1e-6


def test_packed_documents_do_not_see_each_other(model):
    first, second = random_tokens(8), random_tokens(8, seed=1)
    changed = [(token + 1) % 60 for token in first]

    def second_logits(other):
        rows = packed_row(other, second, length=16)
        inputs = layout.two_copy(rows, corrupted(rows), block_length=4, mask_token_id=MASK)
        return logits_of(model, inputs)[find(inputs, document=1, view=1)]

    assert torch.allclose(second_logits(first), second_logits(changed), atol=1e-12)


def test_a_row_of_padding_trains_nothing_and_stays_finite():
    model = build(parse_config(TINY))
    rows = packed_row(length=8)
    inputs = layout.two_copy(rows, corrupted(rows), block_length=4, mask_token_id=MASK)
    loss = summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs)
    assert loss.item() == 0.0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model, loss))
