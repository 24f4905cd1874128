"""Model families: what sets each apart, and config.json in and out.

    FAMILIES                    what sets each family apart from Llama, as a table of fields
    read_config, config_json    config.json to a ModelConfig, and back

A key means here what it means to transformers, versions 4 and 5, or is refused in one line that names it
(benchmarks/results/config_keys.md has them all).
"""
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from model import ACTIVATIONS, ModelConfig, rotary_frequencies
from runtime import fail, shown
from runtime.json_files import STRING, STRINGS, SWITCH, TABLE, Checked, number, read_json, whole

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


KINDS = {  # of keys that are read; the others' sizes and switches are checked as fields (_read_fields)
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), number(0, 1)),
    **dict.fromkeys(("hidden_act", "activation", "activation_function", "rope_type", "type"), STRING),
    **dict.fromkeys(("architectures", "layer_types"), STRINGS),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), TABLE),
    **dict.fromkeys(("multi_query", "parallel_attn", "new_decoder_architecture", "use_sliding_window", "truncate"),
                    SWITCH),
    **dict.fromkeys(("rotary_pct", "partial_rotary_factor"), number(1e-6, 1)),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "score_std"), number(1e-12, 1e15)),
    "factor": number(1e-6, 1e6),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale",
                     "mscale_all_dim", "attention_factor"), number(0, 1e6)),
    "score_mean": number(-1e15, 1e15), TRAINED: whole(1, LARGEST["max_positions"]),
    **dict.fromkeys(("n_inner", "ffn_hidden_size"), whole(1, LARGEST["mlp_width"])),
    "num_kv_heads": whole(1, LARGEST["kv_heads"]), "num_ln_in_parallel_attn": whole(1, 2),
    "max_window_layers": whole(0, 2**24),
}


def find_folder(path: str | Path) -> Path:
    """The folder of a model or an adapter; one line if there is none, whatever is looked for in it."""
    path = Path(path)
    if path.suffix == ".gguf":
        fail(f"{path}: is a GGUF file: python -m data.gguf {path} out=FOLDER makes a model of it")
    if not os.path.isdir(path):
        hub = len(path.parts) == 2 and not os.path.exists(path.parent)
        fail(f"{path}: no such folder, expected a checkpoint's" + hub * (
            f"; one of the Hugging Face hub is fetched first: `hf download {path} --local-dir {path.name}`"))
    return path


def read_config(path: str | Path) -> ModelConfig:
    """config.json of a Hugging Face model directory; what we could not compute faithfully is refused in one line."""
    file = find_folder(path) / "config.json"
    if not file.is_file():
        fail(f"{file.parent}: holds no config.json, expected a Hugging Face model directory")
    read = read_json(file)
    _refuse_quantised(file, read)
    raw = Checked(file, _rename(file, read), KINDS)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        fail(f"{file}: model_type {shown(family)} is not supported, expected one of {', '.join(FAMILIES)}")
    _refuse_switches(file, raw, FAMILIES[family])
    fields = _read_fields(file, raw, FAMILIES[family])
    named = "dtype" if raw.get("dtype") else "torch_dtype"
    dtype = raw.get(named) or "float32"
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        fail(f"{file}: {named} is {shown(dtype)}, expected 'float32', 'bfloat16' or 'float16'")
    fields |= _read_windows(file, raw, family, fields) | _read_rotary(file, raw, family, fields)
    scored = (raw.get("architectures") or [""])[0].endswith("ForSequenceClassification")
    config = ModelConfig(
        **fields | {"norm_eps": float(fields["norm_eps"])}, family=family, scored=scored, dtype=dtype, raw=dict(raw),
        score_mean=float(raw.get("score_mean") or 0), score_std=float(raw.get("score_std") or 1))
    try:
        finite = rotary_frequencies(config).isfinite().all()
    except (ValueError, ArithmeticError):  # of YaRN's logarithms
        finite = False
    if not finite:
        fail(f"{file}: rope_scaling and rope_theta give rotary frequencies that are not finite: copy the file again")
    return config


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
        said, old = raw.get("hidden_act", "gelu"), raw.get("hidden_activation")
        meant = "gelu_pytorch_tanh" if said == "gelu" else said
        if old is not None and ACTIVATION_NAMES.get(str(old)) != ACTIVATION_NAMES.get(str(meant)):
            fail(f"{file}: hidden_activation is {old!r} but hidden_act {said!r}: delete the one that is wrong")
        raw = raw | {"hidden_act": meant}
    return raw


def _refuse_switches(file: Path, raw: dict, family: Family) -> None:
    """Keys that are understood with neutral values alone, and Falcons that no class of transformers computes."""
    for key, harmless in (ONLY | family.only).items():
        if key in raw and key not in family.keys.values() and raw[key] not in harmless:
            fail(f"{file}: {key} is {json.dumps(raw[key])[:80]}, which is not supported: the model would compute "
                 "something else")
    if family.name == "Falcon":
        new, norms = raw.get("new_decoder_architecture"), raw.get("num_ln_in_parallel_attn")
        if (new and not raw.get("parallel_attn", True)) or (norms == 2 and not new and raw.get("parallel_attn", True)):
            fail(f"{file}: new_decoder_architecture is {json.dumps(bool(new))}, which does not go with parallel_attn "
                 "or num_ln_in_parallel_attn as given: transformers cannot run it either")


def _read_fields(file: Path, raw: Checked, family: Family) -> dict:
    """The fields of ModelConfig that KEYS and the family name, sizes, switches and activation checked."""
    fields = FIELDS | family.fields
    keys = KEYS | family.keys
    for name, key in keys.items():
        if callable(key):
            with suppress(KeyError, TypeError):  # what it needs is missing, or of the wrong kind
                fields[name] = key(raw)
        elif key in raw:
            fields[name] = raw.need(key) if name in ("norm_eps", "activation", "rotary") else raw[key]
        if name in ("kv_heads", "head_dim") and fields.get(name) is None:
            fields[name] = fields["heads"] if name == "kv_heads" else fields["width"] // fields["heads"]
        no_window = name == "window" and fields.get(name) is None
        if name in LARGEST and not no_window:
            _check_size(file, name if callable(key) else key, fields.get(name), LARGEST[name])
        if isinstance(getattr(ModelConfig, name), bool):
            switch = fields.setdefault(name, getattr(ModelConfig, name))
            if not callable(key) and switch is not None and not SWITCH.fits(switch):
                fail(f"{file}: {key} is {shown(switch)}, expected {SWITCH.expected}: copy the file again")
            fields[name] = bool(switch)
    fields.setdefault("head_dim", fields["width"] // fields["heads"])
    _check_size(file, "hidden_size / num_attention_heads", fields["head_dim"], LARGEST["head_dim"])
    if raw.get("head_dim") not in (None, fields["head_dim"]):
        fail(f"{file}: head_dim is {shown(raw['head_dim'])}, but this family has heads of {fields['head_dim']}")
    if fields["heads"] % fields["kv_heads"]:
        fail(f"{file}: {fields['kv_heads']} key/value heads do not divide {fields['heads']} heads: copy the file again")
    activation = ACTIVATION_NAMES.get(fields["activation"], fields["activation"])
    if activation not in ACTIVATIONS:
        fail(f"{file}: {keys['activation']} {shown(activation)} is not supported, expected one of "
             f"{', '.join(ACTIVATIONS)}")
    return fields | {"activation": activation}


def _check_size(file: Path, key: str, value, largest: int) -> None:
    kind = whole(1, largest)
    if not kind.fits(value):
        fail(f"{file}: {key} is {shown(value)}, expected {kind.expected}: copy the file again")


def _read_windows(file: Path, raw: Checked, family: str, fields: dict) -> dict:
    """Which layers have the sliding window: those that layer_types names, in Qwen else those from max_window_layers."""
    count, window = fields["layers"], fields.get("window")
    first = raw.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
    full, sliding = "full_attention", "sliding_attention"
    usual = [sliding if window is not None and layer >= first else full for layer in range(count)]
    types = raw.get("layer_types") or usual
    if types != usual and family not in ("mistral", "ministral", "qwen2", "qwen3"):
        fail(f"{file}: layer_types asks for other windows than family {family} has: copy the file again")
    if len(types) != count or any(kind not in (full, sliding) for kind in types):
        fail(f"{file}: layer_types is not {count} times '{full}' or '{sliding}', which alone are supported")
    if sliding in types and window is None:
        fail(f"{file}: layer_types names '{sliding}', but no sliding_window is in use")
    windowed = tuple(layer for layer in range(count) if types[layer] == sliding)
    return {"window": window if windowed else None, "window_layers": windowed if 0 < len(windowed) < count else None}


def _read_rotary(file: Path, raw: Checked, family: str, fields: dict) -> dict:
    """Base, rotating share and scaling: under rope_parameters since transformers 5, before under keys of their own."""
    place = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # transformers takes the first
    rope = Checked(file, raw.get(place) or {}, KINDS, f"{place}.")
    if fields.get("rotary") == 0:
        return {}
    if any(isinstance(value, dict) for value in rope.values()):
        fail(f"{file}: rotary positions are given by kind of layer ({shown(', '.join(rope))[1:-1]}), which is not "
             "supported")
    kind = " or ".join(sorted({rope[key] for key in ("rope_type", "type") if rope.get(key)})) or "default"
    if kind not in SCALINGS:
        remedy = " (it is none below max_position_embeddings: set it to null if no text is longer)"
        fail(f"{file}: rotary scaling {shown(kind)} is not supported, expected one of {', '.join(SCALINGS)}"
             f"{remedy if kind == 'dynamic' else ''}")
    theta = rope.get("rope_theta") or fields.get("rope_theta") or raw.get("rope_theta") or 10000.0
    rotary = fields.get("rotary", 1.0)
    for given in (raw.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if "rotary" not in FAMILIES[family].keys and given not in (None, 1.0):
            fail(f"{file}: partial_rotary_factor is {given}, but all dimensions rotate in family {family}")
    if "rotary" in FAMILIES[family].keys:
        rotary = rope.get("partial_rotary_factor") or rotary
    return {"rope_theta": float(theta), "rotary": float(rotary),
            "rope_scaling": _read_scaling(raw, rope, kind, fields["max_positions"])}


def _read_scaling(raw: Checked, rope: Checked, kind: str, max_positions: int) -> dict | None:
    """The numbers of a scaling, what the file leaves out filled in as transformers does."""
    if kind == "default":
        return None
    trained = raw.get(TRAINED) or rope.get(TRAINED) or max_positions
    factor = rope.get("factor") or (max_positions / trained if kind == "yarn" else rope.need("factor"))
    found = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        found[TRAINED] = trained
    if kind == "llama3":
        found |= {key: rope.need(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        if not (above and below):
            above, below = 1.0, 0.0
        growth = 0.1 * math.log(max(factor, 1))  # Peng et al. 2023, arXiv:2309.00071, section 3.4
        usual, given = (above * growth + 1) / (below * growth + 1), rope.get("attention_factor")
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
    if config.rotary:  # transformers 4 knows no rope_parameters; 5 takes rope_scaling before them
        scaling = config.raw.get("rope_scaling") or {}
        ours["rope_scaling"] = scaling | (config.rope_scaling or {}) or None
        if "rope_theta" not in family.keys:
            ours["rope_theta"] = config.rope_theta
    if config.scored:  # transformers reads the score at the last token before the padding: that must not be EOS
        pad = config.raw.get("pad_token_id")
        pad = 0 if pad is None or pad == config.raw.get("eos_token_id") else pad
        ours |= {"num_labels": 1, "pad_token_id": pad, "score_mean": config.score_mean, "score_std": config.score_std}
    return {key: value for key, value in (config.raw | ours).items() if key != "auto_map"}  # its code stays behind
