"""Our side of benchmarks/peers.py: the steps of the training scripts, and the machine's floors.

The floor of SFT and DPO is a step written by hand for this one model: no padding, attention one sequence at a time by
scaled_dot_product_attention, the head on response tokens in chunks, fused AdamW; its products by oneDNN or, as PyTorch
has it by default, by MKL: the faster counts. That of sampling is the matrix products alone.
"""
import time
from itertools import cycle
from types import SimpleNamespace

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
from data.pack import Batch, pack
from data.trees import CHOSEN, REJECTED, Response, Tree
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


def training(model, shape: work.Shape, trees: list[Tree], size, train_step) -> work.Step:
    """The scripts' loop: pack, micro-batches, clip, AdamW. `size` says of a batch how many its loss is the mean of."""
    optimizer = runtime.adamw(model, work.LR, 0.0)
    steps = cycle(trees[at : at + shape.batch] for at in range(0, len(trees), shape.batch))

    def step() -> dict:
        chosen, total = next(steps), 0.0
        batches = pack(chosen, shape.micro_tokens)
        count = sum(map(size, batches))
        for batch in batches:
            loss, _ = train_step(batch.to(shape.device), count)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(tree.tokens for tree in chosen)
        operations = shape.operations(tokens, sum(tree.learnt for tree in chosen), sum(map(seen, chosen)))
        return {"units": tokens, "items": len(chosen), "loss": total, "operations": operations}
    return step


def seen(tree: Tree) -> int:
    """Keys that attention looks at, summed over the tokens of the trunk and of its leaves."""
    trunk, leaves = len(tree.trunk), [(start, len(leaf)) for start, leaf in tree.leaves]
    return trunk * (trunk + 1) // 2 + sum(start * length + length * (length + 1) // 2 for start, length in leaves)


def sft_step(model, shape: work.Shape, trees: list[Tree]) -> work.Step:
    return training(model, shape, trees, lambda batch: len(batch.owner),
                    lambda batch, tokens: sft.train_step(model, batch, tokens))


def dpo_step(model, shape: work.Shape, trees: list[Tree], path: str, cached: bool) -> work.Step:
    """The reference's log-probabilities are computed beforehand, or in the step by the model in `path`."""
    config = dpo.Config(beta=work.BETA)
    reference = model if cached else load(path, shape).requires_grad_(False)

    @torch.no_grad()
    def refer(batch: Batch):
        parts = dpo.response_sums(reference, batch).split([len(tree.responses) for tree in batch.trees])
        for tree, part in zip(batch.trees, parts, strict=True):
            tree.ref_sums = part

    def train_step(batch: Batch, pairs: int):
        if not cached:
            refer(batch)
        return dpo.train_step(model, batch, config, pairs, dpo.chosen_tokens(batch.trees))

    began = time.perf_counter()
    for batch in pack(trees, shape.micro_tokens) if cached else ():
        refer(batch.to(shape.device))
    each = (time.perf_counter() - began) / len(trees)
    step = training(model, shape, trees, lambda batch: batch.pairs, train_step)
    return lambda: step() | {"reference_s": each}


def reward_step(model, shape: work.Shape, trees: list[Tree]) -> work.Step:
    model, config = add_score_head(model, 0), reward.Config()
    return training(model, shape, trees, lambda batch: batch.pairs,
                    lambda batch, groups: reward.train_step(model, batch, config, groups))


def sampling_step(model, prompts: list[list[int]], limits: list[int], slots: int, **settings) -> work.Step:
    """Replies of these lengths, `slots` at a time."""
    def step() -> dict:
        found = generate(model, prompts, limits, **settings, slots=slots)
        return {"units": sum(len(s.tokens) for one in found for s in one)}
    return step


def rloo_step(model, shape: work.Shape, path: str) -> work.Step:
    """One update a rollout, as TRL's."""
    reference = load(path, shape).requires_grad_(False)
    reward_model = add_score_head(load(path, shape), 0).requires_grad_(False)
    config = ppo.Config(advantages="rloo", n=work.RL_REPLIES, max_tokens=work.NEW, kl_coef=0.05, epochs=1,
                        minibatches=1)
    optimizer = runtime.adamw(model, work.LR, 0.0)
    prompts, device = work.prompts(shape, work.RL_PROMPTS * work.STEPS), torch.device(shape.device)
    steps, models = iter(range(work.STEPS)), Models(model, reference, reward_model, None, model)
    tokenizer = SimpleNamespace(stop_ids=tuple)  # random replies have no end of sequence

    def step() -> dict:
        number, began = next(steps), time.perf_counter()
        asked = prompts[number * work.RL_PROMPTS : (number + 1) * work.RL_PROMPTS]
        trees = ppo.sample(models, asked, tokenizer, number, config)
        sampled = time.perf_counter()
        rollout = ppo.score(trees, models, config, device)
        _, advantages, returns = ppo.find_advantages(rollout, config.kl_coef, config)
        scored = time.perf_counter()
        ppo.update(models, optimizer, rollout, advantages, returns, config.kl_coef, number, config, device)
        return {"units": len(rollout.scores), "sampling_s": sampled - began, "scoring_s": scored - sampled,
                "updating_s": time.perf_counter() - scored}
    return step


# ------------------------------------------------------------------------------------------ floors

def by_hand(weights: dict[str, torch.Tensor], shape: work.Shape, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The last hidden states [N, D] of sequences of these sizes, laid end to end; the plainest code that gives them."""
    half = shape.head_dim // 2
    angles = torch.cat([torch.arange(n) for n in sizes])[:, None, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()

    def linear(x, name: str):
        return F.linear(x, weights[name + ".weight"])

    def heads(x, name: str):
        return linear(x, name).unflatten(-1, (-1, shape.head_dim))

    def norm(x, name: str):
        return F.rms_norm(x, (shape.width,), weights[name + ".weight"], 1e-5)

    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["embed_tokens.weight"][ids]
    for block in (f"layers.{layer}." for layer in range(shape.layers)):
        h = norm(x, block + "input_layernorm")
        q, k, v = (heads(h, f"{block}self_attn.{part}_proj") for part in "qkv")
        rows = zip(*(y.transpose(0, 1)[None].split(sizes, 2) for y in (turned(q), turned(k), v)), strict=True)
        seen = torch.cat([F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True)
                          for row in rows], 2)  # [1, H, N, E]
        x = x + linear(seen[0].transpose(0, 1).flatten(1), block + "self_attn.o_proj")
        h = norm(x, block + "post_attention_layernorm")
        x = x + linear(F.silu(linear(h, block + "mlp.gate_proj")) * linear(h, block + "mlp.up_proj"),
                       block + "mlp.down_proj")
    return norm(x, "norm")


def floor_step(model, shape: work.Shape, kind: str) -> work.Step:
    """A step by hand; 2,048 response tokens at a time in the head. DPO's loss costs as much as this one."""
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=work.LR, weight_decay=0.0, fused=True)
    pairs = work.pairs(shape)
    steps = iter([pairs[at : at + shape.batch] for at in range(0, len(pairs), shape.batch)])

    def step() -> dict:
        chosen = next(steps)
        rows = [(pair.prompt, reply) for pair in chosen for reply in (pair[1:] if kind == "dpo" else pair[1:2])]
        sizes = [len(prompt) + len(reply) for prompt, reply in rows]
        ids = torch.tensor([i for row in rows for part in row for i in part])
        predicts = torch.tensor([len(p) <= i + 1 < len(p) + len(r) for p, r in rows for i in range(len(p) + len(r))])
        hidden, targets = by_hand(weights, shape, ids, sizes)[predicts], ids.roll(-1)[predicts]
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


def decoding_floor(model, prompts: list[list[int]]) -> work.Step:
    """Every weight's product with the prompts' tokens, then with a row of each sequence; the head's with rows alone."""
    weights = [p.detach() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    head, counts = model.head_weight.detach(), {sum(map(len, prompts)): 1, len(prompts): work.NEW - 1}
    rows = {(n, w.shape[1]): torch.randn(n, w.shape[1], device=w.device).to(w.dtype)
            for w in (*weights, head) for n in counts}

    def step() -> dict:
        for n, times in counts.items():
            for _ in range(times):
                for weight in weights:
                    F.linear(rows[n, weight.shape[1]], weight)
                F.linear(rows[len(prompts), head.shape[1]], head)
        return {"units": len(prompts) * work.NEW}
    return step


def prepare(task: str, shape: work.Shape, path: str) -> work.Step:
    runtime.setup(shape.device, 0)
    kind, *rest = task.split()
    trained = torch.float32 if kind not in ("sample", "qlora") else None
    model = load(path, shape, trained, lora.QUANTIZED["nf4"] if kind == "qlora" else None)
    if kind == "qlora" or "lora" in rest:
        model = lora.adapt(model, sft.Config(lora_rank=work.RANK, lora_alpha=work.ALPHA))
    if kind in ("sft", "qlora"):
        return sft_step(model, shape, [sft_tree(pair) for pair in work.pairs(shape)])
    if kind == "floor":
        if rest[-1] == "mkl":
            torch.set_float32_matmul_precision("highest")
        if rest[0] == "sample":
            return decoding_floor(model, work.prompts(shape, int(rest[1])))
        return floor_step(model, shape, rest[0])
    if kind in ("dpo", "reward"):
        trees = [pair_tree(turns) for turns in work.rated(shape, task)]
        if kind == "reward":
            return reward_step(model, shape, trees)
        return dpo_step(model, shape, trees, path, cached="online" not in rest)
    if kind == "sample":
        prompts, limits, slots, settings = work.sampling(shape, *rest)
        return sampling_step(model, prompts, limits, slots, **settings)
    return rloo_step(model, shape, path)


if __name__ == "__main__":
    turns, step = work.Turns(), prepare(*work.arguments())
    while True:
        turns.wait()
        turns.done(step())
