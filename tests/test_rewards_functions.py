"""Reward functions: what they are given, what ppo.py makes of their scores and of their faults, and those shipped."""
import gc
import json
import random
from decimal import Decimal

import pytest
import torch
from conftest import exits, metrics_of, small_model, write_jsonl
from test_ppo import CPU, config, roles  # noqa: F401

import ppo
from checkpoints import load_model, save_model
from data.tiny.world import TASKS, dialogue
from data.tokenizer import load_tokenizer
from data.trees import tree_from_replies
from model import add_score_head
from rewards import functions, gsm8k, tiny
from rewards.functions import function_scores, load_functions, load_prompts_and_records
from runtime import load_config


def write(folder, body: str, name="mine.py") -> str:
    """A file with the function `f`, whose lines these are."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (folder / name).write_text(f"def f(records, replies, tokens, finished):\n{lines}")
    return f"{folder / name}:f"


@pytest.fixture
def asked(tmp_path):
    """Six prompts with a column that the function needs; the third and fourth differ in nothing else."""
    texts = ["One?", "Two?", "Three?", "Three?", "Four?", "Five?", "Five?"]
    answers = [1, 2, 3, 33, 4, 5, 5]
    return str(write_jsonl(tmp_path / "asked.jsonl", [
        {"prompt": text, "answer": answer, "about": {"deep": [answer]}}
        for text, answer in zip(texts, answers, strict=True)]))


# ---------------------------------------------------------------------------------- what a function gets

def test_a_function_gets_records_texts_lengths_and_ends_reply_by_reply(asked, tmp_path, checkpoint):  # noqa: F811
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.adopt("zephyr")
    name = write(tmp_path, "import json\nopen(__file__ + '.told', 'w').write(json.dumps([records, replies, tokens, "
                           "finished]))\nreturn [10 * r['answer'] + t for r, t in zip(records, tokens)]")
    found = load_functions(name)
    prompts, records = load_prompts_and_records(found, asked, tokenizer, 1000)
    drawn = [prompts[2], prompts[0]]
    said = [[*tokenizer.encode("Yes."), tokenizer.eos_id], tokenizer.encode("No. No")]
    trees = [tree_from_replies(i, tree.trunk.tolist(), said, [True, False]) for i, tree in enumerate(drawn)]
    scores, fault = function_scores(found, trees, drawn, records, tokenizer)
    lengths = [len(reply) for reply in said]
    assert fault == "" and scores.tolist() == [30 + lengths[0], 30 + lengths[1], 10 + lengths[0], 10 + lengths[1]]
    got = json.loads((tmp_path / "mine.py.told").read_text())
    user = {"role": "user", "content": "Three?"}
    assert got[0] == [records[2]] * 2 + [records[0]] * 2
    assert records[2] == {"prompt": [user], "answer": 3, "about": {"deep": [3]}}
    assert got[1:] == [["Yes.", "No. No"] * 2, lengths * 2, [True, False] * 2]


def test_equal_prompts_are_one_only_if_their_records_are_equal(asked, tmp_path, checkpoint):  # noqa: F811
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.adopt("zephyr")
    found = load_functions(write(tmp_path, "return [0.0] * len(replies)"))
    prompts, records = load_prompts_and_records(found, asked, tokenizer, 1000)
    assert [records[tree.record]["answer"] for tree in prompts] == [1, 2, 3, 33, 4, 5]
    assert len(load_prompts_and_records([], asked, tokenizer, 1000)[0]) == 5


def test_records_of_other_formats_keep_their_columns(tmp_path, checkpoint):  # noqa: F811
    """GSM8K, whose reader makes a dialogue; with a column of another name; and pairs."""
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.adopt("zephyr")
    zero = load_functions(write(tmp_path, "return [0.0] * len(replies)"))

    def record(row, **columns):
        path = str(write_jsonl(tmp_path / "rows.jsonl", [row]))
        prompts, records = load_prompts_and_records(zero, path, tokenizer, 1000, columns=columns or None)
        assert len(prompts) == 1
        return records[0]

    found = record({"question": "2 + 2?", "answer": "It is 4.\n#### 4", "level": 1})
    assert found["final"] == "4" and found["level"] == 1 and found["answer"].endswith("#### 4")
    assert record({"ask": "Hi", "wanted": "Ho"}, prompt="ask")["wanted"] == "Ho"
    assert record({"prompt": "Hi", "chosen": "a", "rejected": "b", "source": "web"})["source"] == "web"


def test_too_long_a_prompt_is_named(asked, tmp_path, checkpoint, capsys):  # noqa: F811
    found = load_functions(write(tmp_path, "return [0.0] * len(replies)"))
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.adopt("zephyr")
    exits(capsys, lambda: load_prompts_and_records(found, asked, tokenizer, 3), "record 1", "lower max_tokens")


def test_several_functions_are_summed_with_their_weights(tmp_path):
    one, two = write(tmp_path, "return [1.0] * 2", "a.py"), write(tmp_path, "return [1, 3]", "b.py")
    found = load_functions(f"{one} + -0.5 * {two}+2*{two}")
    assert [f.weight for f in found] == [1, -0.5, 2] and [f.name for f in found] == [one, two, two]
    replies = functions.Replies([{}, {}], ["", ""], [1, 1], [True, True], [1, 1])
    assert [functions.ask(f, replies) for f in found] == [[1, 1], [1, 3], [1, 3]]
    assert load_functions("") == []


# ------------------------------------------------------------------------------------- in the script

def test_without_a_reward_model_the_scores_are_the_functions(roles, asked, tmp_path):  # noqa: F811
    """10 times the record's number and nothing is clipped; no reward model is read, nor a value model for RLOO."""
    name = write(tmp_path, "return [10 * record['answer'] for record in records]")
    ppo.main(config(roles, tmp_path, data=asked, reward=name, reward_model="nowhere", advantages="rloo", n=2, batch=6,
                    steps=2, missing_eos="subtract", penalty=0.0))
    assert metrics_of(tmp_path / "run")[0]["score"] == pytest.approx(10 * (1 + 2 + 3 + 33 + 4 + 5) / 6)
    ppo.main(config(roles, tmp_path, data=asked, reward=name, reward_model="nowhere", batch=6, steps=2,
                    out=str(tmp_path / "gae")))
    assert all("value_loss" in m and m["eos_rate"] < 1 for m in metrics_of(tmp_path / "gae"))
    models = ppo.load_models(config(roles, tmp_path, reward=name, reward_model="nowhere"),
                             load_tokenizer(roles / "sft"), CPU)
    assert models.reward_model is None and models.value is not None


def test_adapters_need_no_second_base_with_a_function_and_dropout_is_off(roles, asked, tmp_path):  # noqa: F811
    """With dropout 0.1 the ratio of the first update was up to 1.24; then a step changes policy and value alone."""
    name = write(tmp_path, "return [float(len(reply)) for reply in replies]")
    changes = {"data": asked, "reward": name, "reward_model": "nowhere", "lora_rank": 4, "lora_dropout": 0.1,
               "batch": 6, "lr": 1e-9, "value_lr": 1e-9, "epochs": 1}
    ppo.main(config(roles, tmp_path, **changes, steps=2))
    for step in metrics_of(tmp_path / "run"):
        assert step["ratio_max"] == pytest.approx(1, abs=1e-5) and step["value_grad_norm"] > 0
    models = ppo.load_models(config(roles, tmp_path, **changes), load_tokenizer(roles / "sft"), CPU)
    assert models.policy.base is models.value.base is models.reference.base
    for layer in models.policy.base.lora_layers:
        assert {name: adapter.dropout for name, adapter in layer.adapters.items()} == {"policy": 0, "value": 0}


def test_a_rule_is_learnt(tmp_path):
    """A reply gets 1 for a seven in it, by RLOO, GRPO and Dr. GRPO: from a fifth of the replies or less to most."""
    def sevens(trees):
        return torch.tensor([float(7 in leaf) for tree in trees for _, leaf in tree.leaves])

    tokenizer = type("T", (), {"stop_ids": lambda self: ()})()
    for advantages in ("rloo", "grpo", "dr_grpo"):
        options = ppo.Config(advantages=advantages, n=4, max_tokens=4, epochs=1, minibatches=1, kl_coef=0.0,
                             min_eos=0.0, penalty=0.0, missing_eos="subtract", seed=3)
        policy, ref = (small_model(seed=3, dtype=torch.float32, scale=1.0) for _ in range(2))
        models, shares = ppo.Models(policy, ref, None, None, policy), []
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
        for step in range(40):
            trees = ppo.sample(models, [[3 + i % 4] for i in range(16)], tokenizer, step, options)
            rollout = ppo.score(trees, models, options, CPU, sevens(trees))
            _, advantage, returns = ppo.find_advantages(rollout, 0.0, options)
            ppo.update(models, optimizer, rollout, advantage, returns, 0.0, step, options, CPU)
            shares.append(rollout.scores.mean().item())
        assert sum(shares[:3]) / 3 < 0.25 < 0.7 < sum(shares[-3:]) / 3, (advantages, shares)


def test_a_function_is_part_of_the_run(roles, asked, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Stopped and continued is undisturbed; with another text of the file it is another run."""
    from runtime import StopRequest

    name = write(tmp_path, "return [float(len(reply)) for reply in replies]")
    changes = {"data": asked, "reward": name, "advantages": "reinforce", "batch": 6}
    ppo.main(config(roles, tmp_path, out=str(tmp_path / "whole"), **changes))
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: len(metrics_of(tmp_path / "parts")) == 2)
    ppo.main(config(roles, tmp_path, out=str(tmp_path / "parts"), **changes))
    monkeypatch.undo()
    before = (tmp_path / "mine.py").read_text()
    write(tmp_path, "return [float(len(reply)) + 1 for reply in replies]")
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, out=str(tmp_path / "parts"), **changes)),
          f"its reward {tmp_path / 'mine.py'} has changed since the run began")
    gc.collect()  # the frames that hold the lock of the folder
    (tmp_path / "mine.py").write_text(before)
    ppo.main(config(roles, tmp_path, out=str(tmp_path / "parts"), **changes))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")


# --------------------------------------------------------------------------------------------- faults

@pytest.mark.parametrize("body, said", [
    ("return [1.0]", ["gave 1 scores for 4 replies"]), ("return None", ["gave None, expected a list of numbers"]),
    ("return ['good'] * len(replies)", ["gave ['good', 'good'", "expected a list of numbers"]),
    ("return [r['nothing'] for r in records]", ["on record 1, reply '': KeyError: 'nothing'"]),
    ("return [1.0, 1.0, 1.0, float('nan')]", ["gave nan on record 2, reply 'Yes.'"]),
    ("return [1 / len(reply) for reply in replies]", ["on record 1, reply '': ZeroDivisionError"]),
    ("return [0.0 if len(replies) == 1 else 1 / 0 for reply in replies]", [":f: ZeroDivisionError"]),
    ("return [records[1] and 1.0] * len(replies) if 1", ["mine.py: cannot be imported (SyntaxError"]),
])
def test_a_function_at_fault_is_one_line_before_training(body, said, roles, asked, tmp_path, capsys):  # noqa: F811
    name = write(tmp_path, body)
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, data=asked, reward=name, advantages="reinforce")),
          "reward: ", "mine.py", *said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reward, said", [
    ("nowhere.py:f", "nowhere.py: no such file"), ("mine.py", "'mine.py' is not file.py:function"),
    ("x * mine.py:f", "'x * mine.py:f' is not"), ("{folder}/mine.py:g", "has no function 'g'"),
    ("{folder}/mine.py:f +", "'' is not file.py:function"), ("{folder}/mine.py:three", "record 1, reply '': TypeError"),
])
def test_what_names_no_function_is_one_line(reward, said, roles, asked, tmp_path, capsys):  # noqa: F811
    write(tmp_path, "return [0.0] * len(replies)\n")
    with (tmp_path / "mine.py").open("a") as file:
        file.write("def three(records, replies, tokens):\n    return [0.0] * len(replies)\n")
    given = reward.format(folder=tmp_path)
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, data=asked, reward=given, advantages="reinforce")), said)
    assert not (tmp_path / "run").exists()


def test_a_fault_in_training_keeps_what_was_trained(roles, asked, tmp_path, capsys):  # noqa: F811
    """The third call after the trial fails on record 5: the state of step 2 is there, and its model."""
    name = write(tmp_path, "from pathlib import Path\nfile = Path(__file__ + '.count')\n"
                           "count = int(file.read_text()) + 1 if file.is_file() else 0\nfile.write_text(str(count))\n"
                           "return [float('inf') if count == 3 and r['answer'] == 4 else 1.0 for r in records]")
    changes = {"data": asked, "reward": name, "advantages": "reinforce", "batch": 6}
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        ppo.main(config(roles, tmp_path, **changes))
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and "step 3: reward: " in said[-1] and "gave inf on record 5, reply" in said[-1]
    assert f"{tmp_path / 'run'} holds the state and the model of step 2" in said[-1]
    assert load_model(tmp_path / "run" / "model_step_2")
    del left  # and with its frames the lock of the folder
    gc.collect()
    ppo.main(config(roles, tmp_path, **changes))  # whatever it was is over: the same command goes on
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------ shipped functions

@pytest.mark.parametrize("text, number", [
    ("48 / 2 = 24, so 48 + 24 = 72. #### 72", 72), ("#### 1,200", 1200), ("#### $1,200.00", 1200), ("####-3", -3),
    ("She pays 5 and then 7.", 7), ("It is 3.50 dollars.", "3.5"), ("10-3=7", 7), ("between 5-3", 3), ("-4", -4),
    ("minus (-4)", -4), ("#### 5 apples and 3 pears", 5), ("#### 1 #### 2", 1), ("no number", None), ("", None),
    ("7 #### none", None), ("$.5", "0.5"), ("1,200,000 and", 1200000), ("12.", 12), ("99%", 99),
])
def test_the_final_number_of_a_text(text, number):
    found = gsm8k.final_number(text)
    assert found == (None if number is None else Decimal(number)), text


def test_a_right_final_number_gets_1():
    records = [{"final": "72"}, {"final": "1200"}, {"answer": "2 + 2 = <<2+2=4>>4 #### 4"}, *[{"final": "3"}] * 2]
    replies = ["So 72.0", "#### 1,200", "4", "I see 3, no, 4", ""]
    assert gsm8k.right(records, replies, [1] * 5, [True] * 5) == [1, 1, 1, 0, 0]


def test_the_tiny_worlds_rewards_by_hand():
    item = {"word": "bike", "labels": ["vehicle", "fruit"], "right": "vehicle"}
    record = {"category": "classify", "item": item, "required": tiny.required_words("classify", item)}
    assert record["required"] == ["The", "answer", "is", "vehicle"]
    replies = ["The answer is vehicle.", "Vehicle.", "fruit vehicle The answer is", "The answer is vehicle."]
    ends = [True, True, True, False]
    assert tiny.gold([record] * 4, replies, [5] * 4, ends) == pytest.approx([1, 0.75, 0, 0.4])
    assert tiny.required([record] * 4, replies, [5] * 4, ends) == [1, 0, 1, 1]  # of the other words nothing is said


def test_a_careful_reply_has_all_required_words_in_every_task():
    rng = random.Random(0)
    for task in TASKS:
        for _ in range(5):
            item = TASKS[task].draw(rng)
            record = {"category": task, "item": item, "required": tiny.required_words(task, item)}
            careful = TASKS[task].answer(item, "careful", rng)
            assert record["required"] and tiny.gold([record], [careful], [9], [True]) == [pytest.approx(1)]
            assert tiny.required([record], [careful], [9], [True])[0] >= 0.5, (task, careful, record["required"])


def test_prompts_of_preferences_get_their_items(tmp_path, capsys):
    rng = random.Random(0)
    dialogues = [dialogue(rng, long=1.0) | {"id": f"d{i}"} for i in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", dialogues)
    pairs = [{"id": f"{d['id']}-2", "category": d["category"], "prompt": [{"role": "user", "content": f"{d['id']}?"}],
              "chosen": "a", "rejected": "b"} for d in dialogues]
    write_jsonl(tmp_path / "pairs.jsonl", [*pairs, pairs[0]])
    words = [f"dialogues={tmp_path}/prompts.jsonl", f"pairs={tmp_path}/pairs.jsonl", f"out={tmp_path}/out.jsonl"]
    tiny.main(load_config(tiny.Config, "", words))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [r["item"] for r in found] == [d["turns"][1]["item"] for d in dialogues]
    assert all(r["prompt"] == p["prompt"] and r["required"] for r, p in zip(found, pairs, strict=True))
    exits(capsys, lambda: tiny.main(load_config(tiny.Config, "", [*words, "pairs=nowhere"])), "nowhere: no such file")


def test_the_shipped_config_runs(roles, tmp_path):  # noqa: F811
    """configs/tiny/ppo_rule.toml with both functions of the tiny world, two steps on random weights."""
    tokenizer = load_tokenizer("data/tiny/base")
    tokenizer.adopt("zephyr")
    save_model(load_model(roles / "sft"), tmp_path / "sft", tokenizer)
    save_model(add_score_head(load_model(roles / "sft"), 0), tmp_path / "unused", tokenizer)
    rng = random.Random(0)
    rows = []
    for _ in range(8):
        drawn = dialogue(rng)
        turn = drawn["turns"][0]
        rows.append({"prompt": turn["user"], "category": drawn["category"], "item": turn["item"],
                     "required": tiny.required_words(drawn["category"], turn["item"])})
    data = write_jsonl(tmp_path / "checkable.jsonl", rows)
    words = ["--config", "configs/tiny/ppo_rule.toml", f"model={tmp_path}/sft", f"data={data}", f"out={tmp_path}/run",
             "reward=rewards/tiny.py:gold + 0.5 * rewards/tiny.py:required", "steps=2", "batch=4", "max_tokens=6",
             "min_eos=0", "device=cpu"]
    ppo.main(load_config(ppo.Config, "", words))
    assert len(metrics_of(tmp_path / "run")) == 2
