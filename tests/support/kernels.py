"""Triton's kernels without a GPU: run by its interpreter, or compiled and looked at."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

GPUS = {"A100": 80, "H100 and H200": 90}
"""Compute capabilities that kernels are compiled for."""
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
"""Bytes that a program may have of it (CUDA C++ programming guide, table of compute capabilities)."""


def interpreted(function, *given, **named):
    """What ``function``, of some module, returns in a process whose kernels Triton's interpreter runs.

    They take tensors of the CPU there. Whether it is so is settled when triton is imported, so not in this
    process, in which kernels can be compiled.
    """
    return _process().submit(function, *given, **named).result()


@cache
def _process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    return pool


def compiled(kernel, arguments, constants, *, capability, **options):
    """What ``kernel`` becomes for a GPU of ``capability``, down to its machine code.

    Args:
        kernel: Not an interpreted one.
        arguments: Triton's types of the arguments, by name.
        constants: Values of the ``constexpr`` ones.
        capability: 90 for Hopper.
        options: Warps, stages.
    """
    signature = {name: "constexpr" for name in constants} | arguments
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
