"""``unmask plan -f FILE``: what a training job takes, and whether it fits, before it is started.

``unmask plan serve`` is in :mod:`unmask.cli.plan_serving`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from unmask.cli import plan_serving
from unmask.cli.named_model import config_named
from unmask.cli.validate import read_job
from unmask.errors import UsageError

if TYPE_CHECKING:
    from unmask.models.config import ModelConfig
    from unmask.training.sizing.estimate import JobEstimate, StageEstimate
    from unmask_api.train_job import DiffusionTrainJob

__all__ = ["command"]

_GIB = 2**30


@click.group(
    "plan", invoke_without_command=True, short_help="Say what a training job takes, and whether it fits."
)
@click.option("-f", "--file", "path", type=click.Path(path_type=Path), help="The manifest of the job.")
@click.option(
    "--config",
    "model",
    metavar="CONFIG",
    help="The model that the job starts from: a config.json, or the name of a published model (llada2-mini, "
    "llada2-flash, ling-mini, ling-flash, llada-moe-7b-a1b, smollm2-135m, qwen3-0.6b, qwen3-30b-a3b, "
    "olmoe-1b-7b).  [default: what the manifest names]",
)
@click.option("--gpu", help="a100-40g, a100-80g, l40s-48g, h100-80g or h200-141g.  [default: h100-80g]")
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="GiB of a GPU of your own.")
@click.option(
    "--peak-tflops",
    type=click.FloatRange(0, min_open=True),
    help="Its peak in the job's precision, in 10^12 dense operations a second.",
)
@click.option(
    "--mfu",
    type=click.FloatRange(0, 1, min_open=True),
    help="Assumed share of that peak that training reaches.  [default: 0.35]",
)
@click.option(
    "--reserve",
    type=click.FloatRange(0),
    help="Assumed GiB that driver, communication and fragmentation take.  [default: 4]",
)
@click.option(
    "--document-tokens",
    type=click.IntRange(1),
    help="Assumed length of a document.  [default: a row each]",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(0),
    default=0,
    help="Assumed tokens of it that are given, where a stage learns from answers.  [default: 0]",
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
@click.pass_context
def command(
    context: click.Context,
    path: Path | None,
    model: str | None,
    gpu: str | None,
    memory: float | None,
    peak_tflops: float | None,
    mfu: float | None,
    reserve: float | None,
    document_tokens: int | None,
    prompt_tokens: int,
    as_json: bool,
) -> None:
    """Say what a training job takes, and whether it fits; or how experts in shards are served.

    For each stage: parameters, tokens, useful arithmetic, memory of a GPU part by part, and hours. Neither
    weights nor data are read. A job that does not fit is refused with exit code 64 and the smallest change
    that fits. Hours and fitting rest on assumptions, which are printed and can be replaced; the arithmetic
    and the memory of weights, gradients and optimiser do not.
    """
    if context.invoked_subcommand is not None:
        _expect_nothing_given(context)
        return
    if path is None:
        raise click.MissingParameter(ctx=context, param=_parameter(context, "path"))
    from unmask.training.sizing.devices import MFU, RESERVE_GIB, device_named
    from unmask.training.sizing.estimate import Assumptions, estimate, stage_configs
    from unmask.training.sizing.remedies import remedy_for
    from unmask.training.sizing.work import Documents

    job = read_job(path)
    device = device_named(gpu, memory_gib=memory, peak_tflops=peak_tflops)
    if prompt_tokens and document_tokens is None:
        raise UsageError("--prompt-tokens is a part of a document: give --document-tokens too")
    documents = Documents(tokens=document_tokens, prompt=prompt_tokens) if document_tokens else None
    assumptions = Assumptions(
        mfu=mfu if mfu is not None else MFU,
        reserve_gib=reserve if reserve is not None else RESERVE_GIB,
        documents=documents,
    )
    configs = stage_configs(job.spec, _config(job, model))
    found = estimate(job.spec, configs, device, assumptions)
    remedy = remedy_for(job.spec, configs, device, assumptions) if found.too_large else None
    if as_json:
        changes = {field: new for field, _, new in remedy.changes} if remedy else None
        click.echo(json.dumps(found.to_json_dict() | {"remedy": changes}, indent=2))
    else:
        for label, text in _lines(job, found):
            click.echo(f"{label:<12} {text}")
    if found.too_large:
        raise UsageError(f"{path}: {_refusal(found)}; {remedy or _NOTHING_FITS}")


command.add_command(plan_serving.command)


def _parameter(context: click.Context, name: str) -> click.Parameter:
    return next(parameter for parameter in context.command.params if parameter.name == name)


def _expect_nothing_given(context: click.Context) -> None:
    """See to it that a job's options do not stand before a subcommand, where they would mean nothing.

    Raises:
        UsageError: One does.
    """
    for name in context.params:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = _parameter(context, name).opts[-1]
            raise UsageError(
                f"{option} is of a job here; behind `{context.invoked_subcommand}` stand the options of that"
            )


_NOTHING_FITS = "no other parallelism that was tried fits: take GPUs with more memory, or a smaller model"


def _config(job: "DiffusionTrainJob", model: str | None) -> "ModelConfig":
    """The model that the job starts from: what is given, else what the manifest names."""
    from unmask.models.registry import parse_config, read_config

    if model is not None:
        return config_named(model)
    init = job.spec.model.init
    if init.config is not None:
        return parse_config(init.config, source="spec.model.init.config")
    if init.uri is None:
        raise UsageError(
            "spec.model.init.job: the model of another job is known to a cluster only; give --config with a"
            " copy of its config.json"
        )
    if "://" in init.uri:
        where = "on a volume" if init.uri.startswith("pvc://") else "in an object store"
        raise UsageError(
            f"spec.model.init.uri: {init.uri} is {where}; give --config with a copy of its "
            "config.json or the name of a published model"
        )
    return read_config(Path(init.uri))


def _refusal(found: "JobEstimate") -> str:
    """What does not fit, in a line."""
    worst = max(found.too_large, key=lambda stage: stage.peak_bytes)
    parts = (
        f"{worst.conversion_bytes / _GIB:.1f} while it is converted"
        if worst.conversion_bytes == worst.peak_bytes
        else f"weights {worst.memory.weights / _GIB:.1f}, gradients {worst.memory.gradients / _GIB:.1f}, "
        f"optimiser {worst.memory.optimizer / _GIB:.1f}, the rest "
        f"{(worst.memory.total - worst.memory.states) / _GIB:.1f}"
    )
    return (
        f"stage {worst.name} needs {worst.peak_bytes / _GIB:.1f} GiB of each GPU ({parts}), but "
        f"{found.device.name} has {found.available_bytes / _GIB:.1f} GiB to give"
    )


def _lines(job: "DiffusionTrainJob", found: "JobEstimate") -> Iterator[tuple[str, str]]:
    """What to print: a label, and what it is about."""
    parallelism = job.spec.parallelism
    yield (
        "job",
        f"{job.metadata.name}: {len(found.stages)} stages on {found.gpus} {found.device.name} "
        f"({parallelism.nodes} x {parallelism.processes_per_node}), {job.spec.precision}, "
        f"shard {parallelism.shard}, expertParallel {parallelism.expert_parallel}, "
        f"activationCheckpointing {parallelism.activation_checkpointing}",
    )
    for stage in found.stages:
        yield from _of_stage(stage)
    useful = sum(stage.flops.useful for stage in found.stages)
    yield (
        "total",
        f"{_flops(useful)} useful, {_hours(found.hours)} or {found.hours * found.gpus:,.1f} GPU hours",
    )
    documents = found.assumptions.documents
    filled = (
        f"documents of {documents.tokens} tokens, {documents.prompt} of them prompt"
        if documents
        else "each row one document without a prompt"
    )
    yield (
        "assumed",
        f"{found.assumptions.mfu:.0%} of {found.device.peak(job.spec.precision) / 1e12:g} TFLOP/s reached; "
        f"{found.assumptions.reserve_gib:g} of {found.device.memory_gib:g} GiB left to others; {filled}",
    )


def _of_stage(stage: "StageEstimate") -> Iterator[tuple[str, str]]:
    memory = stage.memory
    yield "stage", f"{stage.name} ({stage.objective}, {stage.architecture})"
    yield "  parameters", f"{stage.parameters:,}, {stage.active_parameters:,} active per token"
    yield (
        "  tokens",
        f"{stage.tokens / stage.steps:,.0f} a step, {stage.tokens:,} in {stage.steps:,} steps; the layers "
        f"compute {stage.positions_per_step:,.0f} positions a step, the output layer "
        f"{stage.predictions_per_step:,.0f}",
    )
    yield (
        "  arithmetic",
        f"{_flops(stage.flops.useful / stage.steps)} useful a step, {_flops(stage.flops.useful)} in all "
        f"(layers {_share(stage.flops.linear, stage)}, attention {_share(stage.flops.attention, stage)}, "
        f"output {_share(stage.flops.head, stage)}"
        + (f", reference {_share(stage.flops.reference, stage)})" if stage.flops.reference else ")"),
    )
    parts = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimiser", memory.optimizer),
        ("activations", memory.activations),
        ("logits", memory.logits),
        ("gathered", memory.gathered),
        ("buffers", memory.buffers),
        *([("reference", memory.reference)] if memory.reference else []),
    )
    yield (
        "  memory",
        f"{memory.total / _GIB:.2f} GiB a GPU: "
        + ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts)
        + (f"; {stage.conversion_bytes / _GIB:.2f} while converting" if stage.conversion_bytes else ""),
    )
    again = stage.flops.recomputed / stage.flops.useful
    yield "  time", _hours(stage.hours) + (f", {again:.0%} of the arithmetic done twice" if again else "")


def _share(part: float, stage: "StageEstimate") -> str:
    return f"{part / stage.flops.useful:.0%}"


def _hours(hours: float) -> str:
    return (
        f"{hours:,.1f} h"
        if hours >= 1
        else f"{hours * 60:.1f} min"
        if hours >= 1 / 60
        else f"{hours * 3600:.2g} s"
    )


def _flops(count: float) -> str:
    for unit, size in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e6:,.2f} MFLOP"
