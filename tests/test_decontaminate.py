import gzip
import json
import os
import random
from pathlib import Path

import pytest
from conftest import exits

from collect.decontaminate import Index, Item, find, hits_of, main, normalise, read_benchmark
from data.formats import read

real = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")

# Twenty words.
QUESTION = "Which of the four rivers that cross the old town of Brimley flows north, and since when has it done so?"


def index_of(*texts: str, ngram: int = 8):
    return Index([Item("b", str(i), normalise(text)) for i, text in enumerate(texts)], ngram)


def rule_of(text: str, *items: str, ngram: int = 8) -> str | None:
    """The strongest rule by which a text is a hit."""
    found = hits_of({"text": text}, index_of(*items, ngram=ngram))
    return max(found["b"].values(), key=lambda hit: hit.strength()).rule if found else None


def asked(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# ----------------------------------------------------------------------------------------- the rules

def test_words_are_lower_case_runs_of_letters_and_digits():
    assert normalise("Don't  STOP_now: 3.5 kg\nof “tea”—") == ("don", "t", "stop", "now", "3", "5", "kg", "of", "tea")
    assert normalise("ﬁne ＡＢＣ") == ("fine", "abc")
    assert normalise("Où est-il? Где он") == ("où", "est", "il", "где", "он")
    assert normalise("?!  --") == ()


def test_case_and_punctuation_do_not_hide_a_copy():
    assert rule_of(QUESTION.upper().replace(",", " ...").replace("?", "!!"), QUESTION) == "exact"


def test_the_whole_item_inside_a_text_is_contained():
    assert rule_of(f"Tell me. {QUESTION} Answer in one word.", QUESTION) == "contained"
    # 4 words
    assert rule_of("Please suggest a vegan dessert for ten guests.", "Suggest a vegan dessert!") == "contained"


def test_items_of_under_four_words_count_only_when_they_are_the_whole_text():
    assert rule_of("Well, tell me a joke, please.", "Tell me more") is None
    assert rule_of("He said: solve this equation now", "Solve this equation") is None
    assert rule_of("SOLVE this equation.", "Solve this equation") == "exact"


def test_eight_words_in_a_row_are_a_hit_and_seven_are_not():
    words = QUESTION.split()
    assert rule_of("So " + " ".join(words[5:13]) + " indeed", QUESTION) == "8-gram"
    assert rule_of("So " + " ".join(words[5:12]) + " indeed", QUESTION) is None


def test_thirteen_words_in_a_row_are_told_from_eight():
    words = QUESTION.split()
    assert rule_of("So " + " ".join(words[2:15]), QUESTION) == "13-gram"
    assert rule_of("So " + " ".join(words[2:14]), QUESTION) == "8-gram"
    assert rule_of("So " + " ".join(words[2:15]), QUESTION, ngram=13) == "13-gram"
    assert rule_of("So " + " ".join(words[2:14]), QUESTION, ngram=13) is None
    # shorter than 13
    assert rule_of("well " + " ".join(words[:12]) + " yes", " ".join(words[:12]), ngram=13) == "contained"


def test_the_longest_row_of_words_is_what_is_quoted():
    words = QUESTION.split()
    said = " ".join(["So", *words[9:18], "or", *words[:10], "or", *words[9:17]])
    (hit,) = find(normalise(said), index_of(QUESTION))
    assert hit.matched == normalise(" ".join(words[:10]))


def test_n_grams_that_stand_apart_in_the_item_make_no_longer_one():
    """The item holds each of the seven 8-grams of fourteen words, parted by an x: no nine of these words are in a row
    there.
    """
    words = [f"w{k}" for k in range(14)]
    assert rule_of(" ".join(words), " x ".join(" ".join(words[k:k + 8]) for k in range(7))) == "8-gram"


def test_a_paraphrase_is_missed():
    """The known limit of every n-gram rule: same question, other words."""
    assert rule_of("Name the river in Brimley's historic centre whose water runs northwards, and the year this began.",
                   QUESTION) is None


def test_words_at_the_border_of_two_turns_are_not_in_a_row():
    words = QUESTION.split()
    record = {"messages": asked(" ".join(words[:6]), " ".join(words[6:12]))}
    assert hits_of(record, index_of(QUESTION)) == {}
    assert hits_of({"messages": asked(" ".join(words[:12]), "yes")}, index_of(QUESTION))


def test_every_text_of_a_record_is_looked_at():
    index = index_of(QUESTION)
    thought = {"role": "assistant", "content": "x", "reasoning_content": f"They ask: {QUESTION}"}
    for record in ({"messages": asked("hi", QUESTION)}, {"messages": [*asked("hi"), thought]},
                   {"prompt": asked(QUESTION), "chosen": "a", "rejected": "b"},
                   {"prompt": asked("x"), "chosen": "a", "rejected": f"so {QUESTION}"},
                   {"prompt": asked("x"), "answers": ["a", QUESTION], "ranks": [0, 1]}, {"text": QUESTION}):
        assert hits_of(record, index), record
    assert hits_of({"prompt": asked("x"), "chosen": "a", "rejected": "b", "note": QUESTION}, index) == {}


def test_an_opening_that_ten_thousand_items_share_costs_no_10_000_hits():
    """It is traced to 20 of them, not to all, which would be 10,000 hits a record; an item of its own is still found by
    its own words.
    """
    opening = "Read the passage below and choose the one answer that fits best:"
    index = index_of(*(f"{opening} number {i} of many things called {i * 7} and {i}" for i in range(10_000)))
    assert len(list(find(normalise(f"{opening} something else"), index))) == 20
    found = list(find(normalise(f"{opening} number 7000 of many things called 49000 and 7000"), index))
    assert [hit.rule for hit in found if hit.item == 7000] == ["exact", "contained"]


def test_random_texts_agree_with_brute_force():
    """Small vocabularies, so that everything happens: a rule holds exactly if its sentence in the module's docstring
    does.
    """
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        item = [rng.choice("abcd") for _ in range(rng.randint(1, 24))]
        text = [rng.choice("abcd") for _ in range(rng.randint(0, 20))]
        at = rng.randint(0, len(text))
        cut = sorted(rng.randint(0, len(item)) for _ in range(2))
        text[at:at] = item if rng.random() < 0.5 else item[cut[0]:cut[1]]
        if rng.random() < 0.2:
            text = item

        def shared(n: int, item=item, text=text) -> bool:
            grams = {tuple(item[i:i + n]) for i in range(len(item) - n + 1)}
            return any(tuple(text[i:i + n]) in grams for i in range(len(text) - n + 1))

        held = len(item) >= 4 and any(text[i:i + len(item)] == item for i in range(len(text)))
        expected = ("exact" if text == item else "contained" if held else "13-gram" if shared(13)
                    else "8-gram" if shared(8) else None)
        assert rule_of(" ".join(text), " ".join(item)) == expected, (text, item)
        seen.add(expected)
    assert seen == {"exact", "contained", "13-gram", "8-gram", None}


def test_a_length_of_n_gram_that_nobody_published_is_refused():
    with pytest.raises(ValueError, match="expected 8 or 13"):
        index_of(QUESTION, ngram=5)


# ------------------------------------------------------------------------------------ the command

def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(tmp_path: Path) -> tuple[str, str, str]:
    train = [{"messages": asked(f"question {i} about nothing", "an answer"), "id": f"r{i}"} for i in range(6)]
    train[2]["messages"][0]["content"] = QUESTION
    train[4]["messages"][1]["content"] = f"You mean: {QUESTION} Well. {'One two three four five six seven eight'}"
    bench = write(tmp_path / "bench.jsonl", [{"prompt": "Something else that is asked nowhere"},
                                             {"prompt": QUESTION, "id": "river"}])
    other = write(tmp_path / "other.jsonl", [{"task": "One two three four five six seven eight nine"},
                                             {"task": "and another one"}])
    return write(tmp_path / "train.jsonl", train), bench, f"{other}:task"


def test_the_command_lists_what_it_removed_and_why(tmp_path, capsys):
    train, bench, other = files(tmp_path)
    main([train, "--against", bench, other, "--out", str(tmp_path / "clean.jsonl"), "--removed",
          str(tmp_path / "removed.jsonl")])
    said = " ".join(capsys.readouterr().out.split())
    assert "6 records (messages), 2 hold an item, 4 do not" in said and "clean.jsonl: 4 records" in said
    assert [r["id"] for r in lines(tmp_path / "clean.jsonl")] == ["r0", "r1", "r3", "r5"]
    assert lines(tmp_path / "clean.jsonl")[1] == lines(Path(train))[1]
    question = " ".join(normalise(QUESTION))
    assert lines(tmp_path / "removed.jsonl") == [
        {"record": 3, "id": "r2", "benchmark": bench, "item": "river", "items": 1, "rule": "exact",
         "matched": question},
        {"record": 5, "id": "r4", "benchmark": bench, "item": "river", "items": 1, "rule": "contained",
         "matched": question},
        {"record": 5, "id": "r4", "benchmark": other, "item": "1", "items": 1, "rule": "8-gram",
         "matched": "one two three four five six seven eight"}]


def test_without_out_nothing_is_written(tmp_path, capsys):
    train, bench, _ = files(tmp_path)
    before = sorted(tmp_path.iterdir())
    main([train, "--against", bench])
    assert sorted(tmp_path.iterdir()) == before and "wrote" not in capsys.readouterr().out


def test_unreadable_training_records_are_reported(tmp_path, capsys):
    train, bench, _ = files(tmp_path)
    Path(train).write_text(Path(train).read_text() + "{broken\n")
    main([train, "--against", bench, "--out", str(tmp_path / "c.jsonl"), "--removed", str(tmp_path / "r.jsonl")])
    said = " ".join(capsys.readouterr().out.split())
    assert "left out unread: 1 records or parts of one, the first at line 7" in said
    assert len(lines(tmp_path / "c.jsonl")) == 4


def test_unreadable_records_of_a_benchmark_are_reported(tmp_path, capsys):
    bench = write(tmp_path / "b.jsonl", [{"prompt": QUESTION}, {"prompt": ""}])
    Path(bench).write_text(Path(bench).read_text() + "{broken\n")
    assert len(read_benchmark(bench)) == 1 and "2 of its records are unread" in capsys.readouterr().out
    assert len(read_benchmark(f"{bench}:prompt")) == 2
    assert "b.jsonl: 1 of its records are unread and not looked for, the first is not JSON" in capsys.readouterr().out


def test_what_the_user_wrote_wrong_is_one_line(tmp_path, capsys):
    train, bench, other = files(tmp_path)
    exits(capsys, lambda: main([train, "--against", bench, "--out", "c.jsonl"]), "--removed")
    exits(capsys, lambda: main([train, "--against", bench, "--removed", train]), "overwrite")
    exits(capsys, lambda: main([train, "--against", bench, "--removed", str(tmp_path / "x"), "--out",
                                str(tmp_path / "x")]), "overwrite")
    exits(capsys, lambda: main([train, "--against", other.replace(":task", ":text")]),
          "no record has text under 'text'", "FILE:field")
    exits(capsys, lambda: main([train, "--against", other.removesuffix(":task")]), "other.jsonl", "FILE:field")
    exits(capsys, lambda: main([train, "--against", str(tmp_path / "none.jsonl")]), "none.jsonl", "no such file")


# ---------------------------------------------------------------------------------------- real data

def dataset(name: str) -> str:
    return str(Path(os.environ["REAL_DATA"]) / name)


@real
def test_alpaca_eval_holds_the_sets_it_was_made_of():
    """Measured on 805 prompts: 80 are Vicuna's; 251 hold a user-oriented instruction; 8-grams find 237 of those,
    13-grams 154.

    With [a-z0-9] as the only letters 46 would equal one; one of these has a Chinese character after it, and is
    contained.
    """
    with gzip.open(dataset("judge/alpaca_eval_v1/instructions.jsonl.gz"), "rt") as file:
        records = [{"text": json.loads(line)["instruction"]} for line in file]
    vicuna = read_benchmark(dataset("datasets/vicuna_bench/question.jsonl"))
    assert len(vicuna) == 80
    index = Index(vicuna)
    assert sum(any(hit.rule == "exact" for hits in hits_of(record, index).values() for hit in hits.values())
               for record in records) == 80
    oriented = read_benchmark(dataset("datasets/self_instruct/user_oriented_instructions.jsonl") + ":instruction")
    assert len(oriented) == 252
    index = Index(oriented)
    rules = [{hit.rule for hits in hits_of(record, index).values() for hit in hits.values()} for record in records]
    assert sum("exact" in r for r in rules) == 45 and sum(bool(r & {"exact", "contained"}) for r in rules) == 251
    for n, count in ((8, 237), (13, 154)):
        grams = Index(oriented, n).grams
        words = [normalise(record["text"]) for record, r in zip(records, rules, strict=True) if r]
        assert sum(any(w[i:i + n] in grams for i in range(len(w) - n + 1)) for w in words) == count


@real
def test_ultra_eval_holds_all_of_vicunas_questions():
    index = Index(read_benchmark(dataset("datasets/vicuna_bench/question.jsonl")))
    found = set()
    for record in read(dataset("datasets/ultrachat/ultra_eval.json"))[0]:
        for hits in hits_of(record, index).values():
            found |= {hit.item for hit in hits.values() if hit.rule == "exact"}
    assert len(found) == 80


@real
def test_benchmarks_are_read_in_their_own_formats():
    """MT-Bench: both turns of 80 questions. GSM8K: questions, not answers. TruthfulQA's csv: its questions. MMLU by its
    field.
    """
    for name, count in (("datasets/mt_bench/question.jsonl", 160), ("datasets/gsm8k/test_300.jsonl", 300),
                        ("datasets/truthfulqa/TruthfulQA_100.csv", 100),
                        ("datasets/multiple_choice/arc_challenge_100.jsonl", 100),
                        ("datasets/red_team/xstest_safe_prompts.csv", 250),
                        ("judge/multiple_choice/mmlu_dev.jsonl.gz:question", 30)):
        assert len(read_benchmark(dataset(name))) == count, name
    assert read_benchmark(dataset("datasets/mt_bench/question.jsonl"))[1].words[:3] == ("rewrite", "your", "previous")
