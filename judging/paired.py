"""Which of two ways to train is better: the mean difference of their scores, with an interval over seeds and dialogues.

d[s, i] is the score of B less that of A, both trained with seed s, on dialogue i. Other seeds and other dialogues would
have given other numbers, so both are random effects, crossed (every seed's models reply to every dialogue):

    d[s, i] = mean + seed[s] + dialogue[i] + rest[s, i]

Mean squares of seeds (S-1 degrees of freedom), dialogues (I-1) and rest estimate the two parts of the mean's variance

    v_seeds     = MS_seeds / (S I)                          one number for each seed is all it needs
    v_dialogues = max(0, MS_dialogues - MS_rest) / (S I)    what the same dialogues add, whatever the seed

and the interval is  mean ± sqrt(t(S-1)^2 v_seeds + t(I-1)^2 v_dialogues),  t the 97.5 % quantile of Student's t: each
part keeps its own quantile, which covers at least 95 % for two independent chi-squares in any ratio (Banerjee 1960,
Sankhya 22, 357-358). v_dialogues, a difference, is nearly one. Simulated with three seeds and 60 dialogues, the seeds'
standard deviation half of the rest's (tests/test_compare.py), the interval covers 96 %. There one t for the sum, with
Satterthwaite's (1946) degrees of freedom, covers 92 %: a v_seeds that came out small by chance claims many degrees.
Resampling the seeds and the dialogues (a two-level bootstrap) covers 83 %: three numbers resampled vary by 2/3 of what
they should. An interval over dialogues alone covers 63 %.
"""
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from judging.ratings import t975
from judging.tables import bounded, dots

Z_POWER = 0.8416  # normal quantile of a power of 80 %
Scores = Mapping[int, Mapping[str, float]]  # by seed and dialogue


class Estimate(NamedTuple):
    mean: float
    half: float            # half-width of the 95 % interval over seeds and dialogues; NaN where seeds give none
    dialogues_half: float  # the same over dialogues alone: the seeds as they are
    v_seeds: float         # parts of the mean's variance
    v_dialogues: float
    seeds: int
    dialogues: int
    by_seed: list[dict]    # cells with intervals over dialogues

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    @property
    def cell(self) -> dict | float:
        """The mean with its interval, alone where seeds give none."""
        return self.mean if math.isnan(self.half) else bounded(self.mean, self.mean - self.half, self.mean + self.half)


def matrix(scores: Scores, name: str = "A") -> np.ndarray:
    """Scores as [seeds, dialogues]; ValueError where a dialogue has no finite score, or there is but one."""
    for seed, of in scores.items():
        if wrong := [i for i in sorted(of) if not math.isfinite(of[i])]:
            raise ValueError(f"{name}, seed {seed}: the score of dialogue {wrong[0]} is {of[wrong[0]]}, "
                             "expected a number (a turn without a reply has none)")
        if len(of) < 2:
            raise ValueError(f"{name}: {len(of)} dialogues have a score, at least 2 are needed")
    return np.array([[of[i] for i in sorted(of)] for _, of in sorted(scores.items())])


def estimate(d: np.ndarray) -> Estimate:
    """The mean of d [seeds, dialogues] (differences, or one model's scores) and its intervals.

    One seed, or seeds that all gave the same, leave the seeds' part unknown: `half` is NaN.
    """
    seeds, dialogues = d.shape
    mean, rows, columns = d.mean(), d.mean(axis=1), d.mean(axis=0)
    t = t975(dialogues - 1)
    over_dialogues = t * d.std(axis=1, ddof=1) / math.sqrt(dialogues)
    by_seed = [bounded(float(m), float(m - h), float(m + h)) for m, h in zip(rows, over_dialogues, strict=True)]
    dialogues_half = t * columns.std(ddof=1) / math.sqrt(dialogues)
    if seeds == 1 or (d == d[0]).all():
        return Estimate(float(mean), math.nan, float(dialogues_half), math.nan, math.nan, seeds, dialogues, by_seed)
    v_seeds = rows.var(ddof=1) / seeds
    rest = d - rows[:, None] - columns + mean
    ms_rest = (rest**2).sum() / ((seeds - 1) * (dialogues - 1))
    v_dialogues = max(0.0, columns.var(ddof=1) - ms_rest / seeds) / dialogues
    half = math.sqrt(t975(seeds - 1) ** 2 * v_seeds + t**2 * v_dialogues)
    return Estimate(float(mean), half, float(dialogues_half), float(v_seeds), float(v_dialogues), seeds, dialogues,
                      by_seed)


def seeds_needed(found: Estimate, most: int = 1000) -> int | None:
    """How many seeds would show a difference of this size, with these variances, in 80 % of comparisons.

    None where no number up to `most` does: then the dialogues are too few.
    """
    if math.isnan(found.half):
        return None
    for seeds in range(2, most + 1):
        v_seeds = found.v_seeds * found.seeds / seeds
        half = math.sqrt(t975(seeds - 1) ** 2 * v_seeds + t975(found.dialogues - 1) ** 2 * found.v_dialogues)
        if abs(found.mean) >= half + Z_POWER * math.sqrt(v_seeds + found.v_dialogues):
            return seeds
    return None


# ---------------------------------------------------------------------------------------- in words

def verdict(found: Estimate, unit: str = "points") -> str:
    """Better, worse, or not to be told apart, in a few sentences."""
    if all(cell["low"] == cell["high"] == 0 for cell in found.by_seed) and found.by_seed:
        return "B scores what A scores on every dialogue of every seed: nothing that is judged has changed."
    shown, dialogues = f"{found.mean:+.1f} {unit}", f"{found.dialogues} dialogues"
    if math.isnan(found.half):
        low, high = found.mean - found.dialogues_half, found.mean + found.dialogues_half
        why = "one seed was run" if found.seeds == 1 else "all seeds gave the same, so that they are one run"
        return (f"No verdict: {why}, which gives no interval over training runs. B - A is {shown}; "
                f"[{low:+.1f}, {high:+.1f}] covers other dialogues, but not another run of the same two.")
    low, high = found.mean - found.half, found.mean + found.half
    needed = seeds_needed(found)
    word = "B cannot be told apart from A with what was run" if not found.excludes_zero else (
        "B is better than A" if found.mean > 0 else "B is worse than A")
    said = f"{word}: {shown} [{low:+.1f}, {high:+.1f}], 95 % over {found.seeds} seeds and {dialogues}."
    if found.mean == 0:
        return said
    if needed is None:
        return f"{said} No number of seeds would show a difference of this size on so few dialogues: take more of both."
    return (f"{said} To see a difference of this size in 80 % of comparisons takes about {needed} seeds"
            + (", by this estimate from few." if found.seeds < 5 else "."))


def sections(found: Estimate, a: Scores, b: Scores, unit: str) -> list[dict]:
    """The table and the figure of a comparison."""
    means = [[float(np.mean(list(side[seed].values()))) for side in (a, b)] for seed in sorted(a)]
    names = [f"seed {seed}" for seed in sorted(a)]
    rows = [[name, *pair, cell] for name, pair, cell in zip(names, means, found.by_seed, strict=True)]
    cells = dict(zip(names, found.by_seed, strict=True))
    if isinstance(found.cell, dict):
        cells["all seeds"] = found.cell
    rows.append(["all seeds", *np.mean(means, axis=0).tolist(), found.cell])
    return [{"title": "B - A", "columns": ["", "A", "B", "B - A"], "rows": rows,
             "text": f"{verdict(found, unit)}\nIntervals (95 %) of single seeds cover dialogues alone; that of all "
                     "seeds covers both.",
             "figure": dots(cells, f"B - A, {unit}", reference=0.0)}]
