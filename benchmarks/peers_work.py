"""The work that both sides of benchmarks/peers.py do, and how they take turns. NumPy alone, for any environment.

Token ids are random; lengths are spread as real ones are (lognormal, sigma 0.6). A worker is a process that does one
step of one task whenever its turn comes, and reports how long it took.
"""
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    width: int
    layers: int
    heads: int
    mlp_width: int
    vocab: int
    longest: int     # tokens of a dialogue
    prompt: int      # mean tokens of a user's turn
    reply: int       # mean tokens of a reply
    batch: int       # dialogues, pairs of a step
    micro_tokens: int            # of ours at a time
    kv_heads: int = 0            # 0: as many as heads
    dtype: str = "float32"       # of activations; weights that train are fp32
    checkpointing: bool = False
    device: str = "cpu"

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def operations(self, tokens: int, targets: int, seen: int) -> float:
        """Multiplications and additions of a training step, nothing computed twice.

        `targets` tokens reach the head; `seen` sums over all tokens how many keys their attention sees.
        """
        heads, keys = self.heads * self.head_dim, (self.kv_heads or self.heads) * self.head_dim
        block = self.width * (2 * heads + 2 * keys + 3 * self.mlp_width)
        head, attention = 2 * targets * self.width * self.vocab, 4 * seen * heads * self.layers
        return 3 * (2 * tokens * self.layers * block + head + attention)


SHAPES = {
    "15 M": Shape(288, 6, 6, 768, 32000, 512, 85, 160, 8, 1024),
    "2 M": Shape(128, 4, 4, 512, 2048, 256, 48, 95, 16, 2048),
    "110 M": Shape(768, 12, 12, 2048, 32000, 512, 85, 160, 8, 1024),
    "135 M": Shape(576, 30, 9, 1536, 49152, 512, 85, 160, 8, 1024, kv_heads=3),  # SmolLM2-135M
}
SHAPES["135 M, bf16"] = SHAPES["135 M"]._replace(dtype="bfloat16")
# Mistral-7B, for a GPU: dialogues about as long as UltraChat's, pairs as UltraFeedback's (means of 150 pairs: 160, 307,
# 261 tokens).
MISTRAL = dict(width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, vocab=32000, longest=2048,
               dtype="bfloat16", checkpointing=True, micro_tokens=8192, device="cuda")
SHAPES |= {"7 B, chat": Shape(**MISTRAL, prompt=200, reply=1000, batch=16),
           "7 B, pairs": Shape(**MISTRAL, prompt=160, reply=285, batch=32)}
STEPS = 8            # prepared, of which no item repeats
TURNS = 4            # of a rated dialogue
NEW = 64             # tokens sampled for each prompt
SAMPLED = (1, 16, 64)
MIXED = 192          # prompts whose replies have lengths of their own, 8 to 128 tokens
RL_PROMPTS, RL_REPLIES = 16, 2  # prompts of a rollout, replies to each
LR, CLIP, BETA = 1e-5, 1.0, 0.1
RANK, ALPHA = 16, 32  # of adapters, on every linear layer


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def lengths(rng, mean: float, longest: int, count: int) -> list[int]:
    return np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6, count), 2, longest).astype(int).tolist()


def pairs(shape: Shape) -> list[Pair]:
    """Single turns. SFT takes prompt and chosen."""
    rng, count = np.random.default_rng(0), shape.batch * STEPS
    means = (shape.prompt, shape.reply, shape.reply)
    sizes = zip(*(lengths(rng, mean, shape.longest // 2, count) for mean in means), strict=True)
    return [Pair(*(rng.integers(3, shape.vocab, n).tolist() for n in size)) for size in sizes]


def dialogues(shape: Shape) -> list[list[Pair]]:
    """Rated at every turn: each prompt goes on from the reply chosen before. Turns are half as long as single ones."""
    rng, means = np.random.default_rng(1), (shape.prompt / 2, shape.reply / 2, shape.reply / 2)
    made = []
    for _ in range(shape.batch * STEPS):
        history, turns = [], []
        sizes = zip(*(lengths(rng, mean, shape.longest // TURNS // 2, TURNS) for mean in means), strict=True)
        for asked, won, lost in sizes:
            prompt = history + rng.integers(3, shape.vocab, asked).tolist()
            chosen, rejected = (rng.integers(3, shape.vocab, n).tolist() for n in (won, lost))
            turns.append(Pair(prompt, chosen, rejected))
            history = prompt + chosen
        made.append(turns)
    return made


def rated(shape: Shape, task: str) -> list[list[Pair]]:
    """What the tasks of preferences learn from: dialogues, of one turn unless the task says so."""
    return dialogues(shape) if "dialogues" in task else [[pair] for pair in pairs(shape)]


def prompts(shape: Shape, count: int) -> list[list[int]]:
    """For sampling, 10 to 50 tokens."""
    rng = np.random.default_rng(2)
    return [rng.integers(3, shape.vocab, n).tolist() for n in rng.integers(10, 51, count)]


def reply_lengths() -> list[int]:
    """Of the mixed batch: lognormal around 40 tokens, sigma 0.8."""
    drawn = np.random.default_rng(3).lognormal(np.log(40) - 0.32, 0.8, MIXED)
    return np.clip(drawn, 8, 128).astype(int).tolist()


def sampling(shape: Shape, size: str, how: str = "top_p") -> tuple[list, list[int], int, dict]:
    """Of the task "sample SIZE HOW": prompts, tokens of each reply, how many at a time, and the settings."""
    settings = {"temperature": 0.8, "top_p": 0.9} if how == "top_p" else {"temperature": 0.0}
    if size == "mixed":
        return prompts(shape, MIXED), reply_lengths(), 64, settings
    return prompts(shape, int(size)), [NEW] * int(size), int(size), settings


# ----------------------------------------------------------------------------------- taking turns

Step = Callable[[], dict]   # does a step; {"units": how much work it was, ...}


class Turns:
    """A worker's end of the line to the driver, which writes "step" to standard input and reads a JSON line for it.

    To be made when everything is imported.
    """

    def __init__(self):
        self.started = float(sys.argv[4])  # by a clock that all processes of a machine share
        self.import_s = time.monotonic() - self.started
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever a library prints goes elsewhere

    def wait(self) -> None:
        """Until it is this worker's turn; without another turn the process ends here."""
        if sys.stdin.readline().strip() != "step":
            os._exit(0)
        self.began = time.monotonic()

    def done(self, found: dict) -> None:
        """Report a step: what it found, its seconds, and the peak of the process's memory, or of the GPU's tensors."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if SHAPES[sys.argv[2]].device == "cuda":
            import torch  # here: on the CPU this file needs NumPy alone

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**20
        now = time.monotonic()
        times = {"seconds": now - self.began, "since_start_s": now - self.started, "import_s": self.import_s}
        print(json.dumps(times | {"peak_mib": peak} | found), file=self.out)


def arguments() -> tuple[str, Shape, str]:
    """The task, the shape and the model's directory a worker was started with; the fourth is the time then."""
    return sys.argv[1], SHAPES[sys.argv[2]], sys.argv[3]
