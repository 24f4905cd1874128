"""judging/questions.py: what is asked, and which answer or judgment belongs to which question."""
import gzip
import json

import pytest
from conftest import exits, write_jsonl

import judge
from judge import Config
from judging import recorded
from judging.entries import decode
from judging.questions import load_questions, name_prompts, read_answers, read_said


def asked(tmp_path, records, name="q.jsonl"):
    return load_questions(str(write_jsonl(tmp_path / name, records)))[0]


def answered(tmp_path, records, questions, name="a.jsonl"):
    """The first reply to each question, None for none."""
    found = read_answers(str(write_jsonl(tmp_path / name, records)), questions)
    return [replies[0]["text"] if replies else None for replies in found]


PROMPTS = [{"instruction": f"Prompt {i}"} for i in range(6)]
ANSWERS = [{"id": i, "instruction": f"Prompt {i}", "output": f"answer {i}"} for i in range(6)]
IN_ORDER = [f"answer {i}" for i in range(6)]


def test_a_place_is_no_id(tmp_path, capsys):
    """Questions without ids, answers with ids from 0 and their instructions: the text joins them. Ids alone do not."""
    questions = asked(tmp_path, PROMPTS)
    assert answered(tmp_path, ANSWERS, questions) == IN_ORDER
    assert answered(tmp_path, ANSWERS[::-1], questions) == IN_ORDER
    for key in ("id", "index", "question_id", "uid"):
        bare = [{key: i + 1, "output": f"answer {i}"} for i in range(6)]
        exits(capsys, lambda bare=bare: answered(tmp_path, bare, questions), "answers none of the questions",
              "it holds no instruction")


@pytest.mark.parametrize("theirs", ["id", "question_id", "uid"])
@pytest.mark.parametrize("ours", ["id", "question_id", "uid"])
def test_ids_join_under_whatever_name_and_the_text_is_checked(tmp_path, capsys, ours, theirs):
    questions = asked(tmp_path, [{ours: f"k{i}", "prompt": f"Prompt {i}"} for i in range(6)])
    records = [{theirs: f"k{i}", "output": f"answer {i}"} for i in range(6)]
    assert answered(tmp_path, records[::-1], questions) == IN_ORDER
    with_text = [r | {"instruction": f"Prompt  {i}\n"} for i, r in enumerate(records)]  # white space aside
    assert answered(tmp_path, with_text, questions) == IN_ORDER
    shifted = [{theirs: f"k{i}", "instruction": f"Prompt {(i + 1) % 6}", "output": "x"} for i in range(6)]
    exits(capsys, lambda: answered(tmp_path, shifted, questions), "record 1", "another question than its instruction")


def test_an_index_is_no_name(tmp_path, capsys):
    """index 1 counts a file's records; a question_id 1 is a name. With the text they meet, without it they do not."""
    questions = asked(tmp_path, [{"index": i, "instruction": f"Prompt {i}"} for i in range(6)])
    assert [q.id for q in questions] == list("012345")
    assert answered(tmp_path, [{"index": i, "output": f"answer {i}"} for i in range(6)], questions) == IN_ORDER
    named = [{"question_id": (i + 1) % 6, "output": "x"} for i in range(6)]
    exits(capsys, lambda: answered(tmp_path, named, questions), "none of the questions")
    with_text = [{"question_id": (i + 1) % 6, "instruction": f"Prompt {i}", "output": f"answer {i}"} for i in range(6)]
    assert answered(tmp_path, with_text, questions) == IN_ORDER


def test_duplicates_are_refused_unless_the_questions_are_too(tmp_path, capsys):
    questions = asked(tmp_path, PROMPTS)
    for again in (ANSWERS[2], ANSWERS[2] | {"id": 77}):
        exits(capsys, lambda again=again: answered(tmp_path, [*ANSWERS, again], questions), "record 7",
              "answers again what record 3 does")
    same = [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}]
    exits(capsys, lambda: asked(tmp_path, same), "2 has the id 'a'")
    twice = asked(tmp_path, [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "x"}])
    assert len({q.id for q in twice}) == 3
    said = [{"instruction": t, "output": o} for t, o in (("x", "1"), ("x", "2"), ("y", "3"))]
    assert answered(tmp_path, said, twice) == ["1", "3", "2"]


def test_what_is_not_answered_has_no_reply_and_what_is_not_asked_is_counted(tmp_path, capsys):
    questions = asked(tmp_path, PROMPTS[:3])
    assert answered(tmp_path, [ANSWERS[1], ANSWERS[5]], questions) == [None, "answer 1", None]
    assert "1 of its 2 answers are to none of the 3 questions" in capsys.readouterr().out
    exits(capsys, lambda: answered(tmp_path, ANSWERS[4:], questions), "answers none of the questions")


def test_an_input_belongs_to_its_instruction(tmp_path):
    """As data.formats reads the same records: the input after a blank line, an instance each."""
    records = [{"instruction": "Translate to French", "input": "Good morning", "output": ""},
               {"id": "seed", "instruction": "Correct", "instances": [{"input": "He go", "output": "He goes"},
                                                                      {"input": "I is", "output": "I am"}]},
               {"id": "one", "instruction": "Name a fruit", "instances": [{"input": "", "output": "Plum"}]},
               {"instruction": "Say it", "input": ""}]
    questions = asked(tmp_path, records)
    assert [q.turns[0] for q in questions] == ["Translate to French\n\nGood morning", "Correct\n\nHe go",
                                               "Correct\n\nI is", "Name a fruit", "Say it"]
    assert [q.id for q in questions][1:4] == ["seed/1", "seed/2", "one"]
    assert answered(tmp_path, records[1:3], questions) == [None, "He goes", "I am", "Plum", None]
    french = [{"instruction": "Translate to French", "input": "Good morning", "output": "Bonjour"}]
    assert answered(tmp_path, french, questions)[0] == "Bonjour"


PARTS = {"role": "user", "content": [{"type": "text", "text": "Use ABC"}]}
ARENA = [({"question_id": "q", "category": "arena-hard-v0.1", "cluster": "C", "turns": [{"content": "Use ABC"}]},
          {"question_id": "q", "model_id": "m", "choices": [{"index": 0, "turns": [{"content": "x", "n": 1}]}]}),
         ({"uid": "u", "category": "hard_prompt", "prompt": "Use ABC"},
          {"uid": "u", "model": "m", "messages": [{"role": "user", "content": "Use ABC"},
                                                  {"role": "assistant", "content": {"answer": "x"}}]}),
         ({"index": 3, "dataset": "koala", "instruction": "Use ABC"},
          {"instruction": "Use ABC", "output": "x", "generator": "m"}),
         ({"question_id": 81, "category": "math", "turns": ["Use ABC", "And D"]},
          {"question_id": 81, "choices": [{"turns": ["x", "y"]}]}),
         ({"prompt_id": "f", "category": "chat", "messages": [{"role": "user", "content": "Use ABC"}]},
          {"prompt_id": "f", "prompt": [{"role": "user", "content": "Use ABC"}], "completion": "x"}),
         ({"category": "chat", "messages": [{"role": "user", "content": "Use ABC"}]},
          {"prompt": [{"role": "user", "content": "Use ABC"}], "completion": "x"}),
         ({"id": 1, "category": "chat", "messages": [PARTS]},
          {"id": 1, "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}}]}),
         ({"id": "1", "category": "chat", "prompt": "\n\nHuman: Use ABC\n\nAssistant:"},
          {"id": 1.0, "messages": [PARTS, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}),
         ({"question_id": 1, "text": "Use ABC", "category": "chat"},
          {"question_id": 1, "text": "x", "answer_id": "z", "model_id": "m"}),
         ({"question_id": "1.0", "category": "chat", "turns": '["Use ABC", "And D"]', "reference": '["r", "s"]'},
          {"question_id": 1, "choices": [{"turns": ["x", "y"]}]})]


@pytest.mark.parametrize("question, answer", ARENA)
@pytest.mark.parametrize("form", ["jsonl", "json", "jsonl.gz"])
def test_published_questions_and_answers_are_read(tmp_path, question, answer, form):
    def write(name, record):
        path = tmp_path / f"{name}.{form}"
        text = json.dumps([record] if form == "json" else record, indent=1 if form == "json" else None)
        path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
        return str(path)

    questions, _ = load_questions(write("q", question))
    assert questions[0].turns[0] == "Use ABC" and questions[0].category == question.get("category", "koala")
    path = write("a", answer)
    assert [r["text"] for r in read_answers(path, questions)[0]] == ["x", "y"][:len(questions[0].turns)]
    assert decode("models", f"m={path}").kind == "answers"


@pytest.mark.parametrize("text, turns", [('{"prompt": "one\u2028two"}', ["one\u2028two"]),
                                         ('{"prompt": "one\u0085two"}', ["one\u0085two"]),
                                         ('{"prompt": "Q1"}\n\n{"prompt": "Q2"}\n\n', ["Q1", "Q2"]),
                                         ('\ufeff{"prompt": "Q1"}\r\n{"prompt": "Q2"}\r\n', ["Q1", "Q2"])])
def test_valid_json_lines_are_read(tmp_path, text, turns):
    (tmp_path / "q.jsonl").write_text(text)
    assert [q.turns[0] for q in load_questions(str(tmp_path / "q.jsonl"))[0]] == turns


def test_replies_written_by_a_run_are_read_again(tmp_path):
    """Also those of a question without a reply, and that a reply was cut."""
    questions = asked(tmp_path, [{"id": i, "prompt": f"P{i}"} for i in range(3)])
    rows = [{"id": str(i), "model": "m", "seed": 0, "replies": replies} for i, replies in enumerate(
        ([{"text": "a", "finished": False}], [], [{"text": "", "finished": True}]))]
    path = str(write_jsonl(tmp_path / "replies.jsonl", rows))
    assert read_answers(path, questions) == [rows[0]["replies"], [], rows[2]["replies"]]
    empty = write_jsonl(tmp_path / "none.jsonl", [{"id": 0, "output": None}, {"id": 1, "output": "x"}])
    assert read_answers(str(empty), questions) == [[], [{"text": "x", "finished": True}], []]


def test_thoughts_in_a_files_answers_are_set_aside_as_those_of_a_model_that_is_asked(tmp_path):
    questions = load_questions(str(write_jsonl(tmp_path / "q.jsonl", [{"prompt": f"P{i}"} for i in range(3)])))[0]
    answers = write_jsonl(tmp_path / "a.jsonl", [
        {"prompt": "P0", "output": "<think>Hm.</think>\n\nSo."}, {"prompt": "P1", "output": "<think>It is"},
        {"prompt": "P2", "output": " as it was "}])
    said = read_answers(str(answers), questions)
    assert said == [[{"text": "So.", "finished": True}], [{"text": "", "finished": False}],
                    [{"text": " as it was ", "finished": True}]]


def test_an_id_that_is_unknown_does_not_hide_that_the_text_is_known(tmp_path, capsys):
    """b's question has another id in the answers: that is a mismatch, not an answer to none of the questions."""
    questions = load_questions(str(write_jsonl(tmp_path / "q.jsonl", [{"id": n, "prompt": f"P{n}"} for n in "ab"])))[0]
    answers = [{"id": "a", "prompt": "Pa", "output": "x"}, {"id": "z", "prompt": "Pb", "output": "y"}]
    with pytest.raises(SystemExit):
        read_answers(str(write_jsonl(tmp_path / "a.jsonl", answers)), questions)
    assert "is that of a question with another id than its id 'z'" in capsys.readouterr().err
    answers[1]["prompt"] = "Pz"
    assert read_answers(str(write_jsonl(tmp_path / "b.jsonl", answers)), questions)[1] == []


def test_two_answers_in_one_record_are_refused(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question_id": 1, "choices": [{"turns": ["a"]}, {"turns": ["b"]}]}])
    exits(capsys, lambda: read_said(str(path)), "answers the question '1' 2 times")


def test_what_would_not_be_asked_is_refused(tmp_path, capsys):
    """Also a reference that is no text: it ended in a traceback once the judge was asked."""
    for more in ({"system": "Be a pirate."}, {"system_prompt": "Be a pirate."}, {"history": [["Hi", "Hello"]]}):
        exits(capsys, lambda more=more: asked(tmp_path, [{"prompt": "Hi"} | more]), f"1: has '{next(iter(more))}'")
    assert asked(tmp_path, [{"prompt": "Hi", "system": "", "history": []}])[0].turns == ["Hi"]
    exits(capsys, lambda: asked(tmp_path, [{"prompt": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:"}]),
          "holds a dialogue")
    for reference in (5, [5], {"text": "x"}):
        exits(capsys, lambda r=reference: asked(tmp_path, [{"turns": ["Hi"], "reference": r}]), "1: 'reference' is")
    for turns in ("['A', 'B']", ["A", ""], ["A", None], [5]):
        exits(capsys, lambda t=turns: asked(tmp_path, [{"question_id": 1, "turns": t}]), "line 1", "'turns'")
    assert len({q.id for q in asked(tmp_path, [{"id": "", "prompt": "A"}, {"id": "", "prompt": "B"}])}) == 2


def test_references_that_belong_to_no_question_are_said(tmp_path, capsys):
    for asks in ("Hi", "Ho"):
        path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": asks, "output": "Hello"}])
        load_questions(str(write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Hi"}])), str(path))
        assert ("references to none of the 1 questions asked" in capsys.readouterr().out) == (asks == "Ho")


def test_of_two_replies_neither_is_taken(tmp_path, capsys):
    questions = asked(tmp_path, [{"id": 1, "prompt": "Hi"}])
    both = {"id": 1, "answer": "42", "output": "x"}
    exits(capsys, lambda: answered(tmp_path, [both], questions), "has 'answer' and 'output'", "drop one")
    assert answered(tmp_path, [both | {"answer": None}], questions) == ["x"]
    cut = write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "replies": [{"text": "x", "finished": "False"}]}])
    assert read_answers(str(cut), questions) == [[{"text": "x", "finished": False}]]


def judged(tmp_path, records, name="ann.jsonl"):
    return recorded.read(write_jsonl(tmp_path / name, records))


def annotation(i, **more):
    return {"index": i, "preference": 2 if i < 5 else 1, "len_1": 10, "len_2": 10 + i, **more}


QUESTIONS = [{"index": i, "dataset": "x" if i < 5 else "y", "instruction": f"P{i}"} for i in range(10)]


def test_categories_are_those_of_the_same_index(tmp_path):
    """0 to 4 are of x and won, 5 to 9 of y and lost: x 100, y 0."""
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "ann.jsonl", [annotation(i) for i in range(10)])
    judge.main(Config(judges=[f"v2=recorded:{tmp_path / 'ann.jsonl'}"], data=str(tmp_path / "q.jsonl"),
                      out=str(tmp_path / "out"), show=0, device="cpu", threads=1))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (section,) = [s for s in report["sections"] if s["title"].endswith("by category")]
    assert section["columns"] == ["model", "x", "y"] and section["rows"] == [["ann", 100, 0]]


def test_questions_without_ids_give_categories_by_their_text_alone(tmp_path):
    questions = asked(tmp_path, [{k: v for k, v in q.items() if k != "index"} for q in QUESTIONS[::-1]])
    said = judged(tmp_path, [annotation(i, instruction=f"P{i}") for i in range(10)])
    assert name_prompts(said, questions, "q") == ""
    assert [g["category"] for g in said.games] == ["x"] * 5 + ["y"] * 5
    assert {g["prompt"] for g in said.games} == {q.id for q in questions}
    bare = judged(tmp_path, [annotation(i) for i in range(10)])
    assert "names 0 of the 10 prompts" in name_prompts(bare, questions, "q")
    assert not any("category" in g for g in bare.games)


def test_an_index_that_has_another_text_is_refused(tmp_path, capsys):
    questions = asked(tmp_path, QUESTIONS)
    said = judged(tmp_path, [annotation(i, instruction=f"P{(i + 1) % 10}") for i in range(10)])
    exits(capsys, lambda: name_prompts(said, questions, "q.jsonl"), "another instruction", "q.jsonl")


def test_questions_belong_to_the_judge_whose_items_they_name(tmp_path):
    """MT-Bench's 81 lies within AlpacaEval's 0 to 804, which are indices; and part of the items is not all of them."""
    questions = asked(tmp_path, [{"index": i, "dataset": "koala", "instruction": f"P{i}"} for i in range(100)])
    said = judged(tmp_path, [{"question_id": 81, "model": "m", "judge": ["g", "s"], "turn": 1, "score": 5}])
    assert "names 0 of the 1" in name_prompts(said, questions, "q") and "category" not in said.scores[0]
    few = asked(tmp_path, [{"question_id": 81, "category": "math", "turns": ["P"]}])
    assert name_prompts(said, few, "q") == "" and said.scores[0]["category"] == "math"
    more = judged(tmp_path, [{"question_id": i, "model": "m", "judge": ["g", "s"], "turn": 1, "score": 5}
                             for i in (81, 82)])
    assert "names 1 of the 2" in name_prompts(more, few, "q")
    assert not {str(s["prompt"]) for s in more.scores} & {q.id for q in few}  # or they would meet models' games on 81
    part = judged(tmp_path, [annotation(i, instruction=f"P{i}") for i in range(98, 104)])  # says what was asked
    assert "lacks 4 of the 6" in name_prompts(part, questions, "q")
    assert [g.get("category") for g in part.games] == ["koala"] * 2 + [None] * 4
    votes = judged(tmp_path, [{"model_a": "x", "model_b": "y", "winner": "model_a"}] * 3)
    numbered = asked(tmp_path, [{"id": i, "prompt": f"P{i}"} for i in range(9)])
    assert "names no prompts" in name_prompts(votes, numbered, "q")
