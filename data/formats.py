"""Readers: a JSONL file as canonical records, every bad line reported with its number and reason.

    messages     {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    preference   {"prompt": [messages] or "text", "chosen": "text" or [messages], "rejected": ..., "margin": 1-4}
    ranking      {"prompt": as above, "answers": ["text", ...], "ranks": [0, 2, 1, ...]}      0 is best, equal ranks are ties
    prompt       {"prompt": as above}                      to sample replies to
    text         {"text": "..."}

Other keys (id, category, annotator ...) travel along. `.jsonl.gz` is read as it is.

    python -m data.formats FILE                        counts and every rejected line
    python -m data.formats FILE --out good.jsonl       the same, and the good records in the form above
"""
from __future__ import annotations

import argparse
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runtime import fail, write_text


class Reject(Exception):
    """Why a record cannot be used."""


@dataclass
class Report:
    """What became of the lines of a file; complete once its records have been read."""

    path: str
    format: str = ""
    read: int = 0
    rejects: list[tuple[int, str]] = field(default_factory=list)  # (line number, reason)

    def refuse(self) -> None:
        """Training takes whole files: leave with the first bad line, and how many there are."""
        if self.rejects:
            line, reason = self.rejects[0]
            more = f" ({len(self.rejects)} bad lines: `python -m data.formats {self.path} --out good.jsonl` keeps the others)"
            fail(f"{self.path} line {line}: {reason}{more if len(self.rejects) > 1 else ''}")
        if self.read == 0:
            fail(f"{self.path}: is empty, expected one JSON record a line")


def read(path: str | Path, format: str | None = None) -> tuple[Iterator[dict], Report]:
    """The records of a file, one by one, and the report that fills up meanwhile. The first record tells the format."""
    report = Report(str(path), format or "")
    if not Path(path).is_file():
        fail(f"{path}: no such file, expected JSON lines")
    if format is not None and format not in READERS:
        fail(f"{path}: format '{format}' is unknown, expected one of {', '.join(READERS)}")
    return _records(Path(path), report), report


def _records(path: Path, report: Report) -> Iterator[dict]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        report.read += 1
        try:
            record = _parse(line)
            report.format = report.format or _recognise(record)
            yield READERS[report.format](record)
        except Reject as reason:
            report.rejects.append((number, str(reason)))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            yield from lines
    except (OSError, EOFError, zlib.error) as error:
        fail(f"{path}: cannot be read ({error}): is it whole? copy it again")


def _parse(line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise Reject("is not UTF-8 text, expected one JSON record a line: is it another kind of file?") from None
    except (ValueError, RecursionError) as error:
        raise Reject(f"is not JSON ({error}): mend or drop it") from None
    if not isinstance(record, dict):
        raise Reject(f"is a JSON {type(record).__name__}, expected an object: mend or drop it")
    return record


def _recognise(record: dict) -> str:
    for name, key in (("preference", "chosen"), ("ranking", "ranks"), ("messages", "messages"), ("prompt", "prompt"), ("text", "text")):
        if key in record:
            return name
    raise Reject(f"has the keys {', '.join(list(record)[:6])}, expected 'messages', 'chosen' and 'rejected', or 'text'")


def _text(value, key: str) -> str:
    if not isinstance(value, str):
        raise Reject(f"'{key}' is {json.dumps(value)[:40]}, expected text: mend or drop the record")
    if not value.strip():
        raise Reject(f"'{key}' is empty, expected text: fill it in or drop the record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Reject(f"'{key}' holds half a surrogate pair, which is no text: mend or drop the record") from None
    return value


def _messages(value, key: str) -> list[dict]:
    """A dialogue: perhaps a system text, then user and assistant in turn."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise Reject(f"'{key}' is {json.dumps(value)[:40]}, expected a list of messages: mend or drop the record")
    messages = [{"role": m.get("role"), "content": _text(m.get("content"), f"{key}.content")} for m in value]
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for i, m in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if m["role"] != expected:
            raise Reject(f"'{key}' has role {m['role']!r} where {expected} is due: roles alternate, user first; mend or drop it")
    if not turns:
        raise Reject(f"'{key}' has no user turn: mend or drop the record")
    return messages


def read_messages(record: dict) -> dict:
    messages = _messages(record.get("messages"), "messages")
    if messages[-1]["role"] != "assistant":
        raise Reject("'messages' ends with a user turn, expected a reply to learn: cut the turn or add the reply")
    return record | {"messages": messages}


def read_preference(record: dict) -> dict:
    """prompt becomes messages that end with the user; chosen and rejected become the texts of the reply."""
    sides = {}
    for side in ("chosen", "rejected"):
        value = record.get(side)
        if isinstance(value, list):  # messages: the reply alone, or the whole dialogue
            alone = len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant"
            messages = value if alone else _messages(value, side)
            sides[side] = (messages[:-1], _text(messages[-1].get("content"), side))
        else:
            sides[side] = ([], _text(value, side))
    prompts = [before for before, _ in sides.values() if before]
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        prompts.append([{"role": "user", "content": _text(prompt, "prompt")}])
    elif prompt is not None or not prompts:
        prompts.append(_messages(prompt, "prompt"))
    # A prompt given as text is only the first user turn of a dialogue given in full.
    if isinstance(prompt, str) and len(prompts) > 1 and prompts[-1][0] in prompts[0]:
        prompts.pop()
    prompt = prompts[0]
    if any(other != prompt for other in prompts):
        raise Reject("'prompt', 'chosen' and 'rejected' disagree on what precedes the reply, expected one prompt: mend or drop the record")
    if prompt[-1]["role"] != "user":
        raise Reject("'prompt' ends with a reply, expected a user turn: mend or drop the record")
    chosen, rejected = sides["chosen"][1], sides["rejected"][1]
    if chosen == rejected:
        raise Reject("'chosen' equals 'rejected', which prefers nothing: drop the pair")
    margin = record.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < float("inf")):
        raise Reject(f"'margin' is {json.dumps(margin)[:40]}, expected a number of at least 0: mend or drop the record")
    return record | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_prompt(record: dict) -> dict:
    """prompt becomes messages that end with the user."""
    prompt = record.get("prompt")
    prompt = [{"role": "user", "content": _text(prompt, "prompt")}] if isinstance(prompt, str) else _messages(prompt, "prompt")
    if prompt[-1]["role"] != "user":
        raise Reject("'prompt' ends with a reply, expected a user turn: mend or drop the record")
    return record | {"prompt": prompt}


def read_ranking(record: dict) -> dict:
    answers, ranks = record.get("answers"), record.get("ranks")
    if not isinstance(answers, list) or not isinstance(ranks, list) or len(answers) != len(ranks):
        raise Reject("'answers' and 'ranks' are not lists of one length, expected a rank for every answer: mend or drop the record")
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in ranks):
        raise Reject(f"'ranks' is {json.dumps(ranks)[:40]}, expected whole numbers from 0, the best: mend or drop the record")
    if len(set(ranks)) < 2:
        raise Reject("'ranks' are all the same, which prefers nothing: drop the record")
    return read_prompt(record) | {"answers": [_text(answer, "answers") for answer in answers]}


def read_text(record: dict) -> dict:
    return record | {"text": _text(record.get("text"), "text")}


READERS = {"messages": read_messages, "preference": read_preference, "ranking": read_ranking, "prompt": read_prompt,
           "text": read_text}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.formats", description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--out", help="write the good records here")
    words = parser.parse_args()
    records, report = read(words.file)
    records = list(records)
    for line, reason in report.rejects:
        print(f"line {line}: {reason}")
    print(f"{words.file}: format {report.format or 'unknown'}, {report.read} read, {len(records)} used, {len(report.rejects)} rejected")
    if words.out:
        write_text(Path(words.out), "".join(json.dumps(r) + "\n" for r in records))


if __name__ == "__main__":
    main()
