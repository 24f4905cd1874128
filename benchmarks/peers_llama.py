"""llama.cpp's side of benchmarks/peers.py: the same prompts to a GGUF file, greedy, all sequences in one batch.

In an environment with llama-cpp-python; the file is PEERS_GGUF's. Its weights are as the file has them, four bits for
SmolLM2's: the bar is what a person would run, not the same arithmetic.
"""
from __future__ import annotations

import os

import llama_cpp
import numpy as np

from benchmarks import peers_work as work


def decode(context, batch, rows: list[tuple[int, int, int, bool]]) -> None:
    """Run (token, position, sequence, whether its logits are wanted) through the model."""
    for i, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
    batch.n_tokens = len(rows)
    code = llama_cpp.llama_decode(context, batch)
    if code:
        raise RuntimeError(f"llama_decode gave {code}")


def generate(model, prompts: list[list[int]], new: int, vocab: int) -> int:
    """Tokens sampled."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = sum(map(len, prompts)) + (new + 1) * len(prompts) + 256
    settings.n_batch = settings.n_ubatch = 512
    settings.n_seq_max, settings.kv_unified = len(prompts), True
    settings.n_threads = settings.n_threads_batch = os.cpu_count()
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    try:
        next_tokens = []
        for sequence, prompt in enumerate(prompts):
            rows = [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]
            decode(context, batch, rows)
            next_tokens.append(likeliest(context, len(rows) - 1, vocab))
        for step in range(1, new):
            decode(context, batch, [(token, len(prompt) + step - 1, sequence, True) for sequence, (token, prompt)
                                    in enumerate(zip(next_tokens, prompts, strict=True))])
            next_tokens = [likeliest(context, i, vocab) for i in range(len(prompts))]
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    return new * len(prompts)


def likeliest(context, row: int, vocab: int) -> int:
    return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), shape=(vocab,)).argmax())


if __name__ == "__main__":
    turns = work.Turns()
    task, shape, _ = work.arguments()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        os.environ["PEERS_GGUF"].encode(), llama_cpp.llama_model_default_params())
    asked, limits, _, _ = work.sampling(shape, *task.split()[1:])
    while True:
        turns.wait()
        turns.done({"units": generate(model, asked, limits[0], shape.vocab)})
