"""Does the memory of `chat.py --serve` grow?

    SOAK=60 WRITE=1 nice -n 10 python -m pytest tests/test_soak.py      an hour, to benchmarks/results/soak.json

Eight clients ask, stream, leave in the middle, send what is refused, and open connections that say nothing; memory is
read once a minute. Without SOAK (minutes) they do so for some seconds, and only what they are told is looked at.
"""
import os
import random
import re
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from conftest import BASE, ROOT

from benchmarks.measure import save
from benchmarks.serving import served

MINUTES = float(os.environ.get("SOAK", 0.05))
PAUSE_S = 1.5 if MINUTES > 1 else 0.2  # between two requests of a client: an hour of it leaves the machine to others


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


def test_the_memory_of_a_server_does_not_grow():
    done, seen = Counter(), []
    with served(str(BASE), "template=zephyr", "threads=1") as (url, process), ThreadPoolExecutor(8) as pool:
        until = time.time() + 60 * MINUTES
        clients = [pool.submit(mixed_client, i, url, until, done) for i in range(8)]
        while not all(client.done() for client in clients):
            status = Path(f"/proc/{process}/status").read_text()
            seen.append(round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1))
            time.sleep(60 if MINUTES > 1 else 0.5)
    for client in clients:
        client.result()  # raises what it has met
    assert done.total() >= 8
    found = {"at the beginning": seen[0], "in the middle": seen[len(seen) // 2], "at the end": seen[-1]}
    if "WRITE" in os.environ:
        save(ROOT / "benchmarks" / "results" / "soak.json", {
            "command": f"SOAK={MINUTES:g} WRITE=1 python -m pytest tests/test_soak.py", "model": "data/tiny/base",
            "minutes": MINUTES, "pause_s": PAUSE_S, "requests": dict(done), "every_minute": seen, "resident_mb": found})
    assert MINUTES < 10 or found["at the end"] < 1.05 * found["in the middle"]
