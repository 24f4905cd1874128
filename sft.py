"""Supervised fine-tuning: teach a base model to reply by imitating replies.

    loss = - (1 / n) sum over the n response tokens of the step of log pi(token | what precedes it)

The user's words are read but not learnt; the end-of-sequence token of each reply is, so the model
learns to stop. n counts the response tokens of the whole optimizer step, however many micro-batches it
takes: a mean of micro-batch means would weigh tokens by the company they travel in. With
train_on = "all" every token counts: that is pretraining (`configs/tiny/pretrain.toml`). With "chosen" it
imitates the preferred replies of preference data, the control that DPO has to beat.

    python sft.py --config configs/tiny/sft.toml            loss 1.9 at the first step, 0.25 at the end

Ouyang et al. 2022 (arXiv:2203.02155), step 1; Tunstall et al. 2023 (arXiv:2310.16944), dSFT.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import runtime
from data.chat import TEMPLATES, Tokenizer, adopt_template, load_tokenizer
from data.pack import CHOSEN, Batch, Response, Tree, load_trees, pack, step_trees, steps_per_epoch, truncate
from kernels.logprobs import linear_logprobs
from model import Transformer, generate, load_model, save_model
from runtime import fail


@dataclass(frozen=True)
class Config:
    model: str = "data/tiny/base"    # Hugging Face directory to start from
    data: str = ""                   # JSONL: messages, or text (formats in data/formats.py)
    eval_data: str = ""              # JSONL of the same kind, for the evaluation loss; "" for none
    out: str = "runs/sft"            # folder of the run
    template: str = ""               # chat template; "": the checkpoint's own
    train_on: Literal["responses", "chosen", "all"] = "responses"  # chosen: of preference data, the replies preferred

    epochs: int = 3                  # passes over the data, 1-6
    max_steps: int = 0               # stop after this many updates; 0: epochs decide
    batch: int = 64                  # dialogues per update
    max_length: int = 512            # tokens of a dialogue, 128-4096; longer ones are cut and counted
    max_tokens: int = 8192           # tokens of a micro-batch: what fits in memory
    lr: float = 2e-5                 # peak learning rate, 1e-6 to 5e-5 for 7B, 1e-3 for the tiny model
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.0               # final rate as a share of the peak
    warmup: float = 0.03             # share of the steps with a rising rate
    weight_decay: float = 0.0        # on matrices, 0-0.1
    beta2: float = 0.999             # AdamW, 0.95-0.999
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
        if self.template and self.template not in TEMPLATES:
            fail(f"template is '{self.template}', expected one of {', '.join(TEMPLATES)}")
        for key in ("epochs", "batch", "max_length", "max_tokens"):
            if getattr(self, key) < 1:
                fail(f"{key} is {getattr(self, key)}, expected at least 1")
        if self.max_tokens < self.max_length:
            fail(f"max_tokens={self.max_tokens} is less than max_length={self.max_length}: a dialogue would not fit, raise max_tokens")
        if not 0 < self.lr < 1:
            fail(f"lr is {self.lr}, expected between 0 and 1 such as 2e-5")


def sft_loss(logprobs: Tensor, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of response tokens (logprobs [M], nats) over `denominator`.

    The denominator is the number of response tokens of the whole optimizer step, so that losses (and
    gradients) of its micro-batches add up to the step's mean. Returns the loss [] and detached metrics [].
    """
    loss = -logprobs.sum() / denominator
    return loss, {"loss": loss.detach()}


def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> list[Tree]:
    """The file as trees, one trunk each:

        BOS <|user|> \\n  Hi  EOS \\n <|assistant|> \\n  Hello !  EOS \\n <|user|> \\n  Bye ...
        trunk        no loss                           |  response  |     no loss
    """
    trees = load_trees(path, tokenizer)
    for tree in trees:
        if config.train_on == "all":
            tree.responses = [Response(0, 1, len(tree.trunk))]
        if config.train_on == "chosen":
            tree.leaves, tree.responses = [], [r for r in tree.responses if r.side == CHOSEN]
    trees, counts = truncate(trees, config.max_length)
    if not trees:
        fail(f"{path}: holds no token to learn within max_length={config.max_length}: raise max_length")
    tokens = sum(tree.tokens for tree in trees)
    learnt = sum(r.end - r.start for tree in trees for r in tree.responses)
    print(f"{name}: {len(trees)} dialogues, {tokens:,} tokens, {learnt:,} in the loss; cut to {config.max_length} tokens: "
          f"{counts['responses_cut']} replies, dropped: {counts['responses_dropped']} replies, {counts['trees_dropped']} dialogues")
    return trees


def logprobs_of(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability of every response token given its path, [M]."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)
    return linear_logprobs(hidden[batch.sources], model.head_weight, batch.targets)[0]


def train_step(model: Transformer, trees: list[Tree], config: Config, device: torch.device) -> dict[str, float]:
    """Gradients of one update's loss, micro-batch by micro-batch."""
    batches = pack(trees, config.max_tokens)
    denominator = sum(len(batch.index) for batch in batches)
    total = 0.0
    for batch in batches:
        loss, metrics = sft_loss(logprobs_of(model, batch.to(device)), denominator)
        loss.backward()
        total += metrics["loss"].item()
    return {"loss": total, "response_tokens": denominator, "tokens": sum(tree.tokens for tree in trees)}


@torch.no_grad()
def evaluate(model: Transformer, trees: list[Tree], config: Config, device: torch.device) -> dict[str, float]:
    """Mean loss per response token over the whole evaluation set."""
    batches = pack(trees, config.max_tokens)
    denominator = sum(len(batch.index) for batch in batches)
    return {"eval_loss": sum(sft_loss(logprobs_of(model, b.to(device)), denominator)[0].item() for b in batches)}


def show_samples(model: Transformer, tokenizer: Tokenizer, trees: list[Tree], config: Config, log: runtime.Log) -> None:
    """What the model says to the first prompts of the evaluation set, at temperature 0.7."""
    if config.train_on == "all":
        prompts = [tree.trunk[:8].tolist() for tree in trees[: config.samples]]
    else:
        prompts = [tree.trunk[: tree.responses[0].start].tolist() for tree in trees[: config.samples]]
    replies = generate(model, prompts, 64, temperature=0.7, stop_ids=tokenizer.stop_ids(), seed=config.seed)
    for prompt, (reply,) in zip(prompts, replies, strict=True):
        log.note(f"  {tokenizer.decode(prompt).strip()!r}\n    {tokenizer.decode(reply.tokens)!r}{'' if reply.finished else ' ...'}")


def main(config: Config) -> None:
    device = runtime.setup(config.device, config.seed, config.threads)
    if not config.data:
        fail("data is empty, expected a JSONL file: set data=path/to/messages.jsonl")
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, dtype=torch.float32, device=device)
    model.compute_dtype = runtime.compute_dtype(config.dtype, device)
    if config.train_on != "all":
        name = config.template or tokenizer.template or fail(f"{config.model}: has no chat template of its own: set template=")
        print(adopt_template(model, tokenizer, name))
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    sources = {"data": runtime.file_hash(config.data), "model": runtime.file_hash(config.model)}
    run, lock = runtime.open_run(config.out, config, sources, config.overwrite)

    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    optimizer = runtime.adamw(model, config.lr, config.weight_decay, config.beta2)
    done = runtime.load_state(run, model, optimizer)
    log = runtime.Log(run, done, steps, config.wandb, config)
    stop = runtime.StopRequest()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {config.batch} dialogues, {done} done")

    for step in range(done, steps):
        began = time.perf_counter()
        lr = runtime.learning_rate(step, steps, config.lr, round(config.warmup * steps), config.schedule, config.floor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        chosen = step_trees(trees, config.batch, step, config.seed)
        metrics = train_step(model, chosen, config, device)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
        runtime.check_finite(metrics["loss"], norm, step, [tree.record for tree in chosen])
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"lr": lr, "grad_norm": norm, "tokens_per_s": metrics["tokens"] / (time.perf_counter() - began)}
        done = step + 1
        if eval_trees and (done == steps or (config.eval_every and done % config.eval_every == 0)):
            metrics |= evaluate(model, eval_trees, config, device)
        log.step(done, metrics)
        if stop or done == steps or (config.save_every and done % config.save_every == 0):
            runtime.save_state(run, done, model, optimizer)
        if stop:
            log.note(f"stopped after step {done}; the same command goes on from there")
            return

    save_model(model, run / "model", tokenizer, dtype=getattr(torch, model.config.dtype))
    if config.samples:
        show_samples(model, tokenizer, eval_trees or trees, config, log)
    log.close()
    lock.close()
    print(f"wrote {Path(config.out) / 'model'}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
