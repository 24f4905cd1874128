"""The five forms of a record that the scripts know, and the checks every reader of a data file shares.

    messages     {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    preference   {"prompt": [messages] or "text", "chosen": "text" or [messages], "rejected": ..., "margin": 1-4}
    ranking      {"prompt": as above, "answers": ["text", ...], "ranks": [0, 2, 1, ...]}   least is best, equal ones tie
    prompt       {"prompt": as above}                      to sample replies to
    text         {"text": "..."}

A message may also hold "reasoning_content", the thoughts before a reply, and "loss": false, a reply that is context
and not learnt. A dialogue's "label" says whether its last reply is a good one (true) or not (kto.py). A `system` column
(SYSTEM) opens the dialogue. null is as if the key were not there. Other keys (id, category, annotator, scores ...)
travel along.
"""
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime import write_text


class Reject(Exception):
    """Why a record, or the part of it at `where`, cannot be used. Reports count by `kind`."""

    def __init__(self, kind: str, reason: str = "", where: str = ""):
        self.kind, self.reason = kind, reason or kind
        super().__init__(f"{where}: {self.reason}" if where else self.reason)

    def at(self, where: str) -> "Reject":
        return Reject(self.kind, self.reason, where)


class Format(NamedTuple):
    form: str                                               # of the records that come out, one of the five
    read: Callable[[dict], dict | Iterable[dict | Reject]]  # one record, or several and the parts left out
    shapes: Sequence[dict]                                  # how it is recognised: a record's keys and their types


def lines(path: str | Path) -> list[dict]:
    """The records of a file that this project has written; data/formats.py reads those of others."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_lines(path: str | Path, records: Iterable[dict]) -> None:
    write_text(Path(path), "".join(json.dumps(record) + "\n" for record in records))


# ------------------------------------------------------------------------------------------ checks

def short(value) -> str:
    """A value as a message can hold it: its JSON up to 40 characters, whatever bytes it is made of."""
    return json.dumps(value, default=str)[:40]


def broken(kind: str, fault: str) -> Reject:
    return Reject(kind, f"{fault}: mend or drop the record")


def expected(wanted: str, key: str, value, kind: str) -> Reject:
    return broken(kind, f"'{key}' is {short(value)}, expected {wanted}")


def check_text(value, key: str) -> str:
    if not isinstance(value, str):
        raise expected("text", key, value, "not text")
    if not value.strip():
        raise Reject("empty text", f"'{key}' is empty, expected text: fill it in or drop the record")
    fault = "a NUL" if "\0" in value else "half a surrogate pair" if re.search("[\ud800-\udfff]", value) else ""
    if fault:
        raise broken("broken text", f"'{key}' holds {fault}, which is no text")
    return value


def check_number(value, key: str, low: float, high: float = 1e300) -> float:
    """A number, which CSV writes as text."""
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not low <= number <= high:
        wanted = (f" from {low:g} to {high:g}" if high < 1e300 else f" of at least {low:g}" if low > -1e300 else "")
        raise expected(f"a number{wanted}", key, value, "bad number")
    return number


def as_whole(value):
    """The whole number that CSV has written as text and a data frame as 1.0; anything else as it is."""
    digits = str(value).removesuffix(".0") if isinstance(value, str | float) else ""
    return int(digits) if re.fullmatch("[0-9]{1,9}", digits) else value


def check_label(record: dict, key: str, *labels: int) -> int:
    """One of some whole numbers."""
    value = as_whole(record.get(key))
    if isinstance(value, bool) or value not in labels:
        raise expected(" or ".join(map(str, labels)), key, value, "bad label")
    return value


def check_object(value, key: str) -> dict:
    if not isinstance(value, dict):
        raise expected("an object", key, value, "not an object")
    return value


def absent(value) -> bool:
    """Is this what a file writes where it has nothing to say?"""
    return value is None or value in ({}, []) or isinstance(value, str) and value.strip() in ("", "[]", "{}")


FLAGS = dict.fromkeys(("true", "1", "1.0", "desirable"), True) | dict.fromkeys(
    ("false", "0", "0.0", "undesirable"), False)


def flag(value) -> bool | None:
    """true or false as JSON, CSV and data frames write them; None for anything else."""
    return None if value is None else FLAGS.get(str(value).strip().lower())


# ------------------------------------------------------------------------------------------ messages

SPEAKERS = {"human": "user", "user": "user", "prompter": "user", "system": "system", "developer": "system"}
SPEAKERS |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model", "ai"), "assistant")
TOOL_ROLES = ("tool", "function", "ipython", "function_call", "tool_call", "observation", "environment",
              "tool_response", "tool_results", "function-response")
TOOL_KEYS = ("tool_calls", "tool_call", "function_calls", "function_call", "tools", "functions")
REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys that may say so, of a reply or of a record
NOT_LEARNT = ("weight", "train", "training", "loss", "output_with_loss", "train_detail", "training_detail")


def role_of(message: dict):
    """Who speaks, by this project's names; another speaker keeps the file's."""
    role = message.get("from") if message.get("role") is None else message["role"]
    return SPEAKERS.get(role.lower(), role) if isinstance(role, str) else role


def check_content(value, key: str) -> str:
    """A content's text; parts of text are joined, as templates do."""
    if not isinstance(value, list) or not value:
        return check_text(value, key)
    texts = []
    for part in value:
        kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise broken("not text", f"'{key}' holds a part of kind {short(kind)}, expected text alone")
        texts.append(part["text"])
    return check_text("".join(texts), key)


def check_message(value: dict, key: str) -> dict:
    """A turn {role, content}, or ShareGPT's {from, value}, with the thoughts before it and whether it is learnt."""
    role, content = role_of(value), value.get("value") if value.get("content") is None else value["content"]
    called = [f"'{name}'" for name in TOOL_KEYS if not absent(value.get(name))]
    called += [f"role {role!r}"] * (role in TOOL_ROLES)
    if called:
        raise Reject("tool call", f"'{key}' has {called[0]}, and tool calls cannot be learnt here: drop the record")
    if role == "system" and absent(content):
        return {"role": role, "content": ""}
    message = {"role": role, "content": check_content(content, f"{key}.content")}
    for name in REASONING:
        if absent(value.get(name)):
            continue
        thoughts = check_text(value[name], f"{key}.{name}")
        if role != "assistant" or message.setdefault("reasoning_content", thoughts) != thoughts:
            raise broken("reasoning", f"'{key}.{name}' differs from other thoughts of its turn, or is not a reply's")
    for name in NOT_LEARNT:
        learnt = flag(value.get(name))
        if learnt is None and not absent(value.get(name)):
            raise expected("true or false, 1 or 0", f"{key}.{name}", value[name], "bad weight")
        if learnt is False and role == "assistant":
            message["loss"] = False
    return message


def check_messages(value, key: str) -> list[dict]:
    """A dialogue: perhaps a system text, which is put first, then user and assistant in turn."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise expected("a list of messages", key, value, "not messages")
    messages = [check_message(m, key) for m in value]
    turns = [m for m in messages if m["role"] != "system"]
    for i, m in enumerate(turns):
        due = ("user", "assistant")[i % 2]
        if m["role"] != due:
            said = repr(m["role"])[:40]
            raise broken("roles", f"'{key}' has role {said} where {due} is due: roles alternate, user first")
    if not turns:
        raise broken("roles", f"'{key}' has no user turn")
    return under(messages, {})


SYSTEM = ("system", "system_prompt", "system_message")


def under(messages: list[dict], record: dict) -> list[dict]:
    """The messages under their system text, or the record's column of that name."""
    texts = [m["content"] for m in messages if m["role"] == "system"]
    texts += [check_text(record[key], key) for key in SYSTEM if not absent(record.get(key))]
    texts = list(dict.fromkeys(text for text in texts if text))
    if len(texts) > 1:
        raise broken("two system texts", f"has two system texts, {short(texts[0])} and {short(texts[1])}, expected one")
    return [{"role": "system", "content": text} for text in texts] + [m for m in messages if m["role"] != "system"]


# HH's way to write a dialogue in one text; as a prompt it often ends with the name of who is to speak.
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):|Human:.*\n\nAssistant:\s*\Z", re.DOTALL)


def transcript(value, key: str) -> list[dict]:
    """Turns of an HH transcript: a speaker is named after a blank line; anywhere else "Human:" is part of the text."""
    pieces = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", check_text(value, key))
    if pieces[0].strip() or len(pieces) == 1:
        raise broken("not a transcript", f"'{key}' begins with {short(value)}, expected a blank line and 'Human:'")
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": "user" if name == "Human" else "assistant", "content": text.strip()} for name, text in turns]


def check_prompt(value, key: str = "prompt") -> list[dict]:
    """A text is one user turn, or an HH transcript of several; messages end with one. Nothing of it is learnt."""
    if isinstance(value, str) and TRANSCRIPT.match(value):
        value = transcript(value, key)
        value = value if value[-1]["content"] else value[:-1]
    text = isinstance(value, str)
    turns = [value] if isinstance(value, dict) else value
    prompt = [{"role": "user", "content": check_text(value, key)}] if text else check_messages(turns, key)
    if prompt[-1]["role"] != "user":
        raise broken("roles", f"'{key}' ends with a reply, expected a user turn")
    return [{name: m[name] for name in m if name != "loss"} for m in prompt]


def without_thoughts(messages: list[dict], key: str) -> list[dict]:
    """Roles and contents of a preference's messages: it compares replies, not the thoughts before them."""
    if any("reasoning_content" in m for m in messages):
        raise broken("reasoning", f"'{key}' holds 'reasoning_content', which a pair cannot: move it into the content")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


# ------------------------------------------------------------------------------------------- forms

UNREAD = ("tools", "functions", "images", "videos", "audios", "chat_template_kwargs")


def check_columns(record: dict, form: str) -> dict:
    """Columns that mean the same in every layout: refuses what cannot be learnt, returns those that forms know."""
    for key in UNREAD if form != "text" else ():
        held = record.get(key)
        if not all(part is False or absent(part) for part in (held.values() if isinstance(held, dict) else [held])):
            raise Reject(key, f"has '{key}', which cannot be learnt here: drop the record, or this key of it")
    for key in NOT_LEARNT if form != "prompt" else ():
        learnt = flag(record.get(key))
        if key == "weight" and learnt is None and not absent(record.get(key)):
            raise expected("1 or 0", key, record[key], "bad weight")
        if learnt is False:
            raise Reject("not learnt", f"'{key}' is {short(record[key])}, so it is not to be learnt: drop the record")
    known = {"messages": (*SYSTEM, "label", "kto_tag"), "text": ()}.get(form, SYSTEM)
    return {key: record[key] for key in known if key in record}


def strip(record: dict, *keys: str) -> dict:
    return {key: value for key, value in record.items() if key not in keys}


def read_messages(record: dict) -> dict:
    """A label that says true or false becomes one; what is labelled false is not to be learnt."""
    messages = under(check_messages(record.get("messages"), "messages"), record)
    if messages[-1]["role"] != "assistant":
        raise Reject("no reply", "'messages' ends with a user turn, expected a reply: cut the turn or add the reply")
    if all(m.get("loss") is False for m in messages if m["role"] == "assistant"):
        raise Reject("not learnt", "'messages' has no reply that is to be learnt: drop the record")
    label = record.get("label") if absent(record.get("kto_tag")) else record["kto_tag"]
    if not absent(record.get("kto_tag")) and flag(label) is None:
        raise expected("true or false", "kto_tag", label, "bad label")
    record = strip(record, *SYSTEM, "kto_tag") | {"messages": messages}
    return record if flag(label) is None else record | {"label": flag(label)}


def read_preference(record: dict) -> dict:
    """prompt becomes messages; what precedes the reply in chosen, rejected, messages equals it or stands for it."""
    prompt = record.get("prompt")
    marked = isinstance(prompt, str) and TRANSCRIPT.match(prompt)
    sides = {side: _side(record.get(side), side, marked) for side in ("chosen", "rejected")}
    chosen, rejected = sides["chosen"][1], sides["rejected"][1]
    prompts = [before for before, _ in sides.values() if before]
    if prompt is None and not prompts and record.get("messages") is not None:
        prompt = check_messages(record["messages"], "messages")
        ends_with_chosen = prompt[-1]["role"] == "assistant" and prompt[-1]["content"] == chosen
        prompt = prompt[:-1] if ends_with_chosen else prompt
    if prompt is not None or not prompts:
        prompts.append(without_thoughts(check_prompt(prompt), "prompt"))
    # A prompt given as text is only the first user turn of a dialogue given in full.
    if isinstance(prompt, str) and len(prompts) > 1 and prompts[-1][0] in prompts[0]:
        prompts.pop()
    if any(other != prompts[0] for other in prompts):
        raise broken("prompts differ", "'prompt', 'chosen' and 'rejected' disagree on what precedes the reply")
    if chosen == rejected:
        raise Reject("identical", "'chosen' equals 'rejected', which prefers nothing: drop the pair")
    margin = {} if absent(record.get("margin")) else {"margin": check_number(record["margin"], "margin", 0)}
    prompt = under(check_prompt(prompts[0]), record)
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return strip(record, *SYSTEM, "messages", "margin") | pair | margin


def _side(value, side: str, marked: bool) -> tuple[list[dict], str]:
    """What precedes a reply, and its text: given as text, as one assistant message, or as the whole dialogue."""
    if marked and isinstance(value, str):
        whole = transcript(value, side) if TRANSCRIPT.match(value) else []
        value = whole or value.strip()
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        return [], check_text(value, side)
    alone = len(value) == 1 and isinstance(value[0], dict) and role_of(value[0]) == "assistant"
    messages = [check_message(value[0], side)] if alone else check_messages(value, side)
    if messages[-1]["role"] != "assistant":
        raise broken("no reply", f"'{side}' ends with a user turn, expected a reply")
    if messages[-1].get("loss") is False:
        raise Reject("not learnt", f"'{side}' ends with a reply that is not to be learnt: drop the pair")
    *before, reply = without_thoughts(messages, side)
    return before, reply["content"]


def read_ranking(record: dict) -> dict:
    """Ranks are counted from 0, however the file counts them."""
    answers, ranks = record.get("answers"), record.get("ranks")
    ranks = list(map(as_whole, ranks)) if isinstance(ranks, list) else ranks
    if not isinstance(answers, list) or not isinstance(ranks, list) or len(answers) != len(ranks):
        raise broken("bad ranks", "'answers' and 'ranks' are not lists of one length, a rank for every answer")
    if any(isinstance(rank, bool) or not isinstance(rank, int | float) or rank % 1 or not 0 <= rank < 2**31
           for rank in ranks):
        raise expected("whole numbers from 0, the best", "ranks", ranks, "bad ranks")
    if len(set(ranks)) < 2:
        raise Reject("tie", "'ranks' are all the same, which prefers nothing: drop the record")
    record = read_prompt(record)
    without_thoughts(record["prompt"], "prompt")
    return record | {"answers": [check_text(answer, "answers") for answer in answers],
                     "ranks": [int(rank - min(ranks)) for rank in ranks]}


def read_prompt(record: dict) -> dict:
    return strip(record, *SYSTEM) | {"prompt": under(check_prompt(record.get("prompt")), record)}


def read_text(record: dict) -> dict:
    if {"role", "message_tree_id"} <= record.keys():
        raise Reject("a message", "is one message of a tree, the others stand elsewhere: take the file of whole trees")
    return record | {"text": check_text(record.get("text"), "text")}


FORMS = {form: Format(form, read, shapes) for form, read, *shapes in (
    ("messages", read_messages, {"messages": list}),
    ("preference", read_preference, {"prompt": object, "chosen": object, "rejected": object},
     {"chosen": [dict], "rejected": [dict]}, {"messages": list, "chosen": object, "rejected": object}),
    ("ranking", read_ranking, {"prompt": object, "answers": list, "ranks": list}),
    ("prompt", read_prompt, {"prompt": object}),
    ("text", read_text, {"text": str}))}


def check_record(record: dict, form: str) -> dict:
    check_columns(record, form)
    if not isinstance(record.get("category", ""), str):
        raise Reject("bad category", f"'category' is {short(record['category'])}, expected text: rename that column")
    return FORMS[form].read(record)


def prompt_of(record: dict, form: str) -> list[dict]:
    """What to sample replies to: of a dialogue everything before its last reply."""
    if form == "text":
        raise Reject("no prompt", "holds text, which has no prompt")
    return check_prompt(record["messages"][:-1], "messages") if form == "messages" else record["prompt"]


def fault(reply) -> str:
    """Why a model's reply (data/llm.py) cannot be used, "" if it can."""
    if reply is None:
        return "no reply"
    try:
        check_text(reply.text, "reply")
    except Reject as reject:  # empty, a NUL, half a surrogate pair
        return reject.kind
    return "" if reply.finished else "cut by length"


MARKUP = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|</s>|### (?:Human|Assistant|"
                    r"Instruction|Response):|(?:^|\n)(?:Human|User|USER):|\s(?:Assistant|ASSISTANT):")
# Keys of a turn that are read; others may say what is not learnt here
READ = {"role", "from", "content", "value", "human", "input", "output", "system", *REASONING, *NOT_LEARNT, *TOOL_KEYS}


def doubts(value, part: dict, form: str) -> Iterator[str]:
    """What is used as it stands but may be meant otherwise, of a record and what was made of it."""
    value = value if isinstance(value, dict) else {}
    held = part["messages"] if form == "messages" else part["prompt"] if form != "text" else []
    texts = [m["content"] for m in held] + [part[key] for key in ("text", "chosen", "rejected")
                                            if form in ("text", "preference") and isinstance(part.get(key), str)]
    if mark := next(filter(None, map(MARKUP.search, texts)), None):
        yield (f"holds {mark[0].strip()!r} as text, which stays letters and never becomes a special token: "
               + ("all of the text is learnt, the user's words too; " if form == "text" else "")
               + "if the file is templated already, give it as messages")
    for turns in value.values():
        if isinstance(turns, list) and turns and all(isinstance(m, dict) for m in turns):
            if any(role_of(m) == "system" for m in turns[1:]):
                yield "has a system text after its first turn, which opens the dialogue here"
            if role_of(turns[0]) == "system" and absent(turns[0].get("content", turns[0].get("value"))):
                yield "has an empty system text, which counts as none"
            unread = {key for m in turns for key in m.keys() - READ if not absent(m[key])}
            if unread and role_of(turns[0]) in SPEAKERS.values():
                yield f"has turns that hold {', '.join(map(short, sorted(unread)))}, which is not read"
    if form == "messages" and isinstance(part.get("label"), str | int) and not isinstance(part["label"], bool):
        yield "has a 'label' that is neither true nor false, and is learnt"
    if form == "messages" and not any("reasoning_content" in m for m in held):
        for key in REASONING:
            if isinstance(value.get(key), str) and not absent(value[key]):
                yield f"has a column '{key}' that belongs to no reply and is not learnt"
