"""Asking a model: ledger, budget, retries against a server that misbehaves by script, a checkpoint's random streams."""
import fcntl
import json
import math
import os
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, exits, kill_after
from scripted import small_checkpoint

import judge
from data.endpoint import Endpoint, label_logprobs, retry_after
from data.llm import (
    Budget,
    Checkpoint,
    Reply,
    Request,
    Sampling,
    ask,
    before_stop,
    open_model,
    request_key,
    split_thoughts,
)
from model import Decoder, ReplyState, generate


@pytest.fixture(autouse=True)
def _one_thread(_same_everywhere):
    torch.set_num_threads(1)  # models this small only wait for a second one


def user(text: str, **fields) -> Request:
    return Request([{"role": "user", "content": text}], **fields)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Echo:
    """A model that answers with the prompt, ten tokens a reply, and counts what it is asked."""

    name = "echo"

    def __init__(self):
        self.asked: list[str] = []

    def replies(self, requests, sampling):
        for i, request in enumerate(requests):
            text = request.messages[-1]["content"]
            self.asked.append(text)
            yield i, "it would not" if text == "fail" else Reply(text, True, 5, 5, 0.0)


@pytest.fixture
def server():
    """start(script) -> url. script(body, n) -> (status, headers, text); n counts a prompt's attempts."""
    running = []

    def start(script) -> str:
        attempts: dict[str, int] = {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                text = body["messages"][-1]["content"]
                n = attempts[text] = attempts.get(text, 0) + 1
                status, headers, answer = script(body, n)
                self.send_response(status)
                for name, value in ({"content-type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(answer.encode())))
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        http.handle_error = lambda *_: None  # a client that has left
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((http, thread))
        return f"http://127.0.0.1:{http.server_port}/v1"

    yield start
    for http, thread in running:
        http.shutdown()
        http.server_close()
        thread.join()


def completion(text: str, prompt_tokens: int = 3, completion_tokens: int = 2, **choice) -> tuple[int, dict, str]:
    message = {"role": "assistant", "content": text}
    return 200, {}, json.dumps({
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 0}})


def error(status: int, message: str, **headers) -> tuple[int, dict, str]:
    return status, headers, json.dumps({"error": {"message": message, "type": "t", "code": headers.pop("code", None)}})


def quick(url: str, **options) -> Endpoint:
    return Endpoint(url, "m", **({"wait_s": 0.01, "tries": 4} | options))


# ------------------------------------------------------------------------------------------ ledger

def test_what_the_ledger_holds_is_not_asked_again(tmp_path):
    model, file = Echo(), tmp_path / "deep" / "ledger.jsonl"
    first = ask(model, [user("a"), user("b")], Sampling(), file)
    again = ask(model, [user("b"), user("c"), user("a")], Sampling(), file)
    assert model.asked == ["a", "b", "c"]
    assert [r.text for r in first] == ["a", "b"] and [r.text for r in again] == ["b", "c", "a"]
    assert again[0] == first[1]


def test_a_ledger_line_holds_the_question_and_the_raw_reply(tmp_path):
    request, sampling = user("a", repeat=2, tag="t"), Sampling(max_tokens=7, stop=("x",))
    ask(Echo(), [request], sampling, tmp_path / "l.jsonl")
    assert lines(tmp_path / "l.jsonl") == [{
        "key": request_key("echo", request, sampling), "model": "echo", "messages": [{"role": "user", "content": "a"}],
        "sampling": {"max_tokens": 7, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop": ["x"]}, "repeat": 2,
        "tag": "t",
        "text": "a", "finished": True, "prompt_tokens": 5, "completion_tokens": 5, "seconds": 0.0, "labels": {},
        "thoughts": "", "served": ""}]


def test_everything_a_reply_depends_on_is_in_its_key():
    samplings = (Sampling(), Sampling(top_k=5), Sampling(stop=("x",)))
    requests = (user("a"), user("b"), user("a", repeat=1), user("a", tag="t"), user("a", labels=("A",)))
    keys = {request_key(name, request, sampling) for name in ("m", "n") for sampling in samplings
            for request in requests}
    assert len(keys) == 2 * 3 * 5
    assert request_key("m", user("a"), Sampling(temperature=1, top_p=1)) in keys  # 1 is 1.0


def test_equal_requests_share_one_reply(tmp_path):
    model = Echo()
    replies = ask(model, [user("a"), user("a"), user("a", repeat=1)], Sampling(), tmp_path / "l.jsonl")
    assert model.asked == ["a", "a"] and len(replies) == 3 and None not in replies


def test_a_failure_is_none_is_recorded_with_its_reason_and_is_asked_again(tmp_path, capsys):
    model, file = Echo(), tmp_path / "l.jsonl"
    assert ask(model, [user("fail"), user("a")], Sampling(), file)[0] is None
    assert [line["error"] for line in lines(tmp_path / "l.failures.jsonl")] == ["it would not"]
    assert [line["text"] for line in lines(file)] == ["a"]
    assert "1 asked, 0 from the ledger, 1 failed, 5 prompt tokens, 5 reply tokens" in capsys.readouterr().out
    ask(model, [user("fail"), user("a")], Sampling(), file)
    assert model.asked == ["fail", "a", "fail"]


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    file = tmp_path / "l.jsonl"
    ask(Echo(), [user("a"), user("b")], Sampling(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    model = Echo()
    ask(model, [user("a"), user("b")], Sampling(), file)
    assert model.asked == ["b"] and file.read_bytes() == whole


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text('{"id": 1}\nhalf')
    exits(capsys, lambda: ask(Echo(), [user("a")], Sampling(), file), "data.jsonl line 1", "choose another")
    assert file.read_text() == '{"id": 1}\nhalf'
    file.write_text("{}")
    exits(capsys, lambda: ask(Echo(), [user("a")], Sampling(), file), "data.jsonl line 1", "choose another")
    assert file.read_text() == "{}"


def test_a_second_writer_of_a_ledger_is_refused(tmp_path, capsys):
    file = tmp_path / "l.jsonl"
    with file.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        exits(capsys, lambda: ask(Echo(), [user("a")], Sampling(), file), "l.jsonl", "another process")
    ask(Echo(), [user("a")], Sampling(), file)  # and free again


def test_a_request_ends_with_the_user(tmp_path):
    with pytest.raises(ValueError, match="user turn"):
        ask(Echo(), [Request([{"role": "assistant", "content": "a"}])], Sampling(), tmp_path / "l.jsonl")


# ------------------------------------------------------------------------------------------ budget

def test_a_budget_stops_before_it_is_exceeded(tmp_path, capsys):
    """A prompt of 4 bytes is at most 64 + 16 + 4 = 84 tokens, with 16 of the reply 100; in truth each takes 10.

    Of 250, requests fly two at a time while 200 are left: after 2, 4, 6 of them 60 are spent and 190 left; then one
    at a time while 100 are left: the 16th leaves 90.
    """
    model, budget = Echo(), Budget(tokens=250)
    requests = [user(f"{i:04}") for i in range(30)]
    exits(capsys, lambda: ask(model, requests, Sampling(max_tokens=16), tmp_path / "l.jsonl", budget),
          "160 of 250 tokens", "14 requests not asked")
    assert len(model.asked) == 16 == len(lines(tmp_path / "l.jsonl"))
    assert budget.spent_tokens == 160


def test_money_is_counted_at_the_price_of_a_million_tokens(tmp_path, capsys):
    """At most 84 x 10 + 16 x 50 = 1640 millionths; in truth 5 x 10 + 5 x 50 = 300. Of 2000, the first leaves 1700,
    the second 1400."""
    model, budget = Echo(), Budget(money=0.002, prompt_price=10.0, reply_price=50.0)
    requests = [user(f"{i:04}") for i in range(5)]
    exits(capsys, lambda: ask(model, requests, Sampling(max_tokens=16), tmp_path / "l.jsonl", budget),
          "0.0006 of 0.002 in money")
    assert budget.spent_money == pytest.approx(0.0006)


def test_a_budget_in_money_without_prices_is_refused(capsys):
    exits(capsys, lambda: Budget(money=1.0), "prompt_price")


def test_a_budget_spans_several_calls_and_the_ledger_is_free(tmp_path, capsys):
    budget, file = Budget(tokens=120), tmp_path / "l.jsonl"
    ask(Echo(), [user("0000")], Sampling(max_tokens=16), file, budget)
    ask(Echo(), [user("0000")], Sampling(max_tokens=16), file, budget)
    assert budget.spent_tokens == 10
    ask(Echo(), [user("0001")], Sampling(max_tokens=16), file, budget)
    ask(Echo(), [user("0002")], Sampling(max_tokens=16), file, budget)
    exits(capsys, lambda: ask(Echo(), [user("0003")], Sampling(max_tokens=16), file, budget), "30 of 120 tokens")


def test_concurrent_requests_never_exceed_the_budget(server, tmp_path, capsys):
    billed = []

    def script(body, n):
        most = 64 + 16 + len(body["messages"][0]["content"].encode())
        billed.append(most + body["max_tokens"])  # a server that uses all it may
        return completion("yes", most, body["max_tokens"])

    budget = Budget(tokens=1000)
    requests = [user(f"{i:04}") for i in range(40)]
    exits(capsys, lambda: ask(quick(server(script)), requests, Sampling(max_tokens=16), tmp_path / "l.jsonl", budget),
          "1,000 of 1,000")
    assert sum(billed) == 1000 == budget.spent_tokens and len(lines(tmp_path / "l.jsonl")) == 10


def test_an_attempt_without_an_answer_is_charged_in_full(server, tmp_path):
    """84 + 16 for the reply that was not JSON, 3 + 2 for the one that was."""
    url = server(lambda body, n: completion("yes") if n == 2 else (200, {}, "{half"))
    budget = Budget(tokens=1000)
    assert ask(quick(url), [user("0000")], Sampling(max_tokens=16), tmp_path / "l.jsonl", budget)[0].text == "yes"
    assert budget.spent_tokens == 105


# ---------------------------------------------------------------------------------------- endpoint

def replies_of(model, requests: list[Request], sampling=None) -> list:
    found = dict(model.replies(requests, sampling or Sampling()))
    return [found.get(i) for i in range(len(requests))]


def test_an_endpoint_gives_text_end_and_token_counts(server):
    def script(body, n):
        text = body["messages"][0]["content"]
        return completion(text.upper(), 7, 9, finish_reason="length" if text == "b" else "stop")

    a, b = replies_of(quick(server(script)), [user("a"), user("b")])
    assert (a.text, a.finished, a.prompt_tokens, a.completion_tokens) == ("A", True, 7, 9)
    assert (b.text, b.finished) == ("B", False)


def test_sampling_settings_reach_the_server(server):
    seen = []

    def script(body, n):
        seen.append(body)
        return completion("x")

    model = quick(server(script))
    replies_of(model, [user("a")], Sampling(max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, stop=("END",)))
    assert {k: seen[0][k] for k in ("model", "max_tokens", "temperature", "top_p", "top_k", "stop")} == {
        "model": "m", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop": ["END"]}
    replies_of(model, [user("a", repeat=1)], Sampling(temperature=0))
    replies_of(model, [user("a")])
    replies_of(model, [user("a", repeat=1)])
    assert "seed" not in seen[1] and seen[2]["seed"] != seen[3]["seed"]


@pytest.mark.parametrize("first",
                         [error(429, "slow down"), error(500, "oops"), error(503, "busy"), (200, {}, "{half"),
                          (200, {}, "{}"),
                                   (200, {"content-type": "text/plain"}, "hello")])
def test_what_may_pass_is_tried_again(server, first):
    asked = []

    def script(body, n):
        asked.append(n)
        return first if n < 3 else completion("at last")

    model = quick(server(script))
    assert replies_of(model, [user("a")])[0].text == "at last"
    assert asked == [1, 2, 3]
    assert len(model.lost) == (2 if first[0] == 200 else 0)  # no server bills for its errors


def test_a_retry_waits_as_long_as_the_server_asks(server):
    times = []

    def script(body, n):
        times.append(time.monotonic())
        return error(429, "slow down", **{"retry-after": "0.4"}) if n == 1 else completion("yes")

    replies_of(quick(server(script)), [user("a")])
    assert 0.4 <= times[1] - times[0] < 2


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("3") == 3 and retry_after("0.5") == 0.5
    assert retry_after("") == 0 == retry_after("soon") == retry_after("-4")
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0 and retry_after("Fri, 01 Jan 2100 00:00:00 GMT") == 600


def test_tries_are_capped_and_the_failure_names_the_last_reason(server, tmp_path):
    asked = []

    def script(body, n):
        asked.append(n)
        return error(500, "oops")

    assert replies_of(quick(server(script), tries=3), [user("a")]) == ["500: oops, after 3 tries"]
    assert asked == [1, 2, 3]


def test_a_time_out_is_tried_again(server):
    def script(body, n):
        time.sleep(0.5 if n == 1 else 0)
        return completion("yes")

    model = quick(server(script), timeout_s=0.2)
    assert replies_of(model, [user("a")])[0].text == "yes"
    assert model.lost == [(64 + 16 + 1, 512)]


def test_a_bad_request_is_a_failure_at_once(server):
    asked = []

    def script(body, n):
        asked.append(n)
        return error(400, "too long") if body["messages"][0]["content"] == "a" else completion("b")

    a, b = replies_of(quick(server(script)), [user("a"), user("b")])
    assert a == "400: too long" and b.text == "b" and asked == [1, 1]


@pytest.mark.parametrize(("status", "code", "remedy"), [
    (401, None, "OPENAI_API_KEY"), (404, None, "/v1"), (429, "insufficient_quota", "OPENAI_API_KEY")])
def test_what_can_never_pass_ends_the_run_after_replies_under_way(server, tmp_path, capsys, status, code, remedy):
    def script(body, n):
        if body["messages"][0]["content"] == "bad":
            return error(status, "not you", code=code)
        time.sleep(0.3)
        return completion("paid for")

    model = quick(server(script), threads=3)
    requests = [user("a"), user("b"), user("bad"), *(user(str(i)) for i in range(20))]
    exits(capsys, lambda: ask(model, requests, Sampling(), tmp_path / "l.jsonl"), "not you", remedy, "kept")
    kept = {line["messages"][0]["content"] for line in lines(tmp_path / "l.jsonl")}
    assert {"a", "b"} <= kept <= {"a", "b", "0"}  # a goes alone, then three at a time, unless the bad one is back first


def test_a_server_that_is_not_there_ends_the_run(capsys):
    model = quick("http://127.0.0.1:9/v1", tries=2)
    with pytest.raises(SystemExit):
        replies_of(model, [user("a")])
    assert "start the server" in capsys.readouterr().err.splitlines()[-1]


def test_max_completion_tokens_is_used_where_the_server_insists(server):
    seen = []

    def script(body, n):
        seen.append({key: body[key] for key in body if key.startswith("max")})
        return error(400, "use max_completion_tokens instead") if "max_tokens" in body else completion("yes")

    model = quick(server(script), threads=1)
    assert [r.text for r in replies_of(model, [user("a"), user("b")], Sampling(max_tokens=5))] == ["yes", "yes"]
    assert seen == [{"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5}]


def test_a_key_is_needed_outside_this_machine(monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    exits(capsys, lambda: open_model("https://example.invalid/v1#m"), "OPENAI_API_KEY")


def test_an_endpoint_is_named_by_address_and_model():
    assert open_model("http://127.0.0.1:9/v1/#m").name == "http://127.0.0.1:9/v1#m"


def choice(*tokens: tuple[str, float]):
    from types import SimpleNamespace as Names

    return Names(logprobs=Names(content=[Names(top_logprobs=[Names(token=t, logprob=p) for t, p in tokens])]))


def test_a_label_gets_the_probability_of_every_token_that_begins_it():
    """A: 0.5 + 0.125 with a blank before it; B: 0.25; C is not among the likeliest."""
    found = label_logprobs(choice(("A", math.log(0.5)), ("B", math.log(0.25)), (" A", math.log(0.125)), ("", -1.0)),
                           ("A", "B", "C"))
    assert found == pytest.approx({"A": math.log(0.625), "B": math.log(0.25)})
    assert label_logprobs(choice(("mod", -0.5)), ("model",)) == {"model": -0.5}


def test_a_token_that_begins_two_labels_is_a_failure(server):
    def script(body, n):
        assert body["logprobs"] is True and body["top_logprobs"] == 20
        top = [{"token": "model", "logprob": -0.1, "bytes": None}]
        return completion("m", logprobs={"content": [{**top[0], "top_logprobs": top}], "refusal": None})

    assert replies_of(quick(server(script)), [user("a", labels=("model",))])[0].labels == {"model": -0.1}
    failure = replies_of(quick(server(script), tries=1), [user("a", labels=("model_1", "model_2"))])[0]
    assert "begins labels model_1 and model_2" in failure


# -------------------------------------------------------------------------------------- checkpoint

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint) -> Checkpoint:
    return open_model(str(checkpoint), "cpu")


REQUESTS = [user(f"Tell me about {thing}.", repeat=r) for thing in ("rain", "a boat", "the old stone mill on the hill")
            for r in range(4)]


def without_time(replies: list[Reply]) -> list[Reply]:
    return [r._replace(seconds=0.0) for r in replies]


def test_a_reply_does_not_depend_on_the_other_requests(model):
    sampling = Sampling(max_tokens=24, top_p=0.95)
    together = without_time(replies_of(model, REQUESTS, sampling))
    assert without_time(replies_of(model, REQUESTS[::-1], sampling))[::-1] == together
    assert [without_time(replies_of(model, [r], sampling))[0] for r in REQUESTS[:5]] == together[:5]
    assert len({r.text for r in together}) == len(together)


def test_greedy_decoding_is_that_of_generate(model):
    prompts = [model.tokenizer.render(r.messages, add_generation_prompt=True)[0] for r in REQUESTS]
    expected = generate(model.model, prompts, 20, temperature=0, stop_ids=model.tokenizer.stop_ids(), slots=5)
    decoder = Decoder(model.model, model.tokenizer.stop_ids(), 5, 64)
    sequences = [ReplyState(p, 20, (0.0, 0, 1.0), [0]) for p in prompts]
    decoder.waiting.extend(sequences)
    while decoder.step():
        pass
    assert [s.tokens for s in sequences] == [e.tokens for (e,) in expected]
    assert len({tuple(s.tokens) for s in sequences}) == 3
    assert [s.finished for s in sequences] == [e.finished for (e,) in expected]


def test_a_sequence_that_is_taken_out_leaves_the_others_as_they_are(model):
    prompts = [model.tokenizer.render(r.messages, add_generation_prompt=True)[0] for r in REQUESTS]
    alone = [s.tokens for s in _decoded(model, prompts, leave={})]
    left = _decoded(model, prompts, leave={0: 3, 4: 1, 5: 9, 7: 0})
    assert [len(left[i].tokens) for i in (0, 4, 5, 7)] == [3, 1, 9, 0]
    others = [i for i in range(len(prompts)) if i not in (0, 4, 5, 7)]
    assert [left[i].tokens for i in others] == [alone[i] for i in others]


def _decoded(model, prompts, leave: dict[int, int]) -> list[ReplyState]:
    decoder = Decoder(model.model, (), 4, 64)
    sequences = [ReplyState(p, 12, (1.0, 0, 1.0), [i]) for i, p in enumerate(prompts)]
    decoder.waiting.extend(sequences)
    while True:
        for i, tokens in leave.items():
            sequences[i].done |= len(sequences[i].tokens) == tokens
        if not decoder.step():
            return sequences


def test_labels_are_log_probabilities_of_the_first_token(model):
    labels = ("A", "B", "Yes")
    replies = replies_of(model, [r._replace(labels=labels) for r in REQUESTS], Sampling(max_tokens=1, temperature=0.3))
    for request, reply in zip(REQUESTS, replies, strict=True):
        prompt, _ = model.tokenizer.render(request.messages, add_generation_prompt=True)
        expected = torch.log_softmax(model.model(torch.tensor([prompt]))[0, -1], -1)
        for label in labels:
            ids, is_reply = model.tokenizer.render([*request.messages, {"role": "assistant", "content": label}])
            assert ids[:len(prompt)] == prompt and is_reply[len(prompt)]
            assert reply.labels[label] == pytest.approx(expected[ids[len(prompt)]].item(), abs=1e-4)


def test_labels_that_begin_alike_are_refused(model, capsys):
    exits(capsys, lambda: model.label_tokens(("B", "A", "B")), "'B' and 'B'", "same token")


def test_the_first_stop_string_ends_a_reply(model):
    assert before_stop("one. two! three", ("!", ". ")) == ("one", True)
    assert before_stop("one", ("two",)) == ("one", False)
    (whole,) = replies_of(model, [REQUESTS[0]], Sampling(max_tokens=24, temperature=0))
    stop = whole.text[len(whole.text) // 2:][:3]
    (cut,) = replies_of(model, [REQUESTS[0]], Sampling(max_tokens=24, temperature=0, stop=("never", stop)))
    assert cut.text == whole.text[:whole.text.index(stop)] and cut.finished
    assert cut.completion_tokens < whole.completion_tokens


def test_settings_out_of_range_are_refused(capsys):
    exits(capsys, lambda: Sampling(temperature=-1), "temperature is -1")
    exits(capsys, lambda: Sampling(stop=("\n", "")), "stop", "empty")


def test_a_prompt_beyond_the_positions_is_a_failure_and_a_long_one_gets_what_is_left(model):
    """256 positions."""
    words = model.tokenizer.encode(" rain")
    long, fits = user("rain " * (256 // len(words))), user("rain " * (230 // len(words)))
    failed, reply = replies_of(model, [long, fits], Sampling(max_tokens=200))
    assert "256 positions" in failed
    assert reply.prompt_tokens + reply.completion_tokens == 256 and not reply.finished


def test_a_checkpoint_is_named_by_what_is_in_it(checkpoint, model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert open_model(str(copy), "cpu").name == model.name
    assert open_model(str(copy), "cpu", "plain").name != model.name
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert open_model(str(copy), "cpu").name != model.name


def test_what_is_no_model_is_refused(tmp_path, checkpoint, capsys):
    exits(capsys, lambda: open_model(str(tmp_path)), str(tmp_path), "http://")
    exits(capsys, lambda: open_model(str(checkpoint), template="sepher"), "sepher", "zephyr")


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from data.llm import Request, Sampling, ask, open_model
torch.set_num_threads(1)
ask(open_model({checkpoint!r}, "cpu"), [Request(*fields) for fields in {many!r}], {long!r}, Path({ledger!r}))
"""
MANY, LONG = [user(f"Say {i}.") for i in range(200)], Sampling(max_tokens=20)  # more than are decoded together


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(checkpoint, model, tmp_path):
    ledger = tmp_path / "killed.jsonl"
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(root=str(ROOT), checkpoint=str(checkpoint), ledger=str(ledger), long=LONG,
                                    many=[tuple(request) for request in MANY]))
    kill_after([str(script)], lambda: ledger.is_file() and ledger.stat().st_size > 0)
    before = ledger.read_bytes().count(b"\n")
    assert 0 < before < len(MANY)
    ask(model, MANY, LONG, ledger)
    ask(model, MANY, LONG, tmp_path / "whole.jsonl")
    killed, whole = ([line | {"seconds": 0} for line in lines(file)] for file in (ledger, tmp_path / "whole.jsonl"))
    assert len(killed) == len(MANY)
    assert sorted(killed, key=lambda line: line["key"]) == sorted(whole, key=lambda line: line["key"])


# ------------------------------------------------------------------- what servers refuse, and how they differ

def refuse(parameter: str, message: str = "Unsupported parameter: '{}' is not supported with this model.", status=400):
    """A script: an error naming the parameter while it is sent, else a reply; and what was sent."""
    seen = []

    def script(body, n):
        seen.append(body)
        if parameter in body:
            said = {"error": {"message": message.format(parameter), "type": "invalid_request_error",
                              "param": parameter, "code": None}}
            return status, {}, json.dumps(said)
        return completion("yes")

    return script, seen


@pytest.mark.parametrize("parameter", ["temperature", "top_p", "seed", "top_k"])
def test_a_parameter_that_is_refused_is_left_out_from_the_first_call_on(server, tmp_path, parameter, capsys):
    script, seen = refuse(parameter)
    model = quick(server(script), threads=4)
    requests = [user(str(i)) for i in range(8)]
    replies = ask(model, requests, Sampling(temperature=0.5, top_k=3), tmp_path / "l.jsonl")
    assert [r.text for r in replies] == ["yes"] * 8 and model.adapted == [parameter]
    assert [parameter in body for body in seen] == [True] + [False] * 8  # one call too many, not sixty-four
    assert model.served == {"m" if parameter == "seed" else f"m (without {parameter})"}
    assert f"refuses {parameter}" in capsys.readouterr().err


def test_a_reasoning_model_refuses_temperature_and_max_tokens_together(server):
    def script(body, n):
        if body.get("temperature", 1) != 1:
            return error(400, "Unsupported value: 'temperature' does not support 0.0 with this model.")
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return completion("yes")

    model = quick(server(script))
    assert [r.text for r in replies_of(model, [user("a"), user("b")], Sampling(temperature=0))] == ["yes", "yes"]
    assert sorted(model.adapted) == ["max_tokens", "temperature"]


def test_a_parameter_refused_in_a_list_of_faults_is_found(server):
    def script(body, n):
        fault = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs"}]}
        return (422, {}, json.dumps({"message": fault})) if "seed" in body else completion("yes")

    assert replies_of(quick(server(script)), [user("a")])[0].text == "yes"


def test_a_temperature_out_of_range_ends_the_run_at_once(server, tmp_path, capsys):
    """It is not left out: the user chose it."""
    script, seen = refuse("temperature", "Invalid '{}': expected a value below 2.")
    exits(capsys, lambda: ask(quick(server(script)), [user(str(i)) for i in range(8)], Sampling(temperature=3),
                              tmp_path / "l.jsonl"), "below 2", "choose another temperature")
    assert len(seen) == 1


@pytest.mark.parametrize(("answer", "remedy"), [
    (error(404, "The model `m` does not exist"), "the model's name"),
    (error(400, "The model 'm' was not found"), "the model's name"),
    (error(400, "m is not a valid model ID"), "the model's name"),
    (error(400, "logprobs are not available for this model"), "another form"),
    (completion("A"), "another form"),
    ((400, {}, '{"error": {"message": "not supported with reasoning models", "param": "logprobs"}}'), "another form"),
])
def test_what_every_request_would_meet_ends_the_run_on_the_first_call(server, tmp_path, capsys, answer, remedy):
    asked = []

    def script(body, n):
        asked.append(body)
        return answer

    requests = [user(str(i), labels=("A", "B")) for i in range(8)]
    exits(capsys, lambda: ask(quick(server(script)), requests, Sampling(), tmp_path / "l.jsonl"), remedy)
    assert len(asked) == 1


def test_a_server_that_is_not_there_is_found_at_once(tmp_path, capsys):
    began = time.monotonic()
    model = Endpoint("http://127.0.0.1:9/v1", "m")  # eight tries, with waits of a second and more
    exits(capsys, lambda: ask(model, [user(str(i)) for i in range(8)], Sampling(), tmp_path / "l.jsonl"),
          "start the server")
    assert time.monotonic() - began < 1 and not model.lost


def test_replies_that_are_none_end_the_run_after_three_calls(server, tmp_path, capsys):
    asked = []

    def script(body, n):
        asked.append(n)
        return 200, {}, "<html>welcome</html>"

    budget = Budget(tokens=100_000)
    requests = [user(str(i)) for i in range(8)]
    with pytest.raises(SystemExit):
        ask(quick(server(script), tries=8), requests, Sampling(max_tokens=16), tmp_path / "l.jsonl", budget)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "not a chat completion" in said and "/v1" in said and asked == [1, 2, 3]


def test_a_server_that_never_answers_ends_the_run_after_three_calls(server, tmp_path, capsys):
    asked = []

    def script(body, n):
        asked.append(n)
        time.sleep(0.3)
        return completion("too late")

    model = quick(server(script), timeout_s=0.05, tries=8)
    with pytest.raises(SystemExit):
        ask(model, [user(str(i)) for i in range(8)], Sampling(), tmp_path / "l.jsonl")
    assert "timeout_s" in capsys.readouterr().err.splitlines()[-1] and asked == [1, 2, 3]


def test_one_request_that_is_refused_does_not_stop_the_others(server):
    def script(body, n):
        text = body["messages"][0]["content"]
        return error(400, "content policy") if text == "a" else completion(text)

    a, b = replies_of(quick(server(script)), [user("a"), user("b")])
    assert a == "400: content policy" and b.text == "b"


def stream(*parts: dict, end: str | None = "stop") -> tuple[int, dict, str]:
    chunks = [{"index": 0, "delta": part, "finish_reason": None} for part in parts]
    chunks += [{"index": 0, "delta": {}, "finish_reason": end}]
    common = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m-2"}
    text = "".join(f"data: {json.dumps(common | {'choices': [c]})}\n\n" for c in chunks) + "data: [DONE]\n\n"
    return 200, {"content-type": "text/event-stream"}, text


@pytest.mark.parametrize("refusal", [None, error(400, "This model only supports stream mode, enable the stream "
                                                      "parameter to access it.")])
def test_a_server_that_only_streams_is_asked_for_a_stream(server, refusal):
    seen = []

    def script(body, n):
        seen.append(body.get("stream", False))
        said = stream({"reasoning_content": "hm "}, {"reasoning_content": "so"}, {"content": "[["}, {"content": "A]]"})
        return said if body.get("stream") or refusal is None else refusal

    a, b = replies_of(quick(server(script)), [user("a"), user("b")])
    assert (a.text, a.thoughts, a.finished, a.served) == ("[[A]]", "hm so", True, "m-2") and b.text == "[[A]]"
    assert seen == [False, True, True]


@pytest.mark.parametrize(("end", "finished"), [("length", False), ("stop", True), (None, True)])
def test_a_stream_that_is_cut_is_not_finished(server, end, finished):
    """A server that only says it is done has finished."""
    url = server(lambda body, n: stream({"content": "x"}, end=end))
    assert replies_of(quick(url), [user("a")])[0].finished == finished


@pytest.mark.parametrize("message", [
    {"content": "[[B]]", "reasoning_content": "Maybe [[A]]?"}, {"content": "[[B]]", "reasoning": "Maybe [[A]]?"},
    {"content": [{"type": "reasoning", "text": "Maybe [[A]]?"}, {"type": "text", "text": "[[B]]"}]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Maybe [[A]]?"}]},
                 {"type": "text", "text": "[[B]]"}]}])
def test_thoughts_in_a_field_of_their_own_are_kept_apart(server, tmp_path, message):
    def script(body, n):
        status, headers, text = completion("")
        answer = json.loads(text)
        answer["choices"][0]["message"] |= message
        return status, headers, json.dumps(answer)

    (reply,) = ask(quick(server(script)), [user("a")], Sampling(), tmp_path / "l.jsonl")
    assert reply.text == "[[B]]" and "Maybe [[A]]?" in reply.thoughts
    assert lines(tmp_path / "l.jsonl")[0]["thoughts"] == reply.thoughts


def test_another_model_behind_the_same_name_is_noticed(server, tmp_path, capsys):
    """By what the server says in each reply; across runs too, for the ledger keeps it."""
    def says(model, fingerprint):
        def script(body, n):
            status, headers, text = completion("x")
            return status, headers, json.dumps(json.loads(text) | {"model": model, "system_fingerprint": fingerprint})
        return script

    first, second = quick(server(says("m-1", "fp_a"))), quick(server(says("m-2", "fp_b")))
    second.name = first.name  # the same address
    ask(first, [user("a")], Sampling(), tmp_path / "l.jsonl")
    assert first.served == {"m-1 fp_a"} and "throughout" not in capsys.readouterr().out
    ask(second, [user("a"), user("b")], Sampling(), tmp_path / "l.jsonl")
    assert second.served == {"m-1 fp_a", "m-2 fp_b"}
    assert "was not one model throughout: m-1 fp_a, m-2 fp_b" in capsys.readouterr().out


def test_a_ledger_of_before_thoughts_were_kept_is_read(tmp_path):
    ask(Echo(), [user("a")], Sampling(), tmp_path / "l.jsonl")
    old = [{key: value for key, value in line.items() if key not in ("thoughts", "served")}
           for line in lines(tmp_path / "l.jsonl")]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    model = Echo()
    assert ask(model, [user("a")], Sampling(), tmp_path / "l.jsonl")[0].text == "a" and not model.asked


def test_the_reason_of_a_failure_is_handed_on(tmp_path):
    reasons = {}
    assert ask(Echo(), [user("fail"), user("a")], Sampling(), tmp_path / "l.jsonl", reasons=reasons)[0] is None
    assert reasons == {request_key("echo", user("fail"), Sampling()): "it would not"}


@pytest.mark.parametrize(("text", "said", "ended"), [
    ("[[A]]", "[[A]]", True),
    ("<think>\n[[A]]?\n</think>\n\n[[B]]", "[[B]]", True),
    ("[[A]]? No.</think>[[B]]", "[[B]]", True),                      # the template opened the thoughts
    ("<think>[[A]]? Let me", "", False),
    ("<think>x</think>So: <thinking>[[A]]</thinking>[[B]]", "So: [[B]]", True),
    ("<think>x</think>[[A]]<think>no,", "[[A]]", False),
    ("[THINK][[A]][/THINK][[B]]", "[[B]]", True),
    ("<|channel|>analysis<|message|>[[A]]<|end|><|start|>assistant<|channel|>final<|message|>[[B]]", "[[B]]", True),
    ("◁think▷[[A]]◁/think▷[[B]]", "[[B]]", True),
    ("<|begin_of_thought|>[[A]]<|end_of_thought|>[[B]]", "[[B]]", True),
    ("<|START_THINKING|>[[A]]<|END_THINKING|>[[B]]", "[[B]]", True),
    ("<think></think>", "", True),
])
def test_thoughts_in_the_text_are_set_aside(text, said, ended):
    found = split_thoughts(text)
    assert (found[0], found[2]) == (said, ended)
    assert "[[A]]" not in text or said.count("[[A]]") + found[1].count("[[A]]") == 1  # nothing is lost


# ------------------------------------------------------------------------------------ a judge that thinks

def test_the_report_of_a_judge_that_thinks(server, tmp_path):
    """Sixty questions; the judge weighs both verdicts in its thoughts, in the text or in a field of their own, and then
    gives the longer reply the win. Two of its 120 answers are cut in their thoughts, which hold a verdict: 2 of 60
    comparisons are unread, and x, longer in 40 of the others, wins these of 58.
    """
    said = {name: [f"{name} {i} " + "word " * ((i % 3 > 0) == (name == "x")) for i in range(60)] for name in "xy"}
    questions = [{"id": str(i), "category": ("chat", "math")[i % 2], "prompt": f"Question {i}?"} for i in range(60)]
    for name, texts in said.items():
        rows = [{"id": str(i), "replies": [text]} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))

    def script(body, n):
        (number,), shown = (re.findall(pattern, body["messages"][0]["content"]) for pattern in (
            r"Question (\d+)\?", r"<assistant ([AB]) \w+>\n(.*)\n"))
        better = max(shown, key=lambda x: len(x[1]))[0]
        thought = f"If A were better I would end with [[A]], else with [[B]]. {better} says more."
        if number in ("6", "30") and shown[0][1].startswith("x"):
            return completion(f"<think>{thought}", finish_reason="length")
        answer = completion(f"[[{better}]]" if int(number) % 2 else f"<think>{thought}</think>\n\n[[{better}]]")
        reply = json.loads(answer[2])
        reply["choices"][0]["message"] |= {"reasoning_content": thought} if int(number) % 2 else {}
        return *answer[:2], json.dumps(reply)

    judge.main(judge.Config(models=[f"{name}={tmp_path / name}.jsonl" for name in "yx"], data=str(tmp_path / "q.jsonl"),
                            judges=[f"thinking judge={server(script)}#m"], out=str(tmp_path / "out"), show=0,
                            device="cpu", threads=1))
    sections = json.loads((tmp_path / "out" / "report.json").read_text())["sections"]
    found = {s["title"]: [dict(zip(s["columns"], row, strict=True)) for row in s["rows"]] for s in sections}
    assert [row["thinking judge: unread"] for row in found["Replies"]] == [2, 2]
    (wins,) = found["thinking judge: wins against y"]
    assert (wins["wins"], wins["n"], wins["unread"]) == (40, 58, 2)
    assert "2 of 60 verdicts could not be read (2 cut in its thoughts)" in next(
        s["text"] for s in sections if s["title"] == "thinking judge: wins against y")
    ledger = {line["key"]: line for line in lines(tmp_path / "out" / "calls.jsonl")}
    for row in lines(tmp_path / "out" / "judgments.jsonl"):
        words = ledger[row["key"]]
        assert "[[A]], else with [[B]]" in words["text"] + words["thoughts"] and words["finished"] == (not row["why"])
    if "WRITE" in os.environ:
        report = {"command": "WRITE=1 python -m pytest tests/test_llm.py -k judge_that_thinks", "sections": sections}
        (ROOT / "benchmarks" / "results" / "thinking.json").write_text(json.dumps(report, indent=1) + "\n")
