"""Hugging Face directories in and out: bits and names, memory, and what a broken one is told."""
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, FAMILIES, FIXTURES, ROOT, exits, small_model
from safetensors.torch import load_file, save_file

from checkpoints import BUFFERS, load_model, open_model, read_shards, save_model
from model import ModelConfig, Transformer


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_checkpoint_holds_the_published_names_shapes_and_bits(name, tmp_path):
    """Fused matrices are fused again; only buffers that a forward pass computes are left out. It loads as it was."""
    folder = FIXTURES / "models" / name
    model = load_model(folder)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.config.window == model.config.window and again.config.rope_scaling == model.config.rope_scaling
    ours = load_file(tmp_path / "m" / "model.safetensors")
    theirs = {key: tensor for file in folder.glob("model*.safetensors") for key, tensor in load_file(file).items()}
    theirs = {key: tensor for key, tensor in theirs.items() if not key.endswith(BUFFERS)}
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "m"))
    written = {"torch_dtype": "float32"} if "torch_dtype" in before else {}
    assert {key: after[key] for key in before} == before | written


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_config_reads_back_and_says_all_under_old_names_and_new(name, tmp_path):
    """transformers 4 looks under the old ones; that both versions compute the same was tried by hand."""
    model = load_model(FIXTURES / "configs" / name)
    save_model(model, tmp_path / "m")
    again, written = load_model(tmp_path / "m"), json.loads((tmp_path / "m" / "config.json").read_text())
    assert replace(again.config, raw={}) == replace(model.config, raw={})
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(old))
    assert replace(load_model(tmp_path / "m").config, raw={}) == replace(model.config, raw={})


def test_what_is_written_has_names_that_transformers_knows(tmp_path):
    """Not ours for activations; the dtype in both places; no code of its own, which stays behind."""
    folder = shutil.copytree(FIXTURES / "configs" / "gemma_gelu", tmp_path / "gemma")
    edit_config(auto_map={"AutoConfig": "mine.Config"})(folder)
    save_model(load_model(folder), tmp_path / "m", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["hidden_act"] == "gelu_pytorch_tanh" and "auto_map" not in written
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name, kind, renamed", [
    ("falcon7b", "RefinedWebModel", {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}),
    ("falcon40b", "RefinedWeb", {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                                 "num_kv_heads": "n_head_kv", "new_decoder_architecture": "gone"}),
])
def test_falcon_as_first_published_is_falcon(name, kind, renamed, tmp_path, capsys):
    folder = shutil.copytree(FIXTURES / "models" / name, tmp_path / name)
    raw = {renamed.get(key, key): value for key, value in json.loads((folder / "config.json").read_text()).items()}
    raw.pop("gone", None)
    code = {"model_type": kind, "architectures": ["RWForCausalLM"], "auto_map": {"AutoConfig": "configuration_RW.RW"}}
    (folder / "config.json").write_text(json.dumps(raw | code))
    model, expected = load_model(folder), load_file(folder / "expected.safetensors")
    assert (model(expected["full.input_ids"]) - expected["full.logits"]).abs().max() < 2e-4
    save_model(model, tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["model_type"] == "falcon" and written["architectures"] == ["FalconForCausalLM"]
    assert written["num_hidden_layers"] == 2 and "auto_map" not in written and "n_layer" not in written


def test_code_that_a_checkpoint_names_is_said_not_to_run(tmp_path, capsys):
    save_model(small_model(dtype=torch.float32), tmp_path)
    load_model(tmp_path)
    assert capsys.readouterr().out == ""
    edit_config(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})(tmp_path)
    load_model(tmp_path)
    assert "auto_map" in capsys.readouterr().out


def test_shards_hold_the_same_model_and_an_index(tmp_path):
    model = small_model(dtype=torch.float32)
    save_model(model, tmp_path, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model(tmp_path).parameters(), strict=True))


def test_a_tied_model_keeps_one_matrix(tmp_path):
    model = small_model(tied=True)
    save_model(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load_model(tmp_path).head_weight is not None


def test_weights_can_be_cast_on_the_way_in_and_out(tmp_path):
    save_model(small_model(dtype=torch.float32), tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path).embed_tokens.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).embed_tokens.weight.dtype == torch.float32


def broken(tmp_path, change):
    save_model(small_model(dtype=torch.float32), tmp_path)
    change(tmp_path)
    return lambda: load_model(tmp_path)


def edit_config(**changes):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
    return change


def drop_a_tensor(path):
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")


def add_a_tensor(path):
    tensors = load_file(path / "model.safetensors") | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}
    save_file(tensors, path / "model.safetensors")


def quantise_a_tensor(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, path / "model.safetensors")


def spoil_a_tensor(value):
    def change(path):
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 1] = value
        save_file(tensors, path / "model.safetensors")
    return change


def tie(path):
    """The head stays in the file, other than the embedding."""
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path / "model.safetensors")
    edit_config(tie_word_embeddings=True)(path)


def cut_short(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-500])


def only_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize("change, said", [
    (lambda p: (p / "config.json").unlink(), "holds no config.json"),
    (lambda p: (p / "config.json").write_text("{"), "is not JSON"),
    (edit_config(model_type="rwkv"), "model_type 'rwkv' is not supported, expected one of llama, mistral"),
    (edit_config(model_type=["llama"]), "model_type ['llama'] is not supported"),
    (edit_config(model_type="mistral", sliding_window="4"), "sliding_window is '4', expected a whole number from 1 to"),
    (lambda p: (p / "config.json").write_text("[1]"), "holds a list, expected a JSON object"),
    (edit_config(hidden_size=-3), "hidden_size is -3, expected a whole number from 1 to"),
    (edit_config(head_dim="16"), "head_dim is '16', expected a whole number"),
    (edit_config(rms_norm_eps="small"), "rms_norm_eps is 'small', expected a number from 0 to 1"),
    (edit_config(rms_norm_eps=float("nan")), "rms_norm_eps is nan, expected a number from 0 to 1"),
    (edit_config(rms_norm_eps=None), "has no rms_norm_eps"),
    (edit_config(num_attention_heads=4096, num_key_value_heads=4096, head_dim=None), "head_dim is 0, expected a whole"),
    (edit_config(architectures="LlamaForCausalLM"), "architectures is 'LlamaForCausalLM', expected a list of texts"),
    (edit_config(rope_scaling=[1]), "rope_scaling is [1], expected a JSON object"),
    (edit_config(rope_scaling={"type": 1}), "rope_scaling.type is 1, expected text"),
    (edit_config(score_std=float("inf")), "score_std is inf, expected a number from"),
    (lambda p: (p / "config.json").write_text("[" * 100_000), "config.json: is not JSON"),
    (lambda p: (p / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"), "config.json: is not JSON"),
    (lambda p: (p / "config.json").write_text('{"model_type": "a\\ud800"}'), "config.json: is not JSON"),
    (edit_config(hidden_size=10**400), "hidden_size is 1000"),
    (lambda p: (p / "model.safetensors.index.json").write_text("[" * 100_000), "index.json: is not JSON"),
    (lambda p: (p / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}})),
     "is not an index of safetensors"),
    (spoil_a_tensor(float("nan")), "model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
    (spoil_a_tensor(float("-inf")), "model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
    (edit_config(rope_scaling={"rope_type": "llama3"}), "has no rope_scaling.factor"),
    (edit_config(torch_dtype="int3"), "torch_dtype is 'int3'"),
    (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "is not an index of safetensors"),
    (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
     "gone.safetensors: no such file"),
    (lambda p: save_model(small_model(), p / "x", shard_bytes=4000) or [
        file.rename(p / file.name) for file in (p / "x").glob("model*")],
     "other files than model.safetensors beside it: delete what is out of date"),
    (edit_config(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
    (edit_config(vocab_size="forty"), "vocab_size is 'forty'"),
    (edit_config(num_key_value_heads=3), "3 key/value heads do not divide 4 heads"),
    (edit_config(intermediate_size=25), "has shape [16, 24], config.json says [16, 25]"),
    (edit_config(rope_scaling={"type": "longrope"}), "rotary scaling 'longrope' is not supported"),
    (edit_config(rope_scaling={"type": "dynamic", "factor": 2.0}), "set it to null if no text is longer"),
    (edit_config(rope_scaling={"type": "yarn", "factor": "2"}), "rope_scaling.factor is '2', expected a number"),
    (edit_config(rope_scaling="linear"), "rope_scaling is 'linear', expected a JSON object"),
    (edit_config(hidden_act="relu"), "hidden_act 'relu' is not supported"),
    (edit_config(hidden_act=["silu"]), "hidden_act is ['silu'], expected text"),
    (edit_config(attention_bias=True), "k_proj.bias is in none of its weight files"),
    (add_a_tensor, "holds model.layers.0.self_attn.q_proj.bias, which family llama has no place for"),
    (lambda p: (p / "model.safetensors").unlink(), "no such file"),
    (only_pickle, "pickled weights, which are never opened"),
    (cut_short, "cannot be read as safetensors"),
    (quantise_a_tensor, "model.layers.1.mlp.up_proj.weight is stored as I8, as quantised weights are"),
    (tie, "lm_head.weight is not the embedding, but tie_word_embeddings is true"),
    (drop_a_tensor, "model.layers.1.mlp.up_proj.weight is in none of its weight files (1 missing)"),
])
def test_a_broken_checkpoint_is_one_line(change, said, tmp_path, capsys):
    exits(capsys, broken(tmp_path, change), str(tmp_path), said)


@pytest.mark.parametrize("change, said", [(tie, "lm_head.weight is not the embedding"),
                                          (spoil_a_tensor(float("nan")), "up_proj.weight holds NaN or infinity")])
def test_what_is_read_by_slices_is_checked_as_what_is_read_whole(change, said, tmp_path, capsys):
    save_model(small_model(dtype=torch.float32), tmp_path)
    whole, sliced = load_model(tmp_path), read_shards(open_model(tmp_path), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sliced.parameters(), strict=True))
    change(tmp_path)
    exits(capsys, lambda: load_model(tmp_path), str(tmp_path), said)
    exits(capsys, lambda: read_shards(open_model(tmp_path), torch.device("cpu")), str(tmp_path), said)


LOAD = """
import sys
from pathlib import Path
from checkpoints import load_model
from model import ModelConfig, Transformer
import torch

def resident(key):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

torch.set_num_threads(1)
with torch.device("meta"):
    Transformer(ModelConfig())  # what torch imports at the first use is not the model's
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
model = load_model(sys.argv[1])
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_peaks_below_1_15_times_the_weights(tmp_path):
    """A process of its own, 160 MB in two shards; pages of the files count while they are mapped."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(width=1024, layers=6, heads=8, kv_heads=8, head_dim=128, mlp_width=3072))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.zeros(parameter.shape, dtype=torch.bfloat16)))
    weights = sum(p.nbytes for p in model.parameters())
    save_model(model, tmp_path / "m", shard_bytes=weights // 2 + 10**6)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "m")]
    peak = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert 0.9 < peak / weights < 1.15
