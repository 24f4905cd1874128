"""How fast SFT and DPO train, and `generate` samples, on this machine, beside the floor that their matmuls set.

    python -m benchmarks.throughput out=benchmarks/results/throughput.json
    python -m benchmarks.throughput measure=sampling out=benchmarks/results/sampling.json
    python -m benchmarks.throughput measure=profiles out=benchmarks/results/profiles.txt     where the time goes

The steps are those of sft.py and dpo.py, clipping and AdamW included, on random weights and random tokens with a
realistic spread of lengths; the reference log-probabilities of DPO are cached, as they are after its first pass.
The floor is the time of the step's matrix products alone, each measured by itself at its own shape: three for
every weight (forward, and two backward), the head on response tokens only; attention and everything else free.

Sampled are 64 new tokens for each prompt of 10 to 50 and no end of sequence, so that the batch stays full; the time
includes reading the prompts. The floor is every weight's product with the prompts' tokens, then 63 times with a row of
each sequence, and the head's with these. Then where the seconds of a PPO step go: the steps of configs/tiny/ppo.toml
from the models of `make demo`.
"""
import platform
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Literal

import torch

import ppo
import runtime
from benchmarks import peers_ours as ours
from benchmarks import peers_work as work
from benchmarks.measure import machine, median_seconds, save, show, timed
from data.pack import Batch, pack
from data.records import lines
from data.trees import Tree
from model import Decoder, ReplyState, Transformer, generate
from runtime.log import longest

SHAPES = {
    "tiny base (3 M)": work.Shape(192, 6, 6, 512, 1536, longest=256, prompt=30, reply=15, batch=64, micro_tokens=4096),
    "15 M": work.SHAPES["15 M"]._replace(batch=16, micro_tokens=4096),
}
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 16, 64, 256)  # prompts at a time


@dataclass(frozen=True)
class Config:
    measure: Literal["training", "sampling", "profiles"] = "training"
    out: str = "benchmarks/results/throughput.json"
    rounds: int = 9      # timed steps of each kind; the median counts. Of sampling a third
    steps: int = 6       # of PPO, the first not counted; 0: none
    device: str = "cpu"
    threads: int = 0


def floor_seconds(model: Transformer, batches: list[Batch], dtype: torch.dtype, rounds: int) -> float:
    """A step's matrix products alone."""
    total, head = 0.0, model.head_weight
    weights = Counter((p.shape, False) for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    for batch in batches:
        for ((outputs, inputs), is_head), count in (weights + Counter([(head.shape, True)])).items():
            rows = len(batch.owner) if is_head else len(batch.tokens)
            x, w, g = (torch.randn(shape, device=head.device).to(dtype)
                       for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
            factors = ((x, w.t()), (g, w), (g.t(), x))
            total += count * sum(median_seconds(partial(torch.mm, *pair), rounds) for pair in factors)
    return total


def prepared(model: Transformer, shape: work.Shape, kind: str) -> tuple[list[Tree], work.Step]:
    """The trees of one step of SFT or DPO, and the step."""
    pairs = work.pairs(shape)[: shape.batch]
    if kind == "DPO":
        trees = [ours.pair_tree([pair]) for pair in pairs]
        return trees, ours.dpo_step(model, shape, trees, "", cached=True)
    trees = [ours.sft_tree(pair) for pair in pairs]
    return trees, ours.sft_step(model, shape, trees)


def training(name: str, kind: str, dtype: str, config: Config) -> dict:
    """The same step again and again."""
    shape = SHAPES[name]._replace(dtype=dtype, device=config.device)
    model = ours.random_model(shape)
    trees, step = prepared(model, shape, kind)
    count, unit = (len(trees), "pairs/s") if kind == "DPO" else (sum(tree.tokens for tree in trees), "tokens/s")
    seconds = median_seconds(step, config.rounds)
    floor = floor_seconds(model, pack(trees, shape.micro_tokens), getattr(torch, dtype), config.rounds)
    return {"shape": name, "work": kind, "dtype": dtype, "unit": unit, "rate": count / seconds,
            "floor_rate": count / floor, "share_of_floor": floor / seconds, "step_s": seconds, "batch": len(trees)}


def sampling(name: str, dtype: str, batch: int, config: Config) -> dict:
    """Tokens a second for so many prompts at a time."""
    shape = SHAPES[name]._replace(dtype=dtype, device=config.device)
    model, prompts = ours.random_model(shape).to(getattr(torch, dtype)), work.prompts(shape, batch)
    seconds = median_seconds(lambda: generate(model, prompts, work.NEW, slots=batch), max(1, config.rounds // 3))
    floor = median_seconds(ours.decoding_floor(model, prompts), max(1, config.rounds // 3))
    return {"shape": name, "batch": batch, "dtype": dtype, "tokens_per_s": batch * work.NEW / seconds,
            "floor_tokens_per_s": batch * work.NEW / floor, "share_of_floor": floor / seconds}


def ppo_phases(steps: int) -> dict:
    """Mean seconds of a step by phase, the first step aside."""
    config = runtime.load_config(ppo.Config, "", ["--config", "configs/tiny/ppo.toml"])
    with tempfile.TemporaryDirectory() as folder:
        ppo.main(replace(config, steps=steps, out=f"{folder}/run", snapshot_every=0))
        logged = lines(f"{folder}/run/metrics.jsonl")[1:]
    phases = {phase: mean(step["tokens"] / step[f"{phase}_tokens_per_s"] for step in logged)
              for phase in ("sampling", "scoring", "updating")}
    return {"steps": len(logged), "batch": config.batch, "tokens": mean(step["tokens"] for step in logged)} | phases


def repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def profiles(config: Config) -> str:
    """What a step of SFT, of DPO and of decoding 64 sequences spends its time on, at 15 M in fp32."""
    shape, parts = SHAPES["15 M"]._replace(device=config.device), []
    for kind in ("SFT", "DPO", "sampling"):
        model = ours.random_model(shape)
        step, steps = prepared(model, shape, kind)[1], 4
        if kind == "sampling":
            decoder, steps = Decoder(model, (), 64, 256), 40
            decoder.waiting += [ReplyState(prompt, work.NEW, (0.0, 0, 1.0), [0]) for prompt in work.prompts(shape, 64)]
            step = decoder.step
        repeat(step, 12 if kind == "sampling" else 2)  # the decoder has read its prompts and laid out the weights
        with torch.profiler.profile() as profiler:
            elapsed = timed(repeat, step, steps)[1]
        parts.append(f"{kind}: {longest(profiler, steps, elapsed)}")
        print(parts[-1], flush=True)
    return "\n".join(parts) + "\n"


def main(config: Config) -> None:
    device = runtime.setup(config.device, 0, config.threads)
    if config.measure == "profiles":
        return runtime.write_text(Path(config.out), profiles(config))
    report = {"command": "make bench", **machine(device), "python": platform.python_version(), "rows": []}
    if config.measure == "training":
        rows = (training(*case, config) for case in product(SHAPES, ("SFT", "DPO"), DTYPES))
    else:
        rows = (sampling(*case, config) for case in product(SHAPES, DTYPES, BATCHES))
    for row in rows:
        report["rows"].append(row)
        show(row)
    if config.measure == "sampling" and config.steps:
        report["ppo"] = ppo_phases(config.steps)
        show(report["ppo"])
    save(config.out, report)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
