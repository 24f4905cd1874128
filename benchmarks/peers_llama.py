"""What a person would run instead: llama.cpp samples the prompts of `sample N greedy` from a GGUF file.

    python -m benchmarks.peers_llama FILE.gguf        in an environment with llama-cpp-python; to results/llama.json

All sequences are in one batch, a token each a step, greedy. The weights are as the file has them, in SmolLM2's four
bits: it does not do the same arithmetic as the other sides of benchmarks/peers.py, it is the bar.
"""
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import llama_cpp
import numpy as np

from benchmarks import peers_work as work

SHAPE, ROUNDS, ROOM = work.SHAPES["135 M"], 3, 512  # the first round is not counted; tokens of a pass


def decode(context, batch, rows: list[tuple[int, int, int, bool]]) -> None:
    """Run (token, position, sequence, whether its logits are wanted) through the model."""
    for i, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
    batch.n_tokens = len(rows)
    if code := llama_cpp.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode gave {code}")


def likeliest(context, row: int) -> int:
    logits = llama_cpp.llama_get_logits_ith(context, row)
    return int(np.ctypeslib.as_array(logits, shape=(SHAPE.vocab,)).argmax())


def sample(model, prompts: list[list[int]]) -> None:
    """NEW tokens for each prompt."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = sum(map(len, prompts)) + (work.NEW + 1) * len(prompts) + 256
    settings.n_batch = settings.n_ubatch = ROOM
    settings.n_seq_max, settings.kv_unified = len(prompts), True
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(ROOM, 0, 1)
    latest = []
    for number, prompt in enumerate(prompts):
        decode(context, batch, [(token, i, number, i == len(prompt) - 1) for i, token in enumerate(prompt)])
        latest.append(likeliest(context, len(prompt) - 1))
    for step in range(work.NEW - 1):
        decode(context, batch, [(token, len(prompt) + step, number, True)
                                for number, (token, prompt) in enumerate(zip(latest, prompts, strict=True))])
        latest = [likeliest(context, row) for row in range(len(prompts))]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)


def main(file: str) -> None:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    rows = []
    for size in work.SAMPLED:
        prompts, rates = work.sampling(SHAPE, str(size), "greedy")[0], []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            sample(model, prompts)
            rates.append(size * work.NEW / (time.perf_counter() - began))
        rows.append({"batch": size, "rate": median(rates[1:]), "rates": rates[1:]})
        print(f"batch {size:<3} {rows[-1]['rate']:8.1f} tokens/s", flush=True)
    about = {"command": f"python -m benchmarks.peers_llama {Path(file).name}", "version": llama_cpp.__version__,
             "cores": len(os.sched_getaffinity(0))}
    Path("benchmarks/results/llama.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
