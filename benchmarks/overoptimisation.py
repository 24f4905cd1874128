"""How far a reward model can be trusted: its score and the gold score against KL, as PPO optimises the first.

    python -m benchmarks.overoptimisation 'runs=["kl 0.2=runs/results/0/ppo", "kl 0=runs/results/0/ppo_without_kl"]'

Each run must have been made with snapshot_every. Its snapshots answer the dev dialogues, the gold grader grades them,
and the figure draws both scores over the distance from the reference (Gao et al. 2022, arXiv:2210.10760).
"""
import tempfile
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


@dataclass(frozen=True)
class Config:
    runs: list[str] = ()             # "name=folder of a PPO run"
    start: str = "runs/results/0/sft/model"  # the model they started from
    data: str = "runs/results/0/data/dev.jsonl"
    out: str = "benchmarks/results/overoptimisation"  # .json and .png

    def __post_init__(self):
        for entry in self.runs:
            if not (Path(entry.partition("=")[2]) / "metrics.jsonl").is_file():
                runtime.fail(f"runs: {entry} is no name=folder of a PPO run: make it with ppo.py snapshot_every=5")


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
    graded = partial(grade, data=config.data, device=runtime.setup("auto", 0))
    start = graded(config.start)
    named = [entry.partition("=") for entry in config.runs]
    curves = {name: curve(Path(folder), start, graded) for name, _, folder in named}
    save(f"{config.out}.json", {"data": config.data, "curves": curves})
    draw(curves, Path(f"{config.out}.png"))


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
