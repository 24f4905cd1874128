"""The server under mixed clients for some minutes: does its memory stay where it was?

    python -m benchmarks.soak minutes=5        results/soak.json; stops by itself

Eight clients ask, stream, leave in the middle, send what is refused, and open connections that say nothing.
"""
from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx

import runtime

KINDS = ("reply", "stream", "leave", "refused", "idle")


@dataclass(frozen=True)
class Config:
    model: str = "data/tiny/base"    # Hugging Face directory
    minutes: float = 5.0
    clients: int = 8
    out: str = "benchmarks/results/soak.json"


def client(url: str, number: int, until: float, done: Counter) -> None:
    rng, port = random.Random(number), int(re.search(r":(\d+)/", url)[1])
    with httpx.Client(base_url=url, timeout=120) as http:
        while time.time() < until:
            kind = rng.choice(KINDS)
            body = {"model": "it", "messages": [{"role": "user", "content": f"Say {rng.random()}"}], "max_tokens": 16,
                    "stream": kind in ("stream", "leave"), "temperature": 9 if kind == "refused" else 1}
            if kind == "idle":
                with socket.create_connection(("127.0.0.1", port)) as silent:
                    silent.sendall(b"GET /v1/models HT")
            else:
                with http.stream("POST", "chat/completions", json=body) as reply:
                    lines = reply.iter_lines()
                    assert next(lines) and reply.status_code == (400 if kind == "refused" else 200)
                    done["lines"] += kind != "leave" and sum(1 for _ in lines)
            done[kind] += 1


def main(config: Config) -> None:
    words = ["chat.py", "--serve", f"model={config.model}", "template=zephyr", "port=0", "threads=1", "name=it"]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    url = next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)))[0] + "/"
    until, done, seen = time.time() + 60 * config.minutes, Counter(), []
    threads = [threading.Thread(target=client, args=(url, i, until, done)) for i in range(config.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(5.0, 3 * config.minutes))
        seen.append(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1]) / 1024)
    server.terminate()
    server.wait(30)
    report = {"command": f"python -m benchmarks.soak minutes={config.minutes:g}", "requests": dict(done),
              "resident_mb": {"after a fifth": round(seen[len(seen) // 5], 1), "at the end": round(seen[-1], 1),
                              "most": round(max(seen), 1)}}
    runtime.write_text(Path(config.out), json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
