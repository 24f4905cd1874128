"""How far our families are from transformers: logits, greedy tokens, tokenizer cases of small checkpoints it wrote.

    python -m benchmarks.families out=benchmarks/results/families.json

The checkpoints and what transformers said of them lie in tests/fixtures/models, one a family, in fp32.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

import runtime
from checkpoints import load_model
from data.tokenizer import load_tokenizer
from model import generate

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "models"


@dataclass(frozen=True)
class Config:
    out: str = "benchmarks/results/families.json"


def measure(folder: Path) -> dict:
    """One family's largest logit difference over plain and padded rows, greedy tokens and tokenizer cases."""
    model, expected = load_model(folder), load_file(folder / "expected.safetensors")
    left = model(expected["left.input_ids"], expected["left.attention_mask"])[:, -1]
    differences = [model(expected["full.input_ids"]) - expected["full.logits"], left - expected["left.last_logits"],
                   model(expected["right.input_ids"], expected["right.attention_mask"]) - expected["right.logits"]]
    prompts = [row[m.bool()].tolist() for row, m in zip(expected["left.input_ids"], expected["left.attention_mask"], strict=True)]
    greedy = [samples[0].tokens for samples in generate(model, prompts, 24, temperature=0)]
    tokenizer, cases = load_tokenizer(folder), json.loads((folder / "tokenizer_cases.json").read_text())
    fair = [c for c in cases["encode"] if "sentencepiece_ids" in c or not any(name in c["text"] for name in tokenizer.special)]
    right = sum(tokenizer.encode(c["text"]) == c.get("sentencepiece_ids", c["ids"]) for c in fair)
    chats = cases["chat"] if tokenizer.template else []
    right_chats = sum(tokenizer.render(c["messages"], add_generation_prompt=c["add_generation_prompt"])[0] == c["ids"] for c in chats)
    same = sum(a == b for row, told in zip(greedy, expected["greedy.tokens"].tolist(), strict=True) for a, b in zip(row, told, strict=True))
    return {"logits": max(d.abs().max().item() for d in differences), "greedy": [same, expected["greedy.tokens"].numel()],
            "encode": [right, len(fair)], "chat": [right_chats, len(chats)]}


def main(config: Config) -> None:
    found = {}
    for folder in sorted(FIXTURES.iterdir()):
        if (folder / "tokenizer_cases.json").is_file():
            found[folder.name] = row = measure(folder)
            print(f"{folder.name:<12} logits within {row['logits']:.1e}   greedy {row['greedy'][0]}/{row['greedy'][1]}   "
                  f"texts {row['encode'][0]}/{row['encode'][1]}   dialogues {row['chat'][0]}/{row['chat'][1]}")
    runtime.write_text(Path(config.out), json.dumps({"command": "python -m benchmarks.families", "families": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
