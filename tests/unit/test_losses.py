"""Cross-entropy in chunks."""

import pytest
import torch
import torch.nn.functional as F

from support.models import TINY, packed_row, random_tokens, tiny_model
from unmask.diffusion import layout
from unmask.diffusion.losses import confident_nll, summed_loss, token_nll
from unmask.diffusion.noise import NoiseConfig, corrupt

pytestmark = pytest.mark.training


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_losses_nor_gradients(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,))
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    chunked = token_nll(hidden, lambda h: h @ head.T, targets, chunk=chunk)
    assert torch.allclose(chunked, plain, atol=1e-12)
    weights = torch.rand(7, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad((chunked * weights).sum(), (hidden, head)),
        torch.autograd.grad((plain * weights).sum(), (hidden, head)),
        strict=True,
    )
    for got, expected in pairs:
        assert torch.allclose(got, expected, atol=1e-12)


def plain_confident_loss(logits, targets, weight):
    """CAP written out: cross-entropy, plus the weighted entropy where the argmax is the target."""
    total = F.cross_entropy(logits, targets, reduction="none")
    p = torch.softmax(logits, -1)
    for place in range(len(targets)):
        if int(logits[place].argmax()) == int(targets[place]):
            entropy = -(p[place] * p[place].log()).sum()
            total = total + weight * F.one_hot(torch.tensor(place), len(targets)) * entropy
    return total


@pytest.mark.parametrize("chunk", [2, 100])
def test_confidence_adds_the_entropy_of_what_is_right(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(4, 5, dtype=torch.float64)
    targets = torch.randint(4, (9,))
    right = (hidden @ head.T).argmax(-1) == targets
    assert 0 < right.sum() < 9
    got = confident_nll(hidden, lambda h: h @ head.T, targets, confidence_weight=0.7, chunk=chunk)
    expected = plain_confident_loss(hidden @ head.T, targets, 0.7)
    assert torch.allclose(got, expected, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss.sum(), hidden)[0] for loss in (got, expected))
    assert torch.allclose(ours, theirs, atol=1e-12)
    plain = token_nll(hidden, lambda h: h @ head.T, targets)
    unchanged = torch.autograd.grad(plain.sum(), hidden)[0]
    assert torch.allclose(ours[~right], unchanged[~right], atol=1e-12), (
        "wrong positions learn nothing from it"
    )
    assert (ours[right] - unchanged[right]).abs().sum(-1).min() > 0


def test_confidence_is_nothing_where_all_is_wrong():
    hidden = torch.eye(3)
    wrong = torch.tensor([1, 2, 0])
    got = confident_nll(hidden, lambda h: h, wrong, confidence_weight=5.0)
    assert torch.allclose(got, token_nll(hidden, lambda h: h, wrong))


def test_the_output_layer_never_sees_more_than_a_chunk():
    seen = []

    def logits(hidden):
        seen.append(len(hidden))
        return hidden @ torch.ones(4, 9)

    token_nll(torch.randn(10, 4), logits, torch.zeros(10, dtype=torch.int64), chunk=4)
    assert max(seen) == 4


@pytest.mark.parametrize("flat", [True, False])
def test_the_loss_is_the_weighted_sum_over_masked_tokens(flat):
    model = tiny_model()
    rows = packed_row(random_tokens(12), length=12, prompt=(4,))
    noise = corrupt(rows, NoiseConfig(), seed=0, block_length=4)
    inputs = layout.two_copy(rows, noise, block_length=4, mask_token_id=TINY["mask_token_id"], flat=flat)
    hidden = model.hidden(inputs.ids, inputs.metadata)
    got = summed_loss(hidden, model.logits, inputs).item()

    # Written out: prompt block 0 has no noisy copy, so the noisy half holds positions 4 to 11.
    logp = torch.log_softmax(model.logits(hidden[0, :8]), -1)
    masked, ratio = noise.masked[0, 0, 4:], noise.ratio[0, 0, 4:]
    terms = [
        -logp[place, rows.ids[0, 4 + place]].item() / (1.0 if flat else float(ratio[place]))
        for place in range(8)
        if masked[place]
    ]
    assert got == pytest.approx(sum(terms), rel=1e-6)
    assert inputs.normaliser == (len(terms) if flat else 8)


def test_next_token_targets_stop_at_documents_and_prompts():
    rows = packed_row([1, 2, 3], [4, 5, 6, 7], length=9, prompt=(0, 2))
    inputs = layout.causal(rows)
    assert inputs.predict.tolist() == [0, 1, 4, 5]
    assert inputs.targets.tolist() == [2, 3, 6, 7]
    assert inputs.normaliser == 4
