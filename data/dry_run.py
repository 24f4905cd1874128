"""`--dry-run` of every training script: check a run's settings, model and data, and say where memory will go.

The model is built without memory (on PyTorch's meta device), so config.json is enough. The arithmetic:

    full fine-tuning   16 bytes a weight: the weight, its gradient and AdamW's two moments, all fp32
                       + 2 more for the bf16 copies that autograd keeps when activations are bf16
    LoRA               2 bytes a weight for the frozen base as stored, 16 for each of the adapters'
    QLoRA              0.52 bytes a weight in NF4 (kernels/nf4.py), 1 in int8; embeddings, norms and heads as stored

    activations        of a micro-batch: what the backward pass of each block needs, per token

        4 D + (2 H + 2 K) E + 4 F    numbers     D: input, after the norm, after attention, after its norm
                                                 (H + 2 K) E: queries, keys, values; H E: attention's output
                                                 F: gate, its activation, up, their product; two without a gate

    PyTorch's attention, on a CPU, keeps its probabilities as well: H numbers for every token that a token sees.
    With checkpointing each block keeps its input alone, D, and one block at a time the rest.

    several GPUs       with full fine-tuning they share weights, gradients and moments; activations each has for itself
"""
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import lora
from checkpoints import check_weights, expect_replies
from data.files import exists
from data.four_models import SLOTS
from data.pack import check_positions, steps_per_epoch
from data.tokenizer import load_tokenizer
from families import read_config
from model import Transformer, add_score_head
from runtime import Settings


def activations(config, bytes_each: int, rank: int = 0, checkpointing: bool = False) -> int:
    """Bytes that the backward pass keeps per token, of a model's config; attention's statistics and the head aside."""
    heads, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    norms = 2 * config.width if config.norms == 2 else config.width
    block = 2 * config.width + norms + 2 * heads + 2 * keys + (4 if config.gated else 2) * config.mlp_width
    block += 7 * rank  # what lies between A and B
    return bytes_each * (config.width * config.layers + block if checkpointing else block * config.layers)


# Memory of GPUs one can rent, GB. On one GPU 2 GB are left for what is not counted (CUDA's own, the head's pieces);
# where several share a model a fifth, as each gathers the embedding, the head and the block that runs.
SIZES, SPARE, SHARED_SIZE, SHARED_PART = (12, 16, 24, 48, 80, 141), 2, 80, 0.8


def hardware(plan: dict[str, int], shared: bool, reference: int = 0) -> str:
    """The GPUs that hold a run, of its plan; `shared`: several may share weights (full fine-tuning).

    The bytes of a reference stand beside weights and adapters, and before the first step only.
    """
    steps = sum(size for part, size in plan.items() if part not in ("parameters", "trained"))
    together = max(steps, plan["weights"] + plan["adapters"] + reference) / 1e9
    one = next((f"one GPU of {size} GB" for size in SIZES if together + SPARE <= size), "")
    if not shared or together + SPARE <= SHARED_SIZE:
        return one or f"more than one GPU of {SIZES[-1]} GB has"
    split = sum(plan.get(part, 0) for part in ("weights", "gradients", "optimizer", "teacher"))
    count = 2
    while (split / count + plan["activations"]) / 1e9 > SHARED_PART * SHARED_SIZE:
        count *= 2
    nodes = f"--nnodes {count // 8} " if count > 8 else ""
    several = f"{count} GPUs of {SHARED_SIZE} GB (torchrun {nodes}--nproc-per-node {min(count, 8)})"
    return f"{one}, or {several}" if one else several


def base_bytes(model: nn.Module, stored: int, quantize: str) -> int:
    """Bytes of a frozen base whose numbers have `stored` bytes."""
    linear = sum(p.numel() for name, p in model.layers.named_parameters() if name.endswith("_proj.weight"))
    rest = sum(p.numel() for p in model.parameters()) - linear
    each = {"none": stored, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256, "int8": 1.0}[quantize]
    return round(linear * each) + rest * stored


def plan(
    path: str, settings: Settings, dtype: str, micro_tokens: int, scored: bool = False, trained: bool = True,
) -> dict[str, int]:
    """Bytes by part of one model of a run, and its numbers of parameters under "parameters" and "trained"."""
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
        if not scored:
            expect_replies(model, path)
        elif not config.scored:
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


def show_plan(path: str, found: dict[str, int], dtype: str, micro_tokens: int, reference: int = 0) -> None:
    """Print where memory goes, and whether the weights fit config.json. A reference's bytes are freed before step 1."""
    print(f"{path}: {found['parameters']:,} parameters, {found['trained']:,} train, computing in {dtype}")
    parts = {part: size for part, size in found.items() if part not in ("parameters", "trained")}
    for part, size in parts.items():
        if size:
            tokens = f"  of {micro_tokens:,} tokens" if part == "activations" else ""
            print(f"  {part:<12} {size / 1e9:10.3f} GB{tokens}")
    if reference:
        print(f"  {'reference':<12} {reference / 1e9:10.3f} GB  beside weights and adapters, before step 1 only")
    most = max(sum(parts.values()), found["weights"] + found["adapters"] + reference)
    print(f"  {'together':<12} {most / 1e9:10.3f} GB")
    print(f"  weights: {compare_weights(path)}")


def compare_weights(path: str) -> str:
    """Whether a directory's weights fit its config.json; those that do not are refused."""
    if not any(Path(path).glob("*.safetensors")):
        return "none here yet"
    with torch.device("meta"):
        check_weights(Path(path), Transformer(read_config(path)))
    return "names and shapes fit config.json"


def compute_name(settings: Settings) -> str:
    """The dtype to plan for; auto is bfloat16, as on the GPU a run is planned for (a CPU may take float32)."""
    return "bfloat16" if settings.dtype == "auto" else settings.dtype


def dry_run(config, load_data, scored: bool = False, teacher: bool = False) -> None:
    """A run's model, the ref_model of DPO or a distillation's teacher, and its data; load_data is the script's."""
    dtype = compute_name(config)
    found = plan(config.model, config, dtype, config.micro_tokens, scored)
    if teacher and not config.lora_rank:  # a copy of the model; with adapters it is the model without them
        found["teacher"] = found["weights"]
    ref_model = getattr(config, "ref_model", "")
    for path in filter(None, (config.model, ref_model)):
        check_positions(read_config(path), "max_length", config.max_length)
    reference = plan(ref_model, replace(config, lora_rank=0, quantize="none"), dtype, 0)["weights"] if ref_model else 0
    show_plan(config.model, found, dtype, config.micro_tokens, reference)
    print(f"  needs: {hardware(found, not config.lora_rank, reference)}")
    if ref_model:
        print(f"  weights of {ref_model}: {compare_weights(ref_model)}")
    for name, path in (("data", config.data), ("eval_data", config.eval_data)):
        if path and exists(path) and any(Path(config.model).glob("tokenizer*")):
            tokenizer = load_tokenizer(config.model)
            tokenizer.adopt(config.template)
            trees = load_data(path, tokenizer, config, name)
            steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
            print(f"  {steps} steps of {config.batch} dialogues" if name == "data" else f"  {len(trees)} in eval_data")
        elif path:
            print(f"  {name}: {path} is not read, as it or the model's tokenizer is missing")


def plan_of_four(config, dtype: str) -> dict[str, int]:
    """As plan, for ppo.py's four models, all of the policy's size, in turns. Prompts count as long as replies."""
    model = read_config(config.model)
    policy = plan(config.model, config, dtype, config.micro_tokens)
    frozen = plan(config.model, config, dtype, 0, trained=False)
    value = dict.fromkeys(policy, 0)
    if config.advantages == "gae":
        value = plan(config.model, config, dtype, 0, scored=True)
    if config.lora_rank:
        one_base = config.reward or (Path(config.reward_model) / "adapter_config.json").is_file()
        weights = policy["weights"] * (1 if one_base else 2)
    else:
        weights = policy["weights"] + value["weights"] + (1 if config.reward else 2) * frozen["weights"]
    sampler = frozen["weights"] if dtype == "bfloat16" and not config.lora_rank else 0
    cached = min(SLOTS, config.batch * config.n) * 2 * config.max_tokens  # tokens
    numbers = 2 * model.layers * model.kv_heads * model.head_dim  # of keys and values, a token
    found = {part: policy[part] + value[part] for part in policy}
    return found | {"weights": weights, "parameters": policy["parameters"], "sampler": sampler,
                    "KV cache": cached * numbers * (2 if dtype == "bfloat16" else 4)}


def dry_run_of_four(config) -> None:
    """As dry_run, for ppo.py, whose data are prompts to sample from."""
    dtype = compute_name(config)
    if not config.reward and (Path(config.reward_model) / "config.json").is_file():
        read_config(config.reward_model)
    found = plan_of_four(config, dtype)
    show_plan(config.model, found, dtype, config.micro_tokens)
    print(f"  needs: {hardware(found, shared=False)}")
    print(f"  {config.steps} steps of {config.batch} prompts")
