"""Which replies meet, who is shown first, and what a judge says: from answers to rows of judging/tables.py.

At the end what is missing: questions without a reply, replies that are empty, cut or another model's, and what that
costs.
"""
import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import torch

from data.llm import Budget, Reply, Request, Sampling, ask, request_key
from data.store import NO_LIMIT
from judging.prompts import Question, Verdict, ask_pair, ask_score, read_verdict
from judging.ratings import outcome
from judging.rewards import load_scorer
from judging.tables import IDENTICAL, abstained, describe, place


class Answers(NamedTuple):
    questions: list[Question]
    said: dict[tuple[str, int], list[list[dict]]]  # (model, seed) -> {"text", "finished"} by question and turn

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.said))


class Judge(NamedTuple):
    name: str
    model: object                 # data.llm.open_model
    form: str                     # judging/prompts.py
    wording: str
    max_tokens: int               # of an answer
    ledger: Path                  # of every answer as it was
    budget: Budget | None = None

    def ask(self, requests: list[Request], form: str, progress: str) -> list[tuple[str, Verdict]]:
        """Of each request the key that its answer, or failure, has in the ledger, and the verdict."""
        sampling, reasons = Sampling(self.max_tokens, 0.0), {}
        replies = ask(self.model, requests, sampling, self.ledger, self.budget, progress, reasons)
        keys = [request_key(self.model.name, request, sampling) for request in requests]
        return [(key, Verdict(None, f"no reply: {reasons.get(key, '')}") if reply is None else _read(reply, form))
                for key, reply in zip(keys, replies, strict=True)]


def _read(reply: Reply, form: str) -> Verdict:
    labels = {} if reply.thoughts else reply.labels  # they are those of the first token, which was a thought's
    verdict = read_verdict(reply.text, form, labels, reply.finished)
    thinking = reply.thoughts and not reply.text.strip() and not reply.finished
    return verdict._replace(why="cut in its thoughts") if thinking else verdict


class Match(NamedTuple):
    """Two models' replies to one turn of a question."""

    question: int
    turn: int      # from 1
    seed: int
    a: str
    b: str


def pairs_of(answers: Answers, baseline: str, all_pairs: bool) -> list[tuple[int, int, tuple[str, str]]]:
    """(question, seed, two models): each model with the baseline, or all with all."""
    pairs = [(a, b) for a, b in combinations(answers.names, 2) if all_pairs or baseline in (a, b)]
    return list(product(range(len(answers.questions)), sorted({seed for _, seed in answers.said}), pairs))


def matches(answers: Answers, baseline: str, all_pairs: bool) -> list[Match]:
    """Every pair of replies to compare, where both models have a reply."""
    found = []
    for q, seed, (a, b) in pairs_of(answers, baseline, all_pairs):
        turns = min(len(answers.said[a, seed][q]), len(answers.said[b, seed][q]))
        found += [Match(q, turn + 1, seed, a, b) for turn in range(turns)]
    return found


def in_orders(found: list[Match], orders: str, names: list[str]) -> list[tuple[Match, bool]]:
    """Each match with whether a is shown first: "both" ways, "one" drawn by lot (AlpacaEval), or "balanced".

    Balanced: the models sit on a circle, and each is shown before those in the half after it; the next question turns
    that around. Over two questions every model is as often first as second, and so is every pair.
    """
    if orders == "both":
        return [(m, first) for m in found for first in (True, False)]

    def first(m: Match) -> bool:
        if orders == "one":
            drawn = hashlib.sha256(f"{m.question} {m.turn} {m.seed} {sorted((m.a, m.b))}".encode()).digest()[0] % 2
            return drawn == (m.a < m.b)
        distance = (names.index(m.b) - names.index(m.a)) % len(names)
        before = 2 * distance < len(names) or (2 * distance == len(names) and m.a < m.b)
        return before ^ bool((m.question + m.seed) % 2)

    return [(m, first(m)) for m in found]


def compare(judge: Judge, games: list[tuple[Match, bool]], answers: Answers, *, unbiased: bool = False,
            identical: bool = False, progress: str = "") -> list[dict]:
    """The verdicts on all games, as rows. Equal replies tie without being asked, once, unless `identical` is set."""
    requests, asked, same = [], [], {}
    for m, a_first in games:
        a, b = texts_of(m, answers)
        row = _row(judge.name, m, answers)
        if a == b and not identical:
            same[m] = row | {"a_first": None, "preference": 0.5, "rating": None, "why": IDENTICAL}
            continue
        a, b = (a, b) if a_first else (b, a)
        messages = ask_pair(answers.questions[m.question], a, b, judge.form, judge.wording, unbiased)
        requests.append(Request(messages, labels=("A", "B") if judge.form == "label" else ()))
        asked.append(row | {"a_first": a_first})
    for row, (key, verdict) in zip(asked, judge.ask(requests, judge.form, progress or judge.name), strict=True):
        p, rating = verdict.value, verdict.rating
        if judge.form == "margin" and rating:  # a choice and a margin, on the scale of eight
            rating = 5 - rating if p == 1 else 4 + rating
        row |= {"preference": p if p is None or row["a_first"] else 1 - p, "rating": rating, "why": verdict.why,
                "key": key}
    return asked + list(same.values())


def mark(judge: Judge, answers: Answers) -> list[dict]:
    """Every reply marked alone, 1 to 10, as rows of scores."""
    requests, rows = [], []
    for (name, seed), replies in answers.said.items():
        for q, said in zip(answers.questions, replies, strict=True):
            for turn in range(1, len(said) + 1):
                requests.append(Request(ask_score(q, [r["text"] for r in said[:turn]], judge.wording)))
                rows.append({"judge": judge.name, "prompt": q.id, "category": q.category, "turn": turn, "repeat": seed,
                             "model": name})
    for row, (key, verdict) in zip(rows, judge.ask(requests, "score", f"{judge.name}: marks"), strict=True):
        row |= {"score": verdict.value, "why": verdict.why, "key": key}
    return rows


def games_from_scores(name: str, found: list[Match], scores: dict[tuple[str, int], list[list[float]]],
                      answers: Answers) -> list[dict]:
    """Rows decided by which reply has the higher score, equal ones are ties; no reply is shown first."""
    rows = []
    for m in found:
        p = outcome(*(scores[model, m.seed][m.question][m.turn - 1] for model in (m.a, m.b)))
        a, b = texts_of(m, answers)
        why = {"why": IDENTICAL} if a == b else {}
        rows.append(_row(name, m, answers) | {"a_first": None, "preference": p} | why)
    return rows


def texts_of(m: Match, answers: Answers) -> tuple[list[str], list[str]]:
    """What each of the two has said up to this turn."""
    a, b = ([r["text"] for r in answers.said[name, m.seed][m.question][:m.turn]] for name in (m.a, m.b))
    return a, b


def reward_scores(path: str, answers: Answers, device: torch.device) -> dict[tuple[str, int], list[list[float]]]:
    """A reward model's score of every reply, by model and seed, question and turn."""
    questions = []
    for key, replies in answers.said.items():
        for i, (question, said) in enumerate(zip(answers.questions, replies, strict=True)):
            dialogue = []
            for turn, (asked, reply) in enumerate(zip(question.turns, said, strict=False)):
                dialogue = [*dialogue, {"role": "user", "content": asked}]
                questions.append({"key": (key, i, turn), "prompt": dialogue, "answers": [reply["text"]]})
                dialogue = [*dialogue, {"role": "assistant", "content": reply["text"]}]
    found = load_scorer("reward", path, max_length=NO_LIMIT, device=str(device))(questions)
    return {key: [[found[key, i, turn][0] for turn in range(len(said))] for i, said in enumerate(replies)]
            for key, replies in answers.said.items()}


def _row(name: str, m: Match, answers: Answers) -> dict:
    q = answers.questions[m.question]
    about = {f"{key}_{side}": value for side, model in (("a", m.a), ("b", m.b))
             for key, value in describe(answers.said[model, m.seed][m.question][m.turn - 1]["text"]).items()}
    return {"judge": name, "prompt": q.id, "category": q.category, "turn": m.turn, "repeat": m.seed, "a": m.a, "b": m.b,
            **about}


# ----------------------------------------------------------------------------------- what is missing

LOWEST = 1.0  # mark of a reply that did not come
RULES = {"common": "Two models are compared on what both answered, and marks are averaged over what all answered.",
         "loss": f"What one of two models did not answer it lost, and its mark there is {LOWEST:g}."}


def replies_section(answers: Answers, judged: Mapping[str, Sequence[dict]], missing: str) -> dict:
    """Of every model how much was asked, answered and judged; what is lost is said first."""
    asked = sum(len(q.turns) for q in answers.questions)
    lines, losses = [], []
    for name in answers.names:
        mine = [replies for (model, _), replies in answers.said.items() if model == name]
        said = [reply for replies in mine for turns in replies for reply in turns]
        here = sum(bool(turns) for replies in mine for turns in replies)
        if len(said) < asked * len(mine):
            losses.append(f"{name} answered {here} of {len(answers.questions) * len(mine)} questions, "
                          f"{len(said)} of {asked * len(mine)} turns.")
        lines.append([name, asked * len(mine), len(said), asked * len(mine) - len(said),
                      sum(not reply["text"].strip() for reply in said), sum(not reply["finished"] for reply in said),
                      *(n for rows in judged.values() for n in judgments_of(name, rows))])
    text = [*losses, *[RULES[missing]] * bool(losses), *same_answers(answers),
            "Empty and cut replies are replies, and judged; cut is what ended at max_tokens or by a server's filter. "
            "Judged: replies with at least one verdict; unread: verdicts on them that could not be read."]
    return {"title": "Replies", "text": " ".join(text), "rows": lines,
            "columns": ["model", "turns asked", "answered", "no reply", "empty", "cut",
                        *(f"{judge}: {what}" for judge in judged for what in ("judged", "unread"))]}


def judgments_of(model: str, rows: Sequence[dict]) -> tuple[int, int]:
    """How many of the model's replies have a verdict, and how many verdicts on it could not be read."""
    mine = [row for row in rows if model in (row.get("a"), row.get("b"), row.get("model"))
            and row.get("why") != "unanswered" and not abstained(row)]
    read = [row for row in mine if row["score" if "score" in row else "preference"] is not None]
    return len(set(map(place, read))), len(mine) - len(read)


def same_answers(answers: Answers) -> list[str]:
    """A sentence for every two models that gave the same replies throughout."""
    found = []
    for a, b in combinations(answers.names, 2):
        said = [[[[r["text"] for r in turns] for turns in replies] for (name, _), replies in answers.said.items()
                 if name == model] for model in (a, b)]
        if said[0] == said[1] and any(turns for replies in said[0] for turns in replies):
            found.append(f"{a} and {b} gave identical replies throughout: is one of them named twice?")
    return found


def lost_games(judge: str, answers: Answers, baseline: str, all_pairs: bool) -> list[dict]:
    """A row for every turn that one model of a pair answered and the other did not, lost by the other."""
    found = []
    for q, seed, (a, b) in pairs_of(answers, baseline, all_pairs):
        said_a, said_b = (len(answers.said[name, seed][q]) for name in (a, b))
        lost = {"a_first": None, "preference": float(said_a > said_b), "rating": 1 if said_a > said_b else 8,
                "why": "unanswered"}
        question = answers.questions[q]
        found += [{"judge": judge, "prompt": question.id, "category": question.category, "turn": turn, "repeat": seed,
                   "a": a, "b": b} | lost for turn in range(min(said_a, said_b) + 1, max(said_a, said_b) + 1)]
    return found


def lost_marks(judge: str, answers: Answers) -> list[dict]:
    """The lowest mark for every turn without a reply."""
    return [{"judge": judge, "prompt": q.id, "category": q.category, "turn": turn, "repeat": seed, "model": name,
             "score": LOWEST, "why": "unanswered"}
            for (name, seed), replies in answers.said.items()
            for q, said in zip(answers.questions, replies, strict=True)
            for turn in range(len(said) + 1, len(q.turns) + 1)]
