"""What every run needs and no algorithm cares about: config, devices and seeds, optimizer, schedule, log, checkpoints.

Scripts call these functions with plain values; nothing here calls back. A run is a folder:

    config.toml     resolved; `--config` on it repeats the run        metrics.jsonl   one line a step
    model/          the result, a Hugging Face directory              state/step_N/   what resuming needs
"""
from __future__ import annotations

import argparse
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
import tomllib
import typing
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import kernels
import ranks


def fail(message: str) -> NoReturn:
    """One line on stderr and exit code 2: for what the user wrote. A bug of ours raises and shows its traceback."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------ config

def load_config(cls: type, doc: str, argv: list[str] | None = None):
    """An instance of the frozen dataclass `cls`: its defaults, then `--config FILE` (TOML), then `key=value`."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        sources = [inspect.getsource(c) for c in cls.__mro__ if dataclasses.is_dataclass(c)]
        print("\n\n".join([doc.strip(), *sources]))
        raise SystemExit(0)
    types = typing.get_type_hints(cls)
    values: dict = {}
    rest = list(argv)
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            fail("--config: names no file, expected e.g. --config configs/tiny/sft.toml")
        file = rest[at + 1]
        del rest[at : at + 2]
        try:
            table = tomllib.loads(Path(file).read_text())
        except OSError as error:
            fail(f"{file}: cannot be read ({error.strerror}): check the path after --config")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            fail(f"{file}: is not TOML ({error}): numbers are written 0.1, words in quotes, switches true or false")
        for key, value in table.items():
            values[key] = _checked(types, key, value, file)
    for word in ("dry_run=true" if word == "--dry-run" else word for word in rest):
        key, equals, text = word.partition("=")
        if not equals:
            fail(f"command line: '{word}' is not key=value, expected e.g. lr=1e-4 (or --config FILE, --help)")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word is text
        if types.get(key) is str:
            value = text.strip("\"'")  # a folder named 2024-01-01 is not a date
        values[key] = _checked(types, key, value, "command line")
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            fail(f"command line: {field.name} is missing, expected {field.name}=... there or in the --config file")
    return cls(**values)


def _checked(types: dict, key: str, value, place: str):
    """The value as the field's type, or one line that shows a right one."""
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        fail(f"{place}: unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else f", expected one of {', '.join(types)}"))
    wanted = types[key]
    if typing.get_origin(wanted) is typing.Literal:
        if value not in typing.get_args(wanted):
            choices = " or ".join(repr(x) for x in typing.get_args(wanted))
            fail(f"{place}: {key} is {value!r}, expected {choices}")
        return value
    if wanted is float and type(value) is int:
        return float(value)
    inner = typing.get_args(wanted)
    right = isinstance(value, list) and all(type(x) is inner[0] for x in value) if inner else type(value) is wanted
    if not right or (wanted is float and not math.isfinite(value)):
        kind, example = {int: ("a whole number", "8"), float: ("a number", "0.1"), bool: ("a switch", "true or false"),
                         str: ("text", "runs/one"), list[int]: ("a list", "[0, 1]")}.get(wanted, ("a list", '["one", "two"]'))
        fail(f"{place}: {key} is {value!r}, expected {kind} such as {example}")
    return value


def check_range(key: str, value: float, low: float, high: float) -> None:
    """Leave with one line if a setting is out of range."""
    if not low <= value <= high:
        fail(f"{key} is {value:g}, expected {f'at least {low:g}' if high == math.inf else f'between {low:g} and {high:g}'}")


def arguments(parser: argparse.ArgumentParser, argv: typing.Sequence[str] | None = None) -> argparse.Namespace:
    """The words of a command; what is wrong with them is one line, without the usage."""
    parser.error = lambda message: fail(f"{parser.prog}: {message}: --help shows what it takes")
    return parser.parse_args(argv)


def config_toml(config) -> str:
    """The resolved config as a TOML file that load_config reads back to the same values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


# ------------------------------------------------------------------------------- devices and seeds

def setup(device: str, seed: int, threads: int = 0, kernel: str = "auto") -> torch.device:
    """Seed PyTorch, find the device ('auto' takes a GPU when there is one), meet the other ranks, and say what will be used.

    Data order and sampling have generators of their own (data/pack.py, model.py).
    """
    found = find_device(ranks.own_device(device))
    if found.type == "cuda" and found.index is not None:
        torch.cuda.set_device(found)  # where Triton launches
    ranks.join(found)
    torch.manual_seed(seed + ranks.rank())  # dropout
    if threads:
        torch.set_num_threads(threads)
    matmul = ""
    if found.type == "cpu":
        matmul = _fast_cpu_matmul()
        _keep_freed_memory()
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else f"{torch.get_num_threads()} threads{matmul}"
    try:
        kernels.use(kernel)
    except ValueError as error:
        fail(str(error))
    chosen = f"triton {kernels.triton.__version__}" if kernels.on_triton(torch.empty(0, device=found)) else "torch"
    several = f"{ranks.world()} ranks, " if ranks.world() > 1 else ""
    print(f"torch {torch.__version__} on {found} ({several}{name}), kernels {chosen}")
    return found


def _keep_freed_memory() -> None:
    """Have the C library keep what tensors give back, for the next ones: fresh pages cost more than the work on them.

    SFT of a 15 M model on two cores: 1,510 -> 2,300 tokens/s, 1.1 M -> 0.3 M page faults in five steps, 2 % more memory at the peak.
    """
    with suppress(OSError, AttributeError):  # glibc alone has it
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)          # M_MMAP_MAX: large blocks from the heap too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


def find_device(name: str) -> torch.device:
    """The device of that name; 'auto' is a GPU when there is one."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=found).item()  # not on meta
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"device is '{name}', which this machine does not have: use device=cpu or device=auto")
    return found


def _fast_cpu_matmul() -> str:
    """Have oneDNN do fp32 matmuls where that is exact: on AMD, PyTorch's default (MKL) stays with AVX2.

    4096 x 288 x 768 on two Zen 5 cores: 195 GFLOP/s by default, 443 this way, errors alike. The same
    switch may round to bf16 on a CPU with matrix tiles, so one product is checked against fp64 first.
    """
    # It keeps the last 1,024 products it has compiled, 1 to 3 MB each, though hardly two batches have the same length:
    # SFT of the 15 M model peaks 60 to 180 MB lower with 64, and is no slower; with 1 it is.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, 256, generator=generator) for _ in range(2))
    error = (x @ y - (x.double() @ y.double())).abs().max().item()
    if error < 1e-3:  # bf16 inputs would give about 0.2
        return ", fp32 matmul by oneDNN"
    torch.set_float32_matmul_precision("highest")
    return ""


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations; 'auto' is bfloat16 where the hardware multiplies it."""
    if name == "auto":
        cpu_has_it = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        name = "bfloat16" if (torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_it) else "float32"
        print(f"compute in {name}")
    return getattr(torch, name)


# ------------------------------------------------------------------------- optimizer and schedule

class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2) by PyTorch's fused kernel, for gradient g and learning rate lr:

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        w = w - lr (weight_decay w + m' / (sqrt(v') + eps))        m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)

    Bit for bit torch.optim.AdamW(fused=True), which at its first use imports PyTorch's compiler: 69 MB and 1.9 s.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float = 1e-8):
        self.param_groups = groups  # {"params", "lr", "weight_decay", ...}
        self.betas, self.eps = betas, eps
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for p in moving:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                     "exp_avg_sq": torch.zeros_like(p)}
            steps, m, v = ([self.state[p][key] for p in moving] for key in ("step", "exp_avg", "exp_avg_sq"))
            if moving:
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(moving, [p.grad for p in moving], m, v, [], steps, lr=group["lr"], beta1=self.betas[0],
                                    beta2=self.betas[1], weight_decay=group["weight_decay"], eps=self.eps, amsgrad=False, maximize=False)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def adamw(model: nn.Module, lr: float, weight_decay: float, beta2: float = 0.999, lora_plus: float = 1.0) -> AdamW:
    """An optimizer of the trainable parameters; norms and biases are not decayed.

    A group's rate is "scale" times the step's; LoRA's B matrices learn `lora_plus` times as fast (Hayou et al. 2024, arXiv:2402.12354).
    """
    ranks.let_go(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [p for name, p in trainable if name.endswith(".B")] if lora_plus != 1 else []
    rest = [p for name, p in trainable if not (fast and name.endswith(".B"))]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay, "scale": 1.0},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
              {"params": fast, "weight_decay": weight_decay, "scale": lora_plus}]
    groups = [group | {"lr": lr * group["scale"]} for group in groups if group["params"]]
    return AdamW(groups, (0.9, beta2))


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, schedule: str, floor: float = 0.0) -> float:
    """Rate of update `step` (from 0): linear from 0 over the warm-up, then cosine, linear or constant down to floor * peak."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
    return peak * (floor + (1 - floor) * shape)


def check_finite(loss: float, grad_norm: float, step: int, records: list[int]) -> None:
    """A loss or gradient that is not finite ends the run before it reaches the weights. `records` count from 0."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        numbers = ", ".join(str(record + 1) for record in sorted(records))
        fail(f"step {step + 1}: loss is {loss}, gradient norm {grad_norm}: lower lr, or look at this step's records: {numbers}")


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
    lock = open(os.devnull) if ranks.rank() else _enter(run, out, config, depends_on, overwrite)
    ranks.wait()
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
    if ranks.rank() and not together:
        raise ValueError(f"{path}: rank {ranks.rank()} is about to write it, expected rank 0 alone")
    try:
        yield
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            if beside is not None and ranks.rank() == 0:
                shutil.rmtree(beside) if beside.is_dir() else beside.unlink()
        fail(f"{path}: cannot be written ({error}): free some space, or write elsewhere; what was saved before is whole")


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a kill at any moment leaves the old file or the new one. Rank 0 does."""
    if ranks.rank():
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
    ranks.let_go(model)
    tensors = _random_state()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
    with writing(folder, beside, together=True):
        if ranks.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        if ranks.world() == 1:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside / "state.safetensors")
            with (beside / "state.safetensors").open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            ranks.wait()
            ranks.save(tensors, beside)
        if ranks.rank() == 0:
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
        random = ranks.load(tensors, folder, _random_state())
        for name, parameter in trained.items():
            optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for name, state in random.items():  # a rank more than there were keeps its seed
            (torch.cuda if name.startswith("cuda") else torch).set_rng_state(state)
        _remove_older(folder)  # a kill came before it was
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        fail(f"{folder}: cannot be gone on from ({' '.join(str(error).split())}): choose another out=, or overwrite=true")
    return step


def _remove_older(folder: Path) -> None:
    for older in folder.parent.glob("step_*") if ranks.rank() == 0 else ():
        if older != folder:
            shutil.rmtree(older)


def _random_state() -> dict[str, torch.Tensor]:
    of = f".{ranks.rank()}" if ranks.rank() else ""
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
        self.profile = Profile(run) if profile and ranks.rank() == 0 else None
        if ranks.rank() == 0:
            lines = self.file.read_text().splitlines() if self.file.is_file() else []
            kept = [line for line in lines if _step_of(line) <= step]
            if step and (not kept or _step_of(kept[-1]) != step):
                fail(f"{self.file}: lacks step {step}, where the run was saved: put it back, or set overwrite=true")
            write_text(self.file, "".join(line + "\n" for line in kept))
        ranks.wait()
        # Unbuffered: what a full disk did not take must not come back when the file is closed.
        self.stream = open(os.devnull if ranks.rank() else self.file, "ab", buffering=0)
        self.began, self.began_step, self.last = time.perf_counter(), step, 0.0
        self.live = sys.stdout.isatty()
        self.wandb = None
        if wandb_mode != "off" and ranks.rank() == 0:
            import wandb  # only now: it takes a second to import

            self.wandb = wandb.init(project="chatbot", name=run.name, dir=run, mode=wandb_mode, config=dataclasses.asdict(config))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics after `step` updates, those of all ranks: rank 0 has them too."""
        if ranks.rank():
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
