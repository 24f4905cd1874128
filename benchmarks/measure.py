"""What the benchmarks share: a clock, the name of the machine, the file of results."""
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import runtime


def timed(work: Callable, *arguments) -> tuple[Any, float]:
    """What a call returns, and the seconds it takes, its work on a GPU included."""
    began = time.perf_counter()
    found = work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - began


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call, after two that do not count."""
    return median([timed(work)[1] for _ in range(rounds + 2)][2:])


def processor(device: torch.device) -> str:
    """The GPU, or the CPU, by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def machine(device: torch.device) -> dict:
    """What a rate depends on beside the code."""
    return {"device": processor(device), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__}


def show(row: dict) -> None:
    """A row on the terminal."""
    print("  ".join(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in row.items()), flush=True)


def save(out: str | Path, report: dict) -> None:
    """Write a report as JSON; its folder is made if it is not there."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    runtime.write_text(Path(out), json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")
