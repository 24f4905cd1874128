"""Context distillation: learn to reply without a context as the starting model replies with it.

    loss = (1 / n) sum over the n response tokens of KL(pi_0(. | context, what precedes) || pi(. | what precedes))

The teacher pi_0 is the starting model itself, frozen, with the context before every dialogue; the student sees the
dialogue alone. What the context asks for (a style, care, four worked examples) becomes a habit.

    python distill.py --config configs/tiny/distill.toml            loss 0.03 at the first step, falling

Askell et al. 2021 (arXiv:2112.00861), section 2.2. The loop is sft.py's; only the loss and the teacher differ.
"""
import copy
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import runtime
import sft
from data.dry_run import dry_run
from data.formats import read_all
from data.pack import Batch, check_positions, collate, micro_batches, sample_replies, step_trees, steps_per_epoch
from data.store import Trees, load_trees
from data.tokenizer import Tokenizer, adopt_template, load_tokenizer
from data.trees import Tree
from model import Transformer
from runtime import distributed, fail


@dataclass(frozen=True)
class Config(sft.Config):
    context: str = "configs/tiny/careful.jsonl"  # JSONL of messages that precede every dialogue of the teacher
    out: str = "runs/distill"        # folder of the run

    def __post_init__(self):
        super().__post_init__()
        if self.train_on != "responses":
            fail(f"train_on is '{self.train_on}', expected 'responses': only replies are distilled")


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(teacher || student) of the next token, logits [M, V] before a response token, over `denominator`; nats."""
    teacher = teacher_logits.float().log_softmax(-1)                                   # [M, V]
    student = student_logits.float().log_softmax(-1)                                   # [M, V]
    loss = F.kl_div(student, teacher, log_target=True, reduction="sum") / denominator
    return loss, {"loss": loss.detach()}


def with_context(tree: Tree, longer: Tree) -> Tree:
    """What the teacher reads: the dialogue after the context, whole, with the response tokens that the student has."""
    pairs = zip(longer.responses, tree.responses, strict=False)  # a truncated dialogue has fewer
    responses = [replace(long, end=long.start + r.end - r.start, pair=r.pair) for long, r in pairs]
    return Tree(longer.trunk[: responses[-1].end], [], responses, tree.record)


def load_data(
    path: str, context: list[dict], tokenizer: Tokenizer, config: Config, name: str,
) -> tuple[Trees, Trees]:
    """The student's trees, and the teacher's: the same dialogues, uncut, with the context before them."""
    trees = sft.load_data(path, tokenizer, config, name)
    return trees, load_trees(path, tokenizer, before=context, cache=config.cache, columns=config.columns)


@torch.no_grad()
def teacher_logits(teacher: Transformer, batch: Batch, longer: Trees) -> Tensor:
    """The teacher's logits [M, V] for the batch's response tokens, after the context; `longer` are its trees."""
    seen = collate([with_context(tree, longer.of_record(tree.record)) for tree in batch.trees]).to(batch.tokens.device)
    hidden = teacher.hidden(seen.tokens, seen.positions, seen.layout)
    return teacher.logits(hidden[seen.predictors])


def train_step(
    student: Transformer, teacher: Transformer, batch: Batch, longer: Trees, tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss, a mean over the step's response tokens."""
    hidden = student.hidden(batch.tokens, batch.positions, batch.layout)                              # [N, D]
    expected = teacher_logits(teacher, batch, longer)                                                 # [M, V]
    loss, metrics = distillation_loss(student.logits(hidden[batch.predictors]), expected, tokens)
    return batch.weight * loss, {name: batch.weight * value for name, value in metrics.items()}


@torch.no_grad()
def evaluate(student: Transformer, teacher: Transformer, trees: Trees, longer: Trees, config: Config,
             device: torch.device) -> dict[str, float]:
    """Mean loss per response token over the whole evaluation set."""
    tokens, sums = sum(tree.learnt for tree in trees), runtime.Sums()
    for batch in micro_batches(trees, config.micro_tokens):
        sums.add(train_step(student, teacher, batch.to(device), longer, tokens)[1])
    return distributed.all_reduce_metrics({"eval_loss": sums["loss"]})


def main(config: Config) -> None:
    if config.dry_run:
        return dry_run(config, sft.load_data, teacher=True)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels, config.dtype)
    tokenizer = load_tokenizer(config.model)
    student = lora.load_base(config.model, config, device, scored=False)
    print(adopt_template(student, tokenizer, config.template))
    context = [m for record in read_all(config.context, "messages") for m in record["messages"]]
    print(f"context: {len(context)} messages before every dialogue of the teacher, the starting model")
    read_before = len(tokenizer.render(context)[0]) if context else 0
    check_positions(student.config, "max_length with the context", config.max_length + read_before)
    trees, longer = load_data(config.data, context, tokenizer, config, "data")
    held_out = load_data(config.eval_data, context, tokenizer, config, "eval_data") if config.eval_data else ([], [])
    eval_trees, eval_longer = held_out
    teacher = lora.Role(student, None) if config.lora_rank else copy.deepcopy(student).requires_grad_(False)
    teacher, student = (lora.shard(model, config, device) for model in (teacher, lora.adapt(student, config)))

    run = runtime.Run(config, {"data": config.data, "model": config.model, "context": config.context, "code": __file__})
    optimizer = runtime.adamw(student, config.lr, config.weight_decay, config.beta2, config.lora_plus, config.adam_eps)
    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    run.resume(student, optimizer, steps, shown=("loss", "tokens_per_s"))

    for step in run.steps_left():
        began = time.perf_counter()
        lr = runtime.set_learning_rate(optimizer, step, steps, config)
        drawn = step_trees(trees, config.batch, step, config.seed)
        response_tokens = sum(tree.learnt for tree in drawn)
        metrics = runtime.Sums()
        for batch in micro_batches(drawn, config.micro_tokens):
            loss, parts = train_step(student, teacher, batch.to(device), longer, response_tokens)
            loss.backward()
            metrics.add(parts)
        metrics = distributed.all_reduce_metrics(metrics)
        metrics["grad_norm"] = distributed.clip_grad_norm(student, config.max_grad_norm)
        runtime.check_finite(metrics["loss"], metrics["grad_norm"], step, [tree.record for tree in drawn])
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"lr": lr, "response_tokens": response_tokens, "tokens": sum(tree.tokens for tree in drawn)}
        metrics["tokens_per_s"] = metrics["tokens"] / (time.perf_counter() - began)
        if eval_trees and run.due(config.eval_every, step + 1):
            metrics |= evaluate(student, teacher, eval_trees, eval_longer, config, device)
        run.end_step(metrics, student, optimizer)

    if run.finished:
        student = lora.save_result(student, run.folder, tokenizer, config, probe=trees[0].trunk[:64].tolist())
        run.note(sample_replies(student, tokenizer, eval_trees or trees, config.samples, config.seed))
    run.close()


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
