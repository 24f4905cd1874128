"""What the five recipes for synthetic data share: settings, prompts, asking models, the reasons, the files.

    prompts.toml    what each recipe says to models, and the lists it draws from
    replies.jsonl   every raw reply as it arrives: a run that was stopped asks only for the rest when started again
    dropped.jsonl   what was left out, and why
"""
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path

import runtime
from data.llm import Budget, Reply, Request, Sampling, ask
from data.records import fault, write_lines

PROMPTS = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Settings:
    out: str = ""                    # folder
    seed: int = 0
    device: str = "auto"             # of checkpoints: cpu, cuda, auto
    budget: int = 0                  # tokens this run may spend; 0: no limit
    max_tokens: int = 1024           # of a reply
    temperature: float = 1.0

    def __post_init__(self):
        self.at_least(0, "budget")

    def at_least(self, low: float, *keys: str) -> None:
        runtime.check_ranges(self, **dict.fromkeys(keys, (low, inf)))


def user(text: str) -> list[dict]:
    """A dialogue of one user turn."""
    return [{"role": "user", "content": text}]


def swapped(messages: list[dict]) -> list[dict]:
    """The dialogue as the model that plays the user sees it: its own turns are the assistant's."""
    other = {"user": "assistant", "assistant": "user"}
    return [m | {"role": other[m["role"]]} for m in messages]


class Run:
    """One run: its folder, what it may still spend, and what it has dropped."""

    def __init__(self, config: Settings):
        self.out, self.dropped = runtime.open_folder(config.out), []
        self.sampling = Sampling(config.max_tokens, config.temperature)
        self.ledger = self.out / "replies.jsonl"
        self.budget = Budget(tokens=config.budget or inf)

    def ask(self, model, requests: list[Request], progress: str = "",
            sampling: Sampling | None = None) -> list[Reply | None]:
        return ask(model, requests, sampling or self.sampling, self.ledger, self.budget, progress)

    def drop(self, stage: str, reason: str, **record) -> None:
        self.dropped.append({"stage": stage, **record, "reason": reason})

    def usable(self, reply: Reply | None, stage: str, read: Callable = str.strip, **record):
        """What `read` makes of a reply; "" if that is a ValueError or the reply no use, noted among the dropped."""
        try:
            if not (reason := fault(reply)):
                return read(reply.text)
        except ValueError as error:
            reason = str(error)
        self.drop(stage, reason, **record, text=reply and reply.text)
        return ""

    def write(self, summary: str, **files: list[dict]) -> None:
        """Each list as NAME.jsonl, with dropped.jsonl beside them, and a summary on the terminal."""
        for name, records in (files | {"dropped": self.dropped}).items():
            write_lines(self.out / f"{name}.jsonl", records)
        print(f"{self.out}: {summary}; {len(self.dropped)} dropped, for reasons in dropped.jsonl")
        for (stage, reason), number in Counter((d["stage"], d["reason"]) for d in self.dropped).most_common():
            print(f"{number:8,}  {stage}: {reason}")
