import csv
import gzip
import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import exits

from judging import ratings, tables
from judging.ratings import (
    Game,
    bootstrap_bradley_terry,
    bootstrap_elo,
    both_orders,
    bradley_terry,
    collect,
    elo,
    win_rate,
)

real = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
NAN = math.nan
TIES = ("half", "drop", "rao_kupper", "davidson")


def judge(name: str) -> Path:
    return Path(os.environ["REAL_DATA"]) / "judge" / name


def read(name: str) -> list[dict]:
    with gzip.open(judge(name), "rt") as file:
        return [json.loads(line) for line in file]


def read_csv(name: str) -> list[dict]:
    with open(judge(name), newline="") as file:
        return list(csv.DictReader(file))


def two_models(wins: int, losses: int, ties: int) -> list[Game]:
    """Games of x against y, a prompt each."""
    return [Game("x", "y", s, i) for i, s in enumerate([1] * wins + [0] * losses + [0.5] * ties)]


def tournament(rng, models=5, prompts=40, ties=0.25) -> list[Game]:
    """Every pair on every prompt, order and outcome random, model 0 the weakest."""
    def outcome(i, j):
        return 0.5 if rng.random() < ties else float(rng.random() < 1 / (1 + np.exp(0.4 * (j - i))))

    return [Game(f"m{i}", f"m{j}", outcome(i, j), p, bool(rng.integers(2)))
            for p in range(prompts) for i in range(models) for j in range(i)]


# ------------------------------------------------------------------------------------- preferences

def test_alpaca_preferences_by_hand():
    said = [ratings.alpaca_preference(x) for x in (1, 2, 1.5, 0, "1.25", "0")]
    assert said == [0, 1, 0.5, 0.5, 0.25, 0.5]
    assert math.isnan(ratings.alpaca_preference(None)) and math.isnan(ratings.alpaca_preference(NAN))
    for bad in (3, 0.5, -1, "model", [1]):
        with pytest.raises(ValueError, match="expected a number from 1 to 2"):
            ratings.alpaca_preference(bad)


def test_label_preference_by_hand():
    """log 3 and log 1: the first answer has 3/4. A missing label has probability 0; two missing are no verdict."""
    assert ratings.label_preference(math.log(3), 0, model_first=True) == pytest.approx(0.75)
    assert ratings.label_preference(math.log(3), 0, model_first=False) == pytest.approx(0.25)
    assert (
        ratings.label_preference(None, -9, model_first=True) == 0
        and ratings.label_preference(-9, None, model_first=True) == 1
    )
    assert math.isnan(ratings.label_preference(None, None, model_first=True))


def test_likert_scale():
    assert [ratings.likert_outcome(r) for r in range(1, 9)] == [1, 1, 1, 1, 0, 0, 0, 0]
    for bad in (0, 9, 4.5):
        with pytest.raises(ValueError, match="from 1 to 8"):
            ratings.likert_outcome(bad)


def test_a_win_needs_both_orders():
    said = both_orders([1, 0, 1, 0, 1, 0.5, NAN, 1], [1, 0, 0, 1, 0.5, 0.5, 1, NAN])
    np.testing.assert_array_equal(said, [1, 0, 0.5, 0.5, 0.5, 0.5, NAN, NAN])


# --------------------------------------------------------------------------------------- win rates

def test_win_rate_by_hand():
    """1, 1, 0, 1/2: mean 0.625; sd sqrt(0.6875 / 3) = 0.4787, over sqrt 4, times 100 = 23.94."""
    said = win_rate([1, 1, 0, 0.5, NAN])
    assert (said["win_rate"], said["n"], said["wins"], said["losses"], said["draws"], said["missing"]) == (
        62.5,
        4,
        2,
        1,
        1,
        1,
    )
    assert said["standard_error"] == pytest.approx(100 * math.sqrt(0.6875 / 3) / 2)
    # 0.9 and 0.3 round to a win and a loss.
    assert win_rate([0.9, 0.3])["win_rate"] == pytest.approx(60) and win_rate([0.9, 0.3])["discrete_win_rate"] == 50


def test_draw_rules_by_hand():
    """Two wins, a loss, a draw: half 2.5 of 4, dropped 2 of 3, a draw is no win 2 of 4."""
    rates = [win_rate([1, 1, 0, 0.5], draws_as=rule)["win_rate"] for rule in ("half", "drop", "loss")]
    assert rates == pytest.approx([62.5, 200 / 3, 50])
    with pytest.raises(ValueError, match="draws_as"):
        win_rate([1], draws_as="win")


def test_what_is_no_preference_is_refused():
    for bad in ([], [NAN], [1.5], [-0.1]):
        with pytest.raises(ValueError, match="preference"):
            win_rate(bad)
    with pytest.raises(ValueError, match="preference"):
        win_rate([0.5], draws_as="drop")


def test_asking_a_prompt_twice_makes_nobody_surer():
    p = [1, 0, 0, 0.5, 1, 1]
    once, twice = win_rate(p, prompts=range(6)), win_rate(p * 2, prompts=list(range(6)) * 2)
    assert once == pytest.approx(win_rate(p))
    assert twice["standard_error"] == pytest.approx(once["standard_error"]) and twice["win_rate"] == pytest.approx(
        once["win_rate"]
    )
    assert win_rate(p * 2)["standard_error"] < 0.75 * once["standard_error"]


def test_bootstrap_interval_is_two_standard_errors_wide():
    p = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    low, high = ratings.percentiles(100 * ratings.resample(400, 2000, 0) @ p / 400)
    assert high - low == pytest.approx(2 * 1.96 * win_rate(p)["standard_error"], rel=0.06)


def test_one_seed_draws_the_same_prompts_for_every_model():
    """0.3 better on each of 50 prompts that differ wildly: the paired interval knows only what 50 equal prompts leave
    open, 3.8415 / 53.8415 = 0.07135 of them elsewhere between -100 and 100: 30 - 130 x 0.07135, 30 + 70 x 0.07135."""
    p = np.random.default_rng(0).random(50) * 0.7
    said = ratings.paired_difference(p + 0.3, p)
    assert [said["difference"], said["low"], said["high"]] == pytest.approx([30, 20.725, 34.994], abs=1e-3)
    noisy = ratings.paired_difference([1, 0, 1, NAN, 1], [0, 0, 1, 1, 0.5])
    assert noisy["n"] == 4 and noisy["difference"] == pytest.approx(37.5) and noisy["low"] < 37.5 < noisy["high"]
    assert ratings.paired_difference([0, 0, 1, 1, 0.5], [1, 0, 1, NAN, 1])["difference"] == -noisy["difference"]
    assert ratings.paired_difference([1, NAN, 1, 1, 0], [0.5, 1, 1, 0, 0]) == ratings.paired_difference(
        [1, 1, NAN, 0, 1], [0, 1, 1, 0, 0.5])  # the same rows in another order


@pytest.mark.parametrize("values, prompts, expected", [
    ([1] * 10, None, (0.7225, 1)),                      # Wilson: 10 / (10 + 3.8415)
    ([0] * 10, None, (0, 0.2775)),
    ([1] * 20, [i // 2 for i in range(20)], (0.7225, 1)),   # both orders: ten prompts, not twenty
    ([1, 0] * 10, [i // 2 for i in range(20)], (0.3612, 0.6388)),  # each prompt one half: 0.5 -+ 0.5 x 0.2775
    ([0.5] * 10, None, (0.3612, 0.6388)),
])
def test_no_interval_has_width_zero(values, prompts, expected):
    assert ratings.mean_interval(values, prompts) == pytest.approx(expected, abs=1e-4)


def test_equal_marks_leave_the_ends_of_the_scale_open():
    """Ten marks of 7 on a scale of 1 to 10: 7 - 6 x 0.2775, 7 + 3 x 0.2775."""
    assert ratings.mean_interval([7] * 10, low=1, high=10) == pytest.approx((5.335, 7.833), abs=1e-3)


def test_swapping_sides_mirrors_the_interval():
    rng = np.random.default_rng(0)
    for _ in range(10):
        p, prompts = rng.choice([0, 0.5, 1], 40), rng.integers(0, 25, 40)
        low, high = ratings.mean_interval(p, prompts)
        mirrored = ratings.mean_interval(1 - p, prompts)
        assert mirrored == pytest.approx((1 - high, 1 - low)) and low < np.mean(p) < high


def test_students_t_by_table():
    """Of 1, 10, 40, 120 degrees of freedom."""
    assert [ratings.t975(n) for n in (1, 10, 40, 120)] == pytest.approx([12.706, 2.228, 2.021, 1.980], abs=2e-3)


def test_few_prompts_have_a_wider_interval():
    """Ten prompts: 2.262 sqrt(10 / 9) = 2.384 standard normal units, 99.14 % of the samples."""
    samples = np.linspace(0, 1, 10_001)
    assert ratings.percentiles(samples, n=10) == pytest.approx([0.0086, 0.9914], abs=2e-4)
    assert ratings.percentiles(samples) == pytest.approx([0.025, 0.975], abs=2e-4)


def test_a_pair_that_always_ends_alike_is_not_certain():
    """x beats y on all of 20 prompts: resampling alone gives ratings of width zero."""
    games = collect([("x", "y", 1, i) for i in range(20)])
    for bootstrap, more in ((ratings.bootstrap_bradley_terry, {"prior": 1}), (ratings.bootstrap_elo, {})):
        alone, with_ends = (bootstrap(games, ends=ends, **more) for ends in (False, True))
        assert np.ptp(alone, axis=0).max() < 1e-9
        (x_low, y_low), (x_high, y_high) = ratings.percentiles(with_ends)
        assert x_high - x_low > 20 and x_low > y_high and y_high - y_low == pytest.approx(x_high - x_low)


def test_the_order_of_games_is_not_in_elos_interval():
    """One model wins 60 of 100 prompts: every order gives another Elo, and the printed interval is narrower than the
    spread over orders and prompts, but not than prompts alone make it, which Bradley-Terry's tells."""
    games = collect([("x", "y", float(i < 60), i) for i in range(100)])
    table = {line["model"]: line for line in ratings.elo_table(games)}
    low, high = ratings.percentiles(ratings.bootstrap_elo(games), n=100)[:, 0]
    bt = np.ptp(ratings.percentiles(ratings.bootstrap_bradley_terry(games, prior=1), n=100)[:, 0])
    width = table["x"]["high"] - table["x"]["low"]
    assert table["x"]["rating"] == pytest.approx(np.median(ratings.bootstrap_elo(games)[:, 0]))
    assert 0.6 * bt < width < 0.8 * (high - low)
    assert table["x"]["low"] < table["x"]["rating"] < table["x"]["high"]


def test_imagined_games_are_of_pairs_that_always_end_alike_in_step_with_the_games_of_a_prompt():
    """x against y varies, x against z does not, and has two games a prompt (both orders)."""
    rows = [("x", "y", i % 2, i) for i in range(10)] + [("x", "z", 1, i // 2) for i in range(20)]
    more, times = ratings.imagined(collect(rows), 4000, 0)
    assert more.tolist() == [[0, 2, 1], [0, 2, 0]] and (times % 2 == 0).all()
    assert times.mean() == pytest.approx(1, abs=0.1)  # half a prompt of two games


def test_wilson_by_hand():
    """5 of 10, z^2 = 3.8415: 0.5 -+ 1.96 sqrt(0.025 + 0.0096037) / 1.38415 = 0.5 -+ 0.2634."""
    assert ratings.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert ratings.wilson(0, 10)[0] == pytest.approx(0, abs=1e-12) and math.isnan(ratings.wilson(0, 0)[0])


def test_longer_answers_by_hand():
    """Length differences 50, 50, -50, 10, 50 and a draw: beyond 30 and decided are the first three; longer won 1, 3; 2
    of 3."""
    said = ratings.feature_preference([1, 0, 0, 1, 0.5, NAN], [150, 150, 100, 110, 150, 150],
                                      [100, 100, 150, 100, 100, 100], threshold=30)
    assert said["n"] == 3 and said["share"] == pytest.approx(2 / 3)
    assert ratings.distinct_words("the cat saw the  dog\n") == 4


# --------------------------------------------------------------------------------- length control

def test_lc_from_weights_by_hand():
    """theta log 3, psi 1, difficulties -log 3 and 0: sigmoid(0) = 1/2 and 3/4, mean 62.5. The baseline gets 50."""
    assert ratings.lc_win_rate(math.log(3), 1, [-math.log(3), 0]) == pytest.approx(62.5)
    assert ratings.lc_win_rate(0, 0, [-2, 1]) == 50


def test_length_feature_by_hand():
    """Differences 1 and -1: mean 0, sd sqrt(2 / (2 - 1)), so tanh of -+ 1 / sqrt 2."""
    np.testing.assert_allclose(ratings.length_feature([6, 5], [5, 6]), np.tanh([0.5 ** 0.5, -0.5 ** 0.5]))


def test_length_fits_recover_the_weights_that_made_the_data():
    rng = np.random.default_rng(0)
    one, two, gamma = rng.integers(100, 2000, 300), rng.integers(100, 2000, 300), rng.normal(-1, 1, 300)
    feature = ratings.length_feature(one, two)
    fit = ratings.fit_lc(ratings.sigmoid(0.7 - 1.5 * feature + 0.9 * gamma), one, two, gamma)
    assert [fit["theta"], fit["phi"], fit["psi"]] == pytest.approx([0.7, -1.5, 0.9], abs=1e-3)
    assert fit["lc_win_rate"] == pytest.approx(ratings.lc_win_rate(0.7, 0.9, gamma), abs=0.01)
    p = ratings.sigmoid(0.7 - 1.5 * feature)
    fit = ratings.lc2(p, one, two, ratings.resample(300, 60, 0))
    assert fit["lc2"] == pytest.approx(100 / (1 + math.exp(-0.7)), abs=0.01)  # the win rate at equal length
    assert fit["low"] == pytest.approx(fit["lc2"], abs=0.01) and fit["high"] == pytest.approx(
        fit["lc2"], abs=0.01
    )  # no noise, no width
    assert ratings.lc2(1 - p, two, one)["lc2"] == pytest.approx(100 - fit["lc2"])


def test_length_fits_stay_finite():
    assert 99.9 < ratings.lc2(np.ones(100), np.arange(100), np.arange(100)[::-1])["lc2"] < 100
    assert ratings.lc2([1, 0, NAN], [5, 5, 5], [5, 5, 5])["lc2"] == pytest.approx(50)


# ------------------------------------------------------------------------------ orders and positions

def merge(rows):
    """tables.merge_orders of games, the merged ones as Games, and how many had both orders; the n-th game of one order
    is the n-th repeat."""
    seen, found = Counter(), []
    for g in rows:
        key = g.prompt, *sorted((g.a, g.b)), g.a_first == (g.a < g.b)
        found.append({"judge": "j", "prompt": g.prompt, "repeat": seen[key], "a": g.a, "b": g.b, "a_first": g.a_first,
                      "preference": g.outcome})
        seen[key] += 1
    merged, forward, backward = tables.merge_orders(found)
    return tables.games_of(merged), forward, backward


def test_a_judge_that_always_says_first():
    rows = [g for i in range(20) for g in (Game("x", "y", 1, i), Game("x", "y", 0, i, a_first=False))]
    games, (merged, forward, backward) = collect(rows), merge(rows)
    assert len(merged.outcome) == len(forward) == 20 and ratings.position(games)["first_slot_share"] == 1
    same = ratings.consistency(forward, backward)
    assert same["consistency"] == 0 and same["always_first"] == 20
    for played in (games, merged):
        assert ratings.records(played)["x"]["win_rate"] == ratings.records(played)["y"]["win_rate"] == 50
        assert bradley_terry(played)["ratings"] == pytest.approx({"x": 1000, "y": 1000})
    assert ratings.records(merged)["x"]["ties"] == 20 and win_rate(both_orders(forward, backward))["win_rate"] == 50


def test_consistency_by_hand():
    """Twice x, twice a tie, x then y (always first), y then x (always second), x then a tie, no verdict: 2 of 5."""
    said = ratings.consistency([1, 0.5, 1, 0, 1, NAN], [1, 0.5, 0, 1, 0.5, 1])
    assert [said[name] for name in ("consistent", "n", "always_first", "always_second", "missing")] == [2, 5, 1, 1, 1]
    assert said["consistency"] == 0.4 and (said["low"], said["high"]) == ratings.wilson(2, 5)


def test_games_without_a_partner_are_counted():
    rows = [Game("x", "y", 1, 0), Game("y", "x", 1, 0), Game("x", "y", 0.5, 0), Game("x", "y", 1, 1),
            Game("y", "z", 1, 1, a_first=False)]
    merged, forward, backward = merge(rows)
    # x shown first won; y shown first won: split, both first. The repeat and the games of prompt 1 have no partner.
    assert (forward.tolist(), backward.tolist()) == ([1], [0]) and merged.outcome.tolist() == [0.5, 0.5, 1, 1]


def test_repeats_are_matched_by_their_number():
    """x first: won, lost; then y first: x won, lost. Matched first with first: one win each, no tie."""
    rows = [Game("x", "y", 1, 0), Game("x", "y", 0, 0), Game("x", "y", 1, 0, a_first=False),
            Game("x", "y", 0, 0, a_first=False)]
    assert merge(rows)[0].outcome.tolist() == [1, 0]


def test_prompts_are_resampled_with_all_their_games():
    """Two prompts of two games each, x wins both of the first and neither of the second: a round gives 0, 1/2 or 1,
    never 1/4."""
    sums, counts = ratings.by_prompt([1, 1, 0, 0, NAN], [0, 0, 1, 1, 1])
    weights = ratings.resample(2, 200, 0)
    samples = (weights @ sums) / (weights @ counts)
    assert [(samples == x).sum() for x in (0, 0.5, 1)] == pytest.approx([50, 100, 50], abs=25)
    assert ratings.mean_interval([1, 1, 0, 0, NAN], [0, 0, 1, 1, 1]) == (0, 1)


def test_position_of_a_judge_with_a_known_bias():
    """A judge that takes the first slot 7 times in 10 whatever it holds: the interval holds 0.7, win rates stay 50."""
    rng = np.random.default_rng(0)
    rows = [
        Game("x", "y", float((rng.random() < 0.7) == first), i, first) for i in range(1000) for first in (True, False)
    ]
    said = ratings.position(collect(rows))
    assert said["low"] < 0.7 < said["high"] and said["high"] - said["low"] < 0.05
    merged = ratings.records(merge(rows)[0])
    assert merged["x"]["win_rate"] == pytest.approx(50, abs=3)


# ---------------------------------------------------------------------------------------- MT-Bench

def test_mt_bench_by_hand():
    """Turn 1: 10, 8; turn 2: 3 and an unparsed one. Means 9, 3, pooled 21 / 3 = 7, which is not (9 + 3) / 2."""
    rows = [
        {"question_id": q, "turn": t, "score": s} for q, t, s in ((81, 1, 10), (81, 2, 3), (101, 1, 8), (101, 2, -1))
    ]
    said = ratings.mt_bench(rows, {81: "writing", 101: "reasoning", 111: "math"}, rounds=20)
    assert (said["turn_1"], said["turn_2"], said["average"], said["n"], said["missing"], said["duplicates"]) == (
        9,
        3,
        7,
        3,
        1,
        0,
    )
    assert (
        said["category"]["writing"] == {"turn_1": 10, "turn_2": 3, "average": 6.5, "n": 2}
        and "math" not in said["category"]
    )
    assert math.isnan(said["category"]["reasoning"]["turn_2"])
    assert ratings.mt_bench([*rows, rows[0]], rounds=1)["duplicates"] == 1
    # Ten questions marked 10 throughout: of others up to 3.8415 / 13.8415 may lie at the other end, 9 below.
    best = ratings.mt_bench([{"question_id": q, "turn": t, "score": 10} for q in range(10) for t in (1, 2)])
    assert (best["low"], best["high"]) == (pytest.approx(10 - 9 * 0.27754, abs=1e-4), 10)


# ------------------------------------------------------------------------------- Elo, Bradley-Terry

def test_elos_interval_is_of_the_prompts_however_much_the_order_adds():
    """Three models on 400 prompts: the order of 1,200 games moves Elo by far more than other prompts would, and the
    interval is of the size of Bradley-Terry's, nowhere next to nothing.
    """
    rng = np.random.default_rng(0)
    games = collect(Game(a, b, float(rng.random() < p), i) for i in range(400)
                    for a, b, p in (("x", "y", 0.6), ("x", "z", 0.7), ("y", "z", 0.6)))
    beside = bootstrap_bradley_terry(games, prior=1, ends=True)
    orders = bootstrap_elo(games).std(axis=0)
    width = {line["model"]: line["high"] - line["low"] for line in ratings.elo_table(games)}
    for m, (low, high), noise in zip(games.models, ratings.percentiles(beside, n=400).T, orders, strict=True):
        assert noise > 2 * beside[:, games.models.index(m)].std()
        assert 0.5 < width[m] / (high - low) < 2


def test_elo_by_hand():
    """K = 32 at equal ratings: 16 points. Then 1016 against 984 ties: E = 1 / (1 + 10^(-32/400)) = 0.54592.

    So the change is -32 * 0.045922 = -1.4695.
    """
    assert elo(collect(two_models(1, 0, 0)), k=32) == {"x": 1016, "y": 984}
    said = elo(collect(two_models(1, 0, 1)), k=32)
    assert said == pytest.approx({"x": 1014.5305, "y": 985.4695}, abs=1e-4)
    # Both scale and base only stretch: base e, scale 400 / ln 10 is the same.
    assert elo(collect(two_models(1, 0, 1)), k=32, base=math.e, scale=400 / math.log(10)) == pytest.approx(said)
    assert elo(collect(two_models(1, 0, 1)), k=32, init=0)["x"] == pytest.approx(said["x"] - 1000)


def test_bootstrapped_elo_plays_what_was_drawn():
    """One prompt: every round draws it and plays its game. Two prompts: x wins 0, 1 or 2 times, never another
    number."""
    assert (bootstrap_elo(collect(two_models(1, 0, 0)), rounds=5) == [1016, 984]).all()
    samples = bootstrap_elo(collect(two_models(1, 1, 0)), rounds=200)
    twice = 1016 + 32 * (1 - 1 / (1 + 10 ** (-32 / 400)))
    counts = [np.isclose(samples[:, 0], r).sum() for r in (twice, 2000 - twice)]
    assert counts == pytest.approx([50, 50], abs=20) and np.allclose(samples.sum(axis=1), 2000)


def test_bradley_terry_by_hand():
    """8 wins, 2 losses, 4 ties.

    Half: odds 10 : 4, so 400 log10 2.5 = 159.18 points. Dropped, Davidson: odds 8 : 2, 240.82, nu = 4 / sqrt(16) = 1.
    Rao-Kupper: d - tie = log(8/6), -d - tie = log(2/12), so d = log(8) / 2 and tie = log(4.5) / 2.
    """
    said = {ties: bradley_terry(collect(two_models(8, 2, 4)), ties) for ties in TIES}
    gap = {ties: s["ratings"]["x"] - s["ratings"]["y"] for ties, s in said.items()}
    assert gap == pytest.approx(
        {
            "half": 400 * math.log10(2.5),
            "drop": 400 * math.log10(4),
            "davidson": 400 * math.log10(4),
            "rao_kupper": 200 * math.log10(8),
        }
    )
    assert said["davidson"]["tie"] == pytest.approx(0, abs=1e-9) and said["rao_kupper"]["tie"] == pytest.approx(
        math.log(4.5) / 2
    )
    assert math.isnan(said["half"]["tie"]) and said["half"]["ratings"]["x"] + said["half"]["ratings"][
        "y"
    ] == pytest.approx(2000)
    assert bradley_terry(collect(two_models(8, 2, 4)), anchor=("y", 1114))["ratings"] == pytest.approx(
        {"x": 1114 + gap["half"], "y": 1114}
    )


def log_likelihood(games, strengths, tie: float, ties: str) -> float:
    """Straight from the definitions in bradley_terry's docstring."""
    total = 0.0
    for a, b, s in zip(games.a, games.b, games.outcome, strict=True):
        d = strengths[a] - strengths[b]
        if ties == "davidson":
            parts = math.exp(d / 2), math.exp(-d / 2), math.exp(tie)
            win, loss, drawn = (p / sum(parts) for p in parts)
        elif ties == "rao_kupper":
            win, loss = 1 / (1 + math.exp(tie - d)), 1 / (1 + math.exp(tie + d))
            drawn = 1 - win - loss
        else:
            win, loss = 1 / (1 + math.exp(-d)), 1 / (1 + math.exp(d))
            drawn = 1 if ties == "drop" else math.sqrt(win * loss)
        total += math.log({1: win, 0: loss, 0.5: drawn}[s])
    return total


@pytest.mark.parametrize("ties", TIES)
def test_the_fit_is_the_maximum_of_the_likelihood(ties):
    rng = np.random.default_rng(0)
    for _ in range(5):
        games = collect(tournament(rng, models=4, prompts=15))
        fit = bradley_terry(games, ties)
        best = log_likelihood(games, fit["strengths"], fit["tie"], ties)
        for _ in range(10):
            step, other = 0.01 * rng.normal(size=4), 0.01 * rng.normal()
            assert log_likelihood(games, fit["strengths"] + step, fit["tie"] + other, ties) < best


@pytest.mark.parametrize("ties", TIES)
def test_order_and_sides_of_rows_change_nothing_but_online_elo(ties):
    rng = np.random.default_rng(1)
    rows = tournament(rng)
    mixed = [Game(g.b, g.a, 1 - g.outcome, g.prompt, not g.a_first) if rng.random() < 0.5 else g for g in rows]
    random.Random(0).shuffle(mixed)
    games, same = collect(rows), collect(mixed)
    assert bradley_terry(same, ties)["ratings"] == pytest.approx(bradley_terry(games, ties)["ratings"])
    np.testing.assert_allclose(bootstrap_bradley_terry(same, ties, rounds=20),
                               bootstrap_bradley_terry(games, ties, rounds=20))
    np.testing.assert_array_equal(bootstrap_elo(same, rounds=20), bootstrap_elo(games, rounds=20))
    assert ratings.position(same) == ratings.position(games) and ratings.records(same) == ratings.records(games)
    assert elo(same) != elo(games)


@pytest.mark.parametrize("ties", TIES)
def test_swapping_every_result_mirrors_every_rating(ties):
    rows = tournament(np.random.default_rng(2))
    games, swapped = collect(rows), collect(g._replace(outcome=1 - g.outcome) for g in rows)
    np.testing.assert_allclose(
        bradley_terry(swapped, ties)["strengths"], -bradley_terry(games, ties)["strengths"], atol=1e-9
    )
    samples, mirrored = (bootstrap_bradley_terry(x, ties, rounds=20) for x in (games, swapped))
    np.testing.assert_allclose(mirrored, 2000 - samples, atol=1e-6)
    assert samples.shape == (20, 5) and bootstrap_bradley_terry(games, ties, rounds=120).shape == (120, 5)
    assert {m: 2000 - r for m, r in elo(swapped).items()} == pytest.approx(elo(games))
    assert ratings.position(swapped)["first_slot_share"] == pytest.approx(
        1 - ratings.position(games)["first_slot_share"]
    )
    assert all(
        ratings.records(swapped)[m]["win_rate"] == pytest.approx(100 - r["win_rate"])
        for m, r in ratings.records(games).items()
    )


def test_disconnected_games_are_refused(capsys):
    games = collect([*two_models(1, 1, 1), Game("v", "w", 1, 0), Game("v", "w", 0, 1), Game("w", "x", NAN, 2)])
    for call in (bradley_terry, bootstrap_bradley_terry):
        exits(capsys, lambda call=call: call(games), "no chain of games joins v to x", "rate each group apart")
    dropped = collect([*two_models(1, 1, 0), Game("w", "x", 0.5, 0)])
    exits(capsys, lambda: bootstrap_bradley_terry(dropped, "drop"), "no chain of games joins w to x")


def test_infinite_ratings_are_refused(capsys):
    undefeated = collect(two_models(5, 0, 0))
    exits(capsys, lambda: bradley_terry(undefeated), "x never lost", "prior=1")
    # A tie is half a loss, unless it is dropped.
    tied = collect(two_models(5, 0, 1))
    assert math.isfinite(bradley_terry(tied)["ratings"]["x"]) and math.isfinite(
        bradley_terry(collect(two_models(0, 5, 1)))["ratings"]["x"]
    )
    exits(capsys, lambda: bradley_terry(tied, "drop"), "x never lost")
    exits(capsys, lambda: bradley_terry(collect([*two_models(5, 5, 0), Game("w", "x", 0, 0)])), "w never won")
    # A prior draw each: x has 5.5 of 6 half points' worth of wins; finite, above y, mirrored.
    said = bradley_terry(undefeated, prior=1)["ratings"]
    assert 1000 < said["x"] < 2000 and said["x"] + said["y"] == pytest.approx(2000)
    assert np.isfinite(bootstrap_bradley_terry(undefeated, rounds=5)).all()


def test_a_small_prior_moves_ratings_little_and_misuse_is_refused():
    games = collect(tournament(np.random.default_rng(3)))
    assert bradley_terry(games, prior=1e-3)["ratings"] == pytest.approx(bradley_terry(games)["ratings"], abs=0.01)
    for call, what in ((lambda: bradley_terry(games, "win"), "ties"),
                       (lambda: bootstrap_bradley_terry(games, prior=0), "prior"),
                       (lambda: collect([]), "no games"), (lambda: collect([Game("x", "x", 1, 0)]), "against itself"),
                       (lambda: collect([Game("x", "y", 0.7, 0)]), "outcome")):
        with pytest.raises(ValueError, match=what):
            call()


def test_ties_are_modelled_only_where_some_games_are_ties_and_some_are_not(capsys):
    no_ties, only_ties = collect(two_models(3, 2, 0)), collect(two_models(0, 0, 2))
    for ties in ("davidson", "rao_kupper"):
        for call in (bradley_terry, bootstrap_bradley_terry):
            exits(capsys, lambda call=call, ties=ties: call(no_ties, ties), "none is a tie", ties, "use ties='half'")
            exits(capsys, lambda call=call, ties=ties: call(only_ties, ties), "all are ties")
    exits(capsys, lambda: bradley_terry(only_ties, "drop"), "leaves none")
    assert bradley_terry(only_ties)["ratings"] == pytest.approx({"x": 1000, "y": 1000})


def test_bootstrap_is_centred_on_the_fit_and_resamples_prompts():
    rows = tournament(np.random.default_rng(4), models=3, prompts=100)
    fit = bradley_terry(collect(rows))["ratings"]
    once = ratings.rating_table(collect(rows).models, bootstrap_bradley_terry(collect(rows), rounds=300), fit)
    assert [line["model"] for line in once] == sorted(fit, key=fit.get, reverse=True)
    assert all(line["low"] < line["rating"] < line["high"] for line in once)
    four = ratings.rating_table(collect(rows).models, bootstrap_bradley_terry(collect(rows * 4), rounds=300))
    for a, b in zip(once, sorted(four, key=lambda line: -fit[line["model"]]), strict=True):
        assert b["high"] - b["low"] == pytest.approx(
            a["high"] - a["low"], rel=0.02
        )  # copies of the games, the same prompts


def test_fits_of_random_tournaments_converge():
    rng = np.random.default_rng(5)
    for _ in range(20):
        rows = [*tournament(rng, models=int(rng.integers(2, 9)), prompts=int(rng.integers(2, 6)), ties=0.4),
                Game("m0", "m1", 0.5, 0), Game("m0", "m1", 1, 1)]
        for ties in TIES:
            assert np.isfinite(bootstrap_bradley_terry(collect(rows), ties, rounds=20)).all()
            assert np.isfinite(bradley_terry(collect(rows), ties, prior=0.1)["strengths"]).all()


def test_ranks_by_hand():
    """Intervals 9-10, 7-9.5, 5-6, 5.5-8: the first two overlap, the fourth is under the first only, the third under
    two."""
    assert ratings.ranks([9, 7, 5, 5.5], [10, 9.5, 6, 8]).tolist() == [1, 1, 3, 2]


# --------------------------------------------------------------------------------------- real data

V1 = ("zephyr-7b-beta", "vicuna-13b", "alpaca-7b", "gpt4")
V2 = ("alpaca-7b", "OpenHermes-2.5-Mistral-7B", "FuseChat-Llama-3.1-8B-Instruct", "claude-2.1_concise")


@real
def test_alpaca_eval_verbosity():
    for model, longer, distinct in zip(V1, (0.9125, 0.7460, 0.7098, 0.9719), (0.9123, 0.7392, 0.6962, 0.9590),
                                       strict=True):
        rows = read(f"alpaca_eval_v1/{model}.jsonl.gz")
        p = [ratings.alpaca_preference(row["preference"]) for row in rows]
        lengths, words = ([[row[f"{name}_{side}"] for row in rows] for side in (2, 1)] for name in ("len", "uniq"))
        assert ratings.feature_preference(p, *lengths, threshold=30)["share"] == pytest.approx(longer, abs=5e-5)
        assert ratings.feature_preference(p, *words)["share"] == pytest.approx(distinct, abs=5e-5)


@real
def test_distinct_words_of_the_stored_answers():
    for row in read("alpaca_eval_v1/zephyr-7b-beta.jsonl.gz"):
        assert [ratings.distinct_words(row[f"output_{side}"]) for side in (1, 2)] == [
            row[f"uniq_{side}"] for side in (1, 2)
        ]


@real
def test_preferences_from_label_log_probabilities():
    checked = 0
    for model in V2:
        for row in read(f"alpaca_eval_v2/{model}.jsonl.gz"):
            if "lp_m" in row and row["lp_m"] is not None and row["lp_M"] is not None:
                ours = [ratings.label_preference(row["lp_m"], row["lp_M"], first) for first in (True, False)]
                assert min(abs(p - ratings.alpaca_preference(row["preference"])) for p in ours) < 2e-6
                checked += 1
    assert checked == 3 * 805 - 7  # FuseChat's were not kept, nor those of its draws by 3, 3 and 1


@real
def test_length_controlled_win_rates_from_published_weights():
    difficulty = json.loads(judge("alpaca_eval_v2/difficulty_quantiles_derived.json").read_text())["difficulty"]
    off = {row[""]: abs(ratings.lc_win_rate(float(row["not_gamed_baseline"]), float(row["instruction_difficulty"]),
                                            difficulty) - float(row["length_controlled_winrate"]))
           for row in read_csv("alpaca_eval_v2/lc_weights_and_published.csv")}
    assert len(off) == 50 and off.pop("NullModel") == pytest.approx(0.13, abs=0.005)
    assert max(off.values()) < 0.01


@real
def test_the_two_term_fit_is_near_the_origins_own_code():
    for model, origin in zip(V2, (19.55, 20.65, 65.00, 29.75), strict=True):
        rows = read(f"alpaca_eval_v2/{model}.jsonl.gz")
        p = [ratings.alpaca_preference(row["preference"]) for row in rows]
        assert ratings.lc2(p, *([row[name] for row in rows]
                                for name in ("len_1", "len_2")))["lc2"] == pytest.approx(origin, abs=0.3)


@real
def test_mt_bench_single_scores():
    categories = {q["question_id"]: q["category"]
                  for q in map(json.loads, judge("mt_bench/question.jsonl").read_text().splitlines())}
    said = ratings.mt_bench(read("mt_bench/gpt-4_single_mamba_0_5_dpo_ep3.jsonl.gz"), categories, rounds=20)
    assert (said["turn_1"], said["turn_2"], said["average"]) == (7.7375, 6.8875, 7.3125)
    assert said["n"] == 160 and said["missing"] == said["duplicates"] == 0 and len(said["category"]) == 8
    assert all(c["n"] == 20 for c in said["category"].values())
    assert np.mean([c["average"] for c in said["category"].values()]) == pytest.approx(7.3125)


@real
def test_mt_bench_pairwise():
    rows = read("mt_bench/gpt-4_pair_gpt35_vs_gpt4.jsonl.gz")
    outcome = {"model_1": 1, "model_2": 0, "tie": 0.5}
    merged, forward, backward = merge(Game(r["model_1"], r["model_2"], outcome[r[f"g{g}_winner"]], r["question_id"],
                                           g == 1) for r in rows for g in (1, 2))
    record, same = ratings.records(merged), ratings.consistency(forward, backward)
    assert (record["gpt-4"]["wins"], record["gpt-3.5-turbo"]["wins"], record["gpt-4"]["ties"]) == (3, 2, 5)
    assert (same["consistent"], same["always_first"], same["n"]) == (7, 1, 10)


@real
def test_vicuna_review_totals():
    for other, totals in (("alpaca-13b", (583.0, 704.0)), ("bard", (664.0, 655.5))):
        scores = np.array([row["score"] for row in read(f"vicuna_review/{other}_vs_vicuna-13b.jsonl.gz")])
        assert scores.sum(axis=0).tolist() == list(totals) and len(scores) == 80


@real
def test_llmbar_positions():
    for name, share, equal, unparsed in (
        ("natural_GPT-4_Vanilla_NoRules", 0.505, 97, 0),
        ("natural_ChatGPT_CoT", 0.668, 64, 1),
    ):
        outcome = {"1": 1, "2": 0, None: None}
        rows = [Game("1", "2", outcome[row[f"winner_{order}"]], row["index"], order == "noswap")
                for row in read(f"llmbar/{name}.jsonl.gz") for order in ("noswap", "swap")]
        said, same = ratings.position(collect(rows)), ratings.consistency(*merge(rows)[1:])
        assert said["first_slot_share"] == pytest.approx(share, abs=5e-4) and said["missing"] == unparsed
        assert same["consistent"] == equal and same["n"] + same["missing"] == 100


@real
@pytest.mark.parametrize("name", ["simple", "food"])
def test_ratings_match_an_independent_library(name):
    """Elo K = 4 in file order; Bradley-Terry's p sum to 1; `newman`'s tie parameter is Davidson's, up to p's scale."""
    outcome = {"left": 1, "right": 0, "tie": 0.5}
    games = collect(
        Game(r["left"], r["right"], outcome[r["winner"]], i) for i, r in enumerate(read_csv(f"ratings/{name}.csv"))
    )
    golden = {(r["algorithm"], r["item"]): float(r["score"]) for r in read_csv(f"ratings/{name}-golden.csv")}
    assert elo(games, k=4) == pytest.approx({m: golden["elo", m] for m in games.models}, abs=1e-9)
    for ties, algorithm in (("half", "bradley_terry"), ("davidson", "newman")):
        p = np.exp(bradley_terry(games, ties)["strengths"])
        theirs = np.array([golden[algorithm, m] for m in games.models])
        np.testing.assert_allclose(p / p.sum(), theirs / theirs.sum(), atol=1e-9)
    theirs = 400 * np.log10([golden["bradley_terry", m] for m in games.models])
    ours = bradley_terry(games, init=0)["ratings"]
    np.testing.assert_allclose([ours[m] for m in games.models], theirs - theirs.mean(), atol=1e-6)


@real
def test_pandalm_tournament():
    rows = read("pandalm/human_labels.jsonl.gz")
    outcome = {0: 0.5, 1: 1, 2: 0}
    votes = [
        sorted(row[f"annotator{i}"] for i in (1, 2, 3))[1] for row in rows
    ]  # the median of three is the majority if there is one
    assert [votes.count(v) for v in (0, 1, 2)] == [105, 422, 472]
    games = collect(
        Game(*row["cmp_key"].split("_"), outcome[vote], row["idx"]) for row, vote in zip(rows, votes, strict=True)
    )
    record = ratings.records(games)
    assert sum(r["n"] for r in record.values()) == 2 * 999 and sum(r["ties"] for r in record.values()) == 2 * 105
    for ties in TIES:  # one order of models by win rate and by every model of ties
        fit = bradley_terry(games, ties)["ratings"]
        assert sorted(fit, key=fit.get) == sorted(record, key=lambda m: record[m]["win_rate"])


def test_length_control_ends_where_lengths_hardly_differ_or_decide_everything():
    """Lengths that all but coincide leave the length coefficient to the ridge; whatever the wins, the fit ends."""
    rng = np.random.default_rng(0)
    for n in (2, 20, 60):
        base = rng.integers(15, 25, n)
        for longer in (base + 5, base + rng.integers(4, 6, n), base):
            for p in (np.ones(n), np.where(np.arange(n) % 7, 1, 0.5), (np.arange(n) % 2).astype(float)):
                found = ratings.lc2(p, base, longer, ratings.resample(n, 50, 0))
                assert 0 <= found["low"] <= found["high"] <= 100 and 0 <= found["lc2"] <= 100


