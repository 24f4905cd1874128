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
from data.dry_run import plan
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
           if path.parent.name != "tiny" and path.stem not in ("ppo", "judge")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_header_of_a_config_tells_its_memory(path, tmp_path):
    script = reward if "reward" in path.stem else dpo if "dpo" in path.stem else sft
    config = load_config(script.Config, "", ["--config", str(path)])
    shape = SHAPES[{"zephyr-7b": "mistral-7b"}.get(path.parent.name, path.parent.name)]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = plan(str(tmp_path), config, config.dtype, config.micro_tokens, scored=script is reward)
    together = sum(size for part, size in found.items() if part not in ("parameters", "trained"))
    header = path.read_text().partition("\ndata")[0]
    assert f"{together / 1e9:.1f} GB" in header and "Values: " in header and "Memory" in header


@pytest.mark.parametrize("kind", ["", "_qlora"])
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
