import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import BASE, exits

from collect import raters, spec
from collect.spec import SLIDES, implausible
from data.formats import read
from data.tokenizer import load_tokenizer
from judging.agreement import gwet_ac1

real = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
NAN = math.nan


def said(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# ----------------------------------------------------------------------------------------- targets

def test_targets_add_up_to_what_the_slides_say():
    """Surge: 9,500 prompts; the mean length, 211 on the later slide, is 2,002,859.1 / 9,500 with means of one decimal,
    210.85 with more.
    """
    assert sum(spec.SURGE.values()) == 9500
    mean = sum(spec.SURGE[t] * spec.SURGE_MEAN_LENGTHS[t] for t in spec.SURGE) / 9500
    assert mean == pytest.approx(2002859.1 / 9500) and mean == pytest.approx(210.85, abs=0.05)
    assert sum(spec.INSTRUCTGPT.values()) == pytest.approx(99.9)
    assert sum(spec.PREFERENCE.values()) == pytest.approx(1)


def test_a_category_is_called_as_in_the_targets():
    for name, task in (("closed_qa", "closed_qa"), ("Open QA", "open_qa"), ("open-qa", "open_qa"),
                       ("brainstorming", "brainstorm"),
                       ("summarization", "summarize"), ("information_extraction", "extract"),
                       ("creative_writing", "generation")):
        assert raters.task_of({"category": name}) == task
    assert raters.task_of({}) == raters.task_of({"category": ""}) == "none"


# ------------------------------------------------------------------------------------------ tables

def test_length_table_by_hand():
    """0 1 2 3 10: mean 16/5, squares 114 - 256/5 = 62.8, std sqrt(62.8 / 4); of 1 2 3 4 the quartile lies at 0.75 of
    the first step.
    """
    assert spec.length_table([3, 10, 0, 2, 1]) == pytest.approx(
        {"count": 5, "mean": 3.2, "std": math.sqrt(15.7), "min": 0, "25%": 1, "50%": 2, "75%": 3, "max": 10, "zero": 1})
    four = spec.length_table([4, 1, 3, 2])
    assert [four[q] for q in spec.QUANTILES] == [1, 1.75, 2.5, 3.25, 4]
    assert list(four) == ["count", "mean", "std", "min", "25%", "50%", "75%", "max", "zero"]


def test_missing_lengths_do_not_count_and_one_has_no_deviation():
    assert spec.length_table([NAN, 7])["count"] == 1 and math.isnan(spec.length_table([7])["std"])
    assert spec.length_table([])["count"] == 0 and math.isnan(spec.length_table([])["mean"])


def test_task_table_by_hand():
    table = spec.task_table(["chat", "math", "chat", "chat"], [1, 5, 2, NAN])
    assert table == {"chat": {"count": 3, "share": 0.75, "mean": 1.5}, "math": {"count": 1, "share": 0.25, "mean": 5}}
    assert list(table) == ["chat", "math"]
    with pytest.raises(ValueError, match="2 lengths for 1 tasks"):
        spec.task_table(["chat"], [1, 2])


RECORDS = [{"messages": said("one two", "three", "four five six", "sü")},
           {"prompt": said("a b"), "chosen": "good answer", "rejected": "x", "messages": "ignored"},
           {"prompt": said("a"), "answers": ["worst", "the very best"], "ranks": [1, 0]},
           {"prompt": said("only a prompt")}, {"text": "just some text"}]


def test_fields_are_measured_turn_by_turn():
    """Prompt: all before the last reply; answer: that reply, the chosen one, the best ranked; a plain text is only a
    dialogue.
    """
    for field, lengths in (("prompt", [6, 2, 1, 3, NAN]), ("answer", [1, 2, 3, NAN, NAN]),
                           ("dialogue", [7, 4, 4, 3, 3])):
        np.testing.assert_array_equal(spec.measure(RECORDS, field, "words"), lengths)
    np.testing.assert_array_equal(spec.measure(RECORDS, "answer", "bytes"), [3, 11, 13, NAN, NAN])


def test_tokens_are_the_named_tokenizers_and_a_dialogue_has_its_template():
    tokenizer = load_tokenizer(BASE)
    messages = said("Write a poem about a cat.", "A cat sat.")
    assert spec.measure([{"messages": messages}], "answer", str(BASE)) == [len(tokenizer.encode("A cat sat."))]
    bare = sum(len(tokenizer.encode(m["content"])) for m in messages)
    rendered = len(tokenizer.render(messages)[0]) if tokenizer.template else bare
    assert spec.measure([{"messages": messages}], "dialogue", str(BASE)) == [rendered]


# ------------------------------------------------------------------------------------ plausibility

def test_of_the_slides_tables_only_sagemakers_is_impossible():
    """The textbook's bound alone: 982 sqrt(129) / 128 = 87.1 > 46. With the quartiles it is 101."""
    faults = {name: implausible(table) for name, table in SLIDES.items()}
    assert [name for name, found in faults.items() if found] == ["sagemaker_pilot"]
    assert faults["sagemaker_pilot"] == ["std 46: quantiles and mean allow 100.8 to 201.5"]
    assert len(SLIDES) == 10


def test_five_numbers_are_their_own_quartiles_so_the_bounds_are_exact():
    """0 1 2 3 10: every place of a quantile is a whole number, so mean 3.2 and std 3.962 follow."""
    table = spec.length_table([0, 1, 2, 3, 10])
    assert implausible(table, rounding=1e-6) == []
    for key, wrong in (("mean", 3.3), ("mean", 3.1), ("std", 3.97), ("std", 3.95)):
        assert implausible(table | {key: wrong}, rounding=1e-3), (key, wrong)


def test_disorder_and_emptiness_are_impossible():
    table = spec.length_table(range(100))
    for wrong in ({"25%": 60}, {"min": -1}, {"count": 0}, {"max": 50}):
        assert "expected at least one record, and ordered lengths" in implausible(table | wrong)[0]
    assert implausible(spec.length_table([7]) | {"std": 0.0}) == ["std 0: one record has none"]


def test_no_real_set_is_called_impossible_and_a_wrong_deviation_is():
    rng = np.random.default_rng(0)
    for _ in range(150):
        n = int(rng.integers(1, 60))
        skewed = rng.random() < 0.7
        lengths = rng.lognormal(3, rng.uniform(0.1, 2), size=n).round() if skewed else rng.integers(0, 3, size=n)
        table = spec.length_table(lengths)
        printed = {k: v if k == "count" else round(v) if not math.isnan(v) else v for k, v in table.items()}
        assert implausible(table, rounding=1e-6) == [], lengths
        assert implausible(printed) == [], lengths
        # No deviation exceeds half the range by more than sqrt(n / (n - 1)), and none is below the textbook's bound.
        if n > 1:
            assert implausible(table | {"std": np.ptp(lengths) / 2 * math.sqrt(n / (n - 1)) + 0.1}, rounding=1e-6)
            least = (table["max"] - table["mean"]) * math.sqrt(n) / (n - 1)
            assert implausible(table | {"std": least - 0.1}, rounding=1e-6), lengths


# ------------------------------------------------------------------------------------- comparisons

def test_chi_square_tail_has_the_printed_critical_values():
    for x, dof, p in ((3.841, 1, .05), (5.991, 2, .05), (7.815, 3, .05), (16.919, 9, .05), (18.307, 10, .05),
                      (16.266, 3, .001)):
        assert spec.chi_square_tail(x, dof) == pytest.approx(p, rel=2e-3)
    assert spec.chi_square_tail(0, 3) == spec.chi_square_tail(5, 0) == 1 and spec.chi_square_tail(math.inf, 3) == 0


def test_tasks_against_a_target_by_hand():
    """30 and 10 where 20 and 20 are specified: 100/20 twice is 10, one degree of freedom; against 10 and 30 counted, 4
    x 100/20.
    """
    found = spec.compare_tasks({"chat": 30, "math": 10}, {"chat": 0.5, "math": 0.5})
    assert found == pytest.approx({"task": "chat", "largest": 0.25, "total_variation": 0.25, "chi_square": 10, "dof": 1,
                                   "p": math.erfc(math.sqrt(5)), "least_expected": 20})
    assert spec.compare_tasks({"chat": 30, "math": 10}, {"chat": 50, "math": 50}) == found  # per cent, counts or shares
    sample = spec.compare_tasks({"chat": 30, "math": 10}, {"chat": 10, "math": 30}, target_is_sample=True)
    assert (sample["chi_square"], sample["total_variation"]) == pytest.approx((20, 0.5))
    assert spec.compare_tasks({"chat": 30}, {"chat": 10}, target_is_sample=True)["p"] == 1


def test_a_task_the_target_lacks_is_infinitely_far_and_a_missing_one_is_not():
    assert spec.compare_tasks({"chat": 9, "poems": 1}, {"chat": 1})["chi_square"] == math.inf
    missing = spec.compare_tasks({"chat": 10}, {"chat": 0.5, "math": 0.5})
    assert missing["chi_square"] == pytest.approx(10) and missing["largest"] == 0.5
    with pytest.raises(ValueError, match="expected both positive"):
        spec.compare_tasks({}, {"chat": 1})


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(0)
    shares = np.array(list(spec.PREFERENCE.values()))
    draws = rng.multinomial(500, shares, size=1001)
    fit = [spec.compare_tasks(dict(zip(spec.PREFERENCE, d, strict=True)), spec.PREFERENCE)["p"] for d in draws]
    two = [spec.compare_tasks(dict(enumerate(a)), dict(enumerate(b)), target_is_sample=True)["p"]
           for a, b in zip(draws, draws[1:], strict=False)]
    for level, off in ((0.05, 0.02), (0.5, 0.05)):
        assert np.mean(np.array(fit) < level) == pytest.approx(level, abs=off)
        assert np.mean(np.array(two) < level) == pytest.approx(level, abs=off)
    # of 200 and 200 lengths only some distances occur
    lengths = [spec.compare_lengths(a, b)["p"] for a, b in rng.random((1000, 2, 200))]
    assert 0.02 < np.mean(np.array(lengths) < 0.05) < 0.07


def test_ks_by_hand():
    """1 2 3 and 2 3 4: 1/3 against 0 at 1. 1 1 5 and 1 5 5: 2/3 against 1/3 at 1, where both jump."""
    assert spec.ks_distance([1, 2, 3], [2, 3, 4]) == pytest.approx(1 / 3)
    assert spec.ks_distance([1, 1, 5], [1, 5, 5]) == pytest.approx(1 / 3)
    assert spec.ks_distance([1, 2], [7, 8, 9]) == 1 and spec.ks_distance([4, 2, 2], [2, 4, 2]) == 0


def test_kolmogorovs_tail_has_the_printed_critical_values():
    for x, p in ((1.224, 0.10), (1.358, 0.05), (1.628, 0.01), (1.949, 0.001)):
        assert spec.kolmogorov_tail(x) == pytest.approx(p, rel=0.01)
    assert spec.kolmogorov_tail(0) == 1 and spec.kolmogorov_tail(0.2) == pytest.approx(1, abs=1e-12)
    # Stephens: 25 and 25 lengths, D = 0.4, (3.5355 + 0.12 + 0.0311) 0.4 = 1.4747
    assert spec.compare_lengths(range(25), range(10, 35))["p"] == pytest.approx(spec.kolmogorov_tail(1.4747), rel=1e-3)


def test_ks_of_sets_is_brute_forces_and_of_tables_never_more():
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = (rng.integers(0, rng.integers(2, 60), size=rng.integers(5, 80)) for _ in range(2))
        true = max(abs(np.mean(a <= x) - np.mean(b <= x)) for x in range(60))
        assert spec.ks_distance(a, b) == pytest.approx(true, abs=1e-12)
        slack = 1 / min(len(a), len(b)) + 1e-9
        for x, y in ((spec.length_table(a), b), (a, spec.length_table(b)),
                     (spec.length_table(a), spec.length_table(b))):
            assert spec.ks_distance(x, y) <= true + slack
            assert spec.ks_distance(x, y) == pytest.approx(spec.ks_distance(y, x), abs=1e-12)


def test_pilots_against_instructgpt_as_far_as_tables_tell():
    """Scale: three quarters are at most 24, of InstructGPT's less than one quarter (37). Surge: all by 505, of
    InstructGPT's under 3/4.
    """
    target = spec.TARGET_LENGTHS["instructgpt"]
    assert target == SLIDES["instructgpt_train"]
    assert spec.ks_distance(SLIDES["scale_pilot"], target) == 0.5
    assert spec.ks_distance(SLIDES["surge_pilot"], target) == 0.25
    scale = spec.compare_lengths(SLIDES["scale_pilot"], target)
    assert not scale["exact"] and scale["p"] < 1e-14
    assert spec.ks_distance(target, SLIDES["instructgpt_valid"]) == 0


# ----------------------------------------------------------------------------------------- subsets

def test_largest_remainder_by_hand():
    """7 of 5 : 3 : 2 are 3.5, 2.1, 1.4: 3, 2, 1 and the one left over to .5."""
    assert spec.largest_remainder({"a": 5, "b": 3, "c": 2}, 7) == {"a": 4, "b": 2, "c": 1}
    assert spec.largest_remainder(spec.PREFERENCE, 100)["rewrite"] == 15
    for size in range(1, 200):
        counts = spec.largest_remainder(spec.INSTRUCTGPT, size)
        assert sum(counts.values()) == size
        assert all(abs(counts[t] - size * share / 99.9) < 1 for t, share in spec.INSTRUCTGPT.items())


def test_a_subset_has_the_exact_counts_is_seeded_and_nested():
    labels = list(np.random.default_rng(0).choice(list(spec.PREFERENCE), size=4000))
    chosen = spec.subset(labels, spec.PREFERENCE, 1000, seed=3)
    counts = {t: sum(labels[i] == t for i in chosen) for t in spec.PREFERENCE}
    assert counts == spec.largest_remainder(spec.PREFERENCE, 1000) and chosen == sorted(set(chosen))
    assert chosen == spec.subset(labels, spec.PREFERENCE, 1000, seed=3)
    assert chosen != spec.subset(labels, spec.PREFERENCE, 1000, seed=4)
    assert set(chosen) < set(spec.subset(labels, spec.PREFERENCE, 2000, seed=3))


def test_a_subset_that_a_task_cannot_fill_is_refused_with_the_size_that_fits(capsys):
    """10 chats are a quarter of 40; of 42 they are 10.5, and the first of two equal remainders is rounded up."""
    labels, shares = ["chat"] * 10 + ["math"] * 90, {"chat": 0.25, "math": 0.75}
    exits(capsys, lambda: spec.subset(labels, shares, 42), "'chat' has 10 records, 11 are wanted", "at most 40")
    assert len(spec.subset(labels, shares, 40)) == 40
    exits(capsys, lambda: spec.subset(labels, shares | {"poems": 1}, 4), "'poems' has 0 records", "add some")


def test_a_subset_by_length_has_the_tables_quartiles():
    lengths = np.random.default_rng(0).integers(1, 3000, size=20000)
    target = spec.TARGET_LENGTHS["instructgpt"]
    labels = spec.quarters(lengths, target)
    assert spec.quarters([0, 1, 37, 38, 632, 2048], target) == ["outside", "shortest", "shortest", "shorter", "longer",
                                                                "longest"]
    assert labels.count("outside") == int((lengths > 2048).sum())
    table = spec.length_table(lengths[spec.subset(labels, spec.QUARTERS, 800)])
    assert table["count"] == 800 and table["max"] <= 2048
    for q in ("25%", "50%", "75%"):
        assert table[q] == pytest.approx(target[q], abs=20)  # between the last of one quarter and the first of the next


# ------------------------------------------------------------------------------------------ raters

def labels_of(strength, vendors=None, groups=None, swapped=None, longer=None, prompts=None) -> raters.Labels:
    strength = np.asarray(strength, dtype=float)
    count, pairs = strength.shape
    unknown = np.full(strength.shape, NAN)
    return raters.Labels(
        strength, unknown if swapped is None else np.asarray(swapped, dtype=float), unknown,
        unknown[0] if longer is None else np.asarray(longer, dtype=float), [f"r{i}" for i in range(count)],
        vendors or [f"v{i}" for i in range(count)], groups or ["all"] * pairs, prompts or list(map(str, range(pairs))))


def test_ac2_by_hand():
    """1 2 3 against 1 3 3: weights 1, 3/4, 0; p_a = (1 + 3/4 + 1) / 3 = 11/12; shares 1/3, 1/6, 1/2, sum p (1 - p) =
    11/18, sum w = 6.

    p_e = 6 / (3 x 2) x 11/18 = 11/18, AC2 = (11/12 - 11/18) / (7/18) = 11/14.
    """
    assert gwet_ac1([[1, 2, 3], [1, 3, 3]], "quadratic") == pytest.approx(11 / 14)
    # A step of the scale that nobody uses: q = 4, weights 1 - (d / 3)^2 sum to 4 + 6 (8/9) + 4 (5/9) = 104/9.
    observed, chance = (1 + 8 / 9 + 1) / 3, 104 / 9 / 12 * 11 / 18
    wider = gwet_ac1([[1, 2, 3], [1, 3, 3]], "quadratic", values=[1, 2, 3, 4])
    assert wider == pytest.approx((observed - chance) / (1 - chance))


def test_ac2_of_two_values_is_ac1_and_of_nothing_undefined():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ratings = np.where(rng.random((3, 30)) < 0.2, NAN, rng.integers(0, 2, size=(3, 30)))
        assert gwet_ac1(ratings, "quadratic") == pytest.approx(gwet_ac1(ratings))
    assert math.isnan(gwet_ac1([[1, 1], [1, 1]], "quadratic"))
    assert math.isnan(gwet_ac1([[1, NAN], [NAN, 2]], "quadratic"))


def test_tie_discounted_by_hand():
    """Same choice 1 (whatever the strength), both tie 1, one tie 1/2, opposite 0, one missing nothing: 2.5 of 4."""
    assert raters.tie_discounted(np.array([[1, 0, 0, -2, 1]]), np.array([[3, 0, 1, 2, NAN]])) == pytest.approx(2.5 / 4)


def test_labels_are_collected_whatever_their_order():
    rows = [{"pair": "p", "rater": "b", "strength": 2, "vendor": "x", "group": "chat", "swapped": True, "longer": 5,
             "seconds": 9},
            {"pair": "q", "rater": "a", "strength": -1},
            {"pair": "p", "rater": "a", "strength": 0, "group": "chat", "longer": 5}]
    labels = raters.collect_labels(rows)
    assert (labels.raters, labels.vendors, labels.groups) == (["a", "b"], ["a", "x"], ["chat", "all"])
    np.testing.assert_array_equal(labels.strength, [[0, -1], [2, NAN]])
    np.testing.assert_array_equal(labels.swapped, [[NAN, NAN], [1, NAN]])
    np.testing.assert_array_equal(labels.longer, [5, NAN])


def test_preferences_of_one_pair_meet_whichever_was_chosen():
    """Margin 3 is strength 2.5; "no" comes first in the alphabet, so who chose it is negative."""
    record = {"prompt": said("Is it?"), "chosen": "yes!", "rejected": "no", "annotator": "a", "margin": 3,
              "category": "chat"}
    other = record | {"chosen": "no", "rejected": "yes!", "annotator": "b", "margin": None}
    labels = raters.collect_labels(raters.label_rows([record, other, {"messages": said("x", "y")}]))
    np.testing.assert_array_equal(labels.strength, [[2.5], [-0.5]])
    # A difference of scores under 1/2 must not turn into the other side.
    assert [raters.label_rows([record | {"margin": m}])[0]["strength"] for m in (0, 0.25, 1, 4)] == [0.5, 0.5, 0.5, 3.5]
    assert labels.longer.tolist() == [2] and labels.groups == ["chat"] and labels.prompts == ["Is it?"]


def test_a_rater_who_takes_what_is_shown_first_or_longer_is_seen():
    """One rater always takes what is shown first, one always the longer, the third never ties with either: shares 1 and
    1.
    """
    rng = np.random.default_rng(0)
    swapped, longer = rng.integers(0, 2, size=200), rng.normal(size=200)
    strength = np.stack([np.where(swapped == 1, 1.0, -1.0), np.sign(longer), rng.choice([-1.0, 0.0, 1.0], size=200)])
    table = raters.rater_table(labels_of(strength, swapped=np.tile(swapped, (3, 1)), longer=longer))
    assert table["r0"]["position"]["value"] == 1 and table["r0"]["position"]["low"] > 0.95
    assert table["r1"]["length"]["value"] == 1 and table["r1"]["length"]["n"] == 200
    for rater, bias in (("r0", "length"), ("r1", "position"), ("r2", "position"), ("r2", "length")):
        assert table[rater][bias]["low"] < 0.5 < table[rater][bias]["high"], (rater, bias)
    assert table["r2"]["ties"] == pytest.approx(1 / 3, abs=0.1) and table["r0"]["ties"] == 0


def test_pairs_of_one_prompt_do_not_narrow_a_raters_intervals():
    """Ten prompts of twenty pairs, the rater takes the first slot, or the longer reply, in all pairs of seven: 70 %,
    with an interval as of about ten prompts, not of 200 pairs, where Wilson's is 12 points; nor are ten alike sure.
    """
    prompts = [str(i // 20) for i in range(200)]
    takes = np.where(np.arange(200) < 140, -1.0, 1.0)[None]  # negative: the first reply, shown first
    labels = labels_of(takes, swapped=np.zeros((1, 200)), longer=-np.ones(200), prompts=prompts)
    found = raters.rater_table(labels)["r0"]
    for bias in ("position", "length"):
        assert found[bias]["value"] == pytest.approx(0.7) and found[bias]["n"] == 200
        assert found[bias]["high"] - found[bias]["low"] > 0.4, bias
    two = labels_of(np.concatenate([takes, takes]), ["x", "y"], prompts=prompts)
    among = raters.agreement(two.strength, prompts)["tie-discounted"]
    for x in (raters.vendor_table(two, rounds=50)["x"]["others"], among):
        assert x["value"] == 1 and 0.6 < x["low"] < 0.8 and x["groups"] == 10  # Wilson's of ten of ten: from 0.72
    rows = [{"pair": i, "rater": r, "strength": 1, "prompt": i // 20} for i in range(200) for r in "ab"]
    assert raters.collect_labels(rows).prompts == prompts


def test_a_rater_is_compared_with_the_majority_of_the_others_and_with_gold():
    """r0 against the majority of r1 and r2 (+, tie as they split, -): 1, 1/2, 0; gold is no rater and no vote."""
    strength = [[1, 1, 1], [1, 1, -1], [1, -1, -1], [-1, 1, 1]]
    table = raters.rater_table(labels_of(strength, vendors=["x", "x", "y", "gold"]))
    assert list(table) == ["r0", "r1", "r2"]
    assert table["r0"]["majority"] == pytest.approx(0.5) and table["r0"]["gold"] == pytest.approx(2 / 3)


def test_vendors_are_compared_by_group_of_pairs():
    """x is right on all chats and wrong on all poems; y alone has two raters, who agree fully."""
    gold = np.array([1, -1] * 20)
    x = np.where(np.arange(40) < 20, gold, -gold)
    table = raters.vendor_table(labels_of([gold, x, gold, gold], ["gold", "x", "y", "y"],
                                          ["chat"] * 20 + ["poem"] * 20), rounds=20)
    assert table["x"]["gold"]["value"] == 0.5 and table["y"]["gold"]["value"] == 1
    assert table["x"]["others"]["value"] == 0.5
    assert [table["x"]["gold by group"][g]["value"] for g in ("chat", "poem")] == [1, 0]
    assert math.isnan(table["x"]["alpha"]["value"]) and table["y"]["alpha"]["value"] == 1


def pilot(rng, vendors=4, raters=1, pairs=100, bad=0, unclear=0) -> raters.Labels:
    """Raters see how much better a reply is, Normal(0, 1), through noise of 0.727: two of them then agree on 73 % of
    the pairs.

    The raters of `bad` vendors click blindly, and so do all on the first `unclear` pairs, where both replies are bad.
    """
    seen = rng.normal(size=pairs) + 0.727 * rng.normal(size=(vendors * raters, pairs))
    blind = rng.normal(size=seen.shape)
    seen[:, :unclear] = blind[:, :unclear]
    seen[:bad * raters] = blind[:bad * raters]
    vendor = [f"v{i // raters}" for i in range(vendors * raters)]
    return labels_of(np.sign(seen), vendor, ["unclear"] * unclear + ["clear"] * (pairs - unclear))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bad_vendors_and_bad_prompts_are_told_apart(seed):
    """200 pilots each of four vendors with one rater and 100 pairs: the error rates in find_faults' docstring."""
    rng, rounds = np.random.default_rng(seed), 200
    agree = [np.mean(x.strength[0] == x.strength[1]) for x in (pilot(rng) for _ in range(rounds))]
    assert np.mean(agree) == pytest.approx(0.73, abs=0.01)
    fine = [raters.find_faults(pilot(rng)) for _ in range(rounds)]
    assert sum(bool(f["vendors"] or f["prompts"]) for f in fine) <= 0.01 * rounds
    vendor = [raters.find_faults(pilot(rng, bad=1)) for _ in range(rounds)]
    assert sum(f["vendors"] == ["v0"] for f in vendor) >= 0.93 * rounds
    assert sum(f["vendors"] not in ([], ["v0"]) or bool(f["prompts"]) for f in vendor) <= 0.01 * rounds
    prompts = [raters.find_faults(pilot(rng, unclear=100)) for _ in range(rounds)]
    assert sum("all" in f["prompts"] for f in prompts) >= 0.92 * rounds
    assert sum(bool(f["vendors"]) for f in prompts) <= 0.01 * rounds


def test_bad_prompts_of_one_model_do_not_hide_a_bad_vendor():
    rng = np.random.default_rng(0)
    found = [raters.find_faults(pilot(rng, raters=2, pairs=200, bad=1, unclear=100)) for _ in range(50)]
    assert sum(f == {"prompts": ["unclear"], "vendors": ["v0"], "undecided": []} for f in found) >= 43


def test_what_three_vendors_cannot_tell_is_not_told_by_two():
    """One good and one bad vendor look alike; two bad of four are undecided; two bad of three look like bad pairs, as
    documented.
    """
    rng = np.random.default_rng(0)
    two = raters.find_faults(pilot(rng, vendors=2, bad=1))
    assert two == {"prompts": [], "vendors": [],
                   "undecided": ["fewer than three vendors, gold included, any two with 80 pairs in common"]}
    assert raters.find_faults(pilot(rng, pairs=79))["undecided"] == two["undecided"]
    half = [raters.find_faults(pilot(rng, bad=2)) for _ in range(50)]
    assert sum(bool(f["undecided"]) for f in half) >= 43
    most = [raters.find_faults(pilot(rng, vendors=3, bad=2)) for _ in range(50)]
    assert sum("all" in f["prompts"] for f in most) >= 43


def test_who_always_says_the_same_agrees_with_nobody():
    """Nine in ten for the first reply: 82 % agreement by chance alone, correlation 0 but for noise; always the first:
    exactly 0.
    """
    rng = np.random.default_rng(0)
    strength = np.where(rng.random((3, 2000)) < 0.9, -1.0, 1.0)
    strength[2] = -1
    names, r, above = raters.vendor_correlations(strength, ["x", "y", "z"])
    assert np.mean(strength[0] == strength[1]) > 0.8 and abs(r[0, 1]) < 0.07 and r[0, 2] == r[1, 2] == 0
    assert not above.any()


def test_every_statistic_of_perfect_raters_is_one_with_its_interval():
    strength = np.tile(np.array([-3.5, -1.5, 0.5, 2.5, 3.5] * 8), (3, 1))
    for name, x in raters.agreement(strength, rounds=20).items():
        assert x["value"] == pytest.approx(1) and x["high"] == pytest.approx(1) and x["n"] == 40, name
        assert 0.5 < x["low"] < 1, name  # 40 pairs do not prove perfection


# ------------------------------------------------------------------------------------ the command

def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_the_command_prints_the_tables_draws_and_takes_a_subset(tmp_path, capsys, monkeypatch):
    """40 of each of ten tasks are 10 % where generation has 45.75. Beside 40 chats and 40 rewrites, counted like them,
    66.7 and 13.3 of either are expected and 33.3 and 6.7 of the others: 2 (26.7^2 / 66.7 + 26.7^2 / 13.3) + 8 (6.7^2 /
    33.3 + 6.7) = 192.
    """
    monkeypatch.chdir(tmp_path)
    records = [{"messages": said("word " * (i % 50 + 1), "yes"), "category": task} for i in range(40)
               for task in spec.SURGE]
    one = write(Path("one.jsonl"), records)
    two = write(Path("two.jsonl"), [r for r in records if r["category"] in ("chat", "rewrite")])
    spec.main([one, "--target", "surge", "--compare", two, "--figure", "f.png", "--subset", "50", "--out",
               "drawn.jsonl"])
    out = capsys.readouterr().out
    assert "400 records (messages), 0 rejected" in out and "Length, words" in out and "45.7" in out and "449.1" in out
    rows = {line.split()[0]: line.split()[1:] for line in out[out.index("Distance"):].splitlines() if line}
    assert float(rows["surge"][0]) == pytest.approx(-35.7) and rows["surge"][1] == "generation"
    assert float(rows["two.jsonl"][0]) == -40 and float(rows["two.jsonl"][3]) == 192
    assert Path("f.png").read_bytes()[:4] == b"\x89PNG"
    kept = list(read("drawn.jsonl")[0])
    assert {t: sum(r["category"] == t for r in kept) for t in spec.SURGE} == spec.largest_remainder(spec.SURGE, 50)


def test_tables_in_other_units_are_not_compared(tmp_path, capsys):
    """InstructGPT's lengths are in tokens: words and bytes get no distance from them, a tokenizer's tokens do."""
    one = write(tmp_path / "one.jsonl", [{"messages": said("word " * (i + 1), "yes"), "category": "chat"}
                                         for i in range(20)])
    for unit, compared in (("words", False), ("bytes", False), (str(BASE), True)):
        spec.main([one, "--target", "instructgpt", "--unit", unit])
        out = capsys.readouterr().out
        assert (">= " in out[out.index("Distance"):]) == compared == ("not to be compared" not in out)
    exits(capsys, lambda: spec.main([one, "--target", "instructgpt", "--by", "lengths", "--subset", "4", "--out",
                                     str(tmp_path / "x")]), "quartiles are in tokens, not in words")


def test_the_command_prints_the_pilots_with_their_flags(capsys):
    spec.main(["--pilots"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "allow 100.8 to 201.5" in rows["sagemaker_pilot"] and rows["surge_pilot"].endswith("possible")
    exits(capsys, lambda: spec.main([]), "names no file")


def test_the_command_prints_agreement_where_records_have_raters(tmp_path, capsys):
    rng = np.random.default_rng(0)
    records = []
    for i in range(60):
        for rater in ("a", "b", "c"):
            good = rng.random() < (0.9 if rater != "c" else 0.5)
            records.append({"prompt": f"q{i}", "chosen": "right" if good else "wrong",
                            "rejected": "wrong" if good else "right",
                            "annotator": rater, "category": "chat", "margin": 2})
    spec.main([write(tmp_path / "p.jsonl", records)])
    out = capsys.readouterr().out
    assert "3 raters, 60 pairs that two or more of them rated" in out and "Gwet's AC1" in out
    assert "Undecided: fewer than three" in out


def test_what_the_user_wrote_wrong_is_one_line(tmp_path, capsys):
    one = write(tmp_path / "one.jsonl", [{"messages": said("a", "b"), "category": "chat"}])
    exits(capsys, lambda: spec.main([one, "--unit", "word"]), "--unit word", "words, bytes")
    exits(capsys, lambda: spec.main([one, "--subset", "3"]), "--subset, --out and --target")
    exits(capsys, lambda: spec.main([one, "--target", "surge", "--by", "lengths"]), "no table of lengths",
          "instructgpt")
    exits(capsys, lambda: spec.main([write(tmp_path / "bad.jsonl", [{"x": 1}])]), "none of its 1 records")


# ---------------------------------------------------------------------------------------- real data

@real
def test_pandalm_measured_values():
    """999 pairs x 3 raters: pairwise raw .913 .929 .918, Cohen .852 .879 .862, Fleiss and alpha .8642, AC1 .8864."""
    with gzip.open(Path(os.environ["REAL_DATA"]) / "judge" / "pandalm" / "human_labels.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    labels = raters.collect_labels({"pair": row["idx"], "rater": f"annotator{i}",
                                    "strength": {0: 0, 1: -1, 2: 1}[row[f"annotator{i}"]],
                                  "group": row["cmp_key"]} for row in rows for i in (1, 2, 3))
    assert labels.strength.shape == (3, 999)
    found = {name: statistic(labels.strength) for name, statistic in raters.STATISTICS.items()}
    assert found["raw agreement"] == pytest.approx((0.913 + 0.929 + 0.918) / 3, abs=5e-4)
    assert found["Cohen's kappa, mean of pairs"] == pytest.approx((0.852 + 0.879 + 0.862) / 3, abs=5e-4)
    for name, value in (("Fleiss' kappa, pairs all rated", .8642), ("Krippendorff's alpha", .8642),
                        ("Gwet's AC1", .8864)):
        assert found[name] == pytest.approx(value, abs=5e-5)
    assert found["raw agreement"] < found["tie-discounted"] < 1  # half of what a tie against a choice costs
    assert raters.find_faults(labels) == {"prompts": [], "vendors": [], "undecided": []}
    assert all(x["majority"] > 0.9 for x in raters.rater_table(labels).values())
    with_noise = np.where(np.arange(3)[:, None] == 1, np.random.default_rng(0).choice([-1.0, 1.0], size=999),
                          labels.strength)
    assert raters.find_faults(labels_of(with_noise))["vendors"] == ["v1"]


@real
def test_xstest_measured_values():
    for model, kappa in (("gpt4", 0.970), ("llama2orig", 0.929)):
        with gzip.open(Path(os.environ["REAL_DATA"]) / "judge" / "safety" / f"xstest_{model}.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file]
        kinds = {"1_full_compliance": -1, "3_partial_refusal": 0, "2_full_refusal": 1}
        strength = np.array([[kinds[row[f"annotation_{i}"]] for row in rows] for i in (1, 2)], dtype=float)
        assert raters.STATISTICS["Cohen's kappa, mean of pairs"](strength) == pytest.approx(kappa, abs=5e-4)


@real
def test_published_sets_have_plausible_tables():
    """Every set's table passes the check made for tables from elsewhere, and its own table is no distance from it."""
    folder = Path(os.environ["REAL_DATA"]) / "datasets"
    for name in ("alpaca/alpaca_en_300.json", "gsm8k/test_300.jsonl", "self_instruct/user_oriented_instructions.jsonl"):
        records = list(read(folder / name)[0])
        lengths = spec.measure(records, "prompt", "words")
        table = spec.length_table(lengths)
        assert table["count"] == len(records) and implausible(table) == []
        assert spec.ks_distance(lengths, table) <= 1 / len(records) + 1e-9
