"""Do the people who label preferences agree, and if not, is it a vendor, or the replies?

The talk's lesson: a first hundred ratings agreed with nobody's, because both replies were bad and ties were broken at
random. `find_faults` tells that from a vendor whose raters click at random. Statistics: judging/agreement.py.
"""
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from judging import agreement as agree
from judging.ratings import feature_preference, mean_interval
from judging.tables import cell_of

# What data sets call the targets' tasks, Dolly's words among them.
NAMES = {"brainstorming": "brainstorm", "summarization": "summarize", "classification": "classify",
         "information_extraction": "extract", "extraction": "extract", "creative_writing": "generation",
         "general_qa": "open_qa", "code": "coding"}


def task_of(record: Mapping) -> str:
    """A record's category in the targets' words; "none" if it has none."""
    name = "_".join((record.get("category") or "none").lower().replace("-", " ").split())
    return NAMES.get(name, name)


@dataclass(frozen=True)
class Labels:
    """Who preferred what: a row a rater, a column a pair of replies. The vendor called "gold" is the in-house set.

    Strength is signed, in steps of the scale: negative the first reply is better, 0 a tie, positive the second. The
    scale of eight is rating - 4.5, a choice with margin 1 to 4 is -(margin - 0.5) or margin - 0.5. NaN is unknown.
    """

    strength: np.ndarray     # [R, U]
    swapped: np.ndarray      # [R, U] 1 where the second reply was shown first
    seconds: np.ndarray      # [R, U] taken
    longer: np.ndarray       # [U] length of the second reply less that of the first
    raters: list[str]        # [R]
    vendors: list[str]       # [R] who sent them
    groups: list[str]        # [U] task of the pair, or the model that wrote it
    prompts: list[str]       # [U] what intervals resample: pairs of one prompt are not independent


def collect_labels(rows: Iterable[Mapping]) -> Labels:
    """Labels from rows with pair, rater, strength, and where known prompt, vendor, group, swapped, longer, seconds.

    A rater without vendor is one of their own, and a pair without prompt has its own. Of several labels of a pair by
    one rater the last counts.
    """
    rows = list(rows)
    pairs = {name: u for u, name in enumerate(dict.fromkeys(row["pair"] for row in rows))}
    vendors = {str(row["rater"]): str(row.get("vendor") or row["rater"]) for row in rows}
    number = {name: r for r, name in enumerate(sorted(vendors))}
    strength, swapped, seconds = np.full((3, len(number), len(pairs)), math.nan)
    longer, groups, prompts = np.full(len(pairs), math.nan), ["all"] * len(pairs), list(map(str, pairs))
    for row in rows:
        r, u = number[str(row["rater"])], pairs[row["pair"]]
        strength[r, u] = row["strength"]
        swapped[r, u], seconds[r, u], longer[u] = (row.get(key, math.nan) for key in ("swapped", "seconds", "longer"))
        groups[u], prompts[u] = str(row.get("group", "all")), str(row.get("prompt", row["pair"]))
    return Labels(strength, swapped, seconds, longer, list(number), [vendors[name] for name in number], groups, prompts)


def label_rows(records: Iterable[Mapping]) -> list[dict]:
    """Rows for `collect_labels` from preference records that name an annotator, whichever of two replies they chose.

    Turns of a dialogue are not independent: one first user turn is one prompt.
    """
    rows = []
    for record in records:
        if "chosen" in record and record.get("annotator") is not None:
            first, second = sorted((record["chosen"], record["rejected"]))
            strength = max(0.5, (record.get("margin") or 1) - 0.5) * (1 if record["chosen"] == second else -1)
            known = {key: record[key] for key in ("vendor", "seconds") if record.get(key) is not None}
            opening = next((m["content"] for m in record["prompt"] if m["role"] == "user"), "")
            rows.append(known | {"pair": json.dumps([record["prompt"], first, second]), "rater": record["annotator"],
                                 "prompt": opening, "group": task_of(record), "strength": strength,
                                 "longer": len(second) - len(first)})
    return rows


def tie_discounted(first, second) -> float:
    """LIMA's accuracy between two groups of raters [R, U] (Zhou et al. 2023, arXiv:2305.11206).

    Over all pairs of labels of a unit: 1 for the same choice, 1/2 where exactly one is a tie, 0 for opposite ones.
    """
    credit = 1 - np.abs(np.sign(first)[:, None] - np.sign(second)[None]) / 2
    return float(np.nanmean(credit)) if not np.isnan(credit).all() else math.nan  # also of nobody


def over_pairs(statistic: Callable[[np.ndarray], float], ratings: np.ndarray) -> float:
    """Mean over the pairs of raters for whom a statistic of two raters is defined."""
    values = np.array([statistic(ratings[list(pair)]) for pair in combinations(range(len(ratings)), 2)])
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


# Of strengths [R, U]. Those of the first block look at the side alone: first, tie or second.
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "raw agreement": lambda s: agree.raw_agreement(np.sign(s))["agreement"],
    "raw agreement without ties": lambda s: agree.raw_agreement(np.sign(s), tie=0)["agreement_without_ties"],
    "tie-discounted": lambda s: over_pairs(lambda r: tie_discounted(r[:1], r[1:]), s),
    "Cohen's kappa, mean of pairs": lambda s: over_pairs(agree.cohen_kappa, np.sign(s)),
    "Fleiss' kappa, pairs all rated": lambda s: agree.fleiss_kappa(np.sign(s)[:, ~np.isnan(s).any(axis=0)]),
    "Krippendorff's alpha": lambda s: agree.krippendorff_alpha(np.sign(s)),
    "Gwet's AC1": lambda s: agree.gwet_ac1(np.sign(s)),
    "Cohen, linear weights": lambda s: over_pairs(lambda r: agree.cohen_kappa(r, "linear"), s),
    "Cohen, quadratic weights": lambda s: over_pairs(lambda r: agree.cohen_kappa(r, "quadratic"), s),
    "alpha, ordinal": lambda s: agree.krippendorff_alpha(s, "ordinal"),
    "alpha, interval": lambda s: agree.krippendorff_alpha(s, "interval"),
    "Spearman": lambda s: over_pairs(agree.spearman, s),
}
SHARES = ("raw agreement", "raw agreement without ties", "tie-discounted")  # from 0, where others are from -1


def agreement(strength: np.ndarray, prompts: Sequence[str] | None = None,
              rounds: int = 200) -> dict[str, dict[str, float]]:
    """Every statistic of strengths [R, U] with its 95 % interval from resampled prompts [U] (None: pairs)."""
    return {name: agree.bootstrap(statistic, strength, prompts, rounds, lowest=0 if name in SHARES else -1)
            for name, statistic in STATISTICS.items()}


def vendor_table(labels: Labels, rounds: int = 200) -> dict[str, dict]:
    """Each vendor among its own raters (alpha), against all others and against gold, over all and by group of pairs."""
    vendor, groups, prompts, table = *map(np.array, (labels.vendors, labels.groups, labels.prompts)), {}
    for name in sorted(set(labels.vendors) - {"gold"}):
        mine = labels.strength[vendor == name]
        alpha = agree.bootstrap(STATISTICS["Krippendorff's alpha"], mine, labels.prompts, rounds)
        table[name] = {"raters": len(mine), "labels": int((~np.isnan(mine)).sum()), "alpha": alpha}
        for key, reference in (("others", (vendor != name) & (vendor != "gold")), ("gold", vendor == "gold")):
            theirs = labels.strength[reference]
            shared = ~np.isnan(mine).all(axis=0) & ~np.isnan(theirs).all(axis=0)

            def accuracy(strength: np.ndarray, n: int = len(mine)) -> float:
                return tie_discounted(strength[:n], strength[n:])

            both = np.concatenate([mine, theirs])[:, shared]
            asked = prompts[shared].tolist()
            table[name][key] = agree.bootstrap(accuracy, both, asked, rounds, lowest=0)
            table[name][f"{key} by group"] = agree.by_category(accuracy, both, groups[shared].tolist(), asked, rounds,
                                                                 lowest=0)
    return table


def rater_table(labels: Labels) -> dict[str, dict]:
    """Each rater: labels, share of ties, agreement with the others' majority and with gold, and two biases.

    position: share of decided labels for the reply shown first; length: for the longer reply. One half is no bias; 95 %
    intervals resample prompts.
    """
    side, gold = np.sign(labels.strength), np.array(labels.vendors) == "gold"
    table = {}
    for i in np.flatnonzero(~gold):
        mine, others = side[i], side[~gold & (np.arange(len(side)) != i)]
        majority = np.where(np.isnan(others).all(axis=0), math.nan, np.sign(np.nansum(others, axis=0)))
        decided = (np.abs(mine) == 1) & ~np.isnan(labels.swapped[i])
        first = np.where(decided, (mine < 0) != (labels.swapped[i] == 1), math.nan)
        low, high = mean_interval(first, labels.prompts)
        longer = feature_preference((mine + 1) / 2, labels.longer, np.zeros_like(labels.longer), 0, labels.prompts)
        given, seconds = mine[~np.isnan(mine)], labels.seconds[i][~np.isnan(labels.seconds[i])]
        table[labels.raters[i]] = {
            "vendor": labels.vendors[i], "labels": len(given), "ties": float(np.mean(given == 0)),
            "majority": tie_discounted(mine[None], majority[None]), "gold": tie_discounted(mine[None], side[gold]),
            "position": {"value": float(np.nanmean(first)) if decided.any() else math.nan, "low": low, "high": high,
                         "n": int(decided.sum())},
            "length": {"value": longer["share"], "low": longer["low"], "high": longer["high"], "n": longer["n"]},
            "seconds": float(np.median(seconds)) if len(seconds) else math.nan}
    return table


MIN_SHARED = 80    # pairs that two vendors must share before anything is said about them
NEAR_CHANCE = 0.2  # a correlation of sides below is chance for practical purposes ...
DEVIATIONS = 2.5   # ... and so is one below so many standard errors of independent clicks, 1 / sqrt(n - 1)


def vendor_correlations(strength: np.ndarray, vendors: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Vendors, Pearson's r of their raters' mean sides [V, V], and where r is above chance [V, V].

    NaN under MIN_SHARED shared pairs. Correlation rather than agreement: two who click "first" four times in five agree
    on 68 % and tell nothing.
    """
    names, side = sorted(set(vendors)), np.sign(strength)
    r, above = np.full((len(names),) * 2, math.nan), np.zeros((len(names),) * 2, dtype=bool)
    votes = [side[[v == name for v in vendors]] for name in names]
    for i, j in combinations(range(len(names)), 2):
        both = ~(np.isnan(votes[i]).all(axis=0) | np.isnan(votes[j]).all(axis=0))
        n = int(both.sum())
        if n >= MIN_SHARED:
            x, y = (np.nanmean(v[:, both], axis=0) for v in (votes[i], votes[j]))
            constant = np.ptp(x) == 0 or np.ptp(y) == 0  # a constant rater tells nothing
            r[i, j] = r[j, i] = 0 if constant else np.corrcoef(x, y)[0, 1]
            above[i, j] = above[j, i] = r[i, j] > max(NEAR_CHANCE, DEVIATIONS / math.sqrt(n - 1))
    return names, r, above


def find_faults(labels: Labels) -> dict[str, list[str]]:
    """Whose fault is disagreement? {"prompts": groups of pairs, "vendors": names, "undecided": reasons}

    A vendor (gold is one) is near chance if its sides correlate with no other's. If all vendors are near chance, the
    pairs are at fault: both replies are bad, or nobody can tell. If fewer than half are, these vendors are at fault.
    Anything else is undecided: two bad vendors of three look like bad pairs. This is asked of all pairs, then of every
    group of pairs; vendors are judged on the pairs that are not at fault.

    In 3 x 200 simulated pilots of four vendors, one rater each, 100 pairs, good raters agreeing on 73 % as those of
    InstructGPT did, no good vendor was named; of bad vendors 97 % were; of bad pairs 96 %, the others undecided.
    """
    found = {"prompts": [], "vendors": [], "undecided": []}

    def near_chance(columns: np.ndarray) -> tuple[list[str], list[str]]:
        names, r, above = vendor_correlations(labels.strength[:, columns], labels.vendors)
        known = (~np.isnan(r)).sum() == len(names) * (len(names) - 1)
        near = [name for name, row in zip(names, above, strict=True) if not row.any()]
        return names if known and len(names) > 2 else [], near

    groups = np.array(labels.groups)
    for group in ["all", *sorted(set(labels.groups) - {"all"})]:
        names, near = near_chance(np.full(len(groups), True) if group == "all" else groups == group)
        if names and near == names:
            found["prompts"].append(group)
    left = np.full(len(groups), "all" not in found["prompts"]) & ~np.isin(groups, found["prompts"])
    names, near = near_chance(left)
    if not names and left.any():
        found["undecided"].append(f"fewer than three vendors, gold included, any two with {MIN_SHARED} pairs in common")
    elif 2 * len(near) < len(names):
        found["vendors"] = near
    elif names:
        found["undecided"].append(f"{' and '.join(near)} near chance, half of the vendors or more, but not all")
    return found


def rater_sections(labels: Labels, rounds: int = 200) -> list[dict]:
    """Agreement among all, by vendor, by group of pairs, by rater, and whose fault disagreement is."""
    vendors, faults = vendor_table(labels, rounds), find_faults(labels)
    among = labels.strength[np.array(labels.vendors) != "gold"]
    shared = (~np.isnan(among)).sum(axis=0) > 1
    several, asked = among[:, shared], np.array(labels.prompts)[shared].tolist()
    reference = "others" if len(among) == len(labels.raters) else "gold"
    said = {"prompts": "Near chance for every vendor, at fault are the prompts or the model",
            "vendors": "Near chance where others agree", "undecided": "Undecided"}
    verdict = " ".join(f"{said[kind]}: {', '.join(names)}." for kind, names in faults.items() if names)
    counts = Counter(labels.groups)

    return [
        {"title": "Agreement among raters", "columns": ["statistic", "value", "undefined rounds"],
         "text": f"{len(several)} raters, {several.shape[1]} pairs that two or more of them rated, of "
                 f"{len(set(asked))} prompts, which intervals resample. {verdict or 'No vendor is near chance.'}",
         "rows": [[name, cell_of(x), x["undefined"]] for name, x in agreement(several, asked, rounds).items()]},
        {"title": "Vendors", "text": "With others: accuracy, where a tie against a choice counts one half.",
         "columns": ["vendor", "raters", "labels", "alpha within", "with other vendors", "pairs of both", "with gold",
                     "pairs of both"],
         "rows": [[name, x["raters"], x["labels"], cell_of(x["alpha"]), cell_of(x["others"]), x["others"]["n"],
                   cell_of(x["gold"]), x["gold"]["n"]] for name, x in vendors.items()]},
        {"title": f"The same with {reference}, by group of pairs", "columns": ["group", *vendors, "pairs"],
         "rows": [[group, *(cell_of(x[f"{reference} by group"].get(group)) for x in vendors.values()), counts[group]]
                  for group in sorted(counts)]},
        rater_section(labels)]


def rater_section(labels: Labels, title: str = "Raters") -> dict:
    """How reliable each rater is, and two biases."""
    return {"title": title, "columns": ["rater", "vendor", "labels", "ties", "with majority", "with gold",
                                        "shown first", "of", "longer", "of", "seconds"],
            "text": "With the majority of the others: a tie against a choice counts one half. Of decided labels: "
                    "shares for the reply shown first, and for the longer one; intervals resample prompts.",
            "rows": [[name, x["vendor"], x["labels"], x["ties"], x["majority"], x["gold"], cell_of(x["position"]),
                      x["position"]["n"], cell_of(x["length"]), x["length"]["n"], x["seconds"]]
                     for name, x in rater_table(labels).items()]}
