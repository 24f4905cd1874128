"""The server under mixed clients for some minutes: does its memory stay where it was? It stops by itself.

    nice -n 10 python -m benchmarks.soak minutes=60        to results/soak.json

Eight clients ask, stream, leave in the middle, send what is refused, and open connections that say nothing; each
pauses between two requests, so that an hour of it leaves the machine to others.
"""
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

import runtime

WORDS = ["chat.py", "--serve", "model=data/tiny/base", "template=zephyr", "port=0", "threads=1", "name=it"]
CLIENTS, PAUSE_S = 8, 1.5  # between two requests of one client


@dataclass(frozen=True)
class Config:
    minutes: float = 5.0
    out: str = "benchmarks/results/soak.json"


def client(number: int, url: str, until: float, done: Counter) -> None:
    rng, port = random.Random(number), int(re.search(r":(\d+)/", url)[1])
    with httpx.Client(base_url=url, timeout=120) as http:
        while time.time() < until:
            kind = rng.choice(("reply", "stream", "leave", "refused", "idle"))
            done[kind] += 1
            time.sleep(PAUSE_S)
            if kind == "idle":
                with socket.create_connection(("127.0.0.1", port)) as silent:
                    silent.sendall(b"GET /v1/models HT")
                continue
            body = {"model": "it", "messages": [{"role": "user", "content": f"Say {rng.random()}"}], "max_tokens": 16,
                    "stream": kind in ("stream", "leave"), "temperature": 9 if kind == "refused" else 1}
            with http.stream("POST", "chat/completions", json=body) as reply:
                lines = reply.iter_lines()
                assert next(lines) and reply.status_code == (400 if kind == "refused" else 200)
                kind == "leave" or list(lines)


def main(config: Config) -> None:
    server = subprocess.Popen([sys.executable, *WORDS], stdout=subprocess.PIPE, text=True)
    url = next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)))[0] + "/"
    until, done, seen = time.time() + 60 * config.minutes, Counter(), []
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client, i, url, until, done) for i in range(CLIENTS)]
        while not all(part.done() for part in running):
            status = Path(f"/proc/{server.pid}/status").read_text()
            seen.append(round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1))
            time.sleep(60)
    report = {"command": f"python -m benchmarks.soak minutes={config.minutes:g}", "minutes": config.minutes,
              "pause_s": PAUSE_S, "requests": dict(done), "every_minute": seen,
              "resident_mb": {"at the beginning": seen[0], "in the middle": seen[len(seen) // 2],
                              "at the end": seen[-1]}}
    server.terminate()
    runtime.write_text(Path(config.out), json.dumps(report, indent=1) + "\n")
    for part in running:
        part.result()  # raises what a client has met


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
