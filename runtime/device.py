"""Where a run computes: on which device, by Triton or PyTorch, in which precision, from which seed."""
import os

import torch
import torch.nn.functional as F

from runtime import cpu, distributed
from runtime.config import fail

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
try:
    # 67 MB, so only where it can run; TRITON_INTERPRET=0 asks for it on any machine, as tests/aot.py does.
    if not (torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ):
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:  # not every system has it; the PyTorch versions need none
    triton = tl = None
_chosen: str | None = None


def use(name: str) -> None:
    """"torch", "triton", or "auto": Triton for tensors on a GPU. Raises ValueError where Triton cannot run."""
    global _chosen
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels is '{name}', expected auto, torch or triton")
    if name == "triton" and not (triton and (INTERPRETED or torch.cuda.is_available())):
        raise ValueError("kernels is 'triton', which needs the triton package and a GPU: use kernels=torch")
    _chosen = None if name == "auto" else name


def on_triton(x: torch.Tensor) -> bool:
    """Whether the kernels run this tensor with Triton."""
    if triton is None or x.dtype == torch.float64:
        return False
    return x.is_cuda and _chosen != "torch" or INTERPRETED and _chosen == "triton"


def setup(device: str, seed: int, threads: int = 0, kernel: str = "auto", dtype: str = "") -> torch.device:
    """Seed PyTorch, find the device ('auto': find_device), join the other ranks, print what is used.

    Data order and sampling have generators of their own (data/pack.py, model.py).
    """
    found = find_device(distributed.local_device(device))
    if found.type == "cuda" and found.index is not None:
        torch.cuda.set_device(found)  # where Triton launches
    distributed.init_process_group(found)
    torch.manual_seed(seed + distributed.rank())  # dropout
    if threads:
        torch.set_num_threads(threads)
    matmul = ""
    if found.type == "cpu":
        matmul = cpu.fast_matmul()
        cpu.keep_freed_memory()
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else f"{torch.get_num_threads()} threads{matmul}"
    try:
        use(kernel)
    except ValueError as error:
        fail(str(error))
    chosen = f"triton {triton.__version__}" if on_triton(torch.empty(0, device=found)) else "torch"
    several = f"{distributed.world_size()} ranks, " if distributed.world_size() > 1 else ""
    computing = f", computing in {compute_dtype(dtype, found)}".replace("torch.", "") if dtype else ""
    print(f"torch {torch.__version__} on {found} ({several}{name}), kernels {chosen}{computing}")
    return found


def find_device(name: str) -> torch.device:
    """The device of that name; 'auto' is a GPU when there is one, Apple's (MPS) if it computes what the CPU does."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            why = wrong_on(torch.device("mps"))
            if not why:
                return torch.device("mps")
            print(f"device=auto takes the CPU: on MPS {why}")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()  # not on meta
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"device is '{name}', which this machine does not have: use device=cpu or device=auto")
    return found


def wrong_on(device: torch.device) -> str:
    """Why a device's results are not to be trusted, "" if they are: MPS has had operations that were silently wrong."""
    try:
        found = _small_step(device)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        return f"an operation fails: {str(error).splitlines()[0]}"
    for name, ours, expected in zip(("loss", "gradients", "updated weights"), found, _small_step(torch.device("cpu")),
                                    strict=True):
        gap = (ours - expected).abs().max().item()
        if not gap < 1e-4:
            return f"the {name} of a small step differ by {gap:.2g} from the CPU's"
    return ""


def _small_step(device: torch.device) -> list[torch.Tensor]:
    """Loss, gradients and weights after one step of a layer of attention with an embedding, in fp32, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in ((40, 32), (96, 32), (40, 32))]
    weights = [(weight / 4).to(device).requires_grad_() for weight in drawn]
    tokens = torch.arange(48, device=device).view(2, 24) * 7 % 40
    embedding, qkv, head = weights
    x = F.rms_norm(F.embedding(tokens, embedding), (32,))
    q, k, v = F.linear(x, qkv).view(2, 24, 3, 4, 8).permute(2, 0, 3, 1, 4)
    mask = torch.ones(24, 24, dtype=torch.bool, device=device).tril()
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    logits = F.linear(x + F.silu(attended), head)
    loss = -torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None]).mean()
    loss.backward()
    gradients = torch.cat([weight.grad.flatten() for weight in weights])
    groups = [{"params": weights, "lr": 0.1, "weight_decay": 0.1}]
    cpu.AdamW(groups, (0.9, 0.98), eps=1e-3).step()  # a gradient that is 0 but for rounding moves nothing
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    return [part.detach().cpu() for part in (loss, gradients, flat)]


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations; 'auto' is bfloat16 where the hardware multiplies it."""
    if name == "auto":
        on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        has_it = torch.cuda.is_bf16_supported() if device.type == "cuda" else on_cpu()
        name = "bfloat16" if has_it else "float32"
    return getattr(torch, name)
