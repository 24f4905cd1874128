import gzip
import json
import os
import random
from pathlib import Path

import pytest
from conftest import BASE, exits, write_jsonl

from data.formats import FORMATS, PUBLISHED, main, read, recognise, view
from data.preferences import overall_score
from data.records import FORMS, Reject

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_the_first_record_tells_the_format(tmp_path):
    for record, name in (({"messages": [HI, HELLO]}, "messages"),
                         ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference"),
                         ({"text": "Once."}, "text")):
        records, report = read(write(tmp_path / f"{name}.jsonl", record))
        assert len(list(records)) == 1 and report.format == name and not report.rejects


def test_preferences_come_in_four_shapes_and_leave_in_one(tmp_path):
    shapes = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "margin": 3},
        {"prompt": [HI], "chosen": "Hello", "rejected": "Go"},
        {"prompt": [HI], "chosen": [HELLO], "rejected": [HELLO | {"content": "Go"}]},
        {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, HELLO | {"content": "Go"}]},
    ]
    records = list(read(write(tmp_path / "p.jsonl", *shapes))[0])
    assert all((r["prompt"], r["chosen"], r["rejected"]) == ([HI], "Hello", "Go") for r in records)
    assert records[0]["margin"] == 3


def test_compressed_files_and_empty_lines_are_read(tmp_path):
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    assert [r["text"] for r in read(tmp_path / "d.jsonl.gz")[0]] == ["one", "two"]


def test_other_keys_travel_along(tmp_path):
    (record,) = read(write(tmp_path / "m.jsonl", {"messages": [HI, HELLO], "category": "chat", "id": 7}))[0]
    assert record["category"] == "chat" and record["id"] == 7


@pytest.mark.parametrize("record, reason", [
    ("not json", "is not JSON"),
    ("[1, 2]", "is a JSON list"),
    ({"messages": []}, "expected a list of messages"),
    ({"messages": "Hi"}, "expected a list of messages"),
    ({"messages": [HI]}, "ends with a user turn"),
    ({"messages": [HELLO]}, "where user is due"),
    ({"messages": [HI, HI]}, "where assistant is due"),
    ({"messages": [HI, {"role": "bot", "content": "x"}]}, "role 'bot'"),
    ({"messages": [HI, {"role": "assistant", "content": "  "}]}, "'messages.content' is empty"),
    ({"messages": [HI, {"role": "assistant", "content": 3}]}, "expected text"),
    ({"messages": [HI, {"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
    ({"messages": [{"role": "system", "content": "s"}]}, "no user turn"),
])
def test_a_bad_dialogue_is_reported_with_its_line_and_the_others_are_kept(record, reason, tmp_path):
    good = {"messages": [HI, HELLO]}
    records, report = read(write(tmp_path / "m.jsonl", good, record, good))
    assert len(list(records)) == 2 and report.read == 3
    ((line, said),) = report.rejects
    assert line == 2 and reason in said


@pytest.mark.parametrize("change, reason", [
    ({"rejected": ""}, "'rejected' is empty"),
    ({"rejected": "Hello"}, "'chosen' equals 'rejected'"),
    ({"rejected": None}, "expected text"),
    ({"chosen": [HI, HELLO], "rejected": [HI | {"content": "Ho"}, HELLO | {"content": "Go"}]},
     "disagree on what precedes the reply"),
    ({"rejected": [HI | {"content": "Ho"}, HELLO | {"content": "Go"}]}, "disagree on what precedes the reply"),
    ({"prompt": [HI | {"content": "Ho"}], "chosen": [HI, HELLO], "rejected": [HI, HELLO | {"content": "Go"}]},
     "disagree"),
    ({"prompt": [HI, HELLO]}, "ends with a reply"),
    ({"prompt": 5}, "expected a list of messages"),
    ({"margin": "big"}, "'margin' is"),
    ({"margin": -1}, "'margin' is -1"),
])
def test_a_bad_pair_is_reported(change, reason, tmp_path):
    good = {"prompt": [HI], "chosen": "Hello", "rejected": "Go"}
    records, report = read(write(tmp_path / "p.jsonl", good, good | change))
    assert len(list(records)) == 1 and report.rejects[0][0] == 2 and reason in report.rejects[0][1]


def test_training_refuses_a_file_with_one_bad_line_in_ten_thousand(tmp_path, capsys):
    good = json.dumps({"messages": [HI, HELLO]})
    path = write(tmp_path / "m.jsonl", *[good] * 6000, '{"messages": [', *[good] * 4000)
    records, report = read(path)
    assert len(list(records)) == 10_000
    exits(capsys, report.refuse, "m.jsonl line 6001: is not JSON")


def test_empty_binary_and_missing_files_are_one_line(tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary.jsonl").write_bytes(b"\x89PNG\xff\xfe" * 40)
    for name, said in (("empty", "is empty"), ("binary", "is not UTF-8 text")):
        records, report = read(tmp_path / f"{name}.jsonl")
        list(records)
        exits(capsys, report.refuse, said)
    exits(capsys, lambda: read(tmp_path / "none.jsonl"), "no such file")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-9])
    exits(capsys, lambda: list(read(tmp_path / "cut.jsonl.gz")[0]), "cut.jsonl.gz: cannot be read")
    exits(capsys, lambda: read(write(tmp_path / "x.jsonl", {"text": "a"}), "csv"), "format 'csv' is unknown")


def test_the_command_lists_rejects_and_keeps_the_good(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "m.jsonl", {"messages": [HI, HELLO]}, "{", {"messages": [HI]})
    monkeypatch.setattr("sys.argv", ["formats", str(path), "--out", str(tmp_path / "good.jsonl")])
    main()
    said = capsys.readouterr().out
    assert "line 2: is not JSON" in said and "format messages, 3 read, 1 used, 2 rejected" in said
    assert len((tmp_path / "good.jsonl").read_text().splitlines()) == 1


def test_rankings_and_prompts_are_read_and_bad_ranks_reported(tmp_path):
    good = {"prompt": "Hi", "answers": ["Hello!", "Hm."], "ranks": [0, 1]}
    bad = [{"ranks": [0]}, {"ranks": [1, 1]}, {"ranks": [0, -1]}, {"ranks": [0, 1.5]}, {"answers": ["Hello!", ""]},
           {"prompt": ""},
           {"ranks": [0, 2**40]}]
    file = write_jsonl(tmp_path / "r.jsonl", [good, *(good | change for change in bad)])
    records, report = read(file)
    assert list(records) == [good | {"prompt": [{"role": "user", "content": "Hi"}]}] and report.format == "ranking"
    assert [line for line, _ in report.rejects] == [2, 3, 4, 5, 6, 7, 8]
    records, report = read(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi", "id": 1}]))
    assert list(records) == [{"prompt": [{"role": "user", "content": "Hi"}], "id": 1}] and report.format == "prompt"


# ------------------------------------------------------------------------------------- files of every kind

TWO = [{"text": "one"}, {"text": "two"}]


def written(path: Path, data: str | bytes) -> Path:
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name, data", [
    ("lines.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
    ("lines.jsonl.gz", '{"text": "one"}\n{"text": "two"}'),
    ("lines.json", '{"text": "one"}\n\n{"text": "two"}'),
    ("marked.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n'),
    ("array.json", json.dumps(TWO)),
    ("array.json.gz", json.dumps(TWO, indent=2)),
    ("array.jsonl", "\n " + json.dumps(TWO)),
    ("array.json", '[\n{"text": "one"},\n{"text": "two"}\n]\n'),
    ("table.csv", 'text\r\none\r\n"two"\r\n'),
    ("text.txt", "one\r\ntwo"),
])
def test_lines_arrays_tables_and_texts_are_read_as_what_they_are(name, data, tmp_path):
    records, report = read(written(tmp_path / name, data))
    assert list(records) == TWO and not report.rejects and (report.read, report.used, report.out) == (2, 2, 2)


def test_an_object_over_several_lines_is_one_record_and_a_bare_string_is_a_prompt(tmp_path):
    records, report = read(written(tmp_path / "one.json", json.dumps({"messages": [HI, HELLO]}, indent=1)))
    assert list(records) == [{"messages": [HI, HELLO]}] and report.read == 1
    records, report = read(written(tmp_path / "s.jsonl", '"Hi"\n""\n5\n{"prompt": "Hi"}\n'))
    assert list(records) == [{"prompt": [HI]}] * 2
    assert [place for place, _ in report.rejects] == [2, 3] and report.kinds == {"empty text": 1, "not an object": 1}
    records, report = read(write(tmp_path / "m.jsonl", {"messages": [HI, HELLO]}, '"Hi"'))
    assert len(list(records)) == 1 and "is a JSON str, expected an object" in report.rejects[0][1]


@pytest.mark.parametrize("name, data", [
    ("blank.jsonl", '\n\n{"text": "one"}\n{\n{"text": "two"}\n'),
    ("list.jsonl", '["x"]\n{"text": "one"}\n\n\n{"text": "two"}\n'),
    ("half.json", '{"text": "ze\n{"text": "one"}\n{"text": "two"}\n'),
])
def test_a_broken_line_is_reported_with_its_number_wherever_it_stands(name, data, tmp_path):
    records, report = read(written(tmp_path / name, data))
    assert list(records) == TWO and report.unit == "line"
    assert [place for place, _ in report.rejects] == [4 if name == "blank.jsonl" else 1]


@pytest.mark.parametrize("data, kept, said", [
    ('[\n  {"text": "one"},\n  {"text": "t},\n  {"text": "two"}\n]', TWO, [(1, "is not JSON (Invalid control")]),
    ('[\n{"text": "one"},\n{"text": \n{"text": "two"}]', TWO, [(1, "is not JSON")]),
    ('[{"text": "one"}, {"text": oh}, {"text": "two"}]', TWO[:1], [(1, "and the 30 characters from it on are unread")]),
    ('[{"text": "one"}, {"te', TWO[:1], [(1, "is not JSON")]),
    ('[\n{"text": "one"}\n{"text": "two"}\n]', TWO, [(1, "a comma is missing")]),
    ('[{"text": "one"}, {"text": "two"}', TWO, [(2, "the array has no end")]),
    ('[{"text": "one"}, {"text": NaN}, {"text": "two"}]', TWO, [(1, "holds NaN")]),
    ('[{"text": "one"}, 7, {"text": "two"},]', TWO, [(1, "is a JSON int"), (3, "is not JSON")]),
    (b'[{"text": "one"}, {"text": "\xff\xfe"}, {"text": "two"}]', TWO, [(1, "is not UTF-8")]),
    ('[\n{"text": "one"},\n{"text": "two"}\n]\n[\n{"text": "three"}\n]', TWO, [(2, "behind the end of the array")]),
    ('[{"text": "one"}, {"text": "two"}] x', TWO, [(2, "with the 1 characters from it on")]),
    ('[] {"text": "one"}', [], [(0, "behind the end of the array")]),
    ("[]", [], []),
    ("[", [], [(0, "is not JSON")]),
])
def test_a_broken_item_of_an_array_is_reported_with_its_index(data, kept, said, tmp_path, capsys):
    records, report = read(written(tmp_path / "a.json", data))
    assert list(records) == kept and (report.unit == "index" or not report.read)
    assert [place for place, _ in report.rejects] == [place for place, _ in said]
    assert all(words in reason for (_, reason), (_, words) in zip(report.rejects, said, strict=True))
    assert report.read == report.used + len(said)
    if said:
        exits(capsys, report.refuse, f"a.json index {said[0][0]}: {report.rejects[0][1][:20]}")


def test_rows_of_a_table_with_fields_too_many_or_too_few_are_reported_with_their_line(tmp_path):
    # csv takes 131,072 characters a field if it is not told to take more
    data = b'text,id\n"on\ne",1\ntwo\nthree,3,4\n\xff,5\n' + b"x" * 200_000 + b',6\nseven,7\n'
    records, report = read(written(tmp_path / "t.csv", data))
    assert [r["text"] for r in records] == ["on\ne", "x" * 200_000, "seven"]
    assert [place for place, _ in report.rejects] == [4, 5, 6] and report.kinds == {"not CSV": 2, "not UTF-8": 1}
    records, report = read(written(tmp_path / "first.csv", b"text,id\none\ntwo,2\n"))
    assert len(list(records)) == 1 and [place for place, _ in report.rejects] == [2]  # below the header


@pytest.mark.parametrize("line, reason", [
    ('{"text": "a", "score": NaN}', "holds NaN"),
    ('{"text": "a", "score": -1e999}', "a number too large"),
    (f'{{"text": "a", "id": {"9" * 5000}}}', "a number too large"),
    (f'{{"text": "a", "id": {"[" * 300}{"]" * 300}}}', "nested more than 200 levels"),
    (f'{{"text": "a", "id": {"[" * 100_000}', "is not JSON"),
    ('{"text": "a\\u0000b"}', "holds a NUL"),
    ('{"text": "a\0b"}', "is not JSON"),
    ('{"text": "a\\ud800"}', "half a surrogate pair"),
    ('{"text": "a", "category": ["x"]}', "'category' is [\"x\"]"),
])
def test_what_would_crash_later_is_rejected_now(line, reason, tmp_path):
    records, report = read(write(tmp_path / "t.jsonl", {"text": "a"}, line))
    assert len(list(records)) == 1 and report.rejects[0][0] == 2 and reason in report.rejects[0][1]


# --------------------------------------------------------------------------------------- published formats

RECORDS = (Path(__file__).parent / "native.json").read_text()  # one of each format, as published


def example(name: str) -> dict:
    return json.loads(RECORDS)[name]


def dialogue(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def pair(prompt: str, chosen: str, rejected: str, **more) -> dict:
    return {"prompt": dialogue(prompt), "chosen": chosen, "rejected": rejected} | more


EXPECTED = {  # what these records become
    "alpaca": {"messages": dialogue("Name a prime above the number.\n\n20", "23")},
    "dolly": {"messages": dialogue("Who built the mill?\n\nAnn Rudd built it in 1790.", "Ann Rudd."),
              "category": "closed_qa"},
    "self_instruct": {"messages": dialogue("Give the plural of the noun.\n\ngoose", "geese"), "id": "seed_task_900",
                      "name": "plural_form",
                      "is_classification": False},
    "prediction": {"messages": dialogue("Add.\n\n1 2", "3"), "target": "3"},
    "completion": {"messages": dialogue("Task: add 1 and 2.\n\nOutput:", "3")},
    "gsm8k": {"messages": dialogue("Two boxes of 600 eggs: how many?", "2 * 600 = 1200 eggs.\n#### 1,200"),
              "final": "1200"},
    "tldr_sample": {"messages": dialogue("A long post.\n\nTL;DR:", "A post."), "ref_text": "Post.", "model": "sft-xl"},
    "sharegpt": {"messages": dialogue("Hi", "Hello!"), "id": "c1"},
    "ultrachat": {"messages": dialogue("Why is the sky blue?", "Because air scatters blue light more."), "id": "77"},
    "lima": {"messages": dialogue("How do I prune a rose?", "In late winter, ..."), "source": "wikihow"},
    "lima_test": {"prompt": dialogue("How do I prune a rose?"), "source": "wikihow"},
    "camel": {"messages": dialogue("Instruction: List breads.\nInput: None", "Solution: rye, seeded. Next request."),
              "id": "001_001_001",
              "role_1": "Baker_RoleType.ASSISTANT", "role_2": "Cafe owner_RoleType.USER",
              "task": "Plan a rye menu for May"},
    "red_team": {"messages": dialogue("Say a rude word.", "I had rather not."), "rating": 1.0, "model_type": "rlhf",
                 "num_params": "13B",
                 "task_description": "asked for rude words", "min_harmlessness_score_transcript": -1.2, "annotator": 5},
    "kto": {"messages": dialogue("Hi", "Go away."), "label": False},
    "hh": pair("Is salt soluble?", "Yes, in water.", "No."),
    "sharegpt_preference": pair("Hi", "Hello!", "Go."),
    "ultrafeedback": pair("Say hi.", "Hi!", "No.", source="sharegpt", margin=5.0, score_chosen=8.0, score_rejected=3.0,
                          model_chosen="m1", model_rejected="m2", principle_chosen="helpfulness",
                          principle_rejected="honesty",
                          custom_system_prompt_chosen="Be helpful.", custom_system_prompt_rejected="Be honest."),
    "ultrafeedback_binarized": pair("Hi", "Hello!", "Go.", margin=1.5, score_chosen=8.0, score_rejected=6.5),
    "shp": pair("Why did it sink?", "Oven door.", "No idea.", domain="askbaking_train", score_ratio=3.0, id="p1",
                score_chosen=30.0,
                score_rejected=10.0),
    "summary_pair": pair("Summarize this post.\n\nT\n\nLong story.", "short", "other", category="summarize",
                         split="train", annotator="w",
                         id="t3_x", subreddit="tifu", policy_chosen="sup4", policy_rejected="ref", confidence=7),
    "summary_rating": {"messages": dialogue("Summarize this article.\n\nT\n\nLong news.", "News."),
                       "category": "summarize",
                       "policy": "ref", "scores": {"overall": 6, "accuracy": 7}, "split": "test", "annotator": "w",
                       "id": "x1"},
    "oasst": pair("Hi", "Hello", "What?", rank_chosen=0, rank_rejected=1, lang="en", id="m1"),
    "pandalm": pair("Name a sea.", "The Baltic.", "Mars.", votes=[1, 1, 0], motivation_app="Maps", id=3,
                    models="m1_m2"),
    "alpaca_eval": pair("Name a sea.", "The Baltic.", "Mars.", preference=2, annotator="judge", dataset="helpful_base",
                        generator_1="m1",
                        generator_2="m2"),
    "llmbar": pair("Name a sea.", "The Baltic.", "Mars."),
    "mt_bench": {"prompt": dialogue("What is 2 + 2?"), "turns": ["What is 2 + 2?", "And doubled?"], "category": "math",
                 "reference": ["4", "8"], "id": 900},
    "reference": {"text": "4", "turns": ["4", "8"], "id": 900, "model": "m1"},
    "judge_prompt": {"text": "Rate {answer}.", "name": "one", "type": "single", "system_prompt": "Be fair.",
                     "category": "general"},
    "ultra_eval": {"prompt": dialogue("What is 2 + 2?"), "category": "Math-easy"},
    "multiple_choice": {"prompt": dialogue("Question: Which is a sea?"), "choices": ["Mars", "The Baltic"], "gold": 1},
    "question_answer": {"messages": dialogue("Name a sea.", "The Baltic."), "id": "q1"},
    "capybara": {"messages": dialogue("Hi", "Hello!", "Bye", "See you."), "source": "demo"},
    "triple": {"prompt": [{"role": "system", "content": "Be brief."}, *dialogue("Name a noble gas.")],
               "chosen": "Neon.", "rejected": "Iron."},
    "openai_preference": pair("Hi", "Hello!", "Go."),
    "safe_rlhf": pair("Name a sea.", "The Baltic.", "Mars.", safer_response_id=0),
    "nectar": {"prompt": dialogue("Hi"), "answers": ["Hello!", "Go.", "Hm."], "ranks": [0, 2, 1],
               "models": ["m1", "m2", "m3"], "source": ["demo"]},
    "truthfulqa": {"prompt": dialogue("Do bulls hate red?"), "correct": ["No", "They cannot see it"],
                   "incorrect": ["Yes", "All of them do"], "category": "Myths", "type": "Adversarial", "best": "No"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_record_of_every_published_format_is_recognised_and_read(name, tmp_path):
    records, report = read(write_jsonl(tmp_path / "d.jsonl", [example(name)]))
    records = list(records)
    assert (records, report.native, report.format, report.rejects) == ([EXPECTED[name]], name, PUBLISHED[name].form, [])
    # what was written is read in its form, unchanged
    again, report = read(write_jsonl(tmp_path / "again.jsonl", records))
    assert list(again) == records and report.native == ("kto" if name == "kto" else PUBLISHED[name].form)


def one(tmp_path, name: str, *records: dict):
    """What records named as of a format become, and the reasons and kinds of what is left out."""
    found, report = read(write_jsonl(tmp_path / "d.jsonl", list(records)), name)
    return list(found), [reason for _, reason in report.rejects], report


def test_a_record_that_fits_two_formats_is_an_error_that_names_both(tmp_path, capsys):
    record = {"instruction": "Hi", "output": "Hello", "conversations": [{"from": "human", "value": "Hi"}]}
    both = write_jsonl(tmp_path / "b.jsonl", [record])
    exits(capsys, lambda: list(read(both)[0]), "b.jsonl: its first record could be alpaca or sharegpt",
          "--format alpaca")
    assert list(read(both, "alpaca")[0]) == [{"messages": [HI, HELLO]}]
    assert recognise({"prompt": "Hi", "prompt_id": "x", "messages": [HI, HELLO]}, "") == "messages"
    assert recognise({"chosen": [HI, HELLO], "rejected": [HI, HELLO | {"content": "Go"}]}, "") == "preference"
    released = example("ultrafeedback_binarized") | {"messages": [HI, HELLO], "prompt_id": "x"}
    assert recognise(released, "") == "ultrafeedback_binarized"
    assert recognise({"prompt": "Hi", "completion": "Go", "label": False}, "") == "kto"
    with pytest.raises(Reject, match="fit no format"):
        recognise({"conversations": 5, "\ud800": 1}, "")


def test_alpaca_takes_a_system_text_and_earlier_rounds_and_no_input(tmp_path):
    record = {"instruction": "And 3?", "input": " ", "output": "Odd.", "system": "Be short.",
              "history": [["Is 2 odd?", "Even."]]}
    found, _, _ = one(tmp_path, "alpaca", record)
    assert found[0]["messages"] == [{"role": "system", "content": "Be short."},
                                    *dialogue("Is 2 odd?", "Even.", "And 3?", "Odd.")]
    _, reasons, _ = one(tmp_path, "alpaca", *(record | {"history": bad} for bad in (5, ["x"], [["x"]], [["x", 1]])),
                        record | {"input": 5})
    assert len(reasons) == 5


def test_a_reply_to_nothing_and_a_question_without_a_reply_are_cut_off_and_reported(tmp_path):
    turns = (("system", "s"), ("gpt", "Welcome"), ("human", "Hi"), ("bard", "Hello"), ("user", "Bye"))
    says = [{"from": who, "value": text} for who, text in turns]
    found, reasons, report = one(tmp_path, "sharegpt", {"conversations": says}, {"conversations": says[2:3]},
                                 {"conversations": [says[2], {"from": "observation", "value": "x"}]})
    assert found == [{"messages": [{"role": "system", "content": "s"}, HI, HELLO]}]
    assert reasons[:2] == ["conversations[1]: is a reply to nothing, left out",
                           "conversations[4]: is a user turn without a reply, left out"]
    assert "has role 'observation'" in reasons[-1] and (report.read, report.used) == (3, 1)


def test_camel_ends_with_its_mark_and_refuses_missing_and_swapped_messages(tmp_path):
    good = example("camel")
    done = {"role_type": "USER", "content": "<CAMEL_TASK_DONE>"}
    found, reasons, _ = one(tmp_path, "camel", good | {"message_3": done, "num_messages": 3},
                            good | {"num_messages": 3},
                            good | {"message_1": good["message_2"]}, good | {"message_4": done, "num_messages": 3})
    assert [r["messages"] for r in found] == [EXPECTED["camel"]["messages"]]
    assert "'num_messages' is 3 but it holds 2" in reasons[0] and "odd messages are the user's" in reasons[1]
    assert "'message_3' is null" in reasons[2]


def test_every_instance_of_a_seed_task_is_a_dialogue(tmp_path):
    instances = [{"input": "", "output": "a"}, {"input": "x", "output": ""}, {"input": "y", "output": "b"}]
    found, reasons, report = one(tmp_path, "self_instruct", example("self_instruct") | {"instances": instances})
    assert [r["messages"][1]["content"] for r in found] == ["a", "b"] and (report.used, report.out) == (1, 2)
    assert reasons == ["instances[1]: 'output' is empty, expected text: fill it in or drop the record"]


@pytest.mark.parametrize("chosen, rejected, said", [
    ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hey\n\nAssistant: No", "differ before their last turn"),
    ("\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: So?\n\nAssistant: A", "\n\nHuman: Hi\n\nAssistant: No",
     "differ before their last turn"),
    ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: Yes ", "'chosen' equals 'rejected'"),
    ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: No", "'chosen.content' is empty"),
    ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: ", "'rejected.content' is empty"),
    ("\n\nHuman: Hi\n\nHuman: So?", "\n\nHuman: Hi\n\nHuman: Oh?", "where assistant is due"),
    ("Hi", "\n\nHuman: Hi\n\nAssistant: No", "'chosen' begins with \"Hi\""),
    ("\n\nHuman: Hi", "\n\nHuman: Hey", "'chosen' ends with a user turn"),
])
def test_hh_pairs_are_compared_turn_by_turn(chosen, rejected, said, tmp_path):
    """The rightmost "Assistant:" splits the second of these at "Yes" and "A" for chosen, "No" for rejected: no pair at
    all.
    """
    found, reasons, _ = one(tmp_path, "hh", example("hh"), {"chosen": chosen, "rejected": rejected})
    assert len(found) == 1 and said in reasons[0]


def test_a_speaker_named_inside_a_reply_is_part_of_it(tmp_path):
    record = {"chosen": "\n\nHuman: Hi\n\nAssistant: One.\nHuman: two",
              "rejected": "\n\nHuman: Hi\n\nAssistant: Human: no"}
    (found,), _, _ = one(tmp_path, "hh", record)
    assert (found["chosen"], found["rejected"]) == ("One.\nHuman: two", "Human: no")


def tree(text: str, role: str, *replies: dict, **more) -> dict:
    return {"message_id": text, "text": text, "role": role, "replies": list(replies)} | more


def test_an_oasst_tree_gives_every_ranked_pair_at_any_depth_and_reports_the_rest(tmp_path):
    """u: a (0), b (1), c (2) give 3 pairs. u2, below b: d (0), e (1), d again (2) give d > e and e > d, and one pair of
    equal texts. u4, below a: k (0), i (1), j (1) give 2 and one tie. Left out: f has no rank, g is deleted, u3 failed
    its review."""
    def a(text, rank, *replies, **more):
        return tree(text, "assistant", *replies, rank=rank, **more)

    u = tree("u", "prompter",
             a("c", 2), a("a", 0, tree("u4", "prompter", a("i", 1), a("k", 0), a("j", 1))),
             a("b", 1, tree("u2", "prompter", a("e", 1), a("d", 0), a("d", 2)),
               tree("u3", "prompter", a("x", 0), a("y", 1), review_result=False)),
             a("f", None), a("g", 3, deleted=True), lang="en")
    found, reasons, report = one(tmp_path, "oasst", {"message_tree_id": "t", "prompt": u})
    pairs = [(r["prompt"][-1]["content"], r["chosen"], r["rejected"]) for r in found]
    assert pairs[:3] == [("u", "a", "b"), ("u", "a", "c"), ("u", "b", "c")]
    assert sorted(pairs[3:]) == [("u2", "d", "e"), ("u2", "e", "d"), ("u4", "k", "i"), ("u4", "k", "j")]
    assert next(r for r in found if r["rejected"] == "i")["prompt"] == dialogue("u", "a", "u4")
    assert sorted(reasons) == [
        "prompt.replies[1].replies[0].replies[2]: shares its rank, makes no pair",
        "prompt.replies[2].replies[0].replies[2]: is the same text as a better one, makes no pair",
        "prompt.replies[2].replies[1]: is deleted or failed its review, left out with what follows it",
        "prompt.replies[3]: has no rank beside other replies, makes no pair",
        "prompt.replies[4]: is deleted or failed its review, left out with what follows it"]
    assert (report.read, report.used, report.out) == (1, 1, 7)


def test_an_oasst_tree_without_a_pair_or_unfinished_is_rejected(tmp_path):
    alone = {"message_tree_id": "t", "prompt": tree("u", "prompter", tree("a", "assistant", rank=0))}
    _, reasons, _ = one(tmp_path, "oasst", alone, alone | {"tree_state": "halted"},
                        alone | {"prompt": tree("u", "assistant")})
    assert [r.split(",")[0] for r in reasons] == ["no user turn has two ranked replies: drop the tree",
                                                  "'tree_state' is \"halted\"",
                                                  'prompt: has role \'assistant\' where prompter is due',
                                                  "no user turn has two ranked replies: drop the tree"]


def test_a_ten_that_was_a_one_is_told_by_the_ratings_of_its_aspects():
    """Ratings 2, 1, 2 have mean 1.67: the 10 was a 1. 5, 4, 5: mean 4.67, a true 10. 3, 4: 3.5, nobody knows. N/A does
    not count.
    """
    def scored(score, *ratings):
        return {"overall_score": score, "annotations": {str(i): {"Rating": rating} for i, rating in enumerate(ratings)}}

    assert overall_score(scored(10.0, "2", "1", "2", "N/A")) == 1
    assert overall_score(scored("10", "5", "4", "5")) == 10
    assert overall_score(scored("7.5", "1")) == 7.5
    for bad in (scored(10, "3", "4"), scored(10, "N/A"), {"overall_score": 10}):
        with pytest.raises(Reject, match="may be a 1 that became 10"):
            overall_score(bad)
    for bad in ("nan", "-1", "11", None, True):
        with pytest.raises(Reject, match="'overall_score' is"):
            overall_score({"overall_score": bad})


def test_ultrafeedback_pairs_the_best_with_a_random_lower_one(tmp_path):
    def record(prompt, *scores):
        return {"instruction": prompt, "completions": [{"response": f"r{i}", "overall_score": s}
                                                       for i, s in enumerate(scores)]}

    found, reasons, report = one(tmp_path, "ultrafeedback", *(record(f"p{i}", 6, 9, 9, 3) for i in range(60)))
    # never r2, its equal
    assert {r["chosen"] for r in found} == {"r1"} and {r["rejected"] for r in found} == {"r0", "r3"}
    assert all(r["margin"] == 9 - {"r0": 6, "r3": 3}[r["rejected"]] for r in found)
    assert 15 < sum(r["rejected"] == "r0" for r in found) < 45
    assert one(tmp_path, "ultrafeedback", *(record(f"p{i}", 6, 9, 9, 3) for i in reversed(range(60))))[0] == found[::-1]
    same = record("p", 9, 4)
    same["completions"][1]["response"] = "r0"
    assert one(tmp_path, "ultrafeedback", same)[2].kinds == {"tie": 1}  # one text cannot be better than itself
    found, reasons, report = one(tmp_path, "ultrafeedback", record("p", 5, 5, 5), record("p", 10, 4, 6),
                                 record("p", None, 7))
    assert len(found) == 1 and found[0]["chosen"] == "r2"
    assert report.kinds == {"tie": 2, "score in doubt": 1, "bad number": 1}
    assert reasons[1].startswith("completions[0]: 'overall_score' is 10")


def test_binarised_scores_that_tie_stay_with_margin_0_and_contradictions_go(tmp_path):
    good = example("ultrafeedback_binarized")
    without = {key: value for key, value in good.items() if key != "prompt"}  # then it is the common start
    bad = [good | {"score_rejected": 9}, good | {"score_chosen": "high"}, good | {"prompt": "Ho"}]
    other_scales = [good | {"score_chosen": 11}, good | {"score_chosen": -1.5, "score_rejected": -3.25}]
    good = [good | {"score_rejected": 8}, without, *other_scales]
    found, _, report = one(tmp_path, "ultrafeedback_binarized", *good, *bad)
    assert [(r["margin"], r["prompt"]) for r in found] == [(m, [HI]) for m in (0, 1.5, 4.5, 1.75)]
    assert report.kinds == {"scores contradict": 1, "bad number": 1, "prompts differ": 1}


def test_votes_and_verdicts_make_pairs_by_their_stated_rules(tmp_path):
    """PandaLM: 2, 2, 0 second; 0, 0, 1 tie; 1, 2, 0 no majority. AlpacaEval: 1.2 first, 1.8 second, 1.5 and 0 ties,
    null no verdict.
    """
    def votes(*labels, **more):
        return example("pandalm") | {f"annotator{i}": label for i, label in enumerate(labels, 1)} | more

    found, reasons, report = one(tmp_path, "pandalm", votes(2, 2, 0), votes(0, 0, 1), votes(1, 2, 0), votes(1, True, 1),
                                 votes(1, 3, 1),
                                 votes(1, 1, 1, response2=True))
    assert [(r["chosen"], r["rejected"]) for r in found] == [("Mars.", "The Baltic."), ("The Baltic.", "True")]
    assert report.kinds == {"tie": 2, "bad label": 2}
    judged = [example("alpaca_eval") | {"preference": p} for p in (1, 2, 1.2, 1.8, 1.5, 0, None, 0.5, "first")]
    found, _, report = one(tmp_path, "alpaca_eval", *judged)
    assert [r["chosen"] for r in found] == ["Mars.", "The Baltic.", "Mars.", "The Baltic."]
    assert report.kinds == {"tie": 2, "no verdict": 1, "bad number": 2}
    shp = example("shp")
    found, _, report = one(tmp_path, "shp", shp | {"labels": 0, "score_A": 5}, shp | {"labels": 0},
                           shp | {"labels": True})
    assert found[0]["chosen"] == "No idea." and report.kinds == {"scores contradict": 1, "bad label": 1}
    for name, bad in (("multiple_choice", {"gold": 2}), ("multiple_choice", {"gold": -1}), ("kto", {"label": "yes"}),
                      ("llmbar", {"label": 0})):
        assert one(tmp_path, name, example(name) | bad)[2].kinds == {"bad label": 1}


def test_scripts_refuse_dialogues_labelled_undesirable_and_parts_left_out(tmp_path, capsys):
    records, report = read(write_jsonl(tmp_path / "k.jsonl", [example("kto"), example("kto") | {"label": True}]))
    assert [r["label"] for r in records] == [False, True]
    exits(capsys, report.refuse, "k.jsonl: 1 of its 2 dialogues are labelled false")
    records, report = read(write_jsonl(tmp_path / "u.jsonl", [{"data": ["Hi", "Hello", "Bye"]}]))
    assert len(list(records)) == 1
    exits(capsys, report.refuse, "u.jsonl line 1: data[2]: is a user turn without a reply")


def test_the_command_shows_the_first_record_with_its_loss_and_counts_by_reason(tmp_path, capsys, monkeypatch):
    path = write_jsonl(tmp_path / "a.json", [example("alpaca"), example("alpaca") | {"output": ""},
                                             {"instruction": "x"}])
    words = ["--format", "alpaca", "--out", str(tmp_path / "o.jsonl"), "--tokenizer", str(BASE)]
    monkeypatch.setattr("sys.argv", ["formats", str(path), *words])
    main()
    said = capsys.readouterr().out
    assert "format alpaca, 3 read, 1 used, 2 rejected; 1 messages records" in said and "1 empty text\n" in said
    assert "1 not text\n" in said
    assert "line 2: 'output' is empty" in said
    rows = [line.split() for line in said.splitlines() if "response, turn 1" in line]
    assert all(row[2] == "1" for row in rows) and rows[-1][3] == "</s>"
    assert "".join(row[3] for row in rows[:-1]).endswith("23")
    assert list(read(tmp_path / "o.jsonl")[0]) == [EXPECTED["alpaca"]]


# ----------------------------------------------------------------------------------------------- corruptions

GOOD = {name: example(name) for name in PUBLISHED} | {
    "messages": {"messages": [HI, HELLO], "category": "chat"},
    "preference": {"prompt": [HI], "chosen": [HI, HELLO], "rejected": "Go", "margin": 2},
    "ranking": {"prompt": "Hi", "answers": ["Hello", "Hm"], "ranks": [0, 1]},
    "prompt": {"prompt": "Hi"}, "text": {"text": "Once."},
}
RAW = {"nan": "NaN", "infinity": "-Infinity", "huge": "9" * 5000, "large": "1" + "0" * 400,
       "deep": "[" * 5000 + "]" * 5000,
       "half": '"\\ud83d"', "nul": '"\\u0000"', "rawnul": '"a\0b"', "bad": '"\\x"'}
ADDED = ["category", "margin", "label", "id", "history", "system", "replies", "\ud800"]
OTHER = [None, True, False, 0, -1, 3.5, 10**18, "", "  ", "x", [], {}, [[]], [None], ["x"], [1, "x"], {"role": "user"},
         [{}], {"x": [{}]}]
SWAPPED = {"user": "assistant", "assistant": "user", "prompter": "assistant", "human": "gpt", "gpt": "human",
           "USER": "ASSISTANT"}


def corrupted(record: dict, rng: random.Random) -> bytes:
    """A line that holds the record with one to three faults."""
    def other():
        return json.loads(json.dumps(rng.choice(OTHER)))  # a copy, for the next fault may be inside

    record = json.loads(json.dumps(record))
    for _ in range(rng.choice([1, 1, 2, 3])):
        places, level = [], [record]
        for value in level:
            keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
            places += [(value, key) for key in keys]
            level += [value[key] for key in keys]
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1:
                holder[key] = other()
            case 2:
                holder[key] = SWAPPED.get(holder[key], "user") if isinstance(holder[key], str) else [holder[key]]
            case 3:
                holder[key] = "@" + rng.choice(list(RAW))
            case 4 if isinstance(holder, dict):
                holder[rng.choice(ADDED)] = other()
    line = json.dumps(record)
    for name, text in RAW.items():
        line = line.replace(f'"@{name}"', text)
    data = line.encode("utf-8")
    match rng.randrange(8):
        case 0:
            data = data[: rng.randrange(len(data))]
        case 1:
            at = rng.randrange(len(data))
            data = data[:at] + bytes(rng.randrange(256) for _ in range(3)).replace(b"\n", b"") + data[at:]
    return data


def check_usable(records: list[dict], form: str, tokenizer) -> None:
    """Records keep their form when they are read again, can be written as strict JSON, and become trees."""
    for record in records:
        assert FORMS[form].read(record) == record
        json.dumps(record, allow_nan=False)
    for record in records[::50]:
        view(record, form, tokenizer)


@pytest.mark.parametrize("name", FORMATS)
def test_five_hundred_corrupted_records_are_used_or_reported_one_by_one(name, tmp_path, capsys):
    from data.tokenizer import load_tokenizer

    rng, good = random.Random(name), json.dumps(GOOD[name]).encode()
    lines = [good, *(corrupted(GOOD[name], rng) for _ in range(500))]
    tokenizer = load_tokenizer(BASE)
    tokenizer.adopt("zephyr")
    records, report = read(written(tmp_path / "d.jsonl", b"\n".join(lines) + b"\n"))
    records = list(records)
    assert report.native == name and report.format == FORMATS[name].form
    assert report.read == sum(bool(line.strip()) for line in lines) and report.out == len(records)
    assert 0 < report.used < report.read
    places = {place for place, _ in report.rejects}
    assert report.used + len(places) >= report.read and max(places) <= len(lines)  # none is dropped in silence
    assert sum(report.kinds.values()) == len(report.rejects)
    assert all(reason.isprintable() and reason.encode("utf-8") and len(reason) < 400 for _, reason in report.rejects)
    check_usable(records, report.format, tokenizer)
    exits(capsys, report.refuse, "d.jsonl line ")
    for line in lines[1:31]:  # alone: nothing to tell the format by but the record itself
        records, report = read(written(tmp_path / "d.jsonl", line))
        try:
            records = list(records)
        except SystemExit:
            assert "could be" in capsys.readouterr().err
        else:
            assert report.used + bool(report.rejects) >= report.read
            check_usable(records, report.format, tokenizer)


def test_corrupted_arrays_and_tables_are_reported(tmp_path):
    for seed in range(250):
        rng = random.Random(seed)
        items = [json.dumps(example("alpaca")).encode() if rng.random() < 0.7 else corrupted(example("alpaca"), rng)
                 for _ in range(4)]
        data = b"[\n" + b",\n".join(items) + b"\n]"
        data = data[: rng.randrange(len(data))] if rng.random() < 0.3 else data
        records, report = read(written(tmp_path / "a.json", data), "alpaca")
        assert len(list(records)) == report.used and report.used + len(report.rejects) == report.read
        records, report = read(written(tmp_path / "a.csv", b"instruction,input,output\nHi,,Hello\n" + data), "alpaca")
        assert len(list(records)) == report.used >= 1 and report.used + len(report.rejects) == report.read


# ------------------------------------------------------------------------------------------------ real data

real_data = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")


def real(name: str = "") -> Path:
    return Path(os.environ["REAL_DATA"]) / "datasets" / name


@real_data
def test_every_real_file_gives_the_number_of_records_its_list_states():
    rows = [[cell.strip() for cell in line.split("|")] for line in real("README.md").read_text().splitlines()
            if line.startswith("| ")]
    files = [(row[1], int(row[3])) for row in rows if row[3].isdigit()]
    assert len(files) == sum(path.is_file() and path.name != "README.md" for path in real().rglob("*")) > 40
    for name, count in files:
        records, report = read(real(name))
        records = list(records)
        assert (name, report.read) == (name, count) and report.used + len(report.rejects) == count
        assert all(FORMS[report.format].read(record) == record for record in records)


@real_data
@pytest.mark.parametrize("name, native, out, kinds", [
    ("hh/harmless-base-test-mild.jsonl.gz", "hh", 119, {"prompts differ": 1}),
    # 29 prompts of 3 ranked replies, 15 of 2, 3 of 4, one of 6 and one of 9: 87 + 15 + 18 + 15 + 36 pairs
    ("oasst/en_25_tree.jsonl.gz", "oasst", 171, {}),
    ("annotation/pandalm_150.json", "pandalm", 131, {"tie": 16, "empty text": 3}),
    ("alpaca_eval/falcon-7b-instruct_annotations_gpt4_60.json", "alpaca_eval", 59, {"tie": 1}),
    ("self_instruct/predictions/davinci-t0-ft_predictions_80.jsonl", "prediction", 57, {"empty text": 23}),
    ("self_instruct/seed_tasks.jsonl", "self_instruct", 175, {}),
    ("ultrafeedback/train_pairs_150.jsonl.gz", "preference", 150, {}),
    ("preference_sharegpt/dpo_en_60.json.gz", "sharegpt_preference", 60, {}),
    ("kto/kto_en_60.json.gz", "kto", 60, {}),
])
def test_real_files_are_recognised_and_give_what_was_counted_by_hand(name, native, out, kinds):
    records, report = read(real(name))
    records = list(records)
    assert (report.native, report.out, dict(report.kinds)) == (native, out, kinds)
    if native == "sharegpt_preference":
        assert sum(r["prompt"][0]["role"] == "system" for r in records) == 20
    if native == "kto":
        assert sum(not r["label"] for r in records) == 22 == report.undesirable
