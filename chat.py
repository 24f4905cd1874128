"""Talk to a checkpoint in the terminal, or serve it to whatever speaks OpenAI's chat completions.

    python chat.py model=runs/tiny/0/dpo/model                          /help lists the commands
    python chat.py --serve model=runs/tiny/0/dpo/model port=8000        http://127.0.0.1:8000/v1
    DEFAULT_MODEL_METADATA='{"capabilities": {"builtin_tools": false}}' open-webui serve    would send tools otherwise

The server decodes all requests together, one token each a step (continuous batching, Yu et al. 2022, "Orca"): a
request joins when a slot is free, and leaves when it ends, meets a stop string, or its client goes away. A reply
with a seed draws from a random stream of its own, whatever else is decoded beside it.
"""
import asyncio
import io
import json
import secrets
import socket
import sys
import time
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple, NoReturn

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import runtime
from checkpoints import read_config
from data.llm import Checkpoint, Sampling, before_stop, slots_that_fit
from data.tokenizer import TemplateError
from model import Decoder, ReplyState
from runtime import check_ranges, fail, serving
from runtime.json_files import SWITCH, TABLE, Kind, number, whole
from runtime.terminal import visible


@dataclass(frozen=True)
class Config:
    model: str = "runs/tiny/0/dpo/model"  # Hugging Face directory
    template: str = ""               # chat template; "": the checkpoint's own, or zephyr
    system: str = ""                 # system message, in the terminal
    temperature: float = 0.7         # 0: greedy; a request to the server may change this and the next three
    top_p: float = 1.0               # 1: all
    top_k: int = 0                   # 0: all
    max_tokens: int = 256            # of a reply
    seed: int = 0                    # of the replies in the terminal
    length: int = 0                  # most tokens of a dialogue; 0: the model's positions, but at most 4,096
    device: str = "auto"             # cpu, cuda, auto
    threads: int = 0                 # CPU threads; 0: PyTorch's choice

    serve: bool = False              # --serve is short for it
    host: str = "127.0.0.1"          # where to listen; any other than this machine's own needs a token
    port: int = 8000                 # 0: any that is free
    token: str = ""                  # what clients have to send as their API key; "": nothing
    name: str = ""                   # what clients call the model; "": a hash of its files, which tells models apart
    slots: int = 32                  # replies decoded together; fewer where memory is short

    def __post_init__(self):
        self.sampling()  # checks these
        check_ranges(self, seed=(0, inf), length=(0, inf), threads=(0, inf), port=(0, 65535), slots=(1, 1024))
        if self.serve and not self.token and self.host not in serving.LOOPBACK:
            fail(f"host is '{self.host}', which others can reach: set token= to what they must send, or leave host out")

    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.top_k)


class Spoken:
    """What a sequence has said, in pieces that later tokens will not change, up to a stop string."""

    def __init__(self, tokenizer, sequence: ReplyState, stops: tuple[str, ...] = ()):
        self.tokenizer, self.sequence, self.stops = tokenizer, sequence, stops
        self.text, self.tokens = "", 0     # given out so far, and the tokens it took
        self.finish = ""                   # "stop" or "length" once it is over

    def read(self) -> str:
        """The next piece, perhaps nothing."""
        s, done = self.sequence, self.sequence.done  # done first: tokens read after it are all there will be
        before, self.tokens = self.tokens, len(s.tokens)
        whole, stopped = self.until(self.tokens)
        if stopped:  # which token ended it, however many were read at once
            self.tokens = next(k for k in range(before + 1, self.tokens + 1) if self.until(k)[1])
            s.done = True
        if stopped or done:
            self.finish = "stop" if stopped or s.finished else "length"
        else:  # half a character, or what may become a stop string, is held back
            whole = whole.rstrip("\ufffd")
            held = max((k for stop in self.stops for k in range(1, len(stop)) if whole.endswith(stop[:k])), default=0)
            whole = whole[: len(whole) - held]
        piece, self.text = whole[len(self.text):], whole
        return piece

    def until(self, tokens: int) -> tuple[str, bool]:
        return before_stop(self.tokenizer.decode(self.sequence.tokens[:tokens]), self.stops)


# ------------------------------------------------------------------------------------ the terminal

HELP = """/reset                  forget the dialogue
/system TEXT            begin it with this; without TEXT: with nothing
/set KEY VALUE          temperature, top_p, top_k, max_tokens or seed; without: show them
/quit                   leave, as does Ctrl-D; Ctrl-C cuts a reply short"""
SETTINGS = ("temperature", "top_p", "top_k", "max_tokens", "seed")


def command(line: str, config: Config, history: list[dict]) -> Config:
    """Do what a line with a slash says: to the history, in place, or to the settings, which are returned."""
    word, _, rest = line.partition(" ")
    key, _, value = rest.strip().replace("=", " ").partition(" ")
    if word in ("/reset", "/system"):
        history.clear()
        return replace(config, system=rest.strip()) if word == "/system" else config
    if word != "/set":
        print(HELP)
    elif not key:
        print(", ".join(f"{key} {getattr(config, key)}" for key in SETTINGS))
    elif key not in SETTINGS:
        print(f"'{key}' is not a setting, expected one of {', '.join(SETTINGS)}")
    else:
        try:
            return replace(config, **{key: type(getattr(config, key))(value)})
        except ValueError:
            print(f"{key} is '{value.strip()}', expected a number such as {getattr(config, key)}")
        except SystemExit:
            pass  # out of range: the check has said so
    return config


def converse(checkpoint: Checkpoint, config: Config, length: int) -> None:
    """Read a line, print a reply as it comes, until the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  makes arrow keys work at the prompt
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line in another encoding is refused, below
    history, turn = [], 0
    decoder = Decoder(checkpoint.model, checkpoint.tokenizer.stop_ids(), 1, length)
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if line == "/quit":
            return None
        if line.startswith("/"):
            config = command(line, config, history)
            continue
        if not line:
            continue
        try:
            line.encode()
        except UnicodeEncodeError:
            print(f"that line is not {sys.stdin.encoding} text: it was not sent")
            continue
        history.append({"role": "user", "content": line})
        try:
            prompt = fitting(checkpoint.tokenizer, history, config, length)
        except TemplateError as error:
            print(error)
            history.pop()
            continue
        if prompt is None:
            print(f"that is too long: it leaves no room for a reply in {length} tokens")
            history.pop()
            continue
        turn += 1
        new, settings = min(config.max_tokens, length - len(prompt)), config.sampling().settings
        text = speak(decoder, checkpoint.tokenizer, ReplyState(prompt, new, settings, [config.seed, turn]))
        history.append({"role": "assistant", "content": text})


def speak(decoder: Decoder, tokenizer, sequence: ReplyState) -> str:
    """Print a reply as it is decoded; " ..." where it was cut, by Ctrl-C or by its length."""
    spoken = Spoken(tokenizer, sequence)
    decoder.waiting.append(sequence)
    try:
        while decoder.step():
            print(visible(spoken.read()), end="", flush=True)
    except KeyboardInterrupt:
        sequence.done = True
        decoder.step()  # frees its slot
    cut = " ... (the logits are not finite)" if sequence.not_finite else " ..."
    print("" if spoken.finish == "stop" else cut)
    return spoken.text


def fitting(tokenizer, history: list[dict], config: Config, length: int) -> list[int] | None:
    """The dialogue as a prompt that leaves room for a reply, without its oldest rounds if need be, which the user is
    told. None: the last turn alone is too long."""
    system = [{"role": "system", "content": config.system}] if config.system else []
    for dropped in range(0, len(history), 2):
        prompt = tokenizer.render(system + history[dropped:], add_generation_prompt=True)[0]
        if len(prompt) + min(config.max_tokens, length // 4) <= length:
            if dropped:
                print(f"(the first {dropped // 2} rounds no longer fit in {length} tokens and are forgotten)")
                del history[:dropped]
            return prompt
    return None


# --------------------------------------------------------------------------------------- a request

class Refusal(Exception):
    """An answer in the shape of OpenAI's errors."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        self.status, kind = status, kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Asked(NamedTuple):
    """A chat completion as asked for."""

    messages: list[dict]
    sampling: Sampling
    n: int
    seed: int
    top: int                # likeliest tokens wanted for each; -1: no log-probabilities
    stream: bool
    usage: bool             # in the stream's last chunk
    max_tokens: int | None  # None: what fits


MOST_MESSAGES, MOST_WAITING = 512, 1024
KINDS = {"temperature": number(0, 2), "top_p": number(0, 1), "top_k": whole(-1, 2**24), "max_tokens": whole(1, 2**24),
         "max_completion_tokens": whole(1, 2**24), "seed": whole(-(2**63), 2**64), "top_logprobs": whole(0, 20),
         "stream": SWITCH, "logprobs": SWITCH, "stream_options": TABLE,
         "stop": Kind(lambda x: isinstance(x, str) or isinstance(x, list) and len(x) <= 4
                      and all(isinstance(text, str) and text for text in x), "a text, or at most 4")}
WITHOUT_EFFECT = ("user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key",
                  "prompt_cache_retention", "cache_prompt", "parallel_tool_calls")
KNOWN = {"model", "messages", "n", *KINDS, *WITHOUT_EFFECT}
# Of keys that are not supported, the values that leave a reply as it is: by key, or of all others
NOTHING = (False, 0, "", [], {})
NEUTRAL = {
    **dict.fromkeys(("repetition_penalty", "repeat_penalty", "length_penalty", "typical_p", "best_of"), (1,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "modalities": (["text"],), "response_format": ({"type": "text"},)}


def parse(body, name: str, defaults: Sampling, slots: int) -> Asked:
    """The JSON of a request as a checked Asked, or a Refusal that names the key."""
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object, expected {\"model\": ..., \"messages\": [...]}")
    body = {key: value for key, value in body.items() if value is not None}
    for key, value in body.items():
        if key not in KNOWN and value not in NEUTRAL.get(key, NOTHING):
            raise Refusal(400, f"'{key}' is not supported: leave it out", key, "unsupported_parameter")
    if body.get("model") != name:
        asked = json.dumps(body.get("model"))
        raise Refusal(404, f"the model {asked} does not exist, expected \"{name}\"", "model", "model_not_found")
    for key, kind in (KINDS | {"n": whole(1, slots)}).items():
        if key in body and not kind.fits(body[key]):
            shown = json.dumps(body[key])[:100]
            raise Refusal(400, f"'{key}' is {shown}, expected {kind.expected}", key, "invalid_value")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise Refusal(400, "'top_logprobs' is set, expected logprobs=true with it", "top_logprobs", "invalid_value")
    stop, longest = body.get("stop") or [], body.get("max_completion_tokens") or body.get("max_tokens")
    top = body.get("top_logprobs", 0) if body.get("logprobs") else -1
    sampling = Sampling(longest or defaults.max_tokens, body.get("temperature", defaults.temperature),
                        body.get("top_p", defaults.top_p), max(0, body.get("top_k", defaults.top_k)),
                        (stop,) if isinstance(stop, str) else tuple(stop))
    return Asked(checked_messages(body.get("messages")), sampling, body.get("n", 1),
                 body.get("seed", secrets.randbits(63)) % 2**64, top, bool(body.get("stream")),
                 bool(body.get("stream_options", {}).get("include_usage")), longest)


def checked_messages(messages) -> list[dict]:
    """[{"role", "content"}], each content one text, the last the user's."""
    def refuse(message: str, param: str = "messages") -> NoReturn:
        raise Refusal(400, message, param, "invalid_value")

    if not isinstance(messages, list) or not 1 <= len(messages) <= MOST_MESSAGES:
        refuse(f"'messages' is not a list of 1 to {MOST_MESSAGES}")
    checked = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            refuse(f"'{where}.role' is {json.dumps(role)}, expected system, user or assistant", f"{where}.role")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            refuse(f"'{where}.content' is not text", f"{where}.content")
        for key in message.keys() - {"role", "content", "name", "reasoning_content"}:  # which no template is shown
            if message[key] not in (None, *NOTHING):
                refuse(f"'{where}.{key}' is not supported: leave it out", f"{where}.{key}")
        checked.append({"role": role, "content": content})
    if role != "user":
        refuse(f"the last message is the {role}'s, expected the user's")
    return checked


# -------------------------------------------------------------------------------------- the server

class Engine:
    """Steps the decoder in a thread of its own while there is something to decode, and wakes those who wait for it."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.thread, self.broken = decoder, ThreadPoolExecutor(1, "decoder"), ""
        self.arrived: list[ReplyState] = []
        self.listeners: dict[ReplyState, tuple[asyncio.Event, bool]] = {}
        self.running: asyncio.Task | None = None

    def submit(self, sequences: list[ReplyState], news: asyncio.Event, every_token: bool) -> None:
        """`news` is set when one of them ends, or has a token more."""
        self.arrived += sequences
        self.listeners |= dict.fromkeys(sequences, (news, every_token))
        if self.running is None or self.running.done():
            self.running = asyncio.create_task(self.run())

    async def run(self) -> None:
        stepped: list[ReplyState] = []
        try:
            while stepped or self.arrived:
                self.decoder.waiting.extend(self.arrived)  # between two steps: the thread is idle
                self.arrived.clear()
                stepped = await asyncio.get_running_loop().run_in_executor(self.thread, self.decoder.step)
                for s in self.listeners.keys() & stepped:
                    news, every_token = self.listeners[s]
                    if every_token or s.done:
                        news.set()
        except Exception as error:  # a bug, or no memory left: nobody must wait for ever
            traceback.print_exc()
            self.broken = f"the model stopped working ({error}): start the server again"
            for news, _ in self.listeners.values():
                news.set()

    def leave(self, sequences: list[ReplyState]) -> None:
        """Their client has its reply, or has gone away: the decoder drops what is not done."""
        for s in sequences:
            s.done = True
            del self.listeners[s]


class Server:
    """The routes, over one engine."""

    def __init__(self, checkpoint: Checkpoint, config: Config, length: int):
        self.tokenizer, self.config, self.length = checkpoint.tokenizer, config, length
        self.name, self.identity = config.name or checkpoint.name, checkpoint.name
        self.slots = min(config.slots, slots_that_fit(checkpoint.model, length))
        self.engine = Engine(Decoder(checkpoint.model, self.tokenizer.stop_ids(), self.slots, length))
        self.newline = self.tokenizer.encode("\n")

    def app(self) -> Starlette:
        def refused(request: Request, error: Refusal | HTTPException) -> Response:
            if isinstance(error, HTTPException):
                error = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
            return JSONResponse(error.body, error.status)

        return Starlette(
            routes=[Route("/v1/models", self.models), Route("/v1/models/{name:path}", self.models),
                    Route("/v1/chat/completions", self.complete, methods=["POST"])],
            exception_handlers={Refusal: refused, HTTPException: refused})

    def admit(self, request: Request) -> None:
        if self.config.token and not serving.knows_token(request.headers, self.config.token):
            raise Refusal(401, "the API key is not the token this server was started with", None, "invalid_api_key")
        if not self.config.token:
            serving.check_host(request.headers)
        if self.engine.broken:
            raise Refusal(500, self.engine.broken)

    async def models(self, request: Request) -> Response:
        self.admit(request)
        wanted = request.path_params.get("name")
        if wanted not in (None, self.name):
            expected = f"the model '{wanted}' does not exist, expected '{self.name}'"
            raise Refusal(404, expected, "model", "model_not_found")
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "chat.py"}
        return JSONResponse(model if wanted else {"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        self.admit(request)
        body = await serving.read_body(request, 65536 + 32 * self.length)
        asked = parse(body, self.name, self.config.sampling(), self.slots)
        try:
            prompt = self.tokenizer.render(asked.messages, add_generation_prompt=True)[0]
        except TemplateError as error:
            raise Refusal(400, str(error), "messages") from None
        room, wanted = self.length - len(prompt), asked.max_tokens or 1
        if wanted > room:
            raise Refusal(400, f"the prompt has {len(prompt)} tokens and the reply may have {wanted}, {self.length} is "
                               "the most together: shorten the messages or lower max_tokens", "messages",
                          "context_length_exceeded")
        if len(self.engine.decoder.waiting) + len(self.engine.arrived) > MOST_WAITING:
            raise Refusal(429, "too many requests are waiting: try again in a while", None, "rate_limit_exceeded")
        new, settings = min(asked.sampling.max_tokens, room), asked.sampling.settings
        spoken = [Spoken(self.tokenizer, ReplyState(prompt, new, settings, [asked.seed, i], top=asked.top),
                         asked.sampling.stop) for i in range(asked.n)]
        chunks = self.chunks(asked, len(prompt), spoken)
        if asked.stream:
            return StreamingResponse(as_events(chunks), media_type="text/event-stream")
        gone = asyncio.ensure_future(request.receive())  # the body has been read: next comes the client's leaving
        reply = asyncio.ensure_future(self.completion(chunks, spoken))
        await asyncio.wait([gone, reply], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not reply.done():
            reply.cancel()
            return Response(status_code=499)  # which nobody reads
        return JSONResponse(await reply)

    async def chunks(self, asked: Asked, prompt_tokens: int, spoken: list[Spoken]) -> AsyncIterator[dict]:
        """A reply as OpenAI streams it. Left early, it gives its slots back."""
        base = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion.chunk",
                "created": int(time.time()), "model": self.name, "system_fingerprint": self.identity}

        def chunk(index: int, delta: dict, finish: str | None = None, logprobs: dict | None = None) -> dict:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return base | {"choices": [choice]}

        news, sent, sequences = asyncio.Event(), [0] * asked.n, [reply.sequence for reply in spoken]
        self.engine.submit(sequences, news, asked.stream or bool(asked.sampling.stop))
        try:
            for i in range(asked.n):
                yield chunk(i, {"role": "assistant", "content": ""})
            while not all(reply.finish for reply in spoken):
                if self.engine.broken:
                    raise Refusal(500, self.engine.broken)
                await news.wait()
                news.clear()
                if any(s.not_finite for s in sequences):
                    raise Refusal(422, "the model's logits are not finite after these messages: change them",
                                  "messages", "logits_not_finite")
                for i, reply in enumerate(spoken):
                    if reply.finish:
                        continue
                    piece = reply.read()
                    if piece or reply.finish:
                        logprobs = self.logprobs(reply, sent[i])
                        sent[i] = reply.tokens
                        yield chunk(i, {"content": piece} if piece else {}, reply.finish or None, logprobs)
            if asked.usage or not asked.stream:
                said = sum(reply.tokens for reply in spoken)
                usage = {"prompt_tokens": prompt_tokens, "completion_tokens": said,
                         "total_tokens": prompt_tokens + said}
                yield base | {"choices": [], "usage": usage}
        finally:
            self.engine.leave(sequences)

    async def completion(self, chunks: AsyncIterator[dict], spoken: list[Spoken]) -> dict:
        """All that is streamed as one completion; the last chunk holds the usage."""
        *_, last = [chunk async for chunk in chunks]
        choices = [{"index": i, "message": {"role": "assistant", "content": reply.text, "refusal": None},
                    "logprobs": self.logprobs(reply, 0), "finish_reason": reply.finish}
                   for i, reply in enumerate(spoken)]
        return last | {"object": "chat.completion", "choices": choices}

    def logprobs(self, reply: Spoken, first: int) -> dict | None:
        """OpenAI's form of the tokens from `first` on: log-probabilities at temperature 1, the likeliest instead."""
        def entry(token: int, logprob: float) -> dict:
            text = self.tokenizer.decode([*self.newline, token])[1:]  # after another, so that a leading blank stays
            code = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": code}

        if reply.sequence.top < 0:
            return None
        content = []
        for i in range(first, reply.tokens):
            logprob, ids, values = reply.sequence.alternatives[i]
            likeliest = [entry(token, value) for token, value in zip(ids, values, strict=True)]
            content.append(entry(reply.sequence.tokens[i], logprob) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}


async def as_events(chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    """Chunks as server-sent events."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except Refusal as refusal:
        yield f"data: {json.dumps(refusal.body)}\n\n"
    yield "data: [DONE]\n\n"


def serve(checkpoint: Checkpoint, config: Config, length: int, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    server = Server(checkpoint, config, length)
    print(f"{server.slots} replies together, {length} tokens each\nserving {server.name} on "
          f"{serving.address(listener, config.host)}/v1 (Ctrl-C stops)", flush=True)
    serving.serve(server.app(), listener)


def main(config: Config) -> None:
    listener = serving.listen(config.host, config.port) if config.serve else None
    positions = read_config(config.model).max_positions
    if config.length > positions:
        fail(f"length is {config.length}, the model has {positions} positions: lower it")
    length = config.length or min(positions, 4096)
    device = runtime.setup(config.device, config.seed, config.threads)
    checkpoint = Checkpoint(config.model, str(device), config.template)
    if listener:
        return serve(checkpoint, config, length, listener)
    print(f"{config.model}, template {checkpoint.tokenizer.template}, temperature {config.temperature}; "
          "/help lists the commands")
    return converse(checkpoint, config, length)


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__, ["serve=true" if word == "--serve" else word for word in sys.argv[1:]]))
