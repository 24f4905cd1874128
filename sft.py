"""Supervised fine-tuning: teach a base model to reply by imitating replies.

    loss = - (1 / n) sum over the n response tokens of the step of log pi(token | what precedes it)

The user's words are read but not learnt; the end-of-sequence token of each response is, so the model
learns to stop. n counts the response tokens of the whole optimizer step, however many micro-batches it
takes: a mean of micro-batch means would weigh tokens by the company they travel in.

    python sft.py --config configs/tiny/sft.toml            loss 1.4 at the first step, 0.3 at the end

With train_on = "all" every token counts: that is pretraining (`configs/tiny/pretrain.toml`). Given preference
data it imitates the chosen responses, the control that DPO has to beat (`configs/tiny/sft_chosen.toml`).

With `context` it learns to reply as the starting model does after having read that context, without reading it:

    loss = (1 / n) sum over the n response tokens of KL(pi_0(. | context, what precedes) || pi(. | what precedes))

Ouyang et al. 2022 (arXiv:2203.02155), step 1; Tunstall et al. 2023 (arXiv:2310.16944), dSFT; Askell et al. 2021
(arXiv:2112.00861), section 2.2, for context distillation.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import runtime
from checkpoints import expect_replies
from data.formats import read
from data.pack import (
    CHOSEN,
    Batch,
    Response,
    Tree,
    collate,
    load_trees,
    share,
    step_trees,
    steps_per_epoch,
    tree_from_messages,
    truncate,
)
from data.tokenizer import TEMPLATES, Tokenizer, adopt_template, check_vocabulary, load_tokenizer, sample_texts
from kernels.logprobs import linear_logprobs
from model import Transformer
from runtime import check_range, distributed, fail, memory


@dataclass(frozen=True)
class Config(lora.Options):
    model: str = "data/tiny/base"    # Hugging Face directory to start from
    data: str = "runs/tiny/0/data/sft.jsonl"  # JSONL: messages, preferences or text (data/formats.py)
    eval_data: str = ""              # JSONL of the same kind, for the evaluation loss; "" for none
    out: str = "runs/sft"            # folder of the run
    template: str = ""               # chat template; "": the checkpoint's own, or zephyr
    train_on: Literal["responses", "all"] = "responses"  # tokens in the loss
    context: str = ""                # JSONL of messages that precede every dialogue of the teacher, the starting model; "": no teacher

    epochs: int = 3                  # passes over the data, 1-6
    max_steps: int = 0               # stop after this many updates; 0: epochs decide
    batch: int = 64                  # dialogues per update
    max_length: int = 512            # tokens of a dialogue, 128-4096; longer ones are cut and counted
    max_tokens: int = 4096           # tokens of a micro-batch, what fits in memory; a longer dialogue travels alone
    lr: float = 1e-3                 # peak learning rate, 1e-3 for the tiny model, 1e-6 to 5e-5 for 7B
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1               # final rate as a share of the peak
    warmup: float = 0.05             # share of the steps with a rising rate
    weight_decay: float = 0.0        # on matrices, 0-0.1
    beta2: float = 0.98              # AdamW, 0.95-0.999
    clip: float = 1.0                # largest norm of the gradient

    seed: int = 0                    # order of the data, sampling
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 where the hardware multiplies it
    device: str = "auto"             # cpu, cuda, auto
    threads: int = 0                 # CPU threads; 0: PyTorch's choice
    eval_every: int = 0              # steps between evaluations; 0: at the end only
    save_every: int = 0              # steps between checkpoints; 0: at the end only
    samples: int = 3                 # replies to show at the end
    wandb: Literal["off", "offline", "online"] = "off"
    overwrite: bool = False          # start anew in a folder that holds another run

    def __post_init__(self):
        super().__post_init__()
        if self.template and self.template not in TEMPLATES:
            fail(f"template is '{self.template}', expected one of {', '.join(TEMPLATES)}")
        for key, low, high in (
            ("epochs", 1, inf), ("max_steps", 0, inf), ("batch", 1, inf), ("max_length", 2, inf), ("max_tokens", 1, inf), ("lr", 1e-12, 1),
            ("floor", 0, 1), ("warmup", 0, 0.99), ("weight_decay", 0, 1), ("beta2", 0, 0.99999), ("clip", 1e-6, inf), ("seed", 0, 10**9),
            ("threads", 0, 1024), ("eval_every", 0, inf), ("save_every", 0, inf), ("samples", 0, inf),
        ):
            check_range(key, getattr(self, key), low, high)


def sft_loss(logprobs: Tensor, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of response tokens (logprobs [M], nats) over `denominator`.

    The denominator is the number of response tokens of the whole optimizer step, so that losses (and
    gradients) of its micro-batches add up to the step's mean. Returns the loss [] and detached metrics [].
    """
    loss = -logprobs.sum() / denominator
    return loss, {"loss": loss.detach()}


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(teacher || student) of the next token, logits [M, V] where a response token is next, over `denominator`; nats.

    0 where both agree. The teacher passes no gradient.
    """
    teacher = teacher_logits.float().log_softmax(-1)                                   # [M, V]
    loss = F.kl_div(student_logits.float().log_softmax(-1), teacher, log_target=True, reduction="sum") / denominator
    return loss, {"loss": loss.detach()}


def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> list[Tree]:
    """The file as trees, one trunk each:

        BOS <|user|> \\n  Hi  EOS \\n <|assistant|> \\n  Hello !  EOS \\n <|user|> \\n  Bye ...
        trunk        no loss                           |  response  |     no loss
    """
    trees = load_trees(path, tokenizer)
    if any(tree.ranked for tree in trees):
        fail(f"{path}: holds rankings, expected messages, preferences or text: write the best answers as messages")
    for tree in trees:
        tree.leaves, tree.responses = [], [r for r in tree.responses if r.side == CHOSEN]
        if config.train_on == "all":
            tree.responses = [Response(0, 1, len(tree.trunk))]
    trees, counts = truncate(trees, config.max_length)
    if not trees:
        fail(f"{path}: holds no token to learn within max_length={config.max_length}: raise max_length")
    tokens = sum(tree.tokens for tree in trees)
    learnt = sum(r.end - r.start for tree in trees for r in tree.responses)
    print(f"{name}: {len(trees)} dialogues, {tokens:,} tokens, {learnt:,} in the loss; cut to {config.max_length} tokens: "
          f"{counts['responses_cut']} responses, dropped: {counts['responses_dropped']} responses, {counts['trees_dropped']} dialogues")
    return trees


def after_context(path: str, trees: list[Tree], context: list[dict], tokenizer: Tokenizer) -> dict[int, Tree]:
    """For each tree, by id, the same dialogue with the context before it, and the same response tokens."""
    records, report = read(path)
    records = list(records)
    if report.format != "messages":
        fail(f"{path}: holds {report.format}, expected messages: context distillation reads dialogues")
    given, found = sum(m["role"] == "assistant" for m in context), {}
    for tree in trees:
        longer = tree_from_messages([*context, *records[tree.record]["messages"]], tokenizer)
        pairs = zip(longer.responses[given:], tree.responses, strict=False)  # truncated dialogues have fewer
        responses = [replace(long, end=long.start + r.end - r.start, pair=r.pair) for long, r in pairs]
        found[id(tree)] = Tree(longer.trunk[: responses[-1].end], [], responses, tree.record)
    return found


def make_teacher(model: Transformer, longer: dict[int, Tree]) -> Callable[[Batch], Tensor]:
    """A function of a batch: the frozen model's logits [M, V] for its response tokens after the context."""
    @torch.no_grad()
    def teacher(batch: Batch) -> Tensor:
        with_context = collate([longer[id(tree)] for tree in batch.trees]).to(batch.tokens.device)
        hidden = model.hidden(with_context.tokens, with_context.positions, with_context.layout)
        return model.logits(hidden[with_context.predictors])
    return teacher


def train_step(model: Transformer, batch: Batch, denominator: float, teacher: Callable | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss: the log-probability of every response token given its path, or the teacher's KL."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)                                # [N, D]
    if teacher:
        return distillation_loss(model.logits(hidden[batch.predictors]), teacher(batch), denominator)
    logprobs, _ = linear_logprobs(hidden[batch.predictors], model.head_weight, batch.targets)         # [M]
    return sft_loss(logprobs, denominator)


@torch.no_grad()
def evaluate(model: Transformer, trees: list[Tree], config: Config, device: torch.device, teacher: Callable | None) -> dict[str, float]:
    """Mean loss per response token over the whole evaluation set."""
    denominator = sum(tree.learnt for tree in trees)
    batches = share(trees, config.max_tokens)
    loss = sum(train_step(model, batch.to(device), denominator, teacher)[0].item() * batch.counts for batch in batches)
    return distributed.all_reduce_metrics({"eval_loss": loss})


def main(config: Config) -> None:
    if config.dry_run:
        memory.dry_run(config, load_data)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels)
    tokenizer = load_tokenizer(config.model)
    model = lora.load_base(config.model, config, device, runtime.compute_dtype(config.dtype, device))
    check_vocabulary(expect_replies(model, config.model), tokenizer)
    if config.train_on == "responses" or config.template:
        print(adopt_template(model, tokenizer, config.template or tokenizer.template or "zephyr"))
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    teacher = None
    if config.context:
        records, report = read(config.context, "messages")
        context = [m for record in records for m in record["messages"]]
        report.refuse()
        longer = after_context(config.data, trees, context, tokenizer)
        longer |= after_context(config.eval_data, eval_trees, context, tokenizer) if eval_trees else {}
        start = lora.Role(model, None) if config.lora_rank else copy.deepcopy(model).requires_grad_(False)
        teacher = make_teacher(lora.shard(start, config, device), longer)
        print(f"context: {len(context)} messages before every dialogue of the teacher, the starting model")
    lora.adapt(model, config, config.seed)
    lora.shard(model, config, device)
    depends_on = {"data": config.data, "model": config.model, "code": __file__}
    run, lock = runtime.open_run(config.out, config, depends_on, config.overwrite)

    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    optimizer = runtime.adamw(model, config.lr, config.weight_decay, config.beta2, config.lora_plus)
    done = runtime.load_state(run, model, optimizer)
    log = runtime.Log(run, done, steps, ("loss", "tokens_per_s"), config.wandb, config, config.profile)
    stop = runtime.StopRequest()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} parameters train, {steps} steps of {config.batch} dialogues, {done} done")

    for step in range(done, steps):
        began = time.perf_counter()
        lr = runtime.learning_rate(step, steps, config.lr, round(config.warmup * steps), config.schedule, config.floor)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        drawn = step_trees(trees, config.batch, step, config.seed)
        response_tokens = sum(tree.learnt for tree in drawn)
        metrics = {"loss": 0.0}
        for batch in share(drawn, config.max_tokens):
            loss, parts = train_step(model, batch.to(device), response_tokens, teacher)
            (loss * batch.counts).backward()
            metrics["loss"] += parts["loss"].item() * batch.counts
        metrics = distributed.all_reduce_metrics(metrics) | {"response_tokens": response_tokens, "lr": lr}
        metrics["grad_norm"] = distributed.clip_grad_norm(model, config.clip)
        runtime.check_finite(metrics["loss"], metrics["grad_norm"], step, [tree.record for tree in drawn])
        optimizer.step()
        optimizer.zero_grad()
        metrics["tokens"] = sum(tree.tokens for tree in drawn)
        metrics["tokens_per_s"] = metrics["tokens"] / (time.perf_counter() - began)
        done = step + 1
        if eval_trees and (done == steps or (config.eval_every and done % config.eval_every == 0)):
            metrics |= evaluate(model, eval_trees, config, device, teacher)
        log.step(done, metrics)
        stopping = distributed.any_rank(stop)
        if stopping or done == steps or (config.save_every and done % config.save_every == 0):
            runtime.save_state(run, done, model, optimizer)
        if stopping:
            break

    if done == steps:
        model = lora.save_result(model, run, tokenizer, config, trees[0].trunk[:64].tolist())
        ends = [tree.responses[0].start if config.train_on == "responses" else 8 for tree in eval_trees or trees]
        prompts = [tree.trunk[:end].tolist() for tree, end in zip(eval_trees or trees, ends, strict=True)]
        log.note("\n".join(sample_texts(model, tokenizer, prompts[: config.samples], config.seed)))
    log.close()
    lock.close()
    print(f"wrote {run}/model" if done == steps else f"stopped after step {done}; the same command goes on from there")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
