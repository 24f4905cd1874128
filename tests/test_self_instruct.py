import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import exits, write_jsonl
from scripted import Scripted, corrupt, damaged, number, records, survives_kills

from collect import self_instruct
from collect.self_instruct import (
    Config,
    as_prompt,
    instruction_fault,
    main,
    read_input_first,
    read_list,
    read_output_first,
    sound,
)
from collect.synthetic import Run
from data.formats import read
from data.llm import Reply, Request

WORDS = ("add bake count draw explain find guess hear invent join know list mend name open paint quote read sing tell "
         "use visit write apple bread cloud door engine forest garden house island jacket kettle lamp mirror needle "
         "paper queen river stone tree").split()


def says(*parts, words=8) -> str:
    rng = random.Random(number(*parts))
    return " ".join(rng.choice(WORDS) for _ in range(words))


def seeds(path: Path, count=12) -> str:
    tasks = [{"instruction": f"{says('seed', i)} {i}",
              "instances": [{"input": says("in", i) if i % 2 else "", "output": says("out", i)}],
              "is_classification": i % 3 == 0} for i in range(count)]
    return str(write_jsonl(path, tasks))


def reply(request, sampling):
    """Writes what is asked for, with a fault here and there that depends on the request alone."""
    text, n = request.messages[-1]["content"], number(request.messages, request.repeat)
    if n % 8 == 0:
        return "cut in the middle", False
    if text.endswith("Classification:"):
        return " Yes" if n % 3 == 0 else "No"
    if "(Begin with \"Class label:\".)" in text:
        return "".join(f"Class label: {says(n, i, words=1)}\n{says(n, i)}\n" for i in range(1 + n % 7))
    if "(Begin with \"Example 1\".)" in text:
        return "".join(f"Example {i}\nInput: {says(n, i)}\nOutput: {says(n, i, 'out')}\n" for i in range(1, 2 + n % 7))
    return f" {says(n, 0)}\n" + "\n".join(f"{i}. {says(n, i) if n % 5 else 'too short'}" for i in range(10, 15))


@pytest.fixture
def config(tmp_path):
    return Config(seeds=seeds(tmp_path / "seeds.jsonl"), instructions=40, requests=2, out=str(tmp_path / "out"))


def done(text: str) -> Reply:
    return Reply(text, True, 0, 0, 0.0)


# ------------------------------------------------------------------------------------------- parsers

def test_a_list_goes_on_after_the_bare_number():
    """The prompt ends with "9.": what comes first is item 9, unless the reply repeats the number."""
    def found(text):
        return [None if reason else instruction for instruction, reason in read_list(done(text), Config())]

    assert found(" Name a river.\n10. Sing 3. times\n11 . Add 1.5.") == ["Name a river.", "Sing 3. times", "Add 1.5."]
    assert found("9. Name a river.\n10. Sing.") == ["Name a river.", "Sing."]
    assert found("Here are more:\n9. Name a river.") == [None, "Name a river."]
    chatty = "Here are more:\n\n9. Name a river.\n\n10. Sing.\n\nShall I go on?"
    assert found(chatty) == [None, "Name a river.", "Sing.", None]
    assert found("") == [None]
    assert read_list(Reply("1. a\n2. b", False, 0, 0, 0.0), Config()) == [("1. a\n2. b", "cut by length")]


@pytest.mark.parametrize("instruction, reason", [
    ("", "empty"), ("Name a river", "fewer than 4 words"), ("Name a big river", ""), ("a " * 150, ""),
    ("a " * 151, "150 words"),
    ("Describe the Image you see", "cannot hold"), ("Describe an imaginary flowchart today", ""),
    ("Go to the next house", "cannot hold"),
    ("Write a program that adds", "Write a program"), ("WRITE A PROGRAM that adds", "Write a program"),
    ("(Name a big sea)", "punctuation"),
    ("Über die Brücke gehen wir", "ASCII"), ("3 rivers to be named", ""),
])
def test_instructions_are_filtered_in_the_published_order(instruction, reason):
    said = instruction_fault(instruction, Config())
    assert reason in said and bool(reason) == bool(said)


def test_input_first_instances_by_hand():
    two = "Example 1\nInput: 2 + 2\nOutput: 4\n\nExample 2\nCity: Rome\nOutput 2: Italy\nInput: more"
    assert read_input_first(two) == [("2 + 2", "4"), ("City: Rome", "Italy")]
    assert read_input_first("Output: four") == [("", "four")]
    assert read_input_first("Input: 2\nOutput: 4\nExample 2\nInput: 3\nOutput: 9") == [("2", "4"), ("3", "9")]
    assert read_input_first("Example 1\njust an answer") == [("", "just an answer")]
    within = "Example 1\nInput: For Example 3 see\nOutput: An Example"
    assert read_input_first(within) == [("For Example 3 see", "An Example")]
    assert read_input_first("Sure, here you are.") == []


def test_output_first_instances_by_hand():
    """An empty label is an empty output, and does not swallow the next line."""
    two = "Class label: good\nI liked\nit.\n\nClass label: bad\nNo."
    assert read_output_first(two) == [("I liked\nit.", "good"), ("No.", "bad")]
    assert read_output_first("Class label:\nI liked it.") == [("I liked it.", "")]
    assert read_output_first("Sure!\nClass label: good") == [("", "good")] and read_output_first("good") == []


def test_instances_are_filtered_by_hand():
    kept, faults = sound([("a", "b"), ("a", "b"), ("c", "c"), ("d", ""), ("e:", "f"), ("g", "h:"), ("", "x"),
                          ("", "y")])
    assert kept == [("a", "b"), ("", "x"), ("", "y")]
    assert [reason for _, reason in faults] == ["repeated", "input equals output", "empty output", "ends with a colon",
                                                "ends with a colon"]
    kept, faults = sound([("a", "b"), ("c", "d"), ("a", "e")])
    assert kept == [] and len(faults) == 3


def test_all_thirteen_formats_occur_and_hold_everything():
    rng = random.Random(0)
    assert len({as_prompt("Add {them}", "1\n2", rng) for _ in range(300)}) == 7
    bare = {as_prompt("Add {them}", "", rng) for _ in range(300)}
    assert len(bare) == 6 and "Add {them}" in bare
    shown = [as_prompt("Say", "City: Rome\n\nold", rng) for _ in range(300)]
    assert 100 < sum("City" in text for text in shown) < 200 and all("Rome" in text and "old" in text for text in shown)
    assert all("A: 1\nB: 2" in as_prompt("Say", "A: 1\nB: 2", rng) for _ in range(50)), "two field names stay"


# ---------------------------------------------------------------------------------------- end to end

def test_seeds_become_tasks_and_training_records(config, tmp_path, capsys):
    main(config, Scripted(reply))
    tasks, train, dropped = records(config.out, "tasks", "train", "dropped")
    assert len(tasks) > 30 and len({task["instruction"] for task in tasks}) == len(tasks)
    assert set(tasks[0]) == {"id", "instruction", "request", "instances", "is_classification"}
    assert {task["is_classification"] for task in tasks} == {True, False}
    assert all(1 <= len(task["instances"]) <= 5 and task["instruction"][0].isupper() for task in tasks)
    assert len(train) == sum(len(task["instances"]) for task in tasks)
    assert len(list(read(tmp_path / "out" / "train.jsonl")[0])) == len(train)
    reasons = {d["reason"] for d in dropped}
    assert {"cut by length", "fewer than 4 words", "more than 5 instances"} <= reasons
    said = capsys.readouterr().out
    assert f"{len(train)} training records; {len(dropped)} dropped" in said and "instruction: cut by length" in said


def test_prompts_show_eight_seeds_and_later_six_and_two_of_the_models_own(config, tmp_path):
    model = Scripted(reply)
    main(config, model)
    given = [task["instruction"] for task in records(tmp_path, "seeds")[0]]
    asked = [r.messages[0]["content"] for r in model.asked if r.messages[0]["content"].endswith("\n9.")]
    shown = [[line[3:] for line in text.splitlines()[2:-1]] for text in asked]
    assert all(len(set(some)) == 8 for some in shown)
    assert [sum(task in given for task in some) for some in shown[:2]] == [8, 8]
    assert all(sum(task in given for task in some) == 6 for some in shown[4:])


def test_capitals_are_kept(config, tmp_path):
    """str.capitalize would make "NASA" "Nasa", and lower the rest."""
    model = Scripted(lambda r, s: "tell me what NASA and Ada do" if r.messages[0]["content"].endswith("9.") else "No")
    main(replace(config, patience=2), model)
    assert records(config.out, "dropped")[0][0]["most_similar"] == {"Tell me what NASA and Ada do": 1.0}


def test_only_a_yes_makes_a_classification(config):
    """"Yes." is a yes, as chat models write; "Yes and no" and no reply are a no."""
    tasks = [{"instruction": f"task {i}"} for i in range(6)]
    answers = iter(["Yes", " yes.", "YES", "Yes and no", "", None])
    run, seeds = Run(config), self_instruct.load_seeds(config)
    self_instruct.mark_classifications(run, Scripted(lambda r, s: next(answers)), seeds, tasks, config)
    assert [task["is_classification"] for task in tasks] == [True, True, True, False, False, False]


def test_a_reply_cut_by_length_loses_its_last_instance(config):
    tasks, run = [{"id": "a", "instruction": "Add", "is_classification": False}], Run(config)
    cut = Scripted(lambda r, s: ("Example 1\nInput: 1 1\nOutput: 2\nExample 2\nInput: 5 5\nOutput: 1", False))
    self_instruct.add_instances(run, cut, self_instruct.load_seeds(config), tasks, config)
    assert tasks[0]["instances"] == [{"input": "1 1", "output": "2"}]
    assert run.dropped == [{"stage": "instance", "task": "a", "text": ("5 5", "1"), "reason": "cut by length"}]


def test_a_model_that_repeats_itself_ends_the_search(config, tmp_path, capsys):
    model = Scripted(lambda r, s: "Tell me about the sea, please"
                     if r.messages[0]["content"].endswith("9.") else "Yes.")
    main(replace(config, patience=3), model)
    assert "only 1 instructions: 3 batches" in capsys.readouterr().out
    assert len([r for r in model.asked if r.repeat]) == 2 * 4 - 1


def test_a_model_that_never_answers_is_one_line(config, tmp_path, capsys):
    exits(capsys, lambda: main(config, Scripted(lambda r, s: None)), "no request of a batch")


def test_whenever_it_is_killed_it_goes_on_to_the_same_files(config, tmp_path):
    found = survives_kills(lambda model, out: main(replace(config, out=str(out)), model), reply, tmp_path)
    assert {"tasks.jsonl", "train.jsonl", "dropped.jsonl", "replies.jsonl"} <= set(found)
    assert len(found["train.jsonl"]) > 1000


def test_corrupted_replies_are_dropped_with_a_reason(config, tmp_path, capsys):
    """500 corruptions of each kind of reply: nothing raises, nothing is lost, and what is written can be trained on."""
    for seed in range(500):
        said = reply(Request([{"role": "user", "content": "9."}], repeat=seed), None)
        text = corrupt(said if isinstance(said, str) else said[0], seed)
        assert read_list(Reply(text, seed % 7 > 0, 0, 0, 0.0), Config())
        for parse in (read_input_first, read_output_first):
            pairs = parse(corrupt(f"Example 1\nInput: a\nOutput: b\nClass label: c\nd\n{text}", seed))
            kept, faults = sound(pairs)
            assert len(kept) + len(faults) == len(pairs)

    main(replace(config, instructions=150, patience=3), Scripted(damaged(reply)))
    train, report = read(tmp_path / "out" / "train.jsonl")
    assert len(list(train)) > 20 and not report.rejects
    assert "instruction: " in capsys.readouterr().out
    assert all(d["reason"] for d in records(config.out, "dropped")[0])


def test_wrong_seeds_are_one_line_before_anything_is_asked(config, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a"}\n')
    for path, said in ((tmp_path / "bad.jsonl", "bad.jsonl line 1: is no seed"),
                       (tmp_path / "none.jsonl", "no such file"),
                       (seeds(tmp_path / "few.jsonl", 5), "has 5 seeds, expected 8")):
        exits(capsys, lambda path=path: main(replace(config, seeds=str(path))), said)
    exits(capsys, lambda: Config(machine_examples=9), "machine_examples is 9")


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
def test_the_published_seeds_are_read_and_shown_as_published(tmp_path):
    """175 seeds, 26 of them classification: 12 yes and 19 no are shown, 12 input first, 17 output first."""
    config = Config(seeds=str(Path(os.environ["REAL_DATA"]) / "datasets" / "self_instruct" / "seed_tasks.jsonl"))
    found = self_instruct.load_seeds(config)
    assert len(found) == 175 and sum(seed["is_classification"] for seed in found) == 26
    assert self_instruct.instance_prompt(found, False, 12, config).count("Task: ") >= 12
    assert self_instruct.instance_prompt(found, True, 17, config).count("Class label: ") == 17
    model, config = Scripted(lambda r, s: "Yes"), replace(config, out=str(tmp_path / "out"))
    self_instruct.mark_classifications(Run(config), model, found, [dict(found[0])], config)
    shown = model.asked[0].messages[0]["content"]
    assert [shown.count(f"Classification: {word}") for word in ("Yes", "No")] == [12, 19]
