"""Context distillation: learn to reply without a context as the starting model replies with it.

    loss = (1 / n) sum over the n response tokens of KL(pi_0(. | context, what precedes) || pi(. | what precedes))

The teacher pi_0 is the starting model itself, frozen, with the context before every dialogue; the student sees the
dialogue alone. What the context asks for (a style, care, four worked examples) becomes a habit.

    python distill.py --config configs/tiny/distill.toml            loss 0.03 at the first step, falling

Askell et al. 2021 (arXiv:2112.00861), section 2.2. The loop is sft.py's; only the loss and the teacher differ.
"""
import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import runtime
import sft
from data.formats import read_all
from data.pack import Batch, check_positions, collate
from data.store import Trees, load_trees
from data.tokenizer import Tokenizer
from data.trees import Tree
from model import Transformer
from runtime import fail


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


@torch.no_grad()
def teacher_logits(teacher: Transformer, batch: Batch, longer: Trees) -> Tensor:
    """The teacher's logits [M, V] for the batch's response tokens, after the context; `longer` are its trees."""
    seen = collate([with_context(tree, longer.of_record(tree.record)) for tree in batch.trees]).to(batch.tokens.device)
    hidden = teacher.hidden(seen.tokens, seen.positions, seen.layout)
    return teacher.logits(hidden[seen.predictors])


def train_step(
    student: Transformer, batch: Batch, tokens: int, teacher: Transformer, longer: Trees,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss, a mean over the step's response tokens."""
    hidden = student.hidden(batch.tokens, batch.positions, batch.layout)                              # [N, D]
    expected = teacher_logits(teacher, batch, longer)                                                 # [M, V]
    loss, metrics = distillation_loss(student.logits(hidden[batch.predictors]), expected, tokens)
    return batch.weight * loss, {name: batch.weight * value for name, value in metrics.items()}


def start(student: Transformer, tokenizer: Tokenizer, config: Config, device: torch.device) -> list[partial]:
    """train_step with the teacher and what it reads of `data`, and of `eval_data`: the same dialogues, uncut."""
    context = [m for record in read_all(config.context, "messages") for m in record["messages"]]
    print(f"context: {len(context)} messages before every dialogue of the teacher, the starting model")
    read_before = len(tokenizer.render(context)[0]) if context else 0
    check_positions(student.config, "max_length with the context", config.max_length + read_before)
    teacher = lora.Role(student, None) if config.lora_rank else copy.deepcopy(student).requires_grad_(False)
    teacher = lora.shard(teacher, config, device)
    sets = [load_trees(path, tokenizer, before=context, cache=config.cache, columns=config.columns) if path else None
            for path in (config.data, config.eval_data)]
    return [partial(train_step, teacher=teacher, longer=longer) for longer in sets]


def main(config: Config) -> None:
    sft.main(config, start, {"context": config.context, "loss": __file__})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
