"""Does collecting preferences in rounds make the tiny world's policy better? Three rounds, and all prompts at once.

    python -m benchmarks.rounds threads=1

Starts from the SFT models of the full-size runs that `make demo FULL=1 SEED=n` left in runs/results/n; about seven
minutes a seed on one core. The same command continues a stopped run. "At once" is one round over the prompts of all
three: every preference is about the SFT model's replies.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import runtime
from benchmarks.measure import save
from collect import rounds


@dataclass(frozen=True)
class Config:
    seeds: list[int] = (0, 1, 2)
    out: str = "benchmarks/results/rounds.json"
    threads: int = 0


def main(config: Config) -> None:
    found: dict[str, dict[int, list[dict]]] = {"rounds": {}, "at once": {}}
    for seed in config.seeds:
        run = f"runs/results/{seed}"
        three = rounds.Config(model=f"{run}/sft/model", prompts=f"{run}/data/more_prompts.jsonl", out=f"{run}/rounds",
                              dev="runs/results/0/data/dev.jsonl", seed=seed, threads=config.threads)
        once = replace(three, out=f"{run}/rounds_at_once", rounds=1, prompts_per_round=3 * three.prompts_per_round)
        for name, settings in (("rounds", three), ("at once", once)):
            rounds.main(settings)
            found[name][seed] = json.loads((Path(settings.out) / "report.json").read_text())["rounds"]
    save(config.out, {"command": "python -m benchmarks.rounds", "torch": torch.__version__, **found})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
