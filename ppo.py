"""Proximal policy optimization: learn from a reward model's scores of one's own replies.

    each step   sample      replies y from the policy, temperature as in training, no truncation of the distribution
                score       r(x, y), one number per reply, given at its last token; a reply without end gets a penalty
                reward_t  = -kl_coef * (log pi(y_t) - log pi_ref(y_t)),  + r(x, y) at the last token
                advantage   GAE over rewards and values, whitened over all tokens of the step
                update      some epochs of minibatches, ratio = pi(y_t) / pi_old(y_t):
                            mean of max(-A ratio, -A clip(ratio, 1 - c, 1 + c))  +  value loss, clipped alike

The reward is sparse: nothing but the KL term until the reply ends. The reference is the policy before its first
update. The value model starts from the reward model and says after every token what score is still to come;
advantages = "rloo" does without one and compares replies to the same prompt. With lora_rank the four models are one
frozen base: policy, value and reward model are its adapters, the reference is the base alone.

    python ppo.py --config configs/tiny/ppo.toml            score, kl, length and the share of ended replies, step by step

Schulman et al. 2017 (arXiv:1707.06347); Ziegler et al. 2019 (arXiv:1909.08593); Ouyang et al. 2022
(arXiv:2203.02155); details after Huang et al. 2024 (arXiv:2403.17031); RLOO: Ahmadian et al. 2024 (arXiv:2402.14740).
"""
from __future__ import annotations

import json
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import lora
import runtime
from checkpoints import load_model, save_model
from data.formats import read
from data.pack import Batch, Response, Tree, share, step_trees
from data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from kernels.logprobs import linear_logprobs
from model import Transformer, generate
from reward import response_scores
from runtime import check_range, distributed, fail, memory


@dataclass(frozen=True)
class Config(lora.Options):
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
    missing_eos: Literal["replace", "subtract"] = "replace"  # what a reply without end of sequence gets: -penalty, or its score - penalty
    penalty: float = 2.0             # in standard deviations of the score, as scores are
    score_clip: float = 4.0          # largest absolute score, in standard deviations

    kl: Literal["k1", "k2", "k3"] = "k1"  # estimator of the KL term in the reward
    kl_coef: float = 0.2             # its weight, 0.01-0.5
    kl_target: float = 0.0           # nats per reply: adapt kl_coef to keep it; 0: kl_coef is fixed
    kl_horizon: int = 10000          # replies over which the coefficient adapts
    advantages: Literal["gae", "rloo"] = "gae"
    gamma: float = 1.0               # discount per token
    lam: float = 0.95                # GAE's lambda: 1 trusts rewards alone, 0 the value model
    ratio_clip: float = 0.2          # c, of the policy's ratio
    value_clip: float = 0.2          # how far a value may move from the old one
    value_coef: float = 0.1          # weight of the value loss

    epochs: int = 2                  # passes over a rollout, 1-4
    minibatches: int = 2             # updates per pass
    micro_tokens: int = 4096         # tokens of a micro-batch, what fits in memory
    lr: float = 1e-4                 # of the policy, 1e-4 for the tiny model, 1e-6 to 3e-6 for 7B
    value_lr: float = 3e-4           # of the value model
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    floor: float = 0.1               # final rate as a share of the peak
    warmup: float = 0.05             # share of the steps with a rising rate
    weight_decay: float = 0.0
    beta2: float = 0.95
    clip: float = 1.0                # largest norm of the gradient, of each model
    max_kl: float = 50.0             # stop when a reply is this many nats from the reference in the mean,
    max_ratio: float = 100.0         # a token has become this much likelier within a step,
    min_eos: float = 0.2             # or fewer than this share of replies end

    seed: int = 0                    # order of the prompts, sampling
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 where the hardware multiplies it
    device: str = "auto"             # cpu, cuda, auto
    threads: int = 0                 # CPU threads; 0: PyTorch's choice
    save_every: int = 0              # steps between checkpoints; 0: at the end only
    snapshot_every: int = 0          # steps between models kept as model_step_N; 0: none
    show_every: int = 0              # steps between tables of sampled replies; 0: at the end only
    wandb: Literal["off", "offline", "online"] = "off"
    overwrite: bool = False          # start anew in a folder that holds another run

    def __post_init__(self):
        super().__post_init__()
        for key, low, high in (
            ("steps", 1, inf), ("batch", 1, inf), ("n", 1, inf), ("max_tokens", 1, inf), ("temperature", 1e-6, 10), ("penalty", 0, inf),
            ("score_clip", 1e-6, inf), ("kl_coef", 0, inf), ("kl_target", 0, inf), ("kl_horizon", 1, inf), ("gamma", 0, 1), ("lam", 0, 1),
            ("ratio_clip", 0, 0.999), ("value_clip", 0, inf), ("value_coef", 0, inf), ("epochs", 1, inf), ("minibatches", 1, self.batch),
            ("micro_tokens", 1, inf), ("lr", 1e-12, 1), ("value_lr", 1e-12, 1), ("floor", 0, 1), ("warmup", 0, 0.99),
            ("weight_decay", 0, 1), ("beta2", 0, 0.99999), ("clip", 1e-6, inf), ("max_kl", 0, inf), ("max_ratio", 1, inf),
            ("min_eos", 0, 1), ("seed", 0, 10**9), ("threads", 0, 1024), ("save_every", 0, inf), ("snapshot_every", 0, inf),
            ("show_every", 0, inf),
        ):
            check_range(key, getattr(self, key), low, high)
        if self.advantages == "rloo" and self.n < 2:
            fail("n is 1, expected at least 2 with advantages=rloo: a reply is compared with the others to its prompt")


# ------------------------------------------------------------------------------------ the equations
# B replies, padded to T tokens; mask [B, T] is True on real tokens. Log-probabilities are in nats.

def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log-ratio d: unbiased, may be negative. The three estimators of KL(pi || pi_ref) from samples of pi: Schulman 2020."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative; its gradient is that of the KL."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative."""
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards [B, T]: -kl_coef * kl everywhere, the score [B] added at each reply's last token. With kl_coef 0 they sum to the score."""
    rewards = torch.where(mask.bool(), -kl_coef * kl, 0.0)
    last = mask.long().sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages (Schulman et al. 2015, arXiv:1506.02438) and returns, both [B, T].

        delta_t = reward_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    R_t = A_t + V_t

    V is 0 after the last token; whatever stands behind the mask counts for nothing.
    """
    rewards, values = (torch.where(mask.bool(), x, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def rloo_advantages(returns: Tensor, n: int) -> Tensor:
    """Each reply's return minus the mean of the n - 1 others to its prompt, [B]; replies to one prompt stand together."""
    groups = returns.view(-1, n)
    return ((groups - groups.mean(1, keepdim=True)) * (n / (n - 1))).flatten()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x [B, T] with standard deviation 1 (unbiased variance) over the mask, and mean 0, or its own with shift_mean=False."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask) * mask.sum() / (mask.sum() - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (PPO, Eq. 7) over the masked tokens [B, T]: its mean, or its sum over `denominator`; and metrics.

        ratio = pi / pi_old,    loss = mean of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))
    """
    denominator = mask.sum() if denominator is None else denominator
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
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
    """0.5 * mean of max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), or the sum over `denominator`; and metrics."""
    denominator = mask.sum() if denominator is None else denominator
    near = old_values + (values - old_values).clamp(-clip, clip)
    free, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * torch.where(mask.bool(), torch.maximum(free, clipped), 0.0).sum() / denominator
    fraction = masked_mean((clipped > free).to(values), mask) * mask.sum() / denominator
    return loss, {"value_loss": loss.detach(), "value_clip_fraction": fraction.detach()}


def adapt_kl_coef(kl_coef: float, kl: float, episodes: int, target: float, horizon: int) -> float:
    """kl_coef nudged towards the one that keeps KL at `target` nats per reply (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


# ------------------------------------------------------------------------------------------ a rollout

class Rollout(NamedTuple):
    """What a step has sampled and found out: B = prompts x n replies, those to one prompt together."""

    trees: list[Tree]      # a prompt each, its replies as leaves; tree.record is its number
    scores: Tensor         # [B] in standard deviations, penalties included
    finished: Tensor       # [B] bool, ended by an end-of-sequence token
    mask: Tensor           # [B, T]
    logprobs: Tensor       # [B, T] of the policy as it sampled
    kl: Tensor             # [B, T] by config.kl
    entropy: Tensor        # [B, T] nats
    values: Tensor         # [B, T] of what is still to come, before each token


def load_prompts(path: str, tokenizer: Tokenizer, room: int) -> list[list[int]]:
    """The distinct prompts of a file, rendered up to where the reply begins, at most `room` tokens each."""
    records, report = read(path)
    records = list(records)
    report.refuse()
    if report.format not in ("preference", "ranking", "prompt"):
        fail(f"{path}: holds {report.format} records, expected records with a 'prompt'")
    prompts = [tokenizer.render(record["prompt"], add_generation_prompt=True)[0] for record in records]
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > room:
            fail(f"{path} record {number}: the prompt has {len(prompt)} tokens and a reply of max_tokens must fit behind it, "
                 f"expected at most {room}: drop it or lower max_tokens")
    return [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]


def reply_tree(number: int, prompt: list[int], replies: list[list[int]], finished: list[bool]) -> Tree:
    """A prompt as a trunk and its sampled replies as leaves."""
    return Tree(np.array(prompt, np.int32), [(len(prompt), np.array(reply, np.int32)) for reply in replies],
                [Response(i + 1, 0, len(reply), pair=i, cut=not end) for i, (reply, end) in enumerate(zip(replies, finished, strict=True))],
                record=number)


def row_numbers(batch: Batch, n: int) -> Tensor:
    """[b] which replies of the rollout a batch holds."""
    return torch.tensor([tree.record * n + i for tree in batch.trees for i in range(n)])


def response_logprobs(model: Transformer, batch: Batch, temperature: float, entropy: bool = False):
    """Log-probability of every response token given its path, and the entropy there if asked: padded rows [b, T], and their mask.

    The head runs on response tokens alone.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)                                                # [N, D]
    logprobs, entropies = linear_logprobs(hidden[batch.predictors], model.head_weight, batch.targets, temperature, entropy=entropy)
    rows, mask = batch.rows(logprobs)
    return (rows, batch.rows(entropies)[0], mask) if entropy else (rows, mask)


def response_values(model: Transformer, batch: Batch) -> Tensor:
    """What the value model expects before every response token, padded rows [b, T]."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)
    return batch.rows(model.scores(hidden[batch.predictors]) / model.config.score_std)[0]


@torch.no_grad()
def sample(policy: Transformer, prompts: list[list[int]], tokenizer: Tokenizer, step: int, config: Config) -> list[Tree]:
    """n replies to every prompt, as trees. Random numbers are those of (seed, step, prompt, reply), whichever rank it falls to."""
    mine = list(range(len(prompts)))[distributed.rank() :: distributed.world_size()]
    answers = generate(policy, [prompts[i] for i in mine], config.max_tokens, config.temperature, n=config.n,
                       stop_ids=tokenizer.stop_ids(), seed=config.seed * 1_000_003 + step, numbers=mine, slots=256)
    trees = [reply_tree(i, prompts[i], [s.tokens for s in said], [s.finished for s in said]) for i, said in zip(mine, answers, strict=True)]
    return sorted(distributed.all_gather(trees), key=lambda tree: tree.record)


@torch.no_grad()
def score(trees: list[Tree], policy: Transformer, reference: Transformer, reward_model: Transformer, value: Transformer | None,
          config: Config, device: torch.device) -> Rollout:
    """Everything about the replies that the updates will need, from the four models."""
    finished = torch.tensor([not r.cut for tree in trees for r in tree.responses])
    lengths = torch.tensor([r.end for tree in trees for r in tree.responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    logprobs, ref_logprobs, entropy, values = (torch.zeros(mask.shape) for _ in range(4))
    scores = torch.zeros(len(lengths))
    for batch in share(trees, config.micro_tokens):
        rows, batch = row_numbers(batch, config.n), batch.to(device)
        found, uncertain, _ = response_logprobs(policy, batch, config.temperature, entropy=True)
        width = found.shape[1]
        logprobs[rows, :width], entropy[rows, :width] = found.float().cpu(), uncertain.float().cpu()
        ref_logprobs[rows, :width] = response_logprobs(reference, batch, config.temperature)[0].float().cpu()
        if value is not None:
            values[rows, :width] = response_values(value, batch).float().cpu()
        scores[rows] = (response_scores(reward_model, batch) / reward_model.config.score_std).float().cpu()
        if not batch.counts:
            for table in (logprobs, ref_logprobs, entropy, values, scores):
                table[rows] = 0
    for table in (logprobs, ref_logprobs, entropy, values, scores):
        distributed.all_reduce(table)
    if not scores.isfinite().all():
        fail(f"reward_model={config.reward_model}: gives scores that are not finite: train it again, or use dtype=float32")
    scores = scores.clamp(-config.score_clip, config.score_clip)
    unended = scores - config.penalty if config.missing_eos == "subtract" else torch.full_like(scores, -config.penalty)
    kl = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[config.kl](logprobs, ref_logprobs)
    return Rollout(trees, torch.where(finished, scores, unended), finished, mask, logprobs, kl, entropy, values)


def find_advantages(rollout: Rollout, kl_coef: float, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, whitened advantages and returns of a rollout, [B, T] each."""
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.mask, kl_coef)
    if config.advantages == "gae":
        advantages, returns = gae(rewards, rollout.values, rollout.mask, config.gamma, config.lam)
    else:
        returns = rewards.sum(1, keepdim=True).expand_as(rewards)
        advantages = rloo_advantages(returns[:, 0], config.n)[:, None].expand_as(rewards)
    return rewards, whiten(advantages, rollout.mask), returns


# ------------------------------------------------------------------------------------------ updating

def update(policy: Transformer, value: Transformer | None, optimizer: runtime.AdamW, rollout: Rollout, advantages: Tensor,
           returns: Tensor, step: int, config: Config, device: torch.device) -> dict[str, float]:
    """epochs x minibatches updates on one rollout; metrics are means over them, ratio_max the largest."""
    metrics: dict[str, float] = {}
    norms: dict[str, float] = {}
    total = config.epochs * config.minibatches
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, step, epoch]).permutation(len(rollout.trees))
        for chosen in np.array_split(order, config.minibatches):
            drawn = [rollout.trees[i] for i in chosen]
            tokens = sum(tree.learnt for tree in drawn)
            for batch in share(drawn, config.micro_tokens):
                rows, batch = row_numbers(batch, config.n), batch.to(device)
                logprobs, mask = response_logprobs(policy, batch, config.temperature)
                width = mask.shape[1]
                old, advantage, old_values, target = (x[rows, :width].to(device)
                                                      for x in (rollout.logprobs, advantages, rollout.values, returns))
                loss, parts = policy_loss(logprobs, old, advantage, mask, config.ratio_clip, tokens)
                if value is not None:
                    missed, more = value_loss(response_values(value, batch), old_values, target, mask, config.value_clip, tokens)
                    loss, parts = loss + config.value_coef * missed, parts | more
                (loss * batch.counts).backward()
                for name, found in parts.items():
                    before = metrics.get(name, 0.0)
                    metrics[name] = max(before, found.item()) if name == "ratio_max" else before + found.item() * batch.counts / total
            for name, model in (("policy", policy), ("value", value)):
                if model is not None:
                    norm = distributed.clip_grad_norm(model, config.clip)
                    norms[f"{name}_grad_norm"] = norms.get(f"{name}_grad_norm", 0.0) + norm / total
                    runtime.check_finite(metrics["policy_loss"], norm, step, [])
            optimizer.step()
            optimizer.zero_grad()
    ratio_max = distributed.all_reduce_max(metrics.pop("ratio_max"))
    return distributed.all_reduce_metrics(metrics) | norms | {"ratio_max": ratio_max}


def out_of_bounds(metrics: dict[str, float], config: Config) -> str:
    """Why training should end here; "" if it should not."""
    for name, beyond, limit in (("kl", metrics["kl"] > config.max_kl, f"max_kl={config.max_kl:g}"),
                                ("ratio_max", metrics["ratio_max"] > config.max_ratio, f"max_ratio={config.max_ratio:g}"),
                                ("eos_rate", metrics["eos_rate"] < config.min_eos, f"min_eos={config.min_eos:g}")):
        if beyond:
            return f"{name} is {metrics[name]:.3g}, beyond {limit}: lower lr or raise kl_coef"
    return ""


def load_roles(config: Config, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype) -> tuple:
    """Policy, reference, reward model, and value model (None for rloo).

    Four models, or with lora_rank four roles on one frozen base: the policy and value models are adapters, the reference is
    the base with none on, and the reward model is an adapter too if reward_model is one (runs/reward/adapter). Otherwise it is
    a second base, quantised like the first, with the value adapter on it.
    """
    bases: dict[str, Transformer] = {}

    def load(path: str, scored: bool, trained: bool) -> Transformer:
        if config.lora_rank:
            model = bases[path] = bases.get(path) or lora.load_base(path, config, device, dtype)
        else:
            model = load_model(path, dtype=torch.float32 if trained else dtype, device="cpu" if distributed.world_size() > 1 else device)
            model.requires_grad_(trained)
            model.compute_dtype, model.checkpointing = dtype, config.checkpointing
        if model.config.scored != scored:
            fail(f"{path}: has no score head, expected the result of reward.py" if scored else
                 f"{path}: is a reward model, expected the result of sft.py")
        other = load_tokenizer(path)
        check_vocabulary(model, other)
        if [other.name(i) for i in range(other.vocab_size)] != [tokenizer.name(i) for i in range(tokenizer.vocab_size)]:
            fail(f"{path}: has another tokenizer than {config.model}: train it from that model")
        return lora.shard(model, config, device)

    value_path = config.value_model or config.reward_model if config.advantages == "gae" else ""
    if not config.lora_rank:
        value = load(value_path, scored=True, trained=True) if value_path else None
        policy, reference = load(config.model, scored=False, trained=True), load(config.model, scored=False, trained=False)
        return policy, reference, load(config.reward_model, scored=True, trained=False), value

    def scorer(path: str, name: str) -> lora.Role:
        if (Path(path) / "adapter_config.json").is_file():
            return lora.load_role(base, path, name)
        model = load(path, scored=True, trained=False)
        if name == "value":
            lora.adapt(model, config, config.seed, name)
        return lora.Role(model, name, model.score_head.weight, model.config.score_mean, model.config.score_std)

    base = lora.adapt(load(config.model, scored=False, trained=False), config, config.seed, "policy")
    reward_model, value = scorer(config.reward_model, "reward"), scorer(value_path, "value") if value_path else None
    roles = lora.Role(base, "policy"), lora.Role(base, None), reward_model, value
    for role, trained in zip(roles, (True, False, False, True), strict=True):
        if role is not None:
            role.to(device).requires_grad_(trained)
    return roles


def sampler(policy: Transformer, config: Config, device: torch.device) -> Transformer:
    """What samples: the policy, or if it is sharded a whole copy of it on every rank, so that none waits for another's replies."""
    if not distributed.is_sharded(policy):
        return policy
    model = load_model(config.model, dtype=torch.float32, device=device).requires_grad_(False)
    model.layers.to(policy.compute_dtype)  # as the shards are gathered
    model.compute_dtype = policy.compute_dtype
    return model


def main(config: Config) -> None:
    if config.dry_run:
        memory.dry_run(config, load_prompts)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels)
    tokenizer = load_tokenizer(config.model)
    if not tokenizer.template:
        fail(f"{config.model}: carries no chat template, expected the result of sft.py")
    policy, reference, reward_model, value = load_roles(config, tokenizer, device, runtime.compute_dtype(config.dtype, device))
    speaker = sampler(policy, config, device)
    prompts = load_prompts(config.data, tokenizer, policy.config.max_positions - config.max_tokens)
    print(f"data: {len(prompts)} prompts, at most {max(map(len, prompts))} tokens")
    depends_on = {"data": config.data, "model": config.model, "reward_model": config.reward_model, "code": __file__}
    run, lock = runtime.open_run(config.out, config, depends_on, config.overwrite)

    optimizer = runtime.adamw(policy, config.lr, config.weight_decay, config.beta2, config.lora_plus)
    models = nn.ModuleDict({"policy": policy})
    if value is not None:
        models["value"] = value
        for group in runtime.adamw(value, config.value_lr, config.weight_decay, config.beta2, config.lora_plus).param_groups:
            optimizer.param_groups.append(group | {"scale": group["scale"] * config.value_lr / config.lr})
    done = runtime.load_state(run, models, optimizer)
    log = runtime.Log(run, done, config.steps, ("score", "kl", "length", "eos_rate", "tokens_per_s"), config.wandb, config, config.profile)
    last_step = json.loads(log.file.read_text().splitlines()[-1]) if done else {}
    kl_coef = last_step.get("next_kl_coef", config.kl_coef)
    stop, reason = runtime.StopRequest(), out_of_bounds(last_step, config) if done else ""
    trained = sum(p.numel() for p in models.parameters())
    print(f"{trained:,} parameters trained, {config.steps} steps of {config.batch} prompts, {done} done")

    for step in range(done, done if reason else config.steps):  # a run that left its bounds is not gone on with
        began = time.perf_counter()
        lr = runtime.learning_rate(step, config.steps, config.lr, round(config.warmup * config.steps), config.schedule, config.floor)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        if speaker is not policy:
            distributed.copy_weights(policy, speaker)
        trees = sample(speaker, step_trees(prompts, config.batch, step, config.seed), tokenizer, step, config)
        sampled = time.perf_counter()
        rollout = score(trees, policy, reference, reward_model, value, config, device)
        rewards, advantages, returns = find_advantages(rollout, kl_coef, config)
        scored = time.perf_counter()
        metrics = update(policy, value, optimizer, rollout, advantages, returns, step, config, device)
        updated = time.perf_counter()

        mask, lengths = rollout.mask, rollout.mask.sum(1)
        metrics |= {
            "score": rollout.scores.mean().item(), "kl": torch.where(mask, rollout.kl, 0.0).sum(1).mean().item(),
            "reward": rewards.sum(1).mean().item(), "entropy": masked_mean(rollout.entropy, mask).item(),
            "explained_variance": 1 - ((returns - rollout.values)[mask].var() / returns[mask].var()).item() if value is not None else 0.0,
            "length": lengths.float().mean().item(), "eos_rate": rollout.finished.float().mean().item(), "lr": lr, "kl_coef": kl_coef,
        }
        if config.kl_target:
            kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], len(lengths), config.kl_target, config.kl_horizon)
        tokens = int(lengths.sum())
        metrics |= {"next_kl_coef": kl_coef, "tokens": tokens, "tokens_per_s": tokens / (updated - began),
                    "sampling_tokens_per_s": tokens / (sampled - began), "scoring_tokens_per_s": tokens / (scored - sampled),
                    "updating_tokens_per_s": tokens / (updated - scored)}
        done = step + 1
        log.step(done, metrics)
        reason = out_of_bounds(metrics, config)
        last = done == config.steps or bool(reason)
        if last or (config.show_every and done % config.show_every == 0):
            log.note(sample_table(rollout, tokenizer))
        if config.snapshot_every and done % config.snapshot_every == 0:
            if config.lora_rank:
                lora.save_adapter(policy.base, run / f"adapter_step_{done}", "policy")
            else:
                save_model(policy, run / f"model_step_{done}", tokenizer, dtype=getattr(torch, policy.config.dtype))
        stopping = distributed.any_rank(stop)
        if stopping or last or (config.save_every and done % config.save_every == 0):
            runtime.save_state(run, done, models, optimizer)
        if stopping or reason:
            break

    if reason:
        log.note(f"ended early after step {done}: {reason}")
    if done == config.steps or reason:
        lora.save_result(policy.base if config.lora_rank else policy, run, tokenizer, config, prompts[0], "policy")
    log.close()
    lock.close()
    print(f"wrote {run}/model" if done == config.steps or reason else f"stopped after step {done}; the same command goes on from there")


def sample_table(rollout: Rollout, tokenizer: Tokenizer, count: int = 4) -> str:
    """The first replies of a rollout with their scores."""
    replies = [(tree, r) for tree in rollout.trees for r in tree.responses][:count]
    lines = []
    for row, (tree, r) in enumerate(replies):
        asked = tokenizer.decode(tree.trunk.tolist())[-80:]
        said = tokenizer.decode(tree.leaves[r.segment - 1][1].tolist()).strip()
        lines.append(f"  score {rollout.scores[row]:+.2f}  kl {rollout.kl[row].sum():+.2f}  {asked!r} -> {said!r}{' ...' * r.cut}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
