"""How often compare.py says that two equal things differ, and how often it finds a difference that is there.

    python -m benchmarks.calibration

After `make demo`. One DPO configuration of the tiny world is trained with `seeds` seeds, from one SFT model on the same
preferences, and every result is judged once:

    null      groups of 3 (or 5) of these runs are compared with as many others. Nothing differs but the seeds, so 5 %
              of the intervals may exclude zero. A partition shuffles the pool and cuts it into disjoint groups: its
              comparisons share no run; those of different partitions do.
    planted   the same with a change that is known to matter, trained with the same seeds. Its true size is the mean
              over all seeds; found: the interval lies on that side of zero. Paired by seed, as compare.py does.

RESULTS.md says how to read the intervals. At the end README's edit of a loss is compared from nothing, and timed.
"""
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np
import torch

import compare
import runtime
from benchmarks.measure import machine, save
from judging import paired

BASE = "dpo.py --config configs/tiny/dpo.toml"
HALF = "runs/tiny/0/pairs_half.jsonl"
PLANTED = {"beta x 3": "beta=0.9", "half the data": f"data={HALF}"}


@dataclass(frozen=True)
class Config:
    seeds: int = 24                  # of the pool
    planted_seeds: int = 12          # of each planted change
    partitions: int = 25             # of the pool into groups
    jobs: int = 2
    out: str = "runs/calibration"    # folder of the runs
    results: str = "benchmarks/results/calibration.json"

    def __post_init__(self):
        runtime.check_ranges(self, seeds=(10, compare.SEEDS), planted_seeds=(5, self.seeds), partitions=(1, 10**6),
                             jobs=(1, 64))


# ----------------------------------------------------------------------------------- the comparisons

def groups(seeds: int, size: int, partitions: int) -> Iterator[list[int]]:
    """Groups of seeds, those of a partition disjoint."""
    for partition in range(partitions):
        order = list(range(seeds))
        random.Random(f"partition {partition}").shuffle(order)
        for first in range(0, seeds - size + 1, size):
            yield order[first : first + size]


def share(count: int, n: int) -> dict:
    """count / n in percent, with the exact binomial interval (Clopper and Pearson 1934)."""
    def solve(tail, target: float) -> float:
        """The p at which a tail that rises with p has this probability."""
        low, high = 0.0, 1.0
        for _ in range(60):
            p = (low + high) / 2
            low, high = (p, high) if tail(p) < target else (low, p)
        return low

    def at_least(k: int, p: float) -> float:
        return sum(comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))

    low = solve(lambda p: at_least(count, p), 0.025) if count else 0.0
    high = solve(lambda p: at_least(count + 1, p), 0.975) if count < n else 1.0
    return {"value": 100 * count / n, "low": 100 * low, "high": 100 * high}


def null(pool: np.ndarray, size: int, partitions: int) -> dict:
    """Comparisons of the pool [seeds, dialogues] with itself."""
    found = [paired.estimate(pool[both[size:]] - pool[both[:size]]) for both in groups(len(pool), 2 * size, partitions)]
    wrong = sum(f.excludes_zero for f in found)
    alone = sum(abs(f.mean) > f.dialogues_half for f in found)
    return {"seeds": size, "comparisons": len(found), "excluded_zero": wrong, "share": share(wrong, len(found)),
            "dialogues_only_excluded_zero": alone, "dialogues_only_share": share(alone, len(found)),
            "mean_half": float(np.mean([f.half for f in found])),
            "dialogues_only_mean_half": float(np.mean([f.dialogues_half for f in found]))}


def expected(pool: np.ndarray, size: int, partitions: int, pools: int = 400) -> dict:
    """The share of `null` over simulated pools with the variances of this one: mean, and the middle 95 % of pools."""
    rng, rows = np.random.default_rng(0), pool.mean(axis=1)
    rest = pool - rows[:, None] - pool.mean(axis=0) + pool.mean()
    rest_variance = (rest**2).sum() / ((len(pool) - 1) * (pool.shape[1] - 1))
    seed_variance = max(0.0, rows.var(ddof=1) - rest_variance / pool.shape[1])
    shares = []
    for _ in range(pools):
        drawn = rng.normal(0, seed_variance**0.5, (len(pool), 1)) + rng.normal(0, rest_variance**0.5, pool.shape)
        shares.append(null(drawn, size, partitions)["share"]["value"])
    low, high = np.percentile(shares, [2.5, 97.5])
    return {"value": float(np.mean(shares)), "low": float(low), "high": float(high)}


def planted(name: str, base: np.ndarray, changed: np.ndarray, size: int, partitions: int) -> dict:
    d = changed - base[: len(changed)]
    true = paired.estimate(d)
    found = [paired.estimate(d[group]) for group in groups(len(d), size, partitions)]
    right = sum(f.excludes_zero and f.mean * true.mean > 0 for f in found)
    wrong = sum(f.excludes_zero and f.mean * true.mean < 0 for f in found)
    return {"change": name, "seeds": size, "true": true.cell, "comparisons": len(found), "found": right,
            "share": share(right, len(found)), "wrong_way": wrong,
            "mean_half": float(np.mean([f.half for f in found])), "seeds_needed": paired.seeds_needed(true)}


# ------------------------------------------------------------------------------------------- the run

def pools(config: Config) -> dict[str, np.ndarray]:
    """The scores [seeds, dialogues] of the configuration, "", and of its changes."""
    pairs = Path("runs/tiny/0/pairs.jsonl")
    if not pairs.is_file():
        runtime.fail(f"{pairs}: no such file, expected the preferences of the demo: run `make demo`")
    lines = pairs.read_text().splitlines(keepends=True)
    runtime.write_text(Path(HALF), "".join(lines[: len(lines) // 2]))
    base = compare.variant("base", BASE)
    changed = [compare.variant(name, text, base) for name, text in PLANTED.items()]
    settings = compare.Config(jobs=config.jobs, out=config.out)
    out = runtime.open_folder(config.out)
    jobs = compare.jobs_of([base], config.seeds, out) + compare.jobs_of(changed, config.planted_seeds, out)
    compare.train(jobs, config.jobs, settings.threads)
    scores = compare.score(settings, jobs, out)
    return {name: paired.matrix(of, name) for name, of in scores.items()}


def one_comparison(config: Config) -> dict:
    """README's edit, compared from nothing with three seeds: the verdict, and the minutes it took."""
    out, source = Path(config.out) / "edit", Path("dpo.py").read_text()
    runtime.open_folder(str(out))
    edited = source.replace("F.logsigmoid(margins).mean()", "F.logsigmoid(margins - 0.5).mean()")
    if edited == source:
        raise ValueError("dpo.py: the loss that README.md edits is not there")
    runtime.write_text(out / "my_dpo.py", edited)
    report = compare.compare(BASE, str(out / "my_dpo.py"), compare.Config(jobs=config.jobs, out=str(out)))
    if report["about"]["runs trained now"] < 6:  # resumed: no time to report
        return {}
    return {"minutes": report["about"]["minutes"], "verdict": report["verdict"]}


def main(config: Config) -> None:
    by_variant, timed = pools(config), one_comparison(config)
    base = by_variant.pop("base")
    rows = [null(base, size, config.partitions) | {"expected": expected(base, size, config.partitions)}
            for size in (3, 5)]
    finds = [planted(name, base, changed, size, config.partitions) for name, changed in by_variant.items()
             for size in (3, 5)]
    one = null(base, 1, config.partitions)  # a run against a run: there is no interval but that over dialogues
    single = {key: one[key] for key in ("comparisons", "dialogues_only_excluded_zero", "dialogues_only_share")}
    file = Path(config.results)
    before = json.loads(file.read_text()) if file.is_file() else {}
    report = {"command": "python -m benchmarks.calibration", **machine(torch.device("cpu")), "seeds": len(base),
              "planted_seeds": config.planted_seeds,
              "dialogues": base.shape[1], "partitions": config.partitions, "configuration": BASE,
              "comparisons": rows[0]["comparisons"], "excluded_zero": rows[0]["excluded_zero"], "null": rows,
              "single_runs": single,
              "planted": finds, "one_comparison": timed or before.get("one_comparison")}
    save(file, report)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
