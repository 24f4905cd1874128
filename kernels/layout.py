"""The packed conversation tree: which token of a flat row sees which.

A batch is one flat row of N tokens made of segments: trunks, and leaves that branch off a trunk after
`prefix` of its tokens. Token i attends to the tokens on its own path up to itself:

    segment    |------ trunk, 10 tokens ------|- leaf A, 3 -|- leaf B, 2 -|
    index       0  1  2  3  4  5  6  7  8  9   10  11  12    13  14
    prefix                                     2             7
    position    0  1  2  3  4  5  6  7  8  9   2   3   4     7   8

    token 4 sees 0..4;  token 11 sees 0 1 10 11;  token 14 sees 0..6 13 14

List the keys of a segment as "prefix of the trunk, then its own", and both rules (causal inside the segment,
all of the prefix before it) become one test on positions along the path: 0 <= position(query) - position(key).
A sliding window of W tokens adds "... < W".
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The S segments of one packed row, in order; leaves follow their trunk.

    Children are the leaves of a trunk: segments first_child .. last_child - 1 (equal when there are none).
    """

    start: Tensor        # [S] index of the segment's first token
    length: Tensor       # [S] tokens
    trunk_start: Tensor  # [S] index of the first token of its trunk (its own start for a trunk)
    prefix: Tensor       # [S] tokens of that trunk it sees, 0 for a trunk
    first_child: Tensor  # [S] segment number
    last_child: Tensor   # [S] segment number, one past the end
    lengths: list[int]   # `length` and `prefix` again as lists: reading a GPU's tensor back would sync the GPU
    prefixes: list[int]
    plans: dict = field(default_factory=dict, repr=False)  # what kernels derived from it, kept for the next layer

    @staticmethod
    def build(lengths: list[int], trunks: list[int] | None = None, prefixes: list[int] | None = None) -> Layout:
        """From lengths [S], the number of each segment's trunk [S] and prefixes [S]; plain sequences by default."""
        length = torch.tensor(lengths, dtype=torch.long)
        count = len(lengths)
        trunk = torch.arange(count) if trunks is None else torch.tensor(trunks, dtype=torch.long)
        prefix = torch.zeros(count, dtype=torch.long) if prefixes is None else torch.tensor(prefixes, dtype=torch.long)
        is_leaf = trunk != torch.arange(count)
        if bool((length < 1).any()) or bool((prefix[is_leaf] > length[trunk[is_leaf]]).any()):
            raise ValueError("a segment has no token, or a leaf branches after the end of its trunk")
        start = length.cumsum(0) - length
        children = torch.zeros(count, dtype=torch.long).index_add_(0, trunk, is_leaf.long())
        # Leaves follow their trunk, so the children of segment s are s + 1 .. s + children.
        first = torch.arange(count) + 1
        return Layout(start, length, start[trunk], prefix, first, first + children, length.tolist(), prefix.tolist())

    def to(self, device) -> Layout:
        tensors = self.start, self.length, self.trunk_start, self.prefix, self.first_child, self.last_child
        return Layout(*(x.to(device) for x in tensors), self.lengths, self.prefixes)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)
