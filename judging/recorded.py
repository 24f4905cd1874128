"""Judgments made elsewhere, as the rows our statistics take; every bad record is reported with its place and reason.

    a game    {"prompt", "category"?, "a", "b", "a_first", "preference", "judge", "turn"?, "repeat"?, "length_a"?, ...}
    a score   {"prompt", "category"?, "model", "score", "judge", "turn", "repeat"?}

preference is a's, from 0 to 1. None is no verdict: kept, and counted. a_first is None where the order is not known. A
file is a JSON array, JSON lines or CSV, perhaps .gz, or Parquet; its first record tells the format:

    alpaca_eval      AlpacaEval 1 and 2, a the evaluated model; the labels' log-probabilities tell the order
    mt_bench_single  scores 1-10 by turn; mt_bench_pair: both games of a pair     (Zheng et al. 2023, arXiv:2306.05685)
    vicuna           two scores in one review: two score rows and a game
    llmbar           both orders, with "gold", the right preference               (Zeng et al. 2023, arXiv:2310.07641)
    pandalm          three people's 0 (tie), 1, 2: a game by each                 (Wang et al. 2023, arXiv:2306.05087)
    battles          FastChat's anonymous votes, or left, right and winner; without a question_id each is its own prompt
    likert           ratings 1 (A is much better) to 8, or a choice and a margin 1-4
    rows             the rows above, our own judgments
"""
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data.files import stream_values, values
from data.formats import Report
from data.llm import split_thoughts
from data.native import ask
from data.records import Reject, check_number, check_text
from judging.entries import digest
from judging.prompts import Verdict, verdicts
from judging.ratings import alpaca_preference, distinct_words, label_preference, likert_outcome, outcome
from runtime import fail


@dataclass
class Recorded(Report):
    """The rows of a file and what became of its records; a place is a line, or a number in an array, from 1."""

    games: list[dict] = field(default_factory=list)
    scores: list[dict] = field(default_factory=list)
    unparsed: int = 0        # rows without a verdict
    numbered: bool = False   # prompts are places in the file, not ids

    def __str__(self) -> str:
        lines = [f"{self.path}: format {self.format or 'unknown'}, {self.read} read, {len(self.games)} games, "
                 f"{len(self.scores)} scores, {self.unparsed} without a verdict, {len(self.rejects)} rejected"]
        return "\n".join([*lines, *(f"  {count} times: {reason}" for reason, count in self.kinds.most_common())])


def read(path: str | Path, baseline: str = "baseline", keep_repeats: bool = False) -> Recorded:
    """The judgments of a file. What cannot be used is among the rejects, be it the whole file.

    A model that no record names is called what the file is, and judged against `baseline`. What is judged again is a
    reject, or with `keep_repeats` a repeat.
    """
    path, places = Path(path), {}
    if not path.is_file():
        fail(f"{path}: no such file, expected recorded judgments")
    name = re.sub(r"\.(jsonl?|csv|parquet)(\.gz)?$", "", path.name)
    said = Recorded(str(path))
    for place, record in _records(path, said):
        said.read += 1
        try:
            if isinstance(record, Reject):
                raise record
            if not isinstance(record, dict):
                raise rejected("is {}, expected an object: mend or drop it", _shown(record))
            said.format = said.format or _recognise(record)
            rows = READERS[said.format][0](record, name, baseline)
            for row in rows:
                if row["prompt"] is None:
                    row["prompt"], said.numbered = place, True  # a prompt of its own
            keys = [_key(row, said.format) for row in rows]
            for row, before in zip(rows, map(places.get, keys), strict=True):
                if before and not keep_repeats:
                    raise rejected("judges again what {} did, expected each once: drop one", before[0])
                row |= {"repeat": len(before)} if before else {}
        except Reject as reason:
            said.note(place, reason)
            continue
        for row, key in zip(rows, keys, strict=True):
            places.setdefault(key, []).append(place)
            said.unparsed += row["score" if "score" in row else "preference"] is None
            (said.scores if "score" in row else said.games).append(row)
    if not said.read and not said.rejects:
        said.note(1, rejected("is empty, expected judgments"))
    return said


def rejected(sentence: str, *values) -> Reject:
    """Why a record cannot be used; counted by the sentence without the values that fill its gaps."""
    return Reject(sentence.format(*["..."] * len(values)), sentence.format(*values))


def _key(row: dict, format: str) -> tuple:
    """What a row judges. The other order, the second turn and a repeat are other judgments."""
    common = str(row["prompt"]), row["judge"], row.get("turn"), row.get("repeat")
    if "score" in row:
        return *common, row["model"]
    if row["a"] == row["b"]:
        raise rejected("is a game of {} against itself: mend or drop it", row["a"])
    once = row["a_first"] is None or format == "alpaca_eval"  # AlpacaEval shows a pair in one order, whichever it is
    return *common, *sorted((row["a"], row["b"])), None if once else row["a" if row["a_first"] else "b"]


# ------------------------------------------------------------------------------------ files, fields

def _records(path: Path, said: Recorded) -> Iterator[tuple[int, object]]:
    """Places and what is there; of a file that breaks off, what came before."""
    if path.suffix == ".parquet":
        yield from ((row + 1, record) for row, record in values(path, said))
        return
    content = bytearray()
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while chunk := file.read(1024):  # where a file breaks off, what was being read is lost
                content += chunk
    except (OSError, EOFError, zlib.error) as error:
        said.note(content.count(b"\n") + 1, rejected("breaks off ({}), expected a whole file: copy it again", error))
    stream = io.BufferedReader(io.BytesIO(content))
    kind = ".csv" if ".csv" in path.suffixes else ".jsonl"
    for place, record in stream_values(stream, kind, said):
        if kind == ".csv" and isinstance(record, dict):  # an empty cell is null
            record = {key: cell or None for key, cell in record.items()}
        yield place + (said.unit == "index"), record


def _recognise(record: dict) -> str:
    for name, (_, *shapes) in READERS.items():
        if any(shape <= record.keys() for shape in shapes):
            return name
    raise rejected("has the keys {}, expected those of a known format: mend the row",
                   ", ".join(map(_shown, list(record)[:6])))


def _shown(value) -> str:
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else json.dumps(value)[:40]


def wrong(key: str, value, expected: str) -> Reject:
    return rejected(f"'{key}' is {{}}, expected {expected}: mend or drop the row", _shown(value))


def _text(record: dict, key: str, default: str | None = None) -> str:
    value = default if record.get(key) is None else record[key]
    value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    return value if default is not None and value == default else check_text(value, key)


def _prompt(record: dict, *keys: str) -> str | int:
    """The number or text that names the prompt, under the first of the keys there is."""
    key = next((key for key in keys if key in record), keys[0])
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else _text(record, key)


def _number(value, key: str, low: float, high: float, whole: bool = False) -> float:
    """A number, or a string that is one."""
    with suppress(Reject):
        number = check_number(value, key, low, high)
        if not whole or number == int(number):
            return int(number) if whole else number
    raise wrong(key, value, f"a {'whole ' * whole}number from {low:g} to {high:g}")


def _one_of(record: dict, key: str, values: dict):
    """What a record's word stands for, in capitals or not; CSV writes 1 and True as text."""
    expected = ", ".join(map(_shown, values))
    if key not in record:
        raise Reject(f"has no '{key}', expected {expected}: mend or drop the row")
    said = record[key]
    for word, meaning in values.items():
        if said == word and isinstance(said, bool) == isinstance(word, bool):  # True == 1
            return meaning
        if isinstance(said, str) and word is not None and said.strip().removesuffix(".0").lower() == str(word).lower():
            return meaning
    raise wrong(key, said, expected)


def _judge(record: dict, key: str = "judge") -> str:
    """FastChat's judge is [model, prompt]: one model is one judge."""
    value = record.get(key)
    return _text({key: value[0] if isinstance(value, list) and value else value or ""}, key, "")


def _also(record: dict, *measures: str) -> dict:
    """Turn, category and other measures, where a record has them."""
    found = {key: _number(record[key], key, 0, 1e9) for key in measures if record.get(key) is not None}
    if record.get("turn") is not None:
        found["turn"] = _number(record["turn"], "turn", 1, 1000, whole=True)
    if record.get("category") is not None:
        found["category"] = _text(record, "category", "")
    return found


def _game(record: dict, prompt, a: str, b: str, a_first: bool | None, **said) -> dict:
    """A game's row; the judge is the record's own unless `said` names another."""
    judge = {} if "judge" in said else {"judge": _judge(record)}
    return {"prompt": prompt, "a": a, "b": b, "a_first": a_first, **judge, **_also(record), **said}


# ------------------------------------------------------------------------------- the judge's words

ABSENT = object()


def _verdict(stored, words, reader: Callable) -> float | None:
    """A stored verdict, else what the judge's words say.

    A stored "no verdict" stands, whatever the words say: who published a mean has left it out.
    """
    if stored is ABSENT and not isinstance(words, str):
        raise Reject("holds neither a verdict nor the judge's words, expected either: drop the row")
    return reader(words) if stored is ABSENT else stored


def read_winner(words: str, a_first: bool = True) -> float | None:
    """MT-Bench's [[A]], [[B]] or [[C]] as the preference for a; None if it says two of them."""
    p = _only(verdicts(split_thoughts(words)[0], "pair"))
    return p if p is None or a_first else 1 - p


def read_rating(words: str) -> float | None:
    """MT-Bench's [[x]], or else [x], from 1 to 10; None if it says two."""
    words = split_thoughts(words)[0]
    said = verdicts(words, "score")
    single = () if said else {float(x) for x in re.findall(r"\[\s*(\d{1,3}(?:\.\d+)?)\s*\]", words)}
    return next(iter(single)) if len(single) == 1 and 1 <= max(single) <= 10 else _only(said)


def _only(said: list[Verdict]) -> float | None:
    """What all of them say; None if they differ."""
    values = {verdict.value for verdict in said}
    return values.pop() if len(values) == 1 else None


# ------------------------------------------------------------------------------------- the formats

def read_alpaca_eval(record: dict, name: str, baseline: str) -> list[dict]:
    expected = "1 to 2, 0 for a draw, or null"
    if "preference" not in record:
        raise Reject(f"has no 'preference', expected {expected}: mend or drop the row")
    stored = record["preference"]
    try:
        p = alpaca_preference(math.inf if isinstance(stored, bool) else stored)
    except (ValueError, OverflowError):
        raise wrong("preference", stored, expected) from None
    row = _game(record, _prompt(record, "index", "instruction"), _text(record, "generator_2", name),
                _text(record, "generator_1", baseline), None, judge=_text(record, "annotator", ""),
                preference=None if math.isnan(p) else p)
    if record.get("dataset") is not None:
        row["category"] = _text(record, "dataset")
    if "index" in record and isinstance(record.get("instruction"), str):
        row["asked"] = digest(ask(record, "instruction", "input"))
    for side, n in (("a", 2), ("b", 1)):
        reply = record.get(f"output_{n}")
        for name, key, measure in (("length", f"len_{n}", len), ("words", f"uniq_{n}", distinct_words)):
            if key in record:
                row[f"{name}_{side}"] = _number(record[key], key, 0, 1e9, whole=True)
            elif isinstance(reply, str):
                row[f"{name}_{side}"] = measure(reply)
    m, M = _label_logprobs(record)
    if max(m, M) > -math.inf and not math.isnan(p):
        # m is the reply shown first, the baseline's unless swapped.
        off = [abs(p - label_preference(m, M, model_first)) for model_first in (True, False)]
        if min(off) <= 1e-4 < max(off):
            row["a_first"] = off[0] < off[1]
    return [row]


def _label_logprobs(record: dict) -> list[float]:
    """Log-probabilities of the labels m and M; -inf where a label is not among the judge's top tokens."""
    found = {"m": record.get("lp_m"), "M": record.get("lp_M")}
    if found == {"m": None, "M": None}:
        with suppress(KeyError, TypeError, IndexError):  # most files keep none, or only the judge's text
            top = record["raw_completion"]["logprobs"]["content"][0]["top_logprobs"]
            found = {token["token"]: token["logprob"] for token in top}
    return [-math.inf if found.get(label) is None else _number(found[label], "logprob", -1e6, 1e-3) for label in "mM"]


def read_mt_bench_single(record: dict, name: str, baseline: str) -> list[dict]:
    stored = record.get("score", ABSENT)
    if stored is not None and stored is not ABSENT:
        stored = _number(stored, "score", -1, 10)
    score = _verdict(None if stored == -1 else stored, record.get("judgment"), read_rating)
    turn = _number(record.get("turn"), "turn", 1, 1000, whole=True)
    row = {"prompt": _prompt(record, "question_id"), "model": _text(record, "model"), "judge": _judge(record)}
    return [row | {"turn": turn} | _also(record) | {"score": score}]


def read_mt_bench_pair(record: dict, name: str, baseline: str) -> list[dict]:
    """Model 1 is A in the first game and B in the second."""
    winners, rows = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}, []
    prompt, names = _prompt(record, "question_id"), [_text(record, key) for key in ("model_1", "model_2")]
    for game, first in (("g1", True), ("g2", False)):
        stored = _one_of(record, f"{game}_winner", winners) if f"{game}_winner" in record else ABSENT
        p = _verdict(stored, record.get(f"{game}_judgment"), partial(read_winner, a_first=first))
        rows.append(_game(record, prompt, *names, first, preference=p))
    return rows


def read_vicuna(record: dict, name: str, baseline: str) -> list[dict]:
    """Scores of Assistant 1, shown first, and Assistant 2; a file called x_vs_y says who they are."""
    stored = record.get("score")
    if not isinstance(stored, list) or len(stored) != 2:
        raise wrong("score", stored, "two numbers")
    x, y = (None, None) if stored == [-1, -1] else (_number(x, "score", 0, 10) for x in stored)
    a, *b = name.split("_vs_")
    a, b = (a, b[0]) if len(b) == 1 else (name, baseline)
    game = _game(record, _prompt(record, "question_id"), a, b, True, judge=_judge(record, "reviewer_id"),
                 preference=None if x is None else outcome(x, y))
    common = {"turn": 1, "prompt": game["prompt"], "judge": game["judge"], **_also(record)}
    return [game, *(common | {"model": name, "score": score} for name, score in ((a, x), (b, y)))]


def read_llmbar(record: dict, name: str, baseline: str) -> list[dict]:
    """The judge is what the file is called. As published a record has stages, of which the last decides."""
    winners, rows = {"1": 1.0, "2": 0.0, 1: 1.0, 2: 0.0}, []
    for order, key, first in (("noswap", "swap = False", True), ("swap", "swap = True", False)):
        try:
            winner = record["results"][-1][key]["winner"] if "results" in record else record[f"winner_{order}"]
        except (KeyError, TypeError, IndexError):
            raise Reject("has no winner of both orders: mend or drop the row") from None
        prompt = _prompt(record, "index") if "index" in record else None
        rows.append(_game(record, prompt, "output 1", "output 2", first, judge=name,
                          gold=_one_of(record, "label", winners),
                          preference=_one_of({"winner": winner}, "winner", winners | {None: None})))
    return rows


def read_pandalm(record: dict, name: str, baseline: str) -> list[dict]:
    a, *b = _text(record, "cmp_key").split("_")
    if len(b) != 1 or not a or not b[0]:
        raise wrong("cmp_key", record["cmp_key"], "two names and one underscore")
    return [_game(record, _prompt(record, "idx"), a, b[0], None, judge=person,
                  preference=_one_of(record, person, {0: 0.5, 1: 1.0, 2: 0.0, None: None}))
            for person in ("annotator1", "annotator2", "annotator3")]


def read_battles(record: dict, name: str, baseline: str) -> list[dict]:
    if record.get("anony") in (False, "False", "false"):
        raise Reject("is a vote by someone who knew the models, expected anonymous ones: drop it")
    a, b = ("left", "right") if "left" in record else ("model_a", "model_b")
    ties = ("tie", "tie (bothbad)", "tie (both bad)", "tie (inconsistent)")
    winners = {a: 1.0, b: 0.0} | dict.fromkeys(ties, 0.5)
    prompt = _prompt(record, "question_id") if "question_id" in record else None
    return [_game(record, prompt, _text(record, a), _text(record, b), True,
                  preference=_one_of(record, "winner", winners))]


def read_likert(record: dict, name: str, baseline: str) -> list[dict]:
    """A is shown left. No choice is an abstention: the rater cannot tell, or both are bad, as its flag may say."""
    rating = record.get("rating")
    if rating is not None:
        rating = _number(rating, "rating", 1, 8, whole=True)
    elif "rating" not in record:
        side = _one_of(record, "choice", {"a": -1, "b": 1, "tie": 0, None: None})
        margin = _number(record.get("margin"), "margin", 1, 4, whole=True) if side else 0
        rating = {None: None, 0: 4.5, -1: 5 - margin, 1: 4 + margin}[side]
    flag = {"skip": ": cannot tell", "bad": ": both are bad"}.get(record.get("flag"), "")
    return [_game(record, _prompt(record, "prompt"), _text(record, "a"), _text(record, "b"), True,
                  judge=_text(record, "annotator", "anonymous"), rating=rating, **_also(record, "seconds"),
                  preference=None if rating is None else 0.5 if rating == 4.5 else likert_outcome(rating),
                  **({"why": f"abstained{flag}"} if rating is None else {}), **_lengths(record.get("replies")))]


def _lengths(replies) -> dict:
    """The lengths of a vote's two replies, a's first, where it keeps them."""
    texts = [r.get("text") if isinstance(r, dict) else r for r in replies] if isinstance(replies, list) else []
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        return {}
    return {f"{name}_{side}": of(text) for side, text in zip("ab", texts, strict=True)
            for name, of in (("length", len), ("words", distinct_words))}


def read_row(record: dict, name: str, baseline: str) -> list[dict]:
    row = record | {"prompt": _prompt(record, "prompt"), "judge": _judge(record), **_also(record)}
    for key, low, high in (("repeat", 0, 1e9), ("rating", 1, 8), ("gold", 0, 1)):
        if record.get(key) is not None:
            row[key] = _number(record[key], key, low, high, whole=key == "repeat")
    key, low, high = ("score", -1e9, 1e9) if "score" in record else ("preference", 0, 1)
    if key not in record:
        raise Reject("has no 'preference' or 'score', expected one: mend or drop the row")
    row[key] = None if record[key] is None else _number(record[key], key, low, high)
    if key == "score":
        return [row | {"model": _text(record, "model")}]
    first = _one_of({"a_first": None} | record, "a_first", {True: True, False: False, None: None})
    measures = (f"{name}_{side}" for name in ("length", "words", "list") for side in "ab")
    return [row | {"a": _text(record, "a"), "b": _text(record, "b"), "a_first": first} | _also(record, *measures)]


# The first whose keys a record has is its format.
READERS = {
    "mt_bench_pair": (read_mt_bench_pair, {"model_1", "model_2"}),
    "vicuna": (read_vicuna, {"question_id", "reviewer_id"}),
    "llmbar": (read_llmbar, {"label", "winner_noswap"}, {"label", "results"}),
    "pandalm": (read_pandalm, {"cmp_key"}),
    "battles": (read_battles, {"model_a", "model_b", "winner"}, {"left", "right", "winner"}),
    "rows": (read_row, {"a", "b", "preference"}, {"prompt", "model", "score"}),
    "likert": (read_likert, {"prompt", "a", "b", "rating"}, {"prompt", "a", "b", "choice"}),
    "mt_bench_single": (read_mt_bench_single, {"question_id", "model", "score"}, {"question_id", "model", "judgment"}),
    "alpaca_eval": (read_alpaca_eval, {"index", "preference"}, {"instruction", "preference"}),
}
