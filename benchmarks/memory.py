"""What training takes, by `memory.py`'s arithmetic for the models of the recipes, and one real run to check it by.

    python -m benchmarks.memory out=benchmarks/results/memory.json

The models are told by their published shapes; no weights are read. Micro-batches of 2,048 tokens, bf16 activations,
gradient checkpointing, adapters of rank 64 on every linear layer. The check trains a random Llama of 0.1 B on this
machine in fp32, each way in a process of its own whose C library gives freed memory back at once, and compares the
peak of its resident memory with the arithmetic.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import lora
import runtime
import sft
from benchmarks.loading import resident
from checkpoints import read_config, save_model
from data.pack import Response, Tree, pack
from model import ModelConfig, Transformer, init_weights
from runtime import memory

LLAMA = {"model_type": "llama", "vocab_size": 32000, "torch_dtype": "float16", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
FALCON = {"model_type": "falcon", "vocab_size": 65024, "torch_dtype": "bfloat16", "bias": False, "parallel_attn": True, "alibi": False}
SHAPES = {  # from each model's config.json on its hub page
    "mistral-7b": LLAMA | {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                           "num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096, "torch_dtype": "bfloat16"},
    "llama2-7b": LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "llama2-13b": LLAMA | {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "falcon-7b": FALCON | {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True},
    "falcon-40b": FALCON | {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
                            "new_decoder_architecture": True},
    "starcoder-15b": {"model_type": "gpt_bigcode", "vocab_size": 49152, "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576,
                      "n_positions": 8192, "multi_query": True, "torch_dtype": "float32"},
}
WAYS = {"full": {}, "LoRA": {"lora_rank": 64}, "8-bit LoRA": {"lora_rank": 64, "quantize": "int8"},
        "QLoRA": {"lora_rank": 64, "quantize": "nf4"}}
CHECKED = dict(width=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp_width=2048, vocab_size=8192)
TOKENS = 1024


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/memory.json"


def table() -> list[dict]:
    rows = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shape))
            for way, options in WAYS.items():
                found = memory.plan(folder, sft.Config(checkpointing=True, **options), "bfloat16", 2048)
                parameters, trained = found.pop("parameters"), found.pop("trained")
                rows.append({"model": name, "way": way, "parameters": parameters, "trained": trained, "bytes": found,
                             "together": sum(found.values())})
    return rows


def train(path: str, way: str, checkpointing: bool) -> int:
    """Two steps in this process; the peak of resident memory above what it held before, in bytes."""
    options = sft.Config(model=path, checkpointing=checkpointing, **WAYS[way])
    model_config = read_config(path)
    rng = np.random.default_rng(0)
    trees = [Tree(rng.integers(0, 8192, 64).astype(np.int32), [], [Response(0, 32, 64)]) for _ in range(TOKENS // 64)]
    (batch,) = pack(trees, TOKENS)
    warm = lora.adapt(Transformer(replace(model_config, width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=128, layers=1)), options, 0)
    init_weights(warm, 0)
    for _ in range(2):  # first uses of torch load its own libraries
        sft.train_step(warm, batch, 64)[0].backward()
        runtime.adamw(warm, 1e-4, 0.0).step()
    before = resident(reset=True)[0]
    model = lora.adapt(lora.load_base(path, options, torch.device("cpu"), torch.float32), options, 0)
    optimizer = runtime.adamw(model, 1e-4, 0.0)
    for _ in range(2):
        sft.train_step(model, batch, 64)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident()[1] - before


def check() -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(ModelConfig(**CHECKED))
        init_weights(model, 0)
        save_model(model, Path(folder) / "model")
        del model
        for way in WAYS:
            for checkpointing in (False, True):
                code = f"import benchmarks.memory as b; print(b.train({folder + '/model'!r}, {way!r}, {checkpointing}))"
                found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                                       env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
                peak = int(found.stdout.split()[-1])
                found = memory.plan(folder + "/model", sft.Config(checkpointing=checkpointing, **WAYS[way]), "float32", TOKENS)
                told = sum(size for part, size in found.items() if part not in ("parameters", "trained"))
                rows.append({"way": way, "checkpointing": checkpointing, "told_bytes": told, "peak_bytes": peak})
    return rows


def main(config: Config) -> None:
    found = {"command": "python -m benchmarks.memory", "models": table(), "checked_model": CHECKED, "tokens": TOKENS, "check": check()}
    for row in found["models"]:
        print(f"{row['model']:<14} {row['way']:<11} {row['together'] / 1e9:7.1f} GB   "
              + "  ".join(f"{part} {size / 1e9:.1f}" for part, size in row["bytes"].items() if size))
    for row in found["check"]:
        print(f"check: {row['way']:<11} {'checkpointing' * row['checkpointing']:<14} told {row['told_bytes'] / 1e9:.3f} GB, "
              f"peak {row['peak_bytes'] / 1e9:.3f} GB")
    runtime.write_text(Path(config.out), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
