"""This code against what one would use instead, transformers + TRL + PEFT: the same work, in turns.

    make bench-peers                   makes the second environment, runs all, writes benchmarks/results/peers.json
    python -m benchmarks.peers tasks='["sft"]' shapes='["2 M"]' rounds=3
    python -m benchmarks.peers device=cuda          Mistral-7B's shape in bf16, to peers_gpu.json; 141 GB of memory
    python -m benchmarks.peers device=cuda peers=   ours alone

Both sides get the same token ids. For every task each is a process that has loaded the same weights and waits; then
each in turn does one step, `rounds` times, the first not counted. Step times are wall-clock, from "go" to "done",
whatever a side does in between: collating, metrics, clipping, AdamW. The first losses of both sides must agree: the
work is the same. TRL runs in the modes listed, and the fastest counts. Peak memory is that of the whole process.

A GPU has room for one 7B in training, so there the sides run one after another, and a mode that runs out of memory says
so in its row. Peak memory is that of tensors on the GPU. Model FLOPs utilisation counts a step's products and attention
once, whatever checkpointing computes again, over the dense bf16 peak in NVIDIA's data sheets.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import runtime
from benchmarks.measure import processor, save
from benchmarks.peers_ours import random_model
from benchmarks.peers_work import NEW, RL_PROMPTS, RL_REPLIES, SAMPLED, SHAPES, STEPS, TURNS
from checkpoints import save_model

PADDED = ("padded", "micro")
# task: unit, which of a step's counts it is, the peers' modes, the floors
TASKS = {
    "sft": ("tokens/s", "units", ("padded", "micro", "packed"), ("floor sft", "floor sft mkl")),
    "dpo": ("pairs/s", "items", PADDED, ("floor dpo", "floor dpo mkl")),
    "dpo lora": ("pairs/s", "items", PADDED, ()),
    "dpo online": ("pairs/s", "items", PADDED, ()),
    "dpo dialogues": ("dialogues/s", "items", PADDED, ()),
    "reward": ("pairs/s", "items", PADDED, ()),
    "reward dialogues": ("dialogues/s", "items", PADDED, ()),
    **{f"sample {n} {how}": ("tokens/s", "units", ("generate",), (f"floor sample {n}",))
       for how in ("greedy", "top_p") for n in SAMPLED},
    "sample mixed": ("tokens/s", "units", ("generate",), ()),
    "rloo": ("samples/s", "units", ("RLOO",), ()),
    "qlora": ("tokens/s", "units", PADDED, ()),
}
# The tasks of a shape: all without adapters, unless it is made for some.
DOES = {shape: [task for task in TASKS if task not in ("qlora", "dpo lora")] for shape in SHAPES}
DOES |= dict.fromkeys(("135 M", "135 M, bf16"), ["sft", "dpo", "dpo lora", *(f"sample {n} greedy" for n in SAMPLED)])
DOES |= {"110 M": ["qlora"], "7 B, chat": ["sft", "qlora", "sample 64 top_p"], "7 B, pairs": ["dpo"]}
PEAK_TFLOPS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312}


def shapes_of(device: str) -> list[str]:
    return [name for name, shape in SHAPES.items() if shape.device == device]


@dataclass(frozen=True)
class Config:
    out: str = ""                    # default benchmarks/results/peers.json, with a GPU peers_gpu.json
    device: str = "cpu"
    tasks: list[str] = tuple(TASKS)
    shapes: list[str] = ()           # default: those for the device
    rounds: int = 6                  # the first is not counted
    peers: str = ".venv-peers/bin/python"  # an interpreter with transformers, TRL and PEFT; empty: ours alone

    def __post_init__(self):
        runtime.check_range("rounds", self.rounds, 2, STEPS)
        for name, known in (("tasks", TASKS), ("shapes", shapes_of(self.device))):
            for word in getattr(self, name):
                if word not in known:
                    runtime.fail(f"{name} holds '{word}', expected some of {', '.join(known)} for device={self.device}")
        if self.peers and not Path(self.peers).is_file():
            runtime.fail(f"{self.peers}: no such file: build it with `make bench-peers`, or set peers=")


def start(python: str, module: str, task: str, shape: str, path: str, log: Path) -> subprocess.Popen:
    """A process of one side, which prepares its task and waits for its turn."""
    command = [python, "-m", f"benchmarks.{module}", task, shape, path, str(time.monotonic())]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    with log.open("w") as errors:
        return subprocess.Popen(command, env=os.environ | offline, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=errors, text=True)


def next_step(worker: subprocess.Popen, log: Path) -> dict:
    """Its next step."""
    with suppress(BrokenPipeError):
        worker.stdin.write("step\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        worker.wait()
        raise RuntimeError(f"{' '.join(worker.args[2:])} ended:\n{log.read_text()[-3000:]}")
    return json.loads(line)


def take_turns(sides: list[tuple], shape: str, path: str, rounds: int, folder: Path) -> dict[str, list[dict]]:
    """Every side's steps. On a GPU one side after another, and of one that runs out of memory none."""
    workers: dict[str, subprocess.Popen] = {}
    steps: dict[str, list[dict]] = {}
    alone, logs = SHAPES[shape].device == "cuda", {name: folder / f"{name}.txt" for name, *_ in sides}
    for name, python, module, words in sides:
        workers[name] = start(python, module, words, shape, path, logs[name])
        try:
            # One by one: they are not to load at the same time.
            steps[name] = [next_step(workers[name], logs[name]) for _ in range(rounds if alone else 1)]
        except RuntimeError as error:
            if not (alone and "out of memory" in str(error)):
                raise
            steps[name] = []
        if alone:
            workers.pop(name).communicate()  # closes what it reads, and so ends it
    for _ in range(0 if alone else rounds - 1):
        for name, worker in workers.items():
            steps[name].append(next_step(worker, logs[name]))
    for worker in workers.values():
        worker.communicate()
    return steps


def compare(task: str, shape: str, config: Config, folder: Path) -> list[dict]:
    """A row for each way of doing the task."""
    _, _, modes, floors = TASKS[task]
    if shape.startswith("135 M") and len(modes) > 1:  # of six processes or seven, 24 GB have room for three
        modes, floors = ("micro",), floors[:1]
    sides = [("ours", sys.executable, "peers_ours", task)]
    if SHAPES[shape].dtype == "float32":  # the floors are written for it
        sides += [(floor, sys.executable, "peers_ours", floor) for floor in floors]
    library = "Transformers" if task.startswith("sample") else "TRL"
    if config.device == "cuda" and library == "TRL":
        modes = (*modes, "single")
    sides += [(f"{library}, {mode}", config.peers, "peers_trl", f"{task}, {mode}") for mode in modes if config.peers]
    steps = take_turns(sides, shape, str(folder / "model"), config.rounds, folder)
    check_losses(task, shape, steps)
    return [{"shape": shape, "task": task, "side": name} | measured(task, found) for name, found in steps.items()]


def check_losses(task: str, shape: str, steps: dict[str, list[dict]]) -> None:
    """The sides' first losses agree, where the same number is expected."""
    if task.startswith(("reward", "qlora")):
        return
    losses = {name: steps[name][0].get("loss") for name in ("ours", "floor sft", "TRL, padded") if steps.get(name)}
    alike = [loss for loss in losses.values() if loss is not None]
    tolerance = 1e-3 if SHAPES[shape].dtype == "float32" else 2e-2
    if alike and max(alike) - min(alike) > tolerance * max(alike):
        raise RuntimeError(f"{shape} {task}: first losses differ, so does the work: {losses}")


def measured(task: str, steps: list[dict]) -> dict:
    """What the steps of one side show, the first aside."""
    unit, counted, _, _ = TASKS[task]
    if not steps:
        return {"unit": unit, "error": "out of memory"}
    timed = steps[1:]
    rates = [step[counted] / step["seconds"] for step in timed]
    row = {"unit": unit, "rate": median(rates), "rates": rates, "peak_mib": timed[-1]["peak_mib"],
           "import_s": steps[0]["import_s"], "first_step_s": steps[0]["since_start_s"],
           "first_loss": steps[0].get("loss"), "step_s": median(step["seconds"] for step in timed)}
    row |= {key: median(step[key] for step in timed)
            for key in ("sampling_s", "scoring_s", "updating_s", "reference_s") if key in timed[0]}
    if "operations" in timed[0]:
        row["tflops"] = median(step["operations"] / step["seconds"] for step in timed) / 1e12
    return row


def show(rows: list[dict]) -> None:
    """A line for each side of a task, and how much faster than the fastest peer ours is."""
    for row in rows:
        line = "{shape:<10} {task:<18} {side:<16} " + ("{error}" if "error" in row else
               "{rate:10,.2f} {unit:<11}    peak {peak_mib:6,.0f} MiB   import {import_s:.1f} s   "
               "first step after {first_step_s:.1f} s")
        print(line.format(**row))
    theirs = max((row for row in rows if row["side"].startswith("T") and "rate" in row), key=lambda row: row["rate"],
                 default=None)
    if theirs and "rate" in rows[0]:
        print("{shape:<10} {task:<18} ".format(**theirs)
              + f"ours is {rows[0]['rate'] / theirs['rate']:.2f} x {theirs['side']}", flush=True)


def versions(python: str) -> str:
    """Of the peers' packages, in the interpreter that has them."""
    ask = ("import importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in "
           "('torch', 'transformers', 'trl', 'peft', 'bitsandbytes')), sep=', ')")
    return subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.strip() if python else ""


def main(config: Config) -> None:
    out = Path(config.out or f"benchmarks/results/peers{'_gpu' if config.device == 'cuda' else ''}.json")
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    device = processor(runtime.find_device(config.device))
    about = {"command": "make bench-peers", "device": device, "cores": os.cpu_count(),
             "ours": f"torch {torch.__version__}, Python {platform.python_version()}", "peers": versions(config.peers),
             "peak_tflops": next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None),
             "batch": {name: shape.batch for name, shape in SHAPES.items()}, "turns": TURNS, "new_tokens": NEW,
             "rollout": RL_PROMPTS * RL_REPLIES}
    for shape in config.shapes or shapes_of(config.device):
        with tempfile.TemporaryDirectory() as folder:  # for random weights, in the dtype of the activations
            save_model(random_model(SHAPES[shape]).to(getattr(torch, SHAPES[shape].dtype)), f"{folder}/model")
            torch.cuda.empty_cache()
            for task in (task for task in config.tasks if task in DOES[shape]):
                found = compare(task, shape, config, Path(folder))
                show(found)
                rows = found + [row for row in rows if (row["shape"], row["task"]) != (shape, task)]
                rows.sort(key=lambda row: (list(SHAPES).index(row["shape"]), list(TASKS).index(row["task"])))
                save(out, about | {"rows": rows})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
