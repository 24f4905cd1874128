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
KINDS = {"reward_model": "reward model", "baseline": "log-probability per token of the SFT model"}
PPO_METRICS = ("score", "kl", "length", "eos_rate")


def right(name: str, reports: list[dict]) -> dict:
    """Accuracy by seed, and by margin over the pairs of all seeds."""
    parts = defaultdict(list)  # by margin: accuracy and number of pairs
    for report in reports:
        for margin, part in report["by_margin"].items():
            parts[f"margin {margin}"].append(part)
    return {"name": name, "all": [report["accuracy"] for report in reports]} | {
        margin: sum(share * count for share, count in parts[margin]) / sum(count for _, count in parts[margin])
        for margin in sorted(parts)}


def ended(coefficient: str, logs: list[list[dict]]) -> dict:
    """Mean and interval over seeds of the last five steps, and the score of the first."""
    last = {key: interval([mean(step[key] for step in log[-5:]) for log in logs]) for key in PPO_METRICS}
    return {"coefficient": coefficient, "steps": len(logs[0]),
            "score_at_first": mean(log[0]["score"] for log in logs), **last}


if __name__ == "__main__":
    runs = [Path("runs/results") / str(seed) for seed in SEEDS]
    reports = [json.loads((run / "reward" / "report.json").read_text()) for run in runs]
    save("benchmarks/results/tiny/rlhf.json", {
        "command": "make results", "seeds": list(SEEDS),
        "reward_models": [right(name, [report[kind] for report in reports]) for kind, name in KINDS.items()],
        "ppo": [ended(coefficient, [lines(run / name / "metrics.jsonl") for run in runs])
                for name, coefficient in (("ppo", "0.2"), ("ppo_without_kl", "0"))]})
