"""Kahneman-Tversky optimization: learn from single replies labelled good or bad, without pairs.

    r(x, y) = log pi(y|x) - log pi_ref(y|x)                                     nats
    z0      = max(0, mean over the step of r(x, y')), y' a reply to another prompt; an estimate of KL(pi || pi_ref)
    loss    = mean over replies of  lambda_D sigmoid(beta (z0 - r(x, y)))       where y is desirable
                                    lambda_U sigmoid(beta (r(x, y) - z0))       where it is undesirable

z0 passes no gradient. It counts off what every reply gains, whatever the prompt; training from an SFT model often makes
odd replies less likely, and z0 stays 0. Data are dialogues with a "label", true or false, of their last reply; a
preference counts as one reply of each kind.

    python kto.py --config configs/tiny/kto.toml            loss 0.5 at the first step, falling

Ethayarajh et al. 2024 (arXiv:2402.01306), Eq. 7 and 8. The loop and the reference are dpo.py's.
"""
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

import lora
import runtime
from data.dry_run import dry_run
from data.pack import Batch, check_positions, micro_batches, sample_replies, step_trees, steps_per_epoch
from data.store import SEGMENT, Trees, fit, load_trees
from data.tokenizer import Tokenizer, adopt_template, check_template, load_tokenizer
from data.trees import CHOSEN, REJECTED, Tree
from dpo import reference_sums, response_sums, set_reference
from model import Transformer
from runtime import distributed, fail


@dataclass(frozen=True)
class Config(runtime.DataSettings):
    model: str = "runs/tiny/0/sft/model"  # Hugging Face directory to start from, usually the result of sft.py
    ref_model: str = ""              # the reference; "": the same as model
    data: str = "runs/tiny/0/pairs.jsonl"  # JSONL of labelled dialogues, or of preferences (data/formats.py)
    out: str = "runs/kto"            # folder of the run
    ref_cache: str = ""              # file of reference log-probabilities, to share; "": in the run's folder

    beta: float = 0.1                # how soon a reply counts as good or bad enough, 0.01-0.5
    desirable_weight: float = 1.0    # lambda_D; lambda_D n_D / (lambda_U n_U) between 1 and 4/3 for n_D and n_U replies
    undesirable_weight: float = 1.0  # lambda_U
    lr: float = 2e-4                 # peak learning rate, 2e-4 for the tiny model, 5e-7 to 5e-6 for 7B
    samples: int = 3                 # replies to show at the end

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template)
        runtime.check_ranges(self, beta=(1e-6, inf), desirable_weight=(0, inf), undesirable_weight=(0, inf),
                             samples=(0, inf))


# ---------------------------------------------------------------------------------------- the loss

def kto_loss(
    policy_logprobs: Tensor,   # [B] log pi(y | x), summed over response tokens, nats
    ref_logprobs: Tensor,      # [B] log pi_ref(y | x), no gradient
    desirable: Tensor,         # [B] bool, the labels
    z0: float,                 # the reference point, at least 0, nats
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KTO loss (Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8), a mean over replies, and its metrics.

    A policy equal to its reference scores 0.5 with both weights 1. The margin is how far a reply's reward lies on its
    label's side of beta z0, and accuracy the share of replies that lie there.
    Raises ValueError if beta is not positive: at 0 the loss ignores the policy.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}, expected a positive number: set e.g. beta=0.1")
    rewards = beta * (policy_logprobs - ref_logprobs - z0)                                    # [B]
    margins = torch.where(desirable, rewards, -rewards)                                       # [B]
    losses = torch.where(desirable, desirable_weight, undesirable_weight) * torch.sigmoid(-margins)
    metrics = {"loss": losses, "margin": margins, "accuracy": (margins > 0).float()}
    return losses.mean(), {name: value.detach().mean() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------- the data

def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> Trees:
    """The file as trees; a desirable reply is CHOSEN, an undesirable one REJECTED. A preference is one tree with both:

        BOS <|user|> \\n  Hi  EOS \\n <|assistant|> \\n  Hello !  EOS | leaf: Go away EOS
        trunk        no loss                           |  desirable     | undesirable, branches after the prompt
    """
    trees = load_trees(path, tokenizer, config.max_length, cache=config.cache, columns=config.columns, labels=True)
    trees = fit(trees, config.max_length, path, name)
    undesirable = int((trees.responses["side"] == REJECTED).sum())
    print(f"{name}: {len(trees.responses) - undesirable} desirable and {undesirable} undesirable replies")
    if len(trees) == 1:
        fail(f"{path}: holds one dialogue, expected at least 2: the reference point is taken from replies to others")
    return trees


def mismatched(trees: Trees, max_length: int) -> Trees:
    """Every tree's prompts, each followed by replies to another's, from which z0 is estimated: leaves of the prompt.

        BOS <|user|> \\n  Hi  EOS \\n <|assistant|> \\n | leaf: A recipe for ... EOS | leaf: 42 EOS

    As many as replies, drawn once for the file, so that the reference's log-probabilities can be kept. A pair that is
    too long loses the end of y', for policy and reference alike.
    """
    rng, count = np.random.default_rng(0), trees.rows["responses"]
    order = rng.permutation(len(trees))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)                                            # [trees] whose replies it gets
    tree = np.repeat(np.arange(len(trees)), count)                              # [responses] whose each is
    reply = trees.first_response[other[tree]] + rng.integers(count[other[tree]])  # [responses] what stands in its place

    responses, first = trees.responses.copy(), trees.first_response[:-1]
    segment = trees.first_segment[tree] + responses["segment"]
    start = trees.segments["start"][segment] + responses["start"]               # among all tokens
    prefix = trees.segments["prefix"][segment] + responses["start"]             # of the reply, wherever it lies
    length = np.minimum((responses["end"] - responses["start"])[reply], max_length - prefix)

    number = np.arange(len(responses)) - trees.first_response[tree]             # within its tree
    responses["segment"], responses["pair"] = number + 1, number
    responses["start"], responses["end"] = 0, length
    leaves, trunks, rows = np.empty(len(responses), SEGMENT), np.empty(len(trees), SEGMENT), trees.rows.copy()
    leaves["start"], leaves["length"], leaves["prefix"] = start[reply], length, prefix
    trunks["start"], trunks["prefix"] = trees.segments["start"][trees.first_segment[:-1]], 0
    trunks["length"] = np.maximum.reduceat(prefix, first)
    rows["segments"] = 1 + count
    return Trees(trees.tokens, np.insert(leaves, first, trunks), responses, rows, trees.counts)


# ------------------------------------------------------------------------------------------ training

@torch.no_grad()
def reference_point(policy: Transformer, trees: Sequence[Tree], config: Config, device: torch.device) -> float:
    """z0 of a step's mismatched trees.

    The paper takes a micro-batch's. Here it is the whole step's, known before the first gradient, so that micro-batches
    and ranks change nothing; without gradients the extra pass is cheap.
    """
    total = torch.zeros((), device=device)
    for batch in micro_batches(trees, config.micro_tokens):
        sums = response_sums(policy, batch.to(device))
        total += batch.weight * (sums - reference_sums(batch).to(sums)).sum()
    return max(0.0, distributed.all_reduce(total).item() / sum(len(tree.responses) for tree in trees))


def train_step(policy: Transformer, batch: Batch, config: Config, z0: float,
               labels: Counter) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss and metrics, means over the step's replies, which `labels` counts."""
    sums = response_sums(policy, batch)                                          # [B]
    loss, metrics = kto_loss(sums, reference_sums(batch).to(sums), batch.side == CHOSEN, z0, config.beta,
                             config.desirable_weight, config.undesirable_weight)
    weight = batch.weight * len(sums) / labels.total()
    metrics = {name: weight * value for name, value in metrics.items()}
    for name, side in (("desirable", CHOSEN), ("undesirable", REJECTED)):
        total = sums.detach()[batch.side == side].sum()
        metrics[f"logprobs_{name}"] = batch.weight * total / max(1, labels[side])
    return weight * loss, metrics


def count_labels(trees: Sequence[Tree]) -> Counter:
    return Counter(r.side for tree in trees for r in tree.responses)


@torch.no_grad()
def evaluate(policy: Transformer, trees: Trees, others: Trees, config: Config,
             device: torch.device) -> dict[str, float]:
    """Loss, margin and accuracy over held-out replies, and their z0."""
    labels, sums = count_labels(trees), runtime.Sums()
    z0 = reference_point(policy, others, config, device)
    for batch in micro_batches(trees, config.micro_tokens):
        sums.add(train_step(policy, batch.to(device), config, z0, labels)[1])
    found = distributed.all_reduce_metrics({f"eval_{name}": sums[name] for name in ("loss", "margin", "accuracy")})
    return found | {"eval_z0": z0}


def main(config: Config) -> None:
    if config.dry_run:
        return dry_run(config, load_data)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels, config.dtype)
    tokenizer = load_tokenizer(config.model)
    policy = lora.load_base(config.model, config, device, scored=False)
    check_positions(policy.config, "max_length", config.max_length)
    print(adopt_template(policy, tokenizer, config.template))
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    lora.shard(lora.adapt(policy, config), config, device)

    run = runtime.Run(config, {"data": config.data, "model": config.model, "code": __file__})
    given = [trees, eval_trees] if eval_trees else [trees]
    others, *eval_others = (mismatched(one, config.max_length) for one in given)
    set_reference(policy, config.template or tokenizer.template, [*given, others, *eval_others], run.folder, config,
                  device)
    optimizer = runtime.adamw(policy, config.lr, config.weight_decay, config.beta2, config.lora_plus, config.adam_eps)
    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    run.resume(policy, optimizer, steps, shown=("loss", "z0", "margin", "accuracy", "replies_per_s"))

    for step in run.steps_left():
        began = time.perf_counter()
        lr = runtime.set_learning_rate(optimizer, step, steps, config)
        drawn, beside = (step_trees(one, config.batch, step, config.seed) for one in (trees, others))
        labels, z0 = count_labels(drawn), reference_point(policy, beside, config, device)
        metrics = runtime.Sums()
        for batch in micro_batches(drawn, config.micro_tokens):
            loss, parts = train_step(policy, batch.to(device), config, z0, labels)
            loss.backward()
            metrics.add(parts)
        metrics = distributed.all_reduce_metrics(metrics)
        metrics["grad_norm"] = distributed.clip_grad_norm(policy, config.max_grad_norm)
        runtime.check_finite(metrics["loss"], metrics["grad_norm"], step, [tree.record for tree in drawn])
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"z0": z0, "lr": lr, "replies": labels.total(), "tokens": sum(tree.tokens for tree in drawn),
                    "replies_per_s": labels.total() / (time.perf_counter() - began)}
        if eval_trees and run.due(config.eval_every, step + 1):
            metrics |= evaluate(policy, eval_trees, eval_others[0], config, device)
        run.end_step(metrics, policy, optimizer)

    if run.finished:
        policy = lora.save_result(policy, run.folder, tokenizer, config, probe=trees[0].trunk[:64].tolist())
        run.note(sample_replies(policy, tokenizer, eval_trees or trees, config.samples, config.seed))
    run.close()


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
