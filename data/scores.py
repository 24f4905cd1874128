"""What a model thinks of replies: log-probabilities under a language model, scores of a reward model."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data.pack import Batch, Tree, share
from kernels.logprobs import linear_logprobs
from model import Transformer
from runtime import distributed


def response_logprob_sums(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability of every response given its prompt, summed over its tokens, [B] nats."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)                           # [N, D]
    logprobs, _ = linear_logprobs(hidden[batch.predictors], model.head_weight, batch.targets)    # [M]
    return batch.sums(logprobs)


def mean_logprobs(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability per token of every response, [B] nats: the baseline for a reward model."""
    return response_logprob_sums(model, batch) / batch.lengths


def response_scores(model: Transformer, batch: Batch) -> Tensor:
    """Score of every response under a reward model, read at its last token, [B]."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)  # [N, D]
    return model.scores(hidden[batch.ends])


@torch.no_grad()
def all_scores(model: Transformer, trees: list[Tree], micro_tokens: int, device: torch.device,
               score: Callable[[Transformer, Batch], Tensor] = response_scores) -> list[Tensor]:
    """Scores [responses] of every tree, in the order given; each rank scores its batches, and all get all scores."""
    counts = [len(tree.responses) for tree in trees]
    table = torch.zeros(sum(counts))
    for batch in share(trees, micro_tokens):
        table[batch.response_ids] += score(model, batch.to(device)).float().cpu() * batch.counts
    return list(distributed.all_reduce(table).split(counts))
