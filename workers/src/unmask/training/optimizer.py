"""AdamW with clipping by the global norm, and the balancing of experts, which no gradient does."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unmask.models.moe import Router
from unmask.training.weights import Weights
from unmask_api.train_job import Optimizer as OptimizerSpec

__all__ = ["Optimizer", "balance_experts"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (arXiv 1711.05101) over all weights; matrices decay, norms and biases do not.

    Moments belong to parameters by name, so that they outlive a conversion of the model,
    which keeps every parameter: they go on from stage to stage, and a stage that wants a
    soft start has a warm-up of the learning rate.
    """

    def __init__(self, weights: Weights, spec: OptimizerSpec) -> None:
        """Optimise ``weights``."""
        self._weights = weights
        self._clip_norm = float(spec.clip_norm)
        self._named = weights.named
        decay, plain = _by_decay(self._named.values())
        self._adamw = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": float(spec.weight_decay)},
                {"params": plain, "weight_decay": 0.0},
            ],
            betas=(float(spec.betas[0]), float(spec.betas[1])),
            eps=float(spec.epsilon),
            fused=True,
        )

    def gradient_norm(self, normaliser: float) -> float:
        """Divide the summed gradient by ``normaliser``, clip it, and return its norm before clipping."""
        norm = self._weights.norm() / normaliser
        self._weights.gradient.mul_(min(1.0, self._clip_norm / (norm + 1e-6)) / normaliser)
        return norm

    def step(self, rate: float) -> None:
        """Change the weights by the gradient at learning rate ``rate``."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state by name; the tensors are the live ones."""
        for name, parameter in self._named.items():
            state = self._state(parameter)
            yield f"{name}.step", state["step"]
            for moment in _MOMENTS:
                yield f"{name}.{moment}", state[moment]

    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of another optimiser of parameters with the same names."""
        with torch.no_grad():
            for name, tensor in self.tensors():
                tensor.copy_(tensors[name])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of ``parameter``, made as AdamW makes it if there has been no step."""
        state: dict[str, Tensor] = self._adamw.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(parameter)
        return state


def _by_decay(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in parameters:
        (decay if parameter.ndim >= 2 else plain).append(parameter)
    return decay, plain


@torch.no_grad()
def balance_experts(routers: Sequence[Router], counts: Sequence[Tensor], rate: float) -> None:
    """Move each router's bias towards equal load: once per step, from the counts of all processes.

    b += rate * (sign(mean - c) - mean over experts of sign(mean - c)), with c the tokens
    of each expert: the zero-mean form that Ling 2.0 was trained with, after DeepSeek-V3's
    (arXiv 2412.19437, section 2.1.2). Rate 0 leaves the bias as it is.
    """
    if rate == 0:
        return
    for router, tokens in zip(routers, counts, strict=True):
        if router.expert_bias is not None:
            direction = torch.sign(tokens.float().mean() - tokens.float())
            router.expert_bias += rate * (direction - direction.mean())
