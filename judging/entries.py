"""What a setting names: "name=kind:where" as a name, a kind and a place; and files of JSON lines, read whole."""
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoints import read_config, weight_files
from data.files import kind_of, values
from data.formats import Report
from data.records import Reject
from runtime import fail, file_hash

KINDS = {"models": ("few-shot",), "judges": ("gold", "reward", "recorded"),
         "reward_models": ("reward", "dpo", "ref-free", "logprob")}
PAIRS = ("choices", "reward_models", "attacks")  # whose place may be followed by a second one, after a colon


class Entry(NamedTuple):
    name: str
    kind: str        # of KINDS, or endpoint (http://host/v1#name), answers (a file), model (a directory)
    where: str
    more: str = ""   # the second place: examples, reference, behaviours


def decode(key: str, entry: str) -> Entry:
    """One entry of the setting `key`. A judge's place alone is its name."""
    name, equals, place = entry.partition("=")
    if not equals:
        if key != "judges":
            fail(f"{key}: '{entry}' is not name=..., expected e.g. SFT=runs/sft/model")
        place = name
    kind, _, where = place.partition(":")
    if kind not in KINDS.get(key, ()):
        holds = kind_of(Path(place)) in (".jsonl", ".json", ".csv", ".parquet", ".arrow") and not Path(place).is_dir()
        kind, where = "endpoint" if "://" in place else "answers" if holds else "model", place
    where, _, more = where.partition(":") if key in PAIRS else (where, "", "")
    return Entry(name, kind, where, more)


def decode_all(key: str, entries: Sequence[str]) -> list[Entry]:
    found = [decode(key, entry) for entry in entries]
    names = [entry.name for entry in found]
    if len(set(names)) < len(names):
        fail(f"{key}: a name occurs twice in {', '.join(names)}: give each its own")
    return found


def check_checkpoint(key: str, path: str, scored: bool) -> None:
    """Refuse a place that is no model directory, or whose model is a reward model and should not be, or is none."""
    if not (Path(path) / "config.json").is_file():
        missing = "holds no config.json" if Path(path).is_dir() else "is no folder"
        fail(f"{key}: {path} {missing}, expected a model directory: train it first, or mend the path")
    if read_config(path).scored != scored:
        fail(f"{key}: {path} has no score head, expected a reward model: train one with reward.py" if scored else
             f"{key}: {path} is a reward model, expected one that replies: name the result of sft.py, dpo.py or ppo.py")


def content_hash(entry: Entry, seed: int) -> str:
    """Of the file, or of the weights, that an entry names."""
    path = Path(entry.where.replace("{seed}", str(seed)))
    return file_hash(*(weight_files(path) if path.is_dir() else [path]))


def digest(text: str) -> str:
    """Ten hex digits of a text, whatever white space is in it."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:10]


def read_lines(path: str | Path, make: Callable[[dict, int | str], object], fault: str) -> list:
    """make(record, place) of every record of a file (data/files.py); the first it fails on ends the run with `fault`.

    The place is a line, or the index in an array; "line 3" or "index 2" in messages.
    """
    if not Path(path).is_file():
        fail(f"{path}: no such file, expected JSON lines")
    found, report = [], Report(str(path))
    for place, record in values(path, report):
        if isinstance(record, Reject) and record.kind == "not UTF-8":
            fail(f"{path}: cannot be read ({report.unit} {place} is not UTF-8 text), expected records: check the path")
        try:
            if isinstance(record, Reject):
                raise ValueError
            found.append(make(record, place))
        except (Reject, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            fail(f"{path} {report.unit} {place}: {fault}: mend or drop it")
    if not found:
        fail(f"{path}: is empty, expected JSON lines: check the path")
    return found
