"""Adapters on disk, as PEFT writes them: adapter_config.json, adapter_model.safetensors, and what they mean.

    name     what PEFT calls a layer: transformers' name of it, here without the prefix "base_model.model."
    target   target_modules as last names, full names, a regular expression or "all-linear"; less exclude_modules,
             those in modules_to_save, and the layers that layers_to_transform leaves out
    pattern  rank_pattern and alpha_pattern: the first key that, as a regular expression, matches the end of the name

An adapter is used whole or refused: each tensor is taken once, and what is left over ends the run with one line. So
does a setting that changes what is computed and is not in USED. adapters.py puts the tensors on a model.
"""
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import new_folder
from families import find_folder
from runtime import fail, shown
from runtime.json_files import SWITCH, Kind, number, read_json, whole

PREFIX = "base_model.model."
MERGE = "merge it with PEFT (merge_and_unload), save the model and load that"


# ------------------------------------------------------------------------------- the configuration

NUMBER, RANK = number(-1e30, 1e30), whole(1, 2**16)


def _is_names(value) -> bool:
    """Names of modules, which may be regular expressions."""
    try:
        return not isinstance(value, dict) and all(map(re.compile, [value] if isinstance(value, str) else value or []))
    except (re.error, TypeError, OverflowError, RecursionError):
        return False


def _is_pattern(value, is_value: Callable[[object], bool] = NUMBER.fits) -> bool:
    return value is None or (isinstance(value, dict) and _is_names(list(value)) and all(map(is_value, value.values())))


def _is_indices(value) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


NAMES = Kind(_is_names, "names, a regular expression or null")
USED = {  # the settings that are used: PEFT's default, and what a value has to be
    "r": (8, RANK),
    "lora_alpha": (8, NUMBER),
    "lora_dropout": (0.0, number(0, 0.9999)),
    "use_rslora": (False, SWITCH),
    "use_dora": (False, SWITCH),
    "lora_bias": (False, SWITCH),
    "ensure_weight_tying": (False, SWITCH),
    "init_lora_weights": (True, Kind(lambda value: isinstance(value, (bool, str)), "true, false or a name")),
    "target_modules": (None, NAMES),
    "exclude_modules": (None, NAMES),
    "modules_to_save": (None, Kind(lambda value: _is_names(value) and not isinstance(value, str), "a list of names")),
    "layers_to_transform": (None, Kind(lambda value: value is None or type(value) is int or _is_indices(value),
                                       "numbers of layers or null")),
    "layers_pattern": (None, NAMES),
    "rank_pattern": ({}, Kind(lambda value: _is_pattern(value, RANK.fits), "whole numbers from 1 by name")),
    "alpha_pattern": ({}, Kind(_is_pattern, "numbers by name")),
    "trainable_token_indices": (None, Kind(lambda value: _is_indices(value) or _is_pattern(value, _is_indices),
                                           "token ids, or token ids by layer")),
}
DEFAULTS = {name: default for name, (default, _) in USED.items()}
# Say nothing about what is computed: how training began or was run, where the base lies, what the tensors show.
HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "bias", "fan_in_fan_out", "megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size"}
UNMERGEABLE = {  # settings and kinds for which PEFT has no merge_and_unload, or a wrong one
    "alora_invocation_tokens", "arrow_config", "layer_replication", "prompt_tuning", "multitask_prompt_tuning",
    "p_tuning", "prefix_tuning", "adaption_prompt", "cpt", "cartridge", "xlora", "poly"}
# How training began, where the base stays as it is; "pissa" and "olora" take their start out of the base (residual).
PLAIN_STARTS = {"true", "false", "gaussian", "eva", "orthogonal", "mica", "lora_ga"}


def _remedy(kind: str) -> str:
    return "it cannot be merged either: train a plain LoRA" if kind in UNMERGEABLE else MERGE


def read_config(file: Path) -> dict:
    """adapter_config.json as it stands; one line if it cannot be used whole."""
    find_folder(file.parent)
    if not file.is_file():
        fail(f"{file.parent}: holds no adapter_config.json, expected an adapter in PEFT's format")
    config = read_json(file)
    method = config.get("peft_type")
    if method != "LORA":
        fail(f"{file}: peft_type is {shown(method)}, expected 'LORA': {_remedy(str(method).lower())}")
    for name, (default, kind) in USED.items():
        if not kind.fits(config.get(name, default)):
            fail(f"{file}: {name} is {shown(config[name])}, expected {kind.expected}: copy it again")
    for name in sorted(set(config) - set(USED) - HARMLESS):
        if config[name] not in (None, False, 0, "", [], {}):
            value = json.dumps(config[name])[:80]
            fail(f"{file}: {shown(name)[1:-1]} is {value}, which changes what is computed and is not supported here: "
                 f"{_remedy(name)}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in PLAIN_STARTS | {"pissa", "olora"}:
        fail(f"{file}: init_lora_weights is {shown(start)}, which changes the base in a way that cannot be repeated: "
             "save it where it was trained as a plain LoRA (path_initial_model_for_weight_conversion) or merged")
    return config


def is_target(config: dict, name: str, is_head: bool = False) -> bool:
    """Whether PEFT gives the layer `name` an adapter."""
    excluded, targets = config["exclude_modules"], config["target_modules"]
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _listed(excluded, name)):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config["modules_to_save"] or []):
        return False
    if isinstance(targets, str):
        return not is_head if targets.lower() == "all-linear" else re.fullmatch(targets, name) is not None
    return _listed(targets or [], name) and (name in targets or _in_layers(config, name))


def _listed(names: list[str], name: str) -> bool:
    return any(name == listed or name.endswith(f".{listed}") for listed in names)


def _in_layers(config: dict, name: str) -> bool:
    """Whether the number of the layer that `name` stands in is one of layers_to_transform."""
    layers, lists = config["layers_to_transform"], config["layers_pattern"]
    if layers is None or layers == []:
        return True
    lists = [lists] if isinstance(lists, str) else lists or []
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in lists] or [r".*?\.[^.]*\.(\d+)\."]
    found = next(filter(None, (re.match(expression, name) for expression in expressions)), None)
    return found is not None and int(found[1]) in (layers if isinstance(layers, list) else [layers])


def by_pattern(pattern: dict | None, name: str, default: float) -> float:
    """The value of the first key that matches the end of `name`."""
    return next((value for key, value in (pattern or {}).items() if _at_end(key).match(name)), default)


@cache  # of its own, since re keeps 512 and an adapter may have a key for every layer
def _at_end(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})$")


def matches(config: dict, names: list[str]) -> Iterator[str]:
    """All that a configuration's regular expressions are matched with, each key given before its own (try_out)."""
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern",
                "alpha_pattern"):
        yield key
        patterns = config[key] or []
        if isinstance(patterns, dict):  # without a sign of repetition a key ends, and there may be thousands
            patterns = {pattern: 1 for pattern in patterns if set(pattern) & set("*+?{")}
        alone = DEFAULTS | {"layers_to_transform": [0], key: patterns}
        for name in names:
            is_target(alone, name)
            _in_layers(alone, name)
            by_pattern(alone["rank_pattern"] or alone["alpha_pattern"], name, 0)


def is_saved(config: dict, name: str) -> bool:
    """Whether a parameter stands in a module that modules_to_save names, by the end of its name as PEFT has it."""
    parts = name.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(module.endswith(saved) for module in modules for saved in config["modules_to_save"] or [])


# ------------------------------------------------------------------------------------- the tensors

class AdapterFile:
    """An adapter's folder: its tensors, named without PREFIX and to be taken once each, and what is said of them.

    `config` is adapter_config.json with PEFT's defaults for what it leaves out (`raw`: without), `ours`
    what we keep beside the tensors, `scores` of it a reward model's scaling.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)
        self.file = self.folder / "adapter_model.safetensors"
        self.raw = read_config(self.folder / "adapter_config.json")
        self.config = DEFAULTS | self.raw
        if not self.file.is_file():
            pickled = (self.folder / "adapter_model.bin").is_file()
            fail(f"{self.file}: no such file{' (it holds pickled tensors, which are never opened)' if pickled else ''}"
                 ": save the adapter as safetensors")
        try:
            tensors = load_file(self.file)
            with safe_open(self.file, framework="pt") as file:
                self.ours = json.loads((file.metadata() or {}).get("ours", "{}"))
        except (OSError, ValueError, SafetensorError) as error:
            fail(f"{self.file}: cannot be read ({error}): copy it again")
        self.scores = {key: self.ours.get(key, usual) for key, usual in (("score_mean", 0.0), ("score_std", 1.0))}
        for key, tensor in tensors.items():
            if not key.startswith(PREFIX):
                fail(f"{self.file}: holds {key}, expected names that begin with {PREFIX}: {MERGE}")
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                fail(f"{self.file}: {key} is of type {tensor.dtype}, expected float32, bfloat16 or float16: {MERGE}")
            if not torch.isfinite(tensor).all():
                fail(f"{self.file}: {key} holds NaN or infinity: its training diverged, take an earlier checkpoint")
        self.tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}

    def take(self, names: str | list[str], shape: list[int | None], required: bool = True) -> Tensor | None:
        """The tensor of that name, which has this shape (None: any size); None if it is missing and may be.

        Of several names it has any; what stands there twice is equal.
        """
        names = [names] if isinstance(names, str) else names
        name, *others = [name for name in names if name in self.tensors] or [names[0]]
        if name not in self.tensors:
            if not required:
                return None
            fail(f"{self.file}: has no {PREFIX}{name}, which adapter_config.json speaks of: copy both again, or save "
                 "the adapter again where it was trained")
        tensor = self.tensors.pop(name)
        for other in others:
            if not torch.equal(self.tensors.pop(other), tensor):
                fail(f"{self.file}: {name} and {other} differ, expected two copies: load the base that it was made for")
        fits = [want in (None, size) for want, size in zip(shape, tensor.shape, strict=False)]
        if tensor.ndim != len(shape) or not all(fits):
            fail(f"{self.file}: {PREFIX}{name} has shape {list(tensor.shape)}, expected "
                 f"{[size or 'any' for size in shape]}: load the base that it was made for")
        return tensor

    def finish(self) -> None:
        """Refuse the file by the first tensor that nothing took."""
        for name in sorted(self.tensors):
            fail(f"{self.file}: holds {PREFIX}{name}, for which neither this model nor its adapter_config.json has a "
                 f"place: load the base that it was made for, or {MERGE}")


def write_adapter(path: str | Path, config: dict, tensors: dict[str, Tensor], ours: dict, tokenizer) -> None:
    """The folder; with the tokenizer, from which PEFT sees how many rows the base needs.

    What is ours lies beside the tensors, since PEFT warns of keys it does not know; in one entry, since safetensors
    orders several at random and the same adapter shall be the same bytes.
    """
    with new_folder(Path(path)) as beside:
        named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, beside / "adapter_model.safetensors", metadata={"ours": json.dumps(ours)})
        (beside / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(beside)
