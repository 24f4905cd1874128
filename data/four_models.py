"""The four models of PPO: policy, reference, reward model and value model, whole or as adapters on one base."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

import lora
import runtime
from checkpoints import load_model, save_model
from data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from model import Transformer
from runtime import distributed, fail


class Models(NamedTuple):
    """The four models; with adapters they are roles on one frozen base (lora.Role)."""

    policy: Transformer
    reference: Transformer            # the policy before its first update
    reward_model: Transformer
    value: Transformer | None         # None for rloo
    sampler: Transformer              # the policy; if that is sharded, a whole copy of it on every rank


def load_models(config, tokenizer: Tokenizer, device: torch.device) -> Models:
    """Four models; with lora_rank four roles on one frozen base."""
    return (load_roles if config.lora_rank else load_four)(config, tokenizer, device)


def load_four(config, tokenizer: Tokenizer, device: torch.device) -> Models:
    """Policy and value model to train, reference and reward model in the dtype of compute."""
    def load(path: str, scored: bool, trained: bool) -> Transformer:
        model = lora.load_base(path, config, device, scored=scored, trained=trained)
        check_tokenizer(model, path, tokenizer)
        return lora.shard(model, config, device)

    value = None
    if config.advantages == "gae":
        value = load(config.value_model or config.reward_model, scored=True, trained=True)
    policy, reference = load(config.model, scored=False, trained=True), load(config.model, scored=False, trained=False)
    reward_model = load(config.reward_model, scored=True, trained=False)
    return Models(policy, reference, reward_model, value, make_sampler(policy, config.model, device))


def load_roles(config, tokenizer: Tokenizer, device: torch.device) -> Models:
    """The policy and value models are adapters, the reference is the base with none on.

    The reward model is an adapter too if reward_model is one (runs/reward/adapter). Otherwise it is a second base,
    quantised like the first, with the value adapter on it.
    """
    bases: dict[str, Transformer] = {}

    def load(path: str, scored: bool) -> Transformer:
        if path not in bases:
            bases[path] = lora.load_base(path, config, device, scored=scored)
            check_tokenizer(bases[path], path, tokenizer)
        return bases[path]

    def scorer(path: str, name: str) -> lora.Role:
        if (Path(path) / "adapter_config.json").is_file():
            return lora.load_role(base, path, name)
        model = load(path, scored=True)
        if name == "value":
            lora.adapt(model, config, name)
        return lora.Role(model, name, model.score_head.weight, model.config.score_mean, model.config.score_std)

    base = lora.adapt(load(config.model, scored=False), config, "policy")
    reward_model = scorer(config.reward_model, "reward")
    value = scorer(config.value_model or config.reward_model, "value") if config.advantages == "gae" else None
    roles = lora.Role(base, "policy"), lora.Role(base, None), reward_model, value
    for role, trained in zip(roles, (True, False, False, True), strict=True):
        if role is not None:
            role.to(device).requires_grad_(trained)
    return Models(*roles, sampler=roles[0])


def check_tokenizer(model: Transformer, path: str, tokenizer: Tokenizer) -> None:
    """Exit with one line if the model reads other tokens than the policy writes."""
    other = load_tokenizer(path)
    check_vocabulary(model, other)
    if [other.name(i) for i in range(other.vocab_size)] != [tokenizer.name(i) for i in range(tokenizer.vocab_size)]:
        fail(f"{path}: has another tokenizer than the policy: train it from that model")


def make_sampler(policy: Transformer, path: str, device: torch.device) -> Transformer:
    """The policy, or if it is sharded a whole copy of it on every rank, so that none waits for another's replies."""
    if not distributed.is_sharded(policy):
        return policy
    model = load_model(path, dtype=torch.float32, device=device).requires_grad_(False)
    model.layers.to(policy.compute_dtype)  # as the shards are gathered
    model.compute_dtype = policy.compute_dtype
    return model


def make_optimizer(models: Models, config) -> runtime.AdamW:
    """One optimizer of the policy and the value model, each with its own learning rate."""
    shared = config.weight_decay, config.beta2, config.lora_plus, config.adam_eps
    optimizer = runtime.adamw(models.policy, config.lr, *shared)
    if models.value is not None:
        groups = runtime.adamw(models.value, config.value_lr, *shared)
        for group in groups.param_groups:
            optimizer.param_groups.append(group | {"scale": group["scale"] * config.value_lr / config.lr})
    return optimizer


def save_snapshot(policy: Transformer, folder: Path, done: int, tokenizer: Tokenizer, config) -> None:
    """The policy as it is after `done` steps, a checkpoint of its own."""
    if config.lora_rank:
        lora.save_adapter(policy.base, folder / f"adapter_step_{done}", "policy", tokenizer)
    else:
        save_model(policy, folder / f"model_step_{done}", tokenizer, dtype=getattr(torch, policy.config.dtype))
