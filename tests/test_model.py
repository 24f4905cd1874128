import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, FAMILIES, FIXTURES, reference, small_model
from safetensors.torch import load_file

import model
from checkpoints import load_model, parameters_by_tensor
from kernels import PackedLinear, can_pack
from kernels.layout import Layout
from kernels.logprobs import linear_logprobs
from kernels.sampling import DRAWS, in_nucleus, keep_top_k, largest, sample_tokens
from lora import add_lora
from model import Decoder, KVCache, ReplyState, RMSNorm, generate


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A tiny model of each family; its logits, gradients and greedy tokens as transformers computes them."""
    folder = FIXTURES / "models" / request.param
    numbers = json.loads((folder / "expected.json").read_text())
    return load_model(folder), load_file(folder / "expected.safetensors"), numbers


# ------------------------------------------------------------------------------------ forward pass

def test_logits_equal_transformers_whatever_the_padding(case):
    model, expected, _ = case
    assert (model(expected["full.input_ids"]) - expected["full.logits"]).abs().max() < 2e-4
    right = model(expected["right.input_ids"], expected["right.attention_mask"])
    assert (right - expected["right.logits"]).abs().max() < 2e-4
    left = model(expected["left.input_ids"], expected["left.attention_mask"])
    assert (left[:, -1] - expected["left.last_logits"]).abs().max() < 2e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_rarer_configurations_compute_what_transformers_computes(name):
    """In fp32, of bf16 weights too; 40 tokens are longer than the windows, and than the context scaling starts from."""
    folder = FIXTURES / "configs" / name
    model, expected = load_model(folder), load_file(folder / "expected.safetensors")
    model.compute_dtype = torch.float32
    ids = expected["input_ids"]
    assert (model(ids) - expected["logits"]).abs().max() < 2e-4
    cache, slot = KVCache(model, slots=1, length=40), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        for i in range(40):
            place = torch.tensor([i])
            cache.at(slot, place, i + 1, decoding=True)
            step = model.hidden(ids[0, i : i + 1], place, None, cache)
            assert torch.allclose(model.logits(step), expected["logits"][:, i], atol=3e-4)


def test_what_a_bf16_weight_adds_to_1_is_kept():
    """1 + 2^-9 is 1 in bf16. Of x = 1.5 three times, 0.5 five times the mean square is 1: 1.5 (1 + 2^-8) rounds to
    1.5078125 in bf16, but 1 + 2^-8 itself to 1."""
    norm = RMSNorm(8, 0.0, 1.0).to(torch.bfloat16)
    x = torch.tensor([[1.5] * 3 + [0.5] * 5])
    norm.weight.data.fill_(2**-9)
    assert torch.allclose(norm(x), x * (1 + 2**-9), rtol=1e-6)
    norm.weight.data.fill_(2**-8)
    assert norm(x.bfloat16())[0, 0].item() == 1.5078125


def test_loss_and_every_gradient_norm_equal_transformers(case):
    model, expected, numbers = case
    ids = expected["full.input_ids"]
    model.zero_grad()
    logits = model(ids)[:, 7:-1].flatten(0, 1)  # the first 8 positions are not labelled
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 8:].flatten())
    loss.backward()
    assert abs(loss.item() - numbers["loss"]["value"]) < 1e-4
    parameters = dict(model.named_parameters())
    for file_name, names in parameters_by_tensor(model).items():
        norm = sum(parameters[name].grad.norm().item() ** 2 for name in names) ** 0.5
        assert norm == pytest.approx(numbers["grad_norms"][file_name], rel=1e-3), file_name


def test_packed_log_probs_equal_the_padded_logits(case):
    model, expected, _ = case
    ids, mask = expected["right.input_ids"], expected["right.attention_mask"].bool()
    rows = [row[m] for row, m in zip(ids, mask, strict=True)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    hidden = model.hidden(torch.cat(rows), positions, Layout.build([len(row) for row in rows]))
    start = 0
    for row, logits in zip(rows, expected["right.logits"], strict=True):
        ours, _ = linear_logprobs(hidden[start : start + len(row) - 1], model.head_weight, row[1:])
        theirs = logits[: len(row) - 1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
        assert torch.allclose(ours, theirs, atol=2e-4)
        start += len(row)


def test_a_later_token_changes_no_earlier_logit():
    model = small_model()
    ids = torch.randint(0, 40, (1, 12))
    before = model(ids)
    ids[0, 8] = (ids[0, 8] + 1) % 40
    after = model(ids)
    assert torch.equal(before[:, :8], after[:, :8]) and not torch.equal(before[:, 8], after[:, 8])


# ---------------------------------------------------------------------------------------- sampling

def test_greedy_tokens_equal_transformers_in_any_batch(case):
    model, expected, _ = case
    rows = zip(expected["left.input_ids"], expected["left.attention_mask"], strict=True)
    prompts = [row[mask.bool()].tolist() for row, mask in rows]
    for slots in (1, 2, 3):
        samples = generate(model, prompts, 24, temperature=0, slots=slots)
        assert [s[0].tokens for s in samples] == expected["greedy.tokens"].tolist()


def test_sampler_log_probs_equal_those_of_the_training_forward():
    model = small_model()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    drawn = generate(model, prompts, 9, temperature=0.7, n=3, stop_ids=(0, 1, 2), slots=4)
    for prompt, samples in zip(prompts, drawn, strict=True):
        for sample in samples:
            path = torch.tensor(prompt + sample.tokens)
            hidden = model.hidden(path, torch.arange(len(path)), Layout.build([len(path)]))[len(prompt) - 1 : -1]
            forward, _ = linear_logprobs(hidden, model.head_weight, path[len(prompt) :], temperature=0.7)
            assert torch.allclose(forward, torch.tensor(sample.logprobs, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_product_is_that_of_the_layers_apart(dtype):
    """Two weights, the second with a bias, 1 to 40 rows: errors against float64 at most 1.5 times PyTorch's."""
    dtype, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    if not can_pack(torch.zeros(1, 1), dtype):
        pytest.skip("this CPU's oneDNN does not multiply bf16")
    first, second, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((40, 48), (24, 48), (24,)))
    packed = PackedLinear([first, second], [None, bias], dtype)
    for rows in (1, 2, 16, 40):
        x = torch.randn(rows, 48, generator=generator).to(dtype)
        true = torch.cat([x.double() @ first.double().t(), x.double() @ second.double().t() + bias.double()], 1)
        plain = torch.cat([x @ first.t(), F.linear(x, second, bias)], 1)
        found = packed(x)
        assert found.dtype == dtype
        assert (found - true).abs().max() <= max(1e-5, 1.5 * (plain - true).abs().max().item())


@pytest.mark.parametrize("fields", [
    {}, {"qkv_bias": True, "mlp_bias": True, "out_bias": True}, {"gated": False, "activation": "gelu"},
    {"qk_norm": True, "parallel": True, "norms": 1}, {"tied": False, "window": 6}, {"lora": ("q_proj", "down_proj")},
])
def test_decoding_with_packed_weights_draws_the_same(fields, monkeypatch):
    fields = dict(fields)
    targets = fields.pop("lora", None)
    network = small_model(dtype=torch.float32, scale=20.0, **fields)
    if targets:
        add_lora(network, 4, 8, targets=targets)
        for layer in network.lora_layers:
            torch.nn.init.normal_(layer.adapters["default"].B)
    settings = dict(max_tokens=12, n=2, temperature=0.9, slots=4, seed=3)
    found = {}
    for after in (10**6, 1, 9):
        monkeypatch.setattr(model, "PACK_AFTER", after)
        found[after] = [s for samples in generate(network, [[1, 2, 3], [4], [5, 6]], **settings) for s in samples]
        packed = [module for module in network.modules() if getattr(module, "packed", None) is not None]
        assert not packed and network.packed_head is None  # the copies are gone
    for after in (1, 9):
        for ours, plain in zip(found[after], found[10**6], strict=True):
            assert ours.tokens == plain.tokens
            assert ours.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_packed_weights_are_made_anew_for_every_call_and_dropped_after_an_error(monkeypatch):
    monkeypatch.setattr(model, "PACK_AFTER", 1)
    network = small_model(dtype=torch.float32)
    before = generate(network, [[1, 2]], 6, temperature=0)[0][0]
    with torch.no_grad():
        network.embed_tokens.weight.mul_(0.5)
    after = generate(network, [[1, 2]], 6, temperature=0)[0][0]
    monkeypatch.setattr(model, "PACK_AFTER", 10**6)
    assert after.logprobs == pytest.approx(generate(network, [[1, 2]], 6, temperature=0)[0][0].logprobs, abs=1e-5)
    assert after.logprobs != pytest.approx(before.logprobs, abs=1e-3)
    monkeypatch.setattr(model, "PACK_AFTER", 1)
    monkeypatch.setattr(model.Decoder, "_draw", lambda self, chosen, _: 1 / 0 if self.decoded else
                        [s.tokens.append(1) for s in chosen])
    with pytest.raises(ZeroDivisionError):
        generate(network, [[1, 2]], 6)
    assert network.packed_head is None and network.layers[0].self_attn.packed is None


def test_a_decoder_drops_its_packed_weights_when_it_has_nothing_left(monkeypatch):
    monkeypatch.setattr(model, "PACK_AFTER", 2)
    network = small_model(dtype=torch.float32)
    decoder = model.Decoder(network, (), 1, 20)
    for _ in range(2):
        decoder.waiting.append(model.ReplyState([1, 2], 6, (0.0, 0, 1.0), [0]))
        held = []
        while decoder.step():
            held.append(network.packed_head is not None)
        assert held == [False, False, True, True, True, True] and network.packed_head is None


def test_with_checkpointing_no_probabilities_outlive_the_forward_pass():
    """4 blocks, 8 heads, 1,024 tokens: probabilities alone take at least 64 MiB (half of 4 * 8 * 1024^2 * 4 bytes),
    the blocks' inputs 0.5 MiB."""
    network = small_model(width=32, layers=4, heads=8, kv_heads=8, dtype=torch.float32)
    network.checkpointing = True
    tokens, layout = torch.randint(0, 40, (1024,)), Layout.build([1024])
    network.hidden(tokens, torch.arange(1024), layout)  # makes the layout's plan, which stays
    with torch.profiler.profile(profile_memory=True) as profile:
        hidden = network.hidden(tokens, torch.arange(1024), layout)
    held = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert hidden.requires_grad and 2**18 < held < 8 * 2**20


def test_cached_decoding_equals_running_the_whole_path(case):
    model, _, _ = case
    path = torch.randint(3, 300, (20,))
    cache = KVCache(model, slots=1, length=20)
    slot = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        whole = model.hidden(path, torch.arange(20), Layout.build([20]))
        for i in range(20):
            place = torch.tensor([i])
            step = model.hidden(path[i : i + 1], place, Layout.build([1]), cache.at(slot, place, i + 1, decoding=True))
            assert torch.allclose(step[0], whole[i], atol=3e-4)


@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize("slots", [1, 3])
def test_decoding_reads_caches_of_several_chunks(slots, window):
    """Sequences at 1, 63 and 130 tokens go on for 70, in slots whose last owner has left other numbers there."""
    model = small_model(window=window)
    starts = [130, 63, 1][:slots]
    paths = [torch.randint(0, 40, (start + 70,)) for start in starts]
    cache = KVCache(model, slots, 200)
    cache.keys.normal_(), cache.values.normal_()
    with torch.no_grad():
        whole = [model.hidden(path, torch.arange(len(path)), Layout.build([len(path)])) for path in paths]
        positions = torch.cat([torch.arange(start) for start in starts])
        owner = torch.arange(slots).repeat_interleave(torch.tensor(starts))
        model.hidden(torch.cat([path[:start] for path, start in zip(paths, starts, strict=True)]), positions,
                     Layout.build(starts), cache.at(owner, positions, max(starts), decoding=False))
        for i in range(70):
            place = torch.tensor(starts) + i
            tokens = torch.stack([path[k] for path, k in zip(paths, place, strict=True)])
            cache.longest = 0
            step = model.hidden(tokens, place, None, cache.at(torch.arange(slots), place, int(place.max()) + 1, True))
            for row, states, k in zip(step, whole, place, strict=True):
                assert torch.allclose(row, states[k], atol=1e-12)


def test_slots_move_with_all_their_chunks():
    model = small_model()
    cache = KVCache(model, 3, 200)
    cache.keys.normal_(), cache.values.normal_()
    cache.longest = 130  # tokens: of the third chunk two
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.move([2], [0])
    assert torch.equal(cache.keys[:, 0, :, :3], keys[:, 2, :, :3])
    assert torch.equal(cache.values[:, 0, :, :130], values[:, 2, :, :130])
    assert torch.equal(cache.keys[:, 1:], keys[:, 1:]) and torch.equal(cache.values[:, 1:], values[:, 1:])


def test_a_slot_that_held_nan_is_clean_for_the_next_sequence():
    model = small_model()
    plain = generate(model, [[1, 2], [3], [4, 5]], 8, 0.0)
    with torch.no_grad():
        model.embed_tokens.weight[39] = float("nan")
        model.lm_head = torch.nn.Linear(16, 40, bias=False, dtype=torch.float64)  # the head has no NaN
        model.lm_head.weight.copy_(small_model().embed_tokens.weight)
    for slots in (1, 2):
        first, bad, *others = generate(model, [[1, 2], [39] * 20, [3], [4, 5]], 8, 0.0, slots=slots)
        assert math.isnan(bad[0].logprobs[0]) and len(bad[0].tokens) == 1
        assert [x[0].tokens for x in (first, *others)] == [x[0].tokens for x in plain]


def test_samples_do_not_depend_on_the_batch():
    model = small_model()
    prompts = [[i + 1, i + 2] for i in range(12)]
    together = generate(model, prompts, 8, n=2, stop_ids=(3,), seed=5, slots=64)
    assert together == generate(model, prompts, 8, n=2, stop_ids=(3,), seed=5, slots=64)
    for slots in (1, 5):
        apart = generate(model, prompts, 8, n=2, stop_ids=(3,), seed=5, slots=slots)
        assert [[s.tokens for s in x] for x in apart] == [[s.tokens for s in x] for x in together]
    assert generate(model, prompts, 8, n=2, stop_ids=(3,), seed=6) != together
    assert together[0][0].tokens != together[0][1].tokens


def test_samples_of_a_prompt_share_its_reading_and_may_differ_in_settings(monkeypatch):
    """Three settings at once give what each gives alone; the prompt is run once."""
    import model as module

    model, prompts = small_model(), [[1, 2, 3, 4], [5, 6]]
    settings = [(0.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8)]
    read = []
    monkeypatch.setattr(module, "_prefill", lambda *a, real=module._prefill: read.append(len(a[2])) or real(*a))
    t, k, p = (list(x) for x in zip(*settings, strict=True))
    together = generate(model, prompts, 6, t, k, p, n=3, seed=4)
    assert read == [6]
    for j, setting in enumerate(settings):
        alone = generate(model, prompts, 6, *setting, n=3, seed=4)
        assert [samples[j].tokens for samples in together] == [samples[j].tokens for samples in alone]
    one_by_one = generate(model, prompts, 6, t, k, p, n=3, seed=4, slots=1)
    assert [[s.tokens for s in x] for x in together] == [[s.tokens for s in x] for x in one_by_one]
    with pytest.raises(ValueError, match="n=2 of them"):
        generate(model, prompts, 6, [0.5, 0.6, 0.7], n=2)


def test_a_sample_ends_with_its_stop_token_or_at_the_limit():
    model = small_model()
    samples = [s for x in generate(model, [[1], [2], [3]], 6, n=8, stop_ids=(5, 6)) for s in x]
    assert any(s.finished for s in samples) and not all(s.finished for s in samples)
    for s in samples:
        assert s.finished == (s.tokens[-1] in (5, 6)) and not set(s.tokens[:-1]) & {5, 6}
        assert s.finished or len(s.tokens) == 6


def test_a_stop_token_in_the_prompt_stops_nothing():
    assert len(generate(small_model(), [[5, 1, 5]], 3, temperature=0, stop_ids=(39,))[0][0].tokens) == 3


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(small_model(), [[1], []], 3)
    for options in ({"temperature": -0.7}, {"top_k": -1}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="expected >= 0"):
            generate(small_model(), [[1]], 3, **options)


def all_inside(probs, top_p):
    """in_nucleus of every token of each row."""
    columns = [torch.full((len(probs),), token) for token in range(probs.shape[1])]
    return torch.stack([in_nucleus(probs, tokens, top_p) for tokens in columns], 1)


def test_largest_is_the_first_of_the_largest():
    x = torch.randint(0, 50, (9, 2**15)).float()  # each row has its maximum hundreds of times
    assert x.numel() >= 2**18 and torch.equal(largest(x), x.argmax(-1))
    x[3, 777] = float("nan")
    assert largest(x)[3] == 777 == x[3].argmax()
    odd = torch.randn(9, 2**15 + 1)
    assert torch.equal(largest(odd), odd.argmax(-1))


def test_top_p_0_keeps_the_likeliest_token_and_ties_stay_together():
    assert all_inside(torch.tensor([[0.2, 0.5, 0.3]]), 0.0).tolist() == [[False, True, False]]
    assert all_inside(torch.tensor([[0.25, 0.25, 0.4, 0.1]]), 0.5).tolist() == [[True, True, True, False]]
    torch.manual_seed(1)
    logits = torch.randn(50, 9)
    tokens, _ = sample_tokens(logits, 1.0, 0, 0.0, torch.rand(50, DRAWS))
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("name", ["temp0.7", "topk5", "topk1", "topp0.9", "topp0.1", "temp0.8_topk12_topp0.95"])
def test_filters_keep_what_transformers_keeps(name):
    numbers, arrays = reference("sampling")
    options = dict(numbers["cases"][name])
    probs = (arrays["logits"] / options.get("t", 1.0)).softmax(-1)
    if "k" in options:
        probs = keep_top_k(probs, options["k"])
    if "p" in options:
        probs = probs * all_inside(probs, options["p"])
    kept = arrays[f"{name}.kept"]
    if name == "topp0.1":  # its first row has two equal tokens at the edge, of which transformers keeps one and we both
        equal = (probs == probs.masked_fill(~kept, 1.0).amin(-1, keepdim=True)) & (probs > 0)
        assert (equal.sum(-1) > 1).tolist() == [True] + [False] * (len(probs) - 1)
        probs = probs.masked_fill(equal & ~kept, 0.0)
    assert torch.equal(probs > 0, kept)
    assert torch.allclose(probs / probs.sum(-1, keepdim=True), arrays[f"{name}.probs"], atol=1e-6)


def test_draws_follow_the_filtered_distribution():
    """20,000 draws; chi-square with k - 1 degrees of freedom stays below its 99.9 % quantile (about k + 4 sqrt(2 k)).

    What is expected comes from sorting, which sampling does without. A flat distribution is refused most often.
    """
    torch.manual_seed(0)
    for spread in (2.0, 0.05):
        logits = torch.randn(1, 300) * spread
        for top_k, top_p in ((0, 1.0), (12, 1.0), (0, 0.8), (40, 0.9), (0, 0.05)):
            filtered = keep_top_k((logits / 0.9).softmax(-1), top_k or 300)[0]
            ordered, ids = filtered.sort(descending=True)
            count = int((ordered.cumsum(0) < top_p).sum()) + 1
            expected = torch.zeros(300).scatter(0, ids[:count], ordered[:count] / ordered[:count].sum()) * 20_000
            tokens, logprobs = sample_tokens(logits.expand(20_000, -1), 0.9, top_k, top_p, torch.rand(20_000, DRAWS))
            counts = torch.bincount(tokens, minlength=300).float()
            assert counts[expected == 0].sum() == 0
            common = expected >= 5
            k = int(common.sum())
            chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
            assert chi_square < k + 4 * math.sqrt(2 * k)
            assert torch.allclose(logprobs, (logits[0] / 0.9).log_softmax(-1)[tokens], atol=1e-5)


def test_the_largest_uniform_number_still_picks_a_possible_token():
    logits = torch.tensor([[0.0, 3.0, -torch.inf, 1.0, -torch.inf]])
    tokens, _ = sample_tokens(logits, 1.0, 0, 1.0, torch.full((1, DRAWS), 1.0 - 2**-24))
    assert tokens.item() == 3


def test_every_prompt_may_have_its_own_limit():
    said = generate(small_model(), [[1, 2], [3], [4, 5, 6]], [3, 0, 5])
    assert [len(sample.tokens) for [sample] in said] == [3, 0, 5]


def test_top_k_1_is_greedy():
    model = small_model()
    one, greedy = (generate(model, [[1, 2]], 10, temperature=t, top_k=k)[0][0].tokens for t, k in ((1.0, 1), (0, 0)))
    assert one == greedy


# ------------------------------------------------------------------------------ on Triton and graphs

@pytest.mark.parametrize("fields", [
    {}, {"window": 4, "qk_norm": True}, {"window": 4, "window_layers": (1,), "scaled": False, "norm_offset": 1.0,
     "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32,
                      "beta_slow": 1, "truncate": True, "attention_factor": 1.1}}])
def test_a_model_on_triton_gives_the_same_tree_gradients_and_samples(fields):
    """Trunk 0..9, leaves after 2 and 7 tokens, then three prompts sampled greedily: PyTorch and Triton."""
    from interpreter import DEVICE

    import kernels

    model = small_model(dtype=torch.float32, scale=3.0, **fields).to(DEVICE)
    tokens, targets = torch.randint(0, 40, (2, 15), device=DEVICE)
    layout = Layout.build([10, 3, 2], [0, 0, 0], [0, 2, 7]).to(DEVICE)
    positions = torch.tensor([*range(10), 2, 3, 4, 7, 8], device=DEVICE)
    found = {}
    for name in ("torch", "triton"):
        kernels.use(name)
        try:
            logprobs, _ = linear_logprobs(model.hidden(tokens, positions, layout), model.head_weight, targets)
            gradients = torch.autograd.grad(-logprobs.mean(), list(model.parameters()))
            samples = generate(model, [[1, 2, 3], [4] * 7, [5]], 3, temperature=0)
            found[name] = logprobs, gradients, [s[0].tokens for s in samples]
        finally:
            kernels.use("auto")
    torch.testing.assert_close(found["triton"][0], found["torch"][0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found["triton"][1], found["torch"][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert found["triton"][2] == found["torch"][2]


def test_what_generate_keeps_changes_no_token_and_is_taken_again_while_it_is_large_enough():
    """Weights that training changes in place are read anew; a longer reply needs another cache."""
    network = small_model(dtype=torch.float32, scale=3.0).to("cuda" if torch.cuda.is_available() else "cpu")
    prompts, kept = [[1, 2, 3], [4] * 7, [5]], []
    for seed, count in enumerate((8, 5, 8, 300)):
        with torch.no_grad():
            network.layers[0].mlp.up_proj.weight.mul_(-1)
        given = dict(n=2, stop_ids=(3,), seed=seed)
        replies = generate(network, prompts, count, **given, keep=True)
        kept.append(network.decoder)
        plain = generate(network, prompts, count, **given)
        assert [[s.tokens for s in each] for each in replies] == [[s.tokens for s in each] for each in plain]
        assert network.decoder is kept[-1]
    assert kept[0] is kept[1] is kept[2] is not kept[3]


def test_the_decoder_works_on_its_models_device_in_any_thread(monkeypatch):
    """A new thread's current GPU is the first one, wherever the model is: there kernels and graphs would run."""
    entered = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or device_of(x))
    decoder = Decoder(small_model(), (), 1, 8)
    decoder.waiting.append(ReplyState([1, 2], 3, (0.0, 0, 1.0), [0]))
    with ThreadPoolExecutor(1) as pool:
        while pool.submit(decoder.step).result():
            pass
    assert len(entered) == 4 and all(x is decoder.cache.values for x in entered)


def test_decoding_by_graphs_changes_no_token(monkeypatch):
    """Slots are freed and taken again, so that graphs of several sizes run. Without a GPU a stand-in calls the step."""
    import model as source

    class Repeated:
        def __init__(self, step, logits):
            self.step, self.logits = step, logits

        def replay(self):
            self.logits.copy_(self.step())

    def capture(self, tokens, positions):
        logits = self.step(tokens, positions, self.cache.room)
        return Repeated(lambda: self.step(tokens, positions, self.cache.room), logits), tokens, positions, logits

    gpu = torch.cuda.is_available()
    network = small_model(dtype=torch.float32, scale=3.0).to("cuda" if gpu else "cpu")
    prompts = [[1 + i % 30] * (1 + 5 * i % 11) for i in range(23)]
    settings = dict(max_tokens=12, n=2, stop_ids=(3,), seed=1, slots=9)
    with monkeypatch.context() as patch:
        patch.setattr(source, "DecodeGraphs", lambda step, cache, slots: step)
        plain = generate(network, prompts, **settings)
    if not gpu:
        monkeypatch.setattr(source.DecodeGraphs, "_capture", capture)
        monkeypatch.setattr(source, "partial",
                            lambda step, *given: source.DecodeGraphs(partial(step, *given), given[1], 9))
    by_graphs = generate(network, prompts, **settings)
    assert [[s.tokens for s in each] for each in by_graphs] == [[s.tokens for s in each] for each in plain]
