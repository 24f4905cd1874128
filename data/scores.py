"""What a model thinks of replies: log-probabilities under a language model, scores of a reward model."""
import math
from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch import Tensor

from data.pack import Batch, micro_batches
from data.trees import Tree
from kernels.logprobs import linear_logprobs
from model import Transformer
from runtime import distributed


def response_logprob_sums(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability of every response given its prompt, [B] nats; dpo.py writes it out, as it is what is learnt."""
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
def all_scores(model: Transformer, trees: Sequence[Tree], micro_tokens: int, device: torch.device,
               score: Callable[[Transformer, Batch], Tensor] = response_scores) -> list[Tensor]:
    """Scores [responses] of every tree, in the order given; each rank scores its batches, all get the table."""
    counts = [len(tree.responses) for tree in trees]
    table = torch.zeros(sum(counts))
    for batch in micro_batches(trees, micro_tokens):
        table[batch.response_ids] += score(model, batch.to(device)).float().cpu() * batch.weight
    return list(distributed.all_reduce(table).split(counts))


def report(trees: Sequence[Tree], scores: list[Tensor], categories: list[str] | None = None) -> dict:
    """How well scores agree with held-out preferences.

    accuracy        share of pairs whose chosen reply scores higher (ties miss), also by margin and by category
    calibration     pairs by how sure the model is, sigmoid |difference|, in five bins from 0.5: [said, found, pairs]
    length_correlation   of score and length in tokens (Pearson): a model that pays for words
    """
    pairs = []  # difference, margin, category
    for tree, values in zip(trees, scores, strict=True):
        category = categories[tree.record] if categories else ""
        for (better, high), (worse, low) in permutations(zip(tree.responses, values.tolist(), strict=True), 2):
            if better.pair == worse.pair and better.side < worse.side:
                pairs.append((high - low, better.margin, category))

    def accuracy(chosen: list) -> list[float]:
        return [sum(p[0] > 0 for p in chosen) / len(chosen), len(chosen)]

    def by(column: int) -> dict:
        found = sorted({p[column] for p in pairs})
        return {value: accuracy([p for p in pairs if p[column] == value]) for value in found}

    sure = [(1 / (1 + math.exp(-min(abs(p[0]), 50))), p[0] > 0) for p in pairs]
    bins = [[s for s in sure if min(int(10 * s[0]), 9) == tenth] for tenth in range(5, 10)]
    flat = torch.cat(scores).double()
    lengths = torch.tensor([r.end - r.start for tree in trees for r in tree.responses]).double()
    return {
        "accuracy": accuracy(pairs)[0], "pairs": len(pairs), "ties": sum(p[0] == 0 for p in pairs),
        "by_margin": {f"{margin:g}": found for margin, found in by(1).items()},
        "by_category": by(2) if categories else {},
        "calibration": [[sum(s[0] for s in b) / len(b), sum(s[1] for s in b) / len(b), len(b)] for b in bins if b],
        "length_correlation": torch.corrcoef(torch.stack([flat, lengths]))[0, 1].item() if len(flat) > 1 else 0.0,
    }


def print_report(name: str, found: dict, baseline: dict | None) -> None:
    beside = f", log-probability per token of the starting model {100 * baseline['accuracy']:.1f} %" if baseline else ""
    print(f"\n{name}: accuracy {100 * found['accuracy']:.1f} % of {found['pairs']} pairs{beside}")
    for title, key in (("margin", "by_margin"), ("task", "by_category")):
        if len(found[key]) > 1:
            parts = (f"{label} {100 * right:.0f} % ({count})" for label, (right, count) in found[key].items())
            print(f"by {title:<7}" + "  ".join(parts))
    print("calibration, predicted and observed: "
          + "  ".join(f"{said:.2f} {was:.2f} ({count})" for said, was, count in found["calibration"]))
    print(f"correlation of score and length {found['length_correlation']:+.2f}")
