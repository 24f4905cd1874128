"""Settings: dataclass defaults, then a TOML file, then key=value; and the one line that says what a user got wrong."""
import argparse
import dataclasses
import difflib
import inspect
import json
import math
import sys
import tomllib
import typing
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, NoReturn


def fail(message: str) -> NoReturn:
    """One line on stderr and exit code 2: for what the user wrote. A bug of ours raises and shows its traceback."""
    print(message, file=sys.stderr)
    raise SystemExit(2)



@dataclass(frozen=True)
class Settings:
    """Settings that all training scripts share; a script may set another default."""

    lr: float = 1e-4                 # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.1        # final learning rate as a share of the peak
    warmup_ratio: float = 0.1        # share of the steps with a rising learning rate
    weight_decay: float = 0.0        # on matrices, 0-0.1
    beta2: float = 0.98              # of AdamW, 0.95-0.999
    adam_eps: float = 1e-8           # AdamW's epsilon, 1e-5-1e-8: keeps tiny gradients from taking full-size steps
    max_grad_norm: float = 1.0       # a longer gradient is scaled down to this norm
    micro_tokens: int = 4096         # tokens of a micro-batch: what fits in memory; a larger dialogue is one by itself

    lora_rank: int = 0               # 8-256: train adapters of this rank on a frozen base; 0: train every weight
    lora_alpha: float = 16.0         # adapters count alpha / rank
    lora_dropout: float = 0.0        # on what enters an adapter, 0-0.1
    lora_kind: Literal["lora", "rslora", "dora"] = "lora"
    lora_plus: float = 1.0           # how much faster B learns than A; LoRA+ recommends 16
    quantize: Literal["none", "nf4", "int8"] = "none"  # the frozen base, in four or eight bits a weight
    checkpointing: bool = False      # keep only each block's input, run it again for gradients: a third slower
    shard: int = 0                   # under torchrun: processes that share one copy of the weights; 0: all of them

    seed: int = 0                    # order of the data, sampling, new weights
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 where the hardware has it
    device: str = "auto"             # cpu, cuda, auto
    threads: int = 0                 # CPU threads; 0: PyTorch's choice
    kernels: Literal["auto", "torch", "triton"] = "auto"  # auto: Triton on a GPU, PyTorch elsewhere

    # What the data calls the keys of its format, data/formats.py; columns.prompt="question" names one.
    columns: dict[str, str] = dataclasses.field(default_factory=dict)

    out: str = "runs/run"            # folder of the run
    cache: str = "runs/cache"        # folder that keeps large data files tokenized, for all runs; "": none is kept
    save_every: int = 0              # steps between checkpoints; 0: at the end only
    wandb: Literal["off", "offline", "online"] = "off"
    profile: bool = False            # trace a few steps into the run's folder, and print where their time went
    overwrite: bool = False          # start anew in a folder that holds another run
    dry_run: bool = False            # check settings, model and data; print parameters, memory and steps

    def __post_init__(self):
        check_ranges(
            self, lr=(1e-12, 1), min_lr_ratio=(0, 1), warmup_ratio=(0, 0.99), weight_decay=(0, 1), beta2=(0, 0.99999),
            adam_eps=(1e-16, 1), max_grad_norm=(1e-6, inf), micro_tokens=(1, inf), lora_rank=(0, 2**16),
            lora_alpha=(0, inf), lora_dropout=(0, 0.99), lora_plus=(1e-3, inf), shard=(0, inf), seed=(0, 10**9),
            threads=(0, 1024), save_every=(0, inf),
        )
        if self.quantize != "none" and not self.lora_rank:
            fail(f"quantize is '{self.quantize}', which cannot be trained: set lora_rank, e.g. lora_rank=16")


@dataclass(frozen=True)
class DataSettings(Settings):
    """Settings of the scripts that learn from a data file."""

    eval_data: str = ""              # JSONL of the same kind as data, held out; "" for none
    template: str = ""               # chat template; "": the checkpoint's own, or zephyr
    epochs: int = 1                  # passes over the data, 1-6
    max_steps: int = 0               # stop after this many updates; 0: epochs decide
    batch: int = 64                  # dialogues per update
    max_length: int = 512            # tokens of a path, prompt and response, 128-4096; longer ones are cut and counted
    eval_every: int = 0              # steps between evaluations; 0: at the end only

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, epochs=(1, inf), max_steps=(0, inf), batch=(1, inf), max_length=(2, inf),
                     eval_every=(0, inf))


# Keys of earlier versions, which config files and run folders may still hold.
RENAMED = {"max_tokens": "micro_tokens", "floor": "min_lr_ratio", "warmup": "warmup_ratio", "clip": "max_grad_norm",
           "lam": "gae_lambda", "ratio_clip": "clip_eps"}


def load_config(cls: type, doc: str, argv: list[str] | None = None):
    """An instance of the frozen dataclass `cls`: its defaults, then `--config FILE` (TOML), then `key=value`."""
    rest = list(sys.argv[1:] if argv is None else argv)
    if "--help" in rest or "-h" in rest:
        print_help(cls, doc)
    types = typing.get_type_hints(cls)
    values: dict = {}
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            fail("--config: names no file, expected e.g. --config configs/tiny/sft.toml")
        file = rest[at + 1]
        del rest[at : at + 2]
        values = {key: _checked(types, key, value, file) for key, value in read_toml(file).items()}
    for word in rest:
        key, equals, text = ("dry_run=true" if word == "--dry-run" else word).partition("=")
        if not equals:
            fail(f"command line: '{word}' is not key=value, expected e.g. lr=1e-4 (or --config FILE, --help)")
        table, dot, name = key.partition(".")
        if dot and typing.get_origin(types.get(table)) is dict:  # table.name=text
            values[table] = values.get(table, {}) | _checked(types, table, {name: text.strip("\"'")}, "command line")
            continue
        values[key] = _checked(types, key, _parse(types, key, text), "command line")
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            fail(f"command line: {field.name} is missing, expected {field.name}=... there or in the --config file")
    return cls(**values)


def print_help(cls: type, doc: str) -> NoReturn:
    """The script's docstring and its settings as they are written, each once: the comments are the manual."""
    print(doc.strip())
    shown: set[str] = set()
    for c in (c for c in cls.__mro__ if dataclasses.is_dataclass(c)):
        lines = inspect.getsource(c).partition("    def ")[0].rstrip().splitlines()
        print("", *(line for line in lines if line.strip().partition(":")[0] not in shown), sep="\n")
        shown |= {line.strip().partition(":")[0] for line in lines if line.startswith("    ") and ":" in line}
    raise SystemExit(0)


def read_toml(file: str) -> dict:
    try:
        return tomllib.loads(Path(file).read_text())
    except OSError as error:
        fail(f"{file}: cannot be read ({error.strerror}): check the path after --config")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{file}: is not TOML ({error}): numbers are written 0.1, words in quotes, switches true or false")


def _parse(types: dict, key: str, text: str):
    """The right side of key=value, read as TOML; a bare word is text."""
    if types.get(key) is str:
        return text.strip("\"'")  # a folder named 2024-01-01 is not a date
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _checked(types: dict, key: str, value, place: str):
    """The value as the field's type, or one line that shows a right one."""
    if key not in types:
        if RENAMED.get(key) in types:
            fail(f"{place}: '{key}' is called '{RENAMED[key]}' now: write {RENAMED[key]}=")
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(types)}"
        fail(f"{place}: unknown key '{key}', {hint}")
    wanted = types[key]
    if typing.get_origin(wanted) is typing.Literal:
        if value not in typing.get_args(wanted):
            choices = " or ".join(repr(x) for x in typing.get_args(wanted))
            fail(f"{place}: {key} is {value!r}, expected {choices}")
        return value
    if typing.get_origin(wanted) is dict:
        if not isinstance(value, dict) or not all(key and text and type(text) is str for key, text in value.items()):
            fail(f"{place}: {key} is {value!r}, expected names such as {key}.prompt=\"question\"")
        return value
    if wanted is float and type(value) is int:
        return float(value)
    inner = typing.get_args(wanted)
    right = isinstance(value, list) and all(type(x) is inner[0] for x in value) if inner else type(value) is wanted
    if not right or (wanted is float and not math.isfinite(value)):
        shown = {int: ("a whole number", "8"), float: ("a number", "0.1"), bool: ("a switch", "true or false"),
                 str: ("text", "runs/one"), list[int]: ("a list", "[0, 1]")}
        kind, example = shown.get(wanted, ("a list", '["one", "two"]'))
        fail(f"{place}: {key} is {value!r}, expected {kind} such as {example}")
    return value


def check_range(key: str, value: float, low: float, high: float) -> None:
    """Exit with one line if a setting is out of range."""
    if not low <= value <= high:
        expected = f"at least {low:g}" if high == inf else f"between {low:g} and {high:g}"
        fail(f"{key} is {value:g}, expected {expected}")


def check_ranges(config, **ranges: tuple[float, float]) -> None:
    """check_range of several settings, name=(low, high)."""
    for key, (low, high) in ranges.items():
        check_range(key, getattr(config, key), low, high)


def arguments(parser: argparse.ArgumentParser, argv: typing.Sequence[str] | None = None) -> argparse.Namespace:
    """The words of a command; what is wrong with them is one line, without the usage."""
    parser.error = lambda message: fail(f"{parser.prog}: {message}: --help shows what it takes")
    return parser.parse_args(argv)


def config_toml(config) -> str:
    """The resolved config as a TOML file that load_config reads back to the same values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
