"""The pieces of benchmarks/smollm2.py that need no model, and a real model's answer where one lies in models/."""
import json
import tomllib
from dataclasses import fields

import pytest
from conftest import ROOT, exits

import judge
import ppo
from benchmarks import constraints, smollm2
from benchmarks.smollm2 import Config
from data.tokenizer import load_tokenizer
from runtime import load_config

MODEL = ROOT / "models" / "smollm2-135m"

WORDS, BULLETS = "What is rain? Answer in at most 3 words.", "What is rain? Answer with exactly 2 bullet points, each"
JSON = 'What is rain? Answer with nothing but JSON: an object with the keys "name" and "fact".'
OPENING = 'What is rain? Begin your answer with "In short,".'


@pytest.mark.parametrize("prompt, reply, kept", [
    (WORDS, "Water from clouds.", True), (WORDS, "It is water falling.", False), (WORDS, "  ", False),
    (BULLETS, "- Water.\n- It falls.", True), (BULLETS, "- Water.\n\n-It falls.\n", True), (BULLETS, "- Water.", False),
    (BULLETS, "Here:\n- Water.\n- It falls.", False), (BULLETS, "- Water.\n-", False), (BULLETS, "1. a\n2. b", False),
    (JSON, '{"name": "rain", "fact": "wet"}', True), (JSON, '{"name": "rain"}', False), (JSON, "[]", False),
    (JSON, '{"name": "rain",', False), (JSON, 'Sure: {"name": "rain", "fact": "wet"}', False),
    (JSON, '{"name": "rain", "fact": 3}', False),
    (OPENING, "In short, water.", True), (OPENING, "In short,", False), (OPENING, "Rain, in short, is wet.", False)])
def test_what_keeps_a_constraint(prompt, reply, kept):
    assert constraints.rule(prompt, reply) == float(kept)


def test_the_rule_as_a_reward_reads_each_reply_s_own_prompt():
    records = [{"prompt": [{"role": "user", "content": text}]} for text in (WORDS, OPENING, WORDS)]
    assert constraints.kept(records, ["In short, water.", "In short, water.", "Falling water everywhere."],
                            [5, 5, 4], [True] * 3) == [1.0, 1.0, 1.0]
    assert constraints.kept(records[::-1], ["It is water falling.", "Water.", "Rain."], [5, 3, 3], [True] * 3) == [
        0.0, 0.0, 1.0]


def test_every_prompt_has_a_rule_and_no_subject_is_in_both_halves():
    trained, held = constraints.prompts(False), constraints.prompts(True)
    assert {constraints.kind(prompt) for prompt in held} == {"words", "bullets", "json", "opening"}
    for prompt in trained + held:
        assert constraints.rule(prompt, "") == 0.0
    found = [{subject for subject in constraints.SUBJECTS for prompt in half if f" {subject}? " in prompt
              or f" {subject} matter" in prompt or f" {subject}. A" in prompt} for half in (trained, held)]
    assert not found[0] & found[1] and len(found[0] | found[1]) == len(constraints.SUBJECTS)
    with pytest.raises(ValueError, match="no known constraint"):
        constraints.rule("What is rain?", "Water.")


def test_rows_of_a_model_replace_those_of_the_same_measures(tmp_path):
    """Three of four right: Wilson's 95 % interval is [0.301, 0.954]."""
    config = Config(out=str(tmp_path / "r.json"), model=f"{tmp_path}/real/dpo-lora-100-2/model")
    row = smollm2.share("accuracy", [True, True, True, False])
    assert row["value"] == 0.75 and row["low"] == pytest.approx(0.301, abs=1e-3)
    assert row["high"] == pytest.approx(0.954, abs=1e-3)
    assert smollm2.share("", [False] * 14)["low"] == 0.0 and smollm2.share("", [True] * 7)["high"] == 1.0
    smollm2.add_rows(config, [row, smollm2.mean("length", [3.0])])
    smollm2.add_rows(config, [row | {"value": 0.5}])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(r["stage"], r["seed"], r["measure"], r["value"]) for r in rows] == [
        ("real/dpo-lora-100", 2, "length", 3.0), ("real/dpo-lora-100", 2, "accuracy", 0.5)]


def test_the_rate_of_a_run_is_its_steps_mean_without_the_first(tmp_path):
    steps = [{"step": i, "loss": 0.5, "pairs_per_s": rate} for i, rate in enumerate((0.5, 2.0, 4.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (row,) = smollm2.speed(Config(model=f"{tmp_path}/model"))
    assert row["measure"] == "pairs a second in training" and (row["value"], row["n"]) == (3.0, 2)


@pytest.mark.parametrize("chosen, rejected, margin", [(9, 9, 0), (8, 7.5, 1), (8, 7, 1), (9, 7.5, 2), (9, 1, 3)])
def test_margins_are_steps_of_the_scores(chosen, rejected, margin):
    scores = {"score_chosen": chosen, "score_rejected": rejected}
    assert smollm2.margin_of({"metadata": scores}) == smollm2.margin_of(scores) == margin


def test_without_data_a_piece_that_needs_it_says_how_to_get_it(tmp_path, capsys):
    exits(capsys, lambda: smollm2.place(Config(), "arc"), "arc: no data set named", "hf download")
    exits(capsys, lambda: smollm2.chosen_pairs(Config(), str(tmp_path / "none"), 3, 9), "none: no such file")
    exits(capsys, lambda: Config(piece="dance"), "piece is 'dance', expected one of replies")
    exits(capsys, lambda: smollm2.opened(str(tmp_path / "none"), Config()), "make smollm2 fetches it")


def test_the_settings_of_the_pieces_are_keys_of_the_scripts():
    for script, name in ((ppo, "ppo"), (ppo, "grpo"), (smollm2.dpo, "dpo"), (smollm2.sft, "sft"),
                         (smollm2.reward, "reward")):
        found = load_config(script.Config, "", ["--config", str(ROOT / "configs" / "smollm2-135m" / f"{name}.toml")])
        assert found.model == "models/smollm2-135m"
    judged = tomllib.loads((ROOT / "configs" / "smollm2-135m" / "judge.toml").read_text())
    assert judged.keys() <= {field.name for field in fields(judge.Config)}


@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="make smollm2 fetches the model")
def test_the_real_model_says_paris_under_a_template_of_its_own():
    """Whether the conversion is right. Its template has a default system turn, which names the model."""
    (((text, _, finished),),) = smollm2.sampled(Config(model=str(MODEL)), ["What is the capital of France?"], 0.0)
    assert "Paris" in text and finished
    tokenizer = load_tokenizer(MODEL)
    shown = tokenizer.chat.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert (tokenizer.template, tokenizer.end) == ("own", "<|im_end|>") and "SmolLM" in shown
