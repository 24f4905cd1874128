"""The four models of PPO: policy, reference, reward model and value model, whole or as adapters on one base.

A reward that is a function takes no reward model, and advantages other than GAE's no value model.
"""
from pathlib import Path
from typing import NamedTuple

import torch

import lora
import runtime
from checkpoints import load_model, save_model
from data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from model import Transformer, add_score_head
from runtime import distributed, fail

SLOTS = 256  # replies that are sampled together, at most


class Models(NamedTuple):
    """The four models; with adapters they are roles on one frozen base (lora.Role)."""

    policy: Transformer
    reference: Transformer            # the policy before its first update
    reward_model: Transformer | None  # None if the reward is a function
    value: Transformer | None         # None if advantages are not GAE's
    sampler: Transformer              # the policy; if that is sharded, a whole copy of it on every rank


def value_source(config) -> str:
    """The checkpoint that the value model starts from; "policy" is the policy's, with a head of zeros; "" for none."""
    if config.advantages != "gae":
        return ""
    return config.value_model or ("policy" if config.reward else config.reward_model)


def load_models(config, tokenizer: Tokenizer, device: torch.device) -> Models:
    """Policy and value model to train, reference and reward model in the dtype of compute; or roles on one base."""
    if config.lora_rank:
        return load_roles(config, tokenizer, device)

    def load(path: str, scored: bool, trained: bool, new_head: bool = False) -> Transformer:
        model = lora.load_base(path, config, device, scored=scored and not new_head, trained=trained)
        check_tokenizer(model, path, tokenizer)
        if new_head:
            add_score_head(model, 0).score_head.weight.data.zero_()
        return lora.shard(model, config, device)

    value, source = None, value_source(config)
    if source:
        value = load(config.model if source == "policy" else source, True, True, new_head=source == "policy")
    policy, reference = load(config.model, scored=False, trained=True), load(config.model, scored=False, trained=False)
    reward_model = None if config.reward else load(config.reward_model, scored=True, trained=False)
    return Models(policy, reference, reward_model, value, make_sampler(policy, config.model, device))


def load_roles(config, tokenizer: Tokenizer, device: torch.device) -> Models:
    """The policy and value models are adapters, the reference is the base with none on.

    The reward model is an adapter too if reward_model is one; else a second base, quantised like the first, with the
    value adapter on it. Dropout is off: the ratio to what was sampled starts at 1.
    """
    bases: dict[str, Transformer] = {}

    def load(path: str, scored: bool) -> Transformer:
        if path not in bases:
            bases[path] = lora.load_base(path, config, device, scored=scored)
            check_tokenizer(bases[path], path, tokenizer)
        return bases[path]

    def scorer(path: str, name: str) -> lora.Role:
        if path == "policy":
            lora.adapt(base, config, name)
            return lora.Role(base, name, torch.zeros(1, base.config.width))
        if (Path(path) / "adapter_config.json").is_file():
            return lora.load_role(base, path, name)
        model = load(path, scored=True)
        if name == "value":
            lora.adapt(model, config, name)
        return lora.Role(model, name, model.score_head.weight, model.config.score_mean, model.config.score_std)

    base = lora.adapt(load(config.model, scored=False), config, "policy")
    reward_model = None if config.reward else scorer(config.reward_model, "reward")
    source = value_source(config)
    value = scorer(source, "value") if source else None
    for layer in (layer for model in bases.values() for layer in model.lora_layers):
        for adapter in layer.adapters.values():
            adapter.dropout = 0.0
    roles = lora.Role(base, "policy"), lora.Role(base, None), reward_model, value
    for role, trained in zip(roles, (True, False, False, True), strict=True):
        if role is not None:
            role.to(device).requires_grad_(trained)
    return Models(*roles, sampler=roles[0])


def room(models: Models, config) -> int:
    """Tokens that a prompt may have, for a reply of max_tokens to fit behind it: beyond learned positions none can."""
    others = [model.config for model in (models.reward_model, models.value) if model is not None]
    positions = min([models.policy.config.max_positions, *(c.max_positions for c in others if not c.rotary)])
    if positions <= config.max_tokens:
        fail(f"max_tokens is {config.max_tokens}, the models have {positions} positions, which leaves none for a "
             "prompt: lower max_tokens")
    return positions - config.max_tokens


def check_tokenizer(model: Transformer, path: str, tokenizer: Tokenizer) -> None:
    """Exit with one line if the model reads other tokens than the policy writes."""
    other = load_tokenizer(path)
    check_vocabulary(model, other)
    if [other.name(i) for i in range(other.vocab_size)] != [tokenizer.name(i) for i in range(tokenizer.vocab_size)]:
        fail(f"{path}: has another tokenizer than the policy: train it from that model")


def make_sampler(policy: Transformer, path: str, device: torch.device) -> Transformer:
    """The policy; if it is sharded, or a GPU would cast its weights every token, a whole copy to compute with."""
    sharded = distributed.is_sharded(policy)
    cast = device.type == "cuda" and policy.compute_dtype not in (None, policy.embed_tokens.weight.dtype)
    if not (sharded or cast):
        return policy
    model = load_model(path, dtype=torch.float32, device=device).requires_grad_(False)
    model.compute_dtype = policy.compute_dtype
    # Products round their matrix in any case, Triton's log-probabilities the head, and shards are gathered with norms.
    rounded = [p for p in model.layers.parameters() if sharded or p.ndim == 2] + [model.head_weight] * cast
    for weight in rounded:
        weight.data = weight.data.to(policy.compute_dtype)
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
