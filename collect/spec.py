"""Specify before buying, measure before training: task and length tables, targets, comparisons, subsets, raters.

    python -m collect.spec FILE                           tasks, lengths, and agreement if it has raters
    python -m collect.spec FILE --target instructgpt      the same beside a target: surge, instructgpt or preference
    python -m collect.spec FILE --compare OTHER           beside another set
    python -m collect.spec FILE --unit bytes              lengths in words (default), bytes, or a tokenizer's tokens
    python -m collect.spec FILE --target surge --figure f.png      bars of lengths and of task shares
    python -m collect.spec FILE --target surge --subset 1000 --out sub.jsonl    draw records in the target's task mix
    python -m collect.spec --pilots                       the talk's pilots, and which table cannot be true

Targets are those of the talk "Recipe for Training Helpful Chatbots": the use cases of InstructGPT (Ouyang et al. 2022,
arXiv:2203.02155), what was ordered from Surge after their model, and the mix of the preference collection.
"""
import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from collect.raters import collect_labels, label_rows, rater_sections, task_of
from data.formats import read
from data.records import write_lines
from data.tiny.world import SHARES
from data.tokenizer import load_tokenizer
from judging.figures import plot
from judging.report import text as report_text
from runtime import arguments, fail, writing

# ----------------------------------------------------------------------------------------- targets

INSTRUCTGPT, SURGE = SHARES["instructgpt"], SHARES["surge"]  # per cent (adding to 99.9, "other" as coding), prompts
SURGE_MEAN_LENGTHS = {"generation": 208.5, "open_qa": 84.6, "brainstorm": 248.4, "chat": 123.2, "rewrite": 449.1,
                      "summarize": 296.1, "coding": 235.2, "classify": 147.2, "closed_qa": 229.9, "extract": 293.2}
PREFERENCE = {"generation": .15, "rewrite": .15, "coding": .15, "brainstorm": .1, "summarize": .1, "classify": .1,
              "extract": .1, "open_qa": .05, "math": .05, "closed_qa": .05}
TARGETS = {"instructgpt": INSTRUCTGPT, "surge": SURGE, "preference": PREFERENCE}

COLUMNS = ("count", "mean", "std", "min", "25%", "50%", "75%", "max")
QUANTILES = COLUMNS[3:]

# Prompt lengths as the slides print them: InstructGPT's sets, and three vendors' pilots.
SLIDES = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in {
    "instructgpt_train": (12725, 408, 433, 1, 37, 283, 632, 2048),
    "instructgpt_valid": (1653, 401, 433, 4, 41, 234, 631, 2048),
    "reward_train": (33207, 199, 334, 1, 20, 64, 203, 2032), "reward_valid": (17887, 209, 327, 1, 26, 77, 229, 2039),
    "ppo_train": (31144, 166, 278, 2, 19, 62, 179, 2044), "ppo_valid": (16185, 186, 292, 1, 24, 71, 213, 2039),
    "test": (3196, 115, 194, 1, 17, 49, 127, 1836), "surge_pilot": (75, 104, 94, 7, 38, 81, 135, 505),
    "sagemaker_pilot": (129, 54, 46, 0, 8, 13, 31, 1036), "scale_pilot": (69, 22, 16, 5, 13, 18, 24, 116)}.items()}
# Of InstructGPT's training prompts, as its paper prints them. The cut at 2048 says that these are tokens.
TARGET_LENGTHS = {"instructgpt": SLIDES["instructgpt_train"]}

# ------------------------------------------------------------------------------------------ tables

def length_table(lengths: Iterable[float]) -> dict[str, float]:
    """What pandas' describe prints, std over n - 1 and quartiles between order statistics; and how many are zero.

    NaN is a record without the field and does not count; std of a single length is NaN.
    """
    x = np.array(list(lengths), dtype=float)
    x = x[~np.isnan(x)]
    std = x.std(ddof=1) if len(x) > 1 else math.nan
    values = [x.mean(), std, *np.quantile(x, [0, .25, .5, .75, 1])] if len(x) else [math.nan] * len(COLUMNS[1:])
    return {"count": len(x), **dict(zip(COLUMNS[1:], map(float, values), strict=True)), "zero": int((x == 0).sum())}


def task_table(tasks: Sequence[str], lengths: Sequence[float]) -> dict[str, dict[str, float]]:
    """Count, share and mean length of every task, the largest first. NaN is no length."""
    lengths, names, table = np.array(lengths, dtype=float), np.array(tasks), {}
    if len(lengths) != len(tasks):
        raise ValueError(f"{len(lengths)} lengths for {len(tasks)} tasks")
    for task, count in sorted(Counter(tasks).items(), key=lambda item: (-item[1], item[0])):
        mine = lengths[names == task]
        mean = float(np.nanmean(mine)) if not np.isnan(mine).all() else math.nan
        table[task] = {"count": count, "share": count / len(tasks), "mean": mean}
    return table


FIELDS = ("prompt", "answer", "dialogue")


def field_messages(record: Mapping, field: str) -> list[dict] | None:
    """The prompt (all before the last reply), the answer (chosen or best ranked), or both; None where there is none."""
    prompt, answer = record.get("prompt"), record.get("chosen")
    if answer is None and "ranks" in record:
        answer = record["answers"][record["ranks"].index(min(record["ranks"]))]
    elif answer is None and "messages" in record:
        prompt, answer = record["messages"][:-1], record["messages"][-1]["content"]
    elif prompt is None:
        return [{"role": "user", "content": record["text"]}] if field == "dialogue" else None
    reply = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "answer": reply or None, "dialogue": prompt + reply}[field]


UNITS = {"words": str.split, "bytes": str.encode}


def measure(records: Iterable[Mapping], field: str, unit: str) -> np.ndarray:
    """Length of a field of each record [n], turns added up, NaN where a record lacks it.

    In words, bytes or a directory's tokens. A dialogue in tokens is what a model reads: with the tags of the
    tokenizer's chat template if it has one.
    """
    tokenizer = None if unit in UNITS else load_tokenizer(unit)
    parts = tokenizer.encode if tokenizer else UNITS[unit]

    def length(messages: list[dict] | None) -> float:
        if messages is None:
            return math.nan
        if tokenizer is not None and tokenizer.template and field == "dialogue":
            return len(tokenizer.render(messages)[0])
        return sum(len(parts(m["content"])) for m in messages)

    return np.array([length(field_messages(record, field)) for record in records])


def implausible(table: Mapping[str, float], rounding: float = 0.5) -> list[str]:
    """Why no set of lengths can have this table of eight numbers, each printed to within `rounding`; empty if one can.

    Quantiles must be ordered. They also box in every order statistic, x_i in [l_i, h_i], and the boxes bound the mean,
    sum l / n <= mean <= sum h / n; given the mean, the standard deviation is least where all x_i lie as close to one
    level c as their boxes let them, x_i = clip(c, l_i, h_i), and greatest where the upper boxes are filled first. The
    textbook's bound, std >= |max - mean| sqrt(n) / (n - 1), is the special case without quartiles.
    """
    n, quantiles = int(table["count"]), [table[q] for q in QUANTILES]
    if n < 1 or quantiles != sorted(quantiles) or quantiles[0] < 0:
        return [f"count {n}, quantiles {quantiles}: expected at least one record, and ordered lengths from 0"]
    place, i = (n - 1) * np.array([0, .25, .5, .75, 1]), np.arange(n)
    known = list(zip(place, quantiles, strict=True))
    low = np.max([np.where(i >= np.ceil(p), q - rounding, -math.inf) for p, q in known], axis=0)
    high = np.min([np.where(i <= np.floor(p), q + rounding, math.inf) for p, q in known], axis=0)
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
    """P(chi-square > x) for `dof` degrees of freedom: the regularised incomplete gamma function Q(dof / 2, x / 2)."""
    return float(torch.special.gammaincc(torch.tensor(dof / 2).double(), torch.tensor(x / 2).double())) if dof else 1.0


def compare_tasks(counts: Mapping[str, float], target: Mapping[str, float], target_is_sample: bool = False) -> dict:
    """How far a set's tasks are from a target's: largest difference of shares, total variation, Pearson's chi-square.

    A target is a specification, so its shares are exact (goodness of fit), and a task that it lacks makes chi-square
    infinite; with `target_is_sample` it is another set's counts (homogeneity). p is rough where the least expected
    count is under 5.
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
    return {"task": tasks[worst], "largest": float(gap[worst]), "total_variation": float(np.abs(gap).sum() / 2),
            "chi_square": chi_square, "dof": dof, "p": chi_square_tail(chi_square, dof),
            "least_expected": float(expected.min())}


def ks_distance(a, b) -> float:
    """Kolmogorov-Smirnov distance of two sets of lengths, max |F_a - F_b|; of a table of them, the least it can be.

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
        most = np.append(below, 1)[np.searchsorted(w, v, side="right")]  # F_y(v) is at most F below y's next value
        return float((upto - most).max())

    return max(0.0, excess(a, b), excess(b, a))


def kolmogorov_tail(x: float) -> float:
    """P(K > x) = 2 sum_k (-1)^(k - 1) e^(-2 k^2 x^2), the limit of sqrt(n m / (n + m)) D (Kolmogorov 1933)."""
    if x < 0.2:
        return 1.0  # to 12 places, where the sum converges slowly
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))))


def compare_lengths(a, b) -> dict:
    """Kolmogorov-Smirnov distance of two sets or tables, its p corrected for size (Stephens 1970), whether it is exact.

    Lengths are whole numbers and tie, so p errs on the large side; where a table is involved, the distance is a lower
    and p an upper bound.
    """
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
    """Which records make a set of exactly `size` with these shares of labels, tasks or quarters of length, in order.

    One seed takes from one shuffle, so that a smaller subset lies in a larger one, up to a record of rounding.
    """
    counts, have = largest_remainder(shares, size), Counter(labels)
    for name, wanted in counts.items():
        if have[name] < wanted:
            most = min(int(have[n] * sum(shares.values()) / share) for n, share in shares.items() if share > 0)
            fail(f"subset of {size}: '{name}' has {have[name]} records, {wanted} are wanted: "
                 f"{f'ask for at most {most}' if most else 'add some'}, or choose other shares")
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
    """Which quarter of a table's distribution each length falls in, "outside" if in none: labels for `subset`."""
    low, *edges, high = (table[q] for q in QUANTILES)
    names = list(QUARTERS)
    return ["outside" if not low <= x <= high else names[sum(x > edge for edge in edges)] for x in lengths]


# ---------------------------------------------------------------------------------------- sections

def length_section(sets: Mapping[str, Sequence[float] | Mapping[str, float]], unit: str) -> dict:
    """A row for every set of lengths, or table of eight numbers."""
    tables = {name: x if isinstance(x, Mapping) else length_table(x) for name, x in sets.items()}
    rows = [[name, *(None if math.isnan(x[c]) else x[c] for c in COLUMNS), x.get("zero")]
            for name, x in tables.items() if x["count"]]
    return {"title": f"Length, {unit}", "columns": ["", *COLUMNS, "of them 0"], "rows": rows}


def length_sections(sets: Mapping[str, Sequence[float]], unit: str, target: str) -> list[dict]:
    """The sets' lengths, and the target's beside them if both are in tokens, else in a table of its own."""
    row = {f"{target}, prompt": TARGET_LENGTHS[target]} if target in TARGET_LENGTHS else {}
    if unit in UNITS and row:
        apart = length_section(row, "tokens")
        apart["text"] = (f"In tokens, and not to be compared with {unit}: --unit DIRECTORY of a tokenizer measures "
                         "the file in tokens too.")
        return [length_section(sets, unit), apart]
    return [length_section({**sets, **row}, unit)]


def task_section(table: Mapping[str, Mapping[str, float]], others: Mapping[str, Mapping[str, float]], unit: str,
                 means: Mapping[str, float] | None = None) -> dict:
    """Count, share and mean prompt length of every task; shares (and mean lengths) of what it is compared with."""
    percents = {name: {task: 100 * n / sum(x.values()) for task, n in x.items()} for name, x in others.items()}
    rows = []
    for task in [*table, *dict.fromkeys(t for x in others.values() for t in x if t not in table)]:
        x = table.get(task, {"count": 0, "share": 0.0, "mean": math.nan})
        rows.append([task, x["count"], 100 * x["share"], *(percent.get(task, 0.0) for percent in percents.values()),
                     None if math.isnan(x["mean"]) else x["mean"], *([means.get(task)] if means else [])])
    columns = ["task", "count", "share, %", *(f"{name}, %" for name in others), f"mean prompt, {unit}"]
    return {"title": "Tasks", "columns": columns + ["target mean"] * bool(means), "rows": rows,
            "text": "The target's means are in a unit that its slide does not name." if means else ""}


def comparison_section(tasks: Mapping[str, Mapping], lengths: Mapping[str, Mapping]) -> dict:
    """What compare_tasks and compare_lengths found, a row for each thing compared with."""
    rows = []
    for name in dict.fromkeys([*tasks, *lengths]):
        of_tasks, of_lengths = [None] * 6, [None] * 2
        if x := tasks.get(name):
            chi_square = x["chi_square"] if math.isfinite(x["chi_square"]) else "infinite"
            of_tasks = [100 * x["largest"], x["task"], 100 * x["total_variation"]]
            of_tasks += [chi_square, x["dof"], f"{x['p']:.2g}"]
        if y := lengths.get(name):
            least, most = ("", "") if y["exact"] else (">= ", "<= ")
            of_lengths = [f"{least}{y['ks']:.3f}", f"{most}{y['p']:.2g}"]
        rows.append([name, *of_tasks, *of_lengths])
    rough = ", ".join(name for name, x in tasks.items() if x["least_expected"] < 5)
    return {"title": "Distance", "rows": rows,
            "columns": ["from", "tasks: largest gap, points", "at", "total variation, %", "chi-square", "df", "p",
                        "lengths: Kolmogorov-Smirnov", "p of it"],
            "text": f"A task is expected fewer than 5 times, chi-square's p is rough: {rough}." if rough else ""}


def pilot_section(tables: Mapping[str, Mapping[str, float]] = SLIDES) -> dict:
    """The vendors' pilots beside the sets they were ordered to match, with what flags a table as impossible."""
    rows = [[name, *(table[column] for column in COLUMNS), "; ".join(implausible(table)) or "possible"]
            for name, table in tables.items()]
    return {"title": "Pilots, prompt length in tokens", "columns": ["", *COLUMNS, "flag"], "rows": rows,
            "text": "As the talk prints them. A flag says that no set of lengths has these eight numbers: ask the "
                    "vendor how they were counted before buying."}


def draw(lengths: Mapping[str, np.ndarray], target: Mapping[str, float] | None,
         shares: Mapping[str, Mapping[str, float]], unit: str, file: Path) -> None:
    """Shares of prompt lengths by doublings, a target's quartiles as lines, and of tasks, in every set and target."""
    longest = max([1, *(x.max() for x in lengths.values()), *([target["max"]] if target else [])])
    edges = [0, *(2**k for k in range(int(longest).bit_length() + 1))]
    tasks, groups = list(dict.fromkeys(t for x in shares.values() for t in x)), {}
    for name in {**lengths, **shares}:
        x, of_tasks = lengths.get(name), shares.get(name)
        counts = [None] * (len(edges) - 1) if x is None else np.histogram(x, edges)[0].tolist()
        groups[name] = [count if count is None else 100 * count / len(x) for count in counts]
        groups[name] += [of_tasks and 100 * of_tasks.get(t, 0) / sum(of_tasks.values()) for t in tasks]
    label = "share, %" + ("; dashed: quartiles of the target, tokens" if target else "")
    figure = plot({"kind": "bars", "label": label, "groups": groups,
                   "names": [f"from {edge} {unit}" for edge in edges[:-1]] + tasks})
    if figure is None:
        fail(f"{file}: no prompts and no tasks to draw, expected records that have some")
    for q in QUANTILES[1:4] if target else ():
        figure.axes[0].axhline(math.log2(target[q]) + 0.5, color="black", linestyle="--", linewidth=1)
    with writing(file):
        figure.savefig(file, dpi=130)


# ------------------------------------------------------------------------------------ the command line

class Dataset:
    """A file's records, measured."""

    def __init__(self, name: str, records: list[dict], unit: str):
        self.name, self.records = name, records
        self.lengths = {field: measure(records, field, unit) for field in FIELDS}  # NaN where a record lacks the field
        self.prompts = self.lengths["prompt"][~np.isnan(self.lengths["prompt"])]
        self.tasks = [task_of(record) for record in records]
        self.table = task_table(self.tasks, self.lengths["prompt"])
        self.counts = {task: x["count"] for task, x in self.table.items()}
        self.has_tasks = set(self.tasks) != {"none"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m collect.spec", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--pilots", action="store_true", help="the talk's pilots alone")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--compare", metavar="OTHER", help="another data file")
    parser.add_argument("--unit", default="words", help="words, bytes, or a directory that holds a tokenizer")
    parser.add_argument("--figure", metavar="PNG")
    parser.add_argument("--subset", type=int, metavar="SIZE", help="draw so many records in the target's mix")
    parser.add_argument("--by", choices=("tasks", "lengths"), default="tasks",
                        help="of tasks, or of prompt lengths by its quartiles")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--out", help="write the subset here")
    words = arguments(parser, argv)
    if (words.file is None) != words.pilots:
        fail("names no file and not --pilots, or both: expected one of them, e.g. python -m collect.spec data.jsonl")
    if words.unit not in UNITS and not Path(words.unit).is_dir():
        fail(f"--unit {words.unit}: no such directory, expected words, bytes, or a directory that holds a tokenizer")
    if (words.subset is None) != (words.out is None) or words.out and (not words.target or words.subset < 1):
        fail("--subset, --out and --target go together, expected e.g. --target surge --subset 1000 --out subset.jsonl")
    if words.by == "lengths" and words.target not in TARGET_LENGTHS:
        fail(f"--by lengths: target {words.target} has no table of lengths, expected {', '.join(TARGET_LENGTHS)}")
    if words.by == "lengths" and words.unit in UNITS:
        fail(f"--by lengths: {words.target}'s quartiles are in tokens, not in {words.unit}: name a tokenizer's "
             "directory, e.g. --unit data/tiny/base")
    return words


def main(argv: Sequence[str] | None = None) -> None:
    words = parse(argv)
    if words.pilots:
        print(report_text({"title": "Pilots", "about": {}, "sections": [pilot_section()]}))
        return
    target, row = TARGETS.get(words.target), TARGET_LENGTHS.get(words.target)
    unit = words.unit if words.unit in UNITS else f"tokens of {words.unit}"
    about = {"lengths": f"{unit}, turns added up; prompt: all before the last reply; "
                        "answer: that reply, the chosen or best one"}
    files = [words.file, *([words.compare] if words.compare else [])]
    short = ["/".join(Path(file).parts[-2:]) for file in files]
    sets = []
    for file, name in zip(files, short if len(set(short)) == len(set(files)) else files, strict=True):
        records, report = read(file)
        records = list(records)
        report.check_used()
        about[file] = f"{len(records)} records ({report.native}), {len(report.rejects)} rejected"
        sets.append(Dataset(name, records, words.unit))
    mine, *other = sets
    others = ({words.target: target} if target else {}) | {x.name: x.counts for x in other}
    named = {name: x for name, x in others.items() if mine.has_tasks and set(x) != {"none"}}

    rows = {f"{x.name}, {field}": lengths for x in sets for field, lengths in x.lengths.items()}
    row = row if words.unit not in UNITS else None  # a table in tokens says nothing of words
    sections = [*length_sections(rows, unit, words.target),
                task_section(mine.table, named, unit, SURGE_MEAN_LENGTHS if target is SURGE else None)]
    if others:
        compared = ({words.target: row} if row else {}) | {x.name: x.prompts for x in other}
        sections.append(comparison_section(
            {name: compare_tasks(mine.counts, x, target_is_sample=name != words.target) for name, x in named.items()},
            {name: compare_lengths(mine.prompts, x) for name, x in compared.items() if len(mine.prompts) and len(x)}))
    labels = collect_labels(label_rows(mine.records))
    if ((~np.isnan(labels.strength)).sum(axis=0) > 1).any():
        sections += rater_sections(labels)
    print(report_text({"title": "Specification", "about": about, "sections": sections}))
    if words.figure:
        shown = {x.name: x.prompts for x in sets if len(x.prompts)}
        draw(shown, row, {mine.name: mine.counts} | named if mine.has_tasks else {}, unit, Path(words.figure))
        print(f"wrote {words.figure}")
    if words.out:
        by_length = words.by == "lengths"
        kinds = quarters(mine.lengths["prompt"], row) if by_length else mine.tasks
        chosen = subset(kinds, QUARTERS if by_length else target, words.subset, words.seed)
        write_lines(words.out, (mine.records[i] for i in chosen))
        print(f"wrote {len(chosen)} of {len(kinds)} records to {words.out}")


if __name__ == "__main__":
    main()
