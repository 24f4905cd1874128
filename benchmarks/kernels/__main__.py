"""Measure the kernels against what a user of PyTorch would take instead.

    python -m benchmarks.kernels                  all groups, in ten minutes on a GPU; on a CPU in one
    python -m benchmarks.kernels --only nf4       one or some of them; --out FILE.json saves it, --budget in seconds

That the kernels are right is what `make gpu-tests` checks. Here implementations of one kernel at one shape take turns,
the cache is emptied before each run, and the median of 30 counts. Each group runs in a process of its own with a time
limit, so that a kernel that hangs costs one group. Last comes the verdict against targets.toml. On a CPU
the PyTorch versions are timed.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import kernels
import runtime
from benchmarks.kernels import report
from benchmarks.measure import machine, save

RESULTS = Path(__file__).parents[1] / "results" / "kernels"
# What a group may take of the time that is left when it starts, compared with the groups after it.
WEIGHTS = {"ceilings": 0.05, "attention": 0.32, "logprobs": 0.30, "decode": 0.11, "nf4": 0.10, "fused": 0.12}
GROUPS = {"cuda": [group for group in WEIGHTS if group != "ceilings"], "cpu": ["attention", "logprobs", "nf4"]}


def run_group(group: str, device: str, seconds: float, file: Path) -> list[dict]:
    """The rows of a group, measured in a process of its own; one says so if that fails or does not end."""
    command = [sys.executable, "-m", "benchmarks.kernels.groups", group, device, str(seconds), str(file)]
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
    groups = ["ceilings", *(given.only or GROUPS[device.type])]
    with tempfile.TemporaryDirectory() as folder:
        for i, group in enumerate(groups):
            left = given.budget - (time.monotonic() - began)
            part = left * WEIGHTS[group] / sum(WEIGHTS[name] for name in groups[i:])
            rows = run_group(group, device.type, max(5.0, part - 5), Path(folder) / group)  # 5 s to start and to end
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
