import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, exits, kill_after, metrics_of, reference, small_model, step_gradients, write_jsonl
from safetensors.torch import load_file
from test_dpo import pairs_file, with_references
from test_pack import paths, random_tree

import kto
import runtime
import sft
from data.formats import main, read_all
from data.pack import collate, pack
from data.store import Trees, flatten
from data.tokenizer import load_tokenizer
from data.trees import CHOSEN, REJECTED, Response, Tree
from dpo import response_sums
from kto import Config, count_labels, kto_loss, mismatched, reference_point, train_step

CPU = torch.device("cpu")


def labelled_file(path, count=8):
    """Every second reply is a bad one."""
    records = [{"messages": [{"role": "user", "content": f"Say it {n} times."},
                             {"role": "assistant", "content": ("so " if n % 2 else "no ") * n}], "label": n % 2 == 1}
               for n in range(1, count + 1)]
    return write_jsonl(path, records)


# -------------------------------------------------------------------------------------- the loss

def loss_of(reward, desirable, z0=0.0, beta=0.1, weights=(1.0, 1.0)):
    """The loss of one reply whose log-ratio is `reward` nats, and its gradient by the log-probability."""
    policy = torch.tensor([float(reward)], dtype=torch.float64, requires_grad=True)
    loss, metrics = kto_loss(policy, torch.zeros(1), torch.tensor([desirable]), z0, beta, *weights)
    loss.backward()
    return loss.item(), policy.grad.item(), metrics


def test_values_by_hand():
    """beta 0.1. A log-ratio of 10 nats is 1: sigmoid(-1) = 0.2689414 if desirable, sigmoid(1) = 0.7310586 if not.

    z0 = 10 takes it off: 0.5. The gradient is -+ beta sigmoid(1) sigmoid(-1) = 0.0196612, times the weight.
    """
    assert loss_of(10, True)[0] == pytest.approx(0.268941, abs=1e-6)
    assert loss_of(10, False)[0] == pytest.approx(0.731059, abs=1e-6)
    assert loss_of(10, True, z0=10)[0] == loss_of(10, False, z0=10)[0] == pytest.approx(0.5)
    assert loss_of(10, True)[1] == pytest.approx(-0.0196612, abs=1e-7)
    assert loss_of(10, False)[1] == pytest.approx(0.0196612, abs=1e-7)
    assert loss_of(10, True, weights=(3.0, 1.0))[:2] == pytest.approx((0.806824, -0.0589836), abs=1e-6)
    assert loss_of(10, False, weights=(3.0, 0.5))[:2] == pytest.approx((0.365529, 0.0098306), abs=1e-6)


def test_policy_equal_to_reference_scores_one_half_with_accuracy_0():
    logprobs = torch.randn(6)
    loss, metrics = kto_loss(logprobs, logprobs, torch.tensor([True, False] * 3), 0.0, 0.3)
    assert loss == 0.5 and metrics["accuracy"] == metrics["margin"] == 0


def test_the_other_labels_give_one_less_the_loss_and_the_negated_margin():
    policy, ref, desirable = torch.randn(7), torch.randn(7), torch.rand(7) > 0.5
    a, b = (kto_loss(policy, ref, labels, 1.5, 0.2) for labels in (desirable, ~desirable))
    assert a[0].item() == pytest.approx(1 - b[0].item()) and a[1]["margin"].item() == pytest.approx(-b[1]["margin"])


def test_losses_far_away_stay_finite_and_saturate():
    for reward, desirable, loss in ((1e4, True, 0), (-1e4, True, 1), (1e4, False, 1), (-1e4, False, 0)):
        assert loss_of(reward, desirable)[:2] == (loss, 0)


def test_beta_0_is_refused():
    with pytest.raises(ValueError, match="beta is 0"):
        kto_loss(torch.zeros(1), torch.zeros(1), torch.tensor([True]), 0.0, 0.0)


@pytest.mark.parametrize("case", reference("dpo/relatives")[0]["kto"], ids=["kl above 0", "kl below 0"])
def test_loss_and_gradient_equal_trl(case):
    policy, ref, mismatched_policy, mismatched_ref = (
        torch.tensor(case[key]) for key in ("policy", "ref", "policy_mismatched", "ref_mismatched"))
    policy.requires_grad_()
    z0 = max(0.0, (mismatched_policy - mismatched_ref).mean().item())
    loss, _ = kto_loss(policy, ref, torch.tensor(case["label"]), z0, 0.1, 1.2, 0.8)
    loss.backward()
    assert z0 == pytest.approx(case["kl"], rel=1e-5) and loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert torch.allclose(policy.grad, torch.tensor(case["grad_policy"]), rtol=1e-4, atol=1e-7)


# -------------------------------------------------------------------------------------- the data

def loaded(path, max_length=512, capsys=None):
    tokenizer = load_tokenizer("data/tiny/base")
    tokenizer.adopt("zephyr")
    return kto.load_data(str(path), tokenizer, Config(max_length=max_length, cache=""), "data"), tokenizer


def test_a_label_speaks_of_the_last_reply(tmp_path, capsys):
    """Read from messages and from prompt and completion; earlier replies are context."""
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    trees, tokenizer = loaded(write_jsonl(tmp_path / "a.jsonl", [
        {"messages": said, "label": False}, {"prompt": "Hi", "completion": "Yes.", "label": True}]))
    assert "1 desirable and 1 undesirable" in capsys.readouterr().out
    assert [(r.side, r.turn) for tree in trees for r in tree.responses] == [(REJECTED, 2), (CHOSEN, 1)]
    assert [tokenizer.decode(tree.reply(tree.responses[0]).tolist()).strip() for tree in trees] == ["No.", "Yes."]
    assert all(len(tree.trunk) == tree.responses[0].end and tree.pairs == 1 for tree in trees)


def test_a_preference_is_one_reply_of_each_kind(tmp_path):
    trees, _ = loaded(pairs_file(tmp_path / "pairs.jsonl", 12, turns=3))
    assert count_labels(trees) == {CHOSEN: 12, REJECTED: 12} and len(trees) < 12


@pytest.mark.parametrize("records, said", [
    ([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 2,
     "d.jsonl record 1: has no 'label', expected true or false"),
    ([{"text": "Anything."}] * 2, "holds text records, expected replies with a 'label'"),
    ([{"prompt": "Hi", "answers": ["a", "b"], "ranks": [0, 1]}] * 2, "holds ranking records, expected"),
    ([{"prompt": "Hi"}] * 2, "holds prompts without replies"),
    ([{"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}], "holds one dialogue, expected at least 2"),
    ([{"prompt": "Hi", "completion": "Go", "label": False}, {"prompt": "Hi", "completion": "", "label": False}],
     "--labels --out good.jsonl` keeps the others"),
])
def test_other_data_are_one_line(records, said, tmp_path, capsys):
    exits(capsys, lambda: loaded(write_jsonl(tmp_path / "d.jsonl", records)), said)


def test_what_imitates_refuses_what_kto_learns_from(tmp_path, capsys, monkeypatch):
    """And the command that cleans a file keeps both kinds for kto.py."""
    file = labelled_file(tmp_path / "d.jsonl")
    assert count_labels(loaded(file)[0]) == {CHOSEN: 4, REJECTED: 4}
    exits(capsys, lambda: sft.main(sft.Config(model="data/tiny/base", data=str(file), device="cpu", template="zephyr",
                                              out=str(tmp_path / "run"))), "4 of its 8 dialogues are labelled false")
    monkeypatch.setattr("sys.argv", ["formats", str(file), "--labels", "--out", str(tmp_path / "good.jsonl")])
    main()
    assert "labelled false" in (said := capsys.readouterr().out) and "left out" not in said
    assert count_labels(loaded(tmp_path / "good.jsonl")[0]) == {CHOSEN: 4, REJECTED: 4}
    monkeypatch.setattr("sys.argv", ["formats", str(file), "--out", str(tmp_path / "true.jsonl")])
    main()
    assert len(read_all(tmp_path / "true.jsonl")) == 4


def test_a_cache_of_labelled_replies_is_not_one_of_imitated_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.store.SMALL", 1)
    file, tokenizer = labelled_file(tmp_path / "d.jsonl"), load_tokenizer("data/tiny/base")
    tokenizer.adopt("zephyr")
    config = Config(cache=str(tmp_path / "cache"))
    assert len(kto.load_data(str(file), tokenizer, config, "data")) == 8
    exits(capsys, lambda: kto.load_trees(str(file), tokenizer, 512, cache=config.cache), "labelled false")


# ------------------------------------------------------------------------------- the reference point

def as_trees(trees: list[Tree]) -> Trees:
    return Trees(*flatten(trees), {})


def test_every_prompt_is_followed_by_the_replies_of_another_tree():
    """Random trees and limits: as many as replies, behind the same prompts, each a reply of one other, maybe cut."""
    for seed in range(20):
        rng = random.Random(seed)
        trees = as_trees([random_tree(rng, i) for i in range(rng.randint(2, 6))])
        limit = max(begin for tree in trees for _, begin, _ in paths(tree)) + rng.randint(1, 4)
        found, replies = mismatched(trees, limit), [{tree.reply(r).tobytes() for r in tree.responses} for tree in trees]
        assert len(found) == len(trees)
        for i, (tree, other) in enumerate(zip(trees, found, strict=True)):
            assert other.record == tree.record and len(other.responses) == len(other.leaves) == len(tree.responses)
            for (path, begin, _), (seen, branch, _) in zip(paths(tree), paths(other), strict=True):
                assert begin == branch and np.array_equal(path[:begin], seen[:branch]) and branch < len(seen) <= limit
            heard = [other.reply(r).tobytes() for r in other.responses]
            cut = [len(path) == limit for path, _, _ in paths(other)]
            assert any(all(text in of or short and any(whole.startswith(text) for whole in of)
                           for text, short in zip(heard, cut, strict=True))
                       for k, of in enumerate(replies) if k != i)
        again = mismatched(trees, limit)
        assert again.digest == found.digest
        batch = collate(list(found))  # fits together as a batch does
        assert batch.pairs == len(found.responses)


def test_every_tree_gives_to_one_other():
    trees = as_trees([Tree(np.array([1, i, i], np.int32), [], [Response(0, 1, 3)], i) for i in range(2, 40)])
    given = Counter(int(tree.leaves[0][1][0]) for tree in mismatched(trees, 10))
    assert given == dict.fromkeys(range(2, 40), 1)


def test_the_reference_point_by_brute_force():
    """The mean of log-ratios of paths one by one, whatever the micro-batches, and 0 where that is negative."""
    rng = random.Random(0)
    trees = mismatched(as_trees([random_tree(rng, i) for i in range(5)]), 100)
    ref, policy, config = small_model(seed=1), small_model(), Config(micro_tokens=40)
    trees = with_references(ref, list(trees), config)
    ratios = []
    for tree in trees:
        for path, begin, _ in paths(tree):
            alone = collate([Tree(path, [], [Response(0, begin, len(path))])])
            ratios.append((response_sums(policy, alone) - response_sums(ref, alone)).item())
    expected = sum(ratios) / len(ratios)
    for budget in (40, 1, 10_000):
        found = reference_point(policy, trees, Config(micro_tokens=budget), CPU)
        assert found == pytest.approx(max(0, expected), abs=1e-4)
    swapped = with_references(policy, trees, config)
    backwards = reference_point(ref, swapped, config, CPU)
    assert backwards == pytest.approx(max(0, -expected), abs=1e-4) and {found > 0, backwards > 0} == {True, False}
    assert reference_point(policy, swapped, config, CPU) == pytest.approx(0, abs=1e-4)


def test_the_reference_point_has_no_gradient():
    """The step's gradient is that of the loss with a constant in its place."""
    rng = random.Random(1)
    plain = as_trees([random_tree(rng, i) for i in range(4)])
    ref, policy, config = small_model(seed=1), small_model(), Config(beta=0.02)
    trees, beside = (with_references(ref, list(of), config) for of in (plain, mismatched(plain, 100)))
    z0 = reference_point(policy, beside, config, CPU)
    assert all(p.grad is None for p in policy.parameters())
    batch = collate(trees)
    loss, _ = train_step(policy, batch, config, z0, count_labels(trees))
    sums = response_sums(policy, batch)
    rewards = 0.02 * (sums - torch.cat([tree.ref_sums for tree in trees]) - torch.tensor(z0))
    by_hand = torch.sigmoid(torch.where(batch.side == CHOSEN, -rewards, rewards)).mean()
    ours = torch.autograd.grad(loss, list(policy.parameters()))
    expected = torch.autograd.grad(by_hand, list(policy.parameters()))
    assert loss.item() == pytest.approx(by_hand.item()) and any(g.abs().max() > 1e-6 for g in ours)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(ours, expected, strict=True))


def test_one_micro_batch_or_eight_give_the_same_gradient():
    rng = random.Random(1)
    config = Config(beta=0.02, desirable_weight=1.3)
    trees = with_references(small_model(seed=1), [random_tree(rng, i) for i in range(8)], config)
    labels, found = count_labels(trees), []
    for budget in (10_000, 1, 60):
        found.append(step_gradients(small_model(), trees, budget,
                                    lambda model, batch, _: train_step(model, batch, config, 0.7, labels)))
    for metrics, grads in found[1:]:
        assert metrics == pytest.approx(found[0][0])
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(grads, found[0][1], strict=True))
    sums = torch.cat([response_sums(small_model(), batch)[batch.side == REJECTED] for batch in pack(trees, 60)])
    assert found[0][0]["logprobs_undesirable"] == pytest.approx(sums.mean().item())


# -------------------------------------------------------------------------------------- the script

def config(checkpoint, tmp_path, **changes) -> Config:
    data = tmp_path / "data.jsonl"
    if not data.exists():
        labelled_file(data)
    return Config(**({"model": str(checkpoint), "data": str(data), "out": str(tmp_path / "run"), "template": "zephyr",
                      "epochs": 1, "batch": 8, "lr": 1e-3, "warmup_ratio": 0.0, "dtype": "float32", "device": "cpu",
                      "samples": 0} | changes))


@pytest.mark.parametrize("changes, loss", [({"lr": 5e-3}, 0.2), ({"lora_rank": 8, "lr": 2e-2}, 0.4)])
def test_eight_labels_are_learnt(changes, loss, checkpoint, tmp_path):
    kto.main(config(checkpoint, tmp_path, epochs=40, eval_data=str(tmp_path / "data.jsonl"), **changes))
    metrics = metrics_of(tmp_path / "run")
    assert metrics[0]["loss"] == pytest.approx(0.5, abs=1e-5) and metrics[0]["accuracy"] == metrics[0]["z0"] == 0
    assert metrics[-1]["accuracy"] == metrics[-1]["eval_accuracy"] == 1 and metrics[-1]["loss"] < loss
    assert metrics[-1]["logprobs_desirable"] > metrics[0]["logprobs_desirable"]
    assert metrics[-1]["logprobs_undesirable"] < metrics[0]["logprobs_undesirable"]
    assert all(math.isfinite(m["loss"]) and m["z0"] >= 0 for m in metrics)


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(checkpoint, tmp_path):
    """Pairs of several turns; four steps, killed after the checkpoint at step 2 and started again."""
    pairs_file(tmp_path / "data.jsonl", 40, turns=4)
    straight, broken = (config(checkpoint, tmp_path, batch=4, max_steps=4, save_every=2, out=str(tmp_path / name))
                        for name in ("straight", "broken"))
    kto.main(straight)
    (tmp_path / "broken.toml").write_text(runtime.config_toml(broken))
    command = ["kto.py", "--config", str(tmp_path / "broken.toml")]
    kill_after(command, lambda: (tmp_path / "broken" / "state" / "step_2").exists())
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "broken")
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a) and len(metrics_of(tmp_path / "broken")) == 4


def test_seeds_share_one_file_of_reference_logprobs(checkpoint, tmp_path, capsys):
    """Which prompts and replies are mismatched depends on the file alone."""
    for seed in (0, 1):
        kto.main(config(checkpoint, tmp_path, seed=seed, out=str(tmp_path / str(seed)),
                        ref_cache=str(tmp_path / "cache")))
    assert capsys.readouterr().out.count("written to " + str(tmp_path / "cache")) == 1


@pytest.mark.parametrize("changes, said", [
    ({"beta": 0.0}, "beta is 0, expected at least 1e-06"),
    ({"desirable_weight": -1.0}, "desirable_weight is -1, expected at least 0"),
    ({"ref_model": "none"}, "none: no such folder"),
    ({"max_length": 2}, "holds no token to learn within max_length=2"),
])
def test_what_the_user_wrote_wrong_is_one_line(changes, said, checkpoint, tmp_path, capsys):
    exits(capsys, lambda: kto.main(config(checkpoint, tmp_path, **changes)), said)


def test_a_dry_run_says_what_kto_will_read(checkpoint, tmp_path, capsys):
    kto.main(config(checkpoint, tmp_path, dry_run=True))
    said = capsys.readouterr().out
    assert "4 desirable and 4 undesirable replies" in said and "1 steps of 8 dialogues" in said
