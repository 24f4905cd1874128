"""A real model through the recipe: SmolLM2-135M-Instruct, piece by piece, into benchmarks/results/smollm2.json.

    make smollm2                                               the model, its check, a short DPO and a table

    python -m benchmarks.smollm2 replies                       five dialogues, greedy
    python -m benchmarks.smollm2 dpo kind=lora count=300 seed=1    train, then compare held-out pairs and replies
    python -m benchmarks.smollm2 compare                       the same of a model that is there: before DPO
    python -m benchmarks.smollm2 sft count=300                 the control: more SFT, on the chosen replies
    python -m benchmarks.smollm2 reward count=300              a reward model, its accuracy beside two baselines
    python -m benchmarks.smollm2 grpo                          GRPO with the rule of constraints.py as its reward
    python -m benchmarks.smollm2 choices model=runs/smollm2-135m/dpo-lora-300-0/model    ARC, PIQA, TruthfulQA
    python -m benchmarks.smollm2 same held=40                  their log-likelihoods beside transformers', and the speed
    python -m benchmarks.smollm2 rule model=...                share of held-out constraints kept (constraints.py)
    python -m benchmarks.smollm2 table                         what has been measured so far
    python judge.py --config configs/smollm2-135m/judge.toml data=question.jsonl     MT-Bench's questions, both turns

Each piece trains in a folder of its own, resumes there, and replaces its rows of the results alone. `data` is a folder
of real data sets (see PLACES); `pairs` and `held_out` name other files of preferences, and without any a rule makes
some. Every row has its stage, seed, measure, value, 95 % interval (Wilson's for shares, else bootstrap over prompts),
number of cases and command.
"""
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Literal

import torch

import dpo
import ppo
import reward
import runtime
import sft
from benchmarks import constraints
from benchmarks.measure import machine, save, timed
from checkpoints import load_model
from data.formats import read
from data.pack import Batch
from data.records import lines, write_lines
from data.scores import all_scores, mean_logprobs, report, response_logprob_sums, response_scores
from data.tokenizer import OWN, adopt_template, load_tokenizer
from data.trees import CHOSEN, REJECTED
from judging import choices as exams
from judging.ratings import mean_interval, wilson
from model import Transformer, generate
from runtime import fail

PLACES = {  # in the folder `data`
    "pairs": "real/ultrafeedback_train_1000.jsonl.gz", "held_out": "real/ultrafeedback_eval_200.jsonl.gz",
    "arc": "judge/multiple_choice/arc_challenge_dev.jsonl", "piqa": "datasets/multiple_choice/piqa_100.jsonl",
    "truthfulqa": "judge/multiple_choice/truthfulqa_mc_task_v0.json.gz"}
CONFIGS = Path("configs/smollm2-135m")
REPLIES, MAX_TOKENS = 32, 64  # sampled to held-out prompts, for their length; and the most that a sampled one may have
CURVE = ("step", "score", "kl", "length", "eos_rate")  # of ppo.py's metrics
EXAMS = ("arc", "piqa", "truthfulqa")
TURNS = 4      # of ours and transformers
BETA = 0.1     # of the implicit reward, as in dpo.toml
LONGEST = 1024  # tokens of a path: of held-out pairs longer ones are left out, with length=0 those to train on are cut
QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.", "Give me three tips for sleeping well.",
             "Explain to a child why the sky is blue.", "I have 3 apples and eat one. How many are left?")


@dataclass(frozen=True)
class Config:
    piece: str = "table"             # which piece; the word `piece=` may be left out
    model: str = "models/smollm2-135m"  # what is measured, or trained from
    beside: list[str] = ()           # other models, whose replies are shown beside its own
    base: str = "models/smollm2-135m"   # what DPO's implicit reward compares it with
    data: str = ""                   # folder of real data sets; "": preferences are made by a rule
    pairs: str = ""                  # a file of preferences to train on; "": data's
    held_out: str = ""               # a file of preferences to evaluate on; "": data's
    runs: str = "runs/smollm2-135m"  # folder of the runs
    out: str = "benchmarks/results/smollm2.json"
    kind: Literal["lora", "qlora", "full"] = "lora"
    count: int = 100                 # pairs to train on, at most
    held: int = 100                  # pairs, prompts or questions to evaluate on, at most
    length: int = 384                # tokens of a path to train on: pairs with a longer one are left out; 0: none is
    epochs: int = 0                  # over the pairs; 0: as the config file says
    dtype: Literal["float32", "bfloat16"] = "float32"  # of training; what is measured is measured in float32
    peers: str = ".venv-peers/bin/python"  # of `same`: an interpreter with transformers
    device: str = "auto"
    seed: int = 0
    threads: int = 0

    def __post_init__(self):
        if self.piece not in PIECES:
            fail(f"piece is '{self.piece}', expected one of {', '.join(PIECES)}")
        runtime.check_ranges(self, count=(1, 10**6), held=(1, 10**6), length=(0, 8192), epochs=(0, 100),
                             seed=(0, 10**9), threads=(0, 1024))

    @property
    def folder(self) -> Path:
        """Of the runs on real preferences, or on those of the rule."""
        return Path(self.runs) / ("real" if self.data or self.pairs else "rule")

    @property
    def precision(self) -> str:
        return "-bf16" if self.dtype == "bfloat16" else ""

    @property
    def max_length(self) -> int:
        return self.length or LONGEST

    def file(self, name: str) -> Path:
        return self.folder / f"{name}-{self.count if name == 'pairs' else self.held}.jsonl"


def place(config: Config, name: str) -> str:
    """Where a data set lies, or one line on how to get it."""
    named = getattr(config, name, "") or (f"{config.data}/{PLACES[name]}" if config.data else "")
    if not named:
        fail(f"{name}: no data set named: data= names a folder of them. For preferences of people online: "
             "hf download HuggingFaceH4/ultrafeedback_binarized --repo-type dataset --local-dir downloads/uf, then "
             "pairs=downloads/uf/data/train_prefs*.parquet held_out=downloads/uf/data/test_prefs*.parquet")
    return named


# ----------------------------------------------------------------------------------------- results

def add_rows(config: Config, rows: list[dict], curve: list[dict] | None = None) -> None:
    """Put the rows of a model, and its training curve, into the results, in place of those of the same measures."""
    file, (stage, seed) = Path(config.out), stage_of(config)
    found = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    words = [word for word in sys.argv[1:] if not word.startswith(("out=", "runs=", "data=", "peers="))]
    told = {"command": " ".join(["python -m benchmarks.smollm2", *words]), "threads": torch.get_num_threads()}
    new = [{"stage": stage, "seed": seed} | row | told for row in rows]
    keys = {(row["stage"], row["seed"], row["measure"]) for row in new}
    old = [row for row in found["rows"] if (row["stage"], row["seed"], row["measure"]) not in keys]
    curves = found.get("curves", {}) | ({f"{stage}, seed {seed}": curve} if curve else {})
    save(file, machine(runtime.find_device(config.device)) | {"rows": old + new, "curves": curves})
    for row in new:
        print(line_of(row))


def line_of(row: dict) -> str:
    interval = f"[{row['low']:.3f}, {row['high']:.3f}]" if row["low"] is not None else ""
    return f"{row['measure']:<44} {row['stage']:<18} {row['seed']:>4} {row['value']:>10.4g} {interval:<20} n={row['n']}"


def share(measure: str, hits: list[bool]) -> dict:
    low, high = wilson(sum(hits), len(hits))
    return {"measure": measure, "value": sum(hits) / len(hits), "low": low, "high": high, "n": len(hits)}


def mean(measure: str, values: list[float]) -> dict:
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    return {"measure": measure, "value": sum(values) / len(values), "low": low, "high": high, "n": len(values)}


def stage_of(config: Config) -> tuple[str, int]:
    """The name and the seed under which a model's rows stand, from the folder of its run: real/dpo-lora-100, 0."""
    path = Path(config.model)
    if path.name != "model":
        return "base" if path == Path(config.base) else path.name, config.seed
    name, _, seed = path.parent.name.rpartition("-")
    return f"{path.parent.parent.name}/{name}", int(seed) if seed.isdigit() else config.seed


# ------------------------------------------------------------------------------------------- pieces

def opened(path: str, config: Config) -> tuple[Transformer, object]:
    if not Path(path).is_dir():
        fail(f"{path}: no such model: make smollm2 fetches it, and each piece names the run it makes")
    device = runtime.find_device(config.device)
    model, tokenizer = load_model(path, torch.float32, device=device), load_tokenizer(path)
    adopt_template(model, tokenizer)
    return model, tokenizer


def sampled(config: Config, asked: list[str], temperature: float, n: int = 1) -> list[list]:
    """n replies (texts, tokens, whether they ended) to every question."""
    model, tokenizer = opened(config.model, config)
    prompts = [tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)[0] for text in asked]
    found = generate(model, prompts, MAX_TOKENS, temperature=temperature, n=n, stop_ids=tokenizer.stop_ids(),
                     seed=config.seed, progress=f"replies of {config.model}")
    return [[(tokenizer.decode(s.tokens).strip(), len(s.tokens), s.finished) for s in samples] for samples in found]


def replies(config: Config) -> None:
    models = [config.model, *config.beside]
    said = [sampled(replace(config, model=model), list(QUESTIONS), 0.0) for model in models]
    for i, question in enumerate(QUESTIONS):
        print(f"\n> {question}")
        for model, texts in zip(models, said, strict=True):
            text, _, finished = texts[i][0]
            name = f"[{stage_of(replace(config, model=model))[0]}] " if config.beside else ""
            print(f"{name}{text}{'' if finished else ' ...'}")


def pairs(config: Config) -> None:
    """What to train and evaluate on, unless it is there: of a data set the pairs that fit, else made by the rule."""
    runtime.open_folder(str(config.folder))
    for name, limit in (("pairs", config.count), ("held_out", config.held)):
        if config.file(name).is_file():
            continue
        real = config.folder.name == "real"
        length = config.length if name == "pairs" else LONGEST
        found = chosen_pairs(config, place(config, name), limit, length) if real else ruled_pairs(config, name, limit)
        write_lines(config.file(name), found)
        print(f"wrote {len(found)} pairs to {config.file(name)}", flush=True)


def chosen_pairs(config: Config, path: str, limit: int, length: int) -> list[dict]:
    """The first pairs whose paths have at most `length` tokens; short ones are cheaper, and no reply is cut."""
    if not Path(path).is_file():
        fail(f"{path}: no such file: pairs= and held_out= name other preferences")
    records, tokenizer = read(path)[0], load_tokenizer(config.model)

    def fits(record: dict) -> bool:
        asked = record["prompt"]
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        paths = [tokenizer.render([*asked, {"role": "assistant", "content": record[side]}])[0]
                 for side in ("chosen", "rejected")]
        return not length or max(map(len, paths)) <= length

    return [record | {"margin": margin_of(record)} for record in islice(filter(fits, records), limit)]


def margin_of(record: dict) -> float:
    """By how much the annotator's score of the chosen reply is higher, in whole steps up to 3; 0: as high."""
    scores = record.get("metadata") or record
    difference = scores.get("score_chosen", 0) - scores.get("score_rejected", 0)
    return float(min(3, math.ceil(difference)))


def ruled_pairs(config: Config, name: str, limit: int) -> list[dict]:
    """Four replies of the model to every prompt with a constraint; the first that keeps it against the first not."""
    asked = constraints.prompts(held_out=name == "held_out")[: 2 * limit]
    print(f"no real preferences are named (data=, or pairs= and held_out=): the model answers {len(asked)} prompts "
          "with constraints four times, and a rule prefers what keeps them", flush=True)
    found = []
    for prompt, samples in zip(asked, sampled(config, asked, 0.7, n=4), strict=True):
        kept = {ended and constraints.rule(prompt, text) == 1.0: text for text, _, ended in reversed(samples) if text}
        if len(kept) == 2:
            found.append({"prompt": prompt, "chosen": kept[True], "rejected": kept[False]})
    return found[:limit]


def trained(config: Config, script, name: str, **changes) -> str:
    """Run a script on the pairs with its config of configs/smollm2-135m; returns the folder of the model."""
    out = config.folder / f"{name}{config.precision}-{config.count}-{config.seed}"
    pairs(config)
    changes |= {"epochs": config.epochs} if config.epochs else {}
    run(config, script, name.partition("-")[0], out, data=str(config.file("pairs")), max_length=config.max_length,
        eval_data="", **changes)
    return f"{out}/model"


def run(config: Config, script, name: str, out: Path, **changes) -> None:
    settings = runtime.load_config(script.Config, "", ["--config", str(CONFIGS / f"{name}.toml")])
    script.main(replace(settings, model=config.base, out=str(out), seed=config.seed, threads=config.threads, cache="",
                        dtype=config.dtype, device=config.device, **changes))
    if not (out / "model" / "config.json").is_file():
        fail(f"{out}: was stopped before its end: the same command goes on from there")


def speed(config: Config) -> list[dict]:
    """Pairs or tokens a second of the run's steps, the first aside."""
    rows = lines(Path(config.model).parent / "metrics.jsonl")[1:]
    return [mean(f"{unit} a second in training", [row[f"{unit}_per_s"] for row in rows])
            for unit in ("pairs", "tokens") if rows and f"{unit}_per_s" in rows[0]]


def dpo_piece(config: Config) -> None:
    kinds = {"lora": {}, "qlora": {"quantize": "nf4"}, "full": {"lora_rank": 0, "lr": 1e-5}}
    cache = reference(config, f"{config.count}{config.precision}{'-nf4' if config.kind == 'qlora' else ''}")
    compare(replace(config, model=trained(config, dpo, f"dpo-{config.kind}", ref_cache=str(cache),
                                          **kinds[config.kind])))


def reference(config: Config, name: str) -> Path:
    """File of the base's log-probabilities, which all runs on the same pairs share."""
    return config.folder / f"reference-{name}.safetensors"


def sft_piece(config: Config) -> None:
    compare(replace(config, model=trained(config, sft, "sft")))


def margins(config: Config) -> list[dict]:
    """What the model and the base make of every held-out pair."""
    cache = reference(config, f"held_out-{config.held}")
    settings = dpo.Config(model=config.model, ref_model=config.base, ref_cache=str(cache),
                          max_length=LONGEST, micro_tokens=2048, cache="", dtype="float32")
    trees = dpo.load_data(str(config.file("held_out")), load_tokenizer(config.base), settings, "held out")
    policy, device = opened(config.model, config)[0], runtime.find_device(config.device)
    dpo.set_reference(policy, OWN, [trees], config.folder, settings, device)
    rows = []
    for tree, sums in zip(trees, all_scores(policy, trees, 2048, device, response_logprob_sums), strict=True):
        sides = {response.side: (p, r)
                 for response, p, r in zip(tree.responses, sums.tolist(), tree.ref_sums.tolist(), strict=True)}
        (policy_w, ref_w), (policy_l, ref_l) = sides[CHOSEN], sides[REJECTED]
        rows.append({"margin": BETA * (policy_w - ref_w - policy_l + ref_l), "chosen": policy_w, "rejected": policy_l})
    return rows


def compare(config: Config) -> None:
    """The implicit reward on held-out pairs, and the replies to their prompts; of the base what it can have of it."""
    pairs(config)
    rows, found = margins(config), []
    if config.model != config.base:
        found = [share("held-out accuracy, implicit reward", [row["margin"] > 0 for row in rows]),
                 mean("held-out margin, nats", [row["margin"] for row in rows]), *speed(config)]
    asked = [pair["prompt"] for pair in lines(config.file("held_out"))[:REPLIES]]
    asked = [text if isinstance(text, str) else text[-1]["content"] for text in asked]
    said = [samples[0] for samples in sampled(config, asked, 0.7)]
    add_rows(config, [
        *found, mean("log p of held-out chosen, nats", [row["chosen"] for row in rows]),
        mean("log p of held-out rejected, nats", [row["rejected"] for row in rows]),
        mean(f"tokens of a reply, at most {MAX_TOKENS}", [float(tokens) for _, tokens, _ in said]),
        share(f"replies that end within {MAX_TOKENS} tokens", [ended for _, _, ended in said])])
    if config.folder.name == "rule":
        rule_piece(config)


def grpo_piece(config: Config) -> None:
    """GRPO on the prompts that are not held out, the rule its reward; what it makes of those that are."""
    runtime.open_folder(config.runs)
    file = Path(config.runs) / "constraints.jsonl"
    out = Path(config.runs) / "rule" / f"grpo{config.precision}-{config.seed}"
    write_lines(file, [{"prompt": text} for text in constraints.prompts(False)])
    run(config, ppo, "grpo", out, data=str(file))
    curve = [{key: row[key] for key in CURVE} for row in lines(out / "metrics.jsonl")]
    rule_piece(replace(config, model=f"{out}/model"), curve)


def rule_piece(config: Config, curve: list[dict] | None = None) -> None:
    """Share of held-out constraints kept, over all prompts and by kind, at temperature 0.7."""
    asked = constraints.prompts(held_out=True)[: config.held]
    said = [samples[0] for samples in sampled(config, asked, 0.7)]
    hits = [constraints.rule(prompt, text) == 1.0 for prompt, (text, _, _) in zip(asked, said, strict=True)]
    kinds = [constraints.kind(prompt) for prompt in asked]
    add_rows(config, [
        share("constraints kept", hits),
        *(share(f"constraints kept, {name}", [hit for hit, of in zip(hits, kinds, strict=True) if of == name])
          for name in dict.fromkeys(kinds)),
        mean(f"tokens under a constraint, at most {MAX_TOKENS}", [float(tokens) for _, tokens, _ in said]),
    ], curve)


def choices_piece(config: Config) -> None:
    """ARC-Challenge, PIQA and TruthfulQA without examples (TruthfulQA has six of its own)."""
    model, tokenizer = opened(config.model, config)
    found = []
    for task in EXAMS:
        exam = exams.read_exam(task, place(config, task), shots=0, limit=config.held)
        result = exams.evaluate(model, tokenizer, exam, micro_tokens=2048, progress=task)
        for measure in ("acc", "acc_norm") if task != "truthfulqa" else ("mc1", "mc2"):
            value, half = result[measure], 1.96 * result[f"{measure}_stderr"]
            found.append({"measure": f"{result['name']}, {measure}", "value": value, "low": max(0.0, value - half),
                          "high": min(1.0, value + half), "n": result["n"]})
    add_rows(config, found)


def same_piece(config: Config) -> None:
    """Log-likelihoods of the choices beside transformers', question by question in turns: how far apart, how fast."""
    if not Path(config.peers).is_file():
        fail(f"{config.peers}: no such file: `make bench-peers` builds it, or set peers=")
    model, tokenizer = opened(config.model, config)
    asked = []
    for task in EXAMS:
        exam = exams.read_exam(task, place(config, task), shots=0, limit=config.held)
        for part in exam.asked.values():
            asked += exams.to_requests(tokenizer, part, model.config.max_positions, bos=tokenizer.adds_bos)[0]
    apart, exactly, rates, theirs = [], [], [], []
    for i in range(TURNS):
        requests = list(dict.fromkeys(request for question in asked[i::TURNS] for request in question))
        found, seconds = timed(exams.likelihoods, model, requests, 2048)
        command = [config.peers, "-m", "benchmarks.peers_choices", config.model, str(torch.get_num_threads())]
        done = subprocess.run(command, input=json.dumps(requests), stdout=subprocess.PIPE, text=True, check=True)
        other = json.loads(done.stdout)
        for distances, values in ((apart, other["values"]), (exactly, other["exact"])):
            distances += [abs(found[request] - value) for request, value in zip(requests, values, strict=True)]
        rates.append(len(requests) / seconds)
        theirs.append(len(requests) / other["seconds"])
    far = [{"measure": f"log-likelihood of a choice, largest distance from transformers'{how}, nats",
            "value": max(distances), "low": None, "high": None, "n": len(apart)}
           for how, distances in (("", apart), (" with a softmax in fp64", exactly))]
    ratios = [ours / other for ours, other in zip(rates, theirs, strict=True)]
    speeds = {"a second": rates, "a second by transformers": theirs, "times as many": ratios}
    add_rows(config, [*far, *({"measure": f"choices, {name}", "value": median(values), "low": min(values),
                              "high": max(values), "n": len(apart)} for name, values in speeds.items())])


def reward_piece(config: Config) -> None:
    """Accuracy on held-out pairs, over all and by the margin of the annotators' scores, beside two baselines."""
    path = trained(config, reward, "reward")
    device = runtime.find_device(config.device)
    model, tokenizer = load_model(path, torch.float32, device=device), load_tokenizer(path)
    settings = reward.Config(max_length=LONGEST, cache="", threads=config.threads)
    trees = reward.load_data(str(config.file("held_out")), tokenizer, settings, "held out")
    scorers: dict[str, tuple[Transformer, Callable]] = {
        "reward model": (model, response_scores), "log p per token": (opened(config.base, config)[0], mean_logprobs),
        "length": (model, lengths)}
    found = []
    for name, (scorer, score) in scorers.items():
        result = report(trees, all_scores(scorer, trees, 2048, device, score))
        parts = {"": (result["accuracy"], result["pairs"])}
        parts |= {f", margin {margin}": part for margin, part in result["by_margin"].items()}
        found += [share(f"accuracy, {name}{part}", [i < round(accuracy * n) for i in range(n)])
                  for part, (accuracy, n) in parts.items()]
    add_rows(replace(config, model=path), found)


def lengths(_: Transformer, batch: Batch) -> torch.Tensor:
    return batch.lengths.float()


def table(config: Config) -> None:
    """Before and after: each measure in a line, the stages and seeds under each other."""
    if not Path(config.out).is_file():
        fail(f"{config.out}: nothing has been measured yet: python -m benchmarks.smollm2 dpo")
    rows = json.loads(Path(config.out).read_text())["rows"]
    order = list(dict.fromkeys(row["measure"] for row in rows))
    print("\n".join(line_of(row) for row in sorted(rows, key=lambda row: order.index(row["measure"]))))


PIECES: dict[str, Callable[[Config], None]] = {
    "replies": replies, "dpo": dpo_piece, "sft": sft_piece, "reward": reward_piece, "compare": compare,
    "grpo": grpo_piece, "choices": choices_piece, "same": same_piece, "rule": rule_piece, "table": table}

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-") and "=" not in words[0]:
        words[0] = f"piece={words[0]}"
    settings = runtime.load_config(Config, __doc__, words)
    runtime.setup(settings.device, settings.seed, settings.threads)
    PIECES[settings.piece](settings)
