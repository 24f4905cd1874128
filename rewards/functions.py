"""Reward functions of ppo.py: a rule that scores replies, in place of a reward model.

    reward = "rewards/gsm8k.py:right"                          a function of a file
    reward = "rewards/tiny.py:required + 0.1 * my.py:polite"   several, with weights

A function gets four lists, an entry for every reply of the step, and gives as many numbers:

    def polite(records, replies, tokens, finished):
        return [float("please" in reply) for reply in replies]

    records    the prompts' records: every column of the file, and the keys of its form (data/records.py);
               the n replies to one prompt stand together, each with that record
    replies    texts         tokens    of each, its end of sequence included        finished    False: cut at max_tokens

It is called once a step, by one process. Its file belongs to the run as data do: with another text of it the run is
resumed only by accept_change=reward (what it imports is not looked at). Its scores are used as they are; only a reply
without end is treated as `missing_eos` says.
"""
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.files import values
from data.formats import Report, read
from data.store import Trees, load_prompts
from data.tokenizer import Tokenizer
from data.trees import Tree, tree_from_replies
from runtime import distributed, fail

EXAMPLE = 'reward="rewards/gsm8k.py:right"'
TRIED = ("", "Yes.")  # replies with which a function is tried before training; an empty one will come


class Function(NamedTuple):
    name: str       # file.py:function
    weight: float
    call: Callable[[list[dict], list[str], list[int], list[bool]], Sequence[float]]

    @property
    def file(self) -> str:
        return self.name.rpartition(":")[0]


class Replies(NamedTuple):
    """What a function is given, and each reply's record by number, from 1."""

    records: list[dict]
    texts: list[str]
    tokens: list[int]
    finished: list[bool]
    numbers: list[int]


class Fault(Exception):
    """What is wrong with a function, in one line."""


def load_functions(reward: str) -> list[Function]:
    """The functions of the setting `reward`; one line if there is none where it says."""
    functions = []
    for term in reward.split("+") if reward else []:
        parts = re.fullmatch(r"\s*(?:(\S+)\s*\*)?\s*([^*:]+\.py):(\w+)\s*", term)
        try:
            weight = float(parts[1] or 1)
        except (TypeError, ValueError):
            fail(f"reward is '{reward}', of which '{term.strip()}' is not file.py:function, perhaps after a weight and "
                 f"*: write e.g. {EXAMPLE}")
        functions.append(Function(f"{parts[2]}:{parts[3]}", weight, find_function(parts[2], parts[3])))
    return functions


def find_function(file: str, name: str) -> Callable:
    if not Path(file).is_file():
        fail(f"reward: {file}: no such file, expected one with a function of Python: write e.g. {EXAMPLE}")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"reward: {file}: cannot be imported ({said(error)}): mend it")
    found = getattr(module, name, None)
    if not callable(found):
        fail(f"reward: {file}: has no function '{name}': name one that it has")
    return found


def said(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


# ------------------------------------------------------------------------------------------- prompts

def load_prompts_and_records(
    functions: list[Function], path: str, tokenizer: Tokenizer, room: int, *, cache: str = "",
    columns: dict | None = None,
) -> tuple[Trees, dict[int, dict]]:
    """As load_prompts of data/store.py; with functions, which are tried, also the prompts' records by Tree.record."""
    if not functions:
        return load_prompts(path, tokenizer, room, cache=cache, columns=columns), {}
    records = list(read(path, columns=columns)[0])
    rows = [value for _, value in values(path, Report(path))]
    if len(rows) == len(records):  # else a row gives several records, of which each has what its reader kept
        records = [(row if isinstance(row, dict) else {}) | record for row, record in zip(rows, records, strict=True)]
    prompts = load_prompts(path, tokenizer, room, cache=cache, columns=columns, records=records)
    of_prompts = {number: records[number] for number in prompts.rows["record"].tolist()}
    try_functions(functions, prompts, of_prompts, tokenizer)
    return prompts, of_prompts


# -------------------------------------------------------------------------------------------- scores

def function_scores(
    functions: list[Function], trees: list[Tree], drawn: list[Tree], records: dict[int, dict], tokenizer: Tokenizer,
) -> tuple[Tensor | None, str]:
    """The weighted sum of what the functions give, [B], and "", or None and what is wrong; None and "" without any.

    `trees` hold the replies to the prompts `drawn`. One process asks the functions: they may be slow, or draw lots.
    """
    found: list[tuple[Tensor | None, str]] = [(None, "")] if not functions else []
    if functions and distributed.rank() == 0:
        try:
            replies = replies_of(trees, drawn, records, tokenizer)
            weighted = [torch.tensor(ask(f, replies)) * f.weight for f in functions]
            found = [(torch.stack(weighted).sum(0), "")]
        except Fault as fault:
            found = [(None, str(fault))]
    return distributed.all_gather(found)[0]


def replies_of(trees: list[Tree], drawn: list[Tree], records: dict[int, dict], tokenizer: Tokenizer) -> Replies:
    rows = [(records[prompt.record], tokenizer.decode(leaf.tolist()).strip(), len(leaf), not response.cut,
             prompt.record + 1)
            for tree, prompt in zip(trees, drawn, strict=True)
            for (_, leaf), response in zip(tree.leaves, tree.responses, strict=True)]
    return Replies(*map(list, zip(*rows, strict=True)))


def ask(function: Function, replies: Replies) -> list[float]:
    """One function's scores, checked; a Fault names the function, and the record if it is one record's."""
    def given(few: slice):
        return function.call(*(column[few] for column in replies[:4]))

    try:
        answer = given(slice(None))
    except Exception as error:
        raise Fault(f"{function.name}: {where(given, replies)}{said(error)}") from None
    try:
        scores = [float(score) for score in answer]
    except (TypeError, ValueError):
        raise Fault(f"{function.name}: gave {' '.join(repr(answer).split())[:60]}, expected a list of numbers, one for "
                    "every reply") from None
    if len(scores) != len(replies.texts):
        raise Fault(f"{function.name}: gave {len(scores)} scores for {len(replies.texts)} replies, expected one each")
    for score, number, text in zip(scores, replies.numbers, replies.texts, strict=True):
        if not math.isfinite(score):
            raise Fault(f"{function.name}: gave {score} on record {number}, reply {text[:40]!r}, expected a finite "
                        "number")
    return scores


def where(given: Callable, replies: Replies) -> str:
    """The first record with which the function fails by itself, "" if it fails with many only."""
    for i, (number, text) in enumerate(zip(replies.numbers, replies.texts, strict=True)):
        try:
            given(slice(i, i + 1))
        except Exception:
            return f"on record {number}, reply {text[:40]!r}: "
    return ""


def try_functions(functions: list[Function], prompts: Trees, records: dict[int, dict], tokenizer: Tokenizer) -> None:
    """Exit with one line unless the functions can score short replies to the first prompts."""
    drawn = prompts[:2]
    replies = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TRIED]
    trees = [tree_from_replies(0, tree.trunk.tolist(), replies, [True] * len(TRIED)) for tree in drawn]
    fault = function_scores(functions, trees, drawn, records, tokenizer)[1]
    if fault:
        fail(f"reward: {fault}")
