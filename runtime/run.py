"""A run is a folder.

    config.toml     resolved; `--config` on it repeats the run        metrics.jsonl   one line a step
    model/          the result, a Hugging Face directory              state/step_N/   what resuming needs
"""
from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import tomllib
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from runtime import distributed
from runtime.config import config_toml, fail
from runtime.cpu import AdamW

# --------------------------------------------------------------------------------- the run's folder

# By a run, once it has begun.
WRITTEN = ("metrics.jsonl", "state", "model", "adapter", "ref_logprobs.safetensors", "report.json", "trace.json")


def open_run(out: str, config, depends_on: dict[str, str], overwrite: bool = False) -> tuple[Path, typing.IO]:
    """Create or re-enter the folder of a run; the folder, and its lock: while that is open, nobody else may enter.

    `depends_on` are the files and directories the run reads, by name: its data, its model, its own code. A
    folder begun with another config, or when one of them was another, is refused: its steps would not belong
    together. overwrite=true starts it anew. Files that no run has written are never touched.
    """
    run = Path(out)
    lock = open(os.devnull) if distributed.rank() else _enter(run, out, config, depends_on, overwrite)
    distributed.barrier()
    return run, lock


def _enter(run: Path, out: str, config, depends_on: dict[str, str], overwrite: bool) -> typing.IO:
    for name, path in depends_on.items():
        if run.resolve() == Path(path).resolve():
            fail(f"{out}: is its own {name}: choose another out=")
        if run.resolve() in Path(path).resolve().parents and overwrite:
            fail(f"{out}: overwrite=true would delete its own {name}, {path}: choose another out=")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{out}: another process is running here, expected a folder of its own: choose another out=")
    except OSError as error:
        fail(f"{out}: cannot be written ({error.strerror}): choose another out=")
    began = run / "config.toml"
    if not began.is_file() and any((run / name).exists() for name in WRITTEN):
        fail(f"{out}: holds files that no run has written there: choose another out=")
    hashes = {name: file_hash(path) for name, path in depends_on.items()}
    if began.is_file() and not overwrite:
        try:
            old, depended = tomllib.loads(began.read_text()), json.loads((run / "depends_on.json").read_text())
        except (OSError, ValueError) as error:
            fail(f"{out}: its config.toml or depends_on.json is damaged ({error}): choose another out=, or overwrite=true")
        new = tomllib.loads(config_toml(config))
        for key in new:
            if old.get(key) != new[key] and key not in ("overwrite", "shard", "profile"):  # which change no step
                fail(f"{out}: was begun with {key}={json.dumps(old.get(key))}, not {json.dumps(new[key])}: "
                     f"choose another out=, or overwrite=true")
        for name, digest in depended.items():
            if hashes.get(name) != digest:
                fail(f"{out}: its {name} has changed since the run began: choose another out=, or overwrite=true")
        return lock
    # config.toml is what makes a folder a run's: it comes last and is never away, so that a kill in between locks nobody out.
    for path in (run / name for name in WRITTEN):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(run / "depends_on.json", json.dumps(hashes))
    write_text(began, config_toml(config))
    return lock


def open_folder(out: str) -> Path:
    """Make the folder a command is to write in, before it takes time or money."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    except OSError as error:
        fail(f"{out}: cannot be written ({error.strerror}): choose another out=")
    return folder


@contextmanager
def writing(path: Path, beside: Path | None = None, together: bool = False) -> Iterator[None]:
    """A disk that is full, or does not let us write, ends the run with one line. What was half written `beside` goes.

    Rank 0 alone writes, or two ranks would rename one file beside; `together` they each write what is theirs.
    """
    if distributed.rank() and not together:
        raise ValueError(f"{path}: rank {distributed.rank()} is about to write it, expected rank 0 alone")
    try:
        yield
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            if beside is not None and distributed.rank() == 0:
                shutil.rmtree(beside) if beside.is_dir() else beside.unlink()
        fail(f"{path}: cannot be written ({error}): free some space, or write elsewhere; what was saved before is whole")


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a kill at any moment leaves the old file or the new one. Rank 0 does."""
    if distributed.rank():
        return
    beside = path.with_name(f".{path.name}.new")
    with writing(path, beside):
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


def file_hash(*paths: str | Path) -> str:
    """sha256 over files, or over the files of a directory by name, as 16 hex digits."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------ checkpoint, resume

def save_state(run: Path, step: int, model: nn.Module, optimizer: AdamW) -> None:
    """Everything the next step depends on, after `step` updates. Data order is a function of the step.

    Safetensors in any case: one file, or with several ranks a file of each with its share.
    """
    folder = run / "state" / f"step_{step}"
    beside = run / "state" / ".new"
    distributed.reshard(model)
    tensors = _random_state()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
    with writing(folder, beside, together=True):
        if distributed.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        if distributed.world_size() == 1:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside / "state.safetensors")
            with (beside / "state.safetensors").open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            distributed.barrier()
            distributed.save_sharded(tensors, beside)
        if distributed.rank() == 0:
            os.replace(beside, folder)
    _remove_older(folder)


def load_state(run: Path, model: nn.Module, optimizer: AdamW) -> int:
    """Restore the newest state, saved by however many ranks; the number of updates done, 0 when there is none."""
    folder = run / "state"
    try:
        states = sorted((int(path.name[5:]), path) for path in (run / "state").glob("step_*"))
        if not states:
            return 0
        step, folder = states[-1]
        tensors = {}
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, parameter in trained.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"step.{name}"] = torch.zeros((), device=parameter.device)
            tensors |= {f"{key}.{name}": torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        random = distributed.load_sharded(tensors, folder, _random_state())
        for name, parameter in trained.items():
            optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for name, state in random.items():  # a rank more than there were keeps its seed
            (torch.cuda if name.startswith("cuda") else torch).set_rng_state(state)
        _remove_older(folder)  # a kill came before it was
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        fail(f"{folder}: cannot be gone on from ({' '.join(str(error).split())}): choose another out=, or overwrite=true")
    return step


def _remove_older(folder: Path) -> None:
    for older in folder.parent.glob("step_*") if distributed.rank() == 0 else ():
        if older != folder:
            shutil.rmtree(older)


def _random_state() -> dict[str, torch.Tensor]:
    of = f".{distributed.rank()}" if distributed.rank() else ""
    cuda = {f"cuda_rng{of}": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {f"torch_rng{of}": torch.get_rng_state()} | cuda


class StopRequest:
    """True once SIGTERM or Ctrl-C has arrived: the loop then saves and leaves with exit code 0. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.requested = False
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._request)

    def _request(self, kind, _) -> None:
        self.requested = True
        signal.signal(kind, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.requested


# --------------------------------------------------------------------------------------------- log

class Log:
    """One JSON line a step in metrics.jsonl, one live line with the metrics `shown` on the terminal, and wandb if asked.

    Lines after `step` (written by a run that was killed later than its last checkpoint) are cut off. With `profile` also
    a trace of three of its first steps (`Profile`).
    """

    def __init__(self, run: Path, step: int, steps: int, shown: tuple[str, ...], wandb_mode: str, config, profile: bool = False):
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

            self.wandb = wandb.init(project="chatbot", name=run.name, dir=run, mode=wandb_mode, config=dataclasses.asdict(config))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics after `step` updates, those of all ranks: rank 0 has them too."""
        if distributed.rank():
            return
        if self.profile and (told := self.profile.step()):
            self.note(told)
        line = json.dumps({"step": step, **{k: float(v) for k, v in metrics.items()}}).encode() + b"\n"
        with writing(self.file):
            if self.stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.wandb:
            self.wandb.log(metrics, step=step)
        now = time.perf_counter()
        if now - self.last > (0.2 if self.live else 10) or step == self.steps or any(k.startswith("eval_") for k in metrics):
            self.last = now
            left = int((now - self.began) / max(1, step - self.began_step) * (self.steps - step))
            values = [(k, v) for k, v in metrics.items() if k in self.shown or k.startswith("eval_")]
            words = [f"{k} {v:,.0f}" if v >= 1000 else f"{k} {v:.3f}" for k, v in values]
            line = f"step {step}/{self.steps}  {'  '.join(words)}  {left // 60}:{left % 60:02d} left"
            print(f"\r\033[K{line}" if self.live else line, end="" if self.live and step < self.steps else "\n", flush=True)

    def note(self, text: str) -> None:
        """A line of its own, not overwritten by the live one."""
        print(f"\r\033[K{text}" if self.live else text, flush=True)

    def close(self) -> None:
        if self.profile and (told := self.profile.stop()):
            self.note(told)
        self.stream.close()
        if self.wandb:
            self.wandb.finish()


class Profile:
    """PyTorch's profiler over steps 2 to 4 of a process, as the first pays for starting: run/trace.json, for Perfetto or chrome://tracing."""

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
        kind = "device" if torch.cuda.is_available() else "cpu"
        rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, f"self_{kind}_time_total"))[:10]
        lines = [f"profile: a step takes {1000 * elapsed / traced:.1f} ms, of which ({self.file})"]
        for row in rows:
            spent, calls = getattr(row, f"self_{kind}_time_total") / 1e6, row.count / traced
            lines.append(f"  {100 * spent / elapsed:5.1f} %  {1000 * spent / traced:8.2f} ms  {calls:6.0f} calls  {row.key[:80]}")
        return "\n".join(lines)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line, cut by a kill
