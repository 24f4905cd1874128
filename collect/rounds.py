"""Round after round: the policy answers fresh prompts, annotators choose, the policy learns from that, answers again.

    python -m collect.rounds out=runs/tiny/0/rounds rounds=3        the tiny world, where two annotators are simulated
    python -m collect.rounds annotators=people model=... prompts=prompts.jsonl prompts_per_round=200 votes=500 \\
        max_tokens=512 dpo=my_dpo.toml reward=my_reward.toml dev= out=runs/weekly

The talk's weekly loop: a week's preferences, a new model from them, and that one answers in the week that follows.
Preferences are about the policy that made the replies, so DPO starts from, and holds to, the policy of the round. The
reward model learns from all rounds so far; whether it still knows what annotators prefer is seen on the round's
held-out dialogues. A round is a folder. Each file is made once, whole, and the same command goes on where it stopped:

    prompts.jsonl          fresh ones, nobody has answered them before
    replies.jsonl          every raw reply, two to a turn; of people's rounds those to the shared prompts
    votes.jsonl            preferences, and votes.ratings.jsonl every answer, both as collect/annotate.py writes them
    train.jsonl            the preferences to learn from; every fifth dialogue is in heldout.jsonl
    reward/ dpo/ gold/     runs of reward.py, of dpo.py, whose model is the next policy, and of judge.py
    round.json             the round's line of the table: policy served, agreement, accuracy, next policy, its grade

With people the command prepares the round, prints how the rating page is started, and ends. Run again, it tells how
many preferences there are; once there are `votes` it trains the next policy and prepares the next round. The first
`shared` prompts are rated by everybody, to measure agreement. Preferences collected elsewhere go into votes.jsonl.
"""
import json
import random
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import runtime
from collect.annotate import ROOM, agreement, preference_of, rating_of, whole_reply
from data.formats import read_all
from data.llm import Request, Sampling, ask, open_model
from data.records import lines, write_lines
from data.tiny import pairs
from data.tiny.world import TASKS
from judging import report
from judging.entries import read_lines
from runtime import check_ranges, fail

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Config:
    model: str = "runs/tiny/0/sft/model"  # the first policy
    out: str = "runs/tiny/0/rounds"  # folder of the rounds, round_1 and so on
    rounds: int = 3                  # how many in all; more can be added later
    prompts: str = "runs/tiny/0/data/more_prompts.jsonl"  # each round takes the next of these
    prompts_per_round: int = 1500
    dev: str = "runs/tiny/0/data/dev.jsonl"  # the tiny world's dialogues on which every policy is graded; "": no grades
    annotators: Literal["simulated", "people"] = "simulated"
    votes: int = 500                 # people: preferences that end a round
    shared: int = 20                 # people: prompts of a round whose replies everybody rates, to measure agreement
    temperature: float = 1.0         # of the replies that are rated
    max_tokens: int = 64             # of a reply
    dpo: str = "configs/tiny/dpo.toml"        # settings of the policy's training
    reward: str = "configs/tiny/reward.toml"  # and of the reward model's
    seed: int = 0
    device: str = "auto"             # cpu, cuda, auto
    threads: int = 0                 # CPU threads; 0: PyTorch's choice

    def __post_init__(self):
        check_ranges(self, rounds=(1, inf), prompts_per_round=(5, inf), votes=(5, inf), shared=(0, inf),
                     temperature=(0.01, 10), max_tokens=(ROOM, inf), seed=(0, 10**9), threads=(0, 1024))
        if self.annotators == "people" and self.shared >= self.prompts_per_round:
            fail(f"shared={self.shared} leaves none of prompts_per_round={self.prompts_per_round}: lower it")
        if not (Path(self.model) / "config.json").is_file():
            missing = "holds no config.json" if Path(self.model).is_dir() else "no such folder"
            fail(f"model={self.model}: {missing}, expected a model directory, which `make demo` makes")
        for key in ("prompts", "dpo", "reward", *(["dev"] if self.dev else [])):
            if not Path(getattr(self, key)).is_file():
                fail(f"{key}={getattr(self, key)}: no such file, check the path")
        there = len(load_prompts(self))
        if there < self.rounds * self.prompts_per_round:
            fail(f"{self.prompts}: holds {there} prompts, {self.rounds} rounds of {self.prompts_per_round} take more")


# ------------------------------------------------------------------------------------- collecting

def load_prompts(config: Config) -> list[dict]:
    """The pool of prompts. "prompt" is what the user says first: what the rating page asks for."""
    simulated = config.annotators == "simulated"

    def with_prompt(record: dict, _) -> dict:
        if simulated and not (record["category"] in TASKS and "item" in record["turns"][0]):
            raise KeyError("item")
        prompt = record["turns"][0]["user"] if "turns" in record else record["prompt"]
        return record | {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}

    expected = "a dialogue of the tiny world, or annotators=people" if simulated else "'prompt' or 'turns'"
    return read_lines(config.prompts, with_prompt, f"is no prompt, expected {expected}")


def two_replies(model, asked: dict[str, list[dict]], folder: Path, config: Config, progress: str) -> list[list[str]]:
    """Two replies to each of the dialogues, by id; "" is one that failed or was cut off."""
    requests = [Request(messages, side, name) for name, messages in asked.items() for side in (0, 1)]
    sampling = Sampling(config.max_tokens, config.temperature)
    replies = ask(model, requests, sampling, folder / "replies.jsonl", progress=progress)
    texts = [reply.text.strip() if reply and reply.finished else "" for reply in replies]
    return [texts[i:i + 2] for i in range(0, len(texts), 2)]


def simulate(policy: str, dialogues: list[dict], folder: Path, number: int, config: Config) -> None:
    """Two annotators (data/tiny/pairs.py) rate both replies to every turn. The first one's choices are learnt from."""
    model = open_model(policy, config.device)
    chance = {name: random.Random(f"{config.seed} round {number} {name}") for name in ("a1", "a2")}
    settings, became, preferences, ratings = pairs.Config(seed=config.seed), Counter(), [], []
    histories: dict[str, list[dict]] = {d["id"]: [] for d in dialogues}
    for turn in range(max(len(d["turns"]) for d in dialogues)):
        going = [d for d in dialogues if len(d["turns"]) > turn and len(histories[d["id"]]) == 2 * turn]
        asked = {d["id"]: [*histories[d["id"]], {"role": "user", "content": d["turns"][turn]["user"]}] for d in going}
        replies = two_replies(model, asked, folder, config, f"round {number}, turn {turn + 1}")
        for d, texts in zip(going, replies, strict=True):
            if not all(texts):
                became["unfinished"] += 1  # a dialogue ends at a reply that was cut off
                continue
            messages, category = asked[d["id"]], d["category"]
            item = {"id": f"{d['id']}-{turn + 1}", "dialogue": d["id"], "turn": turn + 1, "category": category,
                    "messages": messages,
                    "replies": [whole_reply(text, f"reply {i}") for i, text in enumerate(texts, 1)]}
            verdicts = {} if texts[0] == texts[1] else {
                name: pairs.annotate(category, d["turns"][turn]["item"], texts, rng, settings)
                for name, rng in chance.items()}
            for name, verdict in verdicts.items():
                side, margin = verdict or (None, None)
                answer = {"scale": "choice", "choice": verdict and ("left", "right")[side], "margin": margin,
                          "flag": None if verdict else "skip", "seconds": None, "at": None}
                ratings.append(rating_of(item | {"annotator": name}, answer))
                if name == "a1" and verdict:
                    preferences.append(preference_of(item | {"annotator": name}, answer))
            chosen = verdicts["a1"][0] if verdicts.get("a1") else chance["a1"].randrange(2)
            became["identical" if not verdicts else "preferences" if verdicts["a1"] else "cannot tell"] += 1
            histories[d["id"]] = [*messages, {"role": "assistant", "content": texts[chosen]}]
    print(f"round {number}: {became.total()} turns: {', '.join(f'{n} {what}' for what, n in became.most_common())}")
    write_lines(folder / "votes.ratings.jsonl", ratings)
    write_lines(folder / "votes.jsonl", preferences)


def write_shared(policy: str, prompts: list[dict], folder: Path, config: Config) -> None:
    """shared.jsonl: two replies to each prompt, for everybody to rate."""
    asked = {str(i): record["prompt"] for i, record in enumerate(prompts, 1)}
    replies = two_replies(open_model(policy, config.device), asked, folder, config, "shared prompts")
    shared = [{"id": name, "prompt": record["prompt"], "replies": texts, "category": record.get("category", "none")}
              for name, record, texts in zip(asked, prompts, replies, strict=True)
              if all(texts) and texts[0] != texts[1]]
    print(f"{len(shared)} pairs for everybody; the other {len(prompts) - len(shared)} had not two different replies")
    write_lines(folder / "shared.jsonl", shared)


def collected(policy: str, folder: Path, number: int, config: Config) -> bool:
    """Whether the round has its preferences; if people are to give them, it prints how."""
    votes, simulated = folder / "votes.jsonl", config.annotators == "simulated"
    if not (folder / "prompts.jsonl").exists():
        first = (number - 1) * config.prompts_per_round
        prompts = load_prompts(config)[first : first + config.prompts_per_round]
        if config.shared and not simulated:
            write_shared(policy, prompts[: config.shared], folder, config)
        write_lines(folder / "prompts.jsonl", prompts if simulated else prompts[config.shared:])
    if simulated and not votes.exists():
        simulate(policy, lines(folder / "prompts.jsonl"), folder, number, config)
    count = len(votes.read_bytes().splitlines()) if votes.exists() else 0
    if simulated or count >= config.votes or (folder / "train.jsonl").exists():
        return True
    shared = [f"shared={folder / 'shared.jsonl'}"] if (folder / "shared.jsonl").exists() else []
    command = shlex.join(["python", "-m", "collect.annotate", f"models={json.dumps([policy])}",
                          f"prompts={folder / 'prompts.jsonl'}", *shared, f"out={votes}",
                          f"max_tokens={config.max_tokens}", f"temperature={config.temperature}"])
    print(f"round {number} has {count} of {config.votes} preferences; they are collected by\n\n    {command}\n\n"
          "and once there are enough, this command goes on")
    return False


# --------------------------------------------------------------------------------------- learning

def execute(command: list[str]) -> int:
    """A command's exit code. Ctrl-C reaches it too, and it saves before it ends."""
    process = subprocess.Popen(command)
    with suppress(KeyboardInterrupt):
        return process.wait()
    return process.wait()


def run(result: Path, script: str, config: Config, *options: str) -> None:
    """Have a script make a file, unless it is there."""
    if result.exists():
        return
    options = [*options, f"device={config.device}", f"threads={config.threads}"]
    print(f"\n$ python {script} {shlex.join(options)}", flush=True)
    code = execute([sys.executable, str(ROOT / script), *options])
    if code == 2:
        raise SystemExit(2)  # the script has said why
    if code or not result.exists():
        fail(f"{result}: {script} ended before it was made: run the same command again to go on")


def gold(policy: str, folder: Path, config: Config) -> dict:
    """Mean grade of the policy's replies to the dev dialogues, 0 to 100, and its interval over dialogues, if any."""
    if not config.dev:
        return {}
    run(folder / "report.json", "judge.py", config, f"models={json.dumps([f'policy={policy}'])}", f"data={config.dev}",
        f"out={folder}", "show=0", f"max_tokens={config.max_tokens}", f"seeds=[{config.seed}]")
    found = json.loads((folder / "report.json").read_text())["gold"]["policy"]
    return {key: found[key] for key in ("gold", "gold_interval", "words", "ended")}


def hold_out(folder: Path) -> None:
    """train.jsonl and heldout.jsonl, whole dialogues each."""
    file = folder / "votes.jsonl"
    votes = [vote | {"dialogue": vote.get("dialogue", vote["prompt"][0]["content"])}
             for vote in read_all(file, "preference")]
    dialogues = list(dict.fromkeys(vote["dialogue"] for vote in votes))
    held_out = set(dialogues[4::5])
    if not held_out:
        fail(f"{file}: holds {len(dialogues)} dialogues, expected five, of which one is held out: add more")
    write_lines(folder / "heldout.jsonl", [vote for vote in votes if vote["dialogue"] in held_out])
    write_lines(folder / "train.jsonl", [vote for vote in votes if vote["dialogue"] not in held_out])


def learn(policy: str, folder: Path, number: int, config: Config) -> dict:
    """What the round's preferences make of the policy; its line of the table."""
    if not (folder / "train.jsonl").exists():
        hold_out(folder)
    if not (folder / "reward_data.jsonl").exists():
        so_far = [folder.parent / f"round_{n}" / "train.jsonl" for n in range(1, number + 1)]
        write_lines(folder / "reward_data.jsonl", [vote for file in so_far for vote in lines(file)])
    train, held_out, ratings = (folder / f"{name}.jsonl" for name in ("train", "heldout", "votes.ratings"))
    common = [f"eval_data={held_out}", f"seed={config.seed}"]
    report_file, after = folder / "reward" / "report.json", folder / "dpo" / "model"
    run(report_file, "reward.py", config, "--config", config.reward, f"model={config.model}", "demos=",
        f"data={folder / 'reward_data.jsonl'}", f"out={folder / 'reward'}", *common)
    run(after / "config.json", "dpo.py", config, "--config", config.dpo, f"model={policy}", f"data={train}",
        f"out={folder / 'dpo'}", "samples=0", *common)
    reward = json.loads(report_file.read_text())["reward_model"]
    return {"round": number, "served": policy, "policy": str(after),
            "preferences": len(lines(train)) + len(lines(held_out)),
            "agreement": agreement(lines(ratings)) if ratings.exists() else None,
            "reward_accuracy": reward["accuracy"], "reward_pairs": reward["pairs"],
            **gold(str(after), folder / "gold", config)}


# ------------------------------------------------------------------------------------------ report

def table(rows: list[dict]) -> dict:
    """The rounds as a section of a report (judging/report.py)."""
    cells = []
    for row in rows:
        score, half, agreed = row.get("gold"), row.get("gold_interval"), row.get("agreement") or {}
        score = None if score is None else {"value": score, "low": score - half, "high": score + half}
        shares = (agreed.get("raw"), agreed.get("decided"), row.get("reward_accuracy"))
        raw, decided, accuracy = (None if share is None else 100 * share for share in shares)
        cells.append([row["round"], score, row.get("words"), row.get("preferences"), raw, agreed.get("n"),
                      agreed.get("kappa"), decided, accuracy, row.get("reward_pairs")])
    return {"title": "Rounds", "rows": cells,
            "columns": ["round", "gold score", "words", "preferences", "agree, %", "of", "kappa",
                        "agree if both chose, %", "reward model right, %", "of"],
            "text": "The score is that of the policy a round ends with, its interval over dialogues. Agreement is "
                    "between annotators of the same pairs; both saying that they cannot tell is agreement. The reward "
                    "model is tried on the round's held-out preferences."}


def main(config: Config) -> None:
    out = runtime.open_folder(config.out)
    began, new = out / "config.toml", runtime.config_toml(config)
    for line in began.read_text().splitlines() if began.exists() else []:
        key, _, old = line.partition(" = ")
        if key not in ("rounds", "votes", "device", "threads") and line not in new.splitlines():
            now = json.dumps(getattr(config, key, None))
            fail(f"{out}: was begun with {key}={old}, not {now}: choose another out=")
    runtime.write_text(began, new)
    runtime.setup(config.device, config.seed, config.threads)
    policy = config.model
    rows = [{"round": 0, "policy": policy, **gold(policy, out / "gold", config)}]
    for number in range(1, config.rounds + 1):
        folder = out / f"round_{number}"
        folder.mkdir(exist_ok=True)
        line = folder / "round.json"
        if not line.exists():
            if not collected(policy, folder, number, config):
                break
            runtime.write_text(line, json.dumps(learn(policy, folder, number, config), indent=1) + "\n")
        rows.append(json.loads(line.read_text()))
        policy = rows[-1]["policy"]
    result = {"title": "Rounds of preference collection", "about": {"out": config.out, "seed": config.seed},
              "sections": [table(rows)], "rounds": rows}
    report.write(result, out)
    print(f"{report.text(result)}\nnewest policy: {policy}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
