"""What `kernels/bench.py` measures, one function a group: whether our kernels are right, then who is how fast.

Work is counted as the formula needs it: pairs of query and key that see each other, nothing for padding or for what an
implementation computes twice, so that rates compare. On a machine without a GPU the PyTorch versions meet what a user
of PyTorch would write, at the sizes of the small models of `benchmarks/throughput.py`.
"""
from __future__ import annotations

import inspect
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
from torch.utils.checkpoint import checkpoint

import kernels
import runtime
from kernels import fused, nf4
from kernels.attention import attention
from kernels.bench import Desk, Work
from kernels.decode import decode_attention
from kernels.layout import Layout
from kernels.logprobs import linear_logprobs

# ----------------------------------------------------------------------------------------------------------- ceilings

def ceilings(desk: Desk) -> None:
    """What this machine moves and multiplies at best: GB/s read and written, and matmul TFLOP/s on random data."""
    size = 2**30 if desk.gpu else 2**27
    a, b = torch.empty(size, dtype=torch.uint8, device=desk.device), torch.ones(size, dtype=torch.uint8, device=desk.device)
    desk.compare("copy", f"{size // 2**20} MiB", {"PyTorch": Work(lambda: a.copy_(b))}, {"forward": 2 * size}, "GB/s")
    n = 8192 if desk.gpu else 1024
    x, y = desk.randn(n, n), desk.randn(n, n)
    desk.compare("matmul", f"{n} x {n} x {n}", {"PyTorch": Work(lambda: x @ y)}, {"forward": 2 * n**3}, "TFLOP/s")


# ---------------------------------------------------------------------------------------------------------- attention

class Scene(NamedTuple):
    """Segments of one packed row, and the heads that attend."""

    name: str
    lengths: list[int]
    trunks: list[int] | None = None
    prefixes: list[int] | None = None
    window: int | None = None
    heads: tuple[int, int, int] = (32, 8, 128)  # H, K, E


def mixed(longest: int, shortest: int, tokens: int) -> list[int]:
    """Lengths of a packed batch, uniform between the two."""
    rng, lengths = random.Random(0), []
    while sum(lengths) + shortest <= tokens:
        lengths.append(min(rng.randint(shortest, longest), tokens - sum(lengths)))
    return lengths


def four_turns(name: str, prompt: int, reply: int, count: int, heads: tuple[int, int, int]) -> Scene:
    """Dialogues rated at each of four turns: a trunk of the chosen replies, and a rejected one before each of them."""
    lengths, trunks, prefixes = [], [], []
    for _ in range(count):
        trunk = len(lengths)
        lengths += [4 * (prompt + reply)] + 4 * [reply]
        trunks += 5 * [trunk]
        prefixes += [0] + [turn * (prompt + reply) + prompt for turn in range(4)]
    return Scene(name, lengths, trunks, prefixes, None, heads)


def pairs_of(scene: Scene) -> list[int]:
    """The same dialogues as rows of their own: for every leaf, its path and the chosen path as long."""
    return [n + p for n, p in zip(scene.lengths, scene.prefixes, strict=True) if p for _ in range(2)]


def seen_pairs(scene: Scene) -> int:
    """Pairs of query and key that see each other: token i of a segment sees its prefix and i + 1 of its own, or its window."""
    widest = scene.window or 2**62
    prefixes = scene.prefixes or [0] * len(scene.lengths)
    return sum(min(widest, p + i + 1) for n, p in zip(scene.lengths, prefixes, strict=True) for i in range(n))


SMALL = (6, 6, 48)  # the 15 M model
SCENES = {
    "cuda": [Scene("4 x 2048", [2048] * 4), Scene("4 x 4096", [4096] * 4), Scene("1 x 16384", [16384]),
             Scene("packed 128-2048", mixed(2048, 128, 16384)), Scene("1 x 16384, window 4096", [16384], window=4096),
             four_turns("8 dialogues of 4 turns", 50, 200, 8, (32, 8, 128)), Scene("4 x 512", [512] * 4), Scene("4 x 1024", [1024] * 4),
             Scene("4 x 2048, 16 heads of 64", [2048] * 4, heads=(16, 16, 64))],
    "cpu": [Scene("8 x 512", [512] * 8, heads=SMALL), Scene("packed 32-512", mixed(512, 32, 4096), heads=SMALL),
            Scene("1 x 2048, window 256", [2048], window=256, heads=SMALL), four_turns("8 dialogues of 4 turns", 15, 40, 8, SMALL)],
}
FLEX = ("4 x 2048", "packed 128-2048", "1 x 16384, window 4096", "8 dialogues of 4 turns")  # each takes seconds to compile


def attention_group(desk: Desk) -> None:
    if desk.gpu:
        attention_checks(desk)
    flex = torch.compile(flex_attention, dynamic=False) if desk.gpu else None
    again = []
    for scene in SCENES[desk.device.type]:
        heads, kv_heads, width = scene.heads
        q, k, v = (desk.randn(sum(scene.lengths), n, width, grad=True) for n in (heads, kv_heads, kv_heads))
        layout = Layout.build(scene.lengths, scene.trunks, scene.prefixes).to(desk.device)
        works = {"ours": Work(lambda q, k, v, layout=layout, scene=scene: attention(q, k, v, layout, scene.window), (q, k, v))}
        works |= padded_attention(desk, scene) | (varlen_attention(desk, scene, q, k, v) if desk.gpu else {})
        forward = 4 * width * heads * seen_pairs(scene)
        amounts = {"forward": forward, "backward": 2.5 * forward}
        desk.compare("attention", scene.name, works, amounts, "TFLOP/s")
        if desk.gpu and scene.name in FLEX:
            again.append((scene, works["ours"], amounts))
    for scene, ours, amounts in again:
        if desk.left() > 20:
            works = {"ours": ours, "FlexAttention": flex_work(scene, flex, *ours.inputs)}
            desk.compare("attention", scene.name, works, amounts, "TFLOP/s", only=("FlexAttention",))


def padded_attention(desk: Desk, scene: Scene) -> dict[str, Work]:
    """PyTorch's own attention: rows padded to the longest, a tree taken apart into pairs of rows, a window as a mask."""
    rows = pairs_of(scene) if scene.prefixes else scene.lengths
    longest, (heads, kv_heads, width) = max(rows), scene.heads
    inputs = tuple(desk.randn(len(rows), n, longest, width, grad=True) for n in (heads, kv_heads, kv_heads))
    mask = None
    if scene.window:
        at = torch.arange(longest, device=desk.device)
        distance = at[:, None] - at
        mask = (distance >= 0) & (distance < scene.window)
    note = ", pairs padded" if scene.prefixes else ", padded" if len(set(rows)) > 1 else ""

    how = {"is_causal": True} if mask is None else {"attn_mask": mask}
    return {name + note: Work(lambda q, k, v, b=backend: sdpa(q, k, v, b, **how), inputs) for name, backend in backends(desk).items()}


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None, **how) -> Tensor:
    """PyTorch's attention with one of its backends, or whichever it takes."""
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if grouped and backend == SDPBackend.EFFICIENT_ATTENTION:  # has no groups: keys and values are repeated, as is usual
        k, v, grouped = (*(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)), {})
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, **grouped, **how)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **grouped, **how)


def backends(desk: Desk) -> dict[str, SDPBackend | None]:
    if not desk.gpu:
        return {"SDPA": None}
    return {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
            "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION}


def varlen_attention(desk: Desk, scene: Scene, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Work]:
    """FlashAttention over packed rows, PyTorch's or the package's; a tree as the packed rows of its pairs."""
    rows = scene.lengths
    if scene.prefixes:
        rows = pairs_of(scene)
        q, k, v = (desk.randn(sum(rows), x.shape[1], x.shape[2], grad=True) for x in (q, k, v))
    edges = torch.tensor([0, *rows], device=desk.device).cumsum(0).int()
    left, note, works = (scene.window or 0) - 1, ", pairs packed" if scene.prefixes else "", {}
    try:
        from torch.nn.attention.varlen import varlen_attn

        takes = inspect.signature(varlen_attn).parameters
        how = {"window_size": (left, 0)} if "window_size" in takes else {"is_causal": True}
        how |= {"enable_gqa": True} if "enable_gqa" in takes else {}
        if "window_size" in takes or not scene.window:
            works["varlen_attn" + note] = Work(lambda q, k, v: varlen_attn(q, k, v, edges, edges, max(rows), max(rows), **how), (q, k, v))
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func

        works["flash_attn" + note] = Work(lambda q, k, v: flash_attn_varlen_func(
            q, k, v, edges, edges, max(rows), max(rows), causal=True, window_size=(left, 0 if scene.window else -1)), (q, k, v))
    except ImportError:
        pass
    return works


def flex_work(scene: Scene, flex: Callable, q: Tensor, k: Tensor, v: Tensor) -> Work:
    """FlexAttention, compiled, over the same packed row; trees too, as a mask."""
    layout = Layout.build(scene.lengths, scene.trunks, scene.prefixes).to(q.device)
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


def attention_checks(desk: Desk) -> None:
    """Lengths around the edges of tiles, trees, windows, and scores of -120 and 200, where others gave NaN gradients."""
    cases = [(Scene("lengths around tiles", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 704], heads=(8, 2, 128)), 0.0, None),
             (Scene("tree", [300, 40, 70, 129, 130, 64], [0, 0, 0, 0, 4, 4], [0, 10, 299, 300, 0, 65], heads=(8, 2, 128)), 0.0, None),
             (Scene("tree, window 100", [300, 40, 70, 129], [0] * 4, [0, 10, 299, 300], 100, (8, 2, 128)), 0.0, None),
             (Scene("window 129", [1024, 300], window=129, heads=(8, 2, 128)), 0.0, None),
             (Scene("one KV head of 64", [513, 200], heads=(8, 1, 64)), 0.0, None),
             (Scene("softcap 30", [257, 100], heads=(4, 4, 128)), 0.0, 30.0),
             (Scene("heads of 256", [130, 77], heads=(4, 1, 256)), 0.0, None),
             (Scene("scores about -120", [704, 64], heads=(4, 2, 128)), -120.0, None),
             (Scene("scores about 200", [704, 64], heads=(4, 2, 128)), 200.0, None)]
    for dtype in (torch.bfloat16, torch.float16):
        for scene, score, softcap in cases:
            heads, kv_heads, width = scene.heads
            layout = Layout.build(scene.lengths, scene.trunks, scene.prefixes).to(desk.device)
            q, k, v = (torch.randn(layout.tokens, n, width, device=desk.device) for n in (heads, kv_heads, kv_heads))
            shift = (abs(score) / width**0.5) ** 0.5
            q, k = q + shift, k + (shift if score > 0 else -shift)
            inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            desk.check("attention", scene.name, lambda q, k, v, s=scene, c=softcap, at=layout: attention(q, k, v, at, s.window, c), inputs)


# ------------------------------------------------------------------------------------------------------------- decode

CACHES = {  # sequences, and tokens cached for each
    "cuda": [(64, 2048), (16, 2048), (1, 2048), (256, 2048), (64, 4096), (1, 512), (16, 512), (64, 512), (256, 512), (1, 4096), (16, 4096),
             (256, 4096)],
    "cpu": [(16, 512), (64, 512)],
}


def decode_group(desk: Desk) -> None:
    if desk.gpu:
        for dtype in (torch.bfloat16, torch.float16):
            for heads, kv_heads, width, room, window in ((32, 8, 128, 700, None), (8, 1, 64, 513, None), (8, 8, 128, 2048, 100),
                                                         (16, 4, 256, 300, None)):
                q, k, v = (desk.randn(*shape, dtype=dtype) for shape in ((5, heads, width), *2 * [(5, kv_heads, room, width)]))
                seen = torch.tensor([1, 2, 64, room - 1, room], device=desk.device)
                desk.check("decode", f"{heads}/{kv_heads} heads of {width}, {room} cached, window {window}",
                           lambda q, k, v, seen=seen, window=window: decode_attention(q, k, v, seen, window), [q, k, v])
    heads, kv_heads, width = (32, 8, 128) if desk.gpu else SMALL
    for batch, context in CACHES[desk.device.type]:
        q, k, v = desk.randn(batch, heads, width), *(desk.randn(batch, kv_heads, context, width) for _ in range(2))
        seen = torch.full((batch,), context, device=desk.device)

        def ours(q, k, v, seen=seen):
            return decode_attention(q, k, v, seen)

        works = {"ours": Work(ours, (q, k, v))}
        for name, backend in backends(desk).items():
            works[name] = Work(lambda q, k, v, backend=backend: sdpa(q[:, :, None], k, v, backend), (q, k, v))
        if desk.gpu:
            works["ours, CUDA graph"] = Work(graphed(ours), (q, k, v))
            if (batch, context) == CACHES["cuda"][0]:
                works["PyTorch, compiled"] = Work(torch.compile(plain_decode, dynamic=False), (q, k, v))
        desk.compare("decode", f"{batch} x {context}", works, {"forward": 2 * k.nbytes}, "GB/s")


def plain_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5, k.transpose(-1, -2))  # [B, K, G, S]
    return torch.matmul(torch.softmax(scores, -1), v).flatten(1, 2)


def graphed(call: Callable) -> Callable:
    """The call recorded as a CUDA graph when first made, replayed after."""
    graph = None

    def replay(*inputs):
        nonlocal graph
        if graph is None:
            call(*inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(*inputs)
        graph.replay()

    return replay


def in_torch(call: Callable):
    """The PyTorch version, whatever the device."""
    kernels.use("torch")
    try:
        return call()
    finally:
        kernels.use("auto")


# ----------------------------------------------------------------------------------------------------------- logprobs

HEADS = {  # tokens, width, vocabulary; the first is shown in full, the third trains a Mistral
    "cuda": [(8192, 4096, 128256), (8192, 4096, 151936), (8192, 4096, 32000), (4096, 4096, 128256), (8192, 3584, 152064),
             (8192, 896, 151936)],
    "cpu": [(1024, 288, 32000)],
}


def naive_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float | None = None,
                   entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """What most code does: all logits in the dtype of the model, then in fp32."""
    z = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature if temperature != 1 else z, -1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    return (chosen, -(logp.exp() * logp).sum(1)) if entropy else chosen


def logprobs_group(desk: Desk) -> None:
    if desk.gpu:
        logprobs_checks(desk)
    shapes = HEADS[desk.device.type]
    for count, width, vocab in shapes:
        name, most = f"{count} x {width} x {vocab}", (count, width, vocab) == shapes[0]
        h, w, targets = logprobs_inputs(desk, count, width, vocab)
        forward = 2 * count * width * vocab
        works = logprobs_works(desk, h, w, targets)
        desk.compare("logprobs", name, works, {"forward": forward, "both": 3 * forward} if most else {"both": 3 * forward}, "TFLOP/s")
        if most:
            both = {"ours": Work(lambda h, w, t=targets: sum(linear_logprobs(h, w, t, entropy=True)), (h, w)),
                    "naive": Work(lambda h, w, t=targets: sum(naive_logprobs(h, w, t, entropy=True)), (h, w))}
            desk.compare("logprobs and entropy", name, both, {"forward": forward}, "TFLOP/s")
        if vocab == 32000:
            desk.compare("logprobs, frozen head", name, logprobs_works(desk, h, w.detach(), targets), {"both": 2 * forward}, "TFLOP/s")
    if not desk.gpu:
        return
    h, w, targets = logprobs_inputs(desk, *shapes[0])
    forward = 2 * len(h) * w.numel()
    kept = (torch.rand(len(h), device=desk.device) < 0.5).nonzero()[:, 0]
    works = {"ours": Work(lambda h, w: linear_logprobs(h[kept], w, targets[kept])[0], (h, w)),
             "naive": Work(lambda h, w: naive_logprobs(h, w, targets)[kept], (h, w))}
    desk.compare("logprobs, half the rows masked", "{} x {} x {}".format(*shapes[0]), works, {"both": 1.5 * forward}, "TFLOP/s")
    compiled = torch.compile(naive_logprobs, dynamic=False)
    for shape in (shapes[0], shapes[2]):
        if desk.left() > 25:
            h, w, targets = logprobs_inputs(desk, *shape)
            works = {"ours": Work(lambda h, w, t=targets: linear_logprobs(h, w, t)[0], (h, w)),
                     "naive, compiled": Work(lambda h, w, t=targets: compiled(h, w, t), (h, w))}
            desk.compare("logprobs", "{} x {} x {}".format(*shape), works, {"both": 6 * len(h) * w.numel()}, "TFLOP/s",
                         only=("naive, compiled",))


def logprobs_inputs(desk: Desk, count: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    w = (torch.randn(vocab, width, device=desk.device) * width**-0.5).to(desk.dtype).requires_grad_()
    return desk.randn(count, width, grad=True), w, torch.randint(vocab, (count,), device=desk.device)


def logprobs_works(desk: Desk, h: Tensor, w: Tensor, targets: Tensor) -> dict[str, Work]:
    """Ours and what there is besides; those that know only the mean loss are asked for that, which is easier."""
    def chunked(h, w):
        chunks = zip(h.split(1024), targets.split(1024), strict=True)
        return torch.cat([checkpoint(naive_logprobs, rows, w, t, use_reentrant=False) for rows, t in chunks])

    def products():
        z = h.detach() @ w.detach().t()
        z @ w.detach()
        if w.requires_grad:
            z.t() @ h.detach()

    works = {"ours": Work(lambda h, w: linear_logprobs(h, w, targets)[0], (h, w)),
             "naive": Work(lambda h, w: naive_logprobs(h, w, targets), (h, w)),
             "floor: its matmuls alone": Work(lambda h, w: h.detach() @ w.detach().t(), (h, w), products)}
    if not desk.gpu:
        return works
    works["chunked, checkpointed"] = Work(chunked, (h, w))
    if hasattr(F, "linear_cross_entropy"):
        works["F.linear_cross_entropy, mean"] = Work(lambda h, w: F.linear_cross_entropy(h, w, targets), (h, w))
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        works["Liger, mean"] = Work(lambda h, w: LigerFusedLinearCrossEntropyLoss()(w, h, targets), (h, w))
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        works["CCE, mean"] = Work(lambda h, w: linear_cross_entropy(h, w, targets), (h, w))
    except ImportError:
        pass
    return works


def logprobs_checks(desk: Desk) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for count, width, vocab, options in ((1, 64, 100, {}), (37, 256, 1000, {}), (300, 512, 32000, {}), (129, 896, 5003, {}),
                                             (130, 256, 4097, {"temperature": 0.7, "entropy": True}), (200, 512, 2048, {"softcap": 30.0})):
            targets = torch.randint(vocab, (count,), device=desk.device)
            h = desk.randn(count, width, dtype=dtype, grad=True)
            w = (torch.randn(vocab, width, device=desk.device) * 3 * width**-0.5).to(dtype).requires_grad_()
            desk.check("logprobs", f"{count} x {width} x {vocab}, {options}",
                       lambda h, w, t=targets, o=options: linear_logprobs(h, w, t, **o), [h, w],
                       lambda h, w, t=targets, o=options: naive_logprobs(h, w, t, **o))


# ---------------------------------------------------------------------------------------------------------------- NF4

MATRIX = {"cuda": (14336, 4096), "cpu": (4096, 1024)}  # outputs, inputs


def nf4_group(desk: Desk) -> None:
    outputs, inputs = MATRIX[desk.device.type]
    weight = torch.randn(outputs, inputs, device=desk.device) * inputs**-0.5
    state = nf4.quantize(weight.to(desk.dtype))
    plain = nf4.dequantize(state, desk.dtype)  # what the matmuls beside ours read
    if desk.gpu:
        nf4_checks(desk)
    theirs = bitsandbytes(weight) if desk.gpu else None
    held = sum(t.nbytes for t in (state.codes, state.scales, state.scales2))
    works = {"ours": Work(lambda: nf4.dequantize(state, desk.dtype))}
    if desk.gpu:
        works["PyTorch version"] = Work(lambda: in_torch(lambda: nf4.dequantize(state, desk.dtype)))
    else:
        levels, byte = nf4.LEVELS, state.codes
        works["two tables of 16"] = Work(lambda: (torch.stack([levels[(byte >> 4).int()], levels[(byte & 15).int()]], 1).view(-1, 64)
                                                  * nf4.block_scales(state)[:, None]).view(state.shape))
    if theirs:
        works["bitsandbytes"] = Work(theirs[0])
    desk.compare("NF4 dequantise", f"{outputs} x {inputs}", works, {"forward": held + plain.nbytes}, "GB/s")
    for rows in (1, 4, 16, 64, 128, 256, 1024, 2048, 4096) if desk.gpu else ():
        x = desk.randn(rows, inputs)
        works = {"ours": Work(lambda x: nf4.linear(x, state), (x,)),
                 "ours, dequantised first": Work(lambda x: x @ nf4.dequantize(state, x.dtype).t(), (x,)),
                 f"{str(desk.dtype)[6:]} weight": Work(lambda x: x @ plain.t(), (x,))}
        if theirs:
            works["bitsandbytes"] = Work(theirs[1], (x,))
        few = rows <= 64
        amount = held + x.nbytes + rows * outputs * x.element_size() if few else 2 * rows * outputs * inputs
        desk.compare("NF4 linear", f"{rows} x {outputs} x {inputs}", works, {"forward": amount}, "GB/s" if few else "TFLOP/s")


def bitsandbytes(weight: Tensor) -> tuple[Callable, Callable] | None:
    try:
        import bitsandbytes.functional as bnb
        from bitsandbytes import matmul_4bit
    except ImportError:
        return None
    packed, state = bnb.quantize_4bit(weight.to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
    return lambda: bnb.dequantize_4bit(packed, state), lambda x: matmul_4bit(x, packed.t(), state)


def nf4_checks(desk: Desk) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for outputs, inputs, double in ((512, 256, True), (100, 192, False), (4096, 1024, True)):
            state = nf4.quantize(torch.randn(outputs, inputs, device=desk.device), double=double)
            one = torch.ones((), device=desk.device, dtype=dtype)
            desk.check("NF4 quantise", f"{outputs} x {inputs}", lambda w, d=double: nf4.dequantize(nf4.quantize(w, double=d), w.dtype),
                       [desk.randn(outputs, inputs, dtype=dtype)])
            desk.check("NF4 dequantise", f"{outputs} x {inputs}", lambda one, s=state: one * nf4.dequantize(s, one.dtype), [one])
            for rows in (1, 7, 16, 129, 700):
                desk.check("NF4 linear", f"{rows} x {outputs} x {inputs}", lambda x, s=state: nf4.linear(x, s),
                           [desk.randn(rows, inputs, dtype=dtype)], lambda x, s=state: x @ nf4.dequantize(s, x.dtype).t())


# -------------------------------------------------------------------------------------------------------------- fused

LAYER = {"cuda": (8192, 4096, 32, 128, 14336), "cpu": (2048, 288, 6, 48, 768)}  # tokens, width, heads of, width of the MLP


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([b, a], -1) * sin


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def angles(desk: Desk, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, E] as kernels/fused.py takes them."""
    turns = torch.arange(tokens, device=desk.device)[:, None] * 10000 ** (-torch.arange(0, width, 2, device=desk.device) / width)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat([cos, cos], -1)[:, None].to(dtype), torch.cat([-sin, sin], -1)[:, None].to(dtype)


def fused_group(desk: Desk) -> None:
    if desk.gpu:
        fused_checks(desk)
    tokens, width, heads, head_width, mlp = LAYER[desk.device.type]
    x, weight = desk.randn(tokens, width, grad=True), desk.randn(width, grad=True)
    q, (cos, sin) = desk.randn(tokens, heads, head_width, grad=True), angles(desk, tokens, head_width, desk.dtype)
    gate, up = desk.randn(tokens, mlp, grad=True), desk.randn(tokens, mlp, grad=True)
    norm, rope, glu = x.nbytes, q.nbytes, gate.nbytes
    contests = [("RMSNorm", f"{tokens} x {width}", lambda x, w: fused.rms_norm(x, w, 1e-6), plain_norm, (x, weight), 2 * norm, 3 * norm),
                ("rotary", f"{tokens} x {heads} x {head_width}", fused.rotary, plain_rotary, (q, cos, sin), 2 * rope, 2 * rope),
                ("SwiGLU", f"{tokens} x {mlp}", fused.swiglu, plain_swiglu, (gate, up), 3 * glu, 5 * glu)]
    for kernel, shape, ours, plain, inputs, forward, backward in contests:
        works = {"ours": Work(ours, inputs), "eager": Work(plain, inputs)}
        if desk.gpu:
            if kernel == "RMSNorm":
                works["F.rms_norm"] = Work(lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6), inputs)
            works |= {"compiled": Work(torch.compile(plain, dynamic=False), inputs)} | liger(kernel, inputs)
        desk.compare(kernel, shape, works, {"forward": forward, "backward": backward}, "GB/s")


def liger(kernel: str, inputs: tuple) -> dict[str, Work]:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}
    found = {"RMSNorm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6), "SwiGLU": LigerSiLUMulFunction.apply}
    return {"Liger": Work(found[kernel], inputs)} if kernel in found else {}


def fused_checks(desk: Desk) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, width in ((1, 64), (37, 288), (513, 4096), (100, 3584)):
            x, weight = desk.randn(tokens, width, dtype=dtype, grad=True), desk.randn(width, dtype=dtype, grad=True)
            desk.check("RMSNorm", f"{tokens} x {width}", lambda x, w: fused.rms_norm(x, w, 1e-6), [x, weight])
            gate, up = (desk.randn(tokens, width, dtype=dtype, grad=True) for _ in range(2))
            desk.check("SwiGLU", f"{tokens} x {width}", fused.swiglu, [gate, up])
        for tokens, heads, width in ((1, 1, 64), (37, 6, 48), (300, 32, 128), (65, 8, 256)):
            q = desk.randn(tokens, heads, width, dtype=dtype, grad=True)
            desk.check("rotary", f"{tokens} x {heads} x {width}", fused.rotary, [q, *angles(desk, tokens, width, dtype)])


GROUPS = {"ceilings": ceilings, "attention": attention_group, "logprobs": logprobs_group, "decode": decode_group, "nf4": nf4_group,
          "fused": fused_group}

if __name__ == "__main__":
    name, device, seconds, file = sys.argv[1:]
    runtime.setup(device, 0)  # as every script does: on a CPU it decides who multiplies
    # Backward passes are timed over one graph again and again, which compiled ones only allow when they give nothing away.
    torch._functorch.config.donated_buffer = False
    GROUPS[name](Desk(name, torch.device(device), float(seconds), Path(file)))
