"""Gold scores in the tiny world: the mean grade of a reply, 0 to 100, and how sure it is.

`data/tiny/world.py` grades every reply from 0 to 1. Each trained model is a sample of one: with several seeds
intervals are over seeds (Student's t, 95 %); with one they are over dialogues, and say nothing of another training run.
"""
import math
import random
from collections.abc import Sequence
from statistics import mean, stdev

import torch

from checkpoints import load_model
from data.tiny.world import demonstrate, dialogue, gold, words
from data.tokenizer import load_tokenizer
from judging.games import Answers
from judging.ratings import end_interval, t975
from judging.tables import bounded, dots, grid_section
from model import generate


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval of independent values; half-width NaN for a single one."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), t975(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def summarize(scores: dict[int, list[list[dict]]], dialogues: list[dict],
              baseline: dict[int, list[list[dict]]]) -> dict:
    """One model's numbers, in points of 100, from its graded replies by seed, dialogue and turn."""
    said = [d for graded in scores.values() for d in graded]
    everything, follow_ups = [r for d in said for r in d], [r["gold"] for d in said for r in d[1:]]
    by_seed = {seed: 100 * mean(r["gold"] for d in graded for r in d) for seed, graded in scores.items()}
    # Of one seed dialogues are independent, the replies of one are not.
    half = interval(list(by_seed.values()) if len(by_seed) > 1 else [100 * mean(r["gold"] for r in d) for d in said])[1]
    pairs = [(a["gold"], b["gold"]) for seed in scores for x, y in zip(scores[seed], baseline[seed], strict=True)
             for a, b in zip(x, y, strict=True)]
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    by_task: dict[str, list[float]] = {d["category"]: [] for d in dialogues}
    for d, replies in zip(dialogues * len(scores), said, strict=True):
        by_task[d["category"]] += [r["gold"] for r in replies]
    return {"gold": mean(by_seed.values()), "gold_interval": half, "dialogues": len(dialogues), "gold_by_seed": by_seed,
            "win_rate": 50 * (1 + (wins - losses) / len(pairs)), "n": len(pairs),
            "wins": wins, "losses": losses, "draws": len(pairs) - wins - losses,
            "category": {task: 100 * mean(grades) for task, grades in by_task.items()},
            "category_n": {task: len(grades) for task, grades in by_task.items()},
            "first_turn": 100 * mean(d[0]["gold"] for d in said),
            "follow_up": 100 * mean(follow_ups) if follow_ups else None,
            "ended": 100 * mean(r["finished"] for r in everything),
            "words": mean(len(words(r["text"])) for r in everything)}


def sections(models: dict[str, dict], baseline: str, seeds: int) -> list[dict]:
    """The tables and figures of summaries by model."""
    cells = {}
    for name, m in models.items():
        low, high = m["gold"] - m["gold_interval"], m["gold"] + m["gold_interval"]
        if low == high:  # all alike
            low, high = end_interval(m["gold"], seeds if seeds > 1 else m["dialogues"], 0, 100)
        cells[name] = bounded(m["gold"], max(low, 0), min(high, 100))
    rows = [[name, cells[name], *(m[key] for key in ("win_rate", "first_turn", "follow_up", "ended", "words", "n"))]
            for name, m in models.items()]
    tasks = list(next(iter(models.values()))["category"])
    grid = [[m["category"][task] for task in tasks] for m in models.values()]
    over = f"{seeds} seeds" if seeds > 1 else "dialogues: another training run would differ by more"
    columns = ["model", "gold score", f"wins against {baseline}, %", "first turn", "follow-ups", "ended, %", "words",
               "replies"]
    named = [task.replace("_", " ") for task in tasks]
    counts = ", ".join(f"{task} {n}" for task, n in zip(
        named, next(iter(models.values()))["category_n"].values(), strict=True))
    return [{"title": "Gold score", "text": f"Mean grade of a reply, 0 to 100; 95 % intervals over {over}.",
             "rows": rows, "columns": columns, "figure": dots(cells, "gold score")},
            grid_section("Gold score by task", f"Replies of each model: {counts}.", list(models), named, grid,
                         "gold score")]


def few_shot_answer(path: str, dialogues: list[dict], max_tokens: int, temperature: float, seed: int,
                    device: torch.device, progress: str) -> list[list[dict]]:
    """In-context learning in the tiny world: three examples of the task as text; the reply ends with its line."""
    texts = []
    for i, d in enumerate(dialogues):
        rng, text = random.Random(f"{seed} {i}"), ""
        for _ in range(3):
            example = dialogue(rng)
            while example["category"] != d["category"]:
                example = dialogue(rng)
            for m in demonstrate(example, rng, "careful"):
                text += f"{'Question' if m['role'] == 'user' else 'Answer'}: {m['content']}\n"
        texts.append(text)
    tokenizer, model = load_tokenizer(path), load_model(path, dtype=torch.float32, device=device)
    newline = tokenizer.encode("\n", continues=True)[-1]
    said: list[list[dict]] = [[] for _ in dialogues]
    for turn in range(max(len(d["turns"]) for d in dialogues)):
        going = [i for i, d in enumerate(dialogues) if len(d["turns"]) > turn]
        for i in going:
            texts[i] += f"Question: {dialogues[i]['turns'][turn]['user']}\nAnswer:"
        replies = generate(model, [[tokenizer.bos_id, *tokenizer.encode(texts[i])] for i in going], max_tokens,
                           temperature, stop_ids=(newline, tokenizer.eos_id), seed=seed * 10 + turn,
                           progress=f"{progress}, turn {turn + 1}")
        for i, (sample,) in zip(going, replies, strict=True):
            said[i].append({"text": tokenizer.decode(sample.tokens).strip(), "finished": sample.finished})
            texts[i] += f" {said[i][-1]['text']}\n"
    return said


def grade_all(answers: Answers, dialogues: list[dict]) -> dict[tuple[str, int], list[list[float]]]:
    return {key: [[gold(d["category"], turn["item"], r["text"], r["finished"])
                   for turn, r in zip(d["turns"], said, strict=False)]
                  for d, said in zip(dialogues, replies, strict=True)] for key, replies in answers.said.items()}


def summaries(answers: Answers, dialogues: list[dict], grades: dict[tuple[str, int], list[list[float]]],
              baseline: str, missing: str) -> dict[str, dict]:
    """summarize's numbers by model, over the turns that all models answered, or ("loss") where none came a grade of 0.

    Empty if there is no turn that all answered.
    """
    graded: dict[str, dict[int, list]] = {}
    for (name, seed), replies in answers.said.items():
        pairs = zip(replies, grades[name, seed], strict=True)
        graded.setdefault(name, {})[seed] = [[r | {"gold": g} for r, g in zip(*both, strict=True)] for both in pairs]
    runs = [said for by_seed in graded.values() for said in by_seed.values()]
    counts = [min(len(said[i]) for said in runs) for i in range(len(dialogues))]
    if missing == "loss":
        counts = [len(d["turns"]) for d in dialogues]
    none = {"text": "", "finished": False, "gold": 0.0}
    graded = {name: {seed: [[*d, *[none] * n][:n] for d, n in zip(said, counts, strict=True) if n]
                     for seed, said in by_seed.items()} for name, by_seed in graded.items()}
    dialogues = [d for d, n in zip(dialogues, counts, strict=True) if n]
    return {name: summarize(x, dialogues, graded[baseline]) for name, x in graded.items()} if dialogues else {}
