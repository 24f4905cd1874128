"""Attention over packed conversation trees (`kernels/layout.py` draws one).

For queries q, keys k and values v of one head, E wide, with s = scale * q k^T:

    P = softmax(s masked)      O = P v
    dV = P^T dO      dS = P * (dO v^T - delta), delta = rowsum(dO * O)      dQ = scale dS k      dK = scale dS^T q

A token's keys, in the order of its path, are `prefix` tokens of the trunk, then its own segment up to itself. A
query sees a key when 0 <= position(query) - position(key), and < W if there is a window of W tokens. Other segments
are never read, so a NaN in one cannot reach another.

The PyTorch version gathers segments into padded rows and keeps P. The Triton version (Dao et al. 2022,
arXiv:2205.14135; Dao 2023, arXiv:2307.08691) never writes P: the forward keeps L = log sum exp s, 4 bytes per token
and head, and the backward recomputes P = exp(s - L) tile by tile:

    forward   one program per tile of queries walks over their keys, rescaling the softmax as it goes     O, L
    dQ        the same walk, after computing delta                                                        dQ, delta
    dK, dV    one program per tile of keys walks over the queries that see them: those of its own         dK, dV
              segment, then those of each leaf that branches off after the tile; scores are transposed

That is seven matmuls where five would do. In exchange every number is written once, by one program, in a fixed
order: no atomics, and the same bits every time. Operations: 4 E forward, 14 E backward per pair of query and key.
"""
from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import allocate_descriptors, architecture, descriptor, jit, launch, on_triton, tl
from kernels.layout import Layout


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None = None, softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition of `attention`, with one [N, N] mask for the whole row: the tests compare with it."""
    seen = torch.zeros(len(q), len(q), dtype=torch.bool, device=q.device)
    segments = (x.tolist() for x in (layout.start, layout.length, layout.trunk_start, layout.prefix))
    for start, length, trunk, prefix in zip(*segments, strict=True):
        for i in range(length):
            path = [*range(trunk, trunk + prefix), *range(start, start + i + 1)]
            seen[start + i, path[-window:] if window else path] = True
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))                   # [N, H, E]
    scores = torch.einsum("qhe,khe->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def attention(
    q: Tensor,       # [N, H, E]
    k: Tensor,       # [N, K, E], K divides H: query head h reads key head h // (H / K)
    v: Tensor,       # [N, K, E]
    layout: Layout,
    window: int | None = None,     # tokens a query sees, itself included; None: all
    softcap: float | None = None,  # scores become softcap * tanh(scores / softcap)
    scale: float | None = None,    # default E ** -0.5
) -> Tensor:
    """Attention of every token to its own path, [N, H, E]. Any float dtype, differentiable in q, k and v.

    On a CPU q, k and v may have more rows than the layout has tokens (padding): those give 0 and get no gradient.
    """
    padding = q.shape[0] - layout.tokens
    if padding < 0 or (padding and on_triton(q)) or q.shape[1] % k.shape[1] or k.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"shapes {shapes} and {layout.tokens} tokens do not fit")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale is {scale}, expected a positive number")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if on_triton(q):
        return _TileAttention.apply(q, k, v, layout, window, softcap, scale)
    return _RowAttention.apply(q, k, v, padded_rows(layout, q.shape[1], window), softcap, scale)


# --------------------------------------------------------------------------------- the PyTorch version

# Blocks of 128 queries, so that keys after the block are skipped, and 2^20 scores at a time, which stay in a CPU's
# last-level cache. On AMD oneDNN multiplies them twice as fast as MKL, but compiles each shape that is new, for 0.3 ms:
# lengths are multiples of 16, so that few are. SFT of the 15 M model on one Zen 5 core: 1,880 -> 2,050 tokens/s, of the
# 2 M model 12,400 -> 13,900. The probabilities of all blocks are kept for the backward: 2 or 4 bytes per pair of tokens
# and head.
QUERY_BLOCK = 128
SCORES_AT_ONCE = 2**20
ROUND_UP = 16


@dataclass(frozen=True)
class Rows:
    """S segments as padded rows of L queries and P + L keys. Padding repeats a token of the same segment."""

    query: Tensor         # [S L] token index of every slot of the padded rows
    key: Tensor           # [S (P + L)] token index: P of the trunk, then the segment
    slot: Tensor          # [n] the slots that are not padding
    token: Tensor         # [n] their token index
    real: Tensor          # [S, 1, 1, L, 1] False where a query is padding
    blocks: list[tuple]   # (rows r, first query, last + 1, last key + 1, first key that some query does not see,
    #                       mask of unseen keys from there on [r, 1, 1, queries, keys])

    @staticmethod
    def build(layout: Layout, members: Tensor, heads: int, window: int | None) -> Rows:
        start, length, prefix = (x[members][:, None] for x in (layout.start, layout.length, layout.prefix))
        count = len(members)
        longest, longest_prefix = (-(-int(x.max()) // ROUND_UP) * ROUND_UP for x in (length, prefix))
        column = torch.arange(longest, device=start.device)
        real = column < length                                   # [S, L]
        own = start + torch.minimum(column, length - 1)          # [S, L]
        before = torch.arange(longest_prefix, device=start.device)
        seen = before < prefix                                   # [S, P]
        trunk = torch.where(seen, layout.trunk_start[members][:, None] + before, start)
        # Positions on the path. A padded query keeps a real one, so that it sees some key; a padded key is never seen.
        query_place = (prefix + torch.minimum(column, length - 1)).int()                                   # [S, L]
        key_place = torch.cat([torch.where(seen, before, 2**30), torch.where(real, prefix + column, 2**30)], 1).int()
        blocks = []
        for a in range(0, longest, QUERY_BLOCK):
            b = min(longest, a + QUERY_BLOCK)
            end = longest_prefix + b
            step = max(1, SCORES_AT_ONCE // (heads * (b - a) * end))
            for r in (slice(r, r + step) for r in range(0, count, step)):
                # Without a window or padding in the prefix, all keys before the diagonal are seen.
                whole = window is None and int(prefix[r].min()) == longest_prefix
                masked = longest_prefix + a if whole else 0
                distance = query_place[r, a:b, None] - key_place[r, None, masked:end]
                unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
                blocks.append((r, a, b, end, masked, unseen[:, None, None]))
        slot = real.flatten().nonzero()[:, 0]
        query, key = own.flatten(), torch.cat([trunk, own], 1).flatten()
        return Rows(query, key, slot, query[slot], real[:, None, None, :, None], blocks)


def padded_rows(layout: Layout, heads: int, window: int | None) -> list[Rows]:
    """The segments as padded rows, one per segment with all its keys; made once per batch."""
    if (heads, window) not in layout.plans:
        groups: dict[tuple[bool, int], list[int]] = {}
        for s, (length, prefix) in enumerate(zip(layout.lengths, layout.prefixes, strict=True)):
            size = max(32, 1 << (length + prefix - 1).bit_length())  # rows of one group differ by at most 2x
            groups.setdefault((prefix > 0, size), []).append(s)
        members = [torch.tensor(group, device=layout.start.device) for group in groups.values()]
        layout.plans[heads, window] = [Rows.build(layout, group, heads, window) for group in members]
    return layout.plans[heads, window]


class _RowAttention(torch.autograd.Function):
    """Gather segments into padded rows, then the header's formulas block by block."""

    @staticmethod
    def forward(ctx, q, k, v, groups, softcap, scale):
        out = torch.zeros_like(q)
        kept = []  # per block the probabilities, and tanh of the capped scores: what the backward needs
        for rows in groups:
            rq, rk, rv = _padded_qkv(q, k, v, rows)
            ro = torch.empty_like(rq)
            for r, a, b, end, masked, unseen in rows.blocks:
                # [r, K, G, b - a, end]
                scores = _matmul(rq[r, :, :, a:b] * scale, rk[r, :, :end].transpose(-1, -2))
                capped = None
                if softcap is not None:
                    capped = torch.tanh(scores / softcap)
                    scores = capped * softcap
                scores[..., masked:].masked_fill_(unseen, float("-inf"))
                p = torch.softmax(scores, -1)
                ro[r, :, :, a:b] = _matmul(p, rv[r, :, :end])
                if any(ctx.needs_input_grad):
                    kept += [p] if capped is None else [p, capped]
            _unpad(ro.flatten(1, 2), rows, out)
        ctx.save_for_backward(q, k, v, out, *kept)  # not in ctx itself, where gradient checkpointing would not see them
        ctx.options = groups, softcap, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, *kept = ctx.saved_tensors
        groups, softcap, scale = ctx.options
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (dout * out).sum(-1, keepdim=True)                                   # [N, H, 1]
        blocks = iter(kept)
        for rows in groups:
            rq, rk, rv = _padded_qkv(q, k, v, rows)
            rdo = _padded(dout, rows.query, rows, k.shape[1]) * rows.real
            rdelta = _padded(delta, rows.query, rows, k.shape[1]) * rows.real        # [S, K, G, L, 1]
            rdq, rdk, rdv = torch.empty_like(rq), torch.zeros_like(rk), torch.zeros_like(rv)
            for r, a, b, end, _, _ in rows.blocks:
                p, capped = next(blocks), None if softcap is None else next(blocks)
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


def _padded_qkv(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return _padded(q, rows.query, rows, k.shape[1]), _padded(k, rows.key, rows), _padded(v, rows.key, rows)


def _unpad(x: Tensor, rows: Rows, out: Tensor) -> None:
    """Write the rows x [S, H, L, E] to out [N, H, E] without their padding."""
    out.index_copy_(0, rows.token, x.transpose(1, 2).flatten(0, 1).index_select(0, rows.slot))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [S, K, G, Q, X] times b [S, K, X, Y], the heads of a group together: [S, K, G, Q, Y]."""
    return torch.matmul(a.flatten(2, 3), b).unflatten(2, a.shape[2:4])


def _matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """a^T b summed over the group's heads and queries: a [S, K, G, Q, X], b [S, K, G, Q, Y] -> [S, K, X, Y]."""
    return torch.matmul(a.flatten(2, 3).transpose(-1, -2), b.flatten(2, 3))


# ---------------------------------------------------------------------------------- the Triton version

# (queries, keys, warps, stages, TMA) of the forward, dQ and dK/dV, by architecture and head width (up to 64, 128, 256),
# the largest tried whose registers Triton 3.9 does not spill. Triton lays all warps of the scores along the rows of
# their tile, 16 rows each: with fewer rows (queries, for dK/dV keys) than that, warps compute the same products. They
# do only in dK/dV of heads of 256, whose sums fit in no other way. The tiles fit thanks to `disable_licm` (without it
# dK/dV of 64 x 128 spilled 110 times), and because the loads of keys are written out in both `_attend` and `_dq_walk`:
# with one function for both, dQ spills.
#
# With TMA the inner loops' tiles are copied by the hardware from a tensor descriptor, without addresses or registers:
# keys where they are one run of tokens (a trunk's own; a leaf's in its trunk), in dK/dV the queries. sm_80 has none.
# Instructions of sm_90's inner loops, E 128, for 128 keys: forward 828 -> 516, dQ 780 -> 642, dK/dV (of 64 queries)
# 737 -> 391, loaded a block ahead now. By these counts forward and dK/dV should take 0.8 and 0.65 of the time; nothing
# of it has run on a GPU yet. POINTERS in a tile is the way back.
TMA, POINTERS = True, False
CONFIGS = {
    80: {64: ((128, 64, 8, 3, POINTERS), (64, 32, 4, 2, POINTERS), (32, 64, 4, 2, POINTERS)),
         128: ((128, 32, 8, 1, POINTERS), (64, 64, 8, 2, POINTERS), (64, 64, 8, 1, POINTERS)),
         256: ((64, 64, 8, 1, POINTERS), (64, 64, 8, 1, POINTERS), (32, 32, 8, 1, POINTERS))},
    90: {64: ((128, 128, 8, 3, TMA), (128, 128, 8, 2, TMA), (64, 128, 8, 2, TMA)),
         128: ((128, 128, 8, 2, TMA), (128, 64, 8, 3, TMA), (64, 128, 8, 2, TMA)),
         256: ((128, 64, 8, 2, TMA), (128, 32, 8, 2, TMA), (32, 64, 8, 1, TMA))},
    100: {64: ((128, 128, 8, 3, TMA), (128, 128, 8, 2, TMA), (64, 128, 8, 1, TMA)),
          128: ((128, 64, 8, 3, TMA), (64, 64, 8, 2, TMA), (64, 128, 8, 1, TMA)),
          256: ((128, 32, 8, 2, TMA), (128, 32, 8, 2, TMA), (64, 64, 8, 1, TMA))},
}
SOFTCAPPED = {  # where the softcap's slope would spill
    (80, 64): ((128, 64, 8, 3, POINTERS), (64, 32, 4, 2, POINTERS), (32, 64, 4, 3, POINTERS)),
    (90, 128): ((128, 64, 8, 3, TMA), (128, 64, 8, 3, TMA), (32, 128, 8, 2, TMA)),
    (90, 256): ((128, 64, 8, 2, TMA), (128, 32, 8, 1, TMA), (16, 64, 8, 2, TMA)),
}
# The forward of trunks with specialised warps (queries, keys, warps, stages): one warp copies, two groups of four
# compute half the queries each, one's products beside the other's softmax. For 128 keys the tile above takes 2,048
# cycles of products, then 1,032 of other instructions; this one the larger of 2,048 and 1,402. It compiles (12 warps,
# 168 registers, none spilled), but a fault in it could be a hang, and it has not run on a GPU: True to try it.
SPECIALISED = False
TRUNKS = {(90, 64): (128, 128, 4, 2), (90, 128): (128, 128, 4, 2)}
PROGRAMS = 264   # that keep an H100 or H200 busy: two per multiprocessor
MOST_PARTS = 16  # of one tile of keys
CONFIG_FP32 = ((16, 16, 8, 1, TMA),) * 3  # no matrix units: for tests, not for speed


class _TileAttention(torch.autograd.Function):
    """The Triton version of the header: three launches."""

    @staticmethod
    def forward(ctx, q, k, v, layout, window, softcap, scale):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        config = _config(q, softcap)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)  # [H, N], L of the header
        options = _options(config[0], q, k, window, softcap)
        trunks = SPECIALISED and options["TMA"] and TRUNKS.get((architecture(q.device), q.shape[-1]))
        if trunks:
            allocate_descriptors()
            special = _options((*trunks, TMA), q, k, window, softcap)
            del special["TMA"], special["WIDTH"]
            table, tiles = tile_list(layout, special["QUERIES"], window, "trunks")
            launch(_forward_trunk, (q.shape[1], len(tiles)), q, k, v, out, lse, table, tiles, len(q), scale, **special)
        table, tiles = tile_list(layout, options["QUERIES"], window, "leaves" if trunks else "all")
        sources = _source(options["TMA"], options["KEYS"], k, v)
        if len(tiles):
            launch(_forward, (q.shape[1], len(tiles)), q, k, v, *sources, out, lse, table, tiles, len(q), scale,
                   **options)
        ctx.save_for_backward(q, k, v, out, lse)
        lists = ()
        if any(ctx.needs_input_grad):  # made here: copying them to the device during the backward would stall it
            lists = tile_list(layout, config[1][0], window), key_tile_list(layout, config[2][1], window, k.shape[1])
        ctx.options = lists, window, softcap, scale, config
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        ((table, tiles), (key_tiles, shared)), window, softcap, scale, config = ctx.options
        dout = dout.contiguous()
        delta, dq = torch.empty_like(lse), torch.empty_like(q)
        options = _options(config[1], q, k, window, softcap)
        sources = _source(options["TMA"], options["KEYS"], k, v)
        launch(_dq, (q.shape[1], len(tiles)), q, k, v, *sources, out, dout, lse, delta, dq, table, tiles, len(q), scale,
               **options)
        options = _options(config[2], q, k, window, softcap)
        sources = _source(options["TMA"], options["QUERIES"], q, dout)
        # Few KV heads would give too few programs: then the query heads of a group are split, and the parts added up.
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        parts = min(group, -(-PROGRAMS // (heads * len(key_tiles))))
        part_heads = -(-group // parts)
        parts = -(-group // part_heads)
        direct, rows = parts == 1 and not shared, len(k) + sum(map(len, shared))
        found = torch.empty(2, parts, rows, *k.shape[1:], dtype=k.dtype if direct else torch.float32, device=k.device)
        launch(_dkdv, (heads * parts, len(key_tiles)), k, v, *sources, lse, delta, *found, table, key_tiles, len(q),
               scale, part_heads, found[0, 0].numel(), **options)
        found, row = found[:, 0] if direct else found.sum(1), len(k)
        for tokens in shared:
            found[:, tokens] += found[:, row : row + len(tokens)]
            row += len(tokens)
        dk, dv = found[:, : len(k)].to(k.dtype)
        return dq, dk, dv, None, None, None, None


def _config(q: Tensor, softcap: float | None) -> tuple:
    sm = architecture(q.device)
    width = next((width for width in sorted(CONFIGS[sm]) if width >= q.shape[-1]), None)
    if width is None:
        raise ValueError(f"heads are {q.shape[-1]} wide, expected at most {max(CONFIGS[sm])}: use kernels=torch")
    return CONFIG_FP32 if q.dtype == torch.float32 else tile_sizes(sm, width, softcap)


def tile_sizes(sm: int, width: int, softcap: float | None) -> tuple:
    return softcap and SOFTCAPPED.get((sm, width)) or CONFIGS[sm][width]


def _options(config: tuple, q: Tensor, k: Tensor, window: int | None, softcap: float | None) -> dict:
    """The constants that a kernel is compiled for; WIDTH is E rounded up to a power of two."""
    queries, keys, warps, stages, tma = config
    width = max(16, 1 << (q.shape[-1] - 1).bit_length())
    if tma and q.shape[-1] < width:  # a descriptor of all heads would read on into the next one
        tma, stages = POINTERS, 1
    return {"H": q.shape[1], "K": k.shape[1], "E": q.shape[-1], "WIDTH": width, "WINDOW": window or 0,
            "SOFTCAP": softcap or 0.0, "QUERIES": queries, "KEYS": keys, "TMA": tma, "num_warps": warps,
            "num_stages": stages}


def _source(tma: bool, rows: int, *tensors: Tensor) -> list:
    """[N, heads, E] tensors as what a kernel loads tiles of `rows` tokens from: tensor descriptors, or as they are."""
    return [descriptor(x.flatten(1), [rows, x.shape[-1]]) if tma else x for x in tensors]


def tile_list(layout: Layout, size: int, window: int | None, of: str = "all") -> tuple[Tensor, Tensor]:
    """The segments [S, 6] and the tiles of `size` queries [T, 2] (segment, first token), int32, most work first; `of`
    all segments, or only of "trunks" or "leaves"."""
    key = "tiles", size, window, of
    if key not in layout.plans:
        run = torch.where(layout.prefix > 0, layout.trunk_start, layout.start)  # where a path begins
        table = torch.stack([layout.start, layout.length, run, layout.prefix, layout.first_child, layout.last_child], 1)
        tiles = [(-min(prefix + first, window or prefix + first), s, first)
                 for s, (length, prefix) in enumerate(zip(layout.lengths, layout.prefixes, strict=True))
                 if of == "all" or (prefix > 0) == (of == "leaves") for first in range(0, length, size)]
        listed = torch.tensor([tile[1:] for tile in sorted(tiles)], dtype=torch.int32)
        layout.plans[key] = table.to(torch.int32).contiguous(), listed.to(table.device)
    return layout.plans[key]


def key_tile_list(layout: Layout, size: int, window: int | None, kv_heads: int) -> tuple[Tensor, list[Tensor]]:
    """The tiles of `size` keys [T, 5] (segment, first token in it, readers a .. b - 1, row), int32, most work first.

    Readers are the segment itself and its leaves. A tile with far more than a program's share of the work, as a short
    trunk with many leaves has, is listed several times, with some of the readers each. The first writes to the tile's
    own rows, the others to rows behind all tokens; the tokens of those are returned too, each once in a list.
    """
    key = "key tiles", size, window, kv_heads
    if key not in layout.plans:
        work = list(_readers(layout, size))
        met = [min(sum(read), window or sum(read)) for *_, read in work]  # queries that each tile meets
        share, tiles, shared = kv_heads * sum(met) / PROGRAMS, [], []
        for (s, first, row, read), queries in zip(work, met, strict=True):
            parts = min(math.ceil(queries / share), MOST_PARTS) if queries > 2 * share else 1
            before = [0, *accumulate(read[:-1])]
            begins = sorted({bisect_left(before, part * sum(read) / parts) for part in range(parts)} - {len(read)})
            tokens = range(row, row + min(size, layout.lengths[s] - first))
            for number, (a, b) in enumerate(pairwise([*begins, 2**30 - s])):  # the last goes on to the last leaf
                if number > len(shared):
                    shared.append([])
                place = len(shared[number - 1]) if number else row
                if number:
                    shared[number - 1] += tokens
                tiles.append((-queries // len(begins), s, first, s + a, s + b, number, place))
        offsets = [0, *accumulate(map(len, shared), initial=layout.tokens)]
        listed = [(*tile, offsets[number] + place) for _, *tile, number, place in sorted(tiles)]
        device = layout.start.device
        layout.plans[key] = (torch.tensor(listed, dtype=torch.int32).to(device),
                             [torch.tensor(tokens).to(device) for tokens in shared])
    return layout.plans[key]


def _readers(layout: Layout, size: int) -> Iterator[tuple[int, int, int, list[int]]]:
    """Segment, first token in it, its row, and how many queries each reader has, for every tile of keys."""
    leaves, trunk, row = [[] for _ in layout.lengths], 0, 0
    for s, (length, prefix) in enumerate(zip(layout.lengths, layout.prefixes, strict=True)):
        trunk = trunk if prefix else s
        leaves[trunk] += [(length, prefix)] if prefix else []
    for s, length in enumerate(layout.lengths):
        for first in range(0, length, size):
            yield s, first, row + first, [length - first, *(n if prefix > first else 0 for n, prefix in leaves[s])]
        row += length


@jit
def _segment(table, tile):
    """start, length, trunk_start, prefix of the tile's segment, the tile's first token in it, the segment's number."""
    number = tl.load(tile)
    row = table + 6 * number
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(tile + 1), number


@jit
def _rows(x, tokens, inside, head, HEADS: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [T, WIDTH] of x [N, HEADS, E] for one head; 0 where `inside` is False and beyond E."""
    columns = tl.arange(0, WIDTH)
    at = (tokens.to(tl.int64) * HEADS + head)[:, None] * E + columns[None, :]
    return tl.load(x + at, mask=inside[:, None] & (columns < E)[None, :], other=0.0)


@jit
def _run(x, first, inside, head, COUNT: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):
    """`_rows` of the tokens first .. first + COUNT - 1: one address, and offsets that are constants."""
    columns = tl.arange(0, WIDTH)
    at = tl.arange(0, COUNT)[:, None] * (HEADS * E) + columns[None, :]
    x += (first.to(tl.int64) * HEADS + head) * E
    return tl.load(x + at, mask=inside[:, None] & (columns < E)[None, :], other=0.0)


@jit
def _write_rows(x, tokens, inside, head, rows, HEADS: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):
    """Store what `_rows` would load."""
    columns = tl.arange(0, WIDTH)
    at = (tokens.to(tl.int64) * HEADS + head)[:, None] * E + columns[None, :]
    tl.store(x + at, rows.to(x.dtype.element_ty), mask=inside[:, None] & (columns < E)[None, :])


@jit
def _capped(scores, scale, SOFTCAP: tl.constexpr):
    """Scores, a factor, and the softcap's slope, 1 without one.

    The factor holds log2 e, so that exp2 serves as exp; it is applied there, in one operation with the subtraction.
    """
    factor = scale * 1.4426950408889634
    slope = 1.0
    if SOFTCAP > 0:
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (factor * (2.0 / SOFTCAP))))  # tanh
        slope = 1.0 - scores * scores
        factor = SOFTCAP * 1.4426950408889634
    return scores, factor, slope


@jit
def _attend(queries, places, acc, largest, total, k, v, start, trunk, prefix, end, first, last, scale, head,
            K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
            KEYS: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr):
    """The keys at places first .. last - 1 of the path: acc += exp(s - largest) v, total += exp(s - largest)."""
    for j in tl.range(first, last, KEYS, disable_licm=True):
        key_places = j + tl.arange(0, KEYS)
        tokens = tl.where(key_places < prefix, trunk + key_places, start - prefix + key_places)
        inside = key_places < end
        if TMA:
            tile_k = k.load([trunk + j, head * E])
        else:
            tile_k = _rows(k, tokens, inside, head, K, E, WIDTH)
        scores = tl.dot(queries, tl.trans(tile_k), input_precision="ieee")  # [Q, KEYS]
        scores, factor, _ = _capped(scores, scale, SOFTCAP)
        if MASKED:
            distance = places[:, None] - key_places[None, :]
            seen = distance >= 0
            if WINDOW:
                seen = seen & (distance < WINDOW)
            scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(largest, tl.max(scores, 1) * factor)
        p = tl.exp2(scores * factor - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(p, 1)
        if TMA:
            tile_v = v.load([trunk + j, head * E])
        else:
            tile_v = _rows(v, tokens, inside, head, K, E, WIDTH)
        acc = tl.dot(p.to(tile_v.dtype), tile_v, acc * shrink[:, None], input_precision="ieee")
        largest = higher
    return acc, largest, total


@jit
def _forward(q, k, v, tiles_k, tiles_v, out, lse, table, tiles, N, scale, H: tl.constexpr, K: tl.constexpr,
             E: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, QUERIES: tl.constexpr,
             KEYS: tl.constexpr, TMA: tl.constexpr):
    head = tl.program_id(0)
    start, length, trunk, prefix, offset, _ = _segment(table, tiles + 2 * tl.program_id(1))
    rows = offset + tl.arange(0, QUERIES)
    places, inside = prefix + rows, rows < length
    queries = _rows(q, start + rows, inside, head, H, E, WIDTH)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    largest, total = tl.full([QUERIES], -1e30, tl.float32), tl.zeros([QUERIES], tl.float32)
    # Blocks of keys that every query sees need no mask; those on the diagonal do, and with a window all do.
    first, diagonal, end = _walk(prefix, offset, length, WINDOW, QUERIES, KEYS, TMA)
    if TMA or WINDOW == 0:
        acc, largest, total = _attend(queries, places, acc, largest, total, tiles_k, tiles_v, start, trunk, prefix, end,
                                      first, diagonal, scale, head // (H // K), K, E, WIDTH, WINDOW, SOFTCAP, KEYS,
                                      WINDOW > 0, TMA)
    acc, largest, total = _attend(queries, places, acc, largest, total, k, v, start, trunk, prefix, end, diagonal, end,
                                  scale, head // (H // K), K, E, WIDTH, WINDOW, SOFTCAP, KEYS, True, False)
    _write_rows(out, start + rows, inside, head, acc / total[:, None], H, E, WIDTH)
    tl.store(lse + (start + rows).to(tl.int64) + head * N, largest + tl.log2(total), mask=inside)


@jit
def _forward_trunk(q, k, v, out, lse, table, tiles, N, scale, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
                   WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """`_forward` for trunks as Triton can specialise its warps: one loop, with masks on all blocks, no pointers in it.

    The descriptors end where the segment does, so that what follows it is read as 0.
    """
    head, group = tl.program_id(0), tl.program_id(0) // (H // K)
    start, length, trunk, prefix, offset, number = _segment(table, tiles + 2 * tl.program_id(1))
    begin = start.to(tl.int64)
    q = tl.make_tensor_descriptor(q + (begin * H + head) * E, [length, E], [H * E, 1], [QUERIES, E])
    k = tl.make_tensor_descriptor(k + (begin * K + group) * E, [length, E], [K * E, 1], [KEYS, E])
    v = tl.make_tensor_descriptor(v + (begin * K + group) * E, [length, E], [K * E, 1], [KEYS, E])
    rows, queries = offset + tl.arange(0, QUERIES), q.load([offset, 0])
    acc = tl.zeros([QUERIES, E], tl.float32)
    largest, total = tl.full([QUERIES], -1e30, tl.float32), tl.zeros([QUERIES], tl.float32)
    first = tl.maximum(offset - WINDOW + 1, 0) // KEYS * KEYS if WINDOW else 0
    for j in tl.range(first, tl.minimum(offset + QUERIES, length), KEYS, warp_specialize=True, disable_licm=True):
        scores = tl.dot(queries, tl.trans(k.load([j, 0])), input_precision="ieee")  # [QUERIES, KEYS]
        scores, factor, _ = _capped(scores, scale, SOFTCAP)
        distance = rows[:, None] - (j + tl.arange(0, KEYS))[None, :]
        seen = distance >= 0
        if WINDOW:
            seen = seen & (distance < WINDOW)
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(largest, tl.max(scores, 1) * factor)
        p = tl.exp2(scores * factor - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(p, 1)
        tile_v = v.load([j, 0])
        acc = tl.dot(p.to(tile_v.dtype), tile_v, acc * shrink[:, None], input_precision="ieee")
        largest = higher
    inside = rows < length
    _write_rows(out, start + rows, inside, head, acc / total[:, None], H, E, E)
    tl.store(lse + (start + rows).to(tl.int64) + head * N, largest + tl.log2(total), mask=inside)


@jit
def _walk(prefix, offset, length, WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
          TMA: tl.constexpr):
    """Positions on the path where the keys of a tile begin, where the blocks that need a mask begin, and the end."""
    first = 0
    diagonal = (prefix + offset + 1) // KEYS * KEYS
    if TMA:  # which needs one run of tokens: a leaf's is in its trunk, the rest goes with the masked blocks
        diagonal = tl.where(prefix > 0, prefix // KEYS * KEYS, diagonal)
    if WINDOW:
        first = tl.maximum(prefix + offset - WINDOW + 1, 0) // KEYS * KEYS
        diagonal = tl.maximum(first, diagonal) if TMA else first
    return first, diagonal, prefix + tl.minimum(offset + QUERIES, length)


@jit
def _dq_walk(queries, do, lse_rows, delta_rows, places, dq, k, v, start, trunk, prefix, end, first, last, scale, head,
             K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
             KEYS: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr):
    """dQ += dS k over the keys at places first .. last - 1 of the path."""
    for j in tl.range(first, last, KEYS, disable_licm=True):
        key_places = j + tl.arange(0, KEYS)
        tokens = tl.where(key_places < prefix, trunk + key_places, start - prefix + key_places)
        inside = key_places < end
        if TMA:
            tile_k, tile_v = k.load([trunk + j, head * E]), v.load([trunk + j, head * E])
        else:
            tile_k = _rows(k, tokens, inside, head, K, E, WIDTH)
            tile_v = _rows(v, tokens, inside, head, K, E, WIDTH)
        scores = tl.dot(queries, tl.trans(tile_k), input_precision="ieee")  # [Q, KEYS]
        scores, factor, slope = _capped(scores, scale, SOFTCAP)
        if MASKED:
            distance = places[:, None] - key_places[None, :]
            seen = distance >= 0
            if WINDOW:
                seen = seen & (distance < WINDOW)
            scores = tl.where(seen, scores, -1e30)
        p = tl.exp2(scores * factor - lse_rows[:, None])
        ds = p * (tl.dot(do, tl.trans(tile_v), input_precision="ieee") - delta_rows[:, None]) * slope
        dq = tl.dot(ds.to(tile_k.dtype), tile_k, dq, input_precision="ieee")
    return dq


@jit
def _dq(q, k, v, tiles_k, tiles_v, out, dout, lse, delta, dq_out, table, tiles, N, scale, H: tl.constexpr,
        K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr):
    """dQ of a tile of queries, and its delta, which `_dkdv` reads."""
    head = tl.program_id(0)
    start, length, trunk, prefix, offset, _ = _segment(table, tiles + 2 * tl.program_id(1))
    rows = offset + tl.arange(0, QUERIES)
    places, inside = prefix + rows, rows < length
    at = (start + rows).to(tl.int64) + head * N
    do, o = _rows(dout, start + rows, inside, head, H, E, WIDTH), _rows(out, start + rows, inside, head, H, E, WIDTH)
    delta_rows = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + at, delta_rows, mask=inside)
    queries = _rows(q, start + rows, inside, head, H, E, WIDTH)
    lse_rows = tl.load(lse + at, mask=inside, other=0.0)
    dq = tl.zeros([QUERIES, WIDTH], tl.float32)
    first, diagonal, end = _walk(prefix, offset, length, WINDOW, QUERIES, KEYS, TMA)
    if TMA or WINDOW == 0:
        dq = _dq_walk(queries, do, lse_rows, delta_rows, places, dq, tiles_k, tiles_v, start, trunk, prefix, end, first,
                      diagonal, scale, head // (H // K), K, E, WIDTH, WINDOW, SOFTCAP, KEYS, WINDOW > 0, TMA)
    dq = _dq_walk(queries, do, lse_rows, delta_rows, places, dq, k, v, start, trunk, prefix, end, diagonal, end,
                  scale, head // (H // K), K, E, WIDTH, WINDOW, SOFTCAP, KEYS, True, False)
    _write_rows(dq_out, start + rows, inside, head, dq * scale, H, E, WIDTH)


@jit
def _dkdv(k, v, q, dout, lse, delta, dk_out, dv_out, table, tiles, N, scale, part_heads, size, H: tl.constexpr,
          K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
          QUERIES: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr):
    """dK and dV of a tile of keys. Part p of the outputs, `size` numbers each, holds what query heads
    p * part_heads .. of every group contribute. With TMA q and dout are tensor descriptors."""
    kv_head, part = tl.program_id(0) % K, tl.program_id(0) // K
    tile = tiles + 5 * tl.program_id(1)
    start, length, _, prefix, offset, number = _segment(table, tile)
    rows = offset + tl.arange(0, KEYS)
    key_places, inside = prefix + rows, rows < length
    tile_k = _rows(k, start + rows, inside, kv_head, K, E, WIDTH)
    tile_v = _rows(v, start + rows, inside, kv_head, K, E, WIDTH)
    dk, dv = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    for reader in range(tl.load(tile + 2), tl.minimum(tl.load(tile + 3), tl.load(table + 6 * number + 5))):
        at = table + 6 * reader
        reader_start, reader_length, branch = tl.load(at), tl.load(at + 1), tl.load(at + 3)
        # In its own segment the queries from the tile's first token on see it; in a leaf that branches later, all do.
        own = reader == number
        first, last = tl.where(own, offset, 0), tl.where(own | (branch > offset), reader_length, 0)
        places = tl.where(own | (key_places < branch), key_places, 2**30)  # a leaf sees none behind its prefix
        # Where every query sees every key there is no mask: behind the tile, and in leaves that branch behind it.
        clear = tl.where(own, offset + (KEYS + QUERIES - 1) // QUERIES * QUERIES,
                         tl.where(branch >= offset + KEYS, 0, last))
        clear = tl.minimum(tl.maximum(first, clear), last)
        if WINDOW:
            last = tl.minimum(last, prefix + offset + KEYS - 1 + WINDOW - branch)
            clear = first  # nowhere: both walks have masks
        # Whole blocks of the reader begin at `clear`; what is left of it behind them goes with the blocks before them.
        blocks = tl.maximum(tl.minimum(last - clear + QUERIES - 1, reader_length - clear), 0) // QUERIES * QUERIES
        for head in range(kv_head * (H // K) + part * part_heads,
                          kv_head * (H // K) + tl.minimum(part * part_heads + part_heads, H // K)):
            dk, dv = _dkdv_walk(tile_k, tile_v, dk, dv, q, dout, lse, delta, places, reader_start, reader_length,
                                branch, first, last - blocks, clear, blocks, N, scale, head, H, E, WIDTH, WINDOW,
                                SOFTCAP, QUERIES, True, True, TMA)
            dk, dv = _dkdv_walk(tile_k, tile_v, dk, dv, q, dout, lse, delta, places, reader_start, reader_length,
                                branch, clear, clear + blocks, 0, 0, N, scale, head, H, E, WIDTH, WINDOW,
                                SOFTCAP, QUERIES, False, WINDOW > 0, TMA)
    # Read again (volatile, or the compiler would merge the loads): kept until here these numbers made registers spill.
    tile = tiles + 5 * tl.program_id(1)
    rows = tl.load(tile + 1, volatile=True) + tl.arange(0, KEYS)
    inside = rows < tl.load(table + 6 * tl.load(tile, volatile=True) + 1, volatile=True)
    row = tl.load(tile + 4) + tl.arange(0, KEYS)
    _write_rows(dk_out + part.to(tl.int64) * size, row, inside, kv_head, dk * scale, K, E, WIDTH)
    _write_rows(dv_out + part.to(tl.int64) * size, row, inside, kv_head, dv, K, E, WIDTH)


@jit
def _dkdv_walk(tile_k, tile_v, dk, dv, q, dout, lse, delta, key_places, start, length, branch, first, last, gap,
               skipped, N, scale, head, H: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
               SOFTCAP: tl.constexpr, QUERIES: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr,
               TMA: tl.constexpr):
    """dK += dS^T q and dV += P^T dO over the queries first .. last - 1 of a reader, or at its edges over as many, those
    from `gap` on `skipped` further."""
    for i in tl.range(first, last, QUERIES, disable_licm=True, num_stages=1 if EDGE and TMA else None):
        if EDGE:
            i = tl.where(i < gap, i, i + skipped)
        rows = i + tl.arange(0, QUERIES)
        real = rows < length
        if TMA:
            queries, do = q.load([start + i, head * E]), dout.load([start + i, head * E])
            if EDGE:  # what follows the reader may be NaN
                queries, do = tl.where(real[:, None], queries, 0.0), tl.where(real[:, None], do, 0.0)
        else:
            queries = _run(q, start + i, real, head, QUERIES, H, E, WIDTH)
            do = _run(dout, start + i, real, head, QUERIES, H, E, WIDTH)
        at = (start + i).to(tl.int64) + head * N
        columns = tl.arange(0, QUERIES)
        if EDGE:
            lse_rows = tl.load(lse + at + columns, mask=real, other=0.0)
            delta_rows = tl.load(delta + at + columns, mask=real, other=0.0)
        else:
            lse_rows, delta_rows = tl.load(lse + at + columns), tl.load(delta + at + columns)
        scores = tl.dot(tile_k, tl.trans(queries), input_precision="ieee")  # [KEYS, QUERIES]
        scores, factor, slope = _capped(scores, scale, SOFTCAP)
        if MASKED:
            distance = (branch + rows)[None, :] - key_places[:, None]
            seen = distance >= 0
            if WINDOW:
                seen = seen & (distance < WINDOW)
            scores = tl.where(seen, scores, -1e30)
        p = tl.exp2(scores * factor - lse_rows[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(tile_v, tl.trans(do), input_precision="ieee") - delta_rows[None, :]) * slope
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv
