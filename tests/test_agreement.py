import csv
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from judging.agreement import (
    bootstrap,
    by_category,
    cohen_kappa,
    fleiss_kappa,
    gwet_ac1,
    krippendorff_alpha,
    midranks,
    raw_agreement,
    spearman,
)

real = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
NAN = float("nan")


def read(name: str) -> list[dict]:
    with gzip.open(Path(os.environ["REAL_DATA"]) / "judge" / name, "rt") as file:
        return [json.loads(line) for line in file]


def two_by_two(both: int, first: int, second: int, neither: int) -> np.ndarray:
    """Two raters' yes (1) and no (0): both said yes, only the first, only the second, neither."""
    return np.array([[1] * (both + first) + [0] * (second + neither),
                     [1] * both + [0] * first + [1] * second + [0] * neither], dtype=float)


def random_ratings(rng, raters=3, gaps=0.0):
    ratings = rng.integers(1, 5, size=(raters, 30)).astype(float)
    ratings[1:] = np.where(rng.random((raters - 1, 30)) < 0.6, ratings[0], ratings[1:])
    return np.where(rng.random(ratings.shape) < gaps, NAN, ratings)


def test_raw_agreement_by_hand():
    """Ties are 0. Pairs: 1-1 agree, 1-2 not, 0-0 agree, 0-2 not; without ties only the first two: 1 of 2."""
    said = raw_agreement([[1, 1, 0, 0, 1], [1, 2, 0, 2, NAN]], tie=0)
    assert said == {"agreement": 0.5, "n": 4, "agreement_without_ties": 0.5, "n_without_ties": 2}
    # Three raters 1, 1, 2: one of three pairs agrees.
    assert raw_agreement([[1], [1], [2]])["agreement"] == pytest.approx(1 / 3)


def test_cohen_by_hand():
    """20, 5, 10, 15 of 50: p_o = 35/50 = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa = 0.2 / 0.5."""
    assert cohen_kappa(two_by_two(20, 5, 10, 15)) == pytest.approx(0.4)


def test_weighted_cohen_by_hand():
    """1 2 3 against 1 2 1: shares 1/3 1/3 1/3 and 2/3 1/3 0.

    Linear: observed 2/3, expected (1/3 + 2/3 + 5/3) / 3 = 8/9, kappa = 1/4. Quadratic: observed 4/3, expected (1/3 +
    2/3 + 3) / 3 = 4/3.
    """
    ratings = [[1, 2, 3], [1, 2, 1]]
    assert cohen_kappa(ratings, "linear") == pytest.approx(0.25)
    assert cohen_kappa(ratings, "quadratic") == pytest.approx(0)


def test_unused_steps_of_the_scale_still_count():
    """1 2 8 against 1 2 1: observed 7/3, expected (1/3 + 2/3 + 20/3) / 3 = 23/9, kappa = 1 - 21/23; by position 8 would
    be a 3.
    """
    assert cohen_kappa([[1, 2, 8], [1, 2, 1]], "linear") == pytest.approx(2 / 23)


def test_fleiss_by_hand():
    """A A A and A A B: P = 1 and (4 + 1 - 3) / 6 = 1/3, mean 12/18; P_e = 25/36 + 1/36 = 13/18; kappa = -1/18 over
    5/18.
    """
    assert fleiss_kappa([[0, 0], [0, 0], [0, 1]]) == pytest.approx(-0.2)


def test_krippendorff_by_hand():
    """Units 11, 12, 22 and a single 2 that counts for nothing: n = 6, o_12 = o_21 = 1, n_1 = n_2 = 3.

    D_o = 2/6, D_e = 18/30, alpha = 1 - (1/3) / (3/5) = 4/9, at every level since only one distance occurs.
    """
    ratings = [[1, 1, 2, 2], [1, 2, 2, NAN]]
    for level in ("nominal", "ordinal", "interval", "ratio"):
        assert krippendorff_alpha(ratings, level) == pytest.approx(4 / 9)


def test_ac1_by_hand():
    """Cohen's table: p_a = 0.7, yes (0.5 + 0.6) / 2 = 0.55, p_e = 2 * 0.55 * 0.45 = 0.495, AC1 = 0.205 / 0.505."""
    assert gwet_ac1(two_by_two(20, 5, 10, 15)) == pytest.approx(0.205 / 0.505)
    # Units 11, 2 alone, 12: p_a = (1 + 0) / 2; each unit weighs the same in the shares, (1 + 0 + 1/2) / 3 = 1/2, so p_e
    # = 1/2.
    assert gwet_ac1([[1, 2, 1], [1, NAN, 2]]) == pytest.approx(0, abs=1e-12)


def test_kappa_is_low_where_one_label_dominates_and_ac1_is_not():
    """45 of 50 agree on yes, none on no: p_o = 0.9, p_e = 0.94 * 0.96 + 0.06 * 0.04 = 0.9048, kappa = -0.0504."""
    ratings = two_by_two(45, 2, 3, 0)
    assert raw_agreement(ratings)["agreement"] == pytest.approx(0.9)
    assert cohen_kappa(ratings) == pytest.approx(-0.0048 / 0.0952)
    assert gwet_ac1(ratings) > 0.85


def test_spearman_by_hand():
    """Midranks 1 2.5 2.5 4 and 1 3 2 4, centred: 4.5 / sqrt(4.5 * 5)."""
    np.testing.assert_array_equal(midranks([1, 2, 2, 3]), [1, 2.5, 2.5, 4])
    assert spearman([[1, 2, 2, 3, 9], [1, 3, 2, 4, NAN]]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_what_is_undefined_is_nan():
    constant = [[1, 1, 1], [1, 1, 1]]
    for statistic in (cohen_kappa, fleiss_kappa, krippendorff_alpha, gwet_ac1, spearman):
        assert np.isnan(statistic(constant))
    assert np.isnan(spearman([[1, 1, 1], [1, 2, 3]]))
    nobody = np.full((2, 3), NAN)
    for statistic in (cohen_kappa, krippendorff_alpha, gwet_ac1, spearman):
        assert np.isnan(statistic(nobody))
    assert np.isnan(raw_agreement(nobody)["agreement"]) and raw_agreement(nobody)["n"] == 0


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="2 raters"):
        cohen_kappa(np.ones((3, 4)))
    with pytest.raises(ValueError, match="every rater"):
        fleiss_kappa([[1, NAN], [1, 1]])
    with pytest.raises(ValueError, match="level"):
        krippendorff_alpha([[1, 2], [1, 1]], "cardinal")
    with pytest.raises(ValueError, match="weights"):
        cohen_kappa([[1, 2], [1, 1]], "cubic")
    with pytest.raises(ValueError, match="groups"):
        bootstrap(gwet_ac1, np.ones((2, 3)), groups=["x"])


def test_perfect_agreement_is_one():
    ratings = np.tile([1.0, 2, 3, 3], (2, 1))
    for statistic in (cohen_kappa, fleiss_kappa, krippendorff_alpha, gwet_ac1, spearman):
        assert statistic(ratings) == pytest.approx(1)
    assert cohen_kappa(ratings, "linear") == cohen_kappa(ratings, "quadratic") == pytest.approx(1)


def test_order_of_raters_and_units_changes_nothing():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ratings = random_ratings(rng, raters=2, gaps=0.2)
        moved = ratings[::-1, rng.permutation(30)]
        for statistic in (cohen_kappa, gwet_ac1, spearman, krippendorff_alpha,
                          lambda r: krippendorff_alpha(r, "ordinal")):
            assert statistic(moved) == pytest.approx(statistic(ratings), abs=1e-12)
        shuffled = ratings[:, rng.permutation(30)]
        assert bootstrap(gwet_ac1, ratings, rounds=5) == pytest.approx(bootstrap(gwet_ac1, shuffled, rounds=5))


def test_names_of_labels_do_not_matter_to_nominal_statistics():
    rng = np.random.default_rng(1)
    for _ in range(20):
        ratings = random_ratings(rng)
        renamed = np.array([0, 7, 2, 9, 4])[ratings.astype(int)]
        for statistic in (fleiss_kappa, gwet_ac1, krippendorff_alpha):
            assert statistic(renamed) == pytest.approx(statistic(ratings))
        stretched = ratings ** 3  # keeps the order
        assert krippendorff_alpha(stretched, "ordinal") == pytest.approx(krippendorff_alpha(ratings, "ordinal"))
        assert spearman(stretched[:2]) == pytest.approx(spearman(ratings[:2]))


def test_alpha_is_fleiss_corrected_for_size():
    """Without gaps, alpha = kappa + (1 - kappa) / (units * raters)."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        ratings = random_ratings(rng)
        kappa = fleiss_kappa(ratings)
        assert krippendorff_alpha(ratings) == pytest.approx(kappa + (1 - kappa) / ratings.size)


def test_interval_holds_the_value_and_narrows_with_more_units():
    ratings = random_ratings(np.random.default_rng(3))
    few, many = bootstrap(fleiss_kappa, ratings, rounds=300), bootstrap(fleiss_kappa, np.tile(ratings, 9), rounds=300)
    assert few["low"] < few["value"] < few["high"] and few["n"] == 30
    # Nine times the units: a third of the width.
    assert (few["high"] - few["low"]) / (many["high"] - many["low"]) == pytest.approx(3, rel=0.25)
    # ... but not if they are copies of the same thirty prompts.
    copies = bootstrap(fleiss_kappa, np.tile(ratings, 9), groups=list(range(30)) * 9, rounds=300)
    assert copies["high"] - copies["low"] == pytest.approx(few["high"] - few["low"], rel=0.25)


def test_undefined_rounds_are_counted():
    """One unit of two differs: a round misses it with probability 1/4 a draw of two, and its kappa is then
    undefined.
    """
    said = bootstrap(gwet_ac1, [[1, 1], [1, 2]], rounds=400)
    assert said["undefined"] == pytest.approx(100, abs=40)


def test_small_categories_are_not_given_a_number():
    ratings = random_ratings(np.random.default_rng(4), raters=2)
    said = by_category(spearman, ratings, ["math"] * 25 + ["poems"] * 5, rounds=20)
    assert said["math"]["n"] == 25 and said["math"]["value"] == spearman(ratings[:, :25])
    assert said["poems"]["n"] == 5 and np.isnan(said["poems"]["value"])


def test_a_category_needs_eight_prompts_not_eight_pairs():
    ratings = random_ratings(np.random.default_rng(4), raters=2)[:, :24]
    one, eight, own = (by_category(spearman, ratings, ["x"] * 24, groups, rounds=20)["x"] for groups in (
        ["p"] * 24, [f"p{i // 3}" for i in range(24)], None))
    assert (one["n"], one["groups"]) == (24, 1) and np.isnan(one["value"])
    assert eight["groups"] == 8 and eight["value"] == own["value"] == spearman(ratings)


def test_perfect_agreement_is_not_certain():
    """Ten units alike: Wilson leaves 3.8415 / 13.8415 = 0.2775 open, over a share's length 1 or a correlation's 2."""
    same = np.array([[0, 1] * 5, [0, 1] * 5], dtype=float)
    shares = bootstrap(lambda x: raw_agreement(x)["agreement"], same, rounds=50, lowest=0)
    assert (shares["low"], shares["high"]) == pytest.approx((0.7225, 1), abs=1e-4)
    assert bootstrap(spearman, same, rounds=50)["low"] == pytest.approx(1 - 2 * 0.2775, abs=1e-4)


@real
def test_krippendorff_reproduces_the_published_example():
    with open(Path(os.environ["REAL_DATA"]) / "judge" / "agreement" / "codings.csv") as file:
        ratings = [[float(x) if x else NAN for x in row] for row in csv.reader(file)]
    for level, published in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)):
        assert krippendorff_alpha(ratings, level) == pytest.approx(published, abs=5e-4)


@real
def test_pandalm_kappas():
    rows = read("pandalm/human_labels.jsonl.gz")
    ratings = np.array([[row[f"annotator{i}"] for row in rows] for i in (1, 2, 3)], dtype=float)
    pairs = ([0, 1], [1, 2], [0, 2])
    assert sorted(cohen_kappa(ratings[pair]) for pair in pairs) == pytest.approx([0.8520, 0.8617, 0.8789], abs=5e-5)
    raw = sorted(raw_agreement(ratings[pair])["agreement"] for pair in pairs)
    assert raw == pytest.approx([0.913, 0.918, 0.929], abs=5e-4)
    found = [fleiss_kappa(ratings), krippendorff_alpha(ratings), gwet_ac1(ratings)]
    assert found == pytest.approx([0.8642, 0.8642, 0.8864], abs=5e-5)


@real
def test_xstest_kappas():
    for model, agreement, kappa in (("gpt4", 0.984, 0.97), ("llama2orig", 0.964, 0.93)):
        rows = read(f"safety/xstest_{model}.jsonl.gz")
        ratings = [[float(row[f"annotation_{i}"][0]) for row in rows] for i in (1, 2)]
        assert raw_agreement(ratings)["agreement"] == pytest.approx(agreement, abs=5e-4)
        assert fleiss_kappa(ratings) == pytest.approx(kappa, abs=5e-3)


@real
def test_llmbar_accuracy_and_kappa_between_orders():
    folder = Path(os.environ["REAL_DATA"]) / "judge" / "llmbar"
    published = json.loads((folder / "published_statistics.json").read_text())
    for name, accuracy in (("natural_GPT-4_Vanilla_NoRules", 0.935), ("natural_ChatGPT_CoT", 0.740)):
        rows = read(f"llmbar/{name}.jsonl.gz")
        gold = [row["label"] for row in rows]
        said = [[int(row[f"winner_{order}"] or 0) for row in rows] for order in ("noswap", "swap")]  # 0: unparsed
        right = [raw_agreement([gold, verdicts])["agreement"] for verdicts in said]
        assert np.mean(right) == pytest.approx(accuracy)  # an unparsed verdict is wrong
        # The publisher's kappa takes the one unparsed verdict for a 2.
        kappa = cohen_kappa([[v or 2 for v in verdicts] for verdicts in said])
        assert kappa == pytest.approx(published[name]["kappa_agreement"], abs=1e-12)
