"""Layers whose routed experts are elsewhere: what takes the place of a model's own mixtures of experts."""

from collections.abc import Callable

from torch import Tensor

from unmask.experts.exchange import Exchange
from unmask.models.base import LanguageModel
from unmask.models.moe import MixtureOfExperts, mixtures_of
from unmask.models.transformer import Transformer

__all__ = ["ShardedMixture", "shard_experts"]


class ShardedMixture(MixtureOfExperts):
    """Routes here, has the routed experts computed by shards, and the shared ones meanwhile."""

    def __init__(self, mixture: MixtureOfExperts, exchange: Exchange, layer: int) -> None:
        """Take over router and shared experts of ``mixture``, which is layer number ``layer``."""
        super().__init__(mixture.router, mixture.experts, mixture.shared_experts)
        self._exchange = exchange
        self._layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.begin(x)()

    def begin(self, x: Tensor, micro_batch: int = 0) -> Callable[[], Tensor]:
        """See :meth:`MixtureOfExperts.begin`; the rows are on their way when this returns."""
        hidden_TD = x.flatten(0, -2)
        flight = self._exchange.send(self._layer, hidden_TD, self.router(hidden_TD), micro_batch)
        shared_TD = None if self.shared_experts is None else self.shared_experts(hidden_TD)

        def end() -> Tensor:
            out_TD = self._exchange.receive(flight)
            if shared_TD is not None:
                out_TD = out_TD + shared_TD
            return out_TD.view_as(x)

        return end


def shard_experts(model: LanguageModel, exchange: Exchange, *, micro_batches: int = 1) -> None:
    """Have ``exchange`` compute the routed experts of all layers of ``model``.

    Args:
        model: Any; its weights stay as they are.
        exchange: Knows the shards.
        micro_batches: Parts of a forward that take turns: while shards compute the experts of one, the next
            goes on here. Changes no number.

    Raises:
        ValueError: The model's forwards cannot be divided.
    """
    if isinstance(model, Transformer):
        model.micro_batches = micro_batches
    elif micro_batches != 1:
        raise ValueError(f"micro batches: a {type(model).__name__} cannot be divided; use 1")
    for number, mixture in mixtures_of(model).items():
        layer = model.get_submodule(f"layers.{number}")
        layer.feed_forward = ShardedMixture(mixture, exchange, number)
