"""How many requests `chat.py --serve` answers, by the number of clients at a time.

    python -m benchmarks.serving model=runs/tiny/0/dpo/model out=benchmarks/results/serving.json

Clients are OpenAI's own, in a process beside the server's, on the same cores. Each asks prompts of the tiny world one
after the other at temperature 0.7, with a seed, and waits for the whole reply. The last row is `Checkpoint.replies`,
which is given all prompts at once. Whether the server's memory grows: tests/test_soak.py.
"""
import asyncio
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import openai
import torch

import runtime
from benchmarks.measure import machine, save, show, timed
from data.llm import Request, Sampling, open_model
from data.tiny.world import dialogue

CLIENTS = (1, 8, 32)
SECONDS = 6.0      # for each number of clients
MAX_TOKENS = 64
REQUESTS = 500     # of the row without a server


@dataclass(frozen=True)
class Config:
    model: str = "runs/tiny/0/dpo/model"
    out: str = "benchmarks/results/serving.json"
    threads: int = 1  # of the server; the clients need some of the machine too


@contextmanager
def served(model: str, *options: str) -> Iterator[tuple[str, int]]:
    """The address of a server, and its process."""
    command = [sys.executable, "chat.py", "--serve", f"model={model}", "device=cpu", "port=0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = next((found[0] for line in server.stdout if (found := re.search(r"http://\S+", line))), None)
        if url is None:
            runtime.fail(f"{model}: cannot be served, see above")
        yield url, server.pid
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


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
    with served(config.model, f"threads={config.threads}") as (url, _):
        for clients in CLIENTS:
            rows.append(asyncio.run(ask_for(url, clients)))
            show(rows[-1])
    runtime.setup("cpu", 0, config.threads)
    model, requests = open_model(config.model, "cpu"), [Request(messages) for messages in prompts(REQUESTS)]
    replies, seconds = timed(lambda: list(model.replies(requests, Sampling(MAX_TOKENS, 0.7))))
    tokens = sum(reply.completion_tokens for _, reply in replies)
    offline = {"requests": REQUESTS, "requests_per_s": REQUESTS / seconds, "tokens_per_s": tokens / seconds}
    show({"clients": "no server"} | offline)
    return {"max_tokens": MAX_TOKENS, **machine(torch.device("cpu")), "rows": rows, "without_server": offline}


def main(config: Config) -> None:
    save(config.out, {"command": f"python -m benchmarks.serving model={config.model}", "model": config.model,
                      **rates(config)})


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
