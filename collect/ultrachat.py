"""UltraChat: two models talk, one of them plays the user (Ding et al. 2023, arXiv:2305.14233).

    python -m collect.ultrachat model=http://127.0.0.1:8000/v1#name out=runs/ultrachat dialogues=100       questions about the world
    python -m collect.ultrachat sector=writing ...         sector=materials materials=passages.jsonl ...    the two other sectors
    python -m collect.ultrachat review=true ...            a person keeps, rephrases or drops, reply by reply

    questions   topics -> subtopics -> questions -> related questions -> 3 to 7 rounds
    writing     kinds of text -> instructions, 80 % of them made more detailed -> 2 to 4 rounds
    materials   passages -> questions or instructions, joined by a template -> 2 to 4 rounds
    openings    what a user says first, line by line from topics=FILE -> 3 to 7 rounds (ours)

    train.jsonl    {"id", "messages", "sector", "about"}              dropped.jsonl   what was left out, and why
    replies.jsonl  every raw reply: a run that was stopped goes on    review.jsonl    what the person decided

Prompts and lists are our own. Lists are asked for ten items at a time. Before a list is expanded further a random
`dialogues` of its items are taken, since more are never needed; published were 1.57 million dialogues of all. The
first sector's Wikidata entities are not asked for: give them as topics=FILE. Where we leave the published code: a dialogue
that is cut at `split_tokens` for training keeps its last round (the splitter lost one that just overflowed).
"""
from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Literal

import runtime
from data.formats import read
from data.llm import Budget, Request, Sampling, ask, open_model
from data.records import fault
from data.tokenizer import load_tokenizer

TOPICS = ("animals and plants", "architecture", "books", "careers", "chemistry and physics", "cities", "climate", "computers", "cooking",
          "economics", "family", "film and theatre", "gardening", "health", "history", "hobbies", "houses", "languages", "law",
          "mathematics", "medicine", "money", "music", "oceans", "painting", "religion and thought", "school", "space", "sport", "travel")
KINDS = ("a story", "a poem", "a scene of a play", "a letter", "an e-mail", "a speech", "an essay", "a newspaper report", "a review",
         "a diary entry", "a dialogue", "an advertisement", "a recipe", "a manual", "a travel guide", "a biography", "a song text",
         "a fable", "a summary", "a short program")
TEMPLATES = ("{text}\n\n{question}", "{question}\n\n{text}", "Read this passage:\n\n{text}\n\n{question}",
             "{question} Here is the text:\n\n{text}", "Text: {text}\n\nTask: {question}")
ROUNDS = {"questions": (3, 7), "writing": (2, 4), "materials": (2, 4), "openings": (3, 7)}


@dataclass(frozen=True)
class Config:
    model: str = ""              # who answers: checkpoint directory or endpoint
    user_model: str = ""         # who plays the user; empty: the same
    out: str = "runs/ultrachat"  # folder
    sector: Literal["questions", "writing", "materials", "openings"] = "questions"
    topics: str = ""             # text file, a topic, kind of text or opening a line; empty: the built-in 30 topics, 20 kinds
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
    max_tokens: int = 1024       # of a reply
    user_tokens: int = 256       # of a user's turn
    temperature: float = 1.0
    split_tokens: int = 2048     # longest training record, if there is a tokenizer; each turn counts 6 more than its tokens
    tokenizer: str = ""          # directory
    review: bool = False         # ask a person about every reply
    seed: int = 0
    device: str = "auto"
    budget: int = 0              # tokens this run may spend, 0: as many as it takes

    def __post_init__(self):
        for key, low, high in (("dialogues", 1, inf), ("subtopics", 1, inf), ("questions", 1, inf), ("related", 0, inf),
                               ("instructions", 1, inf), ("detailed", 0, 1), ("material_questions", 1, inf), ("fewest_rounds", 0, 100),
                               ("most_rounds", self.most_rounds and self.fewest_rounds, 100), ("split_tokens", 1, inf), ("budget", 0, inf)):
            runtime.check_range(key, getattr(self, key), low, high)


def load_about(config: Config) -> list[str]:
    """What the dialogues are about: topics, kinds of text, or passages."""
    if config.sector == "materials":
        if not Path(config.materials).is_file():
            runtime.fail(f"materials={config.materials}: no such file, expected JSON lines with \"text\"")
        records, report = read(config.materials, "text")
        passages = [record["text"] for record in records]
        report.refuse()
        return passages
    if not config.topics and config.sector != "openings":
        return list(TOPICS if config.sector == "questions" else KINDS)
    try:
        found = [line.strip() for line in Path(config.topics).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        runtime.fail(f"topics={config.topics}: cannot be read ({error}), expected text, one topic, kind of text or opening a line")
    if not found:
        runtime.fail(f"topics={config.topics}: is empty, expected text, one topic, kind of text or opening a line")
    return found


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------------------------- opening lines

def read_items(text: str) -> tuple[list[str], list[str]]:
    """Items of a numbered or dotted list, and the lines that are none."""
    items, others = [], []
    for line in filter(str.strip, text.splitlines()):
        item = re.fullmatch(r"\s*(?:\d+\s*[.):]|[-*•])\s+(.*\w.*)", line)
        (items if item else others).append((item[1] if item else line).strip().strip('"*').strip())
    return items, others


def lists(asking: Callable, wishes: list[str], number: int, stage: str, config: Config, dropped: list[dict]) -> list[list[str]]:
    """For every wish a list of at most `number` different items, ten of them a request."""
    parts = range(-(-number // 10))
    requests = [Request(user(f"{wish}\nWrite {min(10, number)} of them as a numbered list, one a line, and nothing else."), repeat=part)
                for wish in wishes for part in parts]
    replies = iter(asking(requests, Sampling(config.max_tokens, config.temperature), progress=stage))
    found = []
    for wish in wishes:
        kept: dict[str, str] = {}
        for _, reply in zip(parts, replies, strict=False):
            reason = fault(reply)
            items, others = read_items(reply.text) if reason in ("", "cut by length") else ([], [])
            faults = [(items.pop() if items else reply and reply.text, reason)] if reason else []
            faults += [(text, "not an item of the list") for text in others]
            for item in items:
                if len(kept) < number and item.casefold() not in kept:
                    kept[item.casefold()] = item
                else:
                    faults.append((item, "repeated" if item.casefold() in kept else "more than asked for"))
            dropped += [{"stage": stage, "of": wish, "text": text, "reason": reason} for text, reason in faults]
        found.append(list(kept.values()))
    return found


def openings(asking: Callable, about: list[str], config: Config, dropped: list[dict]) -> list[dict]:
    """First turns of the user, and what they are about."""
    rng = random.Random(f"{config.seed} openings")

    def expand(parents: list[dict], wish: str, number: int, stage: str) -> list[dict]:
        parents = rng.sample(parents, min(len(parents), config.dialogues))
        children = lists(asking, [wish.format(parent["text"]) for parent in parents], number, stage, config, dropped)
        return [{"text": text, "about": [*parent["about"], parent["text"]]}
                for parent, texts in zip(parents, children, strict=True) for text in texts]

    found = [{"text": text, "about": []} for text in about]
    if config.sector == "questions":
        found = expand(found, "Name subjects within this topic that people like to talk about: {}", config.subtopics, "subtopics")
        found = expand(found, "What might a curious person ask an assistant about this subject, in full sentences? {}",
                       config.questions, "questions")
        if config.related:
            found += expand(found, "Somebody asks: {}\nWhat else might they want to ask in this connection?", config.related, "related")
    elif config.sector == "writing":
        found = expand(found, "Somebody wants an assistant to write {}. What exactly might they ask for, each in one sentence?",
                       config.instructions, "instructions")
        found = rng.sample(found, min(len(found), config.dialogues))
        short = [opening for opening in found if rng.random() < config.detailed]
        requests = [Request(user(f"Somebody asks: {opening['text']}\nWrite the request anew with more detail: what it must contain, for "
                                 "whom it is, in what form and tone. Write nothing but the request.")) for opening in short]
        replies = asking(requests, Sampling(config.max_tokens, config.temperature), progress="details")
        for opening, reply in zip(short, replies, strict=True):
            if fault(reply):  # the short one stays
                dropped.append({"stage": "details", "of": opening["text"], "text": reply and reply.text, "reason": fault(reply)})
            else:
                opening["text"] = reply.text.strip()
    elif config.sector == "materials":
        found = expand(found, "{}\n\nWhat might somebody ask about the text above, or want done with it?", config.material_questions,
                       "questions about passages")
        for opening in found:
            opening["text"] = rng.choice(TEMPLATES).format(text=opening["about"].pop(), question=opening["text"])
    return rng.sample(found, min(len(found), config.dialogues))


# ------------------------------------------------------------------------------------- the dialogue

PERSON = ("Play a person who talks with an assistant. I am the assistant. Write only what this person says next, in their own voice: ask "
          "further, doubt, go into a detail of my last answer, want it changed, or take up something near to it. Be brief, as people "
          "are who type. Never answer for me, never thank or praise me, never say that you are playing. Begin.")
COURTESY = re.compile(r"(?:(?:oh|wow|ok|okay|alright)\b[,! ]*)?(?:many thanks|thanks|thank you|i (?:really |greatly )?appreciate|"
                      r"i'm (?:so |very )?grateful|good ?bye|bye|have a (?:nice|good|great|wonderful)|you're welcome|"
                      r"that(?:'s| is) (?:so |very |really )?(?:kind|helpful|great|wonderful))\b", re.IGNORECASE)
WISH = re.compile(r"\?|[,;:] (?:but|now|please|could|can|next|also|one)\b", re.IGNORECASE)


def without_courtesy(text: str) -> str:
    """A user's turn without the sentences that only thank, praise or part; a sentence that also asks stays whole."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return " ".join(s for s in sentences if WISH.search(s) or not COURTESY.match(s))


def talk(asking: Callable, asking_user: Callable, dialogues: list[dict], config: Config, decided: dict | None, dropped: list[dict]) -> None:
    """All dialogues round by round; each ends after the rounds drawn for it, or for the reason in "ended"."""
    for number in range(max((d["rounds"] for d in dialogues), default=0)):
        going = [d for d in dialogues if "ended" not in d and number < d["rounds"]]
        if number:
            user_turns(asking_user, going, number, config, dropped)
        going = [d for d in going if "ended" not in d]
        while going:  # once, and again for what a person rephrased
            requests = [Request(list(d["messages"]), tag=f"{d['id']} {d['rephrased']}") for d in going]
            replies = asking(requests, Sampling(config.max_tokens, config.temperature), progress=f"reply {number + 1}")
            again = []
            for d, reply in zip(going, replies, strict=True):
                reason, verdict = fault(reply), {"decision": "keep"}
                if not reason and decided is not None:
                    verdict = review(d, reply.text, decided, Path(config.out) / "review.jsonl")
                if verdict["decision"] == "rephrase":
                    dropped.append({"stage": "review", "dialogue": d["id"], "text": d["messages"][-1]["content"], "reason": "rephrased"})
                    d["messages"][-1:] = user(verdict["turn"])
                    d["rephrased"] += 1
                    again.append(d)
                elif reason or verdict["decision"] == "drop":
                    d["ended"] = reason or "dropped by a person"
                    dropped.append({"stage": "reply", "dialogue": d["id"], "text": reply and reply.text, "reason": d["ended"]})
                    d["messages"] = d["messages"][:-1] if reason else []
                else:
                    d["messages"].append({"role": "assistant", "content": reply.text.strip()})
            going = again


def user_turns(asking_user: Callable, going: list[dict], number: int, config: Config, dropped: list[dict]) -> None:
    """The next thing each person says; to the model that plays them, the assistant is the user."""
    other = {"user": "assistant", "assistant": "user"}
    requests = [Request(user(PERSON) + [m | {"role": other[m["role"]]} for m in d["messages"]], tag=d["id"]) for d in going]
    replies = asking_user(requests, Sampling(config.user_tokens, config.temperature), progress=f"user's turn {number + 1}")
    for d, reply in zip(going, replies, strict=True):
        reason = fault(reply)
        turn = "" if reason else without_courtesy(reply.text)
        if turn:
            d["messages"] += user(turn)
        else:
            d["ended"] = reason or "only courtesy"
            dropped.append({"stage": "user's turn", "dialogue": d["id"], "text": reply and reply.text, "reason": d["ended"]})


def review(dialogue: dict, reply: str, decided: dict, file: Path) -> dict:
    """What the person at the terminal makes of a reply; what was decided once is not asked again."""
    key = hashlib.sha256(json.dumps([dialogue["id"], dialogue["rephrased"], dialogue["messages"], reply]).encode()).hexdigest()[:16]
    if key in decided:
        return decided[key]
    for m in [*dialogue["messages"], {"role": "assistant", "content": reply}]:
        print(f"\n{m['role']}: {m['content']}")
    verdict = {"key": key, "dialogue": dialogue["id"], "decision": ""}
    try:
        while not verdict["decision"]:
            word = input("\n[k]eep, [r]ephrase what the user said, [d]rop the dialogue: ").strip().lower()
            verdict["decision"] = {"k": "keep", "r": "rephrase", "d": "drop"}.get(word[:1], "")
        while verdict["decision"] == "rephrase" and not verdict.get("turn"):
            verdict["turn"] = input("user: ").strip()
    except EOFError:
        runtime.fail(f"{file}: holds {len(decided)} decisions, more are needed, and the input has ended: run again to go on")
    with file.open("a") as stream:
        stream.write(json.dumps(verdict) + "\n")
    decided[key] = verdict
    return verdict


def read_decisions(file: Path) -> dict[str, dict]:
    """By key; half a line that a killed run left is cut off."""
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.is_file() else []
    runtime.write_text(file, "".join(lines))
    return {verdict["key"]: verdict for verdict in map(json.loads, lines)}


# -------------------------------------------------------------------------------------------- output

def split(messages: list[dict], most: int, tokens: Callable[[str], int]) -> tuple[list[list[dict]], list[list[dict]]]:
    """A dialogue in parts of at most `most` tokens, cut between rounds, and the rounds that are longer by themselves."""
    parts, too_long, room = [], [], 0
    for at in range(0, len(messages), 2):
        round_ = messages[at:at + 2]
        size = sum(tokens(m["content"]) + 6 for m in round_)
        if size > most:
            too_long.append(round_)
            room = 0  # what follows would follow a gap
            continue
        if size > room:
            parts.append([])
            room = most
        parts[-1] += round_
        room -= size
    return parts, too_long


def generate(model, user_model, config: Config) -> None:
    out, dropped = Path(config.out), []
    about = load_about(config)
    out.mkdir(parents=True, exist_ok=True)
    budget = Budget(tokens=config.budget) if config.budget else None
    asking, asking_user = (partial(ask, m, ledger=out / "replies.jsonl", budget=budget) for m in (model, user_model))
    most = config.most_rounds or max(ROUNDS[config.sector][1], config.fewest_rounds)
    fewest = config.fewest_rounds or min(ROUNDS[config.sector][0], most)
    rng = random.Random(f"{config.seed} rounds")
    dialogues = [{"id": f"{config.sector}_{number}", "about": opening["about"], "messages": user(opening["text"]),
                  "rounds": rng.randint(fewest, most), "rephrased": 0}
                 for number, opening in enumerate(openings(asking_user, about, config, dropped))]
    talk(asking, asking_user, dialogues, config, read_decisions(out / "review.jsonl") if config.review else None, dropped)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    records = []
    for d in dialogues:
        messages = d["messages"][:len(d["messages"]) // 2 * 2]
        if len(messages) < 2 * fewest:
            dropped.append({"stage": "dialogue", "dialogue": d["id"], "messages": messages, "reason": f"fewer than {fewest} rounds"})
            continue
        parts, too_long = [messages], []
        if tokenizer:
            parts, too_long = split(messages, config.split_tokens, lambda text: len(tokenizer.encode(text)))
        dropped += [{"stage": "split", "dialogue": d["id"], "messages": round_, "reason": f"longer than {config.split_tokens} tokens"}
                    for round_ in too_long]
        records += [{"id": f"{d['id']}_{n}", "messages": part, "sector": config.sector, "about": d["about"],
                     "source": f"ultrachat, {user_model.name} asks, {model.name} answers"} for n, part in enumerate(parts)]
    for name, lines in (("train", records), ("dropped", dropped)):
        runtime.write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{out}: {len(dialogues)} dialogues, {len(records)} training records; {len(dropped)} dropped, for reasons in dropped.jsonl")
    for (stage, reason), number in Counter((d["stage"], d["reason"]) for d in dropped).most_common():
        print(f"{number:8,}  {stage}: {reason}")


def main(config: Config) -> None:
    load_about(config)  # before a model is loaded
    runtime.open_folder(config.out)
    model = open_model(config.model, config.device)
    generate(model, open_model(config.user_model, config.device) if config.user_model else model, config)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
