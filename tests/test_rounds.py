"""collect/rounds.py: what a round leaves behind, how it goes on after a stop, people's rounds, and the table."""
import contextlib
import importlib
import json
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import BASE, exits, write_jsonl
from scripted import Scripted
from starlette.testclient import TestClient

import runtime
import sft
from collect import annotate, rounds
from collect.rounds import Config, lines, load_prompts, main, table
from data.formats import read
from data.llm import open_model
from data.tiny import build
from judging import recorded


@pytest.fixture(autouse=True)
def _one_thread(_same_everywhere):
    torch.set_num_threads(1)  # models this small only wait for a second one


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny world's data, a policy that has learnt to end its replies, and settings of one update."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    build.write_data(build.Config(part="data", demos=300, prompts=10, more_prompts=60, evals=1), folder)
    write_jsonl(folder / "dev.jsonl", lines(folder / "dev.jsonl")[:3])
    sft.main(sft.Config(model=str(BASE), data=str(folder / "sft.jsonl"), out=str(folder / "sft"), template="zephyr",
                        max_steps=7, batch=10,
                        lr=3e-3, samples=0, device="cpu", threads=1))
    (folder / "dpo.toml").write_text("beta = 0.3\nmax_steps = 1\n")
    (folder / "reward.toml").write_text("lr = 1e-3\nmax_steps = 1\n")
    return folder


def in_process(command: list[str]) -> int:
    """A script by its own main: to start one takes longer than all it has to do here."""
    script = importlib.import_module(Path(command[1]).stem)
    script.main(runtime.load_config(script.Config, script.__doc__, command[2:]))
    return 0


@pytest.fixture
def commands(monkeypatch) -> list[str]:
    """The scripts that were run, in this process."""
    ran: list[str] = []
    monkeypatch.setattr(rounds, "execute", lambda command: ran.append(Path(command[1]).name) or in_process(command))
    return ran


def config(world: Path, out: Path, **changes) -> Config:
    return Config(**{"model": str(world / "sft/model"), "out": str(out), "rounds": 2,
                     "prompts": str(world / "more_prompts.jsonl"),
                     "prompts_per_round": 12, "dev": str(world / "dev.jsonl"), "max_tokens": 24,
                     "dpo": str(world / "dpo.toml"),
                     "reward": str(world / "reward.toml"), "device": "cpu", "threads": 1} | changes)


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> Path:
    """One round, and then another."""
    out = tmp_path_factory.mktemp("rounds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "execute", in_process)
        main(config(world, out, rounds=1))
        main(config(world, out))
    return out


# ---------------------------------------------------------------------------------------- a round

def test_each_policy_answers_fresh_prompts_and_the_next_one_starts_from_it(world, done):
    first, second = done / "round_1", done / "round_2"
    pool = [d["id"] for d in lines(world / "more_prompts.jsonl")]
    assert [d["id"] for d in lines(first / "prompts.jsonl") + lines(second / "prompts.jsonl")] == pool[:24]
    for folder, policy in ((first, world / "sft/model"), (second, first / "dpo/model")):
        assert {r["model"] for r in lines(folder / "replies.jsonl")} == {open_model(str(policy), "cpu").name}
        trained, rewarded = (tomllib.loads((folder / name / "config.toml").read_text()) for name in ("dpo", "reward"))
        assert trained["model"] == str(policy) and trained["ref_model"] == ""
        assert trained["data"] == str(folder / "train.jsonl")
        assert rewarded["model"] == str(world / "sft/model") and rewarded["eval_data"] == str(folder / "heldout.jsonl")
        assert (trained["beta"], rewarded["lr"], trained["max_steps"]) == (0.3, 1e-3, 1)  # as the two files say
    assert lines(second / "reward_data.jsonl") == lines(first / "train.jsonl") + lines(second / "train.jsonl")


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_s_line_is_what_its_files_say(done, number):
    folder = done / f"round_{number}"
    votes, train, held_out = (lines(folder / f"{name}.jsonl") for name in ("votes", "train", "heldout"))
    assert held_out and sorted(v["id"] for v in train + held_out) == sorted(v["id"] for v in votes)
    assert not {v["dialogue"] for v in train} & {v["dialogue"] for v in held_out}
    records, found = read(folder / "votes.jsonl")
    assert len(list(records)) == len(votes) and found.format == "preference" and not found.rejects
    ratings = recorded.read(folder / "votes.ratings.jsonl")
    assert ratings.format == "likert" and not ratings.rejects
    assert {row["judge"] for row in ratings.games} == {"a1", "a2"}
    said: dict[str, dict] = {}
    for r in lines(folder / "votes.ratings.jsonl"):
        said.setdefault(r["id"], {})[r["annotator"]] = r["choice"]
    row = json.loads((folder / "round.json").read_text())
    assert (row["preferences"], row["reward_pairs"], row["policy"]) == (len(votes), len(held_out),
                                                                        str(folder / "dpo/model"))
    assert sum(u["a1"] is not None for u in said.values()) == len(votes)
    assert row["agreement"]["n"] == len(said)
    assert row["agreement"]["raw"] == pytest.approx(sum(u["a1"] == u["a2"] for u in said.values()) / len(said))
    assert row["reward_accuracy"] == json.loads((folder / "reward/report.json").read_text())["reward_model"]["accuracy"]
    graded = json.loads((folder / "gold/report.json").read_text())["gold"]["policy"]
    assert row["gold"] == graded["gold"] and graded["n"] >= 3


def test_the_reply_that_was_chosen_goes_on(done):
    seen = 0
    for folder in (done / "round_1", done / "round_2"):
        chosen = {(v["dialogue"], v["turn"]): v["chosen"] for v in lines(folder / "votes.jsonl")}
        users = {d["id"]: [turn["user"] for turn in d["turns"]] for d in lines(folder / "prompts.jsonl")}
        for rating in lines(folder / "votes.ratings.jsonl"):
            assert [m["content"] for m in rating["messages"]
                    if m["role"] == "user"] == users[rating["prompt"]][: rating["turn"]]
            if (rating["prompt"], rating["turn"] - 1) in chosen:
                seen += 1
                assert rating["messages"][-2]["content"] == chosen[rating["prompt"], rating["turn"] - 1]
    assert seen > 2


# ------------------------------------------------------------------------------------------ stops

def test_what_is_done_is_not_done_again(world, done, commands, capsys):
    report = (done / "report.json").read_text()
    main(config(world, done))
    assert commands == [] and (done / "report.json").read_text() == report
    table = json.loads(report)["sections"][0]
    said = capsys.readouterr().out
    assert [row[0] for row in table["rows"]] == [0, 1, 2] and f"{table['rows'][2][1]['value']:.1f}" in said
    assert f"newest policy: {done / 'round_2/dpo/model'}" in said


class Stopped(BaseException):
    pass


def test_stopped_before_every_file_it_comes_to_the_same_files(world, done, tmp_path, monkeypatch):
    """A life makes one new file or runs one script; the one that asks for replies leaves half of them."""
    def one_new(act):
        def acts(target, *rest):
            if str(target) not in made:
                if len(made) == lives[-1]:
                    raise Stopped
                made.append(str(target))
            return act(target, *rest)

        return acts

    monkeypatch.setattr(rounds, "write_lines", one_new(rounds.write_lines))
    monkeypatch.setattr(rounds, "execute", one_new(in_process))
    folder, made, lives = tmp_path / "round_1", [], []
    ledger = folder / "replies.jsonl"
    while len(lives) < 10:
        assert not (folder / "round.json").exists()
        lives.append(len(lives) + 1)
        asked = ledger.exists()
        with contextlib.suppress(Stopped):
            main(config(world, tmp_path, rounds=1))
        if ledger.exists() and not asked:
            ledger.write_bytes(ledger.read_bytes()[: ledger.stat().st_size // 2])
    assert len(made) == 10 and (folder / "round.json").exists()
    for name in ("prompts.jsonl", "votes.jsonl", "votes.ratings.jsonl", "train.jsonl", "heldout.jsonl",
                 "reward_data.jsonl",
                 "reward/model/model.safetensors", "dpo/model/model.safetensors"):
        assert (folder / name).read_bytes() == (done / "round_1" / name).read_bytes(), name
    ours, theirs = (json.loads((out / "round_1/round.json").read_text()) for out in (tmp_path, done))
    assert ours | {"policy": ""} == theirs | {"policy": ""}


def test_a_script_that_ends_early_ends_the_round(world, tmp_path, monkeypatch, capsys):
    for code in (0, 1):  # stopped by Ctrl-C a script leaves with 0, and without its file
        monkeypatch.setattr(rounds, "execute", lambda command, code=code: code)
        exits(capsys, lambda: main(config(world, tmp_path)), "judge.py ended before", "run the same command again")
    monkeypatch.setattr(rounds, "execute", lambda command: print("its one line", file=sys.stderr) or 2)
    exits(capsys, lambda: main(config(world, tmp_path)), "its one line")


def test_ctrl_c_is_left_to_the_script(monkeypatch):
    class Script:
        def __init__(self, command):
            self.waits = iter((KeyboardInterrupt, 0))

        def wait(self):
            said = next(self.waits)
            if said is KeyboardInterrupt:
                raise said
            return said

    assert rounds.execute([sys.executable, "-S", "-c", "raise SystemExit(3)"]) == 3
    monkeypatch.setattr(rounds.subprocess, "Popen", Script)
    assert rounds.execute(["dpo.py"]) == 0


# ----------------------------------------------------------------------------------------- people

def rate(page: TestClient, name: str, better: set[str]) -> dict:
    """Send what is offered to begin with; choose the right reply if it is among the better, else the left one. What was
    rated.
    """
    state = page.get("/state", params={"annotator": name}).json()
    while state["item"] is None:
        state = page.post("/say", json={"annotator": name, "dialogue": state["dialogue"], "turn": 1,
                                        "text": state["opening"]["text"],
                                        "category": state["opening"]["category"]}).json()
    item = state["item"]
    answer = {"choice": None, "margin": None, "flag": "skip"}
    if not item["same"]:
        answer = {"choice": "right" if item["replies"][1]["text"] in better else "left", "margin": 2, "flag": None}
    after = page.post("/answer", json={"annotator": name, "id": item["id"], **answer}).json()
    if after["messages"]:
        page.post("/next", json={"annotator": name, "dialogue": after["dialogue"]})
    return item


def test_people_s_round_is_what_they_rated_on_the_page(world, tmp_path, commands, capsys):
    """The command it prints is the page's; two people rate a shared pair, and choose the same reply whichever side it
    is on.
    """
    settings, folder = config(world, tmp_path, dev="", annotators="people", votes=6, shared=8,
                              prompts_per_round=20), tmp_path / "round_1"
    main(settings)
    said = capsys.readouterr().out
    (command,) = [line.strip() for line in said.splitlines() if "collect.annotate" in line]
    shared = lines(folder / "shared.jsonl")
    assert "0 of 6 preferences" in said and f"{len(shared)} pairs for everybody" in said and commands == [] and shared
    pool = [d["turns"][0]["user"] for d in lines(world / "more_prompts.jsonl")[:20]]
    assert {s["prompt"][0]["content"] for s in shared} <= set(pool[:8])
    assert [p["prompt"][0]["content"] for p in lines(folder / "prompts.jsonl")] == pool[8:]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "collect.annotate"]
    server = annotate.Server(runtime.load_config(annotate.Config, "", [*words[3:], "device=cpu"]))
    assert server.models[0][1].name == open_model(str(world / "sft/model"), "cpu").name
    votes, seen = folder / "votes.jsonl", []
    with TestClient(server.app(), base_url="http://localhost") as page:
        while len(lines(votes)) < 6:
            seen += [rate(page, name, {pair["replies"][0] for pair in shared})["shared"] for name in ("Ann", "Bob")]
            assert len(seen) < 20
    assert seen[:4] == [True, True, False, False]
    server.votes.stream.close()
    main(settings)
    said = capsys.readouterr().out
    row = json.loads((folder / "round.json").read_text())
    assert row["served"] == str(world / "sft/model") and row["preferences"] == len(lines(votes)) and "gold" not in row
    assert (row["agreement"]["n"], row["agreement"]["raw"], row["agreement"]["raters"]) == (sum(seen) // 2, 1.0, 2)
    assert commands == ["reward.py", "dpo.py"]
    assert "round 2 has 0 of 6 preferences" in said and json.dumps([row["policy"]]) in said


def test_shared_pairs_are_two_whole_and_different_replies(world, tmp_path, monkeypatch, capsys):
    """Of four prompts one gets the same reply twice, one a reply that was cut, one none."""
    said = {"fine": ["A.", "B."], "same": ["A.", "A. "], "cut": ["A.", ("B", False)], "failed": [None, "B."]}
    monkeypatch.setattr(rounds, "open_model",
                        lambda *_: Scripted(lambda request, _: said[request.messages[0]["content"]][request.repeat]))
    rounds.write_shared("", [{"prompt": [{"role": "user", "content": name}]} for name in said], tmp_path,
                        config(world, tmp_path))
    prompt = [{"role": "user", "content": "fine"}]
    assert lines(tmp_path / "shared.jsonl") == [{"id": "1", "prompt": prompt, "replies": ["A.", "B."],
                                                 "category": "none"}]
    assert "1 pairs for everybody; the other 3" in capsys.readouterr().out


def test_preferences_from_elsewhere_will_do(world, done, tmp_path, commands, capsys):
    """As data/records.py has them, without dialogues or ratings; what is wrong with one is said, also that there are
    too few.
    """
    folder = tmp_path / "round_1"
    votes = [{key: vote[key] for key in ("prompt", "chosen", "rejected")}
             for vote in lines(done / "round_1/votes.jsonl")]
    settings = config(world, tmp_path, rounds=1, dev="", annotators="people", votes=len(votes), shared=0)
    main(settings)
    assert not (folder / "shared.jsonl").exists() and "shared=" not in capsys.readouterr().out
    write_jsonl(folder / "votes.jsonl", [votes[0] | {"chosen": ""}, *votes[1:]])
    exits(capsys, lambda: main(settings), "votes.jsonl line 1", "'chosen' is empty")
    write_jsonl(folder / "votes.jsonl", votes[:1] * len(votes))
    exits(capsys, lambda: main(settings), "votes.jsonl", "holds 1 dialogues, expected five")
    write_jsonl(folder / "votes.jsonl", votes)
    main(settings)
    row = json.loads((folder / "round.json").read_text())
    assert row["agreement"] is None and row["preferences"] == len(votes)
    beginnings = [{v["prompt"][0]["content"] for v in lines(folder / f"{name}.jsonl")} for name in ("train", "heldout")]
    assert beginnings[1] and not beginnings[0] & beginnings[1]


# --------------------------------------------------------------------------------- table, settings

def test_the_table_by_hand():
    """Gold 60 +- 2.5 is 57.5 to 62.5; what was not measured is empty."""
    agreed = {"raw": 0.75, "n": 40, "kappa": 0.5, "decided": 0.9}
    rows = [{"round": 0, "policy": "sft"},
            {"round": 1, "policy": "dpo", "gold": 60.0, "gold_interval": 2.5, "words": 7.5, "preferences": 30,
             "agreement": agreed,
             "reward_accuracy": 0.8, "reward_pairs": 10}]
    found = table(rows)["rows"]
    assert found[0] == [0, *[None] * 9]
    assert found[1] == [1, {"value": 60.0, "low": 57.5, "high": 62.5}, 7.5, 30, 75.0, 40, 0.5, 90.0, 80.0, 10]


def test_what_is_wrong_is_said_before_anything_runs(world, tmp_path, commands, capsys):
    exits(capsys, lambda: config(world, tmp_path, model=str(world)), f"model={world}: holds no config.json")
    exits(capsys, lambda: config(world, tmp_path, prompts="no.jsonl"), "prompts=no.jsonl: no such file")
    exits(capsys, lambda: config(world, tmp_path, dpo="no.toml"), "dpo=no.toml: no such file")
    exits(capsys, lambda: config(world, tmp_path, rounds=0), "rounds is 0")
    exits(capsys, lambda: config(world, tmp_path, annotators="people"), "shared=20 leaves none of prompts_per_round=12")
    exits(capsys, lambda: config(world, tmp_path, prompts_per_round=21, rounds=3), "holds 60 prompts", "3 rounds of 21")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "Hello"}\n' * 19 + '{"prompt": "He\n')
    settings = {"annotators": "people", "dev": "", "shared": 0}
    exits(capsys, lambda: config(world, tmp_path / "c", prompts=str(tmp_path / "broken.jsonl"), rounds=1,
                                 prompts_per_round=20, **settings), "broken.jsonl line 20", "'prompt' or 'turns'")
    hello = '\ufeff{"prompt": "Hello"}\n\n' + '{"prompt": "Hi"}\n\n' * 19
    (tmp_path / "gaps.jsonl").write_text(hello, encoding="utf-8")
    gaps = config(world, tmp_path / "g", prompts=str(tmp_path / "gaps.jsonl"), rounds=1, prompts_per_round=20,
                  **settings)
    assert [p["prompt"][0]["content"] for p in load_prompts(gaps)] == ["Hello", *["Hi"] * 19]
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Hello"}] * 20)
    strangers = {"prompts": str(tmp_path / "other.jsonl"), "rounds": 1, "dev": ""}
    exits(capsys, lambda: config(world, tmp_path / "a", **strangers), "other.jsonl line 1", "annotators=people")
    main(config(world, tmp_path / "b", **settings))
    main(config(world, tmp_path / "b", **settings, votes=50))  # a round may end earlier than was planned
    assert "0 of 50 preferences" in capsys.readouterr().out
    exits(capsys, lambda: main(config(world, tmp_path / "b", **settings, seed=1)), "was begun with seed=0, not 1")
    exits(capsys, lambda: main(config(world, tmp_path / "other.jsonl", **settings)), "other.jsonl: cannot be written")
    assert commands == []
