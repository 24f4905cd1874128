"""What people voted: majority, mean rating, ties and abstentions, agreement; and Elo from all ratings 1 to 8.

A vote is a game of judging/tables.py whose judge is a person. Items are merged whatever side each person saw; what
chooses nothing is an abstention, which is neither a tie nor a vote.
"""
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from judging import agreement, ratings, tables
from judging.ratings import Game, collect
from judging.tables import abstained, cell_of, comparison, decided, mean_cell, merge_orders, percent, share_cell, turned

Unit = tuple  # a comparison without the judge's name: prompt, turn, repeat, a, b


def by_unit(votes: Iterable[dict]) -> dict[Unit, list[dict]]:
    """One row a rater of each comparison, a < b."""
    found = defaultdict(list)
    for row in merge_orders(votes)[0]:
        found[comparison(row)[1:]].append(row)
    return found


# ------------------------------------------------------------------------------------- one by one

def votes_section(votes: Sequence[dict], name: str) -> dict | None:
    """Votes, majorities and mean rating of every pair of models; None where no item has two raters."""
    pairs, units = defaultdict(list), by_unit(votes)
    if max(map(len, units.values()), default=0) < 2:
        return None
    for unit, rows in sorted(units.items()):
        pairs[unit[-2:]].append(rows)
    lines = []
    for (a, b), items in sorted(pairs.items()):
        given = [decided(r["preference"]) for rows in items for r in rows if r["preference"] is not None]
        count = Counter(given)
        merged = merge_orders(tables.majority([r for rows in items for r in rows], name))[0]
        most = tables.preferences(merged)
        prompts = [r["prompt"] for r in merged]
        rated = np.array([np.nan if r.get("rating") is None else r["rating"] for r in merged], dtype=float)
        lines.append([f"{a} against {b}", len(items), len(given), count[1.0], count[0.5], count[0.0],
                      sum(map(abstained, (r for rows in items for r in rows))), int((most == 0.5).sum()),
                      mean_cell(most, prompts), 100 * float(np.mean(given)) if given else None,
                      mean_cell(rated, prompts, 1, 8, 1)])
    return {"title": f"{name}: votes", "rows": lines,
            "columns": ["pair", "items", "votes", "for the first", "ties", "for the second", "abstained",
                        "tied items", "majority for the first, %", "of all votes, %", "mean rating"],
            "text": "The first is the model named first, whichever side a rater saw it on. The majority of an item is "
                    "the verdict most of its raters gave; where two are as frequent there is none, which counts as "
                    "half a win, as a tie does. Who cannot tell or finds both bad abstains. Ratings go from 1, the "
                    "first is much better, to 8; 4.5 is even. Intervals resample prompts."}


def agreement_section(votes: Sequence[dict], name: str) -> dict | None:
    """Whether several judges of the same games, such as people, agree among themselves; None where no two judged one.

    A unit's labels stand in any order, for no statistic here asks whose they are: thousands of raters take no room.
    """
    raters, units = sorted({row["judge"] for row in votes}), dict(sorted(by_unit(votes).items()))
    if max(map(len, units.values()), default=0) < 2:
        return None
    sides, prompts = _table([[decided(r["preference"]) for r in rows] for rows in units.values()], units)
    strengths, _ = _table([[tables.mean_rating([r]) for r in rows] for rows in units.values()], units)
    raw = agreement.raw_agreement(sides, tie=0.5)
    found = agreement.bootstrap_raw(sides, prompts)
    alone = len(units) - len(prompts)
    return {"title": f"{name}: agreement among {len(raters)}",
            "columns": ["pairs of verdicts", "agree, %", "without ties, %", "Krippendorff", "AC1",
                        "of ratings: Krippendorff, ordinal"],
            "rows": [[raw["n"], share_cell(found) if raw["n"] else None, percent(raw["agreement_without_ties"]),
                      agreement.krippendorff_alpha(sides), agreement.gwet_ac1(sides),
                      agreement.krippendorff_alpha(strengths, "ordinal") if strengths.size else None]],
            "text": f"{', '.join(raters[:8])}{' ...' if len(raters) > 8 else ''} on {len(units)} comparisons, {alone} "
                    "of them with one verdict alone; below, their majority."}


def _table(labels: Iterable[list[float]], units: Iterable[Unit]) -> tuple[np.ndarray, list[str]]:
    """Labels [most labels of a unit, units] of the units with two or more, and these units' prompts."""
    known = [([x for x in mine if x is not None and not np.isnan(x)], unit[0])
             for mine, unit in zip(labels, units, strict=True)]
    known = [(sorted(mine), prompt) for mine, prompt in known if len(mine) > 1]
    table = np.full((max((len(mine) for mine, _ in known), default=0), len(known)), np.nan)
    for u, (mine, _) in enumerate(known):
        table[:len(mine), u] = mine
    return table, [prompt for _, prompt in known]


def label_rows(votes: Iterable[dict], most: int = 4_000_000) -> list[dict]:
    """Rows for collect.raters.collect_labels of the comparisons that several rated; none if the table was too large."""
    shared = {unit: rows for unit, rows in by_unit(votes).items() if len(rows) > 1}
    raters = {row["judge"] for rows in shared.values() for row in rows}
    if len(raters) * len(shared) > most:
        return []
    found = []
    for unit, rows in shared.items():
        for row in rows:
            if row["preference"] is None:
                continue
            mine, first = tables.mean_rating([row]), row.get("a_first")
            strength = 0.5 - row["preference"] if mine is None else mine - 4.5
            known = {"seconds": row.get("seconds"), "swapped": None if first is None else float(not first),
                     "longer": row["length_b"] - row["length_a"] if {"length_a", "length_b"} <= row.keys() else None}
            found.append({"pair": json.dumps(unit), "prompt": unit[0], "rater": row["judge"], "strength": strength,
                          **{key: value for key, value in known.items() if value is not None}})
    return found


# ---------------------------------------------------------------------------------- Elo from ratings

def rated(rows: Iterable[dict]) -> list[dict]:
    """The rows that carry a rating, turned so that a < b and the rating is a's, whoever was shown first."""
    found = (row if row["a"] < row["b"] else turned(row) for row in rows if row.get("rating"))
    return [row | {"rating": tables.mean_rating([row]), "a_first": None} for row in found]


def elo_tables(rows: Iterable[dict]) -> tuple[dict[str, dict], str]:
    """By "no ties" and "ties allowed" each model's Elo from ratings 1 to 8, all raters' games; or why there is none."""
    rows, found = rated(rows), {}
    if not rows:
        return {}, "There are no ratings to rate."
    for name, ties in (("no ties", False), ("ties allowed", True)):  # a mean of 4.5 is a tie in both
        games = collect(Game(r["a"], r["b"], 0.5 if ties and 4 <= r["rating"] <= 5 else ratings.outcome(
            4.5, r["rating"]), r["prompt"]) for r in rows)
        if apart := ratings.not_connected(games):
            return {}, f"No rating is given: {apart}."
        found[name] = {x["model"]: x for x in ratings.elo_table(games)}
    return found, ""


def likert_sections(judge: str, rows: Sequence[dict]) -> list[dict]:
    """The talk's board: Elo from all ratings 1 to 8, the slight ones read as ties, and not."""
    found, why = elo_tables(rows)
    games = Counter(model for r in rated(rows) for model in (r["a"], r["b"]))
    same, without = (sum(not r.get("rating") and (r.get("why") == tables.IDENTICAL) == x for r in rows)
                     for x in (True, False))
    text = f"{sum(games.values()) // 2} ratings. Without one: {same} pairs of identical replies, {without} others."
    if not found:
        return [{"title": f"{judge}: Elo", "columns": ["model"], "rows": [], "text": f"{why} {text}"}]
    unequal = tables.unequal_sets(rated(rows))
    return [{"title": f"{judge}: Elo, {name}", "columns": ["model", "Elo", "rank", "ratings"],
             "text": f"{unequal} {text}".strip(),
             "rows": [[m, cell_of(x, "rating"), x["rank"], games[m]] for m, x in lines.items()]}
            for name, lines in found.items()]


def leaderboard_section(by_judge: Mapping[str, Sequence[dict]], subsets: Mapping[str, set[str]]) -> dict | None:
    """The talk's leaderboard: Elo with ties and without, of the same ratings, by judge and subset of the prompts.

    `subsets`: categories by name; without any, each category is one, if they are two to four.
    """
    by_judge = {judge: given for judge, rows in by_judge.items() if (given := rated(rows))}
    categories = sorted({tables.category_of(r) for rows in by_judge.values() for r in rows} - {""})
    subsets = subsets or {category: {category} for category in categories if 2 <= len(categories) <= 4}
    columns, notes = {}, []
    for judge, rows in by_judge.items():
        parts = {"all": rows} | {name: [r for r in rows if tables.category_of(r) in of] for name, of in subsets.items()}
        for name, part in parts.items():
            found, why = elo_tables(part)
            columns[f"{judge}: {name}"] = found, len(part)
            notes += [f"{judge}, {name}: {why}"] if why else []
    if len(columns) < 2:
        return None  # what the judge's own tables say
    first = next(iter(columns.values()))[0].get("no ties", {})
    models = list(dict.fromkeys([*first, *(m for found, _ in columns.values() for m in found.get("no ties", {}))]))

    lines = [[model, name, *(cell_of(found.get(name, {}).get(model), "rating") for found, _ in columns.values())]
             for name in ("no ties", "ties allowed") for model in models]
    lines.append(["ratings", "", *(n for _, n in columns.values())])
    named = "; ".join(f"{name}: {', '.join(sorted(of))}" for name, of in subsets.items())
    return {"title": "Leaderboard: Elo by judge and prompts", "columns": ["model", "slight preferences", *columns],
            "rows": lines, "text": " ".join([
                "Both halves are of the same ratings 1 to 8: a slight preference, 4 or 5, is a win, or a tie. Elo is "
                "the median over resampled prompts in random order, K 32.",
                *[f"Prompts by category: {named}."] * bool(named), *notes])}
