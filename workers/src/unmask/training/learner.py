"""What is learnt, and what learns it: weights, gradient and optimiser, as one thing to save and restore."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.training.boxes import Box
from unmask.training.checkpoints import Checkpoint
from unmask.training.optimizer import Optimizer, balance_experts
from unmask.training.steps import Totals
from unmask.training.weights import Weights
from unmask_api.train_job import TrainSpec

__all__ = ["Learner"]


class Learner:
    """A model and the optimiser that changes it."""

    def __init__(self, weights: Weights | LanguageModel, spec: TrainSpec) -> None:
        """Take ``weights`` over; a model in float32 becomes weights that this process holds all of."""
        self._spec = spec
        if isinstance(weights, LanguageModel):
            weights = Weights(weights, precision=spec.precision)
        self.weights = weights
        self._optimizer = Optimizer(self.weights, spec.optimizer)

    @property
    def model(self) -> LanguageModel:
        """The float32 model."""
        return self.weights.model

    def gradient_norm(self, totals: Totals) -> float:
        """Turn the summed gradient into that of the loss, clip it, and return its norm before clipping."""
        return self._optimizer.gradient_norm(totals.normaliser)

    def step(self, totals: Totals, rate: float, *, freeze_router_bias: bool = False) -> None:
        """Apply the gradient, and balance the experts unless their routers' bias is to stay as it is."""
        self._optimizer.step(rate)
        if not freeze_router_bias:
            balance_experts(
                self.model.routers(), totals.expert_tokens, float(self._spec.balance.bias_update_rate)
            )
        self.weights.changed()

    def skip(self) -> None:
        """Forget the gradient; weights, optimiser and balance stay as they are, bit for bit."""
        self.weights.changed()

    def recast(self, config: ModelConfig) -> "Learner":
        """The same weights, and the optimiser's state, under another configuration."""
        learner = Learner(self.weights.recast(config), self._spec)
        learner._optimizer.copy_from(dict(self._optimizer.tensors()))
        return learner

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this process holds of all that the next step depends on; the tensors are the live ones."""
        for name, box in self.boxes():
            yield name, box.tensor

    def boxes(self) -> Iterator[tuple[str, Box]]:
        """The same, and which part of the whole each tensor is."""
        parts = dict(self.weights.boxes())
        for name, box in parts.items():
            yield f"model.{name}", box
        for name, tensor in self._optimizer.tensors():
            parameter, _, kind = name.rpartition(".")
            own = Box.whole(tensor, kept=self.weights.leads)
            yield f"optimizer.{name}", own if kind == "step" else replace(parts[parameter], tensor=tensor)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the tensors of ``checkpoint``.

        Raises:
            ModelError: They are not those of this model.
        """
        checkpoint.read_into(dict(self.boxes()))
        self.weights.changed()

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        return self.model.config.to_json_dict()
