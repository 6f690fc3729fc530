"""The norm that keeps its input alone, beside torch's."""

import pytest
import torch
from torch import nn

from unmask.models.norm import RMSNorm


def pair(dtype):
    """The two norms with the same weights."""
    ours, torchs = RMSNorm(24, eps=1e-6), nn.RMSNorm(24, eps=1e-6)
    with torch.no_grad():
        weight = torch.randn(24, generator=torch.Generator().manual_seed(0))
        ours.weight.copy_(weight)
        torchs.weight.copy_(weight)
    return ours.to(dtype), torchs.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("needs", ["both", "input", "weight"])
def test_it_gives_torch_s_output_and_gradients_bit_for_bit(dtype, needs):
    found = []
    for norm in pair(dtype):
        x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_(needs != "weight")
        norm.weight.requires_grad_(needs != "input")
        (norm(x) * torch.arange(24)).sum().backward()
        found.append((norm(x).detach(), x.grad, norm.weight.grad))
    for ours, torchs in zip(*found, strict=True):
        assert (ours is None) == (torchs is None)
        assert ours is None or ours.equal(torchs)


def test_it_keeps_its_input_alone():
    ours, _ = pair(torch.float32)
    x = torch.randn(7, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, id):
        ours(x)
    assert sorted(kept) == [24, 7 * 24]


def test_without_gradients_nothing_is_kept():
    ours, torchs = pair(torch.float32)
    x = torch.randn(7, 24)
    with torch.no_grad():
        assert ours(x).grad_fn is None
        assert ours(x).equal(torchs(x))
