"""Prompts whose constraints a rule can check: a word limit, a number of bullets, JSON that parses, a given opening.

    rule("What is rain? Answer in at most 12 words.", "Water that falls from clouds.")        1.0

The last sentence of a prompt is its constraint, so a prompt alone says what to check. `kept` makes the rule a reward
of ppo.py; with replies of the model itself it makes preferences where no others are at hand. It says nothing about
whether a reply is right: an empty one is refused, but "Rain. Rain." is not.
"""
import json
import re

SUBJECTS = """rain|a volcano|photosynthesis|gravity|a rainbow|the moon|an earthquake|electricity|a magnet|the heart|
a library|a bridge|a bicycle|the internet|a compass|a telescope|bread|cheese|chess|football|the piano|a garden|
a passport|a budget|money|a bank|a contract|an election|a museum|poetry|a novel|a dictionary|a map|a clock|a mirror|
a candle|glass|paper|plastic|steel|a desert|an island|a river|a forest|the ocean|snow|a whale|a bee|a spider|
an elephant|a penguin|coffee|tea|sugar|salt|honey|an apple|a potato|rice|soap|sleep|a dream|memory|laughter|friendship|
a vaccine|a virus|yoga|running|swimming""".replace("\n", "").split("|")
QUESTIONS = ("What is {}?", "Tell me about {}.", "Why does {} matter to people?")
HELD_OUT = 5  # every fifth subject is for evaluation


def constraints(number: int) -> tuple[str, ...]:
    """One of each kind; `number` varies limits and openings."""
    opening = ("Well", "Actually", "In short", "To begin", "Imagine")[number % 5]
    return (f"Answer in at most {(10, 15, 20, 25)[number % 4]} words.",
            f"Answer with exactly {(2, 3, 4)[number % 3]} bullet points, each on a line that begins with a hyphen.",
            'Answer with nothing but JSON: an object with the keys "name" and "fact".',
            f'Begin your answer with "{opening},".')


def prompts(held_out: bool) -> list[str]:
    """Every subject with every kind of constraint, the question varying; no subject is in both halves."""
    chosen = [(i, subject) for i, subject in enumerate(SUBJECTS) if (i % HELD_OUT == 0) == held_out]
    return [f"{QUESTIONS[(i + kind) % 3].format(subject)} {constraint}"
            for i, subject in chosen for kind, constraint in enumerate(constraints(i))]


def rule(prompt: str, reply: str) -> float:
    """1.0 if the reply keeps the constraint that ends the prompt, else 0.0."""
    reply = reply.strip()
    if found := re.search(r"at most (\d+) words\.$", prompt):
        return float(0 < len(reply.split()) <= int(found[1]))
    if found := re.search(r"exactly (\d+) bullet points", prompt):
        lines = [line.strip() for line in reply.splitlines() if line.strip()]
        return float(len(lines) == int(found[1]) and all(re.match(r"-\s*\w", line) for line in lines))
    if found := re.search(r'Begin your answer with "(.+)"\.$', prompt):
        return float(reply.startswith(found[1]) and len(reply) > len(found[1]))
    if prompt.endswith('the keys "name" and "fact".'):
        try:
            value = json.loads(reply)
        except ValueError:
            return 0.0
        return float(isinstance(value, dict) and value.keys() == {"name", "fact"}
                     and all(isinstance(text, str) and text for text in value.values()))
    raise ValueError(f"the prompt ends with no known constraint: {prompt[-60:]!r}")


def kept(records: list[dict], replies: list[str], tokens: list[int], finished: list[bool]) -> list[float]:
    """`rule` as a reward function of ppo.py (rewards/functions.py)."""
    return [rule(record["prompt"][-1]["content"], reply) for record, reply in zip(records, replies, strict=True)]


def kind(prompt: str) -> str:
    for name, sign in (("words", " words."), ("bullets", "bullet points"), ("opening", "Begin your")):
        if sign in prompt:
            return name
    return "json"
