"""Every key of every family's config.json: used, ignored for a reason that stands here, or refused.

    WRITE=1 python -m pytest tests/test_config_keys.py     the list, to benchmarks/results/config_keys.md

fixtures/config_keys.json holds the keys and defaults of transformers' configuration classes. Each key is given another
value than its default, alone and in the company that makes it matter (COMPANY), and read_config has to say what becomes
of it: another ModelConfig, the same, or one line that names the key.
"""
import json
import os
from dataclasses import fields, replace

import pytest
from conftest import FIXTURES, ROOT, exits

import sft
from benchmarks.results import table
from families import FAMILIES, read_config
from model import ModelConfig

CLASSES = json.loads((FIXTURES / "config_keys.json").read_text())  # of two versions: family: key: default
RESULT = ROOT / "benchmarks" / "results" / "config_keys.md"
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "n_embd", "n_layer", "n_head"}  # a file without them is broken

DROPOUT = "dropout while training: replies and losses are computed without"
TASK = "of tasks that no model here has"
OUTPUT = "which outputs transformers returns"
TEXT = "of the tokenizer, which has its own files"
IGNORED = dict.fromkeys(("attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop",
                         "embd_pdrop", "attn_pdrop", "classifier_dropout"), DROPOUT)
IGNORED |= dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
                          "task_specific_params"), "labels of a classifier: a score head's shape tells how many")
IGNORED |= dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict", "torchscript"), OUTPUT)
IGNORED |= dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id", "tokenizer_class", "prefix"), TEXT)
IGNORED |= {
    "pad_token_id": "of the tokenizer; written anew with a score head, whose place transformers finds by it",
    "decoder_start_token_id": TASK, "tie_encoder_decoder": TASK, "cross_attention_hidden_size": TASK,
    "is_decoder": "a decoder's attention is causal in these classes either way",
    "initializer_range": "of new weights: a checkpoint brings its own",
    "use_cache": "sampling has a cache, training none",
    "chunk_size_feed_forward": "the same products in several parts",
    "pretraining_tp": "the same products in several parts",
    "attention_softmax_in_fp32": "rounding alone: softmax is in fp32 here",
    "scale_attention_softmax_in_fp32": "rounding alone",
    "transformers_version": "who wrote the file",
}
SCALING = {"rope_type": "linear", "factor": 2.0}
OTHER = {  # another value, where doubling a number and turning a switch will not do
    "rope_parameters": SCALING | {"rope_theta": 5e5}, "rope_scaling": SCALING, "head_dim": 16, "n_inner": 16,
    "num_key_value_heads": 1, "num_kv_heads": 1, "ffn_hidden_size": 16, "num_ln_in_parallel_attn": 1,
    "use_bidirectional_attention": True, "pruned_heads": {"0": [1]}, "architectures": ["AForSequenceClassification"],
    "dtype": "bfloat16", "activation": "silu", "activation_function": "silu", "hidden_activation": "silu",
    "rotary_pct": 0.5, "max_window_layers": 1, "sliding_window": 64,
}
FALCON_40B = {"new_decoder_architecture": True}
COMPANY = {  # other keys, with which some have an effect that they do not have alone
    "qwen2": [{"use_sliding_window": True}], "qwen3": [{"use_sliding_window": True}], "falcon": [FALCON_40B],
}
PAIRS = [(version, family) for version in CLASSES for family in CLASSES[version]]


def changed(family: str, key: str, default):
    if key == "hidden_act":
        return "gelu" if default == "silu" else "silu"
    if key == "layer_types":
        layers = CLASSES["5.23.0"][family]["num_hidden_layers"]
        return ["sliding_attention"] + ["full_attention"] * (layers - 1)
    if key in OTHER:
        return OTHER[key]
    if isinstance(default, bool):
        return not default
    return 2 * default or 2 if isinstance(default, int | float) else "other"


def read(folder, raw: dict) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return replace(read_config(folder), raw={})


def became(folder, capsys, version: str, family: str, key: str) -> tuple[str, list[str]]:
    """"used", with the fields of ModelConfig that changed, "refused" or "ignored": the first that is so somewhere."""
    defaults, refused = CLASSES[version][family], False
    for company in [{}, *COMPANY.get(family, [])]:
        raw = defaults | {"model_type": family} | company
        before = read(folder, raw)
        try:
            after = read(folder, raw | {key: changed(family, key, defaults[key])})
        except SystemExit as left:
            said = capsys.readouterr().err
            assert left.code == 2 and key in said and len(said.splitlines()) == 1, said
            refused = True
            continue
        differ = [f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)]
        if differ:
            return "used", differ
    return "refused" if refused else "ignored", []


@pytest.mark.parametrize("version, family", PAIRS)
def test_a_key_that_is_not_used_is_refused_or_has_a_reason_to_be_ignored(version, family, tmp_path, capsys):
    found = {key: became(tmp_path, capsys, version, family, key)[0] for key in CLASSES[version][family]}
    assert {key for key, what in found.items() if what == "ignored"} == set(found) & set(IGNORED)


@pytest.mark.parametrize("version, family", PAIRS)
def test_a_missing_key_has_the_default_of_the_class(version, family, tmp_path, capsys):
    """In either version; the sizes alone have to be there."""
    defaults = CLASSES[version][family]
    for company in [{}, *COMPANY.get(family, [])]:
        raw = defaults | {"model_type": family} | company
        whole = read(tmp_path, raw)
        for key in set(defaults) - SIZES - set(company):
            assert read(tmp_path, {k: v for k, v in raw.items() if k != key}) == whole, key


def test_the_list_of_keys_is_as_committed(tmp_path, capsys):
    rows: dict[tuple, dict] = {}
    for version, family in reversed(PAIRS):  # the newer version's default, where both know the key
        for key, default in CLASSES[version][family].items():
            what, where = became(tmp_path, capsys, version, family, key)
            text = {"used": f"used: {', '.join(where)}", "ignored": f"ignored: {IGNORED.get(key)}",
                    "refused": f"refused, such as {json.dumps(changed(family, key, default))}"}[what]
            rows.setdefault((family, key), {"family": family, "key": key})
            rows[family, key] |= {"default": json.dumps(default), "what becomes of it": text}
    order = sorted(rows, key=lambda row: (list(FAMILIES).index(row[0]), row[1]))
    lines = table((rows[row] for row in order), {})
    text = ("# Keys of config.json\n\nThe keys of each family's configuration class in transformers "
            f"({', '.join(CLASSES)}), with their defaults, and what becomes of another value. Of other keys, those "
            "that `ONLY` in families.py names are refused; the rest are ignored, as in transformers.\n\n"
            f"`WRITE=1 python -m pytest tests/test_config_keys.py`\n\n{lines}\n")
    if "WRITE" in os.environ:
        RESULT.write_text(text)
    assert RESULT.read_text() == text


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "dynamic", "longrope", "proportional", "ntk"])
def test_a_rotary_scaling_is_computed_or_refused_by_name(kind, tmp_path, capsys):
    """All kinds that transformers 5.23 has, and one that it has not."""
    rope = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024}
    raw = CLASSES["5.23.0"]["llama"] | {"model_type": "llama", "rope_parameters": rope}
    if kind in ("linear", "yarn", "llama3"):
        assert read(tmp_path, raw).rope_scaling["rope_type"] == kind
    else:
        exits(capsys, lambda: read(tmp_path, raw), f"rotary scaling '{kind}' is not supported")


@pytest.mark.parametrize("family, changes, said", [
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by kind of layer (full_attention)"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "'linear or yarn'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor is 0.5"),
    ("llama", {"layer_types": ["sliding_attention"] * 32, "sliding_window": 8}, "layer_types asks for other windows"),
    ("qwen2", {"layer_types": ["full_attention"] * 31}, "layer_types is not 32 times"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 32}, "layer_types is not 32 times"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "no sliding_window is in use"),
    ("mistral", {"attention_bias": True}, "attention_bias is true"), ("qwen3", {"mlp_bias": True}, "mlp_bias is true"),
    ("gemma", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ("gemma", {"hidden_act": "quick_gelu"}, "'quick_gelu' is not supported"),
    ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "does not go with parallel_attn"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("falcon", {"bias": "false"}, "bias is 'false', expected true or false"),
    ("falcon", {"head_dim": 32}, "head_dim is 32"), ("starcoder2", {"norm_type": "rms_norm"}, "norm_type is"),
    ("gpt_bigcode", {"add_cross_attention": True}, "add_cross_attention is true"),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 1.5}},
     "rope_parameters.partial_rotary_factor is 1.5, expected"),
    ("llama", {"rope_theta": -1.0}, "rope_theta is -1.0, expected a number"),
    ("llama", {"is_causal": False}, "is_causal is false"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq, says quantization_config)"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "(awq,"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "(fp8,"),
    ("llama", {"quantization_config": {"load_in_4bit": True}}, "(bitsandbytes,"),
    ("llama", {"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors,"),
    ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "says quantization)"),
])
def test_a_dry_run_refuses_from_config_json_alone(family, changes, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CLASSES["5.23.0"][family] | {"model_type": family} | changes))
    exits(capsys, lambda: sft.main(sft.Config(model=str(tmp_path), dry_run=True)), str(tmp_path / "config.json"), said)


@pytest.mark.parametrize("name, method", [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_old_quantised_folders_are_known_by_a_file_beside_config_json(name, method, tmp_path, capsys):
    (tmp_path / name).write_text('{"bits": 4}')
    raw = CLASSES["5.23.0"]["llama"] | {"model_type": "llama"}
    exits(capsys, lambda: read(tmp_path, raw), f"quantised ({method}, says {name})", "original 16-bit weights")


def test_keys_that_no_class_knows_and_neutral_values_change_nothing(tmp_path):
    raw = CLASSES["5.23.0"]["llama"] | {"model_type": "llama"}
    extra = {"unsloth_version": "2025.1", "alibi": False, "mlp_bias": False, "pruned_heads": {}, "logit_scale": 1,
             "quantization_config": None, "rope_scaling": {"type": "default"}, "layer_types": ["full_attention"] * 32,
             "partial_rotary_factor": 1.0, "sliding_window": 4096, "auto_map": {"AutoConfig": "configuration.Mine"}}
    assert read(tmp_path, raw | extra) == read(tmp_path, raw)
