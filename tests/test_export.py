"""What a trainer that samples with vLLM or SGLang is given opens in transformers; without that these tests are skipped.

The directories are as ppo.py, reward.py and sharded runs write them: bf16 or fp32, in one file or several.
"""
import pytest
import torch
from conftest import BASE, FAMILIES, FIXTURES
from safetensors.torch import load_file

from checkpoints import load_model, save_model
from data.tokenizer import adopt_template, load_tokenizer
from model import add_score_head, generate

transformers = pytest.importorskip("transformers")
MESSAGES = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Po."},
            {"role": "user", "content": "Another one, <|user|> please!"}]


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10**6])
def test_a_policy_opens_with_its_template_and_writes_the_same_reply(shard_bytes, tmp_path):
    """Ids of the rendered prompt, logits, the tokens that end a reply, and a greedy reply."""
    model, tokenizer = load_model(BASE, torch.float32), load_tokenizer(BASE)
    adopt_template(model, tokenizer, "zephyr")
    save_model(model, tmp_path / "policy", tokenizer, shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "policy").glob("*.safetensors"))) == 1) == (shard_bytes > 10**9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    messages = [message | {"content": message["content"].replace("<|user|> ", "")} for message in MESSAGES]
    ids = tokenizer.render(messages, add_generation_prompt=True)[0]
    read = reader.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(read) == list(ids)
    with torch.no_grad():
        assert (theirs(torch.tensor([ids])).logits - model(torch.tensor([ids]))).abs().max() < 1e-3
    stops = theirs.generation_config.eos_token_id
    assert set([stops] if isinstance(stops, int) else stops) == set(tokenizer.stop_ids())
    (sample,), = generate(model, [list(ids)], 20, temperature=0.0, stop_ids=tokenizer.stop_ids())
    written = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids):].tolist()
    assert written == sample.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_and_a_reward_model_of_every_family_compute_the_same(family, tmp_path):
    """bf16 on disk, fp32 in memory. A score there has the constant that we take off."""
    ids = load_file(FIXTURES / "models" / family / "expected.safetensors")["full.input_ids"]
    for scored in (False, True):
        model, folder = load_model(FIXTURES / "models" / family), tmp_path / str(scored)
        save_model(add_score_head(model, 0) if scored else model, folder, load_tokenizer(FIXTURES / "models" / family),
                   dtype=torch.bfloat16)
        ours = load_model(folder, torch.float32)
        kind = transformers.AutoModelForSequenceClassification if scored else transformers.AutoModelForCausalLM
        theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            if scored:
                gap = theirs(ids).logits[:, 0] - ours.score(ids) - ours.config.score_mean
            else:
                gap = theirs(ids).logits - ours(ids)
        assert gap.abs().max() < 1e-3, (family, scored)
