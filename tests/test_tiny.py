import json
import random
import shutil
from collections import Counter

import pytest
from conftest import BASE, exits

from data.tiny import build, pairs
from data.tiny.world import SHARES, STYLES, TASKS, demonstrate, dialogue, gold, split, words


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A small build of everything the recipe reads, pretraining text included: {file name: records}."""
    out = tmp_path_factory.mktemp("corpora")
    build.write_data(build.Config(part="all", more_prompts=10, documents=3000, demos=2000, prompts=1000), out)
    return {file.stem: [json.loads(line) for line in file.open()] for file in out.glob("*.jsonl")}


# ----------------------------------------------------------------------------------- tasks, graders

@pytest.mark.parametrize("task", TASKS)
def test_careful_replies_are_perfect_and_sloppy_ones_are_not(task):
    """On 300 items and two follow-ups of each; a reply that never ends keeps 0.4 of its score."""
    rng = random.Random(task)
    scores = {style: [] for style in STYLES}
    for _ in range(300):
        item = TASKS[task].draw(rng)
        for _ in range(3):
            for style in STYLES:
                scores[style].append(gold(task, item, TASKS[task].answer(item, style, rng)))
            item, said = TASKS[task].follow(item, rng)
            assert said
    assert min(scores["careful"]) > 0.999
    average = {style: sum(x) / len(x) for style, x in scores.items()}
    assert 0.4 <= average["terse"] <= 0.9 and average["sloppy"] < average["terse"]
    assert gold(task, item, TASKS[task].answer(item, "careful", rng), finished=False) == pytest.approx(0.4)


@pytest.mark.parametrize("task", TASKS)
def test_no_grader_pays_for_nothing_or_breaks_on_anything(task):
    rng = random.Random(task)
    item = TASKS[task].draw(rng)
    for reply in ("", ".", "The end.", "?", "1.", "def f(x): return", "x" * 5000, "(" * 3000, "9**9**9", "\x00", "“é”",
                  "0 " * 500):
        assert 0 <= gold(task, item, reply) <= 0.5, reply
    for _ in range(300):  # a reply to something else
        stranger = TASKS[task].draw(rng)
        assert 0 <= gold(task, item, TASKS[task].answer(stranger, "careful", rng)) <= 1


@pytest.mark.parametrize("task, item, reply, score", [
    # .45 for the three, .25 for two sentences, .2 for both proper, .1 for the ending
    ("generation", {"name": "Tom", "animal": "cat", "place": "park", "n": 2},
     "Tom met a cat at the park. The cat was sad. The end.", 1.0),
    # one sentence short: .08 instead of .25; no ending
    ("generation", {"name": "Tom", "animal": "cat", "place": "park", "n": 2}, "Tom met a cat at the park.", 0.73),
    # a stranger costs .15
    ("generation", {"name": "Tom", "animal": "cat", "place": "park", "n": 2},
     "Tom met a cat at the park. Leo was sad. The end.", 0.85),
    ("brainstorm", {"kind": "fruit", "n": 2, "without": []}, "1. pear 2. plum", 1.0),
    ("brainstorm", {"kind": "fruit", "n": 2, "without": ["pear"]}, "1. pear 2. plum", 0.65),
    ("brainstorm", {"kind": "fruit", "n": 2, "without": []}, "pear, plum, lemon.", 0.7 * 2 / 3 * 0.6),
    ("chat", {"name": "Mia", "good": False, "news": "I lost the key"},
     "Hi Mia. I am sorry to hear that. Can I help you?", 1.0),
    ("chat", {"name": "Mia", "good": False, "news": "I lost the key"}, "Hi Mia. I am glad and sorry. Can I help you?",
     0.55),
    ("coding", {"ops": [["add", 3], ["multiply", 4]]}, "def f(x): return (x + 3) * 4", 1.0),
    ("coding", {"ops": [["add", 3], ["multiply", 4]]}, "4 * x + 12", 0.75),
    # right for x = 3 alone: 6 * 4 = 24 = 3 + 21
    ("coding", {"ops": [["add", 3], ["multiply", 4]]}, "x + 21", 0.05),
    ("classify", {"word": "cat", "labels": ["animal", "tool"], "right": "animal"}, "The answer is animal.", 1.0),
    ("classify", {"word": "cat", "labels": ["animal", "tool"], "right": "animal"}, "animal or tool", 0.0),
    ("closed_qa", {"facts": [["Tom", "red", "kite"]], "about": [0, "who"]}, "Tom has the kite.", 1.0),
    ("closed_qa", {"facts": [["Tom", "red", "kite"]], "about": [0, "who"]}, "tom", 0.7),
    ("closed_qa", {"facts": [["Tom", "red", "kite"]], "about": [0, "who"]}, "Tom or Mia", 0.1),
    # precision 1/2, recall 1/2: .8 * .25 + .2
    ("extract", {"things": [["fruit", "pear"], ["fruit", "plum"], ["tool", "saw"]], "kind": "fruit"}, "pear, saw.",
     0.4),
    ("open_qa", {"name": "Anna", "fact": "city"},
     "Paris Rome Berlin London Madrid Vienna Oslo Prague Dublin Lisbon Athens Warsaw", 0.2),
    # six of seven words stand where they should
    ("rewrite", {"source": {"name": "Tom", "did": [["sees", "ball"]], "place": "park", "past": False},
                 "before": {"name": "Tom", "did": [["sees", "ball"]], "place": "park", "past": False},
                 "target": {"name": "Tom", "did": [["sees", "ball"]], "place": "park", "past": True}, "what": "past"},
     "Tom saw a kite at the park.", 0.5 * 6 / 7),
])
def test_scores_by_hand(task, item, reply, score):
    assert gold(task, item, reply) == pytest.approx(score)


def test_programs_are_parsed_never_run():
    item = {"ops": [["add", 2], ["add", 3]]}
    for attack in ("__import__('os').getcwd()", "x.__class__", "[x for x in (1,)]", "(lambda: x)()", "x if x else x",
                   "10**10**10", "f(x)"):
        assert gold("coding", item, f"def f(x): return {attack}") <= 0.25


# -------------------------------------------------------------------------------------- dialogues

def test_a_third_of_the_dialogues_goes_on_for_two_to_four_turns():
    rng = random.Random(0)
    turns = Counter(len(dialogue(rng)["turns"]) for _ in range(3000))
    assert set(turns) == {1, 2, 3, 4} and 0.30 < 1 - turns[1] / 3000 < 0.37


def test_task_shares_are_those_asked_for():
    rng = random.Random(0)
    for shares in ("surge", "instructgpt", "preference"):
        counts = Counter(dialogue(rng, shares=shares)["category"] for _ in range(3000))
        total = sum(SHARES[shares].values())
        assert all(abs(counts[task] / 3000 - share / total) < 0.03 for task, share in SHARES[shares].items())


def test_demonstrators_have_one_style_a_dialogue_and_mix_as_stated():
    rng = random.Random(0)
    record = {"category": "classify", "turns": [t for _ in range(3)
                                                for t in dialogue(rng, shares="uniform", long=0)["turns"]]}
    record = next(r for r in (dialogue(rng, long=1) for _ in range(200)) if r["category"] == "open_qa"
                  and len(r["turns"]) > 2)
    replies = [m["content"] for m in demonstrate(record, rng, "terse") if m["role"] == "assistant"]
    assert len(replies) == len(record["turns"]) and all(len(words(r)) == 1 for r in replies)


# --------------------------------------------------------------------------------------- hold-out

def test_every_turn_of_a_dialogue_belongs_to_its_split(corpora):
    for name in ("train", "dev", "test"):
        rng = random.Random(name)
        for _ in range(300):
            record = dialogue(rng, name)
            assert {split(record["category"], t["item"]) for t in record["turns"]} == {name}
    for name in ("dev", "test"):
        assert Counter(r["category"] for r in corpora[name]) == dict.fromkeys(TASKS, 40)


def test_no_evaluation_prompt_occurs_in_any_corpus(corpora):
    """Whole prompts anywhere in a text, and 13 words in a row; pretraining included. Openers such as "Make it two." are
    no content.
    """
    held = [t["user"] for name in ("dev", "test") for r in corpora[name] for t in r["turns"][:1]]
    grams = set().union(*map(build.ngrams, held))
    texts = [r["text"] for r in corpora["pretrain"]] + ["\n".join(m["content"] for m in r["messages"])
                                                        for r in corpora["sft"]]
    texts += ["\n".join(t["user"] for t in r["turns"]) for r in corpora["prompts"]]
    everything = "\n".join(texts)
    assert [p for p in held if p in everything] == []
    assert all(grams.isdisjoint(build.ngrams(text)) for text in texts)


def test_no_held_out_content_occurs_in_any_corpus(corpora):
    held = {key for name in ("dev", "test") for r in corpora[name] for key in build.keys(r)}
    assert len(held) > 400
    for name in ("sft", "pretrain", "prompts"):
        trained = {key for r in corpora[name] for key in (r["keys"] if name != "prompts" else build.keys(r))}
        assert len(trained) > 400 and not held & trained, name
    # held-out demonstrations are from the dev split
    assert {key for r in corpora["sft_dev"] for key in r["keys"]} & held


def test_held_out_sets_are_the_same_for_every_seed_and_data_is_not(tmp_path):
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        build.write_data(build.Config(part="data", more_prompts=10, seed=seed, demos=50, prompts=50),
                         tmp_path / str(seed))
    assert (tmp_path / "1" / "test.jsonl").read_text() == (tmp_path / "2" / "test.jsonl").read_text()
    assert (tmp_path / "1" / "sft.jsonl").read_text() != (tmp_path / "2" / "sft.jsonl").read_text()


def test_the_chat_template_is_never_seen_in_pretraining(corpora):
    assert not any("<|" in r["text"] for r in corpora["pretrain"])


def test_no_grade_leaves_the_world(corpora):
    assert set().union(*(r.keys() for r in corpora["sft"])) == {"messages", "category", "keys"}


# ------------------------------------------------------------------------------------- annotators

def test_annotators_prefer_better_replies_tie_on_close_ones_and_grade_the_margin():
    item = {"ops": [["add", 3], ["multiply", 4]]}
    quiet = pairs.Config(noise=0.0, length_bias=0.0)
    rng = random.Random(0)
    perfect, bare, wrong = "def f(x): return (x + 3) * 4", "(x + 3) * 4", "x"
    assert pairs.annotate("coding", item, [perfect, wrong], rng, quiet) == (0, 4)
    assert pairs.annotate("coding", item, [bare, perfect], rng, quiet) == (1, 2)  # .75 against 1
    assert pairs.annotate("coding", item, [bare, bare + " "], rng, quiet) is None
    biased = pairs.Config(noise=0.0, length_bias=0.2)
    who = {"facts": [["Tom", "red", "kite"]], "about": [0, "who"]}
    assert pairs.annotate("closed_qa", who, ["Tom.", "It is Tom, Tom, Tom, Tom, Tom, yes."], rng, biased) == (1, 2)
    verdicts = [pairs.annotate("coding", item, [perfect, bare], rng, pairs.Config(noise=0.3)) for _ in range(500)]
    assert 0.02 < sum(v is not None and v[0] == 1 for v in verdicts) / 500 < 0.45  # noise: some prefer the bare one


def test_collected_pairs_are_readable_preferences_without_grades(checkpoint, tmp_path, capsys, monkeypatch):
    """A model of canned replies: one prompt in eight gets an answer that never ends, which ends the dialogue
    unrated.
    """
    from data.formats import read
    from data.tokenizer import load_tokenizer
    from data.trees import trees_of
    from model import Sample

    model = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.adopt("zephyr")
    tokenizer.save(model)
    said = ["Tom has a cat.", "red", "1. apple 2. pear", "Otto met a fox at the park. The end."]

    def canned(_, prompts, max_tokens, temperature, n, seed, **rest):
        rng = random.Random(seed)
        return [[Sample([*tokenizer.encode(rng.choice(said)), tokenizer.eos_id], [], i % 8 > 0) for _ in range(n)]
                for i in range(len(prompts))]

    monkeypatch.setattr(pairs, "generate", canned)
    build.write_data(build.Config(part="data", more_prompts=10, demos=10, prompts=200, evals=3), tmp_path)
    ask = {"model": str(model), "device": "cpu"}
    pairs.main(pairs.Config(prompts=str(tmp_path / "prompts.jsonl"), out=str(tmp_path / "pairs.jsonl"), tie=0.0, **ask))
    records, report = read(tmp_path / "pairs.jsonl")
    records = list(records)
    assert len(records) > 50 and not report.rejects and report.format == "preference"
    assert {r["margin"] for r in records} <= {1, 2, 3, 4} and {r["turn"] for r in records} >= {1, 2, 3}
    keys = {"id", "category", "turn", "annotator", "prompt", "chosen", "rejected", "margin"}
    assert all(set(r) == keys and r["chosen"] != r["rejected"] for r in records)
    assert sum(t.pairs for t in trees_of(records, "preference", tokenizer)) == len(records)
    told = capsys.readouterr().out
    assert "unfinished" in told and "identical" in told
    exits(capsys, lambda: pairs.main(pairs.Config(prompts="none.jsonl", **ask)), "none.jsonl: no such file")


# ------------------------------------------------------------------------------------ shipped base

def test_the_shipped_base_says_how_it_was_made_and_fits():
    log = json.loads((BASE / "build.json").read_text())
    assert log["command"].startswith("python -m data.tiny.build") and log["seed"] == 0 and log["tokens"] > 3e7
    assert sum(f.stat().st_size for f in BASE.iterdir()) <= 8_000_000
