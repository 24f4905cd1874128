"""Models for the tests: one that answers from a script, and can die, fail and babble; and a small random checkpoint."""
import json
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from conftest import BASE, small_model

from checkpoints import save_model
from data.llm import Reply, Request, Sampling
from data.tokenizer import load_tokenizer


class Killed(BaseException):
    """What kill -9 is to a process: nothing catches it."""


class Scripted:
    """Answers with reply(request, sampling): a text, or (text, finished); None fails. Dies after `lives` questions."""

    name = "scripted"

    def __init__(self, reply: Callable, lives: int = 10**9):
        self.reply, self.lives, self.asked = reply, lives, []

    def replies(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Reply | str]]:
        for i, request in enumerate(requests):
            if len(self.asked) == self.lives:
                raise Killed
            self.asked.append(request)
            said = self.reply(request, sampling)
            if said is None:
                yield i, "no answer"
            else:
                text, finished = said if isinstance(said, tuple) else (said, True)
                yield i, Reply(text, finished, 1, 1, 0.0)


def number(*parts) -> int:
    """The same number for the same parts, in every process."""
    return zlib.crc32(repr(parts).encode())


JUNK = ("\n", "\n\n", ":", "###", "1. ", "9.", "Example 2", "Input:", "Output:", "Class label:", "Rating:", "N/A",
        "Instruction:", "<noinput>", "[[unsafe]]", "Overall Score: 11", "\0", "\ud800", "é", "　", "{x}", "%s", "\\",
        "٣. ", "²")


def corrupt(text: str, seed: int) -> str:
    """The text cut, doubled, swapped or littered in up to five places."""
    rng = random.Random(f"corrupt {seed}")
    for _ in range(rng.randrange(6)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice((text[:a] + text[b:], text[:b] + text[a:], text[:a], text[b:] + text[:a],
                           text[:a] + rng.choice(JUNK) + text[a:], text[:a] + text[a:b].swapcase() + text[b:]))[:5000]
    return text


def damaged(reply: Callable) -> Callable:
    """The same replies, corrupted."""
    def broken(request, sampling):
        said = reply(request, sampling)
        text, finished = said if isinstance(said, tuple) else (said, True)
        return corrupt(text, number(request)), finished

    return broken


def small_checkpoint(path: Path) -> Path:
    """Random, with logits far from uniform: what it says depends on all that was said."""
    tokenizer = load_tokenizer(BASE)
    model = small_model(vocab_size=tokenizer.vocab_size, width=32, dtype=torch.float32, scale=8.0)
    save_model(model, path, tokenizer)
    return path


def records(out: str | Path, *names: str) -> list[list[dict]]:
    """What a recipe wrote, by the files' names."""
    texts = [(Path(out) / f"{name}.jsonl").read_text() for name in names]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def files(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def survives_kills(run: Callable[[Scripted, Path], None], reply: Callable, folder: Path,
                   deaths: int = 6) -> dict[str, bytes]:
    """Whenever a run is killed, and however often, the next gives the files of an undisturbed one; returns these."""
    whole = Scripted(reply)
    run(whole, folder / "whole")
    expected = files(folder / "whole")
    total = len(whole.asked)
    assert total >= 4
    for death in sorted({1, 2, total - 1, *(random.Random(0).randrange(1, total) for _ in range(deaths))}):
        out = folder / f"after_{death}"
        try:
            run(Scripted(reply, death), out)
            raise AssertionError("it was to die")
        except Killed:
            pass
        again = Scripted(reply)
        run(again, out)
        assert files(out) == expected and len(again.asked) == total - death
    often, deaths = folder / "often", 0
    while True:
        try:
            run(Scripted(reply, 3), often)
            break
        except Killed:
            deaths += 1
    assert files(often) == expected and deaths == (total - 1) // 3
    return expected
