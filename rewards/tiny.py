"""Reward functions in the tiny world, and the prompts that they can judge.

    python -m rewards.tiny dialogues=runs/tiny/0/data/prompts.jsonl pairs=runs/tiny/0/pairs.jsonl \\
        out=runs/tiny/0/checkable.jsonl
    python ppo.py --config configs/tiny/ppo_rule.toml

    gold        the grade by which models are judged in the end: what PPO could reach if the reward were right
    required    the share of the words that every right reply holds: simple to check, and simple to please, since
                nothing is said of the other words

Preferences (data/tiny/pairs.py) do not say what a task was about; the command gives their prompts the columns "item",
which the grader reads, and "required".
"""
import json
import random
from dataclasses import dataclass
from pathlib import Path

import runtime
from data.records import lines, write_lines
from data.tiny import world
from data.tiny.world import TASKS, words


def gold(records: list[dict], replies: list[str], tokens: list[int], finished: list[bool]) -> list[float]:
    return [world.gold(record["category"], record["item"], reply, ended)
            for record, reply, ended in zip(records, replies, finished, strict=True)]


def required(records: list[dict], replies: list[str], tokens: list[int], finished: list[bool]) -> list[float]:
    return [len(set(record["required"]) & set(words(reply))) / len(record["required"])
            for record, reply in zip(records, replies, strict=True)]


def required_words(category: str, item: dict) -> list[str]:
    """The words that ten careful replies have in common."""
    said = [set(words(TASKS[category].answer(item, "careful", random.Random(seed)))) for seed in range(10)]
    return sorted(set.intersection(*said))


@dataclass(frozen=True)
class Config:
    dialogues: str = "runs/tiny/0/data/prompts.jsonl"  # of data/tiny/build.py
    pairs: str = "runs/tiny/0/pairs.jsonl"             # of data/tiny/pairs.py, made from them
    out: str = "runs/tiny/0/checkable.jsonl"


def main(config: Config) -> None:
    for path in (config.dialogues, config.pairs):
        if not Path(path).is_file():
            runtime.fail(f"{path}: no such file, expected one that `make demo` leaves in runs/tiny/0")
    turns = {}
    for record in lines(config.dialogues):
        turns |= {f"{record['id']}-{i}": turn["item"] for i, turn in enumerate(record["turns"], 1)}
    checkable = {}  # by prompt: the first of equal ones
    for pair in lines(config.pairs):
        category, item = pair["category"], turns[pair["id"]]
        checkable.setdefault(json.dumps(pair["prompt"]), {
            "prompt": pair["prompt"], "category": category, "item": item, "required": required_words(category, item)})
    write_lines(config.out, checkable.values())
    print(f"{config.out}: {len(checkable)} prompts")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
