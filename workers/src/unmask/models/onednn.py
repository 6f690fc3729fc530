"""Weights of float32 in oneDNN's own layout, for forwards on a CPU without gradients.

MKL's product lays the weight out anew at every call, in pieces that its kernels like. Where an expert has
four rows, that is a third to more than half of the time, by the shape of the weight. oneDNN can be given one
that was laid out once. With one thread of an AMD EPYC (AVX-512, busy with other things; torch 2.15.0,
2026-11-28), a product by 512 x 1,024 numbers that come from memory takes 132 us in the place of 207 for 4
rows, 394 for 574 of 32, and 1,290 for 1,658 of 128.

A row of a product is the same to the bit whatever the number of rows and its place among them, but for a
product of a single row: so with whole tiles (:mod:`unmask.models.row_tiles`) it is the same always.
``tests/unit/test_row_tiles.py`` says whether that holds on another machine.

The two operations used are those that torch's own compiler makes of a linear layer whose weight does not
change. Shape letters: N rows, I and O the inner and outer width of a product; T, D, E as in
:mod:`unmask.models.moe`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from unmask.models.row_tiles import tiled

__all__ = ["REORDERED", "ReorderedExperts", "ReorderedLinear", "can_reorder", "reorder"]

_ROWS = 512
"""Rows to lay a weight out for; more or fewer were as fast."""


def can_reorder(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of that number format on that device can be laid out so."""
    return (
        torch.device(device).type == "cpu" and dtype is torch.float32 and torch.backends.mkldnn.is_available()
    )


class _Weight(Weight):
    """One weight (O, I), laid out when all its rows are there.

    Until then they are kept in memory that ``spare`` has for weights of the same shape, and goes back to it:
    what is let go between weights that stay, is lost there.
    """

    def __init__(self, outer: int, inner: int, spare: list[Tensor]) -> None:
        super().__init__(outer, inner)
        self._spare = spare
        self._rows_OI: Tensor | None = None
        self._reordered: Tensor | None = None

    def _take(self, rows: slice, weight: Tensor) -> None:
        if len(weight) == self.shape[0]:
            self._reordered = _laid_out(weight)
            return
        if self._rows_OI is None:
            self._rows_OI = self._spare.pop() if self._spare else torch.empty(self.shape)
        self._rows_OI[rows] = weight

    def _arrange(self) -> None:
        if self._rows_OI is not None:
            self._reordered = _laid_out(self._rows_OI)
            self._spare.append(self._rows_OI)
            self._rows_OI = None

    def _forget(self) -> None:
        self._rows_OI = self._reordered = None

    def times(self, x_NI: Tensor) -> Tensor:
        """(N, I) by the weight: (N, O)."""
        assert self._reordered is not None, "a weight that was never given"
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._reordered, None, "none", [], "")
        return product


def _laid_out(weight_OI: Tensor) -> Tensor:
    whole = weight_OI.detach().to(torch.float32).contiguous()
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(whole, _ROWS)
    return reordered


class ReorderedLinear(LinearProduct[_Weight]):
    """What takes the place of ``nn.Linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Without a weight; see :meth:`put`."""
        super().__init__(_Weight(out_features, in_features, spare=[]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return self._weight.times(x.flatten(0, -2)).view(*x.shape[:-1], self._weight.shape[0])


class ReorderedExperts(ExpertsProduct[_Weight]):
    """What takes the place of :class:`~unmask.models.moe.Experts`."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        """Without weights; see :meth:`put`."""
        spare: tuple[list[Tensor], list[Tensor]] = ([], [])
        gate_up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
        super().__init__(
            gate_up=[_Weight(*gate_up, spare=spare[0]) for _ in range(num_experts)],
            down=[_Weight(*down, spare=spare[1]) for _ in range(num_experts)],
        )
        self._spare = spare

    @property
    def count(self) -> int:
        """E."""
        return len(self._down)

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        shapes = (weight.shape for weight in (*self._gate_up, *self._down))
        return sum(outer * inner * self.dtype.itemsize for outer, inner in shapes)

    def put(self, parameter: str, index: tuple[int | slice, ...], weight: Tensor) -> None:
        """See :meth:`Product.put`; of one expert."""
        super().put(parameter, index, weight)
        if self.is_complete:
            for spare in self._spare:
                spare.clear()

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts, (T, D)."""
        return self.of_copies(hidden_TD, *sorted_by_expert(routing, len(self._gate_up)))

    def of_copies(self, hidden_TD: Tensor, token_N: Tensor, weights_N: Tensor, counts_E: Tensor) -> Tensor:
        """The same of copies of tokens that are sorted already; see :meth:`Experts.of_copies`."""
        counts = counts_E.tolist()
        copies_RD = hidden_TD.new_zeros(tiled(max(counts)), hidden_TD.shape[1])
        total_TD = torch.zeros_like(hidden_TD)
        parts = zip(counts, token_N.split(counts), weights_N.split(counts), strict=True)
        for expert, (count, token_C, weights_C) in enumerate(parts):
            if not count:
                continue
            torch.index_select(hidden_TD, 0, token_C, out=copies_RD[:count])  # behind them lie any numbers
            gate, up = self._gate_up[expert].times(copies_RD[: tiled(count)]).chunk(2, dim=-1)
            out_CD = self._down[expert].times(F.silu(gate).mul_(up))[:count]
            total_TD.index_add_(0, token_C, out_CD.mul_(weights_C.unsqueeze(1)))
        return total_TD


def _linear(replaced: nn.Linear | nn.Embedding) -> Product:
    outer, inner = replaced.weight.shape
    return ReorderedLinear(inner, outer)


def _experts(replaced: Experts) -> Product:
    return ReorderedExperts(*replaced.down_proj.shape)


REORDERED = Arrangement(_linear, _experts, tied_output=False)


def reorder(model: LanguageModel) -> LanguageModel:
    """The same model with weights laid out for oneDNN, made in place; its parameters are float32 on a CPU."""
    return rearrange(model, REORDERED)
