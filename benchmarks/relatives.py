"""DPO against SimPO, ORPO, KTO and DPO with an SFT term, over five seeds, by compare.py.

    python -m benchmarks.relatives

After `make demo`. All start from one SFT model and learn from the same preferences, in as many steps of as many
dialogues; a seed orders them. Before that, settings around each paper's are tried with two other seeds, on the same
dev dialogues; of each loss, DPO too, those with the best mean are compared. DPO's others are configs/tiny/dpo.toml's.
"""
from itertools import product
from statistics import mean

import torch

import compare
import runtime
from benchmarks.measure import machine, save

DPO = "dpo.py --config configs/tiny/dpo.toml"
LR = ("lr=2e-4", "lr=4e-4")
# The settings tried: beta 2, gamma 1 or 0.5 are SimPO's, lambda 0.1 ORPO's, beta 0.1 and weights of 1 KTO's, an SFT
# term of weight 1 that of Pang et al. 2024 (arXiv:2404.19733).
SWEEP = {
    "DPO": (DPO, [LR]),
    "SimPO": ("dpo.py --config configs/tiny/simpo.toml", [("gamma=0.5", "gamma=1"), LR]),
    "ORPO": ("dpo.py --config configs/tiny/orpo.toml", [("beta=0.1", "beta=1"), LR]),
    "KTO": ("kto.py --config configs/tiny/kto.toml", [("beta=0.1", "beta=0.3"), LR]),
    "DPO + SFT": (DPO, [("sft_coef=0.1", "sft_coef=1"), LR]),
}


SEEDS, SWEEP_SEEDS = 5, 2  # training runs of each; and of each setting tried, none of them among those
COMPARE = compare.Config(seeds=SEEDS, jobs=2, out="runs/relatives")


def sweep() -> list[dict]:
    """The gold score of every setting, a mean over the sweep's seeds."""
    settings = {f"{name}: {' '.join(words)}": (name, words, f"{text} {' '.join(words)}")
                for name, (text, choices) in SWEEP.items() for words in product(*choices)}
    variants = [compare.variant(key, text) for key, (_, _, text) in settings.items()]
    out = runtime.open_folder(COMPARE.out)
    jobs = compare.jobs_of(variants, SEEDS + SWEEP_SEEDS, out)[SEEDS * len(variants) :]
    compare.train(jobs, COMPARE.jobs, 1)
    scores = compare.score(COMPARE, jobs, out)
    found = {key: [mean(of.values()) for of in by_seed.values()] for key, by_seed in scores.items()}
    return [{"name": name, "settings": " ".join(words), "gold_by_seed": found[key], "gold": mean(found[key])}
            for key, (name, words, _) in settings.items()]


def main() -> None:
    tried = sweep()
    best = {name: max((row for row in tried if row["name"] == name), key=lambda row: row["gold"]) for name in SWEEP}
    commands = {name: f"{text} {best[name]['settings']}" for name, (text, _) in SWEEP.items()}
    dpo, rows = commands.pop("DPO"), []
    for name, text in commands.items():
        report = compare.compare(dpo, text, COMPARE)
        gold = {side: [mean(of.values()) for of in by_seed.values()] for side, by_seed in report["scores"].items()}
        found = report["difference"]
        rows.append({"name": name, "command": text, "settings": best[name]["settings"], "gold_by_seed": gold["B"],
                     "difference": {"value": found["mean"], "low": found["mean"] - found["half"],
                                    "high": found["mean"] + found["half"]},
                     "seeds_needed": report["seeds_needed"], "verdict": report["verdict"]})
    rows.insert(0, {"name": "DPO", "command": dpo, "settings": best["DPO"]["settings"], "gold_by_seed": gold["A"],
                    "difference": None, "seeds_needed": None, "verdict": ""})
    save("benchmarks/results/relatives.json", {
        "command": "python -m benchmarks.relatives", **machine(torch.device("cpu")), "seeds": SEEDS,
        "sweep_seeds": SWEEP_SEEDS, "rows": rows, "tried": tried})


if __name__ == "__main__":
    main()
