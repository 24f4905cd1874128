"""The reward models and PPO runs of the tiny recipe over seeds, in one file, from what `make results` trained.

    python -m benchmarks.rlhf

Reward models by their reports on the test pairs, PPO by the last five steps of its log; a seed is a full-size run in
runs/results, as `make demo FULL=1 SEED=n` makes one.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import runtime
from benchmarks.measure import save
from data.records import lines
from judging.gold import interval

PPO_METRICS = ("score", "kl", "length", "eos_rate", "entropy", "explained_variance")


@dataclass(frozen=True)
class Config:
    runs: str = "runs/results"
    seeds: list[int] = (0, 1, 2, 3, 4)
    out: str = "benchmarks/results/tiny/rlhf.json"


def by_margin(reports: list[dict]) -> dict[str, list[float]]:
    """Accuracy and number of pairs by margin, all seeds together."""
    counts: dict[str, list[float]] = {}
    for report in reports:
        for margin, (share, count) in report["by_margin"].items():
            right, total = counts.get(margin, (0, 0))
            counts[margin] = (right + share * count, total + count)
    return {margin: [right / total, total] for margin, (right, total) in sorted(counts.items())}


def reward_models(reports: list[dict]) -> dict:
    """Accuracy of the reward models, and of the SFT models' log-probabilities as the baseline."""
    found = {}
    for kind, prefix in (("reward_model", ""), ("baseline", "baseline_")):
        parts = [report[kind] for report in reports]
        found |= {f"{prefix}by_margin": by_margin(parts), f"{prefix}by_seed": [part["accuracy"] for part in parts]}
    return found


def ppo_runs(logs: list[list[dict]]) -> dict:
    """Mean and interval over seeds of the last five steps, and the score of the first."""
    last = {key: interval([mean(step[key] for step in log[-5:]) for log in logs]) for key in PPO_METRICS}
    return {"steps": len(logs[0]), **last, "score_at_first": mean(log[0]["score"] for log in logs)}


def main(config: Config) -> None:
    folders = [Path(config.runs) / str(seed) for seed in config.seeds]
    reports = [json.loads((folder / "reward" / "report.json").read_text()) for folder in folders]
    found = {"command": "make results", "seeds": list(config.seeds), "reward_model": reward_models(reports)}
    for name in ("ppo", "ppo_without_kl"):
        found[name] = ppo_runs([lines(folder / name / "metrics.jsonl") for folder in folders])
    save(config.out, found)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
