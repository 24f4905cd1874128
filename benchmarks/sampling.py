"""How fast `generate` samples, beside the matmuls of its decoding steps; and where the seconds of a PPO step go.

    python -m benchmarks.sampling out=benchmarks/results/sampling.json

Random weights, prompts of 10 to 50 tokens, 64 new tokens each and no end of sequence, so that the batch stays full; the
time includes reading the prompts. The floor is every weight's product with a batch of rows, and the head's, 64 times.
The PPO steps are those of configs/tiny/ppo.toml from the models of `make demo`.
"""
from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ppo
import runtime
from benchmarks import peers_work as work
from benchmarks.measure import machine, median_seconds, save
from benchmarks.peers_ours import decoding_floor, random_model
from benchmarks.throughput import SHAPES
from model import generate

BATCHES = (1, 16, 64, 256)


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/sampling.json"
    rounds: int = 3
    steps: int = 6       # of PPO, the first not counted; 0: none
    device: str = "cpu"
    threads: int = 0


def measure(name: str, batch: int, dtype: str, rounds: int, device: str) -> dict:
    """Tokens a second for so many prompts at a time."""
    shape = SHAPES[name]._replace(dtype=dtype, device=device)
    model, prompts = random_model(shape).to(getattr(torch, dtype)), work.prompts(shape, batch)
    seconds = median_seconds(lambda: generate(model, prompts, work.NEW, slots=batch), rounds)
    floor = median_seconds(decoding_floor(model, batch), rounds)
    return {"shape": name, "batch": batch, "dtype": dtype, "tokens_per_s": batch * work.NEW / seconds,
            "floor_tokens_per_s": batch * work.NEW / floor, "share_of_floor": floor / seconds}


def ppo_phases(steps: int) -> dict:
    """Mean seconds of a step by phase, the first step aside."""
    config = runtime.load_config(ppo.Config, "", ["--config", "configs/tiny/ppo.toml"])
    with tempfile.TemporaryDirectory() as folder:
        ppo.main(replace(config, steps=steps, out=f"{folder}/run", snapshot_every=0))
        log = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log[1:]]
    phases = {phase: sum(line["tokens"] / line[f"{phase}_tokens_per_s"] for line in lines) / len(lines)
              for phase in ("sampling", "scoring", "updating")}
    return {"steps": len(lines), "batch": config.batch, "tokens": sum(m["tokens"] for m in lines) / len(lines)} | phases


def main(config: Config) -> None:
    device = runtime.setup(config.device, 0, config.threads)
    rows = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            for batch in BATCHES:
                rows.append(measure(shape, batch, dtype, config.rounds, device.type))
                print("{shape:<16} {dtype:<9} batch {batch:<4} {tokens_per_s:10,.0f} tokens/s  floor "
                      "{floor_tokens_per_s:10,.0f}  {share_of_floor:.0%} of it".format(**rows[-1]), flush=True)
    report = {"command": "python -m benchmarks.sampling", **machine(device), "rows": rows}
    if config.steps:
        report["ppo"] = ppo_phases(config.steps)
        print("PPO step of {batch} prompts: sampling {sampling:.2f} s, scoring {scoring:.2f} s, updating "
              "{updating:.2f} s".format(**report["ppo"]))
    save(config.out, report)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
