"""judge.py from the outside: configs, questions, replies, a whole run on the tiny checkpoint, comparing runs, bad
input."""
import json
import math
import runpy
import sys
from html import unescape

import pytest
from conftest import ROOT, exits, write_jsonl

import judge
from data.tiny import build
from judge import Config
from judging.entries import decode
from judging.gold import interval, sections, summarize
from runtime import load_config


def test_interval_by_hand():
    """60, 62, 64: mean 62, sd 2, t(2) = 4.303, so 4.303 * 2 / sqrt 3 = 4.969."""
    centre, half = interval([60, 62, 64])
    assert centre == 62 and half == pytest.approx(4.9686, abs=1e-3)
    assert math.isnan(interval([5.0])[1])


def graded(*dialogues):
    return [[{"text": "a b", "finished": True, "gold": g} for g in d] for d in dialogues]


def test_a_summary_by_hand():
    """Replies 1, 0 | 0.5 in seed 0 and 1, 1 | 1 in seed 1: 50 and 100 points, mean 75; t(1) = 12.706 times 25 =
    317.65."""
    dialogues = [{"category": "x"}, {"category": "y"}]
    ours, theirs = {0: graded([1, 0], [0.5]), 1: graded([1, 1], [1])}, {0: graded([0, 0], [1]), 1: graded([1, 0], [0])}
    m = summarize(ours, dialogues, theirs)
    assert m["gold"] == 75 and m["gold_by_seed"] == {0: 50, 1: 100} and m["gold_interval"] == pytest.approx(317.65)
    assert m["category"] == {"x": 75, "y": 75} and m["first_turn"] == pytest.approx(87.5) and m["follow_up"] == 50
    assert (m["wins"], m["losses"], m["draws"]) == (3, 1, 2) and m["ended"] == 100 and m["words"] == 2
    assert m["win_rate"] == pytest.approx(100 * 4 / 6)  # 3 wins and 2 halves of 6
    assert summarize(theirs, dialogues, ours)["win_rate"] == pytest.approx(100 - m["win_rate"])
    assert [row[0] for row in sections({"a": m}, "b", 2)[0]["rows"]] == ["a"]


def test_one_seed_gives_the_interval_over_dialogues():
    m = summarize({0: graded([1, 0], [0.5], [0])}, [{"category": "x"}] * 3, {0: graded([1, 0], [0.5], [0])})
    assert m["gold_interval"] == pytest.approx(interval([50, 50, 0])[1]) and m["win_rate"] == 50


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Ten dialogues of the tiny world, one of each task."""
    folder = tmp_path_factory.mktemp("questions")
    build.write_data(build.Config(part="data", more_prompts=10, demos=10, prompts=10, evals=1), folder)
    return str(folder / "test.jsonl")


def recorded_answers(questions, path, text: str) -> str:
    """A file that gives every question the same replies."""
    asked = [json.loads(line) for line in open(questions)]
    return str(write_jsonl(path, [{"id": d["id"], "replies": [text] * len(d["turns"])} for d in asked]))


def test_the_script_judges_base_and_few_shot_and_writes_everything(checkpoint, questions, tmp_path, capsys):
    models = [f"base={checkpoint}", f"few-shot=few-shot:{checkpoint}", f"again={checkpoint}"]
    judge.main(Config(models=models, data=questions, out=str(tmp_path / "out"), seeds=[0, 1], questions=4, max_tokens=4,
                      device="cpu", threads=1, show=2))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["gold"]["base"]["gold_by_seed"] == report["gold"]["again"]["gold_by_seed"]
    assert report["gold"]["again"]["win_rate"] == 50
    replies = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").open()]
    assert len(replies) == 3 * 2 * 4 and all("gold" in r for line in replies for r in line["replies"])
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    shown = report["dialogues"]
    asked = [turn["user"] for line in list(open(questions))[:4:2] for turn in json.loads(line)["turns"]]
    assert [row[0].partition("] ")[2] or row[0] for row in shown["rows"]] == asked
    assert shown["columns"] == ["asked", "base", "few-shot", "again"] and all(row[1] == row[3] for row in shown["rows"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Dialogues side by side" in page and all(row[0] in unescape(page) for row in shown["rows"])
    assert (tmp_path / "out" / "samples.txt").read_text().count("\n[") == 2
    assert "gold: wins against base" in capsys.readouterr().out


def test_a_model_judges_and_is_judged_and_a_second_run_asks_nothing(checkpoint, questions, tmp_path, capsys):
    """An untrained judge mostly says nothing readable: no mean is given, and the run goes through to the end."""
    models = [f"one={checkpoint}", f"two={recorded_answers(questions, tmp_path / 'two.jsonl', 'Yes.')}"]
    settings = dict(models=models, data=questions, out=str(tmp_path / "out"), questions=4, max_tokens=4,
                    judge_max_tokens=4, judges=["gold", f"tiny={checkpoint}"], truth="gold", form="label",
                    wording="bare", trial=3, device="cpu", threads=1, sources=["one=us", "two=them"])
    judge.main(Config(**settings))
    first = (tmp_path / "out" / "report.json").read_text()
    titles = [s["title"] for s in json.loads(first)["sections"]]
    assert {"tiny: wins against one", "tiny: position", "tiny: probes", "Agreement with gold",
            "Self-preference"} <= set(titles)
    calls = len((tmp_path / "out" / "calls.jsonl").read_text().splitlines())
    capsys.readouterr()
    judge.main(Config(**settings))
    assert len((tmp_path / "out" / "calls.jsonl").read_text().splitlines()) == calls
    assert (tmp_path / "out" / "report.json").read_text() == first
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgments.jsonl").open()]
    assert {r["judge"] for r in rows} == {"gold", "tiny"}
    # Judgments written here are read as recorded ones.
    judge.main(Config(judges=[f"again=recorded:{tmp_path / 'out' / 'judgments.jsonl'}"], out=str(tmp_path / "again"),
                      threads=1))
    assert (tmp_path / "again" / "report.html").stat().st_size > 1000


def test_runs_are_compared_from_the_command_line(questions, tmp_path, capsys, monkeypatch):
    models = [f"{name}={recorded_answers(questions, tmp_path / f'{name}.jsonl', name)}" for name in ("one", "two")]
    for name, temperature in (("a", 0.7), ("b", 0.0)):
        judge.main(Config(models=models, data=questions, out=str(tmp_path / name), temperature=temperature,
                          device="cpu"))
    command = ["judge.py", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "judge.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "temperature" in said and "Gold score" in said
    for wrong, fragment in (([*command[:-1], str(tmp_path / "none")], "cannot be read"),
                            (command[:-1], "expected two")):
        monkeypatch.setattr(sys, "argv", wrong)
        exits(capsys, lambda: runpy.run_path(str(ROOT / "judge.py"), run_name="__main__"), fragment)


@pytest.mark.parametrize("key, text, entry", [
    ("models", "SFT=runs/sft/model", ("SFT", "model", "runs/sft/model", "")),
    ("models", "base=few-shot:runs/{seed}/model", ("base", "few-shot", "runs/{seed}/model", "")),
    ("models", "GPT=http://host:8000/v1#gpt", ("GPT", "endpoint", "http://host:8000/v1#gpt", "")),
    ("models", "old=answers.jsonl", ("old", "answers", "answers.jsonl", "")),
    ("judges", "gold", ("gold", "gold", "", "")),
    ("judges", "recorded:votes.jsonl", ("recorded:votes.jsonl", "recorded", "votes.jsonl", "")),
    ("judges", "people=recorded:votes.csv", ("people", "recorded", "votes.csv", "")),
    ("judges", "RM=reward:runs/reward/model", ("RM", "reward", "runs/reward/model", "")),
    ("reward_models", "DPO=dpo:runs/dpo:runs/sft", ("DPO", "dpo", "runs/dpo", "runs/sft")),
    ("choices", "arc=test.jsonl:train.jsonl", ("arc", "answers", "test.jsonl", "train.jsonl")),
    ("attacks", "SFT=tried:all", ("SFT", "model", "tried", "all")),
])
def test_an_entry_is_a_name_a_kind_and_a_place(key, text, entry):
    assert decode(key, text) == entry


def test_recorded_replies_are_read_by_id_and_by_instruction(tmp_path):
    asked = [judge.Question("7", "", ["Hi", "More"]), judge.Question("8", "", ["Why?"]),
             judge.Question("9", "", ["Gone"])]
    file = tmp_path / "a.jsonl"
    file.write_text('{"question_id": 7, "choices": [{"turns": ["one", "two"]}]}\n{"instruction": "Why?", "output": '
                    '"so"}\n')
    assert [[r["text"] for r in said] for said in judge.read_answers(str(file), asked)] == [["one", "two"], ["so"], []]


@pytest.mark.parametrize("line, turns", [
    ('{"question_id": 81, "category": "writing", "turns": ["You have a role.", "Two"]}', ["You have a role.", "Two"]),
    ('{"prompt": "One"}', ["One"]),
    ('{"prompt": [{"role": "user", "content": "One"}]}', ["One"]),
    ('{"instruction": "One", "dataset": "koala"}', ["One"]),
])
def test_questions_of_every_form_are_read(line, turns, tmp_path):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    asked, dialogues = judge.load_questions(str(tmp_path / "q.jsonl"))
    assert asked[0].turns == turns and dialogues is None
    assert judge.load_questions(Config(models=["m=http://x/v1#m"], judges=[], data=str(tmp_path / "q.jsonl"))) == (
        asked, dialogues)


@pytest.mark.parametrize("changes, said", [
    ({"models": []}, "models is empty"),
    ({"models": ["SFT"]}, "'SFT' is not name=..."),
    ({"data": "none.jsonl"}, "none.jsonl: no such file"),
    ({"data": __file__}, "line 1: is no question"),
    ({"baseline": "GPT"}, "baseline is 'GPT', expected one of base"),
    ({"models": ["a=x", "a=y"]}, "a name occurs twice"),
    ({"models": ["a=runs/{sed}/model"]}, "runs/{sed}/model is no folder"),
    ({"seeds": []}, "seeds is empty"),
    ({"temperature": -0.7}, "temperature is -0.7"),
    ({"truth": "people"}, "truth is 'people', expected one of the judges: gold"),
    ({"judges": ["x=recorded:none.jsonl"]}, "none.jsonl: no such file"),
    ({"judges": ["x=nowhere"]}, "judges: nowhere is no folder"),
    ({"preferences": ["SHP"]}, "preferences: 'SHP' is not name=..."),
])
def test_what_the_user_wrote_wrong_is_one_line(changes, said, checkpoint, questions, tmp_path, capsys):
    fields = {"models": [f"base={checkpoint}"], "data": questions, "out": str(tmp_path), "max_tokens": 2}
    exits(capsys, lambda: judge.main(Config(**(fields | changes))), said)


def test_gold_refuses_questions_of_another_world(checkpoint, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text('{"prompt": "Hi"}\n')
    config = Config(models=[f"a={checkpoint}"], data=str(tmp_path / "q.jsonl"), out=str(tmp_path), max_tokens=2,
                    device="cpu")
    exits(capsys, lambda: judge.main(config), "gold grades the tiny world's dialogues")


def test_a_reference_answer_reaches_the_question(checkpoint, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]}\n')
    (tmp_path / "r.jsonl").write_text('{"question_id": 1, "choices": [{"turns": ["2", "4"]}]}\n')
    config = load_config(Config, "", [f"models=[\"m={checkpoint}\"]", f"data={tmp_path / 'q.jsonl'}",
                                      f"references={tmp_path / 'r.jsonl'}"])
    assert judge.load_questions(config.data, config.references)[0][0].references == ["2", "4"]


# -------------------------------------------------------------------- what a report says of its own making

@pytest.fixture
def two_models(tmp_path):
    """Four questions of two categories, and a settings function for two files of answers to them."""
    data = write_jsonl(tmp_path / "q.jsonl", [{"id": str(i), "category": "ab"[i % 2], "prompt": f"Q{i}?"}
                                              for i in range(4)])
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": str(i), "replies": [f"{name} {i}"]} for i in range(4)])

    def settings(out: str, **changes) -> dict:
        return {"models": [f"{name}={tmp_path / name}.jsonl" for name in ("one", "two")], "data": str(data), "show": 0,
                "out": str(tmp_path / out), "device": "cpu", "threads": 1, "judge_max_tokens": 4, **changes}
    return settings


def test_every_setting_that_moves_a_number_is_in_the_report_and_compared(checkpoint, two_models, tmp_path):
    judges = [f"j={checkpoint}"]
    judge.main(Config(**two_models("a", judges=judges)))
    judge.main(Config(**two_models("b", judges=judges, wording="criteria", orders="one", form="label",
                                   judge_max_tokens=3)))
    about = json.loads((tmp_path / "a" / "report.json").read_text())["about"]
    assert {"judges", "form", "wording", "orders", "judge_max_tokens", "max_tokens", "temperature", "date",
            "questions", "questions' hash", "unread at most", "judges: j, hash", "models: one, hash"} <= about.keys()
    assert about["questions"] == 4 and not {"out", "show", "threads", "parallel"} & about.keys()
    differ = judge.report.compare([tmp_path / "a", tmp_path / "b"])["sections"][0]
    assert {row[0]: row[1:] for row in differ["rows"]} == {
        "form": ["pair", "label"], "wording": ["plain", "criteria"], "orders": ["both", "one"],
        "judge_max_tokens": ["4", "3"]}


def test_other_questions_and_other_answers_under_the_same_name_differ(two_models, tmp_path, checkpoint):
    judge.main(Config(**two_models("a", judges=[f"j={checkpoint}"])))
    write_jsonl(tmp_path / "q.jsonl", [{"id": str(i), "prompt": f"Q{i}!"} for i in range(4)])
    write_jsonl(tmp_path / "one.jsonl", [{"id": str(i), "replies": [f"won {i}"]} for i in range(4)])
    judge.main(Config(**two_models("b", judges=[f"j={checkpoint}"])))
    differ = judge.report.compare([tmp_path / "a", tmp_path / "b"])["sections"][0]
    assert [row[0] for row in differ["rows"]] == ["questions' hash", "models: one, hash"]


def test_the_config_of_a_run_repeats_it(checkpoint, two_models, tmp_path):
    config = Config(**two_models("a", judges=[f"j={checkpoint}"], temperatures=["a=0.1"]))
    judge.main(config)
    again = load_config(Config, "", ["--config", str(tmp_path / "a" / "config.toml")])
    assert {key: list(x) if isinstance(x, tuple) else x for key, x in vars(config).items()} == vars(again)


def test_a_category_is_answered_at_its_own_temperature(checkpoint, two_models, tmp_path):
    judge.main(Config(**two_models("a", models=[f"m={checkpoint}"], judges=["r=recorded:" + str(write_jsonl(
        tmp_path / "r.jsonl", [{"prompt": "0", "model": "m", "score": 5, "judge": "x"}]))], max_tokens=2,
        temperatures=["a=0", "c=0.5"])))
    lines = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").open()]
    assert {line["messages"][0]["content"]: line["sampling"]["temperature"] for line in lines} == {
        "Q0?": 0, "Q1?": 0.7, "Q2?": 0, "Q3?": 0.7}


@pytest.mark.parametrize("changes, said", [
    ({"temperatures": ["a=warm"]}, "holds no number"),
    ({"temperatures": ["a=11"]}, "temperatures: a is 11"),
    ({"parallel": 0}, "parallel is 0"),
    ({"timeout_s": 0.0}, "timeout_s is 0"),
    ({"models": ["one=one.jsonl"], "judges": ["http://x/v1#m"], "trial": 3, "marks": True}, "two models' replies"),
])
def test_settings_that_cannot_be_are_refused_before_anybody_is_asked(changes, said, two_models, capsys):
    exits(capsys, lambda: Config(**two_models("a", **changes)), said)


@pytest.mark.parametrize("form", ["pair", "likert", "margin", "label"])
def test_models_that_say_the_same_throughout_make_a_report(form, checkpoint, two_models, tmp_path):
    models = [f"{name}={tmp_path}/one.jsonl" for name in ("one", "two")]
    judge.main(Config(**two_models("a", models=models, judges=[f"j={checkpoint}"], form=form)))
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    section = next(s for s in report["sections"] if s["title"] == "j: wins against one")
    cell = section["rows"][0][1]
    # Four draws: 0.5 -+ 0.5 x 3.8415 / 7.8415.
    assert cell["value"] == 50 and cell["low"] == pytest.approx(25.51, abs=0.01)
