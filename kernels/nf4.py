"""NF4: four bits a weight, for bases that are only read (Dettmers et al. 2023, arXiv:2305.14314).

Weights are cut into blocks of 64. A block is divided by its largest magnitude and every quotient becomes the nearest
of 16 levels, which are quantiles of a normal distribution: trained weights are nearly normal, so each level is used
about equally often. The scales, 32 bits for 64 weights, are quantised again ("double quantisation"): less their mean,
in blocks of 256, to the nearest of 256 levels of a dynamic 8-bit float.

    w ~ LEVELS[code] * scale                       4 + 32 / 64             = 4.5 bits a weight
    scale ~ FLOATS[byte] * scale2 + offset         4 + 8 / 64 + 32 / 16384 = 4.127 bits

Bytes are those of bitsandbytes: two codes a byte, the earlier weight in the high half.
"""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


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


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of the ascending table next to each value, uint8; a midpoint goes down."""
    return torch.bucketize(values, ((table[1:] + table[:-1]) / 2).to(values)).to(torch.uint8)


def quantize(weight: Tensor, block: int = 64, double: bool = True) -> NF4:
    """A weight of any shape as NF4, its last block filled up with zeros. Raises ValueError for an odd block."""
    if block % 2:
        raise ValueError(f"block is {block}, expected an even number: a byte holds two codes")
    levels, parts = LEVELS.to(weight.device), []
    flat = weight.detach().flatten()
    if flat.numel() % block:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % block))
    for blocks in flat.view(-1, block).split(2**14):  # a million weights at a time: little beside the model
        scales = blocks.float().abs().amax(1)
        unit = blocks.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # a block of zeros stays zeros
        codes = nearest(unit, levels).flatten()
        parts.append((codes[0::2] * 16 + codes[1::2], scales))
    packed, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    if not double:
        return NF4(packed, scales, None, None, weight.shape, block)
    offset = scales.mean()
    rest = torch.nn.functional.pad(scales - offset, (0, -len(scales) % 256)).view(-1, 256)
    scales2 = rest.abs().amax(1)
    bytes_ = nearest(rest / scales2.clamp(min=torch.finfo(torch.float32).tiny)[:, None], floats().to(weight.device))
    return NF4(packed, bytes_.flatten()[: len(scales)], scales2, offset, weight.shape, block)


def block_scales(state: NF4) -> Tensor:
    """Scales of the blocks, decoded, [n / block] fp32."""
    if state.scales2 is None:
        return state.scales
    return floats().to(state.scales.device)[state.scales.int()] * state.scales2.repeat_interleave(256)[: len(state.scales)] + state.offset


def dequantize(state: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight again, in `dtype`."""
    pairs = torch.cartesian_prod(LEVELS, LEVELS).to(state.codes.device)  # [256, 2], what each byte holds
    values = pairs[state.codes.int()]
    return (values.view(-1, state.block) * block_scales(state)[:, None]).flatten()[: state.shape.numel()].view(state.shape).to(dtype)
