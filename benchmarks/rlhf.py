"""The reward models and PPO runs of the tiny recipe over seeds, in one file, from what `make results` trained.

    python -m benchmarks.rlhf

Reward models by their reports on the test pairs, PPO by the last five steps of its log; a seed is a full-size run in
runs/results, as `make demo FULL=1 SEED=n` makes one.
"""
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from benchmarks.measure import save
from data.records import lines
from judging.gold import interval

SEEDS = range(5)
PPO_METRICS = ("score", "kl", "length", "eos_rate")


def by_margin(reports: list[dict]) -> dict[str, list[float]]:
    """Accuracy and number of pairs by margin, all seeds together."""
    found = defaultdict(list)
    for report in reports:
        for margin, part in report["by_margin"].items():
            found[margin].append(part)
    totals = {margin: sum(count for _, count in parts) for margin, parts in sorted(found.items())}
    return {margin: [sum(share * count for share, count in found[margin]) / total, total]
            for margin, total in totals.items()}


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


if __name__ == "__main__":
    runs = [Path("runs/results") / str(seed) for seed in SEEDS]
    reports = [json.loads((run / "reward" / "report.json").read_text()) for run in runs]
    found = {"command": "make results", "seeds": list(SEEDS), "reward_model": reward_models(reports)}
    for name in ("ppo", "ppo_without_kl"):
        found[name] = ppo_runs([lines(run / name / "metrics.jsonl") for run in runs])
    save("benchmarks/results/tiny/rlhf.json", found)
