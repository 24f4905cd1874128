"""Measure chatbots: sample replies to held-out dialogues, grade them, and say how sure the numbers are.

    python judge.py --config configs/tiny/judge.toml        a table, samples side by side, judge.json, judge.png

Every model answers the same dialogues turn by turn, going on from its own replies. The tiny world's gold grader
(`data/tiny/world.py`) scores each reply from 0 to 1; a model's gold score is the mean over replies, times 100. Run
with several seeds, each trained model is a sample of one and intervals are over seeds (Student's t, 95 %);
with one seed they are over dialogues, and say nothing about how another training run would fare.
"""
from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import mean, stdev

import torch

import runtime
from data.chat import adopt_template, load_tokenizer
from data.tiny.world import TASKS, demonstrate, dialogue, gold, words
from model import generate, load_model
from runtime import check_range, fail


@dataclass(frozen=True)
class Config:
    models: list[str] = ()           # "name=directory"; {seed} stands for the seed, "few-shot:directory" shows examples instead of chatting
    data: str = "runs/tiny/0/data/test.jsonl"  # held-out dialogues of the tiny world
    out: str = "runs/tiny/judge"     # folder for judge.json, replies.jsonl and judge.png
    seeds: list[int] = (0,)          # of the models; results of all are pooled
    baseline: str = ""               # the model others are compared with; "": the first
    temperature: float = 0.7         # of the replies; 0: greedy
    max_tokens: int = 64             # of a reply
    show: int = 3                    # dialogues to print side by side
    device: str = "auto"
    threads: int = 0

    def __post_init__(self):
        if not self.models:
            fail('models is empty, expected e.g. models=["SFT=runs/sft/model", "DPO=runs/dpo/model"]')
        for entry in self.models:
            if "=" not in entry:
                fail(f"models: '{entry}' is not name=directory, expected e.g. SFT=runs/sft/model")
        names = [entry.partition("=")[0] for entry in self.models]
        if len(set(names)) < len(names):
            fail(f"models: a name occurs twice in {', '.join(names)}: give each its own")
        if self.baseline and self.baseline not in names:
            fail(f"baseline is '{self.baseline}', expected one of {', '.join(names)}")
        if not self.seeds:
            fail("seeds is empty, expected e.g. seeds=[0]")
        check_range("temperature", self.temperature, 0, 10)
        check_range("max_tokens", self.max_tokens, 1, inf)
        for path in self.paths():
            if not (Path(path) / "config.json").is_file():
                fail(f"models: {path} holds no config.json, expected a model directory: train it first, or drop it")

    def paths(self) -> list[str]:
        """The model directories of all names and seeds."""
        return [where.replace("{seed}", str(seed)).removeprefix("few-shot:")
                for entry in self.models for _, _, where in [entry.partition("=")] for seed in self.seeds]


# -------------------------------------------------------------------------------------- statistics

# Student's t, 97.5 % quantile, by degrees of freedom 1..30.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval of independent values; half-width NaN for a single one."""
    if len(values) < 2:
        return mean(values), math.nan
    t = T975[len(values) - 2] if len(values) <= 31 else 1.96
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def win_rate(preferences: Sequence[float]) -> dict[str, float]:
    """AlpacaEval's win rate: preferences in [1, 2], 1 the baseline is better, 2 the model, 1.5 a draw; NaN is no verdict.

    win_rate = 100 mean(p - 1), standard_error = 100 sd(p) / sqrt(n), both over rows with a verdict.
    Raises ValueError for a preference outside [1, 2] or no verdict at all.
    """
    valid = [p for p in preferences if not math.isnan(p)]
    if not valid or min(valid) < 1 or max(valid) > 2:
        raise ValueError("expected at least one preference, and all in [1, 2]")
    error = 100 * stdev(valid) / math.sqrt(len(valid)) if len(valid) > 1 else math.nan
    return {"win_rate": 100 * (mean(valid) - 1), "standard_error": error, "n": len(valid), "wins": sum(p > 1.5 for p in valid),
            "losses": sum(p < 1.5 for p in valid), "draws": sum(p == 1.5 for p in valid)}


# ----------------------------------------------------------------------------------------- replies

def chat_replies(path: str, dialogues: list[dict], config: Config, seed: int, device: torch.device) -> list[list[dict]]:
    """The model's reply to every turn of every dialogue, in its chat template: [{"text", "finished"}] by turn."""
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype=torch.float32, device=device)
    if tokenizer.template is None:
        adopt_template(model, tokenizer, "zephyr")  # a base model, asked as if it were a chatbot
    histories: list[list[dict]] = [[] for _ in dialogues]
    said: list[list[dict]] = [[] for _ in dialogues]
    for turn in range(max(len(d["turns"]) for d in dialogues)):
        going = [i for i, d in enumerate(dialogues) if len(d["turns"]) > turn]
        for i in going:
            histories[i].append({"role": "user", "content": dialogues[i]["turns"][turn]["user"]})
        prompts = [tokenizer.render(histories[i], add_generation_prompt=True)[0] for i in going]
        samples = generate(model, prompts, config.max_tokens, config.temperature, stop_ids=tokenizer.stop_ids(),
                           seed=seed * 10 + turn, progress=f"turn {turn + 1}")
        for i, (sample,) in zip(going, samples, strict=True):
            text = tokenizer.decode(sample.tokens).strip()
            said[i].append({"text": text, "finished": sample.finished})
            histories[i].append({"role": "assistant", "content": text})
    return said


def few_shot_replies(path: str, dialogues: list[dict], config: Config, seed: int, device: torch.device) -> list[list[dict]]:
    """In-context learning: three careful examples of the same task as plain text, the reply ends with its line."""
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype=torch.float32, device=device)
    newline = tokenizer.encode("\n", continues=True)[-1]
    texts = []
    for i, d in enumerate(dialogues):
        rng, text = random.Random(f"{seed} {i}"), ""
        for _ in range(3):
            example = dialogue(rng)
            while example["category"] != d["category"]:
                example = dialogue(rng)
            for m in demonstrate(example, rng, "careful"):
                text += f"{'Question' if m['role'] == 'user' else 'Answer'}: {m['content']}\n"
        texts.append(text)
    said: list[list[dict]] = [[] for _ in dialogues]
    for turn in range(max(len(d["turns"]) for d in dialogues)):
        going = [i for i, d in enumerate(dialogues) if len(d["turns"]) > turn]
        for i in going:
            texts[i] += f"Question: {dialogues[i]['turns'][turn]['user']}\nAnswer:"
        prompts = [[tokenizer.bos_id, *tokenizer.encode(texts[i])] for i in going]
        stop_ids = (newline, tokenizer.eos_id)
        samples = generate(model, prompts, config.max_tokens, config.temperature, stop_ids=stop_ids,
                           seed=seed * 10 + turn, progress=f"turn {turn + 1}")
        for i, (sample,) in zip(going, samples, strict=True):
            text = tokenizer.decode(sample.tokens).strip()
            said[i].append({"text": text, "finished": sample.finished})
            texts[i] += f" {text}\n"
    return said


# ------------------------------------------------------------------------------------------ report

def summarize(scores: dict[int, list[list[dict]]], dialogues: list[dict], baseline: dict[int, list[list[dict]]]) -> dict:
    """One model's numbers from its graded replies by seed, in points of 100 where they are scores."""
    everything = [r for graded in scores.values() for d in graded for r in d]
    follow_ups = [r["gold"] for graded in scores.values() for d in graded for r in d[1:]]
    by_seed, baseline_by_seed = ({seed: 100 * mean(r["gold"] for d in graded for r in d) for seed, graded in x.items()}
                                 for x in (scores, baseline))
    gains = [by_seed[seed] - baseline_by_seed[seed] for seed in by_seed]
    if len(by_seed) > 1:
        gold_mean, half = interval(list(by_seed.values()))
    else:  # dialogues are independent, the replies of one are not
        (graded,) = scores.values()
        gold_mean, half = mean(by_seed.values()), interval([100 * mean(r["gold"] for r in d) for d in graded])[1]
    wins = win_rate([1.5 + 0.5 * ((a["gold"] > b["gold"]) - (a["gold"] < b["gold"])) for seed in scores
                     for x, y in zip(scores[seed], baseline[seed], strict=True) for a, b in zip(x, y, strict=True)])
    del wins["standard_error"]  # the replies of a dialogue, and the seeds, are not independent rows
    category = {task: 100 * mean(r["gold"] for graded in scores.values() for d, x in zip(dialogues, graded, strict=True)
                                 if d["category"] == task for r in x) for task in dict.fromkeys(d["category"] for d in dialogues)}
    return {"gold": gold_mean, "gold_interval": half, "gold_by_seed": by_seed, "gain": mean(gains),
            "gain_interval": interval(gains)[1] if len(gains) > 1 else None, "gain_by_seed": dict(zip(by_seed, gains, strict=True)),
            **wins, "category": category, "first_turn": 100 * mean(d[0]["gold"] for graded in scores.values() for d in graded),
            "follow_up": 100 * mean(follow_ups) if follow_ups else None,
            "ended": 100 * mean(r["finished"] for r in everything), "words": mean(len(words(r["text"])) for r in everything)}


def table(report: dict) -> str:
    """The report's models, one a line."""
    over = "seeds" if len(report["seeds"]) > 1 else "dialogues"
    lines = [f"{'model':<22} {'gold':>6}  95 % ({over})  wins vs {report['baseline']:<10} first  follow-up  ended  words"]
    for name, m in report["models"].items():
        lines.append(f"{name:<22} {m['gold']:6.1f}  ± {m['gold_interval']:<12.1f}  {m['win_rate']:5.1f} % {'':<10} {m['first_turn']:5.1f}  "
                     f"{m['follow_up'] or math.nan:9.1f}  {m['ended']:5.1f}  {m['words']:5.1f}")
    return "\n".join(lines)


def draw(report: dict, file: Path) -> None:
    """Gold scores with intervals on the left, by task on the right."""
    import matplotlib  # here: it takes a second to import, and only this needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(report["models"])
    tasks = list(next(iter(report["models"].values()))["category"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 0.5 * len(names) + 2.2), width_ratios=[2, 3], layout="constrained")
    for i, name in enumerate(names):
        m = report["models"][name]
        left.barh(i, m["gold"], xerr=m["gold_interval"], color="#4c72b0", alpha=0.85, capsize=3)
        left.plot(list(m["gold_by_seed"].values()), [i] * len(m["gold_by_seed"]), "k.", markersize=4)
        left.text(2, i, f"{m['gold']:.1f}", va="center", color="white", fontweight="bold")
    left.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 100), xlabel="gold score (95 % interval, dots: seeds)")
    left.invert_yaxis()
    grid = [[report["models"][name]["category"][task] for task in tasks] for name in names]
    right.imshow(grid, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            right.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black", fontsize=9)
    right.set(yticks=[], xticks=range(len(tasks)), title="gold score by task")
    right.set_xticklabels([task.replace("_", " ") for task in tasks], rotation=30, ha="right")
    figure.savefig(file, dpi=130)


def side_by_side(dialogues: list[dict], replies: dict[str, dict[int, list[list[dict]]]], seed: int, count: int) -> str:
    """Some dialogues, evenly over the file, with every model's first reply and its grade."""
    lines = []
    for i in range(0, len(dialogues), -(-len(dialogues) // count) if count else len(dialogues) + 1):
        lines.append(f"\n[{dialogues[i]['category']}] {dialogues[i]['turns'][0]['user']}")
        for name, by_seed in replies.items():
            first = by_seed[seed][i][0]
            lines.append(f"  {name:<22} {100 * first['gold']:4.0f}  {first['text']}{'' if first['finished'] else ' ...'}")
    return "\n".join(lines) + "\n"


def load_dialogues(path: str) -> list[dict]:
    """The tiny world's held-out dialogues, as data/tiny/build.py writes them."""
    if not Path(path).is_file():
        fail(f"data={path}: no such file, expected test.jsonl of data/tiny/build.py")
    try:
        dialogues = [json.loads(line) for line in Path(path).read_text().splitlines()]
        usable = dialogues and all(d["category"] in TASKS and d["turns"][0]["user"] for d in dialogues)
    except (ValueError, KeyError, TypeError, IndexError):
        usable = False
    return dialogues if usable else fail(f"data={path}: holds no dialogues of the tiny world, expected its test.jsonl or dev.jsonl")


def main(config: Config) -> None:
    device = runtime.setup(config.device, 0, config.threads)
    dialogues = load_dialogues(config.data)
    replies: dict[str, dict[int, list[list[dict]]]] = {}
    for entry in config.models:
        name, _, where = entry.partition("=")
        replies[name] = {}
        for seed in config.seeds:
            path = where.replace("{seed}", str(seed))
            answer = few_shot_replies if path.startswith("few-shot:") else chat_replies
            said = answer(path.removeprefix("few-shot:"), dialogues, config, seed, device)
            for d, texts in zip(dialogues, said, strict=True):
                for turn, reply in zip(d["turns"], texts, strict=True):
                    reply["gold"] = gold(d["category"], turn["item"], reply["text"], reply["finished"])
            replies[name][seed] = said
            print(f"{name}, seed {seed}: gold {100 * mean(r['gold'] for x in said for r in x):.1f}", flush=True)
    baseline = config.baseline or next(iter(replies))
    report = {"data": config.data, "dialogues": len(dialogues), "replies": sum(len(d["turns"]) for d in dialogues),
              "seeds": list(config.seeds), "temperature": config.temperature, "baseline": baseline, "torch": torch.__version__,
              "models": {name: summarize(x, dialogues, replies[baseline]) for name, x in replies.items()}}
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    runtime.write_text(out / "judge.json", json.dumps(report, indent=1) + "\n")
    lines = (json.dumps({"id": d["id"], "model": name, "seed": seed, "replies": said[i]}) + "\n"
             for name, by_seed in replies.items() for seed, said in by_seed.items() for i, d in enumerate(dialogues))
    runtime.write_text(out / "replies.jsonl", "".join(lines))
    samples = side_by_side(dialogues, replies, config.seeds[0], config.show)
    runtime.write_text(out / "samples.txt", samples)
    draw(report, out / "judge.png")
    print(samples)
    print(f"{len(dialogues)} dialogues, {report['replies']} replies a model and seed, temperature {config.temperature}\n{table(report)}")
    print(f"\nwrote {out}/judge.json, judge.png, samples.txt and replies.jsonl (every reply and its grade)")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
