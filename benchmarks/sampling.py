"""How fast `generate` samples, beside the matmuls of its decoding steps; and where the seconds of a PPO step go.

    python -m benchmarks.sampling out=benchmarks/results/sampling.json

Random weights, prompts of 10 to 50 tokens, 64 new tokens each and no end of sequence, so that the batch stays full; the
time includes reading the prompts. The floor is every weight's product with a batch of rows, and the head's, 64 times.
The PPO steps are those of configs/tiny/ppo.toml from the models of `make demo`.
"""
from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ppo
import runtime
from benchmarks.throughput import SHAPES, processor, timed
from model import ModelConfig, Transformer, generate, init_weights

BATCHES = (1, 16, 64, 256)
NEW = 64


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/sampling.json"
    rounds: int = 3
    steps: int = 6       # of PPO, the first not counted; 0: none
    device: str = "cpu"
    threads: int = 0


def floor_seconds(model: Transformer, batch: int, dtype: torch.dtype, rounds: int) -> float:
    """The matrix products of one decoding step alone."""
    total = 0.0
    for weight in [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name] + [model.head_weight]:
        x, w = torch.randn(batch, weight.shape[1], device=weight.device).to(dtype), weight.detach().to(dtype)
        total += timed(lambda x=x, w=w: x @ w.t(), 10 * rounds)
    return total


def measure(shape: str, batch: int, dtype: str, rounds: int, device: torch.device) -> dict:
    fields, longest, _, _ = SHAPES[shape]
    model = Transformer(ModelConfig(max_positions=longest, **fields))
    init_weights(model, 0)
    model.to(device, getattr(torch, dtype))
    prompts = [torch.randint(0, fields["vocab_size"], (length,)).tolist() for length in torch.randint(10, 51, (batch,)).tolist()]
    seconds = timed(lambda: generate(model, prompts, NEW, slots=batch), rounds)
    floor = NEW * floor_seconds(model, batch, getattr(torch, dtype), rounds)
    return {"shape": shape, "batch": batch, "dtype": dtype, "tokens_per_s": batch * NEW / seconds,
            "floor_tokens_per_s": batch * NEW / floor,
            "share_of_floor": floor / seconds}


def ppo_phases(steps: int) -> dict:
    """Mean seconds a step by phase, the first step aside."""
    config = runtime.load_config(ppo.Config, "", ["--config", "configs/tiny/ppo.toml"])
    with tempfile.TemporaryDirectory() as folder:
        ppo.main(replace(config, steps=steps, out=f"{folder}/run", snapshot_every=0))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    return {"steps": len(lines), "batch": config.batch, "tokens": sum(m["tokens"] for m in lines) / len(lines)} | {
        phase: sum(m["tokens"] / m[f"{phase}_tokens_per_s"] for m in lines) / len(lines) for phase in ("sampling", "scoring", "updating")}


def main(config: Config) -> None:
    device = runtime.setup(config.device, 0, config.threads)
    rows = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            for batch in BATCHES:
                rows.append(measure(shape, batch, dtype, config.rounds, device))
                print("{shape:<16} {dtype:<9} batch {batch:<4} {tokens_per_s:10,.0f} tokens/s  floor {floor_tokens_per_s:10,.0f}  "
                      .format(**rows[-1]) + f"{100 * rows[-1]['share_of_floor']:.0f} % of it", flush=True)
    report = {"command": "python -m benchmarks.sampling", "device": processor(device), "cores": os.cpu_count(),
              "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    if config.steps:
        report["ppo"] = found = ppo_phases(config.steps)
        print(f"PPO step of {found['batch']} prompts: sampling {found['sampling']:.2f} s, scoring {found['scoring']:.2f} s, "
              f"updating {found['updating']:.2f} s")
    runtime.write_text(Path(config.out), json.dumps(report, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
