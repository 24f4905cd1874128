"""How far a reward model can be trusted: its accuracy, and its score and the gold score as PPO optimises the first.

    python -m benchmarks.overoptimisation                  what `make results` trained: tables over seeds, and curves
    python -m benchmarks.overoptimisation 'runs=["kl 0.2=runs/tiny/0/ppo"]' start=... data=... out=...    curves alone

Tables: reward models by their reports on the test pairs, PPO by the last five steps of its log. Curves: each run must
have been made with snapshot_every; its snapshots answer the dev dialogues, the gold grader grades them, and the figure
draws both scores over the distance from the reference (Gao et al. 2022, arXiv:2210.10760).
"""
import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

import judge
import runtime
from benchmarks.measure import save, show
from data.llm import Budget, Opener
from data.records import lines
from data.tiny import world
from judging.entries import decode
from judging.gold import interval

RESULTS = "runs/results"  # of `make results`, a folder for each seed
SEEDS = range(5)
KINDS = {"reward_model": "reward model", "baseline": "log-probability per token of the SFT model"}
PPO_METRICS = ("score", "kl", "length", "eos_rate")


@dataclass(frozen=True)
class Config:
    runs: list[str] = (f"KL coefficient 0.2={RESULTS}/0/ppo", f"KL coefficient 0={RESULTS}/0/ppo_without_kl")
    start: str = f"{RESULTS}/0/sft/model"  # the model they started from
    data: str = f"{RESULTS}/0/data/dev.jsonl"
    out: str = "benchmarks/results/tiny/overoptimisation"  # .json and .png

    def __post_init__(self):
        for entry in self.runs:
            if not (Path(entry.partition("=")[2]) / "metrics.jsonl").is_file():
                runtime.fail(f"runs: {entry} is no name=folder of a PPO run: make it with ppo.py snapshot_every=5")


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


def tables() -> dict:
    runs = [Path(RESULTS) / str(seed) for seed in SEEDS]
    reports = [json.loads((run / "reward" / "report.json").read_text()) for run in runs]
    return {"command": "make results", "seeds": list(SEEDS),
            "reward_models": [right(name, [report[kind] for report in reports]) for kind, name in KINDS.items()],
            "ppo": [ended(coefficient, [lines(run / name / "metrics.jsonl") for run in runs])
                    for name, coefficient in (("ppo", "0.2"), ("ppo_without_kl", "0"))]}


# ------------------------------------------------------------------------------------------ curves

def curve(folder: Path, start_gold: float, grade) -> list[dict]:
    """Points of a run: step, KL in nats per reply and reward model's score of that step's rollout, gold score of its
    snapshot."""
    steps = lines(folder / "metrics.jsonl")
    points = [{"step": 0, "kl": 0.0, "score": steps[0]["score"], "gold": start_gold}]
    for path in sorted(folder.glob("model_step_*"), key=lambda p: int(p.name[11:])):
        step = int(path.name[11:])
        near = [s for s in steps if abs(s["step"] - step) <= 1]
        points.append({"step": step, "kl": mean(s["kl"] for s in near), "score": mean(s["score"] for s in near),
                       "gold": grade(path)})
        show({"run": folder} | points[-1])
    return points


def replies_of(path: Path | str, data: str, device: torch.device) -> list[tuple[str, dict, str, bool]]:
    """A model's replies to the dialogues of a file, as world.gold takes them: task, item, text, whether it ended."""
    with tempfile.TemporaryDirectory() as folder:  # for the ledger, which nobody needs again
        questions, dialogues = judge.load_questions(data)
        said = judge.answer(decode("models", f"model={path}"), questions, dialogues, judge.Sampling(64, 0.7), 0,
                            Path(folder) / "answers.jsonl", Budget(), Opener(str(device)))
    return [(d["category"], turn["item"], r["text"], r["finished"]) for d, replies in zip(dialogues, said, strict=True)
            for turn, r in zip(d["turns"], replies, strict=False)]


def grade(path: Path | str, data: str, device: torch.device) -> float:
    """Gold score of a model on the dialogues of a file."""
    return 100 * mean(world.gold(*reply) for reply in replies_of(path, data, device))


def draw(curves: dict[str, list[dict]], file: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = (("score", "score by the reward model, standard deviations", "what PPO sees"),
              ("gold", "gold score", "what users see"))
    for axes, (key, label, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, points in curves.items():
            axes.plot([p["kl"] for p in points], [p[key] for p in points], "o-", markersize=3, label=name)
        axes.set(xlabel="KL from the reference, nats a reply", ylabel=label, title=title)
    figure.axes[0].legend()
    figure.savefig(file, dpi=130)
    print(f"wrote {file}")


def main(config: Config) -> None:
    if config.runs == Config.runs:
        save("benchmarks/results/tiny/rlhf.json", tables())
    graded = partial(grade, data=config.data, device=runtime.setup("auto", 0))
    start = graded(config.start)
    named = [entry.partition("=") for entry in config.runs]
    curves = {name: curve(Path(folder), start, graded) for name, _, folder in named}
    save(f"{config.out}.json", {"data": config.data, "curves": curves})
    draw(curves, Path(f"{config.out}.png"))


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
