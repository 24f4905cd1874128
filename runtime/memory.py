"""Where the memory of a run goes: the arithmetic behind `--dry-run` (data/dry_run.py).

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
from torch import nn


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
    """The GPUs that hold a run, of data/dry_run.py's plan; `shared`: several may share weights (full fine-tuning).

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
