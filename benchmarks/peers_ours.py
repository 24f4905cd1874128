"""Our side of benchmarks/peers.py: the steps of the training scripts, and the machine's floors.

The floor of SFT and DPO is a step written by hand for this one model: no padding, attention one sequence at a time by
scaled_dot_product_attention, the head on response tokens in chunks, fused AdamW; its products by oneDNN or, as PyTorch
has it by default, by MKL: the faster counts. That of sampling is the matrix products alone.
"""
from __future__ import annotations

import time
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F

import dpo
import lora
import ppo
import reward
import runtime
import sft
from benchmarks import peers_work as work
from checkpoints import load_model
from data.four_models import Models
from data.pack import CHOSEN, REJECTED, Response, Tree, pack
from model import ModelConfig, Transformer, add_score_head, generate, init_weights


def random_model(shape: work.Shape) -> Transformer:
    """Random weights in fp32."""
    config = ModelConfig(width=shape.width, layers=shape.layers, heads=shape.heads,
                         kv_heads=shape.kv_heads or shape.heads, head_dim=shape.head_dim, mlp_width=shape.mlp_width,
                         vocab_size=shape.vocab, max_positions=shape.longest)
    with torch.device(shape.device):
        model = Transformer(config)
    init_weights(model, 0)
    model.compute_dtype = getattr(torch, shape.dtype)
    return model


def load(path: str, shape: work.Shape, dtype: torch.dtype | None = torch.float32, linear=None):
    """The model as a training script loads it; with `dtype` None as stored."""
    model = load_model(path, dtype=dtype, device=shape.device, linear=linear)
    model.compute_dtype, model.checkpointing = getattr(torch, shape.dtype), shape.checkpointing
    return model


def sft_tree(pair: work.Pair) -> Tree:
    ids = np.array(pair.prompt + pair.chosen, np.int32)
    return Tree(ids, [], [Response(0, len(pair.prompt), len(ids))])


def pair_tree(turns: list[work.Pair]) -> Tree:
    """A dialogue rated at every turn, packed as data/pack.py does."""
    tree = Tree(np.array(turns[-1].prompt + turns[-1].chosen, np.int32))
    for number, turn in enumerate(turns):
        start = len(turn.prompt)
        tree.leaves.append((start, np.array(turn.rejected, np.int32)))
        tree.responses += [Response(0, start, start + len(turn.chosen), number, CHOSEN, number + 1),
                           Response(number + 1, 0, len(turn.rejected), number, REJECTED, number + 1)]
    return tree


def training(model, shape: work.Shape, trees: list[Tree], backward) -> work.Step:
    """The scripts' loop: pack, micro-batches, clip, AdamW. `backward` takes a step's batches and returns the loss."""
    optimizer = runtime.adamw(model, work.LR, 0.0)
    steps = cycle(trees[at : at + shape.batch] for at in range(0, len(trees), shape.batch))

    def step() -> dict:
        chosen = next(steps)
        loss = backward(pack(chosen, shape.micro_tokens))
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(tree.tokens for tree in chosen)
        operations = shape.operations(tokens, sum(tree.learnt for tree in chosen), sum(map(seen, chosen)))
        return {"units": tokens, "items": len(chosen), "loss": loss, "operations": operations}
    return step


def seen(tree: Tree) -> int:
    """Keys that attention looks at, summed over the tokens of the trunk and of its leaves."""
    trunk, leaves = len(tree.trunk), [(start, len(leaf)) for start, leaf in tree.leaves]
    return trunk * (trunk + 1) // 2 + sum(start * length + length * (length + 1) // 2 for start, length in leaves)


def add_up(parts) -> float:
    """Backward through each micro-batch's loss; their sum."""
    total = 0.0
    for loss, _ in parts:
        loss.backward()
        total += loss.item()
    return total


def sft_step(model, shape: work.Shape, trees: list[Tree]) -> work.Step:
    def backward(batches):
        tokens = sum(len(batch.owner) for batch in batches)
        return add_up(sft.train_step(model, batch.to(shape.device), tokens) for batch in batches)
    return training(model, shape, trees, backward)


def dpo_step(model, shape: work.Shape, trees: list[Tree], path: str, cached: bool) -> work.Step:
    """The reference's log-probabilities are computed beforehand, or in the step by the model in `path`."""
    config = dpo.Config(beta=work.BETA)
    reference = model if cached else load(path, shape).requires_grad_(False)

    @torch.no_grad()
    def refer(batches):
        for batch in batches:
            sums = dpo.response_sums(reference, batch.to(shape.device))
            parts = sums.split([len(tree.responses) for tree in batch.trees])
            for tree, part in zip(batch.trees, parts, strict=True):
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
    """Random replies have no end of sequence."""

    def stop_ids(self) -> tuple[int, ...]:
        return ()


def rloo_step(model, shape: work.Shape, path: str) -> work.Step:
    """One update a rollout, as TRL's."""
    reference = load(path, shape).requires_grad_(False)
    reward_model = add_score_head(load(path, shape), 0).requires_grad_(False)
    config = ppo.Config(advantages="rloo", n=work.RL_REPLIES, max_tokens=work.NEW, kl_coef=0.05, epochs=1,
                        minibatches=1)
    optimizer = runtime.adamw(model, work.LR, 0.0)
    prompts, device = work.prompts(shape, work.RL_PROMPTS * work.STEPS), torch.device(shape.device)
    steps, models = iter(range(work.STEPS)), Models(model, reference, reward_model, None, model)

    def step() -> dict:
        number, began = next(steps), time.perf_counter()
        asked = prompts[number * work.RL_PROMPTS : (number + 1) * work.RL_PROMPTS]
        trees = ppo.sample(models, asked, NoTokenizer(), number, config)
        sampled = time.perf_counter()
        rollout = ppo.score(trees, models, config, device)
        _, advantages, returns = ppo.find_advantages(rollout, config.kl_coef, config)
        scored = time.perf_counter()
        ppo.update(models, optimizer, rollout, advantages, returns, number, config, device)
        return {"units": len(rollout.scores), "sampling_s": sampled - began, "scoring_s": scored - sampled,
                "updating_s": time.perf_counter() - scored}
    return step


# ------------------------------------------------------------------------------------------ floors

class ByHand:
    """The plainest model that computes the same: all sequences in one flat row, attention one by one."""

    def __init__(self, model: Transformer, shape: work.Shape):
        self.weights, self.shape = dict(model.named_parameters()), shape
        half = shape.head_dim // 2
        self.frequencies = 10000.0 ** (-torch.arange(half) / half)

    def norm(self, x, name: str):
        return F.rms_norm(x, (self.shape.width,), self.weights[name], 1e-5)

    def attention(self, x, block: str, cos, sin, sizes: list[int]):
        def turned(x):
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k, v = (F.linear(x, self.weights[f"{block}self_attn.{part}_proj.weight"]) for part in "qkv")
        q, k, v = (x.unflatten(-1, (self.shape.heads, -1)) for x in (q, k, v))
        out = []
        for row in zip(turned(q).split(sizes), turned(k).split(sizes), v.split(sizes), strict=True):
            heads_first = (x.transpose(0, 1)[None] for x in row)
            out.append(F.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1))
        return F.linear(torch.cat(out).flatten(1), self.weights[block + "self_attn.o_proj.weight"])

    def hidden(self, ids, sizes: list[int]):
        """The last hidden states of sequences of these sizes, laid end to end."""
        angles = torch.cat([torch.arange(n) for n in sizes])[:, None, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        x = self.weights["embed_tokens.weight"][ids]
        for layer in range(self.shape.layers):
            block = f"layers.{layer}."
            x = x + self.attention(self.norm(x, block + "input_layernorm.weight"), block, cos, sin, sizes)
            h = self.norm(x, block + "post_attention_layernorm.weight")
            gate, up = (F.linear(h, self.weights[f"{block}mlp.{part}_proj.weight"]) for part in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, self.weights[block + "mlp.down_proj.weight"])
        return self.norm(x, "norm.weight")


def floor_step(model, shape: work.Shape, kind: str) -> work.Step:
    """A step by hand; 2,048 response tokens at a time in the head. DPO's loss costs as much as this one."""
    by_hand = ByHand(model, shape)
    weights = by_hand.weights
    optimizer = torch.optim.AdamW(weights.values(), lr=work.LR, weight_decay=0.0, fused=True)
    items, steps = work.pairs(shape), iter(range(work.STEPS))

    def step() -> dict:
        number = next(steps)
        chosen = items[number * shape.batch : (number + 1) * shape.batch]
        rows = [(pair.prompt, reply) for pair in chosen for reply in (pair[1:] if kind == "dpo" else pair[1:2])]
        sizes = [len(prompt) + len(reply) for prompt, reply in rows]
        ids = torch.tensor([i for row in rows for part in row for i in part])
        x = by_hand.hidden(ids, sizes)
        ends = np.cumsum(sizes)
        predictors = torch.cat([torch.arange(end - len(reply) - 1, end - 1)
                                for end, (_, reply) in zip(ends, rows, strict=True)])
        targets, hidden = ids[predictors + 1], x[predictors]
        cut = hidden.detach().requires_grad_()  # the head's graph is freed chunk by chunk
        loss = 0.0
        for part, target in zip(cut.split(2048), targets.split(2048), strict=True):
            logits = F.linear(part, weights["embed_tokens.weight"])
            missed = F.cross_entropy(logits, target, reduction="sum") / len(targets)
            missed.backward()
            loss += missed.item()
        hidden.backward(cut.grad)
        torch.nn.utils.clip_grad_norm_(weights.values(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return {"units": sum(sizes), "items": len(chosen), "loss": loss}
    return step


def decoding_floor(model, batch: int) -> work.Step:
    """Every weight's product with a batch of rows, once for each of the tokens that are sampled."""
    weights = [p.detach() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    weights.append(model.head_weight.detach())
    rows = [torch.randn(batch, weight.shape[1], device=weight.device).to(weight.dtype) for weight in weights]

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
        return sft_step(model, shape, [sft_tree(pair) for pair in work.pairs(shape)])
    if kind == "floor":
        if rest[-1] == "mkl":
            torch.set_float32_matmul_precision("highest")
        return decoding_floor(model, int(rest[1])) if rest[0] == "sample" else floor_step(model, shape, rest[0])
    if kind in ("dpo", "reward"):
        rated = work.dialogues(shape) if "dialogues" in rest else [[pair] for pair in work.pairs(shape)]
        trees = [pair_tree(turns) for turns in rated]
        if kind == "reward":
            return reward_step(model, shape, trees)
        return dpo_step(model, shape, trees, path, cached="online" not in rest)
    if kind == "sample":
        if rest[0] == "mixed":
            return mixed_step(model, shape)
        return sampling_step(model, shape, int(rest[0]), top_p=rest[1] == "top_p")
    if kind == "qlora":
        adapted = lora.adapt(model, sft.Config(lora_rank=16, lora_alpha=32, quantize="nf4"), 0)
        return sft_step(adapted, shape, [sft_tree(pair) for pair in work.pairs(shape)])
    return rloo_step(model, shape, path)


if __name__ == "__main__":
    turns = work.Turns()
    step = prepare(*work.arguments())
    while True:
        turns.wait()
        turns.done(step() | (work.gpu_peak(torch) if work.arguments()[1].device == "cuda" else {}))
