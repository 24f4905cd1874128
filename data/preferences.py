"""Readers of the formats that preferences are published in, as data/native.py's: how labels make pairs is said in each.

Sources: the cards and repositories of the data sets; for UltraFeedback's tens, OpenBMB/UltraFeedback issue 8.
"""
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

from data.native import ASKED, alternate, answer, ask, asked, carry, dialogue, each, list_of, rounds, text_of
from data.records import Format, Reject, absent, broken, check_label, check_number, check_object, expected, transcript


def prefer(record: dict, prompt: str, first: str, second: str, first_wins: bool) -> dict:
    """A pair out of the record's texts under three keys."""
    texts = [text_of(record, key) for key in (prompt, first, second)]
    return {"prompt": texts[0], "chosen": texts[2 - first_wins], "rejected": texts[1 + first_wins]}


def hh(record: dict) -> dict:
    """chosen and rejected, each a transcript. Both are split into turns first: all but the last must be equal."""
    chosen, rejected = (transcript(record.get(side), side) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Reject("prompts differ", "'chosen' and 'rejected' differ before their last turn, "
                                       "expected one prompt: drop the pair")
    return {"chosen": chosen, "rejected": rejected} | scored(record)


SCORES = [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("rating_chosen", "rating_rejected"),
          ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating")]


def scored(record: dict) -> dict:
    """Scores, and margin = their difference on whatever scale, if both replies have one; ties stay, with margin 0."""
    names = next((names for names in SCORES if not any(absent(record.get(name)) for name in names)), None)
    if names is None:
        return {}
    better, worse = (check_number(record[name], name, -1e300) for name in names)
    if better < worse:
        raise broken("scores contradict", f"'{names[0]}' is below '{names[1]}'")
    return {"margin": better - worse, "score_chosen": better, "score_rejected": worse}


def pair(record: dict) -> dict:
    """chosen and rejected, whole dialogues or replies to a prompt, which has one of several names or is in messages."""
    found = carry(record, "chosen", "rejected", "messages", "source", "category", "annotator", "margin", "id",
                  id="prompt_id")
    if isinstance(record.get("prompt"), str) or any(key in record for key in (*ASKED[1:], "input")):
        before = rounds(record)
        found["prompt"] = [*before, *alternate([asked(record)])] if before else asked(record)
    else:
        found |= carry(record, "prompt")
    return found | scored(record)


def openai_preference(record: dict) -> dict:
    """input {messages, tools}, preferred_output and non_preferred_output [{role, content}]."""
    given = {key: value for key, value in check_object(record.get("input"), "input").items() if not absent(value)}
    sides = carry(record, "id", chosen="preferred_output", rejected="non_preferred_output")
    return carry(given, "tools", "functions", "system", prompt="messages") | sides


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


def ultrafeedback(record: dict) -> Iterator[dict | Reject]:
    """instruction, source, completions (four) [{response, overall_score, annotations {aspect: {Rating}}, model, ...}].

    The rule: chosen is the completion with the highest overall score, the first of equals; rejected a random one of
    those that score lower, with the prompt as seed, so that a record gives the same pair wherever it stands. (Zephyr,
    Tunstall et al. 2023, arXiv:2310.16944, draws among all others, ties too.) margin = the scores' difference.
    """
    def read(reply: dict) -> dict:
        return reply | {"overall_score": overall_score(reply), "response": text_of(reply, "response")}

    prompt, parts = text_of(record, "instruction"), list(each(record, "completions", read))
    yield from (part for part in parts if isinstance(part, Reject))
    scored = [part for part in parts if not isinstance(part, Reject)]
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
    """history, human_ref_A, human_ref_B, score_A, score_B, score_ratio, post_id, domain, labels (1: A preferred)."""
    first = check_label(record, "labels", 0, 1) == 1
    a, b = (check_number(record.get(f"score_{side}"), f"score_{side}", -1e9) for side in "AB")
    if a != b and (a > b) != first:
        raise broken("scores contradict", f"'labels' prefers the comment with the lower score ({a:g} and {b:g})")
    pair = prefer(record, "history", "human_ref_A", "human_ref_B", first) | carry(record, "domain", "score_ratio")
    return pair | carry(record, id="post_id") | {"score_chosen": max(a, b), "score_rejected": min(a, b)}


def _to_summarize(info) -> str:
    info = check_object(info, "info")
    kind = "article" if "article" in info else "post"
    title = f"{text_of(info, 'title')}\n\n" if info.get("title") else ""
    return f"Summarize this {kind}.\n\n{title}{text_of(info, kind)}"


def summary_pair(record: dict) -> dict:
    """info {post or (news) article, title, id, subreddit}, two summaries {text, policy}, worker, split, choice (the
    better one's index), extra {confidence: 1 to 9}."""
    prompt, sides = _to_summarize(record.get("info")), list_of(record, "summaries")
    if len(sides) != 2:
        raise broken("not a pair", f"'summaries' holds {len(sides)}, expected 2")
    first = check_label(record, "choice", 0, 1) == 0
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


def oasst(record: dict) -> Iterator[dict | Reject]:
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
        raise Reject("roles", f"has role {message.get('role')!r:.40} where {role} is due, left out with what "
                              "follows it")
    rank, replies = message.get("rank"), message.get("replies") or []
    if rank is not None:
        check_number(rank, "rank", 0)
    if not isinstance(replies, list):
        raise expected("a list of messages", "replies", replies, "not a list")
    turn = {"role": "user" if role == "prompter" else "assistant", "content": text_of(message, "text")}
    return turn, rank if role == "assistant" else None, replies


# ------------------------------------------------------------------------ verdicts of raters and judges

def nectar(record: dict) -> dict:
    """prompt, an HH transcript that ends with "Assistant:", and answers [{answer, model, rank}], 1 the best."""
    answers = [check_object(reply, "answers") for reply in list_of(record, "answers")]
    texts = [text_of(reply, "answer").strip() for reply in answers]
    more = carry(record, "prompt", "source") | {"models": [reply.get("model") for reply in answers]}
    return {"answers": texts, "ranks": [reply.get("rank") for reply in answers]} | more


def pandalm(record: dict) -> dict:
    """instruction, input, response1, response2, annotator1 and so on, idx, cmp_key (the models), motivation_app.

    0 tie, 1 first, 2 second. The rule: chosen is the response that most of the annotators prefer; without a majority
    the record is a tie. Some responses stand there as JSON true, which is the text "True".
    """
    votes = [check_label(record, key, 0, 1, 2) for key in sorted(record) if key.startswith("annotator")]
    winner, count = Counter(votes).most_common(1)[0] if votes else (0, 0)
    if winner == 0 or 2 * count <= len(votes):
        raise Reject("tie", f"annotators say {votes}, most of them for neither: drop the record")
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


PREFERENCES = {name: Format(form, read, shapes) for name, form, read, *shapes in (
    ("hh", "preference", hh, {"chosen": str, "rejected": str}),
    ("ultrafeedback_binarized", "preference", pair,
     *(sides | {better: object, worse: object} for better, worse in SCORES for sides in (
         {"chosen": [dict], "rejected": [dict]}, {"prompt": str, "chosen": str, "rejected": str},
         {"prompt": object, "chosen": dict, "rejected": dict}, {"messages": object, "chosen": dict, "rejected": dict})),
     # Texts to messages with the first names are what is written here, with a margin if there is one.
     *({"prompt": [dict], "chosen": str, "rejected": str, better: object, worse: object}
       for better, worse in SCORES[1:])),
    # Orca's triples, LLaMA-Factory's Alpaca preferences
    ("triple", "preference", pair,
     *({name: str, "chosen": object, "rejected": object} for name in (*ASKED[1:], "input"))),
    ("sharegpt_preference", "preference",
     lambda r: {"prompt": dialogue(r, "conversations" if "conversations" in r else "conversation")} |
     carry(r, "chosen", "rejected", "id", "category") | scored(r),
     *({key: [dict], "chosen": object, "rejected": object} for key in ("conversations", "conversation"))),
    ("openai_preference", "preference", openai_preference,
     {"input": dict, "preferred_output": object, "non_preferred_output": object}),
    # The more helpful one is chosen, not the safer.
    ("safe_rlhf", "preference", lambda r: carry(r, "safer_response_id") |
     prefer(r, "prompt", "response_0", "response_1", check_label(r, "better_response_id", 0, 1) == 0),
     {"prompt": str, "response_0": str, "response_1": str, "better_response_id": int}),
    ("ultrafeedback", "preference", ultrafeedback, {"instruction": str, "completions": [dict]}),
    ("shp", "preference", shp, {"history": str, "human_ref_A": str, "human_ref_B": str, "labels": int}),
    ("summary_pair", "preference", summary_pair, {"info": dict, "summaries": [dict], "choice": int}),
    ("summary_rating", "messages", summary_rating, {"info": dict, "summary": dict}),
    ("oasst", "preference", oasst, {"message_tree_id": str, "prompt": dict}),
    ("nectar", "ranking", nectar, {"prompt": str, "answers": [dict]}),
    ("pandalm", "preference", pandalm,
     {"instruction": str, "response1": object, "response2": object, "annotator1": object}),
    ("alpaca_eval", "preference", alpaca_eval, {"instruction": str, "output_1": str, "output_2": str}),
    ("llmbar", "preference", lambda r: prefer(r, "input", "output_1", "output_2", check_label(r, "label", 1, 2) == 1),
     {"input": str, "output_1": str, "output_2": str, "label": int}),
)}
