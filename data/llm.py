"""One way to ask a model, for data recipes and judges: a checkpoint on this machine, or an OpenAI-compatible endpoint.

    model = open_model("runs/tiny/0/dpo/model")      or "http://127.0.0.1:8000/v1#name"; the key is in OPENAI_API_KEY
    replies = ask(model, [Request([{"role": "user", "content": "Hi"}])], Sampling(), Path("ledger.jsonl"), Budget(...))

Every raw reply is appended to the ledger, a JSONL file, the moment it arrives, under a key: a hash of everything it
depends on. What the ledger holds is not asked again: a run that was killed goes on where it was, and what is made of
the replies can be made anew for nothing. A checkpoint draws each reply from a random stream of its key: the same
whatever else is asked, and in which order. Failures go to a file of their own and are asked again next time.
"""
import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from checkpoints import expect_replies, load_model, weight_files
from data.tokenizer import TemplateError, adopt_template, check_template, load_tokenizer
from model import Decoder, ReplyState, Transformer
from runtime import check_ranges, fail, file_hash, find_device, lock_file, open_folder


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn."""

    max_tokens: int = 512            # of a reply
    temperature: float = 1.0         # 0: greedy
    top_p: float = 1.0               # 1: all
    top_k: int = 0                   # 0: all
    stop: tuple[str, ...] = ()       # the reply ends before the first of these

    def __post_init__(self):
        check_ranges(self, max_tokens=(1, inf), temperature=(0, 10), top_p=(0, 1), top_k=(0, inf))
        if "" in self.stop:
            fail("stop holds an empty text, which every reply begins with: leave it out")

    @property
    def settings(self) -> tuple[float, int, float]:
        """As model.py takes them."""
        return self.temperature, self.top_k, self.top_p


class Request(NamedTuple):
    messages: list[dict]             # {"role", "content"}, the last one the user's
    repeat: int = 0                  # tells several replies to one prompt apart
    tag: str = ""                    # whatever else makes this another question
    labels: tuple[str, ...] = ()     # words whose log-probability as the reply's first token is wanted


class Reply(NamedTuple):
    text: str
    finished: bool                   # ended by itself; False: cut at max_tokens
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    labels: dict[str, float] = {}    # nats; a label outside an endpoint's 20 likeliest tokens is missing
    thoughts: str = ""               # of an endpoint that gives them beside the text
    served: str = ""                 # the model that an endpoint says it was, its fingerprint, and what it refused


def request_key(model_name: str, request: Request, sampling: Sampling) -> str:
    """Hash of everything a reply depends on, 16 hex digits."""
    settings = asdict(sampling)
    settings |= {key: float(settings[key]) for key in ("temperature", "top_p")}  # 1 is 1.0
    parts = [model_name, request.messages, settings, request.repeat, request.tag, request.labels]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# Thoughts within a text: between tags or gpt-oss's channels, or before an end whose beginning stood in the prompt.
BEGIN = (r"<(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[THINK\]|◁think▷|<\|channel\|>analysis<\|message\|>|"
         r"<\|(?:begin_of_thought|START_THINKING)\|>")
END = (r"</(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>|"
       r"<\|(?:end_of_thought|END_THINKING)\|>")
THOUGHT, OPEN_THOUGHT, UNOPENED = (re.compile(pattern, re.DOTALL | re.IGNORECASE) for pattern in (
    rf"(?:{BEGIN}).*?(?:{END})", rf"(?:{BEGIN}).*", rf"\A.*(?:{END})"))


def split_thoughts(text: str) -> tuple[str, str, bool]:
    """What a reply says, what it thought before, and whether the thoughts came to an end."""
    said, thoughts, ended = text, "", True
    for pattern in (THOUGHT, UNOPENED, OPEN_THOUGHT):
        thoughts += "".join(found := pattern.findall(said))
        said = pattern.sub("", said)
        ended = not (pattern is OPEN_THOUGHT and found)
    return said.strip(), thoughts, ended


# ------------------------------------------------------------------------------- budget and ledger

@dataclass
class Budget:
    """What may be spent from now on, in tokens (prompts and replies), in money, or both; counts what was."""

    tokens: float = inf
    money: float = inf
    prompt_price: float = 0.0        # of a million tokens
    reply_price: float = 0.0
    spent_tokens: int = 0
    spent_money: float = 0.0

    def __post_init__(self):
        if self.money < inf and not (self.prompt_price or self.reply_price):
            fail("a budget in money needs prices: set prompt_price and reply_price, of a million tokens")

    def spend(self, prompt_tokens: int, reply_tokens: int) -> None:
        self.spent_tokens += prompt_tokens + reply_tokens
        self.spent_money += (prompt_tokens * self.prompt_price + reply_tokens * self.reply_price) / 1e6

    def affordable(self, requests: list[Request], sampling: Sampling) -> int:
        """How many of the first requests can all be under way without exceeding what is left."""
        then = replace(self)
        for count, request in enumerate(requests):
            then.spend(most_prompt_tokens(request), sampling.max_tokens)
            if then.spent_tokens > self.tokens or then.spent_money > self.money:
                return count
        return len(requests)

    def spent(self) -> str:
        words = [f"{self.spent_tokens:,} of {self.tokens:,.0f} tokens"] if self.tokens < inf else []
        words += [f"{self.spent_money:.4f} of {self.money:g} in money"] if self.money < inf else []
        return " and ".join(words)


def most_prompt_tokens(request: Request) -> int:
    """No tokenizer makes more tokens than bytes; a template adds its tags, and perhaps a sentence of its own."""
    return 64 + sum(16 + len(m["content"].encode(errors="replace")) for m in request.messages)


def ask(model, requests: list[Request], sampling: Sampling, ledger: Path, budget: Budget | None = None,
        progress: str = "", reasons: dict[str, str] | None = None) -> list[Reply | None]:
    """A reply to every request, None where it failed (why: `reasons`, by key). Equal ones share one."""
    for request in requests:
        if not request.messages or request.messages[-1]["role"] != "user":
            raise ValueError(f"a request ends with {request.messages[-1:]}, expected a user turn")
    keys, budget = [request_key(model.name, request, sampling) for request in requests], budget or Budget()
    open_folder(str(ledger.parent))
    failures = ledger.with_name(f"{ledger.stem}.failures.jsonl")
    with ledger.open("ab+") as stream:
        known = _read_ledger(ledger, stream, set(keys))
        todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        new, failed, waiting = {}, {} if reasons is None else reasons, list(todo)
        with tqdm(total=len(known) + len(todo), initial=len(known), desc=progress, disable=not progress, mininterval=1,
                  unit=" replies") as bar:
            for key, reply in _within_budget(model, todo, waiting, sampling, budget):
                asked = {"key": key, "model": model.name, "messages": todo[key].messages, "sampling": asdict(sampling),
                         "repeat": todo[key].repeat, "tag": todo[key].tag}
                if isinstance(reply, str):
                    failed[key] = reply
                    with failures.open("a") as reasons_file:
                        reasons_file.write(json.dumps(asked | {"error": reply}) + "\n")
                else:
                    stream.write((json.dumps(asked | reply._asdict()) + "\n").encode())
                    stream.flush()
                    new[key] = reply
                    budget.spend(reply.prompt_tokens, reply.completion_tokens)
                bar.update()
    if progress or failed:
        print(f"{progress or ledger}: {len(new):,} asked, {len(known):,} from the ledger, {len(failed):,} failed, "
              f"{sum(r.prompt_tokens for r in new.values()):,} prompt tokens, "
              f"{sum(r.completion_tokens for r in new.values()):,} reply tokens"
              + (f", cost {budget.spent_money:.4f}" if budget.spent_money else "")
              + (f"; reasons in {failures}" if failed else ""), flush=True)
    if waiting:
        fail(f"{ledger}: the budget is used up ({budget.spent()} spent, the next request might take more than is "
             f"left), {len(waiting)} requests not asked: run again with more; what was answered is kept")
    known |= new
    if served := {reply.served for reply in known.values()} - {""}:
        model.served |= served
        if len(model.served) > 1:
            print(f"{progress or ledger}: {model.name} was not one model throughout: {', '.join(sorted(model.served))}",
                  flush=True)
    return [known.get(key) for key in keys]


def _within_budget(model, todo: dict[str, Request], waiting: list[str], sampling: Sampling,
                   budget: Budget) -> Iterator[tuple[str, Reply | str]]:
    """Keys and replies as they come; what the budget may not pay for stays in `waiting`."""
    while waiting and (count := budget.affordable([todo[key] for key in waiting], sampling)):
        asked = waiting[:count]
        del waiting[:count]
        for i, reply in model.replies([todo[key] for key in asked], sampling):
            yield asked[i], reply
        lost = getattr(model, "lost", [])  # attempts that may have been billed without an answer count in full
        while lost:
            budget.spend(*lost.pop())


def _read_ledger(ledger: Path, stream, wanted: set[str]) -> dict[str, Reply]:
    """The replies it holds to the wanted keys. Locks it, and cuts off half a line that a killed run left."""
    try:
        lock_file(stream)
    except BlockingIOError:
        fail(f"{ledger}: another process is writing here, expected a ledger of its own: wait for it, or choose another")
    known, whole, begins = {}, 0, b'{"key": "'
    stream.seek(0)
    for number, line in enumerate(stream, 1):
        if not line.startswith(begins[: len(line)]):
            fail(f"{ledger} line {number}: is not a reply, expected a file that an earlier run wrote: choose another")
        if not line.endswith(b"\n"):
            break
        whole += len(line)
        key = line[len(begins) : len(begins) + 16].decode("latin-1")
        if key in wanted:
            try:
                record = json.loads(line)
                known[key] = Reply(**{field: record[field] for field in Reply._fields if field in record})
            except (ValueError, TypeError):
                fail(f"{ledger} line {number}: is damaged: delete the line, and it is asked again")
    stream.truncate(whole)
    return known


# ------------------------------------------------------------------------------------------ models

EXPECTED = "expected a model directory, or an endpoint such as http://127.0.0.1:8000/v1#name"


def open_model(where: str, device: str = "auto", template: str = "", threads: int = 8, timeout_s: float = 300.0):
    """A Checkpoint, or an Endpoint if `where` is a URL. `template`: the checkpoint's own, or zephyr."""
    if not where:
        fail(f"a model is needed and its name is empty, {EXPECTED}")
    if where.startswith(("http://", "https://")):
        from data.endpoint import Endpoint  # which needs this module

        url, _, name = where.partition("#")
        return Endpoint(url, name, threads, timeout_s)
    return Checkpoint(where, device, template)


@dataclass(frozen=True)
class Opener:
    """open_model with a run's settings, each endpoint once: what one part has found out of it, the next one knows."""

    device: str
    threads: int = 8
    timeout_s: float = 300.0
    endpoints: dict = field(default_factory=dict)

    def open(self, where: str):
        model = self.endpoints.get(where) or open_model(where, self.device, "", self.threads, self.timeout_s)
        return self.endpoints.setdefault(where, model) if "://" in where else model


class Checkpoint:
    """A model directory on this machine."""

    def __init__(self, where: str, device: str = "auto", template: str = ""):
        check_template(template)
        self.path = Path(where)
        if not (self.path / "config.json").is_file():
            fail(f"{where}: {'holds no config.json' if self.path.is_dir() else 'no such folder'}, {EXPECTED}")
        device = find_device(device)
        self.tokenizer = load_tokenizer(self.path)
        # fp32 on the CPU: in bf16 a reply would depend on which others it is computed with.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = expect_replies(load_model(self.path, dtype, device), where)
        adopt_template(self.model, self.tokenizer, template)

    @cached_property
    def name(self) -> str:
        """A hash of the files, and the template: the same wherever the directory lies."""
        names = ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files = [file for name in names if (file := self.path / name).is_file()]
        return f"{file_hash(*files, *weight_files(self.path))}-{self.tokenizer.template}"

    def replies(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Reply | str]]:
        """Replies in the order they end."""
        sequences: dict[ReplyState, int] = {}
        positions = self.model.config.max_positions
        for i, request in enumerate(requests):
            try:
                prompt = self.tokenizer.render(request.messages, add_generation_prompt=True)[0]
            except TemplateError as error:
                yield i, str(error)
                continue
            if len(prompt) >= positions:
                yield i, f"the prompt has {len(prompt)} tokens, the model {positions} positions"
                continue
            seed = [int(request_key(self.name, request, sampling), 16)]
            new = min(sampling.max_tokens, positions - len(prompt))
            sequences[ReplyState(prompt, new, sampling.settings, seed, self.label_tokens(request.labels))] = i
        if not sequences:
            return
        length = max(len(s.prompt) + s.max_tokens for s in sequences)
        slots = min(len(sequences), slots_that_fit(self.model, length))
        decoder = Decoder(self.model, self.tokenizer.stop_ids(), slots, length)
        decoder.waiting.extend(sequences)
        while stepped := decoder.step():
            for s in stepped:
                if not s.done and not sampling.stop:
                    continue
                text, stopped = before_stop(self.tokenizer.decode(s.tokens), sampling.stop)
                s.done = s.done or stopped
                if s.done:
                    # Rounded: what else is in the batch changes the sixth decimal.
                    values = [round(logprob, 4) for logprob in s.label_logprobs]
                    labels = dict(zip(requests[sequences[s]].labels, values, strict=True))
                    yield sequences[s], Reply(text, s.finished or stopped, len(s.prompt), len(s.tokens),
                                              time.perf_counter() - s.began, labels)

    def label_tokens(self, labels: tuple[str, ...]) -> list[int]:
        """The token each label begins with, where a reply begins."""
        first: dict[int, str] = {}
        for label in labels:
            dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": label}]
            ids, is_reply = self.tokenizer.render(dialogue)
            token = ids[is_reply.index(True)]
            if token in first:
                fail(f"labels '{first[token]}' and '{label}' begin with the same token of this vocabulary: "
                     "choose other words")
            first[token] = label
        return list(first)


def before_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    cut = min((at for at in map(text.find, stops) if at >= 0), default=-1)
    return (text[:cut], True) if cut >= 0 else (text, False)


def slots_that_fit(model: Transformer, length: int) -> int:
    """Sequences of `length` tokens, at most 128, whose KV cache fits in half of the GPU's free memory, or in 4 GiB."""
    c, weight = model.config, model.embed_tokens.weight
    free = torch.cuda.mem_get_info(weight.device)[0] // 2 if weight.is_cuda else 4 * 2**30
    return max(1, min(128, free // (2 * c.layers * c.kv_heads * c.head_dim * length * weight.element_size())))
