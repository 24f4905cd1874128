"""Reward model: one number per reply, learnt from which of two replies people preferred.

    p(y_w is preferred to y_l) = sigmoid(r(x, y_w) - r(x, y_l))                 Bradley & Terry 1952
    loss = mean over pairs of -log sigmoid(r(x, y_w) - r(x, y_l) - m)           m >= 0 grows with the rated margin

The model is the SFT model with its LM head replaced by a score head, a row of D weights. A reply's score is
read at its last token, the end of sequence, where the whole reply has been seen; a dialogue rated at several
turns is one tree (`data/trees.py`) with a score for each reply. Only differences are learnt, so a constant is
fixed afterwards: demonstrations score 0 on average.

    python reward.py --config configs/tiny/reward.toml      accuracy overall, by margin and by task
    python reward.py --score replies.jsonl --model runs/reward/model      a score for every dialogue

Stiennon et al. 2020 (arXiv:2009.01325); Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1; Touvron et al. 2023
(arXiv:2307.09288), Eq. 2, for the margin.
"""
import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import runtime
from checkpoints import load_model
from data.dry_run import dry_run
from data.formats import read, read_all
from data.pack import Batch, check_positions, micro_batches, step_trees, steps_per_epoch
from data.scores import all_scores, mean_logprobs, print_report, report, response_scores
from data.store import Trees, fit, load_trees
from data.tokenizer import Tokenizer, adopt_template, check_template, load_tokenizer
from data.trees import CHOSEN, Tree
from model import Transformer, add_score_head
from runtime import distributed, fail


@dataclass(frozen=True)
class Config(runtime.DataSettings):
    model: str = "runs/tiny/0/sft/model"  # Hugging Face directory to start from, usually the result of sft.py
    data: str = "runs/tiny/0/pairs.jsonl"  # JSONL of preferences or rankings (data/formats.py)
    demos: str = ""                  # JSONL of demonstrations whose mean score becomes 0; "": the chosen replies
    out: str = "runs/reward"         # folder of the run

    margin: Literal["none", "raw", "llama2_small", "llama2_large"] = "none"  # m of a pair rated 1-4 (MARGINS)
    centering: float = 0.0           # weight of (r_w + r_l)^2, 0 or about 0.01
    epochs: int = 1                  # passes over the data; a large model overfits in a second one
    lr: float = 3e-4                 # peak learning rate, 3e-4 for the tiny model, 3e-6 to 1e-5 for 7B

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template)
        runtime.check_range("centering", self.centering, 0, inf)


# ---------------------------------------------------------------------------------------- the loss

# The margin m of ratings from 1 (slightly better) to 4 (very much better). Llama 2, table 27.
MARGINS = {"none": (0, 0, 0, 0), "raw": (1, 2, 3, 4), "llama2_small": (0, 1 / 3, 2 / 3, 1),
           "llama2_large": (0, 1, 2, 3)}


def pairwise_loss(
    chosen_scores: Tensor,            # [B] r(x, y_w)
    rejected_scores: Tensor,          # [B] r(x, y_l)
    margins: Tensor | None = None,    # [B] m, no gradient; None: 0
    centering: float = 0.0,           # c
    weights: Tensor | None = None,    # [B] that sum to 1; None: 1 / B each
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [] and its detached metrics [].

        loss = sum over pairs of weight * [-log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2]

    Equal scores cost log 2 = 0.6931 and count as a miss: a tie is no preference.
    """
    difference = chosen_scores - rejected_scores                                    # [B]
    weights = torch.full_like(difference, 1 / len(difference)) if weights is None else weights
    losses = -F.logsigmoid(difference - (0 if margins is None else margins))        # [B]
    losses = losses + centering * (chosen_scores + rejected_scores).square()
    loss = (weights * losses).sum()
    metrics = {"loss": losses, "accuracy": (difference > 0).to(losses), "margin": difference,
               "score_chosen": chosen_scores, "score_rejected": rejected_scores}
    return loss, {name: (weights * value.detach()).sum() for name, value in metrics.items()}


def comparisons(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """All comparisons that the batch's groups imply: the better and the worse reply of each [C], and weights [C].

    A pair is a group of two. K ranked replies make up to K (K - 1) / 2 comparisons, whose weights sum to 1: a prompt
    does not count more for having been answered more often, and each reply is run once (Ouyang et al., section 3.5).
    """
    compared = (batch.pair[:, None] == batch.pair) & (batch.side[:, None] < batch.side)     # [B, B]
    better, worse = compared.nonzero(as_tuple=True)
    group = batch.pair[better]
    return better, worse, 1.0 / torch.bincount(group, minlength=batch.pairs)[group]


# ---------------------------------------------------------------------------------------- the data

def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> Trees:
    """The file as trees, whose responses are ranked within groups."""
    trees = load_trees(path, tokenizer, config.max_length, cache=config.cache, columns=config.columns)
    if not trees.counts["preferences"]:
        fail(f"{path}: holds no preference, expected records with 'prompt', 'chosen' and 'rejected', "
             "or 'answers' and 'ranks'")
    return fit(trees, config.max_length, path, name)


def load_demos(tokenizer: Tokenizer, config: Config) -> Trees:
    """The demonstrations whose mean score becomes 0."""
    demos = load_trees(config.demos, tokenizer, config.max_length, cache=config.cache, columns=config.columns)
    if not demos:
        fail(f"demos={config.demos}: holds no reply within max_length={config.max_length}: raise max_length")
    return demos


# ---------------------------------------------------------------------------------------- training

def train_step(model: Transformer, batch: Batch, config: Config, groups: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss and metrics, means over the step's `groups` of compared replies."""
    scores = response_scores(model, batch)                    # [B]
    better, worse, weights = comparisons(batch)               # [C]
    rating = batch.margin[better].round().long().clamp(0, 4)  # 0: unrated
    margins = torch.tensor((0, *MARGINS[config.margin]), device=scores.device)[rating]
    weights = batch.weight * weights / groups
    return pairwise_loss(scores[better], scores[worse], margins, config.centering, weights)


@torch.no_grad()
def evaluate(model: Transformer, trees: Trees, config: Config, device: torch.device) -> dict[str, float]:
    """Loss and accuracy over held-out pairs."""
    groups, sums = sum(tree.pairs for tree in trees), runtime.Sums()
    for batch in micro_batches(trees, config.micro_tokens):
        sums.add(train_step(model, batch.to(device), config, groups)[1])
    return distributed.all_reduce_metrics({f"eval_{name}": sums[name] for name in ("loss", "accuracy")})


def language_model_baseline(model: Transformer, trees: Trees, config: Config, device: torch.device) -> dict | None:
    """The report of the starting model's log-probabilities per token, before its LM head goes."""
    if not trees or model.config.scored:
        return None
    # A sharded model cannot change its head: it is a copy that is sharded here.
    alone = distributed.world_size() == 1 or config.lora_rank
    start = model if alone else lora.shard(copy.deepcopy(model), config, device)
    return report(trees, all_scores(start, trees, config.micro_tokens, device, mean_logprobs))


def center(model: Transformer, demos: Sequence[Tree], config: Config, device: torch.device) -> None:
    """Fix the constant that differences leave free: demonstrations (of pairs the chosen replies) score 0 on average.

    One reply has no standard deviation: it stays 1, and scores as they are.
    """
    chosen = torch.tensor([r.side == CHOSEN for tree in demos for r in tree.responses])
    scores = torch.cat(all_scores(model, demos, config.micro_tokens, device))[chosen] + model.config.score_mean
    std = max(scores.std().item(), 1e-6) if len(scores) > 1 else 1.0
    model.config = replace(model.config, score_mean=scores.mean().item(), score_std=std)
    print(f"{'demonstrations' if config.demos else 'chosen replies'} score 0 on average from now on, "
          f"with standard deviation {model.config.score_std:.3f}")


def write_report(
    model: Transformer, trees: list[Tree], baseline: dict | None, file: Path, config: Config, device: torch.device,
) -> None:
    """How well the model agrees with held-out preferences, beside the starting model's log-probabilities."""
    categories = [record.get("category", "") for record in read(config.eval_data)[0]]
    found = report(trees, all_scores(model, trees, config.micro_tokens, device), categories)
    runtime.write_text(file, json.dumps({"reward_model": found, "baseline": baseline}, indent=1) + "\n")
    print_report(config.eval_data, found, baseline)


def main(config: Config) -> None:
    if config.dry_run:
        return dry_run(config, load_data, scored=True)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels, config.dtype)
    tokenizer = load_tokenizer(config.model)
    model = lora.load_base(config.model, config, device)
    check_positions(model.config, "max_length", config.max_length)
    print(adopt_template(model, tokenizer, config.template))
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    demos = load_demos(tokenizer, config)[:1000] if config.demos else trees

    run = runtime.Run(config, {"data": config.data, "model": config.model, "code": __file__})
    baseline = language_model_baseline(model, eval_trees, config, device)
    lora.shard(lora.adapt(model if model.config.scored else add_score_head(model, config.seed), config), config, device)
    optimizer = runtime.adamw(model, config.lr, config.weight_decay, config.beta2, config.lora_plus, config.adam_eps)
    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    run.resume(model, optimizer, steps, shown=("loss", "margin", "accuracy", "pairs_per_s"))

    for step in run.steps_left():
        began = time.perf_counter()
        lr = runtime.set_learning_rate(optimizer, step, steps, config)
        drawn = step_trees(trees, config.batch, step, config.seed)
        pairs = sum(tree.pairs for tree in drawn)
        metrics = runtime.Sums()
        for batch in micro_batches(drawn, config.micro_tokens):
            loss, parts = train_step(model, batch.to(device), config, pairs)
            loss.backward()
            metrics.add(parts)
        metrics = distributed.all_reduce_metrics(metrics)
        metrics["grad_norm"] = distributed.clip_grad_norm(model, config.max_grad_norm)
        runtime.check_finite(metrics["loss"], metrics["grad_norm"], step, [tree.record for tree in drawn])
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"lr": lr, "pairs": pairs, "tokens": sum(tree.tokens for tree in drawn),
                    "pairs_per_s": pairs / (time.perf_counter() - began)}
        if eval_trees and run.due(config.eval_every, step + 1):
            metrics |= evaluate(model, eval_trees, config, device)
        run.end_step(metrics, model, optimizer)

    if run.finished:
        center(model, demos, config, device)
        lora.save_result(model, run.folder, tokenizer, config, probe=trees[0].trunk[:64].tolist())
        if eval_trees:
            write_report(model, eval_trees, baseline, run.folder / "report.json", config, device)
    run.close()


def score_file(argv: list[str]) -> None:
    """Score the last reply of every dialogue of a JSONL file; the records come back with a "score" each."""
    parser = argparse.ArgumentParser(prog="python reward.py", description=score_file.__doc__)
    parser.add_argument("--score", required=True, metavar="FILE", help="JSONL of {messages} records")
    parser.add_argument("--model", required=True, help="reward model to ask")
    parser.add_argument("--out", help="file to write (default: print)")
    words = runtime.arguments(parser, argv)
    if words.out:
        runtime.open_folder(str(Path(words.out).parent))
    tokenizer, model = load_tokenizer(words.model), load_model(words.model, dtype=torch.float32)
    if not model.config.scored:
        fail(f"{words.model}: has no score head, expected the result of reward.py")
    records = read_all(words.score, "messages")
    scores = all_scores(model, load_trees(words.score, tokenizer), 4096, torch.device("cpu"))
    text = "".join(json.dumps(record | {"score": round(score[-1].item(), 4)}) + "\n"
                   for record, score in zip(records, scores, strict=True))
    if words.out:
        runtime.write_text(Path(words.out), text)
    else:
        print(text, end="")


if __name__ == "__main__":
    if "--score" in sys.argv:
        score_file(sys.argv[1:])
    else:
        main(runtime.load_config(Config, __doc__))
