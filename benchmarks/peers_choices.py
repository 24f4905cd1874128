"""transformers' side of `python -m benchmarks.smollm2 same`: log-likelihoods of choices, in padded batches by length.

Reads [[context ids, continuation ids], ...] from standard input; writes their values in nats and the seconds taken.
The second values are of the same logits, their softmax in fp64: PyTorch's in fp32 is 8e-6 nats a token off, and always
to one side (kernels/logprobs.py).
"""
import json
import sys
import time

import torch
import transformers

BATCH = 16


@torch.no_grad()
def likelihoods(model, requests: list[tuple[list[int], list[int]]], dtype: torch.dtype) -> list[float]:
    found, order = {}, sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        rows = [(requests[i][0] + requests[i][1])[:-1] for i in part]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        logprobs = model(input_ids=ids, attention_mask=mask).logits.to(dtype).log_softmax(-1)
        for i, row, values in zip(part, rows, logprobs, strict=True):
            targets = torch.tensor(requests[i][1])
            at = values[len(row) - len(targets) : len(row)].gather(1, targets[:, None])
            found[i] = at.double().sum().item()
    return [found[i] for i in range(len(requests))]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    network = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    asked = json.load(sys.stdin)
    began = time.perf_counter()
    values = likelihoods(network, asked, torch.float32)
    seconds = time.perf_counter() - began
    exact = likelihoods(network, asked, torch.float64)
    print(json.dumps({"seconds": seconds, "values": values, "exact": exact}))
