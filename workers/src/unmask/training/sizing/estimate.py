"""A job's stages with their arithmetic, memory and hours on given GPUs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unmask.diffusion.schedule import BlockSchedule
from unmask.models.config import ModelConfig
from unmask.models.conversion import converted_config
from unmask.models.inspection import parameter_counts
from unmask.models.shape import ModelShape, adapters_of, shape_of
from unmask.training.plan import check_fit, with_context
from unmask.training.sharding.plan import ShardingPlan, check_experts, sharding_plan
from unmask.training.sizing.devices import Device
from unmask.training.sizing.flops import Flops, flops_of
from unmask.training.sizing.memory import Memory, memory_of, states_of
from unmask.training.sizing.work import Documents, Work, work_of_row
from unmask_api.train_job import Parallelism, Stage, TrainSpec

__all__ = [
    "Assumptions",
    "JobEstimate",
    "StageEstimate",
    "conversion_bytes",
    "estimate",
    "plan_of",
    "stage_configs",
    "stage_memory",
]

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What cannot be known from a manifest; each is an assumption, and can be replaced."""

    mfu: float
    """Share of the GPU's peak that all that is computed reaches."""
    reserve_gib: float
    """Memory of a GPU left to others than the trainer's tensors."""
    documents: Documents | None = None
    """What documents are like; None: each fills a row, and none has a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """One stage."""

    name: str
    objective: str
    architecture: str
    parameters: int
    active_parameters: int
    steps: int
    tokens: int
    """Of the data, in the whole stage."""
    positions_per_step: float
    """Tokens that the layers compute, noisy and clean copies counted; a mean over block sizes."""
    predictions_per_step: float
    flops: Flops
    """Of the whole stage."""
    memory: Memory
    """Of one process, with the block size that needs most."""
    conversion_bytes: int
    """Of one process while the model is converted, or its context changed, at the stage's start; or 0."""
    hours: float

    @property
    def peak_bytes(self) -> int:
        """The most that one process holds."""
        return max(self.memory.total, self.conversion_bytes)

    def to_json_dict(self) -> dict[str, Any]:
        """For machines."""
        derived = {
            "tokens_per_step": self.tokens // self.steps,
            "useful_flops": self.flops.useful,
            "useful_flops_per_step": self.flops.useful / self.steps,
            "peak_bytes": self.peak_bytes,
        }
        return asdict(self) | derived | {"memory": asdict(self.memory) | {"total": self.memory.total}}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEstimate:
    """A whole job."""

    device: Device
    gpus: int
    assumptions: Assumptions
    stages: tuple[StageEstimate, ...]

    @property
    def available_bytes(self) -> int:
        """Of a GPU, what the trainer's tensors may take."""
        return int((self.device.memory_gib - self.assumptions.reserve_gib) * _GIB)

    @property
    def too_large(self) -> list[StageEstimate]:
        """The stages that do not fit."""
        return [stage for stage in self.stages if stage.peak_bytes > self.available_bytes]

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.hours for stage in self.stages)

    def to_json_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "device": asdict(self.device),
            "gpus": self.gpus,
            "assumptions": asdict(self.assumptions),
            "available_bytes": self.available_bytes,
            "fits": not self.too_large,
            "hours": self.hours,
            "gpu_hours": self.hours * self.gpus,
            "useful_flops": sum(stage.flops.useful for stage in self.stages),
            "stages": [stage.to_json_dict() for stage in self.stages],
        }


def estimate(
    spec: TrainSpec, configs: Sequence[ModelConfig], device: Device, assumptions: Assumptions
) -> JobEstimate:
    """What the job ``spec`` takes, given the model of each stage (:func:`stage_configs`).

    Raises:
        UsageError: The documents assumed do not fit a stage's rows, or experts cannot be shared out so.
    """
    plan_of(spec.parallelism, [shape_of(config) for config in configs])
    stages = tuple(
        _stage(stage, config, spec, device, assumptions)
        for stage, config in zip(spec.stages, configs, strict=True)
    )
    return JobEstimate(device=device, gpus=spec.parallelism.processes, assumptions=assumptions, stages=stages)


def plan_of(parallelism: Parallelism, shapes: Sequence[ModelShape]) -> ShardingPlan | None:
    """How ``parallelism`` shares the weights of models of ``shapes`` out; None: each process holds all.

    Raises:
        UsageError: It cannot be done; names the field.
    """
    plan = sharding_plan(parallelism, processes=parallelism.processes)
    if plan is not None and plan.experts > 1:
        layers = (layer for shape in shapes for layer in shape.layers if layer.experts)
        check_experts(plan, [layer.stacks for layer in layers])
    return plan


def stage_configs(spec: TrainSpec, config: ModelConfig) -> list[ModelConfig]:
    """The model of each stage of a job that starts from ``config``.

    A stage that names its mask token needs no tokenizer here: which token it is does not matter to size.

    Raises:
        UsageError: A stage asks of the model what it cannot do.
        ModelError: A stage converts the model to what it cannot become.
    """
    configs = []
    for index, stage in enumerate(spec.stages):
        if stage.convert_to is not None:
            mask = 0 if stage.mask_token is not None else None
            config = converted_config(config, stage.convert_to, mask_token_id=mask)
        config = with_context(stage, config)
        check_fit(stage, config, f"spec.stages[{index}]")
        configs.append(config)
    return configs


def stage_memory(
    stage: Stage, shape: ModelShape, spec: TrainSpec, documents: Documents | None
) -> tuple[Memory, int]:
    """Bytes of one process in ``stage``, with the block size that needs most, and while it is converted."""
    parallelism = spec.parallelism
    plan = plan_of(parallelism, [shape])
    rows = min(parallelism.micro_batch_rows, stage.rows_per_step // parallelism.processes)
    works = [work.times(rows) for work, _ in _works(stage, documents)]
    memory = max(
        (
            memory_of(
                shape,
                precision=spec.precision,
                positions=work.positions,
                predictions=work.predictions,
                recompute=parallelism.activation_checkpointing == "Full",
                plan=plan,
                reference=stage.objective == "dpo",
                lora=spec.lora,
            )
            for work in works
        ),
        key=lambda memory: memory.total,
    )
    changes = stage.convert_to or stage.rope_theta or stage.context_length
    return memory, conversion_bytes(shape, spec) if changes else 0


def conversion_bytes(shape: ModelShape, spec: TrainSpec) -> int:
    """Bytes of one process while the weights of a stage and those of the next both exist.

    Where each process holds all weights, the two share the float32 ones; where they are shared out, nothing.
    """
    plan = plan_of(spec.parallelism, [shape])
    weights, gradients, optimizer = states_of(shape, spec.precision, plan)
    if plan:
        return 2 * (weights + gradients + optimizer)
    master = gradient = 4 * shape.parameters
    return master + 2 * (weights - master + gradient + optimizer)


def _stage(
    stage: Stage, config: ModelConfig, spec: TrainSpec, device: Device, assumptions: Assumptions
) -> StageEstimate:
    shape = shape_of(config)
    total, active = parameter_counts(config)
    recompute = spec.parallelism.activation_checkpointing == "Full"
    counted = _counted_beforehand(stage, spec)
    memory, converting = stage_memory(stage, shape, spec, assumptions.documents)
    adapters = adapters_of(shape, spec.lora)[0] if spec.lora else 0
    flops, positions, predictions, tokens = Flops(linear=0, attention=0, head=0), 0, 0.0, 0
    for row, steps in _works(stage, assumptions.documents):
        work = row.times(stage.rows_per_step)
        done = flops_of(
            shape,
            work,
            recompute=recompute,
            counted=counted,
            reference=stage.objective == "dpo",
            adapters=adapters,
        )
        flops = flops.plus(done, steps)
        positions += work.positions * steps
        predictions += work.predictions * steps
        tokens += work.tokens * steps
    speed = spec.parallelism.processes * device.peak(spec.precision) * assumptions.mfu
    return StageEstimate(
        name=stage.name,
        objective=stage.objective,
        architecture=config.architecture,
        parameters=total,
        active_parameters=active,
        steps=stage.steps,
        tokens=tokens,
        positions_per_step=positions / stage.steps,
        predictions_per_step=predictions / stage.steps,
        flops=flops,
        memory=memory,
        conversion_bytes=converting,
        hours=flops.computed / speed / 3600,
    )


def _counted_beforehand(stage: Stage, spec: TrainSpec) -> float:
    """The share of a step that runs forward once more to count experts, for the balance losses."""
    if not float(spec.balance.load_balance_weight) and not float(spec.balance.router_z_weight):
        return 0.0
    rows = stage.rows_per_step // spec.parallelism.processes
    last = rows % spec.parallelism.micro_batch_rows or min(rows, spec.parallelism.micro_batch_rows)
    return 1 - last / rows


def _works(stage: Stage, documents: Documents | None) -> list[tuple[Work, int]]:
    """The work of a row with each block size, and how many steps have it."""
    if stage.block_sizes is None:
        return [(work_of_row(stage, documents, block_length=None), stage.steps)]
    schedule = BlockSchedule(stage.block_sizes, stage.steps)
    return [(work_of_row(stage, documents, block_length=size), steps) for size, steps in schedule.lasting()]
