import csv
import gzip
import io
import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import exits, write_jsonl

from judging import ratings, recorded, tables
from judging.agreement import cohen_kappa, fleiss_kappa
from judging.recorded import read

real = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
NAN = math.nan


def judge(name: str) -> Path:
    return Path(os.environ["REAL_DATA"]) / "judge" / name


def rows(said: recorded.Recorded) -> list[dict]:
    return [*said.games, *said.scores]


# A few records of each format. `i` counts prompts, `p` is the preference for whom the reader calls a.

def alpaca(i, p):
    return {"index": i, "dataset": "koala", "preference": p + 1, "len_1": 100 + 7 * i % 50, "len_2": 120 + 11 * i % 60,
            "generator_1": "y", "generator_2": "x", "annotator": "gpt4"}


def alpaca_v2(i, p, swapped=False):
    p = 0.01 + 0.9 * p  # no even odds: those do not show the order
    first = p if swapped else 1 - p
    top = [{"token": "m", "logprob": math.log(first)}, {"token": "M", "logprob": math.log(1 - first)},
           {"token": "The", "logprob": -20}]
    return {"instruction": f"prompt {i}", "preference": str(p + 1), "generator_1": "y", "generator_2": "x",
            "output_1": "one two two",
            "output_2": "three", "annotator": "gpt4",
            "raw_completion": {"logprobs": {"content": [{"token": "m", "top_logprobs": top}]}}}


def single(i, p):
    return {"question_id": i // 2, "model": "x", "judge": ["gpt-4", "single-v1"], "turn": i % 2 + 1, "score": 1 + 9 * p,
            "judgment": f"Good.\nRating: [[{1 + 9 * p:g}]]"}


def pair(i, p):
    words, back = ({1: f"[[{w}]]", 0: f"[[{v}]]", 0.5: "[[C]]"}[p] for w, v in ("AB", "BA"))
    winner = {1: "model_1", 0: "model_2", 0.5: "tie"}[p]
    return {"question_id": i // 2, "model_1": "x", "model_2": "y", "judge": ["gpt-4", "pair-v2"], "turn": i % 2 + 1,
            "g1_winner": winner,
            "g2_winner": winner, "g1_judgment": words, "g2_judgment": back}


def vicuna(i, p):
    return {"question_id": i, "category": "generic", "reviewer_id": "gpt-4",
            "text": f"{5 + p:g} {6 - p:g}\nBoth are fine.",
            "score": [5 + p, 6 - p]}


def llmbar(i, p):
    p = p if p != 0.5 else 1
    return {"index": i, "label": i % 2 + 1, "winner_noswap": "1" if p else "2", "winner_swap": "1" if p else "2",
            "completion_noswap": f"Output ({'a' if p else 'b'})",
            "completion_swap": f"Hence, Output ({'b' if p else 'a'}) is better."}


def pandalm(i, p):
    return {"idx": i, "cmp_key": "x_y", **{f"annotator{n}": {1: 1, 0: 2, 0.5: 0}[p] for n in (1, 2, 3)}}


def battle(i, p):
    return {"question_id": f"q{i}", "model_a": "x", "model_b": "y",
            "winner": {1: "model_a", 0: "model_b", 0.5: "tie (bothbad)"}[p],
            "judge": "someone", "turn": 1, "anony": True, "tstamp": 1.5e9 + i}


def outcome(i, p):
    return {"left": "x", "right": "y", "winner": {1: "left", 0: "right", 0.5: "tie"}[p]}


def likert(i, p):
    return {"prompt": f"prompt {i}", "a": "x", "b": "y", "rating": {1: 2, 0: 8, 0.5: 4}[p], "annotator": "ann"}


def vote(i, p):
    return {"prompt": f"prompt {i}", "a": "x", "b": "y", "choice": "a" if p else "b", "margin": {1: 3, 0: 4, 0.5: 1}[p],
            "annotator": "ann"}


def row(i, p):
    return {"judge": "j", "prompt": i, "turn": 1, "repeat": 0, "category": "c", "a": "x", "b": "y", "a_first": i % 2
            == 0, "preference": p,
            "length_a": 5, "length_b": 6, "why": "", "rating": None}


MAKERS = (alpaca, alpaca_v2, single, pair, vicuna, llmbar, pandalm, battle, outcome, likert, vote, row)
FORMAT = {"alpaca": "alpaca_eval", "alpaca_v2": "alpaca_eval", "single": "mt_bench_single", "pair": "mt_bench_pair",
          "battle": "battles",
          "outcome": "battles", "vote": "likert", "row": "rows"}


def made(make, count=24, seed=0) -> list[dict]:
    rng = random.Random(seed)
    return [make(i, rng.choice([1, 1, 0, 0.5])) for i in range(count)]


def write(path: Path, records: list[dict]) -> Path:
    """As the file's name asks: .json an array, .csv, .jsonl; .gz packs it."""
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".csv"):
        text = io.StringIO()
        table = csv.DictWriter(text, list(records[0]))
        table.writeheader()
        table.writerows(records)
        content = text.getvalue()
    else:
        content = json.dumps(records) if kind.endswith(".json") else "".join(json.dumps(r) + "\n" for r in records)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


# ------------------------------------------------------------------------------- the judge's words

def test_ratings_in_words():
    words = ("Fine. [[8]]", "[[8.5]]", "[[7/10]]", "[[Rating: 7]]", "[[10]]", "[[８]]", "so [6], end")
    assert [recorded.read_rating(w) for w in words] == [8, 8.5, 7, 7, 10, 8, 6]
    # Nothing, off the scale, two different ones: none is guessed. A footnote beside double brackets is no second
    # rating.
    words = ("", "8", "[[11]]", "[[0]]", "[12]", "[[5]] or [[7]]", "[5] or [7]", "[[8] ]")
    assert [recorded.read_rating(w) for w in words] == [None] * 7 + [8]
    assert recorded.read_rating("as in [1], [[9]]. Again: [[9]]") == 9


def test_winners_in_words():
    assert [recorded.read_winner(words) for words in ("[[A]]", "x\n[[B]]", "[[C]] for a tie")] == [1, 0, 0.5]
    assert recorded.read_winner("[[A]] would be wrong, so [[B]]") is None and recorded.read_winner("A") is None


# ------------------------------------------------------------------------------------- the formats

@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_format_is_recognised_and_read_whole(make, tmp_path):
    said = read(write(tmp_path / "x_vs_y.jsonl", made(make)))
    assert said.format == FORMAT.get(make.__name__, make.__name__) and said.read == 24
    assert not said.rejects and said.unparsed == 0
    for game in said.games:
        assert {game["a"], game["b"]} in ({"x", "y"}, {"output 1", "output 2"}) and 0 <= game["preference"] <= 1
        assert "judge" in game
    assert said.games or said.scores
    # The report's tables take the rows as they are.
    if said.games:
        assert tables.games_of(said.games).models in (["x", "y"], ["output 1", "output 2"])
        assert tables.merge_orders(said.games)[0]


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.jsonl.gz", "x.csv", "x.csv.gz"])
def test_a_file_says_the_same_in_every_packing(name, tmp_path):
    records = made(battle)
    said, same = read(write(tmp_path / "x.jsonl", records)), read(write(tmp_path / name, records))
    assert same.games == said.games and not same.rejects


@pytest.mark.parametrize("make", [m for m in MAKERS if m not in (vicuna, outcome)])
def test_a_table_says_what_json_lines_say(make, tmp_path):
    """Numbers, true and false are text there, null is an empty cell, and 1 may have become 1.0."""
    records = [{key: value for key, value in r.items() if not isinstance(value, list | dict)} for r in made(make)]
    verdict = next((key for key in ("preference", "score", "annotator1", "rating") if key in records[0]), "")
    records[3] |= {verdict: None} if verdict else {}
    said = read(write(tmp_path / "x.jsonl", records))
    records[4] |= {verdict: float(records[4][verdict])} if verdict else {}
    same = read(write(tmp_path / "x.csv", records))
    assert rows(said) and not said.rejects and not same.rejects
    told, told_again = ([{k: str(v) for k, v in r.items() if k != "why"} for r in rows(x)] for x in (said, same))
    assert told == told_again


@pytest.mark.parametrize("make", MAKERS)
def test_parquet_says_what_json_lines_say(make, tmp_path):
    records = made(make)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    said, same = read(write(tmp_path / "x.jsonl", records)), read(tmp_path / "x.parquet")
    assert rows(said) and rows(same) == rows(said) and not same.rejects and same.format == said.format


def test_alpaca_rows_by_hand(tmp_path):
    records = [{"instruction": str(i), "preference": x, "output_1": "to be or not to be", "output_2": "be"}
               for i, x in enumerate((2, 1, 1.5, 0, None, "1.25", ""))]
    said = read(write(tmp_path / "zephyr.json", records), baseline="davinci")
    assert [g["preference"] for g in said.games] == [1, 0, 0.5, 0.5, None, 0.25, None] and said.unparsed == 2
    assert said.games[0] == {"prompt": "0", "a": "zephyr", "b": "davinci", "a_first": None, "preference": 1,
                             "judge": "", "length_a": 2,
                             "words_a": 1, "length_b": 18, "words_b": 4}


def test_label_log_probabilities_tell_who_was_shown_first(tmp_path):
    """Stored 1.25 and m has 3/4: unswapped, the baseline was first. m has 1/4: swapped. At 1.5 nobody can tell, nor at
    1.9, where neither fits."""
    logprobs = [(0.75, 0.25), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    records = [{"index": i, "preference": 1.9 if i == 3 else 1.5 if i == 2 else 1.25, "lp_m": math.log(m),
                "lp_M": math.log(M)} for i, (m, M) in enumerate(logprobs)]
    said = read(write_jsonl(tmp_path / "x.jsonl", records))
    assert [g["a_first"] for g in said.games] == [False, True, None, None]
    orders = [g["a_first"] for g in read(write_jsonl(tmp_path / "y.jsonl",
                                                     [alpaca_v2(i, 1, swapped=i == 1) for i in range(2)])).games]
    assert orders == [False, True]


def test_pairs_by_hand(tmp_path):
    """Model 1 won the first game, shown first; in the second the judge named A, which was model 2."""
    record = {"question_id": 81, "model_1": "x", "model_2": "y", "judge": ["gpt-4", "pair-v2"], "turn": 1,
              "g1_judgment": "[[A]]",
              "g2_judgment": "[[A]]"}
    said = read(write_jsonl(tmp_path / "p.jsonl",
                            [record, record | {"turn": 2, "g2_judgment": "I cannot say."}, record
                             | {"question_id": 82, "g1_winner": "error", "g2_winner": "model_2"}]))
    assert [(g["preference"], g["a_first"], g["turn"]) for g in said.games] == [
        (1, True, 1), (0, False, 1), (1, True, 2), (None, False, 2), (None, True, 1), (0, False, 1)]
    assert said.unparsed == 2 and said.games[0]["judge"] == "gpt-4"  # a stored error stands, whatever the words say


def test_words_count_where_nothing_is_stored(tmp_path):
    record = single(0, 1) | {"judgment": "Rating: [[7]]"}
    words_only = {key: value for key, value in record.items() if key != "score"}
    file = write_jsonl(tmp_path / "s.jsonl",
                       [record, words_only | {"turn": 2}, record | {"question_id": 5, "score": -1}, record
                        | {"question_id": 6, "judgment": "Nice."}])
    assert [s["score"] for s in read(file).scores] == [10, 7, None, 10] and read(file).unparsed == 1


def test_vicuna_reviews_are_scores_and_a_game(tmp_path):
    said = read(write_jsonl(tmp_path / "alpaca_vs_bard.jsonl",
                            [vicuna(1, 1), vicuna(2, 0.5), vicuna(3, 0) | {"score": [-1, -1]}]))
    assert {(g["a"], g["b"]) for g in said.games} == {("alpaca", "bard")}
    assert [g["preference"] for g in said.games] == [1, 0.5, None]
    assert [s["model"] for s in said.scores] == ["alpaca", "bard"] * 3
    assert [s["score"] for s in said.scores] == [6, 5, 5.5, 5.5, None, None]


def test_llmbar_as_published_is_decided_by_the_last_stage(tmp_path):
    first, final = ({f"swap = {swap}": {"completion": [words, "stop"], "winner": winner} for swap, words,
                     winner in games} for games in ([(False, "Output (a)", "1"), (True, "Output (a)", "2")],
                                                    [(False, "Output (b)", "2"), (True, "Both.", None)]))
    said = read(write(tmp_path / "GPT-4.json",
                      [{"input": "i", "label": 2, "results": [["notes", "stop"], first, final]}]))
    assert [(g["preference"], g["a_first"], g["gold"]) for g in said.games] == [(0, True, 0), (None, False, 0)]
    assert said.games[0]["judge"] == "GPT-4" and said.unparsed == 1


def test_battles_by_hand(tmp_path):
    records = [battle(0, 0), battle(1, 0.5), battle(2, 1) | {"anony": False}, battle(0, 0)
               | {"model_a": "y", "model_b": "x"}]
    said = read(write_jsonl(tmp_path / "b.jsonl", records))
    assert [(g["a"], g["preference"]) for g in said.games] == [("x", 0), ("x", 0.5), ("y", 0)]
    assert [place for place, _ in said.rejects] == [3]
    # Rows without a prompt are prompts of their own, and never each other's copies.
    said = read(write(tmp_path / "e.csv", [outcome(0, 1)] * 3))
    assert [g["prompt"] for g in said.games] == [2, 3, 4] and not said.rejects


def test_likert_by_hand(tmp_path):
    """A much better 1, slightly 4; a choice of b with margin 1 is 5. Whoever saw the pair swapped says 9 - rating of
    the same."""
    records = [likert(0, 1) | {"rating": r, "annotator": f"r{r}"} for r in (1, 4, 5, 8)]
    records += [vote(0, 0.5), vote(0, 1) | {"a": "y", "b": "x", "annotator": "other"}, likert(1, 1) | {"rating": None}]
    file = write_jsonl(tmp_path / "l.jsonl", records)
    assert [g["preference"] for g in read(file).games] == [1, 1, 0, 0, 1, 1, None]
    said = read(file)
    assert [g["rating"] for g in said.games] == [1, 4, 5, 8, 4, 2, None] and said.unparsed == 1
    assert read(write_jsonl(tmp_path / "v.jsonl", [vote(0, p) for p in (0,)])).games[0]["rating"] == 8


def test_a_tie_is_a_choice_where_people_could_make_it(tmp_path):
    """Even on the scale of eight: 4.5; FastChat's word for two orders that disagree is a tie too."""
    tie = vote(0, 1) | {"choice": "tie", "margin": None}
    (game,) = read(write_jsonl(tmp_path / "v.jsonl", [tie])).games
    assert (game["preference"], game["rating"], game.get("why")) == (0.5, 4.5, None)
    (game,) = read(write_jsonl(tmp_path / "b.jsonl", [battle(0, 1) | {"winner": "tie (inconsistent)"}])).games
    assert game["preference"] == 0.5


def test_people_are_raters(tmp_path):
    said = read(write_jsonl(tmp_path / "p.jsonl", [pandalm(0, 1) | {"annotator2": 2, "annotator3": 0}]))
    votes = [(g["judge"], g["preference"]) for g in said.games]
    assert votes == [("annotator1", 1), ("annotator2", 0), ("annotator3", 0.5)]
    assert said.games[0]["a_first"] is None


def test_our_own_rows_come_back_as_they_were(tmp_path):
    rows = [*made(row), {"judge": "j", "prompt": 1, "turn": 1, "model": "x", "score": 7.5},
            {"judge": "j", "prompt": "p", "a": "x", "b": "y", "a_first": None, "preference": None}]
    said = read(write_jsonl(tmp_path / "judgments.jsonl", rows))
    assert [*said.games[:-1], *said.scores, said.games[-1]] == rows and not said.rejects
    for make in MAKERS:
        said = read(write(tmp_path / "x_vs_y.jsonl", made(make)))
        again = read(write(tmp_path / "again.jsonl", [*said.games, *said.scores]))
        assert (again.games, again.scores, again.rejects) == (said.games, said.scores, [])


# ----------------------------------------------------------------------------------------- rejects

def test_every_bad_record_is_named_with_its_place_and_reason(tmp_path):
    good = alpaca(0, 1)
    bad = [good | {"index": 1, "preference": x} for x in (3, True, "model", [1], NAN, 10**400)]
    lines = [*map(json.dumps, [good, *bad, [1], "text"]), '{"index": 5', *map(json.dumps, [{"preference": 1}, good]),
             "", "{}"]
    file = tmp_path / "x.jsonl"
    file.write_bytes("\n".join(lines).encode() + b'\n{"index": "\xff"}\n')
    said = read(file)
    assert len(said.games) == 2 and said.unparsed == 1 and said.read == 14  # NaN is AlpacaEval's null
    places = [place for place, _ in said.rejects]
    assert places == [2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 15]
    assert said.kinds.total() == 12
    assert said.kinds["'preference' is ..., expected 1 to 2, 0 for a draw, or null: mend or drop the row"] == 5
    assert dict(said.rejects)[12] == "judges again what 1 did, expected each once: drop one"
    assert dict(said.rejects)[8] == "is a list, expected an object: mend or drop it"
    assert "14 read, 2 games, 0 scores, 1 without a verdict, 12 rejected" in str(said)


def test_what_is_no_number_word_or_name_is_rejected(tmp_path):
    """True is not 1, and half a surrogate pair is no name."""
    for good, bad in ((alpaca(0, 1), {"len_1": True}), (pandalm(0, 1), {"annotator1": True}),
                      (battle(0, 1), {"model_a": "\ud800"}),
                      (row(0, 1), {"turn": 1.5}), (row(0, 1), {"a_first": 1}), (row(0, 1), {"rating": "much"}),
                      (row(0, 1), {"rating": 9}), (row(0, 1), {"gold": [1]}),
                      (single(0, 1), {"score": 11}), (likert(0, 1), {"rating": 9}), (vote(0, 1), {"margin": 0})):
        other = good | {key: 1 for key in ("index", "idx", "question_id", "prompt") if key in good}
        said = read(write_jsonl(tmp_path / "x.jsonl", [good, other | bad]))
        assert [place for place, _ in said.rejects] == [2] and "judges again" not in said.rejects[0][1], bad
        assert not read(write_jsonl(tmp_path / "x.jsonl", [good, other])).rejects
        "".join(reason for _, reason in said.rejects).encode()


def test_rough_csv_files_lose_no_good_row(tmp_path):
    head = "\ufeffquestion_id,model_a,model_b,winner\n"
    lines = ["1,x,y,model_a", "2,x,y", "3,x,y,tie,more", f"4,{'x' * 200_000},y,tie", '5,"x\n",y,tie', "6,x,y,tie"]
    (tmp_path / "x.csv").write_text(head + "\n".join(lines))
    said = read(tmp_path / "x.csv")
    assert [g["prompt"] for g in said.games] == ["1", "4", "5", "6"] and [place for place, _ in said.rejects] == [3, 4]
    assert said.read == 6
    (tmp_path / "y.jsonl").write_text("\ufeff" + json.dumps(battle(0, 1)))
    assert len(read(tmp_path / "y.jsonl").games) == 1


def test_a_second_turn_is_no_duplicate_and_a_second_judgment_is(tmp_path):
    records = [single(0, 1), single(1, 1), single(1, 0)]
    said = read(write_jsonl(tmp_path / "s.jsonl", records))
    assert [(s["turn"], s["score"]) for s in said.scores] == [(1, 10), (2, 10)]
    assert [place for place, _ in said.rejects] == [3]
    kept = read(write_jsonl(tmp_path / "s.jsonl", records), keep_repeats=True)
    assert [(s["turn"], s.get("repeat"), s["score"]) for s in kept.scores] == [(1, None, 10), (2, None, 10), (2, 1, 1)]
    assert not kept.rejects
    # Another judge's, the other order, and a pair written the other way round:
    rows = [row(0, 1), row(0, 1) | {"judge": "k"}, row(0, 1) | {"a_first": False}, row(0, 1)
            | {"a": "y", "b": "x", "a_first": False}]
    said = read(write_jsonl(tmp_path / "r.jsonl", rows))
    assert [place for place, _ in said.rejects] == [4]  # the first again: x shown first


def test_a_broken_archive_gives_what_came_before(tmp_path):
    whole = write(tmp_path / "x.jsonl.gz", [alpaca(i, 1) | {"note": f"{random.Random(i).random()}"}
                                            for i in range(2000)]).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    said = read(tmp_path / "x.jsonl.gz")
    assert 500 < len(said.games) < 1500 and len(said.rejects) <= 2 and "breaks off" in said.rejects[0][1]
    file = write(tmp_path / "x.json", made(alpaca))
    file.write_bytes(file.read_bytes()[:-3])
    said = read(file)
    assert len(said.rejects) == 1 and "is not JSON" in said.rejects[0][1] and len(said.games) == 23


def test_what_the_user_named_wrongly_ends_in_one_line(capsys, tmp_path):
    exits(capsys, lambda: read(tmp_path / "none.jsonl"), "none.jsonl", "no such file")
    said = read(write_jsonl(tmp_path / "x.jsonl", [{"model": "x", "won": True}]))
    assert said.rejects == [(1, "has the keys \"model\", \"won\", expected those of a known format: mend the row")]


# ------------------------------------------------------------------------------- 300 corrupted files

def nested(depth: int):
    return json.loads("[" * depth + "]" * depth)


def damage(kind: str, content: bytes, records: list[dict], rng: random.Random) -> bytes:
    """The file's bytes, damaged. JSON lines unless the kind needs bytes."""
    strange = (None, True, -1, 0, 3.7, 10**30, 1e308, NAN, math.inf, "", "x", "\ud800", [], [1, 2], {}, {"a": {}},
               nested(50))
    match kind:
        case "truncated":
            return content[:rng.randrange(len(content))]
        case "bit flips":
            data = bytearray(content)
            for _ in range(rng.randrange(1, 40)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(data)
        case "binary":
            return rng.randbytes(rng.randrange(1, 2000))
        case "empty":
            return rng.choice([b"", b"\n\n", b" ", b"\xef\xbb\xbf"])
        case "deep":
            depth = rng.choice([100, 900, 5000, 100000])
            array = json.dumps(records).encode()[:-1] + b"," + b"[" * depth + b"]" * depth + b"]"
            return rng.choice([b"[" * depth, b'{"a":' * depth, array])
        case "huge numbers":
            return b"\n".join(json.dumps(r).encode().replace(b"1", b"1" * rng.choice([30, 400, 5000]), 3)
                              for r in records)
        case "values":
            records = [{key: rng.choice(strange) if rng.random() < 0.3 else value for key, value in r.items()}
                       for r in records]
        case "inside":  # lists and objects keep their kind, what they hold does not
            records = [{key: [rng.choice(strange) for _ in range(rng.randrange(4))] if isinstance(value, list)
                        and rng.random() < 0.5 else {k: rng.choice(strange) for k in value} if isinstance(value, dict)
                        else value for key, value in r.items()} for r in records]
        case "swapped keys":
            records = [dict(zip(rng.sample(list(r), len(r)), r.values(), strict=True)) for r in records]
        case "missing keys":
            records = [{key: value for key, value in r.items() if rng.random() < 0.8} for r in records]
        case "twice":
            records = [*records, *rng.sample(records, 5)]
    return "\n".join(json.dumps(r) for r in records).encode()


KINDS = ("truncated", "bit flips", "binary", "empty", "deep", "huge numbers", "values", "inside", "swapped keys",
         "missing keys", "twice")


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_300_damaged_files_end_in_a_report(make, tmp_path):
    """12 makers times 11 kinds of damage times 3 seeds are 396 files; every third one is packed, or CSV where the
    format has it."""
    rng = random.Random(make.__name__)
    for kind in KINDS:
        other = f"{kind}.csv" if make in (battle, outcome) else f"{kind}.jsonl.gz"
        for name in (f"{kind}.jsonl", other, f"{kind} again.jsonl"):
            records = made(make, seed=rng.random())
            whole = write(tmp_path / name, records).read_bytes()
            damaged = damage(kind, whole, records, rng)
            if name.endswith(".gz") and kind not in ("truncated", "bit flips"):
                damaged = gzip.compress(damaged)
            (tmp_path / name).write_bytes(damaged)
            said = read(tmp_path / name)
            assert said.kinds.total() == len(said.rejects) and len(said.rejects) <= said.read + 1
            assert all(g["preference"] is None or 0 <= g["preference"] <= 1 for g in said.games)
            assert all(s["score"] is None or math.isfinite(s["score"]) for s in said.scores)
            kinds = ((said.games, "preference"), (said.scores, "score"))
            assert said.unparsed == sum(row[key] is None for rows, key in kinds for row in rows)
            assert str(said).encode()
            "".join(reason for _, reason in said.rejects).encode()
            if kind in ("binary", "empty", "deep"):
                assert said.rejects, name
            if kind == "twice" and make is not outcome and not name.endswith("csv"):
                assert len(said.rejects) == 5
            if said.games:
                tables.games_of(said.games)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_record_without_its_verdict_is_no_verdict_of_none(make, tmp_path):
    verdicts = {"preference", "score", "judgment", "g1_winner", "g1_judgment", "winner_swap", "annotator2", "winner",
                "rating", "choice"}
    records = made(make)
    records[9] = {key: value for key, value in records[9].items() if key not in verdicts}
    said = read(write_jsonl(tmp_path / "x_vs_y.jsonl", records))
    assert [place for place, _ in said.rejects] == [10] and said.unparsed == 0


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_bad_record_costs_no_other(make, tmp_path):
    records = made(make)
    whole = read(write(tmp_path / "x_vs_y.jsonl", records))
    hurt = [*records[:7], {}, records[7] | dict.fromkeys(records[7], []), *records[7:]]
    said = read(write(tmp_path / "x_vs_y.jsonl", hurt))
    assert [place for place, _ in said.rejects] == [8, 9]
    for rows, same in ((said.games, whole.games), (said.scores, whole.scores)):
        assert [r | {"prompt": 0} for r in rows] == [r | {"prompt": 0} for r in same]


# ---------------------------------------------------------------------- from files to statistics

def swapped(record: dict) -> dict:
    """The same record had every result been the other way round."""
    flip = {"model_1": "model_2", "model_2": "model_1", "model_a": "model_b", "model_b": "model_a", "left": "right",
            "right": "left", "1": "2", "2": "1", "a": "b", "b": "a"}
    result = dict(record)
    for key in ("winner", "g1_winner", "g2_winner", "winner_noswap", "winner_swap", "choice"):
        if key in record:
            result[key] = flip.get(record[key], record[key])
    if "rating" in record and record["rating"]:
        result["rating"] = 9 - record["rating"]
    if "preference" in record:
        result["preference"] = 3 - float(record[
            "preference"]) if "index" in record or "instruction" in record else 1 - record["preference"]
    for key in ("annotator1", "annotator2", "annotator3"):
        if key in record:
            result[key] = {0: 0, 1: 2, 2: 1}[record[key]]
    if "reviewer_id" in record:
        result["score"] = record["score"][::-1]
    return {key: value for key, value in result.items() if not key.startswith(("completion", "raw_completion"))
            and key not in ("g1_judgment", "g2_judgment", "text")}


def statistics(rows: list[dict]) -> dict:
    games = tables.games_of(tables.merge_orders(rows)[0])
    wins = ratings.win_rate(tables.preferences(rows), [r["prompt"] for r in rows])
    return {"win rate": wins["win_rate"], "error": wins["standard_error"], "wins": wins["wins"],
            "losses": wins["losses"],
            "Bradley-Terry": ratings.bradley_terry(games, prior=1)["ratings"], "records": ratings.records(games),
            "position": ratings.position(tables.games_of(rows))["first_slot_share"],
            "interval": ratings.mean_interval(tables.preferences(rows), [r["prompt"] for r in rows], 50)}


@pytest.mark.parametrize("make", [make for make in MAKERS if make is not single],
                         ids=lambda make: make.__name__)
def test_swapping_every_result_swaps_every_statistic(make, tmp_path):
    records = made(make)
    said, other = (statistics(read(write(tmp_path / "x_vs_y.jsonl", r)).games)
                   for r in (records, [swapped(r) for r in records]))
    assert other["win rate"] == pytest.approx(100 - said["win rate"]) and other["error"] == pytest.approx(said["error"])
    assert (other["wins"], other["losses"]) == (said["losses"], said["wins"]) and said["wins"] != said["losses"]
    assert other["Bradley-Terry"] == pytest.approx({m: 2000 - r for m, r in said["Bradley-Terry"].items()})
    a, b = said["records"]
    for key in ("wins", "ties"):
        assert other["records"][a][key] == said["records"][b][key]
    assert other["position"] == pytest.approx(1 - said["position"])


@pytest.mark.parametrize("make", [make for make in MAKERS if make is not outcome],
                         ids=lambda make: make.__name__)
def test_the_order_of_records_changes_nothing(make, tmp_path):
    records = made(make)
    mixed = random.Random(1).sample(records, len(records))
    said, other = (read(write(tmp_path / "x_vs_y.jsonl", r)) for r in (records, mixed))
    if make is single:
        rows = [[{"question_id": s["prompt"], "turn": s["turn"], "score": s["score"]} for s in x.scores]
                for x in (said, other)]
        first, second = (ratings.mt_bench(x, rounds=50) for x in rows)
        assert first == pytest.approx(second)
    else:
        first, second = statistics(said.games), statistics(other.games)
        for name in first:
            assert first[name] == second[name] or np.allclose(first[name], second[name]), name


@pytest.mark.parametrize("make", [battle, outcome], ids=lambda make: make.__name__)
def test_only_online_elo_depends_on_the_order(make, tmp_path):
    rng = random.Random(0)
    records = [make(i, rng.choice([1, 0, 0.5])) for i in range(60)]
    games = [tables.games_of(read(write(tmp_path / "b.jsonl", r)).games) for r in (records, records[::-1])]
    assert ratings.elo(games[0]) != ratings.elo(games[1])
    assert ratings.bradley_terry(games[0])["ratings"] == pytest.approx(ratings.bradley_terry(games[1])["ratings"])
    assert ratings.records(games[0]) == ratings.records(games[1])
    if make is battle:  # without prompts rows are resampled, and which is which depends on the order
        np.testing.assert_array_equal(*(ratings.bootstrap_elo(g, rounds=20) for g in games))


# --------------------------------------------------------------------------------------- real data

def words_alone(tmp_path: Path, file: Path, *verdicts: str) -> Path:
    """The same records without their stored verdicts."""
    records = map(json.loads, gzip.decompress(file.read_bytes()).splitlines())
    return write_jsonl(tmp_path / "words.jsonl",
                       [{key: value for key, value in r.items() if key not in verdicts} for r in records])


@real
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_alpaca_eval_leaderboard(version):
    with open(judge(f"alpaca_eval_{version}/leaderboard.csv"), newline="") as file:
        published = {line[""]: line for line in csv.DictReader(file)}
    files = [read(judge(f"alpaca_eval_{version}/{model}.jsonl.gz")) for model in published]
    for said, line in zip(files, published.values(), strict=True):
        assert not said.rejects and {g["a"] for g in said.games} == {line[""]}
        assert said.unparsed == 805 - int(line["n_total"])
        found = ratings.win_rate(tables.preferences(said.games), [g["prompt"] for g in said.games])
        for name in ("win_rate", "standard_error", "discrete_win_rate"):
            assert found[name] == pytest.approx(float(line[name]), abs=1e-9)
        counts = [int(line[name]) for name in ("n_wins", "n_wins_base", "n_draws", "n_total")]
        assert [found[name] for name in ("wins", "losses", "draws", "n")] == counts
        assert int(np.mean([g["length_a"] for g in said.games])) == int(line["avg_length"])


@real
def test_alpaca_eval_2_shows_the_baseline_first_every_second_time():
    """Shares of the first slot as the judge's m label has them, from the log-probabilities alone."""
    for model, share in (("alpaca-7b", 0.4838), ("OpenHermes-2.5-Mistral-7B", 0.4389), ("claude-2.1_concise", 0.4353)):
        known = [g for g in read(judge(f"alpaca_eval_v2/{model}.jsonl.gz")).games if g["a_first"] is not None]
        assert len(known) >= 802 and 390 < sum(g["a_first"] for g in known) < 415
        said = ratings.position(tables.games_of(known))
        assert said["first_slot_share"] == pytest.approx(share, abs=3e-3)


@real
def test_mt_bench_single_scores_stored_and_from_words(tmp_path):
    file = judge("mt_bench/gpt-4_single_mamba_0_5_dpo_ep3.jsonl.gz")
    for said in (read(file), read(words_alone(tmp_path, file, "score"))):
        assert not said.rejects and said.unparsed == 0
        found = ratings.mt_bench([{"question_id": s["prompt"], **s} for s in said.scores], rounds=10)
        assert (found["turn_1"], found["turn_2"], found["average"], found["n"]) == (7.7375, 6.8875, 7.3125, 160)


@real
def test_mt_bench_pairs(tmp_path):
    """The file holds two sets of questions under the same five numbers: ten pairs, of which five are repeats."""
    file = judge("mt_bench/gpt-4_pair_gpt35_vs_gpt4.jsonl.gz")
    assert [place for place, _ in read(file).rejects] == [6, 7, 8, 9, 10]
    for of in (file, words_alone(tmp_path, file, "g1_winner", "g2_winner")):
        said = read(of, keep_repeats=True)
        assert not said.rejects
        merged, forward, backward = tables.merge_orders(said.games)
        record, same = ratings.records(tables.games_of(merged)), ratings.consistency(forward, backward)
        assert (record["gpt-4"]["wins"], record["gpt-3.5-turbo"]["wins"], record["gpt-4"]["ties"]) == (3, 2, 5)
        assert (same["consistent"], same["always_first"], same["n"]) == (7, 1, 10)


@real
def test_vicuna_review_totals():
    for other, totals in (("alpaca-13b", (583.0, 704.0)), ("bard", (664.0, 655.5))):
        said = read(judge(f"vicuna_review/{other}_vs_vicuna-13b.jsonl.gz"))
        found = Counter()
        for score in said.scores:
            found[score["model"]] += score["score"]
        assert (found[other], found["vicuna-13b"]) == totals and said.unparsed == 0 and len(said.games) == 80


@real
def test_llmbar():
    for name, accuracy, equal, share in (("GPT-4_Vanilla_NoRules", 0.935, 97, 0.505), ("ChatGPT_CoT", 0.74, 64, 0.668)):
        said = read(judge(f"llmbar/natural_{name}.jsonl.gz"))
        assert not said.rejects and said.unparsed == (name == "ChatGPT_CoT")
        assert np.mean([g["preference"] == g["gold"] for g in said.games]) == pytest.approx(accuracy)
        same = ratings.consistency(*tables.merge_orders(said.games)[1:])
        assert same["consistent"] == equal
        assert ratings.position(tables.games_of(said.games))["first_slot_share"] == pytest.approx(share, abs=5e-4)


@real
def test_pandalm():
    said = read(judge("pandalm/human_labels.jsonl.gz"))
    people = [tables.preferences([g for g in said.games if g["judge"] == f"annotator{n}"]) for n in (1, 2, 3)]
    kappas = sorted(cohen_kappa(people[:i] + people[i + 1:]) for i in range(3))
    assert kappas == pytest.approx([0.8520, 0.8617, 0.8789], abs=5e-5)
    assert fleiss_kappa(people) == pytest.approx(0.8642, abs=5e-5)
    majority = Counter(g["preference"] for g in tables.majority(said.games, "people"))
    assert (majority[1], majority[0]) == (422, 472) and majority[0.5] == 105


@real
@pytest.mark.parametrize("name", ["simple", "food"])
def test_ratings_of_an_independent_library(name):
    games = tables.games_of(read(judge(f"ratings/{name}.csv")).games)
    with open(judge(f"ratings/{name}-golden.csv"), newline="") as file:
        golden = {(line["algorithm"], line["item"]): float(line["score"]) for line in csv.DictReader(file)}
    assert ratings.elo(games, k=4) == pytest.approx({m: golden["elo", m] for m in games.models}, abs=1e-9)
    p = np.exp(ratings.bradley_terry(games)["strengths"])
    np.testing.assert_allclose(p / p.sum(), [golden["bradley_terry", m] for m in games.models], atol=1e-9)


@real
def test_damaged_real_files_end_in_a_report(tmp_path):
    rng = random.Random(0)
    for source in (*judge("alpaca_eval_v2").glob("*.gz"), *judge("mt_bench").glob("gpt*.gz"),
                   *judge("vicuna_review").glob("*.gz"), *judge("llmbar").glob("natural_[CG]*.gz"),
                   *judge("pandalm").glob("*.gz")):
        content = gzip.decompress(source.read_bytes())
        for kind in ("truncated", "bit flips"):
            (tmp_path / "x.jsonl").write_bytes(damage(kind, content, [], rng))
            (tmp_path / "y.jsonl.gz").write_bytes(damage(kind, source.read_bytes(), [], rng))
            said = read(tmp_path / "x.jsonl")
            assert said.rejects or kind == "truncated" or said.games or said.scores
            assert read(tmp_path / "y.jsonl.gz").rejects
