"""Exercises: write one of the project's functions yourself, and let the project's own tests judge it.

The commands are in exercises/README.md. A page such as 03_dpo_loss.md derives what is to be written; its first lines
name module, functions and tests. The copy lies in exercises/work, which git ignores. There is no other solution than
the code, so none can be out of date.

Tests meet the copy through a pytest plugin, this file: `--copy dpo=FILE` imports FILE wherever `dpo` is imported.
"""
import argparse
import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from runtime import arguments, fail

FOLDER = Path(__file__).parent
ROOT, WORK = FOLDER.parent, FOLDER / "work"


class Exercise(NamedTuple):
    number: int
    title: str
    page: Path
    module: str           # file of the repository
    functions: list[str]  # whose bodies the reader writes
    tests: list[str]      # pytest's names of tests
    hints: list[str]      # in order

    @property
    def copy(self) -> Path:
        return WORK / self.page.stem / self.module


def read_page(page: Path) -> Exercise:
    """An exercise, of its page: `key: value` lines between two ---, a title, and hints folded away one by one."""
    head, _, body = page.read_text().removeprefix("---\n").partition("\n---\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    hints = re.findall(r"<details><summary>Hint \d</summary>\n\n(.+?)\n\n</details>", body, re.DOTALL)
    title = re.search(r"^# (.+)$", body, re.MULTILINE)[1]
    tests = [f"{fields['file']}::{name}" for name in fields["tests"].split()]
    return Exercise(int(page.name[:2]), title, page, fields["module"], fields["functions"].split(), tests, hints)


def all_exercises() -> list[Exercise]:
    return [read_page(page) for page in sorted(FOLDER.glob("[0-9][0-9]_*.md"))]


# -------------------------------------------------------------------------------------- the copies

def find(source: str, name: str) -> ast.FunctionDef:
    """A function at the top level of a module."""
    return next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)


def blank(source: str, exercises: Iterable[Exercise]) -> str:
    """A module's source in which the exercises' functions keep signature and docstring only."""
    for exercise in exercises:
        for name in exercise.functions:
            function, lines = find(source, name), source.splitlines(keepends=True)
            docstring = function.body[0]
            told = f'raise NotImplementedError("exercise {exercise.number}: {name} is not written yet")\n'
            lines[docstring.end_lineno : function.end_lineno] = [" " * docstring.col_offset + told]
            source = "".join(lines)
    return source


def solution(exercise: Exercise) -> str:
    """The functions as the project has them."""
    source = (ROOT / exercise.module).read_text()
    return "\n\n\n".join(ast.get_source_segment(source, find(source, name)) for name in exercise.functions)


def command_of(exercises: Iterable[Exercise], copies: dict[str, Path], *options: str) -> list[str]:
    """The command that runs the exercises' tests on copies of modules, {file of the repository: copy}."""
    words = [word for module, copy in copies.items()
             for word in ("--copy", f"{module.removesuffix('.py').replace('/', '.')}={copy}")]
    tests = [test for exercise in exercises for test in exercise.tests]
    return [sys.executable, "-B", "-m", "pytest", "-p", "exercises.exercise", *words, *options, *tests]


# ------------------------------------------------------------------------------- the pytest plugin

def pytest_addoption(parser) -> None:
    parser.addoption("--copy", action="append", default=[], metavar="MODULE=FILE", help="import FILE as MODULE")


def pytest_configure(config) -> None:
    files = dict(word.split("=", 1) for word in config.getoption("--copy"))

    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, files[name]) if name in files else None

    sys.meta_path.insert(0, SimpleNamespace(find_spec=find_spec))  # Python asks it before it looks in the usual places


# -------------------------------------------------------------------------------------- the reader

def next_hint(exercise: Exercise) -> str:
    """One more hint than last time; how many were shown stands beside the copy."""
    shown = WORK / exercise.page.stem / "hints_shown"
    number = min(int(shown.read_text()) + 1 if shown.is_file() else 1, len(exercise.hints))
    shown.parent.mkdir(parents=True, exist_ok=True)
    shown.write_text(str(number))
    return f"Hint {number} of {len(exercise.hints)}: {exercise.hints[number - 1]}"


def practise(exercise: Exercise, anew: bool) -> int:
    """Make the copy if there is none, and run the tests on it: 0 is green, 1 red."""
    module, copy = ROOT / exercise.module, exercise.copy
    where, names = os.path.relpath(copy, ROOT), " and ".join(exercise.functions)
    fresh = anew or not copy.is_file()
    if fresh:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(blank(module.read_text(), [exercise]))
        page = exercise.page.relative_to(ROOT)
        print(f"{where} is a copy of {exercise.module}: write {names} there; {page} derives it")
    details = "--tb=no" if fresh else "--tb=short"  # of a blank there is nothing to explain
    red = subprocess.call(command_of([exercise], {exercise.module: copy}, details), cwd=ROOT)
    try:
        changed = blank(copy.read_text(), [exercise]) != blank(module.read_text(), [exercise])
    except (SyntaxError, StopIteration):  # which the tests have said
        changed = False
    if changed:
        print(f"{where} differs from {exercise.module} outside of {names}: ANEW=1 makes a fresh copy")
    again = f"make exercise N={exercise.number}"
    print(f"exercise {exercise.number}: " + (f"red. Edit {where}, then {again}; HINT=1 shows a hint" if red else
                                             f"green. {again} SOLUTION=1 shows the project's {names}"))
    return int(red != 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m exercises.exercise", description=__doc__.split("\n")[0])
    parser.add_argument("number", type=int, nargs="?", help="of the exercise; without it all are listed")
    parser.add_argument("--hint", action="store_true", help="show the next hint")
    parser.add_argument("--solution", action="store_true", help="show the functions as the project has them")
    parser.add_argument("--anew", action="store_true", help="begin with a fresh copy")
    words = arguments(parser)
    exercises = {exercise.number: exercise for exercise in all_exercises()}
    if words.number is None:
        for exercise in exercises.values():
            print(f"{exercise.title:<60} {exercise.page.relative_to(ROOT)}{'  begun' * exercise.copy.is_file()}")
        return 0
    if words.number not in exercises:
        fail(f"number: {words.number} is no exercise, expected 1 to {len(exercises)}: make exercise lists them")
    exercise = exercises[words.number]
    if words.hint or words.solution:
        print(solution(exercise) if words.solution else next_hint(exercise))
        return 0
    return practise(exercise, words.anew)


if __name__ == "__main__":
    raise SystemExit(main())
