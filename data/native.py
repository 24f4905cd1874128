"""Readers of the formats data sets are published in: one small function each, which names a record's fields.

A function takes a record as published and returns it in one of the forms of data/records.py, or yields several, and
for a part that it leaves out the Reject that says so; data/formats.py checks what comes back as it checks a record of
that form. An input follows its instruction after a blank line; scores, names and categories travel along. How labels
make pairs is said in each docstring. tests/native.json holds a record of each.

Sources: the cards and repositories of the data sets; for UltraFeedback's tens, OpenBMB/UltraFeedback issue 8.
"""
from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations

from data.records import Format, Reject, broken, check_number, check_object, check_text, expected, short

Parts = Iterator[dict | Reject]


# ------------------------------------------------------------------------------- what readers share

def carry(record: dict, *keys: str, **renamed: str) -> dict:
    """The record's values under `keys`, and under new names (annotator="worker"), where it has them."""
    names = {key: key for key in keys} | renamed
    return {new: record[old] for new, old in names.items() if record.get(old) is not None}


def text_of(record: dict, key: str) -> str:
    return check_text(record.get(key), key)


def list_of(record: dict, key: str) -> list:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise expected("a list that holds something", key, value, "not a list")
    return value


def texts_of(record: dict, key: str) -> list[str]:
    return [check_text(text, key) for text in list_of(record, key)]


def ask(record: dict, instruction: str, more: str) -> str:
    """An instruction and, after a blank line, its input if there is one."""
    extra = record.get(more)
    none = extra is None or isinstance(extra, str) and not extra.strip()
    return text_of(record, instruction) if none else f"{text_of(record, instruction)}\n\n{check_text(extra, more)}"


def prefer(record: dict, prompt: str, first: str, second: str, first_wins: bool) -> dict:
    """A pair out of the record's texts under three keys."""
    texts = [text_of(record, key) for key in (prompt, first, second)]
    return {"prompt": texts[0], "chosen": texts[2 - first_wins], "rejected": texts[1 + first_wins]}


def alternate(texts: list) -> list[dict]:
    """Turns given as texts alone, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(prompt: str, reply: str) -> dict:
    return {"messages": alternate([prompt, reply])}


def whole_rounds(turns: list[dict], key: str, more: dict) -> Parts:
    """A dialogue of whole rounds: a reply without a question before it or a question without a reply is reported."""
    last, first = len(turns) - 1, 1 if turns[0]["role"] == "system" else 0
    if turns[first:] and turns[first]["role"] == "assistant":
        yield Reject("reply to nothing", "is a reply to nothing, left out", f"{key}[{first}]")
        del turns[first]
    if turns[first:] and turns[-1]["role"] == "user":
        yield Reject("no reply", "is a user turn without a reply, left out", f"{key}[{last}]")
        turns.pop()
    yield {"messages": turns} | more


def each(record: dict, key: str, read: Callable[[dict], dict]) -> Parts:
    """The parts of a record one by one; those that cannot be used are reported and the others kept."""
    for i, value in enumerate(list_of(record, key)):
        try:
            yield read(check_object(value, key))
        except Reject as reason:
            yield reason.at(f"{key}[{i}]")


# ----------------------------------------------------------------------- an instruction and its answer

def alpaca(record: dict) -> dict:
    """instruction, input, output; some copies add system and history, [[question, reply], ...]."""
    turns = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in list_of(record, "history") if record.get("history") else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise broken("not a list", f"'history' holds {short(pair)}, expected [question, reply]")
        turns += alternate(pair)
    turns += alternate([ask(record, "instruction", "input"), text_of(record, "output")])
    return {"messages": turns} | carry(record, "id", "category")


def self_instruct(record: dict) -> Parts:
    """instruction, instances [{input, output}], id, name, is_classification: a dialogue for every instance.

    The user-oriented set (motivation_app in place of name) is for evaluation only.
    """
    more = carry(record, "id", "name", "motivation_app", "is_classification")

    def read(instance: dict) -> dict:
        prompt = ask(record | carry(instance, "input"), "instruction", "input")
        return answer(prompt, text_of(instance, "output")) | more

    return each(record, "instances", read)


def completion(record: dict) -> dict:
    """prompt, completion, and anything else."""
    more = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    return answer(text_of(record, "prompt"), text_of(record, "completion").strip()) | more


def gsm8k(record: dict) -> dict:
    """question, answer. The calculator's marks <<2*600=1200>> are cut out of the answer, which ends with #### 1,200:
    "final" is that number without commas.
    """
    end = re.search(r"\n#### *(-?[\d,.]*\d)\s*$", text_of(record, "answer"))
    if not end:
        raise broken("no final answer", "'answer' does not end with '#### number'")
    worked = re.sub(r"<<[^<>\n]*>>", "", record["answer"])
    return answer(text_of(record, "question"), worked) | {"final": end[1].replace(",", "")}


# ----------------------------------------------------------------------------------------- dialogues

SPEAKERS = {"human": "user", "user": "user", "system": "system"} | dict.fromkeys(
    ["gpt", "chatgpt", "bing", "bard", "assistant"], "assistant")


def said(turn, key: str) -> dict:
    """A ShareGPT turn as a message; another speaker (observation, function_call) keeps its name, which is refused."""
    speaker = check_object(turn, key).get("from")
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": turn.get("value")}


def conversation(record: dict) -> list[dict]:
    return [said(turn, "conversations") for turn in list_of(record, "conversations")]


def lima_test(record: dict) -> dict:
    """conversations, which is one prompt, and source."""
    turns = list_of(record, "conversations")
    if len(turns) > 1:
        raise Reject("has a reply", f"'conversations' holds {len(turns)} texts, expected one prompt: drop the record")
    return {"prompt": check_text(turns[0], "conversations")} | carry(record, "source")


def camel(record: dict) -> Parts:
    """role_1, role_2, original_task, specified_task, num_messages, message_1 {role_type, content}, message_2 and so on.

    Odd messages are the user's. A last one of <CAMEL_TASK_DONE> alone is the format's end mark, no turn.
    """
    count = sum(re.fullmatch(r"message_\d+", key) is not None for key in record)
    sent = [check_object(record.get(f"message_{n}"), f"message_{n}") for n in range(1, count + 1)]
    if record.get("num_messages", count) != count:
        raise broken("turns missing", f"'num_messages' is {short(record['num_messages'])} but it holds {count}")
    for n, message in enumerate(sent, 1):
        due = ("ASSISTANT", "USER")[n % 2]
        if (kind := message.get("role_type", due)) != due:
            raise broken("roles", f"'message_{n}' is of {short(kind)}, odd messages are the user's")
    turns = alternate([message.get("content") for message in sent])
    if len(turns) % 2 and isinstance(turns[-1]["content"], str) and turns[-1]["content"].strip() == "<CAMEL_TASK_DONE>":
        turns.pop()
    if not turns:
        raise Reject("roles", "holds no turn but the end mark: drop the record")
    more = carry(record, "id", "role_1", "role_2", "termination_reason", task="specified_task")
    return whole_rounds(turns, "messages", more)


def transcript(value, key: str) -> list[dict]:
    """Turns of an HH transcript: a speaker is named after a blank line; anywhere else "Human:" is part of the text."""
    pieces = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", check_text(value, key))
    if pieces[0].strip() or len(pieces) == 1:
        raise broken("not a transcript", f"'{key}' begins with {short(value)}, expected a blank line and 'Human:'")
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": "user" if name == "Human" else "assistant", "content": text.strip()} for name, text in turns]


def red_team(record: dict) -> Parts:
    """transcript, model_type, num_params, min_harmlessness_score_transcript, tags, task_description, red_team_member_id
    and the rating: how far the attack succeeded by its author's opinion, 0 to 4.
    """
    more = carry(record, "rating", "model_type", "num_params", "task_description", "tags",
                 "min_harmlessness_score_transcript", annotator="red_team_member_id")
    return whole_rounds(transcript(record.get("transcript"), "transcript"), "transcript", more)


def kto(record: dict) -> dict:
    """messages, or prompt and completion; and label, true or false.

    A dialogue keeps its label; scripts refuse to train on what is labelled false.
    """
    if not isinstance(record.get("label"), bool):
        raise expected("true or false", "label", record.get("label"), "bad label")
    return record if "messages" in record else completion(record)


# --------------------------------------------------------------------------------------- preferences

def hh(record: dict) -> dict:
    """chosen and rejected, each a transcript. Both are split into turns first: all but the last must be equal."""
    chosen, rejected = (transcript(record.get(side), side) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Reject("prompts differ", "'chosen' and 'rejected' differ before their last turn, "
                                       "expected one prompt: drop the pair")
    return {"chosen": chosen, "rejected": rejected}


def ultrafeedback_binarized(record: dict) -> dict:
    """UltraFeedback after someone made pairs of it: prompt, chosen and rejected [{role, content}], their scores.

    margin = the difference of score_chosen and score_rejected; ties stay in, with margin 0.
    """
    scores = {side: check_number(record.get(side), side, 0, 10) for side in ("score_chosen", "score_rejected")}
    if scores["score_chosen"] < scores["score_rejected"]:
        raise broken("scores contradict", "'score_chosen' is below 'score_rejected'")
    pair = carry(record, "prompt", "chosen", "rejected", "source", id="prompt_id")
    return pair | {"margin": scores["score_chosen"] - scores["score_rejected"]} | scores


def overall_score(completion: dict) -> float:
    """A completion's score, up to 10. In the first release some 1 became 10; the mean of its aspects' ratings (1 to 5)
    tells which: 2 or less, and the score is 1; above 4, and it stays; in between nobody knows.
    """
    score = completion.get("overall_score")
    if isinstance(score, str) and re.fullmatch(r"\d{1,2}(\.\d+)?", score):
        score = float(score)
    if check_number(score, "overall_score", 0, 10) < 10:
        return float(score)
    aspects = completion["annotations"].values() if isinstance(completion.get("annotations"), dict) else ()
    marks = [str(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    ratings = [int(mark) for mark in marks if re.fullmatch("[1-5]", mark)]  # "N/A" occurs
    mean = sum(ratings) / len(ratings) if ratings else float("nan")
    if mean <= 2 or mean > 4:
        return 1.0 if mean <= 2 else float(score)
    raise Reject("score in doubt", f"'overall_score' is 10 with aspects rated {mean:.2f}: it may be a 1 that became 10")


def ultrafeedback(record: dict) -> Parts:
    """instruction, source, completions (four) [{response, overall_score, annotations {aspect: {Rating}}, model, ...}].

    The rule: chosen is the completion with the highest overall score, the first of equals; rejected a random one of
    those that score lower, with the prompt as seed, so that a record gives the same pair wherever it stands. (Zephyr,
    Tunstall et al. 2023, arXiv:2310.16944, draws among all others, ties too.) margin = the scores' difference.
    """
    def read(reply: dict) -> dict:
        return reply | {"overall_score": overall_score(reply), "response": text_of(reply, "response")}

    prompt, scored = text_of(record, "instruction"), []
    for part in each(record, "completions", read):
        if isinstance(part, Reject):
            yield part
        else:
            scored.append(part)
    best = max(scored, key=lambda reply: reply["overall_score"], default={})
    lower = [reply for reply in scored if reply["overall_score"] < best["overall_score"]
             and reply["response"] != best["response"]]
    if not lower:
        raise Reject("tie", "no two usable completions differ in score, which prefers nothing: drop the record")
    worse = random.Random(prompt).choice(lower)
    pair = {"prompt": prompt, "chosen": best["response"], "rejected": worse["response"]} | carry(record, "source")
    for side, reply in (("chosen", best), ("rejected", worse)):
        pair |= carry(reply, **{f"{key}_{side}": key for key in ("model", "principle", "custom_system_prompt")})
    high, low = best["overall_score"], worse["overall_score"]
    yield pair | {"score_chosen": high, "score_rejected": low, "margin": high - low}


def shp(record: dict) -> dict:
    """history, human_ref_A, human_ref_B, score_A, score_B, score_ratio, post_id, domain, labels.

    labels 1: A is preferred, 0: B. The advice of its card is to keep score_ratio >= 2 and five pairs a post.
    """
    first = _either(record, "labels", 1, 0)
    a, b = (check_number(record.get(f"score_{side}"), f"score_{side}", -1e9) for side in "AB")
    if a != b and (a > b) != first:
        raise broken("scores contradict", f"'labels' prefers the comment with the lower score ({a:g} and {b:g})")
    pair = prefer(record, "history", "human_ref_A", "human_ref_B", first) | carry(record, "domain", "score_ratio")
    return pair | carry(record, id="post_id") | {"score_chosen": max(a, b), "score_rejected": min(a, b)}


def _either(record: dict, key: str, first: int, second: int) -> bool:
    """A label that names one of two replies: whether it is the first."""
    value = record.get(key)
    if isinstance(value, bool) or value not in (first, second):
        raise expected(f"{first} or {second}", key, value, "bad label")
    return value == first


def _to_summarize(info) -> str:
    info = check_object(info, "info")
    kind = "article" if "article" in info else "post"
    title = f"{text_of(info, 'title')}\n\n" if info.get("title") else ""
    return f"Summarize this {kind}.\n\n{title}{text_of(info, kind)}"


def summary_pair(record: dict) -> dict:
    """info {post or (news) article, title, id, subreddit}, two summaries {text, policy}, choice, worker, split, extra.

    Learning to summarize: choice is the better one's index, extra.confidence 1 to 9.
    """
    prompt, sides = _to_summarize(record.get("info")), list_of(record, "summaries")
    if len(sides) != 2:
        raise broken("not a pair", f"'summaries' holds {len(sides)}, expected 2")
    first = _either(record, "choice", 0, 1)
    texts = [text_of(check_object(side, "summaries"), "text").strip() for side in sides]
    pair = {"prompt": prompt, "chosen": texts[not first], "rejected": texts[first], "category": "summarize"}
    pair |= carry(record, "split", annotator="worker") | carry(record["info"], "id", "subreddit")
    pair |= carry(sides[not first], policy_chosen="policy") | carry(sides[first], policy_rejected="policy")
    return pair | (carry(record["extra"], "confidence") if isinstance(record.get("extra"), dict) else {})


def summary_rating(record: dict) -> dict:
    """info as above, summary {text, policy, axes {overall, accuracy ...: 1 to 7}}, worker, split."""
    summary = check_object(record.get("summary"), "summary")
    dialogue = answer(_to_summarize(record.get("info")), text_of(summary, "text").strip()) | {"category": "summarize"}
    more = carry(summary, "policy", scores="axes") | carry(record, "split", annotator="worker")
    return dialogue | more | carry(record["info"], "id")


def oasst(record: dict) -> Parts:
    """message_tree_id, tree_state, prompt: a message {text, role, rank, lang, review_result, deleted, replies [...]}.

    Every pair of ranked replies to one user turn, at any depth, the better rank (0 is best) chosen. What is deleted or
    failed its review is left out with everything below it. A reply without a rank beside others is left out alone.
    """
    if record.get("tree_state", "ready_for_export") != "ready_for_export":
        raise expected("ready_for_export", "tree_state", record["tree_state"], "unfinished tree")
    found = False
    below = [([], [record.get("prompt")], "")]  # the dialogue so far, messages that go on from it, where they are
    while below:
        history, messages, where = below.pop()
        ranked, goes_on, role = [], [], ("prompter", "assistant")[len(history) % 2]
        for i, message in enumerate(messages):
            place = f"{where}.replies[{i}]" if where else "prompt"
            try:
                turn, rank, replies = _oasst_message(message, role)
                if rank is not None:
                    ranked.append((rank, i, turn["content"], place))
                elif role == "assistant" and len(messages) > 1:
                    yield Reject("unranked", "has no rank beside other replies, makes no pair", place)
                goes_on.append(([*history, turn], replies, place))
            except Reject as reason:
                yield reason.at(place)
        below += reversed(goes_on)
        for (rank, _, better, _), (lower, _, worse, place) in combinations(sorted(ranked), 2):
            if rank == lower or better == worse:
                fault = "shares its rank" if rank == lower else "is the same text as a better one"
                yield Reject("tie", f"{fault}, makes no pair", place)
            else:
                found = True
                yield {"prompt": history, "chosen": better, "rejected": worse, "rank_chosen": rank,
                       "rank_rejected": lower} | carry(record["prompt"], "lang") | carry(record, id="message_tree_id")
    if not found:
        yield Reject("no pair", "no user turn has two ranked replies: drop the tree")


def _oasst_message(message, role: str) -> tuple[dict, int | None, list]:
    """A message as a turn, its rank, and the replies to it."""
    if check_object(message, "message").get("deleted") or message.get("review_result", True) is not True:
        raise Reject("failed review", "is deleted or failed its review, left out with what follows it")
    if message.get("role") != role:
        kind = short(message.get("role"))
        raise Reject("roles", f"has role {kind} where {role} is due, left out with what follows it")
    rank, replies = message.get("rank"), message.get("replies") or []
    if rank is not None:
        check_number(rank, "rank", 0)
    if not isinstance(replies, list):
        raise expected("a list of messages", "replies", replies, "not a list")
    turn = {"role": "user" if role == "prompter" else "assistant", "content": text_of(message, "text")}
    return turn, rank if role == "assistant" else None, replies


# ------------------------------------------------------------------------ verdicts of raters and judges

def pandalm(record: dict) -> dict:
    """instruction, input, response1, response2, annotator1 and so on, idx, cmp_key (the models), motivation_app.

    0 tie, 1 first, 2 second. The rule: chosen is the response that most of the annotators prefer; without a majority
    the record is a tie. Some responses stand there as JSON true, which is the text "True".
    """
    votes = [record[key] for key in sorted(record) if key.startswith("annotator")]
    for vote in votes:
        if isinstance(vote, bool) or vote not in (0, 1, 2):
            raise broken("bad label", f"an annotator says {short(vote)}, expected 0, 1 or 2")
    winner, count = Counter(votes).most_common(1)[0] if votes else (0, 0)
    if winner == 0 or 2 * count <= len(votes):
        raise Reject("tie", f"annotators say {short(votes)}, most of them for neither: drop the record")
    words = {key: str(record[key]) for key in ("response1", "response2") if isinstance(record.get(key), bool)}
    pair = prefer(record | words, "instruction", "response1", "response2", winner == 1)
    more = carry(record, "motivation_app", id="idx", models="cmp_key")
    return pair | {"prompt": ask(record, "instruction", "input"), "votes": votes} | more


def alpaca_eval(record: dict) -> dict:
    """instruction, output_1, output_2, generator_1, generator_2, preference, annotator, dataset.

    preference: 1 or 2, 0 a tie, null where the judge failed; weighted judges give any number from 1 to 2, 1.5 a tie.
    """
    verdict = record.get("preference")
    if verdict is None:
        raise Reject("no verdict", "'preference' is null, the judge gave no verdict: drop the record")
    verdict = check_number(verdict, "preference", 0, 2)
    if 0 < verdict < 1:
        raise broken("bad number", f"'preference' is {verdict:g}, expected 0 or a number from 1 to 2")
    if verdict in (0, 1.5):
        raise Reject("tie", "'preference' is a tie: drop the record")
    pair = prefer(record, "instruction", "output_1", "output_2", verdict < 1.5)
    return pair | carry(record, "preference", "annotator", "dataset", "generator_1", "generator_2")


# ------------------------------------------------------------------- prompts of benchmarks, never to train on

def mt_bench(record: dict) -> dict:
    """question_id, category, turns, reference. Vicuna's questions have one turn.

    The prompt is the first turn, for the second needs a reply; all of them are in "turns".
    """
    turns = texts_of(record, "turns")
    return {"prompt": turns[0], "turns": turns} | carry(record, "category", "reference", id="question_id")


def reference(record: dict) -> Parts:
    """question_id, model_id, choices [{turns}]: the text is the answer to the first turn."""
    def read(choice: dict) -> dict:
        turns = texts_of(choice, "turns")
        return {"text": turns[0], "turns": turns} | carry(record, id="question_id", model="model_id")

    return each(record, "choices", read)


def multiple_choice(record: dict) -> dict:
    """query, choices, gold: the right one's index."""
    choices, gold = texts_of(record, "choices"), record.get("gold")
    if isinstance(gold, bool) or gold not in range(len(choices)):
        raise expected(f"the index of one of {len(choices)} choices", "gold", gold, "bad label")
    return {"prompt": text_of(record, "query"), "choices": choices, "gold": gold}


def truthfulqa(record: dict) -> dict:
    """Question, Correct Answers and Incorrect Answers parted by "; ", Best Answer, Category, Type."""
    correct, incorrect = ([part.strip() for part in text_of(record, key).split(";") if part.strip()]
                          for key in ("Correct Answers", "Incorrect Answers"))
    more = carry(record, category="Category", type="Type", best="Best Answer")
    return {"prompt": text_of(record, "Question"), "correct": correct, "incorrect": incorrect} | more


# ------------------------------------------------------------------------------------- how to recognise them

TEXTS, ONE, OBJECTS = [str, str], (str,), [dict]  # at least two texts, exactly one text, objects
SCORED = {"chosen": OBJECTS, "rejected": OBJECTS, "score_chosen": object, "score_rejected": object}

# Formats that one expression reads: form of the records that come out, reader, the shape that a record has.
SIMPLE = {
    # Marks of references such as [12] stay in the contexts.
    "dolly": ("messages", lambda r: answer(ask(r, "instruction", "context"), text_of(r, "response")) |
              carry(r, "category"), {"instruction": str, "context": str, "response": str}),
    "prediction": ("messages", lambda r: answer(ask(r, "instruction", "input"), text_of(r, "response").strip()) |
                   carry(r, "target"), {"prompt": str, "instruction": str, "response": str, "target": str}),
    "tldr_sample": ("messages", lambda r: answer(text_of(r, "context"), text_of(r, "sample").strip()) |
                    carry(r, "ref_text", model="model_type"), {"context": str, "ref_text": str, "sample": str}),
    "sharegpt": ("messages", lambda r: whole_rounds(conversation(r), "conversations", carry(r, "id", "category")),
                 {"conversations": OBJECTS}),
    "ultrachat": ("messages", lambda r: whole_rounds(alternate(list_of(r, "data")), "data", carry(r, "id")),
                  {"data": TEXTS}),
    "lima": ("messages", lambda r: whole_rounds(alternate(list_of(r, "conversations")), "conversations",
                                                carry(r, "source")), {"conversations": TEXTS}),
    "sharegpt_preference": ("preference", lambda r: {"prompt": conversation(r)} |
                            {side: [said(r.get(side), side)] for side in ("chosen", "rejected")} |
                            carry(r, "id", "category"), {"conversations": OBJECTS, "chosen": dict, "rejected": dict}),
    "llmbar": ("preference", lambda r: prefer(r, "input", "output_1", "output_2", _either(r, "label", 1, 2)),
               {"input": str, "output_1": str, "output_2": str, "label": int}),
    "judge_prompt": ("text", lambda r: {"text": text_of(r, "prompt_template")} |
                     carry(r, "name", "type", "system_prompt", "category", "output_format"),
                     {"name": str, "prompt_template": str}),
    "ultra_eval": ("prompt", lambda r: {"prompt": text_of(r, "data"), "category": text_of(r, "class").strip()},
                   {"class": str, "data": str}),
}
# The others: form, reader, and one or more shapes.
NATIVE = {read.__name__: Format(form, read, shapes) for form, read, *shapes in (
    ("messages", alpaca, {"instruction": str, "output": str}, {"instruction": str, "output": str, "text": str}),
    ("messages", self_instruct, {"instruction": str, "instances": OBJECTS}),
    ("messages", completion, {"prompt": str, "completion": str}),
    ("messages", gsm8k, {"question": str, "answer": str}),
    ("prompt", lima_test, {"conversations": ONE}),
    ("messages", camel, {"role_1": str, "role_2": str, "message_1": dict}),
    ("messages", red_team, {"transcript": str, "model_type": str, "rating": object}),
    ("messages", kto, {"messages": OBJECTS, "label": bool}, {"prompt": str, "completion": str, "label": bool}),
    ("preference", hh, {"chosen": str, "rejected": str}),
    ("preference", ultrafeedback, {"instruction": str, "completions": OBJECTS}),
    ("preference", ultrafeedback_binarized, SCORED, SCORED | {"prompt": str}, SCORED | {"messages": OBJECTS},
     SCORED | {"prompt": str, "messages": OBJECTS}),
    ("preference", shp, {"history": str, "human_ref_A": str, "human_ref_B": str, "labels": int}),
    ("preference", summary_pair, {"info": dict, "summaries": OBJECTS, "choice": int}),
    ("messages", summary_rating, {"info": dict, "summary": dict}),
    ("preference", oasst, {"message_tree_id": str, "prompt": dict}),
    ("preference", pandalm, {"instruction": str, "response1": object, "response2": object, "annotator1": object}),
    ("preference", alpaca_eval, {"instruction": str, "output_1": str, "output_2": str, "preference": object}),
    ("prompt", mt_bench, {"question_id": object, "turns": [str]}),
    ("text", reference, {"question_id": object, "choices": OBJECTS}),
    ("prompt", multiple_choice, {"query": str, "choices": [str], "gold": int}),
    ("prompt", truthfulqa, {"Question": str, "Correct Answers": str, "Incorrect Answers": str}))}
NATIVE |= {name: Format(form, read, [shape]) for name, (form, read, shape) in SIMPLE.items()}
