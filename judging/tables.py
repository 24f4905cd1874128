"""From rows of verdicts to the sections of a report (their form: judging/report.py).

    a game    {"judge", "prompt", "turn", "repeat", "category", "a", "b", "a_first", "preference", "rating", "why",
               "key", "length_a", ...}
    a score   {"judge", "prompt", "turn", "repeat", "category", "model", "score", "why", "key"}

preference is a's, from 0 to 1, None where no verdict could be read: "why" is the reason, and "key" finds the judge's
words in the ledger, calls.jsonl. a_first is None where the judge saw no order. Two games that differ in a_first alone
are the two orders of one comparison, and count once: a win needs both. rating is 1, the reply shown first is much
better, to 8; where there is no order, a is the first.
"""
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import multimode

import numpy as np

from judging import ratings
from judging.ratings import Game, Games, collect

IDENTICAL = "identical replies"  # why a game is a tie that tells nothing of the judge
MOST_UNPARSED = 0.05  # above, the verdicts that could be read are a selection, and their mean means nothing


# ------------------------------------------------------------------------------- cells and figures

def bounded(value: float, low: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high}


def cell_of(found: Mapping | None, key: str = "value") -> dict | None:
    """The cell of a number that was measured with its interval, among other things; None for none."""
    return found and bounded(found[key], found["low"], found["high"])


def percent(share: float, low: float | None = None, high: float | None = None) -> dict | float | None:
    """A share as a cell in percent, with its interval if there is one; None for NaN."""
    if math.isnan(share):
        return None
    return 100 * share if low is None else bounded(100 * share, 100 * low, 100 * high)


def share_cell(found: Mapping | None, key: str = "value") -> dict | None:
    """A measured share in percent, with its interval; None for none."""
    return found and percent(found[key], found["low"], found["high"])


def count_cell(wins: float, n: int) -> dict | None:
    """wins / n in percent with Wilson's interval."""
    return percent(wins / n, *ratings.wilson(wins, n)) if n else None


def mean_cell(values: Sequence[float], prompts: Sequence, low: float = 0, high: float = 1,
              scale: float = 100) -> dict | None:
    """The mean of the valid values, on a scale from low to high, times `scale`, with its interval from resampled
    prompts; None for none."""
    values = np.asarray(values, dtype=float)
    if np.isnan(values).all():
        return None
    ends = ratings.mean_interval(values, prompts, low=low, high=high)
    return bounded(*(scale * x for x in (float(np.nanmean(values)), *ends)))


def dots(cells: Mapping[str, dict], label: str, **more) -> dict:
    """The figure of cells with intervals by name."""
    value, low, high = ([x[key] for x in cells.values()] for key in ("value", "low", "high"))
    return {"kind": "ratings", "names": list(cells), "values": value, "low": low, "high": high, "label": label, **more}


def grid_section(title: str, text: str, names: Sequence[str], columns: Sequence[str], grid: list[list],
                 label: str) -> dict:
    """A table of one number by model and column, and its figure."""
    figure = {"kind": "matrix", "names": list(names), "columns": list(columns), "grid": grid, "label": label,
              "low": 0, "high": 100}
    return {"title": title, **({"text": text} if text else {}), "columns": ["model", *columns], "figure": figure,
            "rows": [[name, *line] for name, line in zip(names, grid, strict=True)]}


def fewest_to_most(counts: Iterable[int]) -> str:
    """"8 to 10", or "10" if they are all the same."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


# -------------------------------------------------------------------------------------------- rows

def describe(text: str) -> dict[str, int]:
    """What a judge may like in a reply beside its worth: characters, distinct words, whether it holds a list."""
    has_list = re.search(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.M)
    return {"length": len(text), "words": ratings.distinct_words(text), "list": int(has_list is not None)}


def place(row: dict) -> tuple:
    """Where the replies of a game or a score stand: the prompt, its turn, and which repeat."""
    return str(row["prompt"]), row.get("turn") or 1, row.get("repeat") or 0


def comparison(row: dict) -> tuple:
    """What a game compares, whatever the order."""
    return row["judge"], *place(row), *sorted((row["a"], row["b"]))


def turned(row: dict) -> dict:
    """The same game with a and b exchanged."""
    known = [name for name in ("length", "words", "list") if f"{name}_a" in row and f"{name}_b" in row]
    other = {f"{name}_{side}": row[f"{name}_{'ba'['ab'.index(side)]}"] for name in known for side in "ab"}
    p, first, rating = row["preference"], row.get("a_first"), row.get("rating")
    if rating is not None and first is None:
        other["rating"] = 9 - rating
    return row | other | {"a": row["b"], "b": row["a"], "preference": None if p is None else 1 - p,
                          "a_first": None if first is None else not first}


def merge_orders(rows: Iterable[dict]) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """One row a comparison, a < b; of those seen in both orders also a's preference with a first and with b first.

    NaN is no verdict. A probability above one half is a win, so a judge that leans one way in one order only has a tie.
    """
    found: dict[tuple, dict[bool | None, dict]] = {}
    for row in rows:
        row = row if row["a"] < row["b"] else turned(row)
        found.setdefault(comparison(row), {}).setdefault(row.get("a_first"), row)
    merged, forward, backward = [], [], []
    for games in found.values():
        if True in games and False in games:
            forward.append(decided(games[True]["preference"]))
            backward.append(decided(games[False]["preference"]))
            both = float(ratings.both_orders([forward[-1]], [backward[-1]])[0])
            unread = next((r for r in games.values() if r["preference"] is None), games[True])
            merged.append(games[True] | {"a_first": None, "preference": None if math.isnan(both) else both, "orders": 2,
                                         "why": unread.get("why", ""), "rating": mean_rating(games.values())})
        else:
            merged.append(next(iter(games.values())))
    return merged, np.array(forward), np.array(backward)


def mean_rating(rows: Iterable[dict]) -> float | None:
    """a's mean rating, 1 a is much better to 8 b is; None where there is none."""
    known = [r["rating"] if r.get("a_first") is not False else 9 - r["rating"] for r in rows if r.get("rating")]
    return sum(known) / len(known) if known else None


def majority(rows: Sequence[dict], name: str) -> list[dict]:
    """Games of several judges, such as people, as those of one, whichever side each of them saw.

    A comparison becomes one game without an order: the verdict most of its judges gave, else a tie, and their mean
    rating. Who gave none abstains; if all do, so does the majority. The games of a single judge stay as they are.
    """
    if len({row["judge"] for row in rows}) < 2:
        return [row | {"judge": name} for row in rows]
    votes: dict[tuple, list[dict]] = {}
    for row in merge_orders(rows)[0]:
        votes.setdefault(comparison(row)[1:], []).append(row)
    found = []
    for each in votes.values():
        given = multimode(decided(r["preference"]) for r in each if r["preference"] is not None)
        p = None if not given else given[0] if len(given) == 1 else 0.5
        why = next((r.get("why") for r in each if not abstained(r)), "abstained")
        found.append(each[0] | {"judge": name, "a_first": None, "preference": p,
                                "rating": mean_rating(each), "why": "" if given else why})
    return found


def decided(p: float | None) -> float:
    """A preference as an outcome: 1, 0.5 or 0; NaN for none."""
    return math.nan if p is None or math.isnan(p) else ratings.outcome(p, 0.5)


def games_of(rows: Iterable[dict]) -> Games:
    return collect(Game(r["a"], r["b"], decided(r["preference"]), r["prompt"], bool(r.get("a_first"))) for r in rows)


def abstained(row: dict) -> bool:
    """Whether people saw the pair and did not choose, which is no failure to read them."""
    return (row.get("why") or "").startswith("abstained")


def unparsed(rows: Sequence[dict], key: str = "preference") -> tuple[int, int, str]:
    """How many rows have no verdict, of how many, and a sentence that says so, with the reasons.

    Abstentions are counted apart and are in neither number.
    """
    asked = [row for row in rows if not abstained(row)]
    reasons = Counter((row.get("why") or "no verdict").split(":")[0] for row in asked if row[key] is None)
    named = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
    said = f"{reasons.total()} of {len(asked)} verdicts could not be read" + (f" ({named})." if reasons else ".")
    if abstentions := len(rows) - len(asked):
        said += f" {abstentions} more are abstentions, and in no mean."
    return reasons.total(), len(asked), said


def refused(rows: Sequence[dict], key: str = "preference") -> str:
    """Why no mean is given; "" if one may be."""
    missing, count, said = unparsed(rows, key)
    if missing == count:
        return f"{said} There is nothing to average."
    if missing > MOST_UNPARSED * count:
        return f"{said} Above {MOST_UNPARSED:.0%} no mean is given: read the failures in judgments.jsonl."
    return ""


def reasons(refusals: Iterable[str], said: str) -> str:
    """What `refused` says of several models, each once, without what was `said` of all."""
    return " ".join(dict.fromkeys(why.removeprefix(said).strip() for why in refusals if why))


def unequal_sets(rows: Iterable[dict]) -> str:
    """Which models met on how many prompts, if they did not all meet on the same; "" if they did."""
    met: dict[str, set] = {}
    for row in rows:
        for side in ("ab" if "a" in row else ("model",)):
            met.setdefault(row[side], set()).add(place(row))
    every = len(set().union(*met.values()))
    if all(len(mine) == every for mine in met.values()):
        return ""
    named = [f"{model} {len(mine)}" for model, mine in sorted(met.items())]
    return (f"The models did not meet on the same questions. Of {every}, turns counted apart: "
            f"{', '.join(named[:12])}{' ...' if len(named) > 12 else ''}.")


# ------------------------------------------------------------------------------------------- games

def against(rows: Sequence[dict], model: str, baseline: str) -> list[dict]:
    """The games between the two, turned so that the model is a."""
    mine = [r for r in rows if {r["a"], r["b"]} == {model, baseline}]
    return [r if r["a"] == model else turned(r) for r in mine]


def opponents(rows: Sequence[dict], baseline: str) -> list[str]:
    return sorted({x for r in rows for x in (r["a"], r["b"])} - {baseline})


def preferences(rows: Sequence[dict], key: str = "preference") -> np.ndarray:
    return np.array([math.nan if r[key] is None else r[key] for r in rows], dtype=float)


def win_rates(rows: Sequence[dict], baseline: str, rounds: int = 1000,
              difficulty: Mapping[str, float] | None = None) -> list[dict]:
    """By model, best first: ratings.win_rate and its interval, lc2 where lengths are known; or why not ("refused").

    With the prompts' difficulty also "lc", the three-term fit.
    """
    lines = []
    for model in opponents(rows, baseline):
        mine = against(rows, model, baseline)
        if not mine:
            continue
        line = {"model": model, "missing": unparsed(mine)[0], "rows": len(mine), "refused": refused(mine)}
        if not line["refused"]:
            p, prompts = preferences(mine), [str(r["prompt"]) for r in mine]
            low, high = ratings.mean_interval(p, prompts, rounds)
            line |= {**ratings.win_rate(p, prompts), "missing": line["missing"], "low": 100 * low, "high": 100 * high}
            if all("length_a" in r for r in mine):
                length, other = (np.array([r[f"length_{side}"] for r in mine], dtype=float) for side in "ab")
                names, owner = np.unique(prompts, return_inverse=True)
                drawn = ratings.resample(len(names), min(rounds, 200), 0)[:, owner]
                fit = ratings.lc2(p, other, length, drawn, len(names))
                line |= {"lc2": cell_of(fit, "lc2"), "length": float(length.mean())}
                if difficulty:
                    line["lc"] = ratings.fit_lc(p, other, length, [difficulty[x] for x in prompts])["lc_win_rate"]
        lines.append(line)
    return sorted(lines, key=lambda x: (-x.get("win_rate", -1), x["model"]))


def win_rate_section(rows: Sequence[dict], baseline: str, judge: str, orders: str,
                     difficulty: Mapping[str, float] | None = None) -> dict:
    """`rows` after merge_orders."""
    keys = ("wins", "draws", "losses", "n", "missing", "lc2", "length", *["lc"] * bool(difficulty))
    lines = win_rates(rows, baseline, difficulty=difficulty)
    cells = {x["model"]: cell_of(x, "win_rate") for x in lines if not x["refused"]}
    table = [[x["model"], cells.get(x["model"]), *(x.get(key) for key in keys)] for x in lines]
    said = unparsed(rows)[2]
    text = f"{unequal_sets(rows)} {said} {orders} A draw is half a win; intervals resample prompts."
    if any("lc2" in x for x in lines):
        text += " lc2 is the win rate at equal length from a fit of two terms, not AlpacaEval's LC."
    text = f"{text} {reasons((x['refused'] for x in lines), said)}".strip()
    columns = ["model", "win rate, %", "wins", "draws", "losses", "n", "unread", "lc2, %", "characters"]
    if difficulty:
        columns.append("LC, %")
        text += (" LC has the third term, each prompt's difficulty; unlike AlpacaEval's its fit has no penalty and no "
                 "gamed baselines.")
    section = {"title": f"{judge}: wins against {baseline}", "text": text, "rows": table, "columns": columns}
    return section | ({"figure": dots(cells, "win rate, %", reference=50)} if cells else {})


def ratings_sections(rows: Sequence[dict], judge: str, rounds: int = 1000) -> list[dict]:
    """Bradley-Terry and Elo with ranks, and who beats whom; `rows` after merge_orders."""
    why = refused(rows)
    games = None if why else games_of(rows)
    if games and (apart := ratings.not_connected(games)):
        why = f"No rating is given: {apart}."
    if why:
        return [{"title": f"{judge}: ratings", "text": why, "columns": ["model"], "rows": []}]
    # A draw of each model against an average one keeps the rating of a model that never lost finite.
    half = ratings.bootstrap_bradley_terry(games, rounds=rounds, prior=1, ends=True)
    point = ratings.bradley_terry(games, prior=1)["ratings"]
    found = ratings.rating_table(games.models, half, point, games.prompts)
    table, elo = ({x["model"]: cell_of(x, "rating") for x in lines} for lines in (
        found, ratings.elo_table(games, rounds, beside=half)))
    tied, clear = (games.outcome == 0.5).any(), np.isin(games.outcome, (0, 1)).any()
    davidson = ratings.bradley_terry(games, "davidson", prior=1)["ratings"] if tied and clear else {}
    record = ratings.records(games)
    lines = [[m, x["rank"], table[m], elo[m], davidson.get(m), record[m]["win_rate"], record[m]["n"]]
             for m, x in zip(table, found, strict=True)]
    sections = [{"title": f"{judge}: ratings", "rows": lines, "figure": dots(table, "Bradley-Terry"),
                 "text": f"{unequal_sets(rows)} Bradley-Terry with a tie as half a win, centred on 1000, 400 points "
                         "for odds of ten to one. Elo is the median over resampled prompts in random order, K 32; its "
                         "interval is of the prompts alone. A "
                         "rank is one more than the models whose interval lies wholly above. Modelled ties: "
                         "Davidson.".strip(),
                 "columns": ["model", "rank", "Bradley-Terry", "Elo", "ties modelled", "wins + ties/2, %", "games"]}]
    if len(table) > 2:
        met: dict[frozenset, list[dict]] = defaultdict(list)
        for r in rows:
            met[frozenset((r["a"], r["b"]))].append(r)
        grid = [[_mean(against(met[frozenset((a, b))], a, b), "preference", 100) if a != b else None
                 for b in table] for a in table]
        met = Counter(frozenset((r["a"], r["b"])) for r in rows if r["preference"] is not None).values()
        text = f"Wins of the row's model against the column's, percent, ties half; {fewest_to_most(met)} games a pair."
        sections.append(grid_section(f"{judge}: who beats whom", text, list(table), list(table), grid, "win rate, %"))
    return sections


def _mean(rows: Sequence[dict], key: str, scale: float = 1) -> float | None:
    """None where there is nothing to average, or too much is unread."""
    if refused(rows, key):
        return None
    return scale * float(np.mean([r[key] for r in rows if r[key] is not None]))


def category_of(row: dict) -> str:
    return row.get("category") or ""


def category_section(rows: Sequence[dict], baseline: str, judge: str) -> dict | None:
    """Win rate against the baseline by category; None if there is but one, or no model has a mean."""
    by_model = {m: against(rows, m, baseline) for m in opponents(rows, baseline)}
    return _by_category(f"{judge}: wins against {baseline} by category", {
        m: mine for m, mine in by_model.items() if not refused(mine)}, "preference", "win rate, %", 100)


# The talk's figure goes round MT-Bench's domains in this order.
DOMAINS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def _by_category(title: str, by_model: Mapping[str, Sequence[dict]], key: str, label: str, scale: float) -> dict | None:
    """A table of means by model and category, with tinted cells; None if there is but one category, or no model."""
    categories = sorted({category_of(r) for mine in by_model.values() for r in mine})
    categories = DOMAINS if set(categories) == set(DOMAINS) else categories
    if len(categories) < 2:
        return None
    parts = [[[r for r in mine if category_of(r) == c] for c in categories] for mine in by_model.values()]
    grid = [[_mean(part, key, scale) for part in line] for line in parts]
    prompts = [[len({str(r["prompt"]) for r in part if r[key] is not None}) for part in line] for line in parts]
    counts = ", ".join(f"{c or '-'} {fewest_to_most(n)}" for c, n in zip(categories, zip(*prompts, strict=True),
                                                                         strict=True))
    text = f"{'Percent; p' if scale == 100 else 'P'}rompts of each model that have a verdict: {counts}."
    return grid_section(title, text, list(by_model), categories, grid, label)


# ------------------------------------------------------------------------------------------ scores

def score_sections(rows: Sequence[dict], judge: str) -> list[dict]:
    """Mean score by model, turn and category; of two turns MT-Bench's average over all valid rows of both.

    Only what all models answered counts: a mean over easier questions is higher.
    """
    given, models = rows, sorted({r["model"] for r in rows})
    rows = _common(rows)
    turns = sorted({r.get("turn", 1) for r in rows})
    lines, cells, why = [], {}, {}
    scale = [r["score"] for r in rows if r["score"] is not None]
    for model in models:
        mine = [r for r in rows if r["model"] == model]
        why[model] = refused(mine, "score")
        means: list = [None] * len(turns)
        if not why[model]:
            cells[model] = mean_cell(preferences(mine, "score"), [r["prompt"] for r in mine], min(1, *scale),
                                     max(10, *scale), 1)
            means = [_mean([r for r in mine if r.get("turn", 1) == t], "score") for t in turns]
        unread = sum(r["score"] is None for r in mine)
        lines.append([model, cells.get(model), *means, len(mine) - unread, unread,
                      sum(r["model"] == model for r in given) - len(mine)])
    lines.sort(key=lambda x: -(x[1]["value"] if x[1] else -math.inf))
    said = unparsed(rows, "score")[2]
    text = (f"{unequal_sets(given)} {said} The mean is over the scores n of all turns that all these models answered; "
            "intervals resample prompts.")
    columns = ["model", "mean", *(f"turn {t}" for t in turns), "n", "unread", "left out"]
    sections = [{"title": f"{judge}: scores", "columns": columns,
                 "rows": lines, "text": f"{text} {reasons(why.values(), said)}".strip()}]
    named = [line[0] for line in lines if line[1]]
    sections[0] |= {"figure": dots({m: cells[m] for m in named}, "mean score")} if named else {}
    by_model = {m: [r for r in rows if r["model"] == m] for m in named}
    parts = _by_category(f"{judge}: scores by category", by_model, "score", "mean score", 1)
    if values := [x for line in parts["figure"]["grid"] for x in line if x is not None] if parts else []:
        figure, columns = parts["figure"], len(parts["columns"]) - 1
        figure |= {"low": min(values), "high": max(values)}
        if 3 <= columns <= 12 and len(named) <= 6 and len(values) == len(named) * columns:  # few enough to tell apart
            figure |= {"kind": "radar", "low": 0, "high": max(10, *values)}
    return sections + [parts] * bool(values)


def _common(rows: Sequence[dict]) -> list[dict]:
    """The rows of what every model has a row of."""
    models: dict[tuple, set[str]] = {}
    for row in rows:
        models.setdefault(place(row), set()).add(row["model"])
    every = {row["model"] for row in rows}
    return [row for row in rows if models[place(row)] == every]
