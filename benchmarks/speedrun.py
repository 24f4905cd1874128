"""Speedrun: how good a chatbot do 300 seconds of CPU time make of the shipped base? Rules and board: SPEEDRUN.md.

    make speedrun                                              the shipped recipe, benchmarks/speedrun.sh
    make speedrun RECIPE="python my_recipe.py" DEV=1           yours, on the dev dialogues, as often as you like
    make speedrun RECIPE="python my_recipe.py" WHAT="PPO"      on the test dialogues, and onto the board
"""
import datetime
import hashlib
import json
import os
import random
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

import compare
import runtime
from benchmarks.measure import machine, save
from data.records import write_lines
from data.tiny import build
from judging import paired
from runtime import fail

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = ("test.jsonl", '"test"', "'test'", "held_out")  # how test data would be named in a recipe


@dataclass(frozen=True)
class Config:
    recipe: str = "sh benchmarks/speedrun.sh"  # a command; DATA OUT SECONDS SEED are put behind it
    what: str = ""                   # what changed, for the board; "": not on the board
    dev: bool = False                # judge on the dev dialogues instead: for trying, never on the board
    seeds: int = 3
    seconds: int = 300               # CPU seconds of a seed's training
    demos: int = 5000                # demonstrations in DATA
    prompts: int = 10_000            # dialogues in DATA to collect preferences on
    evals: int = 40                  # test dialogues of each task, at most 40
    out: str = "runs/speedrun"
    board: str = "benchmarks/results/speedrun.json"

    def __post_init__(self):
        runtime.check_ranges(self, seeds=(1, compare.SEEDS), seconds=(1, inf), demos=(1, 10**7), prompts=(1, 10**7),
                             evals=(1, 40))
        if self.what and self.dev:
            fail("what is set and dev=true: the board is for the test dialogues, drop one of the two")


def refuse_test_data(command: list[str]) -> None:
    """One line if the command, or a file that it names, speaks of test data."""
    for word in command:
        readable = Path(word).suffix in (".py", ".sh") and Path(word).is_file()
        text = word + (Path(word).read_text(errors="replace") if readable else "")
        if found := next((name for name in TEST_DATA if name in text), None):
            fail(f"recipe: {word} names {found}, expected nothing of the test dialogues in a recipe: train on DATA")


def cpu_seconds() -> float:
    """Of this process's children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(config: Config, seed: int, folder: Path) -> float:
    """Run the recipe; returns the CPU seconds it took. Over its budget, or without a model, the attempt is void."""
    data, out = folder / "data", folder / "run"
    data.mkdir(parents=True, exist_ok=True)
    build.write_data(
        build.Config(part="data", seed=seed, demos=config.demos, prompts=config.prompts, more_prompts=1), data)
    for name in ("test.jsonl", "more_prompts.jsonl"):
        (data / name).unlink()
    command = [*shlex.split(config.recipe), str(data), str(out), str(config.seconds), str(seed)]
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (config.seconds, config.seconds + 1))

    before = cpu_seconds()
    try:
        code = subprocess.run(command, env=os.environ | path, preexec_fn=limit).returncode
    except OSError as error:
        fail(f"recipe: '{command[0]}' cannot be run ({error.strerror}), expected a command such as python my_recipe.py")
    used = cpu_seconds() - before
    if used > config.seconds:
        fail(f"seed {seed}: void, the recipe took {used:.0f} CPU seconds of {config.seconds}: make it shorter")
    if code or not (out / "model" / "config.json").is_file():
        fail(f"seed {seed}: void, the recipe ended with code {code} and "
             f"{'a' if (out / 'model').exists() else 'no'} model in {out}: mend it")
    print(f"seed {seed}: trained in {used:.0f} of {config.seconds} CPU seconds", flush=True)
    return used


def main(config: Config) -> None:
    command = shlex.split(config.recipe)
    refuse_test_data(command)
    out = runtime.open_folder(config.out)
    if any(out.iterdir()):
        fail(f"{config.out}: is not empty, expected a new folder, so that every run starts from nothing: delete it, or "
             "choose another out=")
    variant = compare.Variant("recipe", command[0], tuple(command[1:]))
    jobs = [compare.Job(variant, seed, out / str(seed) / "run", None) for seed in range(config.seeds)]
    used = [train(config, job.seed, job.folder.parent) for job in jobs]

    split, drawn_by = "dev", "dev"
    if not config.dev:
        weights = "".join(runtime.file_hash(job.model) for job in jobs)
        split, drawn_by = "test", f"speedrun {hashlib.sha256(weights.encode()).hexdigest()}"
    dialogues = build.draw(split, random.Random(drawn_by), config.evals)
    data = out / "dialogues.jsonl"
    write_lines(data, dialogues)
    scores = compare.score(compare.Config(data=str(data)), jobs, out)
    found = paired.estimate(paired.matrix(scores["recipe"]))
    row = {"date": datetime.date.today().isoformat(), "what": config.what, "command": config.recipe,
           "score": {"value": found.mean, "low": found.mean - found.half, "high": found.mean + found.half},
           "by_seed": [cell["value"] for cell in found.by_seed], "cpu_seconds": used, "budget": config.seconds,
           "dialogues": found.dialogues, **machine(torch.device("cpu"))}
    print("gold score on the {} dialogues: {value:.1f} [{low:.1f}, {high:.1f}]".format(split, **row["score"])
          + f", 95 % over {config.seeds} seeds and {found.dialogues} dialogues")
    if config.what:
        file = Path(config.board)
        rows = json.loads(file.read_text())["rows"] if file.is_file() else []
        save(file, {"rows": sorted([*rows, row], key=lambda row: -row["score"]["value"])})
        print("python -m benchmarks.results writes it into SPEEDRUN.md")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
