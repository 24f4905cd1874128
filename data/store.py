"""The trees of a data file: made once, by all cores, kept on disk in flat arrays, and read from there afterwards.

    runs/cache/1f3a.../tokens.bin      [tokens] int32, tree after tree, a tree's trunk before its leaves: memory-mapped
                       segments.npy    one row for every trunk and leaf      (SEGMENT)
                       responses.npy   one row for every response            (RESPONSE)
                       rows.npy        one row for every tree                (TREE)
                       about.json      counts for the log, and a hash of the tokens

The folder's name is a hash of all that decides the tokens: the data, the tokenizer and its template, max_length, what
the script keeps of a tree, and the code in data/. So it is never out of date; it may be deleted at any time. Files
of fewer than `SMALL` records are not kept: they are tokenized in a second or two at every start.
"""
import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from torch import Tensor

from checkpoints import new_folder
from data.formats import read
from data.tokenizer import Tokenizer
from data.trees import RecordFault, Response, Tree, drop_equal_pairs, grouped, shorten, tree_numbers, trees_of_group
from runtime import distributed, fail, file_hash, lock_file, writing

SMALL = 1000      # records; a file with fewer is tokenized by this process, and not kept
SLICE = 64        # trees that a worker makes at a time
NO_LIMIT = 2**30  # tokens of a path

SEGMENT = np.dtype([("start", np.int64), ("length", np.int32), ("prefix", np.int32)])  # start in the flat tokens
RESPONSE = np.dtype([("segment", np.int32), ("start", np.int32), ("end", np.int32), ("pair", np.int32),
                     ("side", np.int32), ("turn", np.int32), ("margin", np.float64), ("cut", np.bool_)])
TREE = np.dtype([("segments", np.int32), ("responses", np.int32), ("record", np.int32)])  # how many, and which record


class Trees(Sequence):
    """A file's trees, in flat arrays; a Tree is made when one is asked for."""

    def __init__(self, tokens: np.ndarray, segments: np.ndarray, responses: np.ndarray, rows: np.ndarray,
                 counts: dict[str, int], digest: str = ""):
        self.tokens, self.segments, self.responses, self.rows = tokens, segments, responses, rows
        self.counts = Counter(counts)  # of what it took to make them (make_part)
        self.first_segment = np.concatenate([[0], rows["segments"].cumsum(dtype=np.int64)])
        self.first_response = np.concatenate([[0], rows["responses"].cumsum(dtype=np.int64)])
        self.ref_sums: Tensor | None = None  # [responses] log-probability sums under DPO's reference
        if digest:
            self.digest = digest

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # as a list counts: from the end below 0, and an IndexError beyond
        segments = self.segments[self.first_segment[i] : self.first_segment[i + 1]].tolist()
        parts = [np.array(self.tokens[start : start + length]) for start, length, _ in segments]
        leaves = [(prefix, part) for (_, _, prefix), part in zip(segments[1:], parts[1:], strict=True)]
        mine = slice(self.first_response[i], self.first_response[i + 1])
        responses = [Response(*row) for row in self.responses[mine].tolist()]
        ref_sums = None if self.ref_sums is None else self.ref_sums[mine]
        return Tree(parts[0], leaves, responses, int(self.rows["record"][i]), ref_sums)

    def of_record(self, record: int) -> Tree:
        return self[int(np.searchsorted(self.rows["record"], record))]

    def take(self, order: np.ndarray) -> "Trees":
        """Some of the trees, or all in another order; the tokens stay where they are."""
        def rows_of(first):
            return np.concatenate([np.arange(first[i], first[i + 1]) for i in order])

        return Trees(self.tokens, self.segments[rows_of(self.first_segment)],
                     self.responses[rows_of(self.first_response)], self.rows[order], self.counts)

    @cached_property
    def digest(self) -> str:
        """A hash of what the model would see: data, template, tokenizer and truncation together, 16 hex digits."""
        total = hashlib.sha256()
        for start, length, _ in self.segments.tolist():
            total.update(self.tokens[start : start + length])
        for table in (self.segments["length"], self.segments["prefix"], self.responses, self.rows):
            total.update(table.tobytes())
        return total.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """All but the tokens, which are there already."""
        for name in ("segments", "responses", "rows"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "about.json").write_text(json.dumps({"counts": self.counts, "digest": self.digest}, indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> "Trees":
        try:
            about = json.loads((folder / "about.json").read_text())
            tables = [np.load(folder / f"{name}.npy") for name in ("segments", "responses", "rows")]
            wanted = (tables[0]["start"] + tables[0]["length"]).max(initial=0)
            tokens = np.memmap(folder / "tokens.bin", np.int32, "r") if wanted else np.empty(0, np.int32)
            if len(tokens) < wanted:
                raise ValueError("tokens.bin is too short")
        except (OSError, ValueError, KeyError) as error:
            fail(f"{folder}: is no cache of tokens ({error}): delete it")
        return Trees(tokens, *tables, about["counts"], about["digest"])


# -------------------------------------------------------------------------------- records to arrays

class Job(NamedTuple):
    """How records become trees: all that decides their tokens but the records."""

    tokenizer: Tokenizer
    max_length: int
    keep: Callable[[Tree], Tree] | None  # what the script keeps of a tree; None: everything
    before: Sequence[dict]               # messages that precede every dialogue; their replies are not learnt
    prompts: bool                        # of every record its prompt alone, up to where the reply begins
    labels: bool = False                 # of a dialogue its last reply, good or bad as its label says


Group = tuple[int, list[tuple[int, dict]]]  # a tree's number, and its records with theirs
Part = tuple[Trees, list[int]]              # some trees, and their numbers


def make_part(job: Job, form: str, groups: list[Group]) -> Part:
    """The trees of some groups of records: rendered, tokenized, reduced to what the script keeps, and cut."""
    counts, trees, numbers = Counter(), [], []
    for number, group in groups:
        found = _read_group(job, form, group)
        counts["trees_dropped"] += not found
        for tree in found:
            counts["trees"] += 1
            counts["ranked"] += tree.ranked
            counts["preferences"] += any(r.side for r in tree.responses)
            counts["leaves"] += bool(tree.leaves)
            tree = tree if job.keep is None else job.keep(tree)
            tree = tree if job.prompts else shorten(tree, job.max_length, counts)
            tree = tree and drop_equal_pairs(tree, counts)
            if tree is not None:
                trees.append(tree)
                numbers.append(number)
    for tree in trees:
        counts.update(tokens=tree.tokens, learnt=tree.learnt, pairs=tree.pairs * bool(tree.leaves))
    return Trees(*flatten(trees), counts), numbers


def _read_group(job: Job, form: str, group: list[tuple[int, dict]]) -> list[Tree]:
    if not job.before:
        kind = f"prompt of {form}" if job.prompts else "labelled" if job.labels and form == "messages" else form
        return trees_of_group(group, kind, job.tokenizer)
    before = [m | {"loss": False} for m in job.before]
    ((number, record),) = group
    trees = trees_of_group([(number, {"messages": [*before, *record["messages"]]})], form, job.tokenizer)
    if len(trees) != 1:
        raise RecordFault(number, "the template writes a reply in another way once the dialogue goes on, which context "
                                  "distillation cannot follow: set template=")
    return trees


def flatten(trees: Sequence[Tree]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments, responses and rows of trees."""
    parts, segments, responses, rows, at = [np.empty(0, np.int32)], [], [], [], 0
    for tree in trees:
        for prefix, ids in [(0, tree.trunk), *tree.leaves]:
            parts.append(ids)
            segments.append((at, len(ids), prefix))
            at += len(ids)
        responses += [tuple(vars(r).values()) for r in tree.responses]
        rows.append((1 + len(tree.leaves), len(tree.responses), tree.record))
    return (np.concatenate(parts), np.array(segments, SEGMENT), np.array(responses, RESPONSE), np.array(rows, TREE))


def gather(parts: Iterable[Part], file: IO[bytes] | None) -> Trees:
    """The trees of all parts in the file's order. Their tokens are written to `file`, or without one kept here."""
    tokens, tables, at, counts = [np.empty(0, np.int32)], [], 0, Counter()
    for part, numbers in parts:
        part.segments["start"] += at
        at += len(part.tokens)
        tables.append((part.segments, part.responses, part.rows, np.array(numbers, np.int64)))
        counts.update(part.counts)
        if file is None:
            tokens.append(part.tokens)
        else:
            file.write(part.tokens.data)
    segments, responses, rows, numbers = (np.concatenate(table) for table in zip(*tables, strict=True))
    if file is not None and at:
        file.flush()
        tokens = [np.memmap(file.name, np.int32, "r")]
    trees = Trees(tokens[0] if len(tokens) == 1 else np.concatenate(tokens), segments, responses, rows, dict(counts))
    in_order = (np.diff(numbers) >= 0).all()
    return trees if in_order else trees.take(np.argsort(numbers, kind="stable"))


# ----------------------------------------------------------------------------------- all cores at it

_make: Callable[[list[Group]], Part]  # what this worker does


def _start_worker(make: Callable[[list[Group]], Part]) -> None:
    global _make
    _make = make
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()  # until it is gone, be it killed
    os._exit(1)


def _work(groups: list[Group]) -> Part:
    return _make(groups)


def in_workers(make: Callable[[list[Group]], Part], slices: Iterator[list[Group]], workers: int) -> Iterator[Part]:
    """What `make` gives for every slice, in order, by forked processes, without PyTorch's threads and the GPU."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (make,))
    waiting = deque()
    try:
        for groups in slices:
            waiting.append(pool.submit(_work, groups))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------ the files

def load_trees(
    path: str, tokenizer: Tokenizer, max_length: int = NO_LIMIT, keep: Callable[[Tree], Tree] | None = None,
    *, cache: str = "", columns: dict | None = None, before: Sequence[dict] = (), prompts: bool = False,
    labels: bool = False,
) -> Trees:
    """The file as trees, whichever format it has. With `labels` a reply may be labelled as one not to learn: REJECTED.

    A large file is kept in the folder `cache` ("": nowhere): rank 0 makes it, the others and later runs read it.
    """
    job = Job(tokenizer, max_length, keep, list(before), prompts, labels)
    folder = Path(cache) / cache_key(path, job, columns) if cache else None
    if folder and distributed.any_rank(folder.is_dir()):
        print(f"{path}: its tokens are read from {folder}")
        return Trees.load(folder)
    if folder is None or len(list(islice(read(path, columns=columns)[0], SMALL))) < SMALL:
        return make_trees(path, job, columns)
    if distributed.rank() == 0:
        _fill_cache(path, job, columns, folder)
    distributed.barrier()
    return Trees.load(folder)


def load_prompts(
    path: str, tokenizer: Tokenizer, room: int, *, cache: str = "", columns: dict | None = None,
    records: Sequence[dict] = (),
) -> Trees:
    """The distinct prompts of a file of any format, rendered up to where the reply begins: trees of a trunk alone.

    With the file's `records` prompts are one only where these are equal, too: another column may ask for another score.
    """
    trees = load_trees(path, tokenizer, cache=cache, columns=columns, prompts=True)
    distinct: dict[tuple[bytes, str], int] = {}
    for i, (number, (start, length, _)) in enumerate(zip(trees.rows["record"], trees.segments.tolist(), strict=True)):
        if length > room:
            fail(f"{path} record {number + 1}: the prompt has {length} tokens and a reply of max_tokens must fit "
                 f"behind it, expected at most {room}: drop it or lower max_tokens")
        more = json.dumps(records[number], sort_keys=True, default=str) if records else ""
        distinct.setdefault((hashlib.sha256(trees.tokens[start : start + length]).digest(), more), i)
    return trees.take(np.array(list(distinct.values())))


def fit(trees: Trees, max_length: int, path: str, name: str) -> Trees:
    """One line that says what `path` holds and what was cut; exits if nothing is left to learn."""
    n = Counter(trees.counts)
    if not len(trees) and n["pairs_equal"]:
        fail(f"{path}: the replies of its pairs are equal once rendered and cut to max_length={max_length} tokens: "
             "raise max_length, or use other pairs")
    if not len(trees):
        fault = "every prompt is longer than" if n["leaves"] else "holds no token to learn within"
        fail(f"{path}: {fault} max_length={max_length}: raise max_length")
    print(f"{name}: {len(trees)} dialogues, " + f"{n['pairs']} pairs, " * (n["pairs"] > 0)
          + f"{n['tokens']:,} tokens, {n['learnt']:,} in the loss; "
          f"cut to {max_length} tokens: {n['responses_cut']} responses, "
          f"dropped: {n['responses_dropped']} responses, {n['trees_dropped']} dialogues"
          + f", {n['pairs_equal']} pairs of equal replies" * (n["pairs_equal"] > 0))
    return trees


def cache_key(path: str, job: Job, columns: dict | None) -> str:
    """A hash of all that decides the tokens, 16 hex digits; the code in data/ is part of it."""
    code = file_hash(*sorted(Path(__file__).parent.glob("*.py")))
    keep = "" if job.keep is None else inspect.getsource(job.keep)
    parts = (file_hash(path), job.tokenizer.fingerprint(), job.max_length, keep, job.before, job.prompts,
             job.labels, columns, code)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def make_trees(path: str, job: Job, columns: dict | None, file: IO[bytes] | None = None) -> Trees:
    """Read twice: for faults and for which records belong together, then to tokenize. So it need not fit in memory."""
    records, report = read(path, columns=columns)
    head = list(islice(records, SMALL))
    form, numbers = report.format, tree_numbers(chain(head, records), report.format)
    report.refuse(imitated=not (job.prompts or job.labels))
    if form == "prompt" and not job.prompts:
        fail(f"{path}: holds prompts without replies, expected messages, preferences, rankings or text")
    if form == "text" and job.prompts:
        fail(f"{path}: holds text records, expected records with a 'prompt'")
    if job.labels and form not in ("messages", "preference"):
        fail(f"{path}: holds {form} records, expected replies with a 'label', true or false, or preferences")
    if form != "messages" and job.before:
        fail(f"{path}: holds {form}, expected messages: context distillation reads dialogues")
    small = len(numbers) < SMALL
    groups = grouped(head if small else read(path, columns=columns)[0], numbers)
    slices = iter(lambda: list(islice(groups, SLICE)), [])
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # macOS cannot fork what PyTorch runs in
    make, workers = partial(make_part, job, form), 1 if small else cores
    parts = in_workers(make, slices, workers) if workers > 1 else (make(groups) for groups in slices)
    try:
        with closing(parts):  # ends the workers, whatever happens here
            return gather(parts, file)
    except RecordFault as fault:
        number, reason = fault.args
        fail(f"{path} record {number + 1}: {reason}")


def _fill_cache(path: str, job: Job, columns: dict | None, folder: Path) -> None:
    """Make the folder, under another name until it is whole. One process at a time: two would share the cores."""
    began = time.perf_counter()
    print(f"{path}: is tokenized, once, into {folder}", flush=True)
    with writing(folder), _locked(folder.parent):
        if not folder.is_dir():  # another run may have made it while this one waited
            with new_folder(folder) as beside, (beside / "tokens.bin").open("wb") as file:
                make_trees(path, job, columns, file).save(beside)
    print(f"{path}: tokenized in {time.perf_counter() - began:.1f} s")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        lock_file(place, wait=True)
        yield
    finally:
        os.close(place)
