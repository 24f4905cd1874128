"""How long a run takes to have its data: tokenized at the first start, read from the cache at the next, and its memory.

    python -m benchmarks.startup                                              3,000 and 30,000, the tiny vocabulary
    python -m benchmarks.startup dialogues='[200000]' models='["MODEL"]'      the tokenizer of any checkpoint

Dialogues are as long as UltraChat's: three or four rounds, about 1,200 tokens. Each measurement is a process of its
own, so that its memory is that of the data beside what is imported. Resident memory after every tree was read once
holds the pages of tokens.bin, which ranks share and the system takes back when it needs them.
"""
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import runtime
import sft
from benchmarks.measure import machine, save
from data.store import load_trees
from data.tiny.world import demonstrate, dialogue
from data.tokenizer import Tokenizer, load_tokenizer

TOKENS = 1200  # of a dialogue, in the mean


@dataclass(frozen=True)
class Config:
    dialogues: list[int] = (3000, 30000)
    models: list[str] = ("data/tiny/base",)  # checkpoints whose tokenizers to use
    out: str = "benchmarks/results/startup.json"


def texts(rng: random.Random) -> Iterator[str]:
    """Sentences of the tiny world, with made-up words between them: real texts hold words no vocabulary has whole."""
    said = [m["content"] for _ in range(2000) for m in demonstrate(dialogue(rng), rng)]
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    while True:
        yield rng.choice(said)
        yield "".join(rng.choices(syllables, k=rng.randint(1, 3))) + "."


def messages(parts: Iterator[str], rng: random.Random, characters: float) -> list[dict]:
    """A dialogue of three or four rounds, each a short question and a long reply, of so many characters in the mean."""
    made = []
    for _ in range(rng.choice((3, 4))):
        for role, share in (("user", 0.2), ("assistant", 0.8)):
            text, size = next(parts), characters / 3.5 * share * rng.uniform(0.2, 1.8)
            while len(text) < size:
                text += " " + next(parts)
            made.append({"role": role, "content": text})
    return made


def write_dialogues(path: Path, count: int, tokenizer: Tokenizer) -> None:
    """`count` dialogues that have about TOKENS tokens each under this tokenizer."""
    rng = random.Random(0)
    parts, characters = texts(rng), 4.0 * TOKENS
    for _ in range(3):  # a vocabulary decides how many characters that is
        found = sum(len(tokenizer.render(messages(parts, rng, characters))[0]) for _ in range(200)) / 200
        characters *= TOKENS / found
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"messages": messages(parts, rng, characters)}) + "\n")


def resident() -> float:
    """MiB of this process, pages of files among them."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def start(data: str, model: str, cache: str) -> dict:
    """What one start of sft.py up to its data takes."""
    tokenizer = load_tokenizer(model)
    tokenizer.adopt(tokenizer.template or "zephyr")
    before, used, began = resident(), sum(os.times()[:4]), time.perf_counter()  # of CPUs: with workers waited for
    trees = load_trees(data, tokenizer, 2048, sft.replies, cache=cache)
    seconds, used, after = time.perf_counter() - began, sum(os.times()[:4]) - used, resident()
    for _ in trees:
        pass
    return {"seconds": seconds, "cpu_seconds": used, "tokens": trees.counts["tokens"],
            "resident_mib": after - before, "resident_after_an_epoch_mib": resident() - before}


def measure(count: int, model: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder) / "data.jsonl", Path(folder) / "cache"
        tokenizer = load_tokenizer(model)
        tokenizer.adopt(tokenizer.template or "zephyr")
        write_dialogues(data, count, tokenizer)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
            cold, warm = (processes.submit(start, str(data), model, str(cache)).result() for _ in range(2))
    row = {"dialogues": count, "tokenizer": Path(model).name, "tokens": cold["tokens"], "cold_s": cold["seconds"],
           "cold_cpu_s": cold["cpu_seconds"], "warm_s": warm["seconds"]}
    row |= {key: warm[key] for key in warm if key.endswith("_mib")}
    print("{dialogues:8,} dialogues  {tokenizer:<10} {tokens:12,} tokens  cold {cold_s:6.1f} s, {cold_cpu_s:6.1f} s of "
          "CPUs  warm {warm_s:5.2f} s  resident {resident_mib:5.0f} MiB, {resident_after_an_epoch_mib:5.0f} after an "
          "epoch".format(**row))
    return row


def main(config: Config) -> None:
    rows = [measure(count, model) for model in config.models for count in config.dialogues]
    save(config.out, {"command": "python -m benchmarks.startup", **machine(runtime.find_device("cpu")), "rows": rows})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
