"""Measure the kernels against what a user of PyTorch would take instead.

    python -m kernels.bench                        all groups, in ten minutes on a GPU; on a CPU in one, PyTorch versions only
    python -m kernels.bench --only decode nf4      some of them, saved with --out FILE.json        --budget 300  in 300 seconds
    python -m kernels.bench --show FILE.json       its tables once more, without measuring

On a GPU every kernel must first be right: bf16 and fp16 against fp64, with at most twice the error of PyTorch in the
same dtype; a kernel that is wrong is not timed. Then contests: implementations of one kernel at one shape take turns,
the cache is emptied before each run, and the median of 30 counts. Each group runs in a process of its own with a time
limit, so that a kernel that hangs costs one group. Last comes the verdict against the targets of kernels/bench_report.py.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import bench_report

RUNS = 30
LONGEST_S = {"cuda": 8.0, "cpu": 1.5}
FLUSH_BYTES = 2**30  # written before every run: empties the L2, and keeps the GPU busy while Python queues what is timed


class Work(NamedTuple):
    """One implementation: call(*inputs) gives a tensor, differentiated in the inputs that ask for it."""

    call: Callable
    inputs: tuple = ()
    both: Callable | None = None  # forward and backward, where autograd is not the way


class Desk:
    """Where the rows of one group are made."""

    def __init__(self, group: str, device: torch.device, seconds: float, file: Path):
        self.group, self.device, self.file = group, device, file
        self.gpu = device.type == "cuda"
        self.deadline = time.monotonic() + seconds
        self.flush = torch.empty(FLUSH_BYTES if self.gpu else 2**26, dtype=torch.uint8, device=device)
        self.wrong: set[str] = set()  # kernels whose results failed: not timed
        self.dtype = torch.bfloat16 if self.gpu else torch.float32

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self, **row) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"group": self.group} | row) + "\n")

    def randn(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype).requires_grad_(grad)

    # ------------------------------------------------------------------------------------------------ correctness

    def check(self, kernel: str, shape: str, call: Callable, inputs: list[Tensor], plain: Callable | None = None) -> None:
        """FlashAttention's rule: at most twice (gradients: three times) the error of PyTorch in the same dtype, against fp64.
        And the same bits twice: none of our kernels leaves the order of a sum to chance.

        call without Triton is the specification; `plain` is what is compared with, where that is not it either.
        """
        def results(call: Callable, version: str, dtype: torch.dtype) -> tuple[list[Tensor], int]:
            kernels.use(version)
            leaves = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
            outs = call(*leaves)
            outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out is not None]
            wanted = [x for x in leaves if x.requires_grad]
            seeded = torch.Generator(self.device).manual_seed(1)  # the same upstream gradient in every dtype
            upstream = [torch.randn(out.shape, device=self.device, generator=seeded).to(inputs[0].dtype).to(out.dtype) for out in outs]
            grads = torch.autograd.grad(outs, wanted, upstream) if wanted else ()
            kernels.use("auto")
            return [*outs, *grads], len(outs)

        dtype = inputs[0].dtype
        row = {"kernel": kernel, "shape": shape, "pass": "check", "impl": "ours", "dtype": str(dtype)[6:]}
        if self.left() < 0:
            self.write(**row, status="skipped", reason="no time left")
            return
        try:
            ours, forward = results(call, "auto", dtype)
            again, _ = results(call, "auto", dtype)
            theirs, _ = results(plain or call, "torch", dtype)
            truth, _ = results(call, "torch", torch.float64)
            worst, wrong = 0.0, []
            for i, (our, their, true) in enumerate(zip(ours, theirs, truth, strict=True)):
                floor = torch.finfo(dtype).eps * 0.01 * true.abs().max().item() + 1e-6
                allowed = (2 if i < forward else 3) * (their.double() - true).abs().max().item() + floor
                error = (our.double() - true).abs().max().item()
                worst = max(worst, error / allowed)
                if not error <= allowed:  # NaN fails too
                    wrong.append(f"{'output' if i < forward else 'gradient'} {i if i < forward else i - forward}: "
                                 f"error {error:.2e}, allowed {allowed:.2e}")
            if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
                wrong.append("a second run gives other bits")
            row |= {"error": worst}
            row |= {"status": "failed", "reason": "; ".join(wrong)} if wrong else {"status": "ok"}
        except Exception as error:  # a kernel that does not run has failed its check
            row |= {"status": "failed", "reason": reason(error)}
        finally:
            kernels.use("auto")
        if row["status"] == "failed":
            self.wrong.add(kernel)
        self.write(**row)

    # ------------------------------------------------------------------------------------------------------- time

    def compare(self, kernel: str, shape: str, works: dict[str, Work], amounts: dict[str, float], unit: str, only: tuple = ()) -> None:
        """One contest: a row for each implementation and each pass of `amounts` (operations or bytes of the work).

        `only` names the implementations whose rows are new, when a contest is held again with more of them.
        """
        for name, amount in amounts.items():
            runs, rows = {}, {}
            for impl, work in works.items():
                row = {"kernel": kernel, "shape": shape, "pass": name, "impl": impl, "dtype": str(self.dtype)[6:], "unit": unit}
                if self.left() < 0:
                    rows[impl] = row | {"status": "skipped", "reason": "no time left"}
                elif impl.startswith("ours") and kernel.startswith(tuple(self.wrong)):
                    rows[impl] = row | {"status": "failed", "reason": "its results are wrong"}
                else:
                    try:
                        runs[impl] = prepared(work, name)
                        runs[impl]()  # compiles
                        rows[impl] = row | {"status": "ok", "extra_bytes": self.peak(runs[impl])}
                    except Exception as error:  # not every version of PyTorch has every implementation: the row says so
                        runs.pop(impl, None)
                        rows[impl] = row | {"status": "skipped", "reason": reason(error)}
            for impl, times in self.time(runs).items():
                times.sort()
                middle = times[len(times) // 2]
                rows[impl] |= {"ms": middle, "ms_p20": times[len(times) // 5], "ms_p80": times[len(times) * 4 // 5], "runs": len(times),
                               "amount": amount, "rate": amount / middle / (1e9 if unit == "TFLOP/s" else 1e6)}
            for impl, row in rows.items():
                if not only or impl in only:
                    self.write(**row)

    def time(self, runs: dict[str, Callable]) -> dict[str, list[float]]:
        """Milliseconds of every run: RUNS of each in turn, fewer when a contest would take longer than LONGEST_S, but at least 5."""
        if not runs:
            return {}
        began = time.monotonic()
        for run in runs.values():
            self.once(run)
        self.settle()
        rounds = max(5, min(RUNS, int(LONGEST_S[self.device.type] / (time.monotonic() - began))))
        found = {impl: [] for impl in runs}
        for _ in range(rounds):
            for impl, run in runs.items():
                found[impl].append(self.once(run))
        self.settle()
        return {impl: [t if isinstance(t, float) else t[0].elapsed_time(t[1]) for t in times] for impl, times in found.items()}

    def once(self, run: Callable):
        """Milliseconds, or the two events of the GPU between which they lie."""
        self.flush.zero_()
        if not self.gpu:
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        return start, end

    def settle(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def peak(self, run: Callable) -> int:
        """Bytes that a run takes at its peak beyond what was there, its results included."""
        if self.gpu:
            self.settle()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            self.settle()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for _, change in sorted(changes, key=lambda c: c[0]):
            held += change
            most = max(most, held)
        return most


def reason(error: Exception) -> str:
    said = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {said[0][:150]}"


def prepared(work: Work, name: str) -> Callable:
    """The call that is timed for one pass."""
    wanted = [x for x in work.inputs if isinstance(x, Tensor) and x.requires_grad]
    if name == "forward":
        return lambda: work.call(*work.inputs)
    if name == "both":
        if work.both:
            return work.both

        def both():
            out = work.call(*work.inputs)
            torch.autograd.grad(out, wanted, torch.ones_like(out))

        return both
    out = work.call(*work.inputs)
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, wanted, upstream, retain_graph=True)


# What a group may take of the time that is left when it starts, in the order they run.
WEIGHTS = {"ceilings": 0.05, "attention": 0.32, "logprobs": 0.30, "decode": 0.11, "nf4": 0.10, "fused": 0.12}


def run_group(group: str, device: str, seconds: float, file: Path) -> None:
    """The group in its own process; if that does not end, or not well, a row says so."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "kernels.bench_groups", group, device, str(seconds), str(file)]
        running = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            code = running.wait(seconds + 20)  # a group stops by itself when its time is up; this is for one that hangs
            why = f"ended with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
            code, why = None, f"stopped after {time.monotonic() - began:.0f} s"
        if code != 0:
            said.seek(0)
            last = said.read().strip().splitlines()[-1:]
            with file.open("a") as rows:
                row = {"group": group, "kernel": group, "shape": "", "pass": "group", "impl": "ours", "status": "failed"}
                rows.write("\n" + json.dumps(row | {"reason": ": ".join([why, *last])[:300]}) + "\n")


def machine(device: str) -> dict:
    """What the rows were measured on."""
    found = {"torch": torch.__version__, "triton": getattr(kernels.triton, "__version__", None), "python": platform.python_version()}
    if device == "cpu":
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        return {"device": names[0] if names else platform.processor(), "threads": torch.get_num_threads(),
                "load": round(os.getloadavg()[0], 1)} | found
    about = torch.cuda.get_device_properties(0)
    return {"device": about.name, "sm": f"{about.major}{about.minor}", "multiprocessors": about.multi_processor_count, "before": clocks(),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} | found


def clocks() -> str:
    """Driver, clocks and temperature, if nvidia-smi is there to tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else ""


def main() -> int:
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[name for name in WEIGHTS if name != "ceilings"])
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="default for a whole run: kernels/results/, named after the device")
    parser.add_argument("--show", type=Path, help="print the tables of this file")
    given = parser.parse_args()
    if given.show:
        print(bench_report.text(json.loads(given.show.read_text())))
        return 0
    began, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    groups = given.only or [name for name in WEIGHTS if name != "ceilings"]
    if device == "cpu":
        groups = given.only or ["attention", "logprobs", "nf4"]
        print("no GPU here: the PyTorch versions on this processor; the Triton ones wait for `make gpu`", flush=True)
    report = {"command": "python -m kernels.bench", "commit": commit()} | machine(device)
    name = "cpu" if device == "cpu" else report["device"].lower().replace(" ", "_")
    # The file that the README's tables come from is written by a whole run only.
    out = given.out or (None if given.only else Path(__file__).parent / "results" / f"{name}.json")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, group in enumerate(["ceilings", *groups]):
            left = given.budget - (time.monotonic() - began)
            share = WEIGHTS[group] / sum(WEIGHTS[name] for name in ["ceilings", *groups][i:])
            file = Path(folder) / f"{group}.jsonl"
            file.touch()
            run_group(group, device, max(5.0, left * share - 5), file)  # 5 s to start and to end
            found = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
            rows += found
            print(bench_report.group_text(group, found, bench_report.ceilings(rows)), flush=True)
            report |= {"seconds": round(time.monotonic() - began)} | ({"after": clocks()} if device == "cuda" else {})
            if out:
                bench_report.save(report, rows, out)
    if out and device == "cuda":
        bench_report.figures(rows, out)
    print(f"wrote {out}" if out else "nothing written: --only without --out")
    if device == "cuda":
        print(bench_report.verdict(rows))  # last: of a long output often only the end is kept
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def commit() -> str:
    """The commit measured, with a mark if files differ from it; nothing outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
