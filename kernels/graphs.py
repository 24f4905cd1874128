"""CUDA graphs of a decoding step: a 7B model's is hundreds of launches, which cost more than the work."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class DecodeGraphs:
    """step(tokens [B], positions [B], longest) -> logits [B, V], recorded once for each size and replayed.

    A graph has one size, the next power of two; its idle rows write to the first place of slots that are free.
    """

    def __init__(self, step: Callable, cache, slots: int):
        self.step, self.cache, self.slots = step, cache, slots
        self.graphs: dict[int, tuple] = {}
        self.memory = self.stream = None  # what all graphs share

    def __call__(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        count, seen = len(tokens), max(self.cache.longest, longest)
        size = min(self.slots, 1 << (count - 1).bit_length())
        padding = (0, size - count)
        if size not in self.graphs:
            self.graphs[size] = self._capture(F.pad(tokens, padding), F.pad(positions, padding))
        graph, its_tokens, its_positions, logits = self.graphs[size]
        its_tokens.copy_(F.pad(tokens, padding))
        its_positions.copy_(F.pad(positions, padding))
        graph.replay()
        self.cache.longest = seen
        return logits[:count]

    def _capture(self, tokens: Tensor, positions: Tensor) -> tuple:
        """Record the step that reads these two tensors. It runs once before: kernels compile."""
        if self.memory is None:
            self.memory, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step(tokens, positions, self.cache.room)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, stream=self.stream):
            logits = self.step(tokens, positions, self.cache.room)
        return graph, tokens, positions, logits
