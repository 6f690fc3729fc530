"""The smallest change of a manifest's parallelism with which its job fits.

Everything that is tried keeps to the rules of the manifest, and changes no result of the
training beyond the order of sums. Smallest is: fewest GPUs more, then fewest fields changed, then
what costs least time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from unmask.errors import UsageError
from unmask.models.config import ModelConfig
from unmask.models.shape import ModelShape, shape_of
from unmask.training.sizing.devices import Device
from unmask.training.sizing.estimate import Assumptions, JobEstimate, estimate, plan_of, stage_memory
from unmask_api.train_job import Parallelism, TrainSpec

__all__ = ["Remedy", "remedy_for"]

_FIELDS = (
    "micro_batch_rows",
    "shard",
    "expert_parallel",
    "activation_checkpointing",
    "replicas",
    "nodes",
)
"""What may be changed, what costs least time first."""

_MOST_NODES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change with which a job fits."""

    changes: tuple[tuple[str, object, object], ...]
    """Field of ``spec.parallelism`` as manifests name it, what it was, what it should be (None: nothing)."""
    estimate: JobEstimate

    def __str__(self) -> str:
        """In words, for one line."""
        told = [
            f"parallelism.{field}: {new} (was {old})" if new is not None else f"without parallelism.{field}"
            for field, old, new in self.changes
        ]
        peak = max(stage.peak_bytes for stage in self.estimate.stages) / 2**30
        return f"{' and '.join(told)} would take {peak:.1f} GiB of each of {self.estimate.gpus}"


def remedy_for(
    spec: TrainSpec, configs: Sequence[ModelConfig], device: Device, assumptions: Assumptions
) -> Remedy | None:
    """The smallest change with which the job fits; None if nothing that is tried does."""
    own = spec.parallelism
    shapes = [shape_of(config) for config in configs]
    available = estimate(spec, configs, device, assumptions).available_bytes
    for nodes in _nodes(spec):
        candidates = sorted(_candidates(spec, shapes, nodes), key=lambda one: _cost(own, one))
        for candidate in candidates:
            changed = spec.model_copy(update={"parallelism": candidate})
            if _peak(changed, shapes, assumptions) <= available:
                found = estimate(changed, configs, device, assumptions)
                return Remedy(changes=tuple(_changes(own, candidate)), estimate=found)
    return None


def _peak(spec: TrainSpec, shapes: Sequence[ModelShape], assumptions: Assumptions) -> int:
    """The most bytes that a process holds in any stage."""
    held = (
        stage_memory(stage, shape, spec, assumptions.documents)
        for stage, shape in zip(spec.stages, shapes, strict=True)
    )
    return max(max(memory.total, converting) for memory, converting in held)


def _nodes(spec: TrainSpec) -> Iterator[int]:
    """As many nodes as there are, and twice as many, as long as processes share the rows alike."""
    nodes = spec.parallelism.nodes
    while nodes <= _MOST_NODES:
        processes = nodes * spec.parallelism.processes_per_node
        if all(stage.rows_per_step % processes == 0 for stage in spec.stages):
            yield nodes
        nodes *= 2


def _candidates(spec: TrainSpec, shapes: Sequence[ModelShape], nodes: int) -> Iterator[Parallelism]:
    """Every arrangement on ``nodes`` nodes that the rules of a manifest allow."""
    own = spec.parallelism
    processes = nodes * own.processes_per_node
    arrangements: list[dict[str, object]] = [
        {"shard": own.shard, "replicas": own.replicas, "expert_parallel": own.expert_parallel}
    ]
    if processes > 1 and spec.lora is None:  # adapters are not shared out
        arrangements += [
            {"shard": "Full", "replicas": None, "expert_parallel": number}
            for number in range(1, processes + 1)
            if processes % number == 0
        ]
    rows = [own.micro_batch_rows]
    while rows[-1] > 1:
        rows.append(rows[-1] // 2)
    checkpointing = ["Full"] if own.activation_checkpointing == "Full" else ["None", "Full"]
    for arrangement, micro, kept in product(arrangements, rows, checkpointing):
        changes = {"nodes": nodes, "micro_batch_rows": micro, "activation_checkpointing": kept}
        candidate = own.model_copy(update=arrangement | changes)
        try:
            plan_of(candidate, shapes)
        except UsageError:
            continue
        yield candidate


def _cost(own: Parallelism, other: Parallelism) -> tuple[int, list[int], int, int]:
    """More fields cost more, then dearer ones, then smaller micro-batches, then wider groups of experts."""
    differing = [place for place, name in enumerate(_FIELDS) if _value(own, name) != _value(other, name)]
    return len(differing), differing, -other.micro_batch_rows, other.expert_parallel


def _changes(own: Parallelism, other: Parallelism) -> Iterator[tuple[str, object, object]]:
    for name in _FIELDS:
        if _value(own, name) != _value(other, name):
            alias = Parallelism.model_fields[name].alias or name
            yield alias, _value(own, name), _value(other, name)


def _value(parallelism: Parallelism, name: str) -> object:
    return parallelism.model_dump()[name]
