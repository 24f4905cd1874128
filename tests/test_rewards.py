import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import exits, small_model, write_jsonl

import reward
from checkpoints import load_model, save_model
from data.formats import read
from data.tokenizer import load_tokenizer
from data.trees import trees_of
from judging import rewards
from judging.rewards import (
    SECTIONS,
    SETS,
    SUBSETS,
    accuracy,
    ask,
    board_mean,
    breakdown_section,
    load_scorer,
    preference_accuracy,
    read_rewardbench,
    rewardbench,
    rewardbench_section,
    rewards_section,
    section_scores,
    weighted_mean,
)
from model import add_score_head

real = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")


def fixture(name: str) -> dict:
    return json.loads((Path(os.environ["REAL_DATA"]) / "judge" / "rewardbench" / name).read_text())


def said(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def pair(prompt: str, chosen: str, rejected: str, **more) -> dict:
    return {"prompt": said(prompt), "chosen": chosen, "rejected": rejected, **more}


def by_length(questions: list[dict]) -> dict[str, list[float]]:
    """A scorer that likes words, and answers in another order than it was asked in."""
    return {q["key"]: [float(len(text)) for text in q["answers"]] for q in reversed(questions)}


def sure(share: float) -> dict:
    return {"value": share, "low": share, "high": share}


# ---------------------------------------------------------------------------------------- accuracy

def test_wilson_interval_by_hand():
    """3 of 4, z = 1.959964: centre (0.75 + z²/8) / (1 + z²/4) = 0.627527, half
    z sqrt(0.1875/4 + z²/64) / (1 + z²/4) =
    0.326886."""
    found = accuracy([True, True, True, False], ["a", "b", "c", "d"])
    assert found["value"] == 0.75 and found["n"] == found["prompts"] == 4
    assert found["low"] == pytest.approx(0.300641, abs=1e-6) and found["high"] == pytest.approx(0.954413, abs=1e-6)


def test_pairs_of_one_prompt_are_not_independent():
    """Two prompts, one always a hit, one never: resampled, the mean is 0, 1/2, 1 with odds 1:2:1, so anything is
    possible."""
    found = accuracy([True, True, False, False], ["a", "a", "b", "b"])
    assert (found["value"], found["low"], found["high"], found["n"], found["prompts"]) == (0.5, 0, 1, 4, 2)


def test_a_perfect_score_on_shared_prompts_is_not_certain():
    found = accuracy([True] * 4, ["a", "a", "b", "b"])
    # Wilson's, of two prompts
    assert found["value"] == found["high"] == 1 and found["low"] == pytest.approx(1 / (1 + 1.959964**2 / 2))


def test_no_pair_is_no_accuracy():
    found = accuracy([], [])
    assert math.isnan(found["value"]) and (found["n"], found["prompts"]) == (0, 0)


def test_weighted_mean_by_hand():
    """(3 * 0.5 + 0.9) / 4 = 0.6; below: sqrt((3 * 0.1)² + 0.4²) / 4 = 0.125; above: sqrt((3 * 0.2)² + 0.08²) / 4 =
    0.151327."""
    found = weighted_mean([(3, {"value": 0.5, "low": 0.4, "high": 0.7}), (1, {"value": 0.9, "low": 0.5, "high": 0.98})])
    assert [found[name] for name in ("value", "low", "high")] == pytest.approx([0.6, 0.475, 0.751327], abs=1e-6)


# --------------------------------------------------------------------------------- preference sets

PAIRS = [
    pair("x", "long reply", "short", margin=1, category="chat"),       # hit
    pair("x", "short", "tiny", margin=2, category="chat"),             # hit, shares prompt and a reply with the first
    pair("y", "same", "size", margin=2, category="coding"),            # tie
    pair("z", "bad", "better", category="coding"),                     # miss
]


def test_ties_are_misses_and_counted():
    found = preference_accuracy(PAIRS, by_length)
    assert (found["value"], found["n"], found["prompts"], found["ties"], found["unscored"]) == (0.5, 4, 3, 1, 0)
    assert {m: (f["value"], f["n"]) for m, f in found["by_margin"].items()} == {"1": (1, 1), "2": (0.5, 2)}
    assert {c: (f["value"], f["n"]) for c, f in found["by_category"].items()} == {"chat": (1, 2), "coding": (0, 2)}


def test_a_prompt_is_asked_once_with_each_reply_once():
    asked = []
    preference_accuracy(PAIRS, lambda questions: asked.extend(questions) or by_length(questions))
    assert [q["answers"] for q in asked] == [["long reply", "short", "tiny"], ["same", "size"], ["bad", "better"]]


def test_length_alone_is_the_row_to_beat():
    """Of the four pairs the longer reply is chosen in two, in one they are equal."""
    found = preference_accuracy(PAIRS, rewards.by_length)
    assert (found["value"], found["ties"]) == (0.5, 1)


def test_swapping_chosen_and_rejected_leaves_ties_and_swaps_the_rest():
    swapped = preference_accuracy([p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS], by_length)
    assert (swapped["value"], swapped["ties"]) == (0.25, 1)


def test_a_set_whose_prompts_are_all_too_long_is_the_only_one_lost():
    none = preference_accuracy(PAIRS[:1], lambda questions: {})
    assert (none["n"], none["unscored"]) == (0, 1) and not none["by_margin"]
    board = rewards_section({"rm": {"SHP": preference_accuracy(PAIRS, by_length), "Learn-to-Summarize": none}})
    row = dict(zip(board["columns"], board["rows"][0], strict=True))
    assert row["Learn-to-Summarize, %"] is None and row["SHP, %"]["value"] > 0
    assert row["unscored"] == 1 and row["pairs"] == len(PAIRS)
    breakdown_section({"rm": {"Learn-to-Summarize": none}})


def test_the_order_of_pairs_changes_nothing():
    shuffled = random.Random(0).sample(PAIRS, len(PAIRS))
    assert preference_accuracy(shuffled, by_length) == preference_accuracy(PAIRS, by_length)


def test_turns_of_one_dialogue_are_one_prompt_for_the_interval():
    later = [*said("x"), {"role": "assistant", "content": "short"}, *said("more")]
    found = preference_accuracy([PAIRS[0], {"prompt": later, "chosen": "a", "rejected": "bb"}], by_length)
    assert (found["n"], found["prompts"]) == (2, 1)
    # Of one prompt: 3.8415 / 4.8415 = 0.7935 of others may be at either end, 0.5 -+ 0.5 x 0.7935.
    assert (found["low"], found["high"]) == pytest.approx((0.1033, 0.8967), abs=1e-4)


def test_unscored_pairs_are_counted_and_left_out():
    found = preference_accuracy(PAIRS, lambda questions: by_length(questions[1:]))
    assert (found["value"], found["n"], found["unscored"]) == (0, 2, 2)
    assert preference_accuracy(PAIRS, lambda questions: {})["unscored"] == 4


def test_scores_that_fit_no_question_are_refused():
    question = {"key": "k", "prompt": said("x"), "answers": ["a", "b"]}
    for bad in ({"k": [1.0]}, {"k": [1.0, math.nan]}, {"other": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="finite numbers"):
            ask(lambda _, bad=bad: bad, [question])
    with pytest.raises(ValueError, match="one key"):
        ask(by_length, [question, question])


def test_many_margins_fall_into_quarters():
    """0.1 to 1.6 in steps of 0.1: quantiles 0.475, 0.85, 1.225, four pairs each; a pair without a margin is in none."""
    found = preference_accuracy([pair("x", "long", "s"),
                                 *(pair(str(i), "long", "s", margin=i / 10) for i in range(1, 17))], by_length)
    assert [(label, part["n"]) for label, part in found["by_margin"].items()] == [
        ("0.1 to 0.475", 4), ("0.475 to 0.85", 4), ("0.85 to 1.225", 4), ("1.225 to 1.6", 4)]
    assert found["n"] == 17


def test_the_talks_mean_is_the_plain_mean():
    """(0.66 + 0.678 + 0.802 + 0.743) / 4 = 0.72075, printed 0.721; weighted by size it would be 0.764."""
    (shares,) = rewards.TALK.values()
    found = {name: sure(share) | {"n": n} for name, share,
             n in zip(SETS, shares, (3000, 1140, 11021, 4760), strict=True)}
    assert board_mean(found)["value"] == pytest.approx(0.72075) and f"{board_mean(found)['value']:.3f}" == "0.721"
    del found["SHP"]
    assert board_mean(found) is None


def test_sections_have_the_talks_row_and_a_cell_a_column():
    found = preference_accuracy(PAIRS, by_length)
    section = rewards_section({"all": dict.fromkeys((*SETS, "own"), found), "one": {"own": found}})
    assert all(len(row) == len(section["columns"]) for row in section["rows"])
    everything, one, talk = section["rows"]
    assert everything[5]["value"] == 50 and everything[6] == one[6] and everything[-3:] == [20, 5, 0]
    assert one[1:6] == [None] * 5
    assert talk[0].startswith("falcon-40b-rm v1.0") and talk[1:6] == pytest.approx([66, 67.8, 80.2, 74.3, 72.075])
    parts = breakdown_section({"all": {"own": found}, "none": {}})
    assert all(len(row) == len(parts["columns"]) for row in parts["rows"])
    assert [row[:3] for row in parts["rows"]] == [["own", "all", 4], ["own", "margin 1", 1], ["own", "margin 2", 2],
                                                  ["own", "category chat", 2],
                                                  ["own", "category coding", 2]]
    assert parts["rows"][2][3]["value"] == 50 and parts["rows"][2][4] is None
    json.dumps([section, parts], allow_nan=False)


@real
@pytest.mark.parametrize("file, pairs, shared",
                         [("hh/harmless-base-test-mild.jsonl.gz", 119, 0), ("oasst/en_25_tree.jsonl.gz", 171, 100),
                          ("shp/askculinary_example.jsonl", 1, 0),
                          ("summarize_from_feedback/comparison_example.jsonl", 1, 0)])
def test_published_sets_are_scored_as_they_are(file, pairs, shared):
    """A scorer that prefers the longer reply, over each set of the talk; OASST has many pairs a prompt."""
    records = list(read(Path(os.environ["REAL_DATA"]) / "datasets" / file)[0])
    found = preference_accuracy(records, by_length)
    assert found["n"] == pairs and found["unscored"] == 0 and pairs - found["prompts"] >= shared
    assert found["value"] == sum(len(r["chosen"]) > len(r["rejected"]) for r in records) / pairs


# ------------------------------------------------------------------------------------- checkpoints

QUESTIONS = [{"key": "b", "prompt": said("What is up?"), "answers": ["Nothing.", "The sky is up, and blue.", "Up"]},
             {"key": "a", "prompt": [*said("Hi"), {"role": "assistant", "content": "Yes?"}, *said("Bye")],
              "answers": ["Bye!", "No."]}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, checkpoint) -> dict[str, str]:
    """Random models: a language model, another one, and a reward model."""
    tokenizer, found = load_tokenizer(checkpoint), {}
    tokenizer.adopt("zephyr")
    for name, seed in (("policy", 1), ("ref", 2), ("reward", 3)):
        model = small_model(vocab_size=tokenizer.vocab_size, width=32, dtype=torch.float32, scale=3.0, seed=seed)
        model = add_score_head(model, seed) if name == "reward" else model
        found[name] = str(tmp_path_factory.mktemp("rewards") / name)
        save_model(model, found[name], tokenizer)
    return found


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # these models are too small for two to help


@torch.no_grad()
def one_by_one(path: str, key: str) -> list[float]:
    """Score, or summed log-probability and its length, of every answer to a question: each in a row of its own."""
    tokenizer, model = load_tokenizer(path), load_model(path, dtype=torch.float32)
    question = next(q for q in QUESTIONS if q["key"] == key)
    found = []
    for text in question["answers"]:
        ids, mask = tokenizer.render([*question["prompt"], {"role": "assistant", "content": text}])
        end = len(mask) - mask[::-1].index(True)
        ids, start = torch.tensor([ids[:end]]), end - (mask[:end][::-1] + [False]).index(False)
        if model.config.scored:
            found.append(model.score(ids, torch.ones_like(ids).bool()).item())
        else:
            logprobs = model(ids, torch.ones_like(ids).bool()).log_softmax(-1)[0, start - 1:-1]
            found.append((logprobs.gather(1, ids[0, start:, None]).sum().item(), ids.shape[1] - start))
    return found


def test_shared_prompts_score_as_one_by_one(checkpoints, capsys):
    """reward: the last token's score; logprob: sum / tokens; ref-free: the sum; dpo: sum - reference's sum."""
    names = {"reward": "reward", "logprob": "policy", "ref-free": "policy", "dpo": "policy"}
    found = {kind: load_scorer(kind, checkpoints[name], checkpoints["ref"] if kind == "dpo" else "")(QUESTIONS)
             for kind, name in names.items()}
    for key in ("a", "b"):
        policy, ref = one_by_one(checkpoints["policy"], key), one_by_one(checkpoints["ref"], key)
        assert found["reward"][key] == pytest.approx(one_by_one(checkpoints["reward"], key), abs=1e-4)
        assert found["logprob"][key] == pytest.approx([s / n for s, n in policy], abs=1e-4)
        assert found["ref-free"][key] == pytest.approx([s for s, _ in policy], abs=1e-3)
        assert found["dpo"][key] == pytest.approx([s - r for (s, _), (r, _) in zip(policy, ref, strict=True)], abs=1e-3)
        assert max(found["dpo"][key]) - min(found["dpo"][key]) > 0.1  # not all the same
    assert "2 prompts, 5 replies scored" in capsys.readouterr().out


def test_batch_size_and_order_change_no_score(checkpoints):
    alone = load_scorer("reward", checkpoints["reward"], micro_tokens=1)(QUESTIONS[::-1])
    for key, values in load_scorer("reward", checkpoints["reward"])(QUESTIONS).items():
        assert alone[key] == pytest.approx(values, abs=1e-5)


def test_an_empty_reply_is_scored(checkpoints):
    question = {"key": "x", "prompt": said("x"), "answers": ["", "word"]}
    empty, word = load_scorer("reward", checkpoints["reward"])([question])["x"]
    assert math.isfinite(empty) and empty != word


def test_a_policy_against_itself_ties_everywhere(checkpoints):
    found = preference_accuracy(PAIRS, load_scorer("dpo", checkpoints["policy"], checkpoints["policy"]))
    assert (found["value"], found["ties"]) == (0, 4)


def test_replies_cut_to_the_same_tokens_tie_and_long_prompts_go_unscored(checkpoints, capsys):
    texts = ["word " * 20 + "good", "word " * 20 + "bad"]
    prompt = len(load_tokenizer(checkpoints["reward"]).render(said("x"), add_generation_prompt=True)[0])
    scorer = load_scorer("reward", checkpoints["reward"], max_length=prompt + 10)
    found = preference_accuracy([pair("x", *texts), pair("x, but far too long " * 20, *texts)], scorer)
    assert (found["value"], found["ties"], found["n"], found["unscored"]) == (0, 1, 1, 1)
    assert "tokens: 2; left out, their prompt being longer: 2" in capsys.readouterr().out


def test_accuracy_is_that_of_the_training_scripts_report(checkpoints):
    rng = random.Random(0)
    words = [" ".join(rng.choices(["cat", "runs", "blue", "to", "the", "house", "seven"], k=rng.randint(2, 6)))
             for _ in range(60)]
    records = [pair(f"{i} {words[i]}", words[20 + i] + "!", words[40 + i], margin=1 + i % 3) for i in range(20)]
    trees = trees_of(records, "preference", load_tokenizer(checkpoints["reward"]))
    model = load_model(checkpoints["reward"], dtype=torch.float32)
    theirs = reward.report(trees, reward.all_scores(model, trees, 4096, torch.device("cpu")))
    ours = preference_accuracy(records, load_scorer("reward", checkpoints["reward"]))
    assert ours["value"] == theirs["accuracy"] and ours["n"] == 20 and 0 < ours["value"] < 1
    assert {m: [part["value"], part["n"]] for m, part in ours["by_margin"].items()} == theirs["by_margin"]


def test_wrong_scorers_are_one_line(checkpoints, capsys):
    exits(capsys, lambda: load_scorer("elo", checkpoints["reward"]), "'elo' is unknown", "ref-free")
    exits(capsys, lambda: load_scorer("dpo", checkpoints["policy"]), "names no reference")
    exits(capsys, lambda: load_scorer("reward", checkpoints["reward"], checkpoints["ref"]), "takes no reference")
    exits(capsys, lambda: load_scorer("reward", checkpoints["policy"]), "has no score head")
    exits(capsys, lambda: load_scorer("dpo", checkpoints["policy"], checkpoints["reward"]), checkpoints["reward"],
          "has a score head")


# ------------------------------------------------------------------------------------- RewardBench

def test_sections_and_final_scores_by_hand():
    """Chat: (100 * 1 + 258 * 0.5) / 358 = 0.639665. Prior 0.8 and 0.4: plain mean 0.6. Others 0.5: sum of sections
    2.139665;
    (2.139665 + 0.3) / 4.5 = 0.542148, (2.139665 + 0.6) / 5 = 0.547933, 2.139665 / 4 = 0.534916."""
    subsets = {name: sure(0.5) for name in SUBSETS} | {"alpacaeval-easy": sure(1.0)}
    scores = section_scores(subsets, {"shp": sure(0.8), "summarize": sure(0.4)})
    found = {name: part["value"] for name, part in scores.items()}
    assert found == pytest.approx({"Chat": 0.639665, "Chat Hard": 0.5, "Safety": 0.5, "Reasoning": 0.5,
                                   "prior sets": 0.6, "score, prior sets count 1/2": 0.542148,
                                   "score, prior sets count 1": 0.547933, "score, no prior sets": 0.534916}, abs=1e-6)
    del subsets["hep-go"]
    found = section_scores(subsets)
    assert [name for name, part in found.items() if part] == ["Chat", "Chat Hard", "Safety"]


def test_math_prm_weighs_as_much_as_all_code():
    """The 447 pairs count as 984: right there and wrong in code is 0.5, not 447 / 1431."""
    subsets = {name: sure(float(name == "math-prm")) for name in SUBSETS}
    assert section_scores(subsets)["Reasoning"]["value"] == 0.5
    assert [sum(counts.values()) for counts in SECTIONS.values()] == [358, 456, 740, 1968]
    assert sum(SUBSETS.values()) == 2538 + 447


@real
def test_sections_are_those_of_the_benchmarks_code():
    constants = fixture("constants.json")
    assert {name: list(counts) for name, counts in SECTIONS.items()} == constants["subset_mapping"]
    assert {name: n for counts in SECTIONS.values() for name, n in counts.items()} == constants["example_counts"]


@real
def test_gpm_gemma_2b_gets_its_published_sections():
    subsets = {name: sure(share) for name, share in fixture("GPM-Gemma-2B.json").items() if name in SUBSETS}
    found = section_scores(subsets)
    expected = {"Chat": 78.4916, "Chat Hard": 66.2281, "Safety": 84.3243, "Reasoning": 80.4656,
                "score, no prior sets": 77.3774}
    assert {name: round(100 * found[name]["value"], 4) for name in expected} == expected


@real
def test_32_models_of_the_paper_come_out_within_a_tenth():
    """From the subset columns of tables 8, 11 and 12, rounded to a tenth, to their average column."""
    tables, seen = fixture("paper_tables_visible.json"), 0
    for title, section in (("Table 8 Chat", "Chat"), ("Table 11 Reasoning", "Reasoning"),
                           ("Table 12 Prior sets", "prior sets")):
        assert len(tables[title]["rows"]) == 32
        for average, *shares in tables[title]["rows"].values():
            parts = {name: sure(share) for name, share in zip(tables[title]["columns"][1:], shares, strict=True)}
            found = section_scores({}, parts) if section == "prior sets" else section_scores(parts)
            assert found[section]["value"] == pytest.approx(average, abs=0.1)
            seen += 1
    assert seen == 96


def rows_1() -> list[dict]:
    """RewardBench with two rows a subset: the longer reply is chosen, but in hep-go once, where both are as long."""
    rows = [{"prompt": f"{subset} {i}", "chosen": "right one", "rejected": "wrong", "subset": subset, "id": i}
            for subset in SUBSETS for i in range(2)]
    next(row for row in rows if row["subset"] == "hep-go")["rejected"] = "wrong one"
    return rows


def test_rewardbench_from_rows(tmp_path):
    """hep-go 0.5, the others 1: Reasoning (1968 - 82) / 1968 = 0.958333, the score without prior sets (3 + 0.958333) /
    4."""
    rows = rows_1()
    questions = read_rewardbench(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = rewardbench(questions, by_length)
    assert found["subsets"]["hep-go"]["value"] == 0.5 and found["ties"] == 1 and found["unscored"] == 0
    assert found["scores"]["Reasoning"]["value"] == pytest.approx(1886 / 1968)
    assert found["scores"]["score, no prior sets"]["value"] == pytest.approx((3 + 1886 / 1968) / 4)
    assert found["scores"]["prior sets"] is None
    assert found["missing"]["math-prm"] == 445 and found["missing"]["donotanswer"] == 134
    random.Random(0).shuffle(rows)
    assert rewardbench(read_rewardbench(write_jsonl(tmp_path / "shuffled.jsonl", rows)),
                       by_length)["scores"] == found["scores"]
    section = rewardbench_section({"length": found, "again": found})
    priors = dict.fromkeys(rewards.PRIOR, sure(0.2))
    assert rewardbench(questions, by_length, priors
                       | {"our own": sure(0.9)})["scores"]["prior sets"]["value"] == pytest.approx(0.2)
    assert rewardbench(questions, by_length, {"our own": sure(0.9)})["scores"]["prior sets"] is None
    assert section["title"] == "RewardBench" and all(len(row) == 3 for row in section["rows"])
    assert dict(row[:2] for row in section["rows"])["Reasoning"]["value"] == pytest.approx(100 * 1886 / 1968)
    assert dict(row[:2] for row in section["rows"])["- hep-go"]["value"] == 50 and "445 of math-prm" in section["text"]
    assert "length: 1 ties, 0 unscored" in section["text"]
    json.dumps(section, allow_nan=False)


@pytest.mark.parametrize("change, words", [
    ({"subset": "chat"}, "its subset is unknown"),
    ({"subset": ["donotanswer"]}, "its subset is unknown"),
    ({"chosen": None}, "is no text"),
    ({"rejected": ["b"]}, "is no text"),
    ({"prompt": ""}, "line 2"),
    ({"id": 1}, "occurs twice"),
    ({"subset": "Ties"}, "its subset is unknown"),
])
def test_bad_rows_are_one_line(tmp_path, capsys, change, words):
    row = {"prompt": "x", "chosen": "a", "rejected": "b", "subset": "donotanswer", "id": 1}
    file = write_jsonl(tmp_path / "rows.jsonl", [row, row | {"id": 2} | change])
    exits(capsys, lambda: read_rewardbench(file), str(file), words)
