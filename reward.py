"""Reward model: one number per reply, learnt from which of two replies people preferred.

    p(y_w is preferred to y_l) = sigmoid(r(x, y_w) - r(x, y_l))                 Bradley & Terry 1952
    loss = mean over pairs of -log sigmoid(r(x, y_w) - r(x, y_l) - m)           m >= 0 grows with the rated margin

The model is the SFT model with its LM head replaced by a score head, a row of D weights. A reply's score is
read at its last token, the end of sequence, where the whole reply has been seen; a dialogue rated at several
turns is one tree (`data/pack.py`) with a score for each reply. Only differences are learnt, so a constant is
fixed afterwards: demonstrations score 0 on average.

    python reward.py --config configs/tiny/reward.toml      accuracy overall, by margin and by task
    python reward.py --score replies.jsonl --model runs/reward/model      a score for every dialogue

Stiennon et al. 2020 (arXiv:2009.01325); Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1; Touvron et al. 2023
(arXiv:2307.09288), Eq. 2, for the margin.
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
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
from data.formats import read
from data.pack import CHOSEN, Batch, Tree, load_trees, share, step_trees, steps_per_epoch, truncate
from data.scores import all_scores, mean_logprobs, response_scores
from data.tokenizer import TEMPLATES, Tokenizer, adopt_template, load_tokenizer
from model import Transformer, add_score_head
from runtime import check_range, distributed, fail, memory


@dataclass(frozen=True)
class Config(lora.Options):
    model: str = "runs/tiny/0/sft/model"  # Hugging Face directory to start from, usually the result of sft.py
    data: str = "runs/tiny/0/pairs.jsonl"  # JSONL of preferences or rankings (data/formats.py)
    eval_data: str = ""              # JSONL of held-out pairs; "" for none
    demos: str = ""                  # JSONL of demonstrations that shall score 0 on average; "": the chosen replies
    out: str = "runs/reward"         # folder of the run
    template: str = ""               # chat template; "": the checkpoint's own, or zephyr

    margin: Literal["none", "raw", "llama2_small", "llama2_large"] = "none"  # what a rating 1-4 takes off the difference
    centering: float = 0.0           # weight of (r_w + r_l)^2, 0 or about 0.01
    epochs: int = 1                  # passes over the data; a large model overfits in a second one
    max_steps: int = 0               # stop after this many updates; 0: epochs decide
    batch: int = 64                  # dialogues per update
    max_length: int = 512            # tokens of a path, prompt and response; longer ones are cut and counted
    max_tokens: int = 4096           # tokens of a micro-batch, what fits in memory; a larger tree travels alone
    lr: float = 3e-4                 # peak learning rate, 3e-4 for the tiny model, 3e-6 to 1e-5 for 7B
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1               # final rate as a share of the peak
    warmup: float = 0.1              # share of the steps with a rising rate
    weight_decay: float = 0.0        # on matrices, 0-0.1
    beta2: float = 0.98              # AdamW, 0.95-0.999
    clip: float = 1.0                # largest norm of the gradient

    seed: int = 0                    # order of the data, the head's first weights
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 where the hardware multiplies it
    device: str = "auto"             # cpu, cuda, auto
    threads: int = 0                 # CPU threads; 0: PyTorch's choice
    eval_every: int = 0              # steps between evaluations; 0: at the end only
    save_every: int = 0              # steps between checkpoints; 0: at the end only
    wandb: Literal["off", "offline", "online"] = "off"
    overwrite: bool = False          # start anew in a folder that holds another run

    def __post_init__(self):
        super().__post_init__()
        if self.template and self.template not in TEMPLATES:
            fail(f"template is '{self.template}', expected one of {', '.join(TEMPLATES)}")
        for key, low, high in (
            ("centering", 0, inf), ("epochs", 1, inf), ("max_steps", 0, inf), ("batch", 1, inf), ("max_length", 2, inf),
            ("max_tokens", 1, inf), ("lr", 1e-12, 1), ("floor", 0, 1), ("warmup", 0, 0.99), ("weight_decay", 0, 1), ("beta2", 0, 0.99999),
            ("clip", 1e-6, inf), ("seed", 0, 10**9), ("threads", 0, 1024), ("eval_every", 0, inf), ("save_every", 0, inf),
        ):
            check_range(key, getattr(self, key), low, high)


# ---------------------------------------------------------------------------------------- the loss

# What a rating from 1 (slightly better) to 4 (very much) asks of the difference. Llama 2, table 27.
MARGINS = {"none": (0, 0, 0, 0), "raw": (1, 2, 3, 4), "llama2_small": (0, 1 / 3, 2 / 3, 1), "llama2_large": (0, 1, 2, 3)}


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
    """All comparisons the batch's groups imply: the better and the worse reply of each [C], and weights [C] that sum to the groups.

    A pair is a group of two. K ranked replies make up to K (K - 1) / 2 comparisons, which share one weight: a
    prompt does not count more for having been answered more often, and each reply is run once (Ouyang et al.,
    section 3.5).
    """
    better, worse = (batch.pair[:, None] == batch.pair[None]).logical_and(batch.side[:, None] < batch.side[None]).nonzero(as_tuple=True)
    group = batch.pair[better]
    return better, worse, 1.0 / torch.bincount(group, minlength=batch.pairs)[group]


# ---------------------------------------------------------------------------------------- the data

def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> list[Tree]:
    """The file as trees, whose responses are ranked within groups."""
    trees = load_trees(path, tokenizer)
    if not any(r.side != CHOSEN for tree in trees for r in tree.responses):
        fail(f"{path}: holds no preference, expected records with 'prompt', 'chosen' and 'rejected', or 'answers' and 'ranks'")
    trees, counts = truncate(trees, config.max_length)
    if not trees:
        fail(f"{path}: every prompt is longer than max_length={config.max_length}: raise max_length")
    print(f"{name}: {len(trees)} dialogues, {sum(tree.pairs for tree in trees)} pairs, {sum(tree.tokens for tree in trees):,} tokens; "
          f"cut to {config.max_length} tokens: {counts['responses_cut']} responses, dropped: {counts['responses_dropped']} responses, "
          f"{counts['trees_dropped']} dialogues")
    return trees


# -------------------------------------------------------------------------------------- evaluation

def report(trees: list[Tree], scores: list[Tensor], categories: list[str] | None = None) -> dict:
    """How well scores agree with held-out preferences.

    accuracy        share of pairs whose chosen reply scores higher (ties miss), also by margin and by category
    calibration     pairs by how sure the model is, sigmoid |difference|, in five bins from 0.5 to 1: [said, found, pairs]
    length_correlation   of score and length in tokens (Pearson): a model that pays for words
    """
    pairs = []  # difference, margin, category
    for tree, values in zip(trees, scores, strict=True):
        for i, first in enumerate(tree.responses):
            for j, second in enumerate(tree.responses):
                if first.pair == second.pair and first.side < second.side:
                    category = categories[tree.record] if categories else ""
                    pairs.append(((values[i] - values[j]).item(), first.margin, category))

    def accuracy(chosen: list) -> list[float]:
        return [sum(p[0] > 0 for p in chosen) / len(chosen), len(chosen)]

    sure = [(1 / (1 + math.exp(-min(abs(p[0]), 50))), p[0] > 0) for p in pairs]
    bins = [[s for s in sure if low <= s[0] < low + 0.1 or (low == 0.9 and s[0] >= 0.9)] for low in (0.5, 0.6, 0.7, 0.8, 0.9)]
    flat = torch.cat(scores).double()
    lengths = torch.tensor([r.end - r.start for tree in trees for r in tree.responses]).double()
    return {
        "accuracy": accuracy(pairs)[0], "pairs": len(pairs), "ties": sum(p[0] == 0 for p in pairs),
        "by_margin": {f"{m:g}": accuracy([p for p in pairs if p[1] == m]) for m in sorted({p[1] for p in pairs})},
        "by_category": {c: accuracy([p for p in pairs if p[2] == c]) for c in sorted({p[2] for p in pairs})} if categories else {},
        "calibration": [[sum(s[0] for s in b) / len(b), sum(s[1] for s in b) / len(b), len(b)] for b in bins if b],
        "length_correlation": torch.corrcoef(torch.stack([flat, lengths]))[0, 1].item() if len(flat) > 1 else 0.0,
    }


def print_report(name: str, found: dict, baseline: dict | None) -> None:
    print(f"\n{name}: accuracy {100 * found['accuracy']:.1f} % of {found['pairs']} pairs"
          + (f", log-probability per token of the starting model {100 * baseline['accuracy']:.1f} %" if baseline else ""))
    for title, key in (("margin", "by_margin"), ("task", "by_category")):
        if len(found[key]) > 1:
            print(f"by {title:<7}" + "  ".join(f"{label} {100 * share:.0f} % ({count})" for label, (share, count) in found[key].items()))
    print("said it is right with probability and was: "
          + "  ".join(f"{said:.2f} {was:.2f} ({count})" for said, was, count in found["calibration"]))
    print(f"correlation of score and length {found['length_correlation']:+.2f}")


# ---------------------------------------------------------------------------------------- training

def train_step(model: Transformer, batch: Batch, config: Config, groups: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss and metrics, means over the step's `groups` of compared replies."""
    scores = response_scores(model, batch)                    # [B]
    better, worse, weights = comparisons(batch)               # [C]
    steps = torch.tensor(MARGINS[config.margin], device=scores.device)
    rating = batch.margin[better].round().long().clamp(0, 4)
    margins = torch.where(rating > 0, steps[(rating - 1).clamp(min=0)], 0.0)
    return pairwise_loss(scores[better], scores[worse], margins, config.centering, weights / groups)


@torch.no_grad()
def evaluate(model: Transformer, trees: list[Tree], config: Config, device: torch.device) -> dict[str, float]:
    """Loss and accuracy over held-out pairs."""
    groups = sum(tree.pairs for tree in trees)
    parts = [(train_step(model, batch.to(device), config, groups)[1], batch.counts) for batch in share(trees, config.max_tokens)]
    means = {f"eval_{name}": sum(part[name].item() * counts for part, counts in parts) for name in ("loss", "accuracy")}
    return distributed.all_reduce_metrics(means)


def main(config: Config) -> None:
    if config.dry_run:
        memory.dry_run(config, load_data)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels)
    tokenizer = load_tokenizer(config.model)
    model = lora.load_base(config.model, config, device, runtime.compute_dtype(config.dtype, device))
    print(adopt_template(model, tokenizer, config.template or tokenizer.template or "zephyr"))
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    demos = truncate(load_trees(config.demos, tokenizer)[:1000], config.max_length)[0] if config.demos else trees
    depends_on = {"data": config.data, "model": config.model, "code": __file__}
    run, lock = runtime.open_run(config.out, config, depends_on, config.overwrite)

    baseline = None
    if eval_trees and not model.config.scored:
        # A sharded model cannot change its head: it is a copy that is sharded here.
        start = model if distributed.world_size() == 1 or config.lora_rank else lora.shard(copy.deepcopy(model), config, device)
        baseline = report(eval_trees, all_scores(start, eval_trees, config.max_tokens, device, mean_logprobs))
        del start
    if not model.config.scored:
        add_score_head(model, config.seed)
    lora.adapt(model, config, config.seed)
    lora.shard(model, config, device)
    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    optimizer = runtime.adamw(model, config.lr, config.weight_decay, config.beta2, config.lora_plus)
    done = runtime.load_state(run, model, optimizer)
    log = runtime.Log(run, done, steps, ("loss", "margin", "accuracy", "pairs_per_s"), config.wandb, config, config.profile)
    stop = runtime.StopRequest()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} parameters train, {steps} steps of {config.batch} dialogues, {done} done")

    for step in range(done, steps):
        began = time.perf_counter()
        lr = runtime.learning_rate(step, steps, config.lr, round(config.warmup * steps), config.schedule, config.floor)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        drawn = step_trees(trees, config.batch, step, config.seed)
        groups = sum(tree.pairs for tree in drawn)
        metrics: dict[str, float] = {}
        for batch in share(drawn, config.max_tokens):
            loss, parts = train_step(model, batch.to(device), config, groups)
            (loss * batch.counts).backward()
            for name, value in parts.items():
                metrics[name] = metrics.get(name, 0.0) + value.item() * batch.counts
        metrics = distributed.all_reduce_metrics(metrics) | {"pairs": groups, "lr": lr}
        metrics["grad_norm"] = distributed.clip_grad_norm(model, config.clip)
        runtime.check_finite(metrics["loss"], metrics["grad_norm"], step, [tree.record for tree in drawn])
        optimizer.step()
        optimizer.zero_grad()
        metrics["tokens"] = sum(tree.tokens for tree in drawn)
        metrics["pairs_per_s"] = groups / (time.perf_counter() - began)
        done = step + 1
        if eval_trees and (done == steps or (config.eval_every and done % config.eval_every == 0)):
            metrics |= evaluate(model, eval_trees, config, device)
        log.step(done, metrics)
        stopping = distributed.any_rank(stop)
        if stopping or done == steps or (config.save_every and done % config.save_every == 0):
            runtime.save_state(run, done, model, optimizer)
        if stopping:
            break

    if done == steps:
        # Every reply of a demonstration is one; of a pair, the chosen.
        chosen = torch.tensor([r.side == CHOSEN for tree in demos for r in tree.responses])
        scores = torch.cat(all_scores(model, demos, config.max_tokens, device))[chosen] + model.config.score_mean
        model.config = replace(model.config, score_mean=scores.mean().item(), score_std=max(scores.std().item(), 1e-6))
        print(f"{'demonstrations' if config.demos else 'chosen replies'} score 0 on average from now on, "
              f"with standard deviation {model.config.score_std:.3f}")
        lora.save_result(model, run, tokenizer, config, trees[0].trunk[:64].tolist())
        if eval_trees:
            records, _ = read(config.eval_data)
            categories = [record.get("category", "") for record in records]
            found = report(eval_trees, all_scores(model, eval_trees, config.max_tokens, device), categories)
            runtime.write_text(run / "report.json", json.dumps({"reward_model": found, "baseline": baseline}, indent=1) + "\n")
            print_report(config.eval_data, found, baseline)
    log.close()
    lock.close()
    print(f"wrote {run}/model" if done == steps else f"stopped after step {done}; the same command goes on from there")


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
    records, found = read(words.score, "messages")
    records = list(records)
    found.refuse()
    scores = [part[-1].item() for part in all_scores(model, load_trees(words.score, tokenizer), 4096, torch.device("cpu"))]
    text = "".join(json.dumps(record | {"score": round(score, 4)}) + "\n" for record, score in zip(records, scores, strict=True))
    if words.out:
        runtime.write_text(Path(words.out), text)
    else:
        print(text, end="")


if __name__ == "__main__":
    if "--score" in sys.argv:
        score_file(sys.argv[1:])
    else:
        main(runtime.load_config(Config, __doc__))
