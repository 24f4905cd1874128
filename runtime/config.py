"""Settings: dataclass defaults, then a TOML file, then key=value; and the one line that says what a user got wrong."""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import sys
import tomllib
import typing
from pathlib import Path
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """One line on stderr and exit code 2: for what the user wrote. A bug of ours raises and shows its traceback."""
    print(message, file=sys.stderr)
    raise SystemExit(2)



def load_config(cls: type, doc: str, argv: list[str] | None = None):
    """An instance of the frozen dataclass `cls`: its defaults, then `--config FILE` (TOML), then `key=value`."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        sources = [inspect.getsource(c) for c in cls.__mro__ if dataclasses.is_dataclass(c)]
        print("\n\n".join([doc.strip(), *sources]))
        raise SystemExit(0)
    types = typing.get_type_hints(cls)
    values: dict = {}
    rest = list(argv)
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            fail("--config: names no file, expected e.g. --config configs/tiny/sft.toml")
        file = rest[at + 1]
        del rest[at : at + 2]
        try:
            table = tomllib.loads(Path(file).read_text())
        except OSError as error:
            fail(f"{file}: cannot be read ({error.strerror}): check the path after --config")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            fail(f"{file}: is not TOML ({error}): numbers are written 0.1, words in quotes, switches true or false")
        for key, value in table.items():
            values[key] = _checked(types, key, value, file)
    for word in ("dry_run=true" if word == "--dry-run" else word for word in rest):
        key, equals, text = word.partition("=")
        if not equals:
            fail(f"command line: '{word}' is not key=value, expected e.g. lr=1e-4 (or --config FILE, --help)")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word is text
        if types.get(key) is str:
            value = text.strip("\"'")  # a folder named 2024-01-01 is not a date
        values[key] = _checked(types, key, value, "command line")
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            fail(f"command line: {field.name} is missing, expected {field.name}=... there or in the --config file")
    return cls(**values)


def _checked(types: dict, key: str, value, place: str):
    """The value as the field's type, or one line that shows a right one."""
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        fail(f"{place}: unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else f", expected one of {', '.join(types)}"))
    wanted = types[key]
    if typing.get_origin(wanted) is typing.Literal:
        if value not in typing.get_args(wanted):
            choices = " or ".join(repr(x) for x in typing.get_args(wanted))
            fail(f"{place}: {key} is {value!r}, expected {choices}")
        return value
    if wanted is float and type(value) is int:
        return float(value)
    inner = typing.get_args(wanted)
    right = isinstance(value, list) and all(type(x) is inner[0] for x in value) if inner else type(value) is wanted
    if not right or (wanted is float and not math.isfinite(value)):
        kind, example = {int: ("a whole number", "8"), float: ("a number", "0.1"), bool: ("a switch", "true or false"),
                         str: ("text", "runs/one"), list[int]: ("a list", "[0, 1]")}.get(wanted, ("a list", '["one", "two"]'))
        fail(f"{place}: {key} is {value!r}, expected {kind} such as {example}")
    return value


def check_range(key: str, value: float, low: float, high: float) -> None:
    """Leave with one line if a setting is out of range."""
    if not low <= value <= high:
        fail(f"{key} is {value:g}, expected {f'at least {low:g}' if high == math.inf else f'between {low:g} and {high:g}'}")


def arguments(parser: argparse.ArgumentParser, argv: typing.Sequence[str] | None = None) -> argparse.Namespace:
    """The words of a command; what is wrong with them is one line, without the usage."""
    parser.error = lambda message: fail(f"{parser.prog}: {message}: --help shows what it takes")
    return parser.parse_args(argv)


def config_toml(config) -> str:
    """The resolved config as a TOML file that load_config reads back to the same values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
