"""The five forms of a record that the scripts know, and the checks every reader of a data file shares.

    messages     {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    preference   {"prompt": [messages] or "text", "chosen": "text" or [messages], "rejected": ..., "margin": 1-4}
    ranking      {"prompt": as above, "answers": ["text", ...], "ranks": [0, 2, 1, ...]}   0 is best, equal ranks tie
    prompt       {"prompt": as above}                      to sample replies to
    text         {"text": "..."}

Other keys (id, category, annotator, scores ...) travel along.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Reject(Exception):
    """Why a record, or the part of it at `where`, cannot be used. Reports count by `kind`."""

    def __init__(self, kind: str, reason: str = "", where: str = ""):
        self.kind, self.reason = kind, reason or kind
        super().__init__(f"{where}: {self.reason}" if where else self.reason)

    def at(self, where: str) -> Reject:
        return Reject(self.kind, self.reason, where)


class Format(NamedTuple):
    form: str                                               # of the records that come out, one of the five
    read: Callable[[dict], dict | Iterable[dict | Reject]]  # one record, or several and the parts left out
    shapes: Sequence[dict]                                  # how it is recognised: a record's keys and their types


# ------------------------------------------------------------------------------------------ checks

def short(value) -> str:
    """A value as a message can hold it: its JSON up to 40 characters, whatever bytes it is made of."""
    return json.dumps(value)[:40]


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
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        wanted = f"of at least {low:g}" if high == 1e300 else f"from {low:g} to {high:g}"
        raise expected(f"a number {wanted}", key, value, "bad number")
    return float(value)


def check_object(value, key: str) -> dict:
    if not isinstance(value, dict):
        raise expected("an object", key, value, "not an object")
    return value


def check_messages(value, key: str) -> list[dict]:
    """A dialogue: perhaps a system text, then user and assistant in turn."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise expected("a list of messages", key, value, "not messages")
    messages = [{"role": m.get("role"), "content": check_text(m.get("content"), f"{key}.content")} for m in value]
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for i, m in enumerate(turns):
        due = ("user", "assistant")[i % 2]
        if m["role"] != due:
            said = repr(m["role"])[:40]
            raise broken("roles", f"'{key}' has role {said} where {due} is due: roles alternate, user first")
    if not turns:
        raise broken("roles", f"'{key}' has no user turn")
    return messages


def check_prompt(value, key: str = "prompt") -> list[dict]:
    """A text is one user turn; messages end with one."""
    text = isinstance(value, str)
    prompt = [{"role": "user", "content": check_text(value, key)}] if text else check_messages(value, key)
    if prompt[-1]["role"] != "user":
        raise broken("roles", f"'{key}' ends with a reply, expected a user turn")
    return prompt


# ------------------------------------------------------------------------------------------- forms

def read_messages(record: dict) -> dict:
    messages = check_messages(record.get("messages"), "messages")
    if messages[-1]["role"] != "assistant":
        raise Reject("no reply", "'messages' ends with a user turn, expected a reply: cut the turn or add the reply")
    return record | {"messages": messages}


def read_preference(record: dict) -> dict:
    """prompt becomes messages that end with the user; chosen and rejected become the texts of the reply."""
    sides = {side: _side(record.get(side), side) for side in ("chosen", "rejected")}
    prompts = [before for before, _ in sides.values() if before]
    prompt = record.get("prompt")
    if prompt is not None or not prompts:
        prompts.append(check_prompt(prompt))
    # A prompt given as text is only the first user turn of a dialogue given in full.
    if isinstance(prompt, str) and len(prompts) > 1 and prompts[-1][0] in prompts[0]:
        prompts.pop()
    if any(other != prompts[0] for other in prompts):
        raise broken("prompts differ", "'prompt', 'chosen' and 'rejected' disagree on what precedes the reply")
    chosen, rejected = sides["chosen"][1], sides["rejected"][1]
    if chosen == rejected:
        raise Reject("identical", "'chosen' equals 'rejected', which prefers nothing: drop the pair")
    if record.get("margin") is not None:
        check_number(record["margin"], "margin", 0)
    return record | {"prompt": check_prompt(prompts[0]), "chosen": chosen, "rejected": rejected}


def _side(value, side: str) -> tuple[list[dict], str]:
    """What precedes a reply, and its text: given as text, as one assistant message, or as the whole dialogue."""
    if not isinstance(value, list):
        return [], check_text(value, side)
    alone = len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant"
    messages = value if alone else check_messages(value, side)
    if messages[-1]["role"] != "assistant":
        raise broken("no reply", f"'{side}' ends with a user turn, expected a reply")
    return messages[:-1], check_text(messages[-1].get("content"), side)


def read_ranking(record: dict) -> dict:
    answers, ranks = record.get("answers"), record.get("ranks")
    if not isinstance(answers, list) or not isinstance(ranks, list) or len(answers) != len(ranks):
        raise broken("bad ranks", "'answers' and 'ranks' are not lists of one length, a rank for every answer")
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < 2**31 for rank in ranks):
        raise expected("whole numbers from 0, the best", "ranks", ranks, "bad ranks")
    if len(set(ranks)) < 2:
        raise Reject("tie", "'ranks' are all the same, which prefers nothing: drop the record")
    return read_prompt(record) | {"answers": [check_text(answer, "answers") for answer in answers]}


def read_prompt(record: dict) -> dict:
    return record | {"prompt": check_prompt(record.get("prompt"))}


def read_text(record: dict) -> dict:
    return record | {"text": check_text(record.get("text"), "text")}


FORMS = {form: Format(form, read, shapes) for form, read, *shapes in (
    ("messages", read_messages, {"messages": list}, {"messages": list, "prompt": object}),
    ("preference", read_preference, {"prompt": object, "chosen": object, "rejected": object},
     {"chosen": [dict], "rejected": [dict]},
     {"prompt": object, "chosen": object, "rejected": object, "messages": list}),
    ("ranking", read_ranking, {"prompt": object, "answers": list, "ranks": list}),
    ("prompt", read_prompt, {"prompt": object}),
    ("text", read_text, {"text": str}))}


def check_record(record: dict, form: str) -> dict:
    if not isinstance(record.get("category", ""), str):
        raise expected("text", "category", record["category"], "bad category")
    return FORMS[form].read(record)


def fault(reply) -> str:
    """Why a model's reply (data/llm.py) cannot be used, "" if it can."""
    if reply is None:
        return "no reply"
    try:
        check_text(reply.text, "reply")
    except Reject as reject:  # empty, a NUL, half a surrogate pair
        return reject.kind
    return "" if reply.finished else "cut by length"
