"""How weights learn in all stages: the optimiser, experts, adapters, and what is done about bad steps."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from unmask_api.base import ApiModel, DecimalString, Rule

__all__ = ["Balance", "LoRA", "Optimizer", "Stability"]


class Optimizer(ApiModel):
    """AdamW, and the clipping of gradients."""

    rules: ClassVar = (
        Rule(
            rule="self.betas.all(beta, double(beta) < 1.0)",
            message="both betas must be below 1",
            field_path=".betas",
        ),
        Rule(rule="double(self.clipNorm) > 0.0", message="clipNorm must be above 0", field_path=".clipNorm"),
        Rule(rule="double(self.epsilon) > 0.0", message="epsilon must be above 0", field_path=".epsilon"),
    )

    betas: Annotated[tuple[DecimalString, ...], Field(min_length=2, max_length=2)] = ("0.9", "0.95")
    """Decay rates of the first and second moment."""
    weight_decay: DecimalString = "0.1"
    """Decoupled weight decay of matrices; norms and biases have none."""
    clip_norm: DecimalString = "1.0"
    """Largest global norm of the gradient."""
    epsilon: DecimalString = "1e-8"
    """Added to the denominator."""


class Balance(ApiModel):
    """Balancing of experts: by a bias on the routers' choice, and by losses."""

    bias_update_rate: DecimalString = "0.001"
    """How far each step moves a router's expert bias towards equal load; 0 freezes it."""
    load_balance_weight: DecimalString = "0"
    """Weight of the load-balance loss, for models without a bias; LLaDA-MoE has 0.01.

    Experts' shares are those of the whole step, so all micro-batches of a process but one run forward twice.
    """
    router_z_weight: DecimalString = "0"
    """Weight of the z-loss, which keeps the logits of routers small; LLaDA-MoE has 0.001."""


class LoRA(ApiModel):
    """Low-rank adapters, which learn while the model that they are put beside stays as it is."""

    rules: ClassVar = (
        Rule(rule="double(self.alpha) > 0.0", message="alpha must be above 0", field_path=".alpha"),
        Rule(
            rule="self.targets.all(target, self.targets.exists_one(other, other == target))",
            message="targets must be unique: drop one",
            field_path=".targets",
        ),
    )

    rank: Annotated[int, Field(ge=1, le=1024)]
    """Rank of each adapter."""
    alpha: DecimalString = "16"
    """What an adapter adds is scaled by this over ``rank``."""
    targets: Annotated[tuple[Literal["attention", "feedForward"], ...], Field(min_length=1, max_length=2)] = (
        "attention",
        "feedForward",
    )
    """Matrices with an adapter: the projections of ``attention``, and those of every ``feedForward`` that all
    tokens pass (dense layers and shared experts)."""


class Stability(ApiModel):
    """What to do about a step whose loss or gradient is not finite, or far above what went before.

    Such a step is skipped: its documents count as seen, the weights stay. After ``maxSkips`` in a row the
    run goes back to the newest checkpoint and leaves out all documents that it has seen since.
    """

    rules: ClassVar = (
        Rule(
            rule="double(self.spikeDeviations) >= 1.0",
            message="spikeDeviations must be at least 1: lower values skip ordinary steps",
            field_path=".spikeDeviations",
        ),
    )

    window: Annotated[int, Field(ge=8, le=1024)] = 128
    """Steps of the stage that a spike is measured against, skipped ones not counted.

    Until a stage has taken as many, only what is not finite is skipped.
    """
    spike_deviations: DecimalString = "20"
    """A step is a spike if its loss or gradient norm exceeds the window's median by so many deviations.

    A deviation is 1.4826 times the median distance from the median, and at least a hundredth of the median.
    """
    max_skips: Annotated[int, Field(ge=1, le=1000)] = 8
    """Steps skipped in a row before the run goes back to a checkpoint."""
    max_rollbacks: Annotated[int, Field(ge=0, le=1000)] = 3
    """Times that the run may go back; the next time it fails as diverged."""
