import json
import math

import pytest
import torch
from conftest import FIXTURES, exits, reference, small_model
from safetensors.torch import load_file

import lora
import runtime
from checkpoints import load_model, save_model
from lora import Adapter, Int8Linear, LoraLinear, add_lora, merge_lora, named_lora_layers, quantize_base, save_adapter
from model import Linear, add_score_head

PEFT = FIXTURES / "models" / "llama2_lora"


def trained(model, seed=1):
    """An adapter that has moved away from zero."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in named_lora_layers(model).values():
            for found in layer.adapters.values():
                found.B.copy_(torch.randn(found.B.shape, generator=made))
    return model


# ------------------------------------------------------------------------------------ the equations

@pytest.mark.parametrize("name", ["lora_r4_a8", "rslora_r4_a8", "dora_r4_a8", "lora_r1_a16"])
def test_outputs_gradients_and_merges_equal_peft(name):
    numbers, arrays = reference("lora")
    told = numbers["cases"][name]
    case = {key.removeprefix(f"{name}."): x for key, x in arrays.items() if key.startswith(f"{name}.")}
    linear = Linear(16, 24, bias=True)
    linear.weight.data, linear.bias.data = case["W"], case["bias"]
    linear.requires_grad_(False)
    layer = LoraLinear(linear)
    assert told["scaling"] == told["lora_alpha"] / (math.sqrt(told["r"]) if told.get("use_rslora") else told["r"])
    adapter = Adapter(16, 24, told["r"], told["scaling"], 0.0, torch.Generator().manual_seed(0), torch.device("cpu"))
    if told.get("use_dora"):
        adapter.magnitude = torch.nn.Parameter(case["magnitude_at_init"])
    layer.adapters["default"], layer.active = adapter, "default"
    torch.testing.assert_close(layer(case["x"]), case["y_at_init"], atol=1e-6, rtol=1e-5)
    adapter.A.data, adapter.B.data = case["A"], case["B"]
    if told.get("use_dora"):
        adapter.magnitude.data = case["magnitude"]
    y = layer(case["x"])
    torch.testing.assert_close(y, case["y"], atol=1e-5, rtol=1e-5)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for found, key in ((adapter.A, "grad_A"), (adapter.B, "grad_B"), (adapter.magnitude, "grad_magnitude")):
        if found is not None:
            torch.testing.assert_close(found.grad, case[key], atol=1e-4, rtol=1e-4)
    assert linear.weight.grad is None
    merged = linear.weight + adapter.delta()
    merged = merged if adapter.magnitude is None else merged * (adapter.magnitude / merged.norm(dim=1))[:, None]
    torch.testing.assert_close(merged, case["merged_W"], atol=1e-6, rtol=1e-5)


def test_lora_plus_learns_b_faster():
    numbers, _ = reference("lora")
    told = numbers["loraplus"]
    model = add_lora(small_model(), 2, 4)
    slow, fast = runtime.adamw(model, told["lr"], 0.0, lora_plus=told["ratio"]).param_groups
    assert slow["lr"] == told["groups"][0]["lr"] and fast["lr"] == told["groups"][2]["lr"]
    assert {id(p) for p in fast["params"]} == {id(p) for name, p in model.named_parameters() if name.endswith(".B")}


def test_an_adapter_starts_as_the_base_and_only_adapters_train():
    model, ids = small_model(), torch.randint(0, 40, (2, 9))
    before = model(ids)
    add_lora(model, 4, 8, seed=3)
    assert torch.equal(model(ids), before)
    model(ids).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in name)


def test_all_linear_layers_of_llama_2_7b_at_rank_64_have_159907840_parameters():
    from model import ModelConfig, Transformer

    with torch.device("meta"):
        model = Transformer(ModelConfig(width=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp_width=11008,
                                        vocab_size=32000))
    count = sum(64 * sum(m.weight.shape) for m in model.layers.modules() if isinstance(m, Linear))
    assert count == 159_907_840


def test_adapters_by_name_share_a_base_and_off_is_the_base_bit_for_bit():
    model, ids = small_model(), torch.randint(0, 40, (2, 9))
    base = model(ids)
    add_lora(model, 2, 4, name="policy")
    add_lora(model, 3, 4, name="value", targets=("q_proj", "down_proj"))
    trained(model)
    with lora.adapter(model, "policy"):
        policy = model(ids)
    with lora.adapter(model, "value"):
        value = model(ids)
    with lora.adapter(model, None):
        assert torch.equal(model(ids), base)
    assert not torch.allclose(policy, value) and torch.equal(model(ids), value)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_equals_unmerged(use_dora):
    model, ids = small_model(), torch.randint(0, 40, (2, 9))
    trained(add_lora(model, 2, 4, use_dora=use_dora))
    before = model(ids)
    merge_lora(model)
    assert not named_lora_layers(model) and (model(ids) - before).abs().max() < 1e-5  # adapters are multiplied in fp32


# ---------------------------------------------------------------------------------- quantised bases

@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_base_bytes_do_not_change_while_adapters_learn(kind):
    model, ids = small_model(width=64, dtype=torch.float32), torch.randint(0, 40, (2, 9))
    plain = model(ids)
    add_lora(quantize_base(model, kind), 2, 4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with lora.adapter(model, None):
        gap = (model(ids) - plain).abs().mean() / plain.std()
    assert 0 < gap < (0.5 if kind == "nf4" else 0.05)


def test_a_quantised_base_is_merged_into_the_originals_only():
    ids = torch.randint(0, 40, (2, 9))
    originals, model = small_model(width=64), small_model(width=64)
    trained(add_lora(quantize_base(model, "nf4"), 2, 4))
    with pytest.raises(ValueError, match="quantised"):
        merge_lora(model)
    expected = trained(add_lora(small_model(width=64), 2, 4))(ids)
    torch.testing.assert_close(merge_lora(model, originals)(ids), expected, atol=1e-5, rtol=1e-5)


def test_qlora_logits_equal_those_of_peft_and_bitsandbytes():
    folder = FIXTURES / "reference" / "tiny" / "llama"
    told, case = json.loads((folder / "nf4.json").read_text()), load_file(folder / "nf4.safetensors")
    ids = case["input_ids"][None]
    for double, key, tolerance in ((False, "logits_nf4_single", 1e-4), (True, "logits_nf4", 5e-3)):
        model = quantize_base(load_model(folder, dtype=torch.float32), "nf4", double)
        assert (model(ids)[0] - case[key]).abs().max() < tolerance, told["notes"]
    lora.load_adapter(model, folder.parent / "llama_lora")
    with torch.no_grad():
        assert (model(ids)[0] - case["logits_nf4_lora"]).abs().max() < 5e-3


def test_int8_codes_equal_bitsandbytes_and_outlier_columns_are_exact():
    _, case = reference("quant/int8")
    linear = Linear(64, 24)
    linear.weight.data = case["W"].float()
    layer = Int8Linear(linear)
    assert torch.equal(layer.codes, case["W.q"])
    torch.testing.assert_close(layer.scale, case["W.row_absmax"])
    kept = Int8Linear(linear, [5])
    assert torch.equal(kept.decoded(torch.float32)[:, 5], linear.weight[:, 5].to(torch.bfloat16).float())


# --------------------------------------------------------------------------------------------- files

def test_an_adapter_of_peft_gives_its_logits_gradients_and_greedy_tokens():
    case, told = load_file(PEFT / "expected.safetensors"), json.loads((PEFT / "expected.json").read_text())
    model = lora.load_adapter(load_model(FIXTURES / "models" / "llama2", dtype=torch.float32), PEFT)
    ids = case["full.input_ids"]
    with torch.no_grad():
        assert (model(ids) - case["full.logits_adapter"]).abs().max() < 2e-4
        left = model(case["left.input_ids"], case["left.attention_mask"])[:, -1]
        assert (left - case["left.last_logits_adapter"]).abs().max() < 2e-4
    for layer in named_lora_layers(model).values():
        layer.adapters["default"].dropout = 0.0
    loss = torch.nn.functional.cross_entropy(model(ids)[:, 7:-1].flatten(0, 1), ids[:, 8:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(told["loss"], abs=1e-4)
    for path, layer in named_lora_layers(model).items():
        for part in "AB":
            norm = getattr(layer.adapters["default"], part).grad.norm().item()
            assert norm == pytest.approx(told["grad_norms"][f"model.{path}.lora_{part}.weight"], rel=1e-3)
    merge_lora(model)
    with torch.no_grad():
        assert (model(ids) - case["full.logits_merged"]).abs().max() < 2e-4


def test_a_saved_adapter_holds_the_tensors_of_peft(tmp_path):
    model = lora.load_adapter(load_model(FIXTURES / "models" / "llama2"), PEFT)
    save_adapter(model, tmp_path / "a")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "a", PEFT))
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "a", PEFT))
    for key in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        assert ours[key] == theirs[key]
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])


def test_an_adapter_saved_again_is_the_same_bytes(tmp_path):
    model = trained(add_lora(small_model(), 4, 8))
    found = set()
    for _ in range(8):
        save_adapter(model, tmp_path / "adapter")
        found.add((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("family", ["llama2", "falcon40b", "gpt_bigcode", "gpt_neox", "starcoder2"])
def test_adapters_of_every_family_come_back_the_same(family, tmp_path):
    """Where queries, keys and values are one matrix, the file holds one adapter of three times the rank."""
    folder = FIXTURES / "models" / family
    ids = torch.randint(0, 300, (2, 9))
    model = trained(add_lora(load_model(folder), 2, 4))
    save_adapter(model, tmp_path / "a")
    again = lora.load_adapter(load_model(folder), tmp_path / "a")
    torch.testing.assert_close(again(ids), model(ids), atol=1e-4, rtol=1e-4)


def test_a_reward_head_travels_with_its_adapter_and_a_missing_one_is_an_error(tmp_path, capsys):
    ids = torch.randint(0, 40, (2, 9))
    model = trained(add_lora(add_score_head(small_model(dtype=torch.float32), 1), 2, 4))
    save_adapter(model, tmp_path / "a")
    again = lora.load_adapter(add_score_head(small_model(dtype=torch.float32), 7), tmp_path / "a")
    assert torch.equal(again.score(ids), model.score(ids))
    language, scored = small_model(dtype=torch.float32), add_score_head(small_model(dtype=torch.float32), 1)
    exits(capsys, lambda: lora.load_adapter(language, tmp_path / "a"), "holds a score head for a model without one")
    save_adapter(add_lora(small_model(dtype=torch.float32), 2, 4), tmp_path / "b")
    exits(capsys, lambda: lora.load_adapter(scored, tmp_path / "b"), "holds no score head")


def test_an_adapter_for_another_base_or_family_is_refused(tmp_path, capsys):
    model = add_lora(small_model(dtype=torch.float32), 2, 4)
    model.source_hash = "one"
    save_adapter(model, tmp_path / "a")
    other = small_model(dtype=torch.float32)
    other.source_hash = "two"
    exits(capsys, lambda: lora.load_adapter(other, tmp_path / "a"), "was trained on another base")
    falcon = load_model(FIXTURES / "models" / "falcon7b")
    exits(capsys, lambda: lora.load_adapter(falcon, PEFT), "which this model does not have")
    exits(capsys, lambda: lora.load_adapter(small_model(), tmp_path), "holds no adapter_config.json")
    with pytest.raises(ValueError, match="no linear layer is called k_prj"):
        add_lora(small_model(), 2, 4, targets=("k_prj",))


# ------------------------------------------------------------------------------- beside the real libraries

def test_transformers_and_peft_open_what_we_save_and_we_what_peft_saves(tmp_path):
    """Runs where both are installed; they are no dependency."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    ids = torch.randint(0, 300, (2, 12))
    for family in ("llama2", "qwen3", "falcon40b", "gpt_bigcode"):
        folder, saved = FIXTURES / "models" / family, tmp_path / family
        save_model(load_model(folder), saved)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager").eval()
        with torch.no_grad():
            assert (load_model(saved)(ids) - theirs(ids).logits).abs().max() < 2e-4
        ours = trained(add_lora(load_model(saved), 4, 8, seed=1))
        save_adapter(ours, saved / "adapter")
        with torch.no_grad():
            told = peft.PeftModel.from_pretrained(theirs, saved / "adapter").eval()(ids).logits
            assert (ours(ids) - told).abs().max() < 2e-4 * told.abs().max()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama2", attn_implementation="eager")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    made = peft.get_peft_model(theirs, settings).eval()
    made.save_pretrained(tmp_path / "made")
    with torch.no_grad():
        mine = lora.load_adapter(load_model(tmp_path / "llama2"), tmp_path / "made")(ids)
        assert (mine - made(ids).logits).abs().max() < 2e-4


def test_transformers_reads_our_reward_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = add_score_head(load_model(FIXTURES / "models" / "llama2"), 0)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.randint(5, 300, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(model.score(ids), theirs.eval()(ids).logits[:, 0], atol=2e-4, rtol=1e-4)
