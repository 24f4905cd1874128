"""NF4: four bits a weight, for bases that are only read (Dettmers et al. 2023, arXiv:2305.14314).

Weights are cut into blocks of 64. A block is divided by its largest magnitude and every quotient becomes the nearest
of 16 levels, which are quantiles of a normal distribution: trained weights are nearly normal, so each level is used
about equally often. The scales, 32 bits for 64 weights, are quantised again ("double quantisation"): less their mean,
in blocks of 256, to the nearest of 256 levels of a dynamic 8-bit float.

    w ~ LEVELS[code] * scale                       4 + 32 / 64             = 4.5 bits a weight
    scale ~ FLOATS[byte] * scale2 + offset         4 + 8 / 64 + 32 / 16384 = 4.127 bits

Bytes are those of bitsandbytes: two codes a byte, the earlier weight in the high half.

A matmul of M rows with W [4096, 14336] reads, in bf16, 117 MB: 27 us on an H200, and so much for any M up to about 180.
Decoding W first reads 30 MB and writes those 117: 35 us more. For training that is little; for sampling, where M is
small, `linear` decodes each tile of W in registers on its way to the matrix units and reads the 30 MB alone. Decoding
takes about 10 instructions a weight, counted in the machine code: 20 us for this W, once for every 128 rows of x.
"""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import Build, architecture, jit, on_triton, tl, triton


class NF4(NamedTuple):
    """A quantised weight; scales in fp32, or as bytes with what decodes them."""

    codes: Tensor            # [n / 2] uint8
    scales: Tensor           # [n / block] fp32, or uint8 when double
    scales2: Tensor | None   # [scales / 256] fp32
    offset: Tensor | None    # [] fp32
    shape: torch.Size
    block: int

    @property
    def bits(self) -> float:
        """Per weight, everything counted."""
        held = sum(t.nbytes for t in (self.codes, self.scales, self.scales2, self.offset) if t is not None)
        return 8 * held / self.shape.numel()


# Normal quantiles at even steps, eight above zero and seven below, scaled to [-1, 1]; the digits of the paper's appendix E.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
TINY = torch.finfo(torch.float32).tiny


@lru_cache
def floats() -> Tensor:
    """The 256 values of the dynamic 8-bit float, ascending, [256] fp32 (Dettmers 2016, arXiv:1511.04561).

    Seven decades; the larger the number, the more of its bits are left for the fraction: 2^i means of even
    intervals of [0.1, 1] in decade i, with both signs, and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += means + [-v for v in means]
    return torch.tensor(sorted(values), dtype=torch.float32)


@lru_cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """LEVELS, their 15 midpoints, and floats() on a device: copied once, for a copy waits for the GPU."""
    return LEVELS.to(device), midpoints(LEVELS).to(device), floats().to(device)


def midpoints(table: Tensor) -> Tensor:
    return (table[1:] + table[:-1]) / 2


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of the ascending table next to each value, uint8; a midpoint goes down."""
    return torch.bucketize(values, midpoints(table).to(values)).to(torch.uint8)


def quantize(weight: Tensor, block: int = 64, double: bool = True) -> NF4:
    """A weight of any shape as NF4, its last block filled up with zeros. Raises ValueError unless block is a power of two."""
    if block < 2 or block & (block - 1):
        raise ValueError(f"block is {block}, expected a power of two, e.g. 64")
    flat = weight.detach().flatten()
    packed, scales = (_quantize_in_tiles if on_triton(weight) else _quantize)(flat, block)
    if not double:
        return NF4(packed, scales, None, None, weight.shape, block)
    offset = scales.mean()
    rest = torch.nn.functional.pad(scales - offset, (0, -len(scales) % 256)).view(-1, 256)
    scales2 = rest.abs().amax(1)
    bytes_ = nearest(rest / scales2.clamp(min=TINY)[:, None], tables(weight.device)[2])
    return NF4(packed, bytes_.flatten()[: len(scales)], scales2, offset, weight.shape, block)


def dequantize(state: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight again, in `dtype`."""
    if on_triton(state.codes) and dtype != torch.float64:
        return _dequantize_in_tiles(state, dtype)
    pairs = torch.cartesian_prod(*[tables(state.codes.device)[0]] * 2)  # [256, 2], what each byte holds
    values = pairs[state.codes.int()]
    return (values.view(-1, state.block) * block_scales(state)[:, None]).flatten()[: state.shape.numel()].view(state.shape).to(dtype)


def linear(x: Tensor, state: NF4) -> Tensor:
    """x W^T [..., out] for x [..., in] and W [out, in], in the dtype of x. No gradient (lora.py has it)."""
    outputs, inputs = state.shape
    rows = x.numel() // inputs
    # A row of W that ends within a block shares its scale with the next.
    if on_triton(x) and x.element_size() == 2 and 0 < rows <= CROSSOVER and state.block == 64 and inputs % 64 == 0:
        return _linear_in_tiles(x.reshape(rows, inputs).contiguous(), state).view(*x.shape[:-1], outputs)
    return x @ dequantize(state, x.dtype).t()


# --------------------------------------------------------------------------------- the PyTorch version

def _quantize(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Bytes [n / 2] and scales [n / block] of flat [n], n rounded up to whole blocks."""
    if flat.numel() % block:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % block))
    parts = []
    for blocks in flat.view(-1, block).split(2**14):  # a million weights at a time: little beside the model
        scales = blocks.float().abs().amax(1)
        unit = blocks.float() / scales.clamp(min=TINY)[:, None]  # a block of zeros stays zeros
        codes = nearest(unit, tables(flat.device)[0]).flatten()
        parts.append((codes[0::2] * 16 + codes[1::2], scales))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def block_scales(state: NF4) -> Tensor:
    """Scales of the blocks, decoded, [n / block] fp32."""
    if state.scales2 is None:
        return state.scales
    table = tables(state.scales.device)[2]
    return table[state.scales.int()] * state.scales2.repeat_interleave(256)[: len(state.scales)] + state.offset


# ---------------------------------------------------------------------------------- the Triton version

# Weights and warps of a program; for linear, by rows of x in a tile: rows of W, columns, warps, stages of the pipeline.
CONFIGS = {
    80: {"quantize": (4096, 8), "dequantize": (4096, 4), "linear": {16: (32, 256, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2)}},
    90: {"quantize": (4096, 8), "dequantize": (4096, 4), "linear": {16: (32, 256, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3)}},
    100: {"quantize": (4096, 8), "dequantize": (4096, 4), "linear": {16: (32, 256, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3)}},
}
CROSSOVER = 256  # rows of x: two tiles decode W twice, which takes as long as to write it out once
SUM = 1024       # values of a program that adds up the shares
PROGRAMS = 512   # that linear splits its columns for: about four on each of a GPU's multiprocessors


def _quantize_in_tiles(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    size, warps = CONFIGS[architecture(flat.device)]["quantize"]
    count, blocks = flat.numel(), triton.cdiv(flat.numel(), block)
    codes = torch.empty(blocks * block // 2, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    group = max(1, size // block)
    _quantize_kernel[triton.cdiv(blocks, group),](
        flat, tables(flat.device)[1], codes, scales, count, blocks, TINY=TINY, BLOCK=block, BLOCKS=group, num_warps=warps)
    return codes, scales


@jit
def _quantize_kernel(weight, midpoints, codes, scales, count, blocks, TINY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Codes and scales of BLOCKS blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + at, mask=at < count, other=0.0).to(tl.float32)
    # Magnitudes are ordered as their bits, NaN above all: a block with a NaN must become NaN, and tl.max would skip it.
    scale = tl.max(tl.abs(w).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    unit = tl.div_rn(w, tl.where(scale < TINY, TINY, scale)[:, None])  # rounded as PyTorch does; `/` is off by a bit now and then
    code = tl.zeros([BLOCKS, BLOCK], tl.int32)
    for i in tl.static_range(15):
        code += tl.where(unit <= tl.load(midpoints + i), 0, 1)
    high, low = tl.split(tl.reshape(code, BLOCKS, BLOCK // 2, 2))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes + byte, (high * 16 + low).to(tl.uint8), mask=(block < blocks)[:, None])
    tl.store(scales + block, scale, mask=block < blocks)


@jit
def _decoded(pairs, levels, COUNT: tl.constexpr):
    """The 2 COUNT levels of COUNT bytes, in one row."""
    pairs = tl.reshape(pairs, COUNT).to(tl.int32)
    return tl.gather(tl.load(levels + tl.arange(0, 16)), tl.interleave(pairs >> 4, pairs & 15), 0)


@jit
def _scales(at, inside, scales, scales2, offset, floats):
    """Scales of the blocks `at`. Callers forbid fused multiply-add: PyTorch rounds product and sum one by one."""
    scale = tl.load(scales + at, mask=inside, other=0)
    if scales2 is not None:
        scale2 = tl.load(scales2 + at // 256, mask=inside, other=0.0)
        scale = tl.load(floats + scale.to(tl.int32)) * scale2 + tl.load(offset)
    return scale


def _dequantize_in_tiles(state: NF4, dtype: torch.dtype) -> Tensor:
    size, warps = CONFIGS[architecture(state.codes.device)]["dequantize"]
    out = torch.empty(state.shape, dtype=dtype, device=state.codes.device)
    blocks, group = len(state.scales), max(1, size // state.block)
    _dequantize_kernel[triton.cdiv(blocks, group),](
        state.codes, *_of_scales(state), out, out.numel(), blocks, BLOCK=state.block, BLOCKS=group, num_warps=warps, enable_fp_fusion=False)
    return out


def _of_scales(state: NF4) -> tuple[Tensor | None, ...]:
    """Arguments `scales` to `levels` of a kernel."""
    levels, _, floats = tables(state.codes.device)
    return state.scales, state.scales2, state.offset, None if state.scales2 is None else floats, levels


@jit
def _dequantize_kernel(codes, scales, scales2, offset, floats, levels, out, count, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Weights of BLOCKS blocks."""
    HALF: tl.constexpr = BLOCK // 2
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    byte = first * HALF + tl.arange(0, BLOCKS * HALF)
    w = _decoded(tl.load(codes + byte, mask=byte < blocks * HALF, other=0), levels, BLOCKS * HALF)
    block = first + tl.arange(0, BLOCKS)
    w = tl.reshape(w, BLOCKS, BLOCK) * _scales(block, block < blocks, scales, scales2, offset, floats)[:, None]
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, w.to(out.dtype.element_ty), mask=at < count)


def _linear_in_tiles(x: Tensor, state: NF4) -> Tensor:
    rows, (outputs, inputs) = len(x), state.shape
    configs = CONFIGS[architecture(x.device)]["linear"]
    m = next((m for m in configs if rows <= m), max(configs))
    n, k, warps, stages = configs[m]
    tiles = triton.cdiv(rows, m), triton.cdiv(outputs, n)
    # Few tiles: each program takes a share of the columns, and the partial results are added in order.
    parts = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), triton.cdiv(inputs, 2 * k)))
    share = triton.cdiv(triton.cdiv(inputs, k), parts) * k
    parts = triton.cdiv(inputs, share)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    partial = out if parts == 1 else torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    _linear_kernel[*tiles, parts](
        x, state.codes, *_of_scales(state), partial, rows, outputs, inputs, share,
        M=m, N=n, K=k, BLOCK=state.block, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    if parts > 1:
        _sum_kernel[triton.cdiv(out.numel(), SUM),](partial, out, out.numel(), parts, SIZE=SUM, num_warps=4)
    return out


@jit
def _linear_kernel(x, codes, scales, scales2, offset, floats, levels, out, rows, outputs, inputs, share,
                   M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of W x^T [N, M], over `share` columns of W. W comes first: the matrix units take the first factor from registers."""
    row, output, part = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N), tl.program_id(2)
    start = output.to(tl.int64)[:, None] * inputs
    x += row.to(tl.int64)[None, :] * inputs
    total = tl.zeros([N, M], tl.float32)
    for first in range(part * share, tl.minimum(part * share + share, inputs), K):
        byte, block, column = first // 2 + tl.arange(0, K // 2), first // BLOCK + tl.arange(0, K // BLOCK), first + tl.arange(0, K)
        pairs = tl.load(codes + start // 2 + byte[None, :],
                        mask=(output < outputs)[:, None] & (byte < inputs // 2)[None, :], other=0)
        scale = _scales(start // BLOCK + block[None, :],
                        (output < outputs)[:, None] & (block < inputs // BLOCK)[None, :], scales, scales2, offset, floats)
        w = tl.reshape(_decoded(pairs, levels, N * K // 2), N, K // BLOCK, BLOCK) * scale[:, :, None]
        columns = tl.load(x + column[:, None], mask=(column < inputs)[:, None] & (row < rows)[None, :], other=0.0)
        total = tl.dot(tl.reshape(w, N, K).to(columns.dtype), columns, total, input_precision="ieee")
    at = (part * rows + row).to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < rows)[None, :] & (output < outputs)[:, None])


@jit
def _sum_kernel(partial, out, count, parts, SIZE: tl.constexpr):
    """Sum over the first axis of partial [parts, count], in order."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for _ in range(parts):
        total += tl.load(partial + at, mask=at < count, other=0.0)
        partial += count
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


def builds(sm: int) -> list[Build]:
    """Every kernel as it is shipped, for `kernels/aot.py`: weights and activations in bf16."""
    configs = CONFIGS[sm]
    size, warps = configs["quantize"]
    arguments = {"weight": "*bf16", "midpoints": "*fp32", "codes": "*u8", "scales": "*fp32", "count": "i32:16", "blocks": "i32:16",
                 "TINY": TINY, "BLOCK": 64, "BLOCKS": size // 64}
    found = [Build("nf4 quantize", _quantize_kernel, arguments, warps, 1, wide=True)]
    single = {"codes": "*u8", "scales": "*fp32", "scales2": None, "offset": None, "floats": None, "levels": "*fp32", "BLOCK": 64}
    double = single | {"scales": "*u8", "scales2": "*fp32", "offset": "*fp32", "floats": "*fp32"}
    for name, packed in (("single", single), ("double", double)):
        size, warps = configs["dequantize"]
        arguments = packed | {"out": "*bf16", "count": "i32:16", "blocks": "i32:16", "BLOCKS": size // 64}
        found.append(Build(f"nf4 dequantize, {name}", _dequantize_kernel, arguments, warps, 1, wide=True))
        for m, (n, k, warps, stages) in configs["linear"].items():
            arguments = packed | {"x": "*bf16", "out": "*fp32" if m == 16 else "*bf16", "rows": "i32", "outputs": "i32:16",
                                  "inputs": "i32:16", "share": "i32:16", "M": m, "N": n, "K": k}
            matmul = n >= 64 or sm == 80  # smaller tiles are for the matrix units of sm_80, which later GPUs still have
            found.append(Build(f"nf4 linear, {name}, {m} rows", _linear_kernel, arguments, warps, stages, matmul, wide=True))
    arguments = {"partial": "*fp32", "out": "*bf16", "count": "i32:16", "parts": "i32", "SIZE": SUM}
    return [*found, Build("nf4 sum", _sum_kernel, arguments, 4, 1, wide=True)]
