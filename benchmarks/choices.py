"""How fast judging/choices.py scores multiple choice, beside the plain way: one continuation after another.

    python -m benchmarks.choices threads=2 out=benchmarks/results/choices.json

As many questions, choices and shots as the four tasks of the Open LLM Leaderboard have, made of random words and kept
short, for the tiny model has 512 positions; only TruthfulQA's six fixed questions are the real ones. The plain way encodes
context and choice together and runs `model(input_ids)` on that row alone. It is timed on a sample, in turns with slices of
the packed run, so that whatever else the machine does slows both; encoding counts in both.
"""
from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

import runtime
from benchmarks.throughput import processor
from checkpoints import load_model
from data.tokenizer import load_tokenizer
from judging.choices import TASKS, likelihoods, plant, to_requests, with_contexts
from runtime import check_range

COUNTS = {"arc": (1172, 4), "hellaswag": (10042, 4), "mmlu": (14042, 4), "truthfulqa": (817, 7)}  # questions, distinct choices of each
SUBJECTS = 57


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/choices.json"
    model: str = "data/tiny/base"
    share: float = 1.0       # of the questions
    slices: int = 6          # of each task; after each, the plain way takes its turn
    sample: int = 16         # continuations it scores then
    max_tokens: int = 1024   # of a batch
    threads: int = 0

    def __post_init__(self):
        for key, low, high in (("share", 0.001, 1), ("slices", 1, 100), ("sample", 1, inf), ("max_tokens", 1, inf), ("threads", 0, inf)):
            check_range(key, getattr(self, key), low, high)


def question(task: str, number: int, rng: random.Random, words: list[str]):
    """A question in the task's own form."""
    text = " ".join(rng.choices(words, k=rng.randint(5, 9)))
    choices = [f"{' '.join(rng.choices(words, k=rng.randint(1, 4)))} {i}" for i in range(COUNTS[task][1])]
    return TASKS[task].read({
        "arc": {"question": text, "choices": choices, "answerKey": "ABCD"[number % 4]},
        "hellaswag": {"query": text, "choices": choices, "gold": number % 4},
        "mmlu": {"subject": str(number % SUBJECTS), "question": text, "choices": choices, "answer": number % 4},
        "truthfulqa": {"question": text, "mc1_targets": dict.fromkeys(choices[:2], 0) | {choices[0]: 1},
                       "mc2_targets": dict.fromkeys(choices, 0) | {choices[0]: 1}},
    }[task])


def asked(task: str, share: float, words: list[str]) -> list[list]:
    """Questions and their contexts, by subject."""
    rng, shots, count = random.Random(task), TASKS[task].shots, round(share * COUNTS[task][0])
    questions, examples = ([question(task, i, rng, words) for i in range(n)] for n in (count, SUBJECTS * 5))
    return [with_contexts([q for q in questions if q.subject == s], [e for e in examples if e.subject == s], shots)
            for s in dict.fromkeys(q.subject for q in questions)]


@torch.no_grad()
def one_by_one(model, tokenizer, context: str, choice: str) -> float:
    start, whole = tokenizer.encode(context), tokenizer.encode(f"{context} {choice}")
    ids, targets = [tokenizer.bos_id, *whole], torch.tensor(whole[len(start) :])
    logits = model(torch.tensor([ids[:-1]]))[0, len(start) :]
    return logits.log_softmax(-1).gather(1, targets[:, None]).double().sum().item()


def measure(task: str, model, tokenizer, words: list[str], config: Config) -> dict:
    subjects = asked(task, config.share, words)
    if len(subjects) == 1:  # slices of one list; of MMLU, whole subjects
        subjects = [subjects[0][i :: config.slices] for i in range(config.slices)]
    row = {"task": task, "shots": TASKS[task].shots, "questions": 0, "continuations": 0, "context_tokens": 0, "tokens": 0, "cut": 0,
           "seconds": 0.0, "plain_sample": 0, "plain_seconds": 0.0, "largest_difference": 0.0}
    rng = random.Random(0)
    for turn in range(config.slices):
        part = [pair for subject in subjects[turn :: config.slices] for pair in subject]
        began = time.perf_counter()
        requests, cut = to_requests(tokenizer, part, model.config.max_positions, bos=True)
        found = likelihoods(model, [request for of_one in requests for request in of_one], config.max_tokens)
        row["seconds"] += time.perf_counter() - began
        row["questions"] += len(part)
        row["continuations"] += len(found)
        row["context_tokens"] += sum(len(of_one[0][0]) for of_one in requests)
        row["tokens"] += sum(tree.tokens for tree in plant(found, config.max_tokens))
        row["cut"] += cut
        for _ in range(min(config.sample, len(part))):
            i = rng.randrange(len(part))
            c = rng.randrange(len(requests[i]))
            began = time.perf_counter()
            alone = one_by_one(model, tokenizer, part[i][1], part[i][0].choices[c])
            row["plain_seconds"] += time.perf_counter() - began
            row["plain_sample"] += 1
            row["largest_difference"] = max(row["largest_difference"], abs(alone - found[requests[i][c]]))
    row["context_tokens"] /= row["questions"]
    return row | rates(row["continuations"], row["seconds"], row["continuations"] * row["plain_seconds"] / row["plain_sample"])


def rates(continuations: int, seconds: float, plain_seconds: float) -> dict:
    return {"per_s": continuations / seconds, "plain_per_s": continuations / plain_seconds, "times_as_fast": plain_seconds / seconds}


def main(config: Config) -> None:
    runtime.setup("cpu", 0, config.threads)
    tokenizer, model = load_tokenizer(config.model), load_model(config.model, torch.float32)
    words = [name[1:] for name in tokenizer.vocabulary.names if name[1:].isalpha() and name[0] == "▁" and name.islower()]
    rows = []
    for task in COUNTS:
        row = measure(task, model, tokenizer, words, config)
        rows.append(row)
        print(f"{task:<11} {row['continuations']:7,} continuations after {row['context_tokens']:.0f} tokens  {row['per_s']:8,.1f}/s  "
              f"one by one {row['plain_per_s']:7,.1f}/s ({row['plain_sample']} of them)  {row['times_as_fast']:.1f} times  "
              f"difference {row['largest_difference']:.1e}", flush=True)
    count, seconds, sample = (sum(row[key] for row in rows) for key in ("continuations", "seconds", "plain_sample"))
    total = {"continuations": count, "seconds": seconds, "plain_sample": sample}
    total |= rates(count, seconds, sum(row["continuations"] / row["plain_per_s"] for row in rows))
    print(f"together    {count:7,} continuations  {total['per_s']:,.1f}/s  one by one {total['plain_per_s']:,.1f}/s ({sample} of them)  "
          f"{total['times_as_fast']:.1f} times")
    report = {"command": f"python -m benchmarks.choices share={config.share:g} slices={config.slices} threads={config.threads}",
              "device": processor(torch.device("cpu")), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "model": config.model, "dtype": "float32", "max_tokens": config.max_tokens,
              "tasks": rows, "together": total}
    runtime.write_text(Path(config.out), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
