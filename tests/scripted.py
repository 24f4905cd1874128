"""A model that answers from a script, for the data recipes: it can die, fail, and speak in tongues."""
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from data.llm import Reply, Request, Sampling


class Killed(BaseException):
    """What kill -9 is to a process: nothing catches it."""


class Scripted:
    """Answers with reply(request, sampling): a text, or (text, finished); None fails. Dies when asked more than `lives` times."""

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


JUNK = ("\n", "\n\n", ":", "###", "1. ", "9.", "Example 2", "Input:", "Output:", "Class label:", "Rating:", "N/A", "Instruction:",
        "<noinput>", "[[unsafe]]", "Overall Score: 11", "\0", "\ud800", "é", "　", "{x}", "%s", "\\", "٣. ", "²")


def corrupt(text: str, seed: int) -> str:
    """The text cut, doubled, swapped or littered in up to five places."""
    rng = random.Random(f"corrupt {seed}")
    for _ in range(rng.randrange(6)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice((text[:a] + text[b:], text[:b] + text[a:], text[:a], text[b:] + text[:a], text[:a] + rng.choice(JUNK) + text[a:],
                           text[:a] + text[a:b].swapcase() + text[b:]))[:5000]
    return text


def files(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def survives_kills(run: Callable[[Scripted, Path], None], reply: Callable, folder: Path, deaths: int = 6) -> dict[str, bytes]:
    """Whenever a run is killed, and however often, running again gives the files of an undisturbed one; returns these."""
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
