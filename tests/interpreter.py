"""Triton's interpreter made strict: bf16 as hardware does it, no read or write outside a tensor, no two writers.

On a machine with a GPU the same tests run on it, and what only the interpreter can see is left out.
"""
from contextlib import contextmanager

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 256  # elements of NaN before and after a guarded tensor


def patch_bf16() -> None:
    """The interpreter keeps bf16 as uint16: it multiplies bit patterns, and truncates where hardware rounds."""
    import triton.language as tl
    from triton.runtime import interpreter as source

    builder = type(source.interpreter_builder)
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return source.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrowed(data):
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)

    def create_dot(self, a, b, d, *rest):
        return plain_dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return source.TensorHandle(narrowed(widened(src).data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, widened(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of x between bands of NaN (2^30 for integers): a read outside spoils the result, `intact` sees a write."""
    # Bands keep the alignment of 16 bytes that kernels are compiled for.
    fill = float("nan") if x.is_floating_point() else 100 if x.element_size() == 1 else 2**30
    room = torch.full((x.numel() + 2 * GUARD,), fill, dtype=x.dtype, device=x.device)
    inside = room[GUARD : GUARD + x.numel()].view(x.shape)
    inside.copy_(x.detach())
    return inside.requires_grad_(x.requires_grad)


def intact(x: torch.Tensor) -> bool:
    """Whether the bands around a guarded tensor are as they were made."""
    room = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    bands = torch.cat([room[:GUARD], room[-GUARD:]])
    return bool(torch.isnan(bands).all()) if x.is_floating_point() else bool((bands == bands[0]).all())


@contextmanager
def strict():
    """Within it fresh tensors hold NaN, and two programs of a launch that store to one address raise AssertionError."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made
        return call

    torch.empty, torch.empty_like, torch.Tensor.new_empty = poisoned(empty), poisoned(empty_like), poisoned(new_empty)
    try:
        if DEVICE == "cuda":
            yield
        else:
            with one_writer():
                yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = empty, empty_like, new_empty


@contextmanager
def one_writer():
    """Assert that one program of a launch stores to an address: on a GPU two would race, here they take turns."""
    from triton.runtime import interpreter as source

    builder = type(source.interpreter_builder)
    plain_store, plain_call = builder.create_masked_store, source.GridExecutor.__call__
    owners: dict[int, tuple] = {}

    def create_masked_store(self, ptrs, value, mask, *rest):
        for address in ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].flatten().tolist():
            owner = owners.setdefault(address, self.grid_idx)
            assert owner == self.grid_idx, f"programs {owner} and {self.grid_idx} store to one address"
        return plain_store(self, ptrs, value, mask, *rest)

    def call(self, *args, **kwargs):
        owners.clear()
        return plain_call(self, *args, **kwargs)

    builder.create_masked_store, source.GridExecutor.__call__ = create_masked_store, call
    try:
        yield
    finally:
        builder.create_masked_store, source.GridExecutor.__call__ = plain_store, plain_call


def close(ours: torch.Tensor, truth: torch.Tensor, relative: float, floor: float = 1e-5) -> None:
    """|ours - truth| <= relative * |truth| + floor * sqrt(count) in the Euclidean norm; truth in float64."""
    error = (ours.double() - truth.double()).norm().item()
    bound = relative * truth.double().norm().item() + floor * max(1, truth.numel()) ** 0.5
    assert torch.isfinite(ours).all(), "not finite"
    assert error <= bound, f"error {error:.3g} is above {bound:.3g}"


if DEVICE == "cpu":
    patch_bf16()
