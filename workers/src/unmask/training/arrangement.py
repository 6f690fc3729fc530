"""Who holds which part of the model: from a job to its weights, replicated or shared out."""

from pathlib import Path

import torch

from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.loading import build, initial_values, load, read_values
from unmask.models.registry import read_config
from unmask.training.distributed import World
from unmask.training.preparation import first_model
from unmask.training.sharding.plan import sharding_plan
from unmask.training.sharding.weights import ShardedWeights
from unmask.training.weights import Weights
from unmask_api.train_job import TrainSpec

__all__ = ["blank_weights", "first_weights", "reference_model"]


def first_weights(spec: TrainSpec, config: ModelConfig, world: World) -> Weights:
    """The weights that the run starts from: loaded, or random by the job's seed.

    However they are shared out, they are the same; no process holds the whole model unless each does.

    Raises:
        ModelError: What is to be loaded is damaged.
    """
    if sharding_plan(spec.parallelism, processes=world.size) is None:
        return _replicated(first_model(spec, config, world.device), spec, world)
    weights = _sharded(config, spec, world)
    uri = spec.model.init.uri
    weights.fill(initial_values(config, seed=spec.data.seed) if uri is None else read_values(uri))
    return weights


def blank_weights(spec: TrainSpec, config: ModelConfig, world: World) -> Weights:
    """Weights of a model of ``config``, to be restored from a checkpoint."""
    if sharding_plan(spec.parallelism, processes=world.size) is not None:
        return _sharded(config, spec, world)
    model = build(config, device="meta").to_empty(device=world.device)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
    return _replicated(model, spec, world)


def reference_model(spec: TrainSpec, path: Path, world: World) -> LanguageModel:
    """The model in the folder ``path``, which never learns: arranged as the one that does, without gradients.

    Its number format is that of forward passes, so that it computes what the weights it was saved from did.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    if sharding_plan(spec.parallelism, processes=world.size) is None:
        dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        return load(path, device=world.device, dtype=dtype).requires_grad_(False)
    weights = _sharded(read_config(path), spec, world)
    weights.fill(read_values(path))
    return weights.frozen()


def _replicated(model: LanguageModel, spec: TrainSpec, world: World) -> Weights:
    return Weights(model, precision=spec.precision, leads=world.leads, recompute=_recomputes(spec))


def _sharded(config: ModelConfig, spec: TrainSpec, world: World) -> ShardedWeights:
    plan = sharding_plan(spec.parallelism, processes=world.size)
    assert plan is not None
    return ShardedWeights(config, world, plan, precision=spec.precision, recompute=_recomputes(spec))


def _recomputes(spec: TrainSpec) -> bool:
    return spec.parallelism.activation_checkpointing == "Full"
