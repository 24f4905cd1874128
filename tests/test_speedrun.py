"""The speedrun: what a recipe is given, what makes it void, and what comes onto the board."""
import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import BASE, ROOT, exits

import compare
from benchmarks import speedrun
from data.tiny.world import split

RECIPE = f"""#!/bin/sh
ls "$1" > "$2.saw"
echo "$3 $4" >> "$2.saw"
mkdir -p "$2"
cp -r {BASE} "$2/model"
echo "$4" > "$2/model/note.txt"
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe that copies the base, in a folder of its own; its dialogues are scored without asking it."""
    def score(config, jobs, out):
        ids = [json.loads(line)["id"] for line in Path(config.data).read_text().splitlines()]
        return {"recipe": {job.seed: {name: float(job.seed + i) for i, name in enumerate(ids)} for job in jobs}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "score", score)
    Path("recipe.sh").write_text(RECIPE)
    return tmp_path


def settings(**changes):
    small = {"seeds": 2, "demos": 5, "prompts": 5, "evals": 1, "out": "out", "board": "board.json"}
    return speedrun.Config(**{"recipe": "sh recipe.sh"} | small | changes)


def test_a_recipe_is_given_data_without_test_dialogues_and_its_score_comes_onto_the_board(recipe, capsys):
    """Seeds 0 and 1, dialogues 0 to 9, scores that are their sum: mean 4.5 + 0.5."""
    speedrun.main(settings(what="a copy"))
    for seed in "01":
        saw = Path(f"out/{seed}/run.saw").read_text().split()
        assert saw == ["dev.jsonl", "prompts.jsonl", "sft.jsonl", "sft_dev.jsonl", "300", seed]
    first, second = (Path(f"out/{seed}/data/sft.jsonl").read_text() for seed in "01")
    assert first != second
    (row,) = json.loads(Path("board.json").read_text())["rows"]
    assert row["what"] == "a copy" and row["command"] == "sh recipe.sh" and row["dialogues"] == 10
    assert row["score"]["value"] == 5 and row["by_seed"] == [4.5, 5.5]
    assert row["score"]["low"] < 0 < row["score"]["high"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) and 0 <= max(row["cpu_seconds"]) < 300
    assert "gold score on the test dialogues" in capsys.readouterr().out


def test_the_test_dialogues_are_of_held_out_content_and_drawn_by_the_weights(recipe):
    """Of the test split; the same weights give the same dialogues, others do not."""
    speedrun.main(settings())
    drawn = Path("out/dialogues.jsonl").read_text()
    speedrun.main(settings(out="again"))
    assert Path("again/dialogues.jsonl").read_text() == drawn and not Path("board.json").exists()
    Path("recipe.sh").write_text(RECIPE + 'echo more >> "$2/model/note.txt"\n')
    speedrun.main(settings(out="other"))
    assert Path("other/dialogues.jsonl").read_text() != drawn
    for line in drawn.splitlines():
        record = json.loads(line)
        assert {split(record["category"], turn["item"]) for turn in record["turns"]} == {"test"}


def test_the_score_is_that_of_the_models_replies(recipe, monkeypatch, capsys):
    """The base in the chat template: hardly any points."""
    monkeypatch.undo()
    monkeypatch.chdir(recipe)
    speedrun.main(settings())
    mean = float(re.search(r"gold score on the test dialogues: (\S+) \[", capsys.readouterr().out)[1])
    assert 0 < mean < 20


def test_trying_is_done_on_the_dev_dialogues(recipe, capsys):
    speedrun.main(settings(dev=True, seeds=1))
    ids = [json.loads(line)["id"] for line in Path("out/dialogues.jsonl").read_text().splitlines()]
    assert all(name.startswith("dev-") for name in ids) and "on the dev dialogues" in capsys.readouterr().out
    exits(capsys, lambda: settings(dev=True, what="x"), "the board is for the test dialogues")


def test_the_board_is_sorted_by_score(recipe):
    better = {"what": "better", "score": {"value": 99.0}}
    Path("board.json").write_text(json.dumps({"rows": [{"what": "worse", "score": {"value": -1.0}}, better]}))
    speedrun.main(settings(what="a copy", seeds=2))
    assert [row["what"] for row in json.loads(Path("board.json").read_text())["rows"]] == ["better", "a copy", "worse"]


def test_more_cpu_time_than_the_budget_is_void_whichever_process_takes_it(recipe, capsys):
    busy = 'import time\\nwhile time.process_time() < 0.8: pass'
    for line in (f'python -c "$(printf \'{busy}\')"', f'sh -c \'python -c "$(printf "{busy}")"; true\''):
        Path("recipe.sh").write_text(f"{RECIPE}{line}\n{line}\n")
        out = f"out{len(line)}"
        exits(capsys, lambda out=out: speedrun.main(settings(seconds=1, what="x", out=out)),
              "seed 0: void, the recipe took", "CPU seconds of 1: make it shorter")
    assert not Path("board.json").exists()


def test_a_recipe_that_waits_takes_no_cpu_time(recipe):
    Path("recipe.sh").write_text(f"{RECIPE}sleep 1.5\n")
    speedrun.main(settings(seconds=1, seeds=1))


def test_a_recipe_that_fails_or_leaves_no_model_is_void(recipe, capsys):
    for number, (text, said) in enumerate(((RECIPE + "exit 3\n", "ended with code 3 and a model"),
                                           ("true\n", "ended with code 0 and no model"))):
        Path("recipe.sh").write_text(text)
        exits(capsys, lambda number=number: speedrun.main(settings(out=f"out{number}")), "seed 0: void", said)


def test_a_recipe_that_names_test_data_is_refused_before_it_runs(recipe, capsys):
    Path("recipe.sh").write_text("cat runs/tiny/0/data/test.jsonl\n")
    exits(capsys, lambda: speedrun.main(settings()), "recipe.sh names test.jsonl", "train on DATA")
    Path("recipe.py").write_text('dialogue(rng, "test")\n')
    exits(capsys, lambda: speedrun.main(settings(recipe="python recipe.py")), 'names "test"')
    exits(capsys, lambda: speedrun.main(settings(recipe="sh my.sh data/test.jsonl")), "names test.jsonl")
    assert not list(Path("out").glob("*"))


def test_a_used_folder_or_a_command_that_is_not_there_is_one_line(recipe, capsys):
    exits(capsys, lambda: speedrun.main(settings(recipe="no-such-command")), "'no-such-command' cannot be run")
    Path("used").mkdir()
    Path("used/file").touch()
    exits(capsys, lambda: speedrun.main(settings(out="used")), "used: is not empty")


def test_make_hands_the_recipe_on(tmp_path):
    command = ["make", "-n", "--no-print-directory", "-f", str(ROOT / "Makefile"), "PYTHON=python", "speedrun"]

    def says(*words: str) -> str:
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "recipe='sh benchmarks/speedrun.sh' what='' \\\n\tdev=false" in says()
    assert "recipe='python my.py' what='' \\\n\tdev=true" in says("RECIPE=python my.py", "DEV=1")
    board = says("RECIPE=python my.py", "WHAT=PPO, longer")
    assert "what='PPO, longer'" in board and board.rstrip().endswith("python -m benchmarks.results")


def test_the_shipped_recipe_passes_the_check_and_leads_the_board():
    speedrun.refuse_test_data(["sh", str(ROOT / "benchmarks" / "speedrun.sh")])
    rows = json.loads((ROOT / "benchmarks" / "results" / "speedrun.json").read_text())["rows"]
    shipped = next(row for row in rows if row["command"] == speedrun.Config.recipe)
    assert max(shipped["cpu_seconds"]) <= shipped["budget"] == 300 and len(shipped["by_seed"]) == 3
