"""How long a run takes to have its data: tokenized at the first start, read from the cache at the next, and its memory.

    WRITE=1 python -m pytest tests/test_startup.py      3,000 to 200,000 dialogues, to benchmarks/results/startup.json

Dialogues are as long as UltraChat's: three or four rounds, about 1,200 tokens. Each measurement is a process of its
own, so that its memory is that of the data beside what is imported. Resident memory after every tree was read once
holds the pages of tokens.bin, which ranks share and the system takes back when it needs them.
"""
import json
import os
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from conftest import BASE, ROOT

import sft
from benchmarks.measure import machine, save
from data.store import load_trees
from data.tiny.world import demonstrate, dialogue
from data.tokenizer import Tokenizer, load_tokenizer

TOKENS, WRITE = 1200, "WRITE" in os.environ  # of a dialogue, in the mean


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
    """`count` dialogues that have about TOKENS tokens each."""
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


def ready() -> Tokenizer:
    tokenizer = load_tokenizer(BASE)
    tokenizer.adopt("zephyr")
    return tokenizer


def start(data: str, cache: str) -> dict:
    """What one start of sft.py up to its data takes."""
    tokenizer = ready()
    before, used, began = resident(), sum(os.times()[:4]), time.perf_counter()  # of CPUs: with workers waited for
    trees = load_trees(data, tokenizer, 2048, sft.replies, cache=cache)
    seconds, used, after = time.perf_counter() - began, sum(os.times()[:4]) - used, resident()
    for _ in trees:
        pass
    return {"seconds": seconds, "cpu_seconds": used, "tokens": trees.counts["tokens"],
            "resident_mib": after - before, "resident_after_an_epoch_mib": resident() - before}


def measure(count: int, folder: Path) -> dict:
    """A first start and a second one."""
    data, cache = folder / "data.jsonl", folder / f"cache {count}"
    write_dialogues(data, count, ready())
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        cold, warm = (processes.submit(start, str(data), str(cache)).result() for _ in range(2))
    return {"dialogues": count, "tokens": cold["tokens"], "cold_s": cold["seconds"], "cold_cpu_s": cold["cpu_seconds"],
            "warm_s": warm["seconds"], **{key: warm[key] for key in warm if key.endswith("_mib")}}


def test_a_second_start_reads_what_the_first_has_tokenized(tmp_path):
    # 1,100 are few, but enough to be kept
    rows = [measure(count, tmp_path) for count in ((3000, 30_000, 200_000) if WRITE else (1100,))]
    if WRITE:
        save(ROOT / "benchmarks" / "results" / "startup.json", {
            "command": "WRITE=1 python -m pytest tests/test_startup.py", **machine(torch.device("cpu")), "rows": rows})
    for row in rows:
        assert abs(row["tokens"] / row["dialogues"] / TOKENS - 1) < 0.25
        assert 0 < row["warm_s"] < row["cold_s"] and row["resident_after_an_epoch_mib"] > 2 * row["tokens"] / 2**20
