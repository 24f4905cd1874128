"""NF4: frozen base weights in four bits each (Dettmers et al. 2023, arXiv:2305.14314).

Weights are cut into blocks of 64. A block is divided by its largest magnitude (its scale), and every quotient becomes
the nearest of 16 levels, which are quantiles of a normal distribution: trained weights are nearly normal, so each
level is used about equally often. The scales, 32 bits for 64 weights, are quantised again ("double quantisation"):
their mean is subtracted, and blocks of 256 become the nearest of 256 levels of a dynamic 8-bit float.

    w ~ LEVELS[code] * scale                       4 + 32 / 64             = 4.5 bits a weight
    scale ~ FLOATS[byte] * scale2 + offset         4 + 8 / 64 + 32 / 16384 = 4.127 bits

Bytes are laid out as in bitsandbytes: two codes a byte, the earlier weight in the high half.

A matmul of M rows with W [4096, 14336] reads 117 MB in bf16: 27 us on an H200, for any M up to about 180. Decoding W
first reads 30 MB and writes those 117: 35 us more. For training that is little. For sampling, where M is small,
`linear` decodes each tile of W in registers on its way to the matrix units and reads only the 30 MB. Decoding takes
about 10 instructions per weight, counted in the machine code: 20 us for this W, once for every 128 rows of x.
"""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import architecture, jit, launch, on_triton, tl, triton


class NF4(NamedTuple):
    """A quantised weight; its scales are fp32, or bytes with what decodes them."""

    codes: Tensor            # [n / 2] uint8
    scales: Tensor           # [n / block] fp32, or uint8 when double
    scales2: Tensor | None   # [scales / 256] fp32
    offset: Tensor | None    # [] fp32
    shape: torch.Size
    block: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        held = sum(t.nbytes for t in (self.codes, self.scales, self.scales2, self.offset) if t is not None)
        return 8 * held / self.shape.numel()


# Normal quantiles at even steps, eight above zero and seven below, scaled to [-1, 1]: the paper's appendix E.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
TINY = torch.finfo(torch.float32).tiny


@lru_cache
def floats() -> Tensor:
    """The 256 values of the dynamic 8-bit float, ascending, [256] fp32 (Dettmers 2016, arXiv:1511.04561).

    Seven decades: decade i holds the means of 2^i even intervals of [0.1, 1], with both signs, so larger numbers are
    more precise; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += means + [-v for v in means]
    return torch.tensor(sorted(values), dtype=torch.float32)


@lru_cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """LEVELS, their 15 midpoints, and floats() on a device: copied once, as every copy would sync the GPU."""
    return LEVELS.to(device), midpoints(LEVELS).to(device), floats().to(device)


def midpoints(table: Tensor) -> Tensor:
    return (table[1:] + table[:-1]) / 2


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of the ascending table nearest to each value, uint8; a midpoint goes down."""
    return torch.bucketize(values, midpoints(table).to(values)).to(torch.uint8)


def quantize(weight: Tensor, block: int = 64, double: bool = True) -> NF4:
    """A weight of any shape as NF4, its last block padded with zeros; block is a power of two, else ValueError."""
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
    """The weight that `quantize` rounded, in `dtype`."""
    if on_triton(state.codes) and dtype != torch.float64:
        return _dequantize_in_tiles(state, dtype)
    pairs = torch.cartesian_prod(*[tables(state.codes.device)[0]] * 2)  # [256, 2], the two levels of each byte
    values = pairs[state.codes.int()].view(-1, state.block) * block_scales(state)[:, None]
    return values.flatten()[: state.shape.numel()].view(state.shape).to(dtype)


def linear(x: Tensor, state: NF4) -> Tensor:
    """x W^T [..., out] for x [..., in] and W [out, in], in the dtype of x. No gradient (lora.py has it)."""
    outputs, inputs = state.shape
    rows = x.numel() // inputs
    # inputs % 64: a row of W that ended within a block would share its scale with the next row.
    if on_triton(x) and x.element_size() == 2 and 0 < rows <= CROSSOVER and state.block == 64 and inputs % 64 == 0:
        return _linear_in_tiles(x.reshape(rows, inputs).contiguous(), state).view(*x.shape[:-1], outputs)
    return x @ dequantize(state, x.dtype).t()


# --------------------------------------------------------------------------------- the PyTorch version

def _quantize(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes [n / 2] and scales [n / block] of flat [n], n rounded up to whole blocks."""
    if flat.numel() % block:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % block))
    parts = []
    for blocks in flat.view(-1, block).split(2**14):  # a million weights at a time, to need little memory
        scales = blocks.float().abs().amax(1)
        unit = blocks.float() / scales.clamp(min=TINY)[:, None]  # a block of zeros stays zeros
        codes = nearest(unit, tables(flat.device)[0]).flatten()
        parts.append((codes[0::2] * 16 + codes[1::2], scales))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def block_scales(state: NF4) -> Tensor:
    """The decoded scales of the blocks, [n / block] fp32."""
    if state.scales2 is None:
        return state.scales
    table = tables(state.scales.device)[2]
    return table[state.scales.int()] * state.scales2.repeat_interleave(256)[: len(state.scales)] + state.offset


# ---------------------------------------------------------------------------------- the Triton version

# Weights and warps per program. For linear, by rows of x per tile: rows and columns of W, warps, pipeline stages.
CONFIGS = {
    80: {"quantize": (4096, 8), "dequantize": (4096, 4),
         "linear": {16: (32, 256, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2)}},
    90: {"quantize": (4096, 8), "dequantize": (4096, 4),
         "linear": {16: (32, 256, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3)}},
    100: {"quantize": (4096, 8), "dequantize": (4096, 4),
          "linear": {16: (32, 256, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3)}},
}
CROSSOVER = 256  # rows of x above which linear decodes W first: two tiles decode it twice, which takes as long
SUM = 1024       # values per program that adds up the partial results
PROGRAMS = 512   # that linear splits its columns for: about four per multiprocessor


def _quantize_in_tiles(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    size, warps = CONFIGS[architecture(flat.device)]["quantize"]
    count, blocks = flat.numel(), triton.cdiv(flat.numel(), block)
    codes = torch.empty(blocks * block // 2, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    group = max(1, size // block)
    launch(_quantize_kernel, (triton.cdiv(blocks, group),), flat, tables(flat.device)[1], codes, scales, count, blocks,
           TINY=TINY, BLOCK=block, BLOCKS=group, num_warps=warps)
    return codes, scales


@jit
def _quantize_kernel(weight, midpoints, codes, scales, count, blocks, TINY: tl.constexpr, BLOCK: tl.constexpr,
                     BLOCKS: tl.constexpr):
    """Codes and scales of BLOCKS blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + at, mask=at < count, other=0.0).to(tl.float32)
    # Compared as bits, which keep the order and put NaN last: a NaN must spoil its block, and tl.max would skip it.
    scale = tl.max(tl.abs(w).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    unit = tl.div_rn(w, tl.where(scale < TINY, TINY, scale)[:, None])  # rounds as PyTorch; `/` is off by a bit at times
    code = tl.zeros([BLOCKS, BLOCK], tl.int32)
    for i in tl.static_range(15):
        code += tl.where(unit <= tl.load(midpoints + i), 0, 1)
    high, low = tl.split(tl.reshape(code, BLOCKS, BLOCK // 2, 2))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes + byte, (high * 16 + low).to(tl.uint8), mask=(block < blocks)[:, None])
    tl.store(scales + block, scale, mask=block < blocks)


@jit
def _decoded(pairs, levels, COUNT: tl.constexpr):
    """The levels of COUNT bytes, in one row of 2 COUNT."""
    pairs = tl.reshape(pairs, COUNT).to(tl.int32)
    return tl.gather(tl.load(levels + tl.arange(0, 16)), tl.interleave(pairs >> 4, pairs & 15), 0)


@jit
def _scales(at, inside, scales, scales2, offset, floats):
    """Scales of the blocks `at`. Launched with enable_fp_fusion=False: PyTorch rounds the product, then the sum."""
    scale = tl.load(scales + at, mask=inside, other=0)
    if scales2 is not None:
        scale2 = tl.load(scales2 + at // 256, mask=inside, other=0.0)
        scale = tl.load(floats + scale.to(tl.int32)) * scale2 + tl.load(offset)
    return scale


def _dequantize_in_tiles(state: NF4, dtype: torch.dtype) -> Tensor:
    size, warps = CONFIGS[architecture(state.codes.device)]["dequantize"]
    out = torch.empty(state.shape, dtype=dtype, device=state.codes.device)
    blocks, group = len(state.scales), max(1, size // state.block)
    launch(_dequantize_kernel, (triton.cdiv(blocks, group),), state.codes, *_scale_arguments(state), out, out.numel(),
           blocks, BLOCK=state.block, BLOCKS=group, num_warps=warps, enable_fp_fusion=False)
    return out


def _scale_arguments(state: NF4) -> tuple[Tensor | None, ...]:
    """The arguments `scales` to `levels` of a kernel."""
    levels, _, floats = tables(state.codes.device)
    return state.scales, state.scales2, state.offset, None if state.scales2 is None else floats, levels


@jit
def _dequantize_kernel(codes, scales, scales2, offset, floats, levels, out, count, blocks, BLOCK: tl.constexpr,
                       BLOCKS: tl.constexpr):
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
    # Few tiles: each program takes some of the columns, and the partial results are added in order.
    parts = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), triton.cdiv(inputs, 2 * k)))
    part_inputs = triton.cdiv(triton.cdiv(inputs, k), parts) * k
    parts = triton.cdiv(inputs, part_inputs)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    partial = out if parts == 1 else torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    launch(_linear_kernel, (*tiles, parts), x, state.codes, *_scale_arguments(state), partial, rows, outputs, inputs,
           part_inputs, M=m, N=n, K=k, BLOCK=state.block, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    if parts > 1:
        launch(_sum_kernel, (triton.cdiv(out.numel(), SUM),), partial, out, out.numel(), parts, SIZE=SUM, num_warps=4)
    return out


@jit
def _linear_kernel(x, codes, scales, scales2, offset, floats, levels, out, rows, outputs, inputs, part_inputs,
                   M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """A tile [N, M] of W x^T over `part_inputs` columns of W: the matrix units take the first factor from registers."""
    row, output, part = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N), tl.program_id(2)
    start = output.to(tl.int64)[:, None] * inputs
    x += row.to(tl.int64)[None, :] * inputs
    total = tl.zeros([N, M], tl.float32)
    for first in range(part * part_inputs, tl.minimum(part * part_inputs + part_inputs, inputs), K):
        column = first + tl.arange(0, K)
        byte, block = first // 2 + tl.arange(0, K // 2), first // BLOCK + tl.arange(0, K // BLOCK)
        pairs = tl.load(codes + start // 2 + byte[None, :],
                        mask=(output < outputs)[:, None] & (byte < inputs // 2)[None, :], other=0)
        inside = (output < outputs)[:, None] & (block < inputs // BLOCK)[None, :]
        scale = _scales(start // BLOCK + block[None, :], inside, scales, scales2, offset, floats)
        w = tl.reshape(_decoded(pairs, levels, N * K // 2), N, K // BLOCK, BLOCK) * scale[:, :, None]
        tile_x = tl.load(x + column[:, None], mask=(column < inputs)[:, None] & (row < rows)[None, :], other=0.0)
        total = tl.dot(tl.reshape(w, N, K).to(tile_x.dtype), tile_x, total, input_precision="ieee")
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
