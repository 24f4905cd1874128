"""What `python -m benchmarks.kernels` measures, group by group.

Work is counted as the formula needs it: pairs of query and key that see each other, nothing for padding or for what an
implementation computes twice, so that rates compare. On a machine without a GPU the PyTorch versions meet what a user
of PyTorch would write, at the sizes of the small models of `benchmarks/throughput.py`.
"""
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

import runtime
from benchmarks.kernels.measure import Bench, Work
from kernels import fused, nf4
from kernels.attention import attention
from kernels.decode import decode_attention, decode_reference
from kernels.layout import Layout
from kernels.logprobs import linear_logprobs, logprobs_reference


def ceilings(bench: Bench) -> None:
    """What this machine moves and multiplies at best: GB/s read and written, and matmul TFLOP/s on random data."""
    size, n = (2**30, 8192) if bench.gpu else (2**27, 1024)
    a, b = (torch.ones(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    bench.compare("copy", f"{size // 2**20} MiB", {"PyTorch": Work(lambda: a.copy_(b))}, {"forward": 2 * size}, "GB/s")
    x, y = bench.randn(n, n), bench.randn(n, n)
    bench.compare("matmul", f"{n} x {n} x {n}", {"PyTorch": Work(lambda: x @ y)}, {"forward": 2 * n**3}, "TFLOP/s")


# ------------------------------------------------------------------------------------------------------------ attention

class Scene(NamedTuple):
    """Segments of one packed row, and the heads that attend."""

    name: str
    lengths: list[int]
    trunks: list[int] | None = None
    prefixes: list[int] | None = None
    window: int | None = None
    heads: tuple[int, int, int] = (32, 8, 128)  # H, K, E

    def layout(self) -> Layout:
        return Layout.build(self.lengths, self.trunks, self.prefixes)


def mixed(longest: int, shortest: int, tokens: int) -> list[int]:
    """Lengths of a packed batch, uniform between the two."""
    rng, lengths = random.Random(0), []
    while sum(lengths) + shortest <= tokens:
        lengths.append(min(rng.randint(shortest, longest), tokens - sum(lengths)))
    return lengths


def four_turns(name: str, prompt: int, reply: int, count: int, heads: tuple[int, int, int]) -> Scene:
    """Dialogues rated at each of four turns: a trunk of the chosen replies, a rejected one before each of them."""
    lengths, trunks, prefixes = [], [], []
    for _ in range(count):
        trunks += 5 * [len(lengths)]
        lengths += [4 * (prompt + reply)] + 4 * [reply]
        prefixes += [0] + [turn * (prompt + reply) + prompt for turn in range(4)]
    return Scene(name, lengths, trunks, prefixes, None, heads)


def rows_of(scene: Scene) -> list[int]:
    """Lengths of a scene as rows of their own: of a tree, for every leaf, its path and the chosen path as long."""
    if not scene.prefixes:
        return scene.lengths
    return [n + p for n, p in zip(scene.lengths, scene.prefixes, strict=True) if p for _ in range(2)]


def seen_pairs(scene: Scene) -> int:
    """Pairs of query and key that see each other: token i of a segment sees its prefix and i + 1 tokens of its own."""
    widest = scene.window or 2**62
    prefixes = scene.prefixes or [0] * len(scene.lengths)
    return sum(min(widest, p + i + 1) for n, p in zip(scene.lengths, prefixes, strict=True) for i in range(n))


SMALL = (6, 6, 48)  # heads of the 15 M model
SCENES = {  # by group; on a CPU all at once
    "first": [Scene("4 x 2048", [2048] * 4)],
    "trees": [four_turns("8 dialogues of 4 turns", 50, 200, 8, (32, 8, 128)),
              Scene("packed 128-2048", mixed(2048, 128, 16384))],
    "attention": [Scene("4 x 4096", [4096] * 4), Scene("1 x 16384", [16384]),
                  Scene("1 x 16384, window 4096", [16384], window=4096), Scene("4 x 512", [512] * 4),
                  Scene("4 x 1024", [1024] * 4), Scene("4 x 2048, 16 heads of 64", [2048] * 4, heads=(16, 16, 64))],
    "cpu": [Scene("8 x 512", [512] * 8, heads=SMALL), Scene("packed 32-512", mixed(512, 32, 4096), heads=SMALL),
            Scene("1 x 2048, window 256", [2048], window=256, heads=SMALL),
            four_turns("8 dialogues of 4 turns", 15, 40, 8, SMALL)],
}


def first_contests(bench: Bench) -> None:
    """What matters most; timed only if it is right."""
    (scene,), (shape,) = SCENES["first"], HEADS["first"]
    heads, kv_heads, width = scene.heads
    inputs = tuple(bench.randn(sum(scene.lengths), n, width, grad=True) for n in (heads, kv_heads, kv_heads))
    layout = scene.layout().to(bench.device)

    def plain(q, k, v):
        rows = (x.unflatten(0, (len(scene.lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return sdpa(*rows, SDPBackend.MATH, is_causal=True).transpose(1, 2).flatten(0, 1)

    if bench.check("attention", scene.name, Work(lambda *x: attention(*x, layout), inputs), plain):
        attention_contests(bench)
    name, (h, w, targets) = "{} x {} x {}".format(*shape), logprobs_inputs(bench, *shape)
    ours = Work(lambda h, w: linear_logprobs(h, w, targets)[0], (h, w))
    if bench.check("logprobs", name, ours, lambda h, w: logprobs_reference(h, w, targets)[0]):
        amounts = {"both": 6 * len(h) * w.numel()}
        bench.compare("logprobs", name, logprobs_works(bench, h, w, targets), amounts, "TFLOP/s")


def attention_contests(bench: Bench) -> None:
    for scene in SCENES[bench.group if bench.gpu else "cpu"]:
        heads, kv_heads, width = scene.heads
        inputs = tuple(bench.randn(sum(scene.lengths), n, width, grad=True) for n in (heads, kv_heads, kv_heads))
        layout = scene.layout().to(bench.device)
        works = {"ours": Work(lambda q, k, v, at=layout, window=scene.window: attention(q, k, v, at, window), inputs)}
        works |= padded_attention(bench, scene)
        if bench.gpu:
            works |= varlen_attention(bench, scene)
            if bench.group == "trees":  # what FlexAttention is for; it takes long to compile
                works["FlexAttention"] = flex_work(scene, torch.compile(flex_attention, dynamic=False), *inputs)
        forward = 4 * width * heads * seen_pairs(scene)
        bench.compare("attention", scene.name, works, {"forward": forward, "backward": 2.5 * forward}, "TFLOP/s")


def padded_attention(bench: Bench, scene: Scene) -> dict[str, Work]:
    """PyTorch's own attention: rows padded to the longest, a tree as pairs of rows, a window as a mask."""
    rows = rows_of(scene)
    longest, (heads, kv_heads, width) = max(rows), scene.heads
    inputs = tuple(bench.randn(len(rows), n, longest, width, grad=True) for n in (heads, kv_heads, kv_heads))
    how = {"is_causal": True}
    if scene.window:
        at = torch.arange(longest, device=bench.device)
        distance = at[:, None] - at
        how = {"attn_mask": (distance >= 0) & (distance < scene.window)}
    note = ", pairs padded" if scene.prefixes else ", padded" if len(set(rows)) > 1 else ""
    return {name + note: Work(lambda q, k, v, backend=backend: sdpa(q, k, v, backend, **how), inputs)
            for name, backend in backends(bench).items()}


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | list[SDPBackend], **how) -> Tensor:
    """PyTorch's attention with one of its backends."""
    if backend == SDPBackend.EFFICIENT_ATTENTION:  # has no groups: keys and values are repeated, as is usual
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1], **how)


def backends(bench: Bench) -> dict[str, SDPBackend | list[SDPBackend]]:
    if not bench.gpu:
        return {"SDPA": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]}
    return {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
            "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION}


def varlen_attention(bench: Bench, scene: Scene) -> dict[str, Work]:
    """PyTorch's FlashAttention over packed rows; a tree as the packed rows of its pairs."""
    rows, (heads, kv_heads, width) = rows_of(scene), scene.heads
    inputs = tuple(bench.randn(sum(rows), n, width, grad=True) for n in (heads, kv_heads, kv_heads))
    edges = torch.tensor([0, *rows], device=bench.device).cumsum(0).int()

    def varlen(q, k, v):
        return varlen_attn(q, k, v, edges, edges, max(rows), max(rows), window_size=((scene.window or 0) - 1, 0),
                           enable_gqa=True)

    return {"varlen_attn" + ", pairs packed" * bool(scene.prefixes): Work(varlen, inputs)}


def flex_work(scene: Scene, flex: Callable, q: Tensor, k: Tensor, v: Tensor) -> Work:
    """FlexAttention, compiled, over the same packed row; trees too, as a mask."""
    layout = scene.layout().to(q.device)
    segment = torch.repeat_interleave(torch.arange(len(scene.lengths), device=q.device), layout.length)
    trunk, limit = layout.trunk_start[segment], (layout.trunk_start + layout.prefix)[segment]

    def visible(_batch, _head, i, j):
        own = (segment[i] == segment[j]) & (i >= j)
        if scene.window:
            own = own & (i - j < scene.window)
        return own | ((j >= trunk[i]) & (j < limit[i])) if scene.prefixes else own

    mask = create_block_mask(visible, None, None, len(segment), len(segment), device=q.device)
    inputs = tuple(x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in (q, k, v))
    return Work(lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=True), inputs)


# --------------------------------------------------------------------------------------------------------------- decode

CACHES = [(64, 2048), (16, 2048), (1, 2048), (256, 2048), (64, 4096), (1, 512), (16, 512), (64, 512), (256, 512),
          (1, 4096), (16, 4096), (256, 4096)]  # sequences, and tokens cached for each


def decode_contests(bench: Bench) -> None:
    heads, kv_heads, width = 32, 8, 128
    for batch, context in CACHES:
        q, *kv = (bench.randn(batch, heads, width), *(bench.randn(batch, kv_heads, context, width) for _ in range(2)))
        inputs = (q, *kv, torch.full((batch,), context, device=bench.device))
        works = {"ours": Work(decode_attention, inputs)}
        works |= {name: Work(lambda q, k, v, _, backend=backend: sdpa(q[:, :, None], k, v, backend), inputs)
                  for name, backend in backends(bench).items()}
        if (batch, context) == CACHES[0]:
            works["PyTorch, compiled"] = Work(torch.compile(decode_reference, dynamic=False), inputs)
        bench.compare("decode", f"{batch} x {context}", works, {"forward": sum(x.nbytes for x in kv)}, "GB/s")


# ------------------------------------------------------------------------------------------------------------- logprobs

HEADS = {  # tokens, width, vocabulary; the first of a group is shown in full, the last trains a Mistral
    "first": [(8192, 4096, 151936)],
    "cuda": [(8192, 4096, 128256), (4096, 4096, 128256), (8192, 3584, 152064), (8192, 896, 151936),
             (8192, 4096, 32000)],
    "cpu": [(1024, 288, 32000)],
}


def logprobs_contests(bench: Bench) -> None:
    shapes = HEADS[bench.device.type]
    for shape in shapes:
        name, (h, w, targets) = "{} x {} x {}".format(*shape), logprobs_inputs(bench, *shape)
        forward, works = 2 * len(h) * w.numel(), logprobs_works(bench, h, w, targets)
        if bench.gpu and shape == shapes[-1] and bench.left() > 25:  # last, because it compiles
            compiled = torch.compile(logprobs_reference, dynamic=False)
            works["naive, compiled"] = Work(lambda h, w, call=compiled, t=targets: call(h, w, t)[0], (h, w))
        amounts = {"forward": forward, "both": 3 * forward} if shape == shapes[0] else {"both": 3 * forward}
        bench.compare("logprobs", name, works, amounts, "TFLOP/s")
        if shape == shapes[0]:
            works = {impl: Work(lambda h, w, call=call, t=targets: sum(call(h, w, t, entropy=True)), (h, w))
                     for impl, call in (("ours", linear_logprobs), ("naive", logprobs_reference))}
            bench.compare("logprobs and entropy", name, works, {"forward": forward}, "TFLOP/s")
        if shape == shapes[-1]:
            works = logprobs_works(bench, h, w.detach(), targets)
            bench.compare("logprobs, frozen head", name, works, {"both": 2 * forward}, "TFLOP/s")


def logprobs_inputs(bench: Bench, count: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    w = (bench.randn(vocab, width) * width**-0.5).requires_grad_()
    return bench.randn(count, width, grad=True), w, torch.randint(vocab, (count,), device=bench.device)


def logprobs_works(bench: Bench, h: Tensor, w: Tensor, targets: Tensor) -> dict[str, Work]:
    """Ours and the others; one that knows only the mean loss is asked for that, which is easier."""
    def naive(h, w, targets=targets):
        return logprobs_reference(h, w, targets)[0]

    def chunked(h, w):
        chunks = zip(h.split(1024), targets.split(1024), strict=True)
        return torch.cat([checkpoint(naive, rows, w, t, use_reentrant=False) for rows, t in chunks])

    def products():
        z = h.detach() @ w.detach().t()
        z @ w.detach()
        if w.requires_grad:
            z.t() @ h.detach()

    works = {"ours": Work(lambda h, w: linear_logprobs(h, w, targets)[0], (h, w)), "naive": Work(naive, (h, w)),
             "floor: its matmuls alone": Work(lambda h, w: h.detach() @ w.detach().t(), (h, w), products)}
    if bench.gpu:
        fused_mean = Work(lambda h, w: F.linear_cross_entropy(h, w, targets), (h, w))
        works |= {"chunked, checkpointed": Work(chunked, (h, w)), "F.linear_cross_entropy, mean": fused_mean}
    return works


# ------------------------------------------------------------------------------------------------------------------ NF4

MATRIX = {"cuda": (14336, 4096), "cpu": (4096, 1024)}  # outputs, inputs


def nf4_contests(bench: Bench) -> None:
    outputs, inputs = MATRIX[bench.device.type]
    weight = bench.randn(outputs, inputs) * inputs**-0.5
    state, levels = nf4.quantize(weight), nf4.LEVELS.to(bench.device)
    plain = nf4.dequantize(state, bench.dtype)  # what the matmuls beside ours read
    held = sum(t.nbytes for t in (state.codes, state.scales, state.scales2))

    def two_tables():
        values = torch.stack([levels[(state.codes >> 4).int()], levels[(state.codes & 15).int()]], 1).view(-1, 64)
        return (values * nf4.block_scales(state)[:, None]).view(state.shape).to(bench.dtype)

    decode, multiply = bitsandbytes(weight) if bench.gpu else ({}, {})
    works = {"ours": Work(lambda: nf4.dequantize(state, bench.dtype)), "two tables of 16": Work(two_tables)} | decode
    bench.compare("NF4 dequantise", f"{outputs} x {inputs}", works, {"forward": held + plain.nbytes}, "GB/s")
    for rows in (1, 4, 16, 64, 128, 256, 1024, 2048, 4096) if bench.gpu else ():
        x = bench.randn(rows, inputs)
        works = {"ours": lambda x: nf4.linear(x, state), f"{str(bench.dtype)[6:]} weight": lambda x: x @ plain.t(),
                 "ours, dequantised first": lambda x: x @ nf4.dequantize(state, x.dtype).t()} | multiply
        amount, unit = 2 * rows * outputs * inputs, "TFLOP/s"
        if rows <= 64:
            amount, unit = held + x.nbytes + rows * outputs * x.element_size(), "GB/s"
        bench.compare("NF4 linear", f"{rows} x {outputs} x {inputs}",
                      {impl: Work(call, (x,)) for impl, call in works.items()}, {"forward": amount}, unit)


def bitsandbytes(weight: Tensor) -> tuple[dict[str, Work], dict[str, Callable]]:
    """How bitsandbytes decodes this weight, and how it multiplies with it; nothing where it is not installed."""
    try:
        import bitsandbytes.functional as bnb
        from bitsandbytes import matmul_4bit
    except ImportError:
        return {}, {}
    packed, state = bnb.quantize_4bit(weight.to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
    return ({"bitsandbytes": Work(lambda: bnb.dequantize_4bit(packed, state))},
            {"bitsandbytes": lambda x: matmul_4bit(x, packed.t(), state)})


# ---------------------------------------------------------------------------------------------------------------- fused

def fused_contests(bench: Bench) -> None:
    """One layer of a 7B, 8192 tokens. The rotary cos and sin [N, 1, E] are drawn: any values cost as much."""
    x, weight, q, gate, up = (bench.randn(*shape, grad=True) for shape in (
        (8192, 4096), (4096,), (8192, 32, 128), (8192, 14336), (8192, 14336)))
    cos, sin = (bench.randn(8192, 1, 128) for _ in range(2))
    contests = [  # kernel, ours, PyTorch's, inputs, and how often forward and backward move the first of them
        ("RMSNorm", lambda x, w: fused.rms_norm(x, w, 1e-6), lambda x, w: fused.rms_norm_reference(x, w, 1e-6),
         (x, weight), 2, 3),
        ("rotary", fused.rotary, fused.rotary_reference, (q, cos, sin), 2, 2),
        ("SwiGLU", fused.swiglu, fused.swiglu_reference, (gate, up), 3, 5)]
    for kernel, ours, plain, inputs, forward, backward in contests:
        calls = {"ours": ours, "eager": plain, "compiled": torch.compile(plain, dynamic=False)}
        if kernel == "RMSNorm":
            calls["F.rms_norm"] = lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6)
        amounts = {"forward": forward * inputs[0].nbytes, "backward": backward * inputs[0].nbytes}
        bench.compare(kernel, " x ".join(map(str, inputs[0].shape)),
                      {impl: Work(call, inputs) for impl, call in calls.items()}, amounts, "GB/s")


CONTESTS = {"ceilings": ceilings, "first": first_contests, "trees": attention_contests, "decode": decode_contests,
            "nf4": nf4_contests, "attention": attention_contests, "logprobs": logprobs_contests,
            "fused": fused_contests}

if __name__ == "__main__":
    name, device, seconds, file, *share = sys.argv[1:]  # share: "compile every n-th of all groups", as i and n
    runtime.setup(device, 0)  # as every script does: on a CPU it decides who multiplies
    # Backward passes are timed over one graph again and again, which compiled ones allow only if they free nothing.
    torch._functorch.config.donated_buffer = False
    bench = Bench(name, torch.device(device), float(seconds), Path(file), tuple(map(int, share)))
    for bench.group in CONTESTS if share else (name,):
        CONTESTS[bench.group](bench)
