"""Balance losses of a step: over the tokens of all its rows, wherever they are computed.

How busy each expert is must be known before any gradient is computed, since it decides where
the gradient pulls. A mean over each micro-batch's own shares would be another loss, and would
change with the micro-batches and ranks (a share of few tokens is never balanced). So all micro-batches of a
process but one first run forward without gradients, only to be counted; the last one is counted
in the forward that it needs anyway. With one micro-batch per process, counting is free.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.models.balance_losses import BalancePull, RouterSums
from unmask.models.moe import Router
from unmask.training.distributed import World
from unmask_api.train_job import Balance

__all__ = ["BalanceLosses", "Balancing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceLosses:
    """Means over layers; both without their weights."""

    load: float
    """Of E sum f P: 1 where all experts are equally busy, E where one does everything."""
    z: float
    """Of the squared logarithm of the sum of exponentials."""


class Balancing:
    """The balance losses of one step."""

    tokens: tuple[Tensor, ...]
    """For each router, int64 (experts,): tokens of the step that went to each expert; once settled."""

    def __init__(self, *, load: float, z: float) -> None:
        """Weigh the load-balance loss by ``load`` and the z-loss by ``z``."""
        self._load, self._z = load, z
        self._routers: Sequence[Router] = ()

    @classmethod
    def of(cls, spec: Balance) -> "Balancing | None":
        """What ``spec`` asks for; None if both losses weigh nothing."""
        load, z = float(spec.load_balance_weight), float(spec.router_z_weight)
        return cls(load=load, z=z) if load or z else None

    @contextmanager
    def counted(self, routers: Sequence[Router]) -> Iterator[None]:
        """A step: its forwards are counted up to :meth:`settle`, and pull in their backward pass."""
        self._routers = routers
        for router in routers:
            router.sums = RouterSums(
                torch.zeros(len(router.weight), dtype=torch.float64, device=router.weight.device),
                torch.zeros((), dtype=torch.float64, device=router.weight.device),
            )
        try:
            yield
        finally:
            for router in routers:
                router.sums = router.pull = None

    def settle(self, world: World, *, normaliser: float) -> BalanceLosses:
        """Add up what all processes counted, and let it pull from now on.

        Args:
            world: The processes that share the step.
            normaliser: Of this process's loss; the summed gradient will be divided by that of all.
        """
        total = torch.tensor([normaliser], dtype=torch.float64, device=world.device)
        self.tokens = tuple(router.tokens_per_expert.clone() for router in self._routers)
        sums = [router.sums for router in self._routers if router.sums is not None]
        world.sum(total, *self.tokens, *(one.scores for one in sums), *(one.squares for one in sums))
        load = z = 0.0
        scale = max(float(total), 1.0) / max(1, len(self._routers))
        for router, tokens, own in zip(self._routers, self.tokens, sums, strict=True):
            copies = max(1, int(tokens.sum()))
            count = copies / router.choose
            share = tokens.double() / copies
            load += float((share * own.scores).sum()) * len(share) / count
            z += float(own.squares) / count
            weighted = self._load * scale * len(share) / count * share
            router.pull = BalancePull(weighted.to(router.weight.dtype), self._z * scale / count)
        layers = max(1, len(self._routers))
        return BalanceLosses(load=load / layers, z=z / layers)
