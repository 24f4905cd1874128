import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BASE, exits, write_jsonl
from scripted import Scripted, corrupt, damaged, files, number, records, survives_kills

from collect import ultrachat
from collect.synthetic import Run
from collect.ultrachat import Config, main, read_items, without_courtesy
from data.formats import read
from data.llm import Sampling

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def reply(request, sampling):
    """Lists where a list is asked for, else a sentence that says who speaks; a few are cut."""
    text, n = request.messages[-1]["content"], number(request.messages, request.repeat, request.tag)
    if "numbered list" in text:
        return "Sure:\n" + "\n".join(f"{i}. thing {n % 97} {i}?" for i in range(1, 8)), n % 9 > 0
    who = "user" if request.messages[0]["content"].startswith("Play a person") else "assistant"
    if who == "user" and n % 17 == 0:
        return "Thank you so much! Have a nice day."
    return f"{who} says {n % 1000}.", n % 23 > 0


@pytest.fixture
def config(tmp_path):
    topics = tmp_path / "topics.txt"
    topics.write_text("Sea\n\nSky\n")
    return Config(topics=str(topics), dialogues=12, subtopics=3, questions=3, related=2, out=str(tmp_path / "out"))


def run(config: Config, reply=reply) -> tuple[list[dict], list[dict], Scripted]:
    model = Scripted(reply)
    main(config, model, model)
    return *records(config.out, "train", "dropped"), model


# ------------------------------------------------------------------------------------------- parsers

def test_items_by_hand():
    assert read_items("Sure!\n1. One\n 2) \"Two\"\n- three\n* **Four**\n\n3.5 m\n5.\nend") == (
        ["One", "Two", "three", "Four"], ["Sure!", "3.5 m", "5.", "end"])


@pytest.mark.parametrize("turn, left", [
    ("Thank you so much! Have a nice day.", ""), ("Thanks. But why is it blue?", "But why is it blue?"),
    ("Why? Thanks!", "Why?"),
    ("Thanks, can you also name a river?", "Thanks, can you also name a river?"),
    ("Thanks, now shorter", "Thanks, now shorter"),
    ("Wow, that's really helpful! And at night?", "And at night?"),
    ("Thankless work: how to quit it?", "Thankless work: how to quit it?"),
    ("Goodbye for now.", ""), ("Great stories begin at sea.", "Great stories begin at sea."),
])
def test_courtesy_is_cut_and_wishes_stay(turn, left):
    assert without_courtesy(turn) == left


# ---------------------------------------------------------------------------------------- end to end

def test_questions_become_dialogues_of_three_to_seven_rounds(config, tmp_path, capsys):
    train, dropped, _ = run(config)
    assert len(train) + sum(d["stage"] == "dialogue" for d in dropped) == 12 and len(train) > 4
    sizes = [len(record["messages"]) / 2 for record in train]
    assert min(sizes) >= 3 and max(sizes) <= 7 and len(set(sizes)) > 1
    assert {record["about"][0] for record in train} == {"Sea", "Sky"}
    assert {len(record["about"]) for record in train} == {2, 3}
    for record in train:
        said = [m["content"].split()[0] for m in record["messages"][1:]]
        assert said == ["assistant", "user"] * (len(said) // 2) + ["assistant"]
    assert len(list(read(tmp_path / "out" / "train.jsonl")[0])) == len(train)
    assert {"cut by length", "not an item of the list", "repeated"} & {d["reason"] for d in dropped}
    assert f"{len(train)} training records; {len(dropped)} dropped" in capsys.readouterr().out


def test_to_the_model_that_plays_the_user_the_roles_are_swapped(config, tmp_path):
    _, _, model = run(config)
    asked = [r.messages for r in model.asked if r.messages[0]["content"].startswith("Play a person")
             and len(r.messages) == 5]
    assert asked
    for messages in asked:
        assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "user"]
        assert [m["content"].split()[0] for m in messages[2:]] == ["assistant", "user", "assistant"]


def test_a_list_grows_only_from_as_many_parents_as_dialogues_are_wanted(config, tmp_path):
    model = run(replace(config, dialogues=1))[2]
    assert len([r for r in model.asked if "numbered list" in r.messages[-1]["content"]]) == 3


def test_thirty_topics_ask_for_eleven_hundred_subtopics():
    assert [len(set(ultrachat.TEXTS[key])) for key in ("topics", "kinds")] == [30, 20]
    assert 30 * Config().subtopics == 1110


def test_more_than_ten_items_are_asked_for_in_several_requests(config, tmp_path):
    silent, run = Scripted(lambda r, s: None), Run(config)
    assert ultrachat.lists(run, silent, ["a", "b"], 37, "stage") == [[], []]
    assert [r.repeat for r in silent.asked] == [0, 1, 2, 3] * 2
    assert len(run.dropped) == 8 and {d["reason"] for d in run.dropped} == {"no reply"}


def test_a_list_that_was_cut_loses_its_last_item(config):
    cut, run = [("1. one\n2. tw", False), "1. One\n2. three\n3. four"], Run(config)
    model = Scripted(lambda r, s: cut[r.repeat])
    assert ultrachat.lists(run, model, ["a"], 11, "stage") == [["one", "three", "four"]]
    assert [(d["text"], d["reason"]) for d in run.dropped] == [("tw", "cut by length"), ("One", "repeated")]


def test_a_reply_that_was_cut_ends_the_dialogue_before_its_round(config, tmp_path):
    """Two dialogues of three rounds, the last reply of each cut: two rounds stay, which is enough here."""
    config = replace(config, sector="openings", fewest_rounds=2, most_rounds=3)
    train, dropped, _ = run(config,
                            lambda r, s: ("so", len(r.messages) < 5 or r.messages[0]["content"].startswith("Play")))
    assert [len(r["messages"]) for r in train] == [4, 4] and {d["reason"] for d in dropped} <= {"cut by length"}


def test_writing_makes_most_instructions_more_detailed(config, tmp_path):
    config = replace(config, sector="writing", topics="", instructions=8, dialogues=40)
    train, dropped, model = run(config)
    details = [r for r in model.asked if "more detail" in r.messages[-1]["content"]]
    assert 24 < len(details) < 39 and {len(r["messages"]) for r in train} <= {4, 6, 8}
    first = [record["messages"][0]["content"] for record in train]
    assert any(text.startswith("assistant says") for text in first) and any(text.startswith("thing") for text in first)


def test_openings_of_ones_own_are_taken_as_they_are(config, tmp_path):
    train, _, model = run(replace(config, sector="openings"))
    assert {r["messages"][0]["content"] for r in train} <= {"Sea", "Sky"} and train
    assert not any("numbered list" in r.messages[-1]["content"] for r in model.asked)


def test_materials_are_joined_to_their_questions(config, tmp_path):
    passages = write_jsonl(tmp_path / "m.jsonl", [{"text": f"Passage {i} tells {{of}} the sea."} for i in range(6)])
    train, _, _ = run(replace(config, sector="materials", materials=str(passages)))
    assert train
    assert all("tells {of} the sea." in r["messages"][0]["content"] and "thing" in r["messages"][0]["content"]
               for r in train)


@pytest.mark.parametrize("sector", ["questions", "writing"])
def test_whenever_it_is_killed_it_goes_on_to_the_same_files(sector, config, tmp_path):
    config = replace(config, sector=sector, instructions=4, dialogues=5)
    found = survives_kills(lambda model, out: main(replace(config, out=str(out)), model, model), reply, tmp_path,
                           deaths=4)
    assert found["train.jsonl"] and found["dropped.jsonl"]


def test_corrupted_replies_are_dropped_with_a_reason(config, tmp_path):
    """500 lists and over 500 turns: nothing raises, no line of a list is lost, all can be trained on."""
    for seed in range(500):
        text = corrupt("Sure:\n1. one\n2. two\n3. three", seed)
        items, others = read_items(text)
        assert len(items) + len(others) == sum(bool(line.strip()) for line in text.splitlines()) and all(items)
        without_courtesy(text)

    train, dropped, model = run(replace(config, topics="", dialogues=120), damaged(reply))
    read_back, report = read(tmp_path / "out" / "train.jsonl")
    assert len(model.asked) > 500 and len(list(read_back)) == len(train) > 10 and not report.rejects
    assert len(train) + sum(d["stage"] == "dialogue" for d in dropped) == 120 and all(d["reason"] for d in dropped)


# ------------------------------------------------------------------------------------------- review

@pytest.fixture
def person(monkeypatch):
    """Answers the prompts of the terminal from a list, and counts them; an empty list is the end of the input."""
    words: list[str] = []

    def answer(prompt):
        if not words:
            raise EOFError
        return words.pop(0)

    monkeypatch.setattr("builtins.input", answer)
    return words


def reviewed(config: Config) -> Config:
    return replace(config, review=True, dialogues=2, fewest_rounds=1, most_rounds=1)


def plain(request, sampling):
    if "numbered list" in request.messages[-1]["content"]:
        return "1. How deep is it?\n2. Who lives there?"
    return f"about {request.messages[-1]['content']}"


def test_a_person_keeps_rephrases_and_drops(config, tmp_path, person, capsys):
    """The first dialogue is kept after a wrong key; the second is rephrased, shown again, and dropped."""
    person += ["?", "k", "r", "", "How salty is the sea?", "d"]
    train, dropped, model = run(reviewed(config), plain)
    assert not person and len(train) == 1
    assert [d["reason"] for d in dropped if d["stage"] in ("review", "reply")] == ["rephrased", "dropped by a person"]
    assert "assistant: about How salty is the sea?" in capsys.readouterr().out


def test_the_rephrased_question_is_what_is_learned(config, tmp_path, person):
    person += ["r", "How salty is the sea?", "k", "k"]
    train, _, _ = run(reviewed(config), plain)
    said = [[m["content"] for m in r["messages"]] for r in train]
    assert ["How salty is the sea?", "about How salty is the sea?"] in said and len(said) == 2


def test_a_dialogue_dropped_late_is_dropped_whole(config, tmp_path, person):
    """One round was drawn for one of them and two for the other, whose second reply is dropped."""
    person += ["k", "k", "d"]
    train, _, _ = run(replace(reviewed(config), most_rounds=2, sector="openings", seed=3), plain)
    assert not person and [len(r["messages"]) for r in train] == [2]


def test_decisions_are_kept_when_the_person_leaves(config, tmp_path, person, capsys):
    config = reviewed(config)
    person += ["k"]
    with pytest.raises(SystemExit) as left:
        run(config, plain)
    assert left.value.code == 2 and "more decisions are needed" in capsys.readouterr().err
    with (tmp_path / "out" / "replies.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    person += ["k"]
    train, _, _ = run(config, plain)
    found = files(tmp_path / "out")
    assert len(train) == 2 and not person
    run(config, plain)  # everything is decided
    assert files(tmp_path / "out") == found


def test_rephrasing_back_and_forth_ends(config, tmp_path, person):
    person += ["r", "A?", "r", "B?", "r", "A?", "k", "k"]
    train, _, model = run(reviewed(config), plain)
    assert not person and "A?" in [r["messages"][0]["content"] for r in train]
    assert len({r.tag for r in model.asked if r.messages[-1]["content"] == "A?"}) == 2, "the same words are asked anew"


# -------------------------------------------------------------------------------------------- config

def test_what_a_user_gets_wrong_is_one_line(config, tmp_path, capsys):
    for change, said in (({"topics": "none.txt"}, "topics=none.txt: cannot be read"),
                         ({"sector": "materials"}, "materials=: no such file"),
                         ({"topics": str(BASE / "tokenizer.model")}, "cannot be read")):
        exits(capsys, lambda change=change: main(replace(config, **change)), said)
    exits(capsys, lambda: Config(detailed=2), "detailed is 2")
    exits(capsys, lambda: Config(fewest_rounds=5, most_rounds=3), "most_rounds is 3")
    assert Sampling().temperature == Config().temperature == 1.0


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
def test_the_published_topics_and_passages_are_read():
    data = Path(os.environ["REAL_DATA"]) / "datasets"
    assert len(ultrachat.load_about(Config(topics=str(data / "ultrachat" / "meta_topics.txt")))) == 30
    assert len(ultrachat.load_about(Config(sector="materials",
                                           materials=str(data / "materials" / "c4_60.jsonl")))) == 60
