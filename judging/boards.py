"""What is measured without comparing replies: multiple choice, reward models on held-out pairs, safety."""
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoints import load_model
from data.formats import read
from data.llm import Budget, Opener, Request, Sampling, ask
from data.tokenizer import load_tokenizer
from judging import choices, rewards, safety
from judging.entries import Entry
from runtime import fail


def choice_sections(models: Sequence[Entry], tasks: Sequence[Entry], limit: int, device: torch.device) -> list[dict]:
    """Checkpoints on tasks (a file, and examples for the shots or "none"); `limit` questions of each, 0: all."""
    if not tasks:
        return []
    exams = {}
    for task, _, path, examples in tasks:
        none = examples == "none"
        exams[task] = choices.read_exam(task, path, "" if none else examples, 0 if none else None, limit)
        for file, rejects in exams[task].rejects.items():
            for line, reason in rejects[:5]:
                print(f"{file} line {line}: {reason}")
    results: dict[str, dict] = {}
    for name, _, where, _ in (model for model in models if model.kind == "model"):
        tokenizer = load_tokenizer(where)
        model = load_model(where, torch.float32 if device.type == "cpu" else None, device)
        results[name] = {task: choices.evaluate(model, tokenizer, exam, progress=f"{name}: {task}")
                         for task, exam in exams.items()}
    return [choices.choices_section(results)]


def reward_sections(scorers: Sequence[Entry], sets: Sequence[Entry], rewardbench: str,
                    device: torch.device) -> list[dict]:
    """Scorers (kind, directory, perhaps a reference) on sets of held-out pairs and RewardBench's rows."""
    if not scorers:
        return []
    pairs, questions = {}, rewards.read_rewardbench(rewardbench) if rewardbench else []
    for name, _, path, _ in sets:
        records, report = read(path)
        pairs[name] = list(records)
        if report.rejects:
            (line, reason), count = report.rejects[0], len(report.rejects)
            print(f"{path}: {count} of {report.read} records rejected, the first in line {line}: {reason}")
        if not pairs[name] or "chosen" not in pairs[name][0]:
            fail(f"preferences: {path} holds no preferences, expected records with 'chosen' and 'rejected'")
    found, bench = {}, {}
    for name, kind, path, ref in [*scorers, Entry(rewards.LENGTH_ALONE, "", "")]:
        scorer = rewards.load_scorer(kind, path, ref, device=str(device)) if path else rewards.by_length
        found[name] = {label: rewards.preference_accuracy(records, scorer) for label, records in pairs.items()}
        if questions:
            bench[name] = rewards.rewardbench(questions, scorer, found[name])
    sections = [rewards.rewards_section(found), rewards.breakdown_section(found)] if pairs else []
    return sections + ([rewards.rewardbench_section(bench)] if bench else [])


def safety_sections(models: Sequence[Entry], attacks: Sequence[Entry], xstest: str, probes: int, judge: str,
                    ledger: Path, budget: Budget, opener: Opener) -> list[dict]:
    """Attacks as collect/red_team.py recorded them (transcripts, perhaps all behaviours, which count tried or not), and
    XSTest's prompts and leak probes put to the models.

    `judge`, a checkpoint or an endpoint, decides; without one attacks keep their verdicts, and phrases tell refusals.
    """
    if not (attacks or xstest or probes):
        return []
    decider = opener.open(judge) if judge else None

    def decide(kind: str, dialogues: list[dict]) -> list[str | None]:
        if decider:
            return safety.judge(decider, kind, dialogues, ledger, budget if "://" in judge else None)
        said = (dialogue["messages"][-1]["content"] for dialogue in dialogues)
        return ["full_refusal" if safety.refuses(text) else "full_compliance" for text in said]

    found, refused, leaked = {}, {}, {}
    for name, _, path, behaviours in attacks:
        tried = safety.read_transcripts(path, behaviours)
        whole = safety.load_texts(behaviours, "behaviour") if behaviours else {row["behaviour"] for row in tried}
        if decider:
            tried = [row | {"judged": said} for row, said in zip(tried, decide("harm", tried), strict=True)]
        found[name] = safety.attack_success(tried, whole, judge or "as recorded")
    prompts = safety.read_xstest(xstest) if xstest else {}
    planted = safety.leak_probes(probes) if probes else []
    for name, kind, where, _ in models:
        if kind not in ("model", "endpoint") or not (prompts or planted):
            continue
        asked = [[{"role": "user", "content": p["prompt"]}] for p in prompts.values()]
        requests = [Request(messages) for messages in [*asked, *(probe["messages"] for probe in planted)]]
        replies = ask(opener.open(where), requests, Sampling(256, 0.0), ledger,
                      budget if kind == "endpoint" else None, f"{name}: safety")
        texts = [None if reply is None else reply.text for reply in replies]
        if prompts:
            answered = [{"messages": [*messages, {"role": "assistant", "content": text}]}
                        for messages, text in zip(asked, texts, strict=False) if text is not None]
            verdicts = iter(decide("refusal", answered))
            labels = {i: None if text is None else next(verdicts) for i, text in zip(prompts, texts, strict=False)}
            unsafe = {i: p["unsafe"] for i, p in prompts.items()}
            refused[name] = safety.refusal_rates(labels, unsafe, judge or safety.STRING_MATCH)
        if planted:
            said = {probe["id"]: text for probe, text in zip(planted, texts[len(asked):], strict=True)}
            leaked[name] = safety.leak_rates(planted, said)
    return [safety.safety_section(found, refused, leaked)]
