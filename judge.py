"""Measure chatbots: let them answer, let judges compare the answers, and put the judges on trial too.

    python judge.py --config configs/tiny/judge.toml                the tiny world: every reply has a gold grade
    python judge.py models='["mine=runs/x", "base=http://127.0.0.1:8000/v1#base"]' data=mt_bench.jsonl \\
                    judges='["http://...#gpt-4o"]'                  a language model compares two others
    python judge.py judges='["GPT-4=recorded:judgments.jsonl"]'     what was judged elsewhere
    python judge.py --compare runs/a runs/b                         two reports side by side

A run writes report.html, report.json and judgments.jsonl; its config.toml repeats it. Every model answers the same
questions turn by turn, and sees its own earlier replies. A judge sees two replies to a question, in both orders by
default; a win needs both (Zheng et al. 2023, arXiv:2306.05685). What models and judges said is kept in ledgers
(data/llm.py): a killed run resumes, and a report can be made again without asking anyone. Where more than one verdict
in twenty cannot be read, no mean is given.

What was answered or judged elsewhere is joined to the questions by the ids of both, or else by what was asked, never by
its place (judging/questions.py). What is missing is said first (judging/games.py). Of several people the majority
counts, whatever side each of them saw (judging/people.py).
"""
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import runtime
from collect.raters import collect_labels, rater_section
from data.llm import Budget, Opener, Request, Sampling, ask, split_thoughts
from data.records import write_lines
from judging import boards, entries, games, gold, people, recorded, report, tables, trial
from judging.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha, spearman
from judging.entries import Entry, check_checkpoint, decode_all
from judging.games import Answers, Judge, compare, games_from_scores, in_orders, mark, matches, reward_scores
from judging.prompts import Question
from judging.questions import load_questions, name_prompts, read_answers, recorded_replies
from judging.ratings import bootstrap_elo, bradley_terry, elo, mt_bench, win_rate
from judging.ratings import lc_win_rate as length_controlled_win_rate
from judging.tables import merge_orders as pairwise_verdicts
from runtime import check_range, check_ranges, fail, find_device

# For notebooks: every measure, and what it is made from, in one place.
__all__ = ["bootstrap_elo", "bradley_terry", "cohen_kappa", "elo", "fleiss_kappa", "krippendorff_alpha",
           "length_controlled_win_rate", "load_questions", "mt_bench", "pairwise_verdicts", "read_answers",
           "recorded_replies", "spearman", "win_rate"]


@dataclass(frozen=True)
class Config:
    # Who is measured, on what.
    models: list[str] = ()           # "name=where": directory ({seed}: the seed), http://host/v1#name, answers.jsonl,
                                     # few-shot:directory
    data: str = "runs/tiny/0/data/test.jsonl"  # JSONL of questions: the tiny world's, MT-Bench's, or {"prompt"}
    references: str = ""             # MT-Bench's reference answers to some of them
    out: str = "runs/judge"          # folder for report.html, report.json, judgments.jsonl and the ledgers
    seeds: list[int] = (0,)          # of the models; each gives replies of its own
    baseline: str = ""               # the model others are compared with; "": the first
    questions: int = 0               # how many, from the first; 0: all
    missing: Literal["common", "loss"] = "common"  # a question that one of two models did not answer is left out, or
                                     # lost by it
    temperature: float = 0.7         # of the replies; 0: greedy
    temperatures: list[str] = ()     # "category=0.1" where it differs; MT-Bench's: 0.7 for writing and roleplay, 0 for
                                     # extraction, math, coding and reasoning, 0.1 for stem and humanities
    max_tokens: int = 64             # of a reply; real chatbots need 1024
    show: int = 3                    # dialogues side by side, on the screen and in the report

    # Who judges, and how.
    judges: list[str] = ("gold",)    # "name=where": gold, model directory, http://host/v1#name, reward:directory,
                                     # recorded:file
    truth: str = ""                  # the judge the others are held against, such as people's votes; "": none
    form: Literal["pair", "label", "likert", "margin"] = "pair"  # what is asked (judging/prompts.py)
    wording: Literal["plain", "criteria", "solve", "bare"] = "plain"
    orders: Literal["both", "one", "balanced"] = "both"  # one: drawn at random; balanced: each as often left as right
    all_pairs: bool = False          # a tournament of all models instead of each against the baseline
    subsets: list[str] = ()          # "name=category,category" of the prompts, for Elo by judge and subset; none: each
                                     # category, if they are two to four
    difficulty: str = ""             # JSON {question id: difficulty} for the full length control; "": two terms alone
    marks: bool = False              # judges also mark every reply alone, 1 to 10
    trial: int = 0                   # questions for the probes of the judge itself; 0: none
    sources: list[str] = ()          # "model=where its training data came from", for the table of self-preference
    judge_max_tokens: int = 512      # of a judge's answer
    budget: float = 0.0              # money for everything that endpoints are asked; 0: no limit
    prompt_price: float = 0.0        # of a million tokens
    reply_price: float = 0.0
    parallel: int = 8                # requests to an endpoint at a time
    timeout_s: float = 300.0         # for an endpoint's answer, which a reasoning model may take longer for

    # What needs no comparison (judging/boards.py).
    choices: list[str] = ()          # multiple choice: "arc=file:examples" (or file:none), hellaswag, mmlu,
                                     # truthfulqa=file
    reward_models: list[str] = ()    # "name=reward:directory", "name=dpo:directory:reference", "name=logprob:directory"
    preferences: list[str] = ()      # "set=file" of held-out pairs for them, such as SHP
    rewardbench: str = ""            # RewardBench's rows for them
    attacks: list[str] = ()          # "name=transcripts.jsonl" of collect/red_team.py, with ":behaviours.jsonl" if some
                                     # behaviours were not tried
    xstest: str = ""                 # xstest_prompts.csv: what models refuse, and should not
    leak_probes: int = 0             # prompts with planted personal data; 0: none
    safety_judge: str = ""           # model directory or http://host/v1#name; "": as recorded, and by phrases
    device: str = "auto"
    threads: int = 0

    def __post_init__(self):
        counts = ("questions", "trial", "show", "budget", "prompt_price", "reply_price", "leak_probes")
        check_ranges(self, temperature=(0, 10), max_tokens=(1, inf), judge_max_tokens=(1, inf), threads=(0, 1024),
                     parallel=(1, 1024), timeout_s=(1e-3, inf), **dict.fromkeys(counts, (0, inf)))
        models, judges, *others = (decode_all(key, getattr(self, key)) for key in (
            "models", "judges", "reward_models", "attacks", "choices", "preferences", "sources",
            "subsets"))
        category_temperatures(self.temperatures)
        if not (models or any(others[:2]) or any(judge.kind == "recorded" for judge in judges)):
            fail('models is empty, expected e.g. models=["SFT=runs/sft/model", "DPO=runs/dpo/model"]')
        if not self.seeds:
            fail("seeds is empty, expected e.g. seeds=[0]")
        model_names, judge_names = ([entry.name for entry in entries] for entries in (models, judges))
        if self.baseline and models and self.baseline not in model_names:
            fail(f"baseline is '{self.baseline}', expected one of {', '.join(model_names)}")
        if self.truth and self.truth not in judge_names:
            fail(f"truth is '{self.truth}', expected one of the judges: {', '.join(judge_names)}")
        if self.trial and len(models) == 1 and any(judge.kind in ("model", "endpoint") for judge in judges):
            fail(f"trial={self.trial} puts a judge on trial with two models' replies, and models names one: name "
                 "another, or set trial=0")
        for model, seed in product(models, self.seeds):
            if model.kind in ("model", "few-shot"):
                check_checkpoint("models", model.where.replace("{seed}", str(seed)), scored=False)
        for judge in judges:
            if judge.kind in ("model", "reward"):
                check_checkpoint("judges", judge.where, scored=judge.kind == "reward")


# ----------------------------------------------------------------------------------------- answers

def category_temperatures(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for name, _, where, _ in decode_all("temperatures", given):
        try:
            found[name] = float(where)
        except ValueError:
            fail(f"temperatures: '{name}={where}' holds no number, expected e.g. math=0")
        check_range(f"temperatures: {name}", found[name], 0, 10)
    return found


def answer(model: Entry, questions: list[Question], dialogues: list[dict] | None, sampling: Sampling, seed: int,
           ledger: Path, budget: Budget, opener: Opener,
           temperatures: dict[str, float] | None = None) -> list[list[dict]]:
    """The replies {"text", "finished"} by question and turn; a turn whose reply failed ends the dialogue.

    `temperatures`: of the categories that have one of their own.
    """
    where, progress = model.where.replace("{seed}", str(seed)), f"{model.name}, seed {seed}"
    temperatures = temperatures or {}
    if model.kind == "answers":
        return read_answers(where, questions)
    if model.kind == "few-shot":
        if dialogues is None:
            fail(f"models: {model.name} shows examples of the tiny world, data holds other questions: drop it")
        if temperatures:
            fail(f"temperatures: {model.name} shows examples and takes one temperature: leave one of the two out")
        return gold.few_shot_answer(where, dialogues, sampling.max_tokens, sampling.temperature, seed,
                                    find_device(opener.device), progress)
    opened, budget = opener.open(where), budget if model.kind == "endpoint" else None
    histories, said = ([[] for _ in questions] for _ in range(2))
    for turn in range(max(len(q.turns) for q in questions)):
        going = [i for i, q in enumerate(questions) if len(q.turns) > turn and len(said[i]) == turn]
        for i in going:
            histories[i].append({"role": "user", "content": questions[i].turns[turn]})
        replies = {}
        for warmth in dict.fromkeys(temperatures.get(questions[i].category, sampling.temperature) for i in going):
            mine = [i for i in going if temperatures.get(questions[i].category, sampling.temperature) == warmth]
            requests = [Request(histories[i], repeat=seed) for i in mine]
            said_now = ask(opened, requests, replace(sampling, temperature=warmth), ledger, budget,
                           f"{progress}, turn {turn + 1}")
            replies |= zip(mine, said_now, strict=True)
        for i, reply in replies.items():
            if reply is not None:
                text = split_thoughts(reply.text)[0]  # thoughts are no part of the reply; the ledger has them
                said[i].append({"text": text, "finished": reply.finished})
                histories[i] = [*histories[i], {"role": "assistant", "content": text}]
    return said


# ------------------------------------------------------------------------------------------ judges

ORDERS = {"both": "Both orders: a win needs both, else it is a tie.", "one": "One order only, drawn by lot.",
          "balanced": "One order only, each model as often first as second.",
          "": "No order: every reply has a score of its own.",
          "recorded": "One order of each comparison was recorded.",
          "people": "Each rater saw one order; an item is what most of its raters say, whatever side each saw."}


class Verdicts(NamedTuple):
    """What one judge said (judging/tables.py), against whom wins count, in which orders, and sections about it."""

    games: list[dict]
    marks: list[dict]
    baseline: str
    orders: str
    sections: list[dict | None]
    people: list[dict | None] = []   # sections about several people whose majority this is
    votes: list[dict] = []           # all games, of each of these people
    lost: list[dict] = []            # games that were not judged, for one model did not answer


def recorded_verdicts(name: str, said: recorded.Recorded, questions: list[Question], baseline: str,
                      config: Config) -> Verdicts:
    """Of people or judges whose verdicts were recorded: their majority, under `name`."""
    print(said)
    if questions and (why := name_prompts(said, questions, config.data)):
        print(why)
    marks, votes = [row | {"judge": name} for row in said.scores], said.games
    games = tables.majority(votes, name)
    names = {x for r in games for x in (r["a"], r["b"])}
    baseline = next((x for x in (baseline, "baseline", *(r["b"] for r in games[:1])) if x in names), "")
    merged, forward, _ = tables.merge_orders(games)
    several = people.votes_section(votes, name)
    sections = [trial.position_section({"as recorded": votes}, name), trial.length_section(merged, name)]
    raters = collect_labels(people.label_rows(votes)) if several else None
    left_out = "; ".join(f"{count} times: {reason}" for reason, count in said.kinds.most_common())
    about = [report.note(f"{name}: {len(said.rejects)} records left out", f"{left_out}.")] if said.rejects else []
    about += [several, people.agreement_section(votes, name)]
    about += [rater_section(raters, f"{name}: raters")] if raters and raters.raters else []
    orders = "people" if several else "both" if len(forward) else "recorded"
    return Verdicts(games, marks, baseline, orders, sections, about, votes)


def verdict_sections(judge: str, said: Verdicts, config: Config) -> list[dict]:
    """What a judge says of the models."""
    sections = []
    if merged := tables.merge_orders(said.games)[0] + said.lost:
        names = {x for r in merged for x in (r["a"], r["b"])}
        if said.baseline in names:
            known = load_difficulty(config.difficulty, merged) if config.difficulty else {}
            sections.append(tables.win_rate_section(merged, said.baseline, judge, ORDERS[said.orders], known))
        if len(names) > 2:
            sections += tables.ratings_sections(merged, judge)
        sections.append(tables.category_section(merged, said.baseline, judge))
        votes = said.votes or said.games
        rates = config.form in ("likert", "margin") or people.rated(votes)
        if said.orders and rates and not tables.refused(votes):
            sections += people.likert_sections(judge, votes + said.lost)
    if said.marks:
        sections += tables.score_sections(said.marks, judge)
    return [s for s in sections if s]


def load_difficulty(path: str, rows: list[dict]) -> dict[str, float]:
    """AlpacaEval 2's difficulties of the instructions."""
    try:
        found = {str(name): float(value) for name, value in json.loads(
            Path(path).read_text(encoding="utf-8-sig")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        fail(f"difficulty={path}: cannot be read ({error}), expected JSON such as {{\"0\": -0.3, \"1\": 1.2}}")
    if lacking := {str(r["prompt"]) for r in rows} - found.keys():
        fail(f"difficulty={path}: lacks {len(lacking)} questions, first {min(lacking)}: add them")
    return found


def judge_sections(verdicts: dict[str, Verdicts], config: Config) -> list[dict]:
    """All judges on one screen, what each says of the models and what its trial says of it, and whether they agree."""
    truth, sections = config.truth, []
    if games := {name: said.games for name, said in verdicts.items() if said.games}:
        subsets = {name: set(where.split(",")) for name, _, where, _ in decode_all("subsets", config.subsets)}
        votes = {name: (said.votes or said.games) + said.lost for name, said in verdicts.items() if said.orders}
        sections = [trial.screen_section(games, truth), people.leaderboard_section(votes, subsets)]
    for name, said in verdicts.items():
        sections += [*said.people, *verdict_sections(name, said, config), *said.sections]
    if truth in games:
        sections += [trial.agreement_section(games, truth), trial.category_agreement_section(games, truth)]
    marks = {name: said.marks for name, said in verdicts.items() if said.marks}
    if truth in marks:
        sections.append(trial.marks_agreement_section(marks, truth))
    taught = {source.name: source.where for source in decode_all("sources", config.sources)}
    return [s for s in [*sections, trial.self_preference_section(games, taught, truth)] if s]


# ------------------------------------------------------------------------------------------ report

def write_replies(out: Path, answers: Answers, grades: dict | None) -> None:
    """Every reply, with its grade if there is one."""
    rows = []
    for (name, seed), replies in answers.said.items():
        for i, (question, said) in enumerate(zip(answers.questions, replies, strict=True)):
            graded = [r | {"gold": g} for r, g in zip(said, grades[name, seed][i], strict=True)] if grades else said
            rows.append({"id": question.id, "model": name, "seed": seed, "replies": graded})
    write_lines(out / "replies.jsonl", rows)


def side_by_side(answers: Answers, grades: dict | None, show: int) -> dict:
    """A table of `show` dialogues, a row for each turn and a column for each model, of its first seed."""
    first, rows, many = dict(reversed(answers.said)), [], len(answers.questions)
    for i in range(0, many, -(-many // show)) if show else ():
        question = answers.questions[i]
        for turn, asked in enumerate(question.turns):
            cells = []
            for key in ((name, first[name]) for name in answers.names):
                said = answers.said[key][i]
                grade = f"{100 * grades[key][i][turn]:4.0f}  " if grades and turn < len(said) else ""
                cells += [f"{grade}{r['text']}{'' if r['finished'] else ' ...'}" for r in said[turn : turn + 1]] or [""]
            rows.append([asked if turn else f"[{question.category}] {asked}", *cells])
    return {"columns": ["asked", *answers.names], "rows": rows}


# Settings that move no number.
SILENT = ("out", "show", "threads", "budget", "prompt_price", "reply_price", "parallel", "timeout_s")


def about(config: Config, questions: list[Question], opener: Opener) -> dict:
    """Every setting that moves a number, and which versions of questions, models and judges these numbers are of."""
    found = {"date": date.today().isoformat(), "torch": torch.__version__}
    for key, value in vars(config).items():
        if key not in SILENT and value not in ("", [], (), False, None) or key == "temperature":
            found[key] = "; ".join(map(str, value)) if isinstance(value, list | tuple) else value
    found["unread at most"] = f"{tables.MOST_UNPARSED:.0%}"
    if questions:
        asked = json.dumps([[q.id, q.turns, q.references] for q in questions], ensure_ascii=False)
        found |= {"questions": len(questions), "questions' hash": entries.digest(asked)}
    named = [("models", entry) for entry in decode_all("models", config.models)]
    named += [("judges", entry) for entry in decode_all("judges", config.judges)]
    for key, entry in named:
        endpoint = opener.endpoints.get(entry.where)
        if endpoint:
            found[f"{key}: {entry.name} answered as"] = ", ".join(sorted(endpoint.served)) or "it does not say"
        elif entry.where:
            found[f"{key}: {entry.name}, hash"] = " ".join(entries.content_hash(entry, seed) for seed in config.seeds)
    return found


def main(config: Config) -> None:
    device, out = runtime.setup(config.device, 0, config.threads), runtime.open_folder(config.out)
    models, judges = decode_all("models", config.models), decode_all("judges", config.judges)
    baseline = config.baseline or next((model.name for model in models), "")
    elsewhere = {judge.name: recorded.read(judge.where, baseline or "baseline") for judge in judges
                 if judge.kind == "recorded"}
    if empty := [said.path for said in elsewhere.values() if not said.games and not said.scores]:
        fail(f"judges: {empty[0]} holds no judgment that can be read, expected a format of judging/recorded.py")
    budget = Budget(money=config.budget or inf, prompt_price=config.prompt_price, reply_price=config.reply_price)
    opener, result = Opener(str(device), config.parallel, config.timeout_s), {"title": "Models and their judges"}
    runtime.write_text(out / "config.toml", runtime.config_toml(config))

    # Every model answers.
    questions, dialogues, said, grades, sections, lost = [], None, {}, None, [], config.missing == "loss"
    graded = bool(models) and any(judge.kind == "gold" for judge in judges)
    if judges and (models or (elsewhere and Path(config.data).is_file())):
        questions, dialogues = load_questions(config, graded=graded)
    for model, seed in product(models, config.seeds) if judges else ():
        said[model.name, seed] = answer(model, questions, dialogues, Sampling(config.max_tokens, config.temperature),
                                        seed, out / "answers.jsonl", budget, opener,
                                        category_temperatures(config.temperatures))
    answers = Answers(questions, said)
    if graded:
        grades = gold.grade_all(answers, dialogues)
        result["gold"] = gold.summaries(answers, dialogues, grades, baseline, config.missing)
        sections = gold.sections(result["gold"], baseline, len(config.seeds)) if result["gold"] else []

    # Every judge compares the answers.
    compared, verdicts = matches(answers, baseline, config.all_pairs), {}
    for name, kind, where, _ in judges:
        if kind == "recorded":
            named = load_questions(config.data)[0] if questions and config.questions else questions
            verdicts[name] = recorded_verdicts(name, elsewhere[name], named, baseline, config)
        elif said and kind in ("gold", "reward"):
            scores = grades if kind == "gold" else reward_scores(where, answers, device)
            verdicts[name] = Verdicts(games_from_scores(name, compared, scores, answers), [], baseline, "", [])
        elif said:
            judge = Judge(name, opener.open(where), config.form, config.wording, config.judge_max_tokens,
                          out / "calls.jsonl", budget if kind == "endpoint" else None)
            rows = compare(judge, in_orders(compared, config.orders, answers.names), answers)
            marks = mark(judge, answers) if config.marks else []
            probed = trial.cross_examine(judge, rows, marks, answers, baseline, config.all_pairs, config.trial)
            marks += games.lost_marks(name, answers) if marks and lost else []
            verdicts[name] = Verdicts(rows, marks, baseline, config.orders, probed)
        if lost and said and kind != "recorded":
            unanswered = games.lost_games(name, answers, baseline, config.all_pairs)
            verdicts[name] = verdicts[name]._replace(lost=unanswered)
    if said:
        asked = {judge.name: verdicts[judge.name] for judge in judges if judge.kind != "recorded"}
        judged = {name: found.games + found.marks for name, found in asked.items()}
        sections = [games.replies_section(answers, judged, config.missing), *sections]
    sections += judge_sections(verdicts, config)

    # What needs no comparison, of the models of the first seed.
    models = [model._replace(where=model.where.replace("{seed}", str(config.seeds[0]))) for model in models]
    sections += boards.choice_sections(models, decode_all("choices", config.choices), config.questions, device)
    sections += boards.reward_sections(decode_all("reward_models", config.reward_models),
                                       decode_all("preferences", config.preferences), config.rewardbench, device)
    sections += boards.safety_sections(models, decode_all("attacks", config.attacks), config.xstest, config.leak_probes,
                                       config.safety_judge, out / "calls.jsonl", budget, opener)
    result["about"] = about(config, questions, opener)
    write_results(out, result | {"sections": sections}, verdicts, answers, grades, config.show)


def write_results(out: Path, result: dict, verdicts: dict[str, Verdicts], answers: Answers, grades: dict | None,
                  show: int) -> None:
    judged = (row for said in verdicts.values() for row in [*said.games, *said.lost, *said.marks])
    write_lines(out / "judgments.jsonl", judged)
    if answers.said:
        write_replies(out, answers, grades)
        found = side_by_side(answers, grades, show)
        samples = "".join(f"\n{asked}\n" + "".join(f"  {name:<22} {cell}\n" for name, cell in zip(
            answers.names, cells, strict=True)) for asked, *cells in found["rows"])
        runtime.write_text(out / "samples.txt", samples)
        print(samples)
        result["dialogues"] = found
    report.write(result, out)
    print(report.text(result))
    print(f"\nwrote {out}/report.html, report.json, judgments.jsonl" + (" and replies.jsonl" if answers.said else ""))


if __name__ == "__main__":
    if "--compare" in sys.argv:
        print(report.text(report.compare(sys.argv[sys.argv.index("--compare") + 1:])))
    else:
        main(runtime.load_config(Config, __doc__))
