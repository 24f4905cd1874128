"""Where a run computes: on which device, by Triton or PyTorch, in which precision, from which seed."""
import os

import torch

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
    """Seed PyTorch, find the device ('auto': a GPU when there is one), join the other ranks, print what is used.

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
    """The device of that name; 'auto' is a GPU when there is one."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=found).item()  # not on meta
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"device is '{name}', which this machine does not have: use device=cpu or device=auto")
    return found


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations; 'auto' is bfloat16 where the hardware multiplies it."""
    if name == "auto":
        on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        has_it = torch.cuda.is_bf16_supported() if device.type == "cuda" else on_cpu()
        name = "bfloat16" if has_it else "float32"
    return getattr(torch, name)
