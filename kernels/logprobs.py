"""Log-probabilities of chosen tokens straight from hidden states: the [M, V] logits never exist whole.

For hidden states h [M, D], head W [V, D] and one target t per row, with z = softcap(h W^T) / temperature:

    logprob = z_t - logsumexp(z)                  entropy H = logsumexp(z) - sum_v p_v z_v
    dz_v    = g (1[v = t] - p_v) - g_H p_v (log p_v + H)      g, g_H upstream; p = softmax(z)
    dh      = dz W      dW = dz^T h

The forward walks over rows in chunks of CHUNK_BYTES of logits and keeps, while they fit in KEEP_BYTES,
the unit gradients 1[v = t] - p, so that any upstream g finishes the job with two matmuls. Beyond that it
keeps one logsumexp per row and the backward computes the chunk again: 8 M D V operations instead of 6.
Logits and softmax are fp32 whatever the dtype of h: a bf16 logit is off by up to 2^-8 of itself.
"""
from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
KEEP_BYTES = 128 * 2**20


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
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= len(weight)):
        raise ValueError(f"targets lie in [{int(targets.min())}, {int(targets.max())}], expected [0, {len(weight)})")
    logprobs, entropies = _LinearLogprobs.apply(hidden, weight, targets, temperature, softcap, entropy)
    return logprobs, entropies if entropy else None


class _LinearLogprobs(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, entropy):
        count, vocab = len(hidden), len(weight)
        logprobs = hidden.new_empty(count, dtype=_wide(hidden))
        entropies = torch.zeros_like(logprobs)
        rows = max(1, CHUNK_BYTES // (4 * vocab))
        # The entropy's own gradient needs p as well as 1[v = t] - p, so nothing is kept for it.
        keep = any(ctx.needs_input_grad[:2]) and not entropy
        room = min(count, KEEP_BYTES // (hidden.element_size() * vocab)) // rows * rows if keep else 0
        unit = hidden.new_empty(count if keep and count <= room + rows else room, vocab)
        for a in range(0, count, rows):
            z, slope = _logits(hidden[a : a + rows], weight, temperature, softcap)
            lse = z.logsumexp(1)
            target = targets[a : a + rows, None]
            logprobs[a : a + rows] = z.gather(1, target)[:, 0] - lse
            if entropy:
                entropies[a : a + rows] = (lse - (torch.softmax(z, 1) * z).sum(1)).clamp_(min=0)
            if a < len(unit):
                unit[a : a + rows] = _unit_gradient(z, lse, target, slope, temperature)
        ctx.save_for_backward(hidden, weight, targets, entropies, unit)
        ctx.options = temperature, softcap, entropy, rows
        return logprobs, entropies

    @staticmethod
    def backward(ctx, g, g_entropy):
        hidden, weight, targets, entropies, unit = ctx.saved_tensors
        temperature, softcap, entropy, rows = ctx.options
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight) if need_weight else None

        def spread(dz, chunk):
            if need_hidden:
                dhidden[chunk] = dz @ weight.to(hidden.dtype)
            if need_weight:
                dweight.add_(dz.t() @ hidden[chunk])

        if len(unit):
            spread(unit * g[: len(unit), None].to(unit.dtype), slice(0, len(unit)))
        for a in range(len(unit), len(hidden), rows):
            chunk = slice(a, a + rows)
            z, slope = _logits(hidden[chunk], weight, temperature, softcap)
            lse = z.logsumexp(1)
            dz = 0
            if entropy:
                logp = z - lse[:, None]
                dz = -g_entropy[chunk, None] * logp.exp() * (logp + entropies[chunk, None])
                dz *= 1 / temperature if slope is None else slope / temperature
            dz = dz + _unit_gradient(z, lse, targets[chunk, None], slope, temperature).mul_(g[chunk, None])
            spread(dz.to(hidden.dtype), chunk)
        return dhidden, dweight, None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _logits(hidden, weight, temperature, softcap):
    """z [m, V] in fp32 (fp64 for fp64), and d softcap(x) / dx [m, V] when there is one."""
    wide = _wide(hidden)
    z = hidden.to(wide) @ weight.to(wide).t()
    slope = None
    if softcap is not None:
        capped = torch.tanh(z / softcap)
        slope = 1 - capped * capped
        z = capped * softcap
    return z.div_(temperature) if temperature != 1.0 else z, slope


def _unit_gradient(z, lse, target, slope, temperature):
    """d logprob / d (h W^T) [m, V], in place of z."""
    unit = z.sub_(lse[:, None]).exp_().neg_()
    unit.scatter_add_(1, target, torch.ones_like(target, dtype=unit.dtype))
    if slope is not None:
        unit *= slope
    return unit.div_(temperature) if temperature != 1.0 else unit
