"""The configs of real models, run on a model of a few thousand parameters of the same family."""
import gzip
import json
import math
import os
from itertools import islice
from pathlib import Path

import pytest
from conftest import FIXTURES, ROOT, metrics_of, write_jsonl
from test_memory import SHAPES

import dpo
import reward
import sft
from data.dry_run import hardware, plan
from runtime import load_config

MISTRAL = FIXTURES / "models" / "mistral"
REAL = pytest.param("real", marks=pytest.mark.skipif(
    "REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets"))


def preferences(source: str, folder: Path) -> Path:
    """A file of preferences, whose chosen side SFT can read too: eight of UltraFeedback, or six made ones."""
    if source == "real":
        data = Path(os.environ["REAL_DATA"]) / "datasets" / "ultrafeedback" / "train_pairs_150.jsonl.gz"
        with gzip.open(data, "rt") as file:
            return write_jsonl(folder / "pairs.jsonl", [json.loads(line) for line in islice(file, 8)])
    made = [{"prompt": f"Name {n} cities.", "chosen": "Rome, Oslo.", "rejected": "No."} for n in range(6)]
    return write_jsonl(folder / "pairs.jsonl", made)


CONFIGS = [path for path in sorted((ROOT / "configs").glob("*/*.toml"))
           if path.parent.name != "tiny" and path.stem not in ("ppo", "grpo", "judge")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_header_of_a_config_tells_its_memory(path, tmp_path):
    script = reward if "reward" in path.stem else dpo if "dpo" in path.stem else sft
    config = load_config(script.Config, "", ["--config", str(path)])
    shape = SHAPES[{"zephyr-7b": "mistral-7b"}.get(path.parent.name, path.parent.name)]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = plan(str(tmp_path), config, config.dtype, config.micro_tokens, scored=script is reward)
    together = sum(size for part, size in found.items() if part not in ("parameters", "trained"))
    header = " ".join(line.strip("# ") for line in path.read_text().partition("\ndata")[0].splitlines())
    assert f"{together / 1e9:.1f} GB" in header and "Values: " in header and "Memory" in header
    assert f"It needs {hardware(found, shared=not config.lora_rank)}" in header


@pytest.mark.parametrize("folder", ["starcoder-15b", "falcon-7b", "falcon-40b", "llama2-7b", "llama2-13b"])
@pytest.mark.parametrize("name", ["sft", "sft_qlora"])
def test_the_talks_foundation_models_learn_for_three_to_six_epochs_on_a_cosine(folder, name):
    config = load_config(sft.Config, "", ["--config", str(ROOT / "configs" / folder / f"{name}.toml")])
    assert 3 <= config.epochs <= 6 and not config.max_steps and config.schedule == "cosine"
    assert config.quantize == ("nf4" if name == "sft_qlora" else "none")
    assert config.batch > 1 and config.checkpointing


def test_zephyrs_two_sources_differ_as_their_page_says():
    """What the paper and the handbook of today have different, and nothing else."""
    def differ(script, name):
        paper, handbook = (vars(load_config(script.Config, "", ["--config", str(ROOT / "configs/zephyr-7b" / file)]))
                           for file in (f"{name}.toml", f"{name}_handbook.toml"))
        return {key: (paper[key], handbook[key]) for key in paper if paper[key] != handbook[key] and key != "out"}

    assert differ(sft, "sft") == {"train_on": ("responses", "all"), "batch": (764, 128)}
    assert differ(dpo, "dpo") == {"beta": (0.1, 0.01), "epochs": (3, 1), "batch": (32, 128),
                                  "schedule": ("linear", "cosine")}


def test_hardware_by_hand():
    """One GPU keeps 2 GB free; 160 GB of shared weights and 4 GB of activations are 44 GB on each of four, 64 at most.

    On two they would be 84.
    """
    parts = {"parameters": 10**10, "trained": 10**7, "weights": 12 * 10**9, "gradients": 10**9, "optimizer": 10**9,
             "activations": 0, "adapters": 0}
    assert hardware(parts, shared=False) == "one GPU of 16 GB"
    assert hardware(parts | {"activations": 1}, shared=False) == "one GPU of 24 GB"
    assert hardware(parts, False, reference=10**10) == "one GPU of 24 GB"
    full = parts | {"weights": 40 * 10**9, "gradients": 40 * 10**9, "optimizer": 80 * 10**9, "activations": 4 * 10**9}
    assert hardware(full, shared=True) == "4 GPUs of 80 GB (torchrun --nproc-per-node 4)"
    assert hardware(full, shared=False) == "more than one GPU of 141 GB has"


@pytest.mark.parametrize("kind", ["", "_handbook", "_qlora"])
@pytest.mark.parametrize("source", ["made", REAL])
def test_the_zephyr_7b_configs_run_on_a_small_mistral(source, kind, tmp_path):
    """Two steps of SFT and two of DPO from its result: finite losses, ln 2 at the start of DPO."""
    small = ["max_steps=2", "batch=4", "max_length=1024", "device=cpu", "threads=1",
             f"data={preferences(source, tmp_path)}"]

    def run(script, name, *words):
        file = ROOT / "configs" / "zephyr-7b" / f"{name}.toml"
        config = load_config(script.Config, "", ["--config", str(file), *words, *small])
        script.main(config)
        return metrics_of(Path(config.out))

    learnt = run(sft, f"sft{kind}", f"model={MISTRAL}", f"out={tmp_path / 'sft'}")
    assert len(learnt) == 2 and all(math.isfinite(step["loss"]) for step in learnt)
    preferred = run(dpo, f"dpo{kind}", f"model={tmp_path / 'sft' / 'model'}", f"out={tmp_path / 'dpo'}")
    assert preferred[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and len(preferred) == 2
