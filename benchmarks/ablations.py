"""The talk's ablations in the tiny world, a few minutes each: what is changed, several seeds, one figure.

    python -m benchmarks.ablations --config configs/tiny/ablations/sft_size.toml

    sft_size          gold score by number of demonstrations, 1 % to 100 %
    sft_length        demonstrations with the shortest to the longest prompts, or replies, as many of each
    task_mix          demonstrations in the task mixes of the talk, as many of each
    annotator_noise   the reward model's accuracy, on pairs labelled without noise, by the annotators' noise
    weak_preferences  preferences collected from a model tuned on 1 % of the demonstrations and from the SFT model: do
                      two annotators agree, and what does DPO of the SFT model make of them?
    rounds            three rounds of preferences and training (collect/rounds.py), and all their prompts at once;
                      seven minutes a seed on one core
    rewards           a learnt reward, a rule and the gold grade, each with the KL term and without: what the policy
                      becomes under each; after `make runs/tiny/{0,1,2}/reward/model/config.json`

The others start from the full-size run that `make demo FULL=1 SEED=n` left in runs/results/n. Points are written seed
by seed, so that the same command continues a stopped run; the figure shows every seed and the mean.
"""
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Literal

import torch
from matplotlib.figure import Figure

import dpo
import ppo
import reward
import runtime
import sft
from benchmarks.measure import save
from benchmarks.overoptimisation import grade, replies_of
from collect import rounds as in_rounds
from collect.spec import INSTRUCTGPT, PREFERENCE, SURGE, largest_remainder, subset
from data.formats import read
from data.records import lines, write_lines
from data.tiny import pairs, world
from judging.gold import interval
from judging.rewards import load_scorer, preference_accuracy
from rewards import tiny


@dataclass(frozen=True)
class Config:
    ablation: Literal["sft_size", "sft_length", "task_mix", "annotator_noise", "weak_preferences", "rounds",
                      "rewards"] = "sft_size"
    runs: str = "runs/results"       # a folder for each seed, to start from
    seeds: list[int] = (0, 1, 2, 3, 4)
    size: int = 600                  # demonstrations, where their number is not what changes
    prompts: int = 2000              # dialogues to collect preferences on
    out: str = "runs/tiny/ablations/sft_size"  # folder of the runs
    threads: int = 0

    def __post_init__(self):
        runtime.check_ranges(self, size=(1, inf), prompts=(1, inf), threads=(0, inf))
        for seed in self.seeds:
            if not Path(f"{self.runs}/{seed}/sft/model/config.json").is_file():
                runtime.fail(f"seeds: {self.runs}/{seed}/sft/model is not there: "
                             f"make it with `make demo FULL=1 SEED={seed}`")


Point = tuple[str, dict[str, float]]  # condition, measures
RESULTS = Path("benchmarks/results/ablations")  # the figure and the numbers


def train(script: ModuleType, config: Config, seed: int, out: Path, data: Path, **changes) -> Path:
    """The model that a script makes of this data, trained as its config in configs/tiny says."""
    settings = runtime.load_config(script.Config, "", ["--config", f"configs/tiny/{script.__name__}.toml"])
    script.main(replace(settings, data=str(data), eval_data="", out=str(out), seed=seed, threads=config.threads,
                        **changes))
    return out / "model"


def tuned(config: Config, seed: int, name: str, demonstrations: list[dict]) -> Path:
    """The SFT model of these demonstrations."""
    run = Path(config.out) / f"{name}-{seed}"
    write_lines(run.with_suffix(".jsonl"), demonstrations)
    return train(sft, config, seed, run / "sft", run.with_suffix(".jsonl"), samples=0)


def gold_score(config: Config, model: Path) -> float:
    return grade(model, f"{config.runs}/0/data/dev.jsonl", runtime.find_device("auto"))


def sft_point(config: Config, seed: int, name: str, demonstrations: list[dict]) -> Point:
    gold = gold_score(config, tuned(config, seed, name, demonstrations))
    return name, {"gold": gold, "demonstrations": len(demonstrations)}


def sft_size(config: Config, seed: int) -> Iterator[Point]:
    demos = lines(Path(f"{config.runs}/{seed}/data/sft.jsonl"))
    for share in (0.01, 0.03, 0.1, 0.3, 1.0):
        yield sft_point(config, seed, f"{share:.0%}", demos[: round(share * len(demos))])


def sft_length(config: Config, seed: int) -> Iterator[Point]:
    """The shortest and the longest of each task, so that the mix of tasks stays."""
    demos = lines(Path(f"{config.runs}/{seed}/data/sft.jsonl"))
    counts = largest_remainder(Counter(demo["category"] for demo in demos), config.size)
    for side, role in (("prompts", "user"), ("replies", "assistant")):
        lengths = [sum(len(m["content"].split()) for m in demo["messages"] if m["role"] == role) for demo in demos]
        ordered = sorted(range(len(demos)), key=lengths.__getitem__)
        for name, numbers in (("shortest", ordered), ("longest", ordered[::-1])):
            members = ([i for i in numbers if demos[i]["category"] == task][:count] for task, count in counts.items())
            yield sft_point(config, seed, f"{name} {side}", [demos[i] for i in sorted(chain(*members))])
    yield sft_point(config, seed, "any", random.Random(seed).sample(demos, config.size))


def task_mix(config: Config, seed: int) -> Iterator[Point]:
    demos = lines(Path(f"{config.runs}/{seed}/data/sft.jsonl"))
    tasks = [d["category"] for d in demos]
    known = set(tasks)
    not_factual = sorted(known - {"open_qa", "closed_qa", "extract", "classify"})
    mixes = {"even": dict.fromkeys(sorted(known), 1), "InstructGPT": INSTRUCTGPT, "Surge": SURGE,
             "preference": PREFERENCE, "no factual tasks": dict.fromkeys(not_factual, 1)}
    for name, mix in mixes.items():
        mix = {task: share for task, share in mix.items() if task in known}
        yield sft_point(config, seed, name, [demos[i] for i in subset(tasks, mix, config.size, seed)])


def collect(config: Config, seed: int, name: str, model: Path | str, prompts: str, noise: float) -> Path:
    """Preferences between replies of the model, labelled with this noise."""
    out = Path(config.out) / f"{name}-{seed}.jsonl"
    if not out.is_file():
        some = out.with_suffix(".prompts.jsonl")
        write_lines(some, lines(Path(prompts))[: config.prompts])
        pairs.main(pairs.Config(model=str(model), prompts=str(some), out=str(out), noise=noise, seed=seed,
                                threads=config.threads))
    return out


def annotator_noise(config: Config, seed: int) -> Iterator[Point]:
    model = f"{config.runs}/{seed}/sft/model"
    clean = collect(config, seed, "test", model, f"{config.runs}/0/data/test.jsonl", 0.0)
    for noise in (0.0, 0.08, 0.16, 0.32, 0.64):
        data = collect(config, seed, f"noise {noise}", model, f"{config.runs}/{seed}/data/prompts.jsonl", noise)
        run = Path(config.out) / f"noise {noise}-{seed}"
        scorer = load_scorer("reward", str(train(reward, config, seed, run, data, model=model, demos="")))
        found = preference_accuracy(read(clean)[0], scorer)
        yield f"{noise}", {"accuracy": 100 * found["value"], "pairs": len(lines(data))}


def second_opinion(data: Path, prompts: str, seed: int) -> dict[str, float]:
    """What another annotator says of the same pairs: how often the same, and how often they cannot tell, percent."""
    dialogues = {d["id"]: d for d in lines(Path(prompts))}
    rng, said = random.Random(f"second opinion {seed}"), []
    for pair in lines(data):
        dialogue, _, turn = pair["id"].rpartition("-")
        item = dialogues[dialogue]["turns"][int(turn) - 1]["item"]
        verdict = pairs.annotate(pair["category"], item, [pair["chosen"], pair["rejected"]], rng, pairs.Config())
        said.append(None if verdict is None else verdict[0] == 0)
    told = [x for x in said if x is not None]
    return {"agreement": 100 * mean(told), "cannot tell": 100 * (1 - len(told) / len(said)), "pairs": len(said)}


def weak_preferences(config: Config, seed: int) -> Iterator[Point]:
    prompts, sft_model = f"{config.runs}/{seed}/data/prompts.jsonl", f"{config.runs}/{seed}/sft/model"
    demos = lines(Path(f"{config.runs}/{seed}/data/sft.jsonl"))
    weak = tuned(config, seed, "weak model", demos[: len(demos) // 100])
    for name, model in (("weak model", weak), ("SFT model", sft_model)):
        data = collect(config, seed, f"pairs of {name}", model, prompts, 0.08)
        policy = train(dpo, config, seed, Path(config.out) / f"dpo on {name}-{seed}", data, model=sft_model)
        yield name, {"gold": gold_score(config, policy), **second_opinion(data, prompts, seed)}


def rounds(config: Config, seed: int) -> Iterator[Point]:
    """Preferences are about the newest policy's replies, or all at once about the SFT model's."""
    run = f"{config.runs}/{seed}"
    three = in_rounds.Config(model=f"{run}/sft/model", prompts=f"{run}/data/more_prompts.jsonl", seed=seed,
                             out=f"{config.out}/rounds-{seed}", dev=f"{config.runs}/0/data/dev.jsonl",
                             threads=config.threads)
    once = replace(three, out=f"{config.out}/once-{seed}", rounds=1, prompts_per_round=3 * three.prompts_per_round)
    for settings, first, name in ((three, 0, "round {round}"), (once, 1, "all prompts at once")):
        in_rounds.main(settings)
        for row in json.loads(Path(settings.out, "report.json").read_text())["rounds"][first:]:
            agreed = row.get("agreement") or {}
            yield name.format(**row) if row["round"] else "SFT model", {
                "gold": row["gold"], "words": row["words"], "preferences": row.get("preferences"),
                "agree": agreed.get("raw"), "kappa": agreed.get("kappa"), "right": row.get("reward_accuracy")}


# Weights give the three about the same spread: over the SFT models' replies the grade has a standard deviation of 0.32,
# the rule one of 0.39, and the learnt score is in its own.
REWARDS = {"learnt": ("", 1), "rule": ("3 * rewards/tiny.py:required", 3), "gold": ("3 * rewards/tiny.py:gold", 3)}
HELD = {"steps": 15, "kl_coef": 0.2}
# Over-optimised: nothing holds the policy, twice the learning rate, and twice the steps.
FREE = {"steps": 30, "kl_coef": 0.0, "lr": 6e-4, "schedule": "constant", "max_kl": 1000.0, "max_ratio": 1e9,
        "min_eos": 0.0}


def judged(model: Path, data: Path) -> dict[str, float]:
    """Gold grade, share of required words (both of 100), and length of a policy's replies."""
    replies = replies_of(model, str(data), runtime.find_device("auto"))
    asked = [{"required": tiny.required_words(category, item)} for category, item, _, _ in replies]
    texts = [text for _, _, text, _ in replies]
    return {"gold": 100 * mean(world.gold(*reply) for reply in replies),
            "rule": 100 * mean(tiny.required(asked, texts, [], [])),
            "words": mean(len(world.words(text)) for text in texts)}


def rewards(config: Config, seed: int) -> Iterator[Point]:
    """The same SFT models, prompts, seeds and updates; KL and score (as the reward gives it) of the last five steps."""
    run = Path(config.runs) / str(seed)
    dev, data = run / "data" / "dev.jsonl", run / "checkable.jsonl"
    tiny.main(tiny.Config(str(run / "data" / "prompts.jsonl"), str(run / "pairs.jsonl"), str(data)))
    start = judged(run / "sft" / "model", dev)
    yield "SFT", start | {"gain": 0.0, "kl": 0.0, "steps": 0, "kl_coef": None, "score": None, "score_at_first": None}
    settings = replace(runtime.load_config(ppo.Config, "", ["--config", "configs/tiny/ppo_rule.toml"]), seed=seed,
                       model=f"{run}/sft/model", reward_model=f"{run}/reward/model", data=str(data),
                       threads=config.threads)
    for ending, changes in (("", HELD), (", free", FREE)):
        for name, (function, weight) in REWARDS.items():
            out = Path(config.out) / f"{name}{ending}-{seed}"
            ppo.main(replace(settings, reward=function, out=str(out), **changes))
            found, log = judged(out / "model", dev), lines(out / "metrics.jsonl")
            yield f"{name}{ending}", found | {
                "gain": found["gold"] - start["gold"], "kl": mean(step["kl"] for step in log[-5:]),
                "steps": changes["steps"], "kl_coef": changes["kl_coef"],
                "score": mean(step["score"] for step in log[-5:]) / weight, "score_at_first": log[0]["score"] / weight}


ABLATIONS = {f.__name__: f for f in (sft_size, sft_length, task_mix, annotator_noise, weak_preferences, rounds,
                                     rewards)}


def summary(points: list[dict], measure: str) -> dict[str, tuple[float, float]]:
    """Mean and half-width of the 95 % t-interval over seeds, by condition."""
    conditions = dict.fromkeys(p["condition"] for p in points if p[measure] is not None)
    return {c: interval([p[measure] for p in points if p["condition"] == c]) for c in conditions}


def draw(title: str, points: list[dict], table: dict[str, dict[str, tuple[float, float]]], file: Path) -> None:
    """A panel for each measure of the table: every seed, and the mean with its interval."""
    figure = Figure(figsize=(6 * len(table), 4), layout="constrained")
    labels = {"gold": "gold score", "accuracy": "reward model, % right"}
    for axes, (measure, found) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
        axes.plot([p["condition"] for p in points], [p[measure] for p in points], ".", color="#999999", markersize=5)
        middle, half = zip(*found.values(), strict=True)
        axes.errorbar(list(found), middle, yerr=[0 if math.isnan(h) else h for h in half], fmt="o", color="#2b62b8",
                      capsize=4)
        axes.set_ylabel(labels.get(measure, f"{measure}, %"))
        axes.tick_params("x", rotation=20)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def measured(config: Config) -> list[dict]:
    """The points of all seeds; those of earlier calls are read from the run's folder."""
    file = Path(config.out) / "points.jsonl"
    points = lines(file) if file.is_file() else []
    for seed in config.seeds:
        if {"condition": "", "seed": seed} not in points:  # which marks a seed's end
            points = [p for p in points if p["seed"] != seed]
            found = ABLATIONS[config.ablation](config, seed)
            points += [{"condition": name, "seed": seed, **measures} for name, measures in found]
            points.append({"condition": "", "seed": seed})
            write_lines(file, points)
    return [p for p in points if p["condition"] and p["seed"] in config.seeds]


def main(config: Config) -> None:
    runtime.setup("auto", 0, config.threads)
    runtime.open_folder(config.out)
    points = measured(config)
    table = {m: summary(points, m) for m in points[0] if m not in ("condition", "seed")}
    for condition in dict.fromkeys(p["condition"] for p in points):
        found = {measure: of[condition] for measure, of in table.items() if condition in of}
        print(f"{condition:<20}" + "  ".join(f"{m} {middle:.1f} ± {half:.1f}" for m, (middle, half) in found.items()))
    title = config.ablation.replace("_", " ") + f", {len(config.seeds)} seeds"
    drawn = {m: table[m] for m in ("gold", "accuracy", "agreement") if m in table}
    draw(title, points, drawn, RESULTS / f"{config.ablation}.png")
    save(RESULTS / f"{config.ablation}.json", {
        "command": f"python -m benchmarks.ablations --config configs/tiny/ablations/{config.ablation}.toml",
        "seeds": list(config.seeds), "torch": torch.__version__, "points": points})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
