"""A server that speaks OpenAI's chat completions, as it is: what it refuses, how it streams, thinks and fails.

data/llm.py opens it, keeps what it said, and pays for it.
"""
import email.utils
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from math import inf
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import openai  # takes a second: data/llm.py imports this module only when it is needed
from tqdm import tqdm

from data.llm import Reply, Request, Sampling, most_prompt_tokens, request_key
from runtime import fail

# How servers say that they do not know a parameter, or want its default; and that they do not know the model.
REFUSES = re.compile(r"unsupported|not support|only the default|extra[ _]|not permitted|not allowed|unrecognized|"
                     r"unknown|unexpected|deprecated|cannot both|not available|not accept|must be (?:set to )?true|"
                     r"only .{0,20}stream|enable", re.IGNORECASE)
NO_MODEL = re.compile(r"model.{0,80}(?:not exist|not found|not available)|model_not_found|"
                      r"(?:unknown|invalid|no such|not a valid) model", re.IGNORECASE | re.DOTALL)
OPTIONAL = ("temperature", "top_p", "seed", "top_k", "stream_options")


class NoLogprobs(Exception):
    """The log-probabilities that were asked for did not come."""


class Endpoint:
    """A server that speaks OpenAI's chat completions, asked by `threads` at a time.

    The first request goes alone: what the server refuses, and all others would be refused for, is left out or ends the
    run before it is paid for. What was left out is in `adapted`, and said; what changes replies also in Reply.served.
    """

    def __init__(self, url: str, model: str = "", threads: int = 8, timeout_s: float = 300.0, tries: int = 8,
                 wait_s: float = 1.0):
        self.url = url.rstrip("/")
        self.threads, self.tries, self.wait_s = threads, tries, wait_s
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        key = os.environ.get("OPENAI_API_KEY") or ("none" if local else "")
        if not key:
            fail(f"{url}: needs a key: set the environment variable OPENAI_API_KEY")
        # No retries by the client: ours are shown, and charged to the budget.
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=0)
        self.lost: list[tuple[int, int]] = []  # most prompt and reply tokens of attempts that may be billed in vain
        self.adapted: list[str] = []           # parameters the server refused
        self.served: set[str] = set()          # what the server said that it is
        self.known = False                     # whether it has answered
        self.noticed = -inf                    # when the user was last told of a retry
        self.model = model or self._only_model()
        self.name = f"{self.url}#{self.model}"

    def _only_model(self) -> str:
        try:
            names = [m.id for m in self.client.models.list()]
        except openai.OpenAIError as error:
            fail(f"{self.url}: does not list its models ({error}): start it, or name one, as in {self.url}#name")
        if len(names) != 1:
            fail(f"{self.url}: has {len(names)} models: name one, as in {self.url}#{min(names, default='name')}")
        return names[0]

    def replies(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Reply | str]]:
        """Replies in the order they come. An error that no retry can mend ends the run, after the replies under way."""
        stopping, hopeless, waiting = threading.Event(), [], list(enumerate(requests))
        pool = ThreadPoolExecutor(self.threads)
        try:
            while waiting and not stopping.is_set():
                many = len(waiting) if self.known else 1
                batch, waiting = waiting[:many], waiting[many:]
                futures = {pool.submit(self._reply, request, sampling, stopping, hopeless): i for i, request in batch}
                for future in as_completed(futures):
                    if future.result() is not None:
                        yield futures[future], future.result()
        finally:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if hopeless:
            fail(f"{self.url}: {hopeless[0]}; what was answered is kept")

    def _reply(self, request: Request, sampling: Sampling, stopping: threading.Event,
               hopeless: list[str]) -> Reply | str | None:
        """One reply, after as many tries as it takes, or why there is none; None once the run is stopping."""
        reason, wait = "", self.wait_s
        for attempt in range(self.tries):
            if stopping.is_set():
                return None
            began = time.perf_counter()
            pause = wait * random.uniform(0.5, 1.5)  # threads that failed together do not try again together
            try:
                reply = self._read(self._create(request, sampling), request, sampling, time.perf_counter() - began)
                self.known = True
                return reply
            except Exception as error:
                fault = self._fault(error, attempt, time.perf_counter() - began)
            reason, pause = fault.reason, max(pause, fault.pause)
            if fault.billed:
                self.lost.append((most_prompt_tokens(request), sampling.max_tokens))
            if fault.remedy:
                hopeless.append(f"{reason}: {fault.remedy}")
                stopping.set()
            elif not fault.again:
                return reason
            if attempt + 1 < self.tries and not stopping.is_set():
                if time.monotonic() > self.noticed + 30:  # all threads that wait would say the same
                    self.noticed = time.monotonic()
                    tqdm.write(f"{self.url}: {reason}: trying again in {pause:.0f} s", file=sys.stderr)
                stopping.wait(pause)
                wait = min(2 * wait, 60.0)
        self.known = True  # it is there, and busy: others may fare better
        return None if stopping.is_set() else f"{reason}, after {self.tries} tries"

    def _fault(self, error: Exception, attempt: int, seconds: float) -> "Fault":
        """What to make of an attempt that failed."""
        vain = not self.known and attempt == 2  # each may have been paid for, and none has succeeded
        if isinstance(error, openai.APITimeoutError):
            return Fault(f"no answer within {seconds:.0f} s", remedy="allow more seconds: timeout_s" if vain else "")
        if isinstance(error, openai.APIConnectionError):
            refused = type(error.__cause__).__name__ == "ConnectError"
            ends = vain or (refused and (attempt + 1 == self.tries or not self.known))
            return Fault(f"no connection ({error.__cause__ or error})", billed=not refused,
                         remedy="start the server, or check the address" if ends else "")
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error)
        if isinstance(error, NoLogprobs):
            return Fault("gives no log-probabilities of a reply's first token", again=False,
                         remedy="" if self.known else "ask in another form than label, such as pair")
        if isinstance(error, openai.APIError | ValueError | AttributeError | TypeError | IndexError):
            return Fault(f"the reply is not a chat completion ({error})",
                         remedy="check the address, which usually ends with /v1" if vain else "")
        raise error

    def _refusal(self, error) -> "Fault":
        said = error.body.get("message") if isinstance(error.body, dict) else None
        reason, status, remedy = f"{error.status_code}: {said or error.message}", error.status_code, ""
        whole = f"{error.code} {error.message} {error.body}"
        if status in (401, 403) or error.code == "insufficient_quota":
            remedy = f"set OPENAI_API_KEY to a key that may use {self.model}"
        elif status in (400, 422) and "logprobs" in whole:
            remedy = "ask in another form than label, such as pair"
        elif status == 404 or (status in (400, 422) and NO_MODEL.search(whole)):
            remedy = "check the address, which usually ends with /v1, and the model's name"
        elif status in (400, 422) and error.param in OPTIONAL:
            remedy = f"choose another {error.param}"
        return Fault(reason, billed=False, again=status in (408, 409, 429) or status >= 500, remedy=remedy,
                     pause=retry_after(error.response.headers.get("retry-after", "")))

    def _create(self, request: Request, sampling: Sampling):
        limit = "max_completion_tokens" if "max_tokens" in self.adapted else "max_tokens"
        streams, seed = "stream" in self.adapted, int(request_key(self.name, request, sampling), 16) % 2**31
        options = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, limit: sampling.max_tokens,
            "seed": seed if sampling.temperature > 0 else None,  # if it is honoured, repeats differ and reruns do not
            "top_k": sampling.top_k or None, "stop": list(sampling.stop) or None,
            "logprobs": True if request.labels else None, "top_logprobs": 20 if request.labels else None,
            "stream": streams or None, "stream_options": {"include_usage": True} if streams else None}
        options = {name: value for name, value in options.items()
                   if value is not None and (name not in self.adapted or name == "stream")}
        extra = {"top_k": options.pop("top_k")} if "top_k" in options else None
        try:
            reply = self.client.chat.completions.create(model=self.model, messages=request.messages, extra_body=extra,
                                                        **options)
            if isinstance(reply, str) and reply.lstrip().startswith("data:"):  # it streams, asked or not
                self.lost.append((most_prompt_tokens(request), sampling.max_tokens))
                return self._without("stream", request, sampling)
            return gather(reply) if streams else reply
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            refused = self._refused(error, {"stream": False} | options | (extra or {}))
            if not refused or refused in self.adapted:
                raise
            return self._without(refused, request, sampling)

    def _without(self, parameter: str, request: Request, sampling: Sampling):
        """The request again, after the server has refused a parameter."""
        self.adapted.append(parameter)
        said = {"max_tokens": "max_completion_tokens is sent for it", "stream": "it is asked for a stream"}
        tqdm.write(f"{self.name}: refuses {parameter}: {said.get(parameter, 'it is left out')}", file=sys.stderr)
        return self._create(request, sampling)

    def _refused(self, error, sent: dict) -> str:
        """The parameter that an error refuses and the request can do without: by itself, or by its usual value."""
        said = f"{error.code} {error.message} {error.body}"
        whole = REFUSES.search(said)
        # OpenAI's newer models.
        if "max_tokens" in sent and ("max_completion_tokens" in said or (whole and error.param == "max_tokens")):
            return "max_tokens"
        usual = {"temperature": 0, "top_p": 1, "seed": sent.get("seed"), "stream_options": sent.get("stream_options")}
        named = [name for name in (*OPTIONAL, "stream") if name in sent
                 and re.search(rf"\b{name}\b", f"{error.param} {said}")
                 and (whole or (name in usual and sent[name] == usual[name]))]
        return named[0] if named and error.param in (*named, None, "") else ""

    def _read(self, completion, request: Request, sampling: Sampling, seconds: float) -> Reply:
        choice, usage = completion.choices[0], completion.usage
        text, thoughts = said_and_thought(choice.message)
        # A server that does not count is charged for as many as there may have been.
        prompt_tokens = usage.prompt_tokens if usage else most_prompt_tokens(request)
        reply_tokens = usage.completion_tokens if usage else sampling.max_tokens
        labels = label_logprobs(choice, request.labels)
        without = [f"(without {name})" for name in ("temperature", "top_p", "top_k") if name in self.adapted]
        served = " ".join(filter(None, (completion.model, getattr(completion, "system_fingerprint", None), *without)))
        finished = choice.finish_reason not in ("length", "max_tokens", "content_filter")
        return Reply(text, finished, prompt_tokens, reply_tokens, seconds, labels, thoughts, served)


class Fault(NamedTuple):
    """Why an attempt failed, and what that means."""

    reason: str
    billed: bool = True
    again: bool = True   # another try may help
    remedy: str = ""     # no request can succeed before the user does this
    pause: float = 0.0   # seconds that the server asks for


def said_and_thought(message) -> tuple[str, str]:
    """A reply's text and its thoughts, which servers give in fields of several names, or as parts of the content."""
    text = message.content or getattr(message, "refusal", None) or ""
    thoughts = [getattr(message, name, None) for name in ("reasoning_content", "reasoning", "thinking")]
    if isinstance(text, list):
        thought = [part for part in text if part.get("type") in ("thinking", "reasoning") or "thinking" in part]
        thoughts += [json.dumps([part.get("thinking", part.get("text")) for part in thought])] if thought else []
        text = "".join(part.get("text", "") for part in text if part not in thought)
    return text, next((thought for thought in thoughts if isinstance(thought, str) and thought), "")


def gather(chunks) -> SimpleNamespace:
    """A reply that came as a stream, as one that came whole."""
    text, thoughts, tokens, reason, last, usage = "", "", [], None, None, None
    for last in chunks:
        usage = last.usage or usage
        for choice in last.choices[:1]:
            said, thought = said_and_thought(choice.delta)
            text, thoughts, reason = text + said, thoughts + thought, choice.finish_reason or reason
            tokens += choice.logprobs.content or [] if choice.logprobs else []
    if last is None:
        raise ValueError("an empty stream")
    choice = SimpleNamespace(message=SimpleNamespace(content=text, reasoning=thoughts), finish_reason=reason,
                             logprobs=SimpleNamespace(content=tokens))
    return SimpleNamespace(choices=[choice], usage=usage, model=last.model,
                           system_fingerprint=getattr(last, "system_fingerprint", None))


def label_logprobs(choice, labels: tuple[str, ...]) -> dict[str, float]:
    """Log-probability that the reply begins with each label: the sum over the likeliest tokens that begin it."""
    found: dict[str, float] = {}
    if not labels:
        return found
    if not (choice.logprobs and choice.logprobs.content and choice.logprobs.content[0].top_logprobs):
        raise NoLogprobs
    for token in choice.logprobs.content[0].top_logprobs:
        start = token.token.strip()
        begun = [label for label in labels if start and label.startswith(start)]
        if len(begun) > 1:
            raise ValueError(f"token {token.token!r} begins labels {' and '.join(begun)}: choose other words")
        for label in begun:
            found[label] = float(np.logaddexp(found.get(label, -inf), token.logprob))
    return found


def retry_after(header: str) -> float:
    """Seconds that a Retry-After header asks for, a number or a date; from none to ten minutes."""
    for parse in (float, lambda date: email.utils.parsedate_to_datetime(date).timestamp() - time.time()):
        with suppress(ValueError):
            return min(max(parse(header), 0.0), 600.0)
    return 0.0
