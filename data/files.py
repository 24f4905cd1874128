"""From bytes to values: which files a path names, and the records in them one by one.

A path is a file, a folder, or a pattern such as 'ultrafeedback/data/train_prefs-*.parquet'. The files of a folder or a
pattern are one data set, in the order of their names; of a folder with several, one has to be chosen. A file holds JSON
lines, one JSON array or object, CSV under a header, (.txt) one text a line, Parquet, or Arrow as datasets'
save_to_disk writes it; .gz and .zst are unpacked on the way. Parquet, Arrow and .zst need pyarrow.
"""
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType

from data.records import Reject, broken
from runtime import fail

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt")
PACKED = (".gz", ".zst")
# What `datasets` and the hub write beside the data.
BESIDE = re.compile(r"state\.json|dataset_infos?\.json|dataset_dict\.json|cache-.*\.arrow")
TRAIN, HELD_OUT = ("train", "training"), ("test", "testing", "eval", "evaluation", "valid", "validation", "val", "dev")
SPLIT = re.compile(rf"(?<![a-z])({'|'.join(TRAIN + HELD_OUT)})(?![a-z])", re.IGNORECASE)
HUB_ID = re.compile(r"(?:hf://|https?://huggingface\.co/)?(?:datasets/)?([\w.-]+/([\w.-]+))")


# ------------------------------------------------------------------------------------ which files

def exists(path: str | Path) -> bool:
    """Is there a file, a folder, or anything that the pattern matches?"""
    return Path(path).exists() or bool(glob.glob(str(path), recursive=True))


def shards(path: str | Path) -> list[Path]:
    """The files of the data set that a path names."""
    name, path = str(path), Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _of_folder(path)
    files = [file for file in map(Path, sorted(glob.glob(name, recursive=True)))
             if file.is_file() and not BESIDE.fullmatch(file.name)]
    if not files:
        hub = HUB_ID.fullmatch(name)
        if hub and kind_of(path) not in KINDS and not Path(name.split("/")[0]).exists():
            fail(f"{name}: no such file or folder; a data set of the Hugging Face hub is fetched first, "
                 f"`hf download {hub[1]} --repo-type dataset --local-dir {hub[2]}`, and then called {hub[2]}")
        fail(f"{name}: no such file, expected a data file, a folder of them, or a pattern that matches some")
    within = [os.path.relpath(file, os.path.commonpath([file.parent for file in files])) for file in files]
    if len({word[0].lower() in TRAIN for part in within if (word := SPLIT.search(part))}) > 1:
        _choose(path, [str(file.with_name(_pattern(file.name))) for file in files])
    return files


def kind_of(file: Path) -> str:
    """.jsonl of data.jsonl.gz."""
    return Path(file.stem if file.suffix in PACKED else file.name).suffix


def _of_folder(folder: Path) -> list[Path]:
    """Its data files at any depth, if they are one data set: of one kind, folder and (where named so) split."""
    files = [file for file in sorted(folder.rglob("*"))
             if kind_of(file) in KINDS and not BESIDE.fullmatch(file.name) and file.is_file()
             and not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = [file for file in files if kind_of(file) != ".txt"] or files  # a README or a licence beside others
    if not files:
        fail(f"{folder}: is a folder without data files, expected some of {', '.join(KINDS)}")
    named = any(SPLIT.search(str(file.relative_to(folder))) for file in files)
    kinds = ["".join(file.suffixes[-2:] if file.suffix in PACKED else [file.suffix]) for file in files]
    sets = [str(file.with_name(_pattern(file.name) if named else f"*{kind}"))
            for file, kind in zip(files, kinds, strict=True)]
    if len(set(sets)) > 1:
        _choose(folder, sets)
    told = re.search(r"-of-0*(\d+)", files[0].name)
    if told and len(files) < int(told[1]):
        fail(f"{folder}: holds {len(files)} of {told[1]} shards, by the name of {files[0].name}: fetch the others, or "
             f"name these alone by a pattern, '{sets[0]}'")
    return files


def _pattern(name: str) -> str:
    """The pattern of a shard's name: train-*.parquet of train-00000-of-00003-0a1b2c.parquet."""
    return re.sub(r"(\d+-of-\d+(-\w+)?|\d+)(?=(\.[a-z]+)+$)", "*", name)


def _choose(path: Path, names: list[str]) -> None:
    names = list(dict.fromkeys(names))
    shown = ", ".join(f"'{name}'" for name in names[:8]) + ", ..." * (len(names) > 8)
    fail(f"{path}: holds {len(names)} data sets, which do not belong together: choose one of {shown}")


# --------------------------------------------------------------------------------- values and places

def values(path: str | Path, report) -> Iterator[tuple[int | str, object]]:
    """Place (in report.unit; of several files, with the name) and value of every record, or a Reject."""
    files = shards(path)
    for file in files:
        for unit, place, value in _of_file(file):
            report.unit = unit if len(files) == 1 else "shard"
            yield (place if len(files) == 1 else f"{file.name} {unit} {place}"), value


def stream_values(stream, suffix: str, report) -> Iterator[tuple[int, object]]:
    """The same of an open file, of kind `suffix`."""
    for report.unit, place, value in _of_stream(stream, suffix):
        yield place, value


Values = Iterator[tuple[str, int, object]]  # unit of the place, place, value


def _of_file(file: Path) -> Values:
    try:
        if file.suffix == ".zst":
            stream = io.BufferedReader(_pyarrow(file).input_stream(str(file), compression="zstd"))
        else:
            stream = gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")
        with stream:
            start = stream.peek(6)[:6]
            if start[:4] == b"PAR1" or start == b"ARROW1" or kind_of(file) == ".arrow":
                yield from _of_table(file, start)
            else:
                yield from _of_stream(stream, kind_of(file))
    except (OSError, EOFError, zlib.error) as error:
        fail(f"{file}: cannot be read ({error}): is it whole? copy it again")


def _pyarrow(file: Path) -> ModuleType:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        fail(f"{file}: needs pyarrow to be read: pip install pyarrow")
    return pyarrow


def _of_table(file: Path, start: bytes) -> Values:
    """Rows, from 0, of Parquet or Arrow, a batch at a time."""
    arrow = _pyarrow(file)
    try:
        if start[:4] == b"PAR1":
            batches = arrow.parquet.ParquetFile(file).iter_batches(1000)
        elif start == b"ARROW1":
            reader = arrow.ipc.open_file(arrow.memory_map(str(file)))
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = arrow.ipc.open_stream(arrow.memory_map(str(file)))
        slices = (batch.slice(begin, 1000) for batch in batches for begin in range(0, len(batch), 1000))
        for row, value in enumerate(value for part in slices for value in _rows(part)):
            yield "row", row, value
    except (arrow.ArrowException, OSError) as error:
        fault = str(error).splitlines()[0].rstrip(".")
        fail(f"{file}: cannot be read as Parquet or Arrow ({fault}): is it whole? copy it again")


def _rows(batch) -> list:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [NOT_UTF8] if len(batch) == 1 else [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _of_stream(stream, suffix: str) -> Values:
    if stream.peek(3)[:3] == b"\xef\xbb\xbf":
        stream.read(3)
    if suffix == ".csv":
        yield from _of_csv(io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline=""))
    elif suffix == ".txt":
        lines = (line.decode("utf-8", "surrogateescape").rstrip("\r\n") for line in stream)
        yield from (("line", number, _unless_broken({"text": line}, line)) for number, line in enumerate(lines, 1))
    else:
        yield from _of_json(stream, suffix)


# ----------------------------------------------------------------------------------------------- CSV

def _of_csv(text: io.TextIOBase) -> Values:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(text)
    while True:
        line, fault = max(rows.line_num, 1) + 1, ""  # the header is read together with the first row
        try:
            if (row := next(rows, None)) is None:
                return
            twice = [name for name, count in Counter(rows.fieldnames).items() if name and count > 1]
            if twice:
                fault = f"is under a header with two columns '{twice[0]}'"
            elif None in row or None in row.values():
                fault = f"has another number of fields than the header's {len(rows.fieldnames)}"
        except csv.Error as error:
            fault = f"is not CSV ({error})"
        if fault:
            yield "line", line, broken("not CSV", fault)
        else:
            yield "line", line, _unless_broken(with_lists(row), "".join(row.values()))


# A message, or a list of them, as JSON or as Python prints it; or a list of rounds
MESSAGES = re.compile(
    r"""\s*(\[\s*)?\{(?=.*['"](role|from)['"]\s*:\s*['"](user|human|assistant|gpt|model|system)['"])\s*['"](role|content|"""
    r"""from|value)['"]\s*:|\s*\[\s*\{\s*['"](input|output)['"]\s*:""", re.DOTALL)


def with_lists(row: dict[str, str]) -> dict | Reject:
    """The row with the messages that a cell holds as JSON; what Python has written has lost its quotes."""
    for key, cell in row.items():
        if not MESSAGES.match(cell):
            continue
        value = _parse(cell.encode("utf-8", "surrogateescape"))
        if isinstance(value, Reject):
            return Reject("a list as text", f"'{key}' holds messages as Python prints them, not as JSON: save the "
                                            "data as JSON lines or Parquet")
        row = row | {key: value}
    return row


# ---------------------------------------------------------------------------------------------- JSON

def _of_json(stream, suffix: str) -> Values:
    """JSON lines, unless the file is one array, or one object."""
    number, first = 1, stream.readline()
    while first and not first.strip():
        number, first = number + 1, stream.readline()
    value = _parse(first)
    if first.lstrip()[:1] == b"[":
        rest = stream.read()
        if isinstance(value, Reject) or not rest.strip():
            text = (first + rest).decode("utf-8", "surrogateescape")
            yield from (("index", place, item) for place, item in _array(text))
            return
    elif suffix == ".json" and isinstance(value, Reject):
        rest = stream.read()
        value = _parse(first + rest)
        if not isinstance(value, Reject):
            yield from _of_object(value, number)
            return
    else:
        rest = stream.readline()
        if not rest and isinstance(value, dict):
            yield from _of_object(value, number)
            return
    for place, line in enumerate(chain([first], io.BytesIO(rest), stream), number):
        if line.strip():
            yield "line", place, _parse(line)


# Keys by which one object is a record, even with lists such as "test_cases"
RECORD = {"messages", "conversations", "prompt", "instruction", "question", "problem", "text", "chosen"}


def _of_object(value, line: int) -> Values:
    """The one value of a file: a record, the rows of a table by columns, as pandas writes it, or those of a split."""
    columns = list(value.values()) if isinstance(value, dict) else []
    known = value.items() if columns and not RECORD & value.keys() else ()
    tables = [key for key, rows in known if SPLIT.search(key) or key in ("data", "rows")
              if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if len(tables) > 1:
        yield "line", line, Reject("several splits", f"holds several splits ({', '.join(tables)}), expected one: write "
                                                     "each to a file of its own")
    elif tables:
        yield from (("index", index, row) for index, row in enumerate(value[tables[0]]))
    elif columns and all(isinstance(column, dict) and column and column.keys() == columns[0].keys()
                         and all(index.isdigit() for index in column) for column in columns):
        rows = ({key: column[index] for key, column in value.items()} for index in columns[0])
        yield from (("index", index, row) for index, row in enumerate(rows))
    else:
        yield "line", line, value


def _array(text: str) -> Iterator[tuple[int, object]]:
    """The items of an array one by one; after a broken one it goes on at the next line that opens one at its indent."""
    index, at = 0, BLANK.match(text, text.index("[") + 1).end()
    while text[at:at + 1] != "]" or index:  # [] holds nothing
        try:
            value, end = DECODER.raw_decode(text, at)
            yield index, _unless_broken(value, text[at:end])
            index, end = index + 1, BLANK.match(text, end).end()
            if text[end:end + 1] == "]":
                at = end
                break
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
    if behind := text[at + 1:].strip():
        yield index, Reject("not JSON", f"is behind the end of the array and unread, with the {len(behind)} characters "
                                        "from it on: write one array, or JSON lines")


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


NOT_UTF8 = Reject("not UTF-8", "is not UTF-8 text, mend or drop it: is it another kind of file?")
DECODER = json.JSONDecoder(parse_int=_integer)
BLANK = re.compile(r"[ \t\r\n]*")
