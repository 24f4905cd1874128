"""Sharding in bf16, and on GPUs by NCCL: `make gpu-ranks`, under ten minutes. Skipped where a test finds too few GPUs.

One GPU (or the CPU): FSDP over a single rank, whose blocks are gathered in bf16, beside the model that is not sharded.
Several GPUs: one, two and all of them, and with four or more a copy of the model on each half, take the same steps.
"""
import gc
import json

import pytest
import torch
import torch.distributed as dist
from conftest import metrics_of
from test_distributed import STEPS, differences, files, planned, told, torchrun  # noqa: F401 a fixture
from test_sft import demos

import lora
import runtime
import sft
from checkpoints import open_model, read_shards
from data.pack import micro_batches, step_trees
from data.tokenizer import adopt_template, load_tokenizer
from runtime import distributed

GPUS = torch.cuda.device_count()
BF16 = 2**-7  # of a metric near 1: bf16 has 8 bits, and a sum's order decides the last


def ten_steps(model, trees, config, device) -> list[dict[str, float]]:
    """Loss and gradient norm of ten steps of SFT."""
    optimizer, found = runtime.adamw(model, config.lr, 0.0), []
    for step in range(10):
        drawn = step_trees(trees, 4, step, 0)
        tokens, metrics = sum(tree.learnt for tree in drawn), runtime.Sums()
        for batch in micro_batches(drawn, 300):
            loss, parts = sft.train_step(model, batch.to(device), tokens)
            loss.backward()
            metrics.add(parts)
        found.append(metrics | {"grad_norm": distributed.clip_grad_norm(model, 1.0)})
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not GPUS, reason="no GPU"))])
def test_bf16_shards_take_the_steps_of_the_unsharded_model(kind, checkpoint, tmp_path):
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    config = sft.Config(model=str(checkpoint), data=str(demos(tmp_path / "sft.jsonl", 11)), template="zephyr", cache="",
                        dtype="bfloat16", device=kind)
    tokenizer = load_tokenizer(checkpoint)
    whole = lora.load_base(config.model, config, device)
    adopt_template(whole, tokenizer, "zephyr")
    trees = sft.load_data(config.data, tokenizer, config, "data")
    expected = ten_steps(whole, trees, config, device)
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = open_model(checkpoint).to(torch.float32)
        adopt_template(model, load_tokenizer(checkpoint), "zephyr")
        model.compute_dtype = torch.bfloat16
        model = read_shards(distributed.fully_shard(model, 1, device), device)
        assert all(hasattr(parameter, "to_local") for parameter in model.parameters())
        found = ten_steps(model, trees, config, device)
        distributed.reshard(model)
        gaps = [(distributed.full_tensor(a) - b).abs().max().item()
                for a, b in zip(model.parameters(), whole.parameters(), strict=True)]
    finally:
        model = None
        gc.collect()
        dist.destroy_process_group()
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.1
    for ours, theirs in zip(found, expected, strict=True):
        assert all(abs(ours[key] - theirs[key]) < BF16 * max(1, theirs[key]) for key in theirs), (ours, theirs)
    assert max(gaps) < 10 * 2 * config.lr  # as if a weight had gone the other way in every step


@pytest.mark.skipif(GPUS < 2, reason="takes two GPUs")
def test_one_gpu_two_and_all_take_the_same_steps(files, checkpoint):  # noqa: F811
    """Six steps in bf16 with an evaluation, each number of ranks by torchrun."""
    counts = sorted({1, 2, GPUS})
    ways = {f"{count}": (count, 0) for count in counts} | ({"halves": (GPUS, GPUS // 2)} if GPUS >= 4 else {})
    for name, (count, shard) in ways.items():
        script, config, _ = planned("sft", files, checkpoint, f"gpus/{name}")
        config |= {"device": "cuda", "dtype": "bfloat16", "shard": shard}
        options = ["--nproc-per-node", str(count), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        process = torchrun([[script, config, 0]], files / f"gpus_{name}.json", options)
        said = told(process, 150)
        assert process.returncode == 0, said
        assert len(metrics_of(files / "gpus" / name)) == STEPS
        gaps = differences(files / "gpus" / "1", files / "gpus" / name)
        print(name, json.dumps(gaps))
        assert all(gap < (4 if "norm" in key else 1) * BF16 for key, gap in gaps.items()), (name, gaps)
