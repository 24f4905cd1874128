"""Data files: any published format in, records in one of five forms out, every record that is left out reported.

    messages, preference, ranking, prompt, text        the forms: data/records.py
    alpaca, sharegpt, hh, oasst, ultrafeedback ...     as published: data/native.py and, of preferences, preferences.py
    JSON lines, Parquet, folders of shards ...         what a path may name: data/files.py

    python -m data.formats FILE                        counts, rejects, and the first record as the model will see it
    python -m data.formats FILE --out good.jsonl       the same, and the good records as JSON lines
    python -m data.formats FILE --format alpaca        for a file whose first record fits several formats
    python -m data.formats FILE --columns prompt=ask   for a file that calls a format's keys by other names

A bare JSON string is a prompt. The first record tells the format.
"""
import argparse
import difflib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import FunctionType

from data.files import shards, values, with_lists
from data.native import ANSWERED, ASKED, NATIVE
from data.preferences import PREFERENCES
from data.records import FORMS, REASONING, SYSTEM, Reject, as_whole, broken, check_columns, check_record, doubts, short
from data.tokenizer import TemplateError, load_tokenizer
from runtime import arguments, fail, replacing

PUBLISHED = NATIVE | PREFERENCES
FORMATS = FORMS | PUBLISHED
LISTS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected")  # perhaps in a text
LOOKED_AT = 1000  # records that are searched for doubts: one that is otherwise meant is so throughout the data set
DEEPEST = 200  # levels of nesting; a conversation tree takes two a turn


@dataclass
class Report:
    """What became of the records of a data set; complete once they have been read."""

    path: str
    format: str = ""         # form of the records that come out
    native: str = ""         # format of the file
    columns: dict[str, str] = field(default_factory=dict)  # keys of the format: what the file calls them
    unit: str = "line"       # of places: line, from 1; index in an array or row of a table, from 0; shard, line or row
    read: int = 0            # records of the file
    used: int = 0            # of them, those that gave at least one record
    out: int = 0             # records given; a conversation tree gives many
    undesirable: int = 0     # of them, those labelled as replies not to learn
    rejects: list[tuple[int | str, str]] = field(default_factory=list)  # (place, reason); also of parts of used records
    kinds: Counter = field(default_factory=Counter)               # rejects by kind of reason
    doubts: dict[str, list] = field(default_factory=dict)         # what may be meant otherwise: [first place, count]

    def note(self, place: int | str, reject: Reject) -> None:
        self.rejects.append((place, str(reject)))
        self.kinds[reject.kind] += 1

    @property
    def command(self) -> str:
        """How to look at this data set."""
        columns = [f"{key}={name}" for key, name in self.columns.items()]
        return shlex.join(["python", "-m", "data.formats", self.path, *(["--columns", *columns] if columns else [])])

    @property
    def warnings(self) -> list[str]:
        """One line for every kind of doubt."""
        return [f"{self.path} {self.unit} {place}: {doubt}" + f" (and {count - 1} more records)" * (count > 1)
                for doubt, (place, count) in self.doubts.items()]

    def refuse(self, imitated: bool = True) -> None:
        """End the run with the first reject, and how many there are: training takes whole files or none.

        What may be meant otherwise is printed. Where replies are not imitated (the prompts alone are used, or labels
        are learnt from) no label stands in the way.
        """
        labels = "--labels " * (self.undesirable > 0 and not imitated)
        others = f"`{self.command} {labels}--out good.jsonl` keeps the others"
        if self.rejects:
            (place, reason), count = self.rejects[0], len(self.rejects)
            keep = f" ({count} reject{'s' * (count > 1)}: {others})" if self.used else ""
            fail(f"{self.path} {self.unit} {place}: {reason}{keep}")
        self.check_used()
        if self.undesirable and imitated:
            keep = f": {others}" if self.undesirable < self.out else ""
            fail(f"{self.path}: {self.undesirable} of its {self.out} dialogues are labelled false, "
                 f"as replies not to learn: train with kto.py, or drop those{keep}")
        for warning in self.warnings:
            print(f"warning: {warning}")

    def check_used(self) -> None:
        """End the run if no record could be used; measuring a file can do without its rejects."""
        if not self.used:
            fail(f"{self.path}: none of its {self.read} records can be used: run {self.command} to see why" if self.read
                 else f"{self.path}: is empty, expected one JSON record a line")


def read(path: str | Path, format: str | None = None,
         columns: dict[str, str] | None = None) -> tuple[Iterator[dict], Report]:
    """The records of a data set, and the report that fills up meanwhile. `columns`: the file's by the format's keys."""
    shards(path)
    if format is not None and format not in FORMATS:
        fail(f"{path}: format '{format}' is unknown, expected one of {', '.join(FORMATS)}")
    for key in columns or ():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            fail(f"{path}: columns.{key} names no key of a format, "
                 + (f"did you mean columns.{near[0]}?" if near else "expected e.g. columns.prompt or columns.response"))
    report = Report(str(path), FORMATS[format].form if format else "", format or "", columns or {})
    return _records(path, report), report


OPTIONAL = (*SYSTEM, *REASONING, "input", "context", "history", "label", "kto_tag", "margin", "category", "id")
KEYS = sorted({key for format in FORMATS.values() for shape in format.shapes for key in shape} | {*OPTIONAL})


def read_all(path: str | Path, format: str | None = None) -> list[dict]:
    """All records of a file; the run ends with the first reject if there is one."""
    records, report = read(path, format)
    records = list(records)
    report.refuse()
    return records


def _records(path: str | Path, report: Report) -> Iterator[dict]:
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
                if report.out <= LOOKED_AT:
                    for doubt in doubts(value, part, report.format):
                        report.doubts.setdefault(doubt, [place, 0])[1] += 1
                yield part


def _parts(value, report: Report) -> Iterator[dict | Reject]:
    """What the file's reader makes of a value, each part checked; the first record tells which reader that is."""
    try:
        record = _object(value, report)
        if not report.native:
            report.native = recognise(record, report.path, report.columns)
            report.format = FORMATS[report.native].form
        shared = check_columns(record, report.format)
        found = record if report.native in FORMS else PUBLISHED[report.native].read(record)
        for part in [found] if isinstance(found, dict) else found:
            try:
                yield part if isinstance(part, Reject) else check_record(shared | part, report.format)
            except Reject as reject:
                yield reject
    except Reject as reject:
        yield reject


# ------------------------------------------------------------------------------------- which format

# What a record holds besides is less than what the first of these ask for, and more than what the last do.
RANKS = {"ultrafeedback_binarized": 0, "completion": 1.5, "question_answer": 2, "prompt": 3, "text": 3}


def recognise(record: dict, path: str, columns: dict[str, str] | None = None) -> str:
    """The one format whose shape the record has. A shape gives way to one that asks for the same keys and more."""
    fitting = [(name, set(shape)) for name, format in FORMATS.items() for shape in format.shapes
               if all(key in record and _fits(record[key], kind) for key, kind in shape.items())]
    named = max((len(keys & set(columns or ())) for _, keys in fitting), default=0)  # what the user has named decides
    fitting = [(name, keys) for name, keys in fitting if len(keys & set(columns or ())) == named]
    names = list(dict.fromkeys(name for name, keys in fitting if not any(keys < other for _, other in fitting)))
    names = [name for name in names if RANKS.get(name, 1) == min(RANKS.get(other, 1) for other in names)]
    if len(names) > 1:
        fail(f"{path}: its first record could be {' or '.join(names)}: name its format, "
             f"`python -m data.formats {path} --format {names[0]} --out named.jsonl`")
    if not names:
        raise _unknown(record)
    return names[0]


def _fits(value, kind) -> bool:
    """[dict]: a list of objects; [str, str]: of at least two texts; (str,): of exactly one. A function says itself."""
    if isinstance(kind, FunctionType):
        return kind(value)
    if not isinstance(kind, list | tuple):
        return isinstance(as_whole(value) if kind is int else value, kind)
    if not isinstance(value, list) or len(value) < len(kind) or isinstance(kind, tuple) and len(value) > len(kind):
        return False
    return all(isinstance(item, kind[0]) for item in value)


def _unknown(record: dict) -> Reject:
    """Why a record fits no format: the value that stands in the way of the format nearest to it, or its keys."""
    near = [(len(shape), name, key, record[key]) for name, format in FORMATS.items() for shape in format.shapes
            if shape.keys() <= record.keys() for key, kind in shape.items()
            if kind is str and not isinstance(record[key], str)]
    if near:
        _, name, key, value = max(near, key=lambda found: found[0])
        return broken("unknown format", f"'{key}' is {short(value)}, expected text as {name} has it")
    keys = ", ".join(short(key) for key in list(record)[:6])
    return Reject("unknown format", f"has the keys {keys} with values that fit no format, expected 'messages', "
                                    "'chosen' and 'rejected', or 'text': mend or drop it, or name its columns, e.g. "
                                    "columns.prompt=\"ask\"")


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
    record = _named({key: v for key, v in value.items() if v is not None}, report.columns)
    lists = with_lists({key: record[key] for key in LISTS if isinstance(record.get(key), str)})
    if isinstance(lists, Reject):
        raise lists
    return record | lists


def _named(record: dict, columns: dict[str, str]) -> dict:
    """The record with the columns that the user has named under the format's keys."""
    if not columns:
        return record
    for key, name in columns.items():
        if name not in record and key not in OPTIONAL:
            raise broken("missing column", f"has no '{name}', which columns.{key} names, but "
                                           f"{', '.join(short(other) for other in list(record)[:6])}")
    # What the user says has one name, and so has the reply: a column that is not the named one is not it.
    rivals = {name for names in (ASKED, ANSWERED) if columns.keys() & set(names) for name in names}
    others = {key: value for key, value in record.items() if key not in columns.values() and key not in rivals}
    return others | {key: record[name] for key, name in columns.items() if name in record}


# ------------------------------------------------------------------------------------ the command line

def view(record: dict, form: str, tokenizer) -> str:
    """A record token by token as the model will see it; of long runs without or with loss, the two ends."""
    from data import pack, trees  # here, because these read their files with this module

    (tree,) = trees.trees_of([record], form, tokenizer)
    lines = []
    for _, run in groupby(pack.show(tree, tokenizer).split("\n"), key=lambda line: line.split()[2:3]):
        run = list(run)
        lines += run if len(run) <= 16 else [*run[:6], f"   {'...':>5} {len(run) - 12} more of these", *run[-6:]]
    return "\n".join(lines)


def written(records: Iterator[dict], path: Path) -> Iterator[dict]:
    """The records, each written on its way; the file is there once all of them have passed."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, default=str) + "\n")
            yield record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.formats", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a file, a folder of shards, or a pattern in quotes")
    parser.add_argument("--format", metavar="NAME",
                        help=f"the file's format: {', '.join(FORMATS)} (default: its first record tells)")
    parser.add_argument("--columns", metavar="KEY=NAME", nargs="+", default=[],
                        help="what the file calls the keys of its format, e.g. prompt=question response=reply")
    parser.add_argument("--out", help="write the good records here, as JSON lines")
    parser.add_argument("--labels", action="store_true", help="keep dialogues labelled false, which kto.py learns from")
    parser.add_argument("--tokenizer", default="data/tiny/base",
                        help="checkpoint whose tokenizer and template show the first record")
    words = arguments(parser)
    for word in words.columns:
        if not all(word.partition("=")):
            parser.error(f"argument --columns: '{word}' is not KEY=NAME")
    found, report = read(words.file, words.format, dict(word.split("=", 1) for word in words.columns))
    records = (record for record in found
               if words.labels or report.format != "messages" or record.get("label") is not False)
    first = None
    for record in written(records, Path(words.out)) if words.out else records:
        first = first or record
    for place, reason in report.rejects:
        print(f"{report.unit} {place}: {reason}")
    print(f"{words.file}: format {report.native or 'unknown'}, {report.read} read, {report.used} used, "
          f"{report.read - report.used} rejected; {report.out} {report.format} records")
    for kind, count in report.kinds.most_common():
        print(f"  {count:6d} {kind}")
    if report.undesirable:
        print(f"  {report.undesirable:6d} labelled false, as replies not to learn" + ": left out" * (not words.labels))
    for warning in report.warnings:
        print(f"warning: {warning}")
    if first:
        tokenizer = load_tokenizer(words.tokenizer)
        tokenizer.adopt()
        print(f"\nthe first record, {words.tokenizer}, template {tokenizer.template}")
        try:
            print(view(first, report.format, tokenizer))
        except TemplateError as error:
            print(f"cannot be shown: {error}")
    sys.stdout.flush()
    if not report.used:
        fail(f"{words.file}: none of its {report.read} records can be used" if report.read else
             f"{words.file}: is empty, expected one JSON record a line")


if __name__ == "__main__":
    main()
