"""`--dry-run` of every training script: check a run's settings, model and data, and say where memory will go.

The model is built without memory (on PyTorch's meta device), so config.json is enough. The arithmetic is in
runtime/memory.py.
"""
from __future__ import annotations

from pathlib import Path

import torch

import lora
from checkpoints import check_weights, read_config
from data.pack import steps_per_epoch
from data.tokenizer import load_tokenizer
from model import Transformer, add_score_head
from runtime import Settings
from runtime.memory import activations, base_bytes, hardware


def plan(
    path: str, settings: Settings, dtype: str, micro_tokens: int, scored: bool = False, trained: bool = True,
) -> dict[str, int]:
    """Bytes by part of one model of a run, and its numbers of parameters under "parameters" and "trained"."""
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
        if scored and not config.scored:
            add_score_head(model, 0)
        total = sum(p.numel() for p in model.parameters())
        compute = 2 if dtype == "bfloat16" else 4
        if not settings.lora_rank:
            weights, adapters = total * (4 if trained else compute), 0
        else:
            weights = base_bytes(model, getattr(torch, config.dtype).itemsize, settings.quantize)
            lora.adapt(model, settings)
            adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train = (adapters if settings.lora_rank else total) if trained else 0
    kept = micro_tokens * activations(config, compute, settings.lora_rank, settings.checkpointing)
    return {"parameters": total, "trained": train, "weights": weights, "adapters": 4 * adapters * trained,
            "gradients": 4 * train, "optimizer": 8 * train, "activations": kept * trained,
            "bf16 copies": total * compute if trained and not settings.lora_rank and compute == 2 else 0}


def show_plan(path: str, found: dict[str, int], dtype: str, micro_tokens: int) -> None:
    """Print where memory goes, and whether the weights fit config.json."""
    print(f"{path}: {found['parameters']:,} parameters, {found['trained']:,} train, computing in {dtype}")
    parts = {part: size for part, size in found.items() if part not in ("parameters", "trained")}
    for part, size in parts.items():
        if size:
            tokens = f"  of {micro_tokens:,} tokens" if part == "activations" else ""
            print(f"  {part:<12} {size / 1e9:10.3f} GB{tokens}")
    print(f"  {'together':<12} {sum(parts.values()) / 1e9:10.3f} GB")
    if any(Path(path).glob("*.safetensors")):
        with torch.device("meta"):
            check_weights(Path(path), Transformer(read_config(path)))
        print("  weights: names and shapes fit config.json")
    else:
        print("  weights: none here yet")


def compute_name(settings: Settings) -> str:
    """The dtype to plan for; auto is bfloat16, as on the GPU a run is planned for (a CPU may take float32)."""
    return "bfloat16" if settings.dtype == "auto" else settings.dtype


def dry_run(config, load_data, scored: bool = False) -> None:
    """One model and one data file; load_data is the script's. A teacher, a ref_model and eval_data are not counted."""
    dtype = compute_name(config)
    found = plan(config.model, config, dtype, config.micro_tokens, scored)
    show_plan(config.model, found, dtype, config.micro_tokens)
    print(f"  needs: {hardware(found, shared=not config.lora_rank)}")
    if Path(config.data).exists() and any(Path(config.model).glob("tokenizer*")):
        tokenizer = load_tokenizer(config.model)
        tokenizer.adopt(config.template)
        trees = load_data(config.data, tokenizer, config, "data")
        steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
        print(f"  {steps} steps of {config.batch} dialogues")
    else:
        print(f"  data: {config.data} is not read, as it or the model's tokenizer is missing")


def plan_of_four(config, dtype: str) -> dict[str, int]:
    """As plan, for ppo.py's four models, all of the policy's size; they take turns, so activations count once."""
    policy = plan(config.model, config, dtype, config.micro_tokens)
    frozen = plan(config.model, config, dtype, 0, trained=False)
    value = dict.fromkeys(policy, 0)
    if config.advantages == "gae":
        value = plan(config.model, config, dtype, 0, scored=True)
    if config.lora_rank:
        one_base = (Path(config.reward_model) / "adapter_config.json").is_file()
        weights = policy["weights"] * (1 if one_base else 2)
    else:
        weights = policy["weights"] + value["weights"] + 2 * frozen["weights"]
    found = {part: policy[part] + value[part] for part in policy}
    return found | {"weights": weights, "parameters": policy["parameters"]}


def dry_run_of_four(config) -> None:
    """As dry_run, for ppo.py, whose data are prompts to sample from."""
    dtype = compute_name(config)
    found = plan_of_four(config, dtype)
    show_plan(config.model, found, dtype, config.micro_tokens)
    print(f"  needs: {hardware(found, shared=False)}")
    print(f"  {config.steps} steps of {config.batch} prompts")
