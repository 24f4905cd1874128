import pytest
import torch
from conftest import reference

from kernels.nf4 import LEVELS, NF4, block_scales, dequantize, floats, quantize


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
def test_codes_scales_and_values_equal_bitsandbytes(key):
    """Bytes exactly; byte scales within one step, where its CPU code takes the neighbour of the nearest."""
    numbers, case = reference("quant/nf4")
    told = next(c for c in numbers["cases"] if c["key"] == f"{key}.nf4")
    weight = case[f"{key}.weight"]
    single = quantize(weight, told["blocksize"], double=False)
    assert torch.equal(single.codes, case[f"{key}.nf4.packed"].flatten()) and torch.equal(single.scales, case[f"{key}.nf4.absmax"])
    assert torch.equal(dequantize(single, weight.dtype), case[f"{key}.nf4.dequant"])
    assert single.bits == told["bits_per_param"]
    double = quantize(weight, told["blocksize"])
    steps = (double.scales.int() - case[f"{key}.nf4.dq.absmax_u8"].int()).abs()
    assert steps.max() <= 1 and (steps > 0).sum() <= told["dq_codes_not_nearest"]
    theirs = NF4(single.codes, case[f"{key}.nf4.dq.absmax_u8"], case[f"{key}.nf4.dq.absmax2"], case[f"{key}.nf4.dq.offset"][0],
                 weight.shape, told["blocksize"])
    torch.testing.assert_close(block_scales(theirs), case[f"{key}.nf4.dq.absmax"], atol=1e-7, rtol=1e-6)
    rounding = {"w32": 1e-6, "wbf16": 1e-2, "wfp16": 1e-3}[key]
    torch.testing.assert_close(dequantize(theirs, weight.dtype), case[f"{key}.nf4.dq.dequant"], atol=1e-6, rtol=rounding)


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
        assert torch.equal(dequantize(quantize(short, double=double)).flatten(), dequantize(quantize(whole, double=double))[:65])
    with pytest.raises(ValueError, match="block is 63"):
        quantize(short, block=63)
