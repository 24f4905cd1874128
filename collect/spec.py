"""Specify before buying, measure before training: task and length tables, targets, comparisons, subsets, and a report on raters.

    python -m collect.spec FILE                               what a data set holds: tasks, lengths, and agreement if it has raters
    python -m collect.spec FILE --target instructgpt          the same beside a target: surge, instructgpt or preference
    python -m collect.spec FILE --compare OTHER --unit bytes  beside another set; lengths in words (default), bytes, or a tokenizer's tokens
    python -m collect.spec FILE --target surge --figure f.png histogram of lengths, bars of task shares
    python -m collect.spec FILE --target surge --subset 1000 --out sub.jsonl    draw records in the target's task mix

Targets are those of the talk "Recipe for Training Helpful Chatbots": the use cases of InstructGPT (Ouyang et al. 2022,
arXiv:2203.02155), what was ordered from Surge after their model, and the mix of the preference collection.
"""
from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from collect.raters import collect_labels, label_rows, rater_sections, task_of
from data.formats import read
from data.tokenizer import load_tokenizer
from judging.report import text as report_text
from runtime import arguments, fail, write_text, writing

# ----------------------------------------------------------------------------------------- targets

# Shares in per cent (they add to 99.9); what InstructGPT calls "other" was ordered as coding.
INSTRUCTGPT = {"generation": 45.6, "open_qa": 12.4, "brainstorm": 11.2, "chat": 8.4, "rewrite": 6.6, "summarize": 4.2, "coding": 3.5,
               "classify": 3.5, "closed_qa": 2.6, "extract": 1.9}
SURGE = {"generation": 4346, "open_qa": 1182, "brainstorm": 1060, "chat": 796, "rewrite": 625, "summarize": 395, "coding": 334,
         "classify": 334, "closed_qa": 245, "extract": 183}                      # prompts
SURGE_MEAN_LENGTHS = {"generation": 208.5, "open_qa": 84.6, "brainstorm": 248.4, "chat": 123.2, "rewrite": 449.1, "summarize": 296.1,
                      "coding": 235.2, "classify": 147.2, "closed_qa": 229.9, "extract": 293.2}  # of prompts
PREFERENCE = {"generation": .15, "rewrite": .15, "coding": .15, "brainstorm": .1, "summarize": .1, "classify": .1, "extract": .1,
              "open_qa": .05, "math": .05, "closed_qa": .05}
TARGETS = {"instructgpt": INSTRUCTGPT, "surge": SURGE, "preference": PREFERENCE}

COLUMNS = ("count", "mean", "std", "min", "25%", "50%", "75%", "max")
QUANTILES = COLUMNS[3:]
# Prompt lengths as the slides print them: InstructGPT's sets, and three vendors' pilots. The cut at 2048 says tokens.
SLIDES = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in {
    "instructgpt_train": (12725, 408, 433, 1, 37, 283, 632, 2048), "instructgpt_valid": (1653, 401, 433, 4, 41, 234, 631, 2048),
    "reward_train": (33207, 199, 334, 1, 20, 64, 203, 2032), "reward_valid": (17887, 209, 327, 1, 26, 77, 229, 2039),
    "ppo_train": (31144, 166, 278, 2, 19, 62, 179, 2044), "ppo_valid": (16185, 186, 292, 1, 24, 71, 213, 2039),
    "test": (3196, 115, 194, 1, 17, 49, 127, 1836), "surge_pilot": (75, 104, 94, 7, 38, 81, 135, 505),
    "sagemaker_pilot": (129, 54, 46, 0, 8, 13, 31, 1036), "scale_pilot": (69, 22, 16, 5, 13, 18, 24, 116)}.items()}
TARGET_LENGTHS = {"instructgpt": SLIDES["instructgpt_train"]}

# ------------------------------------------------------------------------------------------ tables

def length_table(lengths: Iterable[float]) -> dict[str, float]:
    """count, mean, std over n - 1, min, quartiles between order statistics, max: what pandas' describe prints; and how many are zero.

    NaN is a record without the field and does not count; std of a single length is NaN.
    """
    x = np.array(list(lengths), dtype=float)
    x = x[~np.isnan(x)]
    if not len(x):
        return dict.fromkeys(COLUMNS, math.nan) | {"count": 0, "zero": 0}
    std = x.std(ddof=1) if len(x) > 1 else math.nan
    values = [len(x), x.mean(), std, *np.quantile(x, [0, .25, .5, .75, 1])]
    return {k: int(v) if k == "count" else float(v) for k, v in zip(COLUMNS, values, strict=True)} | {"zero": int((x == 0).sum())}


def task_table(tasks: Sequence[str], lengths: Iterable[float] | None = None) -> dict[str, dict[str, float]]:
    """Count, share and mean length of every task, the largest first. NaN is no length."""
    tasks = list(tasks)
    lengths, names = np.array(list(lengths) if lengths is not None else [math.nan] * len(tasks), dtype=float), np.array(tasks)
    if len(lengths) != len(tasks):
        raise ValueError(f"{len(lengths)} lengths for {len(tasks)} tasks")
    table = {}
    for task, count in sorted(Counter(tasks).items(), key=lambda item: (-item[1], item[0])):
        mine = lengths[names == task]
        mean = float(np.nanmean(mine)) if not np.isnan(mine).all() else math.nan
        table[task] = {"count": count, "share": count / len(tasks), "mean": mean}
    return table


FIELDS = ("prompt", "answer", "dialogue")


def field_messages(record: Mapping, field: str) -> list[dict] | None:
    """The prompt (all before the last reply), the answer (the chosen or best ranked one), or both; None where there is none."""
    if "chosen" in record:
        prompt, answer = record["prompt"], record["chosen"]
    elif "ranks" in record:
        prompt, answer = record["prompt"], record["answers"][record["ranks"].index(min(record["ranks"]))]
    elif "messages" in record:
        prompt, answer = record["messages"][:-1], record["messages"][-1]["content"]
    elif "prompt" in record:
        prompt, answer = record["prompt"], None
    else:
        return [{"role": "user", "content": record["text"]}] if field == "dialogue" else None
    reply = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "answer": reply or None, "dialogue": prompt + reply}[field]


UNITS: dict[str, Callable[[str], int]] = {"words": lambda text: len(text.split()), "bytes": lambda text: len(text.encode())}


def measure(records: Iterable[Mapping], field: str, unit: str) -> np.ndarray:
    """Length of a field of each record [n], turns added up, NaN where a record lacks it; in words, bytes or a directory's tokens.

    A dialogue in tokens is what a model reads: with the tags of the tokenizer's chat template if it has one.
    """
    tokenizer = None if unit in UNITS else load_tokenizer(unit)
    size = UNITS[unit] if tokenizer is None else lambda text: len(tokenizer.encode(text))

    def length(messages: list[dict] | None) -> float:
        if messages is None:
            return math.nan
        if tokenizer is not None and tokenizer.template and field == "dialogue":
            return len(tokenizer.render(messages)[0])
        return sum(size(m["content"]) for m in messages)

    return np.array([length(field_messages(record, field)) for record in records])


def implausible(table: Mapping[str, float], rounding: float = 0.5) -> list[str]:
    """Why no set of lengths can have this table of eight numbers, each printed to within `rounding`; empty if one can.

    Quantiles must be ordered. They also box in every order statistic, x_i in [l_i, h_i], and the boxes bound the mean,
    sum l / n <= mean <= sum h / n; given the mean, the standard deviation is least where all x_i lie as close to one level c as
    their boxes let them, x_i = clip(c, l_i, h_i), and greatest where the upper boxes are filled first. The textbook's
    bound, std >= |max - mean| sqrt(n) / (n - 1), is the special case without quartiles.
    """
    n, quantiles = int(table["count"]), [table[q] for q in QUANTILES]
    if n < 1 or quantiles != sorted(quantiles) or quantiles[0] < 0:
        return [f"count {n}, quantiles {quantiles}: expected at least one record, and ordered lengths from 0"]
    place, i = (n - 1) * np.array([0, .25, .5, .75, 1]), np.arange(n)
    low = np.max([np.where(i >= np.ceil(p), q - rounding, -math.inf) for p, q in zip(place, quantiles, strict=True)], axis=0)
    high = np.min([np.where(i <= np.floor(p), q + rounding, math.inf) for p, q in zip(place, quantiles, strict=True)], axis=0)
    mean, std = table["mean"], table["std"]
    if not low.mean() - rounding <= mean <= high.mean() + rounding:
        return [f"mean {mean:g}: the quantiles allow {low.mean():.1f} to {high.mean():.1f}"]
    if n == 1:
        return [] if math.isnan(std) else [f"std {std:g}: one record has none"]

    def level(excess: Callable[[float], float]) -> float:
        """Where a falling function of the level crosses zero."""
        a, b = low[0], high[-1]
        for _ in range(60):
            c = (a + b) / 2
            a, b = (c, b) if excess(c) > 0 else (a, c)
        return c

    flattest = level(lambda c: np.clip(c, low, high).mean() - c)  # the least deviation any mean allows
    between = [level(lambda c, m=m: m - np.clip(c, low, high).mean()) for m in (mean - rounding, mean + rounding)]
    least = np.clip(np.clip(flattest, *between), low, high).std(ddof=1)
    spare, room = max(0, n * (mean + rounding) - low.sum()), np.cumsum((high - low)[::-1])
    filled = int(np.searchsorted(room, spare))
    x = np.concatenate([low[:n - filled], high[n - filled:]])
    if filled < n:
        x[n - filled - 1] += spare - (room[filled - 1] if filled else 0)
    greatest = math.sqrt(max(0, x @ x - n * max(0, mean - rounding) ** 2) / (n - 1))
    if not least - rounding <= std <= greatest + rounding:
        return [f"std {std:g}: quantiles and mean allow {least:.1f} to {greatest:.1f}"]
    return []


# ------------------------------------------------------------------------------------- comparisons

def chi_square_tail(x: float, dof: int) -> float:
    """P(chi-square > x) for whole degrees of freedom: Q(a + 1, y) = Q(a, y) + y^a e^-y / Gamma(a + 1), y = x / 2 (DLMF 8.8.6)."""
    if x <= 0 or dof < 1 or x == math.inf:
        return 0.0 if x == math.inf else 1.0
    y = x / 2
    a, tail = (0.5, math.erfc(math.sqrt(y))) if dof % 2 else (1, math.exp(-y))
    while a < dof / 2:
        tail += math.exp(a * math.log(y) - y - math.lgamma(a + 1))
        a += 1
    return min(1.0, tail)


def compare_tasks(counts: Mapping[str, float], target: Mapping[str, float], target_is_sample: bool = False) -> dict:
    """How far a set's tasks are from a target's: the largest difference of shares, total variation, Pearson's chi-square.

    A target is a specification, so its shares are exact (goodness of fit), and a task that it lacks makes chi-square infinite;
    with `target_is_sample` it is another set's counts (homogeneity). p is rough where the least expected count is under 5.
    """
    tasks = [t for t in {**target, **counts} if target.get(t, 0) > 0 or counts.get(t, 0) > 0]
    a, b = (np.array([x.get(t, 0) for t in tasks], dtype=float) for x in (counts, target))
    if not a.sum() or not b.sum():
        raise ValueError(f"counts add to {a.sum():g}, the target to {b.sum():g}: expected both positive")
    gap = a / a.sum() - b / b.sum()
    if target_is_sample:
        observed = np.stack([a, b])
        expected = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / observed.sum()
    else:
        observed, expected = a, a.sum() * b / b.sum()
    with np.errstate(divide="ignore"):
        chi_square = float(((observed - expected) ** 2 / expected).sum())
    worst, dof = int(np.argmax(np.abs(gap))), len(tasks) - 1
    return {"task": tasks[worst], "largest": float(gap[worst]), "total_variation": float(np.abs(gap).sum() / 2), "chi_square": chi_square,
            "dof": dof, "p": chi_square_tail(chi_square, dof), "least_expected": float(expected.min())}


def ks_distance(a, b) -> float:
    """Kolmogorov-Smirnov distance of two sets of lengths, max |F_a - F_b|; for a table in place of a set, the least it can be.

    A table knows F at its five quantiles alone (up to 1 / n and its rounding), so the true distance may be larger.
    """
    def steps(x):  # values v, with F(v-) at most `below` and F(v) at least `upto`: equalities for a set
        if isinstance(x, Mapping):
            share = np.array([0, .25, .5, .75, 1])
            return np.array([x[q] for q in QUANTILES], dtype=float), share, share
        values, counts = np.unique(np.asarray(x, dtype=float), return_counts=True)
        upto = np.cumsum(counts) / counts.sum()
        return values, upto - counts / counts.sum(), upto

    def excess(x, y) -> float:
        (v, _, upto), (w, below, _) = steps(x), steps(y)
        most = np.append(below, 1)[np.searchsorted(w, v, side="right")]  # F_y(v) is at most F just below y's next value
        return float((upto - most).max())

    return max(0.0, excess(a, b), excess(b, a))


def kolmogorov_tail(x: float) -> float:
    """P(K > x) = 2 sum_k (-1)^(k - 1) e^(-2 k^2 x^2), the limit of sqrt(n m / (n + m)) D (Kolmogorov 1933); 1 below 0.2, to 12 places."""
    return 1.0 if x < 0.2 else min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))))


def compare_lengths(a, b) -> dict:
    """Kolmogorov-Smirnov distance of two sets or tables, its p with Stephens' correction for size (1970), and whether it is exact.

    Lengths are whole numbers and tie, so p errs on the large side; where a table is involved, the distance is a lower and
    p an upper bound.
    """
    a, b = (x if isinstance(x, Mapping) else np.array([v for v in x if not math.isnan(v)], dtype=float) for x in (a, b))
    n, m = (x["count"] if isinstance(x, Mapping) else len(x) for x in (a, b))
    if not n or not m:
        raise ValueError(f"{n} and {m} lengths: expected some on both sides")
    distance, root = ks_distance(a, b), math.sqrt(n * m / (n + m))
    return {"ks": distance, "p": kolmogorov_tail((root + 0.12 + 0.11 / root) * distance),
            "exact": not isinstance(a, Mapping) and not isinstance(b, Mapping)}


# ----------------------------------------------------------------------------------------- subsets

def largest_remainder(shares: Mapping[str, float], size: int) -> dict[str, int]:
    """Whole counts that add to `size`, each its share rounded down, and one more for the largest fractions cut off."""
    total = sum(shares.values())
    exact = {name: size * share / total for name, share in shares.items()}
    counts = {name: math.floor(x) for name, x in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:size - sum(counts.values())]:
        counts[name] += 1
    return counts


def subset(labels: Sequence[str], shares: Mapping[str, float], size: int, seed: int = 0) -> list[int]:
    """Which records make a set of exactly `size` with these shares of labels (tasks, or quarters of length), in their order.

    One seed takes from one shuffle, so that a smaller subset lies in a larger one, up to a record of rounding.
    """
    counts, have = largest_remainder(shares, size), Counter(labels)
    for name, wanted in counts.items():
        if have[name] < wanted:
            most = min(int(have[n] * sum(shares.values()) / share) for n, share in shares.items() if share > 0)
            remedy = f"ask for at most {most}" if most else "add some"
            fail(f"subset of {size}: '{name}' has {have[name]} records, {wanted} are wanted: {remedy}, or choose other shares")
    order = list(range(len(labels)))
    random.Random(f"subset {seed}").shuffle(order)
    chosen = []
    for i in order:
        if counts.get(labels[i], 0) > 0:
            counts[labels[i]] -= 1
            chosen.append(i)
    return sorted(chosen)


QUARTERS = dict.fromkeys(("shortest", "shorter", "longer", "longest"), 0.25)


def quarters(lengths: Sequence[float], table: Mapping[str, float]) -> list[str]:
    """Which quarter of a table's distribution each length falls in, "outside" if in none: labels for `subset(..., QUARTERS, ...)`."""
    edges = [table[q] for q in QUANTILES]
    return ["outside" if not edges[0] <= x <= edges[4] else list(QUARTERS)[sum(x > e for e in edges[1:4])] for x in lengths]


# ---------------------------------------------------------------------------------------- sections

def length_section(sets: Mapping[str, Sequence[float] | Mapping[str, float]], unit: str) -> dict:
    """A row for every set of lengths, or table of eight numbers."""
    tables = {name: x if isinstance(x, Mapping) else length_table(x) for name, x in sets.items()}
    rows = [[name, *(None if math.isnan(x[c]) else x[c] for c in COLUMNS), x.get("zero")] for name, x in tables.items() if x["count"]]
    printed = [(name, x) for name, x in sets.items() if isinstance(x, Mapping)]
    faults = [f"{name} is impossible as printed: {fault}." for name, x in printed for fault in implausible(x)]
    return {"title": f"Length, {unit}", "columns": ["", *COLUMNS, "of them 0"], "rows": rows, "text": " ".join(faults)}


def task_section(table: Mapping[str, Mapping[str, float]], others: Mapping[str, Mapping[str, float]], unit: str,
                 means: Mapping[str, float] | None = None) -> dict:
    """Count, share and mean prompt length of every task; shares (and mean lengths) of what it is compared with."""
    totals = {name: sum(x.values()) for name, x in others.items()}
    columns = ["task", "count", "share, %", *(f"{name}, %" for name in others), f"mean prompt, {unit}", *(["target mean"] if means else [])]
    rows = []
    for task in [*table, *dict.fromkeys(t for x in others.values() for t in x if t not in table)]:
        x = table.get(task, {"count": 0, "share": 0.0, "mean": math.nan})
        rows.append([task, x["count"], 100 * x["share"], *(100 * other.get(task, 0) / totals[name] for name, other in others.items()),
                     None if math.isnan(x["mean"]) else x["mean"], *([means.get(task)] if means else [])])
    return {"title": "Tasks", "columns": columns, "rows": rows}


def comparison_section(tasks: Mapping[str, Mapping], lengths: Mapping[str, Mapping]) -> dict:
    """What compare_tasks and compare_lengths found, a row for each thing compared with."""
    rows = []
    for name in dict.fromkeys([*tasks, *lengths]):
        row = [name]
        if name in tasks:
            x = tasks[name]
            chi_square = x["chi_square"] if math.isfinite(x["chi_square"]) else "infinite"
            row += [100 * x["largest"], x["task"], 100 * x["total_variation"], chi_square, x["dof"], f"{x['p']:.2g}"]
        row += [None] * (7 - len(row))
        if name in lengths:
            y = lengths[name]
            row += [f"{y['ks']:.3f}", f"{y['p']:.2g}"] if y["exact"] else [f">= {y['ks']:.3f}", f"<= {y['p']:.2g}"]
        rows.append(row + [None] * (9 - len(row)))
    rough = [name for name, x in tasks.items() if x["least_expected"] < 5]
    return {"title": "Distance", "columns": ["from", "tasks: largest gap, points", "at", "total variation, %", "chi-square", "df", "p",
                                             "lengths: Kolmogorov-Smirnov", "p of it"], "rows": rows,
            "text": f"A task is expected fewer than 5 times, chi-square's p is rough: {', '.join(rough)}." if rough else ""}


def draw(lengths: Mapping[str, np.ndarray], target: Mapping[str, float] | None, shares: Mapping[str, Mapping[str, float]], unit: str,
         file: Path) -> None:
    """Histograms of prompt lengths, a target's quartiles as lines; if tasks are named, a bar for their share in every set and target."""
    import matplotlib  # here: it takes a second to import, and only this needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 1 + bool(shares), figsize=(7 + 6 * bool(shares), 4.8), layout="constrained", squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    colors = ("#4c72b0", "#dd8452", "#55a868")
    longest = max([2, *(x.max() for x in lengths.values()), *([target["max"]] if target else [])])
    edges = np.unique(np.round(np.geomspace(1, longest + 1, 36)))  # whole numbers: a bin between two would look like a gap
    for color, (name, x) in zip(colors, lengths.items(), strict=False):
        share = 100 * np.histogram(x, edges)[0] / len(x) / np.diff(np.log2(edges))
        zero = f", {int((x == 0).sum())} of length 0 not shown" if (x == 0).any() else ""
        left.stairs(share, edges, fill=True, color=color, alpha=0.6, label=f"{name}, {len(x)} prompts{zero}")
    for q in ("25%", "50%", "75%") if target else ():
        left.axvline(target[q], color="black", linestyle="--", linewidth=1, label="quartiles of the target, tokens" if q == "25%" else None)
    left.set(xscale="log", xlabel=f"prompt length, {unit}", ylabel="prompts, % per doubling of length")
    left.xaxis.set_major_formatter("{x:g}")
    left.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    tasks = list(dict.fromkeys(t for x in shares.values() for t in x))
    for i, (color, (name, x)) in enumerate(zip(colors, shares.items(), strict=False)):
        height, percent = 0.8 / len(shares), [100 * x.get(t, 0) / sum(x.values()) for t in tasks]
        right.barh(np.arange(len(tasks)) + i * height, percent, height, color=color, label=name)
    if shares:
        middle = np.arange(len(tasks)) + 0.4 - 0.4 / len(shares)
        right.set(yticks=middle, yticklabels=[t.replace("_", " ") for t in tasks], xlabel="share, %")
        right.invert_yaxis()
        right.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    with writing(file):
        figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m collect.spec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--compare", metavar="OTHER", help="another data file")
    parser.add_argument("--unit", default="words", help="words, bytes, or a directory that holds a tokenizer")
    parser.add_argument("--figure", metavar="PNG")
    parser.add_argument("--subset", type=int, metavar="SIZE", help="draw so many records in the target's mix")
    parser.add_argument("--by", choices=("tasks", "lengths"), default="tasks", help="of tasks, or of prompt lengths by its quartiles")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--out", help="write the subset here")
    words = arguments(parser, argv)
    target, row = TARGETS.get(words.target), TARGET_LENGTHS.get(words.target)
    if words.unit not in UNITS and not Path(words.unit).is_dir():
        fail(f"--unit {words.unit}: no such directory, expected words, bytes, or a directory that holds a tokenizer")
    if (words.subset is None) != (words.out is None) or words.subset is not None and (not target or words.subset < 1):
        fail("--subset, --out and --target go together, expected e.g. --target surge --subset 1000 --out subset.jsonl")
    if words.by == "lengths" and not row:
        fail(f"--by lengths: target {words.target} has no table of lengths, expected --target {' or '.join(TARGET_LENGTHS)}")

    unit = words.unit if words.unit in UNITS else f"tokens of {words.unit}"
    about = {"lengths": f"{unit}, turns added up; prompt: all before the last reply; answer: that reply, the chosen or best one"}
    sets = {}
    for name in (words.file, words.compare):
        if name:
            records, report = read(name)
            sets[name] = list(records)
            if not sets[name]:
                fail(f"{name}: is empty, expected one JSON record a line" if not report.read else
                     f"{name}: none of its {report.read} records can be used: run python -m data.formats {name} to see why")
            about[name] = f"{len(sets[name])} records ({report.native}), {len(report.rejects)} rejected"
    short = {name: "/".join(Path(name).parts[-2:]) for name in sets}
    short = short if len(set(short.values())) == len(sets) else {name: name for name in sets}
    lengths = {name: {field: measure(records, field, words.unit) for field in FIELDS} for name, records in sets.items()}
    prompts = {name: x["prompt"][~np.isnan(x["prompt"])] for name, x in lengths.items()}
    tasks = {name: [task_of(record) for record in records] for name, records in sets.items()}
    tables = {name: task_table(tasks[name], lengths[name]["prompt"]) for name in sets}
    mine, *rest = ({task: x["count"] for task, x in table.items()} for table in tables.values())
    others = ({words.target: target} if target else {}) | ({short[words.compare]: rest[0]} if rest else {})
    named = {name: x for name, x in others.items() if set(mine) != {"none"} and set(x) != {"none"}}

    rows = {f"{short[name]}, {field}": x for name, fields in lengths.items() for field, x in fields.items()}
    sections = [length_section(rows | ({f"{words.target}, prompt, in tokens": row} if row else {}), unit),
                task_section(tables[words.file], named, unit, SURGE_MEAN_LENGTHS if target is SURGE else None)]
    if others:
        compared = ({words.target: row} if row else {}) | ({short[words.compare]: prompts[words.compare]} if rest else {})
        sections.append(comparison_section(
            {name: compare_tasks(mine, x, target_is_sample=name != words.target) for name, x in named.items()},
            {name: compare_lengths(prompts[words.file], x) for name, x in compared.items() if len(prompts[words.file]) and len(x)}))
    labels = collect_labels(label_rows(sets[words.file]))
    if ((~np.isnan(labels.strength)).sum(axis=0) > 1).any():
        sections += rater_sections(labels)
    print(report_text({"title": "Specification", "about": about, "sections": sections}))
    if words.figure:
        shown = {short[name]: x for name, x in prompts.items() if len(x)}
        draw(shown, row, {} if set(mine) == {"none"} else {short[words.file]: mine} | named, unit, Path(words.figure))
        print(f"wrote {words.figure}")
    if words.out:
        kinds, shares = (tasks[words.file], target) if words.by == "tasks" else (quarters(lengths[words.file]["prompt"], row), QUARTERS)
        chosen = subset(kinds, shares, words.subset, words.seed)
        write_text(Path(words.out), "".join(json.dumps(sets[words.file][i]) + "\n" for i in chosen))
        print(f"wrote {len(chosen)} of {len(kinds)} records to {words.out}")


if __name__ == "__main__":
    main()
