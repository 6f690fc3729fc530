"""Weights of eight bits on a GPU, activations in the model's own format (weight-only int8, W8A16).

A step of few tokens is as long as it takes to read the weights, and these are half as many bytes as in
bfloat16. They are rounded to whole multiples of a scale of their output channel, as on a CPU
(:mod:`unmask.models.int8`), with all of plus or minus 127; the products are those of
:mod:`unmask.models.moe_kernel`. Shape letters as there: I and O the inner and outer width of a product.
"""

import torch
from torch import Tensor, nn

from unmask.models.moe import Experts, Routing
from unmask.models.products import Arrangement, Product

__all__ = ["LEVELS", "WEIGHT_ONLY", "WeightOnlyExperts", "WeightOnlyLinear", "quantised_channels"]

LEVELS = 127
"""The largest number that stands for a weight."""


def quantised_channels(weight_OI: Tensor, *, levels: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of up to ``levels`` and the scale of each row, int8 (O, I) and float32 (O,).

    Their product is the weight.
    """
    weight_OI = weight_OI.float()
    scale_O = (weight_OI.abs().amax(1) / levels).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight_OI / scale_O.unsqueeze(1)).round_().to(torch.int8), scale_O


class WeightOnlyLinear(Product):
    """What takes the place of ``nn.Linear``."""

    levels: Tensor
    """int8 (O, I)."""
    scale: Tensor
    """float32 (O,)."""

    def __init__(self, in_features: int, out_features: int, *, device: torch.device) -> None:
        """Without a weight; see :meth:`put`."""
        super().__init__()
        _add_weight(self, "levels", "scale", (out_features, in_features), device)
        self._missing = out_features

    @property
    def is_complete(self) -> bool:
        """See :attr:`Product.is_complete`."""
        return self._missing == 0

    def clear(self) -> None:
        """See :meth:`Product.clear`."""
        self._missing = len(self.scale)

    def put(self, parameter: str, index: tuple[int | slice, ...], weight: Tensor) -> None:
        """See :meth:`Product.put`."""
        assert parameter == "weight", parameter
        rows = index[0] if index else slice(None)
        assert isinstance(rows, slice)
        levels, scale = quantised_channels(weight, levels=LEVELS)
        self.levels[rows], self.scale[rows] = levels.to(self.levels.device), scale.to(self.scale.device)
        self._missing -= len(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        from unmask.models.moe_kernel import linear_of_levels  # no Triton where there is no GPU

        rows_NI = x.flatten(0, -2).contiguous()
        return linear_of_levels(rows_NI, self.levels, self.scale).view(*x.shape[:-1], -1)


class WeightOnlyExperts(Product):
    """What takes the place of :class:`~unmask.models.moe.Experts`."""

    parameters_of = ("gate_up_proj", "down_proj")

    gate_up_levels: Tensor
    """int8 (E, 2I, D)."""
    gate_up_scale: Tensor
    """float32 (E, 2I)."""
    down_levels: Tensor
    """int8 (E, D, I)."""
    down_scale: Tensor
    """float32 (E, D)."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, device: torch.device
    ) -> None:
        """Without weights; see :meth:`put`."""
        super().__init__()
        gate_up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
        _add_weight(self, "gate_up_levels", "gate_up_scale", (num_experts, *gate_up), device)
        _add_weight(self, "down_levels", "down_scale", (num_experts, *down), device)
        self.clear()

    @property
    def is_complete(self) -> bool:
        """See :attr:`Product.is_complete`."""
        return self._missing == 0

    def clear(self) -> None:
        """See :meth:`Product.clear`."""
        self._missing = self.gate_up_scale.numel() + self.down_scale.numel()

    def put(self, parameter: str, index: tuple[int | slice, ...], weight: Tensor) -> None:
        """See :meth:`Product.put`; of one expert."""
        name = parameter.removesuffix("_proj")
        target, scales = self.get_buffer(f"{name}_levels"), self.get_buffer(f"{name}_scale")
        levels, scale = quantised_channels(weight, levels=LEVELS)
        target[index], scales[index] = levels.to(target.device), scale.to(scales.device)
        self._missing -= len(weight)

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts, (T, D)."""
        from unmask.models.moe_kernel import experts_at_once  # no Triton where there is no GPU

        return experts_at_once(
            hidden_TD.contiguous(),
            routing.experts,
            routing.weights,
            self.gate_up_levels,
            self.down_levels,
            self.gate_up_scale,
            self.down_scale,
        )


def _add_weight(
    module: nn.Module, levels: str, scale: str, shape: tuple[int, ...], device: torch.device
) -> None:
    """Buffers that no state dict has: on disk there are the weights that they stand for."""
    module.register_buffer(levels, torch.empty(shape, dtype=torch.int8, device=device), persistent=False)
    module.register_buffer(
        scale, torch.empty(shape[:-1], dtype=torch.float32, device=device), persistent=False
    )


def _linear(replaced: nn.Linear | nn.Embedding) -> Product:
    outer, inner = replaced.weight.shape
    return WeightOnlyLinear(inner, outer, device=replaced.weight.device)


def _experts(replaced: Experts) -> Product:
    return WeightOnlyExperts(*replaced.down_proj.shape, device=replaced.down_proj.device)


WEIGHT_ONLY = Arrangement(_linear, _experts, tied_output=True)
