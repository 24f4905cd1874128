"""Proximal policy optimization: sample replies, let a reward model or a rule score them, learn from the scores.

    each step   sample      replies y from the policy, temperature as in training, no truncation of the distribution
                score       r(x, y), one number per reply, given at its last token; a reply without end gets a penalty
                reward_t  = -kl_coef * (log pi(y_t) - log pi_ref(y_t)),  + r(x, y) at the last token
                advantage   GAE over rewards and values, whitened over all tokens of the step; or see below
                update      some epochs of minibatches, ratio = pi(y_t) / pi_old(y_t):
                            mean of max(-A ratio, -A clip(ratio, 1 - c, 1 + c))  +  value loss, clipped the same way

The reward is sparse: nothing but the KL term until the reply ends. r is a reward model, or with `reward` a function of
yours (rewards/functions.py). The reference is the policy before its first update. With lora_rank the models are one
frozen base: policy, value and reward model are its adapters, the reference is the base alone.

    advantages   gae         as above, with a value model, which the others do without
                 reinforce   rewards still to come
                 rloo        R - mean R of the other replies to the prompt, R the sum of a reply's rewards
                 grpo        (R - mean R) / standard deviation of R, over the prompt's replies; with kl_in=loss kl=k3
                 dr_grpo     R - mean R, over the prompt's replies

The last three also divide the loss as their papers do (token_weights). RLOO is its paper's as long as a rollout gives
one update; in further ones the ratio is clipped token by token.

    python ppo.py --config configs/tiny/ppo.toml            score, kl, length and share of ended replies, step by step
    python ppo.py --config configs/tiny/ppo_rule.toml       the same with a rule in place of the reward model

Schulman et al. 2017 (arXiv:1707.06347); Ziegler et al. 2019 (arXiv:1909.08593); Ouyang et al. 2022
(arXiv:2203.02155); details after Huang et al. 2024 (arXiv:2403.17031). RLOO: Ahmadian et al. 2024 (arXiv:2402.14740);
GRPO: Shao et al. 2024 (arXiv:2402.03300); Dr. GRPO: Liu et al. 2025 (arXiv:2503.20783).
"""
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
from data.four_models import SLOTS, Models, load_models, make_optimizer, room, save_snapshot
from data.pack import Batch, micro_batches, scored_replies, step_trees
from data.scores import response_scores
from data.tokenizer import Tokenizer, load_tokenizer
from data.trees import Tree, tree_from_replies
from kernels.logprobs import linear_logprobs
from model import Transformer, generate
from rewards.functions import function_scores, load_functions, load_prompts_and_records
from runtime import distributed, fail


@dataclass(frozen=True)
class Config(runtime.Settings):
    model: str = "runs/tiny/0/sft/model"  # the policy to start from, and the reference; usually the result of sft.py
    reward_model: str = "runs/tiny/0/reward/model"  # result of reward.py; not read if there is a `reward`
    reward: str = ""                 # in its place "file.py:function", or several: "a.py:f + 0.5 * b.py:g"
    value_model: str = ""            # to start from, or "policy"; "": the reward model, with a `reward` the policy
    data: str = "runs/tiny/0/pairs.jsonl"  # JSONL of records with a "prompt" (data/formats.py)
    out: str = "runs/ppo"            # folder of the run

    steps: int = 40                  # rollouts
    batch: int = 128                 # prompts per rollout
    n: int = 1                       # replies per prompt; rloo, grpo and dr_grpo need at least 2
    max_tokens: int = 64             # of a reply
    temperature: float = 1.0         # of sampling, and of every log-probability
    missing_eos: Literal["replace", "subtract"] = "replace"  # a reply without end gets -penalty, or its score - penalty
    penalty: float = 2.0             # as scores are: in a reward model's standard deviations, or in points of `reward`
    score_clip: float = 4.0          # largest absolute score of a reward model, in standard deviations

    kl: Literal["k1", "k2", "k3"] = "k1"  # estimator of the KL term, and of the KL in the log
    kl_in: Literal["reward", "loss"] = "reward"  # right are k1 in the reward and k2 in the loss (kl_k1, kl_k2)
    kl_coef: float = 0.2             # its weight, 0.01-0.5
    kl_target: float = 0.0           # nats per reply: adapt kl_coef to keep it; 0: kl_coef is fixed
    kl_horizon: int = 10000          # replies over which the coefficient adapts
    advantages: Literal["gae", "reinforce", "rloo", "grpo", "dr_grpo"] = "gae"
    whiten: Literal["auto", "on", "off"] = "auto"  # advantages with mean 0 and deviation 1 over the step; auto: of gae
    gamma: float = 1.0               # discount per token
    gae_lambda: float = 0.95         # 1 trusts rewards alone, 0 the value model
    clip_eps: float = 0.2            # c, of the policy's ratio
    value_clip: float = 0.2          # how far a value may move from the old one
    value_coef: float = 0.1          # of the value loss; Adam undoes it, only max_grad_norm feels it: set value_lr

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
        if self.advantages in GROUPED and self.n < 2:
            fail(f"n is 1, expected at least 2 with advantages={self.advantages}: a reply is compared with the others "
                 "to its prompt")
        if self.kl_in == "loss" and self.kl == "k1" and self.kl_coef:
            fail("kl is 'k1' with kl_in='loss', where its gradient is zero in the mean: set kl=k2, or kl_in=reward")


# ------------------------------------------------------------------------------------ the equations
# B replies, padded to T tokens; mask [B, T] is True on real tokens. Log-probabilities are in nats.

# Estimators of KL(pi || pi_ref) from samples of pi (Schulman 2020). What estimates the value may not give its gradient:
# cosine of the expected gradient with the true one, mean of 50 random pairs of distributions on eight categories.
#
#                  k1      k2      k3
#    in reward   1.00    0.68    0.23
#    in loss        0    1.00    0.86     k1's there is the gradient of log pi alone: zero in the mean, pure noise

def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log-ratio d: unbiased, may be negative. As a reward it has the gradient of the KL."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative. As a loss it has the gradient of the KL."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative. The loss of GRPO, with the gradient of KL(pi_ref || pi)."""
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


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
    return dr_grpo_advantages(returns, n) * (n / (n - 1))


def grpo_advantages(returns: Tensor, n: int) -> Tensor:
    """(return - mean) / standard deviation (of n - 1) over the replies to a prompt, [B]; 0 where all are equal."""
    return dr_grpo_advantages(returns, n) / returns.view(-1, n).std(1).clamp(min=1e-4).repeat_interleave(n)


def dr_grpo_advantages(returns: Tensor, n: int) -> Tensor:
    """return - mean over the replies to a prompt, [B]: a prompt on which replies differ little counts little."""
    groups = returns.view(-1, n)
    return (groups - groups.mean(1, keepdim=True)).flatten()


GROUPED = {"rloo": rloo_advantages, "grpo": grpo_advantages, "dr_grpo": dr_grpo_advantages}


def token_weights(advantages: str, lengths: Tensor, tokens: int, replies: int, max_tokens: int) -> Tensor:
    """What a token of each reply [B] counts in a loss that is a mean over the minibatch's `tokens`.

        gae, reinforce   mean over tokens                                        1
        rloo             mean over replies of the sum over their tokens          tokens / replies
        grpo             mean over replies of the mean over their tokens         tokens / (replies * length)
        dr_grpo          mean over replies of the sum over tokens / max_tokens   tokens / (replies * max_tokens)
    """
    ones = torch.ones_like(lengths, dtype=torch.float32)
    divisors = {"rloo": ones, "grpo": lengths, "dr_grpo": max_tokens * ones}
    return tokens / (replies * divisors[advantages]) if advantages in divisors else ones


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
    denominator: float | None = None, weights: Tensor | float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (PPO, Eq. 7) over the masked tokens [B, T]: mean, or sum over `denominator`; and metrics.

        ratio = pi / pi_old,    loss = mean of weight max(-A ratio, -A clip(ratio, 1 - clip_eps, 1 + clip_eps))

    `weights` [B, 1] are those of token_weights; metrics are means over tokens whatever they are.
    """
    denominator = mask.sum() if denominator is None else denominator
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = (weights * torch.where(mask.bool(), torch.maximum(free, clipped), 0.0)).sum() / denominator
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
    scores: Tensor         # [B] a reward model's in standard deviations, penalties included
    finished: Tensor       # [B] bool, ended by an end-of-sequence token
    mask: Tensor           # [B, T]
    logprobs: Tensor       # [B, T] of the policy as it sampled
    ref_logprobs: Tensor   # [B, T]
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
                       stop_ids=tokenizer.stop_ids(), seed=config.seed * 1_000_003 + step, numbers=mine, slots=SLOTS,
                       keep=models.sampler.embed_tokens.weight.is_cuda)
    trees = [tree_from_replies(i, prompts[i], [s.tokens for s in said], [s.finished for s in said])
             for i, said in zip(mine, answers, strict=True)]
    return sorted(distributed.all_gather(trees), key=lambda tree: tree.record)


@torch.no_grad()
def score(
    trees: list[Tree], models: Models, config: Config, device: torch.device, given: Tensor | None = None,
) -> Rollout:
    """Everything about the replies that the updates will need, from the models; scores are `given`, or the fourth's."""
    finished = torch.tensor([not r.cut for tree in trees for r in tree.responses])
    lengths = torch.tensor([r.end for tree in trees for r in tree.responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tables = torch.zeros(4, *mask.shape)
    logprobs, ref_logprobs, entropy, values = tables
    scores = torch.zeros(len(lengths))
    for batch in micro_batches(trees, config.micro_tokens):
        rows, batch = batch.response_ids, batch.to(device)
        found, entropies, _ = response_logprobs(models.policy, batch, config.temperature, entropy=True)
        parts = [found, response_logprobs(models.reference, batch, config.temperature)[0], entropies]
        if models.value is not None:
            parts.append(response_values(models.value, batch))
        for table, part in zip(tables, parts, strict=False):
            table[rows, : part.shape[1]] += batch.weight * part.float().cpu()
        if given is None:
            found = response_scores(models.reward_model, batch) / models.reward_model.config.score_std
            scores[rows] += batch.weight * found.float().cpu()
    distributed.all_reduce(tables)
    distributed.all_reduce(scores)
    if not scores.isfinite().all():
        fail(f"reward_model={config.reward_model}: gives scores that are not finite: train it again, or use "
             "dtype=float32")
    scores = scores.clamp(-config.score_clip, config.score_clip) if given is None else given.float()
    endless = scores - config.penalty if config.missing_eos == "subtract" else torch.full_like(scores, -config.penalty)
    kl = KL[config.kl](logprobs, ref_logprobs)
    scores = torch.where(finished, scores, endless)
    return Rollout(trees, scores, finished, mask, logprobs, ref_logprobs, kl, entropy, values)


def find_advantages(rollout: Rollout, kl_coef: float, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, advantages and returns of a rollout, [B, T] each."""
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.mask, kl_coef if config.kl_in == "reward" else 0.0)
    if config.advantages in GROUPED:
        returns = rewards.sum(1, keepdim=True).expand_as(rewards)
        advantages = GROUPED[config.advantages](returns[:, 0], config.n)[:, None].expand_as(rewards)
    else:  # without values and with lambda 1 GAE gives the rewards still to come
        gae_lambda = config.gae_lambda if config.advantages == "gae" else 1.0
        advantages, returns = gae(rewards, rollout.values, rollout.mask, config.gamma, gae_lambda)
    if config.whiten == "on" or (config.whiten == "auto" and config.advantages == "gae"):
        advantages = whiten(advantages, rollout.mask)
    return rewards, advantages, returns


# ------------------------------------------------------------------------------------------ updating

def train_step(
    models: Models, batch: Batch, rows: Tensor, rollout: Rollout, advantages: Tensor, returns: Tensor, kl_coef: float,
    tokens: int, replies: int, config: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of an update's loss and metrics, means over the minibatch's `tokens` (or `replies`)."""
    logprobs, mask = response_logprobs(models.policy, batch, config.temperature)     # [b, T]
    old, ref_logprobs, advantages, old_values, returns = (table[rows, : mask.shape[1]].to(mask.device) for table in (
        rollout.logprobs, rollout.ref_logprobs, advantages, rollout.values, returns))
    weights = token_weights(config.advantages, mask.sum(1), tokens, replies, config.max_tokens)[:, None]  # [b, 1]
    loss, metrics = policy_loss(logprobs, old, advantages, mask, config.clip_eps, tokens, weights)
    if config.kl_in == "loss":
        kl = torch.where(mask, KL[config.kl](logprobs, ref_logprobs), 0.0)
        kl_loss = kl_coef * (weights * kl).sum() / tokens
        loss, metrics = loss + kl_loss, metrics | {"kl_loss": kl_loss.detach()}
    if models.value is not None:
        values = response_values(models.value, batch)
        error, value_metrics = value_loss(values, old_values, returns, mask, config.value_clip, tokens)
        loss, metrics = loss + config.value_coef * error, metrics | value_metrics
    weights = {name: 1.0 if name == "ratio_max" else batch.weight for name in metrics}
    return batch.weight * loss, {name: weights[name] * value for name, value in metrics.items()}


def update(
    models: Models, optimizer: runtime.AdamW, rollout: Rollout, advantages: Tensor, returns: Tensor, kl_coef: float,
    step: int, config: Config, device: torch.device,
) -> dict[str, float]:
    """epochs x minibatches updates on one rollout; metrics are means over them, ratio_max the largest."""
    sums, norms, ratio_max, updates = runtime.Sums(), runtime.Sums(), 0.0, 0
    for chosen in minibatches(len(rollout.trees), step, config):
        drawn, updates = [rollout.trees[i] for i in chosen], updates + 1
        replies = torch.from_numpy((chosen[:, None] * config.n + np.arange(config.n)).flatten())  # rows of the rollout
        tokens = sum(tree.learnt for tree in drawn)
        for batch in micro_batches(drawn, config.micro_tokens):
            loss, parts = train_step(models, batch.to(device), replies[batch.response_ids], rollout, advantages,
                                     returns, kl_coef, tokens, len(replies), config)
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


def main(config: Config) -> None:
    functions = load_functions(config.reward)
    if config.dry_run:
        return dry_run_of_four(config)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels, config.dtype)
    if config.kl_in == "reward" and config.kl != "k1" and config.kl_coef:
        print(f"warning: the gradient of kl={config.kl} in the reward is not the KL's: set kl=k1, or kl=k2 kl_in=loss")
    tokenizer = load_tokenizer(config.model)
    if not tokenizer.template:
        fail(f"{config.model}: carries no chat template, expected the result of sft.py")
    models = load_models(config, tokenizer, device)
    prompts, records = load_prompts_and_records(functions, config.data, tokenizer, room(models, config),
                                                cache=config.cache, columns=config.columns)
    print(f"data: {len(prompts)} prompts, at most {prompts.segments['length'].max()} tokens")

    scorers = {f"reward {f.file}": f.file for f in functions} or {"reward_model": config.reward_model}
    run = runtime.Run(config, {"data": config.data, "model": config.model, **scorers, "code": __file__})
    optimizer = make_optimizer(models, config)
    trained = nn.ModuleDict({name: getattr(models, name) for name in ("policy", "value") if getattr(models, name)})
    run.resume(trained, optimizer, config.steps, ("score", "kl", "length", "eos_rate", "tokens_per_s"), "prompts")
    last = run.last_metrics()
    kl_coef, reason = last.get("next_kl_coef", config.kl_coef), out_of_bounds(last, config) if last else ""

    for step in range(run.done, run.done if reason else config.steps):  # a run out of bounds is not resumed
        times = [time.perf_counter()]
        lr = runtime.set_learning_rate(optimizer, step, config.steps, config, first=1)  # at rate 0 a rollout is wasted
        drawn = step_trees(prompts, config.batch, step, config.seed)
        trees = sample(models, [tree.trunk.tolist() for tree in drawn], tokenizer, step, config)
        times.append(time.perf_counter())
        given, fault = function_scores(functions, trees, drawn, records, tokenizer)
        if fault:
            run.save(trained, optimizer)
            save_snapshot(models.policy, run.folder, run.done, tokenizer, config)
            fail(f"step {step + 1}: reward: {fault}; {run.folder} holds the state and the model of step {run.done}")
        rollout = score(trees, models, config, device, given)
        rewards, advantages, returns = find_advantages(rollout, kl_coef, config)
        times.append(time.perf_counter())
        metrics = update(models, optimizer, rollout, advantages, returns, kl_coef, step, config, device)
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
