import itertools
import math

import pytest
import torch
from conftest import reference

import kernels.logprobs as kernel
from kernels.logprobs import linear_logprobs


def plain(hidden, weight, targets, temperature, softcap):
    z = hidden @ weight.t()
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logprobs = z.log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature, softcap, entropy", list(itertools.product((1.0, 0.7), (None, 3.0), (False, True))))
@pytest.mark.parametrize("chunk_rows, kept_rows", [(100, 100), (7, 100), (7, 8), (7, 0)])
def test_values_and_gradients_equal_log_softmax(temperature, softcap, entropy, chunk_rows, kept_rows, monkeypatch):
    """One chunk or several, unit gradients kept for all rows, some, none; any upstream gradient."""
    monkeypatch.setattr(kernel, "CHUNK_BYTES", chunk_rows * 4 * 50)
    monkeypatch.setattr(kernel, "KEEP_BYTES", kept_rows * 8 * 50)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (23, 50))
    targets = torch.randint(0, 50, (23,))
    ours, our_entropy = linear_logprobs(hidden, weight, targets, temperature, softcap, entropy)
    truth, true_entropy = plain(hidden, weight, targets, temperature, softcap)
    assert torch.allclose(ours, truth, atol=1e-12)
    upstream = torch.randn(2, 23, dtype=torch.float64)
    ours, truth = (ours * upstream[0]).sum(), (truth * upstream[0]).sum()
    if entropy:
        assert torch.allclose(our_entropy, true_entropy, atol=1e-12)
        ours, truth = ours + (our_entropy * upstream[1]).sum(), truth + (true_entropy * upstream[1]).sum()
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_frozen_weight_gets_no_gradient_and_hidden_the_same():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4), torch.randint(0, 9, (5,))
    linear_logprobs(hidden, weight, targets)[0].sum().backward()
    frozen = hidden.grad.clone()
    hidden.grad = None
    linear_logprobs(hidden, weight.requires_grad_(), targets)[0].sum().backward()
    assert torch.equal(frozen, hidden.grad) and weight.grad is not None


def test_uniform_logits_by_hand():
    """Zero weights, 8 tokens: every log-probability is -log 8 = -2.0794, the entropy log 8."""
    logprobs, entropy = linear_logprobs(torch.randn(3, 4), torch.zeros(8, 4), torch.tensor([0, 3, 7]), entropy=True)
    assert torch.allclose(logprobs, torch.full((3,), -math.log(8))) and torch.allclose(entropy, torch.full((3,), math.log(8)))


def test_bounds_on_bf16_states():
    torch.manual_seed(0)
    hidden, targets = torch.randn(64, 32).bfloat16() * 5, torch.randint(0, 1000, (64,))
    logprobs, entropy = linear_logprobs(hidden, torch.randn(1000, 32), targets, entropy=True)
    assert (logprobs <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(1000)).all() and logprobs.dtype == torch.float32


def identity_head(logits):
    """hidden = logits and an identity head make the kernel read given logits."""
    return logits.flatten(0, -2), torch.eye(logits.shape[-1], dtype=logits.dtype)


def test_sequence_sums_and_entropy_equal_trl():
    _, case = reference("logprobs/sequence")
    logits, labels = case["logits"][:, :-1], case["labels"][:, 1:]
    real = labels != -100
    logprobs, entropy = linear_logprobs(*identity_head(logits), labels.clamp(min=0).flatten(), entropy=True)
    sums = (logprobs.view_as(labels) * real).sum(1)
    assert torch.allclose(sums, case["sum_logps"], atol=1e-6) and torch.allclose(sums / real.sum(1), case["mean_logps"], atol=1e-6)
    assert torch.allclose(entropy.view_as(labels), case["entropy"][:, :-1], atol=1e-6)


def test_temperature_equals_torchtune():
    _, case = reference("logprobs/temperature")
    for temperature in (1.0, 0.7):
        logprobs, _ = linear_logprobs(*identity_head(case["logits"]), case["tokens"].flatten(), temperature)
        assert torch.allclose(logprobs.view_as(case["tokens"]), case[f"logps.temp{temperature}"], atol=1e-6)


def test_bf16_states_are_widened_before_the_softmax():
    """The fixture's own bf16 softmax is off by 0.0165; ours must be off by less than 1e-5."""
    _, case = reference("logprobs/bf16")
    logprobs, _ = linear_logprobs(*identity_head(case["logits_bf16"]), case["tokens"].flatten())
    assert (logprobs.view_as(case["tokens"]) - case["logps_from_upcast"]).abs().max() < 1e-5


def test_misuse_is_refused():
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_logprobs(hidden, weight, torch.tensor([0, 1]), temperature=0)
    with pytest.raises(ValueError, match=r"\[0, 5\]"):
        linear_logprobs(hidden, weight, torch.tensor([0, 5]))
