"""Adapters, quantised bases, gradient checkpointing and dry runs, in the scripts."""
import json
import random
import re

import pytest
import torch
from conftest import exits, metrics_of, small_model, write_jsonl
from safetensors.torch import load_file

import dpo
import lora
import ppo
import reward
import sft
from checkpoints import load_model, save_model
from data.dry_run import activations, plan, plan_of_four
from data.four_models import load_models
from data.pack import pack
from data.tiny.world import demonstrate, dialogue
from data.tokenizer import load_tokenizer
from data.trees import Response, Tree
from families import read_config
from model import ModelConfig, Transformer, generate, init_weights

PARTS = {"epochs": 1, "batch": 4, "device": "cpu", "dtype": "float32", "lora_rank": 4}
QUIET = PARTS | {"samples": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random model whose sizes divide into NF4's blocks, demonstrations, preferences and prompts."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = load_tokenizer("data/tiny/base")
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, width=64, layers=2, heads=4, kv_heads=2,
                                    head_dim=16, mlp_width=128))
    init_weights(model, 0)
    save_model(model, folder / "base", tokenizer)
    rng = random.Random(0)
    dialogues = [demonstrate(dialogue(rng), rng, "careful") for _ in range(12)]
    write_jsonl(folder / "sft.jsonl", [{"messages": d} for d in dialogues])
    pairs = [{"prompt": d[:1], "chosen": d[1]["content"], "rejected": "No.", "margin": 2} for d in dialogues]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def run_sft(world, out, **changes):
    config = sft.Config(model=str(world / "base"), data=str(world / "sft.jsonl"), out=str(out), template="zephyr",
                        **QUIET | changes)
    sft.main(config)
    return config


@pytest.fixture(scope="module")
def chatbot(world):
    run_sft(world, world / "sft")
    return world / "sft" / "model"


def hidden_of(model):
    return model(torch.arange(3, 40)[None])


@pytest.mark.parametrize("changes", [
    {}, {"quantize": "nf4"}, {"quantize": "int8"}, {"lora_kind": "dora"},
    {"lora_kind": "rslora", "lora_dropout": 0.1, "lora_plus": 4.0}, {"checkpointing": True},
])
def test_sft_with_adapters_leaves_an_adapter_and_the_same_model_merged(changes, world, tmp_path, capsys):
    run_sft(world, tmp_path / "run", lr=1e-2, **changes)
    assert "logits change by" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert load_tokenizer(tmp_path / "run" / "adapter").template == "zephyr"
    base = load_model(world / "base", dtype=torch.float32)
    merged, before = load_model(tmp_path / "run" / "model", dtype=torch.float32), hidden_of(base)
    adapted = hidden_of(lora.load_adapter(base, tmp_path / "run" / "adapter"))
    assert (adapted - before).abs().max() > 0.05
    torch.testing.assert_close(hidden_of(merged), adapted, atol=1e-4, rtol=1e-4)
    steps = metrics_of(tmp_path / "run")
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_adapters_stopped_and_continued_equal_undisturbed_bit_for_bit(world, tmp_path, monkeypatch):
    """With dropout, whose draws have to be carried over."""
    from runtime import StopRequest

    changes = {"quantize": "nf4", "lora_dropout": 0.1, "epochs": 2}
    run_sft(world, tmp_path / "whole", **changes)
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: len(metrics_of(tmp_path / "parts")) == 3)
    run_sft(world, tmp_path / "parts", **changes)
    monkeypatch.undo()
    assert not (tmp_path / "parts" / "model").exists()
    run_sft(world, tmp_path / "parts", **changes)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    one, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_dpo_with_adapters_starts_from_the_reference_and_needs_no_second_model(chatbot, world, tmp_path):
    dpo.main(dpo.Config(model=str(chatbot), data=str(world / "pairs.jsonl"), out=str(tmp_path / "run"),
                        quantize="nf4", **QUIET))
    first, *_, last = metrics_of(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["accuracy"] == 0
    assert last["loss"] < first["loss"]


@pytest.fixture(scope="module")
def reward_run(chatbot, world):
    reward.main(reward.Config(model=str(chatbot), data=str(world / "pairs.jsonl"), out=str(world / "reward"), lr=1e-2,
                              **PARTS))
    return world / "reward"


def test_a_reward_adapter_with_its_head_scores_as_the_merged_model(reward_run, chatbot):
    ids = torch.arange(3, 40)[None]
    base = lora.load_base(str(chatbot), sft.Config(lora_rank=4, dtype="float32"), torch.device("cpu"))
    role = lora.load_role(base, reward_run / "adapter", "reward")
    with lora.adapter(base, "reward"):
        hidden, _ = base._hidden_of_rows(ids, None)
    merged = load_model(reward_run / "model", dtype=torch.float32)
    assert merged.config.score_mean == pytest.approx(role.config.score_mean)
    assert merged.config.score_std == role.config.score_std
    torch.testing.assert_close(role.scores(hidden[-1:]), merged.score(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [
    {}, {"quantize": "nf4"}, {"checkpointing": True}, {"advantages": "rloo", "n": 2, "missing_eos": "subtract"},
    {"reward_model": "model"},
])
def test_ppo_on_one_base_runs_and_trains_nothing_but_its_adapters(
    changes, reward_run, chatbot, world, tmp_path, capsys,
):
    where = reward_run / changes.pop("reward_model", "adapter")
    config = ppo.Config(model=str(chatbot), reward_model=str(where), data=str(world / "pairs.jsonl"),
                        out=str(tmp_path / "run"), steps=2, batch=4, max_tokens=6, min_eos=0.0, lora_rank=4,
                        snapshot_every=1, device="cpu", dtype="float32", lr=1e-2, **changes)
    ppo.main(config)
    first, second = metrics_of(tmp_path / "run")
    assert abs(first["kl"]) < 1e-5 < abs(second["kl"])  # at first the policy is the reference
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert (tmp_path / "run" / "adapter_step_1").exists() and not any("score" in name for name in tensors)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert load_tokenizer(tmp_path / "run" / "adapter_step_1").vocab_size == load_tokenizer(chatbot).vocab_size
    merged = re.search(r"logits change by (\S+)", capsys.readouterr().out)  # of the policy, not the value model
    assert float(merged[1]) < (0.5 if "quantize" in changes else 1e-4)


def test_one_base_holds_four_roles_that_do_not_disturb_each_other(reward_run, chatbot):
    options = ppo.Config(model=str(chatbot), reward_model=str(reward_run / "adapter"), lora_rank=4, dtype="float32")
    tokenizer = load_tokenizer(chatbot)
    policy, reference, scorer, value, _ = load_models(options, tokenizer, torch.device("cpu"))
    assert policy.base is reference.base is scorer.base is value.base
    separate = load_model(chatbot, dtype=torch.float32)
    said, alone = (generate(model, [[1, 5, 9]], 8, seed=1)[0][0] for model in (reference, separate))
    assert said.tokens == alone.tokens
    trained = {id(p) for role in (policy, value) for p in role.parameters()}
    roles = (policy, reference, scorer, value)
    assert {id(p) for role in roles for p in role.parameters() if p.requires_grad} == trained
    assert not any(p.requires_grad for name, p in policy.base.named_parameters() if ".adapters." not in name)
    from kernels.layout import Layout

    where = (torch.arange(3, 40), torch.arange(37), Layout.build([37]))
    before = scorer.scores(scorer.hidden(*where))
    torch.testing.assert_close(value.scores(value.hidden(*where)), before)  # starts from the reward model
    for p in [*policy.parameters(), *value.parameters()]:
        p.data.add_(0.1)
    assert torch.equal(scorer.scores(scorer.hidden(*where)), before)
    assert torch.equal(reference.hidden(*where), separate.hidden(*where))
    assert not torch.equal(policy.hidden(*where), reference.hidden(*where))


def test_a_reward_adapter_on_another_base_is_refused(reward_run, world, tmp_path, capsys):
    run_sft(world, tmp_path / "other", lr=2e-3)
    config = ppo.Config(model=str(tmp_path / "other" / "model"), reward_model=str(reward_run / "adapter"), lora_rank=4,
                        data=str(world / "pairs.jsonl"), out=str(tmp_path / "run"))
    capsys.readouterr()
    exits(capsys, lambda: ppo.main(config), "was trained on another base")


# ------------------------------------------------------------------------------ gradient checkpointing

def test_checkpointing_changes_no_gradient_and_keeps_the_adapter_of_the_first_run():
    tree = Tree(torch.randint(0, 40, (30,)).numpy(), [(20, torch.randint(0, 40, (7,)).numpy())], [Response(1, 0, 7)])
    (batch,) = pack([tree], 100)
    model = lora.add_lora(lora.add_lora(small_model(), 2, 4, name="one"), 2, 4, name="two", seed=5)
    for layer in model.lora_layers:
        for found in layer.adapters.values():
            found.B.data.normal_()
    found = {}
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        with lora.adapter(model, "one"):
            hidden = model.hidden(batch.tokens, batch.positions, batch.layout)
        hidden.square().sum().backward()  # by now another adapter is on
        found[checkpointing] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[False].keys() == found[True].keys() and all(".one." in name for name in found[True])
    for name in found[True]:
        torch.testing.assert_close(found[True][name], found[False][name])


# -------------------------------------------------------------------------------------------- dry runs

@pytest.mark.parametrize("fields", [{}, {"kv_heads": 4}, {"gated": False, "activation": "gelu"}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(fields, checkpointing):
    """Counted by its own hook, every storage once; the last norm and rotary tables, which come once, are taken off."""
    sizes = {"width": 128, "layers": 6, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp_width": 384, "vocab_size": 50}
    config = ModelConfig(**sizes | fields)
    model = Transformer(config)
    init_weights(model, 0)
    model.checkpointing = checkpointing
    tokens = 64
    (batch,) = pack([Tree(torch.randint(0, 50, (tokens,)).numpy(), [], [Response(0, 1, tokens)])], tokens)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        store = x.untyped_storage()
        if store.data_ptr() not in ours and x.shape[:1] == (tokens,):
            kept[store.data_ptr()] = store.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.hidden(batch.tokens, batch.positions, batch.layout)
    told = tokens * activations(config, 4)
    if checkpointing:  # the input of each block; what one block keeps while it runs again comes on top
        told = tokens * 4 * config.width * config.layers
    once = tokens * 4 * (config.width + 2 * config.head_dim)
    assert sum(kept.values()) - once == pytest.approx(told, rel=0.05)
    assert hidden.shape == (tokens, 128)


def test_a_dry_run_needs_config_json_alone_and_counts_the_papers_adapter(tmp_path, capsys):
    llama = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000, "torch_dtype": "float16",
             "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    out = tmp_path / "run"
    sft.main(sft.Config(model=str(tmp_path), lora_rank=64, quantize="nf4", checkpointing=True, dry_run=True,
                        out=str(out)))
    said = capsys.readouterr().out
    assert "6,738,415,616 parameters, 159,907,840 train" in said and not out.exists()
    found = plan(str(tmp_path), sft.Config(lora_rank=64, quantize="nf4"), "bfloat16", 2048)
    assert found["weights"] == pytest.approx(3.9e9, rel=0.02) and found["adapters"] == 4 * 159907840
    assert plan(str(tmp_path), sft.Config(), "bfloat16", 1)["optimizer"] == 8 * 6738415616


def test_a_dry_run_checks_the_weights_and_counts_the_steps(world, tmp_path, capsys):
    config = sft.Config(model=str(world / "base"), data=str(world / "sft.jsonl"), dry_run=True,
                        out=str(tmp_path / "run"), **QUIET)
    sft.main(config)
    said = capsys.readouterr().out
    assert "names and shapes fit config.json" in said and "3 steps of 4 dialogues" in said


def test_ppo_on_one_base_is_told_to_take_one_base(reward_run, chatbot):
    def plan(result, **changes):
        config = ppo.Config(model=str(chatbot), reward_model=str(reward_run / result), **changes)
        return plan_of_four(config, "float32")

    full, two, one = plan("model"), plan("model", lora_rank=4), plan("adapter", lora_rank=4)
    assert two["weights"] == 2 * one["weights"] and full["weights"] > 3 * one["weights"]
    assert one["trained"] == two["trained"] < full["trained"] / 2


def test_ppo_is_told_of_the_sampler_and_its_cache(reward_run, chatbot):
    """24 replies of 16 tokens, prompts as long, and a copy of the policy in bf16 where compute is and no adapter."""
    settings = dict(model=str(chatbot), reward_model=str(reward_run / "model"), batch=8, n=3, max_tokens=16)
    wide, narrow, adapters = (plan_of_four(ppo.Config(**settings | changes), dtype) for changes, dtype in (
        ({}, "float32"), ({}, "bfloat16"), ({"lora_rank": 4}, "bfloat16")))
    c = read_config(chatbot)
    numbers = 2 * c.layers * c.kv_heads * c.head_dim * 24 * 32
    assert [found["KV cache"] for found in (wide, narrow, adapters)] == [4 * numbers, 2 * numbers, 2 * numbers]
    assert [found["sampler"] for found in (wide, narrow, adapters)] == [0, 2 * narrow["parameters"], 0]


@pytest.mark.parametrize("changes, said", [
    ({"quantize": "nf4"}, "set lora_rank"), ({"lora_rank": -1}, "lora_rank is -1"),
    ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout"),
])
def test_options_that_make_no_sense_are_one_line(changes, said, capsys):
    exits(capsys, lambda: sft.Config(**changes), said)
