"""Readers of the formats that dialogues, prompts and texts are published in: one small function each, which names a
record's fields. Preferences: data/preferences.py.

A function takes a record as published and returns it in one of the forms of data/records.py, or yields several, and
for a part that it leaves out the Reject that says so; data/formats.py checks what comes back as it checks a record of
that form. An input follows its instruction after a blank line; scores, names and categories travel along.
tests/native.json holds a record of each.

Sources: the cards and repositories of the data sets.
"""
import re
from collections.abc import Callable, Iterator

from data.records import (
    REASONING,
    Format,
    Reject,
    absent,
    broken,
    check_label,
    check_object,
    check_prompt,
    check_text,
    expected,
    flag,
    role_of,
    short,
    transcript,
)

Parts = Iterator[dict | Reject]


# ------------------------------------------------------------------------------- what readers share

def carry(record: dict, *keys: str, **renamed: str) -> dict:
    """The record's values under `keys`, and under new names (annotator="worker"), where it has them."""
    names = {key: key for key in keys} | renamed
    return {new: record[old] for new, old in names.items() if record.get(old) is not None}


def text_of(record: dict, key: str) -> str:
    return check_text(record.get(key), key)


def list_of(record: dict, key: str) -> list:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise expected("a list that holds something", key, value, "not a list")
    return value


def texts_of(record: dict, key: str) -> list[str]:
    return [check_text(text, key) for text in list_of(record, key)]


def ask(record: dict, instruction: str, more: str) -> str:
    """An instruction and, after a blank line, its input if there is one."""
    told = text_of(record, instruction)
    return told if absent(record.get(more)) else f"{told}\n\n{check_text(record[more], more)}"


ASKED = ("prompt", "question", "query", "instruction", "problem")  # names of what the user says
ANSWERED = ("response", "answer", "completion", "output", "solution")


def one_of(names: tuple[str, ...], record: dict) -> str:
    """The one of several names that the record uses."""
    found = [name for name in names if not absent(record.get(name))]
    if len(found) > 1:
        raise Reject("two names", f"has '{found[0]}' and '{found[1]}', either of which may be its {names[0]}: "
                                  f'name the one, e.g. columns.{names[0]}="{found[1]}"')
    return found[0] if found else names[0]


def asked(record: dict) -> str:
    """What the user says, with what it is about."""
    if all(absent(record.get(name)) for name in ASKED):
        return ask(record, "input", "context")
    key = one_of(ASKED, record)
    return ask(record | {key: ask(record, key, "input")}, key, "context")


def alternate(texts: list) -> list[dict]:
    """Turns given as texts alone, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(prompt: str, reply: str) -> dict:
    return {"messages": [*check_prompt(prompt), {"role": "assistant", "content": reply}]}


def thoughts(record: dict) -> dict:
    """The record's columns of thoughts before its one reply."""
    return {key: check_text(record[key], key) for key in REASONING if not absent(record.get(key))}


def whole_rounds(turns: list[dict], key: str, more: dict) -> Parts:
    """A dialogue of whole rounds: a reply without a question before it or a question without a reply is reported."""
    last, first = len(turns) - 1, 1 if turns[0]["role"] == "system" else 0
    if turns[first:] and turns[first]["role"] == "assistant":
        yield Reject("reply to nothing", "is a reply to nothing, left out", f"{key}[{first}]")
        del turns[first]
    if turns[first:] and turns[-1]["role"] == "user":
        yield Reject("no reply", "is a user turn without a reply, left out", f"{key}[{last}]")
        turns.pop()
    yield {"messages": turns} | more


def each(record: dict, key: str, read: Callable[[dict], dict]) -> Parts:
    """The parts of a record one by one; those that cannot be used are reported and the others kept."""
    for i, value in enumerate(list_of(record, key)):
        try:
            yield read(check_object(value, key))
        except Reject as reason:
            yield reason.at(f"{key}[{i}]")


# ----------------------------------------------------------------------- an instruction and its answer

def rounds(record: dict) -> list[dict]:
    """history, the rounds before an instruction: [[question, reply], ...]."""
    turns = []
    for pair in list_of(record, "history") if not absent(record.get("history")) else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise broken("not a list", f"'history' holds {short(pair)}, expected [question, reply]")
        turns += alternate(pair)
    return turns


def alpaca(record: dict) -> dict:
    """instruction, input, output; some copies add system and history."""
    turns = rounds(record) + alternate([ask(record, "instruction", "input"), text_of(record, "output")])
    turns[-1] |= thoughts(record)
    return {"messages": turns} | carry(record, "id", "category")


def question_answer(record: dict) -> dict:
    """A question and its answer, each under one of several names, and anything else."""
    turns = rounds(record) + answer(asked(record), text_of(record, one_of(ANSWERED, record)).strip())["messages"]
    turns[-1] |= thoughts(record)
    used = (*ASKED, *ANSWERED, *REASONING, "input", "context", "history")
    return {key: value for key, value in record.items() if key not in used} | {"messages": turns}


def self_instruct(record: dict) -> Parts:
    """instruction, instances [{input, output}], id, name (motivation_app: evaluation only): a dialogue each."""
    more = carry(record, "id", "name", "motivation_app", "is_classification")

    def read(instance: dict) -> dict:
        prompt = ask(record | carry(instance, "input"), "instruction", "input")
        return answer(prompt, text_of(instance, "output")) | more

    return each(record, "instances", read)


REPLIES = ("completion", "response", "output")  # to messages; an answer or solution there is what a reward checks


def completion(record: dict) -> dict:
    """prompt, completion, each a text or messages, and anything else. What stands in the prompt is not learnt."""
    key = next((key for key in REPLIES if key in record), "completion")
    more = {name: value for name, value in record.items() if name not in ("prompt", key, *REASONING)}
    reply = record.get(key)
    if isinstance(reply, dict | list):
        reply = [reply] if isinstance(reply, dict) else reply
    else:
        reply = [{"role": "assistant", "content": text_of(record, key).strip()} | thoughts(record)]
    before = [m | {"loss": False} if m["role"] == "assistant" else m for m in check_prompt(record.get("prompt"))]
    return {"messages": [*before, *reply]} | more


FINAL = re.compile(r"\n#### *(-?[\d,.]*\d)\s*$")


def gsm8k(record: dict) -> dict:
    """question, answer. The calculator's marks <<2*600=1200>> are cut out of the answer, which ends with #### 1,200:
    "final" is that number without commas.
    """
    end = FINAL.search(text_of(record, "answer"))
    if not end:
        raise broken("no final answer", "'answer' does not end with '#### number'")
    worked = re.sub(r"<<[^<>\n]*>>", "", record["answer"])
    return answer(text_of(record, "question"), worked) | {"final": end[1].replace(",", "")}


# ----------------------------------------------------------------------------------------- dialogues

ROUND = (("input", "output"), ("human", "assistant"))


def dialogue(record: dict, key: str) -> list[dict]:
    """Turns {from, value} or {role, content}, or rounds {input, output, system}; what else they hold stays there."""
    turns = []
    for turn in list_of(record, key):
        names = next((names for names in ROUND if check_object(turn, key).get(names[0]) is not None), None)
        if names is None:
            turns.append(turn | {"role": role_of(turn)})
            continue
        if not absent(turn.get("system")):
            turns.append({"role": "system", "content": turn["system"]})
        turns += alternate([turn[names[0]], turn.get(names[1])])
        turns[-1] |= {name: value for name, value in turn.items() if name not in (*names, "system")}
    return turns


def lima_test(record: dict) -> dict:
    """conversations, which is one prompt, and source."""
    turns = list_of(record, "conversations")
    if len(turns) > 1:
        raise Reject("has a reply", f"'conversations' holds {len(turns)} texts, expected one prompt: drop the record")
    return {"prompt": check_text(turns[0], "conversations")} | carry(record, "source")


def camel(record: dict) -> Parts:
    """role_1, role_2, original_task, specified_task, num_messages, message_1 {role_type, content}, message_2 and so on.

    Odd messages are the user's. A last one of <CAMEL_TASK_DONE> alone is the format's end mark, no turn.
    """
    count = sum(re.fullmatch(r"message_\d+", key) is not None for key in record)
    sent = [check_object(record.get(f"message_{n}"), f"message_{n}") for n in range(1, count + 1)]
    if record.get("num_messages", count) != count:
        raise broken("turns missing", f"'num_messages' is {short(record['num_messages'])} but it holds {count}")
    for n, message in enumerate(sent, 1):
        due = ("ASSISTANT", "USER")[n % 2]
        if (kind := message.get("role_type", due)) != due:
            raise broken("roles", f"'message_{n}' is of {short(kind)}, odd messages are the user's")
    turns = alternate([message.get("content") for message in sent])
    if len(turns) % 2 and isinstance(turns[-1]["content"], str) and turns[-1]["content"].strip() == "<CAMEL_TASK_DONE>":
        turns.pop()
    if not turns:
        raise Reject("roles", "holds no turn but the end mark: drop the record")
    more = carry(record, "id", "role_1", "role_2", "termination_reason", task="specified_task")
    return whole_rounds(turns, "messages", more)


def red_team(record: dict) -> Parts:
    """transcript, model_type, num_params, min_harmlessness_score_transcript, tags, task_description, red_team_member_id
    and the rating: how far the attack succeeded by its author's opinion, 0 to 4.
    """
    more = carry(record, "rating", "model_type", "num_params", "task_description", "tags",
                 "min_harmlessness_score_transcript", annotator="red_team_member_id")
    return whole_rounds(transcript(record.get("transcript"), "transcript"), "transcript", more)


def kto(record: dict) -> dict:
    """messages, or prompt and completion; and label, true or false, which scripts that imitate replies heed."""
    if flag(record.get("label")) is None:
        raise expected("true or false", "label", record.get("label"), "bad label")
    return record if "messages" in record else completion(record)


# ------------------------------------------------------------------- prompts of benchmarks, never to train on

def mt_bench(record: dict) -> dict:
    """question_id, category, turns (Vicuna's: one), reference. The prompt is the first, the second needs a reply."""
    turns = texts_of(record, "turns")
    return {"prompt": turns[0], "turns": turns} | carry(record, "category", "reference", id="question_id")


def reference(record: dict) -> Parts:
    """question_id, model_id, choices [{turns}]: the text is the answer to the first turn."""
    def read(choice: dict) -> dict:
        turns = texts_of(choice, "turns")
        return {"text": turns[0], "turns": turns} | carry(record, id="question_id", model="model_id")

    return each(record, "choices", read)


def multiple_choice(record: dict) -> dict:
    """query, choices, gold: the right one's index."""
    choices = texts_of(record, "choices")
    gold = check_label(record, "gold", *range(len(choices)))
    return {"prompt": text_of(record, "query"), "choices": choices, "gold": gold}


def truthfulqa(record: dict) -> dict:
    """Question, Correct Answers and Incorrect Answers parted by "; ", Best Answer, Category, Type."""
    correct, incorrect = ([part.strip() for part in text_of(record, key).split(";") if part.strip()]
                          for key in ("Correct Answers", "Incorrect Answers"))
    more = carry(record, category="Category", type="Type", best="Best Answer")
    return {"prompt": text_of(record, "Question"), "correct": correct, "incorrect": incorrect} | more


TEXTS, ONE = [str, str], (str,)  # at least two texts, exactly one text


# Name, form of the records that come out, their reader, and the shapes that a record may have.
NATIVE = {name: Format(form, read, shapes) for name, form, read, *shapes in (
    ("alpaca", "messages", alpaca, {"instruction": str, "output": str}),
    ("question_answer", "messages", question_answer,
     *({name: str, reply: str} for name in (*ASKED, "input") for reply in ANSWERED)),
    ("self_instruct", "messages", self_instruct, {"instruction": str, "instances": [dict]}),
    ("completion", "messages", completion, {"prompt": object, "completion": object},
     *({"prompt": [dict], name: object} for name in REPLIES[1:])),
    ("gsm8k", "messages", gsm8k, {"question": str, "answer": lambda value: FINAL.search(str(value))}),
    # Marks of references such as [12] stay in the contexts.
    ("dolly", "messages", lambda r: answer(ask(r, "instruction", "context"), text_of(r, "response")) |
     carry(r, "category"), {"instruction": str, "context": str, "response": str}),
    ("prediction", "messages", lambda r: answer(ask(r, "instruction", "input"), text_of(r, "response").strip()) |
     carry(r, "target"), {"prompt": str, "instruction": str, "response": str, "target": str}),
    ("tldr_sample", "messages", lambda r: answer(text_of(r, "context"), text_of(r, "sample").strip()) |
     carry(r, "ref_text", model="model_type"), {"context": str, "ref_text": str, "sample": str}),
    ("sharegpt", "messages", lambda r: whole_rounds(dialogue(r, "conversations"), "conversations",
                                                    carry(r, "id", "category")), {"conversations": [dict]}),
    ("capybara", "messages", lambda r: whole_rounds(dialogue(r, "conversation"), "conversation",
                                                    carry(r, "id", "source", "category")), {"conversation": [dict]}),
    ("ultrachat", "messages", lambda r: whole_rounds(alternate(list_of(r, "data")), "data", carry(r, "id")),
     {"data": TEXTS}),
    ("lima", "messages", lambda r: whole_rounds(alternate(list_of(r, "conversations")), "conversations",
                                                carry(r, "source")), {"conversations": TEXTS}),
    ("camel", "messages", camel, {"role_1": str, "role_2": str, "message_1": dict}),
    ("red_team", "messages", red_team, {"transcript": str, "model_type": str, "rating": object}),
    ("kto", "messages", kto, *({key: kind, more: object, "label": lambda value: flag(value) is not None}
                        for key, kind, more in (("messages", [dict], "messages"), ("prompt", object, "completion")))),
    ("lima_test", "prompt", lima_test, {"conversations": ONE}),
    ("mt_bench", "prompt", mt_bench, {"question_id": object, "turns": [str]}),
    ("ultra_eval", "prompt", lambda r: {"prompt": text_of(r, "data"), "category": text_of(r, "class").strip()},
     {"class": str, "data": str}),
    ("multiple_choice", "prompt", multiple_choice, {"query": str, "choices": [str], "gold": int}),
    ("truthfulqa", "prompt", truthfulqa, {"Question": str, "Correct Answers": str, "Incorrect Answers": str}),
    ("reference", "text", reference, {"question_id": object, "choices": [dict]}),
    ("judge_prompt", "text", lambda r: {"text": text_of(r, "prompt_template")} |
     carry(r, "name", "type", "system_prompt", "category", "output_format"), {"name": str, "prompt_template": str}),
)}
