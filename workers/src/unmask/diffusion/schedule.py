"""The block size as a function of the step (LLaDA2.0, arXiv 2512.15745, section 4.1).

The paper grows the block from 1 to the whole sequence (warm-up), stays there (stable),
and shrinks it back to the serving block (decay); it does not disclose how long each size
lasts. Here a stage of training names its sizes, and each lasts an equal share of the
stage's steps; unequal shares are several stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BlockSchedule"]


@dataclass(frozen=True, slots=True)
class BlockSchedule:
    """Block sizes in order, in equal shares of ``steps``; a remainder goes to the first ones."""

    sizes: Sequence[int]
    steps: int

    def __post_init__(self) -> None:
        """Check that every size gets at least one step."""
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"block sizes must be positive, got {list(self.sizes)}")
        if self.steps < len(self.sizes):
            raise ValueError(f"{len(self.sizes)} block sizes need at least as many steps, got {self.steps}")

    def lasting(self) -> list[tuple[int, int]]:
        """Each size in its turn, and how many steps have it."""
        share, longer = divmod(self.steps, len(self.sizes))
        return [(size, share + (index < longer)) for index, size in enumerate(self.sizes)]

    def size_at(self, step: int) -> int:
        """The block size of step ``step``, counted from 0 inside the stage.

        Raises:
            ValueError: If the stage has no such step.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"the stage has steps 0 to {self.steps - 1}, got {step}")
        share, longer = divmod(self.steps, len(self.sizes))
        boundary = longer * (share + 1)
        index = step // (share + 1) if step < boundary else longer + (step - boundary) // share
        return self.sizes[index]
