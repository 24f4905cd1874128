"""A run's log: metrics.jsonl, the live line on the terminal, wandb, and a profile if asked for."""
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from runtime import distributed
from runtime.config import fail
from runtime.files import write_text, writing


class Sums(dict[str, float]):
    """A step's metrics, added up over its micro-batches."""

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self[name] = self.get(name, 0.0) + value.item()


class Log:
    """One JSON line a step in metrics.jsonl, a live line with the metrics `shown` on the terminal, wandb if asked.

    Lines after `step`, of a run that was killed after its last checkpoint, are cut off. With `profile` also a trace
    of three of its first steps.
    """

    def __init__(self, run: Path, step: int, steps: int, shown: tuple[str, ...], wandb_mode: str, config,
                 profile: bool = False):
        self.file, self.steps, self.shown = run / "metrics.jsonl", steps, shown
        self.profile = Profile(run) if profile and distributed.rank() == 0 else None
        if distributed.rank() == 0:
            lines = self.file.read_text().splitlines() if self.file.is_file() else []
            kept = [line for line in lines if _step_of(line) <= step]
            if step and (not kept or _step_of(kept[-1]) != step):
                fail(f"{self.file}: lacks step {step}, where the run was saved: put it back, or set overwrite=true")
            write_text(self.file, "".join(line + "\n" for line in kept))
        distributed.barrier()
        # Unbuffered: what a full disk did not take must not come back when the file is closed.
        self.stream = open(os.devnull if distributed.rank() else self.file, "ab", buffering=0)
        self.began, self.began_step, self.last = time.perf_counter(), step, 0.0
        self.live = sys.stdout.isatty()
        self.wandb = None
        if wandb_mode != "off" and distributed.rank() == 0:
            import wandb  # only now: it takes a second to import

            earlier = sorted((run / "wandb").glob("*run-*-*")) if step else []  # a resumed run's, which goes on
            self.wandb = wandb.init(project="chatbot", name=run.name, dir=run, mode=wandb_mode,
                                    config=dataclasses.asdict(config),
                                    id=earlier[-1].name.rpartition("-")[2] if earlier else None,
                                    resume="allow" if earlier and wandb_mode == "online" else None)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics after `step` updates, those of all ranks: rank 0 has them too."""
        if distributed.rank():
            return
        if self.profile and (summary := self.profile.step()):
            self.note(summary)
        line = json.dumps({"step": step, **{k: float(v) for k, v in metrics.items()}}).encode() + b"\n"
        with writing(self.file):
            if self.stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.wandb:
            self.wandb.log(metrics, step=step)
        now, evaluated = time.perf_counter(), any(k.startswith("eval_") for k in metrics)
        if now - self.last > (0.2 if self.live else 10) or step == self.steps or evaluated:
            self.last = now
            self._show(step, metrics, now)

    def _show(self, step: int, metrics: dict[str, float], now: float) -> None:
        left = int((now - self.began) / max(1, step - self.began_step) * (self.steps - step))
        values = [(k, v) for k, v in metrics.items() if k in self.shown or k.startswith("eval_")]
        words = [f"{k} {v:,.0f}" if v >= 1000 else f"{k} {v:.3f}" for k, v in values]
        line = "  ".join([f"step {step}/{self.steps}", f"{left // 60}:{left % 60:02d} left", *words])
        overwritten = self.live and step < self.steps
        if overwritten:  # of a line that wraps only the last row would be
            line = line[: shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{line}" if self.live else line, end="" if overwritten else "\n", flush=True)

    def note(self, text: str) -> None:
        """A line of its own, not overwritten by the live one."""
        print(f"\r\033[K{text}" if self.live else text, flush=True)

    def close(self) -> None:
        if self.profile and (summary := self.profile.stop()):
            self.note(summary)
        self.stream.close()
        if self.wandb:
            self.wandb.finish()


class Profile:
    """PyTorch's profiler over steps 2 to 4 (the first pays for starting): run/trace.json, for Perfetto."""

    def __init__(self, run: Path):
        self.file, self.steps, self.profiler = run / "trace.json", 0, torch.profiler.profile()

    def step(self) -> str:
        """A step has ended. When it was the last one traced: where its time went, in ten lines."""
        self.steps += 1
        if self.steps == 1:
            self.profiler.start()
            self.began = time.perf_counter()
        return self.stop() if self.steps == 4 else ""

    def stop(self) -> str:
        if self.profiler is None or self.steps < 2:
            return ""
        profiler, traced, self.profiler = self.profiler, min(self.steps, 4) - 1, None
        elapsed = time.perf_counter() - self.began
        profiler.stop()
        with writing(self.file):
            profiler.export_chrome_trace(str(self.file))
        return f"profile: {longest(profiler, traced, elapsed)}\n  (all of it: {self.file})"


def longest(profiler: torch.profiler.profile, steps: int, elapsed: float) -> str:
    """Where the `elapsed` seconds of so many profiled steps went: what took longest, in ten lines."""
    kind = "device" if torch.cuda.is_available() else "cpu"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, f"self_{kind}_time_total"))[:10]
    lines = [f"a step takes {1000 * elapsed / steps:.1f} ms, of which"]
    for row in rows:
        spent, calls = getattr(row, f"self_{kind}_time_total") / 1e6, row.count / steps
        lines.append(f"  {100 * spent / elapsed:5.1f} %  {1000 * spent / steps:8.2f} ms  {calls:6.0f} calls  "
                     f"{row.key[:80]}")
    return "\n".join(lines)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line, cut by a kill
