import torch

from kernels.fused import rms_norm, rotary, swiglu


def test_rms_norm_by_hand():
    """x = (3, 4): mean square 12.5, root 3.5355, so (0.8485, 1.1314), times weights (1, 2)."""
    y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    assert torch.allclose(y, torch.tensor([[0.848528, 2.262742]]))


def test_rotary_by_hand():
    """A quarter turn of the pair (1, 0) is (0, 1), of (0, 1) is (-1, 0)."""
    cos, sin = torch.zeros(1, 1, 2), torch.tensor([[[-1.0, 1.0]]])
    assert torch.equal(rotary(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), cos, sin), torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]))


def test_gradients_are_those_of_the_formulas():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 12, dtype=torch.float64, requires_grad=True), torch.randn(12, dtype=torch.float64, requires_grad=True)
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
