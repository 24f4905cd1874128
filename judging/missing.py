"""What is missing: questions without a reply, replies that are empty, cut or another model's, and what that costs."""
from collections.abc import Mapping, Sequence
from itertools import combinations

from judging.games import Answers, pairs_of
from judging.tables import abstained, place

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
