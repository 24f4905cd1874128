"""Hugging Face checkpoints in and out: what sets model families apart, config.json, and the weights.

Parameters carry the names of Hugging Face's Llama; other families are renamed, and their fused matrices split, on
the way in and out. What sets the families apart is a table of fields, FAMILIES. Weights are read from safetensors alone.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import ACTIVATIONS, Linear, ModelConfig, Transformer, rotary_frequencies
from runtime import distributed, fail, writing

# ---------------------------------------------------------------------------------------- families

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


# ----------------------------------------------------------------------------------------- weights

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
        parts = [distributed.full_tensor(parameters[name].detach()).to("cpu", dtype or parameters[name].dtype) for name in sources]
        if distributed.rank():
            continue
        tensor = (join_qkv(parts, model.config) if len(parts) == 3 else parts[0]).contiguous()
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if distributed.rank():
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
