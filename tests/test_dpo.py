import math
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, exits, kill_after, metrics_of, reference, small_model, step_gradients, write_jsonl
from safetensors.torch import load_file
from test_pack import paths, random_tree

import dpo
import runtime
from data.pack import pack
from data.tiny.world import TASKS, dialogue
from data.trees import Response, Tree
from dpo import (
    RELATIVES,
    Config,
    cdpo_loss,
    compute_reference,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    log_odds,
    orpo_loss,
    robust_loss,
    simpo_loss,
    train_step,
)

CPU = torch.device("cpu")


def pairs_file(path, count, turns=1):
    """Rated dialogues of the tiny world: careful replies chosen over sloppy ones."""
    rng, records = random.Random(0), []
    while len(records) < count:
        record = dialogue(rng, long=float(turns > 1))
        history = []
        for turn in record["turns"][:turns]:
            history = [*history, {"role": "user", "content": turn["user"]}]
            chosen, rejected = (TASKS[record["category"]].answer(turn["item"], style, rng)
                                for style in ("careful", "sloppy"))
            if chosen != rejected:
                records.append({"prompt": history, "chosen": chosen, "rejected": rejected, "margin": 2})
            history = [*history, {"role": "assistant", "content": chosen}]
    return write_jsonl(path, records[:count])


# -------------------------------------------------------------------------------------- the losses

def four(values=None):
    values = values or torch.randn(4, 6, dtype=torch.float64).mul(20).unbind()
    return [v.clone().requires_grad_(i < 2) for i, v in enumerate(values)]


def test_policy_equal_to_reference_scores_log_2_with_accuracy_0_and_gradient_half_beta():
    chosen, rejected = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, metrics = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and metrics["accuracy"] == 0 and metrics["margin"] == 0
    assert torch.allclose(chosen.grad, torch.full((5,), -0.05 / 5, dtype=torch.float64))
    assert torch.allclose(rejected.grad, -chosen.grad)


def test_values_by_hand():
    """beta 0.1. h = 10 is a margin of 1: log(1 + e^-1) = 0.313262; h = -10: 1.313262.

    cDPO(0.1) at 10: 0.9 * 0.313262 + 0.1 * 1.313262. IPO wants h = 1 / (2 * 0.1) = 5: 25 at h = 0, 0 at h = 5.
    Hinge: 1 at 0, 0 from h = 10 on. Robust at 0: (0.9 - 0.1) log 2 / 0.8.
    """
    def at(h):
        return [torch.tensor([float(x)], dtype=torch.float64) for x in (h, 0, 0, 0)]

    assert dpo_loss(*at(10), 0.1)[0].item() == pytest.approx(0.313262, abs=1e-6)
    assert dpo_loss(*at(-10), 0.1)[0].item() == pytest.approx(1.313262, abs=1e-6)
    def relative(loss, h):  # of the margin m = beta h
        return loss(torch.tensor([0.1 * h], dtype=torch.float64), 0.1, 0.1).item()

    assert relative(cdpo_loss, 10) == pytest.approx(0.413262, abs=1e-6)
    assert relative(ipo_loss, 0) == pytest.approx(25) and relative(ipo_loss, 5) == pytest.approx(0)
    assert relative(hinge_loss, 0) == 1 and relative(hinge_loss, 12) == 0
    assert relative(robust_loss, 0) == pytest.approx(math.log(2))


def without_reference(name, chosen, rejected, lengths, beta, setting=0.0):
    """A relative's loss and metrics for sums of log-probabilities and lengths of the chosen and the rejected."""
    scores = [RELATIVES[name].score(sums, n) for sums, n in zip((chosen, rejected), lengths, strict=True)]
    assert not RELATIVES[name].reference
    return dpo_loss(*scores, torch.zeros_like(chosen), torch.zeros_like(rejected), beta, RELATIVES[name].loss, setting)


def test_simpo_by_hand():
    """beta 2, gamma 0.5. -4 nats over 4 tokens against -9 over 3: margin 2 (-1 + 3) = 4, log(1 + e^-3.5) = 0.029750.

    Sums alone would say 10. The gradient of a sum is -sigmoid(-3.5) beta / length = -0.029312 * 2 / 4.
    """
    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-4.0, -9.0))
    lengths = torch.tensor([[4], [3]])
    loss, metrics = without_reference("simpo", chosen, rejected, lengths, 2.0, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.029750, abs=1e-6) and metrics["margin"] == pytest.approx(4)
    assert chosen.grad.item() == pytest.approx(-0.014656, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.019542, abs=1e-6)
    assert simpo_loss(torch.tensor([0.5]), 2.0, 0.5).item() == pytest.approx(math.log(2))  # leads by gamma


def test_orpo_by_hand():
    """p = 1/2 a token has odds 1, p = 1/5 odds 1/4: their ratio is 4, -log(4 / 5) = 0.223144, times lambda 0.1.

    Equal odds give 0.1 log 2. A certain reply has large odds, and a gradient.
    """
    lengths = torch.tensor([[3], [2]])
    half, fifth = (n * torch.tensor([math.log(p)], dtype=torch.float64) for n, p in ((3, 0.5), (2, 0.2)))
    assert log_odds(half, lengths[0]).item() == pytest.approx(0, abs=1e-12)
    assert log_odds(fifth, lengths[1]).item() == pytest.approx(math.log(1 / 4))
    loss, metrics = without_reference("orpo", half, fifth, lengths, 0.1)
    assert loss.item() == pytest.approx(0.0223144, abs=1e-7)
    assert metrics["margin"].item() == pytest.approx(0.1 * math.log(4))
    assert orpo_loss(torch.zeros(1), 0.1, 0.0).item() == pytest.approx(0.1 * math.log(2))
    extremes = torch.tensor([0.0, -1e-9, -1e4], requires_grad=True)
    odds = log_odds(extremes, torch.ones(3))
    odds.sum().backward()
    assert torch.isfinite(odds).all() and torch.isfinite(extremes.grad).all() and odds[0] > 10 > -100 > odds[2]


@pytest.mark.parametrize("name, beta, gamma", [("simpo", 2.0, 1.0), ("orpo", 0.1, 0.0)])
def test_simpo_and_orpo_equal_trl(name, beta, gamma):
    numbers, _ = reference("dpo/relatives")
    lengths = torch.tensor([numbers["lengths"]["chosen"], numbers["lengths"]["rejected"]])
    sums = [torch.tensor(numbers["sums"][side], requires_grad=True) for side in ("chosen", "rejected")]
    loss, metrics = without_reference(name, *sums, lengths, beta, gamma)
    loss.backward()
    expected = numbers[name]
    assert loss.item() == pytest.approx(torch.tensor(expected["losses"]).mean().item(), rel=1e-5)
    for ours, side, length in zip(sums, ("chosen", "rejected"), lengths, strict=True):
        theirs = torch.tensor(expected[f"grad_mean_{side}"])  # of the losses' sum, by the mean over a reply's tokens
        assert torch.allclose(ours.grad, theirs / length / 4, rtol=1e-4, atol=1e-7)
    if name == "simpo":
        assert metrics["rewards_chosen"].item() == pytest.approx(torch.tensor(expected["rewards_chosen"]).mean().item())
    else:
        assert metrics["margin"].item() == pytest.approx(beta * expected["log_odds_ratio"], rel=1e-5)


@pytest.mark.parametrize("name, relative, label_smoothing", [
    ("sigmoid", None, 0.0), ("sigmoid_beta2", None, 0.0), ("cdpo", cdpo_loss, 0.1), ("robust", robust_loss, 0.1),
    ("hinge", hinge_loss, 0.0), ("ipo_sum", ipo_loss, 0.0),
])
def test_losses_rewards_and_gradients_equal_trl(name, relative, label_smoothing):
    numbers, case = reference("dpo/losses")
    beta = numbers["configs"][name]["beta"]
    keys = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    inputs = four([case[k] for k in keys])
    total, metrics = dpo_loss(*inputs, beta, relative, label_smoothing)
    total.backward()
    assert total.item() == pytest.approx(case[f"{name}.losses"].mean().item(), rel=1e-6)
    rows = zip(*(x.detach() for x in inputs), strict=True)
    for row, expected in zip(rows, case[f"{name}.losses"].tolist(), strict=True):
        alone, _ = dpo_loss(*(x[None] for x in row), beta, relative, label_smoothing)
        assert alone.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for x, side in zip(inputs, ("chosen", "rejected"), strict=False):
        assert torch.allclose(x.grad, case[f"{name}.grad_{side}"], atol=1e-6)
    assert metrics["rewards_chosen"].item() == pytest.approx(case[f"{name}.chosen_rewards"].mean().item(), rel=1e-6)


def test_whole_batches_equal_trl_from_logits_to_loss():
    """Token logits in, mean loss out, for the forms of the current TRL we share, and the gradient of every logit."""
    from kernels.logprobs import linear_logprobs

    numbers, case = reference("dpo/batch")
    mask = case["completion_mask"][:, 1:].bool()
    owner = torch.arange(6)[:, None].expand_as(mask)[mask]

    def sums(logits):
        targets = case["input_ids"][:, 1:][mask]
        picked, _ = linear_logprobs(logits[:, :-1][mask], torch.eye(15, dtype=torch.float64), targets)
        return torch.zeros(6, dtype=torch.float64).index_add(0, owner, picked)

    lengths = mask.sum(1).double()
    logits = case["logits"].requires_grad_()
    policy, ref = sums(logits), sums(case["ref_logits"])
    assert torch.allclose(ref, case["ref_logps"], atol=1e-6)
    inputs = (policy[:3], policy[3:], ref[:3], ref[3:])
    means = [x / length for x, length in zip(inputs, 2 * (lengths[:3], lengths[3:]), strict=True)]
    losses = {"sigmoid": dpo_loss(*inputs, 0.1), "hinge": dpo_loss(*inputs, 0.1, hinge_loss),
              "ipo": dpo_loss(*means, 0.1, ipo_loss)}
    for name, (loss, _) in losses.items():
        assert loss.item() == pytest.approx(numbers["cases"][name]["loss"], rel=1e-6), name
    logged = numbers["cases"]["sigmoid"]["metrics"]
    for ours, theirs in (("rewards_chosen", "rewards/chosen"), ("rewards_rejected", "rewards/rejected"),
                         ("margin", "rewards/margins"), ("accuracy", "rewards/accuracies"),
                         ("logprobs_chosen", "logps/chosen"), ("logprobs_rejected", "logps/rejected")):
        assert losses["sigmoid"][1][ours].item() == pytest.approx(logged[theirs], rel=1e-6)
    losses["sigmoid"][0].backward()
    assert torch.allclose(logits.grad, case["sigmoid.grad_logits"], atol=1e-7)


@pytest.mark.parametrize("relative", [None, hinge_loss, ipo_loss, cdpo_loss, robust_loss, simpo_loss, orpo_loss])
@pytest.mark.parametrize("margin", [1500.0, -1500.0])
def test_huge_margins_stay_finite(relative, margin):
    chosen, rejected = torch.tensor([margin], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    value, _ = dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), 1.0, relative, 0.1)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()


def test_swapping_chosen_and_rejected_negates_the_margin():
    a, b, c, d = four()
    ours, swapped = dpo_loss(a, b, c, d, 0.2)[1], dpo_loss(b, a, d, c, 0.2)[1]
    assert ours["margin"].item() == pytest.approx(-swapped["margin"].item())
    assert ours["accuracy"].item() == pytest.approx(1 - swapped["accuracy"].item())


def test_a_constant_on_policy_and_reference_of_both_replies_changes_nothing():
    a, b, c, d = four()
    assert dpo_loss(a, b, c, d, 0.2)[0].item() == pytest.approx(dpo_loss(a + 3, b + 3, c + 3, d + 3, 0.2)[0].item())


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="beta is 0"):
        dpo_loss(*four(), 0)
    with pytest.raises(ValueError, match="label_smoothing is 0.5"):
        robust_loss(torch.zeros(1), 0.1, 0.5)


# ------------------------------------------------------------------------------- trees and batches

def with_references(model, trees, config):
    sums = compute_reference(model, trees, config.micro_tokens, CPU)
    for tree, part in zip(trees, sums.split([len(tree.responses) for tree in trees]), strict=True):
        tree.ref_sums = part
    return trees


def one_step(config):
    return lambda model, batch, batches: train_step(
        model, batch, config, sum(b.pairs for b in batches), dpo.chosen_tokens([t for b in batches for t in b.trees]))


def as_pairs(tree: Tree) -> list[Tree]:
    """The pairs of a tree one by one, each with its whole prompt."""
    spans = list(paths(tree))
    out = []
    for k in range(tree.pairs):
        (w, begin, _), (lost, branch, _) = (spans[i] for i, r in enumerate(tree.responses) if r.pair == k)
        responses = [Response(0, begin, len(w), 0, 0), Response(1, 0, len(lost) - branch, 0, 1)]
        out.append(Tree(w, [(branch, lost[branch:])], responses))
    return out


@pytest.mark.parametrize("loss, sft_coef", [*((loss, 0.0) for loss in RELATIVES if loss != "orpo"), ("orpo", 1.0),
                                            ("dpo", 0.5)])
def test_multi_turn_trees_give_the_loss_and_gradient_of_their_pairs(loss, sft_coef):
    rng = random.Random(3)
    config = Config(loss=loss, beta=0.3, micro_tokens=64, sft_coef=sft_coef)
    trees = [random_tree(rng, i) for i in range(6)]
    ref = small_model(dtype=torch.float32, seed=1, scale=5.0)
    results = []
    for form in (trees, [pair for tree in trees for pair in as_pairs(tree)]):
        policy = small_model(dtype=torch.float32, scale=5.0)
        results.append(step_gradients(policy, with_references(ref, form, config), 64, one_step(config)))
    assert sum(t.pairs for t in trees) > 6 and sum(t.tokens for t in trees) < sum(t.tokens for t in form)
    (ours, grads), (theirs, expected) = results
    for name in ("loss", "margin", "accuracy", "logprobs_chosen", "rewards_rejected"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5)
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize("changes", [{}, {"sft_coef": 0.5}, {"loss": "simpo", "sft_coef": 0.1}])
def test_one_micro_batch_or_eight_give_the_same_gradient(changes):
    """Trees with one to four pairs each: a pair, or a token of the SFT term, weighs the same in any micro-batch."""
    rng = random.Random(1)
    trees = [random_tree(rng, i) for i in range(8)]
    ref, grads = small_model(seed=1), []
    for budget in (10_000, 1, 60):
        config = Config(micro_tokens=budget, **changes)
        grads.append(step_gradients(small_model(), with_references(ref, trees, config), budget, one_step(config))[1])
    for other in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(other, grads[0], strict=True))


def test_the_sft_term_is_the_sft_loss_of_the_chosen_replies():
    """0.7 times what sft.py's step over the chosen replies gives, and its gradient, beside DPO's own."""
    import sft

    rng = random.Random(5)
    trees, ref = [random_tree(rng, i) for i in range(4)], small_model(seed=1)
    found = {coef: step_gradients(small_model(), with_references(ref, trees, Config(micro_tokens=50)), 50,
                                  one_step(Config(micro_tokens=50, sft_coef=coef))) for coef in (0.0, 0.7)}
    chosen = [Tree(t.trunk, [], [r for r in t.responses if r.segment == 0]) for t in trees]
    tokens = sum(tree.learnt for tree in chosen)
    expected, grads = step_gradients(small_model(), chosen, 50, lambda model, batch, _: sft.train_step(model, batch,
                                                                                                       tokens))
    assert found[0.7][0]["sft_loss"] == pytest.approx(expected["loss"]) and "sft_loss" not in found[0.0][0]
    assert found[0.7][0]["loss"] == pytest.approx(found[0.0][0]["loss"] + 0.7 * expected["loss"])
    for with_term, without, of_sft in zip(found[0.7][1], found[0.0][1], grads, strict=True):
        assert torch.allclose(with_term, without + 0.7 * of_sft, atol=1e-9)


@pytest.mark.parametrize("loss, beta, sft_coef", [("simpo", 2.0, 0.0), ("orpo", 0.1, 1.0)])
def test_losses_without_a_reference_are_the_same_whether_there_is_one_or_not(loss, beta, sft_coef):
    rng = random.Random(4)
    trees, found = [random_tree(rng, i) for i in range(3)], []
    config = Config(loss=loss, beta=beta, sft_coef=sft_coef)
    for form in (trees, with_references(small_model(seed=1), trees, config)):
        found.append(step_gradients(small_model(), form, 100, one_step(config)))
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))


def test_cached_reference_equals_a_live_one():
    rng = random.Random(2)
    config = Config(micro_tokens=100)
    trees = [random_tree(rng, i) for i in range(5)]
    ref, policy = small_model(seed=1), small_model()
    cached = with_references(ref, trees, config)
    for batch in pack(cached, 100):
        loss, _ = train_step(policy, batch, config, batch.pairs, dpo.chosen_tokens(batch.trees))
        live = (*batch.sides(dpo.response_sums(policy, batch)), *batch.sides(dpo.response_sums(ref, batch).detach()))
        assert loss.item() == pytest.approx(dpo_loss(*live, config.beta)[0].item(), abs=1e-6)


# -------------------------------------------------------------------------------------- the script

def config(checkpoint, tmp_path, **changes) -> Config:
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        pairs_file(data, 8)
    return Config(**({"model": str(checkpoint), "data": str(data), "out": str(tmp_path / "run"), "template": "zephyr",
                      "epochs": 1, "batch": 8, "lr": 1e-3, "warmup_ratio": 0.0, "dtype": "float32", "device": "cpu",
                      "samples": 0} | changes))


def test_eight_pairs_are_learnt(checkpoint, tmp_path):
    dpo.main(config(checkpoint, tmp_path, epochs=40, lr=5e-3))
    metrics = metrics_of(tmp_path / "run")
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and metrics[0]["accuracy"] == 0
    assert metrics[-1]["accuracy"] == 1.0 and metrics[-1]["loss"] < 0.2


@pytest.mark.parametrize("loss", RELATIVES)
def test_every_loss_runs_and_raises_the_margin(loss, checkpoint, tmp_path):
    dpo.main(config(checkpoint, tmp_path, epochs=4, loss=loss, eval_data=str(tmp_path / "pairs.jsonl"), eval_every=2,
                    sft_coef=float(loss == "orpo")))
    metrics = metrics_of(tmp_path / "run")
    assert metrics[-1]["margin"] > metrics[0]["margin"]
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-4) or not RELATIVES[loss].reference
    assert metrics[1]["eval_accuracy"] > 0


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}])
def test_a_loss_without_a_reference_computes_none(changes, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dpo, "load_reference", lambda *_: pytest.fail("it is loaded"))
    dpo.main(config(checkpoint, tmp_path, loss="simpo", beta=2.0, ref_cache=str(tmp_path / "cache"), **changes))
    assert "reference" not in capsys.readouterr().out
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run" / "ref_logprobs.safetensors").exists()


@pytest.mark.parametrize("changes", [{}, {"loss": "orpo", "beta": 0.1, "sft_coef": 1.0, "lora_rank": 4}])
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(changes, checkpoint, tmp_path):
    """Multi-turn dialogues; four steps, killed after the checkpoint at step 2 and started again."""
    pairs_file(tmp_path / "pairs.jsonl", 40, turns=4)
    straight, broken = (config(checkpoint, tmp_path, batch=4, max_steps=4, save_every=2, out=str(tmp_path / name),
                               **changes) for name in ("straight", "broken"))
    dpo.main(straight)
    (tmp_path / "broken.toml").write_text(runtime.config_toml(broken))
    command = ["dpo.py", "--config", str(tmp_path / "broken.toml")]
    kill_after(command, lambda: (tmp_path / "broken" / "state" / "step_2").exists())
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "broken")
    assert len(metrics_of(tmp_path / "broken")) == 4
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_shared_cache_is_used_and_refused_when_anything_has_changed(checkpoint, tmp_path, capsys):
    cache = str(tmp_path / "cache.safetensors")
    dpo.main(config(checkpoint, tmp_path, ref_cache=cache, out=str(tmp_path / "a")))
    assert "written to" in capsys.readouterr().out
    dpo.main(config(checkpoint, tmp_path, ref_cache=cache, beta=0.5, out=str(tmp_path / "b")))
    assert "written to" not in capsys.readouterr().out
    a, b = ([m["loss"] for m in metrics_of(tmp_path / name)] for name in ("a", "b"))
    assert a == pytest.approx(b)

    def refused(said, name, **changes):
        changed = config(checkpoint, tmp_path, out=str(tmp_path / name), **({"ref_cache": cache} | changes))
        exits(capsys, lambda: dpo.main(changed), said)

    refused("computed from another data, template", "c", template="plain")
    refused("computed from another reference", "d", ref_model=str(tmp_path / "a" / "model"))
    refused("computed from another precision", "g", dtype="bfloat16")
    pairs_file(tmp_path / "pairs.jsonl", 7)
    refused("computed from another data", "e")
    (tmp_path / "junk").write_bytes(b"junk")
    refused("is no cache", "f", ref_cache=str(tmp_path / "junk"))


def test_changed_data_or_model_refuse_to_continue_a_run(checkpoint, tmp_path, capsys):
    done = config(checkpoint, tmp_path)
    (tmp_path / "c.toml").write_text(runtime.config_toml(done))

    def again():
        return subprocess.run([sys.executable, "dpo.py", "--config", str(tmp_path / "c.toml")], cwd=ROOT,
                              capture_output=True, text=True)

    assert again().returncode == 0
    pairs_file(tmp_path / "pairs.jsonl", 7)
    refused = again()
    assert refused.returncode == 2 and "its data has changed since the run began" in refused.stderr


@pytest.mark.parametrize("changes, said", [
    ({"beta": 0.0}, ["beta is 0, expected at least 1e-06"]),
    ({"label_smoothing": 0.5}, ["label_smoothing is 0.5, expected between 0 and 0.499"]),
    ({"model": "none"}, ["none"]),
    ({"data": "none.jsonl"}, ["none.jsonl: no such file"]),
    ({"max_length": 2}, ["every prompt is longer than max_length=2"]),
    ({"ref_model": "none"}, ["none: no such folder"]),
    ({"ref_model": "none", "loss": "simpo"}, ["ref_model is none, but loss=simpo has no reference"]),
    ({"loss": "orpo"}, ["sft_coef is 0", "set sft_coef=1"]),
    ({"loss": "dop"}, ["loss is 'dop', expected 'dpo' or"]),
    ({"sft_coef": -1.0}, ["sft_coef is -1, expected at least 0"]),
])
def test_what_the_user_wrote_wrong_is_one_line(changes, said, checkpoint, tmp_path, capsys):
    exits(capsys, lambda: dpo.main(config(checkpoint, tmp_path, **changes)), *said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_dialogues_without_pairs_are_one_line(checkpoint, tmp_path, capsys):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"messages": messages}])
    exits(capsys, lambda: dpo.main(config(checkpoint, tmp_path, data=str(data))), "holds no preference pairs")


def test_a_cache_of_another_quantisation_is_refused(checkpoint, tmp_path, capsys):
    """The reference is the policy's own frozen base: in four bits it says something else than in sixteen."""
    def run(name, **changes):
        dpo.main(config(checkpoint, tmp_path, ref_cache=str(tmp_path / "cache.safetensors"), lora_rank=4,
                        out=str(tmp_path / name), **changes))

    run("a")
    capsys.readouterr()
    exits(capsys, lambda: run("b", quantize="nf4"), "was computed from another quantize")
    run("c")
    assert "written to" not in capsys.readouterr().out


def test_a_named_reference_is_whole_whatever_the_policy_is(checkpoint, tmp_path, capsys):
    """ref_model is loaded without adapters and unquantised: its sums serve both."""
    for name, quantize in (("a", "none"), ("b", "nf4")):
        dpo.main(config(checkpoint, tmp_path, ref_cache=str(tmp_path / "cache.safetensors"), lora_rank=4,
                        ref_model=str(checkpoint), quantize=quantize, out=str(tmp_path / name)))
    assert capsys.readouterr().out.count("written to") == 1


def test_pairs_equal_after_rendering_and_cutting_are_dropped_and_counted(checkpoint, tmp_path, capsys):
    """The first pair differs only behind max_length; under llama-2, which trims, so does none in white space."""
    same = "one two three four five " * 20
    cut = {"prompt": "Count on.", "chosen": same + "end", "rejected": same + "stop"}
    file = write_jsonl(tmp_path / "cut.jsonl", [cut, {"prompt": "Say hi.", "chosen": "Hi!", "rejected": "Go."}])
    dpo.main(config(checkpoint, tmp_path, data=str(file), max_length=40))
    assert "1 dialogues, 1 pairs" in (said := capsys.readouterr().out) and "1 pairs of equal replies" in said
    assert metrics_of(tmp_path / "run")[0]["pairs"] == 1
    write_jsonl(file, [{"prompt": "Say hi.", "chosen": "Hi there!", "rejected": "Hi there! "}])
    exits(capsys, lambda: dpo.main(config(checkpoint, tmp_path, data=str(file), template="llama-2",
                                          out=str(tmp_path / "b"))), "cut.jsonl: the replies of its pairs are equal")
