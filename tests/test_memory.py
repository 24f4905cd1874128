"""What training and loading take: the arithmetic of data/dry_run.py for the recipes' models, and real runs.

    WRITE=1 python -m pytest tests/test_memory.py     all of it, to benchmarks/results: memory.json, loading.json and
                                                      loading_ranks.json

The recipes' models are given by their published shapes; no weights are read. Micro-batches of 2,048 tokens, bf16
activations, gradient checkpointing, adapters of rank 64 on every linear layer. Real runs train a random Llama of 0.1 B
in fp32, each way in a process of its own whose C library gives freed memory back at once. Loading takes a random Llama
of 2 GB in bf16 (0.4 GB without WRITE), in two shards; each way has a process of its own as well. Peaks (resident pages,
file-backed ones included) are counted from where the process stood before. Several ranks (gloo) load a Llama of 0.3 B
in fp32 (0.06 B without WRITE).
"""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, exits, write_jsonl
from torch import nn

import distill
import dpo
import lora
import runtime
import sft
from checkpoints import load_model, save_model
from data.dry_run import plan
from data.pack import pack
from data.trees import Response, Tree
from families import read_config
from model import Linear, ModelConfig, Transformer, init_weights
from runtime import distributed

MISTRAL = FIXTURES / "models" / "mistral"
RESULTS = ROOT / "benchmarks" / "results"
WRITE = "WRITE" in os.environ
COMMAND = {"command": "WRITE=1 python -m pytest tests/test_memory.py"}
LLAMA = {"model_type": "llama", "vocab_size": 32000, "torch_dtype": "float16", "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
FALCON = {"model_type": "falcon", "vocab_size": 65024, "torch_dtype": "bfloat16", "bias": False,
          "parallel_attn": True, "alibi": False}
SHAPES = {  # from each model's config.json on its hub page
    "mistral-7b": LLAMA | {"model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336,
                           "sliding_window": 4096, "torch_dtype": "bfloat16"},
    "llama2-7b": LLAMA | {"intermediate_size": 11008},
    "llama2-13b": LLAMA | {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
                           "intermediate_size": 13824},
    "falcon-7b": FALCON | {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
                           "multi_query": True},
    "falcon-40b": FALCON | {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
                            "num_kv_heads": 8, "new_decoder_architecture": True},
    "starcoder-15b": {"model_type": "gpt_bigcode", "vocab_size": 49152, "n_embd": 6144, "n_layer": 40, "n_head": 48,
                      "n_inner": 24576, "n_positions": 8192, "multi_query": True, "torch_dtype": "float32"},
    "smollm2-135m": LLAMA | {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
                             "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192,
                             "tie_word_embeddings": True, "torch_dtype": "float32"},
}
WAYS = {"full": {}, "LoRA": {"lora_rank": 64}, "8-bit LoRA": {"lora_rank": 64, "quantize": "int8"},
        "QLoRA": {"lora_rank": 64, "quantize": "nf4"}}
LOADED = {"bfloat16": {}, "float32": {"dtype": torch.float32}, "nf4": {"linear": lora.NF4Linear},
          "int8": {"linear": lora.Int8Linear}}
CHECKED = dict(width=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp_width=2048, vocab_size=8192)
TOKENS = 1024


def resident(reset: bool = False) -> tuple[int, int]:
    """Bytes of this process in memory now, and the most it had since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def in_fresh_process(call: str, **environment: str):
    """What a call of this file's functions returns in a process of its own."""
    code = f"import json, sys; sys.path[:0] = ['.', 'tests']; import test_memory as t; print(json.dumps(t.{call}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def write(name: str, report: dict) -> None:
    (RESULTS / name).write_text(json.dumps(COMMAND | report, indent=1) + "\n")


# ----------------------------------------------------------------------------------------- training

def planned(path: str, options: sft.Config, dtype: str, tokens: int) -> tuple[dict[str, int], dict[str, int]]:
    """The arithmetic: parameters and trained ones; bytes by part."""
    found = plan(path, options, dtype, tokens)
    return {key: found.pop(key) for key in ("parameters", "trained")}, found


def table(folder: Path, names=tuple(SHAPES)) -> list[dict]:
    """The recipes' models, every way."""
    rows = []
    for name in names:
        (folder / "config.json").write_text(json.dumps(SHAPES[name]))
        for way, options in WAYS.items():
            counts, parts = planned(str(folder), sft.Config(checkpointing=True, **options), "bfloat16", 2048)
            rows.append({"model": name, "way": way, **counts, "bytes": parts, "together": sum(parts.values())})
    return rows


def test_the_arithmetic_for_the_recipes_models_is_that_of_the_results(tmp_path):
    """One model of each family; with WRITE all of them."""
    names = SHAPES if WRITE else ("mistral-7b", "falcon-7b", "starcoder-15b")
    committed = json.loads((RESULTS / "memory.json").read_text())["models"]
    assert table(tmp_path, names) == [row for row in committed if row["model"] in names]


LLAMA_7B = 6738415616


@pytest.fixture
def llama(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama2-7b"]))
    return str(tmp_path)


def told(capsys) -> dict[str, float]:
    """GB by part, as a dry run printed them."""
    lines = (line.split() for line in capsys.readouterr().out.splitlines() if " GB" in line and "needs" not in line)
    return {" ".join(line[: line.index("GB") - 1]): float(line[line.index("GB") - 1]) for line in lines}


def test_a_dry_run_counts_the_reference_that_stands_beside_the_policy_before_the_first_step(llama, capsys):
    """In fp32, 4 bytes a weight, as dpo.py loads it: beside a base of 2 bytes a weight it is the most that is needed;
    full fine-tuning, 16 bytes a weight, needs more afterwards."""
    dpo.main(dpo.Config(model=llama, ref_model=llama, dry_run=True, lora_rank=4, micro_tokens=64, max_length=64))
    parts = told(capsys)
    assert parts["reference"] == pytest.approx(4 * LLAMA_7B / 1e9, abs=1e-3)
    assert parts["together"] == pytest.approx(parts["reference"] + parts["weights"] + parts["adapters"], abs=2e-3)
    dpo.main(dpo.Config(model=llama, ref_model=llama, dry_run=True, micro_tokens=64, max_length=64))
    assert told(capsys)["together"] > 16 * LLAMA_7B / 1e9
    dpo.main(dpo.Config(model=llama, dry_run=True, lora_rank=4, micro_tokens=64, max_length=64))
    assert "reference" not in told(capsys)


def test_a_dry_run_counts_the_teacher_where_it_is_a_copy(llama, capsys):
    """fp32 as the student; with adapters it is the student without them."""
    distill.main(distill.Config(model=llama, dry_run=True, micro_tokens=64, max_length=64))
    parts = told(capsys)
    assert parts["teacher"] == parts["weights"] == pytest.approx(4 * LLAMA_7B / 1e9, abs=1e-3)
    together = parts.pop("together")
    assert together == pytest.approx(sum(parts.values()), abs=5e-3)
    distill.main(distill.Config(model=llama, dry_run=True, lora_rank=4, micro_tokens=64, max_length=64))
    assert "teacher" not in told(capsys)


def test_a_dry_run_reads_eval_data_and_checks_the_reference(tmp_path, capsys):
    pairs = [{"prompt": f"Say {n}.", "chosen": str(n), "rejected": "No."} for n in range(6)]
    data, held_out = (write_jsonl(tmp_path / name, rows) for name, rows in (("d.jsonl", pairs), ("e.jsonl", pairs[:2])))
    config = dpo.Config(model=str(MISTRAL), data=str(data), eval_data=str(held_out), dry_run=True, batch=2, epochs=1)
    dpo.main(config)
    said = capsys.readouterr().out
    assert "3 steps of 2 dialogues" in said and "2 in eval_data" in said
    held_out.write_text("{}\n")
    exits(capsys, lambda: dpo.main(config), str(held_out))
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama2-7b"] | {"alibi": True}))
    exits(capsys, lambda: dpo.main(replace(config, ref_model=str(tmp_path), eval_data="")), "alibi is true")


def test_a_dry_run_refuses_a_reward_model_in_the_place_of_one_that_replies(tmp_path, capsys):
    scored = SHAPES["llama2-7b"] | {"architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(scored))
    exits(capsys, lambda: sft.main(sft.Config(model=str(tmp_path), dry_run=True)), "is a reward model")


def train(path: str, way: str, checkpointing: bool) -> int:
    """Two steps in this process; the peak of resident memory above what it held before, in bytes."""
    options = sft.Config(model=path, dtype="float32", checkpointing=checkpointing, **WAYS[way])
    rng = np.random.default_rng(0)
    trees = [Tree(rng.integers(0, 8192, 64).astype(np.int32), [], [Response(0, 32, 64)]) for _ in range(TOKENS // 64)]
    (batch,) = pack(trees, TOKENS)
    small = replace(read_config(path), width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=128, layers=1)
    warm = lora.adapt(Transformer(small), options)
    init_weights(warm, 0)
    for _ in range(2):  # torch loads its own libraries when first used
        sft.train_step(warm, batch, 64)[0].backward()
        runtime.adamw(warm, 1e-4, 0.0).step()
    before = resident(reset=True)[0]
    model = lora.adapt(lora.load_base(path, options, torch.device("cpu")), options)
    optimizer = runtime.adamw(model, 1e-4, 0.0)
    for _ in range(2):
        sft.train_step(model, batch, 64)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident()[1] - before


def real_runs(folder: Path) -> list[dict]:
    """Every way on a small model: the arithmetic and the peak of a real run."""
    path, rows = str(folder / "model"), []
    model = Transformer(ModelConfig(**CHECKED))
    init_weights(model, 0)
    save_model(model, path)
    del model
    for way in WAYS:
        for checkpointing in (False, True):
            peak = in_fresh_process(f"train({path!r}, {way!r}, {checkpointing})", MALLOC_MMAP_THRESHOLD_="65536")
            _, parts = planned(path, sft.Config(checkpointing=checkpointing, **WAYS[way]), "float32", TOKENS)
            rows.append({"way": way, "checkpointing": checkpointing, "told_bytes": sum(parts.values()),
                         "peak_bytes": peak})
    return rows


@pytest.mark.skipif(not WRITE, reason="eight runs of a model of 0.1 B")
def test_a_real_run_takes_what_the_arithmetic_says(tmp_path):
    rows = real_runs(tmp_path)
    write("memory.json", {"models": table(tmp_path), "checked_model": CHECKED, "tokens": TOKENS, "check": rows})
    assert all(0.8 < row["peak_bytes"] / row["told_bytes"] < 1.2 for row in rows), rows


# ------------------------------------------------------------------------------------------ loading

def write_checkpoint(path: Path, layers: int, width: int) -> None:
    """A random Llama in bf16, in two shards; its vocabulary is small, so that no single tensor stands out."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(width=width, layers=layers, heads=width // 128, kv_heads=width // 128,
                                        head_dim=128, mlp_width=11 * width // 4, vocab_size=8000))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02))
    total = sum(p.nbytes for p in model.parameters())
    save_model(model, path, shard_bytes=total // 2 + 10**6)


def load(path: str, way: str) -> dict[str, int]:
    """Load in this process: bytes of the weights, and the peak above what the process held before."""
    torch.set_num_threads(1)
    small = Linear(1024, 1024)  # torch loads its own libraries when first used
    LOADED[way].get("linear", nn.Identity())(small.to(torch.bfloat16))
    with torch.device("meta"):
        Transformer(ModelConfig())
    before, _ = resident(reset=True)
    model = load_model(path, **LOADED[way])
    held = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    return {"weight_bytes": held, "peak_bytes": resident()[1] - before}


def test_loading_peaks_little_above_the_weights(tmp_path):
    """What is quantised on the way peaks at one tensor more in full precision."""
    write_checkpoint(tmp_path, layers=18 if WRITE else 4, width=2048)
    ways = {way: in_fresh_process(f"load({str(tmp_path)!r}, {way!r})") for way in (LOADED if WRITE else ("bfloat16",))}
    if WRITE:
        write("loading.json", {"ways": ways})
    for way, row in ways.items():
        assert row["peak_bytes"] < (1.15 if way in ("bfloat16", "float32") else 1.4) * row["weight_bytes"], (way, row)


def load_share(path: str, folder: str) -> None:
    """Load as a script under torchrun does, and write this rank's peak and what it then holds to the folder."""
    torch.set_num_threads(1)
    device, options = runtime.setup("cpu", 0, 1, dtype="float32"), sft.Config(model=path)
    with torch.device("meta"):
        warm = Transformer(ModelConfig())
    if distributed.world_size() > 1:
        distributed.fully_shard(warm, 0, device)  # its imports
    before, _ = resident(reset=True)
    model = lora.shard(lora.load_base(path, options, device), options, device)
    peak = resident()[1] - before
    held = sum(distributed.local_rows(parameter)[0].nbytes for parameter in model.parameters())
    (Path(folder) / str(distributed.rank())).write_text(json.dumps({"share_bytes": held, "peak_bytes": peak}))


def load_with_ranks(path: Path, folder: Path, ranks: int) -> dict[str, int]:
    """The largest share and peak of the ranks, and their peaks together: a machine's."""
    folder.mkdir()
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_memory as t; "
    code += f"t.load_share({str(path)!r}, {str(folder)!r})"
    words = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", str(ranks),
             "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", sys.executable, "-c", code]
    subprocess.run(words, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    rows = [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]
    return {"ranks": ranks, **{key: max(row[key] for row in rows) for key in rows[0]},
            "machine_bytes": sum(row["peak_bytes"] for row in rows)}


def test_a_rank_loads_its_share_alone(tmp_path):
    """Its peak is at most 1.2 times what it keeps, so that a machine holds the model once."""
    write_checkpoint(tmp_path / "model", layers=24 if WRITE else 4, width=1024)
    counts = (1, 2, 4) if WRITE else (2,)
    rows = [load_with_ranks(tmp_path / "model", tmp_path / str(ranks), ranks) for ranks in counts]
    if WRITE:
        write("loading_ranks.json", {"ranks": rows})
    for row in rows:
        assert 0.9 * row["share_bytes"] < row["peak_bytes"] < 1.2 * row["share_bytes"], row
