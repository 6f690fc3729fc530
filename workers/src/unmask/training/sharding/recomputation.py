"""Activation checkpointing: keep a layer's inputs alone, and compute the rest again in the backward pass.

A router that is computed again must not choose again. Near a tie the second forward may
round differently (other kernels, other shapes of a batch), and the gradient would be that
of experts that never spoke. So the first forward keeps what it chose, the second takes it
from there, and tokens are counted once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unmask.models.base import LanguageModel
from unmask.models.moe import ChosenExperts, Router
from unmask.models.transformer import Layer

__all__ = ["recompute_layers"]


def recompute_layers(model: LanguageModel) -> None:
    """Let every layer of ``model`` keep its inputs only; losses and gradients stay the same, bit for bit."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            routers = [module for module in layer.modules() if isinstance(module, Router)]
            layer.around = partial(_recomputed, routers)


def _recomputed(routers: Sequence[Router], compute: Callable[..., Tensor], *arguments: object) -> Tensor:
    """``compute(*arguments)``, to be computed again when its gradient is asked for."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        chosen = [ChosenExperts() for _ in routers]
        return _choosing(routers, chosen), _choosing(routers, chosen)

    # Without early stop the second forward runs to its end: it leaves sharded modules as the first one did.
    out: Tensor = checkpoint(
        compute,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        early_stop=False,
    )
    return out


@contextmanager
def _choosing(routers: Sequence[Router], chosen: Sequence[ChosenExperts]) -> Iterator[None]:
    """Let each router keep its choice in ``chosen``, or take it from there if it is there already."""
    for router, choice in zip(routers, chosen, strict=True):
        router.remembered = choice
    try:
        yield
    finally:
        for router in routers:
            router.remembered = None
