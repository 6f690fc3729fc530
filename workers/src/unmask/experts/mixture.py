"""Layers whose routed experts are elsewhere: what takes the place of a model's own mixtures of experts."""

from torch import Tensor

from unmask.experts.exchange import Exchange
from unmask.models.base import LanguageModel
from unmask.models.moe import MixtureOfExperts, mixtures_of

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
        hidden_TD = x.flatten(0, -2)
        flight = self._exchange.send(self._layer, hidden_TD, self.router(hidden_TD))
        shared_TD = None if self.shared_experts is None else self.shared_experts(hidden_TD)
        out_TD = self._exchange.receive(flight)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        return out_TD.view_as(x)


def shard_experts(model: LanguageModel, exchange: Exchange) -> None:
    """Have ``exchange`` compute the routed experts of all layers of ``model``."""
    for number, mixture in mixtures_of(model).items():
        layer = model.get_submodule(f"layers.{number}")
        layer.feed_forward = ShardedMixture(mixture, exchange, number)
