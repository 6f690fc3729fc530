"""A slot: one tensor of a published checkpoint and the part of a module's state that it fills.

A family's ``weights`` module lists its slots once; loading and saving both walk that
list, one tensor at a time, so neither direction can drift from the other and neither
needs a second copy of the model in memory.
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

__all__ = ["Slot"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One published tensor."""

    name: str
    """On disk."""
    parameter: str
    """Parameter or buffer of the module, as ``state_dict`` names it."""
    index: tuple[int | slice, ...]
    """The part of ``parameter`` that the tensor fills; empty for all of it."""
    shape: tuple[int, ...]
    """Of the tensor on disk."""

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Self:
        """A tensor that fills a parameter of the same name."""
        return cls(name, name, (), shape)

    def view(self, state: dict[str, Tensor]) -> Tensor:
        """The part of ``state`` that the tensor fills, sharing its storage."""
        parameter = state[self.parameter]
        return parameter[self.index] if self.index else parameter
