"""Peak memory while a checkpoint is loaded, over the bytes of the model that results.

    python -m benchmarks.loading out=benchmarks/results/loading.json       a random Llama of 2 GB in bf16, in two shards

Each way of loading runs in a process of its own; its peak (resident pages, file-backed ones included) is counted from
where it stood before the load.
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import lora
import runtime
from checkpoints import load_model, save_model
from model import Linear, ModelConfig, Transformer

WAYS = {"bfloat16": {}, "float32": {"dtype": torch.float32}, "nf4": {"linear": lora.NF4Linear}, "int8": {"linear": lora.Int8Linear}}


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/loading.json"
    layers: int = 18
    width: int = 2048


def write(path: Path, layers: int, width: int) -> None:
    """A random Llama in bf16; its vocabulary is small, so that no single tensor stands out."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(width=width, layers=layers, heads=width // 128, kv_heads=width // 128, head_dim=128,
                                        mlp_width=11 * width // 4, vocab_size=8000))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02))
    total = sum(p.nbytes for p in model.parameters())
    save_model(model, path, shard_bytes=total // 2 + 10**6)


def load(path: str, way: str) -> dict[str, float]:
    """Load in this process: bytes of the weights, and the peak above what the process held before."""
    torch.set_num_threads(1)
    small = Linear(1024, 1024)  # first uses of torch load its own libraries
    WAYS[way].get("linear", nn.Identity())(small.to(torch.bfloat16))
    with torch.device("meta"):
        Transformer(ModelConfig())
    before, _ = resident(reset=True)
    model = load_model(path, **WAYS[way])
    held = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    return {"weight_bytes": held, "peak_bytes": resident()[1] - before}


def resident(reset: bool = False) -> tuple[int, int]:
    """Bytes of this process in memory now, and the most it had since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def measure(path: str, way: str) -> dict[str, float]:
    """load() in a fresh process."""
    code = f"import json, benchmarks.loading as b; print(json.dumps(b.load({path!r}, {way!r})))"
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main(config: Config) -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model", config.layers, config.width)
        for way in WAYS:
            results[way] = found = measure(str(Path(folder) / "model"), way)
            print(f"{way:<9} weights {found['weight_bytes'] / 1e9:.2f} GB, peak {found['peak_bytes'] / 1e9:.2f} GB, "
                  f"{found['peak_bytes'] / found['weight_bytes']:.3f} of the weights")
    runtime.write_text(Path(config.out), json.dumps({"command": "python -m benchmarks.loading", "layers": config.layers,
                                                     "width": config.width, "ways": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
