"""The talk's ablations in the tiny world, a few minutes each: what is changed, several seeds, one figure.

    python -m benchmarks.ablations --config configs/tiny/ablations/sft_size.toml

    sft_size          gold score by number of demonstrations, 1 % to 100 %
    sft_length        demonstrations with the shortest to the longest prompts, or replies, as many of each
    task_mix          demonstrations in the task mixes of the talk, as many of each
    annotator_noise   the reward model's accuracy, on pairs labelled without noise, by the annotators' noise
    weak_preferences  preferences collected from a model tuned on 1 % of the demonstrations and from the SFT model: do two
                      annotators agree, and what does DPO of the SFT model make of them?

Each starts from what `make demo SEED=n` left in runs/tiny/n. Points are appended as they come, so that a run goes on
where it was; the figure shows every seed and the mean.
"""
from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import mean
from typing import Literal

import torch

import dpo
import reward
import runtime
import sft
from benchmarks.overoptimisation import grade
from collect.spec import INSTRUCTGPT, PREFERENCE, SURGE, largest_remainder, subset
from data.formats import read
from data.tiny import pairs
from judging.gold import interval
from judging.rewards import load_scorer, preference_accuracy


@dataclass(frozen=True)
class Config:
    ablation: Literal["sft_size", "sft_length", "task_mix", "annotator_noise", "weak_preferences"] = "sft_size"
    seeds: list[int] = (0, 1, 2, 3, 4)
    size: int = 600                  # demonstrations, where their number is not what changes
    prompts: int = 2000              # dialogues to collect preferences on
    out: str = "runs/tiny/ablations/sft_size"  # folder of the runs
    results: str = "benchmarks/results/ablations"  # folder for the figure and the numbers
    threads: int = 0

    def __post_init__(self):
        for key, low in (("size", 1), ("prompts", 1), ("threads", 0)):
            runtime.check_range(key, getattr(self, key), low, inf)
        for seed in self.seeds:
            if not Path(f"runs/tiny/{seed}/sft/model/config.json").is_file():
                runtime.fail(f"seeds: runs/tiny/{seed}/sft/model is not there: make it with `make demo SEED={seed}`")


Point = tuple[str, dict[str, float]]  # condition, measures
DEV = "runs/tiny/0/data/dev.jsonl"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tuned(config: Config, seed: int, name: str, demonstrations: list[dict]) -> Path:
    """The SFT model of these demonstrations, trained as configs/tiny/sft.toml says."""
    run = Path(config.out) / f"{name}-{seed}"
    run.mkdir(parents=True, exist_ok=True)
    data = run.with_suffix(".jsonl")
    runtime.write_text(data, "".join(json.dumps(d) + "\n" for d in demonstrations))
    settings = runtime.load_config(sft.Config, "", ["--config", "configs/tiny/sft.toml"])
    sft.main(replace(settings, data=str(data), eval_data="", out=str(run / "sft"), seed=seed, threads=config.threads, samples=0))
    return run / "sft" / "model"


def sft_point(config: Config, seed: int, name: str, demonstrations: list[dict]) -> Point:
    return name, {"gold": grade(tuned(config, seed, name, demonstrations), DEV, DEVICE), "demonstrations": len(demonstrations)}


def load(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).open()]


def sft_size(config: Config, seed: int) -> Iterator[Point]:
    demos = load(f"runs/tiny/{seed}/data/sft.jsonl")
    for share in (0.01, 0.03, 0.1, 0.3, 1.0):
        yield sft_point(config, seed, f"{share:.0%}", demos[: round(share * len(demos))])


def sft_length(config: Config, seed: int) -> Iterator[Point]:
    """Quarters by length within each task, so that the mix of tasks stays."""
    demos = load(f"runs/tiny/{seed}/data/sft.jsonl")
    for side in ("prompts", "replies"):
        lengths = [sum(len(m["content"].split()) for m in d["messages"] if (m["role"] == "user") == (side == "prompts")) for d in demos]
        by_task: dict[str, list[int]] = {}
        for i, d in enumerate(demos):
            by_task.setdefault(d["category"], []).append(i)
        counts = largest_remainder({task: len(members) for task, members in by_task.items()}, config.size)
        chosen: dict[str, list[int]] = {"shortest": [], "longest": []}
        for task, members in by_task.items():
            ordered = sorted(members, key=lambda i: (lengths[i], i))  # noqa: B023
            chosen["shortest"] += ordered[: counts[task]]
            chosen["longest"] += ordered[-counts[task]:]
        for name, members in chosen.items():
            yield sft_point(config, seed, f"{name} {side}", [demos[i] for i in sorted(members)])
    yield sft_point(config, seed, "any", random.Random(seed).sample(demos, config.size))


def task_mix(config: Config, seed: int) -> Iterator[Point]:
    demos = load(f"runs/tiny/{seed}/data/sft.jsonl")
    tasks = [d["category"] for d in demos]
    known = set(tasks)
    mixes = {"even": dict.fromkeys(sorted(known), 1), "InstructGPT": INSTRUCTGPT, "Surge": SURGE, "preference": PREFERENCE,
             "no factual tasks": dict.fromkeys(sorted(known - {"open_qa", "closed_qa", "extract", "classify"}), 1)}
    for name, mix in mixes.items():
        mix = {task: share for task, share in mix.items() if task in known}
        yield sft_point(config, seed, name, [demos[i] for i in subset(tasks, mix, config.size, seed)])


def collect(config: Config, seed: int, name: str, model: str, prompts: str, noise: float) -> Path:
    out = Path(config.out) / f"{name}-{seed}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    some = out.with_suffix(".prompts.jsonl")
    runtime.write_text(some, "".join(json.dumps(d) + "\n" for d in load(prompts)[: config.prompts]))
    if not out.is_file():
        pairs.main(pairs.Config(model=model, prompts=str(some), out=str(out), noise=noise, seed=seed, threads=config.threads))
    return out


def annotator_noise(config: Config, seed: int) -> Iterator[Point]:
    model = f"runs/tiny/{seed}/sft/model"
    clean = collect(config, seed, "test", model, "runs/tiny/0/data/test.jsonl", 0.0)
    for noise in (0.0, 0.08, 0.16, 0.32, 0.64):
        data = collect(config, seed, f"noise {noise}", model, f"runs/tiny/{seed}/data/prompts.jsonl", noise)
        run = Path(config.out) / f"noise {noise}-{seed}"
        settings = runtime.load_config(reward.Config, "", ["--config", "configs/tiny/reward.toml"])
        reward.main(replace(settings, model=model, data=str(data), eval_data="", demos="", out=str(run), seed=seed, threads=config.threads))
        found = preference_accuracy(read(clean)[0], load_scorer("reward", str(run / "model")))
        yield f"{noise}", {"accuracy": 100 * found["value"], "pairs": len(load(str(data)))}


def second_opinion(data: Path, prompts: str, seed: int) -> dict[str, float]:
    """What another annotator says of the same pairs: how often the same, and how often they cannot tell, percent."""
    dialogues = {d["id"]: d for d in load(prompts)}
    rng, said = random.Random(f"second opinion {seed}"), []
    for pair in load(str(data)):
        dialogue, _, turn = pair["id"].rpartition("-")
        item = dialogues[dialogue]["turns"][int(turn) - 1]["item"]
        verdict = pairs.annotate(pair["category"], item, [pair["chosen"], pair["rejected"]], rng, pairs.Config())
        said.append(None if verdict is None else verdict[0] == 0)
    told = [x for x in said if x is not None]
    return {"agreement": 100 * mean(told), "cannot tell": 100 * (1 - len(told) / len(said)), "pairs": len(said)}


def weak_preferences(config: Config, seed: int) -> Iterator[Point]:
    prompts = f"runs/tiny/{seed}/data/prompts.jsonl"
    demos = load(f"runs/tiny/{seed}/data/sft.jsonl")
    weak = tuned(config, seed, "weak model", demos[: len(demos) // 100])
    for name, model in (("weak model", str(weak)), ("SFT model", f"runs/tiny/{seed}/sft/model")):
        data = collect(config, seed, f"pairs of {name}", model, prompts, 0.08)
        run = Path(config.out) / f"dpo on {name}-{seed}"
        settings = runtime.load_config(dpo.Config, "", ["--config", "configs/tiny/dpo.toml"])
        dpo.main(replace(settings, model=f"runs/tiny/{seed}/sft/model", data=str(data), eval_data="", out=str(run), seed=seed,
                         threads=config.threads))
        yield name, {"gold": grade(run / "model", DEV, DEVICE), **second_opinion(data, prompts, seed)}


ABLATIONS = {f.__name__: f for f in (sft_size, sft_length, task_mix, annotator_noise, weak_preferences)}


def summary(points: list[dict], measure: str) -> dict[str, tuple[float, float]]:
    """Mean and half-width of the 95 % t-interval over seeds, by condition."""
    conditions = dict.fromkeys(p["condition"] for p in points)
    return {c: interval([p[measure] for p in points if p["condition"] == c]) for c in conditions}


def draw(config: Config, points: list[dict], measures: list[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(measures), figsize=(6 * len(measures), 4), layout="constrained", squeeze=False)
    for axis, measure in zip(axes[0], measures, strict=True):
        found = summary(points, measure)
        names = list(found)
        for i, name in enumerate(names):
            axis.plot([i] * len(config.seeds), [p[measure] for p in points if p["condition"] == name], ".", color="#999999", markersize=5)
        middle, half = zip(*found.values(), strict=True)
        axis.errorbar(range(len(names)), middle, yerr=[0 if math.isnan(h) else h for h in half], fmt="o", color="#2b62b8", capsize=4)
        axis.set(xticks=range(len(names)), ylabel={"gold": "gold score", "accuracy": "reward model, % right"}.get(measure, f"{measure}, %"))
        axis.set_xticklabels(names, rotation=20, ha="right")
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(config.ablation.replace("_", " ") + f", {len(config.seeds)} seeds")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(config: Config) -> None:
    runtime.setup("auto", 0, config.threads)
    file = Path(config.out) / "points.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    points = load(str(file)) if file.is_file() else []
    for seed in config.seeds:
        if {"condition": "", "seed": seed} not in points:  # which marks a seed's end
            points = [p for p in points if p["seed"] != seed]
            points += [{"condition": c, "seed": seed, **measures} for c, measures in ABLATIONS[config.ablation](config, seed)]
            points.append({"condition": "", "seed": seed})
            runtime.write_text(file, "".join(json.dumps(p) + "\n" for p in points))
    points = [p for p in points if p["condition"] and p["seed"] in config.seeds]
    measures = [m for m in points[0] if m not in ("condition", "seed")]
    table = {m: summary(points, m) for m in measures}
    for condition in dict.fromkeys(p["condition"] for p in points):
        print(f"{condition:<20}" + "  ".join(f"{m} {table[m][condition][0]:.1f} ± {table[m][condition][1]:.1f}" for m in measures))
    results = Path(config.results) / config.ablation
    draw(config, points, [m for m in measures if m in ("gold", "accuracy", "agreement")], results.with_suffix(".png"))
    runtime.write_text(results.with_suffix(".json"), json.dumps(
        {"command": f"python -m benchmarks.ablations --config configs/tiny/ablations/{config.ablation}.toml", "seeds": list(config.seeds),
         "torch": torch.__version__, "points": points}, indent=1) + "\n")
    print(f"wrote {results}.png and .json")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
