from contextlib import contextmanager

import pytest
import torch
from interpreter import DEVICE, close, guarded, intact, strict

from kernels import fused
from kernels.fused import rms_norm, rms_norm_reference, rotary, rotary_reference, swiglu, swiglu_reference


def test_rms_norm_by_hand():
    """x = (3, 4): mean square 12.5, root 3.5355, so (0.8485, 1.1314), times weights (1, 2)."""
    y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    assert torch.allclose(y, torch.tensor([[0.848528, 2.262742]]))


def test_rotary_by_hand():
    """A quarter turn of the pair (1, 0) is (0, 1), of (0, 1) is (-1, 0)."""
    cos, sin = torch.zeros(1, 1, 2), torch.tensor([[[-1.0, 1.0]]])
    turned = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
    assert torch.equal(rotary(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), cos, sin), turned)


def test_gradients_are_those_of_the_formulas():
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 12), (12,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    y, angles = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 1, 4, dtype=torch.float64)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    assert torch.autograd.gradcheck(lambda y: rotary(y, cos, sin), (y,))
    assert torch.autograd.gradcheck(swiglu, (x, x.detach().flip(0).requires_grad_()))


def test_bf16_rms_norm_is_as_good_as_rounding_its_result():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256).bfloat16() * 30, torch.rand(256) + 0.5
    truth = rms_norm(x.double(), weight.double(), 1e-5)
    error = (rms_norm(x, weight, 1e-5).double() - truth).abs() / truth.abs()
    assert error.max() < 4 * 2**-8  # four roundings of at most 2^-8 each: root, product, weight, product


# --------------------------------------------------------------------------------- the Triton version

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
TILES = {"small tiles": {"tile": 64, "programs": 2}, "shipped tiles": fused.CONFIGS[90]}  # 90: the interpreter's


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch, on_triton):
    monkeypatch.setattr(fused, "CONFIGS", dict.fromkeys(fused.CONFIGS, TILES[request.param]))
    return request.param


def shapes(small, shipped):
    """Shapes for small tiles, and larger ones that take two shipped tiles."""
    cases = [("small tiles", shape) for shape in small] + [("shipped tiles", shape) for shape in shipped]
    return pytest.mark.parametrize("tiles, shape", cases, indirect=["tiles"], ids=str)


def drawn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def angles(tokens, width, dtype):
    """cos and sin as rotary takes them."""
    turned = torch.rand(tokens, 1, width // 2) * 6
    return torch.cat([turned.cos()] * 2, -1).to(dtype), torch.cat([-turned.sin(), turned.sin()], -1).to(dtype)


def test_the_pytorch_versions_equal_the_references():
    x, weight, up, q = drawn(7, 12), drawn(12), drawn(7, 12), drawn(5, 3, 8)
    for version, plain, inputs in ((lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5),
                                    (x, weight)),
                                   (rotary, rotary_reference, (q, *angles(5, 8, torch.float32))),
                                   (swiglu, swiglu_reference, (x, up))):
        torch.testing.assert_close(version(*inputs), plain(*inputs))
        inputs = [t.requires_grad_() for t in inputs]
        torch.testing.assert_close(version(*inputs), plain(*inputs))
        found, right = (torch.autograd.grad(call(*inputs).square().sum(), inputs[0]) for call in (version, plain))
        torch.testing.assert_close(found, right)


def check(function, inputs, upstream=None):
    """Output and gradients of the Triton version against those of the PyTorch version in float64; returns them."""
    ours = [x.to(DEVICE).requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    out, truth = function(*ours), function(*wide)
    upstream = torch.randn_like(truth).to(inputs[0].dtype) if upstream is None else upstream
    found = [out, *torch.autograd.grad(out, ours, upstream.to(DEVICE))]
    right = [truth, *torch.autograd.grad(truth, wide, upstream.double())]
    for mine, true in zip(found, right, strict=True):
        close(mine.cpu(), true, TOLERANCE[inputs[0].dtype])
    assert all(mine.dtype == x.dtype for mine, x in zip(found[1:], ours, strict=True)) and out.dtype == inputs[0].dtype
    return found


@contextmanager
def fenced():
    """strict(), and what torch.empty and empty_like make lies between bands that must be intact in the end."""
    made, makers = [], (torch.empty, torch.empty_like)

    def between(make):
        def call(*args, **kwargs):
            made.append(guarded(make(*args, **kwargs)))
            return made[-1]
        return call

    torch.empty, torch.empty_like = map(between, makers)
    try:
        with strict():
            yield
    finally:
        torch.empty, torch.empty_like = makers
    assert made and all(intact(x) for x in made)


def to_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@shapes([(1, 1), (1, 16), (25, 7), (11, 48), (5, 3, 20)], [(1, 1), (70, 128)])
def test_triton_rms_norm(tiles, shape, dtype):
    # Norms train in fp32, or are frozen as stored.
    weight = drawn(shape[-1], dtype=dtype if dtype == torch.float16 else torch.float32)
    check(lambda x, w: rms_norm(x, w, 1e-5), [drawn(*shape, dtype=dtype, scale=3.0), weight])


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_triton_rms_norm_without_eps(tiles):
    """Rows past the last have r = 1 / 0, which must not reach dw."""
    check(lambda x, w: rms_norm(x, w, 0.0), [drawn(5, 20), drawn(20)])


@pytest.mark.parametrize("width", [4096, 5000])
def test_triton_rms_norm_of_rows_as_wide_as_a_model(on_triton, width):
    check(lambda x, w: rms_norm(x, w, 1e-5), [drawn(3, width, dtype=torch.bfloat16), drawn(width)])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@shapes([(1, 1, 2), (5, 3, 8), (9, 2, 10), (2, 2, 128)], [(1, 1, 2), (5, 8, 128)])
def test_triton_rotary(tiles, shape, dtype):
    cos, sin = angles(shape[0], shape[2], dtype)
    check(lambda x: rotary(x, cos.to(x), sin.to(x)), [drawn(*shape, dtype=dtype)])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@shapes([(1, 1), (7, 13), (3, 5, 64)], [(1, 1), (2, 4097)])
def test_triton_swiglu(tiles, shape, dtype):
    check(swiglu, [drawn(*shape, dtype=dtype, scale=3.0), drawn(*shape, dtype=dtype)])


@pytest.mark.filterwarnings("ignore:overflow")  # exp(1e4) is infinite and its inverse 0, as it should be
def test_triton_swiglu_of_large_gates_is_finite(on_triton):
    check(swiglu, [torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4]), drawn(7)])


def test_triton_takes_views_and_broadcast_gradients(tiles):
    """Partial rotary gives a slice of the head, `sum` a gradient of stride 0."""
    cos, sin = angles(6, 8, torch.float32)
    check(lambda x: rotary(x[..., :8], cos.to(x), sin.to(x)), [drawn(6, 3, 12)], torch.ones(()).expand(6, 3, 8))
    check(lambda x, w: rms_norm(x.transpose(0, 1), w, 1e-5), [drawn(12, 9), drawn(12)], torch.ones(()).expand(9, 12))
    check(lambda x: swiglu(x[:, :5], x[:, 5:]), [drawn(9, 10)], torch.ones(()).expand(9, 5))


def test_triton_takes_no_rows_at_all(on_triton):
    x, weight = torch.zeros(0, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros_like(weight))
    assert swiglu(x, x).shape == (0, 8) and rotary(x[:, None], x[:, None], x[:, None]).shape == (0, 1, 8)


def test_a_frozen_norm_has_no_gradient(on_triton):
    x, weight = drawn(5, 8).to(DEVICE).requires_grad_(), torch.ones(8, device=DEVICE)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_triton_keeps_within_its_tensors_and_writes_each_value_once(tiles):
    x, up, weight, heads = (guarded(t.to(DEVICE)) for t in (drawn(13, 20), drawn(13, 20), drawn(20), drawn(7, 3, 10)))
    cos, sin = (guarded(t.to(DEVICE)) for t in angles(7, 10, torch.float32))
    for function, inputs in ((lambda x, w: rms_norm(x, w, 1e-5), (x, weight)),
                             (lambda x: rotary(x, cos, sin), (heads,)), (swiglu, (x, up))):
        inputs = [t.requires_grad_() for t in inputs]
        upstream = guarded(torch.randn(inputs[0].shape, device=DEVICE))
        with fenced():
            out = function(*inputs)
            gradients = torch.autograd.grad(out, inputs, upstream)
        assert all(torch.isfinite(t).all() for t in (out, *gradients))
        assert all(intact(t) for t in (*inputs, upstream, cos, sin))


def test_triton_keeps_a_nan_in_its_row(tiles):
    x, up, heads = drawn(9, 20), drawn(9, 20), drawn(9, 2, 8)
    cos, sin = to_device(*angles(9, 8, torch.float32))
    x[4, 7] = heads[4, 1, 3] = float("nan")
    other = torch.arange(9) != 4
    for function, inputs in ((lambda x: rms_norm(x, torch.ones(20, device=DEVICE), 1e-5), (x,)),
                             (lambda x: rotary(x, cos, sin), (heads,)), (swiglu, (x, up))):
        inputs = [t.to(DEVICE).requires_grad_() for t in inputs]
        out = function(*inputs)
        for t in (out, *torch.autograd.grad(out.sum(), inputs)):
            assert torch.isfinite(t[other.to(DEVICE)]).all()
        assert torch.isnan(out[4]).any()


def test_triton_gives_the_same_bits_twice(tiles):
    x, weight = (t.to(DEVICE).requires_grad_() for t in (drawn(50, 20), drawn(20)))
    first, second = (torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), (x, weight)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
