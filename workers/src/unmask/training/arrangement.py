"""Who holds which part of the model: from a job to its weights, replicated or shared out."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from unmask.errors import UsageError
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.loading import build, initial_values, load, read_values
from unmask.models.registry import read_config
from unmask.training.adapters import AdaptedWeights
from unmask.training.distributed import World
from unmask.training.preparation import first_model
from unmask.training.sharding.plan import sharding_plan
from unmask.training.sharding.weights import ShardedWeights
from unmask.training.weights import Weights
from unmask_api.train_job import LoRA, TrainSpec

__all__ = ["Reference", "blank_weights", "first_weights", "reference_of"]


def first_weights(spec: TrainSpec, config: ModelConfig, world: World) -> Weights:
    """The weights that the run starts from: loaded, or random by the job's seed.

    However they are shared out, they are the same; no process holds the whole model unless each does.

    Raises:
        ModelError: What is to be loaded is damaged.
    """
    if spec.lora is not None:
        return _adapted(spec, spec.lora, config, world)
    if sharding_plan(spec.parallelism, processes=world.size) is None:
        return _replicated(first_model(spec, config, world.device), spec, world)
    weights = _sharded(config, spec, world)
    uri = spec.model.init.uri
    weights.fill(initial_values(config, seed=spec.data.seed) if uri is None else read_values(uri))
    return weights


def blank_weights(spec: TrainSpec, config: ModelConfig, world: World) -> Weights:
    """Weights of a model of ``config``, to be restored from a checkpoint.

    Raises:
        ModelError: They are adapters, and their base, which is loaded, is damaged.
    """
    if spec.lora is not None:
        return _adapted(spec, spec.lora, config, world)
    if sharding_plan(spec.parallelism, processes=world.size) is not None:
        return _sharded(config, spec, world)
    model = build(config, device="meta").to_empty(device=world.device)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
    return _replicated(model, spec, world)


@dataclass(frozen=True, slots=True)
class Reference:
    """A model that does not learn, to compare with."""

    model: Callable[[], AbstractContextManager[LanguageModel]]
    """In the block, the model."""
    followers: tuple[LanguageModel, ...] = ()
    """Itself, where it is shared out and all processes must run it together."""


def reference_of(spec: TrainSpec, path: Path, weights: Weights, world: World) -> Reference:
    """What ``weights`` were when they kept a reference in the folder ``path``.

    Beside adapters it is the same base with the adapters of that time. Otherwise it is a model of its own,
    arranged like the one that learns but without gradients, in the number format of forward passes; so
    it computes what the weights it was saved from did, bit for bit.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    if isinstance(weights, AdaptedWeights):
        adapters = weights.read_reference(path)
        return Reference(lambda: weights.as_of(adapters))
    if sharding_plan(spec.parallelism, processes=world.size) is None:
        dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        model = load(path, device=world.device, dtype=dtype).requires_grad_(False)
        return Reference(lambda: nullcontext(model))
    shared = _sharded(read_config(path), spec, world)
    shared.fill(read_values(path))
    frozen = shared.frozen()
    return Reference(lambda: nullcontext(frozen), (frozen,))


def _adapted(spec: TrainSpec, lora: LoRA, config: ModelConfig, world: World) -> AdaptedWeights:
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    uri = spec.model.init.uri
    if uri is None:
        model = build(config, device=world.device, dtype=dtype, seed=spec.data.seed)
    else:
        model = load(Path(uri), device=world.device)
        own = next(model.parameters()).dtype
        if own != dtype:
            raise UsageError(
                f"spec.precision: got {spec.precision}, but {uri} is in {str(own)[6:]}, and "
                "lora leaves that as it is; change precision, or convert the files (unmask convert --dtype)"
            )
    return AdaptedWeights(model, lora, seed=spec.data.seed, leads=world.leads, recompute=_recomputes(spec))


def _replicated(model: LanguageModel, spec: TrainSpec, world: World) -> Weights:
    return Weights(model, precision=spec.precision, leads=world.leads, recompute=_recomputes(spec))


def _sharded(config: ModelConfig, spec: TrainSpec, world: World) -> ShardedWeights:
    plan = sharding_plan(spec.parallelism, processes=world.size)
    assert plan is not None
    return ShardedWeights(config, world, plan, precision=spec.precision, recompute=_recomputes(spec))


def _recomputes(spec: TrainSpec) -> bool:
    return spec.parallelism.activation_checkpointing == "Full"
