"""The job as a sequence of steps: which stage, block size and learning rate each step has.

Pure functions of the job. Steps of the run count from 0 before a step is taken and from
1 in logs and checkpoints, where "step 100" means that 100 steps are done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from unmask.diffusion.noise import NoiseConfig
from unmask.diffusion.schedule import BlockSchedule
from unmask.errors import UsageError
from unmask.models.config import ModelConfig
from unmask.models.conversion import converted_config, extended_config
from unmask.models.loading import build
from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Source
from unmask_api.train_job import DataSource, LearningRate, Noise, Objective, Stage, StageData, TrainSpec

__all__ = [
    "RateSchedule",
    "StagePlan",
    "check_fit",
    "plan_stages",
    "sources_of",
    "stage_after",
    "with_context",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSchedule:
    """Warm-up, stable, decay (WSD): the learning rate of each step of a stage."""

    peak: float
    final: float
    warmup: int
    decay: int
    steps: int
    cosine: bool

    def at(self, step: int) -> float:
        """The learning rate of step ``step``, from 0.

        Step ``warmup - 1`` is the first at the peak; ``final`` would be reached one step
        after the last.
        """
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        falling = step - (self.steps - self.decay)
        if falling <= 0:
            return self.peak
        share = falling / self.decay
        if self.cosine:
            share = (1 - math.cos(math.pi * share)) / 2
        return self.peak + (self.final - self.peak) * share


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage, ready to be run."""

    name: str
    index: int
    objective: Objective
    config: ModelConfig
    """Of the model in this stage: converted, and with another context, where the stage says so."""
    first_step: int
    """Steps of the run before this stage."""
    steps: int
    length: int
    rows: int
    """Of one step, over all processes."""
    blocks: BlockSchedule | None
    """None for objectives without blocks."""
    responses_only: bool
    turns: bool
    """Whether every turn of a conversation is an answer, and not only the last."""
    noise: NoiseConfig | None
    confidence_weight: float
    document_mask: bool
    """Whether a document sees itself alone."""
    embedding_noise: float
    """Standard deviation at the first step; 0: none."""
    embedding_noise_steps: int
    shifted: bool
    """Whether a token is predicted from the place before it."""
    random_length: float
    """Share of documents that are cut to a random length."""
    freeze_router_bias: bool
    rate: RateSchedule
    train: tuple[Source, ...]
    validation: tuple[Source, ...]
    export: bool
    beta: float | None = None
    """Of a preference stage."""
    merge_best: int | None = None
    """Checkpoints whose mean the stage ends with; None: it ends with its last weights."""

    @property
    def end(self) -> int:
        """Steps of the run when this stage is done."""
        return self.first_step + self.steps

    def block_length(self, step: int) -> int:
        """Tokens of a block at step ``step`` of the stage: what is masked and filled together."""
        if self.blocks is not None:
            return self.blocks.size_at(step)
        return 1 if self.objective == "ar" else self.length

    def disturbance(self, step: int) -> float:
        """Standard deviation of the noise on masked embeddings at step ``step``: falls evenly to 0."""
        if step >= self.embedding_noise_steps:
            return 0.0
        return self.embedding_noise * (1 - step / self.embedding_noise_steps)

    @property
    def multiples(self) -> tuple[int, ...]:
        """What widths are multiples of, over all steps."""
        return tuple(sorted(set(self.blocks.sizes))) if self.blocks is not None else (1,)

    def multiple(self, step: int) -> int:
        """What the width of a document in its row is a multiple of."""
        return self.blocks.size_at(step) if self.blocks is not None else 1


def plan_stages(
    spec: TrainSpec, config: ModelConfig, tokenizer: Tokenizer | None = None
) -> tuple[StagePlan, ...]:
    """The stages of a job that starts from a model of ``config``.

    Stages that name their mask token need ``tokenizer``.

    Raises:
        UsageError: A stage asks of the model what it cannot do.
        ModelError: A stage converts the model to what it cannot become.
    """
    plans: list[StagePlan] = []
    for index, stage in enumerate(spec.stages):
        field = f"spec.stages[{index}]"
        mask_token_id = _mask_token_id(stage, tokenizer, field)
        if stage.convert_to is not None:
            config = converted_config(config, stage.convert_to, mask_token_id=mask_token_id)
        config = with_context(stage, config)
        check_fit(stage, config, field)
        data = spec.data_of(stage)
        plans.append(
            StagePlan(
                name=stage.name,
                index=index,
                objective=stage.objective,
                config=config,
                first_step=plans[-1].end if plans else 0,
                steps=stage.steps,
                length=stage.length,
                rows=stage.rows_per_step,
                blocks=BlockSchedule(stage.block_sizes, stage.steps) if stage.block_sizes else None,
                responses_only=stage.supervise != "All",
                turns=stage.supervise == "AllTurns",
                noise=_noise(stage.noise) if stage.noise else None,
                confidence_weight=float(stage.confidence_weight),
                document_mask=stage.document_mask,
                embedding_noise=float(stage.embedding_noise.std) if stage.embedding_noise else 0.0,
                embedding_noise_steps=stage.embedding_noise.steps if stage.embedding_noise else 0,
                shifted=stage.prediction == "Shifted",
                random_length=float(stage.random_length),
                freeze_router_bias=stage.router_bias == "Frozen",
                rate=_rate(stage.learning_rate, stage.steps),
                train=_sources(data.train, "train"),
                validation=_sources(data.validation, "validation"),
                export=stage.export,
                beta=float(stage.beta) if stage.beta is not None else None,
                merge_best=stage.merge.best if stage.merge else None,
            )
        )
    return tuple(plans)


def stage_after(plans: Sequence[StagePlan], step: int) -> StagePlan | None:
    """The stage of the step that follows when ``step`` steps are done; None when all are."""
    return next((plan for plan in plans if step < plan.end), None)


def _mask_token_id(stage: Stage, tokenizer: Tokenizer | None, field: str) -> int | None:
    if stage.mask_token is None:
        return None
    assert tokenizer is not None, "the caller's part"
    try:
        return tokenizer.unused_special_id(stage.mask_token)
    except UsageError as error:
        raise UsageError(f"{field}.maskToken: {error}") from None


def with_context(stage: Stage, config: ModelConfig) -> ModelConfig:
    """``config`` with the context that ``stage`` asks for."""
    if stage.rope_theta is None and stage.context_length is None:
        return config
    theta = None if stage.rope_theta is None else float(stage.rope_theta)
    return extended_config(config, rope_theta=theta, context=stage.context_length)


def check_fit(stage: Stage, config: ModelConfig, field: str) -> None:
    """Refuse a stage that asks of a model of ``config`` what it cannot do; ``field`` is blamed.

    Raises:
        UsageError: It does.
    """
    model = build(config, device="meta")
    if model.causal != (stage.objective == "ar"):
        kind, remedy = (
            ("autoregressive", "set convertTo on this stage or an earlier one")
            if model.causal
            else ("a diffusion model", "use mdlm, bdlm or sft")
        )
        raise UsageError(
            f"{field}.objective: got {stage.objective}, but {config.architectures[0]} is {kind}; {remedy}"
        )
    if model.attends == "canvas" and stage.objective != "mdlm":
        raise UsageError(
            f"{field}.objective: got {stage.objective}, but {config.architectures[0]} is decoded over its "
            "whole canvas, not block by block; use mdlm, for answers with supervise: Response"
        )
    if stage.length > config.max_position_embeddings:
        raise UsageError(
            f"{field}.length: got {stage.length}, the model's max_position_embeddings allows at most "
            f"{config.max_position_embeddings}; lower length or raise it by contextLength"
        )


def _noise(noise: Noise) -> NoiseConfig:
    return NoiseConfig(
        low=float(noise.low),
        high=float(noise.high),
        scope="block" if noise.scope == "Block" else "document",
        weight="elbo" if noise.weight == "Elbo" else "flat",
        views=noise.views,
        complementary=noise.complementary,
    )


def _rate(rate: LearningRate, steps: int) -> RateSchedule:
    return RateSchedule(
        peak=float(rate.peak),
        final=float(rate.final),
        warmup=rate.warmup_steps,
        decay=rate.decay_steps,
        steps=steps,
        cosine=rate.decay == "Cosine",
    )


def sources_of(data: StageData) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """What is learnt from, and what is measured on."""
    return _sources(data.train, "train"), _sources(data.validation, "validation")


def _sources(sources: Sequence[DataSource], split: str) -> tuple[Source, ...]:
    return tuple(
        Source(
            source.uri,
            source.format,
            source.weight,
            source.split or split,
            None if source.share is None else Fraction(source.share),
        )
        for source in sources
    )
