"""Direct preference optimization: learn from pairs of replies, with no reward model and no sampling.

    r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x))      implicit reward, nats
    loss    = mean over pairs of -log sigmoid(r(x, y_w) - r(x, y_l))

log pi(y|x) is the sum over the tokens of the reply, its end-of-sequence token included. The reference is
the model training starts from; its log-probabilities never change, so they are computed once and cached.
A dialogue rated at several turns is one tree (`data/pack.py`): all its pairs in one forward pass.

    python dpo.py --config configs/tiny/dpo.toml            loss 0.693 at the first step, accuracy 0.85 at the end

Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7; Tunstall et al. 2023 (arXiv:2310.16944), dDPO.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

import runtime
from data.chat import TEMPLATES, Tokenizer, adopt_template, load_tokenizer
from data.pack import Batch, Tree, digest, load_trees, pack, step_trees, steps_per_epoch, truncate
from kernels.logprobs import linear_logprobs
from model import Transformer, generate, load_model, save_model
from runtime import fail


@dataclass(frozen=True)
class Config:
    model: str = ""                  # Hugging Face directory to start from, usually the result of sft.py
    ref_model: str = ""              # the reference; "": the same as model
    data: str = ""                   # JSONL of preferences (formats in data/formats.py)
    eval_data: str = ""              # JSONL of held-out pairs; "" for none
    out: str = "runs/dpo"            # folder of the run
    template: str = ""               # chat template; "": the checkpoint's own
    ref_cache: str = ""              # file of reference log-probabilities, to share between runs; "": in the run's folder

    loss: Literal["dpo", "cdpo", "ipo", "ipo_mean", "hinge", "robust"] = "dpo"
    beta: float = 0.1                # pull towards the reference, 0.01-0.5; IPO's tau
    label_smoothing: float = 0.1     # share of labels taken to be wrong (cdpo and robust), 0-0.4
    epochs: int = 1                  # passes over the data, 1-3
    max_steps: int = 0               # stop after this many updates; 0: epochs decide
    batch: int = 32                  # dialogues per update
    max_length: int = 1024           # tokens of a path, prompt and reply; longer ones are cut and counted
    max_tokens: int = 8192           # tokens of a micro-batch: what fits in memory
    lr: float = 5e-7                 # peak learning rate, 5e-7 for 7B, 2e-4 for the tiny model
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    floor: float = 0.0               # final rate as a share of the peak
    warmup: float = 0.1              # share of the steps with a rising rate
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
            fail(f"lr is {self.lr}, expected between 0 and 1 such as 5e-7")
        if self.beta <= 0:
            fail(f"beta is {self.beta}, expected a positive number such as 0.1: at 0 the loss ignores the policy")
        if not 0 <= self.label_smoothing < 0.5:
            fail(f"label_smoothing is {self.label_smoothing}, expected at least 0 and below 0.5")


# -------------------------------------------------------------------------------------- the losses

def dpo_loss(
    policy_chosen_logprobs: Tensor,    # [B] log pi(y_w | x), summed over response tokens, nats
    policy_rejected_logprobs: Tensor,  # [B] log pi(y_l | x)
    ref_chosen_logprobs: Tensor,       # [B] log pi_ref(y_w | x), no gradient
    ref_rejected_logprobs: Tensor,     # [B] log pi_ref(y_l | x), no gradient
    beta: float,                       # strength of the pull towards the reference, no unit
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO loss (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7) and its metrics.

        r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x))      implicit reward, nats
        loss    = mean over pairs of -log sigmoid(r(x, y_w) - r(x, y_l))

    Returns the loss [] and detached metrics []. A policy equal to its reference scores
    log 2 = 0.6931 with accuracy 0 (a tie is not a win): every run must start there.
    Raises ValueError if beta is not positive: at 0 the loss ignores the policy.
    """
    margins, metrics = _margins(policy_chosen_logprobs, policy_rejected_logprobs,
                                ref_chosen_logprobs, ref_rejected_logprobs, beta)  # [B]
    # logsigmoid, not sigmoid().log(): in fp32 the latter is -inf from a margin of -89 down.
    loss = -F.logsigmoid(margins).mean()
    return loss, metrics | {"loss": loss.detach()}


def _margins(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float):
    """m = r(x, y_w) - r(x, y_l) [B], and the metrics every loss reports."""
    if beta <= 0:
        raise ValueError(f"beta is {beta}, expected a positive number: set e.g. beta=0.1")
    chosen_rewards = beta * (policy_chosen - ref_chosen)        # [B]
    rejected_rewards = beta * (policy_rejected - ref_rejected)  # [B]
    margins = chosen_rewards - rejected_rewards                 # [B]
    metrics = {"logprobs_chosen": policy_chosen, "logprobs_rejected": policy_rejected, "rewards_chosen": chosen_rewards,
               "rewards_rejected": rejected_rewards, "margin": margins, "accuracy": (margins > 0).float()}
    return margins, {name: value.detach().mean() for name, value in metrics.items()}


# The relatives change the line that makes a loss of the margins m, and nothing else: arguments, shapes and errors
# are those of dpo_loss.

def cdpo_loss(
    policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, beta: float, label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Conservative DPO (Mitchell 2023): cross-entropy when a share e = label_smoothing of the labels is taken to be flipped.

        loss = mean of -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    Unlike DPO's it has a minimum, where sigmoid(m) = 1 - e.
    """
    margins, metrics = _margins(policy_chosen_logprobs, policy_rejected_logprobs,
                                ref_chosen_logprobs, ref_rejected_logprobs, beta)
    loss = -((1 - label_smoothing) * F.logsigmoid(margins) + label_smoothing * F.logsigmoid(-margins)).mean()
    return loss, metrics | {"loss": loss.detach()}


def robust_loss(
    policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, beta: float, label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): unbiased for DPO's loss if a share e of the labels is flipped.

        loss = mean of [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2 e)

    Raises ValueError for e of one half and more: such labels say nothing, or the opposite.
    """
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected below 0.5")
    margins, metrics = _margins(policy_chosen_logprobs, policy_rejected_logprobs,
                                ref_chosen_logprobs, ref_rejected_logprobs, beta)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) + label_smoothing * F.logsigmoid(-margins)
    loss = losses.mean() / (1 - 2 * label_smoothing)
    return loss, metrics | {"loss": loss.detach()}


def hinge_loss(
    policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A hinge on the same margin (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425): loss = mean of max(0, 1 - m)."""
    margins, metrics = _margins(policy_chosen_logprobs, policy_rejected_logprobs,
                                ref_chosen_logprobs, ref_rejected_logprobs, beta)
    loss = F.relu(1 - margins).mean()
    return loss, metrics | {"loss": loss.detach()}


def ipo_loss(
    policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """IPO on summed log-probabilities (Azar et al. 2023, arXiv:2310.12036, Eq. 17; beta is their tau).

        loss = mean of (h - 1 / (2 beta))^2,    h = m / beta, the margin in nats

    A target for the margin instead of a push without end.
    """
    margins, metrics = _margins(policy_chosen_logprobs, policy_rejected_logprobs,
                                ref_chosen_logprobs, ref_rejected_logprobs, beta)
    loss = (margins / beta - 1 / (2 * beta)).square().mean()
    return loss, metrics | {"loss": loss.detach()}


def ipo_mean_loss(
    policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor,
    chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float,  # lengths [B] in response tokens
) -> tuple[Tensor, dict[str, Tensor]]:
    """IPO on log-probabilities per token, the form TRL uses: every sum is divided by its response's length first."""
    return ipo_loss(policy_chosen_logprobs / chosen_lengths, policy_rejected_logprobs / rejected_lengths,
                    ref_chosen_logprobs / chosen_lengths, ref_rejected_logprobs / rejected_lengths, beta)


# ---------------------------------------------------------------------------------------- the data

def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> list[Tree]:
    """The file as trees; the chosen replies of a dialogue lie in the trunk, each rejected one is a leaf:

        BOS <|user|> \\n  Hi  EOS \\n <|assistant|> \\n  Hello !  EOS | leaf: Go away EOS
        trunk        no loss                           |  chosen        | rejected, branches after the prompt
    """
    trees = load_trees(path, tokenizer)
    if not any(tree.leaves for tree in trees):
        fail(f"{path}: holds no preference pairs, expected records with 'prompt', 'chosen' and 'rejected'")
    trees, counts = truncate(trees, config.max_length)
    if not trees:
        fail(f"{path}: every prompt is longer than max_length={config.max_length}: raise max_length")
    alone = sum(r.end + (tree.leaves[r.segment - 1][0] if r.segment else 0) for tree in trees for r in tree.responses)
    print(f"{name}: {len(trees)} dialogues, {sum(tree.pairs for tree in trees)} pairs, {sum(tree.tokens for tree in trees):,} tokens "
          f"({alone:,} as separate rows); cut to {config.max_length} tokens: {counts['responses_cut']} replies, "
          f"dropped: {counts['responses_dropped']} replies, {counts['trees_dropped']} dialogues")
    return trees


def response_sums(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability of every response given its prompt, summed over its tokens, [B] nats."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)
    logprobs, _ = linear_logprobs(hidden[batch.sources], model.head_weight, batch.targets)
    return batch.sums(logprobs)


@torch.no_grad()
def reference_sums(ref: Transformer, trees: list[Tree], config: Config, device: torch.device) -> Tensor:
    """Log-probability sums of all responses under the reference, tree by tree, [responses] nats."""
    sums = {}
    for batch in pack(trees, config.max_tokens):
        parts = response_sums(ref, batch.to(device)).cpu().split([len(tree.responses) for tree in batch.trees])
        sums |= {id(tree): part for tree, part in zip(batch.trees, parts, strict=True)}
    return torch.cat([sums[id(tree)] for tree in trees])


def cached_sums(file: Path, sources: dict[str, str]) -> Tensor | None:
    """What an earlier run has computed, if it was for the same data, reference and rendering; other files are refused."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as cache:
            made_from, sums = cache.metadata() or {}, cache.get_tensor("sums")
    except (SafetensorError, OSError) as error:
        fail(f"{file}: is no cache of reference log-probabilities ({error}): delete it, or set ref_cache= to another file")
    for name, value in sources.items():
        if made_from.get(name) != value:
            fail(f"{file}: was computed from another {name}: delete it, or set ref_cache= to another file")
    return sums


# ------------------------------------------------------------------------------------------ training

def batch_loss(policy: Transformer, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and metrics over the pairs of one micro-batch."""
    sums = response_sums(policy, batch)
    ref_sums = torch.cat([tree.ref_sums for tree in batch.trees]).to(sums)
    logprobs = (*batch.sides(sums), *batch.sides(ref_sums))  # four [pairs]
    if config.loss == "dpo":
        return dpo_loss(*logprobs, config.beta)
    if config.loss == "cdpo":
        return cdpo_loss(*logprobs, config.beta, config.label_smoothing)
    if config.loss == "robust":
        return robust_loss(*logprobs, config.beta, config.label_smoothing)
    if config.loss == "hinge":
        return hinge_loss(*logprobs, config.beta)
    if config.loss == "ipo":
        return ipo_loss(*logprobs, config.beta)
    lengths = batch.sides(batch.sums(torch.ones_like(batch.owner, dtype=sums.dtype)))
    return ipo_mean_loss(*logprobs, *lengths, config.beta)


def train_step(policy: Transformer, trees: list[Tree], config: Config, device: torch.device) -> dict[str, float]:
    """Gradients of one update's loss: the mean over all its pairs, micro-batch by micro-batch."""
    pairs = sum(tree.pairs for tree in trees)
    totals: dict[str, float] = {}
    for batch in pack(trees, config.max_tokens):
        loss, metrics = batch_loss(policy, batch.to(device), config)
        share = batch.pairs / pairs
        (loss * share).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value.item() * share
    return totals | {"pairs": pairs, "tokens": sum(tree.tokens for tree in trees)}


@torch.no_grad()
def evaluate(policy: Transformer, trees: list[Tree], config: Config, device: torch.device) -> dict[str, float]:
    """Loss, margin and accuracy over held-out pairs."""
    pairs = sum(tree.pairs for tree in trees)
    totals: dict[str, float] = {}
    for batch in pack(trees, config.max_tokens):
        _, metrics = batch_loss(policy, batch.to(device), config)
        for name in ("loss", "margin", "accuracy"):
            totals[f"eval_{name}"] = totals.get(f"eval_{name}", 0.0) + metrics[name].item() * batch.pairs / pairs
    return totals


def show_samples(policy: Transformer, tokenizer: Tokenizer, trees: list[Tree], config: Config, log: runtime.Log) -> None:
    """What the policy says to the first prompts of the evaluation set, at temperature 0.7."""
    prompts = [tree.trunk[: tree.responses[0].start].tolist() for tree in trees[: config.samples]]
    replies = generate(policy, prompts, 64, temperature=0.7, stop_ids=tokenizer.stop_ids(), seed=config.seed)
    for prompt, (reply,) in zip(prompts, replies, strict=True):
        log.note(f"  {tokenizer.decode(prompt).strip()!r}\n    {tokenizer.decode(reply.tokens)!r}{'' if reply.finished else ' ...'}")


def main(config: Config) -> None:
    device = runtime.setup(config.device, config.seed, config.threads)
    if not config.data or not config.model:
        fail("model and data are needed: set model=runs/sft/model data=path/to/pairs.jsonl")
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, dtype=torch.float32, device=device)
    policy.compute_dtype = runtime.compute_dtype(config.dtype, device)
    name = config.template or tokenizer.template or fail(f"{config.model}: has no chat template of its own: set template=")
    print(adopt_template(policy, tokenizer, name))
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    ref_model = config.ref_model or config.model
    sources = {"data": runtime.file_hash(config.data), "model": runtime.file_hash(config.model)}
    run, lock = runtime.open_run(config.out, config, sources, config.overwrite)

    cache = Path(config.ref_cache) if config.ref_cache else run / "ref_logprobs.safetensors"
    made_from = {"reference": runtime.file_hash(ref_model), "data, template or max_length": digest(trees + eval_trees)}
    sums = cached_sums(cache, made_from)
    if sums is None:
        ref = policy  # before its first update
        if config.ref_model:
            ref = load_model(config.ref_model, dtype=torch.float32, device=device)
            ref.compute_dtype = policy.compute_dtype
            adopt_template(ref, load_tokenizer(config.ref_model), name)
        sums = reference_sums(ref, trees + eval_trees, config, device)
        runtime.write_tensors(cache, {"sums": sums}, made_from)
        print(f"reference log-probabilities of {len(sums)} replies written to {cache}")
        del ref
    parts = sums.split([len(tree.responses) for tree in trees + eval_trees])
    for tree, part in zip(trees + eval_trees, parts, strict=True):
        tree.ref_sums = part

    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    optimizer = runtime.adamw(policy, config.lr, config.weight_decay, config.beta2)
    done = runtime.load_state(run, policy, optimizer)
    log = runtime.Log(run, done, steps, config.wandb, config)
    stop = runtime.StopRequest()
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {steps} steps of {config.batch} dialogues, {done} done")

    for step in range(done, steps):
        began = time.perf_counter()
        lr = runtime.learning_rate(step, steps, config.lr, round(config.warmup * steps), config.schedule, config.floor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        chosen = step_trees(trees, config.batch, step, config.seed)
        metrics = train_step(policy, chosen, config, device)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip).item()
        runtime.check_finite(metrics["loss"], norm, step, [tree.record for tree in chosen])
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        metrics |= {"lr": lr, "grad_norm": norm, "tokens_per_s": metrics["tokens"] / seconds, "pairs_per_s": metrics["pairs"] / seconds}
        done = step + 1
        if eval_trees and (done == steps or (config.eval_every and done % config.eval_every == 0)):
            metrics |= evaluate(policy, eval_trees, config, device)
        log.step(done, metrics)
        if stop or done == steps or (config.save_every and done % config.save_every == 0):
            runtime.save_state(run, done, policy, optimizer)
        if stop:
            log.note(f"stopped after step {done}; the same command goes on from there")
            return

    save_model(policy, run / "model", tokenizer, dtype=getattr(torch, policy.config.dtype))
    if config.samples:
        show_samples(policy, tokenizer, eval_trees or trees, config, log)
    log.close()
    lock.close()
    print(f"wrote {Path(config.out) / 'model'}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
