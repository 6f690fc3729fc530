"""Cross-entropy in chunks."""

import pytest
import torch
import torch.nn.functional as F

from support.models import TINY, packed_row, random_tokens, tiny_model
from unmask.diffusion import layout
from unmask.diffusion.losses import summed_loss, token_nll
from unmask.diffusion.noise import NoiseConfig, corrupt


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
