"""Do raters agree? Raw agreement, kappas, Krippendorff's alpha, Gwet's AC1, Spearman, and their intervals.

Ratings are one array [raters, units] of numbers, NaN where a rater skipped a unit.
Kappa is low at high raw agreement when one label dominates: print raw agreement, a kappa and AC1 side by side.
A statistic that is undefined (one rater, one label throughout) is NaN, never 0 or 1.
"""
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from judging.ratings import draws, end_interval, percentiles


def _table(ratings) -> np.ndarray:
    ratings = np.asarray(ratings, dtype=float)
    if ratings.ndim != 2:
        raise ValueError(f"ratings have shape {ratings.shape}, expected [raters, units]")
    return ratings


def _counts(ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many raters gave unit u category c [units, categories], and the categories' values."""
    categories = np.unique(ratings[~np.isnan(ratings)])
    return (ratings[:, :, None] == categories).sum(axis=0).astype(float), categories


def raw_agreement(ratings, tie: float | None = None) -> dict[str, float]:
    """Share of equal labels among all pairs of labels on the same unit, with and without ties.

    With ties, tie = tie is an agreement; without, a pair in which either label is the tie is dropped
    (MT-Bench's two setups, Zheng et al. 2023, arXiv:2306.05685, section 4.2). n counts pairs of labels.
    """
    ratings = _table(ratings)

    def equal_pairs(table: np.ndarray) -> tuple[float, int]:
        counts, _ = _counts(table)
        m = counts.sum(axis=1)
        pairs = (m * (m - 1)).sum() / 2
        return (float((counts * (counts - 1)).sum() / 2 / pairs) if pairs else np.nan), int(pairs)

    agreement, n = equal_pairs(ratings)
    without, n_without = equal_pairs(ratings if tie is None else np.where(ratings == tie, np.nan, ratings))
    return {"agreement": agreement, "n": n, "agreement_without_ties": without, "n_without_ties": n_without}


def _pairs(ratings, statistic: str) -> np.ndarray:
    """Two raters' labels [2, units] of the units both rated."""
    ratings = _table(ratings)
    if len(ratings) != 2:
        raise ValueError(f"{statistic} compares 2 raters, got {len(ratings)}: use Krippendorff's alpha")
    return ratings[:, ~np.isnan(ratings).any(axis=0)]


def cohen_kappa(ratings, weights: str | None = None) -> float:
    """Two raters' kappa = 1 - sum w o / sum w e (Cohen 1960; weighted, Cohen 1968), over units both rated.

    o: observed shares [c, k]; e: product of the two raters' own shares. Weights of a disagreement between c and k:
    None 1, "linear" |c - k|, "quadratic" (c - k)^2, by the labels' values, so an unused step of a scale still counts.
    """
    a, b = _pairs(ratings, "Cohen's kappa")
    if not len(a):
        return np.nan
    values, index = np.unique(np.concatenate([a, b]), return_inverse=True)
    observed = np.zeros((len(values), len(values)))
    np.add.at(observed, (index[:len(a)], index[len(a):]), 1 / len(a))
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0))
    if weights not in (None, "linear", "quadratic"):
        raise ValueError(f"weights is {weights!r}, expected None, 'linear' or 'quadratic'")
    gap = np.abs(values[:, None] - values) ** {None: 0, "linear": 1, "quadratic": 2}[weights]
    np.fill_diagonal(gap, 0)  # 0 ** 0 is 1
    chance = (gap * expected).sum()
    return float(1 - (gap * observed).sum() / chance) if chance > 0 else np.nan


def fleiss_kappa(ratings) -> float:
    """Kappa of m raters who all rated every unit (Fleiss 1971).

        P_u = (sum_c n_uc^2 - m) / (m (m - 1)),   P_e = sum_c p_c^2,   kappa = (mean P_u - P_e) / (1 - P_e)
    """
    ratings = _table(ratings)
    if np.isnan(ratings).any():
        raise ValueError("Fleiss' kappa needs every unit rated by every rater: drop units, or use Krippendorff's")
    m = len(ratings)
    counts, _ = _counts(ratings)
    if m < 2 or not len(counts):
        return np.nan
    observed = (((counts ** 2).sum(axis=1) - m) / (m * (m - 1))).mean()
    chance = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return float((observed - chance) / (1 - chance)) if chance < 1 else np.nan


def krippendorff_alpha(ratings, level: str = "nominal") -> float:
    """alpha = 1 - D_o / D_e (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"); gaps are allowed.

    A unit with m >= 2 labels adds each ordered pair of them to the coincidences o [c, k] with weight 1 / (m - 1);
    n_c are o's row sums. Squared differences: nominal 1; interval (c - k)^2; ratio ((c - k) / (c + k))^2; ordinal
    (n_c / 2 + labels in between + n_k / 2)^2.
    """
    counts, values = _counts(_table(ratings))
    m = counts.sum(axis=1)
    counts, m = counts[m >= 2], m[m >= 2]
    weighted = counts / (m - 1)[:, None]
    coincidences = weighted.T @ counts - np.diag(weighted.sum(axis=0))
    marginal = coincidences.sum(axis=1)
    gap, total = values[:, None] - values, values[:, None] + values
    middle = np.cumsum(marginal) - marginal / 2  # labels below c and half of c's own
    differences = {"nominal": gap != 0, "interval": gap**2, "ordinal": (middle[:, None] - middle) ** 2,
                   "ratio": np.divide(gap, total, out=np.zeros_like(gap), where=total != 0) ** 2}
    if level not in differences:
        raise ValueError(f"level is {level!r}, expected nominal, ordinal, interval or ratio")
    delta = differences[level]
    chance = (np.outer(marginal, marginal) * delta).sum()
    return float(1 - (marginal.sum() - 1) * (coincidences * delta).sum() / chance) if chance > 0 else np.nan


def gwet_ac1(ratings, weights: str | None = None, values: Sequence[float] | None = None) -> float:
    """AC1, stable when one label dominates (Gwet 2008, with gaps as in his 2014 handbook); AC2 with quadratic weights.

        w_ck = 1 if c = k, else 0, or with "quadratic" 1 - ((c - k) / range)^2
        p_a = mean over units with m >= 2 labels of sum_c n_uc (sum_k w_ck n_uk - 1) / (m (m - 1))
        p_c = mean over rated units of n_uc / m,   p_e = sum w / (q (q - 1)) sum_c p_c (1 - p_c)
        AC = (p_a - p_e) / (1 - p_e)             over the q categories that occur, or the `values` of a scale
    """
    ratings = _table(ratings)
    values = np.unique(ratings[~np.isnan(ratings)]) if values is None else np.array(sorted(values), dtype=float)
    counts, q = (ratings[:, :, None] == values).sum(axis=0).astype(float), len(values)
    counts = counts[counts.sum(axis=1) > 0]
    m = counts.sum(axis=1)
    several = m >= 2
    if q < 2 or not several.any():
        return np.nan
    n, k = counts[several], m[several]
    w = np.eye(q) if weights is None else 1 - ((values[:, None] - values) / (values[-1] - values[0])) ** 2
    observed = ((n * (n @ w - 1)).sum(axis=1) / (k * (k - 1))).mean()
    share = (counts / m[:, None]).mean(axis=0)
    chance = w.sum() / (q * (q - 1)) * (share * (1 - share)).sum()
    return float((observed - chance) / (1 - chance))


def midranks(values) -> np.ndarray:
    """Ranks from 1 [n]; equal values share the mean of the ranks they occupy."""
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]


def spearman(ratings) -> float:
    """Two raters' rank correlation: Pearson's r of the midranks, over units both rated; NaN if a rater never varies."""
    both = _pairs(ratings, "Spearman's correlation")
    x, y = (midranks(row) - (both.shape[1] + 1) / 2 for row in both)
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else np.nan


def bootstrap(statistic: Callable[[np.ndarray], float], ratings, groups: Sequence[Hashable] | None = None,
              rounds: int = 1000, seed: int = 0, lowest: float = -1) -> dict[str, float]:
    """A statistic of ratings [raters, units], its 95 % interval from resampled units, and how often it was undefined.

    It goes from `lowest` to 1; where every round gives the same value, what a few more units might do is the interval.
    `groups` [units] names the prompt a unit belongs to: then prompts are resampled, with all their units, for
    units of one prompt are not independent. Neither the order of units nor of groups matters.
    """
    ratings = _table(ratings)
    if groups is None:
        ratings = ratings[:, np.lexsort(ratings)]
        members = [np.array([u]) for u in range(ratings.shape[1])]
    else:
        groups = np.array([str(g) for g in groups])
        if len(groups) != ratings.shape[1]:
            raise ValueError(f"{len(groups)} groups for {ratings.shape[1]} units")
        members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    drawn = draws(len(members), rounds, seed) if members else ()
    samples = np.array([statistic(ratings[:, np.concatenate([members[i] for i in draw])]) for draw in drawn])
    defined = samples[~np.isnan(samples)]
    value, (low, high) = statistic(ratings), percentiles(defined, n=len(members)).tolist()
    if len(defined) and np.ptp(defined) < 1e-9:
        low, high = end_interval(value, len(members), lowest, 1)
    return {"value": value, "low": low, "high": high, "n": ratings.shape[1], "groups": len(members),
            "undefined": len(samples) - len(defined)}


def bootstrap_raw(ratings, groups: Sequence[Hashable]) -> dict[str, float]:
    """raw_agreement, ties counted, with its interval."""
    return bootstrap(lambda x: raw_agreement(x)["agreement"], ratings, groups, 300, lowest=0)


def by_category(statistic: Callable[[np.ndarray], float], ratings, categories: Sequence[Hashable],
                groups: Sequence[Hashable] | None = None, rounds: int = 1000,
                lowest: float = -1) -> dict[Hashable, dict[str, float]]:
    """The statistic with n and interval for each category of units [units]; NaN where a category has fewer than eight
    units, or `groups` [units] of them: the prompts they belong to.

    Ten prompts a category establish nothing about their order: read the intervals before the values.
    """
    ratings, result = _table(ratings), {}
    for category in sorted(set(categories), key=str):
        mine = np.flatnonzero([c == category for c in categories])
        part, of = ratings[:, mine], None if groups is None else [groups[u] for u in mine]
        count = len(mine) if of is None else len({str(g) for g in of})
        few = dict.fromkeys(("value", "low", "high"), np.nan) | {"n": len(mine), "groups": count, "undefined": 0}
        result[category] = few if count < 8 else bootstrap(statistic, part, of, rounds, lowest=lowest)
    return result
