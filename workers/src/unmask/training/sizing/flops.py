"""Floating-point operations of training, counted as the papers count model FLOPs.

A product of an (m, k) and a (k, n) matrix is 2 m k n. Forward, each weight that a position is
multiplied with costs 2, and each pair that may attend costs 4 x heads x head size (scores and
values) in every layer; backward costs twice the forward (PaLM, arXiv 2204.02311, appendix B).
Counted are the pairs that the mask allows, the experts that a token is sent to, and the output
layer at predicted positions alone, so the figures are what a perfect kernel needs, not what a dense
one does. Norms, activations, softmax and the optimiser are left out.
"""

from dataclasses import dataclass

from unmask.models.shape import ModelShape
from unmask.training.sizing.work import Work

__all__ = ["Flops", "flops_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Of a forward and a backward pass."""

    linear: float
    """Of the weights in the layers."""
    attention: float
    head: float
    """Of the output layer."""
    reference: float = 0.0
    """Of the forward pass of a model that is compared with."""
    recomputed: float = 0.0
    """Of activations that backward computes again."""

    @property
    def useful(self) -> float:
        """What the mathematics asks for."""
        return self.linear + self.attention + self.head + self.reference

    @property
    def computed(self) -> float:
        """Recomputation included."""
        return self.useful + self.recomputed

    def plus(self, other: "Flops", count: int = 1) -> "Flops":
        """The sum with ``count`` of ``other``."""
        return Flops(
            linear=self.linear + count * other.linear,
            attention=self.attention + count * other.attention,
            head=self.head + count * other.head,
            reference=self.reference + count * other.reference,
            recomputed=self.recomputed + count * other.recomputed,
        )


def flops_of(
    shape: ModelShape,
    work: Work,
    *,
    recompute: bool = False,
    counted: float = 0.0,
    reference: bool = False,
    adapters: int = 0,
) -> Flops:
    """The arithmetic of training on ``work``.

    With ``recompute`` the layers run forward twice; and once more for the share ``counted`` of it, whose
    experts are counted beforehand. With ``reference`` a second model runs forward too. With
    ``adapters``, so many weights learn, beside every token's path; the others have no gradient of their own.
    """
    linear = 2 * sum(layer.multiplied for layer in shape.layers) * work.positions
    attention = 4 * len(shape.layers) * shape.heads * shape.head_dim * work.pairs
    head = 2 * shape.vocabulary * shape.hidden * work.predictions
    passes = 2 if adapters else 3  # forward, the gradient of the input, and that of the weights
    product = 2 * adapters * work.positions
    return Flops(
        linear=passes * linear + 3 * product,
        attention=3 * attention,
        head=passes * head,
        reference=float(linear + attention + head) if reference else 0.0,
        recomputed=(linear + attention) * (recompute + counted),
    )
