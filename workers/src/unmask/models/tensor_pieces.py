"""Bytes of a checkpoint as torch tensors and back, checked on the way."""

from collections.abc import Mapping

import torch
from torch import Tensor

from unmask.errors import ModelError

__all__ = ["DTYPES", "as_bytes", "dtype_name", "finite"]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The dtypes that weights may have, by their names in safetensors."""


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls ``dtype``."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def finite(content: bytearray, dtype: str, *, at: str) -> Tensor:
    """The elements that ``content`` holds, flat and sharing its memory.

    Raises:
        ModelError: Naming ``at``, if one is infinite or not a number. Such a weight makes every output
            that it touches useless, and no training mends it.
    """
    elements = torch.frombuffer(content, dtype=DTYPES[dtype])
    low, high = torch.aminmax(elements)  # both are NaN if one element is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ModelError(f"{at}: has elements that are infinite or not a number; the checkpoint is damaged")
    return elements


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of ``tensor`` in order; shares its memory where that is in one piece, on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
