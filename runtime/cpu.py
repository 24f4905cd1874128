"""What is done for CPUs, and why. PyTorch's own way in place of each would change rounding, time and memory alone."""
import ctypes
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensors: fresh pages cost more than the work on them.

    SFT of a 15 M model on two cores: 1,510 -> 2,300 tokens/s, 1.1 M -> 0.3 M page faults in five steps, and 2 % more
    memory at the peak.
    """
    with suppress(OSError, AttributeError):  # glibc alone has it
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)          # M_MMAP_MAX: large blocks from the heap too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


def fast_matmul() -> str:
    """Have oneDNN do fp32 matmuls where that is exact: on AMD, PyTorch's default (MKL) stays with AVX2.

    4096 x 288 x 768 on two Zen 5 cores: 195 GFLOP/s by default, 443 this way, errors alike. The same
    switch may round to bf16 on a CPU with matrix tiles, so one product is checked against fp64 first.
    """
    # It keeps the last 1,024 products it has compiled, 1 to 3 MB each, though hardly two batches have the same length:
    # SFT of the 15 M model peaks 60 to 180 MB lower with 64, and is no slower; with 1 it is.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, 256, generator=generator) for _ in range(2))
    error = (x @ y - (x.double() @ y.double())).abs().max().item()
    if error < 1e-3:  # bf16 inputs would give about 0.2
        return ", fp32 matmul by oneDNN"
    torch.set_float32_matmul_precision("highest")
    return ""


@contextmanager
def without_onednn(device: torch.device) -> Iterator[None]:
    """On a CPU, fp32 products by MKL even where fast_matmul chose oneDNN, which is faster for large products alone.

    It starts slowly: one row times 288 x 288 takes 33 us, with MKL 7.
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

    oneDNN compiles every product of a new shape, in about 1 ms, and keeps up to a MB for each. Three products whose
    number of rows was drawn from 600 to 1,100, a thousand times: 6.4 s and 530 MB; in multiples of 32: 4.0 s, 40 MB.
    """
    return 0 if x.device.type != "cpu" else -len(x) % 32


SMALL = 2**17  # numbers of a matrix whose product with one row MKL does faster: 2 to 8 us, laid out 11 to 15


class PackedLinear:
    """x W^T + b for the linear layers that read the same x, in one product, as copies that oneDNN has laid out for it.

    PyTorch's products lay W out anew every time, which costs more than the product of a few rows. 576 -> 1,536 on one
    Zen 5 core, 1, 16 and 64 rows: 210, 309, 638 -> 115, 220, 570 us in fp32, 125, 182, 352 -> 60, 125, 300 in bf16.
    Laying out takes as long as twenty products of one row save; of a small matrix it waits until there is a second row.
    """

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None], dtype: torch.dtype):
        self.whole = torch.cat([weight.detach().to(dtype) for weight in weights])
        self.laid_out: torch.Tensor | None = None
        if self.whole.numel() > SMALL or dtype != torch.float32:
            self._lay_out()
        self.bias = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat([torch.zeros(len(weight), dtype=dtype) if bias is None else bias.detach().to(dtype)
                                   for weight, bias in zip(weights, biases, strict=True)])

    def _lay_out(self) -> None:
        self.laid_out = torch.ops.mkldnn._reorder_linear_weight(self.whole, 16)  # rows at a time it is laid out for
        self.whole = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.laid_out is None and len(x) > 1:
            self._lay_out()
        if self.laid_out is None:
            return nn.functional.linear(x, self.whole, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.laid_out, self.bias, "none", [], "")


def can_pack(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype here, and the weight is whole: not on a GPU, not this rank's part of it."""
    if weight.device.type != "cpu" or hasattr(weight, "full_tensor") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2), for gradient g and learning rate lr:

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        w = w - lr (weight_decay w + m' / (sqrt(v') + eps))        m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)

    Its kernel is PyTorch's fused one: bit for bit torch.optim.AdamW(fused=True), whose first use imports PyTorch's
    compiler, 69 MB and 1.9 s.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float = 1e-8):
        self.param_groups = groups  # {"params", "lr", "weight_decay", ...}
        self.betas, self.eps = betas, eps
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for p in moving:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                     "exp_avg_sq": torch.zeros_like(p)}
            steps, m, v = ([self.state[p][key] for p in moving] for key in ("step", "exp_avg", "exp_avg_sq"))
            if moving:
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(moving, [p.grad for p in moving], m, v, [], steps, lr=group["lr"],
                                    beta1=self.betas[0], beta2=self.betas[1], weight_decay=group["weight_decay"],
                                    eps=self.eps, amsgrad=False, maximize=False)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
