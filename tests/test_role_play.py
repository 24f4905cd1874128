from dataclasses import replace

import pytest
from conftest import exits, write_jsonl
from scripted import Scripted, corrupt, damaged, number, records, survives_kills

from collect import role_play
from collect.role_play import DONE, Config, main, read_tasks, termination
from data.formats import read


def speaker(request) -> str:
    """Whose turn a request asks for."""
    if request.messages[0]["role"] != "system":
        return "ideas" if "numbered list" in request.messages[0]["content"] else "specifier"
    return "user" if "you instruct, I carry out" in request.messages[0]["content"] else "assistant"


def reply(request, sampling):
    """A dialogue that ends after some rounds in one of several ways, by the request alone."""
    who, n = speaker(request), number(request.messages, request.repeat, request.tag)
    if who == "ideas":
        return "Here:\n" + "\n".join(f"{i}. Plan thing {n % 100 + i}" for i in range(1, 4 if n % 5 else 3))
    if who == "specifier":
        return f"Plan thing {n % 1000} for May."
    if n % 31 == 0:
        return "cut in the", False
    if who == "user":
        return DONE if n % 7 == 0 else "Well" if n % 5 == 0 else f"Instruction: do {n % 100}\nInput: None"
    return f"Solution: {n % 100} Next request."


@pytest.fixture
def config(tmp_path):
    return Config(dialogues=9, tasks=3, out=str(tmp_path / "out"))


def run(config: Config, reply=reply) -> tuple[list[dict], list[dict], Scripted]:
    model = Scripted(reply)
    main(config, model, model)
    return *records(config.out, "train", "dropped"), model


def script(said: list, answered: list, tmp_path, **settings) -> tuple[list[str], str, list[str]]:
    """One dialogue whose two sides say these things: messages, how it ended, and who was asked."""
    ideas = write_jsonl(tmp_path / "ideas.jsonl",
                        [{"assistant_role": "Baker", "user_role": "Cafe owner", "task": "Plan a menu"}])
    sides = {"user": list(said), "assistant": list(answered), "specifier": ["Plan a rye menu"]}
    config = Config(ideas=str(ideas), out=str(tmp_path / "out"), **settings)
    train, dropped, model = run(config, lambda request, sampling: sides[speaker(request)].pop(0))
    asked = [speaker(r) for r in model.asked[1:]]
    if not train:
        return [], dropped[-1]["reason"].removeprefix("no round: "), asked
    return [m["content"] for m in train[0]["messages"]], train[0]["termination_reason"], asked


# ---------------------------------------------------------------------------------------- the rules

DO = "Instruction: do it\nInput: None"
SO = "Solution: done. Next request."


@pytest.mark.parametrize("said, answered, kept, reason", [
    ([DO, DONE], [SO], 2, "task done"),                                             # 6: nobody answers
    ([DO, f"{DO} {DONE}"], [SO], 2, "task done"),
    ([DO, (DO, False)], [SO], 2, "user ended"),                                     # 1: cut at max_tokens
    ([DO, DO], [SO, (SO, False)], 2, "assistant ended"),
    ([DO, DO], [SO, None], 2, "assistant ended"),                                   # no reply
    ([DO, "  "], [SO], 2, "user ended"),
    ([DO, "Hm", "Hm", "Hm"], [SO] * 3 + [SO], 6, "no instruction"),                 # 2: three rounds running
    (["Hm", "Hm", DO, "Hm", "Hm", DONE], [SO] * 5, 10, "no instruction"),           # 2 comes before 6
    (["Hm", "Hm", DO, DONE], [SO] * 3, 6, "task done"),
    ([DO, DO], [SO, "Instruction: no, you!"], 2, "roles flipped"),                  # 3
    ([DO] * 4, ["Thank you. " + SO] * 4, 6, "politeness"),                          # 4: four rounds running
    (["Goodbye. " + DO, DO, DO, DO], [SO, "You're WELCOME", "As a language model", "bye"], 6, "politeness"),
    ([DO] * 5 + [DONE], ["Thanks"] * 3 + [SO] + ["Thanks"], 10, "task done"),       # a round without sets it back
    ([DO], ["Instruction: thank you"], 0, "roles flipped"),
])
def test_rules_end_a_dialogue_in_their_order(said, answered, kept, reason, tmp_path):
    messages, why, _ = script(said, answered, tmp_path)
    assert (len(messages), why) == (kept, reason)


def test_a_dialogue_has_at_most_forty_messages_or_as_many_as_asked_for(tmp_path):
    for most, kept in ((40, 40), (5, 4)):
        (tmp_path / str(most)).mkdir()
        messages, why, asked = script([DO] * 20, [SO] * 20, tmp_path / str(most), max_messages=most)
        assert (len(messages), why) == (kept, "max messages") and asked == ["user", "assistant"] * (kept // 2)


def test_politeness_counts_a_round_once():
    """Four listed words in one round are one polite round."""
    dialogue = {"idle": 0, "polite": 0}
    assert termination(dialogue, DO + " thank you, goodbye, welcome", "bye", Config()) == "" and dialogue["polite"] == 1


def test_each_side_is_told_its_role_and_sees_the_other_as_user(tmp_path):
    ideas = write_jsonl(tmp_path / "ideas.jsonl", [{"assistant_role": "Ba{k}er", "user_role": "Owner", "task": "Plan"}])
    sides = {"user": ["Instruction: one", DONE], "assistant": ["Solution: 1"], "specifier": ["Plan {it}"]}
    _, _, model = run(Config(ideas=str(ideas), out=str(tmp_path / "out")),
                      lambda request, sampling: sides[speaker(request)].pop(0))
    specifier, first, answer, second = (r.messages for r in model.asked)
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in second[2:]] == ["Instruction: one", "Solution: 1"] and first == second[:2]
    assert [m["role"] for m in answer] == ["system", "user"] and answer[1]["content"] == "Instruction: one"
    for told in (answer[0]["content"], second[0]["content"]):
        assert "Ba{k}er" in told and "Owner" in told and "Plan {it}" in told
    assert DONE in second[0]["content"] and "Next request." in answer[0]["content"]
    assert "50 words" in specifier[0]["content"]


# ------------------------------------------------------------------------------------------ the tasks

def test_a_task_list_has_exactly_as_many_tasks():
    assert read_tasks("Sure, 2. of all:\n1. One\n2. Two\n   and more\n3. Three", 3) == ["One", "Two and more", "Three"]
    for text, said in (("1. One\n2. Two", "2 tasks, not 3"), ("2. One\n3. Two\n4. Three", "0 tasks"), ("", "0 tasks"),
                       ("1. One\n2.  \n3. Three", "an empty task"), ("1. One\n2. Two\n3. Three\n4. Four", "4 tasks")):
        with pytest.raises(ValueError, match=said):
            read_tasks(text, 3)


def test_ideas_of_role_pairs_become_dialogues(config, tmp_path, capsys):
    train, dropped, model = run(config)
    asked = [speaker(r) for r in model.asked]
    assert asked.count("ideas") == 3 and 3 < len(train) <= 9
    assert len(list(read(tmp_path / "out" / "train.jsonl")[0])) == len(train)
    for record in train:
        assert record["messages"][-1]["role"] == "assistant"
        assert 0 <= record["num_messages"] - len(record["messages"]) <= 1
        assert record["specified_task"].endswith("for May.")
        assert record["assistant_role"] in role_play.TEXTS["assistant_roles"]
    assert f"{len(train)} training records; {len(dropped)} dropped" in capsys.readouterr().out


def test_nobody_plays_both_sides(config, tmp_path):
    assistants, users = (role_play.TEXTS[f"{side}_roles"] for side in ("assistant", "user"))
    assert not set(assistants) & set(users) and len(role_play.load_ideas(config)) == len(assistants) * len(users) == 400


def test_the_user_may_be_another_model(config, tmp_path):
    one, other = Scripted(reply), Scripted(reply)
    other.name = "other"
    main(config, one, other)
    assert {speaker(r) for r in other.asked} == {"user"} and "user" not in {speaker(r) for r in one.asked}


def test_whenever_it_is_killed_it_goes_on_to_the_same_files(config, tmp_path):
    found = survives_kills(lambda model, out: main(replace(config, out=str(out)), model, model), reply, tmp_path)
    assert found["train.jsonl"] and found["dropped.jsonl"]


def test_corrupted_replies_are_dropped_with_a_reason(config, tmp_path):
    """500 task lists, most messages of 200 dialogues: nothing raises, every dialogue ends, all can be trained on."""
    for seed in range(500):
        text = corrupt("Here:\n1. One\n2. Two\n3. Three", seed)
        try:
            assert len(read_tasks(text, 3)) == 3
        except ValueError as reason:
            assert str(reason) == "an empty task" or "tasks, not 3" in str(reason)

    def broken(request, sampling):
        return (damaged(reply) if number(request) % 3 else reply)(request, sampling)

    train, dropped, model = run(replace(config, dialogues=300), broken)
    read_back, report = read(tmp_path / "out" / "train.jsonl")
    assert len(model.asked) > 500 and len(list(read_back)) == len(train) > 20 and not report.rejects
    assert all(d["reason"] for d in dropped)
    assert {"no instruction", "user ended"} <= {r["termination_reason"] for r in train}


# -------------------------------------------------------------------------------------------- config

def test_what_a_user_gets_wrong_is_one_line(config, tmp_path, capsys):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"task": "a"}])
    for change, said in (({"ideas": str(bad)}, "bad.jsonl line 1: is no idea"),
                         ({"ideas": "none.jsonl"}, "no such file")):
        exits(capsys, lambda change=change: main(replace(config, **change)), said)
    exits(capsys, lambda: Config(max_messages=1), "max_messages is 1")
