"""One process and two give the same run: the same ten steps, checkpoints that either continues, the same model in the end."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, exits, metrics_of, write_jsonl
from ranks_worker import run
from safetensors.torch import load_file
from test_dpo import pairs_file
from test_sft import demos

import ranks
from data.chat import load_tokenizer
from data.pack import Response, Tree, pack, share
from model import add_score_head, load_model, save_model

COMMON = {"device": "cpu", "dtype": "float32", "threads": 1, "lr": 1e-3, "warmup": 0.2}
LORA = {"lora_rank": 4}
STEPS = 10
# Ten steps of five trees, the last of each epoch of one tree for two ranks; micro-batches of 300 tokens, an evaluation in the middle.
RUNS = {
    "sft": ("sft", {}), "sft_lora": ("sft", LORA), "sft_copies": ("sft", {"shard": 1}),
    "dpo": ("dpo", {}), "dpo_lora": ("dpo", LORA), "reward": ("reward", {}), "reward_lora": ("reward", LORA),
    "ppo": ("ppo", {}), "ppo_lora": ("ppo", LORA),
}
STOPPED = {"stopped_sft": 4, "stopped_reward_lora": 4, "stopped_ppo": 2}


def planned(name: str, folder: Path, checkpoint: Path, out: str) -> list:
    """[script, config, stop_after] of a run into folder/out."""
    script, changes = RUNS[name.removeprefix("stopped_")]
    config = COMMON | {"model": str(checkpoint), "out": str(folder / out)} | changes
    if script == "ppo":
        config |= {"model": str(folder / "policy"), "reward_model": str(folder / "scorer"), "data": str(folder / "prompts.jsonl"),
                   "steps": 5, "batch": 5, "max_tokens": 8, "min_eos": 0.0, "micro_tokens": 60}
    else:
        kind = "sft" if script == "sft" else "pairs"
        config |= {"data": str(folder / f"{kind}.jsonl"), "eval_data": str(folder / f"{kind}_eval.jsonl"), "template": "zephyr",
                   "max_steps": STEPS, "batch": 5, "max_tokens": 300, "eval_every": 5}
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
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"Name {n} cities."} for n in range(9)])
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    tokenizer.adopt("zephyr")
    save_model(model, folder / "policy", tokenizer)
    save_model(add_score_head(model, 0), folder / "scorer", tokenizer)
    return folder


def torchrun(*command: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", "localhost:0", *command]
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def two_ranks(folder: Path, runs: list) -> str:
    """Run them all with two ranks; what they print."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    process = torchrun("tests/ranks_worker.py", str(file))
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def both(files, checkpoint):
    """Every run with one process into one/NAME and with two into two/NAME. Some are stopped on the way, and continued by the other."""
    def plans(where, names):
        return [planned(name, files, checkpoint, f"{where}/{name}") for name in names]

    def continued(where):
        return [[script, config, 0] for script, config, _ in plans(where, STOPPED)]

    for plan in plans("one", [*RUNS, *STOPPED]):
        run(*plan)
    states = {name: [p.name for p in (files / "one" / name / "state").iterdir()] for name in STOPPED}
    said = two_ranks(files, plans("two", [*RUNS, *STOPPED]) + continued("one"))
    states |= {f"two {name}": [p.name for p in (files / "two" / name / "state").iterdir()] for name in STOPPED}
    for plan in continued("two"):
        run(*plan)
    return files, said, states


# ----------------------------------------------------------------------------------------- the same run

LOOSE = {"grad_norm": 2e-5, "policy_grad_norm": 2e-5, "value_grad_norm": 2e-5,  # one large tensor's norm in fp32 against two halves'
         "score_chosen": 2e-5, "score_rejected": 2e-5, "explained_variance": 2e-5}  # nothing holds all scores' mean; small variances


def assert_same_steps(one: Path, two: Path) -> None:
    """Every metric of every step to 1e-6 of itself, or of 1 where it is smaller; those in LOOSE to 2e-5."""
    one, two = metrics_of(one), metrics_of(two)
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert theirs[key] == pytest.approx(ours[key], rel=LOOSE.get(key, 1e-6), abs=LOOSE.get(key, 1e-6)), (ours["step"], key)


def assert_same_model(one: Path, two: Path) -> None:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Adam makes a whole step of a gradient that is 0 but for rounding.
        assert torch.allclose(ours[name], theirs[name], atol=2e-4) and (ours[name] - theirs[name]).abs().mean() < 1e-6, name


@pytest.mark.parametrize("name", RUNS)
def test_one_rank_and_two_take_the_same_steps_to_the_same_model(name, both):
    folder, _, _ = both
    assert_same_steps(folder / "one" / name, folder / "two" / name)
    assert_same_model(folder / "one" / name, folder / "two" / name)


@pytest.mark.parametrize("name", ["stopped_sft", "stopped_reward_lora", "stopped_ppo"])
@pytest.mark.parametrize("first", ["one", "two"])
def test_a_run_goes_on_with_another_number_of_ranks(first, name, both):
    """Stopped after step 4 (PPO: 2) by one rank or two, continued by two or one: the steps of the run that was not stopped.

    With two, the signal has come to the last rank alone.
    """
    folder, _, states = both
    assert states[name if first == "one" else f"two {name}"] == [f"step_{STOPPED[name]}"]
    assert_same_steps(folder / "one" / name.removeprefix("stopped_"), folder / first / name)
    assert_same_model(folder / "one" / name.removeprefix("stopped_"), folder / first / name)


def test_sharded_state_is_safetensors_of_which_no_file_holds_all(both):
    folder, _, _ = both
    files = sorted((folder / "two" / "sft" / "state" / f"step_{STEPS}").iterdir())
    assert len(files) == 2 and all(file.suffix == ".safetensors" for file in files)
    first, second = map(load_file, files)
    for name, whole in load_file(folder / "one" / "sft" / "state" / f"step_{STEPS}" / "state.safetensors").items():
        if name.startswith(("model.", "exp_avg")):
            assert first[name].shape[0] + second[name].shape[0] == whole.shape[0]


def test_only_rank_0_prints_and_writes(both):
    folder, said, _ = both
    assert said.count(f"wrote {folder}/two/sft/model\n") == 1
    lines = (folder / "two" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not [p for p in (folder / "two" / "sft").rglob("*") if p.name.endswith((".new", ".old"))]


# ------------------------------------------------------------------------------------------- the share

@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_every_tree_once_in_as_many_batches_each(world, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 90, (20,), generator=generator).tolist()
    trees = [Tree(torch.arange(n).int().numpy(), [], [Response(0, 1, n)], record=i) for i, n in enumerate(lengths)]
    for count in (20, 9, 2, 1):
        shares = []
        monkeypatch.setattr(ranks, "world", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            shares.append(share(trees[:count], 100))
        assert len({len(batches) for batches in shares}) == 1
        counted = [batch for batches in shares for batch in batches if batch.counts]
        assert sorted(tree.record for batch in counted for tree in batch.trees) == list(range(count))
        assert all(len(batch.tokens) <= 100 for batch in counted)
        if count <= world:
            assert len(counted) == count and all(len(batches) == 1 for batches in shares)


def test_alone_a_rank_has_the_batches_of_pack():
    trees = [Tree(torch.arange(n).int().numpy(), [], [Response(0, 1, n)]) for n in (5, 30, 20, 9)]
    assert [b.tokens.tolist() for b in share(trees, 40)] == [b.tokens.tolist() for b in pack(trees, 40)]


# ----------------------------------------------------------------------------------------- signals, faults

def test_sigterm_to_torchrun_saves_and_every_rank_leaves_with_0(files, checkpoint):
    """torchrun itself reports the signal with code 1; had a rank failed, it would have named it."""
    script, config, _ = planned("sft", files, checkpoint, "stopped")
    file = files / "long.json"
    file.write_text(json.dumps([[script, config | {"max_steps": 100_000, "eval_every": 0}, 0]]))
    process = torchrun("tests/ranks_worker.py", str(file))
    metrics = files / "stopped" / "metrics.jsonl"
    try:
        deadline = time.time() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    steps = len(metrics_of(files / "stopped"))
    assert f"stopped after step {steps}; the same command goes on from there" in out
    assert len(list((files / "stopped" / "state" / f"step_{steps}").glob("*.safetensors"))) == 2
    assert "SIGKILL" not in err and "exitcode" not in err


def test_a_shard_that_does_not_divide_the_ranks_is_one_line(monkeypatch, capsys):
    import lora

    monkeypatch.setattr(ranks, "world", lambda: 8)
    exits(capsys, lambda: lora.shard(None, lora.Options(shard=3), torch.device("cpu")), "shard is 3", "8 processes")


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
