"""Several processes as one run: what each keeps, what they add up, and who writes.

    torchrun --nproc-per-node 8 sft.py --config configs/zephyr-7b/sft.toml ...

Every rank knows the whole step (its trees are a function of seed and step), works on its part of them (data/pack.py,
`micro_batches`) and divides by the whole step's tokens, pairs or groups. So gradients and metrics are sums over ranks,
and the number of ranks changes only the order in which numbers are added.

    full fine-tuning   FSDP2: a rank reads and keeps a share of every weight, gradient and moment; a block's weights are
                       gathered, in the dtype of compute, while it runs; reductions and weights in fp32 (Zhao et al.
                       2023, arXiv:2304.11277). shard=8: eight ranks share a model, other eights hold copies (HSDP)
    adapters           every rank holds the frozen base and all adapters; their gradients are summed in one flat piece

Rank 0 writes and prints: functions that write a file return early on other ranks, or `runtime.writing` refuses. Before
a rank reads a file that rank 0 has written it waits at a `barrier`. Into a checkpoint every rank writes its part.
Without torchrun there is one rank, and every function here leaves its input as it is.
"""
import atexit
import gc
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.terminal import last_words


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def launched() -> bool:
    """Whether torchrun has started this process, with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(name: str) -> str:
    """The GPU that torchrun meant for this process, unless `name` names one."""
    free = launched() and name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{os.environ['LOCAL_RANK']}" if free else name


def init_process_group(device: torch.device) -> None:
    """Join the other processes, if torchrun has started several."""
    if not launched() or world_size() > 1:
        return
    # An hour: the others wait while rank 0 writes a large model.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    if device.type == "cpu":
        atexit.register(_leave)  # not with NCCL, which might wait here for a rank that has failed
    sys.excepthook = _end
    if rank():
        sys.stdout = open(os.devnull, "w")


def _end(kind: type, error: BaseException, trace) -> None:
    """When one rank fails, the others can only stop: the traceback to read is not theirs."""
    if "gloo/transport" in str(error):
        print(f"rank {rank()} ends, for another has", file=sys.stderr)
    else:
        last_words(kind, error, trace)


def _leave() -> None:
    gc.collect()  # a sharded model that outlives its process group aborts the process (torch 2.13 on the CPU)
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------- full fine-tuning

def fully_shard(model: nn.Module, size: int, device: torch.device) -> nn.Module:
    """FSDP2, in place: this rank keeps 1 / size of the weights; `size` ranks hold one model together, 0: all ranks."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    size = size or world_size()
    if size == world_size():
        mesh = init_device_mesh(device.type, (size,))
    else:
        mesh = init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=("copy", "shard"))
    for block in model.layers:
        policy = fsdp.MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    # Embedding, last norm and heads are gathered in fp32, and stay until the backward pass: losses use the head outside
    # of `hidden`.
    policy = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fsdp.register_fsdp_forward_method(model, "hidden")
    for module in (*model.layers, model):  # sums, not means: losses are divided by what the whole step holds
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")


def reshard(model: nn.Module) -> None:
    """Free the gathered weights: until the next forward pass parameters are this rank's part, as in the optimizer."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole parameter, gathered: every rank must call this."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter, without a gradient, and the number of its first row in the whole."""
    if not hasattr(parameter, "to_local"):
        return parameter.detach(), 0
    mesh = parameter.device_mesh
    return parameter.detach().to_local(), mesh.get_local_rank(mesh.ndim - 1) * -(-len(parameter) // mesh.shape[-1])


@torch.no_grad()
def copy_weights(model: nn.Module, to: nn.Module) -> None:
    """The weights of a sharded model into a whole one on every rank."""
    for source, target in zip(model.parameters(), to.parameters(), strict=True):
        target.copy_(full_tensor(source))


# --------------------------------------------------------------------------------------- adding up

def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scale the gradient, summed over ranks, down to `max_norm`; its norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if world_size() > 1 and not hasattr(gradients[0], "full_tensor"):  # FSDP has summed its own in the backward pass
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)).item()


def all_reduce(tensor: Tensor, largest: bool = False) -> Tensor:
    """A tensor on the CPU, in place its sum over ranks or the largest: of a table, each rank has filled a part."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


def all_reduce_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Every metric's sum over ranks."""
    total = all_reduce(torch.tensor(list(metrics.values()), dtype=torch.float64))
    return dict(zip(metrics, total.tolist(), strict=True))


def all_reduce_max(value: float) -> float:
    """The largest over ranks."""
    return all_reduce(torch.tensor(value, dtype=torch.float64), largest=True).item()


def any_rank(flag) -> bool:
    """Is the flag true on any rank?"""
    return bool(all_reduce_max(float(bool(flag))))


def all_gather(items: list) -> list:
    """The items of all ranks, rank by rank."""
    if world_size() == 1:
        return items
    everyone: list = [None] * world_size()
    dist.all_gather_object(everyone, items)
    return [item for part in everyone for item in part]


def barrier() -> None:
    """Wait until all ranks are here."""
    all_reduce(torch.zeros(1))


# ------------------------------------------------------------------------------------------- state

def another_group():
    """All ranks on the CPU once more, for a thread: what it tells the other ranks must not mix with training's."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


def save_sharded(tensors: dict[str, Tensor], folder: Path, group=None) -> None:
    """Write one safetensors file a rank, with its part, to the folder, and sync it. OSError on all ranks if one could
    not. A group of its own is left at the end."""
    import torch.distributed.checkpoint as dcp  # only now: it takes a second to import

    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        raise OSError(_causes(error)) from None
    finally:
        if group is not None:
            dist.destroy_process_group(group)


def load_sharded(tensors: dict[str, Tensor], folder: Path, optional: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill the tensors with what any number of ranks have saved; the `optional` ones that are there too, returned."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    held = reader.read_metadata().state_dict_metadata
    for name, tensor in held.items():
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():  # it would be filled in part
            raise ValueError(f"{name} is not whole: a file is missing")
    optional = {name: tensor for name, tensor in optional.items() if name in held}
    try:
        with warnings.catch_warnings(action="ignore"):  # that one process loads alone
            dcp.load(tensors | optional, storage_reader=reader, no_dist=world_size() == 1)
    except dcp.api.CheckpointException as error:
        raise ValueError(_causes(error)) from None
    return optional


def _causes(error) -> str:
    return "; ".join(dict.fromkeys(str(cause) for cause, _ in error.failures.values()))
