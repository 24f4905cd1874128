"""Measure the kernels against what a user of PyTorch would take instead.

    python -m benchmarks.kernels                  all groups, in ten minutes on a GPU; on a CPU in one
    python -m benchmarks.kernels --only nf4       one or some of them; --out FILE.json saves it, --budget in seconds

On a GPU every kernel must first be right: bf16 and fp16 against fp64, with at most twice the error of PyTorch in the
same dtype; a kernel that is wrong is not timed. Then contests: implementations of one kernel at one shape take turns,
the cache is emptied before each run, and the median of 30 counts. Each group runs in a process of its own with a time
limit, so that a kernel that hangs costs one group. Last comes the verdict against the targets in report.py. On a CPU
the PyTorch versions are timed.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import kernels
from benchmarks.kernels import report as tables

RESULTS = Path(__file__).parents[1] / "results" / "kernels"
# What a group may take of the time that is left when it starts, compared with the groups after it.
WEIGHTS = {"ceilings": 0.05, "attention": 0.32, "logprobs": 0.30, "decode": 0.11, "nf4": 0.10, "fused": 0.12}
GROUPS = {"cuda": [group for group in WEIGHTS if group != "ceilings"], "cpu": ["attention", "logprobs", "nf4"]}


def run_group(group: str, device: str, seconds: float, file: Path) -> list[dict]:
    """The rows of a group, measured in a process of its own; one says so if that fails or does not end."""
    command = [sys.executable, "-m", "benchmarks.kernels.groups", group, device, str(seconds), str(file)]
    with tempfile.TemporaryFile("w+") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            why = f"ended with {running.wait(seconds + 20)}"  # a group ends by itself in time, unless it hangs
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
            running.wait()
            why = f"stopped after {seconds + 20:.0f} s"
        output.seek(0)
        last = output.read().strip().splitlines()[-1:]
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    if running.returncode:
        rows.append({"group": group, "kernel": group, "shape": "", "pass": "group", "impl": "ours", "status": "failed",
                     "reason": ": ".join([why, *last])[:300]})
    return rows


def machine(device: str) -> dict:
    """What the rows were measured on."""
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*"]  # nothing outside a repository
    found = {"command": "python -m benchmarks.kernels",
             "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(), "torch": torch.__version__,
             "triton": getattr(kernels.triton, "__version__", None), "python": platform.python_version()}
    if device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
        return found | {"device": names[0] if names else platform.processor(), "threads": torch.get_num_threads(),
                        "load": round(os.getloadavg()[0], 1)}
    about = torch.cuda.get_device_properties(0)
    return found | {"device": about.name, "sm": f"{about.major}{about.minor}", "cuda": torch.version.cuda,
                    "multiprocessors": about.multi_processor_count, "cudnn": torch.backends.cudnn.version()}


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="default for a whole run: benchmarks/results/kernels/DEVICE.json")
    given = parser.parse_args()
    began, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU here: the PyTorch versions on this processor; `make gpu` measures the Triton ones", flush=True)
    report = machine(device) | {"rows": []}
    name = "cpu" if device == "cpu" else report["device"].lower().replace(" ", "_")
    out = given.out or (None if given.only else RESULTS / f"{name}.json")  # what RESULTS.md shows is of a whole run
    groups = ["ceilings", *(given.only or GROUPS[device])]
    with tempfile.TemporaryDirectory() as folder:
        for i, group in enumerate(groups):
            left = given.budget - (time.monotonic() - began)
            part = left * WEIGHTS[group] / sum(WEIGHTS[name] for name in groups[i:])
            rows = run_group(group, device, max(5.0, part - 5), Path(folder) / group)  # 5 s to start and to end
            report["rows"] += rows
            report["seconds"] = round(time.monotonic() - began)
            print(tables.group_text(group, rows, tables.ceilings(report["rows"])), flush=True)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(tables.json_lines(report) + "\n")
    print(f"wrote {out}" if out else "nothing written: --only without --out")
    if device == "cuda":
        print(tables.verdict(report["rows"]))  # last: of a long output often only the end is kept
    return 1 if any(row["status"] == "failed" for row in report["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
