"""Attention of one new token per sequence to its cache, where sampling spends its time.

Every key and value is read once and used for the G = H / K query heads that share it: 2 G operations per byte in
bf16, so memory bandwidth is the limit. A small batch has too few (sequence, head) pairs to fill a GPU with programs;
the Triton version therefore cuts what each query sees into parts (Dao et al. 2023, "Flash-Decoding"), one program
each, and merges their results in a fixed order. For the keys of part c, in base 2:

    m_c = max s      l_c = sum 2^(s - m_c)      o_c = sum 2^(s - m_c) v
    out = sum_c 2^(m_c - m) o_c / sum_c 2^(m_c - m) l_c,   m = max m_c
"""
from __future__ import annotations

import torch
from torch import Tensor

from kernels import jit, launch, on_triton, tl


def decode_reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, window: int | None = None) -> Tensor:
    """The definition of `decode_attention`."""
    grouped = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5    # [B, K, G, E]
    scores = torch.matmul(grouped, k.transpose(-1, -2))                 # [B, K, G, S]
    scores += decode_mask(seen, k.shape[2], window, q.dtype)
    return torch.matmul(torch.softmax(scores, -1), v).flatten(1, 2)


def decode_mask(seen: Tensor, size: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, S]: 0 for a cached token that counts, -inf for another."""
    place = torch.arange(size, device=seen.device)
    unseen = place >= seen[:, None]
    if window is not None:
        unseen |= place < seen[:, None] - window
    mask = torch.zeros(unseen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(unseen, float("-inf"))[:, None, None]


def decode_attention(
    q: Tensor,       # [B, H, E] one new token per sequence
    k: Tensor,       # [B, K, S, E] its cache, the new token's own key included
    v: Tensor,       # [B, K, S, E]
    seen: Tensor,    # [B] cached tokens that count: the first seen[b] of row b
    window: int | None = None,  # tokens a query sees, itself included; None: all
) -> Tensor:
    """Attention of one new token per sequence to its cache, [B, H, E]. No gradient."""
    return (_decode_in_parts if on_triton(q) else decode_reference)(q, k, v, seen, window)


# ---------------------------------------------------------------------------------- the version for CPUs

CHUNK = 64  # cached tokens whose keys stand side by side


class ChunkedStep:
    """Where a step of the first B sequences reads in a layer's cache on a CPU; made once, all layers share it.

    Products of one row per head cost more in calls and in copies of their operands than in work. But both sums over
    the cache are weighted sums of rows, if only the keys are laid out with a row for each dimension:

        scores [64] = sum over e of q_e times row e of a chunk of keys       out [E] = sum over s of P_s times value s

    and that is what `embedding_bag` computes, all bags in one call. 64 sequences, 6 heads of 48, 100 cached tokens on
    one Zen 5 core: 1,820 us by scaled_dot_product_attention, 710 us this way; in bf16 2,520 and 620. There scores are
    rounded to bf16, as in training: SmolLM2-135M's distributions are 0.0012 nats (KL) from those in fp32, by
    scaled_dot_product_attention 0.0011.
    """

    def __init__(self, batch: int, group: int, keys: Tensor, values: Tensor, longest: int):
        _, heads, room, width, _ = keys.shape
        chunks = -(-longest // CHUNK)
        pair = torch.arange(batch * heads).view(batch, heads, 1, 1, 1)
        chunk, column = torch.arange(chunks)[:, None], torch.arange(width)
        self.shape = batch, heads * group, chunks, width
        self.key_rows = ((pair * room + chunk) * width + column).expand(-1, -1, group, -1, -1).reshape(-1)
        self.key_bags = torch.arange(0, len(self.key_rows) + 1, width)
        size = chunks * CHUNK
        self.value_rows = (pair[..., 0] * values.shape[2] + torch.arange(size)).expand(-1, -1, group, -1).reshape(-1)
        self.value_bags = torch.arange(0, len(self.value_rows) + 1, size)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """q [B, H, E], keys [slots, K, chunks, E, 64], values [slots, K, S, E], mask [B, 1, S] -> [B, H, E]."""
        batch, heads, chunks, width = self.shape
        weights = (q * width**-0.5)[:, :, None].expand(-1, -1, chunks, -1).reshape(-1)
        scores = _sums_of_rows(keys.view(-1, CHUNK), self.key_rows, self.key_bags, weights)
        p = torch.softmax(scores.view(batch, heads, -1).add_(mask), -1)
        return _sums_of_rows(values.view(-1, width), self.value_rows, self.value_bags, p.view(-1)).view_as(q)


def _sums_of_rows(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """One weighted sum of the table's rows for each bag: bag i has those of rows[bags[i] : bags[i + 1]]."""
    return torch.embedding_bag(table, rows, bags, per_sample_weights=weights, include_last_offset=True)[0]


# ---------------------------------------------------------------------------------- the Triton version

KEYS = 64              # per step of the loop
PART = 256             # keys of a part, at least
PROGRAMS = 264         # to keep an H100 or H200 busy: two per multiprocessor
MOST_PARTS = 64        # that one program merges
WARPS = 4
STAGES = {2: 3, 4: 1}  # by bytes per number: what fits in an A100's shared memory with heads of 256


def _decode_in_parts(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, window: int | None) -> Tensor:
    batch, heads, width = q.shape
    kv_heads, room = k.shape[1], k.shape[2]
    group = heads // kv_heads
    # How many from the cache's size, for reading `seen` back would sync the GPU; a program finds its part from `seen`.
    parts = max(1, min(-(-room // PART), -(-PROGRAMS // (batch * kv_heads)), MOST_PARTS))
    parts = 1 << (parts - 1).bit_length()
    out = torch.empty_like(q)
    partial = out if parts == 1 else torch.empty(batch, heads, parts, width + 2, dtype=torch.float32, device=q.device)
    padded_width = max(16, 1 << (width - 1).bit_length())
    launch(_part, (batch * kv_heads, parts), q.contiguous(), k, v, seen, partial, width**-0.5, *k.stride()[:3],
           *v.stride()[:3], K=kv_heads, G=group, GROUP=max(16, 1 << (group - 1).bit_length()), E=width,
           WIDTH=padded_width, WINDOW=window or 0, PARTS=parts, PART=PART, KEYS=KEYS, num_warps=WARPS,
           num_stages=STAGES[q.element_size()])
    if parts > 1:
        launch(_merge, (batch * heads,), partial, out, E=width, WIDTH=padded_width, PARTS=parts, num_warps=4)
    return out


@jit
def _part(q, k, v, seen, partial, scale, k_batch, k_head, k_row, v_batch, v_head, v_row,
          K: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
          WINDOW: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr):
    """o, m and l of one part of what one sequence sees, for the G query heads of one KV head; rows beyond G idle.

    A part has at least PART keys; of a short sequence the last ones are empty. An only part gives the result itself.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    sequence, kv_head = row // K, row % K
    count = tl.load(seen + sequence).to(tl.int32)
    start = 0
    if WINDOW:
        start = tl.maximum(count - WINDOW, 0)
    size = tl.maximum((count - start + PARTS * KEYS - 1) // (PARTS * KEYS) * KEYS, PART)
    first = start + part * size
    last = tl.minimum(first + size, count)
    group, columns = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    heads = sequence.to(tl.int64) * (K * G) + kv_head * G + group
    real = (group < G)[:, None] & (columns < E)[None, :]
    queries = tl.load(q + heads[:, None] * E + columns[None, :], mask=real, other=0.0)
    acc = tl.zeros([GROUP, WIDTH], tl.float32)
    largest, total = tl.full([GROUP], -1e30, tl.float32), tl.zeros([GROUP], tl.float32)
    k += sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v += sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    for j in range(first, last, KEYS):
        keys = j + tl.arange(0, KEYS)
        inside = (keys < last)[:, None] & (columns < E)[None, :]
        tile_k = tl.load(k + keys[:, None].to(tl.int64) * k_row + columns[None, :], mask=inside, other=0.0)
        scores = tl.dot(queries, tl.trans(tile_k), input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where((keys < last)[None, :], scores, -1e30)
        higher = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(p, 1)
        tile_v = tl.load(v + keys[:, None].to(tl.int64) * v_row + columns[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(tile_v.dtype), tile_v, acc * shrink[:, None], input_precision="ieee")
        largest = higher
    if PARTS == 1:
        found = (acc / total[:, None]).to(partial.dtype.element_ty)
        tl.store(partial + heads[:, None] * E + columns[None, :], found, mask=real)
    else:
        to = partial + (heads * PARTS + part) * (E + 2)
        tl.store(to[:, None] + columns[None, :], acc, mask=real)
        tl.store(to + E, largest, mask=group < G)
        tl.store(to + E + 1, total, mask=group < G)


@jit
def _merge(partial, out, E: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """The parts of one sequence and head, summed with the weights of the header."""
    row = tl.program_id(0).to(tl.int64)
    part, columns = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    start = partial + (row * PARTS + part) * (E + 2)
    largest, total = tl.load(start + E), tl.load(start + E + 1)
    acc = tl.load(start[:, None] + columns[None, :], mask=(columns < E)[None, :], other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 0))
    merged = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + row * E + columns, merged.to(out.dtype.element_ty), mask=columns < E)
