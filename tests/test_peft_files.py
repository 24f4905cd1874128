"""PEFT's adapters: what their files say, put on a model, written again. The numbers are PEFT's (reference/adapters)."""
import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, exits, reference, small_model
from safetensors.torch import load_file, save_file

import lora
import peft_files
from checkpoints import load_model, save_model
from data.tokenizer import load_tokenizer
from kernels.layout import Layout
from lora import add_lora, merge_lora, quantize_base, save_adapter
from model import add_score_head, generate
from peft_files import by_pattern, is_saved, is_target

SAID, ARRAYS = reference("adapters")
CONFIGS = SAID["configs"]
REAL = Path(os.environ.get("REAL_DATA", "")) / "cases" / "models" / "peft-ignored"


def written(name: str, folder: Path, tensors: dict | None = None, **changes) -> Path:
    """PEFT's adapter `name` as a folder, its configuration and tensors changed."""
    folder.mkdir(exist_ok=True)
    held = {key.removeprefix(f"{name}/"): x for key, x in ARRAYS.items() if key.startswith(f"{name}/base_model")}
    held = {key: x for key, x in (held | (tensors or {})).items() if x is not None}
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIGS[name] | changes))
    return folder


def base_of(name: str):
    model = load_model(FIXTURES / "models" / CONFIGS[name]["base_model_name_or_path"], dtype=torch.float32)
    return add_score_head(model, 0) if CONFIGS[name]["task_type"] == "SEQ_CLS" else model


def answers(model, ids):
    with torch.no_grad():
        return model.score(ids)[:, None] if model.config.scored else model(ids)[:, -2:]


# ------------------------------------------------------------------------------- what PEFT computes

@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_computes_what_peft_computes_and_off_it_is_the_base(name, tmp_path):
    """The effect of each is 5 to 110 logits."""
    ids, expected = ARRAYS[f"{name}/input_ids"], ARRAYS[f"{name}/logits"]
    model = base_of(name)
    seen = ids.clamp(max=model.config.vocab_size - 1)  # not the tokens that an adapter adds
    before = answers(model, seen)
    lora.load_adapter(model, written(name, tmp_path / "a"))
    torch.testing.assert_close(answers(model, ids), expected, atol=2e-4, rtol=2e-5)
    if not model.config.scored:
        with lora.adapter(model, None):
            assert torch.equal(answers(model, seen)[..., : before.shape[-1]], before)
    torch.testing.assert_close(answers(model, ids), expected, atol=2e-4, rtol=2e-5)
    for place, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapters." in place or place.startswith("score_head"))


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"reward"}))
def test_on_a_base_of_16_bits_it_computes_the_same_but_for_rounding(name, tmp_path):
    ids, model = ARRAYS[f"{name}/input_ids"], base_of(name).to(torch.bfloat16)
    model.compute_dtype = torch.float32
    before = answers(model, ids.clamp(max=model.config.vocab_size - 1))
    lora.load_adapter(model, written(name, tmp_path / "a"))
    said, expected = answers(model, ids), ARRAYS[f"{name}/logits"]
    effect = (said[..., : before.shape[-1]] - before).square().mean().sqrt()
    assert (said - expected).square().mean().sqrt() < 0.06 * effect  # a part that is dropped costs about all of it


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_loaded_and_saved_again_is_equal(name, tmp_path):
    ids, model = ARRAYS[f"{name}/input_ids"], base_of(name)
    lora.load_adapter(model, written(name, tmp_path / "a"))
    add_lora(model, 2, 4, name="another")
    save_adapter(model, tmp_path / "again")
    theirs, ours = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("a", "again"))
    if CONFIGS[name]["modules_to_save"] and "score" in CONFIGS[name]["modules_to_save"]:
        theirs["base_model.model.score.weight"] = theirs["base_model.model.score.weight"].float()
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key].to(ours[key])) for key in theirs)
    saved, patterns = json.loads((tmp_path / "again" / "adapter_config.json").read_text()), ("rank_pattern",
                                                                                            "alpha_pattern")
    assert {k: v for k, v in saved.items() if k not in patterns} == {
        k: v for k, v in CONFIGS[name].items() if k not in patterns}
    for key in ours:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if key.endswith(".lora_A.weight"):
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
                assert by_pattern(saved[pattern], module, saved[default]) == by_pattern(
                    CONFIGS[name][pattern], module, CONFIGS[name][default])
    again = lora.load_adapter(base_of(name), tmp_path / "again")
    lora.switch(model, "default")
    assert torch.equal(answers(again, ids), answers(model, ids))


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"lora_biases"}))
def test_a_merged_adapter_computes_the_same_also_from_disk(name, tmp_path):
    ids, model = ARRAYS[f"{name}/input_ids"], base_of(name)
    lora.load_adapter(model, written(name, tmp_path / "a"))
    add_lora(model, 2, 4, name="another")  # which is on, and must not matter
    save_model(merge_lora(model), tmp_path / "merged")
    for merged in (model, load_model(tmp_path / "merged")):
        torch.testing.assert_close(answers(merged, ids), ARRAYS[f"{name}/logits"], atol=5e-4, rtol=5e-5)


def test_a_bias_that_the_base_has_no_place_for_is_not_merged(tmp_path):
    model = lora.load_adapter(base_of("lora_biases"), written("lora_biases", tmp_path / "a"))
    with pytest.raises(ValueError, match="a bias that the base does not have"):
        merge_lora(model)
    ids = ARRAYS["lora_biases/input_ids"]
    torch.testing.assert_close(answers(model, ids), ARRAYS["lora_biases/logits"], atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("case", ["alpha_pattern_full", "bias_all", "bias_lora_only", "olora", "save_final_norm",
                                  "save_mlp", "target_embed"])
def test_the_cases_after_public_reports_compute_what_peft_computes(case):
    if not (REAL / case).is_dir():
        pytest.skip("needs REAL_DATA")
    told = load_file(REAL / case / "expected.safetensors")
    model = load_model(REAL / (REAL / case / "BASE").read_text().strip(), dtype=torch.float32)
    lora.load_adapter(model, REAL / case)
    with torch.no_grad():
        assert (model(told["input_ids"]) - told["logits"]).abs().max() < 1e-3


@pytest.mark.parametrize("case, kind", [("adalora", "ADALORA"), ("ia3", "IA3")])
def test_the_cases_of_other_methods_are_refused(case, kind, capsys):
    if not (REAL / case).is_dir():
        pytest.skip("needs REAL_DATA")
    exits(capsys, lambda: lora.load_adapter(base_of("patterns"), REAL / case), f"peft_type is '{kind}'",
          "merge_and_unload")


# ------------------------------------------------------------------------------ targets and patterns

def test_targets_are_those_of_peft():
    """PEFT's rules by hand: last or full names, or a whole-name expression; then what is left out."""
    def config(**changes):
        return peft_files.DEFAULTS | changes

    q, head = "model.layers.1.self_attn.q_proj", "lm_head"
    for changes, name, expected in (
        ({"target_modules": ["q_proj"]}, q, True), ({"target_modules": ["proj"]}, q, False),
        ({"target_modules": ["self_attn.q_proj"]}, q, True), ({"target_modules": [q]}, q, True),
        ({"target_modules": r".*q_proj"}, q, True), ({"target_modules": r"layers.*q_proj"}, q, False),
        ({"target_modules": "all-linear"}, q, True), ({"target_modules": "all-linear"}, head, False),
        ({"target_modules": ["lm_head"]}, head, True), ({"target_modules": None}, q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, q, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, q, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"}, q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, q, True),
        ({"target_modules": [q], "layers_to_transform": [0]}, q, True),  # a full name is not asked for its layer
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, q, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, q, False),
        ({"target_modules": ["q_proj"], "exclude_modules": "q_proj"}, q, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, q, False),
    ):
        assert is_target(config(**changes), name, name == head) == expected, changes
    saved = config(modules_to_save=["norm"])  # PEFT compares ends of names, not whole words
    assert is_saved(saved, "model.layers.0.input_layernorm.weight") and is_saved(saved, "model.norm.weight")
    assert not is_saved(saved, "model.embed_tokens.weight")


def test_the_first_pattern_that_matches_the_end_of_the_name_counts():
    pattern = {"proj": 1, r"layers\.[01]\..*q_proj": 2, "q_proj": 3, "^model.layers.2.self_attn.v_proj": 4}
    for layer, name, expected in ((0, "q_proj", 2), (2, "q_proj", 3), (2, "v_proj", 4), (1, "v_proj", 9)):
        assert by_pattern(pattern, f"model.layers.{layer}.self_attn.{name}", 9) == expected


# --------------------------------------------------------------------------------- used or refused

def test_every_field_of_loraconfig_is_used_or_harmless_or_refused_by_name(tmp_path, capsys):
    told = json.loads((FIXTURES / "reference" / "lora_config.json").read_text())
    known = set(peft_files.USED) | peft_files.HARMLESS
    assert known - {"peft_type", "peft_version", "runtime_config"} <= set(told["fields"])
    for name, default in told["fields"].items():
        if name in peft_files.USED:
            assert peft_files.DEFAULTS[name] == default, name
        if name not in known:
            assert default in (None, False), name
            folder = written("one_layer", tmp_path / "a", **{name: {"something": 1}})
            exits(capsys, lambda folder=folder: lora.load_adapter(base_of("one_layer"), folder), f"json: {name} is")
    folder = written("one_layer", tmp_path / "a", of_next_year=True)
    exits(capsys, lambda: lora.load_adapter(base_of("one_layer"), folder), "of_next_year is true")
    lora.load_adapter(base_of("one_layer"), written("one_layer", tmp_path / "a", of_next_year=False))


def test_other_methods_are_one_line_each(tmp_path, capsys):
    kinds = json.loads((FIXTURES / "reference" / "lora_config.json").read_text())["kinds"]
    for kind in sorted(set(kinds) - {"LORA"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "task_type": "CAUSAL_LM"}))
        prompts = kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
        remedy = "train a plain LoRA" if prompts else ""
        exits(capsys, lambda: lora.load_adapter(small_model(), tmp_path), f"peft_type is '{kind}'", remedy)
    (tmp_path / "adapter_config.json").write_text("{}")
    exits(capsys, lambda: lora.load_adapter(small_model(), tmp_path), "peft_type is None")


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq"])
def test_starts_that_change_the_base_beyond_repeating_are_refused(start, tmp_path, capsys):
    folder = written("one_layer", tmp_path / "a", init_lora_weights=start)
    exits(capsys, lambda: lora.load_adapter(base_of("one_layer"), folder), start, "as a plain LoRA")


@pytest.mark.parametrize("changes", [
    {"r": "8"}, {"r": 0}, {"r": True}, {"lora_alpha": None}, {"lora_alpha": math.nan}, {"use_dora": "yes"},
    {"target_modules": 3}, {"target_modules": [1]}, {"target_modules": "(q_proj"}, {"modules_to_save": "norm"},
    {"rank_pattern": {"q_proj": 2.5}}, {"rank_pattern": ["q_proj"]}, {"alpha_pattern": {"*": 2}},
    {"layers_to_transform": "all"}, {"trainable_token_indices": [-1]}, {"lora_dropout": 2},
    {"trainable_token_indices": {"embed_tokens": "x"}}, {"init_lora_weights": 3}, {"exclude_modules": "["},
    {"r": 4_000_000_000}, {"lora_alpha": 10**400}, {"target_modules": "(" * 5000},
    {"exclude_modules": "a{99999999999}"},
])
def test_values_of_the_wrong_kind_are_one_line(changes, tmp_path, capsys):
    folder = written("one_layer", tmp_path / "a", **changes)
    said = f"adapter_config.json: {next(iter(changes))} "
    exits(capsys, lambda: lora.load_adapter(base_of("one_layer"), folder), said)


def test_a_rank_that_the_tensors_do_not_have_takes_no_memory(tmp_path, capsys, monkeypatch):
    """It is compared with what the file holds before anything of its size is made."""
    folder = written("one_layer", tmp_path / "a", r=60_000)
    monkeypatch.setattr("adapters.attach", lambda *_: pytest.fail("memory is taken"))
    exits(capsys, lambda: lora.load_adapter(base_of("one_layer"), folder), "expected [60000, 48]")


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("tensors, said", [
    ({f"{Q}.lora_B.weight": None}, f"has no {Q}.lora_B.weight"),
    ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, f"has no {Q}.lora_A.weight"),
    ({f"{Q}.lora_magnitude_vector": torch.ones(48)}, f"holds {Q}.lora_magnitude_vector"),
    ({f"{Q.replace('1', '0')}.lora_A.weight": torch.ones(2, 48)}, f"holds {Q.replace('1', '0')}.lora_A.weight"),
    ({f"{Q.replace('1', '7')}.weight": torch.ones(2, 48)}, f"holds {Q.replace('1', '7')}.weight"),
    ({"base_model.model.model.norm.weight": torch.ones(47)}, "norm.weight has shape [47], expected [48]"),
    ({f"{Q}.lora_A.weight": torch.ones(3, 48)}, "has shape [3, 48], expected [2, 48]"),
    ({f"{Q}.lora_A.weight": torch.full((2, 48), torch.nan)}, f"{Q}.lora_A.weight holds NaN or infinity"),
    ({f"{Q}.lora_A.weight": torch.full((2, 48), torch.inf)}, f"{Q}.lora_A.weight holds NaN or infinity"),
    ({f"{Q}.lora_A.weight": torch.ones(2, 48, dtype=torch.int8)}, "is of type torch.int8"),
    ({"model.layers.0.x": torch.ones(1)}, "holds model.layers.0.x, expected names that begin with base_model.model."),
    ({"base_model.model.model.embed_tokens.weight": torch.ones(300, 48)}, "300 rows, the base 360"),
    ({"base_model.model.model.embed_tokens.weight": torch.ones(370, 48)}, "370 rows, the base 360"),  # and the head?
    ({"base_model.model.score.weight": torch.ones(2, 48)}, "score.weight has shape [2, 48], expected [1, 48]"),
    ({"base_model.model.score.weight": torch.ones(1, 48)}, "holds a score head for a model without one"),
])
def test_a_file_is_refused_by_the_first_tensor_that_is_missing_or_not_used(tensors, said, tmp_path, capsys):
    folder = written("one_layer", tmp_path / "a", tensors)
    exits(capsys, lambda: lora.load_adapter(base_of("one_layer"), folder), str(folder), said)


def test_saved_modules_and_token_rows_have_to_be_whole(tmp_path, capsys):
    norm = written("regex", tmp_path / "a", {"base_model.model.model.norm.weight": None})
    exits(capsys, lambda: lora.load_adapter(base_of("regex"), norm), "has no base_model.model.model.norm.weight")
    rows = written("rows", tmp_path / "b", trainable_token_indices=[3, 9])
    exits(capsys, lambda: lora.load_adapter(base_of("rows"), rows), "trainable_tokens_delta has shape [3, 48]")
    rows = written("rows", tmp_path / "b", trainable_token_indices=[3, 9, 360])
    exits(capsys, lambda: lora.load_adapter(base_of("rows"), rows), "holds 360, the base has 360 rows")
    key = "base_model.model.model.embed_tokens.weight"
    apart = written("grown", tmp_path / "c", {key: ARRAYS[f"grown/{key}"] + 1})
    exits(capsys, lambda: lora.load_adapter(base_of("grown"), apart), "differ, expected two copies")


def test_files_that_cannot_be_read_are_one_line(tmp_path, capsys):
    folder = written("one_layer", tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    exits(capsys, lambda: lora.load_adapter(small_model(), folder), "pickled")
    (folder / "adapter_model.safetensors").write_bytes(b"<html>")
    exits(capsys, lambda: lora.load_adapter(small_model(), folder), "cannot be read")
    exits(capsys, lambda: lora.load_adapter(small_model(), tmp_path / "nowhere"), "nowhere: no such folder")
    for text in ("{", "[]", "[" * 100_000, '{"peft_type": "a\\ud800"}'):
        (folder / "adapter_config.json").write_text(text)
        exits(capsys, lambda: lora.load_adapter(small_model(), folder), "adapter_config.json")


def test_the_few_keys_of_an_old_adapter_are_enough(tmp_path):
    """As peft 0.2 wrote them."""
    folder = written("one_layer", tmp_path / "a")
    kept = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "layers_to_transform")
    old = {key: CONFIGS["one_layer"][key] for key in kept} | {"enable_lora": None, "merge_weights": False}
    (folder / "adapter_config.json").write_text(json.dumps(old))
    model, ids = lora.load_adapter(base_of("one_layer"), folder), ARRAYS["one_layer/input_ids"]
    torch.testing.assert_close(answers(model, ids), ARRAYS["one_layer/logits"], atol=2e-4, rtol=2e-5)


def test_an_adapter_trained_beside_one_that_made_the_vocabulary_grow_brings_the_rows_too(tmp_path):
    model = lora.load_adapter(base_of("grown"), written("grown", tmp_path / "a"))
    add_lora(model, 2, 4, name="another").lora_layers[0].adapters["another"].B.data.normal_()
    save_adapter(model, tmp_path / "b", "another")
    again, ids = lora.load_adapter(base_of("grown"), tmp_path / "b"), ARRAYS["grown/input_ids"]
    assert ids.max() == 364 and torch.equal(answers(again, ids), answers(model, ids))


# ---------------------------------------------------------------------- several roles, quantised bases

def test_what_an_adapter_has_of_its_own_does_not_reach_the_other_roles(tmp_path):
    """The reward model's embedding, head and final norm are its own, whichever role ran last."""
    folder = FIXTURES / "models" / "gemma"
    base = load_model(folder, dtype=torch.float32)
    made = torch.Generator().manual_seed(0)
    for layer in add_lora(base, 2, 4, name="policy").lora_layers:
        layer.adapters["policy"].B.data.normal_(generator=made)
    where = (torch.arange(3, 20), torch.arange(17), Layout.build([17]))
    policy, reference_role = lora.Role(base, "policy"), lora.Role(base, None)
    before = [(role.hidden(*where), role.logits(role.hidden(*where))) for role in (policy, reference_role)]
    said = [generate(role, [[2, 5, 9]], 8, seed=1)[0][0].tokens for role in (policy, reference_role)]
    norm = {"base_model.model.model.norm.weight": torch.full((32,), 0.5),
            "base_model.model.score.weight": torch.ones(1, 32)}
    saved = ["embed_tokens", "lm_head", "model.norm", "score"]
    reward = written("tied_saved_both", tmp_path / "r", norm, modules_to_save=saved)
    scorer = lora.load_role(base, reward, "reward")
    alone = load_model(folder, dtype=torch.float32)
    lora.load_role(alone, reward, "reward")
    for role, (hidden, logits), tokens in zip((policy, reference_role), before, said, strict=True):
        assert torch.equal(role.hidden(*where), hidden) and torch.equal(role.logits(hidden), logits)
        assert torch.equal(role.head_weight, load_model(folder, dtype=torch.float32).head_weight)
        assert generate(role, [[2, 5, 9]], 8, seed=1)[0][0].tokens == tokens
    assert torch.equal(scorer.hidden(*where), alone.hidden(*where))
    assert not torch.equal(scorer.hidden(*where), before[1][0])
    save_model(merge_lora(base, name="policy"), tmp_path / "merged")  # the reward model's head is not the policy's
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.tied
    torch.testing.assert_close(merged.logits(merged.hidden(*where)), before[0][1], atol=5e-4, rtol=5e-5)


def test_gradients_flow_through_the_parameters_of_the_forward_pass(tmp_path):
    """Also with checkpointing, and when by the time of the backward pass the adapter is off."""
    found = {}
    for checkpointing in (False, True):
        model = lora.load_adapter(base_of("lora_only"), written("lora_only", tmp_path / "a"))
        model.checkpointing = checkpointing
        hidden = model.hidden(torch.arange(3, 20), torch.arange(17), Layout.build([17]))
        expected = torch.autograd.grad(hidden.square().sum(), model.lora_layers[0].adapters["default"].B,
                                       retain_graph=not checkpointing)[0]
        if not checkpointing:
            lora.switch(model, None)
            again = torch.autograd.grad(hidden.square().sum(), model.lora_layers[0].adapters["default"].B)[0]
            assert torch.equal(again, expected)
        found[checkpointing] = expected
    torch.testing.assert_close(found[True], found[False])


def test_on_a_quantised_base_biases_norms_and_rows_are_its_own_and_weights_are_refused(tmp_path, capsys):
    for name in ("lora_only", "regex", "tied_rows", "embedding"):
        ids = ARRAYS[f"{name}/input_ids"]
        plain = lora.load_adapter(base_of(name), written(name, tmp_path / "a"))
        model = quantize_base(base_of(name), "int8")
        before = answers(model, ids)
        lora.load_adapter(model, tmp_path / "a")
        gap = (answers(model, ids) - answers(plain, ids)).abs().max()
        assert 0 < gap < 0.05 * (answers(plain, ids) - before).abs().max()
        merged = merge_lora(model, base_of(name))
        torch.testing.assert_close(answers(merged, ids), answers(plain, ids), atol=5e-4, rtol=5e-5)
    for name in ("pissa", "saved_attention"):
        folder = written(name, tmp_path / "b")
        quantised = quantize_base(base_of(name), "nf4") if name == "pissa" else quantize_base(base_of(name), "int8")
        exits(capsys, lambda model=quantised, folder=folder: lora.load_adapter(model, folder), "quantize=none")


# --------------------------------------------------------------------------------------- our own files

@pytest.mark.parametrize("family", ["falcon7b", "falcon40b", "gpt_bigcode", "gpt_neox"])
def test_magnitudes_of_queries_keys_and_values_are_saved_in_the_order_of_their_rows(family, tmp_path):
    """At the start DoRA's magnitudes are the norms of the rows of the matrix as the checkpoint has it."""
    folder, ids = FIXTURES / "models" / family, torch.randint(0, 300, (2, 9))
    model = add_lora(load_model(folder), 2, 4, use_dora=True)
    save_adapter(model, tmp_path / "a")
    weights = load_file(folder / "model.safetensors")
    for name, magnitude in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        if name.endswith("lora_magnitude_vector"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            torch.testing.assert_close(magnitude, weights[f"{layer}.weight"].float().norm(dim=1))
    for layer in model.lora_layers:
        layer.adapters["default"].B.data.normal_()
        layer.adapters["default"].magnitude.data.mul_(torch.rand(len(layer.adapters["default"].magnitude)) + 0.5)
    save_adapter(model, tmp_path / "a")
    again = lora.load_adapter(load_model(folder), tmp_path / "a")
    torch.testing.assert_close(again(ids), model(ids), atol=1e-4, rtol=1e-4)


def test_layers_called_alike_are_named_in_full(tmp_path):
    """StarCoder calls the attention's and the MLP's output c_proj; only one of them is adapted here."""
    folder, ids = FIXTURES / "models" / "gpt_bigcode", torch.randint(0, 300, (2, 9))
    model = add_lora(load_model(folder), 2, 4, targets=("o_proj",))
    for layer in model.lora_layers:
        layer.adapters["default"].B.data.normal_()
    save_adapter(model, tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    again = lora.load_adapter(load_model(folder), tmp_path / "a")
    assert torch.equal(again(ids), model(ids))
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        add_lora(again, 2, 4)
    with pytest.raises(ValueError, match="on all three or on none"):
        save_adapter(add_lora(load_model(folder), 2, 4, targets=("q_proj",)), tmp_path / "b")


@pytest.mark.parametrize("family", ["llama3", "falcon7b", "gpt_neox"])
def test_an_adapter_with_a_templates_tokens_brings_its_tokenizer_and_their_rows(family, tmp_path):
    from data.tokenizer import adopt_template

    folder, tokenizer = FIXTURES / "models" / family, load_tokenizer(FIXTURES / "models" / family)
    model = load_model(folder, dtype=torch.float32)
    adopt_template(model, tokenizer, "chatml")
    end = tokenizer.special["<|im_end|>"]
    save_adapter(add_lora(model, 2, 4), tmp_path / "a", tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "a").encode("a b") == tokenizer.encode("a b")
    assert load_tokenizer(tmp_path / "a").special["<|im_end|>"] == end
    again, ids = lora.load_adapter(load_model(folder, dtype=torch.float32), tmp_path / "a"), torch.tensor([[5, end, 9]])
    assert torch.equal(again(ids), model(ids))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    heads = {name for name in tensors if name.endswith(("lm_head.weight", "embed_out.weight"))}
    assert len(heads) == {"llama3": 1, "falcon7b": 0, "gpt_neox": 2}[family]  # NeoX's has two names
