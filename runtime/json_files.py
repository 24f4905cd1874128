"""JSON files that somebody else may have written: what is wrong with one is said in a line that names file and key."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from runtime.config import fail, shown


def read_json(file: Path, most: int = 2**24) -> dict:
    """The JSON object of a file that somebody else may have written; one line if it is none, or larger than `most`."""
    try:
        if file.stat().st_size > most:
            raise ValueError(f"it has more than {most:,} bytes")
        text = file.read_text("utf-8")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{file}: is not JSON ({error}): copy it again")
    if not isinstance(value, dict):
        fail(f"{file}: holds a {type(value).__name__}, expected a JSON object: copy it again")
    return value


class Kind(NamedTuple):
    """Whether a value is of the right kind, and that kind in words."""

    fits: Callable[[object], bool]
    expected: str


def whole(low: int, high: int) -> Kind:
    return Kind(lambda x: type(x) is int and low <= x <= high, f"a whole number from {low} to {high:,}")


def number(low: float, high: float) -> Kind:
    return Kind(lambda x: type(x) in (int, float) and low <= x <= high, f"a number from {low:g} to {high:g}")


SWITCH = Kind(lambda x: x in (True, False), "true or false")
STRING = Kind(lambda x: isinstance(x, str), "text")
STRINGS = Kind(lambda x: isinstance(x, list) and all(isinstance(part, str) for part in x), "a list of texts")
TABLE = Kind(lambda x: isinstance(x, dict), "a JSON object")


class Checked(dict):
    """An object of a file, of which each value is checked as it is read: those that nobody reads do no harm."""

    def __init__(self, file: Path, values: dict, kinds: dict[str, Kind], within: str = ""):
        super().__init__(values)
        self.file, self.kinds, self.within = file, kinds, within

    def __getitem__(self, key: str):
        value = super().__getitem__(key)
        kind = self.kinds.get(key)
        if value is not None and kind and not kind.fits(value):
            fail(f"{self.file}: {self.within}{key} is {shown(value)}, expected {kind.expected}: copy the file again")
        return value

    def get(self, key: str, default=None):
        return self[key] if key in self else default  # noqa: SIM401  dict.get would not check it

    def need(self, key: str):
        """A value without which nothing can be computed."""
        if self.get(key) is None:
            fail(f"{self.file}: has no {self.within}{key}: copy the file again")
        return self[key]
