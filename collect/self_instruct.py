"""Self-Instruct: 175 tasks written by people become tens of thousands, written by a model.

    python -m collect.self_instruct model=runs/tiny/0/sft/model seeds=seed_tasks.jsonl instructions=100

The model (Wang et al. 2022, arXiv:2212.10560) is asked three times: for new instructions, with seeds and earlier finds
as examples; whether each is a classification; and for instances, input first, or for classifications label first,
since a model that starts with the input writes one label only.

    tasks.jsonl     the new tasks, in the form of the seeds      train.jsonl    the same as messages, shuffled
    replies.jsonl   raw replies, to resume from                  dropped.jsonl  what was left out, and why

Prompts are our own, their examples come from the seed file. Where we leave the published code:
  - str.capitalize lowered all letters but the first ("NASA" became "nasa"): we raise the first and leave the rest
  - an empty class label took the next line for the label: here the instance has no output, and is dropped
  - the word "Example" inside a text split it: here only at the start of a line, with its number
  - no presence penalties (2 and 1.5 there), as not every model offers them
  - one classification in a batch of five lowered the limit of all to 300 tokens: here it lowers its own
  - chat models answer "Yes.", repeat the number or heading they were given, and put blank lines between items: all
    is understood; a blank line, where the published code stopped the reply, ends an item
  - an instruction's ten nearest neighbours and its mean similarity are not kept: nothing reads them
"""
import random
import re
import string
from dataclasses import dataclass

from tqdm import tqdm

import runtime
from collect.rouge import Pool
from collect.synthetic import PROMPTS, Run, Settings, user
from data.llm import Reply, Request, Sampling, open_model
from data.records import Reject, check_messages
from judging.entries import read_lines

TEXTS = PROMPTS["self_instruct"]


@dataclass(frozen=True)
class Config(Settings):
    model: str = ""                  # checkpoint directory or endpoint
    seeds: str = ""                  # JSONL of tasks: instruction, instances [{input, output}], is_classification
    out: str = "runs/self_instruct"
    instructions: int = 100          # to make (52,000 were published); the last batch may bring a few more
    patience: int = 20               # batches in a row without a new instruction, then it asks for no more
    requests: int = 5                # in a batch
    examples: int = 8                # instructions shown in a request; the model goes on to twice as many, less one
    machine_examples: int = 2        # of them written by the model, once there are some
    temperature: float = 0.7         # of new instructions
    top_p: float = 0.5
    fewest_words: int = 4            # of an instruction
    most_words: int = 150
    similarity: float = 0.7          # ROUGE-L above which an instruction repeats another
    instances: int = 5               # at most, of a task

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "instructions", "patience", "requests", "examples", "instances")
        runtime.check_ranges(self, machine_examples=(0, self.examples), fewest_words=(1, self.most_words),
                             similarity=(0.01, 1))


def load_seeds(config: Config) -> list[dict]:
    def seed(row: dict, _) -> dict:
        instances = [{"input": str(i["input"]), "output": str(i["output"])} for i in row["instances"]]
        return {"instruction": str(row["instruction"]), "instances": instances,
                "is_classification": row["is_classification"] is True}

    seeds = read_lines(config.seeds, seed, "is no seed, expected instruction, instances (input, output), "
                                           "is_classification")
    if len(seeds) < config.examples or not all(seed["instances"] for seed in seeds):
        runtime.fail(f"{config.seeds}: has {len(seeds)} seeds, expected {config.examples} or more to show, each "
                     "with an instance: add some")
    return seeds


# --------------------------------------------------------------------------------- new instructions

def list_prompt(seeds: list[dict], made: list[dict], config: Config, rng: random.Random) -> list[dict]:
    """A numbered list of instructions, to be continued: at first 8 seeds, later 6 and 2 of the model's own."""
    shown = rng.sample(made, min(config.machine_examples, len(made)))
    shown += rng.sample(seeds, config.examples - len(shown))
    rng.shuffle(shown)
    lines = [f"{i}. {' '.join(task['instruction'].split()).rstrip(':')}" for i, task in enumerate(shown, 1)]
    return user(TEXTS["list"].format(last=2 * len(shown) - 1) + "\n".join(lines) + f"\n{len(shown) + 1}.")


def read_list(reply: Reply, config: Config) -> list[tuple[str, str]]:
    """The instructions that a reply proposes, and what is none, with the reason: (text, "" or why not)."""
    if not reply.finished:
        return [(reply.text, "cut by length")]
    before, *rest = re.split(r"(?:^|\n)\s*(\d+)\s?\. ", reply.text)
    numbers, texts, found = rest[::2], rest[1::2], []
    if before.strip() and numbers and numbers[0] == str(config.examples + 1):
        found.append((before, "before the list"))
    elif before.strip():  # it continues the bare number at the end of the prompt
        texts.insert(0, before)
    for text in texts:
        text, *more = re.split(r"\n\s*\n", text.strip(), maxsplit=1)
        found += [(text, ""), *((part, "after a blank line") for part in more)]
    return found or [(reply.text, "empty")]


def instruction_fault(instruction: str, config: Config) -> str:
    """Why an instruction is not taken, whatever the others are; "" if there is no reason."""
    words = len(instruction.split())
    banned = "|".join(TEXTS["banned"])
    faults = {
        "empty": not words,
        f"fewer than {config.fewest_words} words": words < config.fewest_words,
        f"more than {config.most_words} words": words > config.most_words,
        "speaks of what a text cannot hold": re.search(rf"\b({banned})\b", instruction, re.IGNORECASE),
        "starts with 'Write a program'": instruction.lower().startswith("write a program"),
        "starts with punctuation": instruction[:1] in string.punctuation,
        "starts outside ASCII": not instruction[:1].isascii(),
    }
    return next((fault for fault, found in faults.items() if found), "")


def take(text: str, reason: str, request: int, pool: Pool, made: list[dict], run: Run, config: Config) -> None:
    """Add a proposed instruction to those made, if it is sound and unlike everything in the pool."""
    instruction = " ".join(text.split())
    instruction = instruction[:1].upper() + instruction[1:]
    if reason := reason or instruction_fault(instruction, config):
        return run.drop("instruction", reason, request=request, text=text)
    if near := pool.too_similar(instruction):
        nearest = {pool.texts[near[0]]: near[1]}
        return run.drop("instruction", "too similar", request=request, text=text, most_similar=nearest)
    made.append({"id": f"task_{len(made)}", "instruction": instruction, "request": request})
    return pool.add(instruction)


def new_tasks(run: Run, model, seeds: list[dict], config: Config) -> list[dict]:
    """Batches of requests until there are enough tasks, or no more come."""
    last = 2 * config.examples
    sampling = Sampling(config.max_tokens, config.temperature, config.top_p,
                        stop=(f"\n{last}", f"{last}.", f"{last} ."))
    pool, made = Pool([seed["instruction"] for seed in seeds], config.similarity), []
    bar = tqdm(total=config.instructions, desc="instructions", mininterval=1)
    asked = idle = 0
    while len(made) < config.instructions and idle < config.patience:
        numbers = range(asked, asked + config.requests)
        asked += config.requests
        requests = [Request(list_prompt(seeds, made, config, random.Random(f"{config.seed} request {n}")), repeat=n)
                    for n in numbers]
        replies, before = run.ask(model, requests, sampling=sampling), len(made)
        if not any(replies):
            runtime.fail(f"{config.out}: no request of a batch was answered, see replies.failures.jsonl there: "
                         "run again to go on")
        for number, reply in zip(numbers, replies, strict=True):
            for text, reason in read_list(reply, config) if reply else [("", "no reply")]:
                take(text, reason, number, pool, made, run, config)
        idle = 0 if len(made) > before else idle + 1
        bar.update(len(made) - before)
    bar.close()
    if len(made) < config.instructions:
        print(f"only {len(made)} instructions: {config.patience} batches in a row brought none "
              "(more seeds or a higher temperature may)")
    return made


# ------------------------------------------------------------------------------ classification or not

def some_seeds(seeds: list[dict], classification: bool, most: int, rng: random.Random) -> list[dict]:
    kind = [seed for seed in seeds if seed["is_classification"] is classification]
    return rng.sample(kind, min(most, len(kind)))


def mark_classifications(run: Run, model, seeds: list[dict], tasks: list[dict], config: Config) -> None:
    """Ask of every task, after 31 seeds, if it is a classification. Only Yes, yes and YES count; no reply is a no."""
    rng = random.Random(f"{config.seed} classification")
    shown = some_seeds(seeds, True, 12, rng) + some_seeds(seeds, False, 19, rng)
    rng.shuffle(shown)
    text = TEXTS["classification"]
    for seed in shown:
        text += f"Task: {seed['instruction']}\nClassification: {'Yes' if seed['is_classification'] else 'No'}\n\n"
    requests = [Request(user(f"{text}Task: {task['instruction']}\nClassification:")) for task in tasks]
    replies = run.ask(model, requests, "classification or not", Sampling(3, 0.0, stop=("\n", "Task")))
    for task, reply in zip(tasks, replies, strict=True):
        task["is_classification"] = reply is not None and reply.text.strip().rstrip(".") in ("Yes", "yes", "YES")


# ----------------------------------------------------------------------------------------- instances

def instance_prompt(seeds: list[dict], classification: bool, most: int, config: Config) -> str:
    order = "output_first" if classification else "input_first"
    text, rng = TEXTS[order], random.Random(f"{config.seed} {order.replace('_', ' ')}")
    for seed in some_seeds(seeds, classification, most, rng):
        text += f"Task: {seed['instruction']}\n"
        for number, i in enumerate(seed["instances"], 1):
            given = f"Input: {i['input']}\n" if i["input"] else ""
            text += (f"Class label: {i['output']}\n{i['input']}\n\n" if classification else
                     f"Example {number}\n{given}Output: {i['output']}\n\n")
    return text


def read_input_first(text: str) -> list[tuple[str, str]]:
    """(input, output) of every "Example n", or of a lone "Output:"; no output heading means there is no input."""
    before, *parts = re.split(r"(?m)^[ \t]*Example[ \t]*\d+[ \t]*[.:]?", text)
    if re.search(r"Output\s*\d*\s*:", before):
        parts.insert(0, before)
    pairs = []
    for part in filter(str.strip, parts):
        given, *done = re.split(r"Output\s*\d*\s*:", part)
        given, done = (given, done[0]) if done else ("", given)
        given = re.sub(r"^\s*Input\s*\d*\s*:", "", given).strip()
        pairs.append((given, re.split(r"Input\s*\d*\s*:", done)[0].strip()))
    return pairs


def read_output_first(text: str) -> list[tuple[str, str]]:
    """(input, output) after every "Class label:": its line is the output, what follows the input."""
    parts = [part.partition("\n") for part in text.split("Class label:")[1:]]
    return [(given.strip(), label.strip()) for label, _, given in parts]


def sound(pairs: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[object, str]]]:
    """The instances of a task that can be used, and the others with the reason."""
    kept, faults = [], []
    for given, done in pairs:
        reason = ("empty output" if not done else "input equals output" if given == done else
                  "ends with a colon" if given.endswith(":") or done.endswith(":") else
                  "repeated" if (given, done) in kept else "")
        if reason:
            faults.append(((given, done), reason))
        else:
            kept.append((given, done))
    inputs = [given for given, _ in kept if given]
    if len(set(inputs)) < len(inputs):
        return [], faults + [(pair, "one input, two outputs: the whole task goes") for pair in kept]
    return kept, faults


def add_instances(run: Run, model, seeds: list[dict], tasks: list[dict], config: Config) -> None:
    for classification, shown, read, tokens, begin in (  # as many as in the published code
            (False, 12, read_input_first, 350, "Example 1"), (True, 17, read_output_first, 300, "Class label:")):
        some = [t for t in tasks if t["is_classification"] is classification]
        text = instance_prompt(seeds, classification, shown, config)
        requests = [Request(user(f"{text}Task: {t['instruction']}\n(Begin with \"{begin}\".)")) for t in some]
        replies = run.ask(model, requests, f"instances, {begin}", Sampling(tokens, 0.0, stop=("Example 6", "Task:")))
        for task, reply in zip(some, replies, strict=True):
            pairs, faults = (read(reply.text), []) if reply else ([], [])
            if not pairs:
                faults = [(reply.text, "no instance in the reply") if reply else ("", "no reply")]
            elif not reply.finished:
                faults = [(pairs.pop(), "cut by length")]
            pairs, others = sound(pairs)
            kept = random.Random(f"{config.seed} {task['id']}").sample(pairs, min(len(pairs), config.instances))
            faults += others + [(p, f"more than {config.instances} instances") for p in pairs if p not in kept]
            task["instances"] = [{"input": given, "output": done} for given, done in kept]
            for what, reason in faults:
                run.drop("instance", reason, task=task["id"], text=what)


# ------------------------------------------------------------------------------------ training records

def as_prompt(instruction: str, given: str, rng: random.Random) -> str:
    """One of the formats at random; half of the time the input loses its only field name, and its blank lines."""
    if rng.random() < 0.5:
        fields = re.findall(r"(?m)^[A-Za-z][\w ]{0,30}:", given)
        if len(fields) == 1:
            given = given.replace(fields[0], "", 1).strip()
        given = given.replace("\n\n", "\n")
    return rng.choice(TEXTS["with_input" if given else "without_input"]).format(i=instruction, x=given)


def training_records(run: Run, tasks: list[dict], source: str, config: Config) -> list[dict]:
    rng, records = random.Random(f"{config.seed} formats"), {}
    for task in tasks:
        for number, i in enumerate(task["instances"]):
            prompt = as_prompt(task["instruction"], i["input"], rng)
            messages = [*user(prompt), {"role": "assistant", "content": i["output"]}]
            try:
                check_messages(messages, "messages")
                reason = "repeated" if (prompt, i["output"]) in records else ""
            except Reject as reject:  # a NUL, half a surrogate pair
                reason = reject.kind
            if reason:
                run.drop("record", reason, task=task["id"], text=[prompt, i["output"]])
            else:
                records[prompt, i["output"]] = {"id": f"{task['id']}_{number}", "messages": messages, "source": source}
    shuffled = list(records.values())
    rng.shuffle(shuffled)
    return shuffled


def main(config: Config, model=None) -> None:
    seeds, run = load_seeds(config), Run(config)  # before a model is loaded
    model = model or open_model(config.model, config.device)
    tasks = new_tasks(run, model, seeds, config)
    mark_classifications(run, model, seeds, tasks, config)
    add_instances(run, model, seeds, tasks, config)
    records = training_records(run, tasks, f"self-instruct by {model.name}", config)
    run.write(f"{len(tasks)} instructions, {len(records)} training records",
              tasks=[task for task in tasks if task["instances"]], train=records)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
