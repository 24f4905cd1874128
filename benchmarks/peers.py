"""This code against what one would use instead, transformers + TRL + PEFT: the same work on the same token ids, in turns.

    make bench-peers                   builds the second environment, runs everything, writes benchmarks/results/peers.json
    python -m benchmarks.peers tasks='["sft"]' shapes='["2 M"]' rounds=3

For every task each side is a process that has loaded the same weights and waits; then each in turn does one step, `rounds`
times, the first not counted. The step times are wall-clock, from "go" to "done", whatever a side does in between: collating,
metrics, clipping, AdamW. Both sides start from the same weights, and their first losses must agree: the work is the same. TRL
runs in the modes listed, and the fastest counts. Peak memory is that of the whole process.
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
from model import ModelConfig, Transformer, init_weights, save_model

PADDED = ("padded", "micro")
# task: unit, which of a step's counts it is, the peers' modes, our other way of doing it or a floor
TASKS = {
    "sft": ("tokens/s", "units", ("padded", "micro", "packed"), ("floor sft",)),
    "dpo": ("pairs/s", "items", PADDED, ("floor dpo",)),
    "dpo online": ("pairs/s", "items", PADDED, ()),
    "dpo dialogues": ("dialogues/s", "items", PADDED, ()),
    "reward": ("pairs/s", "items", PADDED, ()),
    "reward dialogues": ("dialogues/s", "items", PADDED, ()),
    **{f"sample {n} {how}": ("tokens/s", "units", ("generate",), (f"floor sample {n}",)) for how in ("greedy", "top_p") for n in SAMPLED},
    "sample mixed": ("tokens/s", "units", ("generate",), ()),
    "rloo": ("samples/s", "units", ("RLOO",), ("ppo",)),
    "qlora": ("tokens/s", "units", PADDED, ()),
}
LARGE = ("qlora",)     # for the 110 M shape; the others for the small ones


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/peers.json"
    tasks: list[str] = tuple(TASKS)
    shapes: list[str] = tuple(SHAPES)
    rounds: int = 6                  # the first is not counted
    peers: str = ".venv-peers/bin/python"  # the interpreter that has transformers, TRL and PEFT

    def __post_init__(self):
        runtime.check_range("rounds", self.rounds, 2, STEPS)
        for name, known in (("tasks", TASKS), ("shapes", SHAPES)):
            for word in getattr(self, name):
                if word not in known:
                    runtime.fail(f"{name} holds '{word}', expected some of {', '.join(known)}")
        if not Path(self.peers).is_file():
            runtime.fail(f"{self.peers}: no such file: build it with `make bench-peers`, or set peers=")


def make_model(shape: Shape, path: str) -> str:
    """Random weights for both sides."""
    model = Transformer(ModelConfig(width=shape.width, layers=shape.layers, heads=shape.heads, kv_heads=shape.heads,
                                    head_dim=shape.width // shape.heads, mlp_width=shape.mlp_width, vocab_size=shape.vocab,
                                    max_positions=shape.longest))
    init_weights(model, 0)
    save_model(model, path)
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
            raise RuntimeError(f"{' '.join(self.process.args[2:])} ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(task: str, shape: str, path: str, config: Config, logs: Path) -> list[dict]:
    """A row for each way of doing the task."""
    unit, counted, modes, more = TASKS[task]
    sides = [("ours", sys.executable, "peers_ours", task)]
    sides += [(other, sys.executable, "peers_ours", other) for other in more]
    library = "Transformers" if task.startswith("sample") else "TRL"
    sides += [(f"{library}, {mode}", config.peers, "peers_trl", f"{task}, {mode}") for mode in modes]
    workers, steps = {}, {}
    for name, python, module, words in sides:
        workers[name] = Worker(python, module, words, shape, path, logs / f"{name}.txt")
        steps[name] = [workers[name].step()]  # one by one: they are not to load at the same time
    for _ in range(config.rounds - 1):
        for name, worker in workers.items():
            steps[name].append(worker.step())
    for worker in workers.values():
        worker.end()
    losses = {name: found[0]["loss"] for name, found in steps.items() if found[0].get("loss") is not None}
    alike = [losses[name] for name in ("ours", "floor sft", "TRL, padded") if name in losses and not task.startswith(("reward", "qlora"))]
    if alike and max(alike) - min(alike) > 1e-3 * max(alike):
        raise RuntimeError(f"{shape} {task}: first losses differ, so does the work: {losses}")
    rows = []
    for name, found in steps.items():
        timed = found[1:]
        rates = [step[counted] / step["seconds"] for step in timed]
        row = {"shape": shape, "task": task, "side": name, "unit": unit, "rate": median(rates), "rates": rates,
               "peak_mib": timed[-1]["peak_mib"], "import_s": found[0]["import_s"], "first_step_s": found[0]["since_start_s"],
               "first_loss": losses.get(name), "step_s": median(step["seconds"] for step in timed)}
        row |= {key: median(step[key] for step in timed) for key in ("sampling_s", "scoring_s", "updating_s") if key in timed[0]}
        rows.append(row)
    return rows


def best_peer(rows: list[dict]) -> dict:
    return max((row for row in rows if row["side"].startswith("T")), key=lambda row: row["rate"])


def main(config: Config) -> None:
    versions = subprocess.run([config.peers, "-c", "import importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in "
                               "('torch', 'transformers', 'trl', 'peft', 'bitsandbytes')), sep=', ')"], capture_output=True, text=True)
    out = Path(config.out)
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    for shape in config.shapes:
        for task in config.tasks:
            if (task in LARGE) != (shape == "110 M"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = compare(task, shape, make_model(SHAPES[shape], f"{folder}/model"), config, Path(folder))
            ours, theirs = found[0], best_peer(found)
            for row in found:
                print("{shape:<6} {task:<18} {side:<16} {rate:10,.2f} {unit:<11}    peak {peak_mib:6,.0f} MiB   "
                      "import {import_s:.1f} s   first step after {first_step_s:.1f} s".format(**row))
            print(f"{shape:<6} {task:<18} ours is {ours['rate'] / theirs['rate']:.2f} x {theirs['side']}", flush=True)
            rows = [row for row in rows if (row["shape"], row["task"]) != (shape, task)] + found
            report = {"command": "make bench-peers", "device": processor(torch.device("cpu")), "cores": os.cpu_count(),
                      "ours": f"torch {torch.__version__}, Python {platform.python_version()}", "peers": versions.stdout.strip(),
                      "batch": {name: shape.batch for name, shape in SHAPES.items()}, "turns": TURNS, "new_tokens": NEW,
                      "rollout": RL_PROMPTS * RL_REPLIES, "rows": rows}
            runtime.write_text(out, json.dumps(report, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
