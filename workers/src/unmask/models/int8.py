"""Weights and activations of eight bits on a CPU (W8A8): products of whole numbers, which are exact.

A weight is rounded to whole multiples of a scale of its output channel, an activation to those of a scale of
its token, and what is added up are products of these numbers. That is symmetric vector-wise quantisation
(LLM.int8, arXiv 2208.07339, section 2.1) of everything, outliers included. The sums are exact in int32. So a
token's result depends on its own numbers alone: not on who else is in the batch, nor on the order of adding.

The products are FBGEMM's, which torch has on x86. Weights and activations have all eight bits, plus or minus
127; the latter are held as 1 to 255. But without VNNI FBGEMM adds two products in sixteen bits before it
widens them, and cuts off in silence what does not fit: there weights are kept within plus or minus 63, for
2 x 255 x 63 fits. Which of the two it is, a processor is asked with the largest sums (:func:`weight_levels`).

Two others were tried (torch 2.15, one thread of a busy machine). On an AMD EPYC with AVX2 and no VNNI
(2026-11-27) torch's ``_int_mm`` is a plain loop, 19 times slower than float32 for 32 rows by 1,024 x 1,024;
``onednn::qlinear_pointwise``, as fast as FBGEMM from 32 rows on, takes twice as long for the products of an
expert with four. On one with AVX-512 and VNNI (2026-11-28) a layer of 64 experts took 9.8 ms with the latter
in the place of 7.3 for 32 tokens, and 34 of 36 for 512. torch means to give up one day the kind of tensors
that FBGEMM's weights are made from; what is used of them is in :func:`_pack` alone.

Embedding, norms, router, rotation and attention stay float32. On a GPU weights alone are of eight bits
(:mod:`unmask.models.weight_only_int8`), and all else keeps the model's own format. Shape letters: N rows, I
and O the inner and outer width of a product; T, D, E, K as in :mod:`unmask.models.moe`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.attention import kernels
from unmask.errors import UsageError
from unmask.models.base import LanguageModel
from unmask.models.moe import Experts, Routing, sorted_by_expert
from unmask.models.products import (
    Arrangement,
    ExpertsProduct,
    LinearProduct,
    Product,
    Weight,
    rearrange,
)
from unmask.models.weight_only_int8 import WEIGHT_ONLY, quantised_channels

__all__ = [
    "TOKEN_LEVELS",
    "Int8Experts",
    "Int8Linear",
    "check_int8",
    "holds_largest_sums",
    "int8_on",
    "quantise",
    "scaled_tokens",
    "weight_levels",
]

TOKEN_LEVELS = 127
"""The largest number that stands for an activation."""
_ZERO_POINT = 128
"""FBGEMM's activations are unsigned."""
_WIDE, _NARROW = 127, 63
"""The largest number that stands for a weight: of all eight bits, and where sums have sixteen."""
_ENGINE = "fbgemm"
_ROWS_AT_ONCE = 512
"""Of experts; with 1,024 numbers a row, 2 MiB of float32."""


def check_int8(device: str | torch.device) -> None:
    """See to it that ``device`` can compute with int8 weights.

    Raises:
        UsageError: It cannot.
    """
    device = torch.device(device)
    if kernels.run_on(device):
        return
    if device.type == "cuda":
        raise UsageError(
            "quantization int8: on a GPU it takes Triton, which this Python does not have; install torch as "
            "PyPI has it, or leave the weights alone"
        )
    if device.type != "cpu":
        raise UsageError(
            f"quantization int8: got device {device}, only CPUs and CUDA devices have it; take one of these, "
            "or leave the weights alone"
        )
    if _ENGINE not in torch.backends.quantized.supported_engines:
        raise UsageError(
            "quantization int8: this torch comes without FBGEMM, as it does on other processors than x86; "
            "leave the weights alone"
        )


def scaled_tokens(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their scale, not yet rounded, (N, I), and the scales, (N, 1); both float32.

    What is not finite makes the scale, and so the row's products, infinite or NaN.
    """
    # Several times as fast as an infinite norm is.
    largest_N1 = torch.maximum(x_NI.amax(1, keepdim=True), x_NI.amin(1, keepdim=True).neg_())
    scale_N1 = (largest_N1 / TOKEN_LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return x_NI / scale_N1, scale_N1


@cache
def weight_levels() -> int:
    """The largest number that stands for a weight on this processor: 127, or 63 where sums would not fit."""
    return _WIDE if holds_largest_sums(_WIDE, _product_of_largest) else _NARROW


def holds_largest_sums(levels: int, product: Callable[[int, Tensor], Tensor]) -> bool:
    """Whether products of weights of ``levels`` by the largest activations come out as they are.

    Args:
        levels: Of all weights.
        product: Of such weights and of rows of activations, whole numbers (N, I); gives (N, O).
    """
    ends_NI = torch.tensor([TOKEN_LEVELS, -TOKEN_LEVELS]).unsqueeze(1).expand(2, 64).float()
    return bool((product(levels, ends_NI) == 64 * levels * ends_NI[:, :1]).all())


def _product_of_largest(levels: int, rows_NI: Tensor) -> Tensor:
    weight_OI = torch.full((32, rows_NI.shape[1]), levels, dtype=torch.int8)
    return _product(rows_NI, _pack(weight_OI, torch.ones(32)))


class _Matrix(Weight):
    """One weight (O, I), quantised row by row as it comes in, and packed when it is complete."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__(outer, inner)
        self._levels_OI: Tensor | None = None
        self._scale_O = torch.empty(0)
        self._packed: Any = None

    def _take(self, rows: slice, weight: Tensor) -> None:
        if self._levels_OI is None:
            self._levels_OI = torch.empty(self.shape, dtype=torch.int8)
            self._scale_O = torch.empty(self.shape[0])
        self._levels_OI[rows], self._scale_O[rows] = quantised_channels(weight, levels=weight_levels())

    def _arrange(self) -> None:
        assert self._levels_OI is not None
        self._packed, self._levels_OI = _pack(self._levels_OI, self._scale_O), None

    def _forget(self) -> None:
        self._levels_OI = self._packed = None

    def times(self, scaled_NI: Tensor) -> Tensor:
        """Whole-number products of the rows, times the channels' scales: float32 (N, O).

        Args:
            scaled_NI: Of :func:`scaled_tokens`; rounded here, half to even.
        """
        assert self._packed is not None, "a weight that was never given"
        return _product(scaled_NI, self._packed)


def _product(scaled_NI: Tensor, packed: Any) -> Tensor:
    product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        scaled_NI, 1.0, _ZERO_POINT, packed
    )
    return product


def _pack(levels_OI: Tensor, scale_O: Tensor) -> Any:
    zero_O = torch.zeros(len(scale_O), dtype=torch.int64)
    with _fbgemm():
        weight = torch._make_per_channel_quantized_tensor(levels_OI, scale_O.double(), zero_O, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Pack for FBGEMM, whatever torch would choose on this machine, and let it warn of its future unheard."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = _ENGINE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before


class Int8Linear(LinearProduct[_Matrix]):
    """What takes the place of ``nn.Linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Without a weight; see :meth:`put`."""
        super().__init__(_Matrix(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to float32 (..., O)."""
        scaled_NI, scale_N1 = scaled_tokens(x.flatten(0, -2))
        return self._weight.times(scaled_NI).mul_(scale_N1).view(*x.shape[:-1], self._weight.shape[0])


class Int8Experts(ExpertsProduct[_Matrix]):
    """What takes the place of :class:`~unmask.models.moe.Experts`."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        """Without weights; see :meth:`put`."""
        super().__init__(
            gate_up=[_Matrix(2 * intermediate_size, hidden_size) for _ in range(num_experts)],
            down=[_Matrix(hidden_size, intermediate_size) for _ in range(num_experts)],
        )
        self.widths = hidden_size, intermediate_size

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts, (T, D)."""
        token_N, weights_N, counts_E = sorted_by_expert(routing, len(self._gate_up))
        counts = counts_E.tolist()
        scaled_TD, scale_T1 = scaled_tokens(hidden_TD)
        total_TD = torch.zeros_like(hidden_TD)
        start = 0
        for part in _in_parts(counts):
            end = start + sum(counts[part])
            token_P, weights_P = token_N[start:end], weights_N[start:end]
            gate_up_PO = _grouped(self._gate_up[part], scaled_TD.index_select(0, token_P), counts[part])
            gate_PI, up_PI = gate_up_PO.mul_(scale_T1.index_select(0, token_P)).chunk(2, dim=-1)
            scaled_PI, scale_P1 = scaled_tokens(F.silu(gate_PI).mul_(up_PI))
            out_PD = _grouped(self._down[part], scaled_PI, counts[part])
            total_TD.index_add_(0, token_P, out_PD.mul_(scale_P1 * weights_P.unsqueeze(1)))
            start = end
        return total_TD


def _in_parts(counts: list[int]) -> Iterator[slice]:
    """Experts next to each other, of so few rows that what they make of them stays in the processor's cache.

    Every part has rows; of none at all, there are no parts.
    """
    first = rows = 0
    for expert, count in enumerate(counts):
        if rows and count and rows + count > _ROWS_AT_ONCE:
            yield slice(first, expert)
            first, rows = expert, 0
        rows += count
    if rows:
        yield slice(first, len(counts))


def _grouped(matrices: list[_Matrix], scaled_NI: Tensor, counts: list[int]) -> Tensor:
    """The first ``counts[0]`` rows by matrix 0, the next ``counts[1]`` by matrix 1, ...: (N, O)."""
    parts = scaled_NI.split(counts)
    return torch.cat([matrix.times(part) for matrix, part in zip(matrices, parts, strict=True) if len(part)])


def _linear(replaced: nn.Linear | nn.Embedding) -> Product:
    outer, inner = replaced.weight.shape
    return Int8Linear(inner, outer)


def _experts(replaced: Experts) -> Product:
    return Int8Experts(*replaced.down_proj.shape)


_ON_A_CPU = Arrangement(_linear, _experts, tied_output=True)


def int8_on(device: str | torch.device) -> Arrangement:
    """How weights of eight bits are arranged for ``device``."""
    return WEIGHT_ONLY if kernels.run_on(torch.device(device)) else _ON_A_CPU


def quantise(model: LanguageModel) -> LanguageModel:
    """The same model with int8 weights, made in place; float weights are let go one after the other."""
    check_int8(model.device)
    return rearrange(model, int8_on(model.device))
