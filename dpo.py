"""Direct preference optimization: learn from pairs of replies, with no reward model and no sampling.

    r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x))      implicit reward, nats
    loss    = mean over pairs of -log sigmoid(r(x, y_w) - r(x, y_l))

log pi(y|x) is the sum over the tokens of the reply, its end-of-sequence token included. The reference is
the model training starts from; its log-probabilities never change, so they are computed once and cached.
A dialogue rated at several turns is one tree (`data/pack.py`): all its pairs in one forward pass.

    python dpo.py --config configs/tiny/dpo.toml            loss 0.693 at the first step, accuracy 0.8 at the end

Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7; Tunstall et al. 2023 (arXiv:2310.16944), dDPO.
"""
from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import lora
import runtime
from checkpoints import expect_replies
from data.pack import Batch, Tree, digest, load_trees, share, step_trees, steps_per_epoch, truncate
from data.tokenizer import TEMPLATES, Tokenizer, adopt_template, load_tokenizer, sample_texts
from kernels.logprobs import linear_logprobs
from model import Transformer
from runtime import check_range, distributed, fail, memory


@dataclass(frozen=True)
class Config(lora.Options):
    model: str = "runs/tiny/0/sft/model"  # Hugging Face directory to start from, usually the result of sft.py
    ref_model: str = ""              # the reference; "": the same as model
    data: str = "runs/tiny/0/pairs.jsonl"  # JSONL of preferences (data/formats.py)
    eval_data: str = ""              # JSONL of held-out pairs; "" for none
    out: str = "runs/dpo"            # folder of the run
    template: str = ""               # chat template; "": the checkpoint's own, or zephyr
    ref_cache: str = ""              # file of reference log-probabilities, to share between runs; "": in the run's folder

    loss: Literal["dpo", "cdpo", "robust", "hinge", "ipo", "ipo_mean"] = "dpo"
    beta: float = 0.3                # pull towards the reference, 0.01-0.5; IPO's tau
    label_smoothing: float = 0.1     # share of labels taken to be wrong (cdpo and robust only), 0-0.4
    epochs: int = 1                  # passes over the data, 1-3
    max_steps: int = 0               # stop after this many updates; 0: epochs decide
    batch: int = 64                  # dialogues per update
    max_length: int = 512            # tokens of a path, prompt and response, 512-4096; longer ones are cut and counted
    max_tokens: int = 4096           # tokens of a micro-batch, what fits in memory; a larger tree travels alone
    lr: float = 2e-4                 # peak learning rate, 2e-4 for the tiny model, 5e-7 for 7B
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1               # final rate as a share of the peak
    warmup: float = 0.1              # share of the steps with a rising rate
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
            ("beta", 1e-6, inf), ("label_smoothing", 0, 0.499), ("epochs", 1, inf), ("max_steps", 0, inf), ("batch", 1, inf),
            ("max_length", 2, inf), ("max_tokens", 1, inf), ("lr", 1e-12, 1), ("floor", 0, 1), ("warmup", 0, 0.99), ("weight_decay", 0, 1),
            ("beta2", 0, 0.99999), ("clip", 1e-6, inf), ("seed", 0, 10**9), ("threads", 0, 1024), ("eval_every", 0, inf),
            ("save_every", 0, inf), ("samples", 0, inf),
        ):
            check_range(key, getattr(self, key), low, high)


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
    if beta <= 0:
        raise ValueError(f"beta is {beta}, expected a positive number: set e.g. beta=0.1")
    chosen_rewards = beta * (policy_chosen_logprobs - ref_chosen_logprobs)        # [B]
    rejected_rewards = beta * (policy_rejected_logprobs - ref_rejected_logprobs)  # [B]
    margins = chosen_rewards - rejected_rewards                                   # [B]
    # logsigmoid, not sigmoid().log(): in fp32 the latter is -inf from a margin of -89 down.
    loss = -F.logsigmoid(margins).mean()
    metrics = {"loss": loss, "logprobs_chosen": policy_chosen_logprobs, "logprobs_rejected": policy_rejected_logprobs,
               "rewards_chosen": chosen_rewards, "rewards_rejected": rejected_rewards, "margin": margins,
               "accuracy": (margins > 0).float()}
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


# The relatives make another loss of the same margins m = r(x, y_w) - r(x, y_l). Arguments, shapes, metrics and
# errors are those of dpo_loss.

def _margins(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float):
    """m [B], and dpo_loss's metrics."""
    _, metrics = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)), metrics


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
    """IPO on log-probabilities per token, the form TRL uses: every sum is divided by its response's length first.

    So are the log-probabilities and rewards in its metrics.
    """
    return ipo_loss(policy_chosen_logprobs / chosen_lengths, policy_rejected_logprobs / rejected_lengths,
                    ref_chosen_logprobs / chosen_lengths, ref_rejected_logprobs / rejected_lengths, beta)


# ---------------------------------------------------------------------------------------- the data

def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> list[Tree]:
    """The file as trees; the chosen responses of a dialogue lie in the trunk, each rejected one is a leaf:

        BOS <|user|> \n  Hi  EOS \n <|assistant|> \n  Hello !  EOS | leaf: Go away EOS
        trunk        no loss                           |  chosen        | rejected, branches after the prompt
    """
    trees = load_trees(path, tokenizer)
    if not any(tree.leaves for tree in trees) or any(tree.ranked for tree in trees):
        fail(f"{path}: holds no preference pairs, expected records with 'prompt', 'chosen' and 'rejected'")
    trees, counts = truncate(trees, config.max_length)
    if not trees:
        fail(f"{path}: every prompt is longer than max_length={config.max_length}: raise max_length")
    alone = sum(r.end + (tree.leaves[r.segment - 1][0] if r.segment else 0) for tree in trees for r in tree.responses)
    print(f"{name}: {len(trees)} dialogues, {sum(tree.pairs for tree in trees)} pairs, {sum(tree.tokens for tree in trees):,} tokens "
          f"({alone:,} as separate rows), {max(tree.tokens for tree in trees)} in the largest; cut to {config.max_length} tokens: "
          f"{counts['responses_cut']} responses, dropped: {counts['responses_dropped']} responses, {counts['trees_dropped']} dialogues")
    return trees


def response_sums(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability of every response given its prompt, summed over its tokens, [B] nats."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)                           # [N, D]
    logprobs, _ = linear_logprobs(hidden[batch.predictors], model.head_weight, batch.targets)    # [M]
    return batch.sums(logprobs)


@torch.no_grad()
def set_reference(ref: Transformer, trees: list[Tree], file: Path, made_from: dict[str, str], config: Config, device: torch.device) -> None:
    """Give every tree the log-probability sums of its responses under the reference, computed once and kept in `file`.

    They depend on the data as rendered, on the reference and on its precision, and on nothing trained. A file made
    from anything else is refused, never overwritten.
    """
    if distributed.any_rank(file.is_file()):
        try:
            with safe_open(file, framework="pt") as cache:
                stored, sums = json.loads((cache.metadata() or {}).get("made_from", "{}")), cache.get_tensor("sums")
        except (SafetensorError, OSError, ValueError) as error:
            fail(f"{file}: is no cache of reference log-probabilities ({error}): delete it, or set ref_cache= to another file")
        for name, value in made_from.items():
            if stored.get(name) != value:
                fail(f"{file}: was computed from another {name}: delete it, or set ref_cache= to another file")
    else:
        for batch in share(trees, config.max_tokens):
            parts = response_sums(ref, batch.to(device)).cpu().split([len(tree.responses) for tree in batch.trees])
            for tree, part in zip(batch.trees, parts, strict=True):
                tree.ref_sums = part * batch.counts
        sums = distributed.all_reduce(torch.cat([torch.zeros(len(tree.responses)) if tree.ref_sums is None else tree.ref_sums for tree in trees]))
        if distributed.rank() == 0:
            beside = file.with_name(f".{file.name}.new")
            with runtime.writing(file, beside):
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file({"sums": sums}, beside, metadata={"made_from": json.dumps(made_from)})
                beside.replace(file)
        print(f"reference log-probabilities of {len(sums)} responses written to {file}")
    for tree, part in zip(trees, sums.split([len(tree.responses) for tree in trees]), strict=True):
        tree.ref_sums = part


# ------------------------------------------------------------------------------------------ training

def train_step(policy: Transformer, batch: Batch, config: Config, pairs: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss and metrics, means over the step's `pairs`."""
    sums = response_sums(policy, batch)                                          # [B]
    ref_sums = torch.cat([tree.ref_sums for tree in batch.trees]).to(sums)       # [B]
    logprobs = (*batch.sides(sums), *batch.sides(ref_sums))                      # chosen, rejected, twice: four [pairs]
    if config.loss == "dpo":
        loss, metrics = dpo_loss(*logprobs, config.beta)
    elif config.loss == "cdpo":
        loss, metrics = cdpo_loss(*logprobs, config.beta, config.label_smoothing)
    elif config.loss == "robust":
        loss, metrics = robust_loss(*logprobs, config.beta, config.label_smoothing)
    elif config.loss == "hinge":
        loss, metrics = hinge_loss(*logprobs, config.beta)
    elif config.loss == "ipo":
        loss, metrics = ipo_loss(*logprobs, config.beta)
    else:
        lengths = batch.sides(batch.sums(torch.ones_like(batch.owner, dtype=sums.dtype)))
        loss, metrics = ipo_mean_loss(*logprobs, *lengths, config.beta)
    share = batch.pairs / pairs
    return loss * share, {name: value * share for name, value in metrics.items()}


@torch.no_grad()
def evaluate(policy: Transformer, trees: list[Tree], config: Config, device: torch.device) -> dict[str, float]:
    """Loss, margin and accuracy over held-out pairs."""
    pairs = sum(tree.pairs for tree in trees)
    parts = [(train_step(policy, batch.to(device), config, pairs)[1], batch.counts) for batch in share(trees, config.max_tokens)]
    means = {f"eval_{name}": sum(part[name].item() * counts for part, counts in parts) for name in ("loss", "margin", "accuracy")}
    return distributed.all_reduce_metrics(means)


def main(config: Config) -> None:
    if config.dry_run:
        memory.dry_run(config, load_data)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels)
    tokenizer = load_tokenizer(config.model)
    policy = expect_replies(lora.load_base(config.model, config, device, runtime.compute_dtype(config.dtype, device)), config.model)
    template = config.template or tokenizer.template or "zephyr"
    print(adopt_template(policy, tokenizer, template))
    lora.adapt(policy, config, config.seed)
    lora.shard(policy, config, device)
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    depends_on = {"data": config.data, "model": config.model, "code": __file__}
    run, lock = runtime.open_run(config.out, config, depends_on, config.overwrite)

    ref = policy  # before its first update
    if config.ref_model:
        whole = replace(config, lora_rank=0, quantize="none")
        ref = expect_replies(lora.load_base(config.ref_model, whole, device, policy.compute_dtype), config.ref_model)
        adopt_template(ref, load_tokenizer(config.ref_model), template)
        lora.shard(ref, whole, device)
    cache = Path(config.ref_cache) if config.ref_cache else run / "ref_logprobs.safetensors"
    made_from = {"reference": runtime.file_hash(config.ref_model or config.model), "precision": str(policy.compute_dtype),
                 "data, template or max_length": digest(trees + eval_trees)}
    set_reference(ref, trees + eval_trees, cache, made_from, config, device)
    del ref

    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    optimizer = runtime.adamw(policy, config.lr, config.weight_decay, config.beta2, config.lora_plus)
    done = runtime.load_state(run, policy, optimizer)
    log = runtime.Log(run, done, steps, ("loss", "margin", "accuracy", "pairs_per_s"), config.wandb, config, config.profile)
    stop = runtime.StopRequest()
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    print(f"{trained:,} parameters train, {steps} steps of {config.batch} dialogues, {done} done")

    for step in range(done, steps):
        began = time.perf_counter()
        lr = runtime.learning_rate(step, steps, config.lr, round(config.warmup * steps), config.schedule, config.floor)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        drawn = step_trees(trees, config.batch, step, config.seed)
        pairs = sum(tree.pairs for tree in drawn)
        metrics: dict[str, float] = {}
        for batch in share(drawn, config.max_tokens):
            loss, parts = train_step(policy, batch.to(device), config, pairs)
            (loss * batch.counts).backward()
            for name, value in parts.items():
                metrics[name] = metrics.get(name, 0.0) + value.item() * batch.counts
        metrics = distributed.all_reduce_metrics(metrics) | {"pairs": pairs, "lr": lr}
        metrics["grad_norm"] = distributed.clip_grad_norm(policy, config.clip)
        runtime.check_finite(metrics["loss"], metrics["grad_norm"], step, [tree.record for tree in drawn])
        optimizer.step()
        optimizer.zero_grad()
        metrics["tokens"] = sum(tree.tokens for tree in drawn)
        metrics["pairs_per_s"] = pairs / (time.perf_counter() - began)
        done = step + 1
        if eval_trees and (done == steps or (config.eval_every and done % config.eval_every == 0)):
            metrics |= evaluate(policy, eval_trees, config, device)
        log.step(done, metrics)
        stopping = distributed.any_rank(stop)
        if stopping or done == steps or (config.save_every and done % config.save_every == 0):
            runtime.save_state(run, done, policy, optimizer)
        if stopping:
            break

    if done == steps:
        policy = lora.save_result(policy, run, tokenizer, config, trees[0].trunk[:64].tolist())
        prompts = [tree.trunk[: tree.responses[0].start].tolist() for tree in eval_trees or trees]
        log.note("\n".join(sample_texts(policy, tokenizer, prompts[: config.samples], config.seed)))
    log.close()
    lock.close()
    print(f"wrote {run}/model" if done == steps else f"stopped after step {done}; the same command goes on from there")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
