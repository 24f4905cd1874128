"""Questions, recorded answers, and which answer belongs to which question.

A record is joined by the id that both files give, or else by the text it was asked: `instruction` with its `input`,
`prompt`, or the first user message. A place in a file is never an id. A record whose id names one question and whose
text is another's ends the run, and so does one that answers a question again; of equal texts without ids, the first
answer is to the first question.
"""
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from data.llm import split_thoughts
from data.native import ANSWERED, ASKED, ask, asked
from data.records import SYSTEM, absent, check_content, check_prompt, flag, short
from data.tiny.world import TASKS
from judging.entries import digest, read_lines
from judging.prompts import Question
from judging.recorded import Recorded
from runtime import fail

# What files call a question's id; the first that a record has counts.
IDS = ("id", "question_id", "prompt_id", "uid", "index", "idx")
COUNTS = ("index", "idx")  # those that count a file's records, where others are names


class Said(NamedTuple):
    """What a file answers."""

    id: str                # "" for none
    key: str               # what the file calls the id
    text: str | None       # what was asked, where the record says so
    replies: list[dict]    # {"text", "finished"} by turn
    place: int | str


def own_id(record: dict) -> tuple[str, str]:
    """A record's id and its key; two empty texts for none."""
    key = next((key for key in IDS if not absent(record.get(key))), "")
    return re.sub(r"(?<=\d)\.0$", "", str(record[key]) if key else ""), key  # of tables with gaps, 7.0 is 7


def same_ids(one: str, other: str) -> bool:
    """Whether ids under two keys may mean the same: a count does not mean a name."""
    return one == other or "id" in (one, other) or (one in COUNTS) == (other in COUNTS)


# ---------------------------------------------------------------------------------------- questions

def load_questions(data: str, references: str = "", limit: int = 0,
                   graded: bool = False) -> tuple[list[Question], list[dict] | None]:
    """The questions, and the tiny world's dialogues if that is what they are, as `graded` ones must be.

    `data` is a file, or judge.py's settings, which name it. A question without an id gets one made from its text, so
    that it has the same in every file.
    """
    if not isinstance(data, str | Path):
        data, references, limit = data.data, data.references, data.questions
    if not Path(data).is_file():
        fail(f"data={data}: no such file, expected JSON lines of questions, such as test.jsonl of data/tiny/build.py")

    def question(record: dict, place: int | str) -> list[tuple[Question, dict | None, int | str]]:
        found, (name, key) = texts_of(record, f"data={data} {place}"), own_id(record)
        category, right = record.get("category", record.get("dataset")), listed(record.get("reference") or [])
        right = [right] if isinstance(right, str) else right
        if not isinstance(right, list) or not all(isinstance(text, str | None) for text in right):
            fail(f"data={data} {place}: 'reference' is {short(right)}, expected text or texts by turn: mend it")
        names = [name] if len(found) == 1 else [f"{name}/{i}" for i in range(1, len(found) + 1)]
        names = names if key else [f"text:{digest(chr(0).join(texts))}" for texts in found]
        first = record["turns"][0] if isinstance(record.get("turns"), list) else None
        dialogue = record if isinstance(first, dict) and "user" in first else None
        return [(Question(name, str(category or ""), texts, right, key), dialogue, place)
                for name, texts in zip(names, found, strict=True)]

    fault = "is no question, expected 'turns', 'prompt' or 'instruction'"
    records = [part for parts in read_lines(data, question, fault) for part in parts]
    found: dict[str, Question] = {}
    places: dict[str, int | str] = {}
    for q, _, place in records:
        if q.key and q.id in found:
            fail(f"data={data}: {place} has the id '{q.id}' of {places[q.id]}, expected each once: drop or rename one")
        name = q.id
        while name in found:  # the same text again, without an id of its own
            name += "'"
        found[name], places[name] = q._replace(id=name), place
    questions, dialogues = list(found.values())[:limit or None], [d for _, d, _ in records][:limit or None]
    if references:
        answers = join(read_said(references), questions, references, all_known=False)
        if not any(answers):
            print(f"{references}: holds references to none of the {len(questions)} questions asked")
        questions = [q._replace(references=[r["text"] for r in said.replies]) if said else q
                     for q, said in zip(questions, answers, strict=True)]
    if any(record and record.get("category") not in TASKS for record in dialogues):
        fail(f"data={data}: holds dialogues not made by data/tiny/build.py, expected their 'turns' as texts")
    if graded and not all(dialogues):
        fail(f"judges: gold grades the tiny world's dialogues, data={data} holds others: name another judge")
    return questions, dialogues if all(dialogues) else None


def texts_of(record: dict, where: str) -> list[list[str]]:
    """What the user says, turn by turn; a record of Self-Instruct asks a question with each of its instances."""
    if record.get("instances"):
        return [[ask(record | {"input": instance.get("input")}, "instruction", "input")]
                for instance in record["instances"]]
    for key in (*SYSTEM, "history"):
        if not absent(record.get(key)):
            fail(f"{where}: has '{key}', which is not asked here: make it part of the question, or drop it")
    turns = listed(record.get("turns")) or record.get("prompt") or record.get("messages")
    if not isinstance(turns, list):
        vicuna = "text" in record and not any(record.get(key) for key in (*ASKED, "input"))
        turns = [turns] if record.get("turns") else check_prompt(record["text"] if vicuna else asked(record))
    if any(isinstance(turn, dict) and turn.get("role", "user") != "user" for turn in turns):
        fail(f"{where}: holds a dialogue, expected the user's turns alone, named 'turns'")
    texts = [turn if isinstance(turn, str) else turn["user" if "user" in turn else "content"] for turn in turns]
    if not texts:
        raise ValueError
    return [[check_content(text, "turns") for text in texts]]


def listed(value):
    """A list that a cell of a table holds as JSON; anything else as it is."""
    return json.loads(value) if isinstance(value, str) and re.match(r"""\s*\[\s*['"{]""", value) else value


# ------------------------------------------------------------------------------------------ answers

def read_said(path: str) -> list[Said]:
    """The answers of a file: {"replies"}, MT-Bench's and arena-hard's "choices", "messages", or {"output"}."""
    def said(record: dict, place: int | str) -> list[Said]:
        name, key = own_id(record)
        if record.get("instances"):
            parts = [record | instance for instance in record["instances"]]
            names = [name] if len(parts) == 1 else [f"{name}/{i}" for i in range(1, len(parts) + 1)]
            return [Said(name if key else "", key, ask(part, "instruction", "input"), replies(part), place)
                    for name, part in zip(names, parts, strict=True)]
        return [Said(name, key, question_of(record), replies(record), place)]

    def replies(record: dict) -> list[dict]:
        if "replies" in record:
            found = record["replies"]
        elif "choices" in record:
            if len(record["choices"]) > 1:
                fail(f"{path}: answers the question '{own_id(record)[0]}' {len(record['choices'])} times, "
                     "expected one of its 'choices': drop the others")
            choice = record["choices"][0]
            found = choice["turns"] if "turns" in choice else [choice["message"]]
        elif "messages" in record:
            found = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
        else:
            names = [key for key in ANSWERED if record.get(key) is not None]
            if len(names) > 1:
                fail(f"{path}: has '{names[0]}' and '{names[1]}', either of which may be the reply: drop one of them")
            found = [record[names[0] if names else next((key for key in (*ANSWERED, "text") if key in record), "")]]
        # Without a reply nothing that follows has a history.
        return list(takewhile(lambda reply: reply is not None, map(reply_of, found)))

    fault = "is no answer, expected 'id' and 'replies', or 'instruction' and 'output'"
    return [part for parts in read_lines(path, said, fault) for part in parts]


def reply_of(value: str | dict | None) -> dict | None:
    """{"text", "finished"}, without thoughts, as of a model that is asked; None where nothing was said."""
    finished = not isinstance(value, dict) or flag(value.get("finished")) is not False
    while isinstance(value, dict):
        value = value[next((key for key in ("text", "content") if key in value), "answer")]
    value = check_content(value, "reply") if isinstance(value, list) else value
    if not isinstance(value, str | None):
        raise TypeError
    if value is None:
        return None
    text, thoughts, ended = split_thoughts(value)
    return {"text": text if thoughts else value, "finished": finished and ended}


def question_of(record: dict) -> str | None:
    """What an answer's record says it was asked; None if it does not."""
    messages = record.get("messages", record.get("prompt"))
    if isinstance(messages, list):
        return next((check_content(m["content"], "content") for m in messages if m["role"] == "user"), None)
    if any(isinstance(record.get(key), str) and record[key] for key in ASKED):
        return asked(record)
    return None


def join(answers: Sequence[Said], questions: Sequence[Question], path: str,
         all_known: bool = True) -> list[Said | None]:
    """The answer to each question, None for none."""
    by_id = {q.id: i for i, q in enumerate(questions) if q.key}
    by_text, found, lost = defaultdict(list), [None] * len(questions), []
    for i, q in enumerate(questions):
        by_text[digest(q.turns[0])].append(i)
    ids = any(said.id in by_id and same_ids(said.key, questions[by_id[said.id]].key) for said in answers if said.key)
    for said in answers:
        same = by_text.get(digest(said.text), []) if said.text is not None else []
        if said.key and ids:
            at = by_id.get(said.id)
            if at is not None and said.text is not None and at not in same:
                fail(f"{path} record {said.place}: its {said.key} '{said.id}' is that of another question than its "
                     f"instruction ({said.text[:40]!r}), expected both to name the same: mend one of the two files")
        else:
            at = next((i for i in same if found[i] is None), same[-1] if same else None)
        if at is None:
            lost.append((said, same))
        elif found[at] is not None:
            fail(f"{path} record {said.place}: answers again what record {found[at].place} does "
                 f"({questions[at].turns[0][:40]!r}), expected one to each question: drop one, or split the file")
        else:
            found[at] = said
    for said, same in lost:
        if any(found[i] is None for i in same):
            fail(f"{path} record {said.place}: its instruction ({said.text[:40]!r}) is that of a question with another "
                 f"id than its {said.key} '{said.id}', expected both to name the same: mend one of the two files")
    if all_known and not any(found):
        textless = all(said.text is None for said, _ in lost)
        why = ": its ids name none of them and it holds no instruction" if textless else ""
        fail(f"{path}: answers none of the questions{why}, expected the ids of data or its instructions")
    if all_known and lost:
        print(f"{path}: {len(lost)} of its {len(answers)} answers are to none of the {len(questions)} questions asked")
    return found


def recorded_replies(path: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """A file's replies by id and by what was asked."""
    found = [(said, [r["text"] for r in said.replies]) for said in read_said(path)]
    return {said.id: texts for said, texts in found if said.key}, {
        said.text: texts for said, texts in found if said.text is not None}


def read_answers(path: str, questions: list[Question]) -> list[list[dict]]:
    """A file's replies to the questions; a question it does not answer gets none."""
    return [said.replies[:len(q.turns)] if said else []
            for q, said in zip(questions, join(read_said(path), questions, path), strict=True)]


# ---------------------------------------------------------------------------------------- judgments

KEY_OF = {"alpaca_eval": "index", "mt_bench_single": "question_id", "mt_bench_pair": "question_id",
          "vicuna": "question_id", "battles": "question_id", "pandalm": "idx"}  # others: "id"


def name_prompts(said: Recorded, questions: Sequence[Question], data: str) -> str:
    """Give recorded judgments the questions' ids and categories, if every item they judge is among the questions.

    Part of the items will do where the judgments hold what was asked. Otherwise the questions are not theirs: nothing
    is taken from them, an id that both use is not the same prompt, and why is returned; "" if all is well.
    """
    if said.numbered:
        return f"{said.path} names no prompts: nothing is taken from data={data}."
    rows, key = [*said.games, *said.scores], KEY_OF.get(said.format, "id")
    by_id = {q.id: q for q in questions if not q.key or same_ids(key, q.key)}
    by_text = {digest(q.turns[0]): q for q in questions}
    found: dict[str, Question | None] = {}
    for row in rows:
        name, text = str(row["prompt"]), row.get("asked")
        found[name] = q = by_id.get(name) or by_text.get(text or digest(name))
        if q and text and digest(q.turns[0]) != text:
            fail(f"{said.path}: judges '{name}' with another instruction than data={data} has under this id: "
                 "expected both to name the same: name the questions that were judged")
    missing = sum(q is None for q in found.values())
    if missing and not (missing < len(found) and all(row.get("asked") for row in rows)):
        for row in rows:
            if found[str(row["prompt"])]:
                row["prompt"] = f"{row['prompt']} (not of data)"
        return (f"data={data} names {len(found) - missing} of the {len(found)} prompts judged in {said.path}: it is "
                "not taken for their questions, and gives them no categories.")
    for row in rows:
        if q := found[str(row["prompt"])]:
            row["prompt"], row["category"] = q.id, row.get("category") or q.category
    return f"data={data} lacks {missing} of the {len(found)} prompts judged in {said.path}." if missing else ""
