"""Where the memory of a run goes, told before it is taken: `--dry-run` of every training script.

    full fine-tuning   16 bytes a weight: the weight, its gradient and AdamW's two moments, all fp32
                       + 2 more for the bf16 copies that autograd keeps when activations are bf16
    LoRA               2 bytes a weight for the frozen base as stored, 16 for each of the adapters'
    QLoRA              0.52 bytes a weight in NF4 (kernels/nf4.py), 1 in int8; embeddings, norms and heads as stored

    activations        of a micro-batch: what the backward pass of each block needs, per token

        4 D + (2 H + 2 K) E + 4 F    numbers     D: input, after the norm, after attention, after its norm
                                                 (H + 2 K) E: queries, keys, values; H E: attention's output
                                                 F: gate, its activation, up, their product; two without a gate

    With checkpointing each block keeps its input alone, D, and one block at a time the rest.

The model is built without memory (on PyTorch's meta device), so config.json is enough.
"""
from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

import lora
import runtime
from checkpoints import check_weights, read_config
from data.pack import steps_per_epoch
from data.tokenizer import load_tokenizer
from model import ModelConfig, Transformer, add_score_head


def activations(config: ModelConfig, bytes_each: int, rank: int = 0, checkpointing: bool = False) -> int:
    """Bytes that the backward pass keeps per token of a micro-batch, attention's bookkeeping and the head aside."""
    heads, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    norms = 2 * config.width if config.norms == 2 else config.width
    block = 2 * config.width + norms + 2 * heads + 2 * keys + (4 if config.gated else 2) * config.mlp_width
    block += 7 * rank  # what lies between A and B
    return bytes_each * (config.width * config.layers + block if checkpointing else block * config.layers)


def base_bytes(model: Transformer, stored: int, quantize: str) -> int:
    """Bytes of a frozen base whose numbers have `stored` bytes."""
    linear = sum(p.numel() for name, p in model.layers.named_parameters() if name.endswith("_proj.weight"))
    rest = sum(p.numel() for p in model.parameters()) - linear
    each = {"none": stored, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256, "int8": 1.0}[quantize]
    return round(linear * each) + rest * stored


def plan(path: str, options, dtype: str, micro_tokens: int, scored: bool = False, trained: bool = True) -> dict[str, int]:
    """Bytes by part of one model of a run, and its numbers of parameters under "parameters" and "trained"."""
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
        if scored and not config.scored:
            add_score_head(model, 0)
        total = sum(p.numel() for p in model.parameters())
        compute = 2 if dtype == "bfloat16" else 4
        stored = getattr(torch, config.dtype).itemsize
        if not options.lora_rank:
            weights, adapters = total * (4 if trained else stored), 0
        else:
            weights = base_bytes(model, stored, options.quantize)
            lora.adapt(model, options, 0)
            adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train = (adapters if options.lora_rank else total) if trained else 0
    copies = total * compute if trained and not options.lora_rank and compute == 2 else 0
    return {"parameters": total, "trained": train, "weights": weights, "adapters": 4 * adapters * trained, "gradients": 4 * train,
            "optimizer": 8 * train, "bf16 copies": copies,
            "activations": micro_tokens * activations(config, compute, options.lora_rank, options.checkpointing) * trained}


def ppo_plan(config, dtype: str) -> dict[str, int]:
    """As plan, of the four models of ppo.py: the largest activations count once, the models take turns."""
    policy = plan(config.model, config, dtype, config.micro_tokens)
    value = plan(config.model, config, dtype, 0, scored=True) if config.advantages == "gae" else dict.fromkeys(policy, 0)
    frozen = plan(config.model, config, dtype, 0, trained=False)
    shared = config.lora_rank > 0
    one_base = shared and (Path(config.reward_model) / "adapter_config.json").is_file()
    weights = policy["weights"] * (1 if one_base else 2) if shared else policy["weights"] + value["weights"] + 2 * frozen["weights"]
    return {part: policy[part] + value[part] for part in policy} | {"weights": weights, "parameters": policy["parameters"]}


def dry_run(config, load_data) -> NoReturn:
    """Check a run's settings, model and data as far as they are there, print where memory goes, and leave."""
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    if hasattr(config, "reward_model"):
        found, tokens = ppo_plan(config, dtype), config.micro_tokens
    else:
        found, tokens = plan(config.model, config, dtype, config.max_tokens, scored=hasattr(config, "centering")), config.max_tokens
    print(f"{config.model}: {found.pop('parameters'):,} parameters, {found.pop('trained'):,} train, computing in {dtype}")
    for part, size in found.items():
        if size:
            print(f"  {part:<12} {size / 1e9:10.3f} GB" + (f"  of {tokens:,} tokens" if part == "activations" else ""))
    print(f"  {'together':<12} {sum(found.values()) / 1e9:10.3f} GB")
    if any(Path(config.model).glob("*.safetensors")):
        with torch.device("meta"):
            check_weights(Path(config.model), Transformer(read_config(config.model)))
        print("  weights: names and shapes fit config.json")
    else:
        print("  weights: none here yet")
    if hasattr(config, "reward_model"):
        print(f"  {config.steps} steps of {config.batch} prompts")
    elif Path(config.data).exists() and any(Path(config.model).glob("tokenizer*")):
        tokenizer = load_tokenizer(config.model)
        tokenizer.adopt(config.template or tokenizer.template or "zephyr")
        steps = config.max_steps or config.epochs * steps_per_epoch(len(load_data(config.data, tokenizer, config, "data")), config.batch)
        print(f"  {steps} steps of {config.batch} dialogues")
    else:
        print(f"  data: {config.data} is not read, as it or the model's tokenizer is missing")
    raise SystemExit(0)


if __name__ == "__main__":
    runtime.fail("memory.py is not run by itself: python sft.py --config FILE --dry-run")
