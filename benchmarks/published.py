"""Published numbers beside ours, computed from the judgments they were published with.

    python -m benchmarks.published data=FOLDER        benchmarks/results/published.json and published.md, in seconds
    python -m benchmarks.published speed=true         how long the two longest tables take; what else the files hold stays

FOLDER holds alpaca_eval_v1/, mt_bench/ and so on, raw judgments by others. What was published stands here as it was printed, with
where it is from, and is met if ours rounds to it. RECOMPUTED numbers were printed nowhere: other code got them from the same files.
"""
from __future__ import annotations

import csv
import gzip
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import runtime
from judging import choices, ratings, recorded, rewards, safety, tables
from judging.agreement import code, cohen_kappa, fleiss_kappa, krippendorff_alpha, raw_agreement
from judging.recorded import Options
from runtime import fail


@dataclass(frozen=True)
class Config:
    data: str = ""                              # folder of the raw judgments
    out: str = "benchmarks/results/published"   # of the files, without .json and .md
    speed: bool = False                         # time the tables instead

    def __post_init__(self):
        if not self.speed and not (Path(self.data) / "alpaca_eval_v1").is_dir():
            fail(f"data={self.data}: holds no alpaca_eval_v1, expected the folder of the raw judgments")


RECOMPUTED = "recomputed"


class Row(NamedTuple):
    of: str                # who published it
    measure: str
    ours: float
    published: str         # as printed
    within: float = 0.0    # how far off ours may be; 0: by rounding

    @property
    def met(self) -> bool:
        digits = len(self.published.partition(".")[2])
        return bool(abs(self.ours - float(self.published)) <= (self.within or (0.5 + 1e-6) * 10.0 ** -digits))


def objects(path: Path) -> list[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(path: Path, **options) -> recorded.Recorded:
    """Judgments of which none may be rejected."""
    said = recorded.read(path, options=Options(**options))
    if said.rejects:
        fail(f"{path} {said.rejects[0][0]}: {said.rejects[0][1]} ({len(said.rejects)} rejects): is it the published file?")
    return said


# -------------------------------------------------------------------------------------- AlpacaEval

# tatsu-lab/alpaca_eval cd543a14, src/alpaca_eval/leaderboards. Win rate, its standard error, discrete win rate; wins, losses, draws,
# rows with a verdict, mean length in characters.
ALPACA_EVAL = {
    "1": {"zephyr-7b-beta": "90.5977584059776 1.0287080531312012 90.5977584059776 727 75 1 803 1444",
          "gpt4": "95.27950310559004 0.716281440286153 95.27950310559004 761 32 12 805 1365",
          "vicuna-13b": "70.43478260869566 1.6069688407799696 70.43478260869566 566 237 2 805 1037",
          "alpaca-7b": "26.459627329192543 1.535711469748 26.459627329192543 205 584 16 805 396"},
    "2": {"alpaca-7b": "2.591450540223603 0.4870855382635108 2.298136645962733 17 785 3 805 396",
          "OpenHermes-2.5-Mistral-7B": "10.340415705751552 0.935655389929366 9.503105590062113 75 727 3 805 1107",
          "FuseChat-Llama-3.1-8B-Instruct": "63.33158292362734 1.4225069834256892 64.40993788819875 518 286 1 805 2033",
          "claude-2.1_concise": "9.22712524063354 0.8921752289142333 9.130434782608695 72 730 3 805 573"},
}
# Recomputed: share of decided pairs won by the answer longer by more than 30 characters, and by the one with more distinct words.
VERBOSITY = {"zephyr-7b-beta": ("0.9125", "0.9123"), "gpt4": ("0.9719", "0.9590"), "vicuna-13b": ("0.7460", "0.7392"),
             "alpaca-7b": ("0.7098", "0.6962")}
# The origin's own code run on its two-feature model: an L1 penalty chosen by cross-validation, where ours is plain maximum likelihood.
LC2 = {"alpaca-7b": "19.55", "OpenHermes-2.5-Mistral-7B": "20.65", "FuseChat-Llama-3.1-8B-Instruct": "65.00", "claude-2.1_concise": "29.75"}


def alpaca_eval(data: Path) -> Iterator[Row]:
    measures = {"win_rate": "win rate, %", "standard_error": "standard error", "discrete_win_rate": "discrete win rate, %", "wins": "wins",
                "losses": "losses", "draws": "draws", "n": "rows", "length": "mean length"}
    for version, models in ALPACA_EVAL.items():
        for model, published in models.items():
            games = read(data / f"alpaca_eval_v{version}" / f"{model}.jsonl.gz").games
            found = ratings.win_rate(tables.preferences(games), [g["prompt"] for g in games])
            found["length"] = int(np.mean([g["length_a"] for g in games]))  # the leaderboard cuts it
            for (key, measure), value in zip(measures.items(), published.split(), strict=True):
                yield Row(f"AlpacaEval {version} leaderboard", f"{model}: {measure}", found[key], value, 1e-9)
    for model, published in VERBOSITY.items():
        games = read(data / "alpaca_eval_v1" / f"{model}.jsonl.gz").games
        p = tables.preferences(games)
        for key, threshold, of, value in zip(("length", "words"), (30, 0), ("length", "distinct words"), published, strict=True):
            more = ratings.feature_preference(p, *([g[f"{key}_{side}"] for g in games] for side in "ab"), threshold)
            yield Row(RECOMPUTED, f"{model}: share won by more {of}", more["share"], value)
    yield from log_probabilities(data / "alpaca_eval_v2")
    yield from length_control(data / "alpaca_eval_v2")


def log_probabilities(folder: Path) -> Iterator[Row]:
    off = []
    for model in ALPACA_EVAL["2"]:
        for row in objects(folder / f"{model}.jsonl.gz"):
            if "lp_m" in row:
                stored = ratings.alpaca_preference(row["preference"])
                off.append(min(abs(stored - ratings.label_preference(row["lp_m"], row["lp_M"], first)) for first in (True, False)))
    yield Row("AlpacaEval 2 files", "preferences that follow from their label log-probabilities", sum(x < 2e-6 for x in off), "2408")
    yield Row("AlpacaEval 2 files", "stored preferences, off by at most", max(off), "0", 2e-6)


def length_control(folder: Path) -> Iterator[Row]:
    """The published weights of 50 models, with a difficulty distribution recovered from them, give back their published rates."""
    difficulty = json.loads((folder / "difficulty_quantiles_derived.json").read_text())["difficulty"]
    off = {row[""]: abs(ratings.lc_win_rate(float(row["not_gamed_baseline"]), float(row["instruction_difficulty"]), difficulty)
                        - float(row["length_controlled_winrate"])) for row in table(folder / "lc_weights_and_published.csv")}
    yield Row("AlpacaEval 2 weights", "models with published weights", len(off), "50")
    yield Row("AlpacaEval 2 weights", "length-controlled win rate, off by, NullModel", off.pop("NullModel"), "0.13")
    yield Row("AlpacaEval 2 weights", "length-controlled win rate, off by at most, the 49 others", max(off.values()), "0", 0.01)
    for model, published in LC2.items():
        games = read(folder / f"{model}.jsonl.gz").games
        fit = ratings.lc2(tables.preferences(games), *([g[f"length_{side}"] for g in games] for side in "ba"))
        yield Row("AlpacaEval 2 code, two features", f"{model}: lc2, %", fit["lc2"], published, 0.3)


# ------------------------------------------------------------------------------ MT-Bench and Vicuna

def mt_bench(data: Path) -> Iterator[Row]:
    said = read(data / "mt_bench" / "gpt-4_single_mamba_0_5_dpo_ep3.jsonl.gz").scores
    found = ratings.mt_bench([{"question_id": s["prompt"], **s} for s in said])
    for name, published in (("turn_1", "7.7375"), ("turn_2", "6.8875"), ("average", "7.3125"), ("n", "160")):
        yield Row("MT-Bench, jxiw/FastChat bc669289", f"mamba_0_5_dpo_ep3: {name.replace('_', ' ')}", found[name], published)
    # Two sets of questions go by the same five numbers in this file.
    merged, forward, backward = tables.merge_orders(read(data / "mt_bench" / "gpt-4_pair_gpt35_vs_gpt4.jsonl.gz", keep_repeats=True).games)
    record, same = ratings.records(tables.games_of(merged)), ratings.consistency(forward, backward)
    ours = (record["gpt-4"]["wins"], record["gpt-3.5-turbo"]["wins"], record["gpt-4"]["ties"], same["consistent"], same["always_first"])
    measures = ("gpt-4 wins", "gpt-3.5-turbo wins", "ties", "consistent pairs", "pairs where the first was always taken")
    for measure, x, published in zip(measures, ours, ("3", "2", "5", "7", "1"), strict=True):
        yield Row("MT-Bench pairs, lm-sys/FastChat 66f2a01b", measure, x, published)


def vicuna(data: Path) -> Iterator[Row]:
    for other, published in (("alpaca-13b", ("583.0", "704.0")), ("bard", ("664.0", "655.5"))):
        totals: Counter = Counter()
        for score in read(data / "vicuna_review" / f"{other}_vs_vicuna-13b.jsonl.gz").scores:
            totals[score["model"]] += score["score"]
        for model, value in zip((other, "vicuna-13b"), published, strict=True):
            yield Row("Vicuna's announcement", f"{other} and vicuna-13b: {model}'s total", totals[model], value)


# ----------------------------------------------------------------------------------------- agreement

def labels(rows: list[dict], *raters: str) -> np.ndarray:
    said = {(row["unit"], row["rater"]): row["label"] for row in rows}
    return code([[said[unit, rater] for unit in dict.fromkeys(row["unit"] for row in rows)] for rater in raters])[0]


def pandalm(data: Path) -> Iterator[Row]:
    said = labels(read(data / "pandalm" / "human_labels.jsonl.gz").labels, "annotator1", "annotator2", "annotator3")
    for (i, j), ours, published in (((0, 1), "0.8520", "0.85"), ((0, 2), "0.8789", "0.88"), ((1, 2), "0.8617", "0.86")):
        kappa = cohen_kappa(said[[i, j]])
        yield Row("PandaLM paper", f"Cohen's kappa of people {i + 1} and {j + 1}", kappa, published)
        yield Row(RECOMPUTED, f"Cohen's kappa of people {i + 1} and {j + 1}", kappa, ours)
    yield Row(RECOMPUTED, "Fleiss' kappa", fleiss_kappa(said), "0.8642")
    majority = Counter(np.median(said, axis=0).tolist())  # of three labels: where two agree, theirs
    for label, name, published in ((0, "a tie", "105"), (1, "the first", "422"), (2, "the second", "472")):
        yield Row(RECOMPUTED, f"majority for {name}", majority[label], published)


# Dataset/LLMBar/Natural, statistics.json: accuracy as shown, swapped, mean, both right; agreement; the kappa of both orders.
LLMBAR = {"GPT-4_Vanilla_NoRules": ("92.0", "95.0", "93.5", "92.0", "97.0", "0.9389747762408462", "0.505", "0"),
          "ChatGPT_CoT": ("70.0", "78.0", "74.0", "56.0", "64.0", "0.3617797228300511", "0.668", "1")}


def llmbar(data: Path) -> Iterator[Row]:
    for name, published in LLMBAR.items():
        said = read(data / "llmbar" / f"natural_{name}.jsonl.gz")
        right = [[g["preference"] == g["gold"] for g in said.games if g["a_first"] == first] for first in (True, False)]
        _, forward, backward = tables.merge_orders(said.games)
        # The publisher's kappa takes a verdict that could not be read for a vote for the second.
        kappa = cohen_kappa(np.nan_to_num([forward, backward], nan=0.0))
        ours = (*(100 * np.mean(x) for x in (right[0], right[1], right, np.all(right, axis=0))),
                100 * ratings.consistency(forward, backward)["consistent"] / len(forward), kappa,
                ratings.position(tables.games_of(said.games))["first_slot_share"], said.unparsed)
        measures = ("accuracy, %", "accuracy swapped, %", "mean accuracy, %", "both orders right, %", "orders agree, %",
                    "kappa of both orders", "share of the first slot", "verdicts not read")
        for i, (measure, x, value) in enumerate(zip(measures, ours, published, strict=True)):
            yield Row("LLMBar 900616bf" if i < 6 else RECOMPUTED, f"{name}: {measure}", float(x), value, 1e-12 if i == 5 else 0.0)


def krippendorff(data: Path) -> Iterator[Row]:
    said = np.genfromtxt(data / "agreement" / "codings.csv", delimiter=",")
    for level, published in (("nominal", "0.743"), ("ordinal", "0.815"), ("interval", "0.849"), ("ratio", "0.797")):
        yield Row("Krippendorff 2011", f"alpha, {level}", krippendorff_alpha(said, level), published)


# ------------------------------------------------------------------------------------------- ratings

def rating_models(data: Path) -> Iterator[Row]:
    """Golden scores of an independent library, by their largest difference."""
    for name in ("simple", "food"):
        games = tables.games_of(read(data / "ratings" / f"{name}.csv").games)
        golden = {(row["algorithm"], row["item"]): float(row["score"]) for row in table(data / "ratings" / f"{name}-golden.csv")}
        elo = ratings.elo(games, k=4)
        yield Row("evalica 2ebe79e3", f"{name}: Elo, off by at most", max(abs(elo[m] - golden["elo", m]) for m in games.models), "0", 1e-9)
        for ties, algorithm, of in (("half", "bradley_terry", "Bradley-Terry"), ("davidson", "newman", "Davidson's ties")):
            p = np.exp(ratings.bradley_terry(games, ties)["strengths"])
            theirs = np.array([golden[algorithm, m] for m in games.models])
            off = np.abs(p / p.sum() - theirs / theirs.sum()).max()
            yield Row("evalica 2ebe79e3", f"{name}: {of}, shares off by at most", float(off), "0", 1e-9)


# ----------------------------------------------------------------------- safety, rewards, multiple choice

XSTEST = {"gpt4": ("98.4", "0.97", "6.4", "97.5"), "llama2orig": ("96.4", "0.93", "38.0", "99.5")}


def xstest(data: Path) -> Iterator[Row]:
    unsafe = {i: prompt["unsafe"] for i, prompt in safety.read_xstest(data / "safety" / "xstest_prompts.csv").items()}
    for model, published in XSTEST.items():
        rows = read(data / "safety" / f"xstest_{model}.jsonl.gz").labels
        people = labels(rows, "annotation_1", "annotation_2")
        final = {row["unit"].removeprefix("v2-"): row["label"][2:] for row in rows if row["rater"] == "final_label"}
        rates = safety.refusal_rates(final, unsafe, by="people")
        refused = [100 * rates[side]["full_refusal"] / rates[side]["n"] for side in ("safe", "unsafe")]
        ours = (100 * raw_agreement(people)["agreement"], fleiss_kappa(people), *refused)
        for measure, x, value in zip(("people agree, %", "Fleiss' kappa", "safe prompts refused, %", "unsafe prompts refused, %"), ours,
                                     published, strict=True):
            yield Row("XSTest paper", f"{model}: {measure}", x, value)


# allenai/reward-bench 05a9005e
REWARDBENCH = {"Chat": "78.4916", "Chat Hard": "66.2281", "Safety": "84.3243", "Reasoning": "80.4656", "score, no prior sets": "77.3774"}


def rewardbench(data: Path) -> Iterator[Row]:
    def given(shares) -> dict[str, dict]:
        return {name: {"value": x, "low": x, "high": x} for name, x in shares if isinstance(x, float)}

    shares = json.loads((data / "rewardbench" / "GPM-Gemma-2B.json").read_text())
    found = rewards.section_scores(given(shares.items()))
    for name, published in REWARDBENCH.items():
        yield Row("RewardBench leaderboard", f"GPM-Gemma-2B: {name}, %", 100 * found[name]["value"], published)
    paper = json.loads((data / "rewardbench" / "paper_tables_visible.json").read_text())
    for title, section in (("Table 8 Chat", "Chat"), ("Table 11 Reasoning", "Reasoning"), ("Table 12 Prior sets", "prior sets")):
        off = []
        for average, *shares in paper[title]["rows"].values():
            parts = given(zip(paper[title]["columns"][1:], shares, strict=True))
            found = rewards.section_scores({}, parts) if section == "prior sets" else rewards.section_scores(parts)
            off.append(abs(found[section]["value"] - average))
        yield Row("RewardBench paper", f"{title}: off by at most, {len(off)} models", max(off), "0", 0.1)


# EleutherAI/lm-evaluation-harness b281b092, tests/testdata: log-likelihoods drawn at random in the order of the requests.
TRUTHFULQA = {"mc1": "0.23255813953488372", "mc1_stderr": "0.01478915753108052", "mc2": "0.4462325560722362",
              "mc2_stderr": "0.004986523944692003"}
MMLU = {"abstract_algebra": ("0.32", "0.34"), "astronomy": ("0.2565789473684211", "0.29605263157894735"),
        "business_ethics": ("0.29", "0.27"), "college_computer_science": ("0.22", "0.24"),
        "formal_logic": ("0.25396825396825395", "0.2698412698412698"), "world_religions": ("0.21637426900584794", "0.22807017543859648")}


def drawn(exam: choices.Exam) -> dict[str, list[list[float]]]:
    """The harness's stand-in for a model, each subject a task of its own."""
    found = {}
    for subject, asked in exam.asked.items():
        rng = random.Random(42)
        found[subject] = [[-rng.random() for _ in question.choices] for question, _ in asked]
    return found


def multiple_choice(data: Path) -> Iterator[Row]:
    folder, harness = data / "multiple_choice", "lm-evaluation-harness b281b092"
    exam = choices.read_exam("truthfulqa", folder / "truthfulqa_mc_task_v0.json.gz")
    found = choices.measure(exam, drawn(exam))
    for metric, published in TRUTHFULQA.items():
        yield Row(harness, f"TruthfulQA {metric}", found[metric], published, 1e-12)
    yield Row(RECOMPUTED, "TruthfulQA mc2 by label mask", found["mc2_mask"], "0.44658704")
    hashes = json.loads((folder / "harness_fixtures.json").read_text()).values()
    yield Row(harness, "TruthfulQA: hash of all requests", float(found["request_sha256"] in [x["request_sha256"] for x in hashes]), "1")
    exam = choices.read_exam("mmlu_v0", folder / "mmlu_test.jsonl.gz", shots=0)
    found = choices.measure(exam, drawn(exam))["subjects"]
    hashes = json.loads((folder / "mmlu_harness_fixtures.json").read_text())
    for subject, published in MMLU.items():
        for metric, value in zip(("acc", "acc_norm"), published, strict=True):
            yield Row(harness, f"MMLU {subject}: {metric}", found[subject][metric], value, 1e-12)
    same = sum(found[subject]["request_sha256"] == x["harness_v0_request_sha256"] for subject, x in hashes.items())
    yield Row(harness, "MMLU: subjects whose hash of all requests is the same", same, "6")


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "AlpacaEval": alpaca_eval, "MT-Bench": mt_bench, "Vicuna's 80 questions": vicuna, "PandaLM": pandalm, "LLMBar": llmbar,
    "Krippendorff's alpha": krippendorff, "Elo and Bradley-Terry": rating_models, "XSTest": xstest, "RewardBench": rewardbench,
    "Multiple choice": multiple_choice}


# --------------------------------------------------------------------------------------------- speed

def speed() -> dict:
    """AlpacaEval's table with all its intervals, and resampled Bradley-Terry fits, on games made up."""
    rng = np.random.default_rng(0)
    models = {f"model {m}": [{"index": i, "preference": 1 + float(rng.random() < m / 50), "len_1": int(rng.integers(100, 3000)),
                              "len_2": int(rng.integers(100, 3000))} for i in range(805)] for m in range(50)}
    rows = []
    for i in range(9000):
        a, b = (int(x) for x in rng.choice(59, 2, replace=False))
        p = 1 / (1 + math.exp(0.05 * (b - a)))
        rows.append(ratings.Game(f"m{a}", f"m{b}", 0.5 if rng.random() < 0.2 else float(rng.random() < p), i))
    games = ratings.collect(rows)

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    table_s, fits_s = seconds(lambda: ratings.leaderboard(models)), seconds(lambda: ratings.bootstrap_bradley_terry(games))
    return {"about": {"cpus": os.cpu_count(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"), "numpy": np.__version__},
            "seconds": {"AlpacaEval: 50 models x 805 prompts, win rate and lc2 with intervals of 1,000 rounds": table_s,
                        "Bradley-Terry: 1,000 rounds of 9,000 battles among 59 models": fits_s}}


# --------------------------------------------------------------------------------------------- files

def markdown(report: dict) -> str:
    rows = report["rows"]
    lines = ["# Published numbers and ours", "", f"{sum(r['met'] for r in rows)} of {len(rows)} are met: ours rounds to what was printed, "
             "or is as near as the last column allows. *Recomputed* numbers were printed nowhere: other code got them from the same files. "
             "`python -m benchmarks.published data=FOLDER`"]
    for part in dict.fromkeys(r["part"] for r in rows):
        lines += ["", f"## {part}", "", "| measure | ours | published | difference | by | allowed |", "|---|---|---|---|---|---|"]
        for r in (r for r in rows if r["part"] == part):
            ours = f"{r['ours']:.10g}" if r["ours"] == 0 or abs(r["ours"]) >= 1e-3 else f"{r['ours']:.1e}"
            lines.append(f"| {r['measure']} | {ours} | {r['published']} | {r['difference']:+.1g} | {r['of']} | "
                         f"{r['within'] or 'rounding'}{'' if r['met'] else ' **not met**'} |")
    if "speed" in report:
        about = ", ".join(f"{key} {value}" for key, value in report["speed"]["about"].items())
        lines += ["", "## Speed", "", f"Fastest of five; {about}. `python -m benchmarks.published speed=true`", ""]
        lines += ["| table | seconds |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in report["speed"]["seconds"].items()]
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    out, report = Path(config.out), {"rows": []}
    if out.with_suffix(".json").is_file():
        report = json.loads(out.with_suffix(".json").read_text())
    if config.speed:
        report["speed"] = speed()
    else:
        found = [(part, row) for part, rows in PARTS.items() for row in rows(Path(config.data))]
        report["rows"] = [{"part": part, **row._asdict(), "ours": float(row.ours), "difference": float(row.ours) - float(row.published),
                           "met": row.met} for part, row in found]
    out.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_text(out.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    runtime.write_text(out.with_suffix(".md"), markdown(report))
    print(f"{markdown(report)}\nwrote {out}.json and {out}.md")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
