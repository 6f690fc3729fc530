"""Boxes: which part of a tensor a process holds, and how parts of one tensor meet.

A box is a range of indices in every dimension. Checkpoints store boxes, processes hold
boxes, and published tensors are boxes of ours; whatever is copied from one to another is
where two boxes overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unmask.models.slots import Slot

__all__ = ["Box", "copy_overlap", "overlap", "region"]

Range = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The part of a tensor that this process holds."""

    tensor: Tensor
    """The part itself; may be empty."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    """First index of the part in each dimension of the whole."""
    kept: bool = True
    """Whether this process is the one that stores the part: of several that hold it, one does."""

    @classmethod
    def whole(cls, tensor: Tensor, *, kept: bool = True) -> "Box":
        """All of ``tensor``."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.ndim, kept)


def overlap(
    offsets: Sequence[int], shape: Sequence[int], other_offsets: Sequence[int], other_shape: Sequence[int]
) -> tuple[Range, Range] | None:
    """Where two boxes of one tensor meet, as indices into the one and into the other; None: nowhere."""
    here: list[slice] = []
    there: list[slice] = []
    for offset, size, other_offset, other_size in zip(
        offsets, shape, other_offsets, other_shape, strict=True
    ):
        first = max(offset, other_offset)
        end = min(offset + size, other_offset + other_size)
        if first >= end:
            return None
        here.append(slice(first - offset, end - offset))
        there.append(slice(first - other_offset, end - other_offset))
    return tuple(here), tuple(there)


def copy_overlap(source: Tensor, source_offsets: Sequence[int], box: Box) -> None:
    """Copy into ``box`` what of it is in ``source``, a part of the same tensor."""
    met = overlap(source_offsets, source.shape, box.offsets, box.tensor.shape)
    if met is not None:
        box.tensor[met[1]].copy_(source[met[0]])


def region(slot: Slot, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and shape of the box of a parameter that ``slot`` fills."""
    ranges = [
        (index, 1) if isinstance(index, int) else (index.start or 0, index.stop - (index.start or 0))
        for index in slot.index
    ]
    ranges += [(0, size) for size in shape[len(ranges) :]]
    return tuple(first for first, _ in ranges), tuple(size for _, size in ranges)
