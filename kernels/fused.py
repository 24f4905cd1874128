"""RMSNorm, rotary positions and SwiGLU: the memory-bound steps between the matmuls.

Autograd takes a formula apart and keeps every part. The first two have their backward written out; it reads
the inputs once more and keeps nothing else. Upstream gradient g, n = x r:

    rms_norm   y = w x r,  r = (mean x^2 + eps)^-1/2       dx = r (g w - n mean(g w n))    dw = sum g n
    rotary     (a, b) -> (a cos - b sin, b cos + a sin)    the rotation by the opposite angle
    swiglu     y = silu(gate) up                           left to autograd: by hand it was no faster

Forward and backward of 4000 x 192 in bf16 on two Zen 5 cores: rms_norm 5.9 -> 1.1 ms, rotary 2.1 -> 0.9 ms.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [N, D] over its root mean square, times weight [D]; the mean square in fp32 (Zhang & Sennrich 2019)."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)  # [N, 1]
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        x, weight, r = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        n = x * r
        dweight = (g * n).sum(0, dtype=wide).to(weight.dtype) if ctx.needs_input_grad[1] else None
        gw = g * weight.to(g.dtype)
        mean = (gw * n).sum(-1, keepdim=True, dtype=wide).div_(x.shape[-1]).to(x.dtype)
        return gw.sub_(n.mul_(mean)).mul_(r), dweight, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on x [N, H, E]; dimension i pairs with i + E / 2.

    cos [N, 1, E] holds the cosines twice, sin [N, 1, E] the sines negated and then as they are: x cos + swap(x) sin.
    """
    return _Rotary.apply(x, cos, sin)


class _Rotary(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(_swapped(x), sin)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return (g * cos).addcmul_(_swapped(g), sin, value=-1), None, None


def _swapped(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([b, a], dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020)."""
    return F.silu(gate) * up
