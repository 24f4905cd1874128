"""How fast judging/choices.py scores multiple choice, beside the plain way: one continuation after another.

    python -m benchmarks.choices threads=2 out=benchmarks/results/choices.json

As many questions, choices and shots as the four tasks of the Open LLM Leaderboard have, made of random words and kept
short, for the tiny model has 512 positions; only TruthfulQA's six fixed questions are the real ones. The plain way
encodes context and choice together and runs `model(input_ids)` on that row alone. It is timed on a sample, in turns
with slices of the packed run, so that whatever else the machine does slows both; encoding counts in both.
"""
import random
from dataclasses import dataclass

import torch

import runtime
from benchmarks.measure import machine, save, timed
from checkpoints import load_model
from data.tokenizer import load_tokenizer
from judging.choices import TASKS, likelihoods, to_requests, with_contexts

MODEL = "data/tiny/base"
# Questions, distinct choices of each.
COUNTS = {"arc": (1172, 4), "hellaswag": (10042, 4), "mmlu": (14042, 4), "truthfulqa": (817, 7)}
SUBJECTS = 57
SLICES = 8         # of each task; after each, the plain way takes its turn
SAMPLE = 16        # continuations it scores then
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/choices.json"
    threads: int = 0


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


def slices(task: str, words: list[str]) -> list[list]:
    """Questions with their contexts, subject by subject, in SLICES parts."""
    rng, shots = random.Random(task), TASKS[task].shots
    questions, examples = ([question(task, i, rng, words) for i in range(n)] for n in (COUNTS[task][0], SUBJECTS * 5))
    pairs = [pair for subject in dict.fromkeys(q.subject for q in questions) for pair in with_contexts(
        [q for q in questions if q.subject == subject], [e for e in examples if e.subject == subject], shots)]
    return [pairs[i * len(pairs) // SLICES : (i + 1) * len(pairs) // SLICES] for i in range(SLICES)]


def packed(model, tokenizer, part: list) -> tuple[list, dict]:
    """The requests of every question, and the log-likelihood of every request."""
    requests, _ = to_requests(tokenizer, part, model.config.max_positions, bos=True)
    return requests, likelihoods(model, [request for of_one in requests for request in of_one], BATCH_TOKENS)


@torch.no_grad()
def one_by_one(model, tokenizer, context: str, choice: str) -> float:
    """The plain way."""
    start, whole = tokenizer.encode(context), tokenizer.encode(f"{context} {choice}")
    ids, targets = [tokenizer.bos_id, *whole], torch.tensor(whole[len(start) :])
    logits = model(torch.tensor([ids[:-1]]))[0, len(start) :]
    return logits.log_softmax(-1).gather(1, targets[:, None]).double().sum().item()


def measure(task: str, model, tokenizer, words: list[str]) -> dict:
    row = {"task": task, "shots": TASKS[task].shots, "questions": 0, "continuations": 0, "seconds": 0.0,
           "plain_sample": 0, "plain_seconds": 0.0, "largest_difference": 0.0}
    rng = random.Random(0)
    for part in slices(task, words):
        (requests, found), taken = timed(packed, model, tokenizer, part)
        row["seconds"] += taken
        row["questions"] += len(part)
        row["continuations"] += len(found)
        for _ in range(SAMPLE):
            i = rng.randrange(len(part))
            c = rng.randrange(len(requests[i]))
            alone, taken = timed(one_by_one, model, tokenizer, part[i][1], part[i][0].choices[c])
            row["plain_seconds"] += taken
            row["plain_sample"] += 1
            row["largest_difference"] = max(row["largest_difference"], abs(alone - found[requests[i][c]]))
    return with_rates(row | {"plain_s": row["continuations"] * row["plain_seconds"] / row["plain_sample"]})


def with_rates(row: dict) -> dict:
    return row | {"per_s": row["continuations"] / row["seconds"], "plain_per_s": row["continuations"] / row["plain_s"],
                  "times_as_fast": row["plain_s"] / row["seconds"]}


def main(config: Config) -> None:
    runtime.setup("cpu", 0, config.threads)
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL, torch.float32)
    names = [name for name in tokenizer.vocabulary.names if name[0] == "▁" and name.islower()]
    words = [name[1:] for name in names if name[1:].isalpha()]
    line = ("{task:<11} {continuations:7,} continuations  {per_s:8,.1f}/s  one by one {plain_per_s:7,.1f}/s "
            "({plain_sample} of them)  {times_as_fast:.1f} times")
    rows = []
    for task in COUNTS:
        rows.append(measure(task, model, tokenizer, words))
        print(line.format(**rows[-1]) + f"  difference {rows[-1]['largest_difference']:.1e}", flush=True)
    added = ("continuations", "seconds", "plain_sample", "plain_s")
    total = with_rates({key: sum(row[key] for row in rows) for key in added})
    print(line.format(task="together", **total))
    save(config.out, {"command": f"python -m benchmarks.choices threads={config.threads}",
                      **machine(torch.device("cpu")), "model": MODEL, "dtype": "float32", "max_tokens": BATCH_TOKENS,
                      "tasks": rows, "together": total})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
