"""From records to packed batches: the conversation tree, its layout, truncation, order.

A tree is a trunk, one dialogue from its first token on, and leaves that branch off it. A dialogue whose every
turn was rated is one trunk along the replies it went on with, and a leaf for each reply that lost; a
single pair is the same with one leaf; an SFT dialogue is a trunk alone. Batches lay trees end to end:

    dialogue rated at two turns:   u1 → (w1 chosen, l1 rejected),  u1 w1 u2 → (w2 chosen, l2 rejected)

    index      0 1 2 3 4 5 6 7 8 9 | 10 11 12 | 13 14        one flat row, no padding
    tokens     u1 u1 w1 w1 e  u2 u2 w2 w2 e | l1 l1 e | l2 e  e = end of sequence, part of the response
    segment    trunk               | leaf A   | leaf B
    prefix     –                   | 2        | 7             leaf A branches after 2 trunk tokens, B after 7
    positions  0 1 2 3 4 5 6 7 8 9 | 2 3 4    | 7 8
    previous   – 0 1 2 3 4 5 6 7 8 | 1 10 11  | 6 13
    responses  w1 = 2..4 (turn 1, chosen)  w2 = 7..9 (turn 2, chosen)  l1 = 10..12  l2 = 13..14

`python -m data.pack FILE --show 3` prints trees token by token, with position, loss, response and branch.
"""
from __future__ import annotations

import argparse
import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf

import numpy as np
import torch
from torch import Tensor

from data.formats import read
from data.tokenizer import Tokenizer, check_template, load_tokenizer, sample_texts
from kernels.layout import Layout
from runtime import arguments, check_range, distributed, fail

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


# -------------------------------------------------------------------------------- records to trees

def tree_from_messages(messages: list[dict], tokenizer: Tokenizer, template: str | None = None) -> Tree:
    """A dialogue as a trunk, every reply of it a response."""
    ids, responses = [], []
    for span, loss in tokenizer.spans(messages, template):
        if loss:
            turn = len(responses) + 1
            responses.append(Response(0, len(ids), len(ids) + len(span), pair=turn - 1, turn=turn))
        ids += span
    return Tree(np.array(ids[: responses[-1].end], np.int32), [], responses)


def tree_from_text(ids: Iterable[int]) -> Tree:
    """Tokens that are all to be predicted but the first, which nothing precedes."""
    trunk = np.array(list(ids), np.int32)
    return Tree(trunk, [], [Response(0, 1, len(trunk))])


def trees_from_preferences(records: Iterable[dict], tokenizer: Tokenizer, template: str | None = None) -> list[Tree]:
    """Pairs as trees: a pair whose prompt continues an earlier pair's chosen reply joins its tree.

    There may be unrated turns in between.
    """
    trees: list[Tree] = []
    open_ends: dict[tuple, Tree] = {}  # by the messages up to and including the last chosen reply
    for number, record in enumerate(records):
        prompt, chosen, rejected = record["prompt"], record["chosen"], record["rejected"]
        path = tuple((m["role"], m["content"]) for m in prompt)
        earlier = next((path[:k] for k in range(len(path) - 1, 0, -1) if path[:k] in open_ends), None)
        tree = open_ends.pop(earlier, None)
        if tree is None:
            tree = Tree(np.empty(0, np.int32))
            trees.append(tree)
        pair, turn = tree.pairs, sum(m["role"] == "user" for m in prompt)
        margin = float(record.get("margin") or 0)
        ids, (start, end) = _path(prompt, chosen, tokenizer, template)
        other, (branch, stop) = _path(prompt, rejected, tokenizer, template)
        if not np.array_equal(ids[: len(tree.trunk)], tree.trunk) or start != branch:
            raise ValueError(f"template {template} renders a dialogue differently once it goes on")
        tree.trunk = ids
        tree.leaves.append((branch, other[branch:stop]))
        tree.responses.append(Response(0, start, end, pair, CHOSEN, turn, margin))
        tree.responses.append(Response(len(tree.leaves), 0, stop - branch, pair, REJECTED, turn, margin))
        tree.record = number
        open_ends[path + (("assistant", chosen),)] = tree
    return trees


def tree_from_ranking(record: dict, tokenizer: Tokenizer, template: str | None = None) -> Tree:
    """K ranked replies to one prompt: a trunk of the prompt alone, K leaves, all in one group (`pair`)."""
    tree = Tree(np.empty(0, np.int32))
    turn = sum(m["role"] == "user" for m in record["prompt"])
    for answer, rank in zip(record["answers"], record["ranks"], strict=True):
        ids, (start, end) = _path(record["prompt"], answer, tokenizer, template)
        tree.trunk = ids[:start]
        tree.leaves.append((start, ids[start:end]))
        tree.responses.append(Response(len(tree.leaves), 0, end - start, 0, rank, turn))
    return tree


def _path(
    prompt: list[dict], reply: str, tokenizer: Tokenizer, template: str | None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Ids of a dialogue up to the end of `reply`, and the span of that reply."""
    spans = tokenizer.spans([*prompt, {"role": "assistant", "content": reply}], template)
    while not spans[-1][1]:  # what the template writes after a reply belongs to the next turn
        spans.pop()
    ids = np.array([i for span, _ in spans for i in span], np.int32)
    return ids, (len(ids) - len(spans[-1][0]), len(ids))


def tree_from_replies(number: int, prompt: list[int], replies: list[list[int]], finished: list[bool]) -> Tree:
    """A prompt as a trunk and its sampled replies as leaves."""
    leaves = [(len(prompt), np.array(reply, np.int32)) for reply in replies]
    responses = [Response(i + 1, 0, len(reply), pair=i, cut=not end)
                 for i, (reply, end) in enumerate(zip(replies, finished, strict=True))]
    return Tree(np.array(prompt, np.int32), leaves, responses, record=number)


# ------------------------------------------------------------------------------- truncation, order

def truncate(trees: list[Tree], max_length: int) -> tuple[list[Tree], dict[str, int]]:
    """Trees whose paths have at most `max_length` tokens, and counts of what that took.

    The rule: a path is cut at its end. A response that runs over the limit keeps its beginning and loses its
    end-of-sequence token, so that nobody learns to stop mid-sentence. A response (with pairs: both sides)
    left with no token is dropped, and a tree left with no response.
    """
    counts = {"trees": len(trees), "responses_cut": 0, "responses_dropped": 0, "trees_dropped": 0}
    kept = []
    for tree in trees:
        if max(len(tree.trunk), *(prefix + len(leaf) for prefix, leaf in tree.leaves), 0) <= max_length:
            kept.append(tree)
            continue
        begins = [r.start if r.segment == 0 else tree.leaves[r.segment - 1][0] for r in tree.responses]
        lost = {r.pair for r, begin in zip(tree.responses, begins, strict=True) if begin >= max_length}
        leaves, responses = [], []
        numbers: dict[int, int] = {}
        for r in tree.responses:
            if r.pair in lost:
                counts["responses_dropped"] += 1
                continue
            pair = numbers.setdefault(r.pair, len(numbers))
            segment, limit = 0, max_length
            if r.segment:
                prefix, leaf = tree.leaves[r.segment - 1]
                limit = max_length - prefix
                leaves.append((prefix, leaf[:limit]))
                segment = len(leaves)
            counts["responses_cut"] += r.end > limit
            end = min(r.end, limit)
            responses.append(Response(segment, r.start, end, pair, r.side, r.turn, r.margin, cut=r.end > limit))
        if responses:
            end = max([r.end for r in responses if r.segment == 0] + [prefix for prefix, _ in leaves])
            kept.append(Tree(tree.trunk[:end], leaves, responses, tree.record))
        else:
            counts["trees_dropped"] += 1
    return kept, counts


def fit(trees: list[Tree], max_length: int, path: str, name: str) -> list[Tree]:
    """truncate, with one line that says what `path` holds and what was cut; exits if nothing is left to learn."""
    fault = "every prompt is longer than" if any(tree.leaves for tree in trees) else "holds no token to learn within"
    trees, counts = truncate(trees, max_length)
    if not trees:
        fail(f"{path}: {fault} max_length={max_length}: raise max_length")
    pairs = sum(tree.pairs for tree in trees if tree.leaves)
    print(f"{name}: {len(trees)} dialogues, " + f"{pairs} pairs, " * (pairs > 0)
          + f"{sum(tree.tokens for tree in trees):,} tokens, {sum(tree.learnt for tree in trees):,} in the loss; "
          f"cut to {max_length} tokens: {counts['responses_cut']} responses, "
          f"dropped: {counts['responses_dropped']} responses, {counts['trees_dropped']} dialogues")
    return trees


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, [count]: a function of the seed and the epoch alone, so that resuming needs no state."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_trees(trees: list[Tree], batch: int, step: int, seed: int) -> list[Tree]:
    """The trees of optimizer step `step` (from 0). Epochs follow each other; the last step of one may be smaller."""
    per_epoch = steps_per_epoch(len(trees), batch)
    epoch, place = divmod(step, per_epoch)
    return [trees[i] for i in shuffled(len(trees), seed, epoch)[place * batch : (place + 1) * batch]]


def steps_per_epoch(count: int, batch: int) -> int:
    return -(-count // batch)


def digest(trees: list[Tree]) -> str:
    """A hash of what the model would see: data, template, tokenizer and truncation together, 16 hex digits."""
    total = hashlib.sha256()
    for tree in trees:
        for ids in (tree.trunk, *(leaf for _, leaf in tree.leaves)):
            total.update(ids.tobytes())
        total.update(repr((tree.responses, [prefix for prefix, _ in tree.leaves])).encode())
    return total.hexdigest()[:16]


# --------------------------------------------------------------------------------- the packed batch

@dataclass(frozen=True)
class Batch:
    """Trees in one flat row of N tokens, with B responses of M tokens in all."""

    tokens: Tensor     # [N] ids
    positions: Tensor  # [N] place on the token's own path
    previous: Tensor   # [N] index of the token before it on its path, -1 at a trunk's start
    layout: Layout     # S segments
    response_index: Tensor  # [M] index of every response token, response by response
    owner: Tensor      # [M] its response
    pair: Tensor       # [B] pairs count through the batch
    side: Tensor       # [B] CHOSEN or REJECTED
    turn: Tensor       # [B] from 1
    margin: Tensor     # [B] float
    response_ids: Tensor  # [B] which responses of all trees given to `pack` or `micro_batches`, in their order
    trees: list[Tree]
    weight: float = 1.0  # 0.0: a repetition, which keeps a rank without work in step with the others

    @property
    def pairs(self) -> int:
        return sum(tree.pairs for tree in self.trees)

    @property
    def predictors(self) -> Tensor:
        """[M] index of the hidden state that predicts each response token."""
        return self.previous[self.response_index]

    @property
    def targets(self) -> Tensor:
        """[M] the response tokens."""
        return self.tokens[self.response_index]

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of every response."""
        return torch.bincount(self.owner, minlength=len(self.pair))

    @property
    def ends(self) -> Tensor:
        """[B] index of every response's last token, its end of sequence unless it was cut."""
        return self.response_index[self.lengths.cumsum(0) - 1]

    def rows(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Per-token values [M] as padded rows [B, T], one response each, and the mask [B, T] of what is real."""
        mask = torch.arange(int(self.lengths.max()), device=values.device) < self.lengths[:, None]
        return values.new_zeros(mask.shape).masked_scatter(mask, values), mask

    def sums(self, logprobs: Tensor) -> Tensor:
        """Per-token values [M] summed by response, [B]."""
        return logprobs.new_zeros(len(self.pair)).index_add(0, self.owner, logprobs)

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values by response [B] as chosen and rejected [pairs], pair by pair."""
        chosen, rejected = values.new_zeros(2, self.pairs)
        won, lost = self.side == CHOSEN, self.side == REJECTED
        return chosen.index_put((self.pair[won],), values[won]), rejected.index_put((self.pair[lost],), values[lost])

    def to(self, device) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if name not in ("trees", "weight")}
        return Batch(**moved, trees=self.trees, weight=self.weight)


def pack(trees: list[Tree], micro_tokens: int) -> list[Batch]:
    """Batches of at most `micro_tokens` tokens each (a larger tree is one by itself), the longest trees first.

    Trees of similar length share a batch: it pads little where a kernel works on padded rows.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(trees)), key=lambda i: -trees[i].tokens):
        if trees[i].tokens > room:
            batches.append([])
            room = micro_tokens
        batches[-1].append(i)
        room -= trees[i].tokens
    return [collate(trees, chosen) for chosen in batches]


def micro_batches(trees: list[Tree], micro_tokens: int) -> list[Batch]:
    """This rank's micro-batches of a step's trees: with one process `pack`'s, with several as many on every rank.

    Longest trees first, each to the batch that holds least, so that ranks wait little for each other: they gather
    weights together. With fewer trees than ranks some repeat another's batch with weight 0.
    """
    world_size = distributed.world_size()
    if world_size == 1:
        return pack(trees, micro_tokens)
    count, batches = 0, []
    while not batches or any(len(b) > 1 and sum(trees[i].tokens for i in b) > micro_tokens for b in batches):
        count += world_size
        batches = [[] for _ in range(count)]
        least = [(0, k) for k in range(count)]  # tokens of each
        for i in sorted(range(len(trees)), key=lambda i: -trees[i].tokens):
            held, k = least[0]
            batches[k].append(i)
            heapq.heapreplace(least, (held + trees[i].tokens, k))
    mine = batches[distributed.rank() :: world_size]
    return [collate(trees, chosen) if chosen else replace(collate(trees, batches[0]), weight=0.0) for chosen in mine]


def collate(trees: list[Tree], chosen: list[int] | None = None) -> Batch:
    """Lay the chosen ones (None: all) of a list of trees end to end."""
    segments, lengths, trunks, prefixes = [], [], [], []
    index, owner, pair, side, turn, margin, ids = [], [], [], [], [], [], []
    first_ids = np.cumsum([0, *(len(tree.responses) for tree in trees)])
    chosen = range(len(trees)) if chosen is None else chosen
    at = pairs = 0
    for number in chosen:
        tree, trunk, starts = trees[number], len(segments), [at]
        for prefix, tokens in [(0, tree.trunk), *tree.leaves]:
            segments.append(tokens)
            lengths.append(len(tokens))
            trunks.append(trunk)
            prefixes.append(prefix)
            at += len(tokens)
            starts.append(at)
        for r in tree.responses:
            begin = starts[r.segment]
            index.append(np.arange(begin + r.start, begin + r.end))
            owner.append(np.full(r.end - r.start, len(pair)))
            pair.append(pairs + r.pair)
            side.append(r.side)
            turn.append(r.turn)
            margin.append(r.margin)
        ids.append(np.arange(first_ids[number], first_ids[number + 1]))
        pairs += tree.pairs
    layout = Layout.build(lengths, trunks, prefixes)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), layout.length)
    place = torch.arange(at) - layout.start[segment]
    previous = torch.arange(at) - 1
    # A segment's first token follows the trunk token it branches after; at a trunk's start, none.
    previous[layout.start] = torch.where(layout.prefix > 0, layout.trunk_start + layout.prefix - 1, -1)
    return Batch(
        torch.from_numpy(np.concatenate(segments).astype(np.int64)), layout.prefix[segment] + place, previous, layout,
        torch.from_numpy(np.concatenate(index)), torch.from_numpy(np.concatenate(owner)), torch.tensor(pair),
        torch.tensor(side), torch.tensor(turn), torch.tensor(margin), torch.from_numpy(np.concatenate(ids)),
        [trees[i] for i in chosen],
    )


# -------------------------------------------------------------------------------------- the viewer

def show(tree: Tree, tokenizer: Tokenizer) -> str:
    """A tree token by token: index, position, token, which response it is trained in."""
    batch = collate([tree])
    of = {int(i): int(r) for i, r in zip(batch.response_index, batch.owner, strict=True)}
    lines = []
    for s, start in enumerate(batch.layout.start.tolist()):
        branch = f"leaf {s}, branches after {tree.leaves[s - 1][0]} tokens" if s else "trunk"
        lines.append(f"  {branch}\n   index  pos  loss  token")
        for i in range(start, start + int(batch.layout.length[s])):
            note = ""
            if i in of:
                r = tree.responses[of[i]]
                kind = "response"
                if tree.leaves:
                    kind = f"rank {r.side}" if tree.ranked else ("chosen", "rejected")[r.side]
                margin, cut = f", margin {r.margin:g}" if r.margin else "", ", cut" if r.cut else ""
                note = f"  {kind}, turn {r.turn}{margin}{cut}"
            name = tokenizer.name(int(batch.tokens[i]))
            lines.append(f"   {i:5d} {int(batch.positions[i]):4d} {'   1' if i in of else '   .'}   {name:<16}{note}")
    return "\n".join(lines)


def load_trees(path: str, tokenizer: Tokenizer, template: str | None = None) -> list[Tree]:
    """The file as trees, whichever format it has; one line on a bad record, or on prompts without replies."""
    records, report = read(path)
    records = list(records)
    report.refuse()
    if report.format == "prompt":
        fail(f"{path}: holds prompts without replies, expected messages, preferences, rankings or text")
    return trees_of(records, report.format, tokenizer, template)


def trees_of(records: list[dict], form: str, tokenizer: Tokenizer, template: str | None = None) -> list[Tree]:
    """Records of one form (data/records.py) as trees; in a prompt nothing is learnt."""
    if form == "preference":
        return trees_from_preferences(records, tokenizer, template)
    trees = []
    for number, record in enumerate(records):
        if form == "text":
            bos = [tokenizer.bos_id] * tokenizer.adds_bos
            tree = tree_from_text([*bos, *tokenizer.encode(record["text"]), tokenizer.eos_id])
        elif form == "ranking":
            tree = tree_from_ranking(record, tokenizer, template)
        elif form == "prompt":
            ids = tokenizer.render(record["prompt"], template, add_generation_prompt=True)[0]
            tree = Tree(np.array(ids, np.int32), [], [Response(0, len(ids), len(ids))])
        else:
            tree = tree_from_messages(record["messages"], tokenizer, template)
        tree.record = number
        trees.append(tree)
    return trees


def scored_replies(trees: list[Tree], scores: Tensor, kl: Tensor, tokenizer: Tokenizer, count: int = 4) -> str:
    """The first sampled replies with their scores [B] and their KL [B, T], as lines to print."""
    lines, replies = [], [(tree, r) for tree in trees for r in tree.responses]
    for row, (tree, r) in enumerate(replies[:count]):
        asked = tokenizer.decode(tree.trunk.tolist())[-80:]
        said = tokenizer.decode(tree.leaves[r.segment - 1][1].tolist()).strip()
        lines.append(f"  score {scores[row]:+.2f}  kl {kl[row].sum():+.2f}  {asked!r} -> {said!r}{' ...' * r.cut}")
    return "\n".join(lines)


def load_prompts(path: str, tokenizer: Tokenizer, room: int) -> list[list[int]]:
    """The distinct prompts of a file, rendered up to where the reply begins, at most `room` tokens each."""
    records, report = read(path)
    records = list(records)
    report.refuse()
    if report.format not in ("preference", "ranking", "prompt"):
        fail(f"{path}: holds {report.format} records, expected records with a 'prompt'")
    prompts = [tokenizer.render(record["prompt"], add_generation_prompt=True)[0] for record in records]
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > room:
            fail(f"{path} record {number}: the prompt has {len(prompt)} tokens and a reply of max_tokens must fit "
                 f"behind it, expected at most {room}: drop it or lower max_tokens")
    return [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]


def sample_replies(model, tokenizer: Tokenizer, trees: list[Tree], count: int, seed: int) -> str:
    """The model's answers to the prompts of the first trees, as lines to print; plain text is continued."""
    begins = [tree.responses[0].start for tree in trees[:count]]
    prompts = [tree.trunk[: begin if begin > 1 else 8].tolist() for tree, begin in zip(trees, begins, strict=False)]
    return "\n".join(sample_texts(model, tokenizer, prompts, seed))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.pack", description="Show a data file as the model sees it.")
    parser.add_argument("file")
    parser.add_argument("--show", type=int, default=3, help="trees to print (default 3)")
    parser.add_argument("--tokenizer", default="data/tiny/base", help="checkpoint whose tokenizer and template to use")
    parser.add_argument("--template", default="", help="default: the checkpoint's own, or zephyr")
    parser.add_argument("--max-length", type=int, default=2**30, help="tokens of a path; longer ones are cut")
    words = arguments(parser)
    check_range("max-length", words.max_length, 1, inf)
    check_template(words.template)
    tokenizer = load_tokenizer(words.tokenizer)
    tokenizer.adopt(words.template)
    trees, counts = truncate(load_trees(words.file, tokenizer), words.max_length)
    total = sum(tree.tokens for tree in trees)
    learnt, leaves = sum(tree.learnt for tree in trees), sum(len(tree.leaves) for tree in trees)
    print(f"{words.file}: {len(trees)} trees, {leaves} leaves, {total} tokens, {learnt} in the loss; "
          + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items() if name != "trees"))
    for number, tree in enumerate(trees[: words.show]):
        print(f"\ntree {number}: {tree.tokens} tokens, {len(tree.responses)} responses\n{show(tree, tokenizer)}")


if __name__ == "__main__":
    main()
