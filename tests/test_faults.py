"""What a run survives: SIGKILL at any moment, SIGTERM, a full disk, a second run in its folder.

    KILLS=20 python -m pytest tests/test_faults.py -k killed_run     twenty kills of each way to run a script, 200 in
                                                                     all, to benchmarks/results/kills.json
"""
import errno
import json
import os
import shutil
import signal
import sys
import threading
from concurrent import futures
from dataclasses import dataclass

import kills
import pytest
import torch
from conftest import ROOT, exits, metrics_of, small_model
from kills import SETTINGS, same_folders, words_for

import lora
import runtime
import sft

KILLS = int(os.environ.get("KILLS", "0"))
SCRIPTS = ("sft", "dpo", "reward", "ppo")
FEW = {"ppo": ["steps=4", "batch=4", "minibatches=1", "epochs=1"]}  # five steps, of PPO four


@pytest.fixture(scope="module")
def server():
    return kills.shared_server()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    kills.prepare(folder)
    return folder


def few(script, data):
    return [*words_for(script, data), *FEW.get(script, ["epochs=1"])]


# ----------------------------------------------------------------------------------------- killed

@pytest.fixture(scope="module")
def trials():
    """Results by script; those of a long run over all of them go to the file that the tables are made from."""
    found, file = {}, ROOT / "benchmarks" / "results" / "kills.json"
    yield found
    if KILLS and found.keys() == SETTINGS.keys():
        command = f"KILLS={KILLS} python -m pytest tests/test_faults.py -k killed_run"
        total = sum(row["kills"] for row in found.values())
        report = {"command": command, "kills": total, "scripts": list(found.values())}
        file.write_text(json.dumps(report, indent=1) + "\n")


@pytest.mark.parametrize("script", SETTINGS if KILLS else [*SCRIPTS, "sft asynchronous"])
def test_a_killed_run_ends_as_one_nobody_disturbed(script, server, data, trials):
    """Three kills of three kinds; with KILLS=20 twenty of all kinds, in longer runs."""
    if KILLS:
        found = kills.trial(server, script, words_for(script, data), KILLS, 0, data)
    else:
        moments = ("file operation", "saving", "rollout" if script == "ppo" else "accumulating")
        found = kills.trial(server, script, few(script, data), 3, 1, data, moments)
    trials[script] = found
    assert found["differences"] == [] and sum(found["moments"].values()) == (KILLS or 3)


class Killed(BaseException):
    """Nothing catches it."""


FUSE = {"left": -1}  # file operations until the process "dies"; below 0: it lives


def _fuse(event, args):
    if FUSE["left"] >= 0 and (event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
                              or event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        FUSE["left"] -= 1
        if FUSE["left"] < 0:
            raise Killed


sys.addaudithook(_fuse)


def killed_everywhere(work, check):
    """Repeat the work, each time dying one file operation later than before, until it ends."""
    for operations in range(100):
        FUSE["left"] = operations
        try:
            work(operations)
            return operations
        except Killed:
            pass  # its frames go, and with them the lock they held, as with a process
        finally:
            FUSE["left"] = -1
        check(operations)
    raise AssertionError("no end")


@dataclass(frozen=True)
class Config:
    out: str
    lr: float = 0.1
    overwrite: bool = False


def test_a_kill_while_a_folder_is_begun_does_not_lock_it(tmp_path):
    (tmp_path / "data").write_text("a")

    def begin(operations, **changes):
        out = str(tmp_path / str(operations))
        config, depends_on = Config(out, **changes), {"data": str(tmp_path / "data")}
        runtime.open_run(out, config, depends_on, config.overwrite)[1].close()

    assert killed_everywhere(begin, begin) > 4


def test_a_kill_while_a_folder_is_begun_anew_leaves_one_run_or_the_other(tmp_path):
    """Overwriting resumes where it was; without overwrite=true the old run's files never pass for the new run's."""
    (tmp_path / "data").write_text("a")

    def begin(operations, lr=0.2):
        run = tmp_path / str(operations)
        left, FUSE["left"] = FUSE["left"], -1
        if not run.exists():
            runtime.open_run(str(run), Config(str(run)), {"data": str(tmp_path / "data")})[1].close()
            (run / "metrics.jsonl").write_text('{"step": 1}\n')
            (run / "adapter").mkdir()
            for step in (1, 2):
                (run / "state" / f"step_{step}").mkdir(parents=True)
                (run / "state" / f"step_{step}" / "state.safetensors").write_text("old")
        FUSE["left"] = left
        runtime.open_run(str(run), Config(str(run), lr, True), {"data": str(tmp_path / "data")}, True)[1].close()

    def check(operations):
        run = tmp_path / str(operations)
        with pytest.raises(SystemExit):
            runtime.open_run(str(run), Config(str(run), 0.3), {"data": str(tmp_path / "data")})
        begin(operations)
        assert not any((run / name).exists() for name in ("metrics.jsonl", "state", "adapter"))
        assert "0.2" in (run / "config.toml").read_text()

    assert killed_everywhere(begin, check) > 8


def trained(seed=0):
    model = small_model(seed=seed, dtype=torch.float32)
    optimizer = runtime.adamw(model, 1e-2, 0.1)
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """The one before or the new one."""
    old, new = trained(0), trained(1)

    def save(operations):
        left, FUSE["left"] = FUSE["left"], -1
        runtime.save_state(tmp_path / str(operations), 2, *old)
        FUSE["left"] = left
        runtime.save_state(tmp_path / str(operations), 3, *new)

    def check(operations):
        model, optimizer = trained(2)
        step = runtime.load_state(tmp_path / str(operations), model, optimizer)
        saved = {2: old, 3: new}[step][0]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
        assert [path.name for path in (tmp_path / str(operations) / "state").glob("step_*")] == [f"step_{step}"]

    assert killed_everywhere(save, check) > 3


def test_an_asynchronous_checkpoint_is_of_its_step_and_counts_once_it_is_durable(tmp_path, monkeypatch):
    """Until its file and the folder are synced the one before counts, which a kill would leave; training goes on."""
    model, optimizer = trained(0)
    runtime.save_state(tmp_path, 1, model, optimizer)
    expected = [p.clone() for p in model.parameters()]
    may_sync, sync, synced = threading.Event(), os.fsync, []

    def wait_and_sync(descriptor):
        assert may_sync.wait(60)
        sync(descriptor)
        synced.append(sorted(path.name for path in (tmp_path / "state").iterdir()))

    monkeypatch.setattr(os, "fsync", wait_and_sync)
    saving = runtime.save_state(tmp_path, 2, model, optimizer, later=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
    again, other = trained(1)
    assert runtime.load_state(tmp_path, again, other) == 1 and not saving.done()
    may_sync.set()
    saving.result()
    assert synced == [[".new", "step_1"], [".new", "step_1"], ["step_1", "step_2"]]  # its file, its folder, its name
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_2"]
    assert runtime.load_state(tmp_path, again, other) == 2
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expected, strict=True))
    assert all(state["exp_avg"].abs().max() > 0 for state in other.state.values())


def test_an_asynchronous_checkpoint_that_fails_ends_the_run_with_one_line_at_a_step(tmp_path, monkeypatch, capsys):
    """At the first step after it failed, or before the next checkpoint; the one before still counts."""
    model, optimizer = trained()
    run = runtime.Run(sft.Config(out=str(tmp_path), async_save=True, save_every=1), {})
    run.resume(model, optimizer, 5, ("loss",))
    run.log({"loss": 1.0})
    run.save(model, optimizer)
    run.log({"loss": 1.0})
    run.finish_saving()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    run.save(model, optimizer)
    futures.wait([run.saving])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step_2: cannot be written" in said and "free some space" in said
    with pytest.raises(SystemExit) as left:
        run.log({"loss": 1.0})
    monkeypatch.setattr(os, "fsync", sync)
    assert left.value.code == 2
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_1"]


def test_a_kill_while_an_adapter_is_saved_leaves_the_old_one_or_the_new_whole(tmp_path):
    """At its place, or set aside, from where the next saving brings it back: killed again, that one loses nothing."""
    def adapter(seed):
        model = lora.add_lora(small_model(dtype=torch.float32), 2, 4, seed=seed)
        return model, next(parameter for name, parameter in model.named_parameters() if name.endswith(".A"))

    (old, old_values), (new, new_values) = adapter(0), adapter(1)

    def whole(folder):
        loaded = small_model(dtype=torch.float32)
        lora.load_adapter(loaded, folder)
        values = next(parameter for name, parameter in loaded.named_parameters() if name.endswith(".A"))
        assert torch.equal(values, old_values) or torch.equal(values, new_values)

    def save(operations):
        left, FUSE["left"] = FUSE["left"], -1
        lora.save_adapter(old, tmp_path / str(operations))
        FUSE["left"] = left
        lora.save_adapter(new, tmp_path / str(operations))

    def check(operations):
        for again in range(20):  # saved again after each kill, and killed again, always a little later
            place, aside = tmp_path / str(operations), tmp_path / f".{operations}.old"
            whole(place if place.exists() else aside)
            FUSE["left"] = again
            try:
                lora.save_adapter(new, place)
                break
            except Killed:
                pass
            finally:
                FUSE["left"] = -1
        assert not aside.exists()

    assert killed_everywhere(save, check) > 4


def test_a_run_that_ended_early_is_not_gone_on_with(server, data, tmp_path):
    """PPO stops when too few replies end. Killed before it wrote its model, it writes that, without more steps."""
    words = [*few("ppo", data), "min_eos=1"]
    whole = kills.undisturbed(server, "ppo", words, tmp_path / "whole")
    assert len(metrics_of(tmp_path / "whole")) == 1
    last = int(whole["operations"]) - 1
    process = server.start("ppo", [*words, f"out={tmp_path / 'run'}"], tmp_path / "log", str(tmp_path / "run"), last)
    assert process.ended(100) and process.code() == -signal.SIGKILL
    for _ in range(2):
        process = server.start("ppo", [*words, f"out={tmp_path / 'run'}"], tmp_path / "log")
        assert process.ended(100) and process.code() == 0
        assert same_folders(tmp_path / "whole", tmp_path / "run") == ""
        assert "ended early after step 1: eos_rate is" in (tmp_path / "log").read_text()


# ------------------------------------------------------------------------------------- asked to stop

@pytest.mark.parametrize("script, asked", [*((script, signal.SIGTERM) for script in SCRIPTS), ("sft", signal.SIGHUP)])
def test_sigterm_saves_and_leaves_with_0_and_the_run_goes_on(script, asked, server, data, tmp_path):
    """So does SIGHUP, of a window that is closed."""
    words = [*few(script, data), "save_every=0", f"out={tmp_path / 'run'}"]
    process = server.start(script, words, tmp_path / "log")
    assert kills.wait_for(process, lambda: kills.lines_of(tmp_path / "run") >= 2)
    process.kill(asked)
    assert process.ended(60) and process.code() == 0
    steps = len(metrics_of(tmp_path / "run"))
    assert (tmp_path / "run" / "state" / f"step_{steps}" / "state.safetensors").exists()
    assert "the same command goes on from there" in (tmp_path / "log").read_text() or steps >= 4


# ------------------------------------------------------------------------------------ a full disk

@pytest.mark.parametrize("script", [*SCRIPTS, "sft asynchronous"])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(script, server, data, small_disk, tmp_path):
    """The disk fills up after the first checkpoint; with room again the run goes on and ends as if nothing had been."""
    words, run = few(script, data), small_disk / "run"
    kills.undisturbed(server, script, words, tmp_path / "run")
    process = server.start(script, [*words, f"out={run}"], tmp_path / "log")
    assert kills.wait_for(process, lambda: list((run / "state").glob("step_*")))
    with (small_disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError):
        while True:
            ballast.write(bytes(2**14))
    assert process.ended(100) and process.code() == 2, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text().splitlines()
    assert str(run) in said[-1] and "No space left on device" in said[-1] and "free" in said[-1]
    assert "Traceback" not in "".join(said)
    assert len([line for line in said if "space" in line]) == 1
    assert [path for path in (run / "state").glob("step_*") if (path / "state.safetensors").exists()]
    (small_disk / "ballast").unlink()
    process = server.start(script, [*words, f"out={run}"], tmp_path / "log")
    assert process.ended(100) and process.code() == 0, (tmp_path / "log").read_text()
    assert same_folders(tmp_path / "run", run) == ""


def test_a_limit_on_file_sizes_is_one_line_too(server, data, tmp_path):
    """As `ulimit -f` sets it: the checkpoint is larger than files may be."""
    words, log = [*few("sft", data), f"out={tmp_path / 'run'}"], tmp_path / "log"
    process = server.start("sft", words, log, file_bytes=40 * 1024)
    assert process.ended(100) and process.code() == 2
    said = log.read_text()
    assert said.count("File too large") == 1 and "File too large" in said.splitlines()[-1], said
    assert "Traceback" not in said


def test_what_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = runtime.Log(tmp_path, 0, 5, ("loss",), "off", Config(""))
    log.stream = type("Full", (), {"write": full})()
    exits(capsys, lambda: log.step(1, {"loss": 0.5}), "metrics.jsonl", "No space left on device", "free")
    monkeypatch.setattr(os, "replace", full)
    exits(capsys, lambda: runtime.write_text(tmp_path / "report.json", "{}"), "report.json", "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # nothing half written fills the disk


# ------------------------------------------------------------------------------- two runs, damaged files

@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_a_second_run_in_a_folder_is_refused(script, server, data, tmp_path):
    words = [*few(script, data), f"out={tmp_path / 'run'}"]
    first = server.start(script, words, tmp_path / "first")
    assert kills.wait_for(first, lambda: kills.lines_of(tmp_path / "run") >= 1)
    os.kill(first.pid, signal.SIGSTOP)
    second = server.start(script, [*words, "overwrite=true"], tmp_path / "second")
    assert second.ended(60) and second.code() == 2
    assert "another process is running here" in (tmp_path / "second").read_text().splitlines()[-1]
    first.kill(signal.SIGCONT)
    assert first.ended(100) and first.code() == 0


@pytest.mark.parametrize("damage", [
    lambda run: os.truncate(run / "state" / "step_2" / "state.safetensors", 1000),
    lambda run: (run / "state" / "step_2" / "state.safetensors").unlink(),
    lambda run: (run / "config.toml").write_text("lr = \n"),
    lambda run: (run / "depends_on.json").write_text("{"),
    lambda run: (run / "depends_on.json").unlink(),
    lambda run: shutil.copytree(run / "state" / "step_2", run / "state" / "step_two"),
], ids=["state cut", "state gone", "config broken", "dependencies broken", "dependencies gone", "another's folder"])
def test_a_damaged_run_is_one_line(damage, tmp_path, capsys):
    (tmp_path / "data").write_text("a")
    run = tmp_path / "run"

    def resume():
        found, lock = runtime.open_run(str(run), Config(str(run)), {"data": str(tmp_path / "data")})
        try:
            return runtime.load_state(found, *trained(1))
        finally:
            lock.close()

    assert resume() == 0
    runtime.save_state(run, 2, *trained())
    assert resume() == 2
    damage(run)
    exits(capsys, resume, str(run), "overwrite=true")


def test_a_state_of_another_model_is_one_line(tmp_path, capsys):
    """The code has changed, and the sizes with it."""
    runtime.save_state(tmp_path, 2, *trained())
    model = small_model(width=32, dtype=torch.float32)
    optimizer = runtime.adamw(model, 1e-2, 0.1)
    exits(capsys, lambda: runtime.load_state(tmp_path, model, optimizer), "step_2", "overwrite=true")
