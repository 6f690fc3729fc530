"""What is learnt, and what learns it: weights, gradient and optimiser, as one thing to save and restore."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from unmask.models.base import LanguageModel
from unmask.models.conversion import to_diffusion
from unmask.training.checkpoints import Checkpoint
from unmask.training.optimizer import Optimizer, balance_experts
from unmask.training.steps import Totals
from unmask.training.weights import Weights
from unmask_api.train_job import TrainSpec

__all__ = ["Learner"]


class Learner:
    """A model and the optimiser that changes it."""

    def __init__(self, model: LanguageModel, spec: TrainSpec) -> None:
        """Take ``model``, in float32, over."""
        self._spec = spec
        self.weights = Weights(model, precision=spec.precision)
        self._optimizer = Optimizer(self.weights, spec.optimizer)

    @property
    def model(self) -> LanguageModel:
        """The float32 model."""
        return self.weights.model

    def gradient_norm(self, totals: Totals) -> float:
        """Turn the summed gradient into that of the loss, clip it, and return its norm before clipping."""
        return self._optimizer.gradient_norm(totals.normaliser)

    def step(self, totals: Totals, rate: float) -> None:
        """Apply the gradient, and balance the experts."""
        self._optimizer.step(rate)
        balance_experts(
            self.model.routers(), totals.expert_tokens, float(self._spec.balance.bias_update_rate)
        )
        self.weights.changed()

    def converted(self, architecture: str, *, mask_token_id: int | None = None) -> "Learner":
        """The same weights, and the optimiser's state, under another architecture.

        Args:
            architecture: What the model becomes.
            mask_token_id: The token that becomes the mask; None: the model's or the architecture's own.

        Raises:
            ModelError: The model cannot become that.
        """
        learner = Learner(to_diffusion(self.model, architecture, mask_token_id=mask_token_id), self._spec)
        learner._optimizer.copy_from(dict(self._optimizer.tensors()))
        return learner

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that the next step depends on, by name; the tensors are the live ones."""
        for name, tensor in self.model.state_dict().items():
            yield f"model.{name}", tensor
        for name, tensor in self._optimizer.tensors():
            yield f"optimizer.{name}", tensor

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the tensors of ``checkpoint``.

        Raises:
            ModelError: They are not those of this model.
        """
        checkpoint.read_into(dict(self.tensors()))
        self.weights.changed()

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        return self.model.config.to_json_dict()
