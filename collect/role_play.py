"""Role play: two models solve a task, one as the user who instructs, one as the assistant (CAMEL, Li et al. 2023, arXiv:2303.17760).

    python -m collect.role_play model=http://127.0.0.1:8000/v1#name out=runs/role_play dialogues=10
    python -m collect.role_play ideas=ideas.jsonl ...      tasks of your own: {"assistant_role", "user_role", "task"} a line

    idea -> task specifier, which makes it concrete -> inception prompts, which hold each model to its role -> dialogue

Without ideas the model thinks up `tasks` of them for pairs of roles. A round is a message of the user and one of the
assistant. It ends the dialogue, in this order:

    1  an agent that ended: a reply cut at max_tokens, or none          5  the user's message is kept
    2  three rounds running, the user's lacks "Instruction:"            6  the done token in the user's message
    3  the assistant's holds "Instruction:", once: the roles flipped    7  the assistant's message is kept
    4  politeness in either message, four rounds running                8  40 messages

A round that trips 1 to 4 is not kept, as published. Where we leave the published code:
  - its count of politeness was set back by every listed word that was absent, and its break left an inner loop only, so
    politeness never ended a chat: here a round counts once, a round without any such word sets the count to 0
  - it asked the assistant once more after the done token: here the token, where 2 does not come before it, is the end
The planner and the critic, both optional there, are left out. Prompts are our own.

    train.jsonl    {"id", "messages", roles, tasks, "termination_reason"}      dropped.jsonl   what was left out, and why
    replies.jsonl  every raw reply: a run that was stopped goes on
"""
from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

import runtime
from data.llm import Budget, Request, Sampling, ask, open_model
from data.records import fault

DONE = "<CAMEL_TASK_DONE>"
POLITE = ("goodbye", "good bye", "thank", "bye", "welcome", "language model")
ASSISTANTS = ("Accountant", "Architect", "Baker", "Biologist", "Chemist", "Data analyst", "Doctor", "Editor", "Electrician", "Gardener",
              "Historian", "Journalist", "Lawyer", "Mathematician", "Mechanic", "Nurse", "Poet", "Programmer", "Teacher", "Translator")
USERS = ("Athlete", "Banker", "Cafe owner", "Carpenter", "Children's author", "Farmer", "Film director", "Game designer", "Hotel keeper",
         "Librarian", "Museum guide", "Musician", "Parent", "Photographer", "Politician", "Shopkeeper", "Social worker", "Student",
         "Tourist", "Zoo keeper")


@dataclass(frozen=True)
class Config:
    model: str = ""               # checkpoint directory or endpoint
    user_model: str = ""          # who plays the user; empty: the same
    out: str = "runs/role_play"   # folder
    ideas: str = ""               # JSONL of assistant_role, user_role and task; empty: thought up for pairs of roles
    assistant_roles: str = ""     # text file, a role a line, perhaps numbered; empty: the built-in 20 (published: 50)
    user_roles: str = ""
    dialogues: int = 100          # published: 50 x 50 roles x 10 tasks
    tasks: int = 10               # ideas of one pair of roles
    words: int = 50               # of a specified task
    specifier_temperature: float = 1.4
    temperature: float = 1.0
    max_tokens: int = 1024        # of any reply
    max_messages: int = 40
    idle_rounds: int = 3          # without an instruction
    polite_rounds: int = 4
    seed: int = 0
    device: str = "auto"
    budget: int = 0               # tokens this run may spend, 0: as many as it takes

    def __post_init__(self):
        for key, low, high in (("dialogues", 1, inf), ("tasks", 1, 100), ("words", 5, inf), ("max_messages", 2, inf),
                               ("idle_rounds", 1, inf), ("polite_rounds", 1, inf), ("budget", 0, inf)):
            runtime.check_range(key, getattr(self, key), low, high)


def load_roles(config: Config) -> tuple[list[str], list[str]]:
    def lines(key: str, built_in: tuple[str, ...]) -> list[str]:
        file = getattr(config, key)
        try:
            text = Path(file).read_text(encoding="utf-8").splitlines() if file else built_in
        except (OSError, UnicodeDecodeError) as error:
            runtime.fail(f"{key}={file}: cannot be read ({error}), expected text, one role a line")
        found = [role for role in (re.sub(r"^\s*\d+[.)]\s*", "", line).strip() for line in text) if role]
        if not found:
            runtime.fail(f"{key}={file}: is empty, expected text, one role a line")
        return found

    return lines("assistant_roles", ASSISTANTS), lines("user_roles", USERS)


def load_ideas(path: str) -> list[dict]:
    try:
        lines, ideas = Path(path).read_text(encoding="utf-8").rstrip().split("\n"), []
    except (OSError, UnicodeDecodeError) as error:
        runtime.fail(f"ideas={path}: cannot be read ({error}), expected JSON lines with assistant_role, user_role and task")
    for number, line in enumerate(lines, 1):
        try:
            idea = json.loads(line)
            ideas.append({key: str(idea[key]) for key in ("assistant_role", "user_role", "task")})
        except (ValueError, TypeError, KeyError):
            runtime.fail(f"{path} line {number}: is no idea, expected assistant_role, user_role and task")
    return ideas


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# ----------------------------------------------------------------------------------------- the tasks

def read_tasks(text: str, number: int) -> list[str]:
    """The items of a numbered list that starts with "1."; ValueError unless there are exactly `number`."""
    start = re.search(r"(?m)^\s*1\.\s", text)
    items = re.split(r"(?m)^\s*\d+\.\s+", text[start.start():])[1:] if start else []
    items = [" ".join(item.split()) for item in items]
    if len(items) != number or not all(items):
        raise ValueError("an empty task" if len(items) == number else f"{len(items)} tasks, not {number}")
    return items


def new_ideas(asking: Callable, config: Config, dropped: list[dict]) -> list[dict]:
    """Ideas for pairs of roles drawn by lot, for as many pairs as the dialogues need."""
    assistants, users = load_roles(config)
    rng = random.Random(f"{config.seed} roles")
    pairs = [(a, u) for a in assistants for u in users if a != u]
    pairs = rng.sample(pairs, min(len(pairs), -(-config.dialogues // config.tasks)))
    requests = [Request(user(f"A {a} helps a {u}. Name {config.tasks} different tasks on which they can work together by talking, concrete "
                             f"and inventive, each in one sentence. Write a numbered list from 1. to {config.tasks}. and nothing else."))
                for a, u in pairs]
    replies = asking(requests, Sampling(config.max_tokens, config.temperature), progress="ideas")
    ideas = []
    for (a, u), reply in zip(pairs, replies, strict=True):
        try:
            if fault(reply):
                raise ValueError(fault(reply))
            ideas += [{"assistant_role": a, "user_role": u, "task": task} for task in read_tasks(reply.text, config.tasks)]
        except ValueError as reason:
            dropped.append({"stage": "ideas", "roles": [a, u], "text": reply and reply.text, "reason": str(reason)})
    return ideas


def specify(asking: Callable, ideas: list[dict], config: Config, dropped: list[dict]) -> list[dict]:
    """Make each task concrete, in 50 words or fewer; an idea that cannot be is dropped."""
    requests = [Request(user(f"This is a task on which a {i['assistant_role']} will help a {i['user_role']}: {i['task']}\nMake it more "
                             f"specific: invent the details, be creative. Answer in at most {config.words} words, with the task and "
                             "nothing else."), repeat=number) for number, i in enumerate(ideas)]
    replies = asking(requests, Sampling(config.max_tokens, config.specifier_temperature), progress="task specifier")
    dialogues = []
    for number, (idea, reply) in enumerate(zip(ideas, replies, strict=True)):
        if fault(reply):
            dropped.append({"stage": "task specifier", "task": idea["task"], "text": reply and reply.text, "reason": fault(reply)})
        else:
            task = " ".join(reply.text.split())
            dialogues.append(idea | {"id": f"role_play_{number}", "specified_task": task, "messages": [], "idle": 0, "polite": 0})
    return dialogues


# -------------------------------------------------------------------------------------- the dialogue

ASSISTANT = """You are {assistant_role}, I am {user_role}. Keep to these roles to the end: I instruct, you carry out; never instruct me.
We work together on one task, and it does not change: {specified_task}
I give you one instruction at a time, and you answer it with one solution. If you cannot carry it out, because it takes a body, or is
against morals, the law or your abilities, say so honestly and give the reason. Otherwise begin with

Solution:

and what follows is specific, complete and easy to use, with examples where they help. End every solution with: Next request."""
USER = """You are {user_role}, I am {assistant_role}. Keep to these roles to the end: you instruct, I carry out; never do my part.
We work together on one task, and it does not change: {specified_task}
Lead me to it step by step, out of what you know. You may write in two forms only. With an input that the step needs:

Instruction: what I am to do
Input: what I need to know for it

Without one:

Instruction: what I am to do
Input: None

Give one instruction at a time and wait for my solution. Instruct me, do not ask me questions, and write nothing else. Go on until the
task is done, never say so before; then write one word alone: {done}"""
OPENING = "Now give me your instructions one by one, in those two forms only: Instruction and Input."


def termination(dialogue: dict, said: str | None, answered: str | None, config: Config) -> str:
    """Rules 1 to 4 for a round whose messages are given, None where an agent ended; counts in the dialogue."""
    if said is None:
        return "user ended"
    if DONE not in said and answered is None:
        return "assistant ended"
    dialogue["idle"] = 0 if "Instruction:" in said else dialogue["idle"] + 1
    if dialogue["idle"] >= config.idle_rounds:
        return "no instruction"
    answered = answered or ""
    if "Instruction:" in answered:
        return "roles flipped"
    polite = any(word in text.lower() for word in POLITE for text in (said, answered))
    dialogue["polite"] = dialogue["polite"] + 1 if polite else 0
    return "politeness" if dialogue["polite"] >= config.polite_rounds else ""


def talk(asking: Callable, asking_user: Callable, dialogues: list[dict], config: Config, dropped: list[dict]) -> None:
    """All dialogues round by round, until each has a termination_reason."""
    sampling = Sampling(config.max_tokens, config.temperature)

    def heard(replies) -> list[str | None]:
        return [None if fault(reply) else reply.text.strip() for reply in replies]

    while going := [d for d in dialogues if "termination_reason" not in d]:
        round_ = len(going[0]["messages"]) // 2 + 1
        other = {"user": "assistant", "assistant": "user"}
        requests = [Request([{"role": "system", "content": USER.format(**d, done=DONE)}, *user(OPENING),
                             *(m | {"role": other[m["role"]]} for m in d["messages"])], tag=d["id"]) for d in going]
        said = heard(asking_user(requests, sampling, progress=f"round {round_}, user"))
        asked = [(d, text) for d, text in zip(going, said, strict=True) if text is not None and DONE not in text]
        requests = [Request([{"role": "system", "content": ASSISTANT.format(**d)}, *d["messages"], *user(text)], tag=d["id"])
                    for d, text in asked]
        replies = heard(asking(requests, sampling, progress=f"round {round_}, assistant"))
        answers = {d["id"]: reply for (d, _), reply in zip(asked, replies, strict=True)}
        for d, text in zip(going, said, strict=True):
            answer = answers.get(d["id"])
            reason = termination(d, text, answer, config)
            if reason:
                dropped.append({"stage": "round", "dialogue": d["id"], "text": [text, answer], "reason": reason})
            else:
                d["messages"] += user(text)
                if DONE in text:
                    reason = "task done"
                else:
                    d["messages"].append({"role": "assistant", "content": answer})
                    reason = "max messages" if len(d["messages"]) + 2 > config.max_messages else ""
            if reason:
                d["termination_reason"] = reason


def generate(model, user_model, config: Config) -> None:
    out, dropped = Path(config.out), []
    budget = Budget(tokens=config.budget) if config.budget else None
    asking, asking_user = (partial(ask, m, ledger=out / "replies.jsonl", budget=budget) for m in (model, user_model))
    ideas = load_ideas(config.ideas) if config.ideas else new_ideas(asking, config, dropped)
    dialogues = specify(asking, ideas[:config.dialogues], config, dropped)
    talk(asking, asking_user, dialogues, config, dropped)
    records = []
    for d in dialogues:
        reason, messages = d["termination_reason"], d["messages"][:len(d["messages"]) // 2 * 2]  # nobody answers the done token
        if messages:
            records.append({"id": d["id"], "messages": messages, "assistant_role": d["assistant_role"], "user_role": d["user_role"],
                            "original_task": d["task"], "specified_task": d["specified_task"], "num_messages": len(d["messages"]),
                            "termination_reason": reason, "source": f"role play, {user_model.name} instructs {model.name}"})
        else:
            dropped.append({"stage": "dialogue", "dialogue": d["id"], "text": d["specified_task"], "reason": f"no round: {reason}"})
    for name, lines in (("train", records), ("dropped", dropped)):
        runtime.write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    ends = Counter(d["termination_reason"] for d in dialogues).most_common()
    print(f"{out}: {len(ideas)} ideas, {len(dialogues)} dialogues ({', '.join(f'{reason} {n}' for reason, n in ends)}), {len(records)} "
          f"training records; {len(dropped)} dropped, for reasons in dropped.jsonl")
    for (stage, reason), number in Counter((d["stage"], d["reason"]) for d in dropped).most_common():
        print(f"{number:8,}  {stage}: {reason}")


def main(config: Config) -> None:
    load_ideas(config.ideas) if config.ideas else load_roles(config)  # before a model is loaded
    runtime.open_folder(config.out)
    model = open_model(config.model, config.device)
    generate(model, open_model(config.user_model, config.device) if config.user_model else model, config)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
