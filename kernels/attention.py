"""Attention over packed conversation trees.

A batch is one flat row of N tokens made of segments: trunks, and leaves that branch off a trunk
after `prefix` of its tokens. Token i attends to the tokens on its own path up to itself:

    segment    |------ trunk, 10 tokens ------|- leaf A, 3 -|- leaf B, 2 -|
    index       0  1  2  3  4  5  6  7  8  9   10  11  12    13  14
    prefix                                     2             7
    position    0  1  2  3  4  5  6  7  8  9   2   3   4     7   8

    token 4 sees 0..4;  token 11 sees 0 1 10 11;  token 14 sees 0..6 13 14

Both rules, causal inside a segment and `prefix` tokens of the trunk before it, are one test on
positions along the path, 0 <= position(query) - position(key), once the keys of a segment are
listed as "prefix, then own". A sliding window W adds "... < W".

For queries q, keys k and values v of one head, with s = scale * q k^T (E wide):

    P = softmax(s masked)      O = P v
    dV = P^T dO      dS = P * (dO v^T - rowsum(dO * O))      dQ = scale dS k      dK = scale dS^T q
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# The PyTorch version works on blocks of 128 queries, so that keys after the block are skipped, and on 2^20
# scores at a time, which stay in a CPU's last-level cache. Forward and backward of 8 rows of 512 tokens, 6
# heads of 48, on two Zen 5 cores: 42 ms in fp32 and 22 ms in bf16, where SDPA takes 72 and 55. It keeps the
# probabilities of all blocks for the backward: 2 or 4 bytes a pair of tokens and head.
QUERY_BLOCK = 128
SCORES_AT_ONCE = 2**20


@dataclass(frozen=True)
class Layout:
    """The segments of one packed row, S of them, in the order they lie in it.

    Children are the leaves of a trunk: segments first_child .. last_child - 1 (equal when there are none).
    """

    start: Tensor        # [S] index of the segment's first token
    length: Tensor       # [S] tokens
    trunk_start: Tensor  # [S] index of the first token of its trunk (its own start for a trunk)
    prefix: Tensor       # [S] tokens of that trunk it sees, 0 for a trunk
    first_child: Tensor  # [S] segment number
    last_child: Tensor   # [S] segment number, one past the end
    plans: dict = field(default_factory=dict, repr=False)  # what `rows` has worked out

    @staticmethod
    def build(lengths: list[int], trunks: list[int] | None = None, prefixes: list[int] | None = None) -> Layout:
        """From lengths [S], the segment number of each one's trunk [S] and prefixes [S]; plain sequences by default."""
        length = torch.tensor(lengths, dtype=torch.long)
        count = len(lengths)
        trunk = torch.arange(count) if trunks is None else torch.tensor(trunks, dtype=torch.long)
        prefix = torch.zeros(count, dtype=torch.long) if prefixes is None else torch.tensor(prefixes, dtype=torch.long)
        is_leaf = trunk != torch.arange(count)
        if bool((length < 1).any()) or bool((prefix[is_leaf] > length[trunk[is_leaf]]).any()):
            raise ValueError("a segment has no token, or a leaf branches after the end of its trunk")
        start = length.cumsum(0) - length
        children = torch.zeros(count, dtype=torch.long).index_add_(0, trunk, is_leaf.long())
        # Leaves follow their trunk, so the children of segment s are s + 1 .. s + children.
        first = torch.arange(count) + 1
        return Layout(start, length, start[trunk], prefix, first, first + children)

    def to(self, device) -> Layout:
        return Layout(*(x.to(device) for x in (self.start, self.length, self.trunk_start, self.prefix, self.first_child, self.last_child)))

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    def rows(self, heads: int, window: int | None) -> list[Rows]:
        """Padded rows for the PyTorch version, made once per batch: a row is a segment with all its keys."""
        if (heads, window) not in self.plans:
            groups: dict[tuple[bool, int], list[int]] = {}
            for s, (length, prefix) in enumerate(zip(self.length.tolist(), self.prefix.tolist(), strict=True)):
                size = max(32, 1 << (length + prefix - 1).bit_length())  # rows of one group differ by at most 2x
                groups.setdefault((prefix > 0, size), []).append(s)
            members = [torch.tensor(group, device=self.start.device) for group in groups.values()]
            self.plans[heads, window] = [Rows.build(self, group, heads, window) for group in members]
        return self.plans[heads, window]


@dataclass(frozen=True)
class Rows:
    """S segments as rows of L queries and P + L keys. Padding repeats a token of the same segment."""

    query: Tensor         # [S L] token index of every slot of the padded rows
    key: Tensor           # [S (P + L)] token index: P of the trunk, then the segment
    slot: Tensor          # [n] the slots that are no padding
    token: Tensor         # [n] their token index
    real: Tensor          # [S, 1, 1, L, 1] False where a query is padding
    blocks: list[tuple]   # (rows, first query, last + 1, last key + 1, mask [r, 1, 1, queries, keys] of unseen keys)

    @staticmethod
    def build(layout: Layout, members: Tensor, heads: int, window: int | None) -> Rows:
        start, length, prefix = (x[members][:, None] for x in (layout.start, layout.length, layout.prefix))
        count, longest, longest_prefix = len(members), int(length.max()), int(prefix.max())
        column = torch.arange(longest, device=start.device)
        real = column < length                                   # [S, L]
        own = start + torch.minimum(column, length - 1)          # [S, L]
        before = torch.arange(longest_prefix, device=start.device)
        seen = before < prefix                                   # [S, P]
        trunk = torch.where(seen, layout.trunk_start[members][:, None] + before, start)
        # Places on the path. A padded query keeps one of its segment, so that it sees some key; a padded key is never seen.
        query_place = (prefix + torch.minimum(column, length - 1)).int()                                   # [S, L]
        key_place = torch.cat([torch.where(seen, before, 2**30), torch.where(real, prefix + column, 2**30)], 1).int()
        blocks = []
        for a in range(0, longest, QUERY_BLOCK):
            b = min(longest, a + QUERY_BLOCK)
            end = longest_prefix + b
            step = max(1, SCORES_AT_ONCE // (heads * (b - a) * end))
            for r in (slice(r, r + step) for r in range(0, count, step)):
                distance = query_place[r, a:b, None] - key_place[r, None, :end]
                unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
                blocks.append((r, a, b, end, unseen[:, None, None]))
        slot = real.flatten().nonzero()[:, 0]
        query = own.flatten()
        return Rows(query, torch.cat([trunk, own], 1).flatten(), slot, query[slot], real[:, None, None, :, None], blocks)


def attention(
    q: Tensor,       # [N, H, E]
    k: Tensor,       # [N, K, E], K divides H: query head h reads key head h // (H / K)
    v: Tensor,       # [N, K, E]
    layout: Layout,
    window: int | None = None,     # tokens a query sees, itself included; None: all
    softcap: float | None = None,  # scores become softcap * tanh(scores / softcap)
    scale: float | None = None,    # default E ** -0.5
) -> Tensor:
    """Attention of every token to its own path, [N, H, E]. Any float dtype, differentiable in q, k and v."""
    if q.shape[0] != layout.tokens or q.shape[1] % k.shape[1] or k.shape != v.shape:
        raise ValueError(f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} and {layout.tokens} tokens do not fit")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _RowAttention.apply(q, k, v, layout.rows(q.shape[1], window), softcap, scale)


class _RowAttention(torch.autograd.Function):
    """The PyTorch version: gather segments into padded rows, then the header's formulas block by block."""

    @staticmethod
    def forward(ctx, q, k, v, groups, softcap, scale):
        out = torch.empty_like(q)
        kept = []  # per block the probabilities, and tanh of the capped scores: what the backward needs
        for rows in groups:
            rq, rk, rv = _padded(q, rows.query, rows, k.shape[1]), _padded(k, rows.key, rows), _padded(v, rows.key, rows)
            ro = torch.empty_like(rq)
            for r, a, b, end, unseen in rows.blocks:
                scores = _matmul(rq[r, :, :, a:b] * scale, rk[r, :, :end].transpose(-1, -2))  # [r, K, G, b - a, end]
                capped = None
                if softcap is not None:
                    capped = torch.tanh(scores / softcap)
                    scores = capped * softcap
                p = torch.softmax(scores.masked_fill_(unseen, float("-inf")), -1)
                ro[r, :, :, a:b] = _matmul(p, rv[r, :, :end])
                kept.append((p, capped))
            _unpad(ro.flatten(1, 2), rows, out)
        ctx.save_for_backward(q, k, v, out)
        ctx.saved = groups, kept, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out = ctx.saved_tensors
        groups, kept, scale = ctx.saved
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (dout * out).sum(-1, keepdim=True)                                   # [N, H, 1]
        blocks = iter(kept)
        for rows in groups:
            rq, rk, rv = _padded(q, rows.query, rows, k.shape[1]), _padded(k, rows.key, rows), _padded(v, rows.key, rows)
            rdo = _padded(dout, rows.query, rows, k.shape[1]) * rows.real
            rdelta = _padded(delta, rows.query, rows, k.shape[1]) * rows.real        # [S, K, G, L, 1]
            rdq, rdk, rdv = torch.empty_like(rq), torch.zeros_like(rk), torch.zeros_like(rv)
            for r, a, b, end, _ in rows.blocks:
                p, capped = next(blocks)
                do = rdo[r, :, :, a:b]
                ds = _matmul(do, rv[r, :, :end].transpose(-1, -2)).sub_(rdelta[r, :, :, a:b]).mul_(p)
                if capped is not None:
                    ds = ds * (1 - capped * capped)
                rdq[r, :, :, a:b] = _matmul(ds, rk[r, :, :end]).mul_(scale)
                rdk[r, :, :end] += _matmul_t(ds, rq[r, :, :, a:b] * scale)
                rdv[r, :, :end] += _matmul_t(p, do)
            _unpad(rdq.flatten(1, 2), rows, dq)
            dk.index_add_(0, rows.key, rdk.transpose(1, 2).flatten(0, 1))
            dv.index_add_(0, rows.key, rdv.transpose(1, 2).flatten(0, 1))
        return dq, dk, dv, None, None, None


def _padded(x: Tensor, index: Tensor, rows: Rows, kv_heads: int | None = None) -> Tensor:
    """x [N, H, E] gathered as [S, H, L, E], or for queries [S, K, G, L, E] with G = H / K heads a group."""
    gathered = x.index_select(0, index).unflatten(0, (len(rows.real), -1)).transpose(1, 2).contiguous()
    return gathered if kv_heads is None else gathered.unflatten(1, (kv_heads, -1))


def _unpad(x: Tensor, rows: Rows, out: Tensor) -> None:
    """Write the rows x [S, H, L, E] to out [N, H, E], padding left behind."""
    out.index_copy_(0, rows.token, x.transpose(1, 2).flatten(0, 1).index_select(0, rows.slot))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [S, K, G, Q, X] times b [S, K, X, Y], the heads of a group together: [S, K, G, Q, Y]."""
    return torch.matmul(a.flatten(2, 3), b).unflatten(2, a.shape[2:4])


def _matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """a^T b summed over the group's heads and queries: a [S, K, G, Q, X], b [S, K, G, Q, Y] -> [S, K, X, Y]."""
    return torch.matmul(a.flatten(2, 3).transpose(-1, -2), b.flatten(2, 3))


def decode_attention(
    q: Tensor,       # [B, H, E] one new token per sequence
    k: Tensor,       # [B, K, S, E] its cache, the new token's own key included
    v: Tensor,       # [B, K, S, E]
    seen: Tensor,    # [B] cached tokens that count: the first seen[b] of row b
    window: int | None = None,
) -> Tensor:
    """Attention of one new token per sequence to its cache, [B, H, E]. No gradient."""
    grouped = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5    # [B, K, G, E]
    scores = torch.matmul(grouped, k.transpose(-1, -2))                 # [B, K, G, S]
    place = torch.arange(k.shape[2], device=q.device)
    unseen = place >= seen[:, None]
    if window is not None:
        unseen |= place < seen[:, None] - window
    scores.masked_fill_(unseen[:, None, None], float("-inf"))
    return torch.matmul(torch.softmax(scores, -1), v).flatten(1, 2)
