"""Noise on the embeddings of masked tokens: what it is drawn from, where it falls, what it is good for."""

import math

import numpy as np
import pytest
import torch

from support.models import TINY, packed_row, random_tokens, tiny_model
from unmask.attention import CLEAN
from unmask.diffusion import layout
from unmask.diffusion.disturbance import Disturbance, normals
from unmask.diffusion.losses import summed_loss
from unmask.diffusion.noise import NoiseConfig, corrupt

pytestmark = pytest.mark.training

MASK = TINY["mask_token_id"]
LOW = 2**64 - 1


def split_mix(state):
    """SplitMix64 as its authors write it, in whole numbers of any size."""
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & LOW
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & LOW
    return z ^ (z >> 31)


def normal(lot, place):
    """The slow, obvious reference of ``normals``."""
    radius, angle = (
        (split_mix((lot + (2 * place + which) * 0x9E3779B97F4A7C15) & LOW) >> 40) / 2**24 for which in (1, 2)
    )
    return math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)


def corrupted(rows, *, std=0.5, seed=0, **config):
    return corrupt(rows, NoiseConfig(**config), seed=seed, block_length=4, disturbance=std)


def inputs_of(rows, noise):
    return layout.two_copy(rows, noise, block_length=4, mask_token_id=MASK)


def test_each_number_is_that_of_the_reference():
    lots = [1, 2**63 - 1, -1, -(2**63), 123456789]
    expected = [[normal(lot & LOW, place) for place in range(7)] for lot in lots]
    assert torch.allclose(normals(torch.tensor(lots), 7).double(), torch.tensor(expected).double(), atol=1e-5)


def test_the_numbers_are_standard_normal_and_independent():
    drawn = normals(torch.arange(1, 4001), 64).double()
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01
    assert abs(drawn.pow(4).mean() - 3) < 0.1
    correlation = torch.corrcoef(drawn.T) - torch.eye(64)
    assert correlation.abs().max() < 0.1
    assert torch.corrcoef(torch.stack((drawn[:-1].flatten(), drawn[1:].flatten())))[0, 1].abs() < 0.01


def test_masked_places_alone_are_disturbed_and_each_by_itself():
    rows = packed_row(random_tokens(16), length=16, prompt=[6])
    noise = corrupted(rows, views=2, complementary=True)
    inputs = inputs_of(rows, noise)
    nothing = torch.zeros((*inputs.ids.shape, 8), dtype=torch.float64)
    added = inputs.disturbance(nothing)
    disturbed = added.abs().amax(-1) > 0
    assert torch.equal(disturbed, (inputs.ids == MASK) & (inputs.metadata.view != CLEAN))
    assert len(added[disturbed].unique(dim=0)) == disturbed.sum() == noise.masked.sum()


def test_the_noise_of_a_document_is_the_same_wherever_it_is_packed():
    tokens = random_tokens(8)
    alone = corrupted(packed_row(tokens, length=8, first_ordinal=5), low=0.9)
    packed = corrupted(packed_row(random_tokens(12), tokens, length=24, first_ordinal=4), low=0.9)
    assert np.array_equal(alone.lots[:, :, :8], packed.lots[:, :, 12:20])
    other = corrupted(packed_row(tokens, length=8, first_ordinal=6), low=0.9)
    assert not np.array_equal(alone.lots, other.lots)


def test_without_noise_nothing_is_added_and_masks_are_the_same():
    rows = packed_row(random_tokens(16), length=16)
    plain, disturbed = corrupted(rows, std=0.0), corrupted(rows)
    assert plain.lots is None
    assert inputs_of(rows, plain).disturbance is None
    assert np.array_equal(plain.masked, disturbed.masked)


def test_embeddings_in_bfloat16_stay_bfloat16():
    x = torch.zeros((1, 2, 4), dtype=torch.bfloat16)
    assert Disturbance(torch.tensor([[0, 3]]), 1.0)(x).dtype == torch.bfloat16


def gradient_norm(std, *, mask_row):
    """Of a model whose row of the mask token is scaled by ``mask_row``, where nearly all is masked."""
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.embedding.weight[MASK] *= mask_row
    rows = packed_row(random_tokens(32), length=32)
    inputs = inputs_of(rows, corrupted(rows, std=std, low=0.98, high=1.0, weight="flat"))
    hidden = model.hidden(inputs.ids, inputs.metadata, disturb=inputs.disturbance)
    (summed_loss(hidden, model.logits, inputs, confidence_weight=0.0) / inputs.normaliser).backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def test_a_mask_row_near_zero_makes_gradients_explode_unless_its_embeddings_are_disturbed(record_measurement):
    usual = gradient_norm(0.0, mask_row=1.0)
    without = gradient_norm(0.0, mask_row=1e-5)
    disturbed = gradient_norm(TINY["initializer_range"], mask_row=1e-5)
    record_measurement("gradient norm", f"{usual:.3g}")
    record_measurement("gradient norm, mask row x 1e-5", f"{without:.3g}")
    record_measurement("gradient norm, mask row x 1e-5, disturbed", f"{disturbed:.3g}")
    assert without > 20 * usual
    assert disturbed < 3 * usual
