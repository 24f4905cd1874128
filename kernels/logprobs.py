"""Log-probabilities of given tokens straight from hidden states: the [M, V] logits never exist as a whole.

For hidden states h [M, D], head W [V, D] and one target t per row, with z = softcap(h W^T) / temperature:

    logprob = z_t - logsumexp(z)                  entropy H = logsumexp(z) - sum_v p_v z_v
    dz_v    = g (1[v = t] - p_v) - g_H p_v (log p_v + H)      g, g_H upstream; p = softmax(z)
    dh      = dz W      dW = dz^T h

Logits and softmax are fp32 whatever the dtype of h: rounding to bf16 moves a logit by up to 2^-8 of its size.

The PyTorch version walks over rows in chunks of CHUNK_BYTES of logits and keeps the error p - 1[v = t] of as many
rows as fit in KEEP_BYTES: then the backward is two matmuls, whatever g is. The logits of the other rows are computed
again in the backward, 8 M D V operations instead of 6. Without gradients nothing is kept.

The Triton version keeps L = logsumexp(z) and H, and of as many columns as fit in KEPT_BYTES p, times a factor that is
1 for the largest so far, rounded to the dtype of h: 6 M D V operations for those and 8 for the others, or 4 and 6 for a
frozen W. As in Wijmans et al. 2024 (arXiv:2411.09009) a tile of logits only ever lives in registers:

    forward   one program per 128 tokens and BLOCKS tiles of W  max z, sum e^(z - max), sum e^(z - max) (z - max)
    combine   the programs of a token, in order                 logprob, H, L
    backward  for each SLICE rows of W: one kernel writes       dz [M, SLICE]
              two matmuls                                       dh += dz W in fp32; these rows of dW = dz^T h, once

No atomics and no locks: every number is written once, by one program, and a row's logprob has the same bits in any
batch. Besides its results it needs 12 bytes of partials per token and BLOCKS tiles, WORKSPACE_BYTES of dz, and 4 M D
bytes for dh. If W has another dtype than h, it is rounded to that of h, a slice at a time.
"""
from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import allocate_descriptors, architecture, jit, launch, missing_rows, on_triton, tl, triton


def logprobs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition of `linear_logprobs`, as most code has it: all logits in the dtype of the model, then in fp32."""
    z = (hidden @ weight.t()).to(_wide(hidden))                     # [M, V]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature if temperature != 1.0 else z, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1) if entropy else None


def linear_logprobs(
    hidden: Tensor,   # [M, D] hidden state that predicts the target: the one before it on its path
    weight: Tensor,   # [V, D] language-model head
    targets: Tensor,  # [M] token ids
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(softcap(hidden weight^T) / temperature) at the targets, [M] fp32 nats, and the entropy [M] if asked.

    Differentiable in hidden and weight; a weight that needs no gradient costs none.
    Raises ValueError for a temperature that is not positive or targets outside [0, V).
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    # Not on a GPU, where reading the targets back would sync: there a wrong index raises or, with Triton, gives NaN.
    if targets.device.type == "cpu" and len(targets):
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= len(weight):
            raise ValueError(f"targets lie in [{lowest}, {highest}], expected [0, {len(weight)})")
    count, missing = len(hidden), missing_rows(hidden)
    if missing:
        hidden, targets = F.pad(hidden, (0, 0, 0, missing)), F.pad(targets, (0, missing))
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    version = _TileLogprobs if on_triton(hidden) and count else _LinearLogprobs  # no rows: nothing to launch
    logprobs, entropies = version.apply(hidden, weight, targets, temperature, softcap, entropy, keep)
    return logprobs[:count], entropies[:count] if entropy else None


# ----------------------------------------------------------------------------------- the PyTorch version

CHUNK_BYTES = 32 * 2**20  # of logits: fewer rows would read W too often
KEEP_BYTES = 192 * 2**20


class _LinearLogprobs(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, entropy, keep):
        count, vocab, wide = len(hidden), len(weight), _wide(hidden)
        logprobs = hidden.new_empty(count, dtype=wide)
        entropies = torch.zeros_like(logprobs)
        rows = max(1, CHUNK_BYTES // (4 * vocab))
        rows = rows if rows < 64 else (rows + 32) // 64 * 64  # oneDNN multiplies 256 rows a tenth faster than 262
        # The entropy's own gradient needs p as well as the error, so nothing is kept for it.
        room = min(count, KEEP_BYTES // (hidden.element_size() * vocab)) if keep and not entropy else 0
        errors = hidden.new_empty(room, vocab)
        head, buffer = weight.to(wide), logprobs.new_empty(min(rows, count), vocab)
        for a in range(0, count, rows):
            chunk, target = slice(a, a + rows), targets[a : a + rows, None]
            kept = errors[chunk]
            in_place = len(kept) == len(target) and hidden.dtype == wide
            out = kept if in_place else buffer[: len(target)]
            z, slope = _logits(hidden[chunk], head, temperature, softcap, out)
            p, logprobs[chunk], entropies[chunk] = _softmax(z, target, entropy)
            if len(kept):
                error = _error(p, target, slope, temperature)
                if not in_place:
                    kept.copy_(error[: len(kept)])
        ctx.save_for_backward(hidden, weight, targets, entropies, errors)
        ctx.options = temperature, softcap, entropy, rows
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_entropy):
        hidden, weight, targets, entropies, errors = ctx.saved_tensors
        temperature, softcap, entropy, rows = ctx.options
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        narrow = weight.to(hidden.dtype)

        def spread(dz, upstream, chunk):
            """Add dz [m, V] times upstream [m] to the gradients; upstream goes to the D wide side, which is cheaper."""
            upstream = upstream[:, None].to(hidden.dtype)
            if dhidden is not None:
                torch.mul(dz @ narrow, upstream, out=dhidden[chunk])
            if dweight is not None:
                dweight.add_(dz.t() @ (hidden[chunk] * upstream))

        kept = len(errors)
        if kept:
            spread(errors, -g[:kept], slice(0, kept))
        if kept < len(hidden):
            head, buffer = weight.to(g.dtype), g.new_empty(min(rows, len(hidden) - kept), len(weight))
        for a in range(kept, len(hidden), rows):
            chunk, target = slice(a, a + rows), targets[a : a + rows, None]
            z, slope = _logits(hidden[chunk], head, temperature, softcap, buffer[: len(target)])
            if entropy:
                logp = torch.log_softmax(z, 1)
                dz = -g_entropy[chunk, None] * logp.exp() * (logp + entropies[chunk, None])
                dz *= 1 / temperature if slope is None else slope / temperature
                dz -= _error(logp.exp_(), target, slope, temperature) * g[chunk, None]
                spread(dz.to(hidden.dtype), torch.ones_like(g[chunk]), chunk)
            else:
                p, _, _ = _softmax(z, target, False)
                spread(_error(p, target, slope, temperature).to(hidden.dtype), -g[chunk], chunk)
        return dhidden, dweight, None, None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(hidden, head, temperature, softcap, out):
    """z [m, V], in `out`, and d softcap(x) / dx [m, V] when there is one."""
    z = torch.mm(hidden.to(head.dtype), head.t(), out=out)
    slope = None
    if softcap is not None:
        capped = torch.tanh(z / softcap)
        slope = 1 - capped * capped
        z = torch.mul(capped, softcap, out=z)
    return z.div_(temperature) if temperature != 1.0 else z, slope


def _softmax(z, target, entropy):
    """p [m, V], in place of z without `entropy`, log p at the targets and the entropy (0 unless asked for), [m].

    PyTorch's softmax takes one pass, but adds up a row of 49,152 in sixteen long sums: by itself a log-probability of
    SmolLM2-135M is 8e-6 off, always to the same side. What it should have divided by comes from p: its largest is one
    over the total, and `sum`, which adds in pairs, says how far the total was off. Then it is 1e-6.
    """
    top, at_target = z.amax(1, keepdim=True), z.gather(1, target)[:, 0]
    p = torch.softmax(z, 1) if entropy else torch.softmax(z, 1, out=z)
    total = p.sum(1)
    log_total = total.log() - p.amax(1).log_()
    return p, at_target - top[:, 0] - log_total, log_total - (p * z.sub_(top)).sum(1) / total if entropy else 0.0


def _error(p, target, slope, temperature):
    """- d logprob / d (h W^T) = p - 1[v = t], times what lies between [m, V]; in place of p."""
    error = p.scatter_add_(1, target, torch.full(target.shape, -1.0, dtype=p.dtype, device=p.device))
    if slope is not None:
        error *= slope
    return error.div_(temperature) if temperature != 1.0 else error


# ------------------------------------------------------------------------------------ the Triton version

# Tiles of tokens (M), vocabulary (V) and width (D) by architecture; a program of the forward computes BLOCKS tiles.
CONFIGS = {
    80: dict(BLOCK_M=128, BLOCK_V=128, BLOCK_D=32, BLOCKS=8, num_warps=8, num_stages=4),
    90: dict(BLOCK_M=128, BLOCK_V=256, BLOCK_D=64, BLOCKS=4, num_warps=8, num_stages=4),
    100: dict(BLOCK_M=128, BLOCK_V=256, BLOCK_D=64, BLOCKS=4, num_warps=8, num_stages=4),
}
FLOAT32 = dict(BLOCK_M=64, BLOCK_V=32, BLOCK_D=16, BLOCKS=8, num_warps=8, num_stages=2)  # no matrix units: small tiles
NARROW = 128                   # BLOCK_V with a softcap: at 256 its registers spill
COMBINE = dict(BLOCK_M=32, BLOCK_S=32, num_warps=4, num_stages=2)  # tokens, and partials of each, at a time
GROUP = 8                      # blocks of tokens that run side by side: W is read from memory M / 1024 times
SLICE = 8192                   # rows of W at a time
WORKSPACE_BYTES = 256 * 2**20  # of dz
# Of probabilities, by architecture; 0: all computed again. sm_80 is also small GPUs; sm_100 spills with the entropy.
KEPT_BYTES = {80: 0, 90: 2**30, 100: 0}
ERROR = dict(BLOCK_M=16, num_warps=4, num_stages=1)  # rows of probabilities at a time


class _TileLogprobs(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, entropy, keep):
        hidden, (count, width), vocab = hidden.contiguous(), hidden.shape, len(weight)
        if width * hidden.element_size() % 16:
            raise ValueError(f"hidden is {width} wide in {hidden.dtype}, expected a multiple of 16 bytes: "
                             "use kernels=torch")
        tiles, options = _setting(hidden, temperature, softcap, entropy)
        reach = tiles["BLOCK_V"] * tiles["BLOCKS"]
        partials = hidden.new_empty(triton.cdiv(vocab, reach), 2 + entropy, count, dtype=torch.float32)
        logits = torch.full_like(partials[0, 0], float("nan"))  # NaN stays where a target is outside [0, V)
        logprobs, lse, entropies = (torch.empty_like(logits) for _ in range(3))
        # fp16 could not hold small probabilities.
        room = KEPT_BYTES[architecture(hidden.device)] if keep and hidden.dtype != torch.float16 else 0
        columns = min(vocab, room // (hidden.element_size() * count) // reach * reach)
        kept = hidden.new_empty(count, triton.cdiv(columns, 16) * 16)  # rows start at multiples of 16 bytes
        peaks = hidden.new_empty(triton.cdiv(columns, tiles["BLOCK_V"]), count, dtype=torch.float32)
        step = vocab if weight.dtype == hidden.dtype else triton.cdiv(SLICE, reach) * reach
        for a, b in _slices(vocab, columns, step):
            part, keeping = weight[a:b].to(hidden.dtype).contiguous(), a < columns
            grid = (triton.cdiv(count, tiles["BLOCK_M"]) * triton.cdiv(len(part), reach),)
            places = (kept[:, a:], peaks[a // tiles["BLOCK_V"] :]) if keeping else (None, None)
            launch(_forward, grid, hidden, part, targets - a, partials[a // reach :], logits, *places, count, len(part),
                   width, kept.shape[1], KEEP=keeping, **options, **(_keeping(tiles) if keeping else tiles))
        grid = (triton.cdiv(count, COMBINE["BLOCK_M"]),)
        launch(_combine, grid, partials, logits, logprobs, lse, entropies, count, len(partials), ENTROPY=entropy,
               **COMBINE)
        ctx.save_for_backward(hidden, weight, targets, logprobs, lse, entropies, kept, peaks)
        ctx.options = columns, temperature, softcap, entropy
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_entropy):
        hidden, weight, targets, logprobs, lse, entropies, kept, peaks = ctx.saved_tensors
        (count, width), vocab, columns = hidden.shape, len(weight), ctx.options[0]
        tiles, options = _setting(hidden, *ctx.options[1:])
        tiles = {name: size for name, size in tiles.items() if name != "BLOCKS"}
        dhidden = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        upstream = lse, entropies, g.contiguous(), g_entropy.contiguous()
        # Whole tiles of W, or all of a small vocabulary. Rows of dz start at multiples of 16 bytes: descriptors must.
        block = tiles["BLOCK_V"]
        fitting = min(SLICE, WORKSPACE_BYTES // (hidden.element_size() * count)) // block * block
        step = min(max(block, fitting), triton.cdiv(vocab, 16) * 16)
        room = hidden.new_empty(count, step)
        for a, b in _slices(vocab, columns, step):
            part = weight[a:b].to(hidden.dtype).contiguous()
            parts = triton.cdiv(len(part), block)
            if a < columns:
                grid = triton.cdiv(count, ERROR["BLOCK_M"]), parts
                launch(_kept_dz, grid, kept[:, a:], peaks[a // block :], targets - a, logprobs, *upstream, room, count,
                       len(part), kept.shape[1], step, options["scale"], SOFTCAP=options["SOFTCAP"],
                       ENTROPY=options["ENTROPY"], BLOCK_V=block, **ERROR)
            else:
                grid = (triton.cdiv(count, tiles["BLOCK_M"]) * parts,)
                launch(_dz, grid, hidden, part, targets - a, *upstream, room, count, len(part), width, step, **options,
                       **tiles)
            dz = room[:, : len(part)]
            if dhidden is not None:
                _product(dz, part, dhidden, add=a > 0)
            if dweight is not None:
                _product(dz.t(), hidden, dweight[a:b], add=False)
        return dhidden if dhidden is None else dhidden.to(hidden.dtype), dweight, None, None, None, None, None


def _slices(vocab: int, columns: int, step: int) -> list[tuple[int, int]]:
    """The vocabulary in slices of `step`, those of the first `columns` apart from the others."""
    ends = [*range(0, columns, step), *range(columns, vocab, step), vocab]
    return list(pairwise(ends))


def _tiles(config: dict, softcap: float | None) -> dict:
    return config | {"BLOCK_V": min(config["BLOCK_V"], NARROW)} if softcap else config


def _keeping(tiles: dict) -> dict:
    """With a stage less, whose shared memory the tile of probabilities takes on its way out."""
    return tiles | {"num_stages": tiles["num_stages"] - 1}


def _setting(hidden: Tensor, temperature: float, softcap: float | None, entropy: bool) -> tuple[dict, dict]:
    """Tile sizes, and the other arguments that the two large kernels share."""
    allocate_descriptors()
    tiles = _tiles(FLOAT32 if hidden.dtype == torch.float32 else CONFIGS[architecture(hidden.device)], softcap)
    scale = 1 / (temperature * math.log(2))
    return tiles, {"scale": scale, "SOFTCAP": softcap or 0.0, "ENTROPY": entropy, "GROUP": GROUP}


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a b, or out + a b. On a GPU bf16 products are added to an fp32 out without rounding."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=int(add))
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, beta=int(add), out_dtype=torch.float32, out=out)
    else:
        out.copy_(out + a @ b if add else a @ b)


@jit
def _place(M, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """The block of tokens and the part of the vocabulary that this program computes."""
    blocks = tl.cdiv(M, BLOCK_M)
    parts = tl.num_programs(0) // blocks
    return tl.swizzle2d(tl.program_id(0) // parts, tl.program_id(0) % parts, blocks, parts, GROUP)


@jit
def _tile(hidden, weight, row, column, D, scale, SOFTCAP: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """z / ln 2 [BLOCK_M, BLOCK_V], so that exp2 serves as exp. Reads past an end give 0."""
    tl.assume(D > 0)  # else Triton 3.6 allows for skipping the loop, and ptxas serialises the matmuls (C7515)
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for d in range(0, D, BLOCK_D):
        z = tl.dot(hidden.load([row, d]), weight.load([column, d]).T, z, input_precision="ieee")
    if SOFTCAP > 0:  # tanh x = 1 - 2 / (e^2x + 1)
        z = SOFTCAP * (1 - 2 / (tl.exp2(z * (2.885390081777927 / SOFTCAP)) + 1))
    return z * scale


@jit
def _forward(hidden, weight, targets, partials, logits, kept, peaks, M, V, D, stride, scale,
             KEEP: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, GROUP: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr):
    block, part = _place(M, BLOCK_M, GROUP)
    hidden = tl.make_tensor_descriptor(hidden, [M, D], [D, 1], [BLOCK_M, BLOCK_D])
    weight = tl.make_tensor_descriptor(weight, [V, D], [D, 1], [BLOCK_V, BLOCK_D])
    if KEEP:
        probabilities = tl.make_tensor_descriptor(kept, [M, V], [stride, 1], [BLOCK_M, BLOCK_V])
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets + rows, mask=rows < M, other=-1).to(tl.int32)
    logit = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    first = part * BLOCKS * BLOCK_V
    end = tl.minimum(first + BLOCKS * BLOCK_V, V)
    for column in range(first, end, BLOCK_V):
        z = _tile(hidden, weight, block * BLOCK_M, column, D, scale, SOFTCAP, BLOCK_M, BLOCK_V, BLOCK_D)
        columns = column + tl.arange(0, BLOCK_V)[None, :]
        z = tl.where(columns < V, z, -1e30)  # not -inf: p * z below would be 0 times -inf, NaN
        logit += tl.sum(tl.where(columns == target[:, None], z, 0.0), 1)
        peak = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp2(top - peak)
        z -= peak[:, None]
        p = tl.exp2(z)
        if ENTROPY:
            moment = (moment + (top - peak) * total) * shrink + tl.sum(p * z, 1)
        total = total * shrink + tl.sum(p, 1)
        top = peak
        if KEEP:
            probabilities.store([block * BLOCK_M, column], p.to(kept.dtype.element_ty))
            tl.store(peaks + tl.cast(column // BLOCK_V, tl.int64) * M + rows, peak, mask=rows < M)
    plane = partials + part.to(tl.int64) * (2 + ENTROPY) * M + rows
    tl.store(plane, top, mask=rows < M)
    tl.store(plane + M, total, mask=rows < M)
    if ENTROPY:
        tl.store(plane + 2 * M, moment, mask=rows < M)
    tl.store(logits + rows, logit, mask=(target >= first) & (target < end))


@jit
def _combine(partials, logits, logprobs, lse, entropies, M, parts,
             ENTROPY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """The partials of BLOCK_M tokens, merged in order."""
    LN2: tl.constexpr = 0.6931471805599453
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, parts, BLOCK_S):
        part = (first + tl.arange(0, BLOCK_S))[:, None]
        real = (part < parts) & (rows < M)[None, :]
        plane = partials + part.to(tl.int64) * (2 + ENTROPY) * M + rows[None, :]
        tops = tl.load(plane, mask=real, other=-1e30)
        totals = tl.load(plane + M, mask=real, other=1.0)
        peak = tl.maximum(top, tl.max(tops, 0))
        shrink, shrinks = tl.exp2(top - peak), tl.exp2(tops - peak[None, :])
        if ENTROPY:
            moments = tl.load(plane + 2 * M, mask=real, other=0.0) + (tops - peak[None, :]) * totals
            moment = (moment + (top - peak) * total) * shrink + tl.sum(moments * shrinks, 0)
        total = total * shrink + tl.sum(totals * shrinks, 0)
        top = peak
    logit = tl.load(logits + rows, mask=rows < M, other=0.0)
    tl.store(logprobs + rows, (logit - top - tl.log2(total)) * LN2, mask=rows < M)
    tl.store(lse + rows, top + tl.log2(total), mask=rows < M)
    if ENTROPY:
        tl.store(entropies + rows, (tl.log2(total) - moment / total) * LN2, mask=rows < M)


@jit
def _dz(hidden, weight, targets, lse, entropies, g, g_entropy, dz, M, V, D, stride, scale,
        SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, GROUP: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """dz of the header times dz / d(h W^T), one tile per program."""
    block, part = _place(M, BLOCK_M, GROUP)
    hidden = tl.make_tensor_descriptor(hidden, [M, D], [D, 1], [BLOCK_M, BLOCK_D])
    weight = tl.make_tensor_descriptor(weight, [V, D], [D, 1], [BLOCK_V, BLOCK_D])
    out = tl.make_tensor_descriptor(dz, [M, V], [stride, 1], [BLOCK_M, BLOCK_V])
    z = _tile(hidden, weight, block * BLOCK_M, part * BLOCK_V, D, scale, SOFTCAP, BLOCK_M, BLOCK_V, BLOCK_D)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets + rows, mask=rows < M, other=-1).to(tl.int32)[:, None]
    logp = z - tl.load(lse + rows, mask=rows < M, other=0.0)[:, None]  # base 2
    columns = part * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    d = _dz_tile(tl.exp2(logp), logp, z, columns == target, rows, entropies, g, g_entropy, M, scale, SOFTCAP, ENTROPY)
    out.store([block * BLOCK_M, part * BLOCK_V], d.to(dz.dtype.element_ty))


@jit
def _kept_dz(kept, peaks, targets, logprobs, lse, entropies, g, g_entropy, dz, M, V, kept_stride, stride, scale,
             SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """The same from what the forward kept; at the target, where 1 - p would lose what p is rounded by, from logprob."""
    LN2: tl.constexpr = 0.6931471805599453
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = part * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    inside = (rows < M)[:, None] & (columns < V)
    p = tl.load(kept + rows.to(tl.int64)[:, None] * kept_stride + columns, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(targets + rows, mask=rows < M, other=-1).to(tl.int32)[:, None]
    total = tl.load(lse + rows, mask=rows < M, other=0.0)[:, None]
    shift = tl.load(peaks + part.to(tl.int64) * M + rows, mask=rows < M, other=0.0)[:, None] - total
    at_target = tl.load(logprobs + rows, mask=rows < M, other=0.0)[:, None] / LN2
    hit = columns == target
    logp = tl.where(hit, at_target, tl.log2(tl.maximum(p, 1e-38)) + shift)
    p = tl.where(hit, tl.exp2(at_target), p * tl.exp2(shift))
    d = _dz_tile(p, logp, logp + total, hit, rows, entropies, g, g_entropy, M, scale, SOFTCAP, ENTROPY)
    tl.store(dz + rows.to(tl.int64)[:, None] * stride + columns, d.to(dz.dtype.element_ty), mask=inside)


@jit
def _dz_tile(p, logp, z, hit, rows, entropies, g, g_entropy, M, scale, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr):
    """dz / d(h W^T) times dz of the header from p, log2 p, z / ln 2 and where the target is, for a tile's rows."""
    LN2: tl.constexpr = 0.6931471805599453
    at_target = tl.load(g + rows, mask=rows < M, other=0.0)[:, None] * scale * LN2
    everywhere = at_target
    if ENTROPY:
        upstream = tl.load(g_entropy + rows, mask=rows < M, other=0.0)[:, None] * scale * LN2
        everywhere += upstream * (logp * LN2 + tl.load(entropies + rows, mask=rows < M, other=0.0)[:, None])
    d = tl.where(hit, at_target, 0.0) - p * everywhere
    if SOFTCAP > 0:  # d softcap(x) / dx = 1 - tanh^2
        tanh = z / (scale * SOFTCAP)
        d *= 1 - tanh * tanh
    return d
