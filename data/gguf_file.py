"""What stands before the weights in a GGUF file: keys and values, and where each tensor lies (ggml's docs/gguf.md).

Every count is held against the bytes that are left before anything of that size is made.
"""
import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from families import LARGEST
from runtime import fail

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
AGAIN = "download it again"


class Entry(NamedTuple):
    """A tensor of the file, its shape in PyTorch's order, and the bytes that hold it."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class Header:
    """A file's `keys` and `tensors`; `at` is how far it has been read."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file, self.data, self.at = file, data, 4
        if data[:4] != b"GGUF":
            self.refuse("does not begin with GGUF, expected a .gguf file")
        version, tensors, keys = self._numbers("I")[0], *self._numbers("Q", 2)
        if version not in (2, 3):
            self.refuse(f"is version {version} of GGUF, expected 2 or 3 in little-endian order: convert it anew")
        self.keys: dict = {}
        for _ in range(keys):
            name = self._text()
            if name in self.keys:
                self.refuse(f"names {name} twice: {AGAIN}")
            self.keys[name] = self._value(name, self._numbers("I")[0])
        found = [self._tensor() for _ in range(tensors)]
        self.tensors = self._place(found)

    def refuse(self, message: str) -> NoReturn:
        """One line, whatever the names in the file are made of."""
        fail("".join(c if c.isprintable() else " " for c in f"{self.file}: {message}"))

    def _take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        if size > len(self.data) - self.at:
            self.refuse(f"asks for {size:,} bytes from byte {self.at:,} on, but ends at {len(self.data):,}: {AGAIN}")
        self.at += size
        return self.at - size

    def _numbers(self, form: str, count: int = 1) -> tuple:
        return struct.unpack_from(f"<{count}{form}", self.data, self._take(count * struct.calcsize(form)))

    def _text(self) -> str:
        size = self._numbers("Q")[0]
        begin = self._take(size)
        try:
            return self.data[begin : begin + size].decode()
        except UnicodeDecodeError as error:
            self.refuse(f"the text at byte {begin:,} is not UTF-8 ({error.reason}): {AGAIN}")

    def _value(self, name: str, kind: int):
        if kind == STRING:
            return self._text()
        if kind in NUMBERS:
            return self._single(NUMBERS[kind], self._numbers(NUMBERS[kind]))[0]
        inner, count = self._numbers("I")[0], self._numbers("Q")[0] if kind == ARRAY else 0
        if count > LARGEST["vocab_size"]:
            self.refuse(f"{name} is a list of {count:,}, expected at most {LARGEST['vocab_size']:,}: {AGAIN}")
        if kind == ARRAY and inner in NUMBERS:
            return self._single(NUMBERS[inner], self._numbers(NUMBERS[inner], count))
        if kind == ARRAY and inner == STRING:
            return [self._text() for _ in range(count)]
        self.refuse(f"{name} is of kind {inner if kind == ARRAY else kind}, which GGUF does not have: {AGAIN}")

    @staticmethod
    def _single(form: str, values: tuple) -> list:
        """Floats of 32 bits as the shortest decimal that means the same: 1e-05, not 9.999999747378752e-06."""
        return [float(str(np.float32(value))) for value in values] if form == "f" else list(values)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (dimensions,) = self._text(), self._numbers("I")
        if not 1 <= dimensions <= 4:
            self.refuse(f"tensor {name} has {dimensions} dimensions, expected 1 to 4: {AGAIN}")
        shape = self._numbers("Q", dimensions)[::-1]
        return name, shape, *self._numbers("I"), *self._numbers("Q")

    def _place(self, found: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, Entry]:
        """The tensors by name, each within the file, and together no larger than it."""
        gguf = package()
        alignment = self.keys.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**16:
            self.refuse(f"general.alignment is {alignment!r}, expected a small power of two: {AGAIN}")
        begin = -(-self.at // alignment) * alignment
        tensors: dict[str, Entry] = {}
        for name, shape, number, offset in found:
            if name in tensors:
                self.refuse(f"holds tensor {name} twice: {AGAIN}")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                self.refuse(f"tensor {name} is of kind {number}, which this version of the gguf package does not "
                            "know: pip install --upgrade gguf")
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            size = math.prod(shape) // block * block_bytes
            if 0 in shape or shape[-1] % block or offset + size > len(self.data) - begin:
                self.refuse(f"tensor {name} of shape {list(shape)} as {kind.name} does not fit into the file, "
                            f"which ends {len(self.data) - begin - offset:,} bytes behind its beginning: {AGAIN}")
            tensors[name] = Entry(kind.name, shape, begin + offset, size)
        if sum(entry.size for entry in tensors.values()) > len(self.data) - begin:
            self.refuse(f"its tensors overlap: {AGAIN}")
        return tensors

    # ------------------------------------------------------------------------------- keys, checked

    def get(self, name: str, kind: type, default=None):
        """The value of a key, `default` without it; of another type than `kind` it is refused."""
        value = self.keys.get(name, default)
        if value is not None and type(value) is not kind:
            self.refuse(f"{name} is a {type(value).__name__}, expected a {kind.__name__}: {AGAIN}")
        return value

    def whole(self, name: str, largest: int, default: int | None = None) -> int:
        value = self.get(name, int, default)
        if value is None or not 0 < value <= largest:
            self.refuse(f"{name} is {value}, expected a whole number from 1 to {largest:,}: {AGAIN}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, int if type(self.keys.get(name)) is int else float, default)
        if value is None or not 0 < value < math.inf:
            self.refuse(f"{name} is {value}, expected a number above 0: {AGAIN}")
        return value


def package():
    """The gguf package, which knows every kind of quantisation: asked for where it is needed."""
    try:
        import gguf
    except ImportError:
        fail("a GGUF file needs the gguf package to be read: pip install gguf")
    return gguf
