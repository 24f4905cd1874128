"""Make the tiny world's data, and from it the base model that is shipped in data/tiny/base.

    python -m data.tiny.build                                data, tokenizer, pretraining (configs/tiny/pretrain.toml)
    python -m data.tiny.build part=data seed=1 out=...       what one run of the recipe reads, in two seconds

    sft.jsonl   demonstrations              sft_dev.jsonl         the same on held-out content, for the evaluation loss
    prompts.jsonl   to collect preferences on      dev.jsonl, test.jsonl    to judge on, the same for every seed
    more_prompts.jsonl   the same for the reward model alone, which needs more of them
    verses.jsonl, pretrain.jsonl, pretrain_eval.jsonl     raw text (part=all)

The pretraining corpus is what a base model might have met on the web of the tiny world: prose (lives, stories,
anecdotes, passages, lists, sums, code) and pages of questions with answers in several layouts, never in the chat
template. Everything drawn from a task keeps to the training split (`keys` says of what content a record is), and a
text that shares 13 words in a row with a held-out prompt is dropped. What the world is like is no task and is told
freely: that Anna lives in Rome, or that a cat is an animal, also where asking for it is held out; without stated
facts open questions could not be answered at all.

Pretraining begins with 0.4 M tokens of verses alone, words in no order said twice or thrice. In them nothing but
copying pays, and the heads that copy (Olsson et al. 2022, arXiv:2209.11895) are there after 150 steps. On the corpus
alone they were still missing after 8 M tokens, with a tenth of verses mixed in after 1.5 M; and every task that looks
something up in its prompt needs them.
"""
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import sentencepiece
import torch
from tqdm import trange

import runtime
from checkpoints import save_model
from data.records import lines, write_lines
from data.tiny import world
from data.tiny.world import CLASSES, FACTS, NAMES, PEOPLE, TASKS, an, capital, demonstrate, dialogue, plural, she, split
from data.tokenizer import load_tokenizer
from model import ModelConfig, Transformer, init_weights

# The base: 2.95 M parameters, 5.9 MB in bf16. 1536 pieces hold every word of the world whole; 256 of them are bytes.
BASE = {"vocab_size": 1536, "width": 192, "layers": 6, "heads": 6, "kv_heads": 6, "head_dim": 32, "mlp_width": 512,
        "max_positions": 512}


@dataclass(frozen=True)
class Config:
    out: str = "runs/tiny/base"      # where the data (and the pretraining run) go
    part: Literal["all", "data"] = "all"
    seed: int = 0
    demos: int = 5000                # demonstrations for SFT
    prompts: int = 5000              # dialogues for preference collection
    more_prompts: int = 10_000       # further ones for the reward model
    evals: int = 40                  # held-out dialogues per task, in dev and in test each, at most 40
    documents: int = 650_000         # pretraining texts, about 61 tokens each
    ship: str = ""                   # folder that receives the trained base; data/tiny/base for the shipped one

    def __post_init__(self):
        runtime.check_ranges(self, seed=(0, 2**31), evals=(1, 40), demos=(1, 10**7), prompts=(1, 10**7),
                             more_prompts=(1, 10**7), documents=(1, 10**7))


# ----------------------------------------------------------------------- the web of the tiny world

LAYOUTS = [("Question: {}\n", "Answer: {}\n"), ("Task: {}\n", "Done: {}\n"), ("Q: {}\n", "A: {}\n"), ("{}\n", "{}\n")]
WEB_STYLES = {"careful": 0.4, "terse": 0.5, "sloppy": 0.1}


def keys(record: dict) -> list[str]:
    """What content a dialogue is about, turn by turn."""
    return [f"{record['category']} {TASKS[record['category']].key(turn['item'])}" for turn in record["turns"]]


def page(rng: random.Random) -> tuple[str, list[str]]:
    """One to four dialogues in one layout, half of the time all answered in one style; the text and its keys."""
    ask, answer = rng.choice(LAYOUTS)
    one_style, lines, about = rng.random() < 0.5, [], []
    style = world.pick(rng, WEB_STYLES)
    for _ in range(rng.choice([1, 1, 2, 4])):
        style = style if one_style else world.pick(rng, WEB_STYLES)
        record = dialogue(rng, shares="pretraining")
        about += keys(record)
        for m in demonstrate(record, rng, style):
            lines.append((ask if m["role"] == "user" else answer).format(m["content"]))
    return "".join(lines).strip(), about


def life(rng: random.Random) -> str:
    """Facts about one person, in any order, by name or pronoun."""
    name, told = rng.choice(NAMES), []
    for fact in rng.sample(list(FACTS), rng.randint(1, len(FACTS))):
        value = PEOPLE[name][fact]
        who = name if not told or rng.random() < 0.5 else capital(she(name))
        told.append(FACTS[fact]["answer"].format(n=who, v=value, a=an(value)))
    return " ".join(told)


def inventory(rng: random.Random) -> str:
    """Four to six people and their things, then who has what and of which colour, in any order: ten lookups a text."""
    n, task = rng.randint(4, 6), TASKS["closed_qa"]
    facts = list(zip(*(rng.sample(values, n) for values in (NAMES, CLASSES["colour"], CLASSES["object"])), strict=True))
    questions = [{"facts": facts, "about": [i, what]} for i in range(n) for what in ("who", "colour")]
    rng.shuffle(questions)
    return " ".join([task.passage(questions[0]), *(task.solve(question)[0] for question in questions)])


WORDS = [*NAMES, *(word for values in CLASSES.values() for word in values)]


def verse(rng: random.Random) -> str:
    """Five to twelve words in no order, said twice or thrice."""
    return " ".join([rng.choice(WORDS) for _ in range(rng.randint(5, 12))] * rng.choice([2, 2, 3]))


PROSE = {"life": 4, "inventory": 4, "extract": 3, "rewrite": 2, "summarize": 2, "generation": 1, "closed_qa": 1,
         "classify": 1, "list": 1, "kind": 1, "sum": 1, "coding": 1, "verse": 1}  # tasks, and kinds that are none


def prose(rng: random.Random) -> tuple[str, list[str]]:
    """A text of one of the kinds in PROSE, and its keys."""
    kind = world.pick(rng, PROSE)
    if kind in TASKS:
        item = TASKS[kind].draw(rng)
        while split(kind, item) != "train" or (kind == "classify" and "events" not in item):
            item = TASKS[kind].draw(rng)
        return retell(kind, item, rng), [f"{kind} {TASKS[kind].key(item)}"]
    if kind == "life":
        return " ".join(life(rng) for _ in range(rng.randint(1, 3))), []
    if kind in ("inventory", "verse"):
        return inventory(rng) if kind == "inventory" else verse(rng), []
    if kind == "sum":
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return f"{max(a, b)} - {min(a, b)} = {abs(a - b)}." if rng.random() < 0.5 else f"{a} + {b} = {a + b}.", []
    name = rng.choice(list(CLASSES))
    if kind == "kind":
        return f"{rng.choice(CLASSES[name])} is {an(name)}.", []
    return f"{capital(plural(name))}: {', '.join(rng.sample(CLASSES[name], rng.randint(2, 5)))}.", []


def retell(name: str, item: dict, rng: random.Random) -> str:
    """What a task's item is about, as prose, most of it said again in other words: a small model has to look it up."""
    task = TASKS[name]
    if name in ("closed_qa", "rewrite"):  # go on with the same item
        closed = name == "closed_qa"
        said = [task.solve(item)[0]] if closed else [task.sentence(item["source"]), task.sentence(item["target"])]
        for _ in range(rng.randint(1, 5) if closed else rng.randint(0, 3)):
            item, _ = task.follow(item, rng)
            said.append(task.solve(item)[0] if closed else task.sentence(item["target"]))
        return " ".join([task.passage(item), *dict.fromkeys(said)] if closed else said)
    if name == "extract":
        kinds = list(dict.fromkeys(kind for kind, _ in rng.sample(item["things"], len(item["things"]))))
        found = {kind: ", ".join(word for of, word in item["things"] if of == kind) for kind in kinds}
        return " ".join([task.text(item), *(f"{capital(plural(kind))}: {words}." for kind, words in found.items())])
    if name == "classify":
        return f"{task.text(item)}. {capital(she(item['name']))} is {item['right']}."
    answer = task.answer(item, rng.choice(["careful", "terse"]) if name == "generation" else "careful", rng)
    return f"{task.anecdote(item)} {answer}" if name == "summarize" else answer


# ------------------------------------------------------------------------------------- writing it all

NGRAM = 13
VERSES = 16_000  # 250 steps


def ngrams(text: str) -> set[tuple[str, ...]]:
    said = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(said[i : i + NGRAM]) for i in range(len(said) - NGRAM + 1)}


def draw(split: str, rng: random.Random, evals: int) -> list[dict]:
    """Different dialogues of a split, `evals` of each task."""
    records: dict[str, list[dict]] = {task: [] for task in TASKS}
    while any(len(x) < evals for x in records.values()):
        record = dialogue(rng, split)
        known = records[record["category"]]
        if len(known) < evals and record["turns"][0] not in [r["turns"][0] for r in known]:
            known.append(record)
    return [{"id": f"{split}-{task}-{i}"} | r for task, x in records.items() for i, r in enumerate(x)]


def held_out(evals: int) -> dict[str, list[dict]]:
    """The dev and test dialogues, `evals` of each task: the same for every seed."""
    return {name: draw(name, random.Random(f"{name} set of the tiny world"), evals) for name in ("dev", "test")}


def demo(rng: random.Random, wanted: str) -> tuple[dict, str]:
    """A demonstration, and its text if that has to be checked."""
    record = dialogue(rng, wanted, shares="sqrt_surge")
    messages = demonstrate(record, rng)
    text = "" if wanted == "dev" else " ".join(m["content"] for m in messages)
    return {"messages": messages, "category": record["category"], "keys": keys(record)}, text


def prompt(rng: random.Random) -> tuple[dict, str]:
    record = dialogue(rng)
    return record | {"id": f"{rng.getrandbits(32):08x}"}, " ".join(turn["user"] for turn in record["turns"])


def document(rng: random.Random, only_verse: bool = False) -> tuple[dict, str]:
    text, about = (verse(rng), []) if only_verse else page(rng) if rng.random() < 0.6 else prose(rng)
    return {"text": text, "keys": about}, text


def write_data(config: Config, out: Path) -> None:
    sets = held_out(config.evals)
    for name, records in sets.items():
        write_lines(out / f"{name}.jsonl", records)
    asked = [turn["user"] for records in sets.values() for record in records for turn in record["turns"]]
    forbidden = set().union(*map(ngrams, asked))
    dropped = 0

    def write(name: str, count: int, make: Callable[..., tuple[dict, str]], *about) -> None:
        """The first `count` records whose text shares no 13 words with a held-out prompt."""
        nonlocal dropped
        with (out / name).open("w") as file:
            for _ in trange(count, desc=name, mininterval=1, disable=count <= 10_000):
                record, text = make(*about)
                while not forbidden.isdisjoint(ngrams(text)):
                    dropped += 1
                    record, text = make(*about)
                file.write(json.dumps(record) + "\n")

    seed = config.seed
    write("sft.jsonl", config.demos, demo, random.Random(f"demonstrations {seed}"), "train")
    write("sft_dev.jsonl", 400, demo, random.Random("held-out demonstrations"), "dev")
    write("prompts.jsonl", config.prompts, prompt, random.Random(f"prompts {seed}"))
    write("more_prompts.jsonl", config.more_prompts, prompt, random.Random(f"more prompts {seed}"))
    if config.part == "all":
        rng = random.Random(f"documents {seed}")
        write("verses.jsonl", VERSES, document, rng, True)
        write("pretrain.jsonl", config.documents, document, rng)
        write("pretrain_eval.jsonl", 2000, document, rng)
    print(f"{out}: {config.demos} demonstrations, {config.prompts} prompts, {len(sets['test'])} test and "
          f"{len(sets['dev'])} dev dialogues; {dropped} texts dropped for {NGRAM} words in a row of a held-out prompt")


def make_start(config: Config, out: Path) -> None:
    """A tokenizer learnt from the corpus and a model with random weights, as a Hugging Face directory."""
    out.mkdir(parents=True, exist_ok=True)
    with (out.parent / "pretrain.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in islice(file, 100_000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines()),
        model_prefix=str(out / "tokenizer"), model_type="bpe", vocab_size=BASE["vocab_size"], byte_fallback=True,
        split_digits=True, add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        control_symbols=["<|system|>", "<|user|>", "<|assistant|>"], num_threads=1, minloglevel=2)
    (out / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "add_bos_token": True, "add_eos_token": False, "legacy": False, "add_prefix_space": False}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    model = Transformer(ModelConfig(**BASE))
    init_weights(model, config.seed)
    save_model(model, out, load_tokenizer(out), dtype=torch.bfloat16)


def pretrain(config: Config, out: Path, name: str, *options: str) -> Path:
    """Train on out/<name>.jsonl, or resume; returns the run's folder, out/<name>."""
    command = [sys.executable, "-m", "sft", "--config", "configs/tiny/pretrain.toml", f"data={out / name}.jsonl",
               f"seed={config.seed}", f"out={out / name}", *options]
    if subprocess.run(command).returncode or not (out / name / "model").exists():
        runtime.fail(f"{out / name}: pretraining ended early: run the same command again to go on")
    return out / name


def ship(config: Config, runs: list[Path]) -> None:
    """Copy the trained base to where it is shipped from, with a note of how it was made."""
    shutil.copytree(runs[-1] / "model", config.ship, dirs_exist_ok=True)
    steps = [step for run in runs for step in lines(run / "metrics.jsonl")]
    log = {"command": " ".join(["python -m data.tiny.build", *sys.argv[1:]]), "seed": config.seed,
           "finished": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "steps": len(steps),
           "tokens": int(sum(s["tokens"] for s in steps)),
           "minutes": round(sum(s["tokens"] / s["tokens_per_s"] for s in steps) / 60, 1),
           "last_loss": round(steps[-1]["loss"], 4),
           "eval_loss": {s["step"]: round(s["eval_loss"], 4) for s in steps if "eval_loss" in s}}
    (Path(config.ship) / "build.json").write_text(json.dumps(log, indent=1) + "\n")


def main(config: Config) -> None:
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if config.part == "data" or not (out / "verses" / "config.toml").is_file():  # else an earlier run is resumed
        write_data(config, out)
        if config.part == "data":
            return
        make_start(config, out / "start")
    copying = ["schedule=constant", "warmup_ratio=0.4", "eval_every=0", "samples=0"]
    verses = pretrain(config, out, "verses", f"model={out / 'start'}", *copying)
    corpus = pretrain(config, out, "pretrain", f"model={verses / 'model'}", f"eval_data={out / 'pretrain_eval.jsonl'}")
    if config.ship:
        ship(config, [verses, corpus])


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
