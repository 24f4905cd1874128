"""How kernels are timed: the time of every implementation becomes one row of JSON."""
import json
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

RUNS = 30
LONGEST_S = {"cuda": 8.0, "cpu": 1.5}        # of a contest
FLUSH_BYTES = {"cuda": 2**30, "cpu": 2**26}  # written before every run: empties the caches, hides the launch in Python


class Work(NamedTuple):
    """One implementation: call(*inputs) gives a tensor, differentiated in the inputs that require gradients."""

    call: Callable
    inputs: tuple = ()
    both: Callable | None = None  # forward and backward, where that is not call and autograd


class Bench:
    """What one group of kernels is measured with; its rows are appended to `file`."""

    def __init__(self, group: str, device: torch.device, seconds: float, file: Path,
                 share: tuple[int, ...] = ()):
        self.group, self.device, self.file = group, device, file
        self.share, self.met = share, 0  # (i, n): nothing is timed, only every n-th contest's kernels are compiled
        self.gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.deadline = time.monotonic() + seconds
        self.flush = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)

    def left(self) -> float:
        """Seconds until this group has to end."""
        return self.deadline - time.monotonic()

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=grad)

    def compare(self, kernel: str, shape: str, works: dict[str, Work], amounts: dict[str, float], unit: str):
        """One contest: a row for each implementation and each pass of `amounts` (operations or bytes of the work)."""
        if self.share:
            return self.build(works, amounts)
        for name, amount in amounts.items():
            started = {impl: self.start(impl, work, name) for impl, work in works.items()}
            times = self.times({impl: run for impl, (run, _) in started.items() if run})
            for impl, (_, found) in started.items():
                row = {"group": self.group, "kernel": kernel, "shape": shape, "pass": name, "impl": impl,
                       "dtype": str(self.dtype)[6:], "unit": unit} | found
                if impl in times:
                    fastest_first, count = times[impl], len(times[impl])
                    ms = fastest_first[count // 2]
                    row |= {"ms": ms, "ms_p20": fastest_first[count // 5], "ms_p80": fastest_first[count * 4 // 5],
                            "runs": count, "amount": amount, "rate": amount / ms / (1e9 if unit == "TFLOP/s" else 1e6)}
                self.write(row)

    def build(self, works: dict[str, Work], passes: dict) -> None:
        """Run what takes long to compile, if it is this process's turn; caches keep it. Faults show when timed."""
        self.met += 1
        for impl, name in product(("ours", "FlexAttention"), passes):
            if impl in works and self.met % self.share[1] == self.share[0] and self.left() > 0:
                with suppress(Exception):
                    prepared(works[impl], name)()

    def check(self, kernel: str, shape: str, ours: Work, plain: Callable) -> bool:
        """A row with the errors of the output and of the gradients; whether they are no more than the dtype's.

        Errors are relative to `plain` in fp32. As FlashAttention asks, the output's may be twice those that `plain`
        makes in the dtype of the inputs, the gradients' three times.
        """
        if self.share:
            return True
        row = {"group": self.group, "kernel": kernel, "shape": shape, "pass": "error", "impl": "ours",
               "dtype": str(self.dtype)[6:], "status": "failed"}
        try:
            wide = tuple(x.detach().float().requires_grad_() for x in ours.inputs)
            upstream = torch.randn_like(ours.call(*ours.inputs))
            truths = outputs(plain, wide, upstream)
            row["errors"], row["plain_errors"] = (
                [((x.float() - truth).norm() / truth.norm()).item() for x, truth in zip(found, truths, strict=True)]
                for found in (outputs(ours.call, ours.inputs, upstream), outputs(plain, ours.inputs, upstream)))
            allowed = [factor * error + 1e-5 for factor, error in zip((2, 3, 3, 3), row["plain_errors"], strict=False)]
            if all(error <= most for error, most in zip(row["errors"], allowed, strict=True)):
                row["status"] = "ok"
            row["reason"] = "errors {errors}, of PyTorch {plain_errors}".format_map(row)
        except Exception as error:
            row["reason"] = said(error)
        self.write(row)
        return row["status"] == "ok"

    def write(self, row: dict) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def start(self, impl: str, work: Work, name: str) -> tuple[Callable | None, dict]:
        """The call to time and the memory it takes, or no call and why."""
        if self.left() < 0:
            return None, {"status": "skipped", "reason": "no time left"}
        try:
            run = prepared(work, name)
            run()  # compiles
            return run, {"status": "ok", "extra_bytes": self.peak(run)}
        except Exception as error:  # not every machine has every implementation: the row says so
            return None, {"status": "failed" if impl.startswith("ours") else "skipped", "reason": said(error)}

    def times(self, runs: dict[str, Callable]) -> dict[str, list[float]]:
        """Sorted milliseconds: RUNS of each in turn, fewer if that would take longer than LONGEST_S, at least 5."""
        began = time.monotonic()
        for run in runs.values():
            self.once(run)
        self.settle()
        rounds = max(5, min(RUNS, int(LONGEST_S[self.device.type] / (time.monotonic() - began + 1e-9))))
        clocks = [{impl: self.once(run) for impl, run in runs.items()} for _ in range(rounds)]
        self.settle()
        return {impl: sorted(clock[impl]() for clock in clocks) for impl in runs}

    def once(self, run: Callable) -> Callable[[], float]:
        """Run after emptying the caches; what is returned gives the milliseconds, on a GPU once it has settled."""
        self.flush.zero_()
        if not self.gpu:
            began = time.perf_counter()
            run()
            took = 1e3 * (time.perf_counter() - began)
            return lambda: took
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end)

    def settle(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def peak(self, run: Callable) -> int:
        """Bytes that a run needs at its peak beyond what was there before, its results included."""
        if self.gpu:
            self.settle()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            self.settle()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(accumulate((event.nbytes() for event in events), initial=0))


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:150]}"


def outputs(call: Callable, inputs: tuple, upstream: Tensor) -> list[Tensor]:
    """What a call returns, and the gradients of its inputs."""
    out = call(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], upstream.to(out.dtype))]


def prepared(work: Work, name: str) -> Callable:
    """The call that is timed for one pass: forward, backward, or both."""
    if name == "forward":
        return lambda: work.call(*work.inputs)
    if name == "both" and work.both:
        return work.both
    wanted = [x for x in work.inputs if isinstance(x, Tensor) and x.requires_grad]
    out = work.call(*work.inputs)
    upstream = torch.randn_like(out)
    if name == "backward":
        return lambda: torch.autograd.grad(out, wanted, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(work.call(*work.inputs), wanted, upstream)
