"""What a second process changes: ten steps of every training script with one process and with two, in fp32 on the CPU.

    python -m benchmarks.ranks          some minutes, nearly all of them for starting processes

A difference is |a - b| / max(1, |a|), the largest over ten steps. Runs and data are those of benchmarks/kills.py.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kills import ROOT, SETTINGS, prepare, words_for, written

LAUNCH = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
CHANGES = {"full": ["lora_rank=0"], "lora": ["lora_rank=4"]}


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/ranks.json"


def summary(one: list[dict], two: list[dict]) -> dict:
    """The largest differences of the loss, of gradient norms, and of everything else that does not measure time."""
    if [line.keys() for line in one] != [line.keys() for line in two]:
        raise RuntimeError(f"steps or metrics differ: {len(one)} and {len(two)} steps")
    found: dict[str, float] = {}
    for a, b in zip(one, two, strict=True):
        for name in a:
            found[name] = max(found.get(name, 0.0), abs(a[name] - b[name]) / max(1, abs(a[name])))
    norms = [name for name in found if name.endswith("grad_norm")]
    worst = max((name for name in found if name not in norms and not name.endswith("_per_s")), key=found.get)
    return {"steps": len(one), "loss": found.get("loss", found.get("policy_loss")), "gradient norm": max(found[name] for name in norms),
            "largest of the others": {worst: found[worst]}}


def main(config: Config) -> None:
    import runtime

    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for script in SETTINGS:
            for kind, changes in CHANGES.items():
                runs = []
                for launched, launcher in LAUNCH.items():
                    runs.append(folder / launched / f"{script}_{kind}")
                    words = [*words_for(script, folder), *changes, "lora_dropout=0", f"out={runs[-1]}"]
                    subprocess.run([sys.executable, *launcher, f"{script}.py", *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                   check=True, capture_output=True)
                found[f"{script} {kind}"] = told = summary(*map(written, runs))
                print(f"{script} {kind}: {json.dumps(told)}", flush=True)
    runtime.write_text(Path(config.out), json.dumps({"command": "python -m benchmarks.ranks", "scripts": found}, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    from runtime import load_config

    main(load_config(Config, __doc__))
