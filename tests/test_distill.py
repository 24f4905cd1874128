import gc
import json

import pytest
import torch
from conftest import exits, metrics_of, write_jsonl
from test_sft import demos

import distill
import sft
from checkpoints import load_model
from data.pack import pack
from data.store import load_trees
from data.tokenizer import adopt_template, load_tokenizer
from distill import Config, teacher_logits


def test_the_teachers_kl_by_hand():
    """Teacher 1/2, 1/2 and student 1/4, 3/4: KL = 1/2 log 2 + 1/2 log 2/3 = 0.1438.

    A student that agrees pays nothing.
    """
    student, teacher = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    loss, _ = distill.distillation_loss(student + 7, teacher - 3, 2)  # logits are free up to a constant
    assert loss.item() == pytest.approx(0.143841 / 2, abs=1e-6)


def test_the_teacher_reads_the_same_replies_after_the_context(checkpoint, tmp_path):
    """Its logits are those of the model on context and dialogue in one.

    Without a context they are the student's own.
    """
    path, tokenizer, model = demos(tmp_path / "sft.jsonl", 4), load_tokenizer(checkpoint), load_model(checkpoint)
    adopt_template(model, tokenizer, "zephyr")
    trees = sft.load_data(str(path), tokenizer, Config(max_length=60), "data")
    (batch,) = pack(trees, 4096)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    own = model.logits(model.hidden(batch.tokens, batch.positions, batch.layout)[batch.predictors])
    without = teacher_logits(model, batch, load_trees(str(path), tokenizer))
    assert torch.allclose(own, without, atol=1e-5)
    found = teacher_logits(model, batch, load_trees(str(path), tokenizer, before=said))
    at = 0
    for tree in batch.trees:
        messages = json.loads(path.read_text().splitlines()[tree.record])["messages"]
        ids, loss = tokenizer.render([*said, *messages])
        logits = model(torch.tensor([ids]))[0]
        learnt = [i for i, flag in enumerate(loss) if flag][loss[:len(tokenizer.render(said)[0])].count(True):]
        count = sum(r.end - r.start for r in tree.responses)
        assert torch.allclose(found[at:at + count], logits[[i - 1 for i in learnt[:count]]], atol=1e-4)
        at += count
    assert not torch.allclose(own, found, atol=1e-2)


def test_distilling_a_context_brings_the_student_to_the_teacher(tmp_path):
    """A context in which every reply is "Yes." makes the teacher expect that.

    The student learns to without reading it.
    """
    path = demos(tmp_path / "sft.jsonl", 8)
    exchange = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
    context = write_jsonl(tmp_path / "context.jsonl", [{"messages": 8 * exchange}])
    distill.main(Config(model="data/tiny/base", data=str(path), out=str(tmp_path / "run"), context=str(context),
                        epochs=10, batch=8, lr=3e-4, dtype="float32", device="cpu", samples=0))
    losses = [m["loss"] for m in metrics_of(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_another_context_is_another_run(tmp_path, capsys):
    """Its teacher would be another: the run is refused like one with other data."""
    path, context = demos(tmp_path / "sft.jsonl", 2), tmp_path / "context.jsonl"
    config = Config(model="data/tiny/base", data=str(path), out=str(tmp_path / "run"), context=str(context),
                    max_steps=1, batch=2, dtype="float32", device="cpu", samples=0)

    def distil_with(reply):
        exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}]
        write_jsonl(context, [{"messages": exchange}])
        distill.main(config)

    distil_with("Yes.")
    distil_with("Yes.")
    capsys.readouterr()
    exits(capsys, lambda: distil_with("No."), "its context has changed since the run began")
    gc.collect()
