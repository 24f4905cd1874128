"""UltraChat: two models talk, one of them plays the user (Ding et al. 2023, arXiv:2305.14233).

    python -m collect.ultrachat model=http://127.0.0.1:8000/v1#name dialogues=100       questions about the world
    python -m collect.ultrachat sector=writing ...      sector=materials materials=passages.jsonl ...
    python -m collect.ultrachat review=true ...         a person keeps, rephrases or drops, reply by reply

    questions   topics -> subtopics -> questions -> related questions -> 3 to 7 rounds
    writing     kinds of text -> instructions, 80 % of them made more detailed -> 2 to 4 rounds
    materials   passages -> questions or instructions, joined by a template -> 2 to 4 rounds
    openings    what a user says first, line by line from topics=FILE -> 3 to 7 rounds (ours)

    train.jsonl     {"id", "messages", "sector", "about"}      dropped.jsonl   what was left out, and why
    replies.jsonl   raw replies and a person's decisions, to resume from

Prompts and lists are our own. Lists are asked for ten items at a time. Before a list is expanded further a random
`dialogues` of its items are taken, since more are never needed; published were 1.57 million dialogues of all. The
first sector's Wikidata entities are not asked for: give them as topics=FILE. Nor are dialogues split for training at
2,048 tokens, as published: sft.py cuts what is longer than its max_length, and counts it.
"""
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import runtime
from collect.synthetic import PROMPTS, Run, Settings, swapped, user
from data.formats import read_all
from data.llm import Reply, Request, Sampling, ask, open_model
from data.records import fault

TEXTS = PROMPTS["ultrachat"]
ROUNDS = {"questions": (3, 7), "writing": (2, 4), "materials": (2, 4), "openings": (3, 7)}


@dataclass(frozen=True)
class Config(Settings):
    model: str = ""              # who answers: checkpoint directory or endpoint
    user_model: str = ""         # who plays the user; empty: the same
    out: str = "runs/ultrachat"
    sector: Literal["questions", "writing", "materials", "openings"] = "questions"
    topics: str = ""             # text file, a topic, kind of text or opening a line; empty: 30 topics, 20 kinds
    materials: str = ""          # JSONL of {"text"}
    dialogues: int = 100
    subtopics: int = 37          # of a topic: 1,100 of 30
    questions: int = 10          # of a subtopic
    related: int = 10            # of a question
    instructions: int = 200      # of a kind of text
    detailed: float = 0.8        # share of them made more detailed
    material_questions: int = 5  # of a passage
    fewest_rounds: int = 0       # 0: as published for the sector; shorter dialogues are dropped
    most_rounds: int = 0
    user_tokens: int = 256       # of a user's turn
    review: bool = False         # ask a person about every reply

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "dialogues", "subtopics", "questions", "instructions", "material_questions")
        self.at_least(0, "related")
        runtime.check_ranges(self, detailed=(0, 1), fewest_rounds=(0, 100),
                             most_rounds=(self.most_rounds and self.fewest_rounds, 100))


def load_about(config: Config) -> list[str]:
    """What the dialogues are about: topics, kinds of text, or passages."""
    if config.sector == "materials":
        if not Path(config.materials).is_file():
            runtime.fail(f"materials={config.materials}: no such file, expected JSON lines with \"text\"")
        return [record["text"] for record in read_all(config.materials, "text")]
    if not config.topics and config.sector != "openings":
        return TEXTS["topics" if config.sector == "questions" else "kinds"]
    try:
        lines = [line.strip() for line in Path(config.topics).read_text(encoding="utf-8-sig").split("\n")]
        wrong = "" if any(lines) else "is empty"
    except (OSError, UnicodeDecodeError) as error:
        wrong = f"cannot be read ({error})"
    if wrong:
        runtime.fail(f"topics={config.topics}: {wrong}, expected text, a topic, kind of text or opening a line")
    return list(filter(None, lines))


# ---------------------------------------------------------------------------------- opening lines

def read_items(text: str) -> tuple[list[str], list[str]]:
    """Items of a numbered or dotted list, and the lines that are none."""
    items, others = [], []
    for line in filter(str.strip, text.splitlines()):
        item = re.fullmatch(r"\s*(?:\d+\s*[.):]|[-*•])\s+(.*\w.*)", line)
        (items if item else others).append((item[1] if item else line).strip().strip('"*').strip())
    return items, others


def lists(run: Run, model, wishes: list[str], number: int, stage: str) -> list[list[str]]:
    """For every wish a list of at most `number` different items, ten of them a request."""
    parts = -(-number // 10)
    requests = [Request(user(TEXTS["list"].format(wish=wish, number=min(10, number))), repeat=part)
                for wish in wishes for part in range(parts)]
    found: list[dict[str, str]] = [{} for _ in wishes]
    for i, reply in enumerate(run.ask(model, requests, stage)):
        kept, reason = found[i // parts], fault(reply)
        items, others = read_items(reply.text) if reason in ("", "cut by length") else ([], [])
        faults = [(items.pop() if items else reply and reply.text, reason)] if reason else []
        faults += [(text, "not an item of the list") for text in others]
        for item in items:
            if len(kept) < number and item.casefold() not in kept:
                kept[item.casefold()] = item
            else:
                faults.append((item, "repeated" if item.casefold() in kept else "more than asked for"))
        for text, reason in faults:
            run.drop(stage, reason, of=wishes[i // parts], text=text)
    return [list(kept.values()) for kept in found]


def openings(run: Run, model, about: list[str], config: Config) -> list[dict]:
    """First turns of the user, and what they are about."""
    rng = random.Random(f"{config.seed} openings")

    def expand(parents: list[dict], number: int, stage: str) -> list[dict]:
        parents = rng.sample(parents, min(len(parents), config.dialogues))
        wishes = [TEXTS[stage].format(parent["text"]) for parent in parents]
        children = lists(run, model, wishes, number, stage)
        return [{"text": text, "about": [*parent["about"], parent["text"]]}
                for parent, texts in zip(parents, children, strict=True) for text in texts]

    found = [{"text": text, "about": []} for text in about]
    if config.sector == "questions":
        found = expand(found, config.subtopics, "subtopics")
        found = expand(found, config.questions, "questions")
        if config.related:
            found += expand(found, config.related, "related")
    elif config.sector == "writing":
        found = expand(found, config.instructions, "instructions")
        found = rng.sample(found, min(len(found), config.dialogues))
        short = [opening for opening in found if rng.random() < config.detailed]
        requests = [Request(user(TEXTS["details"].format(opening["text"]))) for opening in short]
        for opening, reply in zip(short, run.ask(model, requests, "details"), strict=True):
            # where it fails, the short one stays
            opening["text"] = run.usable(reply, "details", of=opening["text"]) or opening["text"]
    elif config.sector == "materials":
        found = expand(found, config.material_questions, "questions about passages")
        for opening in found:
            opening["text"] = rng.choice(TEXTS["templates"]).format(text=opening["about"].pop(),
                                                                   question=opening["text"])
    return rng.sample(found, min(len(found), config.dialogues))


# ------------------------------------------------------------------------------------- the dialogue

COURTESY = re.compile(r"(?:(?:oh|wow|ok|okay|alright)\b[,! ]*)?(?:many thanks|thanks|thank you|"
                      r"i (?:really |greatly )?appreciate|i'm (?:so |very )?grateful|good ?bye|bye|"
                      r"have a (?:nice|good|great|wonderful)|you're welcome|"
                      r"that(?:'s| is) (?:so |very |really )?(?:kind|helpful|great|wonderful))\b", re.IGNORECASE)
WISH = re.compile(r"\?|[,;:] (?:but|now|please|could|can|next|also|one)\b", re.IGNORECASE)


def without_courtesy(text: str) -> str:
    """A user's turn without the sentences that only thank, praise or say goodbye; one that also asks stays whole."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return " ".join(s for s in sentences if WISH.search(s) or not COURTESY.match(s))


def talk(run: Run, model, user_model, dialogues: list[dict], config: Config) -> None:
    """All dialogues round by round; each ends after the rounds drawn for it, or early, when a turn cannot be used."""
    for number in range(max((d["rounds"] for d in dialogues), default=0)):
        going = [d for d in dialogues if not d["ended"] and number < d["rounds"]]
        if number:
            user_turns(run, user_model, going, number, config)
        going = [d for d in going if not d["ended"]]
        while going:  # once, and again where a person rephrased the question
            going = assistant_turns(run, model, going, number, config)


def user_turns(run: Run, user_model, going: list[dict], number: int, config: Config) -> None:
    """The next thing each person says."""
    requests = [Request(user(TEXTS["person"]) + swapped(d["messages"]), tag=d["id"]) for d in going]
    sampling = Sampling(config.user_tokens, config.temperature)
    for d, reply in zip(going, run.ask(user_model, requests, f"user's turn {number + 1}", sampling), strict=True):
        text = run.usable(reply, "user's turn", dialogue=d["id"])
        turn = without_courtesy(text)
        if turn:
            d["messages"] += user(turn)
            continue
        d["ended"] = True
        if text:
            run.drop("user's turn", "only courtesy", dialogue=d["id"], text=reply.text)


def assistant_turns(run: Run, model, going: list[dict], number: int, config: Config) -> list[dict]:
    """The next reply of each dialogue, perhaps reviewed by a person; returns those whose question was rephrased."""
    requests = [Request(list(d["messages"]), tag=f"{d['id']} {d['rephrased']}") for d in going]
    replies = run.ask(model, requests, f"reply {number + 1}")
    texts = [run.usable(reply, "reply", dialogue=d["id"]) for d, reply in zip(going, replies, strict=True)]
    shown = [Request([*request.messages, {"role": "assistant", "content": text}, *user(CHOICES)], tag=request.tag)
             for request, text in zip(requests, texts, strict=True) if text and config.review]
    decisions = iter(ask(Person(), shown, Sampling(), run.ledger) if shown else [])
    again = []
    for d, text in zip(going, texts, strict=True):
        decision, _, turn = (next(decisions).text if text and config.review else "keep").partition(" ")
        if not text:
            d["ended"] = True
            d["messages"].pop()
        elif decision == "drop":
            run.drop("reply", "dropped by a person", dialogue=d["id"], text=text)
            d |= {"ended": True, "messages": []}
        elif decision == "rephrase":
            run.drop("review", "rephrased", dialogue=d["id"], text=d["messages"].pop()["content"])
            d["messages"] += user(turn)
            d["rephrased"] += 1
            again.append(d)
        else:
            d["messages"].append({"role": "assistant", "content": text})
    return again


CHOICES = "[k]eep, [r]ephrase what the user said, [d]rop the dialogue: "


class Person:
    """Who sits at the terminal, asked as a model is: what they decide is in replies.jsonl and is not asked again."""

    name = "a person"

    def replies(self, requests: list[Request], _: Sampling) -> Iterator[tuple[int, Reply]]:
        for i, request in enumerate(requests):
            for m in request.messages[:-1]:
                print(f"\n{m['role']}: {m['content']}")
            decision = turn = ""
            try:
                while not decision:
                    word = input(f"\n{CHOICES}").strip().lower()
                    decision = {"k": "keep", "r": "rephrase", "d": "drop"}.get(word[:1], "")
                while decision == "rephrase" and not turn:
                    turn = input("user: ").strip()
            except EOFError:
                runtime.fail("review: the input has ended, and more decisions are needed: run again to go on")
            yield i, Reply(f"{decision} {turn}", True, 0, 0, 0.0)


def main(config: Config, model=None, user_model=None) -> None:
    about, run = load_about(config), Run(config)  # before a model is loaded
    model = model or open_model(config.model, config.device)
    user_model = user_model or (open_model(config.user_model, config.device) if config.user_model else model)
    most = config.most_rounds or max(ROUNDS[config.sector][1], config.fewest_rounds)
    fewest = config.fewest_rounds or min(ROUNDS[config.sector][0], most)
    rng = random.Random(f"{config.seed} rounds")
    dialogues = [{"id": f"{config.sector}_{number}", "about": opening["about"], "messages": user(opening["text"]),
                  "rounds": rng.randint(fewest, most), "rephrased": 0, "ended": False}
                 for number, opening in enumerate(openings(run, user_model, about, config))]
    talk(run, model, user_model, dialogues, config)
    source, records = f"ultrachat, {user_model.name} asks, {model.name} answers", []
    for d in dialogues:
        messages = d["messages"][:len(d["messages"]) // 2 * 2]
        if len(messages) < 2 * fewest:
            run.drop("dialogue", f"fewer than {fewest} rounds", dialogue=d["id"], messages=messages)
            continue
        records.append({"id": d["id"], "messages": messages, "sector": config.sector, "about": d["about"],
                        "source": source})
    run.write(f"{len(dialogues)} dialogues, {len(records)} training records", train=records)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
