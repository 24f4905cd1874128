"""From records to conversation trees: what a model reads of a data file, and what it learns there.

A tree is a trunk, one dialogue from its first token on, and leaves that branch off it. A dialogue whose every
turn was rated is one trunk along the replies it went on with, and a leaf for each reply that lost; a
single pair is the same with one leaf; an SFT dialogue is a trunk alone. data/store.py makes the trees of a whole file,
data/pack.py draws one, and lays them out as batches.
"""
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from data.records import Reject, prompt_of
from data.tokenizer import TemplateError, Tokenizer

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class Response:
    """A reply the model is trained on: the span start .. end - 1 of segment `segment` of its tree."""

    segment: int          # 0 the trunk, k leaf k - 1
    start: int
    end: int
    pair: int = 0         # within the tree
    side: int = CHOSEN    # or REJECTED; in a ranking of more replies, the rank
    turn: int = 1
    margin: float = 0.0   # 0 when the record has none
    cut: bool = False     # truncated: it has no end-of-sequence token


@dataclass
class Tree:
    trunk: np.ndarray                                   # [n] int32 token ids
    leaves: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (prefix, token ids)
    responses: list[Response] = field(default_factory=list)
    record: int = 0                                     # which record of the file, the last of a dialogue
    ref_sums: Tensor | None = None                      # [responses] log-probability sums under DPO's reference

    @property
    def tokens(self) -> int:
        return len(self.trunk) + sum(len(leaf) for _, leaf in self.leaves)

    @property
    def learnt(self) -> int:
        """Tokens of its responses."""
        return sum(r.end - r.start for r in self.responses)

    @property
    def pairs(self) -> int:
        return 1 + max((r.pair for r in self.responses), default=-1)

    @property
    def ranked(self) -> bool:
        """Its replies are ranked leaves, none of them chosen to go on with."""
        return bool(self.leaves) and all(r.segment for r in self.responses)

    def reply(self, r: Response) -> np.ndarray:
        """The tokens of a response."""
        return (self.leaves[r.segment - 1][1] if r.segment else self.trunk)[r.start : r.end]


class RecordFault(Exception):
    """A record that the chat template cannot render: its number from 0, and why."""


# -------------------------------------------------------------------------------- records to trees

def trees_of(records: Sequence[dict], form: str, tokenizer: Tokenizer) -> list[Tree]:
    """Records of one form (data/records.py) as trees; in a prompt nothing is learnt."""
    groups = sorted(grouped(records, tree_numbers(records, form)), key=lambda group: group[0])
    return [tree for _, group in groups for tree in trees_of_group(group, form, tokenizer)]


def trees_of_group(group: list[tuple[int, dict]], form: str, tokenizer: Tokenizer) -> list[Tree]:
    """The trees of records that belong together, each with its number: one for every list of ids (paths)."""
    trees: list[Tree] = []
    for number, record in group:
        try:
            if form == "preference":
                add_pair(trees, record, tokenizer)
                trees[-1].record = number
                continue
            found = trees_from_record(record, form, tokenizer)
        except (TemplateError, Reject) as error:
            raise RecordFault(number, str(error)) from None
        for tree in found:
            tree.record = number
        trees += found
    return trees


def trees_from_record(record: dict, form: str, tokenizer: Tokenizer) -> list[Tree]:
    """A record of any form but a preference; of "prompt of ..." its prompt alone, of "labelled" messages one reply."""
    if form == "messages":
        return trees_from_messages(record["messages"], tokenizer)
    if form == "labelled":  # the last reply CHOSEN or REJECTED as the label says; earlier ones are context
        if not isinstance(record.get("label"), bool):
            raise Reject("no label", "has no 'label', expected true or false: is its last reply a good one?")
        *before, last = record["messages"]
        trees = trees_from_messages([*(m | {"loss": False} for m in before), last | {"loss": True}], tokenizer)
        for tree in trees:
            tree.responses = [replace(r, side=CHOSEN if record["label"] else REJECTED) for r in tree.responses]
        return trees
    if form == "ranking":
        return [tree_from_ranking(record, tokenizer)]
    if form == "text":
        bos = [tokenizer.bos_id] * tokenizer.adds_bos
        ids, first = [*bos, *tokenizer.encode(record["text"]), tokenizer.eos_id], 1  # nothing precedes the first token
    else:
        ids = tokenizer.render(prompt_of(record, form.removeprefix("prompt of ")), add_generation_prompt=True)[0]
        first = len(ids)
    return [Tree(np.array(ids, np.int32), [], [Response(0, first, len(ids))])]


def trees_from_messages(messages: list[dict], tokenizer: Tokenizer) -> list[Tree]:
    """A dialogue's replies that are to be learnt: a trunk for every list of ids (Tokenizer.paths), mostly one."""
    trunks: list[tuple[list[int], list[Response]]] = []
    for reply in tokenizer.paths(messages):
        responses = next((found for ids, found in trunks if ids is reply.ids), None)
        if responses is None:
            responses = []
            trunks.append((reply.ids, responses))
        responses.append(Response(0, reply.start, reply.end, pair=len(responses), turn=reply.turn))
    return [Tree(np.array(ids[: responses[-1].end], np.int32), [], responses) for ids, responses in trunks]


def add_pair(trees: list[Tree], record: dict, tokenizer: Tokenizer) -> None:
    """Make the pair part of the last tree, whose dialogue it continues, or a tree of its own."""
    ids, (start, end) = _path(record["prompt"], record["chosen"], tokenizer)
    other, (branch, stop) = _path(record["prompt"], record["rejected"], tokenizer)
    # A template that writes the prompt of both sides alike, as all do but for what comes after it.
    if start != branch or not np.array_equal(ids[:start], other[:branch]):
        raise TemplateError("it writes the prompt differently before the chosen and the rejected reply: "
                            "use another template")
    if not trees or not np.array_equal(ids[: len(trees[-1].trunk)], trees[-1].trunk):
        trees.append(Tree(np.empty(0, np.int32)))
    tree = trees[-1]
    pair, turn = tree.pairs, sum(m["role"] == "user" for m in record["prompt"])
    margin = float(record.get("margin") or 0)
    tree.trunk = ids
    tree.leaves.append((branch, other[branch:stop]))
    tree.responses.append(Response(0, start, end, pair, CHOSEN, turn, margin))
    tree.responses.append(Response(len(tree.leaves), 0, stop - branch, pair, REJECTED, turn, margin))


def tree_from_ranking(record: dict, tokenizer: Tokenizer) -> Tree:
    """K ranked replies to one prompt: a trunk of the prompt, K leaves, one pair; the best have side CHOSEN."""
    tree = Tree(np.empty(0, np.int32))
    turn = sum(m["role"] == "user" for m in record["prompt"])
    places = sorted(set(record["ranks"]))
    for answer, rank in zip(record["answers"], record["ranks"], strict=True):
        ids, (start, end) = _path(record["prompt"], answer, tokenizer)
        tree.trunk = ids[:start]
        tree.leaves.append((start, ids[start:end]))
        tree.responses.append(Response(len(tree.leaves), 0, end - start, 0, places.index(rank), turn))
    return tree


def _path(prompt: list[dict], reply: str, tokenizer: Tokenizer) -> tuple[np.ndarray, tuple[int, int]]:
    """Ids of a dialogue up to the end of `reply`, and the span of that reply."""
    told = [m | {"loss": False} for m in prompt]
    (path,) = tokenizer.paths([*told, {"role": "assistant", "content": reply}])
    return np.array(path.ids[: path.end], np.int32), (path.start, path.end)


def tree_from_replies(number: int, prompt: list[int], replies: list[list[int]], finished: list[bool]) -> Tree:
    """A prompt as a trunk and its sampled replies as leaves."""
    leaves = [(len(prompt), np.array(reply, np.int32)) for reply in replies]
    responses = [Response(i + 1, 0, len(reply), pair=i, cut=not end)
                 for i, (reply, end) in enumerate(zip(replies, finished, strict=True))]
    return Tree(np.array(prompt, np.int32), leaves, responses, record=number)


# -------------------------------------------------------------------- which records make a tree together

def tree_numbers(records: Iterable[dict], form: str) -> np.ndarray:
    """[records] which tree each belongs to: its own, or that of the pair whose chosen reply its prompt continues.

    There may be unrated turns in between. Dialogues are known by hashes: a file's texts may not fit in memory.
    """
    numbers, count = [], 0
    open_ends: dict[bytes, int] = {}  # trees by the messages up to and including the last chosen reply
    for record in records:
        number = None
        if form == "preference":
            total, paths = hashlib.sha256(), []  # of the first message, of the first two, and so on
            for m in [*record["prompt"], {"role": "assistant", "content": record["chosen"]}]:
                total.update(repr((m["role"], m["content"])).encode())
                paths.append(total.digest()[:16])
            *paths, whole = paths
            earlier = next((path for path in reversed(paths[:-1]) if path in open_ends), None)
            number = open_ends.pop(earlier, None)
        if number is None:
            number, count = count, count + 1
        numbers.append(number)
        if form == "preference":
            open_ends[whole] = number
    return np.array(numbers, np.int64)


def grouped(records: Iterable[dict], numbers: np.ndarray) -> Iterator[tuple[int, list[tuple[int, dict]]]]:
    """Each tree's number and its records, with theirs, as soon as the last of them has been read."""
    last = np.zeros(len(numbers), np.int64)
    last[numbers] = np.arange(len(numbers))  # of several, the last assignment stays
    waiting = defaultdict(list)
    for i, (record, number) in enumerate(zip(records, numbers.tolist(), strict=True)):
        waiting[number].append((i, record))
        if last[number] == i:
            yield number, waiting.pop(number)


# ------------------------------------------------------------------------------------- truncation

def truncate(trees: list[Tree], max_length: int) -> tuple[list[Tree], dict[str, int]]:
    """Trees whose paths have at most `max_length` tokens, and counts of what that took."""
    counts = Counter(trees=len(trees), responses_cut=0, responses_dropped=0, trees_dropped=0)
    kept = [shorten(tree, max_length, counts) for tree in trees]
    return [tree for tree in kept if tree is not None], dict(counts)


def shorten(tree: Tree, max_length: int, counts: Counter) -> Tree | None:
    """The tree with paths of at most `max_length` tokens; None if nothing is left to learn.

    The rule: a path is cut at its end. A response that runs over the limit keeps its beginning and loses its
    end-of-sequence token, so that nobody learns to stop mid-sentence. A response (with pairs: both sides)
    left with no token is dropped, and a tree left with no response.
    """
    if tree.responses and max(len(tree.trunk), *(prefix + len(leaf) for prefix, leaf in tree.leaves), 0) <= max_length:
        return tree
    begins = [r.start if r.segment == 0 else tree.leaves[r.segment - 1][0] for r in tree.responses]
    lost = {r.pair for r, begin in zip(tree.responses, begins, strict=True) if begin >= max_length}
    counts["responses_dropped"] += sum(r.pair in lost for r in tree.responses)
    return _without(tree, lost, max_length, counts)


def drop_equal_pairs(tree: Tree, counts: Counter) -> Tree | None:
    """The tree without pairs and rankings whose replies have become the same tokens, trimmed by the template or cut."""
    if not tree.leaves:
        return tree
    replies = defaultdict(list)
    for r in tree.responses:
        replies[r.pair].append(tree.reply(r).tobytes())
    lost = {pair for pair, texts in replies.items() if len(texts) > 1 and len(set(texts)) == 1}
    counts["pairs_equal"] += len(lost)
    return _without(tree, lost, 2**31, counts) if lost else tree


def _without(tree: Tree, lost: set[int], max_length: int, counts: Counter) -> Tree | None:
    """The tree without some of its pairs, cut to `max_length`; None if no pair is left."""
    leaves, responses = [], []
    numbers: dict[int, int] = {}
    for r in tree.responses:
        if r.pair in lost:
            continue
        pair = numbers.setdefault(r.pair, len(numbers))
        segment, limit = 0, max_length
        if r.segment:
            prefix, leaf = tree.leaves[r.segment - 1]
            limit = max_length - prefix
            leaves.append((prefix, leaf[:limit]))
            segment = len(leaves)
        counts["responses_cut"] += r.end > limit
        cut = r.cut or r.end > limit
        responses.append(Response(segment, r.start, min(r.end, limit), pair, r.side, r.turn, r.margin, cut))
    if not responses:
        counts["trees_dropped"] += 1
        return None
    end = max([r.end for r in responses if r.segment == 0] + [prefix for prefix, _ in leaves])
    return Tree(tree.trunk[:end], leaves, responses, tree.record)
