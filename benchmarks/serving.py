"""How many requests `chat.py --serve` answers, by the number of clients at a time; and whether its memory grows.

    python -m benchmarks.serving model=runs/tiny/0/dpo/model out=benchmarks/results/serving.json
    python -m benchmarks.serving measure=memory out=benchmarks/results/soak.json

Clients are OpenAI's own, in a process beside the server's, on the same cores. Each asks prompts of the tiny world one
after the other at temperature 0.7, with a seed, and waits for the whole reply. The last row is `Checkpoint.replies`,
which is given all prompts at once. For memory eight clients ask, stream, leave in the middle, send what is refused, and
open connections that say nothing, for some minutes, and memory is read once a minute.
"""
import asyncio
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import httpx
import openai
import torch

import runtime
from benchmarks.measure import machine, save, timed
from data.llm import Request, Sampling, open_model
from data.tiny.world import dialogue

CLIENTS = (1, 8, 32)
SECONDS = 6.0      # for each number of clients
MAX_TOKENS = 64
REQUESTS = 500     # of the row without a server
PAUSE_S = 1.5      # memory: between two requests of a client, so that an hour of it leaves the machine to others


@dataclass(frozen=True)
class Config:
    measure: Literal["rate", "memory"] = "rate"
    model: str = "runs/tiny/0/dpo/model"
    out: str = "benchmarks/results/serving.json"
    threads: int = 1      # of the server; the clients need some of the machine too
    minutes: float = 5.0  # memory: how long


@contextmanager
def served(config: Config) -> Iterator[tuple[str, int]]:
    """The address of a server, and its process."""
    command = [sys.executable, "chat.py", "--serve", f"model={config.model}", "device=cpu", "port=0",
               f"threads={config.threads}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = next((found[0] for line in server.stdout if (found := re.search(r"http://\S+", line))), None)
        if url is None:
            runtime.fail(f"{config.model}: cannot be served, see above")
        yield url, server.pid
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


# ------------------------------------------------------------------------------------------- rates

def prompts(count: int) -> list[list[dict]]:
    rng = random.Random("serving")
    return [[{"role": "user", "content": dialogue(rng)["turns"][0]["user"]}] for _ in range(count)]


async def ask_for(url: str, clients: int) -> dict:
    """What `clients` at a time get done in some seconds, one second of warming up aside."""
    messages, done = prompts(2000), []
    endpoint = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    name = (await endpoint.models.list()).data[0].id
    began = time.perf_counter()

    async def client(first: int) -> None:
        i = first
        while (asked := time.perf_counter()) < began + 1 + SECONDS:
            reply = await endpoint.chat.completions.create(model=name, messages=messages[i % len(messages)], seed=i,
                                                           max_tokens=MAX_TOKENS, temperature=0.7)
            done.append((asked, time.perf_counter(), reply.usage.completion_tokens))
            i += clients

    await asyncio.gather(*(client(i) for i in range(clients)))
    await endpoint.close()
    counted = [(end - start, tokens) for start, end, tokens in done if began + 1 <= end < began + 1 + SECONDS]
    times, tokens = zip(*counted, strict=True)
    return {"clients": clients, "requests_per_s": len(times) / SECONDS, "tokens_per_s": sum(tokens) / SECONDS,
            "median_s": median(times), "p95_s": quantiles(times, n=20)[-1]}


def rates(config: Config) -> dict:
    rows = []
    with served(config) as (url, _):
        for clients in CLIENTS:
            rows.append(asyncio.run(ask_for(url, clients)))
            print("{clients:>3} clients  {requests_per_s:6.1f} requests/s  {tokens_per_s:7,.0f} tokens/s  "
                  "median {median_s:.3f} s  95 % {p95_s:.3f} s".format(**rows[-1]), flush=True)
    runtime.setup("cpu", 0, config.threads)
    model, requests = open_model(config.model, "cpu"), [Request(messages) for messages in prompts(REQUESTS)]
    replies, seconds = timed(lambda: list(model.replies(requests, Sampling(MAX_TOKENS, 0.7))))
    tokens = sum(reply.completion_tokens for _, reply in replies)
    offline = {"requests": REQUESTS, "requests_per_s": REQUESTS / seconds, "tokens_per_s": tokens / seconds}
    print("no server    {requests_per_s:6.1f} requests/s  {tokens_per_s:7,.0f} tokens/s".format(**offline))
    return {"max_tokens": MAX_TOKENS, **machine(torch.device("cpu")), "rows": rows, "without_server": offline}


# ------------------------------------------------------------------------------------------ memory

def mixed_client(number: int, url: str, until: float, done: Counter) -> None:
    rng, port = random.Random(number), int(re.search(r":(\d+)/", url)[1])
    with httpx.Client(base_url=f"{url}/", timeout=120) as http:
        name = http.get("models").json()["data"][0]["id"]
        while time.time() < until:
            kind = rng.choice(("reply", "stream", "leave", "refused", "idle"))
            done[kind] += 1
            time.sleep(PAUSE_S)
            if kind == "idle":
                with socket.create_connection(("127.0.0.1", port)) as silent:
                    silent.sendall(b"GET /v1/models HT")
                continue
            body = {"model": name, "messages": [{"role": "user", "content": f"Say {rng.random()}"}], "max_tokens": 16,
                    "stream": kind in ("stream", "leave"), "temperature": 9 if kind == "refused" else 1}
            with http.stream("POST", "chat/completions", json=body) as reply:
                lines = reply.iter_lines()
                assert next(lines) and reply.status_code == (400 if kind == "refused" else 200)
                kind == "leave" or list(lines)


def memory(config: Config) -> dict:
    until, done, seen = time.time() + 60 * config.minutes, Counter(), []
    with served(config) as (url, process), ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(mixed_client, i, url, until, done) for i in range(8)]
        while not all(client.done() for client in clients):
            status = Path(f"/proc/{process}/status").read_text()
            seen.append(round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1))
            time.sleep(60)
    for client in clients:
        client.result()  # raises what it has met
    found = {"at the beginning": seen[0], "in the middle": seen[len(seen) // 2], "at the end": seen[-1]}
    return {"minutes": config.minutes, "pause_s": PAUSE_S, "requests": dict(done), "every_minute": seen,
            "resident_mb": found}


def main(config: Config) -> None:
    found = rates(config) if config.measure == "rate" else memory(config)
    command = f"python -m benchmarks.serving measure={config.measure} model={config.model}"
    command += f" minutes={config.minutes:g}" if config.measure == "memory" else ""
    save(config.out, {"command": command, "model": config.model, **found})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
