"""How often the intervals that judge.py prints hold the truth: simulated worlds, put through the report's own tables.

    WRITE=1 python -m pytest tests/test_coverage.py       400 worlds, to benchmarks/results/coverage.json; half an hour

A world is three models that answer `prompts` prompts; how well a model does differs from prompt to prompt, and so does
what a judge makes of it, so that games of one prompt are not independent. The judge likes length and the first slot,
and sees both orders of all pairs; three people see one order each, drawn by lot. The truth is what the tables say on
average in the worlds with most prompts, of Elo, which depends on the number of games, in those of the same size. Right
95 % intervals hold the truth in 93 to 97 % of 400 worlds by chance.
"""
import json
import os
from itertools import combinations
from typing import NamedTuple

import numpy as np
from conftest import ROOT

from collect import raters
from judging import choices, gold, people, rewards, safety, tables, trial
from judging.ratings import paired_difference

RESULT, WRITE = ROOT / "benchmarks" / "results" / "coverage.json", "WRITE" in os.environ
MODELS = {"base": 0.0, "sft": 0.4, "dpo": 0.7}
ORDER_DEPENDS = ("Elo", "Elo from ratings, no ties", "Elo from ratings, ties allowed")
WORLDS, PROMPTS = 400, (30, 100)


def games(rng: np.random.Generator, prompts: int) -> tuple[list[dict], list[dict], list[dict]]:
    """The judge's games in both orders, people's votes, and the judge's marks."""
    judged, votes, marks = [], [], []
    for i in range(prompts):
        quality = {name: mean + rng.normal() for name, mean in MODELS.items()}
        length = {name: round(300 * np.exp(0.2 * q + 0.3 * rng.normal())) for name, q in quality.items()}
        opinion = {name: q + rng.normal(0, 0.7) for name, q in quality.items()}  # the judge's, in whatever order
        about = {"prompt": f"p{i}", "category": ("chat", "code")[i % 2], "turn": 1, "repeat": 0, "why": ""}
        marks += [about | {"judge": "judge", "model": name, "score": float(np.clip(round(6 + 1.5 * x), 1, 10))}
                  for name, x in opinion.items()]
        for a, b in combinations(MODELS, 2):
            pair = about | {"a": a, "b": b, "length_a": length[a], "length_b": length[b]}
            leaning = opinion[a] - opinion[b] + 0.001 * (length[a] - length[b])
            judged += [pair | verdict(leaning + slot + rng.normal(0, 0.4), slot > 0) | {
                "judge": "judge", "gold": float(quality[a] > quality[b])} for slot in (0.3, -0.3)]
            shared = quality[a] - quality[b] + rng.normal(0, 0.5)  # what all people see in this pair
            votes += [pair | verdict(shared + rng.normal(0, 0.8), bool(rng.integers(2))) | {"judge": f"person {k}"}
                      for k in range(3)]
    return judged, votes, marks


def verdict(leaning: float, a_first: bool) -> dict:
    """a's preference and the rating 1 to 8 of the slots as they were seen."""
    strength = int(np.clip(np.ceil(abs(leaning) * 2), 1, 4))
    rating = 5 - strength if (leaning > 0) == a_first else 4 + strength
    tie = abs(leaning) < 0.25
    return {"a_first": a_first, "preference": 0.5 if tie else float(leaning > 0), "rating": rating}


def cell(sections: list[dict], title: str, row: str, column: str) -> dict:
    section = next(s for s in sections if s["title"] == title)
    return next(dict(zip(section["columns"], line, strict=True)) for line in section["rows"] if line[0] == row)[column]


class World(NamedTuple):
    prompts: int
    rng: np.random.Generator
    judged: list[dict]
    votes: list[dict]
    marks: list[dict]


def of_judges(world: World) -> dict[str, dict]:
    """Cells of what a report says of models and of judges."""
    judged = world.judged
    merged, by_judge = tables.merge_orders(judged)[0], held_against_people(world)
    screen = trial.screen_section(by_judge, "people")
    found = [tables.win_rate_section(merged, "base", "judge", ""), *tables.ratings_sections(merged, "judge"),
             *tables.score_sections(world.marks, "judge"), trial.position_section({"as configured": judged}, "judge"),
             screen | {"columns": ["row", *screen["columns"][1:]]}, trial.agreement_section(by_judge, "people"),
             trial.category_agreement_section(by_judge, "people")]
    return {
        "win rate": cell(found, "judge: wins against base", "dpo", "win rate, %"),
        "win rate at equal length, lc2": cell(found, "judge: wins against base", "dpo", "lc2, %"),
        "Bradley-Terry": cell(found, "judge: ratings", "dpo", "Bradley-Terry"),
        "Elo": cell(found, "judge: ratings", "dpo", "Elo"),
        "mean score": cell(found, "judge: scores", "dpo", "mean"),
        "first slot": cell(found, "judge: position", "as configured", "first slot, %"),
        "the same in both orders": cell(found, "judge: position", "as configured", "consistent, %"),
        "wins of the longer reply": cell(found, "The judges on trial", [*trial.TASTES][0], "judge"),
        "judge right": cell(found, "The judges on trial", "right, %", "judge"),
        "agreement with people": cell(found, "Agreement with people", "judge", "agrees, %"),
        "correlation with people in a category": cell(found, "Agreement with people by category", "chat",
                                                      "judge: Spearman"),
        "wins of a probe": trial.wins_cell([r for r in judged if (r["a"], r["b"]) == ("base", "dpo")])}


def held_against_people(world: World) -> dict[str, list[dict]]:
    return {"judge": world.judged, "people": tables.majority(world.votes, "people")}


def of_people(world: World) -> dict[str, dict]:
    """Cells of what a report says of the models by people's votes."""
    found = [people.votes_section(world.votes, "people"), people.agreement_section(world.votes, "people")]
    first, at = found[1], ("people: votes", "base against dpo")
    return {
        "majority of people": cell(found, *at, "majority for the first, %"),
        "mean rating of people": cell(found, *at, "mean rating"),
        "agreement among people": dict(zip(first["columns"], first["rows"][0], strict=True))["agree, %"]}


def of_rated_elo(world: World) -> dict[str, dict]:
    found = people.likert_sections("people", world.votes)
    return {f"Elo from ratings, {ties}": cell(found, f"people: Elo, {ties}", "dpo", "Elo")
            for ties in ("no ties", "ties allowed")}


def of_raters(world: World) -> dict[str, dict]:
    """Cells of what is said of one rater, and of a judge's own taste beside people's."""
    labels, taught = raters.collect_labels(people.label_rows(world.votes)), {"base": "x", "sft": "x", "dpo": "y"}
    found = [raters.rater_section(labels), trial.self_preference_section(held_against_people(world), taught, "people")]
    return {"a rater's wins of the first slot": cell(found, "Raters", "person 0", "shown first"),
            "a rater's wins of the longer reply": cell(found, "Raters", "person 0", "longer"),
            "a rater with the others": raters.vendor_table(labels, rounds=100)["person 0"]["others"],
            "self-preference": cell(found, "Self-preference", "y", "judge above people")}


def difference(world: World) -> dict[str, dict]:
    """As --compare pairs two runs: here the judge and the first person, on one pair of models."""
    one, two = ([r for r in rows if (r["a"], r["b"]) == ("base", "dpo") and r["judge"] == name and r["a_first"] in seen]
                for rows, name, seen in ((world.judged, "judge", (True,)), (world.votes, "person 0", (True, False))))
    found = paired_difference(*(tables.preferences(rows) for rows in (one, two)), [r["prompt"] for r in one])
    return {"difference of two runs": tables.bounded(found["difference"], found["low"], found["high"])}


def alone(world: World) -> dict[str, dict]:
    """What needs no comparison: gold scores, multiple choice, reward models, safety."""
    n, rng = world.prompts, world.rng

    def graded(mean: float, count: int) -> list[list[dict]]:
        return [[{"text": "x", "finished": True, "gold": float(np.clip(rng.normal(mean, 0.4), 0, 1))}]
                for _ in range(count)]

    def score(seeds: dict[int, list]) -> dict:
        summary = gold.summarize(seeds, [{"category": "x"}] * n, seeds)
        return gold.sections({"m": summary}, "m", len(seeds))[0]["rows"][0][1]

    right = (rng.random(n) < 0.7).astype(float)
    exam = {"acc": right.mean(), "acc_stderr": right.std(ddof=1) / np.sqrt(n), "n": n}
    easy = np.clip(rng.normal(0.7, 0.2, n), 0, 1)  # how often the chosen of a prompt's four pairs wins
    hits = [bool(rng.random() < p) for p in easy for _ in range(4)]
    sets = [rewards.accuracy([bool(rng.random() < 0.7) for _ in range(n)], list(map(str, range(n)))) for _ in range(4)]
    attacks = {"m": {"unsafe": int((rng.random(n) < 0.1).sum()), "n": n, "unjudged": 0, "untried": 0, "by": "x"}}
    return {"gold score, over dialogues": score({0: graded(0.7, n)}),
            "gold score, over five seeds": score({s: graded(rng.normal(0.7, 0.03), n) for s in range(5)}),
            "multiple choice": choices.cell(exam, "acc"),
            "reward model, four pairs a prompt": tables.share_cell(rewards.accuracy(
                hits, [str(i) for i in range(n) for _ in range(4)])),
            "reward model, mean of four sets": tables.share_cell(rewards.weighted_mean([(1, found) for found in sets])),
            "safety, one in ten": safety.safety_section(attacks)["rows"][0][2]}


def printed(prompts: int, number: int) -> dict[str, dict]:
    """The cells with intervals of a report on one world."""
    rng = np.random.default_rng([prompts, number])
    world, parts = World(prompts, rng, *games(rng, prompts)), (of_judges, of_people, of_rated_elo, alone, difference,
                                                              of_raters)
    return {name: found for part in parts for name, found in part(world).items()}


def coverage() -> list[dict]:
    """A row for each interval."""
    worlds, rows = {n: [printed(n, k) for k in range(WORLDS)] for n in PROMPTS}, []
    for name in worlds[PROMPTS[0]][0]:
        row, mean = {"interval": name}, {n: np.mean([cells[name]["value"] for cells in worlds[n]]) for n in worlds}
        for n in PROMPTS:
            cells, truth = [cells[name] for cells in worlds[n]], mean[n if name in ORDER_DEPENDS else max(worlds)]
            row |= {f"coverage_{n}": float(np.mean([c["low"] <= truth <= c["high"] for c in cells])),
                    f"width_{n}": float(np.mean([c["high"] - c["low"] for c in cells])), "truth": float(truth)}
        rows.append(row)
    return rows


def test_every_interval_that_was_measured_is_printed_and_holds_its_own_value():
    names = {row["interval"] for row in json.loads(RESULT.read_text())["intervals"]}
    cells = printed(PROMPTS[0], 0)
    assert cells.keys() == names
    for name, cell in cells.items():
        assert cell["low"] < cell["high"] and cell["low"] <= cell["value"] <= cell["high"], name


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95 % of 400 worlds, give or take three standard errors and Wilson's steps."""
    if WRITE:
        RESULT.write_text(json.dumps({"command": "WRITE=1 python -m pytest tests/test_coverage.py", "worlds": WORLDS,
                                      "prompts": PROMPTS, "intervals": coverage()}, indent=1) + "\n")
    for row in json.loads(RESULT.read_text())["intervals"]:
        assert all(0.915 <= row[f"coverage_{n}"] <= 0.985 for n in PROMPTS), row
