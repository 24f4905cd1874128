"""The ROUGE-L filter of Self-Instruct beside the rouge_score package: the same F, much faster, on one core.

    WRITE=1 python -m pytest tests/test_rouge_speed.py    50,000 instructions, to benchmarks/results/rouge.json; minutes

A synthetic instruction has 4 to 150 words (log-normal, half of them under 14), drawn by Zipf's law from 20,000; one in
five repeats an earlier one with some words changed. rouge_score is timed on pairs of which half are near-duplicates;
its time for the filter's pairs is extrapolated from there.
"""
import json
import os
import random

import numpy as np
import torch
from conftest import ROOT
from rouge_score.rouge_scorer import RougeScorer
from test_rouge import filter_similar, rouge_l

from benchmarks.measure import machine, timed

WRITE = "WRITE" in os.environ
INSTRUCTIONS, PAIRS = (50_000, 1000) if WRITE else (1000, 100)


def synthetic(count: int) -> list[str]:
    """Random instructions."""
    rng, draw = random.Random(0), np.random.default_rng(0)
    share = 1 / (np.arange(20_000) + 5.0)
    steps = np.cumsum(share / share.sum())
    made: list[str] = []
    for _ in range(count):
        if made and rng.random() < 0.2:
            words = rng.choice(made).split()
            for at in rng.sample(range(len(words)), rng.randrange(1, 2 + len(words) // 2)):
                words[at] = f"w{np.searchsorted(steps, draw.random())}"
        else:
            length = min(150, max(4, int(rng.lognormvariate(2.6, 0.6))))
            words = [f"w{k}" for k in np.searchsorted(steps, draw.random(length))]
        made.append(" ".join(words))
    return made


def drawn_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """Two texts, or one and what is left of it when words are dropped, in turns."""
    rng = random.Random(0)
    found = []
    for i in range(PAIRS):
        a = rng.choice(texts)
        b = " ".join(word for word in a.split() if rng.random() < 0.7) if i % 2 else rng.choice(texts)
        found.append((a, b))
    return found


def test_the_filter_agrees_with_rouge_score_and_is_faster():
    texts, theirs = synthetic(INSTRUCTIONS), RougeScorer(["rougeL"], use_stemmer=False)
    some = drawn_pairs(texts)
    scores, pairs_s = timed(lambda: [theirs.score(a, b)["rougeL"].fmeasure for a, b in some])
    verdicts, filter_s = timed(filter_similar, texts)
    kept = [text for text, verdict in zip(texts, verdicts, strict=True) if verdict is None]
    compared = np.cumsum([verdict is None for verdict in verdicts])[:-1].sum().item()  # each with those kept before it
    differ = sum(rouge_l(a, b) != score for (a, b), score in zip(some, scores, strict=True))
    if WRITE:
        report = {"command": "WRITE=1 python -m pytest tests/test_rouge_speed.py", **machine(torch.device("cpu")),
                  "threads": 1, "instructions": len(texts),
                  "mean_words": sum(len(text.split()) for text in texts) / len(texts), "kept": len(kept),
                  "pairs": compared, "filter_s": filter_s, "filter_per_s": len(texts) / filter_s,
                  "rouge_score_pairs_per_s": PAIRS / pairs_s,
                  "rouge_score_hours_extrapolated": compared * pairs_s / PAIRS / 3600,
                  "agreement_pairs": PAIRS, "agreement_differ": differ}
        (ROOT / "benchmarks" / "results" / "rouge.json").write_text(json.dumps(report, indent=1) + "\n")
    assert differ == 0 and 10 * filter_s < compared * pairs_s / PAIRS
