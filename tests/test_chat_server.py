"""chat.py: what the server answers to the official client, what it refuses, and the terminal."""
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from conftest import ROOT, exits
from scripted import small_checkpoint

import chat
from chat import Config, Refusal, Server, Spoken, command, converse, fitting, parse
from data.llm import Budget, Request, Sampling, ask, open_model
from runtime import serving
from runtime.terminal import visible

POSITIONS = 256  # of the fixture's model


@pytest.fixture(autouse=True)
def _one_thread(_same_everywhere):
    torch.set_num_threads(1)  # models this small only wait for a second one


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return open_model(str(checkpoint), "cpu")


@pytest.fixture(scope="module")
def start(model):
    """start(**config) -> a running Server with .url and a .client."""
    running = []

    def start(**config) -> Server:
        server = Server(model, Config(serve=True, **config), POSITIONS)
        listener = socket.create_server(("127.0.0.1", 0))
        http = serving.server(server.app())
        thread = threading.Thread(target=http.run, args=([listener],))
        thread.start()
        running.append((server, http, thread, listener))
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.client = openai.OpenAI(base_url=server.url, api_key=config.get("token", "x"), max_retries=0, timeout=20)
        return server

    yield start
    for server, http, _, _ in running:
        server.client.close()  # or the server waits a second for it
        http.should_exit = True
    for server, _, thread, listener in running:
        thread.join(10)
        server.engine.thread.shutdown()
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(start):
    return start(slots=8)


def say(server, text="Tell me about rain.", **options):
    options = {"max_tokens": 24, "seed": 1} | options
    return server.client.chat.completions.create(model=server.name, messages=[{"role": "user", "content": text}],
                                                 **options)


def texts(completion) -> list[str]:
    return [choice.message.content for choice in completion.choices]


# --------------------------------------------------------------------------------------- completions

def test_a_seed_gives_the_same_text_and_another_seed_another(server):
    first = say(server)
    assert texts(first) == texts(say(server)) != texts(say(server, seed=2))
    assert texts(say(server, seed=None)) != texts(say(server, seed=None))
    assert first.choices[0].finish_reason == "length" and first.model == server.name
    assert first.usage.completion_tokens == 24 and first.usage.total_tokens == first.usage.prompt_tokens + 24


def test_greedy_is_the_model_s_own_argmax(server, model):
    ids = model.tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)[0]
    said = []
    for _ in range(6):
        said.append(model.model(torch.tensor([ids + said]))[0, -1].argmax().item())
    assert texts(say(server, "Hi", temperature=0, max_tokens=6)) == [model.tokenizer.decode(said)]


def test_several_choices_differ_and_the_first_is_the_only_one_s(server):
    three = say(server, n=3)
    assert len(set(texts(three))) == 3 and texts(three)[0] == texts(say(server))[0]
    assert three.usage.completion_tokens == 72


def test_a_stream_adds_up_to_the_completion(server):
    whole = say(server, n=2)
    pieces, finish, usage = {0: [], 1: []}, {}, []
    for chunk in say(server, n=2, stream=True, stream_options={"include_usage": True}):
        usage += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            pieces[choice.index].append(choice.delta.content or "")
            finish[choice.index] = choice.finish_reason
    assert ["".join(pieces[i]) for i in (0, 1)] == texts(whole)
    assert min(map(len, pieces.values())) > 10  # it did come in pieces
    assert finish == {0: "length", 1: "length"} and usage == [whole.usage]


def test_replies_beside_others_are_those_alone(server):
    """More at once than there are slots, of many lengths."""
    questions = [dict(text="Tell me about " + "rain " * (i % 7), seed=i, max_tokens=5 + 3 * i, n=1 + i % 2)
                 for i in range(12)]
    alone = [texts(say(server, **q)) for q in questions]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda q: texts(say(server, **q)), questions))
    assert together == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_reply_before_it(server, stream):
    (whole,) = texts(say(server))
    stop = whole[len(whole) // 2:][:4]
    reply = say(server, stop=["not in there", stop], stream=stream,
                **({"stream_options": {"include_usage": True}} if stream else {}))
    if stream:
        chunks = list(reply)
        text, usage = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].usage
        finish = chunks[-2].choices[0].finish_reason
    else:
        (text,), usage, finish = texts(reply), reply.usage, reply.choices[0].finish_reason
    assert text == whole[:whole.index(stop)] and finish == "stop"
    assert usage.completion_tokens == say(server, stop=stop).usage.completion_tokens < 24


def test_logprobs_are_the_model_s_at_temperature_1(server, model):
    reply = say(server, temperature=0.4, max_tokens=5, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert "".join(token.token for token in content) == texts(reply)[0] and len(content) == 5
    ids = model.tokenizer.render([{"role": "user", "content": "Tell me about rain."}], add_generation_prompt=True)[0]
    for token in content:
        logprobs = torch.log_softmax(model.model(torch.tensor([ids]))[0, -1], -1)
        # A letter and its byte are spelled alike.
        spelled = [i for i in range(len(logprobs)) if model.tokenizer.decode([*server.newline, i])[1:] == token.token]
        said = min(spelled, key=lambda i: abs(logprobs[i].item() - token.logprob))
        assert token.logprob == pytest.approx(logprobs[said].item(), abs=1e-4)
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(logprobs.topk(3).values.tolist(), abs=1e-4)
        assert bytes(token.bytes).decode() == token.token
        ids.append(said)
    streamed = [choice.logprobs.content
                for chunk in say(server, temperature=0.4, max_tokens=5, logprobs=True, top_logprobs=3, stream=True)
                for choice in chunk.choices if choice.logprobs]
    assert [token.token for tokens in streamed for token in tokens] == [token.token for token in content]


def test_the_models_are_listed(server, model):
    assert [m.id for m in server.client.models.list()] == [model.name] == [server.client.models.retrieve(model.name).id]


def test_data_llm_asks_it(server, model, tmp_path):
    """The endpoint says which model it has; the budget counts its tokens; a seed makes its replies come again."""
    endpoint, budget = open_model(server.url), Budget(tokens=10_000)
    assert endpoint.name == f"{server.url}#{model.name}"
    labels = tuple(model.tokenizer.name(i).replace("▁", "") for i in (300, 301, 302))
    requests = [Request([{"role": "user", "content": f"Say {i}."}], labels=labels) for i in range(12)]
    replies = ask(endpoint, requests, Sampling(max_tokens=8), tmp_path / "l.jsonl", budget)
    assert all(r.completion_tokens <= 8 for r in replies)
    assert budget.spent_tokens == sum(r.prompt_tokens + r.completion_tokens for r in replies)
    again = ask(endpoint, requests, Sampling(max_tokens=8), tmp_path / "again.jsonl")
    assert [r.text for r in again] == [r.text for r in replies]


def test_a_label_has_the_same_log_probability_here_and_there(server, model):
    likeliest = say(server, "Hi", max_tokens=1, temperature=0, logprobs=True,
                    top_logprobs=20).choices[0].logprobs.content[0].top_logprobs
    label = next(t.token for t in likeliest if t.token.isascii() and t.token.isalpha())
    request = Request([{"role": "user", "content": "Hi"}], labels=(label,))
    (_, here), (_, there) = (next(m.replies([request], Sampling(max_tokens=1)))
                             for m in (model, open_model(server.url)))
    begins = [t for t in likeliest if t.token.strip() and label.startswith(t.token.strip())]
    if len(begins) == 1:
        assert there.labels[label] == pytest.approx(here.labels[label], abs=1e-3)
    assert there.labels[label] >= here.labels[label] - 1e-3


# ----------------------------------------------------------------------------------------- refusals

GOOD = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(("change", "param", "said"), [
    ({"temperature": 3}, "temperature", "from 0 to 2"), ({"temperature": "hot"}, "temperature", "from 0 to 2"),
    ({"temperature": True}, "temperature", "from 0 to 2"), ({"top_p": -0.1}, "top_p", "from 0 to 1"),
    ({"n": 0}, "n", "from 1 to 8"),
    ({"n": 9}, "n", "from 1 to 8"), ({"n": 1.5}, "n", "whole number"), ({"max_tokens": 0}, "max_tokens", "from 1"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "from 1"), ({"seed": "x"}, "seed", "whole number"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"), ({"stop": [""]}, "stop", "text"), ({"stop": 7}, "stop", "text"),
    ({"stream": "yes"}, "stream", "true or false"), ({"stream": 2}, "stream", "true or false"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"), ({"tools": [{}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "not supported"), ({"top_k": -2}, "top_k", "from -1 to"),
    ({"min_p": 0.1}, "min_p", "not supported"), ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "not supported"), ({"echo": True}, "echo", "not supported"),
    ({"best_of": 2}, "best_of", "not supp"),
    ({"messages": [{"role": "user", "content": "Hi", "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
    ({"temperature": float("nan")}, "temperature", "from 0 to 2"),
    ({"stream_options": 3}, "stream_options", "object"),
    ({"messages": []}, "messages", "1 to"), ({"messages": "Hi"}, "messages", "1 to"),
    ({"messages": [{}]}, "messages[0].role", "role"),
    ({"messages": GOOD["messages"] * 513}, "messages", "1 to 512"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "expected system, user or assistant"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "not text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "not text"),
    ({"messages": [*GOOD["messages"], {"role": "assistant", "content": "x"}]}, "messages", "last message")])
def test_a_request_that_cannot_be_served_says_why(change, param, said):
    with pytest.raises(Refusal) as refusal:
        parse(GOOD | change, "m", Sampling(), slots=8)
    error = refusal.value.body["error"]
    assert refusal.value.status == 400 and error["param"] == param and said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_clients_send_by_habit_is_accepted():
    messages = [{"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    habits = {"user": "me", "metadata": {"a": 1}, "frequency_penalty": 0, "tools": None,
              "response_format": {"type": "text"}, "stop": None, "repetition_penalty": 1, "top_k": -1, "min_p": 0,
              "tool_choice": "none", "parallel_tool_calls": True, "presence_penalty": 0.0, "logit_bias": {},
              "best_of": 1, "modalities": ["text"], "skip_special_tokens": True, "use_beam_search": False}
    asked = parse({"model": "m", "messages": messages, "max_completion_tokens": 9, "max_tokens": 5,
                   "seed": -1} | habits,
                  "m", Sampling(temperature=0.3), slots=8)
    assert asked.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert asked.sampling == Sampling(max_tokens=9, temperature=0.3) and asked.seed == 2**64 - 1 and asked.n == 1


def test_a_request_of_open_webui_is_accepted_unless_it_gives_the_model_tools():
    """As version 0.12.4 sent them: a dialogue from its page, and every setting of its page moved or neutral."""
    talk = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Again."}]
    sent = {"stream": True, "model": "m", "messages": talk, "stream_options": {"include_usage": True}}
    moved = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "max_tokens": 20, "seed": 1, "stop": ["\n\n"],
             "frequency_penalty": 0, "presence_penalty": 0, "repeat_penalty": 1, "min_p": 0, "logit_bias": {}}
    asked = parse(sent, "m", Sampling(temperature=0.3), slots=8)
    assert asked.messages == talk and asked.stream and asked.usage and asked.sampling == Sampling(temperature=0.3)
    asked = parse(sent | moved, "m", Sampling(), slots=8)
    assert asked.sampling == Sampling(20, 0.8, 0.9, 40, ("\n\n",)) and asked.seed == 1
    with pytest.raises(Refusal) as refusal:
        parse(sent | {"tools": [{"type": "function", "function": {"name": "calculate_timestamp"}}]}, "m", Sampling(), 8)
    assert refusal.value.status == 400 and refusal.value.body["error"]["param"] == "tools"


def test_errors_have_openai_s_classes(server):
    messages = [{"role": "user", "content": "Hi"}]
    create = server.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match=re.escape(server.name)) as error:
        create(model="gpt-9", messages=messages)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="frequency_penalty") as error:
        create(model=server.name, messages=messages, frequency_penalty=1)
    assert error.value.param == "frequency_penalty"
    with pytest.raises(openai.NotFoundError):
        server.client.embeddings.create(model=server.name, input="x")
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-9")


def test_a_prompt_and_its_reply_have_to_fit_the_positions(server):
    prompt = say(server, max_tokens=1).usage.prompt_tokens
    assert say(server, max_tokens=POSITIONS - prompt, temperature=0).usage.total_tokens <= POSITIONS
    with pytest.raises(openai.BadRequestError, match=f"{prompt} tokens .* {POSITIONS} is the most") as error:
        say(server, max_tokens=POSITIONS - prompt + 1)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        say(server, "rain " * POSITIONS, max_tokens=None)
    long = "rain " * (200 // len(server.tokenizer.encode(" rain")))
    assert say(server, long, max_tokens=None).usage.total_tokens <= POSITIONS  # unsaid: what fits


@pytest.mark.parametrize(("content", "kind", "status"), [
    (b"{", "application/json", 400), (b"[1]", "application/json", 400), (b"[" * 9999, "application/json", 400),
    (b"\xff", "application/json", 400), (json.dumps(GOOD | {"x": "a\ud800b"}).encode(), "application/json", 400),
    (json.dumps(GOOD | {"\ud800": 1}).encode(), "application/json", 400),
    (b'{"n": ' + b"9" * 5000 + b"}", "application/json", 400), (json.dumps(GOOD).encode(), "text/plain", 400),
    (b" " * 200_000, "application/json", 413)])
def test_a_body_that_is_no_request_is_refused(server, content, kind, status):
    reply = httpx.post(f"{server.url}/chat/completions", content=content, headers={"content-type": kind})
    assert reply.status_code == status and reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["Application/JSON", "application/json ; charset=UTF-8", "application/json\t;a=b"])
def test_a_content_type_is_read_as_http_says(server, kind):
    body = json.dumps(GOOD | {"model": server.name, "max_tokens": 1}).encode()
    reply = httpx.post(f"{server.url}/chat/completions", content=body, headers={"content-type": kind})
    assert reply.status_code == 200


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-320])
def test_a_tiny_temperature_says_what_0_says(server, temperature):
    assert texts(say(server, temperature=temperature)) == texts(say(server, temperature=0))


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_not_finite_are_said_not_made_words_of(start, model, monkeypatch, stream):
    server = start(slots=2)
    logits = model.model.logits
    monkeypatch.setattr(model.model, "logits", lambda hidden: logits(hidden) * float("nan"))
    with pytest.raises(openai.APIError, match="logits are not finite"):
        list(say(server, stream=True)) if stream else say(server)
    monkeypatch.undo()
    assert len(texts(say(server))) == 1  # it serves on


def raw(server, *pieces: bytes, seconds: float = 5) -> bytes:
    """All that comes back for some bytes on a connection of their own."""
    port = int(re.search(r":(\d+)/", server.url)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        for piece in pieces:
            connection.sendall(piece)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                found += part
        return found


@pytest.mark.parametrize("host", [
    b"evil_site.example:8080", b"a{b.evil.example", b"evil.example@127.0.0.1", b"127.0.0.1.evil.example", b"",
    b"127.0.0.1:8000\r\nHost: evil.example", b"localhost:evil", b"127.0.0.1 evil.example", b"[::1].evil.example"])
def test_the_host_is_the_header_as_it_came(server, host):
    """Not what a library makes of it; two of them, none, or one that no URL can have are not this machine's name."""
    said = raw(server, b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 400") and server.name.encode() not in said
    old = raw(server, b"GET /v1/models HTTP/1.0\r\n\r\n")
    assert old.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("pieces", [
    (), (b"GET /v1/models HT",), (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                                 b"application/json\r\nContent-Length: 100\r\n\r\n{", b'"model"'),
    (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /v1/models HT"),
    (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1/models HT",)],
    ids=["nothing", "half a line", "half a body", "half a second request", "half a request with the one before"])
def test_a_request_that_does_not_come_whole_is_dropped(start, pieces, monkeypatch):
    monkeypatch.setattr(serving, "REQUEST_S", 0.3)
    server = start(token="sesame", slots=1)
    raw(server, *pieces, seconds=4)  # which ends, or times out; after five an idle connection is dropped
    assert say(server, max_tokens=1)


def test_connections_are_bounded_before_any_token_is_looked_at(start, monkeypatch):
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 3)
    server = start(token="sesame", slots=1)
    port = int(re.search(r":(\d+)/", server.url)[1])
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    time.sleep(0.2)
    assert raw(server).startswith(b"HTTP/1.1 503")
    for connection in idle:
        connection.close()
    time.sleep(0.2)
    assert say(server, max_tokens=1)


def test_the_scheme_of_a_token_has_no_case_and_its_letters_are_utf_8(start):
    server = start(token="sésame", slots=1)
    for given, status in ((b"bearer s\xc3\xa9same", 200), (b"BEARER  s\xc3\xa9same", 200), (b"s\xc3\xa9same", 401),
                          (b"Basic s\xc3\xa9same", 401), (b"Bearer s\xe9same", 401)):
        assert httpx.get(f"{server.url}/models", headers={"authorization": given}).status_code == status


def test_another_host_name_is_refused(server):
    assert "evil.example" in httpx.get(f"{server.url}/models",
                                       headers={"host": "evil.example"}).json()["error"]["message"]
    for host in ("localhost:1", "[::1]:1"):
        assert httpx.get(f"{server.url}/models", headers={"host": host}).status_code == 200


def test_a_token_is_asked_of_every_request(start):
    server = start(token="sesame", slots=1)
    assert len(say(server).choices) == 1
    for key in ("x", "sesam", "sésame"):
        reply = httpx.get(f"{server.url}/models", headers={"authorization": f"Bearer {key}".encode()})
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="x", max_retries=0).chat.completions.create(**GOOD)


def test_other_hosts_need_a_token(capsys):
    exits(capsys, lambda: Config(serve=True, host="0.0.0.0"), "0.0.0.0", "token=")
    Config(serve=True, host="0.0.0.0", token="x")
    Config(host="0.0.0.0")


# ------------------------------------------------------------------------------ clients that leave

@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(start, stream, monkeypatch):
    server = start(slots=1)
    step, seen = server.engine.decoder.step, []

    def slow():
        time.sleep(0.02)
        stepped = step()
        seen.extend(s for s in stepped if s not in seen)
        return stepped

    monkeypatch.setattr(server.engine.decoder, "step", slow)
    body = {"model": server.name, "messages": GOOD["messages"], "stream": stream, "max_tokens": 200, "temperature": 0,
            "seed": 0}
    if stream:
        with httpx.stream("POST", f"{server.url}/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            assert len([next(lines) for _ in range(6)]) == 6  # the role, and two pieces of text
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/chat/completions", json=body, timeout=0.3)
    began = time.monotonic()
    say(server, max_tokens=2)
    assert time.monotonic() - began < 2  # 200 steps would be 4 s
    assert len(seen) == 2 and len(seen[0].tokens) < 60 and not server.engine.listeners


def test_a_fault_of_the_model_is_answered_not_waited_for(start, monkeypatch, capsys):
    server = start(slots=2)

    def broken():
        raise RuntimeError("out of memory")

    say(server, max_tokens=1)
    monkeypatch.setattr(server.engine.decoder, "step", broken)
    for _ in range(2):  # the one under way, and the next
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            say(server)
    monkeypatch.setattr(server, "admit", lambda request: None)  # one that was admitted just before
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        say(server)
    assert "RuntimeError" in capsys.readouterr().err


def test_too_many_waiting_requests_are_told_to_come_back(server, monkeypatch):
    monkeypatch.setattr(chat, "MOST_WAITING", -1)
    with pytest.raises(openai.RateLimitError):
        say(server)


def test_ctrl_c_stops_the_server_while_it_streams(checkpoint):
    process = subprocess.Popen([sys.executable, "chat.py", "--serve", f"model={checkpoint}", "port=0", "threads=1",
                                "name=it"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or "serving" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", lines[-1])[0]
        body = GOOD | {"model": "it", "stream": True, "temperature": 0, "max_tokens": 240}
        with httpx.stream("POST", f"{url}/chat/completions", json=body) as reply:
            next(reply.iter_lines())
            process.send_signal(signal.SIGINT)
            assert process.wait(15) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def test_what_cannot_be_served_is_one_line_before_the_model_loads(checkpoint, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        exits(capsys, lambda: chat.main(Config(model=str(checkpoint), serve=True, port=port)), f"port={port}",
              "choose another port")
    exits(capsys, lambda: chat.main(Config(model=str(checkpoint), length=257)), "length is 257", "256 positions")
    exits(capsys, lambda: chat.main(Config(model=str(tmp_path))), "config.json")


# ------------------------------------------------------------------------------------- the terminal

class Letters:
    """Each token is a byte."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def read_bytewise(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], Spoken]:
    sequence = SimpleNamespace(tokens=[], done=False, finished=False)
    spoken, pieces = Spoken(Letters(), sequence, stops), []
    for byte in text.encode():
        sequence.tokens.append(byte)
        sequence.done = len(sequence.tokens) == len(text.encode())
        pieces.append(spoken.read())
        if spoken.finish:
            break
    return pieces, spoken


def test_half_a_character_is_held_back():
    assert read_bytewise("aé€b")[0] == ["a", "", "é", "", "", "€", "b"]


def test_what_may_become_a_stop_string_is_held_back():
    pieces, spoken = read_bytewise("a EN END. more", ("END.",))
    assert pieces == ["a", " ", "", "", "EN ", "", "", "", ""]
    assert spoken.finish == "stop" and spoken.text == "a EN " and spoken.tokens == 9 and spoken.sequence.done


def test_what_was_held_back_is_said_at_the_end():
    pieces, spoken = read_bytewise("a EN", ("END",))
    assert "".join(pieces) == "a EN" == spoken.text and spoken.finish == "length"


def test_the_stop_is_found_where_it_was_however_many_tokens_are_read_at_once():
    sequence = SimpleNamespace(tokens=list(b"one. two"), done=True, finished=False)
    spoken = Spoken(Letters(), sequence, (". ",))
    assert spoken.read() == "one" and spoken.tokens == 5 and spoken.finish == "stop"


def chat_with(monkeypatch, capsys, model, lines: list[str], **config) -> str:
    left = iter(lines)

    def typed(prompt):
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    converse(model, Config(**({"max_tokens": 8} | config)), POSITIONS)
    return capsys.readouterr().out


def test_the_terminal_says_what_the_server_says(monkeypatch, capsys, model, server):
    out = chat_with(monkeypatch, capsys, model, ["Tell me about rain.", "/quit", "never read"], temperature=0)
    assert out == texts(say(server, temperature=0, max_tokens=8))[0] + " ...\n"


def test_each_reply_in_the_terminal_is_drawn_anew(monkeypatch, capsys, model):
    one, other = (chat_with(monkeypatch, capsys, model, ["Hi", "/reset", "Hi"], seed=seed).split("\n", 2)
                  for seed in (0, 1))
    assert len({*one[:2], *other[:2]}) == 4
    assert chat_with(monkeypatch, capsys, model, ["Hi"], seed=1).split("\n")[0] == other[0]


def test_a_reply_cannot_move_the_terminals_cursor():
    assert visible("a\x1b[2J\x07\r\x9b1mb\n\tc é世") == "a\ufffd[2J\ufffd\ufffd\ufffd1mb\n\tc é世"


def test_a_line_in_another_encoding_is_not_sent_and_the_dialogue_goes_on(checkpoint):
    done = subprocess.run([sys.executable, "chat.py", f"model={checkpoint}", "threads=1", "max_tokens=4"], cwd=ROOT,
                          input=b"Hi\ncaf\xe9\nHo\n", capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.count(b"\n> ") == 4 and b"that line is not utf-8 text: it was not sent" in done.stdout


def test_the_history_goes_along_until_it_is_reset(monkeypatch, capsys, model, server):
    out = chat_with(monkeypatch, capsys, model, ["Hi", "And?", "/reset", "And?", "/system Be brief.", "And?"],
                    temperature=0)
    replies = [line.removesuffix(" ...") for line in out.splitlines() if line]

    def expected(*turns):
        messages = [{"role": role, "content": text} for role, text in turns]
        return visible(texts(server.client.chat.completions.create(model=server.name, messages=messages, temperature=0,
                                                                   max_tokens=8))[0])

    assert replies == [expected(("user", "Hi")), expected(("user", "Hi"), ("assistant", replies[0]), ("user", "And?")),
                       expected(("user", "And?")), expected(("system", "Be brief."), ("user", "And?"))]
    assert replies[1] != replies[2]


def test_settings_are_set_and_wrong_ones_are_refused_in_a_line(capsys):
    config = command("/set temperature 0.2", Config(), [])
    assert config.temperature == 0.2
    assert command("/set max_tokens=7", config, []).max_tokens == 7
    for line, said in (("/set top_p 7", "between 0 and 1"), ("/set top_k many", "number"),
                       ("/set port 1", "not a setting"),
                       ("/what", "/reset")):
        assert command(line, config, []) == config
        printed = capsys.readouterr()
        assert said in printed.out + printed.err


def test_the_oldest_rounds_make_room(model, capsys):
    for max_tokens in range(2, 60, 4):
        history = [{"role": role, "content": "rain"} for _ in range(40) for role in ("user", "assistant")]
        history.append({"role": "user", "content": "Hi"})
        prompt = fitting(model.tokenizer, history, Config(max_tokens=max_tokens), POSITIONS)
        assert len(prompt) <= POSITIONS - max_tokens and 1 < len(history) < 81
        assert history[0]["role"] == "user" and history[-1]["content"] == "Hi"
        assert f"the first {(81 - len(history)) // 2} rounds no longer fit" in capsys.readouterr().out
    too_long = [*history, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "rain " * 300}]
    assert fitting(model.tokenizer, kept := list(too_long), Config(), POSITIONS) is None
    assert kept == too_long, "nothing is forgotten for a turn that is not answered"


def test_the_documented_commands_are_valid():
    for line in (line.strip() for line in chat.__doc__.splitlines() if line.strip().startswith("python chat.py")):
        words = re.split(r" {4,}", line)[0].split()[2:]
        chat.runtime.load_config(Config, "", ["serve=true" if word == "--serve" else word for word in words])
    assert Path(ROOT / "chat.py").read_text().count('"serve=true" if word == "--serve"') == 1
