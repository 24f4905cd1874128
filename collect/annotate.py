"""A page on which people rate replies: they write, two replies come, they choose one, and the dialogue goes on with it.

    python -m collect.annotate models='["runs/tiny/0/sft/model"]' out=votes.jsonl          http://127.0.0.1:8080
    python -m collect.annotate models='["old=http://127.0.0.1:8000/v1#a", "new=http://127.0.0.1:8001/v1#b"]'

    votes.jsonl            preferences to train on (data/records.py), with who wrote the replies, their sides, the time
    votes.shared.jsonl     the same of the shared items, which everybody rates: to measure agreement (python -m
                           collect.spec), not to train on
    votes.ratings.jsonl    every answer, also those without a preference, as judging/recorded.py reads people's votes
    votes.journal.jsonl    everything shown and said, on the disk before the page goes on; the others are made from it

The protocol is that of the talk "Recipe for Training Helpful Chatbots": every turn is rated, about four a dialogue,
which ends at 2048 tokens; replies differ by top-p and top-k rather than temperature; the scale is Anthropic's of eight
(Bai et al. 2022, arXiv:2204.05862) or Llama 2's choice and margin (Touvron et al. 2023, arXiv:2307.09288). "Cannot
tell" and "both bad" are kept apart: ties broken at random were what ruined the talk's first hundred ratings.

A checkpoint answers one person at a time; for several, serve it (chat.py --serve) and name the endpoint.
"""
import asyncio
import base64
import errno
import hashlib
import io
import json
import os
import random
import re
import threading
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from math import inf, isnan
from pathlib import Path
from typing import Literal

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import runtime
from collect.raters import collect_labels
from collect.spec import PREFERENCE
from data.formats import read_all
from data.llm import Checkpoint, Reply, Request, Sampling, open_model
from data.records import Reject, check_text
from judging.agreement import cohen_kappa, krippendorff_alpha, raw_agreement
from judging.recorded import read_likert
from judging.tables import comparison
from runtime import check_ranges, fail, lock_file, serving

PAGE, GUIDELINES = (Path(__file__).with_name(name) for name in ("annotate.html", "guidelines.md"))
ROOM = 16  # tokens; a shorter reply is not worth asking for


@dataclass(frozen=True)
class Config:
    models: list[str] = ()           # one or two: directory or http://host:port/v1#name; "name=where" names it in files
    out: str = "votes.jsonl"         # preferences; the other files lie beside it
    scale: Literal["choice", "likert"] = "choice"  # choice: the better one and a margin, 1-4; likert: 1 (left) to 8
    prompts: str = ""                # JSONL of {"prompt"} to begin dialogues with, which may be changed; "": none
    shared: str = ""                 # JSONL of {"id", "prompt", "replies": [two]}, which everybody rates; "": none.
                                     # With "models": [two], who wrote the replies, they are votes on these models
    shared_every: int = 4            # ratings of new replies between two shared items
    guidelines: str = ""             # Markdown file shown beside the replies, read anew each time; "": guidelines.md
    top_p: list[float] = (0.8, 1.0)  # of the two replies; 1: all
    top_k: list[int] = (0, 40)       # 0: all
    temperature: float = 1.0         # of both
    max_tokens: int = 512            # of a reply
    turns: int = 4                   # of a dialogue, as a guide
    tokens: int = 2048               # of a dialogue, which ends there
    template: str = ""               # chat template of a directory; "": its own, or zephyr
    host: str = "127.0.0.1"          # where to listen; any other than this machine's own needs a token
    port: int = 8080                 # 0: any that is free
    token: str = ""                  # what annotators have to know: open http://host:port/#token=...
    device: str = "auto"             # cpu, cuda, auto
    threads: int = 0                 # CPU threads; 0: PyTorch's choice

    def __post_init__(self):
        if not 1 <= len(self.models) <= 2:
            fail(f"models holds {len(self.models)}, expected one or two, e.g. models='[\"runs/tiny/0/sft/model\"]'")
        if len(self.top_p) != 2 or len(self.top_k) != 2:
            fail("top_p and top_k hold a value for each of the two replies, e.g. top_p='[0.8, 1.0]' top_k='[0, 40]'")
        samplings = set(zip(self.top_p, self.top_k, strict=True))
        if len({entry.partition("=")[0] for entry in self.models}) == len(samplings) == 1:
            fail("top_p and top_k are the same for both replies of one model, not to be told apart: change one")
        check_ranges(self, shared_every=(1, inf), temperature=(0.01, 10), max_tokens=(ROOM, inf), turns=(1, inf),
                     tokens=(64, inf), port=(0, 65535), threads=(0, inf))
        for top_p, top_k in samplings:
            Sampling(top_p=top_p, top_k=top_k)  # checks these
        if not self.out.endswith(".jsonl"):
            fail(f"out is '{self.out}', expected a name that ends with .jsonl")
        if self.guidelines and not Path(self.guidelines).is_file():
            fail(f"guidelines={self.guidelines}: no such file, expected Markdown or text")
        if not self.token and self.host not in serving.LOOPBACK:
            fail(f"host is '{self.host}', which others can reach: set token= to what annotators have to know")


# ---------------------------------------------------------------------------------- what is given

def load_shared(path: str) -> dict[str, dict]:
    """Shared items by id."""
    items: dict[str, dict] = {}
    for number, record in enumerate(read_all(path, "prompt"), 1):
        name, replies = str(record.get("id", number)), record.get("replies")
        texts = [r for r in replies if isinstance(r, str) and r.strip()] if isinstance(replies, list) else []
        if texts != replies or len(texts) != 2 or texts[0] == texts[1] or name in items:
            fault = "its id occurs twice" if name in items else "'replies' are not two texts, or they are the same"
            fail(f"{path} record {number}: {fault}: mend or drop it")
        models = record.get("models", ["reply 1", "reply 2"])
        named = [m for m in models if isinstance(m, str) and m] if isinstance(models, list) else []
        if named != models or len(named) != 2 or named[0] == named[1]:
            fail(f"{path} record {number}: 'models' are not two names, expected who wrote the replies: mend or drop it")
        items[name] = record | {"models": models}
    return items


# ------------------------------------------------------------------------------ what an answer says

def rating_of(item: dict, answer: dict) -> dict:
    """An answer as people's votes are read (judging/recorded.py, "likert"): a stood left."""
    margin, choice = answer["margin"], answer["choice"]
    verdict = {"choice": {"left": "a", "right": "b", None: None}[choice], "margin": margin}
    if answer["scale"] == "likert":
        verdict = {"rating": choice and {"left": 5 - margin, "right": 4 + margin}[choice]}
    a, b = (r["model"] + (f" top_p={r['top_p']:g} top_k={r['top_k']}" if "top_p" in r else "") for r in item["replies"])
    return {"id": item["id"], "prompt": item["dialogue"], "turn": item["turn"], "category": item["category"],
            "a": a, "b": b, **verdict, "flag": answer["flag"], "annotator": item["annotator"],
            "seconds": answer["seconds"], "at": answer["at"], "messages": item["messages"], "replies": item["replies"]}


def preference_of(item: dict, answer: dict) -> dict | None:
    """An answer as a pair to learn from; None without a choice, or with a reply cut off, which would teach to do so."""
    if answer["choice"] is None or not all(reply["finished"] for reply in item["replies"]):
        return None
    chosen, rejected = item["replies"] if answer["choice"] == "left" else reversed(item["replies"])
    by = [{k: v for k, v in reply.items() if k not in ("text", "finished")} for reply in (chosen, rejected)]
    return {"id": item["id"], "dialogue": item["dialogue"], "turn": item["turn"], "category": item["category"],
            "annotator": item["annotator"], "prompt": item["messages"], "chosen": chosen["text"],
            "rejected": rejected["text"], "margin": answer["margin"], "chosen_slot": answer["choice"],
            "chosen_by": by[0], "rejected_by": by[1], "seconds": answer["seconds"], "at": answer["at"]}


def agreement(ratings: Iterable[dict]) -> dict | None:
    """Whether those who rated the same pair say the same: one reply, the other, or cannot tell; None before two have.

    n counts pairs of votes; "decided" is for those in which both chose. kappa is for two people, alpha for any number.
    """
    rows = []
    for rating in ratings:
        (game,) = read_likert(rating, "", "")
        if game["rating"] is not None or rating["flag"] == "skip":
            strength = 0 if game["rating"] is None else game["rating"] - 4.5
            side = 1 if game["a"] < game["b"] else -1  # in the order of the replies' names, whoever saw them swapped
            rows.append({"pair": str(comparison(game)[1:]), "rater": game["judge"], "strength": side * strength})
    table = np.sign(collect_labels(rows).strength)
    table = table[:, (~np.isnan(table)).sum(axis=0) > 1]
    table = table[(~np.isnan(table)).any(axis=1)]
    if not table.size:
        return None
    raw = raw_agreement(table, tie=0)
    found = {"raters": len(table), "units": table.shape[1], "n": raw["n"], "n_decided": raw["n_without_ties"],
             "raw": raw["agreement"], "decided": raw["agreement_without_ties"], "alpha": krippendorff_alpha(table),
             "kappa": cohen_kappa(table) if len(table) == 2 else np.nan}
    return {name: None if isnan(x) else x for name, x in found.items()}


# -------------------------------------------------------------------------------------- the journal

@dataclass
class Person:
    """Where an annotator is."""

    dialogue: int = 1                                     # which of theirs
    messages: list[dict] = field(default_factory=list)    # of it, up to the last reply chosen
    tokens: int = 0                                       # of these
    category: str = ""                                    # of it, once it has begun
    item: dict | None = None                              # two replies to be rated
    rated: int = 0                                        # new replies
    shared: set[str] = field(default_factory=set)         # shared items rated

    @property
    def turn(self) -> int:
        return 1 + sum(m["role"] == "user" for m in self.messages)

    @property
    def rates(self) -> bool:
        """Whether they have, and are not just a name that somebody has typed."""
        return self.rated + len(self.shared) > 0

    def begin(self) -> None:
        self.dialogue, self.messages, self.tokens, self.category = self.dialogue + 1, [], 0, ""


def append(file: io.FileIO, record: dict) -> None:
    """Write a line through to the disk. What cannot be written whole is taken back, and raises OSError."""
    line, before = (json.dumps(record) + "\n").encode(), os.fstat(file.fileno()).st_size
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


class Votes:
    """All that was shown and said, made from the journal alone. `write` is the only way to change it."""

    def __init__(self, out: str):
        stem = out.removesuffix(".jsonl")
        self.files = {"preferences": Path(out), "shared": Path(f"{stem}.shared.jsonl"),
                      "ratings": Path(f"{stem}.ratings.jsonl")}
        self.people: dict[str, Person] = defaultdict(Person)
        self.items: dict[str, dict] = {}
        self.answers: dict[str, dict] = {}
        self.shared_ratings: list[dict] = []
        self.openings: set[int] = set()                  # that somebody who rates has taken
        self.owed: deque[tuple[str, dict]] = deque()     # what the journal holds and the other files do not yet
        journal = Path(f"{stem}.journal.jsonl")
        for path in self.files.values():
            if path.exists() and not journal.exists():
                fail(f"{path}: exists without the {journal} it would have been made from: choose another out=")
        journal.parent.mkdir(parents=True, exist_ok=True)
        self.stream = journal.open("ab+", buffering=0)  # a buffer would write later what a full disk has not taken
        try:
            lock_file(self.stream)
        except BlockingIOError:
            fail(f"{journal}: another process is writing here, expected a journal of its own: choose another out=")
        self.stream.seek(0)
        whole, made = 0, dict.fromkeys(self.files, "")
        for number, line in enumerate(io.BufferedReader(io.FileIO(self.stream.fileno(), closefd=False)), 1):
            if not line.endswith(b"\n"):
                break  # half a line, left by a kill
            try:
                event = json.loads(line)
                if event["event"] == "answer" and event["id"] in self.answers:
                    fail(f"{journal} line {number}: answers {event['id']} a second time: drop the line that is wrong")
                for kind, record in self.apply(event):
                    made[kind] += json.dumps(record) + "\n"
            except (ValueError, KeyError, TypeError):
                fail(f"{journal} line {number}: is damaged, expected what an earlier run wrote: mend or drop it")
            whole += len(line)
        self.stream.truncate(whole)
        for kind, path in self.files.items():
            runtime.write_text(path, made[kind])

    def write(self, event: dict) -> None:
        """When this returns, everything is on the disk; if it raises OSError, nothing is, and nothing has changed."""
        append(self.stream, event)
        self.owed += self.apply(event)
        while self.owed:
            kind, record = self.owed[0]
            try:
                with self.files[kind].open("ab", buffering=0) as file:
                    append(file, record)
            except OSError as error:
                print(f"{self.files[kind]}: cannot be written ({error.strerror}): the journal holds it, and it is "
                      "written as soon as there is room", flush=True)
                return
            self.owed.popleft()

    def apply(self, event: dict) -> list[tuple[str, dict]]:
        """What an event changes; the records it adds to the files."""
        person = self.people[event["annotator"]]
        if event["event"] == "next":
            person.begin()
            return []
        if event["event"] == "item":
            self.items[event["id"]] = person.item = event
            if not event["shared"]:
                person.category = event["category"]
            if person.rates:
                self.openings.add(event.get("opening"))
            return []
        item, person.item = self.items[event["id"]], None
        self.answers[event["id"]] = event
        self.openings.add(item.get("opening"))
        rating, preference = rating_of(item, event), preference_of(item, event)
        if item["shared"]:
            person.shared.add(item["shared"])
            self.shared_ratings.append(rating)
        else:
            reply = item["replies"][event["goes_on"]]
            person.messages = [*item["messages"], {"role": "assistant", "content": reply["text"]}]
            person.tokens = reply["tokens"]
            person.rated += 1
        if event["ends"]:
            person.begin()
        kept = [("shared" if item["shared"] else "preferences", preference)] if preference else []
        return [("ratings", rating), *kept]

    def __str__(self) -> str:
        answers = self.answers.values()
        pairs = sum(preference_of(self.items[answer["id"]], answer) is not None for answer in answers)
        flags = Counter(answer["flag"] for answer in answers)
        return (f"{len(answers)} answers: {pairs} preferences, {flags[None] - pairs} between replies that were cut, "
                f"{flags['skip']} cannot tell, {flags['bad']} both bad")


# --------------------------------------------------------------------------------------- the server

class Server:
    """The routes, over the votes and one or two models."""

    def __init__(self, config: Config, models: list[tuple[str, object]] | None = None):
        self.config, self.votes = config, Votes(config.out)
        self.shared = load_shared(config.shared) if config.shared else {}
        self.openings = read_all(config.prompts, "prompt") if config.prompts else []
        self.categories = sorted({*PREFERENCE, *(o.get("category", "none") for o in self.openings)})
        self.dealt: dict[str, int] = {}                                    # openings, by dialogue
        self.undealt = 0                                                   # the first that is free, or was
        self.agreement = 0, None                                           # after how many shared ratings
        self.locks = weakref.WeakValueDictionary()                         # one step at a time by each annotator
        self.local = threading.Lock()                                      # one reply at a time by this machine
        self.pool = ThreadPoolExecutor(64)
        self.page = PAGE.read_text()
        # The page shows what a model says as text. Should that ever fail, the browser still runs no other script.
        self.policy = ("default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                       "frame-ancestors 'none'")
        for tag in ("style", "script"):
            inline = re.search(f"<{tag}>(.*?)</{tag}>", self.page, re.S)[1]
            self.policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"
        self.models = models or []
        for name, equals, where in (entry.partition("=") for entry in config.models if not models):
            self.models.append((name, open_model(where if equals else name, config.device, config.template)))
        checkpoints = [model for _, model in self.models if isinstance(model, Checkpoint)]
        self.tokens = min([config.tokens, *(checkpoint.model.config.max_positions for checkpoint in checkpoints)])

    def app(self) -> Starlette:
        def refused(call: Call, error: HTTPException) -> Response:
            return JSONResponse({"error": error.detail}, error.status_code)

        routes = [Route("/", self.index), Route("/state", self.step(None))]
        routes += [Route(f"/{act.__name__}", self.step(act), methods=["POST"])
                   for act in (self.say, self.answer, self.next)]
        return Starlette(routes=routes, exception_handlers={HTTPException: refused})

    async def index(self, call: Call) -> Response:
        return HTMLResponse(self.page, headers={"content-security-policy": self.policy, "cache-control": "no-store"})

    def step(self, act: Callable | None) -> Callable:
        """A route: an annotator's act, and the state after it. What comes twice, or from an old page, is done once."""
        async def route(call: Call) -> Response:
            body = call.query_params if act is None else await serving.read_body(call, 200_000)
            if not isinstance(body, Mapping):
                raise HTTPException(400, "The body is not a JSON object")
            name = self.admit(call, body)
            lock = self.locks.setdefault(name, asyncio.Lock())
            async with lock:
                try:
                    if act is not None:
                        await act(name, self.person(name), body)
                    return self.state(name)
                except OSError as error:  # of Votes.write
                    raise HTTPException(507, f"It could not be written ({error.strerror}) and does not count: try "
                                             "again when there is room on the server's disk") from None

        return route

    def person(self, name: str) -> Person:
        """Where an annotator is; of one who has done nothing yet nothing is kept."""
        return self.votes.people.get(name) or Person()

    async def say(self, name: str, person: Person, body: dict) -> None:
        """The annotator's turn, and two replies to it."""
        if (body.get("dialogue"), body.get("turn"), person.item) != (person.dialogue, person.turn, None):
            return
        try:
            text = check_text(body.get("text"), "text").strip()
            category = person.category or check_text(body.get("category"), "category")
        except Reject as reject:
            raise HTTPException(400, str(reject).partition(":")[0]) from None
        room = self.room(person.tokens, text)
        if room < ROOM:
            raise HTTPException(400, "That leaves no room for a reply: shorten it, or begin a new dialogue")
        dialogue, messages = f"{name}/{person.dialogue}", [*person.messages, {"role": "user", "content": text}]
        item = f"{dialogue}/{person.turn}"
        replies = await self.two_replies(messages, item, room)
        self.votes.write({"event": "item", "id": item, "annotator": name, "dialogue": dialogue, "turn": person.turn,
                          "shared": "", "category": category,
                          "opening": None if person.messages
                          else self.dealt.get(dialogue, self.free_opening(name, person.rates)),
                          "messages": messages, "replies": replies, "at": time.time()})

    async def answer(self, name: str, person: Person, body: dict) -> None:
        """A rating."""
        item = self.votes.items.get(str(body.get("id")))
        if item is None or item["annotator"] != name:
            raise HTTPException(404, "There is no such item: reload the page")
        choice, margin, flag = (body.get(key) for key in ("choice", "margin", "flag"))
        if given := self.votes.answers.get(item["id"]):
            if (choice, margin, flag) == (given["choice"], given["margin"], given["flag"]):
                return  # sent again by somebody who was not told that it has come
            raise HTTPException(409, "These two have been rated already: your first answer counts")
        chosen = choice in ("left", "right") and type(margin) is int and 1 <= margin <= 4 and flag is None
        if not chosen and (choice, margin, flag) not in ((None, None, "skip"), (None, None, "bad")):
            raise HTTPException(400, "An answer is a choice with a margin from 1 to 4, or a flag")
        if chosen and len({reply["text"] for reply in item["replies"]}) == 1:
            raise HTTPException(400, "Both replies are the same: say that you cannot tell, or that both are bad")
        # If the annotator cannot tell, chance decides which reply continues; after two bad ones the dialogue ends.
        goes_on = ("left", "right").index(choice) if chosen else random.Random(item["id"] + "/goes on").randrange(2)
        ends = not item["shared"] and (flag == "bad" or self.room(item["replies"][goes_on]["tokens"], "") < ROOM)
        self.votes.write({"event": "answer", "id": item["id"], "annotator": name, "scale": self.config.scale,
                          "choice": choice, "margin": margin, "flag": flag, "goes_on": goes_on, "ends": ends,
                          "seconds": round(time.time() - item["at"], 1), "at": time.time()})

    async def next(self, name: str, person: Person, body: dict) -> None:
        """A new dialogue, unless there are replies to be rated."""
        if (body.get("dialogue"), person.item) == (person.dialogue, None):
            self.votes.write({"event": "next", "annotator": name})

    def admit(self, call: Call, about: Mapping) -> str:
        """The annotator who calls, if they may."""
        if self.config.token and not serving.knows_token(call.headers, self.config.token):
            raise HTTPException(401, "The token is not the one this page was started with")
        if not self.config.token:
            serving.check_host(call.headers)
        name = about.get("annotator")
        if not isinstance(name, str) or not re.fullmatch(r"[^\W_](?:[\w .'-]{0,38}[\w.])?", name):
            raise HTTPException(400, "A name has 1 to 40 letters, digits, blanks, dots or hyphens, "
                                     "and begins with a letter or digit")
        return name

    def room(self, tokens: int, text: str) -> int:
        """Tokens that a reply may have; a text has about one for three bytes."""
        return min(self.config.max_tokens, self.tokens - tokens - len(text.encode()) // 3)

    async def two_replies(self, messages: list[dict], item: str, room: int) -> list[dict]:
        """Left and right, by models and samplings in random order; drawn again, a few times, when empty or the same."""
        lot, config = random.Random(item), self.config
        models = lot.sample([self.models[0], self.models[-1]], 2)
        dealt = lot.sample(list(zip(config.top_p, config.top_k, strict=True)), 2)
        samplings = [Sampling(room, config.temperature, top_p, top_k) for top_p, top_k in dealt]

        def ask(side: int, attempt: int) -> Reply | str:
            model, request = models[side][1], Request(messages, repeat=2 * attempt + side, tag=item)
            with self.local if isinstance(model, Checkpoint) else nullcontext():
                try:
                    return dict(model.replies([request], samplings[side]))[0]
                except SystemExit:  # an endpoint that cannot be asked; it has said why in the terminal
                    return "the model cannot be reached"

        async def draw(side: int, attempt: int) -> dict:
            reply = await asyncio.get_running_loop().run_in_executor(self.pool, ask, side, attempt)
            if isinstance(reply, str):
                raise HTTPException(502, f"No reply came: {reply}")
            (name, model), s = models[side], samplings[side]
            text = reply.text.strip().replace("\0", "").encode(errors="replace").decode()  # as records have to be
            return {"text": text, "finished": reply.finished and bool(text),
                    "tokens": reply.prompt_tokens + reply.completion_tokens, "model": name, "identity": model.name,
                    "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}

        replies = list(await asyncio.gather(draw(0, 0), draw(1, 0)))
        for attempt in (1, 2, 3):
            for side in (0, 1):
                if not replies[side]["text"] or (side and replies[0]["text"] == replies[1]["text"]):
                    replies[side] = await draw(side, attempt)
        return replies

    def state(self, name: str) -> JSONResponse:
        """What the annotator sees; never whose a reply is."""
        person, config = self.person(name), self.config
        left = [i for i in self.shared if i not in person.shared]
        due = len(person.shared) * config.shared_every <= person.rated
        if left and due and person.item is None and not person.messages:
            self.show_shared(name, left[0])
            person = self.person(name)
        if len(self.votes.shared_ratings) != self.agreement[0]:
            self.agreement = len(self.votes.shared_ratings), agreement(self.votes.shared_ratings)
        item, messages = None, person.messages
        if person.item:
            replies, messages = person.item["replies"], person.item["messages"]
            item = {"id": person.item["id"], "shared": bool(person.item["shared"]),
                    "same": replies[0]["text"] == replies[1]["text"],
                    "replies": [{"text": r["text"], "cut": not r["finished"]} for r in replies]}
        return JSONResponse({
            "annotator": name, "scale": config.scale, "dialogue": person.dialogue, "turn": person.turn,
            "turns": config.turns, "tokens": person.tokens, "budget": self.tokens, "messages": messages, "item": item,
            "opening": None if messages else self.opening(name, person),
            "categories": self.categories, "rated": person.rated + len(person.shared), "agreement": self.agreement[1],
            "guidelines": Path(config.guidelines or GUIDELINES).read_text("utf-8", "replace")})

    def show_shared(self, name: str, shared: str) -> None:
        """A shared item too comes in random order, another for each annotator."""
        given, item = self.shared[shared], f"{name}/shared/{shared}"
        replies = [whole_reply(*reply) for reply in zip(given["replies"], given["models"], strict=True)]
        self.votes.write({"event": "item", "id": item, "annotator": name, "dialogue": f"shared:{shared}", "turn": 1,
                          "shared": shared, "category": given.get("category", "none"), "messages": given["prompt"],
                          "replies": random.Random(item).sample(replies, 2), "at": time.time()})

    def free_opening(self, name: str, rates: bool) -> int:
        """A prompt that nobody who rates has taken: the first, for newcomers any; -1 if there is none."""
        taken, count = self.votes.openings, len(self.openings)
        while self.undealt < count and self.undealt in taken:
            self.undealt += 1
        if self.undealt == count or rates:
            return self.undealt if self.undealt < count else -1
        start = random.Random(name).randrange(self.undealt, count)
        return next(i for i in chain(range(start, count), range(self.undealt, start)) if i not in taken)

    def opening(self, name: str, person: Person) -> dict:
        """How a dialogue may begin: a prompt nobody else has, or a kind of task, in the shares the talk asks for.

        It is kept for those who rate. A name that has only been typed is shown one, and takes none.
        """
        dialogue = f"{name}/{person.dialogue}"
        number = self.dealt.get(dialogue, self.free_opening(name, person.rates))
        if person.rates and number >= 0:
            self.dealt[dialogue] = number
            self.votes.openings.add(number)
        if number < 0:
            (task,) = random.Random(dialogue).choices(list(PREFERENCE), list(PREFERENCE.values()))
            return {"text": "", "category": task}
        opening = self.openings[number]
        return {"text": opening["prompt"][-1]["content"], "category": opening.get("category", "none")}


def whole_reply(text: str, model: str) -> dict:
    """A reply of an item that no model of the page wrote: a shared one's, or a simulated round's."""
    return {"text": text, "finished": True, "model": model}


def main(config: Config) -> None:
    listener = serving.listen(config.host, config.port)
    runtime.setup(config.device, 0, config.threads)
    server = Server(config)
    place = f"{serving.address(listener, config.host)}/{'#token=...' if config.token else ''}"
    print(f"{config.out}: {server.votes}\nrating page on {place} (Ctrl-C stops)", flush=True)
    serving.serve(server.app(), listener)
    print(f"{config.out}: {server.votes}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
