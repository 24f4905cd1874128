"""How fast the ROUGE-L filter of Self-Instruct is, on one core, and that it agrees with the rouge_score package.

    python -m benchmarks.rouge                                  50,000 synthetic instructions, two to three minutes
    python -m benchmarks.rouge instructions=5000 out=...

A synthetic instruction has 4 to 150 words (log-normal, half of them under 14), drawn by Zipf's law from 20,000; one in
five repeats an earlier one with some words changed. `filter` decides which to keep, `neighbours` computes F with
every text kept before, as the ten nearest neighbours and the mean need it. rouge_score is timed on
the 1,000 pairs of the agreement check, and its time for the filter's pairs is extrapolated from there.
"""
from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
import torch

import runtime
from benchmarks.throughput import processor
from collect.rouge import Pool, filter_similar, rouge_l


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/rouge.json"
    instructions: int = 50_000
    seed: int = 0

    def __post_init__(self):
        runtime.check_range("instructions", self.instructions, 100, inf)


def synthetic(count: int, seed: int) -> list[str]:
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    share = 1 / (np.arange(20_000) + 5.0)
    steps = np.cumsum(share / share.sum())
    made: list[str] = []
    for _ in range(count):
        if made and rng.random() < 0.2:
            said = rng.choice(made).split()
            for at in rng.sample(range(len(said)), rng.randrange(1, 2 + len(said) // 2)):
                said[at] = f"w{np.searchsorted(steps, draw.random())}"
        else:
            length = min(150, max(4, int(rng.lognormvariate(2.6, 0.6))))
            said = [f"w{k}" for k in np.searchsorted(steps, draw.random(length))]
        made.append(" ".join(said))
    return made


def agreement(texts: list[str], seed: int, pairs: int = 1000) -> tuple[int, float]:
    """How many of random pairs, half of them near-duplicates, get another F from rouge_score; seconds it takes a pair."""
    from rouge_score.rouge_scorer import RougeScorer

    theirs, rng = RougeScorer(["rougeL"], use_stemmer=False), random.Random(seed)
    drawn = []
    for i in range(pairs):
        a = rng.choice(texts).split()
        b = [word for word in a if rng.random() < 0.7] if i % 2 else rng.choice(texts).split()
        drawn.append((" ".join(a), " ".join(b)))
    start = time.perf_counter()
    scores = [theirs.score(a, b)["rougeL"].fmeasure for a, b in drawn]
    seconds = time.perf_counter() - start
    return sum(rouge_l(a, b) != score for (a, b), score in zip(drawn, scores, strict=True)), seconds / pairs


def main(config: Config) -> None:
    texts = synthetic(config.instructions, config.seed)
    differ, pair_s = agreement(texts, config.seed)
    start = time.perf_counter()
    verdicts = filter_similar(texts)
    filter_s = time.perf_counter() - start
    kept = [text for text, verdict in zip(texts, verdicts, strict=True) if verdict is None]
    pool = Pool()
    start = time.perf_counter()
    for text in kept:
        pool.similarities(text)
        pool.add(text)
    neighbours_s = time.perf_counter() - start
    pairs = np.cumsum([verdict is None for verdict in verdicts])[:-1].sum().item()  # every text with those kept before it
    report = {"command": f"python -m benchmarks.rouge instructions={config.instructions}", "device": processor(torch.device("cpu")),
              "cores": os.cpu_count(), "threads": 1, "instructions": len(texts),
              "mean_words": sum(len(t.split()) for t in texts) / len(texts), "kept": len(kept), "pairs": pairs,
              "filter_s": filter_s, "filter_per_s": len(texts) / filter_s,
              "neighbours_s": neighbours_s, "neighbours_per_s": len(kept) / neighbours_s,
              "rouge_score_pairs_per_s": 1 / pair_s, "rouge_score_hours_extrapolated": pairs * pair_s / 3600,
              "agreement_pairs": 1000, "agreement_differ": differ}
    print(f"{len(texts):,} instructions, {len(kept):,} kept: filter {filter_s:.1f} s ({len(texts) / filter_s:,.0f}/s), "
          f"F with all {neighbours_s:.1f} s ({len(kept) / neighbours_s:,.0f}/s); rouge_score would take {pairs * pair_s / 3600:.0f} h "
          f"for these {pairs:,} pairs; {differ} of 1,000 pairs differ from it")
    runtime.write_text(Path(config.out), json.dumps(report, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
