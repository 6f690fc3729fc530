"""From a job to all that its first step needs, but the weights: files read, everything checked.

Whatever is wrong with the manifest, the data, the tokenizer or the model's configuration
comes to light here, before anything is computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmask.errors import ModelError, UsageError
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.loading import build, load, weights_digest
from unmask.models.registry import parse_config, read_config
from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Library, cache_folder
from unmask.training.distributed import World
from unmask.training.evaluation import Evaluator
from unmask.training.identity import identity
from unmask.training.plan import StagePlan, plan_stages
from unmask.training.sharding.plan import check_parallelism
from unmask.training.stream import DocumentStream
from unmask_api.train_job import TrainSpec

__all__ = ["PreparedStage", "Preparation", "first_model", "prepare", "starting_point"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStage:
    """One stage and its data."""

    plan: StagePlan
    stream: DocumentStream
    evaluator: Evaluator | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What a job needs beside weights."""

    spec: TrainSpec
    config: ModelConfig
    """Of the model that the run starts from."""
    tokenizer: Tokenizer
    stages: tuple[PreparedStage, ...]
    identity: Mapping[str, Any]


def prepare(spec: TrainSpec, world: World) -> Preparation:
    """Read the model's configuration, the tokenizer and the data of all stages.

    Raises:
        UsageError, DataError, ModelError: Naming the field or file.
    """
    config = _config(spec)
    check_parallelism(spec.parallelism, config, processes=world.size)
    tokenizer = _tokenizer(spec, config)
    plans = plan_stages(spec, config, tokenizer)
    library = Library(tokenizer, eos_token_id=config.eos_token_id, cache=cache_folder(spec))
    stages = tuple(_stage(plan, spec, library, world) for plan in plans)
    return Preparation(
        spec=spec,
        config=config,
        tokenizer=tokenizer,
        stages=stages,
        identity=identity(spec, config, plans, library, base=_base_digest(spec, world)),
    )


def _base_digest(spec: TrainSpec, world: World) -> str | None:
    """What tells the base of adapters from any other; one process reads its files."""
    uri = spec.model.init.uri
    if spec.lora is None or uri is None:
        return None
    with world.together():
        own = weights_digest(Path(uri)) if world.leads else ""
    return world.all_bytes(own.encode())[0].decode()


def starting_point(spec: TrainSpec) -> tuple[ModelConfig, Tokenizer]:
    """The configuration of the model that the run starts from, and the tokenizer."""
    config = _config(spec)
    return config, _tokenizer(spec, config)


def first_model(spec: TrainSpec, config: ModelConfig, device: torch.device) -> LanguageModel:
    """The float32 model that the run starts from: loaded, or random by the job's seed."""
    if spec.model.init.uri is not None:
        return load(Path(spec.model.init.uri), device=device, dtype=torch.float32)
    return build(config, device=device, seed=spec.data.seed)


def _config(spec: TrainSpec) -> ModelConfig:
    init = spec.model.init
    if init.uri is not None:
        return read_config(Path(init.uri))
    if init.config is None:
        raise UsageError("spec.model.init: got neither config nor uri; give one")
    return parse_config(init.config, source="spec.model.init.config")


def _tokenizer(spec: TrainSpec, config: ModelConfig) -> Tokenizer:
    uri = spec.model.tokenizer.uri if spec.model.tokenizer else spec.model.init.uri
    if uri is None:
        raise UsageError("spec.model.tokenizer: a model from an inline config brings none; set tokenizer.uri")
    tokenizer = Tokenizer.load(uri)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{uri}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model a vocab_size of "
            f"{config.vocab_size}; raise vocab_size in the model's config, or use the model's own tokenizer"
        )
    return tokenizer


def _stage(plan: StagePlan, spec: TrainSpec, library: Library, world: World) -> PreparedStage:
    overlong = spec.data.overlong
    corpus = library.corpus(
        plan.train, length=plan.length, overlong=overlong, turns=plan.turns, multiples=plan.multiples
    )
    evaluator = None
    if spec.evaluation is not None and plan.validation:
        evaluator = Evaluator(
            spec.evaluation,
            plan,
            library,
            world,
            seed=spec.data.seed,
            overlong=overlong,
            micro_batch_rows=spec.parallelism.micro_batch_rows,
        )
    stream = DocumentStream(corpus, seed=spec.data.seed, stage=plan.index)
    return PreparedStage(plan=plan, stream=stream, evaluator=evaluator)
