"""Our side of `benchmarks/peers.py`: the steps of the training scripts, and the machine's floors.

The floor of SFT and DPO is a step written by hand for this one model: no padding, attention one sequence at a time by
scaled_dot_product_attention, the head on response tokens in chunks, fused AdamW; its products by oneDNN or, as PyTorch has it by
default, by MKL: the faster counts. That of sampling is the matrix products alone.
"""
from __future__ import annotations

import time

BEGAN = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import dpo  # noqa: E402
import lora  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import runtime  # noqa: E402
import sft  # noqa: E402
from benchmarks import peers_work as work  # noqa: E402
from checkpoints import load_model  # noqa: E402
from data.pack import CHOSEN, REJECTED, Response, Tree, pack  # noqa: E402
from model import add_score_head, generate  # noqa: E402

IMPORT_S = time.perf_counter() - BEGAN


def load(path: str, shape: work.Shape, dtype: torch.dtype | None = torch.float32, linear=None):
    """The model as a training script has it; with `dtype` None as stored."""
    model = load_model(path, dtype=dtype, device=shape.device, linear=linear)
    model.compute_dtype, model.checkpointing = getattr(torch, shape.dtype), shape.checkpointing
    return model


def sft_tree(pair: work.Pair) -> Tree:
    ids = np.array(pair.prompt + pair.chosen, np.int32)
    return Tree(ids, [], [Response(0, len(pair.prompt), len(ids))])


def pair_tree(turns: list[work.Pair]) -> Tree:
    """A dialogue rated at every turn, as data/pack.py lays it out."""
    tree = Tree(np.array(turns[-1].prompt + turns[-1].chosen, np.int32))
    for number, turn in enumerate(turns):
        start = len(turn.prompt)
        tree.leaves.append((start, np.array(turn.rejected, np.int32)))
        tree.responses += [Response(0, start, start + len(turn.chosen), number, CHOSEN, number + 1),
                           Response(number + 1, 0, len(turn.rejected), number, REJECTED, number + 1)]
    return tree


def training(model, shape: work.Shape, trees: list[Tree], backward) -> work.Step:
    """The loop of the scripts: pack, micro-batches, clip, AdamW. `backward` takes the step's batches, gives the loss."""
    optimizer = runtime.adamw(model, work.LR, 0.0)
    steps = iter(range(work.STEPS))

    def step() -> dict:
        at = next(steps) * shape.batch
        chosen = trees[at : at + shape.batch]
        loss = backward(pack(chosen, shape.micro_tokens))
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(tree.tokens for tree in chosen)
        operations = shape.operations(tokens, sum(tree.learnt for tree in chosen), sum(map(seen, chosen)))
        return {"units": tokens, "items": len(chosen), "loss": loss, "operations": operations}
    return step


def seen(tree: Tree) -> int:
    """Keys that attention looks at, summed over the tokens of the trunk and of the leaves that start behind its first `start`."""
    trunk, leaves = len(tree.trunk), [(start, len(leaf)) for start, leaf in tree.leaves]
    return trunk * (trunk + 1) // 2 + sum(start * length + length * (length + 1) // 2 for start, length in leaves)


def add_up(parts) -> float:
    """Backward through each micro-batch's loss; their sum."""
    total = 0.0
    for loss, _ in parts:
        loss.backward()
        total += loss.item()
    return total


def sft_step(model, shape: work.Shape) -> work.Step:
    def backward(batches):
        tokens = sum(len(batch.owner) for batch in batches)
        return add_up(sft.train_step(model, batch.to(shape.device), tokens) for batch in batches)
    return training(model, shape, [sft_tree(pair) for pair in work.pairs(shape)], backward)


def dpo_step(model, shape: work.Shape, trees: list[Tree], path: str, cached: bool) -> work.Step:
    """The reference's log-probabilities are there beforehand, or a part of the step."""
    config, reference = dpo.Config(beta=work.BETA), model if cached else load(path, shape).requires_grad_(False)

    @torch.no_grad()
    def refer(batches):
        for batch in batches:
            sums = dpo.response_sums(reference, batch.to(shape.device)).split([len(tree.responses) for tree in batch.trees])
            for tree, part in zip(batch.trees, sums, strict=True):
                tree.ref_sums = part

    def backward(batches):
        if not cached:
            refer(batches)
        pairs = sum(batch.pairs for batch in batches)
        return add_up(dpo.train_step(model, batch.to(shape.device), config, pairs) for batch in batches)

    began = time.perf_counter()
    if cached:
        refer(pack(trees, shape.micro_tokens))
    each = (time.perf_counter() - began) / len(trees)
    step = training(model, shape, trees, backward)
    return lambda: step() | {"reference_s": each}


def reward_step(model, shape: work.Shape, trees: list[Tree]) -> work.Step:
    config = reward.Config()

    def backward(batches):
        groups = sum(batch.pairs for batch in batches)
        return add_up(reward.train_step(model, batch.to(shape.device), config, groups) for batch in batches)
    return training(add_score_head(model, 0), shape, trees, backward)


def sampling_step(model, shape: work.Shape, batch: int, top_p: bool) -> work.Step:
    prompts = work.prompts(shape, batch)
    settings = {"temperature": 0.8, "top_p": 0.9} if top_p else {"temperature": 0.0}

    def step() -> dict:
        found = generate(model, prompts, work.NEW, **settings, slots=batch)
        return {"units": sum(len(s.tokens) for one in found for s in one)}
    return step


def mixed_step(model, shape: work.Shape) -> work.Step:
    prompts, limits = work.prompts(shape, work.MIXED), work.reply_lengths()

    def step() -> dict:
        found = generate(model, prompts, limits, temperature=0.8, top_p=0.9, slots=64)
        return {"units": sum(len(s.tokens) for one in found for s in one)}
    return step


class NoTokenizer:
    """Random replies have no end."""

    def stop_ids(self) -> tuple[int, ...]:
        return ()


def ppo_step(model, shape: work.Shape, path: str, kind: str) -> work.Step:
    """rloo: one update a rollout, as TRL's; ppo: a value model, two epochs of two minibatches."""
    reference = load(path, shape).requires_grad_(False)
    reward_model = add_score_head(load(path, shape), 0).requires_grad_(False)
    value = add_score_head(load(path, shape), 1) if kind == "ppo" else None
    times = {"gae": (2, 2), "rloo": (1, 1)}
    advantages = "gae" if kind == "ppo" else "rloo"
    config = ppo.Config(advantages=advantages, n=work.RL_REPLIES, max_tokens=work.NEW, kl_coef=0.05, epochs=times[advantages][0],
                        minibatches=times[advantages][1])
    optimizer = runtime.adamw(model, work.LR, 0.0)
    if value is not None:
        optimizer.param_groups += runtime.adamw(value, work.LR, 0.0).param_groups
    prompts, device = work.prompts(shape, work.RL_PROMPTS * work.STEPS), torch.device(shape.device)
    steps = iter(range(work.STEPS))

    def step() -> dict:
        number, began = next(steps), time.perf_counter()
        asked = prompts[number * work.RL_PROMPTS : (number + 1) * work.RL_PROMPTS]
        trees = ppo.sample(model, asked, NoTokenizer(), number, config)
        sampled = time.perf_counter()
        rollout = ppo.score(trees, model, reference, reward_model, value, config, device)
        _, advantages, returns = ppo.find_advantages(rollout, config.kl_coef, config)
        scored = time.perf_counter()
        ppo.update(model, value, optimizer, rollout, advantages, returns, number, config, device)
        return {"units": len(rollout.scores), "sampling_s": sampled - began, "scoring_s": scored - sampled,
                "updating_s": time.perf_counter() - scored}
    return step


# -------------------------------------------------------------------------------------- the floor

def floor_step(model, shape: work.Shape, kind: str) -> work.Step:
    """One flat row of all sequences; 2,048 response tokens at a time in the head. DPO's loss costs as much as this one."""
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=work.LR, weight_decay=0.0, fused=True)
    heads, half = shape.heads, shape.width // shape.heads // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    items, steps = work.pairs(shape), iter(range(work.STEPS))

    def norm(x, name):
        return F.rms_norm(x, (shape.width,), weights[name], 1e-5)

    def turned(x, cos, sin):
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def step() -> dict:
        number = next(steps)
        chosen = items[number * shape.batch : (number + 1) * shape.batch]
        rows = [(pair.prompt, reply) for pair in chosen for reply in (pair[1:] if kind == "dpo" else pair[1:2])]
        sizes = [len(prompt) + len(reply) for prompt, reply in rows]
        ids, positions = torch.tensor([i for row in rows for part in row for i in part]), torch.cat([torch.arange(n) for n in sizes])
        angles = positions[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        x = weights["embed_tokens.weight"][ids]
        for layer in range(shape.layers):
            block = f"layers.{layer}."
            h = norm(x, block + "input_layernorm.weight")
            q, k, v = (F.linear(h, weights[f"{block}self_attn.{p}_proj.weight"]).unflatten(-1, (heads, -1)) for p in "qkv")
            parts = zip(turned(q, cos, sin).split(sizes), turned(k, cos, sin).split(sizes), v.split(sizes), strict=True)
            out = [F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part), is_causal=True)[0].transpose(0, 1)
                   for part in parts]
            x = x + F.linear(torch.cat(out).flatten(1), weights[block + "self_attn.o_proj.weight"])
            h = norm(x, block + "post_attention_layernorm.weight")
            gate, up = (F.linear(h, weights[f"{block}mlp.{p}_proj.weight"]) for p in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, weights[block + "mlp.down_proj.weight"])
        x = norm(x, "norm.weight")
        ends = np.cumsum(sizes)
        predictors = torch.cat([torch.arange(end - len(reply) - 1, end - 1) for end, (_, reply) in zip(ends, rows, strict=True)])
        targets, hidden = ids[predictors + 1], x[predictors]
        cut = hidden.detach().requires_grad_()  # the head's graph goes chunk by chunk
        loss = 0.0
        for part, target in zip(cut.split(2048), targets.split(2048), strict=True):
            missed = F.cross_entropy(F.linear(part, weights["embed_tokens.weight"]), target, reduction="sum") / len(targets)
            missed.backward()
            loss += missed.item()
        hidden.backward(cut.grad)
        torch.nn.utils.clip_grad_norm_(weights.values(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return {"units": sum(sizes), "items": len(chosen), "loss": loss}
    return step


def decoding_floor(model, batch: int) -> work.Step:
    """As many times as tokens are sampled, every weight's product with a batch of rows."""
    weights = [p.detach() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name] + [model.head_weight.detach()]
    rows = [torch.randn(batch, weight.shape[1]) for weight in weights]

    def step() -> dict:
        for _ in range(work.NEW):
            for weight, row in zip(weights, rows, strict=True):
                F.linear(row, weight)
        return {"units": batch * work.NEW}
    return step


def prepare(task: str, shape: work.Shape, path: str) -> work.Step:
    runtime.setup(shape.device, 0)
    kind, *rest = task.split()
    trained = torch.float32 if kind not in ("sample", "qlora") else None
    model = load(path, shape, trained, lora.QUANTIZED["nf4"] if kind == "qlora" else None)
    if kind == "sft":
        return sft_step(model, shape)
    if kind == "floor":
        if rest[-1] == "mkl":
            torch.set_float32_matmul_precision("highest")
        return decoding_floor(model, int(rest[1])) if rest[0] == "sample" else floor_step(model, shape, rest[0])
    if kind in ("dpo", "reward"):
        rated = work.dialogues(shape) if "dialogues" in rest else [[pair] for pair in work.pairs(shape)]
        trees = [pair_tree(turns) for turns in rated]
        return reward_step(model, shape, trees) if kind == "reward" else dpo_step(model, shape, trees, path, "online" not in rest)
    if kind == "sample":
        return mixed_step(model, shape) if rest[0] == "mixed" else sampling_step(model, shape, int(rest[0]), rest[1] == "top_p")
    if kind == "qlora":
        return sft_step(lora.adapt(model, sft.Config(lora_rank=16, lora_alpha=32, quantize="nf4"), 0), shape)
    return ppo_step(model, shape, path, kind)


if __name__ == "__main__":
    turns = work.Turns(IMPORT_S)
    step = prepare(*work.arguments())
    while True:
        turns.wait()
        turns.done(step() | (work.gpu_peak(torch) if work.arguments()[1].device == "cuda" else {}))
