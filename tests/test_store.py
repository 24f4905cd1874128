"""Trees of whole files: the same whether made here or by workers, kept or not, and never half a cache."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import BASE, ROOT, exits, metrics_of, write_jsonl
from test_dpo import pairs_file
from test_pack import random_tree
from test_sft import demos

import dpo
import sft
from data import store
from data.records import check_prompt
from data.store import Trees, cache_key, flatten, load_prompts, load_trees
from data.tokenizer import TemplateError, Tokenizer, load_tokenizer
from data.trees import Tree, trees_of


@pytest.fixture
def large(monkeypatch):
    """Ten records are a large file: read by workers, four trees at a time, and kept."""
    monkeypatch.setattr(store, "SMALL", 10)
    monkeypatch.setattr(store, "SLICE", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


@pytest.fixture
def tokenizer():
    found = load_tokenizer(BASE)
    found.adopt("zephyr")
    return found


def same(a: Tree, b: Tree) -> bool:
    arrays = zip([a.trunk, *(leaf for _, leaf in a.leaves)], [b.trunk, *(leaf for _, leaf in b.leaves)], strict=True)
    return (all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in arrays) and a.responses == b.responses
            and [prefix for prefix, _ in a.leaves] == [prefix for prefix, _ in b.leaves] and a.record == b.record)


# --------------------------------------------------------------------------------------- flat arrays

def test_flat_trees_are_the_trees_they_were_made_of():
    trees = [random_tree(random.Random(seed), seed) for seed in range(20)]
    flat = Trees(*flatten(trees), {})
    assert len(flat) == 20 and all(map(same, flat, trees))
    assert same(flat[-1], trees[-1]) and same(flat[np.int64(3)], trees[3]) and len(flat[5:9]) == 4
    assert same(flat.of_record(7), trees[7])
    with pytest.raises(IndexError):
        flat[20]
    backwards = flat.take(np.arange(20)[::-1])
    assert all(map(same, backwards, trees[::-1])) and backwards.digest != flat.digest


# ---------------------------------------------------------------------- made by workers, kept on disk

def test_a_large_file_gives_the_trees_of_a_small_one_and_is_read_at_the_next_start(
        tokenizer, tmp_path, monkeypatch, capsys, large):
    file = str(demos(tmp_path / "sft.jsonl", 60))
    made = load_trees(file, tokenizer, 40, sft.replies, cache=str(tmp_path / "cache"))
    assert "tokenized in" in capsys.readouterr().out
    monkeypatch.setattr(store, "make_trees", None)  # nothing is made again
    kept = load_trees(file, tokenizer, 40, sft.replies, cache=str(tmp_path / "cache"))
    assert "its tokens are read from" in capsys.readouterr().out
    monkeypatch.undo()
    small = load_trees(file, tokenizer, 40, sft.replies, cache=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists() and len(list((tmp_path / "cache").iterdir())) == 1
    assert made.digest == kept.digest == small.digest and made.counts == kept.counts == small.counts
    assert len(small) > 50 and all(map(same, small, made)) and all(map(same, small, kept))


@pytest.mark.parametrize("order", ["as rated", "shuffled into each other"])
def test_dialogues_rated_at_several_turns_are_joined_in_a_large_file(order, tokenizer, tmp_path, large):
    file = pairs_file(tmp_path / "pairs.jsonl", 60, turns=4)
    records = [json.loads(line) for line in file.open()]
    if order != "as rated":  # all first turns, then all second ones, and so on
        records.sort(key=lambda record: len(record["prompt"]))
        write_jsonl(file, records)
    expected = trees_of(records, "preference", tokenizer)
    found = load_trees(str(file), tokenizer, cache=str(tmp_path / "cache"))
    assert all(map(same, found, expected)) and len(found) == len(expected) < 60
    again = load_trees(str(file), tokenizer, cache=str(tmp_path / "cache"))
    assert again.digest == found.digest == Trees(*flatten(expected), {}).digest


def test_all_that_decides_the_tokens_is_in_the_key(tokenizer, tmp_path):
    file, other = demos(tmp_path / "a.jsonl", 3), demos(tmp_path / "b.jsonl", 3, seed=1)
    job = store.Job(tokenizer, 512, sft.replies, [], False)
    chatml = load_tokenizer(BASE)
    chatml.adopt("chatml")
    said = [{"role": "user", "content": "Hi"}]
    keys = [cache_key(str(path), job._replace(**changes), columns) for path, changes, columns in (
        (file, {}, None), (other, {}, None), (file, {"tokenizer": chatml}, None), (file, {"max_length": 511}, None),
        (file, {"keep": sft.every_token}, None), (file, {"keep": None}, None), (file, {"before": said}, None),
        (file, {"prompts": True}, None), (file, {"labels": True}, None),
        (file, {}, {"prompt": "question"}))]
    assert len(set(keys)) == len(keys)
    assert cache_key(str(file), job, None) == keys[0]


def test_a_run_is_the_same_bit_for_bit_with_and_without_a_cache(checkpoint, tmp_path, monkeypatch, large):
    """Stopped after two of four steps and gone on with from the cache; DPO's reference is in it too."""
    from runtime import StopRequest

    file = str(pairs_file(tmp_path / "pairs.jsonl", 40, turns=2))

    def run(name, **changes):
        dpo.main(dpo.Config(**{
            "model": str(checkpoint), "data": file, "eval_data": file, "out": str(tmp_path / name), "batch": 4,
            "max_steps": 4, "template": "zephyr", "dtype": "float32", "device": "cpu", "samples": 0,
            "cache": str(tmp_path / "cache")} | changes))

    run("straight", cache="")
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: len(metrics_of(tmp_path / "parts")) == 2)
    run("parts")
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: False)
    monkeypatch.setattr(store, "make_trees", None)
    run("parts")
    straight, parts = metrics_of(tmp_path / "straight"), metrics_of(tmp_path / "parts")
    assert straight == parts and len(parts) == 4


# --------------------------------------------------------------------------------------------- faults

def test_a_bad_record_in_a_large_file_is_one_line_and_leaves_no_cache(tokenizer, tmp_path, capsys, large):
    file = demos(tmp_path / "sft.jsonl", 30)
    file.write_text(file.read_text() + '{"messages": 1}\n')
    exits(capsys, lambda: load_trees(str(file), tokenizer, cache=str(tmp_path / "cache")), "sft.jsonl line 31:")
    assert not list((tmp_path / "cache").glob("[!.]*"))


@pytest.mark.parametrize("count", [3, 30])
def test_a_record_that_the_template_cannot_render_is_one_line_with_its_number(
        count, tokenizer, tmp_path, capsys, monkeypatch, large):
    file, plain = demos(tmp_path / "sft.jsonl", count), Tokenizer.paths
    messages = [{"role": "user", "content": "Never this."}, {"role": "assistant", "content": "No."}]
    file.write_text(file.read_text() + 2 * (json.dumps({"messages": messages}) + "\n"))

    def paths(self, messages, *rest):
        if messages[0]["content"] == "Never this.":
            raise TemplateError("it says that roles must alternate: mend the roles")
        return plain(self, messages, *rest)

    monkeypatch.setattr(Tokenizer, "paths", paths)
    exits(capsys, lambda: load_trees(str(file), tokenizer, cache=str(tmp_path / "cache")),
          f"sft.jsonl record {count + 1}: it says that roles must alternate: mend the roles")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_cache_is_whole_or_not_there(tokenizer, tmp_path, monkeypatch, capsys, large):
    """What an interrupted or killed run has begun does not count; a damaged one is refused in one line."""
    file, cache = str(demos(tmp_path / "sft.jsonl", 30)), tmp_path / "cache"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trees, "save", interrupted)
        load_trees(file, tokenizer, cache=str(cache))
    assert not list(cache.iterdir())
    (cache / f".{cache_key(file, store.Job(tokenizer, store.NO_LIMIT, None, [], False), None)}.new").mkdir()
    load_trees(file, tokenizer, cache=str(cache))
    (folder,) = cache.iterdir()
    with (folder / "tokens.bin").open("r+b") as tokens:
        tokens.truncate(100)
    exits(capsys, lambda: load_trees(file, tokenizer, cache=str(cache)), f"{folder}: is no cache of tokens",
          "delete it")


def test_a_disk_without_room_for_the_cache_is_one_line(tokenizer, small_disk, tmp_path, capsys, large):
    file, cache = str(demos(tmp_path / "sft.jsonl", 30)), small_disk / "cache"
    with (small_disk / "full").open("wb") as rest:
        try:
            while True:
                rest.write(bytes(2**16))
                rest.flush()
        except OSError:
            pass
    exits(capsys, lambda: load_trees(file, tokenizer, cache=str(cache)), "cannot be written", "No space left")


START = """
import sys, time
sys.path.insert(0, {root!r})
from data import store
from data.tokenizer import load_tokenizer
store.SMALL, store.SLICE = 10, 4
plain = store.make_part
def slow(*rest):
    time.sleep({pause})
    return plain(*rest)
store.make_part = slow
tokenizer = load_tokenizer({base!r})
tokenizer.adopt("zephyr")
print(store.load_trees({file!r}, tokenizer, cache={cache!r}).digest)
"""


def start(tmp_path, pause) -> subprocess.Popen:
    code = START.format(root=str(ROOT), base=str(BASE), file=str(tmp_path / "sft.jsonl"), pause=pause,
                        cache=str(tmp_path / "cache"))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_runs_that_start_together_make_one_cache(tokenizer, tmp_path):
    demos(tmp_path / "sft.jsonl", 40)
    runs = [start(tmp_path, 0.2) for _ in range(2)]
    digests = {run.communicate(timeout=60)[0].split()[-1] for run in runs}
    assert [run.returncode for run in runs] == [0, 0] and len(list((tmp_path / "cache").iterdir())) == 1
    assert digests == {load_trees(str(tmp_path / "sft.jsonl"), tokenizer).digest}


def children(pid: int) -> list[int]:
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == pid]


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended meanwhile
        return -1


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="one core has no workers")
def test_workers_end_with_the_process_that_they_work_for(tmp_path):
    demos(tmp_path / "sft.jsonl", 40)
    run, deadline = start(tmp_path, 20), time.time() + 60
    try:
        while not (workers := children(run.pid)):
            assert time.time() < deadline and run.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    while any(Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
              for pid in workers):
        assert time.time() < deadline
        time.sleep(0.05)


def test_other_ranks_read_what_rank_0_has_made(tokenizer, tmp_path, monkeypatch, large):
    file, cache = str(demos(tmp_path / "sft.jsonl", 30)), str(tmp_path / "cache")
    made = load_trees(file, tokenizer, cache=cache)
    monkeypatch.setattr(store.distributed, "any_rank", lambda _: False)  # when rank 1 looked, nothing was there
    monkeypatch.setattr(store.distributed, "rank", lambda: 1)
    monkeypatch.setattr(store, "make_trees", None)
    assert load_trees(file, tokenizer, cache=cache).digest == made.digest


# -------------------------------------------------------------------------------------------- prompts

def test_prompts_of_any_format_are_distinct_and_end_where_the_reply_begins(
        tokenizer, tmp_path, capsys, monkeypatch, large):
    plain = [{"prompt": text} for text in ("Hi", "Bye", "Name a tool.", "Hi")]
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you."))]
    rendered = [tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)[0]
                for text in ("Hi", "Bye", "Name a tool.")]
    for repeated in (1, 4):  # a small file, a large one
        file = write_jsonl(tmp_path / "p.jsonl", plain * repeated)
        found = load_prompts(str(file), tokenizer, 100, cache=str(tmp_path / "cache"))
        assert [tree.trunk.tolist() for tree in found] == rendered
    pair = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
    ranking = {"prompt": "Hi", "answers": ["Hello.", "No."], "ranks": [0, 1]}
    for record in (pair, ranking):
        (tree,) = load_prompts(str(write_jsonl(tmp_path / "q.jsonl", [record])), tokenizer, 100)
        assert tree.trunk.tolist() == rendered[0]
    for more in ({}, {"prompt": "Hi", "prompt_id": "1"}):  # UltraChat-200k names a prompt beside its messages
        (tree,) = load_prompts(str(write_jsonl(tmp_path / "m.jsonl", [{"messages": turns} | more])), tokenizer, 100)
        assert tree.trunk.tolist() == tokenizer.render(turns[:3], add_generation_prompt=True)[0]
    exits(capsys, lambda: load_prompts(str(write_jsonl(tmp_path / "p.jsonl", plain)), tokenizer, len(rendered[1])),
          "p.jsonl record 3: the prompt has", "lower max_tokens")
    monkeypatch.setattr("data.trees.prompt_of", lambda *_: check_prompt([]))
    exits(capsys, lambda: load_prompts(str(write_jsonl(tmp_path / "p.jsonl", plain)), tokenizer, 100),
          "p.jsonl record 1: ", "drop")
