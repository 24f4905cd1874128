"""Hugging Face model directories in and out: model families, config.json, and the weights.

    FAMILIES                    what sets each family apart from Llama, as a table of fields
    read_config, config_json    config.json to a ModelConfig, and back
    load_model, save_model      the whole directory, weights included

Our parameters carry the names of Hugging Face's Llama. Other families' tensors are renamed on the way in and out, and
their fused query-key-value matrices are split and joined. Weights are read from safetensors only.
"""
from __future__ import annotations

import json
import math
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

class Family(NamedTuple):
    """What sets a family apart; everything else is as in Llama. Fields are those of ModelConfig."""

    name: str              # of its classes in transformers: LlamaForCausalLM, LlamaForSequenceClassification
    fields: dict           # values where config.json says nothing, on top of FIELDS: those of its class in transformers
    keys: dict             # where config.json keeps a field, on top of KEYS: a key, or a function of the whole file
    only: dict = {}        # keys not followed, with the values that change nothing, on top of ONLY


FIELDS = {"max_positions": 2048, "norm_eps": 1e-6, "activation": "silu", "tied": False}
KEYS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "mlp_width": "intermediate_size", "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "activation": "hidden_act", "tied": "tie_word_embeddings",
}

# Fields that several families have in common
HEAD_DIM = {"head_dim": "head_dim"}
GPT = {"norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
QWEN = {"kv_heads": 32, "max_positions": 32768}
MISTRAL = ({"kv_heads": 8, "max_positions": 131072, "window": 4096}, HEAD_DIM | {"window": "sliding_window"},
           {"attention_bias": (None, False)})


def _qwen_window(raw: dict) -> int | None:
    """Qwen's files name a sliding window and, beside it, whether it is used."""
    return raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None


def _falcon_kv_heads(raw: dict) -> int:
    """The 40B has groups of queries, the 7B one key/value head."""
    if raw.get("new_decoder_architecture"):
        return raw.get("num_kv_heads") or raw["num_attention_heads"]
    return 1 if raw.get("multi_query", True) else raw["num_attention_heads"]


def _falcon_norms(raw: dict) -> int:
    """Norms of a block: attention and MLP share one if they are parallel, in the 40B they have one each."""
    if not raw.get("parallel_attn", True):
        return 2
    return raw.get("num_ln_in_parallel_attn") or (2 if raw.get("new_decoder_architecture") else 1)


FAMILIES = {
    # Llama 1-3, Yi, TinyLlama, SmolLM
    "llama": Family("Llama", {}, HEAD_DIM | ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}),
    # and Zephyr
    "mistral": Family("Mistral", *MISTRAL),
    # what transformers takes a Mistral with layer_types for
    "ministral": Family("Ministral", *MISTRAL),
    "qwen2": Family("Qwen2", QWEN | {"qkv_bias": True}, HEAD_DIM | {"window": _qwen_window}),
    "qwen3": Family("Qwen3", QWEN | {"head_dim": 128, "qk_norm": True},
                    HEAD_DIM | ATTENTION_BIAS | {"window": _qwen_window}),
    "gemma": Family(
        "Gemma", {"kv_heads": 16, "head_dim": 256, "max_positions": 8192, "norm_offset": 1.0,
                  "activation": "gelu_tanh", "tied": True},
        HEAD_DIM | ATTENTION_BIAS | {"embed_scale": lambda raw: raw["hidden_size"] ** 0.5}),
    "falcon": Family(
        "Falcon", {"norm": "layer", "norm_eps": 1e-5, "gated": False, "activation": "gelu", "tied": True},
        {"kv_heads": _falcon_kv_heads, "mlp_width": lambda raw: raw.get("ffn_hidden_size") or 4 * raw["hidden_size"],
         "parallel": lambda raw: bool(raw.get("parallel_attn", True)), "norms": _falcon_norms,
         "norm_eps": "layer_norm_epsilon", "activation": "activation",
         "qkv_bias": "bias", "out_bias": "bias", "mlp_bias": "bias"}),
    # StarCoder
    "gpt_bigcode": Family(
        "GPTBigCode", GPT | {"rotary": 0.0, "max_positions": 1024, "norm_eps": 1e-5, "activation": "gelu_tanh",
                             "tied": True},
        {"width": "n_embd", "layers": "n_layer", "heads": "n_head", "max_positions": "n_positions",
         "kv_heads": lambda raw: 1 if raw.get("multi_query", True) else raw["n_head"],
         "mlp_width": lambda raw: raw.get("n_inner") or 4 * raw["n_embd"],
         "norm_eps": "layer_norm_epsilon", "activation": "activation_function", "scaled": "scale_attn_weights"}),
    "starcoder2": Family(
        "Starcoder2", GPT | {"kv_heads": 2, "max_positions": 4096, "norm_eps": 1e-5, "activation": "gelu_tanh",
                             "tied": True},
        HEAD_DIM | {"norm_eps": "norm_epsilon", "window": "sliding_window",
                    "qkv_bias": "use_bias", "out_bias": "use_bias", "mlp_bias": "use_bias"},
        {"norm_type": ("layer_norm",), "mlp_type": ("default",)}),
    # Pythia
    "gpt_neox": Family(
        "GPTNeoX", GPT | {"norm_eps": 1e-5, "parallel": True, "rotary": 0.25, "rope_theta": 10000.0,
                          "activation": "gelu"},
        ATTENTION_BIAS | {
            "kv_heads": "num_attention_heads", "norm_eps": "layer_norm_eps", "parallel": "use_parallel_residual",
            "rotary": "rotary_pct", "rope_theta": "rotary_emb_base"}),
}

# Keys of other families, and switches of all, that change what a model computes and that we do not follow, with the
# values that change nothing. Any other key that the family's class in transformers does not know is ignored, as there.
ONLY = dict.fromkeys((
    "alibi", "qk_layernorm", "add_cross_attention", "is_encoder_decoder", "use_bidirectional_attention",
    "apply_residual_connection_post_layernorm", "scale_attn_by_inverse_layer_idx", "pruned_heads", "per_layer_config",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier", "clip_qkv",
    "num_experts", "num_local_experts", "mlp_bias"), (None, False, {}, [])) | dict.fromkeys((
        "is_causal", "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), (None, True, 1.0))

# Today's names of what old files call otherwise
RENAMED = {
    "falcon": {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads",
               "n_embed": "hidden_size"},
    "gpt_bigcode": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd",
                    "max_position_embeddings": "n_positions"},
}
# transformers' names of activations, and ours; the first of each is the one that is written
ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_python_tanh": "gelu_tanh"}

# ------------------------------------------------------------------------------------- config.json

# The most a config.json may ask for: a broken or hostile one is refused before memory is allocated.
LARGEST = {"vocab_size": 2**24, "width": 2**18, "layers": 1024, "heads": 4096, "kv_heads": 4096, "head_dim": 4096,
           "mlp_width": 2**20, "max_positions": 2**24, "norms": 2, "window": 2**24}
SCALINGS = ("default", "linear", "llama3", "yarn")  # of rotary positions
TRAINED = "original_max_position_embeddings"


def read_config(path: str | Path) -> ModelConfig:
    """config.json of a Hugging Face model directory; what we could not compute faithfully is refused in one line."""
    file = Path(path) / "config.json"
    raw = _read_json(file)
    _refuse_quantised(file, raw)
    raw = _rename(file, raw)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        fail(f"{file}: model_type {family!r} is not supported, expected one of {', '.join(FAMILIES)}")
    _refuse_switches(file, raw, FAMILIES[family])
    fields = _read_fields(file, raw, FAMILIES[family])
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        fail(f"{file}: torch_dtype is {dtype!r}, expected 'float32', 'bfloat16' or 'float16'")
    try:
        fields |= _read_windows(file, raw, family, fields) | _read_rotary(file, raw, family, fields)
        config = ModelConfig(
            **fields | {"norm_eps": float(fields["norm_eps"])}, family=family,
            scored=(raw.get("architectures") or [""])[0].endswith("ForSequenceClassification"),
            score_mean=float(raw.get("score_mean", 0.0)), score_std=float(raw.get("score_std", 1.0)),
            dtype=dtype, raw=raw,
        )
        if not rotary_frequencies(config).isfinite().all():
            raise ValueError("rotary frequencies are not finite")
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        fail(f"{file}: a number is missing or of the wrong kind ({error}): copy the file again")
    return config


def _read_json(file: Path) -> dict:
    if not file.is_file():
        fail(f"{file.parent}: holds no config.json, expected a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        fail(f"{file}: is not JSON ({error}): copy it again")
    if not isinstance(raw, dict):
        fail(f"{file}: holds a {type(raw).__name__}, expected a JSON object: copy it again")
    return raw


def _refuse_quantised(file: Path, raw: dict) -> None:
    """GPTQ, AWQ, bitsandbytes, fp8 and the rest: config.json tells, or a file beside it."""
    keys = [key for key in ("quantization_config", "compression_config", "quantization") if raw.get(key)]
    names = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
    files = [name for name in names if (file.parent / name).is_file()]
    if not keys and not files:
        return
    how = raw[keys[0]] if keys else {"quant_method": names[files[0]]}
    how = how if isinstance(how, dict) else {"quant_method": str(how)}
    loads = "bitsandbytes" if how.get("load_in_4bit") or how.get("load_in_8bit") else "of a kind it does not name"
    fail(f"{file}: the weights are quantised ({how.get('quant_method') or loads}, says {[*keys, *files][0]}), "
         "which is not read: take the original 16-bit weights; lora_rank= with quantize=\"nf4\" makes them small here")


def _rename(file: Path, raw: dict) -> dict:
    """config.json under today's names and values, where old files have others for the same."""
    if raw.get("model_type") in ("RefinedWeb", "RefinedWebModel"):  # Falcon as first published, with code of its own
        raw = {"new_decoder_architecture": "n_head_kv" in raw} | raw | {"model_type": "falcon"}
        raw.pop("auto_map", None)
    names = RENAMED.get(str(raw.get("model_type")), {})
    raw = {name if names.get(name) in raw else names.get(name, name): value for name, value in raw.items()}
    if raw.get("model_type") == "gemma":  # whose files say "gelu", or nothing in hidden_activation, and mean tanh
        said = raw.get("hidden_act", "gelu")
        tanh = {"hidden_act": "gelu_pytorch_tanh" if said == "gelu" else said}
        old = raw.get("hidden_activation")
        if old is not None and ACTIVATION_NAMES.get(old) != ACTIVATION_NAMES.get(tanh["hidden_act"]):
            fail(f"{file}: hidden_activation is {old!r} but hidden_act {said!r}: delete the one that is wrong")
        raw = raw | tanh
    return raw


def _refuse_switches(file: Path, raw: dict, family: Family) -> None:
    for key, harmless in (ONLY | family.only).items():
        if key in raw and key not in family.keys.values() and raw[key] not in harmless:
            fail(f"{file}: {key} is {json.dumps(raw[key])}, which is not supported: the model would compute something "
                 "else")
    if family.name == "Falcon":
        new, norms = raw.get("new_decoder_architecture"), raw.get("num_ln_in_parallel_attn")
        if (new and not raw.get("parallel_attn", True)) or (norms == 2 and not new and raw.get("parallel_attn", True)):
            fail(f"{file}: new_decoder_architecture is {json.dumps(bool(new))}, which does not go with parallel_attn "
                 "or num_ln_in_parallel_attn as given: transformers cannot run it either")


def _read_fields(file: Path, raw: dict, family: Family) -> dict:
    """The fields of ModelConfig that KEYS and the family name, sizes, switches and activation checked."""
    fields = FIELDS | family.fields
    keys = KEYS | family.keys
    for name, key in keys.items():
        if callable(key):
            fields[name] = _call(key, raw)
        elif key in raw:
            fields[name] = raw[key]
        if name in ("kv_heads", "head_dim") and fields.get(name) is None:
            fields[name] = fields["heads"] if name == "kv_heads" else fields["width"] // fields["heads"]
        no_window = name == "window" and fields.get(name) is None
        if name in LARGEST and not no_window:
            _check_size(file, name if callable(key) else key, fields.get(name), LARGEST[name])
        if isinstance(getattr(ModelConfig, name), bool):
            switch = fields.setdefault(name, getattr(ModelConfig, name))
            if not callable(key) and switch not in (True, False, None):
                fail(f"{file}: {key} is {switch!r}, expected true or false: copy the file again")
            fields[name] = bool(switch)
    fields.setdefault("head_dim", fields["width"] // fields["heads"])
    if raw.get("head_dim") not in (None, fields["head_dim"]):
        fail(f"{file}: head_dim is {raw['head_dim']!r}, but this family has heads of {fields['head_dim']}")
    if fields["heads"] % fields["kv_heads"]:
        fail(f"{file}: {fields['kv_heads']} key/value heads do not divide {fields['heads']} heads: copy the file again")
    activation = str(fields["activation"])
    activation = ACTIVATION_NAMES.get(activation, activation)
    if activation not in ACTIVATIONS:
        fail(f"{file}: activation {activation!r} is not supported, expected one of {', '.join(ACTIVATIONS)}")
    return fields | {"activation": activation}


def _call(key: Callable[[dict], object], raw: dict):
    """The function's value; None if what it needs is missing or of the wrong kind."""
    try:
        return key(raw)
    except (KeyError, TypeError):
        return None


def _check_size(file: Path, key: str, value, largest: int) -> None:
    if type(value) is not int or not 0 < value <= largest:
        fail(f"{file}: {key} is {value!r}, expected a whole number from 1 to {largest:,}: copy the file again")


def _read_windows(file: Path, raw: dict, family: str, fields: dict) -> dict:
    """Which layers have the sliding window: those that layer_types names, in Qwen else those from max_window_layers."""
    count, window = fields["layers"], fields.get("window")
    first = raw.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
    full, sliding = "full_attention", "sliding_attention"
    usual = [sliding if window is not None and layer >= first else full for layer in range(count)]
    types = raw.get("layer_types") or usual
    if types != usual and family not in ("mistral", "ministral", "qwen2", "qwen3"):
        fail(f"{file}: layer_types asks for other windows than family {family} has: copy the file again")
    if not isinstance(types, list) or len(types) != count or any(kind not in (full, sliding) for kind in types):
        fail(f"{file}: layer_types is not {count} times '{full}' or '{sliding}', which alone are supported")
    if sliding in types and window is None:
        fail(f"{file}: layer_types names '{sliding}', but no sliding_window is in use")
    windowed = tuple(layer for layer in range(count) if types[layer] == sliding)
    return {"window": window if windowed else None, "window_layers": windowed if 0 < len(windowed) < count else None}


def _read_rotary(file: Path, raw: dict, family: str, fields: dict) -> dict:
    """Base, rotating share and scaling: under rope_parameters since transformers 5, before under keys of their own."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers takes the first, if both are there
    if fields.get("rotary") == 0:
        return {}
    if isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values()):
        fail(f"{file}: rotary positions are given by kind of layer ({', '.join(rope)}), which is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default" if isinstance(rope, dict) else rope
    if kind not in SCALINGS or not isinstance(rope, dict):
        remedy = " (it is none below max_position_embeddings: set it to null if no text is longer)"
        fail(f"{file}: rotary scaling {kind!r} is not supported, expected one of {', '.join(SCALINGS)}"
             f"{remedy if kind == 'dynamic' else ''}")
    theta = rope.get("rope_theta") or fields.get("rope_theta") or raw.get("rope_theta") or 10000.0
    rotary = fields.get("rotary", 1.0)
    if "rotary" in FAMILIES[family].keys:
        rotary = rope.get("partial_rotary_factor") or rotary
    for given in (rope.get("partial_rotary_factor"), raw.get("partial_rotary_factor")):
        if given not in (None, rotary):
            fail(f"{file}: partial_rotary_factor is {given!r}, but this model of family {family} rotates {rotary}")
    if not 0 < float(rotary) <= 1 or not float(theta) > 0:
        raise ValueError(f"a share of {rotary} rotates, with base {theta}")
    return {"rope_theta": float(theta), "rotary": float(rotary),
            "rope_scaling": _read_scaling(raw, rope, kind, fields["max_positions"])}


def _read_scaling(raw: dict, rope: dict, kind: str, max_positions: int) -> dict | None:
    """The numbers of a scaling, what the file leaves out filled in as transformers does."""
    if kind == "default":
        return None
    trained = raw.get(TRAINED) or rope.get(TRAINED) or max_positions
    factor = rope.get("factor") or (max_positions / trained if kind == "yarn" else rope["factor"])
    found = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        found[TRAINED] = trained
    if kind == "llama3":
        found |= {key: rope[key] for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        def grown(share: float) -> float:  # what attention is multiplied by (Peng et al. 2023, arXiv:2309.00071, 3.4)
            return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

        one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        usual = grown(one) / grown(all_dims) if one and all_dims else grown(1.0)
        given = rope.get("attention_factor")
        found |= {"beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1,
                  "truncate": bool(rope.get("truncate", True)),
                  "attention_factor": float(usual if given is None else given)}
    return found


def config_json(config: ModelConfig) -> dict:
    """The contents of config.json: the keys it was read with, our fields on top, under old names and new ones."""
    family = FAMILIES[config.family]
    ours: dict = {"architectures": [family.name + ("ForSequenceClassification" if config.scored else "ForCausalLM")],
                  "model_type": config.family, "torch_dtype": config.dtype}
    keys = KEYS | family.keys
    ours |= {key: getattr(config, name) for name, key in keys.items() if not callable(key)}
    activation = config.raw.get(keys["activation"])
    if ACTIVATION_NAMES.get(activation) != config.activation:
        activation = next(theirs for theirs, name in ACTIVATION_NAMES.items() if name == config.activation)
    ours[keys["activation"]] = activation
    if "dtype" in config.raw:
        ours["dtype"] = config.dtype
    if config.rotary:  # transformers 4 knows no rope_parameters; 5 takes these first, where there are both
        scaling = config.raw.get("rope_scaling") or {}
        ours["rope_scaling"] = scaling | (config.rope_scaling or {}) or None
        if "rope_theta" not in family.keys:
            ours["rope_theta"] = config.rope_theta
    if config.scored:  # transformers reads the score at the last token before the padding: that must not be EOS
        pad = config.raw.get("pad_token_id")
        pad = 0 if pad is None or pad == config.raw.get("eos_token_id") else pad
        ours |= {"num_labels": 1, "pad_token_id": pad, "score_mean": config.score_mean, "score_std": config.score_std}
    return {key: value for key, value in (config.raw | ours).items() if key != "auto_map"}  # its code stays behind


# ------------------------------------------------------------------------------- tensors and their names

# What transformers calls our modules. "self_attn.qkv" is q_proj, k_proj and v_proj in one matrix.
LLAMA_MODULES = {
    "embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "score_head": "score"}
MODULES = {  # of the other families
    "falcon": {
        "embed_tokens": "transformer.word_embeddings", "layers": "transformer.h", "norm": "transformer.ln_f",
        "self_attn.qkv": "self_attention.query_key_value", "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h", "score_head": "score"},
    "gpt_bigcode": {
        "embed_tokens": "transformer.wte", "embed_positions": "transformer.wpe", "layers": "transformer.h",
        "norm": "transformer.ln_f", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "self_attn.qkv": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj", "score_head": "score"},
    "starcoder2": LLAMA_MODULES | {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    "gpt_neox": {
        "embed_tokens": "gpt_neox.embed_in", "layers": "gpt_neox.layers", "norm": "gpt_neox.final_layer_norm",
        "self_attn.qkv": "attention.query_key_value", "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h", "lm_head": "embed_out",
        "score_head": "score"},
}
FALCON_TWO_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}  # the 40B


def file_name(name: str, config: ModelConfig) -> str:
    """What transformers calls one of our parameters. Where a family fuses them, queries, keys and values share it."""
    modules = MODULES.get(config.family, LLAMA_MODULES)
    if config.family == "falcon" and config.parallel and config.norms == 2:
        modules = modules | FALCON_TWO_NORMS
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{modules.get(module, module)}.{kind}"
    _, layer, part = module.split(".", 2)
    if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") and "self_attn.qkv" in modules:
        part = "self_attn.qkv"
    return f"{modules['layers']}.{layer}.{modules.get(part, part)}.{kind}"


def parameters_by_tensor(model: Transformer) -> dict[str, list[str]]:
    """For each tensor of the files, our names for it: one, or three where a family fuses queries, keys and values."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(file_name(name, model.config), []).append(name)
    return found


# Falcon, StarCoder and GPT-NeoX fuse queries, keys and values into K groups: H / K queries, their key, their value.

def split_qkv(fused: Tensor, config: ModelConfig) -> list[Tensor]:
    """[(H + 2 K) E, ...] -> queries [H E, ...], keys [K E, ...], values [K E, ...]."""
    groups = fused.unflatten(0, (config.kv_heads, -1, config.head_dim))
    return [part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]


def join_qkv(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """The inverse of split_qkv."""
    return torch.cat([part.unflatten(0, (config.kv_heads, -1, config.head_dim)) for part in parts], 1).flatten(0, 2)


# ------------------------------------------------------------------------------------------- reading

# In old checkpoints' files but not parameters: the forward pass computes them.
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attn.bias", "masked_bias")


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", *,
    linear: Callable[[Linear], nn.Module] | None = None,
) -> Transformer:
    """A Hugging Face directory as a Transformer, its weights in `dtype`, or as stored.

    Tensors are read one by one: peak memory is the model and its largest tensor. `linear` replaces each linear layer
    of the blocks as soon as it is read (lora.py: by NF4 or int8); such a model is frozen.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    if "auto_map" in config.raw and not distributed.rank():
        print(f"{path}: names code of its own (auto_map), which is not run: computed as transformers' {config.family}")
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
    """The model itself; a reward model is refused."""
    if model.config.scored:
        fail(f"{path}: is a reward model, expected one that replies: start from the result of sft.py or a base model")
    return model


def check_weights(path: Path, model: Transformer) -> list[tuple[Path, str, list[str]]]:
    """Where a directory keeps the model's parameters: [(file, name of a tensor in it, our names)].

    Reads only the files' headers. A tensor that is missing, unknown or of another shape is refused in one line.
    """
    config, found = model.config, []
    missing, shapes = parameters_by_tensor(model), dict(model.named_parameters())
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                held = {key: tensors.get_slice(key) for key in sorted(tensors.keys())}
                held = {key: (part.get_shape(), part.get_dtype()) for key, part in held.items()}
        except (SafetensorError, OSError) as error:
            fail(f"{file}: cannot be read as safetensors ({error}): copy it again")
        for key, (shape, kind) in held.items():
            if key not in missing and key.endswith(BUFFERS):
                continue
            if kind not in ("F64", "F32", "F16", "BF16"):
                fail(f"{file}: {key} is stored as {kind}, as quantised weights are: take the original 16-bit weights")
            if key not in missing:
                if config.tied and key == file_name("lm_head.weight", config):
                    continue  # the second copy of a tied matrix
                fail(f"{file}: holds {key}, which family {config.family} has no place for")
            names = missing.pop(key)
            expected = [sum(shapes[name].shape[0] for name in names), *shapes[names[0]].shape[1:]]
            if list(shape) != expected:
                fail(f"{file}: {key} has shape {list(shape)}, config.json says {expected}")
            found.append((file, key, names))
    if missing:
        fail(f"{path}: {min(missing)} is in none of its weight files ({len(missing)} missing): "
             "is config.json of this model?")
    return found


def _read_tensor(file: Path, key: str, device: str | torch.device) -> Tensor:
    """One tensor of a memory-mapped file, opened again for each: closing it frees the pages read so far."""
    with safe_open(file, framework="pt", device=str(device)) as tensors:
        return tensors.get_tensor(key)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory: the shards that an index names, or model.safetensors."""
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if index.is_file():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
            files = sorted({path / Path(name).name for name in names})
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{index}: is not an index of safetensors (a \"weight_map\" from tensors to files): copy it again")
    for file in files:
        if not file.is_file():
            pickled = any(path.glob("*.bin"))
            why = " (it holds pickled weights, which are never opened: convert them)" if pickled else ""
            fail(f"{file}: no such file{why}, expected the model's weights as safetensors")
    return files


# ------------------------------------------------------------------------------------------- writing

def save_model(
    model: Transformer, path: str | Path, tokenizer=None, *,
    dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face directory: config.json, weights in `dtype` (default: as they are), tokenizer files.

    Written beside and renamed: `path` is never half a checkpoint, even if the process is killed. A model sharded over
    ranks is gathered tensor by tensor, so every rank has to call; rank 0 writes.
    """
    shards = _shards(model, dtype, shard_bytes)
    if distributed.rank():
        return
    path = Path(path)
    beside, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    saved = next(iter(shards[0].values())).dtype
    config = replace(model.config, dtype=str(saved).removeprefix("torch."))
    with writing(path, beside):
        _write_shards(beside, shards)
        (beside / "config.json").write_text(json.dumps(config_json(config), indent=1) + "\n")
        if tokenizer is not None:
            tokenizer.save(beside)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _shards(model: Transformer, dtype: torch.dtype | None, shard_bytes: int) -> list[dict[str, Tensor]]:
    """The tensors to write, under transformers' names, in groups of at most `shard_bytes`; nothing on ranks above 0."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    parameters = dict(model.named_parameters())
    for key, names in parameters_by_tensor(model).items():
        parts = [distributed.full_tensor(parameters[name].detach()).to("cpu", dtype or parameters[name].dtype)
                 for name in names]
        if distributed.rank():
            continue
        tensor = (join_qkv(parts, model.config) if len(parts) == 3 else parts[0]).contiguous()
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    return shards


def _write_shards(path: Path, shards: list[dict[str, Tensor]]) -> None:
    """The weights of a checkpoint in a fresh folder, with an index if there are several files."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
