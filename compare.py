"""Is my loss better? Train two variants over several seeds, judge the results, say the difference and its interval.

    python compare.py "dpo.py --config configs/tiny/dpo.toml" "beta=0.9"             another setting
    python compare.py "dpo.py --config configs/tiny/dpo.toml" "my_dpo.py" seeds=5    an edited copy of the script

Each text is what would follow `python`. The second goes on from the first unless it names a --config: another script,
further settings. Both train with seeds 0, 1, ..., two runs at a time; a seed orders the data in both alike. {seed} in
a text stands for the seed, for another start or other data each time: model=runs/results/{seed}/sft/model. Without it
start and data are the same in all runs, and the verdict holds for these.

All models answer the dev dialogues, several times. The verdict is about scores paired by seed and dialogue; its
interval covers both (judging/paired.py; how often it is wrong about two equal things: RESULTS.md). A killed comparison
goes on by the same command. Runs are kept in out/trained by what they were told to do: comparisons with the same out=
share them, and DPO's runs share reference log-probabilities. The report is that of the last comparison.
"""
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from math import inf
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import runtime
from data.llm import Budget, Opener, Sampling, open_model
from judge import answer, load_questions
from judging import games, gold, paired, report, tables
from judging.entries import Entry, check_checkpoint, decode
from runtime import check_ranges, fail, lock_file
from runtime.config import read_toml, shipped

ROOT = Path(__file__).resolve().parent
SEEDS = 1000  # at most; the second reply to a dialogue is drawn with the seed + 1000, the third with + 2000
EXPECTED = 'expected two texts, e.g. python compare.py "dpo.py --config configs/tiny/dpo.toml" "beta=0.9"'


@dataclass(frozen=True)
class Config:
    seeds: int = 3                   # training runs of each; 3 to 5 show large differences, more show smaller ones
    data: str = "runs/tiny/0/data/dev.jsonl"  # JSONL of dialogues to judge on
    judge: str = "gold"              # gold, reward:directory, or who compares: model directory, http://host/v1#name
    questions: int = 0               # how many dialogues, from the first; 0: all
    replies: int = 4                 # of each model to each dialogue, averaged: sampling noise would hide differences
    temperature: float = 0.7         # of the replies; 0: greedy
    max_tokens: int = 64             # of a reply; real chatbots need 1024
    jobs: int = 2                    # runs at a time
    threads: int = 1                 # of each run
    out: str = "runs/compare"        # folder for the report and the runs

    def __post_init__(self):
        check_ranges(self, seeds=(1, SEEDS), questions=(0, inf), replies=(1, inf), temperature=(0, 10),
                     max_tokens=(1, inf), jobs=(1, 64), threads=(1, 64))


# --------------------------------------------------------------------------------- what is compared

class Variant(NamedTuple):
    name: str
    script: str
    words: tuple[str, ...]   # what follows it

    def at(self, seed: int) -> list[str]:
        return [word.replace("{seed}", str(seed)) for word in self.words]

    def settings(self, seed: int) -> dict:
        """The config file's values and the words', as they are written."""
        words = self.at(seed)
        values = read_toml(words[words.index("--config") + 1]) if "--config" in words[:-1] else {}
        return values | dict(word.split("=", 1) for word in words if "=" in word)

    def told(self) -> tuple:
        """All that decides what is trained but the seed: the script's text, its words, what the config file holds."""
        return Path(self.script).read_text(), self.words, self.settings(0)

    def key(self) -> str:
        return _digest(Path(self.script).name, *self.told())


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def variant(name: str, text: str, first: Variant | None = None) -> Variant:
    """The script and settings of one text."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        fail(f"{name}: {text} cannot be read ({error}), {EXPECTED}")
    script = words.pop(0) if words and words[0].endswith(".py") else first.script if first else ""
    if not Path(script).is_file() and (ROOT / script).is_file():
        script = str(ROOT / script)
    if not Path(script).is_file():
        fail(f"{name}: '{text}' begins with no script that is there, {EXPECTED}")
    if first and "--config" not in words:
        words = [*first.words, *words]
    words = [shipped(word) for word in words]
    for word in words:
        if word.startswith(("seed=", "out=", "overwrite=")):
            fail(f"{name}: {word} is for compare.py to say: leave it out (seeds=3 is the number of seeds)")
    return Variant(name, script, tuple(words))


# ----------------------------------------------------------------------------------------- training

# What reference log-probabilities depend on beside the script. Not the seed: they are kept by tree, whatever the order.
REFERENCE = ("model", "ref_model", "data", "eval_data", "template", "max_length", "dtype", "device", "kernels",
             "micro_tokens", "quantize")


class Job(NamedTuple):
    variant: Variant
    seed: int
    folder: Path
    reference: Path | None   # the file of reference log-probabilities that it shares with others

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def trained(self) -> bool:
        """Whether there is a result, of the data, models and code as they are now."""
        if not (self.model / "config.json").is_file():
            return False
        began, depended = self.folder / "config.toml", self.folder / "depends_on.json"
        if began.is_file() and depended.is_file():
            paths = tomllib.loads(began.read_text()) | {"code": self.variant.script}
            for name, digest in json.loads(depended.read_text()).items():
                if name in paths and runtime.file_hash(paths[name]) != digest:
                    fail(f"{self.folder}: its {name} has changed since it was trained: delete that folder, or choose "
                         "another out=")
        return True

    def locked(self) -> bool:
        """Whether a process that a killed comparison has left behind is still at it."""
        try:
            with (self.folder / ".lock").open("a") as lock:
                lock_file(lock)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def start(self, threads: int) -> subprocess.Popen:
        words = [f"threads={threads}", *self.variant.at(self.seed), f"seed={self.seed}", f"out={self.folder}"]
        if self.reference:
            words.append(f"ref_cache={self.reference}")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            return subprocess.Popen([sys.executable, self.variant.script, *words], stdout=log, stderr=log,
                                    env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)})

    def check(self, code: int) -> None:
        """One line if the process has not ended with a model."""
        if code or not self.trained():
            said = [line for line in self.log.read_text().replace("\r", "\n").split("\n") if line.strip()]
            what = f"ended with code {code}: {said[-1] if said else 'nothing was said'}" if code else \
                "was stopped before its end: the same command goes on"
            fail(f"{self.variant.name}, seed {self.seed}: {self.variant.script} {what} (all it said: {self.log})")


def jobs_of(variants: list[Variant], seeds: int, out: Path) -> list[Job]:
    """The runs, seed by seed, so that the first pairs are there first."""
    found = []
    for seed, v in product(range(seeds), variants):
        source, settings, reference = Path(v.script).read_text(), v.settings(seed), None
        if re.search(r"^    ref_cache: str", source, re.MULTILINE) and "ref_cache" not in settings:
            shared = [source, {key: settings[key] for key in REFERENCE if key in settings}]
            reference = out / f"reference_{_digest(*shared)}.safetensors"
        found.append(Job(v, seed, out / "trained" / v.key() / str(seed), reference))
    return found


def train(jobs: list[Job], at_once: int, threads: int) -> int:
    """Run what is not trained yet; returns how many. Of runs that share a reference the first computes it."""
    waiting, running = [job for job in jobs if not job.trained()], {}
    new, done = len(waiting), len(jobs) - len(waiting)

    def may_start(job: Job) -> bool:
        computed = job.reference is None or job.reference.is_file()
        return not job.locked() and (computed or all(job.reference != other.reference for other in running))

    try:
        while waiting or running:
            for job in [job for job, (process, _) in running.items() if process.poll() is not None]:
                process, began = running.pop(job)
                job.check(process.returncode)
                done += 1
                print(f"{job.variant.name}, seed {job.seed}: trained in {time.monotonic() - began:.0f} s, {done} of "
                      f"{len(jobs)}", flush=True)
            while len(running) < at_once and (job := next(filter(may_start, waiting), None)):
                waiting.remove(job)
                if not job.trained():  # by what a killed comparison left behind
                    running[job] = job.start(threads), time.monotonic()
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.terminate()  # it saves, and goes on next time
        for process, _ in running.values():
            process.wait()
    return new


# ------------------------------------------------------------------------------------------ judging

def score(config: Config, jobs: list[Job], out: Path) -> dict[str, paired.Scores]:
    """The score of every dialogue by variant and seed: the mean over its turns and over several replies."""
    judge, device = decode("judges", config.judge), runtime.setup("auto", 0, 0)
    questions, dialogues = load_questions(config.data, limit=config.questions, graded=judge.kind == "gold")
    sampling, ledger, said = Sampling(config.max_tokens, config.temperature), out / "answers.jsonl", {}
    for job in jobs:
        model, began = Entry(job.variant.name, "model", str(job.model)), time.monotonic()
        for repeat in range(job.seed, job.seed + SEEDS * config.replies, SEEDS):
            with redirect_stdout(io.StringIO()):  # a line for every turn
                said[model.name, repeat] = answer(model, questions, dialogues, sampling, repeat, ledger, Budget(),
                                                  Opener(str(device)))
        print(f"{model.name}, seed {job.seed}: replied to {len(questions)} dialogues, {config.replies} times, in "
              f"{time.monotonic() - began:.0f} s", flush=True)
    answers = games.Answers(questions, said)
    if judge.kind in ("gold", "reward"):
        found = gold.grade_all(answers, dialogues) if judge.kind == "gold" else \
            games.reward_scores(judge.where, answers, device)
        unit = 100 if judge.kind == "gold" else 1
        by_run = {key: [unit * mean(of) if len(of) == len(q.turns) else math.nan
                        for q, of in zip(questions, replies, strict=True)] for key, replies in found.items()}
    else:
        by_run = compared(judge, answers, out / "calls.jsonl", str(device))
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for job in jobs:
        several = [by_run[job.variant.name, job.seed + SEEDS * k] for k in range(config.replies)]
        means = map(mean, zip(*several, strict=True))
        scores.setdefault(job.variant.name, {})[job.seed] = {q.id: x for q, x in zip(questions, means, strict=True)}
    return scores


def compared(judge: Entry, answers: games.Answers, ledger: Path, device: str) -> dict[tuple[str, int], list[float]]:
    """A model's verdicts on the pairs of replies, in both orders: wins in percent, a tie is half a win."""
    asked = games.Judge(judge.name, open_model(judge.where, device), "pair", "plain", 512, ledger)
    pairs = games.in_orders(games.matches(answers, "A", False), "both", answers.names)
    rows = tables.merge_orders(games.compare(asked, pairs, answers))[0]
    if lacking := tables.refused(rows):
        fail(f"judge {judge.name}: {lacking}")
    wins: dict[tuple[int, str], list[float]] = {}
    for row in rows:  # a verdict that could not be read, one in twenty at most, counts as a tie
        won = 0.5 if row["preference"] is None else row["preference"]
        wins.setdefault((row["repeat"], row["prompt"]), []).append(won)
    found = {}
    for name, seed in answers.said:
        a = [100 * mean(wins.get((seed, q.id), [math.nan])) for q in answers.questions]
        found[name, seed] = a if name == "A" else [100 - x for x in a]
    return found


# ----------------------------------------------------------------------------------------- the report

def compare(first: str, second: str, config: Config) -> dict:
    """Train, judge, and write the report."""
    a = variant("A", first)
    b = variant("B", second, a)
    if a.told() == b.told():
        fail("A and B are the same: with the same seeds they train the same models: change something in one of them")
    judge = decode("judges", config.judge)
    if judge.kind in ("model", "reward"):
        check_checkpoint("judge", judge.where, scored=judge.kind == "reward")
    elif judge.kind not in ("gold", "endpoint"):
        fail(f"judge={config.judge}: compares nothing anew, expected gold, reward:directory, a model or an endpoint")
    load_questions(config.data, limit=config.questions, graded=judge.kind == "gold")  # before an hour of training
    out, began = runtime.open_folder(config.out), time.monotonic()
    jobs = jobs_of([a, b], config.seeds, out)
    new = train(jobs, config.jobs, config.threads)
    scores, unit = score(config, jobs, out), "of the reward model's score" if judge.kind == "reward" else "points"
    try:
        found = paired.estimate(paired.matrix(scores["B"], "B") - paired.matrix(scores["A"], "A"))
    except ValueError as error:
        fail(f"{config.out}: {error}: the two cannot be paired")
    about = {v.name: shlex.join([v.script, *v.words]) for v in (a, b)} | {
        "judge": config.judge, "dialogues": config.data, "seeds": config.seeds, "replies": config.replies,
        "temperature": config.temperature, "runs trained now": new,
        "minutes": round((time.monotonic() - began) / 60, 1)}
    result = {"title": "B against A", "about": about, "verdict": paired.verdict(found, unit),
              "difference": found._asdict(), "seeds_needed": paired.seeds_needed(found), "scores": scores,
              "sections": paired.sections(found, scores["A"], scores["B"], unit)}
    report.write(result, out)
    print(f"\n{report.text(result)}\nwrote {out}/report.html and report.json")
    return result


def main(argv: list[str]) -> None:
    config = runtime.load_config(Config, __doc__, argv[2:] if not {"--help", "-h"} & set(argv) else ["--help"])
    if len(argv) < 2 or any(text.startswith("--") for text in argv[:2]):
        fail(f"compare.py: names no two variants, {EXPECTED}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        compare(argv[0], argv[1], config)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
