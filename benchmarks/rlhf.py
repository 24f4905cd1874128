"""The reward models and PPO runs of the tiny recipe over seeds, in one file: `python -m benchmarks.rlhf`, after `make results`.

Reward models by their reports on the test pairs, PPO by the last five steps of its log.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import runtime
from judging.gold import interval


@dataclass(frozen=True)
class Config:
    runs: str = "runs/tiny"
    seeds: list[int] = (0, 1, 2, 3, 4)
    out: str = "benchmarks/results/tiny/rlhf.json"


def pooled(reports: list[dict], key: str) -> dict[str, list[float]]:
    """Accuracy and number of pairs by margin or category, all seeds together."""
    counts: dict[str, list[float]] = {}
    for report in reports:
        for label, (share, count) in report[key].items():
            right, total = counts.get(label, (0, 0))
            counts[label] = (right + share * count, total + count)
    return {label: [right / total, total] for label, (right, total) in sorted(counts.items())}


def main(config: Config) -> None:
    folders = [Path(config.runs) / str(seed) for seed in config.seeds]
    reports = [json.loads((folder / "reward" / "report.json").read_text()) for folder in folders]
    models, baselines = [r["reward_model"] for r in reports], [r["baseline"] for r in reports]
    accuracy, half = interval([m["accuracy"] for m in models])
    found = {"command": "make results", "seeds": list(config.seeds), "reward_model": {
        "accuracy": accuracy, "interval": half, "by_seed": [m["accuracy"] for m in models],
        "baseline": interval([b["accuracy"] for b in baselines])[0], "baseline_by_seed": [b["accuracy"] for b in baselines],
        "by_margin": pooled(models, "by_margin"), "by_category": pooled(models, "by_category"),
        "baseline_by_margin": pooled(baselines, "by_margin"), "length_correlation": mean(m["length_correlation"] for m in models)}}
    for name in ("ppo", "ppo_without_kl"):
        runs = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for folder in folders]
        found[name] = {"steps": len(runs[0])} | {
            key: interval([mean(step[key] for step in run[-5:]) for run in runs])
            for key in ("score", "kl", "length", "eos_rate", "entropy", "explained_variance")} | {
            "score_at_first": mean(run[0]["score"] for run in runs)}
    runtime.write_text(Path(config.out), json.dumps(found, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
