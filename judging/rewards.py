"""How good is a scorer of replies? Accuracy on held-out preferences, the talk's four sets, RewardBench.

    question   {"key", "prompt": messages, "answers": [text, ...]}      a prompt, and each reply to be scored once
    scorer     questions -> {key: [score of each answer]}               any function; a missing key was not scored

    reward     what the score head says after the last token                   reward.py
    dpo        log pi(y|x) - log pi_ref(y|x), the implicit reward over beta    Rafailov et al. 2023, arXiv:2305.18290
    ref-free   log pi(y|x): no reference, hence another number, one that pays for short replies
    logprob    log pi(y|x) / tokens: the baseline, which knows no preference

A pair is a hit if the chosen reply scores strictly higher: equal scores are misses, and counted as ties. Everything is
matched by key, never by position. Shares are in [0, 1] here and in percent in sections.
Lambert et al. 2024 (arXiv:2403.13787).
"""
import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from checkpoints import load_model
from data.formats import read
from data.scores import all_scores, mean_logprobs, response_logprob_sums, response_scores
from data.tokenizer import adopt_template, load_tokenizer
from data.trees import tree_from_ranking, truncate
from judging.tables import bounded, mean_cell, share_cell
from runtime import fail

Scorer = Callable[[list[dict]], Mapping[str, list[float]]]
KINDS = {"reward": response_scores, "dpo": response_logprob_sums, "ref-free": response_logprob_sums,
         "logprob": mean_logprobs}


def load_scorer(kind: str, path: str, ref: str = "", max_length: int = 0, micro_tokens: int = 8192,
                device: str = "cpu") -> Scorer:
    """A checkpoint as a scorer. All replies to a prompt share its tokens (`data/pack.py`).

    A reply that runs over `max_length` tokens (0: the positions the model was made for) is cut, one whose prompt does
    is not scored; how many is printed.
    """
    if kind not in KINDS:
        fail(f"scorer '{kind}' is unknown, expected one of {', '.join(KINDS)}")
    if (kind == "dpo") != bool(ref):
        fail(f"scorer {kind}: takes no reference, got {ref}: drop it, or use dpo" if ref else
             "scorer dpo: names no reference, expected the model DPO started from: add it, or use ref-free")
    device, tokenizer, models = torch.device(device), load_tokenizer(path), []
    dtype = torch.float32 if device.type == "cpu" else None  # on a GPU as stored: a large model has to fit
    for name, own in ((path, tokenizer), (ref, load_tokenizer(ref))) if ref else ((path, tokenizer),):
        models.append(load_model(name, dtype, device))
        if models[-1].config.scored != (kind == "reward"):
            has = "no" if kind == "reward" else "a"
            fail(f"{name}: has {has} score head: scorer reward takes reward models, the others none")
        adopt_template(models[-1], own)
    limit = max_length or models[0].config.max_positions

    def scorer(questions: list[dict]) -> dict[str, list[float]]:
        trees = [tree_from_ranking(q | {"ranks": list(range(len(q["answers"])))}, tokenizer) for q in questions]
        for number, tree in enumerate(trees):
            tree.record = number
        trees, counts = truncate(trees, limit)
        print(f"{kind} {path}: {len(questions)} prompts, {sum(len(tree.responses) for tree in trees)} replies scored; "
              f"cut to {limit} tokens: {counts['responses_cut']}; left out, their prompt being longer: "
              f"{counts['responses_dropped']}")
        scores = [all_scores(model, trees, micro_tokens, device, KINDS[kind]) for model in models]
        found = {}
        for tree, values, *ref_values in zip(trees, *scores, strict=True):
            values = values.double() - (ref_values[0].double() if ref else 0)
            # Replies cut to the same tokens tie: rounding must not decide between them.
            same: dict[bytes, float] = {}
            found[questions[tree.record]["key"]] = [same.setdefault(ids.tobytes(), s)
                                                    for (_, ids), s in zip(tree.leaves, values.tolist(), strict=True)]
        return found

    return scorer


LENGTH_ALONE = "length alone: the longer reply"


def by_length(questions: list[dict]) -> dict[str, list[float]]:
    """The scorer every other must beat: the characters of a reply. Chosen replies are longer in many sets."""
    return {q["key"]: [float(len(text)) for text in q["answers"]] for q in questions}


def ask(scorer: Scorer, questions: list[dict]) -> dict[str, list[float]]:
    """The scorer's answer, checked: a NaN would lose every comparison without a word."""
    wanted = {q["key"]: len(q["answers"]) for q in questions}
    if len(wanted) < len(questions):
        raise ValueError("two questions have one key")
    scores = dict(scorer(questions))
    for key, values in scores.items():
        if len(values) != (n := wanted.get(key)) or not np.isfinite(values).all():
            raise ValueError(f"scores of {key[:60]!r} are {str(values)[:60]}, expected {n} finite numbers")
    return scores


# ---------------------------------------------------------------------------------------- accuracy

def accuracy(hits: Sequence[bool], prompts: Sequence[str]) -> dict[str, float]:
    """The share of hits and its 95 % interval: from resampled prompts where several pairs share one, else Wilson's.

    NaN without any.
    """
    cell = mean_cell(hits, prompts, scale=1) or bounded(math.nan, math.nan, math.nan)
    return cell | {"n": len(hits), "prompts": len(set(prompts))}


def weighted_mean(parts: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """The weighted mean of independent shares, with an interval made of theirs (MOVER: Zou & Donner 2008).

        mean = sum w p,   low = mean - sqrt(sum w^2 (p - low)^2),   high likewise;   weights w scaled to sum to 1
    """
    total = sum(weight for weight, _ in parts)
    mean = sum(weight * p["value"] for weight, p in parts) / total
    below, above = (math.sqrt(sum((weight * (p["value"] - p[end])) ** 2 for weight, p in parts)) / total
                    for end in ("low", "high"))
    return bounded(mean, mean - below, mean + above)


def preference_accuracy(records: Iterable[dict], scorer: Scorer) -> dict:
    """How often the scorer prefers the chosen reply of canonical preferences (data/formats.py).

    accuracy()'s keys, "ties" (pairs of equal scores), "unscored" (pairs without scores), and accuracies "by_margin" and
    "by_category". Turns of a dialogue are not independent: for the interval, one first user turn is one prompt.
    """
    records = list(records)
    keys = [json.dumps([(m["role"], m["content"]) for m in record["prompt"]]) for record in records]
    openings = [next(m["content"] for m in record["prompt"] if m["role"] == "user") for record in records]
    questions: dict[str, dict] = {}
    for key, record in zip(keys, records, strict=True):
        answers = questions.setdefault(key, {"key": key, "prompt": record["prompt"], "answers": []})["answers"]
        answers += [text for text in (record["chosen"], record["rejected"]) if text not in answers]
    scores = ask(scorer, list(questions.values()))
    kept = [i for i, key in enumerate(keys) if key in scores]
    replies = {key: dict(zip(questions[key]["answers"], values, strict=True)) for key, values in scores.items()}
    difference = {i: replies[keys[i]][records[i]["chosen"]] - replies[keys[i]][records[i]["rejected"]] for i in kept}
    margins = _bins([records[i].get("margin") for i in kept])
    categories = [records[i].get("category") or None for i in kept]

    def hits(chosen: list[int]) -> dict[str, float]:
        return accuracy([difference[i] > 0 for i in chosen], [openings[i] for i in chosen])

    def by(labels: list[str | None]) -> dict[str, dict]:
        return {label: hits([i for i, of in zip(kept, labels, strict=True) if of == label])
                for label in dict.fromkeys(labels) if label}

    return {**hits(kept), "ties": sum(d == 0 for d in difference.values()), "unscored": len(records) - len(kept),
            "by_margin": dict(sorted(by(margins).items(), key=lambda part: float(part[0].split()[0]))),
            "by_category": dict(sorted(by(categories).items()))}


def _bins(margins: list[float | None]) -> list[str | None]:
    """A label for each margin: itself if there are few, else the quarter it lies in; None where there is none."""
    known = [m for m in margins if m is not None]
    if len(set(known)) <= 8:
        return [None if m is None else f"{m:g}" for m in margins]
    edges = np.quantile(known, [0, 0.25, 0.5, 0.75, 1])
    quarter = [None if m is None else int(np.searchsorted(edges[1:4], m)) for m in margins]
    return [None if q is None else f"{edges[q]:g} to {edges[q + 1]:g}" for q in quarter]


# --------------------------------------------------------------------------- the talk's four sets

# Its board of reward models: plain accuracy on 3,000, 1,140, 11,021 and 4,760 held-out pairs, and the plain mean.
SETS = ("Anthropic Helpful", "OpenAssistant", "SHP", "Learn-to-Summarize")
TALK = {"falcon-40b-rm v1.0 (best on the talk's board)": (0.66, 0.678, 0.802, 0.743)}


def board_mean(found: Mapping[str, Mapping]) -> dict[str, float] | None:
    """The plain mean over the four sets, not weighted by size; None unless all four are there."""
    return weighted_mean([(1, found[name]) for name in SETS]) if all(name in found for name in SETS) else None


def rewards_section(results: Mapping[str, Mapping[str, dict]]) -> dict:
    """preference_accuracy's results by scorer (rows) and set (columns), with the talk's row beneath."""
    others = list(dict.fromkeys(name for found in results.values() for name in found if name not in SETS))
    rows = [[scorer, *(share_cell(found.get(name)) for name in SETS), share_cell(board_mean(found)),
             *(share_cell(found.get(name)) for name in others),
             *(sum(f[key] for f in found.values()) for key in ("n", "ties", "unscored"))]
            for scorer, found in results.items()]
    rows += [[name, *(100 * x for x in row), 100 * sum(row) / len(row), *[None] * (len(others) + 3)]
             for name, row in TALK.items()]
    return {"title": "Reward model accuracy",
            "text": "Share of pairs whose chosen reply scores strictly higher; ties are misses. The mean of the four "
                    "sets is plain, no weighting by size. Length alone is no model: what does not beat it may have "
                    "learnt to count. Pairs whose prompt is too long for the scorer are unscored "
                    "and not in the share.",
            "columns": ["scorer", *(f"{name}, %" for name in SETS), "mean of four, %",
                        *(f"{name}, %" for name in others), "pairs", "ties", "unscored"], "rows": rows}


def breakdown_section(results: Mapping[str, Mapping[str, dict]]) -> dict:
    """The same results, how many pairs they are of, and by margin and category: a row for each, a column a scorer."""
    rows = []
    for name in dict.fromkeys(name for found in results.values() for name in found):
        parts = {scorer: {"all": of[name]} | {f"{kind} {label}": part for kind in ("margin", "category")
                                              for label, part in of[name][f"by_{kind}"].items()}
                 for scorer, of in results.items() if name in of}
        for label in dict.fromkeys(label for part in parts.values() for label in part):
            cells = [parts.get(scorer, {}).get(label) for scorer in results]
            rows.append([name, label, max(c["n"] for c in cells if c), *map(share_cell, cells)])
    return {"title": "Reward model accuracy by margin and category", "rows": rows,
            "columns": ["set", "part", "pairs", *(f"{s}, %" for s in results)]}


# ------------------------------------------------------------------------------------- RewardBench

# What subsets count as in their section.
SECTIONS = tomllib.loads(Path(__file__).with_name("rewardbench.toml").read_text(encoding="utf-8"))
SUBSETS = {name: n for counts in SECTIONS.values() for name, n in counts.items()} | {"math-prm": 447}
# The prior sets of today's code; the paper has three more.
PRIOR = ("Anthropic Helpful", "Anthropic HHH", "SHP", "Learn-to-Summarize")


def read_rewardbench(path: str | Path) -> list[dict]:
    """Rows {prompt, chosen, rejected, subset, id} as preferences whose category is the subset.

    A benchmark is taken whole: a bad row is refused, not left out.
    """
    rows, report = read(path, "prompt")
    found: dict[tuple[str, str], dict] = {}
    for row in rows:
        subset, name = row.get("subset"), str(row.get("id"))
        place = f"{path}: the row with id {name} of {subset}"
        if not isinstance(subset, str) or subset not in SUBSETS:
            fail(f"{place}: its subset is unknown, expected one of {', '.join(SUBSETS)}")
        if not all(isinstance(row.get(side), str) for side in ("chosen", "rejected")):
            fail(f"{place}: its chosen or rejected is no text: mend the row")
        if "id" not in row or (subset, name) in found:
            fail(f"{place}: occurs twice or has no id, expected every id once: drop one")
        found[subset, name] = {key: row[key] for key in ("prompt", "chosen", "rejected")} | {"category": subset}
    report.refuse()
    return list(found.values())


def section_scores(subsets: Mapping[str, Mapping], prior: Mapping[str, Mapping] | None = None) -> dict:
    """RewardBench's sections and final score, from accuracies by subset and by prior set.

        section = sum accuracy * count / sum count        prior sets = plain mean of those given
        score   = (Chat + Chat Hard + Safety + Reasoning + w prior) / (4 + w)     w = 1/2 today, 1 in the paper, or 0

    A section that lacks a subset is None, and so is what depends on it.
    """
    found = {section: weighted_mean([(n, subsets[name]) for name, n in counts.items()])
             if counts.keys() <= subsets.keys() else None for section, counts in SECTIONS.items()}
    found["prior sets"] = weighted_mean([(1, part) for part in prior.values()]) if prior else None
    for name, w in (("score, prior sets count 1/2", 0.5), ("score, prior sets count 1", 1),
                    ("score, no prior sets", 0)):
        parts = [(1, found[section]) for section in SECTIONS] + [(w, found["prior sets"])] * (w > 0)
        found[name] = weighted_mean(parts) if all(part for _, part in parts) else None
    return found


def rewardbench(records: list[dict], scorer: Scorer, prior: Mapping[str, Mapping] | None = None) -> dict:
    """A scorer's numbers: {"scores", "subsets", "ties", "unscored", "missing"}.

    `prior` holds preference_accuracy's results by set: the four of PRIOR count if they are all there, others never do.
    """
    found, held = preference_accuracy(records, scorer), Counter(record["category"] for record in records)
    prior = {name: prior[name] for name in PRIOR} if prior and set(PRIOR) <= prior.keys() else None
    return {"scores": section_scores(found["by_category"], prior), "subsets": found["by_category"],
            "ties": found["ties"], "unscored": found["unscored"],
            "missing": {name: n - held[name] for name, n in SUBSETS.items() if held[name] != n}}


def rewardbench_section(results: Mapping[str, dict]) -> dict:
    """rewardbench's results on one file by scorer, a column each: totals, sections, subsets."""
    first = next(iter(results.values()))
    rows = [[name, *(share_cell(r["scores"][name]) for r in results.values())] for name in first["scores"]]
    rows += [[f"- {name}", *(share_cell(r["subsets"].get(name)) for r in results.values())]
             for name in SUBSETS if any(name in r["subsets"] for r in results.values())]
    missing = ", ".join(f"{n} of {name}" for name, n in first["missing"].items())
    counts = "; ".join(f"{name}: {r['ties']} ties, {r['unscored']} unscored" for name, r in results.items())
    return {"title": "RewardBench",
            "text": "Share of prompts whose chosen reply scores strictly higher than the rejected one. A section "
                    "weighs its subsets by the benchmark's own counts, and is empty if one is missing. Rows of the "
                    f"benchmark that the file lacks: {missing or 'none'}. {counts}.",
            "columns": ["part", *(f"{name}, %" for name in results)], "rows": rows}
