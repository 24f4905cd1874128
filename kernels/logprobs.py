"""Log-probabilities of chosen tokens straight from hidden states: the [M, V] logits never exist whole.

For hidden states h [M, D], head W [V, D] and one target t per row, with z = softcap(h W^T) / temperature:

    logprob = z_t - logsumexp(z)                  entropy H = logsumexp(z) - sum_v p_v z_v
    dz_v    = g (1[v = t] - p_v) - g_H p_v (log p_v + H)      g, g_H upstream; p = softmax(z)
    dh      = dz W      dW = dz^T h

The forward walks over rows in chunks of CHUNK_BYTES of logits and keeps, while they fit in KEEP_BYTES, the
error p - 1[v = t]: whatever g turns out to be, two matmuls finish the job. Rows beyond that are computed
again in the backward: 8 M D V operations instead of 6. Logits and softmax are fp32 whatever the dtype of
h: a bf16 logit is off by up to 2^-8 of itself.
"""
from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
KEEP_BYTES = 192 * 2**20


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
    # On a GPU looking would wait for it, and a wrong index stops there by itself.
    if targets.device.type == "cpu" and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
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
        # The entropy's own gradient needs p as well as the error, so nothing is kept for it.
        keep = any(ctx.needs_input_grad[:2]) and not entropy
        room = min(count, KEEP_BYTES // (hidden.element_size() * vocab)) if keep else 0
        errors = hidden.new_empty(room, vocab)
        for a in range(0, count, rows):
            target = targets[a : a + rows, None]
            logp, slope = _log_softmax(hidden[a : a + rows], weight, temperature, softcap)
            logprobs[a : a + rows] = logp.gather(1, target)[:, 0]
            if entropy:
                entropies[a : a + rows] = -(logp.exp() * logp).sum(1)
            if a < room:
                errors[a : a + rows] = _error(logp, target, slope, temperature)[: room - a]
        ctx.save_for_backward(hidden, weight, targets, entropies, errors)
        ctx.options = temperature, softcap, entropy, rows
        return logprobs, entropies

    @staticmethod
    def backward(ctx, g, g_entropy):
        hidden, weight, targets, entropies, errors = ctx.saved_tensors
        temperature, softcap, entropy, rows = ctx.options
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None

        def spread(dz, upstream, chunk):
            """dz [m, V] is still to be multiplied by upstream [m]: cheaper on the D wide side of both products."""
            upstream = upstream[:, None].to(hidden.dtype)
            if dhidden is not None:
                torch.mul(dz @ weight.to(hidden.dtype), upstream, out=dhidden[chunk])
            if dweight is not None:
                dweight.add_(dz.t() @ (hidden[chunk] * upstream))

        kept = len(errors)
        if kept:
            spread(errors, -g[:kept], slice(0, kept))
        for a in range(kept, len(hidden), rows):
            chunk = slice(a, a + rows)
            logp, slope = _log_softmax(hidden[chunk], weight, temperature, softcap)
            if entropy:
                dz = -g_entropy[chunk, None] * logp.exp() * (logp + entropies[chunk, None])
                dz *= 1 / temperature if slope is None else slope / temperature
                dz -= _error(logp, targets[chunk, None], slope, temperature) * g[chunk, None]
                spread(dz.to(hidden.dtype), torch.ones_like(g[chunk]), chunk)
            else:
                spread(_error(logp, targets[chunk, None], slope, temperature).to(hidden.dtype), -g[chunk], chunk)
        return dhidden, dweight, None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _log_softmax(hidden, weight, temperature, softcap):
    """log p [m, V] in fp32 (fp64 for fp64), and d softcap(x) / dx [m, V] when there is one."""
    wide = _wide(hidden)
    z = hidden.to(wide) @ weight.to(wide).t()
    slope = None
    if softcap is not None:
        capped = torch.tanh(z / softcap)
        slope = 1 - capped * capped
        z = capped * softcap
    return torch.log_softmax(z.div_(temperature) if temperature != 1.0 else z, 1), slope


def _error(logp, target, slope, temperature):
    """- d logprob / d (h W^T) = p - 1[v = t], times what lies between [m, V]; in place of logp."""
    error = logp.exp_().scatter_add_(1, target, torch.full(target.shape, -1.0, dtype=logp.dtype, device=logp.device))
    if slope is not None:
        error *= slope
    return error.div_(temperature) if temperature != 1.0 else error
