"""Multiple choice by log-likelihood, as the Open LLM Leaderboard (its first version) defined it.

No reply is sampled: every choice is appended to the question, and the model's answer is the likeliest continuation.

    ll_c = sum over the tokens t of choice c of log P(t | context, the choice's earlier tokens)

    ARC-Challenge  25 shots  acc_norm   question, "Answer:"; numeric labels 1-5 stand for A-E
    HellaSwag      10 shots  acc_norm   the beginning of a story, four endings
    MMLU            5 shots  acc        lettered choices, of which the letters are scored; plain mean over subjects
    TruthfulQA      0 shots  mc2        after six fixed questions; the share of probability that true answers get

Random(42) shuffles a task's documents and then draws the shots of each in that order, so that a limit or a
rejected line changes later prompts. Source: EleutherAI/lm-evaluation-harness at b281b092, whose tests' hashes of every
prompt of TruthfulQA and MMLU v0 come out. One departure: contexts begin with BOS where a tokenizer's texts do; the
board left it out (`bos=False`).

What choices share is computed once: they are leaves of one packed tree (`kernels/layout.py`), and so are questions that
begin alike where that takes fewer tokens. A path's last token predicts nothing and is left out: letters cost none.
"""
import csv
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.formats import Report, values
from data.pack import plan
from data.records import Reject, check_text, short
from data.tokenizer import Tokenizer
from judging.prompts import PROMPTS
from judging.ratings import end_interval, wilson
from judging.tables import percent
from kernels.layout import Layout
from kernels.logprobs import linear_logprobs
from model import Transformer
from runtime import check_range, fail

# ------------------------------------------------------------------------------- records to questions

class Question(NamedTuple):
    query: str                    # what the choices continue, without shots
    choices: tuple[str, ...]      # bare texts; TruthfulQA: those of mc1, then those of mc2
    gold: int                     # index of the right one
    truths: tuple[int, ...] = ()  # of TruthfulQA's mc2 choices: 1 true, 0 false
    subject: str = ""             # of MMLU, whose shots are the first of the same subject, undrawn
    header: str = ""              # before the shots


def arc_question(record: dict) -> Question:
    """{"question", "choices": {"text", "label"}, "answerKey"}, two lists, or AI2's nested original."""
    question, choices, labels = (record.get(key) for key in ("question", "choices", "labels"))
    if isinstance(question, dict):  # {"stem", "choices": [{"text", "label"}, ...]}
        items, question = question.get("choices"), question.get("stem")
        choices, labels = ([item.get(key) for item in items] for key in ("text", "label"))
    elif isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    choices, key = _texts(choices, "choices"), str(record.get("answerKey"))
    gold = max("ABCDE".find(key), "12345".find(key)) if len(key) == 1 else -1
    if not 0 <= gold < len(choices) or labels and [str(label) for label in labels][gold : gold + 1] != [key]:
        raise Reject(f"'answerKey' is {key!r}, choices are labelled {labels}, expected one of A-E or 1-5 in order")
    return Question(f"Question: {_text(question, 'question')}\nAnswer:", choices, gold)


def prepared_question(record: dict) -> Question:
    """{"query", "choices", "gold"}, as preprocessed files have them."""
    choices = _texts(record.get("choices"), "choices")
    return Question(_text(record["query"], "query"), choices, _index(record.get("gold"), len(choices)))


def hellaswag_question(record: dict) -> Question:
    if "query" in record:
        return prepared_question(record)
    activity, start, end = (_text(record.get(key), key, empty=True) for key in ("activity_label", "ctx_a", "ctx_b"))
    texts = f"{activity}: {start} {end.capitalize()}", *_texts(record.get("endings"), "endings")
    query, *choices = map(hellaswag_text, texts)
    return Question(query, tuple(choices), _index(record.get("label"), len(choices)))


def hellaswag_text(text: str) -> str:
    """Without WikiHow's marks: " [title]" ends a sentence, other brackets go, two spaces become one, in one pass."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def piqa_question(record: dict) -> Question:
    """The original's {"goal", "sol1", "sol2", "label"}, or a preprocessed one."""
    if "query" in record:
        made = prepared_question(record)
        return made._replace(query=f"{made.query.strip()}\nAnswer:")
    choices = _texts([record.get("sol1"), record.get("sol2")], "sol1, sol2")
    return Question(f"Question: {_text(record.get('goal'), 'goal')}\nAnswer:", choices, _index(record.get("label"), 2))


def mmlu_question(record: dict) -> Question:
    """{"subject", "question", "choices", "answer" or "gold": 0-3 or A-D}; the letters are the continuations."""
    question, lines, gold, subject = _mmlu(record)
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return Question(f"{question.strip()}\n{lines}Answer:", tuple("ABCD"), gold, subject=subject, header=header)


def mmlu_v0_question(record: dict) -> Question:
    """The harness's older form: no header, and the texts of the choices are the continuations."""
    question, lines, gold, subject = _mmlu(record)
    choices = _texts(record["choices"], "choices")
    return Question(f"Question: {question}\nChoices:\n{lines}Answer:", choices, gold, subject=subject)


def _mmlu(record: dict) -> tuple[str, str, int, str]:
    choices, gold = record.get("choices"), record.get("answer", record.get("gold"))
    if not isinstance(choices, list) or len(choices) != 4:
        raise Reject(f"'choices' is {short(choices)}, expected four texts")
    texts = (_text(choice, "choices", empty=True) for choice in choices)
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", texts, strict=True))
    gold = "ABCD".index(gold) if gold in tuple("ABCD") else _index(gold, 4)
    return _text(record.get("question"), "question"), lines, gold, _text(record.get("subject"), "subject")


def truthfulqa_question(record: dict) -> Question:
    """{"question", "mc1_targets", "mc2_targets"}: {text: 1 or 0, ...} or {"choices", "labels"}; the first is true."""
    found = []
    for key in ("mc1_targets", "mc2_targets"):
        targets = record.get(key) if isinstance(record.get(key), dict) else {}
        choices, labels = list(targets), list(targets.values())
        if isinstance(targets.get("choices"), list):
            choices, labels = targets["choices"], targets.get("labels")
        choices = _texts(choices, key)
        if not isinstance(labels, list) or len(labels) != len(choices) or labels[0] != 1 or set(labels) != {0, 1}:
            raise Reject(f"'{key}' has labels {short(labels)}, expected 1 or 0 each, a true choice first, a false one")
        found.append((choices, labels))
    (mc1, _), (mc2, truths) = found
    query = f"{PROMPTS['truthfulqa']}\n\nQ: {_text(record.get('question'), 'question')}\nA:"
    return Question(query, mc1 + mc2, 0, tuple(truths))


def _text(value, key: str, empty: bool = False) -> str:
    return value if empty and isinstance(value, str) and not value.strip() else check_text(value, key)


def _texts(value, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise Reject(f"'{key}' is {short(value)}, expected two texts or more")
    return tuple(_text(text, key) for text in value)


def _index(value, count: int) -> int:
    number = str(value).removesuffix(".0")  # as a data frame writes it
    if number not in map(str, range(count)):
        raise Reject(f"the right choice is {value!r}, expected a number from 0 to {count - 1}")
    return int(number)


class Task(NamedTuple):
    name: str
    read: Callable[[dict], Question]
    shots: int    # the leaderboard's
    metric: str   # the leaderboard's


TASKS = {
    "arc": Task("ARC-Challenge", arc_question, 25, "acc_norm"),
    "hellaswag": Task("HellaSwag", hellaswag_question, 10, "acc_norm"),
    "mmlu": Task("MMLU", mmlu_question, 5, "acc"),
    "mmlu_v0": Task("MMLU v0", mmlu_v0_question, 5, "acc_norm"),
    "piqa": Task("PIQA", piqa_question, 0, "acc_norm"),  # not one of the leaderboard's
    "truthfulqa": Task("TruthfulQA", truthfulqa_question, 0, "mc2"),
}
LEADERBOARD = ("arc", "hellaswag", "mmlu", "truthfulqa")  # it ranked by their plain mean

# --------------------------------------------------------------------------------- files to requests

class Exam(NamedTuple):
    """What a task asks: every question with its whole context, in order, by subject ("" where there is none)."""

    task: str
    shots: int
    limit: int                                 # questions, of MMLU by subject; 0: all
    asked: dict[str, list[tuple[Question, str]]]
    rejects: dict[str, list[tuple[int, str]]]  # by file: line and reason


def read_exam(task: str, path: str | Path, examples: str | Path = "", shots: int | None = None, limit: int = 0) -> Exam:
    """Questions from `path`, shots (None: the leaderboard's number) from `examples`, the training file (MMLU: dev)."""
    questions, rejects = read_questions(task, path)
    shots = TASKS[task].shots if shots is None else shots
    check_range("shots", shots, 0, math.inf)
    if task == "truthfulqa" and shots:
        fail(f"truthfulqa: shots is {shots}, expected 0: six questions and answers are part of its prompt")
    if shots and not examples:
        fail(f"{task}: {shots} shots need examples, expected training questions (MMLU: dev): name them, or set shots=0")
    files, pool = {str(path): rejects}, []
    if shots:
        pool, files[str(examples)] = read_questions(task, examples)
    asked = {}
    for subject in dict.fromkeys(q.subject for q in questions):
        own = [q for q in pool if q.subject == subject]
        if len(own) < shots:
            of = f" of {subject}" if subject else ""
            fail(f"{examples}: holds {len(own)} examples{of}, expected at least shots={shots}")
        asked[subject] = with_contexts([q for q in questions if q.subject == subject], own, shots, limit)
    return Exam(task, shots, limit, asked, files)


def read_questions(task: str, path: str | Path) -> tuple[list[Question], list[tuple[int, str]]]:
    """The questions of a file, and its rejects (line, reason): JSON lines or one JSON list, whose items count as lines,
    plain or `.gz`; MMLU's original CSV files too, or the folder of them."""
    if task not in TASKS:
        fail(f"multiple choice: task '{task}' is unknown, expected one of {', '.join(TASKS)}")
    path, questions, rejects = Path(path), [], []
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        for line, record in _records(file):
            try:
                if isinstance(record, Reject):
                    raise record
                if not isinstance(record, dict):
                    raise Reject(f"is a JSON {type(record).__name__}, expected an object")
                questions.append(TASKS[task].read(record))
            except (Reject, ValueError, TypeError, AttributeError) as reason:
                said = str(reason) if isinstance(reason, Reject) else f"cannot be read as {TASKS[task].name} ({reason})"
                rejects.append((line, f"{file.name}: {said}" if path.is_dir() else said))
    if not questions:
        first = f" (line {rejects[0][0]}: {rejects[0][1]})" if rejects else ""
        fail(f"{path}: holds no question of {TASKS[task].name}{first}: is it another file?")
    return questions, rejects


def _records(file: Path) -> list[tuple[int, object]]:
    """Line numbers, and records."""
    if file.suffix != ".csv":
        report = Report(str(file))
        return [(place + (report.unit == "index"), record) for place, record in values(file, report)]
    known = {"subject": re.sub("_(dev|val|test)$", "", file.stem)}
    try:  # question, four choices, letter
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream)
            return [(rows.line_num, known | {"question": row[0], "choices": row[1:-1], "answer": row[-1]})
                    for row in rows if row]
    except (OSError, csv.Error, ValueError) as error:
        fail(f"{file}: cannot be read ({error}): check the path, or copy it again")


def with_contexts(questions: Sequence[Question], examples: Sequence[Question], shots: int,
                  limit: int = 0) -> list[tuple[Question, str]]:
    """The questions in the order asked, each with its context: header, shots, query."""
    rng = random.Random(42)
    order = list(questions)
    rng.shuffle(order)
    asked = []
    for question in order[: limit or None]:
        shown = examples[:shots] if question.subject else rng.sample(examples, shots)
        before = "".join(f"{e.query} {e.choices[e.gold]}\n\n" for e in shown)
        asked.append((question, question.header + before + question.query))
    return asked


def request_hash(asked: Sequence[tuple[Question, str]]) -> str:
    """sha256 of json.dumps of all [context, continuation] in order, as in the harness's tests."""
    requests = [[context, f" {choice}"] for question, context in asked for choice in question.choices]
    return hashlib.sha256(json.dumps(requests).encode()).hexdigest()


# --------------------------------------------------------------------------------- requests to tokens

Ids = tuple[int, ...]
Request = tuple[Ids, Ids]  # context, continuation


def encode_choices(tokenizer: Tokenizer, context: str, choices: Sequence[str], bos: bool) -> tuple[list, list[list]]:
    """Ids of the context, and for each choice what follows as many ids when context and " choice" are encoded together.

    Blanks that end the context go over to the choice first. An empty context is one BOS or end-of-text token.
    """
    words = context.rstrip()
    blanks, start = context[len(words):], [tokenizer.bos_id] if bos else []
    if not words:
        return start or [tokenizer.eos_id], [tokenizer.encode(f"{blanks} {choice}") for choice in choices]
    ids = tokenizer.encode(words)
    # No token reaches across the start of a line (should one, `ids` show it): a long context's last line is enough.
    line = words[words.rfind("\n") + 1 :]
    own = tokenizer.encode(line, continues=True)
    if len(line) < len(words) and ids[len(ids) - len(own) :] == own:
        return start + ids, [tokenizer.encode(f"{line}{blanks} {choice}", continues=True)[len(own) :]
                             for choice in choices]
    return start + ids, [tokenizer.encode(f"{words}{blanks} {choice}")[len(ids) :] for choice in choices]


def to_requests(tokenizer: Tokenizer, asked: Sequence[tuple[Question, str]], max_length: int,
                bos: bool) -> tuple[list[list[Request]], int]:
    """The requests of every question, and how many were longer than `max_length` and lost their beginning."""
    found, cut = [], 0
    for question, context in asked:
        start, continuations = encode_choices(tokenizer, context, question.choices, bos)
        for choice, ids in zip(question.choices, continuations, strict=True):
            if not 0 < len(ids) <= max_length:
                fail(f"multiple choice: {choice[:40]!r} adds {len(ids)} tokens to its context, expected 1 to "
                     f"{max_length}, the positions of the model: drop the question")
        whole = tuple(start)
        excess = [max(0, len(start) + len(ids) - 1 - max_length) for ids in continuations]  # the last token is no input
        found.append([(whole[n:] if n else whole, tuple(ids)) for n, ids in zip(excess, continuations, strict=True)])
        cut += sum(n > 0 for n in excess)
    return found, cut


# ------------------------------------------------------------------------------- tokens to likelihoods

class Tree(NamedTuple):
    """Requests whose contexts begin alike: that beginning is the trunk, the rest of each path a leaf."""

    trunk: Ids
    leaves: list[Ids]
    requests: list[tuple[Request, int]]  # and the leaf each ends in, -1 for the trunk

    @property
    def tokens(self) -> int:
        return len(self.trunk) + sum(map(len, self.leaves))


def plant(requests: Iterable[Request], micro_tokens: int) -> list[Tree]:
    """Every distinct request in one tree. The contexts of a family are spread over trees of at most `micro_tokens`
    tokens (more where one context has more), those of similar length together, because attention pads leaves."""
    by_context: dict[Ids, list[Ids]] = {}
    for context, continuation in dict.fromkeys(requests):
        by_context.setdefault(context, []).append(continuation)
    trees: list[Tree] = []
    for trunk, contexts in families(by_context):
        room = 0
        for context in sorted(contexts, key=len, reverse=True):
            paths = {(context, ids): (context + ids[:-1])[trunk:] for ids in by_context[context]}
            leaves = list(dict.fromkeys(filter(None, paths.values())))
            size = sum(map(len, leaves))
            if room == 0 or size > room:
                trees.append(Tree(context[:trunk], [], []))
                room = micro_tokens - trunk
            room -= size
            number = {leaf: len(trees[-1].leaves) + i for i, leaf in enumerate(leaves)} | {(): -1}
            trees[-1].leaves.extend(leaves)
            trees[-1].requests.extend((request, number[path]) for request, path in paths.items())
    return trees


def families(by_context: Mapping[Ids, Sequence[Ids]]) -> list[tuple[int, list[Ids]]]:
    """Contexts by shared trunk, with its length; one context alone where sharing does not save tokens."""
    found: list[tuple[int, list[Ids], int, int]] = []  # with the number of leaves and their tokens
    for context in sorted(by_context):  # those that begin alike are neighbours
        tails = {continuation[:-1] for continuation in by_context[context]}
        count, size = len(tails), sum(map(len, tails))
        if found:
            trunk, contexts, others, before = found[-1]
            same = takewhile(lambda pair: pair[0] == pair[1], zip(contexts[0][:trunk], context, strict=False))
            shared = sum(1 for _ in same)
            after = before + others * (trunk - shared) + size + count * (len(context) - shared)
            if shared + after < trunk + before + len(context) + size:
                contexts.append(context)
                found[-1] = (shared, contexts, others + count, after)
                continue
        found.append((len(context), [context], count, size))
    return [(trunk, contexts) for trunk, contexts, _, _ in found]


def tree_likelihoods(model: Transformer, trees: Sequence[Tree]) -> Tensor:
    """Log-likelihoods of the requests of trees laid end to end, nats in fp64 [requests]."""
    tokens, positions, lengths, trunks, prefixes = [], [], [], [], []
    predictors, targets, counts = [], [], []
    for tree in trees:
        trunk, branch, starts = len(lengths), len(tree.trunk), []
        for prefix, ids in [(0, tree.trunk), *((branch, leaf) for leaf in tree.leaves)]:
            starts.append(len(tokens))
            tokens += ids
            positions += range(prefix, prefix + len(ids))
            lengths.append(len(ids))
            trunks.append(trunk)
            prefixes.append(prefix)
        for (context, continuation), leaf in tree.requests:
            places = range(len(context) - 1, len(context) + len(continuation) - 1)  # on the path, of what predicts
            predictors += [starts[0] + p if p < branch else starts[leaf + 1] + p - branch for p in places]
            targets += continuation
            counts.append(len(continuation))
    device = model.embed_tokens.weight.device
    tokens, positions, predictors, targets, counts = (
        torch.tensor(x, device=device) for x in (tokens, positions, predictors, targets, counts))
    hidden = model.hidden(tokens, positions, Layout.build(lengths, trunks, prefixes).to(device))  # [N, D]
    logprobs, _ = linear_logprobs(hidden[predictors], model.head_weight, targets)                 # [M]
    sums = torch.zeros(len(counts), dtype=torch.float64, device=device)
    return sums.index_add(0, torch.repeat_interleave(counts), logprobs.double())


@torch.no_grad()
def likelihoods(model: Transformer, requests: Iterable[Request], micro_tokens: int = 0,
                progress: str = "") -> dict[Request, float]:
    """The log-likelihood of every distinct request, nats, in batches of `micro_tokens` tokens; a larger tree is alone.

    0: 8,192 on a GPU, 1,024 on a CPU: with 4,096 the tiny model spent half of its time on fresh memory for attention.
    """
    micro_tokens = micro_tokens or (1024 if model.embed_tokens.weight.device.type == "cpu" else 8192)
    trees, found = plant(requests, micro_tokens), {}
    total = sum(len(tree.requests) for tree in trees)
    with tqdm(total=total, desc=progress, disable=not progress, mininterval=1, unit=" choices") as bar:
        for chosen in plan([tree.tokens for tree in trees], micro_tokens):
            batch = [trees[i] for i in chosen]
            asked = [request for tree in batch for request, _ in tree.requests]
            values = tree_likelihoods(model, batch).tolist()
            if not all(map(math.isfinite, values)):
                fail("multiple choice: a log-likelihood is not finite, expected a number: are the weights whole?")
            found |= zip(asked, values, strict=True)
            bar.update(len(asked))
    return found


# ------------------------------------------------------------------------------ likelihoods to numbers

def grade(question: Question, values: Sequence[float]) -> dict[str, float]:
    """A question's metrics from the log-likelihoods of its choices.

        acc       [argmax ll = gold]          acc_norm  [argmax ll / characters = gold]          the first of equals
        mc1       [argmax ll = 0] over mc1's choices
        mc2       sum of e^ll over true choices / over all, of mc2's choices; true are those before the first false one
        mc2_mask  the same, true are those labelled so (the harness today); a true choice may follow a false one
    """
    ll = np.asarray(values, dtype=float)
    if not question.truths:
        lengths = np.array([len(choice) for choice in question.choices])
        return {"acc": float(ll.argmax() == question.gold), "acc_norm": float((ll / lengths).argmax() == question.gold)}
    mc1, truths = len(ll) - len(question.truths), np.array(question.truths)
    p = np.exp(ll[mc1:] - ll[mc1:].max())  # below -745 all e^ll would be 0
    return {"mc1": float(ll[:mc1].argmax() == 0), "mc2": float(p[: truths.argmin()].sum() / p.sum()),
            "mc2_mask": float(p[truths == 1].sum() / p.sum())}


def measure(exam: Exam, values: Mapping[str, Sequence[Sequence[float]]]) -> dict:
    """A task's result from log-likelihoods by subject, question and choice: each metric's mean and standard error.

    The error of a share p is sqrt(p (1 - p) / (n - 1)); MMLU's mean is over subjects; "value" is the leaderboard's.
    """
    parts = {}
    for subject, asked in exam.asked.items():
        grades = [grade(question, row) for (question, _), row in zip(asked, values[subject], strict=True)]
        part = parts[subject] = {"n": len(asked), "request_sha256": request_hash(asked)}
        for metric in grades[0]:
            column = np.array([g[metric] for g in grades])
            error = column.std(ddof=1) / math.sqrt(len(column)) if len(column) > 1 else math.nan
            part |= {metric: float(column.mean()), f"{metric}_stderr": float(error)}
    total = parts.get("")
    if total is None:
        digests = "".join(part["request_sha256"] for part in parts.values())
        total = {"n": sum(p["n"] for p in parts.values()),
                 "request_sha256": hashlib.sha256(digests.encode()).hexdigest()}
        for metric in grades[0]:
            means, errors = ([part[key] for part in parts.values()] for key in (metric, f"{metric}_stderr"))
            total |= {metric: float(np.mean(means)), f"{metric}_stderr": float(np.linalg.norm(errors) / len(parts))}
        total["subjects"] = parts
    spec = TASKS[exam.task]
    return {"task": exam.task, "name": spec.name, "shots": exam.shots, "limit": exam.limit, "metric": spec.metric,
            "value": total[spec.metric], "stderr": total[f"{spec.metric}_stderr"], **total, "rejects": exam.rejects}


def evaluate(model: Transformer, tokenizer: Tokenizer, exam: Exam, *, micro_tokens: int = 0, bos: bool | None = None,
             progress: str = "") -> dict:
    """What a model scores, see `measure`.

    Requests of more tokens than the model has positions lose the beginning of their context; "cut" counts them.
    `bos`: contexts begin with BOS; None: as the tokenizer's texts do.
    """
    bos = tokenizer.adds_bos and tokenizer.bos_id >= 0 if bos is None else bos
    requests, cut = {}, 0
    for subject, asked in exam.asked.items():
        requests[subject], more = to_requests(tokenizer, asked, model.config.max_positions, bos)
        cut += more
    flat = [request for rows in requests.values() for row in rows for request in row]
    said = likelihoods(model, flat, micro_tokens, progress)
    found = {subject: [[said[request] for request in row] for row in rows] for subject, rows in requests.items()}
    return measure(exam, found) | {"requests": len(flat), "cut": cut, "bos": bos}


# ------------------------------------------------------------------------------------------ the report

def choices_section(results: Mapping[str, Mapping[str, dict]]) -> dict:
    """Results by model and task as a section of a report."""
    first: dict[str, dict] = {}
    for model, by_task in results.items():
        for task, result in by_task.items():
            if first.setdefault(task, result)["request_sha256"] != result["request_sha256"]:
                fail(f"multiple choice: {model} was asked other questions of {task}: evaluate all with one setting")
    measured = [(task, first[task]["metric"]) for task in first]
    measured += [("truthfulqa", m) for m in ("mc1", "mc2_mask") if "truthfulqa" in first]
    rows = []
    for model, by_task in results.items():
        cells = [cell(by_task[task], metric) if task in by_task else None for task, metric in measured]
        values = [100 * by_task[task]["value"] for task in LEADERBOARD if task in by_task]
        rows.append([model, *cells, sum(values) / 4 if len(values) == 4 else None,
                     sum(r["cut"] for r in by_task.values())])
    if len(results) > 1:
        values = [[by_task[task]["value"] for by_task in results.values() if task in by_task] for task in first]
        ranges = [100 * (max(column) - min(column)) for column in values]
        rows.append(["largest - smallest", *ranges, *[None] * (len(measured) - len(ranges) + 2)])
    asked = ", ".join(f"{r['n']:,} of {r['name']}{' (limited)' * bool(r['limit'])}" for r in first.values())
    rejects = sum(len(lines) for result in first.values() for lines in result["rejects"].values())
    text = (f"Questions: {asked}; lines rejected: {rejects}. Intervals are 95 %, over questions; a cut request lost "
            "the beginning of its context.")
    bars = {first[task]["name"]: [100 * r[task]["value"] if task in r else None for r in results.values()]
            for task in first}
    columns = ["model", *(f"{first[task]['name']}, {first[task]['shots']} shots, {metric}, %"
                          for task, metric in measured), "average of the four, %", "requests cut"]
    return {"title": "Multiple choice by log-likelihood", "text": text, "columns": columns, "rows": rows,
            "figure": {"kind": "bars", "names": list(results), "label": "%", "groups": bars}}


def cell(result: dict, metric: str) -> dict | float:
    """The value with its 95 % interval, or alone where there is none, with one question.

    Wilson's, of as many questions as right and wrong ones would have to be for this standard error; where all are alike
    of as many as there are.
    """
    value, error = result[metric], result[f"{metric}_stderr"]
    if math.isnan(error):
        return 100 * value
    if error == 0:
        return percent(value, *end_interval(value, result["n"]))
    n = value * (1 - value) / error**2
    return percent(value, *wilson(value * n, n))
