"""What all kernels share: how they are started, and that a second derivative, which none has, is refused."""
import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE

import kernels
import lora
from kernels import fused, nf4
from kernels.attention import attention
from kernels.decode import decode_attention
from kernels.layout import Layout
from kernels.logprobs import linear_logprobs


def test_no_kernel_is_started_but_by_launch():
    """kernel[grid](...) alone would run on the thread's current GPU, wherever its tensors are."""
    for file in Path(kernels.__file__).parent.glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        started = [call for call in calls if isinstance(call.func, ast.Subscript)]
        assert len(started) == (file.name == "__init__.py"), file


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
def test_every_launch_is_on_its_tensors_device_and_says_how_products_are_fused(on_triton, monkeypatch):
    """By default Triton 3.10 fuses nothing; nf4 decodes unfused, as PyTorch rounds."""
    from triton.runtime import interpreter

    current, fusion, run = [None], {}, interpreter.GridExecutor.__call__

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def call(self, *arguments, **options):
        assert current[-1] == arguments[0].device
        fusion[self.fn.__name__] = options["enable_fp_fusion"]
        return run(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    for function, inputs in FUNCTIONS.values():
        inputs = [x.float().requires_grad_() for x in inputs]
        out = function(*inputs)
        torch.autograd.grad(out.sum(), inputs[0])
    decode_attention(torch.randn(1, 1, 16), *torch.randn(2, 1, 1, 600, 16), torch.tensor([600]))
    nf4.linear(torch.randn(3, 128, dtype=torch.bfloat16), nf4.quantize(torch.randn(64, 128)))
    unfused = {name for name, fused in fusion.items() if not fused}
    assert unfused == {"_dequantize_kernel", "_linear_kernel"} and len(fusion) == 15


def made(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


frozen = lora.NF4Linear(torch.nn.Linear(64, 4, bias=False))
FUNCTIONS = {
    "attention": (lambda q, k, v: attention(q, k, v, Layout.build([4]).to(q.device)),
                  made((4, 2, 16), (4, 1, 16), (4, 1, 16))),
    "logprobs": (lambda h, w: linear_logprobs(h, w, torch.tensor([1, 5, 2], device=h.device))[0],
                 made((3, 16), (20, 16))),
    "rms_norm": (lambda x, w: fused.rms_norm(x, w, 1e-5), made((3, 16), (16,))),
    "rotary": (fused.rotary, made((3, 2, 16), (3, 1, 16), (3, 1, 16))),
    "swiglu": (fused.swiglu, made((3, 16), (3, 16))),
    "frozen weight": (lambda x: frozen.to(x.device)(x), made((3, 64))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("version", ["torch", "triton"])
def test_a_second_derivative_is_refused(name, version):
    """It would be silently wrong: what the forward kept is a constant to autograd. swiglu in PyTorch is autograd's."""
    function, inputs = FUNCTIONS[name]
    target = ("cpu", torch.float64) if version == "torch" else (DEVICE, torch.float32)
    inputs = [x.to(*target).detach().requires_grad_() for x in inputs]
    kernels.use(version)
    try:
        first = torch.autograd.grad((function(*inputs) ** 2).sum(), inputs[0], create_graph=True)[0]
        if (name, version) == ("swiglu", "torch"):
            assert torch.autograd.gradcheck(lambda *x: torch.autograd.grad(
                (function(*x) ** 2).sum(), x[0], create_graph=True)[0], inputs)
            return
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
    finally:
        kernels.use("auto")
