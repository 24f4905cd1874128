"""Supervised fine-tuning: teach a base model to reply by imitating replies.

    loss = - (1 / n) sum over the n response tokens of the step of log pi(token | what precedes it)

The user's words are read but not learnt; the end-of-sequence token of each response is, so the model
learns to stop. n counts the response tokens of the whole optimizer step, however many micro-batches it
takes: a mean of micro-batch means would give tokens of short micro-batches more weight.

    python sft.py --config configs/tiny/sft.toml            loss 1.4 at the first step, 0.3 at the end

With train_on = "all" every token counts: that is pretraining (`configs/tiny/pretrain.toml`). Given preference
data it imitates the chosen responses, the control that DPO has to beat (`configs/tiny/sft_chosen.toml`).

Ouyang et al. 2022 (arXiv:2203.02155), step 1; Tunstall et al. 2023 (arXiv:2310.16944), dSFT.
"""
import time
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor

import lora
import runtime
from data.dry_run import dry_run
from data.pack import Batch, check_positions, micro_batches, sample_replies, step_trees, steps_per_epoch
from data.store import Trees, fit, load_trees
from data.tokenizer import Tokenizer, adopt_template, check_template, check_vocabulary, load_tokenizer
from data.trees import CHOSEN, Response, Tree
from kernels.logprobs import linear_logprobs
from model import Transformer
from runtime import distributed, fail


@dataclass(frozen=True)
class Config(runtime.DataSettings):
    model: str = "data/tiny/base"    # Hugging Face directory to start from
    data: str = "runs/tiny/0/data/sft.jsonl"  # JSONL: messages, preferences or text (data/formats.py)
    out: str = "runs/sft"            # folder of the run
    train_on: Literal["responses", "all"] = "responses"  # tokens in the loss

    epochs: int = 3                  # passes over the data, 1-6
    lr: float = 1e-3                 # peak learning rate, 1e-3 for the tiny model, 1e-6 to 5e-5 for 7B
    warmup_ratio: float = 0.05       # share of the steps with a rising learning rate
    samples: int = 3                 # replies to show at the end

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template)
        runtime.check_range("samples", self.samples, 0, inf)


def sft_loss(logprobs: Tensor, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of response tokens (logprobs [M], nats) over `denominator`.

    The denominator is the number of response tokens of the whole optimizer step, so that losses (and
    gradients) of its micro-batches add up to the step's mean. Returns the loss [] and detached metrics [].
    """
    loss = -logprobs.sum() / denominator
    return loss, {"loss": loss.detach()}


def replies(tree: Tree) -> Tree:
    """What is learnt of a tree: its replies, of pairs the chosen ones."""
    return Tree(tree.trunk, [], [r for r in tree.responses if r.side == CHOSEN], tree.record)


def every_token(tree: Tree) -> Tree:
    """What train_on = "all" learns of it: all but the first, which nothing precedes."""
    return Tree(tree.trunk, [], [Response(0, 1, len(tree.trunk))], tree.record)


def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> Trees:
    """The file as trees, one trunk each:

        BOS <|user|> \\n  Hi  EOS \\n <|assistant|> \\n  Hello !  EOS \\n <|user|> \\n  Bye ...
        trunk        no loss                           |  response  |     no loss
    """
    keep = every_token if config.train_on == "all" else replies
    trees = load_trees(path, tokenizer, config.max_length, keep, cache=config.cache, columns=config.columns)
    if trees.counts["ranked"]:
        fail(f"{path}: holds rankings, expected messages, preferences or text: write the best answers as messages")
    return fit(trees, config.max_length, path, name)


def train_step(model: Transformer, batch: Batch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss: the log-probability of every response token given its path."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)                            # [N, D]
    logprobs, _ = linear_logprobs(hidden[batch.predictors], model.head_weight, batch.targets)     # [M]
    return sft_loss(batch.weight * logprobs, denominator)


@torch.no_grad()
def evaluate(model: Transformer, trees: Trees, config: Config, device: torch.device) -> dict[str, float]:
    """Mean loss per response token over the whole evaluation set."""
    tokens = sum(tree.learnt for tree in trees)
    batches = micro_batches(trees, config.micro_tokens)
    loss = sum(train_step(model, batch.to(device), tokens)[0].item() for batch in batches)
    return distributed.all_reduce_metrics({"eval_loss": loss})


def main(config: Config) -> None:
    if config.dry_run:
        return dry_run(config, load_data)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels, config.dtype)
    tokenizer = load_tokenizer(config.model)
    model = lora.load_base(config.model, config, device, scored=False)
    check_positions(model.config, "max_length", config.max_length)
    if config.train_on == "responses" or config.template:
        print(adopt_template(model, tokenizer, config.template))
    else:
        check_vocabulary(model, tokenizer)
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    lora.shard(lora.adapt(model, config), config, device)

    run = runtime.Run(config, {"data": config.data, "model": config.model, "code": __file__})
    optimizer = runtime.adamw(model, config.lr, config.weight_decay, config.beta2, config.lora_plus, config.adam_eps)
    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    run.resume(model, optimizer, steps, shown=("loss", "tokens_per_s"))

    for step in run.steps_left():
        began = time.perf_counter()
        lr = runtime.set_learning_rate(optimizer, step, steps, config)
        drawn = step_trees(trees, config.batch, step, config.seed)
        response_tokens = sum(tree.learnt for tree in drawn)
        metrics = runtime.Sums()
        for batch in micro_batches(drawn, config.micro_tokens):
            loss, parts = train_step(model, batch.to(device), response_tokens)
            loss.backward()
            metrics.add(parts)
        metrics = distributed.all_reduce_metrics(metrics)
        metrics["grad_norm"] = distributed.clip_grad_norm(model, config.max_grad_norm)
        runtime.check_finite(metrics["loss"], metrics["grad_norm"], step, [tree.record for tree in drawn])
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(tree.tokens for tree in drawn)
        metrics |= {"lr": lr, "response_tokens": response_tokens, "tokens": tokens,
                    "tokens_per_s": tokens / (time.perf_counter() - began)}
        if eval_trees and run.due(config.eval_every, step + 1):
            metrics |= evaluate(model, eval_trees, config, device)
        run.end_step(metrics, model, optimizer)

    if run.finished:
        model = lora.save_result(model, run.folder, tokenizer, config, probe=trees[0].trunk[:64].tolist())
        run.note(sample_replies(model, tokenizer, eval_trees or trees, config.samples, config.seed))
    run.close()


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
