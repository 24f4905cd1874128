"""AI feedback as in UltraFeedback and Zephyr: several models answer, a judge marks, the best and another make a pair.

    python -m collect.ai_feedback prompts=prompts.jsonl models='["runs/a/model", "runs/b/model"]' judge=http://...#name
    python -m collect.ai_feedback rubric=aspects ...

Each prompt is answered by `answers` random models (Cui et al. 2023, arXiv:2310.01377: 4 of 17). Where there are fewer
models, one answers several times, with another top_p and top_k each time. The judge marks

    overall    each reply by itself, a critique that ends with a score from 1 to 10
    aspects    all replies side by side, shown in random order: instruction following, honesty, truthfulness and
               helpfulness, each from 1 to 5; a reply's score is the mean of its ratings, those N/A left out

Then, as for Zephyr (Tunstall et al. 2023, arXiv:2310.16944), chosen = the highest score, at random among equals;
rejected = a random other. If that one's score is as high, there is no pair (as published there was: 111 of 1,000). The
margin is the difference of the scores. Replies that are cut, empty or repeated are dropped before the judging.

    pairs.jsonl     {"id", "prompt", "chosen", "rejected", "margin", ...}     scored.jsonl    every reply with its marks
    replies.jsonl   raw replies, to resume from                               dropped.jsonl   what was left out, and why

Prompts are our own. Where we leave the published code: a score of 7.5 stays 7.5 (it was cut to 7) and 1 stays 1 (a
release made it 10); marks are read by their "Rating:" lines, so that a rationale may have paragraphs; a mark that
cannot be read is asked for again at temperature 1, for a greedy judge says the same again. The principles that
UltraFeedback gives each answering model are left out.
"""
import hashlib
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Literal

import runtime
from collect.synthetic import PROMPTS, Run, Settings, user
from data.formats import read
from data.llm import Request, Sampling, open_model

TEXTS = PROMPTS["ai_feedback"]
ASPECTS = TEXTS["aspects"]  # by name, what it means


@dataclass(frozen=True)
class Config(Settings):
    prompts: str = ""             # JSONL of {"prompt"} or {"messages"}, whose last reply is left out
    models: list[str] = ()        # who answers: checkpoint directories or endpoints
    judge: str = ""
    out: str = "runs/ai_feedback"
    rubric: Literal["overall", "aspects"] = "overall"
    answers: int = 4              # to a prompt
    judge_tokens: int = 1024
    attempts: int = 10            # to get a mark that can be read

    def __post_init__(self):
        super().__post_init__()
        self.at_least(2, "answers")
        self.at_least(1, "attempts")
        if not self.models:
            runtime.fail("models is empty, expected who answers, e.g. models='[\"runs/tiny/0/sft/model\"]'")


SAMPLINGS = ((1.0, 0), (0.9, 0), (1.0, 50), (0.8, 20))  # top_p and top_k of one model's first, second ... answer


def load_prompts(path: str) -> list[dict]:
    records, report = read(path)
    prompts = []
    for number, record in enumerate(records):
        if "prompt" not in record and "messages" not in record:
            runtime.fail(f"{path}: holds {report.format} records, expected 'prompt' or 'messages'")
        prompts.append({"id": str(record.get("id", number)), "category": record.get("category"),
                        "prompt": record["prompt"] if "prompt" in record else record["messages"][:-1]})
    report.refuse()
    return prompts


# ------------------------------------------------------------------------------------------ answers

def answer(run: Run, models: list, prompts: list[dict], config: Config) -> None:
    """Give each prompt its usable answers, {"model", "top_p", "top_k", "text"}."""
    asked = defaultdict(list)  # by model and sampling: a prompt, and the place among its answers
    for number, prompt in enumerate(prompts):
        rng, order = random.Random(f"{config.seed} models {number}"), []
        while len(order) < config.answers:
            order += rng.sample(range(len(models)), min(len(models), config.answers - len(order)))
        prompt["answers"] = [None] * config.answers
        for place, m in enumerate(order):
            asked[m, SAMPLINGS[order[:place].count(m) % len(SAMPLINGS)]].append((prompt, place))
    for m, (top_p, top_k) in sorted(asked):
        places = asked[m, (top_p, top_k)]
        requests = [Request(prompt["prompt"], repeat=place, tag=prompt["id"]) for prompt, place in places]
        sampling = Sampling(config.max_tokens, config.temperature, top_p, top_k)
        replies = run.ask(models[m], requests, f"answers, {m + 1}", sampling)
        for (prompt, place), reply in zip(places, replies, strict=True):
            given = {"model": models[m].name, "top_p": top_p, "top_k": top_k}
            prompt["answers"][place] = given | {"text": run.usable(reply, "answer", prompt=prompt["id"], **given)}
    for prompt in prompts:
        answers, prompt["answers"] = prompt["answers"], []
        for given in (given for given in answers if given["text"]):
            if given["text"] in [other["text"] for other in prompt["answers"]]:
                run.drop("answer", "said twice", prompt=prompt["id"], **given)
            else:
                prompt["answers"].append(given)


# ------------------------------------------------------------------------------------------ the judge

def material(prompt: list[dict], answers: list[str]) -> str:
    """The dialogue and the answers between markers. Their code is a hash of the texts, so no text can hold it."""
    texts = [*(m["content"] for m in prompt), *answers]
    code = hashlib.sha256("\0".join(texts).encode(errors="replace")).hexdigest()[:8]
    names = [*(m["role"] for m in prompt), *(f"answer {i}" for i in range(1, len(answers) + 1))]
    blocks = [f"<{name} {code}>\n{text}\n</{name} {code}>" for name, text in zip(names, texts, strict=True)]
    return TEXTS["material"].format(code=code, blocks="\n\n".join(blocks))


def read_overall(text: str) -> float:
    """The score after "Overall Score:"; ValueError if there is none, or two that differ, or it is not from 1 to 10."""
    form = r"Overall Score[\s:*_]*(-?\d{1,9}(?:\.\d{1,9})?)(?:\s*/\s*(\d+))?"
    scores = {(float(score), of) for score, of in re.findall(form, text, re.IGNORECASE)}
    if len({score for score, _ in scores}) != 1:
        raise ValueError("no score" if not scores else "two scores")
    score, of = max(scores)
    if not 1 <= score <= 10 or of not in ("", "10"):
        raise ValueError("a score that is not from 1 to 10")
    return score


def read_ratings(text: str, number: int) -> list[float | None]:
    """The ratings from 1 to 5 of `number` answers, None for N/A; ValueError if there are more, fewer, or others."""
    lines = re.findall(r"(?m)^[\s*_#-]*Rating[\s:*_]*(.*)$", text, re.IGNORECASE)
    if len(lines) != number:
        raise ValueError("too few ratings" if len(lines) < number else "too many ratings")
    ratings = []
    for line in lines:
        mark = re.match(r"(n/?a)\b|\D*?(-?\d{1,9})", line, re.IGNORECASE)
        if not mark or (mark[2] and not 1 <= int(mark[2]) <= 5):
            raise ValueError("a rating that is neither from 1 to 5 nor N/A")
        ratings.append(None if mark[1] else float(mark[2]))
    return ratings


def score(run: Run, judge, prompts: list[dict], config: Config) -> None:
    """Give each answer its "score", or drop it if there is none."""
    judged = [p for p in prompts if len(p["answers"]) > 1]
    if config.rubric == "overall":
        shown = [(p["id"], "", p["prompt"], [a]) for p in judged for a in p["answers"]]
    else:
        shown = [(f"{p['id']}, {aspect}", aspect, p["prompt"],
                  random.Random(f"{config.seed} order {p['id']} {aspect}").sample(p["answers"], len(p["answers"])))
                 for p in judged for aspect in ASPECTS]
    mark(run, judge, shown, config)
    for p in judged:
        for a in p["answers"]:
            ratings = a.get("ratings", {})
            known = [r for r in ratings.values() if r is not None]
            if known and len(ratings) == len(ASPECTS):
                a["score"] = sum(known) / len(known)
            if "score" not in a:
                run.drop("answer", "no score", prompt=p["id"], **a)


def mark(run: Run, judge, shown: list[tuple[str, str, list[dict], list[dict]]], config: Config) -> None:
    """Ask the judge about each (name, aspect, prompt, answers), and again where its marks cannot be read."""
    for attempt in range(config.attempts):
        if not shown:
            return
        requests = [Request(mark_prompt(aspect, prompt, answers), repeat=attempt)
                    for _, aspect, prompt, answers in shown]
        # top_p as published, though it changes nothing at temperature 0
        sampling = Sampling(config.judge_tokens, 1.0) if attempt else Sampling(config.judge_tokens, 0.0, 0.6)
        replies = run.ask(judge, requests, f"judge, attempt {attempt + 1}", sampling)
        shown = [question for question, reply in zip(shown, replies, strict=True)
                 if not run.usable(reply, "mark", partial(note, question), of=question[0])]


def mark_prompt(aspect: str, prompt: list[dict], answers: list[dict]) -> list[dict]:
    """For a mark of one answer, or for the ratings of several in one aspect."""
    about = material(prompt, [a["text"] for a in answers])
    if not aspect:
        return user(TEXTS["overall"].format(material=about))
    text = TEXTS["aspect"].format(number=len(answers), aspect=aspect, meaning=ASPECTS[aspect], material=about)
    return user(text)


def note(question: tuple[str, str, list[dict], list[dict]], text: str) -> bool:
    """Read the judge's marks into the answers asked about; ValueError if they cannot be read."""
    _, aspect, _, answers = question
    if not aspect:
        answers[0] |= {"score": read_overall(text), "critique": text}
        return True
    for a, rating in zip(answers, read_ratings(text, len(answers)), strict=True):
        a.setdefault("ratings", {})[aspect] = rating
    return True


def pair(prompt: dict, rng: random.Random) -> dict | str:
    """The preference of a prompt whose answers have scores, or why there is none."""
    scored = [a for a in prompt["answers"] if "score" in a]
    if len(scored) < 2:
        return "fewer than two usable answers"
    best = max(a["score"] for a in scored)
    chosen = rng.choice([a for a in scored if a["score"] == best])
    rejected = rng.choice([a for a in scored if a is not chosen])
    if rejected["score"] == best:
        return "tie"
    return {"id": prompt["id"], "category": prompt["category"], "prompt": prompt["prompt"], "chosen": chosen["text"],
            "rejected": rejected["text"], "margin": best - rejected["score"], "score_chosen": best,
            "score_rejected": rejected["score"], "model_chosen": chosen["model"], "model_rejected": rejected["model"]}


def main(config: Config, models: list | None = None, judge=None) -> None:
    prompts, run, pairs = load_prompts(config.prompts), Run(config), []  # before a model is loaded
    models = models or [open_model(where, config.device) for where in config.models]
    judge = judge or open_model(config.judge, config.device)
    answer(run, models, prompts, config)
    score(run, judge, prompts, config)
    for prompt in prompts:
        made = pair(prompt, random.Random(f"{config.seed} pair {prompt['id']}"))
        if isinstance(made, str):
            run.drop("prompt", made, prompt=prompt["id"])
        else:
            pairs.append(made | {"annotator": judge.name})
    run.write(f"{len(prompts)} prompts, {len(pairs)} pairs", pairs=pairs, scored=prompts)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
