"""exercises/: from the blank every test of an exercise is red, on the function as it is all are green.

With WRITE=1 the counts go to benchmarks/results/exercises.json.
"""
import json
import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import ROOT, exits

from exercises import exercise as script
from exercises.exercise import all_exercises, blank, command_of, find, next_hint, practise, solution

EXERCISES = all_exercises()
RESULTS = ROOT / "benchmarks" / "results" / "exercises.json"


def copies(exercises: list, folder: Path, empty: bool) -> dict[str, Path]:
    """The exercises' modules, each once, with their functions blank or as they are."""
    files = {}
    for module in {exercise.module for exercise in exercises}:
        source, files[module] = (ROOT / module).read_text(), folder / module.replace("/", "-")
        files[module].write_text(blank(source, [e for e in exercises if e.module == module]) if empty else source)
    return files


def failures(exercises: list, files: dict[str, Path], folder: Path) -> dict[int, list[str]]:
    """The exercises' tests run on copies: by exercise, what each test failed with, "" if it passed."""
    report = folder / "report.xml"
    subprocess.run(command_of(exercises, files, f"--junitxml={report}"), cwd=ROOT, capture_output=True, text=True)
    found = {exercise.number: [] for exercise in exercises}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
        for exercise in exercises:
            if any(name == test or name.startswith(f"{test}[") for test in exercise.tests):
                found[exercise.number].append(case[0].get("message") if len(case) else "")
    return found


def test_every_test_is_red_from_the_blank_and_green_with_the_function(tmp_path):
    """Every third exercise is blank at once: so no test meets another's blank, as the messages show."""
    red = {}
    for first in range(3):
        some = EXERCISES[first::3]
        red |= failures(some, copies(some, tmp_path, empty=True), tmp_path)
    green = failures(EXERCISES, copies(EXERCISES, tmp_path, empty=False), tmp_path)
    rows = []
    for exercise in EXERCISES:
        told = [f"exercise {exercise.number}: " in message for message in red[exercise.number]]
        assert told and all(told), red[exercise.number]
        assert green[exercise.number] == [""] * len(told), green[exercise.number]
        rows.append({"exercise": exercise.number, "module": exercise.module, "functions": ", ".join(exercise.functions),
                     "tests": len(told), "red_from_the_blank": sum(told), "green_as_it_is": len(told)})
    if "WRITE" in os.environ:
        command = "WRITE=1 python -m pytest tests/test_exercises.py"
        RESULTS.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.page.stem)
def test_a_page_names_what_exists_and_derives_it_without_giving_it_away(exercise):
    source, page = (ROOT / exercise.module).read_text(), exercise.page.read_text()
    assert all(find(source, name).body for name in exercise.functions) and len(exercise.hints) >= 3
    assert exercise.title.startswith(f"{exercise.number}. ") and "\n## Write\n" in page
    for test in exercise.tests:
        file, name = test.split("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()
    derivation = page.partition("\n# ")[2].partition("\n## Write\n")[0]
    assert 15 <= derivation.count("\n") <= 45
    body = blank(source, [exercise]).splitlines()
    given_away = [line for line in map(str.strip, source.splitlines())
                  if len(line) > 30 and line in page and line not in map(str.strip, body)]
    assert not given_away


def test_exercises_are_numbered_from_1_to_12():
    assert [exercise.number for exercise in EXERCISES] == list(range(1, 13))


def test_a_blank_function_keeps_signature_and_docstring_and_the_rest_of_the_module():
    exercise = EXERCISES[2]._replace(functions=["twice"])
    source = 'A = 1\n\n\ndef twice(x):\n    """Two x."""\n    # by adding\n    return x + x\n\n\nB = 2\n'
    assert blank(source, [exercise]) == source.replace(
        "    # by adding\n    return x + x", '    raise NotImplementedError("exercise 3: twice is not written yet")')


def test_a_reader_goes_from_red_to_green(tmp_path, monkeypatch, capfd):
    """What another part of the copy says is told, too; hints come one after the other, and the last one stays."""
    monkeypatch.setattr(script, "WORK", tmp_path)
    exercise = EXERCISES[1]
    assert practise(exercise, anew=False) == 1
    said = capfd.readouterr().out
    assert "4 failed" in said and "exercise 2: red" in said and "differs" not in said
    source = (ROOT / exercise.module).read_text()
    exercise.copy.write_text(source.replace("epochs: int = 3", "epochs: int = 4"))
    assert practise(exercise, anew=False) == 0
    said = capfd.readouterr().out
    assert "4 passed" in said and "exercise 2: green" in said and "differs from sft.py outside of sft_loss" in said
    shown = [next_hint(exercise) for _ in range(len(exercise.hints) + 1)]
    assert [int(re.match(r"Hint (\d)", hint)[1]) for hint in shown] == [1, 2, 3, 3]
    assert solution(exercise).startswith("def sft_loss(") and solution(exercise) in source


def test_a_number_that_is_no_exercise_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["exercise", "13"])
    exits(capsys, script.main, "13 is no exercise")
