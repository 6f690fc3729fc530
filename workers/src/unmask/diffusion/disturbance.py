"""Noise on the embeddings of masked tokens: what keeps a converted model's first steps from exploding.

An autoregressive model never reads the row of the mask token, and weight decay has brought it
near zero. Where most tokens are masked, many places then have nearly the same, nearly empty
input, which the first norm blows up, and gradients explode. LLaDA2.0 (arXiv 2512.15745,
section 7.1) adds independent Gaussian noise to the output of the embedding at masked places
in the first iterations, and leaves the row as it is; neither the noise's size nor how long
it lasts is disclosed.

The noise is drawn on the device from one 64-bit number per token, which follows from the seed
and the token's document (:mod:`unmask.diffusion.noise`); so it is the same on every rank, in
every packing and after a restart. Shape letters: B rows, S tokens, D hidden size, N masked
tokens.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["Disturbance", "normals"]

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed numbers."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What is added to the embeddings of one forward."""

    lots: Tensor
    """int64 (B, S): what each token's noise is drawn from; 0 where nothing is added."""
    std: float

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        return type(self)(self.lots.to(device), self.std)

    def __call__(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) with the noise added; nothing of it has a gradient."""
        lots = self.lots.flatten()
        where = lots.nonzero()[:, 0]
        noise_ND = self.std * normals(lots[where], x_BSD.shape[-1])
        return x_BSD.flatten(0, 1).index_add(0, where, noise_ND.to(x_BSD.dtype)).view_as(x_BSD)


def normals(lots_N: Tensor, count: int) -> Tensor:
    """``count`` standard normal numbers from each of ``lots`` (int64): float32 (N, count).

    Number i of a lot is a function of the lot and i alone: the Box-Muller transform of two outputs of
    SplitMix64, a generator whose state is a counter.
    """
    place = torch.arange(count, device=lots_N.device)
    radius = _uniform(_mixed(lots_N[:, None] + (2 * place + 1) * _GOLDEN))
    angle = _uniform(_mixed(lots_N[:, None] + (2 * place + 2) * _GOLDEN))
    return (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()


def _uniform(numbers: Tensor) -> Tensor:
    """The highest 24 of 64 bits as float32 in [0, 1)."""
    return _right(numbers, 40).float() * 2.0**-24


def _mixed(numbers: Tensor) -> Tensor:
    """The output function of SplitMix64; int64 multiplication keeps the low 64 bits, as it asks for."""
    numbers = (numbers ^ _right(numbers, 30)) * _FIRST
    numbers = (numbers ^ _right(numbers, 27)) * _SECOND
    return numbers ^ _right(numbers, 31)


def _right(numbers: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned numbers."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
