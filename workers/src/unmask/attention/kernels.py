"""Where Triton's kernels run."""

from functools import cache
from importlib.util import find_spec

import torch

__all__ = ["run_on"]


def run_on(device: torch.device) -> bool:
    """Whether kernels can work on tensors of ``device``: it is a CUDA device, and Triton is installed."""
    return device.type == "cuda" and _is_installed()


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None
