"""Measure the kernels against what a user of PyTorch would take instead.

    python -m benchmarks.kernels                  all groups, in eight minutes on a GPU; on a CPU in one
    python -m benchmarks.kernels --only nf4       one or some of them; --out FILE.json saves it, --budget in seconds

Implementations of one kernel at one shape take turns, the cache is emptied before each run, and the median of 30
counts. Groups run in the order of WEIGHTS, each in a process of its own with a time limit, so that a kernel that hangs
costs one group; after each the file is saved. On a GPU all cores first compile every kernel; then come the two shapes
that matter most, checked against PyTorch in fp32 before they are timed; `training` is benchmarks/peers.py without the
peers, to a file of its own. `make gpu-tests` checks the rest. Last comes the verdict against targets.toml. On a CPU the
PyTorch versions are timed.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import kernels
import runtime
from benchmarks.kernels import report
from benchmarks.measure import machine, save

RESULTS = Path(__file__).parents[1] / "results" / "kernels"
# What a group may take of the time that is left when it starts, compared with the groups after it.
WEIGHTS = {"builds": 0.11, "ceilings": 0.02, "first": 0.13, "trees": 0.13, "training": 0.28, "decode": 0.07,
           "nf4": 0.07, "attention": 0.08, "logprobs": 0.07, "fused": 0.04}
GROUPS = {"cuda": [group for group in WEIGHTS if group != "ceilings"], "cpu": ["attention", "logprobs", "nf4"]}
TRAINING = ["benchmarks.peers", "device=cuda", "peers=", 'tasks=["sft", "dpo"]', "rounds=3"]  # Mistral-7B's shape


def build_kernels(device: str, seconds: float, file: Path) -> list[dict]:
    """All of our kernels compiled, by as many processes as there are cores."""
    began, count = time.monotonic(), min(8, os.cpu_count() or 1)
    command = [sys.executable, "-m", "benchmarks.kernels.groups", "builds", device, str(seconds), str(file)]
    workers = [subprocess.Popen([*command, str(i), str(count)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for i in range(count)]
    for worker in workers:
        try:
            worker.wait(max(0.0, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
    codes = [worker.wait() for worker in workers]
    reason = f"{count} processes, {time.monotonic() - began:.0f} s, ended with {codes}"
    return [{"group": "builds", "kernel": "builds", "shape": "", "pass": "group", "impl": "ours", "reason": reason,
             "status": "failed" if any(codes) else "ok"}]


def run_group(group: str, device: str, seconds: float, file: Path) -> list[dict]:
    """The rows of a group, measured in a process of its own; one says so if that fails or does not end."""
    measure = ["benchmarks.kernels.groups", group, device, str(seconds), str(file)]
    command = [sys.executable, "-m", *(TRAINING if group == "training" else measure)]
    with tempfile.TemporaryFile("w+") as output:
        try:  # a group ends by itself in time, unless it hangs
            code = subprocess.run(command, stdout=output, stderr=output, timeout=seconds + 20).returncode
            why = f"ended with {code}"
        except subprocess.TimeoutExpired:
            code, why = -9, f"stopped after {seconds + 20:.0f} s"
        output.seek(0)
        last = output.read().strip().splitlines()[-1:]
    written = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in written if line.startswith("{") and line.endswith("}")]
    if code:
        rows.append({"group": group, "kernel": group, "shape": "", "pass": "group", "impl": "ours", "status": "failed",
                     "reason": ": ".join([why, *last])[:300]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="default for a whole run: benchmarks/results/kernels/DEVICE.json")
    given = parser.parse_args()
    began, device = time.monotonic(), runtime.find_device("auto")
    if device.type == "cpu":
        print("no GPU here: the PyTorch versions on this processor; `make gpu` measures the Triton ones", flush=True)
    found = {"command": "python -m benchmarks.kernels", **machine(device), "load": round(os.getloadavg()[0], 1),
             "triton": getattr(kernels.triton, "__version__", None), "rows": []}
    name = "cpu" if device.type == "cpu" else found["device"].lower().replace(" ", "_")
    out = given.out or (None if given.only else RESULTS / f"{name}.json")  # what RESULTS.md shows is of a whole run
    groups = sorted({"ceilings", *(given.only or GROUPS[device.type])}, key=list(WEIGHTS).index)
    with tempfile.TemporaryDirectory() as folder:
        for i, group in enumerate(groups):
            left = given.budget - (time.monotonic() - began)
            part = left * WEIGHTS[group] / sum(WEIGHTS[name] for name in groups[i:])
            run = build_kernels if group == "builds" else partial(run_group, group)
            rows = run(device.type, max(5.0, part - 5), Path(folder) / group)  # 5 s to start and to end
            found["rows"] += rows
            print(report.lines(group, rows, report.ceilings(found["rows"])), flush=True)
            if out:
                save(out, found)
    if device.type == "cuda":  # last: of a long output often only the end is kept
        for row in report.verdicts(found["rows"]):
            print("{kernel:<44} {measure:<16} {found!s:>8} {target:>9}  {verdict}".format_map(row))
    failed = [row for row in found["rows"] if row["status"] == "failed"]
    for row in failed:
        print("FAILED {kernel} {shape} {pass}: {reason}".format_map(row))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
