"""A run is a folder, and an object that knows how many steps are done.

    config.toml     resolved; `--config` on it repeats the run        metrics.jsonl   one line a step
    model/          the result, a Hugging Face directory              state/step_N/   what resuming needs
"""
import json
import os
import shutil
import signal
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from runtime import distributed
from runtime.checkpoint import load_state, save_state
from runtime.config import RENAMED, Settings, config_toml, fail
from runtime.cpu import AdamW
from runtime.files import file_hash, lock_file, write_text
from runtime.log import Log


class Run:
    """One training run: its folder and lock, the updates done, its log, and whether it was asked to stop."""

    def __init__(self, config: Settings, depends_on: dict[str, str]):
        self.config = config
        self.folder, self.lock = open_run(config.out, config, depends_on, config.overwrite)

    def resume(self, model: nn.Module, optimizer: AdamW, steps: int, shown: tuple[str, ...],
               unit: str = "dialogues") -> None:
        """Restore the newest checkpoint if there is one, and open the log, which shows those metrics line by line."""
        self.steps, self.done = steps, load_state(self.folder, model, optimizer)
        self.writer = Log(self.folder, self.done, steps, shown, self.config.wandb, self.config, self.config.profile)
        self.stop_request, self.stopping, self.saving = StopRequest(), False, None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{trained:,} parameters train, {steps} steps of {self.config.batch} {unit}, {self.done} done")

    def steps_left(self) -> Iterator[int]:
        """The steps that are not done, from 0, until the run is asked to stop."""
        while self.done < self.steps and not self.stopping:
            yield self.done

    def due(self, every: int, done: int) -> bool:
        """After `done` updates, is it time for what happens every `every` updates (0: never) and at the end?"""
        return done == self.steps or (every > 0 and done % every == 0)

    def log(self, metrics: dict[str, float]) -> None:
        """Another update is done."""
        self.done += 1
        self.writer.step(self.done, metrics)
        self.stopping = distributed.any_rank(self.stop_request)
        if self.saving is not None and distributed.any_rank(self.saving.done()):
            self.finish_saving()

    def end_step(self, metrics: dict[str, float], model: nn.Module, optimizer: AdamW) -> None:
        """Log the update, and save if it is time for that, or if the run was asked to stop."""
        self.log(metrics)
        if self.stopping or self.due(self.config.save_every, self.done):
            self.save(model, optimizer)

    def last_metrics(self) -> dict[str, float]:
        """What the last update before this start has logged; {} at the beginning."""
        return json.loads(self.writer.file.read_text().splitlines()[-1]) if self.done else {}

    def note(self, text: str) -> None:
        """Print lines that the live one does not overwrite."""
        self.writer.note(text)

    def save(self, model: nn.Module, optimizer: AdamW) -> None:
        """A checkpoint. With async_save training goes on while it is written, but for the last one."""
        self.finish_saving()
        later = self.config.async_save and not (self.stopping or self.finished)
        self.saving = save_state(self.folder, self.done, model, optimizer, later)

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written counts; what went wrong with it ends the run."""
        if self.saving is not None:
            self.saving.result()
        self.saving = None

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    def close(self, finished: bool | None = None) -> None:
        """End the log, free the folder and say what is there; finished=True where a run ends before its last step."""
        self.finish_saving()
        self.writer.close()
        self.lock.close()
        whole = self.finished if finished is None else finished
        print(f"wrote {self.folder}/model" if whole else
              f"stopped after step {self.done}; the same command goes on from there")


class StopRequest:
    """True once SIGTERM, SIGHUP or Ctrl-C has arrived: the loop saves and exits with code 0. A second ends at once."""

    def __init__(self):
        self.requested = False
        for kind in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if kind != signal.SIGHUP or signal.getsignal(kind) != signal.SIG_IGN:  # which nohup has asked for
                signal.signal(kind, self._request)

    def _request(self, kind, _) -> None:
        self.requested = True
        signal.signal(kind, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.requested


# What a run writes into its folder.
WRITTEN = ("metrics.jsonl", "state", "model", "adapter", "ref_logprobs.safetensors", "report.json", "trace.json")


def open_run(out: str, config, depends_on: dict[str, str], overwrite: bool = False) -> tuple[Path, typing.IO]:
    """Create or re-enter the folder of a run; the folder, and its lock: while that is open, nobody else may enter.

    `depends_on` are the files and directories the run reads, by name: its data, its model, its own code. A
    folder begun with another config, or when one of them was another, is refused: its steps would not belong
    together. overwrite=true starts it anew; accept_change=NAME goes on with what that one is now, and says so.
    Files that no run has written are never touched. The folder, and what it reads, may lie elsewhere than before.
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
        lock_file(lock)
    except BlockingIOError:
        fail(f"{out}: another process is running here, expected a folder of its own: choose another out=")
    except OSError as error:
        fail(f"{out}: cannot be written ({error.strerror}): choose another out=")
    began = run / "config.toml"
    if not began.is_file() and any((run / name).exists() for name in WRITTEN):
        fail(f"{out}: holds files that no run has written there: choose another out=")
    hashes = {name: file_hash(path) for name, path in depends_on.items()}
    if began.is_file() and not overwrite:
        _check_same(run, out, config, hashes)
        return lock
    # config.toml makes a folder a run's: written last and never removed, so that a kill in between locks nobody out.
    others = [path for kind in ("model", "adapter") for path in (*run.glob(f"{kind}_step_*"), *run.glob(f".{kind}*"))]
    for path in [*(run / name for name in WRITTEN), *others]:  # snapshots, and what a kill had left set aside
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(run / "depends_on.json", json.dumps(hashes))
    write_text(began, config_toml(config))
    return lock


# Settings that change no step.
INDIFFERENT = ("out", "overwrite", "accept_change", "shard", "async_save", "profile", "cache", "wandb")


def _check_same(run: Path, out: str, config, hashes: dict[str, str]) -> None:
    """Exit with one line unless the folder was begun with this config and these inputs."""
    remedy = "choose another out=, or overwrite=true"
    try:
        old = tomllib.loads((run / "config.toml").read_text("utf-8"))
        depended = json.loads((run / "depends_on.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{out}: its config.toml or depends_on.json is damaged ({error}): {remedy}")
    new = tomllib.loads(config_toml(config))
    old = {"columns": {}} | {key if key in new else RENAMED.get(key, key): value for key, value in old.items()}
    for key in new:  # of what it depends on the contents count, below
        if old.get(key) != new[key] and key not in INDIFFERENT and key not in depended:
            fail(f"{out}: was begun with {key}={json.dumps(old.get(key))}, not {json.dumps(new[key])}: {remedy}")
    changed = [name for name, digest in depended.items() if hashes.get(name) != digest]
    accepted = getattr(config, "accept_change", "")
    kinds = list(dict.fromkeys(name.partition(" ")[0] for name in depended))  # of "reward mine.py": reward
    if accepted and accepted not in kinds:
        fail(f"accept_change is '{accepted}', expected one of {', '.join(kinds)}")
    for name in changed:
        kind = name.partition(" ")[0]
        if kind != accepted:
            fail(f"{out}: its {name} has changed since the run began: {remedy}; or accept_change={kind}, to go on with "
                 "it as it is now")
    if changed:
        print(f"{out}: goes on although its {' and its '.join(changed)} changed since the run began: accept_change")
        write_text(run / "depends_on.json", json.dumps(hashes))
