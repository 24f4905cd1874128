import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from collect.rouge import Pool, f_measure, lcs, places, words

theirs = RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(target: str, prediction: str) -> float:
    a, b = words(target), words(prediction)
    return f_measure(lcs(places(a), len(a), b), len(a), len(b))

def filter_similar(texts: list[str], threshold: float = 0.7) -> list[tuple[int, float] | None]:
    """For each text in order: None if it is kept, else the text kept before it that it repeats, and their F."""
    pool, kept, verdicts = Pool(threshold=threshold), [], []
    for number, text in enumerate(texts):
        near = pool.too_similar(text)
        if near is None:
            pool.add(text)
            kept.append(number)
        verdicts.append(near and (kept[near[0]], near[1]))
    return verdicts


def brute_force(a: list[str], b: list[str]) -> int:
    """The table of the textbook."""
    row = [0] * (len(a) + 1)
    for word in b:
        above = row
        row = [0]
        for i, mine in enumerate(a):
            row.append(above[i] + 1 if mine == word else max(above[i + 1], row[-1]))
    return row[-1]


def texts(rng: random.Random, count: int, longest: int = 20, vocabulary: int = 30) -> list[str]:
    """Random texts, half of them earlier ones with a few words changed, cut, repeated or moved."""
    made: list[str] = []
    for _ in range(count):
        if made and rng.random() < 0.5:
            said = rng.choice(made).split()
            for _ in range(rng.randrange(6)):
                at = rng.randrange(len(said) + 1)
                said[at:at + rng.randrange(3)] = [rng.choice(said)] * rng.randrange(2) if said else []
        else:
            said = [f"w{min(rng.randrange(vocabulary), rng.randrange(vocabulary))}"
                    for _ in range(rng.randrange(longest))]
        made.append(" ".join(said))
    return made


def test_rouge_l_by_hand():
    """"The cat sat." / "the big cat": common "the cat", P = 2/3, R = 2/3, F = 2/3.
    a b c d / d c b a: one word in common order, P = R = 1/4. 10 and 10 words, 7 common: F = 0.7."""
    assert rouge_l("The cat sat.", "the big cat") == pytest.approx(2 / 3)
    assert rouge_l("a b c d", "d c b a") == 0.25
    assert f_measure(7, 10, 10) == 0.7
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("ä ö", "ü") == 0


def test_words_are_runs_of_ascii_letters_and_digits_in_lower_case():
    assert words("Don't over-think: 3.5 CAFÉS_x!") == ["don", "t", "over", "think", "3", "5", "caf", "s", "x"]


def test_bits_give_the_textbooks_subsequence():
    rng = random.Random(0)
    for longest in (3, 10, 64, 65, 150):
        for _ in range(60):
            a, b = ([f"w{rng.randrange(8)}" for _ in range(rng.randrange(longest + 1))] for _ in range(2))
            assert lcs(places(a), len(a), b) == brute_force(a, b)


def test_f_equals_googles_to_the_last_bit():
    rng = random.Random(1)
    made = texts(rng, 600, longest=40) + ["İstanbul ſtraße K 3", "", "..."]
    for _ in range(1000):
        a, b = rng.choice(made), rng.choice(made)
        assert rouge_l(a, b) == theirs.score(a, b)["rougeL"].fmeasure, (a, b)


def test_the_filter_decides_as_brute_force_does():
    for seed, longest in ((2, 8), (3, 20), (4, 20), (5, 100)):
        made = texts(random.Random(seed), 120, longest)
        f = [[rouge_l(earlier, text) for earlier in made[:number]] for number, text in enumerate(made)]
        for threshold in (0.7, 0.4, 0.95):
            kept: list[int] = []
            for number, verdict in enumerate(filter_similar(made, threshold)):
                scores = [f[number][k] for k in kept]
                if scores and max(scores) > threshold:
                    assert verdict == (kept[int(np.argmax(scores))], max(scores))
                else:
                    assert verdict is None
                    kept.append(number)
            assert 0 < len(kept) < len(made)


def test_exactly_the_threshold_passes():
    """10 words each, 7 common: F = 14 / 20 = 0.7; 8 common: 0.8."""
    assert filter_similar(["a b c d e f g h i j", "a b c d e f g x y z"]) == [None, None]
    assert filter_similar(["a b c d e f g h i j", "a b c d e f g h y z"]) == [None, (0, pytest.approx(0.8))]


def test_texts_of_sixty_four_words_and_one_more_are_compared_alike():
    """64 words fill a machine word; the last word of 65 lies beyond it. 63 of 64 (of 65) words in common."""
    for length in (64, 65):
        text = " ".join(f"w{i}" for i in range(length))
        other = text.replace("w0 ", "x ")
        assert rouge_l(text, other) == pytest.approx((length - 1) / length)
        assert Pool([text]).too_similar(other) == (0, rouge_l(text, other))
        assert Pool([text, other]).too_similar(other + " y")[0] == 1


def test_an_empty_pool_and_texts_without_words_repeat_nothing():
    assert Pool().too_similar("anything") is None
    assert filter_similar(["", "", "ü", "a b", "A, B!"]) == [None, None, None, None, (3, 1.0)]
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="threshold"):
            filter_similar([], bad)


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
def test_the_seeds_of_self_instruct_repeat_themselves_twice():
    """175 seeds: 15,225 pairs of mean 0.102, two above 0.7: tasks 47 and 74 (.824), 77 and 113 (.75)."""
    file = Path(os.environ["REAL_DATA"]) / "datasets" / "self_instruct" / "seed_tasks.jsonl"
    seeds = [json.loads(line)["instruction"] for line in file.read_text().splitlines()]
    pairs = np.array([rouge_l(b, a) for i, a in enumerate(seeds) for b in seeds[:i]])
    assert len(pairs) == 15_225 and pairs.mean() == pytest.approx(0.102, abs=5e-4) and (pairs > 0.7).sum() == 2
    again = {i: v for i, v in enumerate(filter_similar(seeds)) if v}
    assert again == {74: (47, pytest.approx(0.824, abs=5e-4)), 113: (77, pytest.approx(0.75))}
