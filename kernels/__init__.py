"""Kernels: each file holds the mathematics, a PyTorch version that runs anywhere, and a Triton version for GPUs.

The PyTorch version is the specification. A tensor on a GPU goes to Triton unless `use("torch")` was said (the
config key `kernels`); float64 has no Triton version. Triton's interpreter, TRITON_INTERPRET=1, runs the same
kernels on a CPU for the tests, and `kernels/aot.py` compiles them for three generations of GPUs without one.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from runtime import cpu
from runtime.cpu import without_onednn  # noqa: F401  for model.py, which imports kernels alone
from runtime.device import INTERPRETED, on_triton, tl, triton, use  # noqa: F401


def missing_rows(x: torch.Tensor) -> int:
    """Rows that x [N, ...] lacks of what PyTorch multiplies best here; Triton needs none."""
    return 0 if on_triton(x) else cpu.missing_rows(x)


def jit(function):
    """A Triton kernel, or the bare function where there is no Triton."""
    return triton.jit(function) if triton else function


def architecture(device: torch.device) -> int:
    """80, 90 or 100: the generation whose tile sizes a kernel takes on this device; in the interpreter 90.

    Consumer chips (8.6, 8.9, 12) have 99 KiB of shared memory: the tiles of 80 fit but for heads wider than 128.
    """
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


class Build(NamedTuple):
    """One kernel as it is shipped: what ahead-of-time compilation (`kernels/aot.py`) must accept."""

    name: str               # "attention forward", and what varies: "D 128, window"
    kernel: object          # the function under @jit
    arguments: dict         # name -> "*bf16", "*i32", "i32", "i32:16" (divisible by 16), "fp32", or a value for a tl.constexpr
    warps: int
    stages: int
    matmul: bool = False    # must use the matrix units
    wide: bool = False      # memory-bound: must move 128 bits at a time
