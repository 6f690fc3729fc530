"""The smallest change of a manifest's parallelism with which its job fits.

Everything that is tried keeps to the rules of the manifest and changes no result of the
training beyond the order of sums. Smallest is: fewest GPUs more, then fewest fields changed, then
what costs least time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unmask.models.config import ModelConfig
from unmask.training.sizing.devices import Device
from unmask.training.sizing.estimate import Assumptions, JobEstimate, estimate
from unmask_api.train_job import Parallelism, TrainSpec

__all__ = ["Remedy", "remedy_for"]

_FIELDS = ("micro_batch_rows",)
"""What may be changed, what costs least time first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change with which a job fits."""

    changes: tuple[tuple[str, object, object], ...]
    """Field of ``spec.parallelism`` as manifests name it, what it was, what it should be."""
    estimate: JobEstimate

    def __str__(self) -> str:
        """In words, for one line."""
        told = [f"parallelism.{field}: {new} (was {old})" for field, old, new in self.changes]
        peak = max(stage.peak_bytes for stage in self.estimate.stages) / 2**30
        return f"{' and '.join(told)} would take {peak:.1f} GiB"


def remedy_for(
    spec: TrainSpec, configs: Sequence[ModelConfig], device: Device, assumptions: Assumptions
) -> Remedy | None:
    """The smallest change with which the job fits; None if nothing that is tried does."""
    own = spec.parallelism
    for candidate in sorted(_candidates(spec), key=lambda one: _cost(own, one)):
        changed = spec.model_copy(update={"parallelism": candidate})
        found = estimate(changed, configs, device, assumptions)
        if not found.too_large:
            return Remedy(changes=tuple(_changes(own, candidate)), estimate=found)
    return None


def _candidates(spec: TrainSpec) -> Iterator[Parallelism]:
    rows = spec.parallelism.micro_batch_rows
    while rows > 1:
        rows //= 2
        yield spec.parallelism.model_copy(update={"micro_batch_rows": rows})


def _cost(own: Parallelism, other: Parallelism) -> tuple[int, int, list[int], int]:
    """More GPUs, more fields, dearer fields, smaller micro-batches: all cost."""
    differing = [place for place, name in enumerate(_FIELDS) if _value(own, name) != _value(other, name)]
    return other.processes, len(differing), differing, -other.micro_batch_rows


def _changes(own: Parallelism, other: Parallelism) -> Iterator[tuple[str, object, object]]:
    for name in _FIELDS:
        if _value(own, name) != _value(other, name):
            alias = Parallelism.model_fields[name].alias or name
            yield alias, _value(own, name), _value(other, name)


def _value(parallelism: Parallelism, name: str) -> object:
    return parallelism.model_dump()[name]
