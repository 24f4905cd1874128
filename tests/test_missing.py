"""judging/games.py: what is missing is said, and counts by the rule that was asked for."""
import json

import pytest
import torch
from conftest import write_jsonl
from test_judging import answers_of

import judge
from checkpoints import load_model, save_model
from data.tokenizer import adopt_template, load_tokenizer
from judge import Config
from judging import games, gold, tables
from judging.games import Answers, reward_scores
from model import add_score_head

QUESTIONS = [{"id": str(i), "prompt": f"Question {i}?"} for i in range(30)]


@pytest.fixture
def run(tmp_path, checkpoint):
    """judge.py on recorded answers and a reward model as the judge; the report's sections by title."""
    def sections(**answers):
        settings = {key: answers.pop(key) for key in ("missing", "all_pairs") if key in answers}
        write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
        models = [f"{name}={write_jsonl(tmp_path / f'{name}.jsonl', rows)}" for name, rows in answers.items()]
        judge.main(Config(models=models, judges=[f"rm=reward:{scored(tmp_path, checkpoint)}"],
                          data=str(tmp_path / "q.jsonl"), out=str(tmp_path / "out"), show=0, device="cpu", threads=1,
                          **settings))
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        return {section["title"]: section for section in report["sections"]}
    return sections


def scored(tmp_path, checkpoint):
    """A reward model: the tiny checkpoint with a score head and a template."""
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    add_score_head(model, seed=0)
    adopt_template(model, tokenizer)
    save_model(model, tmp_path / "rm", tokenizer)
    return tmp_path / "rm"


def replies(count, text, start=0):
    return [{"id": str(i), "replies": [f"{text} {i}"]} for i in range(start, start + count)]


def lines(section):
    return {row[0]: dict(zip(section["columns"], row, strict=True)) for row in section["rows"]}


def test_what_was_not_answered_is_said_first(run):
    found = run(A=replies(30, "one"), B=replies(10, "two"))
    assert next(iter(found)) == "Replies" and found["Replies"]["text"].startswith("B answered 10 of 30 questions")
    table = lines(found["Replies"])
    assert [table["B"][key] for key in ("turns asked", "answered", "no reply", "rm: judged")] == [30, 10, 20, 10]
    assert [table["A"][key] for key in ("turns asked", "answered", "no reply", "rm: judged")] == [30, 30, 0, 10]
    assert lines(found["rm: wins against A"])["B"]["n"] == 10


def test_a_question_that_is_not_answered_may_count_as_lost(run):
    """B answers 10 of 30 and wins w of them: w / 10, or w / 30. A, which answered all, has the rest."""
    settings = {"A": replies(30, "one"), "B": replies(10, "two")}
    common, loss = (lines(run(missing=rule, **settings)["rm: wins against A"])["B"] for rule in ("common", "loss"))
    assert (common["n"], loss["n"]) == (10, 30) and loss["wins"] == common["wins"]
    assert loss["losses"] == common["losses"] + 20
    assert loss["win rate, %"]["value"] == pytest.approx(common["win rate, %"]["value"] / 3)


def test_a_model_that_answered_nothing_loses_everything_where_that_is_the_rule(run, tmp_path, checkpoint):
    """Not even one game was judged, and B lost all 30."""
    empty = [{"id": str(i), "replies": []} for i in range(30)]
    found = run(A=replies(30, "one"), B=empty, missing="loss")
    mine = lines(found["rm: wins against A"])["B"]
    assert (mine["win rate, %"]["value"], mine["losses"], mine["n"]) == (0, 30, 30)
    assert "rm: wins against A" not in run(A=replies(30, "one"), B=empty)


def test_a_reward_model_judges_where_a_dialogue_has_no_reply(tmp_path, checkpoint):
    """Templates of the Llama family cannot render an empty dialogue."""
    strict = "{{ messages[0]['content'] }}{% for m in messages[1:] %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (folder := scored(tmp_path, checkpoint)).joinpath("chat_template.jinja").write_text(strict)
    answers = answers_of(3, x=str, y=str)
    answers.said["x", 0][1] = []
    found = reward_scores(str(folder), answers, torch.device("cpu"))
    assert [len(said) for said in found["x", 0]] == [1, 0, 1] and [len(said) for said in found["y", 0]] == [1, 1, 1]


def test_what_neither_answered_is_no_game():
    answers = answers_of(4, x=str, y=str)
    for name, gaps in (("x", (0, 1)), ("y", (1, 2))):
        for i in gaps:
            answers.said[name, 0][i] = []
    rows = games.lost_games("j", answers, "x", False)
    assert [(r["prompt"], r["a"], r["preference"]) for r in rows] == [("q0", "x", 0), ("q2", "x", 1)]
    assert [r["rating"] for r in rows] == [8, 1] and {r["why"] for r in rows} == {"unanswered"}
    marks = games.lost_marks("j", answers)
    assert [(r["model"], r["prompt"], r["score"]) for r in marks] == [("x", "q0", 1), ("x", "q1", 1), ("y", "q1", 1),
                                                                     ("y", "q2", 1)]


def test_unequal_sets_are_named_before_the_ratings(run):
    found = run(A=replies(30, "one"), B=replies(30, "two"), C=replies(5, "three"), all_pairs=True)
    text = found["rm: ratings"]["text"]
    assert text.index("A 30, B 30, C 5") < text.index("Bradley-Terry")
    assert not tables.unequal_sets([{"prompt": 1, "a": "x", "b": "y"}, {"prompt": 1, "a": "x", "b": "z"}])


def test_empty_and_cut_replies_are_counted():
    answers = answers_of(4, x=str, y=lambda i: "" if i else " ok ")
    answers.said["x", 0][2][0]["finished"] = False
    unread = {"judge": "j", "prompt": "q0", "a": "x", "b": "y", "a_first": True, "preference": None}
    judged = {"j": [unread, unread | {"prompt": "q1", "preference": 1.0}]}
    table = lines(games.replies_section(answers, judged, "common"))
    assert (table["x"]["empty"], table["x"]["cut"], table["y"]["empty"], table["y"]["cut"]) == (0, 1, 3, 0)
    assert (table["x"]["j: judged"], table["x"]["j: unread"]) == (1, 1)


def test_two_models_with_the_same_answers_are_named(run):
    found = run(A=replies(30, "one"), B=replies(30, "one"), C=replies(30, "two"))
    assert "A and B gave identical replies throughout" in found["Replies"]["text"]
    assert "C gave" not in found["Replies"]["text"] and "and C" not in found["Replies"]["text"]


def test_marks_are_averaged_over_what_all_models_answered():
    """x: 10 on an easy question and 2 on a hard one; y: 4 on the hard one alone. Of the hard one y is ahead."""
    rows = [{"judge": "j", "prompt": p, "turn": 1, "model": m, "score": s}
            for p, m, s in (("easy", "x", 10), ("hard", "x", 2), ("hard", "y", 4))]
    board = tables.score_sections(rows, "j")[0]
    table = lines(board)
    assert table["x"]["mean"]["value"] == 2 and table["y"]["mean"]["value"] == 4
    assert (table["x"]["n"], table["x"]["left out"], table["y"]["n"]) == (1, 1, 1)
    assert "x 2, y 1" in board["text"]
    apart = tables.score_sections(rows[::2], "j")[0]
    assert [row[1] for row in apart["rows"]] == [None, None] and "nothing to average" in apart["text"]


def test_gold_grades_follow_the_rule_too():
    """Grades of x 1 1 | 1, of y 1 | nothing: in common is one turn, 100 and 100; lost, y has 1 of 3 and wins none."""
    dialogues = [{"category": "a", "turns": [1, 2]}, {"category": "b", "turns": [1]}]

    def run(*counts):
        return [[{"text": "ok", "finished": True} for _ in range(n)] for n in counts]

    answers = Answers([], {("x", 0): run(2, 1), ("y", 0): run(1, 0)})
    grades = {key: [[1.0] * len(d) for d in said] for key, said in answers.said.items()}
    common, loss = (gold.summaries(answers, dialogues, grades, "x", rule) for rule in ("common", "loss"))
    assert [common[m]["gold"] for m in "xy"] == [100, 100] and common["y"]["n"] == 1
    assert [loss[m]["gold"] for m in "xy"] == pytest.approx([100, 100 / 3]) and loss["y"]["n"] == 3
    assert (loss["y"]["losses"], loss["y"]["draws"]) == (2, 1)
    answers.said["y", 0] = grades["y", 0] = [[], []]
    assert gold.summaries(answers, dialogues, grades, "x", "common") == {}
