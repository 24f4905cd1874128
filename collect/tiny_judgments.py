"""Lessons for a judge of the tiny world: which of two replies an annotator chose, as demonstrations for sft.py.

    python -m collect.tiny_judgments pairs=runs/tiny/0/pairs_reward.jsonl out=runs/tiny/0/judgments.jsonl

The user's message shows the dialogue with two replies, A and B, in judging/prompts.py's bare wording; the assistant
says "A" or "B". Which reply is called A is random for every pair, so the lessons favour neither side.
"""
import random
from dataclasses import dataclass

import runtime
from data.formats import read_all
from data.records import write_lines
from judging.prompts import Question, ask_pair


@dataclass(frozen=True)
class Config:
    pairs: str = "runs/tiny/0/pairs_reward.jsonl"  # JSONL of preferences
    out: str = "judgments.jsonl"                   # JSONL of dialogues to imitate
    seed: int = 0                                  # of which reply is A


def lesson(record: dict, chosen_first: bool) -> dict:
    """One preference record as one dialogue to imitate."""
    said = [m["content"] for m in record["prompt"]]
    question = Question(str(record.get("id", "")), record.get("category", ""), said[0::2])
    chosen, rejected = ([*said[1::2], record[side]] for side in ("chosen", "rejected"))
    first, second = (chosen, rejected) if chosen_first else (rejected, chosen)
    asked = ask_pair(question, first, second, "label", "bare")
    return {"messages": [*asked, {"role": "assistant", "content": "A" if chosen_first else "B"}]}


def main(config: Config) -> None:
    records = read_all(config.pairs, "preference")
    rng = random.Random(f"judgments {config.seed}")
    write_lines(config.out, [lesson(record, rng.random() < 0.5) for record in records])
    print(f"wrote {len(records)} judgments to {config.out}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
