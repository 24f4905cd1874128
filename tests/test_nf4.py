import pytest
import torch
from conftest import reference
from interpreter import DEVICE, close, guarded, intact
from test_fused import fenced, shapes

import kernels
from kernels import nf4
from kernels.nf4 import LEVELS, NF4, block_scales, dequantize, floats, linear, quantize
from lora import NF4Linear
from model import Linear


@pytest.fixture(params=["torch", "triton"])
def version(request):
    kernels.use(request.param)
    yield request.param
    kernels.use("auto")


def test_the_tables_equal_bitsandbytes():
    _, case = reference("quant/nf4")
    assert torch.equal(LEVELS, case["codebook.nf4"])
    torch.testing.assert_close(floats(), case["w32.nf4.dq.code"], atol=1e-7, rtol=0)


def test_the_levels_are_quantiles_of_a_normal_distribution():
    edge = 0.9677083  # half a step in from 1, averaged over both sides
    above, below = (torch.special.ndtri(torch.linspace(edge, 0.5, n, dtype=torch.float64)[:-1]) for n in (9, 8))
    values = torch.cat([-below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(LEVELS, (values / values.max()).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("key", ["w32", "wbf16", "wfp16"])
def test_codes_scales_and_values_equal_bitsandbytes(key, version):
    """Bytes exactly; byte scales within one step, where its CPU code takes the neighbour of the nearest."""
    numbers, case = reference("quant/nf4")
    case = {name: array.to(DEVICE) for name, array in case.items()}
    told = next(c for c in numbers["cases"] if c["key"] == f"{key}.nf4")
    weight = case[f"{key}.weight"]
    single = quantize(weight, told["blocksize"], double=False)
    assert torch.equal(single.codes, case[f"{key}.nf4.packed"].flatten())
    assert torch.equal(single.scales, case[f"{key}.nf4.absmax"])
    assert torch.equal(dequantize(single, weight.dtype), case[f"{key}.nf4.dequant"])
    assert single.bits == told["bits_per_param"]
    double = quantize(weight, told["blocksize"])
    steps = (double.scales.int() - case[f"{key}.nf4.dq.absmax_u8"].int()).abs()
    assert steps.max() <= 1 and (steps > 0).sum() <= told["dq_codes_not_nearest"]
    scales, scales2, offset = (case[f"{key}.nf4.dq.{name}"] for name in ("absmax_u8", "absmax2", "offset"))
    theirs = NF4(single.codes, scales, scales2, offset[0], weight.shape, told["blocksize"])
    torch.testing.assert_close(block_scales(theirs), case[f"{key}.nf4.dq.absmax"], atol=1e-7, rtol=1e-6)
    rounding = {"w32": 1e-6, "wbf16": 1e-2, "wfp16": 1e-3}[key]
    restored = dequantize(theirs, weight.dtype)
    torch.testing.assert_close(restored, case[f"{key}.nf4.dq.dequant"], atol=1e-6, rtol=rounding)


def test_normal_weights_lose_0_0726_of_their_deviation():
    weight = torch.randn(512, 512)
    single, double = quantize(weight, double=False), quantize(weight)
    assert (dequantize(single) - weight).abs().mean().item() == pytest.approx(0.0726, abs=0.0005)
    assert (dequantize(double) - weight).abs().mean().item() == pytest.approx(0.0726, abs=0.001)
    assert single.bits == 4.5 and double.bits == pytest.approx(4.127, abs=1e-3)


def test_zeros_stay_zeros_and_a_last_block_may_be_short():
    weight = torch.zeros(4, 64)
    weight[0] = 1
    for double in (False, True):
        assert (dequantize(quantize(weight, double=double))[1:] == 0).all()
    short = torch.randn(5, 13)
    whole = torch.cat([short.flatten(), torch.zeros(63)])
    for double in (False, True):
        found, right = (dequantize(quantize(weight, double=double)).flatten() for weight in (short, whole))
        assert torch.equal(found, right[:65])
    with pytest.raises(ValueError, match="block is 63, expected a power of two"):
        quantize(short, block=63)


# --------------------------------------------------------------------------------- the Triton version

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
SMALL = {"quantize": (512, 1), "dequantize": (512, 1), "linear": {16: (16, 64, 1, 1), 32: (32, 128, 1, 1)}}
TILES = {"small tiles": SMALL, "shipped tiles": nf4.CONFIGS[90]}  # 90: what the interpreter takes


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch, on_triton):
    monkeypatch.setattr(nf4, "CONFIGS", dict.fromkeys(nf4.CONFIGS, TILES[request.param]))
    return request.param


def as_pytorch(function, *args):
    """What the PyTorch version says while Triton is on."""
    kernels.use("torch")
    try:
        return function(*args)
    finally:
        kernels.use("triton")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@shapes([(1, 1), (2, 3), (5, 13), (12, 130)], [(1, 2), (32, 130)])
def test_triton_quantises_and_restores_the_bits_of_pytorch(tiles, shape, dtype):
    weight = torch.randn(shape).to(DEVICE, dtype)
    for block, double in ((64, False), (64, True), (128, True)):
        ours, right = quantize(weight, block, double), as_pytorch(quantize, weight, block, double)
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], right[:4], strict=True) if b is not None)
        assert torch.equal(dequantize(ours, dtype), as_pytorch(dequantize, right, dtype))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_value_that_is_not_finite_spoils_its_block_alone_as_in_pytorch(on_triton):
    """A NaN makes the scale NaN and with it 64 weights; beside an infinity weights become 0; 0 x infinity is NaN."""
    weight = torch.randn(4, 64, device=DEVICE)
    weight[1, 3], weight[2, 5] = float("nan"), float("-inf")
    ours, right = quantize(weight, double=False), as_pytorch(quantize, weight, 64, False)
    assert torch.equal(ours.codes, right.codes) and torch.equal(ours.scales.nan_to_num(), right.scales.nan_to_num())
    assert torch.isnan(dequantize(ours)).sum(1).tolist() == [0, 64, 63, 0]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 70])
def test_linear_is_dequantise_and_matmul(tiles, rows, dtype):
    """However the scales are stored. Two tiles of outputs and of columns at least, the last ones not full."""
    outputs, inputs = (40, 192) if tiles == "small tiles" else (136, 320)
    double = as_pytorch(quantize, torch.randn(outputs, inputs, device=DEVICE).to(dtype))
    single = double._replace(scales=block_scales(double), scales2=None, offset=None)
    x = torch.randn(rows, inputs).to(DEVICE, dtype)
    y = linear(x, double)
    assert torch.equal(linear(x, single), y) and y.dtype == dtype
    close(y.cpu(), (x.double() @ as_pytorch(dequantize, double, dtype).double().t()).cpu(), TOLERANCE[dtype])


def test_linear_takes_more_rows_than_a_tile_and_any_number_of_dimensions(on_triton):
    state, x = quantize(torch.randn(40, 64, device=DEVICE)), torch.randn(2, 75, 64, device=DEVICE).half()
    y = linear(x, state)
    close(y.cpu(), (x.double() @ dequantize(state).double().t()).cpu(), TOLERANCE[torch.float16])
    assert linear(x[:, :0], state).shape == (2, 0, 40)


@pytest.mark.parametrize("shape, block, rows, dtype", [
    ((8, 100), 64, 3, torch.float16), ((8, 128), 128, 3, torch.float16), ((8, 64), 64, 300, torch.float16),
    ((8, 64), 64, 3, torch.float32)])
def test_linear_decodes_first_where_tiles_do_not_fit_or_do_not_pay(on_triton, monkeypatch, shape, block, rows, dtype):
    """Rows that end within blocks, another block, a tall x, fp32; an x in 16 bits that fits goes to the tiles."""
    state, x = quantize(torch.randn(shape, device=DEVICE), block), torch.randn(rows, shape[1], device=DEVICE).to(dtype)
    monkeypatch.setattr(nf4, "_linear_in_tiles", None)
    assert torch.equal(linear(x, state), x @ dequantize(state, dtype).t())
    with pytest.raises(TypeError):
        linear(torch.randn(3, 64, device=DEVICE).half(), quantize(torch.randn(8, 64, device=DEVICE)))


@pytest.mark.parametrize("programs", [1, 512])
def test_linear_gives_the_same_bits_twice_and_a_nan_stays_in_its_row(tiles, monkeypatch, programs):
    monkeypatch.setattr(nf4, "PROGRAMS", programs)  # columns in one piece, and in shares
    state, x = as_pytorch(quantize, torch.randn(24, 576, device=DEVICE)), torch.randn(9, 576, device=DEVICE).half()
    clean = linear(x, state)
    assert torch.equal(linear(x, state), clean)
    x[4, 530] = float("nan")
    spoiled = linear(x, state)
    assert torch.isnan(spoiled[4]).all() and torch.equal(spoiled[torch.arange(9) != 4], clean[torch.arange(9) != 4])


def test_triton_keeps_within_its_tensors_and_writes_each_value_once(tiles):
    for shape, rows in (((5, 13), 3), ((40, 192), 21)):
        weight = guarded(torch.randn(shape, device=DEVICE))
        x = guarded(torch.randn(rows, shape[1], device=DEVICE).half())
        with fenced():
            states = [quantize(weight, double=double) for double in (False, True)]
        for state in states:
            state = NF4(*(None if t is None else guarded(t) for t in state[:4]), *state[4:])
            with fenced():
                found = dequantize(state), linear(x, state)
            assert all(torch.isfinite(t).all() for t in found)
            assert all(intact(t) for t in (weight, x, *state[:4]) if t is not None)


@pytest.mark.parametrize("rows", [5, 300])
def test_a_quantised_layer_and_its_gradient_are_those_of_its_decoded_weight(on_triton, rows):
    torch.manual_seed(1)
    plain = Linear(64, 24, bias=True)
    torch.nn.init.normal_(plain.weight), torch.nn.init.normal_(plain.bias)
    layer = NF4Linear(plain.to(DEVICE))
    x = torch.randn(rows, 64, device=DEVICE).half().requires_grad_()
    y = layer(x)
    upstream = torch.randn(rows, 24, device=DEVICE).to(y.dtype)
    weight = layer.decoded(torch.float32).double()
    right = x.detach().double() @ weight.t() + plain.bias.detach().double()
    close(y.detach().cpu(), right.cpu(), TOLERANCE[torch.float16])
    close(torch.autograd.grad(y, x, upstream)[0].cpu(), (upstream.double() @ weight).cpu(), TOLERANCE[torch.float16])
