"""Published numbers come out of the judgments they were published with, and published data sets are read.

    REAL_DATA=FOLDER python -m pytest tests/test_published.py            FOLDER holds judge/ and datasets/
    REAL_DATA=FOLDER WRITE=1 python -m pytest tests/test_published.py    writes them to benchmarks/results as well:
                                                                         published, formats, families (.json, .md)

What was published stands here as it was printed, with its source, and is met if ours rounds to it. RECOMPUTED numbers
were printed nowhere: other code got them from the same files.
"""
import csv
import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import FIXTURES, ROOT
from safetensors.torch import load_file

from checkpoints import load_model
from data.formats import FORMATS
from data.formats import read as read_records
from data.tokenizer import load_tokenizer
from judging import choices, ratings, recorded, rewards, safety, tables
from judging.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha, raw_agreement
from model import generate

RESULTS = ROOT / "benchmarks" / "results"
WRITE = "WRITE" in os.environ
real = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
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
    said = recorded.read(path, **options)
    assert said.rejects == []
    return said


# -------------------------------------------------------------------------------------- AlpacaEval

# tatsu-lab/alpaca_eval cd543a14, src/alpaca_eval/leaderboards. Win rate, its standard error, discrete win rate; wins,
# losses, draws,
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
# Recomputed: share of decided pairs won by the answer longer by more than 30 characters, and by the one with more
# distinct words.
VERBOSITY = {"zephyr-7b-beta": ("0.9125", "0.9123"), "gpt4": ("0.9719", "0.9590"), "vicuna-13b": ("0.7460", "0.7392"),
             "alpaca-7b": ("0.7098", "0.6962")}
# The origin's own code run on its two-feature model: an L1 penalty chosen by cross-validation, where ours is plain
# maximum likelihood.
LC2 = {"alpaca-7b": "19.55", "OpenHermes-2.5-Mistral-7B": "20.65", "FuseChat-Llama-3.1-8B-Instruct": "65.00",
       "claude-2.1_concise": "29.75"}


def alpaca_eval(data: Path) -> Iterator[Row]:
    measures = {"win_rate": "win rate, %", "standard_error": "standard error",
                "discrete_win_rate": "discrete win rate, %", "wins": "wins", "losses": "losses", "draws": "draws",
                "n": "rows", "length": "mean length"}
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
        features = (("length", 30, "length"), ("words", 0, "distinct words"))
        for (key, threshold, of), value in zip(features, published, strict=True):
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
                recovered = [ratings.label_preference(row["lp_m"], row["lp_M"], first) for first in (True, False)]
                off.append(min(abs(stored - preference) for preference in recovered))
    yield Row("AlpacaEval 2 files", "preferences that follow from their label log-probabilities",
              sum(x < 2e-6 for x in off), "2408")
    yield Row("AlpacaEval 2 files", "stored preferences, off by at most", max(off), "0", 2e-6)


def length_control(folder: Path) -> Iterator[Row]:
    """The published weights of 50 models, with a difficulty distribution recovered from them, give back their published
    rates."""
    difficulty = json.loads((folder / "difficulty_quantiles_derived.json").read_text())["difficulty"]
    off = {}
    for row in table(folder / "lc_weights_and_published.csv"):
        baseline, instruction = float(row["not_gamed_baseline"]), float(row["instruction_difficulty"])
        ours = ratings.lc_win_rate(baseline, instruction, difficulty)
        off[row[""]] = abs(ours - float(row["length_controlled_winrate"]))
    yield Row("AlpacaEval 2 weights", "models with published weights", len(off), "50")
    yield Row("AlpacaEval 2 weights", "length-controlled win rate, off by, NullModel", off.pop("NullModel"), "0.13")
    yield Row("AlpacaEval 2 weights", "length-controlled win rate, off by at most, the 49 others", max(off.values()),
              "0", 0.01)
    for model, published in LC2.items():
        games = read(folder / f"{model}.jsonl.gz").games
        fit = ratings.lc2(tables.preferences(games), *([g[f"length_{side}"] for g in games] for side in "ba"))
        yield Row("AlpacaEval 2 code, two features", f"{model}: lc2, %", fit["lc2"], published, 0.3)


# ------------------------------------------------------------------------------ MT-Bench and Vicuna

def mt_bench(data: Path) -> Iterator[Row]:
    said = read(data / "mt_bench" / "gpt-4_single_mamba_0_5_dpo_ep3.jsonl.gz").scores
    found = ratings.mt_bench([{"question_id": s["prompt"], **s} for s in said])
    for name, published in (("turn_1", "7.7375"), ("turn_2", "6.8875"), ("average", "7.3125"), ("n", "160")):
        measure = f"mamba_0_5_dpo_ep3: {name.replace('_', ' ')}"
        yield Row("MT-Bench, jxiw/FastChat bc669289", measure, found[name], published)
    # Two sets of questions go by the same five numbers in this file.
    pairs = read(data / "mt_bench" / "gpt-4_pair_gpt35_vs_gpt4.jsonl.gz", keep_repeats=True).games
    merged, forward, backward = tables.merge_orders(pairs)
    record, same = ratings.records(tables.games_of(merged)), ratings.consistency(forward, backward)
    ours = (record["gpt-4"]["wins"], record["gpt-3.5-turbo"]["wins"], record["gpt-4"]["ties"], same["consistent"],
            same["always_first"])
    measures = ("gpt-4 wins", "gpt-3.5-turbo wins", "ties", "consistent pairs",
                "pairs where the first was always taken")
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

def pandalm(data: Path) -> Iterator[Row]:
    rows = objects(data / "pandalm" / "human_labels.jsonl.gz")
    said = np.array([[row[f"annotator{n}"] for row in rows] for n in (1, 2, 3)], dtype=float)
    for (i, j), ours, published in (((0, 1), "0.8520", "0.85"), ((0, 2), "0.8789", "0.88"), ((1, 2), "0.8617", "0.86")):
        kappa = cohen_kappa(said[[i, j]])
        yield Row("PandaLM paper", f"Cohen's kappa of people {i + 1} and {j + 1}", kappa, published)
        yield Row(RECOMPUTED, f"Cohen's kappa of people {i + 1} and {j + 1}", kappa, ours)
    yield Row(RECOMPUTED, "Fleiss' kappa", fleiss_kappa(said), "0.8642")
    majority = Counter(np.median(said, axis=0).tolist())  # of three labels: where two agree, theirs
    for label, name, published in ((0, "a tie", "105"), (1, "the first", "422"), (2, "the second", "472")):
        yield Row(RECOMPUTED, f"majority for {name}", majority[label], published)


# Dataset/LLMBar/Natural, statistics.json: accuracy as shown, swapped, mean, both right; agreement; the kappa of both
# orders.
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
            source, within = "LLMBar 900616bf" if i < 6 else RECOMPUTED, 1e-12 if i == 5 else 0.0
            yield Row(source, f"{name}: {measure}", float(x), value, within)


def krippendorff(data: Path) -> Iterator[Row]:
    said = np.genfromtxt(data / "agreement" / "codings.csv", delimiter=",")
    for level, published in (("nominal", "0.743"), ("ordinal", "0.815"), ("interval", "0.849"), ("ratio", "0.797")):
        yield Row("Krippendorff 2011", f"alpha, {level}", krippendorff_alpha(said, level), published)


# ------------------------------------------------------------------------------------------- ratings

def rating_models(data: Path) -> Iterator[Row]:
    """Golden scores of an independent library, by their largest difference."""
    for name in ("simple", "food"):
        games = tables.games_of(read(data / "ratings" / f"{name}.csv").games)
        golden = {(row["algorithm"], row["item"]): float(row["score"])
                  for row in table(data / "ratings" / f"{name}-golden.csv")}
        elo = ratings.elo(games, k=4)
        off = max(abs(elo[m] - golden["elo", m]) for m in games.models)
        yield Row("evalica 2ebe79e3", f"{name}: Elo, off by at most", off, "0", 1e-9)
        models = (("half", "bradley_terry", "Bradley-Terry"), ("davidson", "newman", "Davidson's ties"))
        for ties, algorithm, of in models:
            p = np.exp(ratings.bradley_terry(games, ties)["strengths"])
            theirs = np.array([golden[algorithm, m] for m in games.models])
            off = np.abs(p / p.sum() - theirs / theirs.sum()).max()
            yield Row("evalica 2ebe79e3", f"{name}: {of}, shares off by at most", float(off), "0", 1e-9)


# ----------------------------------------------------------------------- safety, rewards, multiple choice

XSTEST = {"gpt4": ("98.4", "0.97", "6.4", "97.5"), "llama2orig": ("96.4", "0.93", "38.0", "99.5")}


def xstest(data: Path) -> Iterator[Row]:
    unsafe = {i: prompt["unsafe"] for i, prompt in safety.read_xstest(data / "safety" / "xstest_prompts.csv").items()}
    for model, published in XSTEST.items():
        rows = objects(data / "safety" / f"xstest_{model}.jsonl.gz")
        people = np.array([[int(row[f"annotation_{n}"][0]) for row in rows] for n in (1, 2)], dtype=float)
        final = {row["id"].removeprefix("v2-"): row["final_label"][2:] for row in rows}
        rates = safety.refusal_rates(final, unsafe, by="people")
        refused = [100 * rates[side]["full_refusal"] / rates[side]["n"] for side in ("safe", "unsafe")]
        ours = (100 * raw_agreement(people)["agreement"], fleiss_kappa(people), *refused)
        measures = ("people agree, %", "Fleiss' kappa", "safe prompts refused, %", "unsafe prompts refused, %")
        for measure, x, value in zip(measures, ours, published, strict=True):
            yield Row("XSTest paper", f"{model}: {measure}", x, value)


# allenai/reward-bench 05a9005e
REWARDBENCH = {"Chat": "78.4916", "Chat Hard": "66.2281", "Safety": "84.3243", "Reasoning": "80.4656",
               "score, no prior sets": "77.3774"}


def rewardbench(data: Path) -> Iterator[Row]:
    def given(shares) -> dict[str, dict]:
        return {name: {"value": x, "low": x, "high": x} for name, x in shares if isinstance(x, float)}

    shares = json.loads((data / "rewardbench" / "GPM-Gemma-2B.json").read_text())
    found = rewards.section_scores(given(shares.items()))
    for name, published in REWARDBENCH.items():
        yield Row("RewardBench leaderboard", f"GPM-Gemma-2B: {name}, %", 100 * found[name]["value"], published)
    paper = json.loads((data / "rewardbench" / "paper_tables_visible.json").read_text())
    sections = {"Table 8 Chat": "Chat", "Table 11 Reasoning": "Reasoning", "Table 12 Prior sets": "prior sets"}
    for title, section in sections.items():
        off = []
        for average, *shares in paper[title]["rows"].values():
            parts = given(zip(paper[title]["columns"][1:], shares, strict=True))
            found = rewards.section_scores({}, parts) if section == "prior sets" else rewards.section_scores(parts)
            off.append(abs(found[section]["value"] - average))
        yield Row("RewardBench paper", f"{title}: off by at most, {len(off)} models", max(off), "0", 0.1)


# EleutherAI/lm-evaluation-harness b281b092, tests/testdata: log-likelihoods drawn at random in the order of the
# requests.
TRUTHFULQA = {"mc1": "0.23255813953488372", "mc1_stderr": "0.01478915753108052", "mc2": "0.4462325560722362",
              "mc2_stderr": "0.004986523944692003"}
MMLU = {"abstract_algebra": ("0.32", "0.34"), "astronomy": ("0.2565789473684211", "0.29605263157894735"),
        "business_ethics": ("0.29", "0.27"), "college_computer_science": ("0.22", "0.24"),
        "formal_logic": ("0.25396825396825395", "0.2698412698412698"),
        "world_religions": ("0.21637426900584794", "0.22807017543859648")}


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
    same = found["request_sha256"] in [x["request_sha256"] for x in hashes]
    yield Row(harness, "TruthfulQA: hash of all requests", float(same), "1")
    exam = choices.read_exam("mmlu_v0", folder / "mmlu_test.jsonl.gz", shots=0)
    found = choices.measure(exam, drawn(exam))["subjects"]
    hashes = json.loads((folder / "mmlu_harness_fixtures.json").read_text())
    for subject, published in MMLU.items():
        for metric, value in zip(("acc", "acc_norm"), published, strict=True):
            yield Row(harness, f"MMLU {subject}: {metric}", found[subject][metric], value, 1e-12)
    same = sum(found[subject]["request_sha256"] == x["harness_v0_request_sha256"] for subject, x in hashes.items())
    yield Row(harness, "MMLU: subjects whose hash of all requests is the same", same, "6")


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "AlpacaEval": alpaca_eval, "MT-Bench": mt_bench, "Vicuna's 80 questions": vicuna, "PandaLM": pandalm,
    "LLMBar": llmbar, "Krippendorff's alpha": krippendorff, "Elo and Bradley-Terry": rating_models, "XSTest": xstest,
    "RewardBench": rewardbench, "Multiple choice": multiple_choice}


# --------------------------------------------------------------------------------------- all of them

def markdown(rows: list[dict]) -> str:
    lines = ["# Published numbers and ours", "",
             f"{sum(row['met'] for row in rows)} of {len(rows)} are met: ours rounds to what was printed, or is as "
             "near as the last column allows. *Recomputed* numbers were printed nowhere: other code got them from the "
             "same files. `REAL_DATA=FOLDER WRITE=1 python -m pytest tests/test_published.py`"]
    for part in dict.fromkeys(row["part"] for row in rows):
        lines += ["", f"## {part}", "", "| measure | ours | published | difference | by | allowed |", "|---" * 6 + "|"]
        for row in (row for row in rows if row["part"] == part):
            ours = f"{row['ours']:.10g}" if row["ours"] == 0 or abs(row["ours"]) >= 1e-3 else f"{row['ours']:.1e}"
            lines.append(f"| {row['measure']} | {ours} | {row['published']} | {row['difference']:+.1g} | {row['of']} | "
                         f"{row['within'] or 'rounding'}{'' if row['met'] else ' **not met**'} |")
    return "\n".join(lines) + "\n"


def write(name: str, report: dict, text: str = "") -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    if text:
        (RESULTS / f"{name}.md").write_text(text)


@pytest.fixture(scope="module")
def rows():
    """Every row that was computed; written when all parts were."""
    found: list[dict] = []
    yield found
    if WRITE and len({row["part"] for row in found}) == len(PARTS):
        write("published", {"rows": found}, markdown(found))


def test_a_published_number_is_met_if_ours_rounds_to_it():
    cases = ((0.8451, "0.85"), (0.8549, "0.85"), (0.8551, "0.85"), (0.84949, "0.8495"), (5, "5"), (6, "5"))
    met = [Row("", "", ours, printed).met for ours, printed in cases]
    assert met == [True, True, False, True, True, False]
    assert Row("", "", 19.83, "19.55", 0.3).met and not Row("", "", 19.86, "19.55", 0.3).met


@real
@pytest.mark.parametrize("part", PARTS)
def test_published_numbers_are_met(part, rows):
    found = list(PARTS[part](Path(os.environ["REAL_DATA"]) / "judge"))
    rows += [{"part": part, **row._asdict(), "ours": float(row.ours),
              "difference": float(row.ours) - float(row.published), "met": row.met} for row in found]
    assert found and [row for row in found if not row.met] == []


# ------------------------------------------------------------------------------ published data sets

def records_of(path: Path, name: str) -> dict:
    """A file's format; its records in, used, out (a tree of messages gives many) and rejected, by reason.

    A reject is a record or, in one that is used, a part of it.
    """
    records, report = read_records(path)
    for _ in records:
        pass
    return {"file": name, "format": report.native or None, "form": report.format or None, "in": report.read,
            "used": report.used, "out": report.out, "rejects": dict(report.kinds.most_common())}


@real
def test_every_published_data_set_is_read_as_its_committed_counts_say():
    folder, suffixes = Path(os.environ["REAL_DATA"]) / "datasets", (".json", ".jsonl", ".csv", ".txt")
    files = [path for path in sorted(folder.rglob("*"))
             if path.is_file() and path.name.removesuffix(".gz").endswith(suffixes)]
    found = [records_of(path, str(path.relative_to(folder))) for path in files]
    if not WRITE:
        committed = {row["file"]: row for row in json.loads((RESULTS / "formats.json").read_text())["rows"]}
        both = [row for row in found if row["file"] in committed]
        assert len(both) > 30 and both == [committed[row["file"]] for row in both]
        return
    total = {"files": len(found), "formats": len({row["format"] for row in found}), "of": len(FORMATS),
             **{key: sum(row[key] for row in found) for key in ("in", "used", "out")}}
    command = "REAL_DATA=FOLDER WRITE=1 python -m pytest tests/test_published.py"
    lines = ["# Data files read", "",
             f"`{command}`: {total['files']} files, {total['formats']} of the {total['of']} formats: "
             f"{total['in']:,} records in, {total['used']:,} used, {total['out']:,} out", "",
             "| file | format | form | in | used | out | rejects |", "|---|---|---|---:|---:|---:|---|"]
    for row in found:
        rejects = ", ".join(f"{count} {kind}" for kind, count in row["rejects"].items())
        cells = [row[key] for key in ("file", "format", "form", "in", "used", "out")]
        lines.append(f"| {' | '.join(map(str, cells))} | {rejects} |")
    write("formats", {"command": command, **total, "rows": found}, "\n".join(lines) + "\n")


# ----------------------------------------------------------------------------------------- families

def beside_transformers(folder: Path) -> dict:
    """A family's largest logit difference, over plain and padded rows; its greedy tokens and tokenizer cases: how many
    are those of transformers, of how many."""
    model, expected = load_model(folder), load_file(folder / "expected.safetensors")
    ids, mask = expected["left.input_ids"], expected["left.attention_mask"]
    off = [model(expected["full.input_ids"]) - expected["full.logits"],
           model(ids, mask)[:, -1] - expected["left.last_logits"],
           model(expected["right.input_ids"], expected["right.attention_mask"]) - expected["right.logits"]]
    prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    greedy = [token for samples in generate(model, prompts, 24, temperature=0) for token in samples[0].tokens]
    theirs = expected["greedy.tokens"].flatten().tolist()
    tokenizer, cases = load_tokenizer(folder), json.loads((folder / "tokenizer_cases.json").read_text())
    texts = [case for case in cases["encode"]
             if "sentencepiece_ids" in case or not any(name in case["text"] for name in tokenizer.special)]
    encoded = [tokenizer.encode(case["text"]) == case.get("sentencepiece_ids", case["ids"]) for case in texts]
    chats = [tokenizer.render(case["messages"], add_generation_prompt=case["add_generation_prompt"])[0] == case["ids"]
             for case in (cases["chat"] if tokenizer.template else [])]
    return {"logits": max(x.abs().max().item() for x in off),
            "greedy": [sum(a == b for a, b in zip(greedy, theirs, strict=True)), len(theirs)],
            "encode": [sum(encoded), len(encoded)], "chat": [sum(chats), len(chats)]}


@pytest.mark.skipif(not WRITE, reason="writes a result file; tests/test_model.py and test_chat.py hold the facts")
def test_families_are_those_of_transformers():
    folders = [folder for folder in sorted((FIXTURES / "models").iterdir())
               if (folder / "tokenizer_cases.json").is_file()]
    found = {folder.name: beside_transformers(folder) for folder in folders}
    assert all(row["logits"] < 2e-4 and row["greedy"][0] == row["greedy"][1] for row in found.values())
    write("families", {"command": "WRITE=1 python -m pytest tests/test_published.py", "families": found})
