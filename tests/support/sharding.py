"""What ranks do in tests of sharded training, and how their shares are put together again."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.models import TINY
from support.ranks import join, start, start_ranks
from support.training import training_job
from unmask_api.train_job import DiffusionTrainJob, TrainSpec

Json = dict[str, Any]

ARRANGEMENTS: dict[str, tuple[int, Json]] = {
    "replicated x2": (2, {}),
    "full x2": (2, {"shard": "Full"}),
    "experts 2 x2": (2, {"shard": "Full", "expertParallel": 2}),
    "full x4": (4, {"shard": "Full"}),
    "hybrid x4": (4, {"shard": "Hybrid", "replicas": 2}),
    "experts 2 x4": (4, {"shard": "Full", "expertParallel": 2}),
    "experts 4 x4": (4, {"shard": "Full", "expertParallel": 4}),
    "hybrid, experts 2 x4": (4, {"shard": "Hybrid", "replicas": 2, "expertParallel": 2}),
}
"""By name: number of ranks, and the fields of ``parallelism``."""


def block_job(
    folder: Path, name: str, parallelism: Json, *, steps: int = 10, steady: bool = False, **values: Any
) -> DiffusionTrainJob:
    """A job of one block diffusion stage from random weights, with the run folder ``folder/name``.

    Its logits are large, and so are the weights of some tokens. A ``steady`` one is for comparing losses to
    their last digits: first weights of the usual size, and tokens that all weigh alike.
    """
    stage: Json = {
        "name": "blocks",
        "objective": "bdlm",
        "blockSizes": [4],
        "steps": steps,
        "length": 32,
        "rowsPerStep": 4,
        "learningRate": {"peak": "1e-3"},
    }
    config = TINY
    if steady:
        config = {key: value for key, value in TINY.items() if key != "initializer_range"}
        stage["noise"] = {"low": "0.3", "high": "0.8", "scope": "Document", "weight": "Flat"}
    return training_job(
        folder,
        {
            "spec.model.init.config": config,
            "spec.stages": [stage],
            "spec.parallelism": {"microBatchRows": 1} | parallelism,
            "spec.checkpoint": {"uri": str(folder / name), "everySteps": 1000},
            **{f"spec.{field}": value for field, value in values.items()},
        },
    )


def stop_after(job: DiffusionTrainJob, step: int, *, ranks: int, note_inputs: bool = False) -> int:
    """Run until SIGTERM after ``step``, wait until all ranks have saved, and return the step they saved."""
    run = Path(job.spec.checkpoint.uri)
    go = Path(f"{run}.go")
    go.unlink(missing_ok=True)
    processes = start_ranks(job, ranks=ranks, pause_after=step, note_inputs=note_inputs)
    deadline = time.monotonic() + 60
    while not any(line["step"] == step for line in _lines(run)):
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)
    os.kill(processes[-1].pid or 0, signal.SIGTERM)
    time.sleep(0.1)
    go.touch()
    assert join(processes) == [75] * ranks
    report: Json = json.loads((run / "termination.json").read_text())
    return int(report["step"])


def kill_at_a_random_moment(job: DiffusionTrainJob, chance: random.Random, *, ranks: int) -> bool:
    """Start an attempt and kill one rank after its first step; False if the attempt ended before that."""
    run = Path(job.spec.checkpoint.uri)
    before = len(_lines(run))
    processes = start_ranks(job, ranks=ranks)
    while processes[0].is_alive() and len(_lines(run)) <= before:
        time.sleep(0.001)
    time.sleep(chance.random() * 0.5)
    chance.choice(processes).kill()
    codes = join(processes)
    assert -signal.SIGKILL in codes or codes == [0] * ranks, f"not by our doing: {codes}"
    return -signal.SIGKILL in codes


def export_sizes(job: DiffusionTrainJob, *, ranks: int) -> Json:
    """How many elements ranks add up at a time while they write the first model, and those of each slot."""
    run = Path(job.spec.checkpoint.uri)
    run.mkdir(parents=True, exist_ok=True)
    text = job.model_dump_json(by_alias=True, exclude_none=True)
    assert join(start(_export, text, str(run), ranks=ranks)) == [0] * ranks
    sizes: Json = json.loads((run / "sizes.json").read_text())
    return sizes


def _export(text: str, run: str) -> None:
    import torch.distributed as dist

    from unmask.models.loading import slots_of
    from unmask.training.arrangement import first_weights
    from unmask.training.distributed import joined_world
    from unmask.training.preparation import prepare

    spec = DiffusionTrainJob.from_json(text).spec
    with joined_world() as world:
        config = prepare(spec, world).config
        weights = first_weights(spec, config, world)
        seen: list[int] = []
        plain = dist.all_reduce

        def noting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            seen.append(tensor.numel())
            return plain(tensor, *arguments, **options)

        dist.all_reduce = noting
        weights.export(Path(run, "model"), companions={})
        dist.all_reduce = plain
        if world.leads:
            slots = [torch.Size(slot.shape).numel() for slot in slots_of(config)]
            Path(run, "sizes.json").write_text(json.dumps({"summed": seen, "slots": slots}))


def save_twice(folder: Path, *, ranks: int) -> list[Json]:
    """Save a tensor of which each rank holds two rows; the second time the last rank has no room."""
    folder.mkdir(parents=True)
    assert join(start(_save_twice, str(folder), ranks=ranks)) == [0] * ranks
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(ranks)]


def _save_twice(folder: str) -> None:
    from unmask.errors import UnmaskError
    from unmask.training import checkpoints
    from unmask.training.boxes import Box
    from unmask.training.distributed import joined_world
    from unmask.training.manifest import TrainingState

    def no_room(*arguments: object) -> None:
        raise OSError("no space left on device")

    said = []
    with joined_world() as world:
        store = checkpoints.CheckpointStore(Path(folder, "checkpoints"), keep_last=2)
        for step in (1, 2):
            if step == 2 and world.rank == world.size - 1:
                checkpoints.save_file = no_room
            rows = torch.full((2, 3), float(world.rank + step))
            box = Box(rows, (2 * world.size, 3), (2 * world.rank, 0))
            state = TrainingState(stage=0, stage_step=step, cursor=step, stage_seconds=0.0)
            try:
                store.save_shares(world, step=step, state=state, job={}, config={}, boxes=[("rows", box)])
                said.append("saved")
            except UnmaskError as error:
                said.append(str(error))
        Path(folder, f"said-{world.rank}.json").write_text(json.dumps(said))


def _lines(run: Path) -> list[Json]:
    log = run / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def first_gradient(
    job: DiffusionTrainJob, *, ranks: int, looped: bool = False
) -> tuple[dict[str, Tensor], Json]:
    """The gradient of the first step, whole, divided by the normaliser; and what else the ranks found.

    Where it is ``looped``, every grouped product of matrices is a loop over experts.
    """
    return first_gradients([job], ranks=ranks, looped=looped)[0]


def first_gradients(
    jobs: Sequence[DiffusionTrainJob], *, ranks: int, looped: bool = False
) -> list[tuple[dict[str, Tensor], Json]]:
    """The same of each of ``jobs``, which the same processes compute one after the other."""
    texts = [job.model_dump_json(by_alias=True, exclude_none=True) for job in jobs]
    assert join(start(_write_gradients, texts, looped, ranks=ranks)) == [0] * ranks
    return [_gradient_found(job.spec.checkpoint.uri, ranks=ranks) for job in jobs]


def _gradient_found(run: str, *, ranks: int) -> tuple[dict[str, Tensor], Json]:
    found: Json = json.loads(Path(run, "found.json").read_text())
    whole = {name: torch.full(shape, torch.nan) for name, shape in found["shapes"].items()}
    for rank in range(ranks):
        with safe_open(Path(run, f"gradient-{rank}.safetensors"), "pt") as file:
            for key in file.keys():
                name, offsets = key.split("|")
                part = file.get_tensor(key)
                box = whole[name]
                for axis, offset in enumerate(json.loads(offsets)):
                    box = box.narrow(axis, offset, part.shape[axis])
                assert box.isnan().all(), "no part is kept twice"
                box.copy_(part)
    assert not any(tensor.isnan().any() for tensor in whole.values()), "no part is missing"
    return {name: tensor / found["normaliser"] for name, tensor in whole.items()}, found


def _write_gradients(texts: Sequence[str], looped: bool) -> None:
    from unmask.training.distributed import joined_world

    if looped:
        _loop_over_experts()
    with joined_world() as world:
        for text in texts:
            _write_gradient(DiffusionTrainJob.from_json(text).spec, world)


def _loop_over_experts() -> None:
    from unmask.models import moe
    from unmask.training.sharding import experts

    def linear(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        rows, starts = [], [0, *ends_E.tolist()]
        for expert, weight_OI in enumerate(weight_EOI.unbind()):
            rows.append(x_NI[starts[expert] : starts[expert + 1]] @ weight_OI.T)
        return torch.cat(rows)

    def outer(left_NO: Tensor, right_NI: Tensor, ends_E: Tensor) -> Tensor:
        products, starts = [], [0, *ends_E.tolist()]
        for first, end in itertools.pairwise(starts):
            products.append(left_NO[first:end].T @ right_NI[first:end])
        return torch.stack(products)

    moe.grouped_linear = experts.grouped_linear = linear
    moe._grouped_outer = outer


def _write_gradient(spec: TrainSpec, world: Any) -> None:
    from unmask.training.arrangement import first_weights
    from unmask.training.balance import Balancing
    from unmask.training.packing import make_rows
    from unmask.training.preparation import prepare
    from unmask.training.steps import gradient_step, micro_batches, model_inputs
    from unmask.training.stream import Purpose, philox_key

    run = spec.checkpoint.uri
    Path(run).mkdir(parents=True, exist_ok=True)
    preparation = prepare(spec, world)
    weights = first_weights(spec, preparation.config, world)
    stage = preparation.stages[0]
    plan, config = stage.plan, preparation.config
    layout = stage.stream.step(
        0,
        rows=plan.rows,
        length=plan.length,
        multiple=plan.multiple(0),
        random_length=plan.random_length,
    )
    rows = make_rows(
        layout,
        stage.stream.corpus,
        rank=world.rank,
        world=world.size,
        responses_only=plan.responses_only,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    key = philox_key(spec.data.seed, Purpose.NOISE, plan.index)
    batches = (
        model_inputs(
            batch,
            plan,
            weights.model,
            block_length=plan.block_length(0),
            noise_key=key,
            disturbance=plan.disturbance(0),
        )
        for batch in micro_batches(rows, spec.parallelism.micro_batch_rows)
    )
    totals = gradient_step(
        weights,
        batches,
        world,
        stop=False,
        confidence_weight=plan.confidence_weight,
        balancing=Balancing.of(spec.balance),
    )
    boxes = {name: box for name, box in weights.boxes() if name in weights.named}
    parts = {
        f"{name}|{json.dumps(box.offsets)}": weights.named[name].grad.contiguous()
        for name, box in boxes.items()
        if box.kept and box.tensor.numel()
    }
    save_file(parts, Path(run, f"gradient-{world.rank}.safetensors"))
    norm = weights.norm()
    held = sum(tensor.numel() for tensor in weights.named.values())
    every = [int(one) for one in world.all_bytes(str(held).encode())]
    if world.leads:
        found = {
            "loss": totals.loss,
            "balance": [totals.balance.load, totals.balance.z] if totals.balance else [],
            "normaliser": totals.normaliser,
            "norm": norm / totals.normaliser,
            "tokens": [counts.tolist() for counts in totals.expert_tokens],
            "shapes": {name: list(box.shape) for name, box in boxes.items()},
            "held": every,
        }
        Path(run, "found.json").write_text(json.dumps(found))
