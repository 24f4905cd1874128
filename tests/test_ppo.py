import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, exits, metrics_of, reference, small_model, write_jsonl
from safetensors.torch import load_file

import ppo
from checkpoints import load_model, save_model
from data.four_models import Models
from data.tokenizer import load_tokenizer
from data.trees import tree_from_replies
from data.vocabulary import Added
from kernels.layout import Layout
from model import Transformer, add_score_head
from ppo import (
    Config,
    Rollout,
    adapt_kl_coef,
    dr_grpo_advantages,
    find_advantages,
    gae,
    grpo_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
    rloo_advantages,
    token_rewards,
    token_weights,
    value_loss,
    whiten,
)
from runtime import distributed

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------ the equations

def test_gae_by_hand():
    """r = (0, 0, 1), v = (.5, .6, .7): gamma 1, lambda .95 -> A = (.46575, .385, .3)."""
    rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.6, 0.7]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.46575, 0.385, 0.3]]))
    torch.testing.assert_close(returns, torch.tensor([[0.96575, 0.985, 1.0]]))
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.8)[0], torch.tensor([[0.21712, 0.246, 0.3]]))


def test_lambda_1_returns_the_reward_to_go_and_lambda_0_the_td_error():
    rewards, values, mask = torch.randn(3, 5), torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0)[1], rewards.flip(1).cumsum(1).flip(1))
    following = F.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * following - values)


@pytest.mark.parametrize("setting", ["gamma1.0_lam0.95_wr0", "gamma0.99_lam0.9_wr0"])
@pytest.mark.parametrize("junk", [False, True])
def test_gae_and_whitening_equal_trl_whatever_is_behind_the_mask(setting, junk):
    _, case = reference("ppo/gae")
    mask = case["mask"].bool()
    rewards, values = (torch.where(mask, case[key], 1e6 if junk else case[key]) for key in ("rewards", "values"))
    gamma, lam = (float(part.lstrip("gamlb")) for part in setting.split("_")[:2])
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for found, name in ((advantages, "advantages"), (returns, "returns"),
                        (whiten(advantages, mask), "advantages_whitened")):
        torch.testing.assert_close(found[mask], case[f"{setting}.{name}"][mask], atol=1e-6, rtol=1e-6)


def test_whitened_rewards_equal_trl_which_whitens_the_padding_too():
    """There, padding is no longer 0 after whitening and reaches the last tokens; an all-true mask gives the same."""
    _, case = reference("ppo/gae")
    mask = case["mask"].bool()
    rewards, values = (torch.where(mask, case[key], 0.0) for key in ("rewards", "values"))
    advantages, returns = gae(whiten(rewards, mask, shift_mean=False), values, torch.ones_like(mask), 1.0, 0.95)
    for found, name in ((advantages, "advantages"), (returns, "returns")):
        torch.testing.assert_close(found[mask], case[f"gamma1.0_lam0.95_wr1.{name}"][mask], atol=1e-6, rtol=1e-6)


def test_whitening_by_hand_and_as_in_trl():
    """(1, 2, 3, 4) with unbiased variance: -+1.161895, -+0.387298."""
    x = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)
    white = whiten(x, torch.ones(1, 4, dtype=torch.bool))
    expected = torch.tensor([[-1.161895, -0.387298, 0.387298, 1.161895]], dtype=torch.float64)
    torch.testing.assert_close(white, expected, atol=1e-6, rtol=0)
    _, case = reference("ppo/whiten")
    mask = case["mask"].bool()
    for shift, name in ((True, "whiten_shift_mean"), (False, "whiten_keep_mean")):
        torch.testing.assert_close(whiten(case["x"], mask, shift)[mask], case[name][mask], atol=1e-6, rtol=1e-6)


def test_kl_estimators_by_hand_and_as_in_trl():
    """d = 0.5: k1 .5, k2 .125, k3 .106531; the mean of k3 under the policy is the exact KL."""
    d = torch.tensor([0.5], dtype=torch.float64)
    assert [f(d, 0 * d).item() for f in (kl_k1, kl_k2, kl_k3)] == pytest.approx([0.5, 0.125, 0.10653066])
    _, case = reference("ppo/kl")
    pair = case["logprobs"], case["ref_logprobs"]
    for found, name in ((kl_k1(*pair), "kl"), (kl_k2(*pair), "mse"), (kl_k3(*pair), "k3")):
        torch.testing.assert_close(found, case[f"penalty.{name}"], atol=1e-6, rtol=1e-6)
    every = case["logprobs_all"], case["ref_logprobs_all"]
    torch.testing.assert_close((every[0].exp() * kl_k3(*every)).sum(-1), case["exact_kl"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kl_coef", [0.05, 0.2])
def test_token_rewards_equal_trl(kl_coef):
    _, case = reference("ppo/rewards")
    mask = case["mask"].bool()
    found = token_rewards(case["scores"], kl_k1(case["logprobs"], case["ref_logprobs"]), mask, kl_coef)
    torch.testing.assert_close(found[mask], case[f"rewards.kl{kl_coef}"][mask], atol=1e-6, rtol=1e-6)


def test_without_kl_the_rewards_of_a_reply_sum_to_its_score():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    scores = torch.tensor([0.3, -2.0, 5.0])
    rewards = token_rewards(scores, torch.randn(3, 4), mask, 0.0)
    assert torch.equal(rewards.sum(1), scores)
    assert rewards.nonzero().tolist() == [[0, 0], [1, 1], [2, 3]]


def test_the_score_may_stand_one_past_the_end_with_a_longer_mask_as_in_torchtune():
    numbers, case = reference("ppo/two_masks")
    policy_mask, value_mask = case["policy_mask"], case["value_mask"]
    kl = torch.where(policy_mask, case["kl"], 0.0)
    rewards = token_rewards(case["scores"], kl, value_mask, numbers["kl_coeff"])
    torch.testing.assert_close(rewards[value_mask], case["rewards"][value_mask], atol=1e-6, rtol=1e-6)
    _, returns = gae(rewards, case["values"], value_mask, numbers["gamma"], numbers["lmbda"])
    torch.testing.assert_close(returns[value_mask], case["returns"][value_mask], atol=1e-6, rtol=1e-6)
    loss, metrics = policy_loss(case["new_logprobs"], case["logprobs"], case["advantages"], policy_mask,
                                numbers["epsilon"])
    assert loss.item() == pytest.approx(numbers["loss"]["policy"], abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(numbers["loss"]["clipfrac"], abs=1e-6)
    loss, _ = value_loss(case["new_values"], case["values"], case["returns"], value_mask, numbers["value_clip_range"])
    assert loss.item() == pytest.approx(numbers["loss"]["value"], abs=1e-6)


def test_policy_and_value_losses_by_hand():
    """A = 1, ratio 1.5 -> -1.2; A = -1, ratio .5 -> .8; A = -1, ratio 1.5 -> 1.5, not clipped.

    Gradient 0 just where clipped.
    """
    for advantage, ratio, expected, clipped in ((1, 1.5, -1.2, True), (-1, 0.5, 0.8, True),
                                                (-1, 1.5, 1.5, False), (1, 0.5, -0.5, False)):
        logprobs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
        one = torch.ones(1, 1, dtype=torch.float64)
        loss, metrics = policy_loss(logprobs, 0 * one, advantage * one, one, 0.2)
        loss.backward()
        assert loss.item() == pytest.approx(expected) and metrics["clip_fraction"] == clipped
        assert (logprobs.grad.item() == 0) == clipped
    loss, _ = value_loss(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[0.5]]), torch.ones(1, 1), 0.2)
    assert loss.item() == pytest.approx(0.125)


@pytest.mark.parametrize("number", [0, 1])
def test_losses_and_gradients_equal_trl(number):
    numbers, case = reference("ppo/loss")
    told = numbers["cases"][number]
    mask = case["mask"].bool()
    logprobs, values = (case[key].clone().requires_grad_() for key in ("logprobs", "vpreds"))
    surrogate, metrics = policy_loss(logprobs, case["old_logprobs"], case["advantages"], mask, told["cliprange"])
    missed, more = value_loss(values, case["values"], case["returns"], mask, told["cliprange_value"])
    (surrogate + told["vf_coef"] * missed).backward()
    assert surrogate.item() == pytest.approx(told["pg_loss"], abs=1e-6)
    assert missed.item() == pytest.approx(told["loss/value"], abs=1e-6)
    found = [metrics["clip_fraction"], metrics["approx_kl"], more["value_clip_fraction"]]
    expected = [told["policy/clipfrac"], told["policy/approxkl"], told["val/clipfrac"]]
    assert [x.item() for x in found] == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(logprobs.grad[mask], case[f"{told['key']}.grad_logprobs"][mask], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(values.grad[mask], case[f"{told['key']}.grad_vpreds"][mask], atol=1e-6, rtol=1e-6)


def test_the_adaptive_coefficient_equals_trl():
    numbers, _ = reference("ppo/adaptive_kl")
    coefficient = numbers["init_kl_coef"]
    for step in numbers["updates"]:
        coefficient = adapt_kl_coef(coefficient, step["current_kl"], step["n_steps"], numbers["target"],
                                    numbers["horizon"])
        assert coefficient == pytest.approx(step["value_after"], abs=1e-12)
    assert adapt_kl_coef(0.15, 12, 256, 6, 10_000) == pytest.approx(0.150768)


def test_rloo_compares_with_the_others_of_the_same_prompt():
    """Returns 1, 2, 6: 1 - 4, 2 - 3.5, 6 - 1.5."""
    found = rloo_advantages(torch.tensor([1.0, 2, 6, 5, 5, 5]), 3)
    torch.testing.assert_close(found, torch.tensor([-3.0, -1.5, 4.5, 0, 0, 0]))


def test_grpo_and_dr_grpo_by_hand():
    """Returns 1, 2, 6, mean 3: -2, -1, 3, whose deviation is sqrt((4 + 1 + 9) / 2) = 2.645751.

    A group of equal returns learns nothing, be it of numbers that are rounded.
    """
    returns = torch.tensor([1.0, 2, 6, 5, 5, 5, 0.1, 0.1, 0.1])
    found = dr_grpo_advantages(returns, 3)
    torch.testing.assert_close(found, torch.tensor([-2.0, -1, 3, 0, 0, 0, 0, 0, 0]))
    found = grpo_advantages(returns, 3)
    expected = torch.tensor([-0.755929, -0.377964, 1.133893, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(grpo_advantages(100 * returns[:6], 3), expected[:6], atol=1e-5, rtol=0)  # no scale


def rollout_with(scores: list[float], lengths: list[int]) -> Rollout:
    """Replies of these lengths and scores, from a policy that is still the reference and has no value model."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    zero = torch.zeros(mask.shape)
    return Rollout([], torch.tensor(scores), torch.ones(len(scores), dtype=torch.bool), mask, zero, zero, zero, zero,
                   zero)


TIES = [1.0, 0.0, 0.5, 0.5], [1, 9, 5, 5]  # two prompts: one reply of one token is better than one of nine; a tie


@pytest.mark.parametrize("advantages, expected", [
    ("rloo", [1, -1, 0, 0]), ("dr_grpo", [0.5, -0.5, 0, 0]), ("grpo", [0.707107, -0.707107, 0, 0]),
    ("reinforce", [1, 0, 0.5, 0.5]),
])
def test_replies_that_tie_are_left_alone(advantages, expected):
    """rloo: 1 - 0, 0 - 1; dr_grpo: 1 - 0.5; grpo: 0.5 / sqrt(0.5), in reinforce nothing is subtracted.

    Whitened over tokens, as rloo was, a tie got +0.67.
    """
    config = Config(advantages=advantages, n=2)
    _, found, _ = find_advantages(rollout_with(*TIES), 0.2, config)
    mask = rollout_with(*TIES).mask
    torch.testing.assert_close(found[mask], torch.tensor(expected)[:, None].expand_as(mask)[mask].float())


def test_whitening_is_a_setting_of_its_own():
    """rloo: 1, nine times -1, ten times 0: mean -0.4, unbiased deviation sqrt((1.96 + 9 * 0.36 + 10 * 0.16) / 19)."""
    _, found, _ = find_advantages(rollout_with(*TIES), 0.0, Config(advantages="rloo", n=2, whiten="on"))
    deviation = (6.8 / 19) ** 0.5
    torch.testing.assert_close(found[:, 0], torch.tensor([1.4, -0.6, 0.4, 0.4]) / deviation)
    _, found, _ = find_advantages(rollout_with(*TIES), 0.0, Config(whiten="off"))  # gae, with values of 0
    torch.testing.assert_close(found[:2, 0], torch.tensor([1.0, 0]))


def test_reinforce_sums_the_rewards_still_to_come():
    """Score 1 at the third token, KL 0.5 at the second, coefficient 0.4, gamma 0.5: 1, -0.2 + 0.5, 0.15."""
    rollout = rollout_with([1.0], [3])._replace(kl=torch.tensor([[0.0, 0.5, 0.0]]))
    _, found, returns = find_advantages(rollout, 0.4, Config(advantages="reinforce", gamma=0.5))
    torch.testing.assert_close(found, torch.tensor([[0.15, 0.3, 1.0]]))
    assert torch.equal(found, returns)


@pytest.mark.parametrize("advantages, expected", [
    ("gae", (1 * 1 - 1 * 3) / 4), ("rloo", (1 * 1 - 1 * 3) / 2), ("grpo", (1 / 1 - 3 / 3) / 2),
    ("dr_grpo", (1 * 1 - 1 * 3) / (2 * 8)),
])
def test_every_loss_divides_as_its_paper_does(advantages, expected):
    """A = 1 on a reply of one token, -1 on one of three, ratio 1, max_tokens 8: minus the sum of what they weigh."""
    lengths = torch.tensor([1, 3])
    mask = torch.arange(3) < lengths[:, None]
    weights = token_weights(advantages, lengths, 4, 2, 8)[:, None]
    sides = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    loss, metrics = policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), sides, mask, 0.2, 4, weights)
    assert loss.item() == pytest.approx(-expected, abs=1e-6) and metrics["ratio_mean"] == 1


def test_rloo_has_the_gradient_of_its_paper():
    """Mean over replies of A grad log pi(y): what autograd finds for log-probabilities summed by reply."""
    logprobs = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    rollout = rollout_with(*TIES)
    _, advantages, _ = find_advantages(rollout, 0.0, Config(advantages="rloo", n=2))
    sums = torch.where(rollout.mask, logprobs, 0.0).sum(1)
    (wanted,) = torch.autograd.grad(-(advantages[:, 0] * sums).mean(), logprobs)
    weights = token_weights("rloo", rollout.mask.sum(1), 20, 4, 64)[:, None]
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, rollout.mask, 0.2, 20, weights)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], wanted)


def test_the_gradients_of_kl_estimators_by_enumeration():
    """Fifty pairs of distributions on eight categories, every category counted by its probability.

    As a reward: E[kl grad log pi], kl without gradient. As a loss: E[grad kl].
    """
    cosines = {}
    for seed in range(50):
        made = torch.Generator().manual_seed(seed)
        logits = torch.randn(8, generator=made, dtype=torch.float64).requires_grad_()
        ref = torch.randn(8, generator=made, dtype=torch.float64).log_softmax(0)
        logprobs = logits.log_softmax(0)
        probability = logprobs.exp().detach()

        def gradient(value, logits=logits):
            return torch.autograd.grad(value, logits, retain_graph=True)[0]

        true = gradient((logprobs.exp() * (logprobs - ref)).sum())
        for name, estimator in ppo.KL.items():
            kl = estimator(logprobs, ref)
            for place, value in (("reward", kl.detach() * logprobs), ("loss", kl)):
                found = gradient((probability * value).sum())
                cosines.setdefault((name, place), []).append(F.cosine_similarity(found, true, dim=0).item())
                if (name, place) == ("k1", "loss"):
                    assert found.abs().max() < 1e-15
                if (name, place) in (("k1", "reward"), ("k2", "loss")):
                    torch.testing.assert_close(found, true)
                if (name, place) == ("k3", "loss"):
                    torch.testing.assert_close(found, gradient((ref.exp() * (ref - logprobs)).sum()))  # KL(ref || pi)
    means = {key: sum(values) / 50 for key, values in cosines.items() if key != ("k1", "loss")}
    expected = {("k1", "reward"): 1, ("k2", "reward"): 0.68, ("k3", "reward"): 0.23, ("k2", "loss"): 1,
                ("k3", "loss"): 0.86}  # as ppo.py says
    assert means == pytest.approx(expected, abs=0.005)


# ------------------------------------------------------------------------------- a whole PPO update

def token_values(model: Transformer, ids: torch.Tensor, mask: torch.Tensor, start: int) -> torch.Tensor:
    """What the value model says at the position before each response token, padded rows."""
    hidden, kept = model._hidden_of_rows(ids, mask)
    rows = torch.zeros(ids.shape, dtype=hidden.dtype).masked_scatter(kept, model.scores(hidden))
    return rows[:, start - 1 : -1]


def test_a_whole_update_equals_trl(tmp_path):
    """Rollout statistics, both inner epochs and the parameters after them.

    The score stands one past the end, as there.
    """
    folder = FIXTURES / "reference" / "ppo" / "update"
    told, case = json.loads((folder / "expected.json").read_text()), load_file(folder / "expected.safetensors")
    raw = json.loads((folder / "config.json").read_text())

    def load(name):
        path = tmp_path / name
        path.mkdir()
        (path / "model.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
        kind = "LlamaForSequenceClassification" if name in ("reward", "value") else "LlamaForCausalLM"
        (path / "config.json").write_text(json.dumps(raw | {"architectures": [kind]}))
        return load_model(path, dtype=torch.float32)

    policy, ref, reward_model, value = (load(name) for name in ("policy", "ref", "reward", "value"))
    ids, start = case["query_responses"], told["context_length"]
    responses, attend = ids[:, start:], ids != told["pad_token_id"]
    ends = [told["response_length"] - 1 if end is None else end for end in told["eos_position"]]
    last = torch.tensor(ends)
    steps = torch.arange(told["response_length"])
    policy_mask = steps <= last[:, None]
    value_mask = steps <= (last + 1).clamp(max=told["response_length"] - 1)[:, None]

    def logprobs_of(model):
        logits = model(ids, attend)[:, start - 1 : -1] / told["temperature"]
        return torch.log_softmax(logits, -1).gather(-1, responses[..., None])[..., 0]

    with torch.no_grad():
        old, ref_logprobs = logprobs_of(policy), logprobs_of(ref)
        whole = attend.clone()
        whole[:, start:] &= policy_mask
        scores = reward_model.score(ids, whole)
        torch.testing.assert_close(scores, case["scores_before_penalty"], atol=1e-4, rtol=1e-4)
        scores = scores - told["missing_eos_penalty"] * torch.tensor([end is None for end in told["eos_position"]])
        values = token_values(value, ids, attend, start)
        kl = torch.where(policy_mask, kl_k1(old, ref_logprobs), 0.0)
        rewards = token_rewards(scores, kl, value_mask, told["kl_coef"])
        advantages, returns = gae(rewards, values, value_mask, told["gamma"], told["lam"])
        old_values = torch.where(value_mask, values, 0.0)
    torch.testing.assert_close(old, case["rollout_logprobs"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores, case["scores"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(advantages[policy_mask], case["advantages"][policy_mask], atol=1e-4, rtol=1e-4)
    white = whiten(advantages, policy_mask)
    torch.testing.assert_close(white[policy_mask], case["advantages_whitened"][policy_mask], atol=1e-4, rtol=1e-4)
    assert kl.sum(1).mean().item() == pytest.approx(told["logged"]["objective/kl"], abs=1e-4)

    optimizer = torch.optim.AdamW([*policy.parameters(), *value.parameters()], lr=told["lr"], weight_decay=0.0)
    for epoch in told["inner_epochs"]:
        surrogate, metrics = policy_loss(logprobs_of(policy), old, white, policy_mask, told["cliprange"])
        missed, more = value_loss(token_values(value, ids, attend, start), old_values, returns, value_mask,
                                  told["cliprange_value"])
        (surrogate + told["vf_coef"] * missed).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert surrogate.item() == pytest.approx(epoch["policy_loss"], abs=1e-4)
        assert missed.item() == pytest.approx(epoch["value_loss"], abs=1e-4)
        assert metrics["clip_fraction"].item() == pytest.approx(epoch["policy_clipfrac"], abs=1e-4)
        assert more["value_clip_fraction"].item() == pytest.approx(epoch["value_clipfrac"], abs=1e-4)
    for model, name in ((policy, "policy"), (value, "value")):
        for key, parameter in model.named_parameters():
            stored = {"lm_head.weight": "lm_head.weight", "score_head.weight": "score.weight"}.get(key, f"model.{key}")
            assert parameter.sum().item() == pytest.approx(told["final_param_sums"][name][stored], abs=2e-3), stored


def test_values_that_moved_less_than_the_clip_are_not_counted_as_clipped():
    """old + (V - old) rounds to something else than V for many of a thousand; none of them lies 0.2 away."""
    old, values = 0.01 * torch.rand(1, 1000), 0.1 * torch.rand(1, 1000)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    assert (old + (values - old) != values).any()
    _, metrics = value_loss(values, old, torch.randn(1, 1000), mask, 0.2)
    assert metrics["value_clip_fraction"] == 0
    _, metrics = value_loss(old + 1, old, old + 2, mask, 0.2)  # all too far, and the clipped error is the larger
    assert metrics["value_clip_fraction"] == pytest.approx(1)


# ----------------------------------------------------------------------------------------- rollouts

def rollout_of(config: Config, policy, seed=0, count=6):
    """Made-up replies of one to five tokens to prompts of three, scored by random models."""
    made = torch.Generator().manual_seed(seed)
    reward_model, value = (add_score_head(small_model(seed=s), s) for s in (seed + 1, seed + 2))
    trees = []
    for i in range(count):
        replies = [torch.randint(3, 40, (1 + (i + j) % 5,), generator=made).tolist() for j in range(config.n)]
        prompt = torch.randint(3, 40, (3,), generator=made).tolist()
        trees.append(tree_from_replies(i, prompt, replies, [i % 3 != 0] * config.n))
    models = Models(policy, small_model(seed=seed + 3), reward_model, value, policy)
    return ppo.score(trees, models, config, CPU), models


@pytest.mark.parametrize("n", [1, 3])
def test_a_rollout_holds_what_the_models_say_of_each_reply_alone(n):
    policy = small_model(seed=9)
    config = Config(n=n, temperature=0.7, micro_tokens=20, penalty=3.0)
    rollout, (_, _, reward_model, value, _) = rollout_of(config, policy)
    row = 0
    for tree in rollout.trees:
        for (_, leaf), response in zip(tree.leaves, tree.responses, strict=True):
            path = torch.tensor([[*tree.trunk.tolist(), *leaf.tolist()]])
            start, length = len(tree.trunk), len(leaf)
            alone = torch.log_softmax(policy(path)[0, start - 1 : -1] / 0.7, -1)
            said = alone.gather(1, path[0, start:, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs[row, :length], said.float(), atol=1e-5, rtol=0)
            entropy = -(alone.exp() * alone).sum(1)
            torch.testing.assert_close(rollout.entropy[row, :length], entropy.float(), atol=1e-5, rtol=0)
            expected = token_values(value, path, torch.ones_like(path), start)[0]
            torch.testing.assert_close(rollout.values[row, :length], expected.float(), atol=1e-5, rtol=0)
            score = -3.0 if response.cut else reward_model.score(path).clamp(-4, 4).item()
            assert rollout.scores[row].item() == pytest.approx(score, abs=1e-5) and rollout.mask[row].sum() == length
            row += 1


def test_a_reply_without_end_is_replaced_or_penalised():
    policy = small_model(seed=9)
    replaced, _ = rollout_of(Config(penalty=2.0), policy)
    taken, _ = rollout_of(Config(penalty=2.0, missing_eos="subtract"), policy)
    open_ended = ~replaced.finished
    assert open_ended.any() and (replaced.scores[open_ended] == -2).all()
    assert torch.equal(replaced.scores[~open_ended], taken.scores[~open_ended])
    assert (taken.scores[open_ended] != -2).all()


@pytest.mark.parametrize("advantages, n", [("gae", 1), ("reinforce", 1), ("rloo", 4), ("grpo", 4), ("dr_grpo", 4)])
def test_the_first_inner_step_has_ratio_1_and_no_clipping(advantages, n):
    config = Config(advantages=advantages, n=n, epochs=1, minibatches=1, lr=1e-9)
    policy = small_model(seed=9)
    rollout, models = rollout_of(config, policy)
    _, white, returns = find_advantages(rollout, 0.1, config)
    optimizer = torch.optim.SGD([*policy.parameters(), *models.value.parameters()], lr=0.0)
    models = models._replace(value=models.value if advantages == "gae" else None)
    metrics = ppo.update(models, optimizer, rollout, white, returns, 0.1, 0, config, CPU)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-6) and metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    # A reward's own mean is subtracted, over tokens or over replies, and each counts as it does in the loss.
    balanced = advantages in ("gae", "grpo")
    assert metrics["clip_fraction"] == 0 and (abs(metrics["policy_loss"]) < 1e-6 or not balanced)


def test_the_kl_in_the_loss_is_the_mean_over_tokens_of_the_update_and_not_in_the_reward():
    config = Config(kl_in="loss", kl="k2", epochs=1, minibatches=1, advantages="reinforce")
    policy = small_model(seed=9)
    rollout, models = rollout_of(config, policy)
    models = models._replace(value=None)
    rewards, advantages, returns = find_advantages(rollout, 0.5, config)
    assert torch.equal(rewards.sum(1), rollout.scores)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics = ppo.update(models, optimizer, rollout, advantages, returns, 0.5, 0, config, CPU)
    d = (rollout.logprobs - rollout.ref_logprobs)[rollout.mask]
    assert metrics["kl_loss"] == pytest.approx(0.5 * (d.square() / 2).mean().item(), rel=1e-4)


def test_micro_batches_do_not_change_the_update():
    after = []
    for micro_tokens in (10**6, 1):
        config = Config(n=2, epochs=1, minibatches=1, micro_tokens=micro_tokens, max_grad_norm=1e9)
        policy = small_model(seed=9)
        rollout, models = rollout_of(config, policy)
        _, white, returns = find_advantages(rollout, 0.1, config)
        optimizer = torch.optim.SGD([*policy.parameters(), *models.value.parameters()], lr=1.0)
        metrics = ppo.update(models, optimizer, rollout, white, returns, 0.1, 0, config, CPU)
        after.append(([p.detach().clone() for p in policy.parameters()], metrics))
    for one, many in zip(after[0][0], after[1][0], strict=True):
        torch.testing.assert_close(one, many, atol=1e-6, rtol=1e-6)
    assert after[0][1] == pytest.approx(after[1][1], abs=1e-5)


# ---------------------------------------------------------------------------------- does it learn?

@pytest.mark.parametrize("advantages, seed", [(name, seed) for name in ("gae", "rloo") for seed in range(3)]
                         + [("reinforce", 0), ("grpo", 0), ("dr_grpo", 0)])
def test_emit_token_7_is_learnt(advantages, seed, monkeypatch):
    """Score: the share of sevens in the reply. It rises from about 1/40 to more than a half."""
    config = Config(advantages=advantages, n=4 if advantages in ppo.GROUPED else 1, batch=32, max_tokens=4, epochs=2,
                    whiten="on" if advantages == "reinforce" else "auto",  # without a baseline it may stop at a half
                    minibatches=1, kl_coef=0.0, lr=1e-2, value_lr=1e-2, min_eos=0.0, seed=seed, penalty=0.0,
                    missing_eos="subtract")

    def sevens(_, batch):
        return batch.sums((batch.targets == 7).double()) / batch.lengths

    monkeypatch.setattr(ppo, "response_scores", sevens)
    policy, reference_model = (small_model(seed=seed, dtype=torch.float32, scale=1.0) for _ in range(2))
    reward_model, value = (add_score_head(small_model(seed=seed + s, dtype=torch.float32, scale=1.0), s)
                           for s in (1, 2))
    parameters = [*policy.parameters(), *(value.parameters() if advantages == "gae" else ())]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    tokenizer = type("T", (), {"stop_ids": lambda self: ()})()
    critic = value if advantages == "gae" else None
    models, means = Models(policy, reference_model, reward_model, critic, policy), []
    for step in range(40):
        trees = ppo.sample(models, [[3 + i % 4] for i in range(config.batch)], tokenizer, step, config)
        rollout = ppo.score(trees, models, config, CPU)
        _, white, returns = find_advantages(rollout, 0.0, config)
        ppo.update(models, optimizer, rollout, white, returns, 0.0, step, config, CPU)
        means.append(rollout.scores.mean().item())
    assert sum(means[:3]) / 3 < 0.15 < 0.5 < sum(means[-3:]) / 3


def test_a_two_step_problem_reaches_the_known_optimum():
    """Score r over 3 x 3 two-token replies, KL coefficient b: the best policy is pi_ref exp(r / b) / Z."""
    made = torch.Generator().manual_seed(0)
    r, first_ref, then_ref = (torch.randn(shape, generator=made) for shape in ((3, 3), (3,), (3, 3)))
    b, count = 0.5, 3000

    def logprobs(first, then, replies):
        return torch.stack([first.log_softmax(0)[replies[:, 0]], then.log_softmax(1)[replies[:, 0], replies[:, 1]]], 1)

    everything = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    best = (logprobs(first_ref, then_ref, everything).sum(1) + r.flatten() / b).softmax(0)
    first, then = first_ref.clone().requires_grad_(), then_ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([first, then])
    mask = torch.ones(count, 2, dtype=torch.bool)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        with torch.no_grad():
            one = torch.multinomial(first.softmax(0), count, replacement=True, generator=made)
            two = torch.multinomial(then.softmax(1)[one], 1, generator=made)[:, 0]
            replies = torch.stack([one, two], 1)
            old = logprobs(first, then, replies)
            rewards = token_rewards(r[one, two], kl_k1(old, logprobs(first_ref, then_ref, replies)), mask, b)
            advantages = rloo_advantages(rewards.sum(1), count)[:, None].expand(-1, 2)
        loss, _ = policy_loss(logprobs(first, then, replies), old, advantages, mask, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = logprobs(first, then, everything).sum(1).exp()
    torch.testing.assert_close(found, best, atol=1e-2, rtol=0)


# -------------------------------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def roles(checkpoint, tmp_path_factory):
    """A policy with a template, and a reward model made of it."""
    folder = tmp_path_factory.mktemp("roles")
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    tokenizer.adopt("zephyr")
    save_model(model, folder / "sft", tokenizer)
    save_model(add_score_head(model, 0), folder / "reward", tokenizer)
    return folder


def six_prompts(folder):
    return str(write_jsonl(folder / "p.jsonl", [{"prompt": f"Name {n} cities."} for n in range(6)]))


def config(roles, folder, **changes):
    prompts = changes.pop("data", None) or six_prompts(folder)
    return Config(**{"model": str(roles / "sft"), "reward_model": str(roles / "reward"), "data": prompts,
                     "out": str(folder / "run"), "steps": 4, "batch": 3, "max_tokens": 6, "minibatches": 1,
                     "min_eos": 0.0, "device": "cpu", "dtype": "float32"}
                  | changes)


@pytest.mark.parametrize("changes", [
    {}, {"advantages": "rloo", "n": 2}, {"kl": "k3", "kl_target": 1.0, "missing_eos": "subtract"},
    {"advantages": "grpo", "n": 2, "kl": "k3", "kl_in": "loss", "kl_target": 1.0}, {"value_model": "policy"},
])
def test_the_script_runs_and_logs_its_names(changes, roles, tmp_path, capsys):
    ppo.main(config(roles, tmp_path, snapshot_every=2, **changes))
    steps = metrics_of(tmp_path / "run")
    names = {"score", "kl", "reward", "entropy", "ratio_mean", "ratio_max", "clip_fraction", "explained_variance",
             "length", "eos_rate"}
    assert len(steps) == 4 and names <= set(steps[0]) and abs(steps[0]["kl"]) < 1e-5
    assert ("value_loss" in steps[0]) == (changes.get("advantages") is None)
    assert ("kl_loss" in steps[0]) == ("kl_in" in changes)
    assert (tmp_path / "run" / "model_step_2" / "model.safetensors").exists() and (tmp_path / "run" / "model").exists()
    assert "score -2.00" in capsys.readouterr().out or changes.get("missing_eos")


def test_stopped_and_continued_equals_undisturbed_bit_for_bit(roles, tmp_path, monkeypatch):
    """With an adaptive coefficient, which has to be carried over too."""
    from runtime import StopRequest

    ask = {"data": six_prompts(tmp_path), "kl_target": 0.5, "kl_horizon": 10}
    ppo.main(config(roles, tmp_path, out=str(tmp_path / "whole"), **ask))
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: len(metrics_of(tmp_path / "parts")) == 2)
    ppo.main(config(roles, tmp_path, out=str(tmp_path / "parts"), **ask))
    monkeypatch.undo()
    ppo.main(config(roles, tmp_path, out=str(tmp_path / "parts"), **ask))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_leaving_the_stated_bounds_ends_the_run_and_says_why(roles, tmp_path, capsys):
    ppo.main(config(roles, tmp_path, min_eos=1.0))
    assert len(metrics_of(tmp_path / "run")) == 1 and (tmp_path / "run" / "model").exists()
    assert "ended early after step 1: eos_rate is" in capsys.readouterr().out


@pytest.mark.parametrize("changes, said", [
    ({"advantages": "rloo"}, ["n is 1, expected at least 2"]), ({"advantages": "grpo"}, ["with advantages=grpo"]),
    ({"kl_in": "loss"}, ["kl is 'k1' with kl_in='loss'", "zero in the mean", "set kl=k2"]),
    ({"temperature": 0.0}, ["temperature is 0"]),
    ({"minibatches": 9}, ["minibatches is 9, expected between 1 and 3"]),
    ({"data": "none.jsonl"}, ["none.jsonl: no such file"]),
    ({"max_tokens": 250}, ["the prompt has", "lower max_tokens"]),
])
def test_what_the_user_wrote_wrong_is_one_line(changes, said, roles, tmp_path, capsys):
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, **changes)), *said)
    assert not (tmp_path / "run").exists()


def test_wrong_roles_and_broken_scores_are_one_line(roles, checkpoint, tmp_path, capsys):
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, reward_model=str(roles / "sft"))), "has no score head")
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, model=str(roles / "reward"))), "is a reward model")
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, model=str(checkpoint))), "carries no chat template")
    empty = write_jsonl(tmp_path / "e.jsonl", [{"prompt": ""}])
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, data=str(empty))), "'prompt' is empty")
    other = load_model(roles / "reward")
    other.resize(other.config.vocab_size + 1)
    tokenizer = load_tokenizer(roles / "reward")
    tokenizer.added["<|more|>"] = Added(tokenizer.vocab_size, True)
    tokenizer.vocab_size += 1
    save_model(other, tmp_path / "other", tokenizer)
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, reward_model=str(tmp_path / "other"))),
          "has another tokenizer")
    broken = load_model(roles / "reward")
    broken.config = dataclasses.replace(broken.config, score_mean=float("nan"))
    save_model(broken, tmp_path / "nan", load_tokenizer(roles / "reward"))
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, reward_model=str(tmp_path / "nan"))), "score_mean is nan")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_k2_and_k3_in_the_reward_are_warned_of(roles, tmp_path, capsys):
    ppo.main(config(roles, tmp_path, kl="k3", steps=1))
    assert "warning: the gradient of kl=k3 in the reward is not the KL's: set kl=k1" in capsys.readouterr().out
    ppo.main(config(roles, tmp_path, steps=1, out=str(tmp_path / "k1")))
    assert "warning" not in capsys.readouterr().out


def test_the_warm_up_wastes_no_rollout(roles, tmp_path):
    """Ten steps, warm-up over 0.2 of them: a third of the rate, two thirds, then the rates of a run from 0."""
    ppo.main(config(roles, tmp_path, steps=10, warmup_ratio=0.2, lr=3e-4, schedule="constant"))
    rates = [m["lr"] for m in metrics_of(tmp_path / "run")]
    assert rates == pytest.approx([1e-4, 2e-4] + [3e-4] * 8)


def test_a_value_model_that_starts_from_the_policy_expects_nothing_at_first(roles, tmp_path):
    """Its head is 0: so is explained variance in the first step, and what it learns shows in the second."""
    first = ppo.load_models(config(roles, tmp_path, value_model="policy"), load_tokenizer(roles / "sft"), CPU)
    ids = torch.arange(3, 40)[None]
    hidden, _ = first.value._hidden_of_rows(ids, None)
    assert (first.value.scores(hidden) == 0).all()
    torch.testing.assert_close(hidden, first.policy._hidden_of_rows(ids, None)[0])
    assert first.value.score_head.weight.requires_grad
    ppo.main(config(roles, tmp_path, value_model="policy", value_lr=1e-2))
    assert metrics_of(tmp_path / "run")[0]["value_grad_norm"] > 0


# ----------------------------------------------------------------------------------------- the edges

def test_a_rollout_of_fewer_prompts_than_minibatches_is_not_diluted(roles, tmp_path):
    """Five prompts, four to a rollout, four minibatches: every second rollout has one prompt and makes one update.

    Divided by four, its ratio was 0.25 and its gradient norm a quarter. With one token to a reply there is nothing
    whose variance could be explained.
    """
    prompts = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in (
        "Hi", "Bye", "Name a tool.", "Why?", "Sing.")]))
    for max_tokens in (6, 1):
        folder = tmp_path / str(max_tokens)
        ppo.main(config(roles, tmp_path, data=prompts, batch=4, minibatches=4, max_tokens=max_tokens, lr=1e-9,
                        value_lr=1e-9, out=str(folder)))
        steps = metrics_of(folder)
        assert [m["ratio_mean"] for m in steps] == pytest.approx([1.0] * 4, abs=1e-4)
        assert all(math.isfinite(value) for m in steps for value in m.values())
        if max_tokens > 1:
            assert all(m["policy_grad_norm"] > 0.1 * steps[0]["policy_grad_norm"] for m in steps)


def test_every_prompt_is_learnt_from_once_an_epoch():
    for count in (1, 3, 4, 9):
        parts = list(ppo.minibatches(count, 0, Config(batch=9, minibatches=4, epochs=2)))
        assert len(parts) == 2 * min(4, count) and all(len(part) for part in parts)
        half = len(parts) // 2
        assert all(sorted(np.concatenate(epoch)) == list(range(count)) for epoch in (parts[:half], parts[half:]))


def test_replies_that_fill_the_positions_of_any_model_are_one_line(roles, tmp_path, capsys):
    exits(capsys, lambda: ppo.main(config(roles, tmp_path, max_tokens=256)),
          "max_tokens is 256, the models have 256 positions")
    learned = small_model(dtype=torch.float32, rotary=0.0)
    learned.config = dataclasses.replace(learned.config, max_positions=64)
    models = Models(small_model(), small_model(), learned, None, small_model())
    assert ppo.room(models, Config(max_tokens=24)) == 40  # of the reward model's 64
    assert ppo.room(models._replace(reward_model=small_model()), Config(max_tokens=24)) == 232


def test_on_a_gpu_ppo_samples_from_a_copy_in_the_dtype_of_compute(tmp_path, monkeypatch):
    """Same weights as the policy's after every step, rounded as its products round them; norms stay as they are."""
    from data import four_models

    policy = small_model(dtype=torch.float32, tied=False)
    policy.compute_dtype = torch.bfloat16
    monkeypatch.setattr(four_models, "load_model", lambda path, dtype, device: small_model(dtype=dtype, tied=False))
    assert four_models.make_sampler(policy, "", CPU) is policy
    sampler = four_models.make_sampler(policy, "", torch.device("cuda"))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    distributed.copy_weights(policy, sampler)
    for (name, mine), theirs in zip(sampler.named_parameters(), policy.parameters(), strict=True):
        rounded = mine.ndim == 2 and "embed" not in name
        assert mine.dtype == (torch.bfloat16 if rounded else torch.float32), name
        assert torch.equal(mine, theirs.to(mine.dtype))
    tokens, layout = torch.arange(7), Layout.build([7])
    assert torch.equal(sampler.hidden(tokens, tokens, layout), policy.hidden(tokens, tokens, layout))
    policy.compute_dtype = None
    assert four_models.make_sampler(policy, "", torch.device("cuda")) is policy
