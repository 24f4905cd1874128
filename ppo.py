"""Proximal policy optimization: sample replies, let a reward model score them, learn from the scores.

    each step   sample      replies y from the policy, temperature as in training, no truncation of the distribution
                score       r(x, y), one number per reply, given at its last token; a reply without end gets a penalty
                reward_t  = -kl_coef * (log pi(y_t) - log pi_ref(y_t)),  + r(x, y) at the last token
                advantage   GAE over rewards and values, whitened over all tokens of the step
                update      some epochs of minibatches, ratio = pi(y_t) / pi_old(y_t):
                            mean of max(-A ratio, -A clip(ratio, 1 - c, 1 + c))  +  value loss, clipped the same way

The reward is sparse: nothing but the KL term until the reply ends. The reference is the policy before its first
update. The value model starts from the reward model and says after every token what score is still to come;
advantages = "rloo" does without one and compares replies to the same prompt. With lora_rank the four models are one
frozen base: policy, value and reward model are its adapters, the reference is the base alone.

    python ppo.py --config configs/tiny/ppo.toml            score, kl, length and share of ended replies, step by step

Schulman et al. 2017 (arXiv:1707.06347); Ziegler et al. 2019 (arXiv:1909.08593); Ouyang et al. 2022
(arXiv:2203.02155); details after Huang et al. 2024 (arXiv:2403.17031); RLOO: Ahmadian et al. 2024 (arXiv:2402.14740).
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import lora
import runtime
from data.dry_run import dry_run_of_four
from data.four_models import Models, load_models, make_optimizer, save_snapshot
from data.pack import Batch, micro_batches, scored_replies, step_trees
from data.scores import response_scores
from data.store import load_prompts
from data.tokenizer import Tokenizer, load_tokenizer
from data.trees import Tree, tree_from_replies
from kernels.logprobs import linear_logprobs
from model import Transformer, generate
from runtime import distributed, fail


@dataclass(frozen=True)
class Config(runtime.Settings):
    model: str = "runs/tiny/0/sft/model"  # the policy to start from, and the reference; usually the result of sft.py
    reward_model: str = "runs/tiny/0/reward/model"  # result of reward.py
    value_model: str = ""            # the value model to start from; "": the reward model
    data: str = "runs/tiny/0/pairs.jsonl"  # JSONL of records with a "prompt" (data/formats.py)
    out: str = "runs/ppo"            # folder of the run

    steps: int = 40                  # rollouts
    batch: int = 128                 # prompts per rollout
    n: int = 1                       # replies per prompt; rloo needs at least 2
    max_tokens: int = 64             # of a reply
    temperature: float = 1.0         # of sampling, and of every log-probability
    missing_eos: Literal["replace", "subtract"] = "replace"  # a reply without end gets -penalty, or its score - penalty
    penalty: float = 2.0             # in standard deviations of the score, as scores are
    score_clip: float = 4.0          # largest absolute score, in standard deviations

    kl: Literal["k1", "k2", "k3"] = "k1"  # estimator of the KL term in the reward
    kl_coef: float = 0.2             # its weight, 0.01-0.5
    kl_target: float = 0.0           # nats per reply: adapt kl_coef to keep it; 0: kl_coef is fixed
    kl_horizon: int = 10000          # replies over which the coefficient adapts
    advantages: Literal["gae", "rloo"] = "gae"
    gamma: float = 1.0               # discount per token
    gae_lambda: float = 0.95         # 1 trusts rewards alone, 0 the value model
    clip_eps: float = 0.2            # c, of the policy's ratio
    value_clip: float = 0.2          # how far a value may move from the old one
    value_coef: float = 0.1          # weight of the value loss

    epochs: int = 2                  # passes over a rollout, 1-4
    minibatches: int = 2             # updates per pass
    lr: float = 1e-4                 # of the policy, 1e-4 for the tiny model, 1e-6 to 3e-6 for 7B
    value_lr: float = 3e-4           # of the value model
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup_ratio: float = 0.05       # share of the steps with a rising learning rate
    beta2: float = 0.95              # of AdamW
    max_kl: float = 50.0             # stop when a reply is this many nats from the reference in the mean,
    max_ratio: float = 100.0         # a token has become this much likelier within a step,
    min_eos: float = 0.2             # or fewer than this share of replies end

    snapshot_every: int = 0          # steps between models kept as model_step_N; 0: none
    show_every: int = 0              # steps between tables of sampled replies; 0: at the end only

    def __post_init__(self):
        super().__post_init__()
        runtime.check_ranges(
            self, steps=(1, inf), batch=(1, inf), n=(1, inf), max_tokens=(1, inf), temperature=(1e-6, 10),
            penalty=(0, inf), score_clip=(1e-6, inf), kl_coef=(0, inf), kl_target=(0, inf), kl_horizon=(1, inf),
            gamma=(0, 1), gae_lambda=(0, 1), clip_eps=(0, 0.999), value_clip=(0, inf), value_coef=(0, inf),
            epochs=(1, inf), minibatches=(1, self.batch), value_lr=(1e-12, 1), max_kl=(0, inf), max_ratio=(1, inf),
            min_eos=(0, 1), snapshot_every=(0, inf), show_every=(0, inf),
        )
        if self.advantages == "rloo" and self.n < 2:
            fail("n is 1, expected at least 2 with advantages=rloo: a reply is compared with the others to its prompt")


# ------------------------------------------------------------------------------------ the equations
# B replies, padded to T tokens; mask [B, T] is True on real tokens. Log-probabilities are in nats.

def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log-ratio d: unbiased, may be negative. The estimators of KL(pi || pi_ref) from samples of pi: Schulman 2020."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative; its gradient is that of the KL."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative."""
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards [B, T]: -kl_coef * kl everywhere, the score [B] added at each reply's last token.

    With kl_coef 0 they sum to the score.
    """
    rewards = torch.where(mask.bool(), -kl_coef * kl, 0.0)
    last = mask.long().sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages (Schulman et al. 2015, arXiv:1506.02438) and returns, both [B, T].

        delta_t = reward_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    R_t = A_t + V_t

    V is 0 after the last token; whatever stands behind the mask counts for nothing.
    """
    rewards, values = (torch.where(mask.bool(), x, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def rloo_advantages(returns: Tensor, n: int) -> Tensor:
    """Each reply's return minus the mean of the n - 1 others to its prompt, [B]; those of a prompt are adjacent."""
    groups = returns.view(-1, n)
    return ((groups - groups.mean(1, keepdim=True)) * (n / (n - 1))).flatten()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x [B, T] with standard deviation 1 (unbiased) over the mask, and mean 0, or its own if not shift_mean."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask) * mask.sum() / (mask.sum() - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (PPO, Eq. 7) over the masked tokens [B, T]: mean, or sum over `denominator`; and metrics.

        ratio = pi / pi_old,    loss = mean of max(-A ratio, -A clip(ratio, 1 - clip_eps, 1 + clip_eps))
    """
    denominator = mask.sum() if denominator is None else denominator
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = torch.where(mask.bool(), torch.maximum(free, clipped), 0.0).sum() / denominator
    with torch.no_grad():
        part = mask.sum() / denominator
        metrics = {"policy_loss": loss, "ratio_mean": masked_mean(ratio, mask) * part, "ratio_max": ratio.max(),
                   "clip_fraction": masked_mean((clipped > free).to(ratio), mask) * part,
                   "approx_kl": masked_mean(log_ratio.square(), mask) / 2 * part}
    return loss, {name: value.detach() for name, value in metrics.items()}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 * mean of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), or its sum over `denominator`; and metrics.

    A value counts as clipped if it lies further than c from the old one and the clipped error is the larger.
    """
    denominator = mask.sum() if denominator is None else denominator
    moved = values - old_values
    near = old_values + moved.clamp(-clip, clip)
    free, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * torch.where(mask.bool(), torch.maximum(free, clipped), 0.0).sum() / denominator
    # Not clipped > free alone: rounding in old + (V - old) makes that true of values that did not move too far.
    counted = (moved.abs() > clip) & (clipped > free)
    fraction = masked_mean(counted.to(values), mask) * mask.sum() / denominator
    return loss, {"value_loss": loss.detach(), "value_clip_fraction": fraction.detach()}


def adapt_kl_coef(kl_coef: float, kl: float, episodes: int, target: float, horizon: int) -> float:
    """kl_coef nudged towards the one that keeps KL at `target` nats per reply (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


# ------------------------------------------------------------------------------------------ a rollout

class Rollout(NamedTuple):
    """What a step has sampled and measured: B = prompts x n replies, those to one prompt together."""

    trees: list[Tree]      # a prompt each, its replies as leaves; tree.record is its number
    scores: Tensor         # [B] in standard deviations, penalties included
    finished: Tensor       # [B] bool, ended by an end-of-sequence token
    mask: Tensor           # [B, T]
    logprobs: Tensor       # [B, T] of the policy as it sampled
    kl: Tensor             # [B, T] by config.kl
    entropy: Tensor        # [B, T] nats
    values: Tensor         # [B, T] of what is still to come, before each token


def response_logprobs(model: Transformer, batch: Batch, temperature: float, entropy: bool = False):
    """Log-probability of every response token given its path, the entropy there if asked, and the mask: rows [b, T]."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)      # [N, D]
    logprobs, entropies = linear_logprobs(hidden[batch.predictors], model.head_weight, batch.targets, temperature,
                                          entropy=entropy)                  # [M]
    rows, mask = batch.rows(logprobs)
    return (rows, batch.rows(entropies)[0], mask) if entropy else (rows, mask)


def response_values(model: Transformer, batch: Batch) -> Tensor:
    """What the value model expects before every response token, padded rows [b, T]."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)
    return batch.rows(model.scores(hidden[batch.predictors]) / model.config.score_std)[0]


@torch.no_grad()
def sample(models: Models, prompts: list[list[int]], tokenizer: Tokenizer, step: int, config: Config) -> list[Tree]:
    """n replies to every prompt, as trees. Random numbers are those of (seed, step, prompt, reply) on any rank."""
    if models.sampler is not models.policy:
        distributed.copy_weights(models.policy, models.sampler)
    mine = list(range(len(prompts)))[distributed.rank() :: distributed.world_size()]
    answers = generate(models.sampler, [prompts[i] for i in mine], config.max_tokens, config.temperature, n=config.n,
                       stop_ids=tokenizer.stop_ids(), seed=config.seed * 1_000_003 + step, numbers=mine, slots=256)
    trees = [tree_from_replies(i, prompts[i], [s.tokens for s in said], [s.finished for s in said])
             for i, said in zip(mine, answers, strict=True)]
    return sorted(distributed.all_gather(trees), key=lambda tree: tree.record)


@torch.no_grad()
def score(trees: list[Tree], models: Models, config: Config, device: torch.device) -> Rollout:
    """Everything about the replies that the updates will need, from the four models."""
    finished = torch.tensor([not r.cut for tree in trees for r in tree.responses])
    lengths = torch.tensor([r.end for tree in trees for r in tree.responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tables = torch.zeros(4, *mask.shape)
    logprobs, ref_logprobs, entropy, values = tables
    scores = torch.zeros(len(lengths))
    std = models.reward_model.config.score_std
    for batch in micro_batches(trees, config.micro_tokens):
        rows, batch = batch.response_ids, batch.to(device)
        found, entropies, _ = response_logprobs(models.policy, batch, config.temperature, entropy=True)
        parts = [found, response_logprobs(models.reference, batch, config.temperature)[0], entropies]
        if models.value is not None:
            parts.append(response_values(models.value, batch))
        for table, part in zip(tables, parts, strict=False):
            table[rows, : part.shape[1]] += batch.weight * part.float().cpu()
        scores[rows] += batch.weight * (response_scores(models.reward_model, batch) / std).float().cpu()
    distributed.all_reduce(tables)
    distributed.all_reduce(scores)
    if not scores.isfinite().all():
        fail(f"reward_model={config.reward_model}: gives scores that are not finite: train it again, or use "
             "dtype=float32")
    scores = scores.clamp(-config.score_clip, config.score_clip)
    endless = scores - config.penalty if config.missing_eos == "subtract" else torch.full_like(scores, -config.penalty)
    kl = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[config.kl](logprobs, ref_logprobs)
    return Rollout(trees, torch.where(finished, scores, endless), finished, mask, logprobs, kl, entropy, values)


def find_advantages(rollout: Rollout, kl_coef: float, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, whitened advantages and returns of a rollout, [B, T] each."""
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.mask, kl_coef)
    if config.advantages == "gae":
        advantages, returns = gae(rewards, rollout.values, rollout.mask, config.gamma, config.gae_lambda)
    else:
        returns = rewards.sum(1, keepdim=True).expand_as(rewards)
        advantages = rloo_advantages(returns[:, 0], config.n)[:, None].expand_as(rewards)
    return rewards, whiten(advantages, rollout.mask), returns


# ------------------------------------------------------------------------------------------ updating

def train_step(
    models: Models, batch: Batch, rows: Tensor, rollout: Rollout, advantages: Tensor, returns: Tensor, tokens: int,
    config: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of an update's loss and metrics, means over the minibatch's `tokens`."""
    logprobs, mask = response_logprobs(models.policy, batch, config.temperature)     # [b, T]
    old, advantages, old_values, returns = (table[rows, : mask.shape[1]].to(mask.device) for table in (
        rollout.logprobs, advantages, rollout.values, returns))
    loss, metrics = policy_loss(logprobs, old, advantages, mask, config.clip_eps, tokens)
    if models.value is not None:
        values = response_values(models.value, batch)
        error, value_metrics = value_loss(values, old_values, returns, mask, config.value_clip, tokens)
        loss, metrics = loss + config.value_coef * error, metrics | value_metrics
    weights = {name: 1.0 if name == "ratio_max" else batch.weight for name in metrics}
    return batch.weight * loss, {name: weights[name] * value for name, value in metrics.items()}


def update(
    models: Models, optimizer: runtime.AdamW, rollout: Rollout, advantages: Tensor, returns: Tensor, step: int,
    config: Config, device: torch.device,
) -> dict[str, float]:
    """epochs x minibatches updates on one rollout; metrics are means over them, ratio_max the largest."""
    sums, norms, ratio_max, updates = runtime.Sums(), runtime.Sums(), 0.0, 0
    for chosen in minibatches(len(rollout.trees), step, config):
        drawn, updates = [rollout.trees[i] for i in chosen], updates + 1
        replies = torch.from_numpy((chosen[:, None] * config.n + np.arange(config.n)).flatten())  # rows of the rollout
        tokens = sum(tree.learnt for tree in drawn)
        for batch in micro_batches(drawn, config.micro_tokens):
            loss, parts = train_step(models, batch.to(device), replies[batch.response_ids], rollout, advantages,
                                     returns, tokens, config)
            loss.backward()
            ratio_max = max(ratio_max, parts.pop("ratio_max").item())
            sums.add(parts)
        for name, model in (("policy", models.policy), ("value", models.value)):
            if model is not None:
                norm = distributed.clip_grad_norm(model, config.max_grad_norm)
                runtime.check_finite(sums["policy_loss"], norm, step, [])
                norms[f"{name}_grad_norm"] = norms.get(f"{name}_grad_norm", 0.0) + norm
        optimizer.step()
        optimizer.zero_grad()
    means = {name: value / updates for name, value in (distributed.all_reduce_metrics(sums) | norms).items()}
    return means | {"ratio_max": distributed.all_reduce_max(ratio_max)}


def minibatches(count: int, step: int, config: Config) -> Iterator[np.ndarray]:
    """Which of the rollout's prompts each update of the step learns from: every one once an epoch, in a new order.

    The last rollout of an epoch may hold fewer prompts than minibatches: then each makes an update of its own.
    """
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, step, epoch]).permutation(count)
        yield from np.array_split(order, min(config.minibatches, count))


def out_of_bounds(metrics: dict[str, float], config: Config) -> str:
    """Why training should end here; "" if it should not."""
    bounds = {"kl": (metrics["kl"] > config.max_kl, "max_kl"),
              "eos_rate": (metrics["eos_rate"] < config.min_eos, "min_eos"),
              "ratio_max": (metrics["ratio_max"] > config.max_ratio, "max_ratio")}
    for name, (beyond, limit) in bounds.items():
        if beyond:
            bound = f"{limit}={getattr(config, limit):g}"
            return f"{name} is {metrics[name]:.3g}, the limit is {bound}: lower lr or raise kl_coef"
    return ""


# -------------------------------------------------------------------------------------------- the run

def rollout_metrics(rollout: Rollout, rewards: Tensor, returns: Tensor, times: list[float]) -> dict[str, float]:
    """Means over replies; `times` are those before and after sampling, after scoring and after the updates, seconds."""
    mask, lengths, tokens = rollout.mask, rollout.mask.sum(1), int(rollout.mask.sum())
    explained = 0.0  # without a value model, and where returns do not vary: of a single token
    if rollout.values.any() and tokens > 1 and (variance := returns[mask].var()) > 0:
        explained = 1 - ((returns - rollout.values)[mask].var() / variance).item()
    began, sampled, scored, updated = times
    return {
        "score": rollout.scores.mean().item(), "kl": torch.where(mask, rollout.kl, 0.0).sum(1).mean().item(),
        "reward": rewards.sum(1).mean().item(), "entropy": masked_mean(rollout.entropy, mask).item(),
        "explained_variance": explained,
        "length": lengths.float().mean().item(), "eos_rate": rollout.finished.float().mean().item(),
        "tokens": tokens, "tokens_per_s": tokens / (updated - began),
        "sampling_tokens_per_s": tokens / (sampled - began), "scoring_tokens_per_s": tokens / (scored - sampled),
        "updating_tokens_per_s": tokens / (updated - scored),
    }


def room(models: Models, config: Config) -> int:
    """Tokens that a prompt may have, for a reply of max_tokens to fit behind it: beyond learned positions none can."""
    others = [model.config for model in (models.reward_model, models.value) if model is not None]
    positions = min([models.policy.config.max_positions, *(c.max_positions for c in others if not c.rotary)])
    if positions <= config.max_tokens:
        fail(f"max_tokens is {config.max_tokens}, the models have {positions} positions, which leaves none for a "
             "prompt: lower max_tokens")
    return positions - config.max_tokens


def main(config: Config) -> None:
    if config.dry_run:
        return dry_run_of_four(config)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels, config.dtype)
    tokenizer = load_tokenizer(config.model)
    if not tokenizer.template:
        fail(f"{config.model}: carries no chat template, expected the result of sft.py")
    models = load_models(config, tokenizer, device)
    prompts = load_prompts(config.data, tokenizer, room(models, config), cache=config.cache, columns=config.columns)
    print(f"data: {len(prompts)} prompts, at most {prompts.segments['length'].max()} tokens")

    run = runtime.Run(config, {"data": config.data, "model": config.model, "reward_model": config.reward_model,
                               "code": __file__})
    optimizer = make_optimizer(models, config)
    trained = nn.ModuleDict({name: getattr(models, name) for name in ("policy", "value") if getattr(models, name)})
    run.resume(trained, optimizer, config.steps, ("score", "kl", "length", "eos_rate", "tokens_per_s"), "prompts")
    last = run.last_metrics()
    kl_coef, reason = last.get("next_kl_coef", config.kl_coef), out_of_bounds(last, config) if last else ""

    for step in range(run.done, run.done if reason else config.steps):  # a run out of bounds is not resumed
        times = [time.perf_counter()]
        lr = runtime.set_learning_rate(optimizer, step, config.steps, config)
        drawn = [tree.trunk.tolist() for tree in step_trees(prompts, config.batch, step, config.seed)]
        trees = sample(models, drawn, tokenizer, step, config)
        times.append(time.perf_counter())
        rollout = score(trees, models, config, device)
        rewards, advantages, returns = find_advantages(rollout, kl_coef, config)
        times.append(time.perf_counter())
        metrics = update(models, optimizer, rollout, advantages, returns, step, config, device)
        times.append(time.perf_counter())

        metrics |= rollout_metrics(rollout, rewards, returns, times) | {"lr": lr, "kl_coef": kl_coef}
        if config.kl_target:
            kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], len(rollout.scores), config.kl_target, config.kl_horizon)
        run.log(metrics | {"next_kl_coef": kl_coef})
        reason = out_of_bounds(metrics, config)
        if reason or run.due(config.show_every, run.done):
            run.note(scored_replies(trees, rollout.scores, rollout.kl, tokenizer))
        if config.snapshot_every and run.done % config.snapshot_every == 0:
            save_snapshot(models.policy, run.folder, run.done, tokenizer, config)
        if run.stopping or reason or run.due(config.save_every, run.done):
            run.save(trained, optimizer)
        if run.stopping or reason:
            break

    if reason:
        run.note(f"ended early after step {run.done}: {reason}")
    if run.finished or reason:
        whole = models.policy.base if config.lora_rank else models.policy
        lora.save_result(whole, run.folder, tokenizer, config, prompts[0].trunk.tolist(), "policy")
    run.close(run.finished or bool(reason))


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
