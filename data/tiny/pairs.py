"""Collect preferences in the tiny world: a model answers twice, an annotator chooses, the dialogue goes on.

    python -m data.tiny.pairs model=runs/tiny/0/sft/model prompts=runs/tiny/0/data/prompts.jsonl out=pairs.jsonl

For every turn of every dialogue the model gives two replies. An annotator says which is better and how clearly, as
in the talk's protocol (Llama-2's: choose, then a margin from 1 to 4), or cannot tell. The reply chosen
enters the history and the user goes on. Annotators know good work when they see it, roughly:

    utility = gold + 0.05 tanh((words - words of a reference) / 8) + Normal(0, 0.08)

so longer replies please a little whatever they say. Utilities closer than 0.1 are a tie and make no pair;
margin 1, 2, 3, 4 stands for a difference under 0.15, 0.3, 0.5, and above. What leaves this file is
choices and margins, never a grade.
"""
import math
import random
from collections import Counter
from dataclasses import dataclass
from math import inf
from pathlib import Path

import runtime
from checkpoints import load_model
from data.records import lines, write_lines
from data.tiny.world import TASKS, gold, words
from data.tokenizer import load_tokenizer
from model import generate


@dataclass(frozen=True)
class Config:
    model: str = ""                 # who answers
    prompts: str = ""               # JSONL of dialogues, from data/tiny/build.py
    out: str = "pairs.jsonl"        # JSONL of preferences, one line a rated turn
    temperature: float = 1.0        # of both replies
    max_tokens: int = 64            # of a reply
    noise: float = 0.08             # standard deviation of an annotator's utility, 0-0.3
    length_bias: float = 0.05       # what a much longer reply gains, 0-0.2
    tie: float = 0.1                # differences an annotator cannot tell
    seed: int = 0
    device: str = "auto"
    threads: int = 0

    def __post_init__(self):
        runtime.check_ranges(self, temperature=(0, 10), max_tokens=(1, inf), noise=(0, 10), length_bias=(-10, 10),
                             tie=(0, 2), seed=(0, inf))


def annotate(category: str, item: dict, replies: list[str], rng: random.Random,
             config: Config) -> tuple[int, int] | None:
    """Which of two replies an annotator prefers, and the margin 1-4; None when they cannot tell."""
    reference, utilities = len(words(TASKS[category].answer(item, "careful", random.Random(0)))), []
    for reply in replies:
        bonus = config.length_bias * math.tanh((len(words(reply)) - reference) / 8)
        utilities.append(gold(category, item, reply) + bonus + rng.gauss(0, config.noise))
    first, second = utilities
    margin = 1 + sum(abs(first - second) >= step for step in (0.15, 0.3, 0.5))
    return None if abs(first - second) < config.tie else (int(second > first), margin)


def main(config: Config) -> None:
    device = runtime.setup(config.device, config.seed, config.threads)
    if not Path(config.prompts).is_file():
        runtime.fail(f"prompts={config.prompts}: no such file, expected prompts.jsonl of data/tiny/build.py")
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, dtype=runtime.compute_dtype("auto", device), device=device)
    dialogues = [record | {"history": [], "pairs": []} for record in lines(config.prompts)]
    rng, became = random.Random(f"annotators {config.seed}"), Counter()
    for turn in range(max(len(d["turns"]) for d in dialogues)):
        going = [d for d in dialogues if len(d["turns"]) > turn]
        for d in going:
            d["history"].append({"role": "user", "content": d["turns"][turn]["user"]})
        prompts = [tokenizer.render(d["history"], add_generation_prompt=True)[0] for d in going]
        answers = generate(model, prompts, config.max_tokens, config.temperature, n=2, stop_ids=tokenizer.stop_ids(),
                           seed=config.seed * 10 + turn, slots=256, progress=f"turn {turn + 1}")
        for d, samples in zip(going, answers, strict=True):
            replies = [tokenizer.decode(s.tokens).strip() for s in samples]
            if not all(s.finished for s in samples) or not all(replies):
                became["unfinished"] += 1
                d["turns"] = []  # a dialogue ends at a reply that was cut off
                continue
            same = replies[0] == replies[1]
            verdict = None if same else annotate(d["category"], d["turns"][turn]["item"], replies, rng, config)
            better, margin = verdict or (rng.randrange(2), 0)
            became["identical" if same else f"margin {margin}" if margin else "tie"] += 1
            if margin:
                d["pairs"].append({"id": f"{d['id']}-{turn + 1}", "category": d["category"], "turn": turn + 1,
                                   "annotator": f"a{rng.randrange(5)}", "prompt": list(d["history"]),
                                   "chosen": replies[better], "rejected": replies[1 - better], "margin": margin})
            d["history"].append({"role": "assistant", "content": replies[better]})
    pairs = [pair for d in dialogues for pair in d["pairs"]]
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_lines(config.out, pairs)
    counts = ", ".join(f"{what} {count}" for what, count in sorted(became.items()))
    print(f"{config.out}: {len(pairs)} pairs of {became.total()} turns; {counts}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
