"""Which training records hold items of a benchmark? A table, a list of what was found, and the records without any.

    python -m collect.decontaminate TRAIN --against FILE [FILE ...]                         the table
    python -m collect.decontaminate TRAIN --against FILE ... --out clean.jsonl --removed removed.jsonl

FILE is anything data/formats.py reads, of which the user's turns are the items; or FILE:field names the text, or list
of texts, that is the item: mmlu.jsonl:question. Of TRAIN every text is looked at: all turns, chosen and rejected reply.

Texts are compared as words: Unicode NFKC, lower case, runs of letters and digits, all else separates. A text is hit by

    exact        its words are the item's
    contained    the item's words stand in it in a row, if there are 4 or more
    13-gram      13 words in a row of the item stand in it       Brown et al. 2020 (arXiv:2005.14165), appendix C
    8-gram       8 words in a row do                             Muennighoff et al. 2025 (arXiv:2501.19393)

and counts under the first of these that holds; any removes its record (with --ngram 13 all but the last). Missed are
paraphrases, translations, and quotations shorter than 8 words of an item that is longer. What matches may be a phrase
that everybody uses: look at the most frequent match before believing a count.
"""
import argparse
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data import formats
from data.files import exists, values
from data.records import write_lines
from judging.report import text as report_text
from runtime import arguments, fail

RULES = ("exact", "contained", "13-gram", "8-gram")  # from the strongest
SHORTEST = 4   # words of an item that is looked for inside a text; below, "what is this" is everywhere
SHARING = 20   # items an n-gram is traced to; 10,000 items that begin alike would be 10,000 hits a record

Words = tuple[str, ...]


def normalise(text: str) -> Words:
    """Lower-case words: runs of letters and digits. Scripts without blanks come out as one word a clause."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return tuple(re.findall(r"[^\W_]+", text.lower()))


def ngrams(words: Words, n: int) -> Iterator[Words]:
    return zip(*(words[k:] for k in range(n)), strict=False)


def texts(record: dict, user_only: bool = False) -> list[str]:
    """The texts of a record that data/formats.py gives; of a benchmark's, all of the user's turns, or its text."""
    messages = record.get("messages") or record.get("prompt") or []
    if user_only:
        asked = [m["content"] for m in messages if m["role"] == "user"]
        return asked + record.get("turns", [])[1:] if asked else [record["text"]]
    replies = [record[key] for key in ("chosen", "rejected", "text") if isinstance(record.get(key), str)]
    said = [m[key] for m in messages for key in ("reasoning_content", "content") if key in m]
    return said + replies + (record["answers"] if "ranks" in record else [])


# ------------------------------------------------------------------------------------- benchmarks

class Item(NamedTuple):
    benchmark: str
    id: str
    words: Words


def read_benchmark(where: str) -> list[Item]:
    """The items of FILE or FILE:field. One without a name is called by its number in the file, from 1."""
    path, key = (where, "") if exists(where) or ":" not in where else where.rsplit(":", 1)
    records, report = formats.read(path)
    if key:
        found = [value for _, value in values(path, report)]
        records = [value for value in found if isinstance(value, dict)]
        unread = [str(value) for value in found if not isinstance(value, dict)]
    else:
        records, unread = list(records), [reason for _, reason in report.rejects]
    if unread:
        print(f"{path}: {len(unread)} of its records are unread and not looked for, the first {unread[0][:200]}")
    items = []
    for number, record in enumerate(records, 1):
        ids = (record.get(name) for name in ("question_id", "id", "idx", "index"))
        name = next((value for value in ids if isinstance(value, str | int)), number)
        found = record.get(key) if key else texts(record, user_only=True)
        found = found if isinstance(found, list) else [found]
        items += [Item(where, str(name), normalise(text)) for text in found if isinstance(text, str)]
    if not items:
        why = f"no record has text under '{key}'" if key else report.rejects[0][1] if report.rejects else "is empty"
        fail(f"{path}: {why}; expected a benchmark that data/formats.py reads, or FILE:field, e.g. mmlu.jsonl:question")
    return items


class Index:
    """Which items a run of words may come from, as indices into `items`."""

    def __init__(self, items: Iterable[Item], ngram: int = 8):
        if ngram not in (8, 13):
            raise ValueError(f"ngram is {ngram}, expected 8 or 13")
        self.items, self.ngram = [item for item in items if item.words], ngram
        self.whole: dict[Words, list[int]] = defaultdict(list)   # by all their words
        self.starts: dict[Words, list[int]] = defaultdict(list)  # those shorter than an n-gram by their first words
        self.grams: dict[Words, list[int]] = defaultdict(list)   # the others by each of their n-grams
        for i, (_, _, words) in enumerate(self.items):
            self.whole[words].append(i)
            if SHORTEST <= len(words) < ngram:
                self.starts[words[:SHORTEST]].append(i)
            for gram in set(ngrams(words, ngram)):
                if len(self.grams[gram]) < SHARING:
                    self.grams[gram].append(i)


# ------------------------------------------------------------------------------------------- hits

class Hit(NamedTuple):
    rule: str
    matched: Words
    item: int  # index into Index.items

    def strength(self) -> tuple[int, int]:
        return -RULES.index(self.rule), len(self.matched)


def find(words: Words, index: Index) -> Iterator[Hit]:
    """The hits of one text; an item may come more than once, by several rules."""
    for i in index.whole.get(words, ()):
        yield Hit("exact", words, i)
    # For nearly every text these two tests, which run in C, are all: no run of its words is in the index.
    if not index.starts.keys().isdisjoint(ngrams(words, SHORTEST)):
        for start, first in enumerate(ngrams(words, SHORTEST)):
            for i in index.starts.get(first, ()):
                item = index.items[i].words
                if words[start:start + len(item)] == item:
                    yield Hit("contained", item, i)
    if not index.grams.keys().isdisjoint(ngrams(words, index.ngram)):
        said = f" {' '.join(words)} "
        for i, run in longest_runs(words, index).items():
            item = index.items[i].words
            if f" {' '.join(item)} " in said:
                yield Hit("contained", item, i)
            else:  # not by the run's length: n-grams that overlap in the text may stand apart in the item
                short = set(ngrams(item, 13)).isdisjoint(ngrams(words, 13))
                yield Hit("8-gram" if short else "13-gram", run, i)


def longest_runs(words: Words, index: Index) -> dict[int, Words]:
    """For every item that shares an n-gram with a text, the longest run of words that shared n-grams cover."""
    began, last, longest = {}, {}, {}
    for start, gram in enumerate(ngrams(words, index.ngram)):
        for i in index.grams.get(gram, ()):
            if last.get(i) != start - 1:
                began[i] = start
            last[i] = start
            run = words[began[i]:start + index.ngram]
            longest[i] = max(run, longest.get(i, ()), key=len)
    return longest


def hits_of(record: dict, index: Index) -> dict[str, dict[int, Hit]]:
    """By benchmark and item, the strongest hit of a record's texts."""
    found: dict[str, dict[int, Hit]] = {}
    for text in texts(record):
        for hit in find(normalise(text), index):
            mine = found.setdefault(index.items[hit.item].benchmark, {})
            mine[hit.item] = max(hit, mine.get(hit.item, hit), key=Hit.strength)
    return found


# ----------------------------------------------------------------------------------------- report

def contamination_section(benchmarks: dict[str, list[Item]], found: list[tuple[str, dict[int, Hit]]]) -> dict:
    """A report's section with a row for each benchmark: `found` are the hits of a record, by item."""
    rows = []
    for name, items in benchmarks.items():
        hits = [of_record for where, of_record in found if where == name]
        strongest = [max(of_record.values(), key=Hit.strength) for of_record in hits]
        rules, matched = (Counter(hit[k] for hit in strongest) for k in (0, 1))
        frequent = [f"{count} x {' '.join(words)[:60]}" for words, count in matched.most_common(1)]
        rows.append(["/".join(Path(name).parts[-2:]), len(items), sum(len(item.words) < SHORTEST for item in items),
                     len(set().union(*hits)), *(rules[rule] for rule in RULES), len(hits), *(frequent or [None])])
    return {"title": "Training records that hold an item, by the strongest rule", "rows": rows,
            "columns": ["benchmark", "items", f"of under {SHORTEST} words", "found", *RULES, "records",
                        "most frequent match"]}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m collect.decontaminate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("--against", nargs="+", required=True, metavar="FILE[:field]")
    parser.add_argument("--ngram", type=int, choices=(8, 13), default=8, help="the shortest run of words that counts")
    parser.add_argument("--out", help="write the records that hold nothing here")
    parser.add_argument("--removed", help="write what was found here: record, benchmark, item, rule, matched words")
    words = arguments(parser, argv)
    if words.out and not words.removed:
        fail("--out without --removed would drop records in silence: name a file for the list with --removed")
    results = [Path(path).resolve() for path in (words.out, words.removed) if path]
    sources = [Path(path).resolve() for path in (words.train, *words.against)]
    if len(set(results)) < len(results) or set(results) & set(sources):
        fail("--out and --removed would overwrite each other or a file that is read: give each a name of its own")
    return words


def main(argv: Sequence[str] | None = None) -> None:
    words = parse(argv)
    benchmarks = {where: read_benchmark(where) for where in words.against}
    index = Index(chain(*benchmarks.values()), words.ngram)
    records, report = formats.read(words.train)
    clean, removed, found = [], [], []
    for record in records:
        hits = hits_of(record, index)
        for name, of_record in hits.items():
            best = max(of_record.values(), key=Hit.strength)
            removed.append({"record": report.read, "id": record.get("id"), "benchmark": name,
                            "item": index.items[best.item].id, "items": len(of_record), "rule": best.rule,
                            "matched": " ".join(best.matched)})
        found += hits.items()
        clean += [] if hits else [record]
    report.check_used()
    kept, held = len(clean), report.out - len(clean)
    about = {words.train: f"{held + kept} records ({report.native}), {held} hold an item, {kept} do not"}
    for place, reason in report.rejects[:1]:
        count = len(report.rejects)
        about["left out unread"] = f"{count} records or parts of one, the first at {report.unit} {place}: {reason}"
    section = contamination_section(benchmarks, found)
    print(report_text({"title": "Decontamination", "about": about, "sections": [section]}))
    why = f"why {held} were removed" if words.out else f"what {held} hold"
    for path, rows, what in ((words.out, clean, f"{kept} records"), (words.removed, removed, why)):
        if path:
            write_lines(path, rows)
            print(f"wrote {path}: {what}")


if __name__ == "__main__":
    main()
