"""How fast SFT and DPO train on this machine, beside the floor that the matmuls of a step set.

    python -m benchmarks.throughput out=benchmarks/results/throughput.json

The steps are those of sft.py and dpo.py, clipping and AdamW included, on random weights and random tokens with a
realistic spread of lengths; the reference log-probabilities of DPO are cached, as they are after its first pass.
The floor is the time of the step's matrix products alone, each measured by itself at its own shape: three for
every weight (forward, and two backward), the head on response tokens only; attention and everything else free.
"""
from __future__ import annotations

import platform
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch

import runtime
from benchmarks import peers_ours as ours
from benchmarks import peers_work as work
from benchmarks.measure import machine, median_seconds, save
from data.pack import Batch, pack
from model import Transformer

SHAPES = {
    "tiny base (3 M)": work.Shape(192, 6, 6, 512, 1536, longest=256, prompt=30, reply=15, batch=64, micro_tokens=4096),
    "15 M": work.SHAPES["15 M"]._replace(batch=16, micro_tokens=4096),
}


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/throughput.json"
    rounds: int = 9      # timed steps of each kind; the median counts
    device: str = "cpu"
    threads: int = 0


def floor_seconds(model: Transformer, batches: list[Batch], dtype: torch.dtype, rounds: int) -> float:
    """The step's matrix products alone."""
    total, head = 0.0, model.head_weight
    weights = Counter((p.shape, False) for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    for batch in batches:
        for ((outputs, inputs), is_head), count in (weights + Counter([(head.shape, True)])).items():
            rows = len(batch.owner) if is_head else len(batch.tokens)
            x, w, g = (torch.randn(shape, device=head.device).to(dtype)
                       for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
            products = ((x, w.t()), (g, w), (g.t(), x))
            total += count * sum(median_seconds(partial(torch.mm, *product), rounds) for product in products)
    return total


def measure(name: str, kind: str, dtype: str, rounds: int, device: str) -> dict:
    """The same step again and again."""
    shape = SHAPES[name]._replace(dtype=dtype, device=device)
    model, pairs = ours.random_model(shape), work.pairs(shape)[: shape.batch]
    if kind == "DPO":
        trees = [ours.pair_tree([pair]) for pair in pairs]
        step = ours.dpo_step(model, shape, trees, "", cached=True)
    else:
        trees = [ours.sft_tree(pair) for pair in pairs]
        step = ours.sft_step(model, shape, trees)
    seconds = median_seconds(step, rounds)
    floor = floor_seconds(model, pack(trees, shape.micro_tokens), getattr(torch, dtype), rounds)
    tokens = sum(tree.tokens for tree in trees)
    count, unit = (len(trees), "pairs/s") if kind == "DPO" else (tokens, "tokens/s")
    return {"shape": name, "work": kind, "dtype": dtype, "unit": unit, "rate": count / seconds,
            "floor_rate": count / floor, "share_of_floor": floor / seconds, "step_s": seconds,
            "tokens_per_step": tokens, "response_tokens_per_step": sum(tree.learnt for tree in trees),
            "batch": len(trees)}


def main(config: Config) -> None:
    device = runtime.setup(config.device, 0, config.threads)
    rows = []
    for shape in SHAPES:
        for kind in ("SFT", "DPO"):
            for dtype in ("float32", "bfloat16"):
                rows.append(measure(shape, kind, dtype, config.rounds, device.type))
                print("{shape:<16} {work} {dtype:<9} {rate:10,.1f} {unit:<8}  floor {floor_rate:10,.1f}  "
                      "{share_of_floor:.0%} of it".format(**rows[-1]), flush=True)
    save(config.out, {"command": "make bench", **machine(device), "python": platform.python_version(), "rows": rows})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
