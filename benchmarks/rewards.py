"""A learnt reward, a rule and the gold grade, each with the KL term and without: what the policy becomes under each.

    make runs/tiny/{0,1,2}/reward/model/config.json
    python -m benchmarks.rewards

The same SFT models, prompts, seeds and updates (configs/tiny/ppo_rule.toml), only the reward is another. Weights give
the three about the same spread: over the SFT models' replies the grade has a standard deviation of 0.32, the rule one
of 0.39, and the learnt score is in its own. Every policy then answers the dev dialogues.
"""
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

import ppo
import runtime
from benchmarks.measure import save
from benchmarks.overoptimisation import replies_of
from data.records import lines
from data.tiny import world
from rewards import tiny

REWARDS = {"learnt": "", "rule": "3 * rewards/tiny.py:required", "gold": "3 * rewards/tiny.py:gold"}
# Over-optimised: nothing holds the policy, twice the learning rate, and twice the steps.
FREE = ["kl_coef=0", "lr=6e-4", "schedule=constant", "max_kl=1000", "max_ratio=1e9", "min_eos=0"]


@dataclass(frozen=True)
class Config:
    runs: str = "runs/tiny"          # with {seed}/sft, reward, data, pairs.jsonl; a folder rewards/ is added to each
    seeds: list[int] = (0, 1, 2)
    steps: int = 15                  # with the KL term
    free_steps: int = 30             # without
    threads: int = 1
    out: str = "benchmarks/results/rewards.json"


def trained(folder: Path, seed: int, reward: str, steps: int, free: bool, threads: int) -> Path:
    """The folder of one run; a finished one is not repeated."""
    out = folder / "rewards" / f"{reward}{'_free' if free else ''}"
    words = [f"model={folder}/sft/model", f"reward_model={folder}/reward/model", f"data={folder}/checkable.jsonl",
             f"reward={REWARDS[reward]}", f"out={out}", f"seed={seed}", f"steps={steps}", f"threads={threads}"]
    if not (out / "model").is_dir():
        ppo.main(runtime.load_config(ppo.Config, "", ["--config", "configs/tiny/ppo_rule.toml", *words,
                                                      *(FREE if free else [])]))
    return out


def judged(path: Path, data: Path, device: torch.device) -> dict:
    """Gold grade, share of required words (both of 100), and length of a policy's replies."""
    replies = replies_of(path, str(data), device)
    asked = [{"required": tiny.required_words(category, item)} for category, item, _, _ in replies]
    texts = [text for _, _, text, _ in replies]
    return {"gold": 100 * mean(world.gold(*reply) for reply in replies),
            "rule": 100 * mean(tiny.required(asked, texts, [], [])),
            "words": mean(len(world.words(text)) for text in texts)}


def logged(out: Path, scale: float) -> dict:
    """KL and score of the last five steps, and the score of the first, as the reward gives it."""
    steps = lines(out / "metrics.jsonl")
    return {"kl": mean(s["kl"] for s in steps[-5:]), "score": mean(s["score"] for s in steps[-5:]) / scale,
            "score_at_first": steps[0]["score"] / scale}


def main(config: Config) -> None:
    device = runtime.setup("auto", 0, config.threads)
    conditions = [(reward, free) for free in (False, True) for reward in REWARDS]
    rows = {condition: [] for condition in [("SFT", None), *conditions]}
    for seed in config.seeds:
        folder = Path(config.runs) / str(seed)
        dev = folder / "data" / "dev.jsonl"
        tiny.main(tiny.Config(str(folder / "data" / "prompts.jsonl"), str(folder / "pairs.jsonl"),
                              str(folder / "checkable.jsonl")))
        start = judged(folder / "sft" / "model", dev, device)
        rows["SFT", None].append(start | {"gain": 0.0, "kl": 0.0, "score": None, "score_at_first": None})
        for reward, free in conditions:
            steps = config.free_steps if free else config.steps
            out = trained(folder, seed, reward, steps, free, config.threads)
            found = judged(out / "model", dev, device)
            rows[reward, free].append(found | {"gain": found["gold"] - start["gold"]}
                                      | logged(out, 3.0 if REWARDS[reward] else 1.0))
            print(seed, reward, free, rows[reward, free][-1], flush=True)
        save(config.out, report(rows, config))


def report(rows: dict, config: Config) -> dict:
    """A row for every condition, its numbers a list by seed, of the seeds done so far."""
    done = len(rows["SFT", None])
    size = {None: {"kl_coef": "-", "steps": 0}, False: {"kl_coef": "0.2", "steps": config.steps},
            True: {"kl_coef": "0", "steps": config.free_steps}}
    return {"command": "python -m benchmarks.rewards", "seeds": list(config.seeds)[:done], "rows": [
        {"reward": reward} | size[free]
        | {key: None if found[0][key] is None else [run[key] for run in found] for key in found[0]}
        for (reward, free), found in rows.items()]}


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
