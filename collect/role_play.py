"""Role play: two models solve a task, one as the user who instructs, one as the assistant (CAMEL, Li et al. 2023).

    python -m collect.role_play model=http://127.0.0.1:8000/v1#name out=runs/role_play dialogues=10
    python -m collect.role_play ideas=ideas.jsonl ...  tasks of your own: {"assistant_role", "user_role", "task"} a line

    idea -> task specifier, which makes it concrete -> inception prompts, which hold each model to its role -> dialogue

Without ideas the model thinks up `tasks` of them for pairs of roles. A round is a message of the user and one of the
assistant. These end the dialogue, looked at in this order (arXiv:2303.17760):

    1  a reply that is cut at max_tokens or missing             5  the user's message is kept
    2  three rounds in a row, the user's lacks "Instruction:"   6  the done token in the user's message
    3  the assistant's holds "Instruction:": roles flipped      7  the assistant's message is kept
    4  politeness in either message, four rounds in a row       8  40 messages

A round that ends the dialogue by 1 to 4 is not kept, as published. Where we leave the published code:
  - every listed word that was absent set its count of politeness back, and its break left an inner loop only, so that
    politeness never ended a chat: here a round counts once, a round without any such word sets the count to 0
  - it asked the assistant once more after the done token: here the token, unless 2 comes before it, is the end
The planner and the critic, both optional there, are left out. Prompts are our own.

    train.jsonl     {"id", "messages", roles, tasks, "termination_reason"}
    replies.jsonl   raw replies, to resume from                     dropped.jsonl   what was left out, and why
"""
import random
import re
from collections import Counter
from dataclasses import dataclass

import runtime
from collect.synthetic import PROMPTS, Run, Settings, swapped, user
from data.llm import Request, Sampling, open_model
from data.records import fault
from judging.entries import read_lines

DONE = "<CAMEL_TASK_DONE>"
POLITE = ("goodbye", "good bye", "thank", "bye", "welcome", "language model")
TEXTS = PROMPTS["role_play"]


@dataclass(frozen=True)
class Config(Settings):
    model: str = ""               # checkpoint directory or endpoint
    user_model: str = ""          # who plays the user; empty: the same
    out: str = "runs/role_play"
    ideas: str = ""               # JSONL of assistant_role, user_role and task; empty: thought up for pairs of roles
    dialogues: int = 100          # of 20 x 20 roles x 10 tasks (published: 50 x 50 x 10)
    tasks: int = 10               # ideas of one pair of roles
    words: int = 50               # of a specified task
    max_messages: int = 40
    idle_rounds: int = 3          # without an instruction
    polite_rounds: int = 4

    def __post_init__(self):
        super().__post_init__()
        runtime.check_range("tasks", self.tasks, 1, 100)
        self.at_least(1, "dialogues", "idle_rounds", "polite_rounds")
        self.at_least(2, "max_messages")
        self.at_least(5, "words")


def load_ideas(config: Config) -> list[dict]:
    """Ideas from a file; without one, pairs of roles, for which the model has to think them up."""
    if config.ideas:
        keys = ("assistant_role", "user_role", "task")
        return read_lines(config.ideas, lambda idea, _: {key: str(idea[key]) for key in keys},
                          f"is no idea, expected {', '.join(keys)}")
    return [{"assistant_role": a, "user_role": u} for a in TEXTS["assistant_roles"] for u in TEXTS["user_roles"]]


# ----------------------------------------------------------------------------------------- the tasks

def read_tasks(text: str, number: int) -> list[str]:
    """The items of a numbered list that starts with "1."; ValueError unless there are exactly `number`."""
    start = re.search(r"(?m)^\s*1\.\s", text)
    items = re.split(r"(?m)^\s*\d+\.\s+", text[start.start():])[1:] if start else []
    items = [" ".join(item.split()) for item in items]
    if len(items) != number or not all(items):
        raise ValueError("an empty task" if len(items) == number else f"{len(items)} tasks, not {number}")
    return items


def new_ideas(run: Run, model, pairs: list[dict], config: Config) -> list[dict]:
    """Ideas for random pairs of roles, for as many pairs as the dialogues need."""
    rng = random.Random(f"{config.seed} roles")
    pairs = rng.sample(pairs, min(len(pairs), -(-config.dialogues // config.tasks)))
    requests = [Request(user(TEXTS["ideas"].format(**pair, tasks=config.tasks))) for pair in pairs]
    ideas = []
    for pair, reply in zip(pairs, run.ask(model, requests, "ideas"), strict=True):
        tasks = run.usable(reply, "ideas", lambda text: read_tasks(text, config.tasks), roles=list(pair.values()))
        ideas += [pair | {"task": task} for task in tasks]
    return ideas


def specify(run: Run, model, ideas: list[dict], config: Config) -> list[dict]:
    """Dialogues to hold: each idea made concrete, or dropped where that fails."""
    requests = [Request(user(TEXTS["specifier"].format(**idea, words=config.words)), repeat=number)
                for number, idea in enumerate(ideas)]
    replies = run.ask(model, requests, "task specifier", Sampling(config.max_tokens, 1.4))
    dialogues = []
    for number, (idea, reply) in enumerate(zip(ideas, replies, strict=True)):
        if text := run.usable(reply, "task specifier", task=idea["task"]):
            dialogues.append(idea | {"id": f"role_play_{number}", "specified_task": " ".join(text.split()),
                                     "messages": [], "idle": 0, "polite": 0})
    return dialogues


# -------------------------------------------------------------------------------------- the dialogue

def termination(dialogue: dict, said: str | None, answered: str | None, config: Config) -> str:
    """Why rules 1 to 4 end the dialogue here, "" if they do not; a message that is cut or missing is None."""
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


def say(run: Run, model, side: str, asked: list[tuple[dict, list[dict]]], progress: str) -> dict[str, str | None]:
    """What one side says next in dialogues that so far held these messages, by their id; None if cut or missing."""
    requests = [Request([{"role": "system", "content": TEXTS[side].format(**d, done=DONE)}, *messages], tag=d["id"])
                for d, messages in asked]
    replies = run.ask(model, requests, f"{progress}, {side}")
    return {d["id"]: None if fault(reply) else reply.text.strip()
            for (d, _), reply in zip(asked, replies, strict=True)}


def talk(run: Run, model, user_model, dialogues: list[dict], config: Config) -> None:
    """All dialogues round by round, until each has a termination_reason."""
    while going := [d for d in dialogues if "termination_reason" not in d]:
        progress = f"round {len(going[0]['messages']) // 2 + 1}"
        asked = [(d, user(TEXTS["opening"]) + swapped(d["messages"])) for d in going]
        said = say(run, user_model, "user", asked, progress)
        asked = [(d, d["messages"] + user(text)) for d in going if (text := said[d["id"]]) and DONE not in text]
        answered = say(run, model, "assistant", asked, progress)
        for d in going:
            text, answer = said[d["id"]], answered.get(d["id"])
            reason = termination(d, text, answer, config)
            if reason:
                run.drop("round", reason, dialogue=d["id"], text=[text, answer])
            elif DONE in text:
                reason = "task done"  # the token is not kept: nobody answers it
            else:
                d["messages"] += [*user(text), {"role": "assistant", "content": answer}]
                reason = "max messages" if len(d["messages"]) + 2 > config.max_messages else ""
            if reason:
                d["termination_reason"] = reason


def main(config: Config, model=None, user_model=None) -> None:
    ideas, run = load_ideas(config), Run(config)  # before a model is loaded
    model = model or open_model(config.model, config.device)
    user_model = user_model or (open_model(config.user_model, config.device) if config.user_model else model)
    if not config.ideas:
        ideas = new_ideas(run, model, ideas, config)
    dialogues = specify(run, model, ideas[:config.dialogues], config)
    talk(run, model, user_model, dialogues, config)
    records = []
    for d in dialogues:
        reason, messages = d["termination_reason"], d["messages"]
        if not messages:
            run.drop("dialogue", f"no round: {reason}", dialogue=d["id"], text=d["specified_task"])
            continue
        records.append({"id": d["id"], "messages": messages, "assistant_role": d["assistant_role"],
                        "user_role": d["user_role"], "original_task": d["task"], "specified_task": d["specified_task"],
                        "num_messages": len(messages) + (reason == "task done"), "termination_reason": reason,
                        "source": f"role play, {user_model.name} instructs {model.name}"})
    ends = Counter(d["termination_reason"] for d in dialogues).most_common()
    run.write(f"{len(ideas)} ideas, {len(dialogues)} dialogues ({', '.join(f'{reason} {n}' for reason, n in ends)}), "
              f"{len(records)} training records", train=records)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
