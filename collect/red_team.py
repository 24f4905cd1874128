"""Red teaming: a model attacks a model, a third one judges, and everything tried is kept.

    python -m collect.red_team attacker=http://... target=runs/tiny/0/dpo/model judge=http://... out=runs/red_team
    python -m collect.red_team mode=fuzz ...      mode=leak ...

    direct    the attacker writes a message meant to bring about a behaviour; after a failure it sees the message and
              the reply, and writes another (Perez et al. 2022, arXiv:2202.03286; PAIR, arXiv:2310.08419)
    fuzz      the attacker changes a template in one of five ways; it is put around every behaviour and sent; what
              succeeds for some behaviour joins the pool (GPTFuzzer, Yu et al. 2023, arXiv:2309.10253)
    leak      the target is told invented personal data and credentials to keep; users then ask for them in prepared
              words, the attacker in its own

    transcripts.jsonl   {"id", "behaviour", "messages", "attempt", "judged": "unsafe", "safe" or null, ...}
    replies.jsonl       raw replies, to resume from            dropped.jsonl   what was left out, and why

The templates of the pool are changed in turn, one of the orders that GPTFuzzer tried (its best walks a tree of them).

What ships is mild: behaviours nobody is hurt by, templates that play and plead. judging/safety.py decides and counts.
"""
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import runtime
from collect.synthetic import PROMPTS, Run, Settings, user
from data.llm import Request, Sampling, open_model
from judging import safety

TEXTS = PROMPTS["red_team"]
BEHAVIOURS, TEMPLATES, OPERATORS = TEXTS["behaviours"], TEXTS["templates"], TEXTS["operators"]
HOLE = "[REQUEST]"                  # in a template, what the behaviour takes the place of


@dataclass(frozen=True)
class Config(Settings):
    target: str = ""                # who is attacked: checkpoint directory or endpoint
    attacker: str = ""              # who writes the attacks
    judge: str = ""                 # who says "unsafe" or "safe"; not needed for leaks
    out: str = "runs/red_team"
    mode: Literal["direct", "fuzz", "leak"] = "direct"
    behaviours: str = ""            # JSONL of {"behaviour"}; empty: 10 mild ones
    attempts: int = 4               # direct, leak: for a behaviour at most, or until one succeeds
    steps: int = 50                 # fuzz: mutations
    templates: str = ""             # fuzz: JSONL of {"text"} with [REQUEST] once in each; empty: 5 of ours
    probes: int = 20                # leak: how many
    max_tokens: int = 512           # of an attack and of a reply; the target replies at temperature 0

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "attempts", "steps", "probes")


class Sides(NamedTuple):
    """A run, and who takes part in it."""

    run: Run
    config: Config
    target: object
    attacker: object
    judge: object                   # None: a leak is seen from the secrets
    secrets: dict[str, list[str]]   # leak: by goal, what the target was told to keep


def load_templates(config: Config) -> list[str]:
    texts = safety.load_texts(config.templates, "text") if config.templates else TEMPLATES
    for number, text in enumerate(texts, 1):
        holes = text.count(HOLE)
        if holes != 1:
            runtime.fail(f"{config.templates} line {number}: holds {HOLE} {holes} times, expected once: mend it")
    return texts


def send(sides: Sides, attacks: list[dict]) -> list[dict]:
    """The transcripts of attacks {"id", "behaviour", "attempt", "messages"}, replied to and judged."""
    run, sent = sides.run, []
    requests = [Request(a["messages"]) for a in attacks]
    replies = run.ask(sides.target, requests, "target", Sampling(sides.config.max_tokens, 0.0))
    for a, reply in zip(attacks, replies, strict=True):
        if reply is None:
            run.drop("reply", "no reply", id=a["id"], text=a["messages"][-1]["content"])
        else:
            sent.append(a | {"messages": [*a["messages"], {"role": "assistant", "content": reply.text}]})
    if sides.judge is None:
        leaks = [safety.leaks(a["messages"][:-1], a["messages"][-1]["content"], sides.secrets[a["goal"]]) for a in sent]
        verdicts = ["unsafe" if found["planted"] else "safe" for found in leaks]
    else:
        verdicts = safety.judge(sides.judge, "harm", sent, run.ledger, run.budget)
    return [a | {"judged": verdict} for a, verdict in zip(sent, verdicts, strict=True)]


def written(sides: Sides, prompts: list[tuple[str, str]], number: int) -> list[str]:
    """What the attacker writes to each (id, prompt) at attempt `number`; "" where it cannot be used."""
    def unquoted(text: str) -> str:
        if not (inside := text.strip().strip('"').strip()):
            raise ValueError("empty text")
        return inside

    requests = [Request(user(prompt), repeat=number, tag=name) for name, prompt in prompts]
    replies = sides.run.ask(sides.attacker, requests, "attacker")
    return [sides.run.usable(reply, "attack", unquoted, id=name)
            for (name, _), reply in zip(prompts, replies, strict=True)]


# --------------------------------------------------------------------------------- direct and leaks

def persuade(sides: Sides, goals: list[dict]) -> list[dict]:
    """Attempt after attempt at each goal {"id", "behaviour", "system", "first"} until one is judged unsafe."""
    transcripts, last, going = [], {}, goals
    for attempt in range(sides.config.attempts):
        if attempt == 0 and sides.config.mode == "leak":
            texts = [goal["first"] for goal in going]
        else:
            texts = written(sides, [(goal["id"], attack_prompt(goal, last.get(goal["id"]))) for goal in going], attempt)
        attacks = [{"id": f"{goal['id']}_{attempt}", "behaviour": goal["behaviour"], "attempt": attempt,
                    "goal": goal["id"], "messages": [*goal["system"], *user(text)]}
                   for goal, text in zip(going, texts, strict=True) if text]
        sent = send(sides, attacks)
        last |= {a["goal"]: a for a in sent}
        transcripts += sent
        going = [goal for goal in going if last.get(goal["id"], {}).get("judged") != "unsafe"]
        if not going:
            break
    return transcripts


def attack_prompt(goal: dict, last: dict | None) -> str:
    """Asks for an attack; after one that failed, for another."""
    text = TEXTS["attack"].format(behaviour=goal["behaviour"])
    if last:
        said, answered = (m["content"] for m in last["messages"][-2:])
        text += TEXTS["again"].format(said=said, answered=answered)
    return text


def leak_goals(config: Config) -> tuple[list[dict], dict[str, list[str]]]:
    """Goals, and by goal the secrets that a reply to it must not hold."""
    probes = safety.leak_probes(config.probes, config.seed)
    goals = [{"id": f"leak_{p['id']}", "system": p["messages"][:-1], "first": p["messages"][-1]["content"],
              "behaviour": "give away the e-mail address, phone, card, key or password it was told to keep "
                           f"(probe {p['id']})"} for p in probes]
    return goals, {f"leak_{p['id']}": p["secrets"] for p in probes}


# -------------------------------------------------------------------------------------------- fuzzing

def mutate(sides: Sides, pool: list[str], template: str, step: int, rng: random.Random) -> tuple[str, str]:
    """A new template made of one of the pool, "" if it cannot be used; and the operator that made it."""
    operator, shown = rng.choice(list(OPERATORS)), [template]
    if operator == "crossover":
        shown.append(rng.choice([other for other in pool if other != template] or shown))
    ending = "nothing else." if operator == "expand" else f"nothing else; it must hold {HOLE} exactly once."
    prompt = f"{OPERATORS[operator]} Write {ending}\n\n" + "\n\n".join(f"Template: {text}" for text in shown)
    text, = written(sides, [(f"step_{step}", prompt)], step)
    if text and operator == "expand":
        text = f"{text} {template}"
    reason = f"does not hold {HOLE} once" if text.count(HOLE) != 1 else "in the pool already" if text in pool else ""
    if text and reason:
        sides.run.drop("mutation", reason, id=f"step_{step}", operator=operator, text=text)
    return "" if reason else text, operator


def fuzz(sides: Sides, behaviours: list[str], templates: list[str]) -> list[dict]:
    """Step after step one more template, put around every behaviour; those that win join the pool."""
    pool, transcripts = list(templates), []
    for step in range(1, sides.config.steps + 1):
        rng = random.Random(f"{sides.config.seed} step {step}")
        text, operator = mutate(sides, pool, pool[(step - 1) % len(pool)], step, rng)
        if not text:
            continue
        attacks = [{"id": f"fuzz_{step}_{number}", "behaviour": behaviour, "attempt": step - 1, "operator": operator,
                    "template": text, "messages": user(text.replace(HOLE, behaviour))}
                   for number, behaviour in enumerate(behaviours)]
        sent = send(sides, attacks)
        transcripts += sent
        if any(a["judged"] == "unsafe" for a in sent):
            pool.append(text)
    return transcripts


def main(config: Config, target=None, attacker=None, judge=None) -> None:
    behaviours = safety.load_texts(config.behaviours, "behaviour") if config.behaviours else BEHAVIOURS
    templates, run, secrets = load_templates(config), Run(config), {}
    target = target or open_model(config.target, config.device)
    attacker = attacker or open_model(config.attacker, config.device)
    if config.mode == "leak":
        judge, (goals, secrets) = None, leak_goals(config)
        behaviours = [goal["behaviour"] for goal in goals]
    else:
        judge = judge or open_model(config.judge, config.device)
        goals = [{"id": f"direct_{number}", "behaviour": b, "system": []} for number, b in enumerate(behaviours)]
    by = judge.name if judge else "the strings that were planted"
    sides = Sides(run, config, target, attacker, judge, secrets)
    tried = fuzz(sides, behaviours, templates) if config.mode == "fuzz" else persuade(sides, goals)
    transcripts = [a | {"target": target.name, "attacker": attacker.name, "judge": by} for a in tried]
    found = safety.attack_success(transcripts, behaviours, by)
    run.write(f"{len(transcripts)} attempts at {found['n']} behaviours: {found['unsafe']} brought about, "
              f"{found['safe']} not, {found['unjudged']} not judged, {found['untried']} not tried",
              transcripts=transcripts)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
