"""The transformer: configuration, forward pass, KV cache and sampling.

Everything between the embedding and the head works on one flat row of N tokens, whatever sequences or
conversation trees it holds: only rotary positions and attention look at where a token stands. The
head is not part of the forward pass: training asks for the log-probabilities of response tokens
(`kernels/logprobs.py`), sampling for the logits of the last tokens.

    hidden = model.hidden(tokens [N], positions [N], layout)     -> [N, D]
    logits = model.logits(hidden)                                -> [N, V]
    logits = model(input_ids [B, T], attention_mask [B, T])      -> [B, T, V], the plain way in

Parameters carry the names of Hugging Face's Llama; `checkpoints.py` reads and writes the directories of every family.
"""
from __future__ import annotations

import math
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from tqdm import tqdm

from kernels import PackedLinear, can_pack, missing_rows, on_triton, without_onednn
from kernels.attention import attention
from kernels.decode import CHUNK, ChunkedStep, decode_attention, decode_mask
from kernels.fused import rms_norm, rotary, swiglu
from kernels.graphs import DecodeGraphs
from kernels.layout import Layout
from kernels.sampling import sample_each, uniform_numbers

# ----------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants. V vocabulary, D width, H heads, K key/value heads, E head width. The defaults are Llama's."""

    family: str = "llama"                  # `model_type` in config.json, a key of families.FAMILIES
    vocab_size: int = 1024                 # V
    width: int = 192                       # D
    layers: int = 6
    heads: int = 6                         # H
    kv_heads: int = 6                      # K, divides H; 1 is multi-query attention
    head_dim: int = 32                     # E
    mlp_width: int = 512                   # inner width of the MLP
    max_positions: int = 512               # longest path the positions were made for
    norm: str = "rms"                      # "rms" (Zhang & Sennrich 2019) or "layer", which has a bias
    norm_eps: float = 1e-5
    norm_offset: float = 0.0               # added to an RMSNorm's weight
    norms: int = 2                         # per block; parallel blocks may share one
    parallel: bool = False                 # attention and MLP read the same input, not one after the other
    activation: str = "silu"               # a key of ACTIVATIONS
    gated: bool = True                     # down(act(gate x) * up x); otherwise down(act(up x))
    qkv_bias: bool = False
    out_bias: bool = False                 # of the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False                  # RMSNorm on every query and key head
    embed_scale: float = 1.0               # of token embeddings
    rotary: float = 1.0                    # share of a head's dimensions that rotate; 0: learned positions
    rope_theta: float = 10000.0            # base of the rotary frequencies
    rope_scaling: dict | None = None       # for long contexts, its numbers as in config.json; None: none
    scaled: bool = True                    # attention scores are divided by sqrt(E)
    window: int | None = None              # tokens a query sees, itself included; None: all
    window_layers: tuple[int, ...] | None = None  # layers that have the window; None: all
    tied: bool = True                      # head and embedding share one matrix
    scored: bool = False                   # a score head in place of the LM head: a reward or value model
    score_mean: float = 0.0                # subtracted from every score, so that demonstrations score 0 on average
    score_std: float = 1.0                 # of those scores: the scale of the reward, for PPO to divide by
    dtype: str = "float32"                 # of the weights on disk
    raw: dict = field(default_factory=dict)  # config.json as read: keys we do not use are written back


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


# ------------------------------------------------------------------------------------- the network

class Linear(nn.Module):
    """y = x W^T + b, W [out, in] kept in its own dtype and used in that of x (fp32 weights, bf16 compute)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.packed: PackedLinear | None = None  # while decoding on a CPU

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed(x)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if not self.offset:
            return rms_norm(x, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # bf16 would lose what a weight adds to 1; Triton has fp32
        y = rms_norm(x if on_triton(x) else x.to(wide), self.weight.to(wide) + self.offset, self.eps)
        return y.to(x.dtype)


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def pack(owner: nn.Module, linears: list[nn.Module], dtype: torch.dtype) -> None:
    """Linear layers that read the same as one product, `owner.packed`; each alone where some have an adapter."""
    if all(type(linear) is Linear for linear in linears):
        owner.packed = PackedLinear([x.weight for x in linears], [x.bias for x in linears], dtype)
        return
    for part in (part for linear in linears for part in linear.modules() if type(part) is Linear):
        part.packed = PackedLinear([part.weight], [part.bias], dtype)


def new_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layer":
        return LayerNorm(config.width, config.norm_eps)
    return RMSNorm(config.width, config.norm_eps, config.norm_offset)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotating pair of dimensions, [R / 2] (Su et al. 2021), scaled for long contexts.

    Linear scaling divides all by a factor. Llama 3 and YaRN (Peng et al. 2023, arXiv:2309.00071) keep fast pairs,
    divide slow ones and change over between, the one linearly in a pair's turns, the other in its number.
    """
    rotating = int(config.head_dim * config.rotary)
    exponents = torch.arange(0, rotating, 2, dtype=torch.float32, device="cpu") / max(rotating, 1)  # never on meta
    frequencies = 1.0 / config.rope_theta**exponents
    s = config.rope_scaling
    if s is None or s["rope_type"] == "linear":
        return frequencies if s is None else frequencies / s["factor"]
    trained = s["original_max_position_embeddings"]
    if s["rope_type"] == "llama3":
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = trained * frequencies / (2 * math.pi)  # full turns within the context it was trained on
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first, last = (rotating * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
                       for turns in (s["beta_fast"], s["beta_slow"]))  # the pairs that turn so often
        if s["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotating - 1)
        pairs = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
        keep = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / s["factor"]


class Attention(nn.Module):
    """Grouped-query attention along each token's own path (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.head_dim, self.scaled = config.head_dim, config.scaled
        self.window = config.window if config.window_layers is None or layer in config.window_layers else None
        self.q_proj = Linear(config.width, config.heads * config.head_dim, config.qkv_bias)
        self.k_proj = Linear(config.width, config.kv_heads * config.head_dim, config.qkv_bias)
        self.v_proj = Linear(config.width, config.kv_heads * config.head_dim, config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_dim, config.width, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.counts = config.heads, config.kv_heads
        self.packed: PackedLinear | None = None  # of q, k and v, while decoding on a CPU

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, cache: KVCache | None, layer: int) -> Tensor:
        q, k, v = self.heads(x, cos, sin)
        if cache is not None:
            cache.write(layer, k, v)
        decoding = cache is not None and cache.decoding
        out = cache.attend(layer, q, self.window) if decoding else attention(q, k, v, layout, self.window)
        return self.o_proj(out.flatten(1))

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, E], keys and values [N, K, E] of x [N, D], the first two rotated."""
        if self.packed is None:
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        else:
            both, v = self.packed(x).unflatten(-1, (-1, self.head_dim)).split((sum(self.counts), self.counts[1]), 1)
            if self.q_norm is None and self.scaled:
                return *rotate(both, cos, sin).split(self.counts, 1), v
            q, k = both.split(self.counts, 1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q if self.scaled else q * self.head_dim**0.5  # attention will divide by it
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first R dimensions of x [N, H, E], where cos and sin are [N, 1, R]."""
    rotating = cos.shape[-1]
    if rotating == x.shape[-1]:
        return rotary(x, cos, sin)
    return torch.cat([rotary(x[..., :rotating], cos, sin), x[..., rotating:]], -1) if rotating else x


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.gate_proj = Linear(config.width, config.mlp_width, config.mlp_bias) if config.gated else None
        self.up_proj = Linear(config.width, config.mlp_width, config.mlp_bias)
        self.down_proj = Linear(config.mlp_width, config.width, config.mlp_bias)
        self.packed: PackedLinear | None = None  # of gate and up, while decoding on a CPU

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))
        if self.packed is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.packed(x).chunk(2, -1)
        if self.activation == "silu":
            return self.down_proj(swiglu(gate, up))
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.parallel = config.parallel
        self.input_layernorm = new_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = new_norm(config) if config.norms == 2 else None
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, cache: KVCache | None, layer: int) -> Tensor:
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, cos, sin, layout, cache, layer)
        if self.parallel:
            normed = normed if self.post_attention_layernorm is None else self.post_attention_layernorm(x)
            return x + attended + self.mlp(normed)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


def embedding(count: int, width: int) -> nn.Embedding:
    """Without first values: drawing them on the meta device would import PyTorch's compiler, 69 MB and 1.9 s."""
    return nn.Embedding(count, width, _weight=torch.empty(count, width))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # of activations; None: that of the weights
        self.checkpointing = False  # keep each block's input alone and run the block again in the backward pass
        self.recompute = noop_context_fn  # contexts of a block's first and second run: which adapter is on (lora.py)
        self.decoder: Decoder | None = None  # what `generate` has been asked to keep
        self.adapters: dict[str, dict] = {}  # settings of the adapters that lora.py has added, by name,
        self.lora_layers: list[nn.Module] = []  # and the layers that hold them
        self.active: str | None = None  # the adapter that is on
        self.source = self.source_hash = ""  # where a frozen base was read from: an adapter's file names it
        self.unread: list = []  # of a model on the meta device: where its weights are (checkpoints.py),
        self.rows: dict = {}    # and rows of its embeddings that will take the place of the files'
        self.new_rows = False  # embeddings were added for a chat template's tokens: an adapter has to bring them along
        self.embed_tokens = embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.embed_positions = embedding(config.max_positions, config.width) if config.rotary == 0 else None
        self.norm = new_norm(config)
        self.lm_head = None if config.tied or config.scored else Linear(config.width, config.vocab_size)
        self.score_head = Linear(config.width, 1) if config.scored else None
        frequencies = rotary_frequencies(config)  # cos(-a) is cos(a), sin(-a) is -sin(a): both halves in one product
        self.register_buffer("frequencies", torch.cat([-frequencies, frequencies]), persistent=False)
        self.packed_head: PackedLinear | None = None  # in fp32, while decoding on a CPU
        self.rotary_scale = (config.rope_scaling or {}).get("attention_factor", 1.0)  # YaRN's, of queries and keys

    @property
    def head_weight(self) -> Tensor:
        """[V, D]"""
        if self.config.scored:
            raise ValueError("a reward model has no LM head: give the language model it was trained from")
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def resize(self, vocab_size: int) -> None:
        """Append zero rows to embedding and head up to `vocab_size`."""
        extra = vocab_size - self.config.vocab_size
        for module in (self.embed_tokens, self.lm_head):
            if module is not None and extra > 0:
                module.weight = nn.Parameter(F.pad(module.weight.data, (0, 0, 0, extra)))
        self.config = replace(self.config, vocab_size=vocab_size)

    def pack(self) -> None:
        """Lay out copies of the weights for decoding on a CPU. Until `unpack` no others are read."""
        weight = self.embed_tokens.weight
        dtype = self.compute_dtype or weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        if hasattr(self, "reshard") or not (can_pack(weight, dtype) and can_pack(weight, wide)):
            return  # a sharded model has no whole weights
        for block in self.layers:
            attention, mlp = block.self_attn, block.mlp
            pack(attention, [attention.q_proj, attention.k_proj, attention.v_proj], dtype)
            pack(attention.o_proj, [attention.o_proj], dtype)
            if mlp.gate_proj is None:
                pack(mlp.up_proj, [mlp.up_proj], dtype)
            else:
                pack(mlp, [mlp.gate_proj, mlp.up_proj], dtype)
            pack(mlp.down_proj, [mlp.down_proj], dtype)
        self.packed_head = PackedLinear([self.head_weight], [None], wide)

    def unpack(self) -> None:
        self.packed_head = None
        for module in self.layers.modules():
            if hasattr(module, "packed"):
                module.packed = None

    def hidden(self, tokens: Tensor, positions: Tensor, layout: Layout | None, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [N, D] of tokens [N] at positions [N] along their paths; decoding needs no layout."""
        count, missing = len(tokens), 0 if cache is not None and cache.decoding else missing_rows(tokens)
        if missing:
            tokens, positions = F.pad(tokens, (0, missing)), F.pad(positions, (0, missing))
        x = self.embed_tokens(tokens)
        x = x.to(torch.promote_types(x.dtype, self.compute_dtype or x.dtype))  # first: sums in bf16 would round
        x = x if self.embed_positions is None else x + self.embed_positions(positions)
        x = x if self.config.embed_scale == 1 else x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        angles = positions[:, None, None].float() * self.frequencies  # [N, 1, R]
        waves = [angles.cos(), angles.sin()]
        waves = waves if self.rotary_scale == 1 else [wave * self.rotary_scale for wave in waves]
        cos, sin = (wave.to(x.dtype) for wave in waves)
        for layer, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layout, cache, layer, use_reentrant=False, context_fn=self.recompute)
            else:
                x = block(x, cos, sin, layout, cache, layer)
        return self.norm(x)[:count]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in at least fp32."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if self.packed_head is not None:
            return self.packed_head(hidden.to(wide))
        narrow = hidden.dtype == self.head_weight.dtype != wide
        if hidden.is_cuda and hidden.ndim == 2 and narrow and not torch.is_grad_enabled():
            return torch.mm(hidden, self.head_weight.t(), out_dtype=wide)  # same sums, without an fp32 copy of the head
        return F.linear(hidden.to(wide), self.head_weight.to(wide))

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [...] in at least fp32: the score head's output after each token."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.score_head.weight.to(wide))[..., 0] - self.config.score_mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of padded rows (either side); 0 where the mask [B, T] is False."""
        hidden, mask = self._hidden_of_rows(input_ids, attention_mask)
        logits = self.logits(hidden)
        out = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        out[mask] = logits
        return out

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores [B] of padded rows (either side), read at each row's last token that the mask [B, T] keeps."""
        hidden, mask = self._hidden_of_rows(input_ids, attention_mask)
        return self.scores(hidden[mask.sum(1).cumsum(0) - 1])

    def _hidden_of_rows(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states [N, D] of the N tokens the mask keeps, and the mask [B, T]."""
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        layout = Layout.build(mask.sum(1).tolist()).to(input_ids.device)
        positions = (mask.cumsum(1) - 1)[mask]
        return self.hidden(input_ids[mask], positions, layout), mask


def init_weights(model: Transformer, seed: int) -> None:
    """Normal weights of std 0.02, those that write to the residual stream divided by sqrt(2 layers) (GPT-2)."""
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.ones_(parameter)
        else:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * model.config.layers) if into_residual else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)


def add_score_head(model: Transformer, seed: int) -> Transformer:
    """Turn a language model into a reward model, in place: its LM head goes, a score head comes.

    Weights normal with std 1 / sqrt(D + 1), so that first scores are about as large as their later differences
    (Stiennon et al. 2020, arXiv:2009.01325).
    """
    model.config = replace(model.config, scored=True)
    weight = model.embed_tokens.weight
    std = (model.config.width + 1) ** -0.5
    drawn = torch.randn(1, model.config.width, generator=torch.Generator().manual_seed(seed)) * std
    model.lm_head, model.score_head = None, Linear(model.config.width, 1)
    device = drawn.device if weight.is_meta else weight.device  # the new head is there before the other weights
    model.score_head.weight = nn.Parameter(drawn.to(device, torch.promote_types(weight.dtype, torch.float32)))
    return model


# ---------------------------------------------------------------------------------------- sampling

class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens, per layer.

    values [slots, K, length, E]; keys likewise, or, of several slots on a CPU, in chunks of 64 tokens,
    [slots, K, length / 64, E, 64].
    """

    def __init__(self, model: Transformer, slots: int, length: int):
        c, weight = model.config, model.embed_tokens.weight
        options = {"dtype": model.compute_dtype or weight.dtype, "device": weight.device}
        self.on_cpu = weight.device.type == "cpu" and not on_triton(weight)
        self.chunked = self.on_cpu and slots > 1
        chunks = -(-length // CHUNK)
        shape = (c.layers, slots, c.kv_heads, chunks * CHUNK if self.chunked else length, c.head_dim)
        self.values = torch.zeros(shape, **options)
        self.keys = torch.zeros((*shape[:3], chunks, c.head_dim, CHUNK) if self.chunked else shape, **options)
        self.decoding, self.longest, self.room, self.group = False, 0, length, c.heads // c.kv_heads
        self.step: ChunkedStep | None = None
        if self.chunked:  # where the first key, of each dimension, and the first value of a slot's heads stand
            first = torch.arange(slots)[:, None] * c.kv_heads + torch.arange(c.kv_heads)
            self.first_value = first * chunks * CHUNK
            self.first_key = (first[..., None] * chunks * c.head_dim + torch.arange(c.head_dim)) * CHUNK

    def at(self, slots: Tensor, positions: Tensor, longest: int, decoding: bool) -> KVCache:
        """The next forward pass writes its token i to place positions[i] < longest of slot slots[i].

        Decoding: one token a slot, of the first slots.
        """
        self.slots, self.positions, self.decoding = slots, positions, decoding
        self.seen = positions + 1                      # tokens each new token attends to
        self.masks: dict[int | None, Tensor] = {}      # of decoding, by window: layers share them
        self.latest, self.longest = longest, max(self.longest, longest)  # passed in: reading back would sync the GPU
        if self.chunked:
            self.value_places = (self.first_value[slots] + positions[:, None]).flatten()
            in_chunks = positions + positions // CHUNK * (CHUNK * (self.values.shape[-1] - 1))
            self.key_places = self.first_key[slots] + in_chunks[:, None, None]
            shape = len(slots), -(-self.longest // CHUNK)
            if decoding and (self.step is None or shape != (self.step.shape[0], self.step.shape[2])):
                self.step = ChunkedStep(len(slots), self.group, self.keys[0], self.values[0], self.longest)
        return self

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values = self.keys[layer], self.values[layer]
        if len(k) > len(self.slots):  # rows that fill up a multiple of 32
            k, v = k[: len(self.slots)], v[: len(self.slots)]
        if self.chunked:
            keys.view(-1).put_(self.key_places, k)
            values.view(-1, values.shape[-1]).index_copy_(0, self.value_places, v.flatten(0, 1))
        elif self.on_cpu:
            keys[0, :, self.latest - len(k) : self.latest] = k.transpose(0, 1)
            values[0, :, self.latest - len(v) : self.latest] = v.transpose(0, 1)
        else:
            keys[self.slots, :, self.positions] = k
            values[self.slots, :, self.positions] = v

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        """Attention of the tokens being decoded, q [B, H, E], to their cache."""
        keys, values = self.keys[layer], self.values[layer]
        if self.chunked:
            if window not in self.masks:
                size = self.step.shape[2] * CHUNK
                self.masks[window] = decode_mask(self.seen, size, window, values.dtype)[:, 0]
            return self.step.attend(q, keys, values, self.masks[window])
        if self.on_cpu:  # one sequence: it sees all that is cut out
            first = 0 if window is None else max(0, self.latest - window)
            k, v = (x[:, :, first : self.latest] for x in (keys, values))
            return F.scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)), k, v).flatten(1, 2)
        k, v = (x[: len(q), :, : self.longest] for x in (keys, values))
        return decode_attention(q, k, v, self.seen, window)

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy what slots `sources` hold to slots `targets`."""
        for x in (self.keys, self.values) if sources else ():
            used = -(-self.longest // CHUNK) if x.ndim == 6 else self.longest
            x[:, targets, :, :used] = x[:, sources, :, :used]


class Sample(NamedTuple):
    tokens: list[int]        # the stop token included
    logprobs: list[float]    # of each token under the whole distribution at the sampling temperature, nats
    finished: bool           # ended with a stop token; False: cut at max_tokens


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_tokens: int | list[int],              # a list has one for each prompt
    temperature: float | list[float] = 1.0,   # 0 is greedy; a list has one for each of the n samples
    top_k: int | list[int] = 0,               # 0: all; a list likewise
    top_p: float | list[float] = 1.0,         # 1: all; a list likewise
    n: int = 1,                               # samples per prompt
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    *,
    numbers: list[int] | None = None,  # of the prompts in the random streams; None: 0, 1, ...
    slots: int = 128,           # sequences decoded together
    progress: str = "",         # label of a progress bar; "": none
    keep: bool = False,         # cache and CUDA graphs stay with the model, for the next call that says so
) -> list[list[Sample]]:
    """n samples for every prompt. Prompts are packed, not padded; a finished sequence gives its slot to a waiting one.

    A prompt is read once for the samples that start together. Sample j of prompt i draws from its own random stream
    (seed, number i, j): the same whatever the batch.
    """
    settings = _sample_settings(temperature, top_k, top_p, n)
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} is empty")
    if model.embed_positions is not None and longest > model.config.max_positions:
        raise ValueError(f"prompt and reply have {longest} tokens, the model {model.config.max_positions} positions")
    numbers = numbers or list(range(len(prompts)))
    asked = [[ReplyState(prompt, limit, settings[j], [seed, number, j]) for j in range(n)]
             for prompt, limit, number in zip(prompts, limits, numbers, strict=True)]
    waiting = [s for samples in asked for s in samples if s.max_tokens > 0]
    decoder = (_kept_decoder if keep else Decoder)(model, stop_ids, min(slots, len(waiting)), longest)
    decoder.waiting.extend(waiting)
    try:
        with tqdm(total=len(waiting), desc=progress, disable=not progress, mininterval=1, unit=" replies") as bar:
            while stepped := decoder.step():
                bar.update(sum(s.done for s in stepped))
    finally:
        model.unpack()
    if keep:
        model.decoder = decoder
    return [[Sample(s.tokens, s.logprobs, s.finished) for s in samples] for samples in asked]


def _kept_decoder(model: Transformer, stop_ids: tuple[int, ...], slots: int, length: int) -> Decoder:
    """The last call's if it is large enough, else a new one: a GPU takes long to record a graph, once for every size.

    Weights may have changed, but in place: graphs read them where they were.
    """
    kept, model.decoder = model.decoder, None
    if kept is not None and kept.stop_ids == stop_ids and kept.slots >= slots and kept.cache.room >= length:
        return kept
    del kept  # frees its cache before there is another
    return Decoder(model, stop_ids, slots, -(-length // 256) * 256)  # prompts of the next call may be longer


def _sample_settings(temperature, top_k, top_p, n: int) -> list[tuple[float, int, float]]:
    """Temperature, top-k and top-p of each of n samples."""
    given = f"temperature {temperature}, top_k {top_k}, top_p {top_p}"
    each = [x if isinstance(x, list) else [x] * n for x in (temperature, top_k, top_p)]
    if any(len(x) != n for x in each):
        raise ValueError(f"{given}: expected one number, or n={n} of them")
    settings = list(zip(*each, strict=True))
    if any(t < 0 or k < 0 or not 0 <= p <= 1 for t, k, p in settings):
        raise ValueError(f"{given}: expected >= 0, >= 0 and between 0 and 1")
    return settings


class ReplyState:
    """A reply being sampled: its prompt, how it is drawn, its tokens so far."""

    def __init__(
        self, prompt: list[int], max_tokens: int,
        settings: tuple[float, int, float],  # temperature, top-k and top-p
        stream: list[int],                   # seeds its random numbers
        labels: list[int] = (),              # tokens whose log-probability as the reply's first is asked for
        top: int = -1,                       # alternatives to report per token; -1: not even its own at temperature 1
    ):
        self.prompt, self.max_tokens = tuple(prompt), max_tokens
        self.settings, self.stream = settings, stream
        self.labels, self.label_logprobs = list(labels), []
        self.top, self.alternatives = top, []   # per token: its log-probability, the likeliest ids, and theirs
        self.tokens: list[int] = []
        self.logprobs: list[float] = []         # at the sampling temperature
        self.done = self.finished = False       # finished: with a stop token
        self.not_finite = False                 # logits that were NaN, or infinite, have ended it
        self.began = 0.0


PACK_AFTER = 8  # tokens: laying out the weights pays after twenty of one reply, six in bf16, two steps of sixteen


class Decoder:
    """Sequences decoded together, one token each a step; they join and leave between steps.

    Whoever sets `done` on a sequence takes it out before the next step. On a CPU, from PACK_AFTER tokens on until
    nothing is left to decode, a second copy of the weights is read; meanwhile the weights must not change.
    """

    def __init__(self, model: Transformer, stop_ids: tuple[int, ...], slots: int, length: int):
        self.model, self.stop_ids, self.slots = model, stop_ids, slots
        self.cache = KVCache(model, slots, length)
        self.device = model.embed_tokens.weight.device
        self.decode = partial(_decode, model, self.cache)
        if self.device.type == "cuda" and not hasattr(model, "reshard"):  # a sharded one gathers its weights each time
            self.decode = DecodeGraphs(self.decode, self.cache, slots)
        self.decoded = 0  # tokens since there was nothing to decode
        self.waiting: deque[ReplyState] = deque()
        self.active: list[ReplyState] = []

    def step(self) -> list[ReplyState]:
        """One more token for some sequences: those that join now, or else all active ones. Returns these."""
        with torch.no_grad(), torch.cuda.device_of(self.cache.values):  # a thread of its own starts on the first GPU
            return self._step()

    def _step(self) -> list[ReplyState]:
        self._leave()
        new = []
        # Reading a few prompts costs a whole pass: wait until an eighth of the slots is free.
        if self.waiting and len(self.active) <= self.slots - max(1, min(self.slots // 8, len(self.waiting))):
            new = self._join()
        if not self.active:
            self.model.unpack()
            self.decoded = 0
        if new or not self.active:
            return new
        positions = [len(s.prompt) + len(s.tokens) - 1 for s in self.active]
        tokens = torch.tensor([s.tokens[-1] for s in self.active], device=self.device)
        self.decoded += len(self.active)
        if self.decoded - len(self.active) < PACK_AFTER <= self.decoded:
            self.model.pack()
        self.cache.longest = 0  # of the sequences here now, not of those that have been
        self._draw(self.active, self.decode(tokens, torch.tensor(positions, device=self.device), max(positions) + 1))
        return list(self.active)

    def _join(self) -> list[ReplyState]:
        new, room = [], 16384  # prompt tokens read at once: what bounds the memory of a pass
        while self.waiting and len(self.active) + len(new) < self.slots:
            if new and len(self.waiting[0].prompt) > room:
                break
            s = self.waiting.popleft()
            if s.done:
                continue
            s.began, s.uniform = time.perf_counter(), uniform_numbers(s.stream, s.max_tokens)
            new.append(s)
            room -= len(s.prompt)
        if not new:
            return new
        logits = _prefill(self.model, self.cache, new, len(self.active))
        for row, s in zip(logits, new, strict=True):
            if s.labels:
                s.label_logprobs = torch.log_softmax(row, -1)[s.labels].tolist()
        self.active += new
        self._draw(new, logits)
        return new

    def _draw(self, sequences: list[ReplyState], logits: Tensor) -> None:
        uniform = torch.from_numpy(np.stack([s.uniform[len(s.tokens)] for s in sequences])).to(self.device)
        tokens, logprobs = sample_each(logits, [s.settings for s in sequences], uniform)
        for row, (s, token, logprob) in enumerate(zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True)):
            if s.top >= 0:
                at_1 = torch.log_softmax(logits[row], -1)
                best = at_1.topk(s.top)
                s.alternatives.append((at_1[token].item(), best.indices.tolist(), best.values.tolist()))
            s.logprobs.append(logprob)
            s.tokens.append(token)
            s.finished = token in self.stop_ids
            s.not_finite = s.not_finite or math.isnan(logprob)
            if s.finished or s.not_finite or len(s.tokens) == s.max_tokens:
                s.done = True  # last: another thread may be reading

    def _leave(self) -> None:
        """The last sequences move into the gaps, so that the active ones stay the first."""
        done = {k for k, s in enumerate(self.active) if s.done}
        for k in done:
            if self.active[k].not_finite:  # -inf added to NaN is NaN, and 0 times it: the next owner would see it
                self.cache.keys[:, k] = self.cache.values[:, k] = 0
        left = len(self.active) - len(done)
        gaps, movers = [k for k in done if k < left], [k for k in range(left, len(self.active)) if k not in done]
        self.cache.move(movers, gaps)
        for gap, mover in zip(gaps, movers, strict=True):
            self.active[gap] = self.active[mover]
        del self.active[left:]


def _prefill(model: Transformer, cache: KVCache, new: list[ReplyState], first_slot: int) -> Tensor:
    """Read the prompts of new sequences into the cache, equal ones once, from slot `first_slot` on; logits [B, V]."""
    device = model.embed_tokens.weight.device
    slot: dict[tuple[int, ...], int] = {}  # of each prompt, where it is read; the others that have it get copies
    for i, s in enumerate(new):
        slot.setdefault(s.prompt, first_slot + i)
    lengths = torch.tensor([len(prompt) for prompt in slot], device=device)
    tokens = torch.tensor([token for prompt in slot for token in prompt], device=device)
    layout = Layout.build(lengths.tolist()).to(device)
    rows = torch.repeat_interleave(torch.arange(len(slot), device=device), lengths)
    positions = torch.arange(len(tokens), device=device) - layout.start[rows]
    slots = torch.tensor(list(slot.values()), device=device)[rows]
    longest = max(map(len, slot))
    hidden = model.hidden(tokens, positions, layout, cache.at(slots, positions, longest, decoding=False))
    copies = [(slot[s.prompt], first_slot + i) for i, s in enumerate(new) if slot[s.prompt] != first_slot + i]
    cache.move([source for source, _ in copies], [target for _, target in copies])
    logits = model.logits(hidden[layout.start + lengths - 1])
    place = {prompt: row for row, prompt in enumerate(slot)}
    return logits[[place[s.prompt] for s in new]] if copies else logits


def _decode(model: Transformer, cache: KVCache, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
    """Logits [B, V] after one more token [B] at positions [B] of the first B slots."""
    cache.at(torch.arange(len(tokens), device=tokens.device), positions, longest, decoding=True)
    with without_onednn(tokens.device) if len(tokens) <= 2 else nullcontext():
        hidden = model.hidden(tokens, positions, None, cache)
    return model.logits(hidden)


def __getattr__(name: str):
    """`model.load_model` and `model.save_model`, as notebooks call them: checkpoints.py, which imports us, has both."""
    if name in ("load_model", "save_model"):
        import checkpoints

        return getattr(checkpoints, name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
