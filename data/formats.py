"""Data files: any published format in, records in one of five forms out, every record that is left out reported.

    messages, preference, ranking, prompt, text        the forms: data/records.py
    alpaca, hh, oasst, ultrafeedback, shp ...          the formats as published: data/native.py

    python -m data.formats FILE                        counts, rejects, and the first record as the model will see it
    python -m data.formats FILE --out good.jsonl       the same, and the good records as JSON lines
    python -m data.formats FILE --format alpaca        for a file whose first record fits several formats

A file holds JSON lines, one JSON array or object, CSV under a header, or (.txt) one text a line; .gz is read as it is.
A bare JSON string is a prompt. The first record tells the format.
"""
from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path

from data.native import NATIVE
from data.records import FORMS, Reject, broken, check_record, short
from data.tokenizer import load_tokenizer
from runtime import arguments, fail, write_text

FORMATS = FORMS | NATIVE
DEEPEST = 200  # levels of nesting; a conversation tree takes two a turn


@dataclass
class Report:
    """What became of a file's records; complete once they have been read."""

    path: str
    format: str = ""         # form of the records that come out
    native: str = ""         # format of the file
    unit: str = "line"       # of the places of rejects: line, from 1, or index in an array, from 0
    read: int = 0            # records of the file
    used: int = 0            # of them, those that gave at least one record
    out: int = 0             # records given; a conversation tree gives many
    undesirable: int = 0     # of them, those labelled as replies not to learn
    rejects: list[tuple[int, str]] = field(default_factory=list)  # (place, reason); also parts of records that are used
    kinds: Counter = field(default_factory=Counter)               # rejects by kind of reason

    def note(self, place: int, reject: Reject) -> None:
        self.rejects.append((place, str(reject)))
        self.kinds[reject.kind] += 1

    def refuse(self) -> None:
        """End the run with the first reject, and how many there are: training takes whole files or none."""
        if self.rejects:
            (place, reason), count = self.rejects[0], len(self.rejects)
            keep = f"`python -m data.formats {self.path} --out good.jsonl` keeps the others"
            fail(f"{self.path} {self.unit} {place}: {reason}{f' ({count} rejects: {keep})' if count > 1 else ''}")
        self.check_used()
        if self.undesirable:
            fail(f"{self.path}: {self.undesirable} of its {self.out} dialogues are labelled false, "
                 "as replies not to learn: drop those")

    def check_used(self) -> None:
        """End the run if no record could be used; measuring a file can do without its rejects."""
        if not self.used:
            fail(f"{self.path}: none of its {self.read} records can be used: "
                 f"run python -m data.formats {self.path} to see why" if self.read else
                 f"{self.path}: is empty, expected one JSON record a line")


def read(path: str | Path, format: str | None = None) -> tuple[Iterator[dict], Report]:
    """The records of a file, one by one, and the report that fills up meanwhile. The first record tells the format."""
    if not Path(path).is_file():
        fail(f"{path}: no such file, expected JSON lines")
    if format is not None and format not in FORMATS:
        fail(f"{path}: format '{format}' is unknown, expected one of {', '.join(FORMATS)}")
    report = Report(str(path), FORMATS[format].form if format else "", format or "")
    return _records(Path(path), report), report


def read_all(path: str | Path, format: str | None = None) -> list[dict]:
    """All records of a file; the run ends with the first reject if there is one."""
    records, report = read(path, format)
    records = list(records)
    report.refuse()
    return records


def _records(path: Path, report: Report) -> Iterator[dict]:
    for place, value in values(path, report):
        report.read += 1
        before = report.out
        for part in [value] if isinstance(value, Reject) else _parts(value, report):
            if isinstance(part, Reject):
                report.note(place, part)
            else:
                report.out += 1
                report.used += report.out == before + 1
                report.undesirable += report.format == "messages" and part.get("label") is False
                yield part


def _parts(value, report: Report) -> Iterator[dict | Reject]:
    """What the file's reader makes of a value, each part checked; the first record tells which reader that is."""
    try:
        record = _object(value, report)
        if not report.native:
            report.native = recognise(record, report.path)
            report.format = FORMATS[report.native].form
        found = FORMATS[report.native].read(record)
        for part in [found] if isinstance(found, dict) else found:
            try:
                yield part if isinstance(part, Reject) else check_record(part, report.format)
            except Reject as reject:
                yield reject
    except Reject as reject:
        yield reject


def recognise(record: dict, path: str) -> str:
    """The one format whose shape the record has. A shape gives way to one that asks for the same keys and more."""
    fitting = [(name, set(shape)) for name, format in FORMATS.items() for shape in format.shapes
               if all(key in record and _fits(record[key], kind) for key, kind in shape.items())]
    names = list(dict.fromkeys(name for name, keys in fitting if not any(keys < other for _, other in fitting)))
    if len(names) > 1:
        fail(f"{path}: its first record could be {' or '.join(names)}: name its format, "
             f"`python -m data.formats {path} --format {names[0]} --out named.jsonl`")
    if not names:
        keys = ", ".join(short(key) for key in list(record)[:6])
        raise Reject("unknown format", f"has the keys {keys} with values that fit no format, expected 'messages', "
                                       "'chosen' and 'rejected', or 'text': mend or drop it, or name the format")
    return names[0]


def _fits(value, kind) -> bool:
    """[dict]: a list of objects; [str, str]: of at least two texts; (str,): of exactly one."""
    if not isinstance(kind, list | tuple):
        return isinstance(value, kind)
    if not isinstance(value, list) or len(value) < len(kind) or isinstance(kind, tuple) and len(value) > len(kind):
        return False
    return all(isinstance(item, kind[0]) for item in value)


# --------------------------------------------------------------------------------- from bytes to values

def values(path: Path, report: Report) -> Iterator[tuple[int, object]]:
    """Place and value of every record; a Reject in place of a value that cannot be read."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            yield from stream_values(stream, Path(path.name.removesuffix(".gz")).suffix, report)
    except (OSError, EOFError, zlib.error) as error:
        fail(f"{path}: cannot be read ({error}): is it whole? copy it again")


def stream_values(stream, suffix: str, report: Report) -> Iterator[tuple[int, object]]:
    """The same of an open file."""
    if stream.peek(3)[:3] == b"\xef\xbb\xbf":
        stream.read(3)
    if suffix == ".csv":
        yield from _csv_values(stream.read().decode("utf-8", "surrogateescape"))
    elif suffix == ".txt":
        lines = (line.decode("utf-8", "surrogateescape").rstrip("\r\n") for line in stream)
        yield from ((number, _unless_broken({"text": line}, line)) for number, line in enumerate(lines, 1))
    else:
        yield from _json_values(stream, suffix, report)


def _csv_values(text: str) -> Iterator[tuple[int, object]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    while True:
        line, fault = max(rows.line_num, 1) + 1, ""  # the header is read together with the first row
        try:
            if (row := next(rows, None)) is None:
                return
            if None in row or None in row.values():
                fault = f"has another number of fields than the header's {len(rows.fieldnames)}"
        except csv.Error as error:
            fault = f"is not CSV ({error})"
        if fault:
            yield line, broken("not CSV", fault)
        else:
            yield line, _unless_broken(row, "".join(row.values()))


def _json_values(stream, suffix: str, report: Report) -> Iterator[tuple[int, object]]:
    """JSON lines, unless the file is one array, or one object over several lines."""
    number, first = 1, stream.readline()
    while first and not first.strip():
        number, first = number + 1, stream.readline()
    line_is_whole = not isinstance(_parse(first), Reject)
    rest = b""
    if first.lstrip()[:1] == b"[":
        rest = stream.read()
        if not line_is_whole or not rest.strip():
            report.unit = "index"
            yield from _array((first + rest).decode("utf-8", "surrogateescape"))
            return
    elif suffix == ".json" and not line_is_whole:
        rest = stream.read()
        whole = _parse(first + rest)
        if not isinstance(whole, Reject):
            yield number, whole
            return
    for place, line in enumerate(chain([first], io.BytesIO(rest), stream), number):
        if line.strip():
            yield place, _parse(line)


def _array(text: str) -> Iterator[tuple[int, object]]:
    """The items of an array one by one; after a broken one it goes on at the next line that opens one at its indent."""
    index, at = 0, BLANK.match(text, text.index("[") + 1).end()
    while text[at:at + 1] != "]" or index:  # [] holds nothing
        try:
            value, end = DECODER.raw_decode(text, at)
            yield index, _unless_broken(value, text[at:end])
            index, end = index + 1, BLANK.match(text, end).end()
            if text[end:end + 1] == "]":
                return
            if text[end:end + 1] == ",":
                at = BLANK.match(text, end + 1).end()
                continue
            error = "a comma is missing before it" if end < len(text) else "the array has no end"
        except (ValueError, RecursionError) as problem:
            error = problem
        indent = text[text.rfind("\n", 0, at) + 1 : at]
        again = text.find(f"\n{indent}{{", at) if not indent.strip() else -1
        unread = "" if again >= 0 else f", and the {len(text) - at} characters from it on are unread"
        yield index, Reject("not JSON", f"is not JSON ({error}){unread}: mend or drop it")
        if again < 0:
            return
        index, at = index + 1, again + 1 + len(indent)


def _parse(line: bytes):
    try:
        return json.loads(line.decode("utf-8"), parse_int=_integer)
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, RecursionError) as error:
        return Reject("not JSON", f"is not JSON ({error}): mend or drop it")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= 300 else float("inf")  # Python refuses to read thousands of digits


def _unless_broken(value, text: str):
    """The value, if the text it is from, decoded with surrogateescape, was UTF-8."""
    return value if text.isascii() or not re.search("[\udc80-\udcff]", text) else NOT_UTF8


def _object(value, report: Report) -> dict:
    """A value as a record: an object of finite numbers, not nested without end."""
    if isinstance(value, str) and report.native in ("", "prompt"):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise broken("not an object", f"is a JSON {type(value).__name__}, expected an object")
    level, depth = [value], 0
    while level:
        if depth == DEEPEST:
            raise broken("nested too deeply", f"is nested more than {DEEPEST} levels deep")
        if any(isinstance(v, float) and not abs(v) < float("inf") for v in level):
            raise Reject("not a number", "holds NaN, Infinity or a number too large, which JSON has not: "
                                         "write null or drop it")
        level = [w for v in level for w in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        depth += 1
    return value


NOT_UTF8 = Reject("not UTF-8", "is not UTF-8 text, mend or drop it: is it another kind of file?")
DECODER = json.JSONDecoder(parse_int=_integer)
BLANK = re.compile(r"[ \t\r\n]*")


# ------------------------------------------------------------------------------------ the command line

def view(record: dict, form: str, tokenizer) -> str:
    """A record token by token as the model will see it; of long runs without or with loss, the two ends."""
    from data import pack  # here, because pack reads its files with this module

    (tree,) = pack.trees_of([record], form, tokenizer)
    lines = []
    for _, run in groupby(pack.show(tree, tokenizer).split("\n"), key=lambda line: line.split()[2:3]):
        run = list(run)
        lines += run if len(run) <= 16 else [*run[:6], f"   {'...':>5} {len(run) - 12} more of these", *run[-6:]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.formats", description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--format", metavar="NAME",
                        help=f"the file's format: {', '.join(FORMATS)} (default: its first record tells)")
    parser.add_argument("--out", help="write the good records here, as JSON lines")
    parser.add_argument("--tokenizer", default="data/tiny/base",
                        help="checkpoint whose tokenizer and template show the first record")
    words = arguments(parser)
    records, report = read(words.file, words.format)
    records = list(records)
    for place, reason in report.rejects:
        print(f"{report.unit} {place}: {reason}")
    print(f"{words.file}: format {report.native or 'unknown'}, {report.read} read, {report.used} used, "
          f"{report.read - report.used} rejected; {report.out} {report.format} records")
    for kind, count in report.kinds.most_common():
        print(f"  {count:6d} {kind}")
    if words.out:
        write_text(Path(words.out), "".join(json.dumps(r) + "\n" for r in records))
    if records:
        tokenizer = load_tokenizer(words.tokenizer)
        tokenizer.adopt()
        print(f"\nthe first record, {words.tokenizer}, template {tokenizer.template}")
        print(view(records[0], report.format, tokenizer))


if __name__ == "__main__":
    main()
