"""Kernels: each file holds the mathematics, a PyTorch version that runs anywhere, and a Triton version for GPUs.

The PyTorch version is the specification. A tensor on a GPU goes to Triton unless the config says `kernels = "torch"`
(`use("torch")` in code); float64 has no Triton version. Triton's interpreter (TRITON_INTERPRET=1) runs the same
kernels on a CPU for the tests, and `tests/aot.py` compiles them for three generations of GPUs without one.
"""
from __future__ import annotations

import torch

from runtime import cpu

# For model.py, which imports kernels alone.
from runtime.cpu import PackedLinear, can_pack, without_onednn  # noqa: F401
from runtime.device import INTERPRETED, on_triton, tl, triton, use  # noqa: F401


def missing_rows(x: torch.Tensor) -> int:
    """Rows to add to x [N, ...] so that PyTorch multiplies it fast on this device; Triton needs none."""
    return 0 if on_triton(x) else cpu.missing_rows(x)


def jit(function):
    """A Triton kernel, or the bare function where Triton is not installed."""
    return triton.jit(function) if triton else function


def descriptor(x: torch.Tensor, block: list[int]):
    """x [rows, columns] for `x.load([row, column])` of blocks in a kernel, which the hardware copies; beyond x is 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, block)


def allocate_descriptors() -> None:
    """Memory for programs that make tensor descriptors; before each launch, for it holds for the thread alone."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Start a kernel on the GPU of its first argument: by itself Triton takes the thread's current one.

    Products and the sums they go into are fused unless told otherwise; Triton 3.10 changes its default.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **{"enable_fp_fusion": True} | options)


def architecture(device: torch.device) -> int:
    """Which tile sizes a kernel takes on this device: 80 (A100), 90 (H100, the interpreter) or 100 (B200).

    Consumer GPUs (8.6, 8.9, 12) have 99 KiB of shared memory; the tiles of 80 fit in it for heads up to 128 wide.
    """
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)
