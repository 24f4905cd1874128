"""From verdicts to numbers: win rates, length control, MT-Bench, Elo, Bradley-Terry, and how sure they are.

A preference is a number in [0, 1]: 1 the model won, 0 the baseline, 1/2 a draw, in between a probability; NaN is no
verdict, and never counts. A game is two models, an outcome on that scale for `a`, the prompt, and who was shown first.
Intervals resample prompts, never games: two orders and two turns of one prompt are not independent. Every
function that resamples n prompts with one seed draws the same ones, so differences between models are paired.
Where all prompts say the same, resampling would be certain: there Wilson's interval stands, and in ratings Jeffreys'
half a win and half a loss, so that no interval has width zero. tests/test_coverage.py measures how often intervals hold
the truth.
Models and prompts are sorted by name first: the order of rows changes nothing but online Elo.
"""
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from runtime import fail

# ------------------------------------------------------------------------------------- preferences

def alpaca_preference(value: float | str | None) -> float:
    """AlpacaEval's preference, 1 (baseline) to 2 (model), 1.5 or 0 a draw, perhaps as text; None is no verdict."""
    try:
        p = math.nan if value in (None, "") else float(value) or 1.5
    except (TypeError, ValueError):
        p = math.inf
    if p < 1 or p > 2:
        raise ValueError(f"preference is {value!r}, expected a number from 1 to 2, 0 for a draw, or null")
    return p - 1


def label_preference(first_logprob: float | None, second_logprob: float | None, model_first: bool) -> float:
    """The model's preference from the judge's log-probabilities of its one-token labels for the two answers.

        q = e^l1 / (e^l1 + e^l2) is the first answer's (AlpacaEval 2); a label missing from the top has probability 0.
    """
    first, second = (-math.inf if x is None else x for x in (first_logprob, second_logprob))
    if first == second == -math.inf:
        return math.nan
    q = float(sigmoid(first - second))
    return q if model_first else 1 - q


def likert_outcome(rating: int) -> float:
    """Outcome for A of a rating from 1 (A much better) to 8 (B much better)."""
    if rating not in range(1, 9):
        raise ValueError(f"rating is {rating!r}, expected an integer from 1 to 8")
    return float(rating <= 4)


def outcome(x: float, y: float) -> float:
    """1, 0 or 1/2: whether x is above y."""
    return 0.5 + 0.5 * ((x > y) - (x < y))


def both_orders(forward, backward) -> np.ndarray:
    """One outcome for `a` [n] from the games with a first and with b first, both outcomes for a [n].

    A win needs both games; a win and a tie, or a split, is a tie (MT-Bench, arXiv:2306.05685, section 3.4).
    NaN if either game has no verdict.
    """
    forward, backward = np.asarray(forward, dtype=float), np.asarray(backward, dtype=float)
    check_preferences(np.concatenate([forward, backward]))
    same = np.where(forward == backward, forward, 0.5)
    return np.where(np.isnan(forward) | np.isnan(backward), np.nan, same)


def check_preferences(p: np.ndarray) -> None:
    off = p[(p < 0) | (p > 1)]
    if len(off):
        raise ValueError(f"a preference is {off[0]}, expected all in [0, 1] or NaN: use alpaca_preference for [1, 2]")


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))  # unlike 1 / (1 + exp(-x)), no overflow


# -------------------------------------------------------------------------------------- resampling

def draws(n: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """`rounds` times n prompts drawn with replacement, as indices [n]; the same ones for the same n and seed."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        yield rng.integers(n, size=n)


def resample(n: int, rounds: int, seed: int) -> np.ndarray:
    """How often each prompt was drawn in each round [rounds, n]."""
    return np.array([np.bincount(draw, minlength=n) for draw in draws(n, rounds, seed)], dtype=float).reshape(rounds, n)


def percentiles(samples: np.ndarray, level: float = 0.95, n: int = 0) -> np.ndarray:
    """Lower and upper end [2, ...] of the percentile interval of bootstrap samples [rounds, ...]; NaN without any.

    Of few prompts it is too narrow: with `n`, at level 95 %, it is taken as much further out as Student's interval is
    wider than the normal one (Hesterberg 2015, arXiv:1411.5279, "expanded percentile").
    """
    if not len(samples):
        return np.full((2, *samples.shape[1:]), np.nan)
    if n:
        level = 2 * NormalDist().cdf(t975(n - 1) * math.sqrt(n / (n - 1))) - 1 if n > 1 else 1
    low_high = [(1 - level) / 2, (1 + level) / 2]
    return (np.nanquantile if np.isnan(samples).any() else np.quantile)(samples, low_high, axis=0)


# Student's t, 97.5 % quantile, by degrees of freedom 1..30.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
Z975 = 1.959964  # the normal distribution's


def t975(freedom: int) -> float:
    """Student's 97.5 % quantile; above 30 degrees of freedom by its expansion about the normal's, to 1e-4."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = Z975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def wilson(wins: float, n: int) -> tuple[float, float]:
    """95 % interval of a share wins / n (Wilson 1927); NaN for n = 0."""
    if n == 0:
        return math.nan, math.nan
    z, p = Z975, wins / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))  # not -1e-17


def end_interval(value: float, n: int, low: float = 0, high: float = 1) -> tuple[float, float]:
    """95 % interval of the mean of n prompts that all have the same `value`, on a scale from low to high.

    As many as Wilson allows for may be others, and lie at either end; for a share of 0 or 1 it is his interval.
    """
    others = wilson(0, n)[1]
    return value - others * (value - low), value + others * (high - value)


def by_prompt(values, prompts: Sequence | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the valid values of each prompt [P], and their number [P]; None: every value is its own prompt."""
    values = np.asarray(values, dtype=float)
    valid = ~np.isnan(values)
    if prompts is None:
        return np.where(valid, values, 0), valid.astype(float)
    _, index = np.unique([str(p) for p in prompts], return_inverse=True)
    if len(index) != len(values):
        raise ValueError(f"{len(index)} prompts for {len(values)} values")
    return np.bincount(index, np.where(valid, values, 0)), np.bincount(index, valid)


def mean_interval(values, prompts: Sequence | None = None, rounds: int = 1000, seed: int = 0, low: float = 0,
                  high: float = 1) -> tuple[float, float]:
    """95 % interval of the mean of the valid values [n], on a scale from low to high, from resampled prompts.

    For shares, with one yes or no a prompt, Wilson's.
    """
    sums, counts = by_prompt(values, prompts)
    n = int((counts > 0).sum())
    if n == 0:
        return math.nan, math.nan
    mean = float(sums.sum() / counts.sum())
    if counts.max() == 1 and low == 0 and high == 1 and np.isin(sums[counts > 0], (0, 1)).all():
        return wilson(sums.sum(), n)
    with np.errstate(invalid="ignore"):  # a round of prompts without a value is NaN
        samples = np.array([sums[draw].sum() / counts[draw].sum() for draw in draws(len(sums), rounds, seed)])
    if np.nanmax(samples) - np.nanmin(samples) < 1e-9 * (high - low):
        return end_interval(mean, n, low, high)
    return tuple(percentiles(samples, n=n).tolist())


# --------------------------------------------------------------------------------------- win rates

def apply_draws(preferences, draws_as: str) -> np.ndarray:
    """Preferences by a draw rule: "half" a win (AlpacaEval, Elo), "drop" (decided only), "loss" (strictly better)."""
    rules, p = {"half": 0.5, "drop": np.nan, "loss": 0}, np.asarray(preferences, dtype=float)
    check_preferences(p)
    if draws_as not in rules:
        raise ValueError(f"draws_as is {draws_as!r}, expected half, drop or loss")
    return np.where(p == 0.5, rules[draws_as], p)


def win_rate(preferences, prompts: Sequence | None = None, draws_as: str = "half") -> dict[str, float]:
    """Win rate in percent from preferences [n], its standard error, and the counts.

        win_rate = 100 mean p,   standard_error = 100 sd(p) / sqrt(n) with sd over n - 1       (AlpacaEval)

    With several rows a prompt the error is the clustered one: residuals are summed by prompt before they are squared.
    Counts ignore `draws_as`; discrete_win_rate rounds preferences first and halves draws.
    """
    p = np.asarray(preferences, dtype=float)
    used = apply_draws(p, draws_as)
    sums, counts = by_prompt(used, prompts)
    wins, losses, drawn = (int(np.sum(x)) for x in (p > 0.5, p < 0.5, p == 0.5))
    n, clusters = int(counts.sum()), int((counts > 0).sum())
    if n == 0:
        unread = int(np.isnan(p).sum())
        raise ValueError(f"no preference to average: {len(p)} rows, {drawn} draws, {unread} without a verdict")
    mean = sums.sum() / n
    squares = ((sums - mean * counts) ** 2).sum() * clusters / (clusters - 1) if clusters > 1 else math.nan
    return {"win_rate": 100 * mean, "standard_error": 100 * math.sqrt(squares) / n, "n": n,
            "wins": wins, "losses": losses, "draws": drawn, "missing": int(np.isnan(p).sum()),
            "discrete_win_rate": 100 * (wins + drawn / 2) / max(wins + losses + drawn, 1)}


def paired_difference(first, second, prompts: Sequence | None = None) -> dict[str, float]:
    """How much higher the first model's mean preference is, in points, on rows [n] where both have a verdict.

    Two intervals that overlap do not say that two models are equal: prompts hard for one are hard for the other.
    """
    gap = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    gap = np.sort(gap) if prompts is None else gap  # nameless prompts have no order
    sums, counts = by_prompt(gap, prompts)
    if not counts.sum():
        raise ValueError("no row has a verdict for both models")
    low, high = mean_interval(gap, prompts, low=-1, high=1)
    return {"difference": 100 * sums.sum() / counts.sum(), "low": 100 * low, "high": 100 * high,
            "n": int(counts.sum())}


def feature_preference(preferences, model_value, baseline_value, threshold: float = 0,
                       prompts: Sequence | None = None) -> dict[str, float]:
    """Share of decided pairs, with |difference| > threshold in some property, where the answer with more of it won.

    Lengths in characters with threshold 30 (AlpacaEval's verbosity), `distinct_words`, or 0/1 for "has a list".
    Good models write more: compare judges on one model's answers, or models with one judge, but not across both.
    """
    p, model, baseline = (np.asarray(x, dtype=float) for x in (preferences, model_value, baseline_value))
    difference = model - baseline
    used = (np.abs(difference) > threshold) & ((p > 0.5) | (p < 0.5))
    won = np.where(used, (p > 0.5) == (difference > 0), np.nan)
    low, high = mean_interval(won, prompts)
    return {"share": float(np.nanmean(won)) if used.any() else math.nan, "low": low, "high": high, "n": int(used.sum())}


def distinct_words(text: str) -> int:
    return len(set(text.split()))


# --------------------------------------------------------------------------------- length control

def lc_win_rate(theta: float, psi: float, difficulty) -> float:
    """AlpacaEval 2's length-controlled win rate from published weights (Dubois et al. 2024, arXiv:2404.04475).

        logit P(model wins on i) = theta + phi tanh(delta_i) + psi gamma_i
        LC = 100 mean_i sigmoid(theta + psi gamma_i)

    gamma is the instructions' difficulty [n], delta the length difference, set to 0. For two models against
    each other pass the differences of their weights; the baseline has zero weights and gets exactly 50.
    """
    return float(100 * sigmoid(theta + psi * np.asarray(difficulty, dtype=float)).mean())


def length_feature(baseline_length, model_length) -> np.ndarray:
    """tanh((len_1 - len_2) / sd) [n], lengths in characters, sd over n - 1; zero where the difference never varies."""
    delta = np.asarray(baseline_length, dtype=float) - np.asarray(model_length, dtype=float)
    sd = delta.std(ddof=1) if len(delta) > 1 else 0
    return np.tanh(delta / sd) if sd > 0 else np.zeros_like(delta)


def fit_lc(preferences, baseline_length, model_length, difficulty) -> dict[str, float]:
    """The three-term model fitted to one model's rows [n], given the instructions' difficulty [n].

    AlpacaEval adds two gamed baselines as extra rows and an L1 penalty chosen by cross-validation; this is plain
    maximum likelihood, so its numbers approach the published ones without being them.
    """
    p = np.asarray(preferences, dtype=float)
    gamma = np.asarray(difficulty, dtype=float)
    features = np.stack([np.ones(len(p)), length_feature(baseline_length, model_length), gamma], axis=1)
    theta, phi, psi = _logistic(features, p, np.ones((1, len(p))))[0].tolist()
    return {"lc_win_rate": lc_win_rate(theta, psi, gamma[~np.isnan(p)]), "theta": theta, "phi": phi, "psi": psi}


def lc2(preferences, baseline_length, model_length, weights: np.ndarray | None = None,
        prompts: int = 0) -> dict[str, float]:
    """The two-term model: logit P(model wins on i) = theta + phi tanh(delta_i); lc2 = 100 sigmoid(theta).

    Never to be read as AlpacaEval's LC: without the difficulty term weak models come out up to 23 points apart.
    `weights` [rounds, n], from `resample`, add an interval; every round scales lengths by the sd of the full set.
    `prompts` says how many were resampled, for the small ones' correction.
    """
    p = np.asarray(preferences, dtype=float)
    features = np.stack([np.ones(len(p)), length_feature(baseline_length, model_length)], axis=1)
    start = _logistic(features, p, np.ones((1, len(p))))
    theta, phi = start[0].tolist()
    result = {"lc2": float(100 * sigmoid(theta)), "theta": theta, "phi": phi}
    if weights is not None:  # 50 rounds fit the cache
        samples = [_logistic(features, p, weights[i:i + 50], start)[:, 0] for i in range(0, len(weights), 50)]
        low, high = percentiles(100 * sigmoid(np.concatenate(samples)), n=prompts)
        if prompts and np.ptp(p[~np.isnan(p)]) == 0:
            low, high = end_interval(result["lc2"], prompts, 0, 100)
        result |= {"low": float(low), "high": float(high)}
    return result


def _logistic(features: np.ndarray, p: np.ndarray, weights: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Newton's method for logistic regression on soft labels: features [n, k], labels [n], weights [R, n] -> [R, k].

    The ridge keeps a model that always wins finite; it moves AlpacaEval 2's four by less than 0.0001 points.
    """
    valid = ~np.isnan(p)
    check_preferences(p)
    if not valid.any():
        raise ValueError("no preference to fit: every row is without a verdict")
    features, p, weights = features[valid], p[valid], weights[:, valid]
    k, ridge = features.shape[1], 1e-5
    squares = (features[:, :, None] * features[:, None, :]).reshape(-1, k * k)
    beta = np.zeros((len(weights), k)) if start is None else np.repeat(start, len(weights), axis=0)
    labels = (weights * p) @ features
    for _ in range(100):
        q = sigmoid(beta @ features.T)  # [R, n]
        wq = weights * q
        gradient = labels - wq @ features - ridge * beta
        hessian = ((wq - wq * q) @ squares).reshape(-1, k, k) + ridge * np.eye(k)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        # Far from the optimum, where nearly equal lengths put it, Newton overshoots: at most twice as far a step.
        most = np.maximum(2, np.abs(beta).max(axis=1, keepdims=True))
        step *= np.minimum(1, most / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-30))
        beta = beta + step
        if (np.abs(step) < 1e-6 * most).all():  # the error after this step is its square
            return beta
    raise ValueError("the logistic fit did not converge in 100 steps")


# ------------------------------------------------------------------------------------------- games

class Game(NamedTuple):
    a: str
    b: str
    outcome: float | None  # for a: 1 won, 0 lost, 0.5 tied; None or NaN no verdict
    prompt: object         # what intervals resample; compared as text
    a_first: bool = True   # whether a was shown first


class Games(NamedTuple):
    """Games as arrays, in the order given; a and b are exchanged where needed so that a < b."""

    models: list[str]      # [M] sorted names
    a: np.ndarray          # [G] index into models, smaller than b's
    b: np.ndarray          # [G]
    outcome: np.ndarray    # [G] for a: 1, 0.5, 0, NaN no verdict
    prompt: np.ndarray     # [G] 0 .. prompts - 1
    a_first: np.ndarray    # [G] bool
    prompts: int


def collect(rows: Iterable[Game]) -> Games:
    """The games of rows (a, b, outcome, prompt, a_first), checked."""
    rows = [Game(*row) for row in rows]
    if not rows:
        raise ValueError("no games")
    models = sorted({name for g in rows for name in (g.a, g.b)})
    number = {name: i for i, name in enumerate(models)}
    a, b = (np.array([number[name] for name in side]) for side in zip(*((g.a, g.b) for g in rows), strict=True))
    if (a == b).any():
        raise ValueError(f"a game of {models[a[a == b][0]]} against itself")
    outcome = np.array([math.nan if g.outcome is None else g.outcome for g in rows], dtype=float)
    bad = ~np.isnan(outcome) & ~np.isin(outcome, (0, 0.5, 1))
    if bad.any():
        raise ValueError(f"an outcome is {outcome[bad][0]}, expected 1, 0.5, 0 or NaN")
    prompts, prompt = np.unique([str(g.prompt) for g in rows], return_inverse=True)
    turn = a > b
    return Games(models, np.where(turn, b, a), np.where(turn, a, b), np.where(turn, 1 - outcome, outcome), prompt,
                 np.array([bool(g.a_first) for g in rows]) ^ turn, len(prompts))


def position(games: Games) -> dict[str, float]:
    """The share of decided games won by the answer shown first, with its interval, and counts.

    0.5 is no bias if every pair is shown in both orders, or in a random one.
    """
    outcome = np.where(games.a_first, games.outcome, 1 - games.outcome)
    first, second, ties = (int((outcome == x).sum()) for x in (1, 0, 0.5))
    low, high = mean_interval(np.where(outcome == 0.5, np.nan, outcome), games.prompt)
    return {"first_slot_share": first / (first + second) if first + second else math.nan, "low": low, "high": high,
            "first": first, "second": second, "ties": ties, "missing": int(np.isnan(outcome).sum())}


def consistency(forward, backward, prompts: Sequence | None = None) -> dict[str, float]:
    """How many pairs got one verdict twice, from outcomes for a [n] with a first and with b first.

    always_first counts pairs whose two games both named the first slot. Consistent is not correct: give accuracy too.
    """
    f, b = np.asarray(forward, dtype=float), np.asarray(backward, dtype=float)
    valid = ~(np.isnan(f) | np.isnan(b))
    n, same = int(valid.sum()), int((f == b)[valid].sum())
    low, high = mean_interval(np.where(valid, f == b, np.nan), prompts)
    first, second = (int(((f == x) & (b == 1 - x)).sum()) for x in (1, 0))
    return {"consistency": same / n if n else math.nan, "low": low, "high": high, "n": n, "consistent": same,
            "always_first": first, "always_second": second, "missing": len(f) - n}


def records(games: Games) -> dict[str, dict[str, float]]:
    """Wins, losses, ties, and the adjusted win rate (w + t / 2) / n in percent, by model, over all its games."""
    result = {}
    for m, name in enumerate(games.models):
        mine = np.concatenate([games.outcome[games.a == m], 1 - games.outcome[games.b == m]])
        wins, losses, ties = (int((mine == x).sum()) for x in (1, 0, 0.5))
        n = wins + losses + ties
        result[name] = {"wins": wins, "losses": losses, "ties": ties, "n": n, "missing": len(mine) - n,
                        "win_rate": 100 * (wins + ties / 2) / n if n else math.nan}
    return result


# ---------------------------------------------------------------------------------------- MT-Bench

def mt_bench(rows: Iterable[Mapping], categories: Mapping | None = None, rounds: int = 1000, seed: int = 0) -> dict:
    """One model's single-answer scores (arXiv:2306.05685): turn 1, turn 2, and the average of both turns' valid rows.

    rows: {question_id, turn 1 or 2, score}; a score of None or -1 is no verdict and counts as missing. The interval of
    the average resamples questions, both turns together. `categories` maps question_id to a category.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no rows")
    score = np.array([math.nan if r["score"] is None or r["score"] == -1 else r["score"] for r in rows], dtype=float)
    turn = np.array([r["turn"] for r in rows], dtype=int)
    if not np.isin(turn, (1, 2)).all():
        raise ValueError(f"a turn is {turn[~np.isin(turn, (1, 2))][0]}, expected 1 or 2")

    def means(chosen: np.ndarray) -> dict[str, float]:
        valid = chosen & ~np.isnan(score)
        scores = {"turn_1": score[valid & (turn == 1)], "turn_2": score[valid & (turn == 2)], "average": score[valid]}
        return {name: float(x.mean()) if len(x) else math.nan for name, x in scores.items()} | {"n": int(valid.sum())}

    questions = [r["question_id"] for r in rows]
    low, high = mean_interval(score, questions, rounds, seed, 1, 10)
    result = {**means(turn > 0), "low": low, "high": high, "missing": int(np.isnan(score).sum()),
              "duplicates": len(rows) - len(set(zip(questions, turn.tolist(), strict=True)))}
    if categories is not None:
        of = np.array([categories[q] for q in questions], dtype=object)
        result["category"] = {c: means(of == c) for c in dict.fromkeys(categories.values()) if (of == c).any()}
    return result


# --------------------------------------------------------------------------------------------- Elo

INIT = 1000.0                 # where ratings begin, and the mean of all
POINTS = 400 / math.log(10)   # of a nat: odds of ten to one are 400 points


def elo(games: Games, k: float = 4, scale: float = 400, base: float = 10, init: float = INIT) -> dict[str, float]:
    """Online Elo in the order of the games (FastChat's, K = 4 today, 32 in May 2023); the order matters here alone.

        E_a = 1 / (1 + base^((R_b - R_a) / scale)),   R_a += K (S_a - E_a),   R_b -= the same
    """
    rating = [float(init)] * len(games.models)
    for a, b, s in zip(games.a.tolist(), games.b.tolist(), games.outcome.tolist(), strict=True):
        if math.isnan(s):
            continue
        change = k * (s - 1 / (1 + base ** ((rating[b] - rating[a]) / scale)))
        rating[a] += change
        rating[b] -= change
    return dict(zip(games.models, rating, strict=True))


def bootstrap_elo(games: Games, rounds: int = 1000, seed: int = 0, k: float = 32, ends: bool = False) -> np.ndarray:
    """Online Elo [rounds, M] of resampled prompts, games in random order: the order given does not matter.

    `ends` adds the games of `imagined`.
    """
    valid = ~np.isnan(games.outcome)
    columns = [x[valid] for x in (games.prompt, games.a, games.b, games.outcome, games.a_first)]
    prompt, a, b, outcome, _ = (x[np.lexsort(columns[::-1])] for x in columns)
    rng = np.random.default_rng([seed, 1])
    more, extra = imagined(games, rounds, seed, ends)
    a, b, outcome = (np.concatenate([own, added]) for own, added in zip((a, b, outcome), more.T, strict=True))
    a, b, numbers = a.astype(int), b.astype(int), np.arange(len(outcome), dtype=np.int32)
    orders = []
    for draw, added in zip(draws(games.prompts, rounds, seed), extra, strict=True):
        own = np.bincount(draw, minlength=games.prompts)[prompt]
        orders.append(rng.permutation(np.repeat(numbers, np.concatenate([own, added]))))
    # All rounds play their t-th game at once. A round that is over plays one more that counts for nothing.
    over = len(outcome)
    a, b, outcome, stakes = (np.append(x, 0) for x in (a, b, outcome, np.full(over, float(k))))
    games_at = np.full((max((len(order) for order in orders), default=0), rounds), over, dtype=np.int32)
    for r, order in enumerate(orders):
        games_at[: len(order), r] = order
    rating = np.full(rounds * len(games.models), INIT)
    offset = np.arange(rounds) * len(games.models)
    for g in games_at:
        i, j = offset + a[g], offset + b[g]
        change = stakes[g] * (outcome[g] - 1 / (1 + np.exp((rating[j] - rating[i]) / POINTS)))
        rating[i] += change
        rating[j] -= change
    return rating.reshape(rounds, -1)


def elo_table(games: Games, rounds: int = 1000, seed: int = 0, k: float = 32,
              beside: np.ndarray | None = None) -> list[dict]:
    """rating_table of Elo: the median over resampled prompts and random orders, and how far other prompts may move it.

    The spread over rounds is mostly of orders, which the median over orders has none of. What is of prompts is what
    Bradley-Terry's ratings of the same rounds (`beside`, bootstrap_bradley_terry's with prior 1 and `ends`) explain:
    their spread, times the slope of Elo on them.
    """
    samples = bootstrap_elo(games, rounds, seed, k, ends=True)
    beside = bootstrap_bradley_terry(games, rounds=rounds, seed=seed, prior=1, ends=True) if beside is None else beside
    x, middle = beside - beside.mean(axis=0), np.median(samples, axis=0)
    slope = (x * (samples - samples.mean(axis=0))).sum() / max((x * x).sum(), 1e-30)
    spread = middle + max(slope, 0) * (beside - np.median(beside, axis=0))
    return rating_table(games.models, spread, dict(zip(games.models, middle, strict=True)), games.prompts)


def imagined(games: Games, rounds: int, seed: int, ends: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Games to add to a tournament's resampled prompts for pairs whose games all ended alike, lest these seem certain.

    Jeffreys' prior of a share is half a win and half a loss. What other prompts may hold is drawn here: each round has
    as many more wins, and losses, as the negative binomial distribution of mean 1/2 says, which for pairs that n
    prompts decide alike leaves about 3 / n of doubt. Returns the games (a, b, outcome) [K, 3], and how often each is
    played in each round [rounds, K]; none without `ends`.
    """
    pairs, codes = _cells(games)
    prompt, rng, added, times = games.prompt[~np.isnan(games.outcome)], np.random.default_rng([seed, 2]), [], []
    for k, (a, b) in enumerate(pairs.tolist() if ends else ()):
        mine = codes // 3 == k
        if len(set(codes[mine])) == 1:
            each = round(mine.sum() / len(set(prompt[mine])))  # games of a prompt
            added += [(a, b, 1.0), (a, b, 0.0)]
            times += list(each * rng.negative_binomial(0.5, 0.5, (2, rounds)))
    return np.array(added).reshape(-1, 3), np.array(times, dtype=int).reshape(-1, rounds).T


def ranks(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Ranks [M]: 1 + the number of models whose lower end is above one's upper end; overlapping models share one."""
    return 1 + (np.asarray(low)[None, :] > np.asarray(high)[:, None]).sum(axis=1)


def rating_table(models: Sequence[str], samples: np.ndarray, point: Mapping[str, float] | None = None,
                 prompts: int = 0) -> list[dict]:
    """Median (or `point`), 95 % interval and rank of each model from bootstrap ratings [rounds, M], best first."""
    low, high = percentiles(samples, n=prompts)
    middle = np.median(samples, axis=0) if point is None else [point[m] for m in models]
    lines = [{"model": m, "rating": float(r), "low": float(x), "high": float(y), "rank": int(rank)}
             for m, r, x, y, rank in zip(models, middle, low, high, ranks(low, high), strict=True)]
    return sorted(lines, key=lambda line: (-line["rating"], line["model"]))


# ----------------------------------------------------------------------------------- Bradley-Terry

def not_connected(games: Games, ties: str = "half") -> str:
    """Which two models no chain of games joins, so that their ratings have no common scale; "" if there are none."""
    valid = ~np.isnan(apply_draws(games.outcome, "drop" if ties == "drop" else "half"))
    met = np.zeros((len(games.models),) * 2, dtype=bool)
    met[games.a[valid], games.b[valid]] = met[games.b[valid], games.a[valid]] = True
    reached = _reach(met)
    other = games.models[int(np.argmin(reached))]
    return "" if reached.all() else f"no chain of games joins {games.models[0]} to {other}"


def check_ties(games: Games, ties: str) -> None:
    """Refuse games without ties to model, or that fall into groups without a game between them."""
    if ties not in ("half", "drop", "rao_kupper", "davidson"):
        raise ValueError(f"ties is {ties!r}, expected half, drop, rao_kupper or davidson")
    tied, decided = ((games.outcome == 0.5).any(), np.isin(games.outcome, (0, 1)).any())
    if ties in ("rao_kupper", "davidson") and not (tied and decided):
        fail(f"games: {'all are ties' if tied else 'none is a tie'}, so {ties} has nothing to fit: use ties='half'")
    if ties == "drop" and not decided:
        fail("games: all are ties, and ties='drop' leaves none: use ties='half'")
    if apart := not_connected(games, ties):
        fail(f"games: {apart}, expected one group: judge games between them, or rate each group apart")


def _check_finite(games: Games, ties: str) -> None:
    """Ford's condition (1957): ratings are finite only if no group of models never lost or tied against the rest."""
    low, high = (0.5, 0.5) if ties == "drop" else (0, 1)  # a tie counts for both, unless it is dropped
    won, lost = games.outcome > low, games.outcome < high
    beat = np.zeros((len(games.models),) * 2, dtype=bool)
    beat[games.a[won], games.b[won]] = beat[games.b[lost], games.a[lost]] = True
    for edges, never in ((beat, "won"), (beat.T, "lost")):
        some = [games.models[m] for m in np.flatnonzero(_reach(edges))]
        if len(some) < len(games.models):
            fail(f"games: {', '.join(some[:3])}{' ...' * (len(some) > 3)} never {never} against the other models, so "
                 "the ratings are infinite: judge more prompts, or set prior=1")


def _reach(edges: np.ndarray) -> np.ndarray:
    """Nodes [M] that node 0 reaches along edges [M, M]."""
    reached = np.arange(len(edges)) == 0
    for _ in edges:
        reached = reached | edges[reached].any(axis=0)
    return reached


def bradley_terry(games: Games, ties: str = "half", prior: float = 0, init: float = INIT,
                  anchor: tuple[str, float] | None = None) -> dict:
    """Maximum-likelihood ratings (Bradley and Terry 1952); d is the difference of two strengths in nats.

        half         P(a wins) = sigmoid(d), a tie is half a win for each; drop: ties are left out
        rao_kupper   P(a wins) = sigmoid(d - tie), P(b wins) = sigmoid(-d - tie), a tie else  (Rao and Kupper 1967)
        davidson     P(a wins) : P(b wins) : P(tie) = e^(d/2) : e^(-d/2) : e^tie, e^tie his nu       (Davidson 1970)

    Ratings are init + 400 / ln(10) * strength, centred on init, or shifted so that `anchor` (model, rating) holds.
    `prior` plays that many draws of each model against an average one; without it, infinite ratings are refused.
    Returns {"ratings": by model, "strengths": [M] nats, "tie": nats, NaN if not modelled}.
    """
    check_ties(games, ties)
    if not prior:
        _check_finite(games, ties)
    pairs, codes = _cells(games)
    counts = np.bincount(codes, minlength=3 * len(pairs)).reshape(1, -1, 3)
    (strengths,), (tie,) = _strengths(pairs, counts, len(games.models), ties, prior)
    found = init + POINTS * strengths
    found += anchor[1] - found[games.models.index(anchor[0])] if anchor else 0
    return {"ratings": dict(zip(games.models, found.tolist(), strict=True)), "strengths": strengths, "tie": float(tie)}


def bootstrap_bradley_terry(games: Games, ties: str = "half", rounds: int = 1000, seed: int = 0, prior: float = 1e-3,
                            ends: bool = False) -> np.ndarray:
    """Ratings [rounds, M] of resampled prompts.

    `ends` adds the games of `imagined`. A round may leave a model unbeaten: the small prior makes its rating very high
    instead of infinite.
    """
    if prior <= 0:
        raise ValueError(f"prior is {prior}, expected above 0: a resampled tournament may have an unbeaten model")
    check_ties(games, ties)
    pairs, codes = _cells(games)
    prompt = games.prompt[~np.isnan(games.outcome)]
    more, extra = imagined(games, rounds, seed, ends)
    own = {tuple(pair): k for k, pair in enumerate(pairs.tolist())}
    more = np.array([3 * own[int(a), int(b)] + (outcome == 0) for a, b, outcome in more], dtype=int)
    drawn, chunks = zip(draws(games.prompts, rounds, seed), extra, strict=True), [np.empty((0, len(games.models)))]
    for _ in range(0, rounds, 50):  # 50 tournaments fit the cache
        counts = np.array([
            np.bincount(codes, np.bincount(draw, minlength=games.prompts)[prompt], minlength=3 * len(pairs))
            + np.bincount(more, added, minlength=3 * len(pairs)) for draw, added in islice(drawn, 50)])
        chunks.append(_strengths(pairs, counts.reshape(-1, len(pairs), 3), len(games.models), ties, prior)[0])
    return INIT + POINTS * np.concatenate(chunks)


def _cells(games: Games) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that met [P, 2], and for each valid game 3 * pair + (0 a won, 1 b won, 2 tie)."""
    valid = ~np.isnan(games.outcome)
    pairs, index = np.unique(games.a[valid] * len(games.models) + games.b[valid], return_inverse=True)
    kind = np.where(games.outcome[valid] == 1, 0, np.where(games.outcome[valid] == 0, 1, 2))
    return np.stack(np.divmod(pairs, len(games.models)), axis=1), 3 * index + kind


def _strengths(pairs: np.ndarray, counts: np.ndarray, models: int, ties: str,
               prior: float) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method for R tournaments at once: pairs [P, 2], counts of a wins, b wins, ties [R, P, 3] -> [R, M], [R].

    Every likelihood here is concave. Strengths are centred; steps are capped at 2 nats.
    """
    wins, losses, tied = np.moveaxis(counts.astype(float), 2, 0)
    modelled = ties in ("rao_kupper", "davidson")
    if ties == "half":
        wins, losses = wins + tied / 2, losses + tied / 2
    rounds, each = len(wins), np.eye(models)
    side = each[pairs[:, 0]] - each[pairs[:, 1]]  # [P, M]
    squares = (side[:, :, None] * side[:, None, :]).reshape(-1, models**2)
    strengths, tie = np.zeros((rounds, models)), np.zeros(rounds) if ties == "davidson" else np.full(rounds, 0.5)
    for _ in range(200):
        d = strengths @ side.T
        slope, bend, tie_slope, tie_bend, cross = _derivatives(ties, d, tie[:, None], wins, losses, tied)
        q = sigmoid(strengths)
        held = prior * (q * (1 - q))[:, :, None] * each if prior else 1 / models  # their sum is free without a prior
        gradient, hessian = slope @ side + prior * (0.5 - q), (bend @ squares).reshape(-1, models, models) + held
        if modelled:
            mixed, tie_bend = (cross @ side)[:, :, None], tie_bend.sum(axis=1)[:, None, None] + 1e-9
            gradient = np.column_stack([gradient, tie_slope.sum(axis=1)])
            hessian = np.block([[hessian, mixed], [mixed.swapaxes(1, 2), tie_bend]])
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        step *= np.minimum(1, 2 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-30))
        strengths = strengths + step[:, :models]
        if modelled:
            # Rao and Kupper's parameter is positive; in a round without ties, or with nothing else, both would run off.
            new = np.maximum(tie + step[:, models], tie / 3) if ties == "rao_kupper" else tie + step[:, models]
            new = np.clip(new, 1e-6 if ties == "rao_kupper" else -20, 20)
            step[:, models], tie = new - tie, new
        if np.abs(step).max() < 1e-8:
            return strengths - strengths.mean(axis=1, keepdims=True), tie if modelled else np.full(rounds, np.nan)
    raise ValueError("the Bradley-Terry fit did not converge in 200 steps")


def _derivatives(ties: str, d, tie, wins, losses, tied) -> tuple:
    """Of the log-likelihood by pair [R, P]: slope, minus curvature in d; the same in tie; minus the mixed one."""
    if ties == "rao_kupper":
        # Wins and ties enter sigmoid(d - tie), losses and ties sigmoid(-d - tie), ties e^(2 tie) - 1.
        up, down = sigmoid(tie - d), sigmoid(tie + d)  # 1 - sigmoid of each
        left, right = (wins + tied) * up, (losses + tied) * down
        left_bend, right_bend = left * (1 - up), right * (1 - down)
        odds = -np.expm1(-2 * tie)
        return (left - right, left_bend + right_bend, 2 * tied / odds - left - right,
                left_bend + right_bend + 4 * tied * np.exp(-2 * tie) / odds**2, right_bend - left_bend)
    if ties == "davidson":
        n = wins + losses + tied
        top = np.maximum(np.abs(d) / 2, tie)
        parts = np.exp(d / 2 - top), np.exp(-d / 2 - top), np.exp(tie - top)
        a, b, t = (part / sum(parts) for part in parts)
        return ((wins - losses - n * (a - b)) / 2, n * (a + b - (a - b) ** 2) / 4, tied - n * t, n * t * (1 - t),
                -n * (a - b) * t / 2)
    n, q = wins + losses, sigmoid(d)
    return wins - n * q, n * q * (1 - q), 0, 0, 0
