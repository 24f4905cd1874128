"""From rows of verdicts to the sections of a report (their form: judging/report.py).

    a game    {"judge", "prompt", "turn", "repeat", "category", "a", "b", "a_first", "preference", "rating", "why", "length_a", ...}
    a score   {"judge", "prompt", "turn", "repeat", "category", "model", "score", "why"}

preference is a's, from 0 to 1, None where no verdict could be read; a_first is None where the judge saw no order. Two
games that differ in a_first alone are the two orders of one comparison, and count once: a win needs both.
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from judging import ratings
from judging.ratings import Game, Games, collect

MOST_UNPARSED = 0.05  # above, the verdicts that could be read are a selection, and their mean means nothing


def describe(text: str) -> dict[str, int]:
    """What a judge may like in a reply beside its worth: characters, distinct words, whether it holds a list."""
    has_list = re.search(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.M)
    return {"length": len(text), "words": ratings.distinct_words(text), "list": int(has_list is not None)}


def comparison(row: dict) -> tuple:
    """What a game compares, whatever the order."""
    a, b = sorted((row["a"], row["b"]))
    return row["judge"], str(row["prompt"]), row.get("turn", 1), row.get("repeat", 0), a, b


def turned(row: dict) -> dict:
    """The same game with a and b exchanged."""
    other = {f"{name}_{side}": row[f"{name}_{'b' if side == 'a' else 'a'}"] for name in ("length", "words", "list") for side in "ab"
             if f"{name}_a" in row and f"{name}_b" in row}
    p, first = row["preference"], row.get("a_first")
    return row | other | {"a": row["b"], "b": row["a"], "preference": None if p is None else 1 - p,
                          "a_first": None if first is None else not first}


def merge_orders(rows: Iterable[dict]) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """One row a comparison, a < b; and of those seen in both orders a's preference with a first and with b first, NaN for none.

    Decided by halves: a probability above one half is a win, so a judge that leans one way in one order only ends in a tie.
    """
    found: dict[tuple, dict[bool | None, dict]] = {}
    for row in rows:
        row = row if row["a"] < row["b"] else turned(row)
        found.setdefault(comparison(row), {}).setdefault(row.get("a_first"), row)
    merged, forward, backward = [], [], []
    for games in found.values():
        if True in games and False in games:
            pair = [math.nan if games[side]["preference"] is None else games[side]["preference"] for side in (True, False)]
            forward.append(decided(pair[0]))
            backward.append(decided(pair[1]))
            both = float(ratings.both_orders([forward[-1]], [backward[-1]])[0])
            merged.append(games[True] | {"a_first": None, "preference": None if math.isnan(both) else both})
        else:
            merged.append(next(iter(games.values())))
    return merged, np.array(forward), np.array(backward)


def majority(rows: Sequence[dict], name: str) -> list[dict]:
    """Games of several judges, such as people, as those of one: the verdict most of them gave, a tie where none has most."""
    votes: dict[tuple, list[dict]] = {}
    for row in rows:
        row = row if row["a"] < row["b"] else turned(row)
        votes.setdefault((*comparison(row)[1:], row.get("a_first")), []).append(row)
    found = []
    for of in votes.values():
        given = [decided(r["preference"]) for r in of if r["preference"] is not None]
        best = [x for x in (1.0, 0.5, 0.0) if given.count(x) == max(map(given.count, given), default=-1)]
        p = of[0]["preference"] if len(of) == 1 else None if not given else best[0] if len(best) == 1 else 0.5
        found.append(of[0] | {"judge": name, "preference": p})
    return found


def decided(p: float | None) -> float:
    """A preference as an outcome: 1, 0.5 or 0; NaN for none."""
    return math.nan if p is None or math.isnan(p) else 0.5 + 0.5 * ((p > 0.5) - (p < 0.5))


def games_of(rows: Iterable[dict]) -> Games:
    return collect(Game(r["a"], r["b"], decided(r["preference"]), r["prompt"], bool(r.get("a_first"))) for r in rows)


def unparsed(rows: Sequence[dict], key: str = "preference") -> tuple[int, int, str]:
    """How many rows have no verdict, of how many, and a sentence that says so, with the reasons."""
    reasons: dict[str, int] = {}
    for row in rows:
        if row[key] is None:
            reason = (row.get("why") or "no verdict").split(":")[0]
            reasons[reason] = reasons.get(reason, 0) + 1
    missing = sum(reasons.values())
    named = ", ".join(f"{n} {why}" for why, n in sorted(reasons.items(), key=lambda x: -x[1]))
    return missing, len(rows), f"{missing} of {len(rows)} verdicts could not be read" + (f" ({named})." if reasons else ".")


def refused(rows: Sequence[dict], force: bool, key: str = "preference") -> str:
    """Why no mean is given; "" if one may be."""
    missing, count, said = unparsed(rows, key)
    if missing == count:
        return f"{said} There is nothing to average."
    if missing > MOST_UNPARSED * count and not force:
        return f"{said} Above {MOST_UNPARSED:.0%} no mean is given: read the failures in judgments.jsonl, or set force=true."
    return ""


def bounded(value: float, low: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high}


# ------------------------------------------------------------------------------------------- games

def against(rows: Sequence[dict], model: str, baseline: str) -> list[dict]:
    """The games between the two, turned so that the model is a."""
    mine = [r for r in rows if {r["a"], r["b"]} == {model, baseline}]
    return [r if r["a"] == model else turned(r) for r in mine]


def preferences(rows: Sequence[dict]) -> np.ndarray:
    return np.array([math.nan if r["preference"] is None else r["preference"] for r in rows])


def prompt_interval(p: np.ndarray, prompts: Sequence, rounds: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean, in percent, from resampled prompts."""
    sums, counts = ratings.by_prompt(p, prompts)
    samples = ratings.bootstrap_means(sums[:, None], counts[:, None], ratings.resample(len(sums), rounds, seed))
    low, high = ratings.percentiles(100 * samples[:, 0])
    return float(low), float(high)


def win_rates(rows: Sequence[dict], baseline: str, rounds: int = 1000, seed: int = 0, force: bool = False,
              difficulty: Mapping[str, float] | None = None) -> list[dict]:
    """By model, best first: ratings.win_rate, its interval over prompts, lc2 with interval where lengths are known; None where refused.

    With the prompts' difficulty also "lc", the three-term fit.
    """
    lines = []
    for model in sorted({x for r in rows for x in (r["a"], r["b"])} - {baseline}):
        mine = against(rows, model, baseline)
        if not mine:
            continue
        why = refused(mine, force)
        line = {"model": model, "missing": sum(r["preference"] is None for r in mine), "rows": len(mine), "refused": why}
        if not why:
            p, prompts = preferences(mine), [r["prompt"] for r in mine]
            low, high = prompt_interval(p, prompts, rounds, seed)
            line |= {**ratings.win_rate(p, prompts), "low": low, "high": high}
            if all("length_a" in r for r in mine):
                length, other = (np.array([r[f"length_{side}"] for r in mine], dtype=float) for side in "ab")
                names, owner = np.unique([str(x) for x in prompts], return_inverse=True)
                fit = ratings.lc2(p, other, length, ratings.resample(len(names), min(rounds, 200), seed)[:, owner])
                line |= {"lc2": fit["lc2"], "lc2_low": fit["low"], "lc2_high": fit["high"], "length": float(length.mean())}
                if difficulty:
                    gamma = [difficulty[str(r["prompt"])] for r in mine]
                    line["lc"] = ratings.fit_lc(p, other, length, gamma)["lc_win_rate"]
        lines.append(line)
    return sorted(lines, key=lambda x: (-x.get("win_rate", -1), x["model"]))


def win_rate_section(rows: Sequence[dict], baseline: str, judge: str, orders: str, seed: int = 0, force: bool = False,
                     difficulty: Mapping[str, float] | None = None) -> dict:
    """`rows` after merge_orders."""
    lines = win_rates(rows, baseline, seed=seed, force=force, difficulty=difficulty)
    table = [[x["model"], None, None, None, None, x["missing"], None, None] if x["refused"] else
             [x["model"], bounded(x["win_rate"], x["low"], x["high"]), x["wins"], x["draws"], x["losses"], x["missing"],
              bounded(x["lc2"], x["lc2_low"], x["lc2_high"]) if "lc2" in x else None, x.get("length")] for x in lines]
    given = [x for x in lines if not x["refused"]]
    why = " ".join(dict.fromkeys(x["refused"] for x in lines if x["refused"]))
    text = f"{unparsed(rows)[2]} {orders} A draw is half a win; intervals resample prompts."
    if any("lc2" in x for x in lines):
        text += " lc2 is the win rate at equal length from a fit of two terms, not AlpacaEval's LC."
    text = f"{text} {why}".strip()
    if difficulty:
        text += " LC has the third term, each prompt's difficulty; unlike AlpacaEval's its fit has no penalty and no gamed baselines."
        table = [[*line, x.get("lc")] for line, x in zip(table, lines, strict=True)]
    section = {"title": f"{judge}: wins against {baseline}", "text": text,
               "columns": ["model", "win rate, %", "wins", "draws", "losses", "unread", "lc2, %", "characters",
                           *["LC, %"] * bool(difficulty)],
               "rows": table}
    if given:
        section["figure"] = {"kind": "ratings", "names": [x["model"] for x in given], "values": [x["win_rate"] for x in given],
                             "low": [x["low"] for x in given], "high": [x["high"] for x in given], "label": "win rate, %", "reference": 50}
    return section


def ratings_sections(rows: Sequence[dict], judge: str, seed: int = 0, rounds: int = 1000, force: bool = False) -> list[dict]:
    """Bradley-Terry and Elo with ranks, and who beats whom; `rows` after merge_orders."""
    why = refused(rows, force)
    if why:
        return [{"title": f"{judge}: ratings", "text": why, "columns": ["model"], "rows": []}]
    games = games_of(rows)
    apart = ratings.not_connected(games)
    if apart:
        return [{"title": f"{judge}: ratings", "text": f"No rating is given: {apart}.", "columns": ["model"], "rows": []}]
    # A draw of each model against an average one keeps the rating of a model that never lost finite.
    half = ratings.bootstrap_bradley_terry(games, rounds=rounds, seed=seed)
    table = {x["model"]: x for x in ratings.rating_table(games.models, half, ratings.bradley_terry(games, prior=1)["ratings"])}
    elo = {x["model"]: x for x in ratings.rating_table(games.models, ratings.bootstrap_elo(games, rounds, seed))}
    tied, clear = (games.outcome == 0.5).any(), np.isin(games.outcome, (0, 1)).any()
    davidson = ratings.bradley_terry(games, "davidson", prior=1)["ratings"] if tied and clear else {}
    record = ratings.records(games)
    lines = [[m, x["rank"], bounded(x["rating"], x["low"], x["high"]), bounded(elo[m]["rating"], elo[m]["low"], elo[m]["high"]),
              davidson.get(m), record[m]["win_rate"], record[m]["n"]] for m, x in table.items()]
    low, value, high = ([x[key] for x in table.values()] for key in ("low", "rating", "high"))
    sections = [{"title": f"{judge}: ratings", "rows": lines,
                 "text": "Bradley-Terry with a tie as half a win, centred on 1000, 400 points for odds of ten to one. Elo is the median "
                         "over resampled prompts in random order, K 32. A rank is one more than the models whose interval lies wholly "
                         "above. Modelled ties: Davidson.",
                 "columns": ["model", "rank", "Bradley-Terry", "Elo", "ties modelled", "wins + ties/2, %", "games"],
                 "figure": {"kind": "ratings", "names": list(table), "values": value, "low": low, "high": high, "label": "Bradley-Terry"}}]
    if len(games.models) > 2:
        order = list(table)
        grid = [[_win_share(against(rows, a, b)) if a != b else None for b in order] for a in order]
        sections.append({"title": f"{judge}: who beats whom", "text": "Wins of the row's model against the column's in percent, ties half.",
                         "columns": ["model", *order], "rows": [[a, *line] for a, line in zip(order, grid, strict=True)],
                         "figure": {"kind": "matrix", "names": order, "columns": order, "grid": grid, "label": "win rate, %",
                                    "low": 0, "high": 100}})
    return sections


def _win_share(rows: Sequence[dict]) -> float | None:
    p = [r["preference"] for r in rows if r["preference"] is not None]
    return 100 * float(np.mean(p)) if p else None


def category_section(rows: Sequence[dict], baseline: str, judge: str) -> dict | None:
    """Win rate against the baseline by category; None if there is but one."""
    categories = sorted({r.get("category") or "" for r in rows})
    if len(categories) < 2:
        return None
    models = sorted({x for r in rows for x in (r["a"], r["b"])} - {baseline})
    grid = [[_win_share([r for r in against(rows, m, baseline) if (r.get("category") or "") == c]) for c in categories] for m in models]
    counts = [len({r["prompt"] for r in rows if (r.get("category") or "") == c}) for c in categories]
    return {"title": f"{judge}: wins against {baseline} by category", "columns": ["model", *categories],
            "text": f"Percent; prompts: {', '.join(f'{c or chr(45)} {n}' for c, n in zip(categories, counts, strict=True))}.",
            "rows": [[m, *line] for m, line in zip(models, grid, strict=True)],
            "figure": {"kind": "matrix", "names": models, "columns": categories, "grid": grid, "label": "win rate, %",
                       "low": 0, "high": 100}}


# ------------------------------------------------------------------------------------------ scores

def score_sections(rows: Sequence[dict], judge: str, seed: int = 0, force: bool = False) -> list[dict]:
    """Mean score by model, turn and category; of two turns MT-Bench's average over all valid rows of both."""
    models, lines, by_category = sorted({r["model"] for r in rows}), [], {}
    turns = sorted({r.get("turn", 1) for r in rows})
    for model in models:
        mine = [r for r in rows if r["model"] == model]
        missing = sum(r["score"] is None for r in mine)
        if refused(mine, force, "score"):
            lines.append([model, None, *[None] * len(turns), missing])
            continue
        score = np.array([math.nan if r["score"] is None else r["score"] for r in mine])
        low, high = prompt_interval(score / 100, [r["prompt"] for r in mine], 1000, seed)
        means = [_mean(score, [r.get("turn", 1) == t for r in mine]) for t in turns]
        lines.append([model, bounded(float(np.nanmean(score)), low, high), *means, missing])
        for c in {r.get("category") or "" for r in mine}:
            by_category.setdefault(c, {})[model] = _mean(score, [(r.get("category") or "") == c for r in mine])
    lines.sort(key=lambda x: -(x[1]["value"] if x[1] else -math.inf))
    why = " ".join(dict.fromkeys(refused([r for r in rows if r["model"] == m], force, "score") for m in models)).strip()
    text = f"{unparsed(rows, 'score')[2]} The mean is over all scores of all turns; intervals resample prompts. {why}".strip()
    sections = [{"title": f"{judge}: scores", "columns": ["model", "mean", *(f"turn {t}" for t in turns), "unread"], "rows": lines,
                 "text": text}]
    given = [x for x in lines if x[1]]
    if given:
        sections[0]["figure"] = {"kind": "ratings", "names": [x[0] for x in given], "values": [x[1]["value"] for x in given],
                                 "low": [x[1]["low"] for x in given], "high": [x[1]["high"] for x in given], "label": "mean score"}
    if len(by_category) > 1:
        names, columns = [x[0] for x in given], sorted(by_category)
        grid = [[by_category[c].get(m) for c in columns] for m in names]
        values = [x for line in grid for x in line if x is not None]
        sections.append({"title": f"{judge}: scores by category", "columns": ["model", *columns],
                         "rows": [[m, *line] for m, line in zip(names, grid, strict=True)],
                         "figure": {"kind": "matrix", "names": names, "columns": columns, "grid": grid, "label": "mean score",
                                    "low": min(values), "high": max(values)}})
    return sections


def _mean(score: np.ndarray, chosen: Sequence[bool]) -> float | None:
    part = score[np.array(chosen)]
    part = part[~np.isnan(part)]
    return float(part.mean()) if len(part) else None
