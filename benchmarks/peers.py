"""This code against what one would use instead, transformers + TRL + PEFT: the same work on the same token ids, in turns.

    make bench-peers                   builds the second environment, runs everything, writes benchmarks/results/peers.json
    python -m benchmarks.peers tasks='["sft"]' shapes='["2 M"]' rounds=3
    python -m benchmarks.peers device=cuda           Mistral-7B's shape in bf16, to benchmarks/results/peers_gpu.json; 141 GB of memory
    python -m benchmarks.peers device=cuda peers=    ours alone

For every task each side is a process that has loaded the same weights and waits; then each in turn does one step, `rounds`
times, the first not counted. The step times are wall-clock, from "go" to "done", whatever a side does in between: collating,
metrics, clipping, AdamW. Both sides start from the same weights, and their first losses must agree: the work is the same. TRL
runs in the modes listed, and the fastest counts. Peak memory is that of the whole process.

A GPU has room for one 7B in training, so there the sides run one after another, and a mode that runs out of memory says so in
its row. Peak memory is that of tensors on the GPU. Model FLOPs utilisation counts a step's products and attention once, whatever
checkpointing computes again, over the dense bf16 peak in NVIDIA's data sheets.
"""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import runtime
from benchmarks.peers_work import NEW, RL_PROMPTS, RL_REPLIES, SAMPLED, SHAPES, STEPS, TURNS, Shape
from benchmarks.throughput import processor
from checkpoints import save_model
from model import ModelConfig, Transformer, init_weights

PADDED = ("padded", "micro")
# task: unit, which of a step's counts it is, the peers' modes, our other way of doing it or a floor
TASKS = {
    "sft": ("tokens/s", "units", ("padded", "micro", "packed"), ("floor sft", "floor sft mkl")),
    "dpo": ("pairs/s", "items", PADDED, ("floor dpo", "floor dpo mkl")),
    "dpo online": ("pairs/s", "items", PADDED, ()),
    "dpo dialogues": ("dialogues/s", "items", PADDED, ()),
    "reward": ("pairs/s", "items", PADDED, ()),
    "reward dialogues": ("dialogues/s", "items", PADDED, ()),
    **{f"sample {n} {how}": ("tokens/s", "units", ("generate",), (f"floor sample {n}",)) for how in ("greedy", "top_p") for n in SAMPLED},
    "sample mixed": ("tokens/s", "units", ("generate",), ()),
    "rloo": ("samples/s", "units", ("RLOO",), ("ppo",)),
    "qlora": ("tokens/s", "units", PADDED, ()),
}
# What each shape is for; the small ones for all tasks but QLoRA.
ONLY = {"110 M": ("qlora",), "7 B, chat": ("sft", "qlora", "sample 64 top_p"), "7 B, pairs": ("dpo",)}
PEAK_TFLOPS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312}


def does(shape: str, task: str) -> bool:
    return task in ONLY[shape] if shape in ONLY else task != "qlora"


@dataclass(frozen=True)
class Config:
    out: str = ""                    # default benchmarks/results/peers.json, with a GPU peers_gpu.json
    device: str = "cpu"
    tasks: list[str] = tuple(TASKS)
    shapes: list[str] = ()           # default: those for the device
    rounds: int = 6                  # the first is not counted
    peers: str = ".venv-peers/bin/python"  # the interpreter that has transformers, TRL and PEFT; empty: ours alone

    def __post_init__(self):
        runtime.check_range("rounds", self.rounds, 2, STEPS)
        for name, known in (("tasks", TASKS), ("shapes", SHAPES)):
            for word in getattr(self, name):
                if word not in known:
                    runtime.fail(f"{name} holds '{word}', expected some of {', '.join(known)}")
        for shape in self.shapes:
            if SHAPES[shape].device != self.device:
                runtime.fail(f"shapes holds '{shape}', which is for device={SHAPES[shape].device}")
        if self.peers and not Path(self.peers).is_file():
            runtime.fail(f"{self.peers}: no such file: build it with `make bench-peers`, or set peers=")


def make_model(shape: Shape, path: str) -> str:
    """Random weights for both sides, as large ones come: in bf16."""
    config = ModelConfig(width=shape.width, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads or shape.heads,
                         head_dim=shape.head_dim, mlp_width=shape.mlp_width, vocab_size=shape.vocab, max_positions=shape.longest)
    with torch.device(shape.device):
        model = Transformer(config)
    init_weights(model, 0)
    save_model(model.to(getattr(torch, shape.dtype)), path)
    if shape.device == "cuda":
        del model
        torch.cuda.empty_cache()
    return path


class Worker:
    """A process of one side, with its task prepared."""

    def __init__(self, python: str, module: str, task: str, shape: str, path: str, log: Path):
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen([python, "-m", f"benchmarks.{module}", task, shape, path], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=errors, text=True)

    def step(self) -> dict:
        """Its next step."""
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{' '.join(self.process.args[2:])} ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def take_turns(sides: list[tuple], shape: str, path: str, rounds: int, logs: Path) -> dict[str, list[dict]]:
    """Every side's steps. On a GPU one side after another, and of one that runs out of memory none."""
    workers: dict[str, Worker] = {}
    steps: dict[str, list[dict]] = {}
    alone = SHAPES[shape].device == "cuda"
    for name, python, module, words in sides:
        workers[name] = Worker(python, module, words, shape, path, logs / f"{name}.txt")
        try:
            steps[name] = [workers[name].step() for _ in range(rounds if alone else 1)]  # one by one: they are not to load together
        except RuntimeError as error:
            if not (alone and "out of memory" in str(error)):
                raise
            steps[name] = []
        if alone:
            workers.pop(name).end()
    for _ in range(0 if alone else rounds - 1):
        for name, worker in workers.items():
            steps[name].append(worker.step())
    for worker in workers.values():
        worker.end()
    return steps


def compare(task: str, shape: str, path: str, config: Config, logs: Path) -> list[dict]:
    """A row for each way of doing the task."""
    unit, counted, modes, more = TASKS[task]
    sides = [("ours", sys.executable, "peers_ours", task)]
    if config.device == "cpu":  # the floors are written for fp32
        sides += [(other, sys.executable, "peers_ours", other) for other in more]
    library = "Transformers" if task.startswith("sample") else "TRL"
    if config.device == "cuda" and library == "TRL":
        modes = (*modes, "single")
    sides += [(f"{library}, {mode}", config.peers, "peers_trl", f"{task}, {mode}") for mode in modes if config.peers]
    steps = take_turns(sides, shape, path, config.rounds, logs)
    losses = {name: found[0]["loss"] for name, found in steps.items() if found and found[0].get("loss") is not None}
    alike = [losses[name] for name in ("ours", "floor sft", "TRL, padded") if name in losses and not task.startswith(("reward", "qlora"))]
    if alike and max(alike) - min(alike) > (1e-3 if config.device == "cpu" else 2e-2) * max(alike):
        raise RuntimeError(f"{shape} {task}: first losses differ, so does the work: {losses}")
    rows = []
    for name, found in steps.items():
        row = {"shape": shape, "task": task, "side": name, "unit": unit}
        if not found:
            rows.append(row | {"error": "out of memory"})
            continue
        timed = found[1:]
        rates = [step[counted] / step["seconds"] for step in timed]
        row |= {"rate": median(rates), "rates": rates,
                "peak_mib": timed[-1]["peak_mib"], "import_s": found[0]["import_s"], "first_step_s": found[0]["since_start_s"],
                "first_loss": losses.get(name), "step_s": median(step["seconds"] for step in timed)}
        row |= {key: median(step[key] for step in timed) for key in ("sampling_s", "scoring_s", "updating_s", "reference_s")
                if key in timed[0]}
        if "operations" in timed[0]:
            row["tflops"] = median(step["operations"] / step["seconds"] for step in timed) / 1e12
        rows.append(row)
    return rows


def best_peer(rows: list[dict]) -> dict | None:
    return max((row for row in rows if row["side"].startswith("T") and "rate" in row), key=lambda row: row["rate"], default=None)


def in_order(row: dict) -> tuple[int, int]:
    return list(SHAPES).index(row["shape"]), list(TASKS).index(row["task"])


def main(config: Config) -> None:
    ask = ("import importlib.metadata as m; "
           "print(*(f'{p} {m.version(p)}' for p in ('torch', 'transformers', 'trl', 'peft', 'bitsandbytes')), sep=', ')")
    versions = subprocess.run([config.peers, "-c", ask], capture_output=True, text=True).stdout.strip() if config.peers else ""
    out = Path(config.out or f"benchmarks/results/peers{'_gpu' if config.device == 'cuda' else ''}.json")
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    device = processor(runtime.find_device(config.device))
    for shape in config.shapes or [name for name, shape in SHAPES.items() if shape.device == config.device]:
        with tempfile.TemporaryDirectory() as folder:
            path = make_model(SHAPES[shape], f"{folder}/model")
            for task in (task for task in config.tasks if does(shape, task)):
                found = compare(task, shape, path, config, Path(folder))
                for row in found:
                    print("{shape:<10} {task:<18} {side:<16} ".format(**row) + (row.get("error") or "{rate:10,.2f} {unit:<11}    peak "
                          "{peak_mib:6,.0f} MiB   import {import_s:.1f} s   first step after {first_step_s:.1f} s".format(**row)))
                theirs = best_peer(found)
                if theirs and "rate" in found[0]:
                    print(f"{shape:<10} {task:<18} ours is {found[0]['rate'] / theirs['rate']:.2f} x {theirs['side']}", flush=True)
                rows = sorted([row for row in rows if (row["shape"], row["task"]) != (shape, task)] + found, key=in_order)
                report = {"command": "make bench-peers", "device": device, "cores": os.cpu_count(),
                          "ours": f"torch {torch.__version__}, Python {platform.python_version()}", "peers": versions,
                          "peak_tflops": next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None),
                          "batch": {name: shape.batch for name, shape in SHAPES.items()}, "turns": TURNS, "new_tokens": NEW,
                          "rollout": RL_PROMPTS * RL_REPLIES, "rows": rows}
                runtime.write_text(out, json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
