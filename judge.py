"""Measure chatbots: let them answer, let judges compare the answers, and put the judges on trial too.

    python judge.py --config configs/tiny/judge.toml         the tiny world's gold grades: report.html, report.json, judgments.jsonl
    python judge.py models='["mine=runs/x", "base=http://127.0.0.1:8000/v1#base"]' data=mt_bench.jsonl judges='["http://...#gpt-4o"]'
    python judge.py judges='["GPT-4=recorded:judgments.jsonl"]'                   what was judged elsewhere
    python judge.py --compare runs/a runs/b                  two reports side by side

Every model answers the same questions turn by turn, going on from its own replies. A judge sees two replies to a
question, in both orders unless told otherwise; it wins who wins in both (Zheng et al. 2023, arXiv:2306.05685). What
models and judges said is kept in ledgers (data/llm.py): a run that was killed goes on where it was, and what is made
of their words can be made anew for nothing. Where more than one verdict in twenty cannot be read, no mean is given.
"""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Literal

import torch

import runtime
from checkpoints import read_config
from data.llm import Budget, Request, Sampling, ask, open_model
from data.tiny.world import TASKS
from judging import boards, gold, recorded, report, tables, trial
from judging.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha, spearman
from judging.games import Answers, Judge, compare, games_from_scores, in_orders, mark, matches, reward_scores
from judging.prompts import Question
from judging.ratings import bootstrap_elo, bradley_terry, elo, likert_tables, mt_bench, win_rate
from judging.ratings import lc_win_rate as length_controlled_win_rate
from judging.tables import merge_orders as pairwise_verdicts
from runtime import check_range, fail

__all__ = ["bootstrap_elo", "bradley_terry", "cohen_kappa", "elo", "fleiss_kappa", "krippendorff_alpha", "length_controlled_win_rate",
           "mt_bench", "pairwise_verdicts", "spearman", "win_rate"]  # for notebooks: every measure from one place


@dataclass(frozen=True)
class Config:
    # Who is measured, on what.
    models: list[str] = ()           # "name=where": directory ({seed}: the seed), http://host/v1#name, answers.jsonl, few-shot:directory
    data: str = "runs/tiny/0/data/test.jsonl"  # JSONL of questions: the tiny world's dialogues, MT-Bench's, or {"prompt"}
    references: str = ""             # MT-Bench's reference answers to some of them
    out: str = "runs/judge"          # folder for report.html, report.json, judgments.jsonl and the ledgers
    seeds: list[int] = (0,)          # of the models; each gives replies of its own
    baseline: str = ""               # the model others are compared with; "": the first
    questions: int = 0               # the first so many; 0: all
    temperature: float = 0.7         # of the replies; 0: greedy
    max_tokens: int = 64             # of a reply; real chatbots need 1024
    show: int = 3                    # dialogues to print side by side

    # Who judges, and how.
    judges: list[str] = ("gold",)    # "name=where": gold, model directory, http://host/v1#name, reward:directory, recorded:file
    truth: str = ""                  # the judge the others are held against, such as people's votes; "": none
    form: Literal["pair", "label", "likert", "margin"] = "pair"  # what is asked (judging/prompts.py)
    wording: Literal["plain", "criteria", "solve", "bare"] = "plain"
    orders: Literal["both", "one", "balanced"] = "both"  # one: drawn by lot; balanced: by turns, each model as often left as right
    all_pairs: bool = False          # a tournament of all models instead of each against the baseline
    difficulty: str = ""             # JSON {question id: difficulty} for the full length control; "": the two-term one alone
    marks: bool = False              # judges also mark every reply alone, 1 to 10
    trial: int = 0                   # questions for the probes of the judge itself; 0: none
    sources: list[str] = ()          # "model=where its training data came from", for the table of self-preference
    judge_max_tokens: int = 512      # of a judge's answer
    force: bool = False              # means even where too many verdicts cannot be read
    budget: float = 0.0              # money for everything that endpoints are asked; 0: no limit
    prompt_price: float = 0.0        # of a million tokens
    reply_price: float = 0.0

    # What needs no comparison (judging/boards.py).
    choices: list[str] = ()          # "arc=file:examples" (or file:none), hellaswag, mmlu, truthfulqa=file: by log-likelihood
    reward_models: list[str] = ()    # "name=reward:directory", "name=dpo:directory:reference", "name=logprob:directory"
    preferences: list[str] = ()      # "set=file" of held-out pairs for them, such as SHP
    rewardbench: str = ""            # RewardBench's rows for them
    attacks: list[str] = ()          # "name=transcripts.jsonl:behaviours.jsonl" of collect/red_team.py, the latter if some were not tried
    xstest: str = ""                 # xstest_prompts.csv: what models refuse, and should not
    leak_probes: int = 0             # prompts with planted personal data; 0: none
    safety_judge: str = ""           # who decides on attacks and refusals: model directory or http://host/v1#name; "": nobody, or phrases
    device: str = "auto"
    threads: int = 0

    def __post_init__(self):
        if not (self.models or self.reward_models or self.attacks or any("recorded:" in judge for judge in self.judges)):
            fail('models is empty, expected e.g. models=["SFT=runs/sft/model", "DPO=runs/dpo/model"]')
        for key in ("models", "choices", "reward_models", "preferences", "attacks", "sources"):
            names = [entry.partition("=")[0] for entry in getattr(self, key)]
            for entry in getattr(self, key):
                if "=" not in entry:
                    fail(f"{key}: '{entry}' is not name=..., expected e.g. SFT=runs/sft/model")
            if len(set(names)) < len(names):
                fail(f"{key}: a name occurs twice in {', '.join(names)}: give each its own")
        names = [name for name, _ in self.named("models")]
        if self.baseline and names and self.baseline not in names:
            fail(f"baseline is '{self.baseline}', expected one of {', '.join(names)}")
        if self.truth and self.truth not in [name for name, _ in self.named("judges")]:
            fail(f"truth is '{self.truth}', expected one of the judges: {', '.join(name for name, _ in self.named('judges'))}")
        if not self.seeds:
            fail("seeds is empty, expected e.g. seeds=[0]")
        for key, low, high in (("temperature", 0, 10), ("max_tokens", 1, inf), ("judge_max_tokens", 1, inf), ("questions", 0, inf),
                               ("trial", 0, inf), ("show", 0, inf), ("budget", 0, inf), ("prompt_price", 0, inf), ("reply_price", 0, inf),
                               ("threads", 0, 1024)):
            check_range(key, getattr(self, key), low, high)
        for _, where in self.named("models"):
            paths = [where.replace("{seed}", str(seed)).removeprefix("few-shot:") for seed in self.seeds]
            for path in paths if "://" not in where else []:
                if not (path.endswith(".jsonl") and Path(path).is_file()) and not (Path(path) / "config.json").is_file():
                    fail(f"models: {path} holds no config.json, expected a model directory: train it first, or drop it")
                if not path.endswith(".jsonl") and read_config(path).scored:
                    fail(f"models: {path} is a reward model, expected one that replies: name the result of sft.py, dpo.py or ppo.py")
        for _, where in self.named("judges"):
            kind, path = where.partition(":")[0], where.removeprefix("reward:").removeprefix("recorded:")
            if kind == "recorded" and not Path(path).is_file():
                fail(f"judges: {path}: no such file, expected recorded judgments")
            if kind not in ("gold", "recorded", "http", "https") and not (Path(path) / "config.json").is_file():
                fail(f"judges: {path} holds no config.json, expected gold, a model directory, reward:directory, http://host/v1#name or "
                     "recorded:file")
            if kind not in ("gold", "recorded", "http", "https") and read_config(path).scored != (kind == "reward"):
                fail(f"judges: {path} has no score head, expected a reward model: train one with reward.py" if kind == "reward" else
                     f"judges: {path} is a reward model, expected one that replies: write reward:{path}")

    def named(self, key: str) -> list[tuple[str, str]]:
        """Entries "name=where" of a list as pairs; where alone is its own name."""
        split = (entry.partition("=") for entry in getattr(self, key))
        return [(name, where if equals else name) for name, equals, where in split]


# ----------------------------------------------------------------------------------------- answers

def load_questions(config: Config) -> tuple[list[Question], list[dict] | None]:
    """The questions, and if they are the tiny world's, its dialogues with what the grader needs."""
    path = Path(config.data)
    if not path.is_file():
        fail(f"data={path}: no such file, expected JSON lines of questions, such as test.jsonl of data/tiny/build.py")
    dialogues, asked, references = [], [], {}
    if config.references:
        references, _ = recorded_replies(config.references)
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = json.loads(line)
            turns = record.get("turns") or record.get("prompt") or record["instruction"]
            turns = [turns] if isinstance(turns, str) else turns
            if isinstance(turns[0], dict) and "role" in turns[0]:
                if len(turns) > 1:
                    fail(f"data={path} line {number}: holds a dialogue, expected what the user says alone: name its turns 'turns'")
                turns = [turns[0]["content"]]
            if isinstance(turns[0], dict):
                dialogues.append(record)
            texts = [turn["user"] if isinstance(turn, dict) else turn for turn in turns]
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise ValueError
            name = str(record.get("id", record.get("question_id", number)))
            right = references.get(name, record.get("reference") or [])
            asked.append(Question(name, record.get("category", record.get("dataset", "")), texts, right))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            fail(f"data={path} line {number}: is no question, expected 'turns', 'prompt' or 'instruction': mend or drop the line")
    if not asked or (dialogues and not all(d.get("category") in TASKS for d in dialogues)):
        fail(f"data={path}: holds no questions, expected lines with 'turns', 'prompt' or 'instruction'")
    many = config.questions or len(asked)
    return asked[:many], dialogues[:many] if len(dialogues) == len(asked) else None


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read ({error}), expected JSON lines: is it another kind of file?")


def answer(where: str, questions: list[Question], dialogues: list[dict] | None, config: Config, seed: int, progress: str, budget: Budget,
           device: torch.device) -> list[list[dict]]:
    """The replies to every turn of every question, [{"text", "finished"}] by turn; a turn whose reply failed ends the dialogue."""
    if where.endswith(".jsonl"):
        return read_answers(where, questions)
    if where.startswith("few-shot:"):
        if dialogues is None:
            fail(f"models: {where} shows examples of the tiny world, data={config.data} is something else: drop it")
        path = where.removeprefix("few-shot:")
        return gold.few_shot_answer(path, dialogues, config.max_tokens, config.temperature, seed, device, progress)
    model = open_model(where, config.device)
    sampling = Sampling(config.max_tokens, config.temperature)
    histories: list[list[dict]] = [[] for _ in questions]
    said: list[list[dict]] = [[] for _ in questions]
    for turn in range(max(len(q.turns) for q in questions)):
        going = [i for i, q in enumerate(questions) if len(q.turns) > turn and len(said[i]) == turn]
        for i in going:
            histories[i].append({"role": "user", "content": questions[i].turns[turn]})
        requests = [Request(histories[i], repeat=seed) for i in going]
        replies = ask(model, requests, sampling, Path(config.out) / "answers.jsonl", budget if "://" in where else None,
                      f"{progress}, turn {turn + 1}")
        for i, reply in zip(going, replies, strict=True):
            if reply is not None:
                said[i].append({"text": reply.text.strip(), "finished": reply.finished})
                histories[i] = [*histories[i], {"role": "assistant", "content": reply.text.strip()}]
    return said


def recorded_replies(path: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Replies by id and by instruction: {"id", "replies": [text, ...]}, MT-Bench's "choices", AlpacaEval's {"instruction", "output"}."""
    if not Path(path).is_file():
        fail(f"{path}: no such file, expected recorded replies")
    by_id, by_text = {}, {}
    for number, line in enumerate(read_lines(Path(path)), 1):
        try:
            record = json.loads(line)
            replies = record.get("replies") or (record["choices"][0]["turns"] if "choices" in record else [record["output"]])
            texts = [r["text"] if isinstance(r, dict) else r for r in replies]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            by_id[str(record.get("id", record.get("question_id", "")))] = by_text[record.get("instruction")] = texts
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            fail(f"{path} line {number}: is no answer, expected 'id' and 'replies', or 'instruction' and 'output': mend or drop the line")
    return by_id, by_text


def read_answers(path: str, questions: list[Question]) -> list[list[dict]]:
    """A file's replies to the questions; a question it does not answer gets none, and takes part in no game."""
    by_id, by_text = recorded_replies(path)
    found = [by_id.get(q.id, by_text.get(q.turns[0], [])) for q in questions]
    if not any(found):
        fail(f"{path}: answers none of the questions, expected the ids of data or its instructions")
    return [[{"text": text, "finished": True} for text in texts[:len(q.turns)]] for q, texts in zip(questions, found, strict=True)]


# ------------------------------------------------------------------------------------------ judges

ORDERS = {"both": "Both orders: a win needs both, else it is a tie.", "one": "One order only, drawn by lot.",
          "balanced": "One order only, each model as often first as second.", "": "No order: every reply has a score of its own.",
          "recorded": "One order of each comparison was recorded."}


@lru_cache
def recorded_judgments(path: str, baseline: str):
    said = recorded.read(path, options=recorded.Options(baseline=baseline))
    if not said.games and not said.scores:
        fail(f"judges: {path} holds no judgment that can be read, expected one of the formats of judging/recorded.py: name another file")
    return said


def hear(name: str, where: str, answers: Answers, dialogues: list[dict] | None, grades: dict | None, baseline: str, config: Config,
         budget: Budget, device: torch.device) -> tuple[list[dict], list[dict], list[dict]]:
    """One judge: its games, its marks, and the sections of the report about it."""
    compared = matches(answers, baseline, config.all_pairs)
    marks: list[dict] = []
    if where == "gold":
        rows = games_from_scores(name, compared, grades, answers)
        return rows, marks, verdict_sections(name, rows, marks, baseline, "", config)
    if where.startswith("reward:"):
        rows = games_from_scores(name, compared, reward_scores(where.removeprefix("reward:"), answers, device), answers)
        return rows, marks, verdict_sections(name, rows, marks, baseline, "", config)
    if where.startswith("recorded:"):
        said = recorded_judgments(where.removeprefix("recorded:"), baseline or "baseline")
        print(said)
        asked = load_questions(config)[0] if Path(config.data).is_file() else []
        category = {q.id: {"category": q.category} for q in asked}  # a file of scores may not name them
        marks = [category.get(str(row["prompt"]), {}) | row | {"judge": name} for row in said.scores]
        sections = [trial.people_section(said.games, name)]
        rows = [category.get(str(row["prompt"]), {}) | row for row in tables.majority(said.games, name)]
        known = [x for x in (baseline, "baseline", *(r["b"] for r in rows[:1])) if any(x in (r["a"], r["b"]) for r in rows)]
        baseline = next(iter(known), "")
        orders = "both" if len(tables.merge_orders(rows)[1]) else "recorded"
        sections += verdict_sections(name, rows, marks, baseline, orders, config)
        if rows:
            sections += [trial.position_section({"as recorded": rows}, name), trial.length_section(tables.merge_orders(rows)[0], name),
                         trial.right_section(rows, name)]
        return rows, marks, [s for s in sections if s]
    judge = Judge(name, open_model(where, config.device), config.form, config.wording, config.judge_max_tokens,
                  Path(config.out) / "calls.jsonl", budget if "://" in where else None)
    rows = compare(judge, in_orders(compared, config.orders, answers.names), answers)
    marks = mark(judge, answers) if config.marks else []
    sections = verdict_sections(name, rows, marks, baseline, config.orders, config)
    if config.trial:
        sections += trial.cross_examine(judge, rows, marks, answers, baseline, config.all_pairs, config.trial)
    return rows, marks, sections


def verdict_sections(judge: str, rows: list[dict], marks: list[dict], baseline: str, orders: str, config: Config) -> list[dict]:
    """What a judge says of the models."""
    sections: list[dict | None] = []
    if rows:
        merged = tables.merge_orders(rows)[0]
        if any(baseline in (r["a"], r["b"]) for r in merged):
            sections.append(tables.win_rate_section(merged, baseline, judge, ORDERS[orders], force=config.force,
                                                    difficulty=load_difficulty(config, merged)))
        if len({x for r in merged for x in (r["a"], r["b"])}) > 2:
            sections += tables.ratings_sections(merged, judge, force=config.force)
        sections.append(tables.category_section(merged, baseline, judge))
        if config.form == "likert" and orders and not tables.refused(rows, config.force):
            sections += likert_sections(judge, rows)
    if marks:
        sections += tables.score_sections(marks, judge, force=config.force)
    return [s for s in sections if s]


def load_difficulty(config: Config, rows: list[dict]) -> dict[str, float]:
    """AlpacaEval 2's difficulties of the instructions, or {}."""
    if not config.difficulty:
        return {}
    try:
        found = {str(name): float(value) for name, value in json.loads(Path(config.difficulty).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        fail(f"difficulty={config.difficulty}: cannot be read ({error}), expected JSON such as {{\"0\": -0.3, \"1\": 1.2}}")
    lacking = {str(r["prompt"]) for r in rows} - found.keys()
    return fail(f"difficulty={config.difficulty}: lacks {len(lacking)} questions, first {min(lacking)}: add them") if lacking else found


def likert_sections(judge: str, rows: list[dict]) -> list[dict]:
    """The talk's board: Elo from ratings 1 to 8, the slight ones read as ties, and not."""
    games = [(*((r["a"], r["b"]) if r["a_first"] else (r["b"], r["a"])), r["rating"], r["prompt"]) for r in rows if r.get("rating")]
    return [{"title": f"{judge}: Elo, {name}", "columns": ["model", "Elo", "rank"],
             "rows": [[x["model"], tables.bounded(x["rating"], x["low"], x["high"]), x["rank"]] for x in lines]}
            for name, lines in likert_tables(games).items()]


# ------------------------------------------------------------------------------------------ report

def judges_compared(by_judge: dict[str, list[dict]], config: Config) -> list[dict]:
    """The judges beside each other: whether they agree with the truth, and for whom they have a weakness."""
    sections = []
    if config.truth in by_judge:
        sections += [trial.agreement_section(by_judge, config.truth), trial.category_agreement_section(by_judge, config.truth)]
    sections.append(trial.self_preference_section(by_judge, dict(config.named("sources")), config.truth))
    return [s for s in sections if s]


def boards_sections(config: Config, budget: Budget, device: torch.device) -> list[dict]:
    sections = []
    seeded = {name: where.replace("{seed}", str(config.seeds[0])) for name, where in config.named("models")}
    if config.choices:
        local = {name: where for name, where in seeded.items() if (Path(where) / "config.json").is_file()}
        sections += boards.choice_sections(local, config.named("choices"), config.questions, device)
    if config.reward_models:
        sections += boards.reward_sections(config.named("reward_models"), config.named("preferences"), config.rewardbench, device)
    if config.attacks or config.xstest or config.leak_probes:
        asked = {name: where for name, where in seeded.items() if not where.startswith("few-shot:") and not where.endswith(".jsonl")}
        sections += boards.safety_sections(asked, config.named("attacks"), config.xstest, config.leak_probes, config.safety_judge,
                                           Path(config.out) / "calls.jsonl", budget, config.device)
    return sections


def write_replies(out: Path, answers: Answers, grades: dict | None, config: Config) -> None:
    """Every reply, with its grade if there is one; some questions side by side."""
    lines = []
    for (name, seed), replies in answers.said.items():
        for i, (question, said) in enumerate(zip(answers.questions, replies, strict=True)):
            graded = [r | {"gold": g} for r, g in zip(said, grades[name, seed][i], strict=True)] if grades else said
            lines.append(json.dumps({"id": question.id, "model": name, "seed": seed, "replies": graded}) + "\n")
    runtime.write_text(out / "replies.jsonl", "".join(lines))
    samples, many = [], len(answers.questions)
    for i in range(0, many, -(-many // config.show) if config.show else many + 1):
        samples.append(f"\n[{answers.questions[i].category}] {answers.questions[i].turns[0]}")
        for name in answers.names:
            for r in answers.said[name, config.seeds[0]][i][:1]:
                grade = f"{100 * grades[name, config.seeds[0]][i][0]:4.0f}  " if grades else ""
                samples.append(f"  {name:<22} {grade}{r['text']}{'' if r['finished'] else ' ...'}")
    runtime.write_text(out / "samples.txt", "\n".join(samples) + "\n")
    print("\n".join(samples) + "\n")


def main(config: Config) -> None:
    device = runtime.setup(config.device, 0, config.threads)
    out = runtime.open_folder(config.out)
    first = config.baseline or next((name for name, _ in config.named("models")), "")
    for _, where in config.named("judges"):
        if where.startswith("recorded:"):  # before models are asked
            recorded_judgments(where.removeprefix("recorded:"), first or "baseline")
    budget = Budget(money=config.budget or inf, prompt_price=config.prompt_price, reply_price=config.reply_price)
    result = {"title": "Models and their judges", "about": {"torch": torch.__version__}}
    answers, dialogues, grades, gold_sections, sections, found = Answers([], {}), None, None, [], [], {}
    graded = any(where == "gold" for _, where in config.named("judges"))
    if config.models and config.judges:
        questions, dialogues = load_questions(config)
        if graded and dialogues is None:
            fail(f"judges: gold grades the tiny world's dialogues, data={config.data} holds others: name another judge")
        answers = Answers(questions, {})
        for name, where in config.named("models"):
            for seed in config.seeds:
                place, label = where.replace("{seed}", str(seed)), f"{name}, seed {seed}"
                answers.said[name, seed] = answer(place, questions, dialogues, config, seed, label, budget, device)
        result["about"] |= {"data": config.data, "questions": len(questions), "temperature": config.temperature,
                            "seeds": " ".join(map(str, config.seeds))}
    baseline = config.baseline or next(iter(answers.names), "")
    if graded and answers.said:
        grades = gold.grade_all(answers, dialogues)
        result["gold"] = gold.summaries(answers, dialogues, grades, baseline)
        gold_sections = gold.sections(result["gold"], baseline, len(config.seeds))
    for name, where in config.named("judges"):
        if answers.said or where.startswith("recorded:"):
            *found[name], about = hear(name, where, answers, dialogues, grades, baseline, config, budget, device)
            sections += about
    heard = {name: rows for name, (rows, _) in found.items() if rows}
    if heard:
        sections.insert(0, trial.screen_section(heard, config.truth))
    sections += judges_compared(heard, config)
    sections += boards_sections(config, budget, device)
    result["sections"] = gold_sections + sections
    lines = (json.dumps(row) + "\n" for rows, marks in found.values() for row in [*rows, *marks])
    runtime.write_text(out / "judgments.jsonl", "".join(lines))
    if answers.said:
        write_replies(out, answers, grades, config)
    report.write(result, out)
    print(report.text(result))
    print(f"\nwrote {out}/report.html, report.json, judgments.jsonl" + (" and replies.jsonl" if answers.said else ""))


if __name__ == "__main__":
    if "--compare" in sys.argv:
        folders = sys.argv[sys.argv.index("--compare") + 1:]
        if len(folders) != 2:
            fail("--compare: expected two folders with a report.json, as in --compare runs/a runs/b")
        print(report.text(report.compare(folders)))
    else:
        main(runtime.load_config(Config, __doc__))
