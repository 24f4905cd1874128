"""The reward models and PPO runs of the tiny recipe over seeds, in one file, from what `make results` trained.

    python -m benchmarks.rlhf

Reward models by their reports on the test pairs, PPO by the last five steps of its log; a seed is a full-size run in
runs/results, as `make demo FULL=1 SEED=n` makes one.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import runtime
from benchmarks.measure import save
from judging.gold import interval

PPO_METRICS = ("score", "kl", "length", "eos_rate", "entropy", "explained_variance")


@dataclass(frozen=True)
class Config:
    runs: str = "runs/results"
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


def reward_models(reports: list[dict]) -> dict:
    """Accuracy of the reward models, and of the SFT models' log-probabilities as the baseline."""
    models, baselines = [report["reward_model"] for report in reports], [report["baseline"] for report in reports]
    accuracy, half = interval([model["accuracy"] for model in models])
    return {"accuracy": accuracy, "interval": half, "by_seed": [model["accuracy"] for model in models],
            "baseline": interval([baseline["accuracy"] for baseline in baselines])[0],
            "baseline_by_seed": [baseline["accuracy"] for baseline in baselines],
            "by_margin": pooled(models, "by_margin"), "by_category": pooled(models, "by_category"),
            "baseline_by_margin": pooled(baselines, "by_margin"),
            "length_correlation": mean(model["length_correlation"] for model in models)}


def ppo_runs(logs: list[list[dict]]) -> dict:
    """Mean and interval over seeds of the last five steps, and the score of the first."""
    last = {key: interval([mean(step[key] for step in log[-5:]) for log in logs]) for key in PPO_METRICS}
    return {"steps": len(logs[0]), **last, "score_at_first": mean(log[0]["score"] for log in logs)}


def main(config: Config) -> None:
    folders = [Path(config.runs) / str(seed) for seed in config.seeds]
    reports = [json.loads((folder / "reward" / "report.json").read_text()) for folder in folders]
    found = {"command": "make results", "seeds": list(config.seeds), "reward_model": reward_models(reports)}
    for name in ("ppo", "ppo_without_kl"):
        logs = [(folder / name / "metrics.jsonl").read_text().splitlines() for folder in folders]
        found[name] = ppo_runs([[json.loads(line) for line in log] for log in logs])
    save(config.out, found)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
