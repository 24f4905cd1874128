"""How many requests `chat.py --serve` answers, by how many clients ask at a time; and the same replies without a server.

    python -m benchmarks.serving model=runs/tiny/0/dpo/model out=benchmarks/results/serving.json

Clients are OpenAI's own, in a process beside the server's, on the same cores. Each asks prompts of the tiny world one
after the other at temperature 0.7, with a seed, and waits for the whole reply. The last row is `Checkpoint.replies`, which
is given all prompts at once.
"""
from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import openai
import torch

import runtime
from benchmarks.throughput import processor
from data.llm import Request, Sampling, open_model
from data.tiny.world import dialogue

CLIENTS = (1, 8, 32)


@dataclass(frozen=True)
class Config:
    model: str = "runs/tiny/0/dpo/model"
    out: str = "benchmarks/results/serving.json"
    seconds: float = 6.0  # for each number of clients
    max_tokens: int = 64
    requests: int = 500   # of the row without a server
    threads: int = 1      # of the server; the clients need some of the machine too


def prompts(count: int) -> list[list[dict]]:
    rng = random.Random("serving")
    return [[{"role": "user", "content": dialogue(rng)["turns"][0]["user"]}] for _ in range(count)]


async def ask_for(url: str, clients: int, config: Config) -> dict:
    """What `clients` at a time get done in some seconds, one second of warming up aside."""
    messages, done = prompts(2000), []
    endpoint = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    name = (await endpoint.models.list()).data[0].id
    began = time.perf_counter()

    async def client(first: int) -> None:
        i = first
        while (asked := time.perf_counter()) < began + 1 + config.seconds:
            reply = await endpoint.chat.completions.create(model=name, messages=messages[i % len(messages)], seed=i,
                                                           max_tokens=config.max_tokens, temperature=0.7)
            done.append((asked, time.perf_counter(), reply.usage.completion_tokens))
            i += clients

    await asyncio.gather(*(client(i) for i in range(clients)))
    await endpoint.close()
    counted = [(end - start, tokens) for start, end, tokens in done if began + 1 <= end < began + 1 + config.seconds]
    times, tokens = zip(*counted, strict=True)
    return {"clients": clients, "requests_per_s": len(times) / config.seconds, "tokens_per_s": sum(tokens) / config.seconds,
            "median_s": median(times), "p95_s": quantiles(times, n=20)[-1]}


def without_server(config: Config) -> dict:
    model, requests = open_model(config.model, "cpu"), [Request(m) for m in prompts(config.requests)]
    began = time.perf_counter()
    tokens = sum(reply.completion_tokens for _, reply in model.replies(requests, Sampling(config.max_tokens, 0.7)))
    seconds = time.perf_counter() - began
    return {"requests": len(requests), "requests_per_s": len(requests) / seconds, "tokens_per_s": tokens / seconds}


def main(config: Config) -> None:
    command = [sys.executable, "chat.py", "--serve", f"model={config.model}", "device=cpu", "port=0", f"threads={config.threads}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = None
        for line in server.stdout:
            if url := re.search(r"http://\S+", line):
                break
        if url is None:
            runtime.fail(f"{config.model}: cannot be served, see above")
        rows = []
        for clients in CLIENTS:
            rows.append(asyncio.run(ask_for(url[0], clients, config)))
            print("{clients:>3} clients  {requests_per_s:6.1f} requests/s  {tokens_per_s:7,.0f} tokens/s  "
                  "median {median_s:.3f} s  95 % {p95_s:.3f} s".format(**rows[-1]), flush=True)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    runtime.setup("cpu", 0, config.threads)
    offline = without_server(config)
    print("no server    {requests_per_s:6.1f} requests/s  {tokens_per_s:7,.0f} tokens/s".format(**offline))
    report = {"command": "python -m benchmarks.serving", "model": config.model, "max_tokens": config.max_tokens,
              "device": processor(torch.device("cpu")), "cores": os.cpu_count(), "threads": config.threads, "torch": torch.__version__,
              "rows": rows, "without_server": offline}
    runtime.write_text(Path(config.out), json.dumps(report, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
