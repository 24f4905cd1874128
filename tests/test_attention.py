import random

import pytest
import torch
from conftest import small_model

import kernels.attention as kernel
from kernels.attention import attention, attention_reference
from kernels.decode import decode_attention
from kernels.layout import Layout


def test_the_reference_by_hand():
    """Trunk a b, leaf c after a: b sees a and b, c sees a and c. Scores 0 and log 3 give weights 1/4 and 3/4."""
    k = torch.tensor([0.0, 3.0, 3.0]).log().nan_to_num(neginf=0.0)[:, None, None].double()
    v = torch.tensor([4.0, 8.0, 16.0]).double()[:, None, None]
    out = attention_reference(torch.ones_like(k), k, v, Layout.build([2, 1], [0, 0], [0, 1]))
    assert torch.allclose(out.flatten(), torch.tensor([4.0, 7.0, 13.0]).double())


def random_layout(rng):
    lengths, trunks, prefixes = [], [], []
    for _ in range(rng.randint(1, 4)):
        trunk, length = len(lengths), rng.choice([1, 2, 15, 17, 64, 129, 200])
        lengths.append(length), trunks.append(trunk), prefixes.append(0)
        for _ in range(rng.choice([0, 0, 1, 3])):
            lengths.append(rng.choice([1, 3, 40, 130])), trunks.append(trunk), prefixes.append(rng.randint(1, length))
    return Layout.build(lengths, trunks, prefixes)


def qkv(layout, heads=2, kv_heads=1, width=8, dtype=torch.float64):
    return [torch.randn(layout.tokens, h, width, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("trial", range(20))
def test_output_and_gradients_equal_the_dense_definition(trial, monkeypatch):
    rng = random.Random(trial)
    torch.manual_seed(trial)
    monkeypatch.setattr(kernel, "SCORES_AT_ONCE", rng.choice([2**20, 1000]))  # one block of rows, or many
    layout = random_layout(rng)
    kv_heads = rng.choice([1, 2])
    q, k, v = qkv(layout, kv_heads * rng.choice([1, 2, 4]), kv_heads)
    window, softcap = rng.choice([None, None, 1, 9, 1000]), rng.choice([None, None, 5.0])
    ours = attention(q, k, v, layout, window, softcap)
    truth = attention_reference(q, k, v, layout, window, softcap)
    assert torch.allclose(ours, truth, atol=1e-10)
    upstream = torch.randn_like(ours)
    found, right = (torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, truth))
    for a, b in zip(found, right, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_rows_that_pad_the_batch_give_and_take_nothing():
    layout = Layout.build([5, 3], [0, 0], [0, 2])
    # Eight tokens, four rows more.
    q, k, v = (torch.randn(12, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, layout)
    assert torch.allclose(out[:8], attention_reference(q[:8], k[:8], v[:8], layout)) and not out[8:].any()
    for x in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert x[:8].any() and not x[8:].any()
    with pytest.raises(ValueError, match="7 tokens|8 tokens"):
        attention(q[:7], k[:7], v[:7], layout)


@pytest.mark.parametrize("shift", [-120.0, 200.0])
def test_extreme_scores_give_finite_gradients(shift):
    layout = Layout.build([704, 64, 1])
    q, k, v = qkv(layout, dtype=torch.float32)
    with torch.no_grad():  # every score near `shift`
        q[..., 0], k[..., 0] = abs(shift) ** 0.5 * 8**0.25, (shift / abs(shift)) * abs(shift) ** 0.5 * 8**0.25
    out = attention(q, k, v, layout)
    out.square().sum().backward()
    assert all(torch.isfinite(x).all() for x in (out, q.grad, k.grad, v.grad))


def test_nan_in_one_segment_reaches_no_other():
    layout = Layout.build([5, 3, 40, 2], [0, 0, 2, 2], [0, 2, 0, 39])
    q, k, v = qkv(layout)
    with torch.no_grad():
        for x in (q, k, v):
            x[5:8] = torch.nan  # the leaf of the first tree
    out = attention(q, k, v, layout)
    clean = torch.ones(layout.tokens, dtype=torch.bool)
    clean[5:8] = False
    assert torch.isfinite(out[clean]).all() and torch.isnan(out[5:8]).all()
    out[8:].sum().backward()  # the other tree
    assert all(torch.isfinite(x.grad[8:]).all() for x in (q, k, v))


def test_a_sequence_of_one_token_returns_its_value():
    layout = Layout.build([1, 1])
    q, k, v = qkv(layout)
    out = attention(q, k, v, layout)
    assert torch.equal(out, v.expand_as(out))


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_equals_the_last_row_of_full_attention(window):
    lengths = [4, 9, 1]
    layout = Layout.build(lengths)
    q, k, v = (x.detach() for x in qkv(layout, 4, 2))
    full = attention(q, k, v, layout, window)
    last = layout.start + layout.length - 1
    cache_k, cache_v = torch.randn(2, 3, 2, 9, 8, dtype=torch.float64)  # junk beyond each length
    for row, (start, length) in enumerate(zip(layout.start.tolist(), lengths, strict=True)):
        cache_k[row, :, :length], cache_v[row, :, :length] = (x[start : start + length].transpose(0, 1) for x in (k, v))
    decoded = decode_attention(q[last], cache_k, cache_v, torch.tensor(lengths), window)
    assert torch.allclose(decoded, full[last], atol=1e-12)


def test_layout_of_the_drawn_tree():
    layout = Layout.build([10, 3, 2], [0, 0, 0], [0, 2, 7])
    assert layout.start.tolist() == [0, 10, 13] and layout.trunk_start.tolist() == [0, 0, 0]
    assert layout.first_child.tolist() == [1, 2, 3] and layout.last_child.tolist() == [3, 2, 3]


def test_misfits_are_refused():
    layout = Layout.build([3])
    q = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:2], q, q, layout)
    with pytest.raises(ValueError, match="window is 0"):
        attention(q, q, q, layout, window=0)
    with pytest.raises(ValueError, match="after the end"):
        Layout.build([3, 1], [0, 0], [0, 4])


@pytest.mark.parametrize("window", [None, 4])
def test_a_model_gives_a_tree_the_hidden_states_of_its_paths(window):
    """Trunk 0..9, leaves after 2 and 7 tokens: every path run alone gives the same hidden states."""
    model = small_model(window=window)
    tokens = torch.randint(0, 40, (15,))
    layout = Layout.build([10, 3, 2], [0, 0, 0], [0, 2, 7])
    positions = torch.tensor([*range(10), 2, 3, 4, 7, 8])
    tree = model.hidden(tokens, positions, layout)
    for path in ([*range(10)], [0, 1, 10, 11, 12], [*range(7), 13, 14]):
        alone = model.hidden(tokens[path], torch.arange(len(path)), Layout.build([len(path)]))
        assert torch.allclose(tree[path], alone, atol=1e-10)
