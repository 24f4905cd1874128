"""What people's data means: who says what, what is learnt of it, and what is refused by name."""
import json
import os
from pathlib import Path

import pytest
from conftest import exits, write_jsonl

from data.formats import main, read, read_all
from data.records import Reject, flag, prompt_of

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
BYE = {"role": "user", "content": "Bye"}
GONE = {"role": "assistant", "content": "Gone"}
SAILOR = {"role": "system", "content": "Talk like a sailor."}
ORCA = {"question": "Hi", "chosen": "Hello", "rejected": "Go"}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def one(tmp_path, *records: dict, columns: dict | None = None):
    """What records become, why others do not, and the report."""
    found, report = read(write_jsonl(tmp_path / "d.jsonl", list(records)), columns=columns)
    return list(found), [reason for _, reason in report.rejects], report


def asks(text: str, reply: str) -> dict:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]}


# ------------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("asked", ["prompt", "question", "query", "instruction", "problem", "input"])
@pytest.mark.parametrize("answered", ["response", "answer", "completion", "output", "solution"])
def test_a_question_and_its_answer_go_by_many_names(asked, answered, tmp_path):
    assert one(tmp_path, {asked: "Hi", answered: "Hello"})[0] == [{"messages": [HI, HELLO]}]


def test_what_a_question_is_about_follows_it(tmp_path):
    found, _, _ = one(tmp_path, {"instruction": "Add.", "input": "1 2", "response": "3"})
    assert found == [asks("Add.\n\n1 2", "3")]
    found, _, _ = one(tmp_path, {"question": "Who?", "context": "Ann did.", "answer": "Ann."})
    assert found == [asks("Who?\n\nAnn did.", "Ann.")]
    found, _, _ = one(tmp_path, {"prompt": "Who?", "input": "", "context": None, "completion": "Ann."})
    assert found[0]["messages"] == asks("Who?", "Ann.")["messages"]


def test_of_two_possible_names_the_user_says_which(tmp_path, capsys):
    record = {"problem": "2 + 2?", "solution": "It is 4.", "answer": "4"}
    assert "has 'answer' and 'solution', either of which may be its response" in one(tmp_path, record)[1][0]
    for name, text in (("solution", "It is 4."), ("answer", "4")):
        assert one(tmp_path, record, columns={"response": name})[0] == [asks("2 + 2?", text)]
    both = PAIR | {"question": "Hi!"}
    exits(capsys, lambda: one(tmp_path, both), "could be preference or triple")
    assert one(tmp_path, both, columns={"prompt": "question"})[0][0]["prompt"] == [HI | {"content": "Hi!"}]


@pytest.mark.parametrize("record, prompt", [
    (ORCA | {"system": "Talk like a sailor."}, [SAILOR, HI]),
    (ORCA | {"system": ""}, [HI]),
    ({"input": "Hi", "system_prompt": "Talk like a sailor.", "chosen": "Hello", "rejected": "Go", "rating": [9, 2],
      "original_chosen": "Hello", "chosen_score": 9.0}, [SAILOR, HI]),
    ({"instruction": "Hi", "input": "You!", "chosen": "Hello", "rejected": "Go", "history": [["Bye", "Gone"]]},
     [BYE, GONE, {"role": "user", "content": "Hi\n\nYou!"}]),
    (SHAREGPT | {"conversations": SHAREGPT["conversations"][:1], "system": "Talk like a sailor.",
                 "chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "Go"}},
     [SAILOR, HI]),
    (PAIR | {"prompt": [BYE, GONE, HI], "response": "Yes."}, [BYE, GONE, HI]),
    ({"conversation": [BYE, GONE, HI], "chosen": HELLO, "rejected": "Go"}, [BYE, GONE, HI]),
    (PAIR | {"system": "Talk like a sailor."}, [SAILOR, HI]),
    ({"messages": [SAILOR, HI], "chosen": HELLO, "rejected": HELLO | {"content": "Go"}}, [SAILOR, HI]),
    ({"messages": [BYE, GONE, HI, HELLO], "chosen": HELLO, "rejected": "Go"}, [BYE, GONE, HI]),
    ({"prompt": "Bye", "chosen": [BYE, GONE, HI, HELLO], "rejected": [BYE, GONE, HI, HELLO | {"content": "Go"}],
      "system": "Talk like a sailor."}, [SAILOR, BYE, GONE, HI]),
    ({"prompt": "\n\nHuman: Bye\n\nAssistant: Gone\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go",
      "response": " Yes."}, [BYE, GONE, HI]),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}, [HI]),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}, [HI]),
])
def test_preferences_of_many_layouts_have_one_meaning(record, prompt, tmp_path):
    (found,), reasons, report = one(tmp_path, record)
    assert (found["prompt"], found["chosen"], found["rejected"]) == (prompt, "Hello", "Go") and not reasons
    assert report.format == "preference" and not report.warnings


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
                                   ("rating_chosen", "rating_rejected"), ("chosen_rating", "rejected_rating"),
                                   ("chosen-rating", "rejected-rating")])
@pytest.mark.parametrize("high, low, margin", [(-1.5, -3.25, 1.75), (14, 11, 3), (5, 5, 0), (0.25, -700, 700.25)])
def test_scores_of_any_scale_give_their_difference_as_margin(names, high, low, margin, tmp_path):
    scores = dict(zip(names, (high, low), strict=True))
    whole = {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, HELLO | {"content": "Go"}]}
    one_each = {"chosen": HELLO, "rejected": HELLO | {"content": "Go"}}
    marked = {side: f"\n\nHuman: Hi\n\nAssistant: {PAIR[side]}" for side in ("chosen", "rejected")}
    to_messages = [PAIR | {"prompt": [HI]}] * (names != ("score_chosen", "score_rejected"))  # those we write ourselves
    for record in (PAIR, whole, ORCA, *to_messages, PAIR | one_each, {"messages": [HI]} | one_each, marked,
                   {"conversations": [HI]} | one_each):
        (found,), _, _ = one(tmp_path, record | scores)
        assert (found["margin"], found["score_chosen"], found["score_rejected"]) == (margin, high, low)
    assert one(tmp_path, PAIR | scores, PAIR | dict(zip(names, (low, high + 1), strict=True)))[2].kinds == {
        "scores contradict": 1}


def test_numbers_of_a_table_are_text_and_empty_cells_none(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,score_chosen,score_rejected,margin\n"
                                    "Hi,Hello,Go,8.5,-7,\nHi,Hello,Go,,,\nHi,Hello,Go,,,2\nHi,Hello,Go,high,1,\n")
    found, report = read(tmp_path / "x.csv")
    assert [record.get("margin") for record in found] == [15.5, None, 2.0]
    assert report.rejects == [(5, "'score_chosen' is \"high\", expected a number: mend or drop the record")]


def test_ranks_count_from_0_however_the_file_counts_them(tmp_path):
    """Nectar's ranks 2, 1, 3 are 1, 0, 2."""
    prompt = "\n\nHuman: Hi\n\nAssistant: "
    nectar = {"prompt": prompt, "answers": [{"answer": f" {text}", "model": "m", "rank": rank}
                                            for text, rank in (("b", 2.0), ("a", 1.0), ("c", 3.0))]}
    (found,), _, report = one(tmp_path, nectar)
    assert (found["prompt"], found["answers"], found["ranks"]) == ([HI], ["b", "a", "c"], [1, 0, 2])
    ranked = {"prompt": "Hi", "answers": ["b", "a", "c"]}
    for ranks in ([2, 1, 3], [2.0, 1.0, 3.0], ["2", "1.0", 3]):
        assert one(tmp_path, ranked | {"ranks": ranks})[0][0]["ranks"] == [1, 0, 2]
    nectar["answers"][0]["rank"] = 1.5
    assert one(tmp_path, nectar)[2].kinds == {"bad ranks": 1}


@pytest.mark.parametrize("head, row", [
    ("history,human_ref_A,human_ref_B,labels,score_A,score_B", "Hi,Hello,Go,1,5,2"),
    ("prompt,response_0,response_1,better_response_id,safer_response_id", "Hi,Go,Hello,1.0,0"),
    ("input,output_1,output_2,label", "Hi,Go,Hello,2"),
    ("idx,instruction,input,response1,response2,annotator1,annotator2,annotator3", "1,Hi,,Hello,Go,1,1,2"),
])
def test_a_choice_that_csv_writes_as_text_is_a_choice(head, row, tmp_path):
    (tmp_path / "x.csv").write_text(f"{head}\n{row}\n")
    (found,) = read_all(tmp_path / "x.csv")
    assert (found["prompt"], found["chosen"], found["rejected"]) == ([HI], "Hello", "Go")


def test_single_messages_of_trees_are_no_texts(tmp_path):
    message = {"message_id": "m", "parent_id": None, "message_tree_id": "m", "text": "Hi", "role": "prompter"}
    assert "one message of a tree" in one(tmp_path, message)[1][0]
    assert one(tmp_path, {"text": "Hi", "role": "x"})[0] == [{"text": "Hi", "role": "x"}]


def test_the_more_helpful_reply_is_chosen_not_the_safer(tmp_path):
    replies = {"response_0": "Go", "response_1": "Hello"}
    (found,), _, _ = one(tmp_path, {"prompt": "Hi", "better_response_id": 1, "safer_response_id": 0} | replies)
    assert (found["chosen"], found["rejected"]) == ("Hello", "Go")


def test_of_a_prompt_and_its_completion_the_completion_is_learnt(tmp_path):
    context = [BYE, GONE | {"loss": False}, HI, HELLO]
    for prompt in ([BYE, GONE, HI], "\n\nHuman: Bye\n\nAssistant: Gone\n\nHuman: Hi\n\nAssistant:"):
        for completion in ([HELLO], HELLO, " Hello"):
            assert one(tmp_path, {"prompt": prompt, "completion": completion})[0] == [{"messages": context}]
            for name in ("response", "output") if isinstance(prompt, list) else ():
                assert one(tmp_path, {"prompt": prompt, name: completion})[0] == [{"messages": context}]
    assert one(tmp_path, {"prompt": [HI], "answer": "42"})[2].format == "prompt"  # what a reward checks
    several = {"prompt": [HI], "completion": [HELLO, BYE, GONE]}
    assert one(tmp_path, several)[0] == [{"messages": [HI, HELLO, BYE, GONE]}]
    for bad in ([], [HI], 5, None):
        assert not one(tmp_path, {"prompt": [HI], "completion": [HELLO]}, {"prompt": [HI], "completion": bad})[0][1:]


def test_turns_of_every_spelling_are_messages(tmp_path):
    for record in (SHAREGPT, {"conversations": [HI, HELLO]}, {"conversation": [HI, HELLO]},
                   {"conversation": [{"input": "Hi", "output": "Hello"}]}, {"messages": SHAREGPT["conversations"]},
                   {"conversation": [{"human": "Hi", "assistant": "Hello"}]}, {"messages": json.dumps([HI, HELLO])},
                   {"messages": [HI | {"role": "User"}, HELLO | {"role": "gpt"}]},
                   {"messages": [HI, HELLO | {"role": "model"}]}):
        assert one(tmp_path, record)[0] == [{"messages": [HI, HELLO]}], record


def test_messages_written_into_a_text_are_read_if_they_are_json_and_never_learnt_as_they_stand(tmp_path):
    whole, only = ([HI, HELLO], [HI, HELLO | {"content": "Go"}]), (HELLO, HELLO | {"content": "Go"})
    other_order = tuple(dict(reversed(side.items())) for side in only)
    for chosen, rejected in (whole, only, other_order, [[side] for side in only]):
        pair = PAIR | {"chosen": json.dumps(chosen), "rejected": json.dumps(rejected)}
        assert one(tmp_path, pair)[0] == [PAIR | {"prompt": [HI]}]
        assert "as Python prints them" in one(tmp_path, PAIR | {"chosen": str(chosen), "rejected": str(rejected)})[1][0]
    done = {"prompt": json.dumps([HI]), "completion": json.dumps([HELLO])}
    assert one(tmp_path, done)[0] == [{"messages": [HI, HELLO]}]
    for key, value in (("messages", [HI, HELLO]), ("completion", HELLO)):
        assert "as Python prints them" in one(tmp_path, {"prompt": "Hi", key: str(value)})[1][0]
    chat = {"messages": json.dumps([HI, HELLO])}
    assert one(tmp_path, {"chat": chat["messages"]}, columns={"messages": "chat"})[0] == [{"messages": [HI, HELLO]}]
    for reply in ('[{"value": 1}]', '{"role": "cook", "from": "Ghent"}', "[{'content': 'x'}]", '{"input": "a"}'):
        assert one(tmp_path, {"prompt": "Hi", "completion": reply})[0] == [asks("Hi", reply)]


def test_rounds_keep_their_system_text_and_say_what_is_not_learnt(tmp_path):
    rounds = [{"system": "Talk like a sailor.", "input": "Hi", "output": "Hello", "output_with_loss": False},
              {"input": "Bye", "output": "Gone", "output_with_loss": True}]
    assert one(tmp_path, {"conversation": rounds})[0] == [
        {"messages": [SAILOR, HI, HELLO | {"loss": False}, BYE, GONE]}]
    assert one(tmp_path, {"conversation": [rounds[1] | {"tool_calls": [{}]}]})[2].kinds == {"tool call": 1}


def test_earlier_rounds_precede_a_question_under_whichever_name(tmp_path):
    record = {"query": "Bye", "response": "Gone", "history": [["Hi", "Hello"]], "system": "Talk like a sailor."}
    assert one(tmp_path, record)[0] == [{"messages": [SAILOR, HI, HELLO, BYE, GONE]}]
    assert one(tmp_path, {"query": "Hi", "response": "Hello", "history": []})[0] == [{"messages": [HI, HELLO]}]


def test_parts_of_text_are_joined_and_others_refused_with_their_kind(tmp_path):
    parts = [{"type": "text", "text": "H"}, {"text": "i", "image": None}]
    image = [{"type": "image_url", "image_url": {"url": "x.png"}}]
    found, reasons, _ = one(tmp_path, *({"messages": [HI | {"content": content}, HELLO]}
                                        for content in (parts, image, ["x"])))
    assert found == [{"messages": [HI, HELLO]}]
    assert "a part of kind \"image_url\", expected text" in reasons[0] and "kind \"str\"" in reasons[1]


# --------------------------------------------------------------------------------------- system texts

@pytest.mark.parametrize("record", [
    {"messages": [SAILOR, HI, HELLO]},
    {"messages": [HI, HELLO], "system": "Talk like a sailor."},
    {"messages": [SAILOR | {"role": "developer"}, HI, HELLO]},
    {"prompt": "Hi", "response": "Hello", "system_message": "Talk like a sailor."},
    {"messages": [SAILOR, HI, HELLO], "system_prompt": "Talk like a sailor."},  # the same twice
    {"messages": [HI, SAILOR, HELLO]},
    SHAREGPT | {"system": "Talk like a sailor.", "tools": ""},
    SHAREGPT | {"system_prompt": "Talk like a sailor.", "source": "x"},
    {"conversations": [{"from": "system", "value": "Talk like a sailor."}, *SHAREGPT["conversations"]]},
    {"system_prompt": "Talk like a sailor.", "question": "Hi", "response": "Hello"},
    {"instruction": "Hi", "output": "Hello", "system": "Talk like a sailor."},
    {"prompt": [SAILOR, HI], "completion": [HELLO]},
    {"prompt": "Hi", "completion": "Hello", "system": "Talk like a sailor."},
    {"data": ["Hi", "Hello"], "system": "Talk like a sailor."},
])
def test_a_system_text_opens_the_dialogue_wherever_it_stands(record, tmp_path):
    (found,), _, _ = one(tmp_path, record)
    assert found["messages"] == [SAILOR, HI, HELLO] and not any(key.startswith("system") for key in found)


def test_prompts_and_rankings_have_system_texts_too(tmp_path):
    for record in ({"prompt": "Hi"}, {"prompt": [HI]}, {"prompt": "Hi", "answers": ["a", "b"], "ranks": [0, 1]}):
        assert one(tmp_path, record | {"system": "Talk like a sailor."})[0][0]["prompt"] == [SAILOR, HI]


def test_two_different_system_texts_are_refused_and_empty_ones_are_none(tmp_path):
    other = SAILOR | {"content": "Be short."}
    for record in ({"messages": [SAILOR, other, HI, HELLO]}, PAIR | {"prompt": [SAILOR, HI], "system": "Be short."},
                   {"messages": [HI, HELLO], "system": "a", "system_prompt": "b"}):
        assert one(tmp_path, record)[2].kinds == {"two system texts": 1}
    assert one(tmp_path, {"messages": [HI, HELLO], "system": 5})[2].kinds == {"not text": 1}
    (found,), _, report = one(tmp_path, {"messages": [SAILOR | {"content": " "}, HI, HELLO], "system": "", "tools": []})
    assert found["messages"] == [HI, HELLO] and "empty system text" in report.warnings[0]
    assert "after its first turn" in one(tmp_path, {"messages": [HI, SAILOR, HELLO]})[2].warnings[0]


# -------------------------------------------------------------------------------------- what is learnt

NO = [False, 0, 0.0, "False", "false", "0", "undesirable"]
YES = [True, 1, 1.0, "True", "true", "1", "desirable"]


def test_true_and_false_are_known_in_all_their_spellings():
    assert [flag(value) for value in NO + YES] == [False] * 7 + [True] * 7
    assert all(flag(value) is None for value in (None, "", "yes", 2, -1, [], {}, "positive"))


@pytest.mark.parametrize("no", NO)
def test_a_label_that_says_no_is_never_learnt(no, tmp_path, capsys):
    layouts = ({"messages": [HI, HELLO], "label": no}, {"prompt": "Hi", "completion": "Hello", "label": no},
               {"prompt": [HI], "completion": [HELLO], "label": no}, SHAREGPT | {"kto_tag": no},
               {"messages": [HI, HELLO], "kto_tag": no}, {"instruction": "Hi", "output": "Hello", "kto_tag": no},
               {"prompt": "Hi", "response": "Hello", "label": no})
    for record in layouts:
        (found,), _, report = one(tmp_path, record)
        assert found == {"messages": [HI, HELLO], "label": False} and report.undesirable == 1
        exits(capsys, report.refuse, "d.jsonl: 1 of its 1 dialogues are labelled false")
        report.refuse(imitated=False)


def test_a_false_label_in_csv_is_never_learnt_and_the_command_leaves_it_out(tmp_path, capsys, monkeypatch):
    (tmp_path / "x.csv").write_text("prompt,completion,label\nHi,Hello,True\nHi,Go,False\n")
    exits(capsys, lambda: read_all(tmp_path / "x.csv"), "1 of its 2 dialogues are labelled false",
          f"`python -m data.formats {tmp_path}/x.csv --out good.jsonl` keeps the others")
    monkeypatch.setattr("sys.argv", ["formats", str(tmp_path / "x.csv"), "--out", str(tmp_path / "good.jsonl")])
    main()
    assert "1 labelled false" in capsys.readouterr().out
    assert read_all(tmp_path / "good.jsonl") == [{"messages": [HI, HELLO], "label": True}]


@pytest.mark.parametrize("yes", YES)
def test_a_label_that_says_yes_is_learnt_and_other_labels_travel_along(yes, tmp_path):
    assert one(tmp_path, {"messages": [HI, HELLO], "label": yes})[0] == [{"messages": [HI, HELLO], "label": True}]
    assert one(tmp_path, SHAREGPT | {"kto_tag": yes})[0] == [{"messages": [HI, HELLO], "label": True}]
    assert one(tmp_path, {"messages": [HI, HELLO], "label": "greeting"})[0][0]["label"] == "greeting"
    for label in ("bad", -1):
        assert "neither true nor false" in one(tmp_path, {"messages": [HI, HELLO], "label": label})[2].warnings[0]
    kinds = one(tmp_path, {"prompt": "Hi", "completion": "Hello", "label": yes},
                {"prompt": "Hi", "completion": "Hello", "label": "maybe"}, )[2].kinds
    assert kinds == {"bad label": 1}
    assert one(tmp_path, SHAREGPT | {"kto_tag": "maybe"})[2].kinds == {"bad label": 1}


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("no", NO)
def test_a_turn_or_record_not_to_be_learnt_is_context(key, no, tmp_path):
    turns = [{"from": "human", "value": "Hi", key: no}, {"from": "gpt", "value": "Hello", key: no},
             {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Gone", key: 1}]
    for record in ({"messages": [HI | {key: no}, HELLO | {key: no}, BYE, GONE | {key: 1}]}, {"conversations": turns}):
        assert one(tmp_path, record)[0] == [{"messages": [HI, HELLO | {"loss": False}, BYE, GONE]}]
    nothing = ({"messages": [HI, HELLO | {key: no}]}, {"messages": [HI, HELLO], key: no}, PAIR | {key: no},
               {"text": "Once.", key: no}, PAIR | {"chosen": [HI, HELLO | {key: no}], "rejected": [HI, GONE]})
    for record in nothing:
        found, _, report = one(tmp_path, record)
        assert not found and report.kinds == {"not learnt": 1}
    found, _, _ = one(tmp_path, PAIR | {"prompt": [BYE, GONE | {key: no}, HI]})
    assert found[0]["prompt"] == [BYE, GONE, HI]  # nothing of a prompt is learnt anyway


def test_other_weights_are_refused_by_name(tmp_path):
    for record, name in (({"messages": [HI, HELLO | {"weight": 0.5}]}, "'messages.weight' is 0.5"),
                         ({"messages": [HI, HELLO | {"train": "perhaps"}]}, "'messages.train' is \"perhaps\""),
                         ({"messages": [HI, HELLO | {"training_detail": [{"end_offset": 0}]}]}, "training_detail' is"),
                         ({"messages": [HI, HELLO | {"train_detail": [{"train": False}]}]}, "train_detail' is"),
                         ({"messages": [HI, HELLO], "weight": 2}, "'weight' is 2, expected 1 or 0")):
        assert name in one(tmp_path, record)[1][0]
    assert one(tmp_path, {"messages": [HI, HELLO], "loss": 2.3, "train": "split a"})[0][0]["loss"] == 2.3


# ---------------------------------------------------------------- tools, thoughts, and what else has a name

@pytest.mark.parametrize("record, name", [
    ({"messages": [HI, HELLO | {"tool_calls": [{"id": "c1"}]}]}, "'tool_calls'"),
    ({"messages": [HI, HELLO | {"content": None, "tool_calls": [{}]}]}, "'tool_calls'"),
    ({"messages": [HI, HELLO | {"function_call": {"name": "rain"}}]}, "'function_call'"),
    ({"messages": [HI, HELLO | {"function_calls": "rain()"}]}, "'function_calls'"),
    ({"messages": [SAILOR | {"tools": [{"name": "rain"}]}, HI, HELLO]}, "'tools'"),
    ({"messages": [HI, HELLO, {"role": "environment", "content": "2 mm"}, GONE]}, "role 'environment'"),
    ({"messages": [HI, {"role": "tool", "content": "2 mm"}, HELLO]}, "role 'tool'"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{}"},
                        {"from": "observation", "value": "2 mm"}, {"from": "gpt", "value": "x"}]},
     "role 'function_call'"),
    ({"messages": [HI, HELLO], "tools": [{"type": "function"}]}, "'tools'"),
    (SHAREGPT | {"tools": "[{\"name\": \"rain\"}]"}, "'tools'"),
    ({"messages": [HI, HELLO], "functions": [{}]}, "'functions'"),
    ({"messages": [HI, HELLO], "images": ["a.png"]}, "'images'"),
    ({"messages": [HI, HELLO], "chat_template_kwargs": {"python_tools": ["f"]}}, "'chat_template_kwargs'"),
    (PAIR | {"tools": [{}]}, "'tools'"),
    ({"input": {"messages": [HI], "tools": [{}]}, "preferred_output": [HELLO], "non_preferred_output": [GONE]},
     "'tools'"),
])
def test_tools_are_refused_by_name(record, name, tmp_path):
    found, (reason,), _ = one(tmp_path, record)
    assert not found and name in reason and "cannot be learnt here: drop the record" in reason


def test_empty_tools_and_calls_are_none(tmp_path):
    record = {"messages": [HI, HELLO | {"tool_calls": [], "function_call": None}], "tools": "[]", "functions": None}
    assert one(tmp_path, record)[0][0]["messages"] == [HI, HELLO]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_stay_with_their_reply(key, tmp_path):
    thought = [HI, HELLO | {"reasoning_content": "A greeting."}]
    for record in ({"messages": [HI, HELLO | {key: "A greeting."}]},
                   {"question": "Hi", "answer": "Hello", key: "A greeting."},
                   {"instruction": "Hi", "output": "Hello", key: "A greeting."},
                   {"prompt": "Hi", "completion": "Hello", key: "A greeting."}):
        assert one(tmp_path, record)[0] == [{"messages": thought}]
    assert one(tmp_path, {"messages": [HI, HELLO | {key: " "}]})[0] == [{"messages": [HI, HELLO]}]
    for record in (PAIR | {"chosen": [HI, HELLO | {key: "A greeting."}], "rejected": [HI, GONE]},
                   PAIR | {"prompt": [BYE, GONE | {key: "x"}, HI]},
                   {"prompt": [BYE, GONE | {key: "x"}, HI], "answers": ["a", "b"], "ranks": [0, 1]},
                   {"messages": [HI | {key: "x"}, HELLO]}):
        assert one(tmp_path, record)[2].kinds == {"reasoning": 1}
    (found,), _, report = one(tmp_path, {"messages": [HI, HELLO], key: "What a judge wrote."})
    assert found["messages"] == [HI, HELLO] and f"a column '{key}' that belongs to no reply" in report.warnings[0]


def test_different_thoughts_of_one_reply_are_refused(tmp_path):
    found, _, report = one(tmp_path, {"messages": [HI, HELLO | {"thinking": "a", "reasoning": "b"}]},
                           {"messages": [HI, HELLO | {"thinking": "a", "reasoning": "a"}]})
    assert len(found) == 1 and report.kinds == {"reasoning": 1}


@pytest.mark.parametrize("record", [
    {"text": "<|im_start|>user\nHi<|im_end|>\n"}, {"text": "<s>[INST] Hi [/INST] Hello </s>"},
    {"text": "### Human: Hi### Assistant: Hello"}, {"messages": [HI | {"content": "<|user|> Hi"}, HELLO]},
    {"prompt": "Q\n\nHuman: Hi", "chosen": "a", "rejected": "b"}, {"prompt": "### Instruction: Hi"},
    {"prompt": "\nHuman: Hi\nAssistant:", "chosen": "a", "rejected": "b"}, {"prompt": "Human: Hi Assistant:"},
    {"prompt": "A chat. USER: Hi ASSISTANT:"}, {"prompt": "User: Hi\nBot:"}, {"prompt": "<｜User｜>Hi<｜Assistant｜>"},
    {"messages": [HI, HELLO | {"content": "Hello<|eot_id|>"}]},
])
def test_markup_that_stays_text_is_said_once(record, tmp_path, capsys):
    found, _, report = one(tmp_path, *[record] * 3, {"text": "x"} if "text" in record else record)
    assert len(found) == 4
    (warning,) = report.warnings
    assert "d.jsonl line 1: holds" in warning and "never becomes a special token" in warning
    assert ("all of the text is learnt" in warning) == ("text" in record)
    assert f"(and {2 if 'text' in record else 3} more records)" in warning
    report.refuse()
    assert capsys.readouterr().out == f"warning: {warning}\n"


@pytest.mark.parametrize("key, value", [("thought", "A greeting."), ("reasoning_details", [{"text": "A greeting."}]),
                                        ("train_on_turn", False), ("mask", 1), ("name", "Ann")])
def test_a_key_of_a_turn_that_is_not_read_is_said(key, value, tmp_path):
    for record in ({"messages": [HI, HELLO | {key: value}]}, PAIR | {"chosen": [HI, HELLO | {key: value}]},
                   {"conversations": [HI, HELLO | {key: value}]}):
        assert one(tmp_path, record)[2].warnings == [
            f'{tmp_path}/d.jsonl line 1: has turns that hold "{key}", which is not read']
    assert not one(tmp_path, {"messages": [HI, HELLO | {key: None, "weight": 1, "tool_calls": []}]})[2].warnings


def test_columns_that_a_form_does_not_read_travel_along_whatever_they_hold(tmp_path):
    more = {"prompt": "Hi", "system": 5, "weight": 1, "tools": [{}], "label": 0, "thinking": "x"}
    assert one(tmp_path, {"text": "a"}, {"text": "b"} | more)[0] == [{"text": "a"}, {"text": "b"} | more]
    dialogue = {"messages": [HI, HELLO]}
    assert one(tmp_path, dialogue, dialogue | {"prompt": 5, "chosen": [], "text": 7})[0][1]["text"] == 7


def test_the_keys_of_a_format_with_other_values_are_named(tmp_path):
    reasons = one(tmp_path, {"instruction": "Move the point.", "input": {"x": 1}, "output": {"x": 2}})[1]
    assert reasons == ["'output' is {\"x\": 2}, expected text as alpaca has it: mend or drop the record"]


def test_one_bad_record_of_two_comes_with_the_command_that_keeps_the_other(tmp_path, capsys):
    _, _, report = one(tmp_path, {"messages": [HI, HI, HELLO]}, {"messages": [HI, HELLO]})
    exits(capsys, report.refuse, "line 1: 'messages' has role 'user' where assistant is due",
          f"`python -m data.formats {tmp_path}/d.jsonl --out good.jsonl` keeps the others")


# -------------------------------------------------------------------------------- columns by other names

@pytest.mark.parametrize("record, columns, wanted", [
    ({"ask": "Hi", "reply": "Hello"}, {"prompt": "ask", "response": "reply"}, {"messages": [HI, HELLO]}),
    ({"ask": "Hi", "response": "Hello", "n": 1}, {"prompt": "ask"}, {"messages": [HI, HELLO], "n": 1}),
    ({"ask": "Hi", "good": "Hello", "bad": "Go"}, {"prompt": "ask", "chosen": "good", "rejected": "bad"},
     {"prompt": [HI], "chosen": "Hello", "rejected": "Go"}),
    ({"talk": SHAREGPT["conversations"], "role_text": "Talk like a sailor."},
     {"messages": "talk", "system": "role_text"}, {"messages": [SAILOR, HI, HELLO]}),
    ({"messages": [HI]}, {"prompt": "messages"}, {"prompt": [HI]}),
    ({"instruction": "Hi", "output": "Hello", "text": "x", "ask": "Bye", "reply": "Gone"},
     {"prompt": "ask", "response": "reply"}, {"messages": [BYE, GONE], "text": "x"}),
    ({"question": "Hi", "good": 1, "answer": "Hello"}, {"label": "good"}, {"messages": [HI, HELLO], "label": True}),
])
def test_columns_map_any_names(record, columns, wanted, tmp_path):
    assert one(tmp_path, record, columns=columns)[0] == [wanted]


def test_columns_that_are_not_there_are_named(tmp_path, capsys):
    record = {"ask": "Hi", "reply": "Hello"}
    reasons = one(tmp_path, record, columns={"prompt": "query", "response": "reply"})[1]
    assert "has no 'query', which columns.prompt names, but \"ask\", \"reply\"" in reasons[0]
    file = write_jsonl(tmp_path / "d.jsonl", [record])
    exits(capsys, lambda: read(file, columns={"promt": "ask"}), "columns.promt", "did you mean columns.prompt?")
    columns = {"prompt": "ask", "response": "reply", "system": "sys"}  # a system text need not be in every row
    assert len(one(tmp_path, record | {"sys": None}, columns=columns)[0]) == 1


def test_the_command_takes_columns(tmp_path, capsys, monkeypatch):
    file = write_jsonl(tmp_path / "d.jsonl", [{"ask": "Hi", "reply": "Hello"}, {"ask": "Hi", "reply": ""}])
    monkeypatch.setattr("sys.argv", ["formats", str(file), "--columns", "prompt=ask", "response=reply", "--out",
                                     str(tmp_path / "out.jsonl")])
    main()
    assert read_all(tmp_path / "out.jsonl") == [{"messages": [HI, HELLO]}] and "1 used" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["formats", str(file), "--columns", "prompt"])
    exits(capsys, main, "argument --columns: 'prompt' is not KEY=NAME")


# --------------------------------------------------------------------------------------------- prompts

def test_every_form_but_text_has_a_prompt_to_sample_from(tmp_path):
    dialogue = {"messages": [SAILOR, BYE, GONE | {"weight": 0}, HI, HELLO]}
    for record in (dialogue, PAIR, {"prompt": "Hi"}, {"prompt": [SAILOR, HI], "answers": ["a", "b"], "ranks": [0, 1]},
                   {"messages": [HI, HELLO], "label": False}, {"question": "Hi", "answer": "Hello"}):
        (found,), _, report = one(tmp_path, record)
        prompt = prompt_of(found, report.format)
        assert prompt[-1] == HI and all("loss" not in m for m in prompt)
    assert prompt_of(one(tmp_path, dialogue)[0][0], "messages") == [SAILOR, BYE, GONE, HI]
    with pytest.raises(Reject, match="holds text"):
        prompt_of({"text": "Once."}, "text")


# --------------------------------------------------------------------- cases after public bug reports

CASES = Path(os.environ.get("REAL_DATA", "")) / "cases" / "train"


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the cases")
@pytest.mark.parametrize("name, form, out, undesirable, first", [
    ("capybara-dpo-multiturn/data.jsonl", "preference", 1, 0, {"chosen": "Water, at sea level.", "margin": 3}),
    ("chosen-is-a-dict/data.jsonl", "preference", 1, 0, {"chosen": "Lima.", "rejected": "Cusco, I think."}),
    ("chosen-is-a-dict/reply_inside.jsonl", "preference", 1, 0, {"chosen": "Santiago.", "rejected": "Quito."}),
    ("consecutive-turns/data.jsonl", "messages", 1, 0, {}),
    ("content-parts/text.jsonl", "messages", 1, 0, {"messages": [HI, HELLO | {"content": "Hello!"}]}),
    ("content-parts/image.jsonl", "messages", 0, 0, {}),
    ("hf-directory/data", "messages", 2, 0, {}),
    ("hf-directory/saved", "messages", 3, 0, {}),
    ("hf-directory/filled_with_nulls.jsonl", "messages", 1, 0, {}),
    ("hf-directory/nulls_pref.jsonl", "preference", 1, 0, {"prompt": [HI], "chosen": "Hello!", "rejected": "Go."}),
    ("hf-directory/from_datasets.csv", "", 0, 0, {}),
    ("hf-directory/from_datasets.jsonl", "messages", 3, 0, {}),
    *((f"json-array-and-gz/{name}", "messages", 2, 0, {"messages": [HI, HELLO | {"content": "Hello!"}]})
      for name in ("array.json", "array.json.gz", "lines.jsonl", "lines.jsonl.gz")),
    ("json-array-and-gz/columns.json", "preference", 2, 0, {"prompt": [HI], "chosen": "Hello!", "rejected": "No."}),
    ("json-array-and-gz/splits.json", "messages", 1, 0, {}),
    ("kto-labels-not-bool/ints.jsonl", "messages", 2, 1, {"label": True}),
    ("kto-labels-not-bool/msgs_ints.jsonl", "messages", 1, 1, {"label": False}),
    ("kto-labels-not-bool/text.csv", "messages", 2, 1, {"label": True}),
    ("kto-trl-lists/data.jsonl", "messages", 2, 1, {"label": True}),
    ("non-text-fields/data.json", "", 0, 0, {}),
    *((f"orca-dpo-triples/{name}.jsonl", "preference", count, 0,
       {"prompt": [{"role": "system", "content": "Answer in one line."},
                   {"role": "user", "content": "Which bird cannot fly: emu or swift?"}], "chosen": "The emu."})
      for name, count in (("intel", 2), ("argilla", 1))),
    ("pair-of-duplicates/data.jsonl", "preference", 4, 0, {}),
    ("parquet/train_prefs.parquet", "preference", 50, 0, {"chosen": "Ash.", "margin": 4.5}),
    ("parquet/train_sft.parquet", "messages", 3, 0, {"prompt_id": "77aa"}),
    ("ppo-prompts/data.jsonl", "prompt", 4, 0, {"prompt": [HI]}),
    ("preference-with-system-column/data.jsonl", "preference", 1, 0, {"prompt": [SAILOR, HI]}),
    ("prompt-with-human-markers/data.jsonl", "preference", 1, 0,
     {"prompt": [{"role": "user", "content": "Is tea older than coffee?"}], "chosen": "Yes, by far."}),
    ("qa-messages-list-in-csv/data.csv", "", 0, 0, {}),
    ("reasoning-content/data.jsonl", "messages", 1, 0,
     {"messages": [{"role": "user", "content": "2+2?"},
                   {"role": "assistant", "content": "4.", "reasoning_content": "Two and two."}]}),
    ("score-outside-0-10/data.jsonl", "preference", 2, 0, {"margin": 1.75}),
    *((f"sharegpt-top-system/{name}.jsonl", "messages", 1, 0, {"messages": [SAILOR, HI, HELLO | {"content": "Ahoy!"}]})
      for name in ("data", "hermes", "messages_system")),
    ("text-already-templated/chatml.jsonl", "text", 2, 0, {}),
    ("text-already-templated/llama2.jsonl", "text", 2, 0, {}),
    ("tool-messages/call_at_end.jsonl", "messages", 0, 0, {}),
    ("tool-messages/sharegpt.jsonl", "messages", 0, 0, {}),
    ("tool-messages/tool_role.jsonl", "messages", 0, 0, {}),
    ("trl-prompt-completion/data.jsonl", "messages", 1, 0, asks("Which is heavier, iron or cork?", "Iron.")),
    ("ufb-empty-and-ties/data.jsonl", "preference", 2, 0, {"margin": 4.5}),
    ("ufb-h4/data.jsonl", "preference", 1, 0,
     {"prompt": [{"role": "user", "content": "Suggest a name for a grey cat."}], "chosen": "Ash.", "margin": 4.5}),
    ("ultrachat-200k/data.jsonl", "messages", 3, 0, {"prompt_id": "77aa"}),
    ("unicode/data.jsonl", "messages", 3, 0, {}),
])
def test_cases_after_bug_reports_are_what_is_right(name, form, out, undesirable, first):
    records, report = read(CASES / name)
    records = list(records)
    assert (report.format, report.out, report.undesirable) == (form, out, undesirable)
    assert len({place for place, _ in report.rejects}) == report.read - report.used
    assert all(records[0][key] == value for key, value in first.items())
    assert ("text-already" in name or "unicode" in name) == bool(report.warnings)
