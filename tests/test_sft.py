import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FIXTURES, ROOT, exits, kill_after, metrics_of, reference, small_model, step_gradients, write_jsonl
from safetensors.torch import load_file

import runtime
import sft
from checkpoints import load_model
from data.pack import pack
from data.tiny.world import demonstrate, dialogue
from data.tokenizer import load_tokenizer
from data.trees import Response, Tree
from kernels.layout import Layout
from kernels.logprobs import linear_logprobs
from sft import Config, sft_loss, train_step

STARCODER = FIXTURES / "models" / "gpt_bigcode"


def demos(path, count, seed=0):
    import random

    rng = random.Random(seed)
    return write_jsonl(path, [{"messages": demonstrate(dialogue(rng), rng, "careful")} for _ in range(count)])


# ---------------------------------------------------------------------------------------- the loss

def test_loss_by_hand():
    """Three tokens of probability 1/2, 1/4, 1/8 and a step of 6 tokens: (1 + 2 + 3) log 2 / 6 = 0.6931."""
    loss, metrics = sft_loss(torch.tensor([0.5, 0.25, 0.125]).log(), 6)
    assert loss.item() == pytest.approx(0.693147, abs=1e-6) and metrics["loss"] == loss


def test_accumulated_micro_batches_give_the_loss_and_gradient_of_transformers():
    """The fixture's right answer is 3.7644; the mean of micro-batch means would be 3.8400."""
    numbers, case = reference("sft/grad_accumulation")
    logits, labels = case["logits"].requires_grad_(), case["labels"]
    total = 0.0
    for rows in numbers["micro_batches"]:
        # position t predicts label t + 1
        keep = labels[rows, 1:] != -100
        logprobs, _ = linear_logprobs(logits[rows, :-1][keep], torch.eye(logits.shape[-1]), labels[rows, 1:][keep])
        loss, _ = sft_loss(logprobs, numbers["num_loss_tokens"])
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(numbers["full_batch_loss"], abs=1e-5)
    assert torch.allclose(logits.grad, case["grad_logits"], atol=1e-6)


def one_step(model, batch, batches):
    return train_step(model, batch, sum(len(b.owner) for b in batches))


def unequal_trees():
    torch.manual_seed(0)
    lengths = [(5, 2), (9, 4), (14, 3), (6, 1), (20, 12), (7, 2), (8, 6), (11, 5)]
    return [Tree(torch.randint(0, 40, (n,)).int().numpy(), [], [Response(0, n - r, n)]) for n, r in lengths]


def test_one_micro_batch_or_eight_give_the_same_gradient():
    """Budgets of 80, 1 and 34 tokens make 1, 8 and 3 micro-batches of the same eight dialogues."""
    trees, grads = unequal_trees(), []
    for budget, count in ((80, 1), (1, 8), (34, 3)):
        assert len(pack(trees, budget)) == count
        metrics, grad = step_gradients(small_model(), trees, budget, one_step)
        grads.append((metrics["loss"], grad))
    for loss, grad in grads[1:]:
        assert loss == pytest.approx(grads[0][0], abs=1e-9)
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(grad, grads[0][1], strict=True))


def test_six_steps_equal_the_run_of_transformers():
    """Loss, gradient norm and rate of every step and the final weights.

    Accumulation, clipping, warm-up + cosine and AdamW all take part.
    """
    numbers, arrays = reference("tiny/llama/train_run")
    model = load_model(FIXTURES / "reference" / "tiny" / "llama", dtype=torch.float32)
    optimizer = runtime.adamw(model, 1e-3, 0.0)
    for expected in numbers["log"]:
        step = expected["step"]
        trees = []
        for i in range(2 * step, 2 * step + 2):
            ids = arrays[f"ex{i}.input_ids"].int().numpy()
            trees.append(Tree(ids, [], [Response(0, numbers["prompt_lengths"][i], len(ids))]))
        lr = runtime.learning_rate(step, numbers["steps"], numbers["lr"], numbers["warmup_steps"], "cosine")
        for group in optimizer.param_groups:
            group["lr"] = lr
        metrics, _ = step_gradients(model, trees, 1, one_step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), numbers["clip"]).item()
        optimizer.step()
        optimizer.zero_grad()
        assert lr == pytest.approx(expected["lr"])
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert norm == pytest.approx(expected["grad_norm"], rel=1e-3)
    for name, parameter in model.named_parameters():
        name = name if name.startswith("lm_head") else f"model.{name}"
        assert parameter.sum().item() == pytest.approx(numbers["final_param_sums"][name], rel=1e-3, abs=2e-3)


def test_user_tokens_have_no_gradient():
    """Logits that predict a token outside the responses do not enter: their hidden states get exactly zero."""
    model = small_model()
    hidden = model.hidden(torch.arange(9), torch.arange(9), Layout.build([9])).detach().requires_grad_()
    index = torch.tensor([4, 5, 8])
    sft_loss(linear_logprobs(hidden[index - 1], model.head_weight, index)[0], 3)[0].backward()
    used = torch.zeros(9, dtype=torch.bool)
    used[index - 1] = True
    assert (hidden.grad[~used] == 0).all() and (hidden.grad[used] != 0).any()


# -------------------------------------------------------------------------------------- the script

def config(checkpoint, tmp_path, **changes) -> Config:
    data = tmp_path / "sft.jsonl"
    if not data.exists():
        demos(data, 8)
    return Config(**({"model": str(checkpoint), "data": str(data), "out": str(tmp_path / "run"), "template": "zephyr",
                      "epochs": 1, "batch": 8, "lr": 1e-2, "warmup_ratio": 0.0, "dtype": "float32", "device": "cpu",
                      "samples": 0} | changes))


def test_eight_dialogues_are_learnt_by_heart(checkpoint, tmp_path):
    sft.main(config(checkpoint, tmp_path, epochs=150))
    losses = [m["loss"] for m in metrics_of(tmp_path / "run")]
    assert losses[0] > 5 and losses[-1] < 0.05


def test_the_result_carries_tokenizer_and_template_and_loads(checkpoint, tmp_path, capsys):
    sft.main(config(checkpoint, tmp_path, samples=1, eval_data=str(demos(tmp_path / "eval.jsonl", 3, seed=1))))
    said = capsys.readouterr().out
    assert "<|user|> <|assistant|>" in said and "8 dialogues" in said and "wrote" in said

    assert load_tokenizer(tmp_path / "run" / "model").template == "zephyr"
    assert load_model(tmp_path / "run" / "model").config.vocab_size > 0
    assert metrics_of(tmp_path / "run")[-1]["eval_loss"] > 0


def test_training_on_all_tokens_and_on_the_chosen_side_of_preferences(checkpoint, tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "Tom saw a dog. The dog ran."}] * 4)
    sft.main(config(checkpoint, tmp_path, data=str(text), train_on="all", out=str(tmp_path / "text")))
    (line,) = metrics_of(tmp_path / "text")
    assert line["response_tokens"] == line["tokens"] - 4  # all but each document's first
    pair = {"prompt": "Hi", "chosen": "Hello Tom.", "rejected": "No, no, no, no."}
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair] * 2)
    sft.main(config(checkpoint, tmp_path, data=str(pairs), out=str(tmp_path / "chosen")))
    (line,) = metrics_of(tmp_path / "chosen")
    assert line["response_tokens"] == 2 * 4  # Hello, Tom, full stop, end of sequence


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(checkpoint, tmp_path):
    """Four steps; the other run is killed after its checkpoint at step 2 and started again."""
    demos(tmp_path / "sft.jsonl", 13)
    straight, broken = (config(checkpoint, tmp_path, batch=4, save_every=2, out=str(tmp_path / name))
                        for name in ("straight", "broken"))
    sft.main(straight)
    (tmp_path / "broken.toml").write_text(runtime.config_toml(broken))
    command = ["sft.py", "--config", str(tmp_path / "broken.toml")]
    kill_after(command, lambda: (tmp_path / "broken" / "state" / "step_2").exists())
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "broken")
    assert len(metrics_of(tmp_path / "broken")) == 4
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_sigterm_saves_and_leaves_with_0(checkpoint, tmp_path):
    (tmp_path / "c.toml").write_text(runtime.config_toml(config(checkpoint, tmp_path, epochs=100_000)))
    process = subprocess.Popen([sys.executable, "sft.py", "--config", str(tmp_path / "c.toml")], cwd=ROOT,
                               stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics_of(tmp_path / "run")) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    steps = len(metrics_of(tmp_path / "run"))
    assert (tmp_path / "run" / "state" / f"step_{steps}" / "state.safetensors").exists()


def test_edited_code_is_not_mixed_with_an_earlier_run(checkpoint, tmp_path):
    """An edited loss must not go on from, or quietly return, what another loss has trained."""
    for name in ("sft.py", "lora.py", "model.py", "checkpoints.py", "families.py", "runtime", "kernels", "data"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, dirs_exist_ok=True)
        else:
            shutil.copy(source, tmp_path / name)
    (tmp_path / "c.toml").write_text(runtime.config_toml(config(checkpoint, tmp_path)))
    command = [sys.executable, "sft.py", "--config", "c.toml"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    edited = (tmp_path / "sft.py").read_text().replace("loss = -logprobs.sum()", "loss = -2 * logprobs.sum()")
    (tmp_path / "sft.py").write_text(edited)
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and "its code has changed since the run began" in refused.stderr
    assert subprocess.run([*command, "overwrite=true"], cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0


def test_a_folder_with_a_model_of_other_origin_is_never_emptied(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "mine" / "model")
    exits(capsys, lambda: sft.main(config(checkpoint, tmp_path, out=str(tmp_path / "mine"))),
          "holds files that no run has written there")
    sft.main(config(checkpoint, tmp_path))
    inside = config(checkpoint, tmp_path, model=str(tmp_path / "run" / "model"), overwrite=True)
    exits(capsys, lambda: sft.main(inside), "overwrite=true would delete its own model")
    assert (tmp_path / "mine" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_finished_run_is_not_run_again(checkpoint, tmp_path):
    done = config(checkpoint, tmp_path)
    sft.main(done)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    command = [sys.executable, "sft.py", "--config", str(tmp_path / "run" / "config.toml")]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "1 steps of 8 dialogues, 1 done" in said and (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("changes, said", [
    ({"template": "zephir"}, ["template is 'zephir', expected one of alpaca, chatml"]),
    ({"batch": 0}, ["batch is 0, expected at least 1"]),
    ({"lr": 0.0}, ["lr is 0, expected between 1e-12 and 1"]),
    ({"max_steps": -1}, ["max_steps is -1, expected at least 0"]),
    ({"seed": -1}, ["seed is -1"]),
    ({"warmup_ratio": 1.5}, ["warmup_ratio is 1.5, expected between 0 and 0.99"]),
    ({"max_grad_norm": 0.0}, ["max_grad_norm is 0"]),
    ({"data": "none.jsonl"}, ["none.jsonl: no such file"]),
    ({"model": "none"}, ["none"]),
    ({"device": "cuda:99"}, ["device is 'cuda:99'"]),
    ({"max_length": 2}, ["holds no token to learn within max_length=2"]),
])
def test_what_the_user_wrote_wrong_is_one_line(changes, said, checkpoint, tmp_path, capsys):
    exits(capsys, lambda: sft.main(config(checkpoint, tmp_path, **changes)), *said)
    assert not (tmp_path / "run").exists()


def test_a_bad_line_in_the_data_is_one_line(checkpoint, tmp_path, capsys):
    with demos(tmp_path / "sft.jsonl", 5).open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    exits(capsys, lambda: sft.main(config(checkpoint, tmp_path)), "sft.jsonl line 6: 'messages' ends with a user turn")


# ----------------------------------------------------------------------------------------- the edges

def say_it(folder, script):
    """Eight records whose replies have 1 to 129 words, as pairs with ever shorter rejected ones for dpo.py."""
    words = [2**k + 1 if k else 1 for k in range(8)]
    if script == "sft":
        records = [{"messages": [{"role": "user", "content": f"Say it {n} times"},
                                 {"role": "assistant", "content": "so " * n}]} for n in words]
    else:
        records = [{"prompt": f"Say it {n} times", "chosen": "so " * n, "rejected": "no " * (130 - n)} for n in words]
    return str(write_jsonl(folder / f"{script}.jsonl", records))


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_loss_and_gradient_norm_do_not_depend_on_the_micro_batches(script, checkpoint, tmp_path):
    import dpo

    found, module = [], {"sft": sft, "dpo": dpo}[script]
    for micro_tokens in (4096, 300, 64, 1):
        module.main(module.Config(
            model=str(checkpoint), data=say_it(tmp_path, script), out=str(tmp_path / str(micro_tokens)), batch=8,
            max_steps=3, warmup_ratio=0.0, lr=1e-3, micro_tokens=micro_tokens, dtype="float32", device="cpu",
            samples=0))
        found.append([(m["loss"], m["grad_norm"]) for m in metrics_of(tmp_path / str(micro_tokens))])
    for other in found[1:]:
        for (loss, norm), (loss_0, norm_0) in zip(other, found[0], strict=True):
            assert loss == pytest.approx(loss_0, rel=1e-5) and norm == pytest.approx(norm_0, rel=1e-5)


def test_a_prompt_as_long_as_max_length_is_dropped_and_counted(checkpoint, tmp_path, capsys):
    long = {"messages": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "Hello!"}]}
    file = demos(tmp_path / "sft.jsonl", 3)
    with file.open("a") as more:
        more.write(json.dumps(long) + "\n")
    sft.main(config(checkpoint, tmp_path, max_length=100))
    assert "3 dialogues, " in (said := capsys.readouterr().out) and "dropped: 1 responses, 1 dialogues" in said
    assert all(m["loss"] == m["loss"] for m in metrics_of(tmp_path / "run"))  # no NaN
    write_jsonl(file, [long])
    exits(capsys, lambda: sft.main(config(checkpoint, tmp_path, out=str(tmp_path / "b"), max_length=100)),
          "holds no token to learn within max_length=100")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("script", ["sft", "dpo", "reward", "distill"])
def test_max_length_beyond_learned_positions_is_one_line(script, dry_run, tmp_path, capsys):
    """StarCoder's positions are learnt; the small one has 64 of them."""
    import importlib

    module = importlib.import_module(script)
    pair = {"prompt": "Hi", "chosen": "Hello! " * 100, "rejected": "No."}
    file = write_jsonl(tmp_path / "d.jsonl", [pair])
    for max_length in (65, 2048):
        exits(capsys, lambda limit=max_length: module.main(module.Config(
            model=str(STARCODER), data=str(file), out=str(tmp_path / "run"), max_length=limit, device="cpu",
            dry_run=dry_run)), "max_length", "the model has 64 positions")


def test_a_model_of_64_learned_positions_trains_on_all_of_them_and_shows_what_fits(tmp_path, capsys):
    """Its prompts leave no room for the 64 tokens of a sample: none is shown, and the run ends well."""
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! " * 100}]
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": said}])
    sft.main(Config(model=str(STARCODER), data=str(file), out=str(tmp_path / "run"), max_length=64, template="plain",
                    max_steps=1, samples=3, device="cpu", dtype="float32"))
    assert "1 dialogues, 64 tokens" in capsys.readouterr().out and (tmp_path / "run" / "model").exists()
