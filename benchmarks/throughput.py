"""How fast SFT and DPO train on this machine, beside the floor that the matmuls of a step set.

    python -m benchmarks.throughput out=benchmarks/results/throughput.json

The steps are those of sft.py and dpo.py, clipping and AdamW included, on random weights and random tokens with a
realistic spread of lengths; the reference log-probabilities of DPO are cached, as they are after its first pass.
The floor is the time of the step's matrix products alone, each measured by itself at its own shape: three for
every weight (forward, and two backward), the head on response tokens only; attention and everything else free.
"""
from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dpo
import runtime
import sft
from data.pack import Response, Tree, pack
from model import ModelConfig, Transformer, init_weights

SHAPES = {  # model, longest text, mean prompt, mean reply
    "tiny base (3 M)": (dict(width=192, layers=6, heads=6, kv_heads=6, head_dim=32, mlp_width=512, vocab_size=1536), 256, 30, 15),
    "15 M": (dict(width=288, layers=6, heads=6, kv_heads=6, head_dim=48, mlp_width=768, vocab_size=32000), 512, 85, 160),
}
BATCH = {"tiny base (3 M)": 64, "15 M": 16}


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/throughput.json"
    rounds: int = 9      # timed steps of each kind; the median counts
    device: str = "cpu"
    threads: int = 0


def trees(kind: str, count: int, vocab: int, longest: int, prompt: int, reply: int) -> list[Tree]:
    """Random dialogues, or pairs, with lengths spread like real ones (lognormal, sigma 0.6)."""
    rng = np.random.default_rng(0)

    def length(mean):
        return int(np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6), 2, longest // 2))

    def tokens(n):
        return rng.integers(0, vocab, n).astype(np.int32)

    made = []
    for record in range(count):
        p, w, lost = length(prompt), length(reply), length(reply)
        tree = Tree(tokens(p + w), [], [Response(0, p, p + w)], record)
        if kind == "DPO":
            tree.leaves = [(p, tokens(lost))]
            tree.responses.append(Response(1, 0, lost, 0, 1))
            tree.ref_sums = torch.zeros(2)
        made.append(tree)
    return made


def timed(work, rounds: int) -> float:
    """Median seconds of a call, after two that do not count."""
    times = []
    for i in range(rounds + 2):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i > 1:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def floor_seconds(model: Transformer, batches, dtype: torch.dtype, rounds: int) -> float:
    """The step's matrix products alone."""
    total = 0.0
    weights = [(p.shape[1], p.shape[0], False) for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    weights.append((*reversed(model.head_weight.shape), True))
    for batch in batches:
        for inputs, outputs, is_head in set(weights):
            rows = len(batch.owner) if is_head else len(batch.tokens)
            shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
            x, w, g = (torch.randn(shape, device=model.head_weight.device).to(dtype) for shape in shapes)
            products = (lambda x=x, w=w: x @ w.t(), lambda g=g, w=w: g @ w, lambda g=g, x=x: g.t() @ x)
            total += sum(timed(product, rounds) for product in products) * weights.count((inputs, outputs, is_head))
    return total


def measure(shape: str, kind: str, dtype: str, rounds: int, device: torch.device) -> dict:
    fields, longest, prompt, reply = SHAPES[shape]
    model = Transformer(ModelConfig(max_positions=longest, **fields))
    init_weights(model, 0)
    model.to(device)
    model.compute_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    optimizer = runtime.adamw(model, 1e-5, 0.0)
    work = trees(kind, BATCH[shape], fields["vocab_size"], longest, prompt, reply)
    config = dpo.Config()

    def step():
        batches = pack(work, config.max_tokens)
        response_tokens = sum(len(batch.owner) for batch in batches)
        for batch in batches:
            batch = batch.to(device)
            if kind == "DPO":
                dpo.train_step(model, batch, config, pairs=len(work))[0].backward()
            else:
                sft.train_step(model, batch, response_tokens)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, rounds)
    floor = floor_seconds(model, pack(work, config.max_tokens), getattr(torch, dtype), rounds)
    count, unit = (len(work), "pairs/s") if kind == "DPO" else (sum(t.tokens for t in work), "tokens/s")
    return {"shape": shape, "work": kind, "dtype": dtype, "unit": unit, "rate": count / seconds, "floor_rate": count / floor,
            "share_of_floor": floor / seconds, "step_s": seconds, "tokens_per_step": sum(t.tokens for t in work),
            "response_tokens_per_step": sum(r.end - r.start for t in work for r in t.responses), "batch": len(work)}


def processor(device: torch.device) -> str:
    """What this machine computes with, by name."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return torch.cuda.get_device_name(device) if device.type == "cuda" else names[0] if names else platform.processor()


def main(config: Config) -> None:
    device = runtime.setup(config.device, 0, config.threads)
    rows = []
    for shape in SHAPES:
        for kind in ("SFT", "DPO"):
            for dtype in ("float32", "bfloat16"):
                row = measure(shape, kind, dtype, config.rounds, device)
                rows.append(row)
                print(f"{shape:<16} {kind} {dtype:<9} {row['rate']:10,.1f} {row['unit']:<8}  floor {row['floor_rate']:10,.1f}  "
                      f"{100 * row['share_of_floor']:.0f} % of it", flush=True)
    report = {"command": "make bench", "device": processor(device),
              "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
              "python": platform.python_version(), "rows": rows}
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
