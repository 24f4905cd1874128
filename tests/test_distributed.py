"""One process and two give the same run: the same steps, checkpoints that either continues, the same model.

    WRITE=1 python -m pytest tests/test_distributed.py      how far they differ, to benchmarks/results/ranks.json
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
import torch
from conftest import BASE, FAMILIES, FIXTURES, ROOT, exits, metrics_of, small_model, write_jsonl
from distributed_worker import run
from safetensors.torch import load_file
from test_dpo import pairs_file
from test_sft import demos
from torch.distributed import TCPStore

import runtime
from checkpoints import load_model, save_model
from data.pack import micro_batches, pack
from data.tokenizer import adopt_template, load_tokenizer
from data.trees import Response, Tree
from model import add_score_head
from runtime import distributed

COMMON = {"device": "cpu", "dtype": "float32", "threads": 1, "lr": 1e-3, "warmup_ratio": 0.2}
LORA = {"lora_rank": 4}
DPO = {"beta": 0.02}  # replies here have log-probabilities of -70, which fp32 holds to 7.6e-6
STEPS = 6
# Two epochs of five, five and one tree, the last too few for two ranks; micro-batches of 300 tokens, an evaluation in
# the middle. Among them all that is sharded beside the model: a teacher, a reference, the four models of PPO.
RUNS = {
    "sft": ("sft", {}), "sft_async": ("sft", {"async_save": True, "save_every": 1}),
    "sft_lora": ("sft", LORA), "sft_nf4": ("sft", LORA | {"quantize": "nf4"}),
    "distill_copies": ("distill", {"shard": 1, "context": "{folder}/context.jsonl"}),
    "dpo": ("dpo", DPO | {"ref_model": "{folder}/policy"}), "dpo_lora": ("dpo", DPO | LORA),
    "orpo": ("dpo", {"loss": "orpo", "sft_coef": 1.0}), "kto": ("kto", DPO),
    "reward": ("reward", {}), "reward_lora": ("reward", LORA), "ppo": ("ppo", {}), "ppo_lora": ("ppo", LORA),
    "ppo_rule": ("ppo", {"reward": "{folder}/rule.py:f", "advantages": "grpo", "n": 2, "kl_in": "loss", "kl": "k2",
                         "missing_eos": "subtract"}),
}
STOPPED = {"stopped_sft": 4, "stopped_reward_lora": 4, "stopped_ppo": 2}


def planned(name: str, folder: Path, checkpoint: Path, out: str) -> list:
    """[script, config, stop_after] of a run into folder/out."""
    script, changes = RUNS[name.removeprefix("stopped_")]
    changes = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in changes.items()}
    config = COMMON | {"model": str(checkpoint), "out": str(folder / out)} | changes
    if script == "ppo":
        config |= {"model": str(folder / "policy"), "reward_model": str(folder / "scorer"),
                   "data": str(folder / "prompts.jsonl"), "steps": STEPS, "batch": 5, "epochs": 1, "minibatches": 2,
                   "max_tokens": 8, "min_eos": 0.0, "micro_tokens": 60, "snapshot_every": 3}
    else:
        kind = "sft" if script in ("sft", "distill") else "pairs"
        config |= {"data": str(folder / f"{kind}.jsonl"), "eval_data": str(folder / f"{kind}_eval.jsonl"),
                   "template": "zephyr", "max_steps": STEPS, "batch": 5, "micro_tokens": 300, "eval_every": 3}
        config |= {"samples": 1} if script != "reward" else {}
    return [script, config, STOPPED.get(name, 0)]


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """Data for all scripts, and a policy and a reward model for PPO."""
    folder = tmp_path_factory.mktemp("ranks")
    demos(folder / "sft.jsonl", 11)
    demos(folder / "sft_eval.jsonl", 3, seed=1)
    pairs_file(folder / "pairs.jsonl", 11)
    pairs_file(folder / "pairs_eval.jsonl", 3)
    hello = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
    write_jsonl(folder / "context.jsonl", [{"messages": hello}])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"Name {n} cities.", "count": n} for n in range(9)])
    (folder / "rule.py").write_text("def f(records, replies, tokens, finished):\n"
                                    "    return [len(t) * r['count'] % 7 / 7 for r, t in zip(records, replies)]\n")
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    tokenizer.adopt("zephyr")
    save_model(model, folder / "policy", tokenizer)
    save_model(add_score_head(model, 0), folder / "scorer", tokenizer)
    return folder


ONE_MACHINE = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def torchrun(plans: list, file: Path, options: list[str] = ONE_MACHINE) -> subprocess.Popen:
    """Ranks that do them all, one after the other."""
    file.write_text(json.dumps(plans))
    words = [sys.executable, "-m", "torch.distributed.run", *options, "tests/distributed_worker.py", str(file)]
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen, seconds: int) -> tuple[str, str]:
    """What it has printed when it ends; if it does not in time, end it and its ranks."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun kills its ranks after 30 s
        out, err = process.communicate()
        raise AssertionError(f"no end after {seconds} s: {out} {err}") from None


@pytest.fixture(scope="module")
def both(files, checkpoint):
    """Every run with one process into one/NAME and with two into two/NAME; some are stopped, the other continues them.

    The last run of two has no end: torchrun is asked to stop. Returns the folder, what torchrun printed, and the
    checkpoints of the stopped runs.
    """
    def plans(where, names):
        return [planned(name, files, checkpoint, f"{where}/{name}") for name in names]

    def continued(where):
        return [[script, config, 0] for script, config, _ in plans(where, STOPPED)]

    for plan in plans("one", STOPPED):
        run(*plan)
    states = {name: [p.name for p in (files / "one" / name / "state").iterdir()] for name in STOPPED}
    endless = planned("sft", files, checkpoint, "endless")
    endless[1] |= {"max_steps": 100_000, "eval_every": 0}
    two = torchrun([*plans("two", [*RUNS, *STOPPED]), *continued("one"), endless], files / "runs.json")
    for plan in plans("one", RUNS):
        run(*plan)
    metrics, deadline = files / "endless" / "metrics.jsonl", time.time() + 300
    while two.poll() is None and time.time() < deadline and kills.lines_of(metrics.parent) <= 2:
        time.sleep(0.1)
    running = two.poll() is None and time.time() < deadline
    two.send_signal(signal.SIGTERM)
    said = told(two, 60)
    assert running, said
    states |= {f"two {name}": [p.name for p in (files / "two" / name / "state").iterdir()] for name in STOPPED}
    for plan in continued("two"):
        run(*plan)
    return files, *said, states


# ----------------------------------------------------------------------------------------- the same run

NORMS = {"grad_norm", "policy_grad_norm", "value_grad_norm"}
# Norms: of one large tensor in fp32 against two halves. Scores: nothing fixes their mean. Explained variance: small
# variances. The largest ratio is one token's, no mean. z0 is in nats, of which replies have -70.
LOOSE = NORMS | {"score_chosen", "score_rejected", "explained_variance", "ratio_max", "z0", "eval_z0"}


def differences(one: Path, two: Path) -> dict[str, float]:
    """|a - b| / max(1, |a|) of every metric, the largest over the steps of two runs."""
    one, two = metrics_of(one), metrics_of(two)
    assert [step.keys() for step in one] == [step.keys() for step in two]
    pairs = list(zip(one, two, strict=True))
    return {key: max(abs(a[key] - b[key]) / max(1, abs(a[key])) for a, b in pairs if key in a)
            for key in dict.fromkeys(key for step in one for key in step)}


def assert_same_steps(one: Path, two: Path) -> None:
    """Every metric to 1e-6 of itself, or of 1 where it is smaller; those in LOOSE to 2e-5."""
    found = differences(one, two)
    assert {key: value for key, value in found.items() if not value <= (2e-5 if key in LOOSE else 1e-6)} == {}


def assert_same_model(one: Path, two: Path) -> None:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Adam makes a whole step of a gradient that is 0 but for rounding.
        assert torch.allclose(ours[name], theirs[name], atol=2e-4), name
        assert (ours[name] - theirs[name]).abs().mean() < 1e-6, name


@pytest.mark.parametrize("name", RUNS)
def test_one_rank_and_two_take_the_same_steps_to_the_same_model(name, both):
    folder = both[0]
    assert_same_steps(folder / "one" / name, folder / "two" / name)
    assert_same_model(folder / "one" / name, folder / "two" / name)


@pytest.mark.skipif("WRITE" not in os.environ, reason="writes a result file")
def test_the_differences_are_written(both):
    found = {}
    for name in RUNS:
        each = differences(both[0] / "one" / name, both[0] / "two" / name)
        worst = max(each.keys() - NORMS, key=each.get)
        found[name] = {"steps": STEPS, "loss": each.get("loss", each.get("policy_loss")),
                       "gradient norm": max(each[key] for key in NORMS & each.keys()),
                       "largest of the others": {worst: each[worst]}}
    report = {"command": "WRITE=1 python -m pytest tests/test_distributed.py", "scripts": found}
    (ROOT / "benchmarks" / "results" / "ranks.json").write_text(json.dumps(report, indent=1) + "\n")


@pytest.mark.parametrize("name", ["stopped_sft", "stopped_reward_lora", "stopped_ppo"])
@pytest.mark.parametrize("first", ["one", "two"])
def test_a_run_goes_on_with_another_number_of_ranks(first, name, both):
    """Stopped after step 4 (PPO: 2) by one rank or two, continued by two or one: the steps of the undisturbed run.

    With two, the signal has come to the last rank alone.
    """
    folder, _, _, states = both
    assert states[name if first == "one" else f"two {name}"] == [f"step_{STOPPED[name]}"]
    assert_same_steps(folder / "one" / name.removeprefix("stopped_"), folder / first / name)
    assert_same_model(folder / "one" / name.removeprefix("stopped_"), folder / first / name)


def test_sharded_state_is_safetensors_of_which_no_file_holds_all(both):
    folder = both[0]
    files = sorted((folder / "two" / "sft" / "state" / f"step_{STEPS}").iterdir())
    assert len(files) == 2 and all(file.suffix == ".safetensors" for file in files)
    first, second = map(load_file, files)
    for name, whole in load_file(folder / "one" / "sft" / "state" / f"step_{STEPS}" / "state.safetensors").items():
        if name.startswith(("model.", "exp_avg")):
            assert first[name].shape[0] + second[name].shape[0] == whole.shape[0]


def test_only_rank_0_prints_and_writes(both):
    folder, said, _, _ = both
    assert said.count(f"wrote {folder}/two/sft/model\n") == 1
    lines = (folder / "two" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not [p for p in (folder / "two" / "sft").rglob("*") if p.name.endswith((".new", ".old"))]


def test_the_others_write_nothing(tmp_path, monkeypatch):
    """reward.py's report, for one: two ranks that rename the same file beside it trip over each other."""
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    runtime.write_text(tmp_path / "report.json", "{}")
    save_model(small_model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    # A writer that does not ask for its rank.
    with pytest.raises(ValueError, match="rank 0 alone"), runtime.writing(tmp_path / "report.json"):
        pass


# ---------------------------------------------------------------------------------------- two machines

@pytest.fixture(scope="module")
def machines(files, checkpoint):
    """Two machines (two groups of processes here) with two ranks each, started as the example in configs/ says.

    Ten steps with a model that all four share (FSDP) and with a copy a machine (HSDP), and of one process; a model of
    each family read and written again.
    """
    def plan(out, **changes):
        script, config, _ = planned("sft", files, checkpoint, f"machines/{out}")
        return [script, config | {"max_steps": 10, "epochs": 4, "eval_every": 0} | changes, 0]

    models = [*(FIXTURES / "models" / family for family in FAMILIES), BASE]
    again = {"models": [str(path) for path in models], "out": str(files / "machines")}
    plans = [plan("fsdp"), plan("hsdp", shard=2), ["read_and_write", again | {"shard": 0}, 0],
             ["read_and_write", again | {"shard": 2}, 0]]
    text = (ROOT / "configs" / "zephyr-7b" / "two_machines.md").read_text()
    (example,) = [line.split() for line in text.splitlines() if line.startswith("torchrun")]
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    example = " ".join(example[1 : example.index("sft.py")]).replace("per-node 8", "per-node 2")
    options = example.replace("FIRST:29500", f"localhost:{store.port}")
    del store  # its port is free again
    started = [torchrun(plans, files / f"machine{number}.json", options.split()) for number in range(2)]
    run(*plan("one"))
    said = [told(process, 300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return files / "machines"


@pytest.mark.parametrize("names", [("one", "fsdp"), ("one", "hsdp"), ("fsdp", "hsdp")], ids="-".join)
def test_a_model_that_all_share_and_a_copy_a_machine_take_the_ten_steps_of_one_process(names, machines):
    one, other = (machines / name for name in names)
    assert len(metrics_of(one)) == 10
    assert_same_steps(one, other)
    assert_same_model(one, other)


@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize("family", [*FAMILIES, "base"])
def test_slices_of_the_files_make_the_whole_model_bit_for_bit(family, shard, machines, tmp_path):
    """Fused matrices, more ranks than a tensor has rows, rows added for a template, several files written."""
    path = BASE if family == "base" else FIXTURES / "models" / family
    whole, again = load_model(path, torch.float32), load_model(machines / f"{family}_{shard}")
    adopt_template(whole, load_tokenizer(path), "chatml")
    whole = add_score_head(whole, 0) if shard else whole
    assert len(list((machines / f"{family}_{shard}").glob("*.safetensors"))) > 1
    for (name, ours), theirs in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# ------------------------------------------------------------------------------------------- the share

@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_every_tree_once_in_as_many_batches_each(world, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 90, (20,), generator=generator).tolist()
    trees = [Tree(torch.arange(n).int().numpy(), [], [Response(0, 1, n)], record=i) for i, n in enumerate(lengths)]
    for count in (20, 9, 2, 1):
        shares = []
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(list(micro_batches(trees[:count], 100)))
        assert len({len(batches) for batches in shares}) == 1
        counted = [batch for batches in shares for batch in batches if batch.weight]
        assert sorted(tree.record for batch in counted for tree in batch.trees) == list(range(count))
        assert all(len(batch.tokens) <= 100 for batch in counted)
        if count <= world:
            assert len(counted) == count and all(len(batches) == 1 for batches in shares)


def test_alone_a_rank_has_the_batches_of_pack():
    trees = [Tree(torch.arange(n).int().numpy(), [], [Response(0, 1, n)]) for n in (5, 30, 20, 9)]
    assert [b.tokens.tolist() for b in micro_batches(trees, 40)] == [b.tokens.tolist() for b in pack(trees, 40)]


# ----------------------------------------------------------------------------------------- signals, faults

def test_sigterm_to_torchrun_saves_and_every_rank_leaves_with_0(both):
    """torchrun itself reports the signal with code 1; had a rank failed, it would have named it."""
    folder, said, errors, _ = both
    steps = len(metrics_of(folder / "endless"))
    assert f"stopped after step {steps}; the same command goes on from there" in said
    assert len(list((folder / "endless" / "state" / f"step_{steps}").glob("*.safetensors"))) == 2
    assert "SIGKILL" not in errors and "exitcode" not in errors


@pytest.fixture(scope="module")
def server():
    return kills.shared_server()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    kills.prepare(folder)
    return folder


# Sharded; five steps, a checkpoint after 2, 4 and 5.
WORDS = ["epochs=1", "eval_every=0", "eval_data=", "lora_rank=0", "lora_dropout=0"]


def pair(server, data, logs: Path, *words: str, other: str = "", folder: str = "", die_at: int = 0) -> list:
    """Two ranks of sft.py without torchrun, which would end one when the other has failed.

    `other` is an argument for rank 1 alone.
    """
    all_words = [*kills.words_for("sft", data), *WORDS, *words]
    return server.start_ranks("sft", all_words, logs, folder, die_at, (other,) if other else ())


def codes(processes: list) -> list[int]:
    """How they left, by themselves and soon."""
    try:
        assert all(process.ended(30) for process in processes)
    finally:
        for process in processes:
            process.kill()
    return [process.code() for process in processes]


@pytest.fixture(scope="module")
def undisturbed(server, data):
    """A finished run of two ranks, and the number of file operations of its rank 0."""
    run = data / "undisturbed"
    assert codes(pair(server, data, data / "log", f"out={run}", folder=str(run))) == [0, 0], (data / "log0").read_text()
    return run, int(Path(f"{run}.operations").read_text())


def assert_same_runs(one: Path, other: Path) -> None:
    """The same files, tensors and metrics, bit for bit (the headers of a checkpoint's files have no fixed order)."""
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) for run in (one, other)]
    assert names[0] == names[1] and metrics_of(one) == metrics_of(other)
    for name in names[0]:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(one / name), load_file(other / name)
            assert ours.keys() == theirs.keys(), name
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


# 42 operations: 30 begins the last checkpoint, 33 renames it, 34 to 36 remove the one before, 37 to 42 write the model.
@pytest.mark.parametrize("before_the_end", [9, 7])
def test_a_killed_rank_costs_no_checkpoint(before_the_end, server, data, undisturbed, tmp_path):
    """Rank 0 is killed while it saves. Rank 1 leaves by itself, and the same command ends as if nothing had been."""
    (whole, operations), run = undisturbed, tmp_path / "run"
    words, die_at = f"out={run}", operations - before_the_end
    first, second = codes(pair(server, data, tmp_path / "a", words, folder=str(run), die_at=die_at))
    assert first == -signal.SIGKILL and second != 0
    assert codes(pair(server, data, tmp_path / "b", words)) == [0, 0], (tmp_path / "b0").read_text()
    assert_same_runs(whole, tmp_path / "run")


def test_what_one_rank_alone_finds_wrong_ends_both(server, data, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert codes(pair(server, data, tmp_path / "a", f"out={one}", other=f"data={data}/none.jsonl"))[1] == 2
    assert "none.jsonl" in (tmp_path / "a1").read_text().splitlines()[-1]
    (other / "model").mkdir(parents=True)
    first, second = codes(pair(server, data, tmp_path / "b", f"out={other}"))
    assert first == 2 and second != 0
    assert "no run has written" in (tmp_path / "b0").read_text().splitlines()[-1]


@pytest.mark.parametrize("damage", [
    lambda first, second: first.unlink(),
    lambda first, second: second.unlink(),
    lambda first, second: os.truncate(first, 1000),
], ids=["first gone", "second gone", "cut"])
def test_a_checkpoint_that_lacks_a_part_is_one_line(damage, undisturbed, tmp_path, capsys):
    """Not a model filled in part."""
    whole, _ = undisturbed
    shutil.copytree(whole / "state", tmp_path / "state")
    model = load_model(whole / "model", dtype=torch.float32)
    assert runtime.load_state(tmp_path, model, runtime.adamw(model, 1e-3, 0.0)) == 5
    damage(*sorted((tmp_path / "state" / "step_5").iterdir()))
    optimizer = runtime.adamw(model, 1e-3, 0.0)
    exits(capsys, lambda: runtime.load_state(tmp_path, model, optimizer), "step_5", "overwrite=true")


def test_a_full_disk_ends_all_ranks_with_one_line_and_costs_no_checkpoint(server, data, undisturbed, tmp_path,
                                                                          small_disk):
    """Killed as it begins its last checkpoint, the run then has room for a line of its log, not for that checkpoint."""
    (whole, operations), words = undisturbed, f"out={small_disk / 'run'}"
    first, _ = codes(pair(server, data, tmp_path / "a", words, folder=str(small_disk / "run"), die_at=operations - 12))
    assert first == -signal.SIGKILL
    with (small_disk / "ballast").open("wb", buffering=0) as ballast:
        with pytest.raises(OSError):
            while True:
                ballast.write(bytes(2**12))
        ballast.truncate(ballast.tell() - 2**16)
    assert codes(pair(server, data, tmp_path / "b", words)) == [2, 2]
    for log in ("b0", "b1"):
        last = (tmp_path / log).read_text().splitlines()[-1]
        assert "step_5: cannot be written" in last and "No space left on device" in last, last
    (small_disk / "ballast").unlink()
    assert codes(pair(server, data, tmp_path / "c", words)) == [0, 0], (tmp_path / "c0").read_text()
    assert_same_runs(whole, small_disk / "run")


def test_a_shard_that_does_not_divide_the_ranks_is_one_line(monkeypatch, capsys):
    import lora

    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    exits(capsys, lambda: lora.shard(None, runtime.Settings(shard=3), torch.device("cpu")), "shard is 3", "8 processes")
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    assert lora.shard("model", runtime.Settings(shard=3), torch.device("cpu")) == "model"


# --------------------------------------------------------------------------------------------- profile

def test_profile_writes_a_trace_and_says_where_the_time_went(files, checkpoint, capsys):
    script, config, _ = planned("sft", files, checkpoint, "profiled")
    run(script, config | {"profile": True, "max_steps": 5, "eval_every": 0}, 0)
    said = capsys.readouterr().out.splitlines()
    (first,) = [i for i, line in enumerate(said) if line.startswith("profile: a step takes")]
    shares = [float(line.split()[0]) for line in said[first + 1 : first + 11]]
    assert shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 101
    events = json.loads((files / "profiled" / "trace.json").read_text())["traceEvents"]
    assert any("addmm" in event.get("name", "") or "mm" in event.get("name", "") for event in events)
    run(script, config | {"max_steps": 2, "out": str(files / "plain")}, 0)
    assert not (files / "plain" / "trace.json").exists() and "profile:" not in capsys.readouterr().out
