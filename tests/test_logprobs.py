import itertools
import math

import pytest
import torch
from conftest import reference
from interpreter import DEVICE, close, guarded, intact, strict

import kernels
import kernels.logprobs as kernel
from kernels.logprobs import linear_logprobs, logprobs_reference


def test_the_reference_by_hand():
    """Logits 0 and 2 log 3 at temperature 2: probabilities 1/4 and 3/4; capped at 1e-9: equal ones."""
    case = torch.ones(1, 1).double(), torch.tensor([[0.0], [2 * math.log(3)]]).double(), torch.tensor([1])
    logprobs, entropy = logprobs_reference(*case, temperature=2.0, entropy=True)
    assert logprobs.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert logprobs_reference(*case, softcap=1e-9)[0].item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("temperature, softcap, entropy",
                         list(itertools.product((1.0, 0.7), (None, 3.0), (False, True))))
@pytest.mark.parametrize("chunk_rows, kept_rows", [(100, 100), (7, 100), (7, 8), (7, 0)])
def test_values_and_gradients_equal_log_softmax(temperature, softcap, entropy, chunk_rows, kept_rows, monkeypatch):
    """One chunk or several, unit gradients kept for all rows, some, none; any upstream gradient."""
    monkeypatch.setattr(kernel, "CHUNK_BYTES", chunk_rows * 4 * 50)
    monkeypatch.setattr(kernel, "KEEP_BYTES", kept_rows * 8 * 50)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (23, 50))
    targets = torch.randint(0, 50, (23,))
    ours, our_entropy = linear_logprobs(hidden, weight, targets, temperature, softcap, entropy)
    truth, true_entropy = logprobs_reference(hidden, weight, targets, temperature, softcap, entropy)
    assert torch.allclose(ours, truth, atol=1e-12)
    upstream = torch.randn(2, 23, dtype=torch.float64)
    ours, truth = (ours * upstream[0]).sum(), (truth * upstream[0]).sum()
    if entropy:
        assert torch.allclose(our_entropy, true_entropy, atol=1e-12)
        ours, truth = ours + (our_entropy * upstream[1]).sum(), truth + (true_entropy * upstream[1]).sum()
    found, right = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, truth))
    for a, b in zip(found, right, strict=True):
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
    assert torch.allclose(logprobs, torch.tensor(-math.log(8))) and torch.allclose(entropy, torch.tensor(math.log(8)))


def test_bounds_on_bf16_states():
    torch.manual_seed(0)
    hidden, targets = torch.randn(64, 32).bfloat16() * 5, torch.randint(0, 1000, (64,))
    logprobs, entropy = linear_logprobs(hidden, torch.randn(1000, 32), targets, entropy=True)
    assert (logprobs <= 0).all() and logprobs.dtype == torch.float32
    assert (entropy >= 0).all() and (entropy <= math.log(1000)).all()


def identity_head(logits):
    """hidden = logits and an identity head make the kernel read given logits."""
    return logits.flatten(0, -2), torch.eye(logits.shape[-1], dtype=logits.dtype)


def test_sequence_sums_and_entropy_equal_trl():
    _, case = reference("logprobs/sequence")
    logits, labels = case["logits"][:, :-1], case["labels"][:, 1:]
    real = labels != -100
    logprobs, entropy = linear_logprobs(*identity_head(logits), labels.clamp(min=0).flatten(), entropy=True)
    sums = (logprobs.view_as(labels) * real).sum(1)
    assert torch.allclose(sums, case["sum_logps"], atol=1e-6)
    assert torch.allclose(sums / real.sum(1), case["mean_logps"], atol=1e-6)
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


def test_memory_at_its_peak_is_below_256_mib(monkeypatch):
    """An eighth of the shipped sizes stays below an eighth of 256 MiB, gradients included; the logits alone take 31."""
    torch.set_num_threads(1)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", kernel.CHUNK_BYTES // 8)
    monkeypatch.setattr(kernel, "KEEP_BYTES", kernel.KEEP_BYTES // 8)
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (500, 16000))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_logprobs(hidden, weight, torch.randint(0, 16000, (500,)))[0].sum().backward()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert 24 * 2**20 < max(held) < 32 * 2**20


def test_without_gradients_no_errors_are_kept(monkeypatch):
    """Chunks of 2 MiB of logits, 16 MiB in all: one chunk at a time is held, whether the head could train or not."""
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 2 * 2**20)
    hidden, weight = torch.randn(256, 16), torch.randn(16384, 16, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        linear_logprobs(hidden, weight, torch.randint(0, 16384, (256,)))
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert 2 * 2**20 <= max(held) < 3 * 2**20


def test_a_large_vocabulary_adds_no_bias():
    """Of 256 rows of 49,152 logits: PyTorch's log_softmax is 9e-7 too high on average, a reply of 100 tokens 9e-5."""
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(256, 49152, generator=generator) * 3, torch.arange(256)
    weight = logits.t().contiguous()
    true = torch.log_softmax(logits.double(), 1)[targets, targets]
    found = linear_logprobs(torch.eye(256), weight, targets)[0].double()
    plain = torch.log_softmax(logits, 1)[targets, targets].double()
    assert (found - true).abs().max() < 3e-6 and (found - true).mean().abs() < 3e-7
    assert (plain - true).mean().abs() > (found - true).mean().abs()


# ---------------------------------------------------------------- Triton, on a GPU or interpreted

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture
def small_tiles(on_triton, monkeypatch):
    """Tiles that put two blocks or more on every axis of a small problem."""
    def choose(vocab: int):
        size = 1 if vocab < 1000 else 4
        tiles = dict(BLOCK_M=16 * min(size, 2), BLOCK_V=32 * size, BLOCK_D=16, BLOCKS=2, num_warps=4, num_stages=2)
        monkeypatch.setattr(kernel, "CONFIGS", dict.fromkeys((80, 90, 100), tiles))
        monkeypatch.setattr(kernel, "FLOAT32", tiles)
        monkeypatch.setattr(kernel, "COMBINE", dict(BLOCK_M=16, BLOCK_S=2, num_warps=4, num_stages=2))
        monkeypatch.setattr(kernel, "SLICE", 48 * size)
    choose(0)
    return choose


def problem(rows, vocab, width, dtype=torch.float32, spread=1.0):
    """Hidden states, weight, targets and two upstream gradients; logits of standard deviation 3 spread."""
    torch.manual_seed(rows + vocab + width)
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) * 3 * spread * width**-0.5
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, torch.randint(0, vocab, (rows,)).to(DEVICE), torch.randn(2, rows).to(DEVICE)


def run(function, hidden, weight, targets, upstream, temperature=1.0, softcap=None, entropy=True):
    """[logprobs, entropies, hidden's gradient, weight's gradient], the entropies only if asked."""
    outputs = [x for x in function(hidden, weight, targets, temperature, softcap, entropy) if x is not None]
    gradients = torch.autograd.grad(outputs, (hidden, weight), list(upstream.to(outputs[0].dtype)[: len(outputs)]))
    return [x.detach() for x in (*outputs, *gradients)]


def truth(hidden, weight, targets, upstream, temperature=1.0, softcap=None, entropy=True):
    """The same from the reference in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return run(logprobs_reference, hidden, weight, targets, upstream, temperature, softcap, entropy)


def keep(monkeypatch, share: float, rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Let the forward keep this share of the probabilities, rounded down to whole programs."""
    room = int(share * rows * vocab * dtype.itemsize)
    monkeypatch.setattr(kernel, "KEPT_BYTES", dict.fromkeys((80, 90, 100), room))


@pytest.mark.parametrize("kept", [0, 0.7, 1])
@pytest.mark.parametrize("rows, vocab, width, temperature, softcap, entropy, dtype", [  # every pair of values is here
    (1, 100, 40, 0.7, 5.0, False, "float16"), (1, 1000, 72, 1.0, None, True, "float32"),
    (1, 33, 16, 0.7, None, True, "bfloat16"), (17, 100, 16, 0.7, None, False, "float16"),
    (17, 100, 72, 0.7, None, False, "float32"), (17, 1000, 40, 0.7, 5.0, True, "bfloat16"),
    (17, 33, 40, 1.0, None, True, "bfloat16"), (2, 100, 72, 1.0, 5.0, False, "bfloat16"),
    (2, 1000, 40, 0.7, None, True, "float16"), (2, 33, 16, 1.0, None, False, "float32"),
    (65, 100, 16, 1.0, None, True, "float16"), (65, 1000, 16, 1.0, 5.0, False, "bfloat16"),
    (65, 33, 40, 0.7, 5.0, True, "float32"), (65, 33, 72, 1.0, 5.0, False, "float16"),
])
def test_triton_equals_float64(small_tiles, monkeypatch, rows, vocab, width, temperature, softcap, entropy, dtype,
                               kept):
    small_tiles(vocab)
    dtype = getattr(torch, dtype)
    keep(monkeypatch, kept, rows, vocab, dtype)
    inputs = *problem(rows, vocab, width, dtype), temperature, softcap, entropy
    for ours, true in zip(run(linear_logprobs, *inputs), truth(*inputs), strict=True):
        close(ours, true, TOLERANCE[dtype])


@pytest.mark.parametrize("sm, dtype, softcap", [(80, "bfloat16", 5.0), (90, "bfloat16", None), (90, "float32", None)])
def test_the_shipped_tiles_equal_float64(on_triton, monkeypatch, sm, dtype, softcap):
    """Two tiles or more of each kind: of tokens, of width, of vocabulary, and two programs to combine."""
    monkeypatch.setattr(kernel, "CONFIGS", dict.fromkeys((80, 90, 100), kernel.CONFIGS[sm]))
    dtype = getattr(torch, dtype)
    inputs = problem(130, 1100, 72, dtype)
    for ours, true in zip(run(linear_logprobs, *inputs, softcap=softcap), truth(*inputs, softcap=softcap), strict=True):
        close(ours, true, TOLERANCE[dtype])


@pytest.mark.parametrize("hidden_dtype, weight_dtype",
                         [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_weight_of_another_dtype_is_rounded_to_that_of_hidden(small_tiles, hidden_dtype, weight_dtype):
    hidden, weight, *rest = problem(17, 200, 40)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    weight = weight.detach().to(weight_dtype).requires_grad_()
    ours, true = run(linear_logprobs, hidden, weight, *rest), truth(hidden, weight.to(hidden_dtype), *rest)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, hidden_dtype, weight_dtype]
    tolerances = 2e-6, 2e-6, TOLERANCE[hidden_dtype], TOLERANCE[torch.bfloat16]
    for a, b, relative in zip(ours, true, tolerances, strict=True):
        close(a, b, relative)


def test_triton_leaves_a_frozen_weight_or_frozen_states_alone(small_tiles):
    hidden, weight, targets, upstream = problem(17, 100, 40)
    *_, dhidden, dweight = run(linear_logprobs, hidden, weight, targets, upstream)
    for h, w, expected in ((hidden, weight.detach(), dhidden), (hidden.detach(), weight, dweight)):
        outputs = linear_logprobs(h, w, targets, entropy=True)
        gradients = torch.autograd.grad(outputs, [x for x in (h, w) if x.requires_grad], list(upstream))
        assert len(gradients) == 1 and torch.equal(gradients[0], expected)


@pytest.mark.parametrize("kept", [0, 0.7, 1])
@pytest.mark.parametrize("rows, vocab, width, softcap, entropy", [
    (17, 100, 40, None, True), (33, 33, 16, 5.0, False), (1, 70, 24, None, False),
])
def test_triton_stays_inside_its_tensors_and_writes_all_of_them_once(small_tiles, monkeypatch, rows, vocab, width,
                                                                     softcap, entropy, kept):
    inputs = problem(rows, vocab, width)
    keep(monkeypatch, kept, rows, vocab, torch.float32)
    walled = [guarded(x) for x in inputs]
    with strict():
        ours = run(linear_logprobs, *walled, softcap=softcap, entropy=entropy)
    for a, b in zip(ours, truth(*inputs, softcap=softcap, entropy=entropy), strict=True):
        close(a, b, 2e-6)
    assert all(intact(x) for x in walled)


@pytest.mark.filterwarnings("ignore:overflow")  # of a probability past the end of the vocabulary, which is not written
def test_triton_survives_extreme_logits(small_tiles):
    """Rows of 200 and -120 by an identity head: a softmax that does not subtract the largest overflows."""
    hidden = torch.full((4, 40), -120.0)
    hidden[1] = 200
    hidden[2, 7] = 200
    hidden[3, ::2] = 200
    hidden, weight = hidden.to(DEVICE).requires_grad_(), torch.eye(40, device=DEVICE, requires_grad=True)
    for targets in ([7, 7, 7, 7], [8, 8, 8, 8]):
        inputs = hidden, weight, torch.tensor(targets, device=DEVICE), torch.randn(2, 4, device=DEVICE)
        for a, b in zip(run(linear_logprobs, *inputs), truth(*inputs), strict=True):
            close(a, b, 2e-6, floor=5e-5)  # an exponent of 300 is itself off by 1e-5


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_nan_row_reaches_no_other_row(small_tiles):
    hidden, weight, targets, upstream = problem(33, 100, 40)
    logprobs, entropies, dhidden, _ = run(linear_logprobs, hidden, weight, targets, upstream)
    spoilt = hidden.detach().clone()
    spoilt[20] = float("nan")
    ours = run(linear_logprobs, spoilt.requires_grad_(), weight, targets, upstream)
    others = torch.arange(33) != 20
    for a, b in zip(ours, (logprobs, entropies, dhidden), strict=False):
        assert torch.equal(a[others], b[others]) and a[20].isnan().all()


def test_triton_keeps_the_bounds(small_tiles):
    """log p <= 0 exactly, for it is a difference from the largest; 0 <= H <= log V, and log V for equal logits."""
    small_tiles(1000)
    hidden, weight, targets, _ = problem(64, 1000, 40, torch.bfloat16, spread=5)
    logprobs, entropies = linear_logprobs(hidden, weight, targets, entropy=True)
    assert (logprobs <= 0).all() and logprobs.dtype == torch.float32
    assert (entropies >= 0).all() and (entropies <= math.log(1000)).all()
    logprobs, entropies = linear_logprobs(hidden, torch.zeros_like(weight), targets, entropy=True)
    uniform = torch.tensor(math.log(1000.0))
    assert torch.allclose(logprobs, -uniform) and torch.allclose(entropies, uniform)


def test_triton_gives_the_same_bits_twice_and_a_row_the_same_in_any_batch(small_tiles):
    hidden, weight, targets, upstream = problem(33, 100, 40, torch.bfloat16)
    once, twice = (run(linear_logprobs, hidden, weight, targets, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    for rows in (slice(0, 5), slice(19, 33), slice(20, 21)):
        alone = linear_logprobs(hidden[rows], weight, targets[rows], entropy=True)
        assert torch.equal(alone[0], once[0][rows]) and torch.equal(alone[1], once[1][rows])


def launched(monkeypatch) -> list:
    """Every launch from here on: the kernel's name, and whether it keeps probabilities."""
    found, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda function, grid, *given, **options: (
        found.append((function.__name__, options.get("KEEP"))), launch(function, grid, *given, **options)))
    return found


def test_probabilities_are_kept_where_they_fit_and_a_gradient_will_be_asked(small_tiles, monkeypatch):
    """Of 100 columns 70 fit, which hold one program's 64; the backward goes by 32. Without gradients the same bits."""
    inputs = problem(17, 100, 40, torch.bfloat16)
    keep(monkeypatch, 0.7, 17, 100, torch.bfloat16)
    found = launched(monkeypatch)
    logprobs = run(linear_logprobs, *inputs, entropy=False)[0]
    assert [x for x in found if x[0] != "_combine"] == [
        ("_forward", True), ("_forward", False), *[("_kept_dz", None)] * 2, *[("_dz", None)] * 2]
    found.clear()
    with torch.no_grad():
        assert torch.equal(linear_logprobs(*inputs[:3])[0], logprobs)
    assert found == [("_forward", False), ("_combine", None)]


def test_a_backward_leaves_what_was_kept_to_the_next_one(small_tiles):
    hidden, weight, targets, upstream = problem(17, 100, 40)
    logprobs = linear_logprobs(hidden, weight, targets)[0]
    once, twice = (torch.autograd.grad(logprobs, (hidden, weight), upstream[0], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("kept", [0, 1])
def test_a_sure_target_keeps_its_gradient_in_bf16(small_tiles, monkeypatch, kept):
    """Logits 10.5 and 39 times 0: 1 - p = 39 / (39 + e^10.5) = 1.073e-3, four times less than 2^-8, what bf16 rounds
    a p near 1 by."""
    hidden = torch.zeros(1, 40, dtype=torch.bfloat16, device=DEVICE)
    hidden[0, 7] = 10.5
    keep(monkeypatch, kept, 1, 40, torch.bfloat16)
    hidden.requires_grad_()
    weight = torch.eye(40, dtype=torch.bfloat16, device=DEVICE)
    linear_logprobs(hidden, weight, torch.tensor([7], device=DEVICE))[0].sum().backward()
    assert hidden.grad[0, 7].item() == pytest.approx(39 / (39 + math.exp(10.5)), rel=0.01)
    assert hidden.grad[0, 8].item() == pytest.approx(-1 / (39 + math.exp(10.5)), rel=0.01)


def test_slices_of_the_backward_hold_whole_tiles(small_tiles, monkeypatch):
    """Room for two and a half tiles of W: in slices of that size a third of all programs would compute half a tile."""
    small_tiles(1000)
    inputs = problem(17, 1000, 40)
    keep(monkeypatch, 0, 17, 1000, torch.float32)
    block = kernel.FLOAT32["BLOCK_V"]
    monkeypatch.setattr(kernel, "SLICE", 10**6)
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", int(2.5 * block * 4 * 17))
    grids, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda function, grid, *given, **options: (
        grids.append(grid[0]) if function is kernel._dz else None, launch(function, grid, *given, **options)))
    for ours, true in zip(run(linear_logprobs, *inputs), truth(*inputs), strict=True):
        close(ours, true, 2e-6)
    assert sum(grids) == math.ceil(17 / kernel.FLOAT32["BLOCK_M"]) * math.ceil(1000 / block)


def test_triton_without_rows(small_tiles):
    hidden, weight, targets, upstream = problem(0, 100, 40)
    logprobs, entropies, dhidden, dweight = run(linear_logprobs, hidden, weight, targets, upstream)
    assert logprobs.shape == entropies.shape == (0,) and dhidden.shape == (0, 40) and not dweight.any()


def test_triton_refuses_a_width_that_descriptors_cannot_read(on_triton):
    with pytest.raises(ValueError, match="12 wide in torch.bfloat16"):
        linear_logprobs(*problem(3, 20, 12, torch.bfloat16)[:3])


def test_chosen_by_the_config(monkeypatch):
    calls = []
    monkeypatch.setattr(kernel._TileLogprobs, "apply", lambda *_: calls.append(1) or (torch.zeros(3), None))
    for name in ("torch", "triton"):
        kernels.use(name)
        linear_logprobs(*problem(3, 20, 16)[:3])
    kernels.use("auto")
    assert calls == [1]
