"""Trees as packed batches: the order of an epoch, the layout, and a viewer.

Trees (data/trees.py) are laid end to end:

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
import argparse
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

import numpy as np
import torch
from torch import Tensor

from data.store import flatten, load_trees
from data.tokenizer import Tokenizer, check_template, load_tokenizer
from data.trees import CHOSEN, REJECTED, Tree
from kernels.layout import Layout
from model import ModelConfig, Transformer, generate
from runtime import arguments, check_range, distributed, fail

# ------------------------------------------------------------------------------------------- order

@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, [count]: a function of the seed and the epoch alone, so that resuming needs no state."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_trees(trees: Sequence[Tree], batch: int, step: int, seed: int) -> list[Tree]:
    """The trees of optimizer step `step` (from 0). Epochs follow each other; the last step of one may be smaller."""
    per_epoch = steps_per_epoch(len(trees), batch)
    epoch, place = divmod(step, per_epoch)
    return [trees[i] for i in shuffled(len(trees), seed, epoch)[place * batch : (place + 1) * batch]]


def steps_per_epoch(count: int, batch: int) -> int:
    return -(-count // batch)


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

    def to(self, device) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if name not in ("trees", "weight")}
        return Batch(**moved, trees=self.trees, weight=self.weight)


def pack(trees: Sequence[Tree], micro_tokens: int) -> list[Batch]:
    """Batches of at most `micro_tokens` tokens (a larger tree is one by itself), the longest trees first."""
    tokens, first_ids = _sizes(trees)
    return [collate([trees[i] for i in chosen], first_ids[chosen]) for chosen in plan(tokens, micro_tokens)]


def micro_batches(trees: Sequence[Tree], micro_tokens: int) -> Iterator[Batch]:
    """This rank's micro-batches of a step's trees, as many on every rank: some may repeat another's, weight 0."""
    tokens, first_ids = _sizes(trees)
    world_size = distributed.world_size()
    batches = plan(tokens, micro_tokens) if world_size == 1 else _even_plan(tokens, micro_tokens, world_size)
    for mine in batches[distributed.rank() :: world_size]:
        chosen = mine or batches[0]
        batch = collate([trees[i] for i in chosen], first_ids[chosen])
        yield batch if mine else replace(batch, weight=0.0)


def _sizes(trees: Sequence[Tree]) -> tuple[list[int], np.ndarray]:
    """Tokens of every tree, and the number of its first response."""
    sizes = [(tree.tokens, len(tree.responses)) for tree in trees]
    return [tokens for tokens, _ in sizes], np.cumsum([0, *(responses for _, responses in sizes)])


def plan(tokens: list[int], micro_tokens: int) -> list[list[int]]:
    """Which trees make a batch, by their tokens: the longest first, each batch filled before the next."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        if tokens[i] > room:
            batches.append([])
            room = micro_tokens
        batches[-1].append(i)
        room -= tokens[i]
    return batches


def _even_plan(tokens: list[int], micro_tokens: int, world_size: int) -> list[list[int]]:
    """The same for several ranks: a multiple of them, as few as keep the limit.

    Longest trees first, each to the batch that holds least: ranks gather weights together, and wait for each other.
    """
    count, batches = 0, []
    while not batches or any(len(b) > 1 and sum(tokens[i] for i in b) > micro_tokens for b in batches):
        count += world_size
        batches = [[] for _ in range(count)]
        least = [(0, k) for k in range(count)]  # tokens of each
        for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
            held, k = least[0]
            batches[k].append(i)
            heapq.heapreplace(least, (held + tokens[i], k))
    return batches


def collate(trees: list[Tree], first_ids: np.ndarray | None = None) -> Batch:
    """Lay trees end to end. first_ids: the numbers of their first responses (None: they count on from 0)."""
    tokens, segments, responses, rows = flatten(trees)
    tree_of = np.repeat(np.arange(len(trees)), rows["responses"])                    # [B] whose each response is
    trunk = rows["segments"].cumsum() - rows["segments"]                             # [trees] number of its trunk
    first_pair = np.cumsum([0, *(tree.pairs for tree in trees)])                     # [trees + 1]
    ids = np.arange(len(tree_of))                                                    # [B]
    if first_ids is not None:
        ids += (first_ids - rows["responses"].cumsum() + rows["responses"])[tree_of]
    begin = segments["start"][trunk[tree_of] + responses["segment"]]                 # [B] of the response's segment
    spans = zip(begin + responses["start"], begin + responses["end"], strict=True)
    index = np.concatenate([np.arange(start, end) for start, end in spans])          # [M]
    owner = np.repeat(np.arange(len(tree_of)), responses["end"] - responses["start"])  # [M]

    layout = Layout.build(segments["length"].tolist(), np.repeat(trunk, rows["segments"]).tolist(),
                          segments["prefix"].tolist())
    segment = torch.repeat_interleave(torch.arange(len(segments)), layout.length)
    place = torch.arange(len(tokens)) - layout.start[segment]
    previous = torch.arange(len(tokens)) - 1
    # A segment's first token follows the trunk token it branches after; at a trunk's start, none.
    previous[layout.start] = torch.where(layout.prefix > 0, layout.trunk_start + layout.prefix - 1, -1)
    of_responses = (index, owner, responses["pair"] + first_pair[tree_of], responses["side"], responses["turn"])
    return Batch(torch.from_numpy(tokens.astype(np.int64)), layout.prefix[segment] + place, previous, layout,
                 *(torch.from_numpy(x.astype(np.int64)) for x in of_responses),
                 torch.from_numpy(responses["margin"].astype(np.float32)), torch.from_numpy(ids), trees)


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
                kind = f"rank {r.side}" if tree.ranked else ("chosen", "rejected")[r.side]
                kind = kind if tree.leaves else "response"
                margin, cut = f", margin {r.margin:g}" if r.margin else "", ", cut" if r.cut else ""
                note = f"  {kind}, turn {r.turn}{margin}{cut}"
            name = tokenizer.name(int(batch.tokens[i]))
            lines.append(f"   {i:5d} {int(batch.positions[i]):4d} {'   1' if i in of else '   .'}   {name:<16}{note}")
    return "\n".join(lines)


def scored_replies(trees: list[Tree], scores: Tensor, kl: Tensor, tokenizer: Tokenizer, count: int = 4) -> str:
    """The first sampled replies with their scores [B] and their KL [B, T], as lines to print."""
    lines, replies = [], [(tree, r) for tree in trees for r in tree.responses]
    for row, (tree, r) in enumerate(replies[:count]):
        asked = tokenizer.decode(tree.trunk.tolist())[-80:]
        said = tokenizer.decode(tree.leaves[r.segment - 1][1].tolist()).strip()
        lines.append(f"  score {scores[row]:+.2f}  kl {kl[row].sum():+.2f}  {asked!r} -> {said!r}{' ...' * r.cut}")
    return "\n".join(lines)


def check_positions(config: ModelConfig, key: str, length: int) -> None:
    """One line if a path of `length` tokens, which setting `key` allows, has more than learned positions."""
    if not config.rotary and length > config.max_positions:
        fail(f"{key} is {length}, the model has {config.max_positions} positions: lower it")


def sample_replies(model: Transformer, tokenizer: Tokenizer, trees: Sequence[Tree], count: int, seed: int) -> str:
    """The model's answers at temperature 0.7 to the prompts of the first trees, as lines; plain text is continued.

    Prompts that leave no room for a reply of 64 tokens before learned positions end are left out.
    """
    begins = [(tree, tree.responses[0].start) for tree in trees[:count]]
    prompts = [tree.trunk[: begin if begin > 1 else 8].tolist() for tree, begin in begins]
    room = inf if model.config.rotary else model.config.max_positions - 64
    prompts, lines = [prompt for prompt in prompts if len(prompt) <= room], []
    samples = generate(model, prompts, 64, temperature=0.7, stop_ids=tokenizer.stop_ids(), seed=seed)
    for prompt, (sample,) in zip(prompts, samples, strict=True):
        lines += [f"  {tokenizer.decode(prompt).strip()!r}", f"    {tokenizer.decode(sample.tokens)!r}"
                  + " ..." * (not sample.finished)]
    return "\n".join(lines)


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
    trees = load_trees(words.file, tokenizer, words.max_length)
    shown = ("responses_cut", "responses_dropped", "trees_dropped", "pairs_equal")
    print(f"{words.file}: {len(trees)} trees, {len(trees.segments) - len(trees)} leaves, "
          f"{trees.counts['tokens']} tokens, {trees.counts['learnt']} in the loss; "
          + ", ".join(f"{name.replace('_', ' ')} {trees.counts[name]}" for name in shown))
    for number, tree in enumerate(trees[: words.show]):
        print(f"\ntree {number}: {tree.tokens} tokens, {len(tree.responses)} responses\n{show(tree, tokenizer)}")


if __name__ == "__main__":
    main()
