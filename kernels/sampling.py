"""One token from logits: temperature, top-k and top-p, without sorting the vocabulary.

Random numbers come in from outside (`uniform_numbers`), so that a sample depends on its seed and never on its batch.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
DRAWS = 24  # uniform numbers for each token: more than one is used when top-p refuses a draw


def uniform_numbers(seed: int | list[int], max_tokens: int) -> np.ndarray:
    """A sample's random stream, [max_tokens, DRAWS] in [0, 1)."""
    generator = np.random.default_rng(seed)
    first = generator.random((max_tokens, 1), dtype=np.float32)
    return np.concatenate([first, generator.random((max_tokens, DRAWS - 1), dtype=np.float32)], 1)


def sample_tokens(
    logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token per row of logits [B, V] from uniform numbers in [0, 1) [B, DRAWS], and its log-probability [B].

    Order: temperature, top-k (ties with the k-th stay), top-p (the fewest tokens whose probability reaches
    top_p, at least one, and ties with the last). The log-probability is that of the whole tempered distribution,
    so that it is what a training forward finds. temperature 0 takes the largest logit, with its probability at 1.
    """
    if temperature == 0:
        tokens = largest(logits)
        return tokens, torch.softmax(logits, -1).gather(1, tokens[:, None])[:, 0].log()
    if temperature < 1e-4:  # dividing by it may overflow; differences to the largest do not, for that stays 0
        logits, temperature = logits - logits.amax(-1, keepdim=True), max(temperature, 1e-30)
    probs = torch.softmax(logits / temperature, -1)
    kept = keep_top_k(probs, top_k) if top_k else probs
    tokens = inverse_cdf(kept, uniform[:, 0])
    if top_p < 1:
        tokens = _redraw(kept, tokens, top_p, uniform)
    return tokens, probs.gather(1, tokens[:, None])[:, 0].log()


def largest(x: Tensor) -> Tensor:
    """The place of each row's first largest number, x [B, V] -> [B].

    On a CPU by blocks: `argmax` reads one number at a time, of 64 x 32,000 for 1.1 ms, where `amax` takes 0.09.
    """
    if x.device.type != "cpu" or x.numel() < 2**18 or x.shape[1] % BLOCK:
        return x.argmax(-1)
    blocks = x.unflatten(1, (-1, BLOCK))
    block = blocks.amax(-1).argmax(-1)
    return block * BLOCK + blocks[torch.arange(len(x)), block].argmax(-1)


def keep_top_k(probs: Tensor, top_k: int) -> Tensor:
    """Probabilities [B, V] of the k likeliest tokens alone, which sum to 1."""
    kth = probs.topk(min(top_k, probs.shape[-1]), dim=-1).values[:, -1:]
    kept = probs.masked_fill(probs < kth, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token of each row of weights [B, V] where the running sum exceeds uniform [B] times the total, [B]."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # Below the total: rounding might point past the last token.
    below = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below[:, None], right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def likelier(probs: Tensor, tokens: Tensor) -> Tensor:
    """Probabilities [B, V], but 0 where one is not above that of the row's token [B]."""
    above = torch.empty_like(probs)  # of numbers: boolean masks of 64 x 32,000 take five times as long
    return torch.gt(probs, probs.gather(1, tokens[:, None]), out=above).mul_(probs)


def in_nucleus(probs: Tensor, tokens: Tensor, top_p: float) -> Tensor:
    """Whether token [B] of a row [B, V] is among the fewest tokens whose probability reaches top_p, [B].

    It is if those likelier than it hold less than top_p, or if there are none.
    """
    above = likelier(probs, tokens).sum(-1)
    return (above < top_p) | (above == 0)


def _redraw(probs: Tensor, tokens: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Top-p (Holtzman et al. 2020) without sorting: a token outside the nucleus is redrawn among likelier ones.

    Tokens no likelier than a refused one lie outside too, so each draw is from a set that holds the whole nucleus,
    and what is accepted has the nucleus's distribution. Most rows accept the first. Sorting 64 rows of 32,000 costs
    73 ms on two cores, a decoding step of a 15 M model 12.
    """
    refused = (~in_nucleus(probs, tokens, top_p)).nonzero()[:, 0]
    for column in range(1, DRAWS):
        if not len(refused):
            return tokens
        some = probs[refused]
        tokens[refused] = inverse_cdf(likelier(some, tokens[refused]), uniform[refused, column])
        refused = refused[~in_nucleus(some, tokens[refused], top_p)]
    tokens[refused] = probs[refused].argmax(-1)  # once in a billion tokens at top_p 0.01, less above
    return tokens


def sample_each(logits: Tensor, settings: list[tuple[float, int, float]], uniform: Tensor) -> tuple[Tensor, Tensor]:
    """sample_tokens, each row with its own temperature, top-k and top-p."""
    kinds = set(settings)
    if len(kinds) == 1:
        return sample_tokens(logits, *settings[0], uniform)
    tokens = torch.empty(len(settings), dtype=torch.long, device=logits.device)
    logprobs = logits.new_empty(len(settings))
    for kind in kinds:
        rows = torch.tensor([i for i, x in enumerate(settings) if x == kind], device=logits.device)
        tokens[rows], logprobs[rows] = sample_tokens(logits[rows], *kind, uniform[rows])
    return tokens, logprobs
