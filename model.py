"""The transformer: configuration, forward pass, KV cache, sampling, and Hugging Face checkpoints in and out.

Everything between the embedding and the head works on one flat row of N tokens, whatever sequences or
conversation trees it holds: only rotary positions and attention look at where a token stands. The
head is not part of the forward pass. Training asks for the log-probabilities of response tokens
(`kernels/logprobs.py`), sampling for the logits of the last tokens.

    hidden = model.hidden(tokens [N], positions [N], layout)     -> [N, D]
    logits = model.logits(hidden)                                -> [N, V]
    logits = model(input_ids [B, T], attention_mask [B, T])      -> [B, T, V], the plain way in

Parameters carry the names of Hugging Face's Llama; other families are renamed, and their fused matrices split, on
the way in and out. What sets the families apart is a table of fields, FAMILIES.
"""
from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from tqdm import tqdm

import ranks
from kernels import missing_rows, without_onednn
from kernels.attention import attention
from kernels.decode import decode_attention
from kernels.fused import rms_norm, rotary, swiglu
from kernels.layout import Layout
from runtime import fail, writing

# ----------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of a model. V vocabulary, D width, H heads, K key/value heads, E head width. Defaults are Llama's."""

    family: str = "llama"                  # a key of FAMILIES, `model_type` in config.json
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
    rotary: float = 1.0                    # share of a head's dimensions that turn; 0: learned positions
    rope_theta: float = 10000.0            # base of the rotary frequencies
    rope_scaling: dict | None = None       # Llama-3's long-context scaling, as in config.json
    window: int | None = None              # tokens a query sees, itself included; None: all
    tied: bool = True                      # head and embedding share one matrix
    scored: bool = False                   # a score head in place of the LM head: a reward or value model
    score_mean: float = 0.0                # taken off every score, so that demonstrations score 0 on average
    score_std: float = 1.0                 # of those scores: the scale of the reward, for PPO to divide by
    dtype: str = "float32"                 # of the weights on disk
    raw: dict = field(default_factory=dict)  # config.json as read: keys we do not use travel along


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
SPELLINGS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

# What a config.json may ask for at most: a broken or hostile one is refused before memory is taken.
LARGEST = {"vocab_size": 2**24, "width": 2**18, "layers": 1024, "heads": 4096, "kv_heads": 4096, "mlp_width": 2**20, "max_positions": 2**24,
           "norms": 2}

# Where config.json keeps a field: its key, or (key, value when missing), or a function of the whole file.
KEYS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": lambda raw: raw.get("num_key_value_heads") or raw["num_attention_heads"], "mlp_width": "intermediate_size",
    "max_positions": ("max_position_embeddings", 2048), "norm_eps": ("rms_norm_eps", 1e-6), "activation": ("hidden_act", "silu"),
    "tied": ("tie_word_embeddings", False),
}
# What transformers calls our modules; "self_attn.qkv" stands for three matrices kept in one.
LLAMA_NAMES = {"embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "score_head": "score"}
GPT_NAMES = {"embed_tokens": "transformer.wte", "embed_positions": "transformer.wpe", "layers": "transformer.h", "norm": "transformer.ln_f",
             "self_attn.qkv": "attn.c_attn", "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
             "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "score_head": "score"}
FALCON_NAMES = {"embed_tokens": "transformer.word_embeddings", "layers": "transformer.h", "norm": "transformer.ln_f", "score_head": "score",
                "self_attn.qkv": "self_attention.query_key_value", "self_attn.o_proj": "self_attention.dense",
                "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"}
NEOX_NAMES = {"embed_tokens": "gpt_neox.embed_in", "layers": "gpt_neox.layers", "norm": "gpt_neox.final_layer_norm", "lm_head": "embed_out",
              "self_attn.qkv": "attention.query_key_value", "self_attn.o_proj": "attention.dense", "mlp.up_proj": "mlp.dense_h_to_4h",
              "mlp.down_proj": "mlp.dense_4h_to_h", "score_head": "score"}


class Family(NamedTuple):
    """What sets a family apart; everything else is Llama's."""

    name: str                       # of its classes in transformers
    constants: dict = {}            # fields that all its models share
    keys: dict = {}                 # as KEYS
    names: dict = LLAMA_NAMES


def _sliding(raw: dict) -> int | None:
    """Qwen's window, which its files state and switch off."""
    return raw.get("sliding_window") if raw.get("use_sliding_window") else None


def _falcon_groups(raw: dict) -> int:
    """Key/value heads: the 40B's groups, the 7B's one."""
    if raw.get("new_decoder_architecture"):
        return raw.get("num_kv_heads") or raw["num_attention_heads"]
    return 1 if raw.get("multi_query", True) else raw["num_attention_heads"]


GPT = {"norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
TIED = {"tied": ("tie_word_embeddings", True)}
ATTENTION_BIAS = {"qkv_bias": ("attention_bias", False), "out_bias": ("attention_bias", False)}

FAMILIES = {
    "llama": Family("Llama", keys=ATTENTION_BIAS | {"mlp_bias": ("mlp_bias", False)}),  # Llama 1-3, Yi, TinyLlama, SmolLM
    "mistral": Family("Mistral", keys={"window": ("sliding_window", None)}),             # and Zephyr
    "qwen2": Family("Qwen2", {"qkv_bias": True}, {"window": _sliding}),
    "qwen3": Family("Qwen3", {"qk_norm": True}, ATTENTION_BIAS | {"window": _sliding}),
    "gemma": Family("Gemma", {"norm_offset": 1.0}, TIED | {
        "embed_scale": lambda raw: raw["hidden_size"] ** 0.5, "activation": ("hidden_activation", "gelu_tanh")}),
    "falcon": Family("Falcon", {"norm": "layer", "gated": False, "parallel": True}, TIED | {
        "kv_heads": _falcon_groups, "mlp_width": lambda raw: raw.get("ffn_hidden_size") or 4 * raw["hidden_size"],
        "norms": lambda raw: raw.get("num_ln_in_parallel_attn") or (2 if raw.get("new_decoder_architecture") else 1),
        "norm_eps": ("layer_norm_epsilon", 1e-5), "activation": ("activation", "gelu"),
        "qkv_bias": ("bias", False), "out_bias": ("bias", False), "mlp_bias": ("bias", False)}, FALCON_NAMES),
    "gpt_bigcode": Family("GPTBigCode", GPT | {"rotary": 0.0}, TIED | {                  # StarCoder
        "width": "n_embd", "layers": "n_layer", "heads": "n_head", "max_positions": "n_positions", "norm_eps": ("layer_norm_epsilon", 1e-5),
        "kv_heads": lambda raw: 1 if raw.get("multi_query", True) else raw["n_head"],
        "mlp_width": lambda raw: raw.get("n_inner") or 4 * raw["n_embd"], "activation": ("activation_function", "gelu_tanh")}, GPT_NAMES),
    "starcoder2": Family("Starcoder2", GPT, TIED | {
        "norm_eps": ("norm_epsilon", 1e-5), "window": ("sliding_window", None), "activation": ("hidden_act", "gelu_tanh")},
        LLAMA_NAMES | {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    "gpt_neox": Family("GPTNeoX", GPT, {                                                 # Pythia
        "norm_eps": ("layer_norm_eps", 1e-5), "parallel": ("use_parallel_residual", True), "rotary": ("rotary_pct", 0.25),
        "rope_theta": ("rotary_emb_base", 10000), "activation": ("hidden_act", "gelu")}, NEOX_NAMES),
}


def read_config(path: str | Path) -> ModelConfig:
    """config.json of a Hugging Face model directory."""
    file = Path(path) / "config.json"
    if not file.is_file():
        fail(f"{path}: holds no config.json, expected a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        fail(f"{file}: is not JSON ({error}): copy it again")
    if not isinstance(raw, dict):
        fail(f"{file}: holds a {type(raw).__name__}, expected a JSON object: copy it again")
    family = raw.get("model_type")
    if family not in FAMILIES:
        fail(f"{file}: model_type {family!r} is not supported, expected one of {', '.join(FAMILIES)}")
    for switch in ("alibi", "qk_layernorm"):
        if raw.get(switch):
            fail(f"{file}: {switch} is true, which is not supported: the model would compute something else")
    found = dict(FAMILIES[family].constants)
    keys = KEYS | FAMILIES[family].keys
    for name, where in keys.items():
        try:
            found[name] = where(raw) if callable(where) else raw.get(*where) if isinstance(where, tuple) else raw[where]
        except (KeyError, TypeError):
            found[name] = None
        key = name if callable(where) else where[0] if isinstance(where, tuple) else where
        if name in LARGEST and (type(found[name]) is not int or not 0 < found[name] <= LARGEST[name]):
            fail(f"{file}: {key} is {found[name]!r}, expected a whole number from 1 to {LARGEST[name]:,}: copy the file again")
    head_dim = raw.get("head_dim") or found["width"] // found["heads"]
    if type(head_dim) is not int or not 0 < head_dim <= 4096:
        fail(f"{file}: head_dim is {head_dim!r}, expected a whole number from 1 to 4,096: copy the file again")
    dtype = raw.get("torch_dtype") or raw.get("dtype") or "float32"
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        fail(f"{file}: torch_dtype is {dtype!r}, expected 'float32', 'bfloat16' or 'float16'")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # one dict since transformers 5
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        fail(f"{file}: rotary scaling {kind!r} is not supported, expected 'llama3' or none")
    activation = SPELLINGS.get(found["activation"], found["activation"])
    if activation not in ACTIVATIONS:
        fail(f"{file}: activation {found['activation']!r} is not supported, expected one of {', '.join(ACTIVATIONS)}")
    if found["heads"] % found["kv_heads"]:
        fail(f"{file}: {found['kv_heads']} key/value heads do not divide {found['heads']} heads: copy the file again")
    theta = found.pop("rope_theta", raw.get("rope_theta", 10000.0))
    try:
        config = ModelConfig(
            **found | {"activation": activation, "norm_eps": float(found["norm_eps"]), "tied": bool(found["tied"])},
            family=family, head_dim=head_dim, rope_theta=float(rope.get("rope_theta", theta)),
            rope_scaling=rope if kind == "llama3" else None,
            scored=(raw.get("architectures") or [""])[0].endswith("ForSequenceClassification"),
            score_mean=float(raw.get("score_mean", 0.0)), score_std=float(raw.get("score_std", 1.0)), dtype=dtype, raw=raw,
        )
        rotary_frequencies(config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        fail(f"{file}: a number is missing or of the wrong kind ({error}): copy the file again")
    return config


def config_json(config: ModelConfig) -> dict:
    """What config.json should say: the keys it was read with, our fields on top."""
    family = FAMILIES[config.family]
    ours: dict = {"architectures": [family.name + ("ForSequenceClassification" if config.scored else "ForCausalLM")],
                  "model_type": config.family, "torch_dtype": config.dtype}
    for name, where in (KEYS | family.keys).items():
        key = where[0] if isinstance(where, tuple) else where
        if not callable(key) and not (name == "activation" and key in config.raw):
            ours[key] = getattr(config, name)
    if "kv_heads" not in family.keys and config.family != "gpt_neox":
        ours["num_key_value_heads"] = config.kv_heads
    if config.head_dim * config.heads != config.width or "head_dim" in config.raw or not config.raw:
        ours["head_dim"] = config.head_dim
    if config.rotary and "rope_parameters" not in config.raw and config.family != "gpt_neox":
        ours |= {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    if config.scored:  # transformers reads the score before the padding, so padding must not be the end of sequence
        pad = config.raw.get("pad_token_id")
        pad = 0 if pad is None or pad == config.raw.get("eos_token_id") else pad
        ours |= {"num_labels": 1, "pad_token_id": pad, "score_mean": config.score_mean, "score_std": config.score_std}
    return config.raw | ours


# ------------------------------------------------------------------------------------- the network

class Linear(nn.Module):
    """y = x W^T + b, W [out, in] kept in its own dtype and used in that of x (fp32 weights, bf16 compute)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def embedding(count: int, width: int) -> nn.Embedding:
    """Without its first values, which nobody keeps: drawing them on the meta device imports PyTorch's compiler, 69 MB and 1.9 s."""
    return nn.Embedding(count, width, _weight=torch.empty(count, width))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight + self.offset if self.offset else self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def new_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layer":
        return LayerNorm(config.width, config.norm_eps)
    return RMSNorm(config.width, config.norm_eps, config.norm_offset)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of turning dimensions, [R / 2] (Su et al. 2021; Llama-3's scaling of slow ones)."""
    turning = int(config.head_dim * config.rotary)
    exponents = torch.arange(0, turning, 2, dtype=torch.float32, device="cpu") / max(turning, 1)  # a value on the meta device too
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    low, high, trained = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
    turns = trained * frequencies / (2 * math.pi)  # full turns within the context it was trained on
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # fast pairs stay, slow pairs are stretched, linear between
    return keep * frequencies + (1 - keep) * frequencies / s["factor"]


class Attention(nn.Module):
    """Grouped-query attention along each token's own path (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.window
        self.q_proj = Linear(config.width, config.heads * config.head_dim, config.qkv_bias)
        self.k_proj = Linear(config.width, config.kv_heads * config.head_dim, config.qkv_bias)
        self.v_proj = Linear(config.width, config.kv_heads * config.head_dim, config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_dim, config.width, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, cache: KVCache | None, layer: int) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = turned(q, cos, sin), turned(k, cos, sin)  # [N, H, E], [N, K, E]
        if cache is not None:
            cache.write(layer, k, v)
        if cache is not None and cache.decoding:
            out = decode_attention(q, *cache.read(layer), cache.seen, self.window)
        else:
            out = attention(q, k, v, layout, self.window)
        return self.o_proj(out.flatten(1))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first R dimensions of x [N, H, E], where cos and sin are [N, 1, R]."""
    turning = cos.shape[-1]
    if turning == x.shape[-1]:
        return rotary(x, cos, sin)
    return torch.cat([rotary(x[..., :turning], cos, sin), x[..., turning:]], -1) if turning else x


class MLP(nn.Module):

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.gate_proj = Linear(config.width, config.mlp_width, config.mlp_bias) if config.gated else None
        self.up_proj = Linear(config.width, config.mlp_width, config.mlp_bias)
        self.down_proj = Linear(config.mlp_width, config.width, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))
        if self.activation == "silu":
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.parallel = config.parallel
        self.input_layernorm = new_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = new_norm(config) if config.norms == 2 else None
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, cache: KVCache | None, layer: int) -> Tensor:
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, cos, sin, layout, cache, layer)
        if self.parallel:
            return x + attended + self.mlp(normed if self.post_attention_layernorm is None else self.post_attention_layernorm(x))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # of activations; None: that of the weights
        self.checkpointing = False  # keep each block's input alone and run the block again in the backward pass
        self.recompute = noop_context_fn  # contexts of a block's first and second run: which adapter is on (lora.py)
        self.embed_tokens = embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.embed_positions = embedding(config.max_positions, config.width) if config.rotary == 0 else None
        self.norm = new_norm(config)
        self.lm_head = None if config.tied or config.scored else Linear(config.width, config.vocab_size)
        self.score_head = Linear(config.width, 1) if config.scored else None
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]"""
        if self.config.scored:
            fail("a reward model has no LM head, expected a language model here: give the model it was trained from")
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def resize(self, vocab_size: int) -> None:
        """Append zero rows to embedding and head up to `vocab_size`."""
        extra = vocab_size - self.config.vocab_size
        for module in (self.embed_tokens, self.lm_head):
            if module is not None and extra > 0:
                module.weight = nn.Parameter(F.pad(module.weight.data, (0, 0, 0, extra)))
        self.config = replace(self.config, vocab_size=vocab_size)

    def hidden(self, tokens: Tensor, positions: Tensor, layout: Layout | None, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [N, D] of tokens [N] at positions [N] along their paths; no layout is needed to decode."""
        count, missing = len(tokens), missing_rows(tokens) if cache is None else 0
        if missing:
            tokens, positions = F.pad(tokens, (0, missing)), F.pad(positions, (0, missing))
        x = self.embed_tokens(tokens)
        x = x if self.embed_positions is None else x + self.embed_positions(positions)
        x = x if self.config.embed_scale == 1 else x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        angles = positions[:, None, None].float() * self.frequencies  # [N, 1, R / 2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)  # [N, 1, R]
        for layer, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layout, cache, layer, use_reentrant=False, context_fn=self.recompute)
            else:
                x = block(x, cos, sin, layout, cache, layer)
        return self.norm(x)[:count]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in at least fp32."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if hidden.is_cuda and hidden.ndim == 2 and hidden.dtype == self.head_weight.dtype != wide and not torch.is_grad_enabled():
            return torch.mm(hidden, self.head_weight.t(), out_dtype=wide)  # the same sums, without a wide copy of the head
        return F.linear(hidden.to(wide), self.head_weight.to(wide))

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [...] in at least fp32: what the score head says after each token."""
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
    model.lm_head = None
    model.score_head = Linear(model.config.width, 1).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    std = (model.config.width + 1) ** -0.5
    drawn = torch.randn(1, model.config.width, generator=torch.Generator().manual_seed(seed))
    model.score_head.weight.data.copy_(drawn * std)
    return model


# ---------------------------------------------------------------------------------------- sampling

class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens, per layer [slots, K, length, E]."""

    def __init__(self, model: Transformer, slots: int, length: int):
        c, weight = model.config, model.embed_tokens.weight
        shape = (c.layers, 2, slots, c.kv_heads, length, c.head_dim)
        self.data = torch.zeros(shape, dtype=model.compute_dtype or weight.dtype, device=weight.device)
        self.decoding, self.longest = False, 0

    def at(self, slots: Tensor, positions: Tensor, longest: int, decoding: bool) -> KVCache:
        """The next forward pass writes its token i to slot slots[i], place positions[i] < longest; decoding: one token a slot."""
        self.slots, self.positions, self.decoding = slots, positions, decoding
        self.seen = positions + 1                      # tokens each new token attends to
        self.longest = max(self.longest, longest)      # told, because to look at a GPU's tensor is to wait for it
        return self

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.data[layer, 0, self.slots, :, self.positions] = k
        self.data[layer, 1, self.slots, :, self.positions] = v

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, S, E] of the slots being decoded, which are the first B."""
        used = self.data[layer, :, : len(self.slots), :, : self.longest]
        return used[0], used[1]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy what slots `sources` hold to slots `targets`."""
        if sources:
            self.data[:, :, targets, :, : self.longest] = self.data[:, :, sources, :, : self.longest]


class Sample(NamedTuple):
    tokens: list[int]        # the stop token included
    logprobs: list[float]    # of each token under the whole distribution at the sampling temperature, nats
    finished: bool           # ended with a stop token; False: cut at max_tokens


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_tokens: int | list[int],              # a list has one for each prompt
    temperature: float | list[float] = 1.0,   # 0 is greedy; a list has one for each of the n samples, as do the next two
    top_k: int | list[int] = 0,               # 0: all
    top_p: float | list[float] = 1.0,         # 1: all
    n: int = 1,                               # samples per prompt
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    *,
    numbers: list[int] | None = None,  # of the prompts in the random streams; None: 0, 1, ...
    slots: int = 128,           # sequences decoded together
    progress: str = "",         # label of a progress bar; "": none
) -> list[list[Sample]]:
    """n samples for every prompt. Prompts are packed, not padded; a finished sequence gives its slot to a waiting one.

    A prompt is read once for the samples that start together. Sample j of prompt i draws from its own random stream
    (seed, number i, j): the same whatever the batch.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} is empty")
    each = [x if isinstance(x, list) else [x] * n for x in (temperature, top_k, top_p)]
    if any(len(x) != n for x in each):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected one number, or n={n} of them")
    settings = list(zip(*each, strict=True))
    if any(t < 0 or k < 0 or not 0 <= p <= 1 for t, k, p in settings):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected >= 0, >= 0 and between 0 and 1")
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
    if model.embed_positions is not None and longest > model.config.max_positions:
        raise ValueError(f"a prompt and its new tokens make {longest}: the model has {model.config.max_positions} positions")
    numbers = numbers or list(range(len(prompts)))
    asked = [[Sequence(prompt, limit, settings[j], [seed, number, j]) for j in range(n)]
             for prompt, limit, number in zip(prompts, limits, numbers, strict=True)]
    waiting = [s for samples in asked for s in samples if s.max_tokens > 0]
    decoder = Decoder(model, stop_ids, min(slots, len(waiting)), longest)
    decoder.waiting.extend(waiting)
    with tqdm(total=len(waiting), desc=progress, disable=not progress, mininterval=1, unit=" replies") as bar:
        while stepped := decoder.step():
            bar.update(sum(s.done for s in stepped))
    return [[Sample(s.tokens, s.logprobs, s.finished) for s in samples] for samples in asked]


class Sequence:
    """One reply on its way: what it answers, how it is drawn, what it has said."""

    def __init__(self, prompt: list[int], max_tokens: int, settings: tuple[float, int, float], stream: list[int],
                 labels: list[int] = (), top: int = -1):
        self.prompt, self.max_tokens = tuple(prompt), max_tokens
        self.settings, self.stream = settings, stream         # temperature, top-k and top-p; what its random numbers depend on
        self.labels, self.label_logprobs = list(labels), []   # tokens, and the log-probability of each to come first
        self.top, self.alternatives = top, []                 # for each token: its log-probability, the `top` likeliest ids, and theirs
        self.tokens: list[int] = []
        self.logprobs: list[float] = []                       # at the sampling temperature
        self.done = self.finished = False                     # finished: with a stop token
        self.began = 0.0


class Decoder:
    """Sequences decoded together, one token each a step; they join and leave between steps.

    Whoever sets `done` on a sequence takes it out before the next step.
    """

    def __init__(self, model: Transformer, stop_ids: tuple[int, ...], slots: int, length: int):
        self.model, self.stop_ids, self.slots = model, stop_ids, slots
        self.cache = KVCache(model, slots, length)
        self.device = model.embed_tokens.weight.device
        self.decode = _DecodeGraphs(model, self.cache, slots) if self.device.type == "cuda" else partial(_decode, model, self.cache)
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """One more token for some sequences: those that join now, or else all active ones. Returns these."""
        self._leave()
        new = []
        # Reading a few prompts costs a whole pass: wait until an eighth of the slots is free.
        if self.waiting and len(self.active) <= self.slots - max(1, min(self.slots // 8, len(self.waiting))):
            new = self._join()
        if new or not self.active:
            return new
        positions = [len(s.prompt) + len(s.tokens) - 1 for s in self.active]
        tokens = torch.tensor([s.tokens[-1] for s in self.active], device=self.device)
        self.cache.longest = 0  # of the sequences here now, not of those that have been
        self._draw(self.active, self.decode(tokens, torch.tensor(positions, device=self.device), max(positions) + 1))
        return list(self.active)

    def _join(self) -> list[Sequence]:
        new, room = [], 16384  # prompt tokens read at once: what bounds the memory of a pass
        while self.waiting and len(self.active) + len(new) < self.slots and (not new or len(self.waiting[0].prompt) <= room):
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

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> None:
        uniform = torch.from_numpy(np.stack([s.uniform[len(s.tokens)] for s in sequences])).to(self.device)
        tokens, logprobs = _sample_each(logits, [s.settings for s in sequences], uniform)
        for row, (s, token, logprob) in enumerate(zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True)):
            if s.top >= 0:
                at_1 = torch.log_softmax(logits[row], -1)
                best = at_1.topk(s.top)
                s.alternatives.append((at_1[token].item(), best.indices.tolist(), best.values.tolist()))
            s.logprobs.append(logprob)
            s.tokens.append(token)
            s.finished = token in self.stop_ids
            if s.finished or len(s.tokens) == s.max_tokens:
                s.done = True  # last: another thread may be reading

    def _leave(self) -> None:
        """The last sequences move into the gaps, so that the active ones stay the first."""
        done = {k for k, s in enumerate(self.active) if s.done}
        left = len(self.active) - len(done)
        gaps, movers = [k for k in done if k < left], [k for k in range(left, len(self.active)) if k not in done]
        self.cache.move(movers, gaps)
        for gap, mover in zip(gaps, movers, strict=True):
            self.active[gap] = self.active[mover]
        del self.active[left:]


def _prefill(model: Transformer, cache: KVCache, new: list[Sequence], first_slot: int) -> Tensor:
    """Run the prompts of new sequences into the cache, from slot `first_slot` on, equal ones once; logits [B, V] after them."""
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


class _DecodeGraphs:
    """_decode as CUDA graphs: a step of a 7B model is hundreds of launches, which cost more than the work of a few sequences.

    A graph has one size, the next power of two; its idle rows write to the first place of slots that are free.
    """

    def __init__(self, model: Transformer, cache: KVCache, slots: int):
        self.model, self.cache, self.slots = model, cache, slots
        self.room = cache.data.shape[-2]
        self.graphs: dict[int, tuple] = {}
        self.memory = self.aside = None  # what all graphs share

    def __call__(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        count, seen = len(tokens), max(self.cache.longest, longest)
        size = min(self.slots, 1 << (count - 1).bit_length())
        padding = (0, size - count)
        if size not in self.graphs:
            self.graphs[size] = self._capture(F.pad(tokens, padding), F.pad(positions, padding))
        graph, its_tokens, its_positions, logits = self.graphs[size]
        its_tokens.copy_(F.pad(tokens, padding))
        its_positions.copy_(F.pad(positions, padding))
        graph.replay()
        self.cache.longest = seen
        return logits[:count]

    def _capture(self, tokens: Tensor, positions: Tensor) -> tuple:
        """Record the step that reads these two tensors. It runs for real once before, aside: kernels compile."""
        def step():
            return _decode(self.model, self.cache, tokens, positions, self.room)

        if self.memory is None:
            self.memory, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.aside):
            step()
        torch.cuda.current_stream().wait_stream(self.aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, stream=self.aside):
            logits = step()
        return graph, tokens, positions, logits


def _sample_each(logits: Tensor, settings: list[tuple[float, int, float]], uniform: Tensor) -> tuple[Tensor, Tensor]:
    """sample_tokens, each row with its own temperature, top-k and top-p."""
    kinds = set(settings)
    if len(kinds) == 1:
        return sample_tokens(logits, *settings[0], uniform)
    tokens, logprobs = torch.empty(len(settings), dtype=torch.long, device=logits.device), logits.new_empty(len(settings))
    for kind in kinds:
        rows = torch.tensor([i for i, x in enumerate(settings) if x == kind], device=logits.device)
        tokens[rows], logprobs[rows] = sample_tokens(logits[rows], *kind, uniform[rows])
    return tokens, logprobs


DRAWS = 24  # uniform numbers for each token: more than one is used when top-p refuses a draw


def uniform_numbers(seed: int | list[int], max_tokens: int) -> np.ndarray:
    """A sample's random stream, [max_tokens, DRAWS] in [0, 1)."""
    generator = np.random.default_rng(seed)
    first = generator.random((max_tokens, 1), dtype=np.float32)
    return np.concatenate([first, generator.random((max_tokens, DRAWS - 1), dtype=np.float32)], 1)


def sample_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of logits [B, V] from uniform numbers in [0, 1) [B, DRAWS], and its log-probability [B].

    Order: temperature, top-k (ties with the k-th stay), top-p (the fewest tokens whose probability reaches
    top_p, at least one, and ties with the last). The log-probability is that of the whole tempered distribution,
    so that it is what a training forward finds. temperature 0 takes the largest logit, with its probability at 1.
    """
    if temperature == 0:
        logprobs, tokens = torch.log_softmax(logits, -1), logits.argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
    probs = torch.softmax(logits / temperature, -1)
    kept = keep_top_k(probs, top_k) if top_k else probs
    tokens = inverse_cdf(kept, uniform[:, 0])
    if top_p < 1:
        tokens = _redraw(kept, tokens, top_p, uniform)
    return tokens, probs.gather(1, tokens[:, None])[:, 0].log()


def keep_top_k(probs: Tensor, top_k: int) -> Tensor:
    """Probabilities [B, V] of the k likeliest tokens alone, which sum to 1."""
    kth = probs.topk(min(top_k, probs.shape[-1]), dim=-1).values[:, -1:]
    kept = probs.masked_fill(probs < kth, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token of each row of weights [B, V] at which their running sum exceeds uniform [B] times the whole, [B]."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    below = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))  # or rounding may point past the last token
    return torch.searchsorted(cumulative, below[:, None], right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def likelier(probs: Tensor, tokens: Tensor) -> Tensor:
    """Probabilities [B, V], but 0 where one is not above that of the row's token [B]."""
    above = torch.empty_like(probs)  # of numbers: boolean masks of 64 x 32,000 take five times as long
    return torch.gt(probs, probs.gather(1, tokens[:, None]), out=above).mul_(probs)


def in_nucleus(probs: Tensor, tokens: Tensor, top_p: float) -> Tensor:
    """Whether token [B] of a row [B, V] is among the fewest whose probability reaches top_p: likelier ones hold less, or there are none."""
    above = likelier(probs, tokens).sum(-1)
    return (above < top_p) | (above == 0)


def _redraw(probs: Tensor, tokens: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Top-p without sorting: what lies outside the nucleus (Holtzman et al. 2020) is drawn again among what is likelier.

    A refused token's equals and inferiors lie outside too, so each draw is from a set that holds the whole nucleus,
    and what is accepted has the nucleus's distribution. Most rows accept the first. Sorting 64 rows of 32,000 costs
    73 ms on two cores, a decoding step of a 15 M model 12.
    """
    refused = (~in_nucleus(probs, tokens, top_p)).nonzero()[:, 0]
    for column in range(1, DRAWS):
        if not len(refused):
            return tokens
        some = probs[refused]
        tokens[refused] = inverse_cdf(likelier(some, tokens[refused]), uniform[refused, column])
        refused = refused[~in_nucleus(some, tokens[refused], top_p)]
    tokens[refused] = probs[refused].argmax(-1)  # once in a billion tokens at top_p 0.01, less above
    return tokens


# ------------------------------------------------------------------------------------- checkpoints

def file_name(name: str, config: ModelConfig) -> str:
    """What transformers calls a parameter of ours; three share a name where a family keeps queries, keys and values in one matrix."""
    names = FAMILIES[config.family].names
    if config.family == "falcon" and config.norms == 2:
        names = names | {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{names.get(module, module)}.{kind}"
    _, layer, part = module.split(".", 2)
    if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") and "self_attn.qkv" in names:
        part = "self_attn.qkv"
    return f"{names['layers']}.{layer}.{names.get(part, part)}.{kind}"


def _sources(model: Transformer) -> dict[str, list[str]]:
    """Our parameters by the name of the tensor in the file that holds them."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(file_name(name, model.config), []).append(name)
    return found


# In one matrix (Falcon, StarCoder, GPT-NeoX) each key/value head follows the queries that share it: K groups of H / K + 2 heads.

def split_qkv(fused: Tensor, config: ModelConfig) -> list[Tensor]:
    """[(H + 2 K) E, ...] -> queries [H E, ...], keys [K E, ...], values [K E, ...]."""
    groups = fused.unflatten(0, (config.kv_heads, -1, config.head_dim))
    return [part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]


def join_qkv(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """The inverse of split_qkv."""
    return torch.cat([part.unflatten(0, (config.kv_heads, -1, config.head_dim)) for part in parts], 1).flatten(0, 2)


BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attn.bias", "masked_bias")  # that old checkpoints carry


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", *,
    linear: Callable[[Linear], nn.Module] | None = None,
) -> Transformer:
    """A Hugging Face directory as a Transformer; weights in `dtype`, or as stored. Reads safetensors only.

    Tensor by tensor: the peak is the model and its largest tensor. `linear` makes something smaller of each
    linear layer of the blocks as it arrives (lora.py: NF4, int8); such a model is frozen.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    model.frequencies = model.frequencies.to(device)
    for file, key, names in check_weights(path, model):
        tensor = _read_tensor(file, key, device)
        parts = split_qkv(tensor, config) if len(names) == 3 else [tensor]
        for name, part in zip(names, parts, strict=True):
            where, _, kind = name.rpartition(".")
            module = model.get_submodule(where)
            setattr(module, kind, nn.Parameter(part.to(dtype or part.dtype, copy=True)))
            if linear is not None and kind == "weight" and where.startswith("layers.") and isinstance(module, Linear):
                parent, _, child = where.rpartition(".")
                setattr(model.get_submodule(parent), child, linear(module))
    return model.requires_grad_(linear is None)


def expect_replies(model: Transformer, path: str | Path) -> Transformer:
    """The model, unless it is one that gives scores."""
    if model.config.scored:
        fail(f"{path}: is a reward model, expected one that replies: start from the result of sft.py or a base model")
    return model


def check_weights(path: Path, model: Transformer) -> list[tuple[Path, str, list[str]]]:
    """Where a directory keeps the model's parameters: [(file, tensor in it, our names)]. Reads headers alone; whatever does not fit
    is one line."""
    config, found = model.config, []
    sources, shapes = _sources(model), dict(model.named_parameters())
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                held = {key: tensors.get_slice(key).get_shape() for key in sorted(tensors.keys())}
        except (SafetensorError, OSError) as error:
            fail(f"{file}: cannot be read as safetensors ({error}): copy it again")
        for key, shape in held.items():
            if key not in sources:
                if key.endswith(BUFFERS) or (config.tied and key == file_name("lm_head.weight", config)):
                    continue  # the second copy of a tied matrix
                fail(f"{file}: holds {key}, which family {config.family} has no place for")
            names = sources.pop(key)
            expected = [sum(shapes[name].shape[0] for name in names), *shapes[names[0]].shape[1:]]
            if list(shape) != expected:
                fail(f"{file}: {key} has shape {list(shape)}, config.json says {expected}")
            found.append((file, key, names))
    if sources:
        fail(f"{path}: {min(sources)} is in none of its weight files ({len(sources)} missing): is config.json of this model?")
    return found


def _read_tensor(file: Path, key: str, device: str | torch.device) -> Tensor:
    """One tensor of a memory-mapped file. Opening anew for each lets go of the pages of the one before."""
    with safe_open(file, framework="pt", device=str(device)) as tensors:
        return tensors.get_tensor(key)


def weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({path / Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{index}: is not an index of safetensors (a \"weight_map\" from tensors to files): copy it again")
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            pickled = " (it holds pickled weights, which are never opened: convert them)" if list(path.glob("*.bin")) else ""
            fail(f"{file}: no such file{pickled}, expected the model's weights as safetensors")
    return files


def save_model(
    model: Transformer, path: str | Path, tokenizer=None, *, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9
) -> None:
    """Write a Hugging Face directory: config.json, weights in `dtype` (default: as they are), tokenizer files.

    Written beside and renamed, so that `path` is never half a checkpoint, whenever the process is killed. Of a sharded model
    every rank gives its part, tensor by tensor; rank 0 writes.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    parameters = dict(model.named_parameters())
    for key, sources in _sources(model).items():
        parts = [ranks.whole(parameters[name].detach()).to("cpu", dtype or parameters[name].dtype) for name in sources]
        if ranks.rank():
            continue
        tensor = (join_qkv(parts, model.config) if len(parts) == 3 else parts[0]).contiguous()
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if ranks.rank():
        return
    final = Path(path)
    path = final.with_name(f".{final.name}.new")
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    saved = next(iter(shards[0].values())).dtype
    config = replace(model.config, dtype=str(saved).removeprefix("torch."))
    with writing(final, path):
        _write_shards(path, names, shards)
        (path / "config.json").write_text(json.dumps(config_json(config), indent=1) + "\n")
        if tokenizer is not None:
            tokenizer.save(path)
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        path.rename(final)
        shutil.rmtree(old, ignore_errors=True)


def _write_shards(path: Path, names: list[str], shards: list[dict[str, Tensor]]) -> None:
    """The weights of a checkpoint, with an index if there are several files."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    if len(shards) > 1:
        weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, path / file, metadata={"format": "pt"})
