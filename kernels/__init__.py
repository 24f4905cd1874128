"""Kernels: each file holds the mathematics, a PyTorch version that runs anywhere, and a Triton version for GPUs.

The PyTorch version is the specification. A tensor on a GPU goes to Triton unless `use("torch")` was said (the
config key `kernels`); float64 has no Triton version. Triton's interpreter, TRITON_INTERPRET=1, runs the same
kernels on a CPU for the tests, and `kernels/aot.py` compiles them for three generations of GPUs without one.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
try:
    # 67 MB, so only where it can run; TRITON_INTERPRET=0 asks for it on any machine, as aot.py does.
    if not (torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ):
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:  # not every system has it; the PyTorch versions need none
    triton = tl = None
_chosen: str | None = None


def jit(function):
    """A Triton kernel, or the bare function where there is no Triton."""
    return triton.jit(function) if triton else function


def use(name: str) -> None:
    """"torch", "triton", or "auto": Triton for tensors on a GPU. Raises ValueError where Triton cannot run."""
    global _chosen
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels is '{name}', expected auto, torch or triton")
    if name == "triton" and not (triton and (INTERPRETED or torch.cuda.is_available())):
        raise ValueError("kernels is 'triton', which needs the triton package and a GPU: use kernels=torch")
    _chosen = None if name == "auto" else name


def on_triton(x: torch.Tensor) -> bool:
    """Whether the kernels run this tensor with Triton."""
    if triton is None or x.dtype == torch.float64:
        return False
    return x.is_cuda and _chosen != "torch" or INTERPRETED and _chosen == "triton"


@contextmanager
def without_onednn(device: torch.device) -> Iterator[None]:
    """On a CPU, fp32 products by MKL even where oneDNN is switched on (runtime.py), which is faster for large ones alone.

    oneDNN copies operands that do not lie dense: attention of 64 sequences with 6 heads to caches of 100 tokens takes it
    1,650 us, MKL 250. And it takes longer to begin: 33 us, MKL 7, for one row times 288 x 288.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def missing_rows(x: torch.Tensor) -> int:
    """Rows that x [N, ...] lacks of a multiple of 32, on a CPU; elsewhere none.

    oneDNN compiles every product of a new shape, in about 1 ms, and keeps up to a MB of it for ever. Three products whose
    number of rows was drawn from 600 to 1,100, a thousand times: 6.4 s and 530 MB; in multiples of 32: 4.0 s and 40 MB.
    """
    return 0 if x.device.type != "cpu" or on_triton(x) else -len(x) % 32


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
